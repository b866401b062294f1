//! Frames: a 16-byte header, a payload, and, once the handshake has yielded keys, a 16-byte tag.
//!
//! ```text
//!  0        4    5     6        8             16            16+len       16+len+16
//!  | len u32 | type | flags | reserved u16 | sequence u64 | payload … | tag (sealed only) |
//! ```
//!
//! Integers are big-endian. The tag is HMAC-SHA256 under the sender's direction key over header and
//! payload, cut to 16 bytes. Whether a frame is sealed is a matter of the connection's state, never
//! of a bit that the sender could clear.

use super::error::WireError;
use super::keys::{FrameKey, equal};

/// Bytes of a frame's header.
pub const HEADER_LEN: usize = 16;
/// Bytes of a sealed frame's tag.
pub const TAG_LEN: usize = 16;

/// One frame, authenticated if the reader has a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The type byte.
    pub kind: u8,
    /// Its number within its direction, from zero.
    pub sequence: u64,
    /// The payload.
    pub payload: Vec<u8>,
}

impl Frame {
    /// The header's bytes.
    #[must_use]
    pub fn header(&self) -> [u8; HEADER_LEN] {
        // A payload is bounded by a u32 limit on both ways in.
        let len = u32::try_from(self.payload.len()).unwrap_or(u32::MAX);
        header(len, self.kind, self.sequence)
    }
}

fn header(len: u32, kind: u8, sequence: u64) -> [u8; HEADER_LEN] {
    let mut out = [0; HEADER_LEN];
    out[..4].copy_from_slice(&len.to_be_bytes());
    out[4] = kind;
    out[8..].copy_from_slice(&sequence.to_be_bytes());
    out
}

/// Numbers and seals the frames of one direction.
#[derive(Debug)]
pub struct FrameWriter {
    key: Option<FrameKey>,
    next: u64,
}

impl FrameWriter {
    /// A writer of unsealed frames.
    #[must_use]
    pub fn new() -> FrameWriter {
        FrameWriter { key: None, next: 0 }
    }

    /// Seals every frame from now on. Numbers go on.
    pub fn seal(&mut self, key: FrameKey) {
        self.key = Some(key);
    }

    /// The number of the next frame.
    #[must_use]
    pub fn next_sequence(&self) -> u64 {
        self.next
    }

    /// Appends a frame to `out`.
    ///
    /// # Errors
    ///
    /// [`WireError::FrameTooLarge`] if the payload is over `max` bytes; nothing is written then.
    pub fn write(
        &mut self,
        kind: u8,
        payload: &[u8],
        max: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), WireError> {
        let len = u32::try_from(payload.len())
            .ok()
            .filter(|len| *len <= max)
            .ok_or(WireError::FrameTooLarge {
                len: payload.len() as u64,
                max,
            })?;
        let header = header(len, kind, self.next);
        self.next += 1;
        out.reserve(HEADER_LEN + payload.len() + TAG_LEN);
        out.extend_from_slice(&header);
        out.extend_from_slice(payload);
        if let Some(key) = &self.key {
            let mac = key.mac(&[&header, payload]);
            out.extend_from_slice(&mac[..TAG_LEN]);
        }
        Ok(())
    }
}

impl Default for FrameWriter {
    fn default() -> Self {
        FrameWriter::new()
    }
}

/// Cuts a byte stream into frames and checks each one's bounds, tag and number.
///
/// It stores the bytes that arrived and never reserves room for more than a frame within bounds
/// announces. After an error the stream has no known boundaries: every later call gives that error.
#[derive(Debug)]
pub struct FrameReader {
    key: Option<FrameKey>,
    max: u32,
    next: u64,
    buf: Vec<u8>,
    /// Bytes at the front of `buf` that were frames already returned.
    used: usize,
    failed: Option<WireError>,
}

impl FrameReader {
    /// A reader of unsealed frames with payloads of at most `max` bytes.
    #[must_use]
    pub fn new(max: u32) -> FrameReader {
        FrameReader {
            key: None,
            max,
            next: 0,
            buf: Vec::new(),
            used: 0,
            failed: None,
        }
    }

    /// Expects sealed frames from now on, with payloads of at most `max` bytes. Numbers go on.
    pub fn unseal(&mut self, key: FrameKey, max: u32) {
        self.key = Some(key);
        self.max = max;
    }

    /// Takes bytes as they arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.failed.is_some() {
            return;
        }
        if self.used > 0 {
            self.buf.drain(..self.used);
            self.used = 0;
        }
        let need = self.buf.len() + bytes.len();
        if need > self.buf.capacity() {
            // Grow by doubling, as arriving bytes justify it, but not past the frame at hand.
            let frame = self.announced().unwrap_or(0);
            let target = (self.buf.capacity() * 2).min(frame).max(need);
            self.buf.reserve_exact(target - self.buf.len());
        }
        self.buf.extend_from_slice(bytes);
    }

    /// Bytes stored and not yet returned.
    #[must_use]
    pub fn buffered(&self) -> usize {
        self.buf.len() - self.used
    }

    /// The whole size of the frame that the buffer begins with, if its header is there and in bounds.
    fn announced(&self) -> Option<usize> {
        let len = u32::from_be_bytes(*self.buf.get(self.used..)?.first_chunk()?);
        let tag = if self.key.is_some() { TAG_LEN } else { 0 };
        (len <= self.max).then_some(HEADER_LEN + len as usize + tag)
    }

    /// The next whole frame, or `None` until more bytes come.
    ///
    /// # Errors
    ///
    /// What is wrong with the stream; it cannot be read any further.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, WireError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = self.parse();
        if let Err(error) = &result {
            self.failed = Some(error.clone());
            self.buf = Vec::new();
            self.used = 0;
        }
        result
    }

    fn parse(&mut self) -> Result<Option<Frame>, WireError> {
        let bytes = self.buf.get(self.used..).unwrap_or_default();
        let Some(len) = bytes.first_chunk().map(|b| u32::from_be_bytes(*b)) else {
            return Ok(None);
        };
        // The length is believed as far as its bound only; the tag covers it.
        if len > self.max {
            return Err(WireError::FrameTooLarge {
                len: u64::from(len),
                max: self.max,
            });
        }
        let Some((head, rest)) = bytes.split_first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        let Some((payload, rest)) = rest.split_at_checked(len as usize) else {
            return Ok(None);
        };
        let tag_len = match &self.key {
            None => 0,
            Some(key) => {
                let Some(tag) = rest.first_chunk::<TAG_LEN>() else {
                    return Ok(None);
                };
                let mac = key.mac(&[head, payload]);
                if !equal(&mac[..TAG_LEN], tag) {
                    return Err(WireError::BadMac {
                        sequence: self.next,
                    });
                }
                TAG_LEN
            }
        };
        let [_, _, _, _, kind, flags, r0, r1, s @ ..] = *head;
        let sequence = u64::from_be_bytes(s);
        if sequence != self.next {
            return Err(WireError::OutOfSequence {
                expected: self.next,
                got: sequence,
            });
        }
        if (flags, r0, r1) != (0, 0, 0) {
            return Err(WireError::Reserved {
                what: "frame header",
            });
        }
        let frame = Frame {
            kind,
            sequence,
            payload: payload.to_vec(),
        };
        self.used += HEADER_LEN + len as usize + tag_len;
        self.next += 1;
        if self.used == self.buf.len() {
            self.used = 0;
            self.buf.clear();
            // One large frame should not hold its memory for the life of an idle connection.
            self.buf.shrink_to(64 * 1024);
        }
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use super::super::keys::{Side, Transcript};
    use super::*;

    fn key(side: Side) -> FrameKey {
        Transcript::new().keys(None).frames_from(side)
    }

    fn sealed(payloads: &[&[u8]]) -> Vec<u8> {
        let mut writer = FrameWriter::new();
        writer.seal(key(Side::Client));
        let mut out = Vec::new();
        for (i, p) in payloads.iter().enumerate() {
            writer.write(i as u8, p, 1 << 20, &mut out).unwrap();
        }
        out
    }

    fn reader() -> FrameReader {
        let mut reader = FrameReader::new(64);
        reader.unseal(key(Side::Client), 1 << 20);
        reader
    }

    #[test]
    fn no_flipped_bit_yields_a_frame() {
        let good = sealed(&[b"0123456789"]);
        let mut flips = 0;
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let mut reader = reader();
            reader.push(&bad);
            match reader.next_frame() {
                Err(WireError::BadMac { sequence: 0 }) => flips += 1,
                // A changed length may ask for more bytes, or for too many.
                Ok(None) | Err(WireError::FrameTooLarge { .. }) => assert!(bit < 32, "bit {bit}"),
                other => panic!("bit {bit}: {other:?}"),
            }
        }
        assert!(flips >= (good.len() - 4) * 8);
    }

    #[test]
    fn replay_reorder_and_loss_are_told_from_forgery() {
        let one = sealed(&[b"a"]);
        let two = sealed(&[b"a", b"b"]);
        let second = &two[one.len()..];
        let mut r = reader();
        r.push(&one);
        r.push(&one);
        assert!(r.next_frame().unwrap().is_some());
        let replay = WireError::OutOfSequence {
            expected: 1,
            got: 0,
        };
        assert_eq!(r.next_frame(), Err(replay.clone()));
        r.push(second);
        assert_eq!(r.next_frame(), Err(replay), "an error is final");
        let mut r = reader();
        r.push(second);
        r.push(&one);
        assert_eq!(
            r.next_frame(),
            Err(WireError::OutOfSequence {
                expected: 0,
                got: 1
            })
        );
        // The other direction's key does not open it.
        let mut r = FrameReader::new(64);
        r.unseal(key(Side::Server), 64);
        r.push(&one);
        assert_eq!(r.next_frame(), Err(WireError::BadMac { sequence: 0 }));
    }

    #[test]
    fn an_announcement_alone_reserves_nothing() {
        let mut r = FrameReader::new(16 << 20);
        let mut header = header(16 << 20, 1, 0).to_vec();
        header.push(0);
        r.push(&header);
        assert_eq!(r.next_frame(), Ok(None));
        assert!(r.buf.capacity() < 64);
        for _ in 0..1000 {
            r.push(&[0; 100]);
            assert_eq!(r.next_frame(), Ok(None));
        }
        assert!(r.buf.capacity() < 300_000);
        let mut r = FrameReader::new(1000);
        r.push(&1001u32.to_be_bytes());
        assert_eq!(
            r.next_frame(),
            Err(WireError::FrameTooLarge {
                len: 1001,
                max: 1000
            })
        );
    }

    #[test]
    fn unsealed_frames_are_numbered_and_reserved_bits_refused() {
        let mut w = FrameWriter::new();
        let mut out = Vec::new();
        w.write(9, b"x", 10, &mut out).unwrap();
        assert_eq!(
            w.write(9, &[0; 11], 10, &mut out),
            Err(WireError::FrameTooLarge { len: 11, max: 10 })
        );
        w.write(8, b"", 10, &mut out).unwrap();
        let mut r = FrameReader::new(10);
        r.push(&out);
        assert_eq!(
            r.next_frame(),
            Ok(Some(Frame {
                kind: 9,
                sequence: 0,
                payload: b"x".to_vec()
            }))
        );
        let second = r.next_frame().unwrap().unwrap();
        assert_eq!(
            (second.kind, second.sequence, second.header()[4]),
            (8, 1, 8)
        );
        for at in 5..8 {
            let mut bad = out.clone();
            bad[at] = 1;
            let mut r = FrameReader::new(10);
            r.push(&bad);
            assert_eq!(
                r.next_frame(),
                Err(WireError::Reserved {
                    what: "frame header"
                })
            );
        }
    }
}
