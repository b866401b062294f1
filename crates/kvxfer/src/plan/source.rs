//! What a transfer is made of: operations that are worked out while they are posted.

use std::any::Any;
use std::ops::Range;

/// A contiguous part of local memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Piece {
    /// Index of the local memory.
    pub region: u32,
    /// Bytes.
    pub len: u32,
    /// Bytes from the memory's first byte.
    pub offset: u64,
}

/// One operation: a contiguous span of remote memory, and the local pieces that make it up in
/// order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Op<'a> {
    /// Index of the remote memory.
    pub remote_region: u32,
    /// Bytes from that memory's first byte.
    pub remote_offset: u64,
    /// Bytes, the sum of the pieces'.
    pub len: u64,
    /// The local side.
    pub local: &'a [Piece],
}

/// Operations in flat arrays, which are used again: adding to them allocates only while they grow.
#[derive(Debug, Default)]
pub struct OpList {
    ops: Vec<ListedOp>,
    pieces: Vec<Piece>,
    bytes: u64,
    max_ops: usize,
    max_bytes: u64,
}

/// An operation by its local pieces. One is by far the most common, and stands with it.
#[derive(Debug, Clone, Copy)]
enum ListedOp {
    One {
        remote_region: u32,
        remote_offset: u64,
        local: Piece,
    },
    Some {
        remote_region: u32,
        /// So many of the list's, from here on.
        first: u32,
        count: u32,
        remote_offset: u64,
        len: u64,
    },
}

impl OpList {
    /// Empties it, for at most so many operations and, after the first, so many bytes.
    pub fn begin(&mut self, max_ops: usize, max_bytes: u64) {
        self.ops.clear();
        self.pieces.clear();
        self.bytes = 0;
        self.max_ops = max_ops;
        self.max_bytes = max_bytes;
    }

    /// Adds an operation; from the first on for which there is no room, none is added.
    #[inline]
    pub fn push(&mut self, op: &Op<'_>) {
        if let [piece] = op.local {
            self.push_one(op.remote_region, op.remote_offset, *piece);
        } else if self.admit(op.len) {
            let first = self.pieces.len();
            self.pieces.extend_from_slice(op.local);
            // Lossless: a list has at most 2^20 operations of at most 2^10 pieces.
            #[allow(clippy::cast_possible_truncation)]
            let (first, count) = (first as u32, op.local.len() as u32);
            self.ops.push(ListedOp::Some {
                remote_region: op.remote_region,
                first,
                count,
                remote_offset: op.remote_offset,
                len: op.len,
            });
        }
    }

    /// The same for an operation of one local piece.
    #[inline]
    pub fn push_one(&mut self, remote_region: u32, remote_offset: u64, local: Piece) {
        if self.admit(u64::from(local.len)) {
            self.ops.push(ListedOp::One {
                remote_region,
                remote_offset,
                local,
            });
        }
    }

    /// Counts an operation of so many bytes if there is room for it. A source that emits more than it was
    /// asked for must not overrun the credits.
    #[inline]
    fn admit(&mut self, len: u64) -> bool {
        if self.ops.len() >= self.max_ops {
            return false;
        }
        let after = self.bytes.saturating_add(len);
        if after > self.max_bytes && !self.ops.is_empty() {
            self.max_ops = 0;
            return false;
        }
        self.bytes = after;
        true
    }

    /// How many operations there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// How many bytes they move.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The operations, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Op<'_>> + '_ {
        self.ops.iter().map(|op| match op {
            ListedOp::One {
                remote_region,
                remote_offset,
                local,
            } => Op {
                remote_region: *remote_region,
                remote_offset: *remote_offset,
                len: u64::from(local.len),
                local: std::slice::from_ref(local),
            },
            ListedOp::Some {
                remote_region,
                first,
                count,
                remote_offset,
                len,
            } => {
                let from = *first as usize;
                Op {
                    remote_region: *remote_region,
                    remote_offset: *remote_offset,
                    len: *len,
                    local: &self.pieces[from..from + *count as usize],
                }
            }
        })
    }
}

/// Operations by index, so that several workers can each claim a range and work it out when they
/// have room to post it.
pub trait OpSource: Any + Send + Sync {
    /// How many operations there are.
    fn ops(&self) -> u64;

    /// How many bytes they move.
    fn bytes(&self) -> u64;

    /// Hands the operations of `range` to `sink`, in order. What lies outside `0..ops()` is left
    /// out.
    fn emit(&self, range: Range<u64>, sink: &mut dyn FnMut(&Op<'_>));

    /// The same into a list, as far as it has room.
    fn list(&self, range: Range<u64>, list: &mut OpList) {
        self.emit(range, &mut |op| list.push(op));
    }

    /// Adds the (cache group, destination block) pairs that operation `op` writes, in part or
    /// whole; nothing for an operation that is not there.
    fn blocks_of(&self, op: u64, out: &mut Vec<(u32, u32)>);
}
