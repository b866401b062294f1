//! Where the slots of a queue of WQEs lie, and how the host reads them.

use std::ops::Range;
use std::time::{Duration, Instant};

use kvxfer_verbs::mlx5::{OutsideQueue, QueueMemory, QueueNotReached};

use crate::error::Error;
use crate::gpu::{Copy, Gpu, GpuMemory, PinnedMemory, Place, Stream};
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
    /// GPU's runtime: two for each look that finds something, which is slow.
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
}

impl CopiedSlots {
    pub(super) fn new(gpu: &Gpu, bytes: u64) -> Result<Self, Error> {
        let own = GpuMemory::new(gpu, bytes)?;
        own.fill(0, bytes, 0)?;
        let mirror = PinnedMemory::new(gpu, bytes)?;
        mirror.host().fill(0, bytes, 0)?;
        Ok(Self {
            own,
            mirror,
            copies: Stream::urgent(gpu)?,
        })
    }

    /// Where kernels write.
    pub(super) fn own(&self) -> &GpuMemory {
        &self.own
    }

    fn copy(
        &self,
        step: &'static str,
        spans: &[Range<u64>],
        to_host: bool,
    ) -> Result<(), QueueNotReached> {
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
        let copied = self.copies.copy(&copies);
        let copied = copied.and_then(|pending| pending.wait(Instant::now() + LATE));
        copied.map_err(|error| {
            tracing::error!(%error, step, "slots in a GPU's memory");
            QueueNotReached { step }
        })
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

    fn fetch(&self, spans: &[Range<u64>]) -> Result<(), QueueNotReached> {
        self.copy("a copy from the GPU", spans, true)
    }

    fn flush(&self, spans: &[Range<u64>]) -> Result<(), QueueNotReached> {
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

    fn fetch(&self, spans: &[Range<u64>]) -> Result<(), QueueNotReached> {
        match self {
            Self::Host(_) => Ok(()),
            Self::Gpu(slots) => slots.fetch(spans),
        }
    }

    fn flush(&self, spans: &[Range<u64>]) -> Result<(), QueueNotReached> {
        match self {
            Self::Host(_) => Ok(()),
            Self::Gpu(slots) => slots.flush(spans),
        }
    }
}
