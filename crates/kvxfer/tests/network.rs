//! Two network namespaces and a link between them that loses, delays and is cut; over TCP, for there
//! is no other way between hosts without a card.

#[path = "support/namespaces.rs"]
mod namespaces;
mod support;

use std::time::{Duration, Instant};

use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Instance, Outcome, PullOptions, Transfer};
use kvxfer::event::Event;
use kvxfer::ids::RequestId;
use kvxfer::ticket::Ticket;
use kvxfer::transfer::Cause;
use namespaces::{Far, THERE, between};
use support::child::{self, Child, Spec};
use support::{LONG, Log, Node, POISON, RECYCLED, dealt, groups, pairs, recipe, until};

const BLOCK: u64 = 16 << 10;
const BLOCKS: u32 = 512;
const SEED: u64 = 3;

/// Runs a test of an engine of one role here and of another there.
fn meet(test: &str, here: KvRole, there: KvRole, act: fn(&Far, Child, Node, Log, Instance)) {
    between(test, |far| {
        let child = peer(far, there);
        let node = node(here);
        let log = Log::new(&node.engine);
        let from = node.engine.connect(&child.address, LONG);
        let from = from.expect("a session");
        act(far, child, node, log, from);
    });
}

fn peer(far: &Far, role: KvRole) -> Child {
    Child::start(&Spec {
        role,
        path: PathKind::Tcp,
        block_bytes: BLOCK,
        blocks: BLOCKS,
        listen: format!("{THERE}:0"),
        engine_id: None,
        seed: SEED,
        namespace: Some(far.name().to_owned()),
    })
}

fn node(role: KvRole) -> Node {
    let node = recipe(role, PathKind::Tcp, BLOCK, BLOCKS)
        .with(|config| {
            config.heartbeat_interval = Duration::from_millis(200);
            config.heartbeat_timeout = Duration::from_secs(1);
            config.connect_timeout = Duration::from_secs(2);
        })
        .node();
    node.side.poison().expect("poisoned");
    node
}

fn all() -> Vec<kvxfer::blocks::GroupPairs> {
    pairs((0..BLOCKS).map(|b| (b, BLOCKS - 1 - b)))
}

fn pull(
    from: &Instance,
    ticket: &Ticket,
    wanted: &[kvxfer::blocks::GroupPairs],
    tag: u64,
    deadline: Duration,
) -> Transfer {
    let options = PullOptions {
        tag,
        deadline: Some(deadline),
        hold: true,
        ..PullOptions::default()
    };
    from.pull(ticket, wanted, options).expect("a transfer")
}

fn done(transfer: &Transfer) {
    assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
}

/// A pull on a link that is well, or becomes so.
fn works(node: &Node, from: &Instance, child: &mut Child, request: &str) {
    assert!(from.wait_up(LONG));
    let ticket = child.offer(request, BLOCKS, LONG);
    let mut tag = 100;
    until("a pull", || {
        tag += 1;
        let options = PullOptions {
            tag,
            ..PullOptions::default()
        };
        from.pull(&ticket, &all(), options)
            .is_ok_and(|transfer| transfer.wait(LONG) == Some(Outcome::Done))
    });
    node.side.verify(SEED, &all()).expect("every byte");
}

/// READ and WRITE over a link that loses one packet in fifty: slower, and every byte right.
#[test]
fn a_link_that_loses() {
    meet(
        "a_link_that_loses",
        KvRole::Both,
        KvRole::Both,
        |far, mut child, node, mut log, from| {
            far.lose(2);
            let ticket = child.offer("r", BLOCKS, LONG);
            let transfers: Vec<Transfer> = (0..)
                .zip(dealt(&all(), 4))
                .map(|(tag, part)| pull(&from, &ticket, &part, tag, LONG))
                .collect();
            transfers.iter().for_each(done);
            node.side.verify(SEED, &all()).expect("every byte");
            node.side.poison().expect("poisoned");
            let request = RequestId::from("w");
            node.engine
                .expect(&request, &groups(0..BLOCKS), 1, LONG)
                .expect("an expectation");
            child.push(&node.name(), "w", BLOCKS, 2);
            log.wait(
                "push",
                |event| matches!(event, Event::Received { request: r, .. } if *r == request),
            );
            let table = pairs((0..BLOCKS).map(|b| (b, b)));
            node.side.verify(SEED, &table).expect("every byte");
            far.lose_no_more();
            log.assert_told_once();
        },
    );
}

/// A link on which packets queue: what has time arrives, what has not ends in time, and nothing of
/// it lands afterwards.
#[test]
fn a_link_that_delays() {
    meet(
        "a_link_that_delays",
        KvRole::Consumer,
        KvRole::Producer,
        |far, mut child, node, mut log, from| {
            far.slow("200mbit");
            // 16 MiB take two thirds of a second.
            let ticket = child.offer("r", BLOCKS, LONG);
            done(&pull(&from, &ticket, &all(), 1, LONG));
            node.side.verify(SEED, &all()).expect("every byte");
            let begun = Instant::now();
            let late = pull(&from, &ticket, &all(), 2, Duration::from_millis(150));
            let outcome = late.wait(LONG).expect("an outcome");
            let failure = outcome.failure().expect("there was no time");
            assert_eq!(failure.first_cause, Cause::DeadlinePassed);
            assert!(late.wait_released(LONG));
            assert!(begun.elapsed() < LONG);
            node.fill_blocks(0..BLOCKS, RECYCLED);
            std::thread::sleep(Duration::from_secs(1));
            node.assert_blocks(0..BLOCKS, RECYCLED);
            works(&node, &from, &mut child, "again");
            log.assert_told_once();
        },
    );
}

/// A link that is cut while blocks move, for less and for more than heartbeats bear, and mended.
#[test]
fn a_link_that_is_cut() {
    meet(
        "a_link_that_is_cut",
        KvRole::Consumer,
        KvRole::Producer,
        |far, mut child, node, mut log, from| {
            far.slow("400mbit");
            let ticket = child.offer("r", BLOCKS, LONG);
            // Shortly: TCP sends again what was lost.
            let short = pull(&from, &ticket, &all(), 1, LONG);
            until("the first bytes", || moved(&node));
            Far::link("down");
            assert!(short.outcome().is_none(), "cut too late");
            std::thread::sleep(Duration::from_millis(300));
            Far::link("up");
            done(&short);
            node.side.verify(SEED, &all()).expect("every byte");
            // For good: the deadline of one comes first, the other hears that the peer is silent.
            node.side.poison().expect("poisoned");
            let halves = dealt(&all(), 2);
            let hasty = pull(&from, &ticket, &halves[0], 2, Duration::from_millis(700));
            let patient = pull(&from, &ticket, &halves[1], 3, LONG);
            until("the first bytes", || moved(&node));
            Far::link("down");
            let cause = |transfer: &Transfer| {
                let outcome = transfer.wait(LONG).expect("an outcome");
                outcome.failure().map(|failure| failure.first_cause.clone())
            };
            assert_eq!(cause(&hasty), Some(Cause::DeadlinePassed));
            let patient_cause = cause(&patient);
            assert!(
                matches!(
                    patient_cause,
                    Some(Cause::PeerStalled { .. } | Cause::LaneReset)
                ),
                "{patient_cause:?}"
            );
            assert!(hasty.wait_released(LONG) && patient.wait_released(LONG));
            node.fill_blocks(0..BLOCKS, RECYCLED);
            log.wait("loss", |event| matches!(event, Event::PeerDown { .. }));
            Far::link("up");
            std::thread::sleep(Duration::from_millis(500));
            node.assert_blocks(0..BLOCKS, RECYCLED);
            works(&node, &from, &mut child, "again");
            log.assert_told_once();
        },
    );
}

fn moved(node: &Node) -> bool {
    (0..BLOCKS).any(|block| node.first_word(block) != POISON)
}

/// Not a test: what children run.
#[test]
fn child_entry() {
    child::entry();
}
