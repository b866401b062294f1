//! Mixed traffic with faults at random, for as long as one likes: pulls, pushes, expectations and
//! offers between a survivor and two peers in processes of their own, which are killed, stopped and
//! started again meanwhile, and a device that fails work requests and queue pairs on purpose. Every byte that is handed over is checked, and every block that is the
//! owner's again is checked once more before it is used.
//!
//! `KVXFER_SOAK_SECONDS` says how long (10 without it, 600 in the long suite), `KVXFER_SOAK_SEED`
//! repeats the choices of a run; what the machine makes of them differs.

mod support;

#[path = "sim/rng.rs"]
mod rng;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Instance, PullOptions, PushOptions};
use kvxfer::event::{Event, MemoryState, ReleaseReason};
use kvxfer::ids::RequestId;
use rng::Rng;
use support::child::{self, Child, Spec};
use support::{LONG, Node, POISON, RECYCLED, bounded, groups, pairs, recipe};

const BLOCK: u64 = 32 << 10;
/// Blocks below this one hold the pattern that is offered and pushed; those above are a pool, which
/// is pulled and pushed into.
const SOURCES: u32 = 64;
const BLOCKS: u32 = 1024;
/// Blocks of one request at most.
const MOST: u32 = 32;
const SEED: u64 = 11;
/// Requests of the survivor under way at once.
const LIVE: usize = 16;
/// How much later than its deadline an outcome may come on the busiest machine.
const SLACK: Duration = Duration::from_secs(20);

fn seconds() -> u64 {
    let long = std::env::var_os("KVXFER_LONG_TESTS").is_some();
    match std::env::var("KVXFER_SOAK_SECONDS") {
        Ok(text) => text.parse().expect("seconds"),
        Err(_) if long => 600,
        Err(_) => 10,
    }
}

fn seed() -> u64 {
    match std::env::var("KVXFER_SOAK_SEED") {
        Ok(text) => text.parse().expect("a seed"),
        Err(_) => u64::from(std::process::id()),
    }
}

/// A request of the survivor that holds blocks of its pool.
#[derive(Debug)]
struct Held {
    /// What should have come, and where to.
    table: Vec<(u32, u32)>,
    /// When it must have ended.
    end: Instant,
    /// It has, and its blocks are quarantined.
    quarantined: bool,
    /// Why.
    why: String,
}

/// Tells the past of a block if it is not as it was left.
struct Story<'a>(u32, Instant, Option<&'a VecDeque<String>>);

impl Drop for Story<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("at {:?}, block {}: {:#?}", self.1.elapsed(), self.0, self.2);
        }
    }
}

struct Soak {
    node: Node,
    path: PathKind,
    rng: Rng,
    /// Offers, pulls and pushes of the survivor go to these: one that has blocks, one that wants them.
    producer: (Child, Instance),
    consumer: (Child, Instance),
    free: Vec<u32>,
    held: HashMap<RequestId, Held>,
    /// Pushes and offers: they hold nothing of the pool.
    others: HashMap<RequestId, Instant>,
    ended: HashSet<RequestId>,
    /// How the last requests of a block of the pool ended.
    stories: HashMap<u32, VecDeque<String>>,
    begun: Instant,
    next: u64,
    /// What happened how often.
    told: BTreeMap<String, u64>,
    bytes: u64,
}

fn spec(path: PathKind, role: KvRole, listen: &str) -> Spec {
    let name = if role == KvRole::Producer {
        "producer"
    } else {
        "consumer"
    };
    Spec {
        role,
        path,
        block_bytes: BLOCK,
        blocks: SOURCES,
        listen: listen.to_owned(),
        engine_id: Some(format!("{name}-{}", path.name())),
        seed: SEED,
        namespace: None,
    }
}

impl Soak {
    fn new(path: PathKind, seed: u64) -> Self {
        let node = recipe(KvRole::Both, path, BLOCK, BLOCKS)
            .with(|config| {
                config.max_inflight_bytes.0 = 1 << 20;
                let faults = format!(
                    "seed={seed},reorder=0.02:2ms,delay=0.002:20ms,drop=0.0003,key=0.001,\
                     wr-error=0.001:rem-op,qp-fatal=0.0003,cut=0.0003"
                );
                config.faults = Some(faults.parse().expect("a plan of faults"));
            })
            .node();
        node.side.fill(SEED).expect("filled");
        node.fill_blocks(SOURCES..BLOCKS, RECYCLED);
        let peer = |role| {
            let child = Child::start(&spec(path, role, "127.0.0.1:0"));
            let way = node
                .engine
                .connect(&child.address, LONG)
                .expect("a session");
            (child, way)
        };
        let (producer, consumer) = (peer(KvRole::Producer), peer(KvRole::Consumer));
        Self {
            node,
            path,
            rng: Rng::new(seed),
            producer,
            consumer,
            free: (SOURCES..BLOCKS).collect(),
            held: HashMap::new(),
            others: HashMap::new(),
            ended: HashSet::new(),
            stories: HashMap::new(),
            begun: Instant::now(),
            next: 0,
            told: BTreeMap::new(),
            bytes: 0,
        }
    }

    fn tell(&mut self, what: &str) {
        *self.told.entry(what.to_owned()).or_default() += 1;
    }

    fn request(&mut self, kind: &str) -> RequestId {
        self.next += 1;
        RequestId::from(format!("{kind}-{}", self.next).as_str())
    }

    fn deadline(&mut self) -> Duration {
        Duration::from_millis(match self.rng.below(10) {
            0 => 1,
            1 => 10,
            2..=4 => 200,
            _ => 1_500,
        })
    }

    /// Blocks of the pool, which nobody has touched since they came back.
    fn take(&mut self) -> Vec<u32> {
        let wanted = 1 + self.rng.index(MOST as usize);
        let mut taken = Vec::new();
        while taken.len() < wanted && !self.free.is_empty() {
            let at = self.rng.index(self.free.len());
            taken.push(self.free.swap_remove(at));
        }
        for block in &taken {
            let story = Story(*block, self.begun, self.stories.get(block));
            self.node.assert_blocks([*block].into_iter(), RECYCLED);
            drop(story);
        }
        self.node.fill_blocks(taken.iter().copied(), POISON);
        taken
    }

    fn give_back(&mut self, table: &[(u32, u32)], how: &str) {
        let blocks = table.iter().map(|(_, dst)| *dst);
        let at = self.begun.elapsed();
        for block in blocks.clone() {
            let story = self.stories.entry(block).or_default();
            story.truncate(7);
            story.push_front(format!("{at:?}: {how}"));
        }
        self.node.fill_blocks(blocks.clone(), RECYCLED);
        self.free.extend(blocks);
    }

    fn hold(&mut self, request: &RequestId, table: Vec<(u32, u32)>, deadline: Duration) {
        let held = Held {
            table,
            end: Instant::now() + deadline + SLACK,
            quarantined: false,
            why: String::new(),
        };
        assert!(self.held.insert(request.clone(), held).is_none());
    }

    // ---- what is done ---------------------------------------------------------------------------

    /// Pulls some blocks of an offer, each from anywhere in it to anywhere in the pool.
    fn pull(&mut self) {
        let request = self.request("pull");
        let ticket = self
            .producer
            .0
            .offer(&request.0, MOST, Duration::from_secs(30));
        let table: Vec<(u32, u32)> = (0..MOST).zip(self.take()).collect();
        let deadline = self.deadline();
        let options = PullOptions {
            deadline: Some(deadline),
            ..PullOptions::default()
        };
        // Before the call, whose outcome may come at once.
        self.hold(&request, table.clone(), deadline);
        let started = self
            .producer
            .1
            .pull(&ticket, &pairs(table.iter().copied()), options);
        match started {
            Ok(transfer) => {
                self.tell("pull");
                if self.rng.permille(100) {
                    self.tell("pull cancelled");
                    transfer.cancel();
                }
            }
            // The session is down.
            Err(error) => {
                self.tell("pull not begun");
                self.held.remove(&request);
                self.give_back(&table, &format!("{request} was not begun: {error}"));
            }
        }
    }

    /// Has the producer push into the pool.
    fn expect(&mut self) {
        let request = self.request("expect");
        let blocks = self.take();
        let table: Vec<(u32, u32)> = (0..).zip(blocks.iter().copied()).collect();
        let deadline = self.deadline();
        self.hold(&request, table, deadline);
        self.node
            .engine
            .expect(&request, &groups(blocks.iter().copied()), 1, deadline)
            .expect("blocks that nobody else has");
        let how = match self.rng.below(10) {
            0 => "abort",
            1 => "leave",
            _ => "commit",
        };
        let peer = self.node.name();
        if self.producer.0.try_push(&peer, &request.0, how, &blocks) {
            self.tell(&format!("expectation, {how}"));
        } else {
            self.tell("expectation that nobody serves");
        }
        if self.rng.permille(100) {
            self.tell("expectation cancelled");
            self.node.engine.cancel_expect(&request);
        }
    }

    /// Pushes to the consumer, which checks what it is given.
    fn push(&mut self) {
        let request = self.request("push");
        let deadline = self.deadline();
        let blocks = 1 + self.rng.index(MOST as usize) as u32;
        self.consumer.0.receive(&request.0, blocks, deadline);
        let options = PushOptions {
            deadline: Some(deadline),
            ..PushOptions::default()
        };
        let Ok(push) = self.consumer.1.begin_push_with(&request, options) else {
            self.tell("push not begun");
            return self.strike_consumer(&request);
        };
        self.others
            .insert(request.clone(), Instant::now() + deadline + SLACK);
        let table = pairs((0..blocks).map(|b| (b, b)));
        let fits = push.all_layers(&table, None).is_ok();
        if !fits || self.rng.permille(100) {
            self.tell("push aborted");
            drop(push.abort());
        } else if let Ok(transfer) = push.commit() {
            self.tell("push");
            if self.rng.permille(100) {
                self.tell("push cancelled");
                transfer.cancel();
            }
        }
        self.strike_consumer(&request);
    }

    /// Has the consumer pull, and check what it gets.
    fn offer(&mut self) {
        let request = self.request("offer");
        let ttl = self.deadline().max(Duration::from_millis(50));
        let blocks: Vec<u32> = (0..MOST).collect();
        let ticket = self
            .node
            .engine
            .offer(&request, &groups(blocks), 1, ttl)
            .expect("an offer");
        self.others
            .insert(request.clone(), Instant::now() + ttl + SLACK);
        let peer = self.node.name();
        if !self.consumer.0.try_pull(&peer, &ticket, MOST) {
            self.tell("offer that nobody pulls");
            return;
        }
        self.tell("offer");
        if self.rng.permille(100) {
            self.tell("offer retracted");
            self.node.engine.retract(&request);
        }
        self.strike_consumer(&request);
    }

    /// What has become of the consumer's request; or it does not live to tell.
    fn strike_consumer(&mut self, request: &RequestId) {
        if self.rng.permille(40) {
            self.tell("consumer killed");
            restart(&mut self.consumer.0, &spec(self.path, KvRole::Consumer, ""));
            return;
        }
        if self.rng.permille(60) {
            self.tell("consumer stopped");
            pause(&mut self.rng, &self.consumer.0);
        }
        let said = self.consumer.0.verdict(&request.0);
        assert!(
            matches!(said.as_str(), "good" | "failed"),
            "{request:?}: {said}"
        );
        self.tell(&format!("consumer: {said}"));
    }

    /// Strikes while blocks move.
    fn strike_producer(&mut self) {
        for _ in 0..4 {
            self.pull();
            self.expect();
        }
        if self.rng.permille(400) {
            self.tell("producer killed");
            restart(&mut self.producer.0, &spec(self.path, KvRole::Producer, ""));
        } else {
            self.tell("producer stopped");
            pause(&mut self.rng, &self.producer.0);
        }
    }

    // ---- what is told ---------------------------------------------------------------------------

    /// Takes the events that have come, or waits for some.
    fn listen(&mut self, wait: Duration) {
        let mut events = Vec::new();
        self.node.engine.wait_events(&mut events, wait);
        for event in events {
            match event {
                Event::Received { request, .. } => {
                    self.end(&request);
                    let held = self.held.remove(&request).expect("it was under way");
                    assert!(!held.quarantined, "{request:?} failed before");
                    let table = pairs(held.table.iter().copied());
                    self.bytes += self.node.side.verify(SEED, &table).expect("every byte");
                    self.give_back(&held.table, &format!("{request} received"));
                    self.tell("received");
                }
                Event::Failed {
                    request,
                    first_cause,
                    memory,
                    ..
                } => {
                    self.end(&request);
                    let cause = format!("{first_cause:?}");
                    let name = cause.split([' ', '{', '(']).next().unwrap_or_default();
                    self.tell(&format!("failed: {name}"));
                    if self.others.remove(&request).is_some() {
                        continue;
                    }
                    let held = self.held.get_mut(&request).expect("it was under way");
                    if memory == MemoryState::Quarantined {
                        held.quarantined = true;
                        held.why = cause;
                        held.end = Instant::now() + SLACK;
                        self.tell("quarantined");
                    } else {
                        let held = self.held.remove(&request).expect("just seen");
                        self.give_back(&held.table, &format!("{request} failed: {cause}"));
                    }
                }
                Event::Released {
                    request,
                    reason: ReleaseReason::Drained,
                    ..
                } => {
                    // Of a push that failed, it says that its sources are free.
                    if let Some(held) = self.held.remove(&request) {
                        assert!(held.quarantined, "{request:?} is released twice");
                        self.give_back(&held.table, &format!("{request} released: {}", held.why));
                    }
                }
                Event::Sent { request, .. } => {
                    self.end(&request);
                    self.others.remove(&request).expect("it was under way");
                    self.tell("sent");
                }
                Event::Released {
                    request, reason, ..
                } => {
                    self.end(&request);
                    self.others.remove(&request).expect("it was on offer");
                    self.tell(&format!("offer: {reason:?}"));
                }
                Event::PeerDown { cause, .. } => self.tell(&format!("peer down: {cause:?}")),
                Event::PeerRestarted { .. } => self.tell("peer restarted"),
                _ => {}
            }
        }
        let now = Instant::now();
        for (request, held) in &self.held {
            assert!(now < held.end, "{request:?} does not end: {held:?}");
        }
        for (request, end) in &self.others {
            assert!(now < *end, "{request:?} does not end");
        }
    }

    fn end(&mut self, request: &RequestId) {
        assert!(self.ended.insert(request.clone()), "{request:?} ends twice");
    }

    fn run(&mut self, until: Instant) {
        while Instant::now() < until {
            match self.rng.below(1000) {
                0..300 if self.held.len() < LIVE => self.pull(),
                300..600 if self.held.len() < LIVE => self.expect(),
                600..750 => self.push(),
                750..900 => self.offer(),
                980..1000 => self.strike_producer(),
                _ => {}
            }
            let wait = if self.held.len() < LIVE { 0 } else { 20 };
            self.listen(Duration::from_millis(wait));
        }
    }

    /// Everything ends, all blocks come back, and nothing lands in them afterwards.
    fn finish(mut self) -> (BTreeMap<String, u64>, u64) {
        while !self.held.is_empty() || !self.others.is_empty() {
            self.listen(Duration::from_millis(50));
        }
        assert_eq!(self.free.len(), (BLOCKS - SOURCES) as usize);
        std::thread::sleep(Duration::from_millis(300));
        self.node.assert_blocks(SOURCES..BLOCKS, RECYCLED);
        let Soak {
            node,
            producer,
            consumer,
            told,
            bytes,
            ..
        } = self;
        bounded("engine drop", move || drop((producer.1, consumer.1, node)));
        (told, bytes)
    }
}

/// Kills a peer and starts it again where it was.
fn restart(child: &mut Child, spec: &Spec) {
    child.die();
    let spec = Spec {
        listen: child.address.clone(),
        ..spec.clone()
    };
    *child = Child::start(&spec);
}

fn pause(rng: &mut Rng, child: &Child) {
    child.stop();
    std::thread::sleep(Duration::from_millis(10 + rng.below(600)));
    child.resume();
}

fn soak(path: PathKind) {
    let (seed, seconds) = (seed(), seconds());
    println!("KVXFER_SOAK_SEED={seed} KVXFER_SOAK_SECONDS={seconds}");
    let mut soak = Soak::new(path, seed);
    soak.run(Instant::now() + Duration::from_secs(seconds));
    let (told, bytes) = soak.finish();
    println!("{}: {bytes} bytes checked, {told:#?}", path.name());
    // It is no soak if nothing arrived, or nothing failed.
    for what in ["received", "sent", "consumer: good", "consumer: failed"] {
        assert!(told.get(what).is_some_and(|n| *n > 0), "never {what}");
    }
    assert!(told.keys().any(|what| what.starts_with("failed")));
    assert!(bytes > 0);
}

#[test]
fn arena() {
    soak(PathKind::Arena);
}

#[test]
fn process_vm() {
    soak(PathKind::ProcessVm);
}

#[test]
fn tcp() {
    soak(PathKind::Tcp);
}

/// Not a test: what children run.
#[test]
fn child_entry() {
    child::entry();
}
