//! Tickets: what a request's two sides must know of each other, small enough for a router to relay.
//!
//! A ticket is made by one rank: an *offer* by a producer (READ mode), an *expect* by a consumer
//! (WRITE mode). It travels as bytes ([`Ticket::to_bytes`], MessagePack) or inside the JSON that
//! schedulers and routers pass around (`kv_transfer_params`; `Ticket` is serde). In JSON every
//! number that may need more than 53 bits is a hexadecimal string, so that no consumer rounds it.
//! Whatever comes in is checked against the bounds below before it becomes a `Ticket`.
//!
//! A ticket is not a secret and grants nothing by itself: keys are exchanged on the authenticated
//! control connection.

use std::fmt;
use std::time::Duration;

use serde::de::{self, SeqAccess, Visitor};
use serde::ser::SerializeSeq;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use crate::block_set::{BlocksError, MAX_BLOCKS, MAX_GROUPS, check_groups};
use crate::blocks::GroupBlocks;
use crate::ids::{EngineId, Generation, Nonce, Rank, RequestId};

/// The version this code writes and reads.
pub const TICKET_VERSION: u32 = 1;
/// Most bytes an encoded ticket may have.
pub const MAX_TICKET_BYTES: usize = 16 << 20;
/// Most bytes an engine id, a request id or an address may have.
pub const MAX_NAME_BYTES: usize = 512;
/// Most readers or senders one request may have.
pub const MAX_PARTIES: u32 = 65_536;
/// Longest time to live: seven days.
pub const MAX_TTL: Duration = Duration::from_secs(7 * 24 * 3600);

/// Which side made the ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TicketKind {
    /// A producer's: the blocks may be read.
    Offer,
    /// A consumer's: the blocks may be written.
    Expect,
}

/// Where a reader finds out whether an offer still stands: see [`crate::leases`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRef {
    /// Index of the 64-byte slot in the producer's lease table.
    pub slot: u32,
    /// The word that the slot holds while the offer stands; no other offer ever has it.
    #[serde(with = "hex_u64")]
    pub word: u64,
}

/// One rank's offer or expectation of one request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked", into = "Unchecked")]
pub struct Ticket {
    /// Offer or expect.
    pub kind: TicketKind,
    /// The engine that made it.
    pub engine: EngineId,
    /// That engine's life; a restarted engine does not honour it.
    pub generation: Generation,
    /// The rank that made it.
    pub rank: Rank,
    /// Where that rank listens, as `host:port`; `None` where it does not.
    pub addr: Option<String>,
    /// The request.
    pub request: RequestId,
    /// The try of the request.
    pub nonce: Nonce,
    /// The maker's physical blocks, in token order.
    pub groups: Vec<GroupBlocks>,
    /// The lease of an offer; an expect has none.
    pub lease: Option<LeaseRef>,
    /// Fingerprint of the maker's KV format.
    pub format: [u8; 32],
    /// How many readers (offer) or senders (expect) the request has.
    pub parties: u32,
    /// How long it stands, counted from when it was made.
    pub ttl: Duration,
}

/// Why bytes or JSON are not a usable ticket.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TicketError {
    /// Longer than any ticket may be.
    #[error("ticket of {len} bytes, at most {MAX_TICKET_BYTES} are allowed")]
    TooLong {
        /// Its length in bytes.
        len: usize,
    },
    /// Not MessagePack, or a field is missing or of another type.
    #[error("ticket does not decode")]
    Decode(#[source] rmp_serde::decode::Error),
    /// Not JSON, or a field is missing or of another type.
    #[error("ticket is not the expected JSON")]
    Json(#[source] serde_json::Error),
    /// It could not be encoded.
    #[error("ticket does not encode")]
    Encode(#[source] rmp_serde::encode::Error),
    /// Made by another version.
    #[error("ticket version {got}, this side reads {TICKET_VERSION}")]
    Version {
        /// The version it states.
        got: u32,
    },
    /// A name is empty or too long.
    #[error("ticket field {field} has {len} bytes, from 1 to {MAX_NAME_BYTES} are allowed")]
    Name {
        /// The field.
        field: &'static str,
        /// Its length in bytes.
        len: usize,
    },
    /// The address is not `host:port`.
    #[error("ticket address {addr:?} is not host:port")]
    Address {
        /// The address as given.
        addr: String,
    },
    /// The block lists are unusable.
    #[error("ticket blocks")]
    Blocks(#[from] BlocksError),
    /// No readers or senders, or too many.
    #[error("ticket for {parties} readers or senders, from 1 to {MAX_PARTIES} are allowed")]
    Parties {
        /// The number given.
        parties: u32,
    },
    /// A time to live beyond the bound.
    #[error("ticket ttl of {ms} ms, at most {} are allowed", MAX_TTL.as_millis())]
    Ttl {
        /// The time to live in milliseconds.
        ms: u64,
    },
    /// An offer without a lease, or an expect with one.
    #[error("ticket of kind {kind:?} {}", if *.has_lease { "has a lease, which only an offer has" } else { "has no lease" })]
    Lease {
        /// Its kind.
        kind: TicketKind,
        /// Whether a lease is there.
        has_lease: bool,
    },
}

impl Ticket {
    /// Encodes it as MessagePack.
    ///
    /// # Errors
    /// A field is out of bounds: what is refused on the way in is not sent either.
    pub fn to_bytes(&self) -> Result<Vec<u8>, TicketError> {
        self.check()?;
        let bytes =
            rmp_serde::to_vec_named(&Unchecked::from(self.clone())).map_err(TicketError::Encode)?;
        if bytes.len() > MAX_TICKET_BYTES {
            return Err(TicketError::TooLong { len: bytes.len() });
        }
        Ok(bytes)
    }

    /// Decodes and checks what [`to_bytes`](Self::to_bytes) made.
    ///
    /// # Errors
    /// Anything that is not a ticket of this version within the bounds of this module.
    pub fn from_bytes(bytes: &[u8]) -> Result<Ticket, TicketError> {
        if bytes.len() > MAX_TICKET_BYTES {
            return Err(TicketError::TooLong { len: bytes.len() });
        }
        // The version first: a later version may have other fields.
        let head: Head = rmp_serde::from_slice(bytes).map_err(TicketError::Decode)?;
        head.check()?;
        rmp_serde::from_slice::<Unchecked>(bytes)
            .map_err(TicketError::Decode)?
            .try_into()
    }

    /// Encodes it as a JSON object on one line.
    ///
    /// # Errors
    /// A field is out of bounds.
    pub fn to_json(&self) -> Result<String, TicketError> {
        self.check()?;
        serde_json::to_string(self).map_err(TicketError::Json)
    }

    /// Decodes and checks a JSON object.
    ///
    /// # Errors
    /// As [`from_bytes`](Self::from_bytes).
    pub fn from_json(text: &str) -> Result<Ticket, TicketError> {
        if text.len() > MAX_TICKET_BYTES {
            return Err(TicketError::TooLong { len: text.len() });
        }
        let head: Head = serde_json::from_str(text).map_err(TicketError::Json)?;
        head.check()?;
        serde_json::from_str::<Unchecked>(text)
            .map_err(TicketError::Json)?
            .try_into()
    }

    /// Number of blocks, all groups together.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.groups.iter().map(|g| g.blocks.len()).sum()
    }

    /// Checks every bound.
    ///
    /// # Errors
    /// The first field out of bounds.
    pub fn check(&self) -> Result<(), TicketError> {
        for (field, name) in [
            ("engine", Some(&*self.engine.0)),
            ("request", Some(&*self.request.0)),
            ("addr", self.addr.as_deref()),
        ] {
            let Some(name) = name else { continue };
            if name.is_empty() || name.len() > MAX_NAME_BYTES {
                return Err(TicketError::Name {
                    field,
                    len: name.len(),
                });
            }
        }
        if let Some(addr) = self.addr.as_ref().filter(|addr| !is_host_port(addr)) {
            return Err(TicketError::Address { addr: addr.clone() });
        }
        if self.parties == 0 || self.parties > MAX_PARTIES {
            return Err(TicketError::Parties {
                parties: self.parties,
            });
        }
        if self.ttl > MAX_TTL {
            return Err(TicketError::Ttl {
                ms: millis(self.ttl),
            });
        }
        if self.lease.is_some() != (self.kind == TicketKind::Offer) {
            return Err(TicketError::Lease {
                kind: self.kind,
                has_lease: self.lease.is_some(),
            });
        }
        check_groups(&self.groups)?;
        Ok(())
    }
}

/// Whole milliseconds, rounded up so that a short time to live does not become none.
fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

/// Whether it is a socket address, or a host name and a port other than 0.
pub(crate) fn is_host_port(addr: &str) -> bool {
    if let Ok(socket) = addr.parse::<std::net::SocketAddr>() {
        return socket.port() != 0;
    }
    let Some((host, port)) = addr.rsplit_once(':') else {
        return false;
    };
    let name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    !host.is_empty() && host.chars().all(name) && port.parse::<u16>().is_ok_and(|p| p != 0)
}

#[derive(Deserialize)]
struct Head {
    version: u32,
}

impl Head {
    fn check(&self) -> Result<(), TicketError> {
        if self.version == TICKET_VERSION {
            Ok(())
        } else {
            Err(TicketError::Version { got: self.version })
        }
    }
}

/// A ticket as it travels. Fields may be added within a version; unknown ones are skipped.
#[derive(Serialize, Deserialize)]
struct Unchecked {
    version: u32,
    kind: TicketKind,
    engine: EngineId,
    #[serde(with = "hex_bytes")]
    generation: [u8; 16],
    rank: Rank,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    addr: Option<String>,
    request: RequestId,
    #[serde(with = "hex_u64")]
    nonce: u64,
    groups: Vec<PackedGroup>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lease: Option<LeaseRef>,
    #[serde(with = "hex_bytes")]
    format: [u8; 32],
    parties: u32,
    ttl_ms: u64,
}

impl From<Ticket> for Unchecked {
    fn from(t: Ticket) -> Self {
        Unchecked {
            version: TICKET_VERSION,
            kind: t.kind,
            engine: t.engine,
            generation: t.generation.0,
            rank: t.rank,
            addr: t.addr,
            request: t.request,
            nonce: t.nonce.0,
            groups: t
                .groups
                .into_iter()
                .map(|g| PackedGroup {
                    group: g.group,
                    blocks: Packed(g.blocks),
                })
                .collect(),
            lease: t.lease,
            format: t.format,
            parties: t.parties,
            ttl_ms: millis(t.ttl),
        }
    }
}

impl TryFrom<Unchecked> for Ticket {
    type Error = TicketError;

    fn try_from(u: Unchecked) -> Result<Self, TicketError> {
        Head { version: u.version }.check()?;
        let ticket = Ticket {
            kind: u.kind,
            engine: u.engine,
            generation: Generation(u.generation),
            rank: u.rank,
            addr: u.addr,
            request: u.request,
            nonce: Nonce(u.nonce),
            groups: u
                .groups
                .into_iter()
                .map(|g| GroupBlocks {
                    group: g.group,
                    blocks: g.blocks.0,
                })
                .collect(),
            lease: u.lease,
            format: u.format,
            parties: u.parties,
            ttl: Duration::from_millis(u.ttl_ms),
        };
        ticket.check()?;
        Ok(ticket)
    }
}

#[derive(Serialize, Deserialize)]
struct PackedGroup {
    group: u32,
    blocks: Packed,
}

/// Block ids as a list in which three or more ids in a row are `[first, count]`.
struct Packed(Vec<u32>);

impl Serialize for Packed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let items = runs(&self.0)
            .map(|(_, n)| if n < 3 { n as usize } else { 1 })
            .sum();
        let mut seq = serializer.serialize_seq(Some(items))?;
        for (first, count) in runs(&self.0) {
            if count < 3 {
                for i in 0..count {
                    seq.serialize_element(&(first + i))?;
                }
            } else {
                seq.serialize_element(&(first, count))?;
            }
        }
        seq.end()
    }
}

/// The maximal runs of consecutive ids, in order: first id and count.
fn runs(blocks: &[u32]) -> impl Iterator<Item = (u32, u32)> {
    blocks
        .chunk_by(|a, b| a.checked_add(1) == Some(*b))
        .map(|run| {
            let count =
                u32::try_from(run.len()).expect("a run of distinct consecutive u32 fits u32");
            (run[0], count)
        })
}

impl<'de> Deserialize<'de> for Packed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Packed;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of block ids and [first, count] runs")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Packed, A::Error> {
                let mut blocks = Vec::new();
                while let Some(Run { first, count }) = seq.next_element()? {
                    // A few bytes can name four thousand million blocks: count before storing.
                    let total = blocks.len() as u64 + u64::from(count);
                    if total > MAX_BLOCKS {
                        return Err(de::Error::custom(BlocksError::TooManyBlocks {
                            blocks: total,
                            max: MAX_BLOCKS,
                        }));
                    }
                    let last = first.checked_add(count.saturating_sub(1)).ok_or_else(|| {
                        de::Error::custom(format_args!(
                            "run of {count} blocks from {first} passes the last id"
                        ))
                    })?;
                    if count > 0 {
                        blocks.extend(first..=last);
                    }
                }
                Ok(Packed(blocks))
            }
        }
        deserializer.deserialize_seq(List)
    }
}

struct Run {
    first: u32,
    count: u32,
}

impl<'de> Deserialize<'de> for Run {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Item;
        impl<'de> Visitor<'de> for Item {
            type Value = Run;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a block id or a [first, count] run")
            }

            fn visit_u64<E: de::Error>(self, id: u64) -> Result<Run, E> {
                let first = u32::try_from(id).map_err(|_| {
                    E::invalid_value(de::Unexpected::Unsigned(id), &"a 32-bit block id")
                })?;
                Ok(Run { first, count: 1 })
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Run, A::Error> {
                let first = seq
                    .next_element()?
                    .ok_or_else(|| de::Error::invalid_length(0, &"[first, count]"))?;
                let count = seq
                    .next_element()?
                    .ok_or_else(|| de::Error::invalid_length(1, &"[first, count]"))?;
                if seq.next_element::<de::IgnoredAny>()?.is_some() {
                    return Err(de::Error::invalid_length(3, &"[first, count]"));
                }
                Ok(Run { first, count })
            }
        }
        deserializer.deserialize_any(Item)
    }
}

/// A `u64` as 16 hexadecimal digits where people read, as a number where they do not.
mod hex_u64 {
    use super::{Deserialize, Deserializer, Serialize, Serializer, de};

    pub(super) fn serialize<S: Serializer>(v: &u64, s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() {
            s.collect_str(&format_args!("{v:016x}"))
        } else {
            v.serialize(s)
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
        if !d.is_human_readable() {
            return u64::deserialize(d);
        }
        let text = String::deserialize(d)?;
        let digits =
            !text.is_empty() && text.len() <= 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        match u64::from_str_radix(&text, 16) {
            Ok(v) if digits => Ok(v),
            _ => Err(de::Error::invalid_value(
                de::Unexpected::Str(&text),
                &"up to 16 hexadecimal digits",
            )),
        }
    }
}

/// Bytes as hexadecimal digits where people read, as bytes where they do not.
mod hex_bytes {
    use super::{Deserializer, Serializer, Visitor, de, fmt};

    pub(super) fn serialize<S: Serializer, const N: usize>(
        v: &[u8; N],
        s: S,
    ) -> Result<S::Ok, S::Error> {
        if !s.is_human_readable() {
            return s.serialize_bytes(v);
        }
        let digit = |n: u8| char::from_digit(u32::from(n), 16).expect("four bits are one digit");
        let text: String = v
            .iter()
            .flat_map(|b| [digit(b >> 4), digit(b & 15)])
            .collect();
        s.serialize_str(&text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>, const N: usize>(
        d: D,
    ) -> Result<[u8; N], D::Error> {
        if d.is_human_readable() {
            d.deserialize_str(Digits)
        } else {
            d.deserialize_bytes(Bytes)
        }
    }

    struct Digits<const N: usize>;

    impl<const N: usize> Visitor<'_> for Digits<N> {
        type Value = [u8; N];

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{} hexadecimal digits", 2 * N)
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<[u8; N], E> {
            let wrong = || E::invalid_value(de::Unexpected::Str(text), &self);
            let nibble = |b: u8| {
                char::from(b)
                    .to_digit(16)
                    .and_then(|d| u8::try_from(d).ok())
            };
            let mut out = [0; N];
            if text.len() != 2 * N {
                return Err(wrong());
            }
            for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
                let (high, low) = (
                    nibble(pair[0]).ok_or_else(wrong)?,
                    nibble(pair[1]).ok_or_else(wrong)?,
                );
                *byte = high << 4 | low;
            }
            Ok(out)
        }
    }

    struct Bytes<const N: usize>;

    impl<'de, const N: usize> Visitor<'de> for Bytes<N> {
        type Value = [u8; N];

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{N} bytes")
        }

        fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<[u8; N], E> {
            bytes
                .try_into()
                .map_err(|_| E::invalid_length(bytes.len(), &self))
        }
    }
}
