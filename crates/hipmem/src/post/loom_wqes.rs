//! Queues of WQEs between posters and a device, for loom: both are a *transliteration*, of `kernels/post.h`
//! (`kvx_reserve`, `kvx_nic_fill`, `kvx_nic_post`) and of what a device does that reads a doorbell record whenever it
//! likes, as the [model](kvxfer_verbs::mlx5::model) does. Of a WQE there is its number alone, of a completion how many
//! WQEs have ended.

use std::sync::Arc;

use kvxfer_loom::atomic::{AtomicU64, Ordering, fence};
use kvxfer_loom::{model, thread, weak_model};

const DEPTH: u64 = 2;
/// What a consumed slot is overwritten with.
const POISON: u64 = u64::MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Planted {
    Nothing,
    /// `KVX_WQE_LATE`.
    WqeLate,
    /// `KVX_NO_TURN`.
    NoTurn,
    /// No release behind the WQEs.
    NoRelease,
    /// One that orders this poster's own stores alone.
    PlainRelease,
    /// A slot is used again before the end of what was in it was told.
    NoRoom,
}

struct Wqes {
    slots: [AtomicU64; DEPTH as usize],
    record: AtomicU64,
    ended: AtomicU64,
    next: AtomicU64,
    rung: AtomicU64,
}

impl Wqes {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            slots: [POISON, POISON].map(AtomicU64::new),
            record: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            next: AtomicU64::new(0),
            rung: AtomicU64::new(0),
        })
    }

    fn slot(&self, n: u64) -> &AtomicU64 {
        &self.slots[(n % DEPTH) as usize]
    }

    /// `kvx_reserve`.
    fn reserve(&self, count: u64, planted: Planted) -> u64 {
        loop {
            let next = self.next.load(Ordering::Acquire);
            let ended = self.ended.load(Ordering::Acquire);
            let room = next + count - ended <= DEPTH || planted == Planted::NoRoom;
            let swap = || {
                let (success, failure) = (Ordering::AcqRel, Ordering::Acquire);
                self.next
                    .compare_exchange(next, next + count, success, failure)
            };
            if room && swap().is_ok() {
                return next;
            }
            thread::yield_now();
        }
    }

    /// `kvx_nic_fill`.
    fn fill(&self, first: u64, count: u64) {
        for n in first..first + count {
            self.slot(n).store(n, Ordering::Relaxed);
        }
    }

    /// `kvx_nic_post`, of a block of so many pieces.
    fn post(&self, count: u64, planted: Planted) {
        let first = self.reserve(count, planted);
        if planted != Planted::WqeLate {
            self.fill(first, count);
        }
        match planted {
            Planted::NoRelease => {}
            Planted::PlainRelease => fence(Ordering::Release),
            // As fence.sc.sys, and as a write-back that has been waited for: what one poster has written is there
            // before another one, whose turn comes by this one's word, tells of it with no fence in between.
            _ => fence(Ordering::SeqCst),
        }
        while planted != Planted::NoTurn && self.rung.load(Ordering::Acquire) != first {
            thread::yield_now();
        }
        self.record.store(first + count, Ordering::Relaxed);
        if planted == Planted::WqeLate {
            self.fill(first, count);
        }
        self.rung.store(first + count, Ordering::Release);
    }

    /// One look of the device; how far it has consumed.
    fn look(&self, consumed: u64) -> u64 {
        let record = self.record.load(Ordering::Relaxed);
        fence(Ordering::SeqCst);
        assert!(record >= consumed, "the record goes back");
        for n in consumed..record {
            assert_eq!(self.slot(n).load(Ordering::Relaxed), n, "whole");
            self.slot(n).store(POISON, Ordering::Relaxed);
        }
        if record != consumed {
            self.ended.store(record, Ordering::Release);
        }
        record
    }
}

/// One poster, of blocks of so many pieces, over the queue's end; the device looks until it has all.
fn one_poster(planted: Planted, blocks: &[u64]) {
    let wqes = Wqes::new();
    let all = blocks.iter().sum();
    let device = {
        let wqes = Arc::clone(&wqes);
        thread::spawn(move || {
            let mut consumed = 0;
            while consumed < all {
                consumed = wqes.look(consumed);
                thread::yield_now();
            }
        })
    };
    for count in blocks {
        wqes.post(*count, planted);
    }
    device.join().expect("served");
}

/// Two posters of a WQE each, for which there is room; the device looks now and then.
fn two_posters(planted: Planted) {
    let wqes = Wqes::new();
    let (device, other) = (Arc::clone(&wqes), Arc::clone(&wqes));
    let device = thread::spawn(move || (0..2).fold(0, |consumed, _| device.look(consumed)));
    let other = thread::spawn(move || other.post(1, planted));
    wqes.post(1, planted);
    other.join().expect("posted");
    let consumed = device.join().expect("looked");
    assert_eq!(wqes.look(consumed), 2, "both have been told of");
}

#[test]
fn loom_wqes_of_two_posters_are_whole_when_they_are_told_of() {
    model(|| two_posters(Planted::Nothing));
}

#[test]
fn loom_the_pieces_of_blocks_are_whole_over_the_queues_end() {
    model(|| one_poster(Planted::Nothing, &[1, 2]));
}

#[test]
#[should_panic(expected = "whole")]
fn loom_planted_wqe_after_its_record() {
    model(|| one_poster(Planted::WqeLate, &[1]));
}

#[test]
#[should_panic]
fn loom_planted_no_turn() {
    model(|| two_posters(Planted::NoTurn));
}

#[test]
#[should_panic(expected = "whole")]
fn loom_planted_no_release_behind_wqes() {
    model(|| one_poster(Planted::NoRelease, &[2]));
}

#[test]
#[should_panic(expected = "whole")]
fn loom_planted_release_that_is_only_ones_own() {
    model(|| two_posters(Planted::PlainRelease));
}

#[test]
#[should_panic]
fn loom_planted_slot_used_too_early() {
    model(|| one_poster(Planted::NoRoom, &[2, 1]));
}

#[test]
#[should_panic(expected = "whole")]
fn loom_planted_no_orderings_of_wqes() {
    weak_model(|| one_poster(Planted::Nothing, &[1]));
}
