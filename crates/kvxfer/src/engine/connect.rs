//! Sessions that this side opens, and keeps up.

use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Select, Sender, TryRecvError, bounded, never};
use tracing::{debug, info};

use super::bringup::Bringup;
use super::instance::Instance;
use super::link::{Driver, Ended, Link};
use super::net::Resolver;
use super::peer::Peer;
use super::peer_session::PeerSession;
use super::runtime::{Runtime, random_nonce};
use super::tether::Tether;
use super::{Inner, net};
use crate::config::DEFAULT_PORT;
use crate::error::Error;
use crate::ids::{EngineId, Rank};
use crate::metadata::{Metadata, MetadataError};
use crate::session::Session;
use crate::wire::Role;

/// The first pause before a lost session is set up again; it doubles up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// A session that runs out of time knows how far it came: whoever waits for it hears that instead of
/// the bare deadline, if it is said so soon after.
const SAY_WHY: Duration = Duration::from_millis(250);

/// Where a session goes, and who is to be there.
#[derive(Debug)]
pub(crate) struct Target {
    name: String,
    engine: Option<EngineId>,
    rank: Option<Rank>,
    role: Role,
    resolver: Resolver,
}

impl Target {
    /// Whoever listens at the address.
    pub(crate) fn address(address: &str, role: Role) -> Self {
        Self {
            name: address.to_owned(),
            engine: None,
            rank: None,
            role,
            resolver: net::resolve,
        }
    }

    /// The rank that the metadata is of.
    pub(crate) fn metadata(bytes: &[u8]) -> Result<Self, MetadataError> {
        let metadata = Metadata::from_bytes(bytes)?;
        Ok(Self {
            engine: Some(metadata.engine),
            rank: Some(metadata.rank),
            ..Self::address(&metadata.address, Role::Engine)
        })
    }
}

/// Connects by `deadline` from now, and leaves a thread behind that keeps the session up while the
/// peer is held.
pub(crate) fn connect(
    engine: &Arc<Inner>,
    target: Target,
    deadline: Duration,
) -> Result<Peer, Error> {
    let mut attempts = Attempts::new(engine, deadline);
    attempts.begin(target, false)?;
    let mut peers = attempts.wait().map_err(|(_, error)| error)?;
    peers.pop().ok_or(Error::NoRanks)
}

/// Connects to the ranks of one engine, all at once, by `deadline` from now. The error names the one
/// that failed first; what was opened to the others is closed then, and what is still being dialled
/// is given up.
pub(crate) fn connect_ranks(
    engine: &Arc<Inner>,
    targets: Vec<Target>,
    deadline: Duration,
) -> Result<Instance, Error> {
    let names: Vec<String> = targets.iter().map(|target| target.name.clone()).collect();
    let of_rank = |at: usize, error| Error::ConnectRank {
        address: names.get(at).cloned().unwrap_or_default(),
        source: Box::new(error),
    };
    let mut attempts = Attempts::new(engine, deadline);
    for (at, target) in targets.into_iter().enumerate() {
        attempts
            .begin(target, true)
            .map_err(|error| of_rank(at, error))?;
    }
    let peers = attempts.wait().map_err(|(at, error)| of_rank(at, error))?;
    Instance::of_ranks(names.into_iter().zip(peers).collect())
}

/// Sessions that are being opened together, by one deadline. Those that nobody has taken as peers are
/// closed when this is dropped.
struct Attempts<'a> {
    engine: &'a Arc<Inner>,
    deadline: Duration,
    until: Instant,
    all: Vec<Attempt>,
}

struct Attempt {
    tether: Option<Arc<Tether>>,
    /// One of the two comes: the session, or why there is none.
    came_up: Receiver<Arc<PeerSession>>,
    failure: Receiver<Error>,
    session: Option<Arc<PeerSession>>,
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if let Some(tether) = &self.tether {
            tether.let_go();
        }
    }
}

impl<'a> Attempts<'a> {
    fn new(engine: &'a Arc<Inner>, deadline: Duration) -> Self {
        Self {
            engine,
            deadline,
            until: net::after(deadline),
            all: Vec::new(),
        }
    }

    /// Starts the thread that opens a session. One of `several` may not become another engine's later.
    fn begin(&mut self, target: Target, several: bool) -> Result<(), Error> {
        let runtime = &self.engine.runtime;
        runtime.health.check()?;
        let (tether, held) = Tether::new();
        let (up, came_up) = bounded(1);
        let (failed, failure) = bounded(1);
        let keeper = Keeper {
            engine: Arc::downgrade(self.engine),
            runtime: Arc::clone(runtime),
            tether: Arc::clone(&tether),
            held,
            target,
            addresses: Vec::new(),
            several,
        };
        let until = self.until;
        runtime.spawn_link("kvx-link", move || keeper.run(until, up, &failed))?;
        self.all.push(Attempt {
            tether: Some(tether),
            came_up,
            failure,
            session: None,
        });
        Ok(())
    }

    /// Waits for all of them, or for the first that fails: its place, and why.
    fn wait(mut self) -> Result<Vec<Peer>, (usize, Error)> {
        // A session that runs out of time knows how far it came, and says so.
        let until = self.until + SAY_WHY;
        while let Some(at) = self.all.iter().position(|a| a.session.is_none()) {
            if !self.news(until) {
                let (what, after) = ("connecting", self.deadline);
                return Err((at, Error::Deadline { what, after }));
            }
            for (at, attempt) in self.all.iter_mut().enumerate() {
                attempt.look().map_err(|error| (at, error))?;
            }
        }
        let engine = self.engine;
        let peer = |attempt: &mut Attempt| {
            let (session, tether) = (attempt.session.take()?, attempt.tether.take()?);
            Some(Peer::connected(Arc::clone(engine), session, tether))
        };
        Ok(self.all.iter_mut().filter_map(peer).collect())
    }

    /// Waits until one of those that are not up has something to say; not beyond `until`.
    fn news(&self, until: Instant) -> bool {
        let mut select = Select::new();
        for attempt in self.all.iter().filter(|a| a.session.is_none()) {
            select.recv(&attempt.came_up);
            select.recv(&attempt.failure);
        }
        select.ready_deadline(until).is_ok()
    }
}

impl Attempt {
    /// Takes what has come.
    fn look(&mut self) -> Result<(), Error> {
        if self.session.is_some() {
            return Ok(());
        }
        let failure = self.failure.try_recv();
        match self.came_up.try_recv() {
            Ok(session) => {
                self.session = Some(session);
                return Ok(());
            }
            Err(TryRecvError::Empty) => {}
            // The reason follows, or is here.
            Err(TryRecvError::Disconnected) => self.came_up = never(),
        }
        match failure {
            Ok(error) => Err(error),
            Err(TryRecvError::Empty) => Ok(()),
            // The thread went without a word: the engine goes.
            Err(TryRecvError::Disconnected) => Err(Error::ShuttingDown),
        }
    }
}

/// The thread of one peer: one session after another, until nobody holds the peer.
struct Keeper {
    engine: Weak<Inner>,
    runtime: Arc<Runtime>,
    tether: Arc<Tether>,
    held: Receiver<()>,
    target: Target,
    /// Where that is, once its name has been resolved.
    addresses: Vec<SocketAddr>,
    /// Whether it is one of several ranks, which all are of one engine.
    several: bool,
}

/// An address that does not answer must keep neither an engine that is dropped meanwhile nor, when all
/// handles of the peer are gone, a thread and a socket.
impl net::Stop for Keeper {
    fn is_asked(&self) -> bool {
        self.runtime.stopping.load(Ordering::Acquire) || !self.tether.is_held()
    }
}

impl Keeper {
    /// The first session is to stand by `until`, and is given to `up`; if it does not, the reason goes
    /// to `failed`, and that is all.
    fn run(mut self, until: Instant, up: Sender<Arc<PeerSession>>, failed: &Sender<Error>) {
        let first = match self.resolve(until) {
            Ok(()) => self.session(until, up),
            Err(error) => Some(Err(error)),
        };
        match first {
            Some(Ok(ended)) if ended.established => {
                self.met(&ended);
                if ended.wanted {
                    return;
                }
            }
            Some(Ok(Ended { error, .. }) | Err(error)) => {
                // Whoever connects hears of it, or has given up waiting.
                let _ = failed.send(error);
                return;
            }
            None => return,
        }
        let mut pause = FIRST_PAUSE;
        // Sleeps, unless the last handle of the peer or the engine goes.
        while self.pause(pause) {
            pause = (pause * 2).min(LAST_PAUSE);
            let Some(timeout) = self.engine.upgrade().map(|e| e.config.connect_timeout) else {
                return;
            };
            match self.session(net::after(timeout), self.tether.again()) {
                Some(Ok(ended)) if ended.established => {
                    pause = FIRST_PAUSE;
                    self.met(&ended);
                    if ended.wanted {
                        return;
                    }
                }
                Some(Ok(Ended { error, .. })) => {
                    info!(peer = %self.target.name, error = %crate::error::chain(&error), "not reconnected");
                }
                Some(Err(error)) => {
                    debug!(peer = %self.target.name, %error, "not reconnected yet");
                }
                None => return,
            }
        }
    }

    /// Here, and not where the caller waits, so that several names take the time of one.
    fn resolve(&mut self, until: Instant) -> Result<(), Error> {
        let Target { name, resolver, .. } = &self.target;
        self.addresses = net::resolve_by(name, DEFAULT_PORT, *resolver, until, self)?;
        Ok(())
    }

    /// Whether to go on after the pause.
    fn pause(&self, pause: Duration) -> bool {
        crossbeam_channel::select! {
            recv(self.held) -> _ => return false,
            recv(self.runtime.stopped) -> _ => return false,
            default(pause) => {}
        }
        self.runtime.health.check().is_ok()
    }

    /// A session has stood and is over. Later ones are with the same rank.
    fn met(&mut self, ended: &Ended) {
        self.tether.lost(ended.cause.clone());
        if let Some(name) = &ended.name {
            self.target.rank = Some(name.rank);
            if self.several {
                self.target.engine = Some(name.engine.clone());
            }
        }
    }

    /// One session, from dialling to end; none if nobody wants it any more.
    fn session(
        &self,
        until: Instant,
        up: Sender<Arc<PeerSession>>,
    ) -> Option<Result<Ended, Error>> {
        let dialled = net::connect(&self.target.name, &self.addresses, until, self)
            .and_then(|socket| Ok((socket, Link::new()?)));
        let (socket, link) = match dialled {
            Ok((socket, link)) => (socket, Arc::new(link)),
            Err(error) => return Some(Err(error)),
        };
        if !self.tether.is_held() {
            return None;
        }
        let engine = self.engine.upgrade()?;
        engine.adopt(&link);
        self.tether.hold_link(&link);
        Some(session(engine, &self.target, link, socket, until, up))
    }
}

/// One session, from handshake to end.
fn session(
    engine: Arc<Inner>,
    target: &Target,
    link: Arc<Link>,
    socket: TcpStream,
    until: Instant,
    up: Sender<Arc<PeerSession>>,
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
    let wanted = (target.engine.clone(), target.rank);
    let bringup = Bringup::client(target.role, address, wanted, until, up);
    let driver = Driver::new(engine, link, session, socket, target.name.clone(), bringup)?;
    Ok(driver.run(&[]))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::sync::{Condvar, Mutex, OnceLock, PoisonError};

    use super::*;
    use crate::config::PathKind;
    use crate::engine::panic_tests::{LONG, pair};

    /// What resolvers of the tests wait for.
    struct Count {
        now: Mutex<usize>,
        changed: Condvar,
    }

    impl Count {
        const fn new() -> Self {
            Self {
                now: Mutex::new(0),
                changed: Condvar::new(),
            }
        }

        fn add(&self) {
            *self.now.lock().unwrap_or_else(PoisonError::into_inner) += 1;
            self.changed.notify_all();
        }

        /// Whether it comes to `wanted` within `limit`.
        fn wait(&self, wanted: usize, limit: Duration) -> bool {
            let now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
            let (now, _) = self
                .changed
                .wait_timeout_while(now, limit, |now| *now < wanted)
                .unwrap_or_else(PoisonError::into_inner);
            *now >= wanted
        }
    }

    fn named(name: &str, resolver: Resolver) -> Target {
        Target {
            resolver,
            ..Target::address(name, Role::Engine)
        }
    }

    fn unknown(name: &str) -> Error {
        Error::Resolve {
            address: name.to_owned(),
            source: std::io::ErrorKind::NotFound.into(),
        }
    }

    /// What `act` gives, on another thread and in bounded time.
    fn bounded_time<R: Send + 'static>(act: impl FnOnce() -> R + Send + 'static) -> R {
        let (done, wait) = channel();
        std::thread::spawn(move || done.send(act()));
        wait.recv_timeout(LONG).expect("it ends")
    }

    /// No name is found before all are looked for.
    #[test]
    fn names_are_resolved_at_once() {
        static BEGUN: Count = Count::new();
        static THERE: OnceLock<SocketAddr> = OnceLock::new();
        fn together(name: &str, _: u16) -> Result<Vec<SocketAddr>, Error> {
            BEGUN.add();
            let there = THERE.get().filter(|_| BEGUN.wait(3, LONG / 4));
            Ok(vec![*there.ok_or_else(|| unknown(name))?])
        }
        let (_producer, consumer, _, address) = pair(PathKind::Arena);
        THERE.get_or_init(|| address.parse().expect("an address"));
        let names = ["a.test", "b.test:1", "c.test"];
        let targets = names.map(|name| named(name, together)).into();
        let error = connect_ranks(consumer.engine.inner(), targets, LONG).expect_err("one rank");
        // They have all been found and connected to: it is one rank by three names.
        assert!(matches!(error, Error::SameRank { .. }), "{error}");
    }

    /// A resolver that does not answer holds nobody: neither who connects, beyond the deadline or the
    /// failure of another rank, nor who drops the engine.
    #[test]
    fn a_name_that_is_not_resolved_in_time() {
        static BEGUN: Count = Count::new();
        static OVER: Count = Count::new();
        fn hangs(name: &str, _: u16) -> Result<Vec<SocketAddr>, Error> {
            BEGUN.add();
            OVER.wait(1, LONG * 4);
            Err(unknown(name))
        }
        fn fails_later(name: &str, _: u16) -> Result<Vec<SocketAddr>, Error> {
            BEGUN.wait(2, LONG);
            Err(unknown(name))
        }
        let (_producer, consumer, _, _) = pair(PathKind::Arena);
        let engine = Arc::clone(consumer.engine.inner());
        let error = bounded_time(move || {
            let target = named("hangs.test", hangs);
            connect(&engine, target, Duration::from_secs(1)).expect_err("no address")
        });
        let Error::Unreachable { address, source } = &error else {
            panic!("{error}");
        };
        assert_eq!(address, "hangs.test");
        assert_eq!(source.kind(), std::io::ErrorKind::TimedOut);
        assert_eq!(error.class(), crate::event::Class::Retry);

        let engine = Arc::clone(consumer.engine.inner());
        let error = bounded_time(move || {
            let targets = vec![named("hangs.test", hangs), named("fails.test", fails_later)];
            connect_ranks(&engine, targets, LONG * 20).expect_err("no address")
        });
        assert!(
            matches!(&error, Error::ConnectRank { address, .. } if address == "fails.test"),
            "{error}"
        );
        bounded_time(move || drop(consumer));
        assert!(!OVER.wait(1, Duration::ZERO), "the resolver hangs still");
        OVER.add();
    }
}
