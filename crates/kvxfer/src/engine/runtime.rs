//! What all engines of a process share with each other: the device, the workers, the listening
//! port. An engine and the engines of its bandwidth-test clients stand on one runtime.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use tracing::{info, warn};

use kvxfer_verbs::{DeviceInfo, GidChoice, InitAttr, QpCaps, RtsAttr};

use super::accept::{Arrivals, accept};
use super::health::Health;
use super::lanes::Made;
use super::link::Link;
use super::net;
use super::notices::{Inbox, Outbox, RECEIVES};
use super::peer_session::PeerSession;
use super::rail::Rail;
use super::verify::Verifier;
use super::worker::{Command, Joined, Live, Seat, Worker, WorkerHandle};
use crate::config::Config;
use crate::engine::{Clock, Inner};
use crate::error::Error;
use crate::session::SessionConfig;
use crate::transfer::{BatchSize, PeerKey, SchedulerConfig, TransfersConfig};
use crate::transport::{Opened, SkippedRail, goes_over, retries};
use crate::wire::{
    HandshakeNonce, PathKind, Role, STREAM_ANSWER_LEN, STREAM_OPENING_LEN, Secret, SessionId,
    StreamGate, StreamOpening,
};

/// Send queue entries where the configuration says auto.
const AUTO_SEND_WR: u32 = 1024;
/// What queue pairs that are taken down have to let go of their work at least: devices take their time.
const LEAST_RESET: Duration = Duration::from_secs(1);
/// Entries of a completion queue for what is posted, unless set.
const AUTO_CQ_ENTRIES: u32 = 1 << 16;
/// So many queue pairs' receives find room in a completion queue at least, where the device has it.
const LEAST_RECEIVING: u32 = 64;
/// Gather entries where the configuration says auto; more is rarely merged.
const AUTO_SGE: u32 = 4;
/// How often the listener looks whether it is to stop.
const ACCEPT_NAP: Duration = Duration::from_millis(250);

/// Where the data streams of a session are taken in.
#[derive(Debug)]
struct Door {
    gate: StreamGate,
    link: Arc<Link>,
}

#[derive(Debug)]
struct Listener {
    address: SocketAddr,
    thread: JoinHandle<()>,
}

#[derive(Debug)]
pub(crate) struct Runtime {
    /// In the order of the configuration; never empty.
    rails: Vec<Rail>,
    pub(crate) skipped: Vec<SkippedRail>,
    workers: Vec<WorkerHandle>,
    threads: Mutex<Vec<JoinHandle<Vec<Live>>>>,
    pub(crate) clock: Clock,
    pub(crate) health: Arc<Health>,
    pub(crate) secret: Option<Secret>,
    config: Config,
    send_wr: u32,
    ids: AtomicU64,
    doors: Mutex<HashMap<SessionId, Door>>,
    listener: Mutex<Option<Listener>>,
    /// Set when the engine goes; what waits for the network looks at it.
    pub(crate) stopping: AtomicBool,
    /// Closed at the same time, for what waits on channels.
    pub(crate) stopped: Receiver<()>,
    stop: Mutex<Option<Sender<()>>>,
    /// The threads of control connections, and that of checksums.
    links: Mutex<Vec<JoinHandle<()>>>,
    /// Bytes that bandwidth tests of peers have made this process allocate.
    pub(crate) bench_bytes: AtomicU64,
    /// Pingers that are served.
    pub(crate) pingers: AtomicUsize,
    pub(crate) arrivals: Arrivals,
    pub(crate) verifier: Verifier,
    /// Accepted connections that are open.
    pub(crate) connections: AtomicUsize,
}

/// The depth of a completion queue of a device that takes `max`, and how many of its entries are for what is posted to
/// peers. The rest is for receives, which take room there for as long as their queue pair lives: with too little of it
/// a peer's queue pair could not be made, or what is posted find no room that was counted on.
fn cq_entries(wanted: u32, max: u32) -> (u32, u32) {
    let work = match wanted {
        0 => AUTO_CQ_ENTRIES.min(max),
        wanted => wanted,
    };
    let receives = (work / 8).max(LEAST_RECEIVING * RECEIVES).min(max / 2);
    // More than the device takes is for the device to refuse.
    let depth = work.saturating_add(receives).min(max).max(work);
    (depth, work.min(depth.saturating_sub(receives)).max(1))
}

impl Runtime {
    pub(crate) fn new(config: &Config, opened: Opened) -> Result<Arc<Self>, Error> {
        let secret = match &config.secret_file {
            Some(path) => {
                let loaded = Secret::from_file(path)?;
                for warning in &loaded.warnings {
                    warn!(%warning, "secret");
                }
                Some(loaded.secret)
            }
            None => None,
        };
        let Opened { contexts, skipped } = opened;
        let least = |of: fn(&DeviceInfo) -> u32| {
            let of = contexts.iter().map(|(_, context)| of(context.device()));
            of.min().unwrap_or(0)
        };
        let auto = |value: u32, auto: u32, max: u32| if value == 0 { auto.min(max) } else { value };
        let send_wr = auto(config.max_send_wr, AUTO_SEND_WR, least(|d| d.max_qp_wr));
        let (depth, work) = cq_entries(config.max_cqe_num, least(|d| d.max_cqe));
        let clock = Clock::new();
        let health = Arc::new(Health::new(contexts.len()));
        let count = u16::try_from(config.num_worker_threads).unwrap_or(u16::MAX);
        let seats = (0..count)
            .map(|index| Seat::new(index, clock))
            .collect::<Result<Vec<_>, _>>()?;
        let workers: Vec<WorkerHandle> = seats.iter().map(|seat| seat.handle.clone()).collect();
        let rails = contexts
            .into_iter()
            .map(|of| Rail::new(of, clock, &health, (count, depth)))
            .collect::<Result<Vec<_>, _>>()?;
        let mut threads = Vec::new();
        for (index, seat) in (0..count).zip(seats) {
            let scheduler = SchedulerConfig {
                batch: config
                    .fixed_batch_size()
                    .map_or(BatchSize::Auto, BatchSize::Fixed),
                // The share of this worker: each keeps its own count.
                peer_bytes: (config.max_inflight_bytes.0 / u64::from(count)).max(1),
                // It is counted as if all rails had one queue: each has its own, so there is always room.
                cq_entries: work,
                ..SchedulerConfig::default()
            };
            let transfers = TransfersConfig {
                owner: index,
                drain_grace: config.drain_grace,
                reset_grace: config.drain_grace.max(LEAST_RESET),
                ..TransfersConfig::default()
            };
            let worker = Worker::new(
                seat,
                &rails,
                Arc::clone(&health),
                workers.clone(),
                Outbox::new(rails.iter().map(|rail| &rail.pd))?,
                scheduler,
                transfers,
            );
            threads.push(spawn("kvx-worker", move || worker.run())?);
        }
        let (stop, stopped) = bounded(0);
        Ok(Arc::new(Self {
            rails,
            skipped,
            workers,
            threads: Mutex::new(threads),
            clock,
            health,
            secret,
            config: config.clone(),
            send_wr,
            ids: AtomicU64::new(1),
            doors: Mutex::default(),
            listener: Mutex::default(),
            stopping: AtomicBool::new(false),
            stopped,
            stop: Mutex::new(Some(stop)),
            links: Mutex::default(),
            bench_bytes: AtomicU64::new(0),
            pingers: AtomicUsize::new(0),
            arrivals: Arrivals::default(),
            verifier: Verifier::default(),
            connections: AtomicUsize::new(0),
        }))
    }

    pub(crate) fn rails(&self) -> &[Rail] {
        &self.rails
    }

    /// # Errors
    ///
    /// [`Error::ShuttingDown`] where there is no such rail.
    pub(crate) fn rail(&self, at: usize) -> Result<&Rail, Error> {
        self.rails.get(at).ok_or(Error::ShuttingDown)
    }

    /// Whether the rails are RDMA devices: all are, or none is.
    pub(crate) fn is_rdma(&self) -> bool {
        (self.rails.first()).is_some_and(|rail| goes_over(PathKind::Rdma, &rail.context))
    }

    /// The rails that a session can be set up over now: devices that have not failed, and of those the
    /// ones whose port is not down, unless all are.
    pub(crate) fn rails_that_work(&self) -> Vec<usize> {
        let rails = self.rails.iter().enumerate();
        let live = rails.filter(|(_, rail)| !rail.events.is_over());
        let (up, down): (Vec<_>, Vec<_>) = live.partition(|(_, rail)| rail.events.port_is_up());
        let rails = if up.is_empty() { down } else { up };
        rails.into_iter().map(|(at, _)| at).collect()
    }

    pub(crate) fn workers(&self) -> &[WorkerHandle] {
        &self.workers
    }

    /// A number that is unique in this process's runtime.
    pub(crate) fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn send_wr(&self) -> u32 {
        self.send_wr
    }

    pub(crate) fn max_msg_bytes(&self) -> u64 {
        let devices = self.rails.iter().map(|rail| rail.context.device());
        let each = devices.map(|device| device.best_msg_sz.min(device.max_msg_sz));
        each.min().unwrap_or(0)
    }

    /// How its queue pairs try again.
    pub(crate) fn retries(&self) -> RtsAttr {
        retries(self.is_rdma(), &self.config)
    }

    pub(crate) fn max_sge(&self) -> u32 {
        let devices = self.rails.iter().map(|rail| rail.context.device());
        let each = devices.map(|device| device.max_sge.min(device.max_sge_rd));
        let max = each.min().unwrap_or(0);
        match self.config.max_msg_sge {
            0 => AUTO_SGE.min(max),
            asked => asked.min(max),
        }
    }

    pub(crate) fn worker(&self, index: u16) -> Option<&WorkerHandle> {
        self.workers.get(usize::from(index))
    }

    /// Which worker gets which of a peer's queue pairs of one rail. It is the same for all rails, so that
    /// whoever has lanes to a peer has some on each.
    pub(crate) fn spread(&self, key: PeerKey, lanes: usize) -> Vec<u16> {
        let count = self.workers.len().max(1) as u64;
        (0..lanes as u64)
            .map(|lane| u16::try_from((key.0 + lane) % count).unwrap_or(0))
            .collect()
    }

    /// Queue pairs of a rail in INIT, the i-th completing at the i-th worker of the spread that the
    /// peer's key will give; with receives where the peer sends notices, and the GID of an RDMA device.
    pub(crate) fn queue_pairs(
        &self,
        engine: &Inner,
        (at, gid): (usize, Option<&GidChoice>),
        key: PeerKey,
        count: u32,
        notices: bool,
    ) -> Result<Vec<Made>, Error> {
        let workers = self.spread(key, count as usize).into_iter();
        let rail = (at, gid);
        workers
            .map(|worker| self.queue_pair(engine, rail, worker, notices))
            .collect()
    }

    /// One queue pair of a rail in INIT, which completes at a worker.
    pub(crate) fn queue_pair(
        &self,
        engine: &Inner,
        (at, gid): (usize, Option<&GidChoice>),
        worker: u16,
        notices: bool,
    ) -> Result<Made, Error> {
        let rail = self.rails.get(at).ok_or(Error::ShuttingDown)?;
        let caps = QpCaps {
            max_send_wr: self.send_wr,
            max_recv_wr: RECEIVES,
            max_send_sge: self.max_sge(),
            max_recv_sge: 1,
        };
        let mut attr = InitAttr::new(engine.remote_access());
        attr.gid_index = gid.map(|gid| gid.index);
        let cq = rail.events.cq(worker).ok_or(Error::ShuttingDown)?;
        let qp = rail.pd.create_qp(caps, &cq.cq, &cq.cq)?;
        let watched = rail.events.watch(qp.qp_num(), &cq);
        let qp = qp.init(attr)?;
        let inbox = if notices {
            Some(Inbox::new(&rail.pd, &qp)?)
        } else {
            None
        };
        Ok(Made {
            rail: at,
            worker,
            qp,
            inbox,
            watched,
        })
    }

    pub(crate) fn add_lanes(&self, peer: &Arc<PeerSession>, lanes: Vec<Joined>) {
        for lane in lanes {
            if let Some(worker) = self.worker(lane.worker) {
                let (peer, lane) = (Arc::clone(peer), Box::new(lane));
                worker.send(Command::AddLane {
                    peer,
                    lane,
                    send_wr: self.send_wr,
                });
            }
        }
    }

    // ---- sessions ----------------------------------------------------------------------------

    pub(crate) fn session_config(&self, role: Role) -> SessionConfig {
        session_config(&self.config, self.secret.clone(), role)
    }

    pub(crate) fn open_door(&self, session: SessionId, gate: StreamGate, link: Arc<Link>) {
        let mut doors = self.doors.lock().unwrap_or_else(PoisonError::into_inner);
        doors.insert(session, Door { gate, link });
    }

    pub(crate) fn close_door(&self, session: &SessionId) {
        self.doors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(session);
    }

    /// Checks the beginning of a data stream. Gives what it is for, what to answer, and whose it is;
    /// nothing if it is not of a session that stands.
    pub(crate) fn admit(
        &self,
        opening: &StreamOpening,
        bytes: &[u8; STREAM_OPENING_LEN],
    ) -> Option<(StreamOpening, [u8; STREAM_ANSWER_LEN], Arc<Link>)> {
        let mut doors = self.doors.lock().unwrap_or_else(PoisonError::into_inner);
        let door = doors.get_mut(&opening.session)?;
        let (opening, answer) = door.gate.admit(bytes).ok()?;
        Some((opening, answer, Arc::clone(&door.link)))
    }

    /// Starts the thread of a control connection, or another that ends with the engine.
    pub(crate) fn spawn_link(
        &self,
        name: &'static str,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<(), Error> {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock: what is started here is waited for.
        if self.stopping.load(Ordering::Acquire) {
            return Err(Error::ShuttingDown);
        }
        links.retain(|thread| !thread.is_finished());
        links.push(spawn(name, body)?);
        Ok(())
    }

    /// Listens, for sessions and for their data streams.
    pub(crate) fn listen(
        self: &Arc<Self>,
        engine: &Arc<Inner>,
        name: &str,
        port: u16,
    ) -> Result<SocketAddr, Error> {
        let mut place = self.listener.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(listener) = &*place {
            return Err(Error::Listening {
                address: listener.address,
            });
        }
        let addresses = net::resolve(name, port)?;
        if self.secret.is_none()
            && !self.config.allow_unauthenticated
            && let Some(&address) = addresses.iter().find(|a| !a.ip().is_loopback())
        {
            return Err(Error::Unauthenticated { address });
        }
        let failed = |source| Error::Listen {
            address: name.to_owned(),
            source,
        };
        let socket = net::listen(name, &addresses)?;
        let address = socket.local_addr().map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        let (runtime, engine) = (Arc::clone(self), Arc::downgrade(engine));
        let thread = spawn("kvx-listen", move || {
            while !runtime.stopping.load(Ordering::Acquire) {
                let Some(engine) = engine.upgrade() else {
                    return;
                };
                accept(&runtime, &engine, &socket);
                drop(engine);
                net::wait_readable(&socket, ACCEPT_NAP);
            }
        })?;
        info!(%address, "listening");
        *place = Some(Listener { address, thread });
        Ok(address)
    }

    pub(crate) fn listens_on(&self) -> Option<SocketAddr> {
        let place = self.listener.lock().unwrap_or_else(PoisonError::into_inner);
        place.as_ref().map(|listener| listener.address)
    }

    /// Ends the threads, and waits for them: what they hold, registered memory too, is let go of
    /// when this returns. The engines have been told before.
    pub(crate) fn shut_down(&self) {
        self.stopping.store(true, Ordering::Release);
        self.stop
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        for worker in &self.workers {
            worker.send(Command::Shutdown);
        }
        let listener = self
            .listener
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let workers =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        let mut left = Vec::new();
        for worker in workers {
            left.extend(join(worker));
        }
        // What never ended ends here: with the last worker, nothing touches memory any more.
        drop(left);
        if let Some(listener) = listener {
            join(listener.thread);
        }
        // None is started any more.
        let links = std::mem::take(&mut *self.links.lock().unwrap_or_else(PoisonError::into_inner));
        for link in links {
            join(link);
        }
    }
}

/// The settings of a session under this configuration.
pub(crate) fn session_config(config: &Config, secret: Option<Secret>, role: Role) -> SessionConfig {
    SessionConfig {
        secret,
        role,
        allow_bench: config.allow_bench,
        handshake_timeout: config.connect_timeout,
        establish_timeout: config.connect_timeout.max(Duration::from_secs(10)),
        heartbeat_interval: config.heartbeat_interval,
        stall_after: config.heartbeat_timeout,
        dead_after: config.heartbeat_timeout * 3,
        ..SessionConfig::default()
    }
}

/// Waits for a thread; not for this one: the last handle of an engine may be dropped on a thread of
/// its own.
fn join<R>(thread: JoinHandle<R>) -> Option<R> {
    if thread.thread().id() == std::thread::current().id() {
        return None;
    }
    let result = thread.join();
    if result.is_err() {
        warn!("a thread of the engine had panicked");
    }
    result.ok()
}

pub(crate) fn spawn<R: Send + 'static>(
    name: &'static str,
    body: impl FnOnce() -> R + Send + 'static,
) -> Result<JoinHandle<R>, Error> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map_err(|source| Error::Spawn { name, source })
}

pub(crate) fn random_nonce() -> Result<HandshakeNonce, Error> {
    HandshakeNonce::random().map_err(Error::random)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completion_queues_have_room_for_receives_beside_what_is_posted() {
        let receives = LEAST_RECEIVING * RECEIVES;
        for (wanted, max, all, work) in [
            (0, 1 << 20, (1 << 16) + (1 << 13), 1 << 16),
            // rxe takes no more.
            (0, 32_767, 32_767, 32_767 - 32_767 / 8),
            (1, 1 << 20, 1 + receives, 1),
            (64, 1 << 20, 64 + receives, 64),
            (64, 1000, 564, 64),
            (1 << 16, 1 << 16, 1 << 16, (1 << 16) - (1 << 13)),
            // The device says that this is too much.
            (200, 100, 200, 150),
        ] {
            assert_eq!(cq_entries(wanted, max), (all, work), "{wanted} of {max}");
        }
    }
}
