//! A queue of any kind.

use std::time::Instant;

use super::links::LinkQueue;
use super::posters::PosterReport;
use super::queue::{DeviceQueue, KernelQueue, sealed};
use super::wqe::WqeQueue;
use crate::error::Error;
use crate::gpu::Gpu;
use crate::kernels::queue::Queue;

/// The memory of a queue of one kind or another, for who has them all.
#[derive(Debug)]
pub enum PostQueue {
    /// Kernels write descriptors.
    Proxy(DeviceQueue),
    /// Kernels write WQEs.
    Wqe(WqeQueue),
    /// Kernels copy blocks themselves.
    Links(LinkQueue),
}

impl PostQueue {
    /// The ring of descriptors, if it has one.
    #[must_use]
    pub fn proxy(&self) -> Option<&DeviceQueue> {
        match self {
            Self::Proxy(queue) => Some(queue),
            Self::Wqe(_) | Self::Links(_) => None,
        }
    }

    /// The queue of WQEs, if it is one.
    #[must_use]
    pub fn wqe(&self) -> Option<&WqeQueue> {
        match self {
            Self::Proxy(_) | Self::Links(_) => None,
            Self::Wqe(queue) => Some(queue),
        }
    }

    /// The queue over links, if it is one.
    #[must_use]
    pub fn links(&self) -> Option<&LinkQueue> {
        match self {
            Self::Links(queue) => Some(queue),
            Self::Proxy(_) | Self::Wqe(_) => None,
        }
    }

    /// Its kernels have ended, or are given up: calls that are put off for the sake of kernels that may wait for the host are
    /// not put off for these any more.
    pub fn forsake(&self) {
        match self {
            Self::Proxy(queue) => queue.posters().forsake(),
            Self::Wqe(queue) => queue.posters().forsake(),
            Self::Links(queue) => queue.posters().forsake(),
        }
    }

    /// What a kernel is given: [`KernelQueue::handle`].
    #[must_use]
    pub fn handle(&self) -> Queue {
        match self {
            Self::Proxy(queue) => queue.handle(),
            Self::Wqe(queue) => queue.handle(),
            Self::Links(queue) => queue.handle(),
        }
    }

    /// The GPU whose kernels post.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        match self {
            Self::Proxy(queue) => queue.gpu(),
            Self::Wqe(queue) => queue.gpu(),
            Self::Links(queue) => queue.gpu(),
        }
    }

    /// What posters have left, once no kernel runs any more; nothing over links.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`], also where it cannot be read before the deadline.
    pub fn left(&self, deadline: Instant) -> Result<PosterReport, Error> {
        match self {
            Self::Proxy(queue) => queue.left(deadline),
            Self::Wqe(queue) => queue.left(deadline),
            Self::Links(_) => Ok(PosterReport::default()),
        }
    }

    /// Takes a number and posts nothing, as a kernel does that is killed in between: for tests.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`].
    #[doc(hidden)]
    pub fn lose_a_ticket(&self) -> Result<(), Error> {
        match self {
            Self::Proxy(queue) => queue.lose_a_ticket(),
            Self::Wqe(queue) => queue.lose_a_ticket(),
            Self::Links(_) => Ok(()),
        }
    }

    /// Sets the abort word: whoever waits is told [`Status::Stopped`](crate::post::Status::Stopped), and so is whoever
    /// would wait later.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`].
    pub fn stop(&self) -> Result<(), Error> {
        match self {
            Self::Proxy(queue) => queue.stop(),
            Self::Wqe(queue) => queue.stop(),
            Self::Links(queue) => queue.stop(),
        }
    }
}

impl sealed::Sealed for PostQueue {}

impl KernelQueue for PostQueue {
    fn handle(&self) -> Queue {
        self.handle()
    }

    fn gpu(&self) -> &Gpu {
        self.gpu()
    }
}
