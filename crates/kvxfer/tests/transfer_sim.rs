//! Histories of the transfer machines under a model of devices, peers and engines.
//!
//! `KVXFER_SIM_SEED=n` replays one history; `KVXFER_SIM_HISTORIES=n` sets how many are tried.

mod sim;

use sim::{Bug, Summary, run};

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is not a number")),
    )
}

#[test]
fn every_history_keeps_the_promises() {
    let (first, count) = match number("KVXFER_SIM_SEED") {
        Some(seed) => (seed, 1),
        None => (0, number("KVXFER_SIM_HISTORIES").unwrap_or(3000)),
    };
    let mut all = Summary::default();
    for seed in first..first + count {
        match run(seed, Bug::None) {
            Ok(s) => {
                all.steps += s.steps;
                all.done += s.done;
                all.got += s.got;
                all.failed += s.failed;
                all.cancelled += s.cancelled;
                all.quarantined += s.quarantined;
                all.reset += s.reset;
                all.forced += s.forced;
                all.replayed += s.replayed;
                all.late += s.late;
                all.stale += s.stale;
                all.echoes += s.echoes;
                all.executed += s.executed;
            }
            Err(why) => panic!("KVXFER_SIM_SEED={seed}: {why}"),
        }
    }
    println!("{count} histories: {all:?}");
    if count >= 1000 {
        // A model in which nothing ever happens would prove nothing.
        let Summary {
            done,
            got,
            failed,
            cancelled,
            quarantined,
            reset,
            forced,
            replayed,
            late,
            stale,
            echoes,
            ..
        } = all;
        for (what, n) in [
            ("done", done),
            ("gets", got),
            ("failed", failed),
            ("cancelled", cancelled),
            ("quarantined", quarantined),
            ("lanes reset for what does not drain", reset),
            ("forced drains", forced),
            ("replayed operations", replayed),
            ("late writes", late),
            ("stale completions", stale),
            ("echoes", echoes),
        ] {
            assert!(n > 100, "only {n} {what} in {count} histories");
        }
    }
}

#[test]
fn a_seed_names_its_history() {
    for seed in 0..20 {
        assert_eq!(run(seed, Bug::None), run(seed, Bug::None), "seed {seed}");
    }
}

/// Every planted fault must be found, by the check that is there for it.
#[test]
fn planted_faults_are_found() {
    let planted = [
        (Bug::DrainTooSoon, "released"),
        (Bug::QuiescentTooSoon, "released"),
        (Bug::OutcomeTwice, "a second outcome"),
        (Bug::ReleasedTwice, "released twice"),
        (Bug::ReleaseLost, "never released"),
        (Bug::DeafClock, "no outcome by its deadline"),
        (Bug::ConfirmsTooMuch, "done"),
        (Bug::LosesSuccess, "not over after"),
        (Bug::FlushAsError, "reported"),
        (Bug::TooManyCredits, "send queue overrun"),
        (Bug::WrongBytes, "done with wrong bytes"),
        (Bug::LeaseOfNobody, "done without a live lease of a job"),
        (Bug::SettlesTooSoon, "touches memory that was released"),
    ];
    for (bug, expected) in planted {
        let found = (0..2000).any(|seed| run(seed, bug).is_err_and(|why| why.contains(expected)));
        assert!(found, "{bug:?} was never found as {expected:?}");
    }
}
