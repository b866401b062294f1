//! Waking a thread that sleeps in ppoll(2), at the cost of a system call only while it sleeps.

#[cfg(not(all(loom, test)))]
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::errno::Errno;
#[cfg(not(all(loom, test)))]
use nix::poll::{PollFd, ppoll};
use nix::poll::{PollFlags, PollTimeout};
use nix::sys::eventfd::EfdFlags;
#[cfg(not(all(loom, test)))]
use nix::sys::time::TimeSpec;

use crate::error::Error;
use crate::sync::EventFd;
use crate::sync::atomic::{AtomicBool, Ordering};

/// No sleep is longer: the kernel takes no time that it cannot count.
#[cfg(not(all(loom, test)))]
const LONGEST: Duration = Duration::from_secs(3600);

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
        // Nobody stores to `sleeping`, all swap, so that each takes in what was done before all earlier
        // swaps: of "published, then looked at `sleeping`" and "set `sleeping`, then looked for
        // work", one sees the other.
        if self.sleeping.swap(false, Ordering::SeqCst) {
            // A full counter (EAGAIN) is awake already.
            let _ = self.fd.write(1);
        }
    }

    /// Sleeps until a wake, until one of `others` has what is asked of it, or for `timeout`
    /// (`None`: no limit). `idle` is asked once more after wakers can see the sleeper; if it says
    /// there is work, no sleep happens. Returns which of `others` have what is asked of them, where that was
    /// looked at.
    pub(crate) fn sleep(
        &self,
        others: &[(BorrowedFd<'_>, PollFlags)],
        timeout: Option<Duration>,
        idle: impl FnOnce() -> bool,
    ) -> Option<Vec<bool>> {
        let _ = self.sleeping.swap(true, Ordering::SeqCst);
        let ready = if idle() {
            self.block(others, timeout)
        } else {
            None
        };
        let _ = self.sleeping.swap(false, Ordering::SeqCst);
        // Nonblocking; an empty counter is fine.
        let _: Result<u64, Errno> = self.fd.read();
        ready
    }

    #[cfg(not(all(loom, test)))]
    fn block(
        &self,
        others: &[(BorrowedFd<'_>, PollFlags)],
        timeout: Option<Duration>,
    ) -> Option<Vec<bool>> {
        let mut fds = Vec::with_capacity(1 + others.len());
        fds.push(PollFd::new(self.fd.as_fd(), PollFlags::POLLIN));
        fds.extend(others.iter().map(|(fd, flags)| PollFd::new(*fd, *flags)));
        // An interrupted or failed poll is a spurious wake: the caller looks for work again.
        // Not poll(2), which counts milliseconds: what a GPU does is waited for by shorter rests.
        let timeout = timeout.map(|timeout| TimeSpec::from_duration(timeout.min(LONGEST)));
        ppoll(&mut fds, timeout, None).ok()?;
        let others = fds.iter().skip(1);
        Some(others.map(|fd| fd.any().unwrap_or(true)).collect())
    }

    #[cfg(all(loom, test))]
    fn block(
        &self,
        _others: &[(BorrowedFd<'_>, PollFlags)],
        _timeout: Option<Duration>,
    ) -> Option<Vec<bool>> {
        self.fd.wait_readable();
        None
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

#[cfg(all(loom, test))]
mod loom_tests {
    use std::sync::Arc;

    use kvxfer_loom::{model, thread, weak_model};

    use super::*;
    use crate::sync::atomic::AtomicU32;

    /// Two threads publish and wake, in this order or the other; this one sleeps until it has seen
    /// both. Nobody else wakes it.
    fn two_wakers(publish_first: bool) {
        let wake = Arc::new(Wake::new().expect("an event"));
        let published = Arc::new(AtomicU32::new(0));
        for _ in 0..2 {
            let (wake, published) = (Arc::clone(&wake), Arc::clone(&published));
            thread::spawn(move || {
                if !publish_first {
                    wake.wake();
                }
                published.fetch_add(1, Ordering::Release);
                if publish_first {
                    wake.wake();
                }
            });
        }
        let idle = || published.load(Ordering::Acquire) < 2;
        while idle() {
            wake.sleep(&[], None, idle);
        }
    }

    #[test]
    fn a_sleeper_hears_of_everything_published() {
        model(|| two_wakers(true));
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn planted_waking_before_publishing() {
        model(|| two_wakers(false));
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn planted_waking_without_order() {
        weak_model(|| two_wakers(true));
    }
}
