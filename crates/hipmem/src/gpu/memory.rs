//! Memory of a GPU: allocated here, an engine's own, or another process's.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use kvxfer_verbs::{DmaBuf, FdSpan, Memory, MemoryKind, NoDmaBuf, PciAddress};

use super::api::{Direction, DmaBufFault, Grain};
use super::class::MemoryClass;
use super::code::OUT_OF_MEMORY;
use super::device::{Gpu, Uuid, same_runtime};
use super::error::GpuFault;
use super::ipc::Opened;
use super::pool::{Piece, Touched, Where};
use crate::error::{Error, Operation};

/// A span of a GPU's memory. Clones are the same memory, which lives as long as any of them.
///
/// Offsets and lengths are in bytes. What the crate's first page says of bytes that others change holds here
/// too; the bytes come and go by copies that the GPU makes. Those of this type end before they return; a
/// [`Stream`](super::Stream) makes others.
#[derive(Clone)]
pub struct GpuMemory {
    pub(super) span: Arc<Span>,
}

/// The allocation that a span lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocation {
    /// Address of its first byte.
    pub base: u64,
    /// Its bytes.
    pub size: u64,
}

pub(crate) struct Span {
    pub(super) gpu: Gpu,
    pub(super) addr: u64,
    pub(super) len: u64,
    pub(super) allocation: Allocation,
    exportable: Option<bool>,
    grain: Grain,
    hold: Hold,
}

/// What keeps a span's memory where it is.
enum Hold {
    Allocated(#[expect(dead_code, reason = "it is held")] Allocated),
    Pooled(Piece),
    Owner(#[expect(dead_code, reason = "it is held")] Arc<dyn Any + Send + Sync>),
    Opened(Opened),
    Part(Arc<Span>),
}

/// Memory that is freed with the value.
struct Allocated {
    gpu: Gpu,
    addr: u64,
}

impl Drop for Allocated {
    fn drop(&mut self) {
        let freed = self.gpu.enter().and_then(|_current| {
            // SAFETY: it was allocated for this value, and whoever used it held the span.
            Ok(unsafe { self.gpu.api().free(self.addr) }?)
        });
        if let Err(error) = freed {
            tracing::warn!(%error, "memory of a GPU is not given back");
        }
    }
}

// SAFETY: `hold` keeps the memory allocated and in place for the device that `kind` names, and nobody takes
// its addresses for pointers; the answers are constant; a dma-buf is of the span as the runtime exports it, and
// there is no other file.
unsafe impl Memory for Span {
    fn addr(&self) -> u64 {
        self.addr
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn kind(&self) -> MemoryKind {
        let (gpu, _) = self.owner();
        MemoryKind::Device { gpu }
    }

    fn fd(&self) -> Option<FdSpan<'_>> {
        None
    }

    fn dma_buf(&self) -> Result<DmaBuf, NoDmaBuf> {
        self.export()
            .map_err(|refused| NoDmaBuf::Refused(refused.into()))
    }
}

impl Span {
    /// Copies bytes out, to the host.
    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        let len = into.len() as u64;
        let src = self.range(Operation::Read, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let dst = into.as_mut_ptr().expose_provenance() as u64;
        self.gpu.now(|api, stream| {
            // SAFETY: the span is held, `into` is ours and as long, and `now` waits for the copy.
            Ok(unsafe { api.copy(dst, src, len, Direction::DeviceToHost, stream) }?)
        })
    }

    /// The one bounds check: the address of a range that is wholly inside.
    fn range(&self, operation: Operation, offset: u64, len: u64) -> Result<u64, Error> {
        let size = self.len;
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(self.addr + offset),
            _ => Err(Error::OutOfBounds {
                operation,
                offset,
                len,
                size,
            }),
        }
    }

    fn export(&self) -> Result<DmaBuf, Error> {
        let gpu = &self.gpu;
        if let Hold::Pooled(piece) = self.whole_hold() {
            piece.share();
        }
        let _current = gpu.enter()?;
        let (addr, len) = (self.addr, self.len);
        // SAFETY: the span is held.
        match unsafe { gpu.api().dma_buf(addr, len) } {
            Ok((fd, offset)) => Ok(DmaBuf { fd, offset, len }),
            Err(fault) => Err(GpuFault::NoDmaBuf {
                device: gpu.info().pci,
                addr,
                runtime: gpu.runtime(),
                refused: match fault {
                    DmaBufFault::NoFunction => None,
                    DmaBufFault::Refused(refused) => Some(refused),
                },
            }
            .into()),
        }
    }

    /// What keeps it, or the memory that it is a part of.
    fn whole_hold(&self) -> &Hold {
        let mut span = self;
        while let Hold::Part(whole) = &span.hold {
            span = whole;
        }
        &span.hold
    }

    /// The device whose memory it is, which is another than `gpu` for what another process has exported.
    fn owner(&self) -> (PciAddress, Uuid) {
        match &self.hold {
            Hold::Opened(opened) => opened.owner,
            Hold::Part(whole) => whole.owner(),
            Hold::Allocated(_) | Hold::Pooled(_) | Hold::Owner(_) => {
                (self.gpu.info().pci, self.gpu.info().uuid)
            }
        }
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.hold {
            Hold::Allocated(_) | Hold::Pooled(_) => "memory",
            Hold::Owner(_) => "owner's memory",
            Hold::Opened(_) => "another process's memory",
            Hold::Part(_) => "part",
        };
        let (len, addr) = (self.len, self.addr);
        write!(f, "{kind} of {len} bytes at {addr:#x} on {:?}", self.gpu)
    }
}

impl fmt::Debug for GpuMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GpuMemory({:?})", self.span)
    }
}

impl GpuMemory {
    /// Memory of a GPU, with whatever bytes are there.
    ///
    /// Drivers wait for all kernels of the GPU before they give memory back, and hold launches off meanwhile: whoever drops
    /// the last clone may wait for them, and a kernel that waits for blocks that another is to bring has to have ended.
    ///
    /// # Errors
    ///
    /// [`Error::Empty`] for no bytes; [`GpuFault::OutOfMemory`]; [`Error::Gpu`].
    pub fn new(gpu: &Gpu, len: u64) -> Result<Self, Error> {
        Self::with_grain(gpu, len, Grain::Coarse)
    }

    /// Memory of a GPU that behaves as `grain` says.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new); CUDA has coarse memory alone, and uncached memory needs ROCm 6.
    pub fn with_grain(gpu: &Gpu, len: u64, grain: Grain) -> Result<Self, Error> {
        if len == 0 {
            return Err(Error::Empty);
        }
        let addr = allocate(gpu, len, grain)?;
        let gpu = gpu.clone();
        let allocated = Allocated {
            gpu: gpu.clone(),
            addr,
        };
        let span = Span {
            gpu,
            addr,
            len,
            allocation: Allocation {
                base: addr,
                size: len,
            },
            exportable: None,
            grain,
            hold: Hold::Allocated(allocated),
        };
        Ok(span.into())
    }

    /// Memory of a queue's or a launch's, with whatever bytes are there: what another has left, or new. When it goes it
    /// is left for the next, and no driver waits for anything.
    pub(in crate::gpu) fn pooled(gpu: &Gpu, len: u64, touched: Touched) -> Result<Self, Error> {
        if len == 0 {
            return Err(Error::Empty);
        }
        let piece = Piece::take(gpu, (Where::Gpu, touched), len, |bytes| {
            Ok((0, allocate(gpu, bytes, Grain::Coarse)?))
        })?;
        let (_, addr) = piece.at();
        let span = Span {
            gpu: gpu.clone(),
            addr,
            len,
            allocation: Allocation {
                base: addr,
                size: len,
            },
            // A peer would have it open while it is somebody else's.
            exportable: Some(false),
            grain: Grain::Coarse,
            hold: Hold::Pooled(piece),
        };
        Ok(span.into())
    }

    /// Memory that somebody else allocated: an engine's own KV cache. The runtime is asked which
    /// allocation it lies in, so an address that it does not know is an error.
    ///
    /// `keep` is dropped when the last clone and the last registration of the memory are gone.
    ///
    /// # Safety
    ///
    /// The caller promises, for as long as `keep` is not dropped:
    /// - if the runtime finds that the `len` bytes at `addr` are allocated, they stay so;
    /// - code outside this crate uses them only when the transfers' outcomes say that it may.
    ///
    /// # Errors
    ///
    /// [`GpuFault::NotDeviceMemory`], [`GpuFault::OtherDevice`], [`GpuFault::CrossesAllocation`];
    /// [`Error::Empty`] for no bytes.
    pub unsafe fn from_raw_parts(
        gpu: &Gpu,
        addr: u64,
        len: u64,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self, Error> {
        if len == 0 {
            return Err(Error::Empty);
        }
        let _current = gpu.enter()?;
        let unknown = |refused| GpuFault::NotDeviceMemory { addr, refused };
        let facts = gpu
            .api()
            .pointer(addr)
            .map_err(|refused| unknown(Some(refused)))?;
        let facts = facts.ok_or_else(|| unknown(None))?;
        if facts.ordinal != gpu.info().ordinal {
            let is = gpu.api().info(facts.ordinal)?.pci;
            let said = gpu.info().pci;
            return Err(GpuFault::OtherDevice { addr, said, is }.into());
        }
        let (base, size) = (facts.base, facts.size);
        let inside = || {
            addr.checked_sub(base)?
                .checked_add(len)
                .filter(|end| *end <= size)
        };
        if inside().is_none() {
            return Err(GpuFault::CrossesAllocation {
                addr,
                len,
                base,
                size,
            }
            .into());
        }
        let span = Span {
            gpu: gpu.clone(),
            addr,
            len,
            allocation: Allocation { base, size },
            exportable: facts.exportable,
            grain: Grain::Coarse,
            hold: Hold::Owner(keep),
        };
        Ok(span.into())
    }

    pub(super) fn opened(opened: Opened, offset: u64, len: u64) -> Self {
        let span = Span {
            gpu: opened.gpu.clone(),
            addr: opened.addr + offset,
            len,
            allocation: Allocation {
                base: opened.addr,
                size: opened.size,
            },
            exportable: Some(false),
            grain: Grain::Coarse,
            hold: Hold::Opened(opened),
        };
        span.into()
    }

    /// A part of this memory as memory of its own. It keeps the whole alive.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`] if the part is not wholly inside.
    pub fn slice(&self, offset: u64, len: u64) -> Result<Self, Error> {
        let addr = self.range(Operation::Slice, offset, len)?;
        let whole = &self.span;
        let span = Span {
            gpu: whole.gpu.clone(),
            addr,
            len,
            allocation: whole.allocation,
            exportable: whole.exportable,
            grain: whole.grain,
            hold: Hold::Part(Arc::clone(whole)),
        };
        Ok(span.into())
    }

    /// The memory behind a token, if it is a GPU's: what [`as_memory`](Self::as_memory) has given.
    #[must_use]
    pub fn of(memory: &Arc<dyn Memory>) -> Option<Self> {
        let memory: Arc<dyn Any + Send + Sync> = Arc::clone(memory) as _;
        let span = memory.downcast::<Span>().ok()?;
        Some(Self { span })
    }

    /// The token that devices register.
    #[must_use]
    pub fn as_memory(&self) -> Arc<dyn Memory> {
        Arc::clone(&self.span) as Arc<dyn Memory>
    }

    /// The device's address of the first byte.
    #[must_use]
    pub fn addr(&self) -> u64 {
        self.span.addr
    }

    /// The length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.span.len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.span.len == 0
    }

    /// The device that it is used through.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        &self.span.gpu
    }

    /// The allocation that it lies in.
    #[must_use]
    pub fn allocation(&self) -> Allocation {
        self.span.allocation
    }

    /// How it lies to a GPU that reads it.
    #[must_use]
    pub fn class_for(&self, reader: &Gpu) -> MemoryClass {
        let reader = (reader.info().pci, reader.info().uuid);
        MemoryClass::of(self.span.owner(), self.span.grain, reader)
    }

    /// Whether a legacy handle can name it, where the runtime says so.
    pub(super) fn exportable(&self) -> Option<bool> {
        self.span.exportable
    }

    pub(super) fn is_opened(&self) -> bool {
        matches!(self.span.whole_hold(), Hold::Opened(_))
    }

    /// Copies bytes out, to the host.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`]; then nothing was copied. [`Error::Gpu`].
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        self.span.read(offset, into)
    }

    /// Copies bytes in, from the host.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`]; then nothing was copied. [`Error::Gpu`].
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        let len = from.len() as u64;
        let dst = self.range(Operation::Write, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let src = from.as_ptr().expose_provenance() as u64;
        self.span.gpu.now(|api, stream| {
            // SAFETY: the span is held, `from` is as long and stays, and `now` waits for the copy.
            Ok(unsafe { api.copy(dst, src, len, Direction::HostToDevice, stream) }?)
        })
    }

    /// Sets bytes.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`]; then nothing was set. [`Error::Gpu`].
    pub fn fill(&self, offset: u64, len: u64, byte: u8) -> Result<(), Error> {
        let dst = self.range(Operation::Fill, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        self.span.gpu.now(|api, stream| {
            // SAFETY: the span is held, and `now` waits for the fill.
            Ok(unsafe { api.fill(dst, byte, len, stream) }?)
        })
    }

    /// Copies from other memory of a GPU, by this memory's device.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`]; then nothing was copied. [`Error::Gpu`].
    pub fn copy_from(
        &self,
        src: &Self,
        src_offset: u64,
        dst_offset: u64,
        len: u64,
    ) -> Result<(), Error> {
        same_runtime("what is copied from", src.gpu(), self.gpu())?;
        let from = src.range(Operation::CopySource, src_offset, len)?;
        let to = self.range(Operation::CopyDestination, dst_offset, len)?;
        if len == 0 {
            return Ok(());
        }
        self.span.gpu.now(|api, stream| {
            // SAFETY: both spans are held, and `now` waits for the copy.
            Ok(unsafe { api.copy(to, from, len, Direction::DeviceToDevice, stream) }?)
        })
    }

    /// The memory as a dma-buf. The file keeps the pages while it is open, but not the allocation:
    /// hold the memory as long as the file.
    ///
    /// # Errors
    ///
    /// [`GpuFault::NoDmaBuf`].
    pub fn dma_buf(&self) -> Result<DmaBuf, Error> {
        self.span.export()
    }

    /// The address of a range that is wholly inside.
    pub(super) fn range(&self, operation: Operation, offset: u64, len: u64) -> Result<u64, Error> {
        self.span.range(operation, offset, len)
    }
}

fn allocate(gpu: &Gpu, len: u64, grain: Grain) -> Result<u64, Error> {
    let _current = gpu.enter()?;
    gpu.api().alloc(len, grain).map_err(|refused| {
        if refused.code.number != OUT_OF_MEMORY {
            return Error::from(refused);
        }
        let (free, total) = gpu.api().mem_info().unwrap_or((0, gpu.info().memory));
        Error::from(GpuFault::OutOfMemory {
            device: gpu.info().pci,
            len,
            free,
            total,
            code: refused.code,
        })
    })
}

impl From<Span> for GpuMemory {
    fn from(span: Span) -> Self {
        Self {
            span: Arc::new(span),
        }
    }
}
