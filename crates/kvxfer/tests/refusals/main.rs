//! Bad input: whatever is wrong with an address, a peer, a secret, a format, a ticket or a list of
//! blocks ends in a typed error or outcome that names the cause, by its deadline, and writes nothing
//! outside the blocks asked for.

#[path = "../support/mod.rs"]
mod support;

mod calls;
mod misfits;
mod observers;
mod owned;
mod pulls;
mod pushes;
mod strangers;

use std::time::Duration;

use kvxfer::Error;
use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Instance, Peer, Transfer};
use kvxfer::event::{Event, MemoryState};
use kvxfer::ids::RequestId;
use kvxfer::session::SessionError;
use kvxfer::ticket::Ticket;
use kvxfer::transfer::Cause;
use support::{LONG, Log, Node, groups, recipe};

pub(crate) const BLOCK: u64 = 4096 + 24;
pub(crate) const BLOCKS: u32 = 32;
pub(crate) const SOON: Duration = Duration::from_secs(1);

pub(crate) fn side(role: KvRole) -> Node {
    recipe(role, PathKind::Arena, BLOCK, BLOCKS).node()
}

/// A producer that listens and a consumer that has connected; the producer's blocks are filled with
/// pattern 7, the consumer's poisoned.
pub(crate) fn pair_over(path: PathKind) -> (Node, Node, Instance) {
    pair_of(
        &recipe(KvRole::Producer, path, BLOCK, BLOCKS),
        &recipe(KvRole::Consumer, path, BLOCK, BLOCKS),
    )
}

pub(crate) fn pair_of(
    producer: &support::Recipe,
    consumer: &support::Recipe,
) -> (Node, Node, Instance) {
    let (producer, consumer) = (producer.node(), consumer.node());
    producer.side.fill(7).expect("filled");
    consumer.side.poison().expect("poisoned");
    let address = producer.engine.listen("127.0.0.1:0").expect("a free port");
    let instance = consumer
        .engine
        .connect(&address.to_string(), LONG)
        .expect("a session");
    (producer, consumer, instance)
}

pub(crate) fn pair() -> (Node, Node, Instance) {
    pair_over(PathKind::Arena)
}

/// The producer's way to a consumer that has connected to it.
pub(crate) fn back(producer: &Node, consumer: &Node) -> Peer {
    let name = consumer.name();
    let mut log = Log::new(&producer.engine);
    log.wait(
        "peer",
        |event| matches!(event, Event::PeerUp { peer, .. } if *peer == name),
    );
    producer.engine.peer_of(&name).expect("a session")
}

pub(crate) fn offer(producer: &Node, request: &str, blocks: u32) -> Ticket {
    producer
        .engine
        .offer(&RequestId::from(request), &groups(0..blocks), 1, LONG)
        .expect("an offer")
}

#[track_caller]
pub(crate) fn fails_with(transfer: &Transfer, cause: Cause) -> MemoryState {
    let outcome = transfer.wait(LONG).expect("an outcome");
    let failure = outcome.failure().expect("a failure");
    assert_eq!(failure.first_cause, cause);
    assert!(transfer.wait_released(LONG), "memory comes back");
    failure.memory
}

pub(crate) fn session_error(error: &Error) -> &SessionError {
    match error {
        Error::Session { source, .. } => source,
        other => panic!("{other:?}"),
    }
}

/// An error and its sources.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
