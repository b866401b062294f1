//! Memory of a GPU that the devices have registered: blocks go straight from it and into it. On the stand-in, whose
//! memory is the host's, so that soft-RoCE takes it by its address; no real GPU's has been seen by a card here.

use std::time::Instant;

use kvxfer::config::{FencePolicy, KvRole, PathKind, PathSet};
use kvxfer::engine::{Outcome, PullOptions, PushOptions};
use kvxfer::event::Event as Told;
use kvxfer::mem::gpu::{Copy, Event, GpuMemory, PinnedMemory, Place, Stream};
use kvxfer::wire::Candidate;

use crate::Pair;
use crate::support::{LONG, Node, POISON, Recipe, gpu_memory, groups, pairs};

/// Whose memory is a GPU's: the producer's, the consumer's.
const MEMORIES: [(bool, bool); 3] = [(true, false), (false, true), (true, true)];
const BLOCK: u64 = 16 << 10;
/// What a stream is kept busy with.
const BUSY: u64 = 64 << 20;

pub(crate) fn on_gpus(recipe: &mut Recipe, (producers, consumers): (bool, bool)) {
    let role = recipe.config.kv_role;
    let is = if role == KvRole::Consumer {
        consumers
    } else {
        producers
    };
    if is {
        recipe.memory = gpu_memory(role);
    }
    // Nothing keeps them from staging but that it is not needed.
    recipe.config.path = PathSet::some([PathKind::Rdma, PathKind::Staged]);
    recipe.config.staging_slot_bytes.0 = 64 << 10;
    recipe.config.staging_slots = 4;
}

fn why_not(candidates: &[Candidate], path: PathKind) -> Option<&str> {
    let of = candidates.iter().find(|c| c.path == path);
    of.expect("it was looked at").why_not.as_deref()
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_blocks_go_straight_from_and_into_memory_of_a_gpu() {
    let policies = [FencePolicy::Verify, FencePolicy::On, FencePolicy::Off];
    // Of odd sizes too.
    let sizes = [(BLOCK, 24), (65_543, 9), (4104, 48)];
    for ((mems, fence), (block, blocks)) in MEMORIES.into_iter().zip(policies).zip(sizes) {
        let mut pair = Pair::of(block, blocks, |recipe| {
            on_gpus(recipe, mems);
            recipe.config.fence = fence;
        });
        let path = pair.instance.path().expect("up");
        assert_eq!((path.path, path.over), (PathKind::Rdma, None), "{path:?}");
        assert!(path.reason.contains("reach the GPU's memory"), "{path:?}");
        let staged = why_not(&path.candidates, PathKind::Staged);
        assert_eq!(staged, Some("RDMA devices reach both sides' memory"));
        let back = pair.way().path().expect("up");
        assert_eq!(back.path, PathKind::Rdma);
        let some = blocks - blocks / 3;
        let table = pairs((0..some).map(|b| (b, blocks - 1 - b)));
        for report in pair.moves(&table) {
            assert_eq!(report.bytes, block * u64::from(some) * 2);
        }
    }
}

/// What one side's devices reach needs no buffers, whatever the other side has to do.
#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_a_side_that_reaches_its_gpu_and_one_that_does_not() {
    let sizes = [(BLOCK, 24), (65_543, 9)];
    for (not, (block, blocks)) in [KvRole::Producer, KvRole::Consumer].into_iter().zip(sizes) {
        let mut pair = Pair::of(block, blocks, |recipe| {
            on_gpus(recipe, (true, true));
            if recipe.config.kv_role == not {
                recipe.config.path = PathSet::only(PathKind::Staged);
            }
        });
        let path = pair.instance.path().expect("up");
        let staged = (PathKind::Staged, Some(PathKind::Rdma));
        assert_eq!((path.path, path.over), staged, "{path:?}");
        let rdma = why_not(&path.candidates, PathKind::Rdma).expect("not straight");
        // What is not allowed at the side that chooses is not looked at.
        let reason = match not {
            KvRole::Consumer => "the configuration does not allow it",
            _ => {
                "the peer's memory is a GPU's, and not registered: the configuration does not allow it"
            }
        };
        assert_eq!(rdma, reason);
        let words = format!("not by RDMA alone: {reason}");
        assert!(path.reason.contains(&words), "{}", path.reason);
        let back = pair.way().path().expect("up");
        assert_eq!((back.path, back.over), staged);
        let some = blocks - blocks / 3;
        pair.moves(&pairs((0..some).map(|b| (b, blocks - 1 - b))));
    }
}

fn memory(node: &Node) -> &GpuMemory {
    node.side.memory()[0].gpu().expect("memory of a GPU")
}

/// Where a block's tensor of layer 0 is in the memory.
fn place(node: &Node, block: u32) -> u64 {
    let tensor = &node.side.placement().desc().tensors()[0];
    tensor.offset + u64::from(block) * tensor.block_stride
}

/// A stream on which much is to be done before what is put there next.
fn busy_stream(node: &Node) -> (Stream, GpuMemory) {
    let gpu = memory(node).gpu();
    let stream = Stream::new(gpu).expect("a stream");
    let room = GpuMemory::new(gpu, BUSY).expect("memory");
    for round in 0..6 {
        drop(stream.fill(&room, 0, BUSY, round).expect("a fill"));
    }
    (stream, room)
}

fn copy(stream: &Stream, dst: Place<'_>, src: Place<'_>) {
    let copy = Copy {
        dst,
        src,
        len: BLOCK,
    };
    drop(stream.copy(&[copy]).expect("a copy"));
}

fn mark(stream: &Stream) -> Event {
    let event = Event::new(stream.gpu()).expect("an event");
    event.record(stream).expect("recorded");
    event
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_a_layer_that_is_pushed_from_a_gpu_is_read_after_its_event() {
    let mut pair = Pair::of(BLOCK, 16, |recipe| {
        on_gpus(recipe, (true, true));
        recipe.config.fence = FencePolicy::Verify;
    });
    let (stream, _room) = busy_stream(&pair.producer);
    let fresh = PinnedMemory::new(stream.gpu(), BLOCK).expect("memory");
    fresh.host().fill(0, BLOCK, 0x77).expect("inside");
    let at = place(&pair.producer, 3);
    let block = Place::Gpu(memory(&pair.producer), at);
    copy(&stream, block, Place::Pinned(&fresh, 0));
    let event = mark(&stream);
    let (request, way) = (pair.request(), pair.way());
    (pair.consumer.engine)
        .expect(&request, &groups(0..2), 1, LONG)
        .expect("room");
    let push = way.begin_push_with(&request, PushOptions::default());
    let push = push.expect("a push");
    push.layer(0, &pairs([(3, 1)]), Some(&event)).expect("fits");
    push.layer(1, &pairs([(4, 0)]), None).expect("fits");
    let busy = event.is_done().ok();
    assert_eq!(busy, Some(false), "the stream was not busy enough");
    let sent = push.commit().expect("committed");
    assert_eq!(sent.wait(LONG), Some(Outcome::Done));
    assert_eq!(event.is_done().ok(), Some(true), "sent before it was there");
    pair.told[1].wait("received", |event| matches!(event, Told::Received { .. }));
    let mut got = vec![0; BLOCK as usize];
    let at = place(&pair.consumer, 1);
    memory(&pair.consumer).read(at, &mut got).expect("inside");
    let old = got.iter().filter(|byte| **byte != 0x77).count();
    assert_eq!(old, 0, "what was there before");
    pair.told_once();
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_a_pull_into_a_gpu_comes_after_its_event_and_is_fenced_for_its_reader() {
    for fence in [FencePolicy::On, FencePolicy::Off] {
        let pair = Pair::of(BLOCK, 16, |recipe| {
            on_gpus(recipe, (false, true));
            recipe.config.fence = fence;
        });
        let consumer = &pair.consumer;
        let (stream, _room) = busy_stream(consumer);
        let kept = PinnedMemory::new(stream.gpu(), BLOCK).expect("memory");
        let block = Place::Gpu(memory(consumer), place(consumer, 5));
        // The kernels that still read the block.
        copy(&stream, Place::Pinned(&kept, 0), block);
        let after = mark(&stream);
        let reader = Stream::new(stream.gpu()).expect("a stream");
        let options = PullOptions {
            after: Some(after.clone()),
            stream: Some(reader.clone()),
            ..PullOptions::default()
        };
        let table = pairs([(9, 5)]);
        let offer = pair
            .producer
            .engine
            .offer(&"r".into(), &groups(0..16), 1, LONG);
        let pull = pair
            .instance
            .pull(&offer.expect("an offer"), &table, options);
        let pull = pull.expect("a pull");
        let busy = after.is_done().ok();
        assert_eq!(busy, Some(false), "the stream was not busy enough");
        assert_eq!(pull.wait(LONG), Some(Outcome::Done));
        assert_eq!(
            after.is_done().ok(),
            Some(true),
            "written before it was read"
        );
        for at in [0, BLOCK - 8] {
            assert_eq!(kept.host().load_u64(at).ok(), Some(POISON));
        }
        match pull.fence() {
            Some(put) => put.wait(Instant::now() + LONG).expect("everywhere"),
            None => assert_eq!(fence, FencePolicy::Off),
        }
        copy(&reader, Place::Pinned(&kept, 0), block);
        reader.wait(Instant::now() + LONG).expect("it ends");
        assert_ne!(kept.host().load_u64(0).ok(), Some(POISON));
        pair.arrived(&table);
    }
}
