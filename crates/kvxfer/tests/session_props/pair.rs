//! Two sessions that talk to each other, in virtual time.
use std::time::Duration;

use kvxfer::ids::{Generation, Rank};
use kvxfer::session::{Closed, Event, Session, SessionConfig, SessionError, SessionState};
use kvxfer::time::Time;
use kvxfer::wire::*;

pub(crate) const MS: Duration = Duration::from_millis(1);

pub(crate) fn secret(text: &str) -> Option<Secret> {
    Some(Secret::new(text.as_bytes().to_vec()).unwrap())
}

pub(crate) fn config(secret: Option<Secret>) -> SessionConfig {
    SessionConfig {
        secret,
        ..SessionConfig::default()
    }
}

pub(crate) fn client_of(config: SessionConfig) -> Session {
    Session::client(config, HandshakeNonce([0xc1; 32]))
}

pub(crate) fn server_of(config: SessionConfig) -> Session {
    Session::server(config, HandshakeNonce([0x5e; 32]))
}

pub(crate) fn plain_describe(engine: &str) -> Describe {
    Describe {
        engine: engine.into(),
        generation: Generation([7; 16]),
        rank: Rank::default(),
        kv_role: KvRole::Both,
        wanted: None,
        fingerprint: Fingerprint([1; 32]),
        format: Blob(vec![1, 2, 3]),
        placement: Blob(vec![4; 100]),
        rails: vec![RailDesc {
            place: 0,
            device: Blob(vec![9; 40]),
            memories: vec![RemoteSpan {
                addr: 0x1000,
                len: 1 << 32,
                rkey: 77,
            }],
            leases: Some(RemoteSpan {
                addr: 0x2000,
                len: 64,
                rkey: 78,
            }),
            scratch: Some(RemoteSpan {
                addr: 0x3000,
                len: 4096,
                rkey: 79,
            }),
            staging: None,
        }],
        facts: ConfigFacts {
            qp_per_transfer: 4,
            ..ConfigFacts::default()
        },
        fd_backed: true,
        gpu: None,
        shared: None,
    }
}

pub(crate) fn drain(s: &mut Session) -> Vec<Event> {
    std::iter::from_fn(|| s.poll_event()).collect()
}

/// Moves at most `step` bytes from one to the other; returns whether any moved.
pub(crate) fn move_bytes(from: &mut Session, to: &mut Session, now: Time, step: usize) -> bool {
    let n = from.transmit().len().min(step);
    let bytes = from.transmit()[..n].to_vec();
    from.transmitted(n);
    to.on_bytes(now, &bytes);
    n > 0
}

/// What an engine does with events until it is ready: describe, accept, exchange one offer.
pub(crate) fn behave(s: &mut Session, log: &mut Vec<Event>, engine: &str) {
    while let Some(event) = s.poll_event() {
        match &event {
            // The end may have come in the same bytes as what is told first.
            _ if s.is_closed() => {}
            Event::Authenticated { .. } => s.send(&plain_describe(engine).into()).unwrap(),
            Event::PeerDescribed(d) => {
                assert_eq!(d.rails.len(), 1);
                s.accept();
                if s.side() == Side::Client {
                    let offer = QpOffer {
                        offer: 3,
                        replaces: None,
                        path: PathKind::Arena,
                        candidates: vec![],
                        endpoints: [1, 2].map(|n| RailEndpoint::first(Blob(vec![n]))).into(),
                    };
                    s.send(&offer.into()).unwrap();
                }
            }
            Event::QpOffer(o) => {
                let answer = QpAnswer {
                    offer: o.offer,
                    path: Some(o.path),
                    candidates: vec![],
                    endpoints: o.endpoints.clone(),
                };
                s.send(&answer.into()).unwrap();
                s.send(&Ready {}.into()).unwrap();
            }
            Event::QpAnswer(_) => s.send(&Ready {}.into()).unwrap(),
            _ => {}
        }
        log.push(event);
    }
}

pub(crate) struct Pair {
    pub(crate) client: Session,
    pub(crate) server: Session,
    pub(crate) now: Time,
    pub(crate) client_log: Vec<Event>,
    pub(crate) server_log: Vec<Event>,
}

impl Pair {
    pub(crate) fn new(client: SessionConfig, server: SessionConfig) -> Pair {
        let mut pair = Pair {
            client: client_of(client),
            server: server_of(server),
            now: Time::from_secs(100),
            client_log: vec![],
            server_log: vec![],
        };
        pair.client.start(pair.now);
        pair.server.start(pair.now);
        pair
    }

    /// Lets both run until nothing moves.
    pub(crate) fn settle(&mut self, steps: &[usize]) {
        for step in steps.iter().cycle() {
            let a = move_bytes(&mut self.client, &mut self.server, self.now, *step);
            let b = move_bytes(&mut self.server, &mut self.client, self.now, *step);
            behave(&mut self.client, &mut self.client_log, "decode");
            behave(&mut self.server, &mut self.server_log, "prefill");
            if !a && !b && self.client.queued() == 0 && self.server.queued() == 0 {
                return;
            }
        }
    }

    pub(crate) fn established(client: SessionConfig, server: SessionConfig) -> Pair {
        let mut pair = Pair::new(client, server);
        pair.settle(&[usize::MAX]);
        assert_eq!(
            pair.client.state(),
            SessionState::Established,
            "{:?}",
            pair.client_log
        );
        assert_eq!(
            pair.server.state(),
            SessionState::Established,
            "{:?}",
            pair.server_log
        );
        pair.client_log.clear();
        pair.server_log.clear();
        pair
    }

    pub(crate) fn failures(&self) -> (SessionError, SessionError) {
        let one = |log: &[Event]| match log.last() {
            Some(Event::Closed(Closed::Failed(error))) => error.clone(),
            other => panic!("not failed: {other:?}"),
        };
        assert!(
            !self
                .client_log
                .iter()
                .any(|e| matches!(e, Event::PeerDescribed(_)))
        );
        (one(&self.client_log), one(&self.server_log))
    }
}

/// The bytes that each side sends until both are authenticated.
pub(crate) fn handshake_bytes(secret: Option<Secret>) -> (Vec<u8>, Vec<u8>) {
    let (mut c, mut s) = (client_of(config(secret.clone())), server_of(config(secret)));
    c.start(Time(0));
    let (mut to_server, mut to_client) = (vec![], vec![]);
    for _ in 0..4 {
        to_server.extend_from_slice(c.transmit());
        move_bytes(&mut c, &mut s, Time(0), usize::MAX);
        to_client.extend_from_slice(s.transmit());
        move_bytes(&mut s, &mut c, Time(0), usize::MAX);
    }
    assert!(c.session_id().is_some() && c.session_id() == s.session_id());
    (to_server, to_client)
}
