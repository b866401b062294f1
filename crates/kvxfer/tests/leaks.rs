//! Sessions and engines that come and go leave nothing behind: no descriptors, no threads, no
//! memory. Alone in its file, for it counts what the whole process has.

mod support;

use std::fs;
use std::time::Duration;

use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Outcome, PullOptions};
use kvxfer::ids::RequestId;
use support::{LONG, Node, bounded, groups, pairs, recipe};

const BLOCK: u64 = 4096;
const BLOCKS: u32 = 64;
const CYCLES: u32 = 100;

/// How many entries a directory of /proc/self has.
fn entries(of: &str) -> usize {
    fs::read_dir(format!("/proc/self/{of}"))
        .expect("procfs")
        .count()
}

fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .expect("a resident size");
    let number = line.split_whitespace().nth(1).expect("a number");
    number.parse().expect("a number")
}

/// Waits until there are no more descriptors and threads than before; their owners have told
/// everybody that they go, and may still be on their way.
#[track_caller]
fn settles(what: &str, fds: usize, threads: usize) {
    let begun = std::time::Instant::now();
    loop {
        let (fds_now, threads_now) = (entries("fd"), entries("task"));
        if fds_now <= fds && threads_now <= threads {
            return;
        }
        assert!(
            begun.elapsed() < LONG,
            "{what}: {fds_now} descriptors, {fds} before; {threads_now} threads, {threads} before"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

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
        let (fds, threads) = (entries("fd"), entries("task"));
        let resident = resident_kib();
        for i in 0..CYCLES {
            pull(&producer, &consumer, &address, &format!("session-{i}"));
        }
        settles("sessions", fds, threads);
        for i in 0..CYCLES {
            let (consumer, text) = (new(), format!("engine-{i}"));
            pull(&producer, &consumer, &address, &text);
            bounded("engine drop", move || drop(consumer));
        }
        settles("engines", fds, threads);
        let grown = resident_kib().saturating_sub(resident);
        assert!(grown < 32 << 10, "{grown} KiB more resident over {path}");
    }
}
