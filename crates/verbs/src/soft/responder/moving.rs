//! How a responder half moves bytes: into registered memory and receives, and out for READs over
//! TCP. Every slice runs with the key table locked, which keeps the memory registered.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use super::{Batch, End, RespPeer, Responder};
use crate::region::Access;
use crate::soft::frame::{Header, Kind};
use crate::soft::keys::KeyTable;
use crate::soft::requester_local::{copy, prefetch, spans_of};
use crate::soft::segment::Mapping;
use crate::soft::stream::{MAX_SPANS, Span};
use crate::soft::vendor;
use crate::wr::{Op, WcStatus};

/// Bytes of one READ answer.
const DATA: u64 = 1 << 20;

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

impl Responder {
    /// Sends what waits; `true` when nothing is left.
    pub(super) fn flush(&mut self) -> Result<bool, End> {
        let Some(link) = &self.link else {
            return Err(End::Gone);
        };
        if !self.outbox.flush(&link.stream).map_err(|_| End::Gone)? {
            return Ok(false);
        }
        if self.data_at == self.data.len() {
            return Ok(true);
        }
        let ctx = Arc::clone(&self.ctx);
        while self.data_at < self.data.len() {
            let keys = ctx.keys.slice();
            self.src.clear();
            for (span, rkey, op) in self.data.iter().skip(self.data_at) {
                if self.src.len() >= MAX_SPANS {
                    break;
                }
                if keys.get(*rkey).is_some() {
                    self.src.push(*span);
                    continue;
                }
                // Deregistered meanwhile. The length is promised: zeros, then a NAK.
                self.data_bad = Some(self.data_bad.map_or(*op, |b| b.min(*op)));
                let mut left = span.len;
                while left > 0 && self.src.len() < MAX_SPANS {
                    let n = left.min(ZEROS.len() as u64);
                    self.src.push(Span {
                        addr: Span::of(&ZEROS).addr,
                        len: n,
                    });
                    left -= n;
                }
                if left > 0 {
                    break;
                }
            }
            let Some(link) = &self.link else {
                return Err(End::Gone);
            };
            // SAFETY: each span is inside a region whose key is live, checked just now with the
            // key table locked, and the lock keeps it registered and so mapped during the call;
            // or it is the zeros.
            let sent = unsafe { link.stream.sendv(&self.src) };
            drop(keys);
            let mut left = match sent {
                Ok(n) => n as u64,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(_) => return Err(End::Gone),
            };
            while left > 0
                && let Some((span, _, _)) = self.data.get_mut(self.data_at)
            {
                let n = span.len.min(left);
                span.addr += n;
                span.len -= n;
                left -= n;
                if span.len == 0 {
                    self.data_at += 1;
                }
            }
        }
        self.data.clear();
        self.data_at = 0;
        if let Some(bad) = self.data_bad.take() {
            self.done += bad.saturating_sub(self.batch.at) as u64;
            return Err(End::Nak(WcStatus::RemAccess, vendor::STALE));
        }
        let n = std::mem::take(&mut self.data_bytes);
        self.advance(n);
        Ok(true)
    }

    /// Lists where the next bytes of the batch go (`dst`), up to `max` of them; answers how many.
    pub(super) fn gather(&mut self, keys: &KeyTable, max: u64) -> Result<u64, End> {
        self.dst.clear();
        let mut left = max;
        let mut part = self.batch.part;
        for (i, op) in self.batch.ops.iter().enumerate().skip(self.batch.at) {
            let first = i == self.batch.at;
            if left == 0 || self.dst.len() + 300 > MAX_SPANS {
                break;
            }
            // A later operation with a receive or an answer of its own gets its own slice.
            if !first && (op.op != Op::Write || op.len == 0) {
                break;
            }
            let n = (op.len - part).min(left);
            if matches!(op.op, Op::Write | Op::WriteImm) {
                let want = Access::REMOTE_WRITE;
                let checked = if self.access.contains(want) {
                    keys.check(op.rkey, self.pd, want, op.addr, op.len)
                } else {
                    Err(vendor::RIGHTS)
                };
                match checked {
                    Ok(()) => self.dst.push(Span {
                        addr: op.addr + part,
                        len: n,
                    }),
                    Err(v) if first => return Err(End::Nak(WcStatus::RemAccess, v)),
                    Err(_) => break,
                }
            } else if let Some(recv) = &self.recv {
                spans_of(recv.sges.iter(), part, n, &mut self.dst);
            } else {
                return Err(End::Gone);
            }
            left -= n;
            part = 0;
        }
        Ok(max - left)
    }

    /// Receives payload into `dst`; 0 if none is there.
    pub(super) fn receive_payload(&mut self, total: u64) -> Result<u64, End> {
        let Some(link) = &self.link else {
            return Err(End::Gone);
        };
        let buffered = self.inbox.bytes().len() as u64;
        if buffered > 0 {
            let mut src = Span::of(self.inbox.bytes()).addr;
            let mut left = buffered.min(total);
            let n = left;
            for span in &self.dst {
                let take = span.len.min(left);
                // SAFETY: src walks through the inbox's bytes, `left` bounds it; the span is
                // inside a region whose key was checked with the key table locked, and still is,
                // or inside a receive, whose table keeps it mapped.
                unsafe { copy(span.addr, src, take) };
                src += take;
                left -= take;
            }
            self.inbox.consume(n as usize);
            return Ok(n);
        }
        // What follows the payload comes with the same call, but no more than headers need.
        let room = self.inbox.room();
        let tail = room.len().min(4096);
        self.dst
            .push(Span::of_mut(room.get_mut(..tail).unwrap_or_default()));
        let got = loop {
            // SAFETY: the spans are inside regions whose keys were checked with the key table
            // locked, and still is, or inside a receive, whose table keeps it mapped; the last one
            // is the inbox's free room, which nobody looks at during the call.
            match unsafe { link.stream.recvv(&self.dst) } {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                got => break got,
            }
        };
        match got {
            Ok(0) => Err(End::Gone),
            Ok(n) => {
                let data = (n as u64).min(total);
                self.inbox.filled(n - data as usize);
                Ok(data)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(_) => Err(End::Gone),
        }
    }

    /// Lists the READ bytes of the next answer and puts its header.
    pub(super) fn start_data(&mut self, keys: &KeyTable) -> Result<(), End> {
        let mut left = DATA;
        let mut part = self.batch.part;
        for (i, op) in self.batch.ops.iter().enumerate().skip(self.batch.at) {
            let first = i == self.batch.at;
            if left == 0 || op.op != Op::Read || (!first && op.len == 0) {
                break;
            }
            let want = Access::REMOTE_READ;
            let checked = if op.len > self.ctx.config.max_msg_sz {
                Err(vendor::BOUNDS)
            } else if self.access.contains(want) {
                keys.check(op.rkey, self.pd, want, op.addr, op.len)
            } else {
                Err(vendor::RIGHTS)
            };
            match checked {
                Ok(()) => {}
                Err(v) if first => return Err(End::Nak(WcStatus::RemAccess, v)),
                Err(_) => break,
            }
            let n = (op.len - part).min(left);
            self.data.push((
                Span {
                    addr: op.addr + part,
                    len: n,
                },
                op.rkey,
                i,
            ));
            left -= n;
            part = 0;
        }
        self.data_bytes = DATA - left;
        let m = u32::try_from(self.data_bytes).unwrap_or(u32::MAX);
        self.outbox.put(
            &Header {
                m,
                ..Header::new(Kind::Data)
            }
            .encode(),
        );
        Ok(())
    }
}

/// Copies into `dst` from the batch's pieces, at most as much as one way of copying serves: from
/// mappings, or by `process_vm_readv`. Answers how many bytes. The caller holds the key table.
pub(super) fn copy_pieces(
    peer: &RespPeer,
    sources: &HashMap<u32, Arc<Mapping>>,
    batch: &Batch,
    dst: &[Span],
    src: &mut Vec<Span>,
) -> Result<u64, End> {
    let bad = End::Nak(WcStatus::RemOp, vendor::SEGMENT);
    let pieces = batch.pieces.get(batch.piece_at..).unwrap_or_default();
    let mut left: u64 = dst.iter().map(|d| d.len).sum();
    let mut skip = batch.part;
    let mut mapped = None;
    src.clear();
    for p in pieces {
        let len = u64::from(p.len);
        if skip >= len {
            skip -= len;
            continue;
        }
        let here = p.segment != 0;
        if left == 0 || src.len() >= MAX_SPANS || mapped.is_some_and(|m| m != here) {
            break;
        }
        mapped = Some(here);
        let n = (len - skip).min(left);
        let at = p.at.checked_add(skip).ok_or(End::Gone)?;
        let addr = if here {
            let map = sources.get(&p.segment);
            match map.and_then(|m| m.at(at, n)) {
                Some(addr) => addr,
                None if src.is_empty() => return Err(bad),
                None => break,
            }
        } else {
            at
        };
        src.push(Span { addr, len: n });
        left -= n;
        skip = 0;
    }
    if mapped == Some(true) {
        return Ok(copy_spans(dst, src));
    }
    // The kernel moves as many bytes as the shorter list has.
    // SAFETY: dst is inside regions whose keys were checked with the key table locked, and still
    // is, or inside a receive, whose table keeps it mapped; nobody holds references to it.
    match unsafe { peer.process.read(dst, src) } {
        Ok(n) if n > 0 => Ok(n as u64),
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Err(End::Gone),
        other => {
            let errno = other
                .err()
                .and_then(|e| e.raw_os_error())
                .unwrap_or(libc::EFAULT);
            Err(End::Nak(
                WcStatus::RemOp,
                vendor::ERRNO + errno.unsigned_abs(),
            ))
        }
    }
}

fn copy_spans(dst: &[Span], src: &[Span]) -> u64 {
    let mut total = 0;
    let mut dst = dst.iter().copied().peekable();
    let Some(mut to) = dst.next() else { return 0 };
    let mut src = src.iter().copied().peekable();
    while let Some(mut from) = src.next() {
        if let Some(next) = src.peek() {
            prefetch(next.addr);
        }
        while from.len > 0 {
            if to.len == 0 {
                match dst.next() {
                    Some(next) => to = next,
                    None => return total,
                }
                continue;
            }
            let n = from.len.min(to.len);
            // SAFETY: `from` is inside a peer's mapping, `to` inside a region whose key was
            // checked with the key table locked, and still is, or inside a receive, whose table
            // keeps it mapped. The mapping is this context's own, so they are disjoint.
            unsafe { copy(to.addr, from.addr, n) };
            from = Span {
                addr: from.addr + n,
                len: from.len - n,
            };
            to = Span {
                addr: to.addr + n,
                len: to.len - n,
            };
            total += n;
        }
    }
    total
}
