//! The functions that libibverbs exports.
//!
//! Transcribed from rdma-core, whose notice is in LICENSE-rdma-core of this crate. The tests in
//! tests/abi read this file and let a C compiler compare every prototype in it with the headers.

use std::ffi::CStr;
use std::mem::transmute;
use std::ptr::NonNull;

use libc::{c_char, c_int, c_uint, c_void, size_t, ssize_t};

use super::enums::ibv_fork_status;
use super::library::Library;
use super::types::{
    _compat_ibv_port_attr, ibv_async_event, ibv_comp_channel, ibv_context, ibv_cq, ibv_device,
    ibv_device_attr, ibv_gid, ibv_gid_entry, ibv_mr, ibv_pd, ibv_qp, ibv_qp_attr, ibv_qp_init_attr,
};
use crate::error::NoRdma;

const fn c(text: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(text.as_bytes()) {
        Ok(text) => text,
        Err(_) => c"",
    }
}

/// Makes the table from prototypes, each after the version of its symbol. Some functions are there
/// twice: version 1.0 takes other structures, of 2005, and must not be what is found.
macro_rules! functions {
    (
        required { $($version:literal fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?;)* }
        optional { $($since:literal fn $may:ident($($marg:ident: $mty:ty),*) $(-> $mret:ty)?;)* }
    ) => {
        /// What libibverbs exports, by the names of C. Each is called as its manual page says.
        #[allow(dead_code, reason = "not all of them are called")]
        pub(crate) struct Functions {
            $(pub(crate) $name: unsafe extern "C" fn($($ty),*) $(-> $ret)?,)*
            $(pub(crate) $may: Option<unsafe extern "C" fn($($mty),*) $(-> $mret)?>,)*
        }

        impl Functions {
            /// Finds them all.
            ///
            /// # Errors
            ///
            /// [`NoRdma::Symbol`] for the first that is missing.
            pub(crate) fn find(library: &Library) -> Result<Self, NoRdma> {
                Ok(Self {
                    $($name: {
                        let found = library.symbol(c(concat!(stringify!($name), "\0")), c(concat!($version, "\0")));
                        let address = found.ok_or_else(|| library.lacks(stringify!($name), $version))?;
                        // SAFETY: a symbol of this name and version is a function of this prototype:
                        // tests/abi compares them with the C headers.
                        unsafe {
                            transmute::<
                                NonNull<c_void>,
                                unsafe extern "C" fn($($ty),*) $(-> $ret)?,
                            >(address)
                        }
                    },)*
                    $($may: {
                        let found = library.symbol(c(concat!(stringify!($may), "\0")), c(concat!($since, "\0")));
                        // SAFETY: as above; an option of a function is a pointer that may be null, and
                        // so is an option of `NonNull`.
                        unsafe {
                            transmute::<
                                Option<NonNull<c_void>>,
                                Option<unsafe extern "C" fn($($mty),*) $(-> $mret)?>,
                            >(found)
                        }
                    },)*
                })
            }

            /// Names and versions of what must be there.
            #[cfg(test)]
            pub(crate) const REQUIRED: &[(&str, &str)] = &[$((stringify!($name), $version),)*];
        }
    };
}

functions! {
    required {
        "IBVERBS_1.1" fn ibv_get_device_list(num_devices: *mut c_int) -> *mut *mut ibv_device;
        "IBVERBS_1.1" fn ibv_free_device_list(list: *mut *mut ibv_device);
        "IBVERBS_1.1" fn ibv_get_device_name(device: *mut ibv_device) -> *const c_char;
        "IBVERBS_1.1" fn ibv_get_device_guid(device: *mut ibv_device) -> u64;
        "IBVERBS_1.1" fn ibv_open_device(device: *mut ibv_device) -> *mut ibv_context;
        "IBVERBS_1.1" fn ibv_close_device(context: *mut ibv_context) -> c_int;
        "IBVERBS_1.1" fn ibv_query_device(context: *mut ibv_context, attr: *mut ibv_device_attr) -> c_int;
        "IBVERBS_1.1" fn ibv_query_port(context: *mut ibv_context, port: u8, attr: *mut _compat_ibv_port_attr) -> c_int;
        "IBVERBS_1.1" fn ibv_query_gid(context: *mut ibv_context, port: u8, index: c_int, gid: *mut ibv_gid) -> c_int;
        "IBVERBS_1.1" fn ibv_query_pkey(context: *mut ibv_context, port: u8, index: c_int, pkey: *mut u16) -> c_int;
        "IBVERBS_1.1" fn ibv_get_async_event(context: *mut ibv_context, event: *mut ibv_async_event) -> c_int;
        "IBVERBS_1.1" fn ibv_ack_async_event(event: *mut ibv_async_event);
        "IBVERBS_1.1" fn ibv_alloc_pd(context: *mut ibv_context) -> *mut ibv_pd;
        "IBVERBS_1.1" fn ibv_dealloc_pd(pd: *mut ibv_pd) -> c_int;
        "IBVERBS_1.1" fn ibv_reg_mr(pd: *mut ibv_pd, addr: *mut c_void, length: size_t, access: c_int) -> *mut ibv_mr;
        "IBVERBS_1.1" fn ibv_dereg_mr(mr: *mut ibv_mr) -> c_int;
        "IBVERBS_1.0" fn ibv_create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel;
        "IBVERBS_1.0" fn ibv_destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int;
        "IBVERBS_1.1" fn ibv_create_cq(context: *mut ibv_context, cqe: c_int, cq_context: *mut c_void, channel: *mut ibv_comp_channel, comp_vector: c_int) -> *mut ibv_cq;
        "IBVERBS_1.1" fn ibv_destroy_cq(cq: *mut ibv_cq) -> c_int;
        "IBVERBS_1.1" fn ibv_get_cq_event(channel: *mut ibv_comp_channel, cq: *mut *mut ibv_cq, cq_context: *mut *mut c_void) -> c_int;
        "IBVERBS_1.1" fn ibv_ack_cq_events(cq: *mut ibv_cq, nevents: c_uint);
        "IBVERBS_1.1" fn ibv_create_qp(pd: *mut ibv_pd, attr: *mut ibv_qp_init_attr) -> *mut ibv_qp;
        "IBVERBS_1.1" fn ibv_modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, attr_mask: c_int) -> c_int;
        "IBVERBS_1.1" fn ibv_query_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, attr_mask: c_int, init_attr: *mut ibv_qp_init_attr) -> c_int;
        "IBVERBS_1.1" fn ibv_destroy_qp(qp: *mut ibv_qp) -> c_int;
        "IBVERBS_1.1" fn ibv_fork_init() -> c_int;
    }
    optional {
        "IBVERBS_1.5" fn ibv_get_pkey_index(context: *mut ibv_context, port: u8, pkey: u16) -> c_int;
        "IBVERBS_1.8" fn ibv_reg_mr_iova2(pd: *mut ibv_pd, addr: *mut c_void, length: size_t, iova: u64, access: c_uint) -> *mut ibv_mr;
        "IBVERBS_1.11" fn _ibv_query_gid_ex(context: *mut ibv_context, port: u32, index: u32, entry: *mut ibv_gid_entry, flags: u32, entry_size: size_t) -> c_int;
        "IBVERBS_1.11" fn _ibv_query_gid_table(context: *mut ibv_context, entries: *mut ibv_gid_entry, max_entries: size_t, flags: u32, entry_size: size_t) -> ssize_t;
        "IBVERBS_1.12" fn ibv_reg_dmabuf_mr(pd: *mut ibv_pd, offset: u64, length: size_t, iova: u64, fd: c_int, access: c_int) -> *mut ibv_mr;
        "IBVERBS_1.13" fn ibv_is_fork_initialized() -> ibv_fork_status;
    }
}
