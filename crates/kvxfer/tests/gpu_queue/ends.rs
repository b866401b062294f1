//! Pushes that end while posts are outstanding: every poster is told.

use kvxfer::gpu_queue::QueueKind;

use super::*;

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
        dies(path, QueueKind::Proxy);
    }
}

pub(super) fn dies(path: PathKind, kind: QueueKind) {
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
    let mut config = GpuQueueConfig::new(&gpu());
    config.kind = kind;
    let queue = push.gpu_queue(&config).expect("a queue");
    let kernels = PostKernels::load(&gpu()).expect("kernels");
    let stream = Stream::new(&gpu()).expect("a stream");
    // More than can be over before the peer is dead.
    let moves: Vec<Move> = puts(BLOCKS).into_iter().cycle().take(200_000).collect();
    let posting = post(&kernels, &stream, &queue, &moves, (PUT, ALL));
    // A queue of WQEs tells ends in their order, whatever is done first: beyond its depth some have been told.
    let depth = u64::from(config.depth);
    until("some are told", || queue.report().done > depth);
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
fn a_queue_of_a_push_that_has_its_outcome_is_closed() {
    let mut bench = Bench::small(|config| {
        // What is under way stays so, and its end is waited for.
        config.faults = Some("delay=1:3s".parse().expect("a plan"));
        config.drain_grace = LONG;
    });
    bench.expect("r", 0..8);
    let push = bench.push("r", Duration::from_millis(200));
    push.all_layers(&pairs((0..8).map(|b| (b, b))), None)
        .expect("fits");
    let of = |e: &Event| {
        matches!(
            e,
            Event::Failed {
                memory: kvxfer::event::MemoryState::Quarantined,
                ..
            }
        )
    };
    bench.sent.wait("outcome", of);
    let queue = bench.queue(&push, 4);
    let posting = bench.post(&queue, &puts(4), PUT, ALL);
    for (posted, ended) in ends(&posting) {
        let told = [Status::Closed, Status::Flushed];
        let refused = posted == Status::Broken || posted == Status::Ok && told.contains(&ended);
        assert!(refused, "{posted:?} {ended:?}");
    }
    let device = Arc::downgrade(queue.device());
    drop(posting);
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    let sent = push.commit().expect("told");
    assert_eq!(cause(&sent), Cause::DeadlinePassed);
    let gpu = bench.stream.gpu().clone();
    bench.stream = Stream::new(&gpu).expect("a stream");
    until("the memory is back", || device.upgrade().is_none());
    assert!(sent.wait_released(LONG));
    bench.failed("r");
    bench.over();
}
