//! A remote rank as its user sees it, over all its sessions: what can be pulled from it and pushed
//! to it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Inner;
use super::handle::{Shared, Transfer, TransferReport};
use super::joint::Told;
use super::moves::{Moved, Moves};
use super::net;
use super::peer_session::{PeerSession, Plans};
use super::pull::Pull;
use super::push::{Push, PushOptions};
use super::tether::Tether;
use super::verify::{MOST_SUMS, Verification};
use super::worker::{Command, Live};
use crate::blocks::{GroupBlocks, GroupPairs};
use crate::claims::{Claim, Claimant, Purpose};
use crate::error::Error;
use crate::event::PeerName;
use crate::ids::{Nonce, Rank, RequestId};
use crate::mem::gpu::{Event, Stream};
use crate::plan::{Cover, LayerScope, Part, Plan, SideName};
use crate::sums::Summed;
use crate::ticket::{LeaseRef, Ticket, TicketKind};
use crate::time::Time;
use crate::transfer::{Kind, Spec, TransferId};
use crate::transport::PathInfo;
use crate::wire::{Release, RemoteSpan, limits};

/// Where a peer's sessions come from.
#[derive(Debug)]
enum Lead {
    /// A session that this side keeps up.
    Kept(Arc<Tether>),
    /// A session that the peer has opened, the newest when it was last looked for.
    Accepted(Mutex<Arc<PeerSession>>),
}

#[derive(Debug)]
struct Shares {
    engine: Arc<Inner>,
    lead: Lead,
    /// Who was met first.
    name: PeerName,
}

impl Drop for Shares {
    fn drop(&mut self) {
        if self.engine.runtime.health.is_forked() {
            // Nor may the child be the last to let go of what its parent uses.
            return std::mem::forget(Arc::clone(&self.engine));
        }
        if let Lead::Kept(tether) = &self.lead {
            tether.let_go();
        }
    }
}

/// One rank of a remote engine: what is pulled from it and pushed to it. It is one of the peers of an
/// [`Instance`](super::Instance), or what [`Engine::peer_of`](super::Engine::peer_of) has given.
///
/// Clones are the same peer. A session that was opened for it closes with the last of them, and of
/// the instances that hold it. Until then a session that is lost is set up again by the side that had
/// opened it, and the peer works again; what its earlier sessions and lives had under way has failed.
#[derive(Debug, Clone)]
pub struct Peer {
    shares: Arc<Shares>,
}

/// What a peer has told of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PeerFacts {
    /// Whether it runs under the same kernel.
    pub same_host: bool,
    /// Its `qp_per_transfer`; the connecting side's is the one that is used.
    pub qp_per_transfer: u32,
    /// Its `num_worker_threads`.
    pub num_worker_threads: u32,
    /// Its memories, at the addresses of its own process.
    pub memory: Vec<RemoteSpan>,
}

/// Settings of one pull.
#[derive(Debug, Clone, Default)]
pub struct PullOptions {
    /// Comes back with the events.
    pub tag: u64,
    /// How long the transfer may take; `None`: the configured `transfer_timeout`.
    pub deadline: Option<Duration>,
    /// Keep the producer's blocks on offer for this reader when the pull is done: more will be
    /// pulled under the ticket, and [`Peer::release`] ends it. Otherwise a pull that is done
    /// releases.
    pub hold: bool,
    /// Whether checksums of what has been read are compared with the producer's before the pull is done;
    /// `None`: as [`Config::verify`](crate::config::Config::verify) says. A block that differs fails the
    /// pull with [`Cause::Corrupt`](crate::transfer::Cause::Corrupt). Both sides read the blocks once
    /// more for that.
    pub verify: Option<bool>,
    /// A GPU's work that comes first, such as kernels that still read the destination blocks. It is waited for by
    /// looking at it, so the transfer's deadline holds whatever becomes of it.
    pub after: Option<Event>,
    /// The stream of the kernels that are going to read the blocks: the [fence](Transfer::fence) that they need
    /// is put there when all has come, before the outcome is told. For memory of a GPU.
    pub stream: Option<Stream>,
}

impl Peer {
    /// Over sessions that this side keeps up; this is the first.
    pub(crate) fn connected(
        engine: Arc<Inner>,
        session: Arc<PeerSession>,
        tether: Arc<Tether>,
    ) -> Self {
        let name = session.name.clone();
        tether.up(session);
        Self {
            shares: Arc::new(Shares {
                engine,
                lead: Lead::Kept(tether),
                name,
            }),
        }
    }

    /// Over sessions that the peer opens.
    pub(crate) fn accepted(engine: Arc<Inner>, session: Arc<PeerSession>) -> Self {
        let name = session.name.clone();
        Self {
            shares: Arc::new(Shares {
                engine,
                lead: Lead::Accepted(Mutex::new(session)),
                name,
            }),
        }
    }

    pub(crate) fn engine(&self) -> &Arc<Inner> {
        &self.shares.engine
    }

    /// The session that stands.
    pub(crate) fn session(&self) -> Result<Arc<PeerSession>, Error> {
        self.engine().runtime.health.check()?;
        if self.engine().runtime.stopping.load(Ordering::Acquire) {
            return Err(Error::ShuttingDown);
        }
        match &self.shares.lead {
            Lead::Kept(tether) => tether.session(),
            Lead::Accepted(place) => {
                let mut session = place.lock().unwrap_or_else(PoisonError::into_inner);
                let Err(cause) = session.usable() else {
                    return Ok(Arc::clone(&session));
                };
                match self.engine().peer_named(&self.shares.name) {
                    Some(newer) if newer.usable().is_ok() => {
                        *session = Arc::clone(&newer);
                        Ok(newer)
                    }
                    _ => Err(Error::NotConnected { cause }),
                }
            }
        }
    }

    /// The remote engine and rank. Only the name of an engine that was reached by its address and was
    /// given no `engine_id` can change: it has another after a restart.
    #[must_use]
    pub fn name(&self) -> PeerName {
        let first = || self.shares.name.clone();
        match &self.shares.lead {
            Lead::Kept(tether) if !self.engine().runtime.health.is_forked() => {
                tether.name().unwrap_or_else(first)
            }
            _ => first(),
        }
    }

    /// The rank's position in its engine. It never changes.
    #[must_use]
    pub fn rank(&self) -> Rank {
        self.shares.name.rank
    }

    /// Whether a session stands now.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.session().is_ok()
    }

    /// The path that blocks take, why, and why not another.
    ///
    /// # Errors
    ///
    /// [`Error::NotConnected`].
    pub fn path(&self) -> Result<PathInfo, Error> {
        Ok(self.session()?.way())
    }

    /// How many queue pairs lead to the rank, and how many workers drive them.
    ///
    /// # Errors
    ///
    /// [`Error::NotConnected`].
    pub fn lanes(&self) -> Result<(usize, usize), Error> {
        let peer = self.session()?;
        Ok((peer.working_lanes(), peer.workers.len()))
    }

    /// What the remote rank has told of itself.
    ///
    /// # Errors
    ///
    /// [`Error::NotConnected`].
    pub fn facts(&self) -> Result<PeerFacts, Error> {
        let peer = self.session()?;
        Ok(PeerFacts {
            same_host: peer.same_host,
            qp_per_transfer: peer.facts.qp_per_transfer,
            num_worker_threads: peer.facts.num_worker_threads,
            memory: peer.memory().to_vec(),
        })
    }

    /// Waits until a session stands, for at most `timeout`; says whether one does.
    #[must_use]
    pub fn wait_up(&self, timeout: Duration) -> bool {
        let until = net::after(timeout);
        loop {
            if self.is_up() {
                return true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            std::thread::sleep(left.min(Duration::from_millis(5)));
        }
    }

    // ---- READ mode, consumer -----------------------------------------------------------------

    /// Reads blocks of an offer into this rank's blocks. `pairs` may name any part of what the
    /// ticket holds. No pairs at all is fine: nothing is read and the offer is released.
    ///
    /// The transfer is done when every byte is here *and* the producer's lease was found live
    /// after the last one: the blocks then hold what was offered. Until its outcome the destination
    /// blocks must not be used, and after a failure not before the memory is released.
    ///
    /// # Errors
    ///
    /// Before anything moves: [`Error::NotConnected`], [`Error::WrongInstance`],
    /// [`Error::OldGeneration`], [`Error::WrongTicket`], [`Error::NotInTicket`], [`Error::Plan`] (a
    /// block out of range, a destination twice, …), [`Error::InUse`] (a destination that is in another
    /// pull, or in anything else whose memory has not been released), [`Error::WrongRole`].
    pub fn pull(
        &self,
        ticket: &Ticket,
        pairs: &[GroupPairs],
        options: PullOptions,
    ) -> Result<Transfer, Error> {
        let begun = Instant::now();
        let engine = self.engine();
        let peer = self.pulls_with(ticket)?;
        let plans = peer.pull_plans()?;
        // Without blocks nothing is read, and the offer is released.
        let wanted = |group| {
            let mut pairs = pairs.iter();
            pairs.any(|p| p.group == group && !p.pairs.is_empty())
        };
        needs_no_other(engine, plans, ticket, wanted)?;
        for group in pairs {
            let src = || group.pairs.iter().map(|pair| pair.src);
            in_ticket(ticket, group.group, group.pairs.len(), src)?;
        }
        engine.check_reader(&options)?;
        let limits = peer.limits(&plans.common, pairs);
        let plan = plans.common.plan(pairs, LayerScope::All, limits)?;
        let shared = Arc::new(Shared::default());
        let part = verified(
            engine,
            &peer,
            (SideName::Consumer, Part::Common),
            options.verify,
        )?;
        let mut pull = PlannedPull::new(&peer, ticket, plan, part, begun)?;
        pull.comes_with(&options);
        let who = Claimant {
            request: &ticket.request,
            purpose: Purpose::Pull,
        };
        pull.claim = Some(engine.claims.claim(who, destinations(pairs))?);
        let until = engine.deadline(options.deadline);
        let (id, owner) = pull.submit(
            engine,
            Told::Owner(Arc::clone(&shared)),
            (options.tag, until, !options.hold),
        )?;
        Ok(transfer(engine, id, owner, shared))
    }

    /// Begins a pull whose blocks kernels of this rank ask for themselves: `kvx_get` of its
    /// [queues](Pull::gpu_queue). They may read any block of the offer, and write those of `into`, which nothing else
    /// uses until the pull is over. What a kernel has waited for by `kvx_wait`, and was told `KVX_OK` of, is what was
    /// offered: the producer's lease was found live behind it. The pull ends as every other, and has its deadline. If it
    /// fails, all of `into` counts as invalid: what of it has come, kernels alone know.
    ///
    /// # Errors
    ///
    /// As [`pull`](Self::pull); [`Error::NoSuchBlock`] for `into`.
    pub fn begin_pull(
        &self,
        ticket: &Ticket,
        into: &[GroupBlocks],
        options: PullOptions,
    ) -> Result<Pull, Error> {
        let session = self.pulls_with(ticket)?;
        Pull::begin(self.engine(), &session, (ticket, into), options)
    }

    /// The session over which a ticket's blocks can be pulled.
    pub(crate) fn pulls_with(&self, ticket: &Ticket) -> Result<Arc<PeerSession>, Error> {
        if !self.engine().config.kv_role.consumes() {
            return Err(Error::WrongRole {
                role: "kv_producer",
                operation: "pull",
            });
        }
        self.session_for(ticket, TicketKind::Offer)
    }

    /// Tells the producer that this reader needs the blocks no more, whether it has read them or
    /// not (a prefix that was all here already, an abort). Doing it again is fine.
    ///
    /// # Errors
    ///
    /// As [`pull`](Self::pull) for the ticket and the connection.
    pub fn release(&self, ticket: &Ticket) -> Result<(), Error> {
        let peer = self.session_for(ticket, TicketKind::Offer)?;
        let (request, nonce) = (ticket.request.clone(), ticket.nonce);
        peer.link.send(Release { request, nonce }.into());
        Ok(())
    }

    // ---- WRITE mode, producer ----------------------------------------------------------------

    /// Begins to push a request. The consumer is asked for its ticket at once; layers that are
    /// pushed before it comes wait for it.
    ///
    /// # Errors
    ///
    /// [`Error::NotConnected`], [`Error::WrongRole`], [`Error::RequestName`].
    pub fn begin_push(&self, request: &RequestId) -> Result<Push, Error> {
        self.begin_push_with(request, PushOptions::default())
    }

    /// The same with settings.
    ///
    /// # Errors
    ///
    /// As [`begin_push`](Self::begin_push); and those of [`pull`](Self::pull) for a ticket among the
    /// settings.
    pub fn begin_push_with(
        &self,
        request: &RequestId,
        options: PushOptions,
    ) -> Result<Push, Error> {
        Inner::check_request(request)?;
        let session = match &options.ticket {
            Some(ticket) => self.session_for(ticket, TicketKind::Expect)?,
            None => self.session()?,
        };
        Push::begin(self.engine(), session, request, &options)
    }

    /// Whether a ticket is of an expectation of the peer's.
    pub(crate) fn expects(&self, ticket: &Ticket) -> Result<(), Error> {
        self.session_for(ticket, TicketKind::Expect).map(|_| ())
    }

    /// The session that stands, if the ticket is of the peer's own, and of this life of it.
    fn session_for(&self, ticket: &Ticket, kind: TicketKind) -> Result<Arc<PeerSession>, Error> {
        ticket.check()?;
        let peer = self.session()?;
        if ticket.engine != peer.name.engine || ticket.rank != peer.name.rank {
            let name = |engine, rank| format!("{engine} {rank}");
            return Err(Error::WrongInstance {
                ticket: name(&ticket.engine, ticket.rank),
                here: name(&peer.name.engine, peer.name.rank),
            });
        }
        if ticket.generation != peer.generation {
            return Err(Error::OldGeneration {
                engine: ticket.engine.clone(),
                ticket: ticket.generation,
                now: peer.generation,
            });
        }
        if ticket.kind != kind {
            let name = |kind| match kind {
                TicketKind::Offer => "offer",
                TicketKind::Expect => "expectation",
            };
            return Err(Error::WrongTicket {
                request: ticket.request.clone(),
                got: name(ticket.kind),
                wanted: name(kind),
            });
        }
        Ok(peer)
    }
}

/// A pull that is planned and has yet to begin.
pub(crate) struct PlannedPull {
    peer: Arc<PeerSession>,
    plan: Arc<Plan>,
    verify: Option<Verification>,
    request: RequestId,
    nonce: Nonce,
    lease: Option<LeaseRef>,
    /// Its destination blocks, unless it is a part of something that has them.
    claim: Option<Claim>,
    begun: Instant,
    after: Option<Event>,
    reader: Option<Stream>,
}

impl PlannedPull {
    /// Checking and planning began at `begun`. With what is summed, its checksums are to be compared.
    ///
    /// # Errors
    ///
    /// [`Error::TooManySums`].
    pub(crate) fn new(
        peer: &Arc<PeerSession>,
        ticket: &Ticket,
        plan: Plan,
        summed: Option<(Part, Arc<Summed>)>,
        begun: Instant,
    ) -> Result<Self, Error> {
        let plan = Arc::new(plan);
        let verify = match summed {
            None => None,
            Some((part, summed)) => {
                sums_of(&ticket.request, &plan, &summed, 0)?;
                Some(Verification::new(
                    part,
                    vec![Moved::Planned(Arc::clone(&plan))],
                ))
            }
        };
        Ok(Self {
            peer: Arc::clone(peer),
            plan,
            verify,
            request: ticket.request.clone(),
            nonce: ticket.nonce,
            lease: ticket.lease,
            claim: None,
            begun,
            after: None,
            reader: None,
        })
    }

    /// What it waits for on a GPU, and who waits for it there.
    pub(crate) fn comes_with(&mut self, options: &PullOptions) {
        self.after.clone_from(&options.after);
        self.reader.clone_from(&options.stream);
    }

    pub(crate) fn peer(&self) -> &Arc<PeerSession> {
        &self.peer
    }

    /// Gives it to a worker: the transfer, and who owns it.
    pub(crate) fn submit(
        self,
        engine: &Arc<Inner>,
        told: Told,
        (tag, deadline, release): (u64, Time, bool),
    ) -> Result<(TransferId, u16), Error> {
        let report = self.plan.report();
        let id = TransferId(engine.runtime.next_id());
        let owner = self.peer.owner(id);
        let (plan, after, verify) = (self.plan, self.after, self.verify);
        let verifies = verify.is_some();
        let live = Box::new(Live {
            engine: Arc::clone(engine),
            peer: Arc::clone(&self.peer),
            told,
            request: self.request,
            nonce: self.nonce,
            tag,
            lease: self.lease,
            push: false,
            submitted: engine.now(),
            jobs: Vec::new(),
            report: TransferReport {
                operations: report.operations,
                merged_runs: report.runs,
                bytes: report.bytes,
                prepare: self.begun.elapsed(),
                ..TransferReport::default()
            },
            verify,
            claim: self.claim,
            reader: self.reader,
            tells: false,
            into: None,
        });
        let spec = Spec {
            id,
            peer: self.peer.key,
            kind: Kind::Pull {
                source: Arc::new(Moves {
                    what: Moved::Planned(plan),
                    after,
                    is_released: false,
                    is_there: false,
                }),
                check_lease: report.operations > 0,
                release,
            },
            verify: verifies,
            deadline,
            workers: self.peer.worker_count(),
        };
        self.peer.submit(owner, spec, live)?;
        Ok((id, owner))
    }
}

pub(crate) fn transfer(
    engine: &Arc<Inner>,
    id: TransferId,
    owner: u16,
    shared: Arc<Shared>,
) -> Transfer {
    let runtime = Arc::clone(&engine.runtime);
    let health = Arc::clone(&runtime.health);
    let canceller = Arc::new(move |id| {
        if let Some(worker) = runtime.worker(owner) {
            worker.send(Command::Cancel { id });
        }
    });
    Transfer {
        id,
        shared,
        canceller,
        health,
    }
}

/// That this rank's blocks of the wanted groups come whole from the rank of a ticket.
///
/// # Errors
///
/// [`Error::MissingPart`].
pub(crate) fn needs_no_other(
    engine: &Inner,
    plans: &Plans,
    ticket: &Ticket,
    wanted: impl Fn(u32) -> bool,
) -> Result<(), Error> {
    if plans.gap.is_none() {
        return Ok(());
    }
    let cover = plans.common.cover().of_groups(wanted);
    match Cover::missing(&engine.side(), &[&cover]) {
        None => Ok(()),
        Some(part) => Err(Error::MissingPart {
            part: Box::new(part),
            ranks: vec![ticket.rank],
        }),
    }
}

/// What is summed of a transfer with a peer, if checksums are wanted; this side is `own`.
///
/// # Errors
///
/// [`Error::Sums`], [`Error::Spawn`].
pub(crate) fn verified(
    engine: &Arc<Inner>,
    peer: &PeerSession,
    (own, part): (SideName, Part),
    wanted: Option<bool>,
) -> Result<Option<(Part, Arc<Summed>)>, Error> {
    if !wanted.unwrap_or(engine.config.verifies()) {
        return Ok(None);
    }
    let summed = peer.summed(engine, own, part)?;
    engine.runtime.verifier.start(&engine.runtime)?;
    Ok(Some((part, summed)))
}

/// How many checksums a plan has, if those are not too many with the ones that there are.
///
/// # Errors
///
/// [`Error::TooManySums`].
pub(crate) fn sums_of(
    request: &RequestId,
    plan: &Plan,
    summed: &Summed,
    before: u64,
) -> Result<u64, Error> {
    let counts = plan
        .units()
        .map(|(group, pairs)| (group, plan.scope(), pairs.len() as u64));
    count_sums(request, counts, summed, before)
}

/// The same of so many units of these groups and layers.
///
/// # Errors
///
/// [`Error::TooManySums`].
pub(crate) fn count_sums(
    request: &RequestId,
    counts: impl Iterator<Item = (u32, LayerScope, u64)>,
    summed: &Summed,
    before: u64,
) -> Result<u64, Error> {
    let (mut units, mut sums) = (0, before);
    for (group, scope, count) in counts {
        let tensors = summed.tensors(group, scope).len() as u64;
        units += count;
        sums += tensors.saturating_mul(count);
    }
    let too_many = |what, count, max| {
        Err(Error::TooManySums {
            request: request.clone(),
            what,
            count,
            max,
        })
    };
    match limits::UNITS as u64 {
        _ if sums > MOST_SUMS => too_many("checksums", sums, MOST_SUMS),
        most if units > most => too_many("blocks (or parts of blocks)", units, most),
        _ => Ok(sums - before),
    }
}

/// The destinations of the pairs.
fn destinations(pairs: &[GroupPairs]) -> Vec<GroupBlocks> {
    let of = |pairs: &GroupPairs| GroupBlocks {
        group: pairs.group,
        blocks: pairs.pairs.iter().map(|pair| pair.dst).collect(),
    };
    pairs.iter().map(of).collect()
}

/// Checks that the ticket's blocks of a group hold all of these.
pub(crate) fn in_ticket<I: Iterator<Item = u32>>(
    ticket: &Ticket,
    group: u32,
    count: usize,
    ids: impl Fn() -> I,
) -> Result<(), Error> {
    let held: &[u32] = ticket
        .groups
        .iter()
        .find(|g| g.group == group)
        .map_or(&[], |g| &g.blocks);
    // All of them in the ticket's order is the usual case.
    if held.len() == count && held.iter().copied().eq(ids()) {
        return Ok(());
    }
    let missing = |block| Error::NotInTicket {
        request: ticket.request.clone(),
        group,
        block,
    };
    let mut set = crate::block_set::BlockSet::default();
    // The ticket was checked: no block is there twice.
    let _ = set.insert_all(group, held);
    match ids().find(|id| !set.contains(group, *id)) {
        Some(block) => Err(missing(block)),
        None => Ok(()),
    }
}
