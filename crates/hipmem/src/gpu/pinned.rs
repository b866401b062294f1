//! Host memory that GPUs reach as well.

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use super::device::Gpu;
use super::pool::{Piece, Touched, Where};
use crate::error::{Error, Operation};
use crate::memory::HostMemory;
use crate::pages;

/// Pinned host memory: the CPU and all GPUs of the runtime reach it. Clones are the same memory.
#[derive(Clone)]
pub struct PinnedMemory {
    pub(super) pinned: Arc<Pinned>,
}

pub(super) struct Pinned {
    host: HostMemory,
    device_addr: u64,
    gpu: Gpu,
    /// Holds the memory too, until it is no longer pinned.
    _registration: Option<Arc<Registration>>,
}

/// Memory of the runtime's that is freed with the value.
struct Allocated {
    gpu: Gpu,
    addr: u64,
}

impl Drop for Allocated {
    fn drop(&mut self) {
        let freed = self.gpu.enter().and_then(|_current| {
            // SAFETY: it was allocated for this value, and whoever used it held it.
            Ok(unsafe { self.gpu.api().host_free(self.addr) }?)
        });
        if let Err(error) = freed {
            tracing::warn!(%error, "pinned memory is not given back");
        }
    }
}

/// Pages that are no longer pinned when the value goes, and the memory in them.
struct Registration {
    gpu: Gpu,
    at: u64,
    device_addr: u64,
    held: Vec<HostMemory>,
}

impl Registration {
    /// Pins the whole pages that some memory lies in.
    fn new(gpu: &Gpu, pages: &Range<u64>, held: Vec<HostMemory>) -> Result<Self, Error> {
        let _current = gpu.enter()?;
        let (at, len) = (pages.start, pages.end - pages.start);
        // SAFETY: the registration holds the memory, which is mapped as long; and of a page that it has a byte of, the
        // whole is mapped.
        let device_addr = unsafe { gpu.api().host_register(at, len) }?;
        Ok(Self {
            gpu: gpu.clone(),
            at,
            device_addr,
            held,
        })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let undone = self.gpu.enter().and_then(|_current| {
            // SAFETY: it was registered for this value, and whoever used it through a GPU held it.
            Ok(unsafe { self.gpu.api().host_unregister(self.at) }?)
        });
        if let Err(error) = undone {
            tracing::warn!(%error, "host memory stays pinned");
            // And mapped: nothing else may come to lie there.
            std::mem::forget(std::mem::take(&mut self.held));
        }
    }
}

impl PinnedMemory {
    /// New pinned memory. What [`GpuMemory::new`](super::GpuMemory::new) says of its end holds here too.
    ///
    /// # Errors
    ///
    /// [`Error::Empty`] for no bytes; [`Error::Gpu`].
    pub fn new(gpu: &Gpu, len: u64) -> Result<Self, Error> {
        if len == 0 {
            return Err(Error::Empty);
        }
        let (addr, device_addr) = allocate(gpu, len)?;
        let allocated = Allocated {
            gpu: gpu.clone(),
            addr,
        };
        // SAFETY: it was allocated just now with as many bytes, for `allocated`.
        unsafe { Self::of(gpu, (addr, device_addr), len, Arc::new(allocated)) }
    }

    /// The same of a queue's or a launch's, which is left for the next one when it goes
    /// ([`GpuMemory::pooled`](super::GpuMemory)).
    pub(in crate::gpu) fn pooled(gpu: &Gpu, len: u64, touched: Touched) -> Result<Self, Error> {
        if len == 0 {
            return Err(Error::Empty);
        }
        let piece = Piece::take(gpu, (Where::Host, touched), len, |bytes| {
            allocate(gpu, bytes)
        })?;
        let at = piece.at();
        // SAFETY: it was allocated with as many bytes at least, and is nobody else's until `piece` goes.
        unsafe { Self::of(gpu, at, len, Arc::new(piece)) }
    }

    /// # Safety
    ///
    /// The runtime has pinned `len` bytes there, at these addresses for the host and for devices, and they stay so until
    /// `keep` goes; nobody has a reference to them.
    unsafe fn of(
        gpu: &Gpu,
        (addr, device_addr): (u64, u64),
        len: u64,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self, Error> {
        let bytes = usize::try_from(len).map_err(|_| Error::TooLarge { len })?;
        let pointer = std::ptr::with_exposed_provenance_mut(addr as usize);
        let pointer = NonNull::new(pointer).ok_or(Error::TooLarge { len })?;
        // SAFETY: the caller says that it is mapped, readable, writable and in place until `keep` goes, and that nobody
        // has a reference to it.
        let host = unsafe { HostMemory::from_raw_parts(pointer, bytes, keep) };
        Ok(Self {
            pinned: Arc::new(Pinned {
                host,
                device_addr,
                gpu: gpu.clone(),
                _registration: None,
            }),
        })
    }

    /// Pins host memory that is there. It is pinned until the last clone is gone.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`], for example if it is pinned already.
    pub fn register(gpu: &Gpu, host: &HostMemory) -> Result<Self, Error> {
        let pinned = Self::register_all(gpu, std::slice::from_ref(host))?;
        pinned.into_iter().next().ok_or(Error::Empty)
    }

    /// The same for several memories, which may share pages: drivers pin whole ones, and each once.
    ///
    /// # Errors
    ///
    /// As [`register`](Self::register).
    pub fn register_all(gpu: &Gpu, hosts: &[HostMemory]) -> Result<Vec<Self>, Error> {
        if hosts.iter().any(HostMemory::is_empty) {
            return Err(Error::Empty);
        }
        let spans = hosts.iter().map(|host| (host.addr(), host.len()));
        let register = |span: Range<u64>| {
            let held = hosts.iter().filter(|host| span.contains(&host.addr()));
            let registration = Registration::new(gpu, &span, held.cloned().collect())?;
            Ok((span, Arc::new(registration)))
        };
        let registered = pages::whole(spans).into_iter().map(register);
        let registered = registered.collect::<Result<Vec<_>, Error>>()?;
        let pinned = |host: &HostMemory| {
            let of = |(span, _): &&(Range<u64>, _)| span.contains(&host.addr());
            let (_, registration) = registered.iter().find(of).ok_or(Error::Empty)?;
            let into = host.addr() - registration.at;
            Ok(Self {
                pinned: Arc::new(Pinned {
                    host: host.clone(),
                    device_addr: registration.device_addr.wrapping_add(into),
                    gpu: gpu.clone(),
                    _registration: Some(Arc::clone(registration)),
                }),
            })
        };
        hosts.iter().map(pinned).collect()
    }

    /// The memory as the host has it: what reads, writes and registers it with a NIC.
    #[must_use]
    pub fn host(&self) -> &HostMemory {
        &self.pinned.host
    }

    /// The address that GPUs know its first byte by.
    #[must_use]
    pub fn device_addr(&self) -> u64 {
        self.pinned.device_addr
    }

    /// The length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.pinned.host.len()
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pinned.host.is_empty()
    }

    /// The device that it was pinned through.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        &self.pinned.gpu
    }

    /// The host's address of a range that is wholly inside.
    pub(super) fn range(&self, operation: Operation, offset: u64, len: u64) -> Result<u64, Error> {
        self.pinned.host.range(operation, offset, len)?;
        Ok(self.pinned.host.addr() + offset)
    }
}

/// Its addresses for the host and for devices.
fn allocate(gpu: &Gpu, len: u64) -> Result<(u64, u64), Error> {
    let _current = gpu.enter()?;
    Ok(gpu.api().host_alloc(len)?)
}

impl fmt::Debug for PinnedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedMemory({:?} for {:?})", self.host(), self.gpu())
    }
}
