//! Memory whose owner lies about its file: without seals, shorter than told, truncated later. A reader
//! that mapped it would die of SIGBUS; it must not map it, and the pull must fail by itself.

use std::fs::File;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Outcome, PullOptions};
use kvxfer::event::MemoryState;
use kvxfer::leases::LeaseWord;
use kvxfer::ticket::Ticket;
use kvxfer::transfer::{Cause, CompletionStatus};
use kvxfer::wire::{Blob, Message, MessageKind, QpAnswer, RailEndpoint, Ready, RemoteSpan};
use kvxfer_verbs::vendor;
use nix::fcntl::{FallocateFlags, SealFlag, fallocate};

use crate::liar::Liar;
use crate::owner::{ADDR, Files, Owner, RKEY, key_table, memfd, size_seals, table_seals};
use crate::support::{LONG, POISON, groups, pairs, recipe};
use crate::world::{BLOCK, BLOCKS, World};

const WORD: u64 = 0x1234_5678_9abc_def0;
const PAGE: u64 = 4096;

/// The bytes of the liar's memory, and the lease slot behind them, which stands.
fn content(len: u64) -> Vec<u8> {
    let mut bytes = vec![0x42; len as usize];
    let LeaseWord { word, check } = LeaseWord::live(WORD);
    bytes.extend_from_slice(&word.to_le_bytes());
    bytes.extend_from_slice(&check.to_le_bytes());
    bytes
}

/// What a pull from such an owner comes to. `meddle` is done to the file when the session stands.
fn pull_from(
    world: &World,
    files: &Files,
    meddle: impl FnOnce(&File),
) -> (Result<Outcome, String>, u32) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let mut spy = Liar::described(world);
    let owner = Owner::new(&spy.their_device(), files);
    let honest = spy.theirs.take().expect("described");
    drop((spy, honest));
    let node = recipe(KvRole::Consumer, PathKind::Arena, BLOCK, BLOCKS)
        .with(|config| {
            config.qp_per_transfer = 1;
            config.num_worker_threads = 1;
            config.secret_file = Some(world.secret_file().to_owned());
        })
        .node();
    node.side.poison().expect("poisoned");
    let (secret, endpoint) = (world.secret.clone(), owner.endpoint);
    let device = Blob::pack("device", &owner.device).expect("an address");
    let lying = std::thread::spawn(move || {
        let (socket, _) = listener.accept().expect("the engine connects");
        let mut liar = Liar::accept(socket, &secret);
        liar.role = KvRole::Producer;
        let mut describe = liar.describe();
        let len = describe.rails[0].memories[0].len;
        let span = |addr, len| RemoteSpan {
            addr,
            len,
            rkey: RKEY,
        };
        describe.rails[0].memories = vec![span(ADDR, len)];
        describe.rails[0].leases = Some(span(ADDR + len, 64));
        describe.rails[0].device = device;
        let told = (liar.name.clone(), liar.generation);
        liar.wire.say(describe);
        let Message::QpOffer(offer) = liar.wire.hear_kind(MessageKind::QpOffer) else {
            unreachable!("that kind");
        };
        liar.wire.say(QpAnswer {
            offer: offer.offer,
            path: Some(offer.path),
            candidates: Vec::new(),
            endpoints: vec![RailEndpoint::first(
                Blob::pack("endpoint", &endpoint).expect("an endpoint"),
            )],
        });
        liar.wire.say(Ready {});
        (liar, told)
    });
    let connected = node.engine.connect(&address, LONG);
    let (mut liar, (name, generation)) = lying.join().expect("the liar has spoken");
    let answer = match connected {
        Err(error) => Err(format!("{error:?}")),
        Ok(instance) => {
            meddle(&files.segment);
            let offered = world
                .target
                .engine
                .offer(&"like this".into(), &groups(0..4), 1, LONG);
            let mut ticket = Ticket {
                engine: name.engine,
                rank: name.rank,
                generation,
                ..offered.expect("an offer")
            };
            world.target.engine.retract(&"like this".into());
            let lease = ticket.lease.as_mut().expect("an offer has one");
            (lease.slot, lease.word) = (0, WORD);
            let wanted = pairs((0..4).map(|b| (b, b + 8)));
            let pull = instance
                .pull(&ticket, &wanted, PullOptions::default())
                .expect("a pull");
            let outcome = pull.wait(LONG).expect("an outcome");
            assert!(pull.wait_released(LONG));
            if outcome == Outcome::Done {
                node.assert_blocks(8..12, 0x4242_4242_4242_4242);
            } else {
                node.assert_untouched_but(8..12);
            }
            Ok(outcome)
        }
    };
    node.assert_blocks(12..BLOCKS, POISON);
    let asked = owner.asked.load(Ordering::Acquire);
    drop(node);
    liar.wire.last();
    (answer, asked)
}

fn files(segment: File, keys: File) -> Files {
    Files {
        keys: Arc::new(keys),
        segment: Arc::new(segment),
        copies: 1,
    }
}

/// Bytes of the liar's memory as its description has them.
fn memory_len(world: &World) -> u64 {
    Liar::new(world).device.span().len
}

#[track_caller]
fn refused(answer: &(Result<Outcome, String>, u32), why: u32) {
    let (outcome, asked) = answer;
    assert!(*asked > 0, "its file was never asked for: {outcome:?}");
    let outcome = outcome.as_ref().expect("a session");
    let failure = outcome.failure().expect("a failure");
    match failure.first_cause {
        Cause::Completion { status, vendor } if vendor == why => {
            let wanted = [
                CompletionStatus::RemoteOperation,
                CompletionStatus::BadResponse,
            ];
            assert!(wanted.contains(&status), "{failure:?}");
        }
        _ => panic!("{failure:?}"),
    }
    assert_eq!(failure.memory, MemoryState::Released);
}

#[test]
fn files_that_are_not_what_they_are_said_to_be() {
    let world = World::new(PathKind::Arena);
    let len = memory_len(&world);
    let (all, none) = (len + PAGE, SealFlag::empty());
    let good = || key_table(all, 0, table_seals());
    let sealed = |size| memfd(size, &content(len), size_seals());

    // As it should be: what this owner speaks is the device's own language.
    let (outcome, asked) = pull_from(&world, &files(sealed(all), good()), |_| {});
    assert_eq!((outcome, asked), (Ok(Outcome::Done), 1));

    // Without seals, with one, and truncated once it is passed: it is never mapped.
    for seals in [none, SealFlag::F_SEAL_GROW, SealFlag::F_SEAL_SHRINK] {
        let file = memfd(all, &content(len), seals);
        refused(
            &pull_from(&world, &files(file, good()), |_| {}),
            vendor::SEGMENT,
        );
    }
    let file = memfd(all, &content(len), none);
    let truncate = |file: &File| file.set_len(0).expect("truncated");
    refused(
        &pull_from(&world, &files(file, good()), truncate),
        vendor::SEGMENT,
    );
    // Sealed, it cannot be truncated; a hole that is punched reads as zeros, and the lease is gone.
    let (outcome, _) = pull_from(&world, &files(sealed(all), good()), |file| {
        assert!(file.set_len(0).is_err());
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let all = i64::try_from(all).expect("small");
        fallocate(file, how, 0, all).expect("punched");
    });
    let outcome = outcome.expect("a session");
    assert_eq!(
        outcome.failure().expect("a failure").first_cause,
        Cause::LeaseExpired
    );

    // Shorter than the key says; a place in it beyond its end, and beyond all numbers.
    let file = sealed(len + 16);
    refused(
        &pull_from(&world, &files(file, good()), |_| {}),
        vendor::SEGMENT,
    );
    for offset in [PAGE, u64::MAX, u64::MAX - all + 1] {
        let keys = key_table(all, offset, table_seals());
        refused(
            &pull_from(&world, &files(sealed(all), keys), |_| {}),
            vendor::SEGMENT,
        );
    }
    // No memfd at all, none, and two.
    let plain = File::open("/proc/self/exe").expect("a file");
    refused(
        &pull_from(&world, &files(plain, good()), |_| {}),
        vendor::SEGMENT,
    );
    for copies in [0, 2] {
        let two = Files {
            copies,
            ..files(sealed(all), good())
        };
        refused(&pull_from(&world, &two, |_| {}), vendor::PROTOCOL);
    }
    world.works();
}

/// The table of keys is read in place: one that could be written or truncated is not taken.
#[test]
fn a_key_table_without_seals() {
    let world = World::new(PathKind::Arena);
    let len = memory_len(&world);
    for seals in [
        SealFlag::empty(),
        size_seals(),
        SealFlag::F_SEAL_FUTURE_WRITE,
    ] {
        let segment = memfd(len + PAGE, &content(len), size_seals());
        let keys = key_table(len + PAGE, 0, seals);
        let (outcome, asked) = pull_from(&world, &files(segment, keys), |_| {});
        let failed = match &outcome {
            Ok(outcome) => outcome.failure().is_some(),
            Err(_) => true,
        };
        assert!(failed && asked == 0, "{outcome:?}");
    }
    world.works();
}
