//! What one worker posts where: credits, slots, batches and fairness for its lanes.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

mod config;
mod retire;
mod slot;

pub use config::{BatchSize, PostFailure, SchedulerConfig, SchedulerStats, SingleReport};

use slot::{JobSlot, Peer};

use super::lane::{Failure, Lane, MAX_BATCH, Posted, Use};
use super::{Batch, Cause, Job, JobError, JobId, JobReport, LaneId, LaneLimits, PeerKey};
use crate::rails::RailSet;

/// Decides what one worker posts on which of its lanes, and accounts for it.
///
/// The worker's loop: while [`next_lane`](Self::next_lane) names a lane, fill a batch with
/// [`next_batch`](Self::next_batch) and post it; give every completion to
/// [`complete`](Self::complete); pass what [`poll_report`](Self::poll_report) says to the owner of
/// the transfer. A lane whose queue pair is in the error state is told with
/// [`lane_failed`](Self::lane_failed), and [`lane_flushed`](Self::lane_flushed) or
/// [`remove_lane`](Self::remove_lane) say that the device has let go of everything on it.
///
/// # Whose failure it is
///
/// A completion in error names one work request: its job fails with that cause. What else was
/// posted on the lane is flushed through no fault of its own; it is posted again on the peer's
/// other lanes, or on this one's successor. Flush completions are counted and never reported.
///
/// A flush says only that the device *here* has let go. A READ is over then. A WRITE that was sent
/// may still be carried out by the peer, unless the peer itself has refused what came before it: it is
/// *in doubt*. If the lane has failed [alone](Cause::is_of_one_lane) and is
/// [rebuilt](LaneLimits::rebuilt), such a write is posted again all the same. The lane then has a
/// doubt of that job, of which the reports tell ([`JobReport::doubts`]), until
/// [`lane_settled`](Self::lane_settled) says that the peer carries out nothing of the lane any more.
/// Until then the job is not over: the bytes that may come late are the same as those that were posted
/// again, and nobody else may have the blocks. Otherwise its job fails, and its report says that it is
/// [in doubt](JobReport::in_doubt).
///
/// A peer may have no lane that works for a time: what is to be posted waits for one.
///
/// # Several rails
///
/// While a peer has a lane on another [pair of rails](LaneLimits::pair) that works, a cause
/// [of the path](Cause::is_of_path) fails no job: the request that it was told for goes to the other rail
/// too, and so does a WRITE in doubt.
#[derive(Debug)]
pub struct Scheduler {
    cfg: SchedulerConfig,
    lanes: Vec<Option<Lane>>,
    free_lanes: Vec<u32>,
    lives: u64,
    peers: Vec<Peer>,
    free_peers: Vec<u32>,
    peer_of: HashMap<PeerKey, u32>,
    jobs: Vec<Option<JobSlot>>,
    free_jobs: Vec<u32>,
    job_of: HashMap<JobId, u32>,
    ready: VecDeque<u32>,
    dirty: VecDeque<u32>,
    singles: VecDeque<SingleReport>,
    cq_credits: u32,
    stats: SchedulerStats,
}

impl Scheduler {
    /// A scheduler without lanes.
    #[must_use]
    pub fn new(cfg: SchedulerConfig) -> Self {
        Self {
            cfg,
            lanes: Vec::new(),
            free_lanes: Vec::new(),
            lives: 0,
            peers: Vec::new(),
            free_peers: Vec::new(),
            peer_of: HashMap::new(),
            jobs: Vec::new(),
            free_jobs: Vec::new(),
            job_of: HashMap::new(),
            ready: VecDeque::new(),
            dirty: VecDeque::new(),
            singles: VecDeque::new(),
            cq_credits: cfg.cq_entries,
            stats: SchedulerStats::default(),
        }
    }

    /// What has been counted.
    #[must_use]
    pub fn stats(&self) -> SchedulerStats {
        self.stats
    }

    // ---- lanes -------------------------------------------------------------------------------

    /// Adds a queue pair that can send to `peer`.
    pub fn add_lane(&mut self, peer: PeerKey, limits: LaneLimits) -> LaneId {
        let p = self.peer_slot(peer);
        self.lives += 1;
        let lane = Lane::new(p, self.lives, limits);
        let id = match self.free_lanes.pop() {
            Some(id) => {
                self.lanes[id as usize] = Some(lane);
                id
            }
            None => {
                self.lanes.push(Some(lane));
                index(self.lanes.len() - 1)
            }
        };
        let peer = &mut self.peers[p as usize];
        peer.lanes.push(id);
        peer.live += 1;
        self.make_ready(p);
        LaneId(id)
    }

    /// Forgets a lane whose queue pair has been destroyed: what was posted on it is gone. Completions
    /// that are still found of it are ignored. An unknown lane is ignored.
    pub fn remove_lane(&mut self, lane: LaneId) {
        self.lane_failed(lane, Cause::LaneReset);
        self.lane_flushed(lane);
        let Some(gone) = self.lanes.get_mut(lane.0 as usize).and_then(Option::take) else {
            return;
        };
        for s in gone.doubts {
            // Nobody will say that they are over: they last as long as the peer's queue pairs.
            if let Some(slot) = self.job_mut(s) {
                slot.doubts -= 1;
                slot.in_doubt = true;
            }
            self.settle(s);
        }
        self.free_lanes.push(lane.0);
        self.peers[gone.peer as usize]
            .lanes
            .retain(|l| *l != lane.0);
        self.drop_peer_if_unused(gone.peer);
    }

    /// Says that a lane's queue pair is in the error state, when it was not a completion that told
    /// so. What is posted on it stays accounted until it is flushed. The first cause is kept.
    pub fn lane_failed(&mut self, lane: LaneId, cause: Cause) {
        self.fail_lane(lane.0, cause, false, false);
    }

    /// Says that the device holds nothing of a failed lane's work any more, whether or not each
    /// work request has been seen to complete. Ignored for a lane that has not failed.
    pub fn lane_flushed(&mut self, lane: LaneId) {
        if self.lane(lane.0).is_some_and(|l| l.failure.is_some()) {
            while self.retire_flushed(lane.0, None) {}
        }
    }

    /// Says that the peer has taken its half of a lane down: nothing that was posted on it will be carried
    /// out. That it has lost its way here is not enough. Ignored for a lane that has not failed.
    pub fn lane_settled(&mut self, lane: LaneId) {
        let Some(l) = self.lanes.get_mut(lane.0 as usize).and_then(Option::as_mut) else {
            return;
        };
        let Some(failure) = &mut l.failure else {
            return;
        };
        failure.in_doubt = false;
        for s in std::mem::take(&mut l.doubts) {
            if let Some(slot) = self.job_mut(s) {
                slot.doubts -= 1;
            }
            self.settle(s);
        }
    }

    /// Whether the peer of a lane has a lane on another pair of rails that works.
    #[must_use]
    pub fn lives_elsewhere(&self, lane: LaneId) -> bool {
        self.lane(lane.0).is_some_and(|l| {
            let mut lanes = self.peers[l.peer as usize].lanes.iter();
            lanes.any(|other| {
                self.lane(*other)
                    .is_some_and(|other| other.pair != l.pair && other.failure.is_none())
            })
        })
    }

    /// Whether a request that a lane has failed with, for this reason, is posted again: the way is to blame and
    /// there is another, or the peer has only taken down its half of a queue pair that is rebuilt.
    #[must_use]
    pub fn moves(&self, lane: LaneId, cause: &Cause) -> bool {
        let rebuilt = self.lane(lane.0).is_some_and(|l| l.rebuilt);
        let alone = rebuilt && cause.is_of_one_lane();
        cause.is_of_path() && (alone || self.lives_elsewhere(lane))
    }

    /// Whether what was lost with a lane that has failed goes on, although the peer may carry it out yet: there
    /// is another way, or the lane has failed alone and is rebuilt.
    fn goes_on(&self, lane: u32) -> bool {
        let alone = self.lane(lane).is_some_and(|l| {
            let failure = l.failure.as_ref();
            l.rebuilt && failure.is_some_and(|f| f.cause.is_of_one_lane())
        });
        alone || self.lives_elsewhere(LaneId(lane))
    }

    /// Whether a lane has failed and nothing of it is posted any more: it may be removed, or its
    /// queue pair be reset. True for an unknown lane.
    #[must_use]
    pub fn lane_drained(&self, lane: LaneId) -> bool {
        self.lane(lane.0)
            .is_none_or(|l| l.failure.is_some() && l.posted.is_empty())
    }

    /// Why a lane has failed, if it has.
    #[must_use]
    pub fn lane_failure(&self, lane: LaneId) -> Option<&Cause> {
        self.lane(lane.0)?.failure.as_ref().map(|f| &f.cause)
    }

    /// Free entries of a lane's send queue; 0 for an unknown lane.
    #[must_use]
    pub fn lane_credits(&self, lane: LaneId) -> u32 {
        self.lane(lane.0).map_or(0, |l| l.credits)
    }

    /// The lanes of a peer, failed ones among them.
    pub fn peer_lanes(&self, peer: PeerKey) -> impl Iterator<Item = LaneId> + '_ {
        let lanes = self
            .peer_of
            .get(&peer)
            .map(|p| self.peers[*p as usize].lanes.as_slice());
        lanes.unwrap_or_default().iter().map(|l| LaneId(*l))
    }

    /// The lanes that have something posted of these jobs.
    #[must_use]
    pub fn lanes_of(&self, jobs: &[JobId]) -> Vec<LaneId> {
        let slots: Vec<u32> = jobs
            .iter()
            .filter_map(|job| self.job_of.get(job).copied())
            .collect();
        let is_one =
            |posted: &Posted| matches!(posted.what, Use::Job { slot, .. } if slots.contains(&slot));
        let lanes = self.lanes.iter().enumerate();
        let holds =
            |lane: &Option<Lane>| lane.as_ref().is_some_and(|l| l.posted.iter().any(is_one));
        lanes
            .filter(|(_, lane)| holds(lane))
            .map(|(at, _)| LaneId(index(at)))
            .collect()
    }

    // ---- jobs --------------------------------------------------------------------------------

    /// Begins to post a job. A job that is started twice is ignored the second time.
    pub fn start(&mut self, job: Arc<Job>) {
        if self.job_of.contains_key(&job.id) {
            return;
        }
        let peer = self.peer_slot(job.peer);
        self.prune(peer);
        let mean = (job.bytes() / job.ops().max(1)).max(1);
        let slot = JobSlot {
            peer,
            posted: 0,
            by_bytes: (self.cfg.batch_bytes / mean).max(1),
            replay: Vec::new(),
            ops_done: 0,
            bytes_done: 0,
            rails: RailSet::EMPTY,
            queued: true,
            dirty: false,
            stopped: false,
            error_told: false,
            in_doubt: false,
            doubts: 0,
            doubts_told: 0,
            quiescent: false,
            job,
        };
        let id = slot.job.id;
        let s = match self.free_jobs.pop() {
            Some(s) => {
                self.jobs[s as usize] = Some(slot);
                s
            }
            None => {
                self.jobs.push(Some(slot));
                index(self.jobs.len() - 1)
            }
        };
        self.job_of.insert(id, s);
        self.peers[peer as usize].known += 1;
        self.peers[peer as usize].jobs.push_back(s);
        self.make_ready(peer);
        // A job that was stopped or claimed elsewhere before it came here is over at once.
        self.settle(s);
    }

    /// Posts no more of a job. Its last report comes when nothing of it is posted here; if it has
    /// come already, nothing happens.
    pub fn stop(&mut self, job: JobId) {
        if let Some(&s) = self.job_of.get(&job) {
            if let Some(slot) = self.job_mut(s) {
                slot.stopped = true;
                slot.replay.clear();
            }
            self.settle(s);
        }
    }

    /// What the next job has to say. Reports are merged: one comes when a job has nothing more
    /// posted here, or has failed.
    pub fn poll_report(&mut self) -> Option<JobReport> {
        while let Some(s) = self.dirty.pop_front() {
            let Some(slot) = self.job_mut(s) else {
                continue;
            };
            slot.dirty = false;
            let error = if slot.error_told {
                None
            } else {
                slot.job.error().cloned()
            };
            slot.error_told |= error.is_some();
            // No job has so many lanes.
            let doubts = i32::try_from(slot.doubts).unwrap_or(i32::MAX)
                - i32::try_from(slot.doubts_told).unwrap_or(i32::MAX);
            slot.doubts_told = slot.doubts;
            let report = JobReport {
                job: slot.job.id,
                transfer: slot.job.transfer,
                owner: slot.job.owner,
                ops_done: std::mem::take(&mut slot.ops_done),
                bytes_done: std::mem::take(&mut slot.bytes_done),
                rails: slot.rails,
                error,
                in_doubt: slot.in_doubt,
                doubts,
                quiescent: slot.quiescent,
            };
            if report.quiescent {
                self.job_of.remove(&report.job);
                if let Some(slot) = self.jobs[s as usize].take() {
                    self.free_jobs.push(s);
                    self.peers[slot.peer as usize].known -= 1;
                    self.drop_peer_if_unused(slot.peer);
                }
            }
            let news = report.ops_done > 0 || report.error.is_some() || report.doubts != 0;
            if report.quiescent || news {
                return Some(report);
            }
        }
        None
    }

    /// How many jobs are known here.
    #[must_use]
    pub fn jobs(&self) -> usize {
        self.job_of.len()
    }

    // ---- posting -----------------------------------------------------------------------------

    /// The next lane that [`next_batch`](Self::next_batch) can fill a batch for, peers and their
    /// lanes in turn; `None` when every lane is full, idle or failed.
    pub fn next_lane(&mut self) -> Option<LaneId> {
        if self.cq_credits == 0 {
            return None;
        }
        while let Some(&p) = self.ready.front() {
            match self.pick_lane(p) {
                Some(lane) => {
                    self.ready.rotate_left(1);
                    return Some(LaneId(lane));
                }
                None => {
                    self.peers[p as usize].ready = false;
                    self.ready.pop_front();
                }
            }
        }
        None
    }

    /// Whether a lane could be given a batch now, as far as is known without claiming.
    #[must_use]
    pub fn has_work(&self, lane: LaneId) -> bool {
        self.lane(lane.0).is_some_and(|l| {
            let peer = &self.peers[l.peer as usize];
            l.room() > 0 && self.cq_credits > 0 && !peer.jobs.is_empty() && self.under_cap(peer)
        })
    }

    /// Fills `batch` with the next operations for a lane and takes their credits. False, and
    /// nothing changed, when there are none, or the lane or its peer is full.
    ///
    /// The batch counts as posted: the worker posts it and, if the device does not take it, says so
    /// with [`post_failed`](Self::post_failed) before anything else is done with the lane.
    pub fn next_batch(&mut self, lane: LaneId, batch: &mut Batch) -> bool {
        batch.clear();
        let Some(l) = self.lane(lane.0) else {
            return false;
        };
        let (p, send_wr) = (l.peer, l.send_wr);
        let room = l.room().min(self.cq_credits);
        if room == 0 || !self.under_cap(&self.peers[p as usize]) {
            return false;
        }
        while let Some(s) = self.peers[p as usize].jobs.pop_front() {
            let live = self.peers[p as usize].live;
            let Some(slot) = self.jobs[s as usize].as_mut() else {
                continue;
            };
            let want = match self.cfg.batch {
                BatchSize::Fixed(n) => u64::from(n),
                BatchSize::Auto => {
                    let lanes = u64::from(live.max(1)) * u64::from(slot.job.workers.max(1));
                    slot.job.ops().div_ceil(lanes).min(u64::from(send_wr / 4))
                }
            };
            let want = want
                .min(slot.by_bytes)
                .max(1)
                .min(u64::from(room))
                .min(MAX_BATCH);
            let Some((range, tries)) = slot.claim(want) else {
                slot.queued = false;
                self.settle(s);
                continue;
            };
            let asked = range.end - range.start;
            batch.fill(&slot.job, range.start, asked, self.cfg.batch_bytes);
            let got = batch.len() as u64;
            if got == 0 {
                // A source that breaks its word would otherwise be asked for ever.
                let cause = Cause::LostWork { missing: asked };
                slot.job.fail(JobError {
                    op: range.start,
                    cause,
                });
                slot.queued = false;
                self.settle(s);
                continue;
            }
            if got < asked {
                slot.replay.push((range.start + got..range.end, tries));
            }
            // Lossless: at most `room`.
            #[allow(clippy::cast_possible_truncation)]
            let n = got as u32;
            slot.posted += n;
            let peer = &mut self.peers[p as usize];
            peer.jobs.push_back(s);
            peer.bytes += batch.bytes();
            self.cq_credits -= n;
            self.stats.posted += got;
            let posted = Posted {
                what: Use::Job {
                    slot: s,
                    first_op: range.start,
                    tries,
                },
                n,
                accounted: 0,
                bytes: batch.bytes(),
            };
            if let Some(l) = self.lanes[lane.0 as usize].as_mut() {
                batch.set_first_wr_id(l.push(posted));
            }
            return true;
        }
        false
    }

    /// Takes a credit for one signalled work request of the worker's own (a lease check, a notice)
    /// and gives the id to post it under. `None` when the lane is full, failed or unknown. Its end
    /// comes from [`poll_single`](Self::poll_single).
    pub fn reserve_single(&mut self, lane: LaneId, token: u64) -> Option<u64> {
        let cq = self.cq_credits;
        let l = self.lanes.get_mut(lane.0 as usize)?.as_mut()?;
        if l.failure.is_some() || l.credits == 0 || cq == 0 {
            return None;
        }
        self.cq_credits -= 1;
        Some(l.push(Posted {
            what: Use::Single { token },
            n: 1,
            accounted: 0,
            bytes: 0,
        }))
    }

    /// The next work request of the worker's own that has ended.
    pub fn poll_single(&mut self) -> Option<SingleReport> {
        self.singles.pop_front()
    }

    /// Says that the device took only the first `taken` work requests of the batch (or single) that
    /// was last made for a lane. The first one that it did not take fails its job with `cause`.
    pub fn post_failed(&mut self, lane: LaneId, taken: usize, cause: Cause) -> PostFailure {
        let Some(l) = self.lanes.get_mut(lane.0 as usize).and_then(Option::as_mut) else {
            return PostFailure::LaneKept;
        };
        let Some(mut batch) = l.unpost() else {
            return PostFailure::LaneKept;
        };
        let p = l.peer;
        // Lossless: a batch's length is 32 bits wide.
        #[allow(clippy::cast_possible_truncation)]
        let taken = taken.min(batch.n as usize) as u32;
        let untaken = batch.n - taken;
        if taken > 0 {
            batch.n = taken;
            l.push(batch);
        }
        self.cq_credits += untaken;
        if untaken > 0 {
            match batch.what {
                Use::Job {
                    slot: s, first_op, ..
                } => {
                    let op = first_op + u64::from(taken);
                    if let Some(slot) = self.job_mut(s) {
                        slot.posted -= untaken;
                        slot.job.fail(JobError {
                            op,
                            cause: cause.clone(),
                        });
                        slot.replay.clear();
                    }
                    if taken == 0 {
                        self.release_bytes(p, batch.bytes);
                    }
                    self.settle(s);
                }
                Use::Single { token } => {
                    self.singles.push_back(SingleReport {
                        token,
                        lane,
                        result: Err(cause.clone()),
                    });
                }
            }
        }
        if taken > 0 && untaken > 0 {
            // Not named: batches posted before may still complete well, and what was not taken is not
            // the failure of whoever is flushed.
            self.fail_lane(lane.0, Cause::LaneFailed, false, false);
            return PostFailure::ResetLane;
        }
        self.make_ready(p);
        PostFailure::LaneKept
    }

    // ---- inside ------------------------------------------------------------------------------

    /// Writes of a job were lost with a lane and are posted again on another.
    fn doubt(&mut self, lane: u32, s: u32) {
        let Some(l) = self.lanes.get_mut(lane as usize).and_then(Option::as_mut) else {
            return;
        };
        if l.doubts.contains(&s) {
            return;
        }
        l.doubts.push(s);
        if let Some(slot) = self.job_mut(s) {
            slot.doubts += 1;
        }
    }

    fn lane(&self, lane: u32) -> Option<&Lane> {
        self.lanes.get(lane as usize)?.as_ref()
    }

    fn job_mut(&mut self, s: u32) -> Option<&mut JobSlot> {
        self.jobs.get_mut(s as usize)?.as_mut()
    }

    fn under_cap(&self, peer: &Peer) -> bool {
        peer.bytes == 0 || peer.bytes < self.cfg.peer_bytes
    }

    fn release_bytes(&mut self, p: u32, bytes: u64) {
        let peer = &mut self.peers[p as usize];
        debug_assert!(peer.bytes >= bytes, "bytes in flight below zero");
        peer.bytes = peer.bytes.saturating_sub(bytes);
        self.make_ready(p);
    }

    /// `moved`: the request that was named goes elsewhere.
    fn fail_lane(&mut self, lane: u32, cause: Cause, named: bool, moved: bool) {
        let Some(l) = self.lanes.get_mut(lane as usize).and_then(Option::as_mut) else {
            return;
        };
        match &mut l.failure {
            Some(failure) => {
                failure.named |= named;
                failure.moved |= moved;
                failure.in_doubt &= !cause.stops_responder();
            }
            None => {
                let in_doubt = !cause.stops_responder();
                l.failure = Some(Failure {
                    cause,
                    named,
                    in_doubt,
                    moved,
                });
                self.peers[l.peer as usize].live -= 1;
            }
        }
    }

    /// The next lane in turn of a peer that can take a batch.
    fn pick_lane(&mut self, p: u32) -> Option<u32> {
        let peer = &self.peers[p as usize];
        if peer.jobs.is_empty() || peer.live == 0 || !self.under_cap(peer) {
            return None;
        }
        let count = peer.lanes.len();
        for i in 0..count {
            let at = (peer.next_lane + i) % count;
            let lane = peer.lanes[at];
            if self.lane(lane).is_some_and(|l| l.room() > 0) {
                self.peers[p as usize].next_lane = at + 1;
                return Some(lane);
            }
        }
        None
    }

    fn make_ready(&mut self, p: u32) {
        let peer = &mut self.peers[p as usize];
        if !peer.ready && peer.live > 0 && !peer.jobs.is_empty() {
            peer.ready = true;
            self.ready.push_back(p);
        }
    }

    /// Looks whether a job has something to report, and whether it is over here.
    fn settle(&mut self, s: u32) {
        let Some(slot) = self.jobs[s as usize].as_mut() else {
            return;
        };
        let over = slot.over();
        let failed = !slot.error_told && slot.job.error().is_some();
        let idle = over || (slot.replay.is_empty() && slot.job.exhausted());
        if slot.posted == 0 && slot.doubts == 0 && idle {
            slot.quiescent = true;
        }
        let done = slot.posted == 0 && slot.ops_done > 0;
        let doubts = slot.doubts != slot.doubts_told;
        if !slot.dirty && (slot.quiescent || failed || done || doubts) {
            slot.dirty = true;
            self.dirty.push_back(s);
        }
        if slot.quiescent && slot.queued {
            slot.queued = false;
            let p = slot.peer as usize;
            self.peers[p].jobs.retain(|j| *j != s);
        }
    }

    /// Looks at the jobs next in turn of a peer, and takes out those that other workers have
    /// finished: without a lane of its own nothing else would make this worker look.
    fn prune(&mut self, p: u32) {
        for _ in 0..4 {
            let Some(&s) = self.peers[p as usize].jobs.front() else {
                return;
            };
            self.settle(s);
            if self.peers[p as usize].jobs.front() == Some(&s) {
                return;
            }
        }
    }

    fn peer_slot(&mut self, key: PeerKey) -> u32 {
        if let Some(&p) = self.peer_of.get(&key) {
            return p;
        }
        let peer = Peer {
            key,
            ..Peer::default()
        };
        let p = match self.free_peers.pop() {
            Some(p) => {
                // A freed peer may still stand in the list of ready ones; it keeps its place there.
                let ready = self.peers[p as usize].ready;
                self.peers[p as usize] = Peer { ready, ..peer };
                p
            }
            None => {
                self.peers.push(peer);
                index(self.peers.len() - 1)
            }
        };
        self.peer_of.insert(key, p);
        p
    }

    fn drop_peer_if_unused(&mut self, p: u32) {
        let peer = &self.peers[p as usize];
        if !peer.lanes.is_empty() || peer.known > 0 {
            return;
        }
        if self.peer_of.remove(&peer.key).is_some() {
            self.free_peers.push(p);
        }
    }
}

fn index(n: usize) -> u32 {
    u32::try_from(n).expect("fewer than 2^32 lanes, jobs or peers")
}

#[cfg(test)]
mod tests;
