//! What the commands do.

mod bw;
mod case;
mod engine_limit;
mod initiator;
mod limit;
pub(crate) mod mem;
mod ping;
mod row;
mod serve;
mod settings;
mod table;

pub(crate) use bw::run_bw;
pub(crate) use ping::run_ping;
pub(crate) use row::Failed;
pub(crate) use serve::run_serve;
pub(crate) use settings::{Settings, is_soft};
