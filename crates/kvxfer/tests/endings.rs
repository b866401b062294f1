//! Endings out of turn: pushes given up before the consumer expects them, engines that go while
//! transfers run, waits without end.

use std::time::{Duration, Instant};

use kvxfer::bench::{BenchMemory, BenchShape, BenchSide};
use kvxfer::blocks::{BlockPair, GroupBlocks, GroupPairs};
use kvxfer::config::{Config, KvRole, PathKind, PathSet};
use kvxfer::engine::PullOptions;
use kvxfer::event::{Event, PeerName};
use kvxfer::ids::RequestId;
use kvxfer::layout::{KvFormat, Topology};
use kvxfer::{Engine, Peer};

const LONG: Duration = Duration::from_secs(60);

fn engine(role: KvRole) -> Engine {
    sized(role, 8, Config::default())
}

fn sized(role: KvRole, blocks: u32, mut config: Config) -> Engine {
    let format = KvFormat::opaque(4096, 4).expect("a format");
    let shape = BenchShape {
        topology: Topology::single(&format),
        format,
        num_blocks: vec![blocks],
        memory: BenchMemory::Arena,
    };
    let side = BenchSide::new(&shape).expect("memory");
    config.kv_role = role;
    config.num_worker_threads = 1;
    Engine::new(config, side.format().clone(), side.placement().clone()).expect("an engine")
}

fn wait_for<T>(engine: &Engine, what: &str, mut wanted: impl FnMut(&Event) -> Option<T>) -> T {
    let until = Instant::now() + LONG;
    let mut events = Vec::new();
    while Instant::now() < until {
        engine.wait_events(&mut events, Duration::from_millis(200));
        if let Some(found) = events.drain(..).find_map(|event| wanted(&event)) {
            return found;
        }
    }
    panic!("no {what} came");
}

fn expect(consumer: &Engine, request: &str, block: u32) {
    let blocks = [GroupBlocks {
        group: 0,
        blocks: vec![block],
    }];
    let ticket = consumer.expect(&RequestId::from(request), &blocks, 1, LONG);
    ticket.expect("an expectation");
}

fn push(to: &Peer, request: &str, dst: u32) {
    let push = to.begin_push(&RequestId::from(request)).expect("a push");
    let pairs = vec![BlockPair { src: 0, dst }];
    push.all_layers(&[GroupPairs { group: 0, pairs }], None)
        .expect("planned");
    drop(push.commit().expect("committed"));
}

/// The end of a request at the consumer.
fn ended(consumer: &Engine, wanted: &str) -> Event {
    wait_for(consumer, wanted, |event| {
        let (request, _) = event.request()?;
        (&*request.0 == wanted).then(|| event.clone())
    })
}

#[test]
fn a_push_given_up_early_leaves_nothing_behind() {
    let (producer, consumer) = (engine(KvRole::Producer), engine(KvRole::Consumer));
    let address = producer.listen("127.0.0.1:0").expect("a free port");
    let session = consumer.connect(&address.to_string(), LONG);
    let _session = session.expect("a session");
    let name: PeerName = wait_for(&producer, "peer", |event| match event {
        Event::PeerUp { peer, .. } => Some(peer.clone()),
        _ => None,
    });
    let to = producer.peer_of(&name).expect("the session stands");

    let given_up = to.begin_push(&RequestId::from("r")).expect("a push");
    assert!(given_up.abort().wait(LONG).is_some());
    // A push that is seen through: when it has arrived, what was said before it has too.
    expect(&consumer, "first", 1);
    push(&to, "first", 1);
    assert!(matches!(ended(&consumer, "first"), Event::Received { .. }));

    // The expectation is for the push that is to come, not for the one that was given up.
    expect(&consumer, "r", 2);
    expect(&consumer, "second", 3);
    push(&to, "second", 3);
    assert!(matches!(ended(&consumer, "second"), Event::Received { .. }));
    push(&to, "r", 2);
    let end = ended(&consumer, "r");
    assert!(matches!(end, Event::Received { .. }), "{end:?}");
}

#[test]
fn a_wait_without_end_is_a_wait() {
    let (producer, consumer) = (engine(KvRole::Producer), engine(KvRole::Consumer));
    let address = producer.listen("127.0.0.1:0").expect("a free port");
    let session = consumer.connect(&address.to_string(), Duration::MAX);
    let session = session.expect("a session");
    assert!(session.wait_up(Duration::MAX));
    let mut events = Vec::new();
    assert_ne!(producer.wait_events(&mut events, Duration::MAX), 0);
}

#[test]
fn a_transfer_ends_when_its_engine_goes() {
    const BLOCKS: u32 = 2048;
    // Sooner or later in the transfer, which has hundreds of work requests under way.
    for pause in [0, 1, 3, 6] {
        let config = || {
            let mut config = Config::default();
            config.path = PathSet::only(PathKind::Tcp);
            config
        };
        let producer = sized(KvRole::Producer, BLOCKS, config());
        let consumer = sized(KvRole::Consumer, BLOCKS, config());
        let address = producer.listen("127.0.0.1:0").expect("a free port");
        let session = consumer.connect(&address.to_string(), LONG);
        let session = session.expect("a session");
        let blocks = (0..BLOCKS).collect();
        let ticket = producer.offer(
            &RequestId::from("r"),
            &[GroupBlocks { group: 0, blocks }],
            1,
            LONG,
        );
        // Backwards, so that nothing merges.
        let pairs = (0..BLOCKS).map(|src| BlockPair {
            src,
            dst: BLOCKS - 1 - src,
        });
        let pairs = pairs.collect();
        let pull = session.pull(
            &ticket.expect("an offer"),
            &[GroupPairs { group: 0, pairs }],
            PullOptions::default(),
        );
        let pull = pull.expect("a transfer");
        std::thread::sleep(Duration::from_millis(pause));
        drop((session, consumer));
        assert!(pull.wait(Duration::from_secs(10)).is_some(), "{pause} ms");
        assert!(pull.wait_released(Duration::from_secs(10)), "{pause} ms");
    }
}

/// What was sent is received, however soon its producer goes.
#[test]
fn a_push_that_is_done_outlives_its_producer() {
    for (path, notices) in [
        (PathKind::Arena, true),
        (PathKind::Tcp, false),
        (PathKind::Tcp, true),
    ] {
        for round in 0..20 {
            let of = |path| {
                let mut config = Config::default();
                config.path = PathSet::only(path);
                config.enable_notification = notices;
                config
            };
            let producer = sized(KvRole::Producer, 8, of(path));
            let consumer = sized(KvRole::Consumer, 8, of(path));
            let address = producer.listen("127.0.0.1:0").expect("a free port");
            let session = consumer.connect(&address.to_string(), LONG);
            let _session = session.expect("a session");
            let name: PeerName = wait_for(&producer, "peer", |event| match event {
                Event::PeerUp { peer, .. } => Some(peer.clone()),
                _ => None,
            });
            expect(&consumer, "r", 3);
            let to = producer.peer_of(&name).expect("up");
            let push = to.begin_push(&RequestId::from("r")).expect("a push");
            let pairs = vec![BlockPair { src: 0, dst: 3 }];
            push.all_layers(&[GroupPairs { group: 0, pairs }], None)
                .expect("planned");
            let sent = push.commit().expect("committed").wait(LONG);
            assert!(sent.is_some_and(|sent| sent.failure().is_none()));
            drop(to);
            drop(producer);
            let end = ended(&consumer, "r");
            assert!(
                matches!(end, Event::Received { .. }),
                "{path} {notices} {round}: {end:?}"
            );
        }
    }
}
