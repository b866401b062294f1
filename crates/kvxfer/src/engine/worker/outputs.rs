//! What the state machines ask for, and how transfers end.

use std::collections::hash_map::Entry;
use std::sync::Arc;

use super::fetches::is_of_portion;
use super::posting::Noticed;
use super::{Command, Live, Worker};
use crate::blocks::GroupBlocks;
use crate::engine::gpu::cause;
use crate::engine::handle::{Failure, Outcome};
use crate::engine::moves::Moves;
use crate::engine::peer_session::PeerSession;
use crate::engine::verify::Verdict;
use crate::event::MemoryState;
use crate::time::Time;
use crate::transfer::{
    self, Cause, Direction, DrainToken, GpuOperation, Incomplete, Job, JobId, JobReport, Notice,
    Output, PeerKey, TransferId,
};
use crate::wire::{Message, PushDone};

impl Worker {
    pub(super) fn settle(&mut self) -> bool {
        let mut any = false;
        loop {
            let mut more = false;
            while let Some(report) = self.scheduler.poll_report() {
                more = true;
                if report.owner == self.index {
                    self.reported(&report);
                } else if let Some(owner) = self.others.get(usize::from(report.owner)) {
                    owner.send(Command::Report(report));
                }
            }
            while let Some(output) = self.transfers.poll_output() {
                more = true;
                self.output(output);
            }
            if !more {
                return any;
            }
            any = true;
        }
    }

    /// What a worker has done of a job that this one has begun.
    pub(super) fn reported(&mut self, report: &JobReport) {
        match is_of_portion(report.job) {
            true => self.portion_read(report),
            false => self.job_report(report),
        }
    }

    fn output(&mut self, output: Output) {
        match output {
            Output::StartJob(job) => self.start(job),
            Output::StopJob { job, peer } => self.stop_job(peer, job),
            Output::Verify { id, .. } => self.verify_pull(id),
            Output::CheckLease { id, .. } => self.check_lease(id),
            Output::CheckJob { id, job, .. } => self.check_job(id, job),
            Output::SendNotice { id, notice, .. } => self.notice(id, notice),
            Output::ResetLanes { id, peer, jobs } => self.reset_lanes_of(id, peer, &jobs),
            Output::ForceDrain { peer, token } => self.force_drain(peer, token),
            Output::Outcome { id, outcome } => self.outcome(id, outcome),
            Output::Released { id } => self.released(id),
        }
    }

    fn start(&mut self, job: Arc<Job>) {
        if let Some(live) = self.live.get_mut(&job.transfer) {
            live.jobs.push(Arc::clone(&job));
        }
        if !self.hold(&job) {
            self.begin(job);
        }
    }

    /// A job's bytes may move.
    pub(super) fn begin(&mut self, job: Arc<Job>) {
        let Some(live) = self.live.get(&job.transfer) else {
            return;
        };
        let peer = Arc::clone(&live.peer);
        if Moves::of(&*job.source).is_some_and(|moves| moves.is_there) {
            self.job_over(&job, None, true);
        } else if peer.has_whole_jobs() {
            self.begin_gather(peer, job);
        } else if job.dir != Direction::Write || !self.hold_for_release(&job) {
            self.begin_on_lanes(&job);
        }
    }

    pub(super) fn begin_on_lanes(&mut self, job: &Arc<Job>) {
        let Some(live) = self.live.get(&job.transfer) else {
            return;
        };
        let peer = Arc::clone(&live.peer);
        if usize::from(job.workers) < peer.workers.len() {
            // For this one alone, which has lanes too.
            self.command(Command::Start(Arc::clone(job)));
        } else {
            self.broadcast(&peer, || Command::Start(Arc::clone(job)));
        }
    }

    fn stop_job(&mut self, key: PeerKey, job: JobId) {
        if self.stop_kernels(job) || self.stop_gather(job) {
            return;
        }
        if let Some(peer) = self.peer(key) {
            self.broadcast(&peer, || Command::Stop(job));
        }
    }

    /// The peer of some transfer here, also when this worker's lanes to it are gone: other workers
    /// may have theirs still.
    fn peer(&self, key: PeerKey) -> Option<Arc<PeerSession>> {
        let of_live = || self.live.values().map(|live| &live.peer);
        let peer = self.peers.get(&key);
        peer.or_else(|| of_live().find(|peer| peer.key == key))
            .map(Arc::clone)
    }

    pub(super) fn broadcast(&mut self, peer: &PeerSession, command: impl Fn() -> Command) {
        for &worker in &peer.workers {
            if worker == self.index {
                self.command(command());
            } else if let Some(other) = self.others.get(usize::from(worker)) {
                other.send(command());
            }
        }
    }

    /// Takes the queue pairs down, on all workers, that jobs of a transfer are posted on.
    fn reset_lanes_of(&mut self, id: TransferId, key: PeerKey, jobs: &Arc<[JobId]>) {
        // Where nothing moves no successor would.
        let holds_up = self.port_that_holds_up(key).is_some();
        match self
            .peer(key)
            .filter(|peer| peer.rebuilds_lanes() && !holds_up)
        {
            Some(peer) => self.broadcast(&peer, || Command::ResetLanes {
                peer: key,
                jobs: Arc::clone(jobs),
            }),
            None => self.transfers.lanes_stay(id),
        }
    }

    fn force_drain(&mut self, key: PeerKey, token: DrainToken) {
        match self.peer(key) {
            Some(peer) => {
                // Whose work does not drain because nothing moves loses its session for that.
                if let Some(cause) = self.port_that_holds_up(key) {
                    peer.fail(cause);
                }
                peer.drain(self.index, token);
            }
            // No lanes to it, and no transfers with it.
            None => self.transfers.peer_drained(key, token),
        }
    }

    pub(super) fn verify(&mut self, id: TransferId) {
        let own = self.others.get(usize::from(self.index));
        if let (Some(live), Some(own)) = (self.live.get(&id), own) {
            live.engine.runtime.verifier.begin(id, live, own);
        }
    }

    pub(super) fn verified(&mut self, now: Time, id: TransferId, verdict: Verdict) {
        let verify = self.live.get_mut(&id).and_then(|live| live.verify.as_mut());
        let verdict = match verdict {
            Ok(sums) => {
                if let Some(verify) = verify {
                    verify.told = sums;
                }
                Ok(())
            }
            Err(unverified) => {
                if let Some(verify) = verify {
                    verify.differing = unverified.blocks;
                }
                Err(unverified.cause)
            }
        };
        self.transfers.verified(now, id, verdict);
    }

    fn notice(&mut self, id: TransferId, notice: Notice) {
        if matches!(notice, Notice::PushDone { .. }) {
            self.tell_the_last(id);
        }
        let Some(live) = self.live.get(&id) else {
            return;
        };
        let peer = Arc::clone(&live.peer);
        // On the data plane its end would overtake what is told before.
        let on_data_plane = peer.notices && !live.tells;
        for message in live.engine.notice(live, &notice) {
            match message {
                Message::PushDone(done) if on_data_plane => self.tell_done(&peer, done, id),
                message => peer.link.send(message),
            }
        }
    }

    /// Tells the end of a push on a queue pair. What cannot go there goes by the control connection, but
    /// over RDMA it waits.
    fn tell_done(&mut self, peer: &Arc<PeerSession>, done: PushDone, id: TransferId) {
        let on_data_plane = peer.is_rdma() || self.post_notice(peer, &done) == Noticed::Posted;
        if let Some(live) = self.live.get_mut(&id).filter(|_| on_data_plane) {
            live.report.data_plane_notice = true;
            peer.untold.add();
        }
        match (peer.is_rdma(), on_data_plane) {
            (true, _) => self.waiting_notices.push_back((Arc::clone(peer), done)),
            (false, true) => {}
            (false, false) => peer.link.send(done.into()),
        }
    }

    pub(super) fn outcome(&mut self, id: TransferId, outcome: transfer::Outcome) {
        let Some(live) = self.live.get_mut(&id) else {
            return;
        };
        // A push leaves its own blocks as they were; the consumer hears of its own.
        let differing = live.verify.as_ref().map(|verify| &verify.differing);
        let invalid = |incomplete: &Incomplete| match differing {
            _ if live.push => Vec::new(),
            // All others are known to be right.
            Some(blocks) if !blocks.is_empty() => by_group(blocks),
            _ => live
                .into
                .clone()
                .unwrap_or_else(|| by_group(&incomplete.blocks())),
        };
        let outcome = match outcome {
            transfer::Outcome::Done { .. } => live.fenced(),
            transfer::Outcome::Failed {
                cause,
                incomplete,
                memory,
                ..
            } => Outcome::Failed(Failure {
                first_cause: cause,
                invalid_blocks: invalid(&incomplete),
                memory,
            }),
            transfer::Outcome::Cancelled { memory, incomplete } => Outcome::Failed(Failure {
                first_cause: Cause::Cancelled,
                invalid_blocks: invalid(&incomplete),
                memory,
            }),
        };
        self.end(id, outcome);
    }

    /// Tells the outcome, and forgets the transfer unless its memory is still to be released.
    pub(super) fn end(&mut self, id: TransferId, outcome: Outcome) {
        let now = self.clock.now();
        self.end_queues(id, &outcome);
        let Some(live) = self.live.get_mut(&id) else {
            return;
        };
        live.report.wire = now.since(live.submitted);
        let posted = live
            .jobs
            .iter()
            .map(|job| job.posted_at())
            .max()
            .unwrap_or(live.submitted);
        live.report.post = posted.since(live.submitted).max(live.report.post);
        let quarantined =
            outcome.failure().map(|failure| failure.memory) == Some(MemoryState::Quarantined);
        // Before anybody hears: whoever does may use the blocks, or begin the request's next push.
        if !quarantined {
            live.claim = None;
        }
        if live.push && !quarantined {
            live.engine.push_ended(id);
        }
        if live.verify.is_some() {
            live.engine.runtime.verifier.forget(id);
        }
        live.finish(outcome);
        if let Entry::Occupied(mut running) = self.running.entry(live.peer.key) {
            *running.get_mut() -= 1;
            if *running.get() == 0 {
                running.remove();
            }
        }
        if !quarantined {
            self.live.remove(&id);
        }
    }

    pub(super) fn released(&mut self, id: TransferId) {
        self.close_queues(id);
        if let Some(live) = self.live.get_mut(&id) {
            live.claim = None;
            if live.push {
                live.engine.push_ended(id);
            }
            live.free();
        }
        self.live.remove(&id);
    }
}

impl Live {
    /// The outcome of a transfer that is done: with the fence on the stream of who reads what has come.
    fn fenced(&self) -> Outcome {
        let (Some(stream), Some(gpu)) = (&self.reader, &self.engine.gpu) else {
            return Outcome::Done;
        };
        match self.told.shared().put_fence(|| gpu.acquire(stream)) {
            Ok(()) => Outcome::Done,
            Err(error) => Outcome::Failed(Failure {
                first_cause: cause(GpuOperation::Fence, &error),
                invalid_blocks: self
                    .into
                    .clone()
                    .unwrap_or_else(|| by_group(&Incomplete::all_of(&self.jobs).blocks())),
                memory: MemoryState::Released,
            }),
        }
    }
}

/// Sorted (group, block) pairs as one list a group.
pub(super) fn by_group(blocks: &[(u32, u32)]) -> Vec<GroupBlocks> {
    blocks
        .chunk_by(|a, b| a.0 == b.0)
        .filter_map(|chunk| {
            let group = chunk.first()?.0;
            Some(GroupBlocks {
                group,
                blocks: chunk.iter().map(|(_, block)| *block).collect(),
            })
        })
        .collect()
}
