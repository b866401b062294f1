//! Who is let in, and what a stranger learns.
use kvxfer::ids::Nonce;
use kvxfer::session::{
    Closed, Event, Party, SendError, Session, SessionConfig, SessionError, SessionState, busy_reply,
};
use kvxfer::time::Time;
use kvxfer::wire::*;
use proptest::collection::vec;
use proptest::prelude::*;

use crate::pair::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn two_sessions_meet_whatever_the_pieces(
        steps in vec(1usize..400, 1..20),
        with_secret in any::<bool>(),
        role in prop::sample::select(vec![Role::Engine, Role::Bench, Role::Probe]),
        versions in (1u16..5, 0u16..5, 1u16..5, 0u16..5),
    ) {
        let secret = if with_secret { secret("a long shared secret") } else { None };
        let range = |min, more| VersionRange { min, max: min + more };
        let (ours, theirs) = (range(versions.0, versions.1), range(versions.2, versions.3));
        let client = SessionConfig { role, versions: ours, ..config(secret.clone()) };
        let server = SessionConfig { allow_bench: true, versions: theirs, ..config(secret) };
        let mut pair = Pair::new(client, server);
        pair.settle(&steps);
        let Some(common) = ours.choose(theirs) else {
            let both = (
                SessionError::VersionMismatch { ours, theirs },
                SessionError::VersionMismatch { ours: theirs, theirs: ours },
            );
            prop_assert_eq!(pair.failures(), both);
            return Ok(());
        };
        for (s, log) in [(&pair.client, &pair.client_log), (&pair.server, &pair.server_log)] {
            prop_assert_eq!(s.state(), SessionState::Established);
            let session = s.session_id().unwrap();
            let first = Event::Authenticated { version: common, role, by_secret: with_secret, session };
            prop_assert_eq!(&log[0], &first);
            prop_assert_eq!(log.iter().filter(|e| **e == Event::Established).count(), 1);
        }
        prop_assert_eq!(pair.client.session_id(), pair.server.session_id());

        // Streams dialled by either side pass the other's gate, and not their own.
        let opening = StreamOpening {
            session: pair.client.session_id().unwrap(), qp: 5, half: StreamHalf::Requester, sequence: 0,
        };
        let bytes = opening.encode(&pair.client.stream_key().unwrap());
        prop_assert!(pair.server.stream_gate().unwrap().admit(&bytes).is_ok());
        prop_assert_eq!(
            pair.client.stream_gate().unwrap().admit(&bytes),
            Err(StreamRefused::NotAuthorised { qp: 5 })
        );
    }
}

#[test]
fn secrets_that_differ_or_lack_are_named_on_both_sides() {
    let with = || config(secret("one secret of some length"));
    let other = || config(secret("another secret of some length"));
    let cases = [
        (
            with(),
            other(),
            SessionError::NotAuthorised,
            SessionError::NotAuthorised,
        ),
        (
            with(),
            config(None),
            SessionError::SecretMissing { side: Party::Peer },
            SessionError::SecretMissing { side: Party::Us },
        ),
        (
            config(None),
            with(),
            SessionError::SecretMissing { side: Party::Us },
            SessionError::SecretMissing { side: Party::Peer },
        ),
    ];
    for (client, server, at_client, at_server) in cases {
        let mut pair = Pair::new(client, server);
        pair.settle(&[usize::MAX]);
        assert_eq!(pair.failures(), (at_client, at_server));
        assert!(pair.client.session_id().is_none() && pair.server.stream_key().is_none());
        assert!(pair.server.is_finished());
        assert_eq!(pair.server.next_timeout(), None);
    }
}

#[test]
fn a_side_with_a_secret_is_not_talked_out_of_it() {
    // Somebody in between tells each side that the other has no secret.
    let mut client = client_of(config(secret("one secret of some length")));
    let mut server = server_of(config(None));
    client.start(Time(0));
    server.start(Time(0));
    let bytes = client.transmit().to_vec();
    let mut reader = FrameReader::new(MAX_UNAUTHENTICATED_FRAME);
    reader.push(&bytes[PREAMBLE_LEN..]);
    let mut hello = Hello::decode(&reader.next_frame().unwrap().unwrap().payload).unwrap();
    hello.auth = AuthMode::None;
    let mut forged = bytes[..PREAMBLE_LEN].to_vec();
    FrameWriter::new()
        .write(
            frame_kind::HELLO,
            &hello.encode().unwrap(),
            1 << 16,
            &mut forged,
        )
        .unwrap();
    server.on_bytes(Time(0), &forged);
    assert!(!server.is_closed());
    move_bytes(&mut server, &mut client, Time(0), usize::MAX);
    let error = SessionError::SecretMissing { side: Party::Peer };
    assert_eq!(drain(&mut client), [Event::Closed(Closed::Failed(error))]);
}

#[test]
fn no_flipped_bit_in_the_handshake_is_authenticated() {
    for secret in [secret("one secret of some length"), None] {
        let (to_server, to_client) = handshake_bytes(secret.clone());
        for (flip_to_server, len) in [(true, to_server.len()), (false, to_client.len())] {
            for bit in 0..len * 8 {
                let mut c = client_of(config(secret.clone()));
                let mut s = server_of(config(secret.clone()));
                c.start(Time(0));
                let (mut sent_to_server, mut sent_to_client) = (0, 0);
                for _ in 0..4 {
                    for to_server in [true, false] {
                        let (from, to, sent) = if to_server {
                            (&mut c, &mut s, &mut sent_to_server)
                        } else {
                            (&mut s, &mut c, &mut sent_to_client)
                        };
                        let mut bytes = from.transmit().to_vec();
                        from.transmitted(bytes.len());
                        if to_server == flip_to_server
                            && let Some(byte) = (bit / 8usize)
                                .checked_sub(*sent)
                                .and_then(|at| bytes.get_mut(at))
                        {
                            *byte ^= 1 << (bit % 8);
                        }
                        *sent += bytes.len();
                        to.on_bytes(Time(0), &bytes);
                    }
                }
                let victim = if flip_to_server { &s } else { &c };
                assert!(
                    victim.session_id().is_none(),
                    "bit {bit}, to server: {flip_to_server}"
                );
            }
        }
    }
}

#[test]
fn a_recorded_conversation_authenticates_nobody_again() {
    let shared = secret("one secret of some length");
    let (to_server, to_client) = handshake_bytes(shared.clone());
    let mut s = Session::server(config(shared.clone()), HandshakeNonce([0x5f; 32]));
    s.on_bytes(Time(0), &to_server);
    assert_eq!(
        drain(&mut s),
        [Event::Closed(Closed::Failed(SessionError::NotAuthorised))]
    );
    let mut c = Session::client(config(shared), HandshakeNonce([0xc2; 32]));
    c.on_bytes(Time(0), &to_client);
    assert_eq!(
        drain(&mut c),
        [Event::Closed(Closed::Failed(SessionError::NotAuthorised))]
    );
}

#[test]
fn a_stranger_is_told_nothing_but_versions_and_a_nonce() {
    let mut s = server_of(config(secret("one secret of some length")));
    s.start(Time(0));
    let kind = MessageKind::Describe;
    let early = s.send(&plain_describe("very-secret-name").into());
    assert_eq!(
        early,
        Err(SendError::State {
            state: SessionState::Handshake,
            kind
        })
    );
    s.on_bytes(Time(0), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!(s.transmit(), b"", "a stranger to the protocol gets no byte");
    let http = SessionError::Wire(WireError::NotKvxfer { saw: Saw::Http });
    assert_eq!(drain(&mut s), [Event::Closed(Closed::Failed(http))]);

    let mut pair = Pair::new(
        config(secret("a guess of some length")),
        config(secret("one secret of some length")),
    );
    let mut seen = 0;
    for _ in 0..4 {
        move_bytes(&mut pair.client, &mut pair.server, pair.now, usize::MAX);
        seen += pair.server.transmit().len();
        move_bytes(&mut pair.server, &mut pair.client, pair.now, usize::MAX);
    }
    assert!(pair.server.is_closed());
    assert!(seen < 150, "{seen} bytes");
}

#[test]
fn a_full_listener_says_so_without_a_session() {
    let mut c = client_of(config(None));
    c.start(Time(0));
    c.on_bytes(Time(0), &busy_reply(VERSIONS).unwrap());
    c.on_eof(Time(0));
    assert_eq!(
        drain(&mut c),
        [Event::Closed(Closed::Failed(SessionError::Busy))]
    );
}

#[test]
fn a_client_names_a_server_that_is_something_else() {
    for (bytes, word) in [
        (b"HTTP/1.1 400 Bad Request\r\n".as_slice(), "HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH"),
        (b"\x15\x03\x01\x00\x02", "TLS"),
    ] {
        let mut c = client_of(config(None));
        c.start(Time(0));
        c.on_bytes(Time(0), bytes);
        match drain(&mut c).as_slice() {
            [Event::Closed(Closed::Failed(error))] => {
                assert!(error.to_string().contains(word), "{error}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn frames_replayed_or_reordered_inside_a_session_are_refused_and_reported() {
    for replay in [true, false] {
        let mut pair = Pair::established(config(None), config(None));
        let release = |n| {
            Release {
                request: "r".into(),
                nonce: Nonce(n),
            }
            .into()
        };
        pair.client.send(&release(1)).unwrap();
        let one = pair.client.transmit().to_vec();
        pair.client.transmitted(one.len());
        pair.client.send(&release(2)).unwrap();
        let two = pair.client.transmit().to_vec();
        let stream = if replay {
            [one.clone(), one].concat()
        } else {
            [two, one].concat()
        };
        pair.server.on_bytes(pair.now, &stream);
        let events = drain(&mut pair.server);
        assert_eq!(events.len(), 1 + usize::from(replay));
        assert!(matches!(
            events.last(),
            Some(Event::Closed(Closed::Failed(SessionError::Wire(
                WireError::OutOfSequence { .. }
            ))))
        ));
        move_bytes(&mut pair.server, &mut pair.client, pair.now, usize::MAX);
        assert!(matches!(
            drain(&mut pair.client).as_slice(),
            [Event::Closed(Closed::Failed(SessionError::PeerReported {
                code: ErrorCode::Protocol,
                ..
            }))]
        ));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn an_altered_session_delivers_nothing_of_the_altered_frame(
        which in any::<prop::sample::Index>(),
        bit in 0u8..8,
    ) {
        let mut pair = Pair::established(config(None), config(None));
        pair.client.send(&Announce { ticket: Blob(vec![5; 64]) }.into()).unwrap();
        let mut bytes = pair.client.transmit().to_vec();
        let at = which.index(bytes.len());
        bytes[at] ^= 1 << bit;
        pair.server.on_bytes(pair.now, &bytes);
        let events = drain(&mut pair.server);
        // A changed length may also leave it waiting for more.
        let fine = matches!(
            events.as_slice(),
            [Event::Closed(Closed::Failed(SessionError::Wire(
                WireError::BadMac { .. } | WireError::FrameTooLarge { .. }
            )))]
        ) || (events.is_empty() && at < 4);
        prop_assert!(fine, "{:?}", events);
    }
}
