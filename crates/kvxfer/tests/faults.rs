//! Peers in processes of their own that are killed or stopped while blocks move, over every path:
//! what the survivor is told, when its memory comes back, that nothing lands in it later, and that it
//! goes on with others.

mod support;

use std::time::{Duration, Instant};

use kvxfer::Error;
use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Instance, Outcome, PullOptions, PushOptions, Transfer};
use kvxfer::event::{Event, MemoryState, ReleaseReason};
use kvxfer::ids::RequestId;
use kvxfer::transfer::Cause;
use support::child::{self, Child, Spec};
use support::{LONG, Log, Node, POISON, RECYCLED, bounded, groups, pairs, recipe, until};

/// 64 MiB in two layers, and as often over again as makes a transfer long enough to be struck.
const BLOCK: u64 = 16 << 10;
const BLOCKS: u32 = 2048;
const TIMES: u32 = 24;
/// What a transfer that is to run into it is given.
const SHORT: Duration = Duration::from_millis(1500);
/// How much later than its deadline an outcome may come on the busiest machine.
const SLACK: Duration = Duration::from_secs(20);
/// For how long recycled memory is watched.
const WATCH: Duration = Duration::from_millis(300);
const SEED: u64 = 7;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Kill,
    Stop,
}

impl Fault {
    /// Strikes a peer, while this is still under way.
    fn strike(self, child: &Child, under_way: bool) -> Instant {
        match self {
            Fault::Kill => child.kill(),
            Fault::Stop => child.stop(),
        }
        assert!(under_way, "struck too late");
        Instant::now()
    }

    /// The deadline of what is struck. A death is to be noticed long before.
    fn deadline(self) -> Duration {
        match self {
            Fault::Kill => LONG,
            Fault::Stop => SHORT,
        }
    }

    fn may_cause(self, cause: &Cause) -> bool {
        match self {
            Fault::Kill => matches!(cause, Cause::PeerDead),
            Fault::Stop => matches!(cause, Cause::DeadlinePassed | Cause::PeerStalled { .. }),
        }
    }
}

fn peer_spec(role: KvRole, path: PathKind, blocks: u32) -> Spec {
    Spec {
        role,
        path,
        block_bytes: BLOCK,
        blocks,
        listen: "127.0.0.1:0".to_owned(),
        engine_id: None,
        seed: SEED,
        namespace: None,
    }
}

fn peer(role: KvRole, path: PathKind) -> Child {
    Child::start(&peer_spec(role, path, BLOCKS))
}

fn survivor(role: KvRole, path: PathKind) -> Node {
    let node = recipe(role, path, BLOCK, BLOCKS)
        .with(|config| config.connect_timeout = Duration::from_secs(2))
        .node();
    match role {
        KvRole::Producer => node.side.fill(SEED).expect("filled"),
        _ => node.side.poison().expect("poisoned"),
    }
    node
}

fn connect(node: &Node, child: &Child) -> Instance {
    node.engine
        .connect(&child.address, LONG)
        .expect("a session")
}

/// All blocks, so that none merges with its neighbour.
fn all_blocks() -> Vec<kvxfer::blocks::GroupPairs> {
    pairs((0..BLOCKS).map(|b| (b, BLOCKS - 1 - b)))
}

/// Starts pulling everything, many times over.
fn pull_all(
    instance: &Instance,
    ticket: &kvxfer::ticket::Ticket,
    deadline: Duration,
) -> Vec<Transfer> {
    let start = |tag| {
        let options = PullOptions {
            tag,
            deadline: Some(deadline),
            hold: true,
        };
        instance
            .pull(ticket, &all_blocks(), options)
            .expect("a transfer")
    };
    (0..u64::from(TIMES)).map(start).collect()
}

fn bytes_have_come(node: &Node) {
    until("the first bytes", || {
        (0..BLOCKS).any(|block| node.first_word(block) != POISON)
    });
}

fn running(transfers: &[Transfer]) -> bool {
    transfers.iter().any(|t| t.outcome().is_none())
}

/// Each ends in time, and for a reason that fits the fault.
fn all_end(transfers: &[Transfer], fault: Fault, struck: Instant) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for transfer in transfers {
        let outcome = transfer.wait(LONG + SLACK).expect("an outcome");
        if let Some(failure) = outcome.failure() {
            assert!(fault.may_cause(&failure.first_cause), "{failure:?}");
        }
        outcomes.push(outcome);
    }
    assert!(struck.elapsed() < SHORT + SLACK, "{:?}", struck.elapsed());
    for transfer in transfers {
        assert!(transfer.wait_released(LONG), "memory comes back");
    }
    outcomes
}

/// What the owner does with its memory now is not undone, also when the peer goes on.
fn nothing_lands(node: &Node, fault: Fault, child: &Child) {
    node.fill_blocks(0..BLOCKS, RECYCLED);
    if fault == Fault::Stop {
        child.resume();
    }
    std::thread::sleep(WATCH);
    node.assert_blocks(0..BLOCKS, RECYCLED);
}

/// A pull from a peer that is well.
fn pulls_from(node: &Node, instance: &Instance, child: &mut Child, request: &str) {
    let ticket = child.offer(request, 8, LONG);
    let wanted = pairs((0..8).map(|b| (b, 9 - b)));
    // A session that has just come back may be the one that is about to be replaced.
    until("a pull", || {
        let Ok(transfer) = instance.pull(&ticket, &wanted, PullOptions::default()) else {
            return false;
        };
        transfer.wait(LONG) == Some(Outcome::Done)
    });
    node.side.verify(SEED, &wanted).expect("every byte");
}

/// A push from a peer that is well, and that the node has connected to.
fn is_pushed_to(node: &Node, child: &mut Child, request: &str) {
    let mut log = Log::new(&node.engine);
    let mut tries = 0;
    until("a push", || {
        tries += 1;
        let request = format!("{request}-{tries}");
        let id = RequestId::from(request.as_str());
        node.engine
            .expect(&id, &groups(0..8), 1, Duration::from_secs(5))
            .expect("an expectation");
        child.push(&node.name(), &request, 8, 1);
        let of = |event: &Event| event.request().is_some_and(|(r, _)| *r == id);
        match log.wait("end", of) {
            Event::Received { .. } => true,
            Event::Failed { memory, .. } => {
                if memory == MemoryState::Quarantined {
                    log.wait(
                        "release",
                        |event| matches!(event, Event::Released { request, .. } if *request == id),
                    );
                }
                false
            }
            other => panic!("{other:?}"),
        }
    });
    let table = pairs((0..8).map(|b| (b, b)));
    node.side.verify(SEED, &table).expect("every byte");
}

/// A push to a peer that is well.
fn pushes_to(instance: &Instance, child: &mut Child, request: &str) {
    let mut tries = 0;
    until("a push", || {
        tries += 1;
        let request = format!("{request}-{tries}");
        child.expect(&request, 8, Duration::from_secs(5));
        let Ok(push) = instance.begin_push(&RequestId::from(request.as_str())) else {
            return false;
        };
        let fits = push.all_layers(&pairs((0..8).map(|b| (b, b))));
        let transfer = push.commit().expect("its outcome tells");
        let done = transfer.wait(LONG) == Some(Outcome::Done);
        let said = child.outcome(&request);
        assert_eq!(said.starts_with("received"), done, "{said}");
        done && fits.is_ok()
    });
}

fn drops(node: Node, instances: Vec<Instance>) {
    bounded("engine drop", move || drop((instances, node)));
}

// ---- READ, the consumer survives ---------------------------------------------------------------

fn producer_struck_while_read(path: PathKind, fault: Fault) {
    let mut producer = peer(KvRole::Producer, path);
    let node = survivor(KvRole::Consumer, path);
    let mut log = Log::new(&node.engine);
    let instance = connect(&node, &producer);
    let ticket = producer.offer("r", BLOCKS, LONG);
    let transfers = pull_all(&instance, &ticket, fault.deadline());
    bytes_have_come(&node);
    let struck = fault.strike(&producer, running(&transfers));
    let outcomes = all_end(&transfers, fault, struck);
    if path == PathKind::Tcp || (path, fault) == (PathKind::ProcessVm, Fault::Kill) {
        assert!(
            outcomes.iter().any(|o| !o.is_done()),
            "without the peer there is nobody to read from"
        );
    }
    nothing_lands(&node, fault, &producer);
    log.assert_told_once();
    if fault == Fault::Stop {
        pulls_from(&node, &instance, &mut producer, "again");
    }
    let mut fresh = Child::start(&peer_spec(KvRole::Producer, path, 16));
    let other = connect(&node, &fresh);
    pulls_from(&node, &other, &mut fresh, "fresh");
    drops(node, vec![instance, other]);
}

#[test]
fn arena_read_producer_killed() {
    producer_struck_while_read(PathKind::Arena, Fault::Kill);
}

#[test]
fn arena_read_producer_stopped() {
    producer_struck_while_read(PathKind::Arena, Fault::Stop);
}

#[test]
fn process_vm_read_producer_killed() {
    producer_struck_while_read(PathKind::ProcessVm, Fault::Kill);
}

#[test]
fn process_vm_read_producer_stopped() {
    producer_struck_while_read(PathKind::ProcessVm, Fault::Stop);
}

#[test]
fn tcp_read_producer_killed() {
    producer_struck_while_read(PathKind::Tcp, Fault::Kill);
}

#[test]
fn tcp_read_producer_stopped() {
    producer_struck_while_read(PathKind::Tcp, Fault::Stop);
}

// ---- WRITE, the consumer survives --------------------------------------------------------------

fn producer_struck_while_it_pushes(path: PathKind, fault: Fault) {
    let mut producer = peer(KvRole::Producer, path);
    let node = survivor(KvRole::Consumer, path);
    let mut log = Log::new(&node.engine);
    let instance = connect(&node, &producer);
    let request = RequestId::from("w");
    node.engine
        .expect(&request, &groups(0..BLOCKS), 1, fault.deadline())
        .expect("an expectation");
    producer.push(&node.name(), "w", BLOCKS, TIMES);
    bytes_have_come(&node);
    let of = |event: &Event| event.request().is_some_and(|(r, _)| *r == request);
    let struck = fault.strike(&producer, log.count(of) == 0);
    let Event::Failed {
        first_cause,
        invalid_blocks,
        memory,
        ..
    } = log.wait("failure", of)
    else {
        panic!("a push that was never committed has arrived");
    };
    assert!(fault.may_cause(&first_cause), "{first_cause}");
    assert_eq!(invalid_blocks, groups(0..BLOCKS));
    assert!(struck.elapsed() < SHORT + SLACK, "{:?}", struck.elapsed());
    if memory == MemoryState::Quarantined {
        log.wait("release", |event| {
            matches!(
                event,
                Event::Released {
                    reason: ReleaseReason::Drained,
                    ..
                }
            )
        });
    }
    nothing_lands(&node, fault, &producer);
    log.assert_told_once();
    if fault == Fault::Stop {
        let said = producer.outcome("w");
        assert!(said.starts_with("failed"), "{said}");
        assert!(instance.wait_up(LONG));
        is_pushed_to(&node, &mut producer, "again");
    }
    let mut fresh = Child::start(&peer_spec(KvRole::Producer, path, 16));
    let other = connect(&node, &fresh);
    is_pushed_to(&node, &mut fresh, "fresh");
    drops(node, vec![instance, other]);
}

#[test]
fn arena_write_producer_killed() {
    producer_struck_while_it_pushes(PathKind::Arena, Fault::Kill);
}

#[test]
fn arena_write_producer_stopped() {
    producer_struck_while_it_pushes(PathKind::Arena, Fault::Stop);
}

#[test]
fn process_vm_write_producer_killed() {
    producer_struck_while_it_pushes(PathKind::ProcessVm, Fault::Kill);
}

#[test]
fn process_vm_write_producer_stopped() {
    producer_struck_while_it_pushes(PathKind::ProcessVm, Fault::Stop);
}

#[test]
fn tcp_write_producer_killed() {
    producer_struck_while_it_pushes(PathKind::Tcp, Fault::Kill);
}

#[test]
fn tcp_write_producer_stopped() {
    producer_struck_while_it_pushes(PathKind::Tcp, Fault::Stop);
}

// ---- WRITE, the producer survives --------------------------------------------------------------

fn consumer_struck_while_pushed_to(path: PathKind, fault: Fault) {
    let mut consumer = peer(KvRole::Consumer, path);
    let node = survivor(KvRole::Producer, path);
    let mut log = Log::new(&node.engine);
    let instance = connect(&node, &consumer);
    // So that the next push finds all of the way in place.
    pushes_to(&instance, &mut consumer, "before");
    let request = RequestId::from("w");
    consumer.expect("w", BLOCKS, LONG);
    let options = PushOptions {
        deadline: Some(fault.deadline()),
        ..PushOptions::default()
    };
    let push = instance.begin_push_with(&request, options).expect("a push");
    for _ in 0..TIMES {
        push.all_layers(&all_blocks()).expect("fits");
    }
    let transfers = [push.commit().expect("committed")];
    std::thread::sleep(Duration::from_millis(20));
    let struck = fault.strike(&consumer, running(&transfers));
    let outcomes = all_end(&transfers, fault, struck);
    assert!(!outcomes[0].is_done(), "who has confirmed it?");
    // The producer's memory is its own again; the consumer never takes what is there now.
    nothing_lands(&node, fault, &consumer);
    log.assert_told_once();
    node.side.fill(SEED).expect("filled");
    if fault == Fault::Stop {
        let said = consumer.outcome("w");
        assert!(said.starts_with("failed"), "{said}");
        assert!(instance.wait_up(LONG));
        pushes_to(&instance, &mut consumer, "again");
        consumer.tell("once");
        consumer.answer("once");
    }
    let mut fresh = Child::start(&peer_spec(KvRole::Consumer, path, 16));
    let other = connect(&node, &fresh);
    pushes_to(&other, &mut fresh, "fresh");
    drops(node, vec![instance, other]);
}

#[test]
fn arena_write_consumer_killed() {
    consumer_struck_while_pushed_to(PathKind::Arena, Fault::Kill);
}

#[test]
fn arena_write_consumer_stopped() {
    consumer_struck_while_pushed_to(PathKind::Arena, Fault::Stop);
}

#[test]
fn process_vm_write_consumer_killed() {
    consumer_struck_while_pushed_to(PathKind::ProcessVm, Fault::Kill);
}

#[test]
fn process_vm_write_consumer_stopped() {
    consumer_struck_while_pushed_to(PathKind::ProcessVm, Fault::Stop);
}

#[test]
fn tcp_write_consumer_killed() {
    consumer_struck_while_pushed_to(PathKind::Tcp, Fault::Kill);
}

#[test]
fn tcp_write_consumer_stopped() {
    consumer_struck_while_pushed_to(PathKind::Tcp, Fault::Stop);
}

// ---- other stages ------------------------------------------------------------------------------

/// A consumer that dies while it reads: its producer gets the blocks back when the lease runs out,
/// or when it takes them back.
#[test]
fn consumer_dies_while_it_reads() {
    for path in [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp] {
        let mut consumer = peer(KvRole::Consumer, path);
        let node = survivor(KvRole::Producer, path);
        let mut log = Log::new(&node.engine);
        let instance = connect(&node, &consumer);
        let offer = |request: &str, blocks, ttl| {
            node.engine
                .offer(&RequestId::from(request), &groups(blocks), 1, ttl)
                .expect("an offer")
        };
        let kept = offer("kept", 0..BLOCKS, LONG);
        offer("left", 0..8, Duration::from_secs(2));
        consumer.pull(&node.name(), &kept, BLOCKS, TIMES);
        consumer.die();
        log.wait("loss", |event| matches!(event, Event::PeerDown { .. }));
        let released = |request: &'static str, why: ReleaseReason| {
            move |event: &Event| {
                matches!(event, Event::Released { request: r, reason, .. }
                    if *r == RequestId::from(request) && *reason == why)
            }
        };
        log.wait("expiry", released("left", ReleaseReason::Expired));
        assert!(node.engine.retract(&RequestId::from("kept")));
        log.wait("retraction", released("kept", ReleaseReason::Retracted));
        log.assert_told_once();
        drops(node, vec![instance]);
    }
}

/// A producer that dies with a push that it has begun and not committed.
#[test]
fn producer_dies_before_it_commits() {
    for path in [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp] {
        let mut producer = Child::start(&peer_spec(KvRole::Producer, path, 16));
        let node = survivor(KvRole::Consumer, path);
        let mut log = Log::new(&node.engine);
        let instance = connect(&node, &producer);
        let request = RequestId::from("w");
        node.engine
            .expect(&request, &groups(0..16), 1, LONG)
            .expect("an expectation");
        producer.begin(&node.name(), "w", 16);
        until("bytes", || node.first_word(15) != POISON);
        producer.die();
        let event = log.wait("failure", |event| matches!(event, Event::Failed { .. }));
        let Event::Failed {
            first_cause,
            memory,
            ..
        } = event
        else {
            unreachable!();
        };
        assert_eq!(first_cause, Cause::PeerDead);
        if memory == MemoryState::Quarantined {
            log.wait("release", |event| matches!(event, Event::Released { .. }));
        }
        log.assert_told_once();
        // The blocks may be expected again.
        node.engine
            .expect(&request, &groups(0..16), 1, LONG)
            .expect("an expectation");
        drops(node, vec![instance]);
    }
}

/// A peer that is started again under its name and address is met again without being asked for;
/// what it gave out in its earlier life is refused.
#[test]
fn a_peer_that_restarts() {
    for path in [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp] {
        let spec = |listen: &str| Spec {
            listen: listen.to_owned(),
            engine_id: Some("phoenix".to_owned()),
            ..peer_spec(KvRole::Producer, path, BLOCKS)
        };
        let mut first = Child::start(&spec("127.0.0.1:0"));
        let node = survivor(KvRole::Consumer, path);
        let mut log = Log::new(&node.engine);
        let instance = connect(&node, &first);
        let old = first.offer("r", BLOCKS, LONG);
        let transfers = pull_all(&instance, &old, LONG);
        first.die();
        let mut second = Child::start(&spec(&first.address));
        for transfer in &transfers {
            let outcome = transfer.wait(LONG).expect("an outcome");
            if let Some(failure) = outcome.failure() {
                assert!(
                    matches!(failure.first_cause, Cause::PeerDead | Cause::PeerRestarted),
                    "{failure:?}"
                );
            }
            assert!(transfer.wait_released(LONG));
        }
        log.wait("loss", |event| {
            matches!(
                event,
                Event::PeerDown {
                    cause: Cause::PeerDead,
                    ..
                }
            )
        });
        let Event::PeerRestarted { old: was, new, .. } = log.wait("restart", |event| {
            matches!(event, Event::PeerRestarted { .. })
        }) else {
            unreachable!();
        };
        assert_eq!(was, old.generation);
        assert!(instance.wait_up(LONG));
        let error = instance
            .pull(&old, &pairs([(0, 0)]), PullOptions::default())
            .expect_err("a ticket of the earlier life");
        let Error::OldGeneration { now, .. } = error else {
            panic!("{error}");
        };
        assert_eq!(now, new);
        assert!(matches!(
            instance.release(&old),
            Err(Error::OldGeneration { .. })
        ));
        pulls_from(&node, &instance, &mut second, "r");
        log.assert_told_once();
        drops(node, vec![instance]);
    }
}

/// The same, life after life, with a pull and a push of each under way when it ends: what the earlier
/// lives gave out, or were given, is refused to all later ones, and every life is met by itself.
#[test]
fn a_peer_that_restarts_again_and_again() {
    const LIVES: u64 = 4;
    for path in [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp] {
        let spec = |listen: &str| Spec {
            role: KvRole::Both,
            listen: listen.to_owned(),
            engine_id: Some("phoenix".to_owned()),
            ..peer_spec(KvRole::Producer, path, 16)
        };
        let node = recipe(KvRole::Both, path, BLOCK, 16).node();
        node.side.poison().expect("poisoned");
        let mut log = Log::new(&node.engine);
        let mut child = Child::start(&spec("127.0.0.1:0"));
        let instance = connect(&node, &child);
        let (mut offers, mut expected, mut expects) = (Vec::new(), Vec::new(), Vec::new());
        for life in 0..LIVES {
            until("the peer", || instance.is_up());
            pulls_from(&node, &instance, &mut child, &format!("well-{life}"));
            offers.push(child.offer(&format!("offer-{life}"), 16, LONG));
            expects.push(child.expect(&format!("to-{life}"), 16, LONG));
            let request = RequestId::from(format!("from-{life}"));
            expected.push(
                node.engine
                    .expect(&request, &groups(8..16), 1, LONG)
                    .expect("an expectation"),
            );
            let to = RequestId::from(format!("to-{life}"));
            let pushing = instance.begin_push(&to).expect("a push");
            pushing.all_layers(&pairs([(0, 0)])).expect("fits");
            // Begun, and never committed.
            node.fill_blocks(8..16, POISON);
            child.begin_at(&node.name(), &request.0, 8..16);
            until("bytes", || node.first_word(15) != POISON);
            let address = child.address.clone();
            child.die();
            child = Child::start(&spec(&address));
            // The failures of that life, and no other end of them.
            let Event::Failed { first_cause, .. } = log.wait(
                "failure",
                |event| matches!(event, Event::Failed { request: r, .. } if *r == request),
            ) else {
                unreachable!();
            };
            let lost = |cause: &Cause| matches!(cause, Cause::PeerDead | Cause::PeerRestarted);
            assert!(lost(&first_cause), "{first_cause}");
            let outcome = pushing.commit().expect("its outcome tells").wait(LONG);
            let outcome = outcome.expect("an outcome");
            let failure = outcome.failure().expect("nobody has confirmed it");
            assert!(lost(&failure.first_cause), "{failure:?}");
            let old = offers[life as usize].generation;
            let Event::PeerRestarted { new, .. } = log.wait(
                "restart",
                |event| matches!(event, Event::PeerRestarted { old: o, .. } if *o == old),
            ) else {
                unreachable!();
            };
            assert!(instance.wait_up(LONG));
            node.fill_blocks(0..16, RECYCLED);
            for ticket in &offers {
                let error = instance
                    .pull(ticket, &pairs([(0, 0)]), PullOptions::default())
                    .expect_err("a ticket of an earlier life");
                assert!(
                    matches!(&error, Error::OldGeneration { now, .. } if *now == new),
                    "{error}"
                );
            }
            for ticket in &expects {
                let options = PushOptions {
                    ticket: Some(ticket.clone()),
                    ..PushOptions::default()
                };
                let error = instance
                    .begin_push_with(&ticket.request, options)
                    .expect_err("a ticket of an earlier life");
                assert!(matches!(error, Error::OldGeneration { .. }), "{error}");
            }
            for ticket in &expected {
                let said = child.push_late(&node.name(), ticket);
                assert!(said.contains("Late"), "{said}");
            }
            node.assert_blocks(0..16, RECYCLED);
        }
        pulls_from(&node, &instance, &mut child, "at-last");
        log.assert_told_once();
        drops(node, vec![instance]);
    }
}

/// A silent peer is told apart from a dead one, long before a transfer's own deadline.
#[test]
fn a_peer_that_stalls() {
    let mut producer = peer(KvRole::Producer, PathKind::Tcp);
    let node = recipe(KvRole::Consumer, PathKind::Tcp, BLOCK, BLOCKS)
        .with(|config| {
            config.heartbeat_interval = Duration::from_millis(200);
            config.heartbeat_timeout = Duration::from_millis(800);
        })
        .node();
    node.side.poison().expect("poisoned");
    let instance = connect(&node, &producer);
    let ticket = producer.offer("r", BLOCKS, LONG);
    let transfers = pull_all(&instance, &ticket, LONG);
    bytes_have_come(&node);
    producer.stop();
    let mut stalled = 0;
    for transfer in &transfers {
        let outcome = transfer.wait(LONG).expect("an outcome");
        if let Some(failure) = outcome.failure() {
            assert!(
                matches!(failure.first_cause, Cause::PeerStalled { .. }),
                "{failure:?}"
            );
            stalled += 1;
        }
        assert!(transfer.wait_released(LONG));
    }
    assert!(stalled > 0, "stopped too late");
    nothing_lands(&node, Fault::Stop, &producer);
    assert!(instance.wait_up(LONG));
    pulls_from(&node, &instance, &mut producer, "again");
    drops(node, vec![instance]);
}

/// A stopped peer does not keep an engine from going, with transfers under way.
#[test]
fn an_engine_goes_while_its_peer_is_stopped() {
    for path in [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp] {
        let mut producer = peer(KvRole::Producer, path);
        let node = survivor(KvRole::Consumer, path);
        let instance = connect(&node, &producer);
        let ticket = producer.offer("r", BLOCKS, LONG);
        let transfers = pull_all(&instance, &ticket, LONG);
        bytes_have_come(&node);
        producer.stop();
        let Node { engine, side } = node;
        bounded("engine drop", move || drop((instance, engine)));
        for transfer in &transfers {
            assert!(transfer.wait(LONG).is_some());
            assert!(transfer.wait_released(LONG));
        }
        // The memory is its owner's again.
        for memory in side.memory() {
            memory
                .fill_words(0, memory.len(), |_| RECYCLED)
                .expect("inside");
        }
        producer.resume();
        std::thread::sleep(WATCH);
        for memory in side.memory() {
            memory
                .verify_words(0, memory.len(), |_| RECYCLED)
                .expect("as it was left");
        }
    }
}

/// Not a test: what children run.
#[test]
fn child_entry() {
    child::entry();
}
