//! A mapping of this process, taken and given back.

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::mman::{self, MapFlags, MmapAdvise, ProtFlags};

/// The size of a huge page that a PMD entry maps on x86-64 and on arm64 with 4 KiB pages. Mappings are aligned
/// to it everywhere: where it is no huge page, that does no harm.
pub(crate) const HUGE: usize = 2 << 20;

/// Linux 6.1; not in `nix` yet.
const MADV_COLLAPSE: i32 = 25;

/// Readable and writable pages that are ours until the drop.
#[derive(Debug)]
pub(crate) struct Mapping {
    addr: NonNull<u8>,
    len: usize,
    /// Bytes after the mapping that stay reserved, without access: no neighbour merges with it in
    /// the kernel's account of its pages, and running over the end faults.
    guard: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread; the pointer is only handed out.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` gives nothing but the address and calls the kernel.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Anonymous memory, aligned to 2 MiB.
    pub(crate) fn anonymous(len: NonZeroUsize) -> Result<Self, Errno> {
        Self::aligned(len, None)
    }

    /// A file's first `len` bytes, shared, aligned to 2 MiB.
    pub(crate) fn shared(fd: BorrowedFd<'_>, len: NonZeroUsize) -> Result<Self, Errno> {
        Self::aligned(len, Some(fd))
    }

    /// A hugetlb file's first `len` bytes. The kernel itself aligns these, and may refuse them late.
    pub(crate) fn hugetlb(fd: BorrowedFd<'_>, len: NonZeroUsize) -> Result<Self, Errno> {
        // SAFETY: the kernel picks an address where nothing is mapped yet.
        let addr = unsafe { mman::mmap(None, len, read_write(), MapFlags::MAP_SHARED, fd, 0) }?;
        Ok(Self {
            addr: addr.cast(),
            len: len.get(),
            guard: 0,
        })
    }

    /// Reserves more addresses than needed, maps at the first aligned one among them, gives the rest
    /// back.
    fn aligned(len: NonZeroUsize, fd: Option<BorrowedFd<'_>>) -> Result<Self, Errno> {
        let reserved = len.checked_add(2 * HUGE).ok_or(Errno::ENOMEM)?;
        let guard = HUGE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: the kernel picks an address where nothing is mapped yet.
        let start = unsafe { mman::mmap_anonymous(None, reserved, ProtFlags::PROT_NONE, flags) }?;
        let first = start.addr().get();
        let aligned = first.next_multiple_of(HUGE);
        let target = NonZeroUsize::new(aligned);
        let fixed = MapFlags::MAP_FIXED;
        let mapped = match fd {
            Some(fd) => {
                // SAFETY: MAP_FIXED replaces only addresses inside the reservation made above.
                unsafe {
                    mman::mmap(
                        target,
                        len,
                        read_write(),
                        MapFlags::MAP_SHARED | fixed,
                        fd.as_fd(),
                        0,
                    )
                }
            }
            None => {
                let flags = MapFlags::MAP_PRIVATE | fixed;
                // SAFETY: MAP_FIXED replaces only addresses inside the reservation made above.
                unsafe { mman::mmap_anonymous(target, len, read_write(), flags) }
            }
        };
        let head = aligned - first;
        let tail = aligned + len.get() + guard;
        unmap(start.cast(), head);
        if let Some(addr) = NonNull::new(start.as_ptr().cast::<u8>().wrapping_add(tail - first)) {
            unmap(addr, first + reserved.get() - tail);
        }
        // Had the fixed mapping failed, the middle would stay reserved: a hole that the kernel may
        // have made there is not ours to unmap again.
        let addr = mapped?.cast();
        Ok(Self {
            addr,
            len: len.get(),
            guard,
        })
    }

    pub(crate) fn addr(&self) -> NonNull<u8> {
        self.addr
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Says that huge pages are wanted. A kernel without them refuses, which is fine.
    pub(crate) fn want_huge(&self) -> Result<(), Errno> {
        // SAFETY: the range is our own mapping, and the advice changes no byte of it.
        unsafe { mman::madvise(self.pointer(), self.len, MmapAdvise::MADV_HUGEPAGE) }
    }

    /// Gives every page now what it would get at its first touch. Out of memory is an error here, where a
    /// touch of a file's page would be a SIGBUS.
    pub(crate) fn populate(&self) -> Result<(), Errno> {
        self.populate_part(0, self.len)
    }

    fn populate_part(&self, offset: usize, len: usize) -> Result<(), Errno> {
        let start = self.addr.as_ptr().wrapping_add(offset).cast();
        loop {
            // SAFETY: the range is inside our own mapping, and populating changes no byte of it.
            let rc = unsafe { libc::madvise(start, len, libc::MADV_POPULATE_WRITE) };
            match Errno::result(rc) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR | Errno::EAGAIN) => continue,
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Asks for huge pages now, whatever the system's default for this kind of memory is.
    ///
    /// The kernel collapses only where something is mapped already: one small page is taken in
    /// each huge one, and the collapse fills the holes around it, which is faster than moving 512 pages.
    pub(crate) fn collapse(&self) -> Result<(), Errno> {
        for offset in (0..self.len).step_by(HUGE) {
            self.populate_part(offset, 1)?;
        }
        // SAFETY: the range is our own mapping, and collapsing keeps its bytes.
        let rc = unsafe { libc::madvise(self.addr.as_ptr().cast(), self.len, MADV_COLLAPSE) };
        Errno::result(rc).map(drop)
    }

    fn pointer(&self) -> NonNull<c_void> {
        self.addr.cast()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        unmap(self.addr, self.len + self.guard);
    }
}

fn read_write() -> ProtFlags {
    ProtFlags::PROT_READ | ProtFlags::PROT_WRITE
}

/// Gives addresses of our own back. munmap fails only for a bad range (ours is not) or when the split needs a
/// mapping too many: then the addresses stay reserved, which is the worst of it.
fn unmap(addr: NonNull<u8>, len: usize) {
    if len == 0 {
        return;
    }
    // SAFETY: every caller passes a range that it mapped itself and that nothing uses any more.
    if let Err(errno) = unsafe { mman::munmap(addr.cast(), len) } {
        tracing::warn!(%errno, len, "munmap refused; the addresses stay reserved");
    }
}
