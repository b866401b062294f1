//! A peer that is killed and started again on its address, over and over, at every stage: each time
//! it is met again without being asked for, and the survivor has nothing left over from its lives.
//! Alone in its file, for it counts what the whole process has. 1,000 lives in the long suite.

mod support;

use std::time::Duration;

use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Instance, Outcome, PullOptions, Transfer};
use kvxfer::event::Event;
use kvxfer::ids::RequestId;
use support::child::{self, Child, Spec};
use support::counts::Counts;
use support::{LONG, Node, dealt, groups, pairs, recipe, until};

const BLOCK: u64 = 32 << 10;
const BLOCKS: u32 = 256;
const SEED: u64 = 5;
const PATHS: [PathKind; 5] = [
    PathKind::Arena,
    PathKind::ProcessVm,
    PathKind::Tcp,
    PathKind::Ipc,
    PathKind::Staged,
];

/// Where in its life a peer is killed.
#[derive(Debug, Clone, Copy)]
enum Stage {
    /// Before anybody has met it again.
    Unmet,
    Idle,
    Offered,
    Pulled,
    /// Its push is begun and not committed.
    Begun,
    Pushing,
}

const STAGES: [Stage; 6] = [
    Stage::Unmet,
    Stage::Idle,
    Stage::Offered,
    Stage::Pulled,
    Stage::Begun,
    Stage::Pushing,
];

fn lives() -> usize {
    let long = std::env::var_os("KVXFER_LONG_TESTS").is_some();
    // Over all paths.
    if long { 1000 } else { 120 }
}

fn spec(path: PathKind, listen: &str) -> Spec {
    Spec {
        role: KvRole::Producer,
        path,
        block_bytes: BLOCK,
        blocks: BLOCKS,
        listen: listen.to_owned(),
        engine_id: Some("phoenix".to_owned()),
        seed: SEED,
        namespace: None,
    }
}

/// A life of the peer, as far as it goes. What is left under way is answered with.
fn live(
    node: &Node,
    instance: &Instance,
    child: &mut Child,
    stage: Stage,
    request: &str,
) -> Vec<Transfer> {
    let all = || pairs((0..BLOCKS).map(|b| (b, BLOCKS - 1 - b)));
    if matches!(stage, Stage::Unmet) {
        return Vec::new();
    }
    // The session with this life, not the one before.
    let ticket = child.offer(&format!("{request}-first"), 8, LONG);
    let wanted = pairs([(1, 2), (3, 5)]);
    until("a pull", || {
        let pull = instance.pull(&ticket, &wanted, PullOptions::default());
        pull.is_ok_and(|transfer| transfer.wait(LONG) == Some(Outcome::Done))
    });
    node.side.verify(SEED, &wanted).expect("every byte");
    match stage {
        Stage::Unmet | Stage::Idle => Vec::new(),
        Stage::Offered => {
            child.offer(request, BLOCKS, LONG);
            Vec::new()
        }
        Stage::Pulled => {
            let ticket = child.offer(request, BLOCKS, LONG);
            let pull = |(tag, wanted): (u64, Vec<_>)| {
                let options = PullOptions {
                    tag,
                    hold: true,
                    ..PullOptions::default()
                };
                instance
                    .pull(&ticket, &wanted, options)
                    .expect("a transfer")
            };
            (0..).zip(dealt(&all(), 8)).map(pull).collect()
        }
        Stage::Begun | Stage::Pushing => {
            node.engine
                .expect(&RequestId::from(request), &groups(0..BLOCKS), 1, LONG)
                .expect("an expectation");
            if matches!(stage, Stage::Begun) {
                child.begin(&node.name(), request, BLOCKS);
            } else {
                child.push(&node.name(), request, BLOCKS, 8);
            }
            Vec::new()
        }
    }
}

/// Whether the event ends the request.
fn ends(event: &Event, request: &str) -> bool {
    event
        .request()
        .is_some_and(|(r, _)| *r == RequestId::from(request))
        && matches!(event, Event::Received { .. } | Event::Failed { .. })
}

#[test]
fn lives_of_a_peer() {
    let each = lives().div_ceil(PATHS.len());
    for path in PATHS {
        let node = recipe(KvRole::Consumer, path, BLOCK, BLOCKS).node();
        let mut child = Child::start(&spec(path, "127.0.0.1:0"));
        let spec = spec(path, &child.address);
        let instance = node
            .engine
            .connect(&child.address, LONG)
            .expect("a session");
        let mut events = Vec::new();
        let mut before = None;
        for i in 0..each {
            // What is made once, is made by then.
            if i == STAGES.len() {
                live(&node, &instance, &mut child, Stage::Idle, "settle");
                std::thread::sleep(Duration::from_millis(200));
                before = Some(Counts::now());
            }
            let stage = STAGES[i % STAGES.len()];
            let request = format!("life-{i}");
            let transfers = live(&node, &instance, &mut child, stage, &request);
            child.die();
            for transfer in &transfers {
                assert!(transfer.wait(LONG).is_some(), "{stage:?}: an outcome");
                assert!(transfer.wait_released(LONG), "{stage:?}: memory comes back");
            }
            if matches!(stage, Stage::Begun | Stage::Pushing) {
                // A death before the consumer heard of the push is none of the expectation's.
                node.engine
                    .cancel_expect(&RequestId::from(request.as_str()));
                until("the end of the push", || {
                    node.engine.poll_events(&mut events);
                    events.iter().any(|event| ends(event, &request))
                });
            }
            events.clear();
            child = Child::start(&spec);
        }
        // The last one is met as the first one was.
        live(&node, &instance, &mut child, Stage::Idle, "last");
        let mut before = before.expect("more lives than stages");
        if matches!(path, PathKind::Ipc | PathKind::Staged) {
            // Launches' memory is kept and used again, and each allocation of the stand-in is a file: there are as
            // many as launches have run at once. One file for each life would be more.
            before.fds += each / 2;
        }
        before.settle(path.name());
        let grown = before.grown_kib();
        assert!(grown < 32 << 10, "{grown} KiB more resident over {path}");
        println!("{path}: {each} lives, {grown} KiB more resident");
    }
}

/// Not a test: what children run.
#[test]
fn child_entry() {
    child::entry();
}
