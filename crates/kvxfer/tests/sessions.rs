//! Sessions that end and begin again: in which order an engine hears of it, who is counted once, and
//! what becomes of a peer that comes back as another life.

mod support;

use std::time::Duration;

use kvxfer::Error;
use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Instance, PullOptions, PushOptions};
use kvxfer::event::{Event, ReleaseReason};
use kvxfer::ids::{EngineId, RequestId};
use kvxfer::session::SessionError;
use kvxfer::transfer::Cause;
use kvxfer::wire::Refusal;
use support::proxy::Proxy;
use support::{LONG, Log, Node, POISON, dealt, groups, pairs, recipe, take_time, until};

const BLOCK: u64 = 64 << 10;
const BLOCKS: u32 = 64;

fn named(role: KvRole, path: PathKind, name: &str) -> Node {
    recipe(role, path, BLOCK, BLOCKS)
        .with(|config| config.engine_id = Some(name.to_owned()))
        .node()
}

/// A node that listens, and the way to it.
fn listening(role: KvRole, path: PathKind) -> (Node, Proxy) {
    let node = recipe(role, path, BLOCK, BLOCKS).node();
    let address = node.engine.listen("127.0.0.1:0").expect("a port");
    (node, Proxy::new(address))
}

fn connect(node: &Node, proxy: &Proxy) -> Instance {
    node.engine
        .connect(&proxy.address, LONG)
        .expect("a session")
}

/// Checks that a peer's events come in turn.
#[track_caller]
fn in_turn(events: &[Event]) {
    let mut up = None;
    for event in events {
        match event {
            Event::PeerUp { generation, .. } => {
                assert_eq!(up, None, "{events:#?}");
                up = Some(*generation);
            }
            Event::PeerRestarted { old, new, .. } => {
                assert_eq!(up, None, "{events:#?}");
                assert_ne!(old, new);
                up = Some(*new);
            }
            Event::PeerDown { generation, .. } => {
                assert_eq!(up, Some(*generation), "{events:#?}");
                up = None;
            }
            _ => {}
        }
    }
}

/// Every failure of a session comes before the peer's `PeerDown`, and that before the next `PeerUp`;
/// on both sides, cut after cut, with transfers under way.
fn told_in_order(path: PathKind) {
    const CUTS: u64 = 15;
    const PULLS: u64 = 24;
    let (producer, proxy) = listening(KvRole::Producer, path);
    let consumer = recipe(KvRole::Consumer, path, BLOCK, BLOCKS).with(take_time);
    let consumer = consumer.node();
    let ticket = producer
        .engine
        .offer(&RequestId::from("r"), &groups(0..BLOCKS), 1, LONG)
        .expect("an offer");
    let instance = connect(&consumer, &proxy);
    let wanted = pairs((0..BLOCKS).map(|b| (b, BLOCKS - 1 - b)));
    let wanted = dealt(&wanted, PULLS as u32);
    let mut back = None;
    until("the session on the other side", || {
        back = producer.engine.peer_of(&consumer.name());
        back.is_some()
    });
    let back = back.expect("a session");
    let mut events = Vec::new();
    let mut failed = 0;
    for cut in 0..CUTS {
        assert!(instance.wait_up(LONG));
        let mut tags = Vec::new();
        for (pull, wanted) in (0..).zip(&wanted) {
            let options = PullOptions {
                tag: cut * PULLS + pull,
                hold: true,
                ..PullOptions::default()
            };
            // What the last session had under way may not be released yet.
            until("a pull", || {
                match instance.pull(&ticket, wanted, options.clone()) {
                    Ok(_) => true,
                    Err(Error::InUse(_)) => false,
                    Err(error) => panic!("{error}"),
                }
            });
            tags.push(cut * PULLS + pull);
        }
        proxy.cut();
        // The end of this session, and what came until then.
        let mut seen = Vec::new();
        until("the loss", || {
            consumer
                .engine
                .wait_events(&mut seen, Duration::from_millis(100));
            seen.iter().any(|e| matches!(e, Event::PeerDown { .. }))
        });
        let down = seen
            .iter()
            .position(|e| matches!(e, Event::PeerDown { .. }))
            .expect("just found");
        let ended: Vec<u64> = seen[..down]
            .iter()
            .filter_map(|event| match event {
                Event::Received { tag, .. } => Some(*tag),
                Event::Failed { tag, .. } => {
                    failed += 1;
                    Some(*tag)
                }
                _ => None,
            })
            .collect();
        for tag in tags {
            assert!(
                ended.contains(&tag),
                "pull {tag} is undecided when its peer is down: {seen:#?}"
            );
        }
        events.extend(seen);
    }
    assert!(failed > 0, "the cuts came too late");
    assert!(instance.wait_up(LONG));
    until("the last return", || {
        consumer
            .engine
            .wait_events(&mut events, Duration::from_millis(100));
        matches!(events.last(), Some(Event::PeerUp { .. }))
    });
    in_turn(&events);
    assert!(back.wait_up(LONG), "it leads to the peer's next session");
    let mut there = Vec::new();
    producer.engine.poll_events(&mut there);
    in_turn(&there);
}

#[test]
fn told_in_order_over_arena() {
    told_in_order(PathKind::Arena);
}

#[test]
fn told_in_order_over_tcp() {
    told_in_order(PathKind::Tcp);
}

/// A reader that releases, comes again and releases again does not stand for another reader.
#[test]
fn a_reader_counts_once() {
    let (producer, proxy) = listening(KvRole::Producer, PathKind::Arena);
    producer.side.fill(7).expect("filled");
    let mut log = Log::new(&producer.engine);
    let request = RequestId::from("r");
    let ticket = producer
        .engine
        .offer(&request, &groups(0..8), 2, LONG)
        .expect("an offer");
    // The same engine over two sessions, then its next life.
    let first = named(KvRole::Consumer, PathKind::Arena, "reader");
    for life in [first, named(KvRole::Consumer, PathKind::Arena, "reader")] {
        for _ in 0..2 {
            let instance = connect(&life, &proxy);
            instance.release(&ticket).expect("released");
            // What comes after it on its connection has come, so the release has.
            let other = RequestId::from("other");
            let ticket = producer
                .engine
                .offer(&other, &groups(8..16), 1, LONG)
                .expect("an offer");
            instance.release(&ticket).expect("released");
            until("the other release", || {
                log.count(|event| matches!(event, Event::Released { .. })) > 0
            });
            assert_eq!(
                log.count(
                    |event| matches!(event, Event::Released { request: r, .. } if *r == request)
                ),
                0
            );
            log = Log::new(&producer.engine);
        }
    }
    let second = named(KvRole::Consumer, PathKind::Arena, "another");
    let instance = connect(&second, &proxy);
    let transfer = instance
        .pull(&ticket, &pairs([(1, 1)]), PullOptions::default())
        .expect("a transfer");
    let outcome = transfer.wait(LONG).expect("an outcome");
    assert!(outcome.is_done(), "the blocks were still held: {outcome:?}");
    log.wait("release", |event| {
        matches!(event, Event::Released { request: r, reason: ReleaseReason::AllRead, .. } if *r == request)
    });
}

/// A peer that comes back as another life while nobody has noticed the end of the first: what ran
/// with the first fails with that reason, in order, and the first is not heard again.
#[test]
fn a_restart_is_seen_before_the_loss() {
    let (survivor, lost) = listening(KvRole::Both, PathKind::Tcp);
    let mut log = Log::new(&survivor.engine);
    let first = named(KvRole::Both, PathKind::Tcp, "phoenix");
    survivor.side.poison().expect("poisoned");
    first.side.fill(5).expect("filled");
    let first_way = connect(&first, &lost);
    let name = first.name();
    let back = || {
        let mut way = None;
        until("the session on this side", || {
            way = survivor.engine.peer_of(&name);
            way.is_some()
        });
        way.expect("a session")
    };
    // An expectation that the first life has begun to fill, and a push to it that it expects.
    let expected = RequestId::from("expected");
    let ticket = survivor
        .engine
        .expect(&expected, &groups(0..8), 1, LONG)
        .expect("an expectation");
    let filling = first_way.begin_push(&expected).expect("a push");
    filling.all_layers(&pairs([(20, 0)]), None).expect("fits");
    let pushed = RequestId::from("pushed");
    let old = first
        .engine
        .expect(&pushed, &groups(0..8), 1, LONG)
        .expect("an expectation");
    let options = PushOptions {
        ticket: Some(old.clone()),
        ..PushOptions::default()
    };
    let pushing = back().begin_push_with(&pushed, options).expect("a push");
    pushing.all_layers(&pairs([(30, 1)]), None).expect("fits");
    until("bytes of both", || {
        survivor.first_word(0) != POISON && first.first_word(1) == POISON
    });
    lost.go_silent();
    let offered = survivor
        .engine
        .offer(&RequestId::from("offered"), &groups(8..16), 1, LONG)
        .expect("an offer");

    // The next life comes by another way, for the old one is silent.
    let address = survivor_address(&offered);
    let second = named(KvRole::Both, PathKind::Tcp, "phoenix");
    let second_way = second.engine.connect(&address, LONG).expect("a session");
    let Event::Failed { first_cause, .. } = log.wait(
        "failure",
        |event| matches!(event, Event::Failed { request, .. } if *request == expected),
    ) else {
        unreachable!();
    };
    assert_eq!(first_cause, Cause::PeerRestarted);
    let outcome = pushing.commit().expect("its outcome tells").wait(LONG);
    let failure = outcome.expect("an outcome");
    let failure = failure.failure().expect("nobody is there");
    assert_eq!(failure.first_cause, Cause::PeerRestarted);
    log.wait("restart", |event| {
        matches!(event, Event::PeerRestarted { old, new, .. }
            if *old == first.engine.generation() && *new == second.engine.generation())
    });
    log.assert_in_order(in_turn);

    // What the first life gave out is refused, here and there.
    let options = PushOptions {
        ticket: Some(old),
        ..PushOptions::default()
    };
    let error = back()
        .begin_push_with(&pushed, options)
        .expect_err("a ticket of the earlier life");
    assert!(matches!(error, Error::OldGeneration { .. }), "{error}");
    // The survivor's own tickets stand for the new life, but for the expectation that has failed.
    let options = PushOptions {
        ticket: Some(ticket),
        ..PushOptions::default()
    };
    let push = second_way
        .begin_push_with(&expected, options)
        .expect("a push");
    let outcome = push.commit().expect("its outcome tells").wait(LONG);
    let refused = Cause::Refused {
        reason: kvxfer::transfer::Refusal::Late,
    };
    assert_eq!(
        outcome
            .expect("an outcome")
            .failure()
            .map(|f| &f.first_cause),
        Some(&refused)
    );
    let transfer = second_way
        .pull(&offered, &pairs([(8, 8)]), PullOptions::default())
        .expect("a transfer");
    assert!(transfer.wait(LONG).expect("an outcome").is_done());

    // The first life is heard again, and is not taken for a third.
    lost.speak();
    lost.cut();
    let error = first
        .engine
        .connect(&address, LONG)
        .expect_err("a life that is over");
    match error {
        Error::Session {
            source: SessionError::Rejected { reason },
            ..
        } => assert_eq!(reason, Refusal::GenerationRetired),
        other => panic!("{other:?}"),
    }
    assert!(second_way.is_up());
    log.assert_in_order(in_turn);
    assert_eq!(
        log.count(|event| matches!(event, Event::PeerRestarted { .. })),
        1
    );
    drop((filling, first_way));
    assert_eq!(name.engine, EngineId::from("phoenix"));
}

/// Where the engine that made a ticket listens.
fn survivor_address(ticket: &kvxfer::ticket::Ticket) -> String {
    ticket.addr.clone().expect("it listens")
}
