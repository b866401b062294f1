//! The proxy ring.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use kvxfer_hipmem::HostMemory;
use kvxfer_hipmem::kernels::queue::{
    ALL, EACH, GET, IDLE, LOCAL_PLACE, Move, POSTED, PROXY, PUT, PUT_IMM, Queue, REMOTE_PLACE,
};
use kvxfer_hipmem::post::{
    Checks, Consumer, Descriptor, End, Place, PostOp, ProxyRing, RingAddresses, Span, Status, Taken,
};

use crate::{Around, LONG, Memory, Noise, Post, SHORT, ends, run, shipped};

/// A ring, and what its posters have among themselves.
pub(crate) struct Bench {
    pub(crate) ring: ProxyRing,
    pub(crate) consumer: Consumer,
    pub(crate) around: Around,
    pub(crate) queue: Queue,
    _memory: Memory,
}

impl Bench {
    pub(crate) fn new(depth: u32, first: u64, patience: u64) -> Self {
        let mut memory = Memory::new();
        let around = Around::new(&mut memory, first);
        let place: HostMemory = memory.take(ProxyRing::bytes(depth));
        let at = RingAddresses {
            ring: place.addr(),
            state: around.state.addr(),
            abort: around.abort.addr(),
        };
        let (ring, consumer) = ProxyRing::new(place, depth, first).expect("a ring");
        let queue = ring.queue(at, patience);
        Self {
            ring,
            consumer,
            around,
            queue,
            _memory: memory,
        }
    }

    fn take(&mut self) -> Option<Taken> {
        self.consumer.take(&self.ring).expect("inside")
    }

    fn complete(&mut self, ticket: u64, status: Status) {
        let ended = self.consumer.complete(&self.ring, ticket, status);
        ended.expect("inside").expect("it is under way");
    }

    /// Takes and completes what there is.
    fn drain(&mut self) -> Vec<Taken> {
        let mut all = Vec::new();
        while let Some(taken) = self.take() {
            if let Taken::Post(post) = &taken {
                self.complete(post.ticket, Status::Ok);
            }
            all.push(taken);
        }
        all
    }
}

pub(crate) fn moves(n: usize) -> Vec<Move> {
    let one = |i| Move {
        local: 0x10_0000 + 64 * i,
        remote: 0x7000_0000_0000 + 64 * i,
        len: 64,
        lkey: 1,
        rkey: 2,
        imm: i as u32,
        flags: 0,
    };
    (0..n as u64).map(one).collect()
}

/// What a move is, taken out of the ring.
fn wanted(ticket: u64, op: u32, of: &Move) -> Descriptor {
    Descriptor {
        ticket,
        op: match op {
            PUT => PostOp::Put,
            GET => PostOp::Get,
            _ => PostOp::PutImm(of.imm),
        },
        local: End::Address {
            addr: of.local,
            key: of.lkey,
        },
        remote: End::Address {
            addr: of.remote,
            key: of.rkey,
        },
        len: of.len,
    }
}

/// Posters and a consumer at the same time; posts end in no order. Each move comes out once.
fn traffic(
    post: &Post<'_>,
    depth: u32,
    first: u64,
    posters: u32,
    each: usize,
    op: u32,
    until: u32,
) {
    let mut bench = Bench::new(depth, first, LONG);
    let moves = moves(each * posters as usize);
    let posted = AtomicBool::new(false);
    let span = |addr| Span {
        addr,
        len: 64 * moves.len() as u64,
        writable: true,
    };
    let checks = Checks {
        local: [(1, span(moves[0].local))].into(),
        remote: [(2, span(moves[0].remote))].into(),
        max_len: 64,
        ..Checks::default()
    };
    let queue = bench.queue;
    let (results, seen) = thread::scope(|scope| {
        let serving = scope.spawn(|| {
            let _end = bench.around.end_with_me();
            let mut noise = Noise(first | 1);
            let mut under_way = Vec::new();
            let mut seen = vec![0_u32; moves.len()];
            let mut next = first;
            loop {
                // Once all have been posted, all are there.
                let over = posted.load(Ordering::Acquire);
                let taken = bench.take();
                match &taken {
                    Some(Taken::Post(post)) => {
                        assert_eq!(post.ticket, next);
                        next += 1;
                        let End::Address { addr, .. } = post.local else {
                            panic!("{post:?}");
                        };
                        let i = (addr - moves[0].local) as usize / 64;
                        assert_eq!(*post, wanted(post.ticket, op, &moves[i]));
                        assert_eq!(checks.check(post), Ok(()));
                        seen[i] += 1;
                        under_way.push(post.ticket);
                    }
                    Some(other) => panic!("{other:?}"),
                    None if over && under_way.is_empty() => return seen,
                    None if under_way.is_empty() => thread::yield_now(),
                    None => {}
                }
                let most = if taken.is_none() {
                    0
                } else {
                    depth as usize / 2
                };
                if under_way.len() > most {
                    let ticket = under_way.swap_remove(noise.below(under_way.len()));
                    bench.complete(ticket, Status::Ok);
                }
            }
        });
        let results = run(post, queue, &moves, posters, op, until);
        posted.store(true, Ordering::Release);
        (results, serving.join().expect("it served"))
    });
    assert!(seen.iter().all(|n| *n == 1), "each once");
    for (posted, ended) in ends(&results) {
        assert_eq!((posted, ended), (Status::Ok, Status::Ok));
    }
    let mut tickets: Vec<_> = results.iter().map(|r| r.ticket).collect();
    tickets.sort_unstable();
    let all: Vec<_> = (first..first + moves.len() as u64).collect();
    assert_eq!(tickets, all);
}

#[test]
fn a_hundred_thousand_posts_of_four_posters() {
    traffic(&shipped, 64, 0, 4, 25_000, PUT, ALL);
}

#[test]
fn posters_that_wait_for_each() {
    traffic(&shipped, 8, 3, 3, 500, GET, EACH);
    traffic(&shipped, 1, 0, 2, 50, PUT_IMM, EACH);
}

#[test]
fn posters_that_wait_for_quiet() {
    traffic(&shipped, 16, 1, 2, 2000, PUT_IMM, IDLE);
    traffic(&shipped, 16, 1, 2, 2000, PUT, POSTED);
}

#[test]
fn tickets_go_over_16_and_32_bits_and_phases_over_8() {
    for first in [0xff00, 0xffff_ff00, (1 << 40) - 256] {
        traffic(&shipped, 16, first, 2, 300, PUT, EACH);
    }
    // More than 256 laps.
    traffic(&shipped, 2, 500, 2, 400, PUT, ALL);
}

#[test]
fn a_full_ring_makes_posters_wait_and_then_says_so() {
    let mut bench = Bench::new(4, 0, SHORT);
    let moves = moves(6);
    let results = run(&shipped, bench.queue, &moves, 1, PUT, POSTED);
    let mut posted: Vec<_> = ends(&results).iter().map(|(posted, _)| *posted).collect();
    assert_eq!(posted.split_off(4), [Status::Timeout; 2]);
    assert_eq!(posted, [Status::Ok; 4]);
    // Nothing was taken by those that had no room: the ring goes on.
    assert_eq!(bench.drain().len(), 4);
    let results = run(&shipped, bench.queue, &moves[4..], 1, PUT, POSTED);
    assert_eq!(ends(&results), [(Status::Ok, Status::Ok); 2]);
    let taken = bench.drain();
    assert_eq!(taken[0], Taken::Post(wanted(4, PUT, &moves[4])));
}

#[test]
fn a_consumer_that_stops_is_told_within_the_patience() {
    for until in [EACH, IDLE] {
        let mut bench = Bench::new(4, 0, SHORT);
        let results = run(&shipped, bench.queue, &moves(1), 1, PUT, until);
        assert_eq!(ends(&results), [(Status::Ok, Status::Timeout)]);
        // It may come back.
        assert_eq!(bench.drain().len(), 1);
    }
}

#[test]
fn a_call_that_is_late_is_a_posters_last() {
    let (well, late) = (Status::Ok, Status::Timeout);
    // One that is waited for, and one that finds no room; what was posted before is still waited for.
    for (until, taken, wanted) in [
        (EACH, 1, [(well, late), (late, late), (late, late)]),
        (ALL, 2, [(well, late), (well, late), (late, late)]),
        (IDLE, 2, [(well, well), (well, well), (late, late)]),
        (POSTED, 2, [(well, well), (well, well), (late, late)]),
    ] {
        let mut bench = Bench::new(2, 0, SHORT);
        let results = run(&shipped, bench.queue, &moves(3), 1, PUT, until);
        assert_eq!(ends(&results), wanted, "{until}");
        assert_eq!(bench.drain().len(), taken, "{until}");
    }
}

#[test]
fn an_abort_ends_what_waits() {
    let bench = Bench::new(2, 0, LONG);
    bench.around.set_abort();
    let results = run(&shipped, bench.queue, &moves(3), 1, PUT, POSTED);
    let posted: Vec<_> = ends(&results).iter().map(|(posted, _)| *posted).collect();
    assert_eq!(posted, [Status::Ok, Status::Ok, Status::Stopped]);
    let bench = Bench::new(2, 0, LONG);
    bench.around.set_abort();
    for until in [EACH, IDLE] {
        let results = run(&shipped, bench.queue, &moves(1), 1, PUT, until);
        assert_eq!(ends(&results), [(Status::Ok, Status::Stopped)]);
    }
}

#[test]
fn a_kernel_killed_in_the_middle_of_a_post_ends_in_timeouts() {
    let mut bench = Bench::new(4, 0, SHORT);
    bench.around.lose_a_ticket();
    let results = run(&shipped, bench.queue, &moves(1), 1, PUT, EACH);
    assert_eq!(ends(&results), [(Status::Ok, Status::Timeout)]);
    assert_eq!(bench.take(), None, "it waits for the one before");
    // Its owner closes it, and nobody waits any more.
    let closed = bench.consumer.close(&bench.ring, Status::Closed);
    closed.expect("inside");
    let results = run(&shipped, bench.queue, &moves(4), 1, PUT, POSTED);
    let last = ends(&results)[3];
    assert_eq!(last, (Status::Broken, Status::Broken));
}

#[test]
fn a_failure_reaches_who_waits_and_ends_the_queue() {
    let mut bench = Bench::new(8, 0, LONG);
    let all = moves(3);
    let queue = bench.queue;
    let waiting = thread::scope(|scope| {
        let waiting = scope.spawn(|| run(&shipped, queue, &all, 1, PUT, ALL));
        let mut under_way = Vec::new();
        while under_way.len() < 3 {
            match bench.take() {
                Some(Taken::Post(post)) => under_way.push(post.ticket),
                Some(other) => panic!("{other:?}"),
                None => thread::yield_now(),
            }
        }
        bench.complete(1, Status::Peer);
        bench.complete(2, Status::Flushed);
        bench.complete(0, Status::Ok);
        waiting.join().expect("it ended")
    });
    let ended: Vec<_> = ends(&waiting).iter().map(|(_, ended)| *ended).collect();
    assert_eq!(ended, [Status::Ok, Status::Peer, Status::Flushed]);
    // There is room for five more, which are flushed; then posters look.
    let results = run(&shipped, queue, &moves(7), 1, PUT, POSTED);
    let posted: Vec<_> = ends(&results).iter().map(|(posted, _)| *posted).collect();
    assert_eq!(posted[..5], [Status::Ok; 5]);
    assert_eq!(posted[5..], [Status::Broken; 2]);
    let flushed: Vec<_> = (3..8).map(Taken::Flushed).collect();
    assert_eq!(bench.drain(), flushed);
    let results = run(&shipped, queue, &moves(1), 1, PUT, IDLE);
    assert_eq!(ends(&results)[0].1, Status::Peer, "quiet tells of it");
}

#[test]
fn what_is_no_queue_is_refused() {
    let bench = Bench::new(4, 0, SHORT);
    for (depth, kind) in [(0, PROXY), (3, PROXY), (6, PROXY), (4, 0), (4, 9)] {
        let queue = Queue {
            depth,
            kind,
            ..bench.queue
        };
        for until in [POSTED, EACH, IDLE] {
            let results = run(&shipped, queue, &moves(1), 1, PUT, until);
            let bad = Status::BadQueue;
            assert_eq!(ends(&results), [(bad, bad)], "{depth} {kind}");
        }
    }
}

#[test]
fn operations_and_flags_that_there_are_not_are_refused() {
    let mut bench = Bench::new(4, 0, SHORT);
    let mut all = moves(1);
    all[0].flags = 4;
    let results = run(&shipped, bench.queue, &all, 1, PUT, POSTED);
    assert_eq!(ends(&results)[0].0, Status::BadOp);
    assert_eq!(bench.take(), None);
    all[0].flags = 0;
    let results = run(&shipped, bench.queue, &all, 1, 9, POSTED);
    assert_eq!(ends(&results)[0].0, Status::Ok);
    assert!(matches!(bench.take(), Some(Taken::Refused(_))));
    let results = run(&shipped, bench.queue, &moves(0), 1, PUT, IDLE);
    assert!(results.is_empty());
    assert!(bench.consumer.failed());
}

#[test]
fn places_arrive_as_they_were_named() {
    let mut bench = Bench::new(4, 0, LONG);
    let place = |n: u8| Place {
        group: n,
        tensor: n + 1,
        layer: 0x0102 + u16::from(n),
        block: 0x0304_0506 + u32::from(n),
    };
    let all = [Move {
        local: place(1).to_word(),
        remote: place(7).to_word(),
        len: 512,
        flags: LOCAL_PLACE | REMOTE_PLACE,
        ..Move::default()
    }];
    let results = run(&shipped, bench.queue, &all, 1, PUT, POSTED);
    assert_eq!(ends(&results)[0].0, Status::Ok);
    let Some(Taken::Post(post)) = bench.take() else {
        panic!("nothing is there");
    };
    assert_eq!(post.local, End::Place(place(1)));
    assert_eq!(post.remote, End::Place(place(7)));
    assert_eq!((post.len, post.op), (512, PostOp::Put));
}
