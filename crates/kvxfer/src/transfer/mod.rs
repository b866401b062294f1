//! Transfers as state machines: no I/O, no clock, no threads. Events and time go in, actions come
//! out.
//!
//! Two machines share the work. A [`Scheduler`] belongs to one worker thread and its lanes (queue
//! pairs): it decides which operations are posted where and accounts for every one until its
//! completion. [`Transfers`] is the ledger of the worker that owns a transfer: deadline, cancel,
//! first cause, drain, the outcome (once) and the release of the memory (once, and not while
//! anything posted may still touch it). A [`Job`] connects them: the operations of one submission,
//! which the lanes of all workers claim from one shared cursor.
//!
//! ```text
//!  submit ─► Transfers ──StartJob/StopJob──► Scheduler (one a worker) ──Batch──► post
//!              ▲  │                              ▲  │
//!   JobReport ─┘  └► CheckLease, SendNotice,     │  └► JobReport
//!                    ResetLanes, ForceDrain,     └ complete, lane_failed, lane_flushed
//!                    Outcome, Released
//! ```

mod batch;
mod cause;
mod error;
mod job;
mod lane;
mod ledger;
mod record;
mod scheduler;
#[cfg(test)]
mod testing;

pub use batch::{Batch, WorkRequest};
pub use cause::{
    Cause, Class, CompletionStatus, Corrupt, GpuOperation, LocalOperation, QpEvent, Refusal,
};
pub use error::TransferError;
pub use job::{Direction, Job, JobError, JobReport};
pub use lane::{LaneId, LaneLimits};
pub use ledger::{Transfers, TransfersConfig};
pub use record::{
    DrainToken, Incomplete, Kind, LeaseAnswer, MemoryState, Notice, Outcome, Output, Spec,
};
pub use scheduler::{
    BatchSize, PostFailure, Scheduler, SchedulerConfig, SchedulerStats, SingleReport,
};

use serde::{Deserialize, Serialize};

/// A transfer, unique in its engine for the life of the process.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct TransferId(pub u64);

/// A job, unique in its engine for the life of the process.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct JobId(pub u64);

impl JobId {
    /// The first job of a ledger.
    pub(crate) const fn first_of(owner: u16) -> Self {
        Self((owner as u64) << 48)
    }

    /// The tag of the ledger that has named it.
    pub(crate) const fn owner(self) -> u16 {
        (self.0 >> 48) as u16
    }
}

/// One life of one remote rank. A peer that restarts gets a new key.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct PeerKey(pub u64);
