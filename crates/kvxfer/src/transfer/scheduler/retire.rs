//! Completions: what each says of the work posted on its lane, and whose failure a failure is.

use std::ops::Range;

use super::Scheduler;
use super::slot::JobSlot;
use crate::transfer::lane::Use;
use crate::transfer::{Cause, Direction, Job, JobError, LaneId, SingleReport};

/// How often work that was lost with a lane is posted again before its job fails. Bounds the
/// harm of an operation that takes every lane down without being named.
const MAX_TRIES: u32 = 3;

impl Scheduler {
    /// Takes a completion of a lane. An id that names nothing posted there is counted and ignored.
    pub fn complete(&mut self, lane: LaneId, wr_id: u64, result: Result<(), Cause>) {
        let Some((l, (at, idx))) = self.lane(lane.0).and_then(|l| Some((l, l.find(wr_id)?))) else {
            self.stats.stale += 1;
            return;
        };
        let named = l.failure.as_ref().is_some_and(|f| f.named);
        match result {
            Ok(()) => {
                // Only the last of a batch is signalled, and a queue pair in the error state
                // completes nothing: anything else is not ours.
                if named || l.posted.get(at).is_none_or(|b| idx + 1 != b.n) {
                    self.stats.stale += 1;
                    return;
                }
                let p = l.peer;
                for _ in 0..=at {
                    self.retire_confirmed(lane.0);
                }
                self.make_ready(p);
            }
            Err(cause) if named || cause.is_flush() => {
                self.stats.echoes += 1;
                self.fail_lane(lane.0, Cause::LaneFailed, false, false);
                for _ in 0..at {
                    self.retire_flushed(lane.0, None);
                }
                self.retire_flushed(lane.0, Some(idx + 1));
            }
            Err(cause) => {
                // Completions of a queue pair come in order: what was posted before is done.
                for _ in 0..at {
                    self.retire_confirmed(lane.0);
                }
                let moves = self.moves(lane, &cause);
                self.fail_lane(lane.0, cause.clone(), true, moves);
                if moves {
                    self.retire_done(lane.0, idx);
                    self.retire_flushed(lane.0, Some(idx + 1));
                } else {
                    self.retire_named(lane, idx, cause);
                }
            }
        }
    }

    /// Takes the oldest batch of a lane as completed well.
    pub(super) fn retire_confirmed(&mut self, lane: u32) {
        let Some(l) = self.lanes[lane as usize].as_mut() else {
            return;
        };
        let Some(batch) = l.pop() else { return };
        let (p, pair, n) = (l.peer, l.pair, batch.n - batch.accounted);
        self.cq_credits += n;
        match batch.what {
            Use::Job {
                slot: s, first_op, ..
            } => {
                self.stats.confirmed += u64::from(n);
                self.release_bytes(p, batch.bytes);
                let Some(slot) = self.jobs[s as usize].as_mut() else {
                    return;
                };
                slot.posted -= n;
                slot.confirmed(u64::from(n), pair);
                slot.bytes_done += if batch.accounted == 0 {
                    batch.bytes
                } else {
                    bytes_of(
                        &slot.job,
                        first_op + u64::from(batch.accounted)..first_op + u64::from(batch.n),
                    )
                };
                if slot.posted == 0 {
                    self.settle(s);
                }
            }
            Use::Single { token } => {
                self.singles.push_back(SingleReport {
                    token,
                    lane: LaneId(lane),
                    result: Ok(()),
                });
            }
        }
    }

    /// Takes the first `n` of the oldest batch of a lane as completed well.
    fn retire_done(&mut self, lane: u32, n: u32) {
        let Some(l) = self.lanes[lane as usize].as_mut() else {
            return;
        };
        let Some(front) = l.posted.front_mut() else {
            return;
        };
        let (batch, n) = (*front, n.min(front.n));
        let ended = n.saturating_sub(batch.accounted);
        let Use::Job {
            slot: s, first_op, ..
        } = batch.what
        else {
            return;
        };
        front.accounted = n.max(batch.accounted);
        l.credits += ended;
        let pair = l.pair;
        self.cq_credits += ended;
        self.stats.confirmed += u64::from(ended);
        let done = first_op + u64::from(batch.accounted)..first_op + u64::from(n);
        if let Some(slot) = self.job_mut(s) {
            slot.posted -= ended;
            slot.confirmed(u64::from(ended), pair);
            slot.bytes_done += bytes_of(&slot.job, done);
        }
    }

    /// Takes the oldest batch of a lane up to and with `idx`, which failed with `cause`: what comes
    /// before it in the batch is done.
    pub(super) fn retire_named(&mut self, lane: LaneId, idx: u32, cause: Cause) {
        let Some(l) = self.lanes[lane.0 as usize].as_mut() else {
            return;
        };
        let Some(front) = l.posted.front_mut() else {
            return;
        };
        let batch = *front;
        let ended = idx + 1 - batch.accounted;
        let whole = idx + 1 == batch.n;
        if whole {
            l.pop();
        } else {
            front.accounted = idx + 1;
            l.credits += ended;
        }
        let (p, pair) = (l.peer, l.pair);
        let in_doubt = l.failure.as_ref().is_none_or(|f| f.in_doubt);
        self.cq_credits += ended;
        let goes_on = self.goes_on(lane.0);
        match batch.what {
            Use::Job {
                slot: s, first_op, ..
            } => {
                let confirmed = first_op + u64::from(batch.accounted)..first_op + u64::from(idx);
                self.stats.confirmed += confirmed.end - confirmed.start;
                if whole {
                    self.release_bytes(p, batch.bytes);
                }
                let write = |slot: &mut JobSlot| slot.job.dir == Direction::Write;
                let in_doubt = in_doubt && self.job_mut(s).is_some_and(write);
                if in_doubt && goes_on {
                    self.doubt(lane.0, s);
                }
                if let Some(slot) = self.job_mut(s) {
                    slot.posted -= ended;
                    slot.in_doubt |= in_doubt && !goes_on;
                    slot.confirmed(confirmed.end - confirmed.start, pair);
                    slot.job.fail(JobError {
                        op: confirmed.end,
                        cause,
                    });
                    slot.replay.clear();
                    slot.bytes_done += bytes_of(&slot.job, confirmed);
                }
                self.settle(s);
            }
            Use::Single { token } => {
                self.singles.push_back(SingleReport {
                    token,
                    lane,
                    result: Err(cause),
                });
            }
        }
    }

    /// Takes the oldest batch of a lane, up to `upto` of its work requests or all, as let go by the
    /// device without being done. False when there was no batch.
    pub(super) fn retire_flushed(&mut self, lane: u32, upto: Option<u32>) -> bool {
        let Some(l) = self.lanes[lane as usize].as_mut() else {
            return false;
        };
        let Some(front) = l.posted.front_mut() else {
            return false;
        };
        let batch = *front;
        let end = upto.unwrap_or(batch.n).min(batch.n);
        let ended = end.saturating_sub(batch.accounted);
        let whole = end == batch.n;
        if whole {
            l.pop();
        } else {
            front.accounted = end;
            l.credits += ended;
        }
        let p = l.peer;
        let in_doubt = l.failure.as_ref().is_none_or(|f| f.in_doubt);
        let moved = l.failure.as_ref().is_some_and(|f| f.moved);
        // What a completion said of one work request is not the others' failure.
        let lane_cause = match &l.failure {
            Some(f) if !f.named || f.moved || f.cause.is_of_lane() || f.cause.is_of_peer() => {
                f.cause.clone()
            }
            _ => Cause::LaneFailed,
        };
        self.cq_credits += ended;
        let goes_on = self.goes_on(lane);
        match batch.what {
            Use::Job {
                slot: s,
                first_op,
                tries,
            } => {
                if whole {
                    self.release_bytes(p, batch.bytes);
                }
                let lost = first_op + u64::from(batch.accounted)..first_op + u64::from(end);
                let Some(slot) = self.jobs[s as usize].as_mut() else {
                    return true;
                };
                slot.posted -= ended;
                let in_doubt = in_doubt && slot.job.dir == Direction::Write && !lost.is_empty();
                // If they are posted again, the job waits for the peer's word.
                slot.in_doubt |= in_doubt && !goes_on;
                let over = slot.over();
                if in_doubt && goes_on {
                    self.doubt(lane, s);
                }
                let Some(slot) = self.jobs[s as usize].as_mut() else {
                    return true;
                };
                if !over && !lost.is_empty() {
                    // A lane that this side reset, or that could not send, says nothing against the
                    // work on it.
                    let tries = match lane_cause {
                        Cause::LaneReset | Cause::PeerReset | Cause::PortDown { .. } => tries,
                        // Nor does the path's failure, where there is another path.
                        _ if goes_on && (moved || lane_cause.is_of_path()) => tries,
                        _ => tries + 1,
                    };
                    // Posted again, the first one could come after what is done with the block later.
                    if in_doubt && !goes_on || tries > MAX_TRIES {
                        slot.job.fail(JobError {
                            op: lost.start,
                            cause: lane_cause,
                        });
                        slot.replay.clear();
                    } else {
                        self.stats.replayed += u64::from(ended);
                        slot.lost(lost, tries);
                        if !slot.queued {
                            slot.queued = true;
                            self.peers[p as usize].jobs.push_back(s);
                        }
                        self.make_ready(p);
                    }
                }
                self.settle(s);
            }
            Use::Single { token } => {
                let result = Err(lane_cause);
                self.singles.push_back(SingleReport {
                    token,
                    lane: LaneId(lane),
                    result,
                });
            }
        }
        true
    }
}

/// The bytes of some operations of a job. Emits them: only for the paths of failure.
fn bytes_of(job: &Job, range: Range<u64>) -> u64 {
    let mut bytes = 0;
    if !range.is_empty() {
        job.source.emit(range, &mut |op| bytes += op.len);
    }
    bytes
}
