//! Blocks that go through pinned host memory, because one side's are a GPU's and the other's GPU does not reach
//! them: on the stand-in, or on the runtime that `KVXFER_TEST_GPU` names, where a test fails if there is no GPU.
//! (Checksums, lives of a peer and its deaths over this path: tests/verify.rs, tests/cycles.rs, tests/faults.)

mod support;

use std::time::Duration;

use kvxfer::bench::BenchMemory;
use kvxfer::config::{KvRole, PathKind, PathSet};
use kvxfer::engine::{Instance, Outcome, Peer, PullOptions};
use kvxfer::event::{Event as Told, MemoryState};
use kvxfer::ids::RequestId;
use kvxfer::ticket::Ticket;
use kvxfer::transfer::Cause;
use support::{
    LONG, Log, Node, Recipe, dealt, gpu_memory, groups, pairs, recipe, take_time, until,
};

const SEED: u64 = 23;

/// Where a side's blocks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mem {
    Gpu,
    Host,
}

use Mem::{Gpu, Host};

/// The producer's and the consumer's, where one at least is a GPU's.
const MEMORIES: [(Mem, Mem); 3] = [(Gpu, Host), (Host, Gpu), (Gpu, Gpu)];
const BENEATH: [PathKind; 3] = [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp];

/// A side over one path beneath, with the smallest buffers.
fn side(role: KvRole, mem: Mem, beneath: PathKind, (block, blocks): (u64, u32)) -> Recipe {
    let way = match beneath {
        // It names the devices.
        PathKind::Rdma => PathKind::Rdma,
        _ => PathKind::Staged,
    };
    let mut recipe = recipe(role, way, block, blocks).with(|config| {
        config.path = match beneath {
            // Cards that may reach the memory themselves do.
            PathKind::Rdma => PathSet::only(PathKind::Staged),
            _ => PathSet::some([PathKind::Staged, beneath]),
        };
        config.staging_slot_bytes.0 = 64 << 10;
        config.staging_slots = 4;
    });
    recipe.memory = match (mem, beneath) {
        (Gpu, _) => gpu_memory(role),
        (Host, PathKind::ProcessVm) => BenchMemory::Anonymous,
        (Host, _) => BenchMemory::Arena,
    };
    recipe
}

fn made(recipe: &Recipe) -> Node {
    let node = recipe.node();
    match recipe.config.kv_role {
        KvRole::Producer => node.side.fill(SEED).expect("filled"),
        _ => node.side.poison().expect("poisoned"),
    }
    node
}

/// A producer and a consumer.
fn two(mems: (Mem, Mem), beneath: PathKind, size: (u64, u32)) -> (Node, Node) {
    (
        made(&side(KvRole::Producer, mems.0, beneath, size)),
        made(&side(KvRole::Consumer, mems.1, beneath, size)),
    )
}

fn meet(producer: &Node, consumer: &Node) -> Instance {
    let address = producer.engine.listen("127.0.0.1:0").expect("a free port");
    let address = address.to_string();
    consumer.engine.connect(&address, LONG).expect("a session")
}

/// The consumer, as the producer pushes to it.
fn way_back(producer: &Node, consumer: &Node) -> Peer {
    let name = consumer.name();
    until("the session is up", || {
        producer.engine.peer_of(&name).is_some()
    });
    producer.engine.peer_of(&name).expect("up")
}

fn offer(producer: &Node, request: &str, blocks: u32) -> Ticket {
    let request = RequestId::from(request);
    let offered = producer.engine.offer(&request, &groups(0..blocks), 1, LONG);
    offered.expect("room")
}

fn received(log: &mut Log, request: &RequestId) {
    let of = |event: &Told| event.request().is_some_and(|(r, _)| r == request);
    let event = log.wait("end", |event| {
        of(event) && !matches!(event, Told::Released { .. })
    });
    assert!(matches!(event, Told::Received { .. }), "{event:?}");
}

/// Blocks of one size are pulled and pushed, in another order, and nothing else is written.
fn both_ways(mems: (Mem, Mem), beneath: PathKind, size: (u64, u32)) {
    let (producer, consumer) = two(mems, beneath, size);
    let instance = meet(&producer, &consumer);
    let path = instance.path().expect("up");
    assert_eq!((path.path, path.over), (PathKind::Staged, Some(beneath)));
    let way = way_back(&producer, &consumer);
    assert_eq!(way.path().expect("up").path, PathKind::Staged);
    let mut log = Log::new(&consumer.engine);
    let blocks = size.1;
    let some = blocks - blocks / 3;
    let table = pairs((0..some).map(|b| (b, blocks - 1 - b)));
    let ticket = offer(&producer, "r", blocks);
    let pull = instance.pull(&ticket, &table, PullOptions::default());
    let pull = pull.expect("a pull");
    assert_eq!(
        pull.wait(LONG),
        Some(Outcome::Done),
        "{mems:?} {beneath} {size:?}"
    );
    consumer.side.verify(SEED, &table).expect("every byte");
    consumer.assert_untouched_but(blocks - some..blocks);
    assert_eq!(pull.report().bytes, size.0 * u64::from(some) * 2);

    consumer.side.poison().expect("poisoned");
    let request = RequestId::from("w");
    (consumer.engine)
        .expect(&request, &groups(0..blocks), 1, LONG)
        .expect("room");
    let push = way.begin_push(&request).expect("a push");
    for layer in [1, 0] {
        push.layer(layer, &table, None).expect("fits");
    }
    let sent = push.commit().expect("committed");
    assert_eq!(
        sent.wait(LONG),
        Some(Outcome::Done),
        "{mems:?} {beneath} {size:?}"
    );
    received(&mut log, &request);
    consumer.side.verify(SEED, &table).expect("every byte");
    consumer.assert_untouched_but(blocks - some..blocks);
    log.assert_told_once();
}

#[test]
fn blocks_go_both_ways_between_all_kinds_of_memory() {
    for mems in MEMORIES {
        for beneath in BENEATH {
            both_ways(mems, beneath, (16 << 10, 64));
        }
    }
}

/// Sizes that no word and no buffer is a multiple of; blocks that are many, and such as one buffer does not hold.
#[test]
fn odd_sizes_and_many_blocks() {
    for (at, size) in [(8, 3000), (1032, 700), (65_544, 9), (200_008, 5)]
        .into_iter()
        .enumerate()
    {
        for (mems, beneath) in MEMORIES
            .into_iter()
            .zip(BENEATH.into_iter().cycle().skip(at))
        {
            both_ways(mems, beneath, size);
        }
    }
}

/// Over network cards, which read and write the pinned memory.
#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_blocks_go_through_pinned_memory() {
    for mems in MEMORIES {
        both_ways(mems, PathKind::Rdma, (16 << 10, 64));
        both_ways(mems, PathKind::Rdma, (65_544, 9));
    }
}

/// Many blocks, so that a transfer takes a while; its work requests take their time too.
fn slow(mems: (Mem, Mem), beneath: PathKind) -> (Node, Node) {
    let size = (64 << 10, 128);
    let consumer = side(KvRole::Consumer, mems.1, beneath, size).with(take_time);
    (
        made(&side(KvRole::Producer, mems.0, beneath, size)),
        made(&consumer),
    )
}

/// What is stopped lets go of blocks and buffers: nothing is written any more, and what comes next finds room.
#[test]
fn what_is_stopped_lets_go() {
    for (mems, beneath) in MEMORIES.into_iter().zip(BENEATH) {
        stopped(mems, beneath);
    }
}

fn stopped(mems: (Mem, Mem), beneath: PathKind) {
    let (producer, consumer) = slow(mems, beneath);
    let instance = meet(&producer, &consumer);
    let way = way_back(&producer, &consumer);
    let mut log = Log::new(&consumer.engine);
    let ticket = offer(&producer, "r", 128);
    let table = pairs((0..128).map(|b| (b, 127 - b)));
    for tag in 0..12 {
        let late = tag % 3 == 1;
        let options = PullOptions {
            tag,
            hold: true,
            deadline: late.then_some(Duration::from_millis(15)),
            ..PullOptions::default()
        };
        let pull = instance.pull(&ticket, &table, options).expect("a pull");
        std::thread::sleep(Duration::from_millis(2 * tag));
        if !late {
            pull.cancel();
        }
        let outcome = pull.wait(LONG).expect("an outcome");
        let failure = outcome.failure().expect("it takes longer");
        let cause = if late {
            Cause::DeadlinePassed
        } else {
            Cause::Cancelled
        };
        assert_eq!(failure.first_cause, cause);
        assert!(pull.wait_released(LONG), "memory comes back");
        consumer.side.poison().expect("poisoned");
    }
    for round in 0..6 {
        let request = RequestId::from(format!("w{round}").as_str());
        (consumer.engine)
            .expect(&request, &groups(0..128), 1, LONG)
            .expect("room");
        let push = way.begin_push(&request).expect("a push");
        push.all_layers(&table, None).expect("fits");
        std::thread::sleep(Duration::from_millis(4 * round));
        let aborted = push.abort();
        assert!(aborted.wait(LONG).is_some_and(|outcome| !outcome.is_done()));
        assert!(aborted.wait_released(LONG));
        let of = |event: &Told| event.request().is_some_and(|(r, _)| *r == request);
        let Told::Failed { memory, .. } = log.wait("failure", of) else {
            panic!("a push that was aborted has arrived");
        };
        if memory == MemoryState::Quarantined {
            log.wait(
                "release",
                |event| matches!(event, Told::Released { request: r, .. } if *r == request),
            );
        }
        consumer.side.poison().expect("poisoned");
    }
    std::thread::sleep(Duration::from_millis(50));
    consumer.assert_untouched_but([]);
    // All buffers are there again.
    let whole = PullOptions {
        tag: 99,
        ..PullOptions::default()
    };
    let pull = instance.pull(&ticket, &table, whole).expect("a pull");
    assert_eq!(pull.wait(LONG), Some(Outcome::Done), "{mems:?} {beneath}");
    consumer.side.verify(SEED, &table).expect("every byte");
    log.assert_told_once();
    assert_eq!(log.count(|event| matches!(event, Told::PeerDown { .. })), 0);
}

/// Lost and failing work requests, queue pairs and streams: what is done is right, what is not says so, and the
/// memory comes back.
#[test]
fn a_device_that_fails() {
    let plans = [
        "seed=11,delay=0.2:2ms,reorder=0.2:2ms",
        "seed=12,key=0.01",
        "seed=13,qp-fatal=0.01",
        "seed=14,cut=0.01",
        "seed=15,wr-error=0.01:retry-exc",
        "seed=16,drop=0.003",
        "seed=17,stray=0.02",
    ];
    for (at, plan) in plans.into_iter().enumerate() {
        let beneath = if plan.contains("cut") {
            PathKind::Tcp
        } else {
            BENEATH[at % 3]
        };
        let mems = MEMORIES[at % 3];
        let size = (24 << 10, 64);
        let producer = made(&side(KvRole::Producer, mems.0, beneath, size));
        let consumer = side(KvRole::Consumer, mems.1, beneath, size);
        let consumer = made(&consumer.with(|config| {
            config.faults = Some(plan.parse().expect("a plan"));
        }));
        let instance = meet(&producer, &consumer);
        let mut log = Log::new(&consumer.engine);
        let table = pairs((0..64).map(|b| (b, 63 - b)));
        let ticket = offer(&producer, "r", 64);
        let (mut done, mut failed) = (0, 0);
        for tag in 0..20 {
            consumer.side.poison().expect("poisoned");
            let options = PullOptions {
                tag,
                hold: true,
                // Nobody else notices bytes that come from elsewhere.
                verify: Some(plan.contains("stray")),
                deadline: Some(Duration::from_secs(2)),
                ..PullOptions::default()
            };
            let mut pull = None;
            // The session may be on its way back.
            until("a pull", || {
                pull = instance.pull(&ticket, &table, options.clone()).ok();
                pull.is_some()
            });
            let pull = pull.expect("just found");
            match pull.wait(LONG).expect("an outcome") {
                Outcome::Done => {
                    consumer.side.verify(SEED, &table).expect("every byte");
                    done += 1;
                }
                _ => failed += 1,
            }
            assert!(pull.wait_released(LONG), "memory comes back");
        }
        println!("{plan} over {beneath}: {done} done, {failed} failed");
        assert!(done > 0, "{plan}: {failed} failed");
        log.assert_told_once();
    }
}

/// Several consumers and few buffers: each gets on.
#[test]
fn peers_share_the_buffers() {
    let size = (64 << 10, 64);
    let producer = made(&side(KvRole::Producer, Gpu, PathKind::Arena, size));
    let address = producer.engine.listen("127.0.0.1:0").expect("a port");
    let address = address.to_string();
    let consumers: Vec<Node> = (0..6)
        .map(|i| {
            let mem = if i % 2 == 0 { Gpu } else { Host };
            made(&side(KvRole::Consumer, mem, PathKind::Arena, size))
        })
        .collect();
    let table = pairs((0..64).map(|b| (b, 63 - b)));
    let (mut pulls, mut instances) = (Vec::new(), Vec::new());
    for (i, consumer) in (0..).zip(&consumers) {
        let instance = consumer.engine.connect(&address, LONG).expect("a session");
        let ticket = offer(&producer, &format!("r{i}"), 64);
        for (tag, part) in (0..).zip(dealt(&table, 8)) {
            let options = PullOptions {
                tag,
                hold: true,
                ..PullOptions::default()
            };
            pulls.push(instance.pull(&ticket, &part, options).expect("a pull"));
        }
        instances.push(instance);
    }
    for pull in &pulls {
        assert_eq!(pull.wait(LONG), Some(Outcome::Done));
    }
    for consumer in &consumers {
        consumer.side.verify(SEED, &table).expect("every byte");
    }
}

/// The way says what it is, and why it is no better one.
#[test]
fn the_reason_is_told() {
    let size = (4096, 8);
    let reason = |producer: &Recipe, consumer: &Recipe| {
        let (producer, consumer) = (made(producer), made(consumer));
        let instance = meet(&producer, &consumer);
        let path = instance.path().expect("up");
        assert_eq!(path.path, PathKind::Staged, "{path:?}");
        path
    };
    let of = |role, mem| {
        let mut recipe = side(role, mem, PathKind::Arena, size);
        recipe.config.path = PathSet::auto();
        recipe
    };
    // A GPU reads and writes memory of the host that it can be given: this has no file.
    let (mut host, gpu) = (of(KvRole::Producer, Host), of(KvRole::Consumer, Gpu));
    host.memory = BenchMemory::Anonymous;
    let path = reason(&host, &gpu);
    assert_eq!(path.over, Some(PathKind::ProcessVm));
    let words =
        "over process-vm; not by GPU links: the peer shares no files of its memory with GPUs";
    assert!(path.reason.contains(words), "{}", path.reason);
    // Over what is allowed.
    let both = [Gpu, Gpu].map(|mem| side(KvRole::Producer, mem, PathKind::Tcp, size));
    let consumer = side(KvRole::Consumer, Gpu, PathKind::Tcp, size);
    let path = reason(&both[0], &consumer);
    assert_eq!(path.over, Some(PathKind::Tcp));
    let words = "over tcp; not by GPU links: the configuration does not allow it";
    assert!(path.reason.contains(words), "{}", path.reason);
    // A GPU and the host take the GPU's way if they may, and so do two GPUs of one node.
    let (first, second) = (of(KvRole::Producer, Gpu), of(KvRole::Consumer, Host));
    let (first, second) = (made(&first), made(&second));
    let path = meet(&first, &second).path().expect("up");
    assert_eq!((path.path, path.over), (PathKind::Ipc, None));
    let (first, second) = (of(KvRole::Producer, Gpu), of(KvRole::Consumer, Gpu));
    let (first, second) = (made(&first), made(&second));
    let path = meet(&first, &second).path().expect("up");
    assert_eq!((path.path, path.over), (PathKind::Ipc, None));
    // Between memories of the host there is nothing to stage.
    let mut hosts = [KvRole::Producer, KvRole::Consumer].map(|role| of(role, Host));
    hosts[1].config.path = PathSet::only(PathKind::Staged);
    let [host, consumer] = hosts.each_ref().map(made);
    let address = host.engine.listen("127.0.0.1:0").expect("a port");
    let refused = consumer.engine.connect(&address.to_string(), LONG);
    let Err(kvxfer::Error::NoPath { candidates, .. }) = refused else {
        panic!("nothing was refused");
    };
    let staged = candidates.iter().find(|c| c.path == PathKind::Staged);
    let why_not = staged.and_then(|c| c.why_not.as_deref());
    assert_eq!(why_not, Some("neither side's memory is a GPU's"));
}
