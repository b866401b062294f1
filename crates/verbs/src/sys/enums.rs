//! Constants of C: enumerations as newtypes around their integer, so that a value that this version
//! does not know is a value like any other; flags as plain integers.
//!
//! Transcribed from rdma-core, whose notice is in LICENSE-rdma-core of this crate.

use libc::{c_int, c_uint};

/// What a device is.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ibv_node_type(pub(crate) c_int);

impl ibv_node_type {
    pub(crate) const IBV_NODE_UNKNOWN: Self = Self(-1);
    pub(crate) const IBV_NODE_CA: Self = Self(1);
    pub(crate) const IBV_NODE_SWITCH: Self = Self(2);
    pub(crate) const IBV_NODE_ROUTER: Self = Self(3);
    pub(crate) const IBV_NODE_RNIC: Self = Self(4);
    pub(crate) const IBV_NODE_USNIC: Self = Self(5);
    pub(crate) const IBV_NODE_USNIC_UDP: Self = Self(6);
    pub(crate) const IBV_NODE_UNSPECIFIED: Self = Self(7);
}

/// What a device speaks.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ibv_transport_type(pub(crate) c_int);

impl ibv_transport_type {
    pub(crate) const IBV_TRANSPORT_UNKNOWN: Self = Self(-1);
    pub(crate) const IBV_TRANSPORT_IB: Self = Self(0);
    pub(crate) const IBV_TRANSPORT_IWARP: Self = Self(1);
    pub(crate) const IBV_TRANSPORT_USNIC: Self = Self(2);
    pub(crate) const IBV_TRANSPORT_USNIC_UDP: Self = Self(3);
    pub(crate) const IBV_TRANSPORT_UNSPECIFIED: Self = Self(4);
}

/// How atomic a device's atomics are.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ibv_atomic_cap(pub(crate) c_uint);

impl ibv_atomic_cap {
    pub(crate) const IBV_ATOMIC_NONE: Self = Self(0);
    pub(crate) const IBV_ATOMIC_HCA: Self = Self(1);
    pub(crate) const IBV_ATOMIC_GLOB: Self = Self(2);
}

/// Path MTU.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ibv_mtu(pub(crate) c_uint);

impl ibv_mtu {
    pub(crate) const IBV_MTU_256: Self = Self(1);
    pub(crate) const IBV_MTU_512: Self = Self(2);
    pub(crate) const IBV_MTU_1024: Self = Self(3);
    pub(crate) const IBV_MTU_2048: Self = Self(4);
    pub(crate) const IBV_MTU_4096: Self = Self(5);
}

/// State of a port.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ibv_port_state(pub(crate) c_uint);

impl ibv_port_state {
    pub(crate) const IBV_PORT_NOP: Self = Self(0);
    pub(crate) const IBV_PORT_DOWN: Self = Self(1);
    pub(crate) const IBV_PORT_INIT: Self = Self(2);
    pub(crate) const IBV_PORT_ARMED: Self = Self(3);
    pub(crate) const IBV_PORT_ACTIVE: Self = Self(4);
    pub(crate) const IBV_PORT_ACTIVE_DEFER: Self = Self(5);
}

/// What an asynchronous event tells.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ibv_event_type(pub(crate) c_uint);

impl ibv_event_type {
    pub(crate) const IBV_EVENT_CQ_ERR: Self = Self(0);
    pub(crate) const IBV_EVENT_QP_FATAL: Self = Self(1);
    pub(crate) const IBV_EVENT_QP_REQ_ERR: Self = Self(2);
    pub(crate) const IBV_EVENT_QP_ACCESS_ERR: Self = Self(3);
    pub(crate) const IBV_EVENT_COMM_EST: Self = Self(4);
    pub(crate) const IBV_EVENT_SQ_DRAINED: Self = Self(5);
    pub(crate) const IBV_EVENT_PATH_MIG: Self = Self(6);
    pub(crate) const IBV_EVENT_PATH_MIG_ERR: Self = Self(7);
    pub(crate) const IBV_EVENT_DEVICE_FATAL: Self = Self(8);
    pub(crate) const IBV_EVENT_PORT_ACTIVE: Self = Self(9);
    pub(crate) const IBV_EVENT_PORT_ERR: Self = Self(10);
    pub(crate) const IBV_EVENT_LID_CHANGE: Self = Self(11);
    pub(crate) const IBV_EVENT_PKEY_CHANGE: Self = Self(12);
    pub(crate) const IBV_EVENT_SM_CHANGE: Self = Self(13);
    pub(crate) const IBV_EVENT_SRQ_ERR: Self = Self(14);
    pub(crate) const IBV_EVENT_SRQ_LIMIT_REACHED: Self = Self(15);
    pub(crate) const IBV_EVENT_QP_LAST_WQE_REACHED: Self = Self(16);
    pub(crate) const IBV_EVENT_CLIENT_REREGISTER: Self = Self(17);
    pub(crate) const IBV_EVENT_GID_CHANGE: Self = Self(18);
    pub(crate) const IBV_EVENT_WQ_FATAL: Self = Self(19);
}

/// How a work request ended.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ibv_wc_status(pub(crate) c_uint);

impl ibv_wc_status {
    pub(crate) const IBV_WC_SUCCESS: Self = Self(0);
    pub(crate) const IBV_WC_LOC_LEN_ERR: Self = Self(1);
    pub(crate) const IBV_WC_LOC_QP_OP_ERR: Self = Self(2);
    pub(crate) const IBV_WC_LOC_EEC_OP_ERR: Self = Self(3);
    pub(crate) const IBV_WC_LOC_PROT_ERR: Self = Self(4);
    pub(crate) const IBV_WC_WR_FLUSH_ERR: Self = Self(5);
    pub(crate) const IBV_WC_MW_BIND_ERR: Self = Self(6);
    pub(crate) const IBV_WC_BAD_RESP_ERR: Self = Self(7);
    pub(crate) const IBV_WC_LOC_ACCESS_ERR: Self = Self(8);
    pub(crate) const IBV_WC_REM_INV_REQ_ERR: Self = Self(9);
    pub(crate) const IBV_WC_REM_ACCESS_ERR: Self = Self(10);
    pub(crate) const IBV_WC_REM_OP_ERR: Self = Self(11);
    pub(crate) const IBV_WC_RETRY_EXC_ERR: Self = Self(12);
    pub(crate) const IBV_WC_RNR_RETRY_EXC_ERR: Self = Self(13);
    pub(crate) const IBV_WC_LOC_RDD_VIOL_ERR: Self = Self(14);
    pub(crate) const IBV_WC_REM_INV_RD_REQ_ERR: Self = Self(15);
    pub(crate) const IBV_WC_REM_ABORT_ERR: Self = Self(16);
    pub(crate) const IBV_WC_INV_EECN_ERR: Self = Self(17);
    pub(crate) const IBV_WC_INV_EEC_STATE_ERR: Self = Self(18);
    pub(crate) const IBV_WC_FATAL_ERR: Self = Self(19);
    pub(crate) const IBV_WC_RESP_TIMEOUT_ERR: Self = Self(20);
    pub(crate) const IBV_WC_GENERAL_ERR: Self = Self(21);
    pub(crate) const IBV_WC_TM_ERR: Self = Self(22);
    pub(crate) const IBV_WC_TM_RNDV_INCOMPLETE: Self = Self(23);
}

/// What a completed work request was.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ibv_wc_opcode(pub(crate) c_uint);

impl ibv_wc_opcode {
    pub(crate) const IBV_WC_SEND: Self = Self(0);
    pub(crate) const IBV_WC_RDMA_WRITE: Self = Self(1);
    pub(crate) const IBV_WC_RDMA_READ: Self = Self(2);
    pub(crate) const IBV_WC_COMP_SWAP: Self = Self(3);
    pub(crate) const IBV_WC_FETCH_ADD: Self = Self(4);
    pub(crate) const IBV_WC_BIND_MW: Self = Self(5);
    pub(crate) const IBV_WC_LOCAL_INV: Self = Self(6);
    pub(crate) const IBV_WC_TSO: Self = Self(7);
    pub(crate) const IBV_WC_ATOMIC_WRITE: Self = Self(9);
    pub(crate) const IBV_WC_RECV: Self = Self(128);
    pub(crate) const IBV_WC_RECV_RDMA_WITH_IMM: Self = Self(129);
    pub(crate) const IBV_WC_TM_ADD: Self = Self(130);
    pub(crate) const IBV_WC_TM_DEL: Self = Self(131);
    pub(crate) const IBV_WC_TM_SYNC: Self = Self(132);
    pub(crate) const IBV_WC_TM_RECV: Self = Self(133);
    pub(crate) const IBV_WC_TM_NO_TAG: Self = Self(134);
    pub(crate) const IBV_WC_DRIVER1: Self = Self(135);
    pub(crate) const IBV_WC_DRIVER2: Self = Self(136);
    pub(crate) const IBV_WC_DRIVER3: Self = Self(137);
}

/// Transport of a queue pair.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ibv_qp_type(pub(crate) c_uint);

impl ibv_qp_type {
    pub(crate) const IBV_QPT_RC: Self = Self(2);
    pub(crate) const IBV_QPT_UC: Self = Self(3);
    pub(crate) const IBV_QPT_UD: Self = Self(4);
    pub(crate) const IBV_QPT_RAW_PACKET: Self = Self(8);
    pub(crate) const IBV_QPT_XRC_SEND: Self = Self(9);
    pub(crate) const IBV_QPT_XRC_RECV: Self = Self(10);
    pub(crate) const IBV_QPT_DRIVER: Self = Self(255);
}

/// State of a queue pair.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ibv_qp_state(pub(crate) c_uint);

impl ibv_qp_state {
    pub(crate) const IBV_QPS_RESET: Self = Self(0);
    pub(crate) const IBV_QPS_INIT: Self = Self(1);
    pub(crate) const IBV_QPS_RTR: Self = Self(2);
    pub(crate) const IBV_QPS_RTS: Self = Self(3);
    pub(crate) const IBV_QPS_SQD: Self = Self(4);
    pub(crate) const IBV_QPS_SQE: Self = Self(5);
    pub(crate) const IBV_QPS_ERR: Self = Self(6);
    pub(crate) const IBV_QPS_UNKNOWN: Self = Self(7);
}

/// State of path migration.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ibv_mig_state(pub(crate) c_uint);

impl ibv_mig_state {
    pub(crate) const IBV_MIG_MIGRATED: Self = Self(0);
    pub(crate) const IBV_MIG_REARM: Self = Self(1);
    pub(crate) const IBV_MIG_ARMED: Self = Self(2);
}

/// What a send work request does.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ibv_wr_opcode(pub(crate) c_uint);

impl ibv_wr_opcode {
    pub(crate) const IBV_WR_RDMA_WRITE: Self = Self(0);
    pub(crate) const IBV_WR_RDMA_WRITE_WITH_IMM: Self = Self(1);
    pub(crate) const IBV_WR_SEND: Self = Self(2);
    pub(crate) const IBV_WR_SEND_WITH_IMM: Self = Self(3);
    pub(crate) const IBV_WR_RDMA_READ: Self = Self(4);
    pub(crate) const IBV_WR_ATOMIC_CMP_AND_SWP: Self = Self(5);
    pub(crate) const IBV_WR_ATOMIC_FETCH_AND_ADD: Self = Self(6);
    pub(crate) const IBV_WR_LOCAL_INV: Self = Self(7);
    pub(crate) const IBV_WR_BIND_MW: Self = Self(8);
    pub(crate) const IBV_WR_SEND_WITH_INV: Self = Self(9);
    pub(crate) const IBV_WR_TSO: Self = Self(10);
    pub(crate) const IBV_WR_DRIVER1: Self = Self(11);
    pub(crate) const IBV_WR_ATOMIC_WRITE: Self = Self(15);
}

/// What a GID is an address of.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ibv_gid_type(pub(crate) c_uint);

impl ibv_gid_type {
    pub(crate) const IBV_GID_TYPE_IB: Self = Self(0);
    pub(crate) const IBV_GID_TYPE_ROCE_V1: Self = Self(1);
    pub(crate) const IBV_GID_TYPE_ROCE_V2: Self = Self(2);
}

/// Whether memory is safe when a process forks.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ibv_fork_status(pub(crate) c_uint);

impl ibv_fork_status {
    pub(crate) const IBV_FORK_DISABLED: Self = Self(0);
    pub(crate) const IBV_FORK_ENABLED: Self = Self(1);
    pub(crate) const IBV_FORK_UNNEEDED: Self = Self(2);
}

// enum ibv_access_flags: Access to a region, or through a queue pair.

pub(crate) const IBV_ACCESS_LOCAL_WRITE: c_uint = 1 << 0;
pub(crate) const IBV_ACCESS_REMOTE_WRITE: c_uint = 1 << 1;
pub(crate) const IBV_ACCESS_REMOTE_READ: c_uint = 1 << 2;
pub(crate) const IBV_ACCESS_REMOTE_ATOMIC: c_uint = 1 << 3;
pub(crate) const IBV_ACCESS_MW_BIND: c_uint = 1 << 4;
pub(crate) const IBV_ACCESS_ZERO_BASED: c_uint = 1 << 5;
pub(crate) const IBV_ACCESS_ON_DEMAND: c_uint = 1 << 6;
pub(crate) const IBV_ACCESS_HUGETLB: c_uint = 1 << 7;
pub(crate) const IBV_ACCESS_RELAXED_ORDERING: c_uint = 1 << 20;

// enum ibv_qp_attr_mask: Which attributes `ibv_modify_qp` sets.

pub(crate) const IBV_QP_STATE: c_uint = 1 << 0;
pub(crate) const IBV_QP_CUR_STATE: c_uint = 1 << 1;
pub(crate) const IBV_QP_EN_SQD_ASYNC_NOTIFY: c_uint = 1 << 2;
pub(crate) const IBV_QP_ACCESS_FLAGS: c_uint = 1 << 3;
pub(crate) const IBV_QP_PKEY_INDEX: c_uint = 1 << 4;
pub(crate) const IBV_QP_PORT: c_uint = 1 << 5;
pub(crate) const IBV_QP_QKEY: c_uint = 1 << 6;
pub(crate) const IBV_QP_AV: c_uint = 1 << 7;
pub(crate) const IBV_QP_PATH_MTU: c_uint = 1 << 8;
pub(crate) const IBV_QP_TIMEOUT: c_uint = 1 << 9;
pub(crate) const IBV_QP_RETRY_CNT: c_uint = 1 << 10;
pub(crate) const IBV_QP_RNR_RETRY: c_uint = 1 << 11;
pub(crate) const IBV_QP_RQ_PSN: c_uint = 1 << 12;
pub(crate) const IBV_QP_MAX_QP_RD_ATOMIC: c_uint = 1 << 13;
pub(crate) const IBV_QP_ALT_PATH: c_uint = 1 << 14;
pub(crate) const IBV_QP_MIN_RNR_TIMER: c_uint = 1 << 15;
pub(crate) const IBV_QP_SQ_PSN: c_uint = 1 << 16;
pub(crate) const IBV_QP_MAX_DEST_RD_ATOMIC: c_uint = 1 << 17;
pub(crate) const IBV_QP_PATH_MIG_STATE: c_uint = 1 << 18;
pub(crate) const IBV_QP_CAP: c_uint = 1 << 19;
pub(crate) const IBV_QP_DEST_QPN: c_uint = 1 << 20;
pub(crate) const IBV_QP_RATE_LIMIT: c_uint = 1 << 25;

// enum ibv_send_flags: Flags of a send work request.

pub(crate) const IBV_SEND_FENCE: c_uint = 1 << 0;
pub(crate) const IBV_SEND_SIGNALED: c_uint = 1 << 1;
pub(crate) const IBV_SEND_SOLICITED: c_uint = 1 << 2;
pub(crate) const IBV_SEND_INLINE: c_uint = 1 << 3;
pub(crate) const IBV_SEND_IP_CSUM: c_uint = 1 << 4;

// enum ibv_wc_flags: Flags of a completion.

pub(crate) const IBV_WC_GRH: c_uint = 1 << 0;
pub(crate) const IBV_WC_WITH_IMM: c_uint = 1 << 1;
pub(crate) const IBV_WC_IP_CSUM_OK: c_uint = 1 << 2;
pub(crate) const IBV_WC_WITH_INV: c_uint = 1 << 3;
pub(crate) const IBV_WC_TM_SYNC_REQ: c_uint = 1 << 4;
pub(crate) const IBV_WC_TM_MATCH: c_uint = 1 << 5;
pub(crate) const IBV_WC_TM_DATA_VALID: c_uint = 1 << 6;

// The link layer of a port, in a byte of `ibv_port_attr`.

pub(crate) const IBV_LINK_LAYER_UNSPECIFIED: u8 = 0;
pub(crate) const IBV_LINK_LAYER_INFINIBAND: u8 = 1;
pub(crate) const IBV_LINK_LAYER_ETHERNET: u8 = 2;

/// In `ibv_port_attr::flags`: every packet needs a global route header.
pub(crate) const IBV_QPF_GRH_REQUIRED: u8 = 1 << 0;

/// Access flags that a kernel or device may leave out: `ibv_reg_mr` does not take them,
/// `ibv_reg_mr_iova2` does.
pub(crate) const IBV_ACCESS_OPTIONAL_RANGE: c_uint = 0x3ff0_0000;
