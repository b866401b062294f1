//! What a sender has pushed is compared with the sums that it has told.

use std::sync::Arc;

use tracing::error;

use super::compare::compare;
use super::summing::{List, Summing, within};
use super::thread::{Job, NOT_SUMMED, Turn, stops};
use crate::blocks::GroupBlocks;
use crate::engine::{Inner, PeerSession};
use crate::ids::{Nonce, RequestId};
use crate::plan::{Part, SideName};
use crate::transfer::Cause;
use crate::wire::{Blob, ErrorCode, SumsOf, unpack_sums};

/// A sender writes each block once; nothing orders two writes, but somebody may try.
const TIMES: u64 = 2;

const LIE: Cause = Cause::CutOff {
    reason: ErrorCode::Lie,
};

pub(crate) struct Checking {
    engine: Arc<Inner>,
    peer: Arc<PeerSession>,
    request: RequestId,
    nonce: Nonce,
    /// The blocks that are expected.
    groups: Vec<GroupBlocks>,
    told: Vec<(SumsOf, Blob)>,
    /// What of the session's room it takes.
    weight: u64,
    there: Vec<u64>,
    summing: Option<Summing>,
}

impl Checking {
    pub(crate) fn new(
        engine: Arc<Inner>,
        peer: Arc<PeerSession>,
        (request, nonce): (RequestId, Nonce),
        groups: Vec<GroupBlocks>,
        (told, weight): (Vec<(SumsOf, Blob)>, u64),
    ) -> Self {
        Self {
            engine,
            peer,
            request,
            nonce,
            groups,
            told,
            weight,
            there: Vec::new(),
            summing: None,
        }
    }

    fn begin(&mut self) -> Result<Summing, Cause> {
        let plans = self.peer.pull.as_ref();
        let part = plans.map_or(Part::Common, |plans| plans.alone_part());
        let summed = self.peer.summed(&self.engine, SideName::Consumer, part);
        let summed = summed.map_err(|_| NOT_SUMMED)?;
        let mut lists = Vec::with_capacity(self.told.len());
        for (of, sums) in std::mem::take(&mut self.told) {
            let list = List::from(of);
            let sums = unpack_sums(&sums);
            if list.count(&summed) != sums.len() as u64 {
                return Err(LIE);
            }
            self.there.extend(sums);
            lists.push(list);
        }
        match within(&lists, &summed, &self.groups, TIMES) {
            true => Ok(Summing::new(Arc::clone(&self.engine), summed, lists)),
            false => Err(LIE),
        }
    }

    fn go_on(&mut self) -> Result<Turn, Cause> {
        let mut summing = match self.summing.take() {
            Some(summing) => summing,
            None => self.begin()?,
        };
        let more = summing.turn().map_err(|error| {
            error!(%error, "checksums of what was pushed");
            NOT_SUMMED
        })?;
        if more.is_some() {
            self.summing = Some(summing);
            return Ok(Turn::More);
        }
        let sides = (summing.sums.as_slice(), self.there.as_slice());
        let lists = (summing.lists.as_slice(), &*summing.summed);
        match compare(&self.engine, &self.request, lists, sides) {
            None => {
                self.end(Ok(()));
                Ok(Turn::Over)
            }
            Some(unverified) => Err(unverified.cause),
        }
    }

    fn end(&self, verdict: Result<(), Cause>) {
        let cut_off = matches!(verdict, Err(Cause::CutOff { .. }));
        let of = (&self.request, self.nonce);
        (self.engine).push_checked(&self.peer, of, self.weight, verdict);
        if cut_off {
            let lie = "checksums that are not those of what was to be pushed";
            self.peer.link.cut_off(lie.to_owned());
        }
    }
}

impl Job for Checking {
    fn turn(&mut self) -> Turn {
        // It may have ended for another reason: its blocks are the owner's then.
        let wanted = self.engine.books.with(&self.engine, |books, _| {
            (books.expects).may_tell(&self.request, self.nonce, self.peer.key)
        });
        if stops(&self.engine) || !wanted {
            self.end(Err(Cause::Cancelled));
            return Turn::Over;
        }
        self.go_on().unwrap_or_else(|cause| {
            self.end(Err(cause));
            Turn::Over
        })
    }

    fn abandon(&mut self, cause: Cause) {
        self.end(Err(cause));
    }
}
