//! Whole engines under one seed: two to four of them, with their sessions, transfers, offers and
//! expectations, over a model network, in virtual time. Every choice comes from one generator, so
//! that a seed names its history.
//!
//! # What is the real code
//! [`Scheduler`](kvxfer::transfer::Scheduler) and [`Transfers`](kvxfer::transfer::Transfers), one of
//! each a worker; [`Leases`](kvxfer::leases::Leases) and [`Expects`](kvxfer::expects::Expects), one
//! of each an engine; [`Session`](kvxfer::session::Session), one at each end of a control
//! connection, with its handshake, sealed frames and heartbeats; the messages and tickets as bytes.
//!
//! # What is modelled
//! | here | stands for |
//! |---|---|
//! | `worker`, `posting`, `completions` | `engine/worker`: the loop in its four parts, other threads may run between any two |
//! | `peer` | `engine/peer` and `Inner::peer_up`, `peer_down`, `peer_drained` |
//! | `books` | `engine/books` and `Inner::on_message`; one lock, so one step |
//! | `pushes` | `engine/push`: the stages of a push, and which ticket is for which |
//! | `link` | `engine/link`, `bringup`, `connect`: bytes, orders, the queue pairs' exchange, redial |
//! | `device`, `qp` | queue pairs and the network between them |
//! | `app`, `writes` | the engines' authors and the router that carries tickets |
//!
//! Plans are not made: each block is four *cells*, each cell a number that was never used before.
//! So bytes that come from the wrong place, too late or to the wrong place are seen.

mod app;
mod books;
mod bug;
mod cards;
mod check;
mod check_books;
mod completions;
mod device;
mod faults;
mod link;
mod memory;
mod peer;
mod posting;
mod pushes;
mod qp;
mod rebuild;
#[path = "../sim/rng.rs"]
mod rng;
mod source;
mod summary;
mod worker;
mod world;
mod writes;

pub(crate) use bug::{Bug, Invariant};
pub(crate) use summary::Summary;
pub(crate) use world::{replay, run};
