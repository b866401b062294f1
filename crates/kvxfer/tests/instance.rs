//! Instances of several ranks: how they come about, what does not make one, which rank a call goes to,
//! and how long their sessions are kept. All ranks are in this process; ranks that die have
//! `ranks.rs`.

mod support;

use std::error::Error as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use kvxfer::Error;
use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Engine, Instance, Outcome, Peer, PullOptions, PushOptions};
use kvxfer::event::{Class, Event};
use kvxfer::ids::{EngineId, Rank, RequestId};
use kvxfer::metadata::Metadata;
use kvxfer::ticket::Ticket;
use nix::sys::socket::Backlog;
use support::{LONG, Log, Node, bounded, groups, pairs, recipe, until};

const BLOCK: u64 = 4 << 10;
const BLOCKS: u32 = 16;
const RANKS: u32 = 4;
/// More than a few pauses between the attempts to set a session up again.
const WATCH: Duration = Duration::from_millis(600);

fn rank(dp: u32) -> Rank {
    Rank {
        dp,
        ..Rank::default()
    }
}

/// A rank of an engine, filled with a pattern of its own; and where it listens.
fn rank_of(engine: &str, dp: u32, listen: &str) -> (Node, String) {
    let node = recipe(KvRole::Both, PathKind::Arena, BLOCK, BLOCKS)
        .with(|config| config.engine_id = Some(engine.to_owned()))
        .rank(dp, RANKS)
        .node();
    node.side.fill(u64::from(dp)).expect("filled");
    let mut address = None;
    // Somebody who has just gone may hold it for a moment.
    until("the port", || {
        address = node.engine.listen(listen).ok();
        address.is_some()
    });
    (node, address.expect("a port").to_string())
}

fn ranks_of(engine: &str, dps: &[u32]) -> (Vec<Node>, Vec<String>) {
    dps.iter()
        .map(|dp| rank_of(engine, *dp, "127.0.0.1:0"))
        .unzip()
}

fn consumer() -> Node {
    let node = recipe(KvRole::Both, PathKind::Arena, BLOCK, BLOCKS).node();
    node.side.poison().expect("poisoned");
    node
}

fn offer(node: &Node, request: &str) -> Ticket {
    node.engine
        .offer(&RequestId::from(request), &groups(0..8), 1, LONG)
        .expect("an offer")
}

fn ranks(instance: &Instance) -> Vec<u32> {
    instance.peers().iter().map(|p| p.rank().dp).collect()
}

/// Waits until every session of an engine has ended.
fn has_nobody(of: &Node, with: &Node) {
    let name = with.name();
    until("the end of a session", || {
        of.engine.peer_of(&name).is_none()
    });
}

#[test]
fn ranks_are_connected_to_at_once() {
    let (nodes, addresses) = ranks_of("many", &[2, 0, 3]);
    let node = consumer();
    let by_address = node.engine.connect_ranks(&addresses, LONG).expect("up");
    let metadata: Vec<Vec<u8>> = nodes
        .iter()
        .map(|node| node.engine.metadata().expect("it listens"))
        .collect();
    let by_metadata = node.engine.connect_ranks_with(&metadata, LONG).expect("up");
    for instance in [&by_address, &by_metadata] {
        assert_eq!(ranks(instance), [0, 2, 3]);
        assert_eq!(instance.engine_id(), EngineId::from("many"));
        assert!(instance.is_up() && instance.wait_up(Duration::ZERO));
        for peer in instance.peers() {
            assert_eq!(peer.name().engine, EngineId::from("many"));
            assert_eq!(
                instance.peer(peer.rank()).expect("it is").name(),
                peer.name()
            );
        }
    }
}

/// Tickets say which rank; a call without one needs a rank where there are several.
#[test]
fn calls_go_to_the_rank_that_is_meant() {
    let (nodes, addresses) = ranks_of("many", &[1, 0]);
    let node = consumer();
    let mut log = Log::new(&node.engine);
    let instance = node.engine.connect_ranks(&addresses, LONG).expect("up");
    for of in &nodes {
        let dp = of.engine.rank().dp;
        let ticket = offer(of, "r");
        let wanted = pairs((0..8).map(|b| (b, 15 - b)));
        let options = PullOptions {
            hold: true,
            ..PullOptions::default()
        };
        let pull = instance.pull(&ticket, &wanted, options).expect("a pull");
        assert_eq!(pull.wait(LONG), Some(Outcome::Done));
        let seed = u64::from(dp);
        node.side.verify(seed, &wanted).expect("the rank's bytes");
        instance.release(&ticket).expect("up");
        Log::new(&of.engine).wait("release", |event| matches!(event, Event::Released { .. }));

        // Back to it, by its rank and by its ticket.
        for by_ticket in [false, true] {
            let request = RequestId::from(format!("w-{by_ticket}"));
            let ticket = of
                .engine
                .expect(&request, &groups(0..8), 1, LONG)
                .expect("an expectation");
            of.fill_blocks(0..8, support::POISON);
            let push = if by_ticket {
                let options = PushOptions {
                    ticket: Some(ticket),
                    ..PushOptions::default()
                };
                instance.begin_push_with(&request, options)
            } else {
                instance.peer(rank(dp)).expect("it is").begin_push(&request)
            };
            let push = push.expect("a push");
            let back = pairs((0..8).map(|b| (15 - b, b)));
            push.all_layers(&back, None).expect("fits");
            let push = push.commit().expect("committed");
            assert_eq!(push.wait(LONG), Some(Outcome::Done));
            // Until it has heard of it, the blocks are not the owner's.
            Log::new(&of.engine).wait(
                "received",
                |event| matches!(event, Event::Received { request: r, .. } if *r == request),
            );
            let own = pairs((0..8).map(|b| (b, b)));
            of.side.verify(seed, &own).expect("its bytes are back");
        }
    }
    let several = |error: Error| {
        let text = error.to_string();
        assert!(matches!(error, Error::SeveralRanks { .. }), "{text}");
        assert!(
            text.contains("dp0.pp0.tp0, dp1.pp0.tp0") && text.contains("many"),
            "{text}"
        );
    };
    several(
        instance
            .begin_push(&RequestId::from("w"))
            .expect_err("which?"),
    );
    several(instance.path().expect_err("which?"));
    several(instance.lanes().expect_err("which?"));
    several(instance.facts().expect_err("which?"));

    let none = |error: Error| {
        let text = error.to_string();
        assert!(
            matches!(&error, Error::NoSuchRank { rank: r, .. } if *r == rank(3)),
            "{text}"
        );
        assert!(
            text.contains("dp3") && text.contains("dp0.pp0.tp0, dp1"),
            "{text}"
        );
    };
    let (third, _) = rank_of("many", 3, "127.0.0.1:0");
    let ticket = offer(&third, "r");
    let pull = |instance: &Instance, ticket: &Ticket| {
        instance
            .pull(ticket, &pairs([(0, 0)]), PullOptions::default())
            .expect_err("not its ticket")
    };
    none(pull(&instance, &ticket));
    none(instance.release(&ticket).expect_err("not its ticket"));
    none(instance.peer(rank(3)).expect_err("no such rank"));
    for dp in [0, 3] {
        let (stranger, _) = rank_of("another", dp, "127.0.0.1:0");
        let error = pull(&instance, &offer(&stranger, "r"));
        assert!(matches!(error, Error::WrongInstance { .. }), "{error}");
    }
    // A peer takes the tickets of its own rank alone.
    let first = &instance.peers()[0];
    let error = first
        .pull(
            &offer(&nodes[0], "s"),
            &pairs([(0, 0)]),
            PullOptions::default(),
        )
        .expect_err("the other rank's");
    assert!(matches!(error, Error::WrongInstance { .. }), "{error}");
    log.assert_told_once();
}

/// What does not make an instance leaves no session behind.
#[test]
fn ranks_that_do_not_make_an_instance() {
    let (nodes, addresses) = ranks_of("many", &[0, 1]);
    let (strangers, strange) = ranks_of("another", &[2]);
    let node = consumer();
    let try_with = |further: &str| {
        let all = [&*addresses[0], &*addresses[1], further];
        let error = node.engine.connect_ranks(&all, LONG).expect_err("no");
        for of in nodes.iter().chain(&strangers) {
            has_nobody(of, &node);
            has_nobody(&node, of);
        }
        error
    };

    let error = try_with(&strange[0]);
    let text = error.to_string();
    assert!(
        matches!(&error, Error::OtherEngine { address, engine, .. }
            if *address == strange[0] && *engine == EngineId::from("another")),
        "{text}"
    );

    let error = try_with(&addresses[1]);
    assert!(
        matches!(&error, Error::SameRank { rank: r, first, second }
            if *r == rank(1) && first == second && *first == addresses[1]),
        "{error}"
    );

    // A port that was free a moment ago.
    let free = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr());
    let free = free.expect("a port").to_string();
    let error = try_with(&free);
    let Error::ConnectRank { address, source } = &error else {
        panic!("{error}");
    };
    assert_eq!(*address, free);
    assert!(matches!(**source, Error::Unreachable { .. }), "{source}");
    assert_eq!(error.class(), Class::Retry);

    let error = try_with("no-such-host.invalid:7301");
    let Error::ConnectRank { source, .. } = &error else {
        panic!("{error}");
    };
    assert!(matches!(**source, Error::Resolve { .. }), "{source}");

    let error = node.engine.connect_ranks(&[] as &[&str], LONG);
    assert!(matches!(error, Err(Error::NoRanks)), "{error:?}");

    // The consumer has heard of those that were up for a moment, in turn.
    let mut events = Vec::new();
    node.engine.poll_events(&mut events);
    let ups = events
        .iter()
        .filter(|e| matches!(e, Event::PeerUp { .. }))
        .count();
    let downs = events
        .iter()
        .filter(|e| matches!(e, Event::PeerDown { .. }))
        .count();
    assert_eq!(ups, downs, "{events:#?}");
    assert!(ups > 0, "{events:#?}");
}

/// One that does not answer is waited for until the deadline, and no longer when another has failed.
#[test]
fn a_rank_that_does_not_answer() {
    let (nodes, addresses) = ranks_of("many", &[0]);
    let node = consumer();
    // Takes connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let mute = silent.local_addr().expect("a port").to_string();
    let all = [addresses[0].clone(), mute.clone()];
    let error = node
        .engine
        .connect_ranks(&all, Duration::from_secs(5))
        .expect_err("silence");
    assert!(
        matches!(&error, Error::ConnectRank { address, .. } if *address == mute),
        "{error}"
    );
    has_nobody(&nodes[0], &node);

    let free = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr());
    let all = [mute, free.expect("a port").to_string()];
    let engine = node.engine.clone();
    let error = bounded("a failure without the silent one", move || {
        engine.connect_ranks(&all, 20 * LONG).expect_err("nobody")
    });
    let Error::ConnectRank { source, .. } = &error else {
        panic!("{error}");
    };
    assert!(matches!(**source, Error::Unreachable { .. }), "{source}");
    // What was given up does not keep the engine.
    bounded("engine drop", move || drop(node));
}

/// An address that answers no more than a host that is off does, for as long as the others are kept.
fn black_hole() -> (SocketAddr, TcpListener, Vec<TcpStream>) {
    let full = TcpListener::bind("127.0.0.1:0").expect("a port");
    let at = full.local_addr().expect("a port");
    nix::sys::socket::listen(&full, Backlog::new(0).expect("small")).expect("a short queue");
    let mut waiting = Vec::new();
    // Whoever comes to a full queue is not answered.
    while let Ok(stream) = TcpStream::connect_timeout(&at, WATCH) {
        waiting.push(stream);
        assert!(waiting.len() < 64, "the queue never fills");
    }
    (at, full, waiting)
}

/// Whether a connection to the port is being dialled from this network namespace, without an answer.
fn is_dialled(to: SocketAddr) -> bool {
    let table = std::fs::read_to_string("/proc/self/net/tcp").expect("the kernel's table");
    let port = format!(":{:04X}", to.port());
    table.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // The far address, and SYN_SENT.
        fields.get(2).is_some_and(|far| far.ends_with(&port)) && fields.get(3) == Some(&"02")
    })
}

/// A rank that failed ends the dialling of the others, and not only the wait for it.
#[test]
fn what_is_being_dialled_is_given_up() {
    let node = consumer();
    let (hole, _full, _waiting) = black_hole();
    assert!(!is_dialled(hole));
    let fails = TcpListener::bind("127.0.0.1:0").expect("a port");
    let ranks = [hole, fails.local_addr().expect("a port")].map(|at| at.to_string());
    let engine = node.engine.clone();
    let connecting = std::thread::spawn(move || engine.connect_ranks(&ranks, 20 * LONG));
    until("the dial", || is_dialled(hole));
    drop(fails.accept().expect("the other dial"));
    let error = connecting.join().expect("no panic").expect_err("closed");
    let Error::ConnectRank { source, .. } = &error else {
        panic!("{error}");
    };
    assert!(matches!(**source, Error::Session { .. }), "{source}");
    until("the end of the dial", || !is_dialled(hole));
}

/// Of several metadata the error says which is bad, and of those that are good, whose rank failed.
#[test]
fn metadata_that_is_bad_is_named() {
    let (nodes, _) = ranks_of("many", &[0, 1]);
    let node = consumer();
    let mut all: Vec<Vec<u8>> = nodes
        .iter()
        .map(|node| node.engine.metadata().expect("it listens"))
        .collect();
    let good = all[1].clone();
    all.push(b"nonsense".to_vec());
    all.push(good.clone());
    let error = node.engine.connect_ranks_with(&all, LONG).expect_err("bad");
    let text = error.to_string();
    assert!(
        matches!(&error, Error::RankMetadata { index: 2, .. }),
        "{text}"
    );
    assert!(text.contains('2') && error.source().is_some(), "{text}");

    let nowhere = "no-such-host.invalid:7301";
    let lost = Metadata {
        address: nowhere.to_owned(),
        ..Metadata::from_bytes(&good).expect("good")
    };
    all[2] = lost.to_bytes().expect("it has an address");
    let error = node.engine.connect_ranks_with(&all, LONG).expect_err("bad");
    let Error::ConnectRank { address, source } = &error else {
        panic!("{error}");
    };
    assert_eq!(address, nowhere);
    assert!(matches!(**source, Error::Resolve { .. }), "{source}");
}

/// A session is kept for whoever holds its peer, and no longer.
#[test]
fn sessions_close_with_the_last_who_holds_their_peer() {
    let (nodes, addresses) = ranks_of("many", &[0, 1, 2]);
    let node = consumer();
    let instance = node.engine.connect_ranks(&addresses, LONG).expect("up");
    let again = instance.clone();
    let kept: Peer = instance.peers()[1].clone();
    drop(instance);
    assert!(again.is_up());
    drop(again);
    for of in [&nodes[0], &nodes[2]] {
        has_nobody(of, &node);
    }
    let pull = kept
        .pull(
            &offer(&nodes[1], "r"),
            &pairs([(0, 0)]),
            PullOptions::default(),
        )
        .expect("it is held");
    assert_eq!(pull.wait(LONG), Some(Outcome::Done));
    drop(kept);
    has_nobody(&nodes[1], &node);
}

/// Whoever comes to a rank's address and is another does not take its place.
#[test]
fn another_at_the_address_of_a_rank() {
    let (mut nodes, addresses) = ranks_of("many", &[0, 1]);
    let node = consumer();
    let instance = node.engine.connect_ranks(&addresses, LONG).expect("up");
    for (engine, dp) in [("many", 2), ("another", 1)] {
        drop(nodes.pop());
        until("the loss", || !instance.peers()[1].is_up());
        let (stranger, _) = rank_of(engine, dp, &addresses[1]);
        std::thread::sleep(WATCH);
        assert!(!instance.is_up(), "{engine} {dp}");
        assert!(node.engine.peer_of(&stranger.name()).is_none());
        assert_eq!(instance.peers()[1].name().rank, rank(1));
        assert!(instance.peers()[0].is_up(), "it has nothing to do with it");
        drop(stranger);
        nodes.push(rank_of("many", 1, &addresses[1]).0);
        assert!(instance.wait_up(LONG), "after {engine} {dp}");
        assert_eq!(instance.peers()[1].name(), nodes[1].name());
    }
    let ticket = offer(&nodes[1], "r");
    let pull = instance
        .pull(&ticket, &pairs([(0, 0)]), PullOptions::default())
        .expect("a pull");
    assert_eq!(pull.wait(LONG), Some(Outcome::Done));
}

/// An engine that was given no name has another after a restart. An instance of it that was made with
/// its address goes on with whoever is there, and says who that is; one made with its metadata does not.
#[test]
fn an_unnamed_engine_that_restarts() {
    let unnamed = |listen: &str| {
        let node = recipe(KvRole::Both, PathKind::Arena, BLOCK, BLOCKS).node();
        let mut address = None;
        until("the port", || {
            address = node.engine.listen(listen).ok();
            address.is_some()
        });
        (node, address.expect("a port").to_string())
    };
    let (first, address) = unnamed("127.0.0.1:0");
    let node = consumer();
    let connect = |engine: &Engine| engine.connect(&address, LONG).expect("up");
    let by_address = connect(&node.engine);
    let metadata = first.engine.metadata().expect("it listens");
    let by_metadata = node.engine.connect_with(&metadata, LONG).expect("up");
    assert_eq!(by_address.peers()[0].name(), first.name());
    let old = first.name();
    drop(first);
    until("the loss", || !by_address.is_up() && !by_metadata.is_up());
    assert_eq!(by_address.peers()[0].name(), old, "nobody else was met");
    let (second, _) = unnamed(&address);
    assert!(by_address.wait_up(LONG));
    assert_eq!(by_address.peers()[0].name(), second.name());
    assert_eq!(by_address.engine_id(), *second.engine.id());
    let pull = by_address
        .pull(
            &offer(&second, "r"),
            &pairs([(0, 0)]),
            PullOptions::default(),
        )
        .expect("a pull");
    assert_eq!(pull.wait(LONG), Some(Outcome::Done));
    std::thread::sleep(WATCH);
    assert!(!by_metadata.is_up());
    assert_eq!(by_metadata.peers()[0].name(), old);
}

/// The metadata says which rank; another one of the engine at its address is none.
#[test]
fn another_rank_than_the_metadata_says() {
    let (mut nodes, addresses) = ranks_of("many", &[0]);
    let metadata = nodes[0].engine.metadata().expect("it listens");
    nodes.clear();
    let _other = rank_of("many", 1, &addresses[0]);
    let node = consumer();
    let error = node
        .engine
        .connect_with(&metadata, LONG)
        .expect_err("another rank");
    let text = error.to_string();
    assert!(
        text.contains("many dp1.pp0.tp0") && text.contains("many dp0.pp0.tp0"),
        "{text}"
    );
}
