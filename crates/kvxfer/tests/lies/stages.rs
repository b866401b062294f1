//! Blocks that are staged for a liar, or by one: stretches that are not there, too much at once, buffers that are
//! not said to be read no more, and stamps that do not stand.

use std::time::Duration;

use kvxfer::config::{Config, KvRole, PathKind};
use kvxfer::engine::{PullOptions, Transfer};
use kvxfer::event::MemoryState;
use kvxfer::ids::RequestId;
use kvxfer::ticket::Ticket;
use kvxfer::transfer::{Cause, CompletionStatus, Refusal};
use kvxfer::wire::{
    Blob, ErrorCode, GpuDesc, Message, MessageKind, RemoteSpan, Stage, StageFree, Staged,
};
use kvxfer_verbs::{SendOp, WcStatus};

use crate::liar::{Liar, at, endpoint, offer_of};
use crate::support::{LONG, POISON, groups, pairs, until};
use crate::world::{BLOCK, BLOCKS, World};

/// A stretch as it travels.
fn stretch(memory: u32, offset: u64, len: u32) -> Vec<u8> {
    let (memory, len) = (memory.to_le_bytes(), len.to_le_bytes());
    [&memory[..], &len, &offset.to_le_bytes()].concat()
}

fn stage(number: u64, stretches: &[Vec<u8>]) -> Stage {
    let of = Blob(stretches.concat());
    Stage { number, of }
}

fn staged(liar: &mut Liar) -> Staged {
    let Message::Staged(staged) = liar.wire.hear_kind(MessageKind::Staged) else {
        unreachable!("that kind");
    };
    staged
}

fn staging(liar: &Liar) -> RemoteSpan {
    let theirs = liar.theirs.as_ref().expect("described");
    theirs.rails[0].staging.expect("its memory is a GPU's")
}

/// What is there, as a queue pair finds it.
fn read(liar: &mut Liar, offset: u64, len: u32) -> Vec<u8> {
    let span = staging(liar);
    let done = liar.post(SendOp::Read(at(span, offset)), len);
    assert_eq!(done.status, WcStatus::Success, "{done:?}");
    let mut bytes = vec![0; len as usize];
    let memory = &liar.device.side.memory()[0];
    memory.read(0, &mut bytes).expect("inside");
    bytes
}

fn stamp(word: u64) -> Vec<u8> {
    [word.to_le_bytes(), (!word).to_le_bytes()].concat()
}

#[test]
fn what_is_staged_for_a_liar_is_what_is_there_and_for_as_long_as_it_is_its_own() {
    let world = World::new(PathKind::Staged);
    let target = &world.target;
    target.fill_blocks(0..1, 0x1111);
    target.fill_blocks(1..2, 0x2222);
    let tensor = &target.side.placement().desc().tensors()[0];
    let block = |block: u64| tensor.offset + block * tensor.block_stride;
    let mut liar = Liar::established(&world, KvRole::Both, PathKind::Arena);
    // Packed by 16, and in the order of the message.
    let wanted = [stretch(0, block(1) + 8, 24), stretch(0, block(0), 8)];
    liar.wire.say(stage(7, &wanted));
    let first = staged(&mut liar);
    assert_eq!((first.number, &first.failed), (7, &None));
    let bytes = read(&mut liar, first.offset, 40);
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8"));
    assert_eq!([0, 8, 16, 32].map(word), [0x2222, 0x2222, 0x2222, 0x1111]);
    assert_eq!(read(&mut liar, first.stamp, 16), stamp(first.word));
    // What it reads no more is not its own any more, and says so.
    liar.wire.say(StageFree { number: 7 });
    until("the stamp is taken away", || {
        read(&mut liar, first.stamp, 16) != stamp(first.word)
    });
    // The same number again is another, with a word of its own.
    liar.wire.say(stage(7, &wanted));
    let second = staged(&mut liar);
    assert_ne!(second.word, first.word);
    // And so it is when the session goes.
    let (name, told) = (liar.name.clone(), second);
    assert_eq!(read(&mut liar, told.stamp, 16), stamp(told.word));
    drop(liar);
    until("the liar is down", || {
        target.engine.peer_of(&name).is_none()
    });
    let mut other = Liar::established(&world, KvRole::Both, PathKind::Arena);
    until("the stamp is taken away", || {
        read(&mut other, told.stamp, 16) != stamp(told.word)
    });
    // Nobody writes there.
    let mut writer = Liar::established(&world, KvRole::Both, PathKind::Arena);
    let span = staging(&writer);
    let refused = writer.post(SendOp::Write(at(span, told.offset)), 64);
    assert_eq!(refused.status, WcStatus::RemAccess, "{refused:?}");
    drop((other, writer));
    target.fill_blocks(0..2, POISON);
    world.works();
}

#[test]
fn what_may_not_be_staged_ends_the_session() {
    let world = World::new(PathKind::Staged);
    let len = world.target.side.memory()[0].len();
    let most = usize::try_from(Config::default().staging_slot_bytes.0).expect("some mebibytes");
    let lies: Vec<(&str, Vec<Message>)> = vec![
        ("another memory", vec![stage(1, &[stretch(1, 0, 8)]).into()]),
        (
            "behind the end",
            vec![stage(1, &[stretch(0, len - 7, 8)]).into()],
        ),
        ("around", vec![stage(1, &[stretch(0, u64::MAX, 8)]).into()]),
        (
            "too much at once",
            vec![stage(1, &vec![stretch(0, 0, 65_536); most / 65_536 + 1]).into()],
        ),
        (
            "one twice",
            vec![
                stage(1, &[stretch(0, 0, 8)]).into(),
                stage(1, &[stretch(0, 0, 8)]).into(),
            ],
        ),
        (
            "too many",
            (0..65)
                .map(|n| stage(n, &[stretch(0, 0, 8)]).into())
                .collect(),
        ),
        (
            "an answer to nothing that can be staged here",
            vec![
                Staged {
                    number: 1,
                    offset: 0,
                    stamp: 0,
                    word: 0,
                    failed: None,
                }
                .into(),
            ],
        ),
    ];
    for (what, messages) in lies {
        let mut liar = Liar::established(&world, KvRole::Both, PathKind::Arena);
        until(what, || world.target.engine.peer_of(&liar.name).is_some());
        for message in messages {
            liar.wire.say(message);
        }
        world.was_cut_off(&liar.name, ErrorCode::Lie);
    }
    world.works();
    // What cannot be read at all breaks the protocol; what is not staged is not read any more in vain.
    let mut liar = Liar::established(&world, KvRole::Both, PathKind::Arena);
    for number in [0, 1, u64::MAX] {
        liar.wire.say(StageFree { number });
    }
    world.works();
    assert!(world.target.engine.peer_of(&liar.name).is_some());
}

#[test]
fn nothing_is_staged_between_memories_of_the_host() {
    let world = World::new(PathKind::Arena);
    let messages: [Message; 2] = [
        stage(1, &[stretch(0, 0, 8)]).into(),
        Staged {
            number: 1,
            offset: 0,
            stamp: 0,
            word: 0,
            failed: None,
        }
        .into(),
    ];
    for message in messages {
        let mut liar = Liar::established(&world, KvRole::Both, PathKind::Arena);
        until("it is up", || {
            world.target.engine.peer_of(&liar.name).is_some()
        });
        liar.wire.say(message);
        world.was_cut_off(&liar.name, ErrorCode::Lie);
    }
    world.works();
}

/// Buffers that hold nothing, or that are not there, lead nowhere.
#[test]
fn what_cannot_be_staged_in_is_no_way() {
    let world = World::new(PathKind::Arena);
    for (staged, memory) in [(0, true), (65_535, true), (u64::MAX, true), (65_536, false)] {
        let unregistered = Some("so it says".to_owned());
        let mut liar = Liar::new(&world);
        let mut describe = liar.describe();
        let handles = vec![Blob(vec![7; 9])];
        describe.gpu = Some(GpuDesc {
            handles,
            staged,
            unregistered,
        });
        let own = describe.rails[0].memories[0];
        describe.rails[0].staging = memory.then_some(own);
        describe.rails[0].memories[0] = RemoteSpan {
            addr: 1 << 40,
            rkey: 0,
            ..own
        };
        liar.wire.say(describe);
        liar.hear_describe();
        let qp = liar.device.queue_pair();
        let offer = offer_of(PathKind::Arena, vec![endpoint(&qp)]);
        liar.wire.say(offer);
        let Message::QpAnswer(answer) = liar.wire.hear_kind(MessageKind::QpAnswer) else {
            unreachable!("that kind");
        };
        assert_eq!(answer.path, None, "{staged} {memory}");
    }
    world.works();
}

/// A liar that says its memory is a GPU's, and that it stages in what it has.
fn producer(world: &World) -> Liar {
    let mut liar = Liar::new(world);
    let mut describe = liar.describe();
    describe.gpu = Some(GpuDesc {
        handles: vec![Blob(vec![7; 9])],
        staged: 65_536,
        unregistered: Some("so it says".to_owned()),
    });
    let own = describe.rails[0].memories[0];
    describe.rails[0].staging = Some(own);
    // It has to be somewhere, and nowhere that another is.
    describe.rails[0].memories[0] = RemoteSpan {
        addr: 1 << 40,
        rkey: 0,
        ..own
    };
    liar.wire.say(describe);
    liar.hear_describe();
    let liar = liar.join(PathKind::Arena);
    let engine = &world.target.engine;
    until("the liar is up", || engine.peer_of(&liar.name).is_some());
    liar
}

/// The engine pulls four blocks of the liar's; what it asks for.
fn pulled(world: &World, liar: &mut Liar, offered: &Ticket, within: Duration) -> (Transfer, u64) {
    let peer = world.target.engine.peer_of(&liar.name).expect("up");
    let ticket = Ticket {
        engine: liar.name.engine.clone(),
        generation: liar.generation,
        rank: liar.name.rank,
        ..offered.clone()
    };
    let options = PullOptions {
        deadline: Some(within),
        ..PullOptions::default()
    };
    let wanted = pairs((0..4).map(|b| (2 * b, b + 32)));
    let pull = peer.pull(&ticket, &wanted, options).expect("a pull");
    let Message::Stage(stage) = liar.wire.hear_kind(MessageKind::Stage) else {
        unreachable!("that kind");
    };
    assert_eq!(stage.of.len() as u64, 16 * 8, "two layers' four blocks");
    (pull, stage.number)
}

fn cause(pull: &Transfer) -> Cause {
    let outcome = pull.wait(LONG).expect("an outcome");
    assert!(pull.wait_released(LONG), "memory comes back");
    outcome.failure().expect("a failure").first_cause.clone()
}

#[test]
fn a_producer_that_stages_what_it_likes() {
    let world = World::new(PathKind::Arena);
    let engine = &world.target.engine;
    let request = RequestId::from("x");
    let offered = engine
        .offer(&request, &groups(0..8), 1, LONG)
        .expect("room");
    let say = |number, offset, failed| Staged {
        number,
        offset,
        stamp: 8 * BLOCK,
        word: 5,
        failed,
    };
    let long = Duration::from_secs(30);

    // Its own words are believed.
    let mut liar = producer(&world);
    let (pull, number) = pulled(&world, &mut liar, &offered, long);
    let reason = Cause::Refused {
        reason: Refusal::Busy,
    };
    let packed = Blob::pack("cause", &reason).expect("a cause");
    liar.wire.say(say(number, 0, Some(packed)));
    assert_eq!(cause(&pull), reason);

    // The stamp is not the one that was told: the bytes may be anybody's.
    let (pull, number) = pulled(&world, &mut liar, &offered, long);
    liar.wire.say(say(number ^ 1, 0, None));
    liar.wire.say(say(number, 0, None));
    liar.wire.hear_kind(MessageKind::StageFree);
    assert_eq!(cause(&pull), Cause::PeerReset);

    // A stamp that stands, and then a lease that does not.
    let memory = &liar.device.side.memory()[0];
    memory.write(8 * BLOCK, &stamp(5)).expect("inside");
    let (pull, number) = pulled(&world, &mut liar, &offered, long);
    liar.wire.say(say(number, 0, None));
    liar.wire.hear_kind(MessageKind::StageFree);
    let after = cause(&pull);
    let lease = CompletionStatus::RemoteAccess;
    assert!(
        matches!(after, Cause::Completion { status, .. } if status == lease)
            || after == Cause::LeaseExpired,
        "{after:?}"
    );
    drop(liar);

    // It says nothing: the transfer ends by its deadline, and its memory comes back.
    let mut liar = producer(&world);
    let soon = Duration::from_millis(200);
    let (pull, number) = pulled(&world, &mut liar, &offered, soon);
    let outcome = pull.wait(LONG).expect("an outcome");
    let failure = outcome.failure().expect("a failure");
    assert_eq!(failure.first_cause, Cause::DeadlinePassed);
    assert_eq!(failure.memory, MemoryState::Quarantined, "{number}");
    assert!(pull.wait_released(LONG), "memory comes back");
    drop(liar);

    // Somewhere that is not its staging memory.
    let mut liar = producer(&world);
    let len = liar.device.span().len;
    let (pull, number) = pulled(&world, &mut liar, &offered, long);
    liar.wire.say(say(number, len - 8, None));
    world.was_cut_off(&liar.name, ErrorCode::Lie);
    let _ = cause(&pull);
    drop(liar);

    world.target.fill_blocks(32..BLOCKS, POISON);
    engine.retract(&request);
    world.works();
}
