//! Checksums of what has moved: what is right passes, on every path and in both directions; what is not
//! is found, and named.

mod support;

use std::collections::BTreeSet;

use kvxfer::blocks::{GroupBlocks, GroupPairs};
use kvxfer::config::{Config, KvRole, PathKind};
use kvxfer::engine::{Instance, Outcome, Peer, PullOptions, PushOptions};
use kvxfer::event::{Event, MemoryState};
use kvxfer::ids::RequestId;
use kvxfer::layout::KvFormat;
use kvxfer::transfer::{Cause, Class, Corrupt};
use support::{LONG, Log, Node, groups, pairs, recipe, until};

const BLOCKS: u32 = 64;
const BLOCK_BYTES: u64 = 4096;
const PATHS: [PathKind; 5] = [
    PathKind::Arena,
    PathKind::ProcessVm,
    PathKind::Tcp,
    PathKind::Ipc,
    PathKind::Staged,
];
/// Those that the software device carries blocks over, which can send them astray.
const SOFT: [PathKind; 3] = [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp];
/// What each block of a producer is filled with: its number and this.
const WORD: u64 = 0x1111_0000;

fn node(role: KvRole, path: PathKind, change: impl FnOnce(&mut Config)) -> Node {
    let node = recipe(role, path, BLOCK_BYTES, BLOCKS).with(change).node();
    match role {
        KvRole::Producer => {
            for block in 0..BLOCKS {
                node.fill_blocks([block].into_iter(), WORD + u64::from(block));
            }
        }
        _ => node.side.poison().expect("poisoned"),
    }
    node
}

/// A producer that listens, a consumer that has connected.
fn meet(producer: &Node, consumer: &Node) -> Instance {
    let address = producer.engine.listen("127.0.0.1:0").expect("a free port");
    let address = address.to_string();
    consumer.engine.connect(&address, LONG).expect("a session")
}

/// The consumer, as the producer pushes to it.
fn peer_of(producer: &Node, consumer: &Node) -> Peer {
    let name = consumer.name();
    until("the session is up", || {
        producer.engine.peer_of(&name).is_some()
    });
    producer.engine.peer_of(&name).expect("up")
}

/// Every other block of the second half of the request first, so that little is merged.
fn table() -> Vec<(u32, u32)> {
    let src = (1..BLOCKS).filter(|b| b % 2 == 1);
    let dst = (1..BLOCKS).rev().filter(|b| b % 2 == 0);
    src.zip(dst).collect()
}

fn verified() -> PullOptions {
    PullOptions {
        verify: Some(true),
        tag: 3,
        ..PullOptions::default()
    }
}

/// The destination blocks that do not hold what their sources do.
fn wrong(consumer: &Node, table: &[(u32, u32)]) -> BTreeSet<u32> {
    let mut wrong = BTreeSet::new();
    for (src, dst) in table {
        for tensor in consumer.side.placement().desc().tensors() {
            let memory = &consumer.side.memory()[tensor.memory as usize];
            let offset = tensor.offset + u64::from(*dst) * tensor.block_stride;
            let mut bytes = vec![0; usize::try_from(BLOCK_BYTES).expect("small")];
            memory.read(offset, &mut bytes).expect("inside");
            let right = (WORD + u64::from(*src)).to_le_bytes();
            if bytes.chunks(8).any(|word| word != right) {
                wrong.insert(*dst);
            }
        }
    }
    wrong
}

#[test]
fn pulls_that_are_right_are_done() {
    for path in PATHS {
        let (producer, consumer) = (
            node(KvRole::Producer, path, |_| {}),
            // By the configuration, for calls that do not say.
            node(KvRole::Consumer, path, |config| config.verify = true),
        );
        let instance = meet(&producer, &consumer);
        let table = table();
        let all: Vec<u32> = table.iter().map(|pair| pair.0).collect();
        for (i, verify) in [None, Some(true), Some(false)].into_iter().enumerate() {
            let request = RequestId::from(format!("r{i}").as_str());
            let ticket = producer
                .engine
                .offer(&request, &groups(all.clone()), 1, LONG);
            let options = PullOptions {
                verify,
                ..PullOptions::default()
            };
            let pull = instance.pull(&ticket.expect("room"), &pairs(table.clone()), options);
            assert_eq!(
                pull.expect("a pull").wait(LONG),
                Some(Outcome::Done),
                "{path}"
            );
            assert!(wrong(&consumer, &table).is_empty());
            consumer.side.poison().expect("poisoned");
        }
    }
}

/// Many at once, each of a few blocks.
#[test]
fn pulls_do_not_get_into_each_others_way() {
    let (producer, consumer) = (
        node(KvRole::Producer, PathKind::Arena, |_| {}),
        node(KvRole::Consumer, PathKind::Arena, |_| {}),
    );
    let instance = meet(&producer, &consumer);
    let table = table();
    let pulls: Vec<_> = (0_u32..)
        .zip(table.chunks(2))
        .map(|(i, part)| {
            let request = RequestId::from(format!("r{i}").as_str());
            let all = groups(part.iter().map(|pair| pair.0));
            let ticket = producer
                .engine
                .offer(&request, &all, 1, LONG)
                .expect("room");
            let pull = instance.pull(&ticket, &pairs(part.to_vec()), verified());
            pull.expect("a pull")
        })
        .collect();
    for pull in &pulls {
        assert_eq!(pull.wait(LONG), Some(Outcome::Done));
    }
    assert!(wrong(&consumer, &table).is_empty());
}

/// Layer by layer, in parts, with its blocks named or in order; the end told on either connection.
#[test]
fn pushes_that_are_right_are_received() {
    for path in PATHS {
        for notices in [false, true] {
            let told = |config: &mut Config| config.enable_notification = notices;
            let (producer, consumer) = (
                node(KvRole::Producer, path, told),
                node(KvRole::Consumer, path, told),
            );
            let mut log = Log::new(&consumer.engine);
            let instance = meet(&producer, &consumer);
            let to = peer_of(&producer, &consumer);
            let table = table();
            let request = RequestId::from("w");
            let expected = groups(table.iter().map(|pair| pair.1));
            consumer
                .engine
                .expect(&request, &expected, 1, LONG)
                .expect("room");
            let options = PushOptions {
                verify: Some(true),
                ..PushOptions::default()
            };
            let push = to.begin_push_with(&request, options).expect("a push");
            let (first, rest) = table.split_at(5);
            push.layer(0, &pairs(first.to_vec()), None).expect("fits");
            push.layer(0, &pairs(rest.to_vec()), None).expect("fits");
            let src = [GroupBlocks {
                group: 0,
                blocks: table.iter().map(|pair| pair.0).collect(),
            }];
            push.layer_in_order(1, &src, None).expect("fits");
            let push = push.commit().expect("committed");
            assert_eq!(push.wait(LONG), Some(Outcome::Done), "{path}");
            log.wait("the blocks", |e| matches!(e, Event::Received { .. }));
            assert!(wrong(&consumer, &table).is_empty());
            log.assert_told_once();
            drop(instance);
        }
    }
}

/// What a device that puts bytes elsewhere, and says that all is well, does to a pull.
#[test]
fn a_pull_that_went_astray_is_found_out() {
    for path in SOFT {
        let producer = node(KvRole::Producer, path, |_| {});
        let consumer = node(KvRole::Consumer, path, |config| {
            config.faults = Some("seed=3,stray=0.2".parse().expect("a plan"));
        });
        let mut log = Log::new(&consumer.engine);
        let instance = meet(&producer, &consumer);
        let table = table();
        let all = groups(table.iter().map(|pair| pair.0));
        for verify in [true, false] {
            let request = RequestId::from(format!("astray {verify}").as_str());
            let ticket = producer
                .engine
                .offer(&request, &all, 1, LONG)
                .expect("room");
            let options = PullOptions {
                verify: Some(verify),
                ..verified()
            };
            let pull = instance.pull(&ticket, &pairs(table.clone()), options);
            let outcome = pull.expect("a pull").wait(LONG).expect("an outcome");
            let wrong = wrong(&consumer, &table);
            assert!(!wrong.is_empty() && wrong.len() < table.len(), "{wrong:?}");
            if !verify {
                // Nobody else would notice.
                assert_eq!(outcome, Outcome::Done);
                continue;
            }
            let failure = outcome.failure().expect("a failure").clone();
            let invalid: BTreeSet<u32> = match failure.invalid_blocks.as_slice() {
                [GroupBlocks { group: 0, blocks }] => blocks.iter().copied().collect(),
                other => panic!("{other:?}"),
            };
            // Those that are right are known to be.
            assert_eq!(invalid, wrong, "{path}");
            assert_eq!(failure.memory, MemoryState::Released);
            assert_eq!(failure.first_cause.class(), Class::Recompute);
            let corrupt = corrupt(&failure.first_cause);
            assert_eq!((&corrupt.request, corrupt.group), (&request, 0));
            assert!(corrupt.layer < 2 && wrong.contains(&corrupt.block));
            assert_eq!(corrupt.blocks, wrong.len() as u64);
            assert_ne!(corrupt.here, corrupt.there);
            let text = failure.first_cause.to_string();
            for part in [
                "request astray true has arrived changed",
                "group 0 layer",
                "checksum",
            ] {
                assert!(text.contains(part), "{text}");
            }
            let failed = log.wait("the failure", |e| matches!(e, Event::Failed { tag: 3, .. }));
            let Event::Failed { first_cause, .. } = failed else {
                unreachable!()
            };
            assert_eq!(first_cause, failure.first_cause);
        }
        log.assert_told_once();
    }
}

fn corrupt(cause: &Cause) -> &Corrupt {
    match cause {
        Cause::Corrupt(corrupt) => corrupt,
        other => panic!("{other}"),
    }
}

#[test]
fn a_push_that_went_astray_is_found_out_by_the_consumer() {
    for path in SOFT {
        let producer = node(KvRole::Producer, path, |config| {
            config.faults = Some("seed=3,stray=0.2".parse().expect("a plan"));
            config.verify = true;
        });
        let consumer = node(KvRole::Consumer, path, |_| {});
        let mut log = Log::new(&consumer.engine);
        let instance = meet(&producer, &consumer);
        let to = peer_of(&producer, &consumer);
        let table = table();
        let request = RequestId::from("w");
        let expected = groups(table.iter().map(|pair| pair.1));
        consumer
            .engine
            .expect(&request, &expected, 1, LONG)
            .expect("room");
        let push = to.begin_push(&request).expect("a push");
        push.all_layers(&pairs(table.clone()), None).expect("fits");
        let push = push.commit().expect("committed");
        // Its card has said so.
        assert_eq!(push.wait(LONG), Some(Outcome::Done));
        let failed = log.wait("the failure", |e| matches!(e, Event::Failed { .. }));
        let Event::Failed {
            first_cause,
            invalid_blocks,
            memory,
            ..
        } = failed
        else {
            unreachable!()
        };
        let corrupt = corrupt(&first_cause);
        assert!(wrong(&consumer, &table).contains(&corrupt.block));
        assert_eq!(corrupt.request, request);
        assert_eq!(invalid_blocks, expected);
        // Nobody writes there any more.
        assert_eq!(memory, MemoryState::Released);
        log.assert_told_once();
        drop(instance);
    }
}

/// More sums than one message holds.
#[test]
fn sums_in_several_messages() {
    const LAYERS: u32 = 64;
    const MANY: u32 = 2100;
    let many = |role| {
        let mut recipe = recipe(role, PathKind::Arena, 64, MANY);
        recipe.format = KvFormat::opaque(64, LAYERS).expect("a format");
        recipe.node()
    };
    let (producer, consumer) = (many(KvRole::Producer), many(KvRole::Consumer));
    consumer.side.poison().expect("poisoned");
    producer.fill_blocks(0..MANY, WORD);
    producer.fill_blocks([7].into_iter(), WORD + 7);
    let instance = meet(&producer, &consumer);
    let request = RequestId::from("r");
    let ticket = producer.engine.offer(&request, &groups(0..MANY), 1, LONG);
    let wanted = pairs((0..MANY).map(|b| (b, MANY - 1 - b)));
    let pull = instance.pull(&ticket.expect("room"), &wanted, verified());
    assert_eq!(pull.expect("a pull").wait(LONG), Some(Outcome::Done));
    consumer.assert_blocks([MANY - 8].into_iter(), WORD + 7);
    consumer.assert_blocks(0..MANY - 8, WORD);

    let mut log = Log::new(&consumer.engine);
    let to = peer_of(&producer, &consumer);
    let expected = consumer.engine.expect(&request, &groups(0..MANY), 1, LONG);
    expected.expect("room");
    let options = PushOptions {
        verify: Some(true),
        ..PushOptions::default()
    };
    let push = to.begin_push_with(&request, options).expect("a push");
    push.all_layers(&pairs((0..MANY).map(|b| (b, b))), None)
        .expect("fits");
    let push = push.commit().expect("committed");
    assert_eq!(push.wait(LONG), Some(Outcome::Done));
    log.wait("the blocks", |e| matches!(e, Event::Received { .. }));
    consumer.assert_blocks([7].into_iter(), WORD + 7);
}

/// As without checksums.
#[test]
fn a_pull_under_an_offer_that_has_ended_says_so() {
    let producer = node(KvRole::Producer, PathKind::Arena, |_| {});
    let consumer = node(KvRole::Consumer, PathKind::Arena, |_| {});
    let instance = meet(&producer, &consumer);
    let request = RequestId::from("r");
    let ticket = producer
        .engine
        .offer(&request, &groups(1..9), 1, LONG)
        .expect("room");
    assert!(producer.engine.retract(&request));
    let wanted: Vec<GroupPairs> = pairs((1..9).map(|b| (b, b)));
    let pull = instance.pull(&ticket, &wanted, verified()).expect("a pull");
    let outcome = pull.wait(LONG).expect("an outcome");
    let failure = outcome.failure().expect("a failure");
    assert_eq!(failure.first_cause, Cause::LeaseExpired);
    assert_eq!(failure.invalid_blocks, groups(1..9));
}
