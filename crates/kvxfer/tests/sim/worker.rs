//! What a worker thread does: its inbox, posting, polling, and keeping its lanes.

use std::sync::Arc;

use kvxfer::transfer::{
    Cause, CompletionStatus, Direction, JobId, JobReport, LaneId, LeaseAnswer, PostFailure,
};

use super::check::{Violation, ensure};
use super::net::{Data, NicState, Wr, flush};
use super::world::{Bug, Draining, Step, ToOwner, ToWorker, World};

impl World {
    pub(super) fn worker_reads_inbox(&mut self, w: usize) -> Step {
        for _ in 0..1 + self.rng.index(4) {
            let Some(message) = self.workers[w].inbox.pop_front() else {
                break;
            };
            match message {
                ToWorker::Start(job) => self.workers[w].scheduler.start(job),
                ToWorker::Stop(job) => {
                    self.workers[w].scheduler.stop(job);
                    if self.bug == Bug::QuiescentTooSoon {
                        self.lie_quiescent(job);
                    }
                }
                ToWorker::Reset(jobs) => {
                    for lane in self.workers[w].scheduler.lanes_of(&jobs) {
                        if self.workers[w].scheduler.lane_failure(lane).is_none() {
                            let n = self.nic_of(w, lane)?;
                            self.break_nic(n, true);
                        }
                    }
                }
                ToWorker::Drain {
                    owner,
                    peer,
                    key,
                    token,
                } => {
                    let nics: Vec<usize> = (0..self.nics.len())
                        .filter(|n| {
                            let nic = &self.nics[*n];
                            let there = !nic.destroyed || nic.waits;
                            nic.worker == w && nic.peer == peer && there
                        })
                        .collect();
                    if self.bug != Bug::DrainTooSoon {
                        for n in &nics {
                            self.break_nic(*n, true);
                        }
                    }
                    self.workers[w].draining.push(Draining {
                        owner,
                        key,
                        token,
                        nics,
                    });
                }
                ToWorker::PeerGone { peer } => {
                    for n in 0..self.nics.len() {
                        if self.nics[n].worker == w && self.nics[n].peer == peer {
                            self.destroy(n);
                        }
                    }
                }
            }
        }
        self.worker_reports(w);
        self.worker_keeps_lanes(w)
    }

    pub(super) fn lie_quiescent(&mut self, job: JobId) {
        for s in &self.seen {
            if s.jobs.iter().any(|(j, _)| *j == job) {
                let report = JobReport {
                    job,
                    transfer: s.id,
                    owner: s.owner as u16,
                    ops_done: 0,
                    rails: kvxfer::rails::RailSet::EMPTY,
                    bytes_done: 0,
                    error: None,
                    in_doubt: false,
                    doubts: 0,
                    quiescent: true,
                };
                self.owner_inbox[s.owner].push_back(ToOwner::Report(report));
            }
        }
    }

    /// Answers drains that are over, and rebuilds lanes.
    pub(super) fn worker_keeps_lanes(&mut self, w: usize) -> Step {
        for n in 0..self.nics.len() {
            let nic = &self.nics[n];
            if nic.worker != w || nic.destroyed || nic.state == NicState::Works {
                continue;
            }
            let scheduler = &self.workers[w].scheduler;
            let drained = scheduler.lane_drained(nic.lane);
            // Destroying a queue pair ends its work too, flushed or not.
            let forced = nic.state == NicState::Error && self.rng.permille(self.faults.destroy);
            if (drained && self.rng.permille(500)) || forced {
                let peer = nic.peer;
                if scheduler.lane_failure(nic.lane).is_none() && nic.queue.is_empty() && !forced {
                    continue;
                }
                if self.retires() {
                    self.retire(n);
                    continue;
                }
                self.destroy(n);
                if !self.peers[peer].lost {
                    self.new_nic(w, peer);
                }
            }
        }
        for n in 0..self.nics.len() {
            let nic = &self.nics[n];
            // A lie needs time to be found out.
            let soon = if self.bug == Bug::SettlesTooSoon {
                20
            } else {
                300
            };
            if nic.worker == w && nic.waits && self.rng.permille(soon) {
                let peer = nic.peer;
                self.settle(n);
                if !self.peers[peer].lost {
                    self.new_nic(w, peer);
                }
            }
        }
        let soon = self.bug == Bug::DrainTooSoon;
        let mut over = Vec::new();
        let nics = &self.nics;
        let worker = &mut self.workers[w];
        let scheduler = &worker.scheduler;
        worker.draining.retain(|d| {
            let drained = soon
                || d.nics
                    .iter()
                    .all(|n| nics[*n].destroyed || scheduler.lane_drained(nics[*n].lane));
            if drained {
                over.push((d.owner, d.key, d.token, d.nics.clone()));
            }
            !drained
        });
        for (owner, key, token, nics) in over {
            // The session is set up anew: the peer has reset its queue pairs too.
            for n in nics {
                self.nics[n].late.clear();
            }
            let acks = self.acks.entry((owner, token)).or_default();
            *acks += 1;
            if *acks == self.workers.len() {
                self.owner_inbox[owner].push_back(ToOwner::Drained { key, token });
            }
        }
        Ok(())
    }

    pub(super) fn worker_posts(&mut self, w: usize) -> Step {
        self.post_leases(w)?;
        let mut batch = std::mem::take(&mut self.batch);
        for _ in 0..1 + self.rng.index(8) {
            let Some(lane) = self.workers[w].scheduler.next_lane() else {
                break;
            };
            if !self.workers[w].scheduler.next_batch(lane, &mut batch) {
                continue;
            }
            let n = self.nic_of(w, lane)?;
            let job = batch.job().cloned().ok_or("a batch without a job")?;
            ensure!(
                job.peer == self.peers[self.nics[n].peer].key,
                "a batch for another peer's lane"
            );
            let mut taken = batch.len();
            if !self.calm && self.rng.permille(self.faults.post) {
                taken = self.rng.index(batch.len());
            }
            let first = batch.first_op();
            for (i, wr) in batch.iter().enumerate().take(taken) {
                let data = Data {
                    push: job.dir == Direction::Write,
                    job: Arc::clone(&job),
                    op: first + i as u64,
                    remote: wr.remote_offset,
                    pieces: wr.pieces.to_vec(),
                };
                self.post(
                    n,
                    Wr {
                        wr_id: wr.wr_id,
                        signaled: wr.signaled,
                        data: Some(data),
                    },
                )?;
            }
            if taken < batch.len() {
                let cause = Cause::Post { errno: 22 };
                if job.error().is_none() {
                    self.truth
                        .insert(job.id, (first + taken as u64, cause.clone()));
                }
                if self.workers[w].scheduler.post_failed(lane, taken, cause)
                    == PostFailure::ResetLane
                {
                    self.break_nic(n, false);
                }
            }
        }
        self.batch = batch;
        self.worker_reports(w);
        Ok(())
    }

    pub(super) fn post(&mut self, n: usize, wr: Wr) -> Step {
        let nic = &mut self.nics[n];
        ensure!(!nic.destroyed, "posted on a destroyed queue pair");
        ensure!(
            nic.posted - nic.retired < u64::from(nic.send_wr),
            "send queue overrun"
        );
        nic.posted += 1;
        nic.queue.push_back(wr);
        Ok(())
    }

    pub(super) fn nic_of(&self, w: usize, lane: LaneId) -> Result<usize, Violation> {
        let found = self
            .nics
            .iter()
            .position(|n| n.worker == w && n.lane == lane && !n.destroyed);
        found.ok_or_else(|| format!("worker {w} has no {lane}"))
    }

    pub(super) fn post_leases(&mut self, w: usize) -> Step {
        for _ in 0..self.workers[w].leases.len() {
            let Some(check) = self.workers[w].leases.pop_front() else {
                break;
            };
            let (id, _) = self.checks[check];
            let Some(s) = self.index.get(&id).map(|i| &self.seen[*i]) else {
                continue;
            };
            if s.ended.is_some() {
                continue;
            }
            let scheduler = &mut self.workers[w].scheduler;
            let lanes: Vec<_> = scheduler.peer_lanes(s.key).collect();
            let posted = lanes
                .iter()
                .find_map(|l| Some((*l, scheduler.reserve_single(*l, check as u64)?)));
            match posted {
                Some((lane, wr_id)) => {
                    let n = self.nic_of(w, lane)?;
                    self.post(
                        n,
                        Wr {
                            wr_id,
                            signaled: true,
                            data: None,
                        },
                    )?;
                }
                None => self.workers[w].leases.push_back(check),
            }
        }
        Ok(())
    }

    pub(super) fn worker_polls(&mut self, w: usize) -> Step {
        for _ in 0..1 + self.rng.index(12) {
            let Some(mut cqe) = self.workers[w].cq.pop_front() else {
                break;
            };
            let nic = &mut self.nics[cqe.nic];
            nic.retired = nic.retired.max(cqe.covers);
            let (lane, gone) = (nic.lane, nic.destroyed);
            if self.bug == Bug::FlushAsError && cqe.result == Err(flush()) {
                cqe.result = Err(Cause::Completion {
                    status: CompletionStatus::RetryExceeded,
                    vendor: 0xbad,
                });
            }
            let scheduler = &self.workers[w].scheduler;
            if let Err(cause) = &cqe.result
                && cause.is_of_path()
                && scheduler.lives_elsewhere(lane)
            {
                // It is no job's fault.
                cqe.named = None;
            }
            let mut expect = None;
            if let (false, Some(data), Err(cause)) = (gone, &cqe.named, &cqe.result)
                && data.job.error().is_none()
            {
                self.truth
                    .entry(data.job.id)
                    .or_insert((data.op, cause.clone()));
                expect = Some((Arc::clone(&data.job), data.op, cause.clone()));
            }
            self.workers[w]
                .scheduler
                .complete(lane, cqe.wr_id, cqe.result);
            if let Some((job, op, cause)) = expect {
                let told = job.error().map(|e| (e.op, e.cause.clone()));
                ensure!(
                    told == Some((op, cause)),
                    "job {} has first error {told:?}",
                    job.id.0
                );
            }
        }
        while let Some(single) = self.workers[w].scheduler.poll_single() {
            let check = single.token as usize;
            let (id, job) = self.checks[check];
            match single.result {
                Ok(()) => {
                    let gone = self.rng.permille(self.faults.lease_gone);
                    let answer = if gone {
                        LeaseAnswer::Gone {
                            cause: Cause::LeaseExpired,
                        }
                    } else {
                        LeaseAnswer::Live
                    };
                    if let Some(s) = self.index.get(&id).map(|i| &self.seen[*i]) {
                        self.owner_inbox[s.owner].push_back(ToOwner::Lease { id, job, answer });
                    }
                }
                Err(_) => self.workers[w].leases.push_back(check),
            }
        }
        self.worker_reports(w);
        self.worker_keeps_lanes(w)
    }

    pub(super) fn worker_reports(&mut self, w: usize) {
        while let Some(mut report) = self.workers[w].scheduler.poll_report() {
            if self.bug == Bug::ConfirmsTooMuch {
                report.ops_done += 1;
            }
            self.owner_inbox[report.owner as usize].push_back(ToOwner::Report(report));
        }
    }
}
