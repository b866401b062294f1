//! Non-blocking stream sockets: plain bytes, bytes with a descriptor, and spans of memory.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// A span of this process's memory, laid out as the kernel's `struct iovec`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Span {
    pub(crate) addr: u64,
    pub(crate) len: u64,
}

const _: () = assert!(size_of::<Span>() == size_of::<libc::iovec>());
const _: () = assert!(align_of::<Span>() == align_of::<libc::iovec>());

/// Descriptors that have come and whose frames are not parsed yet. A frame takes its own as soon as
/// it is whole, and is parsed before more is received.
const MAX_FDS: usize = 4;

/// Descriptors that the kernel passes with one message, at most.
const SCM_MAX_FD: usize = 253;

// SAFETY: arithmetic on a length; the call touches no memory.
const CONTROL: usize = unsafe { libc::CMSG_SPACE((SCM_MAX_FD * size_of::<i32>()) as u32) } as usize;

/// Room for all descriptors that one receive can bring: what has no room would be lost, but what
/// came before it would be open already.
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

const _: () = assert!(align_of::<Control>() >= align_of::<libc::cmsghdr>());

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

/// Takes over the descriptors in control data that a receive has just filled: for each message a
/// length (8 bytes, with this head), a level and a type (4 each), then the descriptors. Zeros end it.
fn descriptors(mut control: &[u8]) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    while let Some((head, rest)) = control.split_first_chunk::<16>() {
        let [len, kind] = [0, 8].map(|at| {
            let word = head.get(at..at + 8).and_then(|b| b.try_into().ok());
            word.map_or(0, u64::from_ne_bytes)
        });
        let Some(data) = usize::try_from(len).ok().and_then(|n| n.checked_sub(16)) else {
            break;
        };
        let rights = [libc::SOL_SOCKET, libc::SCM_RIGHTS].map(i32::to_ne_bytes);
        if kind.to_ne_bytes() == *rights.as_flattened() {
            let list = rest.get(..data).unwrap_or_default();
            for raw in list.as_chunks::<4>().0 {
                // SAFETY: the kernel has just made this descriptor for us and nobody else knows of
                // it; each is listed once, and the caller parses what it received once.
                fds.push(unsafe { OwnedFd::from_raw_fd(i32::from_ne_bytes(*raw)) });
            }
        }
        control = rest.get(data.next_multiple_of(8)..).unwrap_or_default();
    }
    fds
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

    /// Reads some bytes; 0 is the end. A descriptor that comes with them is appended to `fds`. No
    /// message of ours brings two, so whoever sends more, or lets them pile up, broke the protocol:
    /// that is `InvalidData`, and all that came with the message are closed.
    pub(crate) fn recv(&self, buf: &mut [u8], fds: &mut VecDeque<OwnedFd>) -> io::Result<usize> {
        let spans = [Span::of_mut(buf)];
        let mut msg = header(&spans);
        let mut control = Control([0; CONTROL]);
        if self.unix {
            msg.msg_control = control.0.as_mut_ptr().cast();
            msg.msg_controllen = CONTROL as _;
        }
        let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        // SAFETY: msg points at one span, which is `buf`, and at `control`; both are borrowed here
        // alone and outlive the call.
        let n = unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut msg, flags) };
        let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
        if !self.unix {
            return Ok(n);
        }
        // Owned before anything is judged, so that whatever is wrong closes them all.
        let came = descriptors(&control.0);
        let cut = msg.msg_flags & libc::MSG_CTRUNC != 0;
        if cut || came.len() > 1 || fds.len() + came.len() > MAX_FDS {
            return Err(io::ErrorKind::InvalidData.into());
        }
        fds.extend(came);
        Ok(n)
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
        // A descriptor that no frame took would be taken for the next frame's.
        if self.bytes().is_empty() && !self.fds.is_empty() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.room();
        let Self { buf, end, fds, .. } = self;
        let stop = end.saturating_add(max).min(buf.len());
        let n = stream.recv(buf.get_mut(*end..stop).unwrap_or_default(), fds)?;
        self.filled(n);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    fn streams() -> (OwnedFd, Stream) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let pair = socketpair(AddressFamily::Unix, SockType::Stream, None, flags).unwrap();
        (pair.0, Stream::new(pair.1, true))
    }

    fn pass(to: &OwnedFd, fds: &[i32]) {
        let bytes = [IoSlice::new(b"x")];
        let cmsgs = [ControlMessage::ScmRights(fds)];
        sendmsg::<()>(to.as_raw_fd(), &bytes, &cmsgs, MsgFlags::empty(), None).unwrap();
    }

    /// One descriptor comes through; more than one message of ours has is refused, and none of them
    /// stays open, however many they are: the pipe whose writing end was passed ends.
    #[test]
    fn descriptors_that_nobody_asked_for_are_closed() {
        for count in [2, 28, 29, 253] {
            let (mut end, writer) = io::pipe().unwrap();
            let (peer, stream) = streams();
            pass(&peer, &vec![writer.as_raw_fd(); count]);
            drop(writer);
            let mut fds = VecDeque::new();
            let got = stream.recv(&mut [0; 8], &mut fds);
            assert_eq!(
                got.map_err(|e| e.kind()),
                Err(io::ErrorKind::InvalidData),
                "{count}"
            );
            assert!(fds.is_empty());
            let flags = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
            nix::fcntl::fcntl(&end, flags).unwrap();
            assert_eq!(end.read(&mut [0]).ok(), Some(0), "{count} leaked");
        }
    }

    #[test]
    fn a_descriptor_goes_with_its_bytes_and_must_be_taken() {
        let (mut end, writer) = io::pipe().unwrap();
        let (peer, stream) = streams();
        pass(&peer, &[writer.as_raw_fd()]);
        drop(writer);
        let mut inbox = Inbox::new(64);
        assert_eq!(inbox.fill(&stream).unwrap(), 1);
        assert_eq!(inbox.fds.len(), 1);
        let none = inbox.fill(&stream).unwrap_err();
        assert_eq!(none.kind(), io::ErrorKind::WouldBlock);
        // The byte is parsed and its descriptor is left over.
        inbox.consume(1);
        let stray = inbox.fill(&stream).unwrap_err();
        assert_eq!(stray.kind(), io::ErrorKind::InvalidData);
        inbox.fds.clear();
        assert_eq!(end.read(&mut [0]).ok(), Some(0));
    }

    #[test]
    fn any_control_bytes_are_walked_to_their_end() {
        // No level and type of descriptors in it, so that none is taken over.
        let mut bytes = [0u8; 64];
        assert!(descriptors(&bytes).is_empty());
        for len in [1u64, 15, 16, 17, 24, 63, 64, 65, u64::MAX] {
            bytes[..8].copy_from_slice(&len.to_ne_bytes());
            assert!(descriptors(&bytes).is_empty());
        }
    }
}
