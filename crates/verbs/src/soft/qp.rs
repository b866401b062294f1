//! A soft queue pair: two halves, each with a stream to its counterpart.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent};

use crate::cq::{Cqe, Slots};
use crate::error::{Error, PostCause, PostError, StateFault};
use crate::null::{PostLimits, take_credits};
use crate::qp::{
    InitAttr, Link, QpBackend, QpCaps, QpEndpoint, QpState, RtrAttr, RtsAttr, SoftPath,
};
use crate::region::{Access, RegionTable};
use crate::soft::context::SoftShared;
use crate::soft::cq::SoftCq;
use crate::soft::faults::Refusals;
use crate::soft::frame::Role;
use crate::soft::injector::QpFaults;
use crate::soft::link::{self, Incoming, path_of};
use crate::soft::requester::{ReqLink, Requester, resolve};
use crate::soft::responder::{Expect, Next, RecvQueue, RecvWr, RespLink, RespPeer, Responder};
use crate::soft::server::Command;
use crate::soft::stream::Stream;
use crate::sync::{Mutex, lock};
use crate::wr::{Completion, SendChain, Sge, WcOpcode, WcStatus};

/// Streams that the peer opened before this side was ready, and whom to take them from.
#[derive(Debug, Default)]
struct Attach {
    await_: Option<(QpEndpoint, SoftPath)>,
    early: Vec<Incoming>,
}

pub(crate) struct SoftQp {
    ctx: Arc<SoftShared>,
    pub(crate) qpn: u32,
    psn: u32,
    pub(crate) token: [u8; 16],
    pub(crate) pd: u32,
    /// What the fault plan does not let happen to it.
    refusals: Refusals,
    caps: QpCaps,
    state: AtomicU8,
    access: AtomicU32,
    send_cq: Arc<SoftCq>,
    recv_cq: Arc<SoftCq>,
    send_slots: Arc<Slots>,
    recv_slots: Arc<Slots>,
    /// The requester has, or may have, something to do. Set with the requester locked.
    active: AtomicBool,
    // Locks are taken in this order: attach, requester, responder, receives.
    attach: Mutex<Attach>,
    requester: Mutex<Requester>,
    responder: Mutex<Responder>,
    receives: Mutex<RecvQueue>,
    /// The responder waits for a receive.
    parked: AtomicBool,
}

impl fmt::Debug for SoftQp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The token is not for logs.
        f.debug_struct("SoftQp")
            .field("qpn", &self.qpn)
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

impl SoftQp {
    #[allow(
        clippy::too_many_arguments,
        reason = "one call, and each is a different thing"
    )]
    pub(crate) fn new(
        ctx: Arc<SoftShared>,
        ordinal: u32,
        qpn: u32,
        psn: u32,
        token: [u8; 16],
        pd: u32,
        caps: QpCaps,
        send_cq: Arc<SoftCq>,
        recv_cq: Arc<SoftCq>,
    ) -> Self {
        let send_slots = Arc::new(Slots::new(caps.max_send_wr));
        let recv_slots = Arc::new(Slots::new(caps.max_recv_wr));
        let mut requester = Requester::new(Arc::clone(&ctx), qpn, pd, Arc::clone(&send_slots));
        let faults = ctx.faults.clone();
        let refusals = faults.as_ref().map(|f| f.refusals(ordinal));
        requester.faults = faults.map(|f| Box::new(QpFaults::new(f, ordinal.into())));
        let responder = Responder::new(Arc::clone(&ctx), qpn, pd, Arc::clone(&recv_slots));
        Self {
            ctx,
            qpn,
            psn,
            token,
            pd,
            refusals: refusals.unwrap_or_default(),
            caps,
            state: AtomicU8::new(QpState::Reset as u8),
            access: AtomicU32::new(0),
            send_cq,
            recv_cq,
            send_slots,
            recv_slots,
            active: AtomicBool::new(false),
            attach: Mutex::default(),
            requester: Mutex::new(requester),
            responder: Mutex::new(responder),
            receives: Mutex::default(),
            parked: AtomicBool::new(false),
        }
    }

    pub(crate) fn access(&self) -> Access {
        Access::from_bits_truncate(self.access.load(Ordering::Acquire))
    }

    pub(crate) fn active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    fn set_state(&self, state: QpState) {
        // ERR is for good.
        let _ = self
            .state
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| {
                (now != QpState::Err as u8).then_some(state as u8)
            });
    }

    fn expect_state(&self, from: QpState, to: QpState) -> Result<(), Error> {
        let now = self.state();
        if now == from {
            Ok(())
        } else {
            Err(self.fault(from, to, StateFault::State(now)))
        }
    }

    fn fault(&self, from: QpState, to: QpState, fault: StateFault) -> Error {
        Error::Transition {
            qpn: self.qpn,
            from,
            to,
            fault,
        }
    }

    fn rtr_fault(&self, fault: StateFault) -> Error {
        self.fault(QpState::Init, QpState::Rtr, fault)
    }

    /// Moves the sending half; `true` if more can be done at once. Tables that are not needed any
    /// more go to `retired`, for the caller to drop with no lock held: memory may end with them.
    pub(crate) fn progress(
        &self,
        budget: &mut usize,
        sweep: bool,
        retired: &mut Vec<Arc<RegionTable>>,
    ) -> bool {
        let mut req = lock(&self.requester);
        if req.failed {
            self.active.store(false, Ordering::Release);
            return false;
        }
        let wanted = req.want_write;
        let result = req.progress(budget, sweep);
        let failed = result.is_err();
        if let Err(why) = result {
            self.set_state(QpState::Err);
            tracing::debug!(qpn = self.qpn, status = %why.status, vendor = why.vendor, "queue pair failed");
            req.fail(Some(why));
        }
        if req.want_write != wanted
            && let Some(ReqLink {
                stream: Some(stream),
                ..
            }) = &req.link
        {
            self.send_cq.watch_write(stream.as_fd(), req.want_write);
        }
        if req.wrs.is_empty() {
            self.active.store(false, Ordering::Release);
        }
        self.send_cq.core.push_all(&mut req.cqes);
        retired.append(&mut req.retired);
        drop(req);
        if failed {
            self.stop_receiving(false);
        }
        result.unwrap_or(false)
    }

    /// Whether it could do something now, and when the peer's silence becomes an error. For arming:
    /// `active` is looked at under the lock that whoever sets it holds.
    pub(crate) fn waiting(&self) -> (bool, Option<Instant>) {
        let req = lock(&self.requester);
        if !self.active() {
            return (false, None);
        }
        (req.runnable(), req.deadline())
    }

    /// Serves the peer's requests, on the responder thread.
    pub(crate) fn run_responder(&self, budget: u64) -> Next {
        let mut resp = lock(&self.responder);
        // Set before looking for a receive, so that a post either is seen or sees it.
        self.parked.store(true, Ordering::SeqCst);
        let next = resp.run(&self.receives, budget);
        if !matches!(next, Next::At(_)) {
            self.parked.store(false, Ordering::SeqCst);
        }
        self.recv_cq.core.push_all(&mut resp.cqes);
        let retired = std::mem::take(&mut resp.retired);
        let poisoned = std::mem::take(&mut resp.poisoned);
        drop(resp);
        drop(retired);
        if poisoned {
            self.fail_all(true);
        }
        next
    }

    pub(crate) fn watch_responder(&self, epoll: &Epoll, event: EpollEvent) -> nix::Result<()> {
        match &lock(&self.responder).link {
            Some(link) => epoll.add(link.stream.as_fd(), event),
            None => Err(nix::Error::ENOTCONN),
        }
    }

    /// A stream that the peer opened.
    pub(crate) fn offer(self: &Arc<Self>, incoming: Incoming) {
        let mut attach = lock(&self.attach);
        match attach.await_ {
            Some((remote, path)) => {
                if let Err(e) = self.attach_incoming(incoming, remote, path) {
                    tracing::warn!(qpn = self.qpn, error = %e, "refused a peer's stream");
                }
            }
            // Two are what a peer needs; older ones may be of a peer that has given up.
            None => {
                if attach.early.len() >= 8 {
                    attach.early.remove(0);
                }
                if self.state() == QpState::Init {
                    attach.early.push(incoming);
                }
            }
        }
    }

    fn attach_incoming(
        self: &Arc<Self>,
        incoming: Incoming,
        remote: QpEndpoint,
        path: SoftPath,
    ) -> Result<(), Error> {
        let hello = incoming.hello;
        if hello.token != remote.token || hello.qpn != remote.qpn {
            let fault = StateFault::EndpointMismatch {
                want: remote.qpn,
                got: hello.qpn,
            };
            return Err(self.rtr_fault(fault));
        }
        let got = path_of(hello.path).unwrap_or(SoftPath::Arena);
        if got != path {
            return Err(self.rtr_fault(StateFault::PathMismatch { want: path, got }));
        }
        match hello.role {
            Role::ToResponder => self.attach_local_responder(incoming, path),
            _ => self.attach_local_requester(incoming)?,
        }
        Ok(())
    }

    fn attach_local_responder(self: &Arc<Self>, peer: Incoming, path: SoftPath) {
        let local = Some(RespPeer {
            process: peer.process,
            path,
        });
        self.attach_responder(RespLink {
            stream: peer.stream,
            local,
            expect: None,
        });
    }

    fn attach_local_requester(&self, peer: Incoming) -> Result<(), Error> {
        let side = link::peer_side(&self.ctx, &peer.hello, &peer.keys, peer.process);
        let side = side.ok_or_else(|| self.rtr_fault(StateFault::Stream("requester")))?;
        self.attach_requester(peer.stream, Some(side), &[])
    }

    /// Begins to send over a stream, `opening` first.
    fn attach_requester(
        &self,
        stream: Stream,
        local: Option<crate::soft::requester::PeerSide>,
        opening: &[u8],
    ) -> Result<(), Error> {
        let mut req = lock(&self.requester);
        if req.failed || req.link.is_some() {
            return Ok(());
        }
        self.send_cq.watch(stream.as_fd())?;
        // With the link under one lock: a poll must not find one without the other.
        req.outbox.put(opening);
        req.link = Some(ReqLink {
            stream: Some(stream),
            local,
        });
        req.stalled = false;
        self.active.store(true, Ordering::Release);
        drop(req);
        self.send_cq.core.wake();
        Ok(())
    }

    fn attach_responder(self: &Arc<Self>, link: RespLink) {
        let mut resp = lock(&self.responder);
        if resp.link.is_some() || self.state() == QpState::Err {
            return;
        }
        resp.attach(link);
        drop(resp);
        self.ctx.mailbox.send(Command::Serve(Arc::clone(self)));
    }

    /// Stops the responder and flushes the receives.
    fn stop_receiving(&self, keep_stream: bool) {
        let mut resp = lock(&self.responder);
        resp.stop(keep_stream, &self.receives);
        let mut recvs = std::mem::take(&mut lock(&self.receives).wrs);
        let mut cqes: Vec<Cqe> = recvs.iter().map(|r| self.flushed_recv(r.wr_id)).collect();
        self.recv_cq.core.push_all(&mut cqes);
        drop(resp);
        recvs.clear();
        self.ctx.mailbox.send(Command::Run(self.qpn));
    }

    fn flushed_recv(&self, wr_id: u64) -> Cqe {
        Cqe {
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
        }
    }

    pub(crate) fn completes_on(&self, cq: &Arc<SoftCq>) -> bool {
        Arc::ptr_eq(&self.send_cq, cq) || Arc::ptr_eq(&self.recv_cq, cq)
    }

    pub(crate) fn completes_on_failed(&self) -> bool {
        self.send_cq.core.has_failed() || self.recv_cq.core.has_failed()
    }

    pub(crate) fn fail_all(&self, keep_stream: bool) {
        self.set_state(QpState::Err);
        let mut req = lock(&self.requester);
        req.fail(None);
        self.send_cq.core.push_all(&mut req.cqes);
        let retired = std::mem::take(&mut req.retired);
        drop(req);
        drop(retired);
        lock(&self.attach).early.clear();
        self.stop_receiving(keep_stream);
    }

    fn rtr_tcp(
        self: &Arc<Self>,
        remote: QpEndpoint,
        requester: std::net::TcpStream,
        responder: std::net::TcpStream,
    ) -> Result<(), Error> {
        for (stream, name) in [(&requester, "requester"), (&responder, "responder")] {
            let ready = stream
                .set_nonblocking(true)
                .and_then(|()| stream.set_nodelay(true));
            ready.map_err(|_| self.rtr_fault(StateFault::Stream(name)))?;
        }
        let mut hello = link::hello(&self.ctx, Some(self), Role::ToResponder);
        hello.target = remote.token;
        let stream = Stream::new(OwnedFd::from(requester), false);
        self.attach_requester(stream, None, &hello.encode())?;
        self.attach_responder(RespLink {
            stream: Stream::new(OwnedFd::from(responder), false),
            local: None,
            expect: Some(Expect {
                own: self.token,
                peer: remote.token,
            }),
        });
        Ok(())
    }
}

/// The handle's side of it: bring-up needs the `Arc`.
#[derive(Debug)]
pub(crate) struct SoftQpHandle(pub(crate) Arc<SoftQp>);

impl QpBackend for SoftQpHandle {
    fn init(&self, attr: &InitAttr) -> Result<(), Error> {
        let qp = &self.0;
        qp.expect_state(QpState::Reset, QpState::Init)?;
        qp.access.store(attr.access.bits(), Ordering::Release);
        lock(&qp.responder).access = attr.access;
        qp.set_state(QpState::Init);
        Ok(())
    }

    fn endpoint(&self) -> QpEndpoint {
        QpEndpoint {
            qpn: self.0.qpn,
            psn: self.0.psn,
            token: self.0.token,
            port: None,
        }
    }

    fn rtr(&self, attr: RtrAttr) -> Result<(), Error> {
        let qp = &self.0;
        qp.expect_state(QpState::Init, QpState::Rtr)?;
        if qp.refusals.joined {
            return Err(qp.ctx.refusal("modify_qp to RTR", Errno::ETIMEDOUT));
        }
        let remote = attr.remote;
        if remote.qpn == 0 || remote.token == [0; 16] {
            return Err(qp.rtr_fault(StateFault::EmptyEndpoint));
        }
        if attr.min_rnr_timer > 31 {
            let value = attr.min_rnr_timer.into();
            let fault = StateFault::Range {
                attribute: "min_rnr_timer",
                value,
                max: 31,
            };
            return Err(qp.rtr_fault(fault));
        }
        lock(&qp.responder).rnr_timer = rnr_time(attr.min_rnr_timer);
        match attr.link {
            Link::SoftDial {
                peer,
                path,
                deadline,
            } => {
                let (req, resp) = link::dial(&qp.ctx, qp, remote.token, &peer, path, deadline)?;
                for side in [&req.hello, &resp.hello] {
                    if side.qpn != remote.qpn {
                        let (want, got) = (remote.qpn, side.qpn);
                        return Err(qp.rtr_fault(StateFault::EndpointMismatch { want, got }));
                    }
                }
                qp.attach_local_requester(req)?;
                qp.attach_local_responder(resp, path);
            }
            Link::SoftAwait { path } => {
                let mut attach = lock(&qp.attach);
                attach.await_ = Some((remote, path));
                for incoming in std::mem::take(&mut attach.early) {
                    if incoming.hello.token != remote.token {
                        // Somebody else's attempt, not the peer's.
                        tracing::warn!(
                            qpn = qp.qpn,
                            got = incoming.hello.qpn,
                            "dropped a stranger's stream"
                        );
                        continue;
                    }
                    qp.attach_incoming(incoming, remote, path)?;
                }
            }
            Link::SoftTcp {
                requester,
                responder,
            } => qp.rtr_tcp(remote, requester, responder)?,
            Link::Rdma => return Err(qp.rtr_fault(StateFault::LinkKind("RDMA"))),
        }
        qp.set_state(QpState::Rtr);
        Ok(())
    }

    fn rts(&self, attr: &RtsAttr) -> Result<(), Error> {
        let qp = &self.0;
        qp.expect_state(QpState::Rtr, QpState::Rts)?;
        attr.check()
            .map_err(|fault| qp.fault(QpState::Rtr, QpState::Rts, fault))?;
        let mut req = lock(&qp.requester);
        req.rnr_retry = attr.rnr_retry;
        let least = qp.ctx.config.min_retry_time;
        req.retry_time = attr.retry_time().map(|time| time.max(least));
        drop(req);
        qp.set_state(QpState::Rts);
        Ok(())
    }

    fn post_send(&self, chain: &SendChain, table: &Arc<RegionTable>) -> Result<(), PostError> {
        let qp = &self.0;
        let state = qp.state();
        if state != QpState::Rts && state != QpState::Err {
            return Err(PostError {
                posted: 0,
                cause: PostCause::State(state),
            });
        }
        let limits = PostLimits {
            sges: qp.caps.max_send_sge,
            len: qp.ctx.config.max_msg_sz,
            table,
        };
        let (want, limited) = limits.check(chain);
        let mut req = lock(&qp.requester);
        let (n, full) = take_credits(want, &qp.send_slots, qp.send_cq.core.credits());
        req.post(chain, n, table);
        if req.failed {
            req.fail(None);
            qp.send_cq.core.push_all(&mut req.cqes);
        } else {
            qp.active.store(true, Ordering::Release);
        }
        let retired = std::mem::take(&mut req.retired);
        drop(req);
        drop(retired);
        qp.send_cq.core.wake();
        match full.or(limited) {
            Some(cause) => Err(PostError { posted: n, cause }),
            None => Ok(()),
        }
    }

    fn post_recv(
        &self,
        wr_id: u64,
        sges: &[Sge],
        table: &Arc<RegionTable>,
    ) -> Result<(), PostError> {
        let qp = &self.0;
        let len = sges.iter().map(|s| u64::from(s.len)).sum();
        let limits = PostLimits {
            sges: qp.caps.max_recv_sge,
            len: u64::MAX,
            table,
        };
        if let Some(cause) = limits.fault(sges, len) {
            return Err(PostError { posted: 0, cause });
        }
        if qp.state() == QpState::Reset {
            return Err(PostError {
                posted: 0,
                cause: PostCause::State(QpState::Reset),
            });
        }
        let resolved: Option<Vec<_>> = sges
            .iter()
            .map(|s| resolve(table, *s, qp.pd, Access::LOCAL_WRITE))
            .collect();
        let recv = RecvWr {
            wr_id,
            len,
            bad_local: resolved.is_none(),
            sges: resolved.unwrap_or_default(),
            table: Arc::clone(table),
        };
        let mut receives = lock(&qp.receives);
        if let (_, Some(cause)) = take_credits(1, &qp.recv_slots, qp.recv_cq.core.credits()) {
            return Err(PostError { posted: 0, cause });
        }
        // Under the lock: whoever moves the queue pair to ERR flushes after setting the state.
        if qp.state() == QpState::Err {
            qp.recv_cq.core.push_all(&mut vec![qp.flushed_recv(wr_id)]);
            return Ok(());
        }
        receives.wrs.push_back(recv);
        drop(receives);
        if qp.parked.load(Ordering::SeqCst) {
            qp.ctx.mailbox.send(Command::Run(qp.qpn));
        }
        Ok(())
    }

    fn send_credits(&self) -> u32 {
        self.0
            .send_slots
            .free()
            .min(self.0.send_cq.core.credits().free())
    }

    fn qp_num(&self) -> u32 {
        self.0.qpn
    }

    fn state(&self) -> QpState {
        self.0.state()
    }

    fn to_error(&self) {
        self.0.fail_all(false);
    }

    fn destroy(&self) -> Result<(), Error> {
        let qp = &self.0;
        if qp.refusals.destroyed {
            return Err(qp.ctx.refusal("destroy_qp", Errno::EIO));
        }
        qp.ctx.forget_token(&qp.token);
        qp.fail_all(false);
        qp.ctx.events.forget(qp.qpn);
        qp.send_cq.remove(qp.qpn);
        qp.send_cq.core.purge(qp.qpn);
        qp.recv_cq.core.purge(qp.qpn);
        let unpolled = lock(&qp.requester).unaccounted();
        qp.send_cq.core.credits().give(unpolled);
        Ok(())
    }
}

impl SoftQp {
    fn state(&self) -> QpState {
        QpState::from_u8(self.state.load(Ordering::Acquire))
    }
}

/// The verbs code of the RNR timer.
fn rnr_time(code: u8) -> Duration {
    // In units of 10 us.
    const TABLE: [u32; 32] = [
        65536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024,
        1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152,
    ];
    let units = TABLE.get(usize::from(code)).copied().unwrap_or(65536);
    Duration::from_micros(u64::from(units) * 10)
}
