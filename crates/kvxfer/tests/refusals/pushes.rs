//! Pushes that do not fit, come too late, are not expected or are given up.

use std::time::{Duration, Instant};

use crate::support::{LONG, Log, POISON, RECYCLED, groups, pairs, recipe, until};
use crate::{BLOCKS, back, chain, fails_with, pair, pair_of, pair_over};
use kvxfer::Error;
use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Outcome, PushOptions};
use kvxfer::event::{Event, MemoryState, ReleaseReason};
use kvxfer::ids::RequestId;
use kvxfer::plan::PlanError;
use kvxfer::transfer::{Cause, Refusal};

#[test]
fn pushes_that_do_not_fit() {
    let (producer, consumer, _instance) = pair();
    let back = back(&producer, &consumer);
    let request = RequestId::from("w");
    let ticket = consumer
        .engine
        .expect(&request, &groups([4, 5, 6]), 1, LONG)
        .expect("an expectation");
    let push = back.begin_push(&request).expect("a push");
    let text = |error: Error| chain(&error);
    let beyond = text(
        push.layer(0, &pairs([(BLOCKS, 4)]), None)
            .expect_err("beyond"),
    );
    assert!(
        beyond.contains(&format!("producer block {BLOCKS}")),
        "{beyond}"
    );
    let beyond = text(
        push.layer(0, &pairs([(0, BLOCKS)]), None)
            .expect_err("beyond"),
    );
    assert!(beyond.contains(&BLOCKS.to_string()), "{beyond}");
    let twice = text(
        push.layer(0, &pairs([(0, 4), (1, 4)]), None)
            .expect_err("twice"),
    );
    assert!(twice.contains("block 4"), "{twice}");
    let layer = text(
        push.layer(9, &pairs([(0, 4)]), None)
            .expect_err("no such layer"),
    );
    assert!(layer.contains("layer 9"), "{layer}");
    push.layer(0, &pairs([(0, 4)]), None).expect("fits");
    // The ticket has come when the bytes have.
    until("bytes", || consumer.first_word(4) != POISON);
    let error = push
        .layer(1, &pairs([(0, 7)]), None)
        .expect_err("not expected");
    assert!(
        matches!(error, Error::NotInTicket { block: 7, .. }),
        "{error}"
    );
    let error = push
        .layer_in_order(1, &groups([0, 1]), None)
        .expect_err("two for three");
    let Error::Plan(PlanError::Lengths {
        producer_blocks: 2,
        consumer_blocks: 3,
        ..
    }) = error
    else {
        panic!("{error}");
    };
    push.layer_in_order(1, &groups([0, 1, 2]), None)
        .expect("fits");
    push.layer(0, &pairs([(1, 5), (2, 6)]), None).expect("fits");
    let transfer = push.commit().expect("committed");
    assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
    let mut log = Log::new(&consumer.engine);
    log.wait("receipt", |event| matches!(event, Event::Received { .. }));
    consumer
        .side
        .verify(7, &pairs([(0, 4), (1, 5), (2, 6)]))
        .expect("every byte");
    consumer.assert_untouched_but([4, 5, 6]);

    // What does not fit a ticket that is still to come ends the push when it comes.
    for early in [true, false] {
        let request = RequestId::from(format!("late-{early}"));
        let push = back.begin_push(&request).expect("a push");
        if early {
            push.layer(0, &pairs([(0, 9)]), None).expect("who knows");
        } else {
            push.layer_in_order(0, &groups([0, 1]), None)
                .expect("who knows");
        }
        consumer
            .engine
            .expect(&request, &groups([8]), 1, LONG)
            .expect("an expectation");
        let transfer = push.commit().expect("its outcome tells");
        let cause = Cause::Refused {
            reason: Refusal::OutOfRange,
        };
        assert_eq!(fails_with(&transfer, cause), MemoryState::Released);
        let ended = log.wait(
            "end",
            |event| matches!(event, Event::Failed { request: r, .. } if *r == request),
        );
        let Event::Failed {
            first_cause,
            memory,
            ..
        } = ended
        else {
            unreachable!();
        };
        assert_eq!(first_cause, Cause::Aborted);
        assert_eq!(memory, MemoryState::Released);
    }
    consumer.assert_untouched_but([4, 5, 6]);
    assert_eq!(ticket.request, RequestId::from("w"));
    log.assert_told_once();
    Log::new(&producer.engine).assert_told_once();
}

#[test]
fn a_push_that_comes_too_late() {
    for path in [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp] {
        let (producer, consumer, _instance) = pair_over(path);
        let back = back(&producer, &consumer);
        let request = RequestId::from("w");
        let mut log = Log::new(&consumer.engine);
        let ticket = consumer
            .engine
            .expect(&request, &groups(0..8), 1, Duration::from_secs(1))
            .expect("an expectation");
        let push = back.begin_push(&request).expect("a push");
        push.layer(0, &pairs((0..8).map(|b| (b, b))), None)
            .expect("fits");
        until("bytes", || consumer.first_word(7) != POISON);
        // No commit comes: the consumer's deadline does.
        let failed = log.wait("failure", |event| matches!(event, Event::Failed { .. }));
        let Event::Failed {
            first_cause,
            invalid_blocks,
            memory,
            ..
        } = failed
        else {
            unreachable!();
        };
        assert_eq!(first_cause, Cause::DeadlinePassed);
        assert_eq!(invalid_blocks, groups(0..8));
        assert_eq!(memory, MemoryState::Quarantined);
        log.wait("release", |event| {
            matches!(
                event,
                Event::Released {
                    reason: ReleaseReason::Drained,
                    ..
                }
            )
        });
        consumer.fill_blocks(0..BLOCKS, RECYCLED);
        // The producer hears why, and can write no more.
        let more = push.layer(1, &pairs((0..8).map(|b| (b, b))), None);
        let transfer = push.commit().expect("its outcome tells");
        fails_with(&transfer, Cause::Revoked);
        if let Err(error) = more {
            assert!(matches!(error, Error::PushEnded { .. }), "{error}");
        }
        // One that begins with the old ticket is refused.
        let options = PushOptions {
            tag: 1,
            ticket: Some(ticket),
            ..PushOptions::default()
        };
        let push = back.begin_push_with(&request, options).expect("a push");
        // Refused by now, if the consumer was quick.
        if let Err(error) = push.all_layers(&pairs([(0, 0)]), None) {
            assert!(matches!(error, Error::PushEnded { .. }), "{error}");
        }
        let cause = Cause::Refused {
            reason: Refusal::Late,
        };
        let transfer = push.commit().expect("its outcome tells");
        fails_with(&transfer, cause);
        std::thread::sleep(Duration::from_millis(50));
        consumer.assert_blocks(0..BLOCKS, RECYCLED);
        log.assert_told_once();
        Log::new(&producer.engine).assert_told_once();
    }
}

#[test]
fn a_push_that_nobody_expects() {
    let (producer, consumer, _instance) = pair();
    let back = back(&producer, &consumer);
    let options = PushOptions {
        deadline: Some(Duration::from_millis(200)),
        ..PushOptions::default()
    };
    let push = back
        .begin_push_with(&RequestId::from("w"), options)
        .expect("a push");
    push.all_layers(&pairs([(0, 0)]), None).expect("fits");
    let transfer = push.commit().expect("committed");
    assert_eq!(
        fails_with(&transfer, Cause::DeadlinePassed),
        MemoryState::Released
    );
    consumer.assert_untouched_but([]);
}

#[test]
fn aborted_and_cancelled_pushes() {
    for path in [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp] {
        let (producer, consumer, _instance) = pair_of(
            &recipe(KvRole::Producer, path, 64 << 10, 512),
            &recipe(KvRole::Consumer, path, 64 << 10, 512),
        );
        let back = back(&producer, &consumer);
        let mut log = Log::new(&consumer.engine);
        for how in ["abort", "drop", "cancel"] {
            let request = RequestId::from(how);
            consumer
                .engine
                .expect(&request, &groups(0..500), 1, LONG)
                .expect("an expectation");
            let push = back.begin_push(&request).expect("a push");
            let table = pairs((0..500).map(|b| (b, 499 - b)));
            push.all_layers(&table, None).expect("fits");
            push.all_layers(&table, None).expect("fits");
            match how {
                "abort" => {
                    fails_with(&push.abort(), Cause::Cancelled);
                }
                "drop" => drop(push),
                _ => {
                    let transfer = push.commit().expect("committed");
                    transfer.cancel();
                    let outcome = transfer.wait(LONG).expect("an outcome");
                    // It may have been done before.
                    if let Some(failure) = outcome.failure() {
                        assert_eq!(failure.first_cause, Cause::Cancelled);
                    }
                    assert!(transfer.wait_released(LONG));
                }
            }
            let ended = log.wait("end", |event| {
                event.request().is_some_and(|(r, _)| *r == request)
            });
            match ended {
                Event::Failed {
                    first_cause,
                    memory,
                    ..
                } => {
                    assert_eq!(first_cause, Cause::Aborted);
                    assert_eq!(memory, MemoryState::Released);
                }
                Event::Received { .. } if how == "cancel" => {}
                other => panic!("{other:?}"),
            }
            consumer.fill_blocks(0..512, RECYCLED);
            std::thread::sleep(Duration::from_millis(30));
            consumer.assert_blocks(0..512, RECYCLED);
        }
        log.assert_told_once();
        Log::new(&producer.engine).assert_told_once();
    }
}

/// Producers that asked and gave up leave no trace: neither in the number of askers, nor for an
/// expectation that comes later.
#[test]
fn pushes_given_up_before_they_were_expected() {
    let (producer, consumer, _instance) = pair();
    let back = back(&producer, &consumer);
    for i in 0..5000 {
        let push = back
            .begin_push(&RequestId::from(format!("given-up-{i}")))
            .expect("a push");
        drop(push);
    }
    for request in ["given-up-0", "wanted"] {
        let request = RequestId::from(request);
        let until = Instant::now() + LONG;
        let mut expected = false;
        let (second, outcome) = loop {
            let push = match back.begin_push(&request) {
                // The one given up has not ended everywhere.
                Err(Error::PushUnderWay { .. }) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
                push => push.expect("a push"),
            };
            let second = back.begin_push(&request).map(drop);
            push.all_layers(&pairs([(1, 2)]), None).expect("fits");
            let transfer = push.commit().expect("committed");
            if !expected {
                // The producer's question is there before the expectation is.
                std::thread::sleep(Duration::from_millis(50));
                consumer
                    .engine
                    .expect(&request, &groups([2]), 1, LONG)
                    .expect("an expectation");
                expected = true;
            }
            let outcome = transfer.wait(LONG);
            let busy = Cause::Refused {
                reason: Refusal::Busy,
            };
            let failure = outcome.as_ref().and_then(Outcome::failure);
            // There are still as many askers as there may be: those given up are on their way out.
            if failure.is_none_or(|f| f.first_cause != busy) || Instant::now() >= until {
                break (second, outcome);
            }
        };
        assert_eq!(outcome, Some(Outcome::Done));
        assert!(matches!(second, Err(Error::PushUnderWay { .. })));
        let mut log = Log::new(&consumer.engine);
        let of = request.clone();
        let event = log.wait("end", |event| {
            event.request().is_some_and(|(r, _)| *r == of)
        });
        assert!(matches!(event, Event::Received { .. }), "{event:?}");
    }
}

/// A push that is begun again while the ticket for its first try, given up early, is on its way:
/// whatever the second one writes, it writes while the consumer counts on it.
#[test]
fn a_retry_that_meets_the_ticket_of_the_first_try() {
    for path in [PathKind::Arena, PathKind::Tcp] {
        let (producer, consumer, _instance) = pair_over(path);
        let back = back(&producer, &consumer);
        let mut log = Log::new(&consumer.engine);
        let mut arrived = 0;
        for i in 0..300 {
            let request = RequestId::from(format!("r{i}"));
            consumer.fill_blocks(0..4, RECYCLED);
            consumer
                .engine
                .expect(&request, &groups(0..4), 1, LONG)
                .expect("an expectation");
            drop(back.begin_push(&request).expect("a push"));
            let again = loop {
                // The first one has not ended.
                match back.begin_push(&request) {
                    Ok(push) => break push,
                    Err(Error::PushUnderWay { .. }) => std::thread::yield_now(),
                    Err(other) => panic!("{other}"),
                }
            };
            let table = pairs((0..4).map(|b| (b, b)));
            let of = |event: &Event| event.request().is_some_and(|(r, _)| *r == request);
            // Refused by now, if the consumer has heard of the first one's end before.
            let written = again.all_layers(&table, None).is_ok();
            std::thread::sleep(Duration::from_millis(2));
            if log.count(of) == 0 {
                let transfer = again.commit().expect("its outcome tells");
                if let Event::Received { .. } = log.wait("end", of) {
                    assert!(written);
                    arrived += 1;
                    assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
                }
                transfer.cancel();
                assert!(transfer.wait_released(LONG));
                continue;
            }
            if log.count(|event| matches!(event, Event::Failed { memory: MemoryState::Quarantined, .. } if of(event))) == 1 {
                log.wait("release", |event| matches!(event, Event::Released { .. } if of(event)));
            }
            consumer.fill_blocks(0..4, RECYCLED);
            // It may not know yet, but what it writes does not land.
            for _ in 0..8 {
                if again.all_layers(&table, None).is_err() {
                    break;
                }
            }
            let transfer = again.commit().expect("its outcome tells");
            std::thread::sleep(Duration::from_millis(2));
            transfer.cancel();
            assert!(transfer.wait_released(LONG));
            consumer.assert_blocks(0..4, RECYCLED);
        }
        println!("{arrived} of 300 retries over {path} have arrived");
        log.assert_told_once();
    }
}
