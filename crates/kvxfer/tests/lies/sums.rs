//! Checksums: asked for what is nobody's business, told of what was not sent, wrong, too many, or never.

use std::time::Duration;

use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Outcome, PullOptions};
use kvxfer::event::{Event, MemoryState};
use kvxfer::ids::{Nonce, RequestId};
use kvxfer::rails::RailSet;
use kvxfer::ticket::Ticket;
use kvxfer::transfer::{Cause, Refusal};
use kvxfer::wire::{
    Blob, ErrorCode, Message, MessageKind, PushDone, PushStart, PushSums, Sums, SumsOf, SumsWanted,
};

use crate::liar::Liar;
use crate::support::counts::Counts;
use crate::support::{LONG, groups, pairs, until};
use crate::world::World;

/// Two engines that have compared checksums before: each has its thread for that.
fn world() -> World {
    let world = World::new(PathKind::Arena);
    let request = RequestId::from("compared");
    let offered = (world.target.engine).offer(&request, &groups(0..1), 1, LONG);
    let options = PullOptions {
        verify: Some(true),
        ..PullOptions::default()
    };
    let wanted = pairs([(0, 8)]);
    let pull = (world.instance).pull(&offered.expect("room"), &wanted, options);
    assert_eq!(pull.expect("a pull").wait(LONG), Some(Outcome::Done));
    world
}

fn liar(world: &World) -> Liar {
    Liar::established(world, KvRole::Both, PathKind::Arena)
}

/// Of what nobody ends earlier; a handshake takes less.
const SHORT: Duration = Duration::from_secs(2);

fn of(units: impl IntoIterator<Item = u32>) -> SumsOf {
    SumsOf {
        group: 0,
        layer: None,
        units: units.into_iter().collect(),
    }
}

fn words(sums: &[u64]) -> Blob {
    Blob(sums.iter().flat_map(|sum| sum.to_le_bytes()).collect())
}

/// What the engine answers to a question.
fn answer(liar: &mut Liar, question: SumsWanted) -> Result<Vec<u64>, Cause> {
    let id = question.id;
    liar.wire.say(question);
    let Message::Sums(sums) = liar.wire.hear_kind(MessageKind::Sums) else {
        unreachable!("that kind");
    };
    assert_eq!((sums.id, sums.first), (id, 0));
    if let Some(cause) = sums.refused {
        assert!(sums.sums.is_empty());
        return Err(cause.unpack("cause").expect("a cause"));
    }
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
    Ok(sums.sums.0.chunks(8).map(word).collect())
}

#[test]
fn readers_that_ask_for_what_is_not_on_offer() {
    let world = world();
    let before = Counts::now();
    let engine = &world.target.engine;
    let request = RequestId::from("offered");
    world.target.fill_blocks([2, 3].into_iter(), 0x2222);
    world.target.fill_blocks([4].into_iter(), 0x4444);
    let ticket = engine
        .offer(&request, &groups([4, 2, 3]), 1, LONG)
        .expect("room");
    let mut liar = liar(&world);
    let question = |of: Vec<SumsOf>| SumsWanted {
        id: 77,
        request: request.clone(),
        nonce: ticket.nonce,
        share: false,
        of,
    };
    // An honest question first: two tensors for each block, and equal blocks have equal sums.
    let sums = answer(&mut liar, question(vec![of([2, 3]), of([4])])).expect("on offer");
    assert_eq!(sums.len(), 6);
    assert_eq!(sums[..2], sums[2..4]);
    assert_ne!(sums[..2], sums[4..]);
    let outside = Err(Cause::Refused {
        reason: Refusal::OutOfRange,
    });
    for units in [vec![1], vec![2, 5], vec![39], vec![40], vec![u32::MAX]] {
        assert_eq!(answer(&mut liar, question(vec![of(units)])), outside);
    }
    // Where there is nothing, nothing is told.
    for (group, layer) in [
        (1, None),
        (u32::MAX, None),
        (0, Some(2)),
        (0, Some(u32::MAX)),
    ] {
        let nowhere = SumsOf {
            group,
            layer,
            ..of([2, u32::MAX])
        };
        assert_eq!(answer(&mut liar, question(vec![nowhere])), Ok(Vec::new()));
    }
    for share in [false, true] {
        let other = SumsWanted {
            share,
            nonce: Nonce(ticket.nonce.0 ^ 1),
            ..question(vec![of([2])])
        };
        assert_eq!(answer(&mut liar, other), Err(Cause::LeaseExpired));
    }
    assert!(engine.retract(&request));
    let late = answer(&mut liar, question(vec![of([2])]));
    assert_eq!(late, Err(Cause::LeaseExpired));
    drop(liar);
    world.works();
    before.settle("after the lies");
}

/// The engine pulls from a liar, and compares.
#[test]
fn producers_that_tell_wrong_sums() {
    let world = world();
    let before = Counts::now();
    let engine = &world.target.engine;
    let any = engine
        .offer(&"x".into(), &groups(0..4), 1, LONG)
        .expect("room");
    let packed = |cause: &Cause| Blob::pack("cause", cause).expect("a cause");
    let refused = |reason| Cause::Refused { reason };
    let lie = Cause::CutOff {
        reason: ErrorCode::Lie,
    };
    for at in 0..9 {
        let mut liar = liar(&world);
        until("the liar is up", || engine.peer_of(&liar.name).is_some());
        let peer = engine.peer_of(&liar.name).expect("up");
        let ticket = Ticket {
            engine: liar.name.engine.clone(),
            generation: liar.generation,
            rank: liar.name.rank,
            request: RequestId::from(format!("lie {at}")),
            ..any.clone()
        };
        let options = PullOptions {
            verify: Some(true),
            deadline: (at == 6).then_some(SHORT),
            ..PullOptions::default()
        };
        let wanted = pairs((0..4).map(|b| (b, b + 32)));
        let pull = peer.pull(&ticket, &wanted, options).expect("a pull");
        let Message::SumsWanted(asked) = liar.wire.hear_kind(MessageKind::SumsWanted) else {
            unreachable!("that kind");
        };
        assert_eq!(asked.request, ticket.request);
        assert_eq!(asked.of, [of(0..4)]);
        let sums = |count: usize| Sums {
            id: asked.id,
            refused: None,
            first: 0,
            sums: words(&vec![7; count]),
        };
        liar.wire.say(match at {
            0 => sums(8),
            1 => Sums {
                refused: Some(packed(&Cause::LeaseExpired)),
                ..sums(0)
            },
            2 => Sums {
                refused: Some(Blob(vec![0xc1])),
                ..sums(0)
            },
            3 => Sums {
                first: 1,
                ..sums(7)
            },
            4 => sums(9),
            5 => Sums {
                first: u64::MAX,
                ..sums(1)
            },
            // Some, and then no more.
            7 | 8 => sums(3),
            // Of a question that nobody has asked.
            _ => Sums {
                id: asked.id ^ 1,
                ..sums(8)
            },
        });
        let mut kept = Some(liar);
        match at {
            7 => pull.cancel(),
            8 => kept = None,
            _ => {}
        }
        let outcome = pull.wait(LONG).expect("an outcome");
        let failure = outcome.failure().expect("a failure");
        match (at, &failure.first_cause) {
            (0, Cause::Corrupt(corrupt)) => {
                assert_eq!((corrupt.block, corrupt.there, corrupt.blocks), (32, 7, 4));
                assert_eq!(corrupt.request, ticket.request);
            }
            (1, cause) => assert_eq!(*cause, Cause::LeaseExpired),
            (2, cause) => assert_eq!(*cause, refused(Refusal::Sums)),
            (3..6, cause) => {
                assert_eq!(*cause, lie);
                let liar = kept.as_ref().expect("kept");
                world.was_cut_off(&liar.name, ErrorCode::Lie);
            }
            (6, cause) => assert_eq!(*cause, Cause::DeadlinePassed),
            (7, cause) => assert_eq!(*cause, Cause::Cancelled),
            (8, Cause::PeerDead | Cause::PeerClosed | Cause::LaneReset) => {}
            (at, other) => panic!("lie {at}: {other}"),
        }
        assert_eq!(failure.invalid_blocks, groups(32..36), "lie {at}");
        assert!(pull.wait_released(LONG));
    }
    engine.retract(&"x".into());
    world
        .target
        .fill_blocks(32..crate::world::BLOCKS, crate::support::POISON);
    world.works();
    before.settle("after the lies");
}

/// A liar is a sender, and tells sums of what it has not written.
#[test]
fn senders_that_tell_wrong_sums() {
    let world = world();
    let before = Counts::now();
    let engine = &world.target.engine;
    for at in 0..8 {
        let request = RequestId::from(format!("lie {at}"));
        let within = match at {
            5 => SHORT,
            _ => LONG,
        };
        let mut liar = liar(&world);
        let ticket = engine
            .expect(&request, &groups(24..28), 1, within)
            .expect("room");
        let sender = liar.name.rank;
        let tell = |units: std::ops::Range<u32>, count: usize| PushSums {
            request: request.clone(),
            nonce: ticket.nonce,
            of: of(units),
            sums: words(&vec![7; count]),
        };
        let done = |sums| PushDone {
            request: request.clone(),
            nonce: ticket.nonce,
            sender,
            bytes: 1,
            sums,
            rails: RailSet::only(0),
            rail: 0,
        };
        // Before it is a sender nobody listens.
        liar.wire.say(tell(24..28, 8));
        liar.wire.say(PushStart {
            request: request.clone(),
            nonce: Some(ticket.nonce),
        });
        liar.wire.hear_kind(MessageKind::Announce);
        let is_cut_off = match at {
            0 => {
                liar.wire.say(tell(24..26, 4));
                liar.wire.say(tell(26..28, 4));
                liar.wire.say(done(8));
                false
            }
            1 => {
                liar.wire.say(done(2));
                liar.wire.say(tell(24..26, 4));
                true
            }
            2 => {
                liar.wire.say(tell(27..29, 4));
                liar.wire.say(done(4));
                true
            }
            3 => {
                // One for each unit, which has two tensors.
                liar.wire.say(tell(24..28, 4));
                liar.wire.say(done(4));
                true
            }
            4 => {
                liar.wire.say(done(u64::MAX));
                liar.wire.say(tell(24..28, 8));
                false
            }
            5 => {
                liar.wire.say(tell(24..28, 8));
                liar.wire.say(done(9));
                false
            }
            6 => {
                // Told, and then there are to be none.
                liar.wire.say(tell(24..28, 8));
                liar.wire.say(done(0));
                true
            }
            _ => {
                liar.wire.say(tell(u32::MAX - 1..u32::MAX, 2));
                liar.wire.say(done(2));
                true
            }
        };
        let liar_is = liar.name.clone();
        let mut kept = Some(liar);
        if at == 4 {
            // The rest never comes.
            kept = None;
        }
        let failed = world.log.borrow_mut().wait(
            "the failure",
            |e| matches!(e, Event::Failed { request: r, .. } if *r == request),
        );
        let Event::Failed {
            first_cause,
            memory,
            invalid_blocks,
            ..
        } = failed
        else {
            unreachable!()
        };
        assert_eq!(invalid_blocks, groups(24..28));
        // It has said that it writes no more; or, the one time, nothing that could be believed.
        assert!(memory == MemoryState::Released || at == 6, "lie {at}");
        match (at, &first_cause) {
            (0, Cause::Corrupt(corrupt)) => {
                assert_eq!((corrupt.block, corrupt.there, corrupt.blocks), (24, 7, 4));
            }
            (4, Cause::PeerDead | Cause::PeerClosed | Cause::LaneReset) => {}
            (5, cause) => assert_eq!(*cause, Cause::DeadlinePassed),
            (_, Cause::CutOff { reason }) if is_cut_off => assert_eq!(*reason, ErrorCode::Lie),
            (at, other) => panic!("lie {at}: {other}"),
        }
        if memory == MemoryState::Quarantined {
            let released =
                |e: &Event| matches!(e, Event::Released { request: r, .. } if *r == request);
            world
                .log
                .borrow_mut()
                .wait("the memory's release", released);
        }
        if is_cut_off {
            world.was_cut_off(&liar_is, ErrorCode::Lie);
        }
        drop(kept);
    }
    world.works();
    before.settle("after the lies");
}
