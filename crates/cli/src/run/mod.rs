//! What the commands do.

mod bw;
mod case;
mod limit;
mod row;
mod serve;
mod settings;
mod table;

pub(crate) use bw::run_bw;
pub(crate) use row::Failed;
pub(crate) use serve::run_serve;
