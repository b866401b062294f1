//! Pings of live engines: any role answers, from its scratch alone, beside whatever else it does.

mod support;

use std::io::Write;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use kvxfer::Error;
use kvxfer::bench::BenchMemory;
use kvxfer::config::{Config, KvRole, PathKind, PathSet};
use kvxfer::engine::{Outcome, PullOptions};
use kvxfer::ids::RequestId;
use kvxfer::ping::{MAX_PINGERS, Ping, Pinger, Probe};
use kvxfer::session::SessionError;
use kvxfer::wire::Refusal;
use support::{LONG, Node, groups, pairs, recipe, until};

const PATHS: [PathKind; 3] = [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp];

fn config(path: PathSet) -> Config {
    let mut config = Config::default();
    config.path = path;
    config
}

/// A pinger of a node that listens.
fn pinger(node: &Node, address: &str, path: PathSet) -> Pinger {
    let pinger = Pinger::connect(&config(path), address, LONG).expect("a session");
    assert_eq!(pinger.peer().name, node.name());
    assert_eq!(pinger.peer().generation, node.engine.generation());
    pinger
}

fn listen(node: &Node) -> String {
    let address = node.engine.listen("127.0.0.1:0").expect("a free port");
    address.to_string()
}

#[track_caller]
fn answered(pinger: &mut Pinger) -> Ping {
    let ping = pinger.ping(LONG).expect("the session stands");
    let ping = ping.expect("nobody stopped it");
    assert!(ping.answered(), "{ping:?}");
    ping
}

/// The threads of this process that answer pings.
fn answering() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").expect("threads");
    tasks
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .filter(|name| name.trim() == "kvx-ping")
        .count()
}

#[test]
fn every_role_answers_over_every_path_and_keeps_its_blocks() {
    for path in PATHS {
        for role in [KvRole::Producer, KvRole::Consumer, KvRole::Both] {
            let node = recipe(role, path, 4096, 8).node();
            node.side.poison().expect("poisoned");
            let address = listen(&node);
            let mut pinger = pinger(&node, &address, PathSet::only(path));
            assert_eq!(pinger.path().path, path);
            assert_eq!(pinger.peer().kv_role, role);
            assert!(pinger.peer().same_host && !pinger.peer().by_secret);
            // More than there are receives for notifications: each is posted again.
            for sequence in 1..=40 {
                assert_eq!(answered(&mut pinger).sequence, sequence);
            }
            drop(pinger);
            node.assert_untouched_but([]);
            let mut events = Vec::new();
            node.engine.poll_events(&mut events);
            assert!(events.is_empty(), "a ping is no peer: {events:?}");
        }
    }
    until("the end of the threads", || answering() == 0);
}

#[test]
fn the_path_is_that_of_the_engines_real_peers() {
    let any = |memory| {
        let mut any = recipe(KvRole::Both, PathKind::Tcp, 4096, 8);
        any.config.path = PathSet::auto();
        any.memory = memory;
        any.node()
    };
    for (memory, path) in [
        (BenchMemory::Arena, PathKind::Arena),
        (BenchMemory::Anonymous, PathKind::ProcessVm),
    ] {
        let node = any(memory);
        let mut pinger = pinger(&node, &listen(&node), PathSet::auto());
        assert_eq!(pinger.path().path, path);
        answered(&mut pinger);
    }
}

#[test]
fn a_path_that_the_engine_does_not_take_is_refused() {
    let node = recipe(KvRole::Both, PathKind::Tcp, 4096, 8).node();
    let only = config(PathSet::only(PathKind::Arena));
    let refused = Pinger::connect(&only, &listen(&node), LONG);
    let error = refused.expect_err("the engine takes TCP alone");
    let arena = Some(PathKind::Arena);
    assert!(
        matches!(error, Error::NoPath { forced, .. } if forced == arena),
        "{error}"
    );
}

#[test]
fn transfers_go_on_beside_pings() {
    for path in PATHS {
        let producer = recipe(KvRole::Producer, path, 64 << 10, 32).node();
        let consumer = recipe(KvRole::Consumer, path, 64 << 10, 32).node();
        producer.side.fill(5).expect("filled");
        let address = listen(&producer);
        let other = listen(&consumer);
        let instance = consumer.engine.connect(&address, LONG).expect("a session");
        let table = pairs((0..32).map(|block| (block, 31 - block)));
        let request = RequestId::from("r");
        let blocks = groups(0..32);
        let ticket = producer
            .engine
            .offer(&request, &blocks, 1, LONG)
            .expect("an offer");
        let mut pingers = [
            pinger(&producer, &address, PathSet::only(path)),
            pinger(&consumer, &other, PathSet::only(path)),
        ];
        for _ in 0..10 {
            consumer.side.poison().expect("poisoned");
            let options = PullOptions {
                hold: true,
                ..PullOptions::default()
            };
            let pull = instance.pull(&ticket, &table, options).expect("submitted");
            for pinger in &mut pingers {
                answered(pinger);
            }
            assert_eq!(pull.wait(LONG), Some(Outcome::Done));
            let verified = consumer.side.verify(5, &table).expect("every byte");
            assert_eq!(verified, 32 * 2 * (64 << 10));
        }
    }
}

#[test]
fn places_are_limited_and_given_back() {
    let node = recipe(KvRole::Both, PathKind::Arena, 4096, 8).node();
    let address = listen(&node);
    let connect = || Pinger::connect(&Config::default(), &address, LONG);
    let mut pingers: Vec<Pinger> = (0..MAX_PINGERS)
        .map(|_| connect().expect("a place"))
        .collect();
    for pinger in &mut pingers {
        answered(pinger);
    }
    let full = connect().expect_err("no place is left");
    let Error::Session {
        source:
            SessionError::Rejected {
                reason: Refusal::Full { what, limit },
            },
        ..
    } = &full
    else {
        panic!("{full}");
    };
    assert_eq!(
        (what.as_str(), *limit),
        ("number of pingers", MAX_PINGERS as u64)
    );
    // Whoever was refused has taken nothing from the others.
    for pinger in &mut pingers {
        answered(pinger);
    }
    pingers.pop();
    let mut next = None;
    until("a place again", || {
        next = connect().ok();
        next.is_some()
    });
    answered(&mut next.expect("a pinger"));
}

#[test]
fn an_engine_that_goes_ends_its_pingers() {
    let node = recipe(KvRole::Both, PathKind::Arena, 4096, 8).node();
    let mut pinger = pinger(&node, &listen(&node), PathSet::auto());
    answered(&mut pinger);
    drop(node);
    let error = pinger.idle(Instant::now() + LONG).expect_err("it has gone");
    assert!(matches!(error, Error::NotConnected { .. }), "{error}");
    let error = pinger.ping(LONG).expect_err("it has gone");
    assert!(matches!(error, Error::NotConnected { .. }), "{error}");
}

#[test]
fn a_wait_ends_when_it_is_told_to() {
    let node = recipe(KvRole::Both, PathKind::Arena, 4096, 8).node();
    let mut pinger = pinger(&node, &listen(&node), PathSet::auto());
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    pinger.stop_on(OwnedFd::from(reader));
    answered(&mut pinger);
    let begun = Instant::now();
    let writing = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        writer.write_all(b"!").expect("written");
        writer
    });
    pinger.idle(begun + LONG).expect("the session stands");
    assert!(begun.elapsed() < LONG, "it waited to the end");
    assert_eq!(pinger.ping(LONG).expect("the session stands"), None);
    drop(writing.join().expect("it ends"));
}

#[test]
fn a_part_that_was_not_tried_has_no_time() {
    assert_eq!(Probe::Answered(LONG).time(), Some(LONG));
    assert_eq!((Probe::Lost.time(), Probe::NotTried.time()), (None, None));
}
