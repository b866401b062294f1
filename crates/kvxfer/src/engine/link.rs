//! The thread of one control connection: it moves bytes between a socket and a
//! [`Session`](crate::session::Session), and does what the session's events ask for.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use tracing::{debug, error, info, warn};

use super::Clock;
use super::accept::Arriving;
use super::bringup::{Bringup, Step};
use super::farewell::FAREWELL;
use super::wake::Wake;
use crate::engine::Inner;
use crate::error::{Error, chain};
use crate::event::PeerName;
use crate::session::{Closed, Event as SessionEvent, Session, SessionError};
use crate::sync::{Mutex, MutexGuard};
use crate::time::Time;
use crate::transfer::Cause;
use crate::wire::{ErrorCode, GoodbyeReason, Message, StreamOpening};

/// How long the last words of a session may take to leave.
const LAST_WORDS: Duration = Duration::from_millis(200);
const READ_CHUNK: usize = 64 * 1024;
/// From so many bytes, or orders, on a link is behind. A message of checksums is a mebibyte at most.
const BEHIND: usize = 4 << 20;
const BEHIND_ORDERS: usize = 16;
/// A queue pair often fails because the peer has died, and the end of the connection says so a moment
/// later. What came first is the death then. Until it is known nothing is said or heeded: that a push
/// has closed, for one, is not true before its queue pairs are down.
const LAST_LOOK: Duration = Duration::from_millis(25);

#[derive(Debug)]
enum Order {
    Send(Box<Message>),
    Stream(StreamOpening, TcpStream),
    /// A lane is down on both sides.
    Rebuild(u16),
    Reset(Cause),
    CutOff(String),
    Close(GoodbyeReason),
    /// Panic, as a defect would have it.
    #[cfg(test)]
    Panic,
    /// Do nothing until this is told or its sender is gone.
    #[cfg(test)]
    Hold(std::sync::mpsc::Receiver<()>),
    /// The same, and then read before other orders are taken.
    #[cfg(test)]
    HoldAndRead(std::sync::mpsc::Receiver<()>),
}

/// How other threads reach a link.
#[derive(Debug)]
pub(crate) struct Link {
    orders: Mutex<VecDeque<Order>>,
    wake: Wake,
    over: AtomicBool,
    /// Bytes that wait for the socket.
    unsent: AtomicUsize,
}

impl Link {
    pub(crate) fn new() -> Result<Self, Error> {
        Ok(Self {
            orders: Mutex::default(),
            wake: Wake::new()?,
            over: AtomicBool::new(false),
            unsent: AtomicUsize::new(0),
        })
    }

    fn orders(&self) -> MutexGuard<'_, VecDeque<Order>> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, order: Order) {
        if self.over.load(Ordering::Acquire) {
            return;
        }
        self.orders().push_back(order);
        self.wake.wake();
    }

    /// Sends a message, unless the session is over.
    pub(crate) fn send(&self, message: Message) {
        self.order(Order::Send(Box::new(message)));
    }

    /// Whether so much waits to be sent that what is not urgent should wait.
    pub(crate) fn is_behind(&self) -> bool {
        self.unsent.load(Ordering::Relaxed) > BEHIND || self.orders().len() > BEHIND_ORDERS
    }

    /// Hands over a data stream that the peer has dialled.
    pub(crate) fn stream(&self, opening: StreamOpening, stream: TcpStream) {
        self.order(Order::Stream(opening, stream));
    }

    /// Gives a lane that is down on both sides a successor, on the side that connected.
    pub(crate) fn rebuild(&self, number: u16) {
        self.order(Order::Rebuild(number));
    }

    /// Ends the session because of `cause`.
    pub(crate) fn reset(&self, cause: Cause) {
        self.order(Order::Reset(cause));
    }

    /// Ends the session because of what the peer has said elsewhere than on it.
    pub(crate) fn cut_off(&self, lie: String) {
        self.order(Order::CutOff(lie));
    }

    /// Ends the session in good order.
    pub(crate) fn close(&self, reason: GoodbyeReason) {
        self.order(Order::Close(reason));
    }

    #[cfg(test)]
    pub(crate) fn panic(&self) {
        self.order(Order::Panic);
    }

    #[cfg(test)]
    pub(crate) fn hold(&self, until: std::sync::mpsc::Receiver<()>) {
        self.order(Order::Hold(until));
    }

    #[cfg(test)]
    pub(crate) fn hold_and_read(&self, until: std::sync::mpsc::Receiver<()>) {
        self.order(Order::HoldAndRead(until));
    }
}

/// How a session went.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Whether transfers could run.
    pub(crate) established: bool,
    /// Who the peer was, if they could.
    pub(crate) name: Option<PeerName>,
    pub(crate) error: Error,
    pub(crate) cause: Cause,
    /// Whether there is no point in trying again.
    pub(crate) wanted: bool,
}

/// One session over one socket.
pub(crate) struct Driver {
    engine: Arc<Inner>,
    link: Arc<Link>,
    session: Session,
    socket: TcpStream,
    /// The peer's address, for messages.
    name: String,
    clock: Clock,
    bringup: Bringup,
    /// An accepted connection's place among those that have not proved themselves.
    arriving: Option<Arriving>,
    /// When it ends for queue pairs that have failed, if nothing else is heard until then.
    resets_at: Option<(Time, Cause)>,
    /// It closes: the ends of pushes have been waited for.
    is_leaving: bool,
    error: Option<Error>,
    wanted: bool,
}

impl Driver {
    pub(crate) fn new(
        engine: Arc<Inner>,
        link: Arc<Link>,
        session: Session,
        socket: TcpStream,
        name: String,
        bringup: Bringup,
    ) -> Result<Self, Error> {
        socket
            .set_nonblocking(true)
            .map_err(|source| Error::Unreachable {
                address: name.clone(),
                source,
            })?;
        let clock = engine.clock();
        Ok(Self {
            engine,
            link,
            session,
            socket,
            name,
            clock,
            bringup,
            arriving: None,
            resets_at: None,
            is_leaving: false,
            error: None,
            wanted: false,
        })
    }

    /// Gives the place up with the authentication.
    pub(crate) fn arriving(mut self, place: Arriving) -> Self {
        self.arriving = Some(place);
        self
    }

    /// Runs the session to its end. `input` is what was read of the connection before.
    ///
    /// Should this thread panic, by a defect, the session ends as any other: its peer is lost, and
    /// what ran over it ends with [`Cause::WorkerPanicked`].
    pub(crate) fn run(mut self, input: &[u8]) -> Ended {
        let closed = catch_unwind(AssertUnwindSafe(|| self.serve(input)));
        self.link.over.store(true, Ordering::Release);
        if closed.is_err() {
            error!(peer = %self.name, "a link has panicked; the engine takes no new work");
            self.engine.runtime.health.break_down();
        }
        self.ended(closed.ok())
    }

    fn serve(&mut self, input: &[u8]) -> Closed {
        self.session.start(self.clock.now());
        if !input.is_empty() {
            self.session.on_bytes(self.clock.now(), input);
        }
        let mut buffer = vec![0; READ_CHUNK];
        let mut closed = None;
        let mut last_words: Option<Instant> = None;
        loop {
            self.read(&mut buffer);
            if self
                .session
                .next_timeout()
                .is_some_and(|at| at <= self.clock.now())
            {
                self.session.on_time(self.clock.now());
            }
            self.take_orders();
            if let Some((_, cause)) = self.resets_at.take_if(|(at, _)| *at <= self.clock.now()) {
                self.reset(cause);
            }
            let now = self.clock.now();
            if !self.session.is_closed() && self.bringup.next_rebuild().is_some_and(|at| at <= now)
            {
                let steps = self.bringup.rebuild(&self.engine, now);
                self.step(Ok(steps));
            }
            while let Some(event) = self.session.poll_event() {
                match event {
                    SessionEvent::Closed(how) => {
                        self.will_end(cause_of(&how));
                        closed = Some(how);
                    }
                    event => self.event(event),
                }
            }
            self.write();
            let unsent = self.session.queued();
            self.link.unsent.store(unsent, Ordering::Relaxed);
            if let Some(how) = closed.take() {
                // The peer may not read any more: its last words get a moment, no more.
                let until = *last_words.get_or_insert_with(|| Instant::now() + LAST_WORDS);
                if self.session.is_finished() || Instant::now() >= until {
                    return how;
                }
                closed = Some(how);
            }
            self.sleep(closed.is_some());
        }
    }

    fn read(&mut self, buffer: &mut [u8]) {
        // Bounded, so that a peer that never stops sending does not keep time from passing.
        for _ in 0..16 {
            if self.session.is_closed() {
                return;
            }
            match self.socket.read(buffer) {
                Ok(0) => return self.session.on_eof(self.clock.now()),
                Ok(n) => {
                    let bytes = buffer.get(..n).unwrap_or_default();
                    self.session.on_bytes(self.clock.now(), bytes);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return self.session.on_io_error(self.clock.now(), error.kind()),
            }
        }
    }

    fn write(&mut self) {
        while !self.session.transmit().is_empty() {
            match self.socket.write(self.session.transmit()) {
                Ok(n) => self.session.transmitted(n),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    self.session.on_io_error(self.clock.now(), error.kind());
                    // Nothing more can leave.
                    let left = self.session.queued();
                    return self.session.transmitted(left);
                }
            }
        }
    }

    fn sleep(&self, closing: bool) {
        let reset = self.resets_at.as_ref().map(|(at, _)| *at);
        let rebuild = self.bringup.next_rebuild().filter(|_| !closing);
        let due = [self.session.next_timeout(), reset, rebuild];
        let due = due.into_iter().flatten();
        let mut timeout = due.min().map(|at| at.since(self.clock.now()));
        if closing {
            timeout = Some(LAST_WORDS / 4);
        }
        let mut flags = PollFlags::empty();
        // After its end a session reads nothing, and a readable socket would keep it from sleeping.
        flags.set(PollFlags::POLLIN, !closing);
        flags.set(PollFlags::POLLOUT, self.session.queued() > 0);
        let sockets = [(self.socket.as_fd(), flags)];
        let others = if flags.is_empty() {
            &[][..]
        } else {
            &sockets[..]
        };
        self.link
            .wake
            .sleep(others, timeout, || self.link.orders().is_empty());
    }

    /// Ends the session for a cause of this side, unless it has ended.
    fn reset(&mut self, cause: Cause) {
        if !self.session.is_closed() {
            self.will_end(cause);
        }
        self.session.close(GoodbyeReason::Replaced);
    }

    /// Says why the session ends before its last words are said: what fails meanwhile fails for that.
    fn will_end(&self, cause: Cause) {
        if let Some(peer) = self.bringup.peer() {
            peer.will_end(cause);
        }
    }

    fn take_orders(&mut self) {
        loop {
            let Some(order) = self.link.orders().pop_front() else {
                return;
            };
            match order {
                Order::Send(message) => self.send(&message),
                Order::Stream(opening, stream) => {
                    let step = self.bringup.stream(&self.engine, opening, stream);
                    self.step(step);
                }
                Order::Rebuild(number) => self.bringup.rebuild_later(number, self.clock.now()),
                Order::Reset(cause) if cause.may_follow_the_peers_end() => {
                    let at = self.clock.now() + LAST_LOOK;
                    self.resets_at.get_or_insert((at, cause));
                }
                Order::Reset(cause) => self.reset(cause),
                Order::CutOff(lie) => self.session.cut_off(ErrorCode::Lie, &lie),
                Order::Close(reason) => {
                    self.wanted = true;
                    if let Some(peer) = self.bringup.peer().filter(|_| !self.is_leaving) {
                        peer.take_leave(Instant::now() + FAREWELL);
                        // What could not be told there is among the orders by now.
                        self.is_leaving = true;
                        self.link.orders().push_back(Order::Close(reason));
                        continue;
                    }
                    self.session.close(reason);
                }
                #[cfg(test)]
                Order::Panic => panic!("a link's panic, which the test wants"),
                #[cfg(test)]
                Order::Hold(until) => drop(until.recv()),
                #[cfg(test)]
                Order::HoldAndRead(until) => {
                    let _ = until.recv();
                    return;
                }
            }
        }
    }

    fn send(&mut self, message: &Message) {
        if self.session.is_closed() || self.resets_at.is_some() {
            return;
        }
        if let Err(error) = self.session.send(message) {
            warn!(peer = %self.name, kind = %message.kind(), %error, "message not sent");
            // What is lost here would leave the peer waiting: it is better off without the session.
            self.session
                .cut_off(ErrorCode::Internal, &error.to_string());
        }
    }

    fn event(&mut self, event: SessionEvent) {
        match event {
            SessionEvent::Authenticated {
                role,
                session,
                by_secret,
                ..
            } => {
                debug!(peer = %self.name, %role, %session, by_secret, "authenticated");
                self.arriving = None;
                let step = self
                    .bringup
                    .authenticated(&self.engine, &self.link, &self.session);
                self.step(step);
            }
            SessionEvent::PeerDescribed(describe) => {
                let step = self.bringup.described(&mut self.engine, *describe);
                self.step(step);
            }
            SessionEvent::QpOffer(offer) => {
                let step = self.bringup.offered(&self.engine, offer);
                self.step(step);
            }
            SessionEvent::QpAnswer(answer) => {
                let step = self.bringup.answered(&self.engine, answer);
                self.step(step);
            }
            SessionEvent::Established => {
                let step = self.bringup.established(&self.engine, &self.link);
                self.step(step);
            }
            SessionEvent::Message(message) => self.message(message),
            SessionEvent::Stalled { silent } => {
                warn!(peer = %self.name, ?silent, "peer is stalled");
            }
            SessionEvent::Resumed { silent } => {
                info!(peer = %self.name, ?silent, "peer is heard again");
            }
            _ => {}
        }
    }

    fn step(&mut self, step: Result<Vec<Step>, Error>) {
        match step {
            Ok(steps) => {
                for step in steps {
                    match step {
                        Step::Accept => self.session.accept(),
                        Step::Send(message) => self.send(&message),
                        Step::Refuse(reason, error) => {
                            self.error.get_or_insert(error);
                            self.session.refuse(reason);
                        }
                    }
                }
            }
            Err(error) => {
                warn!(peer = %self.name, %error, "session not set up");
                self.session
                    .cut_off(ErrorCode::Internal, &error.to_string());
                self.error.get_or_insert(error);
            }
        }
    }

    fn message(&mut self, message: Message) {
        let Some(peer) = self.bringup.peer() else {
            return;
        };
        if self.resets_at.is_some() {
            return;
        }
        if let Err(lie) = self.engine.on_message(peer, message) {
            self.session.cut_off(ErrorCode::Lie, &lie);
        }
    }

    /// What has come of a session that was closed so, or whose thread has panicked.
    fn ended(mut self, closed: Option<Closed>) -> Ended {
        let cause = closed.as_ref().map_or(Cause::WorkerPanicked, cause_of);
        let error = self.error.take().unwrap_or_else(|| match closed {
            None => Error::WorkerPanicked,
            Some(Closed::Failed(source)) => self.session_error(source),
            Some(Closed::Goodbye(_) | Closed::Local(_)) => {
                self.session_error(SessionError::PeerClosed {
                    state: self.session.state(),
                    mid_frame: false,
                })
            }
        });
        let name = self.bringup.peer().map(|peer| peer.name.clone());
        let (established, cause) = self.bringup.end(&self.engine, cause);
        if established && matches!(cause, Cause::CutOff { .. }) {
            warn!(peer = %self.name, error = %chain(&error), "peer cut off");
        }
        Ended {
            established,
            name,
            error,
            cause,
            wanted: self.wanted,
        }
    }

    fn session_error(&self, source: SessionError) -> Error {
        Error::Session {
            peer: self.name.clone(),
            source,
        }
    }
}

/// What the end of a session means for the transfers that ran over it.
fn cause_of(closed: &Closed) -> Cause {
    match closed {
        Closed::Local(_) => Cause::ShuttingDown,
        Closed::Goodbye(GoodbyeReason::Replaced) => Cause::LaneReset,
        Closed::Goodbye(_) => Cause::PeerClosed,
        Closed::Failed(error) => match error {
            SessionError::PeerClosed { .. } | SessionError::ConnectionLost { .. } => {
                Cause::PeerDead
            }
            SessionError::PeerStalled { silent } => Cause::PeerStalled {
                silent_ms: u64::try_from(silent.as_millis()).unwrap_or(u64::MAX),
            },
            error => match error.report() {
                // A fault of this side says nothing of the peer.
                None | Some(ErrorCode::Internal) => Cause::PeerUnreachable,
                Some(reason) => Cause::CutOff { reason },
            },
        },
    }
}

#[cfg(all(loom, test))]
mod loom_tests {
    use kvxfer_loom::{model, thread};

    use super::*;

    #[test]
    fn a_sleeping_link_gets_every_order() {
        model(|| {
            let link = Arc::new(Link::new().expect("an event"));
            for _ in 0..2 {
                let link = Arc::clone(&link);
                thread::spawn(move || link.close(GoodbyeReason::Finished));
            }
            // As `Driver::run` does, without a socket.
            let mut taken = 0;
            while taken < 2 {
                while link.orders().pop_front().is_some() {
                    taken += 1;
                }
                if taken < 2 {
                    link.wake.sleep(&[], None, || link.orders().is_empty());
                }
            }
        });
    }
}
