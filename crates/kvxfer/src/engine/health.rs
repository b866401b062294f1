//! Whether an engine can be used: in the process that made it, and while its workers and its device
//! work.

use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use crate::error::Error;

/// Shared by everything that belongs to one engine.
#[derive(Debug)]
pub(crate) struct Health {
    /// The process that made the engine. A forked child has the memory of its handles, and neither
    /// its threads nor its locks in a known state.
    pid: u32,
    /// What has ended its use: the first such thing.
    broken: AtomicU8,
    /// How many of its devices have not failed.
    devices: AtomicUsize,
}

const WELL: u8 = 0;
const WORKER_PANICKED: u8 = 1;
const DEVICE_FAILED: u8 = 2;

impl Health {
    /// Of an engine that stands on so many devices.
    pub(crate) fn new(devices: usize) -> Self {
        Self {
            pid: std::process::id(),
            broken: AtomicU8::new(WELL),
            devices: AtomicUsize::new(devices),
        }
    }

    /// A worker has panicked.
    pub(crate) fn break_down(&self) {
        self.breaks(WORKER_PANICKED);
    }

    /// One of the devices has failed, which says so once. With the last one the engine ends.
    pub(crate) fn device_failed(&self) {
        if self.devices.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.breaks(DEVICE_FAILED);
        }
    }

    fn breaks(&self, why: u8) {
        // What came first stays.
        let _ = self
            .broken
            .compare_exchange(WELL, why, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Whether this is a forked child of the engine's process. Nothing of the engine may be touched
    /// then, no lock and no shared memory.
    pub(crate) fn is_forked(&self) -> bool {
        std::process::id() != self.pid
    }

    /// Whether the engine may be looked at.
    ///
    /// # Errors
    ///
    /// [`Error::Forked`].
    pub(crate) fn check_process(&self) -> Result<(), Error> {
        let here = std::process::id();
        if here == self.pid {
            return Ok(());
        }
        Err(Error::Forked {
            engine: self.pid,
            here,
        })
    }

    /// Whether the engine may be given work.
    ///
    /// # Errors
    ///
    /// [`Error::Forked`], [`Error::WorkerPanicked`] and [`Error::DeviceFailed`].
    pub(crate) fn check(&self) -> Result<(), Error> {
        self.check_process()?;
        match self.broken.load(Ordering::Acquire) {
            WELL => Ok(()),
            DEVICE_FAILED => Err(Error::DeviceFailed),
            _ => Err(Error::WorkerPanicked),
        }
    }
}
