//! The client is struck: the server forgets it in time, keeps nothing of it, and serves the next.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::stages::{Case, all, done, each, each_path, ends_well, server, some, told};
use crate::support::{LONG, Process, TIMEOUT, in_time, run};

/// A run of which every byte is verified.
#[track_caller]
pub(crate) fn healthy(address: &str, path: &str) {
    let parts = ["bw", address, "--json", "--path", path, "--timeout", "60"];
    let ended = run(&[&parts[..], &["--size", "4K", "--blocks", "16", "-n", "4"]].concat());
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let report = ended.json();
    let rows = report["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 2, "{report}");
    for row in rows {
        assert_eq!(row["path"], path, "{row}");
        assert_eq!(row["verified_bytes"], 4 * 16 * 4096, "{row}");
    }
}

/// Descriptors, threads and mappings of memory files.
fn holds(server: &Process) -> [usize; 3] {
    let fds = std::fs::read_dir(format!("/proc/{}/fd", server.pid())).expect("it runs");
    for link in fds
        .flatten()
        .filter_map(|fd| std::fs::read_link(fd.path()).ok())
    {
        // No file that has a name, which would stay when a process is killed.
        let link = link.display().to_string();
        let nameless = ["socket:", "pipe:", "anon_inode:", "/memfd:", "/dev/null"];
        assert!(nameless.iter().any(|kind| link.starts_with(kind)), "{link}");
    }
    let count = |what| {
        let entries = std::fs::read_dir(format!("/proc/{}/{what}", server.pid()));
        entries.expect("it runs").count()
    };
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", server.pid()));
    let memory = maps.expect("it runs").matches("/memfd:").count();
    [count("fd"), count("task"), memory]
}

/// What a server holds that serves nobody: once it has held the same for a while.
pub(crate) fn at_rest(server: &Process) -> [usize; 3] {
    let mut last = holds(server);
    let mut since = Instant::now();
    while since.elapsed() < Duration::from_millis(300) {
        std::thread::sleep(Duration::from_millis(10));
        let now = holds(server);
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    last
}

/// Waits until a server holds no more of anything than it did.
#[track_caller]
pub(crate) fn reaches(server: &Process, before: [usize; 3]) {
    let until = Instant::now() + LONG;
    loop {
        let now = holds(server);
        if now.iter().zip(&before).all(|(now, before)| now <= before) {
            return;
        }
        assert!(Instant::now() < until, "{before:?} became {now:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Strikes clients of one server a path; it has nothing more at the end than before.
fn struck(signal: Signal, cases: &[Case], at_once: usize) {
    each_path(|path| {
        let cases: Vec<Case> = cases.iter().copied().filter(|c| c.path == path).collect();
        let (server, address) = server("127.0.0.1:0");
        // What it makes once and keeps, it has afterwards.
        healthy(&address, path);
        let before = at_rest(&server);
        each(&cases, at_once, |case| {
            let (tap, client) = case.reach(&address);
            client.signal(signal);
            if signal != Signal::SIGSTOP {
                tap.let_go();
                let ended = client.end();
                if !done(&ended, case) {
                    assert_eq!((ended.code, ended.stdout.as_str()), (None, ""), "{case:?}");
                }
                healthy(&address, path);
                return;
            }
            tap.let_go();
            healthy(&address, path);
            std::thread::sleep(TIMEOUT * 2);
            client.signal(Signal::SIGCONT);
            let begun = Instant::now();
            let ended = client.end();
            in_time(begun, (case, &ended));
            told(&ended, case, &tap.address);
        });
        let begun = Instant::now();
        reaches(&server, before);
        in_time(begun, path);
        server.signal(Signal::SIGTERM);
        ends_well(server);
    });
}

#[test]
fn killed() {
    // Over twenty of each server's clients.
    struck(Signal::SIGKILL, &[all(), some()].concat(), 3);
}

#[test]
fn ended() {
    struck(Signal::SIGTERM, &some(), 3);
}

#[test]
fn stopped_for_longer_than_the_timeout() {
    struck(Signal::SIGSTOP, &some(), 6);
}
