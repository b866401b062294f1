//! Big-endian fields of a block of 64 bytes.

use std::ops::Range;

/// A WQE's basic block, or a CQE.
pub(super) type Block = [u8; 64];

/// The field `at` of what begins at `base`, as an unsigned number; at most eight bytes.
pub(super) fn get(block: &Block, base: usize, at: Range<usize>) -> u64 {
    let bytes = block.iter().skip(base + at.start).take(at.len());
    bytes.fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// The same for fields of up to four bytes.
pub(super) fn get32(block: &Block, base: usize, at: Range<usize>) -> u32 {
    debug_assert!(at.len() <= 4);
    // Four bytes at most.
    get(block, base, at) as u32
}

/// The same for a byte.
pub(super) fn get8(block: &Block, base: usize, at: Range<usize>) -> u8 {
    debug_assert!(at.len() == 1);
    get(block, base, at) as u8
}

/// Sets the field `at` of what begins at `base` to the low bytes of `value`.
pub(super) fn put(block: &mut Block, base: usize, at: Range<usize>, value: u64) {
    let len = at.len();
    let from = value.to_be_bytes();
    let to = block.iter_mut().skip(base + at.start).take(len);
    for (to, from) in to.zip(from.iter().skip(8 - len)) {
        *to = *from;
    }
}
