//! The locks, atomics and eventfds of this crate: the standard library's and the kernel's, but in
//! the loom tests those whose every order loom tries.

use std::sync::PoisonError;

#[cfg(all(loom, test))]
pub(crate) use kvxfer_loom::{EventFd, Mutex, MutexGuard, atomic};
#[cfg(not(all(loom, test)))]
pub(crate) use {
    nix::sys::eventfd::EventFd,
    std::sync::{Mutex, MutexGuard, atomic},
};

/// Locks, also when a panic elsewhere poisoned the lock: the data of this crate's locks is whole
/// between statements.
pub(crate) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}
