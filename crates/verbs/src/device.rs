//! Contexts, protection domains and completion queues, whatever the device.

use std::any::Any;
use std::fmt;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::cq::Poll;
use crate::error::{Error, PathFault, os};
use crate::memory::{Memory, MemoryKind};
use crate::qp::{QpBackend, QpCaps, QueuePair, Reset, SoftPath};
use crate::rdma::{GidChoice, PortDetails};
use crate::region::{Access, MemoryRegion, RegionKey, SegmentSpan};
use crate::shared::SharedFile;
use crate::soft::PeerLife;
use crate::sys::enums::ibv_event_type;
use crate::sys::types::ibv_cq;
use crate::wr::Completion;

pub(crate) trait DeviceBackend: Send + Sync + fmt::Debug {
    fn info(&self) -> &DeviceInfo;
    fn address(&self) -> DeviceAddr;
    /// As the address has it.
    fn host(&self) -> &str;
    fn probe(&self, peer: &DeviceAddr, path: SoftPath) -> Result<(), Error>;
    /// Lets who has the token that is answered have the files of these spans.
    fn share(&self, spans: &[SegmentSpan]) -> Result<[u8; 16], Error> {
        let _ = spans;
        Err(Error::NotShared { index: 0 })
    }
    /// And from now on not.
    fn unshare(&self, token: &[u8; 16]) {
        let _ = token;
    }
    /// Maps the file of the span of this index that a peer shares.
    fn map_shared(
        &self,
        peer: &DeviceAddr,
        token: [u8; 16],
        index: u32,
        deadline: Instant,
    ) -> Result<SharedFile, Error> {
        let _ = (token, index, deadline);
        Err(Error::Path {
            path: SoftPath::Arena,
            peer: peer.name.clone(),
            fault: PathFault::NoSuchPath,
        })
    }
    /// The life of a peer's process, on this host.
    fn life_of(&self, peer: &DeviceAddr) -> Result<PeerLife, Error> {
        Err(Error::Path {
            path: SoftPath::ProcessVm,
            peer: peer.name.clone(),
            fault: PathFault::NoSuchPath,
        })
    }
    fn alloc_pd(&self) -> Result<u32, Error>;
    /// Nothing is registered or made with it any more.
    fn dealloc_pd(&self, pd: u32);
    /// Of its own GIDs, the one that queue pairs towards these of a peer use; `None` where a device
    /// has none.
    fn gid_towards(&self, peer: &[[u8; 16]]) -> Result<Option<GidChoice>, Error>;
    /// The port of an RDMA device.
    fn rdma_port(&self) -> Option<&PortDetails> {
        None
    }
    fn async_event(&self) -> Option<AsyncEvent>;
    fn async_fd(&self) -> Option<BorrowedFd<'_>>;
    fn register(&self, pd: u32, memory: &dyn Memory, access: Access) -> Result<RegionKey, Error>;
    /// `false` where the device does not let go of the memory.
    fn deregister(&self, key: &RegionKey) -> bool;
    /// With the number that the queue's events name.
    fn create_cq(&self, depth: u32) -> Result<(u32, Arc<dyn CqBackend>), Error>;
    fn create_qp(
        &self,
        pd: u32,
        caps: &QpCaps,
        send_cq: &CompletionQueue,
        recv_cq: &CompletionQueue,
    ) -> Result<Arc<dyn QpBackend>, Error>;
}

pub(crate) trait CqBackend: Send + Sync + fmt::Debug {
    fn depth(&self) -> u32;
    fn poll(&self, out: &mut Vec<Completion>, max: usize) -> Result<Poll, Error>;
    fn arm(&self) -> Result<bool, Error>;
    fn fd(&self) -> BorrowedFd<'_>;
    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync>;
    /// What it is to libibverbs, if it is anything.
    fn ibv(&self) -> Option<NonNull<ibv_cq>> {
        None
    }
}

/// Something that happened to a device, a port, a queue or a queue pair, and that no completion
/// tells, or none tells in full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AsyncEvent {
    /// The port has lost its link. Work requests wait, and fail with `RetryExc` if it does not come
    /// back in time.
    PortDown {
        /// The port's number on the device, from 1.
        port: u8,
    },
    /// The port has its link again.
    PortUp {
        /// The port's number on the device, from 1.
        port: u8,
    },
    /// A queue pair failed: it is in ERR, and its work requests are flushed, with no completion that
    /// says why.
    QpFatal {
        /// The queue pair.
        qp_num: u32,
    },
    /// A queue pair failed: a request that came in on it was not valid for it.
    QpRequestError {
        /// The queue pair.
        qp_num: u32,
    },
    /// A queue pair failed: a request that came in on it broke the rights of local memory.
    QpAccessError {
        /// The queue pair.
        qp_num: u32,
    },
    /// A completion queue failed, for it was overrun or cannot be written: nothing more can be
    /// learnt from it, and the queue pairs that complete there are in ERR.
    CqError {
        /// Its [number](CompletionQueue::number).
        cq: u32,
    },
    /// The device failed: all its queue pairs are in ERR. Only opening it anew helps.
    DeviceFatal,
    /// Something else, that ends no work by itself.
    Other {
        /// Which event, as `enum ibv_event_type` counts them.
        code: u32,
    },
}

/// What an event is called that has no variant of its own.
fn event_name(code: u32) -> Option<&'static str> {
    Some(match ibv_event_type(code) {
        ibv_event_type::IBV_EVENT_COMM_EST => "communication established",
        ibv_event_type::IBV_EVENT_SQ_DRAINED => "send queue drained",
        ibv_event_type::IBV_EVENT_PATH_MIG => "path migrated",
        ibv_event_type::IBV_EVENT_PATH_MIG_ERR => "path migration failed",
        ibv_event_type::IBV_EVENT_LID_CHANGE => "LID change",
        ibv_event_type::IBV_EVENT_PKEY_CHANGE => "partition key change",
        ibv_event_type::IBV_EVENT_SM_CHANGE => "subnet manager change",
        ibv_event_type::IBV_EVENT_SRQ_ERR => "shared receive queue error",
        ibv_event_type::IBV_EVENT_SRQ_LIMIT_REACHED => "shared receive queue limit reached",
        ibv_event_type::IBV_EVENT_QP_LAST_WQE_REACHED => "last work request reached",
        ibv_event_type::IBV_EVENT_CLIENT_REREGISTER => "client reregister",
        ibv_event_type::IBV_EVENT_GID_CHANGE => "GID change",
        ibv_event_type::IBV_EVENT_WQ_FATAL => "work queue fatal",
        _ => return None,
    })
}

impl fmt::Display for AsyncEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::PortDown { port } => write!(f, "port {port} is down"),
            Self::PortUp { port } => write!(f, "port {port} is up"),
            Self::QpFatal { qp_num } => write!(f, "queue pair {qp_num:#x}: fatal"),
            Self::QpRequestError { qp_num } => write!(f, "queue pair {qp_num:#x}: request error"),
            Self::QpAccessError { qp_num } => write!(f, "queue pair {qp_num:#x}: access error"),
            Self::CqError { cq } => write!(f, "completion queue {cq}: error"),
            Self::DeviceFatal => f.write_str("device fatal"),
            Self::Other { code } => match event_name(code) {
                Some(name) => f.write_str(name),
                None => write!(f, "event {code}"),
            },
        }
    }
}

/// Which device it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum DeviceKind {
    /// The software device.
    Soft,
    /// The device that completes everything at once and moves nothing.
    Null,
    /// An RDMA device, through libibverbs.
    Rdma,
}

/// What a device is and what it takes.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// Which device it is.
    pub kind: DeviceKind,
    /// Work requests a send or receive queue holds.
    pub max_qp_wr: u32,
    /// Scatter/gather elements of one work request.
    pub max_sge: u32,
    /// Scatter/gather elements of one READ.
    pub max_sge_rd: u32,
    /// Bytes of one message.
    pub max_msg_sz: u64,
    /// Bytes of one message beyond which the device gets slower, not faster.
    pub best_msg_sz: u64,
    /// Completions a completion queue holds.
    pub max_cqe: u32,
    /// The port that its queue pairs use, from 1.
    pub port: u8,
    /// Regions registered at once.
    pub max_mr: u32,
}

/// How a peer finds a device, to be sent over the control connection and nowhere else: who knows the
/// guid is taken for a peer that has proved itself.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DeviceAddr {
    /// Which device it is.
    pub kind: DeviceKind,
    /// The boot id of its host: equal on both sides means one kernel.
    pub host: String,
    /// The abstract name of its Unix socket, without the leading zero byte.
    pub name: String,
    /// A random number of this context, which its name does not tell.
    pub guid: [u8; 16],
    /// Its process, in its own pid namespace.
    pub pid: u32,
    /// The addresses of an RDMA device's port; none on other devices.
    #[serde(default)]
    pub gids: Vec<[u8; 16]>,
}

impl fmt::Debug for DeviceAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The guid is a secret, not for logs.
        f.debug_struct("DeviceAddr")
            .field("kind", &self.kind)
            .field("host", &self.host)
            .field("name", &self.name)
            .field("pid", &self.pid)
            .field("gids", &self.gids)
            .finish_non_exhaustive()
    }
}

/// What tells hosts apart: two processes that read the same run on one kernel.
pub(crate) fn boot_id() -> Result<String, Error> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(os("read boot_id"))?;
    Ok(id.trim().to_owned())
}

/// An open device.
#[derive(Debug, Clone)]
pub struct Context {
    backend: Arc<dyn DeviceBackend>,
}

impl Context {
    pub(crate) fn new(backend: Arc<dyn DeviceBackend>) -> Self {
        Self { backend }
    }

    pub(crate) fn backend(&self) -> &Arc<dyn DeviceBackend> {
        &self.backend
    }

    /// What the device is and what it takes.
    #[must_use]
    pub fn device(&self) -> &DeviceInfo {
        self.backend.info()
    }

    /// How a peer finds this context.
    #[must_use]
    pub fn address(&self) -> DeviceAddr {
        self.backend.address()
    }

    /// Whether a peer's device is on this host.
    #[must_use]
    pub fn shares_host(&self, peer: &DeviceAddr) -> bool {
        self.backend.host() == peer.host
    }

    /// Tries whether `path` leads to `peer`.
    ///
    /// # Errors
    ///
    /// [`Error::Path`] says why not.
    pub fn probe(&self, peer: &DeviceAddr, path: SoftPath) -> Result<(), Error> {
        self.backend.probe(peer, path)
    }

    /// What tells when the peer's process has ended, of a software device on this host. It is found by the device's
    /// socket, and its memory is looked at once, whether it is the process that the address is of.
    ///
    /// # Errors
    ///
    /// [`Error::Path`] says why not: also for a device that is no software device, for a process of a pid namespace that
    /// is not seen from here, and for one whose memory cannot be read.
    pub fn life_of(&self, peer: &DeviceAddr) -> Result<PeerLife, Error> {
        self.backend.life_of(peer)
    }

    /// Of the device's own GIDs, the one that queue pairs towards these of a peer are to use, and why;
    /// `None` on a device that is not an RDMA device. A side that connects gives all that the peer's
    /// [address](DeviceAddr::gids) has, the other side the one that the first has chosen.
    ///
    /// # Errors
    ///
    /// [`Error::Gid`] where none leads there.
    pub fn gid_towards(&self, peer: &[[u8; 16]]) -> Result<Option<GidChoice>, Error> {
        self.backend.gid_towards(peer)
    }

    /// The port of an RDMA device, as it was when the device was opened; `None` on other devices.
    #[must_use]
    pub fn rdma_port(&self) -> Option<&PortDetails> {
        self.backend.rdma_port()
    }

    /// The oldest event that nobody has taken yet; does not wait. Each event is given once, so one
    /// place of a program should ask. A queue pair's events end with it: none is given after it has
    /// been destroyed, so a number that is used again is not taken for the old one. (One that was
    /// given just before may still be in the hands of whoever asked.)
    #[must_use]
    pub fn async_event(&self) -> Option<AsyncEvent> {
        self.backend.async_event()
    }

    /// Readable while [`async_event`](Self::async_event) has one to give; `None` on a device that
    /// never has any.
    #[must_use]
    pub fn async_fd(&self) -> Option<BorrowedFd<'_>> {
        self.backend.async_fd()
    }

    /// Makes a protection domain.
    ///
    /// # Errors
    ///
    /// [`Error::Device`]; none on the software device.
    pub fn alloc_pd(&self) -> Result<ProtectionDomain, Error> {
        let id = self.backend.alloc_pd()?;
        let backend = Arc::clone(&self.backend);
        Ok(ProtectionDomain(Arc::new(PdHandle { id, backend })))
    }

    /// Makes a completion queue for `depth` completions.
    ///
    /// # Errors
    ///
    /// [`Error::Limit`] for a depth that the device does not take, [`Error::Os`], [`Error::Device`].
    pub fn create_cq(&self, depth: u32) -> Result<CompletionQueue, Error> {
        let (number, inner) = self.backend.create_cq(depth)?;
        Ok(CompletionQueue {
            inner,
            number,
            backend: Arc::clone(&self.backend),
        })
    }
}

/// Regions and queue pairs that may be used together. It goes when they have gone.
#[derive(Debug, Clone)]
pub struct ProtectionDomain(Arc<PdHandle>);

/// A protection domain of a device, which what is made with it keeps.
#[derive(Debug)]
pub(crate) struct PdHandle {
    id: u32,
    backend: Arc<dyn DeviceBackend>,
}

impl PdHandle {
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    pub(crate) fn device(&self) -> &Arc<dyn DeviceBackend> {
        &self.backend
    }
}

impl Drop for PdHandle {
    fn drop(&mut self) {
        self.backend.dealloc_pd(self.id);
    }
}

impl ProtectionDomain {
    /// Registers memory. The region holds the memory for as long as it lives. Memory of a GPU is for RDMA devices,
    /// which take it as a dma-buf or by its address; peers name its bytes by the GPU's addresses.
    ///
    /// # Errors
    ///
    /// [`Error::RegisterSpan`], [`Error::RegisterKind`] for memory that the device does not reach,
    /// [`Error::RegisterDevice`], [`Error::RegisterAccess`], [`Error::Unsealed`], [`Error::FileTooSmall`], [`Error::TooManyRegions`], [`Error::Register`], [`Error::Os`].
    pub fn register(&self, memory: Arc<dyn Memory>, access: Access) -> Result<MemoryRegion, Error> {
        let (addr, len) = (memory.addr(), memory.len());
        if len == 0 || addr == 0 || addr.checked_add(len).is_none() {
            return Err(Error::RegisterSpan { addr, len });
        }
        // The others go by addresses as pointers.
        let (kind, info) = (memory.kind(), self.0.backend.info());
        let is_reached = match kind {
            MemoryKind::Host => true,
            MemoryKind::Device { .. } => info.kind == DeviceKind::Rdma,
            MemoryKind::Registers => false,
        };
        if !is_reached {
            let device = info.name.clone();
            return Err(Error::RegisterKind { device, kind, len });
        }
        if access.contains(Access::REMOTE_WRITE) && !access.contains(Access::LOCAL_WRITE) {
            return Err(Error::RegisterAccess);
        }
        let key = (self.0.backend).register(self.0.id, memory.as_ref(), access)?;
        Ok(MemoryRegion::new(Arc::clone(&self.0), memory, access, key))
    }

    /// Makes a queue pair whose completions go to these queues.
    ///
    /// # Errors
    ///
    /// [`Error::Limit`], [`Error::ForeignHandle`], [`Error::Os`], [`Error::Device`].
    pub fn create_qp(
        &self,
        caps: QpCaps,
        send_cq: &CompletionQueue,
        recv_cq: &CompletionQueue,
    ) -> Result<QueuePair<Reset>, Error> {
        for (cq, what) in [
            (send_cq, "send completion queue"),
            (recv_cq, "receive completion queue"),
        ] {
            if !Arc::ptr_eq(&cq.backend, &self.0.backend) {
                return Err(Error::ForeignHandle { what });
            }
        }
        let info = self.0.backend.info();
        let limits = [
            ("max_send_wr", caps.max_send_wr, info.max_qp_wr),
            ("max_recv_wr", caps.max_recv_wr, info.max_qp_wr),
            ("max_send_sge", caps.max_send_sge, info.max_sge),
            ("max_recv_sge", caps.max_recv_sge, info.max_sge),
        ];
        for (what, asked, max) in limits {
            if asked == 0 || asked > max {
                return Err(Error::Limit {
                    what,
                    asked: asked.into(),
                    max: max.into(),
                });
            }
        }
        let qp = (self.0.backend).create_qp(self.0.id, &caps, send_cq, recv_cq)?;
        Ok(QueuePair::new(qp, Arc::clone(&self.0)))
    }
}

/// Where completions arrive. One thread at a time polls; others wait for it.
#[derive(Debug, Clone)]
pub struct CompletionQueue {
    inner: Arc<dyn CqBackend>,
    number: u32,
    backend: Arc<dyn DeviceBackend>,
}

impl CompletionQueue {
    /// What it is to libibverbs, if it is anything, as long as this value is there.
    pub(crate) fn ibv(&self) -> Option<NonNull<ibv_cq>> {
        self.inner.ibv()
    }

    /// The queue as its device made it.
    pub(crate) fn of<T: CqBackend + 'static>(&self, what: &'static str) -> Result<Arc<T>, Error> {
        let any = Arc::clone(&self.inner).into_any();
        any.downcast().map_err(|_| Error::ForeignHandle { what })
    }

    /// Its number on the device, which [`AsyncEvent::CqError`] names.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Completions it holds.
    #[must_use]
    pub fn depth(&self) -> u32 {
        self.inner.depth()
    }

    /// Appends up to `max` completions to `out`. On the software device this is where work
    /// requests of the attached queue pairs are carried out, some hundred microseconds' worth a
    /// call; [`Poll::more`] says that calling again at once is worth while.
    ///
    /// # Errors
    ///
    /// [`Error::Os`] where the device itself fails; a failed work request is a completion.
    pub fn poll(&self, out: &mut Vec<Completion>, max: usize) -> Result<Poll, Error> {
        self.inner.poll(out, max)
    }

    /// Asks that [`as_fd`](Self::as_fd) become readable when a poll may have something to do.
    /// `true`: it is safe to sleep on it. `false`: poll again first.
    ///
    /// # Errors
    ///
    /// [`Error::Os`].
    pub fn arm(&self) -> Result<bool, Error> {
        self.inner.arm()
    }

    /// Readable when, after [`arm`](Self::arm), a poll may have something to do.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.fd()
    }
}

impl AsFd for CompletionQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.fd()
    }
}
