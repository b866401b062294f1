//! Completions of a send queue.

use super::bytes::{Block, get, get8, get32, put};
use super::fault::Mlx5Fault;
use super::geometry::CqDepth;
use super::layout::{
    MLX5_CQE_INVALID, MLX5_CQE_OWNER_MASK, MLX5_CQE_REQ, MLX5_CQE_REQ_ERR,
    MLX5_CQE_SYNDROME_BAD_RESP_ERR, MLX5_CQE_SYNDROME_LOCAL_ACCESS_ERR,
    MLX5_CQE_SYNDROME_LOCAL_LENGTH_ERR, MLX5_CQE_SYNDROME_LOCAL_PROT_ERR,
    MLX5_CQE_SYNDROME_LOCAL_QP_OP_ERR, MLX5_CQE_SYNDROME_MW_BIND_ERR,
    MLX5_CQE_SYNDROME_REMOTE_ABORTED_ERR, MLX5_CQE_SYNDROME_REMOTE_ACCESS_ERR,
    MLX5_CQE_SYNDROME_REMOTE_INVAL_REQ_ERR, MLX5_CQE_SYNDROME_REMOTE_OP_ERR,
    MLX5_CQE_SYNDROME_RNR_RETRY_EXC_ERR, MLX5_CQE_SYNDROME_TRANSPORT_RETRY_EXC_ERR,
    MLX5_CQE_SYNDROME_WR_FLUSH_ERR, mlx5_cqe64 as cqe,
};
use super::wqe::Qpn;

/// Where a failed completion has its syndrome and the vendor's. The header has not the structure that
/// names them (`mlx5_err_cqe`, private to rdma-core's provider); they are the last two bytes of what is
/// the time in a good one.
const SYNDROME: std::ops::Range<usize> = cqe::TIMESTAMP.end - 1..cqe::TIMESTAMP.end;
const VENDOR: std::ops::Range<usize> = cqe::TIMESTAMP.end - 2..cqe::TIMESTAMP.end - 1;

/// Why a WQE failed, as the device says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Syndrome(pub u8);

impl Syndrome {
    /// More bytes than fit.
    pub const LOCAL_LENGTH: Self = Self(MLX5_CQE_SYNDROME_LOCAL_LENGTH_ERR);
    /// The WQE makes no sense.
    pub const LOCAL_QP_OPERATION: Self = Self(MLX5_CQE_SYNDROME_LOCAL_QP_OP_ERR);
    /// The local key or span.
    pub const LOCAL_PROTECTION: Self = Self(MLX5_CQE_SYNDROME_LOCAL_PROT_ERR);
    /// An earlier one failed.
    pub const FLUSHED: Self = Self(MLX5_CQE_SYNDROME_WR_FLUSH_ERR);
    /// The remote key, span or right.
    pub const REMOTE_ACCESS: Self = Self(MLX5_CQE_SYNDROME_REMOTE_ACCESS_ERR);
    /// The peer does not answer.
    pub const TRANSPORT_RETRY: Self = Self(MLX5_CQE_SYNDROME_TRANSPORT_RETRY_EXC_ERR);
    /// The peer has no receive.
    pub const RNR_RETRY: Self = Self(MLX5_CQE_SYNDROME_RNR_RETRY_EXC_ERR);

    /// It was given up.
    pub const REMOTE_ABORTED: Self = Self(MLX5_CQE_SYNDROME_REMOTE_ABORTED_ERR);

    /// Its name in the header, if it has one.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        Some(match self.0 {
            MLX5_CQE_SYNDROME_LOCAL_LENGTH_ERR => "LOCAL_LENGTH_ERR",
            MLX5_CQE_SYNDROME_LOCAL_QP_OP_ERR => "LOCAL_QP_OP_ERR",
            MLX5_CQE_SYNDROME_LOCAL_PROT_ERR => "LOCAL_PROT_ERR",
            MLX5_CQE_SYNDROME_WR_FLUSH_ERR => "WR_FLUSH_ERR",
            MLX5_CQE_SYNDROME_MW_BIND_ERR => "MW_BIND_ERR",
            MLX5_CQE_SYNDROME_BAD_RESP_ERR => "BAD_RESP_ERR",
            MLX5_CQE_SYNDROME_LOCAL_ACCESS_ERR => "LOCAL_ACCESS_ERR",
            MLX5_CQE_SYNDROME_REMOTE_INVAL_REQ_ERR => "REMOTE_INVAL_REQ_ERR",
            MLX5_CQE_SYNDROME_REMOTE_ACCESS_ERR => "REMOTE_ACCESS_ERR",
            MLX5_CQE_SYNDROME_REMOTE_OP_ERR => "REMOTE_OP_ERR",
            MLX5_CQE_SYNDROME_TRANSPORT_RETRY_EXC_ERR => "TRANSPORT_RETRY_EXC_ERR",
            MLX5_CQE_SYNDROME_RNR_RETRY_EXC_ERR => "RNR_RETRY_EXC_ERR",
            MLX5_CQE_SYNDROME_REMOTE_ABORTED_ERR => "REMOTE_ABORTED_ERR",
            _ => return None,
        })
    }
}

/// How a WQE ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CqeStatus {
    /// Well.
    Done {
        /// Bytes; of READs alone does a device say them.
        byte_count: u32,
    },
    /// Badly, and the queue pair is in the error state.
    Failed {
        /// Why.
        syndrome: Syndrome,
        /// What the vendor adds.
        vendor: u8,
    },
}

/// A completion of a send WQE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cqe {
    /// The queue pair.
    pub qpn: Qpn,
    /// The WQE's opcode.
    pub opcode: u8,
    /// Low 16 bits of the number of the WQE that ended: those before it that were not signalled have
    /// ended well.
    pub counter: u16,
    /// How it ended.
    pub status: CqeStatus,
}

impl Cqe {
    /// A slot of a queue that nothing has been written to.
    #[must_use]
    pub fn unwritten() -> Block {
        let mut block = [0; 64];
        put(&mut block, 0, cqe::OP_OWN, u64::from(MLX5_CQE_INVALID) << 4);
        block
    }

    /// Its bytes as completion `n` of a queue, counted from 0.
    #[must_use]
    pub fn encode(&self, n: u64, depth: CqDepth) -> Block {
        let mut block = [0; 64];
        let opcode = match self.status {
            CqeStatus::Done { byte_count } => {
                put(&mut block, 0, cqe::BYTE_CNT, byte_count.into());
                MLX5_CQE_REQ
            }
            CqeStatus::Failed { syndrome, vendor } => {
                put(&mut block, 0, SYNDROME, syndrome.0.into());
                put(&mut block, 0, VENDOR, vendor.into());
                MLX5_CQE_REQ_ERR
            }
        };
        let qpn = u64::from(self.opcode) << 24 | u64::from(self.qpn.get());
        put(&mut block, 0, cqe::SOP_DROP_QPN, qpn);
        put(&mut block, 0, cqe::WQE_COUNTER, self.counter.into());
        let last = opcode << 4 | u8::from(depth.owner(n));
        put(&mut block, 0, cqe::OP_OWN, last.into());
        block
    }

    /// What these bytes say as completion `n` of a queue: `None` where it has not been written yet.
    /// Who reads them out of memory that a device writes reads the last byte first.
    ///
    /// # Errors
    ///
    /// [`Mlx5Fault::Completion`].
    pub fn decode(block: &Block, n: u64, depth: CqDepth) -> Result<Option<Self>, Mlx5Fault> {
        let last = get8(block, 0, cqe::OP_OWN);
        let (opcode, format) = (last >> 4, last >> 2 & 3);
        let owner = last & MLX5_CQE_OWNER_MASK != 0;
        if opcode == MLX5_CQE_INVALID || owner != depth.owner(n) {
            return Ok(None);
        }
        let status = match (opcode, format) {
            (MLX5_CQE_REQ, 0) => CqeStatus::Done {
                byte_count: get32(block, 0, cqe::BYTE_CNT),
            },
            (MLX5_CQE_REQ_ERR, 0) => CqeStatus::Failed {
                syndrome: Syndrome(get8(block, 0, SYNDROME)),
                vendor: get8(block, 0, VENDOR),
            },
            _ => return Err(Mlx5Fault::Completion { opcode, format }),
        };
        let word = get32(block, 0, cqe::SOP_DROP_QPN);
        let [opcode, ..] = word.to_be_bytes();
        Ok(Some(Self {
            qpn: Qpn::low_24(word),
            opcode,
            // Two bytes.
            counter: get(block, 0, cqe::WQE_COUNTER) as u16,
            status,
        }))
    }
}
