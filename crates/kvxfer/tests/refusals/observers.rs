//! A look at a live engine: what it brings, and how it fails.

use std::io::Read;
use std::net::TcpListener;
use std::time::Duration;

use crate::support::{LONG, bounded, groups, pairs, until};
use crate::{SOON, chain, offer, pair};
use kvxfer::Error;
use kvxfer::config::{Config, KvRole};
use kvxfer::engine::{Outcome, PeerLayout, PullOptions, describe};
use kvxfer::event::Event;
use kvxfer::ids::RequestId;
use kvxfer::session::SessionError;

fn look(config: &Config, address: &str, limit: Duration) -> Result<PeerLayout, Error> {
    let (config, address) = (config.clone(), address.to_owned());
    bounded("a look", move || describe(&config, &address, limit))
}

#[test]
fn an_observer_sees_the_layout_and_disturbs_nobody() {
    let (producer, consumer, instance) = pair();
    let address = producer.engine.metadata().expect("it listens");
    let address = kvxfer::metadata::Metadata::from_bytes(&address).expect("metadata");
    let ticket = offer(&producer, "r", 8);
    let mut events = Vec::new();
    // The side that is connected to hears a moment later that the session stands.
    until("the peer", || {
        producer.engine.poll_events(&mut events);
        events.iter().any(|e| matches!(e, Event::PeerUp { .. }))
    });
    for _ in 0..3 {
        let seen = look(&Config::default(), &address.address, LONG).expect("a layout");
        assert_eq!(seen.name, producer.name());
        assert_eq!(seen.generation, producer.engine.generation());
        assert_eq!(seen.kv_role, KvRole::Producer);
        assert!(!seen.by_secret);
        assert_eq!(&seen.format, producer.side.format());
        assert_eq!(&seen.placement, producer.side.placement().desc());
    }
    let pull = instance.pull(&ticket, &pairs([(3, 4)]), PullOptions::default());
    assert_eq!(pull.expect("a transfer").wait(LONG), Some(Outcome::Done));
    consumer.assert_untouched_but([4]);
    events.clear();
    producer.engine.poll_events(&mut events);
    let of_peers = events.iter().filter(|event| {
        matches!(
            event,
            Event::PeerUp { .. } | Event::PeerDown { .. } | Event::PeerRestarted { .. }
        )
    });
    assert_eq!(of_peers.count(), 0, "{events:?}");
}

#[test]
fn looks_that_fail() {
    // A port that was free a moment ago.
    let free = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr());
    let free = free.expect("a port").to_string();
    let error = look(&Config::default(), &free, LONG).expect_err("nobody listens");
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    let error = look(&Config::default(), "no-such-host.invalid:1", LONG).expect_err("no host");
    assert!(
        matches!(error, Error::Resolve { .. } | Error::Unreachable { .. }),
        "{error}"
    );

    // One that listens and says nothing.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    let silent = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().expect("an observer");
        let mut rest = Vec::new();
        let _ = socket.read_to_end(&mut rest);
    });
    let error = look(&Config::default(), &address, SOON).expect_err("silence");
    let Error::Session { source, .. } = &error else {
        panic!("{error}");
    };
    assert!(
        matches!(source, SessionError::HandshakeTimeout { after } if *after <= SOON),
        "{source}"
    );
    silent.join().expect("it ends");

    // A secret that only one side has.
    let (producer, _consumer, _instance) = pair();
    let address = producer.engine.metadata().expect("it listens");
    let address = kvxfer::metadata::Metadata::from_bytes(&address).expect("metadata");
    let file = std::env::temp_dir().join(format!("kvxfer-observers-{}", std::process::id()));
    std::fs::write(&file, "a secret of thirty-two bytes or more").expect("written");
    let mut config = Config::default();
    config.secret_file = Some(file.clone());
    let error = look(&config, &address.address, LONG).expect_err("no secret there");
    std::fs::remove_file(&file).expect("it was there");
    assert!(chain(&error).contains("secret"), "{}", chain(&error));
    // All that changed nothing for those who work.
    let request = RequestId::from("r");
    producer
        .engine
        .offer(&request, &groups(0..8), 1, LONG)
        .expect("an offer");
}
