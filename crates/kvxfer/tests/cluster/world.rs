//! The world: engines, connections and queue pairs, one step at a time, and its time.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use kvxfer::claims::Claims;
use kvxfer::expects::Expects;
use kvxfer::ids::{EngineId, Generation, Nonce, RequestId};
use kvxfer::leases::{LeaseWord, Leases};
use kvxfer::ticket::Ticket;
use kvxfer::time::Time;
use kvxfer::transfer::{Batch, BatchSize, Cause, JobId, PeerKey, SchedulerConfig, TransfersConfig};

use super::app::{OfferSeen, Request, Todo};
use super::bug::{Bug, Step, Violation, ensure};
use super::cards::InCard;
use super::check::{ExpectSeen, Seen};
use super::faults::Faults;
use super::link::{Conn, Keeper, LinkEnd};
use super::memory::Memory;
use super::peer::PeerM;
use super::pushes::Pushes;
use super::qp::Qp;
use super::rng::Rng;
use super::summary::Summary;
use super::worker::Worker;

/// Lines of a history that are shown.
const SHOWN: usize = 160;
/// Steps after the last fault within which everything ends.
const CALM_STEPS: u32 = 60_000;

pub(crate) const MS: u64 = 1_000_000;
pub(crate) const US: u64 = 1_000;

/// One life of an engine.
pub(crate) struct Life {
    pub(crate) slot: usize,
    pub(crate) name: EngineId,
    pub(crate) generation: Generation,
    pub(crate) alive: bool,
    /// Stopped by a signal: none of its threads runs.
    pub(crate) stopped: bool,
    /// In the middle of a shutdown.
    pub(crate) leaving: bool,
    pub(crate) clock: Time,
    /// Its clock's nanoseconds in eight of the world's.
    pub(crate) rate: u64,
    /// The clock has jumped: the books have not looked at it since.
    pub(crate) books_late: bool,
    pub(crate) workers: Vec<Worker>,
    pub(crate) leases: Leases,
    pub(crate) table: Vec<LeaseWord>,
    /// Of a planted fault: slots that are turned over too late.
    pub(crate) late_flips: Vec<(u32, LeaseWord)>,
    pub(crate) expects: Expects,
    pub(crate) tickets: BTreeMap<RequestId, Ticket>,
    pub(crate) wanted: Vec<(RequestId, PeerKey)>,
    pub(crate) pushes: Pushes,
    pub(crate) up: BTreeMap<PeerKey, usize>,
    pub(crate) draining: BTreeSet<PeerKey>,
    pub(crate) met: BTreeMap<usize, Generation>,
    pub(crate) landings: Vec<LeaseWord>,
    pub(crate) free_landings: Vec<u32>,
    pub(crate) memory: Memory,
    pub(crate) rails: [bool; 2],
    pub(crate) notices: bool,
    pub(crate) offers: BTreeMap<(RequestId, u64), OfferSeen>,
    pub(crate) expected: BTreeMap<u64, ExpectSeen>,
    pub(crate) open: BTreeSet<u64>,
}

/// Who can do something.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Actor {
    Worker(usize, usize),
    Link(usize),
    Qp(usize),
    Keeper(usize),
}

/// What an actor did.
pub(crate) enum Acted {
    Yes,
    No,
    Gone,
}

pub(crate) struct World {
    pub(crate) rng: Rng,
    pub(crate) seed: u64,
    pub(crate) bug: Bug,
    pub(crate) now: u64,
    pub(crate) calm: bool,
    pub(crate) faults: Faults,
    pub(crate) sum: Summary,
    pub(crate) log: Option<VecDeque<String>>,
    pub(crate) fresh: u64,
    pub(crate) grace: Duration,
    pub(crate) lives: Vec<Life>,
    /// The life that answers at each address, if one does.
    pub(crate) slots: Vec<Option<usize>>,
    pub(crate) actors: Vec<Actor>,
    pub(crate) conns: Vec<Conn>,
    pub(crate) links: Vec<LinkEnd>,
    pub(crate) keepers: Vec<Keeper>,
    pub(crate) peers: Vec<PeerM>,
    pub(crate) keys: u64,
    /// Successors of queue pairs that were offered.
    pub(crate) offers: u32,
    pub(crate) qps: Vec<Qp>,
    /// What cards have acknowledged and not yet put in memory, oldest first.
    pub(crate) in_cards: VecDeque<InCard>,
    pub(crate) seen: Vec<Seen>,
    pub(crate) requests: Vec<Request>,
    pub(crate) todo: Vec<Todo>,
    /// What is done when a transfer fails.
    pub(crate) retries: BTreeMap<usize, Todo>,
    /// The first error of each job, as a device gave it.
    pub(crate) truth: HashMap<(usize, JobId), (u64, Cause)>,
    pub(crate) batch: Batch,
    pub(crate) steps: u64,
}

macro_rules! log {
    ($world:expr, $($what:tt)+) => {
        if $world.log.is_some() {
            let line = format!($($what)+);
            $world.note(line);
        }
    };
}
pub(super) use log;

/// Runs the history of `seed`.
pub(crate) fn run(seed: u64, bug: Bug) -> Result<Summary, Violation> {
    World::new(seed, bug, false).history().0
}

/// Runs it again and tells it: the end of the history, for people.
pub(crate) fn replay(seed: u64, bug: Bug) -> (Result<Summary, Violation>, Vec<String>) {
    World::new(seed, bug, true).history()
}

impl World {
    fn new(seed: u64, bug: Bug, told: bool) -> Self {
        let mut rng = Rng::new(seed);
        let faults = Faults::choose(&mut rng);
        let engines = if rng.permille(700) {
            2
        } else {
            3 + rng.index(2)
        };
        let mut world = Self {
            grace: Duration::from_nanos((1 + rng.below(4)) * MS),
            rng,
            seed,
            bug,
            now: MS,
            calm: false,
            faults,
            sum: Summary::default(),
            log: told.then(VecDeque::new),
            fresh: 0,
            lives: Vec::new(),
            slots: vec![None; engines],
            actors: Vec::new(),
            conns: Vec::new(),
            links: Vec::new(),
            keepers: Vec::new(),
            peers: Vec::new(),
            keys: 1,
            offers: 0,
            qps: Vec::new(),
            in_cards: VecDeque::new(),
            seen: Vec::new(),
            requests: Vec::new(),
            todo: Vec::new(),
            retries: BTreeMap::new(),
            truth: HashMap::new(),
            batch: Batch::new(),
            steps: 0,
        };
        for slot in 0..engines {
            world.birth(slot);
        }
        world
    }

    pub(crate) fn note(&mut self, line: String) {
        let now = self.now;
        if let Some(log) = &mut self.log {
            if log.len() == SHOWN {
                log.pop_front();
            }
            log.push_back(format!("{:>10} us  {line}", now / US));
        }
    }

    /// A new life at an address, and its wish to be connected with those before it.
    pub(crate) fn birth(&mut self, slot: usize) {
        let life = self.lives.len();
        let mut generation = [0; 16];
        generation[..8].copy_from_slice(&(life as u64 + 1).to_le_bytes());
        generation[8..].copy_from_slice(&self.seed.to_le_bytes());
        let rng = &mut self.rng;
        let n_workers = if rng.permille(600) { 1 } else { 2 };
        let scheduler = SchedulerConfig {
            batch: if rng.permille(500) {
                BatchSize::Auto
            } else {
                BatchSize::Fixed(1 + rng.below(4) as u32)
            },
            batch_bytes: 2 + rng.below(20),
            peer_bytes: 4 + rng.below(60),
            cq_entries: if rng.permille(300) {
                3 + rng.below(8) as u32
            } else {
                1 << 16
            },
        };
        let jobs_per_peer = 1 + rng.index(5);
        let workers = (0..n_workers)
            .map(|index| {
                Worker::new(
                    scheduler,
                    TransfersConfig {
                        owner: index as u16,
                        max_live: 64,
                        jobs_per_peer,
                        settle: Duration::from_nanos(MS / 2),
                        drain_grace: self.grace,
                        reset_grace: self.grace,
                    },
                )
            })
            .collect();
        let slots = 4;
        let blocks = 20 + rng.below(8) as u32;
        let notices = rng.permille(500);
        // Every engine counts its time from another origin, and some count wrong.
        let origin = rng.below(1000 * MS);
        let rate = if rng.permille(self.faults.drift) {
            self.sum.count("fault: clock runs too fast or slow");
            4 + rng.below(9)
        } else {
            8
        };
        let memory = Memory::new(blocks, &mut self.fresh);
        self.lives.push(Life {
            slot,
            name: format!("engine-{slot}").as_str().into(),
            generation: Generation(generation),
            alive: true,
            stopped: false,
            leaving: false,
            clock: Time(origin),
            rate,
            books_late: false,
            workers,
            leases: Leases::new(slots),
            table: vec![LeaseWord::DEAD; slots as usize],
            late_flips: Vec::new(),
            expects: Expects::new(self.grace, Claims::new(vec![Some(0)])),
            tickets: BTreeMap::new(),
            wanted: Vec::new(),
            pushes: Pushes::default(),
            up: BTreeMap::new(),
            draining: BTreeSet::new(),
            met: BTreeMap::new(),
            landings: vec![LeaseWord::DEAD; 3],
            free_landings: (0..3).collect(),
            memory,
            rails: [true; 2],
            notices,
            offers: BTreeMap::new(),
            expected: BTreeMap::new(),
            open: BTreeSet::new(),
        });
        self.slots[slot] = Some(life);
        for worker in 0..n_workers {
            self.actors.push(Actor::Worker(life, worker));
        }
        log!(
            self,
            "engine {slot}: life {life} begins, {n_workers} workers"
        );
        // The later one of two dials; now and then both do.
        for other in 0..self.slots.len() {
            if other < slot || (other != slot && self.rng.permille(100)) {
                self.keep_up(life, other);
            }
        }
    }

    pub(crate) fn clock(&self, life: usize) -> Time {
        self.lives[life].clock
    }

    /// Whether an engine's threads run.
    pub(crate) fn runs(&self, life: usize) -> bool {
        self.lives[life].alive && !self.lives[life].stopped
    }

    // ---- a history ---------------------------------------------------------------------------

    fn history(mut self) -> (Result<Summary, Violation>, Vec<String>) {
        let ended = self.all();
        let mut told: Vec<String> = self.log.take().unwrap_or_default().into();
        let result = match ended {
            Ok(()) => {
                self.sum.add("steps", self.steps);
                Ok(self.sum)
            }
            Err(violation) => {
                told.push(format!("{:?}: {}", violation.invariant, violation.what));
                Err(violation)
            }
        };
        (result, told)
    }

    fn all(&mut self) -> Step {
        let steps = 150 + self.rng.below(350);
        for _ in 0..steps {
            if self.rng.permille(110) {
                self.app_acts()?;
            }
            if self.rng.permille(self.faults.often) {
                self.something_fails()?;
            }
            self.step()?;
        }
        self.calm = true;
        log!(self, "no more faults from here");
        self.heal()?;
        let mut steps = 0;
        while !self.is_over() {
            if self.rng.permille(300) {
                self.app_finishes()?;
            }
            self.step()?;
            steps += 1;
            ensure!(
                steps < CALM_STEPS,
                Converges,
                "not over after {steps} steps without faults: {}",
                self.what_is_left()
            );
        }
        self.last_checks()
    }

    /// One actor does one thing; where none can, time passes until one can.
    pub(crate) fn step(&mut self) -> Step {
        self.steps += 1;
        self.cards_write()?;
        let mut acted = false;
        let mut tried = 0;
        let mut at = self.rng.index(self.actors.len().max(1));
        while tried < self.actors.len() {
            if at >= self.actors.len() {
                at = 0;
            }
            match self.act(self.actors[at])? {
                Acted::Yes => {
                    acted = true;
                    break;
                }
                Acted::No => {
                    at += 1;
                    tried += 1;
                }
                Acted::Gone => {
                    self.actors.swap_remove(at);
                }
            }
        }
        if !acted {
            // Authors are not slower than everything else: time does not leap while they have work.
            let most = if self.calm && self.todo.is_empty() {
                100 * MS
            } else {
                200 * US
            };
            self.pass(most)
        } else if self.rng.permille(350) {
            let most = if self.rng.permille(30) { MS } else { 20 * US };
            let by = 1 + self.rng.below(most);
            self.pass(by)
        } else {
            Ok(())
        }
    }

    fn act(&mut self, actor: Actor) -> Result<Acted, Violation> {
        match actor {
            Actor::Worker(life, w) => {
                if !self.lives[life].alive {
                    return Ok(Acted::Gone);
                }
                if self.lives[life].stopped || !self.lives[life].workers[w].awake {
                    return Ok(Acted::No);
                }
                self.worker_phase(life, w)?;
                Ok(Acted::Yes)
            }
            Actor::Link(link) => self.link_acts(link),
            Actor::Qp(qp) => self.qp_acts(qp),
            Actor::Keeper(keeper) => self.keeper_acts(keeper),
        }
    }

    // ---- time --------------------------------------------------------------------------------

    /// The world's time at which an engine's clock shows `at`.
    fn world_time(&self, life: usize, at: Time) -> u64 {
        let life = &self.lives[life];
        let left = at.nanos_since(life.clock);
        self.now
            .saturating_add((left.saturating_mul(8)).div_ceil(life.rate))
    }

    fn next_due(&self) -> Option<u64> {
        let mut due: Option<u64> = None;
        let mut take = |at: u64| due = Some(due.map_or(at, |due| due.min(at)));
        for (i, life) in self.lives.iter().enumerate() {
            if !self.runs(i) {
                continue;
            }
            for worker in &life.workers {
                if let Some(at) = worker.transfers.next_timeout() {
                    take(self.world_time(i, at));
                }
                for (_, at, _) in &worker.laneless {
                    take(self.world_time(i, *at));
                }
                if let Some(at) = worker.retry_at {
                    take(self.world_time(i, at));
                }
            }
            for at in [life.leases.next_timeout(), life.expects.next_timeout()]
                .into_iter()
                .flatten()
            {
                take(self.world_time(i, at));
            }
        }
        for link in self.links.iter().filter(|l| !l.gone && self.runs(l.life)) {
            if link.closed.is_some() {
                take(link.last_words);
            } else if let Some(at) = link.session.next_timeout() {
                take(self.world_time(link.life, at));
            }
        }
        for keeper in &self.keepers {
            if keeper.link.is_none() && keeper.next_at < u64::MAX && self.runs(keeper.life) {
                take(keeper.next_at);
            }
        }
        for qp in &self.qps {
            if let Some(at) = qp.gives_up_at() {
                take(at);
            }
        }
        due
    }

    /// Time passes, and rings wherever something is due.
    pub(crate) fn pass(&mut self, by: u64) -> Step {
        let until = self.now + by;
        let to = self.next_due().map_or(until, |due| due.min(until));
        let by = to.max(self.now + 1) - self.now;
        self.now += by;
        for life in &mut self.lives {
            life.clock = Time(life.clock.0 + by * life.rate / 8);
        }
        for life in 0..self.lives.len() {
            if self.runs(life) {
                self.ring(life)?;
            }
        }
        for link in 0..self.links.len() {
            let end = &self.links[link];
            let due = !end.gone
                && self.runs(end.life)
                && (end.closed.is_some() && end.last_words <= self.now
                    || end
                        .session
                        .next_timeout()
                        .is_some_and(|at| at <= self.clock(end.life)));
            if due {
                self.link_turn(link)?;
            }
        }
        Ok(())
    }

    /// An engine looks at its clock.
    fn ring(&mut self, life: usize) -> Step {
        let now = self.clock(life);
        let due = |at: Option<Time>| at.is_some_and(|at| at <= now);
        for w in 0..self.lives[life].workers.len() {
            let worker = &self.lives[life].workers[w];
            if due(worker.retry_at) {
                self.lives[life].workers[w].retry_at = None;
                self.lives[life].workers[w].awake = true;
            }
            let worker = &self.lives[life].workers[w];
            if worker.laneless.iter().any(|of| due(Some(of.1))) {
                self.lives[life].workers[w].awake = true;
            }
            let worker = &self.lives[life].workers[w];
            if due(worker.transfers.next_timeout()) || self.overdue(life, w).is_some() {
                self.worker_finishes_loop(life, w)?;
            }
            if let Some(tid) = self.overdue(life, w) {
                ensure!(
                    false,
                    Deadline,
                    "{} has no outcome at {now}, due at {}",
                    self.seen[tid].name(),
                    self.seen[tid].deadline
                );
            }
        }
        let books = &self.lives[life];
        if due(books.leases.next_timeout()) || due(books.expects.next_timeout()) {
            self.books_keep_time(life)?;
        }
        self.lives[life].books_late = false;
        for expected in self.lives[life].expected.values() {
            ensure!(
                expected.ended || expected.deadline > now,
                Deadline,
                "{} has no outcome at {now}, due at {}",
                expected.name,
                expected.deadline
            );
        }
        for offer in self.lives[life].offers.values() {
            ensure!(
                offer.released || offer.expires > now,
                Deadline,
                "{} stands at {now}, its lease ran out at {}",
                offer.name,
                offer.expires
            );
        }
        Ok(())
    }

    /// A transfer that its worker knows, and whose outcome is due.
    fn overdue(&self, life: usize, w: usize) -> Option<usize> {
        let worker = &self.lives[life].workers[w];
        let now = self.clock(life);
        worker
            .live
            .keys()
            .map(|id| id.0 as usize)
            .find(|tid| self.seen[*tid].ended.is_none() && self.seen[*tid].deadline <= now)
    }

    pub(crate) fn fresh_nonce(&mut self) -> Nonce {
        Nonce(self.rng.next().max(1))
    }
}
