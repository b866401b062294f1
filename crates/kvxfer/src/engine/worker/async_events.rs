//! What asynchronous events of the device mean for a worker's lanes and transfers.

use std::time::Duration;

use tracing::error;

use kvxfer_verbs::{Completion, WcStatus};

use super::Worker;
use crate::error::chain;
use crate::time::Time;
use crate::transfer::{Cause, CompletionStatus, LaneId};

/// How often a worker that does not sleep looks for events.
const EVERY: Duration = Duration::from_millis(1);
/// How long failed work of a lane waits for the event that says why. A device that tells is
/// quicker; one that does not tell costs this much once a lane.
const PATIENCE: Duration = Duration::from_millis(50);

/// What has failed on a lane of which nobody has said why.
#[derive(Debug)]
pub(super) struct Held {
    lane: LaneId,
    until: Time,
    completions: Vec<Completion>,
}

/// What a worker keeps of the device's events.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// When it last looked, or was told that there are none; nothing if there are some.
    looked: Option<Time>,
    held: Vec<Held>,
}

impl Seen {
    /// A sleep has ended, because of events or not: if so, the worker looks at once.
    pub(super) fn slept(&mut self, now: Time, events: bool) {
        self.looked = (!events).then_some(now);
    }

    /// When flushes that wait for their event need wait no longer.
    pub(super) fn next_timeout(&self) -> Option<Time> {
        self.held.iter().map(|held| held.until).min()
    }

    /// Forgets what is held of a lane that is gone.
    pub(super) fn forget(&mut self, lane: LaneId) {
        self.held.retain(|held| held.lane != lane);
    }
}

impl Worker {
    pub(super) fn look_for_events(&mut self) {
        let now = self.clock.now();
        if self.seen.looked.is_some_and(|at| now.since(at) < EVERY) {
            return;
        }
        self.seen.looked = Some(now);
        self.read_events();
    }

    /// Takes what the devices have to tell.
    fn read_events(&self) {
        for rail in &self.rails {
            rail.events.read(&self.others);
        }
    }

    /// Somebody has read events that matter.
    pub(super) fn events_read(&mut self) {
        for at in 0..self.rails.len() {
            if self.look_at_rail(at) {
                self.replace_cq(at);
            }
        }
        let mut told: Vec<LaneId> = self
            .lanes
            .iter()
            .filter(|(_, at)| at.watched.fate().is_some())
            .map(|(lane, _)| *lane)
            .collect();
        told.sort_unstable();
        for lane in told {
            self.heed(lane);
        }
    }

    /// How a rail stands. Returns whether its completion queue has failed and the device has not.
    fn look_at_rail(&mut self, at: usize) -> bool {
        let Some(rail) = self.rails.get_mut(at) else {
            return false;
        };
        let standing = rail.events.standing(self.index);
        rail.port = standing.port;
        self.tell_held_up();
        standing.needs_cq
    }

    /// Takes a lane for failed if an event has said so. Its work is flushed, and moves or fails as
    /// with any lane that fails; where the device flushes nothing any more, the session ends.
    pub(super) fn heed(&mut self, lane: LaneId) {
        let Some(at) = self.lanes.get(&lane) else {
            return;
        };
        let Some(cause) = at.watched.fate() else {
            return;
        };
        if at.watched.is_mute() && !self.scheduler.lives_elsewhere(lane) {
            at.peer.fail(cause.clone());
        }
        if self.scheduler.lane_failure(lane).is_none() {
            at.qp.to_error();
            self.scheduler.lane_failed(lane, cause.clone());
        }
        self.look_at_peer_of(lane);
    }

    /// The completion queue has failed: what comes after those queue pairs completes on another.
    fn replace_cq(&mut self, at: usize) {
        let Some(rail) = self.rails.get_mut(at) else {
            return;
        };
        match rail.events.replace_cq(self.index, rail.cq.depth()) {
            Ok(cq) => rail.cq = cq,
            Err(error) => {
                error!(error = %chain(&error), "no other completion queue");
                rail.events.give_up(&self.others);
            }
        }
    }

    /// Whether a completion waits: it is flushed, or refused by this side's device, nobody has said why,
    /// and an event may yet: of a port that goes down some devices tell after what fails for it.
    pub(super) fn holds(&mut self, lane: LaneId, completion: &Completion) -> bool {
        let explained = |worker: &Self| worker.scheduler.lane_failure(lane).is_some();
        let unexplained = matches!(completion.status, WcStatus::WrFlush | WcStatus::LocQpOp);
        if !unexplained || explained(self) {
            return false;
        }
        if let Some(held) = self.seen.held.iter_mut().find(|held| held.lane == lane) {
            held.completions.push(*completion);
            return true;
        }
        // Another worker may have read the event that this one has not been told of yet.
        self.read_events();
        self.heed(lane);
        let rail = self.lanes.get(&lane).and_then(|at| self.rails.get(at.rail));
        if explained(self) || rail.is_none_or(|rail| rail.events.fd().is_none()) {
            return false;
        }
        self.seen.held.push(Held {
            lane,
            until: self.clock.now() + PATIENCE,
            completions: vec![*completion],
        });
        true
    }

    /// Lets completions go that have their event, or have waited for long enough.
    /// Whether there was any: what it moves to other lanes is to be posted there.
    pub(super) fn let_go(&mut self) -> bool {
        if self.seen.held.is_empty() {
            return false;
        }
        let now = self.clock.now();
        let scheduler = &self.scheduler;
        let due: Vec<Held> = self
            .seen
            .held
            .extract_if(.., |held| {
                held.until <= now || scheduler.lane_failure(held.lane).is_some()
            })
            .collect();
        let any = !due.is_empty();
        for held in due {
            for completion in held.completions {
                let (status, vendor) = (completion.status, completion.vendor_err);
                let cause = match status {
                    WcStatus::WrFlush => Cause::Completion {
                        status: CompletionStatus::Flush,
                        vendor: 0,
                    },
                    status => self.cause_of(held.lane, status, vendor),
                };
                let wr_id = completion.wr_id;
                self.scheduler.complete(held.lane, wr_id, Err(cause));
            }
            self.look_at_peer_of(held.lane);
        }
        self.singles_done();
        any
    }

    /// The port, if it was down while a request was tried that has failed so. If all of the peer's queue
    /// pairs go the same way, its session ends, with this cause.
    pub(super) fn blame_port(&mut self, lane: LaneId, status: WcStatus) -> Option<Cause> {
        // A port that is down here makes some devices refuse the request themselves.
        if !matches!(status, WcStatus::RetryExc | WcStatus::LocQpOp) {
            return None;
        }
        self.read_events();
        let rail = self.lanes.get(&lane)?.rail;
        self.look_at_rail(rail);
        let (at, rail) = (self.lanes.get(&lane)?, self.rails.get(rail)?);
        let cause = rail.port.blame(self.clock.now(), at.tried)?;
        if !self.scheduler.lives_elsewhere(lane) {
            at.peer.fail(cause.clone());
        }
        self.scheduler.lane_failed(lane, cause.clone());
        Some(cause)
    }
}
