//! The ends of WQEs between a device and posters, for loom: a *transliteration* of `kernels/post.h` (`kvx_nic_reap`,
//! `kvx_nic_poll`, `kvx_fail`, `kvx_look`, `kvx_ended`) and of a device that completes two WQEs in their order, and
//! flushes what is behind a failure. Of a completion there are the word that says that it is there, and the one that
//! says why it failed; of a WQE only what it leaves behind.

use std::sync::Arc;

use kvxfer_loom::atomic::{AtomicU64, Ordering, fence};
use kvxfer_loom::{model, thread, weak_model};

use super::Status;

/// Slots, all of which are in use.
const WQES: u64 = 2;
/// What a completion's word says that is there.
const GOOD: u64 = 1;
const FAILED: u64 = 2;
/// Looks that a poster has patience for.
const LOOKS: usize = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Planted {
    Nothing,
    /// Ends are told before the failure among them.
    EndedFirst,
    /// Who waits looks at the failure before it looks at the end.
    FaultFirst,
    /// The failure that was found first stands.
    FirstFound,
    /// Why a completion failed is read with no acquire behind its word.
    NoAcquire,
    /// Ends are told with no acquire behind the completions.
    NoAcquireAtAll,
    /// Everybody reads completions.
    NoTurns,
    /// Slots are given out again though something has failed.
    FaultUnseen,
}

struct Ends {
    completions: [AtomicU64; WQES as usize],
    reasons: [AtomicU64; WQES as usize],
    cq_record: AtomicU64,
    /// What operations leave behind for who waits for them.
    left: [AtomicU64; WQES as usize],
    // Among posters.
    polling: AtomicU64,
    taken: AtomicU64,
    ended: AtomicU64,
    /// `(number + 1) << 8 | status`.
    fault: AtomicU64,
    broken: AtomicU64,
    seen: AtomicU64,
}

impl Ends {
    fn new() -> Arc<Self> {
        let none = || [0; WQES as usize].map(AtomicU64::new);
        Arc::new(Self {
            completions: none(),
            reasons: none(),
            cq_record: AtomicU64::new(0),
            left: none(),
            polling: AtomicU64::new(0),
            taken: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            fault: AtomicU64::new(0),
            broken: AtomicU64::new(0),
            seen: AtomicU64::new(0),
        })
    }

    /// The device ends so many of both, the one of `fails` badly.
    fn serve(&self, count: u64, fails: Option<u64>) {
        for n in 0..count {
            let at = n as usize;
            let reason = match fails {
                Some(first) if first == n => Status::Peer,
                Some(first) if first < n => Status::Flushed,
                _ => Status::Ok,
            };
            let word = match reason {
                Status::Ok => GOOD,
                _ => FAILED,
            };
            self.left[at].store(word, Ordering::Relaxed);
            self.reasons[at].store(reason.number().into(), Ordering::Relaxed);
            self.completions[at].store(word, Ordering::Release);
        }
    }

    /// `kvx_fail`.
    fn fail(&self, number: u64, status: u64, planted: Planted) {
        let (fault, mut known) = ((number + 1) << 8 | status, 0);
        let (success, failure) = (Ordering::AcqRel, Ordering::Acquire);
        loop {
            let swapped = self.fault.compare_exchange(known, fault, success, failure);
            match swapped {
                Ok(_) => break,
                Err(_) if planted == Planted::FirstFound => break,
                Err(found) if found >> 8 <= number + 1 => break,
                Err(found) => known = found,
            }
        }
        self.broken.store(1, Ordering::Release);
    }

    /// `kvx_nic_reap`.
    fn reap(&self, planted: Planted) {
        let (success, failure) = (Ordering::AcqRel, Ordering::Acquire);
        if planted != Planted::NoTurns
            && (self.polling.load(Ordering::Acquire) != 0
                || self
                    .polling
                    .compare_exchange(0, 1, success, failure)
                    .is_err())
        {
            return;
        }
        let first = self.taken.load(Ordering::Acquire);
        let (mut taken, mut failed) = (first, Vec::new());
        while taken < WQES {
            let word = self.completions[taken as usize].load(Ordering::Relaxed);
            if word == 0 {
                break;
            }
            if word == FAILED {
                if !matches!(planted, Planted::NoAcquire | Planted::NoAcquireAtAll) {
                    fence(Ordering::Acquire);
                }
                let reason = self.reasons[taken as usize].load(Ordering::Relaxed);
                match planted {
                    Planted::EndedFirst => failed.push((taken, reason)),
                    _ => self.fail(taken, reason, planted),
                }
            }
            taken += 1;
        }
        if taken != first {
            if planted != Planted::NoAcquireAtAll {
                fence(Ordering::Acquire);
            }
            let before = self.cq_record.swap(taken, Ordering::Relaxed);
            assert!(before < taken, "each is given back once");
            self.taken.store(taken, Ordering::Release);
            self.ended.store(taken, Ordering::Release);
        }
        for (number, reason) in failed {
            self.fail(number, reason, planted);
        }
        if planted != Planted::NoTurns {
            self.polling.store(0, Ordering::Release);
        }
    }

    /// `kvx_ended`: whether it has, and how.
    fn ended(&self, number: u64, planted: Planted) -> Option<u64> {
        let early = self.fault.load(Ordering::Acquire);
        let is_over = self.ended.load(Ordering::Acquire) > number;
        let fault = match planted {
            Planted::FaultFirst => early,
            _ => self.fault.load(Ordering::Acquire),
        };
        is_over.then(|| match fault >> 8 {
            0 => 0,
            first if number + 1 < first => 0,
            first if number + 1 == first => fault & 0xff,
            _ => Status::Flushed.number().into(),
        })
    }

    /// `kvx_wait`.
    fn wait(&self, number: u64, planted: Planted) -> u64 {
        loop {
            self.reap(planted);
            if let Some(status) = self.ended(number, planted) {
                return status;
            }
            thread::yield_now();
        }
    }

    /// `kvx_look`: `false` where something has failed.
    fn look(&self, planted: Planted) -> bool {
        self.reap(planted);
        let ended = self.ended.load(Ordering::Acquire);
        if self.fault.load(Ordering::Acquire) != 0 && planted != Planted::FaultUnseen {
            return false;
        }
        let mut seen = self.seen.load(Ordering::Acquire);
        while seen < ended {
            let (success, failure) = (Ordering::AcqRel, Ordering::Acquire);
            match self.seen.compare_exchange(seen, ended, success, failure) {
                Ok(_) => break,
                Err(found) => seen = found,
            }
        }
        true
    }

    /// `kvx_reserve` of the number behind both, with the patience of some looks: whether there is room.
    fn finds_room(&self, planted: Planted) -> bool {
        for _ in 0..LOOKS {
            if self.broken.load(Ordering::Acquire) != 0 && planted != Planted::FaultUnseen {
                return false;
            }
            if self.seen.load(Ordering::Acquire) > 0 {
                return true;
            }
            if !self.look(planted) {
                return false;
            }
            thread::yield_now();
        }
        false
    }
}

const PEER: u64 = Status::Peer as u64;
const FLUSHED: u64 = Status::Flushed as u64;
const TIMEOUT: u64 = Status::Timeout as u64;

/// Both go well while somebody waits for them, and finds what they have left.
fn all_goes_well(planted: Planted) {
    let ends = Ends::new();
    let device = Arc::clone(&ends);
    let device = thread::spawn(move || device.serve(WQES, None));
    for n in 0..WQES {
        assert_eq!(ends.wait(n, planted), 0);
        let left = ends.left[n as usize].load(Ordering::Relaxed);
        assert_eq!(left, GOOD, "what it has left is there");
    }
    device.join().expect("served");
    assert_eq!(ends.cq_record.load(Ordering::Relaxed), WQES);
}

/// The first one fails while somebody waits for it.
fn the_first_fails(planted: Planted) {
    let ends = Ends::new();
    let device = Arc::clone(&ends);
    let device = thread::spawn(move || device.serve(WQES, Some(0)));
    let told = [0, 1].map(|n| ends.wait(n, planted));
    assert_eq!(told, [PEER, FLUSHED], "what failed has failed");
    device.join().expect("served");
}

/// Two look for two WQEs that have ended, the first of them badly where it is said to fail; nobody who sees an end sees
/// a wrong one.
fn two_look(fails: Option<u64>, planted: Planted) {
    let ends = Ends::new();
    ends.serve(WQES, fails);
    let wanted = match fails {
        Some(_) => [PEER, FLUSHED],
        None => [0, 0],
    };
    let other = Arc::clone(&ends);
    let other = thread::spawn(move || {
        other.reap(planted);
        other.ended(1, planted)
    });
    ends.reap(planted);
    let told = [ends.ended(0, planted), other.join().expect("it has looked")];
    for (told, wanted) in told.into_iter().zip(wanted) {
        assert!(
            told.is_none_or(|told| told == wanted),
            "what failed has failed"
        );
    }
    // Whoever comes later.
    assert_eq!([0, 1].map(|n| ends.wait(n, planted)), wanted);
    assert_eq!(ends.cq_record.load(Ordering::Relaxed), WQES);
}

/// Who gives up its turn fails while the one before it is under way, and that one fails yet.
fn one_gives_up_behind_it(planted: Planted) {
    let ends = Ends::new();
    ends.serve(1, Some(0));
    let other = Arc::clone(&ends);
    let gives_up = thread::spawn(move || other.fail(1, TIMEOUT, planted));
    assert_eq!(ends.wait(0, planted), PEER, "what failed has failed");
    gives_up.join().expect("it has");
    let fault = ends.fault.load(Ordering::Acquire);
    assert_eq!(fault, 1 << 8 | PEER, "the first one stands");
}

/// The slot of what has failed is not used again, so that a wait which comes late finds it.
fn a_slot_has_failed(planted: Planted) {
    let ends = Ends::new();
    ends.serve(1, Some(0));
    let other = Arc::clone(&ends);
    let poster = thread::spawn(move || other.finds_room(planted));
    ends.reap(planted);
    let has_room = poster.join().expect("it has ended");
    assert!(!has_room, "its slot is used again");
    assert_eq!(ends.wait(0, planted), PEER, "what failed has failed");
}

#[test]
fn loom_ends_of_wqes_bring_what_they_left() {
    model(|| all_goes_well(Planted::Nothing));
}

#[test]
fn loom_a_wqe_that_fails_flushes_what_is_behind_it() {
    model(|| the_first_fails(Planted::Nothing));
}

#[test]
fn loom_two_who_look_for_ends_find_the_same() {
    model(|| two_look(None, Planted::Nothing));
    model(|| two_look(Some(0), Planted::Nothing));
}

#[test]
fn loom_who_gives_up_hides_no_failure_before_it() {
    model(|| one_gives_up_behind_it(Planted::Nothing));
}

#[test]
fn loom_the_slot_of_a_failed_wqe_is_not_used_again() {
    model(|| a_slot_has_failed(Planted::Nothing));
}

#[test]
#[should_panic(expected = "what failed has failed")]
fn loom_planted_end_before_the_failure() {
    model(|| two_look(Some(0), Planted::EndedFirst));
}

#[test]
#[should_panic(expected = "what failed has failed")]
fn loom_planted_failure_looked_at_first() {
    model(|| two_look(Some(0), Planted::FaultFirst));
}

#[test]
#[should_panic(expected = "what failed has failed")]
fn loom_planted_failure_that_was_found_first() {
    model(|| one_gives_up_behind_it(Planted::FirstFound));
}

#[test]
#[should_panic(expected = "what failed has failed")]
fn loom_planted_reason_with_no_acquire() {
    model(|| the_first_fails(Planted::NoAcquire));
}

#[test]
#[should_panic(expected = "what it has left is there")]
fn loom_planted_ends_with_no_acquire() {
    model(|| all_goes_well(Planted::NoAcquireAtAll));
}

#[test]
#[should_panic(expected = "each is given back once")]
fn loom_planted_no_turns_at_completions() {
    model(|| two_look(None, Planted::NoTurns));
}

#[test]
#[should_panic(expected = "its slot is used again")]
fn loom_planted_slot_of_a_failed_wqe() {
    model(|| a_slot_has_failed(Planted::FaultUnseen));
}

#[test]
#[should_panic(expected = "what it has left is there")]
fn loom_planted_no_orderings_of_ends() {
    weak_model(|| all_goes_well(Planted::Nothing));
}
