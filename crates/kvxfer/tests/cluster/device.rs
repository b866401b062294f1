//! Queue pairs and the network between them.
//!
//! A work request is sent, carried out by the other side's half, and confirmed; what has been sent
//! travels on when its sender's queue pair has failed and flushed, until the receiving half is
//! stopped. That is what a flush does not prove, and why a block is free only when its writer's
//! operations are confirmed or the receiving half is down.

use kvxfer::transfer::{CompletionStatus, Job, PeerKey};
use kvxfer::wire::PathKind;

use super::bug::{Bug, Step, Violation, ensure};
use super::cards::InCard;
use super::memory::Owner;
use super::qp::{
    Answer, Cqe, CqeKind, LATE, LOCAL, Loss, NO_PROGRESS, PEER_GONE, Packet, Payload, Qp, QpState,
    REFUSALS, WINDOW, What, Wr, status_name,
};
use super::world::{Acted, World, log};

fn same_host(path: PathKind) -> bool {
    matches!(path, PathKind::Arena | PathKind::ProcessVm)
}

impl World {
    pub(crate) fn new_qp(
        &mut self,
        life: usize,
        worker: usize,
        key: PeerKey,
        path: PathKind,
        rail: usize,
    ) -> usize {
        let mut qp = Qp::new(life, worker, key, path, rail);
        qp.send_wr = 1 + self.rng.below(12) as u32;
        qp.patience = if self.faults.quiet() || !self.calm && self.rng.permille(200) {
            None
        } else {
            Some(200_000 + self.rng.below(12_000_000))
        };
        self.qps.push(qp);
        let q = self.qps.len() - 1;
        self.actors.push(super::world::Actor::Qp(q));
        q
    }

    /// Posts one work request.
    pub(crate) fn qp_post(&mut self, q: usize, wr: Wr) -> Step {
        let now = self.now;
        let qp = &mut self.qps[q];
        ensure!(
            qp.state != QpState::Destroyed,
            Memory,
            "posted on a destroyed queue pair"
        );
        ensure!(
            qp.used < qp.send_wr,
            Credits,
            "send queue of queue pair {q} overrun: it has {} entries",
            qp.send_wr
        );
        qp.used += 1;
        if qp.sent == qp.head {
            qp.waits_since = now;
        }
        qp.sq.push_back(wr);
        if !qp.works() {
            self.qp_flush(q, None)?;
        }
        Ok(())
    }

    pub(crate) fn qp_acts(&mut self, q: usize) -> Result<Acted, Violation> {
        let qp = &self.qps[q];
        if !qp.works() && qp.flow.is_empty() {
            return Ok(if qp.state == QpState::Destroyed {
                Acted::Gone
            } else {
                Acted::No
            });
        }
        if qp.sq.is_empty() && qp.flow.is_empty() && qp.answers.is_empty() {
            return Ok(Acted::No);
        }
        let first = self.rng.index(3);
        for i in 0..3 {
            let did = match (first + i) % 3 {
                0 => self.qp_sends(q)?,
                1 => self.qp_serves(q)?,
                _ => self.qp_hears(q)?,
            };
            if did {
                return Ok(Acted::Yes);
            }
        }
        Ok(Acted::No)
    }

    /// Whether the asking half of `q` moves.
    fn asks(&self, q: usize) -> bool {
        let qp = &self.qps[q];
        let life = &self.lives[qp.life];
        qp.works() && life.alive && (!life.stopped || qp.path == PathKind::Rdma)
    }

    /// Whether something gets from one side to the other.
    fn passes(&self, q: usize) -> bool {
        let qp = &self.qps[q];
        let Some(remote) = qp.remote.map(|r| &self.qps[r]) else {
            return false;
        };
        same_host(qp.path)
            || self.lives[qp.life].rails[qp.rail] && self.lives[remote.life].rails[remote.rail]
    }

    /// The asking half sends the next request, or reads itself what is on its own host.
    fn qp_sends(&mut self, q: usize) -> Result<bool, Violation> {
        let qp = &self.qps[q];
        let (Some(r), true) = (qp.remote, self.asks(q)) else {
            return Ok(false);
        };
        let oldest = qp.sent == qp.head;
        if oldest && !qp.sq.is_empty() && qp.gives_up_at().is_some_and(|at| at <= self.now) {
            return Ok(false);
        }
        let Some(wr) = qp.sq.get((qp.sent - qp.head) as usize) else {
            return Ok(false);
        };
        let what = wr.what.clone();
        let fails = !self.calm && self.rng.permille(self.faults.completion);
        if fails && oldest && self.rng.permille(500) {
            let status = LOCAL[self.rng.index(LOCAL.len())];
            self.qp_fails(q, status, 0x100)?;
            return Ok(true);
        }
        let reads = matches!(what, What::Read { .. } | What::Slot { .. });
        let there = self.qps[r].life;
        if same_host(self.qps[q].path) && reads {
            if !oldest {
                return Ok(false);
            }
            if self.qps[q].path == PathKind::ProcessVm && !self.lives[there].alive {
                self.qp_fails(q, CompletionStatus::RetryExceeded, PEER_GONE)?;
                return Ok(true);
            }
            match what {
                What::Slot { slot, landing } => {
                    let word = self.lives[there].table[slot as usize];
                    let here = self.qps[q].life;
                    self.lives[here].landings[landing as usize] = word;
                }
                What::Read {
                    ref job,
                    remote,
                    len,
                    ..
                } => {
                    self.check_generation(job, there)?;
                    let payload = self.lives[there].memory.read(remote, len);
                    self.land_read(q, &what, payload)?;
                }
                _ => {}
            }
            self.qps[q].sent += 1;
            self.qp_retires(q, 1);
            return Ok(true);
        }
        // A stream that has ended says so; a card's silence does not.
        let gone = !self.qps[r].serving || !self.lives[there].alive;
        if gone && self.qps[q].path != PathKind::Rdma && self.qps[q].answers.is_empty() {
            if !oldest {
                return Ok(false);
            }
            self.qp_fails(q, CompletionStatus::RetryExceeded, PEER_GONE)?;
            return Ok(true);
        }
        let qp = &self.qps[q];
        if qp.sent - qp.head >= WINDOW {
            return Ok(false);
        }
        let payload = match &what {
            What::Write { local, len, .. } if !same_host(qp.path) => {
                Some(self.lives[qp.life].memory.read(*local, *len))
            }
            _ => None,
        };
        let now = self.now;
        let qp = &mut self.qps[q];
        if oldest {
            qp.waits_since = now;
        }
        let seq = qp.sent;
        qp.sent += 1;
        qp.flow.push_back(Packet { seq, what, payload });
        Ok(true)
    }

    /// The other side's serving half carries out the oldest request on its way.
    fn qp_serves(&mut self, q: usize) -> Result<bool, Violation> {
        let qp = &self.qps[q];
        let (Some(r), false) = (qp.remote, qp.flow.is_empty()) else {
            return Ok(false);
        };
        let remote = &self.qps[r];
        let there = remote.life;
        if !remote.serving || !self.lives[there].alive {
            self.qps[q].flow.clear();
            return Ok(true);
        }
        if remote.waits {
            return Ok(false);
        }
        let moves = self.qps[q].path == PathKind::Rdma || !self.lives[there].stopped;
        if qp.loss == Loss::Requests || !moves || !self.passes(q) {
            return Ok(false);
        }
        let here = qp.life;
        let Some(Packet { seq, what, payload }) = self.qps[q].flow.pop_front() else {
            return Ok(false);
        };
        if !self.calm && self.rng.permille(self.faults.completion) {
            let status = REFUSALS[self.rng.index(REFUSALS.len())];
            log!(self, "queue pair {q}: request {seq} is refused: {status}");
            self.qps[r].serving = false;
            self.qps[q].flow.clear();
            self.answer(q, Answer::Refused { seq, status });
            return Ok(true);
        }
        match what {
            What::Write {
                ref job,
                remote,
                local,
                len,
                nonce,
                ..
            } => {
                // From a mapping, a dead peer's memory can still be read.
                let mut payload =
                    payload.unwrap_or_else(|| self.lives[here].memory.read(local, len));
                if self.bug == Bug::WrongBytes && self.rng.permille(20) {
                    payload[0] ^= 1;
                }
                let tid = job.transfer.0 as usize;
                self.card_takes(InCard {
                    qp: r,
                    tid,
                    cell: remote,
                    len,
                    payload,
                    nonce,
                })?;
                self.seen[tid].arrived |= mask(remote, len);
                self.sum.count("operations written");
                self.answer(q, Answer::Done { seq, payload });
            }
            What::Read {
                job, remote, len, ..
            } => {
                self.check_generation(&job, there)?;
                let payload = self.lives[there].memory.read(remote, len);
                self.answer(q, Answer::Done { seq, payload });
            }
            What::Slot { slot, .. } => {
                let word = self.lives[there].table[slot as usize];
                self.answer(q, Answer::Slot { seq, word });
            }
            What::Send(message) => {
                self.card_receives(r)?;
                let w = self.qps[r].worker;
                let worker = &mut self.lives[there].workers[w];
                worker.cq.push_back(Cqe {
                    qp: r,
                    kind: CqeKind::Received(message),
                });
                worker.awake = true;
                self.answer(
                    q,
                    Answer::Done {
                        seq,
                        payload: Payload::default(),
                    },
                );
            }
        }
        Ok(true)
    }

    fn answer(&mut self, q: usize, answer: Answer) {
        let qp = &mut self.qps[q];
        if qp.works() && qp.loss != Loss::Answers {
            qp.answers.push_back(answer);
        }
    }

    /// The asking half hears an answer, or gives up.
    fn qp_hears(&mut self, q: usize) -> Result<bool, Violation> {
        if !self.asks(q) {
            return Ok(false);
        }
        if self.qps[q].gives_up_at().is_some_and(|at| at <= self.now) {
            log!(self, "queue pair {q} gives up");
            // Some of what was sent is lost for good, the rest comes late.
            if self.rng.permille(400) {
                let keep = self.rng.index(self.qps[q].flow.len() + 1);
                self.qps[q].flow.truncate(keep);
            }
            self.qp_fails(q, CompletionStatus::RetryExceeded, NO_PROGRESS)?;
            return Ok(true);
        }
        let late = !self.calm && self.rng.permille(self.faults.completion / 2);
        if late && self.qps[q].sent > self.qps[q].head {
            let status = LATE[self.rng.index(LATE.len())];
            self.qp_fails(q, status, 0x200)?;
            return Ok(true);
        }
        if !self.passes(q) {
            return Ok(false);
        }
        let Some(answer) = self.qps[q].answers.pop_front() else {
            return Ok(false);
        };
        let (seq, head) = match &answer {
            Answer::Done { seq, .. } | Answer::Slot { seq, .. } | Answer::Refused { seq, .. } => {
                (*seq, self.qps[q].head)
            }
        };
        let at = (seq - head) as usize;
        match answer {
            Answer::Refused { status, .. } => {
                self.qp_retires(q, at);
                self.qp_fails(q, status, 0x300)?;
                return Ok(true);
            }
            Answer::Done { payload, .. } => {
                let what = self.qps[q].sq[at].what.clone();
                if matches!(what, What::Read { .. }) {
                    self.land_read(q, &what, payload)?;
                }
            }
            Answer::Slot { word, .. } => {
                if let What::Slot { landing, .. } = self.qps[q].sq[at].what {
                    let here = self.qps[q].life;
                    self.lives[here].landings[landing as usize] = word;
                }
            }
        }
        self.qp_retires(q, at + 1);
        Ok(true)
    }

    /// A READ reaches the life that its ticket is of, and no other.
    fn check_generation(&self, job: &Job, there: usize) -> Step {
        let seen = &self.seen[job.transfer.0 as usize];
        ensure!(
            seen.generation == self.lives[there].generation,
            Generation,
            "{} reads from life {there} under a ticket of another",
            seen.name()
        );
        Ok(())
    }

    /// The cells of a READ arrive in local memory.
    fn land_read(&mut self, q: usize, what: &What, mut payload: Payload) -> Step {
        let What::Read {
            job, local, len, ..
        } = what
        else {
            return Ok(());
        };
        let here = self.qps[q].life;
        let owner = self.lives[here].memory.owner(*local);
        let tid = job.transfer.0;
        ensure!(
            owner == Owner::Pull(tid),
            Memory,
            "a READ of transfer {tid} lands in cell {local} of life {here}, which belongs to {owner:?}"
        );
        if self.bug == Bug::WrongBytes && self.rng.permille(20) {
            payload[0] ^= 1;
        }
        for i in 0..*len {
            self.lives[here].memory.cells[(local + i) as usize] = payload[i as usize];
        }
        self.seen[tid as usize].arrived |= mask(*local, *len);
        self.sum.count("operations read");
        Ok(())
    }

    /// The oldest `n` end well.
    fn qp_retires(&mut self, q: usize, n: usize) {
        let now = self.now;
        for _ in 0..n {
            let qp = &mut self.qps[q];
            let Some(wr) = qp.sq.pop_front() else { return };
            qp.head += 1;
            qp.waits_since = now;
            qp.silent += 1;
            if wr.signaled {
                let slots = std::mem::take(&mut qp.silent);
                self.complete(q, wr, slots, Ok(()));
            }
        }
    }

    fn complete(
        &mut self,
        q: usize,
        wr: Wr,
        slots: u32,
        result: Result<(), (CompletionStatus, u32)>,
    ) {
        let (life, w) = (self.qps[q].life, self.qps[q].worker);
        if !self.lives[life].alive || self.qps[q].state == QpState::Destroyed {
            return;
        }
        if self.bug == Bug::CompletionLost && result.is_ok() && self.rng.permille(50) {
            return;
        }
        let worker = &mut self.lives[life].workers[w];
        worker.cq.push_back(Cqe {
            qp: q,
            kind: CqeKind::Sent {
                wr_id: wr.wr_id,
                slots,
                result,
                what: wr.what,
            },
        });
        worker.awake = true;
    }

    /// The queue pair fails: its oldest request is named, the others are flushed. Neither half of
    /// this end does anything more.
    pub(crate) fn qp_fails(&mut self, q: usize, status: CompletionStatus, vendor: u32) -> Step {
        log!(
            self,
            "queue pair {q} of life {} fails: {status}",
            self.qps[q].life
        );
        self.sum.count(status_name(status));
        self.qp_flush(q, Some((status, vendor)))
    }

    /// This side, or its device, moves the queue pair to the error state.
    pub(crate) fn qp_flush(&mut self, q: usize, first: Option<(CompletionStatus, u32)>) -> Step {
        let qp = &mut self.qps[q];
        if qp.state == QpState::Works {
            qp.state = QpState::Error;
        }
        qp.serving = false;
        qp.answers.clear();
        let flush = (CompletionStatus::Flush, 0);
        let mut why = first.unwrap_or(flush);
        while let Some(wr) = self.qps[q].sq.pop_front() {
            let qp = &mut self.qps[q];
            qp.head += 1;
            let slots = std::mem::take(&mut qp.silent) + 1;
            let result = Err(std::mem::replace(&mut why, flush));
            self.complete(q, wr, slots, result);
        }
        self.qps[q].sent = self.qps[q].head;
        Ok(())
    }

    /// The queue pair is destroyed; completions that were not polled go with it.
    pub(crate) fn qp_destroys(&mut self, q: usize) -> Step {
        self.qp_flush(q, None)?;
        self.card_lets_go(q)?;
        let (life, w) = (self.qps[q].life, self.qps[q].worker);
        self.qps[q].state = QpState::Destroyed;
        self.lives[life].workers[w].cq.retain(|cqe| cqe.qp != q);
        Ok(())
    }

    // ---- what is under way -------------------------------------------------------------------

    /// Whether a queue pair of this life holds work of a transfer.
    pub(crate) fn posted(&self, life: usize, tid: usize) -> bool {
        let of = |wr: &Wr| {
            wr.what
                .job()
                .is_some_and(|(job, _)| job.transfer.0 as usize == tid)
        };
        self.qps
            .iter()
            .any(|qp| qp.life == life && qp.sq.iter().any(of))
    }

    /// A queue pair on which a WRITE of this try can still land in a life's memory.
    pub(crate) fn can_land(&self, life: usize, nonce: u64) -> Option<usize> {
        let of = |what: &What| matches!(what, What::Write { nonce: n, .. } if *n == nonce);
        let held = self.in_cards.iter().find(|write| write.nonce == nonce);
        if let Some(write) = held.filter(|write| self.qps[write.qp].life == life) {
            return Some(write.qp);
        }
        (0..self.qps.len()).find(|q| {
            let qp = &self.qps[*q];
            let Some(remote) = qp.remote.map(|r| &self.qps[r]) else {
                return false;
            };
            let serves = remote.serving && !remote.waits;
            let served = remote.life == life && serves && self.lives[life].alive;
            let sends = qp.works() && self.lives[qp.life].alive;
            let waits = qp.sq.iter().skip((qp.sent - qp.head) as usize);
            served
                && (qp.flow.iter().any(|p| of(&p.what))
                    || sends && waits.map(|wr| &wr.what).any(of))
        })
    }
}

/// The cells of a run, as bits.
pub(crate) fn mask(cell: u32, len: u32) -> u128 {
    ((1u128 << len) - 1) << cell
}
