//! Whether an engine can be used: in the process that made it, and while its workers work.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::Error;

/// Shared by everything that belongs to one engine.
#[derive(Debug)]
pub(crate) struct Health {
    /// The process that made the engine. A forked child has the memory of its handles, and neither
    /// its threads nor its locks in a known state.
    pid: u32,
    broken: AtomicBool,
}

impl Health {
    pub(crate) fn new() -> Self {
        Self {
            pid: std::process::id(),
            broken: AtomicBool::new(false),
        }
    }

    /// A worker has panicked.
    pub(crate) fn break_down(&self) {
        self.broken.store(true, Ordering::Release);
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
    /// [`Error::Forked`] and [`Error::WorkerPanicked`].
    pub(crate) fn check(&self) -> Result<(), Error> {
        self.check_process()?;
        if self.broken.load(Ordering::Acquire) {
            return Err(Error::WorkerPanicked);
        }
        Ok(())
    }
}
