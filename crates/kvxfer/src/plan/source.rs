//! What a transfer is made of: operations that are worked out while they are posted.

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
    full: bool,
}

#[derive(Debug, Clone, Copy)]
struct ListedOp {
    remote_region: u32,
    /// Where its local pieces begin in the list's.
    first_piece: u32,
    pieces: u32,
    remote_offset: u64,
    len: u64,
}

impl OpList {
    /// Empties it, for at most so many operations and, after the first, so many bytes.
    pub fn begin(&mut self, max_ops: usize, max_bytes: u64) {
        self.ops.clear();
        self.pieces.clear();
        self.bytes = 0;
        self.max_ops = max_ops;
        self.max_bytes = max_bytes;
        self.full = false;
    }

    /// Adds an operation; from the first on for which there is no room, none is added.
    #[inline]
    pub fn push(&mut self, op: &Op<'_>) {
        let after = self.bytes.saturating_add(op.len);
        // A source that emits more than it was asked for must not overrun the credits.
        self.full |=
            self.ops.len() >= self.max_ops || (after > self.max_bytes && !self.ops.is_empty());
        if self.full {
            return;
        }
        let first_piece = self.pieces.len();
        // One piece is by far the most common; pushing it beats a general copy.
        if let [piece] = op.local {
            self.pieces.push(*piece);
        } else {
            self.pieces.extend_from_slice(op.local);
        }
        // Lossless: a list has at most 2^20 operations of at most 2^10 pieces.
        #[allow(clippy::cast_possible_truncation)]
        self.ops.push(ListedOp {
            remote_region: op.remote_region,
            first_piece: first_piece as u32,
            pieces: op.local.len() as u32,
            remote_offset: op.remote_offset,
            len: op.len,
        });
        self.bytes = after;
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
        self.ops.iter().map(|op| {
            let from = op.first_piece as usize;
            Op {
                remote_region: op.remote_region,
                remote_offset: op.remote_offset,
                len: op.len,
                local: &self.pieces[from..from + op.pieces as usize],
            }
        })
    }
}

/// Operations by index, so that several workers can each claim a range and work it out when they
/// have room to post it.
pub trait OpSource: Send + Sync {
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
