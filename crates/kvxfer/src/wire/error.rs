//! What can be wrong with bytes from outside.

use std::fmt;

use crate::rails::RailSet;

/// Why bytes were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The other end speaks something else.
    #[error("peer is not kvxfer: {saw}; check the address and port")]
    NotKvxfer {
        /// What its first bytes look like.
        saw: Saw,
    },
    /// The magic is right, but the bytes after it are of a later framing.
    #[error("peer uses framing {theirs}, this build speaks framing {ours}; upgrade the older side")]
    Framing {
        /// The peer's framing version.
        theirs: u8,
        /// Ours.
        ours: u8,
    },
    /// The connection is for something that was not expected here.
    #[error("connection opened as kind {got}, expected {expected}")]
    ConnectionKind {
        /// The kind asked for.
        expected: u8,
        /// The kind named in the preamble.
        got: u8,
    },
    /// A frame announces more than is allowed.
    #[error("frame of {len} bytes announced, at most {max} allowed")]
    FrameTooLarge {
        /// Announced payload bytes.
        len: u64,
        /// The limit in force.
        max: u32,
    },
    /// A frame's authentication tag is wrong.
    #[error("frame {sequence} fails authentication: altered, or sealed under another key")]
    BadMac {
        /// The sequence number that was due.
        sequence: u64,
    },
    /// A genuine frame came twice, or one is missing.
    #[error("frame {got} came where frame {expected} was due: replayed, lost or reordered")]
    OutOfSequence {
        /// The number due.
        expected: u64,
        /// The number it carries.
        got: u64,
    },
    /// Bits that must be zero are not.
    #[error("reserved bits set in {what}")]
    Reserved {
        /// Where.
        what: &'static str,
    },
    /// A frame type that this version does not have.
    #[error("unknown frame type {code:#04x}")]
    UnknownFrame {
        /// The type byte.
        code: u8,
    },
    /// The payload is not what its frame type says.
    #[error("cannot decode {what}: {detail}")]
    Decode {
        /// What was being decoded.
        what: &'static str,
        /// The decoder's words.
        detail: String,
    },
    /// A value of ours cannot be encoded.
    #[error("cannot encode {what}: {detail}")]
    Encode {
        /// What was being encoded.
        what: &'static str,
        /// The encoder's words.
        detail: String,
    },
    /// The payload goes on after its value.
    #[error("{extra} bytes after {what}")]
    Trailing {
        /// What was decoded.
        what: &'static str,
        /// Bytes left over.
        extra: usize,
    },
    /// A size, a count or a range is beyond what the protocol allows.
    #[error("{what} is {got}, at most {max} allowed")]
    OutOfBounds {
        /// The field.
        what: &'static str,
        /// Its value.
        got: u64,
        /// The limit.
        max: u64,
    },
    /// A memory range that wraps around or is empty.
    #[error("{what} of {len} bytes at {addr:#x} is not a range of memory")]
    BadSpan {
        /// The field.
        what: &'static str,
        /// Its first byte.
        addr: u64,
        /// Its length.
        len: u64,
    },
    /// A list of no units.
    #[error("a list of units to work checksums out of has none")]
    NoUnits,
    /// Bytes that should be checksums.
    #[error("{len} bytes of checksums, which are 8 bytes each")]
    BadSums {
        /// How many there are.
        len: usize,
    },
    /// Bytes that should be pairs of units.
    #[error("{len} bytes of pairs of units, which are 8 bytes each, and at least one")]
    BadPairs {
        /// How many there are.
        len: usize,
    },
    /// Bytes that should be stretches of memory.
    #[error(
        "{len} bytes of stretches, which are 16 bytes each, at least one, and none of no bytes"
    )]
    BadStretches {
        /// How many there are.
        len: usize,
    },
    /// A rail that is not one of those that it is said to be of.
    #[error("rail {rail} is not among {rails}")]
    BadRail {
        /// The rail.
        rail: u16,
        /// Those it should be one of.
        rails: RailSet,
    },
    /// A text with control characters.
    #[error("{what} holds control characters")]
    BadText {
        /// The field.
        what: &'static str,
    },
    /// Fewer bytes than a fixed structure has.
    #[error("{what} takes {need} bytes, got {got}")]
    Short {
        /// The structure.
        what: &'static str,
        /// Its size.
        need: usize,
        /// What there was.
        got: usize,
    },
}

/// What the first bytes of something that is not kvxfer look like.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Saw {
    /// An HTTP request or response.
    Http,
    /// A TLS record.
    Tls,
    /// An SSH banner.
    Ssh,
    /// A ZeroMQ greeting, as other connectors' side channels use.
    ZeroMq,
    /// A Redis command or reply.
    Redis,
    /// Something else; at most its first eight bytes.
    Bytes(Vec<u8>),
}

impl Saw {
    /// Names the protocol that `bytes` begin with.
    #[must_use]
    pub fn recognise(bytes: &[u8]) -> Saw {
        const HTTP: [&[u8]; 10] = [
            b"GET ", b"POST", b"PUT ", b"HEAD", b"DELE", b"OPTI", b"CONN", b"PATC", b"PRI ",
            b"HTTP",
        ];
        if HTTP.iter().any(|word| bytes.starts_with(word)) {
            Saw::Http
        } else if bytes.starts_with(b"SSH-") {
            Saw::Ssh
        } else if matches!(bytes, [0x14..=0x17, 0x03, 0x00..=0x04, ..]) {
            Saw::Tls
        } else if bytes.first() == Some(&0xff) && (bytes.len() < 10 || bytes.get(9) == Some(&0x7f))
        {
            Saw::ZeroMq
        } else if matches!(bytes, [b'*', b'0'..=b'9', ..])
            || bytes.starts_with(b"-ERR")
            || bytes.starts_with(b"+OK")
        {
            Saw::Redis
        } else {
            Saw::Bytes(bytes.iter().take(8).copied().collect())
        }
    }
}

impl fmt::Display for Saw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Saw::Http => f.write_str("it speaks HTTP"),
            Saw::Tls => f.write_str("it speaks TLS"),
            Saw::Ssh => f.write_str("it speaks SSH"),
            Saw::ZeroMq => f.write_str("it speaks ZeroMQ"),
            Saw::Redis => f.write_str("it speaks the Redis protocol"),
            Saw::Bytes(bytes) => write!(f, "it begins with \"{}\"", bytes.escape_ascii()),
        }
    }
}
