//! An open software device: its keys, its segments, its queue pairs and its responder thread.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use nix::errno::Errno;

use crate::device::{
    AsyncEvent, CompletionQueue, CqBackend, DeviceAddr, DeviceBackend, DeviceInfo, DeviceKind,
    boot_id,
};
use crate::error::Error;
use crate::memory::Memory;
use crate::qp::{QpBackend, QpCaps, SoftPath};
use crate::rdma::GidChoice;
use crate::region::{Access, RegionKey, SegmentSpan};
use crate::shared::SharedFile;
use crate::soft::cq::SoftCq;
use crate::soft::events::{Events, qp_of};
use crate::soft::injector::Injector;
use crate::soft::keys::{KeyInfo, KeyTable};
use crate::soft::link;
use crate::soft::process_vm::PeerLife;
use crate::soft::qp::{SoftQp, SoftQpHandle};
use crate::soft::segment::{MapCache, Segments, allocated};
use crate::soft::server::{self, Command, Mailbox};
use crate::soft::shares::Shares;
use crate::soft::{FIRST_CQ, PORT, SoftConfig, fill_random};
use crate::sync::{Mutex, MutexGuard, lock};

/// The key table behind a lock that the responder thread holds while it copies. A plain lock would
/// be taken again by that thread before a waiter wakes; so it lets waiters go first.
#[derive(Debug)]
pub(crate) struct Keys {
    table: Mutex<KeyTable>,
    waiting: AtomicU32,
}

impl Keys {
    /// For registering and deregistering.
    fn change(&self) -> MutexGuard<'_, KeyTable> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let guard = lock(&self.table);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        guard
    }

    /// For one slice of the responder's work.
    pub(crate) fn slice(&self) -> MutexGuard<'_, KeyTable> {
        while self.waiting.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
        lock(&self.table)
    }
}

pub(crate) struct SoftShared {
    pub(crate) config: SoftConfig,
    info: DeviceInfo,
    /// Its guid, here on the heap, is what a peer tries `process_vm_readv` on.
    pub(crate) address: DeviceAddr,
    pub(crate) keys: Keys,
    pub(crate) key_slots: u32,
    pub(crate) key_fd: Arc<OwnedFd>,
    segments: Mutex<Segments>,
    pub(crate) maps: MapCache,
    tokens: Mutex<HashMap<[u8; 16], Weak<SoftQp>>>,
    pub(crate) shares: Shares,
    pub(crate) mailbox: Mailbox,
    next_pd: AtomicU32,
    /// The first queue pair's number is random, so that a stale one names nobody.
    first_qpn: u32,
    qps: AtomicU32,
    cqs: AtomicU32,
    /// For the plan: the first completion queue.
    first_cq: Mutex<Weak<SoftCq>>,
    pub(crate) events: Events,
    pub(crate) faults: Option<Arc<Injector>>,
}

impl fmt::Debug for SoftShared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Tokens and keys are not for logs.
        f.debug_struct("SoftShared")
            .field("name", &self.address.name)
            .finish_non_exhaustive()
    }
}

impl SoftShared {
    pub(crate) fn segment_source(&self, id: u32) -> Option<Arc<OwnedFd>> {
        lock(&self.segments).source(id)
    }

    pub(crate) fn segment_readable(&self, id: u32) -> Option<Arc<OwnedFd>> {
        lock(&self.segments).readable(id)
    }

    pub(crate) fn readable_segments(&self) -> Vec<(u32, Arc<OwnedFd>)> {
        lock(&self.segments).all_readable()
    }

    /// The queue pair that has the token.
    pub(crate) fn by_token(&self, token: &[u8; 16]) -> Option<Arc<SoftQp>> {
        lock(&self.tokens).get(token).and_then(Weak::upgrade)
    }

    /// Every queue pair there is.
    pub(crate) fn queue_pairs(&self) -> Vec<Arc<SoftQp>> {
        let tokens = lock(&self.tokens);
        tokens.values().filter_map(Weak::upgrade).collect()
    }

    pub(crate) fn forget_token(&self, token: &[u8; 16]) {
        lock(&self.tokens).remove(token);
    }

    /// Tells an event, at once or as late as the plan wants it.
    pub(crate) fn tell(&self, event: AsyncEvent) {
        let lag = self.faults.as_ref().and_then(|faults| faults.lag());
        match lag.and_then(|lag| Instant::now().checked_add(lag)) {
            Some(at) => self.mailbox.send(Command::Tell(at, event)),
            None => self.tell_now(event),
        }
    }

    /// Tells an event, unless its queue pair has been destroyed.
    pub(crate) fn tell_now(&self, event: AsyncEvent) {
        self.events.push_if(event, || match qp_of(&event) {
            Some(qp_num) => self.queue_pairs().iter().any(|qp| qp.qpn == qp_num),
            None => true,
        });
    }

    /// The first completion queue fails, and all that completes there.
    pub(crate) fn fail_first_cq(&self) {
        let Some(cq) = lock(&self.first_cq).upgrade() else {
            return;
        };
        // First, so that no flush finds a way out, and that a queue pair that comes after the list
        // sees it.
        cq.core.fail();
        for qp in self.queue_pairs() {
            if qp.completes_on(&cq) {
                qp.fail_all(false);
            }
        }
    }

    /// Where this context's guid lies.
    /// What a device says that the plan lets refuse something.
    pub(crate) fn refusal(&self, call: &'static str, errno: Errno) -> Error {
        Error::Device {
            device: self.info.name.clone(),
            call,
            source: errno.into(),
        }
    }

    pub(crate) fn probe_addr(&self) -> u64 {
        self.address.guid.as_ptr() as u64
    }
}

fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    fill_random(&mut bytes)?;
    Ok(bytes)
}

#[derive(Debug)]
pub(crate) struct SoftDevice {
    shared: Arc<SoftShared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl SoftDevice {
    pub(crate) fn open(config: SoftConfig) -> Result<Self, Error> {
        let guid: [u8; 16] = random()?;
        // Everybody on the host can list the names of sockets, so it does not tell the guid.
        let label: [u8; 16] = random()?;
        let hex: String = label.iter().map(|b| format!("{b:02x}")).collect();
        let name = format!("{}{hex}", link::NAME);
        let address = DeviceAddr {
            kind: DeviceKind::Soft,
            host: boot_id()?,
            name,
            guid,
            pid: std::process::id(),
            gids: Vec::new(),
        };
        let (table, key_fd) = KeyTable::new(config.max_mr)?;
        let key_slots = table.slots();
        let first = u32::from_le_bytes(random()?);
        let plan = config.faults.clone();
        let faults = plan.map(|plan| Arc::new(Injector::new(plan)));
        let shared = Arc::new(SoftShared {
            info: DeviceInfo {
                name: "soft".to_owned(),
                kind: DeviceKind::Soft,
                max_qp_wr: config.max_qp_wr,
                max_sge: config.max_sge,
                max_sge_rd: config.max_sge,
                max_msg_sz: config.max_msg_sz,
                best_msg_sz: config.max_msg_sz,
                max_cqe: config.max_cqe,
                port: PORT,
                max_mr: config.max_mr,
            },
            config,
            address,
            keys: Keys {
                table: Mutex::new(table),
                waiting: AtomicU32::new(0),
            },
            key_slots,
            key_fd: Arc::new(key_fd),
            segments: Mutex::default(),
            maps: MapCache::default(),
            tokens: Mutex::default(),
            shares: Shares::default(),
            mailbox: Mailbox::new()?,
            next_pd: AtomicU32::new(1),
            first_qpn: first,
            qps: AtomicU32::new(0),
            cqs: AtomicU32::new(FIRST_CQ),
            first_cq: Mutex::default(),
            events: Events::new()?,
            faults,
        });
        let thread = server::start(Arc::clone(&shared))?;
        Ok(Self {
            shared,
            thread: Mutex::new(Some(thread)),
        })
    }
}

impl Drop for SoftDevice {
    fn drop(&mut self) {
        self.shared.mailbox.send(Command::Stop);
        if let Some(thread) = lock(&self.thread).take()
            // The last handle may go on the thread itself, with a receive's regions.
            && thread.thread().id() != std::thread::current().id()
        {
            // A panic of the thread has been printed; there is nobody to tell here.
            let _ = thread.join();
        }
    }
}

impl DeviceBackend for SoftDevice {
    fn info(&self) -> &DeviceInfo {
        &self.shared.info
    }

    fn address(&self) -> DeviceAddr {
        self.shared.address.clone()
    }

    fn host(&self) -> &str {
        &self.shared.address.host
    }

    fn probe(&self, peer: &DeviceAddr, path: SoftPath) -> Result<(), Error> {
        link::probe(&self.shared, peer, path)
    }

    fn share(&self, spans: &[SegmentSpan]) -> Result<[u8; 16], Error> {
        let file = |(index, span): (usize, &SegmentSpan)| {
            let file = self.shared.segment_readable(span.id);
            let file = file.ok_or(Error::NotShared { index })?;
            Ok((file, span.offset))
        };
        let files = spans.iter().enumerate().map(file);
        let files = files.collect::<Result<Vec<_>, Error>>()?;
        let token = random()?;
        self.shared.shares.add(token, files);
        Ok(token)
    }

    fn unshare(&self, token: &[u8; 16]) {
        self.shared.shares.remove(token);
    }

    fn map_shared(
        &self,
        peer: &DeviceAddr,
        token: [u8; 16],
        index: u32,
        deadline: Instant,
    ) -> Result<SharedFile, Error> {
        let (file, offset) = link::shared_file(&self.shared, peer, (token, index), deadline)?;
        Ok(SharedFile {
            map: self.shared.maps.map(file.as_fd())?,
            offset,
            allocated: allocated(file.as_fd())?,
        })
    }

    fn life_of(&self, peer: &DeviceAddr) -> Result<PeerLife, Error> {
        link::life(&self.shared, peer)
    }

    fn alloc_pd(&self) -> Result<u32, Error> {
        Ok(self.shared.next_pd.fetch_add(1, Ordering::Relaxed))
    }

    fn dealloc_pd(&self, _: u32) {}

    fn gid_towards(&self, _: &[[u8; 16]]) -> Result<Option<GidChoice>, Error> {
        Ok(None)
    }

    fn async_event(&self) -> Option<AsyncEvent> {
        self.shared.events.take()
    }

    fn async_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.shared.events.fd())
    }

    fn register(&self, pd: u32, memory: &dyn Memory, access: Access) -> Result<RegionKey, Error> {
        let (addr, len) = (memory.addr(), memory.len());
        let readable = access.contains(Access::REMOTE_READ);
        let segment = match memory.fd() {
            Some(f) => lock(&self.shared.segments).add(f.fd, f.offset, len, readable)?,
            None => SegmentSpan::NONE,
        };
        let info = KeyInfo {
            rkey: 0,
            addr,
            len,
            access,
            pd,
            segment,
        };
        let rkey = self.shared.keys.change().insert(info);
        match rkey {
            Some(rkey) => Ok(RegionKey {
                lkey: 0,
                rkey,
                segment,
            }),
            None => {
                lock(&self.shared.segments).remove(segment.id, readable);
                Err(Error::TooManyRegions {
                    max: self.shared.info.max_mr,
                })
            }
        }
    }

    fn deregister(&self, key: &RegionKey) -> bool {
        // Taking the lock waits for a copy by the responder; afterwards there is no key to copy by.
        let info = self.shared.keys.change().remove(key.rkey);
        if let Some(info) = info {
            let readable = info.access.contains(Access::REMOTE_READ);
            lock(&self.shared.segments).remove(info.segment.id, readable);
        }
        true
    }

    fn create_cq(&self, depth: u32) -> Result<(u32, Arc<dyn CqBackend>), Error> {
        let max = self.shared.info.max_cqe;
        if depth == 0 || depth > max {
            let what = "completion queue depth";
            return Err(Error::Limit {
                what,
                asked: depth.into(),
                max: max.into(),
            });
        }
        let cq = Arc::new(SoftCq::new(depth, self.shared.config.poll_budget)?);
        let number = self.shared.cqs.fetch_add(1, Ordering::Relaxed);
        if number == FIRST_CQ {
            *lock(&self.shared.first_cq) = Arc::downgrade(&cq);
        }
        Ok((number, cq))
    }

    fn create_qp(
        &self,
        pd: u32,
        caps: &QpCaps,
        send_cq: &CompletionQueue,
        recv_cq: &CompletionQueue,
    ) -> Result<Arc<dyn QpBackend>, Error> {
        let send_cq = send_cq.of::<SoftCq>("send completion queue")?;
        let recv_cq = recv_cq.of::<SoftCq>("receive completion queue")?;
        // 24 bits, as on the wire, and never 0.
        let ordinal = self.shared.qps.fetch_add(1, Ordering::Relaxed);
        let faults = self.shared.faults.as_ref();
        if faults.is_some_and(|f| f.refusals(ordinal).made) {
            return Err(self.shared.refusal("create_qp", Errno::ENOMEM));
        }
        let qpn = self.shared.first_qpn.wrapping_add(ordinal) % 0xff_fffe + 1;
        let psn = u32::from_le_bytes(random()?) & 0xff_ffff;
        let token = random()?;
        let shared = Arc::clone(&self.shared);
        let qp = SoftQp::new(
            shared,
            ordinal,
            qpn,
            psn,
            token,
            pd,
            *caps,
            Arc::clone(&send_cq),
            recv_cq,
        );
        let qp = Arc::new(qp);
        send_cq.add(Arc::clone(&qp));
        lock(&self.shared.tokens).insert(token, Arc::downgrade(&qp));
        if qp.completes_on_failed() {
            qp.fail_all(false);
        }
        Ok(Arc::new(SoftQpHandle(qp)))
    }
}

/// The descriptor of the key table, for a stream's opening.
pub(crate) fn key_fd(shared: &SoftShared) -> BorrowedFd<'_> {
    shared.key_fd.as_fd()
}
