//! What the world knows of each transfer, and what must hold of it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use kvxfer::time::Time;
use kvxfer::transfer::{Cause, JobId, Notice, Outcome, PeerKey, TransferId};

use super::source::SimSource;

/// A broken invariant, in words.
pub(crate) type Violation = String;

macro_rules! ensure {
    ($cond:expr, $($why:tt)+) => {
        if !$cond {
            return Err(format!($($why)+));
        }
    };
}
pub(super) use ensure;

/// One transfer as the world sees it.
pub(crate) struct Seen {
    pub(crate) id: TransferId,
    pub(crate) owner: usize,
    pub(crate) peer: usize,
    pub(crate) key: PeerKey,
    pub(crate) push: bool,
    /// Reads job by job.
    pub(crate) gets: bool,
    pub(crate) check_lease: bool,
    pub(crate) release: bool,
    pub(crate) deadline: Time,
    /// Source and destination bytes; the destination begins different everywhere.
    pub(crate) src: Vec<u8>,
    pub(crate) dst: Vec<u8>,
    pub(crate) jobs: Vec<(JobId, Arc<SimSource>)>,
    /// How far the jobs reach into the memories.
    pub(crate) planned: u64,
    pub(crate) committed: bool,
    /// How often each operation was executed.
    pub(crate) executed: HashMap<(JobId, u64), u32>,
    /// The first reason to stop that the ledger was given.
    pub(crate) reason: Option<Cause>,
    pub(crate) lease_live: bool,
    /// The jobs of gets whose lease was live behind them.
    pub(crate) live_jobs: HashSet<JobId>,
    /// Whether checksums are wanted, and have been found right.
    pub(crate) verify: bool,
    pub(crate) verified: bool,
    pub(crate) ended: Option<Ended>,
    pub(crate) notices: Vec<Notice>,
    /// The memory was said to be free.
    pub(crate) free: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ended {
    Done,
    Failed(Cause),
    Cancelled,
}

impl Seen {
    pub(crate) fn name(&self) -> String {
        format!("transfer {}", self.id.0)
    }

    /// Whether its jobs are added one by one.
    pub(crate) fn is_begun(&self) -> bool {
        self.push || self.gets
    }

    /// Whether every operation of a job was executed.
    pub(crate) fn job_is_there(&self, job: JobId) -> bool {
        let source = self.jobs.iter().find(|(known, _)| *known == job);
        source.is_some_and(|(_, source)| {
            let mut ops = 0..source.ops.len() as u64;
            ops.all(|op| self.executed.contains_key(&(job, op)))
        })
    }

    pub(crate) fn all_bytes_there(&self) -> bool {
        let planned = self.planned as usize;
        self.src[..planned] == self.expected_from_dst(planned)[..]
    }

    /// The destination's bytes as the source would have them: the pieces of an operation lie in
    /// another order on the local side, so each operation is mapped back.
    fn expected_from_dst(&self, planned: usize) -> Vec<u8> {
        let mut back = vec![0; planned];
        for (_, source) in &self.jobs {
            for op in &source.ops {
                let mut remote = op.remote as usize;
                for piece in &op.local {
                    for i in 0..piece.len as usize {
                        let local = piece.offset as usize + i;
                        if self.push {
                            back[local] = self.dst[remote + i];
                        } else {
                            back[remote + i] = self.dst[local];
                        }
                    }
                    remote += piece.len as usize;
                }
            }
        }
        back
    }

    pub(crate) fn on_notice(
        &mut self,
        notice: &Notice,
        peer_lost: bool,
        posted: bool,
    ) -> Result<(), Violation> {
        let name = self.name();
        ensure!(
            self.notices.is_empty(),
            "{name}: a second notice, {notice:?}"
        );
        match notice {
            Notice::Release => {
                ensure!(
                    !self.push && self.release,
                    "{name}: Release was not asked for"
                );
                ensure!(self.all_bytes_there(), "{name}: Release before the data");
            }
            Notice::PushDone { .. } => {
                ensure!(
                    self.push && self.committed,
                    "{name}: PushDone of no committed push"
                );
                ensure!(self.all_bytes_there(), "{name}: PushDone before the data");
                ensure!(!posted, "{name}: PushDone while operations are posted");
            }
            Notice::PushAborted { cause } => {
                ensure!(self.push, "{name}: PushAborted of a pull");
                ensure!(!peer_lost, "{name}: a notice to a lost peer");
                ensure!(!posted, "{name}: PushAborted while operations are posted");
                ensure!(
                    Some(cause) == self.reason.as_ref(),
                    "{name}: PushAborted gives {cause}"
                );
            }
        }
        self.notices.push(notice.clone());
        Ok(())
    }

    /// Checks an outcome. `posted` says whether anything of the transfer is with a device,
    /// `disturbed` whether a lane was lost in this history.
    pub(crate) fn on_outcome(
        &mut self,
        now: Time,
        outcome: &Outcome,
        posted: bool,
        disturbed: bool,
    ) -> Result<(), Violation> {
        let name = self.name();
        ensure!(
            self.ended.is_none(),
            "{name}: a second outcome, {outcome:?}"
        );
        // Only Done may be later than the deadline, and then only because the clock had moved on
        // before the last report was looked at.
        ensure!(
            now <= self.deadline,
            "{name}: outcome at {now}, due at {}",
            self.deadline
        );
        let free = outcome.memory() == kvxfer::transfer::MemoryState::Released;
        ensure!(
            !(free && posted),
            "{name}: released while operations are posted"
        );
        self.free = free;
        match outcome {
            Outcome::Done { bytes } => {
                ensure!(
                    self.reason.is_none(),
                    "{name}: done after {:?}",
                    self.reason
                );
                ensure!(
                    !self.is_begun() || self.committed,
                    "{name}: done before it was committed"
                );
                ensure!(
                    *bytes == self.planned,
                    "{name}: done with {bytes} bytes of {}",
                    self.planned
                );
                ensure!(self.all_bytes_there(), "{name}: done with wrong bytes");
                ensure!(
                    !self.check_lease || self.planned == 0 || self.lease_live,
                    "{name}: done without a live lease"
                );
                for (job, source) in self.jobs.iter().filter(|_| self.gets) {
                    let live = source.ops.is_empty() || self.live_jobs.contains(job);
                    ensure!(live, "{name}: done without a live lease of a job");
                }
                ensure!(
                    !self.verify || self.planned == 0 || self.verified,
                    "{name}: done without its checksums"
                );
                for (job, source) in &self.jobs {
                    for op in 0..source.ops.len() as u64 {
                        let times = self.executed.get(&(*job, op)).copied().unwrap_or(0);
                        ensure!(times >= 1, "{name}: operation {op} was not executed");
                        ensure!(
                            times == 1 || disturbed,
                            "{name}: operation {op} was executed {times} times"
                        );
                    }
                }
                let expect_notice = self.push || self.release;
                ensure!(
                    self.notices.len() == usize::from(expect_notice),
                    "{name}: done with notices {:?}",
                    self.notices
                );
                self.ended = Some(Ended::Done);
            }
            Outcome::Failed {
                cause,
                incomplete,
                at,
                ..
            } => {
                ensure!(!cause.is_flush(), "{name}: an echo as the cause");
                ensure!(
                    Some(cause) == self.reason.as_ref(),
                    "{name}: failed with {cause}, first was {:?}",
                    self.reason
                );
                if let Some((job, op)) = at {
                    let known = self
                        .jobs
                        .iter()
                        .any(|(j, s)| j == job && *op < s.ops.len() as u64);
                    ensure!(known, "{name}: failed at an operation that it has not");
                }
                // Every block whose bytes are wrong must be named.
                let named = incomplete.blocks();
                for (job, source) in &self.jobs {
                    for (i, op) in source.ops.iter().enumerate() {
                        let done = self.executed.contains_key(&(*job, i as u64));
                        let done = done && (!self.gets || self.live_jobs.contains(job));
                        ensure!(
                            done || named.contains(&(0, op.remote as u32)),
                            "{name}: block {} is not named invalid",
                            op.remote
                        );
                    }
                }
                self.ended = Some(Ended::Failed(cause.clone()));
            }
            Outcome::Cancelled { .. } => {
                let asked = matches!(self.reason, Some(Cause::Cancelled | Cause::Aborted));
                ensure!(asked, "{name}: cancelled, first was {:?}", self.reason);
                self.ended = Some(Ended::Cancelled);
            }
        }
        Ok(())
    }

    pub(crate) fn on_released(&mut self, posted: bool) -> Result<(), Violation> {
        let name = self.name();
        ensure!(self.ended.is_some(), "{name}: released before its outcome");
        ensure!(!self.free, "{name}: released twice");
        ensure!(!posted, "{name}: released while operations are posted");
        self.free = true;
        Ok(())
    }
}
