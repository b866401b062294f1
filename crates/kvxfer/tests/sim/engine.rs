//! What the engine asks of its ledgers.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use kvxfer::time::Time;
use kvxfer::transfer::{Cause, JobId, Kind, Spec, TransferId};

use super::check::{Seen, ensure};
use super::source::SimSource;
use super::world::{Step, World};

impl World {
    pub(super) fn engine_submits(&mut self) -> Step {
        let alive: Vec<usize> = (0..self.peers.len())
            .filter(|p| !self.peers[*p].lost)
            .collect();
        if alive.is_empty() {
            self.new_peer();
            return Ok(());
        }
        let peer = alive[self.rng.index(alive.len())];
        let owner = self.rng.index(self.ledgers.len());
        let id = TransferId(self.seen.len() as u64);
        let push = self.rng.permille(400);
        let gets = !push && self.rng.permille(400);
        let begun = push || gets;
        let size = if self.rng.permille(100) {
            0
        } else {
            self.rng.below(400)
        };
        let room = if begun { 600 } else { size };
        let src: Vec<u8> = (0..room).map(|_| self.rng.next() as u8).collect();
        let dst: Vec<u8> = src.iter().map(|b| !b).collect();
        let faulty = !self.faults.quiet();
        let deadline = if self.rng.permille(self.faults.short_deadlines) {
            self.now + Duration::from_micros(self.rng.below(400))
        } else if faulty {
            self.now + Duration::from_micros(400 + self.rng.below(4000))
        } else {
            // Nothing goes wrong: everything must be done, however long it takes.
            Time::MAX
        };
        let (check_lease, release) = (self.rng.permille(600), self.rng.permille(600));
        let memory = self.seen.len() as u32;
        let source = SimSource::random(&mut self.rng, memory, 0..if begun { 0 } else { size });
        let mut seen = Seen {
            id,
            owner,
            peer,
            key: self.peers[peer].key,
            push,
            gets,
            check_lease: !begun && check_lease,
            release: !push && release,
            deadline,
            src,
            dst,
            jobs: Vec::new(),
            planned: if begun { 0 } else { size },
            committed: false,
            executed: HashMap::new(),
            reason: None,
            lease_live: false,
            live_jobs: HashSet::new(),
            verify: self.rng.permille(300),
            verified: false,
            ended: None,
            notices: Vec::new(),
            free: false,
        };
        if deadline <= self.now {
            seen.reason = Some(Cause::DeadlinePassed);
        }
        let kind = if push {
            Kind::Push
        } else if gets {
            Kind::Gets { release }
        } else {
            Kind::Pull {
                source: Arc::clone(&source) as _,
                check_lease,
                release,
            }
        };
        let spec = Spec {
            id,
            peer: seen.key,
            kind,
            verify: seen.verify,
            deadline,
            workers: self.workers.len() as u16,
        };
        if !begun {
            // The ledger names the job; it comes back with StartJob.
            seen.jobs.push((JobId(u64::MAX), source));
        }
        self.index.insert(id, self.seen.len());
        self.seen.push(seen);
        let again = spec.clone();
        match self.ledgers[owner].submit(self.now, spec) {
            Ok(()) => self.outputs(owner),
            Err(_) => {
                self.index.remove(&id);
                self.seen.pop();
                Ok(())
            }
        }?;
        let twice = self.ledgers[owner].submit(self.now, again);
        let s = self.index.get(&id).map(|i| &self.seen[*i]);
        if s.is_some_and(|s| !s.free) {
            ensure!(twice.is_err(), "transfer {} was taken twice", id.0);
        } else if twice.is_ok() {
            // It had ended at once, so that its id was new again: a caller's mistake; undo it.
            let _ = self.ledgers[owner].cancel(self.now, id);
            while self.ledgers[owner].poll_output().is_some() {}
        }
        Ok(())
    }

    pub(super) fn engine_pushes(&mut self) -> Step {
        let open: Vec<usize> = (0..self.seen.len())
            .filter(|i| {
                let s = &self.seen[*i];
                s.is_begun() && s.ended.is_none() && !s.committed
            })
            .collect();
        if open.is_empty() {
            return Ok(());
        }
        let i = open[self.rng.index(open.len())];
        let (owner, id) = (self.seen[i].owner, self.seen[i].id);
        let from = self.seen[i].planned;
        let room = self.seen[i].src.len() as u64 - from;
        if room > 0 && self.rng.permille(700) {
            let span = from..from + self.rng.below(room.min(200) + 1);
            let source = SimSource::random(&mut self.rng, i as u32, span.clone());
            if let Ok(job) = self.ledgers[owner].add_job(self.now, id, Arc::clone(&source) as _) {
                self.seen[i].jobs.push((job, source));
                self.seen[i].planned = span.end;
            }
        } else if self.ledgers[owner].commit(self.now, id).is_ok() {
            self.seen[i].committed = true;
            ensure!(
                self.ledgers[owner].commit(self.now, id).is_err(),
                "push {} was committed twice",
                id.0
            );
        }
        self.outputs(owner)
    }

    pub(super) fn engine_gives_up(&mut self) -> Step {
        if !self.rng.permille(self.faults.cancel * 10) || self.seen.is_empty() {
            return Ok(());
        }
        // Any transfer, ended ones too.
        let i = self.rng.index(self.seen.len());
        let (owner, id) = (self.seen[i].owner, self.seen[i].id);
        let ended = self.seen[i].ended.is_some();
        let (taken, cause) = match self.rng.below(3) {
            0 => (self.ledgers[owner].abort(self.now, id), Cause::Aborted),
            1 => (
                self.ledgers[owner].fail(self.now, id, Cause::Revoked),
                Cause::Revoked,
            ),
            _ => (self.ledgers[owner].cancel(self.now, id), Cause::Cancelled),
        };
        ensure!(
            !(ended && taken.is_ok()),
            "transfer {} was given up after its end",
            id.0
        );
        if taken.is_ok() {
            self.give_reason(i, cause);
        }
        self.outputs(owner)
    }

    pub(super) fn give_reason(&mut self, i: usize, cause: Cause) {
        let s = &mut self.seen[i];
        if s.ended.is_none() && s.reason.is_none() {
            s.reason = Some(cause);
        }
    }
}
