//! The handshake's part of the state machine: from the first byte to keys.
//!
//! Until the client's proof is verified a server says: its version range, whether it has a secret,
//! 32 random bytes, and a code for a refusal.

use crate::time::Time;
use crate::wire::{
    Auth, AuthMode, AuthOk, Challenge, ConnectionKind, Frame, FrameWriter, Hello,
    MAX_UNAUTHENTICATED_FRAME, Preamble, Refusal, Reject, RejectCode, Role, SessionKeys, Side,
    VersionRange, WireError, frame_kind,
};

use super::Event;
use super::error::{Party, SessionError};
use super::liveness::Liveness;
use super::machine::{Phase, Session};

const CONTROL: Preamble = Preamble {
    kind: ConnectionKind::Control,
};

/// What a listener without room writes to a new connection before it closes it, without a session:
/// a preamble and a refusal.
///
/// # Errors
///
/// [`WireError::Encode`]; the values here give none.
pub fn busy_reply(versions: VersionRange) -> Result<Vec<u8>, WireError> {
    let mut out = CONTROL.encode().to_vec();
    let reject = Reject {
        code: RejectCode::Busy,
        versions,
    };
    FrameWriter::new().write(
        frame_kind::REJECT,
        &reject.encode()?,
        MAX_UNAUTHENTICATED_FRAME,
        &mut out,
    )?;
    Ok(out)
}

impl Session {
    fn auth_mode(&self) -> AuthMode {
        if self.config.secret.is_some() {
            AuthMode::SharedSecret
        } else {
            AuthMode::None
        }
    }

    pub(super) fn send_hello(&mut self) -> Result<(), SessionError> {
        self.transcript.add(&CONTROL.encode());
        self.out.extend_from_slice(&CONTROL.encode());
        let hello = Hello {
            versions: self.config.versions,
            nonce: self.nonce,
            auth: self.auth_mode(),
            role: self.config.role,
            max_frame: self.config.max_frame,
        };
        self.send_handshake(frame_kind::HELLO, &hello.encode()?)
    }

    fn send_handshake(&mut self, kind: u8, payload: &[u8]) -> Result<(), SessionError> {
        let at = self.out.len();
        self.writer
            .write(kind, payload, MAX_UNAUTHENTICATED_FRAME, &mut self.out)?;
        if let Some(frame) = self.out.get(at..) {
            self.transcript.add(frame);
        }
        Ok(())
    }

    /// Tells an unauthenticated client why not, once it is known to speak this protocol.
    pub(super) fn reject(&mut self, code: RejectCode) {
        if !matches!(self.phase, Phase::AwaitHello | Phase::AwaitAuth) {
            return;
        }
        let reject = Reject {
            code,
            versions: self.config.versions,
        };
        // The session is closing: if this cannot be said, nothing else can.
        if let Ok(payload) = reject.encode() {
            let max = MAX_UNAUTHENTICATED_FRAME;
            let _ = self
                .writer
                .write(frame_kind::REJECT, &payload, max, &mut self.out);
        }
    }

    /// Takes the preamble from the front of `bytes`; returns what follows it once it is complete.
    pub(super) fn read_preamble<'a>(
        &mut self,
        bytes: &'a [u8],
    ) -> Result<Option<&'a [u8]>, SessionError> {
        let (preamble, used) = self.preamble.push(bytes)?;
        let Some(Preamble { kind }) = preamble else {
            return Ok(None);
        };
        if kind != ConnectionKind::Control {
            return Err(SessionError::Wire(WireError::ConnectionKind {
                expected: ConnectionKind::Control as u8,
                got: kind as u8,
            }));
        }
        self.transcript.add(&CONTROL.encode());
        self.phase = match self.side {
            Side::Client => Phase::AwaitChallenge,
            Side::Server => {
                // Only somebody who speaks this protocol is answered at all. The transcript gets
                // the answer after Hello, where it stands on the client's side too.
                self.out.extend_from_slice(&CONTROL.encode());
                Phase::AwaitHello
            }
        };
        Ok(Some(bytes.get(used..).unwrap_or_default()))
    }

    /// A frame before authentication.
    pub(super) fn on_handshake_frame(
        &mut self,
        now: Time,
        frame: &Frame,
    ) -> Result<(), SessionError> {
        match (self.phase, frame.kind) {
            (Phase::AwaitHello, frame_kind::HELLO) => self.on_hello(frame),
            (Phase::AwaitAuth, frame_kind::AUTH) => self.on_auth(now, frame),
            (Phase::AwaitChallenge, frame_kind::CHALLENGE) => self.on_challenge(frame),
            (Phase::AwaitAuthOk, frame_kind::AUTH_OK) => self.on_auth_ok(now, frame),
            (Phase::AwaitChallenge | Phase::AwaitAuthOk, frame_kind::REJECT) => {
                let Reject { code, versions } = Reject::decode(&frame.payload)?;
                Err(SessionError::rejected(code, self.config.versions, versions))
            }
            (_, code) => Err(SessionError::UnexpectedFrame { code }),
        }
    }

    fn note(&mut self, frame: &Frame) {
        self.transcript.add(&frame.header());
        self.transcript.add(&frame.payload);
    }

    fn on_hello(&mut self, frame: &Frame) -> Result<(), SessionError> {
        self.note(frame);
        self.transcript.add(&CONTROL.encode());
        let ours = self.config.versions;
        let theirs = Hello::decode_versions(&frame.payload)?;
        let Some(version) = ours.choose(theirs) else {
            self.reject(RejectCode::VersionMismatch);
            return Err(SessionError::VersionMismatch { ours, theirs });
        };
        let hello = Hello::decode(&frame.payload)?;
        match (self.auth_mode(), hello.auth) {
            (AuthMode::SharedSecret, AuthMode::None) => {
                self.reject(RejectCode::SecretRequired);
                return Err(SessionError::SecretMissing { side: Party::Peer });
            }
            (AuthMode::None, AuthMode::SharedSecret) => {
                self.reject(RejectCode::SecretUnexpected);
                return Err(SessionError::SecretMissing { side: Party::Us });
            }
            (AuthMode::None, AuthMode::None) | (AuthMode::SharedSecret, AuthMode::SharedSecret) => {
            }
        }
        self.version = version;
        self.role = hello.role;
        self.peer_max_frame = hello.max_frame.max(MAX_UNAUTHENTICATED_FRAME);
        let challenge = Challenge {
            version,
            nonce: self.nonce,
            auth: self.auth_mode(),
            max_frame: self.config.max_frame,
        };
        self.send_handshake(frame_kind::CHALLENGE, &challenge.encode()?)?;
        self.phase = Phase::AwaitAuth;
        Ok(())
    }

    fn on_challenge(&mut self, frame: &Frame) -> Result<(), SessionError> {
        self.note(frame);
        let challenge = Challenge::decode(&frame.payload)?;
        let ours = self.config.versions;
        if !ours.contains(challenge.version) {
            let theirs = VersionRange {
                min: challenge.version,
                max: challenge.version,
            };
            return Err(SessionError::VersionMismatch { ours, theirs });
        }
        match (self.auth_mode(), challenge.auth) {
            // Somebody in between may have taken our demand out of Hello: never go without.
            (AuthMode::SharedSecret, AuthMode::None) => {
                return Err(SessionError::SecretMissing { side: Party::Peer });
            }
            (AuthMode::None, AuthMode::SharedSecret) => {
                return Err(SessionError::SecretMissing { side: Party::Us });
            }
            (AuthMode::None, AuthMode::None) | (AuthMode::SharedSecret, AuthMode::SharedSecret) => {
            }
        }
        self.version = challenge.version;
        self.peer_max_frame = challenge.max_frame.max(MAX_UNAUTHENTICATED_FRAME);
        let proof = self
            .transcript
            .proof(self.config.secret.as_ref(), Side::Client);
        self.send_handshake(frame_kind::AUTH, &Auth { proof }.encode()?)?;
        self.phase = Phase::AwaitAuthOk;
        Ok(())
    }

    fn on_auth(&mut self, now: Time, frame: &Frame) -> Result<(), SessionError> {
        let auth = Auth::decode(&frame.payload)?;
        let secret = self.config.secret.as_ref();
        if !self.transcript.verify(secret, Side::Client, &auth.proof) {
            self.reject(RejectCode::NotAuthorised);
            return Err(SessionError::NotAuthorised);
        }
        self.note(frame);
        let secret = self.config.secret.as_ref();
        let keys = self.transcript.keys(secret);
        let proof = self.transcript.proof(secret, Side::Server);
        self.send_handshake(frame_kind::AUTH_OK, &AuthOk { proof }.encode()?)?;
        self.open(now, keys);
        if self.role == Role::Bench && !self.config.allow_bench {
            self.refuse(Refusal::RoleNotServed { role: self.role });
        }
        Ok(())
    }

    fn on_auth_ok(&mut self, now: Time, frame: &Frame) -> Result<(), SessionError> {
        let ok = AuthOk::decode(&frame.payload)?;
        let secret = self.config.secret.as_ref();
        // The transcript already holds our Auth, and not this frame.
        if !self.transcript.verify(secret, Side::Server, &ok.proof) {
            return Err(SessionError::NotAuthorised);
        }
        let keys = self.transcript.keys(secret);
        self.open(now, keys);
        Ok(())
    }

    /// Both have proved themselves: every later frame is sealed.
    fn open(&mut self, now: Time, keys: SessionKeys) {
        self.writer.seal(keys.frames_from(self.side));
        self.reader
            .unseal(keys.frames_from(self.side.other()), self.config.max_frame);
        self.events.push_back(Event::Authenticated {
            version: self.version,
            role: self.role,
            by_secret: self.config.secret.is_some(),
            session: keys.id,
        });
        self.keys = Some(keys);
        self.phase = Phase::Open;
        self.deadline = now + self.config.establish_timeout;
        self.liveness = Some(Liveness::new(
            now,
            self.config.heartbeat_interval,
            self.config.stall_after,
            self.config.dead_after,
        ));
    }
}
