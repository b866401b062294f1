//! Registration: the host's memory by its address, a GPU's as a dma-buf, or by its address where the GPU's
//! driver lends a hand.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use libc::{EINVAL, ENOMEM, EOPNOTSUPP, c_uint};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::context::{Pointer, RdmaContext};
use crate::error::{DmaBufFault, Error};
use crate::memory::{Memory, MemoryKind};
use crate::region::{Access, RegionKey, SegmentSpan};
use crate::sync::lock;
use crate::sys::enums::IBV_ACCESS_RELAXED_ORDERING;
use crate::sys::types::{ibv_mr, ibv_pd};

impl RdmaContext {
    pub(super) fn register(
        &self,
        pd: u32,
        memory: &dyn Memory,
        access: Access,
    ) -> Result<RegionKey, Error> {
        let pd = self.pd(pd)?;
        let mr = match memory.kind() {
            MemoryKind::Host => {
                let made = self.reg_mr(pd, memory, access);
                made.map_err(|source| Error::Register {
                    device: self.info().name.clone(),
                    addr: memory.addr(),
                    len: memory.len(),
                    memlock: memlock(&source),
                    source,
                })?
            }
            kind => self.register_device(pd, memory, kind, access)?,
        };
        // SAFETY: it was made just now, and nobody writes to it.
        let keys = unsafe { mr.as_ref() };
        let (lkey, rkey) = (keys.lkey, keys.rkey);
        lock(&self.mrs).insert(lkey, Pointer(mr));
        Ok(RegionKey {
            lkey,
            rkey,
            segment: SegmentSpan::NONE,
        })
    }

    /// Memory of a GPU: as a dma-buf, or by its address where the GPU's driver lends NICs a hand.
    fn register_device(
        &self,
        pd: NonNull<ibv_pd>,
        memory: &dyn Memory,
        kind: MemoryKind,
        access: Access,
    ) -> Result<NonNull<ibv_mr>, Error> {
        let (addr, len) = (memory.addr(), memory.len());
        let dma_buf = match self.reg_dmabuf_mr(pd, memory, access) {
            Ok(mr) => return Ok(mr),
            Err(fault) => fault,
        };
        let device = &self.info().name;
        match self.reg_mr(pd, memory, access) {
            Ok(mr) => {
                tracing::info!(device, %kind, why = %dma_buf, "registered by its address, not as a dma-buf");
                Ok(mr)
            }
            Err(address) => Err(Error::RegisterDevice {
                device: device.clone(),
                kind,
                addr,
                len,
                dma_buf: Box::new(dma_buf),
                address,
            }),
        }
    }

    fn reg_dmabuf_mr(
        &self,
        pd: NonNull<ibv_pd>,
        memory: &dyn Memory,
        access: Access,
    ) -> Result<NonNull<ibv_mr>, DmaBufFault> {
        let Some(register) = self.device().functions().ibv_reg_dmabuf_mr else {
            let library = self.device().library().to_owned();
            return Err(DmaBufFault::NoFunction { library });
        };
        let exported = memory.dma_buf().map_err(DmaBufFault::NoDmaBuf)?;
        let (offset, addr, page) = (exported.offset, memory.addr(), page_size());
        if offset % page != addr % page {
            return Err(DmaBufFault::Offset { offset, page });
        }
        // This crate is for 64-bit machines.
        let (len, fd) = (memory.len() as usize, exported.fd.as_raw_fd());
        let made = self.probed(|relaxed| {
            let access = access.bits()
                | if relaxed {
                    IBV_ACCESS_RELAXED_ORDERING
                } else {
                    0
                };
            let access = access.cast_signed();
            // Peers and work requests name its bytes by the GPU's addresses.
            // SAFETY: the domain is there, and the file open; what it is of is the memory's, which stays
            // while the token lives, and the region holds it.
            let mr = unsafe { register(pd.as_ptr(), offset, len, addr, fd, access) };
            NonNull::new(mr).ok_or_else(io::Error::last_os_error)
        });
        made.map_err(DmaBufFault::Refused)
    }

    /// Registers with relaxed ordering where it is wanted and the device takes it.
    fn probed(
        &self,
        register: impl Fn(bool) -> Result<NonNull<ibv_mr>, io::Error>,
    ) -> Result<NonNull<ibv_mr>, io::Error> {
        let relaxed = self.config().relaxed_ordering && !self.strict.load(Ordering::Relaxed);
        let made = register(relaxed);
        let refused = |error: &io::Error| {
            let errno = error.raw_os_error();
            errno.is_some_and(|errno| [EINVAL, EOPNOTSUPP].contains(&errno))
        };
        if !relaxed || !made.as_ref().is_err_and(refused) {
            return made;
        }
        let made = register(false);
        if made.is_ok() {
            tracing::info!(device = self.info().name, "it refuses relaxed ordering");
            self.strict.store(true, Ordering::Relaxed);
        }
        made
    }

    fn reg_mr(
        &self,
        pd: NonNull<ibv_pd>,
        memory: &dyn Memory,
        access: Access,
    ) -> Result<NonNull<ibv_mr>, io::Error> {
        self.probed(|relaxed| self.reg_mr_as(pd, memory, access, relaxed))
    }

    fn reg_mr_as(
        &self,
        pd: NonNull<ibv_pd>,
        memory: &dyn Memory,
        access: Access,
        relaxed: bool,
    ) -> Result<NonNull<ibv_mr>, io::Error> {
        let functions = self.device().functions();
        let addr = memory.addr();
        let pointer = std::ptr::with_exposed_provenance_mut(addr as usize);
        // This crate is for 64-bit machines.
        let len = memory.len() as usize;
        let mr = match functions.ibv_reg_mr_iova2 {
            Some(register) if relaxed => {
                let access: c_uint = access.bits() | IBV_ACCESS_RELAXED_ORDERING;
                // SAFETY: the domain is there; `Memory` says that the span stays mapped while the
                // token lives, and the region holds it.
                unsafe { register(pd.as_ptr(), pointer, len, addr, access) }
            }
            _ => {
                let access = access.bits().cast_signed();
                // SAFETY: as above.
                unsafe { (functions.ibv_reg_mr)(pd.as_ptr(), pointer, len, access) }
            }
        };
        NonNull::new(mr).ok_or_else(io::Error::last_os_error)
    }

    pub(super) fn deregister(&self, key: &RegionKey) -> bool {
        let mr = lock(&self.mrs).remove(&key.lkey);
        let Some(mr) = mr.filter(|_| !self.device().is_inherited()) else {
            return true;
        };
        // SAFETY: it is freed once, by whoever takes it out of the table.
        let code = unsafe { (self.device().functions().ibv_dereg_mr)(mr.0.as_ptr()) };
        self.device().freed("ibv_dereg_mr", code);
        code == 0
    }
}

/// The limit on locked memory, if that is what has refused a registration.
fn memlock(source: &io::Error) -> Option<u64> {
    if source.raw_os_error() != Some(ENOMEM) {
        return None;
    }
    let (soft, _) = getrlimit(Resource::RLIMIT_MEMLOCK).ok()?;
    (soft != RLIM_INFINITY).then_some(soft)
}

fn page_size() -> u64 {
    // SAFETY: it takes a number and gives one.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let size = u64::try_from(size).ok().filter(|size| *size > 0);
    size.unwrap_or(4096)
}
