//! The control connection against itself, against a peer written out by hand from
//! docs/wire-format.md, and against altered bytes; all in virtual time.

use std::io::ErrorKind;
use std::time::Duration;

use kvxfer::ids::{EngineId, Generation, Nonce, Rank, RequestId};
use kvxfer::session::{
    Closed, Event, Party, SendError, Session, SessionConfig, SessionError, SessionState, busy_reply,
};
use kvxfer::time::Time;
use kvxfer::wire::*;
use proptest::collection::vec;
use proptest::prelude::*;

const MS: Duration = Duration::from_millis(1);

// ---- messages ---------------------------------------------------------------------------------

fn text() -> impl Strategy<Value = String> {
    vec(
        prop_oneof![prop::char::range(' ', '~'), Just('é'), Just('漢')],
        0..20,
    )
    .prop_map(|c| c.into_iter().collect())
}

fn blob() -> impl Strategy<Value = Blob> {
    vec(any::<u8>(), 0..300).prop_map(Blob)
}

fn span() -> impl Strategy<Value = RemoteSpan> {
    (any::<u64>(), 1u64.., any::<u32>()).prop_map(|(a, len, rkey)| RemoteSpan {
        addr: a.min(u64::MAX - len),
        len,
        rkey,
    })
}

fn rank() -> impl Strategy<Value = Rank> {
    any::<(u32, u32, u32)>().prop_map(|(dp, pp, tp)| Rank { dp, pp, tp })
}

fn path() -> impl Strategy<Value = PathKind> {
    use PathKind::*;
    prop::sample::select(vec![Arena, ProcessVm, Tcp, Rdma, Ipc, Staged])
}

fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
    vec((path(), prop::option::of(text())), 0..6).prop_map(|v| {
        v.into_iter()
            .map(|(path, why_not)| Candidate { path, why_not })
            .collect()
    })
}

fn describe() -> impl Strategy<Value = Describe> {
    let kv_role = prop::sample::select(vec![KvRole::Producer, KvRole::Consumer, KvRole::Both]);
    let facts = (any::<[u32; 4]>(), any::<u64>(), any::<bool>(), any::<u16>()).prop_map(
        |([a, b, c, d], max_msg_bytes, enable_notification, listen_port)| ConfigFacts {
            qp_per_transfer: a,
            max_send_wr: b,
            max_msg_sge: c,
            max_msg_bytes,
            enable_notification,
            num_worker_threads: d,
            listen_port,
        },
    );
    (
        (
            text(),
            any::<[u8; 16]>(),
            rank(),
            kv_role,
            prop::option::of(text()),
            any::<[u8; 32]>(),
        ),
        (
            blob(),
            blob(),
            vec(span(), 0..5),
            prop::option::of(span()),
            prop::option::of(span()),
        ),
        (blob(), facts, any::<bool>()),
    )
        .prop_map(
            |((engine, g, rank, kv_role, wanted, f), (format, placement, m, l, s), d)| Describe {
                engine: engine.as_str().into(),
                generation: Generation(g),
                rank,
                kv_role,
                wanted: wanted.map(|w| w.as_str().into()),
                fingerprint: Fingerprint(f),
                format,
                placement,
                memories: m,
                leases: l,
                scratch: s,
                device: d.0,
                facts: d.1,
                fd_backed: d.2,
            },
        )
}

fn refusal() -> impl Strategy<Value = Refusal> {
    prop_oneof![
        text().prop_map(|detail| Refusal::FormatMismatch { detail }),
        (text(), text()).prop_map(|(here, wanted)| Refusal::WrongEngine { here, wanted }),
        Just(Refusal::SameRole {
            role: KvRole::Producer
        }),
        Just(Refusal::RoleNotServed { role: Role::Bench }),
        Just(Refusal::GenerationRetired),
        text().prop_map(|detail| Refusal::NoPath { detail }),
        text().prop_map(|detail| Refusal::BadDescription { detail }),
        (text(), any::<u64>()).prop_map(|(what, limit)| Refusal::Full { what, limit }),
    ]
}

fn request() -> impl Strategy<Value = (RequestId, Nonce)> {
    (text(), any::<u64>()).prop_map(|(r, n)| (r.into(), Nonce(n)))
}

/// One strategy a kind; the match fails to compile when a kind is added without one.
fn message_of(kind: MessageKind) -> BoxedStrategy<Message> {
    use GoodbyeReason::*;
    match kind {
        MessageKind::Describe => describe().prop_map(Message::from).boxed(),
        MessageKind::Refuse => refusal()
            .prop_map(|reason| Refuse { reason }.into())
            .boxed(),
        MessageKind::QpOffer => (
            any::<u32>(),
            any::<Option<u32>>(),
            path(),
            candidates(),
            vec(blob(), 0..5),
        )
            .prop_map(|(offer, replaces, path, candidates, endpoints)| {
                QpOffer {
                    offer,
                    replaces,
                    path,
                    candidates,
                    endpoints,
                }
                .into()
            })
            .boxed(),
        MessageKind::QpAnswer => (
            any::<u32>(),
            prop::option::of(path()),
            candidates(),
            vec(blob(), 0..5),
        )
            .prop_map(|(offer, path, candidates, endpoints)| {
                QpAnswer {
                    offer,
                    path,
                    candidates,
                    endpoints,
                }
                .into()
            })
            .boxed(),
        MessageKind::QpReset => (any::<u32>(), any::<bool>(), blob())
            .prop_map(|(offer, offered_by_receiver, cause)| {
                QpReset {
                    offer,
                    offered_by_receiver,
                    cause,
                }
                .into()
            })
            .boxed(),
        MessageKind::Ready => Just(Ready {}.into()).boxed(),
        MessageKind::Ping => any::<(u64, u64)>()
            .prop_map(|(sequence, echo)| Ping { sequence, echo }.into())
            .boxed(),
        MessageKind::Pong => any::<(u64, u64)>()
            .prop_map(|(sequence, echo)| Pong { sequence, echo }.into())
            .boxed(),
        MessageKind::Release => request()
            .prop_map(|(request, nonce)| Release { request, nonce }.into())
            .boxed(),
        MessageKind::PushStart => (request(), any::<bool>())
            .prop_map(|((request, nonce), known)| {
                PushStart {
                    request,
                    nonce: known.then_some(nonce),
                }
                .into()
            })
            .boxed(),
        MessageKind::Announce => blob().prop_map(|ticket| Announce { ticket }.into()).boxed(),
        MessageKind::PushDone => (request(), rank(), any::<u64>())
            .prop_map(|((request, nonce), sender, bytes)| {
                PushDone {
                    request,
                    nonce,
                    sender,
                    bytes,
                }
                .into()
            })
            .boxed(),
        MessageKind::PushAborted => (request(), rank(), blob())
            .prop_map(|((request, nonce), sender, cause)| {
                PushAborted {
                    request,
                    nonce,
                    sender,
                    cause,
                }
                .into()
            })
            .boxed(),
        MessageKind::PushClosed => (request(), rank(), blob())
            .prop_map(|((request, nonce), sender, cause)| {
                PushClosed {
                    request,
                    nonce,
                    sender,
                    cause,
                }
                .into()
            })
            .boxed(),
        MessageKind::Revoke => (request(), blob())
            .prop_map(|((request, nonce), cause)| {
                Revoke {
                    request,
                    nonce,
                    cause,
                }
                .into()
            })
            .boxed(),
        MessageKind::Retracted => request()
            .prop_map(|(request, nonce)| Retracted { request, nonce }.into())
            .boxed(),
        MessageKind::Bench => blob().prop_map(|payload| Bench { payload }.into()).boxed(),
        MessageKind::Goodbye => prop::sample::select(vec![ShuttingDown, Finished, Replaced])
            .prop_map(|reason| Goodbye { reason }.into())
            .boxed(),
        MessageKind::ErrorReport => text()
            .prop_map(|t| ErrorReport::new(ErrorCode::Lie, &t).into())
            .boxed(),
        other => panic!("no strategy for {other}"),
    }
}

fn message() -> impl Strategy<Value = Message> {
    prop::sample::select(MessageKind::ALL.to_vec()).prop_flat_map(message_of)
}

proptest! {
    #[test]
    fn messages_round_trip(message in message()) {
        let bytes = message.encode().unwrap();
        let code = message.kind() as u8;
        prop_assert_eq!(MessageKind::from_code(code), Some(message.kind()));
        prop_assert_eq!(&Message::decode(code, &bytes).unwrap(), &message);
        let longer = [bytes.as_slice(), &[0xc0]].concat();
        let is_trailing = matches!(Message::decode(code, &longer), Err(WireError::Trailing { extra: 1, .. }));
        prop_assert!(is_trailing);
        for cut in 0..bytes.len() {
            prop_assert!(Message::decode(code, &bytes[..cut]).is_err(), "cut at {}", cut);
        }
    }

    #[test]
    fn altered_messages_are_decoded_or_refused_but_what_is_decoded_is_in_bounds(
        message in message(),
        flips in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        code in any::<u8>(),
    ) {
        let mut bytes = message.encode().unwrap();
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        for code in [message.kind() as u8, code] {
            if let Ok(other) = Message::decode(code, &bytes) {
                prop_assert!(other.encode().is_ok(), "{:?}", other);
            }
        }
    }

    #[test]
    fn any_split_of_the_stream_gives_the_same_frames(
        payloads in vec(vec(any::<u8>(), 0..2000), 1..8),
        cuts in vec(1usize..700, 1..50),
        sealed in any::<bool>(),
    ) {
        let keys = Transcript::new().keys(None);
        let (mut writer, mut reader) = (FrameWriter::new(), FrameReader::new(1 << 16));
        if sealed {
            writer.seal(keys.frames_from(Side::Client));
            reader.unseal(keys.frames_from(Side::Client), 1 << 16);
        }
        let mut bytes = Vec::new();
        for (i, p) in payloads.iter().enumerate() {
            writer.write(i as u8, p, 1 << 16, &mut bytes).unwrap();
        }
        let mut rest = bytes.as_slice();
        let mut got = Vec::new();
        for cut in cuts.iter().cycle() {
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            reader.push(now);
            while let Some(frame) = reader.next_frame().unwrap() {
                got.push(frame);
            }
            rest = later;
            if rest.is_empty() { break; }
        }
        prop_assert_eq!(reader.buffered(), 0);
        prop_assert_eq!(got.len(), payloads.len());
        for (i, frame) in got.iter().enumerate() {
            prop_assert_eq!((frame.kind, frame.sequence), (i as u8, i as u64));
            prop_assert_eq!(&frame.payload, &payloads[i]);
        }
    }

    #[test]
    fn garbage_never_panics_and_never_authenticates(
        bytes in vec(any::<u8>(), 0..500),
        after_preamble in any::<bool>(),
        client in any::<bool>(),
    ) {
        let mut s = if client { client_of(config(None)) } else { server_of(config(None)) };
        s.start(Time(0));
        if after_preamble {
            s.on_bytes(Time(0), &Preamble { kind: ConnectionKind::Control }.encode());
        }
        s.on_bytes(Time(0), &bytes);
        s.on_eof(Time(0));
        let events = drain(&mut s);
        prop_assert!(matches!(events.as_slice(), [Event::Closed(Closed::Failed(_))]));
    }
}

#[test]
fn fields_out_of_bounds_are_refused_on_both_ways() {
    let span = |addr, len| RemoteSpan { addr, len, rkey: 1 };
    let good = plain_describe("engine");
    let cases: Vec<(&str, Describe)> = vec![
        (
            "memory",
            Describe {
                memories: vec![span(u64::MAX, 1)],
                ..good.clone()
            },
        ),
        (
            "memory",
            Describe {
                memories: vec![span(4096, 0)],
                ..good.clone()
            },
        ),
        (
            "lease table",
            Describe {
                leases: Some(span(u64::MAX - 9, 10)),
                ..good.clone()
            },
        ),
        (
            "scratch",
            Describe {
                scratch: Some(span(1, u64::MAX)),
                ..good.clone()
            },
        ),
        (
            "engine id",
            Describe {
                engine: "x".repeat(limits::ENGINE_ID + 1).as_str().into(),
                ..good.clone()
            },
        ),
        (
            "engine id",
            Describe {
                engine: "a\x1b[2Jb".into(),
                ..good.clone()
            },
        ),
        (
            "number of memories",
            Describe {
                memories: vec![span(0, 1); limits::MEMORIES + 1],
                ..good.clone()
            },
        ),
        (
            "format size",
            Describe {
                format: Blob(vec![0; limits::FORMAT + 1]),
                ..good.clone()
            },
        ),
    ];
    for (what, bad) in cases {
        let raw = Blob::pack("raw", &bad).unwrap().0;
        let decoded = Message::decode(MessageKind::Describe as u8, &raw).unwrap_err();
        assert!(decoded.to_string().contains(what), "{decoded}");
        assert_eq!(Message::from(bad).encode(), Err(decoded));
    }
    let huge = vec![0; MessageKind::Ping.max_len() + 1];
    let error = Message::decode(MessageKind::Ping as u8, &huge).unwrap_err();
    assert!(matches!(error, WireError::OutOfBounds { what: "Ping", .. }));
    assert_eq!(
        Message::decode(0x7f, &[]),
        Err(WireError::UnknownFrame { code: 0x7f })
    );
}

// ---- two sessions --------------------------------------------------------------------------------

fn secret(text: &str) -> Option<Secret> {
    Some(Secret::new(text.as_bytes().to_vec()).unwrap())
}

fn config(secret: Option<Secret>) -> SessionConfig {
    SessionConfig {
        secret,
        ..SessionConfig::default()
    }
}

fn client_of(config: SessionConfig) -> Session {
    Session::client(config, HandshakeNonce([0xc1; 32]))
}

fn server_of(config: SessionConfig) -> Session {
    Session::server(config, HandshakeNonce([0x5e; 32]))
}

fn plain_describe(engine: &str) -> Describe {
    Describe {
        engine: engine.into(),
        generation: Generation([7; 16]),
        rank: Rank::default(),
        kv_role: KvRole::Both,
        wanted: None,
        fingerprint: Fingerprint([1; 32]),
        format: Blob(vec![1, 2, 3]),
        placement: Blob(vec![4; 100]),
        memories: vec![RemoteSpan {
            addr: 0x1000,
            len: 1 << 32,
            rkey: 77,
        }],
        leases: Some(RemoteSpan {
            addr: 0x2000,
            len: 64,
            rkey: 78,
        }),
        scratch: Some(RemoteSpan {
            addr: 0x3000,
            len: 4096,
            rkey: 79,
        }),
        device: Blob(vec![9; 40]),
        facts: ConfigFacts {
            qp_per_transfer: 4,
            ..ConfigFacts::default()
        },
        fd_backed: true,
    }
}

fn drain(s: &mut Session) -> Vec<Event> {
    std::iter::from_fn(|| s.poll_event()).collect()
}

/// Moves at most `step` bytes from one to the other; returns whether any moved.
fn move_bytes(from: &mut Session, to: &mut Session, now: Time, step: usize) -> bool {
    let n = from.transmit().len().min(step);
    let bytes = from.transmit()[..n].to_vec();
    from.transmitted(n);
    to.on_bytes(now, &bytes);
    n > 0
}

/// What an engine does with events until it is ready: describe, accept, exchange one offer.
fn behave(s: &mut Session, log: &mut Vec<Event>, engine: &str) {
    while let Some(event) = s.poll_event() {
        match &event {
            // The end may have come in the same bytes as what is told first.
            _ if s.is_closed() => {}
            Event::Authenticated { .. } => s.send(&plain_describe(engine).into()).unwrap(),
            Event::PeerDescribed(d) => {
                assert_eq!(d.memories.len(), 1);
                s.accept();
                if s.side() == Side::Client {
                    let offer = QpOffer {
                        offer: 3,
                        replaces: None,
                        path: PathKind::Arena,
                        candidates: vec![],
                        endpoints: vec![Blob(vec![1]), Blob(vec![2])],
                    };
                    s.send(&offer.into()).unwrap();
                }
            }
            Event::QpOffer(o) => {
                let answer = QpAnswer {
                    offer: o.offer,
                    path: Some(o.path),
                    candidates: vec![],
                    endpoints: o.endpoints.clone(),
                };
                s.send(&answer.into()).unwrap();
                s.send(&Ready {}.into()).unwrap();
            }
            Event::QpAnswer(_) => s.send(&Ready {}.into()).unwrap(),
            _ => {}
        }
        log.push(event);
    }
}

struct Pair {
    client: Session,
    server: Session,
    now: Time,
    client_log: Vec<Event>,
    server_log: Vec<Event>,
}

impl Pair {
    fn new(client: SessionConfig, server: SessionConfig) -> Pair {
        let mut pair = Pair {
            client: client_of(client),
            server: server_of(server),
            now: Time::from_secs(100),
            client_log: vec![],
            server_log: vec![],
        };
        pair.client.start(pair.now);
        pair.server.start(pair.now);
        pair
    }

    /// Lets both run until nothing moves.
    fn settle(&mut self, steps: &[usize]) {
        for step in steps.iter().cycle() {
            let a = move_bytes(&mut self.client, &mut self.server, self.now, *step);
            let b = move_bytes(&mut self.server, &mut self.client, self.now, *step);
            behave(&mut self.client, &mut self.client_log, "decode");
            behave(&mut self.server, &mut self.server_log, "prefill");
            if !a && !b && self.client.queued() == 0 && self.server.queued() == 0 {
                return;
            }
        }
    }

    fn established(client: SessionConfig, server: SessionConfig) -> Pair {
        let mut pair = Pair::new(client, server);
        pair.settle(&[usize::MAX]);
        assert_eq!(
            pair.client.state(),
            SessionState::Established,
            "{:?}",
            pair.client_log
        );
        assert_eq!(
            pair.server.state(),
            SessionState::Established,
            "{:?}",
            pair.server_log
        );
        pair.client_log.clear();
        pair.server_log.clear();
        pair
    }

    fn failures(&self) -> (SessionError, SessionError) {
        let one = |log: &[Event]| match log.last() {
            Some(Event::Closed(Closed::Failed(error))) => error.clone(),
            other => panic!("not failed: {other:?}"),
        };
        assert!(
            !self
                .client_log
                .iter()
                .any(|e| matches!(e, Event::PeerDescribed(_)))
        );
        (one(&self.client_log), one(&self.server_log))
    }
}

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

/// The bytes that each side sends until both are authenticated.
fn handshake_bytes(secret: Option<Secret>) -> (Vec<u8>, Vec<u8>) {
    let (mut c, mut s) = (client_of(config(secret.clone())), server_of(config(secret)));
    c.start(Time(0));
    let (mut to_server, mut to_client) = (vec![], vec![]);
    for _ in 0..4 {
        to_server.extend_from_slice(c.transmit());
        move_bytes(&mut c, &mut s, Time(0), usize::MAX);
        to_client.extend_from_slice(s.transmit());
        move_bytes(&mut s, &mut c, Time(0), usize::MAX);
    }
    assert!(c.session_id().is_some() && c.session_id() == s.session_id());
    (to_server, to_client)
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

// ---- time ----------------------------------------------------------------------------------------

/// Runs a session's timers up to `until`, as a driver does that is never late.
fn run_until(s: &mut Session, until: Time) {
    while let Some(t) = s.next_timeout().filter(|t| *t <= until) {
        s.on_time(t);
    }
}

#[test]
fn silence_is_a_stall_then_the_end() {
    let mut pair = Pair::established(config(None), config(None));
    let t0 = pair.now;
    let c = &mut pair.client;
    run_until(c, t0 + Duration::from_millis(4999));
    assert!(drain(c).is_empty());
    run_until(c, t0 + Duration::from_secs(5));
    assert_eq!(
        drain(c),
        [Event::Stalled {
            silent: Duration::from_secs(5)
        }]
    );
    run_until(c, t0 + Duration::from_millis(14_999));
    assert!(drain(c).is_empty());
    run_until(c, t0 + Duration::from_secs(60));
    let silent = Duration::from_secs(15);
    assert_eq!(
        drain(c),
        [Event::Closed(Closed::Failed(SessionError::PeerStalled {
            silent
        }))]
    );
    assert_eq!(c.next_timeout(), None);

    // The peer, awake again, reads that it was given up.
    move_bytes(&mut pair.client, &mut pair.server, t0 + silent, usize::MAX);
    assert!(matches!(
        drain(&mut pair.server).last(),
        Some(Event::Closed(Closed::Failed(SessionError::PeerReported {
            code: ErrorCode::Timeout,
            ..
        })))
    ));
}

#[test]
fn a_stalled_peer_that_speaks_again_resumes() {
    let mut pair = Pair::established(config(None), config(None));
    let t0 = pair.now;
    run_until(&mut pair.client, t0 + Duration::from_secs(7));
    assert!(matches!(
        drain(&mut pair.client).as_slice(),
        [Event::Stalled { .. }]
    ));
    pair.now = t0 + Duration::from_secs(8);
    pair.settle(&[usize::MAX]);
    let silent = Duration::from_secs(8);
    assert_eq!(pair.client_log, [Event::Resumed { silent }]);
    run_until(&mut pair.client, t0 + Duration::from_millis(12_999));
    assert!(drain(&mut pair.client).is_empty());
    run_until(&mut pair.client, t0 + Duration::from_secs(13));
    assert!(matches!(
        drain(&mut pair.client).as_slice(),
        [Event::Stalled { .. }]
    ));
}

#[test]
fn heartbeats_keep_an_idle_session_alive() {
    let mut pair = Pair::established(config(None), config(None));
    let end = pair.now + Duration::from_secs(600);
    let mut wakes = 0;
    while pair.now < end {
        let next = pair
            .client
            .next_timeout()
            .min(pair.server.next_timeout())
            .unwrap();
        assert!(next > pair.now, "a timeout in the past spins the driver");
        pair.now = next;
        pair.client.on_time(next);
        pair.server.on_time(next);
        pair.settle(&[usize::MAX]);
        wakes += 1;
    }
    assert!(pair.client_log.is_empty() && pair.server_log.is_empty());
    assert!(wakes <= 1201, "{wakes}");
}

#[test]
fn time_in_which_this_process_was_stopped_is_not_the_peers_silence() {
    let mut pair = Pair::established(config(None), config(None));
    let t0 = pair.now;
    // SIGSTOP for a minute: the timer of the first second comes 60 seconds late.
    pair.client.on_time(t0 + Duration::from_secs(61));
    assert!(drain(&mut pair.client).is_empty());
    assert!(pair.client.queued() > 0, "it asks for a sign of life");
    // From there on silence counts.
    run_until(&mut pair.client, t0 + Duration::from_secs(61 + 15));
    assert!(pair.client.is_closed());
}

#[test]
fn handshake_and_description_have_deadlines() {
    for side in [Side::Client, Side::Server] {
        let mut s = match side {
            Side::Client => client_of(config(None)),
            Side::Server => server_of(config(None)),
        };
        assert_eq!(s.next_timeout(), None);
        s.start(Time::from_secs(1));
        assert_eq!(s.next_timeout(), Some(Time::from_secs(6)));
        s.on_time(Time::from_secs(6).saturating_sub(MS));
        assert!(!s.is_closed());
        s.on_time(Time::from_secs(6));
        let after = Duration::from_secs(5);
        let error = SessionError::HandshakeTimeout { after };
        assert_eq!(drain(&mut s), [Event::Closed(Closed::Failed(error))]);
    }
    // Both alive, but nobody describes anything.
    let mut pair = Pair::new(config(None), config(None));
    let end = pair.now + Duration::from_secs(31);
    while pair.now < end && !pair.client.is_closed() {
        while move_bytes(&mut pair.client, &mut pair.server, pair.now, usize::MAX)
            | move_bytes(&mut pair.server, &mut pair.client, pair.now, usize::MAX)
        {}
        let Some(next) = pair.client.next_timeout().min(pair.server.next_timeout()) else {
            break;
        };
        pair.now = next;
        pair.client.on_time(next);
        pair.server.on_time(next);
    }
    let after = Duration::from_secs(30);
    let error = SessionError::EstablishTimeout {
        state: SessionState::Authenticated,
        after,
    };
    assert_eq!(
        drain(&mut pair.client).last(),
        Some(&Event::Closed(Closed::Failed(error)))
    );
}

#[test]
fn a_ping_gives_its_round_trip_once() {
    let mut pair = Pair::established(config(None), config(None));
    let sequence = pair.client.ping(pair.now).unwrap();
    move_bytes(
        &mut pair.client,
        &mut pair.server,
        pair.now + MS,
        usize::MAX,
    );
    pair.now = pair.now + 3 * MS;
    pair.settle(&[usize::MAX]);
    assert_eq!(
        pair.client_log,
        [Event::Pong {
            sequence,
            round_trip: 3 * MS
        }]
    );
    assert!(pair.server_log.is_empty());
}

// ---- decisions and the end -----------------------------------------------------------------------

#[test]
fn refusals_and_goodbyes_reach_the_peer() {
    // The server does not serve benchmarks.
    let bench = SessionConfig {
        role: Role::Bench,
        ..config(None)
    };
    let mut pair = Pair::new(bench, config(None));
    pair.settle(&[usize::MAX]);
    let reason = Refusal::RoleNotServed { role: Role::Bench };
    assert_eq!(
        pair.failures(),
        (
            SessionError::Rejected {
                reason: reason.clone()
            },
            SessionError::Refused {
                reason: reason.clone()
            }
        )
    );
    assert!(reason.to_string().contains("allow_bench"));

    // A decision of the engine's own.
    let mut pair = Pair::established(config(None), config(None));
    let long = "field dtype: f16 here, bf16 there\n".repeat(1000);
    pair.server.refuse(Refusal::FormatMismatch { detail: long });
    pair.settle(&[usize::MAX]);
    match pair.client_log.as_slice() {
        [
            Event::Closed(Closed::Failed(SessionError::Rejected {
                reason: Refusal::FormatMismatch { detail },
            })),
        ] => assert!(detail.starts_with("field dtype") && !detail.contains('\n')),
        other => panic!("{other:?}"),
    }

    let mut pair = Pair::established(config(None), config(None));
    pair.server.close(GoodbyeReason::ShuttingDown);
    assert!(pair.server.is_closed() && !pair.server.is_finished());
    pair.settle(&[usize::MAX]);
    assert!(pair.server.is_finished());
    assert_eq!(
        pair.server_log,
        [Event::Closed(Closed::Local(GoodbyeReason::ShuttingDown))]
    );
    assert_eq!(
        pair.client_log,
        [Event::Closed(Closed::Goodbye(GoodbyeReason::ShuttingDown))]
    );
    // Nothing changes a closed session.
    pair.client.on_bytes(pair.now, b"more");
    pair.client.on_eof(pair.now);
    pair.client.on_time(Time::MAX);
    pair.client.close(GoodbyeReason::Finished);
    assert!(drain(&mut pair.client).is_empty());
    assert!(pair.client.send(&Ready {}.into()).is_err());
}

#[test]
fn the_wrong_engine_is_noticed_from_either_side() {
    for (ours, wanted_by_client, wanted_by_server) in [
        ("b", Some("x"), None),
        ("b", None, Some("x")),
        ("b", Some("b"), Some("a")),
    ] {
        let mut pair = Pair::new(config(None), config(None));
        for _ in 0..3 {
            move_bytes(&mut pair.client, &mut pair.server, pair.now, usize::MAX);
            move_bytes(&mut pair.server, &mut pair.client, pair.now, usize::MAX);
        }
        let want = |w: Option<&str>| w.map(EngineId::from);
        let client = Describe {
            wanted: want(wanted_by_client),
            ..plain_describe("a")
        };
        let server = Describe {
            wanted: want(wanted_by_server),
            ..plain_describe(ours)
        };
        pair.client.send(&client.into()).unwrap();
        move_bytes(&mut pair.client, &mut pair.server, pair.now, usize::MAX);
        let sent = pair.server.send(&server.into());
        while move_bytes(&mut pair.server, &mut pair.client, pair.now, usize::MAX) {}
        let (c, s) = (drain(&mut pair.client), drain(&mut pair.server));
        if wanted_by_server == Some("a") {
            assert!(sent.is_ok() && !pair.client.is_closed() && !pair.server.is_closed());
            continue;
        }
        let here = if wanted_by_client.is_some() { "b" } else { "a" };
        let reason = Refusal::WrongEngine {
            here: here.into(),
            wanted: "x".into(),
        };
        assert!(sent.is_err());
        assert_eq!(
            s.last(),
            Some(&Event::Closed(Closed::Failed(SessionError::Refused {
                reason: reason.clone()
            })))
        );
        let last = c.last();
        let refused = Event::Closed(Closed::Failed(SessionError::Refused {
            reason: reason.clone(),
        }));
        let rejected = Event::Closed(Closed::Failed(SessionError::Rejected { reason }));
        assert!(
            last == Some(&refused) || last == Some(&rejected),
            "{last:?}"
        );
    }
}

#[test]
fn the_end_of_the_connection_is_told_with_its_state() {
    let mut s = server_of(config(None));
    s.start(Time(0));
    s.on_eof(Time(0));
    let error = SessionError::PeerClosed {
        state: SessionState::Handshake,
        mid_frame: false,
    };
    assert_eq!(drain(&mut s), [Event::Closed(Closed::Failed(error))]);

    let mut pair = Pair::established(config(None), config(None));
    pair.client
        .send(
            &Announce {
                ticket: Blob(vec![0; 99]),
            }
            .into(),
        )
        .unwrap();
    move_bytes(&mut pair.client, &mut pair.server, pair.now, 50);
    pair.server.on_eof(pair.now);
    let error = SessionError::PeerClosed {
        state: SessionState::Established,
        mid_frame: true,
    };
    assert_eq!(
        drain(&mut pair.server),
        [Event::Closed(Closed::Failed(error))]
    );

    pair.client
        .on_io_error(pair.now, ErrorKind::ConnectionReset);
    let kind = ErrorKind::ConnectionReset;
    let error = SessionError::ConnectionLost {
        state: SessionState::Established,
        kind,
    };
    assert_eq!(
        error.to_string(),
        "connection lost in state established: connection reset"
    );
    assert_eq!(
        drain(&mut pair.client),
        [Event::Closed(Closed::Failed(error))]
    );
}

#[test]
fn a_peer_that_does_not_read_fills_a_bounded_queue() {
    let small = SessionConfig {
        max_queued: 100_000,
        ..config(None)
    };
    let mut pair = Pair::established(small, config(None));
    let announce = Announce {
        ticket: Blob(vec![0; 9_000]),
    }
    .into();
    let mut sent = 0;
    let error = loop {
        match pair.client.send(&announce) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
        assert!(sent < 100);
    };
    assert!(matches!(error, SendError::QueueFull { limit: 100_000, .. }));
    assert_eq!(sent, 11);
    // Pings from the peer do not make it grow either, and it can still say goodbye.
    let before = pair.client.queued();
    for _ in 0..1000 {
        pair.server.ping(pair.now).unwrap();
    }
    while move_bytes(&mut pair.server, &mut pair.client, pair.now, usize::MAX) {}
    assert!(pair.client.queued() <= 100_000);
    assert!(pair.client.queued() >= before);
    pair.client.transmitted(before);
    pair.client.send(&announce).unwrap();
}

#[test]
fn a_message_larger_than_the_peer_takes_is_not_sent() {
    let small = SessionConfig {
        max_frame: 1,
        ..config(None)
    };
    let mut pair = Pair::established(config(None), small);
    let big: Message = Announce {
        ticket: Blob(vec![0; 70_000]),
    }
    .into();
    let max = MAX_UNAUTHENTICATED_FRAME;
    assert!(matches!(pair.client.send(&big), Err(SendError::TooLarge { max: m, .. }) if m == max));
    pair.server.send(&big).unwrap();
    pair.settle(&[usize::MAX]);
    assert_eq!(pair.client_log, [Event::Message(big)]);
}

// ---- a peer written out by hand --------------------------------------------------------------------

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
        let mut script = Script::described(Role::Engine);
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
        endpoints: vec![Blob(vec![]); n],
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
    assert_eq!(got, [Event::Message(bench.into())]);
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

    // Answers must answer something, with as many endpoints.
    unexpected(
        &mut Script::described(Role::Engine),
        answer(None, 0).into(),
        described,
    );
    for (path, n, fine) in [
        (Some(PathKind::Tcp), 2, true),
        (None, 0, true),
        (Some(PathKind::Tcp), 1, false),
        (None, 2, false),
    ] {
        let mut s = Script::described(Role::Engine);
        let two = QpOffer {
            endpoints: vec![Blob(vec![]); 2],
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

// ---- the bytes themselves -------------------------------------------------------------------------

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// docs/wire-format.md in bytes: a change here is a change of the protocol, and needs a new version.
#[test]
fn the_encoding_is_the_documented_one() {
    let nonce = HandshakeNonce([0xab; 32]);
    let n32 = format!("c420{}", "ab".repeat(32));
    let hello = Hello {
        versions: VersionRange { min: 1, max: 2 },
        nonce,
        auth: AuthMode::SharedSecret,
        role: Role::Bench,
        max_frame: 65536,
    };
    // [[1, 2], bin, "SharedSecret", "Bench", 65536]
    let want = format!(
        "95920102{n32}ac{}a5{}ce00010000",
        hex(b"SharedSecret"),
        hex(b"Bench")
    );
    assert_eq!(hex(&hello.encode().unwrap()), want);
    let reject = Reject {
        code: RejectCode::Busy,
        versions: VersionRange { min: 1, max: 1 },
    };
    assert_eq!(hex(&reject.encode().unwrap()), "9205920101");

    let refuse = Refuse {
        reason: Refusal::FormatMismatch { detail: "d".into() },
    };
    let want = format!("9181ae{}91a164", hex(b"FormatMismatch"));
    assert_eq!(hex(&Message::from(refuse).encode().unwrap()), want);
    let refuse = Refuse {
        reason: Refusal::GenerationRetired,
    };
    let want = format!("91b1{}", hex(b"GenerationRetired"));
    assert_eq!(hex(&Message::from(refuse).encode().unwrap()), want);
    let offer = QpOffer {
        offer: 1,
        replaces: None,
        path: PathKind::ProcessVm,
        candidates: vec![Candidate {
            path: PathKind::Tcp,
            why_not: None,
        }],
        endpoints: vec![Blob(vec![0xee])],
    };
    let want = format!(
        "9501c0aa{}9192a3{}c091c401ee",
        hex(b"process-vm"),
        hex(b"tcp")
    );
    assert_eq!(hex(&Message::from(offer).encode().unwrap()), want);
    let done = PushDone {
        request: "r".into(),
        nonce: Nonce(5),
        sender: Rank {
            dp: 1,
            pp: 2,
            tp: 3,
        },
        bytes: 300,
    };
    assert_eq!(
        hex(&Message::from(done).encode().unwrap()),
        "94a1720593010203cd012c"
    );
    assert_eq!(hex(&Message::from(Ready {}).encode().unwrap()), "90");
    let span = RemoteSpan {
        addr: 1,
        len: 2,
        rkey: 3,
    };
    let d = Describe {
        engine: "e".into(),
        generation: Generation([1; 16]),
        rank: Rank::default(),
        kv_role: KvRole::Both,
        wanted: None,
        fingerprint: Fingerprint([0xab; 32]),
        format: Blob(vec![]),
        placement: Blob(vec![]),
        memories: vec![span],
        leases: Some(span),
        scratch: None,
        device: Blob(vec![]),
        facts: ConfigFacts::default(),
        fd_backed: true,
    };
    let want = format!(
        "9ea165dc0010{}93000000a4{}c0{n32}c400c4009193010203930102 03c0c4009700000000c20000c3",
        "01".repeat(16),
        hex(b"Both"),
    );
    assert_eq!(
        hex(&Message::from(d).encode().unwrap()),
        want.replace(' ', "")
    );

    assert_eq!(
        hex(&Preamble {
            kind: ConnectionKind::Stream
        }
        .encode()),
        "8b4b56584645520a01020000"
    );
}

/// The key schedule and the tag, computed here from their definition.
#[test]
fn proofs_and_keys_are_the_documented_ones() {
    use hmac::{Hmac, Mac};
    use sha2::{Digest, Sha256};
    let mac = |key: &[u8], data: &[u8]| -> Vec<u8> {
        let mut m = Hmac::<Sha256>::new_from_slice(key).unwrap();
        m.update(data);
        m.finalize().into_bytes().to_vec()
    };
    let key = b"one secret of some length";
    let (to_server, to_client) = handshake_bytes(secret("one secret of some length"));
    // Auth is the last thing to the server: header, array of one, bin of 32.
    let auth_len = HEADER_LEN + 3 + 32;
    let (first, auth) = to_server.split_at(to_server.len() - auth_len);
    let (challenge, ok) = to_client.split_at(to_client.len() - auth_len);
    let before = [b"kvxfer/1 transcript", first, challenge].concat();
    let h0 = Sha256::digest(&before);
    let h1 = Sha256::digest([before.as_slice(), auth].concat());
    let proof = mac(key, &[b"kvxfer/1 client proof".as_slice(), &h0].concat());
    assert_eq!(hex(&auth[auth_len - 32..]), hex(&proof));
    let proof = mac(key, &[b"kvxfer/1 server proof".as_slice(), &h1].concat());
    assert_eq!(hex(&ok[auth_len - 32..]), hex(&proof));

    let prk = mac(&h1, key);
    let expand = |label: &str| mac(&prk, &[label.as_bytes(), &[1]].concat());
    let mut pair = Pair::new(
        config(secret("one secret of some length")),
        config(secret("one secret of some length")),
    );
    for _ in 0..2 {
        move_bytes(&mut pair.client, &mut pair.server, pair.now, usize::MAX);
        move_bytes(&mut pair.server, &mut pair.client, pair.now, usize::MAX);
    }
    assert_eq!(
        pair.client.session_id().unwrap().0,
        expand("kvxfer/1 session id")[..16]
    );
    for (s, label) in [
        (&mut pair.client, "kvxfer/1 frames client to server"),
        (&mut pair.server, "kvxfer/1 frames server to client"),
    ] {
        s.close(GoodbyeReason::Finished);
        let bytes = s.transmit();
        let (sealed, tag) = bytes.split_at(bytes.len() - TAG_LEN);
        assert_eq!(hex(tag), hex(&mac(&expand(label), sealed)[..TAG_LEN]));
        // Two handshake frames went before it.
        assert_eq!(hex(&sealed[4..HEADER_LEN]), "3e0000000000000000000002");
    }
}
