//! How blocks reach a peer: the choice of a path, and the queue pairs that realise it.

mod path;

pub use path::PathInfo;
pub(crate) use path::{Choice, soft_path};
