//! The mirror of `kernels/regions.h`: where blocks lie on both sides.

use super::args::Plain;

/// A stretch of a block that is contiguous on both sides. Block `b` has its own at the address plus `b` times the
/// stride.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Piece {
    /// Where block 0 has it on this side.
    pub local: u64,
    /// Bytes from one block to the next.
    pub local_stride: u64,
    /// Where block 0 has it at the peer.
    pub remote: u64,
    /// Bytes from one block to the next.
    pub remote_stride: u64,
    /// Bytes.
    pub len: u64,
    /// This side's key.
    pub lkey: u32,
    /// The peer's key.
    pub rkey: u32,
}

/// The pieces of a block in one tensor of a layer, or in all of them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tensor {
    /// Bytes of them together.
    pub bytes: u64,
    /// The first one.
    pub first: u32,
    /// How many.
    pub count: u32,
}

/// A layer of a group.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Layer {
    /// Its tensor 0. Behind its last one is the entry for all of them.
    pub first: u32,
    /// How many; 0: there is no such layer.
    pub tensors: u32,
    /// Blocks on this side.
    pub local_blocks: u32,
    /// Blocks at the peer.
    pub remote_blocks: u32,
    /// Links of a push: the group's block 0 in [`Queue::words`](super::queue::Queue::words).
    pub expected: u32,
    /// And the layer's first note in [`Queue::slots`](super::queue::Queue::slots).
    pub notes: u32,
}

/// A cache group.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Group {
    /// Its layer 0.
    pub first: u32,
    /// Its layers.
    pub layers: u32,
}

/// The table's head, which [`Queue::regions`](super::queue::Queue::regions) has the address of.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Regions {
    /// `Group[groups_len]`.
    pub groups: u64,
    /// `Layer[]`.
    pub layers: u64,
    /// `Tensor[]`.
    pub tensors: u64,
    /// `Piece[]`.
    pub pieces: u64,
    /// Groups.
    pub groups_len: u32,
    /// 0.
    pub reserved: u32,
}

macro_rules! plain {
    ($($type:ident)*) => {
        $(
            // SAFETY: the sizes in `layout` and its test are those of the fields together.
            unsafe impl Plain for $type {}
        )*
    };
}

plain! { Piece Tensor Layer Group Regions }

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
        Piece { local, local_stride, remote, remote_stride, len, lkey, rkey }
        Tensor { bytes, first, count }
        Layer { first, tensors, local_blocks, remote_blocks, expected, notes }
        Group { first, layers }
        Regions { groups, layers, tensors, pieces, groups_len, reserved }
    }
}

#[cfg(test)]
mod tests {
    use super::layout;

    #[test]
    fn sizes_and_offsets_are_those_of_the_header() {
        // The static_asserts of kernels/regions.h have the same numbers.
        let wanted = [
            48, 0, 8, 16, 24, 32, 40, 44, // Piece
            16, 0, 8, 12, // Tensor
            24, 0, 4, 8, 12, 16, 20, // Layer
            8, 0, 4, // Group
            40, 0, 8, 16, 24, 32, 36, // Regions
        ];
        assert_eq!(layout(), wanted);
    }
}
