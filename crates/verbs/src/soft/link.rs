//! Opening the streams between two contexts on one host, and checking who is at the other end.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use crate::device::{DeviceAddr, DeviceKind};
use crate::error::{Error, PathFault, os};
use crate::qp::SoftPath;
use crate::region::Access;
use crate::soft::context::{SoftShared, key_fd};
use crate::soft::frame::{HELLO, Hello, Role};
use crate::soft::keys::{PeerKeys, table_is_sealed};
use crate::soft::process_vm::{PeerLife, PeerProcess};
use crate::soft::qp::SoftQp;
use crate::soft::requester::PeerSide;
use crate::soft::stream::{Stream, not_now};

/// How long a probe waits for an answer, and whoever asks for a file.
const PROBE_TIME: Duration = Duration::from_secs(2);

/// How the names of contexts' sockets begin.
pub(crate) const NAME: &str = "kvxfer/";

/// A stream that a peer has opened.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) hello: Hello,
    pub(crate) stream: Stream,
    pub(crate) keys: OwnedFd,
    pub(crate) process: PeerProcess,
}

pub(crate) fn path_code(path: SoftPath) -> u32 {
    match path {
        SoftPath::Arena => 1,
        SoftPath::ProcessVm => 2,
    }
}

pub(crate) fn path_of(code: u32) -> Option<SoftPath> {
    match code {
        1 => Some(SoftPath::Arena),
        2 => Some(SoftPath::ProcessVm),
        _ => None,
    }
}

/// An opening, or an answer, that describes this side.
pub(crate) fn hello(shared: &SoftShared, qp: Option<&SoftQp>, role: Role) -> Hello {
    Hello {
        role,
        path: 0,
        target: [0; 16],
        token: qp.map_or([0; 16], |q| q.token),
        guid: shared.address.guid,
        target_guid: [0; 16],
        qpn: qp.map_or(0, |q| q.qpn),
        pd: qp.map_or(0, |q| q.pd),
        access: qp.map_or(0, |q| q.access().bits()),
        slots: shared.key_slots,
        probe_addr: shared.probe_addr(),
        reader: 0,
        errno: 0,
    }
}

pub(crate) fn answer(shared: &SoftShared, qp: Option<&SoftQp>, to: &Hello) -> Hello {
    Hello {
        path: to.path,
        target: to.token,
        target_guid: to.guid,
        ..hello(shared, qp, Role::Welcome)
    }
}

/// What a requester needs of the peer that sent `hello`.
pub(crate) fn peer_side(
    shared: &SoftShared,
    hello: &Hello,
    keys: &OwnedFd,
    process: PeerProcess,
) -> Option<PeerSide> {
    if !table_is_sealed(keys.as_fd()) {
        return None;
    }
    let map = shared.maps.map(keys.as_fd()).ok()?;
    Some(PeerSide {
        keys: PeerKeys::new(map, hello.slots)?,
        pd: hello.pd,
        access: Access::from_bits_truncate(hello.access),
        process,
        path: path_of(hello.path)?,
    })
}

struct Dial<'a> {
    shared: &'a SoftShared,
    peer: &'a DeviceAddr,
    path: SoftPath,
    deadline: Instant,
}

impl Dial<'_> {
    fn fault(&self, fault: PathFault) -> Error {
        Error::Path {
            path: self.path,
            peer: self.peer.name.clone(),
            fault,
        }
    }

    fn late(&self) -> Error {
        Error::DialDeadline {
            path: self.path,
            peer: self.peer.name.clone(),
        }
    }

    fn connect(&self) -> Result<Stream, Error> {
        if self.peer.kind != DeviceKind::Soft {
            return Err(self.fault(PathFault::NoSuchPath));
        }
        // The address is the peer's word: not every socket of the user is to hear from us.
        if !self.peer.name.starts_with(NAME) {
            return Err(self.fault(PathFault::Protocol));
        }
        let here = &self.shared.address.host;
        if self.peer.host != *here {
            let (peer, here) = (self.peer.host.clone(), here.clone());
            return Err(self.fault(PathFault::OtherHost { peer, here }));
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)
            .map_err(|e| os("socket")(e.into()))?;
        let addr = UnixAddr::new_abstract(self.peer.name.as_bytes())
            .map_err(|e| self.fault(PathFault::Connect(e.into())))?;
        loop {
            match connect(fd.as_raw_fd(), &addr) {
                Ok(()) => return Ok(Stream::new(fd, true)),
                // The queue of connections is full; there is nothing to wait on.
                Err(nix::Error::EAGAIN) if Instant::now() < self.deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(nix::Error::EAGAIN) => return Err(self.late()),
                Err(nix::Error::EINTR) => {}
                Err(e) => return Err(self.fault(PathFault::Connect(e.into()))),
            }
        }
    }

    /// Opens a stream and waits for the answer.
    fn open(&self, hello: Hello) -> Result<Incoming, Error> {
        let stream = self.connect()?;
        let mut process = PeerProcess::of(stream.as_fd()).map_err(|f| self.fault(f))?;
        // There is one reader that a process can name, so only a path that needs it asks.
        let reader = match self.path {
            SoftPath::ProcessVm if process.identity().is_none() => {
                return Err(self.fault(PathFault::NoPid));
            }
            SoftPath::ProcessVm => process.admit(),
            SoftPath::Arena => 0,
        };
        let hello = Hello {
            path: path_code(self.path),
            target_guid: self.peer.guid,
            ..hello
        };
        let sent = stream
            .send(&hello.encode(), Some(key_fd(self.shared)))
            .map_err(|e| self.fault(PathFault::Closed(e)))?;
        if sent != HELLO {
            return Err(self.fault(PathFault::Protocol));
        }
        let mut buf = [0; HELLO];
        let mut got = 0;
        let mut fds = VecDeque::new();
        while got < HELLO {
            match stream.recv(buf.get_mut(got..).unwrap_or_default(), &mut fds) {
                Ok(0) => {
                    let eof = io::ErrorKind::UnexpectedEof.into();
                    return Err(self.fault(PathFault::Closed(eof)));
                }
                Ok(n) => got += n,
                Err(e) if not_now(&e) => self.wait(&stream)?,
                Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                    return Err(self.fault(PathFault::Protocol));
                }
                Err(e) => return Err(self.fault(PathFault::Closed(e))),
            }
        }
        let answer = Hello::decode(&buf).ok_or_else(|| self.fault(PathFault::Protocol))?;
        if answer.guid != self.peer.guid {
            return Err(self.fault(PathFault::Identity));
        }
        match answer.role {
            Role::Welcome => {}
            Role::Refused if hello.role == Role::File => {
                return Err(self.fault(PathFault::NotShared));
            }
            Role::Refused => return Err(self.fault(PathFault::Token)),
            Role::Barred if reader != 0 => {
                return Err(self.fault(PathFault::ReaderTaken { reader }));
            }
            Role::Barred => {
                let errno = i32::try_from(answer.errno).unwrap_or(libc::EIO);
                let why = match errno {
                    0 => PathFault::Identity,
                    _ => PathFault::Unreadable(io::Error::from_raw_os_error(errno)),
                };
                return Err(self.fault(why));
            }
            _ => return Err(self.fault(PathFault::Protocol)),
        }
        let one = (fds.pop_front(), fds.is_empty());
        let (Some(keys), true, true) = (one.0, one.1, answer.path == hello.path) else {
            return Err(self.fault(PathFault::Protocol));
        };
        process.expect(&answer);
        Ok(Incoming {
            hello: answer,
            stream,
            keys,
            process,
        })
    }

    fn wait(&self, stream: &Stream) -> Result<(), Error> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(self.late());
        }
        let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
        let left = left + Duration::from_micros(999);
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(e) => Err(os("poll")(e.into())),
        }
    }

    /// Tries `process_vm_readv` on the peer's guid.
    fn check_process_vm(&self, peer: &Incoming) -> Result<(), Error> {
        match peer.process.identify() {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.fault(PathFault::Identity)),
            Err(e) if peer.hello.reader != 0 && e.raw_os_error() == Some(libc::EPERM) => {
                let reader = peer.hello.reader;
                Err(self.fault(PathFault::PeerReaderTaken { reader }))
            }
            Err(e) => Err(self.fault(PathFault::ProcessVm(e))),
        }
    }
}

/// What tells when the peer's process has ended.
pub(crate) fn life(shared: &SoftShared, peer: &DeviceAddr) -> Result<PeerLife, Error> {
    let dial = Dial {
        shared,
        peer,
        // Both sides see to it that they may read each other's memory: by that it is known whose the socket is.
        path: SoftPath::ProcessVm,
        deadline: Instant::now() + PROBE_TIME,
    };
    let answer = dial.open(hello(shared, None, Role::Probe))?;
    dial.check_process_vm(&answer)?;
    PeerLife::of(&answer.process).ok_or_else(|| dial.fault(PathFault::NoPid))
}

/// Tries whether a path leads to the peer.
pub(crate) fn probe(shared: &SoftShared, peer: &DeviceAddr, path: SoftPath) -> Result<(), Error> {
    let dial = Dial {
        shared,
        peer,
        path,
        deadline: Instant::now() + PROBE_TIME,
    };
    let answer = dial.open(hello(shared, None, Role::Probe))?;
    match path {
        SoftPath::Arena => Ok(()),
        SoftPath::ProcessVm => dial.check_process_vm(&answer),
    }
}

/// Asks for the file of memory that a peer shares, and where in it the memory begins.
pub(crate) fn shared_file(
    shared: &SoftShared,
    peer: &DeviceAddr,
    (token, index): ([u8; 16], u32),
    deadline: Instant,
) -> Result<(OwnedFd, u64), Error> {
    let dial = Dial {
        shared,
        peer,
        path: SoftPath::Arena,
        deadline: deadline.min(Instant::now() + PROBE_TIME),
    };
    let answer = dial.open(Hello {
        target: token,
        qpn: index,
        ..hello(shared, None, Role::File)
    })?;
    Ok((answer.keys, answer.hello.probe_addr))
}

/// Opens both streams: for this side's requests, and for the peer's.
pub(crate) fn dial(
    shared: &SoftShared,
    qp: &SoftQp,
    target: [u8; 16],
    peer: &DeviceAddr,
    path: SoftPath,
    deadline: Instant,
) -> Result<(Incoming, Incoming), Error> {
    let dial = Dial {
        shared,
        peer,
        path,
        deadline,
    };
    let open = |role| {
        dial.open(Hello {
            target,
            ..hello(shared, Some(qp), role)
        })
    };
    let requester = open(Role::ToResponder)?;
    if path == SoftPath::ProcessVm {
        dial.check_process_vm(&requester)?;
    }
    Ok((requester, open(Role::ToRequester)?))
}
