//! Sessions that this side opens, and keeps up.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use serde::{Deserialize, Serialize};
use tracing::{debug, info};

use super::bringup::Bringup;
use super::instance::{Instance, Tether};
use super::link::{Driver, Ended, Link};
use super::runtime::random_nonce;
use super::{Inner, net};
use crate::error::Error;
use crate::ids::{EngineId, Generation, Rank};
use crate::session::Session;
use crate::wire::{Blob, GoodbyeReason, Role};

/// The first pause before a lost session is set up again; it doubles up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// A session that runs out of time knows how far it came: whoever waits for it hears that instead of
/// the bare deadline, if it is said so soon after.
const SAY_WHY: Duration = Duration::from_millis(250);

/// What a peer must know to connect to a rank.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Metadata {
    pub(crate) engine: EngineId,
    pub(crate) generation: Generation,
    pub(crate) rank: Rank,
    pub(crate) address: String,
}

impl Metadata {
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        Ok(Blob::pack("metadata", self)?.0)
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        Blob(bytes.to_vec())
            .unpack("metadata")
            .map_err(|source| Error::Metadata { source })
    }
}

/// Where a session goes.
struct Target {
    name: String,
    addresses: Vec<SocketAddr>,
    wanted: Option<EngineId>,
    role: Role,
}

/// Connects, and leaves a thread behind that keeps the session up while the instance is held.
pub(crate) fn connect(
    engine: &Arc<Inner>,
    address: &str,
    wanted: Option<EngineId>,
    role: Role,
    deadline: Duration,
) -> Result<Instance, Error> {
    engine.runtime.health.check()?;
    let until = net::after(deadline);
    let addresses = net::resolve(address, crate::config::DEFAULT_PORT)?;
    let target = Target {
        name: address.to_owned(),
        addresses,
        wanted,
        role,
    };
    let stop = &engine.runtime.stopping;
    let socket = net::connect(&target.name, &target.addresses, until, stop)?;
    let (tether, held) = Tether::new();
    let (up, came_up) = bounded(1);
    let (failed, failure) = bounded(1);
    let link = Arc::new(Link::new()?);
    engine.adopt(&link);
    let keeper = {
        let (engine, link, tether) = (Arc::clone(engine), Arc::clone(&link), Arc::clone(&tether));
        move || {
            keep_up(
                engine, &tether, target, link, socket, until, up, &failed, &held,
            )
        }
    };
    engine.runtime.spawn_link(keeper)?;
    let left = until.saturating_duration_since(Instant::now());
    // One of the two comes: the peer, or why there is none.
    crossbeam_channel::select! {
        recv(came_up) -> peer => if let Ok(peer) = peer {
            return Ok(Instance::connected(Arc::clone(engine), peer, tether));
        },
        recv(failure) -> error => if let Ok(error) = error {
            return Err(error);
        },
        default(left + SAY_WHY) => {}
    }
    // A session that fails also drops its end of the other channel, which may be seen first.
    if let Ok(error) = failure.try_recv() {
        return Err(error);
    }
    link.close(GoodbyeReason::Finished);
    Err(Error::Deadline {
        what: "connecting",
        after: deadline,
    })
}

/// The body of the thread: one session after another, until nobody holds the instance.
#[expect(
    clippy::too_many_arguments,
    reason = "a thread's beginning, called in one place"
)]
fn keep_up(
    engine: Arc<Inner>,
    tether: &Tether,
    target: Target,
    first_link: Arc<Link>,
    first_socket: TcpStream,
    first_until: Instant,
    up: Sender<Arc<super::peer_session::PeerSession>>,
    failed: &Sender<Error>,
    held: &Receiver<()>,
) {
    let (weak, runtime) = (Arc::downgrade(&engine), Arc::clone(&engine.runtime));
    let mut attempt = Some((engine, first_link, first_socket, first_until));
    let mut established_once = false;
    let mut pause = FIRST_PAUSE;
    loop {
        if let Some((engine, link, socket, until)) = attempt.take() {
            tether.hold_link(&link);
            let up = if established_once {
                tether.again()
            } else {
                up.clone()
            };
            match session(engine, &target, link, socket, until, up) {
                Ok(ended) if ended.established => {
                    established_once = true;
                    pause = FIRST_PAUSE;
                    tether.lost(ended.cause);
                    if ended.wanted {
                        return;
                    }
                }
                Ok(Ended { error, .. }) | Err(error) if !established_once => {
                    // Whoever connects hears of it, or has given up waiting.
                    let _ = failed.send(error);
                    return;
                }
                Ok(Ended { error, .. }) | Err(error) => {
                    info!(peer = %target.name, error = %crate::error::chain(&error), "not reconnected");
                }
            }
        }
        // Sleeps, unless the last handle of the instance or the engine goes.
        crossbeam_channel::select! {
            recv(held) -> _ => return,
            recv(runtime.stopped) -> _ => return,
            default(pause) => {}
        }
        pause = (pause * 2).min(LAST_PAUSE);
        if runtime.health.check().is_err() {
            return;
        }
        let Some(engine) = weak.upgrade() else { return };
        let until = net::after(engine.config.connect_timeout);
        // An address that does not answer must not keep an engine that is dropped meanwhile.
        drop(engine);
        match net::connect(&target.name, &target.addresses, until, &runtime.stopping)
            .and_then(|socket| Ok((socket, Link::new()?)))
        {
            Ok((socket, link)) => {
                let Some(engine) = weak.upgrade() else { return };
                let link = Arc::new(link);
                engine.adopt(&link);
                attempt = Some((engine, link, socket, until));
            }
            Err(error) => debug!(peer = %target.name, %error, "not reconnected yet"),
        }
    }
}

/// One session, from handshake to end.
fn session(
    engine: Arc<Inner>,
    target: &Target,
    link: Arc<Link>,
    socket: TcpStream,
    until: Instant,
    up: Sender<Arc<super::peer_session::PeerSession>>,
) -> Result<Ended, Error> {
    let address = socket.peer_addr().map_err(|source| Error::Unreachable {
        address: target.name.clone(),
        source,
    })?;
    let mut config = engine.runtime.session_config(target.role);
    let left = until.saturating_duration_since(Instant::now());
    config.handshake_timeout = config.handshake_timeout.min(left);
    config.establish_timeout = config.establish_timeout.min(left);
    let session = Session::client(config, random_nonce()?);
    let bringup = Bringup::client(target.role, address, target.wanted.clone(), until, up);
    let driver = Driver::new(engine, link, session, socket, target.name.clone(), bringup)?;
    Ok(driver.run(&[]))
}
