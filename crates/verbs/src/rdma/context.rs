//! An open RDMA device: its protection domains, regions and events.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use libc::{EAGAIN, EINTR, EINVAL, c_int};

use super::cq::RdmaCq;
use super::handle::{DeviceList, OpenDevice};
use super::qp::RdmaQp;
use super::quirks::{self, Quirk};
use super::{Gid, GidChoice, GidKind, LinkLayer, PortDetails, PortState, choose_gid};
use crate::device::{
    AsyncEvent, CompletionQueue, Context, CqBackend, DeviceAddr, DeviceBackend, DeviceInfo,
    DeviceKind, boot_id,
};
use crate::error::{Error, PathFault};
use crate::memory::Memory;
use crate::qp::{QpBackend, QpCaps, SoftPath};
use crate::region::{Access, RegionKey};
use crate::sync::{Mutex, lock};
use crate::sys::Verbs;
use crate::sys::enums::{ibv_event_type, ibv_fork_status, ibv_transport_type};
use crate::sys::types::{ibv_async_event, ibv_mr, ibv_pd};

/// How an RDMA device is opened and used.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RdmaConfig {
    /// The kernel's name of the device.
    pub device: String,
    /// The port, from 1; `None`: the first that is active.
    pub port: Option<u8>,
    /// The GID that all queue pairs use; `None`: by rule, for each peer.
    pub gid_index: Option<u32>,
    /// Bytes of the longest packet, at most what the link has; `None`: that.
    pub mtu: Option<u32>,
    /// Service level, 0 to 15.
    pub service_level: u8,
    /// Traffic class of the global route header; on RoCE v2 the byte with the DSCP.
    pub traffic_class: u8,
    /// Routers that a packet may pass.
    pub hop_limit: u8,
    /// Place in the port's table of partition keys.
    pub pkey_index: u16,
    /// Whether memory may be registered with relaxed ordering, which fast links need over PCIe.
    /// What has arrived is then told by completions alone, and not by looking at memory.
    pub relaxed_ordering: bool,
}

impl RdmaConfig {
    /// The defaults, for a device of this name.
    #[must_use]
    pub fn new(device: impl Into<String>) -> Self {
        Self {
            device: device.into(),
            port: None,
            gid_index: None,
            mtu: None,
            service_level: 0,
            traffic_class: 0,
            hop_limit: 64,
            pkey_index: 0,
            relaxed_ordering: true,
        }
    }
}

/// Opens an RDMA device of this machine. The first to be opened in a process calls
/// `ibv_fork_init` where the kernel does not keep memory of forking processes apart by itself.
///
/// # Errors
///
/// [`Error::NoRdma`] says what is missing where there is no device, [`Error::NoSuchDevice`] which
/// there are; [`Error::DeviceNode`], [`Error::Device`], [`Error::Transport`], [`Error::NoSuchPort`],
/// [`Error::PortNotActive`], [`Error::Limit`], [`Error::Gid`].
pub fn open_rdma(config: &RdmaConfig) -> Result<Context, Error> {
    let verbs = Verbs::get().map_err(Error::NoRdma)?;
    open(verbs, config, Path::new("/sys"))
}

pub(super) fn open(
    verbs: &'static Verbs,
    config: &RdmaConfig,
    sys: &Path,
) -> Result<Context, Error> {
    let list = DeviceList::get(verbs, sys)?;
    let named = list.devices().find(|device| device.name() == config.device);
    let Some(listed) = named else {
        return Err(Error::NoSuchDevice {
            device: config.device.clone(),
            devices: list.devices().map(|device| device.name()).collect(),
        });
    };
    if listed.transport() != ibv_transport_type::IBV_TRANSPORT_IB {
        return Err(Error::Transport {
            device: config.device.clone(),
            transport: listed.transport().into(),
        });
    }
    prepare_for_forks(verbs)?;
    let device = listed.open()?;
    let context = RdmaContext::new(device, config.clone(), sys)?;
    // With nothing known of a peer: a device whose GIDs are of no use is told of now.
    context.gid_towards(&[])?;
    Ok(Context::new(Arc::new(RdmaDeviceHandle(Arc::new(context)))))
}

/// A fork would otherwise leave this process with pages that the device does not write to.
fn prepare_for_forks(verbs: &Verbs) -> Result<(), Error> {
    if let Some(asked) = verbs.functions.ibv_is_fork_initialized {
        // SAFETY: takes nothing and answers a number.
        let status = unsafe { asked() };
        if status != ibv_fork_status::IBV_FORK_DISABLED {
            return Ok(());
        }
    }
    // SAFETY: it may be called at any time before memory is registered, and again.
    let code = unsafe { (verbs.functions.ibv_fork_init)() };
    match code {
        0 => Ok(()),
        // Memory has been registered by somebody else in this process: as it was with them.
        EINVAL => Ok(()),
        code => Err(Error::Os {
            op: "ibv_fork_init",
            source: io::Error::from_raw_os_error(code.saturating_abs()),
        }),
    }
}

/// A pointer to a protection domain or a region of libibverbs.
#[derive(Debug)]
pub(super) struct Pointer<T>(pub(super) NonNull<T>);

// SAFETY: libibverbs lets any thread use its objects; who owns the pointer frees it once.
unsafe impl<T> Send for Pointer<T> {}

pub(super) struct RdmaContext {
    info: DeviceInfo,
    address: DeviceAddr,
    config: RdmaConfig,
    /// As it was when the device was opened.
    port: PortDetails,
    reads_in: u8,
    reads_out: u8,
    quirk: Option<&'static Quirk>,
    /// Whether the device has refused relaxed ordering.
    pub(super) strict: AtomicBool,
    /// Whether it has been told that the device has failed.
    over: AtomicBool,
    next: AtomicU32,
    next_vector: AtomicU32,
    pds: Mutex<HashMap<u32, Pointer<ibv_pd>>>,
    /// By local key.
    pub(super) mrs: Mutex<HashMap<u32, Pointer<ibv_mr>>>,
    // Declared last: it is closed when all else has gone.
    device: OpenDevice,
}

impl fmt::Debug for RdmaContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RdmaContext")
            .field("info", &self.info)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl RdmaContext {
    fn new(device: OpenDevice, config: RdmaConfig, sys: &Path) -> Result<Self, Error> {
        let attr = device.attr()?;
        let port = super::details(&device, sys)?.ports;
        let ports: Vec<u8> = port.iter().map(|port| port.number).collect();
        let active = |port: &super::RdmaPort| {
            let details = port.details.as_ref();
            details.is_ok_and(|details| details.state == PortState::Active)
        };
        let asked = match config.port {
            Some(number) => port.iter().position(|port| port.number == number),
            None => port.iter().position(active).or(Some(0)),
        };
        let place = asked.and_then(|at| port.into_iter().nth(at));
        let Some(place) = place else {
            return Err(Error::NoSuchPort {
                device: config.device,
                port: config.port.unwrap_or(1),
                ports,
            });
        };
        let number = place.number;
        let port = place.details?;
        if port.state != PortState::Active {
            return Err(Error::PortNotActive {
                device: config.device,
                port: number,
                state: port.state,
            });
        }
        let active_mtu = port.active_mtu.unwrap_or(256);
        let mtu = config.mtu.unwrap_or(active_mtu);
        if super::mtu_code(mtu).is_none() || mtu > active_mtu {
            return Err(Error::Limit {
                what: "mtu (256, 512, 1024, 2048 or 4096)",
                asked: mtu.into(),
                max: active_mtu.into(),
            });
        }
        let limits = super::RdmaLimits::new(&attr);
        let quirk = quirks::of(limits.vendor_id);
        if let Some(quirk) = quirk {
            tracing::info!(
                device = config.device,
                quirk = quirk.why,
                "known of this device"
            );
        }
        let max_sge = quirk.map_or(limits.max_sge, |quirk| limits.max_sge.min(quirk.max_sge));
        let max_sge_rd = match limits.max_sge_rd {
            0 => max_sge,
            reads => reads.min(max_sge),
        };
        let max_msg_sz = u64::from(port.max_msg_sz);
        let byte = |limit: u32| u8::try_from(limit).unwrap_or(u8::MAX);
        Ok(Self {
            info: DeviceInfo {
                name: config.device.clone(),
                kind: DeviceKind::Rdma,
                max_qp_wr: quirk.map_or(limits.max_qp_wr, |q| limits.max_qp_wr.min(q.max_qp_wr)),
                max_sge,
                max_sge_rd,
                max_msg_sz,
                best_msg_sz: quirk.map_or(max_msg_sz, |quirk| max_msg_sz.min(quirk.best_msg_sz)),
                max_cqe: limits.max_cqe,
                port: number,
                max_mr: limits.max_mr,
            },
            address: DeviceAddr {
                kind: DeviceKind::Rdma,
                host: boot_id()?,
                name: config.device.clone(),
                guid: [0; 16],
                pid: std::process::id(),
                gids: gids(&port),
            },
            reads_in: byte(limits.max_rd_atomic),
            reads_out: byte(limits.max_init_rd_atomic),
            config,
            port,
            quirk,
            strict: AtomicBool::new(false),
            over: AtomicBool::new(false),
            next: AtomicU32::new(1),
            next_vector: AtomicU32::new(0),
            pds: Mutex::default(),
            mrs: Mutex::default(),
            device,
        })
    }

    pub(super) fn info(&self) -> &DeviceInfo {
        &self.info
    }

    pub(super) fn config(&self) -> &RdmaConfig {
        &self.config
    }

    /// The port as it is now: addresses and the link change under a device that is open.
    pub(super) fn query_port(&self) -> Result<PortDetails, Error> {
        let number = self.info.port;
        let ports = super::details(&self.device, Path::new("/sys"))?.ports;
        let port = ports.into_iter().find(|port| port.number == number);
        port.ok_or(Error::NoSuchPort {
            device: self.info.name.clone(),
            port: number,
            ports: Vec::new(),
        })?
        .details
    }

    /// Bytes of the longest packet that this side sends over a port.
    pub(super) fn mtu_of(&self, port: &PortDetails) -> u32 {
        let active = port.active_mtu.unwrap_or(256);
        self.config.mtu.map_or(active, |asked| asked.min(active))
    }

    pub(super) fn reads_in(&self) -> u8 {
        self.reads_in
    }

    pub(super) fn reads_out(&self) -> u8 {
        self.reads_out
    }

    /// Tries after the first that it is asked for at most.
    pub(super) fn max_retry_cnt(&self) -> u8 {
        self.quirk.map_or(u8::MAX, |quirk| quirk.max_retry_cnt)
    }

    pub(super) fn device(&self) -> &OpenDevice {
        &self.device
    }

    fn gid_towards(&self, peer: &[[u8; 16]]) -> Result<GidChoice, Error> {
        // Each costs a look at the routes, and nobody needs more.
        let peer = peer.get(..MAX_TOLD).unwrap_or(peer);
        self.choose(&self.query_port()?, self.config.gid_index, peer)
    }

    /// The GID of a port that is asked for, or the one towards these of a peer.
    pub(super) fn choose(
        &self,
        port: &PortDetails,
        index: Option<u32>,
        peer: &[[u8; 16]],
    ) -> Result<GidChoice, Error> {
        let asked = index.or(self.config.gid_index);
        choose_gid(port, asked, peer).map_err(|fault| Error::Gid {
            device: self.info.name.clone(),
            port: self.info.port,
            fault,
        })
    }

    /// Completion events are spread over the device's interrupts.
    pub(super) fn next_comp_vector(&self) -> c_int {
        let next = self.next_vector.fetch_add(1, Ordering::Relaxed);
        // Less than a number that was one of C's.
        (next % self.device.comp_vectors()) as c_int
    }

    pub(super) fn pd(&self, id: u32) -> Result<NonNull<ibv_pd>, Error> {
        let pd = lock(&self.pds).get(&id).map(|pd| pd.0);
        pd.ok_or(Error::ForeignHandle {
            what: "protection domain",
        })
    }

    fn alloc_pd(&self) -> Result<u32, Error> {
        let context = self.device.context();
        // SAFETY: the device is open.
        let pd = unsafe { (self.device.functions().ibv_alloc_pd)(context) };
        let pd = self.device.made("ibv_alloc_pd", pd)?;
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.pds).insert(id, Pointer(pd));
        Ok(id)
    }

    fn dealloc_pd(&self, id: u32) {
        let pd = lock(&self.pds).remove(&id);
        let Some(pd) = pd.filter(|_| !self.device.is_inherited()) else {
            return;
        };
        // SAFETY: it is freed once, by whoever takes it out of the table, and what was made with it
        // has gone: each keeps its handle.
        let code = unsafe { (self.device.functions().ibv_dealloc_pd)(pd.0.as_ptr()) };
        self.device.freed("ibv_dealloc_pd", code);
    }

    fn async_event(&self) -> Option<AsyncEvent> {
        if self.over.load(Ordering::Acquire) {
            return None;
        }
        let context = self.device.context();
        let mut event = MaybeUninit::<ibv_async_event>::zeroed();
        // SAFETY: the device is open; one event is written. The descriptor does not block.
        let code =
            unsafe { (self.device.functions().ibv_get_async_event)(context, event.as_mut_ptr()) };
        if code != 0 {
            return match io::Error::last_os_error().raw_os_error() {
                Some(EAGAIN | EINTR) => None,
                // The device has been taken away; the descriptor says so for ever.
                errno => {
                    tracing::error!(device = self.info.name, ?errno, "ibv_get_async_event");
                    self.over.store(true, Ordering::Release);
                    Some(AsyncEvent::DeviceFatal)
                }
            };
        }
        // SAFETY: numbers and pointers, for which all zero bytes are a value; it was written.
        let mut event = unsafe { event.assume_init() };
        let told = translate(&event);
        // At once: whoever destroys what it is about waits for this.
        // SAFETY: it was got just now, and is acknowledged once.
        unsafe { (self.device.functions().ibv_ack_async_event)(&raw mut event) };
        Some(told)
    }
}

/// The event in this crate's words.
fn translate(event: &ibv_async_event) -> AsyncEvent {
    let qp_num = || {
        // SAFETY: events of this kind are about a queue pair.
        let qp = unsafe { event.element.qp };
        // SAFETY: until the event is acknowledged nobody can destroy the queue pair.
        unsafe { qp.as_ref() }.map_or(0, |qp| qp.qp_num)
    };
    let port = || {
        // SAFETY: events of this kind are about a port.
        let number = unsafe { event.element.port_num };
        u8::try_from(number).unwrap_or(0)
    };
    match event.event_type {
        ibv_event_type::IBV_EVENT_QP_FATAL => AsyncEvent::QpFatal { qp_num: qp_num() },
        ibv_event_type::IBV_EVENT_QP_REQ_ERR => AsyncEvent::QpRequestError { qp_num: qp_num() },
        ibv_event_type::IBV_EVENT_QP_ACCESS_ERR => AsyncEvent::QpAccessError { qp_num: qp_num() },
        ibv_event_type::IBV_EVENT_CQ_ERR => {
            // SAFETY: events of this kind are about a completion queue.
            let cq = unsafe { event.element.cq };
            // SAFETY: until the event is acknowledged nobody can destroy the queue.
            let cq = unsafe { cq.as_ref() }.map_or(0, |cq| cq.handle);
            AsyncEvent::CqError { cq }
        }
        ibv_event_type::IBV_EVENT_PORT_ACTIVE => AsyncEvent::PortUp { port: port() },
        ibv_event_type::IBV_EVENT_PORT_ERR => AsyncEvent::PortDown { port: port() },
        ibv_event_type::IBV_EVENT_DEVICE_FATAL => AsyncEvent::DeviceFatal,
        ibv_event_type(code) => AsyncEvent::Other { code },
    }
}

/// The addresses that peers may find this port by; of many those that lead far.
fn gids(port: &PortDetails) -> Vec<[u8; 16]> {
    let gids = port.gids.as_ref().map(Vec::as_slice).unwrap_or_default();
    let lid_only = port.link_layer == LinkLayer::InfiniBand && !port.grh_required;
    let some = if lid_only { 1 } else { MAX_TOLD };
    let mut gids: Vec<&Gid> = gids.iter().collect();
    gids.sort_by_key(|gid| {
        let near = gid.raw.starts_with(&[0xfe, 0x80]);
        (gid.kind == Some(GidKind::RoceV1), near)
    });
    gids.iter().map(|gid| gid.raw).take(some).collect()
}

/// GIDs that a peer is told of: a port with more has them for containers that are not ours.
const MAX_TOLD: usize = 64;

/// The device, to the handles of this crate.
#[derive(Debug)]
pub(super) struct RdmaDeviceHandle(Arc<RdmaContext>);

impl DeviceBackend for RdmaDeviceHandle {
    fn info(&self) -> &DeviceInfo {
        &self.0.info
    }

    fn address(&self) -> DeviceAddr {
        let mut address = self.0.address.clone();
        if let Ok(port) = self.0.query_port() {
            address.gids = gids(&port);
        }
        address
    }

    fn host(&self) -> &str {
        &self.0.address.host
    }

    fn probe(&self, peer: &DeviceAddr, path: SoftPath) -> Result<(), Error> {
        Err(Error::Path {
            path,
            peer: peer.name.clone(),
            fault: PathFault::NoSuchPath,
        })
    }

    fn alloc_pd(&self) -> Result<u32, Error> {
        self.0.alloc_pd()
    }

    fn dealloc_pd(&self, pd: u32) {
        self.0.dealloc_pd(pd);
    }

    fn gid_towards(&self, peer: &[[u8; 16]]) -> Result<Option<GidChoice>, Error> {
        self.0.gid_towards(peer).map(Some)
    }

    fn rdma_port(&self) -> Option<&PortDetails> {
        Some(&self.0.port)
    }

    fn async_event(&self) -> Option<AsyncEvent> {
        self.0.async_event()
    }

    fn async_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.device.async_fd())
    }

    fn register(&self, pd: u32, memory: &dyn Memory, access: Access) -> Result<RegionKey, Error> {
        self.0.register(pd, memory, access)
    }

    fn deregister(&self, key: &RegionKey) -> bool {
        self.0.deregister(key)
    }

    fn create_cq(&self, depth: u32) -> Result<(u32, Arc<dyn CqBackend>), Error> {
        let cq = RdmaCq::new(Arc::clone(&self.0), depth)?;
        Ok((cq.number(), Arc::new(cq)))
    }

    fn create_qp(
        &self,
        pd: u32,
        caps: &QpCaps,
        send_cq: &CompletionQueue,
        recv_cq: &CompletionQueue,
    ) -> Result<Arc<dyn QpBackend>, Error> {
        let send_cq = send_cq.of::<RdmaCq>("send completion queue")?;
        let recv_cq = recv_cq.of::<RdmaCq>("receive completion queue")?;
        let pd = self.0.pd(pd)?;
        let qp = RdmaQp::create(Arc::clone(&self.0), pd, caps, send_cq, recv_cq)?;
        Ok(qp)
    }
}
