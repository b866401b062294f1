//! What an engine tells its owner: the entries of `poll_events`. No device code.

use serde::{Deserialize, Serialize};

use crate::blocks::GroupBlocks;
use crate::ids::{EngineId, Generation, Nonce, Rank, RequestId};
pub use crate::transfer::{Cause, Class, MemoryState};

/// Why memory came back to its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ReleaseReason {
    /// Every reader said that it is done.
    AllRead,
    /// The owner took the offer back.
    Retracted,
    /// The lease ran out.
    Expired,
    /// What had ended earlier, by failure or cancel, has drained: nothing can touch it any more.
    Drained,
}

/// A rank of another engine.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PeerName {
    /// The engine.
    pub engine: EngineId,
    /// Its rank.
    pub rank: Rank,
}

/// One thing that happened. Requests are named with their nonce: an engine that retries can tell
/// the tries apart.
///
/// # Order
///
/// - A request's outcome comes once, and before its [`Released`](Event::Released).
/// - A peer is a rank by its name. [`PeerUp`](Event::PeerUp) or
///   [`PeerRestarted`](Event::PeerRestarted), and [`PeerDown`](Event::PeerDown), come in turn. A peer
///   with several sessions (each side has connected to the other, say) is down with the last.
/// - When a session ends, the [`Failed`](Event::Failed) of everything that ran over it come before
///   the `PeerDown`, and that comes before the next `PeerUp` or `PeerRestarted`. So at `PeerDown`
///   nothing that was asked of the peer is undecided; memory may still be quarantined.
/// - Requests of a new session do not wait for that: one that the owner starts as soon as its
///   instance is up again may end before the `PeerUp` is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Event {
    /// All blocks of the request are here and may be used. The outcome of a pull and of an
    /// expectation; the memory is the owner's.
    Received {
        /// The request.
        request: RequestId,
        /// The try.
        nonce: Nonce,
        /// What the owner gave along with the request.
        tag: u64,
    },
    /// A kernel of a producer has put a block by `kvx_put_imm`: the block is here, every byte of it. Comes before the
    /// request's outcome, once for each, in the order in which blocks were confirmed; checksums have not been compared
    /// then. What is told of a request that has its outcome is dropped.
    Told {
        /// The request.
        request: RequestId,
        /// The try.
        nonce: Nonce,
        /// Who has put it.
        peer: PeerName,
        /// The immediate: what it says is between the two engines.
        immediate: u32,
    },
    /// A push has been delivered; the outcome of a commit. Its source blocks are free for use.
    Sent {
        /// The request.
        request: RequestId,
        /// The try.
        nonce: Nonce,
        /// What the owner gave along with the push.
        tag: u64,
    },
    /// The memory of an offer, or of an earlier [`Failed`](Event::Failed) with quarantined memory,
    /// may be used again. Comes once.
    Released {
        /// The request.
        request: RequestId,
        /// The try.
        nonce: Nonce,
        /// Why now.
        reason: ReleaseReason,
    },
    /// The request failed or was cancelled. Comes once, instead of `Received` or `Sent`.
    Failed {
        /// The request.
        request: RequestId,
        /// The try.
        nonce: Nonce,
        /// What the owner gave along with the request.
        tag: u64,
        /// This side's blocks whose content must not be trusted, by cache group; none of a push,
        /// which only reads them.
        invalid_blocks: Vec<GroupBlocks>,
        /// What went wrong first.
        first_cause: Cause,
        /// Whether the memory is free now, or only after a later [`Released`](Event::Released).
        memory: MemoryState,
    },
    /// The peer is here: a session with it stands.
    PeerUp {
        /// The peer.
        peer: PeerName,
        /// Its life.
        generation: Generation,
    },
    /// The last session with the peer is lost, and everything that ran over it has been told. The
    /// side that had connected goes on trying.
    PeerDown {
        /// The peer.
        peer: PeerName,
        /// The life it was of.
        generation: Generation,
        /// Why.
        cause: Cause,
    },
    /// The peer is here again, under its name, as another life; nothing of the old one is honoured,
    /// and should the old one come back, it is refused.
    PeerRestarted {
        /// The peer.
        peer: PeerName,
        /// The life that is over.
        old: Generation,
        /// The life that has begun.
        new: Generation,
    },
}

impl Event {
    /// The request that it is about; peer events have none.
    #[must_use]
    pub fn request(&self) -> Option<(&RequestId, Nonce)> {
        match self {
            Event::Received { request, nonce, .. }
            | Event::Sent { request, nonce, .. }
            | Event::Told { request, nonce, .. }
            | Event::Released { request, nonce, .. }
            | Event::Failed { request, nonce, .. } => Some((request, *nonce)),
            Event::PeerUp { .. } | Event::PeerDown { .. } | Event::PeerRestarted { .. } => None,
        }
    }
}
