//! A scheduler's limits and what it counts and tells.

use crate::transfer::{Cause, LaneId};

/// How many operations go into a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchSize {
    /// min(ceil(operations / lanes of the peer), send queue / 4), at least 1.
    Auto,
    /// This many, as far as the credits go.
    Fixed(u32),
}

/// The limits of a scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// `post_batch_size`.
    pub batch: BatchSize,
    /// The most bytes of a batch; one operation alone may be larger.
    pub batch_bytes: u64,
    /// No batch is begun for a peer while so many bytes are posted to it; one batch always may be.
    pub peer_bytes: u64,
    /// Entries of the worker's completion queue. Unsignalled work counts too: it completes when
    /// it is flushed.
    pub cq_entries: u32,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            batch: BatchSize::Auto,
            batch_bytes: 4 << 20,
            peer_bytes: 64 << 20,
            cq_entries: u32::MAX,
        }
    }
}

/// Counts since the scheduler was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    /// Operations handed out in batches.
    pub posted: u64,
    /// Operations confirmed.
    pub confirmed: u64,
    /// Completions whose id names nothing that is posted.
    pub stale: u64,
    /// Completions that only echoed an earlier failure of their lane.
    pub echoes: u64,
    /// Operations that were lost with a lane through no fault of theirs and posted again.
    pub replayed: u64,
}

/// What the worker must do after a post that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum PostFailure {
    /// Nothing: the device took none of the batch and the lane goes on.
    LaneKept,
    /// Move the queue pair to the error state: the device took some of the batch, and nothing
    /// would ever signal that part's completion.
    ResetLane,
}

/// The end of a work request of the worker's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SingleReport {
    /// The token it was reserved with.
    pub token: u64,
    /// The lane it was posted on.
    pub lane: LaneId,
    /// Its end. One that was flushed says why the lane failed, or only that it did when that was the
    /// fault of another work request.
    pub result: Result<(), Cause>,
}
