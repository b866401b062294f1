//! Types and constants of `mlx5dv.h`, by its names: what `mlx5dv_init_obj` is given and gives.
//!
//! Transcribed from rdma-core, whose notice is in LICENSE-rdma-core of this crate. `tests/abi` reads this
//! file and lets a C compiler compare all of it with the header. Structures that have no name there are
//! called after the field that they are of.

use libc::{c_void, off_t};

/// [`mlx5dv_obj`]: the queue pair is asked for.
pub(crate) const MLX5DV_OBJ_QP: u64 = 1;
/// The completion queue is asked for.
pub(crate) const MLX5DV_OBJ_CQ: u64 = 2;
/// [`mlx5dv_qp::comp_mask`]: where the doorbell's page is in the device's file.
pub(crate) const MLX5DV_QP_MASK_UAR_MMAP_OFFSET: u64 = 1;

/// A queue of WQEs.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct mlx5dv_qp_sq {
    pub(crate) buf: *mut c_void,
    pub(crate) wqe_cnt: u32,
    pub(crate) stride: u32,
}

/// The doorbell.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct mlx5dv_qp_bf {
    pub(crate) reg: *mut c_void,
    pub(crate) size: u32,
}

/// What a queue pair is made of.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct mlx5dv_qp {
    pub(crate) dbrec: *mut u32,
    pub(crate) sq: mlx5dv_qp_sq,
    pub(crate) rq: mlx5dv_qp_sq,
    pub(crate) bf: mlx5dv_qp_bf,
    pub(crate) comp_mask: u64,
    pub(crate) uar_mmap_offset: off_t,
    pub(crate) tirn: u32,
    pub(crate) tisn: u32,
    pub(crate) rqn: u32,
    pub(crate) sqn: u32,
    pub(crate) tir_icm_addr: u64,
}

/// What a completion queue is made of.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct mlx5dv_cq {
    pub(crate) buf: *mut c_void,
    pub(crate) dbrec: *mut u32,
    pub(crate) cqe_cnt: u32,
    pub(crate) cqe_size: u32,
    pub(crate) cq_uar: *mut c_void,
    pub(crate) cqn: u32,
    pub(crate) comp_mask: u64,
}

/// An object of libibverbs, and where to put what it is made of.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct mlx5dv_obj_qp {
    pub(crate) r#in: *mut c_void,
    pub(crate) out: *mut c_void,
}

/// What is asked for.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct mlx5dv_obj {
    pub(crate) qp: mlx5dv_obj_qp,
    pub(crate) cq: mlx5dv_obj_qp,
    pub(crate) srq: mlx5dv_obj_qp,
    pub(crate) rwq: mlx5dv_obj_qp,
    pub(crate) dm: mlx5dv_obj_qp,
    pub(crate) ah: mlx5dv_obj_qp,
    pub(crate) pd: mlx5dv_obj_qp,
}
