//! Reading another process's memory, and knowing that it is still the same process.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use crate::error::PathFault;
use crate::soft::frame::Hello;
use crate::soft::reader::{self, Hold};
use crate::soft::stream::Span;

/// The process at the other end of a Unix socket.
#[derive(Debug)]
pub(crate) struct PeerProcess {
    pid: i32,
    /// `None` where the process is in a pid namespace that cannot be seen from here: its files can
    /// be mapped, its memory cannot be read.
    pidfd: Option<OwnedFd>,
    /// Where its guid must be found before anything else of it is read. The kernel tells who
    /// connected the socket; whoever writes to it may be another process that was given it, and
    /// then the addresses that come over it are not the connecting process's.
    mark: Option<Mark>,
    marked: AtomicBool,
    /// Keeps it this process's named reader.
    hold: Option<Hold>,
}

#[derive(Debug)]
struct Mark {
    addr: u64,
    guid: [u8; 16],
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
            return Ok(Self::new(0, None));
        }
        let pidfd = match peer_pidfd(socket) {
            // Before Linux 6.5. Any other error may mean that the pid is already another's.
            Err(e) if e.raw_os_error() == Some(libc::ENOPROTOOPT) => open_pidfd(cred.pid()),
            answer => answer,
        };
        let pidfd = pidfd.map_err(PathFault::Closed)?;
        Ok(Self::new(cred.pid(), Some(pidfd)))
    }

    fn new(pid: i32, pidfd: Option<OwnedFd>) -> Self {
        Self {
            pid,
            pidfd,
            mark: None,
            marked: AtomicBool::new(false),
            hold: None,
        }
    }

    /// Its pid here, if it has one, and what tells that it is still the same process.
    pub(crate) fn identity(&self) -> Option<(i32, BorrowedFd<'_>)> {
        self.pidfd.as_ref().map(|fd| (self.pid, fd.as_fd()))
    }

    /// Says how the process that wrote `hello` is known.
    pub(crate) fn expect(&mut self, hello: &Hello) {
        self.mark = Some(Mark {
            addr: hello.probe_addr,
            guid: hello.guid,
        });
    }

    /// Lets the process read this one, for as long as `self` lives. Answers who is named in its
    /// stead, or 0.
    pub(crate) fn admit(&mut self) -> u32 {
        match reader::name(self) {
            Ok(hold) => {
                self.hold = hold;
                0
            }
            Err(other) => other.unsigned_abs(),
        }
    }

    /// Whether `self` keeps the process named.
    pub(crate) fn admitted(&self) -> bool {
        self.hold.is_some()
    }

    /// Its stream has ended: it need not read any more.
    pub(crate) fn dismiss(&mut self) {
        self.hold = None;
    }

    /// Looks for the guid of the context that wrote the opening in the process's memory; `false` if
    /// something else is there. Reads once.
    pub(crate) fn identify(&self) -> io::Result<bool> {
        if self.marked.load(Ordering::Relaxed) {
            return Ok(true);
        }
        let Some(mark) = &self.mark else {
            return Ok(false);
        };
        let mut guid = [0u8; 16];
        let local = [Span::of_mut(&mut guid)];
        let remote = [Span {
            addr: mark.addr,
            len: 16,
        }];
        // SAFETY: the span is the array above, which nobody looks at during the call.
        let got = unsafe { self.copy(&local, &remote) }?;
        let same = got == guid.len() && guid == mark.guid;
        self.marked.store(same, Ordering::Relaxed);
        Ok(same)
    }

    /// Copies from `remote` of the process into `local`, as one stream of bytes; answers how many.
    /// A dead process is `ESRCH`; one that cannot be seen from here, or is not the one that opened
    /// the stream, `EPERM`.
    ///
    /// # Safety
    ///
    /// Every span of `local` is mapped, writable, and borrowed by no Rust reference for the time
    /// of the call.
    pub(crate) unsafe fn read(&self, local: &[Span], remote: &[Span]) -> io::Result<usize> {
        if !self.identify()? {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        // SAFETY: the caller keeps the same promises.
        unsafe { self.copy(local, remote) }
    }

    /// # Safety
    ///
    /// As [`read`](Self::read).
    unsafe fn copy(&self, local: &[Span], remote: &[Span]) -> io::Result<usize> {
        let Some(pidfd) = &self.pidfd else {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        };
        if !alive(pidfd.as_fd()) {
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
        if !alive(pidfd.as_fd()) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(n)
    }
}

/// What tells when a peer's process has ended.
#[derive(Debug)]
pub struct PeerLife {
    pidfd: OwnedFd,
}

impl PeerLife {
    /// Of a process that has been identified; `None` where it cannot be seen from here.
    pub(crate) fn of(process: &PeerProcess) -> Option<Self> {
        let (_, pidfd) = process.identity()?;
        let pidfd = pidfd.try_clone_to_owned().ok()?;
        Some(Self { pidfd })
    }

    /// Whether the process has ended, all of its threads: one that is stopped has not. Whatever it had open is closed by
    /// then, unless another process has it open too (a child that it had forked).
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        // A look that fails says nothing of the process.
        let looked = poll(&mut fds, PollTimeout::ZERO).is_ok();
        let [fd] = fds;
        looked
            && fd
                .revents()
                .is_some_and(|of| of.contains(PollFlags::POLLIN))
    }
}

/// Whether the process still runs (stopped counts). While it does, its pid is its own.
pub(crate) fn alive(pidfd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::POLLIN)];
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
