//! A model of eventfd(2), as nix wraps it.

use std::os::fd::{AsFd, BorrowedFd};

use loom::sync::{Condvar, Mutex, MutexGuard};
use loom::thread;
use nix::errno::Errno;
use nix::sys::eventfd::EfdFlags;

#[derive(Debug)]
struct State {
    count: u64,
    /// Whether a sleep has ended because of it since it last changed.
    told: bool,
}

/// A nonblocking eventfd. The kernel counts under a lock, and so does this.
#[derive(Debug)]
pub struct EventFd {
    state: Mutex<State>,
    changed: Condvar,
    /// Never written: for what takes a descriptor and is not part of a model.
    unused: nix::sys::eventfd::EventFd,
}

#[allow(
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    reason = "as in nix"
)]
impl EventFd {
    /// Of value 0.
    pub fn from_flags(flags: EfdFlags) -> nix::Result<Self> {
        Self::from_value_and_flags(0, flags)
    }

    /// Of this value.
    pub fn from_value_and_flags(value: u32, flags: EfdFlags) -> nix::Result<Self> {
        Ok(Self {
            state: Mutex::new(State {
                count: value.into(),
                told: false,
            }),
            changed: Condvar::new(),
            unused: nix::sys::eventfd::EventFd::from_value_and_flags(0, flags)?,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("loom's locks are not poisoned")
    }

    /// Adds to the counter.
    pub fn write(&self, value: u64) -> nix::Result<usize> {
        let mut state = self.state();
        state.count += value;
        state.told = false;
        drop(state);
        self.changed.notify_all();
        Ok(8)
    }

    /// Takes the counter; `EAGAIN` if it is 0.
    pub fn read(&self) -> nix::Result<u64> {
        let mut state = self.state();
        state.told = false;
        match std::mem::take(&mut state.count) {
            0 => Err(Errno::EAGAIN),
            count => Ok(count),
        }
    }

    /// What poll(2) of this descriptor alone does: sleeps until it is readable.
    pub fn wait_readable(&self) {
        let mut state = self.state();
        while state.count == 0 {
            state = self.changed.wait(state).expect("as above");
        }
        if std::mem::replace(&mut state.told, true) {
            // Whoever sleeps again on what it has been told of waits for another thread's next
            // step, which comes: without this, loom would try for ever what happens if it does not.
            drop(state);
            thread::yield_now();
        }
    }

    /// Whether it is readable now.
    #[must_use]
    pub fn is_readable(&self) -> bool {
        self.state().count > 0
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.unused.as_fd()
    }
}
