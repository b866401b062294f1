//! What travels on a control connection, byte by byte: preamble, frames, handshake, messages.
//!
//! Nothing here owns a socket. Bytes from outside are bounded before they are stored, authenticated
//! before they are decoded, and decoded into types that are checked field by field. The format is
//! written down in `docs/wire-format.md`; [`crate::session`] drives it.

mod blob;
mod error;
mod frame;
mod handshake;
mod keys;
mod message;
mod parts;
mod preamble;
mod secret;
mod stream;

pub use blob::{Blob, Fingerprint};
pub use error::{Saw, WireError};
pub use frame::{Frame, FrameReader, FrameWriter, HEADER_LEN, TAG_LEN};
pub use handshake::{
    Auth, AuthMode, AuthOk, Challenge, HandshakeNonce, Hello, Reject, RejectCode, Role,
    VersionRange, frame_kind,
};
pub use keys::{FrameKey, SessionId, SessionKeys, Side, StreamKey, Transcript};
pub use message::{
    Announce, Bench, Describe, ErrorReport, Goodbye, LinksAnswer, LinksWanted, Message,
    MessageKind, Ping, Pong, PushAborted, PushClosed, PushDone, PushStart, PushSums, PushTold,
    QpAnswer, QpOffer, QpReset, Ready, Refuse, Release, Retracted, Revoke, Stage, StageFree,
    Staged, Sums, SumsWanted, Take, TakeStop, Taken,
};
pub use parts::{
    Candidate, ConfigFacts, ErrorCode, GoodbyeReason, GpuDesc, KvRole, LinksRefused, PathKind,
    RailDesc, RailEndpoint, Refusal, RemoteSpan, Stretch, SumsOf, TakeOf, limits,
};
pub(crate) use parts::{clean, pack_sums, unpack_sums};
pub use preamble::{ConnectionKind, PREAMBLE_LEN, Preamble, PreambleReader, Sniff, sniff};
pub use secret::{LoadedSecret, Secret, SecretError, SecretWarning};
pub use stream::{
    STREAM_ANSWER_LEN, STREAM_OPENING_LEN, StreamGate, StreamHalf, StreamOpening, StreamRefused,
};

/// The versions of the control protocol that this build speaks.
pub const VERSIONS: VersionRange = VersionRange { min: 1, max: 1 };

/// The largest payload of a frame before its sender is authenticated, in bytes.
pub const MAX_UNAUTHENTICATED_FRAME: u32 = 64 * 1024;

/// The largest payload of a frame of an authenticated peer unless configured otherwise, in bytes.
pub const DEFAULT_MAX_FRAME: u32 = 16 * 1024 * 1024;

/// Encodes `value` as MessagePack, structs as arrays.
///
/// # Errors
///
/// [`WireError::Encode`] when a value cannot be represented.
fn pack<T: serde::Serialize + ?Sized>(what: &'static str, value: &T) -> Result<Vec<u8>, WireError> {
    rmp_serde::to_vec(value).map_err(|e| WireError::Encode {
        what,
        detail: e.to_string(),
    })
}

/// Decodes one MessagePack value that fills `bytes` exactly.
fn unpack<T: serde::de::DeserializeOwned>(
    what: &'static str,
    bytes: &[u8],
) -> Result<T, WireError> {
    let mut rest = bytes;
    let value = T::deserialize(&mut rmp_serde::Deserializer::new(&mut rest)).map_err(|e| {
        WireError::Decode {
            what,
            detail: e.to_string(),
        }
    })?;
    if rest.is_empty() {
        Ok(value)
    } else {
        Err(WireError::Trailing {
            what,
            extra: rest.len(),
        })
    }
}
