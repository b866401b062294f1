//! Why there is no plan.

use std::fmt;

use thiserror::Error;

use crate::layout::{LayerWindow, LayoutError, LayoutMismatch};

/// One of the two sides of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SideName {
    /// The side that the bytes come from.
    Producer,
    /// The side that they go to.
    Consumer,
}

impl fmt::Display for SideName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Producer => "producer",
            Self::Consumer => "consumer",
        })
    }
}

/// Why two ranks cannot exchange blocks.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CompileError {
    /// Their layouts differ.
    #[error(transparent)]
    Mismatch(#[from] LayoutMismatch),
    /// A side's placement is not valid for its format.
    #[error("the {side}'s placement is not valid: {source}")]
    Placement {
        /// Whose it is.
        side: SideName,
        /// What is wrong with it.
        source: LayoutError,
    },
    /// A tensor that the comparison let pass but that has no equal on the other side.
    #[error("{tensor} has no equal on the other side")]
    Unmatched {
        /// The tensor.
        tensor: String,
    },
    /// A tensor lies so differently on the two sides that its blocks fall into too many pieces.
    #[error(
        "{tensor}: a block is {pieces} pieces that lie alike on both sides, more than the {max} allowed; use the same order of axes on both sides"
    )]
    TooFine {
        /// The tensor.
        tensor: String,
        /// Pieces of a block, or of all tensors' blocks together.
        pieces: u64,
        /// How many there may be.
        max: u64,
    },
}

/// Why a request's block pairs cannot be planned.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PlanError {
    /// A block that its side does not have.
    #[error("{side} block {block} of group {group} is out of range; there are {num_blocks}")]
    BlockOutOfRange {
        /// Whose block.
        side: SideName,
        /// Index of the cache group.
        group: u32,
        /// The block.
        block: u32,
        /// How many blocks there are.
        num_blocks: u32,
    },
    /// Two pairs with the same destination.
    #[error("destination block {block} of group {group} is listed twice")]
    DuplicateDestination {
        /// Index of the cache group; where groups share a pool, one of those that list it.
        group: u32,
        /// The block.
        block: u32,
    },
    /// A group that the format does not have.
    #[error("group {group} of {groups}")]
    UnknownGroup {
        /// The index.
        group: u32,
        /// How many groups there are.
        groups: u32,
    },
    /// A group with two lists of pairs.
    #[error("group {group} is listed twice")]
    GroupTwice {
        /// Index of the cache group.
        group: u32,
    },
    /// A layer that is not among these ranks' layers.
    #[error("layer {layer} is not among this rank's layers {window}")]
    LayerNotHere {
        /// The layer.
        layer: u32,
        /// The ranks' layers.
        window: LayerWindow,
    },
    /// A layer that none of the groups with pairs has, so that nothing would move.
    #[error("layer {layer} is in none of the groups that blocks were given for")]
    LayerNotInGroups {
        /// The layer.
        layer: u32,
    },
    /// Limits under which nothing can move.
    #[error("a message of {max_msg_bytes} bytes in {max_sge} pieces: both must be at least 1")]
    Limits {
        /// Bytes of a message.
        max_msg_bytes: u64,
        /// Local pieces of a message.
        max_sge: u32,
    },
    /// More pairs, operations or bytes than can be counted.
    #[error("the request is too large: {pairs} block pairs in messages of {max_msg_bytes} bytes")]
    TooLarge {
        /// Block pairs of all groups.
        pairs: u64,
        /// Bytes of a message.
        max_msg_bytes: u64,
    },
}
