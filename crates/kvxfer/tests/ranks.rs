//! An instance of several ranks, each in a process of its own. One of them is killed or stopped while
//! blocks move, over every path: what was under way with the others goes on, more can be asked of them,
//! and the one that was lost comes back through the same instance.

mod support;

use std::time::Duration;

use kvxfer::Error;
use kvxfer::blocks::GroupPairs;
use kvxfer::config::{Config, KvRole, PathKind};
use kvxfer::engine::{Instance, Outcome, PullOptions, PushOptions, Transfer};
use kvxfer::event::{Event, PeerName};
use kvxfer::ids::{EngineId, Rank, RequestId};
use kvxfer::ticket::Ticket;
use kvxfer::transfer::Cause;
use support::child::{self, Child, Spec};
use support::{LONG, Log, Node, POISON, bounded, dealt, pairs, recipe, take_time, until};

const BLOCK: u64 = 16 << 10;
/// Blocks of a rank, in two layers: 24 MiB.
const BLOCKS: u32 = 768;
/// As often over again as makes a transfer long enough to be struck.
const TIMES: u32 = 24;
/// What is tried with a rank that is well.
const FEW: u32 = 8;
const RANKS: u32 = 3;
/// The rank that is struck.
const VICTIM: u32 = 1;
/// What a transfer that is to run into a stop is given.
const SHORT: Duration = Duration::from_millis(1500);
const SEED: u64 = 70;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Kill,
    Stop,
}

impl Fault {
    fn strike(self, child: &Child) {
        match self {
            Fault::Kill => child.kill(),
            Fault::Stop => child.stop(),
        }
    }

    /// What transfers with this rank are given.
    fn deadline(self, rank: u32) -> Duration {
        match self {
            Fault::Stop if rank == VICTIM => SHORT,
            _ => LONG,
        }
    }

    fn may_cause(self, cause: &Cause) -> bool {
        match self {
            Fault::Kill => matches!(cause, Cause::PeerDead),
            Fault::Stop => matches!(cause, Cause::DeadlinePassed | Cause::PeerStalled { .. }),
        }
    }
}

fn rank(dp: u32) -> Rank {
    Rank {
        dp,
        ..Rank::default()
    }
}

fn name(dp: u32) -> PeerName {
    PeerName {
        engine: EngineId::from("trio"),
        rank: rank(dp),
    }
}

/// Each rank has a pattern of its own, so that one rank's bytes are not taken for another's.
fn seed(dp: u32) -> u64 {
    SEED + u64::from(dp)
}

/// Where the survivor keeps the blocks of a rank.
fn area(dp: u32, blocks: u32) -> Vec<GroupPairs> {
    pairs((0..blocks).map(|b| (b, dp * BLOCKS + BLOCKS - 1 - b)))
}

/// The way back.
fn home(dp: u32, blocks: u32) -> Vec<GroupPairs> {
    pairs((0..blocks).map(|b| (dp * BLOCKS + BLOCKS - 1 - b, b)))
}

struct Trio {
    path: PathKind,
    children: Vec<Child>,
    node: Node,
    log: Log,
    instance: Instance,
}

fn start(path: PathKind, dp: u32, listen: &str) -> Child {
    let spec = Spec {
        role: KvRole::Both,
        path,
        block_bytes: BLOCK,
        blocks: BLOCKS,
        listen: listen.to_owned(),
        engine_id: Some("trio".to_owned()),
        seed: seed(dp),
        namespace: None,
    };
    Child::start_rank(&spec, dp, RANKS)
}

impl Trio {
    fn new(path: PathKind, change: fn(&mut Config)) -> Self {
        let children: Vec<Child> = (0..RANKS)
            .map(|dp| start(path, dp, "127.0.0.1:0"))
            .collect();
        let node = recipe(KvRole::Both, path, BLOCK, RANKS * BLOCKS)
            .with(|config| config.connect_timeout = Duration::from_secs(2))
            .with(change)
            .node();
        node.side.poison().expect("poisoned");
        let log = Log::new(&node.engine);
        let addresses: Vec<&str> = [2, 0, 1].map(|dp| &*children[dp].address).to_vec();
        let instance = node
            .engine
            .connect_ranks(&addresses, LONG)
            .expect("three sessions");
        let ranks: Vec<Rank> = instance.peers().iter().map(|peer| peer.rank()).collect();
        assert_eq!(ranks, (0..RANKS).map(rank).collect::<Vec<_>>());
        assert!(instance.is_up());
        Self {
            path,
            children,
            node,
            log,
            instance,
        }
    }

    fn verify(&self, dp: u32, blocks: u32) {
        self.node
            .side
            .verify(seed(dp), &area(dp, blocks))
            .unwrap_or_else(|error| panic!("rank {dp}: {error}"));
    }

    /// A pull from a rank that is well, whose blocks are here then.
    fn pulls_from(&mut self, dp: u32, request: &str, blocks: u32) {
        let ticket = self.children[dp as usize].offer(request, blocks, LONG);
        // A session that has just come back may be the one that is about to be replaced. Each try is
        // told by its tag.
        let mut options = PullOptions::default();
        until("a pull", || {
            let wanted = area(dp, blocks);
            options.tag += 1;
            let Ok(pull) = self.instance.pull(&ticket, &wanted, options.clone()) else {
                return false;
            };
            pull.wait(LONG) == Some(Outcome::Done)
        });
        self.verify(dp, blocks);
        let child = &mut self.children[dp as usize];
        child.tell(&format!("released {request}"));
        child.answer("released");
    }

    /// A rank is well: its blocks come, and go back to where they were.
    fn is_well(&mut self, dp: u32, request: &str) {
        self.pulls_from(dp, request, FEW);
        let mut tries = 0;
        until("a push", || {
            tries += 1;
            let request = format!("{request}-back-{tries}");
            let child = &mut self.children[dp as usize];
            child.receive(&request, FEW, Duration::from_secs(5));
            let begun = self.instance.peer(rank(dp)).expect("a rank");
            let Ok(push) = begun.begin_push(&RequestId::from(request.as_str())) else {
                return child.verdict(&request) == "good";
            };
            let fits = push.all_layers(&home(dp, FEW), None);
            let done = push.commit().expect("its outcome tells").wait(LONG) == Some(Outcome::Done);
            let said = child.verdict(&request);
            // A rank that has not got it back would not be well for the next one that reads it.
            assert_eq!(said == "good", done && fits.is_ok(), "rank {dp}: {said}");
            done
        });
    }

    fn others() -> impl Iterator<Item = u32> {
        (0..RANKS).filter(|dp| *dp != VICTIM)
    }

    fn others_are_well(&mut self, request: &str) {
        for dp in Self::others() {
            self.is_well(dp, &format!("{request}-{dp}"));
        }
    }

    /// Events of loss are the victim's alone.
    fn only_the_victim_was_lost(&mut self) {
        self.log.assert_in_order(|events| {
            for event in events {
                if let Event::PeerDown { peer, .. } | Event::PeerRestarted { peer, .. } = event {
                    assert_eq!(*peer, name(VICTIM), "{events:#?}");
                }
            }
        });
        self.log.assert_told_once();
    }

    /// What was struck is away, and the instance says so.
    fn the_victim_is_away(&mut self, old: &Ticket) {
        let victim = name(VICTIM);
        self.log.wait(
            "loss",
            |event| matches!(event, Event::PeerDown { peer, .. } if *peer == victim),
        );
        assert!(!self.instance.is_up());
        for dp in 0..RANKS {
            let peer = self.instance.peer(rank(dp)).expect("a rank");
            assert_eq!(peer.is_up(), dp != VICTIM, "rank {dp}");
        }
        let error = self
            .instance
            .pull(old, &area(VICTIM, 1), PullOptions::default())
            .expect_err("nobody is there");
        assert!(matches!(error, Error::NotConnected { .. }), "{error}");
    }

    /// The rank starts again where it was. What it had given out is refused, and it is as good as new.
    fn the_victim_restarts(&mut self, offer: &Ticket, expect: Option<&Ticket>) {
        let victim = name(VICTIM);
        let at = VICTIM as usize;
        self.children[at].die();
        self.children[at] = start(self.path, VICTIM, &self.children[at].address);
        let Event::PeerRestarted { old, new, .. } = self.log.wait(
            "restart",
            |event| matches!(event, Event::PeerRestarted { peer, .. } if *peer == victim),
        ) else {
            unreachable!();
        };
        assert_eq!(old, offer.generation);
        assert!(self.instance.wait_up(LONG));
        let refused = |error: Error| {
            assert!(
                matches!(&error, Error::OldGeneration { now, .. } if *now == new),
                "{error}"
            );
        };
        let pull = |ticket| {
            self.instance
                .pull(ticket, &area(VICTIM, 1), PullOptions::default())
        };
        refused(pull(offer).expect_err("an earlier life"));
        refused(self.instance.release(offer).expect_err("an earlier life"));
        if let Some(ticket) = expect {
            let options = PushOptions {
                ticket: Some(ticket.clone()),
                ..PushOptions::default()
            };
            let push = self.instance.begin_push_with(&ticket.request, options);
            refused(push.expect_err("an earlier life"));
        }
    }

    fn end(self) {
        let Self {
            children,
            node,
            instance,
            log,
            ..
        } = self;
        bounded("engine drop", move || drop((instance, node, log)));
        drop(children);
    }
}

fn running(transfers: &[Transfer]) -> bool {
    transfers.iter().any(|t| t.outcome().is_none())
}

/// Those of the victim end, for a reason that fits; those of the others are done. Whether any failed.
fn all_end(of: &[Vec<Transfer>], fault: Fault) -> bool {
    let mut failed = false;
    for (dp, transfers) in (0..).zip(of) {
        for transfer in transfers {
            let outcome = transfer.wait(LONG).expect("an outcome");
            if dp == VICTIM {
                if let Some(failure) = outcome.failure() {
                    assert!(fault.may_cause(&failure.first_cause), "{failure:?}");
                    failed = true;
                }
                assert!(transfer.wait_released(LONG), "memory comes back");
            } else {
                assert_eq!(outcome, Outcome::Done, "rank {dp}");
            }
        }
    }
    failed
}

// ---- READ --------------------------------------------------------------------------------------

fn struck_while_read(path: PathKind, fault: Fault) {
    let mut trio = Trio::new(path, take_time);
    // It is over before its blocks are on offer.
    let victim = &mut trio.children[VICTIM as usize];
    let expect = victim.expect("old", FEW, Duration::from_millis(1));
    let ended = victim.outcome("old");
    assert!(ended.starts_with("failed"), "{ended}");
    let tickets: Vec<Ticket> = trio
        .children
        .iter_mut()
        .map(|child| child.offer("r", BLOCKS, LONG))
        .collect();
    let parts: Vec<_> = (0..RANKS)
        .map(|dp| dealt(&area(dp, BLOCKS), TIMES))
        .collect();
    let pull = |dp: u32, tag: u32| {
        let options = PullOptions {
            tag: u64::from(dp * TIMES + tag),
            deadline: Some(fault.deadline(dp)),
            hold: true,
            ..PullOptions::default()
        };
        trio.instance
            .pull(
                &tickets[dp as usize],
                &parts[dp as usize][tag as usize],
                options,
            )
            .expect("a transfer")
    };
    let mut pulls: Vec<Vec<Transfer>> = (0..RANKS).map(|_| Vec::new()).collect();
    for tag in 0..TIMES {
        for dp in 0..RANKS {
            pulls[dp as usize].push(pull(dp, tag));
        }
    }
    until("bytes of every rank", || {
        (0..RANKS)
            .all(|dp| (0..BLOCKS).any(|block| trio.node.first_word(dp * BLOCKS + block) != POISON))
    });
    // Before: what is killed may fail at once.
    let under_way = pulls.iter().all(|pulls| running(pulls));
    fault.strike(&trio.children[VICTIM as usize]);
    assert!(under_way, "struck too late");

    let failed = all_end(&pulls, fault);
    if path == PathKind::Tcp || (path, fault) == (PathKind::ProcessVm, Fault::Kill) {
        assert!(failed, "without the rank there is nobody to read from");
    }
    for dp in Trio::others() {
        trio.verify(dp, BLOCKS);
        trio.instance.release(&tickets[dp as usize]).expect("up");
        trio.children[dp as usize].tell("released r");
        trio.children[dp as usize].answer("released");
    }
    trio.others_are_well("meanwhile");
    let old = &tickets[VICTIM as usize];
    match fault {
        Fault::Kill => {
            trio.the_victim_is_away(old);
            trio.the_victim_restarts(old, Some(&expect));
        }
        Fault::Stop => {
            trio.children[VICTIM as usize].resume();
            assert!(trio.instance.wait_up(LONG));
            trio.pulls_from(VICTIM, "woken", FEW);
            // It may have been met again under its own life, but is the same one.
            trio.instance.release(old).expect("the same life");
            trio.the_victim_restarts(old, None);
        }
    }
    for dp in 0..RANKS {
        trio.is_well(dp, &format!("again-{dp}"));
    }
    trio.only_the_victim_was_lost();
    trio.end();
}

#[test]
fn arena_rank_killed_while_read() {
    struck_while_read(PathKind::Arena, Fault::Kill);
}

#[test]
fn arena_rank_stopped_while_read() {
    struck_while_read(PathKind::Arena, Fault::Stop);
}

#[test]
fn process_vm_rank_killed_while_read() {
    struck_while_read(PathKind::ProcessVm, Fault::Kill);
}

#[test]
fn process_vm_rank_stopped_while_read() {
    struck_while_read(PathKind::ProcessVm, Fault::Stop);
}

#[test]
fn tcp_rank_killed_while_read() {
    struck_while_read(PathKind::Tcp, Fault::Kill);
}

#[test]
fn tcp_rank_stopped_while_read() {
    struck_while_read(PathKind::Tcp, Fault::Stop);
}

// ---- WRITE -------------------------------------------------------------------------------------

fn struck_while_written(path: PathKind, fault: Fault) {
    let mut trio = Trio::new(path, |_| {});
    for dp in 0..RANKS {
        trio.pulls_from(dp, "first", BLOCKS);
    }
    let old = trio.children[VICTIM as usize].offer("old", FEW, LONG);
    trio.instance.release(&old).expect("up");
    trio.children[VICTIM as usize].tell("released old");
    trio.children[VICTIM as usize].answer("released");
    for child in &mut trio.children {
        // Poisons what is then written.
        child.receive("w", BLOCKS, LONG);
    }
    let push = |dp: u32| {
        let options = PushOptions {
            tag: u64::from(dp),
            deadline: Some(fault.deadline(dp)),
            ..PushOptions::default()
        };
        let peer = trio.instance.peer(rank(dp)).expect("a rank");
        let push = peer
            .begin_push_with(&RequestId::from("w"), options)
            .expect("a push");
        for _ in 0..TIMES {
            push.all_layers(&home(dp, BLOCKS), None).expect("fits");
        }
        push
    };
    let begun: Vec<_> = (0..RANKS).map(push).collect();
    let pushes: Vec<Vec<Transfer>> = begun
        .into_iter()
        .map(|push| vec![push.commit().expect("committed")])
        .collect();
    std::thread::sleep(Duration::from_millis(5));
    let under_way = pushes.iter().all(|push| running(push));
    fault.strike(&trio.children[VICTIM as usize]);
    assert!(under_way, "struck too late");

    assert!(all_end(&pushes, fault), "who has confirmed it?");
    for dp in Trio::others() {
        let said = trio.children[dp as usize].verdict("w");
        assert_eq!(said, "good", "rank {dp}");
    }
    trio.others_are_well("meanwhile");
    match fault {
        Fault::Kill => trio.the_victim_is_away(&old),
        Fault::Stop => {
            let victim = &mut trio.children[VICTIM as usize];
            victim.resume();
            assert_eq!(victim.verdict("w"), "failed");
            assert!(trio.instance.wait_up(LONG));
            trio.instance.release(&old).expect("the same life");
        }
    }
    trio.the_victim_restarts(&old, None);
    for dp in 0..RANKS {
        trio.is_well(dp, &format!("again-{dp}"));
    }
    trio.only_the_victim_was_lost();
    trio.end();
}

#[test]
fn arena_rank_killed_while_written() {
    struck_while_written(PathKind::Arena, Fault::Kill);
}

#[test]
fn arena_rank_stopped_while_written() {
    struck_while_written(PathKind::Arena, Fault::Stop);
}

#[test]
fn process_vm_rank_killed_while_written() {
    struck_while_written(PathKind::ProcessVm, Fault::Kill);
}

#[test]
fn process_vm_rank_stopped_while_written() {
    struck_while_written(PathKind::ProcessVm, Fault::Stop);
}

#[test]
fn tcp_rank_killed_while_written() {
    struck_while_written(PathKind::Tcp, Fault::Kill);
}

#[test]
fn tcp_rank_stopped_while_written() {
    struck_while_written(PathKind::Tcp, Fault::Stop);
}

/// Not a test: what children run.
#[test]
fn child_entry() {
    child::entry();
}
