//! What a worker posts: batches of its jobs, and work requests of its own.

use std::sync::Arc;

use nix::errno::Errno;
use tracing::error;

use kvxfer_verbs::{PostCause, Remote, SendChain, SendOp, Sge};

use super::{Check, Command, Single, Worker};
use crate::engine::peer_lanes::Speaker;
use crate::engine::peer_session::PeerSession;
use crate::leases::SLOT_BYTES;
use crate::plan::Piece;
use crate::transfer::{
    Batch, Cause, Direction, LaneId, LeaseAnswer, PeerKey, PostFailure, Refusal,
};
use crate::wire::{Message, PushDone, RemoteSpan};

/// Batches posted between two polls, so that completions and deadlines are seen in time.
const POST_BATCHES: usize = 64;

/// What has become of the end of a push that is to be told.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Noticed {
    Posted,
    /// Nothing is free, or the peer has yet to say that its half of a failed pair of rails is down.
    Waits,
    /// This worker has the lane that may tell it.
    Of(u16),
}

impl Worker {
    pub(super) fn post(&mut self) -> bool {
        let mut any = false;
        for _ in 0..POST_BATCHES {
            let Some(lane) = self.scheduler.next_lane() else {
                break;
            };
            let mut batch = std::mem::take(&mut self.batch);
            if self.scheduler.next_batch(lane, &mut batch) {
                any = true;
                self.post_batch(lane, &batch);
            }
            batch.clear();
            self.batch = batch;
        }
        any | self.post_checks() | self.post_notices()
    }

    /// Sends the notices that may go on the data plane alone. What cannot go ends with its session: the
    /// consumer then does not take what has come for all there is.
    fn post_notices(&mut self) -> bool {
        let mut any = false;
        for _ in 0..self.waiting_notices.len() {
            let Some((peer, done)) = self.waiting_notices.pop_front() else {
                break;
            };
            if peer.lost().is_some() {
                continue;
            }
            match self.post_notice(&peer, &done) {
                Noticed::Posted => any = true,
                Noticed::Waits => self.waiting_notices.push_back((peer, done)),
                Noticed::Of(worker) => {
                    let at = Arc::clone(&peer);
                    peer.on_worker(worker, Command::Tell { peer: at, done });
                }
            }
        }
        any
    }

    fn post_batch(&mut self, lane: LaneId, batch: &Batch) {
        let (Some(at), Some(job)) = (self.lanes.get(&lane), batch.job()) else {
            return;
        };
        let Some(rail) = at.peer.rails.get(at.pair) else {
            return;
        };
        let (remote, chain, sges) = (&rail.remote, &mut self.chain, &mut self.sges);
        let known = match job.dir {
            Direction::Read => fill(chain, sges, batch, remote, SendOp::Read),
            Direction::Write => fill(chain, sges, batch, remote, SendOp::Write),
        };
        if !known {
            // Compiled plans name only memories that the peer described.
            let errno = Errno::EINVAL as i32;
            let _ = (self.scheduler).post_failed(lane, 0, Cause::Post { errno });
            return;
        }
        let posted = at.qp.post_send(&self.chain, &rail.regions);
        match posted {
            Ok(()) if job.exhausted() => job.note_posted(self.clock.now()),
            Ok(()) => {}
            Err(failed) => self.post_failed(lane, failed.posted, &failed.cause),
        }
    }

    pub(super) fn post_failed(&mut self, lane: LaneId, posted: usize, cause: &PostCause) {
        error!(%lane, %cause, "the device did not take a work request");
        let errno = errno_of(cause);
        let reset = (self.scheduler).post_failed(lane, posted, Cause::Post { errno });
        if reset == PostFailure::ResetLane
            && let Some(at) = self.lanes.get(&lane)
        {
            at.qp.to_error();
        }
    }

    /// Reads the lease slots of pulls that have all their data, or all of a job.
    fn post_checks(&mut self) -> bool {
        let mut any = false;
        for _ in 0..self.waiting_checks.len() {
            let Some(check) = self.waiting_checks.pop_front() else {
                break;
            };
            match self.post_check(check) {
                Some(true) => any = true,
                Some(false) => self.waiting_checks.push_back(check),
                None => {}
            }
        }
        any
    }

    /// Lanes of the peer that take a work request of the worker's own, now or when others have completed.
    pub(super) fn working_lanes(&self, peer: PeerKey) -> impl Iterator<Item = LaneId> {
        // A failed lane keeps the credits of what it had sent.
        let works = |lane: &LaneId| self.scheduler.lane_failure(*lane).is_none();
        self.scheduler.peer_lanes(peer).filter(works)
    }

    /// A lane of the peer that takes a work request of the worker's own.
    fn free_lane(&self, peer: PeerKey) -> Option<LaneId> {
        let free = |lane: &LaneId| self.scheduler.lane_credits(*lane) > 0;
        self.working_lanes(peer).find(free)
    }

    /// The lane that tells what was written over a pair of rails; `Err`: it cannot be told here now.
    fn lane_to_tell(&self, peer: &PeerSession, pair: u16) -> Result<LaneId, Noticed> {
        let pair = usize::from(pair);
        let on_pair = |lane: &LaneId| self.lanes.get(lane).is_some_and(|at| at.pair == pair);
        let speaker = peer.speaker(pair);
        let (own, workers): (Vec<LaneId>, _) = match &speaker {
            Speaker::Nobody => return Err(Noticed::Waits),
            Speaker::Pair(workers) => {
                let own = self.working_lanes(peer.key).filter(on_pair);
                (own.collect(), workers)
            }
            Speaker::Any(workers) => (self.working_lanes(peer.key).collect(), workers),
        };
        if own.is_empty() {
            let other = workers.iter().find(|worker| **worker != self.index);
            return Err(other.map_or(Noticed::Waits, |worker| Noticed::Of(*worker)));
        }
        let free = |lane: &&LaneId| self.scheduler.lane_credits(**lane) > 0;
        own.iter().find(free).copied().ok_or(Noticed::Waits)
    }

    /// `None`: the check is over; `Some(false)`: nothing is free now.
    fn post_check(&mut self, check: Check) -> Option<bool> {
        let live = self.live.get(&check.id)?;
        let answer = |cause| LeaseAnswer::Gone { cause };
        let peer = Arc::clone(&live.peer);
        let Some(lane) = self.free_lane(peer.key) else {
            return Some(false);
        };
        let rail = self.lanes.get(&lane).and_then(|at| peer.rails.get(at.pair));
        let place = rail.and_then(|rail| Some((live.lease?, rail.leases?)));
        let span = place.and_then(|(lease, table)| {
            let offset = u64::from(lease.slot).checked_mul(SLOT_BYTES as u64)?;
            table
                .contains(offset, SLOT_BYTES as u64)
                .then_some((table, offset))
        });
        let Some((table, offset)) = span else {
            let cause = Cause::Refused {
                reason: Refusal::OutOfRange,
            };
            self.lease_answer(check, answer(cause));
            return None;
        };
        let Some(landing) = live.engine.scratch.take() else {
            return Some(false);
        };
        let token = self.next_token;
        let Some(wr_id) = self.scheduler.reserve_single(lane, token) else {
            live.engine.scratch.give(landing);
            return Some(false);
        };
        self.next_token += 1;
        let remote = Remote {
            addr: table.addr.wrapping_add(offset),
            rkey: table.rkey,
        };
        let sge = Sge {
            region: live.engine.scratch_region,
            len: SLOT_BYTES as u32,
            offset: u64::from(landing) * SLOT_BYTES as u64,
        };
        self.chain.clear();
        self.chain.push(wr_id, SendOp::Read(remote), true, &[sge]);
        let engine = Arc::clone(&live.engine);
        self.singles.insert(
            token,
            Single::Lease {
                check,
                engine,
                landing,
            },
        );
        let posted = self.lanes.get(&lane).and_then(|at| {
            let rail = peer.rails.get(at.pair)?;
            Some(at.qp.post_send(&self.chain, &rail.regions))
        });
        if let Some(Err(failed)) = posted {
            self.post_failed(lane, failed.posted, &failed.cause);
        }
        Some(true)
    }

    /// Sends the end of a push on a queue pair of the peer that may tell it.
    pub(super) fn post_notice(&mut self, peer: &Arc<PeerSession>, done: &PushDone) -> Noticed {
        let lane = match self.lane_to_tell(peer, done.rail) {
            Ok(lane) => lane,
            Err(noticed) => return noticed,
        };
        // It fits: a request's name is bounded.
        let Ok(notice) = Message::from(done.clone()).encode() else {
            return Noticed::Waits;
        };
        let Some((slot, sge)) = self.outbox.put(&notice) else {
            return Noticed::Waits;
        };
        let token = self.next_token;
        let Some(wr_id) = self.scheduler.reserve_single(lane, token) else {
            self.outbox.give(slot);
            return Noticed::Waits;
        };
        self.next_token += 1;
        self.chain.clear();
        self.chain.push(wr_id, SendOp::Send, true, &[sge]);
        let single = Single::Notice {
            slot,
            peer: Arc::clone(peer),
            done: Box::new(done.clone()),
        };
        self.singles.insert(token, single);
        let posted = self.lanes.get(&lane).and_then(|at| {
            let table = self.outbox.table(at.rail)?;
            Some(at.qp.post_send(&self.chain, table))
        });
        if let Some(Err(failed)) = posted {
            self.post_failed(lane, failed.posted, &failed.cause);
        }
        Noticed::Posted
    }
}

/// Makes a chain of a batch; false where it names memory that the peer has not described. By itself, for all
/// work requests go through this loop.
#[inline(never)]
fn fill(
    chain: &mut SendChain,
    sges: &mut Vec<Sge>,
    batch: &Batch,
    remote: &[RemoteSpan],
    op: impl Fn(Remote) -> SendOp,
) -> bool {
    chain.clear();
    let sge = |p: &Piece| Sge {
        region: p.region,
        len: p.len,
        offset: p.offset,
    };
    for wr in batch.iter() {
        let Some(span) = remote.get(wr.remote_region as usize) else {
            return false;
        };
        let op = op(Remote {
            addr: span.addr.wrapping_add(wr.remote_offset),
            rkey: span.rkey,
        });
        if let [piece] = wr.pieces {
            chain.push(wr.wr_id, op, wr.signaled, &[sge(piece)]);
        } else {
            sges.clear();
            sges.extend(wr.pieces.iter().map(sge));
            chain.push(wr.wr_id, op, wr.signaled, sges);
        }
    }
    true
}

/// The number that says best why a work request was not taken.
fn errno_of(cause: &PostCause) -> i32 {
    match cause {
        PostCause::Device { errno } => *errno,
        PostCause::QueueFull | PostCause::CqFull => Errno::ENOMEM as i32,
        _ => Errno::EINVAL as i32,
    }
}
