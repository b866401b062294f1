//! The crate's error: one variant an operation, with what it was given.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use crate::bench::WrongByte;
use crate::config::ConfigError;
use crate::event::Class;
use crate::gpu_queue::NoLinks;
use crate::ids::{EngineId, Generation, Rank, RequestId};
use crate::layout::LayoutError;
use crate::layout::LayoutMismatch;
use crate::metadata::MetadataError;
use crate::plan::{CompileError, MissingPart, PlanError};
use crate::session::SessionError;
use crate::ticket::TicketError;
use crate::transfer::Cause;
use crate::wire::{Candidate, PathKind, Refusal, SecretError, WireError};

/// Why a call on an engine failed. What goes wrong later, while blocks move, is a
/// [`Cause`] in the transfer's outcome.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call failed.
    #[error("{call}: {}", io::Error::from_raw_os_error(*errno))]
    Os {
        /// The call.
        call: &'static str,
        /// Its errno.
        errno: i32,
    },
    /// A thread could not be started.
    #[error("cannot start the {name} thread")]
    Spawn {
        /// What it was for.
        name: &'static str,
        /// The system's words.
        source: io::Error,
    },
    /// The device refused.
    #[error(transparent)]
    Verbs(#[from] kvxfer_verbs::Error),
    /// The device did not take a receive.
    #[error(transparent)]
    Post(#[from] kvxfer_verbs::PostError),
    /// An engine was given a GPU's memory of another making than this crate's, which it cannot move.
    #[error(
        "memory {index} of the placement is {kind}, and not one of kvxfer::mem::gpu::GpuMemory: GpuMemory::from_raw_parts takes what an engine has allocated itself"
    )]
    ForeignGpuMemory {
        /// Which of the placement's memories.
        index: usize,
        /// Where it lives.
        kind: kvxfer_verbs::MemoryKind,
    },
    /// Some of an engine's memories are the host's, and some a GPU's.
    #[error(
        "memory {host} of the placement is the host's and memory {gpu} a GPU's: an engine has all of its blocks on one side"
    )]
    MixedMemory {
        /// One of the host's.
        host: usize,
        /// One of a GPU's.
        gpu: usize,
    },
    /// An engine's memories are of several GPUs.
    #[error("the placement has memory of GPU {first} and of GPU {other}: a rank has one")]
    SeveralGpus {
        /// The first memory's.
        first: kvxfer_verbs::PciAddress,
        /// Another memory's.
        other: kvxfer_verbs::PciAddress,
    },
    /// An engine on RDMA devices was given a GPU's memory, which they do not reach and which it cannot stage.
    #[error(
        "the placement's memory of GPU {gpu} is not registered with the engine's RDMA devices ({device}): {unregistered}. And it cannot be staged, which it would be where the path `staged` is allowed and its buffers can be had: {unstaged}"
    )]
    GpuOverRdma {
        /// The first of the devices.
        device: String,
        /// The GPU.
        gpu: kvxfer_verbs::PciAddress,
        /// Why it is not registered.
        unregistered: String,
        /// Why it cannot be staged.
        unstaged: String,
    },
    /// An RDMA device has to read a GPU's memory back, and a READ between two queue pairs of its own does not end well.
    #[error(
        "device {device} does not read its own memory back, which this GPU needs: is its port up?"
    )]
    NoLoopback {
        /// The device.
        device: String,
    },
    /// A stream was given for memory that is the host's.
    #[error("a stream to put the fence on, and the engine's memory is the host's")]
    StreamWithoutGpu,
    /// A queue for kernels cannot be like that.
    #[error("a queue for kernels: {what}")]
    QueueConfig {
        /// Which setting, and what it may be.
        what: &'static str,
    },
    /// A queue of work requests that has fewer slots than a block takes.
    #[error(
        "a queue for kernels of {depth} work requests: a block of some layer is in {stretches} stretches, each of which is one; ask for a depth of {stretches} at least"
    )]
    QueueDepth {
        /// Its slots.
        depth: u32,
        /// The most that one block takes.
        stretches: u32,
    },
    /// Kernels may not write a push's blocks themselves.
    #[error("a queue of the kind links: {why}")]
    NoLinks {
        /// Why not, and what to do.
        why: NoLinks,
    },
    /// A kernel that posts pings was told that its post has not gone well.
    #[error(
        "the kernel that posts a ping was told {status:?}: a defect of kvxfer, or memory of the GPU that somebody writes to"
    )]
    PingKernel {
        /// What it was told.
        status: crate::mem::post::Status,
    },
    /// Kernels that post have not ended in time.
    #[error(
        "the kernels of a queue have not ended within {after:?}, and were told to stop: wait for them before `finish`, or give them longer"
    )]
    KernelsLate {
        /// How long they were waited for.
        after: Duration,
    },
    /// A push or a pull was committed while a queue of it was not finished, or after one was dropped without.
    #[error(
        "the push or pull of request {request} is given up: {queues} of its queues not finished, so what their kernels have posted may be lost: call GpuQueue::finish on each before the commit"
    )]
    QueueUnfinished {
        /// The request.
        request: RequestId,
        /// How many queues.
        queues: u64,
    },
    /// The event that was said to stand behind a queue's kernels is of another GPU.
    #[error(
        "the event is of GPU {event}, and the queue's kernels run on {queue}: record it on their stream, behind the last of them; they were told to stop, and the queue counts as not finished"
    )]
    QueueEvent {
        /// The event's GPU.
        event: kvxfer_verbs::PciAddress,
        /// The queue's.
        queue: kvxfer_verbs::PciAddress,
    },
    /// A peer's handles are not those of its memories.
    #[error("{handles} handles for {memories} memories of a GPU")]
    GpuHandles {
        /// How many handles.
        handles: usize,
        /// How many memories.
        memories: usize,
    },
    /// A peer's handle is of more or fewer bytes than its placement says.
    #[error("a handle of {handle} bytes for a memory of {memory}")]
    GpuHandleLen {
        /// The handle's bytes.
        handle: u64,
        /// The memory's.
        memory: u64,
    },
    /// Memory of the host that a GPU was to write is not of a kind that kvxfer can pin.
    #[error(
        "memory {index} of the placement is not one of kvxfer::mem::HostMemory: no GPU can be given it"
    )]
    ForeignHostMemory {
        /// Which of the placement's memories.
        index: usize,
    },
    /// A peer's memory is of the stand-in for GPUs, which opens files of the process that it names: not at a peer's word
    /// alone.
    #[error(
        "the peer's memory is of the host stand-in for GPUs, which is opened only where this side's configuration names it (gpu=host, KVXFER_GPU=host)"
    )]
    StandInNotNamed,
    /// A memory has more places where blocks begin than a GPU's kernel counts.
    #[error("blocks begin at more than 2^32 places: a GPU's kernel cannot count them")]
    TooManySteps,
    /// A plan that was not made for this peer: a defect of this library.
    #[error("the plan is of another pair of ranks")]
    OtherPlan,
    /// Memory could not be had or was used out of bounds.
    #[error(transparent)]
    Memory(#[from] kvxfer_hipmem::Error),
    /// A setting is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The secret cannot be used.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// A format or a placement is wrong.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The two sides' layouts do not fit each other.
    #[error(transparent)]
    Mismatch(#[from] LayoutMismatch),
    /// The two sides' layouts cannot be joined for another reason.
    #[error(transparent)]
    Compile(CompileError),
    /// This side will not work with the peer.
    #[error("refused the peer: {refusal}")]
    Refused {
        /// Why.
        refusal: Refusal,
    },
    /// A data stream to the peer could not be opened.
    #[error("cannot open a data stream to {address}")]
    Stream {
        /// The peer's address.
        address: String,
        /// The system's words.
        source: io::Error,
    },
    /// Whoever listens at the peer's address could not prove itself on a data stream.
    #[error("a data stream to {address} was answered by somebody else than the peer")]
    StreamNotAuthentic {
        /// The peer's address.
        address: String,
    },
    /// The block pairs are wrong.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The ticket is wrong.
    #[error(transparent)]
    Ticket(#[from] TicketError),
    /// An offer cannot be made or ended.
    #[error(transparent)]
    Lease(#[from] crate::leases::OfferError),
    /// An expectation cannot be made or ended.
    #[error(transparent)]
    Expect(#[from] crate::expects::ExpectError),
    /// Checksums cannot be worked out.
    #[error(transparent)]
    Sums(#[from] crate::sums::SumError),
    /// More than the checksums of one request may be.
    #[error(
        "request {request} has {count} {what} to be verified, {max} are the most; pull or push it in parts, or without verify"
    )]
    TooManySums {
        /// The request.
        request: RequestId,
        /// Checksums, or what they are of.
        what: &'static str,
        /// How many.
        count: u64,
        /// The most.
        max: u64,
    },
    /// A block is in something else that is under way, or whose memory has not been released.
    #[error(transparent)]
    InUse(#[from] crate::claims::BlockInUse),
    /// A transfer cannot be taken.
    #[error(transparent)]
    Submit(#[from] crate::transfer::TransferError),
    /// Bytes from outside, or for the wire, are wrong.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The session with a peer did not come about, or ended.
    #[error("session with {peer}")]
    Session {
        /// The peer's address.
        peer: String,
        /// Why.
        source: SessionError,
    },
    /// An address is not `host:port`, or its host has no address.
    #[error("cannot resolve {address}; give HOST:PORT")]
    Resolve {
        /// The address as given.
        address: String,
        /// The resolver's words.
        source: io::Error,
    },
    /// Nothing answers at the address.
    #[error("cannot reach {address}; is the engine up, and is this its port?")]
    Unreachable {
        /// The address.
        address: String,
        /// The system's words.
        source: io::Error,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: String,
        /// The system's words.
        source: io::Error,
    },
    /// The engine listens already.
    #[error("the engine listens on {address} already")]
    Listening {
        /// Where.
        address: SocketAddr,
    },
    /// Listening to the network needs a secret, or the operator's word that none is wanted.
    #[error(
        "{address} can be reached from other hosts, and there is no secret: give a secret file \
         (--secret-file, KVXFER_SECRET_FILE) or allow it (--allow-unauthenticated)"
    )]
    Unauthenticated {
        /// The address asked for.
        address: SocketAddr,
    },
    /// No path leads to the peer, or not the one that was asked for.
    #[error("no usable path to the peer{}", no_path(*forced, candidates))]
    NoPath {
        /// The path asked for.
        forced: Option<PathKind>,
        /// What was looked at.
        candidates: Vec<Candidate>,
    },
    /// The RDMA devices that were asked for cannot be used.
    #[error("{asked} cannot be used")]
    RdmaDevice {
        /// What was asked for.
        asked: String,
        /// Why not.
        source: kvxfer_verbs::Error,
    },
    /// No port of an RDMA device can be used, or none of those that the configuration allows.
    #[error("no RDMA port can be used{}", ports(candidates))]
    NoRdmaPort {
        /// Every port that was looked at, and why not.
        candidates: Vec<(String, String)>,
    },
    /// The path asked for is not one that this version has.
    #[error("this device has no {path} path")]
    PathNotHere {
        /// The path.
        path: PathKind,
    },
    /// The engine does not listen, so nobody can connect to it.
    #[error("the engine does not listen: call listen first")]
    NotListening,
    /// The engine listens on all addresses of the host, and none of them is known to be reached.
    #[error(
        "listening on {listening}, and no address of this host is known to peers: set host_ip (KVXFER_HOST_IP)"
    )]
    NoAddress {
        /// Where it listens.
        listening: SocketAddr,
        /// The system's words.
        source: io::Error,
    },
    /// A request's name is empty or too long.
    #[error("request name of {len} bytes, from 1 to 512 are allowed")]
    RequestName {
        /// Its length.
        len: usize,
    },
    /// A block id that the placement does not have.
    #[error("block {block} of group {group} does not exist: there are {num_blocks}")]
    NoSuchBlock {
        /// The group.
        group: u32,
        /// The block.
        block: u32,
        /// How many blocks the group has here.
        num_blocks: u32,
    },
    /// The deadline passed first.
    #[error("{what} did not finish within {after:?}")]
    Deadline {
        /// What was waited for.
        what: &'static str,
        /// How long.
        after: Duration,
    },
    /// The peer is not there now. The session reconnects by itself.
    #[error("peer is not connected: {cause}")]
    NotConnected {
        /// Why it was lost.
        cause: Cause,
    },
    /// One of the ranks that were to be connected to together could not be.
    #[error("cannot connect to the rank at {address}")]
    ConnectRank {
        /// Its address.
        address: String,
        /// Why.
        source: Box<Error>,
    },
    /// An instance has at least one rank.
    #[error("no address to connect to: an instance has at least one rank")]
    NoRanks,
    /// The ranks of an instance are of one engine.
    #[error(
        "{address} is rank {rank} of engine {engine}, and {first} is of engine {wanted}: give the ranks of an engine one engine_id"
    )]
    OtherEngine {
        /// The address.
        address: String,
        /// The engine that is there.
        engine: EngineId,
        /// Its rank.
        rank: Rank,
        /// The address that was given first.
        first: String,
        /// The engine that is there.
        wanted: EngineId,
    },
    /// Two addresses lead to one rank.
    #[error("{first} and {second} are both rank {rank} of the engine")]
    SameRank {
        /// The rank.
        rank: Rank,
        /// One address.
        first: String,
        /// The other.
        second: String,
    },
    /// The ranks that a request's blocks would come from do not keep all that this rank needs.
    #[error(
        "{} do not keep {part}, which this rank needs; give the tickets of all ranks that have a part",
        list(ranks)
    )]
    MissingPart {
        /// Something that is missing.
        part: Box<MissingPart>,
        /// The ranks.
        ranks: Vec<Rank>,
    },
    /// No rank of the remote engine keeps anything that this one keeps.
    #[error("no connected rank of engine {engine} takes anything from rank {rank} of this one")]
    NothingToPush {
        /// This rank.
        rank: Rank,
        /// The remote engine.
        engine: EngineId,
    },
    /// Nothing orders two writes of one push, so what has been written in token order is not written
    /// again: tokens must end with a whole unit of blocks unless nothing of the layer follows.
    #[error(
        "tokens of group {group}{} have been written already in the push of request {request}",
        layer.map_or(String::new(), |layer| format!(", layer {layer},"))
    )]
    WrittenTwice {
        /// The request.
        request: RequestId,
        /// The cache group.
        group: u32,
        /// The layer; `None`: all.
        layer: Option<u32>,
    },
    /// A sliding window's blocks begin where the window does, which the lists do not say.
    #[error(
        "group {group} is a sliding window: its blocks can be paired by their order only where both sides' are of one size, and only all of them"
    )]
    Window {
        /// The cache group.
        group: u32,
    },
    /// A ticket is of another request.
    #[error("a ticket of request {other} where one of request {first} is needed")]
    TicketsDiffer {
        /// The request.
        first: RequestId,
        /// The ticket's.
        other: RequestId,
    },
    /// Data-parallel ranks have requests of their own: no request is spread over them.
    #[error(
        "tickets of rank {first} and rank {other} for one transfer: data-parallel ranks have requests of their own"
    )]
    OtherReplica {
        /// The rank of the first ticket.
        first: Rank,
        /// The rank of another.
        other: Rank,
    },
    /// A rank has made one ticket for a request.
    #[error("two tickets of request {request} are of rank {rank}")]
    TicketTwice {
        /// The request.
        request: RequestId,
        /// The rank.
        rank: Rank,
    },
    /// The instance has no such rank.
    #[error(
        "engine {engine} was not connected to at rank {rank}; the instance has {}",
        list(ranks)
    )]
    NoSuchRank {
        /// The engine.
        engine: EngineId,
        /// The rank asked for.
        rank: Rank,
        /// Those that there are.
        ranks: Vec<Rank>,
    },
    /// What was asked of the instance is for one rank to do, and it has several.
    #[error(
        "{operation} is of one rank, and the instance of engine {engine} has {}; choose with peer(rank)",
        list(ranks)
    )]
    SeveralRanks {
        /// What was asked.
        operation: &'static str,
        /// The engine.
        engine: EngineId,
        /// Its ranks.
        ranks: Vec<Rank>,
    },
    /// The ticket was made by another engine or rank than this instance or peer leads to.
    #[error("ticket of {ticket}, this leads to {here}")]
    WrongInstance {
        /// Who made the ticket.
        ticket: String,
        /// Who is led to.
        here: String,
    },
    /// The ticket is of an earlier life of the engine.
    #[error(
        "ticket is of {engine}'s generation {ticket}, the engine now runs generation {now}: it has restarted, and the blocks are gone"
    )]
    OldGeneration {
        /// The engine.
        engine: EngineId,
        /// The ticket's generation.
        ticket: Generation,
        /// The generation met.
        now: Generation,
    },
    /// An offer was given where an expectation is needed, or the other way round.
    #[error("ticket of request {request} is an {got}, an {wanted} is needed")]
    WrongTicket {
        /// The request.
        request: RequestId,
        /// What it is.
        got: &'static str,
        /// What is needed.
        wanted: &'static str,
    },
    /// A pair names a block that the ticket does not hold.
    #[error("block {block} of group {group} is not in the ticket of request {request}")]
    NotInTicket {
        /// The request.
        request: RequestId,
        /// The group.
        group: u32,
        /// The peer's block.
        block: u32,
    },
    /// The engine's `kv_role` does not do this.
    #[error("an engine of kv_role {role} cannot {operation}")]
    WrongRole {
        /// The role.
        role: &'static str,
        /// What was asked of it.
        operation: &'static str,
    },
    /// Another push of the request to the same peer has not ended.
    #[error(
        "an earlier push of request {request} to this peer has not ended; wait for its outcome and its memory"
    )]
    PushUnderWay {
        /// The request.
        request: RequestId,
    },
    /// The push has been committed or aborted.
    #[error("push of request {request} has ended: {operation} comes too late")]
    PushEnded {
        /// The request.
        request: RequestId,
        /// What was asked.
        operation: &'static str,
    },
    /// Metadata bytes do not describe an engine.
    #[error("metadata does not describe an engine")]
    Metadata {
        /// What is wrong with them.
        #[from]
        source: MetadataError,
    },
    /// One of several metadata does not describe an engine.
    #[error("metadata {index} (the first is 0) does not describe an engine")]
    RankMetadata {
        /// Its place among those given, from 0.
        index: usize,
        /// What is wrong with its bytes.
        source: MetadataError,
    },
    /// A bandwidth test moved a wrong byte.
    #[error("wrong byte after a transfer: {0}")]
    BenchWrong(WrongByte),
    /// The peer answered the benchmark with a failure.
    #[error("the target refused: {text}")]
    BenchRefused {
        /// Its words.
        text: String,
    },
    /// The peer's answer is not one that the benchmark's protocol allows.
    #[error("the target answered {got} where {wanted} was due")]
    BenchProtocol {
        /// What came.
        got: &'static str,
        /// What was due.
        wanted: &'static str,
    },
    /// An operation of a ping failed.
    #[error("the {operation} of a ping failed: {status:?} (vendor {vendor})")]
    PingFailed {
        /// READ or WRITE.
        operation: &'static str,
        /// The device's word.
        status: kvxfer_verbs::WcStatus,
        /// Its own code, 0 if it has none.
        vendor: u32,
    },
    /// A ping read back something else than it had written.
    #[error("a ping read {got:#018x} where it had written {wanted:#018x}")]
    PingWrong {
        /// What was written.
        wanted: u64,
        /// What was read.
        got: u64,
    },
    /// The engine is shutting down.
    #[error("the engine is shutting down")]
    ShuttingDown,
    /// A thread of the engine has panicked: a defect. What it worked on has failed, and the engine takes no
    /// new work.
    #[error("a thread of the engine has panicked; drop the engine and make another")]
    WorkerPanicked,
    /// The device has failed as a whole. What used it has failed, and the engine takes no new work: only
    /// opening the device anew helps.
    #[error("the engine's device has failed; drop the engine and make another")]
    DeviceFailed,
    /// The engine was made by another process, of which this one is a fork. It has the engine's
    /// memory and none of its threads.
    #[error(
        "the engine belongs to process {engine}, and this is {here}, a fork of it; make an engine here"
    )]
    Forked {
        /// The process that made the engine.
        engine: u32,
        /// This process.
        here: u32,
    },
}

impl Error {
    pub(crate) fn random(error: getrandom::Error) -> Self {
        Error::Os {
            call: "getrandom",
            errno: error.raw_os_error().unwrap_or(0),
        }
    }

    /// What an engine can do about it.
    #[must_use]
    pub fn class(&self) -> Class {
        match self {
            Error::NotConnected { cause } => cause.class(),
            Error::ConnectRank { source, .. } => source.class(),
            Error::Unreachable { .. } | Error::Deadline { .. } => Class::Retry,
            Error::Session {
                source: SessionError::Busy,
                ..
            } => Class::Retry,
            Error::OldGeneration { .. } => Class::Recompute,
            _ => Class::Fatal,
        }
    }
}

fn list(ranks: &[Rank]) -> String {
    let ranks: Vec<String> = ranks.iter().map(Rank::to_string).collect();
    ranks.join(", ")
}

/// An error and what it came from, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
        source = error.source();
    }
    text
}

fn ports(candidates: &[(String, String)]) -> String {
    let each = candidates
        .iter()
        .map(|(port, why)| format!("; {port}: {why}"));
    each.collect()
}

fn no_path(forced: Option<PathKind>, candidates: &[Candidate]) -> String {
    let mut text = match forced {
        Some(path) => format!(" ({path} was asked for)"),
        None => String::new(),
    };
    for candidate in candidates {
        if let Some(why_not) = &candidate.why_not {
            text.push_str(&format!("; {}: {why_not}", candidate.path));
        }
    }
    text
}
