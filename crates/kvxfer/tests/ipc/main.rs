//! Blocks that go from GPU to GPU, or between a GPU and the host's memory, by a GPU's launches: on the stand-in, or on the runtime that `KVXFER_TEST_GPU` names, where a test
//! fails if there is no GPU. (Checksums, lives of a peer and its deaths over this path: tests/verify.rs,
//! tests/cycles.rs, tests/faults.)

#[path = "../support/mod.rs"]
mod support;

mod hosts;

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer::config::{Config, FencePolicy, KvRole, PathKind, PathSet};
use kvxfer::engine::{Engine, Instance, Outcome, Peer, PullOptions, PushOptions, Transfer};
use kvxfer::event::{Event as Told, MemoryState};
use kvxfer::ids::RequestId;
use kvxfer::mem::gpu::{Copy, Event, GpuMemory, PinnedMemory, Place, Stream};
use kvxfer::ticket::Ticket;
use kvxfer::transfer::Cause;
use support::child::{self, Child, Spec};
use support::{LONG, Log, Node, POISON, groups, pairs, recipe, until};

const BLOCK: u64 = 16 << 10;
const BLOCKS: u32 = 64;
const SEED: u64 = 11;

fn node_of(role: KvRole, (block, blocks): (u64, u32), change: impl FnOnce(&mut Config)) -> Node {
    let node = recipe(role, PathKind::Ipc, block, blocks)
        .with(change)
        .node();
    match role {
        KvRole::Producer => node.side.fill(SEED).expect("filled"),
        _ => node.side.poison().expect("poisoned"),
    }
    node
}

fn node(role: KvRole) -> Node {
    node_of(role, (BLOCK, BLOCKS), |_| {})
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
    let engine: &Engine = &producer.engine;
    let offered = engine.offer(&RequestId::from(request), &groups(0..blocks), 1, LONG);
    offered.expect("room")
}

fn memory(node: &Node) -> &GpuMemory {
    node.side.memory()[0].gpu().expect("memory of a GPU")
}

/// Where a block's tensor of layer 0 is in the memory.
fn place(node: &Node, block: u32) -> u64 {
    let tensor = &node.side.placement().desc().tensors()[0];
    tensor.offset + u64::from(block) * tensor.block_stride
}

/// A stream on which so much is to be done before what is put there next that who does not wait for it is found out.
fn busy_stream(node: &Node) -> (Stream, GpuMemory) {
    let gpu = memory(node).gpu();
    let stream = Stream::new(gpu).expect("a stream");
    // A second or two of a GPU's time, some seconds of a processor's. A driver takes about a thousand before it waits for
    // the first of them, so each has to be large.
    let (bytes, rounds) = match on_stand_in() {
        true => (1 << 30, 8),
        false => (8 << 30, 800),
    };
    let room = GpuMemory::new(gpu, bytes).expect("memory");
    for round in (0..=u8::MAX).cycle().take(rounds) {
        drop(stream.fill(&room, 0, bytes, round).expect("a fill"));
    }
    (stream, room)
}

fn mark(stream: &Stream) -> Event {
    let event = Event::new(stream.gpu()).expect("an event");
    event.record(stream).expect("recorded");
    event
}

/// Puts a copy on a stream between pinned memory and a block.
fn copy(stream: &Stream, dst: Place<'_>, src: Place<'_>) {
    let copy = Copy {
        dst,
        src,
        len: BLOCK,
    };
    drop(stream.copy(&[copy]).expect("a copy"));
}

#[test]
fn two_processes_exchange_blocks_both_ways() {
    let spec = |role| Spec {
        role,
        path: PathKind::Ipc,
        block_bytes: BLOCK,
        blocks: BLOCKS,
        listen: "127.0.0.1:0".to_owned(),
        engine_id: None,
        seed: SEED,
        namespace: None,
    };
    let table = pairs((0..BLOCKS).map(|b| (b, BLOCKS - 1 - b)));
    let mut producer = Child::start(&spec(KvRole::Producer));
    let consumer = node(KvRole::Consumer);
    let instance = consumer
        .engine
        .connect(&producer.address, LONG)
        .expect("a session");
    let way = instance.path().expect("up");
    assert_eq!(way.path, PathKind::Ipc);
    let ticket = producer.offer("r", BLOCKS, LONG);
    let pull = instance
        .pull(&ticket, &table, PullOptions::default())
        .expect("a pull");
    assert_eq!(pull.wait(LONG), Some(Outcome::Done));
    consumer.side.verify(SEED, &table).expect("every byte");
    let report = pull.report();
    assert_eq!(report.bytes, BLOCK * u64::from(BLOCKS) * 2);

    let mut log = Log::new(&consumer.engine);
    consumer.side.poison().expect("poisoned");
    let request = RequestId::from("w");
    consumer
        .engine
        .expect(&request, &groups(0..BLOCKS), 1, LONG)
        .expect("room");
    let to: Vec<u32> = (0..7).collect();
    // Its side of the session may come up later.
    until("a push", || {
        producer.try_push(&consumer.name(), "w", "commit", &to)
    });
    log.wait(
        "received",
        |event| matches!(event, Told::Received { request: r, .. } if *r == request),
    );
    let pushed = pairs((0..7).map(|b| (b, b)));
    consumer.side.verify(SEED, &pushed).expect("every byte");
    consumer.assert_untouched_but(0..7);

    let mut other = Child::start(&spec(KvRole::Consumer));
    let source = node(KvRole::Producer);
    let instance = source
        .engine
        .connect(&other.address, LONG)
        .expect("a session");
    other.receive("x", 9, LONG);
    let push = instance.begin_push(&RequestId::from("x")).expect("a push");
    for layer in [1, 0] {
        let part = pairs((0..9).map(|b| (b, b)));
        push.layer(layer, &part, None).expect("fits");
    }
    let sent = push.commit().expect("committed");
    assert_eq!(sent.wait(LONG), Some(Outcome::Done));
    assert_eq!(other.verdict("x"), "good");
}

#[test]
fn a_pushed_layer_is_read_after_its_event() {
    let (producer, consumer) = (node(KvRole::Producer), node(KvRole::Consumer));
    let _instance = meet(&producer, &consumer);
    let way = way_back(&producer, &consumer);
    let mut log = Log::new(&consumer.engine);
    let (stream, _room) = busy_stream(&producer);
    let fresh = PinnedMemory::new(stream.gpu(), BLOCK).expect("memory");
    fresh.host().fill(0, BLOCK, 0x77).expect("inside");
    let at = place(&producer, 3);
    copy(
        &stream,
        Place::Gpu(memory(&producer), at),
        Place::Pinned(&fresh, 0),
    );
    let event = mark(&stream);
    let request = RequestId::from("w");
    consumer
        .engine
        .expect(&request, &groups(0..2), 1, LONG)
        .expect("room");
    let push = way.begin_push(&request).expect("a push");
    push.layer(0, &pairs([(3, 1)]), Some(&event)).expect("fits");
    push.layer(1, &pairs([(4, 0)]), None).expect("fits");
    assert_eq!(
        event.is_done().ok(),
        Some(false),
        "the stream was not busy enough"
    );
    let sent = push.commit().expect("committed");
    assert_eq!(sent.wait(LONG), Some(Outcome::Done));
    assert_eq!(event.is_done().ok(), Some(true), "sent before it was there");
    log.wait("received", |event| matches!(event, Told::Received { .. }));
    let mut got = vec![0; BLOCK as usize];
    memory(&consumer)
        .read(place(&consumer, 1), &mut got)
        .expect("inside");
    assert!(
        got.iter().all(|byte| *byte == 0x77),
        "what was there before"
    );
}

#[test]
fn a_pull_writes_after_its_event_and_is_fenced_for_its_reader() {
    for fence in [FencePolicy::On, FencePolicy::Off, FencePolicy::Verify] {
        let producer = node(KvRole::Producer);
        let sides = (BLOCK, BLOCKS);
        let consumer = node_of(KvRole::Consumer, sides, |config| config.fence = fence);
        let instance = meet(&producer, &consumer);
        let (stream, _room) = busy_stream(&consumer);
        let kept = PinnedMemory::new(stream.gpu(), BLOCK).expect("memory");
        let block = Place::Gpu(memory(&consumer), place(&consumer, 5));
        // The kernels that still read the block.
        copy(&stream, Place::Pinned(&kept, 0), block);
        let after = mark(&stream);
        let reader = Stream::new(stream.gpu()).expect("a stream");
        let options = PullOptions {
            after: Some(after.clone()),
            stream: Some(reader.clone()),
            ..PullOptions::default()
        };
        let table = pairs([(9, 5)]);
        let pull = instance.pull(&offer(&producer, "r", BLOCKS), &table, options);
        let pull = pull.expect("a pull");
        assert_eq!(
            after.is_done().ok(),
            Some(false),
            "the stream was not busy enough"
        );
        assert!(pull.fence().is_none());
        assert_eq!(pull.wait(LONG), Some(Outcome::Done));
        assert_eq!(
            after.is_done().ok(),
            Some(true),
            "written before it was read"
        );
        assert_eq!(kept.host().load_u64(0).ok(), Some(POISON));
        assert_eq!(kept.host().load_u64(BLOCK - 8).ok(), Some(POISON));
        match pull.fence() {
            Some(put) => put.wait(Instant::now() + LONG).expect("everywhere"),
            None => assert_eq!(fence, FencePolicy::Off),
        }
        copy(&reader, Place::Pinned(&kept, 0), block);
        reader.wait(Instant::now() + LONG).expect("it ends");
        assert_ne!(kept.host().load_u64(0).ok(), Some(POISON));
        consumer.side.verify(SEED, &table).expect("every byte");
    }
}

#[test]
fn what_waits_for_a_gpu_ends_when_it_is_told_to() {
    let (producer, consumer) = (node(KvRole::Producer), node(KvRole::Consumer));
    let instance = meet(&producer, &consumer);
    let way = way_back(&producer, &consumer);
    let mut log = Log::new(&consumer.engine);
    let (stream, _room) = busy_stream(&consumer);
    let after = Some(mark(&stream));
    let ticket = offer(&producer, "r", BLOCKS);
    let pull = |deadline, block: u32| {
        let options = PullOptions {
            tag: block.into(),
            after: after.clone(),
            deadline,
            hold: true,
            ..PullOptions::default()
        };
        instance
            .pull(&ticket, &pairs([(0, block)]), options)
            .expect("a pull")
    };
    let cause = |transfer: &Transfer| match transfer.wait(LONG) {
        Some(Outcome::Failed(failure)) => {
            assert!(transfer.wait_released(LONG), "memory comes back");
            failure.first_cause
        }
        other => panic!("{other:?}"),
    };
    let late = pull(Some(Duration::from_millis(20)), 0);
    let unwanted = pull(None, 1);
    unwanted.cancel();
    assert_eq!(cause(&unwanted), Cause::Cancelled);
    assert_eq!(cause(&late), Cause::DeadlinePassed);
    let request = RequestId::from("w");
    consumer
        .engine
        .expect(&request, &groups(2..3), 1, LONG)
        .expect("room");
    let push = way.begin_push(&request).expect("a push");
    push.all_layers(&pairs([(0, 2)]), after.as_ref())
        .expect("fits");
    let aborted = push.abort();
    assert_eq!(cause(&aborted), Cause::Cancelled);
    log.wait(
        "failure",
        |event| matches!(event, Told::Failed { request: r, .. } if *r == request),
    );
    log.assert_told_once();
    assert_eq!(
        after.map(|event| event.is_done().expect("it is there")),
        Some(false),
        "the stream was not busy enough"
    );
    stream.wait(Instant::now() + LONG).expect("it ends");
    consumer.assert_untouched_but([]);
}

/// An event holds a transfer on any path; one that is cancelled meanwhile costs the session nothing, however many
/// workers would have had a part of it.
#[test]
fn what_waits_for_a_gpu_between_memories_of_the_host() {
    let side = |role| recipe(role, PathKind::Arena, BLOCK, BLOCKS).node();
    let (producer, consumer) = (side(KvRole::Producer), side(KvRole::Consumer));
    producer.side.fill(SEED).expect("filled");
    let instance = meet(&producer, &consumer);
    assert_eq!(instance.lanes().expect("up").1, 2, "two workers");
    // Kept: a driver gives memory back when all that runs has ended.
    let elsewhere = node(KvRole::Consumer);
    let (stream, _room) = busy_stream(&elsewhere);
    let after = mark(&stream);
    let ticket = offer(&producer, "r", BLOCKS);
    let mut log = Log::new(&consumer.engine);
    let pull = |tag: u32, after: Option<&Event>| {
        let options = PullOptions {
            tag: tag.into(),
            after: after.cloned(),
            hold: true,
            ..PullOptions::default()
        };
        let pull = instance.pull(&ticket, &pairs([(tag, tag)]), options);
        pull.expect("a pull")
    };
    let unwanted = pull(1, Some(&after));
    unwanted.cancel();
    let outcome = unwanted.wait(LONG).expect("an outcome");
    let failure = outcome.failure().expect("cancelled");
    assert_eq!(failure.first_cause, Cause::Cancelled);
    assert_eq!(failure.memory, MemoryState::Released);
    let waits = pull(2, Some(&after));
    assert_eq!(pull(3, None).wait(LONG), Some(Outcome::Done));
    assert_eq!(
        after.is_done().ok(),
        Some(false),
        "the stream was not busy enough"
    );
    assert_eq!(waits.wait(LONG), Some(Outcome::Done));
    assert_eq!(after.is_done().ok(), Some(true), "written too soon");
    consumer
        .side
        .verify(SEED, &pairs([(2, 2), (3, 3)]))
        .expect("every byte");
    log.assert_told_once();
    assert_eq!(log.count(|event| matches!(event, Told::PeerDown { .. })), 0);
}

/// Blocks so many that one workgroup takes a while.
fn large() -> (u64, u32) {
    (1 << 20, 256)
}

fn on_stand_in() -> bool {
    std::env::var("KVXFER_TEST_GPU").is_err()
}

#[test]
fn a_copy_that_is_cancelled_lets_go_of_its_memory() {
    let (size, slow) = (large(), |config: &mut Config| config.gpu_workgroups = 1);
    let producer = node_of(KvRole::Producer, size, |_| {});
    let consumer = node_of(KvRole::Consumer, size, slow);
    let instance = meet(&producer, &consumer);
    let ticket = offer(&producer, "r", size.1);
    let mut log = Log::new(&consumer.engine);
    let table = pairs((0..size.1).map(|b| (b, size.1 - 1 - b)));
    let mut stopped = 0;
    for tag in 0..5 {
        let options = PullOptions {
            tag,
            hold: true,
            ..PullOptions::default()
        };
        let pull = instance.pull(&ticket, &table, options).expect("a pull");
        std::thread::sleep(Duration::from_millis(3));
        pull.cancel();
        let outcome = pull.wait(LONG).expect("an outcome");
        assert!(pull.wait_released(LONG), "memory comes back");
        stopped += u32::from(!outcome.is_done());
        // What is the owner's again is not written any more.
        consumer.side.poison().expect("poisoned");
        std::thread::sleep(Duration::from_millis(50));
        consumer.assert_untouched_but([]);
    }
    assert!(stopped > 0, "all were done too soon");
    log.assert_told_once();
    // And a push.
    let way = way_back(&producer, &consumer);
    for round in 0..5 {
        let request = RequestId::from(format!("w{round}").as_str());
        consumer
            .engine
            .expect(&request, &groups(0..size.1), 1, LONG)
            .expect("room");
        let push = way.begin_push(&request).expect("a push");
        push.all_layers(&table, None).expect("fits");
        std::thread::sleep(Duration::from_millis(3));
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
        std::thread::sleep(Duration::from_millis(50));
        consumer.assert_untouched_but([]);
    }
}

#[test]
fn a_producer_that_dies_while_it_is_read() {
    let size = large();
    let mut producer = Child::start(&Spec {
        role: KvRole::Producer,
        path: PathKind::Ipc,
        block_bytes: size.0,
        blocks: size.1,
        listen: "127.0.0.1:0".to_owned(),
        engine_id: None,
        seed: SEED,
        namespace: None,
    });
    let consumer = node_of(KvRole::Consumer, size, |config| config.gpu_workgroups = 1);
    let mut log = Log::new(&consumer.engine);
    let instance = consumer
        .engine
        .connect(&producer.address, LONG)
        .expect("a session");
    let ticket = producer.offer("r", size.1, LONG);
    let table = pairs((0..size.1).map(|b| (b, size.1 - 1 - b)));
    let pull = instance
        .pull(&ticket, &table, PullOptions::default())
        .expect("a pull");
    std::thread::sleep(Duration::from_millis(3));
    let running = pull.outcome().is_none();
    producer.die();
    assert!(running, "struck too late");
    let outcome = pull.wait(LONG).expect("an outcome");
    let failure = outcome.failure().expect("its lease cannot be confirmed");
    assert_eq!(failure.first_cause, Cause::PeerDead);
    assert!(pull.wait_released(LONG), "memory comes back");
    consumer.side.poison().expect("poisoned");
    std::thread::sleep(Duration::from_millis(100));
    consumer.assert_untouched_but([]);
    log.assert_told_once();
}

#[test]
fn whoever_asks_for_gpu_links_between_memories_of_the_host_hears_why_not() {
    let side = |role| recipe(role, PathKind::Arena, BLOCK, BLOCKS);
    let producer = side(KvRole::Producer).node();
    let consumer = side(KvRole::Consumer).with(|config| {
        config.path = PathSet::only(PathKind::Ipc);
    });
    let address = producer.engine.listen("127.0.0.1:0").expect("a free port");
    let refused = consumer.node().engine.connect(&address.to_string(), LONG);
    let refused = refused.expect_err("no way");
    let kvxfer::Error::NoPath { candidates, .. } = &refused else {
        panic!("{refused}");
    };
    let ipc = candidates.iter().find(|c| c.path == PathKind::Ipc);
    let why_not = ipc.and_then(|c| c.why_not.as_deref());
    assert_eq!(why_not, Some("neither side's memory is a GPU's"));
}

#[test]
fn a_stream_is_for_memory_of_its_gpu() {
    let consumer = recipe(KvRole::Consumer, PathKind::Arena, BLOCK, BLOCKS).node();
    let producer = recipe(KvRole::Producer, PathKind::Arena, BLOCK, BLOCKS).node();
    let instance = meet(&producer, &consumer);
    let stranger = node(KvRole::Consumer);
    let stream = Some(Stream::new(memory(&stranger).gpu()).expect("a stream"));
    let options = PullOptions {
        stream,
        ..PullOptions::default()
    };
    let refused = instance.pull(&offer(&producer, "r", 1), &pairs([(0, 0)]), options);
    let refused = refused.expect_err("no GPU");
    assert!(
        matches!(refused, kvxfer::Error::StreamWithoutGpu),
        "{refused}"
    );
}

#[test]
fn an_expectation_that_ends_has_nothing_fetched_any_more() {
    let size = large();
    let producer = node_of(KvRole::Producer, size, |_| {});
    let consumer = node_of(KvRole::Consumer, size, |config| config.gpu_workgroups = 1);
    let _instance = meet(&producer, &consumer);
    let way = way_back(&producer, &consumer);
    let mut log = Log::new(&consumer.engine);
    let request = RequestId::from("w");
    let soon = Duration::from_millis(60);
    consumer
        .engine
        .expect(&request, &groups(0..size.1), 1, soon)
        .expect("room");
    let push = way
        .begin_push_with(&request, PushOptions::default())
        .expect("a push");
    let table = pairs((0..size.1).map(|b| (b, size.1 - 1 - b)));
    let mut pushed = 0;
    while pushed < 200 && push.all_layers(&table, None).is_ok() {
        pushed += 1;
    }
    let Told::Failed {
        memory,
        first_cause,
        ..
    } = log.wait("failure", |event| matches!(event, Told::Failed { .. }))
    else {
        panic!("not a failure");
    };
    assert_eq!(first_cause, Cause::DeadlinePassed);
    if memory == MemoryState::Quarantined {
        log.wait("release", |event| matches!(event, Told::Released { .. }));
    }
    consumer.side.poison().expect("poisoned");
    std::thread::sleep(Duration::from_millis(100));
    consumer.assert_untouched_but([]);
    drop(push);
    log.assert_told_once();
}

/// Not a test: what children run.
#[test]
fn child_entry() {
    child::entry();
}

/// A consumer that lets kernels of others write, and a producer in another process.
fn with_links(change: impl FnOnce(&mut Config)) -> (Child, Node, Instance, Log) {
    let producer = Child::start(&Spec {
        role: KvRole::Producer,
        path: PathKind::Ipc,
        block_bytes: BLOCK,
        blocks: BLOCKS,
        listen: "127.0.0.1:0".to_owned(),
        engine_id: None,
        seed: SEED,
        namespace: None,
    });
    let consumer = node_of(KvRole::Consumer, (BLOCK, BLOCKS), |config| {
        config.gpu_links_in = true;
        config.heartbeat_interval = Duration::from_millis(100);
        config.heartbeat_timeout = Duration::from_millis(400);
        change(config);
    });
    let instance = consumer.engine.connect(&producer.address, LONG);
    let instance = instance.expect("a session");
    let log = Log::new(&consumer.engine);
    (producer, consumer, instance, log)
}

fn expect(consumer: &Node, request: &str, blocks: std::ops::Range<u32>) {
    let expected = consumer
        .engine
        .expect(&RequestId::from(request), &groups(blocks), 1, LONG);
    expected.expect("room");
}

fn is_of(event: &Told, request: &str) -> bool {
    event
        .request()
        .is_some_and(|(of, _)| *of == RequestId::from(request))
}

fn is_released(event: &Told, request: &str) -> bool {
    matches!(event, Told::Released { .. }) && is_of(event, request)
}

/// How a request has failed, and what was said of its memory then.
fn failed(log: &mut Log, request: &str) -> (Cause, MemoryState) {
    let failed = |event: &Told| matches!(event, Told::Failed { .. }) && is_of(event, request);
    match log.wait("a failure", failed) {
        Told::Failed {
            first_cause,
            memory,
            ..
        } => (first_cause, memory),
        other => panic!("{other:?}"),
    }
}

/// The kernels of a producer are at work on these blocks.
fn put_in_the_middle(producer: &mut Child, consumer: &Node, request: &str) {
    producer.put_for_ever(&consumer.name(), request, 8);
    let is_there = |block: u32| {
        let of = pairs([(block, block)]);
        consumer.side.verify(SEED, &of).is_ok()
    };
    until("the blocks are there", || (0..8).all(is_there));
}

/// A process that is told to stop is, when all of its threads are.
fn wait_until_stopped(producer: &Child) {
    let state = || {
        let tasks =
            std::fs::read_dir(format!("/proc/{}/task", producer.id())).expect("it is there");
        let states = tasks.map(|task| {
            let stat = task.expect("a thread").path().join("stat");
            let stat = std::fs::read_to_string(stat).unwrap_or_default();
            stat.rsplit(')')
                .next()
                .unwrap_or("")
                .trim()
                .starts_with('T')
        });
        states.collect::<Vec<bool>>()
    };
    until("it is stopped", || {
        state().into_iter().all(|stopped| stopped)
    });
}

#[test]
fn kernels_of_another_process_write_blocks() {
    let (mut producer, consumer, _instance, mut log) = with_links(|_| {});
    expect(&consumer, "r", 0..9);
    let outcome = producer.put_once(&consumer.name(), "r", 9);
    assert!(outcome.contains("Done"), "{outcome}");
    log.wait("its end", |event| {
        matches!(event, Told::Received { .. }) && is_of(event, "r")
    });
    let table = pairs((0..9).map(|b| (b, b)));
    consumer.side.verify(SEED, &table).expect("every byte");
    consumer.assert_untouched_but(0..9);
    log.assert_told_once();
}

/// A producer that is killed while its kernels write: the blocks come back when its process has ended.
#[test]
fn the_blocks_of_a_killed_producers_kernels_come_back() {
    let (mut producer, consumer, _instance, mut log) = with_links(|_| {});
    expect(&consumer, "r", 0..8);
    put_in_the_middle(&mut producer, &consumer, "r");
    producer.die();
    let (cause, memory) = failed(&mut log, "r");
    assert_eq!((cause, memory), (Cause::PeerDead, MemoryState::Quarantined));
    log.wait("its release", |event| is_released(event, "r"));
    // Nobody is left who could write.
    consumer.side.poison().expect("poisoned");
    std::thread::sleep(Duration::from_millis(50));
    consumer.assert_untouched_but([]);
    log.assert_told_once();
}

/// A producer that is stopped goes on writing when it is continued: its blocks stay quarantined though its session is
/// lost, while those of its other pushes, which go by queue pairs, come back. When it is killed, they do.
#[test]
fn the_blocks_of_a_stopped_producers_kernels_stay_quarantined_until_it_is_dead() {
    let (mut producer, consumer, _instance, mut log) = with_links(|_| {});
    expect(&consumer, "links", 0..8);
    expect(&consumer, "queues", 20..24);
    producer.begin_at(&consumer.name(), "queues", 20..24);
    put_in_the_middle(&mut producer, &consumer, "links");
    producer.stop();
    wait_until_stopped(&producer);
    let (_, memory) = failed(&mut log, "links");
    assert_eq!(memory, MemoryState::Quarantined);
    failed(&mut log, "queues");
    // Told in one breath with what is released of the other, or never before the end of the process.
    log.wait("the other's release", |event| is_released(event, "queues"));
    let released = |log: &mut Log| log.count(|event| is_released(event, "links"));
    assert_eq!(released(&mut log), 0, "its kernels go on when it does");
    // Who keeps the time looks at its process, once at least between the ends of these two.
    for request in ["first", "second"] {
        let soon = Duration::from_millis(60);
        let blocks = groups(40..41);
        let expected = consumer
            .engine
            .expect(&RequestId::from(request), &blocks, 1, soon);
        expected.expect("room");
        assert_eq!(failed(&mut log, request).0, Cause::DeadlinePassed);
    }
    assert_eq!(released(&mut log), 0, "it is stopped, and has not ended");
    producer.die();
    log.wait("its release", |event| is_released(event, "links"));
    log.assert_told_once();
}

/// An engine that goes while kernels of another process may write its blocks keeps its memory; where they have ended it
/// does not.
#[test]
fn a_consumer_that_goes_keeps_the_memory_that_kernels_may_write() {
    for have_ended in [true, false] {
        let grace = |config: &mut Config| config.drain_grace = Duration::from_millis(50);
        let (mut producer, consumer, instance, log) = with_links(grace);
        expect(&consumer, "r", 0..8);
        match have_ended {
            true => {
                let outcome = producer.put_once(&consumer.name(), "r", 8);
                assert!(outcome.contains("Done"), "{outcome}");
            }
            false => put_in_the_middle(&mut producer, &consumer, "r"),
        }
        let memory = Arc::downgrade(&consumer.side.placement().memory()[0]);
        drop((instance, log, consumer));
        match have_ended {
            true => until("it is given back", || memory.upgrade().is_none()),
            false => assert!(
                memory.upgrade().is_some(),
                "given back under the kernels of another process"
            ),
        }
    }
}
