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

/// How long a piece rests that a queue's handle names before it is somebody else's. A kernel that its owner has said had
/// ended, and that had not, finds its own abort word for as long.
const REST: Duration = Duration::from_secs(1);

/// Who has touched a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Touched {
    /// Launches of this crate alone, whose ends it has seen.
    ByOwn,
    /// Kernels that had the handle of a queue, of whose ends somebody has told.
    ByHandle,
}

/// Whose memory it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Where {
    Gpu,
    Host,
}

/// The address for the host, where it has one, and for the device.
type At = (u64, u64);

/// What nobody has at the moment, and when it has rested; the oldest first.
type Left = VecDeque<(Instant, At)>;

/// The same of each kind and length.
#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<BTreeMap<(Where, u64), Left>>);

/// A piece, for as long as it is needed.
pub(super) struct Piece {
    gpu: Gpu,
    of: (Where, u64),
    at: At,
    touched: Touched,
    /// Somebody else may still have it when this goes.
    is_shared: AtomicBool,
}

impl Pool {
    /// The shortest that is as long.
    fn any(&self, (kind, bytes): (Where, u64)) -> Option<((Where, u64), At)> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let longer = all.range_mut((kind, bytes)..=(kind, LARGEST));
        let mut there = longer.filter_map(|(of, left)| Some((*of, left.pop_front()?.1)));
        there.next()
    }
}

impl Piece {
    /// A piece of `len` bytes at least, with whatever bytes are there: what somebody has left, or what `allocate` makes
    /// of as many bytes as it is told. Where it makes none, what is longer, or has not rested.
    pub(super) fn take(
        gpu: &Gpu,
        (kind, touched): (Where, Touched),
        len: u64,
        allocate: impl FnOnce(u64) -> Result<At, Error>,
    ) -> Result<Self, Error> {
        let bytes = match len {
            0..=LARGEST => len.max(SMALLEST).next_power_of_two(),
            _ => len,
        };
        let rested = {
            let mut all = gpu.pool().0.lock().unwrap_or_else(PoisonError::into_inner);
            let has = |(rested, _): &mut (Instant, At)| *rested <= Instant::now();
            all.get_mut(&(kind, bytes))
                .and_then(|left| left.pop_front_if(has))
        };
        let (of, at) = match rested {
            Some((_, at)) => ((kind, bytes), at),
            None => match allocate(bytes) {
                Ok(at) => ((kind, bytes), at),
                Err(error) => gpu.pool().any((kind, bytes)).ok_or(error)?,
            },
        };
        Ok(Self {
            gpu: gpu.clone(),
            of,
            at,
            touched,
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
        let left = all.entry(self.of).or_default();
        let now = Instant::now();
        match self.touched {
            Touched::ByOwn => left.push_front((now, at)),
            Touched::ByHandle => left.push_back((now + REST, at)),
        }
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
    use super::Touched::{ByHandle, ByOwn};
    use super::*;
    use crate::gpu::api::Api;
    use crate::gpu::host::HostApi;
    use crate::gpu::{GpuMemory, GpuRuntime, PinnedMemory};

    /// One that nobody else has.
    fn gpu() -> Result<Gpu, Error> {
        let runtime = GpuRuntime::with(Api::Host(HostApi::new()))?;
        Ok(runtime.gpu(0)?.clone())
    }

    /// All that is in the pool has rested.
    fn rest(gpu: &Gpu) {
        let mut all = gpu.pool().0.lock().unwrap_or_else(PoisonError::into_inner);
        for (rested, _) in all.values_mut().flatten() {
            *rested -= REST;
        }
    }

    #[test]
    fn what_one_leaves_is_the_next_ones_when_it_has_rested() -> Result<(), Error> {
        let gpu = &gpu()?;
        let (len, close, far) = (5000, 8192, 8193);
        let first = GpuMemory::pooled(gpu, len, ByHandle)?;
        let at = first.addr();
        let clone = first.clone();
        drop(first);
        rest(gpu);
        let second = GpuMemory::pooled(gpu, close, ByHandle)?;
        assert_ne!(second.addr(), at, "a clone has it still");
        drop(clone);
        let third = GpuMemory::pooled(gpu, close, ByOwn)?;
        assert_ne!(third.addr(), at, "it rests");
        rest(gpu);
        assert_ne!(GpuMemory::pooled(gpu, far, ByHandle)?.addr(), at, "longer");
        let fourth = GpuMemory::pooled(gpu, close, ByHandle)?;
        assert_eq!((fourth.addr(), fourth.len()), (at, close));

        // What no kernel of others has touched need not rest; and the host's is apart.
        let pinned = PinnedMemory::pooled(gpu, len, ByOwn)?;
        let (host, device) = (pinned.host().addr(), pinned.device_addr());
        drop(pinned);
        let again = PinnedMemory::pooled(gpu, len - 1, ByHandle)?;
        assert_eq!((again.host().addr(), again.device_addr()), (host, device));
        assert_eq!(again.len(), len - 1);
        Ok(())
    }

    #[test]
    fn what_has_rested_longest_is_taken_first() -> Result<(), Error> {
        let gpu = &gpu()?;
        let (first, second) = (
            GpuMemory::pooled(gpu, 1, ByHandle)?,
            GpuMemory::pooled(gpu, 1, ByHandle)?,
        );
        let (older, younger) = (second.addr(), first.addr());
        drop(second);
        drop(first);
        rest(gpu);
        let (first, second) = (
            GpuMemory::pooled(gpu, 1, ByHandle)?,
            GpuMemory::pooled(gpu, 1, ByHandle)?,
        );
        assert_eq!((first.addr(), second.addr()), (older, younger));
        Ok(())
    }

    #[test]
    fn where_there_is_no_more_memory_what_is_left_is_taken() -> Result<(), Error> {
        let gpu = &gpu()?;
        let none = |bytes| Err(Error::TooLarge { len: bytes });
        let take = |kind, len| Piece::take(gpu, (kind, ByOwn), len, none);
        assert!(take(Where::Gpu, 100).is_err());
        let left = GpuMemory::pooled(gpu, 20_000, ByHandle)?;
        let at = left.addr();
        drop(left);
        assert!(take(Where::Gpu, 40_000).is_err(), "it is too short");
        assert!(take(Where::Host, 100).is_err(), "it is the GPU's");
        let piece = take(Where::Gpu, 100)?;
        assert_eq!(piece.at(), (0, at));
        // It is as long as it was.
        drop(piece);
        assert_eq!(take(Where::Gpu, 20_000)?.at(), (0, at));
        Ok(())
    }

    #[test]
    fn what_is_long_or_somebody_elses_too_is_given_back() -> Result<(), Error> {
        let gpu = &gpu()?;
        let is_there = |at| Ok::<_, Error>(gpu.api().pointer(at)?.is_some());
        let (kept, long, shared) = (
            GpuMemory::pooled(gpu, LARGEST, ByOwn)?,
            GpuMemory::pooled(gpu, LARGEST + 1, ByOwn)?,
            GpuMemory::pooled(gpu, 64, ByOwn)?,
        );
        // The stand-in has none, and the memory does not know.
        assert!(shared.dma_buf().is_err());
        let [kept, long, shared] = [kept, long, shared].map(|memory| memory.addr());
        let deadline = Instant::now() + Duration::from_secs(30);
        while is_there(long)? || is_there(shared)? {
            assert!(Instant::now() < deadline, "they are kept");
        }
        assert!(is_there(kept)?);
        Ok(())
    }

    #[test]
    fn what_is_used_again_is_exported_to_nobody() -> Result<(), Error> {
        let memory = GpuMemory::pooled(&gpu()?, 64, ByOwn)?;
        assert!(memory.export().is_err());
        Ok(())
    }
}
