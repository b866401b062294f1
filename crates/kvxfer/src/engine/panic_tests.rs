//! Threads of an engine that panic while blocks move.

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use super::worker::Command;
use crate::Error;
use crate::bench::{BenchMemory, BenchShape, BenchSide};
use crate::blocks::{BlockPair, GroupBlocks, GroupPairs};
use crate::config::{Config, KvRole, PathKind, PathSet};
use crate::engine::{Engine, Instance, Peer, PullOptions, Transfer};
use crate::event::{Event, MemoryState, PeerName};
use crate::gpu_queue::{GpuQueueConfig, Hca, Kernels, QueueKind};
use crate::ids::RequestId;
use crate::layout::{KvFormat, Topology};
use crate::mem::gpu::{GpuRuntime, RuntimeChoice, RuntimeKind, Stream};
use crate::mem::kernels::queue::{ALL, ALL_TENSORS, LOCAL_PLACE, Move, PUT, REMOTE_PLACE};
use crate::mem::post::device::{PostBy, PostKernels, Posts};
use crate::mem::post::{Place, Status};
use crate::transfer::Cause;

pub(super) const LONG: Duration = Duration::from_secs(60);
const BLOCKS: u32 = 128;
/// Pulls that run at once.
const PULLS: u32 = 8;
const PATHS: [PathKind; 4] = [
    PathKind::Arena,
    PathKind::ProcessVm,
    PathKind::Tcp,
    PathKind::Ipc,
];
const RECYCLED: u64 = 0x5c5c_5c5c_5c5c_5c5c;
pub(super) const SENT: u64 = 0x3a3a_3a3a_3a3a_3a3a;

pub(super) struct Node {
    pub(super) engine: Engine,
    side: BenchSide,
}

fn node(role: KvRole, path: PathKind, faults: Option<&str>) -> Node {
    let format = KvFormat::opaque(256 << 10, 2).expect("a format");
    let shape = BenchShape {
        topology: Topology::single(&format),
        format,
        num_blocks: vec![BLOCKS],
        memory: match path {
            PathKind::ProcessVm => BenchMemory::Anonymous,
            PathKind::Ipc => BenchMemory::Gpu {
                runtime: RuntimeChoice::Only(RuntimeKind::Host),
                ordinal: 0,
            },
            _ => BenchMemory::Arena,
        },
    };
    let side = BenchSide::new(&shape).expect("memory");
    let config = Config {
        kv_role: role,
        path: PathSet::only(path),
        num_worker_threads: 2,
        qp_per_transfer: 4,
        gpu_links_in: path == PathKind::Ipc,
        faults: faults.map(|plan| plan.parse().expect("a plan")),
        ..Config::default()
    };
    let engine = Engine::new(config, side.format().clone(), side.placement().clone());
    Node {
        engine: engine.expect("an engine"),
        side,
    }
}

impl Node {
    fn panic(&self, worker: u16) {
        self.panic_by(worker, Command::Panic);
    }

    pub(super) fn panic_by(&self, worker: u16, command: Command) {
        let worker = self.engine.inner().runtime.worker(worker);
        worker.expect("two workers").send(command);
    }

    fn recycle(&self) {
        self.fill(RECYCLED);
    }

    pub(super) fn fill(&self, word: u64) {
        for memory in self.side.memory() {
            memory
                .fill_words(0, memory.len(), |_| word)
                .expect("inside");
        }
    }

    /// Waits until the first block of what a producer sends is there.
    pub(super) fn await_sent(&self) {
        let memory = &self.side.memory()[0];
        let end = Instant::now() + LONG;
        while memory.verify_words(0, 8, |_| SENT).is_err() {
            assert!(Instant::now() < end, "blocks arrive");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn assert_recycled(&self) {
        for memory in self.side.memory() {
            memory
                .verify_words(0, memory.len(), |_| RECYCLED)
                .expect("as it was left");
        }
    }

    /// Takes no work, and goes when it is told to.
    pub(super) fn takes_no_more(self, way: Peer, address: &str) {
        let request = RequestId::from("later");
        let error = self.engine.connect(address, LONG).expect_err("broken");
        assert!(matches!(error, Error::WorkerPanicked), "{error}");
        let error = match self.engine.inner().config.kv_role {
            KvRole::Producer => self.engine.offer(&request, &groups(0..1), 1, LONG),
            _ => self.engine.expect(&request, &groups(0..1), 1, LONG),
        };
        let error = error.expect_err("broken");
        assert!(matches!(error, Error::WorkerPanicked), "{error}");
        let error = way.path().expect_err("broken");
        assert!(matches!(error, Error::WorkerPanicked), "{error}");
        let (gone, is_gone) = channel();
        std::thread::spawn(move || {
            drop((way, self.engine));
            gone.send(())
        });
        is_gone.recv_timeout(LONG).expect("the drop ends");
    }
}

pub(super) fn groups(blocks: std::ops::Range<u32>) -> Vec<GroupBlocks> {
    vec![GroupBlocks {
        group: 0,
        blocks: blocks.collect(),
    }]
}

fn all_blocks() -> Vec<GroupPairs> {
    reversed(BLOCKS)
}

/// All of so many blocks, so that none merges with its neighbour.
pub(super) fn reversed(count: u32) -> Vec<GroupPairs> {
    let pairs = (0..count).map(|b| BlockPair {
        src: b,
        dst: count - 1 - b,
    });
    vec![GroupPairs {
        group: 0,
        pairs: pairs.collect(),
    }]
}

pub(super) fn pair(path: PathKind) -> (Node, Node, Instance, String) {
    pair_with(path, None)
}

/// Two engines whose devices have this plan of faults.
pub(super) fn pair_with(path: PathKind, faults: Option<&str>) -> (Node, Node, Instance, String) {
    let producer = node(KvRole::Producer, path, faults);
    let consumer = node(KvRole::Consumer, path, faults);
    let address = producer.engine.listen("127.0.0.1:0").expect("a port");
    let address = address.to_string();
    let instance = consumer.engine.connect(&address, LONG).expect("a session");
    (producer, consumer, instance, address)
}

pub(super) fn wait_for(
    engine: &Engine,
    seen: &mut Vec<Event>,
    wanted: impl Fn(&Event) -> bool,
) -> Event {
    let end = Instant::now() + LONG;
    loop {
        if let Some(event) = seen.iter().find(|event| wanted(event)) {
            return event.clone();
        }
        assert!(Instant::now() < end, "it has not come: {seen:#?}");
        engine.wait_events(seen, Duration::from_millis(100));
    }
}

/// All have ended, some because of the panic; their memory is back.
fn all_end(transfers: &[Transfer]) {
    let mut panicked = 0;
    for transfer in transfers {
        let outcome = transfer.wait(LONG).expect("an outcome");
        if let Some(failure) = outcome.failure() {
            assert_eq!(failure.first_cause, Cause::WorkerPanicked);
            panicked += 1;
        }
    }
    assert!(panicked > 1, "the panic came too late");
    for transfer in transfers {
        assert!(transfer.wait_released(LONG), "memory comes back");
    }
}

/// Whoever owned them: both workers have parts of each.
#[test]
fn pulls_of_a_worker_that_panics() {
    for (path, worker) in PATHS.into_iter().zip([0, 1, 0, 1]) {
        // None is over before the panic.
        let (producer, consumer, instance, address) = pair_with(path, Some("delay=1:5ms"));
        let ticket = producer
            .engine
            .offer(&RequestId::from("r"), &groups(0..BLOCKS), 1, LONG)
            .expect("an offer");
        let pull = |tag: u32| {
            let options = PullOptions {
                tag: tag.into(),
                hold: true,
                ..PullOptions::default()
            };
            // Each has destinations of its own.
            let of = |b: &u32| b % PULLS == tag;
            let pairs = (0..BLOCKS).filter(of).map(|dst| BlockPair {
                src: BLOCKS - 1 - dst,
                dst,
            });
            let wanted = [GroupPairs {
                group: 0,
                pairs: pairs.collect(),
            }];
            instance.pull(&ticket, &wanted, options).expect("a pull")
        };
        let transfers: Vec<Transfer> = (0..PULLS).map(pull).collect();
        consumer.panic(worker);
        all_end(&transfers);
        for (tag, transfer) in (0..).zip(&transfers) {
            let outcome = transfer.outcome().expect("it has come");
            if let Some(failure) = outcome.failure() {
                let of = |b: &u32| b % PULLS == tag;
                let blocks = (0..BLOCKS).filter(of).collect();
                let invalid = [GroupBlocks { group: 0, blocks }];
                assert_eq!(failure.invalid_blocks, invalid);
            }
        }
        consumer.recycle();
        // Each has told its outcome once, and its release if its memory was held back.
        let mut seen = Vec::new();
        wait_for(&consumer.engine, &mut seen, |event| {
            matches!(
                event,
                Event::PeerDown {
                    cause: Cause::WorkerPanicked,
                    ..
                }
            )
        });
        let mut held = 0;
        let mut tags = Vec::new();
        for event in &seen {
            match event {
                Event::Received { tag, .. } => tags.push(*tag),
                Event::Failed { tag, memory, .. } => {
                    tags.push(*tag);
                    held += u32::from(*memory == MemoryState::Quarantined);
                }
                Event::Released { .. } => held -= 1,
                _ => {}
            }
        }
        tags.sort_unstable();
        assert_eq!(tags, (0..u64::from(PULLS)).collect::<Vec<u64>>());
        assert_eq!(held, 0, "{seen:#?}");
        std::thread::sleep(Duration::from_millis(100));
        consumer.assert_recycled();
        let way = instance.peers()[0].clone();
        drop(instance);
        consumer.takes_no_more(way, &address);
        // Its peer goes on with others.
        let other = node(KvRole::Consumer, path, None);
        let instance = other.engine.connect(&address, LONG).expect("a session");
        let transfer = instance
            .pull(&ticket, &all_blocks(), PullOptions::default())
            .expect("a pull");
        assert!(transfer.wait(LONG).expect("an outcome").is_done());
    }
}

/// On either side of a push.
#[test]
fn pushes_of_a_worker_that_panics() {
    for (path, of_producer) in PATHS.into_iter().flat_map(|p| [(p, true), (p, false)]) {
        let (producer, consumer, instance, address) = pair(path);
        let mut seen = Vec::new();
        let name = PeerName {
            engine: consumer.engine.id().clone(),
            rank: consumer.engine.rank(),
        };
        let mut there = Vec::new();
        wait_for(&producer.engine, &mut there, |event| {
            matches!(event, Event::PeerUp { .. })
        });
        let back = producer.engine.peer_of(&name).expect("a session");
        let request = RequestId::from("r");
        consumer
            .engine
            .expect(&request, &groups(0..BLOCKS), 1, LONG)
            .expect("an expectation");
        let push = back.begin_push(&request).expect("a push");
        producer.fill(SENT);
        for _ in 0..32 {
            push.all_layers(&all_blocks(), None).expect("fits");
        }
        // The consumer knows then who pushes, and ends what it expects of it.
        consumer.await_sent();
        let (broken, of_it) = match of_producer {
            true => (&producer, &back),
            false => (&consumer, &instance.peers()[0]),
        };
        broken.panic(1);
        let Event::Failed { first_cause, .. } = wait_for(&consumer.engine, &mut seen, |event| {
            matches!(event, Event::Failed { .. })
        }) else {
            unreachable!();
        };
        let transfer = push.abort();
        let outcome = transfer.wait(LONG).expect("an outcome");
        let failure = outcome.failure().expect("it was aborted at the latest");
        assert!(transfer.wait_released(LONG), "memory comes back");
        let own = if of_producer {
            &failure.first_cause
        } else {
            &first_cause
        };
        assert_eq!(*own, Cause::WorkerPanicked);
        if !matches!(
            seen.iter().find(|e| matches!(e, Event::Failed { .. })),
            Some(Event::Failed {
                memory: MemoryState::Released,
                ..
            })
        ) {
            wait_for(&consumer.engine, &mut seen, |event| {
                matches!(event, Event::Released { .. })
            });
        }
        consumer.recycle();
        std::thread::sleep(Duration::from_millis(100));
        consumer.assert_recycled();
        let of_it = of_it.clone();
        drop((instance, back));
        if of_producer {
            producer.takes_no_more(of_it, &address);
        } else {
            consumer.takes_no_more(of_it, &address);
        }
    }
}

/// Kernels that post to a push whose worker panics are told, and do not wait until they lose their patience.
#[test]
fn kernels_that_post_to_a_worker_that_panics() {
    for kind in [
        QueueKind::Proxy,
        QueueKind::GpuWqe(Hca::Model),
        QueueKind::Direct(Hca::Model),
    ] {
        // However fast the machine is, not all is over before the panic.
        let (producer, consumer, instance, address) =
            pair_with(PathKind::Arena, Some("delay=1:30ms"));
        let mut there = Vec::new();
        wait_for(&producer.engine, &mut there, |event| {
            matches!(event, Event::PeerUp { .. })
        });
        let back = producer.engine.peer_of(&name_of(&consumer));
        let back = back.expect("a session");
        let request = RequestId::from("r");
        consumer
            .engine
            .expect(&request, &groups(0..BLOCKS), 1, LONG)
            .expect("an expectation");
        let push = back.begin_push(&request).expect("a push");
        let runtime = GpuRuntime::open(RuntimeChoice::Only(RuntimeKind::Host));
        let gpu = runtime.expect("the stand-in").gpu(0).expect("one").clone();
        let mut config = GpuQueueConfig::new(&gpu);
        (config.kind, config.depth, config.patience) = (kind, 8, 4 * LONG);
        let queue = push.gpu_queue(&config).expect("a queue");
        let place = |block| Place {
            group: 0,
            tensor: ALL_TENSORS,
            layer: 1,
            block,
        };
        let moves: Vec<Move> = (0..BLOCKS)
            .map(|block| Move {
                local: place(block).to_word(),
                remote: place(BLOCKS - 1 - block).to_word(),
                len: queue.block_bytes(0, 1).expect("a layer"),
                flags: LOCAL_PLACE | REMOTE_PLACE,
                ..Move::default()
            })
            .collect();
        let posts = Posts {
            moves: &moves,
            posters: 1,
            by: PostBy::Blocks,
            op: PUT,
            until: ALL,
        };
        let kernels = PostKernels::load(&gpu).expect("kernels");
        let stream = Stream::new(&gpu).expect("a stream");
        let posting = kernels.post(&stream, queue.device(), &posts);
        let posting = posting.expect("launched");
        let end = Instant::now() + LONG;
        while queue.report().taken == 0 {
            assert!(Instant::now() < end, "posts are taken");
            std::thread::sleep(Duration::from_millis(1));
        }
        for worker in [0, 1] {
            producer.panic(worker);
        }
        let results = posting.wait(end).expect("the kernel ends");
        let status = |n| Status::from_number(n).expect("a status");
        let ends: Vec<_> = (results.iter())
            .map(|r| (status(r.posted), status(r.ended)))
            .collect();
        let told = |(posted, ended): &(Status, Status)| match posted {
            Status::Ok => ![Status::Timeout, Status::Late].contains(ended),
            posted => [Status::Broken, Status::Stopped].contains(posted),
        };
        assert!(ends.iter().all(told), "{kind:?}: {ends:?}");
        assert!(ends.iter().any(|end| *end != (Status::Ok, Status::Ok)));
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
        let transfer = push.commit().expect("its outcome tells");
        let outcome = transfer.wait(LONG).expect("an outcome");
        let failure = outcome.failure().expect("its worker is gone");
        assert_eq!(failure.first_cause, Cause::WorkerPanicked);
        assert!(transfer.wait_released(LONG), "memory comes back");
        drop(instance);
        producer.takes_no_more(back, &address);
    }
}

pub(super) fn name_of(node: &Node) -> PeerName {
    PeerName {
        engine: node.engine.id().clone(),
        rank: node.engine.rank(),
    }
}

/// The thread of a control connection, on the reading side and on the side that is read.
#[test]
fn links_that_panic() {
    for (path, of_producer) in PATHS.into_iter().flat_map(|p| [(p, true), (p, false)]) {
        // However busy the machine is, what has been begun is not over at once.
        let (producer, consumer, instance, address) = pair_with(path, Some("delay=1:30ms"));
        let ticket = producer
            .engine
            .offer(&RequestId::from("r"), &groups(0..BLOCKS), 1, LONG)
            .expect("an offer");
        let pull = |tag| {
            let options = PullOptions {
                tag,
                hold: true,
                ..PullOptions::default()
            };
            instance.pull(&ticket, &all_blocks(), options).ok()
        };
        let (broken, other) = match of_producer {
            true => (&producer, &consumer),
            false => (&consumer, &producer),
        };
        let mut seen = Vec::new();
        wait_for(&broken.engine, &mut seen, |event| {
            matches!(event, Event::PeerUp { .. })
        });
        let peer = broken.engine.inner().peer_named(&name_of(other));
        let mut transfers: Vec<Transfer> = (0..8).map_while(pull).collect();
        peer.expect("a session").link.panic();
        // Some are under way when the session ends, however long the panic takes to be told.
        let end = Instant::now() + LONG;
        while let Some(transfer) = pull(0) {
            transfers.push(transfer);
            assert!(Instant::now() < end, "the session ends");
            let before_last = transfers.len().saturating_sub(8);
            transfers[before_last].wait(LONG).expect("an outcome");
        }
        let mut panicked = 0;
        for transfer in &transfers {
            let outcome = transfer.wait(LONG).expect("an outcome");
            let failure = outcome.failure().map(|f| &f.first_cause);
            panicked += u32::from(failure == Some(&Cause::WorkerPanicked));
            assert!(transfer.wait_released(LONG), "memory comes back");
        }
        if of_producer {
            // The same as if it had died.
            assert_eq!(panicked, 0);
        } else {
            assert!(panicked > 0, "a session ends under its transfers");
        }
        consumer.recycle();
        wait_for(&broken.engine, &mut seen, |event| {
            matches!(
                event,
                Event::PeerDown {
                    cause: Cause::WorkerPanicked,
                    ..
                }
            )
        });
        std::thread::sleep(Duration::from_millis(100));
        consumer.assert_recycled();
        if of_producer {
            let request = RequestId::from("later");
            let error = producer.engine.offer(&request, &groups(0..1), 1, LONG);
            assert!(matches!(error, Err(Error::WorkerPanicked)), "{error:?}");
        } else {
            let way = instance.peers()[0].clone();
            drop(instance);
            consumer.takes_no_more(way, &address);
        }
    }
}

/// Whichever thread panics over the ledgers: what stands in them ends.
#[test]
fn ledgers_over_which_a_thread_panics() {
    for of_keeper in [true, false] {
        let producer = node(KvRole::Both, PathKind::Arena, None);
        let consumer = node(KvRole::Both, PathKind::Arena, None);
        let address = consumer.engine.listen("127.0.0.1:0").expect("a port");
        let address = address.to_string();
        let to_consumer = producer.engine.connect(&address, LONG).expect("a session");
        let request = RequestId::from("r");
        let lone = RequestId::from("lone");
        let offered = RequestId::from("offered");
        let engine = &consumer.engine;
        engine.expect(&request, &groups(0..8), 1, LONG).expect("r");
        engine.expect(&lone, &groups(8..9), 1, LONG).expect("lone");
        engine
            .offer(&offered, &groups(9..10), 1, LONG)
            .expect("offered");
        // The producer is bound: it has been given the ticket, so that a layer goes out.
        producer.fill(SENT);
        let push = to_consumer.begin_push(&request).expect("a push");
        let pairs = vec![GroupPairs {
            group: 0,
            pairs: vec![BlockPair { src: 0, dst: 0 }],
        }];
        push.layer(0, &pairs, None).expect("fits");
        consumer.await_sent();
        let inner = engine.inner().clone();
        if of_keeper {
            inner.books.with(&inner, |books, _| books.panic = true);
        } else {
            let other = inner.clone();
            let panicked = std::thread::spawn(move || {
                other
                    .books
                    .with(&other, |_, _| panic!("which the test wants"))
            });
            panicked.join().expect_err("it has panicked");
            let error = engine.expect(&RequestId::from("soon"), &groups(20..21), 1, LONG);
            let error = error.expect_err("broken at once");
            assert!(matches!(error, Error::WorkerPanicked), "{error}");
        }
        let mut seen = Vec::new();
        let of = |wanted: &RequestId| {
            let wanted = wanted.clone();
            move |event: &Event| match event {
                Event::Failed {
                    request,
                    first_cause,
                    ..
                } => *request == wanted && *first_cause == Cause::WorkerPanicked,
                Event::Released { request, .. } => *request == wanted,
                _ => false,
            }
        };
        for wanted in [&lone, &offered, &request] {
            wait_for(engine, &mut seen, of(wanted));
        }
        // Whoever was bound is told, and its blocks come back when it has answered.
        let transfer = push.abort();
        assert!(transfer.wait(LONG).expect("an outcome").failure().is_some());
        wait_for(
            engine,
            &mut seen,
            |event| matches!(event, Event::Released { request: of, .. } if *of == request),
        );
        let error = engine.expect(&RequestId::from("later"), &groups(20..21), 1, LONG);
        assert!(matches!(error, Err(Error::WorkerPanicked)), "{error:?}");
        drop((to_consumer, producer));
        let (gone, is_gone) = channel();
        drop(inner);
        std::thread::spawn(move || {
            drop(consumer);
            gone.send(())
        });
        is_gone.recv_timeout(LONG).expect("the drop ends");
    }
}
