//! The first bytes of a connection: what it is, and whether the other end is kvxfer at all.

use super::error::{Saw, WireError};

/// A byte that no text protocol begins with, the name, and a line feed that a text-mode relay would
/// change.
const MAGIC: [u8; 8] = *b"\x8bKVXFER\n";
const FRAMING: u8 = 1;

/// Bytes of a preamble.
pub const PREAMBLE_LEN: usize = 12;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ConnectionKind {
    /// The control connection of a peer.
    Control = 1,
    /// One half of a soft queue pair over TCP.
    Stream = 2,
}

/// Magic, kind and framing version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// What the connection is for.
    pub kind: ConnectionKind,
}

impl Preamble {
    /// The bytes on the wire.
    #[must_use]
    pub fn encode(self) -> [u8; PREAMBLE_LEN] {
        let mut out = [0; PREAMBLE_LEN];
        out[..8].copy_from_slice(&MAGIC);
        out[8] = FRAMING;
        out[9] = self.kind as u8;
        out
    }

    fn decode(bytes: &[u8; PREAMBLE_LEN]) -> Result<Preamble, WireError> {
        let [magic @ .., framing, kind, r0, r1] = bytes;
        if *magic != MAGIC {
            return Err(WireError::NotKvxfer {
                saw: Saw::recognise(bytes),
            });
        }
        if *framing != FRAMING {
            return Err(WireError::Framing {
                theirs: *framing,
                ours: FRAMING,
            });
        }
        if (*r0, *r1) != (0, 0) {
            return Err(WireError::Reserved { what: "preamble" });
        }
        let kind = match kind {
            1 => ConnectionKind::Control,
            2 => ConnectionKind::Stream,
            other => {
                return Err(WireError::ConnectionKind {
                    expected: ConnectionKind::Control as u8,
                    got: *other,
                });
            }
        };
        Ok(Preamble { kind })
    }
}

/// What is known of a connection after some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sniff {
    /// All bytes so far fit; more are needed.
    NeedMore,
    /// The preamble is complete.
    Is(ConnectionKind),
}

/// Looks at the first bytes of an accepted connection without consuming them, so that a listener can
/// hand the connection, and the same bytes, to whoever serves its kind.
///
/// # Errors
///
/// [`WireError::NotKvxfer`] at the first byte that does not fit, or what else is wrong with the
/// preamble.
pub fn sniff(bytes: &[u8]) -> Result<Sniff, WireError> {
    let n = bytes.len().min(MAGIC.len());
    if bytes.get(..n) != MAGIC.get(..n) {
        return Err(WireError::NotKvxfer {
            saw: Saw::recognise(bytes),
        });
    }
    match bytes.first_chunk::<PREAMBLE_LEN>() {
        Some(whole) => Preamble::decode(whole).map(|p| Sniff::Is(p.kind)),
        None => Ok(Sniff::NeedMore),
    }
}

/// Collects a preamble from whatever pieces it arrives in.
#[derive(Debug, Default)]
pub struct PreambleReader {
    bytes: Vec<u8>,
}

impl PreambleReader {
    /// A reader that has seen nothing.
    #[must_use]
    pub fn new() -> PreambleReader {
        PreambleReader::default()
    }

    /// Takes bytes; returns the preamble when it is complete, and how many of `input` it used.
    ///
    /// # Errors
    ///
    /// As [`sniff`].
    pub fn push(&mut self, input: &[u8]) -> Result<(Option<Preamble>, usize), WireError> {
        let take = (PREAMBLE_LEN - self.bytes.len()).min(input.len());
        let (mine, rest) = input.split_at(take);
        self.bytes.extend_from_slice(mine);
        match sniff(&self.bytes) {
            Ok(Sniff::Is(kind)) => Ok((Some(Preamble { kind }), take)),
            Ok(Sniff::NeedMore) => Ok((None, take)),
            Err(WireError::NotKvxfer { .. }) => {
                // Bytes beyond the preamble may help to name what this is.
                self.bytes.extend(rest.iter().take(16));
                Err(WireError::NotKvxfer {
                    saw: Saw::recognise(&self.bytes),
                })
            }
            Err(other) => Err(other),
        }
    }

    /// Whether any byte has come.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_in_any_pieces() {
        for kind in [ConnectionKind::Control, ConnectionKind::Stream] {
            let bytes = Preamble { kind }.encode();
            for cut in 0..PREAMBLE_LEN {
                let (a, b) = bytes.split_at(cut);
                let mut reader = PreambleReader::new();
                assert_eq!(reader.push(a).unwrap(), (None, cut));
                let more = [b, b"tail"].concat();
                let (got, used) = reader.push(&more).unwrap();
                assert_eq!((got, used), (Some(Preamble { kind }), PREAMBLE_LEN - cut));
            }
        }
    }

    #[test]
    fn strangers_are_named() {
        let cases: [(&[u8], &str); 8] = [
            (b"GET / HTTP/1.1\r\n", "HTTP"),
            (b"HTTP/1.1 400 Bad Request", "HTTP"),
            (b"\x16\x03\x01\x02\x00\x01", "TLS"),
            (b"\x15\x03\x03\x00\x02\x02\x28", "TLS"),
            (b"SSH-2.0-OpenSSH_9.2", "SSH"),
            (b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03", "ZeroMQ"),
            (b"*1\r\n$4\r\nPING\r\n", "Redis"),
            (b"\x00\x01\x02\xfe", "\"\\x00\\x01\\x02\\xfe\""),
        ];
        for (bytes, name) in cases {
            let error = PreambleReader::new().push(bytes).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
            assert_eq!(sniff(bytes), Err(error));
        }
    }

    #[test]
    fn later_framings_and_reserved_bits_are_refused() {
        let good = Preamble {
            kind: ConnectionKind::Control,
        }
        .encode();
        let mut bad = good;
        bad[8] = 2;
        assert_eq!(sniff(&bad), Err(WireError::Framing { theirs: 2, ours: 1 }));
        let mut bad = good;
        bad[9] = 9;
        assert!(matches!(
            sniff(&bad),
            Err(WireError::ConnectionKind { got: 9, .. })
        ));
        let mut bad = good;
        bad[11] = 1;
        assert_eq!(sniff(&bad), Err(WireError::Reserved { what: "preamble" }));
    }
}
