//! What an RDMA device has written to a GPU's memory is made visible before it counts, as the GPU needs it; and what
//! a producer's kernels have written is released before a device reads it. On the stand-in, which passes for GPUs
//! that need more than it does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use kvxfer_hipmem::gpu::{HostStep, RuntimeChoice, RuntimeKind};

use super::gpu::GpuSide;
use super::gpu::trial::{DEAF, STEP};
use super::lane_tests::rdma_config;
use super::loopback::Loopback;
use super::panic_tests::{LONG, wait_for};
use super::rail_tests::{BLOCKS, Node, groups, joined_by, pull, push, word};
use crate::bench::{BenchMemory, BenchShape, BenchSide};
use crate::blocks::{BlockPair, GroupPairs};
use crate::config::{Config, ConfigBuilder, FencePolicy, KvRole, PathKind, PathSet};
use crate::engine::worker::Command;
use crate::engine::{Engine, Instance, PullOptions};
use crate::event::{Event, MemoryState, PeerName};
use crate::ids::{Nonce, RequestId};
use crate::layout::{KvFormat, Topology};
use crate::rails::RailSet;
use crate::transfer::{Cause, GpuOperation};
use crate::wire::PushDone;

/// What depends on which rail is free first is tried so often.
const ROUNDS: u64 = 50;

/// On the device that `KVXFER_TEST_RDMA` names for the role, as in `tests/support`.
fn node(
    role: KvRole,
    on_gpu: bool,
    step: Option<HostStep>,
    change: impl FnOnce(&mut Config),
) -> Node {
    let format = KvFormat::opaque(4 << 10, 2).expect("a format");
    let gpu = BenchMemory::Gpu {
        runtime: RuntimeChoice::Only(RuntimeKind::Host),
        ordinal: 0,
    };
    let shape = BenchShape {
        topology: Topology::single(&format),
        format,
        num_blocks: vec![BLOCKS],
        memory: if on_gpu { gpu } else { BenchMemory::Arena },
    };
    let side = BenchSide::new(&shape).expect("memory");
    let mut config = Config {
        kv_role: role,
        path: PathSet::some([PathKind::Rdma, PathKind::Staged]),
        num_worker_threads: 2,
        qp_per_transfer: 2,
        ..rdma_config(role)
    };
    change(&mut config);
    let (format, placement) = (side.format().clone(), side.placement().clone());
    STEP.set(step);
    let engine = Engine::new(config, format, placement);
    STEP.set(None);
    Node {
        engine: engine.expect("an engine"),
        side,
    }
}

/// Both sides' sessions stand.
fn joined(producer: Node, consumer: Node) -> (Node, Node, Instance) {
    let all = joined_by(producer, consumer);
    let name = all.1.name();
    let end = Instant::now() + LONG;
    while all.0.engine.peer_of(&name).is_none() {
        assert!(Instant::now() < end, "the producer's session");
        std::thread::sleep(Duration::from_millis(1));
    }
    all
}

impl Node {
    fn name(&self) -> PeerName {
        PeerName {
            engine: self.engine.id().clone(),
            rank: self.engine.rank(),
        }
    }

    fn gpu(&self) -> &GpuSide {
        self.engine.inner().gpu.as_deref().expect("a GPU's memory")
    }

    fn loopback(&self) -> Option<&Loopback> {
        self.engine.inner().rails[0].loopback.as_deref()
    }

    /// Flushes, and reads that have come back.
    fn seen(&self) -> (u32, u32) {
        let reads = self.loopback().map_or(0, Loopback::ended);
        (count(&self.gpu().trial.flushed), reads)
    }
}

fn count(of: &AtomicU32) -> u32 {
    of.load(Ordering::Relaxed)
}

fn all() -> Vec<GroupPairs> {
    vec![GroupPairs {
        group: 0,
        pairs: (0..BLOCKS).map(|b| BlockPair { src: b, dst: b }).collect(),
    }]
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_what_a_card_wrote_is_made_visible_before_it_counts() {
    for (step, flushes, reads) in [
        (HostStep::Native, 0, 0),
        (HostStep::HostFlush, 1, 0),
        (HostStep::LoopbackRead, 0, 1),
    ] {
        // Straight out of the host's memory, with checksums; and out of a GPU's that has to stage.
        for (verify, staged) in [(true, false), (false, true)] {
            let producer = node(KvRole::Producer, staged, None, |config| {
                config.verify = verify;
                if staged {
                    config.path = PathSet::only(PathKind::Staged);
                }
            });
            let consumer = node(KvRole::Consumer, true, Some(step), |config| {
                config.verify = verify;
            });
            let (producer, consumer, way) = joined(producer, consumer);
            let path = way.path().expect("up").path;
            assert_eq!(path == PathKind::Staged, staged);
            let mut seen = consumer.seen();
            let mut each = |what, times: u32| {
                let now = consumer.seen();
                let more = (now.0 - seen.0, now.1 - seen.1);
                let wanted = (times * flushes, times * reads);
                assert_eq!(more, wanted, "{what} {step:?} {verify} {staged}");
                seen = now;
            };
            let nodes = (&producer, &consumer, &way);
            pull(0, nodes, || {});
            each("pull", 1);
            push(1, nodes, || {});
            // What was staged has been seen when the producer hears of it, layer by layer.
            each("push", if staged { 2 } else { 1 });
        }
    }
}

/// A rail shows what has come over it, and none shows another's.
#[test]
#[ignore = "needs three RDMA devices: the virtual machine of cargo xtask test has some"]
fn on_rdma_each_rail_reads_back_what_it_has_written() {
    let on = |role, name: &str, on_gpu: bool| {
        let mut builder = ConfigBuilder::new();
        let named = builder.flag("rdma_devices", "a test", name);
        let named = named.and_then(|named| named.build()).expect("names");
        let step = on_gpu.then_some(HostStep::LoopbackRead);
        node(role, on_gpu, step, |config| {
            config.rdma_devices = named.rdma_devices;
        })
    };
    let producer = on(KvRole::Producer, "rxe0,ra", false);
    let consumer = on(KvRole::Consumer, "rxe0,rb", true);
    let (producer, consumer, way) = joined(producer, consumer);
    assert_eq!(way.path().expect("up").rails.len(), 2);
    let ended = || -> Vec<u32> {
        let rails = consumer.engine.inner().rails.iter();
        let loopbacks = rails.map(|rail| rail.loopback.as_deref().expect("it reads back"));
        loopbacks.map(Loopback::ended).collect()
    };
    let nodes = (&producer, &consumer, &way);
    // Who is free takes the next batch, so one rail may carry all of a transfer: until both have carried some.
    let both = |what: &str, once: &mut dyn FnMut(u64)| {
        let mut carried = [false; 2];
        for round in 0..ROUNDS {
            let before = ended();
            once(round);
            let read: Vec<u32> = ended()
                .iter()
                .zip(&before)
                .map(|(now, then)| now - then)
                .collect();
            assert!(
                read == [1, 1] || read == [1, 0] || read == [0, 1],
                "{what} {round}: {read:?}"
            );
            carried = [carried[0] || read[0] > 0, carried[1] || read[1] > 0];
            if carried == [true; 2] {
                return;
            }
        }
        panic!("{what}: {carried:?}");
    };
    both("pull", &mut |round| pull(round, nodes, || {}));
    both("push", &mut |round| {
        push(round, nodes, || {});
    });
    // One that shows nothing makes what came over both count for nothing.
    let second = consumer.engine.inner().rails[1].loopback.as_deref();
    second.expect("it reads back").break_once();
    let mut outcomes = (0..ROUNDS).map(|round| {
        let request = format!("r {round}");
        let offer = producer
            .engine
            .offer(&request.as_str().into(), &groups(), 1, LONG);
        let pulled = way.pull(&offer.expect("room"), &all(), PullOptions::default());
        pulled.expect("a pull").wait(LONG).expect("an outcome")
    });
    let outcome = outcomes.find(|outcome| outcome.failure().is_some());
    let outcome = outcome.expect("one that came over the second rail");
    let failure = outcome.failure().expect("it cannot be known");
    let operation = GpuOperation::Visibility;
    assert_eq!(failure.first_cause, Cause::Gpu { operation, code: 0 });
    pull(2, nodes, || {});
}

/// A peer that tells the end of what nobody expects, again and again, has nothing read back and nothing kept for it.
#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_ends_of_pushes_that_nobody_expects_are_not_looked_into() {
    let producer = node(KvRole::Producer, false, None, |_| {});
    let consumer = node(KvRole::Consumer, true, Some(HostStep::LoopbackRead), |_| {});
    let (producer, consumer, way) = joined(producer, consumer);
    let nodes = (&producer, &consumer, &way);
    push(0, nodes, || {});
    let before = consumer.seen();
    for nonce in 0..100 {
        let done = PushDone {
            request: "push 0".into(),
            nonce: Nonce(nonce),
            sender: producer.engine.rank(),
            bytes: 0,
            sums: 0,
            rails: RailSet::only(0),
            rail: 0,
        };
        told(&consumer, &producer, done);
    }
    // Behind them on the same queue pairs.
    push(1, nodes, || {});
    assert_eq!(consumer.seen(), (before.0, before.1 + 1));
}

fn told(consumer: &Node, producer: &Node, done: PushDone) {
    let session = producer.engine.inner().peer_named(&consumer.name());
    let peer = session.expect("a session");
    let worker = peer.workers[0];
    let at = Arc::clone(&peer);
    at.on_worker(worker, Command::Tell { peer, done });
}

/// Waits until so many queue pairs of the rail's have been read back.
fn until_reads(consumer: &Node, wanted: u32) {
    let end = Instant::now() + LONG;
    while consumer.seen().1 < wanted {
        assert!(Instant::now() < end, "{wanted} reads");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// While bytes are read back, their push is told again: that is kept once. Told otherwise, it is a lie.
#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_what_is_told_again_is_read_back_once() {
    for lies in [false, true] {
        let producer = node(KvRole::Producer, false, None, |_| {});
        let step = Some(HostStep::LoopbackRead);
        // What each of several workers has heard the others do not know.
        let consumer = node(KvRole::Consumer, true, step, |config| {
            config.num_worker_threads = 1;
        });
        let (producer, consumer, way) = joined(producer, consumer);
        let request = RequestId::from("w");
        let ticket = consumer.engine.expect(&request, &groups(), 1, LONG);
        let ticket = ticket.expect("an expectation");
        let peer = producer.engine.peer_of(&consumer.name());
        let peer = peer.expect("a session");
        let before = consumer.seen().1;
        let loopback = consumer.loopback().expect("it reads back");
        loopback.hold(true);
        let push = peer.begin_push(&request).expect("a push");
        push.all_layers(&all(), None).expect("fits");
        let sent = push.commit().expect("all of it");
        assert!(sent.wait(LONG).is_some_and(|sent| sent.failure().is_none()));
        let bytes = sent.report().bytes;
        for _ in 0..20 {
            let done = PushDone {
                request: request.clone(),
                nonce: ticket.nonce,
                sender: producer.engine.rank(),
                bytes: bytes + u64::from(lies),
                sums: 0,
                rails: RailSet::only(0),
                rail: 0,
            };
            told(&consumer, &producer, done);
        }
        if lies {
            let end = Instant::now() + LONG;
            while way.is_up() {
                assert!(Instant::now() < end, "it is cut off");
                std::thread::sleep(Duration::from_millis(1));
            }
            loopback.hold(false);
            continue;
        }
        // Behind them on the same queue pairs.
        std::thread::sleep(Duration::from_millis(200));
        loopback.hold(false);
        until_reads(&consumer, before + 1);
        let mut seen = Vec::new();
        let received = |event: &Event| matches!(event, Event::Received { .. });
        wait_for(&consumer.engine, &mut seen, received);
        assert_eq!(consumer.seen().1, before + 1);
    }
}

/// What a producer has written and given up has landed before its blocks are free.
#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_a_push_that_is_given_up_is_read_back_before_its_blocks_are_free() {
    let producer = node(KvRole::Producer, false, None, |_| {});
    let step = Some(HostStep::LoopbackRead);
    let consumer = node(KvRole::Consumer, true, step, |_| {});
    let (producer, consumer, _way) = joined(producer, consumer);
    let request = RequestId::from("w");
    let expected = consumer.engine.expect(&request, &groups(), 1, LONG);
    expected.expect("an expectation");
    let peer = producer.engine.peer_of(&consumer.name());
    let peer = peer.expect("a session");
    let before = consumer.seen().1;
    let loopback = consumer.loopback().expect("it reads back");
    loopback.hold(true);
    let push = peer.begin_push(&request).expect("a push");
    push.layer(0, &all(), None).expect("fits");
    drop(push);
    let end = Instant::now() + LONG;
    while loopback.under_way() == 0 {
        assert!(Instant::now() < end, "it is closed");
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut events = Vec::new();
    consumer
        .engine
        .wait_events(&mut events, Duration::from_millis(100));
    let of = |event: &Event| event.request().is_some_and(|(r, _)| *r == request);
    assert!(!events.iter().any(of), "{events:?}");
    loopback.hold(false);
    wait_for(&consumer.engine, &mut events, of);
    assert_eq!(consumer.seen().1, before + 1);
}

/// The end of a push is on its way, or its bytes are read back, when its producer says goodbye.
#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_a_push_that_is_done_outlives_its_producer() {
    for step in [HostStep::Native, HostStep::LoopbackRead] {
        for round in 0..5 {
            let producer = node(KvRole::Producer, false, None, |_| {});
            let consumer = node(KvRole::Consumer, true, Some(step), |_| {});
            let (producer, consumer, _way) = joined(producer, consumer);
            let request = RequestId::from("w");
            let expected = consumer.engine.expect(&request, &groups(), 1, LONG);
            expected.expect("an expectation");
            let peer = producer.engine.peer_of(&consumer.name());
            let peer = peer.expect("a session");
            let push = peer.begin_push(&request).expect("a push");
            push.all_layers(&all(), None).expect("fits");
            let sent = push.commit().expect("all of it").wait(LONG);
            assert!(sent.is_some_and(|sent| sent.failure().is_none()));
            drop((peer, producer));
            let mut seen = Vec::new();
            let of = |event: &Event| event.request().is_some_and(|(r, _)| *r == request);
            wait_for(&consumer.engine, &mut seen, of);
            let received = |event: &Event| matches!(event, Event::Received { .. });
            let received = seen.iter().any(|event| of(event) && received(event));
            assert!(received, "{step:?} {round}: {seen:?}");
        }
    }
}

/// Memory that is only read needs nothing of it, and no queue pairs for it.
#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_a_producer_releases_what_its_kernels_wrote_before_a_card_reads_it() {
    for (fence, releases) in [
        (FencePolicy::On, 2),
        (FencePolicy::Verify, 2),
        (FencePolicy::Off, 0),
    ] {
        let step = Some(HostStep::LoopbackRead);
        let producer = node(KvRole::Producer, true, step, |config| config.fence = fence);
        assert!(producer.loopback().is_none());
        let consumer = node(KvRole::Consumer, false, None, |_| {});
        let (producer, consumer, way) = joined(producer, consumer);
        let nodes = (&producer, &consumer, &way);
        // One a layer.
        push(0, nodes, || {});
        assert_eq!(count(&producer.gpu().trial.released), releases, "{fence}");
        // An offer's kernels have ended with one of their own.
        pull(1, nodes, || {});
        assert_eq!(count(&producer.gpu().trial.released), releases, "{fence}");
    }
}

/// A device that reads nothing back is found out when the engine starts, not by the first transfer.
#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_memory_that_cannot_be_read_back_is_staged() {
    DEAF.set(true);
    let consumer = node(KvRole::Consumer, true, Some(HostStep::LoopbackRead), |_| {});
    DEAF.set(false);
    let producer = node(KvRole::Producer, false, None, |_| {});
    let (producer, consumer, way) = joined(producer, consumer);
    let path = way.path().expect("up");
    assert_eq!(path.path, PathKind::Staged);
    let why = path.candidates.iter().map(|of| format!("{of:?}"));
    let why: Vec<String> = why
        .filter(|of| of.contains("read its own memory"))
        .collect();
    assert_eq!(why.len(), 1, "{:?}", path.candidates);
    pull(0, (&producer, &consumer, &way), || {});
}

/// What nobody knows to be visible does not count.
#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_what_cannot_be_read_back_does_not_count() {
    for verify in [false, true] {
        let producer = node(KvRole::Producer, false, None, |_| {});
        let step = Some(HostStep::LoopbackRead);
        let consumer = node(KvRole::Consumer, true, step, |config| {
            config.verify = verify;
        });
        let (producer, consumer, way) = joined(producer, consumer);
        let loopback = consumer.loopback().expect("it reads back");
        producer.fill(|at| word(0, at));
        let offer = producer.engine.offer(&"r".into(), &groups(), 1, LONG);
        loopback.break_once();
        let pulled = way.pull(&offer.expect("room"), &all(), PullOptions::default());
        let outcome = pulled.expect("a pull").wait(LONG).expect("an outcome");
        let failure = outcome.failure().expect("it cannot be known");
        let operation = GpuOperation::Visibility;
        let cause = Cause::Gpu { operation, code: 0 };
        assert_eq!(failure.first_cause, cause);
        assert_eq!(failure.memory, MemoryState::Released);
        let invalid = failure
            .invalid_blocks
            .iter()
            .map(|group| group.blocks.len());
        assert_eq!(invalid.sum::<usize>(), BLOCKS as usize);
        // Others come after it.
        pull(1, (&producer, &consumer, &way), || {});

        // A push cannot be asked for again: its session ends.
        loopback.break_once();
        let request = RequestId::from("w");
        let expected = consumer.engine.expect(&request, &groups(), 1, LONG);
        expected.expect("an expectation");
        let peer = producer.engine.peer_of(&consumer.name());
        let peer = peer.expect("a session");
        let push = peer.begin_push(&request).expect("a push");
        push.all_layers(&all(), None).expect("fits");
        let _ = push.commit().expect("all of it").wait(LONG);
        let mut seen = Vec::new();
        let of = |event: &Event| event.request().is_some_and(|(r, _)| *r == request);
        wait_for(&consumer.engine, &mut seen, of);
        let received = |event: &Event| matches!(event, Event::Received { .. });
        assert!(
            !seen.iter().any(|event| of(event) && received(event)),
            "{seen:?}"
        );
        assert!(way.wait_up(LONG), "set up anew");
        pull(2, (&producer, &consumer, &way), || {});
    }
}
