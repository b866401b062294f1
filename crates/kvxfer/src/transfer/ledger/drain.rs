//! How transfers stop: their posted work drains by itself, or with the queue pairs that it is on, or with all of its
//! peer's.

use std::sync::Arc;

use super::Transfers;
use crate::time::Time;
use crate::transfer::record::{
    DrainToken, End, JobRecord, Kind, MemoryState, Notice, Outcome, Output, Progress, Record, State,
};
use crate::transfer::{Cause, JobId, PeerKey, TransferId};

impl Transfers {
    /// Says that a peer is lost: its transfers fail with `cause`, and what is posted to it is
    /// drained by force at once.
    pub fn peer_lost(&mut self, now: Time, peer: PeerKey, cause: &Cause) {
        for id in self.transfers_of(peer) {
            if let Some(record) = self.records.get_mut(&id) {
                record.peer_lost = true;
            }
            self.stop(now, id, cause.clone(), None, false);
        }
        for id in self.transfers_of(peer) {
            self.force_drain(id);
        }
    }

    /// Answers [`Output::ForceDrain`]: nothing posted to the peer before it can touch memory any
    /// more.
    pub fn peer_drained(&mut self, peer: PeerKey, token: DrainToken) {
        if let Some(p) = self.peers.get_mut(&peer) {
            p.draining = p.draining.filter(|d| *d > token.0);
        }
        for id in self.transfers_of(peer) {
            let Some(record) = self.records.get_mut(&id) else {
                continue;
            };
            let (State::Stopping(end) | State::Quarantined(end)) = &record.state else {
                continue;
            };
            // A transfer that was stopped after the drain was asked for may have posted on the
            // queue pairs that came after it.
            if end.before >= token.0 {
                continue;
            }
            let mut left = 0;
            for job in record.jobs.iter_mut().filter(|job| !job.kernels) {
                left += u32::from(job.progress == Progress::Started && !job.held);
                if matches!(job.progress, Progress::Started | Progress::InDoubt) {
                    job.progress = Progress::Drained;
                    job.doubts = 0;
                }
            }
            for _ in 0..left {
                self.job_left(peer);
            }
            self.advance(id);
        }
        self.drop_peer_if_unused(peer);
    }

    /// Stops a running transfer; the first reason stands, later ones change nothing.
    pub(super) fn stop(
        &mut self,
        now: Time,
        id: TransferId,
        cause: Cause,
        at: Option<(JobId, u64)>,
        asked: bool,
    ) {
        let Some(record) = self.records.get_mut(&id) else {
            return;
        };
        if record.has_ended() {
            return;
        }
        for job in &mut record.jobs {
            match job.progress {
                Progress::Queued => job.progress = Progress::Drained,
                Progress::Started => {
                    // The flag reaches workers that are just about to claim before the message does.
                    job.job.stop();
                    let peer = record.peer;
                    self.out.push_back(Output::StopJob {
                        job: job.job.id,
                        peer,
                    });
                }
                Progress::InDoubt | Progress::Drained => {}
            }
        }
        record.state = State::Stopping(End {
            cause,
            at,
            asked,
            before: self.last_token,
            reset: false,
        });
        if record.drained() {
            self.stopped(id);
        } else {
            // Due at once when the deadline has passed: `on_time` looks again.
            let due = record.deadline.min(now + self.cfg.settle);
            self.set_timer(id, Some(due));
        }
    }

    /// Ends a stopped transfer of which nothing is posted any more.
    pub(super) fn stopped(&mut self, id: TransferId) {
        self.set_timer(id, None);
        let Some(record) = self.records.remove(&id) else {
            return;
        };
        self.tell_aborted(id, &record);
        if let Some(outcome) = outcome(&record, MemoryState::Released) {
            self.out.push_back(Output::Outcome { id, outcome });
        }
    }

    /// Gives a stopped transfer's outcome although something of it may still be posted.
    pub(super) fn quarantine(&mut self, now: Time, id: TransferId) {
        let Some(record) = self.records.get_mut(&id) else {
            return;
        };
        if let Some(outcome) = outcome(record, MemoryState::Quarantined) {
            self.out.push_back(Output::Outcome { id, outcome });
        }
        let state = std::mem::replace(&mut record.state, State::Active);
        record.state = match state {
            State::Stopping(end) => State::Quarantined(end),
            other => other,
        };
        self.set_timer(id, Some(now + self.cfg.drain_grace));
    }

    /// What a quarantined transfer has posted has not come back in time: the queue pairs that it is on are taken down,
    /// and if that does not bring it back either, all of its peer's.
    pub(super) fn drain(&mut self, now: Time, id: TransferId) {
        let Some(record) = self.records.get_mut(&id) else {
            return;
        };
        let State::Quarantined(end) = &mut record.state else {
            return;
        };
        let left = |j: &&JobRecord| j.progress != Progress::Drained;
        if record.jobs.iter().filter(left).all(|j| j.kernels) {
            // Nothing helps but their end.
            return self.set_timer(id, Some(now + self.cfg.drain_grace));
        }
        let posted = record.jobs.iter().filter(|j| !j.kernels);
        let posted = posted.filter(|j| j.progress == Progress::Started);
        let jobs: Arc<[JobId]> = posted.map(|j| j.job.id).collect();
        if jobs.is_empty() || std::mem::replace(&mut end.reset, true) {
            return self.force_drain(id);
        }
        let peer = record.peer;
        self.out.push_back(Output::ResetLanes { id, peer, jobs });
        self.set_timer(id, Some(now + self.cfg.reset_grace));
    }

    /// Answers [`Output::ResetLanes`]: no queue pair to the peer is taken down alone.
    pub fn lanes_stay(&mut self, id: TransferId) {
        let state = self.records.get(&id).map(|record| &record.state);
        if matches!(state, Some(State::Quarantined(_))) {
            self.set_timer(id, None);
            self.force_drain(id);
        }
    }

    /// Asks for the peer of a stopped transfer to be drained, unless that is under way.
    pub(super) fn force_drain(&mut self, id: TransferId) {
        let Some(record) = self.records.get(&id) else {
            return;
        };
        let (State::Stopping(end) | State::Quarantined(end)) = &record.state else {
            return;
        };
        let p = self.peers.entry(record.peer).or_default();
        if p.draining.is_some_and(|token| token > end.before) {
            return;
        }
        self.last_token += 1;
        p.draining = Some(self.last_token);
        let token = DrainToken(self.last_token);
        self.out.push_back(Output::ForceDrain {
            peer: record.peer,
            token,
        });
    }

    /// A push that will not be done says so once nothing of it is under way.
    pub(super) fn tell_aborted(&mut self, id: TransferId, record: &Record) {
        let (State::Stopping(end) | State::Quarantined(end)) = &record.state else {
            return;
        };
        if matches!(record.kind, Kind::Push) && !record.peer_lost {
            let notice = Notice::PushAborted {
                cause: end.cause.clone(),
            };
            self.out.push_back(Output::SendNotice {
                id,
                peer: record.peer,
                notice,
            });
        }
    }
}

/// The outcome of a stopped transfer.
fn outcome(record: &Record, memory: MemoryState) -> Option<Outcome> {
    let (State::Stopping(end) | State::Quarantined(end)) = &record.state else {
        return None;
    };
    let incomplete = record.incomplete();
    Some(if end.asked {
        Outcome::Cancelled { incomplete, memory }
    } else {
        Outcome::Failed {
            cause: end.cause.clone(),
            at: end.at,
            incomplete,
            memory,
        }
    })
}
