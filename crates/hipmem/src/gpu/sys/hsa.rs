//! The functions of libhsa-runtime64 that are called: dma-buf export. From hsa.h and hsa_ext_amd.h
//! of ROCm 5.7 (MIT licence). Debian 12's headers (5.2) have no `hsa_amd_portable_export_dmabuf`.

use libc::{c_char, c_int, c_void, size_t};

use super::functions;

/// `hsa_status_t`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
#[allow(non_camel_case_types, reason = "the name of C")]
pub(in crate::gpu) struct hsa_status_t(pub(in crate::gpu) u32);

functions! {
    /// What libhsa-runtime64 exports, by the names of C.
    Hsa
    required {
        fn hsa_init() -> hsa_status_t;
        fn hsa_status_string(status: hsa_status_t, words: *mut *const c_char) -> hsa_status_t;
        fn hsa_amd_portable_export_dmabuf(pointer: *const c_void, size: size_t, fd: *mut c_int, offset: *mut u64) -> hsa_status_t;
    }
    optional {}
}
