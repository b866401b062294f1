//! The locks, atomics and eventfds of this crate's hand-made structures: the standard library's and
//! the kernel's, but in the loom tests those whose every order loom tries.

#[cfg(all(loom, test))]
pub(crate) use kvxfer_loom::{Condvar, EventFd, Mutex, MutexGuard, OnceLock, atomic};
#[cfg(not(all(loom, test)))]
pub(crate) use {
    nix::sys::eventfd::EventFd,
    std::sync::{Condvar, Mutex, MutexGuard, OnceLock, atomic},
};
