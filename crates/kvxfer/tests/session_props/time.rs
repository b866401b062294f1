//! Heartbeats, silence and deadlines.
use std::time::Duration;

use kvxfer::session::{Closed, Event, Session, SessionError, SessionState};
use kvxfer::time::Time;
use kvxfer::wire::*;

use crate::pair::*;

/// Runs a session's timers up to `until`, as a driver does that is never late.
fn run_until(s: &mut Session, until: Time) {
    while let Some(t) = s.next_timeout().filter(|t| *t <= until) {
        s.on_time(t);
    }
}

#[test]
fn silence_is_a_stall_then_the_end() {
    let mut pair = Pair::established(config(None), config(None));
    let t0 = pair.now;
    let c = &mut pair.client;
    run_until(c, t0 + Duration::from_millis(4999));
    assert!(drain(c).is_empty());
    run_until(c, t0 + Duration::from_secs(5));
    assert_eq!(
        drain(c),
        [Event::Stalled {
            silent: Duration::from_secs(5)
        }]
    );
    run_until(c, t0 + Duration::from_millis(14_999));
    assert!(drain(c).is_empty());
    run_until(c, t0 + Duration::from_secs(60));
    let silent = Duration::from_secs(15);
    assert_eq!(
        drain(c),
        [Event::Closed(Closed::Failed(SessionError::PeerStalled {
            silent
        }))]
    );
    assert_eq!(c.next_timeout(), None);

    // The peer, awake again, reads that it was given up.
    move_bytes(&mut pair.client, &mut pair.server, t0 + silent, usize::MAX);
    assert!(matches!(
        drain(&mut pair.server).last(),
        Some(Event::Closed(Closed::Failed(SessionError::PeerReported {
            code: ErrorCode::Timeout,
            ..
        })))
    ));
}

#[test]
fn a_stalled_peer_that_speaks_again_resumes() {
    let mut pair = Pair::established(config(None), config(None));
    let t0 = pair.now;
    run_until(&mut pair.client, t0 + Duration::from_secs(7));
    assert!(matches!(
        drain(&mut pair.client).as_slice(),
        [Event::Stalled { .. }]
    ));
    pair.now = t0 + Duration::from_secs(8);
    pair.settle(&[usize::MAX]);
    let silent = Duration::from_secs(8);
    assert_eq!(pair.client_log, [Event::Resumed { silent }]);
    run_until(&mut pair.client, t0 + Duration::from_millis(12_999));
    assert!(drain(&mut pair.client).is_empty());
    run_until(&mut pair.client, t0 + Duration::from_secs(13));
    assert!(matches!(
        drain(&mut pair.client).as_slice(),
        [Event::Stalled { .. }]
    ));
}

#[test]
fn heartbeats_keep_an_idle_session_alive() {
    let mut pair = Pair::established(config(None), config(None));
    let end = pair.now + Duration::from_secs(600);
    let mut wakes = 0;
    while pair.now < end {
        let next = pair
            .client
            .next_timeout()
            .min(pair.server.next_timeout())
            .unwrap();
        assert!(next > pair.now, "a timeout in the past spins the driver");
        pair.now = next;
        pair.client.on_time(next);
        pair.server.on_time(next);
        pair.settle(&[usize::MAX]);
        wakes += 1;
    }
    assert!(pair.client_log.is_empty() && pair.server_log.is_empty());
    assert!(wakes <= 1201, "{wakes}");
}

#[test]
fn time_in_which_this_process_was_stopped_is_not_the_peers_silence() {
    let mut pair = Pair::established(config(None), config(None));
    let t0 = pair.now;
    // SIGSTOP for a minute: the timer of the first second comes 60 seconds late.
    pair.client.on_time(t0 + Duration::from_secs(61));
    assert!(drain(&mut pair.client).is_empty());
    assert!(pair.client.queued() > 0, "it asks for a sign of life");
    // From there on silence counts.
    run_until(&mut pair.client, t0 + Duration::from_secs(61 + 15));
    assert!(pair.client.is_closed());
}

#[test]
fn handshake_and_description_have_deadlines() {
    for side in [Side::Client, Side::Server] {
        let mut s = match side {
            Side::Client => client_of(config(None)),
            Side::Server => server_of(config(None)),
        };
        assert_eq!(s.next_timeout(), None);
        s.start(Time::from_secs(1));
        assert_eq!(s.next_timeout(), Some(Time::from_secs(6)));
        s.on_time(Time::from_secs(6).saturating_sub(MS));
        assert!(!s.is_closed());
        s.on_time(Time::from_secs(6));
        let after = Duration::from_secs(5);
        let error = SessionError::HandshakeTimeout { after };
        assert_eq!(drain(&mut s), [Event::Closed(Closed::Failed(error))]);
    }
    // Both alive, but nobody describes anything.
    let mut pair = Pair::new(config(None), config(None));
    let end = pair.now + Duration::from_secs(31);
    while pair.now < end && !pair.client.is_closed() {
        while move_bytes(&mut pair.client, &mut pair.server, pair.now, usize::MAX)
            | move_bytes(&mut pair.server, &mut pair.client, pair.now, usize::MAX)
        {}
        let Some(next) = pair.client.next_timeout().min(pair.server.next_timeout()) else {
            break;
        };
        pair.now = next;
        pair.client.on_time(next);
        pair.server.on_time(next);
    }
    let after = Duration::from_secs(30);
    let error = SessionError::EstablishTimeout {
        state: SessionState::Authenticated,
        after,
    };
    assert_eq!(
        drain(&mut pair.client).last(),
        Some(&Event::Closed(Closed::Failed(error)))
    );
}

#[test]
fn a_ping_gives_its_round_trip_once() {
    let mut pair = Pair::established(config(None), config(None));
    let sequence = pair.client.ping(pair.now).unwrap();
    move_bytes(
        &mut pair.client,
        &mut pair.server,
        pair.now + MS,
        usize::MAX,
    );
    pair.now = pair.now + 3 * MS;
    pair.settle(&[usize::MAX]);
    assert_eq!(
        pair.client_log,
        [Event::Pong {
            sequence,
            round_trip: 3 * MS
        }]
    );
    assert!(pair.server_log.is_empty());
}
