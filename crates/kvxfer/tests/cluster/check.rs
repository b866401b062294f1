//! What the world knows of each transfer, offer and expectation, and what must hold of them.

use kvxfer::ids::{Generation, RequestId};
use kvxfer::time::Time;
use kvxfer::transfer::{Cause, MemoryState, Notice, Outcome, PeerKey, TransferId};

use super::bug::{Step, ensure};
use super::qp::QpState;
use super::world::{World, log};

/// How a transfer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ended {
    Done,
    Failed(Cause),
    Cancelled,
}

/// One transfer as the world sees it.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) life: usize,
    pub(crate) owner: usize,
    pub(crate) peer: usize,
    pub(crate) push: bool,
    pub(crate) request: RequestId,
    /// 0 of a push that has no ticket.
    pub(crate) nonce: u64,
    /// The life that a pull's ticket is of.
    pub(crate) generation: Generation,
    pub(crate) deadline: Time,
    /// This side's blocks.
    pub(crate) blocks: Vec<u32>,
    /// What is to stand in the destination's cells.
    pub(crate) wants: Vec<(u32, u64)>,
    pub(crate) planned: u128,
    pub(crate) arrived: u128,
    pub(crate) hold: bool,
    pub(crate) committed: bool,
    pub(crate) reason: Option<Cause>,
    /// Whether writes of it are in doubt that nobody will settle: then it may end for that.
    pub(crate) may_reset: bool,
    /// The loop of its worker in which the reason came.
    reason_loop: u64,
    pub(crate) ended: Option<Ended>,
    pub(crate) told: u32,
    pub(crate) told_done: bool,
    pub(crate) free: bool,
}

impl Seen {
    #[expect(clippy::too_many_arguments, reason = "what a call says, one by one")]
    pub(crate) fn new(
        life: usize,
        owner: usize,
        peer: usize,
        push: bool,
        request: RequestId,
        nonce: u64,
        generation: Generation,
        deadline: Time,
        blocks: Vec<u32>,
    ) -> Self {
        Self {
            life,
            owner,
            peer,
            push,
            request,
            nonce,
            generation,
            deadline,
            blocks,
            wants: Vec::new(),
            planned: 0,
            arrived: 0,
            hold: false,
            committed: false,
            reason: None,
            may_reset: false,
            reason_loop: 0,
            ended: None,
            told: 0,
            told_done: false,
            free: false,
        }
    }

    fn may_end_for(&self, cause: &Cause) -> bool {
        self.may_reset && *cause == Cause::LaneReset
    }

    pub(crate) fn name(&self) -> String {
        let what = if self.push { "push" } else { "pull" };
        format!("the {what} of {} by life {}", self.request, self.life)
    }
}

/// One expectation.
#[derive(Debug)]
pub(crate) struct ExpectSeen {
    pub(crate) name: String,
    pub(crate) request: RequestId,
    pub(crate) deadline: Time,
    pub(crate) blocks: Vec<u32>,
    pub(crate) senders: u32,
    /// Who is bound, and may still write.
    writers: Vec<(PeerKey, bool)>,
    pub(crate) reason: Option<Cause>,
    pub(crate) ended: bool,
    pub(crate) free: bool,
}

impl ExpectSeen {
    pub(crate) fn new(
        name: String,
        request: RequestId,
        deadline: Time,
        blocks: Vec<u32>,
        senders: u32,
    ) -> Self {
        Self {
            name,
            request,
            deadline,
            blocks,
            senders,
            writers: Vec::new(),
            reason: None,
            ended: false,
            free: false,
        }
    }

    pub(crate) fn bind(&mut self, key: PeerKey) {
        if !self.writers.iter().any(|(k, _)| *k == key) {
            self.writers.push((key, true));
        }
    }

    /// Whether the peer could write until now.
    pub(crate) fn close(&mut self, key: PeerKey) -> bool {
        let writer = self.writers.iter_mut().find(|(k, _)| *k == key);
        writer.is_some_and(|(_, open)| std::mem::replace(open, false))
    }
}

pub(crate) fn cause_name(cause: &Cause) -> &'static str {
    match cause {
        Cause::Completion { .. } => "cause: completion",
        Cause::Post { .. } => "cause: post",
        Cause::LaneFailed => "cause: lane failed",
        Cause::QueuePair { .. } => "cause: queue pair event",
        Cause::LaneReset => "cause: lane reset",
        Cause::PeerDead => "cause: peer dead",
        Cause::PeerStalled { .. } => "cause: peer stalled",
        Cause::PeerRestarted => "cause: peer restarted",
        Cause::PeerUnreachable => "cause: peer unreachable",
        Cause::PeerClosed => "cause: peer closed",
        Cause::DeadlinePassed => "cause: deadline passed",
        Cause::Cancelled => "cause: cancelled",
        Cause::LeaseExpired => "cause: lease expired",
        Cause::Aborted => "cause: aborted",
        Cause::Revoked => "cause: revoked",
        Cause::Refused { .. } => "cause: refused",
        Cause::ShuttingDown => "cause: shutting down",
        _ => "cause: another",
    }
}

impl World {
    // ---- reasons -----------------------------------------------------------------------------

    /// A ledger is about to hear of a reason to stop: the first one stands.
    pub(crate) fn give_reason(&mut self, id: TransferId, cause: &Cause) {
        let seen = &mut self.seen[id.0 as usize];
        if seen.ended.is_none() && seen.reason.is_none() {
            seen.reason = Some(cause.clone());
            seen.reason_loop = self.lives[seen.life].workers[seen.owner].loops;
            log!(
                self,
                "{} is to stop: {cause}",
                self.seen[id.0 as usize].name()
            );
        }
    }

    /// A call to the ledger looks at the clock first.
    pub(crate) fn reason_if_late(&mut self, life: usize, w: usize) {
        let now = self.clock(life);
        let ids: Vec<TransferId> = self.lives[life].workers[w].live.keys().copied().collect();
        for id in ids {
            if self.seen[id.0 as usize].deadline <= now {
                self.give_reason(id, &Cause::DeadlinePassed);
            }
        }
    }

    pub(crate) fn reason_of_peer(&mut self, life: usize, w: usize, key: PeerKey, cause: &Cause) {
        let ids: Vec<TransferId> = self.lives[life].workers[w].live.keys().copied().collect();
        for id in ids {
            if self.peers[self.seen[id.0 as usize].peer].key == key {
                self.give_reason(id, cause);
            }
        }
    }

    /// A lost peer was to write: its expectations fail.
    pub(crate) fn reason_of_writer(&mut self, life: usize, key: PeerKey, cause: &Cause) {
        for expected in self.lives[life].expected.values_mut() {
            if !expected.ended && expected.writers.contains(&(key, true)) {
                expected.reason.get_or_insert(cause.clone());
            }
        }
    }

    // ---- transfers ---------------------------------------------------------------------------

    pub(crate) fn check_notice(&mut self, life: usize, id: TransferId, notice: &Notice) -> Step {
        let tid = id.0 as usize;
        let posted = self.posted(life, tid);
        let seen = &mut self.seen[tid];
        let name = seen.name();
        ensure!(seen.told == 0, Notice, "{name} is told twice: {notice:?}");
        seen.told += 1;
        let all = seen.planned & !seen.arrived == 0;
        match notice {
            Notice::Release => {
                ensure!(!seen.push && !seen.hold, Notice, "{name} releases");
                ensure!(
                    all && !posted,
                    Notice,
                    "{name} releases before its data is here"
                );
            }
            Notice::PushDone { .. } => {
                ensure!(
                    seen.push && seen.committed,
                    Notice,
                    "{name} is told as done before it was committed"
                );
                ensure!(
                    all && !posted,
                    Notice,
                    "{name} is told as done before its data is there"
                );
                seen.told_done = true;
            }
            Notice::PushAborted { cause } => {
                ensure!(
                    !posted,
                    Notice,
                    "{name} says that it has closed, and is posted"
                );
                ensure!(
                    Some(cause) == seen.reason.as_ref() || seen.may_end_for(cause),
                    FirstCause,
                    "{name} is told as aborted for {cause}, first was {:?}",
                    seen.reason
                );
            }
        }
        Ok(())
    }

    pub(crate) fn on_outcome(&mut self, life: usize, id: TransferId, outcome: &Outcome) -> Step {
        let tid = id.0 as usize;
        let name = self.seen[tid].name();
        log!(self, "{name} ends: {outcome:?}");
        let seen = &self.seen[tid];
        ensure!(
            seen.ended.is_none(),
            EndsOnce,
            "{name} ends twice: {:?}, then {outcome:?}",
            seen.ended
        );
        let reason = seen.reason.clone();
        let ended = match outcome {
            Outcome::Done { .. } => {
                // What came after the last report, and before this loop told of it, was too late.
                let this_loop = seen.reason_loop == self.lives[life].workers[seen.owner].loops;
                ensure!(
                    reason.is_none() || this_loop,
                    FirstCause,
                    "{name} is done after {reason:?}"
                );
                ensure!(
                    !seen.push || seen.committed,
                    Notice,
                    "{name} is done before it was committed"
                );
                let tells = seen.push || !seen.hold;
                ensure!(
                    seen.told == u32::from(tells),
                    Notice,
                    "{name} is done and the other side was told {} times",
                    seen.told
                );
                ensure!(
                    seen.planned & !seen.arrived == 0,
                    Bytes,
                    "{name} is done and not all has arrived"
                );
                if !seen.push {
                    let memory = &self.lives[life].memory;
                    for (cell, value) in &seen.wants {
                        let got = memory.cells[*cell as usize];
                        ensure!(
                            got == *value,
                            Bytes,
                            "{name} is done, and cell {cell} has {got} instead of {value}"
                        );
                    }
                }
                self.sum.count(if seen.push {
                    "push: sent"
                } else {
                    "pull: received"
                });
                Ended::Done
            }
            Outcome::Failed {
                cause, incomplete, ..
            } => {
                ensure!(!cause.is_flush(), FirstCause, "{name} fails with an echo");
                ensure!(
                    Some(cause) == reason.as_ref() || seen.may_end_for(cause),
                    FirstCause,
                    "{name} fails with {cause}, first was {reason:?}"
                );
                let named = incomplete.blocks();
                let memory = &self.lives[life].memory;
                for (cell, value) in seen.wants.iter().filter(|_| !seen.push) {
                    let block = cell / super::memory::BLOCK_CELLS;
                    ensure!(
                        memory.cells[*cell as usize] == *value || named.contains(&(0, block)),
                        Bytes,
                        "{name} fails, and does not name block {block}"
                    );
                }
                self.sum.count(if seen.push {
                    "push: failed"
                } else {
                    "pull: failed"
                });
                self.sum.count(cause_name(cause));
                Ended::Failed(cause.clone())
            }
            Outcome::Cancelled { .. } => {
                ensure!(
                    matches!(reason, Some(Cause::Cancelled | Cause::Aborted)),
                    FirstCause,
                    "{name} is cancelled, first was {reason:?}"
                );
                self.sum.count(if seen.push {
                    "push: given up"
                } else {
                    "pull: given up"
                });
                Ended::Cancelled
            }
        };
        ensure!(
            !self.faults.quiet() || ended == Ended::Done,
            Converges,
            "{name} ends with {outcome:?} though nothing went wrong"
        );
        self.seen[tid].ended = Some(ended);
        if outcome.memory() == MemoryState::Released {
            self.memory_back(life, tid)?;
        } else {
            self.sum.count("memory: quarantined");
        }
        self.app_hears(life, id);
        Ok(())
    }

    pub(crate) fn on_released(&mut self, life: usize, id: TransferId) -> Step {
        let tid = id.0 as usize;
        let name = self.seen[tid].name();
        log!(self, "{name}: memory released");
        ensure!(
            self.seen[tid].ended.is_some(),
            EndsOnce,
            "{name}: memory is released before the outcome"
        );
        ensure!(
            !self.seen[tid].free,
            EndsOnce,
            "{name}: memory is released twice"
        );
        self.sum.count("memory: released later");
        self.memory_back(life, tid)
    }

    fn memory_back(&mut self, life: usize, tid: usize) -> Step {
        ensure!(
            !self.posted(life, tid),
            Memory,
            "{}: memory is released while its operations are posted",
            self.seen[tid].name()
        );
        self.seen[tid].free = true;
        let life = &mut self.lives[life];
        life.open.remove(&(tid as u64));
        life.memory.free(&self.seen[tid].blocks, &mut self.fresh);
        Ok(())
    }

    // ---- the end -----------------------------------------------------------------------------

    /// Whether nothing is left to happen.
    pub(crate) fn is_over(&self) -> bool {
        self.todo.is_empty()
            && self.lives.iter().filter(|l| l.alive).all(|life| {
                life.open.is_empty()
                    && life.expected.values().all(|e| e.free)
                    && life.offers.values().all(|o| o.released)
                    && life.workers.iter().all(|w| w.is_idle())
            })
            && self.qps.iter().all(|qp| qp.used == 0 || !qp.works())
            && self.sessions_stand()
    }

    pub(crate) fn what_is_left(&self) -> String {
        let mut left = Vec::new();
        for life in self.lives.iter().filter(|l| l.alive) {
            for tid in &life.open {
                let seen = &self.seen[*tid as usize];
                left.push(format!("{} ({:?})", seen.name(), seen.ended));
            }
            let expected = life.expected.values().filter(|e| !e.free);
            left.extend(expected.map(|e| e.name.clone()));
            let offers = life.offers.values().filter(|o| !o.released);
            left.extend(offers.map(|o| o.name.clone()));
            for (w, worker) in life.workers.iter().enumerate() {
                if !worker.is_idle() {
                    left.push(format!(
                        "worker {w} of engine {}: {}",
                        life.slot,
                        worker.what()
                    ));
                }
            }
        }
        if !self.sessions_stand() {
            left.push(self.sessions_left());
        }
        left.push(format!("{} things to do", self.todo.len()));
        let clocks: Vec<(u64, u64)> = self.lives.iter().map(|l| (l.clock.0, l.rate)).collect();
        let qps = self.qps.iter().filter(|q| q.works() && q.used > 0).count();
        left.push(format!(
            "{qps} busy queue pairs, {} us, clocks {clocks:?}",
            self.now / 1000
        ));
        left.join("; ")
    }

    pub(crate) fn last_checks(&mut self) -> Step {
        for (i, life) in self.lives.iter().enumerate().filter(|(_, l)| l.alive) {
            for worker in &life.workers {
                for (lane, q) in &worker.lanes {
                    let (has, all) = (worker.scheduler.lane_credits(*lane), self.qps[*q].send_wr);
                    let works = self.qps[*q].state == QpState::Works;
                    ensure!(
                        !works || has == all,
                        Credits,
                        "{lane} of life {i} ends with {has} credits of {all}"
                    );
                }
                let stats = worker.scheduler.stats();
                self.sum.add("operations posted again", stats.replayed);
                self.sum.add("echoes", stats.echoes);
                self.sum.add("stale completions", stats.stale);
            }
            let left = [
                ("offers", life.leases.len()),
                (
                    "expectations",
                    life.expects.standing() + life.expects.draining(),
                ),
                ("tickets", life.tickets.len()),
                ("askers", life.wanted.len()),
                (
                    "lease checks",
                    life.landings.len() - life.free_landings.len(),
                ),
                ("draining peers", life.draining.len()),
            ];
            for (what, n) in left {
                ensure!(n == 0, Converges, "life {i} is left with {n} {what}");
            }
            let owners = &life.memory.owners;
            let held = owners.iter().find(|o| **o != super::memory::Owner::Free);
            ensure!(
                held.is_none(),
                EndsOnce,
                "life {i} is left with a block of {held:?}"
            );
        }
        Ok(())
    }
}
