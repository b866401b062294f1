//! Structures of C. Fields that a caller must not touch are there for their size.
//!
//! Transcribed from rdma-core, whose notice is in LICENSE-rdma-core of this crate. The tests in
//! tests/abi read this file and compare every structure in it with the C headers.

use libc::{c_char, c_int, c_uint, c_void, pthread_cond_t, pthread_mutex_t, size_t};

use super::enums::{
    ibv_atomic_cap, ibv_event_type, ibv_gid_type, ibv_mig_state, ibv_mtu, ibv_node_type,
    ibv_port_state, ibv_qp_state, ibv_qp_type, ibv_transport_type, ibv_wc_opcode, ibv_wc_status,
    ibv_wr_opcode,
};

/// The older [`ibv_port_attr`], which `ibv_query_port` fills: it ends before `port_cap_flags2`.
pub(crate) type _compat_ibv_port_attr = ibv_port_attr;

/// A function that we never call.
pub(crate) type Uncalled = Option<unsafe extern "C" fn()>;

/// An address of a port, in network byte order. In C a union with two halves.
#[repr(C, align(8))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ibv_gid {
    pub(crate) raw: [u8; 16],
}

/// An entry of the table of all GIDs.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ibv_gid_entry {
    pub(crate) gid: ibv_gid,
    pub(crate) gid_index: u32,
    pub(crate) port_num: u32,
    pub(crate) gid_type: ibv_gid_type,
    pub(crate) ndev_ifindex: u32,
}

/// What a device is and takes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct ibv_device_attr {
    pub(crate) fw_ver: [c_char; 64],
    pub(crate) node_guid: u64,
    pub(crate) sys_image_guid: u64,
    pub(crate) max_mr_size: u64,
    pub(crate) page_size_cap: u64,
    pub(crate) vendor_id: u32,
    pub(crate) vendor_part_id: u32,
    pub(crate) hw_ver: u32,
    pub(crate) max_qp: c_int,
    pub(crate) max_qp_wr: c_int,
    pub(crate) device_cap_flags: c_uint,
    pub(crate) max_sge: c_int,
    pub(crate) max_sge_rd: c_int,
    pub(crate) max_cq: c_int,
    pub(crate) max_cqe: c_int,
    pub(crate) max_mr: c_int,
    pub(crate) max_pd: c_int,
    pub(crate) max_qp_rd_atom: c_int,
    pub(crate) max_ee_rd_atom: c_int,
    pub(crate) max_res_rd_atom: c_int,
    pub(crate) max_qp_init_rd_atom: c_int,
    pub(crate) max_ee_init_rd_atom: c_int,
    pub(crate) atomic_cap: ibv_atomic_cap,
    pub(crate) max_ee: c_int,
    pub(crate) max_rdd: c_int,
    pub(crate) max_mw: c_int,
    pub(crate) max_raw_ipv6_qp: c_int,
    pub(crate) max_raw_ethy_qp: c_int,
    pub(crate) max_mcast_grp: c_int,
    pub(crate) max_mcast_qp_attach: c_int,
    pub(crate) max_total_mcast_qp_attach: c_int,
    pub(crate) max_ah: c_int,
    pub(crate) max_fmr: c_int,
    pub(crate) max_map_per_fmr: c_int,
    pub(crate) max_srq: c_int,
    pub(crate) max_srq_wr: c_int,
    pub(crate) max_srq_sge: c_int,
    pub(crate) max_pkeys: u16,
    pub(crate) local_ca_ack_delay: u8,
    pub(crate) phys_port_cnt: u8,
}

/// What a port is and does.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ibv_port_attr {
    pub(crate) state: ibv_port_state,
    pub(crate) max_mtu: ibv_mtu,
    pub(crate) active_mtu: ibv_mtu,
    pub(crate) gid_tbl_len: c_int,
    pub(crate) port_cap_flags: u32,
    pub(crate) max_msg_sz: u32,
    pub(crate) bad_pkey_cntr: u32,
    pub(crate) qkey_viol_cntr: u32,
    pub(crate) pkey_tbl_len: u16,
    pub(crate) lid: u16,
    pub(crate) sm_lid: u16,
    pub(crate) lmc: u8,
    pub(crate) max_vl_num: u8,
    pub(crate) sm_sl: u8,
    pub(crate) subnet_timeout: u8,
    pub(crate) init_type_reply: u8,
    pub(crate) active_width: u8,
    pub(crate) active_speed: u8,
    pub(crate) phys_state: u8,
    pub(crate) link_layer: u8,
    pub(crate) flags: u8,
    pub(crate) port_cap_flags2: u16,
}

/// What an asynchronous event is about; `ibv_async_event::event_type` says which.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) union ibv_async_event_element {
    pub(crate) cq: *mut ibv_cq,
    pub(crate) qp: *mut ibv_qp,
    pub(crate) srq: *mut ibv_srq,
    pub(crate) wq: *mut c_void,
    pub(crate) port_num: c_int,
}

/// Something that no completion tells.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ibv_async_event {
    pub(crate) element: ibv_async_event_element,
    pub(crate) event_type: ibv_event_type,
}

/// A completion. After an error only `wr_id`, `status`, `qp_num` and `vendor_err` mean anything.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct ibv_wc {
    pub(crate) wr_id: u64,
    pub(crate) status: ibv_wc_status,
    pub(crate) opcode: ibv_wc_opcode,
    pub(crate) vendor_err: u32,
    pub(crate) byte_len: u32,
    /// In network byte order. In C a union with an invalidated rkey.
    pub(crate) imm_data: u32,
    pub(crate) qp_num: u32,
    pub(crate) src_qp: u32,
    pub(crate) wc_flags: c_uint,
    pub(crate) pkey_index: u16,
    pub(crate) slid: u16,
    pub(crate) sl: u8,
    pub(crate) dlid_path_bits: u8,
}

/// A protection domain.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct ibv_pd {
    pub(crate) context: *mut ibv_context,
    pub(crate) handle: u32,
}

/// A memory region.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct ibv_mr {
    pub(crate) context: *mut ibv_context,
    pub(crate) pd: *mut ibv_pd,
    pub(crate) addr: *mut c_void,
    pub(crate) length: size_t,
    pub(crate) handle: u32,
    pub(crate) lkey: u32,
    pub(crate) rkey: u32,
}

/// The way to a port beyond its subnet.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ibv_global_route {
    pub(crate) dgid: ibv_gid,
    pub(crate) flow_label: u32,
    pub(crate) sgid_index: u8,
    pub(crate) hop_limit: u8,
    pub(crate) traffic_class: u8,
}

/// The way to a port.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ibv_ah_attr {
    pub(crate) grh: ibv_global_route,
    pub(crate) dlid: u16,
    pub(crate) sl: u8,
    pub(crate) src_path_bits: u8,
    pub(crate) static_rate: u8,
    pub(crate) is_global: u8,
    pub(crate) port_num: u8,
}

/// The size of a queue pair.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ibv_qp_cap {
    pub(crate) max_send_wr: u32,
    pub(crate) max_recv_wr: u32,
    pub(crate) max_send_sge: u32,
    pub(crate) max_recv_sge: u32,
    pub(crate) max_inline_data: u32,
}

/// How a queue pair is made.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct ibv_qp_init_attr {
    pub(crate) qp_context: *mut c_void,
    pub(crate) send_cq: *mut ibv_cq,
    pub(crate) recv_cq: *mut ibv_cq,
    pub(crate) srq: *mut ibv_srq,
    pub(crate) cap: ibv_qp_cap,
    pub(crate) qp_type: ibv_qp_type,
    pub(crate) sq_sig_all: c_int,
}

/// Attributes of a queue pair.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ibv_qp_attr {
    pub(crate) qp_state: ibv_qp_state,
    pub(crate) cur_qp_state: ibv_qp_state,
    pub(crate) path_mtu: ibv_mtu,
    pub(crate) path_mig_state: ibv_mig_state,
    pub(crate) qkey: u32,
    pub(crate) rq_psn: u32,
    pub(crate) sq_psn: u32,
    pub(crate) dest_qp_num: u32,
    pub(crate) qp_access_flags: c_uint,
    pub(crate) cap: ibv_qp_cap,
    pub(crate) ah_attr: ibv_ah_attr,
    pub(crate) alt_ah_attr: ibv_ah_attr,
    pub(crate) pkey_index: u16,
    pub(crate) alt_pkey_index: u16,
    pub(crate) en_sqd_async_notify: u8,
    pub(crate) sq_draining: u8,
    pub(crate) max_rd_atomic: u8,
    pub(crate) max_dest_rd_atomic: u8,
    pub(crate) min_rnr_timer: u8,
    pub(crate) port_num: u8,
    pub(crate) timeout: u8,
    pub(crate) retry_cnt: u8,
    pub(crate) rnr_retry: u8,
    pub(crate) alt_port_num: u8,
    pub(crate) alt_timeout: u8,
    pub(crate) rate_limit: u32,
}

/// A span of registered memory.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct ibv_sge {
    pub(crate) addr: u64,
    pub(crate) length: u32,
    pub(crate) lkey: u32,
}

/// The remote side of a READ or WRITE.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct ibv_send_wr_rdma {
    pub(crate) remote_addr: u64,
    pub(crate) rkey: u32,
}

/// The remote side of an atomic.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct ibv_send_wr_atomic {
    pub(crate) remote_addr: u64,
    pub(crate) compare_add: u64,
    pub(crate) swap: u64,
    pub(crate) rkey: u32,
}

/// The remote side of a datagram.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct ibv_send_wr_ud {
    pub(crate) ah: *mut c_void,
    pub(crate) remote_qpn: u32,
    pub(crate) remote_qkey: u32,
}

/// The remote side of a work request; its opcode says which.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) union ibv_send_wr_wr {
    pub(crate) rdma: ibv_send_wr_rdma,
    pub(crate) atomic: ibv_send_wr_atomic,
    pub(crate) ud: ibv_send_wr_ud,
}

/// The shared receive queue that an XRC request goes to.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct ibv_send_wr_xrc {
    pub(crate) remote_srqn: u32,
}

/// What memory a window is bound to.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct ibv_mw_bind_info {
    pub(crate) mr: *mut ibv_mr,
    pub(crate) addr: u64,
    pub(crate) length: u64,
    pub(crate) mw_access_flags: c_uint,
}

/// Binding a memory window.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct ibv_send_wr_bind_mw {
    pub(crate) mw: *mut c_void,
    pub(crate) rkey: u32,
    pub(crate) bind_info: ibv_mw_bind_info,
}

/// A send work request.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ibv_send_wr {
    pub(crate) wr_id: u64,
    pub(crate) next: *mut ibv_send_wr,
    pub(crate) sg_list: *mut ibv_sge,
    pub(crate) num_sge: c_int,
    pub(crate) opcode: ibv_wr_opcode,
    pub(crate) send_flags: c_uint,
    /// In network byte order. In C a union with an rkey to invalidate.
    pub(crate) imm_data: u32,
    pub(crate) wr: ibv_send_wr_wr,
    /// In C a union of this one structure.
    pub(crate) qp_type: ibv_send_wr_xrc,
    /// In C a union with what segmentation offload needs, which is smaller.
    pub(crate) bind_mw: ibv_send_wr_bind_mw,
}

/// A receive.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct ibv_recv_wr {
    pub(crate) wr_id: u64,
    pub(crate) next: *mut ibv_recv_wr,
    pub(crate) sg_list: *mut ibv_sge,
    pub(crate) num_sge: c_int,
}

/// A shared receive queue, of which we have none.
#[repr(C)]
pub(crate) struct ibv_srq {
    pub(crate) context: *mut ibv_context,
    pub(crate) srq_context: *mut c_void,
    pub(crate) pd: *mut ibv_pd,
    pub(crate) handle: u32,
    pub(crate) mutex: pthread_mutex_t,
    pub(crate) cond: pthread_cond_t,
    pub(crate) events_completed: u32,
}

/// A queue pair.
#[repr(C)]
pub(crate) struct ibv_qp {
    pub(crate) context: *mut ibv_context,
    pub(crate) qp_context: *mut c_void,
    pub(crate) pd: *mut ibv_pd,
    pub(crate) send_cq: *mut ibv_cq,
    pub(crate) recv_cq: *mut ibv_cq,
    pub(crate) srq: *mut ibv_srq,
    pub(crate) handle: u32,
    pub(crate) qp_num: u32,
    pub(crate) state: ibv_qp_state,
    pub(crate) qp_type: ibv_qp_type,
    pub(crate) mutex: pthread_mutex_t,
    pub(crate) cond: pthread_cond_t,
    pub(crate) events_completed: u32,
}

/// Where completion events arrive.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct ibv_comp_channel {
    pub(crate) context: *mut ibv_context,
    pub(crate) fd: c_int,
    pub(crate) refcnt: c_int,
}

/// A completion queue.
#[repr(C)]
pub(crate) struct ibv_cq {
    pub(crate) context: *mut ibv_context,
    pub(crate) channel: *mut ibv_comp_channel,
    pub(crate) cq_context: *mut c_void,
    pub(crate) handle: u32,
    pub(crate) cqe: c_int,
    pub(crate) mutex: pthread_mutex_t,
    pub(crate) cond: pthread_cond_t,
    pub(crate) comp_events_completed: u32,
    pub(crate) async_events_completed: u32,
}

/// Never used, says C.
#[repr(C)]
pub(crate) struct _ibv_device_ops {
    pub(crate) _dummy1: Uncalled,
    pub(crate) _dummy2: Uncalled,
}

/// A device that is not open. Paths and names end with a zero byte.
#[repr(C)]
pub(crate) struct ibv_device {
    pub(crate) _ops: _ibv_device_ops,
    pub(crate) node_type: ibv_node_type,
    pub(crate) transport_type: ibv_transport_type,
    pub(crate) name: [c_char; 64],
    pub(crate) dev_name: [c_char; 64],
    pub(crate) dev_path: [c_char; 256],
    pub(crate) ibdev_path: [c_char; 256],
}

/// Functions of the device's driver that C reaches through inline functions.
#[repr(C)]
pub(crate) struct ibv_context_ops {
    pub(crate) _compat_query_device: Uncalled,
    pub(crate) _compat_query_port: Uncalled,
    pub(crate) _compat_alloc_pd: Uncalled,
    pub(crate) _compat_dealloc_pd: Uncalled,
    pub(crate) _compat_reg_mr: Uncalled,
    pub(crate) _compat_rereg_mr: Uncalled,
    pub(crate) _compat_dereg_mr: Uncalled,
    pub(crate) alloc_mw: Uncalled,
    pub(crate) bind_mw: Uncalled,
    pub(crate) dealloc_mw: Uncalled,
    pub(crate) _compat_create_cq: Uncalled,
    pub(crate) poll_cq: Option<unsafe extern "C" fn(*mut ibv_cq, c_int, *mut ibv_wc) -> c_int>,
    pub(crate) req_notify_cq: Option<unsafe extern "C" fn(*mut ibv_cq, c_int) -> c_int>,
    pub(crate) _compat_cq_event: Uncalled,
    pub(crate) _compat_resize_cq: Uncalled,
    pub(crate) _compat_destroy_cq: Uncalled,
    pub(crate) _compat_create_srq: Uncalled,
    pub(crate) _compat_modify_srq: Uncalled,
    pub(crate) _compat_query_srq: Uncalled,
    pub(crate) _compat_destroy_srq: Uncalled,
    pub(crate) post_srq_recv: Uncalled,
    pub(crate) _compat_create_qp: Uncalled,
    pub(crate) _compat_query_qp: Uncalled,
    pub(crate) _compat_modify_qp: Uncalled,
    pub(crate) _compat_destroy_qp: Uncalled,
    pub(crate) post_send:
        Option<unsafe extern "C" fn(*mut ibv_qp, *mut ibv_send_wr, *mut *mut ibv_send_wr) -> c_int>,
    pub(crate) post_recv:
        Option<unsafe extern "C" fn(*mut ibv_qp, *mut ibv_recv_wr, *mut *mut ibv_recv_wr) -> c_int>,
    pub(crate) _compat_create_ah: Uncalled,
    pub(crate) _compat_destroy_ah: Uncalled,
    pub(crate) _compat_attach_mcast: Uncalled,
    pub(crate) _compat_detach_mcast: Uncalled,
    pub(crate) _compat_async_event: Uncalled,
}

/// An open device.
#[repr(C)]
pub(crate) struct ibv_context {
    pub(crate) device: *mut ibv_device,
    pub(crate) ops: ibv_context_ops,
    pub(crate) cmd_fd: c_int,
    pub(crate) async_fd: c_int,
    pub(crate) num_comp_vectors: c_int,
    pub(crate) mutex: pthread_mutex_t,
    /// All ones where the context is the last field of a [`verbs_context`].
    pub(crate) abi_compat: *mut c_void,
}

/// What lies before an open device's context. It grows at its front: `sz` says how far the library
/// at hand goes.
#[repr(C)]
pub(crate) struct verbs_context {
    pub(crate) query_port:
        Option<unsafe extern "C" fn(*mut ibv_context, u8, *mut ibv_port_attr, size_t) -> c_int>,
    pub(crate) advise_mr: Uncalled,
    pub(crate) alloc_null_mr: Uncalled,
    pub(crate) read_counters: Uncalled,
    pub(crate) attach_counters_point_flow: Uncalled,
    pub(crate) create_counters: Uncalled,
    pub(crate) destroy_counters: Uncalled,
    pub(crate) reg_dm_mr: Uncalled,
    pub(crate) alloc_dm: Uncalled,
    pub(crate) free_dm: Uncalled,
    pub(crate) modify_flow_action_esp: Uncalled,
    pub(crate) destroy_flow_action: Uncalled,
    pub(crate) create_flow_action_esp: Uncalled,
    pub(crate) modify_qp_rate_limit: Uncalled,
    pub(crate) alloc_parent_domain: Uncalled,
    pub(crate) dealloc_td: Uncalled,
    pub(crate) alloc_td: Uncalled,
    pub(crate) modify_cq: Uncalled,
    pub(crate) post_srq_ops: Uncalled,
    pub(crate) destroy_rwq_ind_table: Uncalled,
    pub(crate) create_rwq_ind_table: Uncalled,
    pub(crate) destroy_wq: Uncalled,
    pub(crate) modify_wq: Uncalled,
    pub(crate) create_wq: Uncalled,
    pub(crate) query_rt_values: Uncalled,
    pub(crate) create_cq_ex: Uncalled,
    pub(crate) r#priv: *mut c_void,
    pub(crate) query_device_ex: Uncalled,
    pub(crate) ibv_destroy_flow: Uncalled,
    pub(crate) ABI_placeholder2: Uncalled,
    pub(crate) ibv_create_flow: Uncalled,
    pub(crate) ABI_placeholder1: Uncalled,
    pub(crate) open_qp: Uncalled,
    pub(crate) create_qp_ex: Uncalled,
    pub(crate) get_srq_num: Uncalled,
    pub(crate) create_srq_ex: Uncalled,
    pub(crate) open_xrcd: Uncalled,
    pub(crate) close_xrcd: Uncalled,
    pub(crate) _ABI_placeholder3: u64,
    pub(crate) sz: size_t,
    pub(crate) context: ibv_context,
}
