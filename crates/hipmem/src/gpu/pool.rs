//! Memory that queues and launches have of a GPU's driver, and leave to the next ones.
//!
//! CUDA's driver lets every call that takes memory from a device wait for all of its kernels, and holds launches off
//! meanwhile (an H200 with driver 580: `cuMemFree`, `cuMemFreeHost`, `cuMemHostUnregister`, `cuIpcCloseMemHandle`). A
//! kernel that waits for a launch would wait for ever beside one. So what comes and goes with each transfer is never
//! given back: a process keeps, of each power of two, as many pieces as it has needed within a second.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::device::Gpu;
use crate::error::Error;

/// The shortest piece, and the longest that is kept: longer ones are as long as they are wanted, and go back when nobody
/// posts.
const SMALLEST: u64 = 4096;
const LARGEST: u64 = 64 << 20;

/// How long a piece rests before it is somebody else's. A kernel that its owner has said had ended, and that had not,
/// finds its own abort word for as long.
const REST: Duration = Duration::from_secs(1);

/// Whose memory it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Where {
    Gpu,
    Host,
}

/// The address for the host, where it has one, and for the device.
type At = (u64, u64);

/// What nobody has at the moment, and since when; the oldest first.
type Left = VecDeque<(Instant, At)>;

/// The same of each kind and length.
#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<BTreeMap<(Where, u64), Left>>);

/// A piece, for as long as it is needed.
pub(super) struct Piece {
    gpu: Gpu,
    of: (Where, u64),
    at: At,
    /// Somebody else may still have it when this goes.
    is_shared: AtomicBool,
}

impl Piece {
    /// A piece of `len` bytes at least, with whatever bytes are there: what somebody has left, or what `allocate` makes
    /// of as many bytes as it is told.
    pub(super) fn take(
        gpu: &Gpu,
        kind: Where,
        len: u64,
        allocate: impl FnOnce(u64) -> Result<At, Error>,
    ) -> Result<Self, Error> {
        let bytes = match len {
            0..=LARGEST => len.max(SMALLEST).next_power_of_two(),
            _ => len,
        };
        let of = (kind, bytes);
        let left = {
            let mut all = gpu.pool().0.lock().unwrap_or_else(PoisonError::into_inner);
            let rested = |(since, _): &mut (Instant, At)| since.elapsed() >= REST;
            all.get_mut(&of).and_then(|left| left.pop_front_if(rested))
        };
        let at = match left {
            Some((_, at)) => at,
            None => allocate(bytes)?,
        };
        Ok(Self {
            gpu: gpu.clone(),
            of,
            at,
            is_shared: AtomicBool::new(false),
        })
    }

    pub(super) fn at(&self) -> At {
        self.at
    }

    /// It is nobody else's later: it goes back to the driver.
    pub(super) fn share(&self) {
        self.is_shared.store(true, Ordering::Relaxed);
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let ((kind, bytes), at) = (self.of, self.at);
        if bytes > LARGEST || *self.is_shared.get_mut() {
            let gpu = self.gpu.clone();
            self.gpu.when_nobody_posts(move || free(&gpu, kind, at));
            return;
        }
        let pool = self.gpu.pool();
        let mut all = pool.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(self.of)
            .or_default()
            .push_back((Instant::now(), at));
    }
}

fn free(gpu: &Gpu, kind: Where, (host, device): At) {
    let freed = gpu.enter().and_then(|_current| match kind {
        // SAFETY: it was allocated for a piece, which has gone, and whoever used it held that.
        Where::Gpu => Ok(unsafe { gpu.api().free(device) }?),
        // SAFETY: as above.
        Where::Host => Ok(unsafe { gpu.api().host_free(host) }?),
    });
    if let Err(error) = freed {
        tracing::warn!(%error, ?kind, "memory is not given back");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{GpuMemory, GpuRuntime, PinnedMemory, RuntimeChoice, RuntimeKind};

    fn gpu() -> Result<Gpu, Error> {
        let runtime = GpuRuntime::open(RuntimeChoice::Only(RuntimeKind::Host))?;
        // With a pool of its own.
        Ok(runtime.gpu(0)?.apart(Duration::ZERO))
    }

    /// The first pieces in the pool have rested.
    fn rest(gpu: &Gpu) {
        let mut all = gpu.pool().0.lock().unwrap_or_else(PoisonError::into_inner);
        for (since, _) in all.values_mut().flatten() {
            *since -= REST;
        }
    }

    #[test]
    fn what_one_leaves_is_the_next_ones_when_it_has_rested() -> Result<(), Error> {
        let gpu = &gpu()?;
        let (len, close, far) = (5000, 8192, 8193);
        let first = GpuMemory::pooled(gpu, len)?;
        let at = first.addr();
        let clone = first.clone();
        drop(first);
        rest(gpu);
        let second = GpuMemory::pooled(gpu, close)?;
        assert_ne!(second.addr(), at, "a clone has it still");
        drop(clone);
        let third = GpuMemory::pooled(gpu, close)?;
        assert_ne!(third.addr(), at, "it rests");
        rest(gpu);
        assert_ne!(GpuMemory::pooled(gpu, far)?.addr(), at, "it is longer");
        let fourth = GpuMemory::pooled(gpu, close)?;
        assert_eq!((fourth.addr(), fourth.len()), (at, close));

        let pinned = PinnedMemory::pooled(gpu, len)?;
        let (host, device) = (pinned.host().addr(), pinned.device_addr());
        drop(pinned);
        drop(fourth);
        rest(gpu);
        let again = PinnedMemory::pooled(gpu, len - 1)?;
        assert_eq!((again.host().addr(), again.device_addr()), (host, device));
        assert_eq!(again.len(), len - 1);
        Ok(())
    }

    #[test]
    fn the_oldest_piece_is_taken_first() -> Result<(), Error> {
        let gpu = &gpu()?;
        let (first, second) = (GpuMemory::pooled(gpu, 1)?, GpuMemory::pooled(gpu, 1)?);
        let (older, younger) = (second.addr(), first.addr());
        drop(second);
        drop(first);
        rest(gpu);
        assert_eq!(GpuMemory::pooled(gpu, 1)?.addr(), older);
        assert_eq!(GpuMemory::pooled(gpu, 1)?.addr(), younger);
        Ok(())
    }

    #[test]
    fn what_is_long_or_somebody_elses_too_is_given_back() -> Result<(), Error> {
        let gpu = &gpu()?;
        let is_there = |at| Ok::<_, Error>(gpu.api().pointer(at)?.is_some());
        let kept = GpuMemory::pooled(gpu, LARGEST)?;
        let (long, shared) = (
            GpuMemory::pooled(gpu, LARGEST + 1)?,
            GpuMemory::pooled(gpu, 64)?,
        );
        // The stand-in has none, and the memory does not know.
        assert!(shared.dma_buf().is_err());
        let [kept, long, shared] = [kept, long, shared].map(|memory| memory.addr());
        assert!(is_there(kept)?);
        assert!(!is_there(long)?);
        assert!(!is_there(shared)?);
        Ok(())
    }

    #[test]
    fn what_is_used_again_is_exported_to_nobody() -> Result<(), Error> {
        let memory = GpuMemory::pooled(&gpu()?, 64)?;
        assert!(memory.export().is_err());
        Ok(())
    }
}
