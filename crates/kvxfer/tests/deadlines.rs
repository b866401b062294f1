//! How late an outcome comes when a deadline passes with the peer stopped. It measures time, so it
//! runs in the long suite only, alone.

mod support;

use std::time::{Duration, Instant};

use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{PullOptions, PushOptions, Transfer};
use kvxfer::event::Event;
use kvxfer::ids::RequestId;
use kvxfer::transfer::Cause;
use support::child::{self, Child, Spec};
use support::{LONG, Log, Node, groups, pairs, recipe};

const BLOCK: u64 = 16 << 10;
const BLOCKS: u32 = 64;
/// How early or late an outcome may come.
const BOUND: Duration = Duration::from_millis(20);
const DEADLINES_MS: [u64; 8] = [30, 50, 80, 110, 170, 230, 310, 470];

fn peer(role: KvRole, path: PathKind) -> Child {
    Child::start(&Spec {
        role,
        path,
        block_bytes: BLOCK,
        blocks: BLOCKS,
        listen: "127.0.0.1:0".to_owned(),
        engine_id: None,
        seed: 1,
        namespace: None,
    })
}

fn node(role: KvRole, path: PathKind) -> Node {
    // Nothing but the deadlines is to end what waits.
    recipe(role, path, BLOCK, BLOCKS)
        .with(|config| config.drain_grace = Duration::from_secs(20))
        .node()
}

fn table() -> Vec<kvxfer::blocks::GroupPairs> {
    pairs((0..BLOCKS).map(|b| (b, BLOCKS - 1 - b)))
}

/// Waits for all of them, each on a thread of its own; how far each was from its deadline.
fn offsets(transfers: Vec<(Instant, Transfer)>) -> Vec<Duration> {
    let wait = |(end, transfer): (Instant, Transfer)| {
        std::thread::spawn(move || {
            let outcome = transfer.wait(LONG).expect("an outcome");
            let now = Instant::now();
            let failure = outcome.failure().expect("its peer is stopped");
            assert_eq!(failure.first_cause, Cause::DeadlinePassed);
            now.max(end) - now.min(end)
        })
    };
    let waiting: Vec<_> = transfers.into_iter().map(wait).collect();
    waiting
        .into_iter()
        .map(|thread| thread.join().expect("an offset"))
        .collect()
}

fn holds(what: &str, mut offsets: Vec<Duration>) {
    offsets.sort_unstable();
    let (median, worst) = (offsets[offsets.len() / 2], offsets[offsets.len() - 1]);
    println!(
        "{what}: {} outcomes, median {median:?}, at most {worst:?} off",
        offsets.len()
    );
    assert!(worst <= BOUND, "{what}: {offsets:?}");
}

fn pulls_over_tcp() {
    let mut producer = peer(KvRole::Producer, PathKind::Tcp);
    let node = node(KvRole::Consumer, PathKind::Tcp);
    let from = node
        .engine
        .connect(&producer.address, LONG)
        .expect("a session");
    let ticket = producer.offer("r", BLOCKS, LONG);
    producer.stop();
    let pull = |(tag, ms): (u64, u64)| {
        let deadline = Duration::from_millis(ms);
        let options = PullOptions {
            tag,
            deadline: Some(deadline),
            hold: true,
            ..PullOptions::default()
        };
        let end = Instant::now() + deadline;
        // Each into blocks of its own.
        let own = (0..BLOCKS).filter(|b| u64::from(*b) % DEADLINES_MS.len() as u64 == tag);
        let table = pairs(own.map(|b| (b, BLOCKS - 1 - b)));
        let transfer = from.pull(&ticket, &table, options).expect("a transfer");
        (end, transfer)
    };
    let transfers = (0..).zip(DEADLINES_MS).map(pull).collect();
    holds("READ over tcp", offsets(transfers));
}

fn pushes(path: PathKind) {
    let mut consumer = peer(KvRole::Consumer, path);
    let node = node(KvRole::Producer, path);
    let to = node
        .engine
        .connect(&consumer.address, LONG)
        .expect("a session");
    let mut all = Vec::new();
    for (i, ms) in DEADLINES_MS.into_iter().enumerate() {
        // The one that is expected moves; the others wait for a ticket that never comes.
        if i == 0 {
            consumer.expect("w-0", BLOCKS, LONG);
        }
        all.push((format!("w-{i}"), Duration::from_millis(ms)));
    }
    consumer.stop();
    let push = |(request, deadline): (String, Duration)| {
        let options = PushOptions {
            deadline: Some(deadline),
            ..PushOptions::default()
        };
        let end = Instant::now() + deadline;
        let push = to
            .begin_push_with(&RequestId::from(request.as_str()), options)
            .expect("a push");
        push.all_layers(&table(), None).expect("fits");
        (end, push.commit().expect("committed"))
    };
    let transfers = all.into_iter().map(push).collect();
    holds(&format!("WRITE over {path}"), offsets(transfers));
}

fn expectations() {
    let node = node(KvRole::Consumer, PathKind::Tcp);
    let mut log = Log::new(&node.engine);
    let mut found = Vec::new();
    for (i, ms) in DEADLINES_MS.into_iter().enumerate() {
        let (deadline, request) = (Duration::from_millis(ms), format!("e-{i}"));
        let request = RequestId::from(request.as_str());
        let end = Instant::now() + deadline;
        node.engine
            .expect(&request, &groups(0..8), 1, deadline)
            .expect("an expectation");
        log.wait(
            "failure",
            |event| matches!(event, Event::Failed { request: r, .. } if *r == request),
        );
        let now = Instant::now();
        found.push(now.max(end) - now.min(end));
    }
    holds("expectations", found);
}

#[test]
#[ignore = "measures time on an idle machine: cargo xtask test --long runs it, alone"]
fn outcomes_come_at_their_deadlines() {
    expectations();
    pulls_over_tcp();
    for path in [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp] {
        pushes(path);
    }
}

/// Not a test: what children run.
#[test]
fn child_entry() {
    child::entry();
}
