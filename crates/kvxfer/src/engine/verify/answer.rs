//! A peer's question for sums of what is on offer.

use std::sync::Arc;

use tracing::error;

use super::summing::{CHUNK, List, Summing, count, within};
use super::thread::{Job, MOST_SUMS, NOT_SUMMED, Turn, refuse, stops};
use crate::blocks::GroupBlocks;
use crate::engine::{Inner, PeerSession};
use crate::plan::{Part, SideName};
use crate::transfer::{Cause, Refusal};
use crate::wire::{Sums, SumsWanted, pack_sums};

/// How often a reader may have read each block, and ask for its sum.
const TIMES: u64 = 16;
/// What a question counts beside its units.
const QUESTION: u64 = 256;

/// A question that is being answered.
pub(super) struct Answering {
    engine: Arc<Inner>,
    peer: Arc<PeerSession>,
    wanted: SumsWanted,
    /// What of the peer's room it takes.
    weight: u64,
    summing: Option<Summing>,
    first: u64,
}

impl Answering {
    /// `None`: the peer has too many open questions.
    pub(super) fn new(
        engine: &Arc<Inner>,
        peer: &Arc<PeerSession>,
        wanted: SumsWanted,
    ) -> Option<Self> {
        let units: u64 = wanted.of.iter().map(|list| list.units.len() as u64).sum();
        let weight = units + QUESTION;
        peer.reserve_sums(weight).then(|| Self {
            engine: Arc::clone(engine),
            peer: Arc::clone(peer),
            wanted,
            weight,
            summing: None,
            first: 0,
        })
    }

    /// What is asked about, if it is still on offer.
    fn offered<R>(&self, look: impl FnOnce(&[GroupBlocks]) -> R) -> Result<R, Cause> {
        let offered = self.engine.books.with(&self.engine, |books, now| {
            books.leases.on_time(now);
            let held = (books.leases).holds(&self.wanted.request, self.wanted.nonce);
            held.map(look)
        });
        offered.ok_or(Cause::LeaseExpired)
    }

    fn begin(&mut self) -> Result<Summing, Cause> {
        let groups = self.offered(<[GroupBlocks]>::to_vec)?;
        let part = match self.wanted.share {
            true => Part::Share,
            false => Part::Common,
        };
        let summed = self.peer.summed(&self.engine, SideName::Producer, part);
        let summed = summed.map_err(|_| NOT_SUMMED)?;
        let lists = std::mem::take(&mut self.wanted.of);
        let lists: Vec<List> = lists.into_iter().map(List::from).collect();
        if !within(&lists, &summed, &groups, TIMES) || count(&lists, &summed) > MOST_SUMS {
            let reason = Refusal::OutOfRange;
            return Err(Cause::Refused { reason });
        }
        Ok(Summing::new(Arc::clone(&self.engine), summed, lists))
    }

    fn send(&mut self, sums: &[u64]) {
        let message = Sums {
            id: self.wanted.id,
            refused: None,
            first: self.first,
            sums: pack_sums(sums),
        };
        self.first += sums.len() as u64;
        self.peer.link.send(message.into());
    }

    fn go_on(&mut self) -> Result<Turn, Cause> {
        // The offer may have ended: nobody wants the rest then.
        self.offered(|_| ())?;
        let mut summing = match self.summing.take() {
            Some(summing) => summing,
            None => self.begin()?,
        };
        let more = summing.turn().map_err(|error| {
            error!(%error, "checksums for a peer");
            NOT_SUMMED
        })?;
        if more.is_none() {
            // Until here nobody has changed the blocks, if they are still on offer.
            self.offered(|_| ())?;
            let sums = std::mem::take(&mut summing.sums);
            self.send(&sums);
            return Ok(Turn::Over);
        }
        // The last ones wait for what follows.
        while summing.sums.len() > CHUNK {
            let rest = summing.sums.split_off(CHUNK);
            let sums = std::mem::replace(&mut summing.sums, rest);
            self.send(&sums);
        }
        self.summing = Some(summing);
        Ok(Turn::More)
    }
}

impl Job for Answering {
    fn turn(&mut self) -> Turn {
        let turn = if stops(&self.engine) || self.peer.lost().is_some() {
            Turn::Over
        } else if self.peer.link.is_behind() {
            Turn::Behind
        } else {
            self.go_on().unwrap_or_else(|cause| {
                refuse(&self.peer, self.wanted.id, &cause);
                Turn::Over
            })
        };
        if turn == Turn::Over {
            self.peer.return_sums(self.weight);
        }
        turn
    }

    fn abandon(&mut self, cause: Cause) {
        refuse(&self.peer, self.wanted.id, &cause);
        self.peer.return_sums(self.weight);
    }
}
