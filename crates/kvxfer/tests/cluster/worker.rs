//! A worker thread. Its loop has four parts, and anything may happen between two of them: commands,
//! posting, polling, and what follows from it all.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use kvxfer::ids::{Nonce, RequestId};
use kvxfer::plan::source::OpSource;
use kvxfer::rails::RailSet;
use kvxfer::ticket::LeaseRef;
use kvxfer::time::Time;
use kvxfer::transfer::{
    Cause, DrainToken, Job, JobId, JobReport, LaneId, LaneLimits, Notice, Output, PeerKey,
    Scheduler, SchedulerConfig, Spec, TransferId, Transfers, TransfersConfig,
};
use kvxfer::wire::{Message, PushDone};

use super::bug::{Bug, Step, ensure};
use super::completions::rebuilds;
use super::posting::Noticed;
use super::qp::{Cqe, QpState};
use super::world::{World, log};

/// What other threads ask of a worker.
pub(crate) enum Cmd {
    AddLane {
        peer: usize,
        qp: usize,
        /// The queue pair whose number it has now.
        replaces: Option<usize>,
    },
    PeerLost {
        peer: PeerKey,
        cause: Cause,
    },
    DropLanes {
        peer: usize,
    },
    PeerDrained {
        peer: PeerKey,
        token: DrainToken,
    },
    Submit {
        spec: Spec,
        live: Live,
    },
    AddJob {
        id: TransferId,
        source: Arc<dyn OpSource>,
    },
    Ticket {
        id: TransferId,
        nonce: Nonce,
        request: RequestId,
        peer: usize,
    },
    Commit {
        id: TransferId,
    },
    Abort {
        id: TransferId,
    },
    Fail {
        id: TransferId,
        cause: Cause,
    },
    Cancel {
        id: TransferId,
    },
    Start(Arc<Job>),
    Stop(JobId),
    Report(JobReport),
    /// The end of a push is to be told, on a queue pair that this worker has.
    Tell {
        peer: usize,
        done: PushDone,
    },
    /// Lanes that these jobs are posted on are to be taken down.
    ResetLanes {
        jobs: Arc<[JobId]>,
    },
    /// The peer has taken its half of a lane down.
    LaneReset {
        peer: usize,
        qp: usize,
    },
}

/// What a transfer is to the engine that started it.
pub(crate) struct Live {
    pub(crate) peer: usize,
    pub(crate) request: RequestId,
    pub(crate) nonce: Nonce,
    pub(crate) lease: Option<LeaseRef>,
}

#[derive(Debug)]
pub(crate) enum Single {
    Lease { id: TransferId, landing: u32 },
    Notice { peer: usize, done: Box<PushDone> },
}

/// How long a job has waited while others were posted.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Waited {
    pub(crate) batches: u32,
    /// The most jobs and peers there were meanwhile.
    pub(crate) rivals: u32,
}

pub(crate) struct Worker {
    pub(crate) awake: bool,
    /// How often the loop was begun.
    pub(crate) loops: u64,
    phase: u8,
    pub(crate) busy: bool,
    pub(crate) commands: VecDeque<Cmd>,
    pub(crate) cq: VecDeque<Cqe>,
    pub(crate) scheduler: Scheduler,
    pub(crate) transfers: Transfers,
    pub(crate) cq_entries: u32,
    peers: BTreeMap<PeerKey, usize>,
    pub(crate) lanes: BTreeMap<LaneId, usize>,
    dropping: Vec<(usize, Vec<LaneId>)>,
    /// Failed lanes of peers with two rails, until their queue pairs are destroyed; and those whose are, by
    /// peer and queue pair.
    pub(crate) failing: Vec<LaneId>,
    pub(crate) retired: Vec<(PeerKey, usize, LaneId)>,
    /// Peers that have no lane here for now, until when one is waited for, and what the last has failed with.
    pub(crate) laneless: Vec<(usize, Time, Cause)>,
    /// Notices that have gone on a queue pair.
    pub(crate) told: BTreeMap<usize, Vec<PushDone>>,
    /// Ends of pushes that wait for a queue pair that may tell them.
    pub(crate) waiting_notices: VecDeque<(usize, PushDone)>,
    pub(crate) live: BTreeMap<TransferId, Live>,
    pub(crate) waiting_checks: VecDeque<TransferId>,
    pub(crate) retry_at: Option<Time>,
    pub(crate) singles: BTreeMap<u64, Single>,
    pub(crate) next_token: u64,
    /// Jobs that this worker was given, until they are over here.
    pub(crate) waited: HashMap<JobId, (Arc<Job>, Waited)>,
}

impl Worker {
    pub(crate) fn new(scheduler: SchedulerConfig, transfers: TransfersConfig) -> Self {
        Self {
            awake: false,
            loops: 0,
            phase: 0,
            busy: false,
            commands: VecDeque::new(),
            cq: VecDeque::new(),
            cq_entries: scheduler.cq_entries,
            scheduler: Scheduler::new(scheduler),
            transfers: Transfers::new(transfers),
            peers: BTreeMap::new(),
            lanes: BTreeMap::new(),
            dropping: Vec::new(),
            failing: Vec::new(),
            retired: Vec::new(),
            laneless: Vec::new(),
            told: BTreeMap::new(),
            waiting_notices: VecDeque::new(),
            live: BTreeMap::new(),
            waiting_checks: VecDeque::new(),
            retry_at: None,
            singles: BTreeMap::new(),
            next_token: 0,
            waited: HashMap::new(),
        }
    }

    pub(crate) fn what(&self) -> String {
        format!(
            "{} transfers, {} commands, {} completions, {} jobs, {} drops",
            self.transfers.live(),
            self.commands.len(),
            self.cq.len(),
            self.scheduler.jobs(),
            self.dropping.len()
        )
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.transfers.live() == 0
            && self.commands.is_empty()
            && self.cq.is_empty()
            && self.waiting_notices.is_empty()
            && self.scheduler.jobs() == 0
            && self.dropping.is_empty()
            && self.laneless.is_empty()
    }
}

impl World {
    /// Gives a command to a worker.
    pub(crate) fn command(&mut self, life: usize, w: usize, command: Cmd) {
        if self.bug == Bug::CommandLost && self.rng.permille(20) {
            return;
        }
        let worker = &mut self.lives[life].workers[w];
        worker.commands.push_back(command);
        worker.awake = true;
    }

    /// One part of the loop.
    pub(crate) fn worker_phase(&mut self, life: usize, w: usize) -> Step {
        let worker = &mut self.lives[life].workers[w];
        let phase = worker.phase;
        worker.phase = (phase + 1) % 4;
        match phase {
            0 => {
                worker.busy = false;
                worker.loops += 1;
                while let Some((slot, word)) = self.lives[life].late_flips.pop() {
                    self.lives[life].table[slot as usize] = word;
                }
                self.worker_takes_commands(life, w)
            }
            1 => self.worker_posts(life, w),
            2 => self.worker_polls(life, w),
            _ => {
                self.give_up_waiting(life, w);
                self.retire_lanes(life, w)?;
                self.finish_drops(life, w)?;
                self.ledger_rings(life, w);
                self.settle(life, w)?;
                self.check_credits(life, w)?;
                let worker = &mut self.lives[life].workers[w];
                worker.awake = worker.busy || !worker.commands.is_empty() || !worker.cq.is_empty();
                Ok(())
            }
        }
    }

    pub(crate) fn worker_takes_commands(&mut self, life: usize, w: usize) -> Step {
        while let Some(command) = self.lives[life].workers[w].commands.pop_front() {
            self.lives[life].workers[w].busy = true;
            self.worker_does(life, w, command)?;
        }
        Ok(())
    }

    /// The rest of the loop, from wherever it is.
    pub(crate) fn worker_finishes_loop(&mut self, life: usize, w: usize) -> Step {
        loop {
            self.worker_phase(life, w)?;
            let worker = &mut self.lives[life].workers[w];
            if worker.phase == 0 {
                worker.awake = true;
                return Ok(());
            }
        }
    }

    fn ledger_rings(&mut self, life: usize, w: usize) {
        if self.bug == Bug::DeafWorker {
            return;
        }
        let now = self.clock(life);
        let ids: Vec<TransferId> = self.lives[life].workers[w].live.keys().copied().collect();
        for id in ids {
            if self.seen[id.0 as usize].deadline <= now {
                self.give_reason(id, &Cause::DeadlinePassed);
            }
        }
        self.lives[life].workers[w].transfers.on_time(now);
    }

    // ---- commands ----------------------------------------------------------------------------

    fn worker_does(&mut self, life: usize, w: usize, command: Cmd) -> Step {
        let now = self.clock(life);
        match command {
            Cmd::AddLane { peer, qp, replaces } => {
                let key = self.peers[peer].key;
                let worker = &mut self.lives[life].workers[w];
                let of = |(_, old, _): &(PeerKey, usize, LaneId)| Some(*old) == replaces;
                while let Some(at) = worker.retired.iter().position(of) {
                    let (.., lane) = worker.retired.swap_remove(at);
                    worker.scheduler.remove_lane(lane);
                }
                if replaces.is_some() && self.peers[peer].dropping {
                    if self.bug != Bug::SuccessorForgotten {
                        self.qp_destroys(qp)?;
                    }
                    return self.worker_drained(peer);
                }
                let real = self.qps[qp].send_wr;
                let send_wr = real + u32::from(self.bug == Bug::TooManyCredits) * 3;
                let worker = &mut self.lives[life].workers[w];
                let pair = u16::try_from(self.qps[qp].rail).unwrap_or(u16::MAX);
                let rebuilt = rebuilds(self.qps[qp].path);
                let limits = LaneLimits {
                    send_wr,
                    pair,
                    rebuilt,
                };
                worker.laneless.retain(|(of, ..)| *of != peer);
                let lane = worker.scheduler.add_lane(key, limits);
                worker.peers.insert(key, peer);
                worker.lanes.insert(lane, qp);
                self.qps[qp].lane = Some(lane);
                if replaces.is_some() {
                    self.worker_drained(peer)?;
                }
            }
            Cmd::PeerLost { peer, cause } => {
                self.reason_of_peer(life, w, peer, &cause);
                self.lives[life].workers[w]
                    .transfers
                    .peer_lost(now, peer, &cause);
            }
            Cmd::DropLanes { peer } => self.worker_drops_lanes(life, w, peer)?,
            Cmd::PeerDrained { peer, token } => self.lives[life].workers[w]
                .transfers
                .peer_drained(peer, token),
            Cmd::Submit { spec, live } => self.worker_submits(life, w, spec, live)?,
            Cmd::AddJob { id, source } => {
                self.reason_if_late(life, w);
                let worker = &mut self.lives[life].workers[w];
                // The transfer may have ended meanwhile: its outcome has said so.
                let _ = worker.transfers.add_job(now, id, source);
            }
            Cmd::Ticket {
                id,
                nonce,
                request,
                peer,
            } => match self.lives[life].workers[w].live.get_mut(&id) {
                Some(live) => {
                    live.nonce = nonce;
                    self.seen[id.0 as usize].nonce = nonce.0;
                }
                None => self.close_push(peer, &request, nonce),
            },
            Cmd::Commit { id } => {
                self.reason_if_late(life, w);
                let worker = &mut self.lives[life].workers[w];
                if worker.transfers.commit(now, id).is_ok() {
                    self.seen[id.0 as usize].committed = true;
                    if self.bug == Bug::DoneTooSoon && self.rng.permille(300) {
                        let wrote = RailSet::EMPTY;
                        self.notice(life, w, id, Notice::PushDone { wrote })?;
                    }
                }
            }
            Cmd::Abort { id } => {
                let worker = &mut self.lives[life].workers[w];
                if worker.transfers.abort(now, id).is_ok() {
                    self.give_reason(id, &Cause::Aborted);
                }
            }
            Cmd::Fail { id, cause } => {
                let worker = &mut self.lives[life].workers[w];
                if worker.transfers.fail(now, id, cause.clone()).is_ok() {
                    self.give_reason(id, &cause);
                }
            }
            Cmd::Cancel { id } => {
                let worker = &mut self.lives[life].workers[w];
                if worker.transfers.cancel(now, id).is_ok() {
                    self.give_reason(id, &Cause::Cancelled);
                }
            }
            Cmd::Start(job) => {
                let worker = &mut self.lives[life].workers[w];
                let waited = (Arc::clone(&job), Waited::default());
                worker.waited.insert(job.id, waited);
                worker.scheduler.start(job);
            }
            Cmd::Stop(job) => self.lives[life].workers[w].scheduler.stop(job),
            Cmd::Report(report) => self.ledger_hears(life, w, &report)?,
            Cmd::Tell { peer, done } => {
                self.sum.count("notice: on another worker");
                let worker = &mut self.lives[life].workers[w];
                worker.waiting_notices.push_back((peer, done));
            }
            Cmd::ResetLanes { jobs } => self.reset_lanes(life, w, &jobs)?,
            Cmd::LaneReset { peer, qp } => self.lane_reset(life, w, peer, qp)?,
        }
        Ok(())
    }

    fn worker_submits(&mut self, life: usize, w: usize, spec: Spec, live: Live) -> Step {
        let now = self.clock(life);
        let (id, key, deadline) = (spec.id, spec.peer, spec.deadline);
        let peer = live.peer;
        let lost = self.peers[peer].lost.clone();
        if deadline <= now {
            self.reason_if_late(life, w);
            self.give_reason(id, &Cause::DeadlinePassed);
        }
        let worker = &mut self.lives[life].workers[w];
        if lost.is_none() {
            worker.peers.entry(key).or_insert(peer);
        }
        worker.live.insert(id, live);
        let taken = worker.transfers.submit(now, spec);
        ensure!(
            taken.is_ok(),
            Converges,
            "a transfer was not taken: {taken:?}"
        );
        if let Some(cause) = lost {
            // The ledger fails all that it has with that peer.
            self.reason_of_peer(life, w, key, &cause);
            self.lives[life].workers[w]
                .transfers
                .peer_lost(now, key, &cause);
        }
        Ok(())
    }

    fn worker_drops_lanes(&mut self, life: usize, w: usize, peer: usize) -> Step {
        let key = self.peers[peer].key;
        let lanes: Vec<LaneId> = self.lives[life].workers[w]
            .scheduler
            .peer_lanes(key)
            .collect();
        let cause = self.peers[peer].lost.clone().unwrap_or(Cause::LaneReset);
        for lane in &lanes {
            if let Some(&q) = self.lives[life].workers[w].lanes.get(lane)
                && self.bug != Bug::DrainTooSoon
            {
                self.qp_flush(q, None)?;
            }
            self.lives[life].workers[w]
                .scheduler
                .lane_failed(*lane, cause.clone());
        }
        let worker = &mut self.lives[life].workers[w];
        worker.laneless.retain(|(of, ..)| *of != peer);
        worker.dropping.push((peer, lanes));
        Ok(())
    }

    fn finish_drops(&mut self, life: usize, w: usize) -> Step {
        let mut at = 0;
        while let Some((_, lanes)) = self.lives[life].workers[w].dropping.get(at) {
            let scheduler = &self.lives[life].workers[w].scheduler;
            let drained = lanes.iter().all(|lane| scheduler.lane_drained(*lane));
            if !drained && self.bug != Bug::DrainTooSoon {
                at += 1;
                continue;
            }
            let (peer, lanes) = self.lives[life].workers[w].dropping.swap_remove(at);
            for lane in lanes {
                if let Some(q) = self.lives[life].workers[w].lanes.remove(&lane)
                    && self.bug != Bug::DrainTooSoon
                {
                    self.qp_destroys(q)?;
                }
                self.lives[life].workers[w].scheduler.remove_lane(lane);
            }
            let key = self.peers[peer].key;
            let worker = &mut self.lives[life].workers[w];
            worker.retired.retain(|(of, _, _)| *of != key);
            self.lives[life].workers[w].peers.remove(&key);
            self.worker_drained(peer)?;
        }
        Ok(())
    }

    // ---- what follows ------------------------------------------------------------------------

    fn ledger_hears(&mut self, life: usize, w: usize, report: &JobReport) -> Step {
        if let Some(error) = &report.error {
            let name = self.seen[report.transfer.0 as usize].name();
            ensure!(
                !error.cause.is_flush(),
                FirstCause,
                "{name} fails with an echo"
            );
            match self.truth.get(&(life, report.job)) {
                Some((op, cause)) => ensure!(
                    error.op == *op && error.cause == *cause,
                    FirstCause,
                    "{name} fails at operation {} with {}; first was {op} with {cause}",
                    error.op,
                    error.cause
                ),
                // Nobody was named: it went down with a lane, which may have gone with its session.
                None => ensure!(
                    !matches!(error.cause, Cause::Completion { .. } | Cause::Post { .. })
                        || error.cause.is_of_path()
                        || self.lost_for(report.transfer, &error.cause),
                    FirstCause,
                    "{name} fails with {}, which no device has said",
                    error.cause
                ),
            }
            self.give_reason(report.transfer, &error.cause.clone());
        }
        let now = self.clock(life);
        let mut report = report.clone();
        report.in_doubt &= self.bug != Bug::DoubtIgnored;
        if report.doubts > 0 {
            self.sum.count("push: in doubt, and goes on");
        }
        if self.bug == Bug::DoubtIgnored {
            report.doubts = 0;
        }
        // Nobody says of what was lost that it will not come: the session has gone with its lanes.
        self.seen[report.transfer.0 as usize].may_reset |= report.in_doubt;
        log!(
            self,
            "worker {w} of life {life} hears of job {} of transfer {}: {} done, error {:?}, in doubt {}, \
             last word {}",
            report.job.0,
            report.transfer.0,
            report.ops_done,
            report.error,
            report.in_doubt,
            report.quiescent
        );
        self.lives[life].workers[w]
            .transfers
            .job_report(now, &report);
        Ok(())
    }

    pub(crate) fn settle(&mut self, life: usize, w: usize) -> Step {
        loop {
            let mut more = false;
            while let Some(report) = self.lives[life].workers[w].scheduler.poll_report() {
                more = true;
                if report.quiescent {
                    self.lives[life].workers[w].waited.remove(&report.job);
                }
                let owner = usize::from(report.owner);
                if owner == w {
                    self.ledger_hears(life, w, &report)?;
                } else {
                    self.command(life, owner, Cmd::Report(report));
                }
            }
            while let Some(output) = self.lives[life].workers[w].transfers.poll_output() {
                more = true;
                self.output(life, w, output)?;
            }
            if !more {
                return Ok(());
            }
            self.lives[life].workers[w].busy = true;
        }
    }

    fn output(&mut self, life: usize, w: usize, output: Output) -> Step {
        match output {
            Output::StartJob(job) => {
                let Some(live) = self.lives[life].workers[w].live.get(&job.transfer) else {
                    return Ok(());
                };
                let peer = live.peer;
                self.broadcast(life, w, peer, || Cmd::Start(Arc::clone(&job)))
            }
            Output::StopJob { job, peer } => match self.worker_peer(life, w, peer) {
                Some(peer) => self.broadcast(life, w, peer, || Cmd::Stop(job)),
                None => Ok(()),
            },
            // What checksums say is not modelled: they agree.
            Output::Verify { id, .. } => {
                let now = self.clock(life);
                let worker = &mut self.lives[life].workers[w];
                worker.transfers.verified(now, id, Ok(()));
                Ok(())
            }
            Output::CheckLease { id, .. } => {
                self.lives[life].workers[w].waiting_checks.push_back(id);
                Ok(())
            }
            // No kernel asks for blocks here.
            Output::CheckJob { id, .. } => {
                ensure!(false, Session, "a lease of a job of {}", id.0);
                Ok(())
            }
            Output::SendNotice { id, notice, .. } => {
                self.check_notice(life, id, &notice)?;
                if self.bug == Bug::NoticeTwice {
                    self.check_notice(life, id, &notice)?;
                }
                self.notice(life, w, id, notice)
            }
            Output::ResetLanes { id, peer, jobs } => {
                self.sum.count("drained by resets");
                let peer = self.worker_peer(life, w, peer);
                match peer.filter(|peer| self.rebuilds_lanes(*peer)) {
                    Some(peer) => self.broadcast(life, w, peer, || Cmd::ResetLanes {
                        jobs: Arc::clone(&jobs),
                    }),
                    None => {
                        self.lives[life].workers[w].transfers.lanes_stay(id);
                        Ok(())
                    }
                }
            }
            Output::ForceDrain { peer, token } => {
                self.sum.count("drained by force");
                match self.worker_peer(life, w, peer) {
                    Some(peer) => self.peer_drains(peer, w, token),
                    None => {
                        let worker = &mut self.lives[life].workers[w];
                        worker.transfers.peer_drained(peer, token);
                        Ok(())
                    }
                }
            }
            Output::Outcome { id, outcome } => {
                self.on_outcome(life, id, &outcome)?;
                if self.bug == Bug::OutcomeTwice {
                    self.on_outcome(life, id, &outcome)?;
                }
                let tid = id.0 as usize;
                if self.seen[tid].free {
                    self.forget(life, w, id)?;
                }
                Ok(())
            }
            Output::Released { id } => {
                if self.bug == Bug::ReleaseLost {
                    return Ok(());
                }
                self.on_released(life, id)?;
                self.forget(life, w, id)
            }
        }
    }

    /// The transfer is over on this worker.
    fn forget(&mut self, life: usize, w: usize, id: TransferId) -> Step {
        if self.seen[id.0 as usize].push {
            self.push_ended(life, id);
        }
        self.lives[life].workers[w].live.remove(&id);
        Ok(())
    }

    fn worker_peer(&self, life: usize, w: usize, key: PeerKey) -> Option<usize> {
        let worker = &self.lives[life].workers[w];
        let of_live = || worker.live.values().map(|live| live.peer);
        let peer = worker.peers.get(&key).copied();
        peer.or_else(|| of_live().find(|peer| self.peers[*peer].key == key))
    }

    fn broadcast(&mut self, life: usize, w: usize, peer: usize, command: impl Fn() -> Cmd) -> Step {
        for worker in self.peers[peer].workers.clone() {
            if worker == w {
                self.worker_does(life, w, command())?;
            } else {
                self.command(life, worker, command());
            }
        }
        Ok(())
    }

    fn notice(&mut self, life: usize, w: usize, id: TransferId, notice: Notice) -> Step {
        let Some(live) = self.lives[life].workers[w].live.get(&id) else {
            return Ok(());
        };
        let (peer, request, nonce) = (live.peer, live.request.clone(), live.nonce);
        let (notices, rdma) = (self.peers[peer].notices, self.peers[peer].rdma);
        for message in self.notice_messages(peer, &request, nonce, &notice) {
            match message {
                Message::PushDone(done) if rdma => {
                    let worker = &mut self.lives[life].workers[w];
                    worker.waiting_notices.push_back((peer, done));
                }
                Message::PushDone(done) if notices => {
                    if self.post_notice(life, w, peer, &done)? != Noticed::Posted {
                        self.send(peer, done.into());
                    }
                }
                message => self.send(peer, message),
            }
        }
        Ok(())
    }

    fn check_credits(&mut self, life: usize, w: usize) -> Step {
        let worker = &self.lives[life].workers[w];
        for (lane, q) in &worker.lanes {
            let (credits, all) = (worker.scheduler.lane_credits(*lane), self.qps[*q].send_wr);
            ensure!(
                credits <= all || self.bug == Bug::TooManyCredits,
                Credits,
                "{lane} of life {life} has {credits} credits of {all}"
            );
            let idle = self.qps[*q].used == 0 && worker.scheduler.lane_failure(*lane).is_none();
            ensure!(
                !idle || self.qps[*q].state != QpState::Works || credits >= all,
                Credits,
                "{lane} of life {life} has {credits} credits of {all}, and nothing is posted"
            );
        }
        Ok(())
    }
}
