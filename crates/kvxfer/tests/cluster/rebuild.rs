//! Lanes that fail under a session: they are taken down on both sides, and the side that dialled offers successors.

use kvxfer::transfer::{Cause, JobId, LaneId};
use kvxfer::wire::{Blob, PathKind, QpAnswer, QpOffer, QpReset};

use super::bug::{Bug, Step, ensure};
use super::completions::rebuilds;
use super::link::{Order, endpoint};
use super::peer::LaneM;
use super::worker::Cmd;
use super::world::World;

impl World {
    /// A lane has failed: it is taken down, unless its session ends with it.
    pub(crate) fn lane_fails(&mut self, life: usize, w: usize, lane: LaneId) {
        let Some(&q) = self.lives[life].workers[w].lanes.get(&lane) else {
            return;
        };
        let Some(peer) = self.peer_of_qp(q) else {
            return;
        };
        for lane in &mut self.peers[peer].lanes {
            lane.failed |= lane.qp == q;
        }
        let qps = &self.links[self.peers[peer].link].qps;
        let several = qps.iter().any(|o| self.qps[*o].rail != self.qps[q].rail);
        let works = {
            let scheduler = &self.lives[life].workers[w].scheduler;
            let mut lanes = scheduler.peer_lanes(self.peers[peer].key);
            lanes.any(|lane| scheduler.lane_failure(lane).is_none())
        };
        let several = several || works || self.is_rebuilt(life, w, lane);
        let worker = &mut self.lives[life].workers[w];
        if several && !worker.failing.contains(&lane) {
            worker.failing.push(lane);
        }
    }

    /// Destroys the queue pairs of failed lanes that hold nothing any more, and tells the peer.
    pub(crate) fn retire_lanes(&mut self, life: usize, w: usize) -> Step {
        for lane in std::mem::take(&mut self.lives[life].workers[w].failing) {
            let worker = &mut self.lives[life].workers[w];
            if !worker.scheduler.lane_drained(lane) {
                worker.failing.push(lane);
                continue;
            }
            let Some(q) = worker.lanes.remove(&lane) else {
                continue;
            };
            let key = self.qps[q].key;
            worker.retired.push((key, q, lane));
            if self.bug != Bug::DrainTooSoon {
                self.qp_destroys(q)?;
            }
            let worker = &mut self.lives[life].workers[w];
            worker.scheduler.lane_flushed(lane);
            if matches!(self.bug, Bug::SettledTooSoon | Bug::DoubtIgnored) {
                worker.scheduler.lane_settled(lane);
            }
            worker.busy = true;
            let Some(peer) = self.peer_of_qp(q) else {
                continue;
            };
            let qps = &self.links[self.peers[peer].link].qps;
            if let Some(number) = qps.iter().position(|other| *other == q) {
                self.sum.count("lane: taken down");
                self.peers[peer].lanes[number].down_here = true;
                let reset = QpReset {
                    lanes: vec![number as u16],
                    cause: Blob::default(),
                };
                self.send(peer, reset.into());
                self.lane_is_down(peer, number);
            }
        }
        Ok(())
    }

    /// Whether the lanes of a session get successors.
    pub(crate) fn rebuilds_lanes(&self, peer: usize) -> bool {
        let first = self.peers[peer].lanes.first();
        first.is_some_and(|lane| rebuilds(self.qps[lane.qp].path))
    }

    /// Takes the lanes down that jobs are posted on which do not drain.
    pub(crate) fn reset_lanes(&mut self, life: usize, w: usize, jobs: &[JobId]) -> Step {
        for lane in self.lives[life].workers[w].scheduler.lanes_of(jobs) {
            let worker = &self.lives[life].workers[w];
            let Some(&q) = worker.lanes.get(&lane) else {
                continue;
            };
            if worker.scheduler.lane_failure(lane).is_none() {
                self.sum.count("lane: reset for what does not drain");
                self.qp_flush(q, None)?;
                let scheduler = &mut self.lives[life].workers[w].scheduler;
                scheduler.lane_failed(lane, Cause::LaneReset);
                self.look_at_peer_of(life, w, lane);
                self.lane_fails(life, w, lane);
            }
        }
        Ok(())
    }

    /// The peer has taken its half down: nothing that was sent on it lands there any more, and what was
    /// told on it may never have been seen.
    pub(crate) fn lane_reset(&mut self, life: usize, w: usize, peer: usize, q: usize) -> Step {
        let worker = &self.lives[life].workers[w];
        let Some(lane) = self.qps[q].lane else {
            return Ok(());
        };
        let stands = worker.lanes.get(&lane) == Some(&q);
        let retired = worker.retired.iter().any(|(_, other, _)| *other == q);
        if !stands && !retired {
            return Ok(());
        }
        if stands && worker.scheduler.lane_failure(lane).is_none() {
            self.qp_flush(q, None)?;
            self.lives[life].workers[w]
                .scheduler
                .lane_failed(lane, Cause::PeerReset);
            self.look_at_peer_of(life, w, lane);
        }
        self.lane_fails(life, w, lane);
        let worker = &mut self.lives[life].workers[w];
        for done in worker.told.remove(&q).unwrap_or_default() {
            self.sum.count("notice: told again");
            worker.waiting_notices.push_back((peer, done));
        }
        self.sum.count("lane: settled");
        self.lives[life].workers[w].scheduler.lane_settled(lane);
        Ok(())
    }

    /// A lane is down on both sides: the one that dialled offers a successor, a few times.
    pub(crate) fn lane_is_down(&mut self, peer: usize, number: usize) {
        let lane = &mut self.peers[peer].lanes[number];
        if lane.down_here && lane.down_there && lane.rebuilt < 3 {
            lane.rebuilt += 1;
            let link = self.peers[peer].link;
            self.order(link, Order::Rebuild(number));
        }
    }

    /// A successor of a lane is joined with the other side's: its worker takes it.
    pub(crate) fn lane_is_back(&mut self, peer: usize, number: usize, qp: usize) {
        let life = self.peers[peer].life;
        // It is drained when this one is, too.
        self.peers[peer].workers_left += 1;
        self.qps[qp].waits = false;
        let lane = &mut self.peers[peer].lanes[number];
        let replaces = Some(lane.qp);
        *lane = LaneM {
            rebuilt: lane.rebuilt,
            ..LaneM::new(qp)
        };
        let link = self.peers[peer].link;
        self.links[link].qps[number] = qp;
        self.sum.count("lane: rebuilt");
        let w = self.qps[qp].worker;
        self.command(life, w, Cmd::AddLane { peer, qp, replaces });
    }

    /// Offers a successor of a lane, on the side that dialled.
    pub(crate) fn link_rebuilds(&mut self, link: usize, number: usize) {
        let end = &self.links[link];
        let Some(peer) = end.peer else { return };
        if end.side != 0 || end.session.is_closed() || self.peers[peer].dropping {
            return;
        }
        let q = self.successor(self.peers[peer].lanes[number].qp);
        let offer = 2 + self.offers;
        self.offers += 1;
        self.links[link].made.push((offer, number, q));
        let offer = QpOffer {
            offer,
            replaces: Some(number as u16),
            path: self.qps[q].path,
            candidates: Vec::new(),
            endpoints: vec![endpoint(q)],
        };
        self.link_sends(link, &offer.into());
    }

    /// Another queue pair of the same worker, path and rail.
    fn successor(&mut self, q: usize) -> usize {
        let old = &self.qps[q];
        let (life, worker, key) = (old.life, old.worker, old.key);
        let (path, rail) = (old.path, old.rail);
        let successor = self.new_qp(life, worker, key, path, rail);
        self.qps[successor].waits = true;
        successor
    }

    /// The other side offers a successor.
    pub(crate) fn answers_successor(&mut self, link: usize, offer: QpOffer) -> Step {
        let QpOffer {
            offer,
            replaces: Some(number),
            endpoints,
            ..
        } = offer
        else {
            return Ok(());
        };
        let number = usize::from(number);
        let (Some(peer), Some(end)) = (self.links[link].peer, endpoints.first()) else {
            ensure!(
                false,
                Session,
                "a successor in a session that does not stand"
            );
            return Ok(());
        };
        let lane = &self.peers[peer].lanes[number];
        ensure!(
            lane.down_here && lane.down_there,
            Session,
            "a successor of a lane that stands"
        );
        let remote: u64 = end.endpoint.unpack("endpoint").unwrap_or(u64::MAX);
        let none = self.peers[peer].dropping || self.rng.permille(100);
        let mut endpoints = Vec::new();
        if !none {
            let q = self.successor(lane.qp);
            self.qps[q].remote = Some(remote as usize);
            endpoints.push(endpoint(q));
            self.lane_is_back(peer, number, q);
        }
        let answer = QpAnswer {
            offer,
            path: (!none).then_some(PathKind::Rdma),
            candidates: Vec::new(),
            endpoints,
        };
        self.link_sends(link, &answer.into());
        Ok(())
    }

    /// The other side has answered the offer of a successor.
    pub(crate) fn successor_answered(&mut self, link: usize, answer: &QpAnswer) -> Step {
        let of = |(offer, ..): &(u32, usize, usize)| *offer == answer.offer;
        let at = self.links[link].made.iter().position(of);
        let (Some(at), Some(peer)) = (at, self.links[link].peer) else {
            ensure!(false, Session, "an answer to no offer");
            return Ok(());
        };
        let (_, number, q) = self.links[link].made.swap_remove(at);
        let dropping = self.peers[peer].dropping;
        match answer.endpoints.first().filter(|_| !dropping) {
            Some(end) => {
                let remote: u64 = end.endpoint.unpack("endpoint").unwrap_or(u64::MAX);
                self.qps[q].remote = Some(remote as usize);
                self.lane_is_back(peer, number, q);
            }
            None => {
                self.sum.count("lane: not rebuilt");
                self.qp_destroys(q)?;
            }
        }
        Ok(())
    }
}
