//! Blocks between a GPU and the host's memory, by one launch of the side that has the destination.

use std::time::Duration;

use kvxfer::bench::BenchMemory;
use kvxfer::config::{Config, KvRole, PathKind, PathSet};
use kvxfer::engine::{Instance, Outcome, Peer, PullOptions, PushOptions};
use kvxfer::event::{Event as Told, MemoryState};
use kvxfer::ids::RequestId;
use kvxfer::mem::gpu::{GpuRuntime, PinnedMemory, Place, RuntimeChoice, RuntimeKind};
use kvxfer::transfer::Cause;

use crate::support::child::{Child, Spec};
use crate::support::{LONG, Log, Node, Recipe, gpu_memory, groups, pairs, recipe, until};
use crate::{BLOCK, BLOCKS, SEED, busy_stream, copy, mark, memory, offer, on_stand_in, place};

/// Where a side's blocks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mem {
    Gpu,
    Host,
}

use Mem::{Gpu, Host};

/// Blocks so many that one workgroup takes a while, and too small for the copy engine, which no abort stops.
const LARGE: (u64, u32) = (512 << 10, 512);
/// The producer's and the consumer's.
const MEMORIES: [(Mem, Mem); 2] = [(Host, Gpu), (Gpu, Host)];

fn side(role: KvRole, mem: Mem, (block, blocks): (u64, u32)) -> Recipe {
    let mut recipe = recipe(role, PathKind::Ipc, block, blocks);
    recipe.memory = match mem {
        Gpu => gpu_memory(role),
        Host => BenchMemory::Arena,
    };
    recipe
}

fn made(recipe: &Recipe) -> Node {
    let node = recipe.node();
    match recipe.config.kv_role {
        KvRole::Producer => node.side.fill(SEED).expect("filled"),
        _ => node.side.poison().expect("poisoned"),
    }
    node
}

fn two(mems: (Mem, Mem), size: (u64, u32), change: impl Fn(&mut Config)) -> (Node, Node) {
    let side = |role, mem| made(&side(role, mem, size).with(&change));
    (
        side(KvRole::Producer, mems.0),
        side(KvRole::Consumer, mems.1),
    )
}

/// Who connects to whom: each way the path is chosen by another side.
#[derive(Debug, Clone, Copy)]
enum Connects {
    Consumer,
    Producer,
}

/// A session, the producer as the consumer has it, and the consumer as the producer has it.
fn joined(producer: &Node, consumer: &Node, who: Connects) -> (Instance, Peer, Peer) {
    let (from, to) = match who {
        Connects::Consumer => (consumer, producer),
        Connects::Producer => (producer, consumer),
    };
    let address = to.engine.listen("127.0.0.1:0").expect("a free port");
    let instance = from.engine.connect(&address.to_string(), LONG);
    let instance = instance.expect("a session");
    let peer = |of: &Node, name| {
        until("the session is up", || of.engine.peer_of(&name).is_some());
        of.engine.peer_of(&name).expect("up")
    };
    let source = peer(consumer, producer.name());
    (instance, source, peer(producer, consumer.name()))
}

fn received(log: &mut Log, request: &RequestId) {
    let of = |event: &Told| event.request().is_some_and(|(r, _)| r == request);
    let event = log.wait("end", |event| {
        of(event) && !matches!(event, Told::Released { .. })
    });
    assert!(matches!(event, Told::Received { .. }), "{event:?}");
}

/// Blocks of one size are pulled and pushed, in another order and with checksums, and nothing else is written.
fn both_ways(mems: (Mem, Mem), size: (u64, u32), who: Connects) {
    let (producer, consumer) = two(mems, size, |_| {});
    let (_session, source, sink) = joined(&producer, &consumer, who);
    for peer in [&source, &sink] {
        let path = peer.path().expect("up");
        assert_eq!(path.path, PathKind::Ipc, "{mems:?} {who:?}: {path:?}");
    }
    let mut log = Log::new(&consumer.engine);
    let blocks = size.1;
    let some = blocks - blocks / 3;
    let table = pairs((0..some).map(|b| (b, blocks - 1 - b)));
    let options = PullOptions {
        verify: Some(true),
        ..PullOptions::default()
    };
    let pull = source.pull(&offer(&producer, "r", blocks), &table, options);
    let pull = pull.expect("a pull");
    assert_eq!(pull.wait(LONG), Some(Outcome::Done), "{mems:?} {size:?}");
    consumer.side.verify(SEED, &table).expect("every byte");
    consumer.assert_untouched_but(blocks - some..blocks);
    assert_eq!(pull.report().bytes, size.0 * u64::from(some) * 2);

    consumer.side.poison().expect("poisoned");
    let request = RequestId::from("w");
    (consumer.engine)
        .expect(&request, &groups(0..blocks), 1, LONG)
        .expect("room");
    let options = PushOptions {
        verify: Some(true),
        ..PushOptions::default()
    };
    let push = sink.begin_push_with(&request, options).expect("a push");
    for layer in [1, 0] {
        push.layer(layer, &table, None).expect("fits");
    }
    let sent = push.commit().expect("committed");
    assert_eq!(sent.wait(LONG), Some(Outcome::Done), "{mems:?} {size:?}");
    received(&mut log, &request);
    consumer.side.verify(SEED, &table).expect("every byte");
    consumer.assert_untouched_but(blocks - some..blocks);
    log.assert_told_once();
}

#[test]
fn blocks_go_both_ways_between_a_gpu_and_the_host() {
    for mems in MEMORIES {
        for who in [Connects::Consumer, Connects::Producer] {
            both_ways(mems, (BLOCK, BLOCKS), who);
        }
    }
}

/// Sizes that no word and no chunk is a multiple of; such as a copy engine takes.
#[test]
fn odd_sizes_between_a_gpu_and_the_host() {
    for size in [
        (8, 3000),
        (1032, 700),
        (65_544, 9),
        (200_008, 5),
        (4 << 20, 5),
    ] {
        for mems in MEMORIES {
            both_ways(mems, size, Connects::Consumer);
        }
    }
}

/// Between engines that offer and fetch both, each launches for what it fetches.
#[test]
fn both_sides_fetch_at_once() {
    let size = (BLOCK, BLOCKS);
    let [host, gpu] = [Host, Gpu].map(|mem| made(&side(KvRole::Both, mem, size)));
    host.side.fill(SEED).expect("filled");
    gpu.side.fill(SEED + 1).expect("filled");
    let (_session, to_host, to_gpu) = joined(&host, &gpu, Connects::Consumer);
    let table = pairs((0..BLOCKS / 2).map(|b| (b, BLOCKS - 1 - b)));
    for round in 0..10 {
        let request = format!("r{round}");
        let tickets = [&host, &gpu].map(|node| offer(node, &request, BLOCKS / 2));
        let pull = |from: &Peer, ticket| {
            let pull = from.pull(ticket, &table, PullOptions::default());
            pull.expect("a pull")
        };
        let pulls = [pull(&to_host, &tickets[0]), pull(&to_gpu, &tickets[1])];
        for pull in pulls {
            assert_eq!(pull.wait(LONG), Some(Outcome::Done));
        }
    }
    gpu.side.verify(SEED, &table).expect("every byte");
    host.side.verify(SEED + 1, &table).expect("every byte");
}

fn spec(role: KvRole, size: (u64, u32)) -> Spec {
    Spec {
        role,
        path: PathKind::Ipc,
        block_bytes: size.0,
        blocks: size.1,
        listen: "127.0.0.1:0".to_owned(),
        engine_id: None,
        seed: SEED,
        namespace: None,
    }
}

fn child(role: KvRole, mem: Mem, size: (u64, u32)) -> Child {
    match mem {
        Gpu => Child::start(&spec(role, size)),
        Host => Child::start_on_host(&spec(role, size)),
    }
}

#[test]
fn two_processes_with_a_gpu_and_the_hosts_memory() {
    let size = (BLOCK, BLOCKS);
    let table = pairs((0..BLOCKS).map(|b| (b, BLOCKS - 1 - b)));
    for (from, to) in MEMORIES {
        let mut producer = child(KvRole::Producer, from, size);
        let consumer = made(&side(KvRole::Consumer, to, size));
        let instance = consumer.engine.connect(&producer.address, LONG);
        let instance = instance.expect("a session");
        let path = instance.path().expect("up");
        assert_eq!(path.path, PathKind::Ipc, "{path:?}");
        let ticket = producer.offer("r", BLOCKS, LONG);
        let pull = instance.pull(&ticket, &table, PullOptions::default());
        assert_eq!(pull.expect("a pull").wait(LONG), Some(Outcome::Done));
        consumer.side.verify(SEED, &table).expect("every byte");

        let mut log = Log::new(&consumer.engine);
        consumer.side.poison().expect("poisoned");
        let request = RequestId::from("w");
        let expected = consumer
            .engine
            .expect(&request, &groups(0..BLOCKS), 1, LONG);
        expected.expect("room");
        let some: Vec<u32> = (0..7).collect();
        // Its side of the session may come up later.
        until("a push", || {
            producer.try_push(&consumer.name(), "w", "commit", &some)
        });
        received(&mut log, &request);
        let pushed = pairs((0..7).map(|b| (b, b)));
        consumer.side.verify(SEED, &pushed).expect("every byte");
        consumer.assert_untouched_but(0..7);

        let mut other = child(KvRole::Consumer, to, size);
        let source = made(&side(KvRole::Producer, from, size));
        let instance = source.engine.connect(&other.address, LONG);
        let instance = instance.expect("a session");
        other.receive("x", 9, LONG);
        let push = instance.begin_push(&RequestId::from("x")).expect("a push");
        let part = pairs((0..9).map(|b| (b, b)));
        push.all_layers(&part, None).expect("fits");
        let sent = push.commit().expect("committed");
        assert_eq!(sent.wait(LONG), Some(Outcome::Done));
        assert_eq!(other.verdict("x"), "good");
    }
}

/// A host's engine takes what a GPU has pushed when the producer's kernels have made it, and reads it at once.
#[test]
fn what_a_gpu_pushes_to_the_host_comes_after_its_event() {
    let (producer, consumer) = two((Gpu, Host), (BLOCK, BLOCKS), |_| {});
    let (_session, _, sink) = joined(&producer, &consumer, Connects::Consumer);
    let mut log = Log::new(&consumer.engine);
    let (stream, _room) = busy_stream(&producer);
    let fresh = PinnedMemory::new(stream.gpu(), BLOCK).expect("memory");
    fresh.host().fill(0, BLOCK, 0x77).expect("inside");
    let block = Place::Gpu(memory(&producer), place(&producer, 3));
    copy(&stream, block, Place::Pinned(&fresh, 0));
    let event = mark(&stream);
    let request = RequestId::from("w");
    (consumer.engine)
        .expect(&request, &groups(0..2), 1, LONG)
        .expect("room");
    let push = sink.begin_push(&request).expect("a push");
    push.layer(0, &pairs([(3, 1)]), Some(&event)).expect("fits");
    push.layer(1, &pairs([(4, 0)]), None).expect("fits");
    let sent = push.commit().expect("committed");
    let waits = event.is_done().ok();
    assert_eq!(waits, Some(false), "the stream was not busy enough");
    assert_eq!(sent.wait(LONG), Some(Outcome::Done));
    assert_eq!(event.is_done().ok(), Some(true), "sent before it was there");
    received(&mut log, &request);
    let mut got = vec![0; BLOCK as usize];
    let to = consumer.side.memory()[0].host().expect("the host's");
    to.read(place(&consumer, 1), &mut got).expect("inside");
    let fresh = |byte: &u8| *byte == 0x77;
    assert!(got.iter().all(fresh), "what was there before");
}

/// What is cancelled is not written any more once its memory is its owner's again.
#[test]
fn a_copy_to_or_from_the_host_that_is_cancelled_lets_go() {
    let (size, slow) = (LARGE, |config: &mut Config| config.gpu_workgroups = 1);
    for mems in MEMORIES {
        let (producer, consumer) = two(mems, size, slow);
        let (_session, source, sink) = joined(&producer, &consumer, Connects::Consumer);
        let ticket = offer(&producer, "r", size.1);
        let mut log = Log::new(&consumer.engine);
        let table = pairs((0..size.1).map(|b| (b, size.1 - 1 - b)));
        let mut stopped = 0;
        for tag in 0..3 {
            let options = PullOptions {
                tag,
                hold: true,
                ..PullOptions::default()
            };
            let pull = source.pull(&ticket, &table, options).expect("a pull");
            std::thread::sleep(Duration::from_millis(3));
            pull.cancel();
            let outcome = pull.wait(LONG).expect("an outcome");
            assert!(pull.wait_released(LONG), "memory comes back");
            stopped += u32::from(!outcome.is_done());
            consumer.side.poison().expect("poisoned");
            std::thread::sleep(Duration::from_millis(50));
            consumer.assert_untouched_but([]);
        }
        assert!(stopped > 0, "all were done too soon");
        let request = RequestId::from("w");
        (consumer.engine)
            .expect(&request, &groups(0..size.1), 1, LONG)
            .expect("room");
        let push = sink.begin_push(&request).expect("a push");
        push.all_layers(&table, None).expect("fits");
        std::thread::sleep(Duration::from_millis(3));
        let aborted = push.abort();
        assert!(aborted.wait(LONG).is_some_and(|outcome| !outcome.is_done()));
        assert!(aborted.wait_released(LONG));
        let of = |event: &Told| event.request().is_some_and(|(r, _)| *r == request);
        let Told::Failed { memory, .. } = log.wait("failure", of) else {
            panic!("a push that was aborted has arrived");
        };
        if memory == MemoryState::Quarantined {
            log.wait("release", |event| {
                of(event) && matches!(event, Told::Released { .. })
            });
        }
        consumer.side.poison().expect("poisoned");
        std::thread::sleep(Duration::from_millis(50));
        consumer.assert_untouched_but([]);
        log.assert_told_once();
    }
}

/// A producer dies while its memory is read: what was mapped of it is there until the launch has ended, and the
/// engine goes on with another.
#[test]
fn a_producer_that_dies_while_the_other_kind_of_memory_reads_it() {
    let size = LARGE;
    for (from, to) in MEMORIES {
        let consumer = side(KvRole::Consumer, to, size).with(|config| config.gpu_workgroups = 1);
        let consumer = made(&consumer);
        let mut log = Log::new(&consumer.engine);
        let table = pairs((0..size.1).map(|b| (b, size.1 - 1 - b)));
        let mut struck = false;
        for round in 0..6 {
            let mut producer = child(KvRole::Producer, from, size);
            let instance = consumer.engine.connect(&producer.address, LONG);
            let instance = instance.expect("a session");
            let path = instance.path().expect("up");
            assert_eq!(path.path, PathKind::Ipc, "{path:?}");
            let ticket = producer.offer(&format!("r{round}"), size.1, LONG);
            let pull = instance.pull(&ticket, &table, PullOptions::default());
            let pull = pull.expect("a pull");
            // The last one is let live.
            if !struck && round < 5 {
                producer.die();
            }
            let outcome = pull.wait(LONG).expect("an outcome");
            assert!(pull.wait_released(LONG), "memory comes back");
            match outcome.failure() {
                // A process that is killed goes bit by bit.
                None => {
                    consumer.side.verify(SEED, &table).expect("every byte");
                }
                Some(failure) => {
                    assert_eq!(failure.first_cause, Cause::PeerDead);
                    assert!(!struck, "nobody has died");
                    struck = true;
                }
            }
            consumer.side.poison().expect("poisoned");
            std::thread::sleep(Duration::from_millis(100));
            consumer.assert_untouched_but([]);
            if struck && outcome.is_done() {
                break;
            }
        }
        // A process that has a GPU's driver in it is long in going, and its slots with it.
        assert!(struck || !on_stand_in(), "all were done too soon");
        log.assert_told_once();
    }
}

/// A consumer dies while it fetches what is pushed: the producer hears of it, has its blocks again, and goes on.
#[test]
fn a_consumer_that_dies_while_it_fetches_from_the_other_kind_of_memory() {
    let size = LARGE;
    for (from, to) in MEMORIES {
        let producer = made(&side(KvRole::Producer, from, size));
        let mut consumer = child(KvRole::Consumer, to, size);
        let table = pairs((0..size.1).map(|b| (b, b)));
        let instance = producer.engine.connect(&consumer.address, LONG);
        let instance = instance.expect("a session");
        consumer.expect("x", size.1, LONG);
        let push = instance.begin_push(&RequestId::from("x")).expect("a push");
        for _ in 0..20 {
            push.all_layers(&table, None).expect("fits");
        }
        let sent = push.commit().expect("committed");
        std::thread::sleep(Duration::from_millis(5));
        let running = sent.outcome().is_none();
        consumer.die();
        assert!(running, "struck too late");
        let outcome = sent.wait(LONG).expect("an outcome");
        let failure = outcome.failure().expect("nobody has all");
        assert_eq!(failure.first_cause, Cause::PeerDead);
        assert!(sent.wait_released(LONG), "memory comes back");
        let mut next = child(KvRole::Consumer, to, size);
        let instance = producer.engine.connect(&next.address, LONG);
        let instance = instance.expect("a session");
        next.receive("y", 9, LONG);
        let push = instance.begin_push(&RequestId::from("y")).expect("a push");
        let part = pairs((0..9).map(|b| (b, b)));
        push.all_layers(&part, None).expect("fits");
        let sent = push.commit().expect("committed");
        assert_eq!(sent.wait(LONG), Some(Outcome::Done));
        assert_eq!(next.verdict("y"), "good");
    }
}

/// Several peers with a GPU share one pinning of the host's memory, which goes with the engine and not before.
#[test]
fn the_hosts_memory_is_pinned_once_and_given_back() {
    let size = (BLOCK, BLOCKS);
    let consumer = made(&side(KvRole::Consumer, Host, size));
    let producers = [0, 1].map(|_| made(&side(KvRole::Producer, Gpu, size)));
    let host = consumer.side.memory()[0]
        .host()
        .expect("the host's")
        .clone();
    let gpu = memory(&producers[0]).gpu().clone();
    let table = pairs((0..BLOCKS).map(|b| (b, BLOCKS - 1 - b)));
    let sessions: Vec<_> = producers
        .iter()
        .map(|producer| joined(producer, &consumer, Connects::Consumer))
        .collect();
    // It is pinned: nobody else can.
    assert!(PinnedMemory::register(&gpu, &host).is_err());
    for (producer, (session, source, _)) in producers.into_iter().zip(sessions) {
        consumer.side.poison().expect("poisoned");
        let pull = source.pull(
            &offer(&producer, "r", BLOCKS),
            &table,
            PullOptions::default(),
        );
        assert_eq!(pull.expect("a pull").wait(LONG), Some(Outcome::Done));
        consumer.side.verify(SEED, &table).expect("every byte");
        drop((session, source, producer));
    }
    drop(consumer);
    let mut again = None;
    until("the memory is pinned no more", || {
        again = PinnedMemory::register(&gpu, &host).ok();
        again.is_some()
    });
}

/// The way that is taken instead, and why: whoever of the two cannot do its part, and whoever has connected.
fn stages_for(mems: (Mem, Mem), who: Connects, change: impl Fn(&mut Recipe)) -> String {
    let size = (4096, 16);
    let [producer, consumer] = [(KvRole::Producer, mems.0), (KvRole::Consumer, mems.1)];
    let [producer, consumer] = [producer, consumer].map(|(role, mem)| {
        let mut recipe = side(role, mem, size);
        recipe.config.path = PathSet::auto();
        if mem == Host {
            change(&mut recipe);
        }
        made(&recipe)
    });
    stages(&producer, &consumer, who)
}

fn stages(producer: &Node, consumer: &Node, who: Connects) -> String {
    let (session, source, _sink) = joined(producer, consumer, who);
    let path = session.path().expect("up");
    assert_eq!(path.path, PathKind::Staged, "{path:?}");
    let table = pairs((0..16).map(|b| (b, 15 - b)));
    let pull = source.pull(&offer(producer, "r", 16), &table, PullOptions::default());
    assert_eq!(pull.expect("a pull").wait(LONG), Some(Outcome::Done));
    consumer.side.verify(SEED, &table).expect("every byte");
    let ipc = path.candidates.iter().find(|c| c.path == PathKind::Ipc);
    ipc.and_then(|c| c.why_not.clone()).expect("a reason")
}

#[test]
fn who_cannot_do_its_part_stages_and_says_why() {
    for who in [Connects::Consumer, Connects::Producer] {
        // Memory that another process cannot map.
        let why = stages_for((Host, Gpu), who, |recipe| {
            recipe.memory = BenchMemory::Anonymous;
        });
        assert!(why.contains("shares no files"), "{why}");
        for mems in MEMORIES {
            // What may not be taken is not.
            let staged = |recipe: &mut Recipe| {
                recipe.config.path = PathSet::some([PathKind::Staged, PathKind::Arena]);
            };
            let why = stages_for(mems, who, staged);
            let host_connects = match who {
                Connects::Consumer => mems.1 == Host,
                Connects::Producer => mems.0 == Host,
            };
            let wanted = match (host_connects, mems) {
                (true, _) => "the configuration does not allow it",
                // Who has the GPU asks for a file first, and one is not offered.
                (false, (Host, _)) => "the peer shares no files of its memory with GPUs",
                (false, _) => "the peer's configuration does not allow it",
            };
            assert_eq!(why, wanted, "{mems:?} {who:?}");
        }
        // The stand-in opens files of other processes: only where this side has named it.
        if on_stand_in() {
            let auto = |recipe: &mut Recipe| recipe.config.gpu = RuntimeChoice::Auto;
            let why = stages_for((Gpu, Host), who, auto);
            assert!(why.contains("configuration names it"), "{why}");
        }
        // A GPU of a runtime that this side may not open: it is the consumer, so it would have to.
        let other = match gpu_runtime() {
            RuntimeKind::Hip => RuntimeKind::Cuda,
            _ => RuntimeKind::Hip,
        };
        let only = |recipe: &mut Recipe| recipe.config.gpu = RuntimeChoice::Only(other);
        let why = stages_for((Gpu, Host), who, only);
        assert!(why.contains(&other.to_string()), "{why}");
        match who {
            Connects::Consumer => assert!(!why.contains("at the peer"), "{why}"),
            Connects::Producer => assert!(why.starts_with("at the peer: "), "{why}"),
        }
    }
}

fn gpu_runtime() -> RuntimeKind {
    let BenchMemory::Gpu { runtime, .. } = gpu_memory(KvRole::Producer) else {
        panic!("memory of a GPU");
    };
    GpuRuntime::open(runtime).expect("a runtime").kind()
}

/// Memory that somebody else has pinned cannot be pinned again, until they let go of it.
#[test]
fn memory_that_cannot_be_pinned_is_staged_until_it_can() {
    let size = (4096, 16);
    for who in [Connects::Consumer, Connects::Producer] {
        let of = |role, mem| {
            let mut recipe = side(role, mem, size);
            recipe.config.path = PathSet::auto();
            made(&recipe)
        };
        let (producer, consumer) = (of(KvRole::Producer, Gpu), of(KvRole::Consumer, Host));
        let host = consumer.side.memory()[0].host().expect("the host's");
        let gpu = memory(&producer).gpu();
        let theirs = PinnedMemory::register(gpu, host).expect("pinned");
        let why = stages(&producer, &consumer, who);
        assert!(
            why.contains("host_register") || why.contains("HostRegister"),
            "{why}"
        );
        drop(theirs);
        let next = of(KvRole::Producer, Gpu);
        let (session, ..) = joined(&next, &consumer, Connects::Consumer);
        assert_eq!(session.path().expect("up").path, PathKind::Ipc);
    }
}

/// Memory without a file, such as an engine's own, cannot be read by a peer's GPU; that of a consumer needs no file.
#[test]
fn memory_of_the_hosts_own_that_no_peer_maps() {
    let size = (BLOCK, BLOCKS);
    let table = pairs((0..BLOCKS).map(|b| (b, BLOCKS - 1 - b)));
    let anonymous = |role| {
        let mut recipe = side(role, Host, size);
        recipe.memory = BenchMemory::Anonymous;
        made(&recipe)
    };
    for who in [Connects::Consumer, Connects::Producer] {
        let producer = made(&side(KvRole::Producer, Gpu, size));
        let consumer = anonymous(KvRole::Consumer);
        let (session, source, _) = joined(&producer, &consumer, who);
        assert_eq!(session.path().expect("up").path, PathKind::Ipc);
        let ticket = offer(&producer, "r", BLOCKS);
        let pull = source.pull(&ticket, &table, PullOptions::default());
        assert_eq!(pull.expect("a pull").wait(LONG), Some(Outcome::Done));
        consumer.side.verify(SEED, &table).expect("every byte");
    }
    // `path` is `ipc` alone: there is no way, and both reasons are told.
    let producer = anonymous(KvRole::Producer);
    let gpu = made(&side(KvRole::Consumer, Gpu, size));
    let address = producer.engine.listen("127.0.0.1:0").expect("a free port");
    let refused = gpu.engine.connect(&address.to_string(), LONG);
    let kvxfer::Error::NoPath { candidates, .. } = refused.expect_err("no way") else {
        panic!("another error");
    };
    let why = |path| {
        let candidate = candidates.iter().find(|c| c.path == path);
        candidate.and_then(|c| c.why_not.clone()).expect("a reason")
    };
    let no_files = "the peer shares no files of its memory with GPUs";
    assert_eq!(why(PathKind::Ipc), no_files);
    let not_allowed = "the configuration does not allow it";
    assert_eq!(why(PathKind::Staged), not_allowed);
}
