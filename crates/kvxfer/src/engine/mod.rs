//! The engine: memory that is registered, requests that are offered and expected, and the peers
//! that they are exchanged with.

mod accept;
mod acquainted;
mod api;
mod async_events;
mod books;
mod bringup;
mod connect;
mod description;
mod dial;
mod events;
mod farewell;
mod gpu;
mod handle;
mod health;
mod joint;
#[cfg(test)]
mod kernel_links_tests;
#[cfg(test)]
mod lane_tests;
mod lanes;
mod link;
#[cfg(test)]
mod link_tests;
mod loopback;
mod moves;
pub(crate) mod net;
mod notices;
mod observe;
mod pairing;
#[cfg(test)]
mod panic_tests;
mod peer;
mod peer_lanes;
mod peer_session;
mod presence;
mod rail;
#[cfg(test)]
mod rail_tests;
mod runtime;
mod scratch;
#[cfg(test)]
mod staged_tests;
mod tether;
mod verify;
#[cfg(test)]
mod vram_tests;
mod wake;
mod worker;

mod instance;
mod pull;
mod push;
mod queues;
mod ranks;
mod written;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use tracing::{debug, error, info};

use kvxfer_verbs::{Access, Memory};

pub use crate::transport::check_device;
pub use api::Engine;
pub use handle::{Failure, Outcome, Transfer, TransferReport};
pub use instance::Instance;
pub use observe::{PeerLayout, describe};
pub use peer::{Peer, PeerFacts, PullOptions};
pub use pull::Pull;
pub use push::{GpuQueue, Push, PushOptions};
pub use ranks::RanksPush;

pub(crate) use connect::{Target, connect};
pub(crate) use dial::Dialler;
use peer_session::ClosedPush;
pub(crate) use peer_session::PeerSession;
pub(crate) use runtime::{Runtime, random_nonce, session_config, spawn};
pub(crate) use wake::poll_timeout;

use books::{Books, not_counted};
use events::EventQueue;
use farewell::FAREWELL;
use gpu::{GpuSide, HostSide};
use link::Link;
use presence::{Met, Presence};
use push::Pushes;
use rail::{RailBlocks, RailMemory, register_blocks};
use scratch::{Landings, LeaseTable};
use worker::{Command, Live};

use crate::bench::BenchSeat;
use crate::blocks::GroupBlocks;
use crate::claims::{BlockInUse, Claim, Claimant, Claims, Purpose};
use crate::config::Config;
use crate::error::Error;
use crate::event::{Event, PeerName};
use crate::ids::{EngineId, Generation, Nonce, Rank, RequestId};
use crate::layout::{KvFormat, KvPlacement, PlacementDesc};
use crate::leases::ReleaseAnswer;
use crate::plan::{Cover, PlanError};
use crate::rails::RailSet;
use crate::ticket::{Ticket, TicketKind};
use crate::time::Time;
use crate::transfer::{Cause, JobId, Notice, PeerKey, TransferId};
use crate::wire::{
    Blob, ConfigFacts, Describe, Fingerprint, GoodbyeReason, KvRole, LinksAnswer, LinksWanted,
    Message, MessageKind, PushAborted, PushClosed, PushDone, PushTold, QpReset, RailDesc, Refusal,
    Release, RemoteSpan, StageFree, Taken, limits,
};

/// Lease checks that can be under way at once.
const LANDINGS: u32 = 1024;
/// How long an engine that goes waits for drivers to take back what peers had lent.
const LAST_LENT: Duration = Duration::from_secs(1);

/// The clock that the state machines are given: nanoseconds since the runtime began.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock(Instant);

impl Clock {
    fn new() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn now(&self) -> Time {
        Time(u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
}

/// The peers of an engine.
#[derive(Debug, Default)]
struct Roster {
    up: HashMap<PeerKey, Arc<PeerSession>>,
    /// Lost ones whose queue pairs are not gone yet.
    draining: HashSet<PeerKey>,
    /// What the owner is told of them.
    presence: Presence,
    /// Control connections, to be closed when the engine goes.
    links: Vec<Weak<Link>>,
    /// Whether it goes.
    closing: bool,
}

/// What an engine's handles and threads share.
pub(crate) struct Inner {
    pub(crate) runtime: Arc<Runtime>,
    pub(crate) config: Config,
    pub(crate) id: EngineId,
    pub(crate) generation: Generation,
    pub(crate) format: KvFormat,
    fingerprint: [u8; 32],
    pub(crate) placement: KvPlacement,
    /// The same memory, where it is a GPU's.
    pub(crate) gpu: Option<Arc<GpuSide>>,
    /// And where it is the host's.
    pub(crate) host: Option<HostSide>,
    /// The memory on each of the runtime's rails.
    pub(crate) rails: Vec<RailMemory>,
    pub(crate) scratch: Landings,
    pub(crate) scratch_region: u32,
    pub(crate) lease_table: LeaseTable,
    pub(crate) books: Arc<Books>,
    /// Which blocks are in what.
    pub(crate) claims: Claims,
    pub(crate) pushes: Pushes,
    pub(crate) events: EventQueue,
    roster: Mutex<Roster>,
    /// Where a bandwidth test's own messages go.
    pub(crate) bench_inbox: Option<Sender<Vec<u8>>>,
    /// Whether bandwidth tests must have this engine's format.
    pub(crate) bench_held: AtomicBool,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("id", &self.id)
            .field("generation", &self.generation)
            .field("rank", &self.rank())
            .finish_non_exhaustive()
    }
}

impl Inner {
    /// Registers the memory and starts the time keeper.
    pub(crate) fn new(
        runtime: Arc<Runtime>,
        config: Config,
        format: KvFormat,
        placement: KvPlacement,
        bench_inbox: Option<Sender<Vec<u8>>>,
    ) -> Result<Arc<Self>, Error> {
        placement.desc().validate(&format)?;
        let access = remote_access(config.kv_role);
        let mut gpu = GpuSide::of(placement.memory(), &config)?;
        let own = (placement.memory(), access);
        let blocks = match &mut gpu {
            None => register_blocks(runtime.rails(), own)?,
            Some(gpu) => gpu.register(&runtime, &config, own)?,
        };
        let host = gpu.is_none().then(|| {
            let regions = blocks.first().map_or(&[][..], |rail| &rail.regions);
            HostSide::new(placement.memory(), (&runtime, &config), regions)
        });
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(Error::random)?;
        let generation = Generation(random);
        let id = match &config.engine_id {
            Some(id) => EngineId(id.as_str().into()),
            None => EngineId(format!("engine-{generation}").into()),
        };
        let scratch = Landings::new(LANDINGS)?;
        // Where the blocks are moved by the GPU alone, queue pairs know nothing of them.
        let registered = blocks.first().map_or(0, |rail| rail.regions.len());
        let scratch_region = u32::try_from(registered).unwrap_or(u32::MAX);
        let lease_table = LeaseTable::new(config.lease_slots)?;
        let staging = gpu.as_ref().and_then(|gpu| gpu.staging().ok());
        let register = |(rail, blocks): (&rail::Rail, RailBlocks)| {
            let leases = lease_table.memory();
            RailMemory::register(&rail.pd, blocks, scratch.memory(), leases, staging)
        };
        let rails = runtime.rails().iter().zip(blocks).map(register);
        let rails = rails.collect::<Result<Vec<_>, _>>()?;
        let fingerprint = format.fingerprint().0;
        let claims = Claims::new(claimed_pools(&format, placement.desc()));
        let (slots, grace) = (config.lease_slots, config.drain_grace);
        let books = Arc::new(Books::new(slots, grace, claims.clone()));
        let inner = Arc::new(Self {
            runtime,
            id,
            generation,
            format,
            fingerprint,
            placement,
            gpu: gpu.map(Arc::new),
            host,
            rails,
            scratch,
            scratch_region,
            lease_table,
            books,
            claims,
            pushes: Pushes::default(),
            events: EventQueue::new()?,
            roster: Mutex::default(),
            bench_inbox,
            bench_held: AtomicBool::new(false),
            config,
        });
        let (weak, books) = (Arc::downgrade(&inner), Arc::clone(&inner.books));
        // The time keeper holds the books alone, and asks each time whether their engine still is.
        spawn("kvx-books", move || books.keep_time(&weak))?;
        Ok(inner)
    }

    pub(crate) fn clock(&self) -> Clock {
        self.runtime.clock
    }

    pub(crate) fn now(&self) -> Time {
        self.runtime.clock.now()
    }

    /// When a transfer is due that may take so long, or as long as is configured.
    pub(crate) fn deadline(&self, within: Option<Duration>) -> Time {
        let within = within.unwrap_or(self.config.transfer_timeout);
        self.now().saturating_add(within)
    }

    pub(crate) fn rank(&self) -> Rank {
        self.placement.desc().topology().rank
    }

    pub(crate) fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// The access that peers' queue pairs need: a producer's lease slots are read, whatever else.
    pub(crate) fn remote_access(&self) -> Access {
        remote_access(self.config.kv_role)
    }

    /// Claims blocks that are about to be read here or by peers. What is never written needs no claim.
    pub(crate) fn claim_source(
        &self,
        request: &RequestId,
        purpose: Purpose,
        groups: impl FnOnce() -> Vec<GroupBlocks>,
    ) -> Result<Option<Claim>, BlockInUse> {
        if !self.config.kv_role.consumes() {
            return Ok(None);
        }
        let who = Claimant { request, purpose };
        self.claims.claim(who, groups()).map(Some)
    }

    /// Whether all memory that queue pairs reach has a file that a peer on this host could map.
    pub(crate) fn shareable(&self) -> bool {
        let mut memories = self.placement.memory().iter();
        self.gpu.is_some() || memories.all(|memory| memory.fd().is_some())
    }

    /// What peers are told, with these rails.
    pub(crate) fn describe(&self, rails: &[usize]) -> Result<Describe, Error> {
        let span = |region: &kvxfer_verbs::MemoryRegion| RemoteSpan {
            addr: region.addr(),
            len: region.len(),
            rkey: region.rkey(),
        };
        let on_gpu = |memory: &Arc<dyn Memory>| RemoteSpan {
            addr: memory.addr(),
            len: memory.len(),
            rkey: 0,
        };
        let registered = usize::try_from(self.scratch_region).unwrap_or(usize::MAX);
        let describe = |at: &usize| {
            let rail = self.runtime.rail(*at)?;
            let memory = self.rails.get(*at).ok_or(Error::ShuttingDown)?;
            let regions = memory.regions.regions().iter();
            Ok::<_, Error>(RailDesc {
                place: rail.place,
                device: Blob::pack("device address", &rail.context.address())?,
                memories: match &self.gpu {
                    Some(gpu) if !gpu.is_registered() => {
                        self.placement.memory().iter().map(on_gpu).collect()
                    }
                    _ => regions.take(registered).map(span).collect(),
                },
                leases: memory.leases.regions().first().map(span),
                scratch: None,
                staging: (memory.staging.iter())
                    .find_map(|table| table.regions().first())
                    .map(span),
            })
        };
        let config = &self.config;
        Ok(Describe {
            engine: self.id.clone(),
            generation: self.generation,
            rank: self.rank(),
            kv_role: config.kv_role,
            wanted: None,
            fingerprint: Fingerprint(self.fingerprint),
            format: Blob::pack("format", &self.format)?,
            placement: Blob::pack("placement", self.placement.desc())?,
            rails: rails.iter().map(describe).collect::<Result<_, _>>()?,
            facts: ConfigFacts {
                qp_per_transfer: config.qp_per_transfer,
                max_send_wr: self.runtime.send_wr(),
                max_msg_sge: self.runtime.max_sge(),
                max_msg_bytes: self.runtime.max_msg_bytes(),
                enable_notification: config.enable_notification,
                num_worker_threads: config.num_worker_threads,
                listen_port: self
                    .runtime
                    .listens_on()
                    .map_or(0, |address| address.port()),
            },
            fd_backed: self.shareable(),
            gpu: self.gpu.as_ref().map(|gpu| gpu.shown().clone()),
            shared: self.host.as_ref().and_then(HostSide::token),
        })
    }

    // ---- peers -------------------------------------------------------------------------------

    fn roster(&self) -> MutexGuard<'_, Roster> {
        self.roster.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn peer(&self, key: PeerKey) -> Option<Arc<PeerSession>> {
        self.roster().up.get(&key).cloned()
    }

    /// The peer of that name, if a session with it stands; the newest where there are several.
    pub(crate) fn peer_named(&self, name: &PeerName) -> Option<Arc<PeerSession>> {
        let roster = self.roster();
        roster
            .up
            .values()
            .filter(|peer| peer.name == *name)
            .max_by_key(|peer| peer.key)
            .cloned()
    }

    pub(crate) fn is_draining(&self, key: PeerKey) -> bool {
        self.roster().draining.contains(&key)
    }

    /// Remembers a control connection, to be closed with the engine.
    pub(crate) fn adopt(&self, link: &Arc<Link>) {
        let mut roster = self.roster();
        roster.links.retain(|link| link.strong_count() > 0);
        roster.links.push(Arc::downgrade(link));
        if roster.closing {
            link.close(GoodbyeReason::ShuttingDown);
        }
    }

    /// A peer has said who it is. False: a later life of it has been met. If it is a new life, the
    /// sessions of the earlier ones end now, whether or not their connections have noticed.
    pub(crate) fn meet(&self, name: &PeerName, generation: Generation) -> bool {
        let mut roster = self.roster();
        let old = match roster.presence.meet(name, generation) {
            Met::Retired => return false,
            Met::Current(old) => old,
        };
        let old: Vec<Arc<PeerSession>> = old
            .iter()
            .filter_map(|key| roster.up.get(key).cloned())
            .collect();
        drop(roster);
        for peer in old {
            info!(peer = %name.engine, old = %peer.generation, new = %generation, "restarted");
            peer.fail(Cause::PeerRestarted);
        }
        true
    }

    pub(crate) fn peer_up(&self, peer: &Arc<PeerSession>) {
        let mut roster = self.roster();
        roster.up.insert(peer.key, Arc::clone(peer));
        let current = roster.presence.up(&peer.name, peer.key, peer.generation);
        self.tell(&mut roster);
        drop(roster);
        if !current {
            peer.fail(Cause::PeerRestarted);
        }
    }

    /// A session is over: everything that ran over it ends. Returns the cause that stands.
    pub(crate) fn peer_down(self: &Arc<Self>, peer: &Arc<PeerSession>, cause: Cause) -> Cause {
        let cause = peer.lose(cause);
        {
            let mut roster = self.roster();
            roster.up.remove(&peer.key);
            if !peer.is_gone() {
                roster.draining.insert(peer.key);
            }
            roster.presence.lost(&peer.name, peer.key, &cause);
        }
        info!(peer = %peer.name.engine, %cause, "peer is down");
        self.pushes.peer_lost(peer.key);
        self.books.with(self, |books, now| {
            books.forget_peer(now, self, peer.key, &cause);
            books.expects.peer_lost(now, peer.key, &cause);
        });
        peer.told();
        cause
    }

    /// Every transfer with a peer whose session is over has told its outcome.
    pub(crate) fn peer_told(&self, peer: &PeerSession) {
        let mut roster = self.roster();
        roster.presence.gone(&peer.name, peer.key);
        self.tell(&mut roster);
    }

    /// Tells the owner of peers. The roster is held, so that events come in the order of what
    /// happens.
    fn tell(&self, roster: &mut Roster) {
        if roster.presence.has_news() {
            self.events.push_peers(|| roster.presence.poll_event());
        }
    }

    /// Tells what found no room before.
    pub(crate) fn catch_up(&self) {
        if self.events.was_behind() {
            self.tell(&mut self.roster());
        }
    }

    /// The last queue pair to a peer is gone: nothing that it posted can land any more.
    pub(crate) fn peer_drained(self: &Arc<Self>, key: PeerKey) {
        self.roster().draining.remove(&key);
        self.books
            .with(self, |books, _| books.expects.peer_reset(key));
    }

    // ---- messages ----------------------------------------------------------------------------

    /// A peer's message. The error says why the peer cannot be trusted any more.
    pub(crate) fn on_message(
        self: &Arc<Self>,
        peer: &Arc<PeerSession>,
        message: Message,
    ) -> Result<(), String> {
        if !peer.may_say(message.kind()) {
            return Err(format!("{} from a peer of that role", message.kind()));
        }
        match message {
            Message::Release(Release { request, nonce }) => {
                let answer = self.books.with(self, |books, _| {
                    books.leases.release(&request, nonce, &peer.name)
                });
                if answer == ReleaseAnswer::Unknown {
                    debug!(%request, ?nonce, "release of a request that is not on offer");
                }
            }
            Message::PushStart(start) => self.books.with(self, |books, now| {
                books.push_started(now, peer, start.request, start.nonce);
            }),
            Message::Announce(announce) => {
                let ticket =
                    Ticket::from_bytes(&announce.ticket.0).map_err(|error| error.to_string())?;
                if ticket.generation != peer.generation
                    || ticket.engine != peer.name.engine
                    || ticket.rank != peer.name.rank
                {
                    return Err("ticket of another engine".to_owned());
                }
                if ticket.kind != TicketKind::Expect {
                    return Err("an offer announced as an expectation".to_owned());
                }
                self.pushes.announced(peer, ticket);
            }
            Message::PushDone(PushDone { request, .. }) if peer.is_rdma() => {
                // It says nothing of what the cards have put in memory.
                return Err(format!("push of {request} done by the control connection"));
            }
            Message::PushDone(done) => return self.push_done(peer, &done),
            Message::PushSums(sums) => {
                return (self.books)
                    .with(self, |books, now| books.push_sums(now, self, peer, sums));
            }
            Message::PushTold(told) => return self.push_told(peer, told),
            Message::Take(take) => return self.take(peer, take),
            Message::TakeStop(stop) => self.take_stop(peer, stop),
            Message::Taken(Taken { number, failed }) => {
                let job = JobId(number);
                let failed = failed.map(|cause| cause.unpack::<Cause>("cause"));
                let failed = failed.map(|cause| cause.unwrap_or(Cause::Revoked));
                if let Some(worker) = self.runtime.worker(job.owner()) {
                    let peer = Arc::clone(peer);
                    worker.send(Command::Taken { peer, job, failed });
                }
            }
            Message::LinksWanted(wanted) => self.links_wanted(peer, wanted),
            Message::LinksAnswer(answer) => self.pushes.links_answered(peer.key, &answer),
            Message::Stage(stage) => return self.stage(peer, stage),
            Message::Staged(staged) => return self.staged(peer, staged),
            Message::StageFree(StageFree { number }) => {
                peer.to_taker(number, |peer| Command::StageFree { peer, number });
            }
            Message::SumsWanted(wanted) => self.runtime.verifier.asked(self, peer, wanted),
            Message::Sums(sums) => return self.runtime.verifier.answered(self, peer, sums),
            Message::PushAborted(PushAborted { request, nonce, .. })
            | Message::PushClosed(PushClosed { request, nonce, .. }) => {
                self.nothing_to_take(peer, &request, nonce)?;
                let closed = ClosedPush {
                    peer: Arc::clone(peer),
                    request,
                    nonce,
                };
                let gpu = self.gpu.as_ref().filter(|_| peer.is_rdma());
                match gpu.is_some_and(|gpu| gpu.is_written_late()) {
                    true => {
                        peer.on_worker(peer.owner(TransferId(nonce.0)), Command::PushClosed(closed))
                    }
                    false => closed.heed(),
                }
            }
            Message::Revoke(revoke) => {
                let cause = revoke
                    .cause
                    .unpack::<Cause>("cause")
                    .unwrap_or(Cause::Revoked);
                self.pushes
                    .revoked(peer, &revoke.request, revoke.nonce, cause);
            }
            Message::QpReset(QpReset { lanes, cause }) => {
                let cause = cause.unpack::<Cause>("cause");
                peer.lanes_reset(&lanes, &cause.unwrap_or(Cause::LaneReset))?;
            }
            Message::Bench(bench) => match &self.bench_inbox {
                // A test that has ended hears nothing more.
                Some(inbox) => drop(inbox.send(bench.payload.0)),
                None => return Err("benchmark message outside a benchmark".to_owned()),
            },
            _ => {}
        }
        Ok(())
    }

    /// Blocks of a push are here of which its kernel has something to say.
    fn push_told(self: &Arc<Self>, peer: &PeerSession, told: PushTold) -> Result<(), String> {
        let PushTold {
            request,
            nonce,
            immediates,
        } = told;
        if peer.is_rdma() {
            // It says nothing of what the cards have put in memory.
            return Err(format!("immediates of {request} by the control connection"));
        }
        self.books.with(self, |books, _| {
            let count = immediates.len() as u64;
            match (books.expects).immediates(&request, nonce, peer.key, count) {
                Ok(true) => {}
                Ok(false) => {
                    debug!(%request, "immediates of a push that is over");
                    return Ok(());
                }
                Err(refusal) => return Err(refusal.to_string()),
            }
            // While the ledgers are held: the outcome comes behind them.
            let told = immediates.into_iter().map(|immediate| Event::Told {
                request: request.clone(),
                nonce,
                peer: peer.name.clone(),
                immediate,
            });
            self.events.push_each(told);
            Ok(())
        })
    }

    /// A producer wants kernels of its own to write the blocks of its push.
    fn links_wanted(self: &Arc<Self>, peer: &PeerSession, wanted: LinksWanted) {
        let LinksWanted { request, nonce } = wanted;
        let answer = peer.life.clone().and_then(|life| {
            self.books.with(self, |books, now| {
                books.let_kernels_write(now, peer.key, life, (&request, nonce))
            })
        });
        let refused = answer.err();
        peer.link.send(
            LinksAnswer {
                request,
                nonce,
                refused,
            }
            .into(),
        );
    }

    /// A producer that says that its push has ended must not have blocks fetched any more.
    fn nothing_to_take(
        self: &Arc<Self>,
        peer: &PeerSession,
        request: &RequestId,
        nonce: Nonce,
    ) -> Result<(), String> {
        let of = (request.clone(), nonce);
        match self
            .books
            .with(self, |books, _| books.takes.any(peer.key, &of))
        {
            true => Err("a push ended whose blocks are being fetched".to_owned()),
            false => Ok(()),
        }
    }

    /// What a peer has told on a queue pair. The error says why it cannot be trusted any more.
    pub(crate) fn on_notice(
        self: &Arc<Self>,
        peer: &Arc<PeerSession>,
        notice: Message,
    ) -> Result<(), String> {
        match notice {
            Message::PushDone(done) if peer.may_say(MessageKind::PushDone) => {
                self.push_done(peer, &done)
            }
            other => Err(format!("{} on a queue pair", other.kind())),
        }
    }

    /// A producer has said that its push is done, and that what went over one pair of rails is in memory.
    /// Over RDMA it says so on a queue pair of that very pair, or when all of that pair's are down here: the
    /// completion of the receive makes it true, or that they are destroyed.
    fn push_done(self: &Arc<Self>, peer: &Arc<PeerSession>, done: &PushDone) -> Result<(), String> {
        let PushDone {
            request,
            nonce,
            sender,
            sums,
            rails,
            rail,
            ..
        } = done;
        let nonce = *nonce;
        if *sender != peer.name.rank {
            return Err(format!("push done by {sender} from {}", peer.name.rank));
        }
        let all = RailSet::first(peer.rails.len());
        self.nothing_to_take(peer, request, nonce)?;
        if !rails.is_within(all) {
            return Err(format!("push done over rails {rails} of {all}"));
        }
        self.books.with(self, |books, now| {
            let whole = (books.expects).rail_done(request, nonce, peer.key, (*rails, *rail));
            match whole {
                Ok(true) => books.push_done(now, self, peer, (request, nonce), *sums),
                Ok(false) => {
                    debug!(%request, rail, %rails, "push done over one rail of several");
                    Ok(())
                }
                Err(refusal) => not_counted(request, &refusal),
            }
        })
    }

    /// What producers with these covers together do not give.
    pub(crate) fn gap(&self, covers: &[&Cover]) -> Option<Cause> {
        let part = Box::new(Cover::missing(&self.side(), covers)?);
        Some(Cause::MissingPart { part })
    }

    /// What a sender has pushed was compared with its checksums, which took so much of its room.
    pub(crate) fn push_checked(
        self: &Arc<Self>,
        peer: &PeerSession,
        (request, nonce): (&RequestId, Nonce),
        weight: u64,
        verdict: Result<(), Cause>,
    ) {
        self.books.with(self, |books, now| {
            books.sums.compared(peer.key, weight);
            books.push_checked(now, self, peer.key, (request, nonce), verdict);
        });
    }

    /// What the other side of a transfer is told of its end.
    /// The end of a push is told once for each pair of rails that it was written over.
    pub(crate) fn notice(&self, live: &Live, notice: &Notice) -> Vec<Message> {
        let (request, nonce) = (live.request.clone(), live.nonce);
        let sender = self.rank();
        match notice {
            Notice::Release => vec![Release { request, nonce }.into()],
            Notice::PushDone { wrote } => {
                let rails = live.peer.rails_to_speak_for(*wrote);
                let done = |rail| PushDone {
                    request: request.clone(),
                    nonce,
                    sender,
                    bytes: live.report.bytes,
                    sums: live.verify.as_ref().map_or(0, |verify| verify.told),
                    rails,
                    rail,
                };
                rails.iter().map(|rail| done(rail).into()).collect()
            }
            Notice::PushAborted { cause } => {
                let cause = books::pack_cause(cause);
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

    pub(crate) fn push_ended(&self, id: TransferId) {
        self.pushes.ended(id);
    }

    /// The engine of a bandwidth-test client: its layout, on memory of its own.
    pub(crate) fn bench_engine(
        self: &Arc<Self>,
        describe: &Describe,
        format: &KvFormat,
        placement: &PlacementDesc,
    ) -> Result<BenchSeat, Refusal> {
        BenchSeat::new(self, describe, format, placement)
    }

    /// Ends everything that is under way.
    pub(crate) fn shut_down(self: &Arc<Self>) {
        let until = Instant::now() + FAREWELL;
        let up: Vec<_> = self.roster().up.values().cloned().collect();
        up.iter().for_each(|peer| peer.take_leave(until));
        self.books
            .with(self, |books, now| books.end_all(now, &Cause::ShuttingDown));
        self.wait_for_kernels();
        self.books.stop();
        let (links, peers) = {
            let mut roster = self.roster();
            roster.closing = true;
            let links: Vec<Arc<Link>> = roster.links.iter().filter_map(Weak::upgrade).collect();
            (links, roster.up.values().cloned().collect::<Vec<_>>())
        };
        for link in links {
            link.close(GoodbyeReason::ShuttingDown);
        }
        for peer in peers {
            peer.lose(Cause::ShuttingDown);
        }
    }

    /// Gives producers a moment to say that their kernels have ended, which were let to write here.
    fn wait_for_kernels(&self) {
        let until = Instant::now() + self.config.drain_grace;
        while self.books.kernels_may_write() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Gives what peers had lent a moment to go back: the process may be about to end, and its GPU's driver with it.
    fn settle(&self) {
        if let Some(gpu) = &self.gpu {
            gpu.settle(LAST_LENT);
        }
        if let Some(host) = &self.host {
            host.settle(LAST_LENT);
        }
    }

    /// The engine goes: what kernels of others may yet write is given back to nobody.
    fn keep_what_kernels_write(&self) {
        if self.books.kernels_may_write() {
            error!(
                "kernels of a producer that has not said that they have ended may write blocks: the memory is kept"
            );
            for memory in self.placement.memory() {
                std::mem::forget(Arc::clone(memory));
            }
        }
    }

    /// A random try of a request.
    pub(crate) fn nonce() -> Result<Nonce, Error> {
        let mut bytes = [0; 8];
        getrandom::fill(&mut bytes).map_err(Error::random)?;
        // Not `NO_TICKET`.
        Ok(Nonce(u64::from_le_bytes(bytes).max(1)))
    }

    pub(crate) fn check_request(request: &RequestId) -> Result<(), Error> {
        let len = request.0.len();
        if len == 0 || len > crate::ticket::MAX_NAME_BYTES.min(limits::REQUEST_ID) {
            return Err(Error::RequestName { len });
        }
        Ok(())
    }

    /// That a request has a name, and blocks that this rank has.
    pub(crate) fn check_blocks(
        &self,
        request: &RequestId,
        groups: &[GroupBlocks],
    ) -> Result<(), Error> {
        Self::check_request(request)?;
        let desc = self.placement.desc();
        let known = self.format.groups().len();
        for group in groups {
            if usize::try_from(group.group).map_or(true, |at| at >= known) {
                return Err(Error::Plan(PlanError::UnknownGroup {
                    group: group.group,
                    groups: u32::try_from(known).unwrap_or(u32::MAX),
                }));
            }
            // A group that this rank keeps nothing of has no blocks to be out of range.
            let Some(num_blocks) = desc.num_blocks(group.group) else {
                continue;
            };
            if let Some(&block) = group.blocks.iter().find(|block| **block >= num_blocks) {
                return Err(Error::NoSuchBlock {
                    group: group.group,
                    block,
                    num_blocks,
                });
            }
        }
        Ok(())
    }
}

/// The pool of each group's blocks; none where this rank keeps nothing of the group.
fn claimed_pools(format: &KvFormat, placement: &PlacementDesc) -> Vec<Option<u32>> {
    let groups = (0_u32..).zip(placement.pools()).take(format.groups().len());
    groups
        .map(|(group, pool)| placement.num_blocks(group).map(|_| *pool))
        .collect()
}

/// The access that peers need to the memory of a producer, a consumer, or both.
fn remote_access(role: KvRole) -> Access {
    let mut access = Access::NONE;
    if role.produces() {
        access = access | Access::REMOTE_READ;
    }
    if role.consumes() {
        access = access | Access::LOCAL_WRITE | Access::REMOTE_WRITE;
    }
    access
}
