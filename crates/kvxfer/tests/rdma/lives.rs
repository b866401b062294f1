//! A producer that goes while it is read from, and comes again under its name: its keys are others.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use kvxfer::Error;
use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Outcome, PullOptions};
use kvxfer::event::{Class, Event};
use kvxfer::ids::RequestId;
use kvxfer::ticket::Ticket;
use kvxfer::transfer::{Cause, CompletionStatus};

use crate::support::{LONG, Log, Node, POISON, RECYCLED, bounded, groups, pairs, recipe, until};

const BLOCK: u64 = 64 << 10;
const BLOCKS: u32 = 256;

/// A life of the producer, with the ticket of an offer of all that it has.
fn life(seed: u64, address: Option<SocketAddr>) -> (Node, SocketAddr, Ticket) {
    let node = recipe(KvRole::Producer, PathKind::Rdma, BLOCK, BLOCKS)
        .with(|config| config.engine_id = Some("phoenix".into()))
        .node();
    node.side.fill(seed).expect("filled");
    let wanted = address.map_or("127.0.0.1:0".into(), |address| address.to_string());
    // The one before may hold the address for a moment.
    let mut bound = None;
    until("the address", || {
        bound = node.engine.listen(&wanted).ok();
        bound.is_some()
    });
    let request = RequestId::from(format!("of {seed}").as_str());
    let ticket = node.engine.offer(&request, &groups(0..BLOCKS), 1, LONG);
    (node, bound.expect("just bound"), ticket.expect("an offer"))
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_a_ticket_of_an_earlier_life() {
    let consumer = recipe(KvRole::Consumer, PathKind::Rdma, BLOCK, BLOCKS).node();
    consumer.side.poison().expect("poisoned");
    let mut log = Log::new(&consumer.engine);
    let (producer, address, old) = life(1, None);
    let instance = consumer.engine.connect(&address.to_string(), LONG);
    let instance = instance.expect("a session");
    let all = pairs((0..BLOCKS).map(|b| (b, BLOCKS - 1 - b)));
    // It goes in the middle of a pull, with its memory.
    let options = || PullOptions {
        deadline: Some(Duration::from_secs(20)),
        hold: true,
        ..PullOptions::default()
    };
    let transfer = instance.pull(&old, &all, options()).expect("a transfer");
    until("the first bytes", || {
        (0..BLOCKS).any(|block| consumer.first_word(block) != POISON)
    });
    bounded("engine drop", move || drop(producer));
    let outcome = transfer.wait(LONG).expect("an outcome");
    if let Some(failure) = outcome.failure() {
        println!("the pull under way: {}", failure.first_cause);
        let flushed = CompletionStatus::Flush;
        assert!(
            !matches!(&failure.first_cause, Cause::Completion { status, .. } if *status == flushed),
            "{failure:?}"
        );
    }
    assert!(transfer.wait_released(LONG), "memory comes back");
    consumer.fill_blocks(0..BLOCKS, RECYCLED);
    let (producer, _, new) = life(2, Some(address));
    let begun = Instant::now();
    let refused = loop {
        match instance.pull(&old, &all, options()) {
            Err(Error::NotConnected { .. }) if begun.elapsed() < LONG => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => break error,
            Ok(_) => panic!("a ticket of an earlier life was taken"),
        }
    };
    assert!(matches!(refused, Error::OldGeneration { .. }), "{refused}");
    assert_eq!(refused.class(), Class::Recompute);
    consumer.assert_blocks(0..BLOCKS, RECYCLED);
    let transfer = instance.pull(&new, &all, options()).expect("a transfer");
    assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
    consumer.side.verify(2, &all).expect("every byte");
    log.wait("restart", |e| matches!(e, Event::PeerRestarted { .. }));
    log.assert_told_once();
    bounded("engine drop", move || drop((instance, consumer, producer)));
}
