//! The four frames before keys exist, and the one that says no.

use std::fmt;

use serde::de::{IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::blob::fixed;
use super::error::WireError;
use super::{pack, unpack};

/// The frame types of the handshake.
pub mod frame_kind {
    /// Client → server, first.
    pub const HELLO: u8 = 1;
    /// Server → client, the answer to Hello.
    pub const CHALLENGE: u8 = 2;
    /// Client → server, the client's proof.
    pub const AUTH: u8 = 3;
    /// Server → client, the server's proof. Every later frame of both sides is sealed.
    pub const AUTH_OK: u8 = 4;
    /// Server → client, instead of Challenge or AuthOk.
    pub const REJECT: u8 = 5;
}

/// The versions of the control protocol that a side speaks, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VersionRange {
    /// The lowest.
    pub min: u16,
    /// The highest.
    pub max: u16,
}

impl VersionRange {
    /// The highest version in both ranges.
    #[must_use]
    pub fn choose(self, other: VersionRange) -> Option<u16> {
        let max = self.max.min(other.max);
        (self.min.max(other.min) <= max).then_some(max)
    }

    /// Whether `version` is in the range.
    #[must_use]
    pub fn contains(self, version: u16) -> bool {
        (self.min..=self.max).contains(&version)
    }
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.min == self.max {
            write!(f, "{}", self.min)
        } else {
            write!(f, "{} to {}", self.min, self.max)
        }
    }
}

/// 32 fresh random bytes: they make each handshake's proofs and keys its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HandshakeNonce(#[serde(with = "fixed")] pub [u8; 32]);

impl HandshakeNonce {
    /// Fresh bytes from the operating system.
    ///
    /// # Errors
    ///
    /// The system's random source is not available.
    pub fn random() -> Result<HandshakeNonce, getrandom::Error> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)?;
        Ok(HandshakeNonce(bytes))
    }
}

/// How a side wants to be convinced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum AuthMode {
    /// It has no secret.
    None,
    /// It has a secret and demands that the other side knows it.
    SharedSecret,
}

/// What the client has come for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Role {
    /// An engine that moves KV blocks.
    Engine,
    /// A benchmark: it gets memory of its own, never KV blocks.
    Bench,
    /// A probe (`kvxfer ping`): it uses the scratch region only.
    Probe,
    /// An observer (`kvxfer layout diff HOST:PORT`): it is told the layout, and nothing to reach
    /// memory by.
    Observer,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Engine => "engine",
            Role::Bench => "bench",
            Role::Probe => "probe",
            Role::Observer => "observer",
        })
    }
}

/// The client's first frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// What it speaks. First in every version, so that any version can be told apart.
    pub versions: VersionRange,
    /// Its random bytes.
    pub nonce: HandshakeNonce,
    /// Whether it has a secret.
    pub auth: AuthMode,
    /// What it came for.
    pub role: Role,
    /// The largest payload it takes after authentication, in bytes.
    pub max_frame: u32,
}

/// The server's answer to a Hello that it can talk to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Challenge {
    /// The version that both will speak.
    pub version: u16,
    /// The server's random bytes.
    pub nonce: HandshakeNonce,
    /// Whether it has a secret.
    pub auth: AuthMode,
    /// The largest payload it takes after authentication, in bytes.
    pub max_frame: u32,
}

/// The client's proof.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Auth {
    /// See [`super::Transcript::proof`].
    #[serde(with = "fixed")]
    pub proof: [u8; 32],
}

/// The server's proof.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthOk {
    /// See [`super::Transcript::proof`].
    #[serde(with = "fixed")]
    pub proof: [u8; 32],
}

/// Why a server ends a handshake. It says no more than the client needs to mend it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "u16", into = "u16")]
pub enum RejectCode {
    /// The version ranges do not meet.
    VersionMismatch,
    /// The server has a secret, the client none.
    SecretRequired,
    /// The client has a secret, the server none.
    SecretUnexpected,
    /// The client's proof is wrong.
    NotAuthorised,
    /// Too many connections or handshakes.
    Busy,
    /// The client's frames cannot be read.
    Malformed,
    /// A code of a later version.
    Other(u16),
}

impl From<u16> for RejectCode {
    fn from(code: u16) -> Self {
        match code {
            1 => RejectCode::VersionMismatch,
            2 => RejectCode::SecretRequired,
            3 => RejectCode::SecretUnexpected,
            4 => RejectCode::NotAuthorised,
            5 => RejectCode::Busy,
            6 => RejectCode::Malformed,
            other => RejectCode::Other(other),
        }
    }
}

impl From<RejectCode> for u16 {
    fn from(code: RejectCode) -> u16 {
        match code {
            RejectCode::VersionMismatch => 1,
            RejectCode::SecretRequired => 2,
            RejectCode::SecretUnexpected => 3,
            RejectCode::NotAuthorised => 4,
            RejectCode::Busy => 5,
            RejectCode::Malformed => 6,
            RejectCode::Other(other) => other,
        }
    }
}

/// The server's refusal, in place of Challenge or AuthOk. Its layout is the same in all versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reject {
    /// Why.
    pub code: RejectCode,
    /// What the server speaks.
    pub versions: VersionRange,
}

macro_rules! codec {
    ($($type:ident $name:literal;)*) => {$(
        impl $type {
            /// The payload of its frame.
            ///
            /// # Errors
            ///
            /// [`WireError::Encode`]; none of its values gives one.
            pub fn encode(&self) -> Result<Vec<u8>, WireError> {
                pack($name, self)
            }

            /// Reads a payload.
            ///
            /// # Errors
            ///
            /// [`WireError::Decode`] or [`WireError::Trailing`].
            pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
                unpack($name, payload)
            }
        }
    )*};
}

codec! {
    Hello "Hello";
    Challenge "Challenge";
    Auth "Auth";
    AuthOk "AuthOk";
    Reject "Reject";
}

impl Hello {
    /// Reads the version range alone, of a Hello of any version.
    ///
    /// # Errors
    ///
    /// [`WireError::Decode`] when it does not begin with one, or the range is upside down.
    pub fn decode_versions(payload: &[u8]) -> Result<VersionRange, WireError> {
        let FirstOf(versions) = unpack("Hello", payload)?;
        if versions.min > versions.max {
            return Err(WireError::Decode {
                what: "Hello",
                detail: format!("version range {} to {}", versions.min, versions.max),
            });
        }
        Ok(versions)
    }
}

/// The first element of an array, whatever follows it.
struct FirstOf(VersionRange);

impl<'de> Deserialize<'de> for FirstOf {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct First;
        impl<'de> Visitor<'de> for First {
            type Value = FirstOf;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array that begins with a version range")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<FirstOf, A::Error> {
                let first = seq
                    .next_element()?
                    .ok_or_else(|| serde::de::Error::invalid_length(0, &self))?;
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(FirstOf(first))
            }
        }
        d.deserialize_seq(First)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello {
            versions: VersionRange { min: 1, max: 3 },
            nonce: HandshakeNonce([0xa5; 32]),
            auth: AuthMode::SharedSecret,
            role: Role::Bench,
            max_frame: 1 << 24,
        }
    }

    #[test]
    fn round_trips() {
        let bytes = hello().encode().unwrap();
        assert_eq!(Hello::decode(&bytes).unwrap(), hello());
        assert_eq!(Hello::decode_versions(&bytes).unwrap(), hello().versions);
        for cut in 0..bytes.len() {
            assert!(Hello::decode(&bytes[..cut]).is_err());
        }
        for code in 0..10u16 {
            let reject = Reject {
                code: code.into(),
                versions: VersionRange { min: 2, max: 2 },
            };
            let got = Reject::decode(&reject.encode().unwrap()).unwrap();
            assert_eq!((got, u16::from(got.code)), (reject, code));
        }
        let auth = Auth { proof: [7; 32] };
        let mut bytes = auth.encode().unwrap();
        assert_eq!(Auth::decode(&bytes).unwrap(), auth);
        bytes.push(0);
        assert_eq!(
            Auth::decode(&bytes),
            Err(WireError::Trailing {
                what: "Auth",
                extra: 1
            })
        );
    }

    #[test]
    fn the_versions_of_a_later_hello_can_be_read() {
        let later = pack("Hello", &((4u16, 9u16), "new", [1, 2, 3], Some(1.5))).unwrap();
        assert!(Hello::decode(&later).is_err());
        assert_eq!(
            Hello::decode_versions(&later).unwrap(),
            VersionRange { min: 4, max: 9 }
        );
        let upside_down = pack("Hello", &((4u16, 2u16),)).unwrap();
        assert!(Hello::decode_versions(&upside_down).is_err());
    }

    #[test]
    fn the_highest_common_version_is_chosen() {
        let range = |min, max| VersionRange { min, max };
        assert_eq!(range(1, 3).choose(range(2, 5)), Some(3));
        assert_eq!(range(2, 5).choose(range(1, 3)), Some(3));
        assert_eq!(range(1, 1).choose(range(1, 1)), Some(1));
        assert_eq!(range(1, 2).choose(range(3, 4)), None);
    }
}
