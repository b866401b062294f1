//! Queue pairs that fail alone, and are rebuilt inside their sessions.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::panic_tests::LONG;
use super::rail_tests::{BLOCKS, Node, groups, joined_by, node_that, pull, push, side, word};
use super::worker::Command;
use crate::Error;
use crate::blocks::{BlockPair, GroupBlocks, GroupPairs};
use crate::config::{Config, ConfigBuilder, KvRole, PathKind, PathSet};
use crate::engine::{Engine, Instance, Outcome, Peer, PullOptions, PushOptions, Transfer};
use crate::event::{Event, MemoryState, PeerName};
use crate::expects::ExpectError;
use crate::ids::RequestId;
use crate::transfer::{Cause, CompletionStatus};

/// A queue pair that fails alone has a successor a moment later, and the session goes on all the while.
#[test]
fn a_queue_pair_that_fails_alone_is_rebuilt() {
    let change = |config: &mut Config| {
        config.num_worker_threads = 1;
        config.qp_per_transfer = 4;
    };
    for (path, rails) in [(PathKind::Arena, 1), (PathKind::Arena, 2)] {
        let all = 4 * rails;
        let plan = "seed=1,qp-fatal=0.002";
        let consumer = node_that(KvRole::Consumer, path, &vec![plan; rails], change);
        let producer = node_that(KvRole::Producer, path, &vec![""; rails], change);
        let (producer, consumer, way) = joined_by(producer, consumer);
        let lanes = || way.lanes().expect("the session stands").0;
        let end = Instant::now() + LONG;
        let mut round = 0;
        while lanes() == all {
            assert!(Instant::now() < end, "none fails in {round} rounds");
            pull(round, (&producer, &consumer, &way), || {});
            round += 1;
        }
        let failed = lanes();
        assert!(failed < all && failed > 0, "{failed} of {all}");
        while lanes() != all {
            assert!(Instant::now() < end, "{} of {all} are there", lanes());
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(way.path().expect("the session stands").skipped, []);
        assert_stood(&consumer);
        push(round, (&producer, &consumer, &way), || {});
    }
}

/// One lane on one worker, under a plan for the side that moves the blocks.
fn one_lane(path: PathKind, write: bool, plan: &str) -> (Node, Node, Instance) {
    let change = |config: &mut Config| {
        config.num_worker_threads = 1;
        config.qp_per_transfer = 1;
        config.drain_grace = Duration::from_millis(100);
    };
    let (producer, consumer) = if write { (plan, "") } else { ("", plan) };
    let consumer = node_that(KvRole::Consumer, path, &[consumer], change);
    let producer = node_that(KvRole::Producer, path, &[producer], change);
    joined_by(producer, consumer)
}

fn assert_stood(node: &Node) {
    let mut seen = Vec::new();
    node.engine.poll_events(&mut seen);
    let down = |event: &Event| matches!(event, Event::PeerDown { .. });
    assert!(!seen.iter().any(down), "{seen:?}");
}

/// The last queue pair of a worker fails, and nobody says why: what was on it waits for its successor, also
/// writes that the peer may have carried out.
#[test]
fn work_waits_for_the_last_queue_pair_to_be_rebuilt() {
    for (path, write) in [
        (PathKind::Arena, false),
        (PathKind::Arena, true),
        (PathKind::ProcessVm, true),
    ] {
        let (producer, consumer, way) = one_lane(path, write, "seed=3,qp-fatal=0.01");
        let (end, over) = (Instant::now() + LONG, AtomicBool::new(false));
        std::thread::scope(|scope| {
            let gone = scope.spawn(|| {
                let mut gone = 0;
                let mut there = true;
                while !over.load(Ordering::Relaxed) {
                    let now = way.lanes().expect("the session stands").0 == 1;
                    gone += u32::from(there && !now);
                    there = now;
                    if gone == 2 && there {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
                gone
            });
            let mut round = 0;
            while !gone.is_finished() {
                assert!(Instant::now() < end, "too few fail in {round} rounds");
                match write {
                    true => drop(push(round, (&producer, &consumer, &way), || {})),
                    false => pull(round, (&producer, &consumer, &way), || {}),
                }
                round += 1;
            }
            over.store(true, Ordering::Relaxed);
            assert_eq!(gone.join().expect("no panic"), 2, "{path} {write}");
        });
        assert_stood(&consumer);
        assert_stood(&producer);
    }
}

/// A request that the peer refuses takes its queue pair down, and fails its own transfer. The other one that was
/// on it goes on.
#[test]
fn a_transfer_goes_on_when_another_one_takes_the_last_queue_pair_down() {
    let (producer, consumer, way) = one_lane(PathKind::Arena, false, "seed=5,key=0.002");
    producer.fill(|at| word(0, at));
    let half = |from: u32| GroupPairs {
        group: 0,
        pairs: (from..from + BLOCKS / 2)
            .map(|b| BlockPair { src: b, dst: b })
            .collect(),
    };
    let end = Instant::now() + LONG;
    for round in 0.. {
        assert!(Instant::now() < end, "{round} rounds");
        let begin = |from: u32| {
            let request = RequestId::from(format!("{round} from {from}").as_str());
            let ticket = producer.engine.offer(&request, &groups(), 1, LONG);
            let ticket = ticket.expect("an offer");
            let pulled = way.pull(&ticket, &[half(from)], PullOptions::default());
            pulled.expect("a pull")
        };
        let both = [begin(0), begin(BLOCKS / 2)];
        let ends = both.map(|transfer| {
            let outcome = transfer.wait(LONG).expect("an outcome");
            assert!(transfer.wait_released(LONG));
            outcome.failure().map(|failure| failure.first_cause.clone())
        });
        for cause in ends.iter().flatten() {
            let status = CompletionStatus::RemoteAccess;
            let named = matches!(cause, Cause::Completion { status: of, .. } if *of == status);
            assert!(named, "{cause}");
        }
        if ends.iter().flatten().count() == 1 {
            break;
        }
    }
    assert_stood(&consumer);
    pull(1, (&producer, &consumer, &way), || {});
}

/// Begins a transfer of a half of the blocks, from `from` on, none beside its neighbour. `None`: its deadline has passed
/// meanwhile.
fn begin(
    (request, from, deadline): (&str, u32, Option<Duration>),
    (producer, consumer, way): (&Node, &Node, &Instance),
    write: bool,
) -> Option<(Vec<GroupPairs>, Transfer)> {
    let request = RequestId::from(request);
    let half = from..from + BLOCKS / 2;
    let pairs = half.clone().zip(half.clone().rev());
    let pairs = vec![GroupPairs {
        group: 0,
        pairs: pairs.map(|(src, dst)| BlockPair { src, dst }).collect(),
    }];
    if !write {
        let ticket = producer.engine.offer(&request, &groups(), 1, LONG);
        let options = PullOptions {
            deadline,
            ..PullOptions::default()
        };
        let pull = way.pull(&ticket.expect("an offer"), &pairs, options);
        return Some((pairs, pull.expect("a pull")));
    }
    let blocks = vec![GroupBlocks {
        group: 0,
        blocks: half.collect(),
    }];
    // The one before may have ended at its sender alone.
    let end = Instant::now() + LONG;
    while let Err(error) = consumer.engine.expect(&request, &blocks, 1, LONG) {
        let in_use = matches!(error, Error::Expect(ExpectError::InUse(_)));
        assert!(in_use && Instant::now() < end, "{error}");
        std::thread::sleep(Duration::from_millis(1));
    }
    let options = PushOptions {
        deadline,
        ..PushOptions::default()
    };
    let push = back(producer, consumer).begin_push_with(&request, options);
    let push = push.expect("a push");
    let sent = push.all_layers(&pairs, None).and_then(|()| push.commit());
    match sent {
        Ok(sent) => Some((pairs, sent)),
        // It was late before it had begun.
        Err(Error::PushEnded { .. }) if deadline.is_some() => None,
        Err(error) => panic!("{error}"),
    }
}

/// The producer's way to the consumer.
fn back(producer: &Node, consumer: &Node) -> Peer {
    let inner = consumer.engine.inner();
    let name = PeerName {
        engine: inner.id.clone(),
        rank: inner.rank(),
    };
    producer.engine.peer_of(&name).expect("a session")
}

/// Work of a transfer that was given up does not come back: its queue pair is rebuilt for that, its memory is free
/// again, and what another transfer has posted behind it is posted once more.
#[test]
fn what_does_not_drain_costs_others_nothing() {
    const SEED: u64 = 5;
    for (path, write) in [
        (PathKind::Arena, false),
        (PathKind::Arena, true),
        (PathKind::ProcessVm, false),
    ] {
        // Far longer than this test.
        let nodes = one_lane(path, write, "seed=7,delay=0.004:3600s");
        let (producer, consumer, way) = &nodes;
        producer.side.fill(SEED).expect("filled");
        let end = Instant::now() + LONG;
        let mut both = 0;
        for round in 0.. {
            assert!(Instant::now() < end, "{path}: never both in {round} rounds");
            let begin = |name: &str, from| {
                let request = format!("{name} {round}");
                let begun = begin((&request, from, None), (producer, consumer, way), write);
                begun.expect("in time")
            };
            let all = [begin("first", 0), begin("second", BLOCKS / 2)];
            let soon = Duration::from_millis(200);
            let stuck = all.each_ref().map(|(_, t)| t.wait(soon).is_none());
            let [(_, first), (pairs, second)] = &all;
            let unwanted = if stuck[0] { first } else { second };
            if stuck == [false; 2] {
                continue;
            }
            unwanted.cancel();
            let outcome = unwanted.wait(LONG).expect("an outcome");
            let memory = outcome.failure().map(|failure| failure.memory);
            assert!(unwanted.wait_released(LONG), "{path}: memory comes back");
            if stuck != [true; 2] {
                continue;
            }
            if memory == Some(MemoryState::Released) {
                // Nothing of it was under way: the other one is alone with what is stuck.
                second.cancel();
                assert!(second.wait_released(LONG), "{path}: memory comes back");
                continue;
            }
            // It may be stuck again.
            if second.wait(soon * 10) == Some(Outcome::Done) {
                consumer.side.verify(SEED, pairs).expect("every byte");
                both += 1;
            } else {
                second.cancel();
                assert!(second.wait_released(LONG), "{path}: memory comes back");
            }
            if both == 2 {
                break;
            }
        }
        assert_stood(consumer);
        assert_stood(producer);
    }
}

/// With the device that `KVXFER_TEST_RDMA` names for the role, as in `tests/support`.
pub(super) fn rdma_config(role: KvRole) -> Config {
    let names = std::env::var("KVXFER_TEST_RDMA").expect("KVXFER_TEST_RDMA names an RDMA device");
    let pair = names.split(',').next().unwrap_or_default();
    let (first, second) = pair.split_once(':').unwrap_or((pair, pair));
    let name = if role == KvRole::Consumer {
        second
    } else {
        first
    };
    let mut builder = ConfigBuilder::new();
    let named = builder.flag("rdma_devices", "KVXFER_TEST_RDMA", name);
    named.and_then(|named| named.build()).expect("a name")
}

/// One lane there.
fn rdma_node(role: KvRole) -> Node {
    let config = Config {
        kv_role: role,
        path: PathSet::only(PathKind::Rdma),
        num_worker_threads: 1,
        qp_per_transfer: 1,
        drain_grace: Duration::from_millis(1),
        ..rdma_config(role)
    };
    let side = side();
    let (format, placement) = (side.format().clone(), side.placement().clone());
    let engine = Engine::new(config, format, placement).expect("an engine");
    Node { engine, side }
}

/// The queue pair that moves the blocks goes to the error state under a pull and under a push; no device has
/// said why, and the peer may have carried out what it wrote.
#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_the_last_queue_pair_is_rebuilt() {
    let (producer, consumer) = (rdma_node(KvRole::Producer), rdma_node(KvRole::Consumer));
    let (producer, consumer, way) = joined_by(producer, consumer);
    let lanes = || way.lanes().expect("the session stands").0;
    let strike = |node: &Node| {
        let workers = node.engine.inner().runtime.workers();
        workers.first().expect("one").send(Command::FailLanes);
    };
    let back = || {
        let end = Instant::now() + LONG;
        while lanes() == 0 {
            assert!(Instant::now() < end, "it is not rebuilt");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let both = (&producer, &consumer, &way);
    let mut gone = [0; 2];
    pull(0, both, || {
        strike(&consumer);
        gone[0] = seen_gone(lanes);
    });
    back();
    push(1, both, || {
        strike(&producer);
        gone[1] = seen_gone(lanes);
    });
    back();
    assert_eq!(gone, [1; 2], "struck too late");
    assert_stood(&consumer);
    assert_stood(&producer);
    pull(2, both, || {});
}

/// Waits until there is no lane: 1, or 0 if there is one all the time.
fn seen_gone(lanes: impl Fn() -> usize) -> u32 {
    let end = Instant::now() + Duration::from_secs(10);
    while lanes() > 0 {
        if Instant::now() > end {
            return 0;
        }
        std::thread::yield_now();
    }
    1
}

/// What is late has more posted than comes back in time: the queue pair goes to the error state, and the kernel's
/// device has to let go of it.
#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_what_does_not_drain_costs_others_nothing() {
    const SEED: u64 = 9;
    let (producer, consumer) = (rdma_node(KvRole::Producer), rdma_node(KvRole::Consumer));
    let (producer, consumer, way) = joined_by(producer, consumer);
    producer.side.fill(SEED).expect("filled");
    for write in [false, true] {
        let mut reset = false;
        for round in 0..20 {
            let begin = |name: &str, from, deadline| {
                let request = format!("{name} {write} {round}");
                let nodes = (&producer, &consumer, &way);
                begin((&request, from, deadline), nodes, write)
            };
            let Some((_, late)) = begin("late", 0, Some(Duration::from_millis(20))) else {
                continue;
            };
            let (pairs, other) = begin("other", BLOCKS / 2, None).expect("in time");
            let outcome = late.wait(LONG).expect("an outcome");
            let memory = outcome.failure().map(|failure| failure.memory);
            assert!(late.wait_released(LONG), "memory comes back");
            assert_eq!(other.wait(LONG), Some(Outcome::Done), "{write}");
            consumer.side.verify(SEED, &pairs).expect("every byte");
            reset |= memory == Some(MemoryState::Quarantined);
            if reset {
                break;
            }
        }
        assert!(reset, "all was back in time");
    }
    assert_stood(&consumer);
    assert_stood(&producer);
}
