//! What a requester takes in from its peer: acknowledgements, segments, and over TCP the headers of READ
//! bytes. A peer may send anything: each frame is checked against what was asked.

use std::io;

use crate::soft::frame::{HEADER, Header, Kind};
use crate::soft::requester::{Fail, ReqLink, Requester};
use crate::soft::stream::not_now;
use crate::wr::WcStatus;

/// Frames that one call takes from a peer. An honest one sends far fewer: acknowledgements gather.
const MAX_FRAMES: u32 = 1024;

impl Requester {
    /// Takes in what the peer has sent; `true` if it may have sent more than one call takes.
    pub(crate) fn receive(&mut self, budget: &mut usize) -> Result<bool, Fail> {
        // A peer that sends nothing but frames must not keep the caller here.
        let mut frames = MAX_FRAMES;
        loop {
            if !self.parse(budget, &mut frames)? {
                if self.wrs.is_empty() {
                    // There is nothing that so many could be about.
                    self.cut_off();
                    return Ok(false);
                }
                return Ok(true);
            }
            let Some(ReqLink {
                stream: Some(stream),
                ..
            }) = &self.link
            else {
                return Ok(false);
            };
            let got = if self.data_left > 0 {
                if *budget == 0 {
                    return Ok(true);
                }
                self.receive_data(budget)
            } else {
                self.inbox.fill(stream)
            };
            match got {
                Ok(0) => return self.stream_ended().map(|()| false),
                Ok(_) => self.stalled = false,
                Err(e) if not_now(&e) => return Ok(false),
                // READ bytes that nobody asked for, or descriptors.
                Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                    if self.wrs.is_empty() {
                        self.cut_off();
                        return Ok(false);
                    }
                    return Err(Fail::protocol());
                }
                Err(_) => return self.stream_ended().map(|()| false),
            }
        }
    }

    /// Ends the link while there is nobody to tell: the next work request fails.
    fn cut_off(&mut self) {
        tracing::debug!(qpn = self.qpn, "the peer's stream is over");
        self.inbox.consume(usize::MAX);
        self.inbox.fds.clear();
        self.data_left = 0;
        self.link = Some(ReqLink {
            stream: None,
            local: None,
        });
    }

    /// The peer closed the stream or its process is gone.
    fn stream_ended(&mut self) -> Result<(), Fail> {
        if let Some(link) = &mut self.link {
            link.stream = None;
            if let Some(peer) = &mut link.local {
                peer.process.dismiss();
            }
        }
        self.stalled = false;
        if self.sent > self.head || self.map_wanted.is_some() {
            Err(Fail::gone())
        } else {
            Ok(())
        }
    }

    /// Takes whole frames, at most `frames`, out of the inbox; `false` if there may be another.
    fn parse(&mut self, budget: &mut usize, frames: &mut u32) -> Result<bool, Fail> {
        loop {
            if self.data_left > 0 {
                if self.inbox.bytes().is_empty() {
                    return Ok(true);
                }
                self.take_buffered_data(budget)?;
                continue;
            }
            if self.inbox.bytes().len() < HEADER {
                return Ok(true);
            }
            if *frames == 0 {
                return Ok(false);
            }
            *frames -= 1;
            let head = Header::decode(self.inbox.bytes()).ok_or(Fail::protocol())?;
            self.inbox.consume(HEADER);
            match head.kind {
                Kind::Ack => self.ack(head.v)?,
                Kind::Nak => {
                    self.ack(head.v)?;
                    // What waited for its payload to leave ends now: nothing leaves any more.
                    self.retire(self.acked.saturating_sub(self.head) as usize);
                    let status = WcStatus::from_raw(head.flag.into());
                    // Neither a success nor a fault of this side is the peer's to tell.
                    let told = matches!(
                        status,
                        WcStatus::RemInvReq
                            | WcStatus::RemAccess
                            | WcStatus::RemOp
                            | WcStatus::RnrRetryExc
                    );
                    if self.head >= self.sent || !told {
                        return Err(Fail::protocol());
                    }
                    return Err(Fail::new(status, head.m));
                }
                Kind::Data if self.link.as_ref().is_some_and(|l| l.local.is_none()) => {
                    self.data_left = head.m.into();
                }
                Kind::Mapped => self.mapped(head)?,
                Kind::Bye if self.wrs.is_empty() => {
                    self.cut_off();
                    return Ok(true);
                }
                Kind::Bye => return Err(Fail::gone()),
                _ => return Err(Fail::protocol()),
            }
        }
    }

    /// Everything before number `v` is done.
    fn ack(&mut self, v: u64) -> Result<(), Fail> {
        if v < self.head || v > self.sent {
            return Err(Fail::protocol());
        }
        if self.link.as_ref().is_some_and(|l| l.local.is_none()) {
            self.settle_rx();
            if self.rx_wr < v {
                return Err(Fail::protocol());
            }
            self.acked = self.acked.max(v);
            self.retire_flushed();
        } else {
            self.retire((v - self.head) as usize);
        }
        // Also when nothing is new: the peer lives.
        self.progressed = true;
        Ok(())
    }
}
