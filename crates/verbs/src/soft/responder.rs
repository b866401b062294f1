//! The receiving half of a queue pair: it serves the peer's requester half, on the context's one
//! responder thread.

mod moving;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::moving::copy_pieces;
use crate::cq::{Cqe, Slots};
use crate::qp::SoftPath;
use crate::region::{Access, RegionTable};
use crate::soft::context::SoftShared;
use crate::soft::frame::{
    DESC, Desc, HEADER, HELLO, Header, Hello, Kind, MAX_BATCH, MAX_OPS, MAX_PIECES, PIECE, Piece,
    Role,
};
use crate::soft::process_vm::PeerProcess;
use crate::soft::requester::LocalSge;
use crate::soft::segment::Mapping;
use crate::soft::stream::{Inbox, Outbox, Span, Stream};
use crate::soft::vendor;
use crate::sync::{Mutex, lock};
use crate::wr::{Completion, Op, WcOpcode, WcStatus};

/// Bytes copied with the key table locked.
const SLICE: u64 = 512 << 10;
/// What a frame, or an operation without bytes, takes from the budget: a peer that sends nothing
/// else must not keep the thread.
const FRAME_COST: u64 = 4 << 10;
/// How often a peer that waits for a receive, or for a long operation, is told that we live.
const BEAT: Duration = Duration::from_millis(100);

/// Source segments of one peer.
const MAX_SEGMENTS: usize = 4096;
/// Segments passed before they are asked for: the kernel bounds descriptors in flight.
const EAGER: usize = 64;

/// A posted receive.
#[derive(Debug)]
pub(crate) struct RecvWr {
    pub(crate) wr_id: u64,
    pub(crate) sges: Vec<LocalSge>,
    pub(crate) len: u64,
    pub(crate) bad_local: bool,
    pub(crate) table: Arc<RegionTable>,
}

#[derive(Debug, Default)]
pub(crate) struct RecvQueue {
    pub(crate) wrs: VecDeque<RecvWr>,
}

/// The requester's process on the same host.
#[derive(Debug)]
pub(crate) struct RespPeer {
    pub(crate) process: PeerProcess,
    pub(crate) path: SoftPath,
}

#[derive(Debug)]
pub(crate) struct RespLink {
    pub(crate) stream: Stream,
    /// `None` over TCP.
    pub(crate) local: Option<RespPeer>,
    /// TCP: the opening that the peer must send first.
    pub(crate) expect: Option<Expect>,
}

/// Which queue pairs a TCP stream joins.
#[derive(Clone, Copy)]
pub(crate) struct Expect {
    pub(crate) own: [u8; 16],
    pub(crate) peer: [u8; 16],
}

impl fmt::Debug for Expect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Tokens are not for logs.
        f.write_str("Expect")
    }
}

/// When to run the half again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// When its socket changes.
    Wait,
    /// At once, after the others had their turn.
    Again,
    /// Then, or when a receive is posted.
    At(Instant),
    /// Never.
    Gone,
}

/// What ends this half.
enum End {
    /// The stream ended or the peer broke the protocol.
    Gone,
    /// Tell the peer that its oldest operation failed.
    Nak(WcStatus, u32),
}

#[derive(Debug, Default)]
struct Batch {
    ops: Vec<Desc>,
    pieces: Vec<Piece>,
    /// The operation under way, its first piece, and how many of its bytes are done.
    at: usize,
    piece_at: usize,
    part: u64,
    rnr_retry: u8,
}

#[derive(Debug)]
pub(crate) struct Responder {
    ctx: Arc<SoftShared>,
    qpn: u32,
    pd: u32,
    recv_slots: Arc<Slots>,
    pub(crate) access: Access,
    pub(crate) link: Option<RespLink>,
    pub(crate) rnr_timer: Duration,
    /// After a NAK, or in ERR: what comes in is thrown away, until the peer closes.
    draining: bool,
    /// The queue pair must go to ERR (a receive failed).
    pub(crate) poisoned: bool,
    inbox: Inbox,
    outbox: Outbox,
    sources: HashMap<u32, Arc<Mapping>>,
    batch: Batch,
    done: u64,
    acked: u64,
    /// When the peer last heard of us.
    told: Instant,
    rnr: Option<(Instant, u8)>,
    recv: Option<RecvWr>,
    /// READ bytes on their way out: span, key, number of the operation in the batch.
    data: Vec<(Span, u32, usize)>,
    data_at: usize,
    data_bytes: u64,
    data_bad: Option<usize>,
    dst: Vec<Span>,
    src: Vec<Span>,
    pub(crate) cqes: Vec<Cqe>,
    pub(crate) retired: Vec<Arc<RegionTable>>,
}

impl Responder {
    pub(crate) fn new(ctx: Arc<SoftShared>, qpn: u32, pd: u32, recv_slots: Arc<Slots>) -> Self {
        Self {
            ctx,
            qpn,
            pd,
            recv_slots,
            access: Access::NONE,
            link: None,
            rnr_timer: Duration::from_millis(1),
            draining: false,
            poisoned: false,
            inbox: Inbox::new(2 * MAX_BATCH),
            outbox: Outbox::default(),
            sources: HashMap::new(),
            batch: Batch::default(),
            done: 0,
            acked: 0,
            told: Instant::now(),
            rnr: None,
            recv: None,
            data: Vec::new(),
            data_at: 0,
            data_bytes: 0,
            data_bad: None,
            dst: Vec::new(),
            src: Vec::new(),
            cqes: Vec::new(),
            retired: Vec::new(),
        }
    }

    /// Begins to serve a stream. Files that the peer may READ are passed at once, so that later
    /// READs need nothing of this process.
    pub(crate) fn attach(&mut self, link: RespLink) {
        if link
            .local
            .as_ref()
            .is_some_and(|p| p.path == SoftPath::Arena)
        {
            for (id, fd) in self.ctx.readable_segments().into_iter().take(EAGER) {
                self.outbox.put_fd(fd);
                self.outbox.put(
                    &Header {
                        n: 1,
                        m: id,
                        ..Header::new(Kind::Mapped)
                    }
                    .encode(),
                );
            }
        }
        self.link = Some(link);
    }

    /// Ends it: nothing is written to memory any more. With `keep` the stream stays open for the
    /// peer to read its NAK.
    pub(crate) fn stop(&mut self, keep: bool, rq: &Mutex<RecvQueue>) {
        if let Some(recv) = self.recv.take() {
            lock(rq).wrs.push_front(recv);
        }
        if let Some(link) = &self.link
            && !self.draining
            && self.data_at == self.data.len()
        {
            self.outbox.put(&Header::new(Kind::Bye).encode());
            // A full socket: the peer sees the stream end instead.
            let _ = self.outbox.flush(&link.stream);
        }
        self.draining = true;
        self.batch = Batch::default();
        self.data.clear();
        self.data_at = 0;
        self.sources.clear();
        if !keep {
            self.link = None;
        }
    }

    /// Serves what has come in, at most about `budget` bytes.
    pub(crate) fn run(&mut self, rq: &Mutex<RecvQueue>, mut budget: u64) -> Next {
        let end = match self.serve(rq, &mut budget) {
            Ok(next) => return next,
            Err(end) => end,
        };
        match end {
            End::Gone => {
                self.stop(false, rq);
                Next::Gone
            }
            End::Nak(status, vendor) => {
                let flag = u8::try_from(status.as_raw()).unwrap_or(u8::MAX);
                let head = Header {
                    kind: Kind::Nak,
                    flag,
                    n: 0,
                    m: vendor,
                    v: self.done,
                };
                self.outbox.put(&head.encode());
                self.draining = true;
                self.batch = Batch::default();
                self.serve(rq, &mut budget).unwrap_or(Next::Gone)
            }
        }
    }

    fn serve(&mut self, rq: &Mutex<RecvQueue>, budget: &mut u64) -> Result<Next, End> {
        loop {
            if !self.flush()? {
                return Ok(Next::Wait);
            }
            if self.draining {
                return self.discard();
            }
            if self.batch.at < self.batch.ops.len() {
                if *budget == 0 {
                    return self.pause(Next::Again);
                }
                if let Some(next) = self.step(rq, budget)? {
                    return self.pause(next);
                }
            } else if *budget == 0 {
                return self.pause(Next::Again);
            } else if self.parse()? {
                *budget = budget.saturating_sub(FRAME_COST);
            } else {
                let tcp = self.link.as_ref().is_some_and(|l| l.local.is_none());
                let Some(link) = &self.link else {
                    return Err(End::Gone);
                };
                // Over TCP a payload follows: leave it in the socket.
                let max = if tcp { 4096 } else { usize::MAX };
                match self.inbox.fill_max(&link.stream, max) {
                    Ok(0) => return Err(End::Gone),
                    Ok(_) => {}
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                        return self.pause(Next::Wait);
                    }
                    Err(_) => return Err(End::Gone),
                }
            }
        }
    }

    /// Tells the peer how far we are, then rests.
    fn pause(&mut self, next: Next) -> Result<Next, End> {
        // A long operation, or a wait for a receive, is not silence.
        let beat = next != Next::Wait && self.told.elapsed() >= BEAT;
        if self.acked != self.done || beat {
            self.acked = self.done;
            self.told = Instant::now();
            self.outbox.put(
                &Header {
                    v: self.done,
                    ..Header::new(Kind::Ack)
                }
                .encode(),
            );
            self.flush()?;
        }
        Ok(next)
    }

    fn discard(&mut self) -> Result<Next, End> {
        let Some(link) = &self.link else {
            return Err(End::Gone);
        };
        self.inbox.consume(usize::MAX);
        self.inbox.fds.clear();
        match self.inbox.fill(&link.stream) {
            Ok(0) => Err(End::Gone),
            Ok(_) => Ok(Next::Again),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(Next::Again),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Next::Wait),
            Err(_) => Err(End::Gone),
        }
    }

    /// Takes one frame out of the inbox; `false` if it is not whole yet.
    fn parse(&mut self) -> Result<bool, End> {
        let Some(link) = &mut self.link else {
            return Err(End::Gone);
        };
        if let Some(expect) = link.expect {
            if self.inbox.bytes().len() < HELLO {
                return Ok(false);
            }
            let hello = Hello::decode(self.inbox.bytes()).ok_or(End::Gone)?;
            let right = hello.role == Role::ToResponder
                && hello.target == expect.own
                && hello.token == expect.peer;
            if !right {
                return Err(End::Gone);
            }
            self.inbox.consume(HELLO);
            link.expect = None;
        }
        let bytes = self.inbox.bytes();
        if bytes.len() < HEADER {
            return Ok(false);
        }
        let head = Header::decode(bytes).ok_or(End::Gone)?;
        let path = link.local.as_ref().map(|p| p.path);
        match head.kind {
            Kind::Batch => {
                let ops = usize::from(head.n);
                let pieces = head.m as usize;
                if ops > MAX_OPS || pieces > MAX_PIECES || (path.is_none() && pieces > 0) {
                    return Err(End::Gone);
                }
                let whole = HEADER + ops * DESC + pieces * PIECE;
                if bytes.len() < whole {
                    return Ok(false);
                }
                let descs = bytes.get(HEADER..HEADER + ops * DESC).unwrap_or_default();
                let rest = bytes.get(HEADER + ops * DESC..whole).unwrap_or_default();
                self.batch.ops.clear();
                self.batch.pieces.clear();
                for b in descs.chunks_exact(DESC) {
                    self.batch.ops.push(Desc::decode(b).ok_or(End::Gone)?);
                }
                for b in rest.chunks_exact(PIECE) {
                    self.batch.pieces.push(Piece::decode(b).ok_or(End::Gone)?);
                }
                self.batch.at = 0;
                self.batch.piece_at = 0;
                self.batch.part = 0;
                self.batch.rnr_retry = head.flag;
                if path.is_some() && !self.batch.whole() {
                    return Err(End::Gone);
                }
                self.inbox.consume(whole);
                if head.v < self.done || head.v.checked_add(self.batch.ops.len() as u64).is_none() {
                    return Err(End::Gone);
                }
                // Numbers between were READs, which the initiator does itself.
                self.done = head.v;
                self.acked = head.v;
            }
            Kind::Segment if path == Some(SoftPath::Arena) => {
                self.inbox.consume(HEADER);
                let fd = self.inbox.fds.pop_front().ok_or(End::Gone)?;
                match self.ctx.maps.map(fd.as_fd()) {
                    Ok(_) if self.sources.len() >= MAX_SEGMENTS => return Err(End::Gone),
                    Ok(map) => {
                        self.sources.insert(head.m, map);
                    }
                    // The operations that use it fail and name the cause.
                    Err(e) => tracing::warn!(error = %e, "cannot map a peer's source memory"),
                }
            }
            Kind::Map if path == Some(SoftPath::Arena) => {
                self.inbox.consume(HEADER);
                let fd = self.ctx.segment_readable(head.m);
                let n = u16::from(fd.is_some());
                if let Some(fd) = fd {
                    self.outbox.put_fd(fd);
                }
                self.outbox.put(
                    &Header {
                        n,
                        m: head.m,
                        ..Header::new(Kind::Mapped)
                    }
                    .encode(),
                );
                self.flush()?;
            }
            _ => return Err(End::Gone),
        }
        Ok(true)
    }

    /// Does a slice of the batch; `Some` if something must happen first.
    fn step(&mut self, rq: &Mutex<RecvQueue>, budget: &mut u64) -> Result<Option<Next>, End> {
        let Some(op) = self.batch.ops.get(self.batch.at).copied() else {
            return Err(End::Gone);
        };
        if self.batch.part == 0 {
            if op.len > self.ctx.config.max_msg_sz {
                return Err(End::Nak(WcStatus::RemInvReq, vendor::BOUNDS));
            }
            if op.op.takes_recv()
                && self.recv.is_none()
                && let Some(next) = self.take_recv(rq, &op)?
            {
                return Ok(Some(next));
            }
        }
        if op.len == 0 {
            self.complete();
            *budget = budget.saturating_sub(FRAME_COST);
            return Ok(None);
        }
        let ctx = Arc::clone(&self.ctx);
        let keys = ctx.keys.slice();
        if op.op == Op::Read {
            if self.link.as_ref().is_some_and(|l| l.local.is_some()) {
                return Err(End::Gone);
            }
            self.start_data(&keys)?;
            drop(keys);
            *budget = budget.saturating_sub(self.data_bytes);
            return Ok(None);
        }
        let total = self.gather(&keys, SLICE.min(*budget))?;
        let moved = match self.link.as_ref().and_then(|l| l.local.as_ref()) {
            Some(peer) => copy_pieces(peer, &self.sources, &self.batch, &self.dst, &mut self.src)?,
            None => match self.receive_payload(total)? {
                0 => return Ok(Some(Next::Wait)),
                n => n,
            },
        };
        drop(keys);
        *budget = budget.saturating_sub(moved.max(64));
        self.advance(moved);
        Ok(None)
    }

    /// Finds the receive for an operation that needs one.
    fn take_recv(&mut self, rq: &Mutex<RecvQueue>, op: &Desc) -> Result<Option<Next>, End> {
        let Some(recv) = lock(rq).wrs.pop_front() else {
            let now = Instant::now();
            let forever = self.batch.rnr_retry >= 7;
            let wait = if forever {
                self.rnr_timer.max(BEAT)
            } else {
                self.rnr_timer
            };
            return match self.rnr {
                Some((until, _)) if now < until => Ok(Some(Next::At(until))),
                Some((_, tries)) if !forever && tries >= self.batch.rnr_retry => {
                    Err(End::Nak(WcStatus::RnrRetryExc, 0))
                }
                None if self.batch.rnr_retry == 0 => Err(End::Nak(WcStatus::RnrRetryExc, 0)),
                before => {
                    let tries = before.map_or(0, |b| b.1).saturating_add(1);
                    self.rnr = Some((now + wait, tries));
                    Ok(Some(Next::At(now + wait)))
                }
            };
        };
        self.rnr = None;
        let send = op.op != Op::WriteImm;
        let short = send && recv.len < op.len;
        if recv.bad_local || short {
            let (own, peer) = if short {
                (
                    WcStatus::LocLen,
                    (WcStatus::RemInvReq, vendor::RECV_TOO_SHORT),
                )
            } else {
                (WcStatus::LocProt, (WcStatus::RemOp, 0))
            };
            self.push_recv(recv, own, op);
            self.poisoned = true;
            return Err(End::Nak(peer.0, peer.1));
        }
        self.recv = Some(recv);
        Ok(None)
    }

    fn push_recv(&mut self, recv: RecvWr, status: WcStatus, op: &Desc) {
        let queue = Arc::clone(&self.recv_slots);
        let opcode = if op.op == Op::WriteImm {
            WcOpcode::RecvWriteImm
        } else {
            WcOpcode::Recv
        };
        self.cqes.push(Cqe {
            completion: Completion {
                wr_id: recv.wr_id,
                status,
                qp_num: self.qpn,
                vendor_err: 0,
                opcode,
                byte_len: u32::try_from(op.len).unwrap_or(u32::MAX),
                imm: op.op.imm().then_some(op.imm),
            },
            slots: 1,
            queue,
        });
        self.retired.push(recv.table);
    }

    /// The next `n` bytes of the batch are done.
    fn advance(&mut self, n: u64) {
        let mut left = n;
        while left > 0
            && let Some(op) = self.batch.ops.get(self.batch.at)
        {
            let step = (op.len - self.batch.part).min(left);
            self.batch.part += step;
            left -= step;
            if self.batch.part == op.len {
                self.complete();
            }
        }
    }

    /// The operation under way is done.
    fn complete(&mut self) {
        let Some(op) = self.batch.ops.get(self.batch.at).copied() else {
            return;
        };
        self.batch.at += 1;
        self.batch.piece_at += usize::from(op.pieces);
        self.batch.part = 0;
        self.done += 1;
        if let Some(recv) = self.recv.take() {
            self.push_recv(recv, WcStatus::Success, &op);
        }
    }
}

impl Batch {
    /// Whether every operation's pieces are there and as long as it says.
    fn whole(&self) -> bool {
        let mut at = 0usize;
        for op in &self.ops {
            let end = at + usize::from(op.pieces);
            let Some(pieces) = self.pieces.get(at..end) else {
                return false;
            };
            if pieces.iter().map(|p| u64::from(p.len)).sum::<u64>() != op.len {
                return false;
            }
            at = end;
        }
        at == self.pieces.len()
    }
}
