//! How expectations end: the outcome, the drain after a failure, and what is taken out of the indices.

use super::{Bound, ExpectOutput, Expectation, Expects, Phase, Writer};
use crate::event::MemoryState;
use crate::ids::RequestId;
use crate::time::Time;
use crate::transfer::{Cause, PeerKey};

impl Expects {
    /// The owner wants the request no more. False when no try of it stands.
    pub fn cancel(&mut self, now: Time, request: &RequestId, cause: Cause) -> bool {
        let Some(key) = self.standing.get(request).copied() else {
            return false;
        };
        self.fail(now, key, cause);
        true
    }

    /// Cancels everything that stands: the engine is shutting down.
    pub fn cancel_all(&mut self, now: Time, cause: &Cause) {
        let mut keys: Vec<u64> = self.standing.values().copied().collect();
        keys.sort_unstable();
        for key in keys {
            self.fail(now, key, cause.clone());
        }
    }

    /// A peer is dead, restarted or out of reach: its pushes cannot be completed. What it may
    /// still have under way ends with the reset that is asked for here.
    pub fn peer_lost(&mut self, now: Time, peer: PeerKey, cause: &Cause) {
        let mut failing = Vec::new();
        let mut pending = false;
        for (&key, expectation) in &mut self.all {
            let phase = expectation.phase;
            if expectation.writer(peer) == Some(&mut Writer::Open) {
                pending = true;
                if matches!(phase, Phase::Standing(_)) {
                    failing.push(key);
                }
            }
        }
        if !pending {
            return;
        }
        // Before the failures: they then know that a revoke would not be answered.
        let ask = self.resetting.insert(peer);
        failing.sort_unstable();
        for key in failing {
            self.fail(now, key, cause.clone());
        }
        if ask {
            self.outputs.push_back(ExpectOutput::ForceReset { peer });
        }
    }

    /// All own queue pairs to the peer have been reset: nothing that it has posted can land any
    /// more. Must be called before new queue pairs to it are set up. Expectations that stand keep
    /// it bound, for it may push again over the new ones. Of its kernels a reset says nothing.
    pub fn peer_reset(&mut self, peer: PeerKey) {
        self.resetting.remove(&peer);
        self.settle_writers(peer, |writer| match (writer.state, writer.kernels) {
            (Writer::Open | Writer::Kernels, true) => Writer::Kernels,
            _ => Writer::Closed,
        });
    }

    /// The process of a peer has ended, and its session was over before: none of its kernels writes any more.
    pub fn process_ended(&mut self, peer: PeerKey) {
        self.settle_writers(peer, |writer| match writer.state {
            Writer::Kernels => Writer::Closed,
            state => state,
        });
    }

    /// What a peer may do yet for expectations that have failed; those that nobody writes any more are released.
    fn settle_writers(&mut self, peer: PeerKey, state: impl Fn(&Bound) -> Writer) {
        let mut drained = Vec::new();
        for (&key, expectation) in &mut self.all {
            let draining = matches!(expectation.phase, Phase::Draining(_));
            let mut writers = expectation.writers.iter_mut();
            if let Some(writer) = writers.find(|w| w.peer == peer).filter(|_| draining) {
                writer.state = state(writer);
                drained.push(key);
            }
        }
        drained.sort_unstable();
        for key in drained {
            self.release_if_drained(key);
        }
    }

    /// Fails what has reached its deadline and cuts off who has used up the grace.
    pub fn on_time(&mut self, now: Time) {
        while let Some(&(time, key)) = self.timers.first() {
            if time > now {
                break;
            }
            match self.expectation(key).phase {
                Phase::Standing(_) => self.fail(now, key, Cause::DeadlinePassed),
                Phase::Draining(_) => self.cut_off(key),
            }
        }
    }

    /// Gives the outcome and starts the drain.
    pub(super) fn fail(&mut self, now: Time, key: u64, cause: Cause) {
        let cut_off = now.saturating_add(self.grace);
        let expectation = self.expectation(key);
        let timer = expectation.timer();
        let (request, nonce) = (expectation.request.clone(), expectation.nonce);
        let open: Vec<PeerKey> = expectation.open_writers().collect();
        let memory = if open.is_empty() {
            MemoryState::Released
        } else {
            MemoryState::Quarantined
        };
        let failed = ExpectOutput::Failed {
            request: request.clone(),
            nonce,
            tag: expectation.tag,
            cause,
            groups: expectation.groups.clone(),
            memory,
        };
        expectation.phase = Phase::Draining(Some(cut_off));
        if let Some(time) = timer {
            self.timers.remove(&(time, key));
        }
        self.timers.insert((cut_off, key));
        self.standing.remove(&request);
        self.outputs.push_back(failed);
        if open.is_empty() {
            self.remove(key);
            return;
        }
        for peer in open {
            if !self.resetting.contains(&peer) {
                self.outputs.push_back(ExpectOutput::Revoke {
                    peer,
                    request: request.clone(),
                    nonce,
                });
            }
        }
    }

    /// Asks for the reset of every peer that has not closed, once for each peer.
    fn cut_off(&mut self, key: u64) {
        let expectation = self.expectation(key);
        let timer = expectation.timer();
        expectation.phase = Phase::Draining(None);
        // Kernels would go on: whose they are may yet say that they have ended.
        let of_queues = expectation.writers.iter().filter(|w| !w.kernels);
        let open = of_queues.filter(|w| w.state == Writer::Open);
        let open: Vec<PeerKey> = open.map(|w| w.peer).collect();
        if let Some(time) = timer {
            self.timers.remove(&(time, key));
        }
        for peer in open {
            if self.resetting.insert(peer) {
                self.outputs.push_back(ExpectOutput::ForceReset { peer });
            }
        }
    }

    pub(super) fn release_if_drained(&mut self, key: u64) {
        if self.expectation(key).may_be_written() {
            return;
        }
        let expectation = self.remove(key);
        self.outputs.push_back(ExpectOutput::Released {
            request: expectation.request,
            nonce: expectation.nonce,
            groups: expectation.groups,
        });
    }

    /// Takes an expectation out of every index.
    pub(super) fn remove(&mut self, key: u64) -> Expectation {
        let expectation = self.all.remove(&key).expect("only a live key is removed");
        if let Some(time) = expectation.timer() {
            self.timers.remove(&(time, key));
        }
        let request = &expectation.request;
        self.by_try.remove(&(request.clone(), expectation.nonce));
        if self.standing.get(request) == Some(&key) {
            self.standing.remove(request);
        }
        self.ended.push(request, expectation.nonce);
        expectation
    }
}
