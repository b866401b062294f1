//! The memory token: what a device needs to know of memory, without a borrow of its bytes.

use std::fmt;
use std::os::fd::BorrowedFd;

/// Where memory lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MemoryKind {
    /// Ordinary pages of this process.
    Host,
}

/// The file behind memory that another process may map.
#[derive(Debug, Clone, Copy)]
pub struct FdSpan<'a> {
    /// A memfd sealed with `F_SEAL_SHRINK | F_SEAL_GROW`.
    pub fd: BorrowedFd<'a>,
    /// Where in the file the memory's first byte is.
    pub offset: u64,
}

/// A span of memory that stays where it is for as long as the token lives.
///
/// The bytes may change at any moment, by a device, by a peer or by the engine that owns them, so
/// no reference to them is ever made: all access goes through raw pointers.
///
/// # Safety
///
/// For as long as the value lives, the implementor keeps these true:
/// - `addr()..addr() + len()` is mapped, readable and writable, and does not move;
/// - no Rust reference to those bytes exists while the memory is registered with a device;
/// - `addr()`, `len()`, `kind()` and `fd()` always answer the same;
/// - where `fd()` answers, the file's bytes from `offset` are the same pages as the span.
pub unsafe trait Memory: Send + Sync + fmt::Debug + 'static {
    /// The address of the first byte, in this process.
    fn addr(&self) -> u64;

    /// The length in bytes.
    fn len(&self) -> u64;

    /// Whether the span has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where the memory lives.
    fn kind(&self) -> MemoryKind;

    /// The file behind it, if another process may map it.
    fn fd(&self) -> Option<FdSpan<'_>>;
}
