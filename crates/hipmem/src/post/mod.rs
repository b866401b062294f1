//! The host's side of queues that kernels post to (`kernels/post.h`): descriptors that it carries out for them.
//!
//! A kernel writes a [`Descriptor`] into a ring in memory that both reach, its phase last. A
//! [`Consumer`] takes them out in order, refuses those that make no sense, and tells how each has
//! ended, in whatever order they end. It has no threads, no clock and no memory of its own: it looks at
//! words ([`RingWords`]) when it is asked to. [`ProxyRing`] is the words in pinned memory.
//!
//! What failed stays failed. With the first failure everything that is behind it and not under way is flushed, and
//! posters take no slot again that is not before it; so a wait that finds its slot used again knows that
//! its own post went well. A queue that has failed is made anew.
//!
//! Queues of WQEs look the blocks that kernels name up themselves, in a table of [`RegionLayer`]s.
//!
//! The memory of a queue for kernels of a GPU, and the built-in kernels that post, are in [`device`].

mod checks;
mod consumer;
mod descriptor;
#[cfg(all(loom, test))]
mod loom_models;
#[cfg(all(loom, test))]
mod loom_wqe_ends;
#[cfg(all(loom, test))]
mod loom_wqes;
mod pace;
mod proxy;
mod regions;
mod status;
#[cfg(test)]
mod tests;

pub use crate::gpu::post as device;
pub use checks::{Blocks, Checks, Span};
pub use consumer::{Consumer, NotUnderWay, RingWords, Taken, Word};
pub use descriptor::{Descriptor, DescriptorFault, End, Place, PostOp, WORDS};
pub use pace::{Pace, Rest};
pub use proxy::{ProxyRing, RingAddresses};
pub(crate) use regions::Compiled;
pub use regions::{RegionFault, RegionLayer, RegionPiece, RegionSide, region_table};
pub use status::Status;
