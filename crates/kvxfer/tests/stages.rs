//! Blocks that are in parts at two pipeline ranks, each in a process of its own, of which one is killed
//! or stopped while a pull of both runs: it ends once and gives its memory back, the other rank is as
//! good as before, and when the struck one is back the pull succeeds.

mod support;

use std::time::Duration;

use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Instance, Outcome, PullOptions, Transfer};
use kvxfer::event::Event;
use kvxfer::ticket::Ticket;
use kvxfer::transfer::Cause;
use support::child::{self, Child, Spec};
use support::{LONG, Log, Node, POISON, bounded, groups, pairs, recipe, until};

const BLOCK: u64 = 64 << 10;
/// 96 MiB in two layers, one at each rank.
const BLOCKS: u32 = 768;
const STAGES: u32 = 2;
/// The rank that is struck.
const VICTIM: usize = 1;
const SEED: u64 = 31;
/// What a pull that is to run into a stop is given.
const SHORT: Duration = Duration::from_millis(1500);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Kill,
    Stop,
}

fn start(path: PathKind, pp: u32, listen: &str) -> Child {
    let spec = Spec {
        role: KvRole::Producer,
        path,
        block_bytes: BLOCK,
        blocks: BLOCKS,
        listen: listen.to_owned(),
        engine_id: Some("staged".to_owned()),
        seed: SEED,
        namespace: None,
    };
    Child::start_stage(&spec, pp, STAGES)
}

/// The consumer's blocks, in the order of the producers'.
fn blocks() -> impl Iterator<Item = u32> + Clone {
    (0..BLOCKS).rev()
}

fn pull(instance: &Instance, tickets: &[Ticket], deadline: Duration) -> Transfer {
    let options = PullOptions {
        deadline: Some(deadline),
        ..PullOptions::default()
    };
    instance
        .pull_ranks(tickets, &groups(blocks()), None, options)
        .expect("a pull")
}

fn has_layer(node: &Node, layer: usize) -> bool {
    let tensor = &node.side.placement().desc().tensors()[layer];
    let memory = &node.side.memory()[tensor.memory as usize];
    (0..BLOCKS).any(|block| {
        let at = tensor.offset + u64::from(block) * tensor.block_stride;
        memory.load_u64(at).expect("inside") != POISON
    })
}

fn struck(path: PathKind, fault: Fault) {
    let mut children: Vec<Child> = (0..STAGES)
        .map(|pp| start(path, pp, "127.0.0.1:0"))
        .collect();
    let node = recipe(KvRole::Consumer, path, BLOCK, BLOCKS)
        .with(|config| config.connect_timeout = Duration::from_secs(2))
        .node();
    let mut log = Log::new(&node.engine);
    let addresses: Vec<&str> = children.iter().map(|child| &*child.address).collect();
    let instance = node.engine.connect_ranks(&addresses, LONG).expect("up");

    // Fast enough to be over before it is struck, now and then: it is tried until it is not.
    let mut round = 0;
    let (outcome, transfer) = loop {
        round += 1;
        node.side.poison().expect("poisoned");
        let request = format!("r{round}");
        let offer = |child: &mut Child| child.offer(&request, BLOCKS, LONG);
        let tickets: Vec<Ticket> = children.iter_mut().map(offer).collect();
        let deadline = if fault == Fault::Stop { SHORT } else { LONG };
        let transfer = pull(&instance, &tickets, deadline);
        until("bytes of the victim", || {
            has_layer(&node, VICTIM) || transfer.outcome().is_some()
        });
        match fault {
            Fault::Kill => children[VICTIM].kill(),
            Fault::Stop => children[VICTIM].stop(),
        }
        let outcome = transfer.wait(LONG).expect("an outcome");
        let lease = matches!(
            outcome.failure().map(|f| &f.first_cause),
            Some(Cause::LeaseExpired)
        );
        assert!(!lease, "nobody has taken the blocks back");
        if !outcome.is_done() || round == 20 {
            break (outcome, transfer);
        }
        match fault {
            Fault::Kill => {
                children[VICTIM].die();
                let address = children[VICTIM].address.clone();
                children[VICTIM] = start(path, 1, &address);
            }
            Fault::Stop => children[VICTIM].resume(),
        }
        until("both ranks", || instance.is_up());
    };
    let failure = outcome
        .failure()
        .expect("struck while it ran, once in twenty times");
    let fits = match fault {
        Fault::Kill => matches!(failure.first_cause, Cause::PeerDead),
        Fault::Stop => matches!(
            failure.first_cause,
            Cause::DeadlinePassed | Cause::PeerStalled { .. }
        ),
    };
    assert!(fits, "{failure:?}");
    assert!(!failure.invalid_blocks.is_empty());
    assert!(transfer.wait_released(LONG));

    match fault {
        Fault::Kill => {
            children[VICTIM].die();
            let address = children[VICTIM].address.clone();
            children[VICTIM] = start(path, 1, &address);
        }
        Fault::Stop => children[VICTIM].resume(),
    }
    // What the struck session has left may take the first tries with it.
    let mut tries = 0;
    until("a pull of both ranks", || {
        tries += 1;
        if !instance.wait_up(LONG) {
            return false;
        }
        let request = format!("again{tries}");
        let offer = |child: &mut Child| child.offer(&request, BLOCKS, LONG);
        let tickets: Vec<Ticket> = children.iter_mut().map(offer).collect();
        node.side.poison().expect("poisoned");
        let options = PullOptions::default();
        let again = instance.pull_ranks(&tickets, &groups(blocks()), None, options);
        let Ok(again) = again else { return false };
        let done = again.wait(LONG) == Some(Outcome::Done);
        // The next try poisons what this one writes.
        assert!(again.wait_released(LONG));
        done
    });
    node.side
        .verify(SEED, &pairs((0..BLOCKS).zip(blocks())))
        .expect("every byte");
    log.wait("the failure", |e| matches!(e, Event::Failed { .. }));
    log.assert_told_once();
    bounded("engine drop", move || drop((instance, node, log)));
    drop(children);
}

#[test]
fn tcp_stage_killed() {
    struck(PathKind::Tcp, Fault::Kill);
}

#[test]
fn tcp_stage_stopped() {
    struck(PathKind::Tcp, Fault::Stop);
}

#[test]
fn process_vm_stage_killed() {
    struck(PathKind::ProcessVm, Fault::Kill);
}

/// Not a test: what children run.
#[test]
fn child_entry() {
    child::entry();
}
