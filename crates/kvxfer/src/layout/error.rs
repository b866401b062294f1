//! What can be wrong with a format or a placement.

use thiserror::Error;

use super::{AxisKind, ConfigError, DType};

/// A format or a placement that cannot be: which field, which value, and what was expected.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// A config.json that no format can be made of.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// More of something than any real cache has.
    #[error("{path}: {count} is more than the {max} allowed")]
    TooMany {
        /// Where in the format or placement.
        path: String,
        /// How many there are.
        count: u64,
        /// How many there may be.
        max: u64,
    },
    /// A list or name that must not be empty.
    #[error("{path} is empty")]
    Empty {
        /// Where in the format or placement.
        path: String,
    },
    /// A number that must not be zero.
    #[error("{path} is zero")]
    Zero {
        /// Where in the format or placement.
        path: String,
    },
    /// The same layer, tensor, axis or group name twice.
    #[error("{path}: {value} is there twice")]
    Duplicate {
        /// Where in the format or placement.
        path: String,
        /// What is there twice.
        value: String,
    },
    /// A product or sum that does not fit.
    #[error("{path}: the size in bytes overflows")]
    Overflow {
        /// Where in the format or placement.
        path: String,
    },
    /// A token axis that does not match its group's block.
    #[error("{path}: {extent} tokens in a block of {block_tokens}")]
    TokenExtent {
        /// The tensor.
        path: String,
        /// The tensor's tokens a block, both halves of a split multiplied.
        extent: u64,
        /// The group's tokens a block.
        block_tokens: u32,
    },
    /// State slots hold no tokens, every other group does.
    #[error(
        "{path}: block_tokens {block_tokens} does not fit the group's kind (0 for state slots, at least 1 otherwise)"
    )]
    BlockTokens {
        /// The group.
        path: String,
        /// Its tokens a block.
        block_tokens: u32,
    },
    /// A key/value axis whose extent is not 2.
    #[error("{path}: the kv axis has extent {extent}, not 2")]
    KvExtent {
        /// The tensor.
        path: String,
        /// Its extent.
        extent: u64,
    },
    /// The sharded axis does not exist, is split, or is of a kind that no engine shards.
    #[error("{path}: axis {index} cannot be the sharded one")]
    ShardedAxis {
        /// The tensor.
        path: String,
        /// The index given.
        index: u32,
    },
    /// A tensor's scale tensor is not in its layer, is not one, or is scaled by a tensor itself.
    #[error("{path}: its layer has no scale tensor {scale}, or not one that stands for itself")]
    MissingScale {
        /// The tensor.
        path: String,
        /// The name it gives.
        scale: String,
    },
    /// Scales that differ along an axis that they cannot differ along.
    #[error("{path}: scales cannot be dealt along {axis}")]
    ScaleAxis {
        /// The tensor's scaling.
        path: String,
        /// The kind of axis.
        axis: AxisKind,
    },
    /// A constant scale that is not a number above zero.
    #[error("{path}: {} is not a scale", f32::from_bits(*bits))]
    ScaleValue {
        /// The tensor's scaling.
        path: String,
        /// The scale's bits.
        bits: u32,
    },
    /// Scales that are not dealt to the ranks as what they scale.
    #[error("{path}: its scale tensor {scale} is not sharded as it is")]
    ScaleShard {
        /// The tensor.
        path: String,
        /// The scale tensor's name.
        scale: String,
    },
    /// No built-in model of this name.
    #[error("no built-in model {name}; there are {}", known.join(", "))]
    UnknownModel {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: Vec<&'static str>,
    },
    /// A name that no tensor of the layer has.
    #[error("group {group} layer {layer} has no tensor {name}")]
    UnknownName {
        /// Index of the group.
        group: u32,
        /// Model-wide index of the layer.
        layer: u32,
        /// The name.
        name: String,
    },
    /// An engine's tensor whose elements are not as large as the format's dtype.
    #[error("{path}: elements of {given} bytes, {dtype} has {}", dtype.bytes())]
    ElementBytes {
        /// The tensor.
        path: String,
        /// The engine's bytes of an element.
        given: u64,
        /// The format's dtype.
        dtype: DType,
    },
    /// An axis of an engine's tensor that is not as long as the format's, or as the rank's part.
    #[error("{path}: {given} along {axis}, this rank has {expected}")]
    Extent {
        /// The tensor.
        path: String,
        /// The axis.
        axis: &'static str,
        /// How many the engine's tensor has, all parts of a split multiplied.
        given: u64,
        /// How many the format has, or the rank's part of them.
        expected: u64,
    },
    /// An axis that the format's tensor does not have.
    #[error("{path} has no axis {axis}")]
    UnknownAxis {
        /// The tensor.
        path: String,
        /// The axis.
        axis: AxisKind,
    },
    /// An axis that no dimension of the engine's tensor counts.
    #[error("{path}: no dimension counts {axis}")]
    MissingAxis {
        /// The tensor.
        path: String,
        /// The axis, or `block`.
        axis: &'static str,
    },
    /// A sharded axis that the engine splits.
    #[error("{path}: {axis} is dealt to ranks and cannot be split too")]
    SplitShard {
        /// The tensor.
        path: String,
        /// The axis.
        axis: AxisKind,
    },
    /// An axis that the engine fuses in two places, so that nothing says how much of it is in which.
    #[error("{path}: {axis} is fused twice; how much is where cannot be told")]
    FusedTwice {
        /// The tensor.
        path: String,
        /// The axis.
        axis: AxisKind,
    },
    /// Kernel blocks that do not make whole blocks.
    #[error("{path}: {blocks} kernel blocks, {per_block} to a block")]
    KernelBlocks {
        /// The tensor.
        path: String,
        /// Kernel blocks there are.
        blocks: u64,
        /// Kernel blocks of a block.
        per_block: u32,
    },
    /// An index behind its dimension.
    #[error("{path}: index {index} of a dimension of {extent}")]
    Index {
        /// The tensor.
        path: String,
        /// The index.
        index: u64,
        /// The dimension's extent.
        extent: u64,
    },
    /// A stride that goes backwards.
    #[error("{path}: the stride of {axis} is {stride} elements; a cache lies forwards")]
    NegativeStride {
        /// The tensor.
        path: String,
        /// The axis, or `block`.
        axis: &'static str,
        /// Its stride in elements.
        stride: i64,
    },
    /// An address in none of the memories.
    #[error("{path} is at {addr:#x}, which is in none of the memories")]
    NoSpan {
        /// The tensor.
        path: String,
        /// Its address.
        addr: u64,
    },
    /// Memory that is not where the builder was told.
    #[error("memory {memory} is not where its span was")]
    MemoryMoved {
        /// Index of the memory.
        memory: u32,
    },
    /// A rank outside its parallel size.
    #[error("{what} rank {rank} of {size}")]
    Rank {
        /// `tp`, `pp` or `dp`.
        what: &'static str,
        /// The rank.
        rank: u32,
        /// How many ranks there are.
        size: u32,
    },
    /// A window of layers that is empty or ends behind the model.
    #[error("layers {first}..{end} of a model with {layers}")]
    Window {
        /// First layer.
        first: u32,
        /// One past the last layer.
        end: u32,
        /// The model's layers.
        layers: u32,
    },
    /// Heads that cannot be dealt evenly to the ranks.
    #[error(
        "{path}: {extent} along {axis} cannot be split evenly over tp {tp}; give the rank's shard"
    )]
    UnevenShard {
        /// The tensor.
        path: String,
        /// The sharded axis.
        axis: AxisKind,
        /// Its whole-model extent.
        extent: u64,
        /// The tensor-parallel size.
        tp: u32,
    },
    /// A shard outside its axis, empty, or on a tensor that is not sharded.
    #[error("{path}: shard {first}+{count} of {extent}")]
    Shard {
        /// The tensor.
        path: String,
        /// First index.
        first: u64,
        /// How many.
        count: u64,
        /// The axis's whole-model extent; 0 where the tensor is not sharded.
        extent: u64,
    },
    /// A placed tensor that the format does not have, or outside the rank's window of layers.
    #[error(
        "group {group} layer {layer} tensor {tensor} is not in the format, or not among this rank's layers"
    )]
    UnknownTensor {
        /// Index of the group.
        group: u32,
        /// Model-wide index of the layer.
        layer: u32,
        /// Index of the tensor in its layer.
        tensor: u32,
    },
    /// A tensor of this rank's layers that is not placed.
    #[error("{path} is not placed")]
    MissingTensor {
        /// The tensor.
        path: String,
    },
    /// One list has a length that another fixes.
    #[error("{path}: {count} given, {expected} expected")]
    Length {
        /// Where in the placement.
        path: String,
        /// How many there are.
        count: u64,
        /// How many there must be.
        expected: u64,
    },
    /// A tensor of a group has another number of blocks than the group's first one.
    #[error("{path} has {num_blocks} blocks, {other} has {other_blocks}")]
    NumBlocks {
        /// The tensor.
        path: String,
        /// Its blocks.
        num_blocks: u32,
        /// The tensor it is compared with.
        other: String,
        /// That one's blocks.
        other_blocks: u32,
    },
    /// A memory index with no memory behind it.
    #[error("{path}: memory {memory} of {memories}")]
    NoMemory {
        /// The tensor.
        path: String,
        /// The index.
        memory: u32,
        /// How many memories there are.
        memories: u32,
    },
    /// A tensor that ends behind its memory.
    #[error("{path} ends at byte {end} of memory {memory}, which has {len}")]
    OutsideMemory {
        /// The tensor.
        path: String,
        /// Index of the memory.
        memory: u32,
        /// One past the tensor's last byte.
        end: u64,
        /// The memory's bytes.
        len: u64,
    },
    /// A stride that lets a tensor's own elements overlap.
    #[error("{path}: the stride of {axis} is {stride} bytes, what lies within takes {needed}")]
    Stride {
        /// The tensor.
        path: String,
        /// The axis, or `block`.
        axis: &'static str,
        /// Its stride in bytes.
        stride: u64,
        /// The bytes that everything with a smaller stride spans.
        needed: u64,
    },
    /// Two tensors that are one: the same place and the same blocks.
    #[error("{first} and {second} are the same memory: each layer's tensors need their own")]
    Alias {
        /// One tensor.
        first: String,
        /// The other.
        second: String,
        /// Index of the memory.
        memory: u32,
        /// Where both begin.
        offset: u64,
    },
    /// Two tensors that share bytes, or interleave with unequal block strides.
    #[error("{first} and {second} overlap in memory {memory}, near byte {offset}")]
    Overlap {
        /// One tensor.
        first: String,
        /// The other.
        second: String,
        /// Index of the memory.
        memory: u32,
        /// Where it shows first.
        offset: u64,
    },
    /// Two memories that share bytes.
    #[error("memory {first} and memory {second} share bytes at address {addr:#x}")]
    MemoryOverlap {
        /// Index of one.
        first: u32,
        /// Index of the other.
        second: u32,
        /// The first address in both.
        addr: u64,
    },
    /// A tensor in more pieces a block than we are ready to handle.
    #[error("{path}: its blocks are in {pieces} pieces, more than the {max} allowed")]
    TooFine {
        /// The tensor.
        path: String,
        /// Contiguous pieces of one block.
        pieces: u64,
        /// How many there may be.
        max: u64,
    },
    /// An alignment that is not a power of two.
    #[error("alignment {align} is not a power of two")]
    Alignment {
        /// The value given.
        align: u64,
    },
}
