//! A pull that has all its data asks the producer for sums, works its own out and compares.

use std::sync::Arc;

use tracing::error;

use super::compare::compare;
use super::subject::Subject;
use super::summing::{List, Summing, count};
use super::thread::{Job, NOT_SUMMED, Turn, Waiting, stops};
use super::{Unverified, Verdict};
use crate::engine::Inner;
use crate::engine::worker::{Command, WorkerHandle};
use crate::ids::RequestId;
use crate::plan::{Part, SideName};
use crate::sums::Summed;
use crate::transfer::{Cause, PeerKey, TransferId};
use crate::wire::{Blob, Sums, SumsWanted, unpack_sums};

/// What of both sides' sums is there.
pub(super) struct Asked {
    peer: PeerKey,
    worker: WorkerHandle,
    /// How many there are to be, once that is known.
    count: u64,
    here: Option<Box<Here>>,
    there: Vec<Blob>,
    arrived: u64,
}

/// This side's.
pub(super) struct Here {
    engine: Arc<Inner>,
    request: RequestId,
    summed: Arc<Summed>,
    lists: Vec<List>,
    sums: Vec<u64>,
}

impl Asked {
    pub(super) fn new(peer: PeerKey, worker: &WorkerHandle) -> Self {
        Self {
            peer,
            worker: worker.clone(),
            count: 0,
            here: None,
            there: Vec::new(),
            arrived: 0,
        }
    }

    pub(super) fn is_of(&self, peer: PeerKey) -> bool {
        self.peer == peer
    }

    pub(super) fn end(&self, id: TransferId, verdict: Verdict) {
        self.worker.send(Command::Verified { id, verdict });
    }

    /// Some of the producer's. Gives what is to be done when they were the last.
    ///
    /// # Errors
    ///
    /// They are not those that were to come.
    pub(super) fn add(&mut self, id: TransferId, sums: Sums) -> Result<Option<Comparing>, String> {
        let more = sums.sums.len() as u64 / 8;
        let (have, count) = (self.arrived, self.count);
        if sums.first != have || have + more > count {
            return Err(format!(
                "{more} checksums from number {}, where {have} of {count} have come",
                sums.first
            ));
        }
        self.arrived += more;
        self.there.push(sums.sums);
        Ok(self.complete(id))
    }

    fn complete(&mut self, id: TransferId) -> Option<Comparing> {
        if self.arrived < self.count {
            return None;
        }
        Some(Comparing {
            id,
            worker: self.worker.clone(),
            here: self.here.take()?,
            there: std::mem::take(&mut self.there),
        })
    }
}

/// Asks, and works out this side's sums meanwhile.
pub(super) struct Asking {
    of: Subject,
    summing: Option<Summing>,
}

impl Asking {
    pub(super) const fn new(of: Subject) -> Self {
        Self { of, summing: None }
    }

    fn ask(&mut self) -> Result<Summing, Cause> {
        let summing = self.of.summing(SideName::Consumer)?;
        let count = count(&summing.lists, &summing.summed);
        if count == 0 {
            // Something has moved, and by the sums nothing is exchanged: a defect.
            return Err(Cause::LostWork { missing: 1 });
        }
        match self
            .of
            .engine
            .runtime
            .verifier
            .waiting()
            .get_mut(&self.of.id)
        {
            Some(Waiting::Pull(asked)) => asked.count = count,
            _ => return Err(Cause::Cancelled),
        }
        let theirs = self.of.lists(SideName::Producer);
        let wanted = SumsWanted {
            id: self.of.id.0,
            request: self.of.request.clone(),
            nonce: self.of.nonce,
            share: self.of.part == Part::Share,
            of: (theirs.iter())
                .map(|list| list.to_wire(&list.units))
                .collect(),
        };
        self.of.peer.link.send(wanted.into());
        Ok(summing)
    }

    /// This side's sums are there.
    fn done(&mut self, summing: Summing) {
        let verifier = &self.of.engine.runtime.verifier;
        let here = Here {
            engine: Arc::clone(&self.of.engine),
            request: self.of.request.clone(),
            summed: summing.summed,
            lists: summing.lists,
            sums: summing.sums,
        };
        let comparing = match verifier.waiting().get_mut(&self.of.id) {
            Some(Waiting::Pull(asked)) => {
                asked.here = Some(Box::new(here));
                asked.complete(self.of.id)
            }
            _ => None,
        };
        verifier.compare(&self.of.engine, comparing);
    }
}

impl Job for Asking {
    fn turn(&mut self) -> Turn {
        if stops(&self.of.engine) || !self.of.engine.runtime.verifier.is_wanted(self.of.id) {
            return Turn::Over;
        }
        let mut summing = match self.summing.take() {
            Some(summing) => summing,
            None => match self.ask() {
                Ok(summing) => summing,
                Err(cause) => {
                    self.abandon(cause);
                    return Turn::Over;
                }
            },
        };
        match summing.turn() {
            Ok(Some(_)) => {
                self.summing = Some(summing);
                return Turn::More;
            }
            Ok(None) => self.done(summing),
            Err(error) => {
                error!(%error, "checksums of a pull");
                self.abandon(NOT_SUMMED);
            }
        }
        Turn::Over
    }

    fn abandon(&mut self, cause: Cause) {
        let removed = self
            .of
            .engine
            .runtime
            .verifier
            .waiting()
            .remove(&self.of.id);
        if let Some(Waiting::Pull(asked)) = removed {
            asked.end(self.of.id, Err(Box::new(Unverified::from(cause))));
        }
    }
}

/// Both sides' sums.
pub(super) struct Comparing {
    id: TransferId,
    worker: WorkerHandle,
    here: Box<Here>,
    there: Vec<Blob>,
}

impl Job for Comparing {
    fn turn(&mut self) -> Turn {
        let Here {
            engine,
            request,
            summed,
            lists,
            sums,
        } = &*self.here;
        let there: Vec<u64> = self.there.iter().flat_map(unpack_sums).collect();
        let verdict = match compare(engine, request, (lists, summed), (sums, &there)) {
            None => Ok(sums.len() as u64),
            Some(unverified) => Err(Box::new(unverified)),
        };
        let id = self.id;
        self.worker.send(Command::Verified { id, verdict });
        engine.runtime.verifier.forget(id);
        Turn::Over
    }

    fn abandon(&mut self, cause: Cause) {
        let (id, verdict) = (self.id, Err(Box::new(Unverified::from(cause))));
        self.worker.send(Command::Verified { id, verdict });
        self.here.engine.runtime.verifier.forget(id);
    }
}
