//! Connections that prove nothing: however many there are, few are served at a time, each for a
//! bounded time, and who belongs here still gets in. Alone in its file, for it counts the threads of
//! the whole process.

mod support;

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvxfer::config::{KvRole, PathKind};
use kvxfer::wire::{ConnectionKind, Preamble};
use support::{LONG, recipe, until};

/// What the engine serves at a time, and with it the connections of the peers that belong here.
const PLACES: usize = 128;
const SERVED: usize = PLACES + 4;
const FLOOD: usize = 300;

fn links() -> usize {
    let tasks = fs::read_dir("/proc/self/task").expect("procfs");
    tasks
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .filter(|name| name.trim() == "kvx-link")
        .count()
}

#[test]
fn a_flood_of_strangers() {
    let producer = recipe(KvRole::Producer, PathKind::Arena, 4096, 8)
        // Not what ends them here.
        .with(|config| config.connect_timeout = Duration::from_secs(300))
        .node();
    let address = producer.engine.listen("127.0.0.1:0").expect("a port");
    // They begin as a peer does and then say nothing, and there are always new ones.
    let preamble = Preamble {
        kind: ConnectionKind::Control,
    }
    .encode();
    let over = Arc::new(AtomicBool::new(false));
    let flood = {
        let over = Arc::clone(&over);
        std::thread::spawn(move || {
            let mut strangers = std::collections::VecDeque::new();
            let mut all = 0;
            while !over.load(Ordering::SeqCst) {
                let timeout = Duration::from_millis(200);
                if let Ok(mut stranger) = TcpStream::connect_timeout(&address, timeout) {
                    all += 1;
                    // It may have been cut off already.
                    let _ = stranger.write_all(&preamble);
                    strangers.push_back(stranger);
                }
                if strangers.len() > FLOOD {
                    strangers.pop_front();
                }
                if all > FLOOD {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        })
    };
    until("as many as are served", || links() >= PLACES);
    let consumer = recipe(KvRole::Consumer, PathKind::Arena, 4096, 8)
        .with(|config| config.connect_timeout = LONG)
        .node();
    let mut most = 0;
    for _ in 0..3 {
        // A stranger's connection may stand before it in the line; and it may itself be cut off for
        // being slow, on a busy machine.
        until("a session", || {
            most = most.max(links());
            consumer.engine.connect(&address.to_string(), LONG).is_ok()
        });
    }
    assert!(most <= SERVED, "{most} connections were served at a time");
    over.store(true, Ordering::SeqCst);
    flood.join().expect("no panic");
    // Nobody is left to want their places, and the listener goes on.
    consumer
        .engine
        .connect(&address.to_string(), LONG)
        .expect("a session");
}
