//! Reading another process's memory, and knowing that it is still the same process.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use crate::error::PathFault;
use crate::soft::stream::Span;

/// The process at the other end of a Unix socket.
#[derive(Debug)]
pub(crate) struct PeerProcess {
    pid: i32,
    /// `None` where the process is in a pid namespace that cannot be seen from here: its files can
    /// be mapped, its memory cannot be read.
    pidfd: Option<OwnedFd>,
}

impl PeerProcess {
    /// Identifies the peer by what the kernel noted when the socket was connected.
    pub(crate) fn of(socket: BorrowedFd<'_>) -> Result<Self, PathFault> {
        let cred = getsockopt(&socket, PeerCredentials)
            .map_err(|e| PathFault::Closed(io::Error::from(e)))?;
        let here = nix::unistd::geteuid().as_raw();
        if cred.uid() != here && cred.uid() != 0 {
            return Err(PathFault::OtherUser {
                peer: cred.uid(),
                here,
            });
        }
        if cred.pid() <= 0 {
            return Ok(Self {
                pid: 0,
                pidfd: None,
            });
        }
        let pidfd = match peer_pidfd(socket) {
            // Before Linux 6.5. Any other error may mean that the pid is already another's.
            Err(e) if e.raw_os_error() == Some(libc::ENOPROTOOPT) => open_pidfd(cred.pid()),
            answer => answer,
        };
        Ok(Self {
            pid: cred.pid(),
            pidfd: Some(pidfd.map_err(PathFault::Closed)?),
        })
    }

    /// Its pid here, if it has one.
    pub(crate) fn pid(&self) -> Option<i32> {
        self.pidfd.as_ref().map(|_| self.pid)
    }

    /// Copies from `remote` of the process into `local`, as one stream of bytes; answers how many.
    /// A dead process is `ESRCH`, one that cannot be seen from here `EPERM`.
    ///
    /// # Safety
    ///
    /// Every span of `local` is mapped, writable, and borrowed by no Rust reference for the time
    /// of the call.
    pub(crate) unsafe fn read(&self, local: &[Span], remote: &[Span]) -> io::Result<usize> {
        let Some(pidfd) = &self.pidfd else {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        };
        if !alive(pidfd) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        // SAFETY: both lists outlive the call; the caller vouches for what `local` points at, and
        // `remote` is addresses of another process, which the kernel checks.
        let n = unsafe {
            libc::process_vm_readv(
                self.pid,
                local.as_ptr().cast(),
                local.len() as libc::c_ulong,
                remote.as_ptr().cast(),
                remote.len() as libc::c_ulong,
                0,
            )
        };
        let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
        if !alive(pidfd) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(n)
    }
}

/// Whether the process still runs (stopped counts). While it does, its pid is its own.
fn alive(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut fds, PollTimeout::ZERO) {
            // A signal to this thread says nothing of the peer.
            Err(Errno::EINTR) => {}
            answer => return answer == Ok(0),
        }
    }
}

fn peer_pidfd(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// Since Linux 6.5; not in libc for every target.
    const SO_PEERPIDFD: i32 = 77;
    let mut raw: i32 = -1;
    let mut len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the option's value is one int, which `raw` has room for, as `len` says.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut raw).cast(),
            &raw mut len,
        )
    };
    if rc < 0 || raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn open_pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two integers.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let raw = i32::try_from(raw)
        .ok()
        .filter(|fd| *fd >= 0)
        .ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made this descriptor for us; pidfds are close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Under Yama's scope 1, lets the peer read this process. Without Yama the kernel knows no such
/// call, and other scopes need a capability or forbid it: a probe finds out, so errors are not.
pub(crate) fn allow(peer: &PeerProcess) {
    let Some(pid) = peer.pid() else { return };
    // SAFETY: the call takes integers only.
    let _ = unsafe { libc::prctl(libc::PR_SET_PTRACER, pid as libc::c_ulong, 0, 0, 0) };
}
