//! Pulls whose blocks kernels ask for.

use kvxfer::engine::{Pull, PullOptions};
use kvxfer::event::{MemoryState, ReleaseReason};
use kvxfer::gpu_queue::{Hca, QueueKind};
use kvxfer::layout::{DType, models};
use kvxfer::mem::kernels::queue::POSTED;
use kvxfer::ticket::Ticket;
use support::RECYCLED;

use super::*;

impl Bench {
    fn offer(&self, request: &str, blocks: impl IntoIterator<Item = u32>) -> Ticket {
        let request = RequestId::from(request);
        let engine = &self.producer.engine;
        let offered = engine.offer(&request, &groups(blocks), 1, LONG);
        offered.expect("room")
    }

    fn pull(&self, ticket: &Ticket, into: impl IntoIterator<Item = u32>) -> Pull {
        self.pull_with(ticket, into, PullOptions::default())
    }

    fn pull_with(
        &self,
        ticket: &Ticket,
        into: impl IntoIterator<Item = u32>,
        options: PullOptions,
    ) -> Pull {
        let pull = self.session.begin_pull(ticket, &groups(into), options);
        pull.expect("a pull")
    }

    fn queue_of(&self, pull: &Pull, depth: u32) -> GpuQueue {
        pull.gpu_queue(&self.config(depth)).expect("a queue")
    }

    /// The offer's memory is the producer's again.
    fn offer_ended(&mut self, request: &str, why: ReleaseReason) {
        let wanted = RequestId::from(request);
        let of = |e: &Event| matches!(e, Event::Released { request, reason, .. } if *request == wanted && *reason == why);
        self.sent.wait("the offer's end", of);
    }

    #[track_caller]
    fn holds(&self, table: impl IntoIterator<Item = (u32, u32)>) {
        let table = pairs(table);
        self.consumer.side.verify(SEED, &table).expect("every byte");
    }
}

/// The producer's block `src` into this rank's `dst`.
fn get(layer: u16, src: u32, dst: u32, len: u64) -> Move {
    put(layer, dst, src, len)
}

/// Both layers of the first `n` blocks, from the last ones.
fn gets(n: u32) -> Vec<Move> {
    let blocks = (0..n).flat_map(|b| [(0, b), (1, b)]);
    blocks
        .map(|(l, b)| get(l, BLOCKS - 1 - b, b, BLOCK))
        .collect()
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

/// Twenty thousand gets of four threads, each block of each layer once, through 64 slots.
fn many(path: PathKind, kind: QueueKind) {
    const LAYERS: u16 = 16;
    const MANY: u32 = 1250;
    const SMALL: u64 = 64;
    let mut bench = Bench::new(path, (SMALL, LAYERS.into()), MANY, |_| {});
    let ticket = bench.offer("r", 0..MANY);
    let pull = bench.pull(&ticket, 0..MANY);
    let mut config = bench.config(64);
    config.kind = kind;
    let queue = pull.gpu_queue(&config).expect("a queue");
    assert_eq!(queue.block_bytes(0, 15), Some(SMALL));
    let streams: Vec<Stream> = (0..4)
        .map(|_| Stream::new(bench.stream.gpu()).expect("a stream"))
        .collect();
    let postings: Vec<Posting> = (0..)
        .zip(&streams)
        .map(|(t, stream): (u16, _)| {
            let layers = 4 * t..4 * t + 4;
            let moves: Vec<Move> = layers
                .flat_map(|layer| (0..MANY).map(move |b| get(layer, b, MANY - 1 - b, SMALL)))
                .collect();
            post(&bench.kernels, stream, &queue, &moves, (GET, ALL))
        })
        .collect();
    for posting in &postings {
        let ends = ends(posting);
        assert!(ends.iter().all(|end| *end == WELL), "{:?}", ends.last());
    }
    // Before anything else is known of the pull.
    bench.holds((0..MANY).map(|b| (b, MANY - 1 - b)));
    let report = queue.report();
    assert_eq!(
        (report.taken, report.done, report.failed),
        (20_000, 20_000, 0)
    );
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    let got = pull.commit().expect("committed");
    assert_eq!(got.wait(LONG), Some(Outcome::Done));
    assert_eq!(got.report().bytes, 20_000 * SMALL);
    bench.received("r");
    bench.offer_ended("r", ReleaseReason::AllRead);
    bench.over();
}

#[test]
fn twenty_thousand_gets_over_each_way() {
    for path in [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp] {
        many(path, QueueKind::Proxy);
    }
}

#[test]
fn twenty_thousand_gets_by_work_requests() {
    many(PathKind::Arena, QueueKind::GpuWqe(Hca::Model));
    many(PathKind::Tcp, QueueKind::Direct(Hca::Model));
}

/// Blocks of a model, each in several stretches, some that follow each other, in and out of GPUs.
#[test]
fn kernels_fetch_a_models_blocks() {
    let kinds = [QueueKind::Proxy, QueueKind::Direct(Hca::Model)];
    for (path, verify) in [
        (PathKind::Arena, true),
        (PathKind::Tcp, false),
        (PathKind::Ipc, true),
        (PathKind::Staged, false),
    ] {
        for kind in kinds {
            let format = models::builtin("llama-3.1-8b", 1, DType::Bf16).expect("built in");
            let mut bench = Bench::of(path, format, 24, |config| {
                config.verify = verify;
                if path == PathKind::Staged {
                    let beneath = [PathKind::Staged, PathKind::Arena];
                    config.path = kvxfer::config::PathSet::some(beneath);
                }
            });
            let ticket = bench.offer("r", 0..24);
            let pull = bench.pull(&ticket, 2..22);
            let mut config = bench.config(256);
            config.kind = kind;
            let queue = pull.gpu_queue(&config).expect("a queue");
            let bytes = queue.block_bytes(0, 0).expect("a layer");
            // Half of them in a row.
            let source = |b: u32| if b < 12 { b + 2 } else { 35 - b };
            let moves: Vec<Move> = (0..32)
                .flat_map(|layer| (2..22).map(move |b| get(layer, source(b), b, bytes)))
                .collect();
            let posting = bench.post(&queue, &moves, GET, ALL);
            let behind = Kernels::Behind(posting.event());
            queue.finish(behind, LONG).expect("they end");
            assert!(ends(&posting).iter().all(|end| *end == WELL), "{path}");
            let got = pull.commit().expect("committed");
            assert_eq!(got.wait(LONG), Some(Outcome::Done), "{path} {kind:?}");
            bench.received("r");
            bench.holds((2..22).map(|b| (source(b), b)));
            bench.consumer.assert_untouched_but(2..22);
            bench.over();
        }
    }
}

/// Ends one pull's queue while a kernel waits for another's gets. Whether it was still waiting then.
fn a_queue_goes_beside_gets() -> bool {
    let mut bench = Bench::new(PathKind::Ipc, (BLOCK, 2), BLOCKS, |_| {});
    let (a, b) = (bench.offer("a", 0..8), bench.offer("b", 8..16));
    let (first, second) = (bench.pull(&a, 0..8), bench.pull(&b, 8..16));
    let queue = bench.queue_of(&first, 16);
    let told = ends(&bench.post(&queue, &[get(0, 1, 1, BLOCK)], GET, ALL));
    assert_eq!(told, [WELL]);

    let mut config = bench.config(16);
    config.patience = Duration::from_secs(20);
    let slow = second.gpu_queue(&config).expect("a queue");
    let moves = vec![get(0, 8, 8, BLOCK); 20_000];
    let posting = bench.post(&slow, &moves, GET, EACH);
    until("some are told", || slow.report().done > 100);
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    let got = first.commit().expect("committed");
    assert_eq!(got.wait(LONG), Some(Outcome::Done));
    let waited = slow.report().done < 15_000;
    assert!(ends(&posting).iter().all(|end| *end == WELL));
    slow.finish(Kernels::Ended, LONG).expect("they have ended");
    let got = second.commit().expect("committed");
    assert_eq!(got.wait(LONG), Some(Outcome::Done));
    bench.received("a");
    bench.received("b");
    bench.over();
    waited
}

/// Drivers let what takes memory from a GPU wait for its kernels, and launches for that: of kernels that wait for launches
/// none would end.
#[test]
fn a_queue_that_goes_holds_up_no_kernel_that_waits() {
    // On a busy machine the gets may be over first.
    assert!((0..10).any(|_| a_queue_goes_beside_gets()));
}

#[test]
fn what_a_kernel_was_told_of_is_there() {
    for path in [PathKind::Arena, PathKind::Tcp, PathKind::Ipc] {
        let bench = Bench::new(path, (BLOCK, 2), BLOCKS, take_time);
        let ticket = bench.offer("r", 0..BLOCKS);
        let pull = bench.pull(&ticket, 0..BLOCKS);
        let queue = bench.queue_of(&pull, 64);
        for block in 0..4 {
            let moves = [get(0, 9, block, BLOCK), get(1, 9, block, BLOCK)];
            assert_eq!(ends(&bench.post(&queue, &moves, GET, ALL)), [WELL, WELL]);
            bench.holds([(9, block)]);
        }
        let got = pull.abort();
        assert_eq!(cause(&got), Cause::Cancelled);
        // What a kernel has is its engine's to know; of the pull no block is known to be whole.
        let failure = got.outcome().and_then(|outcome| outcome.failure().cloned());
        let failure = failure.expect("a failure");
        assert_eq!(failure.invalid_blocks, groups(0..BLOCKS));
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
        bench.over();
    }
}

/// A producer that takes its blocks back in the middle, and uses them at once for something else: what kernels were
/// told has come is what was offered.
#[test]
fn what_comes_after_the_offer_was_taken_back_is_not_told_to_be_there() {
    for path in [PathKind::Arena, PathKind::Tcp, PathKind::Ipc] {
        for (depth, verify) in [(8, false), (64, true)] {
            let mut bench = Bench::new(path, (BLOCK, 2), BLOCKS, |config| {
                config.verify = verify;
                take_time(config);
            });
            let ticket = bench.offer("r", 0..BLOCKS);
            let pull = bench.pull(&ticket, 0..BLOCKS);
            let queue = bench.queue_of(&pull, depth);
            let moves = gets(BLOCKS);
            let sources: Vec<Vec<u64>> = moves
                .iter()
                .map(|m| words(&bench.producer, m.remote))
                .collect();
            let posting = bench.post(&queue, &moves, GET, ALL);
            until("some have come", || queue.report().done > 8);
            assert!(bench.producer.engine.retract(&RequestId::from("r")));
            bench.offer_ended("r", ReleaseReason::Retracted);
            bench.producer.fill_blocks(0..BLOCKS, RECYCLED);
            let ends = ends(&posting);
            for ((of, source), end) in moves.iter().zip(&sources).zip(&ends) {
                if *end == WELL {
                    assert_eq!(words(&bench.consumer, of.local), *source, "{path} {of:?}");
                }
            }
            ended_by(&ends, Status::BadRights);
            queue.finish(Kernels::Ended, LONG).expect("they have ended");
            let got = pull.commit().expect("told");
            assert_eq!(cause(&got), Cause::LeaseExpired);
            assert!(got.wait_released(LONG));
            bench.failed("r");
            bench.over();
        }
    }
}

/// What a post says that cannot be done, what the kernel is told and the host.
#[test]
fn lies_of_a_kernel_fail_the_pull_and_write_nothing() {
    let good = get(1, 3, 2, BLOCK);
    let layer = 7;
    let not_offered = |block| PostFault::NotOffered { group: 0, block };
    let elsewhere = |block| PostFault::Destination { group: 0, block };
    let cases: Vec<(Move, u32, Status, PostFault)> = vec![
        (good, PUT, Status::BadOp, PostFault::Operation),
        (good, PUT_IMM, Status::BadOp, PostFault::Operation),
        (
            Move { flags: 0, ..good },
            GET,
            Status::BadKey,
            PostFault::Address,
        ),
        (
            Move {
                remote: place(0, 2),
                ..good
            },
            GET,
            Status::BadRange,
            PostFault::Places,
        ),
        (
            get(layer, 3, 2, BLOCK),
            GET,
            Status::BadKey,
            PostFault::Layer { group: 0, layer },
        ),
        (
            get(1, 3, 2, 2 * BLOCK),
            GET,
            Status::BadLength,
            PostFault::Length {
                group: 0,
                layer: 1,
                len: 2 * BLOCK,
                wanted: BLOCK,
            },
        ),
        (get(1, 8, 2, BLOCK), GET, Status::BadRights, not_offered(8)),
        (
            get(1, u32::MAX, 2, BLOCK),
            GET,
            Status::BadRights,
            not_offered(u32::MAX),
        ),
        (get(1, 3, 4, BLOCK), GET, Status::BadRights, elsewhere(4)),
        (
            get(1, 3, BLOCKS, BLOCK),
            GET,
            Status::BadRights,
            elsewhere(BLOCKS),
        ),
    ];
    let mut bench = Bench::small(|_| {});
    for (i, (lie, op, status, fault)) in cases.into_iter().enumerate() {
        let request = format!("r{i}");
        let ticket = bench.offer(&request, 0..8);
        let pull = bench.pull(&ticket, 0..4);
        let queue = bench.queue_of(&pull, 8);
        let well = bench.post(&queue, &[get(0, 1, 1, BLOCK)], GET, EACH);
        assert_eq!(ends(&well), [WELL]);
        let told = ends(&bench.post(&queue, &[lie], op, EACH));
        assert_eq!(told, [(Status::Ok, status)], "{lie:?}");
        let later = ends(&bench.post(&queue, &[good, good], GET, EACH));
        let refused = |(posted, ended): &(Status, Status)| {
            *posted == Status::Broken || *ended == Status::Flushed
        };
        assert!(later.iter().all(refused), "{later:?}");
        assert_eq!(queue.report().done, 1);
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
        let got = pull.commit().expect("told");
        assert_eq!(cause(&got), Cause::KernelPost { post: 1, fault });
        assert!(got.wait_released(LONG));
        bench.failed(&request);
        bench.consumer.assert_untouched_but([1]);
        assert!(bench.producer.engine.retract(&RequestId::from(&*request)));
    }
    bench.over();
}

#[test]
fn a_work_request_may_not_name_what_the_pull_has_not() {
    for kind in [QueueKind::GpuWqe(Hca::Model), QueueKind::Direct(Hca::Model)] {
        for (lie, fault) in [
            (
                get(1, 8, 2, BLOCK),
                PostFault::NotOffered { group: 0, block: 8 },
            ),
            (
                get(1, 3, 4, BLOCK),
                PostFault::Destination { group: 0, block: 4 },
            ),
        ] {
            let mut bench = Bench::small(|_| {});
            let ticket = bench.offer("r", 0..8);
            let pull = bench.pull(&ticket, 0..4);
            let mut config = bench.config(8);
            config.kind = kind;
            let queue = pull.gpu_queue(&config).expect("a queue");
            let well = bench.post(&queue, &[get(0, 1, 1, BLOCK)], GET, EACH);
            assert_eq!(ends(&well), [WELL]);
            let told = ends(&bench.post(&queue, &[lie], GET, EACH));
            assert_eq!(told, [(Status::Ok, Status::BadRange)], "{kind:?}");
            queue.finish(Kernels::Ended, LONG).expect("they have ended");
            let got = pull.commit().expect("told");
            assert_eq!(cause(&got), Cause::KernelPost { post: 1, fault });
            bench.failed("r");
            bench.consumer.assert_untouched_but([1]);
            bench.over();
        }
    }
}

#[test]
fn an_abort_reaches_those_who_wait_for_gets() {
    let mut bench = Bench::small(take_time);
    let ticket = bench.offer("r", 0..BLOCKS);
    let pull = bench.pull(&ticket, 0..BLOCKS);
    let queue = bench.queue_of(&pull, 8);
    let posting = bench.post(&queue, &gets(BLOCKS), GET, ALL);
    until("some are under way", || queue.report().taken > 8);
    let got = pull.abort();
    assert_eq!(cause(&got), Cause::Cancelled);
    ended_by(&ends(&posting), Status::Closed);
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    assert!(got.wait_released(LONG));
    bench.failed("r");
    // The offer is as it was, and so are the blocks.
    let table = pairs((0..BLOCKS).map(|b| (b, b)));
    let again = bench.session.pull(&ticket, &table, PullOptions::default());
    assert_eq!(again.expect("free").wait(LONG), Some(Outcome::Done));
    bench.holds((0..BLOCKS).map(|b| (b, b)));
}

#[test]
fn a_deadline_reaches_those_who_wait_for_gets() {
    let mut bench = Bench::small(take_time);
    let ticket = bench.offer("r", 0..BLOCKS);
    let options = PullOptions {
        deadline: Some(Duration::from_millis(120)),
        ..PullOptions::default()
    };
    let pull = bench.pull_with(&ticket, 0..BLOCKS, options);
    let queue = bench.queue_of(&pull, 2);
    let posting = bench.post(&queue, &gets(BLOCKS), GET, ALL);
    ended_by(&ends(&posting), Status::Late);
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    let got = pull.commit().expect("told");
    assert_eq!(cause(&got), Cause::DeadlinePassed);
    assert!(got.wait_released(LONG));
    bench.failed("r");
    bench.over();
}

#[test]
fn the_death_of_the_producer_reaches_those_who_wait_for_gets() {
    for path in [PathKind::Arena, PathKind::Tcp, PathKind::Ipc] {
        let mut peer = Child::start(&Spec {
            role: KvRole::Producer,
            path,
            block_bytes: BLOCK,
            blocks: BLOCKS,
            listen: "127.0.0.1:0".to_owned(),
            engine_id: None,
            seed: SEED,
            namespace: None,
        });
        let consumer = recipe(KvRole::Consumer, path, BLOCK, BLOCKS).node();
        let mut log = Log::new(&consumer.engine);
        let instance = consumer.engine.connect(&peer.address, LONG).expect("up");
        let ticket = peer.offer("r", BLOCKS, LONG);
        let pull = instance.begin_pull(&ticket, &groups(0..BLOCKS), PullOptions::default());
        let pull = pull.expect("a pull");
        let queue = pull.gpu_queue(&GpuQueueConfig::new(&gpu()));
        let queue = queue.expect("a queue");
        let kernels = PostKernels::load(&gpu()).expect("kernels");
        let stream = Stream::new(&gpu()).expect("a stream");
        // More than can be over before the peer is dead.
        let moves: Vec<Move> = gets(BLOCKS).into_iter().cycle().take(200_000).collect();
        let posting = post(&kernels, &stream, &queue, &moves, (GET, ALL));
        until("some are told", || queue.report().done > 1024);
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
        let got = pull.commit().expect("told");
        assert_eq!(cause(&got), Cause::PeerDead, "{path}");
        assert!(got.wait_released(LONG), "{path}");
        log.assert_told_once();
    }
}

#[test]
fn a_commit_before_the_queue_is_finished_gives_the_pull_up() {
    let mut bench = Bench::small(|_| {});
    let ticket = bench.offer("r", 0..8);
    let pull = bench.pull(&ticket, 0..8);
    let queue = bench.queue_of(&pull, 16);
    let refused = pull.commit().expect_err("it is not finished");
    assert!(
        matches!(&refused, kvxfer::Error::QueueUnfinished { queues: 1, .. }),
        "{refused}"
    );
    bench.failed("r");
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    bench.over();
}

#[test]
fn a_committed_pull_has_what_was_asked_for_before_and_may_keep_the_offer() {
    let mut bench = Bench::small(take_time);
    let ticket = bench.offer("r", 0..BLOCKS);
    let options = PullOptions {
        hold: true,
        ..PullOptions::default()
    };
    let pull = bench.pull_with(&ticket, 0..8, options);
    // Nobody else may have its blocks.
    let table = pairs([(3, 7)]);
    let other = bench.session.pull(&ticket, &table, PullOptions::default());
    assert!(matches!(other, Err(kvxfer::Error::InUse(_))), "{other:?}");
    let again = bench
        .session
        .begin_pull(&ticket, &groups([7, 9]), PullOptions::default());
    assert!(matches!(again, Err(kvxfer::Error::InUse(_))), "{again:?}");
    let queue = bench.queue_of(&pull, 32);
    let posting = bench.post(&queue, &gets(8), GET, POSTED);
    queue
        .finish(Kernels::Behind(posting.event()), LONG)
        .expect("they end");
    let got = pull.commit().expect("finished");
    assert_eq!(got.wait(LONG), Some(Outcome::Done));
    bench.received("r");
    bench.holds((0..8).map(|b| (BLOCKS - 1 - b, b)));
    bench.consumer.assert_untouched_but(0..8);
    // The blocks are free, and the offer stands; a pull without any block ends it.
    let none = bench.pull(&ticket, []);
    assert_eq!(
        none.commit().expect("no queue").wait(LONG),
        Some(Outcome::Done)
    );
    bench.offer_ended("r", ReleaseReason::AllRead);
}

#[test]
fn checksums_of_what_kernels_got_are_compared() {
    let mut bench = Bench::small(|config| config.verify = true);
    let ticket = bench.offer("r", 0..8);
    let pull = bench.pull(&ticket, 0..8);
    let queue = bench.queue_of(&pull, 32);
    let moves: Vec<Move> = (0..8).map(|b| get(1, b, b, BLOCK)).collect();
    let told = ends(&bench.post(&queue, &moves, GET, ALL));
    assert!(told.iter().all(|end| *end == WELL));
    // Somebody writes where he should not.
    bench.consumer.fill_blocks([5].into_iter(), RECYCLED);
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    let got = pull.commit().expect("finished");
    let Some(Outcome::Failed(failure)) = got.wait(LONG) else {
        panic!("it is not found");
    };
    assert!(
        matches!(failure.first_cause, Cause::Corrupt { .. }),
        "{failure:?}"
    );
    assert_eq!(failure.invalid_blocks, groups([5]));
    assert_eq!(failure.memory, MemoryState::Released);
    bench.failed("r");
    bench.over();
}

/// More jobs than a question for checksums has lists.
#[test]
fn checksums_of_gets_that_were_each_waited_for_are_compared() {
    const MANY: u32 = 520;
    for path in [PathKind::Arena, PathKind::Ipc] {
        let mut bench = Bench::new(path, (64, 2), MANY, |config| config.verify = true);
        let ticket = bench.offer("r", 0..MANY);
        let pull = bench.pull(&ticket, 0..MANY);
        let queue = bench.queue_of(&pull, 8);
        queue.set_pace(Pace::Armed);
        let blocks = (0..MANY).flat_map(|b| [(0, b), (1, b)]);
        let moves: Vec<Move> = blocks.map(|(l, b)| get(l, b, MANY - 1 - b, 64)).collect();
        let told = ends(&bench.post(&queue, &moves, GET, EACH));
        assert!(told.iter().all(|end| *end == WELL), "{path}");
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
        let got = pull.commit().expect("finished");
        assert_eq!(got.wait(LONG), Some(Outcome::Done), "{path}");
        bench.received("r");
        bench.holds((0..MANY).map(|b| (b, MANY - 1 - b)));
        bench.over();
    }
}

#[test]
fn gets_wait_for_the_work_that_comes_first() {
    let mut bench = Bench::small(take_time);
    let ticket = bench.offer("r", 0..BLOCKS);
    let options = |after| PullOptions {
        hold: true,
        after,
        ..PullOptions::default()
    };
    // A kernel that takes a while.
    let first = bench.pull_with(&ticket, 0..8, options(None));
    let slow = bench.queue_of(&first, 2);
    let before = bench.post(&slow, &gets(8), GET, EACH);
    let event = before.event().clone();
    let second = bench.pull_with(&ticket, 8..16, options(Some(event)));
    let queue = bench.queue_of(&second, 8);
    let other = Stream::new(bench.stream.gpu()).expect("a stream");
    let moves = [get(0, 9, 8, BLOCK), get(1, 9, 8, BLOCK)];
    let behind = post(&bench.kernels, &other, &queue, &moves, (GET, ALL));
    assert_eq!(ends(&behind), [WELL, WELL]);
    assert!(before.is_done().expect("no fault"), "it came first");
    bench.holds([(9, 8)]);
    for (queue, pull) in [(slow, first), (queue, second)] {
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
        let got = pull.commit().expect("finished");
        assert_eq!(got.wait(LONG), Some(Outcome::Done));
    }
    bench.received("r");
}
