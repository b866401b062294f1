//! Segments: the files behind registered memory, passed to peers and mapped read-only there.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Weak};

use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};

use crate::error::{Error, last_os, os};
use crate::region::SegmentSpan;
use crate::sync::{Mutex, lock};

const HUGE: u64 = 2 << 20;
/// The smallest page there is; a kernel with larger ones rounds up by itself.
const PAGE: u64 = 4096;

/// Device and inode: which file it is, whatever the descriptor.
pub(crate) type FileId = (u64, u64);

pub(crate) fn new_memfd(name: &CStr, size: u64) -> Result<OwnedFd, Error> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a C string and the call takes nothing else by pointer.
    let raw = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if raw < 0 {
        return Err(last_os("memfd_create"));
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    let file = File::from(fd);
    file.set_len(size).map_err(os("ftruncate"))?;
    Ok(file.into())
}

pub(crate) fn seal(fd: BorrowedFd<'_>, seals: i32) -> Result<(), Error> {
    // SAFETY: F_ADD_SEALS takes an int and touches no memory of ours.
    let rc = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) };
    if rc < 0 {
        Err(last_os("fcntl(F_ADD_SEALS)"))
    } else {
        Ok(())
    }
}

/// The seals of a file; a file that cannot have any answers with an error.
pub(crate) fn seals(fd: BorrowedFd<'_>) -> Result<i32, Error> {
    // SAFETY: F_GET_SEALS takes nothing and touches no memory of ours.
    let rc = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    if rc < 0 {
        Err(last_os("fcntl(F_GET_SEALS)"))
    } else {
        Ok(rc)
    }
}

/// Size and identity of a file.
pub(crate) fn stat(fd: BorrowedFd<'_>) -> Result<(u64, FileId), Error> {
    let file = File::from(fd.try_clone_to_owned().map_err(os("dup"))?);
    let meta = file.metadata().map_err(os("fstat"))?;
    Ok((meta.len(), (meta.dev(), meta.ino())))
}

/// Bytes of a file that are in pages, and not holes.
pub(crate) fn allocated(fd: BorrowedFd<'_>) -> Result<u64, Error> {
    let file = File::from(fd.try_clone_to_owned().map_err(os("dup"))?);
    let meta = file.metadata().map_err(os("fstat"))?;
    // In units of 512 bytes, whatever the file system's blocks are.
    Ok(meta.blocks().saturating_mul(512))
}

/// Checks that a file may be mapped and copied from with no fear of SIGBUS, whatever its owner does;
/// answers the size of its pages if they are reserved huge ones.
///
/// A copy from a mapping dies of SIGBUS where the file has no page and gets none. So:
///
/// - The file must not shrink: `F_SEAL_SHRINK` (and `F_SEAL_GROW`, so that what was checked stays so).
///   Only memfds have seals; a file of another kind has none and is refused.
/// - Holes can be punched in it (`fallocate`, `MADV_REMOVE`) unless it is sealed against writing. In a
///   memfd of ordinary or transparent huge pages that is harmless: a read of a hole gets a new page
///   of zeros, and fails only when the machine, or this process's memory group, has none left,
///   which kills processes anyway. Such files are taken as they are.
/// - Reserved huge pages are few, and a hole gets one of the free pool or a SIGBUS; a memory group's
///   limit does the same to a page that was reserved and never touched. So holes must be
///   impossible, now and later: sealed with `F_SEAL_FUTURE_WRITE` or `F_SEAL_WRITE`, either of
///   which forbids punching, and every page mapped before the first copy
///   ([`Mapping::populate`]), which fails with an error. These pages are never swapped out.
pub(crate) fn check_mappable(fd: BorrowedFd<'_>) -> Result<Option<u64>, Error> {
    let have = seals(fd).unwrap_or(0);
    let want = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
    if have & want != want {
        return Err(Error::Unsealed { seals: have });
    }
    let fs = fstatfs(fd).map_err(|e| os("fstatfs")(e.into()))?;
    if fs.filesystem_type() != HUGETLBFS_MAGIC {
        return Ok(None);
    }
    if have & (libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_WRITE) == 0 {
        return Err(Error::Punchable { seals: have });
    }
    Ok(Some(u64::try_from(fs.block_size()).unwrap_or(HUGE)))
}

/// Whether this kernel can map every page now and say so if it cannot (Linux 5.14).
fn can_populate() -> bool {
    // SAFETY: advice on no bytes at all; the kernel looks whether it knows the advice first.
    unsafe { libc::madvise(std::ptr::null_mut(), 0, libc::MADV_POPULATE_READ) == 0 }
}

/// A file mapped whole, at a huge-page boundary if that can be had.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: u64,
    len: u64,
    /// What it covers: `len` in whole pages.
    mapped: u64,
}

impl Mapping {
    /// Maps `len` bytes, read-only unless `write`.
    pub(crate) fn new(fd: BorrowedFd<'_>, len: u64, write: bool) -> Result<Self, Error> {
        Self::with_pages(fd, len, write, PAGE)
    }

    /// The same for a file whose pages have this size.
    fn with_pages(fd: BorrowedFd<'_>, len: u64, write: bool, page: u64) -> Result<Self, Error> {
        let bad = || Error::RegisterSpan { addr: 0, len };
        let grain = page.max(HUGE);
        let mapped = len.checked_next_multiple_of(page).ok_or_else(bad)?;
        let size = usize::try_from(len).map_err(|_| bad())?;
        let room = mapped.checked_add(grain).filter(|_| size > 0);
        let room = room
            .and_then(|room| usize::try_from(room).ok())
            .ok_or_else(bad)?;
        let prot = if write {
            libc::PROT_READ | libc::PROT_WRITE
        } else {
            libc::PROT_READ
        };
        let map = |hint: u64, flags| {
            // SAFETY: without MAP_FIXED nothing that is mapped is replaced.
            let got = unsafe {
                libc::mmap(
                    hint as *mut libc::c_void,
                    size,
                    prot,
                    libc::MAP_SHARED | flags,
                    fd.as_raw_fd(),
                    0,
                )
            };
            if got == libc::MAP_FAILED {
                Err(std::io::Error::last_os_error())
            } else {
                Ok(got as u64)
            }
        };
        // Where there is room for an aligned mapping is found by a reservation. It is given back
        // whole before the file is mapped there, and only where nobody was faster: a MAP_FIXED
        // that fails leaves a hole which may be another's by the time it could be mended, and
        // keeping such holes reserved would let a peer's unmappable files use up the addresses.
        let mut got = Err(std::io::ErrorKind::AddrInUse.into());
        for _ in 0..4 {
            let base = free_addresses(room)?.next_multiple_of(grain);
            got = map(base, libc::MAP_FIXED_NOREPLACE);
            let taken = |e: &std::io::Error| e.raw_os_error() == Some(libc::EEXIST);
            if !got.as_ref().is_err_and(taken) {
                break;
            }
        }
        let base = got.or_else(|_| map(0, 0)).map_err(os("mmap"))?;
        // SAFETY: the range was mapped just now. Advice: an error (no huge pages) changes nothing.
        let _ = unsafe { libc::madvise(base as *mut libc::c_void, size, libc::MADV_HUGEPAGE) };
        Ok(Self { base, len, mapped })
    }

    /// Maps every page now; a page that cannot be had is an error here.
    fn populate(&self) -> Result<(), Error> {
        loop {
            let start = self.base as *mut libc::c_void;
            // SAFETY: the range is our own mapping, and populating for reading changes no byte of it.
            let rc =
                unsafe { libc::madvise(start, self.mapped as usize, libc::MADV_POPULATE_READ) };
            if rc == 0 {
                return Ok(());
            }
            let e = std::io::Error::last_os_error();
            if !matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
                return Err(os("madvise(MADV_POPULATE_READ)")(e));
            }
        }
    }

    #[inline]
    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    #[inline]
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The address of `len` bytes at `offset`, if they are inside.
    pub(crate) fn at(&self, offset: u64, len: u64) -> Option<u64> {
        let end = offset.checked_add(len)?;
        (end <= self.len).then_some(self.base + offset)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping's, and nothing points into it any more.
        let _ = unsafe { libc::munmap(self.base as *mut libc::c_void, self.mapped as usize) };
    }
}

/// Where `room` addresses were free just now.
fn free_addresses(room: usize) -> Result<u64, Error> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new anonymous reservation wherever the kernel likes replaces nothing.
    let hold = unsafe { libc::mmap(std::ptr::null_mut(), room, libc::PROT_NONE, flags, -1, 0) };
    if hold == libc::MAP_FAILED {
        return Err(last_os("mmap"));
    }
    // SAFETY: the reservation made above, which nobody else knows of.
    let _ = unsafe { libc::munmap(hold, room) };
    Ok(hold as u64)
}

/// Peers' files mapped here, each once, for as long as a queue pair holds it.
#[derive(Debug, Default)]
pub(crate) struct MapCache {
    // By file identity, which a peer cannot forge, not by what the peer calls it.
    maps: Mutex<HashMap<FileId, Weak<Mapping>>>,
}

impl MapCache {
    /// Maps a sealed file read-only, whole.
    pub(crate) fn map(&self, fd: BorrowedFd<'_>) -> Result<Arc<Mapping>, Error> {
        let huge = check_mappable(fd)?;
        let (size, id) = stat(fd)?;
        let mut maps = lock(&self.maps);
        if let Some(map) = maps.get(&id).and_then(Weak::upgrade) {
            return Ok(map);
        }
        let map = Arc::new(match huge {
            None => Mapping::new(fd, size, false)?,
            Some(page) => {
                let map = Mapping::with_pages(fd, size, false, page)?;
                map.populate()?;
                map
            }
        });
        maps.retain(|_, m| m.strong_count() > 0);
        maps.insert(id, Arc::downgrade(&map));
        Ok(map)
    }
}

#[derive(Debug)]
struct Segment {
    id: u32,
    file: FileId,
    fd: Arc<OwnedFd>,
    /// Regions in it.
    regions: u32,
    /// Regions in it that peers may read.
    readable: u32,
}

/// This context's own files.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    list: Vec<Segment>,
    last: u32,
}

impl Segments {
    /// Notes a region of `len` bytes in a file.
    pub(crate) fn add(
        &mut self,
        fd: BorrowedFd<'_>,
        offset: u64,
        len: u64,
        readable: bool,
    ) -> Result<SegmentSpan, Error> {
        let huge = check_mappable(fd);
        let (size, file) = stat(fd)?;
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::FileTooSmall { size, offset, len });
        }
        // What a peer's device would refuse to map is not passed: peers then read the region as
        // memory without a file, by `process_vm_readv`, for which a missing page is an error.
        match huge {
            Err(why @ Error::Punchable { .. }) => {
                tracing::info!(%why, "peers will not map this memory; they copy it by process_vm");
                return Ok(SegmentSpan::NONE);
            }
            Ok(Some(_)) if !can_populate() => {
                tracing::info!(
                    "this kernel cannot map huge pages safely; peers copy by process_vm"
                );
                return Ok(SegmentSpan::NONE);
            }
            answer => answer?,
        };
        if let Some(s) = self.list.iter_mut().find(|s| s.file == file) {
            s.regions += 1;
            s.readable += u32::from(readable);
            return Ok(SegmentSpan { id: s.id, offset });
        }
        let fd = Arc::new(read_only(fd)?);
        self.last += 1;
        let id = self.last;
        self.list.push(Segment {
            id,
            file,
            fd,
            regions: 1,
            readable: u32::from(readable),
        });
        Ok(SegmentSpan { id, offset })
    }

    pub(crate) fn remove(&mut self, id: u32, readable: bool) {
        if let Some(at) = self.list.iter().position(|s| s.id == id)
            && let Some(s) = self.list.get_mut(at)
        {
            s.regions -= 1;
            s.readable -= u32::from(readable);
            if s.regions == 0 {
                self.list.swap_remove(at);
            }
        }
    }

    /// The file to pass for a WRITE's source.
    pub(crate) fn source(&self, id: u32) -> Option<Arc<OwnedFd>> {
        self.list
            .iter()
            .find(|s| s.id == id)
            .map(|s| Arc::clone(&s.fd))
    }

    /// The file to pass to a peer that wants to READ.
    pub(crate) fn readable(&self, id: u32) -> Option<Arc<OwnedFd>> {
        self.list
            .iter()
            .find(|s| s.id == id && s.readable > 0)
            .map(|s| Arc::clone(&s.fd))
    }

    /// All files that peers may read.
    pub(crate) fn all_readable(&self) -> Vec<(u32, Arc<OwnedFd>)> {
        let readable = self.list.iter().filter(|s| s.readable > 0);
        readable.map(|s| (s.id, Arc::clone(&s.fd))).collect()
    }
}

/// A descriptor of the same file that can only be mapped for reading; without /proc, a plain copy.
fn read_only(fd: BorrowedFd<'_>) -> Result<OwnedFd, Error> {
    match File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
        Ok(file) => Ok(file.into()),
        Err(_) => fd.try_clone_to_owned().map_err(os("dup")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    const SIZE: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;

    /// A file of reserved huge pages; the kernel makes it whether or not it has any.
    fn huge_memfd(size: u64) -> Option<OwnedFd> {
        let kind = libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | kind;
        // SAFETY: the name is a C string and the call takes nothing else by pointer.
        let raw = unsafe { libc::memfd_create(c"t".as_ptr(), flags) };
        if raw < 0 {
            eprintln!("skipped: this kernel has no huge pages of 2 MiB");
            return None;
        }
        // SAFETY: the kernel has just made this descriptor for us.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(raw) });
        file.set_len(size).unwrap();
        Some(file.into())
    }

    #[test]
    fn maps_only_sealed_files_and_shares_the_mapping() {
        let cache = MapCache::default();
        let fd = new_memfd(c"t", 8192).unwrap();
        assert!(matches!(
            cache.map(fd.as_fd()),
            Err(Error::Unsealed { seals: 0 })
        ));
        seal(fd.as_fd(), SIZE).unwrap();
        let a = cache.map(fd.as_fd()).unwrap();
        let b = cache.map(fd.try_clone().unwrap().as_fd()).unwrap();
        assert!(Arc::ptr_eq(&a, &b));
        assert_eq!(a.base() % HUGE, 0);
        assert_eq!(a.at(8191, 1), Some(a.base() + 8191));
        assert_eq!(a.at(8191, 2), None);
        assert_eq!(a.at(u64::MAX, 2), None);
    }

    #[test]
    fn a_hole_in_ordinary_memory_reads_as_zeros() {
        let fd = new_memfd(c"t", 8192).unwrap();
        let own = Mapping::new(fd.as_fd(), 8192, true).unwrap();
        // SAFETY: the first byte of a writable mapping of this test's own.
        unsafe { *(own.base() as *mut u8) = 7 };
        seal(fd.as_fd(), SIZE).unwrap();
        let map = MapCache::default().map(fd.as_fd()).unwrap();
        let look = || {
            // SAFETY: the first byte of a mapping that lives.
            unsafe { std::ptr::read_volatile(map.base() as *const u8) }
        };
        assert_eq!(look(), 7);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: takes integers only.
        assert_eq!(unsafe { libc::fallocate(fd.as_raw_fd(), mode, 0, 8192) }, 0);
        assert_eq!(look(), 0);
    }

    #[test]
    fn huge_pages_are_mapped_only_if_nobody_can_punch_them() {
        let Some(fd) = huge_memfd(HUGE) else { return };
        seal(fd.as_fd(), SIZE).unwrap();
        let cache = MapCache::default();
        let e = cache.map(fd.as_fd()).unwrap_err();
        assert!(matches!(e, Error::Punchable { seals: SIZE }), "{e}");
        // One's own is registered all the same, as memory that peers do not map.
        let mut own = Segments::default();
        let span = own.add(fd.as_fd(), 0, HUGE, true).unwrap();
        assert_eq!(span.id, 0);
        assert!(own.all_readable().is_empty());
        own.remove(span.id, true);

        seal(fd.as_fd(), libc::F_SEAL_FUTURE_WRITE).unwrap();
        let span = own.add(fd.as_fd(), 0, HUGE, true).unwrap();
        assert_eq!(span.id != 0, can_populate());
        match cache.map(fd.as_fd()) {
            Ok(map) => {
                // SAFETY: the first byte of a mapping that lives.
                let byte = unsafe { std::ptr::read_volatile(map.base() as *const u8) };
                assert_eq!(byte, 0);
            }
            // No huge page is free: an error, and no SIGBUS later.
            Err(e) => assert!(matches!(e, Error::Os { .. }), "{e}"),
        }
    }

    /// Addresses of this process, in KiB.
    fn addresses() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("VmSize:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    #[test]
    fn a_file_that_cannot_be_mapped_costs_no_addresses() {
        let fd = new_memfd(c"t", 64 << 30).unwrap();
        seal(fd.as_fd(), SIZE | libc::F_SEAL_FUTURE_WRITE).unwrap();
        let before = addresses();
        for _ in 0..100 {
            // A writable mapping of it is refused.
            let e = Mapping::new(fd.as_fd(), 64 << 30, true).unwrap_err();
            assert!(matches!(e, Error::Os { op: "mmap", .. }), "{e}");
        }
        assert!(addresses() < before + (32 << 20));
    }
}
