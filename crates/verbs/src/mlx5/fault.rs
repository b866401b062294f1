//! What bytes of a queue, or numbers for one, may have wrong.

/// Why bytes are no WQE, CQE or doorbell that is understood here, or why a number does not fit one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Mlx5Fault {
    /// A number of a queue pair has 24 bits.
    #[error("queue pair number {qpn:#x} has more than 24 bits")]
    Qpn {
        /// The number.
        qpn: u32,
    },
    /// A queue whose depth is no power of two, or too large for 16-bit counters.
    #[error("a queue of {depth}: its depth must be a power of two from 1 to {max}")]
    Depth {
        /// The entries wanted.
        depth: u64,
        /// The most that there can be.
        max: u32,
    },
    /// An opcode that is none of NOP, RDMA_WRITE, RDMA_WRITE_IMM, RDMA_READ, or with a modifier.
    #[error("opcode {opcode:#04x}, modifier {modifier:#04x}")]
    Opcode {
        /// Low byte of the first word.
        opcode: u8,
        /// High byte of the first word.
        modifier: u8,
    },
    /// A WQE whose size in 16-byte units does not go with its operation.
    #[error("opcode {opcode:#04x} with a size of {ds} x 16 bytes")]
    Size {
        /// The opcode.
        opcode: u8,
        /// The units.
        ds: u8,
    },
    /// Completion, fence and event flags that are not defined, or a reserved field that is not 0.
    #[error("byte {at} is {value:#04x}")]
    Byte {
        /// Where, from the WQE's or CQE's first byte.
        at: u8,
        /// What is there.
        value: u8,
    },
    /// A segment of no bytes, which devices take for 2 GiB, or of more than 2^31 - 1.
    #[error("a segment of {len} bytes: 1 to 2147483647 can be said")]
    Segment {
        /// The bytes.
        len: u32,
    },
    /// More bytes than fit a WQE of 64 bytes, or a READ into the WQE.
    #[error("{len} bytes in the WQE, which has room for {room}")]
    Inline {
        /// The bytes.
        len: u32,
        /// The most.
        room: u32,
    },
    /// A completion of a kind that a send queue of this crate does not get.
    #[error("completion opcode {opcode}, format {format}")]
    Completion {
        /// The high four bits of its last byte.
        opcode: u8,
        /// How it is put: 0 is plain.
        format: u8,
    },
    /// The doorbell names another opcode or size than a WQE can have.
    #[error("doorbell {value:#018x}")]
    Doorbell {
        /// The eight bytes, big-endian.
        value: u64,
    },
    /// A 16-bit counter that names nothing that is outstanding.
    #[error("counter {counter:#06x} names nothing from {from} to {to}")]
    Counter {
        /// The counter.
        counter: u16,
        /// The first WQE that has not completed.
        from: u64,
        /// Behind the last one posted.
        to: u64,
    },
}
