//! The sending half of a queue pair: its send queue, and the stream to the half that serves it.
//! It moves only inside `poll` of the completion queue.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cq::{Cqe, Slots};
use crate::qp::SoftPath;
use crate::region::{Access, RegionTable};
use crate::soft::context::SoftShared;
use crate::soft::frame::{Desc, Header, Kind, MAX_OPS, MAX_PIECES, Piece};
use crate::soft::injector::QpFaults;
use crate::soft::keys::{KeyInfo, PeerKeys};
use crate::soft::process_vm::PeerProcess;
use crate::soft::requester_local::Place;
use crate::soft::stream::{Inbox, MAX_SPANS, Outbox, Span, Stream};
use crate::soft::vendor;
use crate::wr::{Completion, Op, SendChain, Sge, WcStatus, WrEntry};

/// A local span, resolved when it was posted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LocalSge {
    pub(crate) addr: u64,
    pub(crate) offset: u64,
    pub(crate) segment: u32,
    pub(crate) len: u32,
}

/// Resolves a span against its table; `None` if it is out of bounds, of another protection domain
/// or without the access.
#[inline]
pub(crate) fn resolve(table: &RegionTable, sge: Sge, pd: u32, want: Access) -> Option<LocalSge> {
    let r = table.entries().get(sge.region as usize)?;
    let end = sge.offset.checked_add(u64::from(sge.len))?;
    let good = r.host && end <= r.len && r.pd == pd && r.access.contains(want);
    good.then(|| LocalSge {
        addr: r.addr + sge.offset,
        offset: r.segment.offset + sge.offset,
        segment: r.segment.id,
        len: sge.len,
    })
}

/// The access to its local spans that an operation needs.
fn local_access(op: Op) -> Access {
    if op == Op::Read {
        Access::LOCAL_WRITE
    } else {
        Access::NONE
    }
}

/// What ends the queue pair: the oldest work request gets this status, the others flush.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fail {
    pub(crate) status: WcStatus,
    pub(crate) vendor: u32,
}

impl Fail {
    pub(crate) fn new(status: WcStatus, vendor: u32) -> Self {
        Self { status, vendor }
    }

    pub(crate) fn protocol() -> Self {
        Self::new(WcStatus::RemOp, vendor::PROTOCOL)
    }

    pub(crate) fn gone() -> Self {
        Self::new(WcStatus::RetryExc, vendor::PEER_GONE)
    }
}

/// The peer on the same host.
#[derive(Debug)]
pub(crate) struct PeerSide {
    pub(crate) keys: PeerKeys,
    pub(crate) pd: u32,
    pub(crate) access: Access,
    pub(crate) process: PeerProcess,
    pub(crate) path: SoftPath,
}

#[derive(Debug)]
pub(crate) struct ReqLink {
    /// `None` after the stream ended: mapped READs go on, nothing else does.
    pub(crate) stream: Option<Stream>,
    /// `None` over TCP.
    pub(crate) local: Option<PeerSide>,
}

/// The key last used, with its place in the mapping (0: by `process_vm_readv`).
#[derive(Debug)]
pub(crate) struct CachedKey {
    pub(crate) info: KeyInfo,
    pub(crate) base: u64,
}

#[derive(Debug)]
pub(crate) struct Requester {
    pub(crate) ctx: Arc<SoftShared>,
    pub(crate) qpn: u32,
    pub(crate) pd: u32,
    slots: Arc<Slots>,
    pub(crate) wrs: VecDeque<WrEntry>,
    pub(crate) sges: VecDeque<LocalSge>,
    /// The tables of posted chains, each with the number after its last work request.
    chains: VecDeque<(Arc<RegionTable>, u64)>,
    /// Number of the oldest work request; numbers count from the first ever posted.
    pub(crate) head: u64,
    /// Number of the first one not sent to the peer.
    pub(crate) sent: u64,
    /// Over TCP: number after the last one whose payload has left, and what the peer has
    /// acknowledged. Spans that are still to be sent keep their work requests, whatever it says.
    pub(crate) flushed: u64,
    pub(crate) acked: u64,
    /// Spans of the sent ones.
    pub(crate) sent_sges: usize,
    /// Bytes of the oldest work request that are done (local READs).
    pub(crate) part: u64,
    /// Ended work requests that no completion has accounted for yet.
    silent: u32,
    pub(crate) link: Option<ReqLink>,
    /// With a plan: what is to go wrong, and the number of the first work request that it is about.
    pub(crate) faults: Option<Box<QpFaults>>,
    pub(crate) fence: u64,
    /// Nothing to do before the peer, a socket or a post says so.
    pub(crate) stalled: bool,
    pub(crate) failed: bool,
    /// Wants to know when the socket takes bytes again.
    pub(crate) want_write: bool,
    pub(crate) inbox: Inbox,
    pub(crate) outbox: Outbox,
    /// TCP: the payload after the outbox, from `tx_at`.
    pub(crate) tx_spans: Vec<Span>,
    pub(crate) tx_at: usize,
    /// TCP: where the next READ bytes go: work request, spans before it, bytes of it done.
    pub(crate) rx_wr: u64,
    pub(crate) rx_sges: usize,
    pub(crate) rx_part: u64,
    pub(crate) data_left: u64,
    pub(crate) scratch: Vec<Span>,
    pub(crate) scratch2: Vec<Span>,
    pub(crate) key: Option<CachedKey>,
    pub(crate) maps: HashMap<u32, Place>,
    pub(crate) map_wanted: Option<u32>,
    announced: HashSet<u32>,
    pub(crate) progressed: bool,
    last_progress: Instant,
    pub(crate) retry_time: Option<Duration>,
    pub(crate) rnr_retry: u8,
    polls: u32,
    pub(crate) cqes: Vec<Cqe>,
    /// Tables to drop once the locks are released.
    pub(crate) retired: Vec<Arc<RegionTable>>,
}

impl Requester {
    pub(crate) fn new(ctx: Arc<SoftShared>, qpn: u32, pd: u32, slots: Arc<Slots>) -> Self {
        Self {
            ctx,
            qpn,
            pd,
            slots,
            wrs: VecDeque::new(),
            sges: VecDeque::new(),
            chains: VecDeque::new(),
            head: 0,
            sent: 0,
            flushed: 0,
            acked: 0,
            sent_sges: 0,
            part: 0,
            silent: 0,
            link: None,
            faults: None,
            fence: u64::MAX,
            stalled: false,
            failed: false,
            want_write: false,
            inbox: Inbox::new(4096),
            outbox: Outbox::default(),
            tx_spans: Vec::new(),
            tx_at: 0,
            rx_wr: 0,
            rx_sges: 0,
            rx_part: 0,
            data_left: 0,
            scratch: Vec::new(),
            scratch2: Vec::new(),
            key: None,
            maps: HashMap::new(),
            map_wanted: None,
            announced: HashSet::new(),
            progressed: false,
            last_progress: Instant::now(),
            retry_time: None,
            rnr_retry: 7,
            polls: 0,
            cqes: Vec::new(),
            retired: Vec::new(),
        }
    }

    /// Appends the first `n` work requests of a chain.
    pub(crate) fn post(&mut self, chain: &SendChain, n: usize, table: &Arc<RegionTable>) {
        if n == 0 {
            return;
        }
        if self.wrs.is_empty() {
            self.last_progress = Instant::now();
        }
        let nowhere = LocalSge {
            addr: 0,
            offset: 0,
            segment: 0,
            len: 0,
        };
        let number = self.head + self.wrs.len() as u64;
        let uniform = chain.reads == 0 || chain.reads == chain.wrs.len();
        if uniform && n == chain.wrs.len() {
            let want = local_access(if chain.reads > 0 { Op::Read } else { Op::Write });
            let mut bad = false;
            self.sges.extend(chain.sges.iter().map(|sge| {
                resolve(table, *sge, self.pd, want).unwrap_or_else(|| {
                    bad = true;
                    nowhere
                })
            }));
            let first = self.wrs.len();
            self.wrs.extend(&chain.wrs);
            if bad {
                let mut sges = chain.sges.iter();
                for wr in self.wrs.range_mut(first..) {
                    for sge in sges.by_ref().take(wr.nsge as usize) {
                        wr.bad_local |= resolve(table, *sge, self.pd, want).is_none();
                    }
                }
            }
        } else {
            let mut sges = chain.sges.iter();
            for wr in chain.wrs.iter().take(n) {
                let mut wr = *wr;
                for sge in sges.by_ref().take(wr.nsge as usize) {
                    let local = resolve(table, *sge, self.pd, local_access(wr.op));
                    wr.bad_local |= local.is_none();
                    self.sges.push_back(local.unwrap_or(nowhere));
                }
                self.wrs.push_back(wr);
            }
        }
        if let Some(faults) = &mut self.faults {
            let posted = self.wrs.range_mut((number - self.head) as usize..);
            for (number, wr) in (number..).zip(posted) {
                faults.consider(number, wr);
            }
            self.fence = faults.fence();
        }
        self.chains
            .push_back((Arc::clone(table), self.head + self.wrs.len() as u64));
        self.stalled = false;
    }

    /// Work that a poll could do without waiting for anybody.
    pub(crate) fn runnable(&self) -> bool {
        !self.failed && !self.wrs.is_empty() && !self.stalled
    }

    /// When the peer's silence becomes an error.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        if self.failed || self.wrs.is_empty() {
            None
        } else {
            let silent = self.retry_time.map(|t| self.last_progress + t);
            // A fault's end is waited for too.
            let until = self.faults.as_ref().and_then(|f| f.until);
            silent.into_iter().chain(until).min()
        }
    }

    /// Does what can be done within the budget; `true` if more could be done at once.
    pub(crate) fn progress(&mut self, budget: &mut usize, sweep: bool) -> Result<bool, Fail> {
        self.progressed = false;
        self.polls = self.polls.wrapping_add(1);
        let waiting = self.sent > self.head || self.map_wanted.is_some();
        let mut unread = false;
        if sweep || waiting || self.polls.is_multiple_of(16) {
            unread = self.receive(budget)?;
        }
        let more = self.advance(budget)? | unread;
        if self.wrs.is_empty() {
            return Ok(false);
        }
        if self.progressed {
            self.last_progress = Instant::now();
        } else if !more
            && let Some(limit) = self.retry_time
            && self.last_progress.elapsed() > limit
        {
            return Err(Fail::new(WcStatus::RetryExc, vendor::NO_PROGRESS));
        }
        Ok(more)
    }

    fn advance(&mut self, budget: &mut usize) -> Result<bool, Fail> {
        self.want_write = false;
        loop {
            if !self.flush()? {
                self.want_write = true;
                self.stalled = true;
                return Ok(false);
            }
            let Some(wr) = self.wrs.get((self.sent - self.head) as usize).copied() else {
                self.stalled = true;
                return Ok(false);
            };
            let oldest = self.sent == self.head;
            if self.faults.is_some() && !self.may_start()? {
                self.stalled = true;
                return Ok(false);
            }
            if wr.bad_local {
                if oldest {
                    return Err(Fail::new(WcStatus::LocProt, 0));
                }
                self.stalled = true;
                return Ok(false);
            }
            let Some(link) = &self.link else {
                self.stalled = true;
                return Ok(false);
            };
            if link.local.is_some() && wr.op == Op::Read {
                // A READ sees what earlier WRITEs wrote, so it waits for them.
                if !oldest || !self.read_local(budget)? {
                    self.stalled = true;
                    return Ok(false);
                }
                if *budget == 0 {
                    return Ok(!self.wrs.is_empty());
                }
            } else if link.stream.is_none() {
                if oldest {
                    return Err(Fail::gone());
                }
                self.stalled = true;
                return Ok(false);
            } else {
                if *budget == 0 {
                    return Ok(true);
                }
                self.build_batch()?;
            }
        }
    }

    /// Encodes a batch of the work requests from `sent` on.
    fn build_batch(&mut self) -> Result<(), Fail> {
        let local = self
            .link
            .as_ref()
            .and_then(|l| l.local.as_ref())
            .map(|p| p.path);
        let mut descs = Vec::new();
        let mut pieces = Vec::new();
        let mut bytes = 0u64;
        let mut at = (self.sent - self.head) as usize;
        let mut sge_at = self.sent_sges;
        let mut count = 0u16;
        let mut spans = 0usize;
        while let Some(wr) = self.wrs.get(at) {
            let nsge = wr.nsge as usize;
            let full =
                usize::from(count) >= MAX_OPS || spans + nsge > MAX_PIECES.min(MAX_SPANS - 1);
            let fenced = self.head + at as u64 == self.fence;
            if wr.bad_local || fenced || (count > 0 && (full || bytes >= 1 << 20)) {
                break;
            }
            if local.is_some() && wr.op == Op::Read {
                break;
            }
            let sges = self.sges.range(sge_at..sge_at + nsge);
            let mut own = 0u16;
            if let Some(path) = local {
                for s in sges.filter(|s| s.len > 0) {
                    let mapped = path == SoftPath::Arena && s.segment != 0;
                    if mapped && !self.announced.contains(&s.segment) {
                        let fd = self.ctx.segment_source(s.segment);
                        let fd = fd.ok_or(Fail::new(WcStatus::LocQpOp, vendor::SEGMENT))?;
                        self.outbox.put_fd(fd);
                        let head = Header {
                            m: s.segment,
                            ..Header::new(Kind::Segment)
                        };
                        self.outbox.put(&head.encode());
                        self.announced.insert(s.segment);
                    }
                    let (segment, place) = if mapped {
                        (s.segment, s.offset)
                    } else {
                        (0, s.addr)
                    };
                    pieces.extend_from_slice(
                        &Piece {
                            segment,
                            len: s.len,
                            at: place,
                        }
                        .encode(),
                    );
                    own += 1;
                }
            } else if wr.op != Op::Read {
                let payload = sges.filter(|s| s.len > 0);
                self.tx_spans.extend(payload.map(|s| Span {
                    addr: s.addr,
                    len: s.len.into(),
                }));
                bytes += wr.len;
            }
            let desc = Desc {
                addr: wr.addr,
                len: wr.len,
                rkey: wr.rkey,
                imm: wr.imm,
                op: wr.op,
                pieces: own,
            };
            descs.extend_from_slice(&desc.encode());
            spans += nsge;
            count += 1;
            at += 1;
            sge_at += nsge;
        }
        let head = Header {
            kind: Kind::Batch,
            flag: self.rnr_retry,
            n: count,
            m: u32::try_from(pieces.len() / crate::soft::frame::PIECE).unwrap_or(u32::MAX),
            v: self.sent,
        };
        self.outbox.put(&head.encode());
        self.outbox.put(&descs);
        self.outbox.put(&pieces);
        self.sent += u64::from(count);
        self.sent_sges = sge_at;
        Ok(())
    }

    /// Sends what is encoded; `true` when nothing is left.
    fn flush(&mut self) -> Result<bool, Fail> {
        if self.outbox.is_empty() && self.tx_at == self.tx_spans.len() {
            return Ok(true);
        }
        let Some(ReqLink {
            stream: Some(stream),
            local,
        }) = &self.link
        else {
            return Err(Fail::gone());
        };
        if local.is_some() {
            let before = self.outbox.rest().len();
            let done = self.outbox.flush(stream).map_err(|_| Fail::gone());
            self.progressed |= self.outbox.rest().len() != before;
            return done;
        }
        self.flush_tcp()
    }

    /// Over TCP: ends what the peer has acknowledged and whose payload has left.
    pub(crate) fn retire_flushed(&mut self) {
        let upto = self.acked.min(self.flushed);
        self.retire(upto.saturating_sub(self.head) as usize);
    }

    /// Ends the oldest `n` work requests with success.
    pub(crate) fn retire(&mut self, n: usize) {
        if n == 0 {
            return;
        }
        let mut sges = 0usize;
        for wr in self.wrs.drain(..n) {
            sges += wr.nsge as usize;
            self.silent += 1;
            if wr.signaled {
                let slots = std::mem::take(&mut self.silent);
                let queue = Arc::clone(&self.slots);
                let completion = completion(self.qpn, &wr, Fail::new(WcStatus::Success, 0));
                self.cqes.push(Cqe {
                    completion,
                    slots,
                    queue,
                });
            }
        }
        self.sges.drain(..sges);
        self.head += n as u64;
        self.part = 0;
        self.progressed = true;
        self.stalled = false;
        self.sent_sges = self.sent_sges.saturating_sub(sges);
        self.sent = self.sent.max(self.head);
        self.rx_sges = self.rx_sges.saturating_sub(sges);
        if self.rx_wr < self.head {
            self.rx_wr = self.head;
            self.rx_part = 0;
        }
        while self.chains.front().is_some_and(|c| c.1 <= self.head) {
            self.retired.extend(self.chains.pop_front().map(|c| c.0));
        }
    }

    /// Ends everything: the oldest work request with `first` (if there is one), the rest flushed.
    pub(crate) fn fail(&mut self, first: Option<Fail>) {
        let flush = Fail::new(WcStatus::WrFlush, 0);
        let mut why = first.unwrap_or(flush);
        for wr in self.wrs.drain(..) {
            let slots = std::mem::take(&mut self.silent) + 1;
            let completion = completion(self.qpn, &wr, std::mem::replace(&mut why, flush));
            self.cqes.push(Cqe {
                completion,
                slots,
                queue: Arc::clone(&self.slots),
            });
            self.head += 1;
        }
        self.failed = true;
        self.faults = None;
        // The spans that a send in progress names go with the stream, before their tables.
        self.link = None;
        self.want_write = false;
        self.tx_spans.clear();
        self.tx_at = 0;
        self.outbox = Outbox::default();
        self.data_left = 0;
        self.sges.clear();
        self.maps.clear();
        self.key = None;
        self.sent = self.head;
        self.retired.extend(self.chains.drain(..).map(|c| c.0));
    }

    /// Slots that no completion will give back (a queue pair that is destroyed).
    pub(crate) fn unaccounted(&mut self) -> u32 {
        std::mem::take(&mut self.silent)
    }
}

fn completion(qpn: u32, wr: &WrEntry, why: Fail) -> Completion {
    Completion {
        wr_id: wr.wr_id,
        status: why.status,
        qp_num: qpn,
        vendor_err: why.vendor,
        opcode: wr.op.opcode(),
        byte_len: u32::try_from(wr.len).unwrap_or(u32::MAX),
        imm: None,
    }
}
