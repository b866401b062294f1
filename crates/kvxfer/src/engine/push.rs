//! Pushes: a producer writes a request layer by layer, and may begin before the consumer expects
//! it.

mod links;
mod queue;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::debug;

pub use queue::GpuQueue;
pub(crate) use queue::{NotPosted, PostedAll, PutAll, SharedQueue, attached};

use super::Inner;
use super::books::NO_TICKET;
use super::handle::{Shared, Transfer, TransferReport};
use super::joint::Told;
use super::moves::{Moved, Moves};
use super::peer::{count_sums, in_ticket, sums_of, transfer, verified};
use super::peer_session::{PeerSession, in_order};
use super::queues::Queues;
use super::verify::Verification;
use super::worker::{Command, Live};
use super::written::{Place, Written};
use crate::block_set::BlockSet;
use crate::blocks::{GroupBlocks, GroupPairs};
use crate::claims::{BlockInUse, Claim, Purpose};
use crate::error::Error;
use crate::ids::{Nonce, RequestId};
use crate::mem::gpu::Event;
use crate::plan::{Compiled, LayerScope, Part, Plan, Posted, SideName};
use crate::recent::Recent;
use crate::sums::Summed;
use crate::ticket::Ticket;
use crate::transfer::{Cause, Kind, PeerKey, Refusal, Spec, TransferId};
use crate::wire::{LinksRefused, PushClosed, PushStart};

/// Settings of one push.
#[derive(Debug, Clone, Default)]
pub struct PushOptions {
    /// Comes back with the events.
    pub tag: u64,
    /// How long the push may take from its beginning, prefill included; `None`: the configured
    /// `transfer_timeout`.
    pub deadline: Option<Duration>,
    /// The consumer's ticket, if it has come by another way.
    pub ticket: Option<Ticket>,
    /// Whether the consumer is told checksums of what is written, and compares them before it counts the
    /// push; `None`: as [`Config::verify`](crate::config::Config::verify) says. A block that differs
    /// fails the consumer's expectation with [`Cause::Corrupt`]; the push itself is done all the same.
    /// Both sides read the blocks once more for that.
    pub verify: Option<bool>,
}

/// Blocks to write, that may have to wait for the ticket; and the kernels' work that comes first.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) blocks: Waiting,
    pub(crate) after: Option<Event>,
}

impl Layer {
    pub(crate) fn new(blocks: Waiting, after: Option<&Event>) -> Self {
        let after = after.cloned();
        Self { blocks, after }
    }
}

/// What of the blocks, and which.
#[derive(Debug, Clone)]
pub(crate) enum Waiting {
    Pairs(LayerScope, Vec<GroupPairs>),
    InOrder(LayerScope, Vec<GroupBlocks>, Option<Range<u64>>),
}

#[derive(Debug)]
enum Stage {
    /// The consumer has not sent the ticket.
    Asked {
        waiting: Vec<Layer>,
        committed: bool,
    },
    /// Layers go straight to the worker.
    Open(Arc<Ticket>),
    /// Committed, aborted, or failed; and whether its ticket had come.
    Ended { opened: bool },
}

impl Stage {
    fn end(&mut self) {
        let opened = matches!(self, Stage::Open(_) | Stage::Ended { opened: true });
        *self = Stage::Ended { opened };
    }
}

/// A push as the engine and its handle share it.
#[derive(Debug)]
pub(crate) struct Pushing {
    id: TransferId,
    owner: u16,
    request: RequestId,
    peer: Arc<PeerSession>,
    /// The try that it was begun for, where the ticket came by another way.
    asked_for: Option<Nonce>,
    /// What of the blocks it writes.
    plans: Compiled,
    /// What is summed of them, if checksums are told.
    summed: Option<Arc<Summed>>,
    /// How many checksums there are.
    sums: AtomicU64,
    stage: Mutex<Stage>,
    /// Something has come that a queue over links waits for: with the stage.
    heard: Condvar,
    /// Whether the consumer lets this side's kernels write, once it has said so.
    links: Mutex<Option<Result<(), LinksRefused>>>,
    sources: Mutex<Sources>,
    written: Mutex<Written>,
    /// What kernels post to.
    queues: Arc<Queues>,
}

/// The blocks that a push reads, where this rank is written to as well.
#[derive(Debug, Default)]
struct Sources {
    /// Those that are claimed: every layer reads the same ones.
    blocks: BlockSet,
    claims: Vec<Claim>,
}

/// The pushes of an engine that have not ended.
#[derive(Debug, Default)]
pub(crate) struct Pushes {
    table: Mutex<Table>,
}

/// How many tries of a peer are remembered that a push was opened for, or refused.
const REMEMBERED: usize = 4096;

#[derive(Debug, Default)]
struct Table {
    by_id: HashMap<TransferId, Arc<Pushing>>,
    /// One push of a request to a peer at a time: the consumer counts senders, not pushes.
    by_request: HashMap<(PeerKey, RequestId), TransferId>,
    /// A try is for one push: its end counts as the end of all that this side writes for it. By
    /// session: what one peer announces says nothing of another's tries.
    used: HashMap<PeerKey, Recent>,
}

impl Table {
    fn of(&self, peer: PeerKey, request: &RequestId) -> Option<Arc<Pushing>> {
        let id = self.by_request.get(&(peer, request.clone()))?;
        self.by_id.get(id).cloned()
    }

    fn is_used(&self, peer: PeerKey, request: &RequestId, nonce: Nonce) -> bool {
        let used = self.used.get(&peer);
        used.is_some_and(|used| used.contains(request, nonce))
    }
}

impl Pushes {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of(&self, peer: PeerKey, request: &RequestId) -> Option<Arc<Pushing>> {
        self.lock().of(peer, request)
    }

    /// Whether an earlier push of the request has not ended.
    pub(crate) fn is_under_way(&self, peer: PeerKey, request: &RequestId) -> bool {
        self.of(peer, request).is_some()
    }

    /// Takes a new push, unless an earlier one of the request has not ended.
    fn begin(&self, push: &Arc<Pushing>) -> Result<(), Error> {
        let mut table = self.lock();
        let Table {
            by_id, by_request, ..
        } = &mut *table;
        match by_request.entry((push.peer.key, push.request.clone())) {
            Entry::Occupied(_) => Err(Error::PushUnderWay {
                request: push.request.clone(),
            }),
            Entry::Vacant(free) => {
                free.insert(push.id);
                by_id.insert(push.id, Arc::clone(push));
                Ok(())
            }
        }
    }

    /// The consumer has sent a ticket.
    pub(crate) fn announced(&self, peer: &Arc<PeerSession>, ticket: Ticket) {
        let ticket = Arc::new(ticket);
        let (push, used) = {
            let mut table = self.lock();
            let used = table.is_used(peer.key, &ticket.request, ticket.nonce);
            let of_peer = table.used.entry(peer.key);
            of_peer
                .or_insert_with(|| Recent::new(REMEMBERED))
                .push(&ticket.request, ticket.nonce);
            (table.of(peer.key, &ticket.request), used)
        };
        match push {
            Some(push) if used => push.too_late(),
            Some(push) => push.open(&ticket),
            // Its end has been told, perhaps on the data plane, which this connection may overtake.
            None if used => {}
            None => {
                debug!(request = %ticket.request, "ticket for a push that has ended");
                close(peer, &ticket.request, ticket.nonce);
            }
        }
    }

    /// The consumer wants a push no more, or never did.
    pub(crate) fn revoked(
        &self,
        peer: &Arc<PeerSession>,
        request: &RequestId,
        nonce: Nonce,
        cause: Cause,
    ) {
        let mut known = false;
        if let Some(push) = self.of(peer.key, request) {
            let used = self.lock().is_used(peer.key, request, nonce);
            let stage = push.stage();
            let meant = match &*stage {
                Stage::Open(ticket) => ticket.nonce == nonce,
                // What an earlier push was opened for is not what this one waits for.
                Stage::Asked { .. } => push.asked_for.map_or(!used, |asked| asked == nonce),
                // Which try it was of is not kept; one that has ended has closed, or will.
                Stage::Ended { .. } => true,
            };
            drop(stage);
            if meant {
                known = true;
                push.send(Command::Fail {
                    id: push.id,
                    cause: cause.clone(),
                });
            }
        }
        if !known {
            close(peer, request, nonce);
        }
    }

    /// The workers fail the transfers themselves; what waits for tickets is dropped.
    pub(crate) fn peer_lost(&self, peer: PeerKey) {
        let of_peer = |push: &&Arc<Pushing>| push.peer.key == peer;
        let mut table = self.lock();
        let lost: Vec<Arc<Pushing>> = table.by_id.values().filter(of_peer).cloned().collect();
        // Its connection is over: it announces nothing any more.
        table.used.remove(&peer);
        drop(table);
        for push in lost {
            push.stage().end();
        }
    }

    /// Nothing of the push is posted, and the consumer has been told so.
    pub(crate) fn ended(&self, id: TransferId) {
        let push = {
            let mut table = self.lock();
            let push = table.by_id.remove(&id);
            if let Some(push) = &push {
                table
                    .by_request
                    .remove(&(push.peer.key, push.request.clone()));
            }
            push
        };
        if let Some(push) = push {
            // No layer comes after this, so no claim.
            push.stage().end();
            push.sources().claims.clear();
        }
    }
}

/// Says that nothing of a push is under way.
pub(crate) fn close(peer: &PeerSession, request: &RequestId, nonce: Nonce) {
    let sender = peer
        .engine
        .upgrade()
        .map(|engine| engine.rank())
        .unwrap_or_default();
    let cause = super::books::pack_cause(&Cause::Revoked);
    peer.link.send(
        PushClosed {
            request: request.clone(),
            nonce,
            sender,
            cause,
        }
        .into(),
    );
}

impl Pushing {
    /// Begins a push of what `plans` writes, for the try that a ticket has named if one has come.
    pub(crate) fn begin(
        engine: &Arc<Inner>,
        peer: Arc<PeerSession>,
        request: &RequestId,
        (nonce, options): (Option<Nonce>, &PushOptions),
        (plans, summed): (Compiled, Option<(Part, Arc<Summed>)>),
        told: Told,
    ) -> Result<Arc<Self>, Error> {
        let id = TransferId(engine.runtime.next_id());
        let owner = peer.owner(id);
        let verify = (summed.as_ref()).map(|(part, _)| Verification::new(*part, Vec::new()));
        let spec = Spec {
            id,
            peer: peer.key,
            kind: Kind::Push,
            verify: verify.is_some(),
            deadline: engine.deadline(options.deadline),
            workers: peer.worker_count(),
        };
        let stage = Stage::Asked {
            waiting: Vec::new(),
            committed: false,
        };
        let pushing = Arc::new(Self {
            id,
            owner,
            request: request.clone(),
            peer: Arc::clone(&peer),
            asked_for: nonce,
            queues: Queues::new((id, owner), &peer, &plans),
            plans,
            summed: summed.map(|(_, summed)| summed),
            sums: AtomicU64::new(0),
            stage: Mutex::new(stage),
            heard: Condvar::new(),
            links: Mutex::new(None),
            sources: Mutex::default(),
            written: Mutex::default(),
        });
        engine.pushes.begin(&pushing)?;
        let live = Box::new(Live {
            engine: Arc::clone(engine),
            peer: Arc::clone(&peer),
            told,
            request: request.clone(),
            nonce: nonce.unwrap_or(NO_TICKET),
            tag: options.tag,
            lease: None,
            push: true,
            submitted: engine.now(),
            jobs: Vec::new(),
            report: TransferReport::default(),
            verify,
            claim: None,
            reader: None,
            tells: false,
            into: None,
        });
        if let Err(error) = peer.submit(owner, spec, live) {
            engine.pushes.ended(id);
            return Err(error);
        }
        // Even with a ticket: the consumer keeps account of who may write.
        peer.link.send(
            PushStart {
                request: request.clone(),
                nonce,
            }
            .into(),
        );
        Ok(pushing)
    }

    pub(crate) fn id(&self) -> TransferId {
        self.id
    }

    /// The worker that owns it.
    pub(crate) fn owner(&self) -> u16 {
        self.owner
    }

    /// Whether it writes anything of this layer.
    pub(crate) fn has_layer(&self, layer: u32) -> bool {
        self.plans.layers().contains(layer)
    }

    /// Nothing follows.
    pub(crate) fn commit(&self) {
        let mut stage = self.stage();
        match &mut *stage {
            Stage::Asked { committed, .. } => *committed = true,
            Stage::Open(_) => {
                self.send(Command::Commit { id: self.id });
                stage.end();
            }
            Stage::Ended { .. } => {}
        }
    }

    /// Gives it up.
    pub(crate) fn abort(&self) {
        self.stage().end();
        self.send(Command::Abort { id: self.id });
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sources(&self) -> MutexGuard<'_, Sources> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims the blocks that a layer reads. The stage is held, so that a push that ends lets go of all.
    fn claim(&self, engine: &Inner, layer: &Waiting) -> Result<(), Error> {
        if !engine.config.kv_role.consumes() {
            return Ok(());
        }
        let desc = engine.placement.desc();
        let of = |group: u32, ids: &mut dyn Iterator<Item = u32>| {
            // What is out of range is refused when it is planned, if that has not been done.
            let known = desc.num_blocks(group).unwrap_or(0);
            GroupBlocks {
                group,
                blocks: ids.filter(|id| *id < known).collect(),
            }
        };
        let groups: Vec<GroupBlocks> = match layer {
            Waiting::Pairs(_, pairs) => pairs
                .iter()
                .map(|pairs| of(pairs.group, &mut pairs.pairs.iter().map(|pair| pair.src)))
                .collect(),
            Waiting::InOrder(_, src, _) => src
                .iter()
                .map(|src| of(src.group, &mut src.blocks.iter().copied()))
                .collect(),
        };
        let all = groups.iter();
        let all = all.flat_map(|of| of.blocks.iter().map(|block| (of.group, *block)));
        self.claim_sources(engine, all).map_err(Error::from)
    }

    /// Claims those of these blocks, by group, that it has not claimed; they are within the placement.
    fn claim_sources(
        &self,
        engine: &Inner,
        all: impl Iterator<Item = (u32, u32)>,
    ) -> Result<(), BlockInUse> {
        if !engine.config.kv_role.consumes() {
            return Ok(());
        }
        let mut sources = self.sources();
        let Sources { blocks, claims } = &mut *sources;
        let mut fresh: Vec<GroupBlocks> = Vec::new();
        for (group, block) in all.filter(|(group, block)| !blocks.contains(*group, *block)) {
            match fresh.iter_mut().find(|of| of.group == group) {
                Some(of) => of.blocks.push(block),
                None => fresh.push(GroupBlocks {
                    group,
                    blocks: vec![block],
                }),
            }
        }
        if fresh.is_empty() {
            return Ok(());
        }
        let claim = engine.claim_source(&self.request, Purpose::Push, || fresh.clone())?;
        claims.extend(claim);
        for of in fresh {
            for id in of.blocks {
                // A source may be listed twice.
                let _ = blocks.insert_all(of.group, &[id]);
            }
        }
        Ok(())
    }

    fn send(&self, command: Command) {
        if let Some(worker) = self.peer.all_workers.get(usize::from(self.owner)) {
            worker.send(command);
        }
    }

    /// The only ticket that has come is of a try that an earlier push has ended.
    fn too_late(&self) {
        let mut stage = self.stage();
        if let Stage::Asked { .. } = &*stage {
            let cause = Cause::Refused {
                reason: Refusal::Late,
            };
            self.send(Command::Fail { id: self.id, cause });
            stage.end();
        }
    }

    /// The ticket is here: what waited goes out.
    fn open(&self, ticket: &Arc<Ticket>) {
        let mut stage = self.stage();
        let (waiting, committed) = match &mut *stage {
            Stage::Asked { waiting, committed } => (std::mem::take(waiting), *committed),
            Stage::Ended { opened: false } => (Vec::new(), false),
            Stage::Open(_) | Stage::Ended { opened: true } => return,
        };
        // The worker says which try has ended: it alone knows whether it has said so before.
        self.send(Command::Ticket {
            id: self.id,
            ticket: Arc::clone(ticket),
            peer: Arc::clone(&self.peer),
        });
        if matches!(&*stage, Stage::Ended { .. }) {
            *stage = Stage::Ended { opened: true };
            return;
        }
        for Layer { blocks, after } in waiting {
            let begun = Instant::now();
            let plan = match &blocks {
                Waiting::Pairs(scope, pairs) => self.plan(ticket, *scope, pairs),
                Waiting::InOrder(scope, src, tokens) => {
                    self.plan_in_order(ticket, *scope, src, tokens.as_ref())
                }
            };
            match plan.and_then(|plan| self.count_sums(&plan).map(|()| plan)) {
                Ok(plan) => self.add(plan, after, begun),
                Err(error) => {
                    debug!(request = %self.request, %error, "push does not fit its ticket");
                    let reason = match error {
                        Error::TooManySums { .. } => Refusal::Sums,
                        _ => Refusal::OutOfRange,
                    };
                    let cause = Cause::Refused { reason };
                    self.send(Command::Fail { id: self.id, cause });
                    *stage = Stage::Ended { opened: true };
                    return;
                }
            }
        }
        if committed {
            self.send(Command::Commit { id: self.id });
            *stage = Stage::Ended { opened: true };
        } else {
            *stage = Stage::Open(Arc::clone(ticket));
            self.heard.notify_all();
        }
    }

    fn plan(
        &self,
        ticket: &Ticket,
        scope: LayerScope,
        pairs: &[GroupPairs],
    ) -> Result<Plan, Error> {
        for group in pairs {
            let dst = || group.pairs.iter().map(|pair| pair.dst);
            in_ticket(ticket, group.group, group.pairs.len(), dst)?;
        }
        self.compile(scope, pairs)
    }

    fn plan_in_order(
        &self,
        ticket: &Ticket,
        scope: LayerScope,
        src: &[GroupBlocks],
        tokens: Option<&Range<u64>>,
    ) -> Result<Plan, Error> {
        let engine = self.peer.engine.upgrade().ok_or(Error::ShuttingDown)?;
        let groups = src.iter().map(|src| src.group);
        let lists = (src, ticket.groups.as_slice());
        let pairs = in_order((&self.plans, &engine.format), groups, lists, tokens)?;
        let limits = self.peer.unit_limits(&self.plans, &pairs);
        Ok(self.plans.plan_units(&pairs, scope, limits)?)
    }

    fn compile(&self, scope: LayerScope, pairs: &[GroupPairs]) -> Result<Plan, Error> {
        let limits = self.peer.limits(&self.plans, pairs);
        Ok(self.plans.plan(pairs, scope, limits)?)
    }

    /// Counts the checksums of a plan that is to be handed over.
    fn count_sums(&self, plan: &Plan) -> Result<(), Error> {
        self.count_more_sums(|summed, before| sums_of(&self.request, plan, summed, before))
    }

    /// Counts those of what kernels have posted.
    fn count_posted(&self, posted: &Posted) -> Result<(), Error> {
        self.count_more_sums(|summed, before| {
            let counts = posted.counts();
            let counts =
                counts.map(|(group, layer, count)| (group, LayerScope::Layer(layer), count));
            count_sums(&self.request, counts, summed, before)
        })
    }

    fn count_more_sums(
        &self,
        more: impl Fn(&Summed, u64) -> Result<u64, Error>,
    ) -> Result<(), Error> {
        let Some(summed) = &self.summed else {
            return Ok(());
        };
        let mut before = self.sums.load(Ordering::Relaxed);
        loop {
            let after = before + more(summed, before)?;
            // Layers of the engine's are counted beside those that its kernels post.
            let sums = &self.sums;
            match sums.compare_exchange(before, after, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(()),
                Err(now) => before = now,
            }
        }
    }

    /// Hands a plan to the worker; checking and planning began at `begun`.
    fn add(&self, plan: Plan, after: Option<Event>, begun: Instant) {
        let runs = plan.report().runs;
        let plan = Arc::new(plan);
        self.send(Command::AddJob {
            id: self.id,
            source: Moves {
                what: Moved::Planned(plan),
                after,
                is_released: false,
                is_there: false,
            },
            runs,
            prepare: begun.elapsed(),
        });
    }

    /// The units of each group that blocks in token order write.
    fn units(&self, layer: &Waiting) -> Vec<(Place, Range<u64>)> {
        let Waiting::InOrder(scope, src, tokens) = layer else {
            return Vec::new();
        };
        let of = |group: &GroupBlocks| {
            let unit = self.plans.unit(group.group).map_or(0, |unit| unit.tokens);
            let units = match (tokens, u64::from(unit)) {
                // A slot moves whole.
                (None, _) | (_, 0) => 0..u64::MAX,
                (Some(tokens), unit) => tokens.start / unit..tokens.end.div_ceil(unit),
            };
            let group = group.group;
            let layer = match scope {
                LayerScope::All => None,
                LayerScope::Layer(layer) => Some(*layer),
            };
            (Place { group, layer }, units)
        };
        src.iter().map(of).collect()
    }

    pub(crate) fn layer(&self, engine: &Inner, layer: Layer) -> Result<(), Error> {
        engine.runtime.health.check()?;
        let mut stage = self.stage();
        let units = self.units(&layer.blocks);
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((place, _)) = units
            .iter()
            .find(|(place, units)| written.has(*place, units))
        {
            return Err(Error::WrittenTwice {
                request: self.request.clone(),
                group: place.group,
                layer: place.layer,
            });
        }
        match &mut *stage {
            Stage::Asked {
                committed: true, ..
            }
            | Stage::Ended { .. } => Err(Error::PushEnded {
                request: self.request.clone(),
                operation: "layer",
            }),
            Stage::Asked { waiting, .. } => {
                // What is wrong whatever the ticket says is said now.
                if let Waiting::Pairs(scope, pairs) = &layer.blocks {
                    self.compile(*scope, pairs)?;
                }
                self.claim(engine, &layer.blocks)?;
                waiting.push(layer);
                written.take(units);
                Ok(())
            }
            Stage::Open(ticket) => {
                let ticket = Arc::clone(ticket);
                let begun = Instant::now();
                // Planned under the lock: layers reach the worker in the order of the calls, and
                // before the commit.
                let plan = match &layer.blocks {
                    Waiting::Pairs(scope, pairs) => self.plan(&ticket, *scope, pairs)?,
                    Waiting::InOrder(scope, src, tokens) => {
                        self.plan_in_order(&ticket, *scope, src, tokens.as_ref())?
                    }
                };
                self.claim(engine, &layer.blocks)?;
                self.count_sums(&plan)?;
                self.add(plan, layer.after, begun);
                written.take(units);
                Ok(())
            }
        }
    }
}

/// A push under way. Dropping it without [`commit`](Self::commit) aborts it.
#[derive(Debug)]
pub struct Push {
    pushing: Arc<Pushing>,
    engine: Arc<Inner>,
    shared: Arc<Shared>,
    over: bool,
}

impl Push {
    pub(crate) fn begin(
        engine: &Arc<Inner>,
        peer: Arc<PeerSession>,
        request: &RequestId,
        options: &PushOptions,
    ) -> Result<Self, Error> {
        let all = peer.push_plans(engine)?;
        let (plans, side) = (all.alone().clone(), (SideName::Producer, all.alone_part()));
        if plans.is_empty() {
            return Err(Error::NothingToPush {
                rank: engine.rank(),
                engine: peer.name.engine.clone(),
            });
        }
        let shared = Arc::new(Shared::default());
        let told = Told::Owner(Arc::clone(&shared));
        let nonce = options.ticket.as_ref().map(|ticket| ticket.nonce);
        let summed = verified(engine, &peer, side, options.verify)?;
        let how = (nonce, options);
        let pushing = Pushing::begin(engine, peer, request, how, (plans, summed), told)?;
        Ok(Self {
            pushing,
            engine: Arc::clone(engine),
            shared,
            over: false,
        })
    }

    /// Writes one layer's blocks; `layer` counts over the whole model. May be called several times
    /// for a layer, with other blocks (chunked prefill). They are read when `event` has been reached, which
    /// stands behind the kernels that make them; without one they must be there now.
    ///
    /// The event is waited for by looking at it, so the push's deadline holds whatever becomes of it. Where the
    /// blocks are a GPU's, the fence follows that other GPUs need to find them.
    ///
    /// # Errors
    ///
    /// [`Error::Plan`], [`Error::NotInTicket`], [`Error::PushEnded`], [`Error::TooManySums`]. What does not fit a ticket
    /// that has yet to come ends the push later, with
    /// [`Refusal::OutOfRange`](crate::transfer::Refusal::OutOfRange).
    pub fn layer(
        &self,
        layer: u32,
        pairs: &[GroupPairs],
        event: Option<&Event>,
    ) -> Result<(), Error> {
        let blocks = Waiting::Pairs(LayerScope::Layer(layer), pairs.to_vec());
        self.pushing.layer(&self.engine, Layer::new(blocks, event))
    }

    /// The same for a producer that does not know the consumer's blocks: its own, as many as the
    /// ticket holds for the group and in the ticket's order.
    ///
    /// # Errors
    ///
    /// As [`layer`](Self::layer); lists of unequal length are an [`Error::Plan`]; and
    /// [`Error::WrittenTwice`].
    pub fn layer_in_order(
        &self,
        layer: u32,
        src: &[GroupBlocks],
        event: Option<&Event>,
    ) -> Result<(), Error> {
        let blocks = Waiting::InOrder(LayerScope::Layer(layer), src.to_vec(), None);
        self.pushing.layer(&self.engine, Layer::new(blocks, event))
    }

    /// Writes all layers' blocks at once.
    ///
    /// # Errors
    ///
    /// As [`layer`](Self::layer).
    pub fn all_layers(&self, pairs: &[GroupPairs], event: Option<&Event>) -> Result<(), Error> {
        let blocks = Waiting::Pairs(LayerScope::All, pairs.to_vec());
        self.pushing.layer(&self.engine, Layer::new(blocks, event))
    }

    /// Says that nothing follows. The transfer is done when every byte has been confirmed; the
    /// consumer is told after that.
    ///
    /// Every [queue](Self::gpu_queue) of it has to be [finished](GpuQueue::finish) before, for only then is it known what
    /// its kernels have posted. One that is not, or was dropped without, has the commit refused, and the push is given
    /// up as by [`abort`](Self::abort).
    ///
    /// # Errors
    ///
    /// [`Error::QueueUnfinished`], [`Error::Forked`]. What else goes wrong is the transfer's outcome.
    pub fn commit(mut self) -> Result<Transfer, Error> {
        self.engine.runtime.health.check_process()?;
        match self.pushing.queues.unfinished() {
            0 => {}
            queues => {
                let request = self.pushing.request.clone();
                return Err(Error::QueueUnfinished { request, queues });
            }
        }
        self.over = true;
        self.pushing.commit();
        let shared = Arc::clone(&self.shared);
        Ok(transfer(
            &self.engine,
            self.pushing.id,
            self.pushing.owner,
            shared,
        ))
    }

    /// Gives the push up. The consumer's expectation fails; its memory is free when nothing of the
    /// push is under way. The transfer's outcome is a failure with [`Cause::Cancelled`].
    pub fn abort(mut self) -> Transfer {
        self.give_up();
        let shared = Arc::clone(&self.shared);
        transfer(&self.engine, self.pushing.id, self.pushing.owner, shared)
    }

    fn give_up(&mut self) {
        self.over = true;
        if self.engine.runtime.health.is_forked() {
            // Nor may the child be the last to let go of what its parent uses.
            std::mem::forget(Arc::clone(&self.pushing));
            return std::mem::forget(Arc::clone(&self.engine));
        }
        self.pushing.abort();
    }
}

impl Drop for Push {
    fn drop(&mut self) {
        if !self.over {
            self.give_up();
        }
    }
}
