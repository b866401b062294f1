//! From formats, placements and block pairs to operations. Pure: no I/O, no clock.
//!
//! [`Compiled`] is made once for a pair of ranks: it matches their tensors, finds what both keep and
//! works out how one unit of each is laid out on both sides. A *unit* is a block where both sides'
//! blocks are of one size, and otherwise the tokens that both are multiples of. A request then costs what its blocks cost: its pairs are
//! sorted and merged once for each *geometry* (tensors that lie alike, usually all layers), and a
//! [`Plan`] works out operation `k` from that when it is asked for.

mod compile;
mod cover;
mod error;
mod geometry;
mod lazy;
mod posted;
mod request;
mod scatter;
mod sort;
pub mod source;
mod units;

#[cfg(test)]
mod tests;

pub(crate) use compile::moved;
pub use compile::{Compiled, Part, Role, SMALL_PIECE, small_pieces};
pub use cover::{Cover, MissingPart};
pub use error::{CompileError, PlanError, SideName, TokenRange};
pub use lazy::{Plan, PlanReport};
pub(crate) use posted::{BlockOps, BlockPiece, LayerAt, PieceSide, Posted};
pub use request::{LayerScope, MAX_CHUNK, MAX_PIECES, PlanLimits};
pub use scatter::{At, Scattered, ScatteredPart};
pub use source::{Op, OpList, OpSource, Piece};
pub use units::{Listed, Unit, UnitPairs};
