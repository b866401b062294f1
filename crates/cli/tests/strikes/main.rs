//! `kvxfer bw` or `ping`, and `kvxfer serve`, where one of the two is killed, stopped or ended: over
//! each path, reading and writing, at each stage that can be told from outside.

#[path = "../support/mod.rs"]
mod support;

mod client;
mod ping;
mod server;
mod stages;
mod tap;
