//! The device that completes every work request at once, successfully, and moves nothing. It is
//! there to measure the code above a device, and is never chosen by itself.

use std::any::Any;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use crate::cq::{CqCore, Cqe, Poll, Slots};
use crate::device::{
    AsyncEvent, CompletionQueue, Context, CqBackend, DeviceAddr, DeviceBackend, DeviceInfo,
    DeviceKind,
};
use crate::error::{Error, PathFault, PostCause, PostError};
use crate::memory::Memory;
use crate::qp::{InitAttr, QpBackend, QpCaps, QpEndpoint, QpState, RtrAttr, RtsAttr, SoftPath};
use crate::rdma::GidChoice;
use crate::region::{Access, RegionKey, RegionTable, SegmentSpan};
use crate::sync::{Mutex, lock};
use crate::wr::{Completion, SendChain, Sge, WcOpcode, WcStatus};

/// Opens the null device: posting checks limits and credits as every device does, signalled work
/// requests complete at once with success, and no byte moves. Receives never complete, except by
/// flushing. A queue pair takes any link and never talks to anybody.
#[must_use]
pub fn open_null() -> Context {
    Context::new(Arc::new(NullDevice {
        info: DeviceInfo {
            name: "null".to_owned(),
            kind: DeviceKind::Null,
            max_qp_wr: 1 << 16,
            max_sge: 32,
            max_sge_rd: 32,
            max_msg_sz: 1 << 31,
            best_msg_sz: 1 << 31,
            max_cqe: 1 << 22,
            port: 1,
            max_mr: u32::MAX,
        },
        address: DeviceAddr {
            kind: DeviceKind::Null,
            host: String::new(),
            name: "null".to_owned(),
            guid: [0; 16],
            pid: std::process::id(),
            gids: Vec::new(),
        },
        next: AtomicU32::new(1),
    }))
}

#[derive(Debug)]
struct NullDevice {
    info: DeviceInfo,
    address: DeviceAddr,
    next: AtomicU32,
}

impl DeviceBackend for NullDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn address(&self) -> DeviceAddr {
        self.address.clone()
    }

    fn host(&self) -> &str {
        &self.address.host
    }

    fn probe(&self, peer: &DeviceAddr, path: SoftPath) -> Result<(), Error> {
        Err(Error::Path {
            path,
            peer: peer.name.clone(),
            fault: PathFault::NoSuchPath,
        })
    }

    fn alloc_pd(&self) -> Result<u32, Error> {
        Ok(self.next.fetch_add(1, Ordering::Relaxed))
    }

    fn dealloc_pd(&self, _: u32) {}

    fn gid_towards(&self, _: &[[u8; 16]]) -> Result<Option<GidChoice>, Error> {
        Ok(None)
    }

    fn async_event(&self) -> Option<AsyncEvent> {
        None
    }

    fn async_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn register(&self, _: u32, _: &dyn Memory, _: Access) -> Result<RegionKey, Error> {
        let rkey = self.next.fetch_add(1, Ordering::Relaxed);
        Ok(RegionKey {
            lkey: 0,
            rkey,
            segment: SegmentSpan::NONE,
        })
    }

    fn deregister(&self, _: &RegionKey) -> bool {
        true
    }

    fn create_cq(&self, depth: u32) -> Result<(u32, Arc<dyn CqBackend>), Error> {
        if depth == 0 || depth > self.info.max_cqe {
            let max = self.info.max_cqe.into();
            return Err(Error::Limit {
                what: "completion queue depth",
                asked: depth.into(),
                max,
            });
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        Ok((number, Arc::new(NullCq(CqCore::new(depth)?))))
    }

    fn create_qp(
        &self,
        _: u32,
        caps: &QpCaps,
        send_cq: &CompletionQueue,
        recv_cq: &CompletionQueue,
    ) -> Result<Arc<dyn QpBackend>, Error> {
        let send_cq = send_cq.of::<NullCq>("send completion queue")?;
        let recv_cq = recv_cq.of::<NullCq>("receive completion queue")?;
        Ok(Arc::new(NullQp {
            qpn: self.next.fetch_add(1, Ordering::Relaxed),
            caps: *caps,
            max_msg_sz: self.info.max_msg_sz,
            send_cq,
            recv_cq,
            slots: Arc::new(Slots::new(caps.max_send_wr)),
            recv_slots: Arc::new(Slots::new(caps.max_recv_wr)),
            state: AtomicU8::new(QpState::Reset as u8),
            work: Mutex::new(NullWork::default()),
        }))
    }
}

#[derive(Debug)]
struct NullCq(CqCore);

impl CqBackend for NullCq {
    fn depth(&self) -> u32 {
        self.0.depth()
    }

    fn poll(&self, out: &mut Vec<Completion>, max: usize) -> Result<Poll, Error> {
        self.0.disarm();
        self.0.pop(out, max);
        Ok(Poll {
            more: !self.0.is_empty(),
        })
    }

    fn arm(&self) -> Result<bool, Error> {
        self.0.set_armed();
        if self.0.has_completions() {
            self.0.disarm();
            return Ok(false);
        }
        Ok(true)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.0.event()
    }

    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

#[derive(Debug, Default)]
struct NullWork {
    /// Unsignalled work requests since the last signalled one.
    silent: u32,
    recvs: Vec<u64>,
    cqes: Vec<Cqe>,
}

#[derive(Debug)]
struct NullQp {
    qpn: u32,
    caps: QpCaps,
    max_msg_sz: u64,
    send_cq: Arc<NullCq>,
    recv_cq: Arc<NullCq>,
    slots: Arc<Slots>,
    recv_slots: Arc<Slots>,
    state: AtomicU8,
    work: Mutex<NullWork>,
}

impl QpBackend for NullQp {
    fn init(&self, _: &InitAttr) -> Result<(), Error> {
        self.state.store(QpState::Init as u8, Ordering::Release);
        Ok(())
    }

    fn endpoint(&self) -> QpEndpoint {
        QpEndpoint {
            qpn: self.qpn,
            psn: 0,
            token: [0xff; 16],
            port: None,
        }
    }

    fn rtr(&self, _: RtrAttr) -> Result<(), Error> {
        self.state.store(QpState::Rtr as u8, Ordering::Release);
        Ok(())
    }

    fn rts(&self, _: &RtsAttr) -> Result<(), Error> {
        self.state.store(QpState::Rts as u8, Ordering::Release);
        Ok(())
    }

    fn post_send(&self, chain: &SendChain, table: &Arc<RegionTable>) -> Result<(), PostError> {
        let state = self.state();
        if state != QpState::Rts && state != QpState::Err {
            return Err(PostError {
                posted: 0,
                cause: PostCause::State(state),
            });
        }
        let limits = PostLimits {
            sges: self.caps.max_send_sge,
            len: self.max_msg_sz,
            table: table.as_ref(),
        };
        let (want, limited) = limits.check(chain);
        let mut work = lock(&self.work);
        let (n, full) = take_credits(want, &self.slots, self.send_cq.0.credits());
        let NullWork { silent, cqes, .. } = &mut *work;
        for w in chain.wrs.iter().take(n) {
            *silent += 1;
            if w.signaled || state == QpState::Err {
                let (status, slots) = match state {
                    QpState::Err => (WcStatus::WrFlush, std::mem::take(silent)),
                    _ => (WcStatus::Success, std::mem::take(silent)),
                };
                cqes.push(Cqe {
                    completion: Completion {
                        wr_id: w.wr_id,
                        status,
                        qp_num: self.qpn,
                        vendor_err: 0,
                        opcode: w.op.opcode(),
                        byte_len: w.len as u32,
                        imm: None,
                    },
                    slots,
                    queue: Arc::clone(&self.slots),
                });
            }
        }
        self.send_cq.0.push_all(cqes);
        match full.or(limited) {
            Some(cause) => Err(PostError { posted: n, cause }),
            None => Ok(()),
        }
    }

    fn post_recv(&self, wr_id: u64, _: &[Sge], _: &Arc<RegionTable>) -> Result<(), PostError> {
        let mut work = lock(&self.work);
        if let (_, Some(cause)) = take_credits(1, &self.recv_slots, self.recv_cq.0.credits()) {
            return Err(PostError { posted: 0, cause });
        }
        work.recvs.push(wr_id);
        Ok(())
    }

    fn send_credits(&self) -> u32 {
        self.slots.free().min(self.send_cq.0.credits().free())
    }

    fn qp_num(&self) -> u32 {
        self.qpn
    }

    fn state(&self) -> QpState {
        QpState::from_u8(self.state.load(Ordering::Acquire))
    }

    fn to_error(&self) {
        let mut work = lock(&self.work);
        self.state.store(QpState::Err as u8, Ordering::Release);
        let NullWork { recvs, cqes, .. } = &mut *work;
        for wr_id in recvs.drain(..) {
            cqes.push(Cqe {
                completion: Completion {
                    wr_id,
                    status: WcStatus::WrFlush,
                    qp_num: self.qpn,
                    vendor_err: 0,
                    opcode: WcOpcode::Recv,
                    byte_len: 0,
                    imm: None,
                },
                slots: 1,
                queue: Arc::clone(&self.recv_slots),
            });
        }
        self.recv_cq.0.push_all(cqes);
    }

    fn destroy(&self) -> Result<(), Error> {
        self.to_error();
        self.send_cq.0.purge(self.qpn);
        self.recv_cq.0.purge(self.qpn);
        Ok(())
    }
}

/// The limits that a chain is held against when it is posted.
pub(crate) struct PostLimits<'a> {
    pub(crate) sges: u32,
    pub(crate) len: u64,
    pub(crate) table: &'a RegionTable,
}

impl PostLimits<'_> {
    /// How many work requests, from the first, are within the limits, and what the next one is
    /// over. The chain knows its maxima, so a good chain is not walked.
    pub(crate) fn check(&self, chain: &SendChain) -> (usize, Option<PostCause>) {
        let regions = self.table.entries().len();
        let good = chain.max_nsge <= self.sges
            && chain.max_len <= self.len
            && chain.regions <= regions as u64;
        if good {
            return (chain.wrs.len(), None);
        }
        for (i, w) in chain.wrs().enumerate() {
            let len = w.sges.iter().map(|s| u64::from(s.len)).sum();
            if let Some(cause) = self.fault(w.sges, len) {
                return (i, Some(cause));
            }
        }
        (chain.wrs.len(), None)
    }

    /// What these spans are over.
    pub(crate) fn fault(&self, sges: &[Sge], len: u64) -> Option<PostCause> {
        if sges.len() > self.sges as usize {
            let n = u32::try_from(sges.len()).unwrap_or(u32::MAX);
            return Some(PostCause::TooManySges {
                sges: n,
                max: self.sges,
            });
        }
        if len > self.len {
            return Some(PostCause::TooLong { len, max: self.len });
        }
        let regions = self.table.entries().len();
        let bad = sges.iter().find(|s| s.region as usize >= regions)?;
        let regions = u32::try_from(regions).unwrap_or(u32::MAX);
        Some(PostCause::NoSuchRegion {
            region: bad.region,
            regions,
        })
    }
}

/// Takes a slot and a completion credit for up to `want` work requests.
pub(crate) fn take_credits(want: usize, slots: &Slots, cq: &Slots) -> (usize, Option<PostCause>) {
    let asked = u32::try_from(want).unwrap_or(u32::MAX);
    let got = slots.take(asked);
    let room = cq.take(got);
    if room < got {
        slots.give(got - room);
    }
    let cause = if (got as usize) < want && room == got {
        Some(PostCause::QueueFull)
    } else if room < got {
        Some(PostCause::CqFull)
    } else {
        None
    };
    (room as usize, cause)
}
