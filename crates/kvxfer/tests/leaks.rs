//! Sessions and engines that come and go leave nothing behind: no descriptors, no threads, no
//! memory. Alone in its file, for it counts what the whole process has.

mod support;

use std::time::Duration;

use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Outcome, PullOptions};
use kvxfer::ids::RequestId;
use support::counts::Counts;
use support::{LONG, Node, bounded, groups, pairs, recipe};

const BLOCK: u64 = 4096;
const BLOCKS: u32 = 64;
const CYCLES: u32 = 100;

fn pull(producer: &Node, consumer: &Node, address: &str, request: &str) {
    let instance = consumer.engine.connect(address, LONG).expect("a session");
    let request = RequestId::from(request);
    let ticket = producer
        .engine
        .offer(&request, &groups(0..8), 1, LONG)
        .expect("an offer");
    let transfer = instance
        .pull(&ticket, &pairs([(1, 2)]), PullOptions::default())
        .expect("a transfer");
    assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
}

#[test]
fn coming_and_going() {
    for path in [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp] {
        let producer = recipe(KvRole::Producer, path, BLOCK, BLOCKS).node();
        let address = producer.engine.listen("127.0.0.1:0").expect("a port");
        let address = address.to_string();
        let new = || recipe(KvRole::Consumer, path, BLOCK, BLOCKS).node();
        let consumer = new();
        // What is made once, is made.
        for i in 0..3 {
            pull(&producer, &consumer, &address, &format!("warm-{i}"));
            pull(&producer, &new(), &address, &format!("warm-too-{i}"));
        }
        std::thread::sleep(Duration::from_millis(500));
        let before = Counts::now();
        for i in 0..CYCLES {
            pull(&producer, &consumer, &address, &format!("session-{i}"));
        }
        before.settle("sessions");
        for i in 0..CYCLES {
            let (consumer, text) = (new(), format!("engine-{i}"));
            pull(&producer, &consumer, &address, &text);
            bounded("engine drop", move || drop(consumer));
        }
        before.settle("engines");
        let grown = before.grown_kib();
        assert!(grown < 32 << 10, "{grown} KiB more resident over {path}");
    }
}
