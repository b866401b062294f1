//! The side that connected: it chooses the path, offers queue pairs, and joins those that are answered.

use std::sync::Arc;

use tracing::{info, warn};

use kvxfer_verbs::{Link as QpLink, QpEndpoint};

use super::{Bringup, Step, cut, refuse};
use crate::engine::Inner;
use crate::engine::dial::Dialler;
use crate::engine::lanes::{Joining, Made};
use crate::engine::pairing::{self, Ends, Pair, left_out, pair_up, rdma_link};
use crate::error::Error;
use crate::transfer::PeerKey;
use crate::transport::{Choice, PathInfo, SkippedRail, soft_path};
use crate::wire::{Candidate, PathKind, QpAnswer, QpOffer, Ready, Refusal, StreamHalf};

/// A pair of rails, its queue pairs here, and the peer's.
type Taken = (Pair, Vec<Made>, Vec<QpEndpoint>);

impl Bringup {
    /// Chooses the path and makes the queue pairs.
    pub(super) fn offer(&mut self, engine: &Arc<Inner>) -> Result<Step, Error> {
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
        let (pairs, mut skipped) = pair_up(&engine.runtime, &self.rails, theirs)?;
        let notices = self.notices(engine);
        engine.runtime.health.check()?;
        let (mut endpoints, mut first) = (Vec::new(), None);
        for pair in pairs {
            let rail = (pair.rail, pair.gid.as_ref());
            match (engine.runtime).queue_pairs(engine, rail, self.key, count, notices) {
                Ok(qps) => {
                    endpoints.extend(pairing::pack(&pair, &qps)?);
                    self.offered.push((pair, qps));
                }
                Err(error) => {
                    let context = &engine.runtime.rail(pair.rail)?.context;
                    skipped.push(left_out(context, &error));
                    first.get_or_insert(error);
                }
            }
        }
        if let Some(error) = first.filter(|_| self.offered.is_empty()) {
            return Err(error);
        }
        let offer = QpOffer {
            offer: 1 + u32::from(self.no_ipc.is_some()),
            replaces: None,
            path: path.beneath(),
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

    fn choose(&mut self, engine: &Inner) -> Result<PathInfo, Error> {
        // Once is enough.
        let reach = engine.config.path.allows(PathKind::Ipc) && self.no_ipc.is_none();
        let unreachable = match reach {
            true => self.reach_gpu(engine).err(),
            false => None,
        };
        let unstaged = self.unstaged(engine);
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
            blocks: self.blocks(engine),
            unregistered: self.unregistered(engine),
            unreachable,
            unstaged,
            declined: self.no_ipc.as_ref(),
            allowed: &engine.config.path,
        }
        .choose()
        .inspect(|path| {
            if path.path != PathKind::Ipc {
                self.gpu = None;
            }
        })
    }

    /// The server takes none of the queue pairs. Where that is because it cannot do its part over GPU links, others
    /// are offered, for the next best way.
    fn declined(&mut self, engine: &Arc<Inner>, answer: QpAnswer) -> Result<Vec<Step>, Error> {
        let offered = self.path.take().map(|path| path.path);
        if offered != Some(PathKind::Ipc) {
            return Err(Error::NoPath {
                forced: engine.config.path.forced(),
                candidates: answer.candidates,
            });
        }
        let why_not = answer.candidates.into_iter();
        let why_not = why_not.filter(|of| of.path == PathKind::Ipc);
        let why_not = why_not.filter_map(|of| of.why_not).next();
        self.no_ipc = Some(Candidate {
            path: PathKind::Ipc,
            why_not: Some(why_not.unwrap_or_else(|| "the peer does not take it".to_owned())),
        });
        self.offered.clear();
        Ok(vec![self.offer(engine)?])
    }

    /// The server has answered a client's offer: the queue pairs are joined.
    pub(crate) fn answered(
        &mut self,
        engine: &Arc<Inner>,
        answer: QpAnswer,
    ) -> Result<Vec<Step>, Error> {
        if let Some(successor) = self.rebuilding.answered(&answer) {
            return self.rebuilt(engine, successor, &answer);
        }
        let Some(path) = answer.path else {
            return self.declined(engine, answer);
        };
        if self.path.as_ref().map(PathInfo::beneath) != Some(path) {
            let detail = format!("path {path} is not the one that was offered");
            return Ok(vec![refuse(Refusal::BadDescription { detail })]);
        }
        let joined = match self.taken_by(engine, &answer) {
            Ok(joined) => joined,
            Err(detail) => return Ok(vec![refuse(Refusal::BadDescription { detail })]),
        };
        let retries = engine.runtime.retries();
        let mut streams = 0_u32;
        for (at, (pair, qps, ends)) in joined.into_iter().enumerate() {
            let rail = rdma_link(&engine.runtime, &pair, &qps, &ends);
            self.links.push(rail);
            let theirs = usize::from(pair.theirs);
            self.pairs.push(pair);
            let mut joining: Vec<Joining> = Vec::with_capacity(qps.len());
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
                        let qp = streams;
                        streams += 1;
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
                joining.push((made, remote, link));
            }
            self.join_counted(at, joining, retries)?;
        }
        self.lanes.some_up()?;
        Ok(vec![Step::Send(Ready {}.into())])
    }

    /// The offered queue pairs that an answer takes, with the peer's ends; the error says what is wrong
    /// with it. Those of rails that it leaves out are gone.
    fn taken_by(&mut self, engine: &Inner, answer: &QpAnswer) -> Result<Vec<Taken>, String> {
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
            let rail = engine.runtime.rail(pair.rail).ok();
            if let (Some(path), Some(rail)) = (&mut self.path, rail) {
                let device = &rail.context.device().name;
                let reason = "left out by the peer";
                path.skipped.push(SkippedRail::new(device, reason));
            }
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
}
