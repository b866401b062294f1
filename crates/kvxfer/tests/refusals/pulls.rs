//! Pulls that are refused, retracted, cancelled or empty.

use std::time::Duration;

use crate::support::{LONG, Log, RECYCLED, groups, pairs, recipe};
use crate::{BLOCKS, chain, fails_with, offer, pair, pair_of};
use kvxfer::Error;
use kvxfer::blocks::GroupPairs;
use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Outcome, PullOptions};
use kvxfer::event::{Class, Event, MemoryState, ReleaseReason};
use kvxfer::ids::{EngineId, Generation, RequestId};
use kvxfer::ticket::Ticket;
use kvxfer::transfer::{Cause, Refusal};

#[test]
fn pulls_that_are_refused_before_anything_moves() {
    let (producer, consumer, instance) = pair();
    let ticket = offer(&producer, "r", 8);
    let pull = |ticket: &Ticket, wanted: &[GroupPairs]| {
        instance
            .pull(ticket, wanted, PullOptions::default())
            .expect_err("nonsense")
    };
    let text = |ticket: &Ticket, wanted: &[GroupPairs]| chain(&pull(ticket, wanted));
    let beyond = text(&ticket, &pairs([(0, BLOCKS)]));
    assert!(
        beyond.contains(&format!("consumer block {BLOCKS}")),
        "{beyond}"
    );
    let error = pull(&ticket, &pairs([(0, 1), (8, 2)]));
    assert!(
        matches!(error, Error::NotInTicket { block: 8, .. }),
        "{error}"
    );
    let twice = text(&ticket, &pairs([(0, 5), (1, 5)]));
    assert!(
        twice.contains("block 5") && twice.contains("twice"),
        "{twice}"
    );
    let group = |group, pairs: Vec<GroupPairs>| {
        pairs
            .into_iter()
            .map(|p| GroupPairs { group, ..p })
            .collect::<Vec<_>>()
    };
    let error = pull(&ticket, &group(7, pairs([(0, 0)])));
    assert!(
        matches!(error, Error::NotInTicket { group: 7, .. }),
        "{error}"
    );
    let unknown = text(&ticket, &group(7, pairs([])));
    assert!(unknown.contains("group 7"), "{unknown}");

    // Tickets that are not this peer's, or not of its kind.
    let other = Ticket {
        engine: EngineId::from("somebody-else"),
        ..ticket.clone()
    };
    let error = pull(&other, &pairs([(0, 0)]));
    assert!(matches!(error, Error::WrongInstance { .. }), "{error}");
    let earlier = Ticket {
        generation: Generation([9; 16]),
        ..ticket.clone()
    };
    let error = pull(&earlier, &pairs([(0, 0)]));
    assert!(matches!(error, Error::OldGeneration { .. }), "{error}");
    assert_eq!(error.class(), Class::Recompute);
    let expects = consumer
        .engine
        .expect(&RequestId::from("e"), &groups(0..2), 1, LONG)
        .expect("an expectation");
    let turned = Ticket {
        engine: ticket.engine.clone(),
        generation: ticket.generation,
        ..expects
    };
    let error = pull(&turned, &pairs([(0, 0)]));
    assert!(matches!(error, Error::WrongTicket { .. }), "{error}");

    // Blocks that the producer does not have, in a ticket that says otherwise.
    let forged = Ticket {
        groups: groups([0, BLOCKS]),
        ..ticket.clone()
    };
    let beyond = text(&forged, &pairs([(BLOCKS, 0)]));
    assert!(
        beyond.contains(&format!("producer block {BLOCKS}")),
        "{beyond}"
    );
    consumer.assert_untouched_but([]);
    // The ticket itself is as good as before.
    let transfer = instance
        .pull(&ticket, &pairs([(3, 4)]), PullOptions::default())
        .expect("a transfer");
    assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
    consumer.side.verify(7, &pairs([(3, 4)])).expect("bytes");
    consumer.assert_untouched_but([4]);
}

#[test]
fn an_empty_pull_releases() {
    for wanted in [Vec::new(), pairs([])] {
        let (producer, consumer, instance) = pair();
        let ticket = offer(&producer, "r", 8);
        let transfer = instance
            .pull(&ticket, &wanted, PullOptions::default())
            .expect("a transfer");
        assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
        let mut log = Log::new(&producer.engine);
        log.wait("release", |event| {
            matches!(
                event,
                Event::Released {
                    reason: ReleaseReason::AllRead,
                    ..
                }
            )
        });
        consumer.assert_untouched_but([]);
    }
}

#[test]
fn tickets_from_elsewhere() {
    let (producer, consumer, instance) = pair();
    let ticket = offer(&producer, "r", 8);
    let bytes = ticket.to_bytes().expect("bytes");
    let json = ticket.to_json().expect("json");
    assert_eq!(Ticket::from_bytes(&bytes).expect("a ticket"), ticket);
    assert_eq!(Ticket::from_json(&json).expect("a ticket"), ticket);
    for garbage in [
        "",
        "{}",
        "[]",
        "null",
        "{\"version\":1}",
        &json[..json.len() - 1],
    ] {
        assert!(Ticket::from_json(garbage).is_err(), "{garbage}");
        assert!(Ticket::from_bytes(garbage.as_bytes()).is_err(), "{garbage}");
    }
    // Every byte changed in turn: refused, or a ticket that ends in an outcome; and nothing is
    // written but the blocks that were asked for.
    let wanted = pairs([(1, 2), (3, 5)]);
    let mut pulled = 0;
    for at in 0..bytes.len() {
        for change in [0x01, 0x80] {
            let mut bad = bytes.clone();
            bad[at] ^= change;
            let Ok(bad) = Ticket::from_bytes(&bad) else {
                continue;
            };
            let options = PullOptions {
                deadline: Some(Duration::from_secs(10)),
                hold: true,
                ..PullOptions::default()
            };
            let Ok(transfer) = instance.pull(&bad, &wanted, options) else {
                continue;
            };
            pulled += 1;
            if let Outcome::Failed(failure) = transfer.wait(LONG).expect("an outcome") {
                assert!(
                    matches!(
                        failure.first_cause,
                        Cause::LeaseExpired
                            | Cause::Refused {
                                reason: Refusal::OutOfRange
                            }
                    ),
                    "{failure:?}"
                );
            }
            assert!(transfer.wait_released(LONG));
        }
    }
    assert!(pulled > 0, "some changes still make a ticket");
    consumer.assert_untouched_but([2, 5]);
    assert!(instance.is_up(), "the session has survived it all");
}

#[test]
fn retracted_while_it_is_pulled() {
    let path = PathKind::Tcp;
    let (producer, consumer, instance) = pair_of(
        &recipe(KvRole::Producer, path, 64 << 10, 1024),
        &recipe(KvRole::Consumer, path, 64 << 10, 1024),
    );
    let ticket = offer(&producer, "r", 1000);
    let wanted = pairs((0..1000).map(|b| (b, 1000 - b)));
    let transfer = instance
        .pull(&ticket, &wanted, PullOptions::default())
        .expect("a transfer");
    assert!(producer.engine.retract(&RequestId::from("r")));
    assert_eq!(
        fails_with(&transfer, Cause::LeaseExpired),
        MemoryState::Released
    );
    let mut log = Log::new(&producer.engine);
    log.wait("release", |event| {
        matches!(
            event,
            Event::Released {
                reason: ReleaseReason::Retracted,
                ..
            }
        )
    });
    consumer.assert_untouched_but(1..=1000);
    Log::new(&consumer.engine).assert_told_once();
}

#[test]
fn a_cancelled_pull() {
    for path in [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp] {
        let (producer, consumer, instance) = pair_of(
            &recipe(KvRole::Producer, path, 64 << 10, 1024),
            &recipe(KvRole::Consumer, path, 64 << 10, 1024),
        );
        let ticket = offer(&producer, "r", 1000);
        let wanted = pairs((0..1000).map(|b| (b, 1000 - b)));
        let hold = || PullOptions {
            hold: true,
            ..PullOptions::default()
        };
        let transfer = instance.pull(&ticket, &wanted, hold()).expect("a transfer");
        transfer.cancel();
        transfer.cancel();
        fails_with(&transfer, Cause::Cancelled);
        // What is free now stays as its owner leaves it.
        consumer.fill_blocks(0..1024, RECYCLED);
        std::thread::sleep(Duration::from_millis(50));
        consumer.assert_blocks(0..1024, RECYCLED);
        Log::new(&consumer.engine).assert_told_once();
        // And the peer is as good as before, if need be over a new session.
        assert!(instance.wait_up(LONG));
        let transfer = instance.pull(&ticket, &wanted, hold()).expect("a transfer");
        assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
        consumer.side.verify(7, &wanted).expect("every byte");
        transfer.cancel();
        assert_eq!(transfer.outcome(), Some(Outcome::Done), "an outcome stays");
    }
}

/// A peer's lease table of which this ticket wants a slot that there is none of.
#[test]
fn a_lease_beyond_the_table() {
    let (producer, consumer, instance) = pair();
    let mut ticket = offer(&producer, "r", 8);
    ticket.lease.as_mut().expect("an offer has one").slot = u32::MAX;
    let transfer = instance
        .pull(&ticket, &pairs([(0, 0)]), PullOptions::default())
        .expect("a transfer");
    let cause = Cause::Refused {
        reason: Refusal::OutOfRange,
    };
    assert_eq!(fails_with(&transfer, cause), MemoryState::Released);
    consumer.assert_untouched_but([0]);
}
