//! Queues over GPU links: kernels write the consumer's blocks themselves. (From another process, killed or stopped in
//! the middle: tests/ipc.rs.)

use kvxfer::Error;
use kvxfer::event::MemoryState;
use kvxfer::gpu_queue::{NoLinks, QueueKind};
use kvxfer::layout::{DType, models};
use kvxfer::mem::gpu::RuntimeKind;
use kvxfer::wire::LinksRefused;

use super::*;

/// Large, so that a put takes far longer than one that is stopped at once.
const BIG: u64 = 64 << 10;
/// Far more than are put while somebody looks.
const MANY: usize = 200_000;

/// Both layers of the first `n` blocks, to the same blocks.
fn big(n: u32) -> Vec<Move> {
    let blocks = (0..n).flat_map(|b| [(0, b), (1, b)]);
    blocks.map(|(l, b)| put(l, b, b, BIG)).collect()
}

fn let_in(config: &mut Config) {
    config.gpu_links_in = true;
}

fn bench(change: impl Fn(&mut Config)) -> Bench {
    Bench::new(PathKind::Ipc, (BIG, 2), BLOCKS, |config| {
        let_in(config);
        change(config);
    })
}

impl Bench {
    fn try_links(&self, push: &Push, patience: Duration) -> Result<GpuQueue, Error> {
        let mut config = self.config(1);
        config.kind = QueueKind::Links;
        config.patience = patience;
        push.gpu_queue(&config)
    }

    fn links(&self, push: &Push) -> GpuQueue {
        self.try_links(push, LONG).expect("a queue")
    }

    /// Puts that go on until they are stopped, of these blocks; some have been put.
    fn endless(&self, queue: &GpuQueue, blocks: u32) -> Posting {
        let moves: Vec<Move> = big(blocks).into_iter().cycle().take(MANY).collect();
        let posting = self.post(queue, &moves, PUT, ALL);
        let of = |block: u32| {
            let side = &self.consumer.side;
            side.verify(SEED, &pairs([(block, block)])).is_ok()
        };
        until("the first block is there", || of(0));
        posting
    }

    /// How the consumer hears of a request that fails; and whether its memory has come back, as far as it knows.
    fn hears(&mut self, request: &str) -> (Cause, MemoryState) {
        let wanted = RequestId::from(request);
        let event = self.log.wait(
            "a failure",
            |e| matches!(e, Event::Failed { request, .. } if *request == wanted),
        );
        match event {
            Event::Failed {
                first_cause,
                memory,
                ..
            } => (first_cause, memory),
            other => panic!("{other:?}"),
        }
    }

    fn told_of(&mut self, request: &str) -> usize {
        let wanted = RequestId::from(request);
        self.log
            .count(|e| e.request().is_some_and(|(request, _)| *request == wanted))
    }

    fn released(&mut self, request: &str) {
        let wanted = RequestId::from(request);
        self.log.wait(
            "its release",
            |e| matches!(e, Event::Released { request, .. } if *request == wanted),
        );
    }
}

#[track_caller]
fn quarantined(transfer: &Transfer) -> Cause {
    match transfer.wait(LONG) {
        Some(Outcome::Failed(failure)) => {
            assert_eq!(failure.memory, MemoryState::Quarantined);
            failure.first_cause
        }
        other => panic!("{other:?}"),
    }
}

/// Some were put, and nothing behind the first that was stopped.
#[track_caller]
fn stopped_in_the_middle(posting: &Posting) {
    let ends = ends(posting);
    let put = ends.iter().take_while(|end| **end == WELL).count();
    assert!(put > 0 && put < ends.len(), "{put} of {}", ends.len());
    let stopped = (Status::Stopped, Status::Stopped);
    assert!(ends[put..].iter().all(|end| *end == stopped));
}

#[test]
fn a_kernel_copies_a_models_blocks_into_the_consumers_memory() {
    for verify in [false, true] {
        let format = models::builtin("llama-3.1-8b", 1, DType::Bf16).expect("built in");
        let mut bench = Bench::of(PathKind::Ipc, format, 24, |config| {
            let_in(config);
            config.verify = verify;
        });
        bench.producer.side.poison().expect("poisoned");
        bench.expect("r", 0..20);
        let push = bench.push("r", LONG);
        let queue = bench.links(&push);
        let gpu = bench.stream.gpu();
        let reached = bench.producer.side.reach(gpu).expect("its own");
        let layers = bench.producer.side.produce(&reached, &queue, SEED);
        assert_eq!(layers.len(), 32);
        let list: Vec<Pair> = (0..20)
            .map(|b| Pair {
                src: b + 4,
                dst: 19 - b,
            })
            .collect();
        let posting = bench
            .kernels
            .produce(&bench.stream, queue.device(), &layers, &list)
            .expect("launched");
        assert!(ends(&posting).iter().all(|end| *end == WELL));
        // They are there, and nobody has been told.
        let table = pairs((0..20).map(|b| (b + 4, 19 - b)));
        let verified = |bench: &Bench| bench.consumer.side.verify(SEED, &table);
        let bytes = verified(&bench).expect("every byte");
        assert_eq!(bench.told_of("r"), 0);
        queue
            .finish(Kernels::Behind(posting.event()), LONG)
            .expect("they have ended");
        let sent = push.commit().expect("committed");
        assert_eq!(sent.wait(LONG), Some(Outcome::Done));
        let report = sent.report();
        assert_eq!((report.bytes, report.operations > 0), (bytes, true));
        bench.received("r");
        verified(&bench).expect("every byte");
        bench.consumer.assert_untouched_but(0..20);
        bench.over();
    }
}

#[test]
fn layers_of_the_host_and_other_queues_go_beside_it() {
    let mut bench = bench(|_| {});
    bench.expect("r", 0..6);
    let push = bench.push("r", LONG);
    let (first, second) = (bench.links(&push), bench.links(&push));
    let proxy = bench.queue(&push, 8);
    push.all_layers(&pairs([(3, 3)]), None).expect("fits");
    let two = |queue: &GpuQueue, from: u32| {
        let blocks = from..from + 1;
        let moves: Vec<Move> = blocks
            .flat_map(|b| [put(0, b, b, BIG), put(1, b, b, BIG)])
            .collect();
        let posting = bench.post(queue, &moves, PUT, EACH);
        assert_eq!(ends(&posting), [WELL, WELL]);
    };
    for (queue, block) in [(&first, 0), (&second, 1), (&proxy, 2)] {
        two(queue, block);
        let of = queue.report();
        assert_eq!(of.failed, 0);
    }
    for queue in [first, second, proxy] {
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
    }
    let sent = push.commit().expect("committed");
    assert_eq!(sent.wait(LONG), Some(Outcome::Done));
    assert_eq!(sent.report().bytes, 4 * 2 * BIG);
    bench.received("r");
    let table = pairs((0..4).map(|b| (b, b)));
    bench
        .consumer
        .side
        .verify(SEED, &table)
        .expect("every byte");
    bench.consumer.assert_untouched_but(0..4);
    bench.over();
}

/// What is no put of an expected block is refused by the device, nothing of it is written, and its push fails by name,
/// though its kernel goes on.
#[test]
fn a_put_that_is_refused_writes_nothing_and_fails_its_push() {
    let mut bench = bench(|_| {});
    let group = 0;
    let one_tensor = |word: u64| word & !(0xff << 48);
    let part = put(0, 3, 5, BIG);
    let part = Move {
        local: one_tensor(part.local),
        remote: one_tensor(part.remote),
        ..part
    };
    let by_address = Move {
        flags: 0,
        ..put(0, 3, 5, BIG)
    };
    let not_expected = |block| PostFault::NotExpected { group, block };
    let source = PostFault::Source {
        group,
        block: BLOCKS,
        blocks: BLOCKS,
    };
    let length = PostFault::Length {
        group,
        layer: 0,
        len: BIG - 8,
        wanted: BIG,
    };
    let layer = PostFault::Layer { group, layer: 2 };
    let (bad_op, operation) = (Status::BadOp, PostFault::Operation);
    let good = put(0, 3, 5, BIG);
    let cases = [
        (put(0, 3, 6, BIG), PUT, Status::BadRights, not_expected(6)),
        (put(1, 3, 0, BIG), PUT, Status::BadRights, not_expected(0)),
        (
            put(0, 3, BLOCKS, BIG),
            PUT,
            Status::BadRange,
            not_expected(BLOCKS),
        ),
        (put(0, BLOCKS, 5, BIG), PUT, Status::BadRange, source),
        (put(2, 3, 5, BIG), PUT, Status::BadKey, layer),
        (put(0, 3, 5, BIG - 8), PUT, Status::BadLength, length),
        (part, PUT, Status::BadRange, PostFault::Places),
        (by_address, PUT, bad_op, PostFault::Address),
        (good, GET, bad_op, operation),
        (good, PUT_IMM, bad_op, operation),
    ];
    for (at, (bad, op, status, fault)) in cases.into_iter().enumerate() {
        let request = format!("r{at}");
        bench.expect(&request, [5, 7]);
        let push = bench.push(&request, LONG);
        let queue = bench.links(&push);
        let posting = bench.post(&queue, &[bad], op, EACH);
        assert_eq!(ends(&posting), [(status, status)], "{bad:x?}");
        // The first is the one that counts.
        let posting = bench.post(&queue, &[put(9, 9, 9, 9)], PUT, EACH);
        assert_eq!(ends(&posting), [(Status::BadKey, Status::BadKey)]);
        bench.consumer.assert_untouched_but([]);
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
        let sent = push.commit().expect("told");
        assert_eq!(cause(&sent), Cause::KernelPost { post: 0, fault });
        bench.failed(&request);
        assert!(sent.wait_released(LONG));
    }
    // Nor does a good one make up for it.
    bench.expect("s", [5, 7]);
    let push = bench.push("s", LONG);
    let queue = bench.links(&push);
    let moves = [put(0, 3, 5, BIG), put(0, 3, 6, BIG), put(1, 3, 5, BIG)];
    let posting = bench.post(&queue, &moves, PUT, EACH);
    let refused = (Status::BadRights, Status::BadRights);
    assert_eq!(ends(&posting), [WELL, refused, WELL]);
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    let sent = push.commit().expect("told");
    let fault = not_expected(6);
    assert_eq!(cause(&sent), Cause::KernelPost { post: 0, fault });
    bench.failed("s");
    bench.consumer.assert_untouched_but([5]);
    bench.over();
}

#[test]
fn links_need_the_path_a_ticket_and_leave() {
    let why = |of: Result<GpuQueue, Error>| match of {
        Err(Error::NoLinks { why }) => why,
        other => panic!("{other:?}"),
    };
    let arena = Bench::small(let_in);
    arena.expect("r", 0..4);
    let push = arena.push("r", LONG);
    let path = PathKind::Arena;
    assert_eq!(why(arena.try_links(&push, LONG)), NoLinks::Path { path });
    drop(push.abort());

    let mut shut = Bench::new(PathKind::Ipc, (BLOCK, 2), BLOCKS, |_| {});
    let push = shut.push("r", LONG);
    let after = Duration::from_millis(20);
    let late = why(shut.try_links(&push, after));
    assert_eq!(late, NoLinks::NoTicket { after });
    shut.expect("r", 0..4);
    let refused = why(shut.try_links(&push, LONG));
    assert_eq!(refused, NoLinks::Refused(LinksRefused::NotAllowed));
    let told = Error::NoLinks { why: refused }.to_string();
    assert!(told.contains("set gpu_links_in"), "{told}");
    // The push goes on as it would have.
    let queue = shut.queue(&push, 8);
    let posting = shut.post(&queue, &puts(4), PUT, ALL);
    assert!(ends(&posting).iter().all(|end| *end == WELL));
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    let sent = push.commit().expect("committed");
    assert_eq!(sent.wait(LONG), Some(Outcome::Done));
    shut.received("r");
    shut.over();
}

/// An abort stops the kernels, and the consumer's blocks are its own again when they have ended, not before.
#[test]
fn an_abort_in_the_middle_keeps_both_sides_blocks_until_the_kernels_have_ended() {
    let mut bench = bench(|_| {});
    bench.expect("r", 0..8);
    let push = bench.push("r", LONG);
    let queue = bench.links(&push);
    let posting = bench.endless(&queue, 8);
    let sent = push.abort();
    assert_eq!(quarantined(&sent), Cause::Cancelled);
    stopped_in_the_middle(&posting);
    assert_eq!(bench.told_of("r"), 0, "before anybody has said it");
    assert!(!sent.is_released());
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    assert!(sent.wait_released(LONG));
    assert_eq!(
        bench.hears("r"),
        (Cause::Aborted, MemoryState::Released),
        "nothing writes any more"
    );
    bench.over();
}

#[test]
fn a_deadline_in_the_middle_ends_the_push_in_time() {
    let mut bench = bench(|_| {});
    bench.expect("r", 0..8);
    let push = bench.push("r", Duration::from_millis(400));
    let queue = bench.links(&push);
    let moves: Vec<Move> = big(8).into_iter().cycle().take(1_000).collect();
    let stopped = (Status::Stopped, Status::Stopped);
    // One kernel behind the other, until the word stops them.
    until("they are stopped", || {
        let posting = bench.post(&queue, &moves, PUT, ALL);
        ends(&posting).last() == Some(&stopped)
    });
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    let sent = push.commit().expect("told");
    assert_eq!(cause(&sent), Cause::DeadlinePassed);
    assert!(sent.wait_released(LONG));
    let (first, _) = bench.hears("r");
    assert_eq!(first, Cause::Aborted);
    bench.over();
}

/// A consumer that gives up does not cut the producer off, however long that takes to say that its kernels have ended:
/// nothing would be won by it.
#[test]
fn a_consumer_that_gives_up_waits_for_the_kernels_and_keeps_the_session() {
    let mut bench = bench(|config| config.drain_grace = Duration::from_millis(20));
    bench.expect("r", 0..8);
    let push = bench.push("r", LONG);
    let queue = bench.links(&push);
    let posting = bench.endless(&queue, 8);
    assert!(bench.consumer.engine.cancel_expect(&RequestId::from("r")));
    assert_eq!(
        bench.hears("r"),
        (Cause::Cancelled, MemoryState::Quarantined)
    );
    stopped_in_the_middle(&posting);
    let sent = push.commit().expect_err("the queue is not finished");
    assert!(matches!(sent, Error::QueueUnfinished { .. }), "{sent}");
    // Many times what a peer has that does not answer.
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(bench.told_of("r"), 1, "released while nobody has said so");
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    bench.released("r");
    let down = |e: &Event| matches!(e, Event::PeerDown { .. });
    assert_eq!(bench.log.count(down), 0, "the session is gone");
    bench.over();
}

/// A block that was put in part is not taken for sent, though it was put whole before.
#[test]
fn a_put_that_was_stopped_in_the_middle_is_no_put() {
    let mut bench = bench(|_| {});
    bench.expect("r", 0..8);
    let push = bench.push("r", LONG);
    let queue = bench.links(&push);
    let posting = bench.endless(&queue, 8);
    if gpu().runtime() == RuntimeKind::Host {
        let soon = Duration::from_millis(100);
        let late = queue.finish(Kernels::Behind(posting.event()), soon);
        assert!(matches!(late, Err(Error::KernelsLate { .. })), "{late:?}");
    } else {
        // A GPU goes through what is left of so many moves for longer than for such a moment.
        queue.device().stop().expect("told");
        ends(&posting);
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
    }
    stopped_in_the_middle(&posting);
    let sent = push.commit().expect("it is known what was put");
    let fault = PostFault::Unwritten;
    match cause(&sent) {
        Cause::KernelPost { fault: found, .. } => assert_eq!(found, fault),
        other => panic!("{other:?}"),
    }
    bench.failed("r");
    bench.over();
}

/// Against their owner's word: one runs on after `finish`, and another one is launched.
#[test]
fn kernels_that_run_on_after_finish_are_stopped() {
    let bench = bench(|_| {});
    bench.expect("r", 0..8);
    let push = bench.push("r", LONG);
    let queue = bench.links(&push);
    let device = Arc::clone(queue.device());
    let posting = bench.endless(&queue, 8);
    queue.finish(Kernels::Ended, LONG).expect("nobody looks");
    stopped_in_the_middle(&posting);
    bench.consumer.side.poison().expect("poisoned");
    let posts = Posts {
        moves: &big(8),
        posters: 1,
        by: PostBy::Blocks,
        op: PUT,
        until: ALL,
    };
    let posting = bench.kernels.post(&bench.stream, &device, &posts);
    let stopped = (Status::Stopped, Status::Stopped);
    let told = ends(&posting.expect("launched"));
    assert!(told.iter().all(|end| *end == stopped), "{told:?}");
    bench.consumer.assert_untouched_but([]);
    let sent = push.commit().expect("told");
    assert!(sent.wait(LONG).is_some());
    assert!(sent.wait_released(LONG));
}

#[test]
fn a_queue_that_is_dropped_keeps_what_its_kernels_may_write() {
    let mut bench = bench(|config| config.drain_grace = Duration::from_millis(20));
    bench.expect("r", 0..8);
    let push = bench.push("r", LONG);
    let queue = bench.links(&push);
    let device = Arc::downgrade(queue.device());
    let posting = bench.endless(&queue, 8);
    drop(queue);
    stopped_in_the_middle(&posting);
    drop(posting);
    let sent = push.abort();
    assert_eq!(quarantined(&sent), Cause::Cancelled);
    assert!(bench.consumer.engine.cancel_expect(&RequestId::from("r")));
    let (_, memory) = bench.hears("r");
    assert_eq!(memory, MemoryState::Quarantined);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(bench.told_of("r"), 1, "released, and nobody has said so");
    assert!(!sent.is_released());
    assert!(device.upgrade().is_some(), "its memory is given back");
    // One whose handle nobody has had keeps nothing.
    bench.expect("s", 9..12);
    let push = bench.push("s", LONG);
    drop(bench.links(&push));
    let sent = push.commit().expect("nothing was posted");
    assert_eq!(sent.wait(LONG), Some(Outcome::Done));
    bench.received("s");
}

/// The consumer's death ends the push in time and stops its kernels; what they read is kept until they have ended.
#[test]
fn the_death_of_the_consumer_stops_the_kernels() {
    let mut peer = Child::start(&Spec {
        role: KvRole::Consumer,
        path: PathKind::Ipc,
        block_bytes: BLOCK,
        blocks: BLOCKS,
        listen: "127.0.0.1:0".to_owned(),
        engine_id: None,
        seed: SEED,
        namespace: None,
    });
    let producer = recipe(KvRole::Producer, PathKind::Ipc, BLOCK, BLOCKS).node();
    let mut log = Log::new(&producer.engine);
    let instance = producer.engine.connect(&peer.address, LONG).expect("up");
    peer.expect("r", 8, LONG);
    let push = instance.begin_push(&RequestId::from("r")).expect("a push");
    let mut config = GpuQueueConfig::new(&gpu());
    config.kind = QueueKind::Links;
    let queue = push.gpu_queue(&config).expect("a queue");
    let kernels = PostKernels::load(&gpu()).expect("kernels");
    let stream = Stream::new(&gpu()).expect("a stream");
    let first = post(&kernels, &stream, &queue, &puts(8), (PUT, ALL));
    assert!(ends(&first).iter().all(|end| *end == WELL));
    peer.die();
    let moves: Vec<Move> = puts(8).into_iter().cycle().take(10_000).collect();
    let stopped = (Status::Stopped, Status::Stopped);
    until("they are stopped", || {
        let posting = post(&kernels, &stream, &queue, &moves, (PUT, ALL));
        ends(&posting).last() == Some(&stopped)
    });
    let sent = push.abort();
    assert_eq!(quarantined(&sent), Cause::PeerDead);
    log.wait("the peer's end", |e| matches!(e, Event::PeerDown { .. }));
    assert!(!sent.is_released());
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    assert!(sent.wait_released(LONG));
    log.assert_told_once();
}

/// What a kernel has read is looked at when it is known.
#[test]
fn a_kernel_may_not_have_sent_what_is_being_written() {
    let node = |role| {
        let recipe = recipe(role, PathKind::Ipc, BLOCK, BLOCKS).with(let_in);
        recipe.node()
    };
    let (a, b) = (node(KvRole::Both), node(KvRole::Both));
    let address = a.engine.listen("127.0.0.1:0").expect("a free port");
    let _session = b.engine.connect(&address.to_string(), LONG).expect("up");
    let way = way(&a, &b.name());
    let expect = |node: &Node, request: &str, blocks: &[u32]| {
        let request = RequestId::from(request);
        let blocks = groups(blocks.iter().copied());
        node.engine
            .expect(&request, &blocks, 1, LONG)
            .expect("room");
    };
    // Somebody may write into block 5 of this rank.
    expect(&a, "mine", &[5]);
    expect(&b, "r", &[0, 1, 2, 3]);
    let push = begin(&way, "r", LONG);
    let mut config = GpuQueueConfig::new(&gpu());
    config.kind = QueueKind::Links;
    let queue = push.gpu_queue(&config).expect("a queue");
    let kernels = PostKernels::load(&gpu()).expect("kernels");
    let stream = Stream::new(&gpu()).expect("a stream");
    let moves = [put(0, 4, 1, BLOCK), put(0, 5, 2, BLOCK)];
    let told = ends(&post(&kernels, &stream, &queue, &moves, (PUT, EACH)));
    assert_eq!(told, [WELL, WELL]);
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    let sent = push.commit().expect("told");
    match cause(&sent) {
        Cause::KernelPost { fault, .. } => {
            assert_eq!(fault, PostFault::InUse { group: 0, block: 5 });
        }
        other => panic!("{other:?}"),
    }
}
