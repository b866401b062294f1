//! The queues of mlx5 devices as bytes: send WQEs, CQEs, doorbells and doorbell records.
//!
//! Values become bytes and bytes values, or a [`Mlx5Fault`]; nothing of that touches a device. [`MappedQueues`] says where
//! the queues of a real one lie, through libmlx5. Every WQE is one basic block of 64 bytes, so that a WQE's number is its place: an RDMA
//! operation with up to two local segments or up to 28 bytes of data in the WQE itself.
//!
//! The layouts are transcribed from rdma-core and compared with its header `mlx5dv.h`, and encoded WQEs
//! with what its functions write, by `tests/abi`. No mlx5 device has been driven with them.

mod bytes;
mod cqe;
mod doorbell;
#[allow(
    non_camel_case_types,
    dead_code,
    reason = "names of C, and fields that only C uses"
)]
mod dv;
mod fault;
mod geometry;
mod layout;
mod library;
mod mapped;
#[cfg(test)]
mod mapped_tests;
mod memory;
pub mod model;
mod spans;
#[cfg(test)]
mod tests;
mod wqe;

pub use cqe::{Cqe, CqeStatus, Syndrome};
pub use doorbell::{Doorbell, DoorbellRecord};
pub use fault::Mlx5Fault;
pub use geometry::{CqDepth, MAX_DEPTH, SqDepth, WQEBB};
pub use library::Mlx5;
pub use mapped::{MappedCompletions, MappedQueues, MappedSends, NoMlx5};
pub use memory::{OutsideQueue, QueueMemory, QueueNotReached};
pub use wqe::{
    Gather, INLINE_ROOM, InlineData, Operation, Qpn, RemoteSpan, Segment, SendFlags, SendWqe,
};

/// Bytes of a completion.
pub const CQE_BYTES: usize = layout::mlx5_cqe64::SIZE;

/// Where in a UAR page the doorbell is.
pub const DOORBELL_OFFSET: u64 = 0x800;
