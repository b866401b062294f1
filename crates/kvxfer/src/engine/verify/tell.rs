//! A push that has written everything tells the sums of it.

use tracing::error;

use super::subject::Subject;
use super::summing::{CHUNK, List, Summing};
use super::thread::{Job, NOT_SUMMED, Turn, stops};
use super::{Unverified, Verdict};
use crate::engine::worker::{Command, WorkerHandle};
use crate::plan::SideName;
use crate::transfer::Cause;
use crate::wire::{PushSums, pack_sums};

pub(super) struct Telling {
    of: Subject,
    worker: WorkerHandle,
    summing: Option<Summing>,
    /// The consumer's units, as this side's are listed.
    theirs: Vec<List>,
    told: u64,
}

impl Telling {
    pub(super) fn new(of: Subject, worker: &WorkerHandle) -> Self {
        Self {
            of,
            worker: worker.clone(),
            summing: None,
            theirs: Vec::new(),
            told: 0,
        }
    }

    fn begin(&mut self) -> Result<Summing, Cause> {
        let summing = self.of.summing(SideName::Producer)?;
        self.theirs = self.of.lists(SideName::Consumer);
        // A message holds the sums of a unit at least.
        let too_many = |list: &List| list.tensors(&summing.summed).len() > CHUNK;
        match summing.lists.iter().any(too_many) {
            true => Err(NOT_SUMMED),
            false => Ok(summing),
        }
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
                        request: self.of.request.clone(),
                        nonce: self.of.nonce,
                        of,
                        sums: pack_sums(&sums),
                    };
                    self.of.peer.link.send(message.into());
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
        let id = self.of.id;
        self.worker.send(Command::Verified { id, verdict });
    }
}

impl Job for Telling {
    fn turn(&mut self) -> Turn {
        if stops(&self.of.engine) || !self.of.engine.runtime.verifier.is_wanted(self.of.id) {
            return Turn::Over;
        }
        if self.of.peer.link.is_behind() {
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
