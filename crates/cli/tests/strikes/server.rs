//! The server is struck: the client says so in time, and a server that lives again serves.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::client::healthy;
use crate::stages::{Case, Stage, all, cpu, each, ends_well, server, some, told};
use crate::support::{Ended, TIMEOUT, children_of, in_time, run, runs, start, wait_until};

/// Strikes the server in each case; it is another one each time.
fn struck(signal: Signal, cases: &[Case], at_once: usize) {
    each(cases, at_once, |case| {
        let (server, address) = server("127.0.0.1:0");
        let (tap, client) = case.reach(&address);
        let begun = Instant::now();
        server.signal(signal);
        tap.let_go();
        let ended = client.end();
        in_time(begun, (case, &ended));
        told(&ended, case, &tap.address);
        match signal {
            Signal::SIGTERM => {
                ends_well(server);
                in_time(begun, case);
            }
            Signal::SIGKILL => {
                assert_eq!(server.end().code, None);
                // The next life has the address at once.
                let (_server, _) = self::server(&address);
                healthy(&address, case.path);
            }
            _ => {
                server.signal(Signal::SIGCONT);
                healthy(&address, case.path);
            }
        }
    });
}

#[test]
fn killed() {
    struck(Signal::SIGKILL, &all(), 3);
}

#[test]
fn stopped_for_longer_than_the_timeout() {
    struck(Signal::SIGSTOP, &some(), 6);
}

#[test]
fn ended() {
    struck(Signal::SIGTERM, &some(), 3);
}

#[test]
fn stopped_for_less_than_the_timeout() {
    let stages = [Stage::BringUp, Stage::Verifying, Stage::Ending];
    let cases: Vec<Case> = all()
        .into_iter()
        .filter(|c| stages.contains(&c.stage))
        .collect();
    each(&cases, 6, |case| {
        let (server, address) = server("127.0.0.1:0");
        let (tap, client) = case.reach(&address);
        server.signal(Signal::SIGSTOP);
        tap.let_go();
        std::thread::sleep(TIMEOUT / 5);
        server.signal(Signal::SIGCONT);
        let ended = client.end();
        assert_eq!(
            (ended.code, ended.stderr.as_str()),
            (Some(0), ""),
            "{case:?}"
        );
        let _: serde_json::Value = ended.json();
    });
}

#[test]
fn stopped_before_anybody_connects() {
    let (server, address) = server("127.0.0.1:0");
    server.signal(Signal::SIGSTOP);
    let begun = Instant::now();
    let args = ["bw", &address, "--json", "--timeout", "1500ms"];
    let ended = run(&args);
    in_time(begun, &ended);
    ended.failed(3, &[&address, "no answer in time", "evidence: ", "fix: "]);
    assert_eq!(ended.stdout, "");
    server.signal(Signal::SIGCONT);
    healthy(&address, "arena");
    server.signal(Signal::SIGTERM);
    assert_eq!(server.end().code, Some(0));
    // And when it has gone.
    run(&args).failed(3, &[&address, "cannot be reached", "refused", "fix: "]);
    assert!(begun.elapsed() < Duration::from_secs(60));
}

/// Strikes the target that a client has started for itself, which is another server.
fn own_target(signal: Signal) -> Ended {
    let args = [
        "bw", "--size", "4K", "--blocks", "16", "-D", "600", "--json",
    ];
    let client = start(&[&args[..], &["--op", "write", "--timeout", "1500ms"]].concat());
    let mut targets = Vec::new();
    wait_until("a target that works", || {
        targets = children_of(client.pid());
        matches!(*targets, [target] if cpu(target) > Duration::from_millis(300))
    });
    let begun = Instant::now();
    let target = nix::unistd::Pid::from_raw(targets[0]);
    nix::sys::signal::kill(target, signal).expect("it runs");
    let ended = client.end();
    in_time(begun, &ended);
    ended.failed(3, &["the target process", "evidence: ", "fix: "]);
    assert_eq!(ended.stdout, "");
    assert!(!runs(target.as_raw()), "{signal} left it");
    ended
}

#[test]
fn a_target_of_its_own() {
    own_target(Signal::SIGKILL).failed(3, &["SIGKILL"]);
    own_target(Signal::SIGSTOP);
    own_target(Signal::SIGTERM);
}
