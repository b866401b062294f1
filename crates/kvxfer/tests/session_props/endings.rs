//! Refusals, goodbyes, and connections that end.
use std::io::ErrorKind;

use kvxfer::ids::EngineId;
use kvxfer::session::{Closed, Event, SendError, SessionConfig, SessionError, SessionState};
use kvxfer::time::Time;
use kvxfer::wire::*;

use crate::pair::*;

#[test]
fn refusals_and_goodbyes_reach_the_peer() {
    // The server does not serve benchmarks.
    let bench = SessionConfig {
        role: Role::Bench,
        ..config(None)
    };
    let mut pair = Pair::new(bench, config(None));
    pair.settle(&[usize::MAX]);
    let reason = Refusal::RoleNotServed { role: Role::Bench };
    assert_eq!(
        pair.failures(),
        (
            SessionError::Rejected {
                reason: reason.clone()
            },
            SessionError::Refused {
                reason: reason.clone()
            }
        )
    );
    assert!(reason.to_string().contains("allow_bench"));

    // A decision of the engine's own.
    let mut pair = Pair::established(config(None), config(None));
    let long = "field dtype: f16 here, bf16 there\n".repeat(1000);
    pair.server.refuse(Refusal::FormatMismatch { detail: long });
    pair.settle(&[usize::MAX]);
    match pair.client_log.as_slice() {
        [
            Event::Closed(Closed::Failed(SessionError::Rejected {
                reason: Refusal::FormatMismatch { detail },
            })),
        ] => assert!(detail.starts_with("field dtype") && !detail.contains('\n')),
        other => panic!("{other:?}"),
    }

    let mut pair = Pair::established(config(None), config(None));
    pair.server.close(GoodbyeReason::ShuttingDown);
    assert!(pair.server.is_closed() && !pair.server.is_finished());
    pair.settle(&[usize::MAX]);
    assert!(pair.server.is_finished());
    assert_eq!(
        pair.server_log,
        [Event::Closed(Closed::Local(GoodbyeReason::ShuttingDown))]
    );
    assert_eq!(
        pair.client_log,
        [Event::Closed(Closed::Goodbye(GoodbyeReason::ShuttingDown))]
    );
    // Nothing changes a closed session.
    pair.client.on_bytes(pair.now, b"more");
    pair.client.on_eof(pair.now);
    pair.client.on_time(Time::MAX);
    pair.client.close(GoodbyeReason::Finished);
    assert!(drain(&mut pair.client).is_empty());
    assert!(pair.client.send(&Ready {}.into()).is_err());
}

#[test]
fn the_wrong_engine_is_noticed_from_either_side() {
    for (ours, wanted_by_client, wanted_by_server) in [
        ("b", Some("x"), None),
        ("b", None, Some("x")),
        ("b", Some("b"), Some("a")),
    ] {
        let mut pair = Pair::new(config(None), config(None));
        for _ in 0..3 {
            move_bytes(&mut pair.client, &mut pair.server, pair.now, usize::MAX);
            move_bytes(&mut pair.server, &mut pair.client, pair.now, usize::MAX);
        }
        let want = |w: Option<&str>| w.map(EngineId::from);
        let client = Describe {
            wanted: want(wanted_by_client),
            ..plain_describe("a")
        };
        let server = Describe {
            wanted: want(wanted_by_server),
            ..plain_describe(ours)
        };
        pair.client.send(&client.into()).unwrap();
        move_bytes(&mut pair.client, &mut pair.server, pair.now, usize::MAX);
        let sent = pair.server.send(&server.into());
        while move_bytes(&mut pair.server, &mut pair.client, pair.now, usize::MAX) {}
        let (c, s) = (drain(&mut pair.client), drain(&mut pair.server));
        if wanted_by_server == Some("a") {
            assert!(sent.is_ok() && !pair.client.is_closed() && !pair.server.is_closed());
            continue;
        }
        let here = if wanted_by_client.is_some() { "b" } else { "a" };
        let reason = Refusal::WrongEngine {
            here: here.into(),
            wanted: "x".into(),
        };
        assert!(sent.is_err());
        assert_eq!(
            s.last(),
            Some(&Event::Closed(Closed::Failed(SessionError::Refused {
                reason: reason.clone()
            })))
        );
        let last = c.last();
        let refused = Event::Closed(Closed::Failed(SessionError::Refused {
            reason: reason.clone(),
        }));
        let rejected = Event::Closed(Closed::Failed(SessionError::Rejected { reason }));
        assert!(
            last == Some(&refused) || last == Some(&rejected),
            "{last:?}"
        );
    }
}

#[test]
fn the_end_of_the_connection_is_told_with_its_state() {
    let mut s = server_of(config(None));
    s.start(Time(0));
    s.on_eof(Time(0));
    let error = SessionError::PeerClosed {
        state: SessionState::Handshake,
        mid_frame: false,
    };
    assert_eq!(drain(&mut s), [Event::Closed(Closed::Failed(error))]);

    let mut pair = Pair::established(config(None), config(None));
    pair.client
        .send(
            &Announce {
                ticket: Blob(vec![0; 99]),
            }
            .into(),
        )
        .unwrap();
    move_bytes(&mut pair.client, &mut pair.server, pair.now, 50);
    pair.server.on_eof(pair.now);
    let error = SessionError::PeerClosed {
        state: SessionState::Established,
        mid_frame: true,
    };
    assert_eq!(
        drain(&mut pair.server),
        [Event::Closed(Closed::Failed(error))]
    );

    pair.client
        .on_io_error(pair.now, ErrorKind::ConnectionReset);
    let kind = ErrorKind::ConnectionReset;
    let error = SessionError::ConnectionLost {
        state: SessionState::Established,
        kind,
    };
    assert_eq!(
        error.to_string(),
        "connection lost in state established: connection reset"
    );
    assert_eq!(
        drain(&mut pair.client),
        [Event::Closed(Closed::Failed(error))]
    );
}

#[test]
fn a_peer_that_does_not_read_fills_a_bounded_queue() {
    let small = SessionConfig {
        max_queued: 100_000,
        ..config(None)
    };
    let mut pair = Pair::established(small, config(None));
    let announce = Announce {
        ticket: Blob(vec![0; 9_000]),
    }
    .into();
    let mut sent = 0;
    let error = loop {
        match pair.client.send(&announce) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
        assert!(sent < 100);
    };
    assert!(matches!(error, SendError::QueueFull { limit: 100_000, .. }));
    assert_eq!(sent, 11);
    // Pings from the peer do not make it grow either, and it can still say goodbye.
    let before = pair.client.queued();
    for _ in 0..1000 {
        pair.server.ping(pair.now).unwrap();
    }
    while move_bytes(&mut pair.server, &mut pair.client, pair.now, usize::MAX) {}
    assert!(pair.client.queued() <= 100_000);
    assert!(pair.client.queued() >= before);
    pair.client.transmitted(before);
    pair.client.send(&announce).unwrap();
}

#[test]
fn a_message_larger_than_the_peer_takes_is_not_sent() {
    let small = SessionConfig {
        max_frame: 1,
        ..config(None)
    };
    let mut pair = Pair::established(config(None), small);
    let big: Message = Announce {
        ticket: Blob(vec![0; 70_000]),
    }
    .into();
    let max = MAX_UNAUTHENTICATED_FRAME;
    assert!(matches!(pair.client.send(&big), Err(SendError::TooLarge { max: m, .. }) if m == max));
    pair.server.send(&big).unwrap();
    pair.settle(&[usize::MAX]);
    assert_eq!(pair.client_log, [Event::Message(big)]);
}
