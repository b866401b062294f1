//! The responder thread: it takes connections on the context's Unix socket and serves all
//! responder halves, one slice each in turn. Idle, it sleeps.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::PollTimeout;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EfdFlags;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, listen, socket,
};

use crate::SoftPath;
use crate::device::AsyncEvent;
use crate::error::{Error, os};
use crate::soft::context::{SoftShared, key_fd};
use crate::soft::frame::{HELLO, Hello, Role};
use crate::soft::injector::Planned;
use crate::soft::link::path_of;
use crate::soft::link::{Incoming, answer};
use crate::soft::process_vm::PeerProcess;
use crate::soft::qp::SoftQp;
use crate::soft::responder::Next;
use crate::soft::stream::{Stream, not_now};
use crate::sync::{EventFd, Mutex, lock};

/// Bytes one half may move before the next one's turn.
const TURN: u64 = 1 << 20;
/// Connections taken before peers that are served already have their turn.
const ACCEPTS: usize = 64;
/// Streams that have been accepted and have not said what they are for.
const MAX_OPENING: usize = 256;
const OPENING_TIME: Duration = Duration::from_secs(5);

const LISTENER: u64 = 0;
const MAILBOX: u64 = 1;
const FIRST: u64 = 2;

#[derive(Debug)]
pub(crate) enum Command {
    /// Begin to serve this queue pair's responder half.
    Serve(Arc<SoftQp>),
    /// A receive was posted, or the half was stopped.
    Run(u32),
    /// Tell an event at that time.
    Tell(Instant, AsyncEvent),
    Stop,
}

/// How other threads talk to the responder thread.
#[derive(Debug)]
pub(crate) struct Mailbox {
    commands: Mutex<Vec<Command>>,
    event: EventFd,
}

impl Mailbox {
    pub(crate) fn new() -> Result<Self, Error> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let event = event.map_err(|e| os("eventfd")(e.into()))?;
        Ok(Self {
            commands: Mutex::default(),
            event,
        })
    }

    pub(crate) fn send(&self, command: Command) {
        lock(&self.commands).push(command);
        // Fails only when the counter is full, and then it is readable already.
        let _ = self.event.write(1);
    }

    /// Everything that was sent. The event first: what is sent in between makes it readable again.
    fn take(&self) -> Vec<Command> {
        let _ = self.event.read();
        std::mem::take(&mut *lock(&self.commands))
    }
}

struct Opening {
    stream: Stream,
    process: PeerProcess,
    buf: [u8; HELLO],
    got: usize,
    fds: VecDeque<OwnedFd>,
    since: Instant,
    /// A probe that has its answer and is still named as this process's reader, to try it.
    answered: bool,
}

struct Half {
    qp: Arc<SoftQp>,
    queued: bool,
    at: Option<Instant>,
}

struct Server {
    shared: Arc<SoftShared>,
    epoll: Epoll,
    listener: OwnedFd,
    opening: HashMap<u64, Opening>,
    halves: HashMap<u64, Half>,
    /// Halves with work, in turn.
    ready: VecDeque<u64>,
    next_id: u64,
    /// What a fault plan has for the device, soonest first.
    timeline: VecDeque<(Instant, Planned)>,
}

fn nix_os(op: &'static str) -> impl Fn(nix::Error) -> Error {
    move |e| Error::Os {
        op,
        source: e.into(),
    }
}

/// Binds the socket and starts the thread.
pub(crate) fn start(shared: Arc<SoftShared>) -> Result<JoinHandle<()>, Error> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener =
        socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(nix_os("socket"))?;
    let addr = UnixAddr::new_abstract(shared.address.name.as_bytes()).map_err(nix_os("bind"))?;
    bind(listener.as_raw_fd(), &addr).map_err(nix_os("bind"))?;
    listen(&listener, Backlog::MAXCONN).map_err(nix_os("listen"))?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(nix_os("epoll_create1"))?;
    let readable = |id| EpollEvent::new(EpollFlags::EPOLLIN, id);
    epoll
        .add(&listener, readable(LISTENER))
        .map_err(nix_os("epoll_ctl"))?;
    epoll
        .add(&shared.mailbox.event, readable(MAILBOX))
        .map_err(nix_os("epoll_ctl"))?;
    let timeline = shared.faults.as_ref().map(|f| f.timeline());
    let server = Server {
        timeline: timeline.unwrap_or_default(),
        shared,
        epoll,
        listener,
        opening: HashMap::new(),
        halves: HashMap::new(),
        ready: VecDeque::new(),
        next_id: FIRST,
    };
    std::thread::Builder::new()
        .name("kvxfer-soft".to_owned())
        .spawn(move || server.run())
        .map_err(os("spawn the responder thread"))
}

impl Server {
    fn run(mut self) {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            let n = match self.epoll.wait(&mut events, self.timeout()) {
                Ok(n) => n,
                Err(nix::Error::EINTR) => 0,
                Err(e) => {
                    tracing::error!(error = %e, "the responder thread ends: epoll_wait");
                    return;
                }
            };
            for event in events.iter().take(n) {
                match event.data() {
                    LISTENER => self.accept(),
                    MAILBOX => {
                        if self.commands() {
                            return;
                        }
                    }
                    id if self.opening.contains_key(&id) => self.open(id),
                    id => self.queue(id),
                }
            }
            self.timers();
            for _ in 0..self.ready.len() {
                let Some(id) = self.ready.pop_front() else {
                    break;
                };
                self.turn(id);
            }
        }
    }

    fn timeout(&self) -> EpollTimeout {
        if !self.ready.is_empty() {
            return EpollTimeout::ZERO;
        }
        let waits = self.halves.values().filter_map(|h| h.at);
        let opens = self.opening.values().map(|o| o.since + OPENING_TIME);
        let planned = self.timeline.front().map(|p| p.0);
        let Some(at) = waits.chain(opens).chain(planned).min() else {
            return EpollTimeout::NONE;
        };
        // Rounded up, so that the time has come when the wait ends.
        let left = at.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    }

    fn timers(&mut self) {
        while let Some((_, planned)) = self.timeline.pop_front_if(|p| p.0 <= Instant::now()) {
            match planned {
                Planned::Told(event) => self.shared.tell_now(event),
                Planned::Happens(event) => self.happens(event),
            }
        }
        if self.opening.is_empty() && self.halves.values().all(|h| h.at.is_none()) {
            return;
        }
        let now = Instant::now();
        self.opening.retain(|_, o| now < o.since + OPENING_TIME);
        let due: Vec<u64> = self
            .halves
            .iter()
            .filter(|(_, h)| h.at.is_some_and(|t| t <= now))
            .map(|h| *h.0)
            .collect();
        for id in due {
            self.queue(id);
        }
    }

    /// Something befalls the device as a whole. It is told first, where the plan does not let it come
    /// late.
    fn happens(&self, event: AsyncEvent) {
        self.shared.tell(event);
        match event {
            AsyncEvent::DeviceFatal => {
                for qp in self.shared.queue_pairs() {
                    qp.fail_all(false);
                }
            }
            AsyncEvent::CqError { .. } => self.shared.fail_first_cq(),
            _ => {}
        }
    }

    fn queue(&mut self, id: u64) {
        if let Some(half) = self.halves.get_mut(&id)
            && !half.queued
        {
            half.queued = true;
            self.ready.push_back(id);
        }
    }

    fn turn(&mut self, id: u64) {
        let Some(half) = self.halves.get_mut(&id) else {
            return;
        };
        half.queued = false;
        half.at = None;
        match half.qp.run_responder(TURN) {
            Next::Wait => {}
            Next::Again => self.queue(id),
            Next::At(at) => half.at = Some(at),
            Next::Gone => {
                self.halves.remove(&id);
            }
        }
    }

    /// `true` when it is time to end.
    fn commands(&mut self) -> bool {
        for command in self.shared.mailbox.take() {
            match command {
                Command::Stop => return true,
                Command::Serve(qp) => self.serve(qp),
                Command::Tell(at, event) => {
                    let place = self.timeline.partition_point(|p| p.0 <= at);
                    self.timeline.insert(place, (at, Planned::Told(event)));
                }
                Command::Run(qpn) => {
                    let ids = self.halves.iter().filter(|(_, h)| h.qp.qpn == qpn);
                    for id in ids.map(|h| *h.0).collect::<Vec<_>>() {
                        self.queue(id);
                    }
                }
            }
        }
        false
    }

    fn serve(&mut self, qp: Arc<SoftQp>) {
        let id = self.id();
        // Edge-triggered: a half runs until its socket has nothing more, so no event is lost, and
        // a half that waits for something else is not woken for bytes it will not take.
        let flags = EpollFlags::EPOLLIN
            | EpollFlags::EPOLLOUT
            | EpollFlags::EPOLLRDHUP
            | EpollFlags::EPOLLET;
        if let Err(e) = qp.watch_responder(&self.epoll, EpollEvent::new(flags, id)) {
            // Mostly a queue pair that has been stopped meanwhile.
            tracing::debug!(error = %e, "cannot watch a peer's stream");
            return;
        }
        self.halves.insert(
            id,
            Half {
                qp,
                queued: false,
                at: None,
            },
        );
        self.queue(id);
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPTS {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let raw = match accept4(self.listener.as_raw_fd(), flags) {
                Ok(raw) => raw,
                Err(nix::Error::EAGAIN) => return,
                Err(nix::Error::EINTR | nix::Error::ECONNABORTED) => continue,
                Err(e) => {
                    // Out of descriptors: not a busy loop.
                    tracing::warn!(error = %e, "cannot accept a peer");
                    std::thread::sleep(Duration::from_millis(10));
                    return;
                }
            };
            // SAFETY: the kernel has just made this descriptor for us.
            let fd = unsafe { OwnedFd::from_raw_fd(raw) };
            if self.opening.len() >= MAX_OPENING {
                continue;
            }
            // Before anything is received: every user of the host can connect, and descriptors that
            // are passed are open here as soon as they are.
            let process = match PeerProcess::of(fd.as_fd()) {
                Ok(process) => process,
                Err(why) => {
                    tracing::debug!(%why, "refused a connection");
                    continue;
                }
            };
            let id = self.id();
            let opening = Opening {
                stream: Stream::new(fd, true),
                process,
                buf: [0; HELLO],
                got: 0,
                fds: VecDeque::new(),
                since: Instant::now(),
                answered: false,
            };
            self.watch_opening(id, opening);
        }
    }

    fn watch_opening(&mut self, id: u64, opening: Opening) {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, id);
        if self.epoll.add(opening.stream.as_fd(), event).is_ok() {
            self.opening.insert(id, opening);
        }
    }

    /// Reads the opening of a stream and acts on it.
    fn open(&mut self, id: u64) {
        let Some(o) = self.opening.get_mut(&id) else {
            return;
        };
        if o.answered {
            // Nothing more is expected but its end.
            self.opening.remove(&id);
            return;
        }
        let room = o.buf.get_mut(o.got..).unwrap_or_default();
        match o.stream.recv(room, &mut o.fds) {
            // One descriptor, the key table's, whatever pieces the opening comes in.
            Ok(n) if n > 0 && o.fds.len() <= 1 => o.got += n,
            Err(e) if not_now(&e) => return,
            _ => {
                self.opening.remove(&id);
                return;
            }
        }
        if o.got < HELLO {
            return;
        }
        let Some(o) = self.opening.remove(&id) else {
            return;
        };
        // It is watched anew, in another way, or not at all.
        let _ = self.epoll.delete(o.stream.as_fd());
        match self.opened(o) {
            Ok(None) => {}
            Ok(Some(probe)) => self.watch_opening(id, probe),
            Err(why) => tracing::debug!(why, "refused a peer's stream"),
        }
    }

    /// Passes the file of memory that is shared by a token to who has it.
    fn file(&self, hello: &Hello, stream: &Stream) -> Result<(), &'static str> {
        let mut answer = answer(&self.shared, None, hello);
        let Some((file, offset)) = self.shared.shares.find(&hello.target, hello.qpn) else {
            answer.role = Role::Refused;
            let _ = stream.send(&answer.encode(), None);
            return Err("nothing is shared so");
        };
        answer.probe_addr = offset;
        match stream.send(&answer.encode(), Some(file.as_fd())) {
            Ok(HELLO) => Ok(()),
            _ => Err("it takes no answer"),
        }
    }

    /// Answers an opening. A probe that must stay for a while is given back.
    fn opened(&self, mut o: Opening) -> Result<Option<Opening>, &'static str> {
        let hello = Hello::decode(&o.buf).ok_or("not this protocol")?;
        // Only who has heard of this context over a control connection knows the guid.
        if hello.target_guid != self.shared.address.guid {
            return Err("meant for another context");
        }
        let keys = o.fds.pop_front().ok_or("no key table")?;
        o.process.expect(&hello);
        let qp = match hello.role {
            Role::Probe => None,
            Role::File => return self.file(&hello, &o.stream).map(|()| None),
            Role::ToResponder | Role::ToRequester => {
                let qp = self.shared.by_token(&hello.target);
                if qp.is_none() {
                    let mut refusal = answer(&self.shared, None, &hello);
                    refusal.role = Role::Refused;
                    let _ = o.stream.send(&refusal.encode(), None);
                    return Err("no such queue pair");
                }
                qp
            }
            Role::Welcome | Role::Refused | Role::Barred => return Err("not an opening"),
        };
        let mut welcome = answer(&self.shared, qp.as_deref(), &hello);
        // There is one reader that a process can name, so only a path that needs it asks.
        if path_of(hello.path) == Some(SoftPath::ProcessVm) {
            welcome.reader = o.process.admit();
            // The dialler tries the same in the other direction.
            match o.process.identify() {
                Ok(true) => {}
                failed => {
                    let errno = failed
                        .err()
                        .map_or(0, |e| e.raw_os_error().unwrap_or(libc::EIO));
                    welcome.role = Role::Barred;
                    welcome.errno = errno.unsigned_abs();
                    let _ = o.stream.send(&welcome.encode(), None);
                    return Err("its memory cannot be read");
                }
            }
        }
        let sent = o.stream.send(&welcome.encode(), Some(key_fd(&self.shared)));
        if sent.ok() != Some(HELLO) {
            return Err("it takes no answer");
        }
        let Some(qp) = qp else {
            o.answered = true;
            return Ok(o.process.admitted().then_some(o));
        };
        qp.offer(Incoming {
            hello,
            stream: o.stream,
            keys,
            process: o.process,
        });
        Ok(None)
    }
}

#[cfg(all(loom, test))]
mod loom_tests {
    use kvxfer_loom::{model, thread};

    use super::*;

    /// A thread that sends while this one takes and, with nothing to do, sleeps.
    fn all_come(take: fn(&Mailbox) -> Vec<Command>) {
        let mailbox = Arc::new(Mailbox::new().expect("a mailbox"));
        let others = Arc::clone(&mailbox);
        let sender = thread::spawn(move || {
            others.send(Command::Run(1));
            others.send(Command::Stop);
        });
        let mut got = 0;
        while got < 2 {
            mailbox.event.wait_readable();
            got += take(&mailbox).len();
        }
        sender.join().expect("sent");
    }

    #[test]
    fn no_command_is_left_to_a_sleeper() {
        model(|| all_come(Mailbox::take));
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn planted_the_event_after_the_commands() {
        model(|| {
            all_come(|mailbox| {
                let commands = std::mem::take(&mut *lock(&mailbox.commands));
                let _ = mailbox.event.read();
                commands
            });
        });
    }
}
