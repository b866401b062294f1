//! Pushes that go well.

use kvxfer::gpu_queue::QueueKind;

use super::*;

/// 100,000 puts of four threads, each block of each layer once, through 64 slots.
fn many(path: PathKind) {
    many_of(path, QueueKind::Proxy);
}

pub(super) fn many_of(path: PathKind, kind: QueueKind) {
    const LAYERS: u16 = 16;
    const MANY: u32 = 6250;
    const SMALL: u64 = 64;
    let mut bench = Bench::new(path, (SMALL, LAYERS.into()), MANY, |_| {});
    bench.expect("r", 0..MANY);
    let push = bench.push("r", LONG);
    let mut config = bench.config(64);
    config.kind = kind;
    let queue = push.gpu_queue(&config).expect("a queue");
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
    produced_on(Bench::new(path, (BLOCK, 3), BLOCKS, change));
}

fn produced_on(mut bench: Bench) {
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
    // And the consumer fetches it into the host's memory.
    let bench = Bench::to_host((BLOCK, 3), BLOCKS);
    assert_eq!(bench.way.path().expect("up").path, PathKind::Ipc);
    produced_on(bench);
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
    let queue = bench.queue(&push, 32);
    let device = Arc::clone(queue.device());
    // All of them fit into the ring, so all of them are posted when the kernel has ended.
    let posted = kvxfer::mem::kernels::queue::POSTED;
    let before = bench.post(&queue, &puts(8), PUT, posted);
    queue
        .finish(Kernels::Behind(before.event()), LONG)
        .expect("they end");
    let sent = push.commit().expect("finished");
    assert_eq!(sent.wait(LONG), Some(Outcome::Done));
    // Behind it nothing is carried out, not even what makes no sense, and nobody waits for long: the queue may be gone.
    let posts = Posts {
        moves: &puts(1),
        posters: 1,
        by: PostBy::Blocks,
        op: 9,
        until: ALL,
    };
    let after = bench.kernels.post(&bench.stream, &device, &posts);
    let soon = Instant::now() + LONG / 2;
    let after = after.expect("launched").wait(soon).expect("it ends");
    assert!(!statuses(&after).contains(&WELL), "{after:?}");
    bench.received("r");
    let table = pairs((0..8).map(|b| (b, b)));
    bench
        .consumer
        .side
        .verify(SEED, &table)
        .expect("every byte");
    bench.over();
}

#[test]
fn a_commit_before_the_queue_is_finished_is_refused() {
    let mut bench = Bench::small(|_| {});
    bench.expect("r", 0..8);
    let push = bench.push("r", LONG);
    let (queue, other) = (bench.queue(&push, 16), bench.queue(&push, 16));
    let posting = bench.post(&queue, &puts(8), PUT, ALL);
    assert!(ends(&posting).iter().all(|end| *end == WELL));
    other.finish(Kernels::Ended, LONG).expect("nobody posted");
    let refused = push.commit().expect_err("one is not finished");
    assert!(
        matches!(&refused, kvxfer::Error::QueueUnfinished { queues: 1, .. }),
        "{refused}"
    );
    // The push is given up.
    bench.failed("r");
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    bench.over();
}
