//! Rails that fail under a session that has others: their lanes are taken down, both sides tell each
//! other so, and the work goes on over the rest.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tracing::{debug, warn};

use super::{LaneQp, Worker};
use crate::engine::books::pack_cause;
use crate::engine::notices::RECEIVES;
use crate::engine::peer_session::PeerSession;
use crate::time::Time;
use crate::transfer::{Cause, JobId, LaneId, PeerKey};
use crate::wire::{PushDone, QpReset};

/// How long a port may be down before its work goes on over other rails: its device tries again for longer,
/// and one that gets nothing out may never say that it has given up.
const PORT_GRACE: Duration = Duration::from_secs(1);

/// How long a peer's work may wait here for a lane that is rebuilt, when all have failed: the first three pauses
/// of `bringup::rebuild` and what the two sides need for it. Then the session is set up anew.
const LANELESS: Duration = Duration::from_secs(2);

/// A peer all of whose lanes here have failed, and one is rebuilt.
#[derive(Debug)]
pub(super) struct Laneless {
    pub(super) peer: Arc<PeerSession>,
    until: Time,
}

/// A lane whose queue pair is destroyed while its session stands.
#[derive(Debug)]
pub(super) struct Retired {
    pub(super) peer: PeerKey,
    number: u16,
    lane: LaneId,
    told: Vec<PushDone>,
}

impl Worker {
    /// Looks at a lane that has failed. A rail that does not lead to the peer any more is set aside. When the
    /// last lane here has failed, what is left to do waits for one that is rebuilt; the session is set up anew
    /// if none is.
    pub(super) fn look_at_peer_of(&mut self, lane: LaneId) {
        let Some(at) = self.lanes.get(&lane) else {
            return;
        };
        let (peer, pair, number) = (Arc::clone(&at.peer), at.pair, at.number);
        let Some(cause) = self.scheduler.lane_failure(lane).cloned() else {
            return;
        };
        peer.lane_failed(number);
        // Of what it takes down the peer says itself why.
        if cause.is_of_path()
            && cause != Cause::PeerReset
            && self.scheduler.lives_elsewhere(lane)
            && peer.set_aside(pair, &cause)
        {
            peer.on_other_workers(self.index, |peer| super::Command::SetAside {
                peer,
                pair,
                cause: cause.clone(),
            });
            self.set_aside(&peer, pair, &cause);
        }
        let last = self.working_lanes(peer.key).next().is_none();
        let rebuilt = cause.is_of_one_lane() && peer.has_successor(number);
        // With the session's end all go together.
        if (peer.rails.len() > 1 || !last || rebuilt) && !self.failing.contains(&lane) {
            self.failing.push(lane);
        }
        // With the last of them: what has befallen the others was no reason to end.
        match last {
            true if rebuilt => self.wait_for_lane(peer, cause),
            true => peer.fail(cause),
            false => {}
        }
    }

    fn wait_for_lane(&mut self, peer: Arc<PeerSession>, cause: Cause) {
        if self.laneless.iter().all(|of| of.peer.key != peer.key) {
            peer.waits_for_lane(self.index, Some(cause));
            let until = self.clock.now() + LANELESS;
            self.laneless.push(Laneless { peer, until });
        }
    }

    /// A peer has a lane here again.
    pub(super) fn has_lane(&mut self, peer: PeerKey) {
        for of in self.laneless.extract_if(.., |of| of.peer.key == peer) {
            of.peer.waits_for_lane(self.index, None);
        }
    }

    /// Ends the sessions that have waited for a lane for too long.
    pub(super) fn give_up_waiting(&mut self) {
        if self.laneless.is_empty() {
            return;
        }
        let now = self.clock.now();
        for late in self.laneless.extract_if(.., |of| of.until <= now) {
            warn!(peer = %late.peer.name.engine, "no queue pair was rebuilt in time");
            // Its workers' causes are known there.
            late.peer.fail(Cause::LaneFailed);
        }
    }

    /// When it has been too long.
    pub(super) fn next_give_up(&self) -> Option<Time> {
        self.laneless.iter().map(|of| of.until).min()
    }

    /// Since when the peer of a lane has had another that works on a rail whose port is up, if it has. Nothing is
    /// gained by moving to one that is down as well, and each side would choose another to keep.
    fn up_elsewhere(&self, lane: LaneId) -> Option<Time> {
        let at = self.lanes.get(&lane)?;
        let others = self.working_lanes(at.peer.key);
        let others = others.filter_map(|other| self.lanes.get(&other));
        let others = others.filter(|other| other.pair != at.pair);
        let since = others.filter_map(|other| self.rails.get(other.rail)?.port.up_since());
        since.min()
    }

    /// The port, if one is down, that keeps all work with a peer from moving: all its lanes that have not failed
    /// go by ports that are down.
    pub(super) fn port_that_holds_up(&self, peer: PeerKey) -> Option<Cause> {
        let works = |lane: &LaneId| self.scheduler.lane_failure(*lane).is_none();
        let any = self.scheduler.peer_lanes(peer).any(|lane| works(&lane));
        let lanes = self.scheduler.peer_lanes(peer);
        let mut ports = lanes.filter(|lane| !any || works(lane)).map(|lane| {
            let at = self.lanes.get(&lane)?;
            self.rails.get(at.rail)?.port.cause()
        });
        let first = ports.next()??;
        ports.all(|port| port.is_some()).then_some(first)
    }

    /// Tells the ledger which peers' work no port lets move.
    pub(super) fn tell_held_up(&mut self) {
        let peers: Vec<PeerKey> = self.peers.keys().copied().collect();
        for peer in peers {
            let by = self.port_that_holds_up(peer);
            self.transfers.held_up(peer, by);
        }
    }

    /// Lanes that wait for a port that is down, and that could go by another rail; with the time when they
    /// are not to wait any longer.
    fn waiting_for_ports(&self) -> impl Iterator<Item = (LaneId, Time)> + '_ {
        let works = |lane: LaneId| self.scheduler.lane_failure(lane).is_none();
        (self.lanes.iter()).filter_map(move |(lane, at)| {
            let down = self.rails.get(at.rail)?.port.down_since()?;
            // Ports that come back after the same outage do so one by one.
            let since = self.up_elsewhere(*lane).filter(|_| works(*lane))?.max(down);
            Some((*lane, since.saturating_add(PORT_GRACE)))
        })
    }

    fn a_port_is_down(&self) -> bool {
        // One rail alone has nowhere to go.
        self.rails.len() > 1 && (self.rails.iter()).any(|rail| rail.port.down_since().is_some())
    }

    /// When lanes are to be taken from a port that is down.
    pub(super) fn next_leaving(&self) -> Option<Time> {
        if !self.a_port_is_down() {
            return None;
        }
        self.waiting_for_ports().map(|(_, due)| due).min()
    }

    /// Takes lanes down whose port has been down for too long.
    pub(super) fn leave_ports(&mut self) {
        if !self.a_port_is_down() {
            return;
        }
        let now = self.clock.now();
        let due = |(lane, due): (LaneId, Time)| (due <= now).then_some(lane);
        let mut lanes: Vec<LaneId> = self.waiting_for_ports().filter_map(due).collect();
        lanes.sort_unstable();
        for lane in lanes {
            let rail = self.lanes.get(&lane).and_then(|at| self.rails.get(at.rail));
            if let Some(cause) = rail.and_then(|rail| rail.port.cause())
                && self.up_elsewhere(lane).is_some()
            {
                self.take_down(lane, &cause);
            }
        }
    }

    /// Lets all lanes of a pair of rails fail.
    pub(super) fn set_aside(&mut self, peer: &Arc<PeerSession>, pair: usize, cause: &Cause) {
        let of_pair = |at: &LaneQp| at.peer.key == peer.key && at.pair == pair;
        let mut lanes: Vec<LaneId> = (self.lanes.iter())
            .filter(|(_, at)| of_pair(at))
            .map(|(lane, _)| *lane)
            .collect();
        lanes.sort_unstable();
        for lane in lanes {
            self.take_down(lane, cause);
        }
    }

    /// Takes the lanes of a peer down that jobs are posted on which do not drain.
    pub(super) fn reset_lanes(&mut self, peer: PeerKey, jobs: &[JobId]) {
        for lane in self.scheduler.lanes_of(jobs) {
            let of_peer = |at: &&LaneQp| at.peer.key == peer;
            if let Some(at) = self.lanes.get(&lane).filter(of_peer) {
                warn!(peer = %at.peer.name.engine, number = at.number, "work does not drain: its queue pair is rebuilt");
                self.take_down(lane, &Cause::LaneReset);
            }
        }
    }

    /// Lets a lane fail, unless it has.
    fn take_down(&mut self, lane: LaneId, cause: &Cause) {
        if self.scheduler.lane_failure(lane).is_some() {
            return;
        }
        if let Some(at) = self.lanes.get(&lane) {
            at.qp.to_error();
        }
        self.scheduler.lane_failed(lane, cause.clone());
        self.look_at_peer_of(lane);
    }

    /// Destroys the queue pairs of failed lanes of which nothing is posted any more, and tells the peer:
    /// what it has sent on them lands here no more.
    pub(super) fn retire_lanes(&mut self) {
        if self.failing.is_empty() {
            return;
        }
        for lane in std::mem::take(&mut self.failing) {
            if !self.is_over(lane) {
                self.failing.push(lane);
                continue;
            }
            // Its session may have ended meanwhile.
            let Some(at) = self.lanes.get_mut(&lane) else {
                continue;
            };
            let (number, peer) = (at.number, Arc::clone(&at.peer));
            let told = std::mem::take(&mut at.told);
            if self.destroy(lane).is_err() {
                // The peer counts on what it is told, and so does whoever has the work next.
                continue;
            }
            self.seen.forget(lane);
            // What a device that is mute has never completed.
            self.scheduler.lane_flushed(lane);
            self.singles_done();
            let cause = self.scheduler.lane_failure(lane).cloned();
            let cause = cause.unwrap_or(Cause::LaneReset);
            debug!(peer = %peer.name.engine, number, %cause, "queue pair taken down");
            self.retired.push(Retired {
                peer: peer.key,
                number,
                lane,
                told: told.into(),
            });
            let is_last_word = peer.lane_down(number);
            let reset = QpReset {
                lanes: vec![number],
                cause: pack_cause(&cause),
            };
            peer.link.send(reset.into());
            if is_last_word {
                peer.link.rebuild(number);
            }
        }
        // A port that nothing waits for holds nothing up.
        self.tell_held_up();
    }

    /// The peer has taken its half of a lane down: nothing that was sent on it lands there any more. What
    /// it had been told on it, it may never have seen.
    pub(super) fn lane_reset(&mut self, peer: &Arc<PeerSession>, number: u16) {
        let of_peer = |at: &LaneQp| at.peer.key == peer.key && at.number == number;
        let standing = (self.lanes.iter())
            .find(|(_, at)| of_peer(at))
            .map(|(lane, _)| *lane);
        let retired = |r: &Retired| r.peer == peer.key && r.number == number;
        let lane = match standing {
            Some(lane) => {
                self.take_down(lane, &Cause::PeerReset);
                let mut told = VecDeque::new();
                if let Some(at) = self.lanes.get_mut(&lane) {
                    at.reset = true;
                    told = std::mem::take(&mut at.told);
                }
                self.tell_again(peer, told.into());
                lane
            }
            None => {
                let Some(retired) = self.retired.iter_mut().find(|r| retired(r)) else {
                    return;
                };
                let (lane, told) = (retired.lane, std::mem::take(&mut retired.told));
                self.tell_again(peer, told);
                lane
            }
        };
        self.scheduler.lane_settled(lane);
    }

    /// A lane's number goes to a successor: both sides are done with the queue pair that had it.
    pub(super) fn make_room(&mut self, peer: PeerKey, number: u16) {
        let of = |retired: &Retired| retired.peer == peer && retired.number == number;
        while let Some(at) = self.retired.iter().position(of) {
            let gone = self.retired.swap_remove(at);
            self.scheduler.remove_lane(gone.lane);
        }
    }

    fn tell_again(&mut self, peer: &Arc<PeerSession>, told: Vec<PushDone>) {
        if !told.is_empty() {
            warn!(peer = %peer.name.engine, notices = told.len(), "told again on other queue pairs");
        }
        told.iter().for_each(|_| peer.untold.add());
        let again = told.into_iter().map(|done| (Arc::clone(peer), done));
        self.waiting_notices.extend(again);
    }

    /// A notice has gone on a lane. The peer posts a receive again when it has taken what was in it, so no
    /// more than it has receives can be lost.
    pub(super) fn told_on(&mut self, lane: LaneId, done: PushDone) {
        let Some(at) = self.lanes.get_mut(&lane) else {
            return;
        };
        if at.reset {
            // Its completion was on its way while the peer took its half down.
            let peer = Arc::clone(&at.peer);
            return self.tell_again(&peer, vec![done]);
        }
        if at.told.len() >= RECEIVES as usize {
            at.told.pop_front();
        }
        at.told.push_back(done);
    }
}
