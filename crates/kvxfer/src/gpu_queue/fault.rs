//! What is wrong with a post.

use serde::{Deserialize, Serialize};

use crate::mem::post::Status;

/// Why a kernel's post was not carried out: a defect of the kernel, or of who told it what to post.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum PostFault {
    /// The descriptor makes no sense, or belongs to another post.
    #[error(
        "its descriptor makes no sense: it was not written by kernels/post.h, or was overwritten"
    )]
    Malformed,
    /// A post that was begun and is not there.
    #[error("it was begun and never written: its kernel ended, or was ended, in the middle of it")]
    Unwritten,
    /// Something other than a put.
    #[error("the queue of a push takes kvx_put alone")]
    Operation,
    /// An address, where a block's place is wanted.
    #[error(
        "it names addresses: set KVX_LOCAL_PLACE and KVX_REMOTE_PLACE, and name blocks by KVX_PLACE"
    )]
    Address,
    /// The two places are of different groups or layers, or of one tensor.
    #[error("its places must be of the same group and layer, and of KVX_ALL_TENSORS")]
    Places,
    /// A group that the format does not have, or a layer that the two ranks do not both keep in it.
    #[error("group {group} has no layer {layer} that both ranks keep")]
    Layer {
        /// The group.
        group: u8,
        /// The layer.
        layer: u16,
    },
    /// Bytes that are not those of a block of the layer.
    #[error(
        "{len} bytes, and a block of group {group} layer {layer} is {wanted} (GpuQueue::block_bytes)"
    )]
    Length {
        /// The group.
        group: u8,
        /// The layer.
        layer: u16,
        /// Bytes asked for.
        len: u64,
        /// Bytes that move.
        wanted: u64,
    },
    /// A source block that this rank does not have.
    #[error("block {block} of group {group} is read, and this rank has {blocks}")]
    Source {
        /// The group.
        group: u8,
        /// The block.
        block: u32,
        /// How many there are.
        blocks: u32,
    },
    /// A destination block that the consumer does not expect.
    #[error("block {block} of group {group} is not among those that the consumer expects")]
    NotExpected {
        /// The group.
        group: u8,
        /// The block.
        block: u32,
    },
    /// A source block that something else writes to.
    #[error("block {block} of group {group} is being written to by another request")]
    InUse {
        /// The group.
        group: u8,
        /// The block.
        block: u32,
    },
}

impl PostFault {
    /// What the kernel is told.
    #[must_use]
    pub fn status(self) -> Status {
        match self {
            Self::Malformed | Self::Unwritten => Status::Malformed,
            Self::Operation => Status::BadOp,
            Self::Address | Self::Layer { .. } => Status::BadKey,
            Self::Length { .. } => Status::BadLength,
            Self::Places | Self::Source { .. } => Status::BadRange,
            Self::NotExpected { .. } | Self::InUse { .. } => Status::BadRights,
        }
    }
}
