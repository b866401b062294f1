//! What an engine has offered and what it expects: the ledgers of [`crate::leases`] and
//! [`crate::expects`], and the thread that keeps their time.

use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use kvxfer_verbs::PeerLife;
use tracing::{debug, error, warn};

use super::gpu::OpenTakes;
use super::health::Health;
use super::peer_session::PeerSession;
use super::verify::{ArrivedSums, Next};
use crate::claims::{Claim, Claims};
use crate::engine::Inner;
use crate::event::{Event, ReleaseReason};
use crate::expects::{ExpectOutput, Expects, PushProgress, PushRefusal, Sender};
use crate::ids::{Nonce, RequestId};
use crate::leases::{LeaseOutput, Leases};
use crate::plan::Cover;
use crate::ticket::Ticket;
use crate::time::Time;
use crate::transfer::{Cause, PeerKey, Refusal};
use crate::wire::{Announce, Blob, ErrorCode, LinksRefused, Message, PushSums, Revoke};

/// Pushes that were asked for before their expectations stood; further ones are refused.
const MAX_WANTED: usize = 16_384;
/// Those of one session: a peer that asks for more takes no other's place.
const MAX_WANTED_OF_PEER: usize = 1024;
/// What a push without a ticket names as its try.
pub(crate) const NO_TICKET: Nonce = Nonce(0);
/// How often it is looked whether a process has ended whose kernels keep blocks.
const LOOK: Duration = Duration::from_millis(20);
/// The longest sleep of the time keeper; also how soon it notices that its engine is gone.
const NAP: Duration = Duration::from_secs(1);

/// The ledgers. One lock for both: their outputs are carried out in order while it is held.
#[derive(Debug)]
pub(crate) struct Ledgers {
    pub(crate) leases: Leases,
    pub(crate) expects: Expects,
    /// The blocks of offers that stand, where this rank is written to as well.
    pub(crate) offered: HashMap<(RequestId, Nonce), Claim>,
    /// The tickets of expectations that stand, for producers that ask.
    pub(crate) tickets: HashMap<RequestId, Ticket>,
    /// Checksums of what is being pushed here.
    pub(crate) sums: ArrivedSums,
    /// What producers have asked to be fetched from their GPUs.
    pub(crate) takes: OpenTakes,
    /// The processes whose kernels may write blocks that are expected here.
    processes: HashMap<PeerKey, Arc<PeerLife>>,
    /// What producers asked for before.
    wanted: HashMap<PeerKey, HashSet<RequestId>>,
    stopping: bool,
    /// The time keeper is to panic, as a defect would have it.
    #[cfg(test)]
    pub(crate) panic: bool,
}

#[derive(Debug)]
pub(crate) struct Books {
    ledgers: Mutex<Ledgers>,
    changed: Condvar,
}

/// The ledgers while somebody changes them. Should that panic, the engine breaks down before anybody
/// else can have them, and the time keeper is called.
struct Held<'a> {
    ledgers: MutexGuard<'a, Ledgers>,
    changed: &'a Condvar,
    health: &'a Health,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.health.break_down();
            self.changed.notify_one();
        }
    }
}

impl Books {
    pub(crate) fn new(slots: u32, grace: Duration, claims: Claims) -> Self {
        Self {
            ledgers: Mutex::new(Ledgers {
                leases: Leases::new(slots),
                expects: Expects::new(grace, claims),
                offered: HashMap::new(),
                tickets: HashMap::new(),
                sums: ArrivedSums::default(),
                takes: OpenTakes::default(),
                processes: HashMap::new(),
                wanted: HashMap::new(),
                stopping: false,
                #[cfg(test)]
                panic: false,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ledgers> {
        // Whoever panics while it holds them leaves the rest to the time keeper.
        self.ledgers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hold<'a>(&'a self, engine: &'a Inner) -> Held<'a> {
        Held {
            ledgers: self.lock(),
            changed: &self.changed,
            health: &engine.runtime.health,
        }
    }

    /// Does something with the ledgers and carries out what follows from it.
    pub(crate) fn with<R>(
        &self,
        engine: &Arc<Inner>,
        act: impl FnOnce(&mut Ledgers, Time) -> R,
    ) -> R {
        let mut held = self.hold(engine);
        let ledgers = &mut *held.ledgers;
        let before = ledgers.next_timeout();
        let answer = act(ledgers, engine.now());
        ledgers.carry_out(engine);
        let earlier = match (before, ledgers.next_timeout()) {
            (_, None) => false,
            (None, Some(_)) => true,
            (Some(before), Some(after)) => after < before,
        };
        drop(held);
        if earlier {
            self.changed.notify_one();
        }
        answer
    }

    /// Whether kernels of others may yet write blocks of this rank.
    pub(crate) fn kernels_may_write(&self) -> bool {
        let mut ledgers = self.lock();
        ledgers.look_at_processes();
        ledgers.kernels_may_write()
    }

    /// Ends the time keeper.
    pub(crate) fn stop(&self) {
        self.lock().stopping = true;
        self.changed.notify_all();
    }

    /// The time keeper's body.
    ///
    /// A panic over the ledgers, on whatever thread, is a defect of this library. The engine takes no
    /// new work then; what stands in the ledgers ends, with [`Cause::WorkerPanicked`], and their time
    /// is kept for what is to be released later. A second panic ends that too.
    pub(crate) fn keep_time(&self, engine: &Weak<Inner>) {
        let keep = || catch_unwind(AssertUnwindSafe(|| self.keep(engine)));
        let _ = keep();
        if !self.ledgers.is_poisoned() {
            return;
        }
        error!("a thread has panicked over the ledgers; the engine takes no new work");
        let Some(inner) = engine.upgrade() else {
            return;
        };
        inner.runtime.health.break_down();
        let ended = catch_unwind(AssertUnwindSafe(|| {
            let mut ledgers = self.lock();
            // Under the lock: a panic of another thread comes before this or after all of it.
            self.ledgers.clear_poison();
            ledgers.end_all(inner.now(), &Cause::WorkerPanicked);
            ledgers.carry_out(&inner);
        }));
        drop(inner);
        if ended.is_err() || keep().is_err() || self.ledgers.is_poisoned() {
            error!("the ledgers are in disorder: what they hold is not released any more");
        }
    }

    /// Keeps time until the engine goes, or somebody has panicked over the ledgers.
    fn keep(&self, engine: &Weak<Inner>) {
        let mut ledgers = self.lock();
        while !ledgers.stopping && !self.ledgers.is_poisoned() {
            let Some(engine) = engine.upgrade() else {
                return;
            };
            let now = engine.now();
            #[cfg(test)]
            assert!(!std::mem::take(&mut ledgers.panic), "the test wants it");
            ledgers.leases.on_time(now);
            ledgers.expects.on_time(now);
            let watches = ledgers.look_at_processes();
            ledgers.carry_out(&engine);
            let longest = if watches { LOOK } else { NAP };
            let nap = ledgers
                .next_timeout()
                .map_or(longest, |at| at.since(now).min(longest));
            drop(engine);
            // Rounded up: waking before the time would be waking for nothing.
            let nap = nap + Duration::from_micros(50);
            ledgers = self
                .changed
                .wait_timeout(ledgers, nap)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Ledgers {
    fn next_timeout(&self) -> Option<Time> {
        match (self.leases.next_timeout(), self.expects.next_timeout()) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    fn carry_out(&mut self, engine: &Arc<Inner>) {
        while let Some(output) = self.leases.poll_output() {
            match output {
                LeaseOutput::Flip { slot, word } => {
                    if let Err(error) = engine.lease_table.flip(slot, word) {
                        // Slots are numbered within the table.
                        error!(slot, %error, "lease slot not turned over");
                    }
                }
                LeaseOutput::Released {
                    request,
                    nonce,
                    reason,
                    ..
                } => {
                    let of = (request, nonce);
                    self.offered.remove(&of);
                    let (request, nonce) = of;
                    engine.events.push(Event::Released {
                        request,
                        nonce,
                        reason,
                    });
                }
            }
        }
        while let Some(output) = self.expects.poll_output() {
            match output {
                ExpectOutput::Received {
                    request,
                    nonce,
                    tag,
                } => {
                    self.tickets.remove(&request);
                    self.sums.forget(&request, nonce);
                    engine.events.push(Event::Received {
                        request,
                        nonce,
                        tag,
                    });
                }
                ExpectOutput::Failed {
                    request,
                    nonce,
                    tag,
                    cause,
                    groups,
                    memory,
                } => {
                    self.tickets.remove(&request);
                    self.sums.forget(&request, nonce);
                    engine.events.push(Event::Failed {
                        request,
                        nonce,
                        tag,
                        invalid_blocks: groups,
                        first_cause: cause,
                        memory,
                    });
                }
                ExpectOutput::Revoke {
                    peer,
                    request,
                    nonce,
                } => {
                    if let Some(peer) = engine.peer(peer) {
                        peer.link.send(revoke(request, nonce, &Cause::Revoked));
                    }
                }
                ExpectOutput::ForceReset { peer } => match engine.peer(peer) {
                    Some(peer) => {
                        peer.fail(Cause::LaneReset);
                        peer.drop_lanes();
                    }
                    // Its queue pairs are being taken down, or are gone: `peer_drained` follows, or
                    // has come before.
                    None if engine.is_draining(peer) => {}
                    None => self.expects.peer_reset(peer),
                },
                ExpectOutput::Released { request, nonce, .. } => {
                    let reason = ReleaseReason::Drained;
                    engine.events.push(Event::Released {
                        request,
                        nonce,
                        reason,
                    });
                }
            }
        }
    }

    /// Lets kernels of a peer write what is expected of it, whose process has this life.
    pub(crate) fn let_kernels_write(
        &mut self,
        now: Time,
        peer: PeerKey,
        life: Arc<PeerLife>,
        (request, nonce): (&RequestId, Nonce),
    ) -> Result<(), LinksRefused> {
        let may = (self.expects).let_kernels_write(now, request, nonce, peer);
        may.map_err(|refusal| {
            debug!(%request, %refusal, "links refused");
            LinksRefused::Late
        })?;
        self.processes.insert(peer, life);
        Ok(())
    }

    /// Ends what kernels might have written of processes that have ended; whether others are waited for.
    fn look_at_processes(&mut self) -> bool {
        if self.processes.is_empty() {
            return false;
        }
        let mut waits = false;
        for peer in self.expects.kernels_left() {
            match self.processes.get(&peer) {
                Some(life) if life.has_ended() => self.expects.process_ended(peer),
                _ => waits = true,
            }
        }
        let expects = &self.expects;
        self.processes
            .retain(|peer, _| expects.kernels_may_write(*peer));
        waits
    }

    /// Whether kernels of others may write blocks of this rank, now or later.
    fn kernels_may_write(&self) -> bool {
        let mut peers = self.processes.keys();
        peers.any(|peer| self.expects.kernels_may_write(*peer))
    }

    /// An expectation stands: producers that asked for it get their tickets.
    pub(crate) fn announce(&mut self, engine: &Inner, ticket: &Ticket) {
        self.tickets.insert(ticket.request.clone(), ticket.clone());
        let mut asked: Vec<PeerKey> = self
            .wanted
            .iter_mut()
            .filter_map(|(peer, of_peer)| of_peer.remove(&ticket.request).then_some(*peer))
            .collect();
        // Whoever connected first is the first to be answered.
        asked.sort_unstable();
        for key in asked {
            if let Some(peer) = engine.peer(key) {
                self.answer(&peer, ticket);
            }
        }
    }

    /// A producer asks whether it may push.
    pub(crate) fn push_started(
        &mut self,
        now: Time,
        peer: &Arc<PeerSession>,
        request: RequestId,
        nonce: Option<Nonce>,
    ) {
        self.expects.on_time(now);
        match self.tickets.get(&request) {
            Some(ticket) if nonce.is_none_or(|nonce| nonce == ticket.nonce) => {
                let ticket = ticket.clone();
                self.answer(peer, &ticket);
            }
            Some(_) => refuse(peer, request, nonce, Refusal::Late),
            None if nonce.is_some() => refuse(peer, request, nonce, Refusal::Late),
            None => {
                let all: usize = self.wanted.values().map(HashSet::len).sum();
                let of_peer = self.wanted.entry(peer.key).or_default();
                let full = all >= MAX_WANTED || of_peer.len() >= MAX_WANTED_OF_PEER;
                if full && !of_peer.contains(&request) {
                    return refuse(peer, request, nonce, Refusal::Busy);
                }
                of_peer.insert(request);
            }
        }
    }

    /// A producer's push has closed.
    pub(crate) fn push_closed(
        &mut self,
        now: Time,
        engine: &Inner,
        peer: PeerKey,
        (request, nonce): (&RequestId, Nonce),
    ) -> Result<(), PushRefusal> {
        if nonce != NO_TICKET {
            if self.sums.forget_sender(peer, request, nonce) {
                // It has said that it was done, and now that it tells no more.
                self.push_checked(now, engine, peer, (request, nonce), Err(Cause::Aborted));
            }
            return self.expects.push_closed(now, request, nonce, peer);
        }
        // The push was given up before the ticket reached it. If it still waits for one, nobody
        // does any more. Otherwise its ticket is on its way and the peer is bound, perhaps to its
        // next push: the peer's answer to the ticket says whether it is closed.
        if let Some(of_peer) = self.wanted.get_mut(&peer) {
            of_peer.remove(request);
        }
        Ok(())
    }

    fn answer(&mut self, peer: &Arc<PeerSession>, ticket: &Ticket) {
        let (request, nonce) = (ticket.request.clone(), ticket.nonce);
        let Some(plans) = peer.pull.as_ref().filter(|p| !p.alone().is_empty()) else {
            // Of a role that cannot push, or a rank that has nothing of what is kept here: it may not take
            // another's place.
            return refuse(peer, request, Some(nonce), Refusal::NotAuthorised);
        };
        let who = Sender {
            name: &peer.name,
            cover: plans.alone().cover(),
        };
        match self.expects.announce(&request, nonce, peer.key, who) {
            Ok(()) => match ticket.to_bytes() {
                Ok(bytes) => peer.link.send(
                    Announce {
                        ticket: Blob(bytes),
                    }
                    .into(),
                ),
                // Checked when it was made.
                Err(error) => error!(%request, %error, "ticket does not encode"),
            },
            Err(refusal) => refuse(peer, request, Some(nonce), reason(refusal)),
        }
    }

    /// A peer is gone: it asks for nothing any more, and tells no checksums.
    pub(crate) fn forget_peer(&mut self, now: Time, engine: &Inner, peer: PeerKey, cause: &Cause) {
        self.wanted.remove(&peer);
        self.takes.forget_peer(peer);
        for (request, nonce) in self.sums.forget_peer(peer) {
            self.push_checked(now, engine, peer, (&request, nonce), Err(cause.clone()));
        }
    }

    /// A sender tells checksums of what it has written. The error says why it cannot be trusted.
    pub(crate) fn push_sums(
        &mut self,
        now: Time,
        engine: &Arc<Inner>,
        peer: &Arc<PeerSession>,
        sums: PushSums,
    ) -> Result<(), String> {
        let of = (sums.request.clone(), sums.nonce);
        if !self.expects.may_tell(&of.0, of.1, peer.key) {
            // Of an expectation that has ended, mostly.
            return Ok(());
        }
        let next = self.sums.add(peer.key, sums);
        self.compare(now, engine, peer, of, next)
    }

    /// A sender is done: it has written everything, and has told so many checksums, or will.
    pub(crate) fn push_done(
        &mut self,
        now: Time,
        engine: &Arc<Inner>,
        peer: &Arc<PeerSession>,
        (request, nonce): (&RequestId, Nonce),
        sums: u64,
    ) -> Result<(), String> {
        if sums > 0 {
            return self.push_written(now, engine, peer, (request, nonce), sums);
        }
        if self.sums.has(peer.key, request, nonce) {
            return Err("push done without checksums that were told".to_owned());
        }
        let gap = |covers: &[&Cover]| engine.gap(covers);
        match (self.expects).push_done(now, request, nonce, peer.key, gap) {
            Ok(PushProgress::Waiting { .. } | PushProgress::Complete) => Ok(()),
            Ok(PushProgress::Repeated) => {
                debug!(%request, "push done twice");
                Ok(())
            }
            Err(refusal) => not_counted(request, &refusal),
        }
    }

    fn push_written(
        &mut self,
        now: Time,
        engine: &Arc<Inner>,
        peer: &Arc<PeerSession>,
        (request, nonce): (&RequestId, Nonce),
        sums: u64,
    ) -> Result<(), String> {
        match self.expects.push_written(now, request, nonce, peer.key) {
            Ok(true) => {
                let next = self.sums.done(peer.key, request, nonce, sums);
                self.compare(now, engine, peer, (request.clone(), nonce), next)
            }
            Ok(false) => {
                debug!(%request, "push done twice");
                Ok(())
            }
            Err(refusal) => {
                not_counted(request, &refusal)?;
                self.sums.forget_sender(peer.key, request, nonce);
                Ok(())
            }
        }
    }

    /// What a sender has written was compared with its checksums, or cannot be.
    pub(crate) fn push_checked(
        &mut self,
        now: Time,
        engine: &Inner,
        peer: PeerKey,
        (request, nonce): (&RequestId, Nonce),
        verdict: Result<(), Cause>,
    ) {
        let wrong = verdict.as_ref().err().cloned();
        let gap = |covers: &[&Cover]| engine.gap(covers);
        let counted = (self.expects).push_checked(now, request, nonce, peer, verdict, gap);
        match (counted, wrong) {
            // One that has ended needs no verdict.
            (Err(refusal), _) => debug!(%request, %refusal, "compared push not counted"),
            (Ok(_), Some(cause)) => warn!(%request, %cause, "push"),
            (Ok(_), None) => {}
        }
    }

    fn compare(
        &mut self,
        now: Time,
        engine: &Arc<Inner>,
        peer: &Arc<PeerSession>,
        (request, nonce): (RequestId, Nonce),
        next: Next,
    ) -> Result<(), String> {
        let of = (&request, nonce);
        match next {
            Next::Wait => {}
            Next::NoRoom => {
                let reason = Refusal::Busy;
                self.push_checked(now, engine, peer.key, of, Err(Cause::Refused { reason }));
            }
            Next::Lie => {
                let reason = ErrorCode::Lie;
                self.push_checked(now, engine, peer.key, of, Err(Cause::CutOff { reason }));
                return Err("more checksums than were to come".to_owned());
            }
            Next::Compare(lists, weight) => {
                let groups = self.expects.groups(&request, nonce).unwrap_or(&[]).to_vec();
                let told = (lists, weight);
                if !engine.check_push(peer, (request.clone(), nonce), groups, told) {
                    self.sums.compared(peer.key, weight);
                    let verdict = Err(Cause::ShuttingDown);
                    self.push_checked(now, engine, peer.key, of, verdict);
                }
            }
        }
        Ok(())
    }

    /// Ends whatever stands.
    pub(crate) fn end_all(&mut self, now: Time, cause: &Cause) {
        self.leases.retract_all();
        self.expects.cancel_all(now, cause);
    }
}

/// A push that does not count. The error says why its sender cannot be trusted any more.
pub(crate) fn not_counted(request: &RequestId, refusal: &PushRefusal) -> Result<(), String> {
    match refusal {
        // It has had no ticket for what it says it has done, or contradicts itself.
        PushRefusal::NotASender | PushRefusal::OtherRails { .. } => {
            Err(format!("push done: {refusal}"))
        }
        _ => {
            debug!(%request, %refusal, "push not counted");
            Ok(())
        }
    }
}

/// What a refused producer is told.
pub(crate) fn reason(refusal: PushRefusal) -> Refusal {
    match refusal {
        PushRefusal::UnknownRequest => Refusal::UnknownRequest,
        PushRefusal::WrongNonce | PushRefusal::Late => Refusal::Late,
        PushRefusal::SendersFull { .. }
        | PushRefusal::NotASender
        | PushRefusal::OtherRails { .. }
        | PushRefusal::Immediates { .. } => Refusal::NotAuthorised,
    }
}

fn refuse(peer: &PeerSession, request: RequestId, nonce: Option<Nonce>, reason: Refusal) {
    debug!(%request, ?reason, peer = %peer.name.engine, "push refused");
    peer.link.send(revoke(
        request,
        nonce.unwrap_or(NO_TICKET),
        &Cause::Refused { reason },
    ));
}

/// Tells a producer to stop a push.
pub(crate) fn revoke(request: RequestId, nonce: Nonce, cause: &Cause) -> Message {
    Revoke {
        request,
        nonce,
        cause: pack_cause(cause),
    }
    .into()
}

/// A cause as it travels; one that cannot be encoded travels as nothing and is read as `Aborted`.
pub(crate) fn pack_cause(cause: &Cause) -> Blob {
    Blob::pack("cause", cause).unwrap_or_default()
}
