//! The consumer of a ring: words go in, posts come out, and ends go back.

use super::descriptor::{Descriptor, DescriptorFault, WORDS, phase, phase_of};
use super::status::Status;

/// A word of eight bytes that posters and their consumer share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Word {
    /// Of a descriptor.
    Slot {
        /// Which slot.
        slot: u32,
        /// Which of its words.
        word: u32,
    },
    /// How the post of a slot has ended.
    Done {
        /// Which slot.
        slot: u32,
    },
    /// How many have ended.
    Ended,
    /// What has failed first.
    Fault,
}

/// The words of a ring, in memory that a device reads and writes too.
pub trait RingWords {
    /// Why a word cannot be reached.
    type Error;

    /// Loads a word with acquire order.
    ///
    /// # Errors
    ///
    /// Where it cannot be reached.
    fn load(&self, word: Word) -> Result<u64, Self::Error>;

    /// Stores a word with release order.
    ///
    /// # Errors
    ///
    /// Where it cannot be reached.
    fn store(&self, word: Word, value: u64) -> Result<(), Self::Error>;
}

/// What was in a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// A post, which is under way until its [`complete`](Consumer::complete).
    Post(Descriptor),
    /// No post that makes sense. It has ended; its poster is told why.
    Refused(DescriptorFault),
    /// A post behind a failure. It has ended, flushed.
    Flushed(u64),
}

/// What was said to have ended is not under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("post {ticket} is not under way: {ended} have ended, {taken} were taken")]
pub struct NotUnderWay {
    /// Which post.
    pub ticket: u64,
    /// All below have ended.
    pub ended: u64,
    /// All below have been taken.
    pub taken: u64,
}

/// What a descriptor's words are overwritten with once they are read.
const POISON: u64 = 0xa5a5_a5a5_a5a5_a5a5;

/// The consumer of a ring. One thread's at a time.
#[derive(Debug)]
pub struct Consumer {
    depth: u32,
    /// The ticket that is looked for.
    next: u64,
    /// All below have ended.
    ended: u64,
    /// Of the slots, which are taken and have not ended; and how many those are.
    under_way: Vec<bool>,
    open: usize,
    failed: bool,
}

impl Consumer {
    /// The consumer of a ring whose first ticket is `first`; `None` where the depth is no power of two.
    #[must_use]
    pub fn new(depth: u32, first: u64) -> Option<Self> {
        depth.is_power_of_two().then(|| Self {
            depth,
            next: first,
            ended: first,
            under_way: vec![false; depth as usize],
            open: 0,
            failed: false,
        })
    }

    /// The word that a slot's last word must hold before its ring is used, so that it is none of the
    /// first lap's.
    #[must_use]
    pub fn unwritten(depth: u32, first: u64, slot: u32) -> u64 {
        let mask = u64::from(depth - 1);
        let ahead = u64::from(slot).wrapping_sub(first) & mask;
        u64::from(phase(first.wrapping_add(ahead), depth).wrapping_sub(1)) << 56
    }

    /// Slots.
    #[must_use]
    pub fn depth(&self) -> u32 {
        self.depth
    }

    /// All posts below this one have been taken.
    #[must_use]
    pub fn taken(&self) -> u64 {
        self.next
    }

    /// Posts that were taken and have not ended.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.open
    }

    /// All posts below this one have ended.
    #[must_use]
    pub fn ended(&self) -> u64 {
        self.ended
    }

    /// Whether something has failed, so that no post is carried out any more.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.failed
    }

    fn slot(&self, ticket: u64) -> u32 {
        // Below the depth.
        (ticket & u64::from(self.depth - 1)) as u32
    }

    /// Takes the next post, if it is there.
    ///
    /// # Errors
    ///
    /// Where a word cannot be reached.
    pub fn take<W: RingWords>(&mut self, words: &W) -> Result<Option<Taken>, W::Error> {
        let ticket = self.next;
        if ticket - self.ended >= self.depth.into() {
            // Nobody may have posted there yet.
            return Ok(None);
        }
        let slot = self.slot(ticket);
        let at = |word| Word::Slot { slot, word };
        let last = words.load(at(WORDS - 1))?;
        if phase_of(last) != phase(ticket, self.depth) {
            return Ok(None);
        }
        let mut found = [0; WORDS as usize];
        for (to, word) in found.iter_mut().zip(0..WORDS - 1) {
            *to = words.load(at(word))?;
            words.store(at(word), POISON)?;
        }
        if let Some(to) = found.last_mut() {
            *to = last;
        }
        // The phase stays this lap's: it is not the next one's.
        let phase = u64::from(phase_of(last)) << 56;
        words.store(at(WORDS - 1), POISON >> 8 | phase)?;
        self.next += 1;
        if let Some(under_way) = self.under_way.get_mut(slot as usize) {
            *under_way = true;
            self.open += 1;
        }
        match Descriptor::decode(found, ticket) {
            Err(fault) => {
                self.end(words, ticket, fault.status())?;
                Ok(Some(Taken::Refused(fault)))
            }
            Ok(_) if self.failed => {
                self.end(words, ticket, Status::Flushed)?;
                Ok(Some(Taken::Flushed(ticket)))
            }
            Ok(post) => Ok(Some(Taken::Post(post))),
        }
    }

    /// A post that was taken has ended: its poster is told. In any order.
    ///
    /// # Errors
    ///
    /// [`NotUnderWay`] inside, where it has ended before or was never taken, and nothing is told; the outer one where
    /// a word cannot be reached.
    pub fn complete<W: RingWords>(
        &mut self,
        words: &W,
        ticket: u64,
        status: Status,
    ) -> Result<Result<(), NotUnderWay>, W::Error> {
        self.complete_each(words, [ticket], status)
    }

    /// The same for several posts, with one look at how many have ended. Those that are not under way are left out; the
    /// first of them is the error.
    ///
    /// # Errors
    ///
    /// As [`complete`](Self::complete).
    pub fn complete_each<W: RingWords>(
        &mut self,
        words: &W,
        tickets: impl IntoIterator<Item = u64>,
        status: Status,
    ) -> Result<Result<(), NotUnderWay>, W::Error> {
        let mut all = Ok(());
        for ticket in tickets {
            if self.is_under_way(ticket) {
                self.tell(words, ticket, status)?;
            } else if all.is_ok() {
                all = Err(NotUnderWay {
                    ticket,
                    ended: self.ended,
                    taken: self.next,
                });
            }
        }
        self.advance(words)?;
        Ok(all)
    }

    fn is_under_way(&self, ticket: u64) -> bool {
        let known = (self.ended..self.next).contains(&ticket);
        let slot = self.slot(ticket) as usize;
        known && self.under_way.get(slot).is_some_and(|slot| *slot)
    }

    /// Takes no more: what comes is flushed, and posters that look are told why. What is under way is not
    /// touched.
    ///
    /// # Errors
    ///
    /// Where a word cannot be reached.
    pub fn close<W: RingWords>(&mut self, words: &W, why: Status) -> Result<(), W::Error> {
        self.fail(words, self.next, why)
    }

    /// All that is under way has ended, in the same way.
    ///
    /// # Errors
    ///
    /// Where a word cannot be reached.
    pub fn complete_all<W: RingWords>(
        &mut self,
        words: &W,
        status: Status,
    ) -> Result<(), W::Error> {
        // Those that have ended before are left out.
        let _left_out = self.complete_each(words, self.ended..self.next, status)?;
        Ok(())
    }

    /// Keeps the first failure.
    fn fail<W: RingWords>(
        &mut self,
        words: &W,
        ticket: u64,
        status: Status,
    ) -> Result<(), W::Error> {
        if self.failed {
            return Ok(());
        }
        self.failed = true;
        words.store(Word::Fault, told(ticket, status))
    }

    fn end<W: RingWords>(
        &mut self,
        words: &W,
        ticket: u64,
        status: Status,
    ) -> Result<(), W::Error> {
        self.tell(words, ticket, status)?;
        self.advance(words)
    }

    /// Says of a post that is under way how it has ended. Its slot is not free before [`advance`](Self::advance).
    fn tell<W: RingWords>(
        &mut self,
        words: &W,
        ticket: u64,
        status: Status,
    ) -> Result<(), W::Error> {
        let slot = self.slot(ticket);
        if status != Status::Ok {
            // Before anybody can see that the slot is free.
            self.fail(words, ticket, status)?;
        }
        words.store(Word::Done { slot }, told(ticket, status))?;
        if let Some(under_way) = self.under_way.get_mut(slot as usize) {
            *under_way = false;
            self.open -= 1;
        }
        Ok(())
    }

    /// Says how many have ended.
    fn advance<W: RingWords>(&mut self, words: &W) -> Result<(), W::Error> {
        let before = self.ended;
        while self.ended < self.next {
            let slot = self.slot(self.ended) as usize;
            if self.under_way.get(slot).is_none_or(|slot| *slot) {
                break;
            }
            self.ended += 1;
        }
        if self.ended != before {
            words.store(Word::Ended, self.ended)?;
        }
        Ok(())
    }
}

/// How a ticket's end is told.
fn told(ticket: u64, status: Status) -> u64 {
    ticket.wrapping_add(1) << 8 | u64::from(status.number())
}
