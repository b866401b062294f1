//! The messages of an authenticated session. Each has a frame type of its own; the payload is the
//! message's fields as a MessagePack array.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::{EngineId, Generation, Nonce, Rank, RequestId};
use crate::rails::RailSet;

use super::blob::{Blob, Fingerprint};
use super::error::WireError;
use super::parts::{
    Candidate, ConfigFacts, ErrorCode, GoodbyeReason, GpuDesc, KvRole, LinksRefused, PathKind,
    RailDesc, RailEndpoint, Refusal, Stretch, SumsOf, TakeOf, bounded, check_candidates,
    check_endpoints, check_sums, check_units, clean, limits, text,
};
use super::{pack, unpack};

const SMALL: usize = 16 << 10;
const LARGE: usize = 16 << 20;

macro_rules! messages {
    ($( $(#[$doc:meta])* $code:literal $name:ident $max:expr; )*) => {
        /// A message of an authenticated session.
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[non_exhaustive]
        #[allow(clippy::large_enum_variant, reason = "one at a time, on its way in or out")]
        pub enum Message { $( $(#[$doc])* $name($name), )* }

        /// The kinds of messages; the value is the frame type.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        #[non_exhaustive]
        pub enum MessageKind { $( $(#[$doc])* $name = $code, )* }

        impl MessageKind {
            /// Every kind.
            pub const ALL: &[MessageKind] = &[$(MessageKind::$name),*];

            /// The kind with this frame type.
            #[must_use]
            pub fn from_code(code: u8) -> Option<MessageKind> {
                match code { $( $code => Some(MessageKind::$name), )* _ => None }
            }

            /// The message's name in the protocol.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $( MessageKind::$name => stringify!($name), )* }
            }

            /// The largest payload of this kind, in bytes.
            #[must_use]
            pub fn max_len(self) -> usize {
                match self { $( MessageKind::$name => $max, )* }
            }
        }

        impl Message {
            /// Which kind it is.
            #[must_use]
            pub fn kind(&self) -> MessageKind {
                match self { $( Message::$name(_) => MessageKind::$name, )* }
            }

            /// The payload of its frame.
            ///
            /// # Errors
            ///
            /// A field is out of bounds; a peer would refuse it.
            pub fn encode(&self) -> Result<Vec<u8>, WireError> {
                self.check()?;
                let payload = match self { $( Message::$name(m) => pack(stringify!($name), m)?, )* };
                bounded(self.kind().name(), payload.len(), self.kind().max_len())?;
                Ok(payload)
            }

            /// Reads and checks the payload of a frame of type `code`.
            ///
            /// # Errors
            ///
            /// An unknown type, a payload that is too large, malformed or followed by more, or a
            /// field out of bounds.
            pub fn decode(code: u8, payload: &[u8]) -> Result<Message, WireError> {
                let kind = MessageKind::from_code(code).ok_or(WireError::UnknownFrame { code })?;
                bounded(kind.name(), payload.len(), kind.max_len())?;
                let message = match kind {
                    $( MessageKind::$name => Message::$name(unpack(stringify!($name), payload)?), )*
                };
                message.check()?;
                Ok(message)
            }

            fn check(&self) -> Result<(), WireError> {
                match self { $( Message::$name(m) => m.check(), )* }
            }
        }

        $( impl From<$name> for Message {
            fn from(m: $name) -> Message { Message::$name(m) }
        } )*
    };
}

messages! {
    /// Who a side is and what it has.
    0x10 Describe LARGE;
    /// A side will not work with its peer; it closes after this.
    0x11 Refuse SMALL;
    /// Queue pairs offered.
    0x12 QpOffer LARGE;
    /// The answer to an offer.
    0x13 QpAnswer LARGE;
    /// Queue pairs taken down.
    0x14 QpReset SMALL;
    /// The side can take transfers.
    0x15 Ready SMALL;
    /// A sign of life asked for.
    0x18 Ping SMALL;
    /// A sign of life.
    0x19 Pong SMALL;
    /// The reader has finished with an offer.
    0x20 Release SMALL;
    /// The producer asks for the ticket of a push.
    0x27 PushStart SMALL;
    /// The consumer expects a push.
    0x21 Announce LARGE;
    /// All of a push has landed.
    0x22 PushDone SMALL;
    /// The producer gives a push up.
    0x23 PushAborted SMALL;
    /// The producer will write no more of a push: the answer to Revoke.
    0x24 PushClosed SMALL;
    /// The consumer takes an expectation back.
    0x25 Revoke SMALL;
    /// The producer takes an offer back.
    0x26 Retracted SMALL;
    /// The reader asks for checksums.
    0x28 SumsWanted LARGE;
    /// Checksums that were asked for.
    0x29 Sums LARGE;
    /// Checksums of a push.
    0x2a PushSums LARGE;
    /// The producer asks the consumer to fetch blocks of a push from its GPU.
    0x2b Take LARGE;
    /// The producer wants blocks fetched no more.
    0x2c TakeStop SMALL;
    /// The consumer fetches no more of what it was asked to.
    0x2d Taken SMALL;
    /// The consumer wants stretches of the producer's GPU memory staged.
    0x2e Stage LARGE;
    /// They are, or why not.
    0x2f Staged SMALL;
    /// The consumer reads them no more.
    0x31 StageFree SMALL;
    /// Immediates of blocks of a push that have landed.
    0x32 PushTold SMALL;
    /// The producer wants kernels of its own to write a push's blocks.
    0x34 LinksWanted SMALL;
    /// They may, or why not.
    0x35 LinksAnswer SMALL;
    /// A benchmark's own message.
    0x30 Bench LARGE;
    /// The session ends in good order.
    0x3e Goodbye SMALL;
    /// The peer is cut off.
    0x3f ErrorReport SMALL;
}

impl fmt::Display for MessageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Who a side is and what it has. Sent once by each side, right after authentication.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Describe {
    /// The engine's name.
    pub engine: EngineId,
    /// This life of it.
    pub generation: Generation,
    /// This rank's position.
    pub rank: Rank,
    /// What the engine does with KV blocks.
    pub kv_role: KvRole,
    /// The engine that this side wants to have reached, if it knows.
    pub wanted: Option<EngineId>,
    /// The format's fingerprint: equal ones need no comparison.
    pub fingerprint: Fingerprint,
    /// The encoded KV format.
    pub format: Blob,
    /// The encoded placement.
    pub placement: Blob,
    /// Its devices, and the memory as each of them has it: rail i is the i-th.
    pub rails: Vec<RailDesc>,
    /// Its settings.
    pub facts: ConfigFacts,
    /// Whether all of its memories are files that can be shared.
    pub fd_backed: bool,
    /// By what other processes of the node open its memories, if they are a GPU's; the rails then have no keys
    /// for them.
    pub gpu: Option<GpuDesc>,
    /// By what other processes of the node map its memories to read them, if they are the host's: a token that the
    /// first rail's software device knows.
    pub shared: Option<Blob>,
}

impl Describe {
    fn check(&self) -> Result<(), WireError> {
        text("engine id", &self.engine.0, limits::ENGINE_ID)?;
        if let Some(wanted) = &self.wanted {
            text("wanted engine id", &wanted.0, limits::ENGINE_ID)?;
        }
        bounded("format size", self.format.len(), limits::FORMAT)?;
        bounded("placement size", self.placement.len(), limits::PLACEMENT)?;
        bounded("number of rails", self.rails.len(), limits::RAILS)?;
        self.rails.iter().try_for_each(RailDesc::check)?;
        self.gpu.iter().try_for_each(GpuDesc::check)?;
        let mut token = self.shared.iter().map(Blob::len);
        token.try_for_each(|len| bounded("size of a token", len, limits::TOKEN))
    }
}

/// A side will not work with its peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refuse {
    /// Why.
    pub reason: Refusal,
}

impl Refuse {
    fn check(&self) -> Result<(), WireError> {
        self.reason.check()
    }
}

/// Queue pairs offered, over a path that the offering side has chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QpOffer {
    /// The offering side's number for this set of queue pairs.
    pub offer: u32,
    /// The queue pair of the session whose number is to go to the one that is offered; `None`: it is the first
    /// set.
    pub replaces: Option<u16>,
    /// The path.
    pub path: PathKind,
    /// The paths looked at.
    pub candidates: Vec<Candidate>,
    /// The queue pairs.
    pub endpoints: Vec<RailEndpoint>,
}

impl QpOffer {
    fn check(&self) -> Result<(), WireError> {
        check_candidates(&self.candidates)?;
        check_endpoints(&self.endpoints)
    }
}

/// The answer to an offer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QpAnswer {
    /// The offer's number.
    pub offer: u32,
    /// The path taken; `None`: none can be used, and the candidates say why.
    pub path: Option<PathKind>,
    /// The paths looked at by the answering side.
    pub candidates: Vec<Candidate>,
    /// The queue pairs that join those offered, in the offer's order. A pair of rails is taken with all its
    /// queue pairs, or left out.
    pub endpoints: Vec<RailEndpoint>,
}

impl QpAnswer {
    fn check(&self) -> Result<(), WireError> {
        check_candidates(&self.candidates)?;
        check_endpoints(&self.endpoints)
    }
}

/// A side has destroyed its half of some queue pairs of the session: nothing that came or comes on them
/// can land here any more. The other side takes its half down too, and says the same, once for each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QpReset {
    /// The queue pairs, by their places in the answer to the offer, from 0.
    pub lanes: Vec<u16>,
    /// The encoded cause.
    pub cause: Blob,
}

impl QpReset {
    fn check(&self) -> Result<(), WireError> {
        bounded("number of queue pairs", self.lanes.len(), limits::ENDPOINTS)?;
        bounded("cause size", self.cause.len(), limits::CAUSE)
    }
}

/// The side can take transfers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Ready {}

/// Asks for a sign of life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ping {
    /// Counts the sender's pings.
    pub sequence: u64,
    /// Comes back unchanged; means something to the sender only.
    pub echo: u64,
}

/// A sign of life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    /// The ping's number.
    pub sequence: u64,
    /// The ping's echo.
    pub echo: u64,
}

macro_rules! unchecked {
    ($($type:ident)*) => {$(
        impl $type {
            fn check(&self) -> Result<(), WireError> {
                Ok(())
            }
        }
    )*};
}
unchecked!(Ready Ping Pong TakeStop StageFree Goodbye);

/// The reader has finished with an offer, whether it read or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    /// The request.
    pub request: RequestId,
    /// Its try.
    pub nonce: Nonce,
}

impl Release {
    fn check(&self) -> Result<(), WireError> {
        text("request id", &self.request.0, limits::REQUEST_ID)
    }
}

/// The producer wants to push, and asks for the ticket: now if the request is expected, or as soon
/// as it is. Answered with [`Announce`], or with [`Revoke`] if it may not push.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PushStart {
    /// The request.
    pub request: RequestId,
    /// Its try, if the producer has the ticket from elsewhere.
    pub nonce: Option<Nonce>,
}

impl PushStart {
    fn check(&self) -> Result<(), WireError> {
        text("request id", &self.request.0, limits::REQUEST_ID)
    }
}

/// The consumer expects a push: the ticket, straight to its producer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announce {
    /// The encoded ticket.
    pub ticket: Blob,
}

impl Announce {
    fn check(&self) -> Result<(), WireError> {
        bounded("ticket size", self.ticket.len(), limits::TICKET)
    }
}

/// All that this sender pushes of a request has completed, and what went over one pair of rails is in memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PushDone {
    /// The request.
    pub request: RequestId,
    /// Its try.
    pub nonce: Nonce,
    /// The sender's rank.
    pub sender: Rank,
    /// Bytes that it wrote.
    pub bytes: u64,
    /// How many checksums of them are told in [`PushSums`]; 0: they are not to be compared.
    pub sums: u64,
    /// The pairs of rails that carried writes of it. There is one of these messages for each.
    pub rails: RailSet,
    /// The one of them that this message speaks for: all that was written over it is in memory.
    pub rail: u16,
}

impl PushDone {
    fn check(&self) -> Result<(), WireError> {
        text("request id", &self.request.0, limits::REQUEST_ID)?;
        let (rails, rail) = (self.rails, self.rail);
        match rails.contains(rail) {
            true => Ok(()),
            false => Err(WireError::BadRail { rail, rails }),
        }
    }
}

macro_rules! push_ended {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        pub struct $name {
            /// The request.
            pub request: RequestId,
            /// Its try.
            pub nonce: Nonce,
            /// The sender's rank.
            pub sender: Rank,
            /// The encoded cause.
            pub cause: Blob,
        }

        impl $name {
            fn check(&self) -> Result<(), WireError> {
                text("request id", &self.request.0, limits::REQUEST_ID)?;
                bounded("cause size", self.cause.len(), limits::CAUSE)
            }
        }
    };
}

push_ended! {
    /// The producer gives a push up. Some of it may have landed; more may still land until
    /// [`PushClosed`].
    PushAborted
}
push_ended! {
    /// Nothing that this sender posted for the push can land any more.
    PushClosed
}

/// Blocks of a push have landed whose kernel has something to say of them: in the order in which they have. Comes
/// before the push's end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PushTold {
    /// The request.
    pub request: RequestId,
    /// Its try.
    pub nonce: Nonce,
    /// What is said of each.
    pub immediates: Vec<u32>,
}

impl PushTold {
    fn check(&self) -> Result<(), WireError> {
        text("request id", &self.request.0, limits::REQUEST_ID)?;
        bounded("immediates", self.immediates.len(), limits::IMMEDIATES)
    }
}

/// The consumer takes an expectation back; the producer stops, drains and answers [`PushClosed`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revoke {
    /// The request.
    pub request: RequestId,
    /// Its try.
    pub nonce: Nonce,
    /// The encoded cause.
    pub cause: Blob,
}

impl Revoke {
    fn check(&self) -> Result<(), WireError> {
        text("request id", &self.request.0, limits::REQUEST_ID)?;
        bounded("cause size", self.cause.len(), limits::CAUSE)
    }
}

/// The producer takes an offer back: its blocks may be recycled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retracted {
    /// The request.
    pub request: RequestId,
    /// Its try.
    pub nonce: Nonce,
}

impl Retracted {
    fn check(&self) -> Result<(), WireError> {
        text("request id", &self.request.0, limits::REQUEST_ID)
    }
}

/// The reader has read what it wanted of an offer, and asks for checksums of it. Answered with
/// [`Sums`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SumsWanted {
    /// The reader's number for this question.
    pub id: u64,
    /// The request.
    pub request: RequestId,
    /// Its try.
    pub nonce: Nonce,
    /// Whether the reader has read what falls to this pair of ranks alone, and not all that both keep.
    pub share: bool,
    /// The producer's units, which must be on offer.
    pub of: Vec<SumsOf>,
}

impl SumsWanted {
    fn check(&self) -> Result<(), WireError> {
        text("request id", &self.request.0, limits::REQUEST_ID)?;
        check_units(&self.of)
    }
}

/// Some of the checksums that were asked for: by list, then by unit, then by tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sums {
    /// The question's number.
    pub id: u64,
    /// The encoded cause why there are none, or no more.
    pub refused: Option<Blob>,
    /// The place of the first of them among all.
    pub first: u64,
    /// The sums, 8 bytes each, the lowest first.
    pub sums: Blob,
}

impl Sums {
    fn check(&self) -> Result<(), WireError> {
        if let Some(cause) = &self.refused {
            bounded("cause size", cause.len(), limits::CAUSE)?;
        }
        check_sums(&self.sums)
    }
}

/// Checksums of what this sender has written. All come before its [`PushDone`] on the control
/// connection; on the data plane that may overtake them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PushSums {
    /// The request.
    pub request: RequestId,
    /// Its try.
    pub nonce: Nonce,
    /// The consumer's units.
    pub of: SumsOf,
    /// The sums by unit, then by tensor, 8 bytes each, the lowest first.
    pub sums: Blob,
}

impl PushSums {
    fn check(&self) -> Result<(), WireError> {
        text("request id", &self.request.0, limits::REQUEST_ID)?;
        check_units([&self.of])?;
        check_sums(&self.sums)?;
        let len = self.sums.len();
        // Each unit has as many, and one at least.
        match len > 0 && (len / 8).is_multiple_of(self.of.units.len()) {
            true => Ok(()),
            false => Err(WireError::BadSums { len }),
        }
    }
}

/// Asks the consumer to fetch blocks of a push out of the producer's GPU, which has finished them. Answered with
/// [`Taken`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Take {
    /// The producer's number for this.
    pub number: u64,
    /// The request.
    pub request: RequestId,
    /// Its try.
    pub nonce: Nonce,
    /// The layer; `None`: all layers that the two ranks exchange.
    pub layer: Option<u32>,
    /// The blocks, by group.
    pub of: Vec<TakeOf>,
    /// The bytes that the producer finds them to be.
    pub bytes: u64,
}

impl Take {
    fn check(&self) -> Result<(), WireError> {
        text("request id", &self.request.0, limits::REQUEST_ID)?;
        bounded("number of unit lists", self.of.len(), limits::UNIT_LISTS)?;
        let mut units = 0_usize;
        for of in &self.of {
            units = units.saturating_add(of.check()?);
        }
        bounded("number of units", units, limits::UNITS)
    }
}

/// The producer wants the blocks of a [`Take`] fetched no more. That is answered all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakeStop {
    /// The number of it.
    pub number: u64,
}

/// Nothing more of a [`Take`] is fetched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// The number of it.
    pub number: u64,
    /// The encoded cause why not all has been fetched; `None`: all has.
    pub failed: Option<Blob>,
}

impl Taken {
    fn check(&self) -> Result<(), WireError> {
        match &self.failed {
            Some(cause) => bounded("cause size", cause.len(), limits::CAUSE),
            None => Ok(()),
        }
    }
}

/// Asks for stretches of a GPU's memory in pinned host memory, packed: each begins at the next multiple of
/// [`GRAIN`](Stage::GRAIN) behind the one before. Answered with [`Staged`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// The consumer's number for this.
    pub number: u64,
    /// The stretches: memory and length, 4 bytes each, and 8 of offset, the lowest byte first.
    pub of: Blob,
}

impl Stage {
    /// What packed stretches begin at a multiple of: words that a GPU copies.
    pub const GRAIN: u64 = 16;

    fn check(&self) -> Result<(), WireError> {
        Stretch::check_all(&self.of)
    }
}

/// The stretches of a [`Stage`] can be read, until [`StageFree`] says that they have been.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Staged {
    /// The number of it.
    pub number: u64,
    /// Where, in bytes from where the staging memory begins.
    pub offset: u64,
    /// Where the buffer's stamp is, which says whether it is still this one's: 64 bytes, as a lease slot.
    pub stamp: u64,
    /// What the stamp shows.
    pub word: u64,
    /// The encoded cause why they cannot; `None`: they can.
    pub failed: Option<Blob>,
}

impl Staged {
    fn check(&self) -> Result<(), WireError> {
        match &self.failed {
            Some(cause) => bounded("cause size", cause.len(), limits::CAUSE),
            None => Ok(()),
        }
    }
}

/// The stretches of a [`Stage`] are not read any more. Said once they have been told to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageFree {
    /// The number of it.
    pub number: u64,
}

/// Asks the consumer to let kernels of the producer write the blocks of a push, over GPU links. Answered with
/// [`LinksAnswer`]; nothing is written before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinksWanted {
    /// The request.
    pub request: RequestId,
    /// Its try.
    pub nonce: Nonce,
}

impl LinksWanted {
    fn check(&self) -> Result<(), WireError> {
        text("request id", &self.request.0, limits::REQUEST_ID)
    }
}

/// Whether kernels of the producer may write the blocks of a push. If they may, the consumer keeps the blocks, should
/// the push fail, until it is told [`PushClosed`], or the producer's process has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinksAnswer {
    /// The request.
    pub request: RequestId,
    /// Its try.
    pub nonce: Nonce,
    /// Why they may not; `None`: they may.
    pub refused: Option<LinksRefused>,
}

impl LinksAnswer {
    fn check(&self) -> Result<(), WireError> {
        text("request id", &self.request.0, limits::REQUEST_ID)
    }
}

/// A message between the two ends of a benchmark.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bench {
    /// The benchmark's own encoding.
    pub payload: Blob,
}

impl Bench {
    fn check(&self) -> Result<(), WireError> {
        bounded("benchmark message size", self.payload.len(), limits::BENCH)
    }
}

/// The session ends in good order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Goodbye {
    /// Why.
    pub reason: GoodbyeReason,
}

/// The peer is cut off, and told why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReport {
    /// The kind of fault.
    pub code: ErrorCode,
    /// The words for people.
    pub text: String,
}

impl ErrorReport {
    /// A report whose text is made fit to be sent.
    #[must_use]
    pub fn new(code: ErrorCode, text: &str) -> ErrorReport {
        ErrorReport {
            code,
            text: clean(text),
        }
    }

    fn check(&self) -> Result<(), WireError> {
        text("error text", &self.text, limits::TEXT)
    }
}
