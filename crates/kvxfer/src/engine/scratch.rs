//! Where the lease slots of producers land, and this producer's own table of them.

use std::sync::{Arc, Mutex, PoisonError};

use kvxfer_hipmem::{ArenaOptions, HostArena, HostMemory, HugePages};
use kvxfer_verbs::Memory;

use crate::error::Error;
use crate::leases::{LeaseWord, SLOT_BYTES};
use crate::sync::atomic::{Ordering, fence};

/// Slots for lease checks that are under way.
#[derive(Debug)]
pub(crate) struct Landings {
    memory: HostMemory,
    free: Mutex<Vec<u32>>,
}

fn small_arena(slots: u32) -> Result<HostMemory, Error> {
    let bytes = u64::from(slots).saturating_mul(SLOT_BYTES as u64).max(4096);
    let arena = HostArena::with_options(
        bytes,
        ArenaOptions {
            huge: HugePages::Never,
            prefault: true,
        },
    )?;
    Ok(arena.memory().clone())
}

impl Landings {
    pub(crate) fn new(slots: u32) -> Result<Self, Error> {
        Ok(Self {
            memory: small_arena(slots)?,
            free: Mutex::new((0..slots).rev().collect()),
        })
    }

    pub(crate) fn memory(&self) -> Arc<dyn Memory> {
        self.memory.as_memory()
    }

    pub(crate) fn take(&self) -> Option<u32> {
        self.free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop()
    }

    #[cfg(test)]
    pub(crate) fn free(&self) -> usize {
        self.free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    pub(crate) fn give(&self, slot: u32) {
        self.free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(slot);
    }

    /// Whether the slot that landed shows the offer with this word.
    pub(crate) fn shows(&self, slot: u32, word: u64) -> bool {
        let at = u64::from(slot) * SLOT_BYTES as u64;
        shown(|offset| self.memory.load_u64(at + offset)).is_ok_and(|shown| shown.is_live_for(word))
    }
}

/// What a slot shows, by a load of the words at 0 and 8.
fn shown<E>(load: impl Fn(u64) -> Result<u64, E>) -> Result<LeaseWord, E> {
    Ok(LeaseWord {
        word: u64::from_le(load(0)?),
        check: u64::from_le(load(8)?),
    })
}

/// Makes a slot show something else, by a release store to the words at 0 and 8.
pub(crate) fn turn_over<E>(
    word: LeaseWord,
    mut store: impl FnMut(u64, u64) -> Result<(), E>,
) -> Result<(), E> {
    // The check word first when a lease ends: a reader never sees a dead slot as live, for the
    // pair must match.
    store(8, word.check.to_le())?;
    store(0, word.word.to_le())?;
    // Later writes to the blocks must not be seen before the flip.
    fence(Ordering::SeqCst);
    Ok(())
}

/// The producer's lease slots, which readers read.
#[derive(Debug)]
pub(crate) struct LeaseTable {
    memory: HostMemory,
}

impl LeaseTable {
    pub(crate) fn new(slots: u32) -> Result<Self, Error> {
        Ok(Self {
            memory: small_arena(slots)?,
        })
    }

    pub(crate) fn memory(&self) -> Arc<dyn Memory> {
        self.memory.as_memory()
    }

    /// Writes the slot. When it returns, a reader that begins to read sees the new word.
    pub(crate) fn flip(&self, slot: u32, word: LeaseWord) -> Result<(), Error> {
        let at = u64::from(slot) * SLOT_BYTES as u64;
        Ok(turn_over(word, |offset, value| {
            self.memory.store_u64(at + offset, value)
        })?)
    }
}

#[cfg(all(loom, test))]
mod loom_tests {
    use std::convert::Infallible;

    use kvxfer_loom::{model, thread, weak_model};

    use super::*;
    use crate::sync::atomic::AtomicU64;

    /// A producer's slot, the word of the block that is on offer, and a consumer's landing slot. The
    /// producer's are shared memory, which loom knows as atomics alone.
    struct Host {
        slot: [AtomicU64; 2],
        block: AtomicU64,
    }

    const WORD: u64 = 7;
    const OFFERED: u64 = 1;
    const RECYCLED: u64 = 2;

    impl Host {
        fn new() -> Self {
            let host = Self {
                slot: [AtomicU64::new(0), AtomicU64::new(0)],
                block: AtomicU64::new(OFFERED),
            };
            host.turn_over(LeaseWord::live(WORD));
            host
        }

        fn turn_over(&self, word: LeaseWord) {
            // As `HostMemory::store_u64`.
            let store = |at: u64, value| {
                self.slot[at as usize / 8].store(value, Ordering::Release);
                Ok::<_, Infallible>(())
            };
            let _ = turn_over(word, store);
        }

        /// What the software device does for two READs: copies without an order of their own, and
        /// after each a look at the key, which begins with this fence.
        fn read(&self) -> (u64, LeaseWord) {
            let block = self.block.load(Ordering::Relaxed);
            fence(Ordering::Acquire);
            // A copy goes whichever way it likes.
            let check = self.slot[1].load(Ordering::Relaxed);
            let landed = [self.slot[0].load(Ordering::Relaxed), check];
            let shown = shown(|at| Ok::<_, Infallible>(landed[at as usize / 8]));
            (block, shown.unwrap_or(LeaseWord::DEAD))
        }
    }

    fn a_live_lease_means_the_block_is_good(recycle: fn(&Host)) {
        let host = Arc::new(Host::new());
        let producers = Arc::clone(&host);
        let producer = thread::spawn(move || recycle(&producers));
        let (block, shown) = host.read();
        if shown.is_live_for(WORD) {
            assert_eq!(block, OFFERED);
        }
        producer.join().expect("recycled");
    }

    /// The lease ends, the block is used again, and so is the slot.
    fn in_order(host: &Host) {
        host.turn_over(LeaseWord::DEAD);
        host.block.store(RECYCLED, Ordering::Relaxed);
        host.turn_over(LeaseWord::live(WORD + 1));
    }

    #[test]
    fn a_block_under_a_live_lease_is_what_was_offered() {
        model(|| a_live_lease_means_the_block_is_good(in_order));
    }

    #[test]
    #[should_panic(expected = "left == right")]
    fn planted_recycling_before_the_slot() {
        model(|| {
            a_live_lease_means_the_block_is_good(|host| {
                host.block.store(RECYCLED, Ordering::Relaxed);
                host.turn_over(LeaseWord::DEAD);
            });
        });
    }

    #[test]
    #[should_panic(expected = "left == right")]
    fn planted_a_lease_without_order() {
        weak_model(|| a_live_lease_means_the_block_is_good(in_order));
    }
}
