//! A ring's words in memory of the host that a device reaches too.

use super::consumer::{Consumer, RingWords, Word};
use super::descriptor::WORDS;
use crate::error::Error;
use crate::kernels::queue::{PROXY, Queue};
use crate::memory::HostMemory;

/// Bytes of a descriptor.
const SLOT: u64 = 8 * WORDS as u64;
/// Bytes of the report, on a line of its own.
const REPORT: u64 = 64;

/// The words of a proxy ring, in pinned memory (or any other of the host, for the host build).
///
/// In this order: the descriptors, a completion word for each slot, the report.
#[derive(Debug, Clone)]
pub struct ProxyRing {
    memory: HostMemory,
    depth: u32,
}

/// Where the rest of a ring is, by the addresses of the device that posts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingAddresses {
    /// The ring's memory.
    pub ring: u64,
    /// A [`QueueState`](crate::kernels::queue::QueueState) in the device's own memory.
    pub state: u64,
    /// A 32-bit word in the device's own memory.
    pub abort: u64,
}

impl ProxyRing {
    /// The bytes that a ring of this depth takes.
    #[must_use]
    pub fn bytes(depth: u32) -> u64 {
        u64::from(depth) * (SLOT + 8) + REPORT
    }

    /// Makes a ring, and its consumer, of memory that nobody uses yet. Its first ticket is `first`.
    ///
    /// # Errors
    ///
    /// [`Error::Depth`] where the depth is no power of two; [`Error::OutOfBounds`] or
    /// [`Error::Misaligned`] where the memory is too small or not aligned to 8 bytes.
    pub fn new(memory: HostMemory, depth: u32, first: u64) -> Result<(Self, Consumer), Error> {
        let consumer = Consumer::new(depth, first).ok_or(Error::Depth { depth })?;
        memory.fill(0, Self::bytes(depth), 0)?;
        // A word that is read before it is written looks like none that was.
        memory.fill(0, u64::from(depth) * SLOT, 0xa5)?;
        let ring = Self { memory, depth };
        for slot in 0..depth {
            let word = Word::Slot {
                slot,
                word: WORDS - 1,
            };
            ring.store(word, Consumer::unwritten(depth, first, slot))?;
        }
        ring.store(Word::Ended, first)?;
        Ok((ring, consumer))
    }

    /// The queue as kernels get it; `patience` is in ticks of the device's steady clock.
    #[must_use]
    pub fn queue(&self, at: RingAddresses, patience: u64) -> Queue {
        Queue {
            slots: at.ring,
            words: at.ring + self.offset(Word::Done { slot: 0 }),
            state: at.state,
            report: at.ring + self.offset(Word::Ended),
            abort: at.abort,
            patience,
            kind: PROXY,
            depth: self.depth,
            ..Queue::default()
        }
    }

    /// Slots.
    #[must_use]
    pub fn depth(&self) -> u32 {
        self.depth
    }

    fn offset(&self, word: Word) -> u64 {
        let depth = u64::from(self.depth);
        match word {
            Word::Slot { slot, word } => u64::from(slot) * SLOT + 8 * u64::from(word),
            Word::Done { slot } => depth * SLOT + 8 * u64::from(slot),
            Word::Ended => depth * (SLOT + 8),
            Word::Fault => depth * (SLOT + 8) + 8,
        }
    }
}

impl RingWords for ProxyRing {
    type Error = Error;

    fn load(&self, word: Word) -> Result<u64, Error> {
        self.memory.load_u64(self.offset(word))
    }

    fn store(&self, word: Word, value: u64) -> Result<(), Error> {
        self.memory.store_u64(self.offset(word), value)
    }
}
