//! The one safe handle for host memory.

use std::any::Any;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvxfer_verbs::{FdSpan, Memory, MemoryKind};

use crate::error::{Error, Operation};
use crate::gpu::GpuSpan;
use crate::mapping::Mapping;
use crate::raw;

/// A span of host memory. Clones are the same memory, which lives as long as any of them.
///
/// Offsets and lengths are in bytes. The crate's first page says what may be expected of bytes that
/// others change meanwhile.
#[derive(Clone)]
pub struct HostMemory {
    span: Arc<Span>,
}

/// One span to copy from a source memory to a destination memory; all in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyPair {
    /// Offset in the source.
    pub src: u64,
    /// Offset in the destination.
    pub dst: u64,
    /// Length.
    pub len: u64,
}

struct Span {
    base: NonNull<u8>,
    len: usize,
    hold: Hold,
}

/// What keeps a span's pages where they are. The field order of an arena is its drop order: the
/// mapping goes before the file.
enum Hold {
    Arena { mapping: Mapping, fd: OwnedFd },
    Buffer(Mapping),
    Owner { _keep: Arc<dyn Any + Send + Sync> },
    Part { whole: Arc<Span>, offset: usize },
}

// SAFETY: the pointer leads to pages that `hold` keeps mapped for every thread; `hold` is Send.
unsafe impl Send for Span {}
// SAFETY: through `&Span` the bytes are reached only by `raw` (foreign code) and by atomics.
unsafe impl Sync for Span {}

// SAFETY: `hold` keeps the pages mapped, readable, writable and in place while the span lives (for
// `Owner` by the contract of `from_raw_parts`); no reference to the bytes is made but of AtomicU64,
// within one call; the answers are constant; an arena's file is mapped from its offset 0.
unsafe impl Memory for Span {
    fn addr(&self) -> u64 {
        // Exposed: devices go there by the number, and so does `read`.
        self.base.as_ptr().expose_provenance() as u64
    }

    fn len(&self) -> u64 {
        self.len as u64
    }

    fn kind(&self) -> MemoryKind {
        MemoryKind::Host
    }

    fn fd(&self) -> Option<FdSpan<'_>> {
        let (fd, offset) = self.file()?;
        Some(FdSpan { fd, offset })
    }
}

impl Span {
    fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        match &self.hold {
            Hold::Arena { fd, .. } => Some((fd.as_fd(), 0)),
            Hold::Part { whole, offset } => {
                let (fd, start) = whole.file()?;
                Some((fd, start + *offset as u64))
            }
            Hold::Buffer(_) | Hold::Owner { .. } => None,
        }
    }

    fn mapping(&self) -> Option<&Mapping> {
        match &self.hold {
            Hold::Arena { mapping, .. } | Hold::Buffer(mapping) => Some(mapping),
            Hold::Part { whole, .. } => whole.mapping(),
            Hold::Owner { .. } => None,
        }
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.hold {
            Hold::Arena { .. } => "arena",
            Hold::Buffer(_) => "buffer",
            Hold::Owner { .. } => "owner's memory",
            Hold::Part { .. } => "part",
        };
        write!(f, "{kind} of {} bytes at {:p}", self.len, self.base)
    }
}

impl fmt::Debug for HostMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostMemory({:?})", self.span)
    }
}

impl HostMemory {
    pub(crate) fn arena(mapping: Mapping, fd: OwnedFd, len: usize) -> Self {
        debug_assert!(len <= mapping.len());
        let base = mapping.addr();
        Self::new(base, len, Hold::Arena { mapping, fd })
    }

    pub(crate) fn buffer(mapping: Mapping, len: usize) -> Self {
        debug_assert!(len <= mapping.len());
        let base = mapping.addr();
        Self::new(base, len, Hold::Buffer(mapping))
    }

    fn new(base: NonNull<u8>, len: usize, hold: Hold) -> Self {
        let span = Arc::new(Span { base, len, hold });
        Self { span }
    }

    /// Memory that somebody else allocated: an engine's own KV cache.
    ///
    /// `keep` is dropped when the last clone and the last registration of the memory are gone; put
    /// into it whatever keeps the pages alive.
    ///
    /// # Safety
    ///
    /// The caller promises, for as long as `keep` is not dropped:
    /// - the `len` bytes from `ptr` are mapped, readable and writable, do not move, and do not wrap
    ///   around the address space;
    /// - no Rust reference to any of them exists while kvxfer may touch them; code in other languages uses
    ///   them only when the transfers' outcomes say that it may.
    #[must_use]
    pub unsafe fn from_raw_parts(
        ptr: NonNull<u8>,
        len: usize,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self::new(ptr, len, Hold::Owner { _keep: keep })
    }

    /// The memory behind a token, if it is of this type.
    #[must_use]
    pub fn of(memory: &Arc<dyn Memory>) -> Option<Self> {
        let any = Arc::clone(memory) as Arc<dyn Any + Send + Sync>;
        let span = any.downcast::<Span>().ok()?;
        Some(Self { span })
    }

    /// A part of this memory as memory of its own. It keeps the whole alive.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`] if the part is not wholly inside.
    pub fn slice(&self, offset: u64, len: u64) -> Result<Self, Error> {
        let range = self.range(Operation::Slice, offset, len)?;
        let hold = Hold::Part {
            whole: Arc::clone(&self.span),
            offset: range.offset,
        };
        Ok(Self::new(range.ptr, range.len, hold))
    }

    /// The token that devices register.
    #[must_use]
    pub fn as_memory(&self) -> Arc<dyn Memory> {
        Arc::clone(&self.span) as Arc<dyn Memory>
    }

    /// The address of the first byte in this process.
    #[must_use]
    pub fn addr(&self) -> u64 {
        self.span.addr()
    }

    /// The length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.span.len()
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.span.len == 0
    }

    /// The file behind it, if another process may map it.
    #[must_use]
    pub fn fd(&self) -> Option<FdSpan<'_>> {
        self.span.fd()
    }

    /// Copies bytes out.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`]; then nothing was copied.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        let range = self.range(Operation::Read, offset, into.len() as u64)?;
        // SAFETY: `range` lies in pages that the span keeps mapped; `into` is ours and as long.
        unsafe { raw::copy(into.as_mut_ptr(), range.ptr.as_ptr(), range.len) };
        Ok(())
    }

    /// Copies bytes in.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`]; then nothing was copied.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        let range = self.range(Operation::Write, offset, from.len() as u64)?;
        // SAFETY: `range` lies in pages that the span keeps mapped and writable; `from` is as long.
        unsafe { raw::copy(range.ptr.as_ptr(), from.as_ptr(), range.len) };
        Ok(())
    }

    /// Sets bytes.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`]; then nothing was set.
    pub fn fill(&self, offset: u64, len: u64, byte: u8) -> Result<(), Error> {
        let range = self.range(Operation::Fill, offset, len)?;
        // SAFETY: `range` lies in pages that the span keeps mapped and writable.
        unsafe { raw::set(range.ptr.as_ptr(), byte, range.len) };
        Ok(())
    }

    /// Copies from another memory, or within one: the ranges may overlap.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`]; then nothing was copied.
    pub fn copy_from(
        &self,
        src: &Self,
        src_offset: u64,
        dst_offset: u64,
        len: u64,
    ) -> Result<(), Error> {
        let pair = CopyPair {
            src: src_offset,
            dst: dst_offset,
            len,
        };
        self.copy_pairs(src, &[pair])
    }

    /// Copies many spans from another memory in the order given: what a transfer over an arena
    /// would cost if it were nothing but `memcpy`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`] for the first pair that is; then nothing was copied.
    pub fn copy_pairs(&self, src: &Self, pairs: &[CopyPair]) -> Result<(), Error> {
        for pair in pairs {
            src.range(Operation::CopySource, pair.src, pair.len)?;
            self.range(Operation::CopyDestination, pair.dst, pair.len)?;
        }
        for pair in pairs {
            let from = src.range(Operation::CopySource, pair.src, pair.len)?;
            let to = self.range(Operation::CopyDestination, pair.dst, pair.len)?;
            // SAFETY: both ranges lie in pages that their spans keep mapped; they may overlap.
            unsafe { raw::copy(to.ptr.as_ptr(), from.ptr.as_ptr(), to.len) };
        }
        Ok(())
    }

    /// Loads a 64-bit word with acquire order: what was written before the word was stored is seen
    /// by what reads after this.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`], or [`Error::Misaligned`] if its address is no multiple of 8.
    pub fn load_u64(&self, offset: u64) -> Result<u64, Error> {
        let word = self.word(Operation::Load, offset)?;
        // SAFETY: `word` is aligned, mapped while the span lives, and only ever used as an atomic
        // for as long as this reference lives, which is this call.
        let word = unsafe { AtomicU64::from_ptr(word) };
        Ok(word.load(Ordering::Acquire))
    }

    /// Stores a 64-bit word with release order.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`], or [`Error::Misaligned`] if its address is no multiple of 8.
    pub fn store_u64(&self, offset: u64, value: u64) -> Result<(), Error> {
        let word = self.word(Operation::Store, offset)?;
        // SAFETY: as in `load_u64`.
        let word = unsafe { AtomicU64::from_ptr(word) };
        word.store(value, Ordering::Release);
        Ok(())
    }

    fn word(&self, operation: Operation, offset: u64) -> Result<*mut u64, Error> {
        let range = self.range(operation, offset, 8)?;
        let word = range.ptr.as_ptr().cast::<u64>();
        if word.is_aligned() {
            Ok(word)
        } else {
            Err(Error::Misaligned {
                operation,
                offset,
                addr: word.addr() as u64,
            })
        }
    }

    /// The one bounds check: every access goes through it.
    pub(crate) fn range(
        &self,
        operation: Operation,
        offset: u64,
        len: u64,
    ) -> Result<Range, Error> {
        let size = self.span.len;
        let inside = || {
            let (offset, len) = (usize::try_from(offset).ok()?, usize::try_from(len).ok()?);
            (offset.checked_add(len)? <= size).then_some((offset, len))
        };
        let Some((start, len)) = inside() else {
            return Err(Error::OutOfBounds {
                operation,
                offset,
                len,
                size: size as u64,
            });
        };
        // SAFETY: `start` ≤ `size`, and the span's `size` bytes are one mapping that does not wrap.
        let ptr = unsafe { self.span.base.add(start) };
        Ok(Range {
            ptr,
            offset: start,
            len,
        })
    }

    pub(crate) fn mapped(&self) -> Option<&Mapping> {
        self.span.mapping()
    }
}

/// Copies bytes out of any memory of the host, whoever made it, and of what this crate has of GPUs. Those copy
/// them themselves: each call takes some microseconds then.
///
/// # Errors
///
/// [`Error::NotHost`]; [`Error::OutOfBounds`]. Then nothing was copied. [`Error::Gpu`].
pub fn read(memory: &dyn Memory, offset: u64, into: &mut [u8]) -> Result<(), Error> {
    if let Some(span) = (memory as &dyn Any).downcast_ref::<GpuSpan>() {
        return span.read(offset, into);
    }
    let kind = memory.kind();
    if kind != MemoryKind::Host {
        return Err(Error::NotHost { kind });
    }
    let (size, len) = (memory.len(), into.len() as u64);
    let end = offset.checked_add(len).filter(|end| *end <= size);
    let addr = end.and_then(|_| memory.addr().checked_add(offset));
    let Some(addr) = addr.and_then(|addr| usize::try_from(addr).ok()) else {
        return Err(Error::OutOfBounds {
            operation: Operation::Read,
            offset,
            len,
            size,
        });
    };
    let from = std::ptr::with_exposed_provenance::<u8>(addr);
    // SAFETY: host memory is mapped and readable in all its length while the value lives, which who
    // implements `Memory` keeps; `from` and `len` bytes lie in it; `into` is ours and as long.
    unsafe { raw::copy(into.as_mut_ptr(), from, into.len()) };
    Ok(())
}

/// A checked part of a memory. The pointer is good while the memory lives.
#[derive(Clone, Copy)]
pub(crate) struct Range {
    pub(crate) ptr: NonNull<u8>,
    pub(crate) offset: usize,
    pub(crate) len: usize,
}
