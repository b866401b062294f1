//! One GPU: what it is, what it can, and how it is made current without anybody noticing.

use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};

use kvxfer_verbs::PciAddress;

use super::api::{Api, Entered};
use super::class::Consumer;
use super::error::GpuFault;
use super::later::Later;
use super::pool::Pool;
use super::runtime::RuntimeKind;
use crate::error::Error;

/// A device's own number, the same in every process; of the parts of a divided GPU each has another.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Uuid(pub [u8; 16]);

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            let dash = if [4, 6, 8, 10].contains(&i) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a GPU is and can.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct GpuInfo {
    /// Its place in this process's order. Another process may see other devices.
    pub ordinal: u32,
    /// Where it sits. The parts of a divided GPU share it.
    pub pci: PciAddress,
    /// Its own number.
    pub uuid: Uuid,
    /// The maker's name for it.
    pub name: String,
    /// What code is made for: `gfx942`, `sm_90`, `host`.
    pub arch: String,
    /// Bytes of memory.
    pub memory: u64,
    /// Compute units (AMD) or streaming multiprocessors (NVIDIA).
    pub compute_units: u32,
    /// Compute dies with caches of their own (AMD's XCCs), where the driver says.
    pub xccs: Option<u32>,
    /// Whether it shares the host's memory.
    pub integrated: bool,
    /// Whether its memory can be exported as a dma-buf, as far as the runtime knows.
    pub dma_buf: bool,
    /// Whether other devices may write to its memory, where the runtime says.
    pub gpudirect_rdma: Option<bool>,
    /// CUDA's attribute 118: who sees another device's writes without a flush. 0: nobody; 100: the device itself; 200: all devices.
    pub writes_ordering: Option<u32>,
    /// CUDA's attribute 117: 1: the host can flush other devices' writes; 2: streams can.
    pub flush_options: Option<u32>,
    /// Whether it reaches host memory that was allocated without it.
    pub host_register: bool,
    /// Whether it reaches host memory that is mapped to be read alone, such as another process's, where the runtime says.
    pub host_register_read_only: Option<bool>,
    /// Whether it has memory that is coherent while kernels run.
    pub fine_grained: bool,
    /// Whether the host's CPU could reach all of its memory, where the runtime says.
    pub large_bar: Option<bool>,
    /// Whether this process's work reaches it through CUDA's MPS server, as far as the driver says: an older one says
    /// nothing.
    pub mps: bool,
}

/// A GPU of this process. Clones are the same.
#[derive(Clone)]
pub struct Gpu(Arc<Inner>);

struct Inner {
    api: Arc<Api>,
    info: GpuInfo,
    /// For copies that are waited for. It lives as long as the process.
    stream: Mutex<Option<u64>>,
    pool: Pool,
    later: Arc<Later>,
}

/// For as long as it lives a device is current for this thread; then the one before is again.
pub(super) struct Current<'a> {
    api: &'a Api,
    entered: Entered,
    /// It is the thread's.
    thread: PhantomData<*const ()>,
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        self.api.leave(self.entered);
    }
}

impl Gpu {
    pub(super) fn new(api: Arc<Api>, info: GpuInfo, later: Arc<Later>) -> Self {
        Self(Arc::new(Inner {
            api,
            info,
            stream: Mutex::new(None),
            pool: Pool::default(),
            later,
        }))
    }

    /// The same device as if nobody else used it, where nothing is put off for longer than this.
    #[cfg(test)]
    pub(super) fn apart(&self, longest: std::time::Duration) -> Self {
        let later = Later::new(longest);
        Self::new(Arc::clone(&self.0.api), self.0.info.clone(), later)
    }

    /// What queues and launches have left.
    pub(super) fn pool(&self) -> &Pool {
        &self.0.pool
    }

    /// What is put off.
    pub(super) fn later(&self) -> &Arc<Later> {
        &self.0.later
    }

    pub(super) fn api(&self) -> &Api {
        &self.0.api
    }

    /// Makes it current. Calls on memory, streams and events need that.
    pub(super) fn enter(&self) -> Result<Current<'_>, Error> {
        let api = self.api();
        let entered = api.enter(self.0.info.ordinal)?;
        Ok(Current {
            api,
            entered,
            thread: PhantomData,
        })
    }

    /// Puts something on a stream of its own, and waits until it has ended.
    pub(super) fn now(
        &self,
        put: impl FnOnce(&Api, u64) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let _current = self.enter()?;
        let api = self.api();
        let stream = {
            let mut place = self.0.stream.lock().unwrap_or_else(PoisonError::into_inner);
            match *place {
                Some(stream) => stream,
                None => *place.insert(api.stream_create(false)?),
            }
        };
        let put = put(api, stream);
        // What was put there before a failure has to end too.
        // SAFETY: the stream was made above and is never destroyed.
        let waited = unsafe { api.stream_wait(stream) };
        put?;
        Ok(waited?)
    }

    /// What it is and can.
    #[must_use]
    pub fn info(&self) -> &GpuInfo {
        &self.0.info
    }

    /// Whose runtime it is of.
    #[must_use]
    pub fn runtime(&self) -> RuntimeKind {
        self.api().kind()
    }

    /// It as the reader of received memory.
    #[must_use]
    pub fn consumer(&self) -> Consumer {
        match self.runtime() {
            RuntimeKind::Hip => Consumer::Amd,
            RuntimeKind::Cuda => Consumer::Nvidia {
                writes_ordering: self.info().writes_ordering.unwrap_or(0),
                host_flush: self.info().flush_options.unwrap_or(0) & 1 != 0,
            },
            RuntimeKind::Host => Consumer::Host,
        }
    }

    /// Free and total bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`].
    pub fn free_memory(&self) -> Result<(u64, u64), Error> {
        let _current = self.enter()?;
        Ok(self.api().mem_info()?)
    }

    /// Whether it could reach another's memory.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`]; devices of two runtimes never reach each other.
    pub fn can_access(&self, peer: &Self) -> Result<bool, Error> {
        if self == peer {
            return Ok(true);
        }
        if !Arc::ptr_eq(&self.0.api, &peer.0.api) {
            return Ok(false);
        }
        let (ours, theirs) = (self.info().ordinal, peer.info().ordinal);
        Ok(self.api().can_access_peer(ours, theirs)?)
    }

    /// Lets it reach another's memory. Again does no harm, whoever did it before.
    ///
    /// # Errors
    ///
    /// [`GpuFault::NoPeerAccess`].
    pub fn enable_access(&self, peer: &Self) -> Result<(), Error> {
        if self == peer {
            return Ok(());
        }
        let refused = match self.can_access(peer)? {
            false => None,
            true => {
                let _current = self.enter()?;
                match self.api().enable_peer(peer.info().ordinal) {
                    Ok(()) => return Ok(()),
                    Err(refused) => Some(refused),
                }
            }
        };
        Err(GpuFault::NoPeerAccess {
            from: self.info().pci,
            to: peer.info().pci,
            refused,
        }
        .into())
    }

    /// Waits until what other devices have written to its memory is there for itself, or for all devices
    /// that read it. [`Visibility`](super::Visibility) says when that is needed.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`], also where the runtime has nothing for it (HIP).
    pub fn flush_writes(&self, to_all: bool) -> Result<(), Error> {
        let _current = self.enter()?;
        Ok(self.api().flush_writes(to_all)?)
    }
}

impl PartialEq for Gpu {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Gpu {}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let info = self.info();
        write!(f, "GPU {} ({}, {})", info.pci, info.name, info.arch)
    }
}

/// How a refused call is told where nothing more is known about it.
impl From<super::code::Refused> for Error {
    fn from(refused: super::code::Refused) -> Self {
        GpuFault::Call(refused).into()
    }
}

/// See [`GpuFault::OtherStreamDevice`].
pub(super) fn same(what: &'static str, is: &Gpu, stream: &Gpu) -> Result<(), Error> {
    match is == stream {
        true => Ok(()),
        false => Err(GpuFault::OtherStreamDevice {
            what,
            is: is.info().pci,
            stream: stream.info().pci,
        }
        .into()),
    }
}

/// What one runtime calls an address or an event is nothing to another, or something else.
pub(super) fn same_runtime(what: &'static str, is: &Gpu, other: &Gpu) -> Result<(), Error> {
    match Arc::ptr_eq(&is.0.api, &other.0.api) {
        true => Ok(()),
        false => Err(GpuFault::OtherRuntime {
            what,
            is: is.runtime(),
            other: other.runtime(),
        }
        .into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_written_as_everywhere() {
        let uuid = Uuid(std::array::from_fn(|i| i as u8 * 17));
        assert_eq!(uuid.to_string(), "00112233-4455-6677-8899-aabbccddeeff");
    }
}
