//! A producer's request that this rank fetch blocks of a push: whether it may be carried out, and what is answered.

use std::sync::Arc;

use crate::block_set::BlockSet;
use crate::blocks::{BlockPair, GroupBlocks};
use crate::engine::Inner;
use crate::engine::books::pack_cause;
use crate::engine::peer_session::PeerSession;
use crate::engine::worker::Command;
use crate::ids::{Nonce, RequestId};
use crate::plan::{Compiled, LayerScope, OpSource, Plan};
use crate::transfer::{Cause, Refusal, TransferId};
use crate::wire::{Take, TakeStop, Taken};

/// Blocks that are to be fetched for a producer.
#[derive(Debug)]
pub(crate) struct Taking {
    /// The producer's number for it.
    pub(crate) number: u64,
    /// The request, and its try.
    pub(crate) of: (RequestId, Nonce),
    units: u64,
    pub(crate) plan: Arc<Plan>,
}

/// Plans what was asked for, and lists the blocks that it writes.
fn planned(
    plans: &Compiled,
    peer: &PeerSession,
    take: &Take,
) -> Result<(Plan, Vec<GroupBlocks>), Refusal> {
    let out_of_range = |_| Refusal::OutOfRange;
    let mut pairs = Vec::with_capacity(take.of.len());
    for of in &take.of {
        let of_group = of.pairs().map(|(src, dst)| BlockPair { src, dst });
        let of_group = plans.paired(of.group, of_group.collect());
        pairs.push(of_group.map_err(out_of_range)?);
    }
    let scope = take.layer.map_or(LayerScope::All, LayerScope::Layer);
    let limits = peer.unit_limits(plans, &pairs);
    let plan = plans
        .plan_units(&pairs, scope, limits)
        .map_err(out_of_range)?;
    if plan.bytes() != take.bytes {
        return Err(Refusal::FormatMismatch);
    }
    let blocks = pairs.iter().map(|pairs| GroupBlocks {
        group: pairs.group(),
        blocks: pairs.blocks().to_vec(),
    });
    Ok((plan, blocks.collect()))
}

/// Whether all of these blocks are expected.
fn among(blocks: &[GroupBlocks], expected: &BlockSet) -> bool {
    let mut all = blocks
        .iter()
        .flat_map(|of| of.blocks.iter().map(|id| (of.group, *id)));
    all.all(|(group, id)| expected.contains(group, id))
}

impl Inner {
    /// A producer asks for blocks of its push. The error says why it cannot be trusted.
    pub(crate) fn take(
        self: &Arc<Self>,
        peer: &Arc<PeerSession>,
        take: Take,
    ) -> Result<(), String> {
        let Some(plans) = peer.pull.as_ref().filter(|_| peer.has_whole_jobs()) else {
            return Err(format!("blocks to be fetched over {}", peer.path.path));
        };
        let refuse = |reason| self.tell_taken(peer, take.number, Some(Cause::Refused { reason }));
        let (plan, blocks) = match planned(plans.alone(), peer, &take) {
            Ok(planned) => planned,
            Err(reason) => {
                refuse(reason);
                return Ok(());
            }
        };
        let units = take.of.iter().map(|of| of.pairs().len() as u64).sum();
        let of = (take.request.clone(), take.nonce);
        // A try keeps its blocks. They are compared when the books are free for others.
        let expected = self
            .books
            .with(self, |books, _| books.expects.block_set(&of.0, of.1));
        let fits = expected.is_some_and(|expected| among(&blocks, &expected));
        let opened = self.books.with(self, |books, _| {
            if !books.expects.may_write(&of.0, of.1, peer.key) {
                return Err(Refusal::Late);
            }
            if !fits {
                return Err(Refusal::OutOfRange);
            }
            match books.takes.open(peer.key, of.clone(), units) {
                true => Ok(()),
                false => Err(Refusal::Busy),
            }
        });
        if let Err(reason) = opened {
            refuse(reason);
            return Ok(());
        }
        let taking = Box::new(Taking {
            number: take.number,
            of,
            units,
            plan: Arc::new(plan),
        });
        peer.to_taker(taking.number, |peer| Command::Take { peer, taking });
        Ok(())
    }

    /// A producer wants blocks fetched no more.
    pub(crate) fn take_stop(&self, peer: &Arc<PeerSession>, TakeStop { number }: TakeStop) {
        peer.to_taker(number, |peer| Command::TakeStop { peer, number });
    }

    /// Nothing more is fetched of what a producer has asked for.
    pub(crate) fn take_ended(
        self: &Arc<Self>,
        peer: &PeerSession,
        taking: &Taking,
        failed: Option<Cause>,
    ) {
        // Before the producer hears of it: what it says next may be the end of its push.
        self.books.with(self, |books, _| {
            books.takes.close(peer.key, &taking.of, taking.units);
        });
        self.tell_taken(peer, taking.number, failed);
    }

    fn tell_taken(&self, peer: &PeerSession, number: u64, failed: Option<Cause>) {
        let failed = failed.map(|cause| pack_cause(&cause));
        peer.link.send(Taken { number, failed }.into());
    }
}

impl PeerSession {
    /// Gives a command to the worker that answers for what the peer has given this number.
    pub(crate) fn to_taker(
        self: &Arc<Self>,
        number: u64,
        command: impl FnOnce(Arc<Self>) -> Command,
    ) {
        let worker = self.owner(TransferId(number));
        if let Some(worker) = self.all_workers.get(usize::from(worker)) {
            worker.send(command(Arc::clone(self)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(group: u32, blocks: &[u32]) -> GroupBlocks {
        let blocks = blocks.to_vec();
        GroupBlocks { group, blocks }
    }

    #[test]
    fn what_is_expected_in_whatever_order_is_among_it() {
        let mut expected = BlockSet::default();
        for (group, ids) in [(0, &[1, 2, 3][..]), (2, &[7])] {
            expected.insert_all(group, ids).expect("each once");
        }
        for (wanted, is) in [
            (vec![], true),
            (vec![blocks(0, &[1, 2, 3])], true),
            (vec![blocks(0, &[3, 1]), blocks(2, &[7])], true),
            (vec![blocks(0, &[4])], false),
            (vec![blocks(0, &[7])], false),
            (vec![blocks(1, &[1])], false),
            (vec![blocks(1, &[])], true),
            (vec![blocks(2, &[7]), blocks(0, &[1, 7])], false),
        ] {
            assert_eq!(among(&wanted, &expected), is, "{wanted:?}");
        }
    }
}
