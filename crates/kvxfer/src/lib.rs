//! Moves KV-cache blocks between LLM inference engines: out of the memory of a prefill instance,
//! straight into the memory of a decode instance.
//!
//! Each rank of an engine has an [`Engine`] over its KV memory. Two of them meet by
//! [`Engine::connect`], which compares their [formats](layout::KvFormat) field by field before a
//! byte moves. It gives an [`Instance`]: the remote engine, of which one or
//! [several ranks](Engine::connect_ranks) were connected to, each a [`Peer`]. Then blocks move in one
//! of two ways:
//!
//! - **READ**: the producer [offers](Engine::offer) blocks and gets a [`Ticket`](ticket::Ticket); a
//!   router carries it to the consumer, which [pulls](Instance::pull). The producer's CPU has no part
//!   in it.
//! - **WRITE**: the consumer [expects](Engine::expect) blocks; the producer
//!   [begins a push](Peer::begin_push), pushes [layer](engine::Push::layer) after layer as they are
//!   computed, and [commits](engine::Push::commit).
//!
//! How something ended comes as an [`Event`](event::Event), and for transfers also from their
//! [`Transfer`], which is a future. Every outcome comes once, by its deadline. Whether memory may be
//! used again is a second answer: *released*, or *quarantined* until a later
//! [`Released`](event::Event::Released).
//!
//! # Example
//!
//! Both ends in one process; `examples/prefill_decode.rs` has them in two, with a router.
//!
//! ```
//! use std::time::Duration;
//!
//! use kvxfer::blocks::{BlockPair, GroupBlocks, GroupPairs};
//! use kvxfer::config::{Config, KvRole};
//! use kvxfer::engine::{Outcome, PullOptions};
//! use kvxfer::ids::RequestId;
//! use kvxfer::layout::{KvFormat, KvPlacement, Packing, Topology};
//! use kvxfer::mem::{HostArena, HostMemory};
//! use kvxfer::{Engine, ticket::Ticket};
//!
//! fn rank(role: KvRole) -> Result<(Engine, HostMemory), Box<dyn std::error::Error>> {
//!     // One cache group of two layers; a real format names its tensors and their axes.
//!     let format = KvFormat::opaque(4096, 2)?;
//!     let topology = Topology::single(&format);
//!     let uniform = KvPlacement::uniform(&format, topology, &[16], Packing::OneMemory, 4096)?;
//!     let arena = HostArena::new(uniform.memory_bytes().iter().sum())?;
//!     let memory = arena.memory().clone();
//!     let placement = uniform.place(&format, vec![memory.as_memory()])?;
//!     let mut config = Config::default();
//!     config.kv_role = role;
//!     Ok((Engine::new(config, format, placement)?, memory))
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let limit = Duration::from_secs(30);
//! let (prefill, source) = rank(KvRole::Producer)?;
//! let (decode, destination) = rank(KvRole::Consumer)?;
//! let address = prefill.listen("127.0.0.1:0")?;
//! let instance = decode.connect(&address.to_string(), limit)?;
//!
//! // Block 3 of the prefill rank holds the request. Layer 0 begins at offset 0.
//! source.fill(3 * 4096, 4096, 7)?;
//! let blocks = [GroupBlocks { group: 0, blocks: vec![3] }];
//! let ticket = prefill.offer(&RequestId::from("r1"), &blocks, 1, limit)?;
//!
//! // The ticket travels as JSON, in `kv_transfer_params` say.
//! let ticket = Ticket::from_json(&ticket.to_json()?)?;
//!
//! // The decode rank wants it in its own block 5.
//! let pairs = vec![BlockPair { src: 3, dst: 5 }];
//! let wanted = [GroupPairs { group: 0, pairs }];
//! let pull = instance.pull(&ticket, &wanted, PullOptions::default())?;
//! assert_eq!(pull.wait(limit), Some(Outcome::Done));
//!
//! let mut first = [0; 4];
//! destination.read(5 * 4096, &mut first)?;
//! assert_eq!(first, [7; 4]);
//! # Ok(())
//! # }
//! ```
//!
//! # What is here
//!
//! - [`engine`]: [`Engine`], [`Instance`], [`Peer`], pushes, transfers
//! - [`layout`]: what a block is and where a rank keeps it; [`mem`]: memory that can be registered
//! - [`ticket`], [`metadata`], [`event`], [`ids`], [`blocks`]: no device code, for a scheduler or a router
//! - [`config`]: settings from JSON, the environment and flags; [`devices`]: which NIC they lead to
//! - [`gpu_queue`]: pushes that kernels make
//! - [`bench`](mod@bench): the two sides of a bandwidth test; [`ping`]: is a peer there, and how far away?
//! - [`plan`], [`transfer`], [`rails`], [`leases`], [`expects`], [`session`], [`wire`]: the pure parts that the
//!   engine drives, with no I/O and no clock; open for tests, tools and fuzzing
//!
//! # State
//!
//! An engine stands on the software device (same host through shared memory or `process_vm_readv`, any
//! host through TCP) or, where the configuration asks for it, on an RDMA device (InfiniBand or RoCE).
//! RDMA has been run on soft-RoCE and on no card. Blocks lie in host memory or, between engines of one node, in
//! the memory of GPUs ([`mem::gpu`]), which has been run on NVIDIA's and never on AMD's. 64-bit Linux only.
#![forbid(unsafe_code)]

pub mod bench;
mod block_set;
pub mod blocks;
pub mod claims;
pub mod config;
mod control;
pub mod devices;
pub mod engine;
mod error;
pub mod event;
pub mod expects;
pub mod gpu_queue;
pub mod ids;
pub mod layout;
pub mod leases;
pub mod metadata;
pub mod ping;
pub mod plan;
pub mod rails;
mod recent;
pub mod session;
pub mod sums;
mod sync;
pub mod ticket;
pub mod time;
pub mod transfer;
mod transport;
pub mod wire;

pub use engine::{Engine, Instance, Outcome, Peer, Transfer};
pub use error::Error;
pub use kvxfer_hipmem as mem;
pub use kvxfer_verbs::Memory;
pub use transport::{PathInfo, QueuePairs, RdmaLink, SkippedRail};
