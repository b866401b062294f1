//! A lane (one queue pair): what is posted on it, oldest first, and what its ids mean.
//!
//! A posted work request's id says the life of the lane, the batch and the place in the batch:
//!
//! ```text
//!  63      52 51            20 19           0
//!  lane life │ batch number   │ index in batch
//! ```
//!
//! Batches of a lane are numbered in a row, so the number finds the batch's slot without a table
//! and is its generation too: an id of an earlier batch, of an earlier lane with the same
//! [`LaneId`], or of somebody else's work falls outside the window of what is posted.

use std::collections::VecDeque;
use std::fmt;

use super::Cause;

const INDEX_BITS: u32 = 20;
const NUMBER_BITS: u32 = 32;
const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;

/// The most operations a batch can hold.
pub(super) const MAX_BATCH: u64 = 1 << INDEX_BITS;

/// A lane of one scheduler. Numbers are small and used again after a lane is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LaneId(pub u32);

impl fmt::Display for LaneId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lane {}", self.0)
    }
}

/// What a lane can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneLimits {
    /// Entries of its send queue; at least 1.
    pub send_wr: u32,
    /// The pair of rails that it joins, as its session numbers them: work that one pair cannot move goes to
    /// lanes of another.
    pub pair: u16,
    /// Whether its session rebuilds it when it fails alone: then the work on it goes on, and waits for that if
    /// the peer has no other.
    pub rebuilt: bool,
}

/// What a posted batch is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// Operations from `first_op` on of the job in a scheduler's slot.
    Job {
        slot: u32,
        first_op: u64,
        tries: u32,
    },
    /// One work request of the worker's own.
    Single { token: u64 },
}

/// A posted batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Posted {
    pub(super) what: Use,
    pub(super) n: u32,
    /// How many of its first work requests are accounted for.
    pub(super) accounted: u32,
    pub(super) bytes: u64,
}

/// Why a lane takes nothing more.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) cause: Cause,
    /// Whether a completion has named the work request that failed.
    pub(super) named: bool,
    /// Whether what was posted may still be carried out by the peer.
    pub(super) in_doubt: bool,
    /// Whether the request that was named went to another rail, as all others.
    pub(super) moved: bool,
}

#[derive(Debug)]
pub(super) struct Lane {
    /// Index of the peer in the scheduler.
    pub(super) peer: u32,
    /// The lane's life, in place for an id.
    life: u64,
    pub(super) pair: u16,
    pub(super) rebuilt: bool,
    pub(super) send_wr: u32,
    /// Free entries of the send queue.
    pub(super) credits: u32,
    /// Entries kept for the worker's own work requests.
    pub(super) reserve: u32,
    /// Number of the oldest posted batch.
    head: u32,
    pub(super) posted: VecDeque<Posted>,
    pub(super) failure: Option<Failure>,
    /// Slots of jobs whose writes were lost with it and posted again elsewhere, while the peer may carry the
    /// lost ones out yet; each once.
    pub(super) doubts: Vec<u32>,
}

impl Lane {
    pub(super) fn new(peer: u32, life: u64, limits: LaneLimits) -> Self {
        let send_wr = limits.send_wr.max(1);
        Self {
            peer,
            life: (life & 0xfff) << (INDEX_BITS + NUMBER_BITS),
            pair: limits.pair,
            rebuilt: limits.rebuilt,
            send_wr,
            credits: send_wr,
            reserve: (send_wr / 16).min(4),
            head: 0,
            posted: VecDeque::new(),
            failure: None,
            doubts: Vec::new(),
        }
    }

    /// How many operations of jobs it can take now.
    pub(super) fn room(&self) -> u32 {
        if self.failure.is_some() {
            0
        } else {
            self.credits.saturating_sub(self.reserve)
        }
    }

    /// Takes the credits of `batch` and gives its first work request's id.
    pub(super) fn push(&mut self, batch: Posted) -> u64 {
        debug_assert!(
            batch.n >= 1 && batch.n <= self.credits,
            "posting without credits"
        );
        self.credits -= batch.n;
        // Lossless: no more batches than credits, which are 32 bits wide.
        #[allow(clippy::cast_possible_truncation)]
        let number = self.head.wrapping_add(self.posted.len() as u32);
        self.posted.push_back(batch);
        self.life | u64::from(number) << INDEX_BITS
    }

    /// Finds a posted, not yet accounted work request: the batch's position, oldest 0, and its
    /// index in the batch.
    pub(super) fn find(&self, wr_id: u64) -> Option<(usize, u32)> {
        if wr_id >> (INDEX_BITS + NUMBER_BITS) != self.life >> (INDEX_BITS + NUMBER_BITS) {
            return None;
        }
        // Truncation takes the number's 32 bits.
        #[allow(clippy::cast_possible_truncation)]
        let number = (wr_id >> INDEX_BITS) as u32;
        let at = number.wrapping_sub(self.head) as usize;
        #[allow(clippy::cast_possible_truncation)]
        let index = (wr_id & INDEX_MASK) as u32;
        let batch = self.posted.get(at)?;
        (index >= batch.accounted && index < batch.n).then_some((at, index))
    }

    /// Takes the oldest batch out and gives the credits of what was not yet accounted back.
    pub(super) fn pop(&mut self) -> Option<Posted> {
        let batch = self.posted.pop_front()?;
        self.head = self.head.wrapping_add(1);
        self.credits += batch.n - batch.accounted;
        Some(batch)
    }

    /// Takes the newest batch out, as if it had never been posted. Its number is used again.
    pub(super) fn unpost(&mut self) -> Option<Posted> {
        let batch = self.posted.pop_back()?;
        self.credits += batch.n - batch.accounted;
        Some(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(n: u32) -> Posted {
        Posted {
            what: Use::Single { token: 0 },
            n,
            accounted: 0,
            bytes: 0,
        }
    }

    #[test]
    fn ids_find_their_batch_and_no_other() {
        let mut lane = Lane::new(
            0,
            7,
            LaneLimits {
                send_wr: 16,
                pair: 0,
                rebuilt: false,
            },
        );
        let a = lane.push(batch(3));
        let b = lane.push(batch(2));
        assert_eq!(lane.find(a + 2), Some((0, 2)));
        assert_eq!(lane.find(b), Some((1, 0)));
        assert_eq!(lane.find(b + 2), None, "past the end of its batch");
        assert_eq!(lane.find(a ^ (1 << 52)), None, "another life of the lane");
        assert_eq!(lane.find(b + (1 << INDEX_BITS)), None, "not posted yet");
        lane.pop();
        assert_eq!(lane.find(a), None, "retired");
        assert_eq!(lane.find(b), Some((0, 0)));
        assert_eq!(lane.credits, 14);
    }

    #[test]
    fn numbers_wrap() {
        let mut lane = Lane::new(
            0,
            1,
            LaneLimits {
                send_wr: 4,
                pair: 0,
                rebuilt: false,
            },
        );
        lane.head = u32::MAX;
        let a = lane.push(batch(1));
        let b = lane.push(batch(1));
        assert_eq!(lane.find(a), Some((0, 0)));
        assert_eq!(lane.find(b), Some((1, 0)));
        lane.pop();
        assert_eq!(lane.find(a), None);
        assert_eq!(lane.find(b), Some((0, 0)));
    }
}
