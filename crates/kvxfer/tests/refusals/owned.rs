//! A block that is in something under way is in nothing else that does not go with it, until its
//! memory is released.

use std::time::Duration;

use crate::support::{LONG, Log, Node, Recipe, groups, pairs, recipe};
use crate::{BLOCK, BLOCKS, back, chain, offer, pair_of};
use kvxfer::Error;
use kvxfer::claims::{BlockInUse, Purpose};
use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Instance, Outcome, PullOptions, Transfer};
use kvxfer::event::{Class, Event, MemoryState};
use kvxfer::expects::ExpectError;
use kvxfer::ids::RequestId;
use kvxfer::ticket::Ticket;

/// A side whose work requests take their time, and that is in no hurry to have its memory back.
fn slow(role: KvRole) -> Recipe {
    recipe(role, PathKind::Arena, BLOCK, BLOCKS).with(|config| {
        config.faults = Some("delay=1:1s".parse().expect("a plan"));
        config.drain_grace = Duration::from_secs(20);
    })
}

fn producer() -> Recipe {
    recipe(KvRole::Producer, PathKind::Arena, BLOCK, BLOCKS)
}

fn pull(instance: &Instance, ticket: &Ticket, dst: u32) -> Result<Transfer, Error> {
    instance.pull(ticket, &pairs([(0, dst)]), PullOptions::default())
}

#[track_caller]
fn in_use<T: std::fmt::Debug>(result: Result<T, Error>) -> BlockInUse {
    match result.expect_err("the block is in something else") {
        Error::InUse(refused) | Error::Expect(ExpectError::InUse(refused)) => refused,
        error => panic!("{error}"),
    }
}

#[track_caller]
fn names(refused: &BlockInUse, block: u32, request: &str, held_by: &str, held_for: Purpose) {
    assert_eq!((refused.group, refused.block), (0, block), "{refused}");
    let names = (refused.request.clone(), refused.held_by.clone());
    let wanted = (RequestId::from(request), RequestId::from(held_by));
    assert_eq!(names, wanted, "{refused}");
    assert_eq!(refused.held_for, held_for, "{refused}");
}

#[test]
fn a_block_is_pulled_once_at_a_time() {
    let (producer, consumer, instance) = pair_of(&producer(), &slow(KvRole::Consumer));
    let (a, b) = (offer(&producer, "a", 8), offer(&producer, "b", 8));
    let first = pull(&instance, &a, 5).expect("a transfer");
    names(&in_use(pull(&instance, &b, 5)), 5, "b", "a", Purpose::Pull);
    // Nor by the request that has it.
    names(&in_use(pull(&instance, &a, 5)), 5, "a", "a", Purpose::Pull);
    let expected = |request: &str| {
        consumer
            .engine
            .expect(&RequestId::from(request), &groups([4, 5]), 1, LONG)
    };
    names(&in_use(expected("e")), 5, "e", "a", Purpose::Pull);
    assert_eq!(
        first.outcome(),
        None,
        "it ended before anything was refused"
    );
    let beside = pull(&instance, &b, 4).expect("another block");
    for (transfer, block) in [(first, 5), (beside, 4)] {
        assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
        consumer
            .side
            .verify(7, &pairs([(0, block)]))
            .expect("bytes");
    }
    // The outcome is out, so the block is free.
    expected("e").expect("an expectation");
    let c = offer(&producer, "c", 8);
    let refused = in_use(pull(&instance, &c, 5));
    names(&refused, 5, "c", "e", Purpose::Expect);
    assert!(consumer.engine.cancel_expect(&RequestId::from("e")));
    let last = pull(&instance, &c, 5).expect("a transfer");
    assert_eq!(last.wait(LONG), Some(Outcome::Done));
    consumer.assert_untouched_but([4, 5]);
}

#[test]
fn a_quarantined_block_waits_for_its_release() {
    let (producer, consumer, instance) = pair_of(&producer(), &slow(KvRole::Consumer));
    let (a, b) = (offer(&producer, "a", 8), offer(&producer, "b", 8));
    // Until one is cancelled after it was posted.
    let mut pause = Duration::from_millis(10);
    let cancelled = loop {
        let cancelled = pull(&instance, &a, 5).expect("a transfer");
        std::thread::sleep(pause);
        cancelled.cancel();
        let outcome = cancelled.wait(LONG).expect("an outcome");
        let failure = outcome.failure().expect("its work takes a second");
        if failure.memory == MemoryState::Quarantined {
            break cancelled;
        }
        // What is told of this one is not to be taken for the next one's.
        Log::new(&consumer.engine).assert_told_once();
        pause *= 2;
    };
    names(&in_use(pull(&instance, &b, 5)), 5, "b", "a", Purpose::Pull);
    names(&in_use(pull(&instance, &a, 5)), 5, "a", "a", Purpose::Pull);
    assert!(!cancelled.is_released(), "released before it was asked for");
    assert!(cancelled.wait_released(LONG));
    let next = pull(&instance, &b, 5).expect("a transfer");
    assert_eq!(next.wait(LONG), Some(Outcome::Done));
    consumer.side.verify(7, &pairs([(0, 5)])).expect("bytes");
    Log::new(&consumer.engine).assert_told_once();
}

/// An engine of both roles offers nothing that is being written, and lets nothing be written that it
/// has on offer or pushes.
#[test]
fn what_is_read_is_not_written() {
    let (first, second, instance) = pair_of(&slow(KvRole::Both), &slow(KvRole::Both));
    let offered = |node: &Node, request: &str, block| {
        let request = RequestId::from(request);
        node.engine.offer(&request, &groups([block]), 1, LONG)
    };
    let ticket = offer(&first, "a", 8);
    let pulling = pull(&instance, &ticket, 5).expect("a transfer");
    let refused = in_use(offered(&second, "o", 5));
    names(&refused, 5, "o", "a", Purpose::Pull);
    let push = instance
        .begin_push(&RequestId::from("p"))
        .expect("it begins");
    let refused = in_use(push.all_layers(&pairs([(5, 20)]), None));
    names(&refused, 5, "p", "a", Purpose::Pull);
    assert_eq!(
        pulling.outcome(),
        None,
        "it ended before anything was refused"
    );
    assert_eq!(pulling.wait(LONG), Some(Outcome::Done));
    offered(&second, "o", 5).expect("an offer");
    // Two that read go together.
    offered(&second, "o2", 5).expect("an offer");
    push.all_layers(&pairs([(5, 20)]), None)
        .expect("its outcome is out");

    let again = offer(&first, "b", 9);
    let refused = in_use(pull(&instance, &again, 5));
    assert!(
        ["o", "o2", "p"]
            .map(RequestId::from)
            .contains(&refused.held_by)
    );
    let error = Error::InUse(refused);
    assert_eq!(error.class(), Class::Fatal, "{}", chain(&error));
    assert!(second.engine.retract(&RequestId::from("o")));
    assert!(second.engine.retract(&RequestId::from("o2")));
    let refused = in_use(pull(&instance, &again, 5));
    names(&refused, 5, "b", "p", Purpose::Push);
    assert!(push.abort().wait_released(LONG));
    let last = pull(&instance, &again, 5).expect("all have let go of it");
    assert_eq!(last.wait(LONG), Some(Outcome::Done));
}

/// The expectation of one request and the pull of another, and the other way round.
#[test]
fn an_expected_block_is_not_pulled_into() {
    let both = recipe(KvRole::Producer, PathKind::Arena, BLOCK, BLOCKS);
    let (producer, consumer, instance) = pair_of(&both, &slow(KvRole::Consumer));
    let request = RequestId::from("e");
    let wanted = consumer.engine.expect(&request, &groups([5]), 1, LONG);
    wanted.expect("an expectation");
    let a = offer(&producer, "a", 8);
    names(
        &in_use(pull(&instance, &a, 5)),
        5,
        "a",
        "e",
        Purpose::Expect,
    );
    let push = back(&producer, &consumer).begin_push(&request);
    let push = push.expect("it begins");
    push.all_layers(&pairs([(3, 5)]), None).expect("planned");
    let push = push.commit().expect("committed");
    assert_eq!(push.wait(LONG), Some(Outcome::Done));
    Log::new(&consumer.engine).wait(
        "the end",
        |event| matches!(event, Event::Received { request: of, .. } if *of == request),
    );
    let last = pull(&instance, &a, 5).expect("a transfer");
    assert_eq!(last.wait(LONG), Some(Outcome::Done));
}
