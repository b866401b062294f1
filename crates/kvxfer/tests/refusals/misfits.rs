//! Peers that do not fit: secrets, formats, roles, memory.

use std::path::PathBuf;

use crate::support::{LONG, Log, recipe};
use crate::{BLOCK, BLOCKS, chain, session_error, side};
use kvxfer::Error;
use kvxfer::bench::BenchMemory;
use kvxfer::config::{KvRole, PathKind};
use kvxfer::event::Event;
use kvxfer::layout::KvFormat;
use kvxfer::session::{Party, SessionError};
use kvxfer::wire::Refusal as PeerRefusal;

/// A file that is gone with it.
struct SecretFile(PathBuf);

impl SecretFile {
    fn new(name: &str, secret: &str) -> Self {
        let name = format!("kvxfer-refusals-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, secret).expect("a secret");
        Self(path)
    }
}

impl Drop for SecretFile {
    fn drop(&mut self) {
        // Left to the system otherwise.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn connect_with_secrets(
    here: Option<&SecretFile>,
    there: Option<&SecretFile>,
) -> Result<(), Error> {
    let with = |role, secret: Option<&SecretFile>| {
        recipe(role, PathKind::Tcp, BLOCK, BLOCKS)
            .with(|config| config.secret_file = secret.map(|file| file.0.clone()))
            .node()
    };
    let producer = with(KvRole::Producer, there);
    let consumer = with(KvRole::Consumer, here);
    let address = producer.engine.listen("127.0.0.1:0").expect("a port");
    let connected = consumer.engine.connect(&address.to_string(), LONG);
    connected.map(|instance| assert!(instance.is_up()))
}

#[test]
fn secrets() {
    let (one, two) = (SecretFile::new("one", "abc"), SecretFile::new("two", "abd"));
    connect_with_secrets(Some(&one), Some(&one)).expect("the same secret");
    let error = connect_with_secrets(Some(&one), Some(&two)).expect_err("another secret");
    assert_eq!(*session_error(&error), SessionError::NotAuthorised);
    let error = connect_with_secrets(None, Some(&two)).expect_err("no secret here");
    let none_here = SessionError::SecretMissing { side: Party::Us };
    assert_eq!(*session_error(&error), none_here);
    let error = connect_with_secrets(Some(&one), None).expect_err("no secret there");
    let none_there = SessionError::SecretMissing { side: Party::Peer };
    assert_eq!(*session_error(&error), none_there);
    // A file that cannot be read is said at the start.
    let missing = SecretFile(PathBuf::from("/nonexistent/secret"));
    let bad = recipe(KvRole::Producer, PathKind::Tcp, BLOCK, BLOCKS)
        .with(|config| config.secret_file = Some(missing.0.clone()));
    assert!(matches!(bad.try_node(), Err(Error::Secret(_))));
}

#[test]
fn formats_that_do_not_fit_and_roles_that_do_not_meet() {
    let producer = side(KvRole::Producer);
    let address = producer
        .engine
        .listen("127.0.0.1:0")
        .expect("a port")
        .to_string();
    let consumer = recipe(KvRole::Consumer, PathKind::Arena, 2 * BLOCK, BLOCKS).node();
    let error = consumer
        .engine
        .connect(&address, LONG)
        .expect_err("formats");
    let Error::Mismatch(mismatch) = &error else {
        panic!("{error:?}");
    };
    assert!(!mismatch.differences.is_empty());
    let text = error.to_string();
    assert!(
        text.contains(&BLOCK.to_string()) && text.contains(&(2 * BLOCK).to_string()),
        "both values are named: {text}"
    );

    let layers = crate::support::Recipe {
        format: KvFormat::opaque(BLOCK, 3).expect("a format"),
        ..recipe(KvRole::Consumer, PathKind::Arena, BLOCK, BLOCKS)
    };
    let error = layers
        .node()
        .engine
        .connect(&address, LONG)
        .expect_err("layers");
    assert!(matches!(error, Error::Mismatch(_)), "{error:?}");

    let error = side(KvRole::Producer)
        .engine
        .connect(&address, LONG)
        .expect_err("two producers");
    let (Error::Refused { refusal: reason }
    | Error::Session {
        source: SessionError::Rejected { reason },
        ..
    }) = &error
    else {
        panic!("{error:?}");
    };
    assert_eq!(
        *reason,
        PeerRefusal::SameRole {
            role: KvRole::Producer
        }
    );
    // None of them was a peer.
    let mut log = Log::new(&producer.engine);
    assert_eq!(log.count(|event| matches!(event, Event::PeerUp { .. })), 0);
}

#[test]
fn memory_that_cannot_be_mapped() {
    let arena = recipe(KvRole::Producer, PathKind::Arena, BLOCK, BLOCKS);
    let anonymous = crate::support::Recipe {
        memory: BenchMemory::Anonymous,
        ..recipe(KvRole::Consumer, PathKind::Arena, BLOCK, BLOCKS)
    };
    let producer = arena.node();
    let address = producer.engine.listen("127.0.0.1:0").expect("a port");
    let error = anonymous
        .node()
        .engine
        .connect(&address.to_string(), LONG)
        .expect_err("nothing to map");
    let Error::NoPath { forced, candidates } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(*forced, Some(PathKind::Arena));
    let arena = candidates.iter().find(|c| c.path == PathKind::Arena);
    let why_not = arena.and_then(|c| c.why_not.as_deref()).expect("a reason");
    assert!(why_not.contains("this side's memory"), "{why_not}");

    // A server that does not allow the path that the client has chosen says so.
    let tcp = recipe(KvRole::Consumer, PathKind::Tcp, BLOCK, BLOCKS).node();
    let error = tcp
        .engine
        .connect(&address.to_string(), LONG)
        .expect_err("the server wants arena");
    assert!(
        chain(&error).contains("does not allow"),
        "{}",
        chain(&error)
    );
}
