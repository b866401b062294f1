//! `kvxfer bw` and `ping` between two network namespaces: over a link that loses, that is cut and
//! mended, and to a host that refuses, cannot be reached, falls silent or dies.

#[path = "../../kvxfer/tests/support/namespaces.rs"]
mod namespaces;
mod support;

use std::process::Command;
use std::time::{Duration, Instant};

use namespaces::{Far, THERE, between};
use nix::sys::signal::Signal;
use support::{
    Ended, Process, TIMEOUT_TEXT, command, endless_pings, in_time, ping_line, run, spawn, start,
    whole,
};

/// A server on the far host.
fn serve(far: &Far) -> (Process, String) {
    let port = format!("{THERE}:0");
    let args = ["serve", "--listen", &port, "--allow-unauthenticated"];
    let served = command(&[&args[..], &["--timeout", TIMEOUT_TEXT]].concat());
    let mut inside = Command::new("ip");
    inside.args(["netns", "exec", far.name()]);
    // It becomes the program that it is to run, so the process is still our child.
    inside.arg(served.get_program()).args(served.get_args());
    for (name, _) in served.get_envs() {
        inside.env_remove(name);
    }
    let server = spawn(&mut inside);
    let address = server.address();
    (server, address)
}

fn bw<'a>(address: &'a str, rest: &[&'a str]) -> Vec<&'a str> {
    let args = ["bw", address, "--json", "--allow-unauthenticated"];
    [&args, rest].concat()
}

/// A run of which every byte is verified, over the way that leads to another host.
#[track_caller]
fn verified(ended: &Ended, rows: usize) {
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let report = ended.json();
    let all = report["rows"].as_array().expect("rows");
    assert_eq!(all.len(), rows, "{report}");
    for row in all {
        assert_eq!(row["path"], "tcp", "{row}");
        let bytes = row["bytes"].as_u64().expect("bytes");
        assert_eq!(row["verified_bytes"], bytes * 4, "{row}");
    }
}

#[track_caller]
fn works(address: &str) {
    let rest = [
        "--size",
        "4K",
        "--blocks",
        "16",
        "-n",
        "4",
        "--timeout",
        "60",
    ];
    verified(&run(&bw(address, &rest)), 2);
}

fn pings(address: &str) -> Process {
    endless_pings(address, &["--allow-unauthenticated"])
}

#[test]
fn a_link_that_loses() {
    between("a_link_that_loses", |far| {
        let (_server, address) = serve(far);
        far.lose(2);
        let rest = [
            "--size",
            "16K",
            "--blocks",
            "64",
            "-n",
            "8",
            "--timeout",
            "60",
        ];
        verified(&run(&bw(&address, &rest)), 2);
        // A ping whose packet was lost is late, and none is lost.
        let args = [
            "ping",
            &address,
            "--allow-unauthenticated",
            "--json",
            "-W",
            "60",
        ];
        let ended = run(&[&args[..], &["-c", "50", "-i", "10ms"]].concat());
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
        assert_eq!(ended.json()["answered"], 50);
    });
}

#[test]
fn a_link_that_is_cut() {
    between("a_link_that_is_cut", |far| {
        let (_server, address) = serve(far);
        far.slow("200mbit");
        // For less than the timeout: TCP sends again what was lost.
        let rest = ["--size", "64K", "--blocks", "64", "-n", "8", "--op", "read"];
        let client = start(&bw(&address, &rest));
        std::thread::sleep(Duration::from_millis(700));
        Far::link("down");
        std::thread::sleep(Duration::from_millis(300));
        Far::link("up");
        verified(&client.end(), 1);
        // For longer, in both directions of the data.
        for op in ["read", "write"] {
            let rest = ["--size", "64K", "--blocks", "64", "-D", "600", "--op", op];
            let client = start(&bw(
                &address,
                &[&rest[..], &["--timeout", TIMEOUT_TEXT]].concat(),
            ));
            std::thread::sleep(Duration::from_millis(1500));
            let begun = Instant::now();
            Far::link("down");
            let ended = client.end();
            in_time(begun, &ended);
            ended.failed(3, &[&address, "evidence: ", "fix: ", "stopped"]);
            assert_eq!(ended.stdout, "");
            Far::link("up");
            works(&address);
        }
    });
}

#[test]
fn pings_over_a_link_that_is_cut() {
    between("pings_over_a_link_that_is_cut", |far| {
        let (_server, address) = serve(far);
        let client = pings(&address);
        Far::link("down");
        ping_line(&client, |line| line.contains("stalled"));
        Far::link("up");
        ping_line(&client, whole);
        Far::link("down");
        let begun = Instant::now();
        let ended = client.end();
        in_time(begun, &ended);
        let said = [
            &address,
            "stalled: the connection stands",
            "evidence: ",
            "fix: ",
        ];
        ended.failed(3, &said);
        let summary = ended.stdout.split_once(" ping ---\n").expect("a summary").1;
        assert!(!summary.contains(" 0 % lost"), "{ended:?}");
        Far::link("up");
        drop(pings(&address));
    });
}

#[test]
fn who_does_not_answer_is_told_apart() {
    between("who_does_not_answer_is_told_apart", |far| {
        let (server, address) = serve(far);
        let try_both = |said: &[&str]| {
            let bw = bw(&address, &["--timeout", TIMEOUT_TEXT]);
            let ping = ["ping", &address, "--allow-unauthenticated", "--json"];
            for args in [bw, [&ping[..], &["--timeout", TIMEOUT_TEXT]].concat()] {
                let begun = Instant::now();
                let ended = run(&args);
                in_time(begun, &ended);
                ended.failed(3, &[&[&address[..], "evidence: ", "fix: "], said].concat());
                assert_eq!(ended.stdout, "");
            }
        };
        // Its packets are dropped: by a firewall, or because it is down.
        far.lose(100);
        try_both(&["cannot be reached", "timed out", "firewall"]);
        far.lose_no_more();
        // There is no way to it.
        Far::link("down");
        try_both(&["cannot be reached", "unreachable", "network"]);
        Far::link("up");
        // It is there, and stopped.
        server.signal(Signal::SIGSTOP);
        try_both(&["no answer in time", "stopped"]);
        server.signal(Signal::SIGCONT);
        // It dies while it is pinged.
        let client = pings(&address);
        server.signal(Signal::SIGKILL);
        client
            .end()
            .failed(3, &[&address, "died", "start it again"]);
        // Its host is there, and nobody listens.
        try_both(&["cannot be reached", "refused", "kvxfer serve"]);
    });
}
