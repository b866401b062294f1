//! Posts that cannot be done, settings that make no sense: nothing is written, and both sides are told.

use super::*;

/// What a post says that cannot be done, what the kernel is told and the host.
#[test]
fn lies_of_a_kernel_fail_the_push_and_write_nothing() {
    let group = |group: u64, word: u64| word | group << 56;
    let good = put(1, 3, 2, BLOCK);
    let layer = 7;
    let not_expected = |block| PostFault::NotExpected { group: 0, block };
    let cases: Vec<(Move, u32, Status, PostFault)> = vec![
        (good, GET, Status::BadOp, PostFault::Operation),
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
    assert!(refused(&|c| c.slots = WqeSlots::Gpu).contains("slots"));
    let word = bench.consumer.first_word(0);
    assert_eq!(word, POISON);
    drop(push.abort());
}
