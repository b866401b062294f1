//! A peer that authenticates and then says anything, to a server in each state.
//!
//! Input: one byte for the state and the role, then steps of one byte each: a frame (type, length,
//! payload), time that passes, or a local action.
#![no_main]

use std::time::Duration;

use kvxfer::ids::{Generation, Rank};
use kvxfer::session::{Event, Session, SessionConfig};
use kvxfer::time::Time;
use kvxfer::wire::{
    Auth, AuthMode, Blob, ConfigFacts, ConnectionKind, Describe, Fingerprint, FrameWriter,
    HandshakeNonce, Hello, KvRole, Message, PathKind, Preamble, QpOffer, RailEndpoint, Ready, Role, Side,
    Transcript, VERSIONS, frame_kind,
};
use libfuzzer_sys::fuzz_target;

fn describe() -> Describe {
    Describe {
        engine: "e".into(),
        generation: Generation([1; 16]),
        rank: Rank::default(),
        kv_role: KvRole::Both,
        wanted: None,
        fingerprint: Fingerprint([0; 32]),
        format: Blob::default(),
        placement: Blob::default(),
        rails: vec![],
        facts: ConfigFacts::default(),
        fd_backed: false,
        gpu: None,
        shared: None,
    }
}

struct Peer {
    session: Session,
    writer: FrameWriter,
    now: Time,
    closed: bool,
}

impl Peer {
    fn authenticated(role: Role) -> Peer {
        let config = SessionConfig {
            allow_bench: true,
            max_queued: 1 << 16,
            ..Default::default()
        };
        let mut session = Session::server(config, HandshakeNonce([2; 32]));
        let (mut writer, mut transcript) = (FrameWriter::new(), Transcript::new());
        let hello = Hello {
            versions: VERSIONS,
            nonce: HandshakeNonce([1; 32]),
            auth: AuthMode::None,
            role,
            max_frame: 1 << 16,
        };
        let mut bytes = Preamble {
            kind: ConnectionKind::Control,
        }
        .encode()
        .to_vec();
        writer
            .write(
                frame_kind::HELLO,
                &hello.encode().unwrap(),
                1 << 16,
                &mut bytes,
            )
            .unwrap();
        session.on_bytes(Time(0), &bytes);
        transcript.add(&bytes);
        transcript.add(session.transmit());
        let auth = Auth {
            proof: transcript.proof(None, Side::Client),
        };
        let mut bytes = Vec::new();
        writer
            .write(
                frame_kind::AUTH,
                &auth.encode().unwrap(),
                1 << 16,
                &mut bytes,
            )
            .unwrap();
        session.on_bytes(Time(0), &bytes);
        transcript.add(&bytes);
        writer.seal(transcript.keys(None).frames_from(Side::Client));
        assert!(matches!(
            session.poll_event(),
            Some(Event::Authenticated { .. })
        ));
        Peer {
            session,
            writer,
            now: Time(0),
            closed: false,
        }
    }

    fn say(&mut self, code: u8, payload: &[u8]) {
        let mut bytes = Vec::new();
        self.writer
            .write(code, payload, 1 << 24, &mut bytes)
            .unwrap();
        self.session.on_bytes(self.now, &bytes);
        self.check();
    }

    fn check(&mut self) {
        while let Some(event) = self.session.poll_event() {
            assert!(!self.closed, "after the end: {event:?}");
            self.closed = matches!(event, Event::Closed(_));
        }
        assert_eq!(self.closed, self.session.is_closed());
        assert!(self.session.queued() < 1 << 18);
        assert_eq!(self.session.next_timeout().is_some(), !self.closed);
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((stage, mut rest)) = data.split_first() else {
        return;
    };
    let role =
        [Role::Engine, Role::Bench, Role::Probe, Role::Observer][usize::from(stage >> 4) % 4];
    let mut peer = Peer::authenticated(role);
    // An observer describes nothing, and nothing comes after.
    let stage = if role == Role::Observer { 0 } else { *stage };
    if stage & 3 >= 1 {
        let message = Message::from(describe());
        peer.say(message.kind() as u8, &message.encode().unwrap());
        peer.session.send(&message).unwrap();
        peer.session.accept();
    }
    if stage & 3 >= 2 {
        peer.session.send(&Ready {}.into()).unwrap();
        peer.say(Message::from(Ready {}).kind() as u8, &[0x90]);
    }
    while let Some((step, after)) = rest.split_first() {
        rest = after;
        match step % 8 {
            0 => {
                peer.now = peer.now + Duration::from_millis(u64::from(*step) * 50);
                peer.session.on_time(peer.now);
            }
            1 => {
                let offer = QpOffer {
                    offer: u32::from(step >> 6),
                    replaces: None,
                    path: PathKind::Tcp,
                    candidates: vec![],
                    endpoints: vec![RailEndpoint::first(Blob::default()); usize::from(step >> 4) & 3],
                };
                let _ = peer.session.send(&offer.into());
            }
            2 => {
                let _ = peer.session.ping(peer.now);
            }
            3 => {
                let n = peer.session.queued() / 2 + 1;
                peer.session.transmitted(n);
            }
            _ => {
                let Some(([code, len], after)) = rest.split_first_chunk::<2>() else {
                    break;
                };
                let (payload, after) = after.split_at(usize::from(*len).min(after.len()));
                rest = after;
                peer.say(*code, payload);
            }
        }
        peer.check();
    }
    peer.session.on_eof(peer.now);
    peer.check();
    assert!(peer.closed);
});
