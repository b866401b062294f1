//! Pushes that kernels make: queues that a kernel posts to, and what a post may name.
//!
//! [`Push::gpu_queue`](crate::engine::Push::gpu_queue) makes a [`GpuQueue`](crate::engine::GpuQueue) of a push that
//! has begun. Its [handle](crate::engine::GpuQueue::handle) is a plain structure for the engine's own kernels, which
//! include `kernels/post.h` and call `kvx_put` with places: (group, layer, all tensors, block) on both sides. A
//! post is a block of a layer, as in [`Push::layer`](crate::engine::Push::layer), and goes the same way: nothing is
//! written that the consumer does not expect of this push, and all that is promised of transfers is promised of
//! this one.
//!
//! [`Pull::gpu_queue`](crate::engine::Pull::gpu_queue) makes the same of a begun pull, whose blocks kernels ask for by
//! `kvx_get`.
//!
//! Here is what that needs without a thread: the table that posts are checked against, and their faults.
//!
//! [`NicQueue`] is none of this: a NIC's own queue pair, for an engine's author who has one and knows what may be
//! written.

mod ended;
mod fault;
mod links;
mod nic;
mod table;
mod wqe;

pub(crate) use ended::{TO_READ, after, is_late};
pub use fault::{PostFault, QueueRule};
pub use links::NoLinks;
pub(crate) use links::{posted, refused};
pub use nic::{NicEnds, NicQueue};
pub(crate) use table::{Batch, Batches, PostTable, Together, Wanted};
pub(crate) use wqe::{Block, Named, WqeDevice, Wrong};

use std::time::Duration;

use crate::mem::gpu::{Event, Gpu};
pub use crate::mem::post::Pace;
pub use crate::mem::post::device::{PostFailed, PosterReport, WqeSlots};

/// The slots of a queue at most.
pub const MOST_SLOTS: u32 = 1 << 16;

/// The slots of a queue of WQEs at most: what is under way must fit half of a counter of 16 bits.
pub const MOST_WQES: u32 = 1 << 15;

/// What kernels write, and who has it carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum QueueKind {
    /// Descriptors of 64 bytes, for a worker.
    Proxy,
    /// A NIC's work requests, and a word that a worker rings the doorbell from.
    GpuWqe(Hca),
    /// A NIC's work requests, and its doorbell.
    Direct(Hca),
    /// Nothing: kernels copy blocks into the consumer's memory themselves, over GPU links, where the session goes by the
    /// path `ipc` and the consumer lets them (`gpu_links_in`). The consumer's ticket has to be there: making the queue
    /// waits for it, and for the consumer's leave, as long as the queue is patient. A put is done when it returns
    /// `KVX_OK`.
    Links,
}

impl QueueKind {
    /// The device of its work requests.
    #[must_use]
    pub const fn hca(self) -> Option<Hca> {
        match self {
            Self::Proxy | Self::Links => None,
            Self::GpuWqe(hca) | Self::Direct(hca) => Some(hca),
        }
    }
}

/// The device that work requests are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Hca {
    /// A model of an mlx5 device: a worker reads the work requests as the device would, is stricter than that, and has
    /// them carried out over whatever way leads to the peer. It shows that a kernel posts rightly, and nothing of a
    /// NIC's speed.
    Model,
    /// A NIC. There is none yet: it is refused.
    Nic,
}

/// What a queue for kernels is like.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct GpuQueueConfig {
    /// The GPU whose kernels post. The stand-in is one too: there the kernels are the host build of the same source.
    pub gpu: Gpu,
    /// What kernels write.
    pub kind: QueueKind,
    /// Slots: a power of two, up to [`MOST_SLOTS`]. So many posts are under way at most. Of work requests up to
    /// [`MOST_WQES`], and a block is as many as it is in stretches. Links have none.
    pub depth: u32,
    /// Where kernels write work requests. A proxy's descriptors are in pinned memory.
    pub slots: WqeSlots,
    /// How long a call of a kernel waits at most: for room and its turn, or for a post's end. A post of work requests
    /// waits for room for three quarters of it, so that it has time for its turn. More than an hour is an hour. On AMD
    /// the calls for a thread go lane by lane, each with this patience, so a wave may take as many times as long.
    pub patience: Duration,
    /// How eagerly a worker looks at it; at links nobody does.
    pub pace: Pace,
}

impl GpuQueueConfig {
    /// A proxy queue of 1024 slots, 10 seconds of patience; parked, with sleeps of 10 milliseconds at most, which cost half a percent of
    /// a core.
    #[must_use]
    pub fn new(gpu: &Gpu) -> Self {
        Self {
            gpu: gpu.clone(),
            kind: QueueKind::Proxy,
            depth: 1024,
            slots: WqeSlots::Pinned,
            patience: Duration::from_secs(10),
            pace: Pace::Parked {
                longest: Duration::from_millis(10),
            },
        }
    }
}

/// How it is known that no kernel posts any more.
#[derive(Debug, Clone, Copy)]
pub enum Kernels<'a> {
    /// The caller knows it: it has waited for their ends, and launches none with the handle any more.
    Ended,
    /// An event was recorded behind the last of them, on the queue's GPU, and none is launched with the handle any more.
    /// One that was never recorded counts as reached.
    Behind(&'a Event),
}

/// What has become of a queue's posts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct GpuQueueReport {
    /// Posts that were taken: descriptors; or blocks all of whose work requests have come, and work requests that were
    /// refused. Over links blocks of layers that were put, once each however often, from when the queue is finished.
    pub taken: u64,
    /// Of those, posts whose every byte is confirmed.
    pub done: u64,
    /// Posts that were refused, failed or came behind a failure.
    pub failed: u64,
}
