//! Lies on the data plane: what a queue pair that was joined in earnest may not do.

use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Outcome, PullOptions};
use kvxfer::event::Event;
use kvxfer::ids::{Nonce, RequestId};
use kvxfer::rails::RailSet;
use kvxfer::ticket::Ticket;
use kvxfer::transfer::{Cause, CompletionStatus};
use kvxfer::wire::{ErrorCode, Message, PushDone, PushStart, RemoteSpan};
use kvxfer_verbs::{Completion, Remote, SendOp, WcStatus};

use crate::liar::{Liar, at};
use crate::support::counts::Counts;
use crate::support::{LONG, POISON, groups, pairs, until};
use crate::world::{BLOCKS, World};

fn refused(completion: &Completion, what: &str) {
    assert_eq!(
        completion.status,
        WcStatus::RemAccess,
        "{what}: {completion:?}"
    );
}

/// READs and WRITEs outside regions, with keys that are another's or none, or without the right.
#[test]
fn ranges_and_keys_that_are_not_given() {
    for path in [PathKind::Arena, PathKind::Tcp] {
        let world = World::new(path);
        let before = Counts::now();
        // A queue pair fails with its first lie, so each has a session of its own.
        type Lie = (&'static str, fn(RemoteSpan, RemoteSpan) -> SendOp);
        let lies: Vec<Lie> = vec![
            ("a READ behind the end", |m, _| {
                SendOp::Read(at(m, m.len - 63))
            }),
            ("a WRITE behind the end", |m, _| {
                SendOp::Write(at(m, m.len - 63))
            }),
            ("a READ before the beginning", |m, _| {
                SendOp::Read(at(m, 0u64.wrapping_sub(8)))
            }),
            ("a WRITE at the last address", |m, _| {
                SendOp::Write(Remote {
                    addr: u64::MAX - 8,
                    rkey: m.rkey,
                })
            }),
            ("a key that is none", |m, _| {
                SendOp::Write(Remote {
                    addr: m.addr,
                    rkey: m.rkey ^ 0x0001_0000,
                })
            }),
            ("another index", |m, _| {
                SendOp::Read(Remote {
                    addr: m.addr,
                    rkey: m.rkey + 37,
                })
            }),
            ("key 0", |m, _| {
                SendOp::Read(Remote {
                    addr: m.addr,
                    rkey: 0,
                })
            }),
            ("a WRITE to the lease table", |_, l| SendOp::Write(at(l, 0))),
            ("a READ behind the lease table", |_, l| {
                SendOp::Read(at(l, l.len))
            }),
        ];
        for (what, lie) in lies {
            let mut liar = Liar::established(&world, KvRole::Both, path);
            let theirs = liar.theirs.as_ref().expect("described");
            let leases = theirs.rails[0].leases.expect("it offers");
            let op = lie(theirs.rails[0].memories[0], leases);
            refused(&liar.post(op, 64), what);
        }
        // The engine's own landing slots are no peer's: their key is near, and is not given either.
        let mut liar = Liar::established(&world, KvRole::Both, path);
        let memory = liar.theirs.as_ref().expect("described").rails[0].memories[0];
        let next = Remote {
            addr: memory.addr,
            rkey: memory.rkey + 1,
        };
        refused(&liar.post(SendOp::Read(next), 8), "the next key");
        drop(liar);
        world.target.assert_blocks(32..BLOCKS, POISON);
        world.works();
        before.settle("after the lies");
    }
}

/// Memory of a rank that only consumes cannot be read, and of one that only produces not be written.
#[test]
fn what_the_role_does_not_allow() {
    let world = World::new(PathKind::Arena);
    for role in [KvRole::Consumer, KvRole::Producer] {
        let node = world.another(role, PathKind::Arena);
        node.side.poison().expect("poisoned");
        let address = node.engine.listen("127.0.0.1:0").expect("a port");
        let target = world.address.replace(address);
        let mut liar = Liar::established(&world, KvRole::Both, PathKind::Arena);
        world.address.set(target);
        let memory = liar.theirs.as_ref().expect("described").rails[0].memories[0];
        let op = match role {
            KvRole::Consumer => SendOp::Read(at(memory, 0)),
            _ => SendOp::Write(at(memory, 0)),
        };
        refused(&liar.post(op, 64), "a role");
        node.assert_untouched_but([]);
    }
    world.works();
}

/// Notices about pushes that are not the sender's, and bytes that are no notice.
#[test]
fn notices_that_are_lies() {
    let world = World::with(PathKind::Arena, |config| config.enable_notification = true);
    let before = Counts::now();
    let engine = &world.target.engine;
    let request = RequestId::from("theirs");
    world.honest.fill_blocks(0..4, 0x6161);
    let ticket = engine
        .expect(&request, &groups(24..28), 1, LONG)
        .expect("room");
    let push = world.instance.begin_push(&request).expect("a push");
    push.layer(0, &pairs((0..4).map(|b| (b, b + 24))), None)
        .expect("fits");
    let notice = |liar: &Liar, change: fn(&mut PushDone)| {
        let mut done = PushDone {
            request: request.clone(),
            nonce: ticket.nonce,
            sender: liar.name.rank,
            bytes: 1,
            sums: 0,
            rails: RailSet::only(0),
            rail: 0,
        };
        change(&mut done);
        Message::from(done).encode().expect("a notice")
    };
    // Bound before the liar speaks.
    let mut first = Liar::established(&world, KvRole::Both, PathKind::Arena);
    until("the honest peer is bound", || {
        let (request, nonce) = (request.clone(), Some(Nonce(ticket.nonce.0)));
        std::thread::sleep(std::time::Duration::from_millis(300));
        first.wire.say(PushStart { request, nonce });
        matches!(first.wire.hear(), Some(Message::Revoke(_)))
    });
    // The engine has taken the queue pair up: before that nothing that comes over it is looked at.
    let standing = || {
        let liar = Liar::established(&world, KvRole::Both, PathKind::Arena);
        until("the liar is up", || engine.peer_of(&liar.name).is_some());
        liar
    };
    type Lie<'a> = Box<dyn Fn(&Liar) -> Vec<u8> + 'a>;
    let lies: Vec<Lie<'_>> = vec![
        Box::new(|liar| notice(liar, |_| {})),
        Box::new(|liar| notice(liar, |done| done.sender.dp = 9)),
        // Over rails that the session does not have, and for one that is not among those named.
        Box::new(|liar| notice(liar, |done| done.rails = RailSet::first(2))),
        Box::new(|liar| {
            let honest = notice(liar, |_| {});
            let at = honest.len() - 1;
            let mut bytes = honest;
            bytes[at] = 1;
            bytes
        }),
        Box::new(|_| vec![0xc1; 100]),
        Box::new(|_| vec![0xff; 2048]),
        Box::new(|liar| [notice(liar, |_| {}), vec![0]].concat()),
        Box::new(|_| vec![0xdd, 0xff, 0xff, 0xff, 0xff]),
    ];
    for (at, lie) in lies.into_iter().enumerate() {
        let mut liar = standing();
        let bytes = lie(&liar);
        let sent = liar.notify(&bytes);
        assert_eq!(sent.status, WcStatus::Success, "lie {at}: {sent:?}");
        liar.wire.reported(ErrorCode::Lie, "");
        world.was_cut_off(&liar.name, ErrorCode::Lie);
    }
    // One that is longer than any receive, and a value where nobody asked for one.
    let mut liar = standing();
    let sent = liar.notify(&[0; 4000]);
    assert_eq!(sent.status, WcStatus::RemInvReq, "{sent:?}");
    liar = standing();
    liar.post(SendOp::SendImm(7), 64);
    liar.wire.reported(ErrorCode::Lie, "");
    // About nothing at all, many times: more than there are receives.
    liar = standing();
    for _ in 0..200 {
        let bytes = notice(&liar, |done| done.nonce = Nonce(77));
        assert_eq!(liar.notify(&bytes).status, WcStatus::Success);
    }
    drop((first, liar));
    push.layer(1, &pairs((0..4).map(|b| (b, b + 24))), None)
        .expect("fits");
    assert_eq!(
        push.commit().expect("not ended").wait(LONG),
        Some(Outcome::Done)
    );
    world.log.borrow_mut().wait(
        "the honest push",
        |e| matches!(e, Event::Received { request: r, .. } if *r == request),
    );
    world.target.assert_blocks(24..28, 0x6161);
    world.works();
    before.settle("after the lies");
}

/// The engine reads from a producer whose memory has the key and the address of another engine, and
/// whose lease is nowhere.
#[test]
fn a_producer_with_keys_of_another() {
    let world = World::new(PathKind::Arena);
    let before = Counts::now();
    let engine = &world.target.engine;
    let offered = engine
        .offer(&"x".into(), &groups(0..4), 1, LONG)
        .expect("an offer");
    let mut spy = Liar::described(&world);
    let honest = spy.theirs.take().expect("described");
    drop(spy);
    type Lie = (fn(&mut RemoteSpan), u32);
    let lies: [Lie; 4] = [
        (|span| span.rkey ^= 0x5a5a, 0),
        (|span| span.addr += 1 << 30, 0),
        (|span| span.rkey = 0, 0),
        (|_| {}, u32::MAX),
    ];
    for (at, (lie, slot)) in lies.into_iter().enumerate() {
        let mut liar = Liar::new(&world);
        let mut describe = liar.describe();
        lie(&mut describe.rails[0].memories[0]);
        if at == 0 {
            // Another's, as it told the liar in confidence.
            describe.rails[0].memories[0] = honest.rails[0].memories[0];
        }
        let span = describe.rails[0].memories[0];
        describe.rails[0].leases = Some(RemoteSpan {
            addr: span.addr + span.len,
            len: 64,
            rkey: span.rkey,
        });
        liar.wire.say(describe);
        liar.hear_describe();
        let liar = liar.join(PathKind::Arena);
        until("the liar is up", || engine.peer_of(&liar.name).is_some());
        let instance = engine.peer_of(&liar.name).expect("up");
        let mut ticket = Ticket {
            engine: liar.name.engine.clone(),
            generation: liar.generation,
            rank: liar.name.rank,
            request: RequestId::from(format!("lie {at}")),
            ..offered.clone()
        };
        if slot != 0 {
            ticket.lease.as_mut().expect("an offer").slot = slot;
        }
        let wanted = pairs((0..4).map(|b| (b, b + 32)));
        world.target.fill_blocks(36..40, 0x2222);
        let pull = instance.pull(&ticket, &wanted, PullOptions::default());
        let outcome = pull.expect("a pull").wait(LONG).expect("an outcome");
        let cause = &outcome.failure().expect("a failure").first_cause;
        match cause {
            Cause::Completion {
                status: CompletionStatus::RemoteAccess,
                ..
            }
            | Cause::LeaseExpired
            | Cause::Refused { .. } => {}
            other => panic!("lie {at}: {other:?}"),
        }
        world.target.fill_blocks(32..BLOCKS, POISON);
    }
    engine.retract(&"x".into());
    world.works();
    before.settle("after the lies");
}
