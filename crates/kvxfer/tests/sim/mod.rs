//! A model of workers, queue pairs, peers and engines around the transfer machines, driven by a
//! seed. Virtual time, every choice from one generator: the same seed gives the same history.

mod check;
mod device;
mod engine;
mod net;
mod owner;
mod rng;
mod source;
mod worker;
mod world;

pub(crate) use world::{Bug, Summary, run};
