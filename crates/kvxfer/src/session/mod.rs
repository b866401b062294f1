//! The control connection of one peer as a state machine without I/O and without a clock.
//!
//! Bytes that arrived, the end of the connection, the time and local decisions go in; bytes to send,
//! events and the next time to be woken come out:
//!
//! ```text
//! start · on_bytes · on_eof · on_io_error · on_time · send · accept · refuse · ping · close
//!        → transmit/transmitted · poll_event · next_timeout
//! ```
//!
//! The driver calls [`Session::on_bytes`] with what it has read *before* [`Session::on_time`], writes
//! [`Session::transmit`], and closes the socket once [`Session::is_finished`]. Nothing is returned as
//! an error from the inputs: a session ends with exactly one [`Event::Closed`] that says why.
//!
//! ```text
//! handshake ─▶ authenticated ─(both described, accepted)─▶ described ─(both Ready)─▶ established ─▶ closed
//! ```

mod error;
mod handshake;
mod liveness;
mod machine;
mod open;

use std::time::Duration;

use crate::wire::{
    DEFAULT_MAX_FRAME, Describe, GoodbyeReason, Message, QpAnswer, QpOffer, Role, Secret,
    SessionId, VERSIONS, VersionRange,
};

pub use error::{Party, SendError, SessionError, SessionState};
pub use handshake::busy_reply;
pub use machine::Session;

/// Settings of a session.
#[derive(Debug, Clone)]
pub struct SessionConfig {
    /// The shared secret. `None` means that anybody may connect: the caller decides whether that is
    /// allowed where it listens. A side that has one never talks to a side that has none.
    pub secret: Option<Secret>,
    /// The protocol versions to speak.
    pub versions: VersionRange,
    /// A client's role; a server takes its client's.
    pub role: Role,
    /// Whether a server serves [`Role::Bench`].
    pub allow_bench: bool,
    /// The largest payload to take after authentication, in bytes; at least 64 KiB.
    pub max_frame: u32,
    /// How many bytes may wait to be sent before [`Session::send`] says
    /// [`SendError::QueueFull`].
    pub max_queued: usize,
    /// How long the handshake may take.
    pub handshake_timeout: Duration,
    /// How long it may take from authentication until both sides are ready.
    pub establish_timeout: Duration,
    /// The time between two pings.
    pub heartbeat_interval: Duration,
    /// After this long without a sign of life the peer counts as stalled.
    pub stall_after: Duration,
    /// After this long without a sign of life the session ends.
    pub dead_after: Duration,
}

impl Default for SessionConfig {
    fn default() -> Self {
        SessionConfig {
            secret: None,
            versions: VERSIONS,
            role: Role::Engine,
            allow_bench: false,
            max_frame: DEFAULT_MAX_FRAME,
            max_queued: 64 << 20,
            handshake_timeout: Duration::from_secs(5),
            establish_timeout: Duration::from_secs(30),
            heartbeat_interval: Duration::from_secs(1),
            stall_after: Duration::from_secs(5),
            dead_after: Duration::from_secs(15),
        }
    }
}

/// What a session has to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
#[allow(
    clippy::large_enum_variant,
    reason = "a handful at a time; its Describe comes boxed, other messages are small"
)]
pub enum Event {
    /// Both sides have proved themselves. Now each sends its [`Describe`].
    Authenticated {
        /// The version spoken.
        version: u16,
        /// What the client came for.
        role: Role,
        /// Whether by a shared secret; if not, anybody could be at the other end.
        by_secret: bool,
        /// The session's name, for its data streams.
        session: SessionId,
    },
    /// Who the peer is. The caller answers with [`Session::accept`] or [`Session::refuse`].
    PeerDescribed(Box<Describe>),
    /// The peer offers queue pairs. The caller answers with [`QpAnswer`].
    QpOffer(QpOffer),
    /// The peer answers an offer; there are no more endpoints than offered, and some if it takes the path.
    QpAnswer(QpAnswer),
    /// Both sides are ready: transfers may begin.
    Established,
    /// Any other message that the state allows.
    Message(Message),
    /// The answer to a [`Session::ping`].
    Pong {
        /// The number that [`Session::ping`] gave.
        sequence: u64,
        /// From sending the ping to reading the answer.
        round_trip: Duration,
    },
    /// The peer has given no sign of life.
    Stalled {
        /// For how long.
        silent: Duration,
    },
    /// The peer is heard again.
    Resumed {
        /// How long it was silent.
        silent: Duration,
    },
    /// The session has ended; nothing follows.
    Closed(Closed),
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Closed {
    /// This side said goodbye.
    Local(GoodbyeReason),
    /// The peer said goodbye.
    Goodbye(GoodbyeReason),
    /// It failed.
    Failed(SessionError),
}
