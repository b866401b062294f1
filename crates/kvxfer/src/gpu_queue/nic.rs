//! A NIC's own queues, for kernels of whoever has a queue pair. No session uses them.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvxfer_verbs::Rts;
use kvxfer_verbs::mlx5::MappedQueues;
use tracing::{error, warn};

use super::{Kernels, TO_READ, after};
use crate::error::Error;
use crate::mem::gpu::Gpu;
use crate::mem::kernels::queue::Queue;
use crate::mem::post::RegionLayer;
use crate::mem::post::device::{NicQueues, PosterReport, RegionTable, WqeQueue};

/// A queue pair whose work requests kernels write where its NIC reads them: the send queue, the doorbell record, the
/// doorbell itself, and the completions, which they read.
///
/// **No NIC has been posted to by this.** What is known to hold is that memory laid out in the same way takes what
/// kernels write, and that a model of an mlx5 device understands it; `docs/gpu-initiated.md` says what needs a NIC, and
/// what a GPU's driver wants before it maps a doorbell.
///
/// It is for an engine's author who has connected a queue pair of their own, on a context that nothing else posts
/// on. Nothing here stands between kernel and NIC: the NIC looks at keys alone, so what kernels may write is what the
/// keys are of. Sessions have no such queue ([`Hca::Nic`](super::Hca::Nic) is refused): a push promises that nothing is
/// written that its consumer does not expect.
///
/// Kernels use its [`handle`](Self::handle). When the last of them has ended, say so with [`finish`](Self::finish).
/// Dropped without, it tells kernels to stop, and is kept for good with its queue pair, unless nobody has had the handle.
pub struct NicQueue {
    queue: Arc<WqeQueue>,
    /// Whose it is: a child that was forked leaves it alone.
    pid: u32,
    /// Somebody has the handle, and nobody has said that its kernels have ended.
    is_out: AtomicBool,
}

impl NicQueue {
    /// Maps a queue pair's queues for kernels of a GPU. They name blocks by places that these layers have, whose keys
    /// are those of the registered memory: [`RegionSide::key`](crate::mem::post::RegionSide::key) is the `lkey` here
    /// and the peer's `rkey` there; without layers kernels name addresses and keys alone. No call of a kernel waits
    /// for longer than `patience`, nor for longer than an hour. So many WQEs as the queue pair has slots are under way
    /// at most.
    ///
    /// The caller keeps the regions registered until [`finish`](Self::finish) has said what was posted, and for good where
    /// it has not. Whoever finishes another queue of the same NIC keeps this call waiting, as long as a driver waits
    /// there for what runs on its GPU.
    ///
    /// # Errors
    ///
    /// [`Error::QueueConfig`] for no patience; [`Error::QueueDepth`] where a block is in more pieces than there are
    /// slots; [`Error::Memory`] for layers that make no table, for a queue that is not new or has fewer completions than
    /// slots ([`mem::Error::Nic`](crate::mem::Error::Nic), [`Depth`](crate::mem::Error::Depth)), and for what the
    /// GPU's runtime does not map ([`GpuFault::Foreign`](crate::mem::gpu::GpuFault::Foreign) says which part, and what to
    /// do). The queue pair is gone then.
    pub fn new(
        queues: MappedQueues<Rts>,
        gpu: &Gpu,
        layers: &[RegionLayer],
        patience: Duration,
    ) -> Result<Self, Error> {
        let queues = Arc::new(queues);
        let nic = NicQueues {
            qpn: queues.sends().qpn,
            sq_depth: queues.sends().depth,
            cq_depth: queues.completions().depth,
            memory: queues.memory(),
        };
        Self::over(&nic, gpu, layers, patience)
    }

    /// The same of queues that hold what they are parts of.
    fn over(
        nic: &NicQueues,
        gpu: &Gpu,
        layers: &[RegionLayer],
        patience: Duration,
    ) -> Result<Self, Error> {
        if patience.is_zero() {
            return Err(Error::QueueConfig {
                what: "patience: a post that may not wait at all finds no end of another",
            });
        }
        let pieces = |layer: &RegionLayer| layer.tensors.iter().map(Vec::len).sum::<usize>();
        let most = layers.iter().map(pieces).max().unwrap_or(0);
        let depth = nic.sq_depth.get();
        if most > depth as usize {
            return Err(Error::QueueDepth {
                depth,
                stretches: u32::try_from(most).unwrap_or(u32::MAX),
            });
        }
        let table = match layers {
            [] => None,
            layers => Some(RegionTable::new(gpu, layers)?),
        };
        let queue = WqeQueue::of_nic(gpu, nic, patience, table)?;
        Ok(Self {
            queue: Arc::new(queue),
            pid: std::process::id(),
            is_out: AtomicBool::new(false),
        })
    }

    /// What a kernel takes, by value: `kvx_queue` of `kernels/queue.h`. It names memory that it does not hold: no kernel
    /// uses it after [`finish`](Self::finish), nor is one launched with it then. Whoever launches a kernel with it, which
    /// is an unsafe call, promises that.
    #[must_use]
    pub fn handle(&self) -> Queue {
        self.is_out.store(true, Ordering::Release);
        self.queue.handle()
    }

    /// The queue, for the [kernels that are built in](crate::mem::post::device::PostKernels). Of its handle is true what
    /// [`handle`](Self::handle) says; and who keeps this keeps the queue pair.
    #[must_use]
    pub fn device(&self) -> &Arc<WqeQueue> {
        self.is_out.store(true, Ordering::Release);
        &self.queue
    }

    /// The GPU whose kernels post.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        self.queue.gpu()
    }

    /// Tells kernels that wait, or would wait later, to stop
    /// ([`Status::Stopped`](crate::mem::post::Status::Stopped)). What has been posted goes on.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn stop(&self) -> Result<(), Error> {
        Ok(self.queue.stop()?)
    }

    /// Says that no kernel posts any more, and that none uses the [handle](Self::handle) later. Waits for an event for
    /// at most `within`, and a year; kernels that are late are stopped by their abort word, and waited for once more.
    /// Then it is read what they have posted and what has become of it, for which a second is allowed at least; the GPU's
    /// mappings are undone, for which drivers may wait for whatever else runs on the GPU; and the queue pair is
    /// destroyed, if nobody else keeps [`device`](Self::device): launches of the built-in kernels do as long as they are
    /// kept.
    ///
    /// What the work requests name is the caller's affair: none of it is touched any more where
    /// [`NicEnds::all_well`]; so have kernels wait for their posts (`kvx_quiet`) before they end. Otherwise the NIC
    /// touches memory of this side until the queue pair is destroyed, and what is under way may arrive at the peer even
    /// then, until that has reset its own. A queue pair that the NIC, or the GPU's driver, does not let go of stays, which
    /// is logged.
    ///
    /// An event must have been recorded behind the last kernel that posts, on the same GPU: one that never was counts as
    /// reached, and nothing here can see that it stands before a kernel.
    ///
    /// # Errors
    ///
    /// [`Error::KernelsLate`] where the kernels have not ended although they were stopped; [`Error::QueueEvent`] for the
    /// event of another GPU, and [`Error::Memory`] for one that cannot be looked at: it is as if the queue was dropped,
    /// and all is kept for good. [`Error::Memory`] also where it could not be read what was posted. [`Error::Forked`].
    pub fn finish(self, kernels: Kernels<'_>, within: Duration) -> Result<NicEnds, Error> {
        let here = std::process::id();
        if here != self.pid {
            let engine = self.pid;
            return Err(Error::Forked { engine, here });
        }
        let late = match kernels.end(self.gpu(), within, || self.tell_to_stop()) {
            Ok(()) => false,
            Err(Error::KernelsLate { .. }) => true,
            Err(Error::Memory(error)) if super::is_late(&error) => {
                return Err(Error::KernelsLate { after: within });
            }
            Err(other) => return Err(other),
        };
        self.is_out.store(false, Ordering::Release);
        let left = self.queue.left(after(within.max(TO_READ)));
        drop(self);
        let left = left.map_err(Error::Memory)?;
        Ok(NicEnds { left, late })
    }

    fn tell_to_stop(&self) {
        if let Err(error) = self.queue.stop() {
            error!(%error, "kernels that post cannot be told to stop: they wait as long as they are patient");
        }
    }
}

impl Drop for NicQueue {
    fn drop(&mut self) {
        if std::process::id() != self.pid {
            // The GPU's context is its parent's, and so is the NIC's.
            return std::mem::forget(Arc::clone(&self.queue));
        }
        if *self.is_out.get_mut() {
            self.tell_to_stop();
            warn!(
                queue = ?self.queue,
                "nobody has said that the kernels of a NIC's queue have ended: it is kept, with its queue pair"
            );
            std::mem::forget(Arc::clone(&self.queue));
        }
    }
}

/// How a [`NicQueue`] has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NicEnds {
    /// What kernels have posted, and what has become of it.
    pub left: PosterReport,
    /// They did not end in time, and were stopped: what they have posted may not be all that they were to.
    pub late: bool,
}

impl NicEnds {
    /// Whether kernels have posted all that they were to, and all of it has ended well: then no NIC touches what it
    /// named any more.
    #[must_use]
    pub fn all_well(&self) -> bool {
        !self.late && self.left.all_well()
    }
}

impl fmt::Debug for NicQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a NIC's own queue: {:?}", self.queue)
    }
}

#[cfg(test)]
#[path = "nic_tests.rs"]
mod tests;
