//! A worker thread: it owns queue pairs (lanes) and transfers, and drives the state machines of
//! [`crate::transfer`] over them.

mod async_events;
mod completions;
mod drops;
mod fetches;
mod gathers;
mod kernel_queue;
mod links;
mod outputs;
mod posting;
mod queues;
mod rails;
mod stages;
mod visible;
mod wreck;

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};
use nix::poll::PollFlags;
use tracing::{debug, error, warn};

use kvxfer_verbs::{Completion, CompletionQueue, QueuePair, Rts, SendChain, Sge};

use super::async_events::{AsyncEvents, Port, Watched};
use super::bringup::is_rebuilt;
use super::gpu::Taking;
use super::handle::{Failure, Outcome, TransferReport};
use super::health::Health;
use super::joint::Told;
use super::moves::Moves;
use super::notices::{Inbox, Outbox};
use super::peer_session::{ClosedPush, PeerSession};
use super::push::close;
use super::rail::Rail;
use super::verify::{Verdict, Verification};
use super::wake::Wake;
use super::{Clock, Inner};
use crate::blocks::GroupBlocks;
use crate::claims::Claim;
use crate::error::Error;
use crate::event::MemoryState;
use crate::ids::{Nonce, RequestId};
use crate::mem::gpu::Stream;
use crate::ticket::{LeaseRef, Ticket};
use crate::time::Time;
use crate::transfer::{
    Batch, Cause, DrainToken, Job, JobId, JobReport, LaneId, LaneLimits, PeerKey, Refusal,
    Scheduler, SchedulerConfig, Spec, TransferId, Transfers, TransfersConfig,
};
use crate::wire::{PushDone, Staged};
pub(crate) use completions::errno_of;
use drops::Undead;
use gathers::Gathers;
pub(crate) use gathers::MOST_RUNNING;
pub(crate) use kernel_queue::{KernelQueue, Served};
pub(crate) use queues::QueueOrder;
use rails::{Laneless, Retired};
pub(crate) use stages::ToStage;
use visible::Visible;
use wreck::Wreck;

/// How long a lease check waits for a free credit or landing slot before it looks again.
const RETRY: Duration = Duration::from_millis(1);

/// What a transfer is to the engine that started it.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) engine: Arc<Inner>,
    pub(crate) peer: Arc<PeerSession>,
    pub(crate) told: Told,
    pub(crate) request: RequestId,
    pub(crate) nonce: Nonce,
    pub(crate) tag: u64,
    /// The lease to look at after the last byte; a pull's.
    pub(crate) lease: Option<LeaseRef>,
    pub(crate) push: bool,
    pub(crate) submitted: Time,
    /// What it has been split into.
    pub(crate) jobs: Vec<Arc<Job>>,
    pub(crate) report: TransferReport,
    /// Its checksums, if they are to be compared or told.
    pub(crate) verify: Option<Verification>,
    /// A pull's destination blocks, until they are the owner's again.
    pub(crate) claim: Option<Claim>,
    /// The stream that the fence goes on, of who reads what a pull has brought.
    pub(crate) reader: Option<Stream>,
    /// Whether the consumer of a push has been told immediates.
    pub(crate) tells: bool,
    /// The destinations of a pull whose blocks are asked for one by one. What of them has come kernels know; if it
    /// fails none is known to be whole.
    pub(crate) into: Option<Vec<GroupBlocks>>,
}

/// What other threads ask of a worker.
#[derive(Debug)]
pub(crate) enum Command {
    /// A queue pair to a peer.
    AddLane {
        peer: Arc<PeerSession>,
        lane: Box<Joined>,
        send_wr: u32,
    },
    /// The peer is gone: its transfers fail.
    PeerLost {
        peer: Arc<PeerSession>,
        cause: Cause,
    },
    /// Take the peer's queue pairs down, and say so to the peer when nothing moves on them.
    DropLanes { peer: Arc<PeerSession> },
    /// Nothing posted to the peer can touch memory any more; answers a drain.
    PeerDrained { peer: PeerKey, token: DrainToken },
    /// A new transfer, owned by this worker.
    Submit { spec: Spec, live: Box<Live> },
    /// More operations of a push.
    AddJob {
        id: TransferId,
        source: Moves,
        runs: u64,
        prepare: Duration,
    },
    /// The consumer's ticket for a push has come.
    Ticket {
        id: TransferId,
        ticket: Arc<Ticket>,
        peer: Arc<PeerSession>,
    },
    /// Something about queues that kernels post to.
    Queue(QueueOrder),
    /// What has become of a transfer's checksums.
    Verified { id: TransferId, verdict: Verdict },
    /// A push has all its operations.
    Commit { id: TransferId },
    /// The producer gives its push up.
    Abort { id: TransferId },
    /// The transfer is to fail for this reason.
    Fail { id: TransferId, cause: Cause },
    /// The engine wants the transfer no more.
    Cancel { id: TransferId },
    /// Another worker's transfer has work for this one's lanes.
    Start(Arc<Job>),
    /// And no more of it.
    Stop(JobId),
    /// What another worker has done of one of this one's jobs.
    Report(JobReport),
    /// A rail does not lead to the peer any more, as another worker has seen: its lanes are to fail.
    SetAside {
        peer: Arc<PeerSession>,
        pair: usize,
        cause: Cause,
    },
    /// The end of a push is to be told, on a queue pair that this worker has.
    Tell {
        peer: Arc<PeerSession>,
        done: PushDone,
    },
    /// Lanes are to be taken down that these jobs are posted on, and that are rebuilt.
    ResetLanes { peer: PeerKey, jobs: Arc<[JobId]> },
    /// The peer has taken its half of a lane down.
    LaneReset { peer: Arc<PeerSession>, number: u16 },
    /// A producer wants blocks of its push fetched out of its GPU.
    Take {
        peer: Arc<PeerSession>,
        taking: Box<Taking>,
    },
    /// A producer has given a push up, and writes nothing more of it.
    PushClosed(ClosedPush),
    /// And no more of them.
    TakeStop { peer: Arc<PeerSession>, number: u64 },
    /// A consumer has fetched the blocks of a job, or why not.
    Taken {
        peer: Arc<PeerSession>,
        job: JobId,
        failed: Option<Cause>,
    },
    /// A peer wants stretches of a GPU's memory staged.
    Stage {
        peer: Arc<PeerSession>,
        staging: Box<ToStage>,
    },
    /// And reads them no more.
    StageFree { peer: Arc<PeerSession>, number: u64 },
    /// A peer has staged what was asked for, or why not.
    Staged {
        peer: Arc<PeerSession>,
        staged: Box<Staged>,
        failed: Option<Cause>,
    },
    /// The device has told something that matters: look what it is.
    AsyncEvents,
    /// End the thread.
    Shutdown,
    /// Every queue pair goes to the error state by itself.
    #[cfg(test)]
    FailLanes,
    /// Panic, as a defect would have it.
    #[cfg(test)]
    Panic,
    /// The same as in the middle of a look at queues: they are gone then.
    #[cfg(test)]
    PanicLooking,
}

/// How other threads reach a worker.
#[derive(Debug, Clone)]
pub(crate) struct WorkerHandle {
    commands: Sender<Command>,
    wake: Arc<Wake>,
}

impl WorkerHandle {
    pub(crate) fn send(&self, command: Command) {
        // A worker that has ended has ended its transfers; there is nobody left to tell.
        if self.commands.send(command).is_ok() {
            self.wake.wake();
        }
    }
}

/// The ends of a worker before its thread runs.
#[derive(Debug)]
pub(crate) struct Seat {
    index: u16,
    clock: Clock,
    pub(crate) handle: WorkerHandle,
    commands: Receiver<Command>,
}

impl Seat {
    pub(crate) fn new(index: u16, clock: Clock) -> Result<Self, Error> {
        let (sender, commands) = unbounded();
        let wake = Arc::new(Wake::new()?);
        let handle = WorkerHandle {
            commands: sender,
            wake,
        };
        Ok(Self {
            index,
            clock,
            handle,
            commands,
        })
    }
}

/// A queue pair that is ready to send.
#[derive(Debug)]
pub(crate) struct Joined {
    /// The rail it is on, and the worker that has its completions.
    pub(crate) rail: usize,
    pub(crate) worker: u16,
    /// The pair of rails that it joins, as the peer's session numbers them.
    pub(crate) pair: usize,
    /// Its number in the session, which both sides know it by.
    pub(crate) number: u16,
    pub(crate) qp: QueuePair<Rts>,
    /// Its receives, if the peer sends notices on it.
    pub(crate) inbox: Option<Inbox>,
    pub(crate) watched: Arc<Watched>,
    /// How long its requests are tried; `None`: for ever.
    pub(crate) tried: Option<Duration>,
    /// Whether it succeeds another in a session that stands.
    pub(crate) rebuilt: bool,
}

/// What a worker has of a rail.
#[derive(Debug)]
struct WorkerRail {
    events: Arc<AsyncEvents>,
    cq: CompletionQueue,
    port: Port,
}

/// A queue pair on this worker.
#[derive(Debug)]
struct LaneQp {
    /// The rail it is on.
    rail: usize,
    /// The pair of rails that it joins, as its peer's session numbers them.
    pair: usize,
    /// Its number in the session.
    number: u16,
    qp: QueuePair<Rts>,
    /// Where the peer's notices land, if it sends any.
    inbox: Option<Inbox>,
    /// What the device tells of it.
    watched: Arc<Watched>,
    /// How long a request of it has been tried when it fails.
    tried: Duration,
    /// The last notices that have gone on it: the peer may have lost them with its half of the lane.
    told: VecDeque<PushDone>,
    /// The peer has taken its half down: what it is told on it, it does not see.
    reset: bool,
    peer: Arc<PeerSession>,
}

/// A lease that is to be read: behind all data of a pull, or behind that of one job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Check {
    id: TransferId,
    job: Option<JobId>,
}

/// A work request of the worker's own that is under way.
#[derive(Debug)]
enum Single {
    /// The read of a producer's lease slot, and where it lands.
    Lease {
        check: Check,
        /// Whose landing slot it is; the transfer may be forgotten before the check comes back.
        engine: Arc<Inner>,
        landing: u32,
    },
    /// A notice, which goes by the control connection if it fails.
    Notice {
        slot: u32,
        peer: Arc<PeerSession>,
        done: Box<PushDone>,
    },
}

pub(crate) struct Worker {
    index: u16,
    clock: Clock,
    /// As the runtime numbers them.
    rails: Vec<WorkerRail>,
    seen: async_events::Seen,
    health: Arc<Health>,
    commands: Receiver<Command>,
    wake: Arc<Wake>,
    others: Vec<WorkerHandle>,
    scheduler: Scheduler,
    transfers: Transfers,
    /// Peers with lanes or transfers here.
    peers: HashMap<PeerKey, Arc<PeerSession>>,
    lanes: HashMap<LaneId, LaneQp>,
    /// By their rail and the device's number for them.
    lane_of: HashMap<(usize, u32), LaneId>,
    dropping: Vec<(Arc<PeerSession>, Vec<LaneId>)>,
    /// Lanes that have failed under sessions that go on, until their queue pairs are destroyed; those whose queue
    /// pairs are, until they are succeeded or the session ends; and peers that have no lane here for now.
    failing: Vec<LaneId>,
    retired: Vec<Retired>,
    laneless: Vec<Laneless>,
    /// Lanes whose queue pairs the device has not destroyed: they may go on until it is closed, so their
    /// sessions are never drained.
    undead: HashMap<LaneId, Undead>,
    /// Peers whose sessions are over, until all outcomes of their transfers are told.
    lost: Vec<Arc<PeerSession>>,
    /// How many transfers of a peer have no outcome.
    running: HashMap<PeerKey, usize>,
    live: HashMap<TransferId, Box<Live>>,
    waiting_checks: VecDeque<Check>,
    /// Ends of pushes over RDMA that wait for a queue pair that may tell them.
    waiting_notices: VecDeque<(Arc<PeerSession>, PushDone)>,
    singles: HashMap<u64, Single>,
    gathers: Gathers,
    visible: Visible,
    /// What kernels post to, of pushes that this worker owns or has owned.
    queues: Vec<KernelQueue>,
    /// The pushes whose kernels write by themselves, with how many of their queues: apart from these, which a panic may
    /// take along.
    writing: HashMap<TransferId, usize>,
    outbox: Outbox,
    next_token: u64,
    batch: Batch,
    chain: SendChain,
    sges: Vec<Sge>,
    completions: Vec<Completion>,
    stopping: bool,
}

impl Worker {
    pub(crate) fn new(
        seat: Seat,
        rails: &[Rail],
        health: Arc<Health>,
        others: Vec<WorkerHandle>,
        outbox: Outbox,
        scheduler: SchedulerConfig,
        transfers: TransfersConfig,
    ) -> Self {
        let own = |rail: &Rail| {
            let events = Arc::clone(&rail.events);
            Some(WorkerRail {
                cq: events.cq(seat.index)?.cq,
                port: Port::default(),
                events,
            })
        };
        Self {
            index: seat.index,
            clock: seat.clock,
            rails: rails.iter().filter_map(own).collect(),
            seen: async_events::Seen::default(),
            health,
            commands: seat.commands,
            wake: seat.handle.wake,
            others,
            scheduler: Scheduler::new(scheduler),
            transfers: Transfers::new(transfers),
            peers: HashMap::new(),
            lanes: HashMap::new(),
            lane_of: HashMap::new(),
            dropping: Vec::new(),
            failing: Vec::new(),
            retired: Vec::new(),
            laneless: Vec::new(),
            undead: HashMap::new(),
            lost: Vec::new(),
            running: HashMap::new(),
            live: HashMap::new(),
            waiting_checks: VecDeque::new(),
            waiting_notices: VecDeque::new(),
            singles: HashMap::new(),
            gathers: Gathers::default(),
            visible: Visible::default(),
            queues: Vec::new(),
            writing: HashMap::new(),
            outbox,
            next_token: 0,
            batch: Batch::new(),
            chain: SendChain::new(),
            sges: Vec::new(),
            completions: Vec::with_capacity(completions::POLL_BATCH),
            stopping: false,
        }
    }

    /// The thread's body; returns after [`Command::Shutdown`], with the transfers that are to be
    /// dropped when all workers have ended: until then their memory may be touched.
    pub(crate) fn run(mut self) -> Vec<Live> {
        // What may be in disorder after a panic is not looked at again, but for what `Wreck` says.
        if catch_unwind(AssertUnwindSafe(|| self.work())).is_err() {
            return Wreck::run(self);
        }
        let touched = self.gathers.end();
        let kernels = self.with_kernels();
        self.queues.clear();
        self.lanes.clear();
        let mut over = Vec::new();
        for (id, live) in self.live.drain() {
            match touched.contains(&live.peer.key) || kernels.contains(&id) {
                true => live.never_over(),
                false => over.push(*live),
            }
        }
        over
    }

    fn work(&mut self) {
        while !self.stopping {
            self.look_for_events();
            let mut busy = self.take_commands();
            busy |= self.post();
            busy |= self.poll();
            busy |= self.let_go();
            busy |= self.look_at_gpus();
            busy |= self.look_at_visible();
            busy |= self.look_at_queues();
            self.leave_ports();
            self.give_up_waiting();
            self.retire_lanes();
            self.finish_drops();
            self.transfers.on_time(self.clock.now());
            busy |= self.settle();
            self.tell_lost();
            if !busy {
                self.sleep();
            }
        }
    }

    fn take_commands(&mut self) -> bool {
        let mut any = false;
        while let Ok(command) = self.commands.try_recv() {
            any = true;
            self.command(command);
        }
        any
    }

    fn command(&mut self, command: Command) {
        let now = self.clock.now();
        match command {
            Command::AddLane {
                peer,
                lane,
                send_wr,
            } => {
                let Joined {
                    rail,
                    worker: _,
                    pair,
                    number,
                    qp,
                    inbox,
                    watched,
                    tried,
                    rebuilt,
                } = *lane;
                let limits = LaneLimits {
                    send_wr,
                    pair: u16::try_from(pair).unwrap_or(u16::MAX),
                    rebuilt: is_rebuilt(&peer.path),
                };
                self.make_room(peer.key, number);
                if rebuilt && peer.usable().is_err() {
                    // The others are going, and are not added to.
                    match qp.destroy() {
                        Ok(()) => peer.part_drained(),
                        Err(error) => {
                            error!(%error, "queue pair not destroyed: its memory stays quarantined")
                        }
                    }
                    return;
                }
                let lane = self.scheduler.add_lane(peer.key, limits);
                self.lane_of.insert((rail, qp.qp_num()), lane);
                self.peers.insert(peer.key, Arc::clone(&peer));
                let at = LaneQp {
                    rail,
                    pair,
                    number,
                    qp,
                    inbox,
                    watched,
                    tried: tried.unwrap_or(Duration::MAX),
                    told: VecDeque::new(),
                    reset: false,
                    peer,
                };
                let key = at.peer.key;
                self.has_lane(key);
                if rebuilt {
                    // It goes with this worker's others from here on.
                    at.peer.part_drained();
                }
                self.lanes.insert(lane, at);
                let by = self.port_that_holds_up(key);
                self.transfers.held_up(key, by);
                // It may have failed on its way here.
                self.heed(lane);
            }
            Command::PeerLost { peer, cause } => {
                // Before what may panic: somebody waits to be told of it.
                self.lost.push(Arc::clone(&peer));
                self.transfers.peer_lost(now, peer.key, &cause);
            }
            Command::DropLanes { peer } => self.drop_lanes(peer),
            Command::PeerDrained { peer, token } => self.transfers.peer_drained(peer, token),
            Command::Submit { spec, live } => self.submit(now, spec, live),
            Command::AddJob {
                id,
                source,
                runs,
                prepare,
            } => {
                self.add_job(id, source, runs, prepare);
            }
            Command::Ticket { id, ticket, peer } => match self.live.get_mut(&id) {
                Some(live) => {
                    live.nonce = ticket.nonce;
                    self.open_queues(id, &ticket);
                }
                // It ended before its try had a name: the consumer could not tell which was meant.
                None => close(&peer, &ticket.request, ticket.nonce),
            },
            Command::Queue(order) => self.queue_order(order),
            Command::Verified { id, verdict } => self.verified(now, id, verdict),
            Command::Commit { id } => self.commit(id),
            Command::Abort { id } => {
                if let Err(error) = self.transfers.abort(now, id) {
                    debug!(?id, %error, "abort of a push that has ended");
                }
            }
            Command::Fail { id, cause } => {
                if let Err(error) = self.transfers.fail(now, id, cause) {
                    debug!(?id, %error, "failure of a transfer that has ended");
                }
            }
            Command::Cancel { id } => {
                if let Err(error) = self.transfers.cancel(now, id) {
                    debug!(?id, %error, "cancel of a transfer that has ended");
                }
            }
            Command::Start(job) => self.scheduler.start(job),
            Command::Stop(job) => self.scheduler.stop(job),
            Command::Report(report) => self.reported(&report),
            Command::SetAside { peer, pair, cause } => self.set_aside(&peer, pair, &cause),
            Command::Tell { peer, done } => self.waiting_notices.push_back((peer, done)),
            Command::ResetLanes { peer, jobs } => self.reset_lanes(peer, &jobs),
            Command::LaneReset { peer, number } => self.lane_reset(&peer, number),
            Command::Take { peer, taking } => self.take(peer, taking),
            Command::PushClosed(closed) => self.push_closed(closed),
            Command::TakeStop { peer, number } => self.take_stop(&peer, number),
            Command::Taken { peer, job, failed } => self.taken(&peer, job, failed),
            Command::Stage { peer, staging } => self.stage(peer, staging),
            Command::StageFree { peer, number } => self.stage_free(&peer, number),
            Command::Staged {
                peer,
                staged,
                failed,
            } => self.staged(&peer, *staged, failed),
            Command::AsyncEvents => self.events_read(),
            Command::Shutdown => self.stopping = true,
            #[cfg(test)]
            Command::FailLanes => {
                for at in self.lanes.values() {
                    at.qp.to_error();
                }
            }
            #[cfg(test)]
            Command::Panic => panic!("a worker's panic, which the test wants"),
            #[cfg(test)]
            Command::PanicLooking => {
                let _queues = std::mem::take(&mut self.queues);
                panic!("a worker's panic at its queues, which the test wants")
            }
        }
    }

    fn submit(&mut self, now: Time, spec: Spec, live: Box<Live>) {
        let id = spec.id;
        *self.running.entry(spec.peer).or_default() += 1;
        let into = live.into.clone();
        self.live.insert(id, live);
        if let Err(error) = self.transfers.submit(now, spec) {
            warn!(?id, %error, "transfer refused");
            let cause = Cause::Refused {
                reason: Refusal::Busy,
            };
            let outcome = Outcome::Failed(Failure {
                first_cause: cause,
                // Nothing of them has come.
                invalid_blocks: into.unwrap_or_default(),
                memory: MemoryState::Released,
            });
            self.end(id, outcome);
        }
    }

    /// Says of peers whose sessions are over that nothing here has an outcome to tell any more.
    fn tell_lost(&mut self) {
        let running = &self.running;
        for peer in self
            .lost
            .extract_if(.., |peer| !running.contains_key(&peer.key))
        {
            peer.told();
        }
    }

    /// Whether a rail's device has failed and no lane here is on it: it has nothing more to tell, and its
    /// descriptors may be ready for ever.
    fn is_spent(&self, rail: usize) -> bool {
        let over = self.rails.get(rail).is_some_and(|r| r.events.is_over());
        over && self.lanes.values().all(|at| at.rail != rail)
    }

    fn sleep(&mut self) {
        let queues = self.queues_rest();
        let rests = self.gathers.rest().into_iter().chain(queues);
        let rest = rests.chain(self.visible.rest()).min();
        if rest == Some(Duration::ZERO) {
            if queues == rest {
                // It may be for long, and who is waited for may be on this processor.
                std::thread::yield_now();
            }
            return;
        }
        // A device that has failed may tell nothing any more.
        let mut armed = Vec::with_capacity(self.rails.len());
        for (at, rail) in self.rails.iter().enumerate() {
            if self.is_spent(at) {
                continue;
            }
            match rail.cq.arm() {
                Ok(true) => armed.push(at),
                Ok(false) => return,
                Err(_) if rail.events.is_over() => {}
                Err(error) => return self.device_failed(at, &error),
            }
        }
        let now = self.clock.now();
        let due = self.transfers.next_timeout().into_iter();
        let due = due
            .chain(self.seen.next_timeout())
            .chain(self.next_leaving())
            .chain(self.next_give_up());
        let due = due.min();
        let mut timeout = due.map(|at| at.since(now));
        if let Some(rest) = rest {
            timeout = Some(timeout.map_or(rest, |t| t.min(rest)));
        }
        if !self.waiting_checks.is_empty() || !self.waiting_notices.is_empty() {
            timeout = Some(timeout.map_or(RETRY, |t| t.min(RETRY)));
        }
        let commands = &self.commands;
        let idle = || commands.is_empty();
        let readable = |fd| (fd, PollFlags::POLLIN);
        let cqs = armed.iter().filter_map(|at| self.rails.get(*at));
        let cqs = cqs.map(|rail| rail.cq.as_fd());
        let rails = self.rails.iter().enumerate();
        let rails = rails.filter(|(at, _)| !self.is_spent(*at));
        let events: Vec<_> = rails.filter_map(|(_, rail)| rail.events.fd()).collect();
        let telling = events.len();
        let others: Vec<_> = cqs.chain(events).map(readable).collect();
        // The devices' events come last, so that it is known whether they woke it.
        let woken = self.wake.sleep(&others, timeout, idle);
        if let Some(woken) = woken.filter(|_| telling > 0) {
            let events = woken.iter().rev().take(telling).any(|ready| *ready);
            self.seen.slept(self.clock.now(), events);
        }
    }
}
