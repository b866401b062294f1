//! Two network namespaces and a link between them that loses, delays and is cut; over TCP, for there
//! is no other way between hosts without a card.
//!
//! Needs root, `ip` (iproute2) and `nft` (nftables); without them it says so and tests nothing.

mod support;

use std::process::Command;
use std::time::{Duration, Instant};

use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Instance, Outcome, PullOptions, Transfer};
use kvxfer::event::Event;
use kvxfer::ids::RequestId;
use kvxfer::ticket::Ticket;
use kvxfer::transfer::Cause;
use support::child::{self, Child, Spec};
use support::{LONG, Log, Node, POISON, RECYCLED, groups, pairs, recipe, until};

const BLOCK: u64 = 16 << 10;
const BLOCKS: u32 = 512;
const SEED: u64 = 3;
/// Set in the process that runs inside the first namespace: the names that were made.
const INSIDE: &str = "KVXFER_TEST_NETWORK";
/// From the range for benchmarks (RFC 2544), which nothing routes.
const HERE: &str = "198.18.7.1";
const THERE: &str = "198.18.7.2";

fn run(program: &str, args: &[&str]) -> Result<(), String> {
    let output = Command::new(program)
        .args(args)
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program} {}: {}", args.join(" "), said.trim()))
}

/// Two namespaces and the link between them; gone when dropped.
#[derive(Debug)]
struct Network {
    here: String,
    there: String,
}

impl Network {
    fn new(name: &str) -> Result<Self, String> {
        let id = std::process::id();
        let network = Self {
            here: format!("kvx-{id}-{name}-a"),
            there: format!("kvx-{id}-{name}-b"),
        };
        let (here, there) = (network.here.as_str(), network.there.as_str());
        run("nft", &["--version"])?;
        run("ip", &["netns", "add", here])?;
        run("ip", &["netns", "add", there])?;
        let link = "link add kvx0 type veth peer name kvx0 netns";
        let mut args = vec!["-n", here];
        args.extend(link.split(' '));
        args.push(there);
        run("ip", &args)?;
        for (namespace, address) in [(here, HERE), (there, THERE)] {
            let address = format!("{address}/30");
            run(
                "ip",
                &["-n", namespace, "addr", "add", &address, "dev", "kvx0"],
            )?;
            run("ip", &["-n", namespace, "link", "set", "kvx0", "up"])?;
            run("ip", &["-n", namespace, "link", "set", "lo", "up"])?;
        }
        Ok(network)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in [&self.here, &self.there] {
            // It may never have been made.
            let _ = run("ip", &["netns", "del", name]);
        }
    }
}

/// Runs the test of this name once more, inside the first of two namespaces.
fn within_a_network(test: &str) {
    let network = match Network::new(test) {
        Ok(network) => network,
        Err(why) => {
            // Some machines allow no namespaces; one that should is told by its tests step.
            assert!(
                std::env::var_os("KVXFER_NEED_NETWORK").is_none(),
                "no network to test with: {why}"
            );
            eprintln!("SKIPPED {test}: {why}");
            return;
        }
    };
    let status = Command::new("ip")
        .args(["netns", "exec", &network.here])
        .arg(std::env::current_exe().expect("this binary"))
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(INSIDE, &network.there)
        .status()
        .expect("ip was there just now");
    assert!(status.success(), "{test}: {status}");
}

/// The far namespace, seen from inside the near one.
#[derive(Debug)]
struct Far(String);

impl Far {
    fn nft(&self, rest: &[&str]) {
        let mut args = vec!["netns", "exec", self.0.as_str(), "nft"];
        args.extend(rest);
        run("ip", &args).expect("nft");
    }

    /// Drops so many of a hundred packets that come in there.
    fn lose(&self, percent: u32) {
        let chain = "{ type filter hook input priority 0 ; policy accept ; }";
        self.nft(&["add", "table", "inet", "kvx"]);
        self.nft(&["add", "chain", "inet", "kvx", "in", chain]);
        let percent = percent.to_string();
        let rule = [
            "add", "rule", "inet", "kvx", "in", "numgen", "random", "mod", "100",
        ];
        self.nft(&[&rule[..], &["<", &percent, "drop"]].concat());
    }

    fn lose_no_more(&self) {
        self.nft(&["delete", "table", "inet", "kvx"]);
    }

    /// Sends packets no faster than this, on both sides, so that they queue.
    fn slow(&self, rate: &str) {
        let shape = ["qdisc", "add", "dev", "kvx0", "root", "tbf", "rate", rate];
        let shape = [&shape[..], &["burst", "64kb", "latency", "400ms"]].concat();
        run("tc", &shape).expect("tc");
        let there = ["netns", "exec", self.0.as_str(), "tc"];
        run("ip", &[&there[..], &shape[..]].concat()).expect("tc");
    }

    /// Takes the link up or down, for both sides.
    fn link(state: &str) {
        run("ip", &["link", "set", "kvx0", state]).expect("ip");
    }

    fn peer(&self, role: KvRole) -> Child {
        Child::start(&Spec {
            role,
            path: PathKind::Tcp,
            block_bytes: BLOCK,
            blocks: BLOCKS,
            listen: format!("{THERE}:0"),
            engine_id: None,
            seed: SEED,
            namespace: Some(self.0.clone()),
        })
    }
}

fn node(role: KvRole) -> Node {
    let node = recipe(role, PathKind::Tcp, BLOCK, BLOCKS)
        .with(|config| {
            config.heartbeat_interval = Duration::from_millis(200);
            config.heartbeat_timeout = Duration::from_secs(1);
            config.connect_timeout = Duration::from_secs(2);
        })
        .node();
    node.side.poison().expect("poisoned");
    node
}

fn all() -> Vec<kvxfer::blocks::GroupPairs> {
    pairs((0..BLOCKS).map(|b| (b, BLOCKS - 1 - b)))
}

fn pull(from: &Instance, ticket: &Ticket, tag: u64, deadline: Duration) -> Transfer {
    let options = PullOptions {
        tag,
        deadline: Some(deadline),
        hold: true,
    };
    from.pull(ticket, &all(), options).expect("a transfer")
}

fn done(transfer: &Transfer) {
    assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
}

/// A pull on a link that is well, or becomes so.
fn works(node: &Node, from: &Instance, child: &mut Child, request: &str) {
    assert!(from.wait_up(LONG));
    let ticket = child.offer(request, BLOCKS, LONG);
    let mut tag = 100;
    until("a pull", || {
        tag += 1;
        let options = PullOptions {
            tag,
            ..PullOptions::default()
        };
        from.pull(&ticket, &all(), options)
            .is_ok_and(|transfer| transfer.wait(LONG) == Some(Outcome::Done))
    });
    node.side.verify(SEED, &all()).expect("every byte");
}

fn far(test: &str) -> Option<Far> {
    let inside = std::env::var(INSIDE).ok().map(Far);
    if inside.is_none() {
        within_a_network(test);
    }
    inside
}

/// READ and WRITE over a link that loses one packet in fifty: slower, and every byte right.
#[test]
fn a_link_that_loses() {
    let Some(far) = far("a_link_that_loses") else {
        return;
    };
    let mut child = far.peer(KvRole::Both);
    let node = node(KvRole::Both);
    let mut log = Log::new(&node.engine);
    let from = node
        .engine
        .connect(&child.address, LONG)
        .expect("a session");
    far.lose(2);
    let ticket = child.offer("r", BLOCKS, LONG);
    let transfers: Vec<Transfer> = (0..4).map(|tag| pull(&from, &ticket, tag, LONG)).collect();
    transfers.iter().for_each(done);
    node.side.verify(SEED, &all()).expect("every byte");
    node.side.poison().expect("poisoned");
    let request = RequestId::from("w");
    node.engine
        .expect(&request, &groups(0..BLOCKS), 1, LONG)
        .expect("an expectation");
    child.push(&node.name(), "w", BLOCKS, 2);
    log.wait(
        "push",
        |event| matches!(event, Event::Received { request: r, .. } if *r == request),
    );
    let table = pairs((0..BLOCKS).map(|b| (b, b)));
    node.side.verify(SEED, &table).expect("every byte");
    far.lose_no_more();
    log.assert_told_once();
}

/// A link on which packets queue: what has time arrives, what has not ends in time, and nothing of
/// it lands afterwards.
#[test]
fn a_link_that_delays() {
    let Some(far) = far("a_link_that_delays") else {
        return;
    };
    let mut child = far.peer(KvRole::Producer);
    let node = node(KvRole::Consumer);
    let mut log = Log::new(&node.engine);
    let from = node
        .engine
        .connect(&child.address, LONG)
        .expect("a session");
    far.slow("200mbit");
    // 16 MiB take two thirds of a second.
    let ticket = child.offer("r", BLOCKS, LONG);
    done(&pull(&from, &ticket, 1, LONG));
    node.side.verify(SEED, &all()).expect("every byte");
    let begun = Instant::now();
    let late = pull(&from, &ticket, 2, Duration::from_millis(150));
    let outcome = late.wait(LONG).expect("an outcome");
    let failure = outcome.failure().expect("there was no time");
    assert_eq!(failure.first_cause, Cause::DeadlinePassed);
    assert!(late.wait_released(LONG));
    assert!(begun.elapsed() < LONG);
    node.fill_blocks(0..BLOCKS, RECYCLED);
    std::thread::sleep(Duration::from_secs(1));
    node.assert_blocks(0..BLOCKS, RECYCLED);
    works(&node, &from, &mut child, "again");
    log.assert_told_once();
}

/// A link that is cut while blocks move, for less and for more than heartbeats bear, and mended.
#[test]
fn a_link_that_is_cut() {
    let Some(far) = far("a_link_that_is_cut") else {
        return;
    };
    let mut child = far.peer(KvRole::Producer);
    let node = node(KvRole::Consumer);
    let mut log = Log::new(&node.engine);
    let from = node
        .engine
        .connect(&child.address, LONG)
        .expect("a session");
    far.slow("400mbit");
    let ticket = child.offer("r", BLOCKS, LONG);
    // Shortly: TCP sends again what was lost.
    let short = pull(&from, &ticket, 1, LONG);
    until("the first bytes", || moved(&node));
    Far::link("down");
    assert!(short.outcome().is_none(), "cut too late");
    std::thread::sleep(Duration::from_millis(300));
    Far::link("up");
    done(&short);
    node.side.verify(SEED, &all()).expect("every byte");
    // For good: the deadline of one comes first, the other hears that the peer is silent.
    node.side.poison().expect("poisoned");
    let hasty = pull(&from, &ticket, 2, Duration::from_millis(700));
    let patient = pull(&from, &ticket, 3, LONG);
    until("the first bytes", || moved(&node));
    Far::link("down");
    let cause = |transfer: &Transfer| {
        let outcome = transfer.wait(LONG).expect("an outcome");
        outcome.failure().map(|failure| failure.first_cause.clone())
    };
    assert_eq!(cause(&hasty), Some(Cause::DeadlinePassed));
    let patient_cause = cause(&patient);
    assert!(
        matches!(
            patient_cause,
            Some(Cause::PeerStalled { .. } | Cause::LaneReset)
        ),
        "{patient_cause:?}"
    );
    assert!(hasty.wait_released(LONG) && patient.wait_released(LONG));
    node.fill_blocks(0..BLOCKS, RECYCLED);
    log.wait("loss", |event| matches!(event, Event::PeerDown { .. }));
    Far::link("up");
    std::thread::sleep(Duration::from_millis(500));
    node.assert_blocks(0..BLOCKS, RECYCLED);
    works(&node, &from, &mut child, "again");
    log.assert_told_once();
}

fn moved(node: &Node) -> bool {
    (0..BLOCKS).any(|block| node.first_word(block) != POISON)
}

/// Not a test: what children run.
#[test]
fn child_entry() {
    child::entry();
}
