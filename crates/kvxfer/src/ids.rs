//! Names of engines, requests and ranks. No device code: a scheduler process can use them.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The name an engine goes by, chosen by its operator; unique among the engines that meet.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EngineId(pub Arc<str>);

/// One life of an engine: a random number drawn at each start. A peer that restarts under its old
/// name is a new generation, and nothing of the old one is honoured.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub [u8; 16]);

/// The engine's own name for a request.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RequestId(pub Arc<str>);

/// One try of a request: random, so that a late message of an earlier try is told apart.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Nonce(pub u64);

/// A rank's position in its engine. Ranks are in the order of these numbers, the first counting most.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
pub struct Rank {
    /// Data-parallel rank.
    pub dp: u32,
    /// Pipeline-parallel rank.
    pub pp: u32,
    /// Tensor-parallel rank.
    pub tp: u32,
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Eight hexadecimal digits tell two lives apart in a log.
        for byte in &self.0[..4] {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Display for EngineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dp{}.pp{}.tp{}", self.dp, self.pp, self.tp)
    }
}

impl From<&str> for EngineId {
    fn from(s: &str) -> Self {
        Self(s.into())
    }
}

impl From<&str> for RequestId {
    fn from(s: &str) -> Self {
        Self(s.into())
    }
}

impl From<String> for RequestId {
    fn from(s: String) -> Self {
        Self(s.into())
    }
}
