//! The parts that messages are made of, and the limits on them.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::blob::Blob;
use super::error::WireError;

/// The most of everything that a message may hold. A peer that exceeds one is cut off.
pub mod limits {
    /// Bytes of an engine's name.
    pub const ENGINE_ID: usize = 256;
    /// Bytes of a request's name.
    pub const REQUEST_ID: usize = 1024;
    /// Bytes of a text for people.
    pub const TEXT: usize = 2048;
    /// Bytes of an encoded format.
    pub const FORMAT: usize = 4 << 20;
    /// Bytes of an encoded placement.
    pub const PLACEMENT: usize = 8 << 20;
    /// Rails (devices) of one rank.
    pub const RAILS: usize = 16;
    /// Memories of one rank.
    pub const MEMORIES: usize = 4096;
    /// Bytes of a device address.
    pub const DEVICE: usize = 4096;
    /// Candidate paths in an offer.
    pub const CANDIDATES: usize = 64;
    /// Endpoints (queue pairs) in an offer.
    pub const ENDPOINTS: usize = 4096;
    /// Bytes of one endpoint.
    pub const ENDPOINT: usize = 1024;
    /// Bytes of a ticket.
    pub const TICKET: usize = 8 << 20;
    /// Bytes of a handle of a GPU's memory.
    pub const HANDLE: usize = 512;
    /// A token of shared memory, in bytes.
    pub const TOKEN: usize = 16;
    /// Bytes that a side which stages takes at a time: no fewer.
    pub const LEAST_STAGED: u64 = 1 << 16;
    /// Stretches of memory that are staged together.
    pub const STRETCHES: usize = 1 << 13;
    /// Bytes of an encoded cause.
    pub const CAUSE: usize = 4096;
    /// Units that checksums are asked for at once.
    pub const UNITS: usize = 1 << 21;
    /// Lists of them.
    pub const UNIT_LISTS: usize = 1024;
    /// Bytes of checksums in one message.
    pub const SUMS: usize = 1 << 20;
    /// Immediates in one message.
    pub const IMMEDIATES: usize = 2048;
    /// Bytes of a benchmark's own message.
    pub const BENCH: usize = 8 << 20;
}

/// Refuses a size or count over `max`.
pub(crate) fn bounded(what: &'static str, got: usize, max: usize) -> Result<(), WireError> {
    if got > max {
        return Err(WireError::OutOfBounds {
            what,
            got: got as u64,
            max: max as u64,
        });
    }
    Ok(())
}

/// Refuses a text that is too long or would play tricks on a terminal.
pub(crate) fn text(what: &'static str, s: &str, max: usize) -> Result<(), WireError> {
    bounded(what, s.len(), max)?;
    if s.chars().any(char::is_control) {
        return Err(WireError::BadText { what });
    }
    Ok(())
}

/// A text fit to be sent: control characters replaced, cut at the limit.
pub(crate) fn clean(s: &str) -> String {
    let mut out = String::new();
    for c in s.chars() {
        let c = if c.is_control() { ' ' } else { c };
        if out.len() + c.len_utf8() > limits::TEXT {
            break;
        }
        out.push(c);
    }
    out
}

/// What an engine does with KV blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum KvRole {
    /// It offers and pushes.
    Producer,
    /// It pulls and expects.
    Consumer,
    /// Both.
    Both,
}

impl KvRole {
    /// As it is written in a configuration.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            KvRole::Producer => "kv_producer",
            KvRole::Consumer => "kv_consumer",
            KvRole::Both => "kv_both",
        }
    }

    /// Whether it offers and pushes.
    #[must_use]
    pub const fn produces(self) -> bool {
        matches!(self, KvRole::Producer | KvRole::Both)
    }

    /// Whether it pulls and expects.
    #[must_use]
    pub const fn consumes(self) -> bool {
        matches!(self, KvRole::Consumer | KvRole::Both)
    }
}

impl fmt::Display for KvRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Units of one group that checksums are of, on one side; those of a unit follow each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SumsOf {
    /// Index of the cache group.
    pub group: u32,
    /// The layer; `None`: all layers that the two ranks exchange.
    pub layer: Option<u32>,
    /// Unit numbers: block × units of a block + place in the block.
    pub units: Vec<u32>,
}

/// Checks lists of units.
pub(crate) fn check_units<'a>(
    lists: impl IntoIterator<Item = &'a SumsOf>,
) -> Result<(), WireError> {
    let (mut count, mut units) = (0, 0_usize);
    for list in lists {
        if list.units.is_empty() {
            return Err(WireError::NoUnits);
        }
        count += 1;
        units = units.saturating_add(list.units.len());
    }
    bounded("number of unit lists", count, limits::UNIT_LISTS)?;
    bounded("number of units", units, limits::UNITS)
}

/// Units of one group that a consumer is to fetch, with what they are at the producer and at the consumer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakeOf {
    /// Index of the cache group.
    pub group: u32,
    /// The producer's unit, then the consumer's, 4 bytes each, the lowest first; and so on.
    pub pairs: Blob,
}

impl TakeOf {
    /// Packs pairs of units.
    pub(crate) fn new(group: u32, pairs: impl Iterator<Item = (u32, u32)>) -> Self {
        let bytes = pairs.flat_map(|(src, dst)| {
            let pair = u64::from(dst) << 32 | u64::from(src);
            pair.to_le_bytes()
        });
        let pairs = Blob(bytes.collect());
        Self { group, pairs }
    }

    /// The pairs: the producer's unit and the consumer's.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the halves are what is wanted"
    )]
    pub(crate) fn pairs(&self) -> impl ExactSizeIterator<Item = (u32, u32)> + '_ {
        unpack_sums(&self.pairs).map(|pair| (pair as u32, (pair >> 32) as u32))
    }

    /// How many pairs there are.
    pub(crate) fn check(&self) -> Result<usize, WireError> {
        let len = self.pairs.len();
        match len > 0 && len.is_multiple_of(8) {
            true => Ok(len / 8),
            false => Err(WireError::BadPairs { len }),
        }
    }
}

/// A contiguous part of a memory that is to be staged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stretch {
    /// The memory, by its place in the placement.
    pub memory: u32,
    /// Bytes; never none.
    pub len: u32,
    /// Bytes from the memory's first.
    pub offset: u64,
}

impl Stretch {
    const BYTES: usize = 16;

    /// Packs stretches: memory, length and offset of each, the lowest byte first.
    pub(crate) fn pack(stretches: impl Iterator<Item = Self>) -> Blob {
        let bytes = stretches.flat_map(|of| {
            let word =
                u128::from(of.offset) << 64 | u128::from(of.len) << 32 | u128::from(of.memory);
            word.to_le_bytes()
        });
        Blob(bytes.collect())
    }

    /// Reads what [`pack`](Self::pack) has made.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the parts are what is wanted"
    )]
    pub(crate) fn unpack(blob: &Blob) -> impl ExactSizeIterator<Item = Self> + '_ {
        blob.0.chunks_exact(Self::BYTES).map(|bytes| {
            let mut word = [0; Self::BYTES];
            word.copy_from_slice(bytes);
            let word = u128::from_le_bytes(word);
            Self {
                memory: word as u32,
                len: (word >> 32) as u32,
                offset: (word >> 64) as u64,
            }
        })
    }

    /// Checks that bytes are stretches, and not too many.
    pub(crate) fn check_all(blob: &Blob) -> Result<(), WireError> {
        let len = blob.len();
        if len == 0 || !len.is_multiple_of(Self::BYTES) {
            return Err(WireError::BadStretches { len });
        }
        bounded("number of stretches", len / Self::BYTES, limits::STRETCHES)?;
        match Self::unpack(blob).all(|of| of.len > 0) {
            true => Ok(()),
            false => Err(WireError::BadStretches { len }),
        }
    }
}

/// Checksums as they travel: 8 bytes each, the lowest first.
pub(crate) fn pack_sums(sums: &[u64]) -> Blob {
    Blob(sums.iter().flat_map(|sum| sum.to_le_bytes()).collect())
}

/// Reads what [`pack_sums`] has made.
pub(crate) fn unpack_sums(blob: &Blob) -> impl ExactSizeIterator<Item = u64> + '_ {
    blob.0.chunks_exact(8).map(|bytes| {
        let mut word = [0; 8];
        word.copy_from_slice(bytes);
        u64::from_le_bytes(word)
    })
}

/// Checks that bytes are checksums, and not too many.
pub(crate) fn check_sums(blob: &Blob) -> Result<(), WireError> {
    bounded("size of checksums", blob.len(), limits::SUMS)?;
    match blob.len() % 8 {
        0 => Ok(()),
        _ => Err(WireError::BadSums { len: blob.len() }),
    }
}

/// A range of a peer's registered memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RemoteSpan {
    /// The peer's address of its first byte.
    pub addr: u64,
    /// Its length in bytes, at least one.
    pub len: u64,
    /// The key that opens it.
    pub rkey: u32,
}

impl RemoteSpan {
    pub(crate) fn check(&self, what: &'static str) -> Result<(), WireError> {
        if self.len == 0 || self.addr.checked_add(self.len).is_none() {
            return Err(WireError::BadSpan {
                what,
                addr: self.addr,
                len: self.len,
            });
        }
        Ok(())
    }

    /// Whether `len` bytes from `offset` lie inside.
    #[must_use]
    pub fn contains(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len)
    }
}

impl fmt::Debug for RemoteSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Keys are never logged.
        write!(f, "RemoteSpan({:#x}+{}, rkey ..)", self.addr, self.len)
    }
}

/// Settings of a side that its peer settles against its own.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct ConfigFacts {
    /// Queue pairs per peer and rail.
    pub qp_per_transfer: u32,
    /// Work requests in a send queue.
    pub max_send_wr: u32,
    /// Gather entries of a work request.
    pub max_msg_sge: u32,
    /// The largest message of the device, in bytes.
    pub max_msg_bytes: u64,
    /// Whether it takes notices on the data plane.
    pub enable_notification: bool,
    /// Worker threads.
    pub num_worker_threads: u32,
    /// The TCP port it listens on, 0 if none: where a peer may connect back.
    pub listen_port: u16,
}

/// A way for blocks to travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum PathKind {
    /// Shared arenas on the same host.
    Arena,
    /// `process_vm_readv` on the same host.
    ProcessVm,
    /// Soft verbs over TCP.
    Tcp,
    /// RDMA hardware.
    Rdma,
    /// GPU links inside a node: a GPU copies, between its memory and another's or the host's.
    Ipc,
    /// Through pinned host memory, which queue pairs carry by one of the other ways.
    Staged,
}

impl PathKind {
    /// The name that the command and its JSON use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            PathKind::Arena => "arena",
            PathKind::ProcessVm => "process-vm",
            PathKind::Tcp => "tcp",
            PathKind::Rdma => "rdma",
            PathKind::Ipc => "ipc",
            PathKind::Staged => "staged",
        }
    }
}

impl fmt::Display for PathKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A path that was looked at, and why it cannot be used if it cannot.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Candidate {
    /// The path.
    pub path: PathKind,
    /// `None`: it can be used.
    pub why_not: Option<String>,
}

impl Candidate {
    /// Whether it can be used.
    #[must_use]
    pub fn usable(&self) -> bool {
        self.why_not.is_none()
    }
}

pub(crate) fn check_candidates(candidates: &[Candidate]) -> Result<(), WireError> {
    bounded(
        "number of candidate paths",
        candidates.len(),
        limits::CANDIDATES,
    )?;
    for candidate in candidates {
        text(
            "reason against a path",
            candidate.why_not.as_deref().unwrap_or(""),
            limits::TEXT,
        )?;
    }
    Ok(())
}

/// A device of a rank, and the rank's memory as it is registered there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RailDesc {
    /// Its place among the devices that the configuration names, whether or not all of them are here.
    pub place: u16,
    /// The encoded device address.
    pub device: Blob,
    /// The registered memories, in the order of the placement's indices.
    pub memories: Vec<RemoteSpan>,
    /// The table of lease slots, if the rank offers.
    pub leases: Option<RemoteSpan>,
    /// The scratch region, for pings.
    pub scratch: Option<RemoteSpan>,
    /// Where blocks of a GPU's memory are staged for peers to read.
    pub staging: Option<RemoteSpan>,
}

impl RailDesc {
    pub(crate) fn check(&self) -> Result<(), WireError> {
        bounded("device address size", self.device.len(), limits::DEVICE)?;
        bounded("number of memories", self.memories.len(), limits::MEMORIES)?;
        self.memories.iter().try_for_each(|m| m.check("memory"))?;
        (self.leases.iter()).try_for_each(|m| m.check("lease table"))?;
        (self.scratch.iter()).try_for_each(|m| m.check("scratch region"))?;
        (self.staging.iter()).try_for_each(|m| m.check("staging memory"))
    }
}

/// By what other processes of the node open a rank's memories on its GPU.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuDesc {
    /// A handle for each memory, in the order of the placement's indices, as
    /// [`IpcHandle::to_bytes`](crate::mem::gpu::IpcHandle::to_bytes) makes them.
    pub handles: Vec<Blob>,
    /// The most bytes that are staged at a time for one [`Stage`](crate::wire::Stage); 0: nothing is staged.
    pub staged: u64,
    /// Why the rank's devices have not registered the memories. `None`: they all have, and the rails' spans of
    /// them have keys.
    pub unregistered: Option<String>,
}

impl GpuDesc {
    pub(crate) fn check(&self) -> Result<(), WireError> {
        bounded("number of memories", self.handles.len(), limits::MEMORIES)?;
        let mut sizes = self.handles.iter().map(Blob::len);
        sizes.try_for_each(|len| bounded("size of a memory's handle", len, limits::HANDLE))?;
        let reason = self.unregistered.as_deref().unwrap_or("");
        text("reason against a registration", reason, limits::TEXT)
    }
}

impl fmt::Debug for GpuDesc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Who has one can read and write the memory: like keys, they are never logged.
        write!(f, "GpuDesc({} handles)", self.handles.len())
    }
}

/// Why a consumer does not let a producer's kernels write its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum LinksRefused {
    /// Its configuration does not allow it.
    #[error(
        "the consumer does not let kernels of others write its blocks: set gpu_links_in there, or take another kind"
    )]
    NotAllowed,
    /// It could not tell when the producer's process has ended, and would have to keep blocks for good.
    #[error(
        "the consumer cannot see this process, by whose end it would know that no kernel writes any more (its log says why): let both share a pid namespace and read each other's memory, or take another kind"
    )]
    Unseen,
    /// The expectation is over, or this producer's part in it.
    #[error("the consumer expects no more of this push")]
    Late,
}

/// A queue pair, and the rails that it is to join. Rails are counted as the two descriptions list them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RailEndpoint {
    /// The sender's rail.
    pub rail: u16,
    /// The receiver's.
    pub peer_rail: u16,
    /// The encoded endpoint.
    pub endpoint: Blob,
}

impl RailEndpoint {
    /// Of a queue pair that joins the first rail of both sides.
    #[must_use]
    pub fn first(endpoint: Blob) -> Self {
        Self {
            rail: 0,
            peer_rail: 0,
            endpoint,
        }
    }
}

pub(crate) fn check_endpoints(endpoints: &[RailEndpoint]) -> Result<(), WireError> {
    bounded("number of endpoints", endpoints.len(), limits::ENDPOINTS)?;
    for RailEndpoint {
        rail,
        peer_rail,
        endpoint,
    } in endpoints
    {
        bounded("rail", usize::from(*rail), limits::RAILS - 1)?;
        bounded("rail", usize::from(*peer_rail), limits::RAILS - 1)?;
        bounded("endpoint size", endpoint.len(), limits::ENDPOINT)?;
    }
    Ok(())
}

/// Why a side, having authenticated its peer, will not work with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The KV formats or placements cannot be joined.
    #[error("KV formats do not fit: {detail}")]
    FormatMismatch {
        /// The field, both values and the fix.
        detail: String,
    },
    /// Another engine than the client wanted.
    #[error("this is engine {here}, not {wanted}; check the address")]
    WrongEngine {
        /// The engine reached.
        here: String,
        /// The engine wanted.
        wanted: String,
    },
    /// Both sides only produce, or only consume.
    #[error("both sides have kv_role {role}; one must produce and one consume")]
    SameRole {
        /// The role of both.
        role: KvRole,
    },
    /// The server does not serve this kind of client.
    #[error("the server does not serve the {role} role{}", fix(*role))]
    RoleNotServed {
        /// The client's role.
        role: super::Role,
    },
    /// This life of the engine is over: a later one has been met.
    #[error("generation is retired: a later start of this engine has connected")]
    GenerationRetired,
    /// No path leads from one side to the other.
    #[error("no usable path: {detail}")]
    NoPath {
        /// The candidates and why not.
        detail: String,
    },
    /// The peer described something that cannot be true.
    #[error("description is not valid: {detail}")]
    BadDescription {
        /// The field and its value.
        detail: String,
    },
    /// A limit on peers, memory or sessions.
    #[error("no room: {what} is limited to {limit}")]
    Full {
        /// What there is too much of.
        what: String,
        /// The limit.
        limit: u64,
    },
}

fn fix(role: super::Role) -> &'static str {
    match role {
        super::Role::Bench => "; set allow_bench on the engine, or use kvxfer serve",
        super::Role::Engine | super::Role::Probe | super::Role::Observer => "",
    }
}

impl Refusal {
    pub(crate) fn check(&self) -> Result<(), WireError> {
        let each = |s: &str| text("refusal", s, limits::TEXT);
        match self {
            Refusal::FormatMismatch { detail }
            | Refusal::NoPath { detail }
            | Refusal::BadDescription { detail }
            | Refusal::Full { what: detail, .. } => each(detail),
            Refusal::WrongEngine { here, wanted } => each(here).and(each(wanted)),
            Refusal::SameRole { .. }
            | Refusal::RoleNotServed { .. }
            | Refusal::GenerationRetired => Ok(()),
        }
    }

    /// The same refusal with texts that may be sent.
    #[must_use]
    pub(crate) fn cleaned(self) -> Refusal {
        match self {
            Refusal::FormatMismatch { detail } => Refusal::FormatMismatch {
                detail: clean(&detail),
            },
            Refusal::NoPath { detail } => Refusal::NoPath {
                detail: clean(&detail),
            },
            Refusal::BadDescription { detail } => Refusal::BadDescription {
                detail: clean(&detail),
            },
            Refusal::Full { what, limit } => Refusal::Full {
                what: clean(&what),
                limit,
            },
            Refusal::WrongEngine { here, wanted } => Refusal::WrongEngine {
                here: clean(&here),
                wanted: clean(&wanted),
            },
            other => other,
        }
    }
}

/// Why a side ends a session in good order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum GoodbyeReason {
    /// It is shutting down.
    ShuttingDown,
    /// It has done what it came for.
    Finished,
    /// It is replaced by another session between the same two.
    Replaced,
}

impl fmt::Display for GoodbyeReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            GoodbyeReason::ShuttingDown => "shutting down",
            GoodbyeReason::Finished => "finished",
            GoodbyeReason::Replaced => "replaced by another session",
        })
    }
}

/// What a side found wrong with its peer's frames before it cut it off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ErrorCode {
    /// Bounds, tag, sequence or encoding.
    Protocol,
    /// A message that its state does not allow.
    UnexpectedMessage,
    /// A message that lies: ranges outside regions, absurd counts, unknown names.
    Lie,
    /// It took too long.
    Timeout,
    /// Something of its own failed.
    Internal,
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ErrorCode::Protocol => "protocol violation",
            ErrorCode::UnexpectedMessage => "unexpected message",
            ErrorCode::Lie => "untrue message",
            ErrorCode::Timeout => "timeout",
            ErrorCode::Internal => "internal error",
        })
    }
}
