//! Engines that stand on several devices, and lose some. The devices are software devices; one is taken for
//! failed when it is said to be, and goes on moving what it has: only what is done about it keeps its
//! late writes from blocks that are somebody else's.

use std::time::{Duration, Instant};

use kvxfer_verbs::{SoftConfig, open_soft};

use super::panic_tests::{LONG, wait_for};
use crate::Error;
use crate::bench::{BenchMemory, BenchShape, BenchSide};
use crate::blocks::{BlockPair, GroupBlocks, GroupPairs};
use crate::config::{Config, KvRole, PathKind, PathSet};
use crate::engine::{Engine, Instance, PullOptions, TransferReport};
use crate::event::{Event, MemoryState, PeerName};
use crate::ids::RequestId;
use crate::layout::{KvFormat, Topology};
use crate::transfer::{Cause, LocalOperation};
use crate::transport::{Opened, SkippedRail};

pub(super) const BLOCKS: u32 = 128;
const QPS: u32 = 2;
const PATHS: [PathKind; 2] = [PathKind::Arena, PathKind::Tcp];

pub(super) struct Node {
    pub(super) engine: Engine,
    pub(super) side: BenchSide,
}

fn node(role: KvRole, path: PathKind, rails: usize) -> Node {
    node_that(role, path, &vec![""; rails], |_| {})
}

/// 64 MiB in two layers.
pub(super) fn side() -> BenchSide {
    let format = KvFormat::opaque(256 << 10, 2).expect("a format");
    let shape = BenchShape {
        topology: Topology::single(&format),
        format,
        num_blocks: vec![BLOCKS],
        memory: BenchMemory::Arena,
    };
    BenchSide::new(&shape).expect("memory")
}

/// One whose devices have these fault plans.
pub(super) fn node_that(
    role: KvRole,
    path: PathKind,
    plans: &[&str],
    change: impl FnOnce(&mut Config),
) -> Node {
    let side = side();
    let mut config = Config {
        kv_role: role,
        path: PathSet::only(path),
        num_worker_threads: 2,
        qp_per_transfer: QPS,
        ..Config::default()
    };
    change(&mut config);
    let open = |plan: &&str| {
        let mut device = SoftConfig::default();
        device.faults = Some(plan.parse().expect("a plan"));
        open_soft(device).expect("a device")
    };
    let opened = Opened {
        contexts: (0_u16..).zip(plans.iter().map(open)).collect(),
        skipped: Vec::new(),
    };
    let (format, placement) = (side.format().clone(), side.placement().clone());
    let engine = Engine::over(opened, config, format, placement);
    Node {
        engine: engine.expect("an engine"),
        side,
    }
}

/// What a producer has at a word, in a round.
pub(super) fn word(round: u64, at: u64) -> u64 {
    (at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ round
}

impl Node {
    pub(super) fn fill(&self, value: impl Fn(u64) -> u64) {
        for memory in self.side.memory() {
            memory.fill_words(0, memory.len(), &value).expect("inside");
        }
    }

    fn holds(&self, value: impl Fn(u64) -> u64) {
        for memory in self.side.memory() {
            memory
                .verify_words(0, memory.len(), &value)
                .expect("as it should be");
        }
    }

    /// Waits until something has arrived.
    fn await_some(&self, round: u64) {
        let memory = &self.side.memory()[0];
        let end = Instant::now() + LONG;
        let step = memory.len() / 64;
        let there = |at: u64| (memory.verify_words(at * step, 8, |i| word(round, i))).is_ok();
        while !(0..64).any(there) {
            assert!(Instant::now() < end, "blocks arrive");
            std::thread::yield_now();
        }
    }

    fn device_fails(&self, rail: usize) {
        let runtime = &self.engine.inner().runtime;
        runtime.rails()[rail].events.give_up(runtime.workers());
    }
}

pub(super) fn groups() -> Vec<GroupBlocks> {
    vec![GroupBlocks {
        group: 0,
        blocks: (0..BLOCKS).collect(),
    }]
}

fn pairs() -> Vec<GroupPairs> {
    vec![GroupPairs {
        group: 0,
        pairs: (0..BLOCKS).map(|b| BlockPair { src: b, dst: b }).collect(),
    }]
}

fn joined(path: PathKind, producers: usize, consumers: usize) -> (Node, Node, Instance) {
    joined_by(
        node(KvRole::Producer, path, producers),
        node(KvRole::Consumer, path, consumers),
    )
}

/// Two that tell the ends of pushes on their queue pairs.
fn joined_with_notices(path: PathKind) -> (Node, Node, Instance) {
    let notices = |config: &mut Config| config.enable_notification = true;
    joined_by(
        node_that(KvRole::Producer, path, &[""; 2], notices),
        node_that(KvRole::Consumer, path, &[""; 2], notices),
    )
}

pub(super) fn joined_by(producer: Node, consumer: Node) -> (Node, Node, Instance) {
    let address = producer.engine.listen("127.0.0.1:0").expect("a port");
    let instance = consumer.engine.connect(&address.to_string(), LONG);
    (producer, consumer, instance.expect("a session"))
}

/// A pull of everything; `meanwhile` happens when some has arrived.
pub(super) fn pull(
    round: u64,
    (from, to, way): (&Node, &Node, &Instance),
    meanwhile: impl FnOnce(),
) {
    from.fill(|at| word(round, at));
    to.fill(|_| !0);
    let request = RequestId::from(format!("pull {round}").as_str());
    let ticket = from.engine.offer(&request, &groups(), 1, LONG);
    let ticket = ticket.expect("an offer");
    let transfer = way.pull(&ticket, &pairs(), PullOptions::default());
    let transfer = transfer.expect("a pull");
    to.await_some(round);
    meanwhile();
    let outcome = transfer.wait(LONG).expect("an outcome");
    assert_eq!(outcome.failure(), None, "round {round}");
    to.holds(|at| word(round, at));
}

/// A push of everything.
pub(super) fn push(
    round: u64,
    (from, to, _): (&Node, &Node, &Instance),
    meanwhile: impl FnOnce(),
) -> TransferReport {
    from.fill(|at| word(round, at));
    to.fill(|_| !0);
    let request = RequestId::from(format!("push {round}").as_str());
    let expected = to.engine.expect(&request, &groups(), 1, LONG);
    expected.expect("an expectation");
    let name = to.engine.inner();
    let name = PeerName {
        engine: name.id.clone(),
        rank: name.rank(),
    };
    let peer = from.engine.peer_of(&name).expect("a session");
    let push = peer.begin_push(&request);
    let push = push.expect("a push");
    push.layer(0, &pairs(), None).expect("a layer");
    push.layer(1, &pairs(), None).expect("a layer");
    let transfer = push.commit().expect("all of it");
    to.await_some(round);
    meanwhile();
    let outcome = transfer.wait(LONG).expect("an outcome");
    assert_eq!(outcome.failure(), None, "round {round}");
    let mut seen = Vec::new();
    wait_for(
        &to.engine,
        &mut seen,
        |event| matches!(event, Event::Received { request: of, .. } if *of == request),
    );
    to.holds(|at| word(round, at));
    // Whoever has the blocks now is not written over.
    to.fill(|_| round);
    std::thread::sleep(Duration::from_millis(20));
    to.holds(|_| round);
    transfer.report()
}

/// The one device that the way does without. The peer tells of its own a moment later.
fn one_skipped(way: &Instance) -> Vec<SkippedRail> {
    let end = Instant::now() + LONG;
    loop {
        let skipped = way.path().expect("the session stands").skipped;
        if skipped.len() == 1 {
            return skipped;
        }
        assert!(skipped.is_empty() && Instant::now() < end, "{skipped:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn work_goes_over_all_rails_that_both_have() {
    for path in PATHS {
        let (producer, consumer, way) = joined(path, 3, 2);
        assert_eq!(way.lanes().expect("up"), (2 * QPS as usize, 2));
        assert!(way.path().expect("up").skipped.is_empty());
        let nodes = (&producer, &consumer, &way);
        for round in 0..3 {
            pull(round, nodes, || {});
            push(round, nodes, || {});
        }
    }
}

#[test]
fn the_smallest_completion_queues_have_room_for_receives() {
    let least = |config: &mut Config| {
        config.max_cqe_num = 1;
        config.qp_per_transfer = 8;
        config.enable_notification = true;
    };
    for path in PATHS {
        let consumer = node_that(KvRole::Consumer, path, &[""; 2], least);
        let producer = node_that(KvRole::Producer, path, &[""; 2], least);
        let (producer, consumer, way) = joined_by(producer, consumer);
        pull(0, (&producer, &consumer, &way), || {});
        push(1, (&producer, &consumer, &way), || {});
    }
}

/// Both rails carry writes, so both have to say that theirs are there: one word more or less for one of
/// them, and the expectation would not end, or the session would.
#[test]
fn each_rail_of_a_push_tells_its_own_end() {
    for path in PATHS {
        let (producer, consumer, way) = joined_with_notices(path);
        let nodes = (&producer, &consumer, &way);
        for round in 0..3 {
            let report = push(round, nodes, || {});
            assert!(report.data_plane_notice, "{path}");
        }
        for (round, of_producer) in [(3, true), (4, false)] {
            let (producer, consumer, way) = joined_with_notices(path);
            let dying = if of_producer { &producer } else { &consumer };
            let nodes = (&producer, &consumer, &way);
            push(round, nodes, || dying.device_fails(1));
            push(round + 2, nodes, || {});
        }
    }
}

#[test]
fn a_device_that_fails_under_a_pull_is_set_aside() {
    for path in PATHS {
        for (rail, of_producer) in [(0, false), (1, false), (0, true)] {
            let (producer, consumer, way) = joined(path, 2, 2);
            let nodes = (&producer, &consumer, &way);
            let dying = if of_producer { &producer } else { &consumer };
            pull(0, nodes, || dying.device_fails(rail));
            pull(1, nodes, || {});
            push(2, nodes, || {});
            let skipped = one_skipped(&way);
            let (own, peers) = ("device failed", "taken down by the peer: device failed");
            let reason = if of_producer { peers } else { own };
            assert_eq!(skipped[0].reason, reason, "{path}");
            // A session that comes later does without it.
            assert_eq!(dying.engine.inner().runtime.rails_that_work().len(), 1);
        }
    }
}

#[test]
fn a_device_that_fails_under_a_push_is_set_aside_and_nothing_lands_late() {
    for path in PATHS {
        for (rail, of_producer) in [(0, true), (1, true), (0, false)] {
            let (producer, consumer, way) = joined(path, 2, 2);
            let nodes = (&producer, &consumer, &way);
            let dying = if of_producer { &producer } else { &consumer };
            push(0, nodes, || dying.device_fails(rail));
            push(1, nodes, || {});
            pull(2, nodes, || {});
            one_skipped(&way);
        }
    }
}

#[test]
fn the_last_device_ends_the_engine() {
    let (producer, consumer, way) = joined(PathKind::Arena, 2, 2);
    let nodes = (&producer, &consumer, &way);
    pull(0, nodes, || consumer.device_fails(0));
    consumer.device_fails(1);
    let mut seen = Vec::new();
    let down = wait_for(&consumer.engine, &mut seen, |event| {
        matches!(event, Event::PeerDown { .. })
    });
    let Event::PeerDown { cause, .. } = down else {
        unreachable!("that event");
    };
    assert_eq!(cause, Cause::DeviceFatal);
    let refused = consumer.engine.connect("127.0.0.1:1", LONG);
    assert!(matches!(refused, Err(Error::DeviceFailed)), "{refused:?}");
}

/// Whether the memory of a request is released within some time.
fn is_released(node: &Node, seen: &mut Vec<Event>, within: Duration) -> bool {
    let end = Instant::now() + within;
    while Instant::now() < end {
        node.engine.wait_events(seen, Duration::from_millis(5));
        let freed = |event: &Event| match event {
            Event::Released { .. } => true,
            Event::Failed { memory, .. } => *memory == MemoryState::Released,
            _ => false,
        };
        if seen.iter().any(freed) {
            return true;
        }
    }
    false
}

/// A consumer with such devices loses the first of them while it is written to. What its peer is down for, and
/// whether the blocks are released, within a second if they are not to be.
fn loses_its_first_device(path: PathKind, plans: &[&str], kept: bool) -> (Cause, bool) {
    let consumer = node_that(KvRole::Consumer, path, plans, |_| {});
    let producer = node(KvRole::Producer, path, plans.len());
    let (producer, consumer, _way) = joined_by(producer, consumer);
    producer.fill(|at| word(0, at));
    consumer.fill(|_| !0);
    let request = RequestId::from("cut short");
    let expected = consumer.engine.expect(&request, &groups(), 1, LONG);
    expected.expect("an expectation");
    let inner = consumer.engine.inner();
    let name = PeerName {
        engine: inner.id.clone(),
        rank: inner.rank(),
    };
    let peer = producer.engine.peer_of(&name).expect("a session");
    let push = peer.begin_push(&request).expect("a push");
    push.layer(0, &pairs(), None).expect("a layer");
    consumer.await_some(0);
    consumer.device_fails(0);
    let mut seen = Vec::new();
    let down = wait_for(&consumer.engine, &mut seen, |event| {
        matches!(event, Event::PeerDown { .. })
    });
    let Event::PeerDown { cause, .. } = down else {
        unreachable!("that event");
    };
    let within = if kept { Duration::from_secs(1) } else { LONG };
    (cause, is_released(&consumer, &mut seen, within))
}

/// A device that does not destroy its queue pairs may go on with what comes there: nobody has the blocks back
/// before it is closed. The other side is not told that they are gone: the session ends, though there is
/// another rail.
#[test]
fn blocks_that_queue_pairs_may_reach_that_stay_are_never_released() {
    for path in PATHS {
        let lost = loses_its_first_device(path, &["no-destroy=1"], true);
        assert_eq!(lost, (Cause::DeviceFatal, false), "{path}");
        let lost = loses_its_first_device(path, &["no-destroy=1", ""], true);
        let operation = LocalOperation::QueuePair;
        let errno = nix::errno::Errno::EIO as i32;
        assert_eq!(
            lost,
            (Cause::LocalDevice { operation, errno }, false),
            "{path}"
        );
        // The same without the fault.
        let lost = loses_its_first_device(path, &[""], false);
        assert_eq!(lost, (Cause::DeviceFatal, true), "{path}");
    }
}

/// A rail of which one side has no queue pairs, or does not get them to the other's: the session goes without.
#[test]
fn a_rail_whose_queue_pairs_cannot_be_had_is_left_out() {
    for path in PATHS {
        for (plan, of_client, bad) in [
            ("no-qp=1", true, 0),
            ("no-qp=1", false, 1),
            ("no-join=1", true, 1),
            ("no-join=1", false, 0),
        ] {
            let mut plans = [[""; 2]; 2];
            plans[usize::from(of_client)][bad] = plan;
            let (producer, consumer, way) = joined_by(
                node_that(KvRole::Producer, path, &plans[0], |_| {}),
                node_that(KvRole::Consumer, path, &plans[1], |_| {}),
            );
            let what = format!("{path}, {plan}, client {of_client}");
            let nodes = (&producer, &consumer, &way);
            pull(0, nodes, || {});
            push(1, nodes, || {});
            let skipped = one_skipped(&way);
            let refused = if plan == "no-qp=1" {
                "create_qp"
            } else {
                "modify_qp"
            };
            match of_client {
                true => assert!(skipped[0].reason.contains(refused), "{what}: {skipped:?}"),
                false => assert!(
                    skipped[0].reason.contains("the peer"),
                    "{what}: {skipped:?}"
                ),
            }
            assert_eq!(way.lanes().expect("up"), (QPS as usize, 2), "{what}");
        }
    }
}

#[test]
fn a_session_without_any_rail_is_not_set_up() {
    for plan in ["no-qp=1", "no-join=1"] {
        let producer = node(KvRole::Producer, PathKind::Arena, 2);
        let consumer = node_that(KvRole::Consumer, PathKind::Arena, &[plan; 2], |_| {});
        let address = producer.engine.listen("127.0.0.1:0").expect("a port");
        let refused = consumer.engine.connect(&address.to_string(), LONG);
        let error = crate::error::chain(&refused.expect_err("nothing leads there"));
        assert!(error.contains("soft: "), "{plan}: {error}");
    }
}

/// A consumer whose devices have these plans, and its producer.
fn joined_with(plans: &[&str]) -> (Node, Node, Instance) {
    joined_by(
        node(KvRole::Producer, PathKind::Tcp, plans.len()),
        node_that(KvRole::Consumer, PathKind::Tcp, plans, |_| {}),
    )
}

#[test]
fn work_leaves_a_port_that_stays_down() {
    let (producer, consumer, way) = joined_with(&["port-down=500ms:3600s", ""]);
    let end = Instant::now() + LONG;
    let mut round = 0;
    while way.path().expect("the session stands").skipped.is_empty() {
        assert!(Instant::now() < end, "{round} rounds");
        pull(round, (&producer, &consumer, &way), || {});
        push(round + 1, (&producer, &consumer, &way), || {});
        round += 2;
    }
    let skipped = one_skipped(&way);
    assert!(
        skipped[0].reason.contains("of the device is down"),
        "{skipped:?}"
    );
    pull(round, (&producer, &consumer, &way), || {});
}

/// Nothing is gained by moving from one port that is down to another: all are back in time.
#[test]
fn ports_that_are_all_down_for_a_while_cost_time_only() {
    let down = "port-down=500ms:1500ms";
    let begun = Instant::now();
    let (producer, consumer, way) = joined_with(&[down; 2]);
    let mut round = 0;
    while begun.elapsed() < Duration::from_millis(2500) {
        pull(round, (&producer, &consumer, &way), || {});
        round += 1;
    }
    assert_eq!(way.path().expect("the session stands").skipped, []);
    let mut seen = Vec::new();
    consumer.engine.poll_events(&mut seen);
    let down = |event: &Event| matches!(event, Event::PeerDown { .. });
    assert!(!seen.iter().any(down), "{seen:?}");
}

/// One side has lost a device: who comes later is joined by the places of those that are left.
#[test]
fn a_session_that_comes_after_a_loss_goes_over_the_others() {
    let producer = node(KvRole::Producer, PathKind::Arena, 3);
    let address = producer.engine.listen("127.0.0.1:0").expect("a port");
    producer.device_fails(1);
    let consumer = node(KvRole::Consumer, PathKind::Arena, 3);
    let way = consumer.engine.connect(&address.to_string(), LONG);
    let way = way.expect("a session");
    assert_eq!(way.lanes().expect("up"), (2 * QPS as usize, 2));
    pull(0, (&producer, &consumer, &way), || {});
    push(1, (&producer, &consumer, &way), || {});
}
