//! The state machine itself.

use std::collections::{BTreeMap, VecDeque};
use std::io;

use crate::ids::EngineId;
use crate::time::Time;
use crate::wire::{
    Describe, ErrorCode, FrameReader, FrameWriter, Goodbye, GoodbyeReason, HandshakeNonce,
    MAX_UNAUTHENTICATED_FRAME, Message, MessageKind, PreambleReader, Refusal, Refuse, RejectCode,
    Role, SessionId, SessionKeys, Side, StreamGate, StreamKey, Transcript,
};

use super::error::{SendError, SessionError, SessionState};
use super::liveness::{Liveness, Verdict};
use super::{Closed, Event, SessionConfig};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Fresh,
    /// Waiting for the peer's preamble.
    Preamble,
    /// Client: Hello is sent.
    AwaitChallenge,
    /// Client: Auth is sent.
    AwaitAuthOk,
    /// Server: the preambles are exchanged.
    AwaitHello,
    /// Server: Challenge is sent.
    AwaitAuth,
    /// Authenticated; `Open` says how far.
    Open,
    Closed,
}

/// How far an authenticated session has come.
#[derive(Debug, Default)]
pub(super) struct Progress {
    pub(super) ours: Option<Named>,
    pub(super) theirs: Option<Named>,
    pub(super) accepted: bool,
    pub(super) ready_sent: bool,
    pub(super) ready_received: bool,
}

/// What the two descriptions must agree on.
#[derive(Debug)]
pub(super) struct Named {
    pub(super) engine: EngineId,
    pub(super) wanted: Option<EngineId>,
}

impl From<&Describe> for Named {
    fn from(d: &Describe) -> Self {
        Named {
            engine: d.engine.clone(),
            wanted: d.wanted.clone(),
        }
    }
}

/// One end of a control connection. See the [module](super) for how to drive it.
#[derive(Debug)]
pub struct Session {
    pub(super) side: Side,
    pub(super) config: SessionConfig,
    pub(super) nonce: HandshakeNonce,
    pub(super) phase: Phase,
    pub(super) role: Role,
    pub(super) preamble: PreambleReader,
    pub(super) reader: FrameReader,
    pub(super) writer: FrameWriter,
    pub(super) transcript: Transcript,
    pub(super) version: u16,
    /// The largest payload that the peer takes.
    pub(super) peer_max_frame: u32,
    pub(super) keys: Option<SessionKeys>,
    /// When the present stage must be over.
    pub(super) deadline: Time,
    pub(super) liveness: Option<Liveness>,
    pub(super) progress: Progress,
    /// Offers sent and not answered, with their numbers of endpoints.
    pub(super) offers: BTreeMap<u32, usize>,
    pub(super) out: Vec<u8>,
    /// Bytes at the front of `out` that are sent.
    pub(super) sent: usize,
    pub(super) events: VecDeque<Event>,
}

impl Session {
    /// The end that connects. `nonce` must be fresh: [`HandshakeNonce::random`].
    #[must_use]
    pub fn client(config: SessionConfig, nonce: HandshakeNonce) -> Session {
        Session::new(Side::Client, config, nonce)
    }

    /// The end that listens; it reads the connection from its first byte, preamble included. `nonce`
    /// must be fresh: [`HandshakeNonce::random`].
    #[must_use]
    pub fn server(config: SessionConfig, nonce: HandshakeNonce) -> Session {
        Session::new(Side::Server, config, nonce)
    }

    fn new(side: Side, mut config: SessionConfig, nonce: HandshakeNonce) -> Session {
        config.max_frame = config.max_frame.max(MAX_UNAUTHENTICATED_FRAME);
        Session {
            side,
            role: config.role,
            config,
            nonce,
            phase: Phase::Fresh,
            preamble: PreambleReader::new(),
            reader: FrameReader::new(MAX_UNAUTHENTICATED_FRAME),
            writer: FrameWriter::new(),
            transcript: Transcript::new(),
            version: 0,
            peer_max_frame: MAX_UNAUTHENTICATED_FRAME,
            keys: None,
            deadline: Time::MAX,
            liveness: None,
            progress: Progress::default(),
            offers: BTreeMap::new(),
            out: Vec::new(),
            sent: 0,
            events: VecDeque::new(),
        }
    }

    // ---- what the driver asks -------------------------------------------------------------

    /// Which end this is.
    #[must_use]
    pub fn side(&self) -> Side {
        self.side
    }

    /// How far the session has come.
    #[must_use]
    pub fn state(&self) -> SessionState {
        match self.phase {
            Phase::Closed => SessionState::Closed,
            Phase::Open => {
                let p = &self.progress;
                if p.ready_sent && p.ready_received {
                    SessionState::Established
                } else if p.accepted && p.ours.is_some() {
                    SessionState::Described
                } else {
                    SessionState::Authenticated
                }
            }
            _ => SessionState::Handshake,
        }
    }

    /// What the client came for; certain only once authenticated.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// The protocol version, once chosen.
    #[must_use]
    pub fn version(&self) -> Option<u16> {
        (self.version != 0).then_some(self.version)
    }

    /// The session's name, once authenticated.
    #[must_use]
    pub fn session_id(&self) -> Option<SessionId> {
        self.keys.as_ref().map(|k| k.id)
    }

    /// The key under which this side dials data streams, once authenticated.
    #[must_use]
    pub fn stream_key(&self) -> Option<StreamKey> {
        self.keys.as_ref().map(|k| k.streams_from(self.side))
    }

    /// A new gate for the data streams that the peer dials, once authenticated. Keep one a session:
    /// a second gate would admit the same openings again.
    #[must_use]
    pub fn stream_gate(&self) -> Option<StreamGate> {
        self.keys
            .as_ref()
            .map(|k| StreamGate::new(k.id, k.streams_from(self.side.other())))
    }

    /// Bytes to send. Say how many were taken with [`Session::transmitted`].
    #[must_use]
    pub fn transmit(&self) -> &[u8] {
        self.out.get(self.sent..).unwrap_or_default()
    }

    /// Notes that the first `n` bytes of [`Session::transmit`] are sent.
    pub fn transmitted(&mut self, n: usize) {
        self.sent = (self.sent + n).min(self.out.len());
        if self.sent == self.out.len() {
            self.out.clear();
            self.out.shrink_to(64 * 1024);
            self.sent = 0;
        } else if self.sent > self.out.len() / 2 {
            self.out.drain(..self.sent);
            self.sent = 0;
        }
    }

    /// Bytes waiting to be sent.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.out.len() - self.sent
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`Session::on_time`] is due, if ever.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Time> {
        if matches!(self.phase, Phase::Fresh | Phase::Closed) {
            return None;
        }
        let beat = self
            .liveness
            .as_ref()
            .map_or(Time::MAX, Liveness::next_timeout);
        Some(self.deadline.min(beat)).filter(|t| *t < Time::MAX)
    }

    /// Whether the session has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.phase == Phase::Closed
    }

    /// Whether it has ended and its last words are sent: the socket can be closed. A driver waits
    /// for this a short while only, for the peer may not read any more.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.is_closed() && self.queued() == 0
    }

    // ---- inputs -----------------------------------------------------------------------------

    /// Begins; the handshake's time runs from here.
    pub fn start(&mut self, now: Time) {
        if self.phase != Phase::Fresh {
            return;
        }
        self.phase = Phase::Preamble;
        self.deadline = now + self.config.handshake_timeout;
        if self.side == Side::Client
            && let Err(error) = self.send_hello()
        {
            self.fail(error);
        }
    }

    /// Takes bytes that arrived.
    pub fn on_bytes(&mut self, now: Time, bytes: &[u8]) {
        self.start(now);
        if self.is_closed() {
            return;
        }
        self.look(now);
        if let Err(error) = self.read(now, bytes) {
            self.fail(error);
        }
        self.looked(now);
    }

    /// The peer has closed its direction of the connection.
    pub fn on_eof(&mut self, _now: Time) {
        let mid_frame = self.reader.buffered() > 0;
        self.fail(SessionError::PeerClosed {
            state: self.state(),
            mid_frame,
        });
    }

    /// Reading or writing has failed.
    pub fn on_io_error(&mut self, _now: Time, kind: io::ErrorKind) {
        self.fail(SessionError::ConnectionLost {
            state: self.state(),
            kind,
        });
    }

    /// Time has passed. Bytes that can be read are given to [`Session::on_bytes`] first.
    ///
    /// If this is called more than a heartbeat interval after [`Session::next_timeout`], the process
    /// itself was held up, and the time lost is not counted as the peer's silence.
    pub fn on_time(&mut self, now: Time) {
        if matches!(self.phase, Phase::Fresh | Phase::Closed) {
            return;
        }
        self.look(now);
        if now >= self.deadline {
            let state = self.state();
            return self.fail(if state == SessionState::Handshake {
                SessionError::HandshakeTimeout {
                    after: self.config.handshake_timeout,
                }
            } else {
                SessionError::EstablishTimeout {
                    state,
                    after: self.config.establish_timeout,
                }
            });
        }
        let Some(liveness) = &mut self.liveness else {
            return;
        };
        let verdict = liveness.judge(now);
        let ping = liveness.ping_due(now);
        match verdict {
            Verdict::Dead(silent) => return self.fail(SessionError::PeerStalled { silent }),
            Verdict::Stalled(silent) => self.events.push_back(Event::Stalled { silent }),
            Verdict::Quiet => {}
        }
        // A peer that does not read gets no more pings: its silence will tell.
        if ping && self.room(64) {
            self.send_ping(now, false);
        }
        self.looked(now);
    }

    /// Queues a message.
    ///
    /// [`Describe`] is sent once, right after [`Event::Authenticated`]; queue pairs and `Ready` after
    /// [`Session::accept`]; all that concerns transfers once established; [`Message::Bench`] at any
    /// time in the bench role. Pings, refusals and goodbyes have calls of their own.
    ///
    /// # Errors
    ///
    /// See [`SendError`]. The session may already have been closed by bytes that came with those
    /// whose event is being handled: [`Event::Closed`] is then on its way. After a describe that shows that the peer reached the wrong engine, the
    /// session is closed.
    pub fn send(&mut self, message: &Message) -> Result<(), SendError> {
        let kind = message.kind();
        if !self.may_send(kind) {
            return Err(SendError::State {
                state: self.state(),
                kind,
            });
        }
        let payload = message.encode()?;
        let max = self.peer_max_frame;
        if payload.len() > max as usize {
            return Err(SendError::TooLarge {
                kind,
                len: payload.len(),
                max,
            });
        }
        if !self.room(payload.len()) {
            return Err(SendError::QueueFull {
                queued: self.queued(),
                limit: self.config.max_queued,
            });
        }
        self.writer
            .write(kind as u8, &payload, max, &mut self.out)?;
        match message {
            Message::Describe(d) => {
                self.progress.ours = Some(Named::from(d));
                if let Some(reason) = self.wrong_engine() {
                    self.refuse(reason);
                    return Err(SendError::State {
                        state: SessionState::Closed,
                        kind,
                    });
                }
            }
            Message::QpOffer(o) => {
                self.offers.insert(o.offer, o.endpoints.len());
            }
            Message::Ready(_) => {
                self.progress.ready_sent = true;
                self.check_established();
            }
            _ => {}
        }
        Ok(())
    }

    /// Accepts the peer's description. Does nothing before [`Event::PeerDescribed`].
    pub fn accept(&mut self) {
        if self.phase == Phase::Open && self.progress.theirs.is_some() {
            self.progress.accepted = true;
        }
    }

    /// Refuses to work with the peer, tells it why, and closes. Before authentication the peer is
    /// told that this side is busy, and no more.
    pub fn refuse(&mut self, reason: Refusal) {
        match self.phase {
            Phase::Closed => return,
            Phase::Open => self.write_small(&Message::Refuse(Refuse {
                reason: reason.clone().cleaned(),
            })),
            _ => self.reject(RejectCode::Busy),
        }
        self.close_with(Closed::Failed(SessionError::Refused { reason }));
    }

    /// Cuts the peer off because of what its messages say (ranges outside regions, unknown names).
    pub fn cut_off(&mut self, code: ErrorCode, text: &str) {
        self.fail(SessionError::CutOff {
            code,
            text: text.to_owned(),
        });
    }

    /// Sends a ping whose round trip is reported as [`Event::Pong`]; returns its number.
    ///
    /// # Errors
    ///
    /// The session is not authenticated, or the queue is full.
    pub fn ping(&mut self, now: Time) -> Result<u64, SendError> {
        if self.phase != Phase::Open {
            return Err(SendError::State {
                state: self.state(),
                kind: MessageKind::Ping,
            });
        }
        if !self.room(64) {
            return Err(SendError::QueueFull {
                queued: self.queued(),
                limit: self.config.max_queued,
            });
        }
        self.send_ping(now, true).ok_or(SendError::State {
            state: self.state(),
            kind: MessageKind::Ping,
        })
    }

    /// Says goodbye and closes.
    pub fn close(&mut self, reason: GoodbyeReason) {
        if self.phase == Phase::Open {
            self.write_small(&Message::Goodbye(Goodbye { reason }));
        }
        self.close_with(Closed::Local(reason));
    }
}
