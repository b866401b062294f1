//! WRITE: the producer is struck, and the consumer survives.

use crate::support::child::Child;
use crate::support::{LONG, Log, groups};
use crate::{
    BLOCKS, Fault, SHORT, SLACK, TIMES, bytes_have_come, connect, drops, is_pushed_to,
    nothing_lands, peer, peer_spec, survivor,
};
use kvxfer::config::{KvRole, PathKind};
use kvxfer::event::{Event, MemoryState, ReleaseReason};
use kvxfer::ids::RequestId;

fn producer_struck_while_it_pushes(path: PathKind, fault: Fault) {
    let mut producer = peer(KvRole::Producer, path);
    let node = survivor(KvRole::Consumer, path);
    let mut log = Log::new(&node.engine);
    let instance = connect(&node, &producer);
    let request = RequestId::from("w");
    node.engine
        .expect(&request, &groups(0..BLOCKS), 1, fault.deadline())
        .expect("an expectation");
    producer.push(&node.name(), "w", BLOCKS, TIMES);
    bytes_have_come(&node);
    let of = |event: &Event| event.request().is_some_and(|(r, _)| *r == request);
    let struck = fault.strike(&producer, log.count(of) == 0);
    let Event::Failed {
        first_cause,
        invalid_blocks,
        memory,
        ..
    } = log.wait("failure", of)
    else {
        panic!("a push that was never committed has arrived");
    };
    assert!(fault.may_cause(&first_cause), "{first_cause}");
    assert_eq!(invalid_blocks, groups(0..BLOCKS));
    assert!(struck.elapsed() < SHORT + SLACK, "{:?}", struck.elapsed());
    if memory == MemoryState::Quarantined {
        log.wait("release", |event| {
            matches!(
                event,
                Event::Released {
                    reason: ReleaseReason::Drained,
                    ..
                }
            )
        });
    }
    nothing_lands(&node, fault, &producer);
    log.assert_told_once();
    if fault == Fault::Stop {
        // The GPU of this side fetches all that it was asked to, whether or not the producer goes on: then all
        // of it was written, and too late.
        let said = producer.outcome("w");
        let sent = path == PathKind::Ipc && said.starts_with("sent");
        assert!(sent || said.starts_with("failed"), "{said}");
        assert!(instance.wait_up(LONG));
        is_pushed_to(&node, &mut producer, "again");
    }
    let mut fresh = Child::start(&peer_spec(KvRole::Producer, path, 16));
    let other = connect(&node, &fresh);
    is_pushed_to(&node, &mut fresh, "fresh");
    drops(node, vec![instance, other]);
}

#[test]
fn arena_write_producer_killed() {
    producer_struck_while_it_pushes(PathKind::Arena, Fault::Kill);
}

#[test]
fn arena_write_producer_stopped() {
    producer_struck_while_it_pushes(PathKind::Arena, Fault::Stop);
}

#[test]
fn process_vm_write_producer_killed() {
    producer_struck_while_it_pushes(PathKind::ProcessVm, Fault::Kill);
}

#[test]
fn process_vm_write_producer_stopped() {
    producer_struck_while_it_pushes(PathKind::ProcessVm, Fault::Stop);
}

#[test]
fn tcp_write_producer_killed() {
    producer_struck_while_it_pushes(PathKind::Tcp, Fault::Kill);
}

#[test]
fn tcp_write_producer_stopped() {
    producer_struck_while_it_pushes(PathKind::Tcp, Fault::Stop);
}

#[test]
fn ipc_write_producer_killed() {
    producer_struck_while_it_pushes(PathKind::Ipc, Fault::Kill);
}

#[test]
fn ipc_write_producer_stopped() {
    producer_struck_while_it_pushes(PathKind::Ipc, Fault::Stop);
}

#[test]
fn staged_write_producer_killed() {
    producer_struck_while_it_pushes(PathKind::Staged, Fault::Kill);
}

#[test]
fn staged_write_producer_stopped() {
    producer_struck_while_it_pushes(PathKind::Staged, Fault::Stop);
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_write_producer_killed() {
    producer_struck_while_it_pushes(PathKind::Rdma, Fault::Kill);
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_write_producer_stopped() {
    producer_struck_while_it_pushes(PathKind::Rdma, Fault::Stop);
}
