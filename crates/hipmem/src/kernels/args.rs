//! The mirror of `kernels/args.h`. Addresses are the device's.

use super::error::KernelError;

/// [`VerifyArgs::side`]: the source blocks.
pub const SOURCE: u32 = 0;
/// [`VerifyArgs::side`]: the destination blocks.
pub const DESTINATION: u32 = 1;

/// [`GatherSlot::state`]: the workgroup has copied its whole share.
pub const WHOLE: u32 = 1;
/// [`GatherSlot::state`]: the abort word ended it before.
pub const ABORTED: u32 = 2;

/// Counts are digits of a sum that must fit 32 bits.
const MAX_COUNT: u32 = (1 << 31) - 1;

/// The most bytes of a chunk.
const MAX_CHUNK: u32 = 1 << 30;

/// What lies in memory as its fields say, without a gap, so that its bytes are those a device reads.
///
/// # Safety
///
/// `repr(C)`, of integers alone, and without padding.
pub(crate) unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($type:ident)*) => {
        $(
            // SAFETY: the sizes in `layout` and its test are those of the fields together.
            unsafe impl Plain for $type {}
        )*
    };
}

plain! { Tensor Piece Pair Section GatherArgs FenceArgs VerifyArgs }

/// The bytes that a device reads.
pub(crate) fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: they are there, all of them are initialised, and they stand still for as long.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Block 0 of one tensor on both sides.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tensor {
    /// Address at the source.
    pub src: u64,
    /// Address at the destination.
    pub dst: u64,
}

/// A stretch of a block that is contiguous on both sides. Merged runs are pieces too: with the one
/// [`Pair`] (0, 0) their offsets count from block 0, and strides do not matter.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Piece {
    /// Bytes from where the source block begins.
    pub src: u64,
    /// Bytes from where the destination block begins.
    pub dst: u64,
    /// Bytes.
    pub len: u64,
}

/// Block ids.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pair {
    /// At the source.
    pub src: u32,
    /// At the destination.
    pub dst: u32,
}

/// Tensors that lie alike, and the blocks wanted of them. Made by [`Section::new`].
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Section {
    tensors: u64,
    pairs: u64,
    pieces: u64,
    src_stride: u64,
    dst_stride: u64,
    tensors_len: u32,
    pairs_len: u32,
    pieces_len: u32,
    chunks: u32,
    chunk: u32,
    first: u32,
}

/// An array in the device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Table {
    /// Its address; a multiple of 8.
    pub addr: u64,
    /// Its elements.
    pub len: u32,
}

impl Section {
    /// A section of every tensor × every pair × every piece. `strides` are the bytes from one block
    /// to the next at the source and at the destination, `longest` the bytes of the longest piece (what
    /// a piece has beyond that is not copied), `chunk` the most bytes that a warp copies at a time
    /// ([`GatherShape::chunk`](super::GatherShape)).
    ///
    /// # Errors
    ///
    /// [`KernelError::Section`] where the kernels cannot count that far.
    pub fn new(
        tensors: Table,
        pairs: Table,
        pieces: Table,
        strides: (u64, u64),
        longest: u64,
        chunk: u32,
    ) -> Result<Self, KernelError> {
        let refused = || KernelError::Section {
            tensors: tensors.len,
            pairs: pairs.len,
            pieces: pieces.len,
            longest,
            chunk,
        };
        if !(16..=MAX_CHUNK).contains(&chunk) {
            return Err(refused());
        }
        let chunks = u32::try_from(longest.div_ceil(u64::from(chunk))).map_err(|_| refused())?;
        if [tensors.len, pairs.len, pieces.len, chunks]
            .iter()
            .any(|n| *n > MAX_COUNT)
        {
            return Err(refused());
        }
        Ok(Self {
            tensors: tensors.addr,
            pairs: pairs.addr,
            pieces: pieces.addr,
            src_stride: strides.0,
            dst_stride: strides.1,
            tensors_len: tensors.len,
            pairs_len: pairs.len,
            pieces_len: pieces.len,
            chunks,
            chunk,
            first: 0,
        })
    }

    /// How many chunks the section has, those of short pieces that are empty counted too.
    #[must_use]
    pub fn chunks(&self) -> u128 {
        [
            self.tensors_len,
            self.pairs_len,
            self.pieces_len,
            self.chunks,
        ]
        .iter()
        .fold(1, |product, n| product * u128::from(*n))
    }

    /// How many sums [`VerifyArgs::sums`] has of it.
    #[must_use]
    pub fn sums(&self) -> u64 {
        u64::from(self.tensors_len) * u64::from(self.pairs_len)
    }

    /// Which warp takes the first chunk.
    pub(super) fn set_first(&mut self, warp: u32) {
        self.first = warp;
    }
}

/// The argument of [`KVX_GATHER`](super::KVX_GATHER).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GatherArgs {
    /// `Section[sections_len]`.
    pub sections: u64,
    /// `GatherSlot[workgroups]`.
    pub slots: u64,
    /// A 32-bit word; anything but 0 ends the launch.
    pub abort: u64,
    /// What the slots shall hold.
    pub sequence: u64,
    /// Sections.
    pub sections_len: u32,
    /// Bytes that a warp may copy between two looks at the abort word; with 0 it looks before every
    /// chunk.
    pub poll_bytes: u32,
}

/// What a workgroup of [`KVX_GATHER`](super::KVX_GATHER) has done.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GatherSlot {
    /// Bytes copied.
    pub bytes: u64,
    /// From its first to its last, in ticks of the device's steady clock: nanoseconds on NVIDIA,
    /// `hipDeviceAttributeWallClockRate` on AMD.
    pub ticks: u64,
    /// [`WHOLE`] or [`ABORTED`].
    pub state: u32,
    /// Where it ran: XCC on AMD, multiprocessor on NVIDIA.
    pub unit: u32,
    /// The launch's sequence, stored last with system-scope release.
    pub sequence: u64,
}

/// The argument of [`KVX_ACQUIRE`](super::KVX_ACQUIRE) and [`KVX_RELEASE`](super::KVX_RELEASE).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FenceArgs {
    /// `FenceSlot[workgroups]`, 16-byte aligned.
    pub slots: u64,
    /// What the slots shall hold.
    pub sequence: u64,
}

/// Where a workgroup of a fence has run.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FenceSlot {
    /// The launch's sequence.
    pub sequence: u64,
    /// As in [`GatherSlot`].
    pub unit: u64,
}

/// The argument of [`KVX_VERIFY`](super::KVX_VERIFY).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VerifyArgs {
    /// `Section[sections_len]`.
    pub sections: u64,
    /// `u64[]`: for each section, each tensor and each pair, in this order.
    pub sums: u64,
    /// As in [`GatherArgs`]; blocks that are not reached keep the sum that was there.
    pub abort: u64,
    /// Sections.
    pub sections_len: u32,
    /// [`SOURCE`] or [`DESTINATION`]: whose blocks are read.
    pub side: u32,
}

/// Every size and offset, in the order of `kvx_layout` in `kernels/kvx.hip`.
#[cfg(test)]
pub(super) fn layout() -> Vec<usize> {
    use std::mem::{offset_of, size_of};
    macro_rules! of {
        ($($type:ident { $($field:ident),* })*) => {
            vec![$(size_of::<$type>(), $(offset_of!($type, $field)),*),*]
        };
    }
    of! {
        Tensor { src, dst }
        Piece { src, dst, len }
        Pair { src, dst }
        Section {
            tensors, pairs, pieces, src_stride, dst_stride, tensors_len, pairs_len, pieces_len,
            chunks, chunk, first
        }
        GatherArgs { sections, slots, abort, sequence, sections_len, poll_bytes }
        GatherSlot { bytes, ticks, state, unit, sequence }
        FenceArgs { slots, sequence }
        FenceSlot { sequence, unit }
        VerifyArgs { sections, sums, abort, sections_len, side }
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_CHUNK, Section, Table, layout};

    #[test]
    fn sizes_and_offsets_are_those_of_the_header() {
        // The static_asserts of kernels/args.h have the same numbers.
        let wanted = [
            16, 0, 8, // Tensor
            24, 0, 8, 16, // Piece
            8, 0, 4, // Pair
            64, 0, 8, 16, 24, 32, 40, 44, 48, 52, 56, 60, // Section
            40, 0, 8, 16, 24, 32, 36, // GatherArgs
            32, 0, 8, 16, 20, 24, // GatherSlot
            16, 0, 8, // FenceArgs
            16, 0, 8, // FenceSlot
            32, 0, 8, 16, 24, 28, // VerifyArgs
        ];
        assert_eq!(layout(), wanted);
    }

    #[test]
    fn sections_that_cannot_be_counted_are_refused() {
        let n = |len| Table { addr: 0, len };
        let section = |t, longest, chunk| Section::new(n(t), n(1), n(1), (0, 0), longest, chunk);
        assert_eq!(section(2, 100, 16).map(|s| s.chunks()).ok(), Some(14));
        assert!(section((1 << 31) - 1, 1, 16).is_ok());
        assert!(section(1 << 31, 1, 16).is_err());
        assert!(section(1, 1, 15).is_err());
        assert!(section(1, 1, MAX_CHUNK + 1).is_err());
        assert!(section(1, u64::MAX, MAX_CHUNK).is_err());
        assert!(section(1, 1 << 60, MAX_CHUNK).is_ok());
        assert!(section(1, (16 << 31) - 16, 16).is_ok());
        assert!(section(1, 16 << 31, 16).is_err());
    }
}
