//! What a KV cache looks like: the format that a model and an engine agree on, and where one rank
//! keeps its part.
//!
//! A [`KvFormat`] says what a block *is*: cache groups (layers that share a block table), and for
//! each layer its tensors, each a list of axes with whole-model extents. A [`KvPlacement`] says
//! where one rank keeps its part: memory, offset, block stride, and one stride for each axis. The
//! two are apart because formats are compared between engines and placements are not: a stride, a
//! base or a number of blocks may differ freely.
//!
//! No device code: a scheduler process can use everything here but `KvPlacement`'s memory.

mod axis;
mod builder;
mod check;
mod compare;
mod diff;
mod difference;
mod digits;
mod dtype;
mod engine_tensor;
mod error;
mod fingerprint;
mod format;
mod hf;
mod identity;
mod laid;
pub mod models;
mod overlap;
mod placement;
mod planes;
pub mod reshard;
mod scale;
mod shard;
mod uniform;

#[cfg(test)]
mod builder_tests;
#[cfg(test)]
mod compare_tests;
#[cfg(test)]
mod tests;

pub use axis::{Axis, AxisKind};
pub use builder::{LayoutBuilder, Span};
pub(crate) use compare::{Pair, pairs};
pub use compare::{Side, compare};
pub use diff::{LayoutDiff, Verdict, diff};
pub(crate) use difference::ranges;
pub use difference::{Difference, LayoutMismatch, Severity};
pub(crate) use digits::common_split;
pub use dtype::DType;
pub use engine_tensor::{Dim, EngineTensor, Start};
pub use error::LayoutError;
pub use fingerprint::Fingerprint;
pub use format::{CacheGroup, GroupKind, KvFormat, LayerFormat, TensorFormat, TensorRole, limits};
pub use hf::{ConfigError, HfOptions};
pub use identity::ModelIdentity;
pub(crate) use laid::{Half, Laid, Overlap, Steps, Units};
pub use placement::{KvPlacement, LayerWindow, PlacedTensor, PlacementDesc, Topology};
pub use reshard::Parallel;
pub use scale::Scaling;
pub use shard::Shard;
pub use uniform::{Packing, Uniform};
