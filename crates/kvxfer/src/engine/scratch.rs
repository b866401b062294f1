//! Where the lease slots of producers land, and this producer's own table of them.

use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

use kvxfer_hipmem::{ArenaOptions, HostArena, HostMemory, HugePages};
use kvxfer_verbs::Memory;

use crate::error::Error;
use crate::leases::{LeaseWord, SLOT_BYTES};

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

    pub(crate) fn give(&self, slot: u32) {
        self.free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(slot);
    }

    /// Whether the slot that landed shows the offer with this word.
    pub(crate) fn shows(&self, slot: u32, word: u64) -> bool {
        let at = u64::from(slot) * SLOT_BYTES as u64;
        match (self.memory.load_u64(at), self.memory.load_u64(at + 8)) {
            (Ok(first), Ok(check)) => {
                let shown = LeaseWord {
                    word: u64::from_le(first),
                    check: u64::from_le(check),
                };
                shown.is_live_for(word)
            }
            _ => false,
        }
    }
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
        // The check word first when a lease ends: a reader never sees a dead slot as live, for the
        // pair must match.
        self.memory.store_u64(at + 8, word.check.to_le())?;
        self.memory.store_u64(at, word.word.to_le())?;
        // Later writes to the blocks must not be seen before the flip.
        fence(Ordering::SeqCst);
        Ok(())
    }
}
