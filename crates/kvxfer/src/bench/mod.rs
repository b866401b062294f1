//! The bandwidth test's role: two sides with memory of their own, never an engine's KV blocks.
//!
//! A client says which layout it wants to test ([`BenchShape`]); the engine that it connects to
//! allocates the counterpart, if it allows benchmarks, and carries out what the client's messages
//! ask: fill, offer, expect, verify. The blocks themselves move through the same calls as an
//! engine's: [`Peer::pull`](crate::engine::Peer::pull) and
//! [`Peer::begin_push`](crate::engine::Peer::begin_push).

mod client;
mod message;
mod pattern;
mod server;
mod side;

pub use client::BenchClient;
pub use pattern::{Pattern, Plane, scattered_pairs};
pub(crate) use server::BenchSeat;
pub use server::hold_to_format;
pub use side::{BenchMemory, BenchShape, BenchSide, WrongByte};
