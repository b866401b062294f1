//! Blocks that go through pinned memory: what their sessions hold comes back, and their queue pairs are rebuilt as any.

use std::time::{Duration, Instant};

use kvxfer_hipmem::gpu::{RuntimeChoice, RuntimeKind};

use super::panic_tests::{LONG, reversed};
use crate::bench::{BenchMemory, BenchShape, BenchSide};
use crate::blocks::GroupBlocks;
use crate::config::{Config, KvRole, PathKind, PathSet};
use crate::engine::{Engine, Instance, PullOptions, Transfer};
use crate::event::{Event, PeerName};
use crate::ids::RequestId;
use crate::layout::{KvFormat, Topology};
use crate::ticket::Ticket;
use crate::transfer::Cause;

const BLOCKS: u32 = 64;
const SEED: u64 = 7;

struct Node {
    engine: Engine,
    side: BenchSide,
}

/// 32 MiB, on the stand-in for a GPU or in the host's memory.
fn node(role: KvRole, on_gpu: bool, change: impl FnOnce(&mut Config)) -> Node {
    let format = KvFormat::opaque(256 << 10, 2).expect("a format");
    let gpu = BenchMemory::Gpu {
        runtime: RuntimeChoice::Only(RuntimeKind::Host),
        ordinal: 0,
    };
    let shape = BenchShape {
        topology: Topology::single(&format),
        format,
        num_blocks: vec![BLOCKS],
        memory: if on_gpu { gpu } else { BenchMemory::Arena },
    };
    let side = BenchSide::new(&shape).expect("memory");
    let mut config = Config {
        kv_role: role,
        path: PathSet::some([PathKind::Staged, PathKind::Arena]),
        num_worker_threads: 2,
        ..Config::default()
    };
    change(&mut config);
    let (format, placement) = (side.format().clone(), side.placement().clone());
    let engine = Engine::new(config, format, placement).expect("an engine");
    Node { engine, side }
}

fn joined(producer: &Node, consumer: &Node) -> (Instance, Ticket) {
    producer.side.fill(SEED).expect("filled");
    let address = producer.engine.listen("127.0.0.1:0").expect("a port");
    let instance = consumer.engine.connect(&address.to_string(), LONG);
    let blocks = (0..BLOCKS).collect();
    let group = [GroupBlocks { group: 0, blocks }];
    let request = RequestId::from("r");
    let ticket = producer.engine.offer(&request, &group, 1, LONG);
    (instance.expect("a session"), ticket.expect("an offer"))
}

fn pull(instance: &Instance, ticket: &Ticket) -> Option<Transfer> {
    let options = PullOptions {
        hold: true,
        ..PullOptions::default()
    };
    instance.pull(ticket, &reversed(BLOCKS), options).ok()
}

impl Node {
    /// Free buffers of both directions, and landing slots.
    fn free(&self) -> (usize, usize, usize) {
        let inner = self.engine.inner();
        let gpu = inner.gpu.as_ref().and_then(|gpu| gpu.staging().ok());
        let (out, into) = gpu.map_or((0, 0), |staging| (staging.out.free(), staging.into.free()));
        (out, into, inner.scratch.free())
    }
}

/// However often a session ends under pulls, everything that they held is there again.
#[test]
fn what_a_lost_session_held_comes_back() {
    for (from_gpu, to_gpu) in [(true, false), (false, true)] {
        let slow = |config: &mut Config| {
            config.faults = Some("seed=3,delay=0.3:3ms".parse().expect("a plan"));
        };
        let producer = node(KvRole::Producer, from_gpu, |_| {});
        let consumer = node(KvRole::Consumer, to_gpu, slow);
        let before = [producer.free(), consumer.free()];
        let (instance, ticket) = joined(&producer, &consumer);
        let name = PeerName {
            engine: producer.engine.id().clone(),
            rank: producer.engine.rank(),
        };
        let mut cut = 0;
        for round in 0..12_u64 {
            assert!(instance.wait_up(LONG), "set up anew");
            let under_way = pull(&instance, &ticket);
            std::thread::sleep(Duration::from_millis(2 * (round % 6)));
            if let Some(peer) = consumer.engine.inner().peer_named(&name) {
                peer.fail(Cause::LaneReset);
            }
            if let Some(transfer) = &under_way {
                let outcome = transfer.wait(LONG).expect("an outcome");
                cut += u32::from(outcome.failure().is_some());
                assert!(transfer.wait_released(LONG), "memory comes back");
            }
        }
        assert!(cut > 0, "struck too late");
        let end = Instant::now() + LONG;
        loop {
            let now = [producer.free(), consumer.free()];
            if now == before {
                break;
            }
            assert!(Instant::now() < end, "{before:?} before, {now:?} now");
            std::thread::sleep(Duration::from_millis(10));
        }
        // And it is used again, when the last of the resets has been heard of.
        let done = |transfer: Transfer| transfer.wait(LONG).is_some_and(|end| end.is_done());
        loop {
            assert!(Instant::now() < end && instance.wait_up(LONG), "a pull");
            consumer.side.poison().expect("poisoned");
            if pull(&instance, &ticket).is_some_and(done) {
                break;
            }
        }
        consumer
            .side
            .verify(SEED, &reversed(BLOCKS))
            .expect("every byte");
    }
}

/// A queue pair that fails alone ends no session, also when it is the last of its worker.
#[test]
fn staged_reads_wait_for_the_last_queue_pair_to_be_rebuilt() {
    for (from_gpu, to_gpu) in [(true, false), (false, true)] {
        let lanes = |config: &mut Config| {
            config.num_worker_threads = 2;
            config.qp_per_transfer = 2;
        };
        let producer = node(KvRole::Producer, from_gpu, lanes);
        let consumer = node(KvRole::Consumer, to_gpu, |config| {
            lanes(config);
            config.faults = Some("seed=4,qp-fatal=0.02".parse().expect("a plan"));
        });
        let (instance, ticket) = joined(&producer, &consumer);
        assert_eq!(
            instance.path().expect("up").path,
            PathKind::Staged,
            "through pinned memory"
        );
        let end = Instant::now() + LONG;
        let mut failed = 0;
        while failed < 2 {
            assert!(Instant::now() < end, "{failed} queue pairs have failed");
            consumer.side.poison().expect("poisoned");
            let transfer = pull(&instance, &ticket).expect("the session stands");
            let mut gone = false;
            while transfer.outcome().is_none() {
                gone |= instance.lanes().expect("the session stands").0 < 2;
                assert!(Instant::now() < end, "it ends");
                std::thread::yield_now();
            }
            assert_eq!(transfer.wait(LONG).expect("an outcome").failure(), None);
            consumer
                .side
                .verify(SEED, &reversed(BLOCKS))
                .expect("every byte");
            failed += u32::from(gone);
        }
        let mut seen = Vec::new();
        consumer.engine.poll_events(&mut seen);
        let down = |event: &Event| matches!(event, Event::PeerDown { .. });
        assert!(!seen.iter().any(down), "{seen:?}");
    }
}
