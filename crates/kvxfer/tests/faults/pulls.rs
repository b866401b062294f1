//! READ: the producer is struck, and the consumer survives.

use crate::support::child::Child;
use crate::support::{LONG, Log};
use crate::{
    BLOCKS, Fault, all_end, bytes_have_come, connect, drops, nothing_lands, peer, peer_spec,
    pull_all, pulls_from, running, survivor,
};
use kvxfer::config::{KvRole, PathKind};

fn producer_struck_while_read(path: PathKind, fault: Fault) {
    let mut producer = peer(KvRole::Producer, path);
    let node = survivor(KvRole::Consumer, path);
    let mut log = Log::new(&node.engine);
    let instance = connect(&node, &producer);
    let ticket = producer.offer("r", BLOCKS, LONG);
    let transfers = pull_all(&instance, &ticket, fault.deadline());
    bytes_have_come(&node);
    let struck = fault.strike(&producer, running(&transfers));
    let outcomes = all_end(&transfers, fault, struck);
    // A stopped process's memory can still be read, but for the path that asks the process.
    let killed = matches!(path, PathKind::ProcessVm | PathKind::Rdma) && fault == Fault::Kill;
    if path == PathKind::Tcp || killed {
        assert!(
            outcomes.iter().any(|o| !o.is_done()),
            "without the peer there is nobody to read from"
        );
    }
    nothing_lands(&node, fault, &producer);
    log.assert_told_once();
    if fault == Fault::Stop {
        pulls_from(&node, &instance, &mut producer, "again");
    }
    let mut fresh = Child::start(&peer_spec(KvRole::Producer, path, 16));
    let other = connect(&node, &fresh);
    pulls_from(&node, &other, &mut fresh, "fresh");
    drops(node, vec![instance, other]);
}

#[test]
fn arena_read_producer_killed() {
    producer_struck_while_read(PathKind::Arena, Fault::Kill);
}

#[test]
fn arena_read_producer_stopped() {
    producer_struck_while_read(PathKind::Arena, Fault::Stop);
}

#[test]
fn process_vm_read_producer_killed() {
    producer_struck_while_read(PathKind::ProcessVm, Fault::Kill);
}

#[test]
fn process_vm_read_producer_stopped() {
    producer_struck_while_read(PathKind::ProcessVm, Fault::Stop);
}

#[test]
fn tcp_read_producer_killed() {
    producer_struck_while_read(PathKind::Tcp, Fault::Kill);
}

#[test]
fn tcp_read_producer_stopped() {
    producer_struck_while_read(PathKind::Tcp, Fault::Stop);
}

#[test]
fn staged_read_producer_killed() {
    producer_struck_while_read(PathKind::Staged, Fault::Kill);
}

#[test]
fn staged_read_producer_stopped() {
    producer_struck_while_read(PathKind::Staged, Fault::Stop);
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_read_producer_killed() {
    producer_struck_while_read(PathKind::Rdma, Fault::Kill);
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_read_producer_stopped() {
    producer_struck_while_read(PathKind::Rdma, Fault::Stop);
}
