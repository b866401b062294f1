//! A queue's memory, and kernels that do not end by themselves.

use super::*;

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
    // What was in the ring is lost: the push cannot pass for done.
    bench.expect("r", 0..8);
    push.all_layers(&pairs((0..8).map(|b| (b, b))), None)
        .expect("fits");
    let refused = push.commit().expect_err("posts may be lost");
    assert!(
        matches!(&refused, kvxfer::Error::QueueUnfinished { queues: 1, .. }),
        "{refused}"
    );
    bench.failed("r");
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
fn a_queue_whose_handle_nobody_had_may_be_dropped() {
    let mut bench = Bench::small(|_| {});
    bench.expect("r", 0..8);
    let push = bench.push("r", LONG);
    let finished = bench.queue(&push, 4);
    finished
        .finish(Kernels::Ended, LONG)
        .expect("nobody posted");
    // Nothing of it can be lost: the push goes on.
    drop(bench.queue(&push, 4));
    push.all_layers(&pairs((0..8).map(|b| (b, b))), None)
        .expect("fits");
    let sent = push.commit().expect("nothing is lost");
    assert_eq!(sent.wait(LONG), Some(Outcome::Done));
    bench.received("r");
    bench.over();
}

#[test]
fn any_time_may_be_given_to_kernels() {
    let mut bench = Bench::small(|_| {});
    bench.expect("r", 0..8);
    let push = bench.push("r", LONG);
    let queue = bench.queue(&push, 64);
    let posting = bench.post(&queue, &puts(8), PUT, ALL);
    let behind = Kernels::Behind(posting.event());
    queue.finish(behind, Duration::MAX).expect("they end");
    assert!(ends(&posting).iter().all(|end| *end == WELL));
    let sent = push.commit().expect("finished");
    assert_eq!(sent.wait(LONG), Some(Outcome::Done));
    bench.received("r");
    bench.over();
}

#[test]
fn kernels_of_which_nothing_can_be_known_fail_the_push() {
    let mut bench = Bench::small(|_| {});
    bench.expect("r", 0..8);
    let push = bench.push("r", LONG);
    let queue = bench.queue(&push, 64);
    let posting = bench.post(&queue, &puts(8), PUT, ALL);
    assert!(ends(&posting).iter().all(|end| *end == WELL));
    let unknown = kvxfer::mem::gpu::Event::unknown(bench.stream.gpu());
    let failed = queue.finish(Kernels::Behind(&unknown), LONG);
    assert!(
        matches!(failed, Err(kvxfer::Error::Memory(_))),
        "{failed:?}"
    );
    let sent = push.commit().expect("its outcome tells");
    let operation = kvxfer::transfer::GpuOperation::Wait;
    let cause = cause(&sent);
    assert!(
        matches!(cause, Cause::Gpu { operation: o, .. } if o == operation),
        "{cause}"
    );
    bench.failed("r");
    bench.over();
}
