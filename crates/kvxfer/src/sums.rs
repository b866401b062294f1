//! Checksums of blocks that say the same wherever the blocks lie. Pure: whoever asks reads the bytes.
//!
//! A sum is over the *elements* of a part of a block, in the format's logical order: by kind of axis
//! (in the order of [`AxisKind`]), and within a kind by index. In which order the axes are listed, how
//! they are split, and which strides they have does not matter. So two ranks that keep the same
//! elements in other places have the same sums, and a block that was changed on its way, or whose
//! bytes went elsewhere, has another.
//!
//! The sums are XXH3 of 64 bits, which miss a wrong block once in 2^64 times. They are for accidents:
//! somebody who wants to deceive can make two blocks of one sum.
//!
//! # Cost
//! A [`Walk`] is worked out once for tensors that lie alike. A sum then reads its part once. Elements
//! that are neighbours both in the logical order and in memory are read together, so a layout whose
//! axes are in that order is summed at memory speed, and a vectorised one in pieces of its vector.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3;

use crate::layout::{AxisKind, KvFormat, PlacedTensor, PlacementDesc, TensorFormat};

/// The most pieces that one block of a tensor may be read in.
const MAX_PIECES: usize = 1 << 20;
/// Bytes that are read at a time.
const CHUNK: usize = 64 << 10;

/// Why sums cannot be worked out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SumError {
    /// The part reaches beyond what this rank keeps.
    #[error("{tensor}: {kind} {}..{} is not among this rank's {}..{}", wanted.start, wanted.end, kept.start, kept.end)]
    NotHere {
        /// The tensor.
        tensor: String,
        /// The kind of axis.
        kind: AxisKind,
        /// What was wanted, in whole-model indices.
        wanted: Range<u64>,
        /// What is here.
        kept: Range<u64>,
    },
    /// The elements lie so scattered that reading them makes no sense.
    #[error("{tensor}: a block is in more than {MAX_PIECES} pieces")]
    TooFine {
        /// The tensor.
        tensor: String,
    },
    /// A tensor of the placement that the format does not have.
    #[error("{tensor} is not in the format")]
    NoTensor {
        /// The tensor.
        tensor: String,
    },
}

/// A stretch of a block that is read at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    /// Bytes from where the block begins.
    offset: u64,
    len: u64,
}

/// The elements of a part of a block in their logical order, as stretches of memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Walk {
    pieces: Vec<Piece>,
}

impl Walk {
    /// `kinds` are the offsets of the indices of each kind of axis, outermost first. `None`: too many
    /// pieces.
    fn new(element: u64, kinds: &[Vec<u64>]) -> Option<Self> {
        let mut pieces = vec![Piece {
            offset: 0,
            len: element,
        }];
        for offsets in kinds.iter().rev() {
            let mut out: Vec<Piece> = Vec::new();
            for offset in offsets {
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
                if out.len() > MAX_PIECES {
                    return None;
                }
            }
            pieces = out;
        }
        Some(Self { pieces })
    }

    /// Bytes of all elements.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.len).sum()
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
                read(base + piece.offset + done, buffer)?;
                sum.update(buffer);
                done += len as u64;
            }
        }
        Ok(sum.digest())
    }
}

/// A part of one tensor of a rank, ready to be summed block by block.
#[derive(Debug, Clone)]
pub struct Part {
    /// The cache group.
    pub group: u32,
    /// The layer, over the whole model.
    pub layer: u32,
    /// The tensor's place in its layer's format.
    pub tensor: u32,
    /// The memory that it is in.
    pub memory: u32,
    /// How many blocks there are.
    pub num_blocks: u32,
    offset: u64,
    block_stride: u64,
    walk: Arc<Walk>,
}

impl Part {
    /// The sum of one block. `read` copies bytes of the part's memory, from an offset in it; a block
    /// beyond the last is asked of it as any other.
    ///
    /// # Errors
    ///
    /// Those of `read`.
    pub fn sum<E>(
        &self,
        block: u32,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<u64, E> {
        let base = u64::from(block)
            .saturating_mul(self.block_stride)
            .saturating_add(self.offset);
        self.walk.sum(base, &mut Vec::new(), &mut read)
    }

    /// Bytes of a block that are in its sum.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.walk.bytes()
    }
}

/// The parts of a rank's tensors that hold `ranges` of the model: of each tensor that has an axis of
/// such a kind these indices (whole-model ones along the axis that the ranks share out), and all of the
/// other axes. By group, layer and tensor. The placement is valid for the format.
///
/// # Errors
///
/// A range that is not all here, or tensors that lie too scattered.
pub fn parts(
    format: &KvFormat,
    placement: &PlacementDesc,
    ranges: &[(AxisKind, Range<u64>)],
) -> Result<Vec<Part>, SumError> {
    type Key = (u64, Vec<Vec<u64>>);
    let mut walks: HashMap<Key, Arc<Walk>> = HashMap::new();
    let mut out = Vec::with_capacity(placement.tensors().len());
    for placed in placement.tensors() {
        let label = || format.tensor_label(placed.group, placed.layer, placed.tensor);
        let tensor = format
            .tensor(placed.group, placed.layer, placed.tensor)
            .ok_or_else(|| SumError::NoTensor { tensor: label() })?;
        let kinds = offsets(tensor, placed, ranges, label)?;
        let key = (tensor.dtype.bytes(), kinds);
        let walk = match walks.get(&key) {
            Some(walk) => Arc::clone(walk),
            None => {
                let walk = Walk::new(key.0, &key.1);
                let walk = Arc::new(walk.ok_or_else(|| SumError::TooFine { tensor: label() })?);
                walks.insert(key, Arc::clone(&walk));
                walk
            }
        };
        out.push(Part {
            group: placed.group,
            layer: placed.layer,
            tensor: placed.tensor,
            memory: placed.memory,
            num_blocks: placed.num_blocks,
            offset: placed.offset,
            block_stride: placed.block_stride,
            walk,
        });
    }
    out.sort_by_key(|part| (part.group, part.layer, part.tensor));
    Ok(out)
}

/// Where the indices of each kind of axis are that are wanted, in bytes from the block's beginning; the
/// kinds in their logical order.
fn offsets(
    tensor: &TensorFormat,
    placed: &PlacedTensor,
    ranges: &[(AxisKind, Range<u64>)],
    label: impl Fn() -> String,
) -> Result<Vec<Vec<u64>>, SumError> {
    let mut kinds: Vec<AxisKind> = tensor.axes.iter().map(|axis| axis.kind).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let extents = placed.extents(tensor);
    let sharded = tensor.sharded_axis().map(|axis| axis.kind);
    let shard = placed.shard_of(tensor);
    let of_kind = |kind: AxisKind| {
        // The digits of one index, the most significant first.
        let digits = tensor.axes.iter().zip(&extents).zip(&placed.strides);
        let digits: Vec<(u64, u64)> = digits
            .filter(|((axis, _), _)| axis.kind == kind)
            .map(|((_, extent), stride)| (*extent, *stride))
            .collect();
        let count: u64 = digits.iter().map(|digit| digit.0).product();
        let first = shard
            .filter(|_| sharded == Some(kind))
            .map_or(0, |shard| shard.first);
        let kept = first..first + count;
        let range = ranges.iter().find(|(of, _)| *of == kind);
        let wanted = range.map_or(kept.clone(), |(_, range)| range.clone());
        if wanted.start < kept.start || wanted.end > kept.end {
            let tensor = label();
            return Err(SumError::NotHere {
                tensor,
                kind,
                wanted,
                kept,
            });
        }
        let offset = |index: u64| {
            let mut left = index - first;
            digits.iter().rev().fold(0, |offset, (extent, stride)| {
                let digit = left % extent;
                left /= extent;
                offset + digit * stride
            })
        };
        Ok(wanted.map(offset).collect())
    };
    kinds.into_iter().map(of_kind).collect()
}
