//! Registered memory.

use std::ops::BitOr;
use std::sync::Arc;

use crate::device::{DeviceBackend, PdHandle};
use crate::memory::{Memory, MemoryKind};

/// What may be done with a region or through a queue pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Access(u32);

impl Access {
    /// Local reading only: the source of WRITEs and SENDs.
    pub const NONE: Self = Self(0);
    /// The local device may write: READ destinations, receives.
    pub const LOCAL_WRITE: Self = Self(1);
    /// Peers may write.
    pub const REMOTE_WRITE: Self = Self(2);
    /// Peers may read.
    pub const REMOTE_READ: Self = Self(4);

    /// The flags as `enum ibv_access_flags` numbers them.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0
    }

    pub(crate) const fn from_bits_truncate(bits: u32) -> Self {
        Self(bits & 7)
    }

    /// Whether all flags of `other` are in it.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Access {
    type Output = Self;

    fn bitor(self, rhs: Self) -> Self {
        Self(self.0 | rhs.0)
    }
}

/// Where in a peer-mappable file a region lies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SegmentSpan {
    /// The device's number for the file; 0 is none.
    pub(crate) id: u32,
    /// Offset of the region's first byte in the file.
    pub(crate) offset: u64,
}

impl SegmentSpan {
    pub(crate) const NONE: Self = Self { id: 0, offset: 0 };
}

#[derive(Debug)]
pub(crate) struct RegionKey {
    /// What work requests on this side name it by; 0 on devices that go by address.
    pub(crate) lkey: u32,
    pub(crate) rkey: u32,
    pub(crate) segment: SegmentSpan,
}

#[derive(Debug)]
struct RegionInner {
    addr: u64,
    len: u64,
    access: Access,
    key: RegionKey,
    pd: Arc<PdHandle>,
    // Declared last: the memory outlives its key.
    memory: Arc<dyn Memory>,
}

impl Drop for RegionInner {
    fn drop(&mut self) {
        if !self.pd.device().deregister(&self.key) {
            // The device may go on using it: it is never given back.
            std::mem::forget(Arc::clone(&self.memory));
        }
    }
}

/// Memory registered with a protection domain. Clones share the registration; the last one to go
/// deregisters: its key stops working, and when `drop` returns no peer's access is under way.
#[derive(Debug, Clone)]
pub struct MemoryRegion(Arc<RegionInner>);

impl MemoryRegion {
    pub(crate) fn new(
        pd: Arc<PdHandle>,
        memory: Arc<dyn Memory>,
        access: Access,
        key: RegionKey,
    ) -> Self {
        let (addr, len) = (memory.addr(), memory.len());
        Self(Arc::new(RegionInner {
            addr,
            len,
            access,
            key,
            pd,
            memory,
        }))
    }

    /// The address of the first byte, as peers name it.
    #[must_use]
    pub fn addr(&self) -> u64 {
        self.0.addr
    }

    /// The length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.len
    }

    /// Whether it has no bytes (never: empty memory cannot be registered).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// The key that lets a peer reach it.
    #[must_use]
    pub fn rkey(&self) -> u32 {
        self.0.key.rkey
    }

    /// Whether it is registered with this device.
    pub(crate) fn is_of(&self, device: &Arc<dyn DeviceBackend>) -> bool {
        Arc::ptr_eq(self.0.pd.device(), device)
    }

    /// Where it lies in a file that peers may map.
    pub(crate) fn segment(&self) -> SegmentSpan {
        self.0.key.segment
    }

    /// What was registered for.
    #[must_use]
    pub fn access(&self) -> Access {
        self.0.access
    }

    /// The memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<dyn Memory> {
        &self.0.memory
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct RegionEntry {
    pub(crate) lkey: u32,
    pub(crate) addr: u64,
    pub(crate) len: u64,
    pub(crate) pd: u32,
    pub(crate) access: Access,
    pub(crate) segment: SegmentSpan,
    /// Whether the address may be taken for a pointer: a region of one device may stand in another's table.
    pub(crate) host: bool,
}

/// The regions that a chain's scatter/gather elements name by index. A posted chain holds the table
/// until its last work request has ended, and so keeps the memory registered and mapped.
#[derive(Debug, Clone, Default)]
pub struct RegionTable {
    entries: Vec<RegionEntry>,
    regions: Vec<MemoryRegion>,
}

impl RegionTable {
    /// A table of these regions, in this order.
    #[must_use]
    pub fn new(regions: Vec<MemoryRegion>) -> Self {
        let entries = regions
            .iter()
            .map(|r| RegionEntry {
                lkey: r.0.key.lkey,
                addr: r.0.addr,
                len: r.0.len,
                pd: r.0.pd.id(),
                access: r.0.access,
                segment: r.0.key.segment,
                host: r.0.memory.kind() == MemoryKind::Host,
            })
            .collect();
        Self { entries, regions }
    }

    /// The regions.
    #[must_use]
    pub fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    #[inline]
    pub(crate) fn entries(&self) -> &[RegionEntry] {
        &self.entries
    }
}

impl FromIterator<MemoryRegion> for RegionTable {
    fn from_iter<T: IntoIterator<Item = MemoryRegion>>(iter: T) -> Self {
        Self::new(iter.into_iter().collect())
    }
}
