//! The client's end of a bandwidth test.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, unbounded};

use super::message::{Answer, Ask, pack};
use super::side::{BenchShape, BenchSide};
use crate::blocks::{GroupBlocks, GroupPairs};
use crate::config::{Config, KvRole};
use crate::engine::{Engine, Inner, Peer, Runtime, Target, connect};
use crate::error::Error;
use crate::ids::RequestId;
use crate::ticket::Ticket;
use crate::transport::open_rails;
use crate::wire::{Blob, Role};

/// How often a wait for an answer looks whether the target is still there.
const LOOK: Duration = Duration::from_millis(50);

/// One side of a bandwidth test, with its counterpart in another process.
#[derive(Debug)]
pub struct BenchClient {
    peer: Peer,
    engine: Engine,
    side: BenchSide,
    answers: Receiver<Vec<u8>>,
    timeout: Duration,
}

impl BenchClient {
    /// Allocates this side and connects to the target, which allocates the other. Connecting takes at
    /// most `timeout`, with resolving the address, and so does the wait for each answer of the target.
    ///
    /// # Errors
    ///
    /// As [`Engine::new`] and [`Engine::connect`]; a target that does not allow benchmarks, or not
    /// that much memory, refuses with [`Error::Session`].
    pub fn connect(
        mut config: Config,
        shape: &BenchShape,
        address: &str,
        timeout: Duration,
    ) -> Result<Self, Error> {
        config.kv_role = KvRole::Both;
        config.check()?;
        let side = BenchSide::new(shape)?;
        let runtime = Runtime::new(&config, open_rails(&config)?)?;
        let (sender, answers) = unbounded();
        let inner = Inner::new(
            Arc::clone(&runtime),
            config,
            side.format().clone(),
            side.placement().clone(),
            Some(sender),
        );
        if inner.is_err() {
            runtime.shut_down();
        }
        let engine = Engine::owned(inner?, true);
        let target = Target::address(address, Role::Bench);
        let peer = connect(engine.inner(), target, timeout)?;
        Ok(Self {
            peer,
            engine,
            side,
            answers,
            timeout,
        })
    }

    /// The way to the target.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// This side's engine.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// This side's memory.
    #[must_use]
    pub fn side(&self) -> &BenchSide {
        &self.side
    }

    /// Fills the target's blocks with the seed's pattern.
    ///
    /// # Errors
    ///
    /// The target does not answer, is gone, or refuses; so for all calls to it.
    pub fn fill_target(&self, seed: u64) -> Result<(), Error> {
        self.done(&Ask::Fill { seed })
    }

    /// Fills the target's blocks with what no pattern holds.
    ///
    /// # Errors
    ///
    /// As [`fill_target`](Self::fill_target).
    pub fn poison_target(&self) -> Result<(), Error> {
        self.done(&Ask::Poison)
    }

    /// Has the target offer blocks.
    ///
    /// # Errors
    ///
    /// As [`fill_target`](Self::fill_target).
    pub fn offer(
        &self,
        request: &RequestId,
        groups: &[GroupBlocks],
        ttl: Duration,
    ) -> Result<Ticket, Error> {
        let ask = Ask::Offer {
            request: request.clone(),
            groups: groups.to_vec(),
            ttl_ms: ms(ttl),
        };
        match self.ask(&ask)? {
            Answer::Ticket(bytes) => Ok(Ticket::from_bytes(&bytes.0)?),
            other => Err(unexpected(&other, "a ticket")),
        }
    }

    /// Has the target take an offer back.
    ///
    /// # Errors
    ///
    /// As [`fill_target`](Self::fill_target).
    pub fn retract(&self, request: &RequestId) -> Result<(), Error> {
        self.done(&Ask::Retract {
            request: request.clone(),
        })
    }

    /// Has the target expect the blocks as request `PREFIX.FIRST`, and again under the next number
    /// whenever they have come, up to and without `end`.
    ///
    /// # Errors
    ///
    /// As [`fill_target`](Self::fill_target).
    pub fn arm(
        &self,
        prefix: &str,
        groups: &[GroupBlocks],
        numbers: std::ops::Range<u64>,
        deadline: Duration,
    ) -> Result<(), Error> {
        self.done(&Ask::Arm {
            prefix: prefix.to_owned(),
            groups: groups.to_vec(),
            first: numbers.start,
            end: numbers.end,
            deadline_ms: ms(deadline),
        })
    }

    /// Has the target expect no more under the prefix.
    ///
    /// # Errors
    ///
    /// As [`fill_target`](Self::fill_target).
    pub fn disarm(&self, prefix: &str) -> Result<(), Error> {
        self.done(&Ask::Disarm {
            prefix: prefix.to_owned(),
        })
    }

    /// Has the target compare every byte of its destination blocks with the pattern of this side's
    /// source blocks; returns how many.
    ///
    /// # Errors
    ///
    /// [`Error::BenchWrong`], and as [`fill_target`](Self::fill_target).
    pub fn verify_target(&self, seed: u64, pairs: &[GroupPairs]) -> Result<u64, Error> {
        match self.ask(&Ask::Verify {
            seed,
            pairs: pairs.to_vec(),
        })? {
            Answer::Verified { bytes } => Ok(bytes),
            other => Err(unexpected(&other, "a verification")),
        }
    }

    fn done(&self, ask: &Ask) -> Result<(), Error> {
        match self.ask(ask)? {
            Answer::Done => Ok(()),
            other => Err(unexpected(&other, "done")),
        }
    }

    fn ask(&self, ask: &Ask) -> Result<Answer, Error> {
        let peer = self.peer.session()?;
        peer.link.send(pack(ask)?);
        let until = std::time::Instant::now() + self.timeout;
        loop {
            match self.answers.recv_timeout(LOOK) {
                Ok(bytes) => {
                    return match Blob(bytes).unpack("benchmark answer")? {
                        Answer::Wrong(wrong) => Err(Error::BenchWrong(wrong)),
                        Answer::Failed { text } => Err(Error::BenchRefused { text }),
                        answer => Ok(answer),
                    };
                }
                Err(_) => {
                    if let Some(cause) = peer.lost() {
                        return Err(Error::NotConnected { cause });
                    }
                    if std::time::Instant::now() >= until {
                        let (what, after) = ("the target's answer", self.timeout);
                        return Err(Error::Deadline { what, after });
                    }
                }
            }
        }
    }
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn unexpected(answer: &Answer, wanted: &'static str) -> Error {
    Error::BenchProtocol {
        got: answer.name(),
        wanted,
    }
}
