//! Where the slots of a queue of WQEs lie, and how the host reads them.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use kvxfer_verbs::mlx5::{OutsideQueue, QueueMemory, QueueNotReached};

use crate::error::Error;
use crate::gpu::pool::Touched;
use crate::gpu::{Copy, Event, Gpu, GpuMemory, Pending, PinnedMemory, Place, Stream};
use crate::memory::HostMemory;

/// How long a copy may take. It is of some KiB, on a stream of its own.
const LATE: Duration = Duration::from_secs(1);

/// Where kernels write their WQEs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum WqeSlots {
    /// In pinned memory of the host.
    #[default]
    Pinned,
    /// In the GPU's own memory. A kernel's stores and their release stay on the GPU, and a NIC would fetch WQEs over PCIe,
    /// by [dma-buf](GpuMemory::dma_buf). The model of a NIC is a thread of the host, and reads them by copies of the
    /// GPU's runtime: two for all that a look finds, which is slow. It looks whether they have ended, and waits for none.
    Gpu,
}

/// Memory of a queue as its device, the model, reads it.
#[derive(Debug)]
pub enum WqeMemory {
    /// Of the host: by its words.
    Host(HostMemory),
    /// A GPU's: by copies.
    Gpu(CopiedSlots),
}

/// Slots in a GPU's own memory, and a copy of them in pinned memory, which is what is read and written. Clones are the
/// same.
#[derive(Debug, Clone)]
pub struct CopiedSlots {
    own: GpuMemory,
    mirror: PinnedMemory,
    /// What runs must not be waited for.
    copies: Stream,
    under_way: Arc<Mutex<UnderWay>>,
}

/// The copy that is under way, of which there is one at most.
#[derive(Debug)]
struct UnderWay {
    copy: Option<(Pending, Instant)>,
    /// How long one may take.
    late: Duration,
}

impl CopiedSlots {
    pub(super) fn new(gpu: &Gpu, bytes: u64) -> Result<Self, Error> {
        let own = GpuMemory::pooled(gpu, bytes, Touched::ByHandle)?;
        own.fill(0, bytes, 0)?;
        let mirror = PinnedMemory::pooled(gpu, bytes, Touched::ByHandle)?;
        mirror.host().fill(0, bytes, 0)?;
        Ok(Self {
            own,
            mirror,
            copies: Stream::urgent(gpu)?,
            under_way: Arc::new(Mutex::new(UnderWay {
                copy: None,
                late: LATE,
            })),
        })
    }

    /// Copies wait for this event, and may take so long: for tests.
    pub(super) fn hold(&self, until: &Event, late: Duration) -> Result<(), Error> {
        let mut under_way = self
            .under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        under_way.late = late;
        self.copies.wait_event(until)
    }

    /// Whether a copy is under way: for tests.
    pub(super) fn is_copying(&self) -> bool {
        let under_way = self
            .under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        under_way.copy.is_some()
    }

    /// Where kernels write.
    pub(super) fn own(&self) -> &GpuMemory {
        &self.own
    }

    /// Goes on with a copy, or begins it.
    fn copy(
        &self,
        step: &'static str,
        spans: &[Range<u64>],
        to_host: bool,
    ) -> Poll<Result<(), QueueNotReached>> {
        let mut under_way = self
            .under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let copy = match under_way.copy.take() {
            None => self
                .begin(spans, to_host)
                .map(|copy| (copy, Instant::now())),
            Some(copy) => Ok(copy),
        };
        let copy = copy.and_then(|(copy, begun)| Ok((copy.is_done()?, copy, begun)));
        match copy {
            Ok((true, ..)) => return Poll::Ready(Ok(())),
            Ok((false, copy, begun)) if begun.elapsed() <= under_way.late => {
                under_way.copy = Some((copy, begun));
                return Poll::Pending;
            }
            Ok((false, ..)) => {
                let late = under_way.late;
                tracing::error!(
                    ?late,
                    step,
                    "slots in a GPU's memory: it has not ended by then"
                );
            }
            Err(error) => tracing::error!(%error, step, "slots in a GPU's memory"),
        }
        Poll::Ready(Err(QueueNotReached { step }))
    }

    fn begin(&self, spans: &[Range<u64>], to_host: bool) -> Result<Pending, Error> {
        let of = |span: &Range<u64>| {
            let (own, mirror) = (
                Place::Gpu(&self.own, span.start),
                Place::Pinned(&self.mirror, span.start),
            );
            let (dst, src) = if to_host {
                (mirror, own)
            } else {
                (own, mirror)
            };
            Copy {
                dst,
                src,
                len: span.end.saturating_sub(span.start),
            }
        };
        let copies: Vec<_> = spans.iter().map(of).collect();
        self.copies.copy(&copies)
    }
}

impl QueueMemory for CopiedSlots {
    fn len(&self) -> u64 {
        self.own.len()
    }

    fn load(&self, offset: u64) -> Result<[u8; 8], OutsideQueue> {
        QueueMemory::load(self.mirror.host(), offset)
    }

    fn store(&self, offset: u64, bytes: [u8; 8]) -> Result<(), OutsideQueue> {
        QueueMemory::store(self.mirror.host(), offset, bytes)
    }

    fn fetch(&self, spans: &[Range<u64>]) -> Poll<Result<(), QueueNotReached>> {
        self.copy("a copy from the GPU", spans, true)
    }

    fn flush(&self, spans: &[Range<u64>]) -> Poll<Result<(), QueueNotReached>> {
        self.copy("a copy to the GPU", spans, false)
    }
}

impl QueueMemory for WqeMemory {
    fn len(&self) -> u64 {
        match self {
            Self::Host(memory) => QueueMemory::len(memory),
            Self::Gpu(slots) => slots.len(),
        }
    }

    fn load(&self, offset: u64) -> Result<[u8; 8], OutsideQueue> {
        match self {
            Self::Host(memory) => QueueMemory::load(memory, offset),
            Self::Gpu(slots) => slots.load(offset),
        }
    }

    fn store(&self, offset: u64, bytes: [u8; 8]) -> Result<(), OutsideQueue> {
        match self {
            Self::Host(memory) => QueueMemory::store(memory, offset, bytes),
            Self::Gpu(slots) => slots.store(offset, bytes),
        }
    }

    fn fetch(&self, spans: &[Range<u64>]) -> Poll<Result<(), QueueNotReached>> {
        match self {
            Self::Host(_) => Poll::Ready(Ok(())),
            Self::Gpu(slots) => slots.fetch(spans),
        }
    }

    fn flush(&self, spans: &[Range<u64>]) -> Poll<Result<(), QueueNotReached>> {
        match self {
            Self::Host(_) => Poll::Ready(Ok(())),
            Self::Gpu(slots) => slots.flush(spans),
        }
    }
}
