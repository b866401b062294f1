//! Block lists and block pairs, in physical block ids. No device code.

use serde::{Deserialize, Serialize};

/// A source block and the destination block that takes its bytes; both are physical block ids of
/// their side's cache group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BlockPair {
    /// The block id at the producer.
    pub src: u32,
    /// The block id at the consumer.
    pub dst: u32,
}

/// The block pairs of one cache group.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GroupPairs {
    /// Index of the cache group in the format.
    pub group: u32,
    /// Its pairs, in any order; no destination twice.
    pub pairs: Vec<BlockPair>,
}

/// The blocks of one cache group that belong to a request, in token order.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GroupBlocks {
    /// Index of the cache group in the format.
    pub group: u32,
    /// Physical block ids in token order.
    pub blocks: Vec<u32>,
}
