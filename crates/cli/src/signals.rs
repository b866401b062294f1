//! Ending in order: on SIGTERM and SIGINT, and with the parent.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{Pid, getppid};

/// SIGTERM and SIGINT, as something to wait for instead of something that strikes.
pub(crate) struct StopSignals {
    fd: SignalFd,
}

impl StopSignals {
    /// Takes the signals over. Call it before any thread is started: only threads started later inherit
    /// that the signals do not strike.
    ///
    /// # Errors
    ///
    /// The kernel's answer.
    pub(crate) fn take() -> Result<Self, Errno> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGINT);
        set.thread_block()?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self { fd })
    }

    /// Waits for a signal: at most `timeout`, or for ever.
    ///
    /// # Errors
    ///
    /// The kernel's answer.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> Result<Option<Signal>, Errno> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            if let Some(info) = self.fd.read_signal()? {
                let number = i32::try_from(info.ssi_signo).map_err(|_| Errno::EINVAL)?;
                return Signal::try_from(number).map(Some);
            }
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            let left = match left {
                None => PollTimeout::NONE,
                Some(left) if left.is_zero() => return Ok(None),
                // Rounded up: waking early would only be to wait again.
                Some(left) => PollTimeout::try_from(left + Duration::from_millis(1))
                    .unwrap_or(PollTimeout::MAX),
            };
            match poll(&mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)], left) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}

impl AsFd for StopSignals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Ends this process with SIGTERM when its parent ends. `false`: it has ended already.
///
/// # Errors
///
/// The kernel's answer.
pub(crate) fn end_with_parent(parent: i32) -> Result<bool, Errno> {
    prctl::set_pdeathsig(Signal::SIGTERM)?;
    // It may have ended before the line above: then we have another parent by now.
    Ok(getppid() == Pid::from_raw(parent))
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::raise;

    use super::*;

    #[test]
    fn a_signal_is_waited_for_and_does_not_strike() -> Result<(), Errno> {
        let signals = StopSignals::take()?;
        assert_eq!(signals.wait(Some(Duration::from_millis(5)))?, None);
        // To this thread alone, which is the one that waits.
        raise(Signal::SIGTERM)?;
        assert_eq!(
            signals.wait(Some(Duration::from_secs(10)))?,
            Some(Signal::SIGTERM)
        );
        assert_eq!(signals.wait(Some(Duration::ZERO))?, None);
        Ok(())
    }
}
