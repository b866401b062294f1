//! The bare system calls that kvxfer's paths are measured against: nothing but the call, in a loop.

use std::ffi::c_void;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

use crate::error::{Error, Operation};
use crate::memory::HostMemory;

/// The most spans that Linux takes in one call.
pub const MAX_BATCH: usize = 1024;

/// A span of another process and where its bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemotePiece {
    /// The first byte's address in that process.
    pub remote_addr: u64,
    /// Offset in the local memory.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A span of a local memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Offset in the memory.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

const NO_SPAN: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

/// Copies spans of process `pid` into `into`, `batch` of them (at most [`MAX_BATCH`]) a call.
/// Returns the bytes copied.
///
/// # Errors
///
/// [`Error::OutOfBounds`]; [`Error::ProcessVm`] when the kernel refuses (`EPERM`: not allowed to
/// trace that process, `ESRCH`: no such process); [`Error::ProcessVmShort`] when it stops before the
/// end.
pub fn process_vm_readv(
    pid: i32,
    into: &HostMemory,
    pieces: &[RemotePiece],
    batch: usize,
) -> Result<u64, Error> {
    let mut local = [NO_SPAN; MAX_BATCH];
    let mut remote = [NO_SPAN; MAX_BATCH];
    let mut done = 0;
    for pieces in pieces.chunks(batch.clamp(1, MAX_BATCH)) {
        let mut wanted = 0;
        for ((piece, local), remote) in pieces.iter().zip(&mut local).zip(&mut remote) {
            let range = into.range(Operation::Bare, piece.offset, piece.len)?;
            local.iov_base = range.ptr.as_ptr().cast();
            local.iov_len = range.len;
            remote.iov_base = remote_pointer(piece.remote_addr);
            remote.iov_len = range.len;
            wanted += piece.len;
        }
        let count = pieces.len() as libc::c_ulong;
        // SAFETY: the local spans were checked against memory that `into` keeps mapped and writable;
        // the remote ones are only numbers to us, which the kernel checks.
        let got = unsafe {
            libc::process_vm_readv(pid, local.as_ptr(), count, remote.as_ptr(), count, 0)
        };
        let got = Errno::result(got).map_err(|source| Error::ProcessVm { pid, done, source })?;
        let got = got.unsigned_abs() as u64;
        if got != wanted {
            return Err(Error::ProcessVmShort { pid, wanted, got });
        }
        done += got;
    }
    Ok(done)
}

/// An address of another process: never dereferenced here.
fn remote_pointer(addr: u64) -> *mut c_void {
    std::ptr::without_provenance_mut(usize::try_from(addr).unwrap_or(usize::MAX))
}

/// Sends spans down a stream socket, `batch` of them (at most [`MAX_BATCH`]) a call. Returns the
/// bytes sent. A socket that does not block gives `EAGAIN`.
///
/// # Errors
///
/// [`Error::OutOfBounds`]; [`Error::Stream`] when the kernel refuses.
pub fn writev(
    fd: BorrowedFd<'_>,
    from: &HostMemory,
    pieces: &[Piece],
    batch: usize,
) -> Result<u64, Error> {
    stream(from, pieces, batch, |spans| {
        let count = i32::try_from(spans.len()).unwrap_or(i32::MAX);
        // SAFETY: every span lies in memory that `from` keeps mapped; writev only reads it.
        unsafe { libc::writev(fd.as_raw_fd(), spans.as_ptr(), count) }
    })
}

/// Receives spans from a stream socket, `batch` of them (at most [`MAX_BATCH`]) a call, until all
/// are full. Returns the bytes received.
///
/// # Errors
///
/// [`Error::OutOfBounds`]; [`Error::Stream`] when the kernel refuses; [`Error::StreamEnded`] when the
/// other end closes.
pub fn readv(
    fd: BorrowedFd<'_>,
    into: &HostMemory,
    pieces: &[Piece],
    batch: usize,
) -> Result<u64, Error> {
    stream(into, pieces, batch, |spans| {
        let count = i32::try_from(spans.len()).unwrap_or(i32::MAX);
        // SAFETY: every span lies in memory that `into` keeps mapped and writable.
        unsafe { libc::readv(fd.as_raw_fd(), spans.as_ptr(), count) }
    })
}

/// Drives a vectored call over all pieces; the kernel may stop anywhere and is asked again from there.
fn stream(
    memory: &HostMemory,
    pieces: &[Piece],
    batch: usize,
    call: impl Fn(&[libc::iovec]) -> isize,
) -> Result<u64, Error> {
    let mut spans = [NO_SPAN; MAX_BATCH];
    let mut total = 0;
    for pieces in pieces.chunks(batch.clamp(1, MAX_BATCH)) {
        for (piece, span) in pieces.iter().zip(&mut spans) {
            let range = memory.range(Operation::Bare, piece.offset, piece.len)?;
            span.iov_base = range.ptr.as_ptr().cast();
            span.iov_len = range.len;
        }
        let mut left = spans.get_mut(..pieces.len()).unwrap_or_default();
        loop {
            let first = left.iter().position(|span| span.iov_len > 0);
            left = left
                .get_mut(first.unwrap_or(usize::MAX)..)
                .unwrap_or_default();
            if left.is_empty() {
                break;
            }
            let moved = match Errno::result(call(left)) {
                Ok(0) => return Err(Error::StreamEnded { done: total }),
                Ok(moved) => moved.unsigned_abs(),
                Err(Errno::EINTR) => continue,
                Err(source) => {
                    return Err(Error::Stream {
                        done: total,
                        source,
                    });
                }
            };
            total += moved as u64;
            advance(left, moved);
        }
    }
    Ok(total)
}

/// Takes `moved` bytes off the front.
fn advance(spans: &mut [libc::iovec], mut moved: usize) {
    for span in spans {
        let taken = moved.min(span.iov_len);
        span.iov_base = span.iov_base.cast::<u8>().wrapping_add(taken).cast();
        span.iov_len -= taken;
        moved -= taken;
        if moved == 0 {
            return;
        }
    }
}
