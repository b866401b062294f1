//! What an engine has offered and what it expects, and the messages of its peers. The product holds
//! one lock over it, so each call is one step here.

use kvxfer::event::PeerName;
use kvxfer::expects::{ExpectOutput, PushRefusal, Sender};
use kvxfer::ids::{Nonce, Rank, RequestId};
use kvxfer::leases::{LeaseOutput, ReleaseAnswer};
use kvxfer::plan::Cover;
use kvxfer::rails::RailSet;
use kvxfer::ticket::Ticket;
use kvxfer::time::Time;
use kvxfer::transfer::{Cause, Notice, PeerKey, Refusal};
use kvxfer::wire::{
    Announce, Blob, Message, PushAborted, PushClosed, PushDone, PushStart, QpReset, Release, Revoke,
};

use super::bug::{Bug, Step, Violation, ensure};
use super::worker::Cmd;
use super::world::{Life, World, log};

/// What a push without a ticket names as its try.
pub(crate) const NO_TICKET: Nonce = Nonce(0);

pub(crate) fn pack_cause(cause: &Cause) -> Blob {
    Blob::pack("cause", cause).unwrap_or_default()
}

fn reason(refusal: PushRefusal) -> Refusal {
    match refusal {
        PushRefusal::WrongNonce | PushRefusal::Late => Refusal::Late,
        PushRefusal::SendersFull { .. } | PushRefusal::NotASender => Refusal::NotAuthorised,
        _ => Refusal::UnknownRequest,
    }
}

impl World {
    /// Does something with the ledgers and carries out what follows from it.
    pub(crate) fn books_do<R>(
        &mut self,
        life: usize,
        act: impl FnOnce(&mut Life, Time) -> R,
    ) -> Result<R, Violation> {
        let now = self.clock(life);
        let answer = act(&mut self.lives[life], now);
        self.carry_out(life)?;
        Ok(answer)
    }

    pub(crate) fn books_keep_time(&mut self, life: usize) -> Step {
        if self.bug == Bug::DeafBooks {
            return Ok(());
        }
        self.expectations_due(life);
        self.books_do(life, |books, now| {
            books.leases.on_time(now);
            books.expects.on_time(now);
        })
    }

    /// Every call with the time ends what is due before anything else.
    fn expectations_due(&mut self, life: usize) {
        let now = self.clock(life);
        for expected in self.lives[life].expected.values_mut() {
            if !expected.ended && expected.deadline <= now {
                expected.reason.get_or_insert(Cause::DeadlinePassed);
            }
        }
    }

    fn carry_out(&mut self, life: usize) -> Step {
        let mut late = Vec::new();
        while let Some(output) = self.lives[life].leases.poll_output() {
            match output {
                LeaseOutput::Flip { slot, word } => {
                    if self.bug == Bug::FlipTooLate {
                        late.push((slot, word));
                        continue;
                    }
                    self.lives[life].table[slot as usize] = word;
                }
                LeaseOutput::Released {
                    request,
                    nonce,
                    reason,
                    ..
                } => {
                    self.on_offer_released(life, &request, nonce, reason)?;
                    if self.bug == Bug::ReleasedTwice {
                        self.on_offer_released(life, &request, nonce, reason)?;
                    }
                }
                other => ensure!(false, EndsOnce, "{other:?} is not known"),
            }
        }
        // The planted fault: the slot is turned over when the blocks have long been used again.
        self.lives[life].late_flips.extend(late);
        while let Some(output) = self.lives[life].expects.poll_output() {
            match output {
                ExpectOutput::Received { request, nonce, .. } => {
                    self.lives[life].tickets.remove(&request);
                    self.on_received(life, nonce)?;
                }
                ExpectOutput::Failed {
                    request,
                    nonce,
                    cause,
                    memory,
                    ..
                } => {
                    self.lives[life].tickets.remove(&request);
                    self.on_expect_failed(life, nonce, &cause, memory)?;
                }
                ExpectOutput::Revoke {
                    peer,
                    request,
                    nonce,
                } => {
                    if let Some(&peer) = self.lives[life].up.get(&peer) {
                        self.send(peer, revoke(request, nonce, &Cause::Revoked));
                    }
                }
                ExpectOutput::ForceReset { peer } => {
                    self.sum.count("producer cut off");
                    match self.lives[life].up.get(&peer).copied() {
                        _ if self.bug == Bug::ResetTooSoon => {
                            self.lives[life].expects.peer_reset(peer);
                        }
                        Some(peer) => {
                            self.peer_fails(peer, Cause::LaneReset);
                            self.drop_lanes(peer);
                        }
                        None if self.lives[life].draining.contains(&peer) => {}
                        None => self.lives[life].expects.peer_reset(peer),
                    }
                }
                ExpectOutput::Released { nonce, .. } => self.on_expect_released(life, nonce)?,
                other => ensure!(false, EndsOnce, "{other:?} is not known"),
            }
        }
        Ok(())
    }

    /// An expectation stands: producers that asked for it get their tickets.
    pub(crate) fn announce(&mut self, life: usize, ticket: &Ticket) -> Step {
        let books = &mut self.lives[life];
        books.tickets.insert(ticket.request.clone(), ticket.clone());
        let asked: Vec<PeerKey> = books
            .wanted
            .extract_if(.., |(request, _)| *request == ticket.request)
            .map(|(_, peer)| peer)
            .collect();
        for key in asked {
            if let Some(&peer) = self.lives[life].up.get(&key) {
                self.answer_with_ticket(life, peer, ticket);
            }
        }
        self.carry_out(life)
    }

    fn push_started(
        &mut self,
        life: usize,
        peer: usize,
        request: RequestId,
        nonce: Option<Nonce>,
    ) -> Step {
        self.expectations_due(life);
        self.books_do(life, |books, now| books.expects.on_time(now))?;
        match self.lives[life].tickets.get(&request).cloned() {
            Some(ticket) if nonce.is_none_or(|nonce| nonce == ticket.nonce) => {
                self.answer_with_ticket(life, peer, &ticket);
            }
            Some(_) => self.refuse_push(peer, request, nonce, Refusal::Late),
            None if nonce.is_some() => self.refuse_push(peer, request, nonce, Refusal::Late),
            None => {
                let key = self.peers[peer].key;
                self.lives[life].wanted.push((request, key));
            }
        }
        self.carry_out(life)
    }

    fn answer_with_ticket(&mut self, life: usize, peer: usize, ticket: &Ticket) {
        let (key, name) = (self.peers[peer].key, self.name_of(peer));
        // Every model engine has one rank, and all of each block.
        let who = Sender {
            name: &name,
            cover: &Cover::default(),
        };
        let bound = self.lives[life]
            .expects
            .announce(&ticket.request, ticket.nonce, key, who);
        match bound {
            Ok(()) => {
                if let Some(expected) = self.lives[life].expected.get_mut(&ticket.nonce.0) {
                    expected.bind(key);
                }
                let mut ticket = ticket.clone();
                ticket.generation.0[0] ^= u8::from(self.bug == Bug::ForgedTicket);
                let ticket = Blob(ticket.to_bytes().unwrap_or_default());
                self.send(peer, Announce { ticket }.into());
            }
            Err(refusal) => {
                let (request, nonce) = (ticket.request.clone(), Some(ticket.nonce));
                self.refuse_push(peer, request, nonce, reason(refusal));
            }
        }
    }

    fn name_of(&self, peer: usize) -> PeerName {
        PeerName {
            engine: format!("engine-{}", self.peers[peer].slot).as_str().into(),
            rank: Rank::default(),
        }
    }

    fn refuse_push(
        &mut self,
        peer: usize,
        request: RequestId,
        nonce: Option<Nonce>,
        reason: Refusal,
    ) {
        self.sum.count("push refused");
        let cause = Cause::Refused { reason };
        self.send(peer, revoke(request, nonce.unwrap_or(NO_TICKET), &cause));
    }

    fn push_closed(
        &mut self,
        life: usize,
        key: PeerKey,
        request: &RequestId,
        nonce: Nonce,
    ) -> Step {
        if nonce == NO_TICKET {
            let wanted = &mut self.lives[life].wanted;
            let asked = |(name, k): &(RequestId, PeerKey)| *k == key && name == request;
            if let Some(at) = wanted.iter().position(asked) {
                wanted.remove(at);
            }
            return Ok(());
        }
        self.cards_catch_up(life)?;
        self.expectations_due(life);
        if let Some(expected) = self.lives[life].expected.get_mut(&nonce.0)
            && expected.close(key)
            && !expected.ended
        {
            expected.reason.get_or_insert(Cause::Aborted);
        }
        // What does not fit is told nobody.
        let _ = self.books_do(life, |books, now| {
            books.expects.push_closed(now, request, nonce, key)
        })?;
        Ok(())
    }

    /// A peer's message. The inner error says why it cannot be trusted.
    pub(crate) fn on_message(
        &mut self,
        peer: usize,
        message: Message,
    ) -> Result<Result<(), String>, Violation> {
        let (life, key) = (self.peers[peer].life, self.peers[peer].key);
        log!(self, "life {life} hears {}", message.kind());
        match message {
            Message::Release(Release { request, nonce }) => {
                let name = self.name_of(peer);
                let answer = self.books_do(life, |books, _| {
                    books.leases.release(&request, nonce, &name)
                })?;
                if answer == ReleaseAnswer::Late {
                    self.sum.count("release: late");
                }
            }
            Message::QpReset(QpReset { lanes, .. }) => {
                for number in lanes {
                    let Some(lane) = self.peers[peer].lanes.get_mut(usize::from(number)) else {
                        return Ok(Err("no such lane".to_owned()));
                    };
                    let qp = lane.qp;
                    if std::mem::replace(&mut lane.down_there, true) {
                        return Ok(Err("lane reset twice".to_owned()));
                    }
                    let w = self.qps[qp].worker;
                    self.command(life, w, Cmd::LaneReset { peer, qp });
                    self.lane_is_down(peer, usize::from(number));
                }
            }
            Message::PushStart(PushStart { request, nonce }) => {
                self.push_started(life, peer, request, nonce)?;
            }
            Message::Announce(Announce { ticket }) => match Ticket::from_bytes(&ticket.0) {
                Ok(ticket) if ticket.generation == self.peers[peer].generation => {
                    self.push_announced(life, peer, &ticket)?;
                }
                Ok(_) => return Ok(Err("ticket of another engine".to_owned())),
                Err(error) => return Ok(Err(error.to_string())),
            },
            Message::PushDone(PushDone {
                request,
                nonce,
                rails,
                rail,
                ..
            }) => {
                self.expectations_due(life);
                let whole = self.books_do(life, |books, _| {
                    (books.expects).rail_done(&request, nonce, key, (rails, rail))
                })?;
                match whole {
                    Ok(true) => {}
                    Ok(false) => {
                        self.sum.count("notice: over one rail of two");
                        return Ok(Ok(()));
                    }
                    Err(refusal @ PushRefusal::OtherRails { .. }) => {
                        return Ok(Err(refusal.to_string()));
                    }
                    Err(_) => {
                        self.sum.count("push done: too late");
                        return Ok(Ok(()));
                    }
                }
                if let Some(expected) = self.lives[life].expected.get_mut(&nonce.0) {
                    expected.close(key);
                }
                let counted = self.books_do(life, |books, now| {
                    books.expects.push_done(now, &request, nonce, key, |_| None)
                })?;
                if counted.is_err() {
                    self.sum.count("push done: too late");
                }
            }
            Message::PushAborted(PushAborted { request, nonce, .. })
            | Message::PushClosed(PushClosed { request, nonce, .. }) => {
                self.push_closed(life, key, &request, nonce)?;
            }
            Message::Revoke(revoke) => {
                let cause = revoke.cause.unpack::<Cause>("cause");
                let cause = cause.unwrap_or(Cause::Revoked);
                self.push_revoked(life, peer, &revoke.request, revoke.nonce, &cause)?;
            }
            _ => {}
        }
        Ok(Ok(()))
    }

    /// What the other side of a transfer is told of its end.
    pub(crate) fn notice_messages(
        &self,
        peer: usize,
        request: &RequestId,
        nonce: Nonce,
        notice: &Notice,
    ) -> Vec<Message> {
        let (request, sender) = (request.clone(), Rank::default());
        match notice {
            Notice::Release => vec![Release { request, nonce }.into()],
            Notice::PushDone { wrote } => {
                let rails = self.rails_to_speak_for(peer, *wrote);
                let done = |rail| PushDone {
                    request: request.clone(),
                    nonce,
                    sender,
                    bytes: 0,
                    sums: 0,
                    rails,
                    rail,
                };
                rails.iter().map(|rail| done(rail).into()).collect()
            }
            Notice::PushAborted { cause } => {
                let cause = pack_cause(cause);
                let closed = PushClosed {
                    request,
                    nonce,
                    sender,
                    cause,
                };
                vec![closed.into()]
            }
        }
    }

    fn rails_to_speak_for(&self, peer: usize, wrote: RailSet) -> RailSet {
        match wrote.iter().next() {
            Some(_) if self.peers[peer].notices && self.bug != Bug::OneRailTells => wrote,
            Some(first) => RailSet::only(first),
            None => {
                let works = self.peers[peer].lanes.iter().find(|lane| !lane.failed);
                RailSet::only(works.map_or(0, |lane| self.qps[lane.qp].rail) as u16)
            }
        }
    }

    /// Says that nothing of a push is under way.
    pub(crate) fn close_push(&mut self, peer: usize, request: &RequestId, nonce: Nonce) {
        let cause = Cause::Revoked;
        for message in self.notice_messages(peer, request, nonce, &Notice::PushAborted { cause }) {
            self.send(peer, message);
        }
    }

    /// Ends everything that is under way: the engine's author drops it.
    pub(crate) fn shut_down(&mut self, life: usize) -> Step {
        for expected in self.lives[life].expected.values_mut() {
            if !expected.ended {
                expected.reason.get_or_insert(Cause::ShuttingDown);
            }
        }
        self.books_do(life, |books, now| {
            books.leases.retract_all();
            books.expects.cancel_all(now, &Cause::ShuttingDown);
        })?;
        self.close_links(life);
        for peer in self.lives[life].up.values().copied().collect::<Vec<_>>() {
            self.links[self.peers[peer].link]
                .first_cause
                .get_or_insert(Cause::ShuttingDown);
            self.lose(peer, &Cause::ShuttingDown)?;
        }
        Ok(())
    }
}

fn revoke(request: RequestId, nonce: Nonce, cause: &Cause) -> Message {
    let cause = pack_cause(cause);
    Revoke {
        request,
        nonce,
        cause,
    }
    .into()
}
