//! Segments: the files behind registered memory, passed to peers and mapped read-only there.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, Weak};

use crate::cq::lock;
use crate::error::{Error, last_os, os};
use crate::region::SegmentSpan;

const HUGE: u64 = 2 << 20;

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

/// Checks that a peer's file cannot shrink under a mapping, which would be SIGBUS here.
pub(crate) fn check_sealed(fd: BorrowedFd<'_>) -> Result<(), Error> {
    // A file of another kind has no seals at all.
    let have = seals(fd).unwrap_or(0);
    let want = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
    if have & want == want {
        Ok(())
    } else {
        Err(Error::Unsealed { seals: have })
    }
}

/// A file mapped whole, at a huge-page boundary.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: u64,
    len: u64,
}

impl Mapping {
    /// Maps `len` bytes, read-only unless `write`.
    pub(crate) fn new(fd: BorrowedFd<'_>, len: u64, write: bool) -> Result<Self, Error> {
        let bad = || Error::RegisterSpan { addr: 0, len };
        let size = usize::try_from(len).map_err(|_| bad())?;
        let room = size
            .checked_add(HUGE as usize)
            .filter(|_| size > 0)
            .ok_or_else(bad)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous reservation wherever the kernel likes replaces nothing.
        let hold = unsafe { libc::mmap(std::ptr::null_mut(), room, libc::PROT_NONE, flags, -1, 0) };
        if hold == libc::MAP_FAILED {
            return Err(last_os("mmap"));
        }
        let start = hold as u64;
        let base = start.next_multiple_of(HUGE);
        let end = (base + len).next_multiple_of(4096);
        let prot = if write {
            libc::PROT_READ | libc::PROT_WRITE
        } else {
            libc::PROT_READ
        };
        // SAFETY: base..base+len lies in the reservation made above, which nobody else knows of,
        // so MAP_FIXED replaces only it.
        let got = unsafe {
            libc::mmap(
                base as *mut libc::c_void,
                size,
                prot,
                libc::MAP_SHARED | libc::MAP_FIXED,
                fd.as_raw_fd(),
                0,
            )
        };
        if got == libc::MAP_FAILED {
            let e = last_os("mmap");
            unmap(start, room as u64);
            return Err(e);
        }
        unmap(start, base - start);
        unmap(end, start + room as u64 - end);
        // SAFETY: the range was mapped just now. Advice: an error (no huge pages) changes nothing.
        let _ = unsafe { libc::madvise(got, size, libc::MADV_HUGEPAGE) };
        Ok(Self { base, len })
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
        unmap(self.base, self.len.next_multiple_of(4096));
    }
}

/// Unmaps a page-aligned range that belongs to a [`Mapping`].
fn unmap(start: u64, len: u64) {
    if len > 0 {
        // SAFETY: the callers own the range: it is their reservation or mapping, and nothing
        // points into it any more.
        let _ = unsafe { libc::munmap(start as *mut libc::c_void, len as usize) };
    }
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
        check_sealed(fd)?;
        let (size, id) = stat(fd)?;
        let mut maps = lock(&self.maps);
        if let Some(map) = maps.get(&id).and_then(Weak::upgrade) {
            return Ok(map);
        }
        let map = Arc::new(Mapping::new(fd, size, false)?);
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
        check_sealed(fd)?;
        let (size, file) = stat(fd)?;
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::FileTooSmall { size, offset, len });
        }
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

    #[test]
    fn maps_only_sealed_files_and_shares_the_mapping() {
        let cache = MapCache::default();
        let fd = new_memfd(c"t", 8192).unwrap();
        assert!(matches!(
            cache.map(fd.as_fd()),
            Err(Error::Unsealed { seals: 0 })
        ));
        seal(fd.as_fd(), libc::F_SEAL_SHRINK | libc::F_SEAL_GROW).unwrap();
        let a = cache.map(fd.as_fd()).unwrap();
        let b = cache.map(fd.try_clone().unwrap().as_fd()).unwrap();
        assert!(Arc::ptr_eq(&a, &b));
        assert_eq!(a.base() % HUGE, 0);
        assert_eq!(a.at(8191, 1), Some(a.base() + 8191));
        assert_eq!(a.at(8191, 2), None);
        assert_eq!(a.at(u64::MAX, 2), None);
    }
}
