//! Pushes that kernels make, through the proxy ring. The kernels are the host build of `kernels/post.h`, run by the
//! stand-in for a GPU, or those of the runtime that `KVXFER_TEST_GPU` names.

#[path = "../support/mod.rs"]
mod support;

mod ends;
mod gets;
mod lies;
mod links;
mod memory;
mod pushes;
mod tells;
mod wqes;

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer::bench::BenchMemory;
use kvxfer::config::{Config, KvRole, PathKind};
use kvxfer::engine::{GpuQueue, Instance, Outcome, Peer, Push, PushOptions, Transfer};
use kvxfer::event::Event;
use kvxfer::gpu_queue::{GpuQueueConfig, Kernels, Pace, PostFault, WqeSlots};
use kvxfer::ids::RequestId;
use kvxfer::layout::KvFormat;
use kvxfer::mem::gpu::{Gpu, GpuRuntime, Stream};
use kvxfer::mem::kernels::Pair;
use kvxfer::mem::kernels::queue::{
    ALL, ALL_TENSORS, EACH, GET, LOCAL_PLACE, Move, PUT, PUT_IMM, PostResult, REMOTE_PLACE,
};
use kvxfer::mem::post::device::{PostBy, PostKernels, Posting, Posts};
use kvxfer::mem::post::{Place, Status};
use kvxfer::transfer::Cause;
use support::child::{self, Child, Spec};
use support::{LONG, Log, Node, POISON, Recipe, groups, pairs, recipe, take_time, until};

const BLOCK: u64 = 4096;
const BLOCKS: u32 = 64;
const SEED: u64 = 21;

fn gpu() -> Gpu {
    let name = std::env::var("KVXFER_TEST_GPU").unwrap_or_else(|_| "host".to_owned());
    let runtime = GpuRuntime::open(name.parse().expect("a runtime")).expect("a GPU");
    runtime.gpu(0).expect("the first").clone()
}

/// Two engines, and the way from the producer to the consumer.
struct Bench {
    producer: Node,
    consumer: Node,
    way: Peer,
    session: Instance,
    log: Log,
    sent: Log,
    kernels: PostKernels,
    stream: Stream,
}

impl Bench {
    fn new(path: PathKind, format: (u64, u32), blocks: u32, change: impl Fn(&mut Config)) -> Self {
        let format = KvFormat::opaque(format.0, format.1).expect("a format");
        Self::of(path, format, blocks, change)
    }

    /// Over GPU links, to a consumer whose blocks are in the host's memory.
    fn to_host(format: (u64, u32), blocks: u32) -> Self {
        let format = KvFormat::opaque(format.0, format.1).expect("a format");
        let on_host = |recipe: &mut Recipe| {
            if recipe.config.kv_role == KvRole::Consumer {
                recipe.memory = BenchMemory::Arena;
            }
        };
        Self::made(PathKind::Ipc, format, blocks, on_host)
    }

    fn of(path: PathKind, format: KvFormat, blocks: u32, change: impl Fn(&mut Config)) -> Self {
        Self::made(path, format, blocks, |recipe| change(&mut recipe.config))
    }

    fn made(path: PathKind, format: KvFormat, blocks: u32, change: impl Fn(&mut Recipe)) -> Self {
        let node = |role| {
            let mut recipe = recipe(role, path, BLOCK, blocks);
            recipe.format = format.clone();
            change(&mut recipe);
            recipe.node()
        };
        let (producer, consumer) = (node(KvRole::Producer), node(KvRole::Consumer));
        producer.side.fill(SEED).expect("filled");
        consumer.side.poison().expect("poisoned");
        let address = producer.engine.listen("127.0.0.1:0").expect("a free port");
        let session = consumer.engine.connect(&address.to_string(), LONG);
        let gpu = gpu();
        Self {
            way: way(&producer, &consumer.name()),
            session: session.expect("a session"),
            log: Log::new(&consumer.engine),
            sent: Log::new(&producer.engine),
            producer,
            consumer,
            kernels: PostKernels::load(&gpu).expect("kernels"),
            stream: Stream::new(&gpu).expect("a stream"),
        }
    }

    fn small(change: impl Fn(&mut Config)) -> Self {
        Self::new(PathKind::Arena, (BLOCK, 2), BLOCKS, change)
    }

    fn expect(&self, request: &str, blocks: impl IntoIterator<Item = u32>) {
        let request = RequestId::from(request);
        let expected = self
            .consumer
            .engine
            .expect(&request, &groups(blocks), 1, LONG);
        expected.expect("room");
    }

    fn push(&self, request: &str, deadline: Duration) -> Push {
        begin(&self.way, request, deadline)
    }

    fn queue(&self, push: &Push, depth: u32) -> GpuQueue {
        push.gpu_queue(&self.config(depth)).expect("a queue")
    }

    fn config(&self, depth: u32) -> GpuQueueConfig {
        let mut config = GpuQueueConfig::new(self.stream.gpu());
        config.depth = depth;
        config.patience = LONG;
        config
    }

    fn post(&self, queue: &GpuQueue, moves: &[Move], op: u32, until: u32) -> Posting {
        post(&self.kernels, &self.stream, queue, moves, (op, until))
    }

    fn received(&mut self, request: &str) {
        let wanted = RequestId::from(request);
        let of = |e: &Event| matches!(e, Event::Received { request, .. } if *request == wanted);
        self.log.wait("received", of);
    }

    fn failed(&mut self, request: &str) {
        let wanted = RequestId::from(request);
        let of = |e: &Event| matches!(e, Event::Failed { request, .. } if *request == wanted);
        self.log.wait("failed", of);
    }

    /// Everything has been told once, and all memory is back.
    fn over(mut self) {
        self.log.assert_told_once();
        self.sent.assert_told_once();
    }
}

fn way(producer: &Node, consumer: &kvxfer::event::PeerName) -> Peer {
    until("the session is up", || {
        producer.engine.peer_of(consumer).is_some()
    });
    producer.engine.peer_of(consumer).expect("up")
}

fn begin(way: &Peer, request: &str, deadline: Duration) -> Push {
    let options = PushOptions {
        deadline: Some(deadline),
        ..PushOptions::default()
    };
    let push = way.begin_push_with(&RequestId::from(request), options);
    push.expect("a push")
}

fn post(
    kernels: &PostKernels,
    stream: &Stream,
    queue: &GpuQueue,
    moves: &[Move],
    (op, until): (u32, u32),
) -> Posting {
    let posts = Posts {
        moves,
        posters: 1,
        by: PostBy::Blocks,
        op,
        until,
    };
    let posting = kernels.post(stream, queue.device(), &posts);
    posting.expect("launched")
}

fn place(layer: u16, block: u32) -> u64 {
    let place = Place {
        group: 0,
        tensor: ALL_TENSORS,
        layer,
        block,
    };
    place.to_word()
}

fn put(layer: u16, src: u32, dst: u32, len: u64) -> Move {
    Move {
        local: place(layer, src),
        remote: place(layer, dst),
        len,
        flags: LOCAL_PLACE | REMOTE_PLACE,
        ..Move::default()
    }
}

/// What a place of a node holds.
fn words(node: &Node, place: u64) -> Vec<u64> {
    let place = Place::from_word(place);
    let mut tensors = node.side.placement().desc().tensors().iter();
    let tensor = tensors.find(|t| t.layer == u32::from(place.layer));
    let tensor = tensor.expect("it has the layer");
    let memory = &node.side.memory()[tensor.memory as usize];
    let begin = tensor.offset + u64::from(place.block) * tensor.block_stride;
    let words = (0..tensor.block_stride).step_by(8);
    let word = |at| memory.load_u64(begin + at).expect("inside");
    words.map(word).collect()
}

/// Both layers of the first `n` blocks, to the same blocks.
fn puts(n: u32) -> Vec<Move> {
    let blocks = (0..n).flat_map(|b| [(0, b), (1, b)]);
    blocks.map(|(l, b)| put(l, b, b, BLOCK)).collect()
}

#[track_caller]
fn ends(posting: &Posting) -> Vec<(Status, Status)> {
    let results = posting
        .wait(Instant::now() + LONG)
        .expect("the kernel ends");
    statuses(&results)
}

#[track_caller]
fn statuses(results: &[PostResult]) -> Vec<(Status, Status)> {
    let status = |n| Status::from_number(n).expect("a status");
    let ends = results.iter();
    ends.map(|r| (status(r.posted), status(r.ended))).collect()
}

const WELL: (Status, Status) = (Status::Ok, Status::Ok);

#[track_caller]
fn cause(transfer: &Transfer) -> Cause {
    match transfer.wait(LONG) {
        Some(Outcome::Failed(failure)) => failure.first_cause,
        other => panic!("{other:?}"),
    }
}

#[test]
fn child_entry() {
    child::entry();
}
