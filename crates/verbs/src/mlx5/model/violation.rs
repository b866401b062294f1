//! What a program may not do to a queue.

use super::super::{Mlx5Fault, OutsideQueue, QueueNotReached};

/// A rule that was broken: on a device, a lost or wrong transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// What was told of is no WQE.
    #[error("WQE {n}: {fault}")]
    Wqe {
        /// Which, counted from 0.
        n: u64,
        /// What is wrong with it.
        fault: Mlx5Fault,
    },
    /// A WQE that has the number of another: not yet written, or written to the wrong slot.
    #[error("WQE {n} has the number {found:#06x}")]
    Number {
        /// Which it should be.
        n: u64,
        /// Low 16 bits of the one that it says it is.
        found: u16,
    },
    /// A WQE or a doorbell for another queue pair.
    #[error("queue pair {found:#x}, not {wanted:#x}")]
    QueuePair {
        /// The queue's.
        wanted: u32,
        /// What is there.
        found: u32,
    },
    /// A doorbell record that is none.
    #[error("doorbell record: {fault}")]
    Record {
        /// What is wrong with it.
        fault: Mlx5Fault,
    },
    /// A record that goes back, or tells of more than the queue holds.
    #[error("the record says {record:#06x} where {consumed} are consumed of a queue of {depth}")]
    RecordSpan {
        /// Low 16 bits of the number that comes next, as it says.
        record: u16,
        /// WQEs that have been consumed.
        consumed: u64,
        /// Slots of the queue.
        depth: u32,
    },
    /// A doorbell that is none.
    #[error("doorbell: {fault}")]
    Doorbell {
        /// What is wrong with it.
        fault: Mlx5Fault,
    },
    /// A doorbell that tells of more than its record: the record was not written before it.
    #[error("the doorbell says {doorbell:#06x}, the record {record:#06x}")]
    RecordBehind {
        /// Low 16 bits of the number that comes next, by the doorbell.
        doorbell: u16,
        /// The same by the record.
        record: u16,
    },
    /// A doorbell that is not what the WQE before it begins with.
    #[error("the doorbell is {found:#018x}, the last WQE begins with {wanted:#018x}")]
    NotTheLast {
        /// The WQE's first eight bytes.
        wanted: u64,
        /// The doorbell.
        found: u64,
    },
    /// A completion that there is no room for: those that were read have not been given back.
    #[error("completion {n} where {taken} were given back of a queue of {depth}")]
    NoRoom {
        /// Which, counted from 0.
        n: u64,
        /// Those given back.
        taken: u64,
        /// Entries of the queue.
        depth: u32,
    },
    /// More completions given back than there were.
    #[error("completions up to {taken:#08x} given back, of {written}")]
    Taken {
        /// Low 24 bits of how many, as the record says.
        taken: u32,
        /// How many there were.
        written: u64,
    },
    /// The queue's memory is smaller than the queue.
    #[error("queue memory: {0}")]
    Memory(#[from] OutsideQueue),
    /// The queue's memory is not where the device can read it: no poster's fault.
    #[error("{0}")]
    NotReached(#[from] QueueNotReached),
}
