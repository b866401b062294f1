//! Puts with an immediate: the consumer hears of each block that is there while the push goes on.

use std::cell::RefCell;

use kvxfer::expects::MOST_IMMEDIATES;
use kvxfer::mem::kernels::queue::POSTED;

use super::*;

/// Both layers of so many blocks, each with the number of its post.
fn numbered(blocks: u32) -> Vec<Move> {
    let puts = puts(blocks).into_iter().zip(0..);
    puts.map(|(put, imm)| Move { imm, ..put }).collect()
}

fn told(event: &Event) -> Option<u32> {
    match event {
        Event::Told { immediate, .. } => Some(*immediate),
        _ => None,
    }
}

/// What the log has of a request, in its order: the immediates, and `None` for the outcome.
fn heard(log: &mut Log, of: &str) -> Vec<Option<u32>> {
    let of = RequestId::from(of);
    let heard = RefCell::new(Vec::new());
    log.assert_in_order(|events| {
        for event in events {
            match event {
                Event::Told { request, .. } if *request == of => {
                    heard.borrow_mut().push(told(event))
                }
                Event::Received { request, .. } | Event::Failed { request, .. }
                    if *request == of =>
                {
                    heard.borrow_mut().push(None);
                }
                _ => {}
            }
        }
    });
    heard.into_inner()
}

#[test]
fn a_block_is_there_when_its_immediate_is_told() {
    let paths = [
        PathKind::Arena,
        PathKind::ProcessVm,
        PathKind::Tcp,
        PathKind::Ipc,
    ];
    for path in paths {
        let mut bench = Bench::new(path, (BLOCK, 2), BLOCKS, take_time);
        bench.expect("r", 0..BLOCKS);
        let push = bench.push("r", LONG);
        let queue = bench.queue(&push, 8);
        let moves = numbered(BLOCKS);
        let posting = bench.post(&queue, &moves, PUT_IMM, ALL);
        for (number, of) in (0..).zip(&moves) {
            let is_it = |event: &Event| told(event) == Some(number);
            bench.log.wait("immediate", is_it);
            let wanted = words(&bench.producer, of.local);
            assert_eq!(words(&bench.consumer, of.remote), wanted, "{path} {number}");
        }
        assert!(ends(&posting).iter().all(|end| *end == WELL), "{path}");
        // Nobody has said that the push is done.
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
        let sent = push.commit().expect("committed");
        assert_eq!(sent.wait(LONG), Some(Outcome::Done));
        bench.received("r");
        let heard = heard(&mut bench.log, "r");
        let mut numbers: Vec<u32> = heard.iter().copied().flatten().collect();
        numbers.sort_unstable();
        assert_eq!(numbers, Vec::from_iter(0..2 * BLOCKS), "{path}: each once");
        assert_eq!(heard.last(), Some(&None), "{path}: before the outcome");
        bench.over();
    }
}

#[test]
fn immediates_come_in_the_order_of_those_who_waited() {
    let mut bench = Bench::small(|_| {});
    bench.expect("r", 0..BLOCKS);
    let push = bench.push("r", LONG);
    let queue = bench.queue(&push, 8);
    let posting = bench.post(&queue, &numbered(BLOCKS), PUT_IMM, EACH);
    assert!(ends(&posting).iter().all(|end| *end == WELL));
    // Puts without one are told of to nobody.
    let posting = bench.post(&queue, &puts(2), PUT, EACH);
    assert!(ends(&posting).iter().all(|end| *end == WELL));
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    let sent = push.commit().expect("committed");
    assert_eq!(sent.wait(LONG), Some(Outcome::Done));
    bench.received("r");
    let all = (0..2 * BLOCKS).map(Some).chain([None]);
    assert_eq!(heard(&mut bench.log, "r"), Vec::from_iter(all));
    bench.over();
}

/// The commit is there before the last blocks are.
#[test]
fn the_last_immediates_come_before_the_outcome() {
    for path in [PathKind::Arena, PathKind::Tcp, PathKind::Ipc] {
        for verify in [false, true] {
            let mut bench = Bench::new(path, (BLOCK, 2), BLOCKS, |config| {
                config.verify = verify;
                config.enable_notification = true;
                take_time(config);
            });
            bench.expect("r", 0..16);
            let push = bench.push("r", LONG);
            let queue = bench.queue(&push, 32);
            let posting = bench.post(&queue, &numbered(16), PUT_IMM, POSTED);
            let behind = Kernels::Behind(posting.event());
            queue.finish(behind, LONG).expect("they end");
            let sent = push.commit().expect("committed");
            assert_eq!(sent.wait(LONG), Some(Outcome::Done));
            // There it would overtake them.
            assert!(!sent.report().data_plane_notice, "{path}");
            bench.received("r");
            let heard = heard(&mut bench.log, "r");
            assert_eq!((heard.len(), heard.last()), (33, Some(&None)), "{path}");
            bench.over();
        }
    }
}

#[test]
fn nothing_is_told_of_an_expectation_that_is_over() {
    let mut bench = Bench::small(take_time);
    bench.expect("r", 0..BLOCKS);
    let push = bench.push("r", LONG);
    let queue = bench.queue(&push, 8);
    let posting = bench.post(&queue, &numbered(BLOCKS), PUT_IMM, ALL);
    bench.log.wait("immediate", |event| told(event).is_some());
    assert!(bench.consumer.engine.cancel_expect(&RequestId::from("r")));
    assert!(ends(&posting).iter().any(|end| *end != WELL));
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    assert_eq!(cause(&push.commit().expect("told")), Cause::Revoked);
    bench.failed("r");
    let heard = heard(&mut bench.log, "r");
    assert_eq!(heard.last(), Some(&None), "behind the outcome: {heard:?}");
    bench.over();
}

#[test]
fn a_push_tells_so_many_immediates_and_no_more() {
    const SMALL: u64 = 64;
    let blocks = u32::try_from(MOST_IMMEDIATES).expect("few") / 2 + 100;
    let mut bench = Bench::new(PathKind::Arena, (SMALL, 2), blocks, |_| {});
    bench.expect("r", 0..blocks);
    let push = bench.push("r", LONG);
    let queue = bench.queue(&push, 1024);
    let layers = (0..2).flat_map(|layer| (0..blocks).map(move |b| put(layer, b, b, SMALL)));
    let moves: Vec<Move> = layers.collect();
    let posting = bench.post(&queue, &moves, PUT_IMM, ALL);
    let ends = ends(&posting);
    assert!(ends.contains(&(Status::Ok, Status::BadOp)), "too many");
    queue.finish(Kernels::Ended, LONG).expect("they have ended");
    let fault = PostFault::Immediates;
    let failed = cause(&push.commit().expect("told"));
    assert!(
        matches!(failed, Cause::KernelPost { fault: of, .. } if of == fault),
        "{failed:?}"
    );
    bench.failed("r");
    let told = heard(&mut bench.log, "r").len() as u64 - 1;
    assert!(told > 0 && told <= MOST_IMMEDIATES, "{told}");
    bench.over();
}
