//! The transfer whose sums are wanted.

use std::sync::Arc;

use super::Verification;
use super::summing::{List, Summing};
use super::thread::NOT_SUMMED;
use crate::engine::moves::Moved;
use crate::engine::worker::Live;
use crate::engine::{Inner, PeerSession};
use crate::ids::{Nonce, RequestId};
use crate::plan::{Part, SideName};
use crate::transfer::{Cause, TransferId};

pub(super) struct Subject {
    pub(super) id: TransferId,
    pub(super) engine: Arc<Inner>,
    pub(super) peer: Arc<PeerSession>,
    pub(super) request: RequestId,
    pub(super) nonce: Nonce,
    pub(super) part: Part,
    moved: Vec<Moved>,
}

impl Subject {
    pub(super) fn new(id: TransferId, live: &Live, of: &Verification) -> Self {
        Self {
            id,
            engine: Arc::clone(&live.engine),
            peer: Arc::clone(&live.peer),
            request: live.request.clone(),
            nonce: live.nonce,
            part: of.part,
            moved: of.moved.clone(),
        }
    }

    /// What it moves, in the units of one side; a group's layer is in one list, for kernels may have it in many jobs.
    pub(super) fn lists(&self, side: SideName) -> Vec<List> {
        let mut lists: Vec<List> = Vec::new();
        let add = |list: List, lists: &mut Vec<List>| {
            let mut known = lists.iter_mut();
            let same = known.find(|of| (of.group, of.scope) == (list.group, list.scope));
            match same {
                Some(of) => of.units.extend(list.units),
                None => lists.push(list),
            }
        };
        let mut posted = Vec::new();
        for moved in &self.moved {
            match moved {
                Moved::Planned(plan) => {
                    for list in List::of_plan(plan, side) {
                        add(list, &mut lists);
                    }
                }
                Moved::Posted(of) => posted.push(&**of),
            }
        }
        for list in List::of_posted(&posted, side) {
            add(list, &mut lists);
        }
        lists
    }

    /// The sums of what this side, which is `own`, has of it; none is worked out yet.
    pub(super) fn summing(&self, own: SideName) -> Result<Summing, Cause> {
        let summed = self.peer.summed(&self.engine, own, self.part);
        let summed = summed.map_err(|_| NOT_SUMMED)?;
        let engine = Arc::clone(&self.engine);
        Ok(Summing::new(engine, summed, self.lists(own)))
    }
}
