//! A job: the operations of one submission, shared by the workers that post them.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::{Cause, JobId, PeerKey, TransferId};
use crate::plan::source::OpSource;
use crate::rails::RailSet;
use crate::sync::OnceLock;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::time::Time;

/// Which way a job's bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the peer's memory into local memory.
    Read,
    /// From local memory into the peer's.
    Write,
}

/// The first error of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobError {
    /// Index of the operation it befell.
    pub op: u64,
    /// What happened.
    pub cause: Cause,
}

/// The operations of one submission. Lanes of all workers claim ranges of them from one cursor, so
/// no operation is claimed twice and a slow lane takes fewer.
pub struct Job {
    /// Its name.
    pub id: JobId,
    /// The transfer it is part of.
    pub transfer: TransferId,
    /// The tag of the ledger that owns the transfer: where reports go.
    pub owner: u16,
    /// Whose memory it reads or writes.
    pub peer: PeerKey,
    /// Which way the bytes go.
    pub dir: Direction,
    /// The operations.
    pub source: Arc<dyn OpSource>,
    /// How many schedulers it is started on.
    pub workers: u16,
    ops: u64,
    bytes: u64,
    cursor: AtomicU64,
    /// When the last operation was posted, or 0.
    posted_at: AtomicU64,
    stop: AtomicBool,
    error: OnceLock<JobError>,
}

impl Job {
    /// A job over all of `source`, to be started on `workers` schedulers.
    #[must_use]
    pub fn new(
        id: JobId,
        transfer: TransferId,
        owner: u16,
        peer: PeerKey,
        dir: Direction,
        source: Arc<dyn OpSource>,
        workers: u16,
    ) -> Self {
        let (ops, bytes) = (source.ops(), source.bytes());
        Self {
            id,
            transfer,
            owner,
            peer,
            dir,
            source,
            workers,
            ops,
            bytes,
            cursor: AtomicU64::new(0),
            posted_at: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            error: OnceLock::new(),
        }
    }

    /// How many operations there are.
    #[must_use]
    pub fn ops(&self) -> u64 {
        self.ops
    }

    /// How many bytes they move.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Notes that operations were posted, all having been claimed: the latest time of all workers
    /// stays.
    pub fn note_posted(&self, now: Time) {
        self.posted_at.fetch_max(now.0, Ordering::Relaxed);
    }

    /// When the last operation was posted; the origin before.
    #[must_use]
    pub fn posted_at(&self) -> Time {
        Time(self.posted_at.load(Ordering::Relaxed))
    }

    /// Asks every worker to claim no more. Takes effect at their next claim.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// Whether no more may be claimed because the job was stopped or failed.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// The first error, if one has happened on any worker.
    #[must_use]
    pub fn error(&self) -> Option<&JobError> {
        self.error.get()
    }

    /// Whether all operations have been claimed. Who claims some may yet have to post them.
    #[must_use]
    pub fn exhausted(&self) -> bool {
        self.cursor.load(Ordering::Relaxed) >= self.ops
    }

    /// Claims up to `n` operations, or `None` when none are left.
    ///
    /// Relaxed is enough: the cursor orders nothing but itself, and what the operations say never
    /// changes after the job is shared.
    pub(super) fn claim(&self, n: u64) -> Option<Range<u64>> {
        // The look before the add keeps the cursor from running away on an exhausted job.
        if self.exhausted() {
            return None;
        }
        let start = self.cursor.fetch_add(n, Ordering::Relaxed);
        (start < self.ops).then(|| start..start.saturating_add(n).min(self.ops))
    }

    /// Records `error` unless one is there already, and stops the job: whoever sees it stopped sees
    /// why.
    pub(super) fn fail(&self, error: JobError) {
        let _ = self.error.set(error);
        self.stop();
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job")
            .field("id", &self.id)
            .field("transfer", &self.transfer)
            .field("peer", &self.peer)
            .field("dir", &self.dir)
            .field("ops", &self.ops)
            .field("bytes", &self.bytes)
            .field("cursor", &self.cursor)
            .field("stopped", &self.is_stopped())
            .field("error", &self.error())
            .finish_non_exhaustive()
    }
}

/// What one scheduler has to say of one job since its last report of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobReport {
    /// The job.
    pub job: JobId,
    /// Its transfer.
    pub transfer: TransferId,
    /// The tag of the ledger the report is for.
    pub owner: u16,
    /// Operations confirmed since the last report.
    pub ops_done: u64,
    /// Bytes confirmed since the last report.
    pub bytes_done: u64,
    /// The pairs of rails that have confirmed some of it so far.
    pub rails: RailSet,
    /// The first error of the job on any worker, once this one has seen the job fail.
    pub error: Option<JobError>,
    /// Some of its writes were lost on the way: the device here has let go of them, and the peer may
    /// carry them out yet. So it stays until the peer's queue pairs are down.
    pub in_doubt: bool,
    /// How many more lanes than at the last report have lost writes of it that were posted again elsewhere,
    /// and that the peer may carry out yet; negative when the peer has said of more that it will not.
    pub doubts: i32,
    /// The last report: nothing of the job is posted here, and nothing will be.
    pub quiescent: bool,
}

#[cfg(all(loom, test))]
mod loom_tests {
    use std::sync::Mutex;

    use kvxfer_loom::{model, thread, weak_model};

    use super::*;
    use crate::plan::source::Op;

    struct Three;

    impl OpSource for Three {
        fn ops(&self) -> u64 {
            3
        }

        fn bytes(&self) -> u64 {
            3
        }

        fn emit(&self, _range: Range<u64>, _sink: &mut dyn FnMut(&Op<'_>)) {}

        fn blocks_of(&self, _op: u64, _out: &mut Vec<(u32, u32)>) {}
    }

    fn job() -> Arc<Job> {
        let (id, transfer) = (JobId(1), TransferId(1));
        let source = Arc::new(Three);
        Arc::new(Job::new(
            id,
            transfer,
            0,
            PeerKey(1),
            Direction::Read,
            source,
            2,
        ))
    }

    #[test]
    fn every_operation_is_claimed_once() {
        model(|| {
            let job = job();
            // Not loom's: it is for the test alone.
            let claimed = Arc::new(Mutex::new(Vec::new()));
            let worker = |n| {
                let (job, claimed) = (Arc::clone(&job), Arc::clone(&claimed));
                move || {
                    while let Some(range) = job.claim(n) {
                        claimed.lock().expect("not poisoned").extend(range);
                    }
                }
            };
            let others = [thread::spawn(worker(2)), thread::spawn(worker(1))];
            worker(1)();
            for other in others {
                other.join().expect("done");
            }
            let mut claimed = claimed.lock().expect("not poisoned").clone();
            claimed.sort_unstable();
            assert_eq!(claimed, [0, 1, 2]);
            assert!(job.exhausted());
        });
    }

    fn two_failures() {
        let job = job();
        let failing = [Cause::PeerDead, Cause::LaneReset].map(|cause| {
            let job = Arc::clone(&job);
            thread::spawn(move || job.fail(JobError { op: 1, cause }))
        });
        let seen = job.is_stopped().then(|| job.error().cloned());
        for other in failing {
            other.join().expect("done");
        }
        if let Some(seen) = seen {
            assert!(seen.is_some(), "stopped for no reason");
            assert_eq!(seen.as_ref(), job.error());
        }
        assert!(job.is_stopped());
    }

    #[test]
    fn a_job_that_failed_says_why_and_the_first_cause_stays() {
        model(two_failures);
    }

    #[test]
    #[should_panic(expected = "stopped for no reason")]
    fn planted_stopping_without_order() {
        weak_model(two_failures);
    }
}
