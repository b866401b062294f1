//! How blocks reach a peer: the choice of a path, and the queue pairs that realise it.

mod device;
mod path;
mod rdma;

pub use device::check_device;
pub(crate) use device::{open_device, retries};
pub use path::PathInfo;
pub(crate) use path::{Choice, gid_towards, goes_over, soft_path};
pub use rdma::{QueuePairs, RdmaLink};
