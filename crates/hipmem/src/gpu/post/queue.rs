//! The memory of a proxy queue.

use std::fmt;
use std::time::{Duration, Instant};

use super::posters::{PosterReport, Posters};
use crate::error::Error;
use crate::gpu::pool::Touched;
use crate::gpu::{Gpu, PinnedMemory};
use crate::kernels::queue::Queue;
use crate::post::{Consumer, ProxyRing, RingAddresses};

/// A queue that the built-in kernels post to ([`PostKernels`](super::PostKernels)).
pub trait KernelQueue: sealed::Sealed + Send + Sync + 'static {
    /// What a kernel is given, by value. It has addresses of the queue's memory, and does not hold it: whoever launches
    /// a kernel with it keeps the queue until that kernel has ended, and does not use the handle later.
    fn handle(&self) -> Queue;

    /// The GPU whose kernels post.
    fn gpu(&self) -> &Gpu;
}

pub(super) mod sealed {
    /// Whose handle names memory that the queue holds, for kernels that end: of this module alone.
    pub trait Sealed {
        /// Threads of a workgroup that posts as one; `None`: two warps, of which one thread works.
        const THREADS: Option<u32> = None;
    }
}

/// The memory of a proxy queue that kernels of a GPU post to. A kernel must have ended before this goes.
pub struct DeviceQueue {
    ring: ProxyRing,
    /// The ring.
    memory: PinnedMemory,
    posters: Posters,
}

impl DeviceQueue {
    /// A queue for kernels of this GPU, and the consumer of its ring. No call of a kernel waits for longer than
    /// `patience`, nor for longer than an hour. On AMD the calls for a thread go lane by lane, each with that patience:
    /// a wave of them may wait so long for each of its lanes.
    ///
    /// # Errors
    ///
    /// [`Error::Depth`] where the depth is no power of two; [`Error::Gpu`].
    pub fn new(gpu: &Gpu, depth: u32, patience: Duration) -> Result<(Self, Consumer), Error> {
        if !depth.is_power_of_two() {
            return Err(Error::Depth { depth });
        }
        // Before anything of the driver is asked for: it waits for what drivers hold up.
        let posters = Posters::new(gpu, patience)?;
        let memory = PinnedMemory::pooled(gpu, ProxyRing::bytes(depth), Touched::ByHandle)?;
        let (ring, consumer) = ProxyRing::new(memory.host().clone(), depth, 0)?;
        let queue = Self {
            ring,
            memory,
            posters,
        };
        Ok((queue, consumer))
    }

    /// What a kernel is given, by value. It has addresses of this memory, and does not hold it: whoever launches a
    /// kernel with it keeps this value until that kernel has ended, and does not use the handle later.
    #[must_use]
    pub fn handle(&self) -> Queue {
        let at = RingAddresses {
            ring: self.memory.device_addr(),
            state: self.posters.state(),
            abort: self.posters.abort(),
        };
        self.ring.queue(at, self.posters.patience())
    }

    /// The ring's words, for its consumer.
    #[must_use]
    pub fn ring(&self) -> &ProxyRing {
        &self.ring
    }

    pub(super) fn posters(&self) -> &Posters {
        &self.posters
    }

    /// The GPU whose kernels post.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        self.posters.gpu()
    }

    /// What posters have left, once no kernel runs any more. A ticket that the ring's consumer does not find was taken by
    /// a kernel that did not get to write its post.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`], also where it cannot be read before the deadline.
    pub fn left(&self, deadline: Instant) -> Result<PosterReport, Error> {
        self.posters.left(deadline)
    }

    /// Takes a ticket and posts nothing, as a kernel does that is killed in between: for tests.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`].
    #[doc(hidden)]
    pub fn lose_a_ticket(&self) -> Result<(), Error> {
        self.posters.lose_a_ticket()
    }

    /// Sets the abort word: whoever waits is told [`Status::Stopped`](crate::post::Status::Stopped), and so is whoever
    /// would wait later.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`].
    pub fn stop(&self) -> Result<(), Error> {
        self.posters.stop()
    }
}

impl sealed::Sealed for DeviceQueue {}

impl KernelQueue for DeviceQueue {
    fn handle(&self) -> Queue {
        self.handle()
    }

    fn gpu(&self) -> &Gpu {
        self.gpu()
    }
}

impl fmt::Debug for DeviceQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let depth = self.ring.depth();
        write!(f, "a queue of {depth} slots for {:?}", self.gpu())
    }
}
