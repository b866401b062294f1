//! Where the fields of mlx5's structures lie, and its constants, by the names that `mlx5dv.h` gives
//! them.
//!
//! Transcribed from rdma-core, whose notice is in LICENSE-rdma-core of this crate. `tests/abi` reads
//! this file: each module is a structure, with its `SIZE` and the bytes of its fields, and each constant
//! outside of them one of the header. All of them are compared with the installed header.

/// The control segment, with which every WQE begins.
pub(super) mod mlx5_wqe_ctrl_seg {
    use std::ops::Range;

    pub(crate) const SIZE: usize = 16;
    pub(crate) const OPMOD_IDX_OPCODE: Range<usize> = 0..4;
    pub(crate) const QPN_DS: Range<usize> = 4..8;
    pub(crate) const SIGNATURE: Range<usize> = 8..9;
    pub(crate) const DCI_STREAM_CHANNEL_ID: Range<usize> = 9..11;
    pub(crate) const FM_CE_SE: Range<usize> = 11..12;
    pub(crate) const IMM: Range<usize> = 12..16;
}

/// Where the remote memory is.
pub(super) mod mlx5_wqe_raddr_seg {
    use std::ops::Range;

    pub(crate) const SIZE: usize = 16;
    pub(crate) const RADDR: Range<usize> = 0..8;
    pub(crate) const RKEY: Range<usize> = 8..12;
    pub(crate) const RESERVED: Range<usize> = 12..16;
}

/// Where the local memory is.
pub(super) mod mlx5_wqe_data_seg {
    use std::ops::Range;

    pub(crate) const SIZE: usize = 16;
    pub(crate) const BYTE_COUNT: Range<usize> = 0..4;
    pub(crate) const LKEY: Range<usize> = 4..8;
    pub(crate) const ADDR: Range<usize> = 8..16;
}

/// What stands before data in the WQE itself.
pub(super) mod mlx5_wqe_inl_data_seg {
    use std::ops::Range;

    pub(crate) const SIZE: usize = 4;
    pub(crate) const BYTE_COUNT: Range<usize> = 0..4;
}

/// A completion.
pub(super) mod mlx5_cqe64 {
    use std::ops::Range;

    pub(crate) const SIZE: usize = 64;
    pub(crate) const BYTE_CNT: Range<usize> = 44..48;
    pub(crate) const TIMESTAMP: Range<usize> = 48..56;
    pub(crate) const SOP_DROP_QPN: Range<usize> = 56..60;
    pub(crate) const WQE_COUNTER: Range<usize> = 60..62;
    pub(crate) const OP_OWN: Range<usize> = 63..64;
}

pub(super) const MLX5_SEND_WQE_BB: usize = 64;
pub(super) const MLX5_INLINE_SEG: u32 = 0x8000_0000;

pub(super) const MLX5_OPCODE_NOP: u8 = 0x00;
pub(super) const MLX5_OPCODE_RDMA_WRITE: u8 = 0x08;
pub(super) const MLX5_OPCODE_RDMA_WRITE_IMM: u8 = 0x09;
pub(super) const MLX5_OPCODE_RDMA_READ: u8 = 0x10;

pub(super) const MLX5_WQE_CTRL_CQ_UPDATE: u8 = 8;
pub(super) const MLX5_WQE_CTRL_SOLICITED: u8 = 2;
pub(super) const MLX5_WQE_CTRL_FENCE: u8 = 0x80;
pub(super) const MLX5_WQE_CTRL_INITIATOR_SMALL_FENCE: u8 = 0x20;

pub(super) const MLX5_CQE_OWNER_MASK: u8 = 1;
pub(super) const MLX5_CQE_REQ: u8 = 0;
pub(super) const MLX5_CQE_REQ_ERR: u8 = 13;
pub(super) const MLX5_CQE_INVALID: u8 = 15;

pub(super) const MLX5_CQE_SYNDROME_LOCAL_LENGTH_ERR: u8 = 0x01;
pub(super) const MLX5_CQE_SYNDROME_LOCAL_QP_OP_ERR: u8 = 0x02;
pub(super) const MLX5_CQE_SYNDROME_LOCAL_PROT_ERR: u8 = 0x04;
pub(super) const MLX5_CQE_SYNDROME_WR_FLUSH_ERR: u8 = 0x05;
pub(super) const MLX5_CQE_SYNDROME_MW_BIND_ERR: u8 = 0x06;
pub(super) const MLX5_CQE_SYNDROME_BAD_RESP_ERR: u8 = 0x10;
pub(super) const MLX5_CQE_SYNDROME_LOCAL_ACCESS_ERR: u8 = 0x11;
pub(super) const MLX5_CQE_SYNDROME_REMOTE_INVAL_REQ_ERR: u8 = 0x12;
pub(super) const MLX5_CQE_SYNDROME_REMOTE_ACCESS_ERR: u8 = 0x13;
pub(super) const MLX5_CQE_SYNDROME_REMOTE_OP_ERR: u8 = 0x14;
pub(super) const MLX5_CQE_SYNDROME_TRANSPORT_RETRY_EXC_ERR: u8 = 0x15;
pub(super) const MLX5_CQE_SYNDROME_RNR_RETRY_EXC_ERR: u8 = 0x16;
pub(super) const MLX5_CQE_SYNDROME_REMOTE_ABORTED_ERR: u8 = 0x22;

pub(super) const MLX5_RCV_DBR: usize = 0;
pub(super) const MLX5_SND_DBR: usize = 1;
