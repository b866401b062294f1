//! A queue that kernels post to, as the worker has it that owns its push or its pull.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer_verbs::mlx5::model::Copying;
use tracing::{debug, error};

use crate::engine::push::SharedQueue;
use crate::engine::queues::PartOf;
use crate::gpu_queue::{Batches, Pace, PostTable, Wanted, WqeDevice, Wrong};
use crate::mem::post::device::PosterReport;
use crate::mem::post::{Consumer, Rest, Status};
use crate::transfer::{Cause, JobId, JobReport, TransferId};

/// How long after a post the next one is waited for without rest.
const YOUNG: Duration = Duration::from_micros(200);
/// How a queue is looked at whose push is over.
const AFTERWARDS: Pace = Pace::Parked {
    longest: Duration::from_millis(20),
};

/// Whether posts are carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Open,
    /// The push has all that is part of it, or is over: posts are told that it is closed.
    Sealed,
}

/// What takes posts, and tells how they have ended.
#[derive(Debug)]
pub(crate) enum Served {
    /// The consumer of a ring of descriptors.
    Ring(Consumer),
    /// The device of a queue of work requests.
    Wqes(Box<WqeDevice>),
    /// Nobody: kernels put blocks themselves. What they do is a job of the push, whose end is this report; `None` where
    /// they have ended, or never began.
    Links { kernels: Option<JobReport> },
}

impl Served {
    /// Descriptors, or work requests, that were taken.
    pub(super) fn taken(&self) -> u64 {
        match self {
            Self::Ring(consumer) => consumer.taken(),
            Self::Wqes(device) => device.taken(),
            Self::Links { .. } => 0,
        }
    }

    /// Work requests that have been told of and are not here yet.
    pub(super) fn copying(&self) -> Option<Copying> {
        match self {
            Self::Wqes(device) => device.copying(),
            Self::Ring(_) | Self::Links { .. } => None,
        }
    }

    /// Those that have not ended.
    fn under_way(&self) -> u64 {
        match self {
            Self::Ring(consumer) => consumer.under_way() as u64,
            Self::Wqes(device) => device.under_way(),
            // One of which nobody knows that its kernels have ended stays.
            Self::Links { kernels } => kernels.is_some().into(),
        }
    }
}

/// A job of posts.
#[derive(Debug)]
pub(super) struct PostedJob {
    pub(super) id: JobId,
    pub(super) posts: Vec<u64>,
    /// What the consumer is told when its blocks are there.
    pub(super) immediates: Vec<u32>,
}

/// A queue, as the worker has it that owns its push.
#[derive(Debug)]
pub(crate) struct KernelQueue {
    pub(super) number: u64,
    pub(super) id: TransferId,
    pub(super) part_of: PartOf,
    pub(super) served: Served,
    pub(super) shared: Arc<SharedQueue>,
    /// What posts may name; `None` before the push's ticket has come.
    pub(super) table: Option<PostTable>,
    /// What is wrong with its device, if that is not said yet.
    pub(super) broken: Option<Wrong>,
    /// The jobs that are under way, in their order.
    pub(super) jobs: VecDeque<PostedJob>,
    pub(super) stage: Stage,
    /// It goes when nothing of it is under way.
    pub(super) is_closing: bool,
    /// Its push is to be committed when what its device is told of has been copied.
    pub(super) is_committing: bool,
    /// What its posters have left, if there are no more.
    pub(super) left: Option<PosterReport>,
    /// Whether kernels have begun to put a block themselves, and not ended it.
    pub(super) has_begun: bool,
    /// Looks in a row that have found nothing, and when one last has found something.
    pub(super) looks: u32,
    pub(super) found: Option<Instant>,
}

impl KernelQueue {
    pub(crate) fn new(
        number: u64,
        part_of: &PartOf,
        (shared, served): (&Arc<SharedQueue>, Served),
        table: Option<PostTable>,
    ) -> Self {
        Self {
            number,
            id: part_of.queues().id(),
            part_of: part_of.clone(),
            shared: Arc::clone(shared),
            served,
            table,
            broken: None,
            jobs: VecDeque::new(),
            stage: Stage::Open,
            is_closing: false,
            is_committing: false,
            left: None,
            has_begun: false,
            looks: 0,
            found: None,
        }
    }

    pub(super) fn complete(&mut self, post: u64, status: Status) {
        self.complete_each(&[post], status);
    }

    /// Posts have ended. They are counted first: whoever sees a kernel's end finds its posts counted.
    pub(super) fn complete_each(&mut self, posts: &[u64], status: Status) {
        self.shared.note_ended(posts.len() as u64, status);
        match &mut self.served {
            Served::Ring(consumer) => {
                let Some(queue) = self.shared.device().proxy() else {
                    return;
                };
                let posts = posts.iter().copied();
                match consumer.complete_each(queue.ring(), posts, status) {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => debug!(%error, "a post has ended twice"),
                    Err(error) => self.lose_ring(&error),
                }
            }
            Served::Links { .. } => {}
            Served::Wqes(device) => {
                let mut ends = posts.iter().map(|post| device.complete(*post, status));
                if let Some(Err(wrong)) = ends.find(Result::is_err) {
                    self.broken = Some(wrong);
                }
            }
        }
    }

    /// All that is under way has ended, and nothing is carried out any more.
    pub(super) fn end(&mut self, status: Status) {
        self.stage = Stage::Sealed;
        let jobs = std::mem::take(&mut self.jobs);
        match &mut self.served {
            Served::Ring(consumer) => {
                let Some(queue) = self.shared.device().proxy() else {
                    return;
                };
                let ring = queue.ring();
                self.shared.note_ended(consumer.under_way() as u64, status);
                let closed = match status {
                    Status::Ok => Ok(()),
                    status => consumer.close(ring, status),
                };
                if let Err(error) = closed.and_then(|()| consumer.complete_all(ring, status)) {
                    self.lose_ring(&error);
                }
            }
            Served::Links { .. } => match status {
                Status::Ok => {}
                _ => self.shared.stop(),
            },
            Served::Wqes(device) => {
                let (taken, done, failed) = self.shared.counts();
                self.shared
                    .note_ended(taken.saturating_sub(done + failed), status);
                match status {
                    Status::Ok => {
                        // The push is done before its last jobs' posts have been told so.
                        let posts = jobs.iter().flat_map(|job| &job.posts);
                        let mut ends = posts.map(|post| device.complete(*post, status));
                        let is_broken = ends.any(|end| end.is_err());
                        // What comes is no part of it.
                        device.close(Status::Closed);
                        if is_broken {
                            self.shared.stop();
                        }
                    }
                    status => {
                        if device.fail(status).is_err() {
                            self.shared.stop();
                        }
                    }
                }
            }
        }
    }

    pub(super) fn add(&self, batches: &mut Option<Batches>, post: u64, wanted: Wanted) {
        let Some(table) = &self.table else {
            return;
        };
        let new = || Batches::new(table.block_ops(), self.part_of.queues().together());
        batches.get_or_insert_with(new).add(post, wanted);
    }

    /// The ring's words are not where they should be: a defect.
    pub(super) fn lose_ring(&mut self, error: &crate::mem::Error) {
        error!(%error, "the ring of a queue");
        self.stage = Stage::Sealed;
        self.shared.stop();
    }

    /// How long the worker may rest before it looks again; `None`: it is told when there is something to look at.
    pub(super) fn rest(&mut self) -> Option<Duration> {
        if let Served::Links { .. } = &self.served {
            return None;
        }
        let pace = match self.stage {
            Stage::Open if self.table.is_none() => return None,
            Stage::Open => self.shared.pace(),
            Stage::Sealed => AFTERWARDS,
        };
        if self.found.is_some_and(|found| found.elapsed() < YOUNG) {
            return Some(Duration::ZERO);
        }
        match pace.rest(self.looks) {
            Rest::Spin => Some(Duration::ZERO),
            Rest::Sleep(sleep) => {
                self.looks = self.looks.saturating_add(1);
                Some(sleep)
            }
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.is_closing && self.stage == Stage::Sealed && self.served.under_way() == 0
    }
}

/// The number of a post, whose ticket says of several work requests how many they are.
pub(super) fn post_number(ticket: u64) -> u64 {
    crate::mem::kernels::queue::ticket_number(ticket)
}

impl Drop for KernelQueue {
    fn drop(&mut self) {
        self.end(match std::thread::panicking() {
            true => Status::Device,
            false => Status::Closed,
        });
        // Nobody looks at it any more: a post that still finds room would wait for its end until it is late.
        self.shared.stop();
    }
}

/// What the posters of a push are told that has failed.
pub(super) fn status_of(cause: &Cause) -> Status {
    match cause {
        // The post that is to blame has been told by itself.
        Cause::KernelPost { .. } => Status::Flushed,
        Cause::DeadlinePassed => Status::Late,
        Cause::Cancelled | Cause::Aborted | Cause::Revoked | Cause::ShuttingDown => Status::Closed,
        Cause::PeerDead
        | Cause::PeerStalled { .. }
        | Cause::PeerRestarted
        | Cause::PeerUnreachable
        | Cause::PeerClosed
        | Cause::PeerReset
        | Cause::CutOff { .. }
        | Cause::Refused { .. } => Status::Peer,
        // What was asked for is there no more.
        Cause::LeaseExpired => Status::BadRights,
        _ => Status::Device,
    }
}
