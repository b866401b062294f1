//! One session with one remote rank: what is known of it, and how its queue pairs are taken down.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use kvxfer_verbs::PeerLife;
use tracing::debug;

use super::farewell::Untold;
use super::gpu::{GpuPeer, LinkedMemory, StagedPeer};
use super::link::Link;
use super::peer_lanes::{LanePlace, PeerRail};
use super::worker::{Command, Live, WorkerHandle};
use crate::blocks::{GroupBlocks, GroupPairs};
use crate::engine::Inner;
use crate::error::Error;
use crate::event::PeerName;
use crate::ids::{Generation, Nonce, RequestId};
use crate::layout::{GroupKind, KvFormat, PlacementDesc, Side};
use crate::plan::{
    CompileError, Compiled, Cover, MissingPart, Part, PlanLimits, Role, SideName, UnitPairs,
};
use crate::sums::{SumError, Summed};
use crate::transfer::{Cause, DrainToken, PeerKey, Spec, TransferId};
use crate::transport::PathInfo;
use crate::wire::{ConfigFacts, LinksRefused, MessageKind, PathKind, RemoteSpan};

/// Pieces of a merged run for each lane, so that a lane that is slower takes fewer.
const CHUNKS_PER_LANE: u64 = 4;
/// A run is not cut smaller, and not left larger than this: a work request cannot be recalled, and
/// the soft device carries one out in one go.
const MIN_CHUNK: u64 = 256 << 10;
const MAX_CHUNK: u64 = 8 << 20;

/// What a peer may ask for at a time: units, and something for each question.
const MOST_ASKED: u64 = 1 << 24;

#[derive(Debug, Default)]
struct Fate {
    /// Why the session ends, from the moment when that is certain.
    ends_for: Option<Cause>,
    /// Workers that wait for a lane that is rebuilt, and what their last one has failed with.
    laneless: Vec<(u16, Cause)>,
    /// Whether it is over.
    lost: bool,
    /// Whether its queue pairs are being taken down, or are gone.
    dropping: bool,
    gone: bool,
    /// Ledgers that wait for it.
    waiting: Vec<(u16, DrainToken)>,
}

impl Fate {
    fn lost(&self) -> Option<Cause> {
        self.ends_for.clone().filter(|_| self.lost)
    }

    /// The session ends, and the first cause stays: that of a lane which was waited for, if the end may only
    /// follow from it, on whichever side. Gives the first.
    fn ends(&mut self, cause: Cause) -> &Cause {
        let waited = self.laneless.first().map(|(_, cause)| cause.clone());
        let waited = waited.filter(|_| cause.may_follow_the_peers_end());
        self.ends_for.get_or_insert(waited.unwrap_or(cause))
    }

    /// Why nothing new can run over the session.
    fn usable(&self) -> Result<(), Cause> {
        if !self.lost && !self.dropping {
            return Ok(());
        }
        Err(self.ends_for.clone().unwrap_or(Cause::LaneReset))
    }
}

/// What can be planned between this rank and a peer's, in one direction.
#[derive(Debug, Clone)]
pub(crate) struct Plans {
    /// All that both keep.
    pub(crate) common: Compiled,
    /// What of it falls to this pair where several ranks of the producer keep the same.
    pub(crate) share: Compiled,
    /// Something that the consumer keeps and the producer does not: its blocks are whole only with what
    /// other ranks have.
    pub(crate) gap: Option<MissingPart>,
}

impl Plans {
    /// # Errors
    ///
    /// As [`Compiled::compile`].
    pub(crate) fn compile(
        producer: &Side<'_>,
        consumer: &Side<'_>,
        role: Role,
    ) -> Result<Self, CompileError> {
        let common = Compiled::compile(producer, consumer, role, Part::Common)?;
        let share = Compiled::compile(producer, consumer, role, Part::Share)?;
        // Mostly the same: one of the two is enough to keep.
        let share = match share.cover() == common.cover() {
            true => common.clone(),
            false => share,
        };
        Ok(Self {
            share,
            gap: Cover::missing(consumer, &[common.cover()]),
            common,
        })
    }

    /// What of the consumer's blocks a push moves that is not one of several together: all, if that is
    /// whole; otherwise this pair's share.
    pub(crate) fn alone(&self) -> &Compiled {
        match self.alone_part() {
            Part::Common => &self.common,
            Part::Share => &self.share,
        }
    }

    /// Which of the two that is.
    pub(crate) const fn alone_part(&self) -> Part {
        match self.gap {
            None => Part::Common,
            Some(_) => Part::Share,
        }
    }
}

/// The list of one group's blocks; empty where there is none.
fn list(groups: &[GroupBlocks], group: u32) -> &[u32] {
    let found = groups.iter().find(|g| g.group == group);
    found.map_or(&[][..], |g| &g.blocks)
}

/// Pairs the producer's and the consumer's blocks, both in token order, of those of `groups` that
/// `plans` moves anything of.
///
/// # Errors
///
/// [`Error::Plan`]; [`Error::Window`] for a sliding window's blocks where it cannot be told at which
/// tokens the two lists begin.
pub(crate) fn in_order(
    (plans, format): (&Compiled, &KvFormat),
    groups: impl Iterator<Item = u32>,
    (src, dst): (&[GroupBlocks], &[GroupBlocks]),
    tokens: Option<&Range<u64>>,
) -> Result<Vec<UnitPairs>, Error> {
    let mut pairs = Vec::new();
    for group in groups {
        if plans.unit_bytes(group) == Some(0) {
            continue;
        }
        let windowed = format
            .group(group)
            .is_some_and(|g| matches!(g.kind, GroupKind::SlidingWindow { .. }));
        let equal = plans
            .unit(group)
            .is_some_and(|unit| unit.producer_per_block == unit.consumer_per_block);
        // The lists hold the window alone, and each begins with the block that the window begins in.
        if windowed && !(equal && tokens.is_none()) {
            return Err(Error::Window { group });
        }
        pairs.push(plans.pairs(group, list(src, group), list(dst, group), tokens.cloned())?);
    }
    Ok(pairs)
}

/// A peer with whom a session stands or stood. One that reconnects is another.
#[derive(Debug)]
pub(crate) struct PeerSession {
    pub(crate) key: PeerKey,
    pub(crate) name: PeerName,
    pub(crate) generation: Generation,
    /// The pairs of rails that both sides count, those that have failed or were never joined among them;
    /// never empty.
    pub(crate) rails: Vec<PeerRail>,
    pub(crate) path: PathInfo,
    /// What this rank fetches out of its GPU.
    pub(crate) gpu: Option<GpuPeer>,
    /// What of its blocks, or of this rank's, is staged at a time.
    pub(crate) staged: Option<StagedPeer>,
    /// By what kernels of this rank's GPU can be given its memory.
    pub(crate) handles: Option<LinkedMemory>,
    /// What tells when its process has ended, by which its kernels may be let to write this rank's blocks; or why they
    /// may not.
    pub(crate) life: Result<Arc<PeerLife>, LinksRefused>,
    /// What it told of itself that plans do not need.
    pub(crate) facts: ConfigFacts,
    /// Whether it runs on this host.
    pub(crate) same_host: bool,
    /// The workers that have lanes to it when it comes up, each once; never empty.
    pub(crate) workers: Vec<u16>,
    /// Where each lane is, by its number.
    pub(crate) lanes: Vec<LanePlace>,
    /// Plans for reading from it, and for writing to it, where the roles allow.
    pub(crate) pull: Option<Plans>,
    pub(crate) push: Option<Plans>,
    /// How its blocks lie.
    pub(crate) layout: (KvFormat, PlacementDesc),
    pub(crate) summing: SummedParts,
    /// Whether both sides tell the end of a push on the data plane.
    pub(crate) notices: bool,
    /// The device's limits.
    pub(crate) limits: PlanLimits,
    pub(crate) link: Arc<Link>,
    pub(crate) engine: Weak<Inner>,
    pub(crate) all_workers: Vec<WorkerHandle>,
    pub(crate) standing: Standing,
    /// The ends of pushes that are on their way to it on queue pairs.
    pub(crate) untold: Untold,
}

/// Whether a peer still stands, and how far its queue pairs are taken down.
#[derive(Debug)]
pub(crate) struct Standing {
    fate: Mutex<Fate>,
    /// Workers whose lanes to the peer are not gone, and lanes on their way to them.
    parts: AtomicUsize,
    /// Who may still tell an outcome after the session's end: the workers, and the link that ends
    /// expectations.
    untold: AtomicUsize,
}

impl Standing {
    /// Of a peer that this many workers have lanes to.
    pub(crate) fn new(workers: usize) -> Self {
        Self {
            fate: Mutex::default(),
            parts: AtomicUsize::new(workers),
            untold: AtomicUsize::new(workers + 1),
        }
    }
}

/// What is summed of what two ranks exchange, worked out when it is first wanted.
#[derive(Debug, Default)]
pub(crate) struct SummedParts {
    /// By which side this one is, and by part.
    parts: [OnceLock<Result<Arc<Summed>, SumError>>; 4],
    /// The weight of questions that wait for an answer.
    asked: AtomicU64,
}

/// A push that its producer has given up: it has said that it writes nothing more of it.
#[derive(Debug)]
pub(crate) struct ClosedPush {
    pub(crate) peer: Arc<PeerSession>,
    pub(crate) request: RequestId,
    pub(crate) nonce: Nonce,
}

impl ClosedPush {
    /// Its expectation, and its blocks, are over.
    pub(crate) fn heed(&self) {
        let Self {
            peer,
            request,
            nonce,
        } = self;
        let Some(engine) = peer.engine.upgrade() else {
            return;
        };
        let closed = engine.books.with(&engine, |books, now| {
            books.push_closed(now, &engine, peer.key, (request, *nonce))
        });
        if let Err(refusal) = closed {
            debug!(%request, %refusal, "closed push is not known");
        }
    }
}

impl PeerSession {
    /// What is summed on this side, which is `own`.
    ///
    /// # Errors
    ///
    /// As [`Summed::compile`], for either side.
    pub(crate) fn summed(
        &self,
        engine: &Inner,
        own: SideName,
        part: Part,
    ) -> Result<Arc<Summed>, SumError> {
        let (format, placement) = &self.layout;
        let (here, there) = (engine.side(), Side { format, placement });
        let (at, producer, consumer) = match own {
            SideName::Producer => (0, here, there),
            SideName::Consumer => (2, there, here),
        };
        let at = match part {
            Part::Common => at,
            Part::Share => at + 1,
        };
        let compile = || {
            // The other side works its own out; that it cannot is better known before anything moves.
            Summed::compile(&producer, &consumer, own.other(), part)?;
            Summed::compile(&producer, &consumer, own, part).map(Arc::new)
        };
        match self.summing.parts.get(at) {
            Some(place) => place.get_or_init(compile).clone(),
            None => compile(),
        }
    }

    /// The peer asks for sums; whether the question's weight is not too much at a time.
    pub(crate) fn reserve_sums(&self, weight: u64) -> bool {
        let more = |open: u64| Some(open.saturating_add(weight)).filter(|open| *open <= MOST_ASKED);
        let open = &self.summing.asked;
        open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .is_ok()
    }

    /// A question is done with.
    pub(crate) fn return_sums(&self, weight: u64) {
        self.summing.asked.fetch_sub(weight, Ordering::Relaxed);
    }

    /// Whether blocks go from GPU to GPU. Then the queue pairs carry lease checks and notices alone.
    pub(crate) fn is_ipc(&self) -> bool {
        self.path.path == PathKind::Ipc
    }

    /// Whether one worker has a whole job, for a GPU has a part in it.
    pub(crate) fn has_whole_jobs(&self) -> bool {
        self.is_ipc() || self.staged.is_some()
    }

    /// Whether the way to it goes over RDMA devices.
    pub(crate) fn is_rdma(&self) -> bool {
        self.path.beneath() == PathKind::Rdma
    }

    /// Its memories, at the addresses of its own process.
    pub(crate) fn memory(&self) -> &[RemoteSpan] {
        let count = self.layout.1.memory_len().len();
        let spans = self.rails.first().map(|rail| rail.remote.as_slice());
        spans.and_then(|spans| spans.get(..count)).unwrap_or(&[])
    }

    /// A lane is to have a successor: from here on the session is not drained before
    /// [`part_drained`](Self::part_drained) is told of it. False: the session is over.
    pub(crate) fn begin_lane(&self) -> bool {
        // Under the lock: whoever takes the queue pairs down counts this one, or it is not made.
        let fate = self.fate();
        let usable = fate.usable().is_ok();
        if usable {
            self.standing.parts.fetch_add(1, Ordering::AcqRel);
        }
        usable
    }

    /// Gives a command to a worker.
    pub(crate) fn on_worker(&self, worker: u16, command: Command) {
        if let Some(handle) = self.all_workers.get(usize::from(worker)) {
            handle.send(command);
        }
    }

    /// Gives a command to the workers that have lanes, but for one.
    pub(crate) fn on_other_workers(
        self: &Arc<Self>,
        but: u16,
        command: impl Fn(Arc<Self>) -> Command,
    ) {
        for worker in self.workers.iter().filter(|worker| **worker != but) {
            if let Some(handle) = self.all_workers.get(usize::from(*worker)) {
                handle.send(command(Arc::clone(self)));
            }
        }
    }

    fn fate(&self) -> MutexGuard<'_, Fate> {
        // Valid at every step, so a panic elsewhere does not spoil it.
        self.standing
            .fate
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The worker that owns a transfer: one that has lanes, for it reads the lease slot itself.
    pub(crate) fn owner(&self, id: TransferId) -> u16 {
        let count = self.workers.len().max(1) as u64;
        let at = usize::try_from(id.0 % count).unwrap_or(0);
        self.workers.get(at).copied().unwrap_or(0)
    }

    /// Plans for reading from it.
    ///
    /// # Errors
    ///
    /// [`Error::WrongRole`].
    pub(crate) fn pull_plans(&self) -> Result<&Plans, Error> {
        self.pull.as_ref().ok_or(Error::WrongRole {
            role: "kv_consumer",
            operation: "be pulled from",
        })
    }

    /// Plans for writing to it.
    ///
    /// # Errors
    ///
    /// [`Error::WrongRole`].
    pub(crate) fn push_plans(&self, engine: &Inner) -> Result<&Plans, Error> {
        if !engine.config.kv_role.produces() {
            return Err(Error::WrongRole {
                role: "kv_consumer",
                operation: "push",
            });
        }
        self.push.as_ref().ok_or(Error::WrongRole {
            role: "kv_producer",
            operation: "be pushed to",
        })
    }

    /// The limits of a plan over these pairs: a merged run is cut so that every lane gets some of it.
    pub(crate) fn limits(&self, compiled: &Compiled, pairs: &[GroupPairs]) -> PlanLimits {
        let counts = pairs.iter().map(|group| (group.group, group.pairs.len()));
        self.limits_of(compiled, counts)
    }

    /// The same over pairs of units.
    pub(crate) fn unit_limits(&self, compiled: &Compiled, pairs: &[UnitPairs]) -> PlanLimits {
        let counts = pairs.iter().map(|group| (group.group(), group.len()));
        self.limits_of(compiled, counts)
    }

    /// The same for blocks that are written one by one.
    pub(crate) fn block_limits(&self, compiled: &Compiled, groups: u32) -> PlanLimits {
        self.limits_of(compiled, (0..groups).map(|group| (group, 1)))
    }

    fn limits_of(
        &self,
        compiled: &Compiled,
        counts: impl Iterator<Item = (u32, usize)>,
    ) -> PlanLimits {
        let bytes = counts.fold(0_u64, |sum, (group, pairs)| {
            let each = compiled.unit_bytes(group).unwrap_or(0);
            sum.saturating_add(each.saturating_mul(pairs as u64))
        });
        let share = bytes / (self.lanes.len().max(1) as u64 * CHUNKS_PER_LANE);
        let chunk = share
            .clamp(MIN_CHUNK, MAX_CHUNK)
            .next_multiple_of(MIN_CHUNK);
        let staged = self.staged.as_ref().map_or(chunk, |staged| staged.piece);
        let chunk = chunk.min(staged);
        PlanLimits {
            max_msg_bytes: self.limits.max_msg_bytes.min(chunk),
            ..self.limits
        }
    }

    /// How many workers have a part of each of its jobs.
    pub(crate) fn worker_count(&self) -> u16 {
        if self.has_whole_jobs() {
            return 1;
        }
        u16::try_from(self.workers.len()).unwrap_or(u16::MAX)
    }

    /// Whether a peer of its role has anything to say with such a message: what is said of pushes and
    /// offers goes one way each.
    pub(crate) fn may_say(&self, kind: MessageKind) -> bool {
        match kind {
            MessageKind::PushStart
            | MessageKind::LinksWanted
            | MessageKind::PushSums
            | MessageKind::PushTold
            | MessageKind::Take
            | MessageKind::TakeStop
            | MessageKind::Staged
            | MessageKind::Sums
            | MessageKind::PushDone
            | MessageKind::PushAborted
            | MessageKind::PushClosed
            | MessageKind::Retracted => self.pull.is_some(),
            MessageKind::Release
            | MessageKind::SumsWanted
            | MessageKind::Stage
            | MessageKind::StageFree
            | MessageKind::Taken
            | MessageKind::LinksAnswer
            | MessageKind::Announce
            | MessageKind::Revoke => self.push.is_some(),
            _ => true,
        }
    }

    /// Whether its queue pairs are gone.
    pub(crate) fn is_gone(&self) -> bool {
        self.fate().gone
    }

    /// Why the peer is lost, if it is.
    pub(crate) fn lost(&self) -> Option<Cause> {
        self.fate().lost()
    }

    /// Why nothing new can run over the session: it is over, or its queue pairs are taken down.
    pub(crate) fn usable(&self) -> Result<(), Cause> {
        self.fate().usable()
    }

    /// Why the session ends, if it does: before it is over there may be work that fails with it.
    pub(crate) fn ends_for(&self) -> Option<Cause> {
        self.fate().ends_for.clone()
    }

    /// The session is certain to end. The first cause stays.
    pub(crate) fn will_end(&self, cause: Cause) {
        self.fate().ends(cause);
    }

    /// All lanes of a worker have failed, the last one with this, and it is rebuilt; `None`: it has one again.
    pub(crate) fn waits_for_lane(&self, worker: u16, cause: Option<Cause>) {
        let laneless = &mut self.fate().laneless;
        laneless.retain(|(of, _)| *of != worker);
        laneless.extend(cause.map(|cause| (worker, cause)));
    }

    /// The peer cannot be used any more: its session ends, for `cause` unless another came first.
    pub(crate) fn fail(&self, cause: Cause) {
        if !cause.may_follow_the_peers_end() {
            self.will_end(cause.clone());
        }
        self.link.reset(cause);
    }

    /// The session is over. Tells every worker, and takes the queue pairs down. Returns the first
    /// cause, which stays.
    pub(crate) fn lose(self: &Arc<Self>, cause: Cause) -> Cause {
        let cause = {
            let mut fate = self.fate();
            let cause = fate.ends(cause).clone();
            if std::mem::replace(&mut fate.lost, true) {
                return cause;
            }
            cause
        };
        if let Some(memory) = &self.handles {
            memory.close();
        }
        self.untold.give_up();
        for worker in self.own_workers() {
            worker.send(Command::PeerLost {
                peer: Arc::clone(self),
                cause: cause.clone(),
            });
        }
        self.drop_lanes();
        cause
    }

    /// The workers that have lanes; they own all transfers with the peer.
    fn own_workers(&self) -> impl Iterator<Item = &WorkerHandle> {
        self.workers
            .iter()
            .filter_map(|worker| self.all_workers.get(usize::from(*worker)))
    }

    /// Gives a new transfer to the worker that is to own it, unless the session is over.
    ///
    /// # Errors
    ///
    /// [`Error::NotConnected`].
    pub(crate) fn submit(&self, owner: u16, spec: Spec, live: Box<Live>) -> Result<(), Error> {
        // Sent under the lock, so that the worker has it before it hears of the peer's loss: every
        // transfer that was taken fails with its session, and before that is told.
        let fate = self.fate();
        if let Err(cause) = fate.usable() {
            drop(fate);
            live.not_taken(cause.clone());
            return Err(Error::NotConnected { cause });
        }
        let Some(worker) = self.all_workers.get(usize::from(owner)) else {
            drop(fate);
            live.not_taken(Cause::ShuttingDown);
            return Err(Error::ShuttingDown);
        };
        worker.send(Command::Submit { spec, live });
        Ok(())
    }

    /// One of those who end transfers after the session's end has told all outcomes.
    pub(crate) fn told(&self) {
        if self.standing.untold.fetch_sub(1, Ordering::AcqRel) == 1
            && let Some(engine) = self.engine.upgrade()
        {
            engine.peer_told(self);
        }
    }

    /// A ledger wants to know when nothing posted to the peer can touch memory any more.
    pub(crate) fn drain(self: &Arc<Self>, worker: u16, token: DrainToken) {
        let gone = {
            let mut fate = self.fate();
            if !fate.gone {
                fate.waiting.push((worker, token));
            }
            fate.gone
        };
        if gone {
            self.answer(worker, token);
        } else {
            // All that is posted must go, whatever lane it is on: the session is set up anew.
            self.fail(Cause::LaneReset);
            self.drop_lanes();
        }
    }

    /// Takes the queue pairs down without waiting for anybody.
    pub(crate) fn drop_lanes(self: &Arc<Self>) {
        if std::mem::replace(&mut self.fate().dropping, true) {
            return;
        }
        for worker in self.own_workers() {
            worker.send(Command::DropLanes {
                peer: Arc::clone(self),
            });
        }
    }

    /// A worker has destroyed its queue pairs to the peer; or one on its way to a worker has come there, or is
    /// destroyed.
    pub(crate) fn part_drained(&self) {
        if self.standing.parts.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        let waiting = {
            let mut fate = self.fate();
            fate.gone = true;
            std::mem::take(&mut fate.waiting)
        };
        for (worker, token) in waiting {
            self.answer(worker, token);
        }
        if let Some(engine) = self.engine.upgrade() {
            engine.peer_drained(self.key);
        }
    }

    fn answer(&self, worker: u16, token: DrainToken) {
        if let Some(handle) = self.all_workers.get(usize::from(worker)) {
            handle.send(Command::PeerDrained {
                peer: self.key,
                token,
            });
        }
    }
}
