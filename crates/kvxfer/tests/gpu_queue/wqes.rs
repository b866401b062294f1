//! Queues of WQEs, which a model of an mlx5 device reads: kernels write what a NIC would be given.

use kvxfer::Error;
use kvxfer::gpu_queue::{Hca, QueueKind, QueueRule};
use kvxfer::layout::{DType, models};
use kvxfer::mem::post::Consumer;
use kvxfer::mem::post::device::{DeviceQueue, PostFailed};

use super::*;

const KINDS: [QueueKind; 2] = [QueueKind::GpuWqe(Hca::Model), QueueKind::Direct(Hca::Model)];
/// The first key of a queue's table, and where the model has the peer's first memory.
const KEY: u32 = 0x100;
const THERE: u64 = 1 << 48;

impl Bench {
    fn wqes(&self, push: &Push, depth: u32, kind: QueueKind) -> GpuQueue {
        self.wqes_in(push, depth, (kind, WqeSlots::Pinned))
            .expect("a queue")
    }

    /// A queue whose posts wait for some milliseconds.
    fn impatient(&self, push: &Push, depth: u32, kind: QueueKind) -> GpuQueue {
        let mut config = self.config(depth);
        config.kind = kind;
        config.patience = Duration::from_millis(40);
        push.gpu_queue(&config).expect("a queue")
    }

    fn wqes_in(
        &self,
        push: &Push,
        depth: u32,
        (kind, slots): (QueueKind, WqeSlots),
    ) -> Result<GpuQueue, Error> {
        let mut config = self.config(depth);
        config.kind = kind;
        config.slots = slots;
        push.gpu_queue(&config)
    }
}

#[test]
fn a_hundred_thousand_puts_for_a_worker_at_the_doorbell() {
    pushes::many_of(PathKind::Arena, KINDS[0]);
}

#[test]
fn a_hundred_thousand_puts_by_kernels_alone() {
    pushes::many_of(PathKind::Tcp, KINDS[1]);
}

/// A producer of a model's blocks, each of them several stretches of memory.
#[test]
fn a_producer_kernel_writes_a_wqe_for_each_stretch() {
    let (pinned, own) = (WqeSlots::Pinned, WqeSlots::Gpu);
    for (path, kind, slots) in [
        (PathKind::Arena, KINDS[0], pinned),
        (PathKind::ProcessVm, KINDS[1], pinned),
        (PathKind::Ipc, KINDS[0], pinned),
        (PathKind::Ipc, KINDS[1], pinned),
        (PathKind::Arena, KINDS[0], own),
        (PathKind::Ipc, KINDS[1], own),
    ] {
        let format = models::builtin("llama-3.1-8b", 1, DType::Bf16).expect("built in");
        let mut bench = Bench::of(path, format, 24, |config| config.verify = true);
        bench.producer.side.poison().expect("poisoned");
        bench.expect("r", 0..20);
        let push = bench.push("r", LONG);
        let queue = bench.wqes_in(&push, 16, (kind, slots)).expect("a queue");
        let in_own = queue.device().wqe().and_then(|queue| queue.slots());
        assert_eq!(in_own.is_some(), slots == WqeSlots::Gpu);
        let reached = bench
            .producer
            .side
            .reach(bench.stream.gpu())
            .expect("pinned");
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
        queue
            .finish(Kernels::Behind(posting.event()), LONG)
            .expect("they end");
        let sent = push.commit().expect("committed");
        assert_eq!(
            sent.wait(LONG),
            Some(Outcome::Done),
            "{path} {kind:?} {slots:?}"
        );
        assert!(ends(&posting).iter().all(|end| *end == WELL));
        bench.received("r");
        let table = pairs((0..20).map(|b| (b + 4, 19 - b)));
        bench
            .consumer
            .side
            .verify(SEED, &table)
            .expect("every byte");
        bench.consumer.assert_untouched_but(0..20);
        bench.over();
    }
}

/// A block's stretches are one post, for which the queue has to have room.
#[test]
fn a_queue_that_holds_no_block_is_refused_when_it_is_made() {
    let format = models::builtin("llama-3.1-8b", 1, DType::Bf16).expect("built in");
    let mut bench = Bench::of(PathKind::Arena, format, 24, |_| {});
    bench.expect("r", 0..4);
    let push = bench.push("r", LONG);
    for kind in KINDS {
        let of = (kind, WqeSlots::Pinned);
        let refused = bench.wqes_in(&push, 1, of).expect_err("a block is more");
        let Error::QueueDepth {
            depth: 1,
            stretches,
        } = refused
        else {
            panic!("{refused}");
        };
        assert!(stretches > 1);
        let enough = bench.wqes_in(&push, stretches.next_power_of_two(), of);
        drop(enough.expect("it holds one"));
    }
    drop(push.abort());
    bench.failed("r");
    bench.over();
}

/// What a WQE says that cannot be done, what the kernel is told and the host.
#[test]
fn lies_in_wqes_fail_the_push_and_write_nothing() {
    let mut bench = Bench::small(|_| {});
    let here = bench.producer.side.memory()[0]
        .host()
        .expect("an arena")
        .addr();
    let raw = |src: u64, dst: u64, len: u64| Move {
        local: here + src * BLOCK,
        remote: THERE + dst * BLOCK,
        len,
        lkey: KEY,
        rkey: KEY,
        ..Move::default()
    };
    let good = raw(3, 2, BLOCK);
    let not_expected = PostFault::NotExpected { group: 0, block: 4 };
    let cases: Vec<(Move, u32, Status, PostFault)> = vec![
        (good, GET, Status::BadKey, PostFault::Key),
        (good, PUT_IMM, Status::Malformed, PostFault::Operation),
        (
            Move { lkey: 7, ..good },
            PUT,
            Status::BadKey,
            PostFault::Key,
        ),
        (
            Move { rkey: 7, ..good },
            PUT,
            Status::BadRange,
            PostFault::Key,
        ),
        (
            raw(3, u64::from(BLOCKS), BLOCK),
            PUT,
            Status::BadRange,
            PostFault::Key,
        ),
        (
            raw(u64::from(BLOCKS), 3, BLOCK),
            PUT,
            Status::BadKey,
            PostFault::Key,
        ),
        (
            raw(3, 2, BLOCK / 2),
            PUT,
            Status::BadRange,
            PostFault::Stretch,
        ),
        (
            Move {
                remote: good.remote + 8,
                ..good
            },
            PUT,
            Status::BadRange,
            PostFault::Stretch,
        ),
        // A NIC would write it: it knows of keys alone.
        (raw(3, 4, BLOCK), PUT, Status::BadRange, not_expected),
    ];
    for (i, (lie, op, status, fault)) in cases.into_iter().enumerate() {
        let request = format!("r{i}");
        bench.expect(&request, 0..4);
        let push = bench.push(&request, LONG);
        let queue = bench.wqes(&push, 8, KINDS[i % 2]);
        // By its place, and by what the table says of it.
        let well = [put(0, 1, 1, BLOCK), raw(1, 0, BLOCK)];
        assert_eq!(ends(&bench.post(&queue, &well, PUT, EACH)), [WELL, WELL]);
        let told = ends(&bench.post(&queue, &[lie], op, EACH));
        assert_eq!(told, [(Status::Ok, status)], "{lie:?}");
        let later = ends(&bench.post(&queue, &[good, good], PUT, EACH));
        let refused = |(posted, ended): &(Status, Status)| {
            *posted == Status::Broken || *ended == Status::Flushed
        };
        assert!(later.iter().all(refused), "{later:?}");
        assert_eq!(queue.report().done, 2);
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
        let sent = push.commit().expect("told");
        assert_eq!(cause(&sent), Cause::KernelPost { post: 2, fault });
        assert!(sent.wait_released(LONG));
        bench.failed(&request);
        bench.consumer.assert_untouched_but([0, 1]);
    }
    bench.over();
}

/// What the table does not know is refused by the kernel's own look, and nothing is posted.
#[test]
fn places_that_there_are_not_are_not_posted() {
    for kind in KINDS {
        let mut bench = Bench::small(|_| {});
        bench.expect("r", 0..4);
        let push = bench.push("r", LONG);
        let queue = bench.wqes(&push, 8, kind);
        let moves = [
            put(7, 3, 2, BLOCK),
            put(1, BLOCKS, 2, BLOCK),
            put(1, 3, 2, BLOCK + 8),
            put(1, 3, 2, BLOCK),
        ];
        let posted: Vec<Status> = ends(&bench.post(&queue, &moves, PUT, EACH))
            .into_iter()
            .map(|(posted, _)| posted)
            .collect();
        let refused = [Status::BadKey, Status::BadRange, Status::BadLength];
        assert_eq!(posted, [&refused[..], &[Status::Ok]].concat());
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
        let sent = push.commit().expect("told");
        assert_eq!(sent.wait(LONG), Some(Outcome::Done));
        bench.received("r");
        bench.over();
    }
}

#[track_caller]
fn ended_badly(ends: &[(Status, Status)], status: Status) {
    let known = |(posted, ended): &(Status, Status)| {
        [Status::Broken, Status::Stopped].contains(posted)
            || *posted == Status::Ok
                && [Status::Ok, status, Status::Flushed, Status::Stopped].contains(ended)
    };
    assert!(ends.iter().all(known), "{ends:?}");
    assert!(ends.iter().any(|end| *end != WELL), "all went well");
}

#[test]
fn an_abort_and_a_deadline_reach_those_who_wait_for_completions() {
    for (kind, aborts) in [(KINDS[0], true), (KINDS[1], false)] {
        let mut bench = Bench::small(take_time);
        bench.expect("r", 0..BLOCKS);
        let deadline = match aborts {
            true => LONG,
            false => Duration::from_millis(120),
        };
        let push = bench.push("r", deadline);
        let queue = bench.wqes(&push, 2, kind);
        let posting = bench.post(&queue, &puts(BLOCKS), PUT, ALL);
        until("some are under way", || queue.report().taken > 2);
        let sent = match aborts {
            true => push.abort(),
            false => {
                ended_badly(&ends(&posting), Status::Device);
                queue.finish(Kernels::Ended, LONG).expect("they have ended");
                let sent = push.commit().expect("told");
                assert_eq!(cause(&sent), Cause::DeadlinePassed);
                assert!(sent.wait_released(LONG));
                bench.failed("r");
                bench.over();
                continue;
            }
        };
        assert_eq!(cause(&sent), Cause::Cancelled);
        // A device has no word for an end that was asked for.
        ended_badly(&ends(&posting), Status::Device);
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
        assert!(sent.wait_released(LONG));
        bench.failed("r");
        bench.over();
    }
}

#[test]
fn the_death_of_the_peer_is_a_completion_in_error() {
    ends::dies(PathKind::Arena, KINDS[1]);
    ends::dies(PathKind::Ipc, KINDS[0]);
}

#[test]
fn a_wqe_that_was_begun_and_never_written_fails_the_push() {
    for kind in KINDS {
        let mut bench = Bench::small(|_| {});
        bench.expect("r", 0..4);
        let push = bench.push("r", LONG);
        let queue = bench.wqes(&push, 8, kind);
        let well = ends(&bench.post(&queue, &[put(0, 1, 1, BLOCK)], PUT, EACH));
        assert_eq!(well, [WELL]);
        queue.device().lose_a_ticket().expect("inside");
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
        let fault = PostFault::Unwritten;
        let sent = push.commit().expect("told");
        assert_eq!(cause(&sent), Cause::KernelPost { post: 1, fault });
        bench.failed("r");
        bench.consumer.assert_untouched_but([1]);
        bench.over();
    }
}

/// Who rang had found it ready, and was slow: it is there, and its kernel was told that it is not
/// (`post_host::planted` has that happen).
#[test]
fn a_post_that_was_given_up_fails_the_push_though_it_is_there() {
    let completions = PostFault::Rule {
        rule: QueueRule::Completions,
    };
    for (kind, status, fault) in [
        (KINDS[0], Status::Timeout, PostFault::GivenUp),
        (KINDS[1], Status::Stopped, PostFault::GivenUp),
        (KINDS[1], Status::Malformed, completions),
    ] {
        let mut bench = Bench::small(|_| {});
        bench.expect("r", 0..4);
        let push = bench.push("r", LONG);
        let queue = bench.wqes(&push, 8, kind);
        let well = ends(&bench.post(&queue, &puts(2), PUT, EACH));
        assert_eq!(well, [WELL; 4]);
        let failed = PostFailed { number: 2, status };
        let device = queue.device().wqe().expect("of work requests");
        device.fail_a_post(failed).expect("inside");
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
        let sent = push.commit().expect("told");
        assert_eq!(cause(&sent), Cause::KernelPost { post: 2, fault });
        assert!(sent.wait_released(LONG));
        bench.failed("r");
        bench.consumer.assert_untouched_but([0, 1]);
        bench.over();
    }
}

/// A turn that never comes: what is to blame is the post before, which was never written.
#[test]
fn a_turn_that_never_comes_is_the_fault_of_who_has_it() {
    for kind in KINDS {
        let mut bench = Bench::small(|_| {});
        bench.expect("r", 0..4);
        let push = bench.push("r", LONG);
        let queue = bench.impatient(&push, 8, kind);
        let well = ends(&bench.post(&queue, &[put(0, 1, 1, BLOCK)], PUT, EACH));
        assert_eq!(well, [WELL]);
        queue.device().lose_a_ticket().expect("inside");
        let told = ends(&bench.post(&queue, &[put(1, 1, 1, BLOCK)], PUT, EACH));
        assert_eq!(told, [(Status::Timeout, Status::Timeout)]);
        let left = queue.device().left(Instant::now() + LONG).expect("read");
        let failed = PostFailed {
            number: 2,
            status: Status::Timeout,
        };
        assert_eq!((left.posted, left.failed), (3, Some(failed)));
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
        let fault = PostFault::Unwritten;
        let sent = push.commit().expect("told");
        assert_eq!(cause(&sent), Cause::KernelPost { post: 1, fault });
        bench.failed("r");
        bench.over();
    }
}

/// A kernel that runs until it is told to stop, and the event behind it.
struct Runs {
    queue: Arc<DeviceQueue>,
    _consumer: Consumer,
    posting: Posting,
}

impl Runs {
    fn new(bench: &Bench) -> Self {
        let gpu = bench.stream.gpu();
        let long = Duration::from_secs(3600);
        let (queue, consumer) = DeviceQueue::new(gpu, 1, long).expect("a queue");
        let queue = Arc::new(queue);
        let posts = Posts {
            moves: &[Move::default()],
            posters: 1,
            by: PostBy::Blocks,
            op: PUT,
            until: ALL,
        };
        let stream = Stream::new(gpu).expect("a stream");
        let posting = bench.kernels.post(&stream, &queue, &posts);
        Self {
            queue,
            _consumer: consumer,
            posting: posting.expect("launched"),
        }
    }

    fn stop(&self) {
        self.queue.stop().expect("told");
        ends(&self.posting);
    }
}

/// A push of whose work requests the copies wait for a kernel, in an engine of one worker, and another push that does not:
/// it goes on meanwhile.
#[test]
fn work_requests_that_are_being_copied_keep_no_other_push_up() {
    let posted = kvxfer::mem::kernels::queue::POSTED;
    for (kind, until_all) in [(KINDS[0], ALL), (KINDS[1], posted)] {
        let mut bench = Bench::small(|config| config.num_worker_threads = 1);
        let runs = Runs::new(&bench);
        bench.expect("held", 0..4);
        let push = bench.push("held", LONG);
        let own = (kind, WqeSlots::Gpu);
        let queue = bench.wqes_in(&push, 8, own).expect("a queue");
        let device = Arc::clone(queue.device());
        let device = device.wqe().expect("of work requests");
        let long = Duration::from_secs(3600);
        device.hold_slots(runs.posting.event(), long).expect("held");
        let posting = bench.post(&queue, &puts(2), PUT, until_all);
        until("they are being copied", || device.is_copying());
        let commit = || {
            let told = ends(&posting);
            assert!(told.iter().all(|end| *end == WELL), "{told:?}");
            queue.finish(Kernels::Ended, LONG).expect("they have ended");
            push.commit().expect("finished")
        };
        let sent = if until_all == posted {
            // One that comes now waits for them too.
            let sent = commit();
            other_push(&mut bench);
            assert_eq!(sent.outcome(), None);
            assert!(device.is_copying(), "it is still not there");
            runs.stop();
            sent
        } else {
            other_push(&mut bench);
            assert!(device.is_copying(), "it is still not there");
            runs.stop();
            commit()
        };
        assert_eq!(sent.wait(LONG), Some(Outcome::Done), "{kind:?}");
        bench.received("held");
        let table = pairs((0..2).map(|b| (b, b)));
        let well = bench.consumer.side.verify(SEED, &table);
        well.expect("every byte");
        bench.over();
    }
}

/// Blocks that nothing else wants, by a proxy queue.
fn other_push(bench: &mut Bench) {
    bench.expect("other", 8..12);
    let push = bench.push("other", LONG);
    let queue = bench.queue(&push, 8);
    let moves: Vec<Move> = (8..12).map(|b| put(0, b, b, BLOCK)).collect();
    let stream = Stream::new(bench.stream.gpu()).expect("a stream");
    let posting = post(&bench.kernels, &stream, &queue, &moves, (PUT, EACH));
    assert!(ends(&posting).iter().all(|end| *end == WELL));
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    let sent = push.commit().expect("finished");
    assert_eq!(sent.wait(LONG), Some(Outcome::Done));
    bench.received("other");
}

/// It is given up, and whoever waits is told.
/// Its owner hears of it at once, its kernels when the copy has ended; no other push waits.
#[test]
fn an_abort_does_not_wait_for_work_requests_that_are_being_copied() {
    for kind in KINDS {
        let mut bench = Bench::small(|config| config.num_worker_threads = 1);
        let runs = Runs::new(&bench);
        bench.expect("held", 0..4);
        let push = bench.push("held", LONG);
        let queue = bench.wqes_in(&push, 8, (kind, WqeSlots::Gpu));
        let queue = queue.expect("a queue");
        let device = Arc::clone(queue.device());
        let device = device.wqe().expect("of work requests");
        let long = Duration::from_secs(3600);
        device.hold_slots(runs.posting.event(), long).expect("held");
        let posting = bench.post(&queue, &puts(2), PUT, ALL);
        until("they are being copied", || device.is_copying());
        let sent = push.abort();
        assert_eq!(cause(&sent), Cause::Cancelled);
        bench.failed("held");
        other_push(&mut bench);
        assert!(device.is_copying(), "it is still not there");
        runs.stop();
        let told = ends(&posting);
        assert!(
            told.iter().all(|(_, ended)| *ended != Status::Ok),
            "{told:?}"
        );
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
        assert!(sent.wait_released(LONG));
        bench.consumer.assert_untouched_but(8..12);
        bench.over();
    }
}

#[test]
fn a_copy_that_takes_too_long_fails_its_push_alone() {
    for kind in KINDS {
        let mut bench = Bench::small(|config| config.num_worker_threads = 1);
        let runs = Runs::new(&bench);
        bench.expect("held", 0..4);
        let push = bench.push("held", LONG);
        let own = (kind, WqeSlots::Gpu);
        let queue = bench.wqes_in(&push, 8, own).expect("a queue");
        let device = queue.device().wqe().expect("of work requests");
        let late = Duration::from_millis(20);
        device.hold_slots(runs.posting.event(), late).expect("held");
        let posting = bench.post(&queue, &puts(1), PUT, ALL);
        let told = ends(&posting);
        assert!(
            told.iter().all(|(_, ended)| *ended == Status::Stopped),
            "{told:?}"
        );
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
        let sent = push.commit().expect("told");
        let fault = PostFault::Rule {
            rule: QueueRule::Reached,
        };
        assert_eq!(cause(&sent), Cause::KernelPost { post: 0, fault });
        assert!(sent.wait_released(LONG));
        bench.failed("held");
        other_push(&mut bench);
        runs.stop();
        bench.consumer.assert_untouched_but(8..12);
        bench.over();
    }
}

/// No number was taken: it is no part of the push, which goes on.
#[test]
fn a_post_that_finds_no_room_changes_nothing() {
    for kind in [QueueKind::Proxy, KINDS[0], KINDS[1]] {
        let mut bench = Bench::small(|_| {});
        let push = bench.push("r", LONG);
        let queue = bench.impatient(&push, 2, kind);
        // Nobody looks before the ticket is here.
        let posted = kvxfer::mem::kernels::queue::POSTED;
        let told = ends(&bench.post(&queue, &puts(2), PUT, posted));
        let posts: Vec<Status> = told.iter().map(|(posted, _)| *posted).collect();
        let (ok, late) = (Status::Ok, Status::Timeout);
        assert_eq!(posts, [ok, ok, late, late], "{kind:?}");
        let left = queue.device().left(Instant::now() + LONG).expect("read");
        assert_eq!((left.posted, left.failed), (2, None));
        bench.expect("r", 0..4);
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
        let sent = push.commit().expect("finished");
        assert_eq!(sent.wait(LONG), Some(Outcome::Done), "{kind:?}");
        bench.received("r");
        bench.consumer.assert_untouched_but([0]);
        bench.over();
    }
}

#[test]
fn a_commit_needs_the_queue_finished_and_seals_it() {
    for kind in KINDS {
        let mut bench = Bench::small(|_| {});
        bench.expect("a", 0..8);
        let push = bench.push("a", LONG);
        let queue = bench.wqes(&push, 16, kind);
        let posting = bench.post(&queue, &puts(4), PUT, ALL);
        assert!(ends(&posting).iter().all(|end| *end == WELL));
        let refused = push.commit().expect_err("it is not finished");
        assert!(matches!(refused, Error::QueueUnfinished { queues: 1, .. }));
        bench.failed("a");
        queue.finish(Kernels::Ended, LONG).expect("they have ended");

        bench.expect("b", 0..8);
        let push = bench.push("b", LONG);
        let queue = bench.wqes(&push, 16, kind);
        let device = Arc::clone(queue.device());
        let posted = kvxfer::mem::kernels::queue::POSTED;
        let before = bench.post(&queue, &puts(8), PUT, posted);
        queue
            .finish(Kernels::Behind(before.event()), LONG)
            .expect("they end");
        let sent = push.commit().expect("finished");
        assert_eq!(sent.wait(LONG), Some(Outcome::Done));
        bench.received("b");
        // Nobody has waited for the ends: the queue goes all the same, with its memory.
        let gone = Arc::downgrade(&device);
        drop((device, before));
        let gpu = bench.stream.gpu().clone();
        bench.stream = Stream::new(&gpu).expect("a stream");
        until("the memory is back", || gone.upgrade().is_none());
        let table = pairs((0..8).map(|b| (b, b)));
        bench
            .consumer
            .side
            .verify(SEED, &table)
            .expect("every byte");
        bench.over();
    }
}

#[test]
fn a_real_nic_is_refused_by_name() {
    let bench = Bench::small(|_| {});
    let push = bench.push("r", LONG);
    for kind in [QueueKind::GpuWqe(Hca::Nic), QueueKind::Direct(Hca::Nic)] {
        let mut config = bench.config(4);
        config.kind = kind;
        let refused = push.gpu_queue(&config).expect_err("there is none");
        assert!(refused.to_string().contains("hca: nic"), "{refused}");
    }
    let mut config = bench.config(1 << 16);
    config.kind = KINDS[0];
    let refused = push.gpu_queue(&config).expect_err("too deep");
    assert!(refused.to_string().contains("32768"), "{refused}");
    drop(push.abort());
}
