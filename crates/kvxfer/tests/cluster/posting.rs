//! What a worker posts, and whether everybody gets a turn.

use std::sync::Arc;

use kvxfer::time::Time;
use kvxfer::transfer::{Batch, Cause, Direction, LaneId, PeerKey, PostFailure, TransferId};
use kvxfer::wire::PushDone;

use super::bug::{Bug, Step, ensure};
use super::peer::Speaker;
use super::qp::{What, Wr};
use super::worker::{Cmd, Single, Waited};
use super::world::{MS, World};

/// What has become of the end of a push that is to be told.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Noticed {
    Posted,
    Waits,
    /// This worker has the lane that may tell it.
    Of(usize),
}

impl World {
    pub(crate) fn worker_posts(&mut self, life: usize, w: usize) -> Step {
        let mut batch = std::mem::take(&mut self.batch);
        let most = 1 + self.rng.index(6);
        for _ in 0..most {
            let lane = if self.bug == Bug::FavouritePeer {
                let worker = &self.lives[life].workers[w];
                let favourite = worker.lanes.keys().copied();
                favourite
                    .into_iter()
                    .find(|l| worker.scheduler.has_work(*l))
            } else {
                self.lives[life].workers[w].scheduler.next_lane()
            };
            let Some(lane) = lane else {
                self.check_nothing_runs(life, w)?;
                break;
            };
            if self.lives[life].workers[w]
                .scheduler
                .next_batch(lane, &mut batch)
            {
                self.lives[life].workers[w].busy = true;
                self.check_turns(life, w, &batch)?;
                self.post_batch(life, w, lane, &batch)?;
            }
            batch.clear();
        }
        self.batch = batch;
        // More may be left: the loop does not sleep on it.
        let worker = &mut self.lives[life].workers[w];
        worker.busy |= worker.lanes.keys().any(|l| worker.scheduler.has_work(*l));
        self.post_checks(life, w)
    }

    /// No lane was offered: then none can be posted to.
    fn check_nothing_runs(&mut self, life: usize, w: usize) -> Step {
        let worker = &mut self.lives[life].workers[w];
        let lanes: Vec<LaneId> = worker.lanes.keys().copied().collect();
        let stuck = lanes.iter().find(|l| worker.scheduler.has_work(**l));
        ensure!(
            stuck.is_none(),
            Starvation,
            "worker {w} of life {life} was offered no lane, and {stuck:?} has work"
        );
        Ok(())
    }

    /// A batch of one job was made: the others that could have been in it have waited one more turn.
    fn check_turns(&mut self, life: usize, w: usize, batch: &Batch) -> Step {
        let worker = &mut self.lives[life].workers[w];
        let Some(served) = batch.job().map(|job| job.id) else {
            return Ok(());
        };
        let scheduler = &worker.scheduler;
        let mut open: Vec<PeerKey> = Vec::new();
        for (lane, q) in &worker.lanes {
            let key = self.qps[*q].key;
            if scheduler.has_work(*lane) && !open.contains(&key) {
                open.push(key);
            }
        }
        let rivals = (worker.waited.len() * open.len()) as u32;
        let mut longest = None;
        for (id, (job, waited)) in &mut worker.waited {
            // What another worker has claimed is its own to post, also what did not fit its batch.
            let waits =
                *id != served && !job.is_stopped() && !job.exhausted() && open.contains(&job.peer);
            if !waits {
                *waited = Waited::default();
                continue;
            }
            waited.batches += 1;
            waited.rivals = waited.rivals.max(rivals);
            if waited.batches > waited.rivals + 4 {
                longest = Some((job.transfer.0, waited.batches, waited.rivals));
            }
        }
        if let Some((tid, batches, rivals)) = longest {
            ensure!(
                false,
                Starvation,
                "transfer {tid} waits on worker {w} of life {life} while {batches} batches of others \
                 were posted; their turns are {rivals} at most"
            );
        }
        Ok(())
    }

    fn post_batch(&mut self, life: usize, w: usize, lane: LaneId, batch: &Batch) -> Step {
        let Some(&q) = self.lives[life].workers[w].lanes.get(&lane) else {
            ensure!(false, Credits, "a batch for {lane}, which is not there");
            return Ok(());
        };
        let Some(job) = batch.job().cloned() else {
            return Ok(());
        };
        let mut taken = batch.len();
        if !self.calm && self.rng.permille(self.faults.post) {
            taken = self.rng.index(batch.len());
            self.sum.count("fault: post refused");
        }
        let nonce = self.seen[job.transfer.0 as usize].nonce;
        for (i, wr) in batch.iter().enumerate().take(taken) {
            let op = batch.first_op() + i as u64;
            let (remote, len) = (wr.remote_offset as u32, wr.len as u32);
            let local = wr.pieces[0].offset as u32;
            let what = match job.dir {
                Direction::Read => What::Read {
                    job: Arc::clone(&job),
                    op,
                    remote,
                    local,
                    len,
                },
                Direction::Write => What::Write {
                    job: Arc::clone(&job),
                    op,
                    remote,
                    local,
                    len,
                    nonce,
                },
            };
            let wr = Wr {
                wr_id: wr.wr_id,
                signaled: wr.signaled,
                what,
            };
            self.qp_post(q, wr)?;
        }
        if taken < batch.len() {
            let cause = Cause::Post { errno: 22 };
            if job.error().is_none() {
                let op = batch.first_op() + taken as u64;
                self.truth.insert((life, job.id), (op, cause.clone()));
            }
            self.post_failed(life, w, lane, taken, cause)?;
        }
        Ok(())
    }

    fn post_failed(
        &mut self,
        life: usize,
        w: usize,
        lane: LaneId,
        taken: usize,
        cause: Cause,
    ) -> Step {
        let worker = &mut self.lives[life].workers[w];
        if worker.scheduler.post_failed(lane, taken, cause) == PostFailure::ResetLane
            && let Some(&q) = worker.lanes.get(&lane)
        {
            self.qp_flush(q, None)?;
        }
        Ok(())
    }

    fn post_checks(&mut self, life: usize, w: usize) -> Step {
        for _ in 0..self.lives[life].workers[w].waiting_checks.len() {
            let Some(id) = self.lives[life].workers[w].waiting_checks.pop_front() else {
                break;
            };
            match self.post_check(life, w, id)? {
                Some(true) => self.lives[life].workers[w].busy = true,
                Some(false) => self.lives[life].workers[w].waiting_checks.push_back(id),
                None => {}
            }
        }
        self.post_notices(life, w)?;
        let retry = self.clock(life).0 + MS;
        let worker = &mut self.lives[life].workers[w];
        let waits = !worker.waiting_checks.is_empty() || !worker.waiting_notices.is_empty();
        worker.retry_at = waits.then_some(Time(retry));
        Ok(())
    }

    fn post_notices(&mut self, life: usize, w: usize) -> Step {
        for _ in 0..self.lives[life].workers[w].waiting_notices.len() {
            let worker = &mut self.lives[life].workers[w];
            let Some((peer, done)) = worker.waiting_notices.pop_front() else {
                break;
            };
            if self.peers[peer].lost.is_some() {
                continue;
            }
            match self.post_notice(life, w, peer, &done)? {
                Noticed::Posted => self.lives[life].workers[w].busy = true,
                Noticed::Waits => {
                    let worker = &mut self.lives[life].workers[w];
                    worker.waiting_notices.push_back((peer, done));
                }
                Noticed::Of(other) => self.command(life, other, Cmd::Tell { peer, done }),
            }
        }
        Ok(())
    }

    /// The lane that tells what was written over a rail; `Err`: it cannot be told here now.
    fn lane_to_tell(
        &mut self,
        life: usize,
        w: usize,
        peer: usize,
        rail: usize,
    ) -> Result<LaneId, Noticed> {
        let speaker = self.speaker(peer, rail);
        let worker = &self.lives[life].workers[w];
        let works = |lane: &LaneId| worker.scheduler.lane_failure(*lane).is_none();
        let on_rail = |lane: &LaneId| {
            let qp = worker.lanes.get(lane);
            qp.is_some_and(|q| self.qps[*q].rail == rail)
        };
        let lanes = worker.scheduler.peer_lanes(self.peers[peer].key);
        let lanes = lanes.filter(works);
        let (own, workers): (Vec<LaneId>, _) = match &speaker {
            Speaker::Nobody => return Err(Noticed::Waits),
            Speaker::Pair(workers) => (lanes.filter(on_rail).collect(), workers),
            Speaker::Any(workers) => (lanes.collect(), workers),
        };
        if own.is_empty() {
            let other = workers.iter().find(|other| **other != w);
            return Err(other.map_or(Noticed::Waits, |other| Noticed::Of(*other)));
        }
        let free = |lane: &&LaneId| worker.scheduler.lane_credits(**lane) > 0;
        let lane = own.iter().find(free).copied().ok_or(Noticed::Waits)?;
        if !on_rail(&lane) {
            self.sum.count("notice: for a rail that is down");
        }
        Ok(lane)
    }

    fn free_lane(&self, life: usize, w: usize, peer: PeerKey) -> Option<LaneId> {
        let scheduler = &self.lives[life].workers[w].scheduler;
        scheduler.peer_lanes(peer).find(|lane| {
            scheduler.lane_failure(*lane).is_none() && scheduler.lane_credits(*lane) > 0
        })
    }

    fn post_check(
        &mut self,
        life: usize,
        w: usize,
        id: TransferId,
    ) -> Result<Option<bool>, super::bug::Violation> {
        let Some(live) = self.lives[life].workers[w].live.get(&id) else {
            return Ok(None);
        };
        let (peer, lease) = (live.peer, live.lease);
        let Some(lease) = lease else { return Ok(None) };
        let Some(lane) = self.free_lane(life, w, self.peers[peer].key) else {
            return Ok(Some(false));
        };
        let Some(landing) = self.lives[life].free_landings.pop() else {
            return Ok(Some(false));
        };
        let worker = &mut self.lives[life].workers[w];
        let token = worker.next_token;
        let Some(wr_id) = worker.scheduler.reserve_single(lane, token) else {
            self.lives[life].free_landings.push(landing);
            return Ok(Some(false));
        };
        worker.next_token += 1;
        worker.singles.insert(token, Single::Lease { id, landing });
        let what = What::Slot {
            slot: lease.slot,
            landing,
        };
        self.post_single(life, w, lane, wr_id, what)?;
        Ok(Some(true))
    }

    fn post_single(&mut self, life: usize, w: usize, lane: LaneId, wr_id: u64, what: What) -> Step {
        let Some(&q) = self.lives[life].workers[w].lanes.get(&lane) else {
            return Ok(());
        };
        if !self.calm && self.rng.permille(self.faults.post) {
            return self.post_failed(life, w, lane, 0, Cause::Post { errno: 22 });
        }
        let wr = Wr {
            wr_id,
            signaled: true,
            what,
        };
        self.qp_post(q, wr)
    }

    pub(crate) fn post_notice(
        &mut self,
        life: usize,
        w: usize,
        peer: usize,
        done: &PushDone,
    ) -> Result<Noticed, super::bug::Violation> {
        let lane = match self.lane_to_tell(life, w, peer, usize::from(done.rail)) {
            Ok(lane) => lane,
            Err(noticed) => return Ok(noticed),
        };
        let worker = &mut self.lives[life].workers[w];
        let token = worker.next_token;
        let Some(wr_id) = worker.scheduler.reserve_single(lane, token) else {
            return Ok(Noticed::Waits);
        };
        worker.next_token += 1;
        let message = Box::new(done.clone().into());
        let single = Single::Notice {
            peer,
            done: Box::new(done.clone()),
        };
        worker.singles.insert(token, single);
        self.sum.count("notice: on the data plane");
        self.post_single(life, w, lane, wr_id, What::Send(message))?;
        Ok(Noticed::Posted)
    }
}
