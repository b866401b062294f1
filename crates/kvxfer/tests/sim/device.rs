//! What the devices do, and how they fail.

use kvxfer::transfer::{Cause, CompletionStatus};

use super::check::ensure;
use super::net::{Cqe, Data, NicState, flush};
use super::world::{Bug, Step, ToWorker, World};

impl World {
    pub(super) fn lane_trouble(&mut self) -> Step {
        if self.rng.permille(self.faults.peer_lost * 10) {
            let alive: Vec<usize> = (0..self.peers.len())
                .filter(|p| !self.peers[*p].lost)
                .collect();
            if !alive.is_empty() {
                let p = alive[self.rng.index(alive.len())];
                return self.lose_peer(p);
            }
        }
        let live: Vec<usize> = (0..self.nics.len())
            .filter(|n| self.nics[*n].state == NicState::Works && !self.nics[*n].destroyed)
            .collect();
        if live.is_empty() {
            return Ok(());
        }
        let n = live[self.rng.index(live.len())];
        if self.rng.permille(self.faults.stuck * 40) {
            self.disturbed = true;
            self.nics[n].state = NicState::Stuck;
        } else if self.rng.permille(self.faults.async_error * 40) {
            // The device says nothing but flushes, or an event names the lane first.
            let told = self.rng.permille(500);
            self.disturbed = true;
            self.nics[n].state = NicState::Error;
            if told {
                let (worker, lane) = (self.nics[n].worker, self.nics[n].lane);
                self.workers[worker]
                    .scheduler
                    .lane_failed(lane, Cause::PeerUnreachable);
            }
        }
        Ok(())
    }

    pub(super) fn lose_peer(&mut self, p: usize) -> Step {
        self.disturbed = true;
        self.peers[p].lost = true;
        let key = self.peers[p].key;
        for i in 0..self.seen.len() {
            if self.seen[i].peer == p {
                self.give_reason(i, Cause::PeerRestarted);
            }
        }
        for owner in 0..self.ledgers.len() {
            self.ledgers[owner].peer_lost(self.now, key, &Cause::PeerRestarted);
            self.outputs(owner)?;
        }
        for worker in &mut self.workers {
            worker.inbox.push_back(ToWorker::PeerGone { peer: p });
        }
        Ok(())
    }

    pub(super) fn break_nic(&mut self, n: usize, ours: bool) {
        let nic = &mut self.nics[n];
        if nic.destroyed {
            return;
        }
        self.disturbed = true;
        nic.state = NicState::Error;
        if ours {
            self.workers[nic.worker]
                .scheduler
                .lane_failed(nic.lane, Cause::LaneReset);
        }
    }

    pub(super) fn destroy(&mut self, n: usize) {
        let nic = &mut self.nics[n];
        nic.late.clear();
        if nic.destroyed && !std::mem::take(&mut nic.waits) {
            return;
        }
        self.disturbed = true;
        nic.destroyed = true;
        nic.queue.clear();
        self.workers[nic.worker].scheduler.remove_lane(nic.lane);
    }

    /// Destroys this side's half: what is on its way to the peer may be carried out yet.
    pub(super) fn retire(&mut self, n: usize) {
        let nic = &mut self.nics[n];
        self.disturbed = true;
        nic.destroyed = true;
        nic.waits = true;
        let scheduler = &mut self.workers[nic.worker].scheduler;
        let write = |wr: super::net::Wr| wr.data.filter(|data| data.push);
        if !nic.refused {
            nic.late.extend(nic.queue.drain(..).filter_map(write));
        }
        nic.queue.clear();
        scheduler.lane_failed(nic.lane, Cause::LaneReset);
        scheduler.lane_flushed(nic.lane);
        if self.bug == Bug::SettlesTooSoon {
            scheduler.lane_settled(nic.lane);
        }
    }

    /// The peer has taken its half down.
    pub(super) fn settle(&mut self, n: usize) {
        let nic = &mut self.nics[n];
        let (worker, lane) = (nic.worker, nic.lane);
        self.workers[worker].scheduler.lane_settled(lane);
        self.destroy(n);
    }

    /// Something that was flushed is carried out after all.
    pub(super) fn lands_late(&mut self, n: usize) -> Step {
        if self.nics[n].late.is_empty() {
            return Ok(());
        }
        let at = self.rng.index(self.nics[n].late.len());
        let data = self.nics[n].late.swap_remove(at);
        self.sum.late += 1;
        self.execute(&data, false)
    }

    pub(super) fn nic_serves(&mut self, n: usize) -> Step {
        let nic = &mut self.nics[n];
        if nic.destroyed || nic.state == NicState::Stuck {
            return Ok(());
        }
        let Some(wr) = nic.queue.pop_front() else {
            return Ok(());
        };
        nic.served += 1;
        let (worker, covers, errored) = (nic.worker, nic.served, nic.state == NicState::Error);
        let fails = !errored && !self.calm && self.rng.permille(self.faults.error);
        // Work that fails or is flushed may have been done all the same, in part or whole.
        let touches = !(errored || fails) || self.rng.permille(300);
        let path = fails && self.rails > 1 && self.rng.permille(500);
        if let (true, Some(data)) = (touches, &wr.data) {
            self.execute(data, !(errored || fails))?;
        }
        self.nics[n].refused |= fails && !path;
        if let Some(data) = wr.data.as_ref().filter(|data| data.push)
            && self.retires()
            && (errored || fails)
            && !self.nics[n].refused
        {
            self.nics[n].late.push(data.clone());
        }
        let (result, named) = if errored && self.nics[n].named && self.rng.permille(100) {
            // Some devices fail more than one before they flush: echoes all the same.
            let status = CompletionStatus::ResponseTimeout;
            (Err(Cause::Completion { status, vendor: 2 }), None)
        } else if errored {
            (Err(flush()), None)
        } else if fails {
            self.disturbed = true;
            self.nics[n].state = NicState::Error;
            self.nics[n].named = true;
            self.next_vendor += 1;
            let status = if path {
                CompletionStatus::RetryExceeded
            } else {
                CompletionStatus::RemoteAccess
            };
            let cause = Cause::Completion {
                status,
                vendor: self.next_vendor,
            };
            (Err(cause), wr.data.clone())
        } else if wr.signaled {
            (Ok(()), None)
        } else {
            return Ok(());
        };
        if self.bug == Bug::LosesSuccess && result.is_ok() && self.rng.permille(300) {
            return Ok(());
        }
        let cqe = Cqe {
            nic: n,
            wr_id: wr.wr_id,
            covers,
            result,
            named,
        };
        if self.rng.permille(20) {
            // A completion that is seen twice does no harm.
            self.workers[worker].cq.push_back(cqe.clone());
        }
        self.workers[worker].cq.push_back(cqe);
        Ok(())
    }

    /// Moves the bytes of one operation.
    pub(super) fn execute(&mut self, data: &Data, well: bool) -> Step {
        let i = self.index.get(&data.job.transfer).copied();
        let Some(s) = i.map(|i| &mut self.seen[i]) else {
            return Err(format!("work of unknown transfer {}", data.job.transfer.0));
        };
        ensure!(
            !s.free,
            "{}: operation {} touches memory that was released",
            s.name(),
            data.op
        );
        let mut remote = data.remote as usize;
        for piece in &data.pieces {
            let (at, len) = (piece.offset as usize, piece.len as usize);
            let (from, to) = if s.push { (at, remote) } else { (remote, at) };
            let wrong = u8::from(self.bug == Bug::WrongBytes);
            for i in 0..len {
                s.dst[to + i] = s.src[from + i] ^ wrong;
            }
            remote += len;
        }
        if well {
            *s.executed.entry((data.job.id, data.op)).or_default() += 1;
            self.sum.executed += 1;
        }
        Ok(())
    }
}
