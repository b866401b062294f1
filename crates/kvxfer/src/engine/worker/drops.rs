//! How queue pairs go: those of a session that is over, one after the other as they hold nothing any more, and those
//! that the device does not destroy.

use std::sync::Arc;

use tracing::error;

use super::completions::errno_of;
use super::{LaneQp, Worker};
use crate::engine::notices::Inbox;
use crate::engine::peer_session::PeerSession;
use crate::transfer::{Cause, LaneId, LocalOperation, PeerKey};

/// What is left of a lane whose queue pair was not destroyed.
#[derive(Debug)]
pub(super) struct Undead {
    pub(super) peer: PeerKey,
    /// Where the peer's notices may land yet.
    _inbox: Option<Inbox>,
}

impl Worker {
    pub(super) fn drop_lanes(&mut self, peer: Arc<PeerSession>) {
        let lanes: Vec<LaneId> = self.scheduler.peer_lanes(peer.key).collect();
        let of_port = self.port_that_holds_up(peer.key);
        let cause = peer.ends_for().or(of_port).unwrap_or(Cause::LaneReset);
        for lane in &lanes {
            if let Some(at) = self.lanes.get(lane) {
                at.qp.to_error();
            }
            self.scheduler.lane_failed(*lane, cause.clone());
        }
        self.gathers.stop_peer(peer.key);
        self.stop_fetches(peer.key);
        // Their numbers may be those of others next.
        self.failing.retain(|lane| !lanes.contains(lane));
        self.laneless.retain(|of| of.peer.key != peer.key);
        self.dropping.push((peer, lanes));
    }

    pub(super) fn finish_drops(&mut self) {
        let mut at = 0;
        while let Some((peer, lanes)) = self.dropping.get(at) {
            let ready = |lane: &LaneId| self.is_over(*lane) || self.undead.contains_key(lane);
            if self.gathers.touch(peer.key) || !lanes.iter().all(ready) {
                at += 1;
                continue;
            }
            // It stays in the list until all is done: after a panic, what is left of it is found there.
            let lanes = lanes.clone();
            for lane in lanes {
                // Destroyed before the lane's work is reported as drained.
                if !self.undead.contains_key(&lane) && self.destroy(lane).is_ok() {
                    self.seen.forget(lane);
                    self.scheduler.remove_lane(lane);
                }
            }
            let (peer, _) = self.dropping.swap_remove(at);
            self.retired.retain(|retired| retired.peer != peer.key);
            self.peers.remove(&peer.key);
            self.gathers.forget_peer(peer.key);
            self.transfers.held_up(peer.key, None);
            if self.undead.values().all(|undead| undead.peer != peer.key) {
                peer.part_drained();
            }
        }
    }

    /// Destroys the queue pair of a lane, if it has one. The session of one that stays ends, and what it
    /// may touch is never released: who moves there is for the device alone to say.
    pub(super) fn destroy(&mut self, lane: LaneId) -> Result<(), ()> {
        let Some(gone) = self.lanes.remove(&lane) else {
            return Ok(());
        };
        let LaneQp {
            rail,
            qp,
            inbox,
            peer,
            ..
        } = gone;
        self.lane_of.remove(&(rail, qp.qp_num()));
        let Err(error) = qp.destroy() else {
            return Ok(());
        };
        error!(%error, peer = %peer.name.engine, "queue pair not destroyed: its memory stays quarantined");
        let undead = Undead {
            peer: peer.key,
            _inbox: inbox,
        };
        self.undead.insert(lane, undead);
        peer.fail(Cause::LocalDevice {
            operation: LocalOperation::QueuePair,
            errno: errno_of(&error),
        });
        Err(())
    }

    /// Whether a failed lane has nothing posted any more, or will never say so.
    pub(super) fn is_over(&self, lane: LaneId) -> bool {
        if self.undead.contains_key(&lane) {
            return false;
        }
        let mute = |at: &LaneQp| at.watched.is_mute();
        self.scheduler.lane_drained(lane) || self.lanes.get(&lane).is_some_and(mute)
    }
}
