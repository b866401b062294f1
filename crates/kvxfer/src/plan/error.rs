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

impl SideName {
    /// The one that it is not.
    pub(crate) const fn other(self) -> Self {
        match self {
            Self::Producer => Self::Consumer,
            Self::Consumer => Self::Producer,
        }
    }
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
    /// A group whose blocks are made of more units than can be counted.
    #[error(
        "group {group}: the {side}'s {blocks} blocks of {per_block} units each are more than 2^32; use block sizes that are multiples of one another"
    )]
    TooManyUnits {
        /// Whose blocks.
        side: SideName,
        /// Index of the cache group.
        group: u32,
        /// How many blocks there are.
        blocks: u32,
        /// Units of a block.
        per_block: u32,
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

/// Tokens of a request, from the first one on to before the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TokenRange {
    /// The first token.
    pub start: u64,
    /// One past the last token.
    pub end: u64,
}

impl fmt::Display for TokenRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
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
    /// A destination block that is there twice.
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
    /// Block pairs of a group whose blocks are not of one size.
    #[error(
        "blocks of group {group} hold {producer_tokens} tokens at the producer and {consumer_tokens} at the consumer, so they do not go in pairs; give both sides' blocks in token order"
    )]
    UnequalBlocks {
        /// Index of the cache group.
        group: u32,
        /// Tokens of a block at the producer.
        producer_tokens: u32,
        /// Tokens of a block at the consumer.
        consumer_tokens: u32,
    },
    /// Lists of blocks of which one goes on where the other has ended.
    #[error(
        "group {group}: the producer's {producer_blocks} blocks hold tokens {producer}, the consumer's {consumer_blocks} hold tokens {consumer}; one list has blocks that the other has nothing for"
    )]
    Lengths {
        /// Index of the cache group.
        group: u32,
        /// How many blocks the producer's list has.
        producer_blocks: usize,
        /// How many blocks the consumer's list has.
        consumer_blocks: usize,
        /// The producer's tokens.
        producer: TokenRange,
        /// The consumer's tokens.
        consumer: TokenRange,
    },
    /// Tokens that a list of blocks does not hold.
    #[error(
        "group {group}: tokens {wanted} are wanted, and the {side}'s {blocks} blocks hold {held}"
    )]
    NotHeld {
        /// Whose list.
        side: SideName,
        /// Index of the cache group.
        group: u32,
        /// How many blocks the list has.
        blocks: usize,
        /// The tokens that it holds.
        held: TokenRange,
        /// The tokens that are to move, whole units.
        wanted: TokenRange,
    },
    /// A token at which no unit begins.
    #[error("group {group}: token {token} is within a unit; begin at a multiple of {unit}")]
    WithinUnit {
        /// Index of the cache group.
        group: u32,
        /// The token.
        token: u64,
        /// Tokens of a unit.
        unit: u32,
    },
    /// Units that were listed for two ranks with other block sizes.
    #[error("the blocks of group {group} were listed for ranks with other block sizes")]
    OtherUnits {
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
