//! What the two ends of a bandwidth test say to each other, inside the session's `Bench` frames.

use serde::{Deserialize, Serialize};

use super::side::WrongByte;
use crate::blocks::{GroupBlocks, GroupPairs};
use crate::error::Error;
use crate::ids::RequestId;
use crate::wire::{Bench, Blob, Message, WireError};

/// What the client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Ask {
    /// Fill every block with the seed's pattern.
    Fill { seed: u64 },
    /// Fill every block with what no pattern holds.
    Poison,
    /// Offer blocks; the answer is the ticket.
    Offer {
        request: RequestId,
        groups: Vec<GroupBlocks>,
        ttl_ms: u64,
    },
    /// Take an offer back.
    Retract { request: RequestId },
    /// Expect the blocks under `PREFIX.FIRST`; whenever one has come, under the next number, up to
    /// and without `end`. The tickets go to whoever begins the pushes.
    Arm {
        prefix: String,
        groups: Vec<GroupBlocks>,
        first: u64,
        end: u64,
        deadline_ms: u64,
    },
    /// Give up what is armed.
    Disarm { prefix: String },
    /// Compare destination blocks with the pattern of their sources.
    Verify { seed: u64, pairs: Vec<GroupPairs> },
}

/// What the target answers, one for each question and in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    Done,
    Ticket(Blob),
    Verified { bytes: u64 },
    Wrong(WrongByte),
    Failed { text: String },
}

impl Answer {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Answer::Done => "done",
            Answer::Ticket(_) => "a ticket",
            Answer::Verified { .. } => "a verification",
            Answer::Wrong(_) => "a wrong byte",
            Answer::Failed { .. } => "a failure",
        }
    }

    pub(crate) fn failed(error: &Error) -> Self {
        Answer::Failed {
            text: crate::error::chain(error),
        }
    }
}

pub(crate) fn pack<T: Serialize>(message: &T) -> Result<Message, WireError> {
    Ok(Bench {
        payload: Blob::pack("benchmark message", message)?,
    }
    .into())
}
