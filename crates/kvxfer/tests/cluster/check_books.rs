//! What must hold of offers and expectations.

use kvxfer::event::ReleaseReason;
use kvxfer::ids::{Nonce, RequestId};
use kvxfer::transfer::{Cause, MemoryState};

use super::bug::{Step, ensure};
use super::check::{Seen, cause_name};
use super::world::{World, log};

impl World {
    // ---- offers ------------------------------------------------------------------------------

    pub(crate) fn on_offer_released(
        &mut self,
        life: usize,
        request: &RequestId,
        nonce: Nonce,
        reason: ReleaseReason,
    ) -> Step {
        let now = self.clock(life);
        let quiet = self.faults.quiet();
        let books = &mut self.lives[life];
        let place = (request.clone(), nonce.0);
        let Some(offer) = books.offers.get_mut(&place) else {
            ensure!(false, EndsOnce, "{request} was never offered");
            return Ok(());
        };
        ensure!(
            !offer.released,
            EndsOnce,
            "{} is released twice",
            offer.name
        );
        offer.released = true;
        ensure!(
            reason != ReleaseReason::Expired || offer.expires <= now,
            Deadline,
            "{} expires at {now}, its lease runs to {}",
            offer.name,
            offer.expires
        );
        ensure!(
            !quiet || reason == ReleaseReason::AllRead,
            Converges,
            "{} ends with {reason:?} though nothing went wrong",
            offer.name
        );
        self.sum.count(match reason {
            ReleaseReason::AllRead => "offer: read by all",
            ReleaseReason::Retracted => "offer: retracted",
            _ => "offer: expired",
        });
        let name = offer.name.clone();
        books.memory.free(&offer.blocks, &mut self.fresh);
        log!(self, "{name} is released: {reason:?}");
        Ok(())
    }

    // ---- expectations ------------------------------------------------------------------------

    pub(crate) fn on_received(&mut self, life: usize, nonce: Nonce) -> Step {
        let Some(expected) = self.lives[life].expected.get(&nonce.0) else {
            ensure!(false, EndsOnce, "{nonce:?} was never expected");
            return Ok(());
        };
        let name = expected.name.clone();
        ensure!(!expected.ended, EndsOnce, "{name} ends twice");
        let pushes = self.seen.iter().filter(|s| s.push && s.nonce == nonce.0);
        let told: Vec<&Seen> = pushes.filter(|s| s.told_done).collect();
        ensure!(
            told.len() >= expected.senders as usize,
            Notice,
            "{name} is received when {} of its {} senders are done",
            told.len(),
            expected.senders
        );
        for seen in &told {
            for (cell, value) in &seen.wants {
                let got = self.lives[life].memory.cells[*cell as usize];
                ensure!(
                    got == *value,
                    Bytes,
                    "{name} is received, and cell {cell} has {got} instead of {value}"
                );
            }
        }
        log!(self, "{name} is received");
        self.sum.count("expectation: received");
        self.expect_ends(life, nonce);
        self.expect_freed(life, nonce)
    }

    pub(crate) fn on_expect_failed(
        &mut self,
        life: usize,
        nonce: Nonce,
        cause: &Cause,
        memory: MemoryState,
    ) -> Step {
        let quiet = self.faults.quiet();
        let Some(expected) = self.lives[life].expected.get(&nonce.0) else {
            ensure!(false, EndsOnce, "{nonce:?} was never expected");
            return Ok(());
        };
        let name = expected.name.clone();
        ensure!(!expected.ended, EndsOnce, "{name} ends twice");
        ensure!(
            expected.reason.as_ref() == Some(cause),
            FirstCause,
            "{name} fails with {cause}, first was {:?}",
            expected.reason
        );
        ensure!(
            !quiet,
            Converges,
            "{name} fails with {cause} though nothing went wrong"
        );
        log!(self, "{name} fails: {cause}, {memory:?}");
        self.sum.count("expectation: failed");
        self.sum.count(cause_name(cause));
        self.expect_ends(life, nonce);
        if memory == MemoryState::Released {
            return self.expect_freed(life, nonce);
        }
        self.sum.count("memory: expected blocks quarantined");
        Ok(())
    }

    pub(crate) fn on_expect_released(&mut self, life: usize, nonce: Nonce) -> Step {
        let expected = self.lives[life].expected.get(&nonce.0);
        ensure!(
            expected.is_some_and(|e| e.ended && !e.free),
            EndsOnce,
            "{nonce:?} is released before its end, or twice"
        );
        self.sum.count("memory: expected blocks released later");
        self.expect_freed(life, nonce)
    }

    fn expect_ends(&mut self, life: usize, nonce: Nonce) {
        if let Some(expected) = self.lives[life].expected.get_mut(&nonce.0) {
            expected.ended = true;
        }
    }

    fn expect_freed(&mut self, life: usize, nonce: Nonce) -> Step {
        let late = self.can_land(life, nonce.0);
        let books = &mut self.lives[life];
        let Some(expected) = books.expected.get_mut(&nonce.0) else {
            return Ok(());
        };
        expected.free = true;
        let name = expected.name.clone();
        books.memory.free(&expected.blocks, &mut self.fresh);
        log!(self, "{name}: memory released");
        ensure!(
            late.is_none(),
            Memory,
            "{name}: memory is released while a WRITE on queue pair {late:?} can still land in it"
        );
        Ok(())
    }
}
