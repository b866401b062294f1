//! From an authenticated session to queue pairs that carry transfers: descriptions are exchanged,
//! layouts compared, a path is chosen, queue pairs are joined.

use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crossbeam_channel::Sender;
use tracing::{info, warn};

use kvxfer_verbs::{Init, Link as QpLink, QpEndpoint, QueuePair, RtrAttr, RtsAttr};

use super::async_events::Watched;
use super::description::{consistent, plans};
use super::dial::Dialler;
use super::link::Link;
use super::notices::Inbox;
use super::observe::shown;
use super::pairing::{self, Ends, KnownRail, Pair, left_out, pair_up, rdma_link};
use super::peer_session::{LanePlace, PeerRail, PeerSession, Plans, Standing, SummedParts};
use super::worker::Joined;
use crate::bench::BenchSeat;
use crate::engine::Inner;
use crate::error::Error;
use crate::event::PeerName;
use crate::ids::{EngineId, Rank};
use crate::layout::{KvFormat, PlacementDesc};
use crate::ping::ProbeSeat;
use crate::plan::PlanLimits;
use crate::session::Session;
use crate::transfer::{Cause, PeerKey};
use crate::transport::{Choice, PathInfo, SkippedRail, gid_towards, soft_path};
use crate::wire::{
    Describe, Message, PathKind, QpAnswer, QpOffer, Ready, Refusal, Role, SessionId, Side as End,
    StreamHalf, StreamKey, StreamOpening, limits,
};

const MIN_RNR_TIMER: u8 = 12;
/// Queue pairs of one pair of rails: the most that `qp_per_transfer` can ask for.
const MAX_QUEUE_PAIRS: usize = 64;

/// What the driver is to do, in this order.
#[derive(Debug)]
pub(crate) enum Step {
    Accept,
    Send(Message),
    Refuse(Refusal, Error),
}

/// A queue pair in INIT.
#[derive(Debug)]
pub(crate) struct Made {
    /// The rail that it is on.
    pub(crate) rail: usize,
    /// The worker that has its completions.
    pub(crate) worker: u16,
    pub(crate) qp: QueuePair<Init>,
    pub(crate) inbox: Option<Inbox>,
    pub(crate) watched: Arc<Watched>,
}

/// A queue pair on its way up, of one of the session's pairs of rails.
#[derive(Debug)]
struct Joining {
    made: Made,
    pair: usize,
    remote: QpEndpoint,
    requester: Option<TcpStream>,
    responder: Option<TcpStream>,
}

/// A pair of rails, its queue pairs here, and the peer's.
type Taken = (Pair, Vec<Made>, Vec<QpEndpoint>);

/// The pairs of rails that a client's queue pairs are taken for, with the peer's ends of each, and the
/// devices of this side that are left out.
type JoinedRails = (Vec<(Pair, Vec<QpEndpoint>)>, Vec<SkippedRail>);

/// What is known of the peer before it is one.
#[derive(Debug)]
struct Known {
    describe: Describe,
    layout: (KvFormat, PlacementDesc),
    rails: Vec<KnownRail>,
    pull: Option<Plans>,
    push: Option<Plans>,
}

/// The state of one session's set-up.
#[derive(Debug)]
pub(crate) struct Bringup {
    end: End,
    /// Where a client's data streams go: where its control connection went.
    address: Option<SocketAddr>,
    deadline: Instant,
    role: Role,
    /// The peer's key, once queue pairs are made for it.
    key: PeerKey,
    session: Option<(SessionId, StreamKey)>,
    known: Option<Known>,
    path: Option<PathInfo>,
    /// The rails that the peer is told of, as the runtime numbers them.
    rails: Vec<usize>,
    /// The pairs of rails that are joined.
    pairs: Vec<Pair>,
    /// Whether a server has taken the one set of queue pairs that a session has.
    taken: bool,
    /// A client's queue pairs that wait for the answer, for each pair of rails.
    offered: Vec<(Pair, Vec<Made>)>,
    /// A server's queue pairs that wait for their streams.
    joining: Vec<Joining>,
    lanes: Vec<Joined>,
    peer: Option<Arc<PeerSession>>,
    up: Option<Sender<Arc<PeerSession>>>,
    /// The engine, and the rank, that the client wants to have reached.
    wanted: Option<EngineId>,
    wanted_rank: Option<Rank>,
    bench: Option<BenchSeat>,
    probe: Option<ProbeSeat>,
    /// Whether an observer has been told what it came for.
    observed: bool,
}

impl Bringup {
    /// `up` hears of the peer when transfers can run.
    pub(crate) fn client(
        role: Role,
        address: SocketAddr,
        (wanted, wanted_rank): (Option<EngineId>, Option<Rank>),
        deadline: Instant,
        up: Sender<Arc<PeerSession>>,
    ) -> Self {
        Self {
            up: Some(up),
            address: Some(address),
            wanted,
            wanted_rank,
            ..Self::new(End::Client, role, deadline)
        }
    }

    pub(crate) fn server(deadline: Instant) -> Self {
        Self::new(End::Server, Role::Engine, deadline)
    }

    fn new(end: End, role: Role, deadline: Instant) -> Self {
        Self {
            end,
            address: None,
            deadline,
            role,
            key: PeerKey(0),
            session: None,
            known: None,
            path: None,
            rails: Vec::new(),
            pairs: Vec::new(),
            taken: false,
            offered: Vec::new(),
            joining: Vec::new(),
            lanes: Vec::new(),
            peer: None,
            up: None,
            wanted: None,
            wanted_rank: None,
            bench: None,
            probe: None,
            observed: false,
        }
    }

    /// The peer, once transfers can run.
    pub(crate) fn peer(&self) -> Option<&Arc<PeerSession>> {
        self.peer.as_ref()
    }

    /// Both sides have proved themselves.
    pub(crate) fn authenticated(
        &mut self,
        engine: &Arc<Inner>,
        link: &Arc<Link>,
        session: &Session,
    ) -> Result<Vec<Step>, Error> {
        self.role = session.role();
        self.rails = engine.runtime.rails_that_work();
        if let (Some(id), Some(key)) = (session.session_id(), session.stream_key()) {
            if self.end == End::Server
                && let Some(gate) = session.stream_gate()
            {
                engine.runtime.open_door(id, gate, Arc::clone(link));
            }
            self.session = Some((id, key));
        }
        match (self.end, self.role) {
            // What a bench client's counterpart looks like is known when the client has said it.
            (End::Server, Role::Bench) => Ok(Vec::new()),
            (End::Server, Role::Probe) => match ProbeSeat::new(engine) {
                Ok(seat) => {
                    let describe = seat.describe(engine)?;
                    self.rails = vec![seat.rail];
                    self.probe = Some(seat);
                    Ok(vec![Step::Send(describe.into())])
                }
                Err(refusal) => Ok(vec![refuse(refusal)]),
            },
            // It says goodbye then, or the session's time runs out.
            (End::Server, Role::Observer) => {
                self.observed = true;
                Ok(vec![Step::Send(shown(engine.describe(&[])?).into())])
            }
            _ => Ok(vec![Step::Send(self.describe(engine)?.into())]),
        }
    }

    fn describe(&self, engine: &Inner) -> Result<Describe, Error> {
        if self.rails.is_empty() {
            return Err(Error::DeviceFailed);
        }
        Ok(Describe {
            wanted: self.wanted.clone(),
            ..engine.describe(&self.rails)?
        })
    }

    /// The peer has said who it is. A bench client gets an engine of its own.
    pub(crate) fn described(
        &mut self,
        engine: &mut Arc<Inner>,
        describe: Describe,
    ) -> Result<Vec<Step>, Error> {
        if self.probe.is_some() {
            // It has no layout.
            return Ok(vec![Step::Accept]);
        }
        if let Some(wanted) = self.wanted_rank.filter(|wanted| *wanted != describe.rank) {
            // The wire has no refusal of its own for it. That the engine is the right one, the session
            // has seen.
            let name = |rank: Rank| cut(format!("{} {rank}", describe.engine));
            let (here, wanted) = (name(describe.rank), name(wanted));
            return Ok(vec![refuse(Refusal::WrongEngine { here, wanted })]);
        }
        let bad = |detail: String| Ok(vec![refuse(Refusal::BadDescription { detail })]);
        let format: KvFormat = match describe.format.unpack("format") {
            Ok(format) => format,
            Err(error) => return bad(error.to_string()),
        };
        let placement: PlacementDesc = match describe.placement.unpack("placement") {
            Ok(placement) => placement,
            Err(error) => return bad(error.to_string()),
        };
        let rails = match KnownRail::unpack(&describe.rails) {
            Ok(rails) => rails,
            Err(detail) => return bad(detail),
        };
        if let Err(detail) = consistent(&describe, &format, &placement) {
            return bad(detail);
        }
        let mut steps = Vec::new();
        if (self.end, self.role) == (End::Server, Role::Bench) {
            match engine.bench_engine(&describe, &format, &placement) {
                Ok(seat) => {
                    *engine = Arc::clone(seat.engine());
                    self.bench = Some(seat);
                }
                Err(refusal) => return Ok(vec![refuse(refusal)]),
            }
            steps.push(Step::Send(self.describe(engine)?.into()));
        }
        let (pull, push) = match plans(engine, &describe, &format, &placement) {
            Ok(plans) => plans,
            Err(step) => return Ok(vec![step]),
        };
        let name = PeerName {
            engine: describe.engine.clone(),
            rank: describe.rank,
        };
        if !engine.meet(&name, describe.generation) {
            return Ok(vec![refuse(Refusal::GenerationRetired)]);
        }
        self.known = Some(Known {
            describe,
            layout: (format, placement),
            rails,
            pull,
            push,
        });
        steps.push(Step::Accept);
        if self.end == End::Client {
            steps.push(self.offer(engine)?);
        }
        Ok(steps)
    }

    /// Chooses the path and makes the queue pairs.
    fn offer(&mut self, engine: &Arc<Inner>) -> Result<Step, Error> {
        let path = match self.choose(engine) {
            Ok(path) => path,
            Err(error) => {
                let detail = cut(error.to_string());
                return Ok(Step::Refuse(Refusal::NoPath { detail }, error));
            }
        };
        let theirs = self
            .known
            .as_ref()
            .map_or(0, |known| known.describe.facts.qp_per_transfer);
        let count = engine.config.qp_per_transfer;
        if count != theirs {
            info!(
                ours = count,
                theirs, "qp_per_transfer differs: the connecting side's is used"
            );
        }
        self.key = PeerKey(engine.runtime.next_id());
        let theirs = self.known.as_ref().map_or(&[][..], |known| &known.rails);
        let (pairs, skipped) = pair_up(&engine.runtime, &self.rails, theirs)?;
        let notices = self.notices(engine);
        let mut endpoints = Vec::new();
        for pair in pairs {
            let rail = (pair.rail, pair.gid.as_ref());
            let qps = (engine.runtime).queue_pairs(engine, rail, self.key, count, notices)?;
            endpoints.extend(pairing::pack(&pair, &qps)?);
            self.offered.push((pair, qps));
        }
        let offer = QpOffer {
            offer: 1,
            replaces: None,
            path: path.path,
            candidates: path.candidates.clone(),
            endpoints,
        };
        let skipped = engine.runtime.skipped.iter().cloned().chain(skipped);
        self.path = Some(PathInfo {
            skipped: skipped.collect(),
            ..path
        });
        Ok(Step::Send(offer.into()))
    }

    /// Whether both sides tell the end of a push on the data plane. Over RDMA they do in any case: that
    /// a write is confirmed does not mean that the consumer sees it, and its receive's completion does.
    fn notices(&self, engine: &Inner) -> bool {
        let theirs = self
            .known
            .as_ref()
            .is_some_and(|k| k.describe.facts.enable_notification);
        engine.runtime.is_rdma() || engine.config.enable_notification && theirs
    }

    fn choose(&self, engine: &Inner) -> Result<PathInfo, Error> {
        let Some(known) = &self.known else {
            return Err(Error::ShuttingDown);
        };
        let context = |at: &usize| engine.runtime.rail(*at).map(|rail| &rail.context);
        let own = self
            .rails
            .iter()
            .map(context)
            .collect::<Result<Vec<_>, _>>()?;
        let peers = known.rails.iter().map(|rail| &rail.device);
        let pairs: Vec<_> = own.into_iter().zip(peers).collect();
        let Some(((context, peer), others)) = pairs.split_first() else {
            return Err(Error::DeviceFailed);
        };
        Choice {
            context,
            peer,
            others,
            local_shareable: engine.shareable(),
            peer_shareable: known.describe.fd_backed,
            allowed: &engine.config.path,
        }
        .choose()
    }

    /// A server takes the path that the client has chosen, if it may.
    pub(crate) fn offered(
        &mut self,
        engine: &Arc<Inner>,
        offer: QpOffer,
    ) -> Result<Vec<Step>, Error> {
        let none = |candidates| {
            let answer = QpAnswer {
                offer: offer.offer,
                path: None,
                candidates,
                endpoints: Vec::new(),
            };
            vec![Step::Send(answer.into())]
        };
        if self.end == End::Client || self.taken {
            // One set of queue pairs a session, offered by the client.
            return Ok(none(Vec::new()));
        }
        let mut candidates = offer.candidates.clone();
        let soft = soft_path(offer.path);
        let why_not = if !engine.config.path.allows(offer.path) {
            Some("the peer's configuration does not allow it")
        } else if engine.runtime.is_rdma() != (offer.path == PathKind::Rdma) {
            Some("the peer uses another kind of device")
        } else {
            None
        };
        if let Some(why_not) = why_not {
            for candidate in candidates.iter_mut().filter(|c| c.path == offer.path) {
                candidate.why_not = Some(why_not.to_owned());
            }
            return Ok(none(candidates));
        }
        if pairing::most(&offer.endpoints) > MAX_QUEUE_PAIRS {
            return Ok(vec![refuse(Refusal::Full {
                what: "queue pairs of a session".to_owned(),
                limit: MAX_QUEUE_PAIRS as u64,
            })]);
        }
        let remote = match pairing::unpack(&offer.endpoints) {
            Ok(remote) => remote,
            Err(detail) => return Ok(vec![refuse(Refusal::BadDescription { detail })]),
        };
        if remote.is_empty() {
            // A peer without queue pairs could never be drained.
            return Ok(none(candidates));
        }
        let (joined, skipped) = match self.join_rails(engine, remote)? {
            Ok(joined) => joined,
            Err(step) => return Ok(vec![step]),
        };
        if joined.is_empty() {
            let why_not = skipped.first().map(|rail| cut(rail.reason.clone()));
            for candidate in candidates.iter_mut().filter(|c| c.path == offer.path) {
                candidate.why_not.clone_from(&why_not);
            }
            return Ok(none(candidates));
        }
        if self.probe.is_none() {
            self.key = PeerKey(engine.runtime.next_id());
        }
        let notices = self.notices(engine);
        let (mut endpoints, mut rails, mut joining) = (Vec::new(), Vec::new(), Vec::new());
        for (at, (pair, ends)) in joined.into_iter().enumerate() {
            let count = u32::try_from(ends.len()).unwrap_or(u32::MAX);
            let qps = match &self.probe {
                Some(_) if count != 1 => return Ok(none(candidates)),
                Some(seat) => vec![Made {
                    rail: pair.rail,
                    worker: 0,
                    qp: seat.queue_pair(pair.gid.as_ref())?,
                    inbox: None,
                    watched: Arc::default(),
                }],
                None => {
                    let rail = (pair.rail, pair.gid.as_ref());
                    (engine.runtime).queue_pairs(engine, rail, self.key, count, notices)?
                }
            };
            endpoints.extend(pairing::pack(&pair, &qps)?);
            rails.extend(rdma_link(&engine.runtime, &pair, &qps, &ends));
            self.pairs.push(pair);
            let of_pair = qps.into_iter().zip(ends);
            joining.extend(of_pair.map(|(made, remote)| Joining {
                made,
                pair: at,
                remote,
                requester: None,
                responder: None,
            }));
        }
        let answer = QpAnswer {
            offer: offer.offer,
            path: Some(offer.path),
            candidates: offer.candidates.clone(),
            endpoints,
        };
        self.taken = true;
        self.path = Some(PathInfo {
            path: offer.path,
            reason: "chosen by the peer that connected".to_owned(),
            candidates: offer.candidates,
            rails,
            skipped: engine
                .runtime
                .skipped
                .iter()
                .cloned()
                .chain(skipped)
                .collect(),
        });
        let mut steps = vec![Step::Send(answer.into())];
        if soft.is_none() && offer.path != PathKind::Rdma {
            self.joining = joining;
            return Ok(steps);
        }
        let retries = engine.runtime.retries();
        for Joining {
            made, pair, remote, ..
        } in joining
        {
            let link = soft.map_or(QpLink::Rdma, |path| QpLink::SoftAwait { path });
            self.join((made, pair), remote, link, retries)?;
        }
        steps.push(Step::Send(Ready {}.into()));
        Ok(steps)
    }

    /// The pairs of rails that a client's queue pairs are taken for, with the peer's ends of each, and
    /// those of this side that are left out. The step ends the session of a client that tells of rails that
    /// nobody has.
    fn join_rails(
        &self,
        engine: &Inner,
        remote: Vec<Ends>,
    ) -> Result<Result<JoinedRails, Step>, Error> {
        let theirs = self.known.as_ref().map_or(1, |known| known.rails.len());
        let (mut joined, mut skipped) = (Vec::new(), Vec::new());
        for Ends {
            own,
            theirs: rail,
            ends,
        } in remote
        {
            let (Some(&at), true) = (self.rails.get(usize::from(own)), usize::from(rail) < theirs)
            else {
                let detail = format!("no rails {rail} and {own} to join");
                return Ok(Err(refuse(Refusal::BadDescription { detail })));
            };
            // All come from one port: that of the first.
            let port = ends.first().and_then(|end| end.port).map(|port| port.gid);
            let context = &engine.runtime.rail(at)?.context;
            match gid_towards(context, port.as_slice()) {
                Ok(gid) => joined.push((
                    Pair {
                        rail: at,
                        own,
                        theirs: rail,
                        gid,
                    },
                    ends,
                )),
                Err(error) => skipped.push(left_out(context, &error)),
            }
        }
        Ok(Ok((joined, skipped)))
    }

    /// Brings a queue pair up: the next lane.
    fn join(
        &mut self,
        (made, pair): (Made, usize),
        remote: QpEndpoint,
        link: QpLink,
        retries: RtsAttr,
    ) -> Result<(), Error> {
        // Cards take up to four times what they are told (InfiniBand, volume 1, 9.7.6.1.3).
        let times = if matches!(link, QpLink::Rdma) { 4 } else { 1 };
        let attr = RtrAttr {
            remote,
            link,
            min_rnr_timer: MIN_RNR_TIMER,
        };
        self.lanes.push(Joined {
            rail: made.rail,
            worker: made.worker,
            pair,
            number: u16::try_from(self.lanes.len()).unwrap_or(u16::MAX),
            qp: made.qp.rtr(attr)?.rts(retries)?,
            inbox: made.inbox,
            watched: made.watched,
            tried: retries.retry_time().map(|time| time * times),
        });
        Ok(())
    }

    /// A server's data stream has come and was admitted.
    pub(crate) fn stream(
        &mut self,
        engine: &Arc<Inner>,
        opening: StreamOpening,
        stream: TcpStream,
    ) -> Result<Vec<Step>, Error> {
        let at = usize::try_from(opening.qp)
            .ok()
            .and_then(|at| self.joining.get_mut(at));
        let Some(joining) = at else {
            return Ok(Vec::new());
        };
        // What the dialler requests on, this side responds on.
        match opening.half {
            StreamHalf::Requester => joining.responder = Some(stream),
            StreamHalf::Responder => joining.requester = Some(stream),
        }
        if !self
            .joining
            .iter()
            .all(|j| j.requester.is_some() && j.responder.is_some())
        {
            return Ok(Vec::new());
        }
        for joining in std::mem::take(&mut self.joining) {
            if let (Some(requester), Some(responder)) = (joining.requester, joining.responder) {
                let link = QpLink::SoftTcp {
                    requester,
                    responder,
                };
                let retries = engine.runtime.retries();
                self.join((joining.made, joining.pair), joining.remote, link, retries)?;
            }
        }
        Ok(vec![Step::Send(Ready {}.into())])
    }

    /// The server has answered a client's offer: the queue pairs are joined.
    pub(crate) fn answered(
        &mut self,
        engine: &Arc<Inner>,
        answer: QpAnswer,
    ) -> Result<Vec<Step>, Error> {
        let Some(path) = answer.path else {
            return Err(Error::NoPath {
                forced: engine.config.path.forced(),
                candidates: answer.candidates,
            });
        };
        if self.path.as_ref().map(|chosen| chosen.path) != Some(path) {
            let detail = format!("path {path} is not the one that was offered");
            return Ok(vec![refuse(Refusal::BadDescription { detail })]);
        }
        let joined = match self.taken_by(&answer) {
            Ok(joined) => joined,
            Err(detail) => return Ok(vec![refuse(Refusal::BadDescription { detail })]),
        };
        let retries = engine.runtime.retries();
        for (at, (pair, qps, ends)) in joined.into_iter().enumerate() {
            let link = rdma_link(&engine.runtime, &pair, &qps, &ends);
            if let Some(path) = &mut self.path {
                path.rails.extend(link);
            }
            let theirs = usize::from(pair.theirs);
            self.pairs.push(pair);
            for (made, remote) in qps.into_iter().zip(ends) {
                let peer = self
                    .known
                    .as_ref()
                    .and_then(|known| known.rails.get(theirs));
                let link = match (soft_path(path), peer) {
                    (Some(path), Some(peer)) => QpLink::SoftDial {
                        peer: peer.device.clone(),
                        path,
                        deadline: self.deadline,
                    },
                    (None, _) if path == PathKind::Tcp => {
                        let qp = u32::try_from(self.lanes.len()).unwrap_or(u32::MAX);
                        let sequence = 2 * u64::from(qp);
                        let dialler = self.dialler(engine)?;
                        let requester = dialler.dial(qp, StreamHalf::Requester, sequence)?;
                        let responder = dialler.dial(qp, StreamHalf::Responder, sequence + 1)?;
                        QpLink::SoftTcp {
                            requester,
                            responder,
                        }
                    }
                    (None, _) if path == PathKind::Rdma => QpLink::Rdma,
                    _ => return Err(Error::PathNotHere { path }),
                };
                self.join((made, at), remote, link, retries)?;
            }
        }
        Ok(vec![Step::Send(Ready {}.into())])
    }

    /// The offered queue pairs that an answer takes, with the peer's ends; the error says what is wrong
    /// with it. Those of rails that it leaves out are gone.
    fn taken_by(&mut self, answer: &QpAnswer) -> Result<Vec<Taken>, String> {
        let mut offered = std::mem::take(&mut self.offered);
        let mut joined = Vec::new();
        for Ends { own, theirs, ends } in pairing::unpack(&answer.endpoints)? {
            let of_pair = |(pair, _): &(Pair, _)| (pair.own, pair.theirs) == (own, theirs);
            let Some(at) = offered.iter().position(of_pair) else {
                return Err(format!("rails {theirs} and {own} were not offered"));
            };
            let (pair, qps) = offered.remove(at);
            if qps.len() != ends.len() {
                let (got, made) = (ends.len(), qps.len());
                return Err(format!("{got} endpoints for {made} of rail {own}"));
            }
            joined.push((pair, qps, ends));
        }
        for (pair, _) in &offered {
            warn!(rail = pair.own, "the peer leaves a rail out");
        }
        Ok(joined)
    }

    fn dialler<'a>(&'a self, engine: &'a Inner) -> Result<Dialler<'a>, Error> {
        let (Some(address), Some((session, key))) = (self.address, &self.session) else {
            return Err(Error::ShuttingDown);
        };
        Ok(Dialler {
            address,
            session: *session,
            key,
            deadline: self.deadline,
            stop: &engine.runtime.stopping,
        })
    }

    /// Transfers can run: the peer comes into being.
    pub(crate) fn established(
        &mut self,
        engine: &Arc<Inner>,
        link: &Arc<Link>,
    ) -> Result<Vec<Step>, Error> {
        if let Some(seat) = &mut self.probe {
            // Not a peer of the engine: its workers, its memory and its events know nothing of it.
            if let Some(lane) = self.lanes.pop() {
                seat.serve(lane.qp)?;
            }
            return Ok(Vec::new());
        }
        let notices = self.notices(engine);
        let (Some(known), Some(path)) = (self.known.take(), self.path.take()) else {
            return Err(Error::ShuttingDown);
        };
        let runtime = &engine.runtime;
        let key = self.key;
        let place = |lane: &Joined| LanePlace::new(lane.worker, lane.pair);
        let lanes: Vec<LanePlace> = self.lanes.iter().map(place).collect();
        let mut workers: Vec<u16> = lanes.iter().map(|lane| lane.worker).collect();
        workers.sort_unstable();
        workers.dedup();
        let rails = std::mem::take(&mut self.pairs);
        let rails = rails.iter().map(|pair| {
            let theirs = known.rails.get(usize::from(pair.theirs))?;
            let own = runtime.rail(pair.rail).ok()?;
            Some(PeerRail {
                device: own.context.device().name.clone(),
                aside: Mutex::default(),
                regions: Arc::clone(&engine.rails.get(pair.rail)?.regions),
                remote: theirs.memories.clone(),
                leases: theirs.leases,
            })
        });
        // Lanes name them by their places: none may be missing.
        let Some(rails) = rails.collect::<Option<Vec<PeerRail>>>() else {
            return Err(Error::DeviceFailed);
        };
        let first = known.rails.first().zip(runtime.rails().first());
        let same_host = first.is_some_and(|(peer, own)| own.context.shares_host(&peer.device));
        info!(
            peer = %known.describe.engine,
            path = %path.path,
            reason = %path.reason,
            rails = rails.len(),
            queue_pairs = self.lanes.len(),
            "peer is up"
        );
        let describe = known.describe;
        let peer = Arc::new(PeerSession {
            key,
            name: PeerName {
                engine: describe.engine,
                rank: describe.rank,
            },
            generation: describe.generation,
            rails,
            path,
            notices,
            facts: describe.facts,
            same_host,
            standing: Standing::new(workers.len()),
            workers,
            lanes,
            pull: known.pull,
            push: known.push,
            layout: known.layout,
            summing: SummedParts::default(),
            limits: PlanLimits {
                max_msg_bytes: runtime.max_msg_bytes(),
                max_sge: runtime.max_sge(),
            },
            link: Arc::clone(link),
            engine: Arc::downgrade(engine),
            all_workers: runtime.workers().to_vec(),
        });
        runtime.add_lanes(&peer, std::mem::take(&mut self.lanes));
        engine.peer_up(&peer);
        // From here on it goes down with the session, whatever fails.
        let peer = self.peer.insert(peer);
        if let Some(bench) = &mut self.bench {
            bench.serve(peer)?;
        }
        if let Some(up) = self.up.take() {
            // Whoever connected may have given up waiting.
            let _ = up.send(Arc::clone(peer));
        }
        Ok(Vec::new())
    }

    /// The session is over. Returns whether it had come to what it was for, and why it goes on no more.
    pub(crate) fn end(&mut self, engine: &Arc<Inner>, cause: Cause) -> (bool, Cause) {
        if let Some((session, _)) = &self.session {
            engine.runtime.close_door(session);
        }
        self.bench = None;
        if let Some(seat) = self.probe.take() {
            return (seat.serves(), cause);
        }
        let Some(peer) = self.peer.take() else {
            return (self.observed, cause);
        };
        (true, engine.peer_down(&peer, cause))
    }
}

pub(super) fn refuse(refusal: Refusal) -> Step {
    let error = Error::Refused {
        refusal: refusal.clone(),
    };
    Step::Refuse(refusal, error)
}

/// A text that fits into a refusal.
pub(super) fn cut(text: String) -> String {
    text.chars().take(limits::TEXT / 4).collect()
}
