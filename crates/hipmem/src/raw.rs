//! Copies and fills that the optimiser cannot see into. Everything that touches shared bytes in bulk
//! ends here; the crate's first page says why.

use std::ffi::c_void;
use std::hint::black_box;

type MemMove = unsafe extern "C" fn(*mut c_void, *const c_void, usize) -> *mut c_void;
type MemSet = unsafe extern "C" fn(*mut c_void, i32, usize) -> *mut c_void;

/// Copies `len` bytes; the ranges may overlap. In the usual C libraries this is the very same code
/// as `memcpy`.
///
/// # Safety
///
/// `len` bytes from `src` must be mapped and readable, `len` bytes from `dst` mapped and writable,
/// and no Rust reference may cover a byte of `dst` (nor a `&mut` one of `src`) other than the one
/// that the pointer was made from.
pub(crate) unsafe fn copy(dst: *mut u8, src: *const u8, len: usize) {
    let memmove: MemMove = black_box(libc::memmove);
    // SAFETY: the caller keeps memmove's demands: both spans mapped, readable and writable.
    unsafe { memmove(dst.cast(), src.cast(), len) };
}

/// Sets `len` bytes.
///
/// # Safety
///
/// `len` bytes from `dst` must be mapped and writable, and no Rust reference may cover any of them.
pub(crate) unsafe fn set(dst: *mut u8, byte: u8, len: usize) {
    let memset: MemSet = black_box(libc::memset);
    // SAFETY: the caller keeps memset's demand: the span is mapped and writable.
    unsafe { memset(dst.cast(), i32::from(byte), len) };
}
