//! Queue pairs that get successors inside a session. One that has failed, and that both sides have destroyed and
//! said so, gives its number to another on the same pair of rails: the side that connected offers it, the other
//! answers. A pair of rails that is set aside is left alone until the next session; so are lanes over TCP, whose
//! streams would have to be dialled.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use kvxfer_verbs::{DeviceAddr, Link as QpLink};

use super::{Bringup, End, Step};
use crate::engine::Inner;
use crate::engine::lanes::{Lanes, Made, gone};
use crate::engine::pairing::{self, Pair};
use crate::engine::peer_session::PeerSession;
use crate::error::Error;
use crate::time::Time;
use crate::transport::{PathInfo, soft_path};
use crate::wire::{PathKind, QpAnswer, QpOffer};

/// How often a lane gets a successor within a time; and how long after its end the first one is offered. The
/// pause doubles from one to the next.
const MOST: usize = 4;
const WITHIN: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(50);
/// How long a queue pair of the software device may take to reach the other. The control connection waits.
const DIAL: Duration = Duration::from_secs(2);

/// When lanes get successors: each a bounded number of times, so that a way that is broken is not tried for ever.
#[derive(Debug, Default)]
struct Pace {
    last: HashMap<u16, VecDeque<Time>>,
}

impl Pace {
    /// When the next successor of a lane that is down now is due.
    fn next(&mut self, number: u16, now: Time) -> Time {
        let last = self.last.entry(number).or_default();
        last.retain(|at| now.since(*at) < WITHIN);
        let due = match last.front() {
            Some(first) if last.len() >= MOST => *first + WITHIN,
            _ => now + PAUSE * (1 << last.len()),
        };
        last.push_back(due);
        due
    }

    /// Whether the other side may have one now; it keeps to the same, and its clock may differ.
    fn allows(&mut self, number: u16, now: Time) -> bool {
        let last = self.last.entry(number).or_default();
        last.retain(|at| now.since(*at) < WITHIN);
        let allowed = last.len() < 2 * MOST;
        if allowed {
            last.push_back(now);
        }
        allowed
    }
}

/// What a session needs to rebuild its queue pairs.
#[derive(Debug, Default)]
pub(super) struct Rebuilding {
    /// The pairs of rails, and the peer's device of each.
    pub(super) rails: Vec<(Pair, DeviceAddr)>,
    pub(super) notices: bool,
    pace: Pace,
    /// Lanes whose successors are to be offered.
    due: BTreeMap<u16, Time>,
    /// Successors that wait for the answer, by their offers.
    offered: HashMap<u32, (u16, Made)>,
    offers: u32,
}

impl Rebuilding {
    /// What was offered, if this is about a successor.
    pub(super) fn answered(&mut self, answer: &QpAnswer) -> Option<(u16, Made)> {
        self.offered.remove(&answer.offer)
    }
}

impl Bringup {
    /// A lane is down on both sides.
    pub(crate) fn rebuild_later(&mut self, number: u16, now: Time) {
        if self.end == End::Client {
            let due = self.rebuilding.pace.next(number, now);
            self.rebuilding.due.insert(number, due);
        }
    }

    /// When a successor is to be offered.
    pub(crate) fn next_rebuild(&self) -> Option<Time> {
        self.rebuilding.due.values().min().copied()
    }

    /// Offers the successors that are due.
    pub(crate) fn rebuild(&mut self, engine: &Arc<Inner>, now: Time) -> Vec<Step> {
        let Some(peer) = self.peer.clone() else {
            return Vec::new();
        };
        let due = self.rebuilding.due.extract_if(.., |_, at| *at <= now);
        let due: Vec<u16> = due.map(|(number, _)| number).collect();
        let mut steps = Vec::new();
        for number in due {
            if peer.usable().is_err() || !peer.may_rebuild(number) {
                continue;
            }
            match self.successor(engine, &peer, number) {
                Ok(offer) => steps.push(Step::Send(offer.into())),
                Err(error) => {
                    debug!(peer = %peer.name.engine, number, %error, "no other queue pair");
                    self.rebuild_later(number, now);
                }
            }
        }
        steps
    }

    fn successor(
        &mut self,
        engine: &Arc<Inner>,
        peer: &PeerSession,
        number: u16,
    ) -> Result<QpOffer, Error> {
        let (pair, made) = self.make_successor(engine, peer, number)?;
        let endpoints = pairing::pack(&pair, std::slice::from_ref(&made))?;
        // The first offer of a session is number 1.
        self.rebuilding.offers += 1;
        let offer = self.rebuilding.offers + 1;
        self.rebuilding.offered.insert(offer, (number, made));
        Ok(QpOffer {
            offer,
            replaces: Some(number),
            path: peer.path.beneath(),
            candidates: Vec::new(),
            endpoints,
        })
    }

    fn make_successor(
        &self,
        engine: &Arc<Inner>,
        peer: &PeerSession,
        number: u16,
    ) -> Result<(Pair, Made), Error> {
        let place = peer.lanes.get(usize::from(number));
        let rail = place.and_then(|place| self.rebuilding.rails.get(place.pair));
        let (Some(place), Some((pair, _))) = (place, rail) else {
            return Err(Error::DeviceFailed);
        };
        engine.runtime.health.check()?;
        let rail = (pair.rail, pair.gid.as_ref());
        let notices = self.rebuilding.notices;
        let made = (engine.runtime).queue_pair(engine, rail, place.worker, notices)?;
        Ok((pair.clone(), made))
    }

    /// The other side has answered the offer of a successor.
    pub(super) fn rebuilt(
        &mut self,
        engine: &Arc<Inner>,
        (number, made): (u16, Made),
        answer: &QpAnswer,
    ) -> Result<Vec<Step>, Error> {
        let Some(peer) = self.peer.clone() else {
            return Ok(Vec::new());
        };
        if answer.path.is_none() {
            debug!(peer = %peer.name.engine, number, "the peer has no other queue pair");
            self.rebuild_later(number, engine.clock().now());
            return Ok(Vec::new());
        }
        let place = peer.lanes.get(usize::from(number));
        let rail = place.and_then(|place| self.rebuilding.rails.get(place.pair));
        let Some((pair, device)) = rail else {
            return Ok(Vec::new());
        };
        let joined = pairing::unpack(&answer.endpoints).and_then(|ends| only(ends, pair));
        let remote = match joined {
            Ok(remote) => remote,
            Err(lie) => {
                peer.link.cut_off(lie);
                return Ok(Vec::new());
            }
        };
        let link = match soft_path(peer.path.beneath()) {
            Some(path) => QpLink::SoftDial {
                peer: device.clone(),
                path,
                deadline: Instant::now() + DIAL,
            },
            None => QpLink::Rdma,
        };
        match self.join_successor(engine, &peer, (number, made), (remote, link))? {
            None => Ok(Vec::new()),
            Some(error) => {
                // The other side counts on it.
                peer.lane_lost_again(number);
                Ok(vec![Step::Send(gone(vec![number], &error).into())])
            }
        }
    }

    /// Joins a successor and gives it to its worker; the error says why it cannot be joined.
    fn join_successor(
        &self,
        engine: &Arc<Inner>,
        peer: &Arc<PeerSession>,
        (number, made): (u16, Made),
        (remote, link): (kvxfer_verbs::QpEndpoint, QpLink),
    ) -> Result<Option<Error>, Error> {
        let place = peer.lanes.get(usize::from(number));
        let Some(place) = place.filter(|_| peer.begin_lane()) else {
            // The session ends, and all goes with it.
            return Ok(Some(Error::ShuttingDown));
        };
        let mut lanes = Lanes::from_number(number);
        let retries = engine.runtime.retries();
        let joining = vec![(made, remote, link)];
        if let Some(error) = lanes.join(place.pair, joining, retries)? {
            peer.part_drained();
            warn!(peer = %peer.name.engine, number, %error, "queue pair not rebuilt");
            return Ok(Some(error));
        }
        info!(peer = %peer.name.engine, number, "queue pair rebuilt");
        peer.lane_is_back(number);
        let (up, ..) = lanes.into_parts();
        engine.runtime.add_lanes(peer, up);
        Ok(None)
    }

    /// A client offers a successor of a lane that is down on both sides. Answered without one where there is
    /// none to be had.
    pub(super) fn answer_successor(
        &mut self,
        engine: &Arc<Inner>,
        peer: &Arc<PeerSession>,
        number: u16,
        offer: QpOffer,
    ) -> Result<Vec<Step>, Error> {
        let answer = |path, endpoints| {
            let answer = QpAnswer {
                offer: offer.offer,
                path,
                candidates: Vec::new(),
                endpoints,
            };
            Ok(vec![Step::Send(answer.into())])
        };
        let now = engine.clock().now();
        let wanted = offer.path == peer.path.beneath() && peer.usable().is_ok();
        if !wanted || !peer.may_rebuild(number) || !self.rebuilding.pace.allows(number, now) {
            return answer(None, Vec::new());
        }
        let place = peer.lanes.get(usize::from(number));
        let rail = place.and_then(|place| self.rebuilding.rails.get(place.pair));
        let Some((pair, _)) = rail else {
            return answer(None, Vec::new());
        };
        let remote = match pairing::unpack(&offer.endpoints).and_then(|ends| only(ends, pair)) {
            Ok(remote) => remote,
            Err(lie) => {
                peer.link.cut_off(lie);
                return Ok(Vec::new());
            }
        };
        let (pair, made) = match self.make_successor(engine, peer, number) {
            Ok(made) => made,
            Err(error) => {
                debug!(peer = %peer.name.engine, number, %error, "no other queue pair");
                return answer(None, Vec::new());
            }
        };
        let endpoints = pairing::pack(&pair, std::slice::from_ref(&made))?;
        let link = soft_path(offer.path).map_or(QpLink::Rdma, |path| QpLink::SoftAwait { path });
        match self.join_successor(engine, peer, (number, made), (remote, link))? {
            None => answer(Some(offer.path), endpoints),
            Some(_) => answer(None, Vec::new()),
        }
    }
}

/// The one queue pair that is told of, which is to join this pair of rails; or what is wrong with it.
fn only(ends: Vec<pairing::Ends>, pair: &Pair) -> Result<kvxfer_verbs::QpEndpoint, String> {
    let mut ends = ends.into_iter();
    match (ends.next(), ends.next()) {
        (Some(of_pair), None) if (of_pair.own, of_pair.theirs) == (pair.own, pair.theirs) => {
            match of_pair.ends[..] {
                [end] => Ok(end),
                _ => Err(format!("{} queue pairs for one", of_pair.ends.len())),
            }
        }
        _ => Err("a queue pair of another rail in place of one".to_owned()),
    }
}

/// Whether the queue pairs of a way can be rebuilt.
pub(crate) fn is_rebuilt(way: &PathInfo) -> bool {
    let path = way.beneath();
    path == PathKind::Rdma || soft_path(path).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_that_fails_again_and_again_is_rebuilt_ever_later() {
        let mut pace = Pace::default();
        let mut now = Time::from_millis(1000);
        let mut pauses = Vec::new();
        for _ in 0..6 {
            let due = pace.next(7, now);
            pauses.push(due.since(now).as_millis());
            now = due;
        }
        assert_eq!(pauses[..4], [50, 100, 200, 400]);
        // The fifth waits until a minute has passed since the first.
        assert_eq!(pauses[4], 60_000 - 100 - 200 - 400);
        assert!(pauses[5] <= 400, "{pauses:?}");
        // Another lane has its own.
        assert_eq!(pace.next(8, now).since(now), PAUSE);
        // After a while all is forgotten.
        now = now + WITHIN + WITHIN;
        assert_eq!(pace.next(7, now).since(now), PAUSE);
    }

    #[test]
    fn the_other_side_is_bounded_too() {
        let mut pace = Pace::default();
        let now = Time::from_millis(1000);
        let allowed = (0..100).filter(|_| pace.allows(3, now)).count();
        assert_eq!(allowed, 2 * MOST);
        assert!(pace.allows(4, now));
        assert!(pace.allows(3, now + WITHIN));
    }
}
