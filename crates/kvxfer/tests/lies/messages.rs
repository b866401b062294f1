//! Lies about requests: messages that the state allows, of a session that stands.

use std::time::Duration;

use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::Outcome;
use kvxfer::event::{Event, MemoryState};
use kvxfer::expects::MOST_IMMEDIATES;
use kvxfer::ids::{Generation, Nonce, RequestId};
use kvxfer::rails::RailSet;
use kvxfer::ticket::Ticket;
use kvxfer::transfer::{Cause, Refusal};
use kvxfer::wire::{
    Announce, Bench, Blob, ErrorCode, Message, MessageKind, Ping, PushAborted, PushClosed,
    PushDone, PushStart, PushTold, Release, Retracted, Revoke,
};

use crate::descriptions::Peak;
use crate::liar::Liar;
use crate::reasons::logged;
use crate::support::counts::Counts;
use crate::support::{LONG, groups, pairs, until};
use crate::world::World;

fn liar(world: &World) -> Liar {
    Liar::established(world, KvRole::Both, PathKind::Arena)
}

fn done(request: &RequestId, nonce: Nonce, liar: &Liar) -> PushDone {
    PushDone {
        request: request.clone(),
        nonce,
        sender: liar.name.rank,
        bytes: u64::MAX,
        sums: 0,
        rails: RailSet::only(0),
        rail: 0,
    }
}

fn cause() -> Blob {
    Blob::pack("cause", &Cause::Aborted).expect("a cause")
}

/// Messages of the right form that go the wrong way.
#[test]
fn messages_of_another_role() {
    let world = World::new(PathKind::Arena);
    let before = Counts::now();
    let (request, nonce) = (RequestId::from("r"), Nonce(1));
    let of_producers = |liar: &Liar| -> Vec<Message> {
        let sender = liar.name.rank;
        let (r, c) = (request.clone(), cause());
        vec![
            PushStart {
                request: r.clone(),
                nonce: None,
            }
            .into(),
            done(&r, nonce, liar).into(),
            PushAborted {
                request: r.clone(),
                nonce,
                sender,
                cause: c.clone(),
            }
            .into(),
            PushClosed {
                request: r.clone(),
                nonce,
                sender,
                cause: c,
            }
            .into(),
            PushTold {
                request: r.clone(),
                nonce,
                immediates: vec![1],
            }
            .into(),
            Retracted { request: r, nonce }.into(),
        ]
    };
    let of_consumers = || -> Vec<Message> {
        let (r, c) = (request.clone(), cause());
        vec![
            Release {
                request: r.clone(),
                nonce,
            }
            .into(),
            Announce {
                ticket: Blob(Vec::new()),
            }
            .into(),
            Revoke {
                request: r,
                nonce,
                cause: c,
            }
            .into(),
        ]
    };
    for role in [KvRole::Consumer, KvRole::Producer] {
        let count = match role {
            KvRole::Consumer => 6,
            _ => 3,
        };
        for at in 0..count {
            let mut liar = Liar::established(&world, role, PathKind::Arena);
            let message = match role {
                KvRole::Consumer => of_producers(&liar).remove(at),
                _ => of_consumers().remove(at),
            };
            let kind = message.kind().name();
            liar.wire.say(message);
            liar.wire.reported(ErrorCode::Lie, kind);
            world.was_cut_off(&liar.name, ErrorCode::Lie);
            logged(kind);
        }
    }
    // Of a benchmark, outside of one.
    let mut liar = liar(&world);
    liar.wire.say(Bench {
        payload: Blob(vec![0; 1 << 20]),
    });
    liar.wire.reported(ErrorCode::UnexpectedMessage, "Bench");
    world.was_cut_off(&liar.name, ErrorCode::UnexpectedMessage);
    drop(liar);
    world.works();
    before.settle("after the lies");
}

/// A push of the honest peer is expected; the liar says of it what it likes.
#[test]
fn pushes_of_another() {
    let world = World::new(PathKind::Arena);
    let before = Counts::now();
    let engine = &world.target.engine;
    for lie in 0..4 {
        let request = RequestId::from(format!("theirs-{lie}"));
        world.honest.fill_blocks(0..4, 0x4444 + lie);
        let ticket = engine
            .expect(&request, &groups(24..28), 1, LONG)
            .expect("room");
        let push = world.instance.begin_push(&request).expect("a push");
        push.layer(0, &pairs((0..4).map(|b| (b, b + 24))), None)
            .expect("fits");
        let mut liar = liar(&world);
        let nonce = ticket.nonce;
        // The honest peer has been given the ticket: it is bound before the liar speaks.
        let mut bound = false;
        until("the honest peer is bound", || {
            liar.wire.say(PushStart {
                request: request.clone(),
                nonce: Some(nonce),
            });
            let Message::Revoke(no) = (match liar.wire.hear() {
                Some(Message::Announce(_)) => {
                    bound = true;
                    return true;
                }
                Some(other) => other,
                None => panic!("cut off for asking"),
            }) else {
                return false;
            };
            let reason = Refusal::NotAuthorised;
            let refused = Cause::Refused { reason };
            no.cause
                .unpack::<Cause>("cause")
                .is_ok_and(|cause| cause == refused)
        });
        if bound {
            // The liar was first; as a sender it may say so, and the request is spoilt. That is what
            // the number of senders means, and a matter between those who know the secret.
            engine.cancel_expect(&request);
            drop((push, liar));
            let free = |e: &Event| match e {
                Event::Failed {
                    request: r, memory, ..
                } => *r == request && *memory == MemoryState::Released,
                Event::Released { request: r, .. } => *r == request,
                _ => false,
            };
            // The next one expects the same blocks.
            world.log.borrow_mut().wait("the memory's release", free);
            continue;
        }
        let sender = liar.name.rank;
        match lie {
            0 => {
                let message = done(&request, nonce, &liar);
                liar.wire.say(message);
                liar.wire.reported(ErrorCode::Lie, "not a sender");
                world.was_cut_off(&liar.name, ErrorCode::Lie);
            }
            1 => {
                let mut message = done(&request, nonce, &liar);
                message.sender.tp += 1;
                liar.wire.say(message);
                liar.wire.reported(ErrorCode::Lie, "push done by");
                world.was_cut_off(&liar.name, ErrorCode::Lie);
            }
            _ => {
                // The answer to a refusal has the same form, so it is no lie; it changes nothing.
                for nonce in [nonce, Nonce(0), Nonce(nonce.0 ^ 1)] {
                    let (request, cause) = (request.clone(), cause());
                    liar.wire.say(PushClosed {
                        request: request.clone(),
                        nonce,
                        sender,
                        cause,
                    });
                    let cause = Blob(vec![0xff; 64]);
                    liar.wire.say(PushAborted {
                        request,
                        nonce,
                        sender,
                        cause,
                    });
                }
            }
        }
        push.layer(1, &pairs((0..4).map(|b| (b, b + 24))), None)
            .expect("fits");
        let sent = push.commit().expect("not ended").wait(LONG);
        assert_eq!(sent, Some(Outcome::Done), "lie {lie}");
        world.log.borrow_mut().wait(
            "the honest push",
            |e| matches!(e, Event::Received { request: r, .. } if *r == request),
        );
        world.target.assert_blocks(24..28, 0x4444 + lie);
    }
    world.works();
    before.settle("after the lies");
}

/// Tells immediates without end, of its own push and of what nobody expects of it.
#[test]
fn a_flood_of_immediates() {
    let world = World::new(PathKind::Arena);
    let before = Counts::now();
    let engine = &world.target.engine;
    let request = RequestId::from("told");
    let expected = engine.expect(&request, &groups(24..28), 1, LONG);
    let nonce = expected.expect("room").nonce;
    let mut liar = liar(&world);
    let told = |of: &RequestId, nonce| PushTold {
        request: of.clone(),
        nonce,
        immediates: (0..2048).collect(),
    };
    // Not a sender yet, of another try, of nothing at all.
    liar.wire.say(told(&request, nonce));
    liar.wire.say(PushStart {
        request: request.clone(),
        nonce: Some(nonce),
    });
    liar.wire.say(told(&request, Nonce(nonce.0 ^ 1)));
    liar.wire.say(told(&RequestId::from("nobody's"), nonce));
    for _ in 0..MOST_IMMEDIATES / 2048 {
        liar.wire.say(told(&request, nonce));
    }
    liar.wire.say(PushTold {
        request: request.clone(),
        nonce,
        immediates: vec![7],
    });
    liar.wire.reported(ErrorCode::Lie, "immediates of one push");
    world.was_cut_off(&liar.name, ErrorCode::Lie);
    let mut log = world.log.borrow_mut();
    let failed = |e: &Event| matches!(e, Event::Failed { request: r, .. } if *r == request);
    log.wait("the end", failed);
    let heard = log.count(|e| matches!(e, Event::Told { .. })) as u64;
    assert_eq!(heard, MOST_IMMEDIATES, "as many as there may be");
    let free = |e: &Event| match e {
        Event::Failed {
            request: r, memory, ..
        } => *r == request && *memory == MemoryState::Released,
        Event::Released { request: r, .. } => *r == request,
        _ => false,
    };
    log.wait("the memory's release", free);
    drop(log);
    drop(liar);
    world.works();
    before.settle("after the lies");
}

/// Asks for tickets without end. The honest peer's push, begun before it is expected, has its place.
#[test]
fn a_flood_of_pushes() {
    let world = World::new(PathKind::Arena);
    let before = Counts::now();
    let peak = Peak::begin();
    let request = RequestId::from("honest");
    let mut liar = liar(&world);
    let name = "x".repeat(1000);
    let (mut refused, asked) = (0, 6000);
    for n in 0..asked {
        let request = RequestId::from(format!("{name}-{n}"));
        // Each twice: the second is the same wish.
        for _ in 0..2 {
            liar.wire.say(PushStart {
                request: request.clone(),
                nonce: None,
            });
        }
        // What is refused is answered, twice.
        if n >= 1024 {
            for _ in 0..2 {
                let Some(Message::Revoke(no)) = liar.wire.hear() else {
                    panic!("the flood ends in something else");
                };
                let busy = Cause::Refused {
                    reason: Refusal::Busy,
                };
                assert_eq!(no.cause.unpack::<Cause>("cause").expect("a cause"), busy);
                refused += 1;
            }
        }
    }
    assert_eq!(refused, 2 * (asked - 1024));
    let push = world.instance.begin_push(&request).expect("a push");
    push.all_layers(&pairs((0..4).map(|b| (b, b + 24))), None)
        .expect("fits");
    let sent = push.commit().expect("not ended");
    // It waits for its expectation and is not refused.
    assert_eq!(sent.wait(Duration::from_millis(300)), None);
    world.honest.fill_blocks(0..4, 0x5151);
    let engine = &world.target.engine;
    engine
        .expect(&request, &groups(24..28), 1, LONG)
        .expect("room");
    assert_eq!(sent.wait(LONG), Some(Outcome::Done));
    // Its blocks are wanted again.
    world.log.borrow_mut().wait(
        "push",
        |e| matches!(e, Event::Received { request: r, .. } if *r == request),
    );
    peak.assert_below(64 << 10);
    drop(liar);
    world.works();
    before.settle("after the lies");
}

/// Announces to a producer what another consumer expects.
#[test]
fn announcements_of_another() {
    let world = World::new(PathKind::Arena);
    let before = Counts::now();
    // The target pushes to the honest peer here.
    let back = world
        .target
        .engine
        .peer_of(&world.honest.name())
        .expect("up");
    let request = RequestId::from("to the honest");
    let expected = world.honest.engine.expect(&request, &groups(0..4), 1, LONG);
    let honest = expected.expect("room");
    let mut liar = liar(&world);
    let own = |change: &dyn Fn(&mut Ticket)| {
        let mut ticket = Ticket {
            engine: liar.name.engine.clone(),
            generation: liar.generation,
            rank: liar.name.rank,
            addr: None,
            ..honest.clone()
        };
        change(&mut ticket);
        Announce {
            ticket: Blob(ticket.to_bytes().expect("a ticket")),
        }
    };
    // The same request and try, as if it were the liar's own; and more than anybody remembers.
    let same = own(&|_| {});
    let flood: Vec<Announce> = (0..5000u64)
        .map(|n| own(&move |ticket| ticket.nonce = Nonce(n + 1)))
        .collect();
    for announce in flood {
        liar.wire.say(announce);
        let answer = liar.wire.hear();
        assert!(matches!(answer, Some(Message::PushClosed(_))), "{answer:?}");
    }
    // The last of them, so that nothing has pushed it out again.
    liar.wire.say(same);
    let answer = liar.wire.hear();
    assert!(matches!(answer, Some(Message::PushClosed(_))), "{answer:?}");
    world.target.fill_blocks(0..4, 0x7171);
    let push = back.begin_push(&request).expect("a push");
    push.all_layers(&pairs((0..4).map(|b| (b, b))), None)
        .expect("fits");
    let sent = push.commit().expect("not ended").wait(LONG);
    assert_eq!(
        sent,
        Some(Outcome::Done),
        "the liar has spoilt another's push"
    );
    world.honest.assert_blocks(0..4, 0x7171);
    drop(liar);
    world.works();
    before.settle("after the lies");
}

#[test]
fn announcements_that_cannot_be() {
    let world = World::new(PathKind::Arena);
    let before = Counts::now();
    let expected = world
        .target
        .engine
        .expect(&"x".into(), &groups(24..28), 1, LONG);
    let ticket = expected.expect("room");
    world.target.engine.cancel_expect(&"x".into());
    let offered = world
        .target
        .engine
        .offer(&"y".into(), &groups(0..4), 1, LONG);
    let offered = offered.expect("an offer");
    let bytes = |ticket: &Ticket| ticket.to_bytes().expect("a ticket");
    let peak = Peak::begin();
    type Lie<'a> = (Box<dyn Fn(&Liar) -> Vec<u8> + 'a>, &'a str);
    let own = |liar: &Liar, ticket: &Ticket| Ticket {
        engine: liar.name.engine.clone(),
        generation: liar.generation,
        rank: liar.name.rank,
        ..ticket.clone()
    };
    // A run of four thousand million blocks takes five bytes each.
    let blocks = |liar: &Liar, with: &[u8]| {
        let mut one = own(liar, &ticket);
        one.groups[0].blocks = vec![0x77];
        let mut bytes = one.to_bytes().expect("a ticket");
        let place = bytes
            .windows(2)
            .position(|w| w == [0x91, 0x77])
            .expect("the list");
        bytes.splice(place..place + 2, with.iter().copied());
        bytes
    };
    let lies: Vec<Lie<'_>> = vec![
        (Box::new(|_| Vec::new()), "decode"),
        (Box::new(|_| vec![0xc1; 100]), "decode"),
        (Box::new(|_| vec![0x91; 1 << 20]), "decode"),
        (Box::new(|_| bytes(&ticket)), "another engine"),
        (
            Box::new(|liar| {
                bytes(&Ticket {
                    generation: Generation([1; 16]),
                    ..own(liar, &ticket)
                })
            }),
            "another engine",
        ),
        (
            Box::new(|liar| {
                bytes(&Ticket {
                    engine: "e".into(),
                    ..own(liar, &ticket)
                })
            }),
            "another engine",
        ),
        (Box::new(|liar| bytes(&own(liar, &offered))), "offer"),
        (
            Box::new(|liar| blocks(liar, &[0x91, 0x92, 0, 0xce, 0xff, 0xff, 0xff, 0xff])),
            "decode",
        ),
        (
            Box::new(|liar| blocks(liar, &[0xdd, 0xff, 0xff, 0xff, 0xff])),
            "decode",
        ),
        (Box::new(|liar| blocks(liar, &[0x92, 0x01, 0x01])), "blocks"),
    ];
    for (at, (lie, words)) in lies.into_iter().enumerate() {
        let mut liar = liar(&world);
        let ticket = Blob(lie(&liar));
        liar.wire.say(Announce { ticket });
        match liar.wire.last() {
            crate::wire::Last::Reported(ErrorCode::Lie, text) => {
                assert!(text.contains(words), "lie {at}: {text}");
            }
            other => panic!("lie {at} ({words}): {other:?}"),
        }
        world.was_cut_off(&liar.name, ErrorCode::Lie);
    }
    peak.assert_below(128 << 10);
    world.target.engine.retract(&"y".into());
    world.works();
    before.settle("after the lies");
}

/// The engine pushes to a liar, whose ticket names blocks that it does not have, another format, and
/// an absurd time.
#[test]
fn a_ticket_that_does_not_fit() {
    let world = World::new(PathKind::Arena);
    let before = Counts::now();
    let engine = &world.target.engine;
    let expected = engine.expect(&"x".into(), &groups(24..28), 1, LONG);
    let honest = expected.expect("room");
    engine.cancel_expect(&"x".into());
    for (at, block) in [40u32, u32::MAX - 3].into_iter().enumerate() {
        let request = RequestId::from(format!("to the liar {at}"));
        let mut liar = liar(&world);
        until("the liar is up", || engine.peer_of(&liar.name).is_some());
        let instance = engine.peer_of(&liar.name).expect("up");
        let push = instance.begin_push(&request).expect("a push");
        push.layer_in_order(0, &groups(0..2), None)
            .expect("who knows");
        let Message::PushStart(start) = liar.wire.hear_kind(MessageKind::PushStart) else {
            unreachable!("that kind");
        };
        let ticket = Ticket {
            engine: liar.name.engine.clone(),
            generation: liar.generation,
            rank: liar.name.rank,
            request: start.request,
            groups: groups([block, block + 1]),
            format: [0xee; 32],
            parties: 65_536,
            ttl: kvxfer::ticket::MAX_TTL,
            addr: Some("255.255.255.255:1".to_owned()),
            ..honest.clone()
        };
        liar.wire.say(Announce {
            ticket: Blob(ticket.to_bytes().expect("a ticket")),
        });
        // Refused before anything is posted; the consumer is told that nothing will come.
        liar.wire.hear_kind(MessageKind::PushClosed);
        let transfer = push.abort();
        let outcome = transfer.wait(LONG).expect("an outcome");
        let cause = &outcome.failure().expect("a failure").first_cause;
        assert_eq!(
            *cause,
            Cause::Refused {
                reason: Refusal::OutOfRange
            }
        );
        assert!(transfer.wait_released(LONG));
    }
    world.works();
    before.settle("after the lies");
}

/// Talks without listening: what would be answered is not piled up for it.
#[test]
fn a_peer_that_does_not_read() {
    let world = World::new(PathKind::Arena);
    let before = Counts::now();
    let peak = Peak::begin();
    let mut liar = liar(&world);
    let short = Some(Duration::from_millis(200));
    liar.wire.socket.set_write_timeout(short).expect("a socket");
    let name = "y".repeat(1000);
    let revoke = |n: u32| Revoke {
        request: RequestId::from(format!("{name}-{n}")),
        nonce: Nonce(1),
        cause: cause(),
    };
    let ends = std::time::Instant::now() + Duration::from_secs(5);
    let mut n = 0;
    // Each is answered with a PushClosed of its length; 64 MiB of them may wait.
    while std::time::Instant::now() < ends && n < 90_000 {
        for _ in 0..100 {
            liar.wire.say(revoke(n));
            liar.wire.say(Ping {
                sequence: n.into(),
                echo: 0,
            });
            n += 1;
        }
    }
    world.works();
    peak.assert_below(224 << 10);
    drop(liar);
    world.works();
    before.settle("after the lies");
}

/// What has no meaning yet, or none any more, changes nothing.
#[test]
fn messages_about_nothing() {
    let world = World::new(PathKind::Arena);
    let mut liar = liar(&world);
    for nonce in [Nonce(0), Nonce(1), Nonce(u64::MAX)] {
        for request in ["a", ""] {
            let request = RequestId::from(request);
            liar.wire.say(Release {
                request: request.clone(),
                nonce,
            });
            liar.wire.say(Retracted {
                request: request.clone(),
                nonce,
            });
            let message = done(&request, nonce, &liar);
            liar.wire.say(message);
        }
    }
    world.works();
    liar.wire.say(Ping {
        sequence: 1,
        echo: 2,
    });
    // Still there, and heard.
    liar.wire.say(PushStart {
        request: "late".into(),
        nonce: Some(Nonce(9)),
    });
    liar.wire.hear_kind(MessageKind::Revoke);
}
