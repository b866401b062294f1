//! Queues that kernels post the blocks of a push to: the owner's handle, and what it shares with the worker.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::{error, warn};

use super::{Inner, LayerScope, Push, Pushing, Stage, Waiting};
use crate::blocks::{BlockPair, GroupPairs};
use crate::engine::worker::{Command, KernelQueue, QueueOrder};
use crate::error::Error;
use crate::gpu_queue::{
    GpuQueueConfig, GpuQueueReport, Kernels, MOST_SLOTS, Pace, PostFault, PostTable,
};
use crate::mem::gpu::{Gpu, GpuFault};
use crate::mem::kernels::queue::Queue;
use crate::mem::post::Status;
use crate::mem::post::device::DeviceQueue;
use crate::plan::{Plan, PlanError};
use crate::ticket::Ticket;
use crate::transfer::{Cause, Refusal};

/// What the owner's handle and the worker share of a queue.
#[derive(Debug)]
pub(crate) struct SharedQueue {
    device: Kept,
    pace: Mutex<Pace>,
    taken: AtomicU64,
    done: AtomicU64,
    failed: AtomicU64,
}

/// The memory of a queue. Kernels touch it until somebody says that they have ended: before, it is never given back.
#[derive(Debug)]
struct Kept {
    device: Arc<DeviceQueue>,
    is_over: AtomicBool,
}

impl Drop for Kept {
    fn drop(&mut self) {
        if !*self.is_over.get_mut() {
            warn!(
                "nobody has said that a queue's kernels have ended: its memory is never given back"
            );
            std::mem::forget(Arc::clone(&self.device));
        }
    }
}

impl SharedQueue {
    pub(crate) fn device(&self) -> &DeviceQueue {
        &self.device.device
    }

    pub(crate) fn pace(&self) -> Pace {
        *self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn note_taken(&self) {
        self.taken.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn note_ended(&self, posts: u64, status: Status) {
        let count = match status {
            Status::Ok => &self.done,
            _ => &self.failed,
        };
        count.fetch_add(posts, Ordering::Relaxed);
    }

    /// Ends what kernels wait for: nobody carries their posts out any more.
    pub(crate) fn stop(&self) {
        if let Err(error) = self.device().stop() {
            error!(%error, "kernels that post cannot be told to stop: they wait as long as they are patient");
        }
    }

    fn report(&self) -> GpuQueueReport {
        let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
        // Those that have ended first, so that they are never more than were taken.
        let (done, failed) = (count(&self.done), count(&self.failed));
        GpuQueueReport {
            taken: count(&self.taken),
            done,
            failed,
        }
    }
}

/// Why what kernels have posted is not carried out.
#[derive(Debug)]
pub(crate) enum NotPosted {
    /// A post is to blame: the first, or the one that reads this block.
    Fault(PostFault),
    /// None of them is.
    Cause(Cause),
}

impl Pushing {
    /// Whether every block that it writes is one of the producer's.
    fn has_equal_blocks(&self, groups: u32) -> Result<(), PlanError> {
        for group in 0..groups {
            let moves = self.plans.unit_bytes(group).is_some_and(|bytes| bytes > 0);
            let Some(unit) = self.plans.unit(group).filter(|_| moves) else {
                continue;
            };
            if unit.producer_per_block != unit.consumer_per_block {
                return Err(PlanError::UnequalBlocks {
                    group,
                    producer_tokens: unit.tokens.saturating_mul(unit.producer_per_block),
                    consumer_tokens: unit.tokens.saturating_mul(unit.consumer_per_block),
                });
            }
        }
        Ok(())
    }

    /// What posts are checked against, once the ticket is here.
    pub(crate) fn posts(&self, ticket: &Ticket) -> PostTable {
        PostTable::new(&self.plans, &ticket.groups)
    }

    /// Plans what kernels have posted of a layer, and claims what that reads. For the worker alone that owns the push:
    /// it is also the one that lets go of the claims.
    pub(crate) fn plan_posts(
        &self,
        (group, layer): (u8, u16),
        pairs: Vec<BlockPair>,
    ) -> Result<Plan, NotPosted> {
        let Some(engine) = self.peer.engine.upgrade() else {
            return Err(NotPosted::Cause(Cause::ShuttingDown));
        };
        let scope = LayerScope::Layer(layer.into());
        let group_pairs = vec![GroupPairs {
            group: group.into(),
            pairs,
        }];
        let plan = self.compile(scope, &group_pairs);
        // What was checked against the table is planned.
        let plan = plan.map_err(|_| NotPosted::Fault(PostFault::Layer { group, layer }))?;
        let wanted = Waiting::Pairs(scope, group_pairs);
        self.claim(&engine, &wanted).map_err(|error| match error {
            Error::InUse(in_use) => NotPosted::Fault(PostFault::InUse {
                group,
                block: in_use.block,
            }),
            _ => NotPosted::Cause(Cause::ShuttingDown),
        })?;
        self.count_sums(&plan).map_err(|_| {
            let reason = Refusal::Sums;
            NotPosted::Cause(Cause::Refused { reason })
        })?;
        Ok(plan)
    }

    /// Gives a queue to the worker that owns the push.
    fn attach(
        self: &Arc<Self>,
        number: u64,
        (shared, consumer): (&Arc<SharedQueue>, crate::mem::post::Consumer),
    ) -> Result<(), Error> {
        let stage = self.stage();
        let table = match &*stage {
            Stage::Asked {
                committed: false, ..
            } => None,
            Stage::Open(ticket) => Some(self.posts(ticket)),
            Stage::Asked { .. } | Stage::Ended { .. } => {
                return Err(Error::PushEnded {
                    request: self.request.clone(),
                    operation: "gpu_queue",
                });
            }
        };
        let queue = KernelQueue::new(number, (self, self.id), (shared, consumer), table);
        // Under the stage: a ticket that comes is told behind it.
        self.send(Command::Queue(QueueOrder::Add(Box::new(queue))));
        Ok(())
    }
}

impl Push {
    /// A queue that kernels post blocks of this push to. They may begin before the consumer's ticket is here: their
    /// posts wait for it in the ring.
    ///
    /// # Errors
    ///
    /// [`Error::QueueConfig`], [`Error::PushEnded`]; [`Error::Plan`] where the two sides' blocks are of unequal size;
    /// [`Error::Memory`].
    pub fn gpu_queue(&self, config: &GpuQueueConfig) -> Result<GpuQueue, Error> {
        self.engine.runtime.health.check()?;
        let wrong = |what| Err(Error::QueueConfig { what });
        if !config.depth.is_power_of_two() || config.depth > MOST_SLOTS {
            return wrong("depth: a power of two, up to 65536");
        }
        if config.patience.is_zero() {
            return wrong("patience: a post that may not wait at all finds no end of another");
        }
        let groups = u32::try_from(self.engine.format.groups().len()).unwrap_or(u32::MAX);
        self.pushing.has_equal_blocks(groups)?;
        let (device, consumer) = DeviceQueue::new(&config.gpu, config.depth, config.patience)?;
        let shared = Arc::new(SharedQueue {
            device: Kept {
                device: Arc::new(device),
                // Nobody has its handle.
                is_over: AtomicBool::new(true),
            },
            pace: Mutex::new(config.pace),
            taken: AtomicU64::new(0),
            done: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        });
        let number = self.engine.runtime.next_id();
        self.pushing.attach(number, (&shared, consumer))?;
        shared.device.is_over.store(false, Ordering::Release);
        Ok(GpuQueue {
            number,
            pushing: Arc::clone(&self.pushing),
            engine: Arc::clone(&self.engine),
            shared,
            is_over: false,
        })
    }
}

/// A queue that kernels post the blocks of a push to.
///
/// Give kernels its [`handle`](Self::handle). When the last of them has ended, say so with [`finish`](Self::finish),
/// and then [commit](Push::commit) the push: what was posted by then is part of it, and its outcome is that of all
/// posts and layers together. A post that is wrong fails the push ([`Cause::KernelPost`](crate::transfer::Cause)), and
/// whatever fails the push ends the posts: kernels that wait are told, with the outcome at the latest.
///
/// Dropping a queue without `finish` stops its kernels by their abort word, and its memory is never given back.
#[derive(Debug)]
pub struct GpuQueue {
    number: u64,
    pushing: Arc<Pushing>,
    engine: Arc<Inner>,
    shared: Arc<SharedQueue>,
    is_over: bool,
}

impl GpuQueue {
    /// What a kernel takes, by value: `kvx_queue` of `kernels/queue.h`.
    #[must_use]
    pub fn handle(&self) -> Queue {
        self.shared.device().handle()
    }

    /// The queue's memory, for the [kernels that are built in](crate::mem::post::device::PostKernels).
    #[must_use]
    pub fn device(&self) -> &Arc<DeviceQueue> {
        &self.shared.device.device
    }

    /// The GPU whose kernels post.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        self.shared.device().gpu()
    }

    /// The bytes that a post of one block has to name: those that move of a block of a group in one layer. `None`
    /// where the two ranks do not both keep the layer in that group.
    #[must_use]
    pub fn block_bytes(&self, group: u32, layer: u32) -> Option<u64> {
        self.pushing.plans.layer_bytes(group, layer)
    }

    /// How eagerly it is looked at from now on.
    pub fn set_pace(&self, pace: Pace) {
        let mut at = self
            .shared
            .pace
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *at = pace;
        drop(at);
        if !self.engine.runtime.health.is_forked() {
            self.pushing.send(Command::Queue(QueueOrder::Look));
        }
    }

    /// What has become of the posts so far.
    #[must_use]
    pub fn report(&self) -> GpuQueueReport {
        self.shared.report()
    }

    /// Says that no kernel posts any more. What they have posted is part of the push; the queue's memory is given back
    /// when that has ended. Waits for an event for at most `within`; kernels that are late are stopped by
    /// their abort word, and waited for once more.
    ///
    /// # Errors
    ///
    /// [`Error::KernelsLate`]; where the kernels did not end although they were stopped, the queue's memory is
    /// never given back. [`Error::Memory`], also for what went wrong with the kernels; [`Error::Forked`].
    pub fn finish(mut self, kernels: Kernels<'_>, within: Duration) -> Result<(), Error> {
        self.engine.runtime.health.check_process()?;
        let ended = match kernels {
            Kernels::Ended => Ok(()),
            Kernels::Behind(event) => {
                let wait = || event.wait(Instant::now() + within).map_err(Error::Memory);
                match wait() {
                    Err(Error::Memory(error)) if is_late(&error) => {
                        self.shared.stop();
                        wait().and(Err(Error::KernelsLate { after: within }))
                    }
                    other => other,
                }
            }
        };
        let gone = match &ended {
            Ok(()) | Err(Error::KernelsLate { .. }) => true,
            Err(_) => false,
        };
        self.shared.device.is_over.store(gone, Ordering::Release);
        // A kernel that was killed may have begun a post that nobody will find.
        let posted = match gone {
            true => self.shared.device().posted().map(Some),
            false => Ok(None),
        };
        self.close(*posted.as_ref().unwrap_or(&None));
        match ended {
            Ok(()) => Ok(posted.map(drop)?),
            Err(Error::Memory(error)) if is_late(&error) => {
                Err(Error::KernelsLate { after: within })
            }
            ended => ended,
        }
    }

    fn close(&mut self, posted: Option<u64>) {
        self.is_over = true;
        let number = self.number;
        self.pushing
            .send(Command::Queue(QueueOrder::Close { number, posted }));
    }
}

fn is_late(error: &crate::mem::Error) -> bool {
    matches!(error, crate::mem::Error::Gpu(fault) if matches!(**fault, GpuFault::Deadline { .. }))
}

impl Drop for GpuQueue {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        if self.engine.runtime.health.is_forked() {
            // Nor may the child be the last to let go of what its parent uses.
            std::mem::forget(Arc::clone(&self.engine));
            std::mem::forget(Arc::clone(&self.shared));
            return;
        }
        self.shared.stop();
        self.close(None);
    }
}
