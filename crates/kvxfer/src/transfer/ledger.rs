//! The ledger of the worker that owns transfers: every one ends once, by its deadline, and its
//! memory is released once, when nothing posted can touch it.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

mod drain;

use super::record::{
    Incomplete, JobRecord, Kind, LeaseAnswer, Moved, Notice, Outcome, Output, Progress, Record,
    Spec, State,
};
use super::{Cause, Direction, Job, JobId, JobReport, PeerKey, TransferError, TransferId};
use crate::plan::source::{Op, OpSource};
use crate::rails::RailSet;
use crate::time::Time;

/// The limits of a ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransfersConfig {
    /// The tag that the reports of this ledger's jobs bear; unique in the engine.
    pub owner: u16,
    /// The most transfers whose memory is not yet free.
    pub max_live: usize,
    /// The most jobs of one peer that are started at a time; others wait in order.
    pub jobs_per_peer: usize,
    /// How long the outcome of a transfer that failed or was cancelled waits for its posted work to
    /// drain, so that it can say `Released`; never past its deadline.
    pub settle: Duration,
    /// How long after its outcome a transfer may stay quarantined before the queue pairs that it is on are taken
    /// down.
    pub drain_grace: Duration,
    /// How long those may take to let go of it, before all of its peer's are taken down.
    pub reset_grace: Duration,
}

impl Default for TransfersConfig {
    fn default() -> Self {
        Self {
            owner: 0,
            max_live: 65_536,
            jobs_per_peer: 64,
            settle: Duration::from_millis(100),
            drain_grace: Duration::from_secs(1),
            reset_grace: Duration::from_secs(1),
        }
    }
}

/// What kernels do that write by themselves, as a job.
struct KernelsRun;

impl OpSource for KernelsRun {
    fn ops(&self) -> u64 {
        1
    }

    fn bytes(&self) -> u64 {
        0
    }

    fn emit(&self, _: Range<u64>, _: &mut dyn FnMut(&Op<'_>)) {}

    fn blocks_of(&self, _: u64, _: &mut Vec<(u32, u32)>) {}
}

/// A peer's jobs, from the owner's side.
#[derive(Debug, Default)]
struct PeerJobs {
    started: usize,
    waiting: VecDeque<(TransferId, JobId)>,
    /// The newest drain that was asked for and not answered.
    draining: Option<u64>,
}

/// The transfers that one worker owns.
///
/// Events go in with the time they are handled at; after each, everything that
/// [`poll_output`](Self::poll_output) gives is to be carried out in order. When
/// [`next_timeout`](Self::next_timeout) comes, call [`on_time`](Self::on_time).
///
/// A transfer that fails or is cancelled stops its jobs and waits, up to
/// [`settle`](TransfersConfig::settle) and never past its deadline, for every scheduler to say that
/// nothing of it is posted. Then its outcome says `Released`. If that takes longer, the outcome says
/// `Quarantined` and [`Output::Released`] comes later; if it takes
/// [`drain_grace`](TransfersConfig::drain_grace) more, the queue pairs that it is on are taken down and rebuilt
/// ([`Output::ResetLanes`]), and if that does not bring it back in [`reset_grace`](TransfersConfig::reset_grace), all of the peer's are drained by
/// force. The latter is done at once where writes of it were lost on the way: the peer could carry them out after
/// it was told that the push is closed. Where they were posted again on another rail
/// ([`JobReport::doubts`]), the transfer goes on, and ends well or is stopped only when the peer has taken
/// its half of the lanes down.
#[derive(Debug)]
pub struct Transfers {
    cfg: TransfersConfig,
    records: HashMap<TransferId, Record>,
    timers: BTreeSet<(Time, TransferId)>,
    peers: HashMap<PeerKey, PeerJobs>,
    out: VecDeque<Output>,
    next_job: u64,
    last_token: u64,
    /// What keeps all work that is posted to a peer from moving.
    held_up: HashMap<PeerKey, Cause>,
}

impl Transfers {
    /// An empty ledger.
    #[must_use]
    pub fn new(cfg: TransfersConfig) -> Self {
        Self {
            cfg,
            records: HashMap::new(),
            timers: BTreeSet::new(),
            peers: HashMap::new(),
            out: VecDeque::new(),
            // Ids of different owners never meet.
            next_job: JobId::first_of(cfg.owner).0,
            last_token: 0,
            held_up: HashMap::new(),
        }
    }

    /// How many transfers are not over: running, or ended with their memory quarantined.
    #[must_use]
    pub fn live(&self) -> usize {
        self.records.len()
    }

    /// What of a transfer is not known to have arrived, if it is here.
    pub(crate) fn incomplete(&self, id: TransferId) -> Option<Incomplete> {
        self.records.get(&id).map(Record::incomplete)
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    /// When [`on_time`](Self::on_time) is to be called next.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Time> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// Takes a new transfer. A pull starts, a push waits for jobs, and so do gets. A pull without operations is done
    /// at once.
    ///
    /// # Errors
    ///
    /// [`TransferError::Duplicate`] and [`TransferError::TooMany`]; nothing has changed then.
    pub fn submit(&mut self, now: Time, spec: Spec) -> Result<(), TransferError> {
        let Spec {
            id,
            peer,
            kind,
            verify,
            deadline,
            workers,
        } = spec;
        if self.records.contains_key(&id) {
            return Err(TransferError::Duplicate { id });
        }
        if self.records.len() >= self.cfg.max_live {
            return Err(TransferError::TooMany {
                limit: self.cfg.max_live,
            });
        }
        let source = match &kind {
            Kind::Pull { source, .. } => Some(Arc::clone(source)),
            Kind::Gets { .. } | Kind::Push => None,
        };
        let record = Record {
            peer,
            sealed: source.is_some(),
            kind,
            verify,
            state: State::Active,
            deadline,
            timer: None,
            workers: workers.max(1),
            jobs: Vec::new(),
            moved: Moved::default(),
            peer_lost: false,
        };
        self.records.insert(id, record);
        self.set_timer(id, Some(deadline));
        if deadline <= now {
            if let Some(source) = source {
                self.new_job(id, source, workers.max(1));
            }
            self.on_time(now);
            self.start_waiting(peer);
            return Ok(());
        }
        if let Some(source) = source {
            self.new_job(id, source, workers.max(1));
            self.start_waiting(peer);
            self.advance(id);
        }
        Ok(())
    }

    /// Adds a job (a layer's operations, say) to a push, or to gets.
    ///
    /// # Errors
    ///
    /// [`TransferError::Unknown`], [`NotAPush`](TransferError::NotAPush) for a pull,
    /// [`Committed`](TransferError::Committed) and [`Ended`](TransferError::Ended); nothing has
    /// changed then.
    pub fn add_job(
        &mut self,
        now: Time,
        id: TransferId,
        source: Arc<dyn OpSource>,
    ) -> Result<JobId, TransferError> {
        let workers = self.records.get(&id).map_or(1, |record| record.workers);
        self.add_job_of(now, id, (source, workers))
    }

    /// The same, to be started on so many schedulers.
    ///
    /// # Errors
    ///
    /// As [`add_job`](Self::add_job).
    pub(crate) fn add_job_of(
        &mut self,
        now: Time,
        id: TransferId,
        (source, workers): (Arc<dyn OpSource>, u16),
    ) -> Result<JobId, TransferError> {
        self.on_time(now);
        let peer = self.open(id)?.peer;
        let job = self.new_job(id, source, workers);
        self.start_waiting(peer);
        self.advance(id);
        Ok(job)
    }

    /// Says that from now on kernels write for a push by themselves. They are a job of it that moves nothing: its
    /// report, of one operation, says that they have ended. Until then the push is neither done nor drained, whatever
    /// becomes of its peer's queue pairs.
    ///
    /// # Errors
    ///
    /// As [`add_job`](Self::add_job).
    pub(crate) fn kernels_began(
        &mut self,
        now: Time,
        id: TransferId,
    ) -> Result<JobReport, TransferError> {
        self.on_time(now);
        let (job, owner) = (JobId(self.next_job), self.cfg.owner);
        let record = self.open(id)?;
        let source = Arc::new(KernelsRun);
        let of = Job::new(job, id, owner, record.peer, Direction::Write, source, 1);
        record.jobs.push(JobRecord {
            job: Arc::new(of),
            // It takes no place of one that can go, and waits for none.
            progress: Progress::Started,
            held: true,
            kernels: true,
            unchecked: false,
            ops_done: 0,
            rails: RailSet::EMPTY,
            in_doubt: false,
            doubts: 0,
            quiescent: 0,
        });
        self.next_job += 1;
        Ok(JobReport {
            job,
            transfer: id,
            owner,
            ops_done: 1,
            bytes_done: 0,
            rails: RailSet::EMPTY,
            error: None,
            in_doubt: false,
            doubts: 0,
            quiescent: true,
        })
    }

    /// Says that a push, or gets, have no more jobs: it is done when those it has are.
    ///
    /// # Errors
    ///
    /// As [`add_job`](Self::add_job).
    pub fn commit(&mut self, now: Time, id: TransferId) -> Result<(), TransferError> {
        self.on_time(now);
        self.open(id)?.sealed = true;
        self.advance(id);
        Ok(())
    }

    /// Gives a push up. Its outcome is `Cancelled`, and the other side hears `PushAborted`.
    ///
    /// # Errors
    ///
    /// [`TransferError::Unknown`], [`NotAPush`](TransferError::NotAPush) and
    /// [`Ended`](TransferError::Ended). A committed push can still be aborted.
    pub fn abort(&mut self, now: Time, id: TransferId) -> Result<(), TransferError> {
        if !matches!(self.running(id)?.kind, Kind::Push) {
            return Err(TransferError::NotAPush { id });
        }
        self.stop(now, id, Cause::Aborted, None, true);
        Ok(())
    }

    /// Cancels a transfer. Its outcome is `Cancelled`.
    ///
    /// # Errors
    ///
    /// [`TransferError::Unknown`] and [`TransferError::Ended`].
    pub fn cancel(&mut self, now: Time, id: TransferId) -> Result<(), TransferError> {
        self.running(id)?;
        self.stop(now, id, Cause::Cancelled, None, true);
        Ok(())
    }

    /// Makes a transfer fail for a reason from elsewhere (the consumer revoked, no path is left, the
    /// engine shuts down).
    ///
    /// # Errors
    ///
    /// [`TransferError::Unknown`] and [`TransferError::Ended`].
    pub fn fail(&mut self, now: Time, id: TransferId, cause: Cause) -> Result<(), TransferError> {
        self.running(id)?;
        self.stop(now, id, cause, None, false);
        Ok(())
    }

    /// Says of a job that was just started that its bytes may not move yet: it takes no place of one that can go.
    /// It may be begun later all the same.
    pub(crate) fn held(&mut self, id: TransferId, job: JobId) {
        let Some(record) = self.records.get_mut(&id) else {
            return;
        };
        let peer = record.peer;
        let started = |job: &&mut JobRecord| job.progress == Progress::Started && !job.held;
        if let Some(job) = record.job_mut(job).filter(started) {
            job.held = true;
            self.job_left(peer);
        }
    }

    /// Takes a scheduler's report. Reports of transfers and jobs that are over are ignored.
    pub fn job_report(&mut self, now: Time, report: &JobReport) {
        let id = report.transfer;
        let Some(record) = self.records.get_mut(&id) else {
            return;
        };
        let peer = record.peer;
        let Some(job) = record.job_mut(report.job) else {
            return;
        };
        if job.progress != Progress::Started {
            return;
        }
        job.ops_done += report.ops_done;
        job.rails |= report.rails;
        job.quiescent += u16::from(report.quiescent);
        job.in_doubt |= report.in_doubt;
        job.doubts += report.doubts;
        let over = job.quiescent >= job.job.workers;
        // Every operation is claimed once and confirmed once: all confirmed means none posted,
        // whether or not every scheduler has noticed that yet.
        let drained = job.complete() || over;
        let in_doubt = job.in_doubt;
        let is_here = job.complete() && job.unchecked;
        let leaves = drained && !job.held;
        if drained {
            job.progress = if in_doubt {
                Progress::InDoubt
            } else {
                Progress::Drained
            };
        }
        if drained && !over {
            // One that has no lane left would never look, and keep the job.
            let job = report.job;
            self.out.push_back(Output::StopJob { job, peer });
        }
        let missing = job.job.ops().saturating_sub(job.ops_done);
        if is_here && !record.has_ended() {
            let job = report.job;
            self.out.push_back(Output::CheckJob { id, job, peer });
        }
        if leaves {
            self.job_left(peer);
        }
        match &report.error {
            Some(error) => {
                let at = Some((report.job, error.op));
                self.stop(now, id, error.cause.clone(), at, false);
            }
            None if over && missing > 0 => {
                self.stop(now, id, Cause::LostWork { missing }, None, false);
            }
            // All is confirmed, and what was lost before may come yet: nobody has said that it will not.
            None if over && in_doubt => self.stop(now, id, Cause::LaneReset, None, false),
            None => {}
        }
        if in_doubt {
            self.force_drain(id);
        }
        if report.error.is_none()
            && let Some(record) = self.records.get_mut(&id)
        {
            record.fold(report.job);
        }
        self.advance(id);
    }

    /// The pairs of rails whose lanes have confirmed something of a transfer, as far as it is here.
    pub(crate) fn rails(&self, id: TransferId) -> RailSet {
        let record = self.records.get(&id);
        let jobs = record.iter().flat_map(|record| &record.jobs);
        jobs.fold(RailSet::EMPTY, |all, job| all | job.rails)
    }

    /// The same of one of its jobs.
    pub(crate) fn rails_of(&self, id: TransferId, job: JobId) -> RailSet {
        let job = self.records.get(&id).and_then(|record| record.job(job));
        job.map_or(RailSet::EMPTY, |job| job.rails)
    }

    /// Whether a job that was added to a running transfer counts: all of it is confirmed, and of gets the lease was
    /// live behind it.
    pub(crate) fn counts(&self, id: TransferId, job: JobId) -> bool {
        let record = self.records.get(&id).filter(|r| !r.has_ended());
        record.is_some_and(|record| record.job(job).is_none_or(JobRecord::counts))
    }

    /// Takes what the comparison of checksums has shown, or that those of a push have been told. Ignored
    /// unless it was asked for.
    pub fn verified(&mut self, now: Time, id: TransferId, verdict: Result<(), Cause>) {
        if !self
            .records
            .get(&id)
            .is_some_and(|r| matches!(r.state, State::Verifying))
        {
            return;
        }
        match verdict {
            Ok(()) => self.conclude(id),
            Err(cause) => self.stop(now, id, cause, None, false),
        }
    }

    /// Takes what the read of a lease slot showed. Ignored unless one was asked for.
    pub fn lease_answer(&mut self, now: Time, id: TransferId, answer: LeaseAnswer) {
        if !self
            .records
            .get(&id)
            .is_some_and(|r| matches!(r.state, State::CheckingLease))
        {
            return;
        }
        match answer {
            LeaseAnswer::Live => self.done(id),
            LeaseAnswer::Gone { cause } => self.stop(now, id, cause, None, false),
        }
    }

    /// Takes what the read of a lease slot showed behind the data of one job. Ignored unless that waits for it.
    pub fn job_checked(&mut self, now: Time, id: TransferId, job: JobId, answer: LeaseAnswer) {
        let record = self.records.get_mut(&id).filter(|r| !r.has_ended());
        let Some(record) = record else {
            return;
        };
        let waits = |of: &&mut JobRecord| of.unchecked && of.complete();
        let Some(of) = record.job_mut(job).filter(waits) else {
            return;
        };
        match answer {
            LeaseAnswer::Live => {
                of.unchecked = false;
                record.fold(job);
                self.advance(id);
            }
            LeaseAnswer::Gone { cause } => self.stop(now, id, cause, None, false),
        }
    }

    /// Says what keeps all work that is posted to a peer from moving (a port that is down), or that nothing
    /// does: work that is under way when its deadline passes has failed for that.
    pub fn held_up(&mut self, peer: PeerKey, by: Option<Cause>) {
        match by {
            Some(cause) => self.held_up.insert(peer, cause),
            None => self.held_up.remove(&peer),
        };
    }

    /// Why a transfer is not over by its deadline.
    fn lateness(&self, id: TransferId) -> Cause {
        let under_way = |r: &Record| match r.state {
            State::CheckingLease => true,
            State::Verifying => false,
            _ => r.jobs.iter().any(|j| {
                let moves = matches!(j.progress, Progress::Queued | Progress::Started);
                moves || j.unchecked
            }),
        };
        let record = self.records.get(&id).filter(|r| under_way(r));
        let held_up = record.and_then(|r| self.held_up.get(&r.peer));
        held_up.cloned().unwrap_or(Cause::DeadlinePassed)
    }

    /// Does what is due at `now`.
    pub fn on_time(&mut self, now: Time) {
        while let Some(&(at, id)) = self.timers.first() {
            if at > now {
                return;
            }
            self.set_timer(id, None);
            match self.records.get(&id).map(|r| &r.state) {
                Some(State::Active | State::Verifying | State::CheckingLease) => {
                    let cause = self.lateness(id);
                    self.stop(now, id, cause, None, false);
                }
                Some(State::Stopping(_)) => self.quarantine(now, id),
                Some(State::Quarantined(_)) => self.drain(now, id),
                None => {}
            }
        }
    }

    // ---- inside ------------------------------------------------------------------------------

    fn running(&mut self, id: TransferId) -> Result<&mut Record, TransferError> {
        let record = self
            .records
            .get_mut(&id)
            .ok_or(TransferError::Unknown { id })?;
        match &record.state {
            State::Active | State::Verifying | State::CheckingLease => Ok(record),
            State::Stopping(end) | State::Quarantined(end) => Err(TransferError::Ended {
                id,
                cause: end.cause.clone(),
            }),
        }
    }

    /// One that takes jobs.
    fn open(&mut self, id: TransferId) -> Result<&mut Record, TransferError> {
        let record = self.running(id)?;
        if !record.kind.is_begun() {
            return Err(TransferError::NotAPush { id });
        }
        if record.sealed {
            return Err(TransferError::Committed { id });
        }
        Ok(record)
    }

    fn transfers_of(&self, peer: PeerKey) -> Vec<TransferId> {
        let of_peer = self.records.iter().filter(|(_, r)| r.peer == peer);
        let mut ids: Vec<TransferId> = of_peer.map(|(id, _)| *id).collect();
        // In the order of submission, so that a run can be repeated.
        ids.sort_unstable();
        ids
    }

    /// Makes a job and puts it in its peer's line; one without operations is over already.
    fn new_job(&mut self, id: TransferId, source: Arc<dyn OpSource>, workers: u16) -> JobId {
        let job_id = JobId(self.next_job);
        self.next_job += 1;
        let Some(record) = self.records.get_mut(&id) else {
            return job_id;
        };
        let dir = match record.kind {
            Kind::Pull { .. } | Kind::Gets { .. } => Direction::Read,
            Kind::Push => Direction::Write,
        };
        let job = Job::new(
            job_id,
            id,
            self.cfg.owner,
            record.peer,
            dir,
            source,
            workers,
        );
        let empty = job.ops() == 0;
        if empty && record.kind.is_begun() {
            // It is complete.
            return job_id;
        }
        record.jobs.push(JobRecord {
            job: Arc::new(job),
            progress: if empty {
                Progress::Drained
            } else {
                Progress::Queued
            },
            held: false,
            kernels: false,
            ops_done: 0,
            rails: RailSet::EMPTY,
            in_doubt: false,
            doubts: 0,
            quiescent: 0,
            unchecked: matches!(record.kind, Kind::Gets { .. }),
        });
        if !empty {
            self.peers
                .entry(record.peer)
                .or_default()
                .waiting
                .push_back((id, job_id));
        }
        job_id
    }

    fn start_waiting(&mut self, peer: PeerKey) {
        let Some(p) = self.peers.get_mut(&peer) else {
            return;
        };
        while p.started < self.cfg.jobs_per_peer.max(1) {
            let Some((id, job)) = p.waiting.pop_front() else {
                break;
            };
            let Some(record) = self.records.get_mut(&id) else {
                continue;
            };
            let Some(job) = record.job_mut(job) else {
                continue;
            };
            if job.progress == Progress::Queued {
                job.progress = Progress::Started;
                p.started += 1;
                self.out.push_back(Output::StartJob(Arc::clone(&job.job)));
            }
        }
        self.drop_peer_if_unused(peer);
    }

    /// A started job of a peer is over: the next in line may start.
    fn job_left(&mut self, peer: PeerKey) {
        if let Some(p) = self.peers.get_mut(&peer) {
            p.started = p.started.saturating_sub(1);
        }
        self.start_waiting(peer);
    }

    fn drop_peer_if_unused(&mut self, peer: PeerKey) {
        let unused = |p: &PeerJobs| p.started == 0 && p.waiting.is_empty() && p.draining.is_none();
        if self.peers.get(&peer).is_some_and(unused) {
            self.peers.remove(&peer);
        }
    }

    /// Moves a transfer on if its jobs allow it.
    fn advance(&mut self, id: TransferId) {
        let Some(record) = self.records.get_mut(&id) else {
            return;
        };
        match &record.state {
            State::Active if record.complete() => {
                if record.verify && record.moves() {
                    record.state = State::Verifying;
                    let peer = record.peer;
                    self.out.push_back(Output::Verify { id, peer });
                } else {
                    self.conclude(id);
                }
            }
            State::Stopping(_) if record.drained() => self.stopped(id),
            State::Quarantined(_) if record.drained() => {
                self.set_timer(id, None);
                if let Some(record) = self.records.remove(&id) {
                    self.tell_aborted(id, &record);
                    self.out.push_back(Output::Released { id });
                }
            }
            _ => {}
        }
    }

    /// All data is there, and nothing speaks against it: a pull's lease has the last word.
    fn conclude(&mut self, id: TransferId) {
        let Some(record) = self.records.get_mut(&id) else {
            return;
        };
        let has_lease = matches!(
            record.kind,
            Kind::Pull {
                check_lease: true,
                ..
            }
        );
        if has_lease && record.moves() {
            record.state = State::CheckingLease;
            self.out.push_back(Output::CheckLease {
                id,
                peer: record.peer,
            });
        } else {
            self.done(id);
        }
    }

    fn done(&mut self, id: TransferId) {
        self.set_timer(id, None);
        let Some(record) = self.records.remove(&id) else {
            return;
        };
        let notice = match record.kind {
            Kind::Pull { release: true, .. } | Kind::Gets { release: true } => {
                Some(Notice::Release)
            }
            Kind::Pull { .. } | Kind::Gets { .. } => None,
            Kind::Push => {
                let wrote = record.jobs.iter().map(|j| j.rails);
                let wrote = wrote.fold(record.moved.rails, |all, rails| all | rails);
                Some(Notice::PushDone { wrote })
            }
        };
        if let Some(notice) = notice {
            self.out.push_back(Output::SendNotice {
                id,
                peer: record.peer,
                notice,
            });
        }
        let bytes: u64 = record.jobs.iter().map(|j| j.job.bytes()).sum();
        let bytes = record.moved.bytes + bytes;
        self.out.push_back(Output::Outcome {
            id,
            outcome: Outcome::Done { bytes },
        });
    }

    fn set_timer(&mut self, id: TransferId, at: Option<Time>) {
        let Some(record) = self.records.get_mut(&id) else {
            return;
        };
        if let Some(old) = std::mem::replace(&mut record.timer, at) {
            self.timers.remove(&(old, id));
        }
        if let Some(at) = at {
            self.timers.insert((at, id));
        }
    }
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
