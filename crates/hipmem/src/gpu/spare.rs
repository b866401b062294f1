//! Memory that queues and launches have of a GPU's driver, and leave to the next ones.
//!
//! CUDA's driver lets every call that takes memory from a device wait for all of its kernels, and holds launches off
//! meanwhile (an H200 with driver 580: `cuMemFree`, `cuMemFreeHost`, `cuMemHostUnregister`, `cuIpcCloseMemHandle`). A
//! kernel that waits for a launch would wait for ever beside one. So what comes and goes with each transfer is never
//! given back: a process has as much of it as it has needed at one time, in powers of two.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use super::device::Gpu;
use crate::error::Error;

/// The shortest piece.
const SMALLEST: u64 = 4096;

/// Whose memory it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Where {
    Gpu,
    Host,
}

/// The address for the host, where it has one, and for the device.
type At = (u64, u64);

/// What nobody has at the moment, of each kind and length.
#[derive(Debug, Default)]
pub(super) struct Spare(Mutex<BTreeMap<(Where, u64), Vec<At>>>);

/// A piece, for as long as it is needed.
pub(super) struct Lent {
    gpu: Gpu,
    of: (Where, u64),
    at: At,
}

impl Lent {
    /// A piece of `len` bytes at least, with whatever bytes are there: what somebody has left, or what `allocate` makes
    /// of as many bytes as it is told.
    pub(super) fn take(
        gpu: &Gpu,
        kind: Where,
        len: u64,
        allocate: impl FnOnce(u64) -> Result<At, Error>,
    ) -> Result<Self, Error> {
        let bytes = len.max(SMALLEST);
        let of = (kind, bytes.checked_next_power_of_two().unwrap_or(bytes));
        let left = {
            let mut all = gpu.spare().0.lock().unwrap_or_else(PoisonError::into_inner);
            all.get_mut(&of).and_then(Vec::pop)
        };
        let at = match left {
            Some(at) => at,
            None => allocate(of.1)?,
        };
        let gpu = gpu.clone();
        Ok(Self { gpu, of, at })
    }

    pub(super) fn at(&self) -> At {
        self.at
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let spare = self.gpu.spare();
        let mut all = spare.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(self.of).or_default().push(self.at);
    }
}

#[cfg(test)]
mod tests {
    use crate::error::Error;
    use crate::gpu::{GpuMemory, GpuRuntime, PinnedMemory, RuntimeChoice, RuntimeKind};

    #[test]
    fn what_one_leaves_is_the_next_ones() -> Result<(), Error> {
        let runtime = GpuRuntime::open(RuntimeChoice::Only(RuntimeKind::Host))?;
        let gpu = runtime.gpu(0)?;
        // Lengths that no other test has.
        let (len, close, far) = (5 << 20, 8 << 20, (8 << 20) + 1);
        let first = GpuMemory::lent(gpu, len)?;
        let at = first.addr();
        let clone = first.clone();
        drop(first);
        let second = GpuMemory::lent(gpu, close)?;
        assert_ne!(second.addr(), at, "a clone has it still");
        drop(clone);
        let third = GpuMemory::lent(gpu, close)?;
        assert_eq!((third.addr(), third.len()), (at, close));
        drop(third);
        assert_ne!(GpuMemory::lent(gpu, far)?.addr(), at, "it is longer");
        let pinned = PinnedMemory::lent(gpu, len)?;
        let (host, device) = (pinned.host().addr(), pinned.device_addr());
        assert_ne!(host, at, "it is the host's");
        pinned.host().fill(0, len, 7)?;
        drop(pinned);
        let again = PinnedMemory::lent(gpu, len - 1)?;
        assert_eq!((again.host().addr(), again.device_addr()), (host, device));
        assert_eq!(again.len(), len - 1);
        Ok(())
    }

    #[test]
    fn what_is_used_again_is_exported_to_nobody() -> Result<(), Error> {
        let runtime = GpuRuntime::open(RuntimeChoice::Only(RuntimeKind::Host))?;
        let memory = GpuMemory::lent(runtime.gpu(0)?, 64)?;
        assert!(memory.export().is_err());
        Ok(())
    }
}
