//! Where one rank keeps its part of the cache.

use std::fmt;
use std::sync::Arc;

use kvxfer_verbs::Memory;
use serde::{Deserialize, Serialize};

use super::overlap::{self, Nest};
use super::{KvFormat, LayoutError, Shard, TensorFormat, limits};
use crate::ids::Rank;

/// A run of model layers: those of one pipeline rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LayerWindow {
    /// The first layer.
    pub first: u32,
    /// One past the last layer.
    pub end: u32,
}

impl LayerWindow {
    /// All layers of a format.
    #[must_use]
    pub fn all(format: &KvFormat) -> Self {
        Self {
            first: 0,
            end: format.layers(),
        }
    }

    /// The window of rank `pp_rank` where `layers` layers are dealt evenly to `pp` ranks; the first
    /// ranks get one more where it does not come out even.
    #[must_use]
    pub fn even(layers: u32, pp_rank: u32, pp: u32) -> Self {
        let (each, more) = match pp {
            0 => (layers, 0),
            pp => (layers / pp, layers % pp),
        };
        let first_of = |r: u32| {
            (each.saturating_mul(r))
                .saturating_add(r.min(more))
                .min(layers)
        };
        Self {
            first: first_of(pp_rank),
            end: first_of(pp_rank.saturating_add(1)),
        }
    }

    /// Whether the window holds this layer.
    #[must_use]
    pub const fn contains(&self, layer: u32) -> bool {
        self.first <= layer && layer < self.end
    }
}

impl fmt::Display for LayerWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.first, self.end)
    }
}

/// A rank's position in its engine: which part of the cache it keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Topology {
    /// The rank.
    pub rank: Rank,
    /// Tensor-parallel ranks.
    pub tp: u32,
    /// Pipeline-parallel ranks.
    pub pp: u32,
    /// Data-parallel ranks.
    pub dp: u32,
    /// The layers of this pipeline rank.
    pub layers: LayerWindow,
}

impl Topology {
    /// The only rank of an engine, with all layers.
    #[must_use]
    pub fn single(format: &KvFormat) -> Self {
        Self::tensor_parallel(format, 0, 1)
    }

    /// Rank `rank` of `tp` tensor-parallel ranks, with all layers.
    #[must_use]
    pub fn tensor_parallel(format: &KvFormat, rank: u32, tp: u32) -> Self {
        Self {
            rank: Rank {
                dp: 0,
                pp: 0,
                tp: rank,
            },
            tp,
            pp: 1,
            dp: 1,
            layers: LayerWindow::all(format),
        }
    }

    fn check(&self, format: &KvFormat) -> Result<(), LayoutError> {
        let sizes = [
            ("tp", self.rank.tp, self.tp),
            ("pp", self.rank.pp, self.pp),
            ("dp", self.rank.dp, self.dp),
        ];
        for (what, rank, size) in sizes {
            if rank >= size {
                return Err(LayoutError::Rank { what, rank, size });
            }
        }
        let LayerWindow { first, end } = self.layers;
        let layers = format.layers();
        if first >= end || end > layers {
            return Err(LayoutError::Window { first, end, layers });
        }
        Ok(())
    }
}

/// Where a rank keeps one tensor: element `(block, i, j, …)` is at
/// `offset + block * block_stride + i * strides[0] + j * strides[1] + …` of its memory.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PlacedTensor {
    /// Index of the cache group in the format.
    pub group: u32,
    /// Model-wide index of the layer.
    pub layer: u32,
    /// Index of the tensor in its layer.
    pub tensor: u32,
    /// Index of the memory.
    pub memory: u32,
    /// Where block 0 begins, in bytes from the memory's first byte.
    pub offset: u64,
    /// Bytes from a block to the next. It may be smaller than a stride within the block, as in
    /// `[2, blocks, …]`.
    pub block_stride: u64,
    /// How many blocks there are.
    pub num_blocks: u32,
    /// Bytes of one step along each axis of the format's tensor, in the format's order.
    pub strides: Vec<u64>,
    /// The part of the sharded axis that is here; `None`: all of it.
    #[serde(default)]
    pub shard: Option<Shard>,
}

impl PlacedTensor {
    /// The part of the sharded axis that is here, if the tensor has such an axis.
    #[must_use]
    pub fn shard_of(&self, format: &TensorFormat) -> Option<Shard> {
        let axis = format.sharded_axis()?;
        Some(self.shard.unwrap_or(Shard {
            first: 0,
            count: axis.extent,
        }))
    }

    /// The extents of this rank's part, in the format's order of axes.
    #[must_use]
    pub fn extents(&self, format: &TensorFormat) -> Vec<u64> {
        let mut extents: Vec<u64> = format.axes.iter().map(|a| a.extent).collect();
        let sharded = format.sharded.and_then(|i| usize::try_from(i).ok());
        if let (Some(shard), Some(at)) = (self.shard_of(format), sharded)
            && let Some(extent) = extents.get_mut(at)
        {
            *extent = shard.count;
        }
        extents
    }
}

/// Where a rank keeps its part of the cache, without the memory itself: what peers are told.
///
/// One made by [`PlacementDesc::new`] or [`KvPlacement`] is valid for its format; one that was
/// decoded is not until [`PlacementDesc::validate`] has said so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacementDesc {
    topology: Topology,
    tensors: Vec<PlacedTensor>,
    pools: Vec<u32>,
    memory: Vec<u64>,
}

impl PlacementDesc {
    /// A placement of these tensors in memories of these lengths.
    ///
    /// `pools` names for each group the pool that its block ids are drawn from; empty: a pool for
    /// each group. Tensors of groups that share a pool may lie on the same bytes, block by block,
    /// because a block of the pool belongs to one group at a time.
    ///
    /// # Errors
    ///
    /// As [`PlacementDesc::validate`].
    pub fn new(
        format: &KvFormat,
        topology: Topology,
        tensors: Vec<PlacedTensor>,
        pools: Vec<u32>,
        memory: Vec<u64>,
    ) -> Result<Self, LayoutError> {
        let pools = if pools.is_empty() {
            (0_u32..).take(format.groups().len()).collect()
        } else {
            pools
        };
        let desc = Self {
            topology,
            tensors,
            pools,
            memory,
        };
        desc.validate(format)?;
        Ok(desc)
    }

    /// Checks everything against the format.
    ///
    /// # Errors
    ///
    /// A rank outside its size, a window outside the model, a tensor that is missing, there twice or
    /// not in the format, one that ends behind its memory, strides under which a tensor's elements
    /// overlap, two tensors that overlap, numbers of blocks that differ within a group or a pool,
    /// or more of something than [`limits`] allows.
    pub fn validate(&self, format: &KvFormat) -> Result<(), LayoutError> {
        self.topology.check(format)?;
        let count = self.tensors.len() as u64;
        if count > limits::TENSORS as u64 {
            return Err(LayoutError::TooMany {
                path: "placement.tensors".into(),
                count,
                max: limits::TENSORS as u64,
            });
        }
        if self.pools.len() != format.groups().len() {
            return Err(LayoutError::Length {
                path: "placement.pools".into(),
                count: self.pools.len() as u64,
                expected: format.groups().len() as u64,
            });
        }
        self.check_complete(format)?;
        self.check_num_blocks(format)?;
        let mut nests = Vec::with_capacity(self.tensors.len());
        let mut pieces = 0_u64;
        for placed in &self.tensors {
            let nest = self.check_tensor(format, placed)?;
            pieces = pieces.saturating_add(nest.pieces());
            if pieces > overlap::TOTAL_PIECES {
                return Err(LayoutError::TooFine {
                    path: self.label(format, placed),
                    pieces,
                    max: overlap::TOTAL_PIECES,
                });
            }
            nests.push(nest);
        }
        overlap::check(&self.tensors, &nests, &self.pools, |t| {
            self.label(format, t)
        })
    }

    /// The rank's position.
    #[must_use]
    pub const fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Its tensors.
    #[must_use]
    pub fn tensors(&self) -> &[PlacedTensor] {
        &self.tensors
    }

    /// The pool of each group's blocks.
    #[must_use]
    pub fn pools(&self) -> &[u32] {
        &self.pools
    }

    /// The length of each memory in bytes.
    #[must_use]
    pub fn memory_len(&self) -> &[u64] {
        &self.memory
    }

    /// How many blocks a group has here; `None` where this rank keeps nothing of the group.
    #[must_use]
    pub fn num_blocks(&self, group: u32) -> Option<u32> {
        let of_group = |t: &&PlacedTensor| t.group == group;
        self.tensors.iter().find(of_group).map(|t| t.num_blocks)
    }

    fn label(&self, format: &KvFormat, t: &PlacedTensor) -> String {
        format.tensor_label(t.group, t.layer, t.tensor)
    }

    /// Every tensor of the window's layers is there once, and nothing else is.
    fn check_complete(&self, format: &KvFormat) -> Result<(), LayoutError> {
        let mut here: Vec<(u32, u32, u32)> = self
            .tensors
            .iter()
            .map(|t| (t.group, t.layer, t.tensor))
            .collect();
        here.sort_unstable();
        let mut next = here.into_iter().peekable();
        for (g, group) in (0_u32..).zip(format.groups()) {
            for layer in &group.layers {
                if !self.topology.layers.contains(layer.layer) {
                    continue;
                }
                for t in (0_u32..).take(layer.tensors.len()) {
                    let wanted = (g, layer.layer, t);
                    // Both lists rise, so a smaller one is not in the format's.
                    if let Some(extra) = next.next_if(|p| *p < wanted) {
                        return Err(self.unexpected(format, extra));
                    }
                    if next.next_if_eq(&wanted).is_none() {
                        return Err(LayoutError::MissingTensor {
                            path: format.tensor_label(g, layer.layer, t),
                        });
                    }
                }
            }
        }
        match next.next() {
            Some(extra) => Err(self.unexpected(format, extra)),
            None => Ok(()),
        }
    }

    fn unexpected(
        &self,
        format: &KvFormat,
        (group, layer, tensor): (u32, u32, u32),
    ) -> LayoutError {
        let known = format.tensor(group, layer, tensor).is_some();
        if known && self.topology.layers.contains(layer) {
            return LayoutError::Duplicate {
                path: "placement.tensors".into(),
                value: format.tensor_label(group, layer, tensor),
            };
        }
        LayoutError::UnknownTensor {
            group,
            layer,
            tensor,
        }
    }

    /// One number of blocks in each pool, and so in each group.
    fn check_num_blocks(&self, format: &KvFormat) -> Result<(), LayoutError> {
        let mut first_of_pool: std::collections::BTreeMap<u32, &PlacedTensor> =
            std::collections::BTreeMap::new();
        for t in &self.tensors {
            if t.num_blocks == 0 {
                return Err(LayoutError::Zero {
                    path: format!("{}: num_blocks", self.label(format, t)),
                });
            }
            let group = usize::try_from(t.group).unwrap_or(usize::MAX);
            let pool = self.pools.get(group).copied().unwrap_or(t.group);
            let first = first_of_pool.entry(pool).or_insert(t);
            if first.num_blocks != t.num_blocks {
                return Err(LayoutError::NumBlocks {
                    path: self.label(format, t),
                    num_blocks: t.num_blocks,
                    other: self.label(format, first),
                    other_blocks: first.num_blocks,
                });
            }
        }
        Ok(())
    }

    fn check_tensor(&self, format: &KvFormat, t: &PlacedTensor) -> Result<Nest, LayoutError> {
        let path = || self.label(format, t);
        let tensor =
            format
                .tensor(t.group, t.layer, t.tensor)
                .ok_or(LayoutError::UnknownTensor {
                    group: t.group,
                    layer: t.layer,
                    tensor: t.tensor,
                })?;
        if t.strides.len() != tensor.axes.len() {
            return Err(LayoutError::Length {
                path: format!("{}: strides", path()),
                count: t.strides.len() as u64,
                expected: tensor.axes.len() as u64,
            });
        }
        if let Some(shard) = t.shard {
            shard.check(tensor, path)?;
        }
        let nest = Nest::new(tensor, t, path)?;
        let memory = usize::try_from(t.memory).ok();
        let Some(&len) = memory.and_then(|m| self.memory.get(m)) else {
            return Err(LayoutError::NoMemory {
                path: path(),
                memory: t.memory,
                memories: u32::try_from(self.memory.len()).unwrap_or(u32::MAX),
            });
        };
        let end = t
            .offset
            .checked_add(nest.span())
            .ok_or_else(|| LayoutError::Overflow { path: path() })?;
        if end > len {
            return Err(LayoutError::OutsideMemory {
                path: path(),
                memory: t.memory,
                end,
                len,
            });
        }
        Ok(nest)
    }
}

/// Where this rank keeps its part of the cache, with the memory it lies in.
#[derive(Debug, Clone)]
pub struct KvPlacement {
    desc: PlacementDesc,
    memory: Vec<Arc<dyn Memory>>,
}

impl KvPlacement {
    /// A placement of these tensors in this memory, each group with a pool of blocks of its own.
    ///
    /// # Errors
    ///
    /// As [`PlacementDesc::validate`]; and two memories that share bytes.
    pub fn new(
        format: &KvFormat,
        topology: Topology,
        tensors: Vec<PlacedTensor>,
        memory: Vec<Arc<dyn Memory>>,
    ) -> Result<Self, LayoutError> {
        Self::with_pools(format, topology, tensors, Vec::new(), memory)
    }

    /// The same, for groups that draw their blocks from pools they share; see
    /// [`PlacementDesc::new`].
    ///
    /// # Errors
    ///
    /// As [`KvPlacement::new`].
    pub fn with_pools(
        format: &KvFormat,
        topology: Topology,
        tensors: Vec<PlacedTensor>,
        pools: Vec<u32>,
        memory: Vec<Arc<dyn Memory>>,
    ) -> Result<Self, LayoutError> {
        check_memories(&memory)?;
        let lengths = memory.iter().map(|m| m.len()).collect();
        let desc = PlacementDesc::new(format, topology, tensors, pools, lengths)?;
        Ok(Self { desc, memory })
    }

    /// What peers are told.
    #[must_use]
    pub const fn desc(&self) -> &PlacementDesc {
        &self.desc
    }

    /// The memory, in the order that the tensors' indices mean.
    #[must_use]
    pub fn memory(&self) -> &[Arc<dyn Memory>] {
        &self.memory
    }
}

/// Overlaps are looked for within each memory, so no two memories may share bytes.
fn check_memories(memory: &[Arc<dyn Memory>]) -> Result<(), LayoutError> {
    let mut spans: Vec<(u64, u64, u32)> = (0_u32..)
        .zip(memory)
        .filter(|(_, m)| !m.is_empty())
        .map(|(i, m)| (m.addr(), m.addr().saturating_add(m.len()), i))
        .collect();
    spans.sort_unstable();
    for (a, b) in spans.iter().zip(spans.iter().skip(1)) {
        if b.0 < a.1 {
            return Err(LayoutError::MemoryOverlap {
                first: a.2,
                second: b.2,
                addr: b.0,
            });
        }
    }
    Ok(())
}
