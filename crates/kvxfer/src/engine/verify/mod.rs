//! Checksums of what has moved: the thread that works them out, and what waits for them.
//!
//! ```text
//! pull   consumer                                       producer
//!   all data here ── SumsWanted (its units) ──────────► on offer? sums of the sources, chunk by chunk
//!   sums of the destinations, meanwhile                 still on offer?
//!   compare ◄───────────────────────────────── Sums ──
//!   the lease is read, the pull is done
//!
//! push   producer                                       consumer
//!   all data there: sums of the sources ── PushSums ──► kept
//!   the push is done ─────────────────────  PushDone ─► sums of the destinations, compare: it counts
//! ```
//!
//! The consumer compares, by sums that each side works out from its own layout ([`crate::sums`]). Sums
//! are worked out on one thread of the runtime, some milliseconds of each job in turn, so that no worker
//! and no control connection waits for memory to be read. A job whose connection is behind waits for it.
//! Whoever waits for sums does so as for data: until the deadline.

mod answer;
mod arrived;
mod ask;
mod check;
mod compare;
mod subject;
mod summing;
mod tell;
mod thread;

pub(crate) use arrived::{ArrivedSums, Next};
pub(crate) use thread::{MOST_SUMS, Verifier};

use check::Checking;

use std::sync::Arc;

use crate::blocks::GroupBlocks;
use crate::engine::moves::Moved;
use crate::engine::{Inner, PeerSession};
use crate::ids::{Nonce, RequestId};
use crate::plan::Part;
use crate::transfer::Cause;
use crate::wire::{Blob, SumsOf};

/// What a transfer's checksums are of, and what has become of them.
#[derive(Debug)]
pub(crate) struct Verification {
    /// Of what both ranks keep.
    pub(crate) part: Part,
    /// What it moves.
    pub(crate) moved: Vec<Moved>,
    /// How many sums of a push the consumer has been told.
    pub(crate) told: u64,
    /// Destination blocks that differ, by group.
    pub(crate) differing: Vec<(u32, u32)>,
}

impl Verification {
    pub(crate) const fn new(part: Part, moved: Vec<Moved>) -> Self {
        Self {
            part,
            moved,
            told: 0,
            differing: Vec::new(),
        }
    }
}

/// Why a transfer is not done for its checksums.
#[derive(Debug)]
pub(crate) struct Unverified {
    pub(crate) cause: Cause,
    /// Destination blocks that differ, by group; none where none has been compared.
    pub(crate) blocks: Vec<(u32, u32)>,
}

impl From<Cause> for Unverified {
    fn from(cause: Cause) -> Self {
        let blocks = Vec::new();
        Self { cause, blocks }
    }
}

/// The sums of a push that have been told, or that those of a pull agree.
pub(crate) type Verdict = Result<u64, Box<Unverified>>;

impl Inner {
    /// Compares what a sender has pushed with the sums that it has told, later. `false`: the engine goes.
    pub(in crate::engine) fn check_push(
        self: &Arc<Self>,
        peer: &Arc<PeerSession>,
        of: (RequestId, Nonce),
        groups: Vec<GroupBlocks>,
        told: (Vec<(SumsOf, Blob)>, u64),
    ) -> bool {
        let job = Checking::new(Arc::clone(self), Arc::clone(peer), of, groups, told);
        self.runtime.verifier.give(&self.runtime, job).is_ok()
    }
}
