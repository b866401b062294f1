//! The bytes of a stranger, to both ends and to each decoder of the handshake.
#![no_main]

use kvxfer::session::{Closed, Event, Session, SessionConfig};
use kvxfer::time::Time;
use kvxfer::wire::{
    Auth, AuthOk, Challenge, ConnectionKind, HandshakeNonce, Hello, Preamble, Reject, Secret, sniff,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((mode, bytes)) = data.split_first() else {
        return;
    };
    let _ = sniff(bytes);
    if let Ok(hello) = Hello::decode(bytes) {
        // Whatever a full Hello says, its versions can be read alone, or are upside down.
        match Hello::decode_versions(bytes) {
            Ok(versions) => assert_eq!(versions, hello.versions),
            Err(_) => assert!(hello.versions.min > hello.versions.max),
        }
    }
    let _ = Challenge::decode(bytes);
    let _ = Auth::decode(bytes);
    let _ = AuthOk::decode(bytes);
    let _ = Reject::decode(bytes);

    let secret = (mode & 1 == 1).then(|| Secret::new(b"fuzzing is no secret".to_vec()).unwrap());
    let config = SessionConfig {
        secret,
        ..SessionConfig::default()
    };
    let mut session = if mode & 2 == 2 {
        Session::client(config, HandshakeNonce([1; 32]))
    } else {
        Session::server(config, HandshakeNonce([2; 32]))
    };
    session.start(Time(0));
    if mode & 4 == 4 {
        session.on_bytes(
            Time(0),
            &Preamble {
                kind: ConnectionKind::Control,
            }
            .encode(),
        );
    }
    let cut = usize::from(mode >> 3) + 1;
    for piece in bytes.chunks(cut * 7) {
        session.on_bytes(Time(0), piece);
    }
    session.on_eof(Time(0));
    // Nobody guesses an HMAC: the only event is the end.
    assert!(matches!(
        session.poll_event(),
        Some(Event::Closed(Closed::Failed(_)))
    ));
    assert!(session.poll_event().is_none());
    assert!(session.queued() < 1024);
});
