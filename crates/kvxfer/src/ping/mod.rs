//! Pings: is a peer there, does it answer, and how long do its control connection, an 8-byte WRITE
//! with a notification and an 8-byte READ take?
//!
//! A [`Pinger`] opens a session of its own (the *probe* role) with any live engine, whatever its
//! `kv_role`, with the same handshake and secret as a real peer and the same choice of a path. The
//! engine answers from a scratch region that it registers for this session alone, in a protection
//! domain of its own: the queue pair of a probe reaches nothing else, KV memory least of all. An
//! engine serves [`MAX_PINGERS`] at once, without its workers.
//!
//! ```no_run
//! use std::time::Duration;
//! use kvxfer::config::Config;
//! use kvxfer::ping::{Pinger, Probe};
//!
//! # fn main() -> Result<(), kvxfer::Error> {
//! let mut pinger = Pinger::connect(&Config::default(), "node7:7301", Duration::from_secs(5))?;
//! if let Some(ping) = pinger.ping(Duration::from_secs(1))? {
//!     match ping.control {
//!         Probe::Answered(time) => println!("answers in {time:?}"),
//!         _ => println!("stalled: the session stands, and nothing comes"),
//!     }
//! }
//! # Ok(())
//! # }
//! ```

mod client;
mod kernel;
mod lane;
mod seat;

use std::time::Duration;

pub use client::{PingPeer, Pinger};
pub(crate) use seat::ProbeSeat;

/// How many pingers an engine's process serves at once.
pub const MAX_PINGERS: usize = 16;

/// What an engine that serves as many says is limited, in [`Refusal::Full`](crate::wire::Refusal::Full).
pub const PINGERS: &str = "number of pingers";

/// Bytes of the scratch region of one session.
const SCRATCH: u64 = 4096;
/// Bytes that a READ or a WRITE of a ping moves.
const WORD: u32 = 8;

/// One part of a ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    /// It came back, after so long.
    Answered(Duration),
    /// It did not come back in time.
    Lost,
    /// It was not tried, because an earlier part or an earlier ping is still out.
    NotTried,
}

impl Probe {
    /// The time it took.
    #[must_use]
    pub fn time(self) -> Option<Duration> {
        match self {
            Probe::Answered(time) => Some(time),
            Probe::Lost | Probe::NotTried => None,
        }
    }
}

/// One ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ping {
    /// Its number, from 1.
    pub sequence: u64,
    /// A Ping over the control connection and its Pong: the peer's session thread answers.
    pub control: Probe,
    /// An 8-byte WRITE with a notification, until this side knows that both have been taken; where a kernel posts it
    /// ([`Pinger::post_from`]), from the kernel's launch to its end, which is when it has seen that.
    /// Not tried where the control connection is silent.
    pub write: Probe,
    /// An 8-byte READ, whose value is checked against what was written. Over paths within a host it
    /// needs nothing of the peer's CPU: a stopped peer can still be read.
    pub read: Probe,
}

impl Ping {
    /// Whether every part came back.
    #[must_use]
    pub fn answered(&self) -> bool {
        [self.control, self.write, self.read]
            .iter()
            .all(|probe| probe.time().is_some())
    }
}

/// An engine's memory for the tests of both sides: four blocks of 4 KiB.
#[cfg(test)]
fn side() -> crate::bench::BenchSide {
    use crate::bench::{BenchMemory, BenchShape, BenchSide};
    use crate::layout::{KvFormat, Topology};

    let format = KvFormat::opaque(4096, 1).expect("a format");
    let shape = BenchShape {
        topology: Topology::single(&format),
        format,
        num_blocks: vec![4],
        memory: BenchMemory::Arena,
    };
    BenchSide::new(&shape).expect("memory")
}
