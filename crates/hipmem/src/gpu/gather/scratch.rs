//! What a launch needs of memory: its slots, its tables and its abort word. Kept and used again, for freeing
//! memory makes a GPU wait for all that runs on it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Error;
use crate::gpu::pool::Touched;
use crate::gpu::{Gpu, GpuMemory, PinnedMemory};

/// The most workgroups of a launch.
pub(super) const MAX_WORKGROUPS: u32 = 1024;

/// Bytes of a slot of a gather; those of a fence have fewer.
pub(super) const SLOT: u64 = 32;

/// Where tables begin; the abort word has what is before for itself.
pub(super) const TABLES: u64 = 64;

/// The smallest room for tables: sixty sections and some thousand pairs.
const SMALLEST: u64 = 64 << 10;

#[derive(Debug, Clone)]
struct Parts {
    slots: PinnedMemory,
    staging: PinnedMemory,
    device: GpuMemory,
    told: bool,
}

/// What no launch has at the moment.
#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<Vec<Parts>>);

/// A launch's memory. It goes back when the last that holds it goes: the launch, who waits for it, and what
/// tells it to abort.
#[derive(Debug)]
pub(super) struct Scratch {
    parts: Parts,
    /// The abort word may not be 0.
    told: AtomicBool,
    pool: Arc<Pool>,
}

impl Scratch {
    /// Memory for tables of `tables` bytes. Sequences that its slots hold are older than the next one.
    pub(super) fn take(pool: &Arc<Pool>, gpu: &Gpu, tables: u64) -> Result<Self, Error> {
        let wanted = tables.saturating_add(TABLES);
        let found = {
            let mut parts = pool.0.lock().unwrap_or_else(PoisonError::into_inner);
            let fits = |p: &Parts| p.device.len() >= wanted;
            // The one that was used last is in the caches still.
            let at = parts.iter().rposition(fits);
            at.map(|at| parts.swap_remove(at))
        };
        let parts = match found {
            Some(parts) => parts,
            None => {
                let len = wanted.max(SMALLEST);
                let len = len.checked_next_power_of_two().unwrap_or(len);
                let slots =
                    PinnedMemory::pooled(gpu, u64::from(MAX_WORKGROUPS) * SLOT, Touched::ByOwn)?;
                slots.host().fill(0, slots.len(), 0)?;
                let device = GpuMemory::pooled(gpu, len, Touched::ByOwn)?;
                device.fill(0, TABLES, 0)?;
                Parts {
                    slots,
                    staging: PinnedMemory::pooled(gpu, len, Touched::ByOwn)?,
                    device,
                    told: false,
                }
            }
        };
        Ok(Self {
            told: AtomicBool::new(parts.told),
            parts,
            pool: Arc::clone(pool),
        })
    }

    pub(super) fn slots(&self) -> &PinnedMemory {
        &self.parts.slots
    }

    /// As long as [`device`](Self::device), and laid out alike.
    pub(super) fn staging(&self) -> &PinnedMemory {
        &self.parts.staging
    }

    /// The abort word, then the tables.
    pub(super) fn device(&self) -> &GpuMemory {
        &self.parts.device
    }

    /// Whether the abort word has to be set to 0 before the launch.
    pub(super) fn was_told(&self) -> bool {
        self.told.load(Ordering::Relaxed)
    }

    /// It is going to be, before anything that comes after on the launch's stream.
    pub(super) fn untell(&self) {
        self.told.store(false, Ordering::Relaxed);
    }

    /// The abort word is going to be set.
    pub(super) fn tell(&self) {
        self.told.store(true, Ordering::Relaxed);
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let mut parts = self.parts.clone();
        parts.told = self.told.load(Ordering::Relaxed);
        let mut free = self.pool.0.lock().unwrap_or_else(PoisonError::into_inner);
        free.push(parts);
    }
}

#[cfg(test)]
mod tests {
    use super::super::GpuKernels;
    use super::*;
    use crate::gpu::{GpuRuntime, RuntimeChoice, RuntimeKind};

    #[test]
    fn launches_use_what_was_reserved_for_them() -> Result<(), Error> {
        let runtime = GpuRuntime::open(RuntimeChoice::Only(RuntimeKind::Host))?;
        let kernels = GpuKernels::load(runtime.gpu(0)?)?;
        let free = || {
            let free = kernels.0.pool.0.lock();
            free.unwrap_or_else(PoisonError::into_inner).len()
        };
        kernels.reserve(3)?;
        assert_eq!(free(), 3);
        let most = SMALLEST - TABLES;
        let all: Result<Vec<_>, _> = [0, 1000, most]
            .map(|len| kernels.scratch(len))
            .into_iter()
            .collect();
        assert_eq!(free(), 0, "nothing else was allocated");
        drop(all?);
        assert_eq!(free(), 3);
        // What is there already is counted.
        kernels.reserve(2)?;
        assert_eq!(free(), 3);
        Ok(())
    }
}
