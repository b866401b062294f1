use super::*;
use crate::transfer::testing::even;
use crate::transfer::{DrainToken, JobError, MemoryState};

const PEER: PeerKey = PeerKey(1);
const T1: TransferId = TransferId(1);

fn ms(n: u64) -> Time {
    Time::from_millis(n)
}

fn ledger() -> Transfers {
    Transfers::new(TransfersConfig {
        jobs_per_peer: 2,
        ..TransfersConfig::default()
    })
}

fn pull(id: TransferId, ops: u64) -> Spec {
    let kind = Kind::Pull {
        source: even(ops, 10),
        check_lease: true,
        release: true,
    };
    Spec {
        id,
        peer: PEER,
        kind,
        verify: false,
        deadline: ms(1000),
        workers: 2,
    }
}

fn push(id: TransferId) -> Spec {
    Spec {
        id,
        peer: PEER,
        kind: Kind::Push,
        verify: false,
        deadline: ms(1000),
        workers: 1,
    }
}

/// The outputs, in words short enough to compare.
fn said(t: &mut Transfers) -> Vec<String> {
    let mut said = Vec::new();
    while let Some(output) = t.poll_output() {
        said.push(match output {
            Output::StartJob(job) => format!("start {}", job.id.0),
            Output::StopJob { job, .. } => format!("stop {}", job.0),
            Output::Verify { id, .. } => format!("verify {}", id.0),
            Output::CheckLease { id, .. } => format!("lease {}", id.0),
            Output::CheckJob { id, job, .. } => format!("lease {} of {}", job.0, id.0),
            Output::SendNotice { id, notice, .. } => match notice {
                Notice::PushDone { wrote } => format!("notice {} PushDone {wrote}", id.0),
                notice => format!("notice {} {notice:?}", id.0),
            },
            Output::ResetLanes { id, jobs, .. } => {
                let jobs: Vec<u64> = jobs.iter().map(|job| job.0).collect();
                format!("reset {} {jobs:?}", id.0)
            }
            Output::ForceDrain { token, .. } => format!("drain {}", token.0),
            Output::Released { id } => format!("released {}", id.0),
            Output::Outcome { id, outcome } => match outcome {
                Outcome::Done { bytes } => format!("done {} {bytes}", id.0),
                Outcome::Failed { cause, memory, .. } => {
                    format!("failed {} {cause} {memory:?}", id.0)
                }
                Outcome::Cancelled { memory, .. } => format!("cancelled {} {memory:?}", id.0),
            },
        });
    }
    said
}

fn report(job: u64, transfer: TransferId, ops_done: u64, quiescent: bool) -> JobReport {
    JobReport {
        job: JobId(job),
        transfer,
        owner: 0,
        ops_done,
        bytes_done: ops_done * 10,
        rails: RailSet::EMPTY,
        error: None,
        in_doubt: false,
        doubts: 0,
        quiescent,
    }
}

#[test]
fn a_pull_is_done_after_its_lease_was_confirmed() {
    let mut t = ledger();
    t.submit(ms(0), pull(T1, 4)).expect("taken");
    assert_eq!(said(&mut t), ["start 0"]);
    t.job_report(ms(1), &report(0, T1, 1, true));
    assert!(said(&mut t).is_empty());
    t.job_report(ms(2), &report(0, T1, 3, false));
    // Stopped, for the other scheduler has not said that it is through.
    assert_eq!(said(&mut t), ["stop 0", "lease 1"]);
    t.lease_answer(ms(3), T1, LeaseAnswer::Live);
    assert_eq!(said(&mut t), ["notice 1 Release", "done 1 40"]);
    assert_eq!((t.live(), t.next_timeout()), (0, None));
    // The second worker notices later that there is nothing left.
    t.job_report(ms(4), &report(0, T1, 0, true));
    t.lease_answer(
        ms(4),
        T1,
        LeaseAnswer::Gone {
            cause: Cause::LeaseExpired,
        },
    );
    assert!(said(&mut t).is_empty());
}

fn gets(id: TransferId) -> Spec {
    Spec {
        kind: Kind::Gets { release: true },
        ..push(id)
    }
}

#[test]
fn gets_count_one_by_one_when_their_lease_was_live() {
    let mut t = ledger();
    t.submit(ms(0), gets(T1)).expect("taken");
    let first = t.add_job(ms(0), T1, even(4, 10)).expect("open");
    let second = t.add_job(ms(0), T1, even(2, 10)).expect("open");
    assert_eq!(said(&mut t), ["start 0", "start 1"]);
    t.job_report(ms(1), &report(1, T1, 2, true));
    assert_eq!(said(&mut t), ["lease 1 of 1"]);
    assert!(!t.counts(T1, second) && !t.counts(T1, first));
    // Of one whose data is not there nothing is asked, so nothing is taken.
    t.job_checked(ms(1), T1, first, LeaseAnswer::Live);
    t.job_checked(ms(1), T1, second, LeaseAnswer::Live);
    assert!(t.counts(T1, second) && !t.counts(T1, first));
    t.commit(ms(2), T1).expect("open");
    t.job_report(ms(3), &report(0, T1, 4, true));
    assert_eq!(said(&mut t), ["lease 0 of 1"]);
    t.job_checked(ms(4), T1, first, LeaseAnswer::Live);
    assert_eq!(said(&mut t), ["notice 1 Release", "done 1 60"]);
    t.job_checked(ms(4), T1, first, LeaseAnswer::Live);
    assert!(said(&mut t).is_empty());
}

#[test]
fn gets_whose_lease_is_gone_fail_and_count_for_nothing() {
    for late in [false, true] {
        let mut t = ledger();
        t.submit(ms(0), gets(T1)).expect("taken");
        let job = t.add_job(ms(0), T1, even(4, 10)).expect("open");
        t.job_report(ms(1), &report(0, T1, 4, true));
        assert_eq!(said(&mut t), ["start 0", "lease 0 of 1"]);
        if late {
            t.on_time(ms(1000));
            assert_eq!(said(&mut t), ["failed 1 deadline passed Released"]);
        } else {
            let cause = Cause::LeaseExpired;
            t.job_checked(ms(2), T1, job, LeaseAnswer::Gone { cause });
            let [failed] = &said(&mut t)[..] else {
                panic!("one outcome");
            };
            assert!(failed.starts_with("failed 1") && failed.ends_with("Released"));
        }
        assert!(!t.counts(T1, job));
        t.job_checked(ms(1001), T1, job, LeaseAnswer::Live);
        assert!(said(&mut t).is_empty());
        assert_eq!((t.live(), t.next_timeout()), (0, None));
    }
}

#[test]
fn checksums_come_after_the_data_and_before_the_lease() {
    let mut t = ledger();
    let spec = Spec {
        verify: true,
        ..pull(T1, 4)
    };
    t.submit(ms(0), spec).expect("taken");
    // Not yet.
    t.verified(ms(0), T1, Ok(()));
    assert_eq!(said(&mut t), ["start 0"]);
    for _ in 0..2 {
        t.job_report(ms(1), &report(0, T1, 2, true));
    }
    assert_eq!(said(&mut t), ["verify 1"]);
    t.lease_answer(ms(2), T1, LeaseAnswer::Live);
    assert!(said(&mut t).is_empty());
    t.verified(ms(2), T1, Ok(()));
    t.verified(ms(2), T1, Err(Cause::PeerDead));
    assert_eq!(said(&mut t), ["lease 1"]);
    t.lease_answer(ms(3), T1, LeaseAnswer::Live);
    assert_eq!(said(&mut t), ["notice 1 Release", "done 1 40"]);
}

#[test]
fn a_push_tells_its_checksums_before_its_end() {
    let mut t = ledger();
    let spec = Spec {
        verify: true,
        ..push(T1)
    };
    t.submit(ms(0), spec.clone()).expect("taken");
    t.add_job(ms(0), T1, even(4, 1)).expect("open");
    t.job_report(ms(1), &report(0, T1, 4, true));
    assert_eq!(said(&mut t), ["start 0"]);
    t.commit(ms(2), T1).expect("open");
    assert_eq!(said(&mut t), ["verify 1"]);
    t.verified(ms(3), T1, Ok(()));
    assert_eq!(said(&mut t), ["notice 1 PushDone {}", "done 1 4"]);
    // Without data there is nothing to compare.
    t.submit(ms(4), spec).expect("taken");
    t.commit(ms(4), T1).expect("open");
    assert_eq!(said(&mut t), ["notice 1 PushDone {}", "done 1 0"]);
}

#[test]
fn what_waits_for_checksums_ends_by_its_deadline() {
    for late in [false, true] {
        let mut t = ledger();
        let spec = Spec {
            verify: true,
            ..pull(T1, 4)
        };
        t.submit(ms(0), spec).expect("taken");
        for _ in 0..2 {
            t.job_report(ms(1), &report(0, T1, 2, true));
        }
        assert_eq!(said(&mut t), ["start 0", "verify 1"]);
        if late {
            t.on_time(ms(1000));
            assert_eq!(said(&mut t), ["failed 1 deadline passed Released"]);
            t.verified(ms(1001), T1, Ok(()));
        } else {
            t.verified(ms(2), T1, Err(Cause::PeerDead));
            assert_eq!(said(&mut t), ["failed 1 peer is dead Released"]);
        }
        assert!(said(&mut t).is_empty());
        assert_eq!((t.live(), t.next_timeout()), (0, None));
    }
}

#[test]
fn a_lost_lease_makes_all_blocks_invalid() {
    let mut t = ledger();
    t.submit(ms(0), pull(T1, 3)).expect("taken");
    t.job_report(ms(1), &report(0, T1, 3, true));
    t.lease_answer(
        ms(2),
        T1,
        LeaseAnswer::Gone {
            cause: Cause::LeaseExpired,
        },
    );
    let outcome = std::iter::from_fn(|| t.poll_output()).find_map(|o| match o {
        Output::Outcome { outcome, .. } => Some(outcome),
        _ => None,
    });
    let Some(Outcome::Failed {
        incomplete,
        memory,
        cause,
        at,
    }) = outcome
    else {
        panic!("{outcome:?}");
    };
    assert_eq!(incomplete.blocks(), [(0, 0), (0, 1), (0, 2)]);
    assert_eq!(
        (memory, cause, at),
        (MemoryState::Released, Cause::LeaseExpired, None)
    );
}

#[test]
fn nothing_to_move_is_done_at_once() {
    let mut t = ledger();
    t.submit(ms(0), pull(T1, 0)).expect("taken");
    assert_eq!(said(&mut t), ["notice 1 Release", "done 1 0"]);
    t.submit(ms(0), push(T1)).expect("the id is free again");
    t.add_job(ms(0), T1, even(0, 1)).expect("open");
    t.commit(ms(0), T1).expect("open");
    assert_eq!(said(&mut t), ["notice 1 PushDone {}", "done 1 0"]);
}

#[test]
fn a_push_is_done_when_committed_and_confirmed() {
    let mut t = ledger();
    t.submit(ms(0), push(T1)).expect("taken");
    for _ in 0..3 {
        t.add_job(ms(0), T1, even(2, 10)).expect("open");
    }
    assert_eq!(said(&mut t), ["start 0", "start 1"], "two at a time");
    t.job_report(ms(1), &report(0, T1, 2, true));
    assert_eq!(said(&mut t), ["start 2"]);
    t.job_report(ms(1), &report(1, T1, 2, true));
    t.job_report(ms(1), &report(2, T1, 2, true));
    assert!(said(&mut t).is_empty(), "not committed");
    t.commit(ms(2), T1).expect("open");
    assert_eq!(said(&mut t), ["notice 1 PushDone {}", "done 1 60"]);
}

#[test]
fn a_failed_transfer_waits_for_its_work_to_drain() {
    let mut t = ledger();
    t.submit(ms(0), pull(T1, 4)).expect("taken");
    let cause = Cause::PeerUnreachable;
    let error = Some(JobError {
        op: 2,
        cause: cause.clone(),
    });
    t.job_report(
        ms(1),
        &JobReport {
            error,
            ..report(0, T1, 0, true)
        },
    );
    assert_eq!(said(&mut t), ["start 0", "stop 0"]);
    assert_eq!(
        t.cancel(ms(1), T1),
        Err(TransferError::Ended { id: T1, cause })
    );
    t.job_report(ms(2), &report(0, T1, 1, true));
    assert_eq!(said(&mut t), ["failed 1 peer is unreachable Released"]);
    assert_eq!(t.cancel(ms(3), T1), Err(TransferError::Unknown { id: T1 }));
}

#[test]
fn what_does_not_drain_is_quarantined_then_drained() {
    let mut t = ledger();
    t.submit(ms(0), pull(T1, 4)).expect("taken");
    t.cancel(ms(10), T1).expect("running");
    assert_eq!(said(&mut t), ["start 0", "stop 0"]);
    assert_eq!(t.next_timeout(), Some(ms(110)));
    t.on_time(ms(110));
    assert_eq!(said(&mut t), ["cancelled 1 Quarantined"]);
    assert_eq!(t.next_timeout(), Some(ms(1110)));
    t.on_time(ms(1110));
    assert_eq!(said(&mut t), ["reset 1 [0]"]);
    assert_eq!(t.next_timeout(), Some(ms(2110)));
    t.on_time(ms(2110));
    assert_eq!(
        (said(&mut t), t.next_timeout()),
        (vec!["drain 1".to_owned()], None)
    );
    t.peer_drained(PeerKey(9), DrainToken(1));
    assert!(said(&mut t).is_empty());
    t.peer_drained(PEER, DrainToken(1));
    assert_eq!(said(&mut t), ["released 1"]);
    t.peer_drained(PEER, DrainToken(1));
    assert!(said(&mut t).is_empty());
}

#[test]
fn what_comes_back_with_its_queue_pairs_needs_no_more() {
    let mut t = ledger();
    t.submit(ms(0), pull(T1, 4)).expect("taken");
    t.cancel(ms(10), T1).expect("running");
    t.on_time(ms(110));
    t.on_time(ms(1110));
    let reset = said(&mut t).pop();
    assert_eq!(reset.as_deref(), Some("reset 1 [0]"));
    // One of two workers has let go of it.
    t.job_report(ms(1111), &report(0, T1, 0, true));
    assert!(said(&mut t).is_empty());
    t.job_report(ms(1112), &report(0, T1, 0, true));
    assert_eq!(said(&mut t), ["released 1"]);
    assert_eq!((t.live(), t.next_timeout()), (0, None));
    t.lanes_stay(T1);
    assert!(said(&mut t).is_empty());
}

#[test]
fn where_no_queue_pair_goes_alone_all_go_at_once() {
    let mut t = ledger();
    t.submit(ms(0), pull(T1, 4)).expect("taken");
    // Nothing to reset while it runs.
    t.lanes_stay(T1);
    t.cancel(ms(10), T1).expect("running");
    t.lanes_stay(T1);
    assert_eq!(said(&mut t), ["start 0", "stop 0"]);
    t.on_time(ms(110));
    t.on_time(ms(1110));
    let reset = said(&mut t).pop();
    assert_eq!(reset.as_deref(), Some("reset 1 [0]"));
    t.lanes_stay(T1);
    assert_eq!(
        (said(&mut t), t.next_timeout()),
        (vec!["drain 1".to_owned()], None)
    );
    t.lanes_stay(T1);
    assert!(said(&mut t).is_empty());
    t.peer_drained(PEER, DrainToken(1));
    assert_eq!(said(&mut t), ["released 1"]);
}

#[test]
fn a_deadline_ends_whatever_the_state() {
    let t2 = TransferId(2);
    let t3 = TransferId(3);
    let mut t = ledger();
    t.submit(ms(0), pull(T1, 4)).expect("taken");
    t.submit(ms(0), pull(t2, 4)).expect("taken");
    t.submit(ms(0), pull(t3, 4))
        .expect("queued behind the others");
    t.job_report(ms(1), &report(1, t2, 4, true));
    assert_eq!(
        said(&mut t),
        ["start 0", "start 1", "stop 1", "start 2", "lease 2"]
    );
    t.submit(ms(0), pull(TransferId(4), 4)).expect("queued");
    assert!(said(&mut t).is_empty());
    t.on_time(ms(1000));
    assert_eq!(
        said(&mut t),
        [
            "stop 0",
            "failed 1 deadline passed Quarantined",
            "failed 2 deadline passed Released",
            "stop 2",
            "failed 3 deadline passed Quarantined",
            "failed 4 deadline passed Released",
        ]
    );
    t.submit(ms(1001), pull(TransferId(5), 4)).expect("taken");
    assert_eq!(said(&mut t), ["failed 5 deadline passed Released"]);
}

#[test]
fn a_drain_covers_only_what_was_stopped_before_it() {
    let t2 = TransferId(2);
    let mut t = ledger();
    t.submit(ms(0), pull(T1, 4)).expect("taken");
    t.submit(ms(0), pull(t2, 4)).expect("taken");
    t.cancel(ms(0), T1).expect("running");
    t.on_time(ms(100));
    t.on_time(ms(900));
    assert!(!said(&mut t).iter().any(|s| s.starts_with("drain")));
    // The second is stopped after the drain was asked for.
    let mut late = pull(TransferId(3), 4);
    late.deadline = ms(5000);
    t.submit(ms(900), late).expect("taken");
    t.on_time(ms(1100));
    t.lanes_stay(T1);
    t.cancel(ms(1101), TransferId(3)).expect("running");
    let all = said(&mut t);
    assert_eq!(
        all.iter().filter(|s| s.starts_with("drain")).count(),
        1,
        "{all:?}"
    );
    t.peer_drained(PEER, DrainToken(1));
    let released = said(&mut t);
    assert!(released.contains(&"released 1".to_owned()), "{released:?}");
    assert!(!released.contains(&"released 3".to_owned()), "{released:?}");
}

#[test]
fn a_lost_peer_fails_its_transfers_and_drains_at_once() {
    let mut t = ledger();
    t.submit(ms(0), push(T1)).expect("taken");
    t.add_job(ms(0), T1, even(4, 1)).expect("open");
    t.submit(
        ms(0),
        Spec {
            peer: PeerKey(2),
            ..pull(TransferId(2), 4)
        },
    )
    .expect("taken");
    t.peer_lost(ms(5), PEER, &Cause::PeerDead);
    assert_eq!(said(&mut t), ["start 0", "start 1", "stop 0", "drain 1"]);
    t.peer_lost(ms(6), PEER, &Cause::PeerRestarted);
    assert!(said(&mut t).is_empty());
    t.peer_drained(PEER, DrainToken(1));
    assert_eq!(
        said(&mut t),
        ["failed 1 peer is dead Released"],
        "and no notice to a dead peer"
    );
    assert_eq!(t.live(), 1);
}

#[test]
fn an_aborted_push_says_so_after_it_has_drained() {
    let mut t = ledger();
    t.submit(ms(0), push(T1)).expect("taken");
    t.add_job(ms(0), T1, even(4, 1)).expect("open");
    t.abort(ms(1), T1).expect("running");
    assert_eq!(said(&mut t), ["start 0", "stop 0"]);
    t.job_report(ms(2), &report(0, T1, 1, true));
    assert_eq!(
        said(&mut t),
        [
            "notice 1 PushAborted { cause: Aborted }",
            "cancelled 1 Released"
        ]
    );
}

#[test]
fn calls_out_of_place_are_refused() {
    let mut t = Transfers::new(TransfersConfig {
        max_live: 2,
        ..TransfersConfig::default()
    });
    t.submit(ms(0), push(T1)).expect("taken");
    assert_eq!(
        t.submit(ms(0), pull(T1, 1)),
        Err(TransferError::Duplicate { id: T1 })
    );
    let t2 = TransferId(2);
    t.submit(ms(0), pull(t2, 1)).expect("taken");
    assert_eq!(
        t.submit(ms(0), pull(TransferId(3), 1)),
        Err(TransferError::TooMany { limit: 2 })
    );
    assert_eq!(t.commit(ms(0), t2), Err(TransferError::NotAPush { id: t2 }));
    assert_eq!(t.abort(ms(0), t2), Err(TransferError::NotAPush { id: t2 }));
    t.add_job(ms(0), T1, even(1, 1)).expect("open");
    t.commit(ms(0), T1).expect("open");
    assert_eq!(
        t.commit(ms(0), T1),
        Err(TransferError::Committed { id: T1 })
    );
    assert_eq!(
        t.add_job(ms(0), T1, even(1, 1)),
        Err(TransferError::Committed { id: T1 })
    );
    // The deadline counts as passed for a call that comes after it, whoever looked at the clock.
    let ended = TransferError::Ended {
        id: T1,
        cause: Cause::DeadlinePassed,
    };
    assert_eq!(t.add_job(ms(1000), T1, even(1, 1)), Err(ended));
}

#[test]
fn work_that_vanishes_is_a_failure() {
    let mut t = ledger();
    t.submit(ms(0), pull(T1, 4)).expect("taken");
    t.job_report(ms(1), &report(0, T1, 2, true));
    t.job_report(ms(1), &report(0, T1, 1, true));
    assert_eq!(
        said(&mut t),
        [
            "start 0",
            "failed 1 1 operations were never confirmed Released"
        ]
    );
}

#[test]
fn a_push_in_doubt_is_closed_when_its_queue_pairs_are_down() {
    let mut t = ledger();
    t.submit(ms(0), push(T1)).expect("taken");
    t.add_job(ms(0), T1, even(4, 10)).expect("open");
    assert_eq!(said(&mut t), ["start 0"]);
    let error = Some(JobError {
        op: 2,
        cause: Cause::LaneFailed,
    });
    for quiescent in [false, true] {
        let report = JobReport {
            error: error.clone(),
            in_doubt: true,
            doubts: 0,
            ..report(0, T1, 0, quiescent)
        };
        t.job_report(ms(1), &report);
    }
    // The other scheduler has nothing posted either: no queue pair here holds anything of it.
    t.job_report(ms(1), &report(0, T1, 0, true));
    assert_eq!(said(&mut t), ["stop 0", "drain 1"]);
    t.on_time(ms(60_000));
    assert_eq!(said(&mut t), ["failed 1 queue pair failed Quarantined"]);
    t.peer_drained(PEER, DrainToken(1));
    let closed = "notice 1 PushAborted { cause: LaneFailed }";
    assert_eq!(said(&mut t), [closed, "released 1"]);
}

#[test]
fn what_is_late_while_all_is_held_up_has_that_cause() {
    let port = Cause::PortDown { port: 1 };
    let ends = |by: Option<&Cause>, spec: Spec, work: bool| {
        let mut t = ledger();
        t.held_up(PEER, Some(port.clone()));
        t.submit(ms(0), spec).expect("taken");
        if work {
            t.add_job(ms(0), T1, even(4, 10)).expect("open");
        }
        t.held_up(PEER, by.cloned());
        said(&mut t);
        t.on_time(ms(1000));
        said(&mut t)
            .pop()
            .into_iter()
            .chain({
                t.on_time(ms(1000));
                said(&mut t)
            })
            .next_back()
    };
    let late = |cause: &Cause| Some(format!("failed 1 {cause} Quarantined"));
    assert_eq!(ends(Some(&port), pull(T1, 4), false), late(&port));
    assert_eq!(ends(Some(&port), push(T1), true), late(&port));
    // Another peer's port is nothing to it.
    let mut t = ledger();
    t.submit(ms(0), pull(T1, 4)).expect("taken");
    t.held_up(PeerKey(2), Some(port.clone()));
    t.on_time(ms(1000));
    t.on_time(ms(1000));
    let told = said(&mut t);
    assert!(
        told.contains(&"failed 1 deadline passed Quarantined".to_owned()),
        "{told:?}"
    );
    // The port is up again: it is the deadline's own doing.
    let passed = Cause::DeadlinePassed;
    assert_eq!(ends(None, pull(T1, 4), false), late(&passed));
    // A push that has nothing to write waits for nothing that the port keeps back.
    let idle = ends(Some(&port), push(T1), false);
    assert_eq!(idle, Some(format!("failed 1 {passed} Released")));
}

#[test]
fn a_lease_check_that_a_port_holds_up_is_late_for_it() {
    let mut t = ledger();
    t.submit(ms(0), pull(T1, 4)).expect("taken");
    t.job_report(ms(1), &report(0, T1, 4, true));
    let port = Cause::PortDown { port: 1 };
    t.held_up(PEER, Some(port.clone()));
    t.on_time(ms(1000));
    let told = said(&mut t);
    assert_eq!(
        told.last(),
        Some(&format!("failed 1 {port} Released")),
        "{told:?}"
    );
}

#[test]
fn a_push_whose_writes_moved_is_done_when_nothing_of_them_can_come_late() {
    let doubtful = |doubts, ops_done, quiescent| JobReport {
        doubts,
        ..report(0, T1, ops_done, quiescent)
    };
    let begun = || {
        let mut t = ledger();
        let spec = Spec {
            workers: 2,
            ..push(T1)
        };
        t.submit(ms(0), spec).expect("taken");
        t.add_job(ms(0), T1, even(4, 10)).expect("open");
        t.commit(ms(0), T1).expect("open");
        assert_eq!(said(&mut t), ["start 0"]);
        t
    };
    // Both schedulers have lost some, and all of it is confirmed.
    let mut t = begun();
    t.job_report(ms(1), &doubtful(1, 2, false));
    t.job_report(ms(1), &doubtful(1, 2, false));
    assert_eq!(said(&mut t), [""; 0]);
    t.job_report(ms(2), &doubtful(-1, 0, true));
    assert_eq!(said(&mut t), [""; 0]);
    t.job_report(ms(2), &doubtful(-1, 0, true));
    assert_eq!(said(&mut t), ["notice 1 PushDone {}", "done 1 40"]);
    // Nobody settles it: the lanes are gone, and so is the session, before anybody is told.
    let mut t = begun();
    t.job_report(ms(1), &doubtful(1, 4, false));
    t.job_report(ms(1), &report(0, T1, 0, true));
    let left = JobReport {
        in_doubt: true,
        ..doubtful(0, 0, true)
    };
    t.job_report(ms(2), &left);
    assert_eq!(said(&mut t), ["drain 1"]);
    t.peer_drained(PEER, DrainToken(1));
    let closed = "notice 1 PushAborted { cause: LaneReset }";
    let failed = format!("failed 1 {} Released", Cause::LaneReset);
    assert_eq!(said(&mut t), [closed, &failed]);
}

#[test]
fn the_end_of_a_push_names_all_rails_that_wrote() {
    let mut t = ledger();
    let spec = Spec {
        workers: 2,
        ..push(T1)
    };
    t.submit(ms(0), spec).expect("taken");
    let over = |job, ops, pair| JobReport {
        rails: RailSet::only(pair),
        ..report(job, T1, ops, true)
    };
    t.add_job(ms(0), T1, even(4, 1)).expect("open");
    t.add_job(ms(0), T1, even(2, 1)).expect("open");
    // Two schedulers, and two jobs.
    t.job_report(ms(1), &over(0, 1, 3));
    t.job_report(ms(1), &over(0, 3, 0));
    t.job_report(ms(1), &over(1, 2, 5));
    t.commit(ms(2), T1).expect("open");
    let told = said(&mut t);
    assert!(
        told.contains(&"notice 1 PushDone {0, 3, 5}".to_owned()),
        "{told:?}"
    );
}

#[test]
fn a_job_that_is_held_takes_no_place() {
    let mut t = ledger();
    t.submit(ms(0), push(T1)).unwrap();
    let jobs: Vec<JobId> = (0..4)
        .map(|_| t.add_job(ms(0), T1, even(1, 10)).unwrap())
        .collect();
    // Two at a time, and one more for each that is held; once.
    assert_eq!(said(&mut t), ["start 0", "start 1"]);
    t.held(T1, jobs[0]);
    t.held(T1, jobs[0]);
    assert_eq!(said(&mut t), ["start 2"]);
    t.held(T1, jobs[3]);
    assert!(said(&mut t).is_empty(), "it has not been started");
    // Its end frees no place that it did not have.
    let over = |job: JobId| JobReport {
        job,
        transfer: T1,
        owner: 0,
        ops_done: 1,
        bytes_done: 10,
        error: None,
        rails: RailSet::EMPTY,
        in_doubt: false,
        doubts: 0,
        quiescent: true,
    };
    t.job_report(ms(1), &over(jobs[0]));
    assert!(said(&mut t).is_empty());
    t.job_report(ms(1), &over(jobs[1]));
    assert_eq!(said(&mut t), ["start 3"]);
}

#[test]
fn kernels_that_write_are_waited_for_and_outlive_the_queue_pairs() {
    // Whatever else goes on: a line of jobs that is full does not keep them from having begun.
    let mut t = ledger();
    t.submit(ms(0), push(T1)).expect("taken");
    for _ in 0..3 {
        t.add_job(ms(0), T1, even(1, 10)).expect("open");
    }
    let ends = t.kernels_began(ms(0), T1).expect("open");
    assert_eq!((ends.job, ends.quiescent), (JobId(3), true));
    assert_eq!(said(&mut t), ["start 0", "start 1"]);
    for job in 0..3 {
        t.job_report(ms(1), &report(job, T1, 1, true));
    }
    t.commit(ms(2), T1).expect("open");
    assert_eq!(said(&mut t), ["start 2"], "not done");
    t.job_report(ms(3), &ends);
    let end = ["notice 1 PushDone none".to_owned(), "done 1 30".to_owned()];
    let said_now = said(&mut t);
    assert_eq!(said_now.last(), end.last());
    assert_eq!((t.live(), said_now.len()), (0, 2));
    // It cannot begin when nothing more may.
    assert!(t.kernels_began(ms(3), T1).is_err());

    let mut t = ledger();
    t.submit(ms(0), push(T1)).expect("taken");
    let ends = t.kernels_began(ms(0), T1).expect("open");
    t.peer_lost(ms(10), PEER, &Cause::PeerDead);
    let token = DrainToken(1);
    assert_eq!(said(&mut t), ["stop 0", "drain 1"]);
    t.peer_drained(PEER, token);
    assert!(said(&mut t).is_empty(), "they may run");
    t.on_time(ms(110));
    let dead = Cause::PeerDead;
    assert_eq!(said(&mut t), [format!("failed 1 {dead} Quarantined")]);
    // However long, nothing is taken down for them.
    for second in 2..10 {
        t.on_time(ms(second * 1000));
        assert!(said(&mut t).is_empty());
    }
    t.job_report(ms(10_000), &ends);
    assert_eq!(said(&mut t), ["released 1"]);
    assert_eq!((t.live(), t.next_timeout()), (0, None));
}
