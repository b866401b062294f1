//! From formats, placements and block pairs to operations. Pure: no I/O, no clock.
//!
//! [`Compiled`] is made once for a pair of ranks: it matches their tensors and works out how one
//! block of each is laid out on both sides. A request then costs what its blocks cost: its pairs are
//! sorted and merged once for each *geometry* (tensors that lie alike, usually all layers), and a
//! [`Plan`] works out operation `k` from that when it is asked for.

mod compile;
mod error;
mod geometry;
mod lazy;
mod request;
mod sort;
pub mod source;

#[cfg(test)]
mod tests;

pub use compile::{Compiled, Role};
pub use error::{CompileError, PlanError, SideName};
pub use lazy::{Plan, PlanReport};
pub use request::{LayerScope, MAX_CHUNK, MAX_PIECES, PlanLimits};
pub use source::{Op, OpSource, Piece};
