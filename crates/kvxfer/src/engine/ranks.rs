//! Requests that are spread over the ranks of a remote engine: one transfer with a part for each of
//! those that keep something of it.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::Inner;
use super::books::NO_TICKET;
use super::handle::Transfer;
use super::instance::Instance;
use super::joint::{Joint, Told, Whole};
use super::peer::{Peer, PlannedPull, PullOptions, verified};
use super::peer_session::{PeerSession, in_order};
use super::push::{Layer, PushOptions, Pushing, Waiting};
use crate::block_set::BlockSet;
use crate::blocks::GroupBlocks;
use crate::error::Error;
use crate::ids::{Nonce, RequestId};
use crate::layout::Side;
use crate::mem::gpu::Event;
use crate::plan::{Compiled, Cover, LayerScope, Part, SideName, UnitPairs};
use crate::sums::Summed;
use crate::ticket::Ticket;
use crate::transfer::{Cause, TransferId};
use crate::wire::Release;

impl Inner {
    /// This rank's own side of a comparison.
    pub(crate) fn side(&self) -> Side<'_> {
        Side {
            format: &self.format,
            placement: self.placement.desc(),
        }
    }
}

impl Joint {
    /// The handle of the transfer.
    fn transfer(self: &Arc<Self>, engine: &Inner) -> Transfer {
        // Its parts hold it while they run: a handle that is kept keeps nothing else.
        let joint = Arc::downgrade(self);
        Transfer {
            id: TransferId(engine.runtime.next_id()),
            shared: Arc::clone(self.shared()),
            canceller: Arc::new(move |_| {
                if let Some(joint) = joint.upgrade() {
                    joint.cancel();
                }
            }),
            health: Arc::clone(&engine.runtime.health),
        }
    }

    fn told(self: &Arc<Self>, at: usize) -> Told {
        Told::Part {
            joint: Arc::clone(self),
            at,
        }
    }

    /// A part that was submitted can be cancelled with the others from here on.
    fn runs(&self, peer: &PeerSession, owner: u16, id: TransferId) {
        if let Some(worker) = peer.all_workers.get(usize::from(owner)) {
            self.submitted(id, worker);
        }
    }
}

/// Checks that these are tickets of different ranks of one data-parallel rank, all for this request.
fn of_one_request(request: &RequestId, tickets: &[Ticket]) -> Result<(), Error> {
    for (at, ticket) in tickets.iter().enumerate() {
        let earlier = tickets.get(..at).unwrap_or_default();
        if ticket.request != *request {
            return Err(Error::TicketsDiffer {
                first: request.clone(),
                other: ticket.request.clone(),
            });
        }
        if earlier.iter().any(|t| t.rank == ticket.rank) {
            return Err(Error::TicketTwice {
                request: request.clone(),
                rank: ticket.rank,
            });
        }
        if let Some(first) = earlier.iter().find(|t| t.rank.dp != ticket.rank.dp) {
            return Err(Error::OtherReplica {
                first: first.rank,
                other: ticket.rank,
            });
        }
    }
    Ok(())
}

/// The destination blocks of several parts, each once.
#[derive(Default)]
struct Destinations {
    groups: Vec<GroupBlocks>,
}

impl Destinations {
    fn add(&mut self, part: &[UnitPairs]) {
        for pairs in part {
            let (group, blocks) = (pairs.group(), pairs.blocks());
            match self.groups.iter_mut().find(|of| of.group == group) {
                None => self.groups.push(GroupBlocks {
                    group,
                    blocks: blocks.to_vec(),
                }),
                // Every part writes the same blocks, as a rule.
                Some(of) if of.blocks == blocks => {}
                Some(of) => {
                    let mut known = BlockSet::default();
                    // Listed once so far.
                    let _ = known.insert_all(group, &of.blocks);
                    let fresh = blocks.iter().filter(|id| !known.contains(group, **id));
                    of.blocks.extend(fresh);
                }
            }
        }
    }
}

impl Instance {
    /// Reads a request's blocks from all ranks that keep a part of them, into this rank's `blocks`: the
    /// way to pull where the two engines are cut into ranks differently, or into blocks of other sizes.
    ///
    /// `tickets` are those of the ranks' offers, one each, in any order; one of a rank that has nothing
    /// for this one is ignored. (A rank offers for as many readers as
    /// [`takers`](crate::layout::reshard::takers) lists.) Both the tickets' blocks and `blocks` are in
    /// token order and begin at the same token. `tokens` says which of them are wanted, counted from
    /// there; `None`: all. Its start must lie on a boundary of blocks that both sides have; its end is
    /// rounded up to one. Where a sliding window begins the lists do not say: its blocks can be pulled
    /// where both sides' are of one size, and only all of them.
    ///
    /// It is one transfer: one outcome, when the last part is done or the first has failed, and one
    /// event, with the nonce of the first ticket. After a failure the memory is free when nothing of
    /// any part can touch it. Where several ranks keep the same, each reader takes it from one of
    /// them ([`layout::reshard`](crate::layout::reshard) says which).
    ///
    /// # Errors
    ///
    /// [`Error::MissingPart`] if the ranks of these tickets do not keep all that this rank needs;
    /// [`Error::TicketsDiffer`], [`Error::TicketTwice`], [`Error::OtherReplica`] if they are not those of
    /// the ranks of one engine (and data-parallel rank) for one request; [`Error::Window`]; and as
    /// [`pull`](Self::pull).
    pub fn pull_ranks(
        &self,
        tickets: &[Ticket],
        blocks: &[GroupBlocks],
        tokens: Option<Range<u64>>,
        options: PullOptions,
    ) -> Result<Transfer, Error> {
        let first = tickets.first().ok_or(Error::NoRanks)?;
        of_one_request(&first.request, tickets)?;
        let engine = Arc::clone(
            self.peers()
                .first()
                .map(Peer::engine)
                .ok_or(Error::NoRanks)?,
        );
        engine.check_reader(&options)?;
        let mut sessions = Vec::with_capacity(tickets.len());
        let mut away = None;
        for ticket in tickets {
            match self.maker_of(ticket)?.pulls_with(ticket) {
                Ok(session) => sessions.push((session, ticket)),
                // It may not be needed.
                Err(error @ Error::NotConnected { .. }) => away = Some(error),
                Err(error) => return Err(error),
            }
        }
        let mut covers = Vec::with_capacity(sessions.len());
        for (session, _) in &sessions {
            covers.push(session.pull_plans()?.share.cover());
        }
        if let Some(part) = Cover::missing(&engine.side(), &covers) {
            return Err(away.unwrap_or(Error::MissingPart {
                part: Box::new(part),
                ranks: tickets.iter().map(|ticket| ticket.rank).collect(),
            }));
        }
        let mut parts = Vec::with_capacity(sessions.len());
        let mut releases = Vec::with_capacity(sessions.len());
        let mut written = Destinations::default();
        for (session, ticket) in &sessions {
            let begun = Instant::now();
            let share = &session.pull_plans()?.share;
            if share.is_empty() {
                continue;
            }
            let groups = blocks.iter().map(|dst| dst.group);
            let lists = (ticket.groups.as_slice(), blocks);
            let pairs = in_order((share, &engine.format), groups, lists, tokens.as_ref())?;
            written.add(&pairs);
            let limits = session.unit_limits(share, &pairs);
            let plan = share.plan_units(&pairs, LayerScope::All, limits)?;
            let side = (SideName::Consumer, Part::Share);
            let summed = verified(&engine, session, side, options.verify)?;
            let mut part = PlannedPull::new(session, ticket, plan, summed, begun)?;
            part.comes_with(&options);
            parts.push(part);
            if !options.hold {
                let (request, nonce) = (ticket.request.clone(), ticket.nonce);
                releases.push((Arc::clone(session), Release { request, nonce }));
            }
        }
        let whole = Whole {
            request: first.request.clone(),
            nonce: first.nonce,
            tag: options.tag,
            push: false,
            releases,
        };
        let until = engine.deadline(options.deadline);
        let joint = Joint::new(&engine, whole, parts.len(), written.groups)?;
        if parts.is_empty() {
            joint.is_nothing();
        }
        for (at, part) in parts.into_iter().enumerate() {
            if joint.is_cancelled() {
                joint.not_begun(at, Cause::Cancelled);
                continue;
            }
            let peer = Arc::clone(part.peer());
            // The releases follow the outcome of all parts: after a failure all may be tried again.
            // A part that is not taken, because its session has just gone, has told the others so.
            if let Ok((id, owner)) =
                part.submit(&engine, joint.told(at), (options.tag, until, false))
            {
                joint.runs(&peer, owner, id);
            }
        }
        Ok(joint.transfer(&engine))
    }

    /// The data-parallel rank that a push is for: that of its tickets, or the only one.
    fn replica(&self, tickets: &[Ticket]) -> Result<u32, Error> {
        let first = self.peers().first().ok_or(Error::NoRanks)?.rank().dp;
        match tickets.first() {
            Some(ticket) => Ok(ticket.rank.dp),
            None if self.peers().iter().all(|peer| peer.rank().dp == first) => Ok(first),
            None => Err(Error::SeveralRanks {
                operation: "begin_push_ranks without tickets",
                engine: self.engine_id(),
                ranks: self.peers().iter().map(Peer::rank).collect(),
            }),
        }
    }

    /// Begins to push a request to all ranks that keep a part of what this rank has: the way to push
    /// where the two engines are cut into ranks differently, or into blocks of other sizes. The ranks
    /// that take nothing from this one are left out.
    ///
    /// Each consumer rank [expects](super::Engine::expect) as many `senders` as producer ranks have a
    /// part for it ([`layout::reshard`](crate::layout::reshard) counts both). `tickets`: those that
    /// have come by another way; without any the instance must be of one data-parallel rank, and with them
    /// it is pushed to theirs.
    ///
    /// # Errors
    ///
    /// [`Error::NothingToPush`] if no rank takes anything from this one; those of
    /// [`pull_ranks`](Self::pull_ranks) for tickets; [`Error::SeveralRanks`]; and as
    /// [`begin_push_with`](Self::begin_push_with).
    pub fn begin_push_ranks(
        &self,
        request: &RequestId,
        tickets: &[Ticket],
        options: &PushOptions,
    ) -> Result<RanksPush, Error> {
        Inner::check_request(request)?;
        of_one_request(request, tickets)?;
        for ticket in tickets {
            self.maker_of(ticket)?.expects(ticket)?;
        }
        let dp = self.replica(tickets)?;
        let engine = self
            .peers()
            .first()
            .map(Peer::engine)
            .ok_or(Error::NoRanks)?;
        let mut parts = Vec::new();
        for peer in self.peers().iter().filter(|peer| peer.rank().dp == dp) {
            let session = peer.session()?;
            let plans = session.push_plans(engine)?;
            if plans.share.is_empty() {
                continue;
            }
            if engine.pushes.is_under_way(session.key, request) {
                return Err(Error::PushUnderWay {
                    request: request.clone(),
                });
            }
            // What the consumer takes it for: it goes by the same rule.
            let side = (SideName::Producer, plans.alone_part());
            let summed = verified(engine, &session, side, options.verify)?;
            let plans = (plans.alone().clone(), summed);
            let ticket = tickets.iter().find(|ticket| ticket.rank == peer.rank());
            parts.push((session, plans, ticket.map(|ticket| ticket.nonce)));
        }
        if parts.is_empty() {
            return Err(Error::NothingToPush {
                rank: engine.rank(),
                engine: self.engine_id(),
            });
        }
        let whole = Whole {
            request: request.clone(),
            nonce: tickets.first().map_or(NO_TICKET, |ticket| ticket.nonce),
            tag: options.tag,
            push: true,
            releases: Vec::new(),
        };
        let joint = Joint::new(engine, whole, parts.len(), Vec::new())?;
        let mut push = RanksPush {
            engine: Arc::clone(engine),
            parts: Vec::with_capacity(parts.len()),
            joint: Arc::clone(&joint),
            over: false,
        };
        for (at, (session, share, nonce)) in parts.into_iter().enumerate() {
            if joint.is_cancelled() {
                joint.not_begun(at, Cause::Cancelled);
                continue;
            }
            match push.begin_part(at, session, request, (nonce, options), share) {
                Err(error) if at == 0 && !joint.has_ended(at) => {
                    push.over = true;
                    return Err(error);
                }
                // Its session has just gone, of which it has told the others; or somebody has begun
                // another push of the request meanwhile.
                Err(_) => joint.not_begun(at, Cause::Aborted),
                Ok(()) => {}
            }
        }
        Ok(push)
    }
}

/// A push to several ranks under way, made by [`Instance::begin_push_ranks`]. Dropping it without
/// [`commit`](Self::commit) aborts it.
///
/// It is one transfer: one outcome and one event, [`Sent`](crate::event::Event::Sent) when every rank
/// has all of its part. The first part that fails ends the others.
#[derive(Debug)]
pub struct RanksPush {
    engine: Arc<Inner>,
    parts: Vec<Arc<Pushing>>,
    joint: Arc<Joint>,
    over: bool,
}

impl RanksPush {
    fn begin_part(
        &mut self,
        at: usize,
        session: Arc<PeerSession>,
        request: &RequestId,
        how: (Option<Nonce>, &PushOptions),
        share: (Compiled, Option<(Part, Arc<Summed>)>),
    ) -> Result<(), Error> {
        let told = self.joint.told(at);
        let peer = Arc::clone(&session);
        let part = Pushing::begin(&self.engine, session, request, how, share, told)?;
        self.joint.runs(&peer, part.owner(), part.id());
        self.parts.push(part);
        Ok(())
    }

    /// Writes one layer's blocks to every rank that keeps a part of it; `layer` counts over the whole
    /// model. `src` are this rank's blocks of the request in token order, from the token at which the
    /// consumers' tickets begin; `tokens` says which of them are to be written, counted from there
    /// (chunked prefill), and `None` all. Its start must lie on a boundary of blocks that both sides
    /// have; its end is rounded up to one. They are read when `event` has been reached, as in
    /// [`Push::layer`](super::Push::layer). Nothing is written twice, for nothing orders two writes: keep
    /// the tokens of a block that is not full for a later call. A slot of a recurrent state moves whole,
    /// so name its group in one call, when it has its last content.
    ///
    /// # Errors
    ///
    /// [`Error::WrittenTwice`], [`Error::Window`], [`Error::Plan`], [`Error::PushEnded`]. Some of the ranks may
    /// have taken the layer by then: abort the push. What does not fit a ticket that has yet to come ends
    /// the push later, with [`Refusal::OutOfRange`](crate::transfer::Refusal::OutOfRange).
    pub fn layer(
        &self,
        layer: u32,
        src: &[GroupBlocks],
        tokens: Option<Range<u64>>,
        event: Option<&Event>,
    ) -> Result<(), Error> {
        let window = self.engine.placement.desc().topology().layers;
        if !window.contains(layer) {
            return Err(crate::plan::PlanError::LayerNotHere { layer, window }.into());
        }
        self.write(LayerScope::Layer(layer), src, tokens, event)
    }

    /// Writes all layers' blocks at once.
    ///
    /// # Errors
    ///
    /// As [`layer`](Self::layer).
    pub fn all_layers(
        &self,
        src: &[GroupBlocks],
        tokens: Option<Range<u64>>,
        event: Option<&Event>,
    ) -> Result<(), Error> {
        self.write(LayerScope::All, src, tokens, event)
    }

    fn write(
        &self,
        scope: LayerScope,
        src: &[GroupBlocks],
        tokens: Option<Range<u64>>,
        event: Option<&Event>,
    ) -> Result<(), Error> {
        let layer = Layer::new(Waiting::InOrder(scope, src.to_vec(), tokens), event);
        for part in &self.parts {
            if let LayerScope::Layer(number) = scope
                && !part.has_layer(number)
            {
                continue;
            }
            part.layer(&self.engine, layer.clone())?;
        }
        Ok(())
    }

    /// Says that nothing follows. The transfer is done when every byte has been confirmed.
    ///
    /// # Errors
    ///
    /// [`Error::Forked`]. What else goes wrong is the transfer's outcome.
    pub fn commit(mut self) -> Result<Transfer, Error> {
        self.engine.runtime.health.check_process()?;
        self.over = true;
        for part in &self.parts {
            part.commit();
        }
        Ok(self.joint.transfer(&self.engine))
    }

    /// Gives the push up: each consumer's expectation fails. The transfer's outcome is a failure with
    /// [`Cause::Cancelled`].
    pub fn abort(mut self) -> Transfer {
        self.give_up();
        self.joint.transfer(&self.engine)
    }

    fn give_up(&mut self) {
        self.over = true;
        if self.engine.runtime.health.is_forked() {
            // Nor may the child be the last to let go of what its parent uses.
            return std::mem::forget((Arc::clone(&self.engine), Arc::clone(&self.joint)));
        }
        for part in &self.parts {
            part.abort();
        }
    }
}

impl Drop for RanksPush {
    fn drop(&mut self) {
        if !self.over {
            self.give_up();
        }
    }
}
