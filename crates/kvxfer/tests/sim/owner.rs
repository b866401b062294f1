//! What the owner of transfers does: reports, time, and the outputs of its ledger.

use std::sync::Arc;
use std::time::Duration;

use kvxfer::time::Time;
use kvxfer::transfer::{Cause, JobId, LeaseAnswer, Output, Refusal, TransferId, Transfers};

use super::check::{Ended, ensure};
use super::net::Wr;
use super::world::{Bug, Step, ToOwner, ToWorker, World};

impl World {
    pub(super) fn owner_reads_inbox(&mut self, o: usize) -> Step {
        for _ in 0..1 + self.rng.index(6) {
            let Some(message) = self.owner_inbox[o].pop_front() else {
                break;
            };
            match message {
                ToOwner::Report(report) => {
                    if let (Some(error), Some(&i)) =
                        (&report.error, self.index.get(&report.transfer))
                    {
                        ensure!(!error.cause.is_flush(), "an echo was reported");
                        match self.truth.get(&report.job) {
                            Some((op, cause)) => {
                                let first = (*op, cause.clone());
                                let told = (error.op, error.cause.clone());
                                ensure!(told == first, "reported {told:?}, first was {first:?}");
                            }
                            None => {
                                let lane = matches!(
                                    error.cause,
                                    Cause::LaneFailed
                                        | Cause::LaneReset
                                        | Cause::PeerUnreachable
                                        | Cause::Post { .. }
                                );
                                let lane = lane || self.rails > 1 && error.cause.is_of_path();
                                ensure!(
                                    lane && self.disturbed,
                                    "reported {} out of nothing",
                                    error.cause
                                );
                            }
                        }
                        self.give_reason(i, error.cause.clone());
                    }
                    self.ledgers[o].job_report(self.now, &report);
                }
                ToOwner::Drained { key, token } => self.ledgers[o].peer_drained(key, token),
                ToOwner::Lease {
                    id,
                    job,
                    mut answer,
                } => {
                    if let Some(&i) = self.index.get(&id) {
                        match (&answer, job) {
                            (LeaseAnswer::Live, None) => self.seen[i].lease_live = true,
                            (LeaseAnswer::Live, Some(job)) => {
                                self.seen[i].live_jobs.insert(job);
                            }
                            (LeaseAnswer::Gone { .. }, _) if self.bug == Bug::LeaseOfNobody => {
                                answer = LeaseAnswer::Live;
                            }
                            (LeaseAnswer::Gone { cause }, _) => self.give_reason(i, cause.clone()),
                        }
                    }
                    match job {
                        None => self.ledgers[o].lease_answer(self.now, id, answer),
                        Some(job) => self.ledgers[o].job_checked(self.now, id, job, answer),
                    }
                }
                ToOwner::Verified { id } => {
                    let wrong = !self.faults.quiet() && self.rng.permille(100);
                    let verdict = match self.index.get(&id) {
                        Some(&i) if wrong => {
                            let reason = Refusal::Sums;
                            self.give_reason(i, Cause::Refused { reason });
                            Err(Cause::Refused { reason })
                        }
                        Some(&i) => {
                            self.seen[i].verified = true;
                            Ok(())
                        }
                        None => Ok(()),
                    };
                    self.ledgers[o].verified(self.now, id, verdict);
                }
            }
            self.outputs(o)?;
        }
        Ok(())
    }

    pub(super) fn time_passes(&mut self) -> Step {
        let next = self
            .ledgers
            .iter()
            .filter_map(Transfers::next_timeout)
            .min()
            .unwrap_or(Time::MAX);
        let mut to = self.now + Duration::from_nanos(self.rng.below(8_000));
        if self.calm && self.rng.permille(50) && next != Time::MAX {
            to = to.max(next);
        }
        // A clock that jumps past a timeout rings there first.
        if self.bug != Bug::DeafClock {
            to = to.min(next);
        }
        self.now = self.now.max(to);
        if self.bug != Bug::DeafClock {
            for o in 0..self.ledgers.len() {
                for i in 0..self.seen.len() {
                    if self.seen[i].owner == o && self.seen[i].deadline <= self.now {
                        self.give_reason(i, Cause::DeadlinePassed);
                    }
                }
                self.ledgers[o].on_time(self.now);
                self.outputs(o)?;
            }
        }
        for s in &self.seen {
            ensure!(
                s.ended.is_some() || s.deadline > self.now,
                "{}: no outcome by its deadline",
                s.name()
            );
        }
        Ok(())
    }

    fn reads_lease(&mut self, id: TransferId, job: Option<JobId>) {
        let w = self.rng.index(self.workers.len().min(1));
        self.workers[w].leases.push_back(self.checks.len());
        self.checks.push((id, job));
    }

    /// Whether a device holds work of a transfer.
    pub(super) fn posted(&self, id: TransferId) -> bool {
        let of = |wr: &Wr| wr.data.as_ref().is_some_and(|d| d.job.transfer == id);
        self.nics
            .iter()
            .any(|n| !n.destroyed && n.queue.iter().any(of))
    }

    pub(super) fn outputs(&mut self, o: usize) -> Step {
        while let Some(output) = self.ledgers[o].poll_output() {
            match output {
                Output::StartJob(job) => {
                    if let Some(&i) = self.index.get(&job.transfer)
                        && let Some(slot) = self.seen[i]
                            .jobs
                            .iter_mut()
                            .find(|(j, _)| *j == JobId(u64::MAX))
                    {
                        slot.0 = job.id;
                    }
                    for worker in &mut self.workers {
                        worker.inbox.push_back(ToWorker::Start(Arc::clone(&job)));
                    }
                }
                Output::StopJob { job, .. } => {
                    for worker in &mut self.workers {
                        worker.inbox.push_back(ToWorker::Stop(job));
                    }
                }
                Output::Verify { id, .. } => {
                    let seen = &self.seen[self.index[&id]];
                    ensure!(seen.verify, "{}: checksums unasked", seen.name());
                    ensure!(
                        seen.all_bytes_there(),
                        "{}: checksums before all data",
                        seen.name()
                    );
                    self.owner_inbox[o].push_back(ToOwner::Verified { id });
                }
                Output::CheckLease { id, .. } => self.reads_lease(id, None),
                Output::CheckJob { id, job, .. } => {
                    let seen = &self.seen[self.index[&id]];
                    ensure!(seen.gets, "{}: lease of a job", seen.name());
                    ensure!(
                        seen.job_is_there(job),
                        "{}: lease before the data",
                        seen.name()
                    );
                    self.reads_lease(id, Some(job));
                }
                Output::SendNotice { id, notice, .. } => {
                    let posted = self.posted(id);
                    let i = self.index[&id];
                    let lost = self.peers[self.seen[i].peer].lost;
                    self.seen[i].on_notice(&notice, lost, posted)?;
                }
                Output::ResetLanes { id, jobs, .. } => {
                    self.sum.reset += 1;
                    if !self.rebuilt {
                        self.ledgers[o].lanes_stay(id);
                        continue;
                    }
                    for worker in &mut self.workers {
                        worker.inbox.push_back(ToWorker::Reset(Arc::clone(&jobs)));
                    }
                }
                Output::ForceDrain { peer: key, token } => {
                    self.sum.forced += 1;
                    let peer = self
                        .peers
                        .iter()
                        .position(|p| p.key == key)
                        .ok_or("a drain of nobody")?;
                    for worker in &mut self.workers {
                        worker.inbox.push_back(ToWorker::Drain {
                            owner: o,
                            peer,
                            key,
                            token,
                        });
                    }
                }
                Output::Outcome { id, outcome } => {
                    let posted = self.posted(id);
                    let (now, disturbed) = (self.now, self.disturbed);
                    let i = self.index[&id];
                    self.seen[i].on_outcome(now, &outcome, posted, disturbed)?;
                    if self.bug == Bug::OutcomeTwice {
                        self.seen[i].on_outcome(now, &outcome, posted, disturbed)?;
                    }
                    match &self.seen[i].ended {
                        Some(Ended::Done) => {
                            self.sum.done += 1;
                            self.sum.got += u64::from(self.seen[i].gets);
                        }
                        Some(Ended::Cancelled) => self.sum.cancelled += 1,
                        _ => self.sum.failed += 1,
                    }
                    self.sum.quarantined += u64::from(!self.seen[i].free);
                    ensure!(
                        !self.faults.quiet() || self.seen[i].ended == Some(Ended::Done),
                        "{} did not end well though nothing went wrong",
                        self.seen[i].name()
                    );
                }
                Output::Released { id } => {
                    if self.bug == Bug::ReleaseLost {
                        continue;
                    }
                    let posted = self.posted(id);
                    let i = self.index[&id];
                    self.seen[i].on_released(posted)?;
                    if self.bug == Bug::ReleasedTwice {
                        self.seen[i].on_released(posted)?;
                    }
                }
            }
        }
        Ok(())
    }
}
