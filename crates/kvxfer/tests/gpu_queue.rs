//! Pushes that kernels make, through the proxy ring. The kernels are the host build of `kernels/post.h`, run by the
//! stand-in for a GPU, or those of the runtime that `KVXFER_TEST_GPU` names.

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer::config::{Config, KvRole, PathKind};
use kvxfer::engine::{GpuQueue, Instance, Outcome, Peer, Push, PushOptions, Transfer};
use kvxfer::event::Event;
use kvxfer::gpu_queue::{GpuQueueConfig, Kernels, Pace, PostFault};
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
use support::{LONG, Log, Node, POISON, groups, pairs, recipe, take_time, until};

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
    _session: Instance,
    log: Log,
    sent: Log,
    kernels: PostKernels,
    stream: Stream,
}

impl Bench {
    fn new(path: PathKind, format: (u64, u32), blocks: u32, change: impl Fn(&mut Config)) -> Self {
        let node = |role| {
            let mut recipe = recipe(role, path, format.0, blocks).with(&change);
            recipe.format = KvFormat::opaque(format.0, format.1).expect("a format");
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
            _session: session.expect("a session"),
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

/// 100,000 puts of four threads, each block of each layer once, through 64 slots.
fn many(path: PathKind) {
    const LAYERS: u16 = 16;
    const MANY: u32 = 6250;
    const SMALL: u64 = 64;
    let mut bench = Bench::new(path, (SMALL, LAYERS.into()), MANY, |_| {});
    bench.expect("r", 0..MANY);
    let push = bench.push("r", LONG);
    let queue = bench.queue(&push, 64);
    assert_eq!(queue.block_bytes(0, 15), Some(SMALL));
    assert_eq!(queue.block_bytes(0, 16), None);
    let streams: Vec<Stream> = (0..4)
        .map(|_| Stream::new(bench.stream.gpu()).expect("a stream"))
        .collect();
    let postings: Vec<Posting> = (0..)
        .zip(&streams)
        .map(|(t, stream): (u16, _)| {
            let layers = 4 * t..4 * t + 4;
            let moves: Vec<Move> = layers
                .flat_map(|layer| (0..MANY).map(move |b| put(layer, b, MANY - 1 - b, SMALL)))
                .collect();
            post(&bench.kernels, stream, &queue, &moves, (PUT, ALL))
        })
        .collect();
    for posting in &postings {
        let ends = ends(posting);
        assert!(ends.iter().all(|end| *end == WELL), "{:?}", ends.last());
    }
    let report = queue.report();
    assert_eq!(
        (report.taken, report.done, report.failed),
        (100_000, 100_000, 0)
    );
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    let sent = push.commit().expect("committed");
    assert_eq!(sent.wait(LONG), Some(Outcome::Done));
    let report = sent.report();
    assert_eq!(report.bytes, 100_000 * SMALL);
    bench.received("r");
    let table = pairs((0..MANY).map(|b| (b, MANY - 1 - b)));
    let bytes = bench
        .consumer
        .side
        .verify(SEED, &table)
        .expect("every byte");
    assert_eq!(bytes, 100_000 * SMALL);
    bench.over();
}

#[test]
fn a_hundred_thousand_puts_over_an_arena() {
    many(PathKind::Arena);
}

#[test]
fn a_hundred_thousand_puts_over_tcp() {
    many(PathKind::Tcp);
}

/// A kernel fills blocks and pushes them as it goes.
fn produced(path: PathKind, change: impl Fn(&mut Config)) {
    let mut bench = Bench::new(path, (BLOCK, 3), BLOCKS, change);
    bench.producer.side.poison().expect("poisoned");
    bench.expect("r", 0..40);
    let push = bench.push("r", LONG);
    let queue = bench.queue(&push, 16);
    queue.set_pace(Pace::Armed);
    let side = &bench.producer.side;
    let reached = side.reach(bench.stream.gpu()).expect("pinned");
    let layers = side.produce(&reached, &queue, SEED);
    assert_eq!(layers.len(), 3);
    let list: Vec<Pair> = (0..40)
        .map(|b| Pair {
            src: b + 20,
            dst: 39 - b,
        })
        .collect();
    let kernels = &bench.kernels;
    let posting = kernels
        .produce(&bench.stream, queue.device(), &layers, &list)
        .expect("launched");
    let behind = Kernels::Behind(posting.event());
    queue.finish(behind, LONG).expect("they end");
    let sent = push.commit().expect("committed");
    assert_eq!(sent.wait(LONG), Some(Outcome::Done));
    assert!(ends(&posting).iter().all(|end| *end == WELL));
    bench.received("r");
    let table = pairs((0..40).map(|b| (b + 20, 39 - b)));
    bench
        .consumer
        .side
        .verify(SEED, &table)
        .expect("every byte");
    bench.consumer.assert_untouched_but(0..40);
    bench.over();
}

#[test]
fn a_producer_kernel_pushes_layer_by_layer() {
    for path in [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp] {
        produced(path, |_| {});
    }
}

#[test]
fn a_producer_kernel_pushes_out_of_its_gpu() {
    produced(PathKind::Ipc, |_| {});
}

#[test]
fn checksums_are_told_of_what_kernels_push() {
    produced(PathKind::Arena, |config| config.verify = true);
}

#[test]
fn what_has_ended_well_is_there() {
    for path in [PathKind::Arena, PathKind::Tcp, PathKind::Ipc] {
        let bench = Bench::new(path, (BLOCK, 2), BLOCKS, take_time);
        bench.expect("r", 0..BLOCKS);
        let push = bench.push("r", LONG);
        let queue = bench.queue(&push, 64);
        for block in 0..4 {
            let moves = [put(0, block, block, BLOCK), put(1, block, block, BLOCK)];
            assert_eq!(ends(&bench.post(&queue, &moves, PUT, ALL)), [WELL, WELL]);
            // Before anything else is known of the push.
            let table = pairs([(block, block)]);
            bench
                .consumer
                .side
                .verify(SEED, &table)
                .expect("every byte");
        }
        drop(push.abort());
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
        bench.over();
    }
}

#[test]
fn posts_wait_for_the_ticket_and_layers_go_beside_them() {
    let mut bench = Bench::small(|_| {});
    let push = bench.push("r", LONG);
    let queue = bench.queue(&push, 64);
    let posting = bench.post(&queue, &puts(8), PUT, ALL);
    // The consumer asks for none of it yet.
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(queue.report().taken, 0);
    assert!(!posting.is_done().expect("no fault"));
    bench.expect("r", 0..16);
    assert!(ends(&posting).iter().all(|end| *end == WELL));
    push.all_layers(&pairs((8..16).map(|b| (b, b))), None)
        .expect("fits");
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    let sent = push.commit().expect("committed");
    assert_eq!(sent.wait(LONG), Some(Outcome::Done));
    assert_eq!(sent.report().bytes, 2 * 16 * BLOCK);
    bench.received("r");
    let table = pairs((0..16).map(|b| (b, b)));
    bench
        .consumer
        .side
        .verify(SEED, &table)
        .expect("every byte");
    bench.consumer.assert_untouched_but(0..16);
    bench.over();
}

#[test]
fn a_committed_push_has_what_was_posted_before() {
    let mut bench = Bench::small(take_time);
    bench.expect("r", 0..8);
    let push = bench.push("r", LONG);
    let queue = bench.queue(&push, 16);
    // All of them fit into the ring, so all of them are posted when the kernel has ended.
    let before = bench.post(&queue, &puts(8), PUT, kvxfer::mem::kernels::queue::POSTED);
    before.wait(Instant::now() + LONG).expect("it ends");
    let sent = push.commit().expect("committed");
    // What comes behind it is told so, whether or not there was room yet.
    let after = bench.post(&queue, &puts(1), PUT, ALL);
    assert_eq!(sent.wait(LONG), Some(Outcome::Done));
    for (posted, ended) in ends(&after) {
        let told = [Status::Closed, Status::Flushed];
        let refused = posted == Status::Broken || posted == Status::Ok && told.contains(&ended);
        assert!(refused, "{posted:?} {ended:?}");
    }
    bench.received("r");
    let table = pairs((0..8).map(|b| (b, b)));
    bench
        .consumer
        .side
        .verify(SEED, &table)
        .expect("every byte");
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    bench.over();
}

/// What a post says that cannot be done, what the kernel is told and the host.
#[test]
fn lies_of_a_kernel_fail_the_push_and_write_nothing() {
    let group = |group: u64, word: u64| word | group << 56;
    let good = put(1, 3, 2, BLOCK);
    let layer = 7;
    let not_expected = |block| PostFault::NotExpected { group: 0, block };
    let cases: Vec<(Move, u32, Status, PostFault)> = vec![
        (good, GET, Status::BadOp, PostFault::Operation),
        (good, PUT_IMM, Status::BadOp, PostFault::Operation),
        (good, 9, Status::BadOp, PostFault::Operation),
        (
            Move { flags: 0, ..good },
            PUT,
            Status::BadKey,
            PostFault::Address,
        ),
        (
            Move {
                remote: 0x7000_0000_0000,
                rkey: 1,
                flags: LOCAL_PLACE,
                ..good
            },
            PUT,
            Status::BadKey,
            PostFault::Address,
        ),
        (
            Move {
                remote: place(0, 2),
                ..good
            },
            PUT,
            Status::BadRange,
            PostFault::Places,
        ),
        (
            Move {
                local: group(1, good.local),
                remote: group(1, good.remote),
                ..good
            },
            PUT,
            Status::BadKey,
            PostFault::Layer { group: 1, layer: 1 },
        ),
        (
            put(layer, 3, 2, BLOCK),
            PUT,
            Status::BadKey,
            PostFault::Layer { group: 0, layer },
        ),
        (
            put(1, 3, 2, 2 * BLOCK),
            PUT,
            Status::BadLength,
            PostFault::Length {
                group: 0,
                layer: 1,
                len: 2 * BLOCK,
                wanted: BLOCK,
            },
        ),
        (
            put(1, BLOCKS, 2, BLOCK),
            PUT,
            Status::BadRange,
            PostFault::Source {
                group: 0,
                block: BLOCKS,
                blocks: BLOCKS,
            },
        ),
        (put(1, 3, 4, BLOCK), PUT, Status::BadRights, not_expected(4)),
        (
            put(1, 3, u32::MAX, BLOCK),
            PUT,
            Status::BadRights,
            not_expected(u32::MAX),
        ),
    ];
    let mut bench = Bench::small(|_| {});
    for (i, (lie, op, status, fault)) in cases.into_iter().enumerate() {
        let request = format!("r{i}");
        bench.expect(&request, 0..4);
        let push = bench.push(&request, LONG);
        let queue = bench.queue(&push, 8);
        let well = bench.post(&queue, &[put(0, 1, 1, BLOCK)], PUT, EACH);
        assert_eq!(ends(&well), [WELL]);
        let told = ends(&bench.post(&queue, &[lie], op, EACH));
        assert_eq!(told, [(Status::Ok, status)], "{lie:?}");
        let later = ends(&bench.post(&queue, &[good, good], PUT, EACH));
        let refused = |(posted, ended): &(Status, Status)| {
            *posted == Status::Broken || *ended == Status::Flushed
        };
        assert!(later.iter().all(refused), "{later:?}");
        assert_eq!(queue.report().done, 1);
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
        let sent = push.commit().expect("told");
        assert_eq!(cause(&sent), Cause::KernelPost { post: 1, fault });
        assert!(sent.wait_released(LONG));
        bench.failed(&request);
        bench.consumer.assert_untouched_but([1]);
    }
    bench.over();
}

#[test]
fn a_kernel_may_not_send_what_is_being_written() {
    let node = |role| recipe(role, PathKind::Arena, BLOCK, BLOCKS).node();
    let (a, b) = (node(KvRole::Both), node(KvRole::Both));
    let address = a.engine.listen("127.0.0.1:0").expect("a free port");
    let _session = b.engine.connect(&address.to_string(), LONG).expect("up");
    let way = way(&a, &b.name());
    // Somebody may write into block 5 of this rank.
    let mine = RequestId::from("mine");
    a.engine.expect(&mine, &groups([5]), 1, LONG).expect("room");
    let request = RequestId::from("r");
    b.engine
        .expect(&request, &groups(0..4), 1, LONG)
        .expect("room");
    let push = begin(&way, "r", LONG);
    let config = GpuQueueConfig::new(&gpu());
    let queue = push.gpu_queue(&config).expect("a queue");
    let kernels = PostKernels::load(&gpu()).expect("kernels");
    let stream = Stream::new(&gpu()).expect("a stream");
    let moves = [put(0, 4, 1, BLOCK), put(0, 5, 2, BLOCK)];
    let told = ends(&post(&kernels, &stream, &queue, &moves, (PUT, EACH)));
    assert_eq!(told, [WELL, (Status::Ok, Status::BadRights)]);
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    let fault = PostFault::InUse { group: 0, block: 5 };
    let sent = push.commit().expect("told");
    assert_eq!(cause(&sent), Cause::KernelPost { post: 1, fault });
}

#[test]
fn a_post_that_was_begun_and_never_written_fails_the_push() {
    for commits_at_once in [true, false] {
        let mut bench = Bench::small(|_| {});
        bench.expect("r", 0..4);
        let push = bench.push("r", LONG);
        let queue = bench.queue(&push, 8);
        assert_eq!(
            ends(&bench.post(&queue, &[put(0, 1, 1, BLOCK)], PUT, EACH)),
            [WELL]
        );
        queue.device().lose_a_ticket().expect("inside");
        // Behind it nothing is found any more.
        let posted = kvxfer::mem::kernels::queue::POSTED;
        assert_eq!(
            ends(&bench.post(&queue, &[put(0, 2, 2, BLOCK)], PUT, posted)),
            [WELL]
        );
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
        if !commits_at_once {
            bench.failed("r");
        }
        let fault = PostFault::Unwritten;
        let sent = push.commit().expect("told");
        assert_eq!(cause(&sent), Cause::KernelPost { post: 1, fault });
        bench.failed("r");
        bench.consumer.assert_untouched_but([1]);
        bench.over();
    }
}

#[track_caller]
fn ended_by(ends: &[(Status, Status)], status: Status) {
    let told = [Status::Ok, status, Status::Flushed];
    let known = |(posted, ended): &(Status, Status)| {
        *posted == Status::Broken || *posted == Status::Ok && told.contains(ended)
    };
    assert!(ends.iter().all(known), "{ends:?}");
    assert!(ends.iter().any(|end| *end != WELL), "all went well");
}

#[test]
fn an_abort_reaches_the_posters() {
    let mut bench = Bench::small(take_time);
    bench.expect("r", 0..BLOCKS);
    let push = bench.push("r", LONG);
    let queue = bench.queue(&push, 8);
    let posting = bench.post(&queue, &puts(BLOCKS), PUT, ALL);
    until("some are under way", || queue.report().taken > 8);
    let sent = push.abort();
    assert_eq!(cause(&sent), Cause::Cancelled);
    ended_by(&ends(&posting), Status::Closed);
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    assert!(sent.wait_released(LONG));
    bench.failed("r");
    bench.over();
}

#[test]
fn a_deadline_reaches_the_posters() {
    let mut bench = Bench::small(take_time);
    bench.expect("r", 0..BLOCKS);
    let push = bench.push("r", Duration::from_millis(120));
    let queue = bench.queue(&push, 2);
    let posting = bench.post(&queue, &puts(BLOCKS), PUT, ALL);
    ended_by(&ends(&posting), Status::Late);
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    let sent = push.commit().expect("told");
    assert_eq!(cause(&sent), Cause::DeadlinePassed);
    assert!(sent.wait_released(LONG));
    bench.failed("r");
    bench.over();
}

#[test]
fn posts_that_no_ticket_comes_for_end_by_the_deadline() {
    let bench = Bench::small(|_| {});
    let push = bench.push("r", Duration::from_millis(100));
    let queue = bench.queue(&push, 4);
    let posting = bench.post(&queue, &puts(4), PUT, ALL);
    let ends = ends(&posting);
    ended_by(&ends, Status::Late);
    assert!(!ends.contains(&WELL), "{ends:?}");
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    assert_eq!(cause(&push.commit().expect("told")), Cause::DeadlinePassed);
    bench.consumer.assert_untouched_but([]);
    bench.over();
}

#[test]
fn a_consumer_that_revokes_reaches_the_posters() {
    let bench = Bench::small(take_time);
    bench.expect("r", 0..BLOCKS);
    let push = bench.push("r", LONG);
    let queue = bench.queue(&push, 8);
    let posting = bench.post(&queue, &puts(BLOCKS), PUT, ALL);
    until("some are under way", || queue.report().taken > 8);
    assert!(bench.consumer.engine.cancel_expect(&RequestId::from("r")));
    ended_by(&ends(&posting), Status::Closed);
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    assert_eq!(cause(&push.commit().expect("told")), Cause::Revoked);
    bench.over();
}

#[test]
fn the_death_of_the_peer_reaches_the_posters() {
    for path in [PathKind::Arena, PathKind::Tcp, PathKind::Ipc] {
        let mut peer = Child::start(&Spec {
            role: KvRole::Consumer,
            path,
            block_bytes: BLOCK,
            blocks: BLOCKS,
            listen: "127.0.0.1:0".to_owned(),
            engine_id: None,
            seed: SEED,
            namespace: None,
        });
        let producer = recipe(KvRole::Producer, path, BLOCK, BLOCKS).node();
        let mut log = Log::new(&producer.engine);
        let instance = producer.engine.connect(&peer.address, LONG).expect("up");
        peer.expect("r", BLOCKS, LONG);
        let push = instance.begin_push(&RequestId::from("r")).expect("a push");
        let queue = push
            .gpu_queue(&GpuQueueConfig::new(&gpu()))
            .expect("a queue");
        let kernels = PostKernels::load(&gpu()).expect("kernels");
        let stream = Stream::new(&gpu()).expect("a stream");
        // More than can be over before the peer is dead.
        let moves: Vec<Move> = puts(BLOCKS).into_iter().cycle().take(200_000).collect();
        let posting = post(&kernels, &stream, &queue, &moves, (PUT, ALL));
        until("some are done", || queue.report().done > 100);
        peer.die();
        let ends = ends(&posting);
        assert!(ends.contains(&WELL));
        let told = |(posted, ended): &(Status, Status)| {
            *posted == Status::Broken
                || [Status::Ok, Status::Peer, Status::Flushed, Status::Device].contains(ended)
        };
        assert!(ends.iter().all(told), "{path}");
        assert!(ends.iter().any(|end| *end != WELL), "{path}: all went well");
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
        let sent = push.commit().expect("told");
        assert_eq!(cause(&sent), Cause::PeerDead, "{path}");
        assert!(sent.wait_released(LONG), "{path}");
        log.assert_told_once();
    }
}

#[test]
fn child_entry() {
    child::entry();
}

#[test]
fn an_engine_that_goes_ends_its_posters() {
    let bench = Bench::small(take_time);
    bench.expect("r", 0..BLOCKS);
    let push = bench.push("r", LONG);
    let queue = bench.queue(&push, 8);
    let posting = bench.post(&queue, &puts(BLOCKS), PUT, ALL);
    until("some are under way", || queue.report().taken > 8);
    // The last of its handles.
    drop((bench.producer, bench.sent, bench.way));
    let ends = ends(&posting);
    let told = |(posted, ended): &(Status, Status)| {
        let ends = [Status::Ok, Status::Closed, Status::Flushed, Status::Stopped];
        matches!(posted, Status::Broken | Status::Stopped) || ends.contains(ended)
    };
    assert!(ends.iter().all(told), "{ends:?}");
    assert!(ends.iter().any(|end| *end != WELL), "all went well");
}

#[test]
fn kernels_that_are_late_are_stopped() {
    let bench = Bench::small(|_| {});
    // Nobody expects it: the posts wait.
    let push = bench.push("r", LONG);
    let queue = bench.queue(&push, 4);
    let posting = bench.post(&queue, &puts(1), PUT, ALL);
    let late = queue.finish(Kernels::Behind(posting.event()), Duration::from_millis(30));
    let after = Duration::from_millis(30);
    assert!(
        matches!(late, Err(kvxfer::Error::KernelsLate { after: a }) if a == after),
        "{late:?}"
    );
    let stopped = (Status::Ok, Status::Stopped);
    assert_eq!(ends(&posting), [stopped, stopped]);
    drop(push.abort());
}

#[test]
fn a_queue_that_is_dropped_stops_its_kernels_and_keeps_its_memory() {
    let mut bench = Bench::small(|_| {});
    let push = bench.push("r", LONG);
    let queue = bench.queue(&push, 4);
    let (device, handle) = (Arc::downgrade(queue.device()), queue.handle());
    assert_eq!(handle.depth, 4);
    let posting = bench.post(&queue, &puts(3), PUT, ALL);
    std::thread::sleep(Duration::from_millis(5));
    drop(queue);
    for (posted, ended) in ends(&posting) {
        assert!(
            [posted, ended].contains(&Status::Stopped),
            "{posted:?} {ended:?}"
        );
    }
    drop(posting);
    // The push is none the worse for it, whatever was in the ring when the ticket came.
    bench.expect("r", 0..8);
    push.all_layers(&pairs((0..8).map(|b| (b, b))), None)
        .expect("fits");
    let sent = push.commit().expect("committed");
    assert_eq!(sent.wait(LONG), Some(Outcome::Done));
    bench.received("r");
    bench.over();
    // Nobody has said that the kernels have ended.
    assert!(device.upgrade().is_some());
}

#[test]
fn a_finished_queue_gives_its_memory_back() {
    let mut bench = Bench::small(|_| {});
    bench.expect("r", 0..8);
    let push = bench.push("r", LONG);
    let queue = bench.queue(&push, 4);
    let device = Arc::downgrade(queue.device());
    let posting = bench.post(&queue, &puts(8), PUT, ALL);
    assert!(ends(&posting).iter().all(|end| *end == WELL));
    drop(posting);
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    assert_eq!(push.commit().expect("told").wait(LONG), Some(Outcome::Done));
    bench.received("r");
    // The stream lets go of what has ended when it is given something.
    let gpu = bench.stream.gpu().clone();
    bench.stream = Stream::new(&gpu).expect("a stream");
    until("the memory is back", || device.upgrade().is_none());
    bench.over();
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let bench = Bench::small(|_| {});
    let push = bench.push("r", LONG);
    let refused = |change: &dyn Fn(&mut GpuQueueConfig)| {
        let mut config = bench.config(4);
        change(&mut config);
        push.gpu_queue(&config).expect_err("refused").to_string()
    };
    for depth in [0, 3, 1 << 17, u32::MAX] {
        assert!(refused(&|c| c.depth = depth).contains("power of two"));
    }
    assert!(refused(&|c| c.patience = Duration::ZERO).contains("patience"));
    let word = bench.consumer.first_word(0);
    assert_eq!(word, POISON);
    drop(push.abort());
}
