//! Waiting for the ends of a queue's kernels.

use std::time::{Duration, Instant};

use super::Kernels;
use crate::error::Error;
use crate::mem::gpu::{Gpu, GpuFault};

/// How long an event is waited for at most: what is later than that cannot be told from never, nor by every clock.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);
/// How long it takes at least until it is given up to read what has been posted.
pub(crate) const TO_READ: Duration = Duration::from_secs(1);

/// When so much time has passed.
pub(crate) fn after(within: Duration) -> Instant {
    Instant::now() + within.min(LONGEST)
}

/// Whether something was waited for in vain.
pub(crate) fn is_late(error: &crate::mem::Error) -> bool {
    matches!(error, crate::mem::Error::Gpu(fault) if matches!(**fault, GpuFault::Deadline { .. }))
}

impl Kernels<'_> {
    /// Waits for their ends on the queue's GPU. Those that are late are told to stop, and waited for once more.
    ///
    /// # Errors
    ///
    /// [`Error::QueueEvent`]; [`Error::KernelsLate`] where they have ended when they were told to; [`Error::Memory`],
    /// where nobody knows that they have ended: they are [late](is_late) still, or the event cannot be looked at.
    pub(crate) fn end(self, gpu: &Gpu, within: Duration, stop: impl FnOnce()) -> Result<(), Error> {
        let event = match self {
            Self::Ended => return Ok(()),
            Self::Behind(event) => event,
        };
        if event.gpu() != gpu {
            return Err(Error::QueueEvent {
                event: event.gpu().info().pci,
                queue: gpu.info().pci,
            });
        }
        let wait = || event.wait(after(within)).map_err(Error::Memory);
        match wait() {
            Err(Error::Memory(error)) if is_late(&error) => {
                stop();
                wait().and(Err(Error::KernelsLate { after: within }))
            }
            other => other,
        }
    }
}
