//! Two engines in one process, over every path of the software device: READ and WRITE mode, and
//! what is refused before anything moves.

mod support;

use std::time::Duration;

use kvxfer::bench::{BenchMemory, BenchShape, BenchSide, scattered_pairs};
use kvxfer::blocks::{BlockPair, GroupBlocks, GroupPairs};
use kvxfer::config::{Config, KvRole, PathKind};
use kvxfer::engine::{Engine, Instance, Outcome, PullOptions};
use kvxfer::event::{Event, MemoryState, ReleaseReason};
use kvxfer::ids::RequestId;
use kvxfer::layout::{KvFormat, Topology};
use kvxfer::transfer::Cause;

const LONG: Duration = Duration::from_secs(60);
const BLOCKS: u32 = 64;

struct Node {
    engine: Engine,
    side: BenchSide,
}

fn node(role: KvRole, path: PathKind, notices: bool) -> Node {
    let (block_bytes, layers) = (4096 + 24, 3);
    let format = KvFormat::opaque(block_bytes, layers).expect("a format");
    let topology = Topology::single(&format);
    let memory = match path {
        PathKind::ProcessVm => BenchMemory::Anonymous,
        _ => BenchMemory::Arena,
    };
    let shape = BenchShape {
        format,
        num_blocks: vec![BLOCKS],
        topology,
        memory,
    };
    let side = BenchSide::new(&shape).expect("memory");
    let mut config = Config::default();
    config.kv_role = role;
    support::take(&mut config, path);
    config.num_worker_threads = 2;
    config.enable_notification = notices;
    let engine = Engine::new(config, side.format().clone(), side.placement().clone());
    Node {
        engine: engine.expect("an engine"),
        side,
    }
}

/// A producer that listens, a consumer that has connected.
fn pair(path: PathKind, notices: bool) -> (Node, Node, Instance) {
    let producer = node(KvRole::Producer, path, notices);
    let consumer = node(KvRole::Consumer, path, notices);
    let address = producer.engine.listen("127.0.0.1:0").expect("a free port");
    let instance = consumer
        .engine
        .connect(&address.to_string(), LONG)
        .expect("a session");
    assert_eq!(instance.path().expect("up").path, path);
    (producer, consumer, instance)
}

fn groups(blocks: impl IntoIterator<Item = u32>) -> Vec<GroupBlocks> {
    vec![GroupBlocks {
        group: 0,
        blocks: blocks.into_iter().collect(),
    }]
}

fn pairs(pairs: impl IntoIterator<Item = (u32, u32)>) -> Vec<GroupPairs> {
    let pairs = pairs
        .into_iter()
        .map(|(src, dst)| BlockPair { src, dst })
        .collect();
    vec![GroupPairs { group: 0, pairs }]
}

fn wait_for(engine: &Engine, what: &str, wanted: impl Fn(&Event) -> bool) -> Event {
    let until = std::time::Instant::now() + LONG;
    let mut events = Vec::new();
    while std::time::Instant::now() < until {
        engine.wait_events(&mut events, Duration::from_millis(200));
        if let Some(event) = events.drain(..).find(&wanted) {
            return event;
        }
    }
    panic!("no {what} came");
}

fn read_mode(path: PathKind) {
    let (producer, consumer, instance) = pair(path, false);
    producer.side.fill(7).expect("filled");
    consumer.side.poison().expect("poisoned");
    let request = RequestId::from("r1");
    let ticket = producer
        .engine
        .offer(&request, &groups(0..BLOCKS / 2), 1, LONG)
        .expect("an offer");
    let table: Vec<BlockPair> = scattered_pairs(1, BLOCKS)
        .into_iter()
        .filter(|pair| pair.src < BLOCKS / 2)
        .collect();
    let wanted = vec![GroupPairs {
        group: 0,
        pairs: table,
    }];
    let transfer = instance.pull(
        &ticket,
        &wanted,
        PullOptions {
            tag: 5,
            ..PullOptions::default()
        },
    );
    let transfer = transfer.expect("a transfer");
    assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
    let bytes = consumer.side.verify(7, &wanted).expect("every byte");
    assert_eq!(bytes, u64::from(BLOCKS / 2) * (4096 + 24) * 3);
    assert_eq!(transfer.report().bytes, bytes);
    // The pull released the offer; the producer hears of it.
    wait_for(&producer.engine, "release", |event| {
        matches!(
            event,
            Event::Released {
                reason: ReleaseReason::AllRead,
                ..
            }
        )
    });
    wait_for(&consumer.engine, "receipt", |event| {
        matches!(event, Event::Received { tag: 5, .. })
    });
    // A pull under a ticket whose offer has ended is not done: the lease is gone.
    let late = instance
        .pull(&ticket, &wanted, PullOptions::default())
        .expect("a transfer");
    let outcome = late.wait(LONG).expect("an outcome");
    let failure = outcome.failure().expect("a failure");
    assert_eq!(failure.first_cause, Cause::LeaseExpired);
    assert_eq!(failure.memory, MemoryState::Released);
    assert_eq!(failure.invalid_blocks.len(), 1);
    assert_eq!(
        failure.invalid_blocks[0].blocks.len(),
        (BLOCKS / 2) as usize
    );
}

fn write_mode(path: PathKind, notices: bool) {
    let (producer, consumer, _instance) = pair(path, notices);
    producer.side.fill(9).expect("filled");
    consumer.side.poison().expect("poisoned");
    let name = kvxfer::event::PeerName {
        engine: consumer.engine.id().clone(),
        rank: consumer.engine.rank(),
    };
    wait_for(&producer.engine, "peer", |event| {
        matches!(event, Event::PeerUp { .. })
    });
    let to_consumer = producer
        .engine
        .peer_of(&name)
        .expect("the consumer's session");
    let request = RequestId::from("w1");
    // The push begins before the consumer expects it.
    let push = to_consumer.begin_push(&request).expect("a push");
    let table = pairs((0..20).map(|i| (i, 40 - i)));
    push.layer(0, &table, None).expect("layer 0");
    let ticket = consumer
        .engine
        .expect(&request, &groups(21..=40), 1, LONG)
        .expect("an expectation");
    assert_eq!(ticket.blocks(), 20);
    push.layer(1, &table, None).expect("layer 1");
    push.layer(2, &table, None).expect("layer 2");
    let transfer = push.commit().expect("committed");
    assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
    // Over RDMA the completion of a receive alone says that the data is there.
    let on_data_plane = notices || path == PathKind::Rdma;
    assert_eq!(transfer.report().data_plane_notice, on_data_plane);
    wait_for(&consumer.engine, "receipt", |event| {
        matches!(event, Event::Received { .. })
    });
    consumer.side.verify(9, &table).expect("every byte");
    wait_for(&producer.engine, "sent", |event| {
        matches!(event, Event::Sent { .. })
    });
}

#[test]
fn read_over_arena() {
    read_mode(PathKind::Arena);
}

#[test]
fn read_over_process_vm() {
    read_mode(PathKind::ProcessVm);
}

#[test]
fn read_over_tcp() {
    read_mode(PathKind::Tcp);
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_read() {
    read_mode(PathKind::Rdma);
}

#[test]
fn write_over_arena() {
    write_mode(PathKind::Arena, false);
}

#[test]
fn write_over_process_vm() {
    write_mode(PathKind::ProcessVm, false);
}

#[test]
fn write_over_tcp() {
    write_mode(PathKind::Tcp, false);
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_write() {
    write_mode(PathKind::Rdma, false);
    write_mode(PathKind::Rdma, true);
}

#[test]
fn notices_on_the_data_plane() {
    write_mode(PathKind::Arena, true);
    write_mode(PathKind::Tcp, true);
}

/// More pushes than a queue pair has receives: the receiver posts them again.
#[test]
fn many_notices_on_the_data_plane() {
    let (producer, consumer, _instance) = pair(PathKind::Arena, true);
    wait_for(&producer.engine, "peer", |event| {
        matches!(event, Event::PeerUp { .. })
    });
    let name = kvxfer::event::PeerName {
        engine: consumer.engine.id().clone(),
        rank: consumer.engine.rank(),
    };
    let to_consumer = producer
        .engine
        .peer_of(&name)
        .expect("the consumer's session");
    for round in 0..5 {
        let begun: Vec<_> = (0..BLOCKS)
            .map(|block| {
                let request = RequestId::from(format!("n{round}.{block}"));
                consumer
                    .engine
                    .expect(&request, &groups([block]), 1, LONG)
                    .expect("expected");
                let push = to_consumer.begin_push(&request).expect("a push");
                push.all_layers(&pairs([(block, block)]), None)
                    .expect("its block");
                push.commit().expect("committed")
            })
            .collect();
        for transfer in begun {
            assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
        }
        let mut received = 0;
        let until = std::time::Instant::now() + LONG;
        let mut events = Vec::new();
        while received < BLOCKS && std::time::Instant::now() < until {
            consumer
                .engine
                .wait_events(&mut events, Duration::from_millis(200));
            for event in events.drain(..) {
                received += u32::from(matches!(event, Event::Received { .. }));
            }
        }
        assert_eq!(received, BLOCKS, "each push is told once");
    }
}

/// Regions beyond 4 GiB: offsets do not wrap. The arenas are sparse; two blocks of each are touched.
#[test]
fn blocks_beyond_four_gigabytes() {
    use kvxfer::layout::{KvPlacement, Packing};
    use kvxfer::mem::{ArenaOptions, HostArena, HugePages};

    const BLOCK: u64 = 64 << 10;
    const MANY: u32 = 80 << 10;
    let node = |role| {
        let format = KvFormat::opaque(BLOCK, 1).expect("a format");
        let topology = Topology::single(&format);
        let uniform = KvPlacement::uniform(&format, topology, &[MANY], Packing::OneMemory, 4096);
        let uniform = uniform.expect("a layout");
        let options = ArenaOptions {
            huge: HugePages::Never,
            prefault: false,
        };
        let bytes = uniform.memory_bytes()[0];
        assert!(bytes > 4 << 30);
        let memory = HostArena::with_options(bytes, options).expect("address space");
        let placement = uniform
            .place(&format, vec![memory.as_memory()])
            .expect("it fits");
        let mut config = Config::default();
        config.kv_role = role;
        let engine = Engine::new(config, format, placement).expect("an engine");
        (engine, memory.memory().clone())
    };
    let (producer, from) = node(KvRole::Producer);
    let (consumer, to) = node(KvRole::Consumer);
    let last = MANY - 1;
    let at = |block: u32| u64::from(block) * BLOCK;
    from.fill(at(0), BLOCK, 1).expect("inside");
    from.fill(at(last), BLOCK, 2).expect("inside");
    let address = producer.listen("127.0.0.1:0").expect("a free port");
    let instance = consumer
        .connect(&address.to_string(), LONG)
        .expect("a session");
    let request = RequestId::from("far");
    let ticket = producer
        .offer(&request, &groups([0, last]), 1, LONG)
        .expect("an offer");
    let table = pairs([(0, last), (last, 0)]);
    let transfer = instance
        .pull(&ticket, &table, PullOptions::default())
        .expect("taken");
    assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
    let byte = |block, offset| {
        let mut byte = [0];
        to.read(at(block) + offset, &mut byte).expect("inside");
        byte[0]
    };
    assert_eq!([byte(last, 0), byte(last, BLOCK - 1)], [1, 1]);
    assert_eq!([byte(0, 0), byte(0, BLOCK - 1)], [2, 2]);
    assert_eq!(
        [byte(1, 0), byte(last - 1, BLOCK - 1)],
        [0, 0],
        "and nowhere else"
    );
}
