//! Peers in processes of their own that are killed or stopped while blocks move, over every path:
//! what the survivor is told, when its memory comes back, that nothing lands in it later, and that it
//! goes on with others.

#[path = "../support/mod.rs"]
mod support;

mod pulls;
mod pushes_in;
mod pushes_out;
mod stages;

use std::time::{Duration, Instant};

use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Instance, Outcome, PullOptions, Transfer};
use kvxfer::event::{Event, MemoryState};
use kvxfer::ids::RequestId;
use kvxfer::transfer::Cause;
use support::child::{self, Child, Spec};
use support::{
    LONG, Log, Node, POISON, RECYCLED, bounded, dealt, groups, pairs, recipe, take_time, until,
};

/// 64 MiB in two layers, and as often over again as makes a transfer long enough to be struck.
pub(crate) const BLOCK: u64 = 16 << 10;
pub(crate) const BLOCKS: u32 = 2048;
pub(crate) const TIMES: u32 = 24;
/// What a transfer that is to run into it is given.
pub(crate) const SHORT: Duration = Duration::from_millis(1500);
/// How much later than its deadline an outcome may come on the busiest machine.
pub(crate) const SLACK: Duration = Duration::from_secs(20);
/// For how long recycled memory is watched.
pub(crate) const WATCH: Duration = Duration::from_millis(300);
pub(crate) const SEED: u64 = 7;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Kill,
    Stop,
}

impl Fault {
    /// Strikes a peer, while this is still under way.
    pub(crate) fn strike(self, child: &Child, under_way: bool) -> Instant {
        match self {
            Fault::Kill => child.kill(),
            Fault::Stop => child.stop(),
        }
        assert!(under_way, "struck too late");
        Instant::now()
    }

    /// The deadline of what is struck. A death is to be noticed long before.
    pub(crate) fn deadline(self) -> Duration {
        match self {
            Fault::Kill => LONG,
            Fault::Stop => SHORT,
        }
    }

    pub(crate) fn may_cause(self, cause: &Cause) -> bool {
        match self {
            Fault::Kill => matches!(cause, Cause::PeerDead),
            Fault::Stop => matches!(cause, Cause::DeadlinePassed | Cause::PeerStalled { .. }),
        }
    }
}

pub(crate) fn peer_spec(role: KvRole, path: PathKind, blocks: u32) -> Spec {
    Spec {
        role,
        path,
        block_bytes: BLOCK,
        blocks,
        listen: "127.0.0.1:0".to_owned(),
        engine_id: None,
        seed: SEED,
        namespace: None,
    }
}

pub(crate) fn peer(role: KvRole, path: PathKind) -> Child {
    Child::start(&peer_spec(role, path, BLOCKS))
}

pub(crate) fn survivor(role: KvRole, path: PathKind) -> Node {
    let node = recipe(role, path, BLOCK, BLOCKS)
        .with(|config| {
            config.connect_timeout = Duration::from_secs(2);
            // It reads; what is written to it takes the time that its peer takes.
            if role == KvRole::Consumer {
                take_time(config);
            }
        })
        .node();
    match role {
        KvRole::Producer => node.side.fill(SEED).expect("filled"),
        _ => node.side.poison().expect("poisoned"),
    }
    node
}

pub(crate) fn connect(node: &Node, child: &Child) -> Instance {
    node.engine
        .connect(&child.address, LONG)
        .expect("a session")
}

/// All blocks, so that none merges with its neighbour.
pub(crate) fn all_blocks() -> Vec<kvxfer::blocks::GroupPairs> {
    pairs((0..BLOCKS).map(|b| (b, BLOCKS - 1 - b)))
}

/// Starts pulling everything, in many pulls.
pub(crate) fn pull_all(
    instance: &Instance,
    ticket: &kvxfer::ticket::Ticket,
    deadline: Duration,
) -> Vec<Transfer> {
    let start = |(tag, wanted): (u64, Vec<_>)| {
        let options = PullOptions {
            tag,
            deadline: Some(deadline),
            hold: true,
            ..PullOptions::default()
        };
        instance.pull(ticket, &wanted, options).expect("a transfer")
    };
    (0..).zip(dealt(&all_blocks(), TIMES)).map(start).collect()
}

pub(crate) fn bytes_have_come(node: &Node) {
    until("the first bytes", || {
        (0..BLOCKS).any(|block| node.first_word(block) != POISON)
    });
}

pub(crate) fn running(transfers: &[Transfer]) -> bool {
    transfers.iter().any(|t| t.outcome().is_none())
}

/// Each ends in time, and for a reason that fits the fault.
pub(crate) fn all_end(transfers: &[Transfer], fault: Fault, struck: Instant) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for transfer in transfers {
        let outcome = transfer.wait(LONG + SLACK).expect("an outcome");
        if let Some(failure) = outcome.failure() {
            assert!(fault.may_cause(&failure.first_cause), "{failure:?}");
        }
        outcomes.push(outcome);
    }
    assert!(struck.elapsed() < SHORT + SLACK, "{:?}", struck.elapsed());
    for transfer in transfers {
        assert!(transfer.wait_released(LONG), "memory comes back");
    }
    outcomes
}

/// What the owner does with its memory now is not undone, also when the peer goes on.
pub(crate) fn nothing_lands(node: &Node, fault: Fault, child: &Child) {
    node.fill_blocks(0..BLOCKS, RECYCLED);
    if fault == Fault::Stop {
        child.resume();
    }
    std::thread::sleep(WATCH);
    node.assert_blocks(0..BLOCKS, RECYCLED);
}

/// A pull from a peer that is well.
pub(crate) fn pulls_from(node: &Node, instance: &Instance, child: &mut Child, request: &str) {
    let ticket = child.offer(request, 8, LONG);
    let wanted = pairs((0..8).map(|b| (b, 9 - b)));
    // A session that has just come back may be the one that is about to be replaced.
    until("a pull", || {
        let Ok(transfer) = instance.pull(&ticket, &wanted, PullOptions::default()) else {
            return false;
        };
        transfer.wait(LONG) == Some(Outcome::Done)
    });
    node.side.verify(SEED, &wanted).expect("every byte");
}

/// A push from a peer that is well, and that the node has connected to.
pub(crate) fn is_pushed_to(node: &Node, child: &mut Child, request: &str) {
    let mut log = Log::new(&node.engine);
    let mut tries = 0;
    until("a push", || {
        tries += 1;
        let request = format!("{request}-{tries}");
        let id = RequestId::from(request.as_str());
        node.engine
            .expect(&id, &groups(0..8), 1, Duration::from_secs(5))
            .expect("an expectation");
        child.push(&node.name(), &request, 8, 1);
        let of = |event: &Event| event.request().is_some_and(|(r, _)| *r == id);
        match log.wait("end", of) {
            Event::Received { .. } => true,
            Event::Failed { memory, .. } => {
                if memory == MemoryState::Quarantined {
                    log.wait(
                        "release",
                        |event| matches!(event, Event::Released { request, .. } if *request == id),
                    );
                }
                false
            }
            other => panic!("{other:?}"),
        }
    });
    let table = pairs((0..8).map(|b| (b, b)));
    node.side.verify(SEED, &table).expect("every byte");
}

/// A push to a peer that is well.
pub(crate) fn pushes_to(instance: &Instance, child: &mut Child, request: &str) {
    let mut tries = 0;
    until("a push", || {
        tries += 1;
        let request = format!("{request}-{tries}");
        child.expect(&request, 8, Duration::from_secs(5));
        let Ok(push) = instance.begin_push(&RequestId::from(request.as_str())) else {
            return false;
        };
        let fits = push.all_layers(&pairs((0..8).map(|b| (b, b))), None);
        let transfer = push.commit().expect("its outcome tells");
        let done = transfer.wait(LONG) == Some(Outcome::Done);
        let said = child.outcome(&request);
        assert_eq!(said.starts_with("received"), done, "{said}");
        done && fits.is_ok()
    });
}

pub(crate) fn drops(node: Node, instances: Vec<Instance>) {
    bounded("engine drop", move || drop((instances, node)));
}

/// Not a test: what children run.
#[test]
fn child_entry() {
    child::entry();
}
