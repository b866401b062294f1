//! A batch: what a worker posts in one call, in flat arrays that are used again.

use std::sync::Arc;

use super::Job;
use crate::plan::source::{OpList, Piece};

/// A work request of a batch, as the device wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkRequest<'a> {
    /// The id to post it under, to be given back to the scheduler with its completion.
    pub wr_id: u64,
    /// Whether it asks for a completion: only the last of a batch does.
    pub signaled: bool,
    /// Index of the remote memory.
    pub remote_region: u32,
    /// Bytes from the start of the remote memory.
    pub remote_offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// The local pieces, in order.
    pub pieces: &'a [Piece],
}

/// Consecutive operations of one job, to be posted on one lane in one call. Reused between calls:
/// filling it allocates only while it grows.
#[derive(Debug, Default)]
pub struct Batch {
    job: Option<Arc<Job>>,
    ops: OpList,
    first_op: u64,
    first_wr_id: u64,
}

impl Batch {
    /// An empty batch.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many work requests there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// How many bytes they move.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.ops.bytes()
    }

    /// The job whose operations these are: direction, peer, transfer. `None` in an empty batch.
    #[must_use]
    pub fn job(&self) -> Option<&Arc<Job>> {
        self.job.as_ref()
    }

    /// Index in the job of the first operation.
    #[must_use]
    pub fn first_op(&self) -> u64 {
        self.first_op
    }

    /// The work requests in the order of posting.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = WorkRequest<'_>> + '_ {
        let last = self.ops.len().wrapping_sub(1);
        self.ops.iter().enumerate().map(move |(i, op)| WorkRequest {
            wr_id: self.first_wr_id + i as u64,
            signaled: i == last,
            remote_region: op.remote_region,
            remote_offset: op.remote_offset,
            len: op.len,
            pieces: op.local,
        })
    }

    /// Empties it and lets the job go; the room stays.
    pub fn clear(&mut self) {
        self.job = None;
        self.ops.begin(0, 0);
    }

    /// Takes operations of `job` from `first_op` on, up to `limit` of them and, after the first,
    /// up to `max_bytes`.
    pub(super) fn fill(&mut self, job: &Arc<Job>, first_op: u64, limit: u64, max_bytes: u64) {
        self.first_op = first_op;
        let max_ops = usize::try_from(limit).unwrap_or(usize::MAX);
        self.ops.begin(max_ops, max_bytes);
        let end = first_op.saturating_add(limit);
        job.source.list(first_op..end, &mut self.ops);
        self.job = Some(Arc::clone(job));
    }

    pub(super) fn set_first_wr_id(&mut self, wr_id: u64) {
        self.first_wr_id = wr_id;
    }
}
