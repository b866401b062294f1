//! The authenticated part of the state machine: which message may come or go when, and the end.

use crate::time::Time;
use crate::wire::{
    ErrorReport, Frame, HEADER_LEN, Message, MessageKind, Ping, Pong, QpAnswer, Refusal,
    RejectCode, Role, Side, TAG_LEN,
};

use super::error::{SessionError, SessionState};
use super::machine::{Named, Phase, Session};
use super::{Closed, Event};

impl Session {
    pub(super) fn look(&mut self, now: Time) {
        if let Some(liveness) = &mut self.liveness {
            liveness.look(now);
        }
    }

    pub(super) fn looked(&mut self, now: Time) {
        if let Some(liveness) = &mut self.liveness {
            liveness.looked(now);
        }
    }

    pub(super) fn read(&mut self, now: Time, bytes: &[u8]) -> Result<(), SessionError> {
        let bytes = if self.phase == Phase::Preamble {
            let Some(rest) = self.read_preamble(bytes)? else {
                return Ok(());
            };
            rest
        } else {
            bytes
        };
        self.reader.push(bytes);
        while !self.is_closed() {
            let Some(frame) = self.reader.next_frame()? else {
                break;
            };
            if self.phase == Phase::Open {
                self.on_sealed_frame(now, &frame)?;
            } else {
                self.on_handshake_frame(now, &frame)?;
            }
        }
        Ok(())
    }

    fn on_sealed_frame(&mut self, now: Time, frame: &Frame) -> Result<(), SessionError> {
        if let Some(silent) = self.liveness.as_mut().and_then(|l| l.heard(now)) {
            self.events.push_back(Event::Resumed { silent });
        }
        let message = Message::decode(frame.kind, &frame.payload)?;
        if !self.may_receive(message.kind()) {
            return Err(SessionError::UnexpectedMessage {
                state: self.state(),
                got: message.kind(),
            });
        }
        match message {
            Message::Describe(d) => {
                self.progress.theirs = Some(Named::from(&d));
                if let Some(reason) = self.wrong_engine() {
                    self.refuse(reason);
                } else {
                    self.events.push_back(Event::PeerDescribed(Box::new(d)));
                }
            }
            Message::QpOffer(o) => self.events.push_back(Event::QpOffer(o)),
            Message::QpAnswer(a) => {
                self.check_answer(&a)?;
                self.events.push_back(Event::QpAnswer(a));
            }
            Message::Ready(_) => {
                self.progress.ready_received = true;
                self.check_established();
            }
            Message::Ping(Ping { sequence, echo }) => {
                // A peer that does not read gets no answers piled up for it.
                if self.room(64) {
                    self.write_small(&Message::Pong(Pong { sequence, echo }));
                }
            }
            Message::Pong(Pong { sequence, echo }) => {
                let answer = self
                    .liveness
                    .as_mut()
                    .and_then(|l| l.pong(now, sequence, echo));
                if let Some(round_trip) = answer {
                    self.events.push_back(Event::Pong {
                        sequence,
                        round_trip,
                    });
                }
            }
            Message::Refuse(r) => return Err(SessionError::Rejected { reason: r.reason }),
            Message::ErrorReport(ErrorReport { code, text }) => {
                return Err(SessionError::PeerReported { code, text });
            }
            Message::Goodbye(g) => self.close_with(Closed::Goodbye(g.reason)),
            other => self.events.push_back(Event::Message(other)),
        }
        Ok(())
    }

    /// What a peer may say in this state.
    fn may_receive(&self, kind: MessageKind) -> bool {
        let p = &self.progress;
        match kind {
            MessageKind::Describe => p.theirs.is_none() && self.describes(self.side.other()),
            // The peer sends these once it has our description and has accepted it. Its own comes
            // before them; whether we have accepted that is not its business.
            MessageKind::QpOffer | MessageKind::QpAnswer | MessageKind::QpReset => {
                p.ours.is_some() && p.theirs.is_some()
            }
            MessageKind::Ready => p.ours.is_some() && p.theirs.is_some() && !p.ready_received,
            MessageKind::Bench => self.role == Role::Bench,
            MessageKind::Ping
            | MessageKind::Pong
            | MessageKind::Refuse
            | MessageKind::Goodbye
            | MessageKind::ErrorReport => true,
            MessageKind::Release
            | MessageKind::Announce
            | MessageKind::PushStart
            | MessageKind::PushDone
            | MessageKind::PushAborted
            | MessageKind::PushClosed
            | MessageKind::PushSums
            | MessageKind::PushTold
            | MessageKind::LinksWanted
            | MessageKind::LinksAnswer
            | MessageKind::Take
            | MessageKind::TakeStop
            | MessageKind::Taken
            | MessageKind::Stage
            | MessageKind::Staged
            | MessageKind::StageFree
            | MessageKind::SumsWanted
            | MessageKind::Sums
            | MessageKind::Revoke
            | MessageKind::Retracted => self.moves_blocks(),
        }
    }

    /// What the caller may send in this state with [`Session::send`].
    pub(super) fn may_send(&self, kind: MessageKind) -> bool {
        let state = self.state();
        let described = matches!(state, SessionState::Described | SessionState::Established);
        let p = &self.progress;
        match kind {
            _ if self.phase != Phase::Open => false,
            MessageKind::Describe => p.ours.is_none() && self.describes(self.side),
            MessageKind::QpOffer | MessageKind::QpAnswer | MessageKind::QpReset => described,
            MessageKind::Ready => described && !p.ready_sent,
            MessageKind::Bench => self.role == Role::Bench,
            MessageKind::Ping
            | MessageKind::Pong
            | MessageKind::Refuse
            | MessageKind::Goodbye
            | MessageKind::ErrorReport => false,
            MessageKind::Release
            | MessageKind::Announce
            | MessageKind::PushStart
            | MessageKind::PushDone
            | MessageKind::PushAborted
            | MessageKind::PushClosed
            | MessageKind::PushSums
            | MessageKind::PushTold
            | MessageKind::LinksWanted
            | MessageKind::LinksAnswer
            | MessageKind::Take
            | MessageKind::TakeStop
            | MessageKind::Taken
            | MessageKind::Stage
            | MessageKind::Staged
            | MessageKind::StageFree
            | MessageKind::SumsWanted
            | MessageKind::Sums
            | MessageKind::Revoke
            | MessageKind::Retracted => self.moves_blocks(),
        }
    }

    /// Whether a side says who it is: an observer does not, so that nothing follows its server's
    /// description but goodbye.
    fn describes(&self, side: Side) -> bool {
        self.role != Role::Observer || side == Side::Server
    }

    /// Whether messages about transfers have a place: a probe has none.
    fn moves_blocks(&self) -> bool {
        self.role != Role::Probe && self.state() == SessionState::Established
    }

    fn check_answer(&mut self, answer: &QpAnswer) -> Result<(), SessionError> {
        let Some(offered) = self.offers.remove(&answer.offer) else {
            return Err(SessionError::UnexpectedMessage {
                state: self.state(),
                got: MessageKind::QpAnswer,
            });
        };
        let expected = if answer.path.is_some() { offered } else { 0 };
        let got = answer.endpoints.len();
        // Rails may have been left out; which, the two descriptions tell, which are not read here.
        if got > expected || (got == 0 && expected > 0) {
            return Err(SessionError::AnswerMismatch {
                offer: answer.offer,
                expected,
                got,
            });
        }
        Ok(())
    }

    /// Whether one side wanted to reach another engine than the one at the other end.
    pub(super) fn wrong_engine(&self) -> Option<Refusal> {
        let (ours, theirs) = (self.progress.ours.as_ref()?, self.progress.theirs.as_ref()?);
        [(ours, theirs), (theirs, ours)]
            .into_iter()
            .find_map(|(from, to)| {
                let wanted = from.wanted.as_ref().filter(|w| **w != to.engine)?;
                Some(Refusal::WrongEngine {
                    here: to.engine.to_string(),
                    wanted: wanted.to_string(),
                })
            })
    }

    pub(super) fn check_established(&mut self) {
        if self.progress.ready_sent && self.progress.ready_received {
            self.deadline = Time::MAX;
            self.events.push_back(Event::Established);
        }
    }

    /// Whether a payload of `len` bytes may be queued. One message always may.
    pub(super) fn room(&self, len: usize) -> bool {
        let queued = self.queued();
        queued == 0 || queued + len + HEADER_LEN + TAG_LEN <= self.config.max_queued
    }

    pub(super) fn send_ping(&mut self, now: Time, wanted: bool) -> Option<u64> {
        let sequence = self.liveness.as_mut()?.ping(now, wanted);
        self.write_small(&Message::Ping(Ping {
            sequence,
            echo: now.0,
        }));
        Some(sequence)
    }

    /// Queues a message of the session's own, whose fields are in bounds by construction.
    pub(super) fn write_small(&mut self, message: &Message) {
        let max = self.peer_max_frame;
        let written = message.encode().and_then(|payload| {
            self.writer
                .write(message.kind() as u8, &payload, max, &mut self.out)
        });
        debug_assert!(written.is_ok(), "{written:?}");
    }

    /// Ends the session with a failure; the peer is told why if it can and should know.
    pub(super) fn fail(&mut self, error: SessionError) {
        match self.phase {
            Phase::Closed => return,
            Phase::Open => {
                if let Some(code) = error.report() {
                    let report = ErrorReport::new(code, &error.to_string());
                    self.write_small(&Message::ErrorReport(report));
                }
            }
            _ => {
                // Other refusals have been sent where they were found.
                if self.side == Side::Server
                    && matches!(
                        error,
                        SessionError::Wire(_) | SessionError::UnexpectedFrame { .. }
                    )
                {
                    self.reject(RejectCode::Malformed);
                }
            }
        }
        self.close_with(Closed::Failed(error));
    }

    pub(super) fn close_with(&mut self, closed: Closed) {
        if self.phase != Phase::Closed {
            self.phase = Phase::Closed;
            self.liveness = None;
            self.deadline = Time::MAX;
            self.events.push_back(Event::Closed(closed));
        }
    }
}
