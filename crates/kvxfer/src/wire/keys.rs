//! The transcript of a handshake, the proofs over it and the keys drawn from it.
//!
//! ```text
//! H0  = SHA-256(label "transcript" ‖ client preamble ‖ Hello frame ‖ server preamble ‖ Challenge frame)
//! H1  = SHA-256(… ‖ Auth frame)                       the same hash, continued
//! client proof = HMAC(secret, label "client proof" ‖ H0)
//! server proof = HMAC(secret, label "server proof" ‖ H1)
//! PRK          = HMAC(H1, secret)                      HKDF-Extract with H1 as the salt
//! key(label)   = HMAC(PRK, label ‖ 0x01)               HKDF-Expand, one block
//! ```
//!
//! Every label is distinct and of a fixed length or last, so no two inputs collide. An absent secret
//! is the empty one: the proofs then show only that both sides saw the same bytes.

use std::fmt;

use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::secret::Secret;

type HmacSha256 = Hmac<Sha256>;

const TRANSCRIPT: &[u8] = b"kvxfer/1 transcript";
const CLIENT_PROOF: &[u8] = b"kvxfer/1 client proof";
const SERVER_PROOF: &[u8] = b"kvxfer/1 server proof";
const FRAMES_TO_SERVER: &[u8] = b"kvxfer/1 frames client to server";
const FRAMES_TO_CLIENT: &[u8] = b"kvxfer/1 frames server to client";
const STREAMS_TO_SERVER: &[u8] = b"kvxfer/1 streams client to server";
const STREAMS_TO_CLIENT: &[u8] = b"kvxfer/1 streams server to client";
const SESSION_ID: &[u8] = b"kvxfer/1 session id";

/// HMAC-SHA256 of the concatenated parts.
pub(crate) fn hmac(key: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    let mut mac = HmacSha256::new_from_slice(key).expect("HMAC takes keys of any length");
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

/// Compares in time that depends on the lengths only.
pub(crate) fn equal(a: &[u8], b: &[u8]) -> bool {
    a.ct_eq(b).into()
}

/// Which end of a control connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// The end that connected.
    Client,
    /// The end that listened.
    Server,
}

impl Side {
    /// The other end.
    #[must_use]
    pub fn other(self) -> Side {
        match self {
            Side::Client => Side::Server,
            Side::Server => Side::Client,
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Client => "client",
            Side::Server => "server",
        })
    }
}

/// The running hash over a handshake's bytes, in the order in which they are sent.
#[derive(Clone)]
pub struct Transcript(Sha256);

impl Transcript {
    /// A transcript of nothing yet.
    #[must_use]
    pub fn new() -> Transcript {
        Transcript(Sha256::new_with_prefix(TRANSCRIPT))
    }

    /// Adds bytes that travelled.
    pub fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn hash(&self) -> [u8; 32] {
        self.0.clone().finalize().into()
    }

    /// What `side` sends to show that it knows the secret.
    #[must_use]
    pub fn proof(&self, secret: Option<&Secret>, side: Side) -> [u8; 32] {
        let label = match side {
            Side::Client => CLIENT_PROOF,
            Side::Server => SERVER_PROOF,
        };
        hmac(secret.map_or(&[], Secret::bytes), &[label, &self.hash()])
    }

    /// Whether `proof` is what `side` would send; in constant time.
    #[must_use]
    pub fn verify(&self, secret: Option<&Secret>, side: Side, proof: &[u8; 32]) -> bool {
        equal(&self.proof(secret, side), proof)
    }

    /// The keys of the session whose handshake this is, up to and including the Auth frame.
    #[must_use]
    pub fn keys(&self, secret: Option<&Secret>) -> SessionKeys {
        let prk = Key(hmac(&self.hash(), &[secret.map_or(&[], Secret::bytes)]));
        let expand = |label: &[u8]| Key(hmac(&prk.0, &[label, &[1]]));
        let mut id = [0; 16];
        id.copy_from_slice(&expand(SESSION_ID).0[..16]);
        SessionKeys {
            id: SessionId(id),
            frames_to_server: FrameKey(expand(FRAMES_TO_SERVER)),
            frames_to_client: FrameKey(expand(FRAMES_TO_CLIENT)),
            streams_to_server: StreamKey(expand(STREAMS_TO_SERVER)),
            streams_to_client: StreamKey(expand(STREAMS_TO_CLIENT)),
        }
    }
}

impl Default for Transcript {
    fn default() -> Self {
        Transcript::new()
    }
}

impl fmt::Debug for Transcript {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Transcript(..)")
    }
}

/// A key that is never printed and is overwritten when dropped.
#[derive(Clone)]
struct Key([u8; 32]);

impl Drop for Key {
    fn drop(&mut self) {
        self.0.fill(0);
        // Without a reader the compiler may drop the store.
        std::hint::black_box(&self.0);
    }
}

/// The name of a session, by which data streams find it. Not a secret.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub [u8; 16]);

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0.iter().take(4) {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// The key that seals control frames in one direction.
#[derive(Clone)]
pub struct FrameKey(Key);

impl FrameKey {
    pub(crate) fn mac(&self, parts: &[&[u8]]) -> [u8; 32] {
        hmac(&self.0.0, parts)
    }
}

impl fmt::Debug for FrameKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FrameKey(..)")
    }
}

/// The key that vouches for data streams dialled in one direction.
#[derive(Clone)]
pub struct StreamKey(Key);

impl StreamKey {
    pub(crate) fn mac(&self, parts: &[&[u8]]) -> [u8; 32] {
        hmac(&self.0.0, parts)
    }
}

impl fmt::Debug for StreamKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StreamKey(..)")
    }
}

/// All that a handshake yields.
#[derive(Debug, Clone)]
pub struct SessionKeys {
    /// The session's name.
    pub id: SessionId,
    frames_to_server: FrameKey,
    frames_to_client: FrameKey,
    streams_to_server: StreamKey,
    streams_to_client: StreamKey,
}

impl SessionKeys {
    /// The key for control frames that `side` sends.
    #[must_use]
    pub fn frames_from(&self, side: Side) -> FrameKey {
        match side {
            Side::Client => self.frames_to_server.clone(),
            Side::Server => self.frames_to_client.clone(),
        }
    }

    /// The key for data streams that `side` dials.
    #[must_use]
    pub fn streams_from(&self, side: Side) -> StreamKey {
        match side {
            Side::Client => self.streams_to_server.clone(),
            Side::Server => self.streams_to_client.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hmac_agrees_with_rfc_4231_case_2() {
        let mac = hmac(b"Jefe", &[b"what do ya want ", b"for nothing?"]);
        let hex: String = mac.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
    }

    #[test]
    fn every_key_proof_and_id_differs() {
        let secret = Secret::new(b"0123456789abcdef".to_vec()).unwrap();
        let mut t = Transcript::new();
        t.add(b"hello");
        let keys = t.keys(Some(&secret));
        let mut all = vec![
            t.proof(Some(&secret), Side::Client),
            t.proof(Some(&secret), Side::Server),
            t.proof(None, Side::Client),
            t.proof(None, Side::Server),
        ];
        for k in [&keys, &t.keys(None)] {
            for side in [Side::Client, Side::Server] {
                all.push(k.frames_from(side).mac(&[b"x"]));
                all.push(k.streams_from(side).mac(&[b"x"]));
            }
        }
        let n = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), n);
        assert_ne!(keys.id, t.keys(None).id);
        let mut u = t.clone();
        u.add(b"!");
        assert_ne!(u.keys(Some(&secret)).id, keys.id);
    }

    #[test]
    fn keys_do_not_print_themselves() {
        let keys = Transcript::new().keys(None);
        let text = format!("{keys:?}");
        assert!(text.contains("FrameKey(..)") && text.contains("StreamKey(..)"));
    }
}
