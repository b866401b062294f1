//! The stand-in's memory: files that another process can map by a handle.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Mutex;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::super::api::PointerFacts;
use super::super::code;
use super::super::code::Refused;
use super::{lock, refused};
use crate::mapping::Mapping;
use crate::pages;

/// What begins the stand-in's handles.
const MAGIC: u64 = u64::from_le_bytes(*b"kvx host");

#[derive(Default)]
pub(super) struct Memories {
    /// The device's memory, by its first address.
    device: Mutex<BTreeMap<u64, Block>>,
    /// Other processes'.
    opened: Mutex<BTreeMap<u64, Block>>,
    pinned: Mutex<BTreeMap<u64, Mapping>>,
    /// The pages, by the address that they were registered by. As drivers have it: whole ones, each once.
    registered: Mutex<BTreeMap<u64, Range<u64>>>,
}

/// The mapping goes before the file.
struct Block {
    mapping: Mapping,
    len: u64,
    file: OwnedFd,
}

/// What a handle says: which open file of which process, and what that file was.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Handle {
    pid: u64,
    started: u64,
    fd: u64,
    inode: u64,
    len: u64,
}

impl Memories {
    pub(super) fn alloc(&self, len: u64) -> Result<u64, Refused> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let room = || {
            let file = memfd_create(c"kvxfer-host-gpu", flags).ok()?;
            nix::unistd::ftruncate(&file, i64::try_from(len).ok()?).ok()?;
            // Who maps a file that another can cut dies of what it touches behind the cut.
            fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).ok()?;
            Block::map(file, len)
        };
        let block = room().ok_or_else(|| refused("alloc", code::OUT_OF_MEMORY))?;
        Ok(insert(&self.device, block))
    }

    pub(super) fn free(&self, at: u64) -> Result<(), Refused> {
        gone("free", lock(&self.device).remove(&at))
    }

    pub(super) fn pin_new(&self, len: u64) -> Result<u64, Refused> {
        let bytes = usize::try_from(len).ok().and_then(NonZeroUsize::new);
        let mapping = bytes.and_then(|bytes| Mapping::anonymous(bytes).ok());
        let mapping = mapping.ok_or_else(|| refused("host_alloc", code::OUT_OF_MEMORY))?;
        let at = mapping.addr().expose_provenance().get() as u64;
        lock(&self.pinned).insert(at, mapping);
        Ok(at)
    }

    pub(super) fn unpin_new(&self, at: u64) -> Result<(), Refused> {
        gone("host_free", lock(&self.pinned).remove(&at))
    }

    pub(super) fn register(&self, at: u64, len: u64) -> Result<(), Refused> {
        let pages = pages::whole([(at, len)]).into_iter().next();
        let pages = pages.ok_or_else(|| refused("host_register", code::INVALID_VALUE))?;
        let mut registered = lock(&self.registered);
        let before = registered.range(..pages.end).next_back();
        if before.is_some_and(|(_, before)| before.end > pages.start) {
            return Err(refused("host_register", code::ALREADY_REGISTERED));
        }
        registered.insert(at, pages);
        Ok(())
    }

    pub(super) fn unregister(&self, at: u64) -> Result<(), Refused> {
        gone("host_unregister", lock(&self.registered).remove(&at))
    }

    pub(super) fn find(&self, at: u64) -> Option<PointerFacts> {
        [&self.device, &self.opened].into_iter().find_map(|blocks| {
            let blocks = lock(blocks);
            let (base, block) = blocks.range(..=at).next_back()?;
            (at - base < block.len).then_some(PointerFacts {
                ordinal: 0,
                base: *base,
                size: block.len,
                exportable: Some(true),
            })
        })
    }

    pub(super) fn export(&self, at: u64) -> Result<[u8; 64], Refused> {
        let call = "ipc_export";
        let device = lock(&self.device);
        let block = device
            .get(&at)
            .ok_or_else(|| refused(call, code::INVALID_VALUE))?;
        let pid = u64::from(std::process::id());
        let inode = inode_of(&block.file);
        let handle = inode.zip(started(pid)).map(|(inode, started)| Handle {
            pid,
            started,
            fd: u64::try_from(block.file.as_raw_fd()).unwrap_or(u64::MAX),
            inode,
            len: block.len,
        });
        let handle = handle.ok_or_else(|| refused(call, code::NOT_SUPPORTED))?;
        Ok(handle.to_bytes())
    }

    pub(super) fn open(&self, bytes: &[u8; 64]) -> Result<u64, Refused> {
        let map = || {
            let handle = Handle::from_bytes(bytes)?;
            let Handle { pid, fd, .. } = handle;
            let path = format!("/proc/{pid}/fd/{fd}");
            // What else may stand behind a process's descriptor must not be opened: a device's or
            // a pipe's opening does something.
            let same = |inode: u64, len: u64| (inode, len) == (handle.inode, handle.len);
            let before = fs::metadata(&path).ok()?;
            if !before.is_file() || !same(before.ino(), before.len()) {
                return None;
            }
            let file = OpenOptions::new().read(true).write(true).open(path).ok()?;
            let after = file.metadata().ok()?;
            if !same(after.ino(), after.len()) || started(pid) != Some(handle.started) {
                return None;
            }
            let seals = SealFlag::from_bits_truncate(fcntl(&file, FcntlArg::F_GET_SEALS).ok()?);
            if !seals.contains(SealFlag::F_SEAL_SHRINK) {
                return None;
            }
            Block::map(file.into(), handle.len)
        };
        let block = map().ok_or_else(|| refused("ipc_open", code::INVALID_HANDLE))?;
        Ok(insert(&self.opened, block))
    }

    pub(super) fn close(&self, at: u64) -> Result<(), Refused> {
        gone("ipc_close", lock(&self.opened).remove(&at))
    }
}

impl Block {
    fn map(file: OwnedFd, len: u64) -> Option<Self> {
        let bytes = NonZeroUsize::new(usize::try_from(len).ok()?)?;
        let mapping = Mapping::shared(file.as_fd(), bytes).ok()?;
        Some(Self { mapping, len, file })
    }
}

impl Handle {
    fn to_bytes(self) -> [u8; 64] {
        let words = [MAGIC, self.pid, self.started, self.fd, self.inode, self.len];
        let mut bytes = [0; 64];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: &[u8; 64]) -> Option<Self> {
        let (words, _) = bytes.as_chunks::<8>();
        let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        match words.as_slice() {
            [MAGIC, pid, started, fd, inode, len, 0, 0] => Some(Self {
                pid: *pid,
                started: *started,
                fd: *fd,
                inode: *inode,
                len: *len,
            }),
            _ => None,
        }
    }
}

fn insert(blocks: &Mutex<BTreeMap<u64, Block>>, block: Block) -> u64 {
    let at = block.mapping.addr().expose_provenance().get() as u64;
    lock(blocks).insert(at, block);
    at
}

fn gone<T>(call: &'static str, found: Option<T>) -> Result<(), Refused> {
    let found = found.ok_or_else(|| refused(call, code::INVALID_VALUE));
    found.map(drop)
}

fn inode_of(file: &OwnedFd) -> Option<u64> {
    let file = File::from(file.try_clone().ok()?);
    Some(file.metadata().ok()?.ino())
}

/// When a process began, in ticks since the machine did: with the number it names the process for ever.
fn started(pid: u64) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may have spaces and brackets; the 20th field behind it is the start.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Free and total bytes of the host.
pub(super) fn host_memory() -> (u64, u64) {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let of = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
        kib.checked_mul(1024)
    };
    let free = of("MemAvailable:").unwrap_or(0);
    (free, of("MemTotal:").unwrap_or(0))
}
