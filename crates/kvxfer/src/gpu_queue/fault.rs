//! What is wrong with a post.

use kvxfer_verbs::mlx5::model::Violation;
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
    /// A post that was given up while it waited for its turn: whether it was sent, nobody can say.
    #[error(
        "it was given up before its turn to be told of came, and its kernel was told KVX_TIMEOUT or KVX_STOPPED: give the queue more patience, or stop no kernel that posts"
    )]
    GivenUp,
    /// Something other than a put, or to the queue of a pull than a get.
    #[error(
        "the queue of a push takes kvx_put and, of descriptors, kvx_put_imm; that of a pull kvx_get"
    )]
    Operation,
    /// An immediate, where the consumer cannot be told any.
    #[error(
        "immediates are not told over RDMA devices: use kvx_put there, and tell the consumer otherwise"
    )]
    Immediate,
    /// More immediates than a push may have.
    #[error(
        "a push tells {} immediates at most: use kvx_put for the others",
        crate::expects::MOST_IMMEDIATES
    )]
    Immediates,
    /// An address, where a block's place is wanted.
    #[error(
        "it names addresses: set KVX_LOCAL_PLACE and KVX_REMOTE_PLACE, and name blocks by KVX_PLACE"
    )]
    Address,
    /// The two places are of different groups or layers, or of one tensor.
    #[error("its places must be of the same group and layer, and of KVX_ALL_TENSORS")]
    Places,
    /// A group that the format does not have, or a layer that the two ranks do not both keep in it, or of which nothing
    /// moves between them.
    #[error(
        "group {group} has no layer {layer} of which something moves between the two ranks (GpuQueue::block_bytes)"
    )]
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
    /// A destination block that is not among those that the pull was begun with.
    #[error("block {block} of group {group} is not among those that the pull was begun with")]
    Destination {
        /// The group.
        group: u8,
        /// The block.
        block: u32,
    },
    /// A source block that the producer does not offer.
    #[error("block {block} of group {group} is not among those that the producer offers")]
    NotOffered {
        /// The group.
        group: u8,
        /// The block.
        block: u32,
    },
    /// A work request under keys that do not allow what it names.
    #[error("its work request names bytes that its keys do not: take both from the queue's table")]
    Key,
    /// A work request for bytes that are no stretch of a block.
    #[error(
        "its work request is not for a stretch of a block: post places, which the queue's table resolves"
    )]
    Stretch,
    /// A queue of work requests that breaks a rule of its device.
    #[error("its queue breaks a rule of the device: {rule}")]
    Rule {
        /// Which.
        rule: QueueRule,
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

/// What a queue of work requests has to keep to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum QueueRule {
    /// A work request is whole when its device is told of it, and has its number.
    #[error("a work request that its device is told of is whole, and where its number says")]
    WorkRequest,
    /// A queue's work requests and doorbells are for its queue pair.
    #[error("work requests and doorbells are for the queue's own queue pair")]
    QueuePair,
    /// The doorbell record never goes back, nor beyond the queue, and stands before the doorbell.
    #[error("the record goes forward, within the queue, and is stored before the doorbell")]
    Record,
    /// The doorbell is the beginning of the last work request.
    #[error("the doorbell is the first eight bytes of the last work request")]
    Doorbell,
    /// Completions are read as they were written, and given back, and not more than there were.
    #[error("completions are read as the device wrote them, and given back")]
    Completions,
    /// The queue's memory.
    #[error("the queue's memory holds it")]
    Memory,
    /// Work requests in a GPU's memory are copied to be read: no fault of who posts.
    #[error(
        "work requests in the GPU's memory can be copied within a second: the log says what the runtime said"
    )]
    Reached,
}

impl QueueRule {
    /// The rule that was broken.
    pub(super) fn of(violation: &Violation) -> Self {
        match violation {
            Violation::Wqe { .. } | Violation::Number { .. } => Self::WorkRequest,
            Violation::QueuePair { .. } => Self::QueuePair,
            Violation::Record { .. }
            | Violation::RecordSpan { .. }
            | Violation::RecordBehind { .. } => Self::Record,
            Violation::Doorbell { .. } | Violation::NotTheLast { .. } => Self::Doorbell,
            Violation::NoRoom { .. } | Violation::Taken { .. } => Self::Completions,
            Violation::NotReached(_) => Self::Reached,
            _ => Self::Memory,
        }
    }
}

impl PostFault {
    /// Of what posters of work requests have noted themselves. What a completion has told them of has failed the push
    /// before.
    pub(crate) fn of_posters(status: Status) -> Self {
        match status {
            Status::Timeout | Status::Stopped => Self::GivenUp,
            // A completion that made no sense to them.
            _ => Self::Rule {
                rule: QueueRule::Completions,
            },
        }
    }

    /// What the kernel is told.
    #[must_use]
    pub fn status(self) -> Status {
        match self {
            Self::Malformed | Self::Unwritten | Self::Rule { .. } => Status::Malformed,
            Self::GivenUp => Status::Timeout,
            Self::Operation | Self::Immediate | Self::Immediates => Status::BadOp,
            Self::Address | Self::Layer { .. } | Self::Key => Status::BadKey,
            Self::Length { .. } => Status::BadLength,
            Self::Places | Self::Source { .. } | Self::Stretch => Status::BadRange,
            Self::NotExpected { .. }
            | Self::InUse { .. }
            | Self::Destination { .. }
            | Self::NotOffered { .. } => Status::BadRights,
        }
    }
}
