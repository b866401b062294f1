//! Queues of WQEs between posters and a device, for loom: both are a *transliteration*, of `kernels/post.h`
//! (`kvx_reserve`, `kvx_nic_fill`, `kvx_nic_post`, `kvx_nic_ring`, `kvx_fail`) and of what a device does that reads a doorbell record
//! whenever it likes, as the [model](kvxfer_verbs::mlx5::model) does, or when it is rung for. Of a WQE there is its number
//! alone, of a doorbell and of what a post leaves for who rings where they end, of a completion how many WQEs have ended,
//! of a failure whose it is. How operations end, and fail, is in `loom_wqe_ends`.

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
    /// `KVX_RECORD_LATE`.
    RecordLate,
    /// Who gives its turn up leaves its word there.
    KeepsWord,
    /// Who gives its turn up tells nobody of it.
    NoFault,
}

/// What a post was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Ok,
    /// `KVX_TIMEOUT`.
    Late,
    /// `KVX_BROKEN`: it has no number.
    Broken,
}

/// Looks for its turn of a post that does not give up.
const ENDLESS: usize = usize::MAX;

struct Wqes {
    slots: [AtomicU64; DEPTH as usize],
    /// What posts leave for who rings.
    ready: [AtomicU64; DEPTH as usize],
    record: AtomicU64,
    bell: AtomicU64,
    ended: AtomicU64,
    next: AtomicU64,
    rung: AtomicU64,
    /// The first number of the lowest post that has failed, and one more; 0: none.
    fault: AtomicU64,
    broken: AtomicU64,
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
            fault: AtomicU64::new(0),
            broken: AtomicU64::new(0),
            doorbells: AtomicU64::new(0),
        })
    }

    fn slot(&self, n: u64) -> &AtomicU64 {
        &self.slots[(n % DEPTH) as usize]
    }

    /// `kvx_reserve`; `None` where the queue has failed.
    fn reserve(&self, count: u64, planted: Planted) -> Option<u64> {
        loop {
            if self.broken.load(Ordering::Acquire) != 0 {
                return None;
            }
            let ended = self.ended.load(Ordering::Acquire);
            let mut next = self.next.load(Ordering::Acquire);
            while next + count - ended <= DEPTH || planted == Planted::NoRoom {
                let (success, failure) = (Ordering::AcqRel, Ordering::Acquire);
                let swapped = self
                    .next
                    .compare_exchange(next, next + count, success, failure);
                match swapped {
                    Ok(_) => return Some(next),
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

    /// `kvx_post_one`, of a block of so many pieces.
    fn post(&self, count: u64, patience: usize, planted: Planted) -> Told {
        match self.reserve(count, planted) {
            Some(first) => self.post_at((first, count), patience, planted),
            None => Told::Broken,
        }
    }

    /// `kvx_nic_post`, with the patience of so many looks.
    fn post_at(&self, (first, count): (u64, u64), patience: usize, planted: Planted) -> Told {
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
        let (mut rung, mut looks) = (first, 0);
        while planted != Planted::NoTurn {
            rung = self.rung.load(Ordering::Acquire);
            if rung >= first {
                break;
            }
            looks += 1;
            if looks > patience {
                return self.give_up((first, next), planted);
            }
            thread::yield_now();
        }
        if rung == first {
            self.ring(next, planted);
            if planted == Planted::WqeLate {
                self.fill(first, count);
            }
        }
        Told::Ok
    }

    /// The turn never came.
    fn give_up(&self, (first, next): (u64, u64), planted: Planted) -> Told {
        let (success, failure) = (Ordering::AcqRel, Ordering::Acquire);
        if planted != Planted::KeepsWord {
            let ready = &self.ready[(first % DEPTH) as usize];
            let _ = ready.compare_exchange(next, 0, success, failure);
        }
        if self.rung.load(Ordering::Acquire) > first {
            return Told::Ok;
        }
        if planted != Planted::NoFault {
            // `kvx_fail`, of which `loom_wqe_ends` has more than one.
            let _ = self.fault.compare_exchange(0, first + 1, success, failure);
            self.broken.store(1, Ordering::Release);
        }
        Told::Late
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
        if planted != Planted::RecordLate {
            self.record.store(end, Ordering::Relaxed);
        }
        if planted == Planted::RungEarly {
            self.rung.store(end, Ordering::Release);
        }
        self.doorbells.fetch_add(1, Ordering::Relaxed);
        // Not the fence that it has on a device, which would order more than is relied on.
        self.bell.store(end, Ordering::Release);
        if planted == Planted::RecordLate {
            self.record.store(end, Ordering::Relaxed);
        }
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
        assert_eq!(wqes.post(*count, ENDLESS, planted), Told::Ok);
    }
    let record = wqes.record.load(Ordering::Relaxed);
    assert_eq!(record, all, "all have been told of");
    device.join().expect("served");
}

/// Two posters of a WQE each, for which there is room; the device looks now and then.
fn two_posters(planted: Planted) {
    let wqes = Wqes::new();
    let (device, other) = (Arc::clone(&wqes), Arc::clone(&wqes));
    let device = thread::spawn(move || (0..2).fold(0, |consumed, _| device.look(consumed)));
    let other = thread::spawn(move || other.post(1, ENDLESS, planted));
    wqes.post(1, ENDLESS, planted);
    other.join().expect("posted");
    let consumed = device.join().expect("looked");
    assert_eq!(wqes.look(consumed), 2, "both have been told of");
}

/// The same, of a device that looks when it is rung for. How often it was rung.
fn two_posters_and_a_bell(planted: Planted) -> u64 {
    let wqes = Wqes::new();
    let (device, other) = (Arc::clone(&wqes), Arc::clone(&wqes));
    let device = thread::spawn(move || (0..2).fold(0, |consumed, _| device.rung(consumed)));
    let other = thread::spawn(move || other.post(1, ENDLESS, planted));
    wqes.post(1, ENDLESS, planted);
    other.join().expect("posted");
    let consumed = device.join().expect("looked");
    assert_eq!(wqes.rung(consumed), 2, "both have been rung for");
    wqes.doorbells.load(Ordering::Relaxed)
}

/// Two posters, of whom one is impatient; what that one was told, and how many the device was rung for.
fn two_posters_and_one_gives_up(planted: Planted) -> (Told, u64) {
    let wqes = Wqes::new();
    let other = Arc::clone(&wqes);
    let impatient = thread::spawn(move || other.post(1, 1, planted));
    let mine = wqes.post(1, ENDLESS, planted);
    let told = impatient.join().expect("posted");
    let rung = wqes.rung(0);
    let fault = wqes.fault.load(Ordering::Acquire);
    match (mine, told) {
        (Told::Ok, Told::Ok) => assert_eq!((rung, fault), (2, 0), "both have been rung for"),
        // `finish` finds it, and the push has failed, whoever was rung for.
        (Told::Ok, Told::Late) => {
            assert_eq!(fault, 2, "who was told that it is not there has failed")
        }
        other => panic!("{other:?}: nobody waits for who is impatient"),
    }
    assert!(rung >= 1, "who was told that it is there has been rung for");
    (told, rung)
}

/// Somebody has the turn, and comes when who waited for it has given up.
fn who_has_the_turn_comes_late(planted: Planted) {
    let wqes = Wqes::new();
    let first = wqes.reserve(1, planted).expect("there is room");
    let other = Arc::clone(&wqes);
    let impatient = thread::spawn(move || other.post(1, 1, planted));
    assert_eq!(impatient.join().expect("posted"), Told::Late);
    assert_eq!(wqes.post_at((first, 1), ENDLESS, planted), Told::Ok);
    assert_eq!(wqes.rung(0), 1, "nobody rings for who gave up");
    // Nor is there a number for anybody any more.
    assert_eq!(wqes.post(1, ENDLESS, planted), Told::Broken);
}

#[test]
fn loom_who_gives_up_is_told_so_and_may_have_been_rung_for() {
    let seen = Arc::new([false; 3].map(std::sync::atomic::AtomicBool::new));
    let of = Arc::clone(&seen);
    model(move || {
        let case = match two_posters_and_one_gives_up(Planted::Nothing) {
            (Told::Ok, _) => 0,
            (_, 1) => 1,
            // Who rang had looked already.
            _ => 2,
        };
        of[case].store(true, Ordering::Relaxed);
    });
    assert!(
        seen.iter().all(|seen| seen.load(Ordering::Relaxed)),
        "{seen:?}"
    );
}

#[test]
fn loom_who_comes_late_does_not_ring_for_who_gave_up() {
    model(|| who_has_the_turn_comes_late(Planted::Nothing));
}

#[test]
#[should_panic(expected = "nobody rings for who gave up")]
fn loom_planted_word_of_who_gave_up_stays() {
    model(|| who_has_the_turn_comes_late(Planted::KeepsWord));
}

#[test]
#[should_panic(expected = "who was told that it is not there has failed")]
fn loom_planted_who_gives_up_tells_nobody() {
    model(|| {
        two_posters_and_one_gives_up(Planted::NoFault);
    });
}

#[test]
#[should_panic(expected = "the record is before the doorbell")]
fn loom_planted_record_after_the_doorbell() {
    model(|| {
        two_posters_and_a_bell(Planted::RecordLate);
    });
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
#[should_panic(expected = "all have been told of")]
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
#[should_panic(expected = "both have been told of")]
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
#[should_panic(expected = "whole")]
fn loom_planted_slot_used_too_early() {
    model(|| one_poster(Planted::NoRoom, &[2, 1]));
}

#[test]
#[should_panic(expected = "whole")]
fn loom_planted_no_orderings_of_wqes() {
    weak_model(|| one_poster(Planted::Nothing, &[1]));
}
