//! The KV cache of both processes: its format, its memory, its free blocks, and what is in them.

use std::ops::Range;

use kvxfer::blocks::GroupBlocks;
use kvxfer::layout::{
    Axis, AxisKind, CacheGroup, DType, GroupKind, KvFormat, KvPlacement, LayerFormat,
    ModelIdentity, Packing, TensorFormat, TensorRole, Topology,
};
use kvxfer::mem::{HostArena, HostBuffer, HostMemory};
use kvxfer::ticket::Ticket;

use crate::Failed;

/// The two cache groups: layers that share a block table.
pub(crate) const FULL: u32 = 0;
pub(crate) const SLIDING: u32 = 1;
const GROUPS: [u32; 2] = [FULL, SLIDING];
/// Tokens of a block.
pub(crate) const BLOCK_TOKENS: u32 = 16;
/// Tokens that the layers of the sliding group look back.
const WINDOW: u32 = 64;
/// Layers of the model.
const LAYERS: u32 = 6;

/// What a block *is*. Both sides must say the same, field by field, before a byte moves; how many
/// blocks each has, and where they lie, is each one's own affair.
///
/// Every other layer attends to all tokens and has keys and values in two tensors. The layers
/// between attend to a window and have fewer heads, with keys and values in one tensor.
pub(crate) fn format() -> Result<KvFormat, Failed> {
    let tensor = |name: &str, role, axes| TensorFormat {
        name: name.into(),
        role,
        dtype: DType::Bf16,
        axes,
        // The heads, were there several tensor-parallel ranks: index into `axes`.
        sharded: Some(1),
        scaling: None,
    };
    let tokens = u64::from(BLOCK_TOKENS);
    let full = |layer| {
        // Extents are the whole model's; what a rank keeps of them is said by its placement.
        let axes = vec![
            Axis::new(AxisKind::Token, tokens),
            Axis::new(AxisKind::Head, 4),
            Axis::new(AxisKind::Dim, 64),
        ];
        LayerFormat {
            layer,
            draft: false,
            tensors: vec![
                tensor("k", TensorRole::Key, axes.clone()),
                tensor("v", TensorRole::Value, axes),
            ],
        }
    };
    let sliding = |layer| LayerFormat {
        layer,
        draft: false,
        tensors: vec![tensor(
            "kv",
            TensorRole::KeyValue,
            vec![
                Axis::new(AxisKind::Kv, 2),
                Axis::new(AxisKind::Head, 2),
                Axis::new(AxisKind::Token, tokens),
                Axis::new(AxisKind::Dim, 64),
            ],
        )],
    };
    let groups = vec![
        CacheGroup {
            name: "full".into(),
            kind: GroupKind::Full,
            block_tokens: BLOCK_TOKENS,
            layers: (0..LAYERS).step_by(2).map(full).collect(),
        },
        CacheGroup {
            name: "sliding".into(),
            kind: GroupKind::SlidingWindow { tokens: WINDOW },
            block_tokens: BLOCK_TOKENS,
            layers: (1..LAYERS).step_by(2).map(sliding).collect(),
        },
    ];
    Ok(KvFormat::new(
        ModelIdentity::new("example", Some("two-groups")),
        groups,
    )?)
}

/// Which of a request's blocks a group keeps: all, or those in the window of the last tokens.
pub(crate) fn kept(group: u32, tokens: u32) -> Range<u32> {
    let end = tokens.div_ceil(BLOCK_TOKENS);
    match group {
        SLIDING => tokens.saturating_sub(WINDOW) / BLOCK_TOKENS..end,
        _ => 0..end,
    }
}

/// A request's block tables: which physical blocks of this side hold it.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    pub(crate) tokens: u32,
    /// One entry for each group, in token order.
    pub(crate) groups: Vec<GroupBlocks>,
}

impl Table {
    /// Pairs (block of the request, physical block) of a group, for a part of the request's blocks.
    pub(crate) fn part(&self, group: u32, part: Range<u32>) -> Vec<(u32, u32)> {
        let blocks = self.groups.iter().find(|g| g.group == group);
        let physical = blocks.map_or(&[][..], |g| &g.blocks).iter().copied();
        kept(group, self.tokens)
            .zip(physical)
            .filter(|(at, _)| part.contains(at))
            .collect()
    }

    /// The physical blocks of a part of the request, all groups.
    pub(crate) fn blocks(&self, part: &Range<u32>) -> Vec<GroupBlocks> {
        let of = |&group: &u32| GroupBlocks {
            group,
            blocks: self.part(group, part.clone()).iter().map(|p| p.1).collect(),
        };
        GROUPS.iter().map(of).collect()
    }

    /// Pairs (own block, block of the ticket) for a part of the request's blocks. A ticket that
    /// holds fewer blocks of a group than the request has holds the last ones: the other side has
    /// the prefix.
    pub(crate) fn with_ticket(
        &self,
        ticket: &Ticket,
        group: u32,
        part: &Range<u32>,
    ) -> Vec<(u32, u32)> {
        let own = self.part(group, self.all());
        let theirs = ticket.groups.iter().find(|g| g.group == group);
        let theirs = theirs.map_or(&[][..], |g| &g.blocks);
        let prefix = own.len().saturating_sub(theirs.len());
        own.into_iter()
            .skip(prefix)
            .zip(theirs.iter().copied())
            .filter(|((at, _), _)| part.contains(at))
            .map(|((_, own), theirs)| (own, theirs))
            .collect()
    }

    /// All of the request's blocks.
    pub(crate) fn all(&self) -> Range<u32> {
        0..self.tokens.div_ceil(BLOCK_TOKENS)
    }
}

/// The free blocks. A block that is in here may be handed to the next request at once, so none
/// comes back before kvxfer has said that its memory is released.
#[derive(Debug)]
pub(crate) struct Pool {
    free: Vec<Vec<u32>>,
    size: Vec<u32>,
}

impl Pool {
    fn new(num_blocks: &[u32]) -> Self {
        Self {
            free: num_blocks.iter().map(|n| (0..*n).collect()).collect(),
            size: num_blocks.to_vec(),
        }
    }

    /// Blocks for a request, or `None` where too few are free now.
    pub(crate) fn take(&mut self, tokens: u32) -> Option<Table> {
        let needs = |group: u32| kept(group, tokens).len();
        let enough = |(group, free): (u32, &Vec<u32>)| free.len() >= needs(group);
        if !GROUPS.into_iter().zip(&self.free).all(enough) {
            return None;
        }
        let groups = GROUPS.into_iter().zip(&mut self.free);
        let groups = groups.map(|(group, free)| GroupBlocks {
            group,
            blocks: free.split_off(free.len() - needs(group)),
        });
        Some(Table {
            tokens,
            groups: groups.collect(),
        })
    }

    pub(crate) fn give(&mut self, table: Table) {
        for (free, group) in self.free.iter_mut().zip(table.groups) {
            free.extend(group.blocks);
        }
    }

    /// Whether every block is free, once.
    pub(crate) fn is_whole(&mut self) -> bool {
        self.free.iter_mut().zip(&self.size).all(|(free, size)| {
            free.sort_unstable();
            free.iter().copied().eq(0..*size)
        })
    }
}

/// One process's cache.
#[derive(Debug)]
pub(crate) struct Cache {
    pub(crate) format: KvFormat,
    pub(crate) placement: KvPlacement,
    pub(crate) pool: Pool,
    memory: HostMemory,
}

impl Cache {
    /// `num_blocks` for each group. `shareable` memory can be mapped by a peer on this host; other
    /// memory is what an engine has that allocated without thinking of kvxfer.
    pub(crate) fn new(num_blocks: [u32; 2], shareable: bool) -> Result<Self, Failed> {
        let format = format()?;
        let topology = Topology::single(&format);
        // Dense tensors one behind the other. An engine that has its tensors already names each
        // one's memory, offset and strides in a `PlacedTensor` and calls `KvPlacement::new`.
        let uniform =
            KvPlacement::uniform(&format, topology, &num_blocks, Packing::OneMemory, 4096)?;
        let bytes: u64 = uniform.memory_bytes().iter().sum();
        let memory = match shareable {
            true => HostArena::new(bytes)?.memory().clone(),
            false => HostBuffer::new(bytes)?.memory().clone(),
        };
        let placement = uniform.place(&format, vec![memory.as_memory()])?;
        Ok(Self {
            format,
            placement,
            pool: Pool::new(&num_blocks),
            memory,
        })
    }

    /// The layers of the model, each with the group that it belongs to.
    pub(crate) fn layers() -> impl Iterator<Item = (u32, u32)> {
        (0..LAYERS).map(|layer| (layer, if layer % 2 == 0 { FULL } else { SLIDING }))
    }

    /// Stands for computing a layer: puts into a part of a request's blocks what only this request
    /// has at this place.
    pub(crate) fn compute(
        &self,
        request: &str,
        table: &Table,
        layer: u32,
        part: &Range<u32>,
    ) -> Result<(), Failed> {
        self.each(table, Some(layer), part, |at| {
            let word = pattern(request, at);
            Ok(self.memory.fill_words(at.offset, at.bytes, word)?)
        })
        .map(drop)
    }

    /// Checks every byte of a part of a request's blocks, in all layers. Returns how many bytes.
    pub(crate) fn check(
        &self,
        request: &str,
        table: &Table,
        part: &Range<u32>,
    ) -> Result<u64, Failed> {
        self.each(table, None, part, |at| {
            let word = pattern(request, at);
            let checked = self.memory.verify_words(at.offset, at.bytes, word);
            checked.map_err(|error| {
                let Place {
                    group,
                    layer,
                    tensor,
                    token_block,
                    ..
                } = at;
                format!(
                    "request {request}, group {group}, layer {layer}, tensor {tensor}, block \
                     {token_block} of the request: {error}"
                )
                .into()
            })
        })
    }

    /// Overwrites a request's blocks, as the next request would: whoever still read them would see
    /// it.
    pub(crate) fn scribble(&self, table: &Table) -> Result<(), Failed> {
        self.each(table, None, &table.all(), |at| {
            Ok(self.memory.fill(at.offset, at.bytes, 0xdd)?)
        })
        .map(drop)
    }

    fn each(
        &self,
        table: &Table,
        layer: Option<u32>,
        part: &Range<u32>,
        mut act: impl FnMut(&Place) -> Result<(), Failed>,
    ) -> Result<u64, Failed> {
        let mut bytes = 0;
        for tensor in self.placement.desc().tensors() {
            if layer.is_some_and(|layer| layer != tensor.layer) {
                continue;
            }
            for (token_block, block) in table.part(tensor.group, part.clone()) {
                let place = Place {
                    group: tensor.group,
                    layer: tensor.layer,
                    tensor: tensor.tensor,
                    token_block,
                    offset: tensor.offset + u64::from(block) * tensor.block_stride,
                    // The placement is dense: a block is as long as the way to the next.
                    bytes: tensor.block_stride,
                };
                act(&place)?;
                bytes += place.bytes;
            }
        }
        Ok(bytes)
    }
}

/// One block of one tensor.
#[derive(Debug)]
struct Place {
    group: u32,
    layer: u32,
    tensor: u32,
    token_block: u32,
    offset: u64,
    bytes: u64,
}

/// The words of a block: they tell the request, the place in the model and the place in the
/// request, but not the physical block, which differs between the two sides.
fn pattern(request: &str, at: &Place) -> impl Fn(u64) -> u64 + use<> {
    let parts = [at.group, at.layer, at.tensor, at.token_block];
    let start = request.bytes().map(u32::from).chain(parts);
    let seed = start.fold(0xcbf2_9ce4_8422_2325, |hash: u64, part| {
        (hash ^ u64::from(part)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    move |i| {
        let x = (seed ^ i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x ^ (x >> 29)
    }
}
