//! What goes into the ledger and what comes out of it.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Cause, Job, JobId, PeerKey, TransferId};
use crate::plan::source::OpSource;
use crate::rails::RailSet;
use crate::time::Time;

/// What a transfer does.
#[derive(Clone)]
pub enum Kind {
    /// Reads the peer's blocks.
    Pull {
        /// What to read.
        source: Arc<dyn OpSource>,
        /// Whether the producer's lease is to be read, after all data, before the transfer is done.
        check_lease: bool,
        /// Whether the producer is to be told, once the transfer is done, that this reader needs
        /// the blocks no longer.
        release: bool,
    },
    /// Reads the peer's blocks as they are asked for: its jobs are added one by one until it is committed. The
    /// producer's lease is read behind the data of each job, which counts when it was live.
    Gets {
        /// As that of a pull.
        release: bool,
    },
    /// Writes into the peer's blocks; its jobs are added one by one until it is committed.
    Push,
}

impl Kind {
    /// Whether its jobs are added one by one.
    pub(super) fn is_begun(&self) -> bool {
        matches!(self, Self::Gets { .. } | Self::Push)
    }
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pull {
                source,
                check_lease,
                release,
            } => f
                .debug_struct("Pull")
                .field("ops", &source.ops())
                .field("check_lease", check_lease)
                .field("release", release)
                .finish(),
            Self::Gets { release } => f.debug_struct("Gets").field("release", release).finish(),
            Self::Push => f.write_str("Push"),
        }
    }
}

/// A new transfer.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Its name, chosen by the caller.
    pub id: TransferId,
    /// The other side.
    pub peer: PeerKey,
    /// What it does.
    pub kind: Kind,
    /// Whether checksums are to be compared or told, after all data, before it is done.
    pub verify: bool,
    /// When its outcome is due.
    pub deadline: Time,
    /// How many schedulers its jobs are started on; at least 1.
    pub workers: u16,
}

/// What the read of a producer's lease slot showed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseAnswer {
    /// The lease was still this transfer's: what was read before is good.
    Live,
    /// It was not, or could not be read.
    Gone {
        /// Why.
        cause: Cause,
    },
}

/// Whether the memory of a transfer that has ended may be used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MemoryState {
    /// Nothing posted by this transfer can touch it any more.
    Released,
    /// Something still may: wait for [`Output::Released`].
    Quarantined,
}

/// The part of a failed transfer that is not known to have arrived.
#[derive(Clone, Default)]
pub struct Incomplete {
    pub(super) sources: Vec<Arc<dyn OpSource>>,
}

impl Incomplete {
    /// All of these jobs, however far they are.
    pub(crate) fn all_of(jobs: &[Arc<Job>]) -> Self {
        let sources = jobs.iter().map(|job| Arc::clone(&job.source));
        Self {
            sources: sources.collect(),
        }
    }

    /// The (group, destination block) pairs whose content is not known to be right, sorted, each
    /// once. Blocks of jobs that were confirmed whole are not among them; a job that was not is
    /// named whole. Costs time in proportion to the operations: meant for the engine's thread.
    #[must_use]
    pub fn blocks(&self) -> Vec<(u32, u32)> {
        let mut blocks = Vec::new();
        for source in &self.sources {
            for op in 0..source.ops() {
                source.blocks_of(op, &mut blocks);
            }
            blocks.sort_unstable();
            blocks.dedup();
        }
        blocks.sort_unstable();
        blocks.dedup();
        blocks
    }

    /// Whether every block is known to be right.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sources.iter().all(|s| s.ops() == 0)
    }
}

impl fmt::Debug for Incomplete {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ops: Vec<u64> = self.sources.iter().map(|s| s.ops()).collect();
        f.debug_struct("Incomplete").field("ops", &ops).finish()
    }
}

/// How a transfer ended.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// All bytes are where they belong.
    Done {
        /// How many.
        bytes: u64,
    },
    /// It failed.
    Failed {
        /// What went wrong first.
        cause: Cause,
        /// The job and the operation it befell, where it befell one.
        at: Option<(JobId, u64)>,
        /// What is not known to have arrived.
        incomplete: Incomplete,
        /// Whether its memory may be used again.
        memory: MemoryState,
    },
    /// The engine cancelled or aborted it.
    Cancelled {
        /// What is not known to have arrived.
        incomplete: Incomplete,
        /// Whether its memory may be used again.
        memory: MemoryState,
    },
}

impl Outcome {
    /// Whether the memory may be used again.
    #[must_use]
    pub fn memory(&self) -> MemoryState {
        match self {
            Self::Done { .. } => MemoryState::Released,
            Self::Failed { memory, .. } | Self::Cancelled { memory, .. } => *memory,
        }
    }
}

/// What the other side of a transfer is to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// A pull is done: this reader needs the blocks no longer.
    Release,
    /// A push is done: every byte has been confirmed.
    PushDone {
        /// The pairs of rails that its writes went over. None, if it had nothing to write.
        wrote: RailSet,
    },
    /// A push will not be done, and nothing that it posted is under way any more.
    PushAborted {
        /// Why.
        cause: Cause,
    },
}

/// Names one request to drain a peer, so that a late answer to an earlier one frees nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DrainToken(pub(super) u64);

impl DrainToken {
    /// Of somebody who asks once and for whom any answer will do.
    pub(crate) const ANY: DrainToken = DrainToken(0);
}

/// What the ledger asks for. To be carried out in order.
#[derive(Debug, Clone)]
pub enum Output {
    /// Give the job to its peer's `job.workers` schedulers.
    StartJob(Arc<Job>),
    /// Stop the job on all of them.
    StopJob {
        /// The job.
        job: JobId,
        /// Its peer.
        peer: PeerKey,
    },
    /// All data is there: compare its checksums, or tell those of a push, and answer with
    /// [`Transfers::verified`](super::Transfers::verified).
    Verify {
        /// The transfer.
        id: TransferId,
        /// The other side.
        peer: PeerKey,
    },
    /// Read the producer's lease slot and answer with [`Transfers::lease_answer`](super::Transfers::lease_answer).
    CheckLease {
        /// The transfer.
        id: TransferId,
        /// The producer.
        peer: PeerKey,
    },
    /// All data of one job of [`Kind::Gets`] is there: read the producer's lease slot and answer with
    /// [`Transfers::job_checked`](super::Transfers::job_checked).
    CheckJob {
        /// The transfer.
        id: TransferId,
        /// The job.
        job: JobId,
        /// The producer.
        peer: PeerKey,
    },
    /// Tell the other side. Comes after the data, once a transfer at most.
    SendNotice {
        /// The transfer.
        id: TransferId,
        /// The other side.
        peer: PeerKey,
        /// What to say.
        notice: Notice,
    },
    /// Work of a stopped transfer does not drain: take the queue pairs down that these jobs are posted on (on every
    /// worker, after the stops that came before this). They are rebuilt, and what others have posted on them is
    /// posted again; reports of the jobs come as ever. Where queue pairs are not rebuilt, answer with
    /// [`Transfers::lanes_stay`](super::Transfers::lanes_stay).
    ResetLanes {
        /// The transfer.
        id: TransferId,
        /// The peer.
        peer: PeerKey,
        /// Its jobs that are posted.
        jobs: Arc<[JobId]>,
    },
    /// That has not helped, or the peer is lost: move every queue pair to the
    /// peer to the error state (on every worker, after the stops that came before this), and when
    /// nothing posted on them can touch memory any more answer with
    /// [`Transfers::peer_drained`](super::Transfers::peer_drained).
    ForceDrain {
        /// The peer.
        peer: PeerKey,
        /// To be given back with the answer.
        token: DrainToken,
    },
    /// The transfer has ended. Comes once, by its deadline.
    Outcome {
        /// The transfer.
        id: TransferId,
        /// How.
        outcome: Outcome,
    },
    /// The memory of a transfer that ended quarantined may be used again. Comes once.
    Released {
        /// The transfer.
        id: TransferId,
    },
}

/// Where a transfer is on its way.
#[derive(Debug)]
pub(super) enum State {
    /// Jobs run; a push that is not committed may get more.
    Active,
    /// All data is there; its checksums are worked out.
    Verifying,
    /// All data is there; the lease is being read.
    CheckingLease,
    /// It has failed or was cancelled; its posted work drains, and its outcome waits for that.
    Stopping(End),
    /// Its outcome was given; its memory is not free.
    Quarantined(End),
}

/// Why a transfer ends without being done.
#[derive(Debug, Clone)]
pub(super) struct End {
    pub(super) cause: Cause,
    pub(super) at: Option<(JobId, u64)>,
    /// Whether the engine asked for it.
    pub(super) asked: bool,
    /// The last drain token given out when the jobs were stopped: any later one covers them.
    pub(super) before: u64,
    /// The queue pairs that its jobs are posted on have been taken down, or were to be.
    pub(super) reset: bool,
}

/// How far a job is, from the owner's side.
#[derive(Debug)]
pub(super) struct JobRecord {
    pub(super) job: Arc<Job>,
    pub(super) progress: Progress,
    /// It has been started and waits for something of its engine's own: it takes no place among the started.
    pub(super) held: bool,
    /// It stands for kernels that write by themselves: no queue pair that is taken down ends it.
    pub(super) kernels: bool,
    pub(super) ops_done: u64,
    /// The pairs of rails, of all schedulers, that have confirmed some of it.
    pub(super) rails: RailSet,
    /// Writes of it were lost on the way.
    pub(super) in_doubt: bool,
    /// Lanes, of all schedulers, that have lost writes which were posted again, and may be carried out yet.
    pub(super) doubts: i32,
    /// Schedulers that have said their last word.
    pub(super) quiescent: u16,
    /// The lease has yet to be found live behind its data.
    pub(super) unchecked: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// Waits for its turn; no scheduler knows it.
    Queued,
    /// Schedulers post it.
    Started,
    /// Nothing of it is posted here, and the peer may carry out what was.
    InDoubt,
    /// Nothing of it is posted, and nothing will be.
    Drained,
}

impl JobRecord {
    /// Whether it is complete and its data is known to be what was asked for, as far as that is found out job by job.
    pub(super) fn counts(&self) -> bool {
        self.complete() && !self.unchecked
    }

    /// Whether all of it is confirmed, and nothing that was lost can come after that.
    pub(super) fn complete(&self) -> bool {
        self.ops_done >= self.job.ops() && self.doubts <= 0 && !self.in_doubt
    }
}

/// A transfer in the ledger.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) peer: PeerKey,
    pub(super) kind: Kind,
    pub(super) verify: bool,
    pub(super) state: State,
    pub(super) deadline: Time,
    /// When the clock next matters to it, as it stands in the ledger's list.
    pub(super) timer: Option<Time>,
    pub(super) workers: u16,
    /// In the order of their ids; where they are added one by one, those that do not count yet.
    pub(super) jobs: Vec<JobRecord>,
    /// What those come to that do: a kernel may add them for as long as it likes.
    pub(super) moved: Moved,
    /// Whether no more jobs may be added.
    pub(super) sealed: bool,
    /// Whether the other side is known to be gone.
    pub(super) peer_lost: bool,
}

/// What jobs have moved that are complete and not kept any more.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Moved {
    pub(super) bytes: u64,
    pub(super) rails: RailSet,
}

impl Record {
    /// Keeps of a job that counts what it has moved.
    pub(super) fn fold(&mut self, job: JobId) {
        let Ok(at) = self.jobs.binary_search_by_key(&job, |j| j.job.id) else {
            return;
        };
        let counts = self.jobs.get(at).is_some_and(JobRecord::counts);
        if counts && self.kind.is_begun() {
            let job = self.jobs.remove(at);
            self.moved.bytes += job.job.bytes();
            self.moved.rails |= job.rails;
        }
    }

    /// Whether it has its outcome, or waits for that alone.
    pub(super) fn has_ended(&self) -> bool {
        matches!(self.state, State::Stopping(_) | State::Quarantined(_))
    }

    /// Whether it has any operations.
    pub(super) fn moves(&self) -> bool {
        self.moved.bytes > 0 || self.jobs.iter().any(|j| j.job.ops() > 0)
    }

    pub(super) fn drained(&self) -> bool {
        self.jobs.iter().all(|j| j.progress == Progress::Drained)
    }

    pub(super) fn complete(&self) -> bool {
        self.sealed && self.jobs.iter().all(JobRecord::counts)
    }

    pub(super) fn incomplete(&self) -> Incomplete {
        // A pull's data is worth nothing before its lease was confirmed, however complete it is.
        let all = matches!(self.kind, Kind::Pull { .. });
        let sources = self.jobs.iter().filter(|j| all || !j.counts());
        Incomplete {
            sources: sources.map(|j| Arc::clone(&j.job.source)).collect(),
        }
    }

    pub(super) fn job(&self, job: JobId) -> Option<&JobRecord> {
        let at = self.jobs.binary_search_by_key(&job, |j| j.job.id).ok()?;
        self.jobs.get(at)
    }

    pub(super) fn job_mut(&mut self, job: JobId) -> Option<&mut JobRecord> {
        let at = self.jobs.binary_search_by_key(&job, |j| j.job.id).ok()?;
        self.jobs.get_mut(at)
    }
}
