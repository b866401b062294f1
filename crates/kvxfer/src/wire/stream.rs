//! The opening of a soft-TCP data stream: which session and queue pair it belongs to, and the proof.
//!
//! The dialler sends [`STREAM_OPENING_LEN`] bytes; the listener finds the session by its id, admits
//! the opening once, and answers with [`STREAM_ANSWER_LEN`] bytes that only it can compute. So
//! neither end moves a byte of KV to somebody who was not in the handshake.

use super::error::WireError;
use super::keys::{SessionId, StreamKey, equal};
use super::preamble::{ConnectionKind, PREAMBLE_LEN, Preamble, Sniff, sniff};

/// Bytes of a stream opening, its preamble included.
pub const STREAM_OPENING_LEN: usize = 76;
/// Bytes of the listener's answer.
pub const STREAM_ANSWER_LEN: usize = 16;

const MAC_AT: usize = STREAM_OPENING_LEN - 32;
const ANSWER: &[u8] = b"kvxfer/1 stream accepted";

/// Which half of a queue pair a stream carries, seen from the dialler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum StreamHalf {
    /// The dialler requests; the listener responds.
    Requester = 1,
    /// The listener requests; the dialler responds.
    Responder = 2,
}

/// What a dialled stream says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamOpening {
    /// The session that it belongs to.
    pub session: SessionId,
    /// The queue pair's number, as agreed on the control connection.
    pub qp: u32,
    /// Which half.
    pub half: StreamHalf,
    /// Counts the dialler's openings within the session: each number is good once.
    pub sequence: u64,
}

impl StreamOpening {
    /// The bytes to send, proof included.
    #[must_use]
    pub fn encode(&self, key: &StreamKey) -> [u8; STREAM_OPENING_LEN] {
        let mut out = [0; STREAM_OPENING_LEN];
        out[..PREAMBLE_LEN].copy_from_slice(
            &Preamble {
                kind: ConnectionKind::Stream,
            }
            .encode(),
        );
        out[12..28].copy_from_slice(&self.session.0);
        out[28..32].copy_from_slice(&self.qp.to_be_bytes());
        out[32] = self.half as u8;
        out[36..44].copy_from_slice(&self.sequence.to_be_bytes());
        let mac = key.mac(&[&out[..MAC_AT]]);
        out[MAC_AT..].copy_from_slice(&mac);
        out
    }

    /// Reads an opening, preamble included, without believing it: the session named decides whose
    /// [`StreamGate`] must admit it.
    ///
    /// # Errors
    ///
    /// Not kvxfer, not a stream, or a field out of range.
    pub fn decode(bytes: &[u8; STREAM_OPENING_LEN]) -> Result<StreamOpening, WireError> {
        match sniff(bytes)? {
            Sniff::Is(ConnectionKind::Stream) => {}
            Sniff::Is(other) => {
                return Err(WireError::ConnectionKind {
                    expected: ConnectionKind::Stream as u8,
                    got: other as u8,
                });
            }
            Sniff::NeedMore => {
                return Err(WireError::Short {
                    what: "stream opening",
                    need: STREAM_OPENING_LEN,
                    got: bytes.len(),
                });
            }
        }
        let half = match bytes[32] {
            1 => StreamHalf::Requester,
            2 => StreamHalf::Responder,
            other => {
                return Err(WireError::OutOfBounds {
                    what: "stream half",
                    got: u64::from(other),
                    max: 2,
                });
            }
        };
        if bytes[33..36] != [0; 3] {
            return Err(WireError::Reserved {
                what: "stream opening",
            });
        }
        let mut session = [0; 16];
        session.copy_from_slice(&bytes[12..28]);
        let mut qp = [0; 4];
        qp.copy_from_slice(&bytes[28..32]);
        let mut sequence = [0; 8];
        sequence.copy_from_slice(&bytes[36..44]);
        Ok(StreamOpening {
            session: SessionId(session),
            qp: u32::from_be_bytes(qp),
            half,
            sequence: u64::from_be_bytes(sequence),
        })
    }

    /// What the listener answers once it has admitted this opening.
    #[must_use]
    pub fn answer(&self, key: &StreamKey) -> [u8; STREAM_ANSWER_LEN] {
        let mac = key.mac(&[ANSWER, &self.encode(key)]);
        let mut out = [0; STREAM_ANSWER_LEN];
        out.copy_from_slice(&mac[..STREAM_ANSWER_LEN]);
        out
    }

    /// Whether the listener's answer is genuine; in constant time.
    #[must_use]
    pub fn verify_answer(&self, key: &StreamKey, answer: &[u8; STREAM_ANSWER_LEN]) -> bool {
        equal(&self.answer(key), answer)
    }
}

/// Why a stream was not admitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StreamRefused {
    /// It cannot be read.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// It is for another session.
    #[error("stream for session {got} at the gate of session {here}")]
    OtherSession {
        /// The gate's session.
        here: SessionId,
        /// The opening's.
        got: SessionId,
    },
    /// The proof is wrong.
    #[error("stream opening for queue pair {qp} fails authentication")]
    NotAuthorised {
        /// The queue pair it asked for.
        qp: u32,
    },
    /// The opening was used before, or is too old to tell.
    #[error("stream opening {sequence} was used before or is too old")]
    Replayed {
        /// Its number.
        sequence: u64,
    },
}

const WINDOW: u64 = 1024;

/// Admits each stream opening of a session once. Openings may arrive out of order by up to 1024.
#[derive(Debug, Clone)]
pub struct StreamGate {
    session: SessionId,
    key: StreamKey,
    /// One above the highest number admitted.
    top: u64,
    seen: [u64; (WINDOW / 64) as usize],
}

impl StreamGate {
    /// A gate for the streams that the peer dials under `key`.
    #[must_use]
    pub fn new(session: SessionId, key: StreamKey) -> StreamGate {
        StreamGate {
            session,
            key,
            top: 0,
            seen: [0; (WINDOW / 64) as usize],
        }
    }

    /// The session whose streams it admits.
    #[must_use]
    pub fn session(&self) -> SessionId {
        self.session
    }

    /// Admits an opening, and gives it with the answer to send back.
    ///
    /// # Errors
    ///
    /// Why it is refused. The proof is checked before the number, so a forger learns nothing and
    /// moves nothing.
    pub fn admit(
        &mut self,
        bytes: &[u8; STREAM_OPENING_LEN],
    ) -> Result<(StreamOpening, [u8; STREAM_ANSWER_LEN]), StreamRefused> {
        let opening = StreamOpening::decode(bytes)?;
        if opening.session != self.session {
            return Err(StreamRefused::OtherSession {
                here: self.session,
                got: opening.session,
            });
        }
        if !equal(&opening.encode(&self.key), bytes) {
            return Err(StreamRefused::NotAuthorised { qp: opening.qp });
        }
        if !self.note(opening.sequence) {
            return Err(StreamRefused::Replayed {
                sequence: opening.sequence,
            });
        }
        Ok((opening, opening.answer(&self.key)))
    }

    /// Marks a number as used; false if it was, or if it is below the window.
    fn note(&mut self, sequence: u64) -> bool {
        let Some(next) = sequence.checked_add(1) else {
            return false;
        };
        if next > self.top {
            // Slots between the old top and the new one are free again.
            let fresh = (next - self.top).min(WINDOW);
            for back in 0..fresh {
                self.slot(sequence - back, |word, bit| *word &= !bit);
            }
            self.top = next;
        } else if self.top - sequence > WINDOW {
            return false;
        }
        let mut new = false;
        self.slot(sequence, |word, bit| {
            new = *word & bit == 0;
            *word |= bit;
        });
        new
    }

    fn slot(&mut self, sequence: u64, f: impl FnOnce(&mut u64, u64)) {
        let at = sequence % WINDOW;
        if let Some(word) = self.seen.get_mut((at / 64) as usize) {
            f(word, 1 << (at % 64));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::keys::{Side, Transcript};
    use super::*;
    use std::collections::HashSet;

    fn keys() -> (SessionId, StreamKey) {
        let keys = Transcript::new().keys(None);
        (keys.id, keys.streams_from(Side::Client))
    }

    fn opening(session: SessionId, sequence: u64) -> StreamOpening {
        StreamOpening {
            session,
            qp: 7,
            half: StreamHalf::Responder,
            sequence,
        }
    }

    #[test]
    fn an_opening_is_admitted_once_and_answered() {
        let (id, key) = keys();
        let mut gate = StreamGate::new(id, key.clone());
        let bytes = opening(id, 3).encode(&key);
        let (got, answer) = gate.admit(&bytes).unwrap();
        assert_eq!(got, opening(id, 3));
        assert!(got.verify_answer(&key, &answer));
        assert_eq!(
            gate.admit(&bytes),
            Err(StreamRefused::Replayed { sequence: 3 })
        );
        let other = Transcript::new().keys(None).streams_from(Side::Server);
        assert!(!got.verify_answer(&other, &answer));
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let (id, key) = keys();
        let bytes = opening(id, 0).encode(&key);
        for bit in 0..STREAM_OPENING_LEN * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            let mut gate = StreamGate::new(id, key.clone());
            assert!(gate.admit(&bad).is_err(), "bit {bit}");
            // A forgery leaves the number free for the genuine one.
            assert!(gate.admit(&bytes).is_ok());
        }
    }

    proptest::proptest! {
        #[test]
        fn the_window_agrees_with_a_set(
            numbers in proptest::collection::vec(
                proptest::prop_oneof![0u64..40, 1000u64..1100, 0u64..5000, proptest::prelude::any::<u64>()],
                0..200,
            ),
        ) {
            let (id, key) = keys();
            let mut gate = StreamGate::new(id, key);
            let mut used = HashSet::new();
            let mut top = 0u128;
            for n in numbers {
                let in_window = u128::from(n) + u128::from(WINDOW) >= top && n != u64::MAX;
                let expect = in_window && used.insert(n);
                proptest::prop_assert_eq!(gate.note(n), expect, "{}", n);
                if expect {
                    top = top.max(u128::from(n) + 1);
                }
            }
        }
    }
}
