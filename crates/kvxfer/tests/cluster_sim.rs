//! Histories of whole engines under faults of every kind.
//!
//! `KVXFER_SIM_SEED=n` replays one history and tells it; `KVXFER_SIM_HISTORIES=n` sets how many are
//! tried.

mod cluster;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use cluster::{Bug, Invariant, Summary, replay, run};

/// Histories of a plain run.
const HISTORIES: u64 = 20_000;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

fn tell(seed: u64, bug: Bug) -> String {
    let (_, told) = replay(seed, bug);
    format!("KVXFER_SIM_SEED={seed}\n{}", told.join("\n"))
}

/// Runs the seeds from 0 on, on all cores. The seed that fails is told.
fn run_all(count: u64) -> Summary {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicU64::new(0);
    let all = Mutex::new(Summary::default());
    let failed = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut sum = Summary::default();
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= count {
                        break;
                    }
                    match run(seed, Bug::None) {
                        Ok(s) => sum.merge(&s),
                        Err(_) => {
                            failed.lock().expect("no thread panics").get_or_insert(seed);
                            next.store(count, Ordering::Relaxed);
                        }
                    }
                }
                all.lock().expect("no thread panics").merge(&sum);
            });
        }
    });
    if let Some(seed) = failed.into_inner().expect("no thread panics") {
        panic!("{}", tell(seed, Bug::None));
    }
    all.into_inner().expect("no thread panics")
}

#[test]
fn every_history_keeps_the_promises() {
    if let Some(seed) = number("KVXFER_SIM_SEED") {
        let (result, told) = replay(seed, Bug::None);
        println!("{}", told.join("\n"));
        assert!(result.is_ok(), "KVXFER_SIM_SEED={seed}: {result:?}");
        return;
    }
    let count = number("KVXFER_SIM_HISTORIES").unwrap_or(HISTORIES);
    let start = Instant::now();
    let sum = run_all(count);
    println!(
        "{count} histories in {:.1} s:",
        start.elapsed().as_secs_f64()
    );
    for (name, n) in &sum.counts {
        println!("{n:>12}  {name}");
    }
    if count >= 20_000 {
        // A model in which something never happens would prove nothing of it.
        for name in MUST_HAPPEN {
            let n = sum.of(name);
            assert!(n >= 10, "\"{name}\" has happened {n} times");
        }
    }
}

#[test]
fn a_seed_names_its_history() {
    for seed in 0..60 {
        assert_eq!(run(seed, Bug::None), run(seed, Bug::None), "seed {seed}");
    }
}

/// What every full run must have seen, each kind of fault and of end.
const MUST_HAPPEN: &[&str] = &[
    "fault: killed",
    "fault: host lost",
    "fault: restarted",
    "fault: shut down",
    "fault: stopped",
    "fault: continued",
    "fault: connection cut",
    "fault: connection silent",
    "fault: rail down",
    "fault: rail up again",
    "fault: requests held up",
    "fault: answers lost",
    "fault: queue pair in error, nobody named",
    "fault: all queue pairs of a rail in error",
    "fault: post refused",
    "fault: clock jumps",
    "fault: clock runs too fast or slow",
    "completion: bad response",
    "completion: device fatal",
    "completion: local access",
    "completion: local length",
    "completion: local protection",
    "completion: local queue pair operation",
    "completion: memory window bind",
    "completion: receiver-not-ready retries exceeded",
    "completion: remote aborted",
    "completion: remote access",
    "completion: remote invalid request",
    "completion: remote operation",
    "completion: response timeout",
    "completion: retries exceeded",
    "completion: unnamed status",
    "path: arena",
    "path: process_vm",
    "path: tcp",
    "path: rdma",
    "pull: received",
    "pull: failed",
    "pull: given up",
    "pull: tried again",
    "push: sent",
    "push: failed",
    "push: given up",
    "push refused",
    "push revoked",
    "push done: too late",
    "expectation: received",
    "expectation: failed",
    "expectation: cancelled",
    "offer: read by all",
    "offer: retracted",
    "offer: expired",
    "release: late",
    "memory: quarantined",
    "memory: released later",
    "memory: expected blocks quarantined",
    "memory: expected blocks released later",
    "producer cut off",
    "drained by force",
    "operations posted again",
    "echoes",
    "notice: on the data plane",
    "notice: again by the control connection",
    "notice: for a rail that is down",
    "notice: on another worker",
    "notice: over one rail of two",
    "notice: told again",
    "card: written late",
    "lane: rebuilt",
    "lane: not rebuilt",
    "lane: the last, waited for",
    "lane: the last, waited for in vain",
    "card: in memory by a receive",
    "card: in memory when destroyed",
    "event: peer up",
    "event: peer down",
    "event: peer restarted",
    "event: peer stalled",
    "event: peer heard again",
    "session: not set up",
    "cause: completion",
    "cause: post",
    "cause: lane failed",
    "cause: lane reset",
    "cause: peer dead",
    "cause: peer stalled",
    "cause: peer restarted",
    "cause: peer closed",
    "cause: peer unreachable",
    "cause: deadline passed",
    "cause: cancelled",
    "cause: lease expired",
    "cause: aborted",
    "cause: revoked",
    "cause: refused",
    "cause: shutting down",
];

/// Seeds among which a planted fault must be found.
const PLANTED_SEEDS: u64 = 20_000;

/// Every planted fault is found, and as what it is.
#[test]
fn planted_faults_are_found() {
    use Invariant as I;
    let planted = [
        (Bug::OutcomeTwice, I::EndsOnce),
        (Bug::ReleaseLost, I::Converges),
        (Bug::ReleasedTwice, I::EndsOnce),
        (Bug::DeafWorker, I::Deadline),
        (Bug::DeafBooks, I::Deadline),
        (Bug::DrainTooSoon, I::Memory),
        (Bug::ClosedTooSoon, I::Memory),
        (Bug::ResetTooSoon, I::Memory),
        (Bug::DoubtIgnored, I::Memory),
        (Bug::SettledTooSoon, I::Memory),
        (Bug::OneRailTells, I::Bytes),
        (Bug::SpeaksTooSoon, I::Bytes),
        (Bug::SuccessorForgotten, I::Memory),
        (Bug::FlipTooLate, I::Bytes),
        (Bug::CheckBlind, I::Bytes),
        (Bug::WrongBytes, I::Bytes),
        (Bug::DoneTooSoon, I::Notice),
        (Bug::NoticeTwice, I::Notice),
        (Bug::FlushAsError, I::FirstCause),
        (Bug::LastCause, I::FirstCause),
        (Bug::TooManyCredits, I::Credits),
        (Bug::CompletionLost, I::Converges),
        (Bug::FavouritePeer, I::Starvation),
        (Bug::OldTicket, I::Generation),
        (Bug::ForgedTicket, I::Session),
        (Bug::NoRedial, I::Converges),
        (Bug::CommandLost, I::Converges),
    ];
    let mut missed = Vec::new();
    for (bug, invariant) in planted {
        let mut first = None;
        let mut others = std::collections::BTreeMap::new();
        for seed in 0..PLANTED_SEEDS {
            match run(seed, bug) {
                Err(v) if v.invariant == invariant => {
                    first = Some(seed);
                    break;
                }
                Err(v) => *others.entry(v.invariant).or_insert(0) += 1,
                Ok(_) => {}
            }
        }
        println!("{bug:?}: {invariant:?} at seed {first:?}; before it {others:?}");
        if first.is_none() {
            missed.push((bug, invariant));
        }
    }
    assert!(missed.is_empty(), "not found: {missed:?}");
}
