//! The listener: connections that arrive, until they have proved themselves or are turned away.
//!
//! Anybody can connect, so what an unauthenticated connection may cost is bounded twice: no more
//! than [`MAX_ARRIVING`] are served at a time, and each has until one deadline for all of its
//! handshake. When all places are taken further ones wait in the system's queue, and those that
//! have had their place for longer than [`PATIENCE`] lose it: strangers who say nothing slow
//! newcomers down and do not lock them out.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::{debug, warn};

use super::Inner;
use super::bringup::Bringup;
use super::link::{Driver, Link};
use super::net;
use super::runtime::{Runtime, random_nonce};
use crate::error::{Error, chain};
use crate::session::{Session, busy_reply};
use crate::wire::{
    ConnectionKind, PREAMBLE_LEN, Role, STREAM_OPENING_LEN, Sniff, StreamOpening, VERSIONS, sniff,
};

/// Connections that may be between accept and authentication at a time.
const MAX_ARRIVING: usize = 128;
/// How long a connection keeps its place when others want it. A handshake is two round trips, and
/// the shorter this is the more strangers a second do no harm: 512 with these numbers.
const PATIENCE: Duration = Duration::from_millis(250);
/// Connections that may be open at a time.
const MAX_CONNECTIONS: usize = 1024;
/// The pause when no connection can be taken.
const PAUSE: Duration = Duration::from_millis(20);

/// Connections that have not proved themselves, the oldest first.
#[derive(Debug, Default)]
pub(crate) struct Arrivals {
    waiting: Mutex<VecDeque<Arrival>>,
}

#[derive(Debug)]
struct Arrival {
    id: u64,
    since: Instant,
    /// The connection once more, to shut it down.
    socket: TcpStream,
}

/// A connection's place among those that arrive; given up when dropped.
#[derive(Debug)]
pub(crate) struct Arriving {
    runtime: Arc<Runtime>,
    id: u64,
}

impl Arrivals {
    fn waiting(&self) -> MutexGuard<'_, VecDeque<Arrival>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_room(&self) -> bool {
        self.waiting().len() < MAX_ARRIVING
    }

    /// Somebody waits for a place: those that have had theirs for long lose it soon.
    fn make_room(&self) {
        for arrival in &*self.waiting() {
            if arrival.since.elapsed() < PATIENCE {
                break;
            }
            // Its thread finds the end of the connection. One that is gone already is fine.
            let _ = arrival.socket.shutdown(Shutdown::Both);
        }
    }
}

impl Arriving {
    fn new(runtime: &Arc<Runtime>, stream: &TcpStream) -> io::Result<Self> {
        let arrival = Arrival {
            id: runtime.next_id(),
            since: Instant::now(),
            socket: stream.try_clone()?,
        };
        let id = arrival.id;
        runtime.arrivals.waiting().push_back(arrival);
        Ok(Self {
            runtime: Arc::clone(runtime),
            id,
        })
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        self.runtime
            .arrivals
            .waiting()
            .retain(|arrival| arrival.id != self.id);
    }
}

/// One of the connections that are open.
struct Counted(Arc<Runtime>);

impl Counted {
    fn new(runtime: &Arc<Runtime>) -> Option<Self> {
        let counted = Self(Arc::clone(runtime));
        let before = runtime.connections.fetch_add(1, Ordering::AcqRel);
        (before < MAX_CONNECTIONS).then_some(counted)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Takes the connections that wait, as far as there is room.
pub(crate) fn accept(runtime: &Arc<Runtime>, engine: &Arc<Inner>, socket: &TcpListener) {
    loop {
        if !runtime.arrivals.has_room() {
            if net::wait_readable(socket, Duration::ZERO) {
                runtime.arrivals.make_room();
            }
            return std::thread::sleep(PAUSE);
        }
        let stream = match socket.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                // One connection's trouble, or no descriptors left: the next one may do better. The
                // connection may still wait, and would be tried again at once.
                debug!(%error, "accept");
                return std::thread::sleep(PAUSE);
            }
        };
        if let Err(error) = take(runtime, engine, stream) {
            warn!(error = %chain(&error), "connection refused");
        }
    }
}

fn take(runtime: &Arc<Runtime>, engine: &Arc<Inner>, mut stream: TcpStream) -> Result<(), Error> {
    let Some(counted) = Counted::new(runtime) else {
        warn!(limit = MAX_CONNECTIONS, "connection refused: too many");
        // A few bytes into an empty buffer; a client that has gone hears nothing.
        let _ = stream.write_all(&busy_reply(VERSIONS)?);
        return Ok(());
    };
    let failed = |source| Error::Stream {
        address: name(&stream),
        source,
    };
    let arriving = Arriving::new(runtime, &stream).map_err(failed)?;
    let (of, engine) = (Arc::clone(runtime), Arc::clone(engine));
    runtime.spawn_link("kvx-link", move || {
        serve(&of, engine, stream, arriving);
        drop(counted);
    })
}

fn name(stream: &TcpStream) -> String {
    stream
        .peer_addr()
        .map_or_else(|_| "?".to_owned(), |a| a.to_string())
}

/// Serves one accepted connection to its end.
fn serve(runtime: &Arc<Runtime>, engine: Arc<Inner>, stream: TcpStream, arriving: Arriving) {
    let name = name(&stream);
    let deadline = Instant::now() + engine.config.connect_timeout;
    let mut preamble = [0; PREAMBLE_LEN];
    let first = stream
        .set_nodelay(true)
        .and_then(|()| net::read_exact_by(&stream, &mut preamble, deadline, &runtime.stopping));
    if let Err(error) = first {
        debug!(peer = %name, %error, "connection without a preamble");
        return;
    }
    match sniff(&preamble) {
        Ok(Sniff::Is(ConnectionKind::Stream)) => {
            if let Err(error) = take_stream(runtime, stream, &preamble, deadline) {
                debug!(peer = %name, %error, "data stream refused");
            }
        }
        // A session says itself what is wrong with a preamble.
        _ => {
            let served = serve_session(engine, stream, &name, &preamble, deadline, arriving);
            if let Err(error) = served {
                debug!(peer = %name, %error, "session not served");
            }
        }
    }
}

fn serve_session(
    engine: Arc<Inner>,
    stream: TcpStream,
    name: &str,
    preamble: &[u8],
    deadline: Instant,
    arriving: Arriving,
) -> Result<(), Error> {
    let nonce = random_nonce()?;
    let mut config = engine.runtime.session_config(Role::Engine);
    config.handshake_timeout = deadline.saturating_duration_since(Instant::now());
    let established = Instant::now() + config.establish_timeout;
    let session = Session::server(config, nonce);
    let link = Arc::new(Link::new()?);
    engine.adopt(&link);
    let bringup = Bringup::server(established);
    let driver = Driver::new(engine, link, session, stream, name.to_owned(), bringup)?;
    let ended = driver.arriving(arriving).run(preamble);
    if ended.established {
        debug!(peer = %name, cause = %ended.cause, "session over");
    } else {
        warn!(peer = %name, error = %chain(&ended.error), "session not established");
    }
    Ok(())
}

fn take_stream(
    runtime: &Runtime,
    stream: TcpStream,
    preamble: &[u8; PREAMBLE_LEN],
    deadline: Instant,
) -> Result<(), Error> {
    let failed = |source| Error::Stream {
        address: name(&stream),
        source,
    };
    let mut bytes = [0; STREAM_OPENING_LEN];
    let (head, rest) = bytes.split_at_mut(PREAMBLE_LEN);
    head.copy_from_slice(preamble);
    net::read_exact_by(&stream, rest, deadline, &runtime.stopping).map_err(failed)?;
    let opening = StreamOpening::decode(&bytes)?;
    let (opening, answer, link) =
        runtime
            .admit(&opening, &bytes)
            .ok_or_else(|| Error::StreamNotAuthentic {
                address: name(&stream),
            })?;
    net::write_all_by(&stream, &answer, deadline).map_err(failed)?;
    link.stream(opening, stream);
    Ok(())
}
