//! How blocks reach a peer: the choice of a path, and the queue pairs that realise it.

mod device;
mod path;
mod rdma;

pub(crate) use device::{Opened, open_device, open_rails, retries};
pub use device::{SkippedRail, check_device};
pub use path::PathInfo;
pub(crate) use path::{
    Blocks, BothBlocks, Choice, Unregistered, gid_towards, goes_over, soft_path,
};
pub use rdma::{QueuePairs, RdmaLink};
