//! The ring between posters and their consumer, for loom. The consumer is the real one. The poster is
//! a *transliteration* of `kernels/post.h` (`kvx_reserve`, `kvx_look`, `kvx_ring_write`, `kvx_ended`), which no
//! tool for Rust can run: what is found here holds for the header as far as it says the same. Of a
//! descriptor's words only three are there: the first, the ticket and the last.

use std::convert::Infallible;
use std::sync::Arc;

use kvxfer_loom::atomic::{AtomicU64, Ordering, fence};
use kvxfer_loom::{model, thread, weak_model};

use super::{Consumer, Descriptor, End, PostOp, RingWords, Status, Taken, WORDS, Word};

/// The words that are there of a descriptor.
const THERE: [u32; 3] = [0, 4, WORDS - 1];

/// Looks that a poster has patience for. What it does not see by then it would see as well later.
const LOOKS: usize = 4;

struct Slot {
    words: [AtomicU64; 3],
    done: AtomicU64,
}

struct Ring {
    depth: u32,
    slots: Vec<Slot>,
    ended: AtomicU64,
    fault: AtomicU64,
    // Among posters.
    next: AtomicU64,
    seen: AtomicU64,
    broken: AtomicU64,
    /// What an operation leaves behind for who waits for it.
    left: AtomicU64,
}

impl Ring {
    fn new(depth: u32) -> Arc<Self> {
        let slots = (0..depth).map(|slot| Slot {
            words: [0, 0, Consumer::unwritten(depth, 0, slot)].map(AtomicU64::new),
            done: AtomicU64::new(0),
        });
        Arc::new(Self {
            depth,
            slots: slots.collect(),
            ended: AtomicU64::new(0),
            fault: AtomicU64::new(0),
            next: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            broken: AtomicU64::new(0),
            left: AtomicU64::new(0),
        })
    }

    fn word(&self, word: Word) -> Option<&AtomicU64> {
        match word {
            Word::Slot { slot, word } => {
                let at = THERE.iter().position(|there| *there == word)?;
                self.slots[slot as usize].words.get(at)
            }
            Word::Done { slot } => Some(&self.slots[slot as usize].done),
            Word::Ended => Some(&self.ended),
            Word::Fault => Some(&self.fault),
        }
    }

    fn slot(&self, ticket: u64) -> &Slot {
        &self.slots[(ticket & u64::from(self.depth - 1)) as usize]
    }
}

impl RingWords for Ring {
    type Error = Infallible;

    fn load(&self, word: Word) -> Result<u64, Infallible> {
        let word = self.word(word);
        Ok(word.map_or(0, |word| word.load(Ordering::Acquire)))
    }

    fn store(&self, word: Word, value: u64) -> Result<(), Infallible> {
        if let Some(word) = self.word(word) {
            word.store(value, Ordering::Release);
        }
        Ok(())
    }
}

/// Faults that are planted in the poster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Planted {
    Nothing,
    /// `KVX_PHASE_FIRST`.
    PhaseFirst,
    /// No release before the phase.
    NoRelease,
    /// The fault is looked at before what makes it seen.
    FaultFirst,
    /// No acquire after the wait.
    NoAcquire,
}

fn post_of(ticket: u64) -> Descriptor {
    let end = |addr| End::Address { addr, key: 0 };
    Descriptor {
        ticket,
        op: PostOp::Put,
        local: end(100 + ticket),
        remote: end(0),
        len: 0,
    }
}

impl Ring {
    /// `kvx_look`: `false` where something has failed.
    fn look(&self, planted: Planted) -> bool {
        let early = self.fault.load(Ordering::Relaxed);
        let ended = self.ended.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let fault = match planted {
            Planted::FaultFirst => early,
            _ => self.fault.load(Ordering::Relaxed),
        };
        if fault != 0 {
            self.broken.store(1, Ordering::Release);
            return false;
        }
        let mut seen = self.seen.load(Ordering::Acquire);
        while seen < ended {
            let swapped =
                self.seen
                    .compare_exchange(seen, ended, Ordering::AcqRel, Ordering::Acquire);
            match swapped {
                Ok(_) => break,
                Err(found) => seen = found,
            }
        }
        true
    }

    /// `kvx_reserve`, with the patience of some looks.
    fn reserve(&self, planted: Planted) -> Option<u64> {
        for _ in 0..LOOKS {
            if self.broken.load(Ordering::Acquire) != 0 {
                return None;
            }
            let next = self.next.load(Ordering::Acquire);
            let ahead = next.wrapping_sub(self.seen.load(Ordering::Acquire));
            if ahead < self.depth.into() {
                let swapped =
                    self.next
                        .compare_exchange(next, next + 1, Ordering::AcqRel, Ordering::Acquire);
                if swapped.is_ok() {
                    return Some(next);
                }
            } else if !self.look(planted) {
                return None;
            }
            thread::yield_now();
        }
        None
    }

    /// `kvx_ring_write`.
    fn write(&self, ticket: u64, planted: Planted) {
        let words = post_of(ticket).encode(self.depth);
        let slot = self.slot(ticket);
        let [first, number, last] = THERE.map(|at| words[at as usize]);
        if planted == Planted::PhaseFirst {
            fence(Ordering::Release);
            slot.words[2].store(last, Ordering::Relaxed);
        }
        slot.words[0].store(first, Ordering::Relaxed);
        slot.words[1].store(number, Ordering::Relaxed);
        if planted != Planted::PhaseFirst {
            if planted != Planted::NoRelease {
                fence(Ordering::Release);
            }
            slot.words[2].store(last, Ordering::Relaxed);
        }
    }

    /// `kvx_wait`.
    fn wait(&self, ticket: u64, planted: Planted) -> u64 {
        loop {
            let word = self.slot(ticket).done.load(Ordering::Relaxed);
            if word >> 8 > ticket {
                if planted != Planted::NoAcquire {
                    fence(Ordering::Acquire);
                }
                let own = word >> 8 == ticket + 1;
                return if own { word & 0xff } else { 0 };
            }
            thread::yield_now();
        }
    }

    /// Takes and completes so many posts; the one of `fails` fails.
    fn serve(&self, posts: usize, fails: Option<u64>) -> Consumer {
        let mut consumer = Consumer::new(self.depth, 0).expect("a power of two");
        let mut taken = 0;
        while taken < posts {
            match consumer.take(self) {
                Ok(Some(Taken::Post(post))) => {
                    assert_eq!(post, post_of(post.ticket), "whole");
                    self.left.store(post.ticket + 1, Ordering::Relaxed);
                    let status = match fails {
                        Some(ticket) if ticket == post.ticket => Status::Peer,
                        _ => Status::Ok,
                    };
                    let Ok(ended) = consumer.complete(self, post.ticket, status);
                    ended.expect("it is under way");
                    taken += 1;
                }
                Ok(Some(other)) => panic!("{other:?}"),
                Ok(None) => thread::yield_now(),
            }
        }
        consumer
    }
}

/// One poster goes over the ring's end, and waits for each.
fn over_the_end(planted: Planted) {
    let ring = Ring::new(1);
    let others = Arc::clone(&ring);
    let consumer = thread::spawn(move || others.serve(2, None));
    for _ in 0..2 {
        let ticket = ring.reserve(planted).expect("nothing fails");
        ring.write(ticket, planted);
        assert_eq!(ring.wait(ticket, planted), 0);
        // What the operation has left is there.
        assert!(ring.left.load(Ordering::Relaxed) > ticket, "not there");
    }
    consumer.join().expect("served");
}

#[test]
fn loom_posts_arrive_whole_and_ends_bring_what_they_left() {
    model(|| over_the_end(Planted::Nothing));
}

#[test]
#[should_panic(expected = "whole")]
fn loom_planted_phase_first() {
    model(|| over_the_end(Planted::PhaseFirst));
}

#[test]
#[should_panic(expected = "whole")]
fn loom_planted_no_release() {
    model(|| over_the_end(Planted::NoRelease));
}

#[test]
#[should_panic(expected = "not there")]
fn loom_planted_no_acquire_after_the_wait() {
    model(|| over_the_end(Planted::NoAcquire));
}

#[test]
#[should_panic(expected = "whole")]
fn loom_planted_no_orderings() {
    weak_model(|| over_the_end(Planted::Nothing));
}

/// Two posters want the one slot that becomes free.
#[test]
fn loom_posters_never_share_a_slot() {
    model(|| {
        let ring = Ring::new(1);
        let ticket = ring.reserve(Planted::Nothing).expect("there is room");
        ring.write(ticket, Planted::Nothing);
        let (served, posted) = (Arc::clone(&ring), Arc::clone(&ring));
        let consumer = thread::spawn(move || served.serve(1, None));
        let post = |ring: &Ring| {
            let ticket = ring.reserve(Planted::Nothing);
            ticket.inspect(|ticket| ring.write(*ticket, Planted::Nothing))
        };
        let poster = thread::spawn(move || post(&posted));
        let mine = post(&ring);
        let others = poster.join().expect("ended");
        let mut consumer = consumer.join().expect("served");
        assert!(mine.is_none() || others.is_none(), "one slot for two");
        let Ok(taken) = consumer.take(&*ring);
        let wanted = mine.or(others).map(|ticket| Taken::Post(post_of(ticket)));
        assert_eq!(taken, wanted);
    });
}

/// The slot of what has failed is not used again, so that a wait which comes late finds it.
fn failed_slot(planted: Planted) {
    let ring = Ring::new(1);
    let (served, posted) = (Arc::clone(&ring), Arc::clone(&ring));
    let ticket = ring.reserve(planted).expect("there is room");
    ring.write(ticket, planted);
    let consumer = thread::spawn(move || served.serve(1, Some(0)));
    let poster = thread::spawn(move || posted.reserve(planted));
    assert_eq!(ring.wait(ticket, planted), u64::from(Status::Peer.number()));
    assert_eq!(
        poster.join().expect("ended"),
        None,
        "the slot is used again"
    );
    consumer.join().expect("served");
}

#[test]
fn loom_a_failed_slot_is_not_used_again() {
    model(|| failed_slot(Planted::Nothing));
}

#[test]
#[should_panic(expected = "used again")]
fn loom_planted_fault_looked_at_first() {
    model(|| failed_slot(Planted::FaultFirst));
}
