//! What expectations are asked and what they say.

use crate::block_set::BlocksError;
use crate::blocks::GroupBlocks;
use crate::claims::BlockInUse;
use crate::event::{MemoryState, PeerName};
use crate::ids::{Nonce, RequestId};
use crate::plan::Cover;
use crate::rails::RailSet;
use crate::ticket::MAX_PARTIES;
use crate::time::Time;
use crate::transfer::{Cause, PeerKey};

/// What to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExpectOutput {
    /// All senders are done: the blocks are complete and the owner's. The outcome.
    Received {
        /// The request.
        request: RequestId,
        /// The try.
        nonce: Nonce,
        /// As given with it.
        tag: u64,
    },
    /// It failed. The outcome; no block of it may be trusted.
    Failed {
        /// The request.
        request: RequestId,
        /// The try.
        nonce: Nonce,
        /// As given with it.
        tag: u64,
        /// Why, first of all.
        cause: Cause,
        /// Its blocks.
        groups: Vec<GroupBlocks>,
        /// `Quarantined` when a `Released` will follow.
        memory: MemoryState,
    },
    /// Tell the peer to stop pushing, to drain, and to answer with closed.
    Revoke {
        /// The peer.
        peer: PeerKey,
        /// The request.
        request: RequestId,
        /// The try.
        nonce: Nonce,
    },
    /// Reset all own queue pairs to the peer, then call [`Expects::peer_reset`](super::Expects::peer_reset).
    ForceReset {
        /// The peer.
        peer: PeerKey,
    },
    /// The memory of a failed expectation is the owner's again.
    Released {
        /// The request.
        request: RequestId,
        /// The try.
        nonce: Nonce,
        /// Its blocks.
        groups: Vec<GroupBlocks>,
    },
}

/// What is expected.
#[derive(Debug, Clone, Copy)]
pub struct ExpectSpec<'a> {
    /// The request.
    pub request: &'a RequestId,
    /// The try.
    pub nonce: Nonce,
    /// The blocks that may be written.
    pub groups: &'a [GroupBlocks],
    /// How many peers send a part each.
    pub senders: u32,
    /// When the outcome is due.
    pub deadline: Time,
    /// Comes back with the outcome.
    pub tag: u64,
}

/// Why an expectation was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExpectError {
    /// Nobody would ever send it, or too many.
    #[error(
        "request {request} is expected from {senders} senders, from 1 to {MAX_PARTIES} are allowed"
    )]
    Senders {
        /// The request.
        request: RequestId,
        /// The number given.
        senders: u32,
    },
    /// Its deadline has passed.
    #[error("request {request} is expected by a deadline that has passed")]
    NoTime {
        /// The request.
        request: RequestId,
    },
    /// The block lists are unusable.
    #[error("blocks expected for request {request}")]
    Blocks {
        /// The request.
        request: RequestId,
        /// What is wrong with them.
        source: BlocksError,
    },
    /// A block is in something else of this rank.
    #[error(transparent)]
    InUse(#[from] BlockInUse),
    /// Another try of the request is expected.
    #[error(
        "request {request} is already expected with nonce {held:?}, not {given:?}; cancel it first"
    )]
    OtherNonce {
        /// The request.
        request: RequestId,
        /// The nonce that stands.
        held: Nonce,
        /// The nonce given.
        given: Nonce,
    },
    /// The same try is expected with other blocks or senders.
    #[error(
        "request {request} with nonce {nonce:?} is already expected with other blocks or senders"
    )]
    Differs {
        /// The request.
        request: RequestId,
        /// The try.
        nonce: Nonce,
    },
    /// The same try was expected before and has ended.
    #[error(
        "request {request} with nonce {nonce:?} was expected before and has ended; a new try needs a new nonce"
    )]
    Ended {
        /// The request.
        request: RequestId,
        /// The try.
        nonce: Nonce,
    },
}

/// Why a peer's message was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum PushRefusal {
    /// No such request is expected.
    #[error("no such request is expected")]
    UnknownRequest,
    /// The request is expected, but not this try of it.
    #[error("another try of the request is expected")]
    WrongNonce,
    /// The expectation has ended.
    #[error("the expectation has ended")]
    Late,
    /// As many senders as the expectation has are bound already.
    #[error("the expectation has all its {senders} senders")]
    SendersFull {
        /// Its number of senders.
        senders: u32,
    },
    /// The sender has said before that it wrote over other rails, or speaks for one that it does not name.
    #[error("the sender wrote over the rails {before}, and now says {rails}")]
    OtherRails {
        /// What it said first.
        before: RailSet,
        /// What it says now.
        rails: RailSet,
    },
    /// The sender tells more immediates than any push may.
    #[error("{count} immediates of one push, and {most} may be told")]
    Immediates {
        /// How many.
        count: u64,
        /// How many it may be.
        most: u64,
    },
    /// The peer is not one of the senders.
    #[error("the peer is not a sender of this request")]
    NotASender,
}

/// What a sender's "done" did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PushProgress {
    /// Counted; so many senders are still to come.
    Waiting {
        /// Senders that are not done.
        left: u32,
    },
    /// It was the last: the outcome is out.
    Complete,
    /// This sender had said so before.
    Repeated,
}

/// A peer that is to be bound.
#[derive(Debug, Clone, Copy)]
pub struct Sender<'a> {
    /// Who it is.
    pub name: &'a PeerName,
    /// What of each block it writes.
    pub cover: &'a Cover,
}
