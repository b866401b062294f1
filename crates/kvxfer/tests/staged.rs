//! Blocks that go through pinned host memory, because one side's are a GPU's and the other's GPU does not reach
//! them: on the stand-in, or on the runtime that `KVXFER_TEST_GPU` names, where a test fails if there is no GPU.
//! (Checksums, lives of a peer and its deaths over this path: tests/verify.rs, tests/cycles.rs, tests/faults.)

mod support;

use kvxfer::bench::BenchMemory;
use kvxfer::config::{KvRole, PathKind, PathSet};
use kvxfer::engine::{Instance, Outcome, Peer, PullOptions};
use kvxfer::event::Event as Told;
use kvxfer::ids::RequestId;
use kvxfer::ticket::Ticket;
use support::{LONG, Log, Node, Recipe, gpu_memory, groups, pairs, recipe, until};

const SEED: u64 = 23;

/// Where a side's blocks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mem {
    Gpu,
    Host,
}

use Mem::{Gpu, Host};

/// The producer's and the consumer's, where one at least is a GPU's.
const MEMORIES: [(Mem, Mem); 3] = [(Gpu, Host), (Host, Gpu), (Gpu, Gpu)];
const BENEATH: [PathKind; 3] = [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp];

/// A side over one path beneath, with the smallest buffers.
fn side(role: KvRole, mem: Mem, beneath: PathKind, (block, blocks): (u64, u32)) -> Recipe {
    let mut recipe = recipe(role, PathKind::Staged, block, blocks).with(|config| {
        config.path = PathSet::some([PathKind::Staged, beneath]);
        config.staging_slot_bytes.0 = 64 << 10;
        config.staging_slots = 4;
    });
    recipe.memory = match (mem, beneath) {
        (Gpu, _) => gpu_memory(role),
        (Host, PathKind::ProcessVm) => BenchMemory::Anonymous,
        (Host, _) => BenchMemory::Arena,
    };
    recipe
}

fn made(recipe: &Recipe) -> Node {
    let node = recipe.node();
    match recipe.config.kv_role {
        KvRole::Producer => node.side.fill(SEED).expect("filled"),
        _ => node.side.poison().expect("poisoned"),
    }
    node
}

/// A producer and a consumer.
fn two(mems: (Mem, Mem), beneath: PathKind, size: (u64, u32)) -> (Node, Node) {
    (
        made(&side(KvRole::Producer, mems.0, beneath, size)),
        made(&side(KvRole::Consumer, mems.1, beneath, size)),
    )
}

fn meet(producer: &Node, consumer: &Node) -> Instance {
    let address = producer.engine.listen("127.0.0.1:0").expect("a free port");
    let address = address.to_string();
    consumer.engine.connect(&address, LONG).expect("a session")
}

/// The consumer, as the producer pushes to it.
fn way_back(producer: &Node, consumer: &Node) -> Peer {
    let name = consumer.name();
    until("the session is up", || {
        producer.engine.peer_of(&name).is_some()
    });
    producer.engine.peer_of(&name).expect("up")
}

fn offer(producer: &Node, request: &str, blocks: u32) -> Ticket {
    let request = RequestId::from(request);
    let offered = producer.engine.offer(&request, &groups(0..blocks), 1, LONG);
    offered.expect("room")
}

fn received(log: &mut Log, request: &RequestId) {
    let of = |event: &Told| event.request().is_some_and(|(r, _)| r == request);
    let event = log.wait("end", |event| {
        of(event) && !matches!(event, Told::Released { .. })
    });
    assert!(matches!(event, Told::Received { .. }), "{event:?}");
}

/// Blocks of one size are pulled and pushed, in another order, and nothing else is written.
fn both_ways(mems: (Mem, Mem), beneath: PathKind, size: (u64, u32)) {
    let (producer, consumer) = two(mems, beneath, size);
    let instance = meet(&producer, &consumer);
    let path = instance.path().expect("up");
    assert_eq!((path.path, path.over), (PathKind::Staged, Some(beneath)));
    let way = way_back(&producer, &consumer);
    assert_eq!(way.path().expect("up").path, PathKind::Staged);
    let mut log = Log::new(&consumer.engine);
    let blocks = size.1;
    let some = blocks - blocks / 3;
    let table = pairs((0..some).map(|b| (b, blocks - 1 - b)));
    let ticket = offer(&producer, "r", blocks);
    let pull = instance.pull(&ticket, &table, PullOptions::default());
    let pull = pull.expect("a pull");
    assert_eq!(
        pull.wait(LONG),
        Some(Outcome::Done),
        "{mems:?} {beneath} {size:?}"
    );
    consumer.side.verify(SEED, &table).expect("every byte");
    consumer.assert_untouched_but(blocks - some..blocks);
    assert_eq!(pull.report().bytes, size.0 * u64::from(some) * 2);

    consumer.side.poison().expect("poisoned");
    let request = RequestId::from("w");
    (consumer.engine)
        .expect(&request, &groups(0..blocks), 1, LONG)
        .expect("room");
    let push = way.begin_push(&request).expect("a push");
    for layer in [1, 0] {
        push.layer(layer, &table, None).expect("fits");
    }
    let sent = push.commit().expect("committed");
    assert_eq!(
        sent.wait(LONG),
        Some(Outcome::Done),
        "{mems:?} {beneath} {size:?}"
    );
    received(&mut log, &request);
    consumer.side.verify(SEED, &table).expect("every byte");
    consumer.assert_untouched_but(blocks - some..blocks);
    log.assert_told_once();
}

#[test]
fn blocks_go_both_ways_between_all_kinds_of_memory() {
    for mems in MEMORIES {
        for beneath in BENEATH {
            both_ways(mems, beneath, (16 << 10, 64));
        }
    }
}

/// Sizes that no word and no buffer is a multiple of; blocks that are many, and such as one buffer does not hold.
#[test]
fn odd_sizes_and_many_blocks() {
    for (at, size) in [(8, 3000), (1032, 700), (65_544, 9), (200_008, 5)]
        .into_iter()
        .enumerate()
    {
        for (mems, beneath) in MEMORIES
            .into_iter()
            .zip(BENEATH.into_iter().cycle().skip(at))
        {
            both_ways(mems, beneath, size);
        }
    }
}

#[test]
fn child_entry() {
    support::child::entry();
}
