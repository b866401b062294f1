//! What a scheduler keeps of a job and of a peer.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use crate::rails::RailSet;
use crate::transfer::{Job, PeerKey};

#[derive(Debug)]
pub(super) struct JobSlot {
    pub(super) job: Arc<Job>,
    pub(super) peer: u32,
    /// Operations posted on this worker's lanes.
    pub(super) posted: u32,
    /// Operations that one batch may hold for its bytes, judged by the job's mean.
    pub(super) by_bytes: u64,
    /// Claimed here, and to be posted (again).
    pub(super) replay: Vec<(Range<u64>, u32)>,
    pub(super) ops_done: u64,
    pub(super) bytes_done: u64,
    /// The pairs of rails whose lanes have confirmed some of it.
    pub(super) rails: RailSet,
    /// In its peer's queue of jobs with operations to claim.
    pub(super) queued: bool,
    /// In the list of jobs with something to report.
    pub(super) dirty: bool,
    pub(super) stopped: bool,
    pub(super) error_told: bool,
    /// Writes of it were lost, and the peer may carry them out yet, for as long as its queue pairs stand.
    pub(super) in_doubt: bool,
    /// Lanes with which writes of it were lost that the peer may carry out until it has taken its half
    /// of those lanes down; and of how many the owner knows.
    pub(super) doubts: u32,
    pub(super) doubts_told: u32,
    pub(super) quiescent: bool,
}

#[derive(Debug, Default)]
pub(super) struct Peer {
    pub(super) key: PeerKey,
    pub(super) lanes: Vec<u32>,
    /// How many of the lanes have not failed.
    pub(super) live: u32,
    pub(super) next_lane: usize,
    /// Slots of jobs that may have operations to claim, next in turn first.
    pub(super) jobs: VecDeque<u32>,
    /// How many jobs of this peer have slots.
    pub(super) known: u32,
    pub(super) bytes: u64,
    /// In the scheduler's list of peers that can be posted to.
    pub(super) ready: bool,
}

impl JobSlot {
    /// Whether nothing more of it may be posted.
    pub(super) fn over(&self) -> bool {
        self.stopped || self.job.is_stopped()
    }

    /// Claims up to `n` operations: those to be posted again first.
    pub(super) fn claim(&mut self, n: u64) -> Option<(Range<u64>, u32)> {
        if self.over() {
            return None;
        }
        let Some((range, tries)) = self.replay.last_mut() else {
            return self.job.claim(n).map(|range| (range, 0));
        };
        let take = range.start..range.end.min(range.start + n);
        let tries = *tries;
        range.start = take.end;
        if range.is_empty() {
            self.replay.pop();
        }
        Some((take, tries))
    }

    /// So many operations are confirmed by a lane of this pair of rails.
    pub(super) fn confirmed(&mut self, ops: u64, pair: u16) {
        self.ops_done += ops;
        if ops > 0 {
            self.rails.insert(pair);
        }
    }

    /// Keeps operations to be posted again. They come one by one, in order: join them.
    pub(super) fn lost(&mut self, lost: Range<u64>, tries: u32) {
        match self.replay.last_mut() {
            Some((last, t)) if last.end == lost.start && *t == tries => last.end = lost.end,
            _ => self.replay.push((lost, tries)),
        }
    }
}
