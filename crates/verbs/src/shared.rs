//! Memory of another process of this host, mapped here: its files are passed to whoever was told a token.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use crate::device::{Context, DeviceAddr, DeviceBackend};
use crate::error::Error;
use crate::region::{Access, MemoryRegion};
use crate::soft::segment::Mapping;

/// Files behind regions, which peers on this host may map for reading as long as this value lives: those that were
/// told its token. What they have mapped by then stays theirs.
pub struct SharedFiles {
    token: [u8; 16],
    backend: Arc<dyn DeviceBackend>,
}

impl SharedFiles {
    /// What a peer proves itself with. Who has it can read the memory: like keys, it is told after authentication
    /// only, and never logged.
    #[must_use]
    pub fn token(&self) -> [u8; 16] {
        self.token
    }
}

impl Drop for SharedFiles {
    fn drop(&mut self) {
        self.backend.unshare(&self.token);
    }
}

impl fmt::Debug for SharedFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedFiles")
    }
}

/// A file of a peer's, mapped.
pub(crate) struct SharedFile {
    pub(crate) map: Arc<Mapping>,
    /// Where the memory begins in it.
    pub(crate) offset: u64,
    /// What of it is in pages.
    pub(crate) allocated: u64,
}

/// Memory of another process, mapped here to be read. It stays mapped as long as any clone lives, whatever becomes
/// of the process: its file cannot shrink. Its bytes change whenever their owner likes, so nobody takes a reference
/// to them.
#[derive(Clone)]
pub struct PeerMapping {
    map: Arc<Mapping>,
    addr: u64,
    len: u64,
    allocated: u64,
}

impl PeerMapping {
    /// The address of its first byte in this process.
    #[must_use]
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Its bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has none (never: what is empty is not mapped).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the whole file is mapped, and how many bytes it has: the same for all that lies in one file.
    #[must_use]
    pub fn file(&self) -> (u64, u64) {
        (self.map.base(), self.map.len())
    }

    /// How many bytes of the whole file were in pages when it was asked for. The others are holes: what pins them takes
    /// pages for them, which are counted as this process's.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        self.allocated
    }
}

impl fmt::Debug for PeerMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (len, addr) = (self.len, self.addr);
        write!(f, "another process's {len} bytes at {addr:#x}")
    }
}

impl Context {
    /// Lets peers on this host that are told the token map the files behind these regions, to read them.
    ///
    /// # Errors
    ///
    /// [`Error::NotShared`] for a region that peers may not read, or that has no file which they could map;
    /// [`Error::ForeignHandle`] for one of another device; [`Error::Os`].
    pub fn share(&self, regions: &[MemoryRegion]) -> Result<SharedFiles, Error> {
        let backend = self.backend();
        let spans = regions.iter().enumerate().map(|(index, region)| {
            if !region.is_of(backend) {
                return Err(Error::ForeignHandle { what: "region" });
            }
            match region.access().contains(Access::REMOTE_READ) {
                true => Ok(region.segment()),
                false => Err(Error::NotShared { index }),
            }
        });
        let spans = spans.collect::<Result<Vec<_>, _>>()?;
        Ok(SharedFiles {
            token: backend.share(&spans)?,
            backend: Arc::clone(backend),
        })
    }

    /// Maps `len` bytes of the region of this `index`, among those that a peer shares by `token`. The peer has until
    /// the deadline to answer, and two seconds at most.
    ///
    /// # Errors
    ///
    /// [`Error::Path`] where the peer cannot be asked or does not know the token, [`Error::DialDeadline`],
    /// [`Error::FileTooSmall`], [`Error::Unsealed`], [`Error::Os`].
    pub fn map_shared(
        &self,
        peer: &DeviceAddr,
        token: [u8; 16],
        (index, len): (u32, u64),
        deadline: Instant,
    ) -> Result<PeerMapping, Error> {
        let file = self.backend().map_shared(peer, token, index, deadline)?;
        let SharedFile {
            map,
            offset,
            allocated,
        } = file;
        let addr = map.at(offset, len).filter(|_| len > 0);
        let addr = addr.ok_or(Error::FileTooSmall {
            size: map.len(),
            offset,
            len,
        })?;
        Ok(PeerMapping {
            map,
            addr,
            len,
            allocated,
        })
    }
}
