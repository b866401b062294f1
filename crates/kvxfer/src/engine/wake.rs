//! Waking a thread that sleeps in poll(2), at the cost of a system call only while it sleeps.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::Error;

/// One sleeper and any number of wakers.
#[derive(Debug)]
pub(crate) struct Wake {
    fd: EventFd,
    sleeping: AtomicBool,
}

impl Wake {
    pub(crate) fn new() -> Result<Self, Error> {
        let fd = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| Error::Os {
            call: "eventfd",
            errno: errno as i32,
        })?;
        Ok(Self {
            fd,
            sleeping: AtomicBool::new(false),
        })
    }

    /// Wakes the sleeper, now or at its next sleep. Whatever the sleeper is to find must be
    /// published before the call.
    pub(crate) fn wake(&self) {
        // Sequentially consistent, as is the sleeper's store: of "published, then looked at
        // `sleeping`" and "set `sleeping`, then looked for work", one sees the other.
        if self.sleeping.swap(false, Ordering::SeqCst) {
            // A full counter (EAGAIN) is awake already.
            let _ = self.fd.write(1);
        }
    }

    /// Sleeps until a wake, until one of `others` has what is asked of it, or for `timeout`
    /// (`None`: no limit). `idle` is asked once more after wakers can see the sleeper; if it says
    /// there is work, no sleep happens.
    pub(crate) fn sleep(
        &self,
        others: &[(BorrowedFd<'_>, PollFlags)],
        timeout: Option<Duration>,
        idle: impl FnOnce() -> bool,
    ) {
        self.sleeping.store(true, Ordering::SeqCst);
        if idle() {
            let mut fds = Vec::with_capacity(1 + others.len());
            fds.push(PollFd::new(self.fd.as_fd(), PollFlags::POLLIN));
            fds.extend(others.iter().map(|(fd, flags)| PollFd::new(*fd, *flags)));
            // An interrupted or failed poll is a spurious wake: the caller looks for work again.
            let _ = poll(&mut fds, poll_timeout(timeout));
        }
        self.sleeping.store(false, Ordering::SeqCst);
        // Nonblocking; an empty counter is fine.
        let _: Result<u64, Errno> = self.fd.read();
    }
}

/// Rounded up, so that a sleeper does not wake just before its time and spin.
pub(crate) fn poll_timeout(timeout: Option<Duration>) -> PollTimeout {
    let Some(timeout) = timeout else {
        return PollTimeout::NONE;
    };
    let ms = timeout.as_nanos().div_ceil(1_000_000);
    i32::try_from(ms)
        .ok()
        .and_then(|ms| PollTimeout::try_from(ms).ok())
        .unwrap_or(PollTimeout::MAX)
}
