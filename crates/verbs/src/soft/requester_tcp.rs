//! The requester over TCP: payloads leave registered memory, and READs arrive in it, with no copy
//! between.

use std::io;

use crate::soft::requester::{Fail, ReqLink, Requester};
use crate::soft::requester_local::{copy, spans_of};
use crate::soft::stream::{MAX_SPANS, Span};
use crate::wr::Op;

impl Requester {
    /// Sends the encoded batch and the payload after it; `true` when nothing is left.
    pub(crate) fn flush_tcp(&mut self) -> Result<bool, Fail> {
        let Some(ReqLink {
            stream: Some(stream),
            ..
        }) = &self.link
        else {
            return Err(Fail::gone());
        };
        loop {
            let spans = &mut self.scratch;
            spans.clear();
            if !self.outbox.is_empty() {
                spans.push(Span::of(self.outbox.rest()));
            }
            let payload = self.tx_spans.get(self.tx_at..).unwrap_or_default();
            spans.extend(payload.iter().take(MAX_SPANS - 1));
            if spans.is_empty() {
                self.tx_spans.clear();
                self.tx_at = 0;
                self.flushed = self.sent;
                self.retire_flushed();
                return Ok(true);
            }
            // SAFETY: the first span is the outbox, the others are inside registered regions,
            // checked when posted; their chains' tables keep them mapped until the work requests
            // end, which they do not before their payload is sent or the stream is gone.
            let sent = match unsafe { stream.sendv(spans) } {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(_) => return Err(Fail::gone()),
            };
            self.progressed = true;
            let head = sent.min(self.outbox.rest().len());
            self.outbox.advance(head);
            let mut left = (sent - head) as u64;
            while left > 0
                && let Some(span) = self.tx_spans.get_mut(self.tx_at)
            {
                let n = span.len.min(left);
                span.addr += n;
                span.len -= n;
                left -= n;
                if span.len == 0 {
                    self.tx_at += 1;
                }
            }
        }
    }

    /// Moves the place for READ bytes past whatever takes none.
    pub(crate) fn settle_rx(&mut self) {
        while self.rx_wr < self.sent
            && let Some(wr) = self.wrs.get((self.rx_wr - self.head) as usize)
            && (wr.op != Op::Read || self.rx_part == wr.len)
        {
            self.rx_sges += wr.nsge as usize;
            self.rx_wr += 1;
            self.rx_part = 0;
        }
    }

    /// Lists where the next `want` bytes of READs go, as many as a call takes; answers how many.
    fn read_spans(&mut self, want: u64) -> Result<u64, Fail> {
        self.settle_rx();
        self.scratch.clear();
        let mut left = want;
        let mut part = self.rx_part;
        let mut sges = self.rx_sges;
        let asked = self.wrs.range((self.rx_wr - self.head) as usize..);
        for (number, wr) in (self.rx_wr..).zip(asked) {
            let nsge = wr.nsge as usize;
            if left == 0 || number >= self.sent || self.scratch.len() + nsge >= MAX_SPANS {
                break;
            }
            if wr.op == Op::Read {
                let n = (wr.len - part).min(left);
                spans_of(
                    self.sges.range(sges..sges + nsge),
                    part,
                    n,
                    &mut self.scratch,
                );
                left -= n;
            }
            part = 0;
            sges += nsge;
        }
        // Data that nobody asked for.
        if left == want {
            Err(Fail::protocol())
        } else {
            Ok(want - left)
        }
    }

    fn rx_advance(&mut self, n: u64) {
        let mut left = n;
        loop {
            self.settle_rx();
            if left == 0 {
                return;
            }
            let Some(wr) = self.wrs.get((self.rx_wr - self.head) as usize) else {
                return;
            };
            let step = (wr.len - self.rx_part).min(left);
            self.rx_part += step;
            left -= step;
        }
    }

    /// Data that came together with headers.
    pub(crate) fn take_buffered_data(&mut self, budget: &mut usize) -> Result<(), Fail> {
        let have = self.inbox.bytes().len() as u64;
        let n = self.read_spans(self.data_left.min(have))?;
        let mut src = Span::of(self.inbox.bytes()).addr;
        for span in &self.scratch {
            // SAFETY: src walks through the inbox's bytes, at least as many as the spans have
            // together; the spans are inside registered regions with LOCAL_WRITE, checked when
            // posted and kept mapped by their chains' tables.
            unsafe { copy(span.addr, src, span.len) };
            src += span.len;
        }
        self.inbox.consume(n as usize);
        self.data_left -= n;
        self.rx_advance(n);
        *budget = budget.saturating_sub(n as usize);
        self.progressed = true;
        Ok(())
    }

    /// One receive straight into the READs' memory, and what follows into the inbox.
    pub(crate) fn receive_data(&mut self, budget: &mut usize) -> io::Result<usize> {
        let want = self.data_left.min(*budget as u64);
        let Ok(n) = self.read_spans(want) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        if n == self.data_left {
            self.scratch.push(Span::of_mut(self.inbox.room()));
        }
        let Some(ReqLink {
            stream: Some(stream),
            ..
        }) = &self.link
        else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        // SAFETY: the spans are inside registered regions with LOCAL_WRITE, checked when posted
        // and kept mapped by their chains' tables; the last one is the inbox's free room, which
        // nobody looks at during the call.
        let got = unsafe { stream.recvv(&self.scratch) }?;
        let data = (got as u64).min(n);
        self.inbox.filled(got - data as usize);
        self.data_left -= data;
        self.rx_advance(data);
        *budget = budget.saturating_sub(data as usize);
        self.progressed = true;
        Ok(got)
    }
}
