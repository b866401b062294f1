//! What a worker polls, and what it means.

use std::sync::Arc;
use std::time::Duration;

use kvxfer::leases::LeaseWord;
use kvxfer::transfer::{Cause, CompletionStatus, LaneId, LeaseAnswer, TransferId};
use kvxfer::wire::PathKind;

use super::bug::{Bug, Step, ensure};
use super::qp::{Cqe, CqeKind, PEER_GONE, What};
use super::worker::Single;
use super::world::{World, log};

/// How long work waits for a lane when all have failed.
const LANELESS: Duration = Duration::from_secs(2);

/// Whether the last lane of a path is waited for.
pub(crate) fn rebuilds(path: PathKind) -> bool {
    path != PathKind::Tcp
}

impl World {
    pub(crate) fn worker_polls(&mut self, life: usize, w: usize) -> Step {
        let worker = &self.lives[life].workers[w];
        let sent = |cqe: &&Cqe| matches!(cqe.kind, CqeKind::Sent { .. });
        let waiting = worker.cq.iter().filter(sent).count();
        ensure!(
            waiting <= worker.cq_entries as usize,
            Credits,
            "completion queue of life {life} overrun: {waiting} in {}",
            worker.cq_entries
        );
        let mut failed: Vec<LaneId> = Vec::new();
        for _ in 0..1 + self.rng.index(16) {
            let Some(cqe) = self.lives[life].workers[w].cq.pop_front() else {
                break;
            };
            self.lives[life].workers[w].busy = true;
            let lane = self.qps[cqe.qp].lane;
            let here = |world: &World, lane: &LaneId| {
                world.lives[life].workers[w].lanes.get(lane) == Some(&cqe.qp)
            };
            let mut known = lane.filter(|l| here(self, l));
            if known.is_none() {
                // The queue pair may be in a command that came after the loop had looked.
                self.worker_takes_commands(life, w)?;
                known = self.qps[cqe.qp].lane.filter(|l| here(self, l));
            }
            match cqe.kind {
                CqeKind::Received(message) => {
                    if known.is_none() {
                        log!(
                            self,
                            "life {life} drops a {} from queue pair {}",
                            message.kind(),
                            cqe.qp
                        );
                    }
                    // A completion of a queue pair that is not here has nobody to go to.
                    if known.is_some()
                        && let Some(peer) = self.peer_of_qp(cqe.qp)
                        && let Err(lie) = self.on_message(peer, *message)?
                    {
                        ensure!(false, Session, "a notice was a lie: {lie}");
                    }
                }
                CqeKind::Sent {
                    wr_id,
                    slots,
                    result,
                    what,
                } => {
                    self.qps[cqe.qp].used -= slots;
                    if let Some(lane) = known {
                        self.completed(life, w, lane, cqe.qp, wr_id, result, &what)?;
                        if result.is_err() {
                            failed.push(lane);
                        }
                    }
                }
            }
        }
        failed.dedup();
        for lane in failed {
            self.lane_fails(life, w, lane);
            self.look_at_peer_of(life, w, lane);
        }
        while let Some(single) = self.lives[life].workers[w].scheduler.poll_single() {
            self.single_done(life, w, (single.lane, single.token), single.result)?;
        }
        Ok(())
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "what a completion says, one by one"
    )]
    fn completed(
        &mut self,
        life: usize,
        w: usize,
        lane: LaneId,
        q: usize,
        wr_id: u64,
        result: Result<(), (CompletionStatus, u32)>,
        what: &What,
    ) -> Step {
        let flushed = matches!(result, Err((CompletionStatus::Flush, _)));
        let moves = |cause: &Cause| self.lives[life].workers[w].scheduler.moves(lane, cause);
        let result = match result {
            Ok(()) => Ok(()),
            Err((_, PEER_GONE)) if moves(&Cause::PeerReset) => Err(Cause::PeerReset),
            Err((_, PEER_GONE)) => {
                let lost = self.peer_of_qp(q).and_then(|p| self.peers[p].lost.clone());
                Err(lost.unwrap_or(Cause::PeerDead))
            }
            Err((status, vendor)) if flushed && self.bug == Bug::FlushAsError => {
                let _ = (status, vendor);
                Err(Cause::Completion {
                    status: CompletionStatus::BadResponse,
                    vendor: 0xbad,
                })
            }
            Err((status, vendor)) => Err(Cause::Completion { status, vendor }),
        };
        let mut expect = None;
        if let (Err(cause), Some((job, op)), false) = (&result, what.job(), flushed)
            && job.error().is_none()
            && !moves(cause)
        {
            self.truth
                .entry((life, job.id))
                .or_insert((op, cause.clone()));
            expect = Some((Arc::clone(job), op, cause.clone()));
        }
        self.lives[life].workers[w]
            .scheduler
            .complete(lane, wr_id, result);
        if let Some((job, op, cause)) = expect {
            let told = job.error().map(|e| (e.op, e.cause.clone()));
            ensure!(
                told == Some((op, cause.clone())),
                FirstCause,
                "operation {op} of transfer {} failed with {cause}, and its job says {told:?}",
                job.transfer.0
            );
        }
        Ok(())
    }

    /// When the last lane to a peer here has failed, waits for one that is rebuilt, or sets the session up anew.
    pub(crate) fn look_at_peer_of(&mut self, life: usize, w: usize, lane: LaneId) {
        let worker = &self.lives[life].workers[w];
        let Some(peer) = worker.lanes.get(&lane).and_then(|q| self.peer_of_qp(*q)) else {
            return;
        };
        let scheduler = &worker.scheduler;
        let causes: Option<Vec<Cause>> = scheduler
            .peer_lanes(self.peers[peer].key)
            .map(|lane| scheduler.lane_failure(lane).cloned())
            .collect();
        let Some(cause) = causes.and_then(|causes| causes.into_iter().next()) else {
            return;
        };
        if self.is_rebuilt(life, w, lane) {
            let until = self.clock(life) + LANELESS;
            let laneless = &mut self.lives[life].workers[w].laneless;
            if laneless.iter().all(|(of, ..)| *of != peer) {
                self.sum.count("lane: the last, waited for");
                laneless.push((peer, until, cause));
            }
        } else {
            self.peer_fails(peer, cause);
        }
    }

    /// Whether a lane has failed alone and gets a successor.
    pub(crate) fn is_rebuilt(&self, life: usize, w: usize, lane: LaneId) -> bool {
        let worker = &self.lives[life].workers[w];
        let cause = worker.scheduler.lane_failure(lane);
        let path = worker.lanes.get(&lane).map(|q| self.qps[*q].path);
        cause.is_some_and(Cause::is_of_one_lane) && path.is_some_and(rebuilds)
    }

    /// Ends the sessions that have waited for a lane for too long.
    pub(crate) fn give_up_waiting(&mut self, life: usize, w: usize) {
        let now = self.clock(life);
        let laneless = &mut self.lives[life].workers[w].laneless;
        let late: Vec<_> = laneless.extract_if(.., |of| of.1 <= now).collect();
        for (peer, _, cause) in late {
            self.sum.count("lane: the last, waited for in vain");
            self.peer_fails(peer, cause);
        }
    }

    fn single_done(
        &mut self,
        life: usize,
        w: usize,
        (lane, token): (LaneId, u64),
        result: Result<(), Cause>,
    ) -> Step {
        match self.lives[life].workers[w].singles.remove(&token) {
            Some(Single::Lease { id, landing }) => {
                let shown = self.lives[life].landings[landing as usize];
                self.lives[life].landings[landing as usize] = LeaseWord::DEAD;
                self.lives[life].free_landings.push(landing);
                self.check_done(life, w, id, shown, result)
            }
            Some(Single::Notice { peer, done }) => {
                let rdma = self.peers[peer].rdma;
                let worker = &mut self.lives[life].workers[w];
                match (result.is_ok(), worker.lanes.get(&lane)) {
                    (true, Some(q)) => {
                        let lanes = &self.peers[peer].lanes;
                        let reset = lanes.iter().any(|l| l.qp == *q && l.down_there);
                        match reset {
                            // The peer may have gone without having read it.
                            true => worker.waiting_notices.push_back((peer, *done)),
                            false => worker.told.entry(*q).or_default().push(*done),
                        }
                    }
                    (true, None) => {}
                    (false, _) if rdma => worker.waiting_notices.push_back((peer, *done)),
                    (false, _) => {
                        self.sum.count("notice: again by the control connection");
                        self.send(peer, (*done).into());
                    }
                }
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn check_done(
        &mut self,
        life: usize,
        w: usize,
        id: TransferId,
        shown: LeaseWord,
        result: Result<(), Cause>,
    ) -> Step {
        let Some(live) = self.lives[life].workers[w].live.get(&id) else {
            return Ok(());
        };
        let mut lives = live
            .lease
            .is_some_and(|lease| shown.is_live_for(lease.word));
        lives |= self.bug == Bug::CheckBlind;
        let answer = match result {
            Err(_) if self.peers[live.peer].lost.is_none() => {
                self.lives[life].workers[w].waiting_checks.push_back(id);
                return Ok(());
            }
            Err(cause) => LeaseAnswer::Gone { cause },
            Ok(()) if lives => LeaseAnswer::Live,
            Ok(()) => LeaseAnswer::Gone {
                cause: Cause::LeaseExpired,
            },
        };
        if let LeaseAnswer::Gone { cause } = &answer {
            self.give_reason(id, cause);
        }
        let now = self.clock(life);
        self.lives[life].workers[w]
            .transfers
            .lease_answer(now, id, answer);
        Ok(())
    }

    /// Whether the session of a transfer is lost for this.
    pub(crate) fn lost_for(&self, id: TransferId, cause: &Cause) -> bool {
        let peer = self.seen[id.0 as usize].peer;
        self.peers[peer].lost.as_ref() == Some(cause)
    }
}
