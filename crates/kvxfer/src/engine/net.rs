//! TCP with deadlines: resolving, connecting, reading exactly, and which addresses are local.

use std::io::{self, Read, Write};
use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket,
};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, bounded};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, socket};

use super::runtime::spawn;
use super::wake::poll_timeout;
use crate::error::Error;

/// How soon a wait notices that nobody wants its end any more.
const SLICE: Duration = Duration::from_millis(100);
/// Further away than anything waits for, and still a time that the clock can hold.
const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// The time after `timeout`; one that no clock can hold means: no limit.
pub(crate) fn after(timeout: Duration) -> Instant {
    Instant::now() + timeout.min(FOR_EVER)
}

/// Whether a wait is over before its time: nobody wants its end any more.
pub(crate) trait Stop {
    fn is_asked(&self) -> bool;
}

impl Stop for AtomicBool {
    fn is_asked(&self) -> bool {
        self.load(Ordering::Acquire)
    }
}

/// The flag of whoever has nobody to stop it.
pub(crate) static NEVER: AtomicBool = AtomicBool::new(false);

/// An address in numbers: nobody need be asked for it.
fn literal(address: &str, port: u16) -> Option<SocketAddr> {
    // A bare IPv6 address is one as a whole, though its end reads as a port; brackets decide it.
    let bare = || address.parse().map(|ip: IpAddr| SocketAddr::new(ip, port));
    address.parse().or_else(|_| bare()).ok()
}

/// The addresses of `address` (`HOST`, `HOST:PORT` or `[V6]:PORT`), with `port` where it has none.
/// Waits for the system's resolver, however long that takes.
pub(crate) fn resolve(address: &str, port: u16) -> Result<Vec<SocketAddr>, Error> {
    if let Some(literal) = literal(address, port) {
        return Ok(vec![literal]);
    }
    let with_port = address
        .to_socket_addrs()
        .or_else(|first| (address, port).to_socket_addrs().map_err(|_| first));
    let found: Vec<SocketAddr> = with_port
        .map_err(|source| Error::Resolve {
            address: address.to_owned(),
            source,
        })?
        .collect();
    if found.is_empty() {
        let nothing = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
        return Err(Error::Resolve {
            address: address.to_owned(),
            source: nothing,
        });
    }
    Ok(found)
}

/// What finds the addresses of a name: [`resolve`], but for tests.
pub(crate) type Resolver = fn(&str, u16) -> Result<Vec<SocketAddr>, Error>;

/// What `resolver` finds, by `deadline`, and not after `stop`. The system's resolver cannot be
/// interrupted. So it gets a thread of its own, which nobody waits for when it takes too long.
pub(crate) fn resolve_by(
    address: &str,
    port: u16,
    resolver: Resolver,
    deadline: Instant,
    stop: &dyn Stop,
) -> Result<Vec<SocketAddr>, Error> {
    if let Some(literal) = literal(address, port) {
        return Ok(vec![literal]);
    }
    let unreachable = |source| Error::Unreachable {
        address: address.to_owned(),
        source,
    };
    let (found, finding) = bounded(1);
    let name = address.to_owned();
    spawn("kvx-resolve", move || {
        // Whoever asked may have given up.
        let _ = found.send(resolver(&name, port));
    })?;
    loop {
        let left = slice(deadline, stop).map_err(|source| match source.kind() {
            io::ErrorKind::TimedOut => {
                let late = "its name was not resolved in time";
                unreachable(io::Error::new(io::ErrorKind::TimedOut, late))
            }
            _ => unreachable(source),
        })?;
        match finding.recv_timeout(left) {
            Ok(found) => return found,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(unreachable(io::Error::other("the resolver has panicked")));
            }
        }
    }
}

/// Connects to the first of `addresses` that answers, by `deadline`, and not after `stop`.
pub(crate) fn connect(
    name: &str,
    addresses: &[SocketAddr],
    deadline: Instant,
    stop: &dyn Stop,
) -> Result<TcpStream, Error> {
    let mut last = io::Error::new(io::ErrorKind::TimedOut, "the deadline passed first");
    for address in addresses {
        if stop.is_asked() {
            return Err(Error::ShuttingDown);
        }
        if Instant::now() >= deadline {
            break;
        }
        match connect_one(address, deadline, stop) {
            Ok(stream) => {
                // Control frames are small and waited for.
                if let Err(source) = stream.set_nodelay(true) {
                    return Err(Error::Unreachable {
                        address: name.to_owned(),
                        source,
                    });
                }
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(Error::Unreachable {
        address: name.to_owned(),
        source: last,
    })
}

fn connect_one(address: &SocketAddr, deadline: Instant, stop: &dyn Stop) -> io::Result<TcpStream> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(family, SockType::Stream, flags, None)?;
    match socket::connect(fd.as_raw_fd(), &SockaddrStorage::from(*address)) {
        Ok(()) | Err(Errno::EINPROGRESS | Errno::EINTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let stream = TcpStream::from(fd);
    loop {
        let left = slice(deadline, stop)?;
        let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)];
        match poll(&mut fds, poll_timeout(Some(left))) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// How long to wait before looking at `stop` again.
fn slice(deadline: Instant, stop: &dyn Stop) -> io::Result<Duration> {
    if stop.is_asked() {
        return Err(io::Error::other("nobody waits for it any more"));
    }
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    // Zero would mean no timeout to a socket.
    Ok(left.clamp(Duration::from_millis(1), SLICE))
}

/// Listens on the first of `addresses` that can be had.
pub(crate) fn listen(name: &str, addresses: &[SocketAddr]) -> Result<TcpListener, Error> {
    TcpListener::bind(addresses).map_err(|source| Error::Listen {
        address: name.to_owned(),
        source,
    })
}

/// The address that this host has towards others, for somebody who listens on all of them. Nothing
/// is sent: connecting a datagram socket only asks the routing table. The addresses asked for are
/// set apart for documentation (RFC 5737, RFC 3849).
pub(crate) fn outward(listening: SocketAddr) -> io::Result<IpAddr> {
    let (any, far): (IpAddr, IpAddr) = match listening {
        SocketAddr::V4(_) => (
            Ipv4Addr::UNSPECIFIED.into(),
            Ipv4Addr::new(192, 0, 2, 1).into(),
        ),
        SocketAddr::V6(_) => {
            let far = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
            (Ipv6Addr::UNSPECIFIED.into(), far.into())
        }
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect((far, 9))?;
    Ok(socket.local_addr()?.ip())
}

/// Reads exactly `into`, by `deadline`, and not after `stop`, from a blocking stream.
pub(crate) fn read_exact_by(
    mut stream: &TcpStream,
    into: &mut [u8],
    deadline: Instant,
    stop: &AtomicBool,
) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
        stream.set_read_timeout(Some(slice(deadline, stop)?))?;
        match stream.read(rest) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => done += n,
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => {}
                _ => return Err(error),
            },
        }
    }
    Ok(())
}

/// Writes all of `bytes`, by `deadline`, to a blocking stream.
pub(crate) fn write_all_by(
    mut stream: &TcpStream,
    bytes: &[u8],
    deadline: Instant,
) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    stream.set_write_timeout(Some(left.max(Duration::from_millis(1))))?;
    stream.write_all(bytes)
}

/// Waits for something to read, for at most `timeout`; whether there is.
pub(crate) fn wait_readable(socket: &impl AsFd, timeout: Duration) -> bool {
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    // A failed poll is a short wait.
    poll(&mut fds, poll_timeout(Some(timeout))).is_ok_and(|n| n > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_with_and_without_ports() {
        let one = |s: &str| {
            resolve(s, 7301)
                .expect("a literal address")
                .remove(0)
                .to_string()
        };
        assert_eq!(one("127.0.0.1"), "127.0.0.1:7301");
        assert_eq!(one("127.0.0.1:9"), "127.0.0.1:9");
        assert_eq!(one("::1"), "[::1]:7301");
        assert_eq!(one("[::1]:9"), "[::1]:9");
        assert!(matches!(
            resolve("127.0.0.1:port", 1),
            Err(Error::Resolve { .. })
        ));
    }

    #[test]
    fn a_silent_peer_is_a_timeout_and_a_closed_one_an_end() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("its address");
        let deadline = Instant::now() + Duration::from_secs(60);
        let go = AtomicBool::new(false);
        let stream = connect("test", &[address], deadline, &go).expect("a listener");
        let (peer, _) = listener.accept().expect("the connection");
        let mut byte = [0];
        let soon = Instant::now() + Duration::from_millis(20);
        let error = read_exact_by(&stream, &mut byte, soon, &go).expect_err("nothing was sent");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(peer);
        let error = read_exact_by(&stream, &mut byte, deadline, &go).expect_err("closed");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn nobody_listening_is_unreachable() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("its address");
        drop(listener);
        let deadline = Instant::now() + Duration::from_secs(60);
        let go = AtomicBool::new(false);
        let error = connect("x:1", &[address], deadline, &go).expect_err("the port was closed");
        assert!(matches!(error, Error::Unreachable { .. }), "{error}");
        go.store(true, Ordering::Release);
        let error = connect("x:1", &[address], deadline, &go).expect_err("stopped");
        assert!(matches!(error, Error::ShuttingDown), "{error}");
    }
}
