//! The pinging side.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use kvxfer_verbs::{Context, DeviceAddr, GidChoice, Link as QpLink, QpEndpoint, RtrAttr, RtsAttr};

use super::kernel::{Poster, Turn};
use super::lane::{Lane, Parts};
use super::{Ping, Probe, WORD};
use crate::config::{Config, DEFAULT_PORT};
use crate::control::Control;
use crate::engine::{Dialler, net, random_nonce, session_config};
use crate::error::Error;
use crate::event::PeerName;
use crate::ids::{EngineId, Generation, Rank};
use crate::mem::gpu::Gpu;
use crate::session::{Event, Session};
use crate::transport::{
    BothBlocks, Choice, PathInfo, RdmaLink, Unregistered, gid_towards, open_device, retries,
    soft_path,
};
use crate::wire::{
    Blob, ConfigFacts, Describe, Fingerprint, KvRole, Message, PathKind, QpAnswer, QpOffer,
    RailDesc, RailEndpoint, Ready, Role, Secret, SessionId, StreamHalf, StreamKey,
};

/// An operation is polled for so long before its wait sleeps: most are over by then.
const SPIN: Duration = Duration::from_micros(100);
/// How often a kernel is looked at after that.
const KERNEL: Duration = Duration::from_micros(50);
/// An operation that fails because the peer has died fails before the connection's end is read:
/// how long that is waited for, to tell the cause and not its echo.
const ECHO: Duration = Duration::from_millis(300);
/// A stopped peer's memory can still be read: what a READ has when the control connection has used
/// up the time of a ping.
const READ_ANYWAY: Duration = Duration::from_millis(100);
/// The software device never gives an operation up: what is lost is told by the caller's wait, and a
/// peer that was stopped is met again when it goes on.
const SOFT_RTS: RtsAttr = RtsAttr {
    timeout: 0,
    retry_cnt: 7,
    rnr_retry: 7,
};

/// Who answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PingPeer {
    /// Its engine and rank.
    pub name: PeerName,
    /// This life of it.
    pub generation: Generation,
    /// What it does with KV blocks.
    pub kv_role: KvRole,
    /// Whether it runs on this host.
    pub same_host: bool,
    /// Whether both sides have proved that they know a shared secret.
    pub by_secret: bool,
}

/// A session with an engine, for pings. Dropping it ends the session.
#[derive(Debug)]
pub struct Pinger {
    // The queue pair goes before its device.
    lane: Lane,
    control: Control,
    peer: PingPeer,
    path: PathInfo,
    /// Makes the written values those of this session.
    salt: u64,
    sequence: u64,
    /// What the scratch holds, as far as is known; and what may be on its way there.
    holds: u64,
    written: Option<u64>,
    /// A kernel that posts the WRITEs, if one does.
    poster: Option<Poster>,
    _context: Context,
}

impl Pinger {
    /// Opens a session with the engine that listens at `address` (`HOST` or `HOST:PORT`), within
    /// `timeout`. Of the configuration it takes the secret, the paths that are allowed, and the
    /// heartbeat, after three times of whose timeout a silent peer is given up.
    ///
    /// # Errors
    ///
    /// [`Error::Config`], [`Error::Secret`]; [`Error::Resolve`], [`Error::Unreachable`] (nobody
    /// listens, or no answer), [`Error::Session`] (not kvxfer, another version, a wrong secret,
    /// silence, no room), [`Error::NotConnected`] (it said goodbye before the session stood);
    /// [`Error::NoPath`], [`Error::PathNotHere`] (this build has no such path);
    /// [`Error::Stream`], [`Error::StreamNotAuthentic`] (the data streams of soft TCP);
    /// [`Error::Memory`], [`Error::Verbs`].
    pub fn connect(config: &Config, address: &str, timeout: Duration) -> Result<Self, Error> {
        config.check()?;
        let until = net::after(timeout);
        let secret = match &config.secret_file {
            Some(file) => Some(Secret::from_file(file)?.secret),
            None => None,
        };
        let context = open_device(config)?;
        let addresses = net::resolve(address, DEFAULT_PORT)?;
        let socket = net::connect(address, &addresses, until, &net::NEVER)?;
        let to = socket.peer_addr().map_err(|source| Error::Unreachable {
            address: address.to_owned(),
            source,
        })?;
        let mut settings = session_config(config, secret, Role::Probe);
        let left = until.saturating_duration_since(Instant::now());
        settings.handshake_timeout = left;
        settings.establish_timeout = left;
        let session = Session::client(settings, random_nonce()?);
        let control = Control::new(session, socket, address.to_owned())?;
        Bringup {
            control,
            config,
            context,
            to,
            timeout,
            until,
            parts: None,
            session: None,
            peer: None,
            device: None,
            scratch: None,
            path: None,
            gid: None,
            lane: None,
        }
        .run()
    }

    /// Who answers.
    #[must_use]
    pub fn peer(&self) -> &PingPeer {
        &self.peer
    }

    /// The path of READs and WRITEs, and why this one.
    #[must_use]
    pub fn path(&self) -> &PathInfo {
        &self.path
    }

    /// Waits that are under way end as soon as this descriptor is readable (a signalfd, an
    /// eventfd): [`ping`](Self::ping) then returns `None`, [`idle`](Self::idle) at once.
    pub fn stop_on(&mut self, fd: OwnedFd) {
        self.control.stop_on(fd);
    }

    /// From now on a kernel of this GPU posts the WRITE of each ping, to a proxy queue, and waits for its end; this side
    /// carries the post out while it waits for the ping. A put by a kernel has nothing of its own to send here: the
    /// eight bytes are those of every ping.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn post_from(&mut self, gpu: &Gpu) -> Result<(), Error> {
        self.poster = Some(Poster::new(gpu)?);
        Ok(())
    }

    /// One ping, all of which is waited for at most `wait`; only a READ after a control connection
    /// that was silent for so long has up to a tenth of a second more. A part that does not come is
    /// [`Probe::Lost`], which is no error: the peer may only be stalled. `None`: stopped.
    ///
    /// # Errors
    ///
    /// The session is over ([`Error::Session`], [`Error::NotConnected`]), an operation failed
    /// ([`Error::PingFailed`]), or a READ brought another value than was written
    /// ([`Error::PingWrong`]). The pinger is of no use any more then.
    pub fn ping(&mut self, wait: Duration) -> Result<Option<Ping>, Error> {
        let until = net::after(wait);
        self.sequence += 1;
        let mut ping = Ping {
            sequence: self.sequence,
            control: Probe::NotTried,
            write: Probe::NotTried,
            read: Probe::NotTried,
        };
        ping.control = self.control_ping(until)?;
        if self.control.stopped() {
            return Ok(None);
        }
        if ping.control.time().is_some() && self.settled()? {
            ping.write = self.write(until)?;
        }
        if self.control.stopped() && ping.write == Probe::Lost {
            return Ok(None);
        }
        // What is posted behind an operation that is out would wait with it.
        if self.settled()? {
            let until = match ping.control {
                Probe::Lost => until + READ_ANYWAY,
                _ => until,
            };
            ping.read = self.read(until)?;
        }
        if self.control.stopped() && !ping.answered() {
            return Ok(None);
        }
        Ok(Some(ping))
    }

    /// Keeps the session alive until `until`.
    ///
    /// # Errors
    ///
    /// The session is over.
    pub fn idle(&mut self, until: Instant) -> Result<(), Error> {
        loop {
            self.control.turn();
            while self.control.event()?.is_some() {}
            if Instant::now() >= until || self.control.stopped() {
                return Ok(());
            }
            self.control.sleep(until, None);
        }
    }

    fn control_ping(&mut self, until: Instant) -> Result<Probe, Error> {
        // Whatever waits to be read is not to be counted into this ping.
        self.control.turn();
        while self.control.event()?.is_some() {}
        let Some(sent) = self.control.ping() else {
            // The peer does not read: nothing fits into its connection any more.
            return Ok(Probe::Lost);
        };
        loop {
            self.control.turn();
            while let Some(event) = self.control.event()? {
                if let Event::Pong {
                    sequence,
                    round_trip,
                } = event
                    && sequence == sent
                {
                    return Ok(Probe::Answered(round_trip));
                }
            }
            if Instant::now() >= until || self.control.stopped() {
                return Ok(Probe::Lost);
            }
            self.control.sleep(until, None);
        }
    }

    fn write(&mut self, until: Instant) -> Result<Probe, Error> {
        let value = splitmix(self.salt ^ self.sequence);
        let begun = Instant::now();
        self.written = Some(value);
        match &mut self.poster {
            Some(poster) => poster.launch()?,
            None => self.lane.write(value)?,
        }
        let probe = self.await_lane(begun, until)?;
        self.settled()?;
        Ok(probe)
    }

    fn read(&mut self, until: Instant) -> Result<Probe, Error> {
        let begun = Instant::now();
        self.lane.read()?;
        let probe = self.await_lane(begun, until)?;
        if probe.time().is_some() {
            let (wanted, got) = (self.holds, self.lane.value()?);
            if got != wanted {
                return Err(Error::PingWrong { wanted, got });
            }
        }
        Ok(probe)
    }

    /// Whether nothing is out; notes what a WRITE that is over has written.
    fn settled(&mut self) -> Result<bool, Error> {
        if !self.lane_idle()? {
            return Ok(false);
        }
        if let Some(value) = self.written.take() {
            self.holds = value;
        }
        Ok(true)
    }

    fn await_lane(&mut self, begun: Instant, until: Instant) -> Result<Probe, Error> {
        loop {
            if self.lane_idle()? {
                return Ok(Probe::Answered(begun.elapsed()));
            }
            // Nobody tells of a kernel: it is looked at.
            let looks = self.poster.is_some() && self.written.is_some();
            if begun.elapsed() < SPIN {
                std::hint::spin_loop();
                continue;
            }
            self.control.turn();
            while self.control.event()?.is_some() {}
            if Instant::now() >= until || self.control.stopped() {
                return Ok(Probe::Lost);
            }
            if looks {
                self.control.sleep(until.min(Instant::now() + KERNEL), None);
            } else if self.lane.arm()? {
                self.control.sleep(until, Some(self.lane.fd()));
            }
        }
    }

    /// Whether nothing is out, of a kernel either.
    fn lane_idle(&mut self) -> Result<bool, Error> {
        let is_idle = self.lane_is_idle()?;
        let Some(poster) = &mut self.poster else {
            return Ok(is_idle);
        };
        match poster.turn(is_idle)? {
            Turn::Over => Ok(is_idle),
            Turn::Under => Ok(false),
            Turn::Posted => {
                // One is posted for each value.
                if let Some(value) = self.written {
                    self.lane.write(value)?;
                }
                Ok(false)
            }
        }
    }

    fn lane_is_idle(&mut self) -> Result<bool, Error> {
        match self.lane.is_idle() {
            Err(error @ Error::PingFailed { .. }) => {
                // Rather the session's end, if that is why.
                self.idle(Instant::now() + ECHO)?;
                Err(error)
            }
            looked => looked,
        }
    }
}

impl Drop for Pinger {
    fn drop(&mut self) {
        self.control.close();
    }
}

/// A session on its way up.
struct Bringup<'a> {
    control: Control,
    config: &'a Config,
    context: Context,
    to: SocketAddr,
    timeout: Duration,
    until: Instant,
    parts: Option<Parts>,
    session: Option<(SessionId, StreamKey, bool)>,
    peer: Option<PingPeer>,
    device: Option<DeviceAddr>,
    scratch: Option<crate::wire::RemoteSpan>,
    path: Option<PathInfo>,
    gid: Option<GidChoice>,
    lane: Option<Lane>,
}

impl Bringup<'_> {
    fn run(mut self) -> Result<Pinger, Error> {
        loop {
            self.control.turn();
            while let Some(event) = self.control.event()? {
                if matches!(event, Event::Established) {
                    return self.established();
                }
                self.event(event)?;
            }
            // The session's own limit begins anew when the peer is authenticated.
            if Instant::now() >= self.until {
                return Err(self.control.late(self.timeout));
            }
            self.control.sleep(self.until, None);
        }
    }

    fn event(&mut self, event: Event) -> Result<(), Error> {
        match event {
            Event::Authenticated { by_secret, .. } => {
                let session = self.control.session();
                if let (Some(id), Some(key)) = (session.session_id(), session.stream_key()) {
                    self.session = Some((id, key, by_secret));
                }
                let describe = describe(&self.context)?;
                self.control.send(&describe.into())
            }
            Event::PeerDescribed(describe) => self.described(*describe),
            Event::QpAnswer(answer) => self.answered(&answer),
            _ => Ok(()),
        }
    }

    fn described(&mut self, describe: Describe) -> Result<(), Error> {
        let Some(rail) = describe.rails.first() else {
            return Err(self.control.cut_off("no device for a ping"));
        };
        let device: DeviceAddr = match rail.device.unpack("device address") {
            Ok(device) => device,
            Err(error) => return Err(self.control.cut_off(&error.to_string())),
        };
        let scratch = rail.scratch.filter(|s| s.contains(0, WORD.into()));
        if scratch.is_none() {
            return Err(self.control.cut_off("no scratch region for a ping"));
        }
        self.control.session().accept();
        let path = Choice {
            context: &self.context,
            peer: &device,
            others: &[],
            local_shareable: true,
            peer_shareable: describe.fd_backed,
            blocks: BothBlocks::ON_HOSTS,
            unregistered: Unregistered::default(),
            unreachable: None,
            declined: None,
            unstaged: None,
            allowed: &self.config.path,
        }
        .choose()?;
        let gid = gid_towards(&self.context, &device.gids)?;
        let parts = self.parts.insert(Parts::new(&self.context, gid.as_ref())?);
        let offer = QpOffer {
            offer: 1,
            replaces: None,
            path: path.path,
            candidates: path.candidates.clone(),
            endpoints: vec![RailEndpoint::first(Blob::pack(
                "endpoint",
                &parts.qp.endpoint(),
            )?)],
        };
        self.path = Some(path);
        self.gid = gid;
        self.scratch = scratch;
        self.peer = Some(PingPeer {
            name: PeerName {
                engine: describe.engine,
                rank: describe.rank,
            },
            generation: describe.generation,
            kv_role: describe.kv_role,
            same_host: self.context.shares_host(&device),
            by_secret: self.session.as_ref().is_some_and(|(_, _, by)| *by),
        });
        self.device = Some(device);
        self.control.send(&offer.into())
    }

    fn answered(&mut self, answer: &QpAnswer) -> Result<(), Error> {
        let (Some(path), Some(endpoint)) = (answer.path, answer.endpoints.first()) else {
            return Err(Error::NoPath {
                forced: self.config.path.forced(),
                candidates: answer.candidates.clone(),
            });
        };
        let remote: QpEndpoint = match endpoint.endpoint.unpack("endpoint") {
            Ok(remote) => remote,
            Err(error) => return Err(self.control.cut_off(&error.to_string())),
        };
        if self.path.as_ref().map(|chosen| chosen.path) != Some(path) {
            return Err(self.control.cut_off("another path than the one offered"));
        }
        let (Some(parts), Some(scratch), Some(device)) =
            (self.parts.take(), self.scratch, self.device.clone())
        else {
            return Err(Error::ShuttingDown);
        };
        let link = match soft_path(path) {
            Some(path) => QpLink::SoftDial {
                peer: device,
                path,
                deadline: self.until,
            },
            None if path == PathKind::Tcp => self.dial()?,
            None if path == PathKind::Rdma => QpLink::Rdma,
            None => return Err(Error::PathNotHere { path }),
        };
        if let Some(path) = &mut self.path {
            let pairs = [(parts.qp.endpoint(), remote)];
            let link = RdmaLink::new(&self.context, self.gid.as_ref(), &pairs);
            path.rails = link.into_iter().collect();
        }
        let attr = RtrAttr {
            remote,
            link,
            min_rnr_timer: 12,
        };
        let retries = match path {
            // Nothing that is lost comes again there without a limit.
            PathKind::Rdma => retries(true, self.config),
            _ => SOFT_RTS,
        };
        self.lane = Some(parts.joined(scratch, |qp| Ok(qp.rtr(attr)?.rts(retries)?))?);
        self.control.send(&Message::Ready(Ready {}))
    }

    /// The two data streams of soft TCP.
    fn dial(&self) -> Result<QpLink, Error> {
        let Some((session, key, _)) = &self.session else {
            return Err(Error::ShuttingDown);
        };
        let dialler = Dialler {
            address: self.to,
            session: *session,
            key,
            deadline: self.until,
            stop: &net::NEVER,
        };
        Ok(QpLink::SoftTcp {
            requester: dialler.dial(0, StreamHalf::Requester, 0)?,
            responder: dialler.dial(0, StreamHalf::Responder, 1)?,
        })
    }

    fn established(self) -> Result<Pinger, Error> {
        let (Some(lane), Some(peer), Some(path)) = (self.lane, self.peer, self.path) else {
            return Err(Error::ShuttingDown);
        };
        let mut salt = [0; 8];
        getrandom::fill(&mut salt).map_err(Error::random)?;
        Ok(Pinger {
            lane,
            control: self.control,
            peer,
            path,
            salt: u64::from_le_bytes(salt),
            sequence: 0,
            // A scratch region begins as zeros.
            holds: 0,
            written: None,
            poster: None,
            _context: self.context,
        })
    }
}

/// What the pinged side is told: a name, and the device that the path depends on.
fn describe(context: &Context) -> Result<Describe, Error> {
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(Error::random)?;
    let generation = Generation(random);
    let device = context.device();
    Ok(Describe {
        engine: EngineId(format!("ping-{generation}").into()),
        generation,
        rank: Rank::default(),
        kv_role: KvRole::Both,
        wanted: None,
        fingerprint: Fingerprint([0; 32]),
        format: Blob(Vec::new()),
        placement: Blob(Vec::new()),
        rails: vec![RailDesc {
            place: 0,
            device: Blob::pack("device address", &context.address())?,
            memories: Vec::new(),
            leases: None,
            scratch: None,
            staging: None,
        }],
        facts: ConfigFacts {
            qp_per_transfer: 1,
            max_send_wr: 1,
            max_msg_sge: 1,
            max_msg_bytes: device.max_msg_sz,
            enable_notification: false,
            num_worker_threads: 0,
            listen_port: 0,
        },
        fd_backed: true,
        gpu: None,
        shared: None,
    })
}

/// SplitMix64's output function.
fn splitmix(seed: u64) -> u64 {
    let mut x = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::BenchSide;
    use crate::config::PathSet;
    use crate::engine::Engine;
    use crate::ping::side;
    use crate::wire::RemoteSpan;

    const LONG: Duration = Duration::from_secs(60);

    fn pinged(path: PathKind) -> (Engine, BenchSide, Pinger) {
        let side = side();
        let config = Config {
            path: PathSet::only(path),
            ..Config::default()
        };
        let (format, placement) = (side.format().clone(), side.placement().clone());
        let engine = Engine::new(config.clone(), format, placement).expect("an engine");
        let address = engine.listen("127.0.0.1:0").expect("a free port");
        let pinger = Pinger::connect(&config, &address.to_string(), LONG);
        (engine, side, pinger.expect("a session"))
    }

    /// Aims a pinger at an engine's KV memory or lease slots, with the right keys.
    fn aimed(path: PathKind, pick: impl Fn(&RailDesc) -> RemoteSpan, write: bool) {
        let (engine, side, mut pinger) = pinged(path);
        side.poison().expect("poisoned");
        assert!(pinger.ping(LONG).expect("answered").is_some());
        let rails = engine.inner().describe(&[0]).expect("described").rails;
        pinger.lane.aim(pick(rails.first().expect("a rail")));
        let error = if write {
            pinger.write(net::after(LONG))
        } else {
            pinger.read(net::after(LONG))
        };
        let error = error.expect_err("not its memory");
        let refused = kvxfer_verbs::WcStatus::RemAccess;
        assert!(
            matches!(error, Error::PingFailed { status, .. } if status == refused),
            "{path}: {error}"
        );
        let memory = side.memory().first().expect("one memory");
        memory
            .verify_words(0, memory.len(), |_| 0xa5a5_a5a5_a5a5_a5a5)
            .expect("untouched");
    }

    #[test]
    fn a_pingers_queue_pair_reaches_neither_kv_memory_nor_leases() {
        for path in [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp] {
            for write in [false, true] {
                aimed(path, |d| *d.memories.first().expect("KV memory"), write);
                aimed(path, |d| d.leases.expect("lease slots"), write);
            }
        }
    }

    #[test]
    fn one_limit_for_connecting_also_when_it_passes_behind_the_handshake() {
        use std::io::Read as _;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        let limit = Duration::from_secs(2);
        // Proves who it is after half of the time, and then says nothing.
        let server = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().expect("a client");
            let settings = session_config(&Config::default(), None, Role::Engine);
            let nonce = random_nonce().expect("random");
            let mut session = Session::server(settings, nonce);
            std::thread::sleep(limit / 2);
            session.start(crate::time::Time(0));
            let mut bytes = [0; 4096];
            loop {
                let n = socket.read(&mut bytes).unwrap_or(0);
                if n == 0 {
                    return session.state();
                }
                session.on_bytes(crate::time::Time(1), &bytes[..n]);
                let out = session.transmit().to_vec();
                std::io::Write::write_all(&mut socket, &out).expect("written");
                session.transmitted(out.len());
            }
        });
        let begun = Instant::now();
        let error = Pinger::connect(&Config::default(), &address, limit).expect_err("silence");
        // Half of the time more than this, if each stage had a limit of its own.
        assert!(
            begun.elapsed() < limit + limit * 3 / 4,
            "{:?}",
            begun.elapsed()
        );
        let Error::Session { source, .. } = &error else {
            panic!("{error}");
        };
        assert!(
            matches!(source, crate::session::SessionError::EstablishTimeout { after, .. } if *after == limit),
            "{error}"
        );
        server.join().expect("the server");
    }

    #[test]
    fn a_value_that_is_not_what_was_written_is_told() {
        let (_engine, _side, mut pinger) = pinged(PathKind::Arena);
        assert!(pinger.ping(LONG).expect("answered").is_some());
        assert!(
            pinger
                .read(net::after(LONG))
                .expect("as written")
                .time()
                .is_some()
        );
        pinger.holds ^= 1;
        let error = pinger.read(net::after(LONG)).expect_err("another value");
        assert!(matches!(error, Error::PingWrong { wanted, got } if wanted == got ^ 1));
    }
}
