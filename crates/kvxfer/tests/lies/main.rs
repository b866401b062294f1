//! A peer that knows the secret and then lies, in every message and on the data plane; and strangers
//! who know none. Each lie ends its own session, with a reason that the owner can read. The honest
//! peers of the same engine go on, and nothing of the liar stays.

#[path = "../support/mod.rs"]
mod support;

mod bytes;
mod data;
mod descriptions;
mod files;
mod liar;
mod messages;
mod observers;
mod owner;
mod queue_pairs;
mod reasons;
mod stages;
mod strangers;
mod sums;
mod takes;
mod wire;
mod world;
