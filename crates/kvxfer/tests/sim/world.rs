//! The world: workers, ledgers, queue pairs and an engine that asks for things, one step at a time.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use kvxfer::time::Time;
use kvxfer::transfer::{
    Batch, BatchSize, Cause, DrainToken, Job, JobId, JobReport, LaneLimits, LeaseAnswer, PeerKey,
    Scheduler, SchedulerConfig, TransferId, Transfers, TransfersConfig,
};

use super::check::{Seen, Violation, ensure};
use super::net::{Cqe, Nic, NicState};
use super::rng::Rng;

/// A fault planted between the machines and the world, to see that the checks find it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bug {
    None,
    /// Answers a forced drain although the queue pairs still work.
    DrainTooSoon,
    /// A worker says that a job is quiescent when it stops it.
    QuiescentTooSoon,
    /// An outcome is handed on twice.
    OutcomeTwice,
    /// A release is handed on twice.
    ReleasedTwice,
    /// A release is lost.
    ReleaseLost,
    /// Nobody watches the clock.
    DeafClock,
    /// A report counts an operation that is still posted.
    ConfirmsTooMuch,
    /// A success completion is lost and the next one too: the work is never accounted.
    LosesSuccess,
    /// A flush is taken for an error of its own.
    FlushAsError,
    /// The scheduler believes the send queue larger than it is.
    TooManyCredits,
    /// The device writes something else than it was given.
    WrongBytes,
    /// A lane is said to be settled while the peer has its half still.
    SettlesTooSoon,
    /// A lease that is gone is said to be live.
    LeaseOfNobody,
}

/// What a history came to.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Summary {
    pub(crate) steps: u64,
    pub(crate) done: u64,
    /// Of those, gets.
    pub(crate) got: u64,
    pub(crate) failed: u64,
    pub(crate) cancelled: u64,
    pub(crate) quarantined: u64,
    pub(crate) reset: u64,
    pub(crate) forced: u64,
    pub(crate) replayed: u64,
    /// Writes that landed after they had been flushed.
    pub(crate) late: u64,
    pub(crate) stale: u64,
    pub(crate) echoes: u64,
    pub(crate) executed: u64,
}

/// How often things go wrong in one history, in thousandths of the chances they get.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Faults {
    pub(crate) error: u64,
    pub(crate) stuck: u64,
    pub(crate) async_error: u64,
    pub(crate) post: u64,
    pub(crate) destroy: u64,
    pub(crate) lease_gone: u64,
    pub(crate) peer_lost: u64,
    pub(crate) cancel: u64,
    pub(crate) short_deadlines: u64,
}

pub(crate) enum ToWorker {
    Start(Arc<Job>),
    Stop(JobId),
    Reset(Arc<[JobId]>),
    Drain {
        owner: usize,
        peer: usize,
        key: PeerKey,
        token: DrainToken,
    },
    /// The session is over: destroy the queue pairs.
    PeerGone {
        peer: usize,
    },
}

pub(crate) enum ToOwner {
    Report(JobReport),
    Drained {
        key: PeerKey,
        token: DrainToken,
    },
    Lease {
        id: TransferId,
        job: Option<JobId>,
        answer: LeaseAnswer,
    },
    Verified {
        id: TransferId,
    },
}

pub(crate) struct Draining {
    pub(crate) owner: usize,
    pub(crate) key: PeerKey,
    pub(crate) token: DrainToken,
    pub(crate) nics: Vec<usize>,
}

pub(crate) struct Worker {
    pub(crate) scheduler: Scheduler,
    pub(crate) inbox: VecDeque<ToWorker>,
    pub(crate) cq: VecDeque<Cqe>,
    pub(crate) draining: Vec<Draining>,
    /// Lease checks that found no lane yet, by their numbers.
    pub(crate) leases: VecDeque<usize>,
}

pub(crate) struct Peer {
    pub(crate) key: PeerKey,
    pub(crate) lost: bool,
    /// The next life's key comes with a new entry; lanes of an entry never change peers.
    pub(crate) send_wr: u32,
}

pub(crate) struct World {
    pub(crate) rng: Rng,
    pub(crate) bug: Bug,
    pub(crate) now: Time,
    pub(crate) faults: Faults,
    pub(crate) workers: Vec<Worker>,
    pub(crate) ledgers: Vec<Transfers>,
    pub(crate) owner_inbox: Vec<VecDeque<ToOwner>>,
    pub(crate) acks: HashMap<(usize, DrainToken), usize>,
    pub(crate) peers: Vec<Peer>,
    pub(crate) nics: Vec<Nic>,
    /// Rails to every peer.
    pub(crate) rails: u16,
    /// Lanes that fail alone have successors.
    pub(crate) rebuilt: bool,
    pub(crate) seen: Vec<Seen>,
    pub(crate) index: HashMap<TransferId, usize>,
    /// The leases that were to be read: of a whole transfer, or of a job.
    pub(crate) checks: Vec<(TransferId, Option<JobId>)>,
    pub(crate) next_vendor: u32,
    /// The first error of each job, as the device gave it.
    pub(crate) truth: HashMap<JobId, (u64, Cause)>,
    pub(crate) disturbed: bool,
    pub(crate) calm: bool,
    pub(crate) batch: Batch,
    pub(crate) sum: Summary,
}

pub(crate) type Step = Result<(), Violation>;

/// Runs the history of `seed`. An error names the broken invariant.
pub(crate) fn run(seed: u64, bug: Bug) -> Result<Summary, Violation> {
    let mut world = World::new(seed, bug);
    let steps = 200 + world.rng.below(500);
    for _ in 0..steps {
        world.step()?;
    }
    world.finish()
}

impl World {
    fn new(seed: u64, bug: Bug) -> Self {
        let mut rng = Rng::new(seed);
        let quiet = rng.permille(250);
        let mut rate = |most: u64| {
            if quiet || rng.permille(400) {
                0
            } else {
                rng.below(most + 1)
            }
        };
        let faults = Faults {
            error: rate(15),
            stuck: rate(8),
            async_error: rate(8),
            post: rate(30),
            destroy: rate(300),
            lease_gone: rate(200),
            peer_lost: rate(4),
            cancel: rate(100),
            short_deadlines: rate(600),
        };
        let rails = 1 + rng.below(2) as u16;
        let rebuilt = rng.permille(500);
        let n_workers = 1 + rng.index(3);
        let n_owners = 1 + rng.index(n_workers.min(2));
        let cfg = SchedulerConfig {
            batch: if rng.permille(500) {
                BatchSize::Auto
            } else {
                BatchSize::Fixed(1 + rng.below(9) as u32)
            },
            batch_bytes: 8 + rng.below(100),
            peer_bytes: 16 + rng.below(300),
            cq_entries: if rng.permille(300) {
                4 + rng.below(12) as u32
            } else {
                u32::MAX
            },
        };
        let workers = (0..n_workers).map(|_| Worker {
            scheduler: Scheduler::new(cfg),
            inbox: VecDeque::new(),
            cq: VecDeque::new(),
            draining: Vec::new(),
            leases: VecDeque::new(),
        });
        let ledgers = (0..n_owners).map(|owner| {
            Transfers::new(TransfersConfig {
                owner: owner as u16,
                max_live: 64,
                jobs_per_peer: 1 + rng.index(5),
                settle: Duration::from_micros(rng.below(200)),
                drain_grace: Duration::from_micros(1 + rng.below(300)),
                reset_grace: Duration::from_micros(1 + rng.below(300)),
            })
        });
        let ledgers: Vec<_> = ledgers.collect();
        let mut world = Self {
            bug,
            now: Time::from_micros(1),
            faults,
            workers: workers.collect(),
            owner_inbox: ledgers.iter().map(|_| VecDeque::new()).collect(),
            ledgers,
            acks: HashMap::new(),
            peers: Vec::new(),
            nics: Vec::new(),
            rails,
            rebuilt,
            seen: Vec::new(),
            index: HashMap::new(),
            checks: Vec::new(),
            next_vendor: 0x100,
            truth: HashMap::new(),
            disturbed: false,
            calm: false,
            batch: Batch::new(),
            sum: Summary::default(),
            rng,
        };
        for _ in 0..1 + world.rng.index(3) {
            world.new_peer();
        }
        world
    }

    pub(super) fn new_peer(&mut self) {
        let key = PeerKey(self.peers.len() as u64 + 7);
        let send_wr = 1 + self.rng.below(20) as u32;
        self.peers.push(Peer {
            key,
            lost: false,
            send_wr,
        });
        let peer = self.peers.len() - 1;
        for worker in 0..self.workers.len() {
            // A worker may have no lane of a peer, but one of them has.
            let lanes = self.rng.index(3) + usize::from(worker == 0);
            for _ in 0..lanes {
                self.new_nic(worker, peer);
            }
        }
    }

    /// Whether lanes go one by one, while the peer may still carry out what was sent on them.
    pub(super) fn retires(&self) -> bool {
        self.rails > 1 || self.rebuilt
    }

    pub(super) fn new_nic(&mut self, worker: usize, peer: usize) {
        let send_wr = self.peers[peer].send_wr;
        let believed = if self.bug == Bug::TooManyCredits {
            send_wr + 3
        } else {
            send_wr
        };
        let key = self.peers[peer].key;
        let pair = self.rng.below(self.rails.into()) as u16;
        let lane = self.workers[worker].scheduler.add_lane(
            key,
            LaneLimits {
                send_wr: believed,
                pair,
                rebuilt: self.rebuilt,
            },
        );
        self.nics.push(Nic {
            worker,
            peer,
            lane,
            state: NicState::Works,
            named: false,
            refused: false,
            destroyed: false,
            waits: false,
            late: Vec::new(),
            send_wr,
            queue: VecDeque::new(),
            posted: 0,
            retired: 0,
            served: 0,
        });
    }

    // ---- one step ----------------------------------------------------------------------------

    fn step(&mut self) -> Step {
        self.sum.steps += 1;
        match self.rng.below(100) {
            0..=3 if !self.calm => self.engine_submits()?,
            4..=6 if !self.calm => self.engine_pushes()?,
            7 if !self.calm => self.engine_gives_up()?,
            8 if !self.calm => self.lane_trouble()?,
            9..=20 => {
                let w = self.rng.index(self.workers.len());
                self.worker_reads_inbox(w)?;
            }
            21..=40 => {
                let w = self.rng.index(self.workers.len());
                self.worker_posts(w)?;
            }
            41..=65 => {
                if !self.nics.is_empty() {
                    // Mostly the lanes that live; destroyed ones stay in the list.
                    let n = self.rng.index(self.nics.len());
                    for _ in 0..1 + self.rng.index(6) {
                        self.nic_serves(n)?;
                    }
                    self.lands_late(n)?;
                }
            }
            66..=80 => {
                let w = self.rng.index(self.workers.len());
                self.worker_polls(w)?;
            }
            81..=90 => {
                let o = self.rng.index(self.ledgers.len());
                self.owner_reads_inbox(o)?;
            }
            _ => self.time_passes()?,
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Summary, Violation> {
        self.calm = true;
        for i in 0..self.seen.len() {
            let s = &self.seen[i];
            if s.is_begun() && s.ended.is_none() && !s.committed && s.reason.is_none() {
                let (owner, id) = (s.owner, s.id);
                if self.ledgers[owner].commit(self.now, id).is_ok() {
                    self.seen[i].committed = true;
                }
                self.outputs(owner)?;
            }
        }
        let mut steps = 0u32;
        while self.ledgers.iter().any(|l| l.live() > 0) {
            self.step()?;
            steps += 1;
            ensure!(
                steps < 60_000,
                "not over after {steps} calm steps: {}",
                self.stuck()
            );
        }
        // Whatever the devices still hold comes back.
        for n in 0..self.nics.len() {
            if self.nics[n].state == NicState::Stuck {
                self.break_nic(n, true);
            }
            while !self.nics[n].queue.is_empty() {
                self.nic_serves(n)?;
            }
            while !self.nics[n].late.is_empty() {
                self.lands_late(n)?;
            }
        }
        for w in 0..self.workers.len() {
            while !self.workers[w].cq.is_empty() || !self.workers[w].inbox.is_empty() {
                self.worker_polls(w)?;
                self.worker_reads_inbox(w)?;
            }
            while self.workers[w].scheduler.poll_report().is_some() {}
        }
        for nic in self.nics.iter().filter(|n| !n.destroyed) {
            let credits = self.workers[nic.worker].scheduler.lane_credits(nic.lane);
            ensure!(
                credits == nic.send_wr,
                "a lane ends with {credits} credits of {}",
                nic.send_wr
            );
        }
        for s in &self.seen {
            ensure!(s.ended.is_some(), "{}: no outcome", s.name());
            ensure!(s.free, "{}: never released", s.name());
        }
        for worker in &self.workers {
            let stats = worker.scheduler.stats();
            self.sum.replayed += stats.replayed;
            self.sum.stale += stats.stale;
            self.sum.echoes += stats.echoes;
        }
        Ok(self.sum)
    }

    fn stuck(&self) -> String {
        let open: Vec<_> = self
            .seen
            .iter()
            .filter(|s| !s.free)
            .map(|s| {
                format!(
                    "{} peer {} ended {:?} due {}",
                    s.name(),
                    s.peer,
                    s.ended,
                    s.deadline
                )
            })
            .collect();
        format!("now {}: {}", self.now, open.join("; "))
    }
}

impl Faults {
    pub(crate) fn quiet(&self) -> bool {
        let Self {
            error,
            stuck,
            async_error,
            post,
            destroy,
            lease_gone,
            peer_lost,
            cancel,
            short_deadlines,
        } = *self;
        error
            + stuck
            + async_error
            + post
            + destroy
            + lease_gone
            + peer_lost
            + cancel
            + short_deadlines
            == 0
    }
}
