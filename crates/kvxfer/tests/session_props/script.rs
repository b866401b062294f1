//! A peer written out by hand that authenticates and then breaks the rules.
use kvxfer::ids::{Nonce, RequestId};
use kvxfer::session::{Closed, Event, Session, SessionConfig, SessionError, SessionState};
use kvxfer::time::Time;
use kvxfer::wire::*;
use proptest::collection::vec;
use proptest::prelude::*;

use crate::messages::message;
use crate::pair::*;

/// A client made of wire functions only, that can say anything once authenticated.
struct Script {
    server: Session,
    writer: FrameWriter,
}

impl Script {
    fn authenticated(role: Role) -> Script {
        let shared = secret("one secret of some length");
        let serve = SessionConfig {
            allow_bench: true,
            ..config(shared.clone())
        };
        let mut server = server_of(serve);
        server.start(Time(0));
        let (mut writer, mut t) = (FrameWriter::new(), Transcript::new());
        let preamble = Preamble {
            kind: ConnectionKind::Control,
        }
        .encode();
        let hello = Hello {
            versions: VERSIONS,
            nonce: HandshakeNonce([3; 32]),
            auth: AuthMode::SharedSecret,
            role,
            max_frame: 1 << 20,
        };
        let mut bytes = preamble.to_vec();
        writer
            .write(
                frame_kind::HELLO,
                &hello.encode().unwrap(),
                1 << 16,
                &mut bytes,
            )
            .unwrap();
        server.on_bytes(Time(0), &bytes);
        let answer = server.transmit().to_vec();
        server.transmitted(answer.len());
        t.add(&bytes);
        t.add(&answer);
        let mut reader = FrameReader::new(1 << 16);
        reader.push(&answer[PREAMBLE_LEN..]);
        let challenge = reader.next_frame().unwrap().unwrap();
        assert_eq!(challenge.kind, frame_kind::CHALLENGE);
        assert_eq!(Challenge::decode(&challenge.payload).unwrap().version, 1);
        let auth = Auth {
            proof: t.proof(shared.as_ref(), Side::Client),
        };
        let mut bytes = vec![];
        writer
            .write(
                frame_kind::AUTH,
                &auth.encode().unwrap(),
                1 << 16,
                &mut bytes,
            )
            .unwrap();
        t.add(&bytes);
        server.on_bytes(Time(0), &bytes);
        let answer = server.transmit().to_vec();
        server.transmitted(answer.len());
        reader.push(&answer);
        let ok = reader.next_frame().unwrap().unwrap();
        assert_eq!(ok.kind, frame_kind::AUTH_OK);
        let ok = AuthOk::decode(&ok.payload).unwrap();
        assert!(t.verify(shared.as_ref(), Side::Server, &ok.proof));
        let keys = t.keys(shared.as_ref());
        assert_eq!(server.session_id(), Some(keys.id));
        writer.seal(keys.frames_from(Side::Client));
        assert!(matches!(
            drain(&mut server).as_slice(),
            [Event::Authenticated { .. }]
        ));
        Script { server, writer }
    }

    fn say_raw(&mut self, code: u8, payload: &[u8]) -> Vec<Event> {
        let mut bytes = vec![];
        self.writer
            .write(code, payload, 1 << 24, &mut bytes)
            .unwrap();
        self.server.on_bytes(Time(0), &bytes);
        drain(&mut self.server)
    }

    fn say(&mut self, message: impl Into<Message>) -> Vec<Event> {
        let message = message.into();
        self.say_raw(message.kind() as u8, &message.encode().unwrap())
    }

    fn described(role: Role) -> Script {
        let mut script = Script::authenticated(role);
        assert!(matches!(
            script.say(plain_describe("a")).as_slice(),
            [Event::PeerDescribed(_)]
        ));
        script.server.send(&plain_describe("b").into()).unwrap();
        script.server.accept();
        script
    }

    fn established() -> Script {
        Script::established_as(Role::Engine)
    }

    fn established_as(role: Role) -> Script {
        let mut script = Script::described(role);
        script.server.send(&Ready {}.into()).unwrap();
        assert_eq!(script.say(Ready {}), [Event::Established]);
        script
    }
}

fn failed(events: &[Event]) -> &SessionError {
    match events {
        [Event::Closed(Closed::Failed(error))] => error,
        other => panic!("not cut off: {other:?}"),
    }
}

#[test]
fn what_the_state_does_not_allow_is_cut_off() {
    use MessageKind as K;
    let r = || (RequestId::from("r"), Nonce(1));
    let offer = QpOffer {
        offer: 1,
        replaces: None,
        path: PathKind::Tcp,
        candidates: vec![],
        endpoints: vec![],
    };
    let answer = |path, n| QpAnswer {
        offer: 1,
        path,
        candidates: vec![],
        endpoints: vec![RailEndpoint::first(Blob(vec![])); n],
    };
    let release = || {
        Message::from(Release {
            request: r().0,
            nonce: r().1,
        })
    };
    let unexpected = |s: &mut Script, m: Message, state| {
        let got = m.kind();
        assert_eq!(
            *failed(&s.say(m)),
            SessionError::UnexpectedMessage { state, got }
        );
        assert!(s.server.queued() > 0, "the peer is told");
    };
    let authed = SessionState::Authenticated;
    for early in [
        Message::from(offer.clone()),
        answer(None, 0).into(),
        Ready {}.into(),
        release(),
    ] {
        unexpected(&mut Script::authenticated(Role::Engine), early, authed);
    }
    let bench = Bench {
        payload: Blob(vec![1]),
    };
    unexpected(
        &mut Script::authenticated(Role::Engine),
        bench.clone().into(),
        authed,
    );
    let got = Script::authenticated(Role::Bench).say(bench.clone());
    assert_eq!(got, [Event::Message(bench.clone().into())]);
    let described = SessionState::Described;
    unexpected(
        &mut Script::described(Role::Engine),
        plain_describe("a").into(),
        described,
    );
    unexpected(&mut Script::described(Role::Engine), release(), described);
    unexpected(
        &mut Script::established(),
        Ready {}.into(),
        SessionState::Established,
    );
    assert_eq!(
        Script::established().say(release()),
        [Event::Message(release())]
    );

    // A probe moves no blocks.
    for no_place in [
        release(),
        PushStart {
            request: r().0,
            nonce: None,
        }
        .into(),
        bench.into(),
    ] {
        unexpected(
            &mut Script::established_as(Role::Probe),
            no_place,
            SessionState::Established,
        );
    }

    // An observer has nothing to say but goodbye.
    for no_place in [
        plain_describe("a").into(),
        offer.clone().into(),
        Ready {}.into(),
        release(),
    ] {
        let mut s = Script::authenticated(Role::Observer);
        s.server.send(&plain_describe("b").into()).unwrap();
        unexpected(&mut s, no_place, authed);
    }
    let mut s = Script::authenticated(Role::Observer);
    s.server.send(&plain_describe("b").into()).unwrap();
    let reason = GoodbyeReason::Finished;
    assert_eq!(
        s.say(Goodbye { reason }),
        [Event::Closed(Closed::Goodbye(reason))]
    );

    // Answers must answer something, with no more endpoints.
    unexpected(
        &mut Script::described(Role::Engine),
        answer(None, 0).into(),
        described,
    );
    for (path, n, fine) in [
        (Some(PathKind::Tcp), 2, true),
        (None, 0, true),
        (Some(PathKind::Tcp), 1, true),
        (Some(PathKind::Tcp), 0, false),
        (Some(PathKind::Tcp), 3, false),
        (None, 2, false),
    ] {
        let mut s = Script::described(Role::Engine);
        let two = QpOffer {
            endpoints: vec![RailEndpoint::first(Blob(vec![])); 2],
            ..offer.clone()
        };
        s.server.send(&two.into()).unwrap();
        let events = s.say(answer(path, n));
        if fine {
            assert!(matches!(events.as_slice(), [Event::QpAnswer(_)]));
            unexpected(&mut s, answer(path, n).into(), described);
        } else {
            let expected = if path.is_some() { 2 } else { 0 };
            let error = SessionError::AnswerMismatch {
                offer: 1,
                expected,
                got: n,
            };
            assert_eq!(*failed(&events), error);
        }
    }
    // Handshake frames and unknown ones, sealed.
    for code in [
        frame_kind::HELLO,
        frame_kind::REJECT,
        0x00,
        0x0f,
        0x40,
        0xff,
    ] {
        let events = Script::established().say_raw(code, &[]);
        assert_eq!(
            *failed(&events),
            SessionError::Wire(WireError::UnknownFrame { code })
        );
    }
    let events = Script::established().say_raw(K::Release as u8, &[0xc1]);
    assert!(matches!(
        failed(&events),
        SessionError::Wire(WireError::Decode {
            what: "Release",
            ..
        })
    ));
}

#[test]
fn a_later_hello_is_answered_with_versions_and_nonsense_with_malformed() {
    let later = Blob::pack("x", &((7u16, 9u16), vec!["anything"]))
        .unwrap()
        .0;
    let cases = [
        (later, RejectCode::VersionMismatch),
        (vec![0xc1], RejectCode::Malformed),
    ];
    for (payload, code) in cases {
        let mut s = server_of(config(None));
        let mut bytes = Preamble {
            kind: ConnectionKind::Control,
        }
        .encode()
        .to_vec();
        FrameWriter::new()
            .write(frame_kind::HELLO, &payload, 1 << 16, &mut bytes)
            .unwrap();
        s.on_bytes(Time(0), &bytes);
        assert!(s.is_closed());
        let mut reader = FrameReader::new(1 << 16);
        reader.push(&s.transmit()[PREAMBLE_LEN..]);
        let frame = reader.next_frame().unwrap().unwrap();
        assert_eq!(frame.kind, frame_kind::REJECT);
        let reject = Reject::decode(&frame.payload).unwrap();
        assert_eq!(
            reject,
            Reject {
                code,
                versions: VERSIONS
            }
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn an_authenticated_peer_that_says_anything_ends_the_session_at_most_once(
        said in vec(
            prop_oneof![
                message().prop_map(|m| (m.kind() as u8, m.encode().unwrap())),
                (any::<u8>(), vec(any::<u8>(), 0..64)),
            ],
            0..20,
        ),
        stage in 0..3,
    ) {
        let mut s = match stage {
            0 => Script::authenticated(Role::Bench),
            1 => Script::described(Role::Engine),
            _ => Script::established(),
        };
        let mut closed = 0;
        for (code, payload) in said {
            for event in s.say_raw(code, &payload) {
                prop_assert_eq!(closed, 0, "an event after the end: {:?}", event);
                closed += usize::from(matches!(event, Event::Closed(_)));
            }
        }
        prop_assert_eq!(closed == 1, s.server.is_closed());
        prop_assert!(s.server.queued() < 1 << 20);
    }
}
