//! Bad input: whatever is wrong with an address, a peer, a secret, a format, a ticket or a list of
//! blocks ends in a typed error or outcome that names the cause, by its deadline, and writes nothing
//! outside the blocks asked for.

mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kvxfer::Error;
use kvxfer::bench::BenchMemory;
use kvxfer::blocks::{GroupBlocks, GroupPairs};
use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Instance, Outcome, Peer, PullOptions, PushOptions, Transfer};
use kvxfer::event::{Class, Event, MemoryState, ReleaseReason};
use kvxfer::ids::{EngineId, Generation, RequestId};
use kvxfer::layout::KvFormat;
use kvxfer::session::{Closed, Event as SessionEvent, Party, Session, SessionConfig, SessionError};
use kvxfer::ticket::Ticket;
use kvxfer::time::Time;
use kvxfer::transfer::{Cause, Refusal};
use kvxfer::wire::{HandshakeNonce, Refusal as PeerRefusal, Saw, VersionRange, WireError};
use support::{LONG, Log, Node, POISON, RECYCLED, bounded, groups, pairs, recipe, until};

const BLOCK: u64 = 4096 + 24;
const BLOCKS: u32 = 32;
const SOON: Duration = Duration::from_secs(1);

fn side(role: KvRole) -> Node {
    recipe(role, PathKind::Arena, BLOCK, BLOCKS).node()
}

/// A producer that listens and a consumer that has connected; the producer's blocks are filled with
/// pattern 7, the consumer's poisoned.
fn pair_over(path: PathKind) -> (Node, Node, Instance) {
    pair_of(
        &recipe(KvRole::Producer, path, BLOCK, BLOCKS),
        &recipe(KvRole::Consumer, path, BLOCK, BLOCKS),
    )
}

fn pair_of(producer: &support::Recipe, consumer: &support::Recipe) -> (Node, Node, Instance) {
    let (producer, consumer) = (producer.node(), consumer.node());
    producer.side.fill(7).expect("filled");
    consumer.side.poison().expect("poisoned");
    let address = producer.engine.listen("127.0.0.1:0").expect("a free port");
    let instance = consumer
        .engine
        .connect(&address.to_string(), LONG)
        .expect("a session");
    (producer, consumer, instance)
}

fn pair() -> (Node, Node, Instance) {
    pair_over(PathKind::Arena)
}

/// The producer's way to a consumer that has connected to it.
fn back(producer: &Node, consumer: &Node) -> Peer {
    let name = consumer.name();
    let mut log = Log::new(&producer.engine);
    log.wait(
        "peer",
        |event| matches!(event, Event::PeerUp { peer, .. } if *peer == name),
    );
    producer.engine.peer_of(&name).expect("a session")
}

fn offer(producer: &Node, request: &str, blocks: u32) -> Ticket {
    producer
        .engine
        .offer(&RequestId::from(request), &groups(0..blocks), 1, LONG)
        .expect("an offer")
}

#[track_caller]
fn fails_with(transfer: &Transfer, cause: Cause) -> MemoryState {
    let outcome = transfer.wait(LONG).expect("an outcome");
    let failure = outcome.failure().expect("a failure");
    assert_eq!(failure.first_cause, cause);
    assert!(transfer.wait_released(LONG), "memory comes back");
    failure.memory
}

// ---- addresses and peers that are none ---------------------------------------------------------

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

fn session_error(error: &Error) -> &SessionError {
    match error {
        Error::Session { source, .. } => source,
        other => panic!("{other:?}"),
    }
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

// ---- peers that do not fit ---------------------------------------------------------------------

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

    let layers = support::Recipe {
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
    let anonymous = support::Recipe {
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

// ---- calls that make no sense ------------------------------------------------------------------

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

// ---- pulls -------------------------------------------------------------------------------------

#[test]
fn pulls_that_are_refused_before_anything_moves() {
    let (producer, consumer, instance) = pair();
    let ticket = offer(&producer, "r", 8);
    let pull = |ticket: &Ticket, wanted: &[GroupPairs]| {
        instance
            .pull(ticket, wanted, PullOptions::default())
            .expect_err("nonsense")
    };
    let text = |ticket: &Ticket, wanted: &[GroupPairs]| chain(&pull(ticket, wanted));
    let beyond = text(&ticket, &pairs([(0, BLOCKS)]));
    assert!(
        beyond.contains(&format!("consumer block {BLOCKS}")),
        "{beyond}"
    );
    let error = pull(&ticket, &pairs([(0, 1), (8, 2)]));
    assert!(
        matches!(error, Error::NotInTicket { block: 8, .. }),
        "{error}"
    );
    let twice = text(&ticket, &pairs([(0, 5), (1, 5)]));
    assert!(
        twice.contains("block 5") && twice.contains("twice"),
        "{twice}"
    );
    let group = |group, pairs: Vec<GroupPairs>| {
        pairs
            .into_iter()
            .map(|p| GroupPairs { group, ..p })
            .collect::<Vec<_>>()
    };
    let error = pull(&ticket, &group(7, pairs([(0, 0)])));
    assert!(
        matches!(error, Error::NotInTicket { group: 7, .. }),
        "{error}"
    );
    let unknown = text(&ticket, &group(7, pairs([])));
    assert!(unknown.contains("group 7"), "{unknown}");

    // Tickets that are not this peer's, or not of its kind.
    let other = Ticket {
        engine: EngineId::from("somebody-else"),
        ..ticket.clone()
    };
    let error = pull(&other, &pairs([(0, 0)]));
    assert!(matches!(error, Error::WrongInstance { .. }), "{error}");
    let earlier = Ticket {
        generation: Generation([9; 16]),
        ..ticket.clone()
    };
    let error = pull(&earlier, &pairs([(0, 0)]));
    assert!(matches!(error, Error::OldGeneration { .. }), "{error}");
    assert_eq!(error.class(), Class::Recompute);
    let expects = consumer
        .engine
        .expect(&RequestId::from("e"), &groups(0..2), 1, LONG)
        .expect("an expectation");
    let turned = Ticket {
        engine: ticket.engine.clone(),
        generation: ticket.generation,
        ..expects
    };
    let error = pull(&turned, &pairs([(0, 0)]));
    assert!(matches!(error, Error::WrongTicket { .. }), "{error}");

    // Blocks that the producer does not have, in a ticket that says otherwise.
    let forged = Ticket {
        groups: groups([0, BLOCKS]),
        ..ticket.clone()
    };
    let beyond = text(&forged, &pairs([(BLOCKS, 0)]));
    assert!(
        beyond.contains(&format!("producer block {BLOCKS}")),
        "{beyond}"
    );
    consumer.assert_untouched_but([]);
    // The ticket itself is as good as before.
    let transfer = instance
        .pull(&ticket, &pairs([(3, 4)]), PullOptions::default())
        .expect("a transfer");
    assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
    consumer.side.verify(7, &pairs([(3, 4)])).expect("bytes");
    consumer.assert_untouched_but([4]);
}

#[test]
fn an_empty_pull_releases() {
    for wanted in [Vec::new(), pairs([])] {
        let (producer, consumer, instance) = pair();
        let ticket = offer(&producer, "r", 8);
        let transfer = instance
            .pull(&ticket, &wanted, PullOptions::default())
            .expect("a transfer");
        assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
        let mut log = Log::new(&producer.engine);
        log.wait("release", |event| {
            matches!(
                event,
                Event::Released {
                    reason: ReleaseReason::AllRead,
                    ..
                }
            )
        });
        consumer.assert_untouched_but([]);
    }
}

#[test]
fn tickets_from_elsewhere() {
    let (producer, consumer, instance) = pair();
    let ticket = offer(&producer, "r", 8);
    let bytes = ticket.to_bytes().expect("bytes");
    let json = ticket.to_json().expect("json");
    assert_eq!(Ticket::from_bytes(&bytes).expect("a ticket"), ticket);
    assert_eq!(Ticket::from_json(&json).expect("a ticket"), ticket);
    for garbage in [
        "",
        "{}",
        "[]",
        "null",
        "{\"version\":1}",
        &json[..json.len() - 1],
    ] {
        assert!(Ticket::from_json(garbage).is_err(), "{garbage}");
        assert!(Ticket::from_bytes(garbage.as_bytes()).is_err(), "{garbage}");
    }
    // Every byte changed in turn: refused, or a ticket that ends in an outcome; and nothing is
    // written but the blocks that were asked for.
    let wanted = pairs([(1, 2), (3, 5)]);
    let mut pulled = 0;
    for at in 0..bytes.len() {
        for change in [0x01, 0x80] {
            let mut bad = bytes.clone();
            bad[at] ^= change;
            let Ok(bad) = Ticket::from_bytes(&bad) else {
                continue;
            };
            let options = PullOptions {
                deadline: Some(Duration::from_secs(10)),
                hold: true,
                ..PullOptions::default()
            };
            let Ok(transfer) = instance.pull(&bad, &wanted, options) else {
                continue;
            };
            pulled += 1;
            if let Outcome::Failed(failure) = transfer.wait(LONG).expect("an outcome") {
                assert!(
                    matches!(
                        failure.first_cause,
                        Cause::LeaseExpired
                            | Cause::Refused {
                                reason: Refusal::OutOfRange
                            }
                    ),
                    "{failure:?}"
                );
            }
            assert!(transfer.wait_released(LONG));
        }
    }
    assert!(pulled > 0, "some changes still make a ticket");
    consumer.assert_untouched_but([2, 5]);
    assert!(instance.is_up(), "the session has survived it all");
}

#[test]
fn retracted_while_it_is_pulled() {
    let path = PathKind::Tcp;
    let (producer, consumer, instance) = pair_of(
        &recipe(KvRole::Producer, path, 64 << 10, 1024),
        &recipe(KvRole::Consumer, path, 64 << 10, 1024),
    );
    let ticket = offer(&producer, "r", 1000);
    let wanted = pairs((0..1000).map(|b| (b, 1000 - b)));
    let transfer = instance
        .pull(&ticket, &wanted, PullOptions::default())
        .expect("a transfer");
    assert!(producer.engine.retract(&RequestId::from("r")));
    assert_eq!(
        fails_with(&transfer, Cause::LeaseExpired),
        MemoryState::Released
    );
    let mut log = Log::new(&producer.engine);
    log.wait("release", |event| {
        matches!(
            event,
            Event::Released {
                reason: ReleaseReason::Retracted,
                ..
            }
        )
    });
    consumer.assert_untouched_but(1..=1000);
    Log::new(&consumer.engine).assert_told_once();
}

#[test]
fn a_cancelled_pull() {
    for path in [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp] {
        let (producer, consumer, instance) = pair_of(
            &recipe(KvRole::Producer, path, 64 << 10, 1024),
            &recipe(KvRole::Consumer, path, 64 << 10, 1024),
        );
        let ticket = offer(&producer, "r", 1000);
        let wanted = pairs((0..1000).map(|b| (b, 1000 - b)));
        let hold = || PullOptions {
            hold: true,
            ..PullOptions::default()
        };
        let transfer = instance.pull(&ticket, &wanted, hold()).expect("a transfer");
        transfer.cancel();
        transfer.cancel();
        fails_with(&transfer, Cause::Cancelled);
        // What is free now stays as its owner leaves it.
        consumer.fill_blocks(0..1024, RECYCLED);
        std::thread::sleep(Duration::from_millis(50));
        consumer.assert_blocks(0..1024, RECYCLED);
        Log::new(&consumer.engine).assert_told_once();
        // And the peer is as good as before, if need be over a new session.
        assert!(instance.wait_up(LONG));
        let transfer = instance.pull(&ticket, &wanted, hold()).expect("a transfer");
        assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
        consumer.side.verify(7, &wanted).expect("every byte");
        transfer.cancel();
        assert_eq!(transfer.outcome(), Some(Outcome::Done), "an outcome stays");
    }
}

/// A peer's lease table of which this ticket wants a slot that there is none of.
#[test]
fn a_lease_beyond_the_table() {
    let (producer, consumer, instance) = pair();
    let mut ticket = offer(&producer, "r", 8);
    ticket.lease.as_mut().expect("an offer has one").slot = u32::MAX;
    let transfer = instance
        .pull(&ticket, &pairs([(0, 0)]), PullOptions::default())
        .expect("a transfer");
    let cause = Cause::Refused {
        reason: Refusal::OutOfRange,
    };
    assert_eq!(fails_with(&transfer, cause), MemoryState::Released);
    consumer.assert_untouched_but([0]);
}

// ---- pushes ------------------------------------------------------------------------------------

#[test]
fn pushes_that_do_not_fit() {
    let (producer, consumer, _instance) = pair();
    let back = back(&producer, &consumer);
    let request = RequestId::from("w");
    let ticket = consumer
        .engine
        .expect(&request, &groups([4, 5, 6]), 1, LONG)
        .expect("an expectation");
    let push = back.begin_push(&request).expect("a push");
    let text = |error: Error| chain(&error);
    let beyond = text(push.layer(0, &pairs([(BLOCKS, 4)])).expect_err("beyond"));
    assert!(
        beyond.contains(&format!("producer block {BLOCKS}")),
        "{beyond}"
    );
    let beyond = text(push.layer(0, &pairs([(0, BLOCKS)])).expect_err("beyond"));
    assert!(beyond.contains(&BLOCKS.to_string()), "{beyond}");
    let twice = text(push.layer(0, &pairs([(0, 4), (1, 4)])).expect_err("twice"));
    assert!(twice.contains("block 4"), "{twice}");
    let layer = text(push.layer(9, &pairs([(0, 4)])).expect_err("no such layer"));
    assert!(layer.contains("layer 9"), "{layer}");
    push.layer(0, &pairs([(0, 4)])).expect("fits");
    // The ticket has come when the bytes have.
    until("bytes", || consumer.first_word(4) != POISON);
    let error = push.layer(1, &pairs([(0, 7)])).expect_err("not expected");
    assert!(
        matches!(error, Error::NotInTicket { block: 7, .. }),
        "{error}"
    );
    let error = push
        .layer_in_order(1, &groups([0, 1]))
        .expect_err("two for three");
    assert!(
        matches!(error, Error::UnequalLengths { src: 2, dst: 3, .. }),
        "{error}"
    );
    push.layer_in_order(1, &groups([0, 1, 2])).expect("fits");
    push.layer(0, &pairs([(1, 5), (2, 6)])).expect("fits");
    let transfer = push.commit().expect("committed");
    assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
    let mut log = Log::new(&consumer.engine);
    log.wait("receipt", |event| matches!(event, Event::Received { .. }));
    consumer
        .side
        .verify(7, &pairs([(0, 4), (1, 5), (2, 6)]))
        .expect("every byte");
    consumer.assert_untouched_but([4, 5, 6]);

    // What does not fit a ticket that is still to come ends the push when it comes.
    for early in [true, false] {
        let request = RequestId::from(format!("late-{early}"));
        let push = back.begin_push(&request).expect("a push");
        if early {
            push.layer(0, &pairs([(0, 9)])).expect("who knows");
        } else {
            push.layer_in_order(0, &groups([0, 1])).expect("who knows");
        }
        consumer
            .engine
            .expect(&request, &groups([8]), 1, LONG)
            .expect("an expectation");
        let transfer = push.commit().expect("its outcome tells");
        let cause = Cause::Refused {
            reason: Refusal::OutOfRange,
        };
        assert_eq!(fails_with(&transfer, cause), MemoryState::Released);
        let ended = log.wait(
            "end",
            |event| matches!(event, Event::Failed { request: r, .. } if *r == request),
        );
        let Event::Failed {
            first_cause,
            memory,
            ..
        } = ended
        else {
            unreachable!();
        };
        assert_eq!(first_cause, Cause::Aborted);
        assert_eq!(memory, MemoryState::Released);
    }
    consumer.assert_untouched_but([4, 5, 6]);
    assert_eq!(ticket.request, RequestId::from("w"));
    log.assert_told_once();
    Log::new(&producer.engine).assert_told_once();
}

#[test]
fn a_push_that_comes_too_late() {
    for path in [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp] {
        let (producer, consumer, _instance) = pair_over(path);
        let back = back(&producer, &consumer);
        let request = RequestId::from("w");
        let mut log = Log::new(&consumer.engine);
        let ticket = consumer
            .engine
            .expect(&request, &groups(0..8), 1, Duration::from_secs(1))
            .expect("an expectation");
        let push = back.begin_push(&request).expect("a push");
        push.layer(0, &pairs((0..8).map(|b| (b, b)))).expect("fits");
        until("bytes", || consumer.first_word(7) != POISON);
        // No commit comes: the consumer's deadline does.
        let failed = log.wait("failure", |event| matches!(event, Event::Failed { .. }));
        let Event::Failed {
            first_cause,
            invalid_blocks,
            memory,
            ..
        } = failed
        else {
            unreachable!();
        };
        assert_eq!(first_cause, Cause::DeadlinePassed);
        assert_eq!(invalid_blocks, groups(0..8));
        assert_eq!(memory, MemoryState::Quarantined);
        log.wait("release", |event| {
            matches!(
                event,
                Event::Released {
                    reason: ReleaseReason::Drained,
                    ..
                }
            )
        });
        consumer.fill_blocks(0..BLOCKS, RECYCLED);
        // The producer hears why, and can write no more.
        let more = push.layer(1, &pairs((0..8).map(|b| (b, b))));
        let transfer = push.commit().expect("its outcome tells");
        fails_with(&transfer, Cause::Revoked);
        if let Err(error) = more {
            assert!(matches!(error, Error::PushEnded { .. }), "{error}");
        }
        // One that begins with the old ticket is refused.
        let options = PushOptions {
            tag: 1,
            ticket: Some(ticket),
            ..PushOptions::default()
        };
        let push = back.begin_push_with(&request, options).expect("a push");
        // Refused by now, if the consumer was quick.
        if let Err(error) = push.all_layers(&pairs([(0, 0)])) {
            assert!(matches!(error, Error::PushEnded { .. }), "{error}");
        }
        let cause = Cause::Refused {
            reason: Refusal::Late,
        };
        let transfer = push.commit().expect("its outcome tells");
        fails_with(&transfer, cause);
        std::thread::sleep(Duration::from_millis(50));
        consumer.assert_blocks(0..BLOCKS, RECYCLED);
        log.assert_told_once();
        Log::new(&producer.engine).assert_told_once();
    }
}

#[test]
fn a_push_that_nobody_expects() {
    let (producer, consumer, _instance) = pair();
    let back = back(&producer, &consumer);
    let options = PushOptions {
        deadline: Some(Duration::from_millis(200)),
        ..PushOptions::default()
    };
    let push = back
        .begin_push_with(&RequestId::from("w"), options)
        .expect("a push");
    push.all_layers(&pairs([(0, 0)])).expect("fits");
    let transfer = push.commit().expect("committed");
    assert_eq!(
        fails_with(&transfer, Cause::DeadlinePassed),
        MemoryState::Released
    );
    consumer.assert_untouched_but([]);
}

#[test]
fn aborted_and_cancelled_pushes() {
    for path in [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp] {
        let (producer, consumer, _instance) = pair_of(
            &recipe(KvRole::Producer, path, 64 << 10, 512),
            &recipe(KvRole::Consumer, path, 64 << 10, 512),
        );
        let back = back(&producer, &consumer);
        let mut log = Log::new(&consumer.engine);
        for how in ["abort", "drop", "cancel"] {
            let request = RequestId::from(how);
            consumer
                .engine
                .expect(&request, &groups(0..500), 1, LONG)
                .expect("an expectation");
            let push = back.begin_push(&request).expect("a push");
            let table = pairs((0..500).map(|b| (b, 499 - b)));
            push.all_layers(&table).expect("fits");
            push.all_layers(&table).expect("fits");
            match how {
                "abort" => {
                    fails_with(&push.abort(), Cause::Cancelled);
                }
                "drop" => drop(push),
                _ => {
                    let transfer = push.commit().expect("committed");
                    transfer.cancel();
                    let outcome = transfer.wait(LONG).expect("an outcome");
                    // It may have been done before.
                    if let Some(failure) = outcome.failure() {
                        assert_eq!(failure.first_cause, Cause::Cancelled);
                    }
                    assert!(transfer.wait_released(LONG));
                }
            }
            let ended = log.wait("end", |event| {
                event.request().is_some_and(|(r, _)| *r == request)
            });
            match ended {
                Event::Failed {
                    first_cause,
                    memory,
                    ..
                } => {
                    assert_eq!(first_cause, Cause::Aborted);
                    assert_eq!(memory, MemoryState::Released);
                }
                Event::Received { .. } if how == "cancel" => {}
                other => panic!("{other:?}"),
            }
            consumer.fill_blocks(0..512, RECYCLED);
            std::thread::sleep(Duration::from_millis(30));
            consumer.assert_blocks(0..512, RECYCLED);
        }
        log.assert_told_once();
        Log::new(&producer.engine).assert_told_once();
    }
}

/// Producers that asked and gave up leave no trace: neither in the number of askers, nor for an
/// expectation that comes later.
#[test]
fn pushes_given_up_before_they_were_expected() {
    let (producer, consumer, _instance) = pair();
    let back = back(&producer, &consumer);
    for i in 0..5000 {
        let push = back
            .begin_push(&RequestId::from(format!("given-up-{i}")))
            .expect("a push");
        drop(push);
    }
    for request in ["given-up-0", "wanted"] {
        let request = RequestId::from(request);
        let until = Instant::now() + LONG;
        let push = loop {
            match back.begin_push(&request) {
                // The one given up has not ended everywhere.
                Err(Error::PushUnderWay { .. }) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                push => break push.expect("a push"),
            }
        };
        assert!(matches!(
            back.begin_push(&request),
            Err(Error::PushUnderWay { .. })
        ));
        push.all_layers(&pairs([(1, 2)])).expect("fits");
        let transfer = push.commit().expect("committed");
        // The producer's question is there before the expectation is.
        std::thread::sleep(Duration::from_millis(50));
        consumer
            .engine
            .expect(&request, &groups([2]), 1, LONG)
            .expect("an expectation");
        assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
        let mut log = Log::new(&consumer.engine);
        let of = request.clone();
        let event = log.wait("end", |event| {
            event.request().is_some_and(|(r, _)| *r == of)
        });
        assert!(matches!(event, Event::Received { .. }), "{event:?}");
    }
}

/// A push that is begun again while the ticket for its first try, given up early, is on its way:
/// whatever the second one writes, it writes while the consumer counts on it.
#[test]
fn a_retry_that_meets_the_ticket_of_the_first_try() {
    for path in [PathKind::Arena, PathKind::Tcp] {
        let (producer, consumer, _instance) = pair_over(path);
        let back = back(&producer, &consumer);
        let mut log = Log::new(&consumer.engine);
        let mut arrived = 0;
        for i in 0..300 {
            let request = RequestId::from(format!("r{i}"));
            consumer.fill_blocks(0..4, RECYCLED);
            consumer
                .engine
                .expect(&request, &groups(0..4), 1, LONG)
                .expect("an expectation");
            drop(back.begin_push(&request).expect("a push"));
            let again = loop {
                // The first one has not ended.
                match back.begin_push(&request) {
                    Ok(push) => break push,
                    Err(Error::PushUnderWay { .. }) => std::thread::yield_now(),
                    Err(other) => panic!("{other}"),
                }
            };
            let table = pairs((0..4).map(|b| (b, b)));
            let of = |event: &Event| event.request().is_some_and(|(r, _)| *r == request);
            // Refused by now, if the consumer has heard of the first one's end before.
            let written = again.all_layers(&table).is_ok();
            std::thread::sleep(Duration::from_millis(2));
            if log.count(of) == 0 {
                let transfer = again.commit().expect("its outcome tells");
                if let Event::Received { .. } = log.wait("end", of) {
                    assert!(written);
                    arrived += 1;
                    assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
                }
                transfer.cancel();
                assert!(transfer.wait_released(LONG));
                continue;
            }
            if log.count(|event| matches!(event, Event::Failed { memory: MemoryState::Quarantined, .. } if of(event))) == 1 {
                log.wait("release", |event| matches!(event, Event::Released { .. } if of(event)));
            }
            consumer.fill_blocks(0..4, RECYCLED);
            // It may not know yet, but what it writes does not land.
            for _ in 0..8 {
                if again.all_layers(&table).is_err() {
                    break;
                }
            }
            let transfer = again.commit().expect("its outcome tells");
            std::thread::sleep(Duration::from_millis(2));
            transfer.cancel();
            assert!(transfer.wait_released(LONG));
            consumer.assert_blocks(0..4, RECYCLED);
        }
        println!("{arrived} of 300 retries over {path} have arrived");
        log.assert_told_once();
    }
}

/// An error and its sources.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
