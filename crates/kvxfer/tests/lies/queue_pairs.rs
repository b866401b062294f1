//! Lies about queue pairs and their data streams.

use std::net::TcpListener;

use kvxfer::Error;
use kvxfer::config::{KvRole, PathKind};
use kvxfer::session::SessionError;
use kvxfer::wire::{
    Blob, Candidate, Describe, ErrorCode, Message, MessageKind, QpAnswer, QpOffer, QpReset,
    RailEndpoint, Ready, Refusal, Role, Side, StreamHalf, StreamOpening, limits,
};
use kvxfer_verbs::QpEndpoint;

use crate::liar::{Liar, endpoint, offer_of};
use crate::reasons::logged;
use crate::support::counts::Counts;
use crate::support::{LONG, Node, bounded};
use crate::wire::{Last, Wire};
use crate::world::World;

fn invented(qpn: u32, token: u8) -> Blob {
    let endpoint = QpEndpoint {
        qpn,
        psn: 0,
        token: [token; 16],
        port: None,
    };
    Blob::pack("endpoint", &endpoint).expect("an endpoint")
}

#[test]
fn offers_that_are_absurd() {
    let world = World::new(PathKind::Arena);
    let before = Counts::now();
    // As many as a frame holds, and each with memory, a descriptor and a thread's time behind it.
    for count in [65, 4096] {
        let mut liar = Liar::described(&world);
        let many = (0..count).map(|n| invented(n, (n % 251) as u8)).collect();
        liar.wire.say(offer_of(PathKind::Arena, many));
        match liar.wire.last() {
            Last::Refused(Refusal::Full { what, limit: 64 }) => {
                assert_eq!(what, "queue pairs of a session");
            }
            other => panic!("{count} queue pairs: {other:?}"),
        }
        logged("queue pairs of a session");
    }
    let raw = |offer| Blob::pack("QpOffer", &offer).expect("an encoding").0;
    let mut liar = Liar::described(&world);
    let many = vec![invented(1, 1); limits::ENDPOINTS + 1];
    let payload = raw(offer_of(PathKind::Arena, many));
    liar.wire.say_raw(MessageKind::QpOffer, &payload);
    liar.wire
        .reported(ErrorCode::Protocol, "number of endpoints");
    liar = Liar::described(&world);
    let long = Blob(vec![0; limits::ENDPOINT + 1]);
    let payload = raw(offer_of(PathKind::Arena, vec![long]));
    liar.wire.say_raw(MessageKind::QpOffer, &payload);
    liar.wire.reported(ErrorCode::Protocol, "endpoint size");
    liar = Liar::described(&world);
    let mut offer = offer_of(PathKind::Arena, vec![invented(1, 1)]);
    let candidate = Candidate {
        path: PathKind::Tcp,
        why_not: Some("x".repeat(limits::TEXT)),
    };
    offer.candidates = vec![candidate; limits::CANDIDATES + 1];
    liar.wire.say_raw(MessageKind::QpOffer, &raw(offer));
    liar.wire
        .reported(ErrorCode::Protocol, "number of candidate paths");
    drop(liar);
    world.works();
    before.settle("after the lies");
}

#[test]
fn offers_that_cannot_be() {
    let world = World::new(PathKind::Arena);
    let before = Counts::now();
    for (endpoints, words) in [
        // One queue pair twice, by its number and by its token.
        (vec![invented(5, 1), invented(5, 2)], "twice"),
        (vec![invented(5, 1), invented(6, 1)], "twice"),
        (vec![Blob(vec![1, 2, 3])], "endpoint"),
        (vec![Blob(Vec::new())], "endpoint"),
    ] {
        let mut liar = Liar::described(&world);
        liar.wire.say(offer_of(PathKind::Arena, endpoints));
        liar.wire.refused_as_bad(words);
    }
    // Paths that this build has not.
    for path in [PathKind::Rdma, PathKind::Ipc, PathKind::Staged] {
        let mut liar = Liar::described(&world);
        liar.wire.say(offer_of(path, vec![invented(1, 1)]));
        match liar.wire.hear() {
            Some(Message::QpAnswer(QpAnswer { path: None, .. })) => {}
            Some(Message::ErrorReport(report)) => {
                assert!(report.text.contains("path"), "{report:?}")
            }
            other => panic!("{path}: {other:?}"),
        }
    }
    // None at all is answered with none, and a second offer of a session too.
    let mut liar = Liar::described(&world);
    liar.wire.say(offer_of(PathKind::Arena, Vec::new()));
    let none = |message| match message {
        Message::QpAnswer(answer) => assert!(answer.path.is_none() && answer.endpoints.is_empty()),
        other => panic!("{other:?}"),
    };
    none(liar.wire.hear_kind(MessageKind::QpAnswer));
    liar = Liar::established(&world, KvRole::Both, PathKind::Arena);
    for _ in 0..100 {
        liar.wire
            .say(offer_of(PathKind::Arena, vec![invented(1, 1)]));
        none(liar.wire.hear_kind(MessageKind::QpAnswer));
    }
    drop(liar);
    world.works();
    before.settle("after the lies");
}

/// A queue pair's number and token of another session: whoever has them may use them, and nobody else
/// is touched.
#[test]
fn the_queue_pair_of_another_session() {
    let world = World::new(PathKind::Arena);
    let first = Liar::described(&world);
    let qp = first.device.queue_pair();
    for _ in 0..2 {
        let mut liar = Liar::described(&world);
        liar.wire
            .say(offer_of(PathKind::Arena, vec![endpoint(&qp)]));
        liar.wire.hear_kind(MessageKind::QpAnswer);
        liar.wire.say(Ready {});
        liar.wire.hear_kind(MessageKind::Ready);
        world.works();
    }
}

#[test]
fn what_comes_too_early_or_twice() {
    let world = World::new(PathKind::Arena);
    let before = Counts::now();
    let unexpected = |mut liar: Liar, words: &str| {
        liar.wire.reported(ErrorCode::UnexpectedMessage, words);
    };
    let mut liar = Liar::new(&world);
    liar.wire
        .say(offer_of(PathKind::Arena, vec![invented(1, 1)]));
    unexpected(liar, "QpOffer");
    liar = Liar::new(&world);
    liar.wire.say(Ready {});
    unexpected(liar, "Ready");
    let answer = QpAnswer {
        offer: 1,
        path: None,
        candidates: Vec::new(),
        endpoints: Vec::new(),
    };
    liar = Liar::described(&world);
    liar.wire.say(answer);
    unexpected(liar, "QpAnswer");
    liar = Liar::described(&world);
    liar.wire.say(Ready {});
    liar.wire.say(Ready {});
    unexpected(liar, "Ready");
    liar = Liar::established(&world, KvRole::Both, PathKind::Arena);
    liar.wire.say(Ready {});
    let name = liar.name.clone();
    unexpected(liar, "Ready");
    world.was_cut_off(&name, ErrorCode::UnexpectedMessage);
    // A frame of the handshake, and one of no type at all.
    for code in [1u8, 3, 0x7f, 0xff] {
        let mut liar = Liar::established(&world, KvRole::Both, PathKind::Arena);
        let bytes = liar.wire.sealed(code, &[]);
        liar.wire.say_bytes(&bytes);
        liar.wire.reported(ErrorCode::Protocol, "type");
        world.was_cut_off(&liar.name, ErrorCode::Protocol);
    }
    world.works();
    before.settle("after the lies");
}

#[test]
fn data_streams_that_are_not_asked_for() {
    let world = World::new(PathKind::Tcp);
    let before = Counts::now();
    let mut liar = Liar::described(&world);
    let two = vec![invented(1, 1), invented(2, 2)];
    liar.wire.say(offer_of(PathKind::Tcp, two));
    liar.wire.hear_kind(MessageKind::QpAnswer);
    let key = liar.wire.keys.streams_from(Side::Client);
    // Of no queue pair, and more than once for the same half.
    let mut held = Vec::new();
    for sequence in 0..64 {
        let qp = if sequence % 2 == 0 { 0 } else { u32::MAX };
        held.push(liar.stream(&key, qp, StreamHalf::Requester, sequence));
    }
    // One that was used, one under the other direction's key, one of another session.
    let opening = |sequence| StreamOpening {
        session: liar.wire.keys.id,
        qp: 1,
        half: StreamHalf::Responder,
        sequence,
    };
    let other = liar.wire.keys.streams_from(Side::Server);
    let stranger = StreamOpening {
        session: kvxfer::wire::SessionId([9; 16]),
        ..opening(200)
    };
    for bytes in [
        opening(3).encode(&key),
        opening(100).encode(&other),
        stranger.encode(&key),
        opening(u64::MAX).encode(&key),
    ] {
        use std::io::{Read, Write};
        let mut socket = crate::wire::connect(world.address.get());
        socket.write_all(&bytes).expect("sent");
        let mut heard = Vec::new();
        // Closed, with or without a reset.
        let _ = socket.read_to_end(&mut heard);
        assert!(heard.is_empty(), "{heard:?}");
    }
    world.works();
    // The session is as it was: it can still be ended in good order.
    liar.wire.say(kvxfer::wire::Goodbye {
        reason: kvxfer::wire::GoodbyeReason::Finished,
    });
    assert_eq!(liar.wire.last(), Last::Silent);
    drop(held);
    drop(liar);
    before.settle("after the lies");
}

/// What an engine that connects to a liar is told.
fn connect_to(
    world: &World,
    lie: impl FnOnce(&mut Liar, QpAnswer) + Send + 'static,
    change: impl FnOnce(&mut Describe) + Send + 'static,
) -> Error {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let secret = world.secret.clone();
    let lying = std::thread::spawn(move || {
        let (socket, _) = listener.accept().expect("the engine connects");
        let mut liar = Liar::accept(socket, &secret);
        let mut describe = liar.describe();
        change(&mut describe);
        liar.wire.say(describe);
        liar.hear_describe();
        if let Some(Message::QpOffer(offer)) = liar.wire.hear() {
            let honest = QpAnswer {
                offer: offer.offer,
                path: Some(offer.path),
                candidates: Vec::new(),
                endpoints: (0..offer.endpoints.len() as u32)
                    .map(|n| RailEndpoint::first(invented(n + 1, n as u8 + 1)))
                    .collect(),
            };
            lie(&mut liar, honest);
            liar.wire.last();
        }
    });
    let node: Node = world.another(KvRole::Both, PathKind::Arena);
    let error = node.engine.connect(&address, LONG).expect_err("a liar");
    bounded("engine drop", move || drop(node));
    lying.join().expect("the liar ends");
    error
}

#[test]
fn answers_that_are_none() {
    let world = World::new(PathKind::Arena);
    let bad = |error: Error, words: &str| match error {
        Error::Session {
            source:
                SessionError::Refused {
                    reason: Refusal::BadDescription { detail },
                },
            ..
        }
        | Error::Refused {
            refusal: Refusal::BadDescription { detail },
        } => {
            assert!(detail.contains(words), "{detail}");
        }
        other => panic!("{other:?}"),
    };
    let say = |change: fn(&mut QpAnswer)| {
        connect_to(
            &world,
            move |liar, mut answer| {
                change(&mut answer);
                liar.wire.say(answer);
            },
            |_| {},
        )
    };
    bad(
        say(|a| a.path = Some(PathKind::Tcp)),
        "not the one that was offered",
    );
    bad(
        say(|a| a.path = Some(PathKind::Rdma)),
        "not the one that was offered",
    );
    bad(say(|a| a.endpoints[1] = a.endpoints[0].clone()), "twice");
    bad(
        say(|a| a.endpoints[0].endpoint = Blob(vec![0xc1])),
        "endpoint",
    );
    // One of a rail's queue pairs is missing; a rail is taken whole.
    bad(say(|a| drop(a.endpoints.pop())), "endpoints for");
    bad(
        say(|a| a.endpoints.iter_mut().for_each(|e| e.rail = 1)),
        "were not offered",
    );
    bad(
        say(|a| a.endpoints.iter_mut().for_each(|e| e.peer_rail = 1)),
        "were not offered",
    );
    bad(say(|a| a.endpoints[0].rail = 1), "joined twice");
    let error = say(|a| a.endpoints.push(a.endpoints[0].clone()));
    assert!(
        matches!(
            &error,
            Error::Session {
                source: SessionError::AnswerMismatch { .. },
                ..
            }
        ),
        "{error:?}"
    );
    let error = say(|a| a.offer += 1);
    assert!(
        matches!(
            &error,
            Error::Session {
                source: SessionError::UnexpectedMessage { .. },
                ..
            }
        ),
        "{error:?}"
    );
    // Queue pairs that nobody has: the liar's own device knows no such token.
    let error = say(|_| {});
    assert!(matches!(&error, Error::Verbs(_)), "{error:?}");
    world.works();
}

/// A lane that is taken down without a word of its being the last leaves the others; one that is not there
/// is a lie.
#[test]
fn queue_pairs_that_are_taken_down() {
    let world = World::new(PathKind::Arena);
    let reset = |lanes: &[u16]| QpReset {
        lanes: lanes.to_vec(),
        cause: Blob(vec![0xc1]),
    };
    // Nor is one taken down twice.
    for lanes in [&[1][..], &[0, u16::MAX], &[0, 0]] {
        let mut liar = Liar::established(&world, KvRole::Both, PathKind::Arena);
        assert_eq!(liar.lanes.len(), 1);
        liar.wire.say(reset(lanes));
        liar.wire.reported(ErrorCode::Lie, "reset");
    }
    // A successor of one that stands, or that is not there: there is none, and all goes on.
    let mut liar = Liar::established(&world, KvRole::Both, PathKind::Arena);
    for number in [0, 1, u16::MAX] {
        liar.wire.say(QpOffer {
            offer: 2 + u32::from(number),
            replaces: Some(number),
            ..offer_of(PathKind::Arena, vec![invented(1, 1)])
        });
        let Message::QpAnswer(answer) = liar.wire.hear_kind(MessageKind::QpAnswer) else {
            unreachable!("that kind");
        };
        assert!(answer.path.is_none() && answer.endpoints.is_empty());
    }
    // Its only one: the session is over.
    let mut liar = Liar::established(&world, KvRole::Both, PathKind::Arena);
    liar.wire.say(reset(&[0]));
    liar.wire.last();
    world.works();
}

/// The device's address is another engine's: it is asked, and refuses.
#[test]
fn the_device_of_an_honest_engine() {
    let world = World::new(PathKind::Arena);
    let mut spy = Liar::described(&world);
    let honest = spy.theirs.take().expect("described").rails.remove(0).device;
    drop(spy);
    let error = connect_to(
        &world,
        |liar, answer| liar.wire.say(answer),
        move |describe| describe.rails[0].device = honest,
    );
    assert!(matches!(&error, Error::Verbs(_)), "{error:?}");
    world.works();
}

/// A pinger is in a domain of its own, and has one queue pair.
#[test]
fn a_pinger_that_wants_more() {
    let world = World::new(PathKind::Arena);
    let describe = Liar::new(&world).describe();
    let dial = || Wire::dial(world.address.get(), Some(&world.secret), Role::Probe);
    let mut wire = dial();
    wire.say(describe.clone());
    let Message::Describe(told) = wire.hear_kind(MessageKind::Describe) else {
        unreachable!("that kind");
    };
    assert_eq!(told.shared, None, "the engine's blocks are not a pinger's");
    wire.say(offer_of(
        PathKind::Arena,
        vec![invented(1, 1), invented(2, 2)],
    ));
    let Message::QpAnswer(answer) = wire.hear_kind(MessageKind::QpAnswer) else {
        unreachable!("that kind");
    };
    assert!(answer.path.is_none());
    let mut wire = dial();
    wire.say(describe.clone());
    wire.hear_kind(MessageKind::Describe);
    wire.say(offer_of(PathKind::Arena, vec![invented(1, 1)]));
    wire.hear_kind(MessageKind::QpAnswer);
    wire.say(Ready {});
    wire.hear_kind(MessageKind::Ready);
    wire.say(kvxfer::wire::PushStart {
        request: "r".into(),
        nonce: None,
    });
    wire.reported(ErrorCode::UnexpectedMessage, "PushStart");
    // No more of them than are served.
    let mut all: Vec<Wire> = (0..40).map(|_| dial()).collect();
    let full = all.iter_mut().filter_map(|wire| match wire.hear() {
        Some(Message::Refuse(refuse)) => Some(refuse.reason),
        _ => None,
    });
    let full: Vec<Refusal> = full.collect();
    assert!(full.len() >= 24, "{full:?}");
    assert!(matches!(full[0], Refusal::Full { .. }), "{full:?}");
    world.works();
}
