//! Addresses that lead nowhere, and peers that are none.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::support::{LONG, bounded, until};
use crate::{SOON, chain, session_error, side};
use kvxfer::Error;
use kvxfer::config::KvRole;
use kvxfer::session::{Closed, Event as SessionEvent, Session, SessionConfig, SessionError};
use kvxfer::time::Time;
use kvxfer::wire::{HandshakeNonce, Saw, VersionRange, WireError};

#[test]
fn addresses_that_lead_nowhere() {
    let node = side(KvRole::Consumer);
    let error = node
        .engine
        .connect("no-such-host.invalid:7301", SOON)
        .expect_err("no such host");
    assert!(matches!(error, Error::Resolve { .. }), "{error}");
    let error = node
        .engine
        .connect("127.0.0.1:seven", SOON)
        .expect_err("not a port");
    assert!(matches!(error, Error::Resolve { .. }), "{error}");

    // A port that was free a moment ago.
    let address = TcpListener::bind("127.0.0.1:0")
        .and_then(|l| l.local_addr())
        .expect("a port");
    let error = node
        .engine
        .connect(&address.to_string(), SOON)
        .expect_err("nobody listens");
    let Error::Unreachable { source, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(source.kind(), std::io::ErrorKind::ConnectionRefused);
    let error = node
        .engine
        .connect_with(b"nonsense", SOON)
        .expect_err("bytes");
    assert!(matches!(error, Error::Metadata { .. }), "{error}");
}

#[test]
fn another_engine_than_the_metadata_says() {
    let (first, second) = (side(KvRole::Producer), side(KvRole::Producer));
    let consumer = side(KvRole::Consumer);
    let address = first.engine.listen("127.0.0.1:0").expect("a port");
    let metadata = first.engine.metadata().expect("metadata");
    drop(first);
    // The second one takes the first one's port.
    until("the port is free", || {
        second.engine.listen(&address.to_string()).is_ok()
    });
    let error = consumer
        .engine
        .connect_with(&metadata, LONG)
        .expect_err("another engine");
    let text = chain(&error);
    assert!(text.contains(second.engine.id().0.as_ref()), "{text}");
}

#[test]
fn listening_where_one_may_not() {
    let node = side(KvRole::Producer);
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("its address").to_string();
    let error = node.engine.listen(&address).expect_err("a busy port");
    let Error::Listen { source, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(source.kind(), std::io::ErrorKind::AddrInUse);
    let error = node.engine.listen("0.0.0.0:0").expect_err("no secret");
    assert!(matches!(error, Error::Unauthenticated { .. }), "{error}");
    assert!(matches!(node.engine.metadata(), Err(Error::NotListening)));
    node.engine.listen("127.0.0.1:0").expect("a free port");
    let error = node.engine.listen("127.0.0.1:0").expect_err("a second one");
    assert!(matches!(error, Error::Listening { .. }), "{error}");
}

/// What connecting to a listener that treats its one connection so comes to.
fn connect_to(treat: impl FnOnce(TcpStream) + Send + 'static) -> Error {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address").to_string();
    let treating = std::thread::spawn(move || {
        if let Ok((stream, _)) = listener.accept() {
            treat(stream);
        }
    });
    let node = side(KvRole::Consumer);
    let begun = Instant::now();
    let error = node
        .engine
        .connect(&address, SOON)
        .expect_err("not a peer at all");
    assert!(begun.elapsed() < SOON + Duration::from_secs(5), "too late");
    bounded("engine drop", move || drop(node));
    treating.join().expect("the listener does not panic");
    error
}

#[test]
fn a_web_server() {
    let error = connect_to(|mut stream| {
        let mut bytes = [0; 64];
        // Whatever has come is answered, as a web server does.
        let _ = stream.read(&mut bytes);
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n");
    });
    let SessionError::Wire(WireError::NotKvxfer { saw }) = session_error(&error) else {
        panic!("{error:?}");
    };
    assert_eq!(*saw, Saw::Http);
}

#[test]
fn a_peer_that_says_nothing() {
    let error = connect_to(|mut stream| {
        // Until the other side gives up.
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    match &error {
        Error::Deadline { .. } => {}
        other => assert!(
            matches!(session_error(other), SessionError::HandshakeTimeout { .. }),
            "{other:?}"
        ),
    }
}

#[test]
fn a_peer_that_hangs_up() {
    let error = connect_to(drop);
    assert!(
        matches!(
            session_error(&error),
            SessionError::PeerClosed { .. } | SessionError::ConnectionLost { .. }
        ),
        "{error:?}"
    );
}

/// Drives one end of a session by hand until it closes.
fn drive(mut session: Session, mut stream: TcpStream) -> Closed {
    let begun = Instant::now();
    let now = || Time::ZERO.saturating_add(begun.elapsed());
    stream
        .set_read_timeout(Some(Duration::from_millis(20)))
        .expect("a timeout");
    session.start(now());
    let mut bytes = [0; 4096];
    loop {
        assert!(begun.elapsed() < LONG, "the session never ends");
        let out = session.transmit().to_vec();
        // The other end may be gone; the session hears of it from its reads.
        let _ = stream.write_all(&out);
        session.transmitted(out.len());
        while let Some(event) = session.poll_event() {
            if let SessionEvent::Closed(how) = event {
                return how;
            }
        }
        match stream.read(&mut bytes) {
            Ok(0) => session.on_eof(now()),
            Ok(n) => session.on_bytes(now(), &bytes[..n]),
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock) => {}
            Err(e) => session.on_io_error(now(), e.kind()),
        }
        session.on_time(now());
    }
}

fn later_version() -> SessionConfig {
    SessionConfig {
        versions: VersionRange { min: 900, max: 901 },
        ..SessionConfig::default()
    }
}

#[test]
fn a_peer_of_another_version() {
    let error = connect_to(|stream| {
        let session = Session::server(later_version(), HandshakeNonce([7; 32]));
        drive(session, stream);
    });
    let SessionError::VersionMismatch { theirs, .. } = session_error(&error) else {
        panic!("{error:?}");
    };
    assert_eq!(*theirs, VersionRange { min: 900, max: 901 });
    assert!(chain(&error).contains("900 to 901"), "{}", chain(&error));

    // And the other way round; the engine serves others afterwards.
    let producer = side(KvRole::Producer);
    let address = producer.engine.listen("127.0.0.1:0").expect("a port");
    let stream = TcpStream::connect(address).expect("it listens");
    let session = Session::client(later_version(), HandshakeNonce([8; 32]));
    match drive(session, stream) {
        Closed::Failed(SessionError::VersionMismatch { .. }) => {}
        other => panic!("{other:?}"),
    }
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 64], &[0xff; 4096]] {
        let mut stream = TcpStream::connect(address).expect("it listens");
        stream.write_all(garbage).expect("sent");
        stream.set_read_timeout(Some(LONG)).expect("a timeout");
        // It hangs up; with unread bytes that is a reset.
        let mut answer = Vec::new();
        if let Err(error) = stream.read_to_end(&mut answer) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
    }
    let consumer = side(KvRole::Consumer);
    consumer
        .engine
        .connect(&address.to_string(), LONG)
        .expect("a session");
}
