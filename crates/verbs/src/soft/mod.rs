//! The software device: reliable-connection semantics with nothing but Linux.
//!
//! The owner of the destination always copies: a READ is carried out by its initiator, a WRITE by
//! its target on the initiator's word. Nobody maps another process's memory writable.

mod context;
mod cq;
mod events;
mod faults;
mod frame;
#[cfg(test)]
mod hostile;
mod injector;
mod keys;
mod link;
#[cfg(all(loom, test))]
mod loom_models;
mod process_vm;
mod qp;
mod reader;
mod requester;
mod requester_local;
mod requester_receive;
mod requester_tcp;
mod responder;
pub(crate) mod segment;
mod server;
mod shares;
mod stream;

use std::sync::Arc;

use crate::device::Context;
use crate::error::Error;

pub use faults::{FaultPlan, FaultPlanError};
pub use process_vm::PeerLife;

/// The software device's one port.
const PORT: u8 = 1;
/// The number of a device's first completion queue.
const FIRST_CQ: u32 = 1;

pub mod vendor {
    //! What `vendor_err` of a failed completion means on the software device.

    /// The peer's process or queue pair is gone: its stream ended (with `RetryExc`).
    pub const PEER_GONE: u32 = 1;
    /// The peer made no progress for timeout × (retry_cnt + 1) (with `RetryExc`).
    pub const NO_PROGRESS: u32 = 2;
    /// The remote key names no region, or one of another protection domain.
    pub const BAD_KEY: u32 = 3;
    /// The remote span is not inside its region.
    pub const BOUNDS: u32 = 4;
    /// The region or the queue pair does not allow the operation.
    pub const RIGHTS: u32 = 5;
    /// The region was deregistered while it was copied.
    pub const STALE: u32 = 6;
    /// The peer broke the protocol.
    pub const PROTOCOL: u32 = 7;
    /// The memory's file could not be passed or mapped.
    pub const SEGMENT: u32 = 8;
    /// The receive was too short for the message.
    pub const RECV_TOO_SHORT: u32 = 9;
    /// The fault plan says so.
    pub const PLANNED: u32 = 10;
    /// A system call on the peer's memory failed: this plus the errno.
    pub const ERRNO: u32 = 0x1000;
}

/// How the software device is set up.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SoftConfig {
    /// Work requests a send or receive queue holds.
    pub max_qp_wr: u32,
    /// Scatter/gather elements of one work request (at most 256).
    pub max_sge: u32,
    /// Bytes of one message (at most 2^31).
    pub max_msg_sz: u64,
    /// Completions a completion queue holds.
    pub max_cqe: u32,
    /// Regions registered at once (at most 65535).
    pub max_mr: u32,
    /// Bytes that one poll copies before it returns.
    pub poll_budget: usize,
    /// The least time without progress before a request ends in `RetryExc`, whatever the queue
    /// pair's timeout says: a peer in software answers when the scheduler lets it.
    pub min_retry_time: std::time::Duration,
    /// What is to go wrong, for tests and demonstrations. The device reads no environment: who wants
    /// a variable for it parses its text and sets this.
    pub faults: Option<FaultPlan>,
}

impl Default for SoftConfig {
    fn default() -> Self {
        Self {
            max_qp_wr: 32_768,
            max_sge: 32,
            max_msg_sz: 1 << 30,
            max_cqe: 1 << 20,
            max_mr: 4096,
            poll_budget: 1 << 20,
            min_retry_time: std::time::Duration::from_secs(2),
            faults: None,
        }
    }
}

/// Opens the software device.
///
/// # Errors
///
/// [`Error::Limit`] for a value that the device does not take, [`Error::Os`].
pub fn open_soft(config: SoftConfig) -> Result<Context, Error> {
    let limits = [
        ("max_qp_wr", u64::from(config.max_qp_wr), 1 << 20),
        ("max_sge", config.max_sge.into(), 256),
        ("max_msg_sz", config.max_msg_sz, 1 << 31),
        ("max_cqe", config.max_cqe.into(), 1 << 24),
        ("max_mr", config.max_mr.into(), 65_535),
        ("poll_budget", config.poll_budget as u64, 1 << 40),
    ];
    for (what, asked, max) in limits {
        if asked == 0 || asked > max {
            return Err(Error::Limit { what, asked, max });
        }
    }
    Ok(Context::new(Arc::new(context::SoftDevice::open(config)?)))
}

pub(crate) fn fill_random(bytes: &mut [u8]) -> Result<(), Error> {
    getrandom::fill(bytes).map_err(|e| {
        let errno = e.raw_os_error().unwrap_or(libc::EIO);
        Error::Os {
            op: "getrandom",
            source: std::io::Error::from_raw_os_error(errno),
        }
    })
}
