//! The side that was connected to: it takes the path that was chosen, and answers queue pairs with its own.

use std::net::TcpStream;
use std::sync::Arc;

use kvxfer_verbs::Link as QpLink;

use super::{Awaiting, Bringup, End, Step, cut, refuse};
use crate::engine::Inner;
use crate::engine::lanes::{Joining, Made};
use crate::engine::pairing::{self, Ends, Pair, left_out, rdma_link};
use crate::error::Error;
use crate::transfer::PeerKey;
use crate::transport::{BothBlocks, PathInfo, SkippedRail, gid_towards, soft_path};
use crate::wire::{PathKind, QpAnswer, QpOffer, Ready, Refusal, StreamHalf, StreamOpening};

/// Queue pairs of one pair of rails: the most that `qp_per_transfer` can ask for.
const MAX_QUEUE_PAIRS: usize = 64;

/// The pairs of rails that a client's queue pairs are taken for, with the peer's ends of each, and the
/// devices of this side that are left out.
type JoinedRails = (Vec<(Pair, Vec<kvxfer_verbs::QpEndpoint>)>, Vec<SkippedRail>);

/// A reason as the client is told it.
fn at_the_peer(why_not: String) -> String {
    cut(format!("at the peer: {why_not}"))
}

impl Bringup {
    /// Why the path that the client has chosen cannot be taken, as it is told there.
    fn why_not(&mut self, engine: &Inner, path: PathKind) -> Option<String> {
        let memory = match self.probe {
            // It has nothing to do with the engine's memory.
            Some(_) => BothBlocks::ON_HOSTS,
            None => self.blocks(engine).seen_from_there(),
        };
        let blocks = memory.path_over(path);
        let allowed = &engine.config.path;
        let staged = blocks == PathKind::Staged;
        if !allowed.allows(blocks) || staged && !allowed.allows_beneath(path) {
            return Some("the peer's configuration does not allow it".to_owned());
        }
        if engine.runtime.is_rdma() != (path == PathKind::Rdma) {
            return Some("the peer uses another kind of device".to_owned());
        }
        if let Some(why_not) = memory.why_not(blocks) {
            return Some(why_not.to_owned());
        }
        let why_not = match blocks {
            // Opening and pinning take long: a client that is declined has another way to offer.
            PathKind::Ipc if self.reached => Some("this session has tried it".to_owned()),
            PathKind::Staged => self.unstaged(engine),
            _ => None,
        };
        why_not.map(at_the_peer)
    }

    /// A server takes the path that the client has chosen, if it may.
    pub(crate) fn offered(
        &mut self,
        engine: &Arc<Inner>,
        offer: QpOffer,
    ) -> Result<Vec<Step>, Error> {
        let steps = self.answer(engine, offer);
        if !self.taken {
            // What was opened for a path that is not taken is of no use to the next.
            self.gpu = None;
        }
        steps
    }

    fn answer(&mut self, engine: &Arc<Inner>, offer: QpOffer) -> Result<Vec<Step>, Error> {
        let none = |candidates| {
            let answer = QpAnswer {
                offer: offer.offer,
                path: None,
                candidates,
                endpoints: Vec::new(),
            };
            vec![Step::Send(answer.into())]
        };
        let peer = self.peer.clone().filter(|_| self.end == End::Server);
        if let (Some(peer), Some(number)) = (peer, offer.replaces) {
            return self.answer_successor(engine, &peer, number, offer);
        }
        if self.end == End::Client || self.taken {
            // One set of queue pairs a session, and their successors, offered by the client.
            return Ok(none(Vec::new()));
        }
        let mut candidates = offer.candidates.clone();
        let soft = soft_path(offer.path);
        let path = match self.probe {
            Some(_) => offer.path,
            None => self.blocks(engine).path_over(offer.path),
        };
        if let Some(why_not) = self.why_not(engine, offer.path) {
            for candidate in candidates.iter_mut().filter(|c| c.path == path) {
                candidate.why_not = Some(why_not.clone());
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
        let (joined, mut skipped) = match self.join_rails(engine, remote)? {
            Ok(joined) => joined,
            Err(step) => return Ok(vec![step]),
        };
        if joined.is_empty() {
            let why_not = skipped.first().map(|rail| cut(rail.reason.clone()));
            for candidate in candidates.iter_mut().filter(|c| c.path == path) {
                candidate.why_not.clone_from(&why_not);
            }
            return Ok(none(candidates));
        }
        if path == PathKind::Ipc && self.probe.is_none() {
            // The last of what can be wrong, for it takes longest.
            self.reached = true;
            if let Err(why_not) = self.reach_gpu(engine) {
                let why_not = at_the_peer(why_not);
                for candidate in candidates.iter_mut().filter(|c| c.path == path) {
                    candidate.why_not = Some(why_not.clone());
                }
                return Ok(none(candidates));
            }
        }
        if self.probe.is_none() {
            self.key = PeerKey(engine.runtime.next_id());
        }
        engine.runtime.health.check()?;
        let (mut endpoints, mut rails, mut first) = (Vec::new(), Vec::new(), None);
        // Data streams come when the answer is there; what needs none is joined before.
        let awaits = soft.is_none() && offer.path != PathKind::Rdma;
        for (pair, ends) in joined {
            let at = self.pairs.len();
            let qps = match self.answer_to(engine, &pair, ends.len()) {
                Ok(Some(qps)) => qps,
                Ok(None) => return Ok(none(candidates)),
                Err(error) => {
                    skipped.push(left_out(&engine.runtime.rail(pair.rail)?.context, &error));
                    first.get_or_insert(error);
                    continue;
                }
            };
            let own = pairing::pack(&pair, &qps)?;
            let rail = rdma_link(&engine.runtime, &pair, &qps, &ends);
            let of_pair = qps.into_iter().zip(ends);
            if awaits {
                self.joining.extend(of_pair.map(|(made, remote)| Awaiting {
                    made,
                    pair: at,
                    remote,
                    requester: None,
                    responder: None,
                }));
            } else {
                let link = || soft.map_or(QpLink::Rdma, |path| QpLink::SoftAwait { path });
                let of_pair = of_pair.map(|(made, remote)| (made, remote, link()));
                let retries = engine.runtime.retries();
                if let Some(error) = self.lanes.join(at, of_pair.collect(), retries)? {
                    skipped.push(left_out(&engine.runtime.rail(pair.rail)?.context, &error));
                    first.get_or_insert(error);
                    continue;
                }
            }
            endpoints.extend(own);
            rails.push(rail);
            self.pairs.push(pair);
        }
        if let Some(error) = first.filter(|_| self.pairs.is_empty()) {
            return Err(error);
        }
        let answer = QpAnswer {
            offer: offer.offer,
            path: Some(offer.path),
            candidates: offer.candidates.clone(),
            endpoints,
        };
        self.taken = true;
        self.path = Some(PathInfo {
            path,
            over: (path == PathKind::Staged).then_some(offer.path),
            reason: "chosen by the peer that connected".to_owned(),
            candidates: offer.candidates,
            rails: Vec::new(),
            skipped: engine
                .runtime
                .skipped
                .iter()
                .cloned()
                .chain(skipped)
                .collect(),
        });
        self.links = rails;
        let mut steps = vec![Step::Send(answer.into())];
        if !awaits {
            steps.push(Step::Send(Ready {}.into()));
        }
        Ok(steps)
    }

    /// A server's queue pairs for so many of the client's. `None`: a pinger has one.
    fn answer_to(
        &self,
        engine: &Arc<Inner>,
        pair: &Pair,
        count: usize,
    ) -> Result<Option<Vec<Made>>, Error> {
        match &self.probe {
            Some(_) if count != 1 => Ok(None),
            Some(seat) => Ok(Some(vec![Made {
                rail: pair.rail,
                worker: 0,
                qp: seat.queue_pair(pair.gid.as_ref())?,
                inbox: None,
                watched: Arc::default(),
            }])),
            None => {
                let rail = (pair.rail, pair.gid.as_ref());
                let count = u32::try_from(count).unwrap_or(u32::MAX);
                let notices = self.notices(engine);
                let qps = (engine.runtime).queue_pairs(engine, rail, self.key, count, notices);
                qps.map(Some)
            }
        }
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
        let retries = engine.runtime.retries();
        let mut of_pairs: Vec<Vec<Joining>> = self.pairs.iter().map(|_| Vec::new()).collect();
        for joining in std::mem::take(&mut self.joining) {
            let of_pair = of_pairs.get_mut(joining.pair);
            if let (Some(requester), Some(responder), Some(of_pair)) =
                (joining.requester, joining.responder, of_pair)
            {
                let link = QpLink::SoftTcp {
                    requester,
                    responder,
                };
                of_pair.push((joining.made, joining.remote, link));
            }
        }
        for (pair, joining) in of_pairs.into_iter().enumerate() {
            self.join_counted(pair, joining, retries)?;
        }
        self.lanes.some_up()?;
        Ok(vec![Step::Send(Ready {}.into())])
    }
}
