//! Host memory that another process of this machine may map, read-only.

use std::ffi::CStr;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use kvxfer_verbs::Memory;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::error::Error;
use crate::mapping::{HUGE, Mapping};
use crate::memory::HostMemory;
use crate::pages::{self, PageInfo, WhyNotHuge};

/// The name under which arenas show up in `/proc/PID/maps`.
const NAME: &CStr = c"kvxfer-arena";

/// Linux 5.1; not in `nix` yet.
const F_SEAL_FUTURE_WRITE: i32 = 0x10;

/// Whether an arena should have huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum HugePages {
    /// Reserved ones if enough are free, else transparent ones, else ordinary ones.
    #[default]
    Auto,
    /// Ordinary pages only.
    Never,
}

/// How an arena is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArenaOptions {
    /// Whether it should have huge pages.
    pub huge: HugePages,
    /// Take all pages at once. This costs about a second for ten gigabytes; without it the
    /// first touches pay, transparent huge pages come only where the system gives them by itself, and
    /// a machine that has run out of memory answers with SIGBUS instead of an error.
    pub prefault: bool,
}

impl Default for ArenaOptions {
    fn default() -> Self {
        Self {
            huge: HugePages::Auto,
            prefault: true,
        }
    }
}

/// Host memory with a file behind it, so that a peer on the same machine can copy out of it at the
/// speed of memory.
///
/// The file is sealed: nobody can shrink or grow it (a peer that has it mapped can never be hit by SIGBUS), and
/// nobody but this mapping can write it, not even a peer that was given the file.
#[derive(Debug, Clone)]
pub struct HostArena {
    memory: HostMemory,
    why_not: Arc<[WhyNotHuge]>,
}

impl HostArena {
    /// An arena of `len` bytes of zeros, with the default options.
    ///
    /// # Errors
    ///
    /// As [`with_options`](Self::with_options).
    pub fn new(len: u64) -> Result<Self, Error> {
        Self::with_options(len, ArenaOptions::default())
    }

    /// An arena of `len` bytes of zeros. Its file is larger: rounded up to whole pages.
    ///
    /// # Errors
    ///
    /// [`Error::Empty`] for no bytes; [`Error::CreateFile`], [`Error::SizeFile`],
    /// [`Error::SealFile`], [`Error::Map`] and [`Error::Populate`] with the kernel's answer.
    pub fn with_options(len: u64, options: ArenaOptions) -> Result<Self, Error> {
        let bytes = checked_len(len)?;
        let mut why_not = Vec::new();
        let small = bytes.get() < HUGE;
        let want_huge = options.huge == HugePages::Auto && !small;
        if want_huge {
            match Self::reserved(bytes, options.prefault) {
                Ok(memory) => {
                    return Ok(Self {
                        memory,
                        why_not: Arc::new([]),
                    });
                }
                Err(why) => why_not.push(why),
            }
        } else if small && options.huge == HugePages::Auto {
            why_not.push(WhyNotHuge::Small { len });
        } else {
            why_not.push(WhyNotHuge::NotAsked);
        }
        let memory = Self::ordinary(bytes, want_huge, options.prefault, &mut why_not)?;
        Ok(Self {
            memory,
            why_not: why_not.into(),
        })
    }

    /// On reserved huge pages, or why not. Every failure here has something to fall back on.
    fn reserved(len: NonZeroUsize, prefault: bool) -> Result<HostMemory, WhyNotHuge> {
        let refused = |errno| WhyNotHuge::ReservedRefused { errno };
        let file_len = round_up(len, HUGE).ok_or_else(|| refused(Errno::ENOMEM))?;
        let needed = (file_len.get() / HUGE) as u64;
        let free = pages::reserved_free();
        if free < needed {
            return Err(WhyNotHuge::FewReserved { needed, free });
        }
        let fd = create(MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB).map_err(refused)?;
        resize(&fd, file_len).map_err(refused)?;
        let mapping = Mapping::hugetlb(fd.as_fd(), file_len).map_err(refused)?;
        if prefault {
            mapping.populate().map_err(refused)?;
        }
        seal(&fd).map_err(refused)?;
        Ok(HostMemory::arena(mapping, fd, len.get()))
    }

    fn ordinary(
        len: NonZeroUsize,
        want_huge: bool,
        prefault: bool,
        why_not: &mut Vec<WhyNotHuge>,
    ) -> Result<HostMemory, Error> {
        let grain = if want_huge {
            HUGE
        } else {
            usize::try_from(pages::ordinary_page_size()).unwrap_or(HUGE)
        };
        let too_large = Error::TooLarge {
            len: len.get() as u64,
        };
        let file_len = round_up(len, grain).ok_or(too_large)?;
        let bytes = file_len.get() as u64;
        let fd =
            create(MFdFlags::empty()).map_err(|source| Error::CreateFile { len: bytes, source })?;
        resize(&fd, file_len).map_err(|source| Error::SizeFile { len: bytes, source })?;
        let mapping = Mapping::shared(fd.as_fd(), file_len)
            .map_err(|source| Error::Map { len: bytes, source })?;
        seal(&fd).map_err(|source| Error::SealFile { source })?;
        take_pages(&mapping, want_huge, prefault, why_not)?;
        Ok(HostMemory::arena(mapping, fd, len.get()))
    }

    /// The memory.
    #[must_use]
    pub fn memory(&self) -> &HostMemory {
        &self.memory
    }

    /// The token that devices register.
    #[must_use]
    pub fn as_memory(&self) -> Arc<dyn Memory> {
        self.memory.as_memory()
    }

    /// Which pages the kernel has given so far, and why no better ones. Reads `/proc/self/smaps`:
    /// not for a hot path.
    #[must_use]
    pub fn pages(&self) -> PageInfo {
        pages_of(&self.memory, true, &self.why_not)
    }
}

/// Asks for huge pages and takes all pages now, as wished. What is refused goes to `why_not`, but running out
/// of memory is an error.
pub(crate) fn take_pages(
    mapping: &Mapping,
    want_huge: bool,
    prefault: bool,
    why_not: &mut Vec<WhyNotHuge>,
) -> Result<(), Error> {
    if want_huge && let Err(errno) = mapping.want_huge() {
        tracing::debug!(%errno, "MADV_HUGEPAGE refused");
    }
    if !prefault {
        return Ok(());
    }
    // Where collapsing is refused, populating takes what the kernel gives by itself.
    if want_huge && let Err(errno) = mapping.collapse() {
        why_not.push(WhyNotHuge::CollapseRefused { errno });
    }
    match mapping.populate() {
        // Before Linux 5.14 there is no such advice: the pages come at the first touch then.
        Ok(()) | Err(Errno::EINVAL) => Ok(()),
        Err(source) => Err(Error::Populate {
            len: mapping.len() as u64,
            source,
        }),
    }
}

pub(crate) fn pages_of(memory: &HostMemory, shared: bool, why_not: &[WhyNotHuge]) -> PageInfo {
    let range = match memory.mapped() {
        Some(mapping) => {
            let start = mapping.addr().addr().get() as u64;
            start..start + mapping.len() as u64
        }
        None => memory.addr()..memory.addr() + memory.len(),
    };
    pages::look_up(range, shared, why_not)
}

pub(crate) fn checked_len(len: u64) -> Result<NonZeroUsize, Error> {
    let bytes = usize::try_from(len)
        .ok()
        .filter(|len| isize::try_from(*len).is_ok());
    let bytes = bytes.ok_or(Error::TooLarge { len })?;
    NonZeroUsize::new(bytes).ok_or(Error::Empty)
}

pub(crate) fn round_up(len: NonZeroUsize, grain: usize) -> Option<NonZeroUsize> {
    NonZeroUsize::new(len.get().checked_next_multiple_of(grain)?)
}

fn create(flags: MFdFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    memfd_create(NAME, flags)
}

fn resize(fd: &OwnedFd, len: NonZeroUsize) -> Result<(), Errno> {
    let len = i64::try_from(len.get()).map_err(|_| Errno::EFBIG)?;
    nix::unistd::ftruncate(fd, len)
}

/// Seals the file once it is mapped. Shrinking would be a SIGBUS for who has it mapped; a writer other than
/// our mapping must not be; and with F_SEAL_SEAL nobody who is given the file can add a seal that hinders us.
fn seal(fd: &OwnedFd) -> Result<(), Errno> {
    let size = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
    let closed = SealFlag::F_SEAL_SEAL | SealFlag::from_bits_retain(F_SEAL_FUTURE_WRITE);
    match fcntl(fd, FcntlArg::F_ADD_SEALS(size | closed)) {
        // A kernel before 5.1 has no F_SEAL_FUTURE_WRITE; peers map read-only all the same.
        Err(Errno::EINVAL) => fcntl(fd, FcntlArg::F_ADD_SEALS(size | SealFlag::F_SEAL_SEAL)),
        answer => answer,
    }
    .map(drop)
}
