//! What the loom tests of this workspace need beside loom: atomics whose orderings can be taken
//! away, to see that a test finds it; an eventfd; a cell that is filled once. Empty without `--cfg loom`.
#![cfg(loom)]
#![forbid(unsafe_code)]

pub mod atomic;
mod eventfd;
mod once;

pub use eventfd::EventFd;
pub use loom::sync::{Condvar, Mutex, MutexGuard};
pub use loom::thread;
pub use once::OnceLock;

/// Switches between threads that are tried where no thread has to wait, unless
/// `LOOM_MAX_PREEMPTIONS` says otherwise.
const PREEMPTIONS: usize = 3;

/// Runs `body` in every order of its threads' steps, and with every value that its loads may see.
///
/// # Panics
///
/// If one of them does, or if all threads wait for each other.
pub fn model(body: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(PREEMPTIONS);
    builder.check(body);
}

/// [`model`], with every atomic of [`atomic`] relaxed and without fences.
///
/// # Panics
///
/// As [`model`]; a structure that needs its orderings makes it.
pub fn weak_model(body: impl Fn() + Send + Sync + 'static) {
    let _weak = atomic::Weak::begin();
    model(body);
}
