//! The control connection of a side that has no engine (a pinger, an observer): a [`Session`] over a
//! socket, driven by the caller's own thread.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};

use crate::engine::poll_timeout;
use crate::error::Error;
use crate::session::{Closed, Event, SendError, Session, SessionError, SessionState};
use crate::time::Time;
use crate::transfer::Cause;
use crate::wire::{ErrorCode, GoodbyeReason, Message};

const READ_CHUNK: usize = 64 * 1024;
/// How long a goodbye may take to leave.
const LAST_WORDS: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(crate) struct Control {
    session: Session,
    socket: TcpStream,
    began: Instant,
    name: String,
    stop: Option<OwnedFd>,
    buffer: Vec<u8>,
}

impl Control {
    pub(crate) fn new(session: Session, socket: TcpStream, name: String) -> Result<Self, Error> {
        socket
            .set_nonblocking(true)
            .map_err(|source| Error::Unreachable {
                address: name.clone(),
                source,
            })?;
        let mut this = Self {
            session,
            socket,
            began: Instant::now(),
            name,
            stop: None,
            buffer: vec![0; READ_CHUNK],
        };
        let now = this.now();
        this.session.start(now);
        Ok(this)
    }

    pub(crate) fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    pub(crate) fn stop_on(&mut self, fd: OwnedFd) {
        self.stop = Some(fd);
    }

    /// Whether the caller's descriptor says to stop.
    pub(crate) fn stopped(&self) -> bool {
        let Some(stop) = &self.stop else {
            return false;
        };
        let mut fds = [PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, poll_timeout(Some(Duration::ZERO))), Ok(n) if n > 0)
    }

    fn now(&self) -> Time {
        Time(u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// Reads what is there, lets time pass, writes what waits. Does not sleep.
    pub(crate) fn turn(&mut self) {
        // Bounded, so that a peer that never stops sending does not keep time from passing.
        for _ in 0..16 {
            if self.session.is_closed() {
                break;
            }
            match self.socket.read(&mut self.buffer) {
                Ok(0) => self.session.on_eof(self.now()),
                Ok(n) => {
                    let now = self.now();
                    let bytes = self.buffer.get(..n).unwrap_or_default();
                    self.session.on_bytes(now, bytes);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => self.session.on_io_error(self.now(), error.kind()),
            }
        }
        if self
            .session
            .next_timeout()
            .is_some_and(|at| at <= self.now())
        {
            self.session.on_time(self.now());
        }
        self.flush();
    }

    fn flush(&mut self) {
        while !self.session.transmit().is_empty() {
            match self.socket.write(self.session.transmit()) {
                Ok(n) => self.session.transmitted(n),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    self.session.on_io_error(self.now(), error.kind());
                    let left = self.session.queued();
                    return self.session.transmitted(left);
                }
            }
        }
    }

    /// What has happened; an ended session is an error that says why.
    pub(crate) fn event(&mut self) -> Result<Option<Event>, Error> {
        match self.session.poll_event() {
            Some(Event::Closed(closed)) => Err(self.ended(closed)),
            None if self.session.is_closed() => Err(Error::NotConnected {
                cause: Cause::PeerClosed,
            }),
            event => Ok(event),
        }
    }

    fn ended(&mut self, closed: Closed) -> Error {
        self.flush();
        match closed {
            Closed::Failed(source) => Error::Session {
                peer: self.name.clone(),
                source,
            },
            Closed::Goodbye(_) | Closed::Local(_) => Error::NotConnected {
                cause: Cause::PeerClosed,
            },
        }
    }

    pub(crate) fn send(&mut self, message: &Message) -> Result<(), Error> {
        match self.session.send(message) {
            Ok(()) => Ok(()),
            // Bytes that came with the last ones have ended it: why is the next event.
            Err(_) if self.session.is_closed() => Ok(()),
            Err(SendError::Wire(error)) => Err(error.into()),
            Err(error) => Err(self.cut_off(&error.to_string())),
        }
    }

    /// Cuts the peer off for what it has said.
    pub(crate) fn cut_off(&mut self, text: &str) -> Error {
        self.session.cut_off(ErrorCode::Lie, text);
        self.flush();
        Error::Session {
            peer: self.name.clone(),
            source: SessionError::CutOff {
                code: ErrorCode::Lie,
                text: text.to_owned(),
            },
        }
    }

    /// The session did not stand in time: how far it came.
    pub(crate) fn late(&mut self, after: Duration) -> Error {
        let state = self.session.state();
        self.session.cut_off(ErrorCode::Timeout, "not in time");
        self.flush();
        Error::Session {
            peer: self.name.clone(),
            source: match state {
                SessionState::Handshake => SessionError::HandshakeTimeout { after },
                state => SessionError::EstablishTimeout { state, after },
            },
        }
    }

    /// Sends a ping; its number.
    pub(crate) fn ping(&mut self) -> Option<u64> {
        let now = self.now();
        let sequence = self.session.ping(now).ok();
        self.flush();
        sequence
    }

    /// Sleeps until the connection, `other` or the caller's stop has something, or the session's
    /// time is due; at most until `until`.
    pub(crate) fn sleep(&self, until: Instant, other: Option<BorrowedFd<'_>>) {
        let mut left = until.saturating_duration_since(Instant::now());
        if let Some(at) = self.session.next_timeout() {
            left = left.min(at.since(self.now()));
        }
        let mut flags = PollFlags::POLLIN;
        flags.set(PollFlags::POLLOUT, self.session.queued() > 0);
        let mut fds = vec![PollFd::new(self.socket.as_fd(), flags)];
        let more = [other, self.stop.as_ref().map(AsFd::as_fd)];
        let more = more.into_iter().flatten();
        fds.extend(more.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        // An interrupted or failed poll is a short sleep.
        let _ = poll(&mut fds, poll_timeout(Some(left)));
    }

    /// Says goodbye.
    pub(crate) fn close(&mut self) {
        self.session.close(GoodbyeReason::Finished);
        let until = Instant::now() + LAST_WORDS;
        while !self.session.is_finished() && Instant::now() < until {
            self.flush();
            let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
            let _ = poll(&mut fds, poll_timeout(Some(LAST_WORDS)));
        }
    }
}
