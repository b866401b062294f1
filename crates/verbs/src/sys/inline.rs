//! What C has as inline functions: they go through tables of the device's driver.
//!
//! Transcribed from rdma-core, whose notice is in LICENSE-rdma-core of this crate.

use std::mem::{offset_of, size_of};
use std::ptr;

use libc::{EOPNOTSUPP, c_int};

use super::functions::Functions;
use super::types::{
    ibv_context, ibv_cq, ibv_port_attr, ibv_qp, ibv_recv_wr, ibv_send_wr, ibv_wc, verbs_context,
};

/// `ibv_post_send`: posts a list, and says in `bad` which work request was not taken.
///
/// # Safety
///
/// `qp` is a live queue pair of a live context; the list, and all it points to, is whole; `bad` may
/// be written. Memory that the work requests name stays registered until they have completed.
#[inline]
pub(crate) unsafe fn post_send(
    qp: *mut ibv_qp,
    list: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the caller's: it is live.
    let context = unsafe { (*qp).context };
    // SAFETY: a queue pair's context outlives it.
    match unsafe { (*context).ops.post_send } {
        // SAFETY: the caller's, as the function asks.
        Some(post) => unsafe { post(qp, list, bad) },
        None => EOPNOTSUPP,
    }
}

/// `ibv_post_recv`: posts a list, and says in `bad` which receive was not taken.
///
/// # Safety
///
/// As [`post_send`].
#[inline]
pub(crate) unsafe fn post_recv(
    qp: *mut ibv_qp,
    list: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: the caller's: it is live.
    let context = unsafe { (*qp).context };
    // SAFETY: a queue pair's context outlives it.
    match unsafe { (*context).ops.post_recv } {
        // SAFETY: the caller's, as the function asks.
        Some(post) => unsafe { post(qp, list, bad) },
        None => EOPNOTSUPP,
    }
}

/// `ibv_poll_cq`: how many completions were written to `wc`; negative where the queue has failed.
///
/// # Safety
///
/// `cq` is a live completion queue of a live context; `wc` may be written for `max` completions.
#[inline]
pub(crate) unsafe fn poll_cq(cq: *mut ibv_cq, max: c_int, wc: *mut ibv_wc) -> c_int {
    // SAFETY: the caller's: it is live.
    let context = unsafe { (*cq).context };
    // SAFETY: a queue's context outlives it.
    match unsafe { (*context).ops.poll_cq } {
        // SAFETY: the caller's, as the function asks.
        Some(poll) => unsafe { poll(cq, max, wc) },
        None => -EOPNOTSUPP,
    }
}

/// `ibv_req_notify_cq`: asks for one event on the queue's channel.
///
/// # Safety
///
/// `cq` is a live completion queue of a live context.
#[inline]
pub(crate) unsafe fn req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
    // SAFETY: the caller's: it is live.
    let context = unsafe { (*cq).context };
    // SAFETY: a queue's context outlives it.
    match unsafe { (*context).ops.req_notify_cq } {
        // SAFETY: the caller's, as the function asks.
        Some(arm) => unsafe { arm(cq, solicited_only) },
        None => EOPNOTSUPP,
    }
}

type QueryPort = unsafe extern "C" fn(*mut ibv_context, u8, *mut ibv_port_attr, usize) -> c_int;

/// `ibv_query_port` of the headers. The exported function of that name ends before `flags`, or
/// before `port_cap_flags2`, by its age: what it leaves out is zero.
///
/// # Safety
///
/// `context` is a live context of the library that `functions` is of.
pub(crate) unsafe fn query_port(
    functions: &Functions,
    context: *mut ibv_context,
    port: u8,
    attr: &mut ibv_port_attr,
) -> c_int {
    *attr = ibv_port_attr::default();
    // SAFETY: the caller's: it is live.
    match unsafe { extended_query_port(context) } {
        // SAFETY: the caller's; it writes no more than the size it is told.
        Some(query) => unsafe { query(context, port, attr, size_of::<ibv_port_attr>()) },
        // SAFETY: the caller's; it writes no more than an older structure, the head of this one.
        None => unsafe { (functions.ibv_query_port)(context, port, attr) },
    }
}

/// `verbs_get_ctx_op(context, query_port)`: the driver's function, where the library at hand is new
/// enough to have a place for one.
///
/// # Safety
///
/// `context` is live.
unsafe fn extended_query_port(context: *mut ibv_context) -> Option<QueryPort> {
    // SAFETY: the caller's: it is live.
    let extended = unsafe { (*context).abi_compat };
    if extended != ptr::without_provenance_mut(usize::MAX) {
        return None;
    }
    // The structure grows at its front, so that its places are counted from the context back.
    let before = |field: usize| offset_of!(verbs_context, context) - field;
    let place = |field: usize| context.cast::<u8>().wrapping_sub(before(field));
    let sz = place(offset_of!(verbs_context, sz)).cast::<usize>();
    // SAFETY: `abi_compat` says that this context is the last field of a `verbs_context`.
    let sz = unsafe { sz.read() };
    if sz < before(offset_of!(verbs_context, query_port)) + size_of::<ibv_context>() {
        return None;
    }
    let query = place(offset_of!(verbs_context, query_port)).cast::<Option<QueryPort>>();
    // SAFETY: as above, and `sz` says that the structure reaches this far to the front.
    unsafe { query.read() }
}
