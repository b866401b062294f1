//! Why sessions fail.

use std::fmt;
use std::io;
use std::time::Duration;

use crate::wire::{ErrorCode, MessageKind, Refusal, RejectCode, VersionRange, WireError};

/// How far a session has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SessionState {
    /// Proofs are not exchanged yet.
    Handshake,
    /// Both sides have proved themselves.
    Authenticated,
    /// Both have described themselves, and this side has accepted the other.
    Described,
    /// Both are ready for transfers.
    Established,
    /// It is over.
    Closed,
}

impl fmt::Display for SessionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SessionState::Handshake => "handshake",
            SessionState::Authenticated => "authenticated",
            SessionState::Described => "described",
            SessionState::Established => "established",
            SessionState::Closed => "closed",
        })
    }
}

/// One of the two sides, seen from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Party {
    /// This side.
    Us,
    /// The other side.
    Peer,
}

/// Why a session ended or could not begin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The peer's bytes are not acceptable.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// No protocol version is spoken by both sides.
    #[error(
        "no common protocol version: this side speaks {ours}, the peer {theirs}; upgrade the older side"
    )]
    VersionMismatch {
        /// Ours.
        ours: VersionRange,
        /// The peer's.
        theirs: VersionRange,
    },
    /// The two sides have different secrets.
    #[error(
        "not authorised: the two sides have different secrets; give both the same --secret-file or KVXFER_SECRET_FILE"
    )]
    NotAuthorised,
    /// One side has a secret, the other none.
    #[error("{}", secret_missing(*side))]
    SecretMissing {
        /// The side without one.
        side: Party,
    },
    /// The peer has no room for another connection.
    #[error("peer is busy: too many connections or handshakes; try again later")]
    Busy,
    /// The peer could not read this side's handshake.
    #[error("peer cannot read this side's handshake; are both the same release?")]
    HandshakeRefused,
    /// The peer refused the handshake for a reason that this version does not know.
    #[error("peer refused the handshake with code {code}")]
    RejectedCode {
        /// The code.
        code: u16,
    },
    /// A frame that does not belong into the handshake's state.
    #[error("frame type {code:#04x} is not expected during the handshake")]
    UnexpectedFrame {
        /// The frame type.
        code: u8,
    },
    /// A message that the state does not allow.
    #[error("{got} is not expected in state {state}")]
    UnexpectedMessage {
        /// The state.
        state: SessionState,
        /// The message.
        got: MessageKind,
    },
    /// An answer with the wrong number of endpoints.
    #[error("answer to offer {offer} has {got} endpoints instead of {expected}")]
    AnswerMismatch {
        /// The offer.
        offer: u32,
        /// Endpoints offered, or none for an answer without a path.
        expected: usize,
        /// Endpoints answered.
        got: usize,
    },
    /// The handshake took too long.
    #[error("handshake not finished within {after:?}: the peer is stalled, or is not kvxfer")]
    HandshakeTimeout {
        /// The time allowed.
        after: Duration,
    },
    /// Description and queue pairs took too long.
    #[error("session still {state} after {after:?}: the peer or its engine is stalled")]
    EstablishTimeout {
        /// How far it came.
        state: SessionState,
        /// The time allowed.
        after: Duration,
    },
    /// The peer has been silent for longer than allowed.
    #[error("peer stalled: no sign of life for {silent:?}")]
    PeerStalled {
        /// For how long.
        silent: Duration,
    },
    /// The peer closed the connection without a goodbye.
    #[error("peer closed the connection in state {state}{}", if *mid_frame { ", in the middle of a frame" } else { "" })]
    PeerClosed {
        /// How far it came.
        state: SessionState,
        /// Whether a frame was cut.
        mid_frame: bool,
    },
    /// The connection failed.
    #[error("connection lost in state {state}: {kind}")]
    ConnectionLost {
        /// How far it came.
        state: SessionState,
        /// The system's word.
        kind: io::ErrorKind,
    },
    /// The peer refuses to work with this side.
    #[error("peer refused: {reason}")]
    Rejected {
        /// Why.
        reason: Refusal,
    },
    /// This side refused to work with the peer.
    #[error("refused the peer: {reason}")]
    Refused {
        /// Why.
        reason: Refusal,
    },
    /// This side cut the peer off for what its messages say.
    #[error("cut off the peer: {text}")]
    CutOff {
        /// The kind of fault.
        code: ErrorCode,
        /// What it did.
        text: String,
    },
    /// The peer cut this side off.
    #[error("cut off by the peer: {code}: {text}")]
    PeerReported {
        /// The kind of fault.
        code: ErrorCode,
        /// The peer's words.
        text: String,
    },
}

fn secret_missing(side: Party) -> &'static str {
    match side {
        Party::Us => {
            "the peer demands a secret and this side has none; set --secret-file or KVXFER_SECRET_FILE here"
        }
        Party::Peer => {
            "this side has a secret and the peer has none; set --secret-file or KVXFER_SECRET_FILE there"
        }
    }
}

impl SessionError {
    /// What a peer is told when it is cut off; `None` when there is nobody to tell.
    pub(crate) fn report(&self) -> Option<ErrorCode> {
        match self {
            SessionError::Wire(_) => Some(ErrorCode::Protocol),
            SessionError::UnexpectedMessage { .. } | SessionError::UnexpectedFrame { .. } => {
                Some(ErrorCode::UnexpectedMessage)
            }
            SessionError::AnswerMismatch { .. } => Some(ErrorCode::Lie),
            SessionError::EstablishTimeout { .. } | SessionError::PeerStalled { .. } => {
                Some(ErrorCode::Timeout)
            }
            SessionError::CutOff { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// What a server's [`RejectCode`] means to its client.
    pub(crate) fn rejected(code: RejectCode, ours: VersionRange, theirs: VersionRange) -> Self {
        match code {
            RejectCode::VersionMismatch => SessionError::VersionMismatch { ours, theirs },
            RejectCode::SecretRequired => SessionError::SecretMissing { side: Party::Us },
            RejectCode::SecretUnexpected => SessionError::SecretMissing { side: Party::Peer },
            RejectCode::NotAuthorised => SessionError::NotAuthorised,
            RejectCode::Busy => SessionError::Busy,
            RejectCode::Malformed => SessionError::HandshakeRefused,
            RejectCode::Other(code) => SessionError::RejectedCode { code },
        }
    }
}

/// Why a message was not queued. The session goes on unless it is closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The state does not allow it yet, or not any more.
    #[error("{kind} cannot be sent in state {state}")]
    State {
        /// The state.
        state: SessionState,
        /// The message.
        kind: MessageKind,
    },
    /// The peer does not read fast enough.
    #[error("{queued} bytes wait to be sent, at most {limit} may")]
    QueueFull {
        /// Bytes waiting.
        queued: usize,
        /// The limit.
        limit: usize,
    },
    /// The peer takes no frames of this size.
    #[error("{kind} takes {len} bytes, the peer accepts {max}")]
    TooLarge {
        /// The message.
        kind: MessageKind,
        /// Its payload.
        len: usize,
        /// The limit.
        max: u32,
    },
    /// A field is out of bounds, so that any peer would refuse it.
    #[error(transparent)]
    Wire(#[from] WireError),
}
