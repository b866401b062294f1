//! Blocks that are named one by one, as kernels do: what a block of a layer takes is worked out once, and each block
//! that is named is then resolved by arithmetic, with nothing sorted and nothing compared.

use std::ops::Range;
use std::sync::Arc;

use super::compile::{Compiled, Inner, Role, TensorPair};
use super::error::PlanError;
use super::lazy::{Emitter, OpSpan, Sink, SpanPiece, index};
use super::request::{Builder, PlanLimits};
use super::source::{Op, OpList, OpSource, Piece};
use crate::blocks::BlockPair;
use crate::layout::Steps;

/// What a block of each layer takes, in groups whose blocks are of one size on both sides.
#[derive(Debug)]
pub(crate) struct BlockOps {
    inner: Arc<Inner>,
    /// Of one block of each class, with offsets from where it begins.
    spans: Vec<OpSpan>,
    pieces: Vec<SpanPiece>,
    /// In `layers`, by group.
    groups: Vec<Range<usize>>,
    /// By group, then layer.
    layers: Vec<LayerOps>,
    tensors: Vec<TensorOps>,
}

/// What a block of one layer takes.
#[derive(Debug)]
pub(crate) struct LayerOps {
    /// The cache group.
    pub(crate) group: u32,
    /// The layer, over the whole model.
    pub(crate) layer: u32,
    /// Bytes of a block in it, of what moves between the two ranks.
    pub(crate) bytes: u64,
    /// Operations of a block.
    ops: u64,
    /// How many blocks that follow each other on both sides go in one operation of a tensor; 1: each by itself.
    most: u32,
    tensors: Range<usize>,
}

/// Where the blocks of a tensor have a stretch, on one side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PieceSide {
    /// Index of the memory.
    pub(crate) region: u32,
    /// Where block 0 has it.
    pub(crate) offset: u64,
    /// Bytes from one block to the next.
    pub(crate) stride: u64,
}

/// A stretch of a block that is contiguous on both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BlockPiece {
    pub(crate) remote: PieceSide,
    pub(crate) local: PieceSide,
    pub(crate) len: u64,
}

#[derive(Debug, Clone, Copy)]
struct TensorOps {
    class: usize,
    at: TensorPair,
    remote: Steps,
    local: Steps,
    /// In `BlockOps::spans`.
    first: usize,
    end: usize,
}

/// A layer of [`BlockOps`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct LayerAt(u32);

impl BlockOps {
    /// Works it out, with operations that a device takes.
    ///
    /// # Errors
    ///
    /// [`PlanError::Limits`], for limits of zero.
    pub(crate) fn new(plans: &Compiled, limits: PlanLimits) -> Result<Self, PlanError> {
        let PlanLimits {
            max_msg_bytes,
            max_sge,
        } = limits;
        if max_msg_bytes == 0 || max_sge == 0 {
            return Err(PlanError::Limits {
                max_msg_bytes,
                max_sge,
            });
        }
        let inner = &plans.inner;
        let mut build = Builder::new(limits, inner.classes.len());
        let of_class: Vec<Range<usize>> = (inner.classes.iter())
            .map(|class| {
                let first = build.spans.len();
                build.one_unit(class);
                first..build.spans.len()
            })
            .collect();
        let mut ops = Self {
            inner: Arc::clone(inner),
            spans: build.spans,
            pieces: build.pieces,
            groups: Vec::with_capacity(inner.groups.len()),
            layers: Vec::new(),
            tensors: Vec::new(),
        };
        for (number, group) in (0_u32..).zip(&inner.groups) {
            let first = ops.layers.len();
            let layers = group.layers().iter().copied();
            for layer in layers.filter(|layer| inner.window.contains(*layer)) {
                let begins = ops.tensors.len();
                let (mut bytes, mut longest, mut whole) = (0_u64, 0, true);
                for class in group.classes.clone() {
                    let (of, spans) = (&inner.classes[class], &of_class[class]);
                    let tensors = &inner.tensors[of.tensors.clone()];
                    let from = tensors.partition_point(|t| t.layer < layer);
                    let to = tensors.partition_point(|t| t.layer <= layer);
                    let tensors = &tensors[from..to];
                    if tensors.is_empty() {
                        continue;
                    }
                    bytes = bytes.saturating_add(of.bytes.saturating_mul(tensors.len() as u64));
                    longest = of.bytes.max(longest);
                    // One block ends where the next one begins.
                    let even = Steps::Even(of.bytes);
                    let in_one = spans.len() == 1 && ops.spans[spans.start].count == 1;
                    whole &= in_one && (of.remote, of.local) == (even, even);
                    ops.tensors.extend(tensors.iter().map(|at| TensorOps {
                        class,
                        at: *at,
                        remote: of.remote,
                        local: of.local,
                        first: spans.start,
                        end: spans.end,
                    }));
                }
                let tensors = begins..ops.tensors.len();
                let spans = ops.tensors[tensors.clone()].iter();
                let spans = spans.map(|t| (t.end - t.first) as u64).sum();
                let room = u64::from(build.max_len) / longest.max(1);
                ops.layers.push(LayerOps {
                    group: number,
                    layer,
                    bytes,
                    ops: spans,
                    most: match whole {
                        true => u32::try_from(room).unwrap_or(u32::MAX).max(1),
                        false => 1,
                    },
                    tensors,
                });
            }
            ops.groups.push(first..ops.layers.len());
        }
        Ok(ops)
    }

    /// A layer that a group has, and the two ranks both keep.
    #[inline]
    pub(crate) fn find(&self, group: u32, layer: u32) -> Option<(LayerAt, &LayerOps)> {
        let range = self.groups.get(usize::try_from(group).ok()?)?;
        let layers = self.layers.get(range.clone())?;
        // Layers mostly follow each other.
        let guess = layer.checked_sub(layers.first()?.layer)? as usize;
        let at = match layers.get(guess) {
            Some(found) if found.layer == layer => guess,
            _ => layers.binary_search_by_key(&layer, |l| l.layer).ok()?,
        };
        let number = u32::try_from(range.start + at).ok()?;
        Some((LayerAt(number), layers.get(at)?))
    }

    /// Which side names blocks.
    pub(crate) fn role(&self) -> Role {
        self.inner.role
    }

    /// How many blocks the two ranks have, the producer's first.
    pub(crate) fn num_blocks(&self, group: u32) -> (u32, u32) {
        let group = usize::try_from(group)
            .ok()
            .and_then(|g| self.inner.groups.get(g));
        group.map_or((0, 0), |g| (g.producer_blocks, g.consumer_blocks))
    }

    /// The group of a layer.
    pub(crate) fn group(&self, at: LayerAt) -> u32 {
        self.layer(at).group
    }

    /// All layers.
    pub(crate) fn layers(&self) -> impl Iterator<Item = (LayerAt, &LayerOps)> {
        (0_u32..).map(LayerAt).zip(&self.layers)
    }

    /// The stretches of a block of a layer, tensor by tensor. `None` where blocks are not at even distances.
    pub(crate) fn pieces(&self, at: LayerAt) -> Option<Vec<Vec<BlockPiece>>> {
        let tensors = self.tensors.get(self.layer(at).tensors.clone())?;
        let of = |tensor: &TensorOps| {
            let (Steps::Even(remote), Steps::Even(local)) = (tensor.remote, tensor.local) else {
                return None;
            };
            let (class, at) = (self.inner.classes.get(tensor.class)?, tensor.at);
            let pieces = class.pieces.iter().map(|piece| BlockPiece {
                remote: PieceSide {
                    region: at.remote_region,
                    offset: at.remote_base + piece.remote,
                    stride: remote,
                },
                local: PieceSide {
                    region: at.local_region,
                    offset: at.local_base + piece.local,
                    stride: local,
                },
                len: piece.len,
            });
            Some(pieces.collect())
        };
        tensors.iter().map(of).collect()
    }

    fn layer(&self, at: LayerAt) -> &LayerOps {
        &self.layers[at.0 as usize]
    }
}

/// Blocks that follow each other on both sides.
#[derive(Debug, Clone, Copy)]
struct Run {
    layer: LayerAt,
    pair: BlockPair,
    count: u32,
    first_op: u64,
}

/// Blocks of a push, or of a pull, as they were named, a block of a layer each.
#[derive(Debug)]
pub(crate) struct Posted {
    of: Arc<BlockOps>,
    runs: Vec<Run>,
    ops: u64,
    bytes: u64,
}

impl Posted {
    /// None yet.
    pub(crate) fn new(of: &Arc<BlockOps>) -> Self {
        Self {
            of: Arc::clone(of),
            runs: Vec::new(),
            ops: 0,
            bytes: 0,
        }
    }

    /// One more, that is there on both sides.
    #[inline]
    pub(crate) fn add(&mut self, at: LayerAt, pair: BlockPair) {
        let layer = self.of.layer(at);
        self.bytes += layer.bytes;
        if let Some(run) = self.runs.last_mut() {
            let behind = |first: u32| first.checked_add(run.count);
            let goes_on = (run.layer, behind(run.pair.src), behind(run.pair.dst))
                == (at, Some(pair.src), Some(pair.dst));
            if goes_on && run.count < layer.most {
                run.count += 1;
                return;
            }
        }
        self.runs.push(Run {
            layer: at,
            pair,
            count: 1,
            first_op: self.ops,
        });
        self.ops += layer.ops;
    }

    /// Stretches of blocks that follow each other on both sides, as far as they were named so.
    pub(crate) fn runs(&self) -> u64 {
        self.runs.len() as u64
    }

    /// The blocks as they were named: the group, the layer, and the block on both sides.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (u32, u32, BlockPair)> + '_ {
        self.runs.iter().flat_map(|run| {
            let of = self.of.layer(run.layer);
            (0..run.count).map(move |i| {
                let BlockPair { src, dst } = run.pair;
                let pair = BlockPair {
                    src: src + i,
                    dst: dst + i,
                };
                (of.group, of.layer, pair)
            })
        })
    }

    /// How many blocks of which groups and layers.
    pub(crate) fn counts(&self) -> impl Iterator<Item = (u32, u32, u64)> + '_ {
        self.runs.iter().map(|run| {
            let of = self.of.layer(run.layer);
            (of.group, of.layer, u64::from(run.count))
        })
    }

    fn run_at(&self, op: u64) -> usize {
        self.runs.partition_point(|run| run.first_op <= op) - 1
    }

    fn each(&self, range: Range<u64>, sink: &mut impl Sink) {
        let end = range.end.min(self.ops);
        let mut at = range.start;
        if at >= end {
            return;
        }
        let mut out = Emitter::new(&self.of.pieces, sink);
        let role = self.of.inner.role;
        for run in &self.runs[self.run_at(at)..] {
            if at >= end {
                break;
            }
            let layer = self.of.layer(run.layer);
            let mut skip = index(at - run.first_op);
            let to = (run.first_op + layer.ops).min(end);
            let mut left = index(to - at);
            at = to;
            for tensor in &self.of.tensors[layer.tensors.clone()] {
                let spans = &self.of.spans[tensor.first..tensor.end];
                if skip >= spans.len() {
                    skip -= spans.len();
                    continue;
                }
                let spans = &spans[skip..spans.len().min(skip + left)];
                let (there, here) = match role {
                    Role::Push => (run.pair.dst, run.pair.src),
                    Role::Pull => (run.pair.src, run.pair.dst),
                };
                let remote = tensor.at.remote_base + tensor.remote.at(there);
                let local = tensor.at.local_base + tensor.local.at(here);
                match spans {
                    // A block of it ends where the next one begins, and all of them go in one operation.
                    [span] if run.count > 1 => out.sink.one(
                        tensor.at.remote_region,
                        remote + span.remote,
                        Piece {
                            region: tensor.at.local_region,
                            len: span.len * run.count,
                            offset: local + span.local,
                        },
                    ),
                    spans => out.spans(spans, &tensor.at, remote, local),
                }
                left -= spans.len();
                skip = 0;
                if left == 0 {
                    break;
                }
            }
        }
    }
}

impl OpSource for Posted {
    fn ops(&self) -> u64 {
        self.ops
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn emit(&self, range: Range<u64>, sink: &mut dyn FnMut(&Op<'_>)) {
        self.each(range, &mut super::lazy::Each(sink));
    }

    fn list(&self, range: Range<u64>, list: &mut OpList) {
        self.each(range, list);
    }

    fn blocks_of(&self, op: u64, out: &mut Vec<(u32, u32)>) {
        if op >= self.ops {
            return;
        }
        let run = &self.runs[self.run_at(op)];
        let group = self.of.layer(run.layer).group;
        out.extend((0..run.count).map(|i| (group, run.pair.dst + i)));
    }
}

#[cfg(test)]
#[path = "posted_tests.rs"]
mod tests;
