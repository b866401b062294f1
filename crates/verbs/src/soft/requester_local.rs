//! READs on the same host: the initiator copies, from a mapping or with `process_vm_readv`.

use std::os::fd::AsFd;
use std::sync::Arc;

use crate::error::Error;
use crate::qp::SoftPath;
use crate::region::Access;
use crate::soft::frame::{Header, Kind};
use crate::soft::requester::{CachedKey, Fail, LocalSge, Requester};
use crate::soft::segment::Mapping;
use crate::soft::stream::Span;
use crate::soft::vendor;
use crate::wr::{Op, WcStatus};

/// Copies bytes that others may write meanwhile. The result may then be torn; whoever cares looks
/// at a lease afterwards. No reference to the bytes is made, so no rule of the language is broken
/// beyond the race itself, which plain copies of bytes by raw pointer confine to their values.
///
/// # Safety
///
/// `src..src + len` is mapped and readable, `dst..dst + len` is mapped, writable and borrowed by
/// nobody, and they do not overlap.
#[inline]
pub(crate) unsafe fn copy(dst: u64, src: u64, len: u64) {
    // SAFETY: the caller keeps the same promises, which are those of copy_nonoverlapping for bytes.
    unsafe { std::ptr::copy_nonoverlapping(src as *const u8, dst as *mut u8, len as usize) }
}

/// Asks the CPU for the first lines of what is copied next: its own prefetchers begin anew with each
/// scattered block, and the first misses of a 4 KiB block cost a tenth of its copy. Not for where it
/// goes: a long copy stores whole lines without reading them, and lines that were fetched cost more.
#[inline]
pub(crate) fn prefetch(addr: u64) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..PREFETCH_LINES {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch is a hint; it faults at no address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(addr.wrapping_add(64 * line) as *const i8) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = addr;
}

#[cfg(target_arch = "x86_64")]
const PREFETCH_LINES: u64 = 4;

/// Segments of one peer.
const MAX_SEGMENTS: usize = 4096;

/// Where a peer's segment is.
#[derive(Debug)]
pub(crate) enum Place {
    Mapped(Arc<Mapping>),
    /// Passed, but not to be mapped here: `process_vm_readv` reads it.
    Unmapped,
    /// The peer does not pass it.
    Refused,
}

fn access_fault(vendor: u32) -> Fail {
    Fail::new(WcStatus::RemAccess, vendor)
}

impl Requester {
    /// Carries out READs from the oldest work request on; `false` if the peer must pass a segment
    /// first.
    pub(crate) fn read_local(&mut self, budget: &mut usize) -> Result<bool, Fail> {
        let mut done = 0;
        let mut sges = 0;
        let result = self.read_run(budget, &mut done, &mut sges);
        // What was copied before a failure is done: the failing one is the oldest then.
        if done > 0 {
            let part = std::mem::take(&mut self.part);
            self.retire(done);
            self.part = part;
        }
        result
    }

    fn read_run(
        &mut self,
        budget: &mut usize,
        done: &mut usize,
        sge_at: &mut usize,
    ) -> Result<bool, Fail> {
        while *budget > 0
            && let Some(wr) = self.wrs.get(*done)
            && wr.op == Op::Read
            && !wr.bad_local
            && self.head + *done as u64 != self.fence
        {
            let nsge = wr.nsge as usize;
            if wr.len == 0 {
                *done += 1;
                *sge_at += nsge;
                continue;
            }
            let (addr, len, rkey) = (wr.addr, wr.len, wr.rkey);
            if self.key.as_ref().is_none_or(|k| k.info.rkey != rkey) && !self.look_up(rkey)? {
                return Ok(false);
            }
            let Some(key) = &self.key else {
                return Ok(false);
            };
            key.info.bounds(addr, len).map_err(access_fault)?;
            let (base, start) = (key.base, key.info.addr);
            if base == 0 {
                self.read_process(budget, done, sge_at, rkey)?;
                continue;
            }
            let Some(peer) = self.link.as_ref().and_then(|l| l.local.as_ref()) else {
                return Ok(false);
            };
            if !peer.keys.live(rkey) {
                self.key = None;
                return Err(access_fault(vendor::BAD_KEY));
            }
            let from = self.part;
            let n = (len - from).min(*budget as u64);
            let mut src = base + (addr - start) + from;
            if let Some(next) = self.wrs.get(*done + 1) {
                // Of another key or out of bounds, it is a hint that does not help.
                prefetch(base.wrapping_add(next.addr.wrapping_sub(start)));
            }
            let mut skip = from;
            let mut left = n;
            for sge in self.sges.range(*sge_at..*sge_at + nsge) {
                let sge_len = u64::from(sge.len);
                if skip >= sge_len {
                    skip -= sge_len;
                    continue;
                }
                let take = (sge_len - skip).min(left);
                // SAFETY: src is inside the peer's mapping, which `look_up` checked to cover the
                // whole region and `bounds` the span in it, and which `maps` keeps; dst is inside
                // a registered region with LOCAL_WRITE, checked when posted and kept mapped by
                // the chain's table. The mapping is this context's own, so they are disjoint.
                unsafe { copy(sge.addr + skip, src, take) };
                src += take;
                left -= take;
                skip = 0;
                if left == 0 {
                    break;
                }
            }
            // Deregistered meanwhile: the bytes may be another's.
            if !peer.keys.live(rkey) {
                self.key = None;
                return Err(access_fault(vendor::STALE));
            }
            *budget = budget.saturating_sub((n as usize).max(64));
            if from + n == len {
                self.part = 0;
                *done += 1;
                *sge_at += nsge;
            } else {
                self.part = from + n;
                self.progressed = true;
            }
        }
        Ok(true)
    }

    /// Finds a remote key and where its bytes are, for `key`. `false`: asked the peer for the
    /// segment.
    fn look_up(&mut self, rkey: u32) -> Result<bool, Fail> {
        let Some(peer) = self.link.as_ref().and_then(|l| l.local.as_ref()) else {
            return Err(Fail::gone());
        };
        let info = peer.keys.get(rkey).ok_or(access_fault(vendor::BAD_KEY))?;
        if !peer.access.contains(Access::REMOTE_READ) {
            return Err(access_fault(vendor::RIGHTS));
        }
        info.check(peer.pd, Access::REMOTE_READ, info.addr, 0)
            .map_err(access_fault)?;
        let segment = info.segment.id;
        let base = if peer.path == SoftPath::ProcessVm || segment == 0 {
            0
        } else {
            match self.maps.get(&segment) {
                Some(Place::Mapped(map)) => map
                    .at(info.segment.offset, info.len)
                    .ok_or(Fail::new(WcStatus::RemOp, vendor::SEGMENT))?,
                Some(Place::Unmapped) => 0,
                Some(Place::Refused) => return Err(Fail::new(WcStatus::RemOp, vendor::SEGMENT)),
                None => return self.ask_for(segment).map(|()| false),
            }
        };
        self.key = Some(CachedKey { info, base });
        Ok(true)
    }

    fn ask_for(&mut self, segment: u32) -> Result<(), Fail> {
        if self.link.as_ref().is_none_or(|l| l.stream.is_none()) {
            return Err(Fail::gone());
        }
        if self.map_wanted.is_none() {
            self.map_wanted = Some(segment);
            self.outbox.put(
                &Header {
                    m: segment,
                    ..Header::new(Kind::Map)
                }
                .encode(),
            );
            if let Some(stream) = self.link.as_ref().and_then(|l| l.stream.as_ref()) {
                self.want_write = !self.outbox.flush(stream).map_err(|_| Fail::gone())?;
            }
        }
        Ok(())
    }

    /// The peer passed a segment, asked or not.
    pub(crate) fn mapped(&mut self, head: Header) -> Result<(), Fail> {
        let local = self.link.as_ref().is_some_and(|l| l.local.is_some());
        let known = self.maps.contains_key(&head.m);
        if !local || (!known && self.maps.len() >= MAX_SEGMENTS) {
            return Err(Fail::protocol());
        }
        if head.n == 1 {
            let fd = self.inbox.fds.pop_front().ok_or(Fail::protocol())?;
            // A segment that is mapped stays: READs point into it.
            if !matches!(self.maps.get(&head.m), Some(Place::Mapped(_))) {
                let map = match self.ctx.maps.map(fd.as_fd()) {
                    Ok(map) => Place::Mapped(map),
                    // No huge page is free for it, or no address: not the peer's fault.
                    Err(e @ Error::Os { .. }) => {
                        tracing::info!(error = %e, "cannot map a peer's memory; copying by process_vm");
                        Place::Unmapped
                    }
                    Err(e) => {
                        tracing::warn!(error = %e, "refused a peer's memory");
                        return Err(Fail::new(WcStatus::RemOp, vendor::SEGMENT));
                    }
                };
                self.maps.insert(head.m, map);
            }
        } else if !known {
            self.maps.insert(head.m, Place::Refused);
        }
        if self.map_wanted == Some(head.m) {
            self.map_wanted = None;
        }
        self.stalled = false;
        self.progressed = true;
        Ok(())
    }

    /// READs with one key from memory that has no file: one call for as many as fit.
    fn read_process(
        &mut self,
        budget: &mut usize,
        done: &mut usize,
        sge_at: &mut usize,
        rkey: u32,
    ) -> Result<(), Fail> {
        const SPANS: usize = 512;
        let Some(key) = &self.key else {
            return Err(Fail::protocol());
        };
        let Some(peer) = self.link.as_ref().and_then(|l| l.local.as_ref()) else {
            return Err(Fail::gone());
        };
        if !peer.keys.live(rkey) {
            self.key = None;
            return Err(access_fault(vendor::BAD_KEY));
        }
        let (local, remote) = (&mut self.scratch, &mut self.scratch2);
        local.clear();
        remote.clear();
        let mut left = *budget as u64;
        let mut part = self.part;
        let mut sge_next = *sge_at;
        for (number, wr) in (self.head + *done as u64..).zip(self.wrs.range(*done..)) {
            let nsge = wr.nsge as usize;
            let fits = remote.is_empty() || local.len() + nsge <= SPANS;
            let same = wr.op == Op::Read && !wr.bad_local && wr.rkey == rkey;
            let fenced = number == self.fence;
            if left == 0 || !fits || !same || fenced || key.info.bounds(wr.addr, wr.len).is_err() {
                break;
            }
            let n = (wr.len - part).min(left);
            if n > 0 {
                remote.push(Span {
                    addr: wr.addr + part,
                    len: n,
                });
                spans_of(self.sges.range(sge_next..sge_next + nsge), part, n, local);
            }
            sge_next += nsge;
            left -= n;
            part = 0;
        }
        // SAFETY: the local spans are inside registered regions with LOCAL_WRITE, checked when
        // posted and kept mapped by their chains' tables; nobody holds references to them.
        let got = unsafe { peer.process.read(local, remote) };
        let mut got = match got {
            Ok(n) if n > 0 => n as u64,
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Err(Fail::gone()),
            other => {
                let errno = other
                    .err()
                    .and_then(|e| e.raw_os_error())
                    .unwrap_or(libc::EFAULT);
                return Err(access_fault(vendor::ERRNO + errno.unsigned_abs()));
            }
        };
        if !peer.keys.live(rkey) {
            self.key = None;
            return Err(access_fault(vendor::STALE));
        }
        *budget = budget.saturating_sub(got as usize);
        self.progressed = true;
        // A short count ends inside the work request that cannot be read: the next call says why.
        for wr in self.wrs.range(*done..) {
            let rest = wr.len - self.part;
            if got == 0 || got < rest {
                break;
            }
            got -= rest;
            self.part = 0;
            *done += 1;
            *sge_at += wr.nsge as usize;
        }
        self.part += got;
        Ok(())
    }
}

/// Appends the spans of bytes `from..from + n` of a list.
pub(crate) fn spans_of<'a>(
    sges: impl Iterator<Item = &'a LocalSge>,
    from: u64,
    n: u64,
    out: &mut Vec<Span>,
) {
    let (mut skip, mut left) = (from, n);
    for s in sges {
        let len = u64::from(s.len);
        if skip >= len {
            skip -= len;
            continue;
        }
        if left == 0 {
            return;
        }
        let take = (len - skip).min(left);
        out.push(Span {
            addr: s.addr + skip,
            len: take,
        });
        left -= take;
        skip = 0;
    }
}
