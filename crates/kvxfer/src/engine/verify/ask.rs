//! A pull that has all its data asks the producer for sums, works its own out and compares.

use std::sync::Arc;

use tracing::error;

use super::compare::compare;
use super::summing::{List, Summing, count};
use super::thread::{Job, NOT_SUMMED, Turn, Waiting, stops};
use super::{Unverified, Verdict, Verification};
use crate::engine::worker::{Command, Live, WorkerHandle};
use crate::engine::{Inner, PeerSession};
use crate::ids::{Nonce, RequestId};
use crate::plan::{Part, Plan, SideName};
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
    id: TransferId,
    engine: Arc<Inner>,
    peer: Arc<PeerSession>,
    request: RequestId,
    nonce: Nonce,
    part: Part,
    plans: Vec<Arc<Plan>>,
    summing: Option<Summing>,
}

impl Asking {
    pub(super) fn new(id: TransferId, live: &Live, of: &Verification) -> Self {
        Self {
            id,
            engine: Arc::clone(&live.engine),
            peer: Arc::clone(&live.peer),
            request: live.request.clone(),
            nonce: live.nonce,
            part: of.part,
            plans: of.plans.clone(),
            summing: None,
        }
    }

    fn ask(&mut self) -> Result<Summing, Cause> {
        let summed = (self.peer).summed(&self.engine, SideName::Consumer, self.part);
        let summed = summed.map_err(|_| NOT_SUMMED)?;
        let lists = |side| -> Vec<List> {
            let plans = self.plans.iter();
            plans.flat_map(|plan| List::of_plan(plan, side)).collect()
        };
        let (theirs, lists) = (lists(SideName::Producer), lists(SideName::Consumer));
        let count = count(&lists, &summed);
        if count == 0 {
            // Something has moved, and by the sums nothing is exchanged: a defect.
            return Err(Cause::LostWork { missing: 1 });
        }
        match self.engine.runtime.verifier.waiting().get_mut(&self.id) {
            Some(Waiting::Pull(asked)) => asked.count = count,
            _ => return Err(Cause::Cancelled),
        }
        let wanted = SumsWanted {
            id: self.id.0,
            request: self.request.clone(),
            nonce: self.nonce,
            share: self.part == Part::Share,
            of: theirs
                .iter()
                .map(|list| list.to_wire(&list.units))
                .collect(),
        };
        self.peer.link.send(wanted.into());
        let engine = Arc::clone(&self.engine);
        Ok(Summing::new(engine, summed, lists))
    }

    /// This side's sums are there.
    fn done(&mut self, summing: Summing) {
        let verifier = &self.engine.runtime.verifier;
        let here = Here {
            engine: Arc::clone(&self.engine),
            request: self.request.clone(),
            summed: summing.summed,
            lists: summing.lists,
            sums: summing.sums,
        };
        let comparing = match verifier.waiting().get_mut(&self.id) {
            Some(Waiting::Pull(asked)) => {
                asked.here = Some(Box::new(here));
                asked.complete(self.id)
            }
            _ => None,
        };
        verifier.compare(&self.engine, comparing);
    }
}

impl Job for Asking {
    fn turn(&mut self) -> Turn {
        if stops(&self.engine) || !self.engine.runtime.verifier.is_wanted(self.id) {
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
        let removed = self.engine.runtime.verifier.waiting().remove(&self.id);
        if let Some(Waiting::Pull(asked)) = removed {
            asked.end(self.id, Err(Box::new(Unverified::from(cause))));
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
