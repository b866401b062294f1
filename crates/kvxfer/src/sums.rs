//! Checksums of what two ranks exchange, which say the same wherever the blocks lie. Pure: whoever asks
//! reads the bytes.
//!
//! A sum is over the *elements* of a part of a unit (a block, where both sides' blocks are of one
//! size), in their logical order: by kind of axis (in the order of [`AxisKind`]), and within a kind by
//! index. In which order the axes are listed, how they are split, which strides they have and whether
//! K and V are in one tensor does not matter. So both ranks work a sum out from their own placement
//! alone, by no plan: a block that was changed on its way, or whose bytes went elsewhere, has another.
//!
//! The sums are XXH3 of 64 bits, which miss a wrong block once in 2^64 times. They are for accidents:
//! somebody who wants to deceive can make two blocks of one sum.
//!
//! # Cost
//! [`Summed::compile`] is done once for a pair of ranks. A sum then reads its part once. Elements
//! that are neighbours both in the logical order and in memory are read together, so a layout whose
//! axes are in that order is summed at memory speed, and a vectorised one in pieces of its vector.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3;

use crate::layout::{AxisKind, Half, Overlap, Side, pairs};
use crate::plan::{LayerScope, Part, SideName, moved};

/// The most pieces that the units of all tensors may be read in, those that lie alike counted once.
const MAX_PIECES: usize = 1 << 20;
/// Bytes that are read at a time.
const CHUNK: usize = 64 << 10;

/// Why sums cannot be worked out.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum SumError {
    /// The elements lie so scattered that reading them makes no sense.
    #[error(
        "{tensor}: the {side}'s blocks are in more than {MAX_PIECES} pieces, too many to work checksums out"
    )]
    TooFine {
        /// Whose blocks.
        side: SideName,
        /// The tensor.
        tensor: String,
    },
}

/// A stretch of a unit that is read at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    /// Bytes from where the block begins.
    offset: u64,
    len: u64,
}

/// The elements of a part of a unit in their logical order, as stretches of memory.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Walk {
    pieces: Vec<Piece>,
}

impl Walk {
    /// `kinds` are the offsets of the indices of each kind of axis, outermost first. `None`: more than
    /// `most` pieces.
    fn new(element: u64, kinds: &[&[u64]], most: usize) -> Option<Self> {
        let mut pieces = vec![Piece {
            offset: 0,
            len: element,
        }];
        for offsets in kinds.iter().rev() {
            let mut out: Vec<Piece> = Vec::new();
            for offset in *offsets {
                for piece in &pieces {
                    let at = offset.checked_add(piece.offset)?;
                    match out.last_mut() {
                        Some(last) if last.offset + last.len == at => last.len += piece.len,
                        _ => out.push(Piece {
                            offset: at,
                            len: piece.len,
                        }),
                    }
                }
                if out.len() > most {
                    return None;
                }
            }
            pieces = out;
        }
        Some(Self { pieces })
    }

    /// The sum of the part whose block begins at `base`. `read` copies bytes from an offset.
    fn sum<E>(
        &self,
        base: u64,
        buffer: &mut Vec<u8>,
        read: &mut impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<u64, E> {
        let mut sum = Xxh3::new();
        for piece in &self.pieces {
            let mut done = 0;
            while done < piece.len {
                let len = usize::try_from(piece.len - done).map_or(CHUNK, |left| left.min(CHUNK));
                buffer.resize(len, 0);
                let at = base.saturating_add(piece.offset).saturating_add(done);
                read(at, buffer)?;
                sum.update(buffer);
                done += len as u64;
            }
        }
        Ok(sum.digest())
    }
}

/// One tensor's part of what two ranks exchange (or that of K or V, where they are in one tensor on one
/// side only), on one side; ready to be summed unit by unit.
#[derive(Debug, Clone)]
pub struct SummedTensor {
    /// The layer, over the whole model.
    pub layer: u32,
    /// The tensor's place in its layer's format, on this side.
    pub tensor: u32,
    /// The memory that it is in.
    pub memory: u32,
    offset: u64,
    block_stride: u64,
    /// By the unit's place in its block.
    walks: Arc<[Walk]>,
}

impl SummedTensor {
    /// The sum of one unit. `read` copies bytes of the tensor's memory, from an offset in it; a unit
    /// beyond the last is asked of it as any other. `buffer` is what it reads into.
    ///
    /// # Errors
    ///
    /// Those of `read`.
    pub fn sum<E>(
        &self,
        unit: u32,
        buffer: &mut Vec<u8>,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<u64, E> {
        let per_block = self.walks.len().max(1);
        let (block, place) = (unit as usize / per_block, unit as usize % per_block);
        let base = (block as u64)
            .saturating_mul(self.block_stride)
            .saturating_add(self.offset);
        match self.walks.get(place) {
            Some(walk) => walk.sum(base, buffer, &mut read),
            // A tensor has a walk at least.
            None => Ok(0),
        }
    }

    /// How many units a block is, on this side.
    #[must_use]
    pub fn per_block(&self) -> u32 {
        u32::try_from(self.walks.len()).unwrap_or(u32::MAX).max(1)
    }

    /// The block that a unit is of.
    #[must_use]
    pub fn block_of(&self, unit: u32) -> u32 {
        unit / self.per_block()
    }

    /// Bytes of a unit that are in its sum.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let first = self.walks.first();
        first.map_or(0, |walk| walk.pieces.iter().map(|piece| piece.len).sum())
    }
}

/// What two ranks exchange, as one of them keeps it: what is summed, and in which order.
#[derive(Debug, Clone, Default)]
pub struct Summed {
    /// By group; the tensors by layer.
    groups: Vec<Vec<SummedTensor>>,
}

impl Summed {
    /// What of `which` side's tensors moves between two ranks that can exchange blocks, as
    /// [`Compiled::compile`](crate::plan::Compiled::compile) would have it for this `part`. Both ranks
    /// come to the same tensors in the same order, each with its own places.
    ///
    /// # Errors
    ///
    /// Tensors that lie too scattered.
    pub fn compile(
        producer: &Side<'_>,
        consumer: &Side<'_>,
        which: SideName,
        part: Part,
    ) -> Result<Self, SumError> {
        let side = match which {
            SideName::Producer => producer,
            SideName::Consumer => consumer,
        };
        let mut walks = Walks::default();
        let mut groups = Vec::new();
        groups.resize_with(side.format.groups().len(), Vec::new);
        for pair in pairs(producer, consumer) {
            let Some(((p, c), overlap)) = moved(&pair, producer, consumer, part) else {
                continue;
            };
            let (half, per_block) = match which {
                SideName::Producer => (p, pair.units.producer),
                SideName::Consumer => (c, pair.units.consumer),
            };
            let place = usize::try_from(pair.group).ok();
            let Some(group) = place.and_then(|at| groups.get_mut(at)) else {
                continue;
            };
            let (kv, kinds) = offsets(&half, &overlap);
            let element = half.plane.format.dtype.bytes();
            let tensor = half.plane.tensor;
            let walks = walks
                .of(element, kinds, per_block)
                .ok_or_else(|| SumError::TooFine {
                    side: which,
                    tensor: side.format.tensor_label(pair.group, pair.layer, tensor),
                })?;
            group.push(SummedTensor {
                layer: pair.layer,
                tensor,
                memory: half.placed.memory,
                offset: half.placed.offset.saturating_add(kv),
                block_stride: half.placed.block_stride,
                walks,
            });
        }
        for group in &mut groups {
            // Stable: within a layer the order is that of the matching, the same on both sides.
            group.sort_by_key(|tensor| tensor.layer);
        }
        Ok(Self { groups })
    }

    /// The tensors of a group, of all layers or of one, in the order in which their sums are told; none
    /// of a group that is not there.
    #[must_use]
    pub fn tensors(&self, group: u32, scope: LayerScope) -> &[SummedTensor] {
        let of_group = usize::try_from(group).ok().and_then(|g| self.groups.get(g));
        let all = of_group.map_or(&[][..], Vec::as_slice);
        match scope {
            LayerScope::All => all,
            LayerScope::Layer(layer) => {
                let first = all.partition_point(|t| t.layer < layer);
                let end = all.partition_point(|t| t.layer <= layer);
                all.get(first..end).unwrap_or(&[])
            }
        }
    }
}

/// The offsets of the indices of each kind of axis in bytes, the kinds in their logical order.
type Kinds = Vec<(AxisKind, Vec<u64>)>;

/// Walks that several tensors may share.
#[derive(Default)]
struct Walks {
    made: HashMap<(u64, Kinds, u32), Arc<[Walk]>>,
    pieces: usize,
}

impl Walks {
    /// The walks of each unit of a block. `None`: they are too many pieces.
    fn of(&mut self, element: u64, kinds: Kinds, per_block: u32) -> Option<Arc<[Walk]>> {
        let key = (element, kinds, per_block);
        if let Some(made) = self.made.get(&key) {
            return Some(Arc::clone(made));
        }
        let (_, kinds, _) = &key;
        let units = per_block.max(1) as usize;
        let mut walks = Vec::with_capacity(units.min(MAX_PIECES));
        for unit in 0..units {
            let of_unit: Vec<&[u64]> = kinds
                .iter()
                .map(|(kind, offsets)| match kind {
                    AxisKind::Token => {
                        let run = offsets.len() / units;
                        offsets.get(unit * run..(unit + 1) * run).unwrap_or(&[])
                    }
                    _ => offsets.as_slice(),
                })
                .collect();
            let walk = Walk::new(element, &of_unit, MAX_PIECES.saturating_sub(self.pieces))?;
            self.pieces += walk.pieces.len();
            walks.push(walk);
        }
        let walks: Arc<[Walk]> = walks.into();
        self.made.insert(key, Arc::clone(&walks));
        Some(walks)
    }
}

/// Where the indices that move of each kind of axis are, in bytes from where their K or V begins; and
/// where that begins in the block.
fn offsets(half: &Half<'_>, overlap: &Overlap) -> (u64, Kinds) {
    let (plane, placed) = (half.plane, half.placed);
    let extents = placed.extents(plane.format);
    // The digits of one index, the most significant first.
    let digits = |kind: AxisKind| -> Vec<(u64, u64)> {
        let axes = plane.format.axes.iter().zip(&extents).zip(&placed.strides);
        let digits = axes.filter(|((axis, _), _)| axis.kind == kind);
        digits.map(|((_, e), stride)| (*e, *stride)).collect()
    };
    let at = |digits: &[(u64, u64)], index: u64| {
        let mut left = index;
        digits.iter().rev().fold(0, |offset, (extent, stride)| {
            let digit = left % extent.max(&1);
            left /= extent.max(&1);
            offset + digit * stride
        })
    };
    let kv = plane.kv.map_or(0, |kv| at(&digits(AxisKind::Kv), kv));
    let mut kinds: Vec<AxisKind> = plane.kinds().collect();
    kinds.sort_unstable();
    kinds.dedup();
    let of_kind = |kind: AxisKind| {
        let digits = digits(kind);
        let first = half
            .shard()
            .filter(|own| own.0 == kind)
            .map_or(0, |own| own.1.first);
        let moved: Range<u64> = match overlap.along(kind) {
            Some(part) => part.first - first..part.first - first + part.count,
            None => 0..digits.iter().map(|digit| digit.0).product(),
        };
        (kind, moved.map(|index| at(&digits, index)).collect())
    };
    (kv, kinds.into_iter().map(of_kind).collect())
}
