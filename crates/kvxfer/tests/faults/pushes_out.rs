//! WRITE: the consumer is struck, and the producer survives.

use std::time::Duration;

use crate::support::child::Child;
use crate::support::{LONG, Log};
use crate::{
    BLOCKS, Fault, SEED, TIMES, all_blocks, all_end, connect, drops, nothing_lands, peer,
    peer_spec, pushes_to, running, survivor,
};
use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::PushOptions;
use kvxfer::ids::RequestId;

fn consumer_struck_while_pushed_to(path: PathKind, fault: Fault) {
    let mut consumer = peer(KvRole::Consumer, path);
    let node = survivor(KvRole::Producer, path);
    let mut log = Log::new(&node.engine);
    let instance = connect(&node, &consumer);
    // So that the next push finds all of the way in place.
    pushes_to(&instance, &mut consumer, "before");
    let request = RequestId::from("w");
    consumer.expect("w", BLOCKS, LONG);
    let options = PushOptions {
        deadline: Some(fault.deadline()),
        ..PushOptions::default()
    };
    let push = instance.begin_push_with(&request, options).expect("a push");
    for _ in 0..TIMES {
        push.all_layers(&all_blocks(), None).expect("fits");
    }
    let transfers = [push.commit().expect("committed")];
    std::thread::sleep(Duration::from_millis(20));
    let struck = fault.strike(&consumer, running(&transfers));
    let outcomes = all_end(&transfers, fault, struck);
    assert!(!outcomes[0].is_done(), "who has confirmed it?");
    // The producer's memory is its own again; the consumer never takes what is there now.
    nothing_lands(&node, fault, &consumer);
    log.assert_told_once();
    node.side.fill(SEED).expect("filled");
    if fault == Fault::Stop {
        let said = consumer.outcome("w");
        assert!(said.starts_with("failed"), "{said}");
        assert!(instance.wait_up(LONG));
        pushes_to(&instance, &mut consumer, "again");
        consumer.tell("once");
        consumer.answer("once");
    }
    let mut fresh = Child::start(&peer_spec(KvRole::Consumer, path, 16));
    let other = connect(&node, &fresh);
    pushes_to(&other, &mut fresh, "fresh");
    drops(node, vec![instance, other]);
}

#[test]
fn arena_write_consumer_killed() {
    consumer_struck_while_pushed_to(PathKind::Arena, Fault::Kill);
}

#[test]
fn arena_write_consumer_stopped() {
    consumer_struck_while_pushed_to(PathKind::Arena, Fault::Stop);
}

#[test]
fn process_vm_write_consumer_killed() {
    consumer_struck_while_pushed_to(PathKind::ProcessVm, Fault::Kill);
}

#[test]
fn process_vm_write_consumer_stopped() {
    consumer_struck_while_pushed_to(PathKind::ProcessVm, Fault::Stop);
}

#[test]
fn tcp_write_consumer_killed() {
    consumer_struck_while_pushed_to(PathKind::Tcp, Fault::Kill);
}

#[test]
fn tcp_write_consumer_stopped() {
    consumer_struck_while_pushed_to(PathKind::Tcp, Fault::Stop);
}

#[test]
fn ipc_write_consumer_killed() {
    consumer_struck_while_pushed_to(PathKind::Ipc, Fault::Kill);
}

#[test]
fn ipc_write_consumer_stopped() {
    consumer_struck_while_pushed_to(PathKind::Ipc, Fault::Stop);
}

#[test]
fn staged_write_consumer_killed() {
    consumer_struck_while_pushed_to(PathKind::Staged, Fault::Kill);
}

#[test]
fn staged_write_consumer_stopped() {
    consumer_struck_while_pushed_to(PathKind::Staged, Fault::Stop);
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_write_consumer_killed() {
    consumer_struck_while_pushed_to(PathKind::Rdma, Fault::Kill);
}
