//! Queues for kernels of a GPU, and the kernels that are built in which post to them.
//!
//! [`DeviceQueue`] is the memory of a proxy queue: the ring in pinned memory, the posters' state and the abort word in
//! the GPU's. Its [handle](DeviceQueue::handle) is what a kernel is given. [`WqeQueue`] is that of a queue of WQEs for a
//! model of a device, in pinned memory or [the GPU's own](WqeSlots), or of a [NIC's own](NicQueues), which lie where its
//! library has put them; with a [`RegionTable`] in which kernels look blocks up. [`LinkQueue`] is
//! for kernels that copy blocks into a peer's memory themselves. [`PostKernels`] launches the built-in ones
//! with nothing `unsafe` to call: what they touch has been checked, and is held until they have ended.
//!
//! On the stand-in a kernel is the host build of the same source, in the thread of its stream.

mod either;
mod launch;
mod links;
mod nic;
mod notes;
mod posters;
mod queue;
mod regions;
mod slots;
mod wqe;

pub use either::PostQueue;
pub use launch::{
    PostBy, PostKernels, Posting, Posts, PreparedPosts, PreparedPush, Produce, ProducedTensor,
};
pub use links::{LinkLayer, LinkPiece, LinkQueue, LinkSide};
pub use nic::{NicFault, NicQueues};
pub use notes::{LinkExpected, LinkPut, LinkPuts};
pub use posters::{PostFailed, PosterReport};
pub use queue::{DeviceQueue, KernelQueue};
pub use regions::RegionTable;
pub use slots::{CopiedSlots, WqeMemory, WqeSlots};
pub use wqe::{Bell, WqeQueue, WqeQueueConfig};
