//! Queues that kernels post the blocks of a push to: the owner's handle, and what it shares with the worker.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvxfer_verbs::mlx5::model::HcaSetup;
use kvxfer_verbs::mlx5::{CqDepth, Qpn, SqDepth};
use tracing::{error, warn};

use super::{Inner, Push, Pushing, Stage};
use crate::blocks::BlockPair;
use crate::engine::gpu::cause;
use crate::engine::moves::Moved;
use crate::engine::queues::{PartOf, Queues};
use crate::engine::worker::{Command, KernelQueue, QueueOrder, Served};
use crate::error::Error;
use crate::gpu_queue::{
    GpuQueueConfig, GpuQueueReport, Hca, Kernels, MOST_SLOTS, MOST_WQES, Named, Pace, PostFault,
    PostTable, QueueKind, TO_READ, WqeDevice, WqeSlots, after, is_late,
};
use crate::mem::gpu::Gpu;
use crate::mem::kernels::queue::Queue;
use crate::mem::post::Status;
use crate::mem::post::device::{
    Bell, DeviceQueue, PostQueue, PosterReport, RegionTable, WqeQueue, WqeQueueConfig,
};
use crate::plan::Posted;
use crate::ticket::Ticket;
use crate::transfer::{Cause, GpuOperation, Refusal};

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
    device: Arc<PostQueue>,
    /// No kernel touches it: nobody has had its handle, or the kernels have ended.
    is_over: AtomicBool,
}

impl Drop for Kept {
    fn drop(&mut self) {
        if !*self.is_over.get_mut() {
            warn!(
                "nobody has said that a queue's kernels have ended: its memory is never given back"
            );
            self.device.forsake();
            std::mem::forget(Arc::clone(&self.device));
        }
    }
}

impl SharedQueue {
    /// Of a queue whose handle nobody has.
    pub(super) fn new(device: PostQueue, pace: Pace) -> Arc<Self> {
        Arc::new(Self {
            device: Kept {
                device: Arc::new(device),
                is_over: AtomicBool::new(true),
            },
            pace: Mutex::new(pace),
            taken: AtomicU64::new(0),
            done: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        })
    }

    /// Whether it has been said that no kernel touches the queue any more, of one that is closed.
    pub(crate) fn kernels_have_ended(&self) -> bool {
        self.device.is_over.load(Ordering::Acquire)
    }

    pub(crate) fn device(&self) -> &PostQueue {
        &self.device.device
    }

    pub(crate) fn pace(&self) -> Pace {
        *self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn note_taken(&self, posts: u64) {
        self.taken.fetch_add(posts, Ordering::Relaxed);
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

    /// How many were taken, went well, and did not.
    pub(crate) fn counts(&self) -> (u64, u64, u64) {
        let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
        // Those that have ended first, so that they are never more than were taken.
        let (done, failed) = (count(&self.done), count(&self.failed));
        (count(&self.taken), done, failed)
    }

    /// What has been posted, once no kernel runs any more.
    fn posted(&self, part_of: &PartOf, deadline: Instant) -> Result<PostedAll, crate::mem::Error> {
        Ok(match (self.device().links(), part_of) {
            (Some(links), PartOf::Push(push)) => {
                // One that runs all the same, against its owner's word, writes no more than until its next look. What is
                // read is read behind this.
                self.stop();
                let puts = links.puts(deadline)?;
                PostedAll::Put(Box::new(push.take_puts(&puts)))
            }
            _ => PostedAll::Left(self.device().left(deadline)?),
        })
    }

    fn report(&self) -> GpuQueueReport {
        let (taken, done, failed) = self.counts();
        GpuQueueReport {
            taken,
            done,
            failed,
        }
    }
}

/// What kernels have posted, all of it.
#[derive(Debug)]
pub(crate) enum PostedAll {
    /// So many posts have been begun, and perhaps given up.
    Left(PosterReport),
    /// They have put this themselves.
    Put(Box<PutAll>),
}

/// What kernels have put themselves, as part of their push.
#[derive(Debug)]
pub(crate) struct PutAll {
    /// Blocks of layers.
    pub(crate) count: u64,
    /// Whether there is a block that they have begun and not ended.
    pub(crate) has_begun: bool,
    /// What it comes to, if there is any.
    pub(crate) taken: Result<Option<Moved>, NotPosted>,
    /// How long that took.
    pub(crate) prepare: Duration,
}

/// Why what kernels have posted is not carried out.
#[derive(Debug)]
pub(crate) enum NotPosted {
    /// A post is to blame: this one of them.
    Fault { fault: PostFault, at: usize },
    /// None of them is.
    Cause(Cause),
}

impl Pushing {
    pub(crate) fn queues(&self) -> &Arc<Queues> {
        &self.queues
    }

    /// What posts are checked against, once the ticket is here; `None` where no queue was made.
    pub(crate) fn posts(&self, ticket: &Ticket) -> Option<PostTable> {
        let block_ops = self.queues.block_ops()?;
        let tells = !self.peer.is_rdma();
        Some(PostTable::new(block_ops, &ticket.groups, tells))
    }

    /// Claims what kernels have posted, and counts its checksums. For who knows that the push does not let go of its
    /// claims meanwhile: the worker that owns it, and over links who is about to tell that worker that its kernels have
    /// ended. A fault comes with its place among the posts.
    pub(crate) fn take_posts(&self, posted: Posted) -> Result<Moved, NotPosted> {
        let Some(engine) = self.peer.engine.upgrade() else {
            return Err(NotPosted::Cause(Cause::ShuttingDown));
        };
        let sources = posted.blocks().map(|(group, _, pair)| (group, pair.src));
        self.claim_sources(&engine, sources).map_err(|in_use| {
            let (group, block) = (in_use.group, in_use.block);
            let reads = |of: (u32, u32, BlockPair)| (of.0, of.2.src) == (group, block);
            NotPosted::Fault {
                fault: PostFault::InUse {
                    // It is one of a post's.
                    group: u8::try_from(group).unwrap_or(u8::MAX),
                    block,
                },
                at: posted.blocks().position(reads).unwrap_or(0),
            }
        })?;
        self.count_posted(&posted).map_err(|_| {
            let reason = Refusal::Sums;
            NotPosted::Cause(Cause::Refused { reason })
        })?;
        Ok(Moved::Posted(Arc::new(posted)))
    }

    /// Gives a queue to the worker that owns the push.
    fn attach(
        self: &Arc<Self>,
        number: u64,
        (shared, served): (&Arc<SharedQueue>, Served),
    ) -> Result<(), Error> {
        let stage = self.stage();
        let table = match &*stage {
            Stage::Asked {
                committed: false, ..
            } => None,
            Stage::Open(ticket) => self.posts(ticket),
            Stage::Asked { .. } | Stage::Ended { .. } => {
                return Err(Error::PushEnded {
                    request: self.request.clone(),
                    operation: "gpu_queue",
                });
            }
        };
        // Under the stage: a ticket that comes is told behind it.
        let part_of = PartOf::Push(Arc::clone(self));
        attached(&part_of, number, (shared, served), table);
        Ok(())
    }
}

/// Gives a queue to the worker that owns what its posts are part of.
pub(crate) fn attached(
    part_of: &PartOf,
    number: u64,
    (shared, served): (&Arc<SharedQueue>, Served),
    table: Option<PostTable>,
) {
    let queue = KernelQueue::new(number, part_of, (shared, served), table);
    let queues = part_of.queues();
    queues.begun();
    queues.send(Command::Queue(QueueOrder::Add(Box::new(queue))));
}

impl Push {
    /// A queue that kernels post blocks of this push to. They may begin before the consumer's ticket is here: their
    /// posts wait for it in the ring. It has to be [finished](GpuQueue::finish) before the push is
    /// [committed](Self::commit).
    ///
    /// # Errors
    ///
    /// [`Error::QueueConfig`], [`Error::QueueDepth`], [`Error::PushEnded`]; [`Error::Plan`] where the two sides' blocks
    /// are of unequal size; [`Error::Memory`]. [`Error::NoLinks`] where kernels may not write the blocks themselves; a
    /// queue of that kind waits for the consumer's ticket and its leave, for as long as it is patient.
    pub fn gpu_queue(&self, config: &GpuQueueConfig) -> Result<GpuQueue, Error> {
        let queues = &self.pushing.queues;
        if config.kind == QueueKind::Links {
            let number = queues.number(&self.engine, config)?;
            return self.links(config, number);
        }
        let (number, shared, served) = queues.make(&self.engine, config)?;
        self.pushing.attach(number, (&shared, served))?;
        let part_of = PartOf::Push(Arc::clone(&self.pushing));
        Ok(GpuQueue::new(&self.engine, part_of, number, shared))
    }
}

impl Queues {
    /// A queue: its number, its memory, and what serves it.
    ///
    /// # Errors
    ///
    /// As [`Push::gpu_queue`].
    pub(crate) fn make(
        &self,
        engine: &Inner,
        config: &GpuQueueConfig,
    ) -> Result<(u64, Arc<SharedQueue>, Served), Error> {
        let number = self.number(engine, config)?;
        let (device, served) = match config.kind {
            QueueKind::Links => {
                return Err(Error::QueueConfig {
                    what: "kind: over links kernels push, and do not pull",
                });
            }
            QueueKind::Proxy => {
                let (gpu, patience) = (&config.gpu, config.patience);
                let (device, consumer) = DeviceQueue::new(gpu, config.depth, patience)?;
                (PostQueue::Proxy(device), Served::Ring(consumer))
            }
            QueueKind::GpuWqe(_) => self.wqes(engine, (config, number), Bell::Cpu)?,
            QueueKind::Direct(_) => self.wqes(engine, (config, number), Bell::Kernel)?,
        };
        Ok((number, SharedQueue::new(device, config.pace), served))
    }

    /// The number of a queue that there can be, as far as its settings say.
    fn number(&self, engine: &Inner, config: &GpuQueueConfig) -> Result<u64, Error> {
        engine.runtime.health.check()?;
        let wrong = |what| Err(Error::QueueConfig { what });
        if !config.depth.is_power_of_two() || config.depth > MOST_SLOTS {
            return wrong("depth: a power of two, up to 65536");
        }
        match config.kind.hca() {
            Some(Hca::Nic) => {
                return wrong("hca: nic is not there: no NIC's queues are mapped for kernels yet");
            }
            None if config.slots != WqeSlots::Pinned => {
                return wrong("slots: a proxy's descriptors are in pinned memory");
            }
            Some(Hca::Model) if config.depth > MOST_WQES => {
                return wrong("depth: up to 32768 work requests");
            }
            _ => {}
        }
        if config.patience.is_zero() {
            return wrong("patience: a post that may not wait at all finds no end of another");
        }
        let groups = u32::try_from(engine.format.groups().len()).unwrap_or(u32::MAX);
        Ok(self.next(groups)?)
    }

    /// A queue of WQEs, and a model of its device.
    fn wqes(
        &self,
        engine: &Inner,
        (config, number): (&GpuQueueConfig, u64),
        bell: Bell,
    ) -> Result<(PostQueue, Served), Error> {
        let memory = engine.placement.memory();
        let at = |region: u32| Some(memory.get(usize::try_from(region).ok()?)?.addr());
        let named = self.block_ops().and_then(|ops| Named::new(ops, at));
        let Named {
            windows,
            keys,
            layers,
            most,
        } = named.ok_or(Error::QueueConfig {
            what: "kind: work requests name blocks at even distances, below 2^48 bytes of a memory",
        })?;
        if most > config.depth {
            return Err(Error::QueueDepth {
                depth: config.depth,
                stretches: most,
            });
        }
        let depth = |_| Error::QueueConfig {
            what: "depth: a power of two, up to 32768",
        };
        let setup = HcaSetup {
            qpn: Qpn::new(number as u32 & 0x00ff_ffff).map_err(depth)?,
            sq_depth: SqDepth::new(config.depth).map_err(depth)?,
            cq_depth: CqDepth::new((2 * config.depth).min(MOST_WQES)).map_err(depth)?,
            first: 0,
            keys,
        };
        let of = WqeQueueConfig {
            bell,
            slots: config.slots,
            sq_depth: setup.sq_depth,
            cq_depth: setup.cq_depth,
            qpn: setup.qpn,
            patience: config.patience,
        };
        let table = RegionTable::new(&config.gpu, &layers)?;
        let (queue, queues) = WqeQueue::new(&config.gpu, &of, Some(table))?;
        let device = WqeDevice::new(queues, setup, windows);
        let device = device.map_err(|_| Error::QueueConfig {
            what: "depth: the queue's memory does not hold it",
        })?;
        Ok((PostQueue::Wqe(queue), Served::Wqes(Box::new(device))))
    }
}

/// A queue that kernels post the blocks of a push to, or ask for those of a pull by.
///
/// Give kernels its [`handle`](Self::handle). When the last of them has ended, say so with [`finish`](Self::finish),
/// and then [commit](Push::commit) the push: what was posted is part of it, and its outcome is that of all posts and layers
/// together. A commit before is refused. A post that is wrong fails the push ([`Cause::KernelPost`]), and whatever fails the
/// push ends the posts: kernels that wait are told, with the outcome at the latest. Of a pull and its
/// [commit](crate::engine::Pull::commit) the same is true.
///
/// Dropping a queue without `finish` stops its kernels by their abort word; its memory is never given back, and its push
/// can only be aborted, unless nobody has had its handle.
#[derive(Debug)]
pub struct GpuQueue {
    number: u64,
    part_of: PartOf,
    engine: Arc<Inner>,
    shared: Arc<SharedQueue>,
    is_over: bool,
}

impl GpuQueue {
    /// The worker has it.
    pub(crate) fn new(
        engine: &Arc<Inner>,
        part_of: PartOf,
        number: u64,
        shared: Arc<SharedQueue>,
    ) -> Self {
        Self {
            number,
            part_of,
            engine: Arc::clone(engine),
            shared,
            is_over: false,
        }
    }

    /// What a kernel takes, by value: `kvx_queue` of `kernels/queue.h`. It names memory that it does not hold: no kernel
    /// uses it after [`finish`](Self::finish), nor is one launched with it then. Whoever launches a kernel with it, which
    /// is an unsafe call, promises that.
    #[must_use]
    pub fn handle(&self) -> Queue {
        self.hand_out();
        self.shared.device().handle()
    }

    /// The queue's memory, for the [kernels that are built in](crate::mem::post::device::PostKernels). Of its handle is
    /// true what [`handle`](Self::handle) says.
    #[must_use]
    pub fn device(&self) -> &Arc<PostQueue> {
        self.hand_out();
        &self.shared.device.device
    }

    /// From now on kernels may touch its memory.
    fn hand_out(&self) {
        self.shared.device.is_over.store(false, Ordering::Release);
    }

    /// The GPU whose kernels post.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        self.shared.device().gpu()
    }

    /// The bytes that a post of one block has to name: those that move of a block of a group in one layer. `None`
    /// where the two ranks do not both keep the layer in that group, or nothing of it moves: such a layer is not posted.
    #[must_use]
    pub fn block_bytes(&self, group: u32, layer: u32) -> Option<u64> {
        let bytes = self.part_of.queues().plans().layer_bytes(group, layer);
        bytes.filter(|bytes| *bytes > 0)
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
            let queues = self.part_of.queues();
            queues.send(Command::Queue(QueueOrder::Look));
        }
    }

    /// What has become of the posts so far.
    #[must_use]
    pub fn report(&self) -> GpuQueueReport {
        self.shared.report()
    }

    /// Says that no kernel posts any more, and that none uses the [handle](Self::handle) later. What they have posted is
    /// part of the push; the queue's memory is another's to use when that has ended. Waits for an
    /// event for at most `within`, and a year; kernels that are late are stopped by their abort word, and waited for
    /// once more. Then it is read what was posted, for which a second is allowed at least.
    ///
    /// An event must have been recorded behind the last kernel that posts, on the same GPU: one that never was counts as
    /// reached, and nothing here can see that it stands before a kernel.
    ///
    /// # Errors
    ///
    /// [`Error::KernelsLate`]; where the kernels did not end although they were stopped, the queue's memory is
    /// never given back, and it counts as not finished. [`Error::QueueEvent`] for the event of another GPU: it is as if
    /// the queue was dropped. [`Error::Memory`], also for what went wrong with the kernels: then the push has failed, with
    /// [`Cause::Gpu`](crate::transfer::Cause::Gpu). [`Error::Forked`].
    pub fn finish(mut self, kernels: Kernels<'_>, within: Duration) -> Result<(), Error> {
        self.engine.runtime.health.check_process()?;
        let ended = kernels.end(self.gpu(), within, || self.shared.stop());
        if matches!(ended, Err(Error::QueueEvent { .. })) {
            return ended;
        }
        // A kernel that was killed may have begun a post that nobody will find.
        let posted = match &ended {
            Ok(()) | Err(Error::KernelsLate { .. }) => {
                self.shared.device.is_over.store(true, Ordering::Release);
                let until = after(within.max(TO_READ));
                let posted = self.shared.posted(&self.part_of, until);
                // None waits any more, whoever keeps the queue.
                self.shared.device().forsake();
                Some(posted.map_err(Error::Memory))
            }
            Err(_) => None,
        };
        match (ended, posted) {
            (ended, Some(Ok(posted))) => {
                self.close(Some(posted), true);
                ended
            }
            // They run on, and may post: of what, nobody will know.
            (Err(Error::Memory(error)), None) if is_late(&error) => {
                self.close(None, false);
                Err(Error::KernelsLate { after: within })
            }
            // What they have posted is not known, nor whether it is what they should have.
            (_, Some(Err(error))) | (Err(error), None) => {
                let cause = cause(GpuOperation::Wait, &error);
                let queues = self.part_of.queues();
                let id = queues.id();
                queues.send(Command::Fail { id, cause });
                self.close(None, true);
                Err(error)
            }
            (Ok(()), None) => Ok(()),
        }
    }

    /// Tells the worker; `is_finished`: the push may be committed, if it has not failed.
    fn close(&mut self, posted: Option<PostedAll>, is_finished: bool) {
        self.is_over = true;
        let number = self.number;
        let queues = self.part_of.queues();
        let id = queues.id();
        queues.send(Command::Queue(QueueOrder::Close { id, number, posted }));
        if is_finished {
            queues.finished();
        }
    }
}

impl Drop for GpuQueue {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        if self.engine.runtime.health.is_forked() {
            // Nor may the child be the last to let go of what its parent uses.
            std::mem::forget(Arc::clone(&self.engine));
            std::mem::forget(self.part_of.clone());
            std::mem::forget(Arc::clone(&self.shared));
            return;
        }
        self.shared.stop();
        // Nobody can have posted what nobody had the handle for.
        let is_unused = self.shared.device.is_over.load(Ordering::Acquire);
        self.close(None, is_unused);
    }
}
