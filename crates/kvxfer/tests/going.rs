//! An engine that is dropped leaves no thread behind, whatever the network does: connections that
//! say nothing, and an address that does not answer. Alone in its file, for it looks at the threads
//! of the whole process.

mod support;

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use kvxfer::config::{KvRole, PathKind};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket,
    sockopt::ReuseAddr,
};
use support::{LONG, bounded, recipe, until};

/// Longer than dropping takes on the busiest machine, and much shorter than what is waited for.
const SOON: Duration = Duration::from_secs(30);
const FOR_LONG: Duration = Duration::from_secs(300);

fn threads() -> Vec<String> {
    let tasks = fs::read_dir("/proc/self/task").expect("procfs");
    tasks
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .filter(|name| name == "kvx-link" || name == "kvx-worker" || name == "kvx-listen")
        .collect()
}

/// Whether somebody waits for an answer from a port of this host.
fn dials(port: u16) -> bool {
    let sockets = fs::read_to_string("/proc/self/net/tcp").expect("procfs");
    let to = format!("0100007F:{port:04X}");
    // Its own address, the other's, and the state SYN_SENT.
    sockets.lines().any(|line| {
        let mut words = line.split_whitespace().skip(2);
        words.next() == Some(to.as_str()) && words.next() == Some("02")
    })
}

/// A listener that takes nobody any more: connecting to it is not answered.
fn deaf(address: SocketAddr) -> (std::os::fd::OwnedFd, Vec<TcpStream>) {
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Inet, SockType::Stream, flags, None).expect("a socket");
    setsockopt(&fd, ReuseAddr, &true).expect("reuse");
    until("the address", || {
        bind(fd.as_raw_fd(), &SockaddrStorage::from(address)).is_ok()
    });
    listen(&fd, Backlog::new(1).expect("a backlog")).expect("listening");
    let mut taken = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
        taken.push(stream);
    }
    (fd, taken)
}

#[test]
fn no_thread_outlives_its_engine() {
    let node = |role| {
        recipe(role, PathKind::Arena, 4096, 8)
            .with(|config| config.connect_timeout = FOR_LONG)
            .node()
    };
    let producer = node(KvRole::Producer);
    let address = producer.engine.listen("127.0.0.1:0").expect("a port");
    // Somebody who connects and says nothing.
    let silent = TcpStream::connect(address).expect("connected");
    until("its thread", || {
        threads().iter().any(|name| name == "kvx-link")
    });
    let consumer = node(KvRole::Consumer);
    let instance = consumer
        .engine
        .connect(&address.to_string(), LONG)
        .expect("a session");
    let begun = Instant::now();
    bounded("the producer's drop", move || drop(producer));
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    drop(silent);
    // The consumer tries to come back, and nobody answers.
    let held = deaf(address);
    until("a dial", || dials(address.port()));
    let begun = Instant::now();
    bounded("the consumer's drop", move || drop(consumer));
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    assert_eq!(threads(), Vec::<String>::new());
    drop((held, instance));
}
