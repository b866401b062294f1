//! From an authenticated session to queue pairs that carry transfers: descriptions are exchanged,
//! layouts compared, a path is chosen, queue pairs are joined.

mod client;
mod reach;
mod rebuild;
mod server;

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Sender;

use kvxfer_verbs::{QpEndpoint, RtsAttr};

use rebuild::Rebuilding;
pub(crate) use rebuild::is_rebuilt;

use super::acquainted::{Acquainted, Known};
use super::description::{consistent, plans};
use super::gpu::GpuPeer;
use super::lanes::{Joining, Lanes, Made};
use super::link::Link;
use super::observe::shown;
use super::pairing::{KnownRail, Pair};
use super::peer_session::PeerSession;
use crate::bench::BenchSeat;
use crate::engine::Inner;
use crate::error::Error;
use crate::event::PeerName;
use crate::ids::{EngineId, Rank};
use crate::layout::{KvFormat, PlacementDesc};
use crate::ping::ProbeSeat;
use crate::session::Session;
use crate::transfer::{Cause, PeerKey};
use crate::transport::{PathInfo, RdmaLink};
use crate::wire::{
    Candidate, Describe, Message, Refusal, Role, SessionId, Side as End, StreamKey, limits,
};

/// What the driver is to do, in this order.
#[derive(Debug)]
pub(crate) enum Step {
    Accept,
    Send(Message),
    Refuse(Refusal, Error),
}

/// A queue pair that waits for its streams, of one of the session's pairs of rails.
#[derive(Debug)]
struct Awaiting {
    made: Made,
    pair: usize,
    remote: QpEndpoint,
    requester: Option<TcpStream>,
    responder: Option<TcpStream>,
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
    /// The path `ipc`, if a client has offered it and the server has declined.
    no_ipc: Option<Candidate>,
    /// Whether a server has tried its part of the path `ipc`.
    reached: bool,
    /// What this side has a GPU fetch of the peer's memory.
    gpu: Option<GpuPeer>,
    /// The rails that the peer is told of, as the runtime numbers them.
    rails: Vec<usize>,
    /// The pairs of rails that are joined, and the ways over them on RDMA devices.
    pairs: Vec<Pair>,
    links: Vec<Option<RdmaLink>>,
    /// Whether a server has taken the one set of queue pairs that a session has.
    taken: bool,
    /// A client's queue pairs that wait for the answer, for each pair of rails.
    offered: Vec<(Pair, Vec<Made>)>,
    /// A server's queue pairs that wait for their streams.
    joining: Vec<Awaiting>,
    lanes: Lanes,
    peer: Option<Arc<PeerSession>>,
    rebuilding: Rebuilding,
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
            no_ipc: None,
            reached: false,
            gpu: None,
            rails: Vec::new(),
            pairs: Vec::new(),
            links: Vec::new(),
            taken: false,
            offered: Vec::new(),
            joining: Vec::new(),
            lanes: Lanes::default(),
            peer: None,
            rebuilding: Rebuilding::default(),
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
        if let Err(detail) = consistent(&describe, &rails, &format, &placement) {
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

    /// Whether both sides tell the end of a push on the data plane. Over RDMA they do in any case: that
    /// a write is confirmed does not mean that the consumer sees it, and its receive's completion does.
    fn notices(&self, engine: &Inner) -> bool {
        let theirs = self
            .known
            .as_ref()
            .is_some_and(|k| k.describe.facts.enable_notification);
        engine.runtime.is_rdma() || engine.config.enable_notification && theirs
    }

    /// Joins the lanes of a pair of rails that the peer counts on.
    fn join_counted(
        &mut self,
        pair: usize,
        joining: Vec<Joining>,
        retries: RtsAttr,
    ) -> Result<(), Error> {
        let workers: Vec<u16> = joining.iter().map(|(made, ..)| made.worker).collect();
        if let Some(error) = self.lanes.join(pair, joining, retries)? {
            self.lanes.leave_out(pair, &workers, error);
        }
        Ok(())
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
        let rails = self.pairs.iter().filter_map(|pair| {
            let theirs = known.rails.get(usize::from(pair.theirs))?;
            Some((pair.clone(), theirs.device.clone()))
        });
        self.rebuilding.rails = rails.collect();
        self.rebuilding.notices = notices;
        let lanes = std::mem::take(&mut self.lanes);
        let resets = lanes.resets();
        let joined = Acquainted {
            key: self.key,
            known,
            path,
            gpu: self.gpu.take(),
            notices,
            pairs: std::mem::take(&mut self.pairs),
            links: std::mem::take(&mut self.links),
            lanes,
        };
        let peer = joined.into_peer(engine, link)?;
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
        let resets = resets.into_iter();
        Ok(resets.map(|reset| Step::Send(reset.into())).collect())
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
        if cause == Cause::PeerClosed {
            peer.hear_out(engine);
        }
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
