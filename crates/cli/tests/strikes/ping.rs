//! Pings of which one side is struck.

use std::time::{Duration, Instant};

use kvxfer::wire::{MessageKind, frame_kind};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::client::{at_rest, reaches};
use crate::stages::{each_path, ends_well, server};
use crate::support::{Process, TIMEOUT, endless_pings, in_time, ping_line, run, start, whole};
use crate::tap::{Mark, Tap};

/// Pings that are all answered.
#[track_caller]
fn answered(address: &str, path: &str) -> Value {
    let args = ["ping", address, "--json", "--path", path, "-c", "3"];
    let ended = run(&[&args[..], &["-i", "1ms", "-W", "60"]].concat());
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let report = ended.json();
    assert_eq!(
        (&report["sent"], &report["answered"]),
        (&3.into(), &3.into())
    );
    report
}

fn pings(address: &str, path: &str) -> Process {
    endless_pings(address, &["--path", path])
}

#[test]
fn a_server_that_goes_on_is_answered_again() {
    each_path(|path| {
        let (server, address) = server("127.0.0.1:0");
        let client = pings(&address, path);
        server.signal(Signal::SIGSTOP);
        ping_line(&client, |line| line.contains("stalled"));
        server.signal(Signal::SIGCONT);
        ping_line(&client, whole);
        client.signal(Signal::SIGINT);
        let ended = client.end();
        ended.failed(3, &["were lost", &address, "evidence: ", "fix: "]);
        let summary = ended.stdout.split_once(" ping ---\n").expect("a summary").1;
        let first = summary.lines().next().unwrap_or_default();
        assert!(
            first.contains(" % lost") && !first.contains(" 0 % lost"),
            "{first}"
        );
    });
}

#[test]
fn a_server_that_is_stopped_for_long_is_given_up() {
    each_path(|path| {
        let (server, address) = server("127.0.0.1:0");
        let client = pings(&address, path);
        let begun = Instant::now();
        server.signal(Signal::SIGSTOP);
        let ended = client.end();
        in_time(begun, &ended);
        ended.failed(
            3,
            &["stalled", &address, "evidence: ", "fix: ", "`ps -o stat`"],
        );
        assert!(ended.stdout.contains(" ping ---\n"), "{ended:?}");
        server.signal(Signal::SIGCONT);
        answered(&address, path);
    });
}

#[test]
fn a_restarted_server_is_another_life() {
    each_path(|path| {
        let signal = match path {
            "arena" => Signal::SIGTERM,
            _ => Signal::SIGKILL,
        };
        let (first, address) = server("127.0.0.1:0");
        let before = answered(&address, path);
        let client = pings(&address, path);
        first.signal(signal);
        let ended = client.end();
        ended.failed(3, &["evidence: ", "fix: ", "start it again"]);
        assert!(ended.stdout.contains(" ping ---\n"), "{ended:?}");
        first.end();
        run(&["ping", &address]).failed(3, &["cannot be reached", "refused", "fix: "]);
        let (_second, _) = server(&address);
        let after = answered(&address, path);
        assert_ne!(before["peer"]["generation"], after["peer"]["generation"]);
    });
}

/// Ping's way up, each stage as the frame that is held.
fn stages() -> [Mark; 3] {
    let hello = Mark {
        kind: frame_kind::HELLO,
        says: "",
        nth: 1,
    };
    let of = |kind| Mark::message(kind, "", 1);
    [hello, of(MessageKind::QpOffer), of(MessageKind::Ready)]
}

#[test]
fn a_server_that_is_struck_while_a_ping_connects() {
    each_path(|path| {
        for mark in stages() {
            for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGSTOP] {
                let (server, address) = server("127.0.0.1:0");
                let tap = Tap::new(&address, mark);
                let args = ["ping", &tap.address, "--json", "--path", path, "-c", "0"];
                let client = start(&[&args[..], &["--timeout", "700ms"]].concat());
                tap.held();
                let begun = Instant::now();
                server.signal(signal);
                tap.let_go();
                let ended = client.end();
                in_time(begun, (path, mark, signal, &ended));
                ended.failed(3, &[&tap.address, "kvxfer: ", "fix: "]);
                if !ended.stdout.is_empty() {
                    // The session stood for a moment.
                    ended.json();
                }
                if signal == Signal::SIGSTOP {
                    server.signal(Signal::SIGCONT);
                    answered(&address, path);
                }
            }
        }
    });
}

#[test]
fn a_server_forgets_pingers_that_are_struck() {
    let signals = [
        Signal::SIGKILL,
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGSTOP,
    ];
    each_path(|path| {
        let (server, address) = server("127.0.0.1:0");
        answered(&address, path);
        let before = at_rest(&server);
        let mut stopped = Vec::new();
        for at in 0..20 {
            let signal = signals[at % signals.len()];
            let client = pings(&address, path);
            client.signal(signal);
            match signal {
                Signal::SIGSTOP => stopped.push(client),
                // Asked to end, it ends well.
                Signal::SIGKILL => assert_eq!(client.end().code, None),
                _ => assert_eq!(client.end().code, Some(0)),
            }
        }
        answered(&address, path);
        // Nothing is kept for who is silent, either.
        let begun = Instant::now();
        reaches(&server, before);
        in_time(begun, path);
        std::thread::sleep(TIMEOUT + Duration::from_millis(500));
        for client in stopped {
            client.signal(Signal::SIGCONT);
            let begun = Instant::now();
            let ended = client.end();
            in_time(begun, &ended);
            ended.failed(3, &[&address, "evidence: ", "fix: "]);
            assert!(ended.stdout.contains(" ping ---\n"), "{ended:?}");
        }
        answered(&address, path);
        server.signal(Signal::SIGTERM);
        ends_well(server);
    });
}
