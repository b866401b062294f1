//! Queues of WQEs between posters and a device, for loom: both are a *transliteration*, of `kernels/post.h`
//! (`kvx_reserve`, `kvx_nic_fill`, `kvx_nic_post`, `kvx_nic_ring`) and of what a device does that reads a doorbell record
//! whenever it likes, as the [model](kvxfer_verbs::mlx5::model) does, or when it is rung for. Of a WQE there is its number
//! alone, of a doorbell and of what a post leaves for who rings where they end, of a completion how many WQEs have ended.

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
    /// `KVX_READY_EARLY`.
    ReadyEarly,
    /// Ready behind the WQEs, with no release in between.
    ReadyUnfenced,
    /// Who rings for others has not acquired what they left.
    NoAcquire,
    /// `KVX_READY_STALE`.
    ReadyStale,
    /// The turn goes on before the doorbell has been rung.
    RungEarly,
}

struct Wqes {
    slots: [AtomicU64; DEPTH as usize],
    /// What posts leave for who rings.
    ready: [AtomicU64; DEPTH as usize],
    record: AtomicU64,
    bell: AtomicU64,
    ended: AtomicU64,
    next: AtomicU64,
    rung: AtomicU64,
    /// How often it was rung: of no poster.
    doorbells: AtomicU64,
}

impl Wqes {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            slots: [POISON, POISON].map(AtomicU64::new),
            ready: [0, 0].map(AtomicU64::new),
            record: AtomicU64::new(0),
            bell: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            next: AtomicU64::new(0),
            rung: AtomicU64::new(0),
            doorbells: AtomicU64::new(0),
        })
    }

    fn slot(&self, n: u64) -> &AtomicU64 {
        &self.slots[(n % DEPTH) as usize]
    }

    /// `kvx_reserve`.
    fn reserve(&self, count: u64, planted: Planted) -> u64 {
        loop {
            let ended = self.ended.load(Ordering::Acquire);
            let mut next = self.next.load(Ordering::Acquire);
            while next + count - ended <= DEPTH || planted == Planted::NoRoom {
                let (success, failure) = (Ordering::AcqRel, Ordering::Acquire);
                let swapped = self
                    .next
                    .compare_exchange(next, next + count, success, failure);
                match swapped {
                    Ok(_) => return next,
                    Err(found) => next = found,
                }
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
        let next = first + count;
        let ready = &self.ready[(first % DEPTH) as usize];
        if planted == Planted::ReadyEarly {
            ready.store(next, Ordering::Relaxed);
        }
        if planted != Planted::WqeLate {
            self.fill(first, count);
        }
        if planted == Planted::ReadyUnfenced {
            ready.store(next, Ordering::Relaxed);
            // A model does not switch between a store and the fence behind it.
            thread::yield_now();
        }
        match planted {
            Planted::NoRelease => {}
            Planted::PlainRelease => fence(Ordering::Release),
            // As fence.sc.sys, and as a write-back that has been waited for: what one poster has written is there
            // before another one, who rings for it or whose turn comes by this one's word, tells of it with no fence
            // in between.
            _ => fence(Ordering::SeqCst),
        }
        if !matches!(planted, Planted::ReadyEarly | Planted::ReadyUnfenced) {
            ready.store(next, Ordering::Relaxed);
        }
        let mut rung = first;
        while planted != Planted::NoTurn {
            rung = self.rung.load(Ordering::Acquire);
            if rung >= first {
                break;
            }
            thread::yield_now();
        }
        if rung == first {
            self.ring(next, planted);
            if planted == Planted::WqeLate {
                self.fill(first, count);
            }
        }
    }

    /// `kvx_nic_ring`.
    fn ring(&self, own: u64, planted: Planted) {
        let mut end = own;
        // Of others there are no more.
        for _ in 1..DEPTH {
            let word = self.ready[(end % DEPTH) as usize].load(Ordering::Relaxed);
            let is_good = match planted {
                Planted::ReadyStale => word != 0,
                _ => word > end,
            };
            if !is_good {
                break;
            }
            end = word;
        }
        if end != own && planted != Planted::NoAcquire {
            fence(Ordering::Acquire);
        }
        self.record.store(end, Ordering::Relaxed);
        if planted == Planted::RungEarly {
            self.rung.store(end, Ordering::Release);
        }
        self.doorbells.fetch_add(1, Ordering::Relaxed);
        // Not the fence that it has on a device, which would order more than is relied on.
        self.bell.store(end, Ordering::Release);
        if planted != Planted::RungEarly {
            self.rung.store(end, Ordering::Release);
        }
    }

    /// One look of a device that does nothing until it is rung for; how far it has consumed.
    fn rung(&self, consumed: u64) -> u64 {
        let bell = self.bell.load(Ordering::Acquire);
        assert!(bell >= consumed, "the doorbell goes back");
        assert!(
            self.record.load(Ordering::Relaxed) >= bell,
            "the record is before the doorbell"
        );
        self.take(consumed, bell);
        bell
    }

    /// One look of the device; how far it has consumed.
    fn look(&self, consumed: u64) -> u64 {
        let record = self.record.load(Ordering::Relaxed);
        fence(Ordering::SeqCst);
        assert!(record >= consumed, "the record goes back");
        self.take(consumed, record);
        record
    }

    fn take(&self, from: u64, to: u64) {
        for n in from..to {
            assert_eq!(self.slot(n).load(Ordering::Relaxed), n, "whole");
            self.slot(n).store(POISON, Ordering::Relaxed);
        }
        if from != to {
            self.ended.store(to, Ordering::Release);
        }
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

/// The same, of a device that looks when it is rung for. How often it was rung.
fn two_posters_and_a_bell(planted: Planted) -> u64 {
    let wqes = Wqes::new();
    let (device, other) = (Arc::clone(&wqes), Arc::clone(&wqes));
    let device = thread::spawn(move || (0..2).fold(0, |consumed, _| device.rung(consumed)));
    let other = thread::spawn(move || other.post(1, planted));
    wqes.post(1, planted);
    other.join().expect("posted");
    let consumed = device.join().expect("looked");
    assert_eq!(wqes.rung(consumed), 2, "both have been rung for");
    wqes.doorbells.load(Ordering::Relaxed)
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
fn loom_one_doorbell_for_two_posters_or_one_for_each() {
    let seen = Arc::new([false, false].map(std::sync::atomic::AtomicBool::new));
    let of = Arc::clone(&seen);
    model(move || {
        let doorbells = two_posters_and_a_bell(Planted::Nothing);
        of[doorbells as usize - 1].store(true, Ordering::Relaxed);
    });
    assert!(
        seen.iter().all(|seen| seen.load(Ordering::Relaxed)),
        "{seen:?}"
    );
}

#[test]
#[should_panic(expected = "whole")]
fn loom_planted_ready_before_the_wqe() {
    model(|| two_posters(Planted::ReadyEarly));
}

#[test]
#[should_panic(expected = "whole")]
fn loom_planted_ready_with_no_release() {
    model(|| two_posters(Planted::ReadyUnfenced));
}

#[test]
#[should_panic(expected = "whole")]
fn loom_planted_no_acquire_by_who_rings() {
    model(|| {
        two_posters_and_a_bell(Planted::NoAcquire);
    });
}

#[test]
#[should_panic]
fn loom_planted_ready_of_the_lap_before() {
    model(|| one_poster(Planted::ReadyStale, &[1, 1]));
}

#[test]
#[should_panic(expected = "both have been rung for")]
fn loom_planted_turn_before_the_doorbell() {
    model(|| {
        two_posters_and_a_bell(Planted::RungEarly);
    });
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
