//! A push that has written everything tells the sums of it.

use std::sync::Arc;

use tracing::error;

use super::summing::{CHUNK, List, Summing};
use super::thread::{Job, NOT_SUMMED, Turn, stops};
use super::{Unverified, Verdict, Verification};
use crate::engine::worker::{Command, Live, WorkerHandle};
use crate::engine::{Inner, PeerSession};
use crate::ids::{Nonce, RequestId};
use crate::plan::{Part, Plan, SideName};
use crate::transfer::{Cause, TransferId};
use crate::wire::{PushSums, pack_sums};

pub(super) struct Telling {
    id: TransferId,
    worker: WorkerHandle,
    engine: Arc<Inner>,
    peer: Arc<PeerSession>,
    request: RequestId,
    nonce: Nonce,
    part: Part,
    plans: Vec<Arc<Plan>>,
    summing: Option<Summing>,
    /// The consumer's units, as this side's are listed.
    theirs: Vec<List>,
    told: u64,
}

impl Telling {
    pub(super) fn new(
        id: TransferId,
        live: &Live,
        of: &Verification,
        worker: &WorkerHandle,
    ) -> Self {
        Self {
            id,
            worker: worker.clone(),
            engine: Arc::clone(&live.engine),
            peer: Arc::clone(&live.peer),
            request: live.request.clone(),
            nonce: live.nonce,
            part: of.part,
            plans: of.plans.clone(),
            summing: None,
            theirs: Vec::new(),
            told: 0,
        }
    }

    fn begin(&mut self) -> Result<Summing, Cause> {
        let summed = (self.peer).summed(&self.engine, SideName::Producer, self.part);
        let summed = summed.map_err(|_| NOT_SUMMED)?;
        let lists = |side| -> Vec<List> {
            let plans = self.plans.iter();
            plans.flat_map(|plan| List::of_plan(plan, side)).collect()
        };
        let ours = lists(SideName::Producer);
        self.theirs = lists(SideName::Consumer);
        // A message holds the sums of a unit at least.
        if ours.iter().any(|list| list.tensors(&summed).len() > CHUNK) {
            return Err(NOT_SUMMED);
        }
        Ok(Summing::new(Arc::clone(&self.engine), summed, ours))
    }

    fn go_on(&mut self) -> Result<Turn, Cause> {
        let mut summing = match self.summing.take() {
            Some(summing) => summing,
            None => self.begin()?,
        };
        let more = summing.turn().map_err(|error| {
            error!(%error, "checksums of a push");
            NOT_SUMMED
        })?;
        let sums = std::mem::take(&mut summing.sums);
        self.summing = Some(summing);
        match more {
            Some((list, units)) => {
                let to = self.theirs.get(list);
                let of = to.and_then(|to| Some(to.to_wire(to.units.get(units)?)));
                if let Some(of) = of.filter(|_| !sums.is_empty()) {
                    self.told += sums.len() as u64;
                    let message = PushSums {
                        request: self.request.clone(),
                        nonce: self.nonce,
                        of,
                        sums: pack_sums(&sums),
                    };
                    self.peer.link.send(message.into());
                }
                Ok(Turn::More)
            }
            // Something has moved, and by the sums nothing is exchanged: a defect.
            None if self.told == 0 => Err(Cause::LostWork { missing: 1 }),
            None => {
                self.end(Ok(self.told));
                Ok(Turn::Over)
            }
        }
    }

    fn end(&self, verdict: Verdict) {
        let id = self.id;
        self.worker.send(Command::Verified { id, verdict });
    }
}

impl Job for Telling {
    fn turn(&mut self) -> Turn {
        if stops(&self.engine) || !self.engine.runtime.verifier.is_wanted(self.id) {
            return Turn::Over;
        }
        if self.peer.link.is_behind() {
            return Turn::Behind;
        }
        self.go_on().unwrap_or_else(|cause| {
            self.abandon(cause);
            Turn::Over
        })
    }

    fn abandon(&mut self, cause: Cause) {
        self.end(Err(Box::new(Unverified::from(cause))));
    }
}
