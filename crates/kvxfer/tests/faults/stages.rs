//! Other stages: before the end of a push, between lives, while a peer stalls, while an engine goes.

use std::time::Duration;

use crate::support::child::{Child, Spec};
use crate::support::{LONG, Log, Node, POISON, RECYCLED, bounded, groups, pairs, recipe, until};
use crate::{
    BLOCK, BLOCKS, Fault, TIMES, WATCH, bytes_have_come, connect, drops, nothing_lands, peer,
    peer_spec, pull_all, pulls_from, survivor,
};
use kvxfer::Error;
use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{PullOptions, PushOptions};
use kvxfer::event::{Event, MemoryState, ReleaseReason};
use kvxfer::ids::RequestId;
use kvxfer::transfer::Cause;

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
            // Some are on offer, some are pushed, some are expected.
            ..peer_spec(KvRole::Producer, path, 24)
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
            offers.push(child.offer(&format!("offer-{life}"), 8, LONG));
            expects.push(child.expect_at(&format!("to-{life}"), 16..24, LONG));
            let request = RequestId::from(format!("from-{life}"));
            expected.push(
                node.engine
                    .expect(&request, &groups(8..16), 1, LONG)
                    .expect("an expectation"),
            );
            let to = RequestId::from(format!("to-{life}"));
            let pushing = instance.begin_push(&to).expect("a push");
            pushing.all_layers(&pairs([(0, 16)]), None).expect("fits");
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
