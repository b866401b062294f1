//! Non-blocking stream sockets: plain bytes, bytes with a descriptor, and spans of memory.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// A span of this process's memory, laid out as the kernel's `struct iovec`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Span {
    pub(crate) addr: u64,
    pub(crate) len: u64,
}

const _: () = assert!(size_of::<Span>() == size_of::<libc::iovec>());
const _: () = assert!(align_of::<Span>() == align_of::<libc::iovec>());

/// Descriptors that have come and whose frames are not parsed yet.
const MAX_FDS: usize = 512;

/// Spans of one call; the kernel takes 1024.
pub(crate) const MAX_SPANS: usize = 1000;

impl Span {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self {
            addr: bytes.as_ptr() as u64,
            len: bytes.len() as u64,
        }
    }

    pub(crate) fn of_mut(bytes: &mut [u8]) -> Self {
        Self {
            addr: bytes.as_mut_ptr() as u64,
            len: bytes.len() as u64,
        }
    }
}

fn header(spans: &[Span]) -> libc::msghdr {
    // SAFETY: an all-zero msghdr is a valid value of the C struct: null pointers and zero lengths.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = spans.as_ptr().cast_mut().cast();
    msg.msg_iovlen = spans.len();
    msg
}

/// A connected, non-blocking stream socket.
#[derive(Debug)]
pub(crate) struct Stream {
    fd: OwnedFd,
    /// Whether descriptors may arrive with the bytes.
    unix: bool,
}

impl Stream {
    /// Takes a socket that is already non-blocking.
    pub(crate) fn new(fd: OwnedFd, unix: bool) -> Self {
        Self { fd, unix }
    }

    pub(crate) fn send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<usize> {
        let raw = fd.map(|f| [f.as_raw_fd()]);
        let cmsgs = raw.as_ref().map(|r| [ControlMessage::ScmRights(r)]);
        let cmsgs = cmsgs.as_ref().map_or(&[][..], |c| &c[..]);
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        Ok(sendmsg::<()>(
            self.fd.as_raw_fd(),
            &[IoSlice::new(bytes)],
            cmsgs,
            flags,
            None,
        )?)
    }

    /// Reads some bytes; 0 is the end. Descriptors are appended to `fds`.
    pub(crate) fn recv(&self, buf: &mut [u8], fds: &mut VecDeque<OwnedFd>) -> io::Result<usize> {
        let raw = self.fd.as_raw_fd();
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let mut iov = [IoSliceMut::new(buf)];
        if !self.unix {
            return Ok(recvmsg::<()>(raw, &mut iov, None, flags)?.bytes);
        }
        let mut space = [0u8; 128];
        let msg = recvmsg::<()>(raw, &mut iov, Some(&mut space), flags)?;
        for c in msg.cmsgs()? {
            if let ControlMessageOwned::ScmRights(list) = c {
                for fd in list {
                    // SAFETY: the kernel has just made this descriptor for us and nobody else
                    // knows of it.
                    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                    // One comes with a frame; a peer that sends many gets them closed.
                    if fds.len() < MAX_FDS {
                        fds.push_back(fd);
                    }
                }
            }
        }
        Ok(msg.bytes)
    }

    /// Sends from spans.
    ///
    /// # Safety
    ///
    /// Every span is mapped and readable for the time of the call. Bytes that others write
    /// meanwhile may arrive torn, nothing worse: only the kernel looks at them.
    pub(crate) unsafe fn sendv(&self, spans: &[Span]) -> io::Result<usize> {
        let msg = header(spans);
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: msg points at `spans`, which outlives the call; the caller vouches for what the
        // spans point at.
        let n = unsafe { libc::sendmsg(self.fd.as_raw_fd(), &raw const msg, flags) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Receives into spans; 0 is the end.
    ///
    /// # Safety
    ///
    /// Every span is mapped, writable, and borrowed by no Rust reference for the time of the call.
    pub(crate) unsafe fn recvv(&self, spans: &[Span]) -> io::Result<usize> {
        let mut msg = header(spans);
        // SAFETY: msg points at `spans`, which outlives the call; the caller vouches for what the
        // spans point at.
        let n = unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut msg, libc::MSG_DONTWAIT) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether the error only means "not now".
pub(crate) fn not_now(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// Bytes, and descriptors at places between them, on their way out.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    buf: Vec<u8>,
    pos: usize,
    fds: VecDeque<(usize, Arc<OwnedFd>)>,
}

impl Outbox {
    pub(crate) fn is_empty(&self) -> bool {
        self.pos == self.buf.len()
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
    }

    /// The next bytes put travel with `fd`.
    pub(crate) fn put_fd(&mut self, fd: Arc<OwnedFd>) {
        self.fds.push_back((self.buf.len(), fd));
    }

    /// The bytes not sent yet.
    pub(crate) fn rest(&self) -> &[u8] {
        self.buf.get(self.pos..).unwrap_or_default()
    }

    pub(crate) fn advance(&mut self, n: usize) {
        self.pos += n;
        if self.pos >= self.buf.len() {
            self.buf.clear();
            self.pos = 0;
        }
    }

    /// Sends what the socket takes; `true` when nothing is left.
    pub(crate) fn flush(&mut self, stream: &Stream) -> io::Result<bool> {
        while !self.is_empty() {
            let (fd, end) = match self.fds.front() {
                Some((at, fd)) if *at == self.pos => {
                    let next = self.fds.get(1).map_or(self.buf.len(), |f| f.0);
                    (Some(Arc::clone(fd)), next)
                }
                Some((at, _)) => (None, *at),
                None => (None, self.buf.len()),
            };
            let bytes = self.buf.get(self.pos..end).unwrap_or_default();
            match stream.send(bytes, fd.as_ref().map(|f| f.as_fd())) {
                Ok(n) => {
                    if fd.is_some() {
                        self.fds.pop_front();
                    }
                    self.advance(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }
}

/// Bytes that have come in and are not parsed yet.
#[derive(Debug)]
pub(crate) struct Inbox {
    buf: Box<[u8]>,
    pos: usize,
    end: usize,
    pub(crate) fds: VecDeque<OwnedFd>,
}

impl Inbox {
    pub(crate) fn new(size: usize) -> Self {
        Self {
            buf: vec![0; size].into_boxed_slice(),
            pos: 0,
            end: 0,
            fds: VecDeque::new(),
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.buf.get(self.pos..self.end).unwrap_or_default()
    }

    pub(crate) fn consume(&mut self, n: usize) {
        self.pos = self.pos.saturating_add(n).min(self.end);
        if self.pos == self.end {
            self.pos = 0;
            self.end = 0;
        }
    }

    /// The free end of the buffer; what is in it moves to the front if that end is short.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        if self.pos > 0 && self.buf.len() - self.end < self.buf.len() / 2 {
            self.buf.copy_within(self.pos..self.end, 0);
            self.end -= self.pos;
            self.pos = 0;
        }
        self.buf.get_mut(self.end..).unwrap_or_default()
    }

    /// `n` bytes of [`room`](Self::room) have been filled.
    pub(crate) fn filled(&mut self, n: usize) {
        self.end = (self.end + n).min(self.buf.len());
    }

    /// One receive; 0 is the end of the stream.
    pub(crate) fn fill(&mut self, stream: &Stream) -> io::Result<usize> {
        self.fill_max(stream, usize::MAX)
    }

    /// One receive of at most `max` bytes.
    pub(crate) fn fill_max(&mut self, stream: &Stream, max: usize) -> io::Result<usize> {
        self.room();
        let Self { buf, end, fds, .. } = self;
        let stop = end.saturating_add(max).min(buf.len());
        let n = stream.recv(buf.get_mut(*end..stop).unwrap_or_default(), fds)?;
        self.filled(n);
        Ok(n)
    }
}
