//! Properties of the books: tickets, leases, expectations, under random events.

mod claims;
mod expects;
mod leases;
mod tickets;

use kvxfer::blocks::GroupBlocks;
use kvxfer::event::PeerName;
use kvxfer::ids::{EngineId, Rank, RequestId};

pub(crate) fn name(peer: u64) -> PeerName {
    PeerName {
        engine: EngineId::from(format!("engine-{peer}").as_str()),
        rank: Rank::default(),
    }
}

pub(crate) fn request(n: u8) -> RequestId {
    RequestId::from(format!("r{n}"))
}

pub(crate) fn group(group: u32, blocks: &[u32]) -> GroupBlocks {
    GroupBlocks {
        group,
        blocks: blocks.to_vec(),
    }
}
