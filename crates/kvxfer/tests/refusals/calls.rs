//! Calls that make no sense.

use std::time::Duration;

use crate::support::{LONG, bounded, groups, pairs};
use crate::{BLOCKS, SOON, back, chain, offer, pair, side};
use kvxfer::blocks::GroupBlocks;
use kvxfer::config::{Config, KvRole};
use kvxfer::engine::{Outcome, PullOptions};
use kvxfer::event::Event;
use kvxfer::ids::RequestId;
use kvxfer::layout::{KvFormat, KvPlacement, Packing, Topology};
use kvxfer::mem::HostBuffer;
use kvxfer::mem::gpu::{GpuMemory, GpuRuntime, RuntimeChoice, RuntimeKind};
use kvxfer::ticket::Ticket;
use kvxfer::{Engine, Error};

#[test]
fn roles() {
    let (producer, consumer, instance) = pair();
    let request = RequestId::from("r");
    let blocks = groups(0..4);
    let wrong = |error: Error| assert!(matches!(error, Error::WrongRole { .. }), "{error}");
    wrong(
        producer
            .engine
            .expect(&request, &blocks, 1, SOON)
            .expect_err("a producer expects"),
    );
    wrong(
        consumer
            .engine
            .offer(&request, &blocks, 1, SOON)
            .expect_err("a consumer offers"),
    );
    wrong(
        instance
            .begin_push(&request)
            .expect_err("a consumer pushes"),
    );
    let ticket = offer(&producer, "r", 4);
    let back = back(&producer, &consumer);
    wrong(
        back.pull(&ticket, &pairs([(0, 0)]), PullOptions::default())
            .expect_err("a producer pulls"),
    );
}

#[test]
fn memory_of_a_gpu_and_of_the_host_are_not_one_engines() {
    let runtime = RuntimeChoice::Only(RuntimeKind::Host);
    let runtime = GpuRuntime::open(runtime).expect("the stand-in");
    let gpu = runtime.gpu(0).expect("its device");
    let format = KvFormat::opaque(64, 2).expect("a format");
    let topology = Topology::single(&format);
    let packing = Packing::PerTensor;
    let shape = KvPlacement::uniform(&format, topology, &[4], packing, 64).expect("a shape");
    let bytes = shape.memory_bytes().to_vec();
    let host = HostBuffer::new(bytes[0]).expect("memory");
    let vram = GpuMemory::new(gpu, bytes[1]).expect("memory");
    let memory = vec![host.as_memory(), vram.as_memory()];
    let placement = shape.place(&format, memory).expect("a placement");
    let engine = Engine::new(Config::default(), format, placement);
    let refused = engine.expect_err("two kinds of memory");
    let mixed = matches!(refused, Error::MixedMemory { host: 0, gpu: 1 });
    assert!(mixed, "{refused}");
}

#[test]
fn names_and_blocks_that_are_none() {
    let (producer, consumer, _instance) = pair();
    let back = back(&producer, &consumer);
    for (len, name) in [(0, String::new()), (513, "x".repeat(513))] {
        let request = RequestId::from(name);
        let is = |error: Error| {
            assert!(
                matches!(error, Error::RequestName { len: l } if l == len),
                "{error}"
            );
        };
        let blocks = groups([1]);
        is(producer
            .engine
            .offer(&request, &blocks, 1, SOON)
            .expect_err("a name"));
        is(consumer
            .engine
            .expect(&request, &blocks, 1, SOON)
            .expect_err("a name"));
        is(back.begin_push(&request).expect_err("a name"));
    }
    let longest = RequestId::from("y".repeat(512));
    let ticket = producer
        .engine
        .offer(&longest, &groups([1]), 1, LONG)
        .expect("a long name");
    assert_eq!(
        Ticket::from_json(&ticket.to_json().expect("json")).expect("a ticket"),
        ticket
    );

    let request = RequestId::from("r");
    let no_such = |error: Error| {
        let Error::NoSuchBlock {
            block, num_blocks, ..
        } = error
        else {
            panic!("{error}");
        };
        assert_eq!((block, num_blocks), (BLOCKS, BLOCKS));
    };
    let beyond = groups([0, BLOCKS]);
    no_such(
        producer
            .engine
            .offer(&request, &beyond, 1, SOON)
            .expect_err("beyond"),
    );
    no_such(
        consumer
            .engine
            .expect(&request, &beyond, 1, SOON)
            .expect_err("beyond"),
    );
    let twice = groups([3, 4, 3]);
    let error = producer
        .engine
        .offer(&request, &twice, 1, SOON)
        .expect_err("twice");
    assert!(chain(&error).contains("block 3"), "{}", chain(&error));
    let error = consumer
        .engine
        .expect(&request, &twice, 1, SOON)
        .expect_err("twice");
    assert!(chain(&error).contains("block 3"), "{}", chain(&error));
    let unknown = vec![GroupBlocks {
        group: 7,
        blocks: vec![0],
    }];
    let error = producer
        .engine
        .offer(&request, &unknown, 1, SOON)
        .expect_err("no such group");
    assert!(chain(&error).contains("group 7"), "{}", chain(&error));
    let error = consumer
        .engine
        .expect(&request, &unknown, 1, SOON)
        .expect_err("no such group");
    assert!(chain(&error).contains("group 7"), "{}", chain(&error));
    assert!(matches!(
        producer.engine.offer(&request, &groups([1]), 0, SOON),
        Err(Error::Lease(_))
    ));
    assert!(matches!(
        consumer.engine.expect(&request, &groups([1]), 0, SOON),
        Err(Error::Expect(_))
    ));
    assert!(!producer.engine.retract(&request));
    assert!(!consumer.engine.cancel_expect(&request));
}

/// Durations that no clock can hold mean "no limit", and panic nowhere.
#[test]
fn endless_deadlines() {
    let producer = side(KvRole::Producer);
    let consumer = side(KvRole::Consumer);
    producer.side.fill(7).expect("filled");
    let address = producer.engine.listen("127.0.0.1:0").expect("a port");
    let to = consumer.engine.clone();
    let instance = bounded("connect", move || {
        to.connect(&address.to_string(), Duration::MAX)
            .expect("a session")
    });
    let ticket = offer(&producer, "r", 4);
    let options = PullOptions {
        deadline: Some(Duration::MAX),
        ..PullOptions::default()
    };
    let engine = consumer.engine.clone();
    let waiting = std::thread::spawn(move || {
        let mut log = Vec::new();
        while !log.iter().any(|e| matches!(e, Event::Received { .. })) {
            engine.wait_events(&mut log, Duration::MAX);
        }
    });
    let transfer = instance
        .pull(&ticket, &pairs([(0, 0)]), options)
        .expect("a transfer");
    bounded("the pull", move || {
        assert_eq!(transfer.wait(Duration::MAX), Some(Outcome::Done));
        assert!(transfer.wait_released(Duration::MAX));
    });
    bounded("the events", move || waiting.join().expect("no panic"));
    assert!(instance.wait_up(Duration::MAX));
    // Longer than a ticket may live: said, not cut short in silence.
    let forever = producer
        .engine
        .offer(&RequestId::from("f"), &groups([9]), 1, Duration::MAX);
    assert!(forever.is_err() || forever.is_ok_and(|ticket| ticket.to_bytes().is_ok()));
}
