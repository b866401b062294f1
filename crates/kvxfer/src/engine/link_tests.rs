//! What a link makes of things that happen at once.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use super::panic_tests::{LONG, Node, name_of, pair, wait_for};
use super::peer_session::PeerSession;
use crate::Error;
use crate::blocks::{BlockPair, GroupBlocks, GroupPairs};
use crate::config::PathKind;
use crate::engine::{Instance, PullOptions};
use crate::event::Event;
use crate::ids::RequestId;
use crate::ticket::Ticket;
use crate::transfer::{Cause, DrainToken};
use crate::wire::Release;

/// A consumer's session with a producer that offers its first block.
struct Offered {
    producer: Node,
    consumer: Node,
    instance: Instance,
    session: Arc<PeerSession>,
    ticket: Ticket,
}

fn offered() -> Offered {
    let (producer, consumer, instance, _) = pair(PathKind::Arena);
    let blocks = vec![GroupBlocks {
        group: 0,
        blocks: vec![0],
    }];
    let offer = producer
        .engine
        .offer(&RequestId::from("r"), &blocks, 1, LONG);
    let session = consumer.engine.inner().peer_named(&name_of(&producer));
    Offered {
        session: session.expect("a session"),
        ticket: offer.expect("an offer"),
        producer,
        consumer,
        instance,
    }
}

fn first_block() -> Vec<GroupPairs> {
    vec![GroupPairs {
        group: 0,
        pairs: vec![BlockPair { src: 0, dst: 0 }],
    }]
}

/// A queue pair fails because its peer has gone, and its worker is the first to say so.
#[test]
fn the_end_of_a_peer_is_the_cause_not_that_of_its_queue_pairs() {
    let (producer, consumer, instance, _) = pair(PathKind::Arena);
    let mut seen = Vec::new();
    wait_for(&consumer.engine, &mut seen, |event| {
        matches!(event, Event::PeerUp { .. })
    });
    let session = consumer.engine.inner().peer_named(&name_of(&producer));
    let session = session.expect("a session");
    let (resume, held) = channel();
    session.link.hold(held);
    drop(producer);
    session.fail(Cause::LaneReset);
    drop(resume);
    let down = wait_for(&consumer.engine, &mut seen, |event| {
        matches!(event, Event::PeerDown { .. })
    });
    let Event::PeerDown { cause, .. } = down else {
        unreachable!();
    };
    assert_eq!(cause, Cause::PeerClosed);
    drop(instance);
}

/// What this side knows before its peer resets the session is the cause, whoever's thread is the
/// first to run.
#[test]
fn what_was_known_first_is_the_cause() {
    let (producer, consumer, instance, _) = pair(PathKind::Arena);
    let session = consumer.engine.inner().peer_named(&name_of(&producer));
    let session = session.expect("a session");
    let (resume, held) = channel();
    session.link.hold_and_read(held);
    session.fail(Cause::CompletionQueue);
    let mut seen = Vec::new();
    wait_for(&producer.engine, &mut seen, |event| {
        matches!(event, Event::PeerUp { .. })
    });
    let back = producer.engine.inner().peer_named(&name_of(&consumer));
    back.expect("a session").fail(Cause::LaneReset);
    wait_for(&producer.engine, &mut seen, |event| {
        matches!(event, Event::PeerDown { .. })
    });
    drop(resume);
    let mut seen = Vec::new();
    let down = wait_for(&consumer.engine, &mut seen, |event| {
        matches!(event, Event::PeerDown { .. })
    });
    let Event::PeerDown { cause, .. } = down else {
        unreachable!();
    };
    assert_eq!(cause, Cause::CompletionQueue);
    drop(instance);
}

/// Nor do transfers fail for what the peer does because of it.
#[test]
fn what_was_known_first_is_the_cause_of_transfers() {
    let Offered {
        producer,
        consumer: _consumer,
        instance,
        session,
        ticket,
    } = offered();
    let (resume, held) = channel();
    session.link.hold(held);
    session.fail(Cause::CompletionQueue);
    drop(producer);
    let pairs = first_block();
    let transfer = instance.pull(&ticket, &pairs, PullOptions::default());
    let transfer = transfer.expect("the session is not over");
    // Its queue pair is gone at the peer, and that fails it, or the end of the session does.
    std::thread::sleep(Duration::from_millis(100));
    drop(resume);
    let outcome = transfer.wait(LONG).expect("an outcome");
    let failure = outcome.failure().expect("its peer is gone");
    assert_eq!(failure.first_cause, Cause::CompletionQueue);
    drop(instance);
}

/// Where the connection stands, they are the cause.
#[test]
fn queue_pairs_alone_are_a_cause() {
    let (producer, consumer, instance, _) = pair(PathKind::Arena);
    let session = consumer.engine.inner().peer_named(&name_of(&producer));
    session.expect("a session").fail(Cause::LaneReset);
    let mut seen = Vec::new();
    let down = wait_for(&consumer.engine, &mut seen, |event| {
        matches!(event, Event::PeerDown { .. })
    });
    let Event::PeerDown { cause, .. } = down else {
        unreachable!();
    };
    assert_eq!(cause, Cause::LaneReset);
    drop(instance);
}

/// A session that ends for its queue pairs says nothing more, though it waits for a moment.
#[test]
fn nothing_is_said_after_a_reset() {
    let Offered {
        producer,
        consumer: _consumer,
        instance,
        session,
        ticket,
    } = offered();
    let (request, nonce) = (ticket.request, ticket.nonce);
    let mut seen = Vec::new();
    wait_for(&producer.engine, &mut seen, |event| {
        matches!(event, Event::PeerUp { .. })
    });
    let (resume, held) = channel();
    session.link.hold(held);
    session.fail(Cause::LaneReset);
    let release = Release {
        request: request.clone(),
        nonce,
    };
    session.link.send(release.into());
    drop(resume);
    wait_for(&producer.engine, &mut seen, |event| {
        matches!(event, Event::PeerDown { .. })
    });
    let told = |event: &Event| matches!(event, Event::Released { .. });
    assert!(!seen.iter().any(told), "{seen:#?}");
    assert!(producer.engine.retract(&request), "it is on offer");
    drop(instance);
}

/// From the moment when they are taken down, and not only when the session is over.
#[test]
fn nothing_new_runs_over_queue_pairs_that_are_taken_down() {
    let Offered {
        producer: _producer,
        consumer: _consumer,
        instance,
        session,
        ticket,
    } = offered();
    let (resume, held) = channel();
    session.link.hold(held);
    session.drain(0, DrainToken::ANY);
    let pairs = first_block();
    assert!(!instance.is_up(), "no transfer could run");
    let refused = instance.pull(&ticket, &pairs, PullOptions::default());
    let Err(Error::NotConnected { cause }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(cause, Cause::LaneReset);
    drop(resume);
    assert!(instance.wait_up(LONG), "set up anew");
    let again = instance.pull(&ticket, &pairs, PullOptions::default());
    let outcome = again.expect("a pull").wait(LONG);
    assert!(outcome.expect("an outcome").is_done());
}
