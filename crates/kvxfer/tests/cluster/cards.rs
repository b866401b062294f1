//! RDMA cards: what one has acknowledged is in its processor's memory some time later.
//!
//! Two things put it there for certain: that a later receive on the same card has completed, which comes
//! after the card's writes, and that the queue pair it came on was destroyed.

use super::bug::{Step, ensure};
use super::memory::Owner;
use super::qp::Payload;
use super::world::World;
use kvxfer::wire::PathKind;

/// A WRITE that a card has acknowledged.
#[derive(Debug)]
pub(crate) struct InCard {
    /// The queue pair it came on.
    pub(crate) qp: usize,
    pub(crate) tid: usize,
    pub(crate) cell: u32,
    pub(crate) len: u32,
    pub(crate) payload: Payload,
    pub(crate) nonce: u64,
}

impl World {
    /// A WRITE has arrived on a card, or on a software device, which has no such delay.
    pub(crate) fn card_takes(&mut self, write: InCard) -> Step {
        if self.qps[write.qp].path != PathKind::Rdma {
            return self.in_memory(&write);
        }
        self.in_cards.push_back(write);
        Ok(())
    }

    /// Now and then a card gets to it: in the order of its own writes, and of no other's.
    pub(crate) fn cards_write(&mut self) -> Step {
        if !self.in_cards.is_empty() && self.rng.permille(self.faults.cards) {
            let at = self.rng.index(self.in_cards.len());
            let card = self.card_of(self.in_cards[at].qp);
            let first = (0..=at).find(|at| self.card_of(self.in_cards[*at].qp) == card);
            if let Some(write) = first.and_then(|at| self.in_cards.remove(at)) {
                self.sum.count("card: written late");
                self.in_memory(&write)?;
            }
        }
        Ok(())
    }

    /// A receive completes: all that came on its card before is in memory.
    pub(crate) fn card_receives(&mut self, q: usize) -> Step {
        let card = self.card_of(q);
        self.cards_flush("card: in memory by a receive", |world, write| {
            world.card_of(write.qp) == card
        })
    }

    /// A queue pair is destroyed: what came on it is in memory.
    pub(crate) fn card_lets_go(&mut self, q: usize) -> Step {
        self.cards_flush("card: in memory when destroyed", |_, write| write.qp == q)
    }

    /// What a closed push had written: time alone orders that word behind it.
    pub(crate) fn cards_catch_up(&mut self, life: usize) -> Step {
        self.cards_flush("card: in time", |world, write| {
            world.qps[write.qp].life == life
        })
    }

    fn cards_flush(&mut self, what: &'static str, which: impl Fn(&World, &InCard) -> bool) -> Step {
        let mut at = 0;
        while at < self.in_cards.len() {
            match which(self, &self.in_cards[at]) {
                true => {
                    self.sum.count(what);
                    if let Some(write) = self.in_cards.remove(at) {
                        self.in_memory(&write)?;
                    }
                }
                false => at += 1,
            }
        }
        Ok(())
    }

    /// The card of a queue pair: a life's rail.
    fn card_of(&self, q: usize) -> (usize, usize) {
        (self.qps[q].life, self.qps[q].rail)
    }

    fn in_memory(&mut self, write: &InCard) -> Step {
        let there = self.qps[write.qp].life;
        if !self.lives[there].alive {
            return Ok(());
        }
        let (cell, nonce) = (write.cell, write.nonce);
        let memory = &mut self.lives[there].memory;
        let owner = memory.owner(cell);
        ensure!(
            owner == Owner::Expect(nonce),
            Memory,
            "a WRITE of transfer {} for try {nonce:x} lands in cell {cell} of life {there}, which belongs \
             to {owner:?}",
            write.tid
        );
        for i in 0..write.len {
            memory.cells[(cell + i) as usize] = write.payload[i as usize];
        }
        Ok(())
    }
}
