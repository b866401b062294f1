//! The model device: one lane's queue pair, with what is posted on it and how it fails.

use std::collections::VecDeque;
use std::sync::Arc;

use kvxfer::plan::source::Piece;
use kvxfer::transfer::{Cause, CompletionStatus, Job, LaneId};

/// A posted work request.
#[derive(Debug, Clone)]
pub(crate) struct Wr {
    pub(crate) wr_id: u64,
    pub(crate) signaled: bool,
    /// `None` for a work request of the worker's own.
    pub(crate) data: Option<Data>,
}

#[derive(Debug, Clone)]
pub(crate) struct Data {
    pub(crate) job: Arc<Job>,
    pub(crate) op: u64,
    /// Whether it writes into the peer's memory.
    pub(crate) push: bool,
    pub(crate) remote: u64,
    pub(crate) pieces: Vec<Piece>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NicState {
    Works,
    /// Everything flushes.
    Error,
    /// Nothing ever completes, until it is moved to the error state.
    Stuck,
}

/// A lane's queue pair. It stays in the world after it has been destroyed, so that completions
/// that were not polled yet are still delivered.
#[derive(Debug)]
pub(crate) struct Nic {
    pub(crate) worker: usize,
    pub(crate) peer: usize,
    pub(crate) lane: LaneId,
    pub(crate) state: NicState,
    /// A work request has failed here and was named.
    pub(crate) named: bool,
    /// The peer has refused something, and takes nothing more from here.
    pub(crate) refused: bool,
    pub(crate) destroyed: bool,
    /// Its lane waits for the peer, which has its half still.
    pub(crate) waits: bool,
    /// Writes that were flushed, and that the peer may carry out while it has its half.
    pub(crate) late: Vec<Data>,
    pub(crate) send_wr: u32,
    pub(crate) queue: VecDeque<Wr>,
    /// Work requests ever posted, and those that a polled completion covers.
    pub(crate) posted: u64,
    pub(crate) retired: u64,
    /// Executed or flushed work requests: the place of the next in `queue`.
    pub(crate) served: u64,
}

/// What a completion queue holds.
#[derive(Debug, Clone)]
pub(crate) struct Cqe {
    pub(crate) nic: usize,
    pub(crate) wr_id: u64,
    /// The work requests of the lane that this one covers.
    pub(crate) covers: u64,
    pub(crate) result: Result<(), Cause>,
    /// For an error of its own: whose work it was.
    pub(crate) named: Option<Data>,
}

pub(crate) fn flush() -> Cause {
    Cause::Completion {
        status: CompletionStatus::Flush,
        vendor: 0xf9,
    }
}
