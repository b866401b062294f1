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

    /// Adds the (cache group, destination block) pairs that operation `op` writes, in part or
    /// whole; nothing for an operation that is not there.
    fn blocks_of(&self, op: u64, out: &mut Vec<(u32, u32)>);
}
