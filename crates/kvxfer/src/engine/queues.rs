//! What queues need to know of the push, or the pull, whose blocks kernels name in them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::moves::{Moved, Moves};
use super::peer_session::PeerSession;
use super::pull::Pulling;
use super::push::{NotPosted, Pushing};
use super::worker::Command;
use crate::expects::MOST_IMMEDIATES;
use crate::gpu_queue::Together;
use crate::mem::gpu::Event;
use crate::plan::{BlockOps, Compiled, PlanError, Posted};
use crate::transfer::TransferId;

/// The queues of one transfer.
#[derive(Debug)]
pub(crate) struct Queues {
    id: TransferId,
    /// The worker that owns the transfer.
    owner: u16,
    peer: Arc<PeerSession>,
    /// What of the blocks moves.
    plans: Compiled,
    /// How many there have been.
    made: AtomicU64,
    /// Those of which nobody has said that all is posted.
    unfinished: AtomicU64,
    /// How many immediates its kernels tell.
    immediates: AtomicU64,
    /// What a block of each layer takes.
    block_ops: OnceLock<Arc<BlockOps>>,
}

impl Queues {
    /// None yet.
    pub(crate) fn new(
        (id, owner): (TransferId, u16),
        peer: &Arc<PeerSession>,
        plans: &Compiled,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            owner,
            peer: Arc::clone(peer),
            plans: plans.clone(),
            made: AtomicU64::new(0),
            unfinished: AtomicU64::new(0),
            immediates: AtomicU64::new(0),
            block_ops: OnceLock::new(),
        })
    }

    pub(crate) fn id(&self) -> TransferId {
        self.id
    }

    pub(crate) fn peer(&self) -> &Arc<PeerSession> {
        &self.peer
    }

    pub(crate) fn plans(&self) -> &Compiled {
        &self.plans
    }

    /// Tells the worker that owns the transfer.
    pub(crate) fn send(&self, command: Command) {
        self.peer.on_worker(self.owner, command);
    }

    /// The number of another queue, once it is known that there can be one.
    ///
    /// # Errors
    ///
    /// [`PlanError::UnequalBlocks`].
    pub(crate) fn next(&self, groups: u32) -> Result<u64, PlanError> {
        self.has_equal_blocks(groups)?;
        if self.block_ops.get().is_none() {
            let limits = self.peer.block_limits(&self.plans, groups);
            let ops = BlockOps::new(&self.plans, limits)?;
            // Another queue's is the same.
            let _ = self.block_ops.set(Arc::new(ops));
        }
        Ok(self.made.fetch_add(1, Ordering::Relaxed))
    }

    /// Whether every block that moves is one of the producer's and one of the consumer's.
    fn has_equal_blocks(&self, groups: u32) -> Result<(), PlanError> {
        for group in 0..groups {
            let moves = self.plans.unit_bytes(group).is_some_and(|bytes| bytes > 0);
            let Some(unit) = self.plans.unit(group).filter(|_| moves) else {
                continue;
            };
            if unit.producer_per_block != unit.consumer_per_block {
                return Err(PlanError::UnequalBlocks {
                    group,
                    producer_tokens: unit.tokens.saturating_mul(unit.producer_per_block),
                    consumer_tokens: unit.tokens.saturating_mul(unit.consumer_per_block),
                });
            }
        }
        Ok(())
    }

    /// What a block of each layer takes; `None` before the first queue.
    pub(crate) fn block_ops(&self) -> Option<&Arc<BlockOps>> {
        self.block_ops.get()
    }

    /// How posts go together: where the consumer fetches what it is told of, or a GPU has a part in it, a job is of a
    /// plan.
    pub(crate) fn together(&self) -> Together {
        match self.peer.has_whole_jobs() {
            true => Together::ByLayer,
            false => Together::All,
        }
    }

    /// Whether so many more immediates may be told. For the worker alone.
    pub(crate) fn may_tell(&self, more: usize) -> bool {
        let before = self.immediates.fetch_add(more as u64, Ordering::Relaxed);
        before.saturating_add(more as u64) <= MOST_IMMEDIATES
    }

    /// A queue is the worker's now.
    pub(crate) fn begun(&self) {
        self.unfinished.fetch_add(1, Ordering::Relaxed);
    }

    /// Somebody has said that all is posted to one. Behind the order that closes it: who sees this sends the commit
    /// behind that.
    pub(crate) fn finished(&self) {
        self.unfinished.fetch_sub(1, Ordering::Release);
    }

    /// How many are not finished.
    pub(crate) fn unfinished(&self) -> u64 {
        self.unfinished.load(Ordering::Acquire)
    }
}

/// What a queue's posts are part of.
#[derive(Debug, Clone)]
pub(crate) enum PartOf {
    Push(Arc<Pushing>),
    Pull(Arc<Pulling>),
}

impl PartOf {
    pub(crate) fn queues(&self) -> &Arc<Queues> {
        match self {
            Self::Push(push) => push.queues(),
            Self::Pull(pull) => pull.queues(),
        }
    }

    /// Makes what kernels have posted part of it. For the worker alone that owns it.
    ///
    /// # Errors
    ///
    /// A fault comes with its place among the posts.
    pub(crate) fn take(&self, posted: Posted) -> Result<Moves, NotPosted> {
        let (what, after): (Moved, Option<Event>) = match self {
            Self::Push(push) => (push.take_posts(posted)?, None),
            Self::Pull(pull) => (pull.take_posts(posted)?, pull.after().cloned()),
        };
        Ok(Moves {
            what,
            after,
            is_released: true,
            is_there: false,
        })
    }
}
