use std::sync::Arc;

use super::*;
use crate::transfer::testing::even;
use crate::transfer::{CompletionStatus, Direction, QpEvent, TransferId};

mod rebuilt;

const PEER: PeerKey = PeerKey(1);

fn job(id: u64, ops: u64, len: u32) -> Arc<Job> {
    job_to(Direction::Read, id, ops, len)
}

fn job_to(dir: Direction, id: u64, ops: u64, len: u32) -> Arc<Job> {
    let (job, transfer) = (JobId(id), TransferId(id));
    Arc::new(Job::new(job, transfer, 0, PEER, dir, even(ops, len), 1))
}

fn scheduler(batch: BatchSize, lanes: &[u32]) -> (Scheduler, Vec<LaneId>) {
    let mut s = Scheduler::new(SchedulerConfig {
        batch,
        ..SchedulerConfig::default()
    });
    let add = |send_wr: &u32| {
        s.add_lane(
            PEER,
            LaneLimits {
                send_wr: *send_wr,
                pair: 0,
                rebuilt: false,
            },
        )
    };
    let lanes = lanes.iter().map(add).collect();
    (s, lanes)
}

/// The ids of the next batch for a lane.
fn next(s: &mut Scheduler, lane: LaneId) -> Vec<u64> {
    let mut batch = Batch::new();
    if !s.next_batch(lane, &mut batch) {
        assert!(batch.is_empty());
    }
    let wrs: Vec<_> = batch.iter().collect();
    for (i, wr) in wrs.iter().enumerate() {
        assert_eq!(
            wr.signaled,
            i + 1 == wrs.len(),
            "only the last is signalled"
        );
    }
    wrs.iter().map(|wr| wr.wr_id).collect()
}

fn status(status: CompletionStatus, vendor: u32) -> Cause {
    Cause::Completion { status, vendor }
}

#[test]
fn batch_sizes() {
    let (mut s, lanes) = scheduler(BatchSize::Auto, &[64, 64]);
    s.start(job(1, 20, 1));
    assert_eq!(next(&mut s, lanes[0]).len(), 10, "ceil(20 / 2 lanes)");
    s.stop(JobId(1));
    s.start(job(2, 1000, 1));
    assert_eq!(next(&mut s, lanes[1]).len(), 16, "64 / 4");

    let (mut s, lanes) = scheduler(BatchSize::Fixed(7), &[16]);
    s.start(job(1, 100, 1));
    let sizes: Vec<_> = (0..4).map(|_| next(&mut s, lanes[0]).len()).collect();
    // One entry of sixteen is kept for the worker's own work.
    assert_eq!(sizes, [7, 7, 1, 0]);
    assert_eq!(s.lane_credits(lanes[0]), 1);
    assert!(s.reserve_single(lanes[0], 9).is_some());
    assert_eq!(s.reserve_single(lanes[0], 9), None, "full");
}

#[test]
fn a_batch_is_limited_by_bytes_and_one_operation_may_be_larger() {
    let mut s = Scheduler::new(SchedulerConfig {
        batch: BatchSize::Fixed(100),
        batch_bytes: 1000,
        peer_bytes: 2000,
        ..SchedulerConfig::default()
    });
    let lane = s.add_lane(
        PEER,
        LaneLimits {
            send_wr: 1000,
            pair: 0,
            rebuilt: false,
        },
    );
    s.start(job(1, 100, 300));
    assert_eq!(next(&mut s, lane).len(), 3);
    assert_eq!(next(&mut s, lane).len(), 3);
    assert_eq!(next(&mut s, lane).len(), 3, "begun below the cap");
    assert_eq!(next(&mut s, lane).len(), 0, "at the peer's cap");
    s.remove_lane(lane);
    s.stop(JobId(1));
    let lane = s.add_lane(
        PEER,
        LaneLimits {
            send_wr: 1000,
            pair: 0,
            rebuilt: false,
        },
    );
    s.start(job(2, 2, 5000));
    assert_eq!(
        next(&mut s, lane).len(),
        1,
        "larger than a batch, larger than the cap"
    );
    assert_eq!(next(&mut s, lane).len(), 0);
}

#[test]
fn the_completion_queue_bounds_what_is_posted() {
    let mut s = Scheduler::new(SchedulerConfig {
        batch: BatchSize::Fixed(4),
        cq_entries: 6,
        ..SchedulerConfig::default()
    });
    let a = s.add_lane(
        PEER,
        LaneLimits {
            send_wr: 100,
            pair: 0,
            rebuilt: false,
        },
    );
    let b = s.add_lane(
        PEER,
        LaneLimits {
            send_wr: 100,
            pair: 0,
            rebuilt: false,
        },
    );
    s.start(job(1, 100, 1));
    let first = next(&mut s, a);
    assert_eq!(
        (first.len(), next(&mut s, b).len(), next(&mut s, a).len()),
        (4, 2, 0)
    );
    assert_eq!(s.next_lane(), None);
    s.complete(a, first[3], Ok(()));
    assert!(s.next_lane().is_some());
    assert_eq!(next(&mut s, a).len(), 4);
}

#[test]
fn a_completion_retires_what_was_posted_before_it() {
    let (mut s, lanes) = scheduler(BatchSize::Fixed(3), &[100]);
    s.start(job(1, 9, 10));
    let (_, _, third) = (
        next(&mut s, lanes[0]),
        next(&mut s, lanes[0]),
        next(&mut s, lanes[0]),
    );
    s.complete(lanes[0], third[2], Ok(()));
    let report = s.poll_report().expect("it is over");
    assert_eq!(
        (report.ops_done, report.bytes_done, report.quiescent),
        (9, 90, true)
    );
    assert_eq!(
        (s.poll_report(), s.lane_credits(lanes[0]), s.jobs()),
        (None, 100, 0)
    );
}

#[test]
fn foreign_and_stale_completions_are_counted_and_ignored() {
    let (mut s, lanes) = scheduler(BatchSize::Fixed(3), &[100]);
    s.start(job(1, 6, 1));
    let (first, second) = (next(&mut s, lanes[0]), next(&mut s, lanes[0]));
    for id in [0, u64::MAX, second[2] + 1, first[0]] {
        s.complete(lanes[0], id, Ok(()));
    }
    s.complete(LaneId(99), first[2], Ok(()));
    assert_eq!((s.stats().stale, s.lane_credits(lanes[0])), (5, 94));
    s.complete(lanes[0], first[2], Ok(()));
    s.complete(lanes[0], first[2], Ok(()));
    assert_eq!((s.stats().stale, s.lane_credits(lanes[0])), (6, 97));
    // The lane's successor has its number, and none of its ids.
    s.remove_lane(lanes[0]);
    let again = s.add_lane(
        PEER,
        LaneLimits {
            send_wr: 100,
            pair: 0,
            rebuilt: false,
        },
    );
    assert_eq!(again, lanes[0]);
    assert_eq!(
        next(&mut s, again).len(),
        3,
        "the lost work is posted again"
    );
    s.complete(again, second[2], Ok(()));
    assert_eq!((s.stats().stale, s.lane_credits(again)), (7, 97));
}

#[test]
fn an_error_names_its_job_and_the_others_are_posted_again() {
    let (mut s, lanes) = scheduler(BatchSize::Fixed(4), &[100, 100]);
    s.start(job(1, 4, 10));
    s.start(job(2, 4, 10));
    let (guilty, innocent) = (next(&mut s, lanes[0]), next(&mut s, lanes[0]));
    let cause = status(CompletionStatus::RemoteAccess, 7);
    s.complete(lanes[0], guilty[2], Err(cause.clone()));
    let report = s.poll_report().expect("the error is told at once");
    assert_eq!(report.error, Some(JobError { op: 2, cause }));
    assert_eq!(
        (report.ops_done, report.bytes_done, report.quiescent),
        (2, 20, false)
    );
    assert!(!s.has_work(lanes[0]) && !s.lane_drained(lanes[0]));

    let flush = || Err(status(CompletionStatus::Flush, 0));
    s.complete(lanes[0], guilty[3], flush());
    let report = s.poll_report().expect("nothing of it is posted now");
    assert_eq!(
        (report.job, report.error, report.quiescent),
        (JobId(1), None, true)
    );
    for id in innocent {
        s.complete(lanes[0], id, flush());
    }
    assert!(s.lane_drained(lanes[0]));
    assert_eq!(
        (
            s.stats().echoes,
            s.stats().replayed,
            s.lane_credits(lanes[0])
        ),
        (5, 4, 100)
    );
    let again = next(&mut s, lanes[1]);
    assert_eq!(again.len(), 4);
    s.complete(lanes[1], again[3], Ok(()));
    let report = s.poll_report().expect("done");
    assert_eq!(
        (report.job, report.ops_done, report.error),
        (JobId(2), 4, None)
    );
}

#[test]
fn a_lost_write_is_in_doubt_unless_the_peer_itself_has_refused() {
    let refused = status(CompletionStatus::RemoteAccess, 0);
    let silent = status(CompletionStatus::RetryExceeded, 0);
    for (cause, in_doubt) in [(refused, false), (silent, true)] {
        let (mut s, lanes) = scheduler(BatchSize::Fixed(4), &[100, 100]);
        s.start(job_to(Direction::Write, 1, 4, 10));
        s.start(job_to(Direction::Write, 2, 4, 10));
        let (guilty, innocent) = (next(&mut s, lanes[0]), next(&mut s, lanes[0]));
        s.complete(lanes[0], guilty[3], Err(cause.clone()));
        for id in innocent {
            s.complete(lanes[0], id, Err(status(CompletionStatus::Flush, 0)));
        }
        let report = s.poll_report().expect("the first has failed");
        assert_eq!((report.job, report.in_doubt), (JobId(1), in_doubt));
        assert_eq!(report.error, Some(JobError { op: 3, cause }));
        if in_doubt {
            // Posted again, the lost ones could land after the new ones were confirmed.
            let report = s.poll_report().expect("the second has failed too");
            let cause = Cause::LaneFailed;
            assert_eq!(report.error, Some(JobError { op: 0, cause }));
            assert!(report.in_doubt && report.quiescent);
            assert!(next(&mut s, lanes[1]).is_empty());
        } else {
            assert_eq!(next(&mut s, lanes[1]).len(), 4);
        }
    }
}

#[test]
fn work_that_takes_lanes_down_without_a_name_fails_in_the_end() {
    let (mut s, lanes) = scheduler(BatchSize::Fixed(4), &[100]);
    s.start(job(1, 2, 10));
    let mut lane = lanes[0];
    let mut lives = 0;
    while !next(&mut s, lane).is_empty() {
        lives += 1;
        s.lane_failed(lane, Cause::PeerUnreachable);
        s.remove_lane(lane);
        lane = s.add_lane(
            PEER,
            LaneLimits {
                send_wr: 100,
                pair: 0,
                rebuilt: false,
            },
        );
    }
    assert_eq!(lives, 4);
    let error = s.poll_report().expect("it has failed").error;
    assert_eq!(
        error,
        Some(JobError {
            op: 0,
            cause: Cause::PeerUnreachable
        })
    );

    // Lanes that this side resets may be as many as they like.
    s.start(job(2, 2, 10));
    for _ in 0..20 {
        assert_eq!(next(&mut s, lane).len(), 2);
        s.remove_lane(lane);
        lane = s.add_lane(
            PEER,
            LaneLimits {
                send_wr: 100,
                pair: 0,
                rebuilt: false,
            },
        );
    }
    assert_eq!(s.poll_report(), None);
}

#[test]
fn a_stopped_job_is_quiescent_when_nothing_of_it_is_posted() {
    let (mut s, lanes) = scheduler(BatchSize::Fixed(4), &[100]);
    s.start(job(1, 100, 10));
    let ids = next(&mut s, lanes[0]);
    s.stop(JobId(1));
    assert_eq!(s.poll_report(), None, "four operations are posted");
    assert_eq!(
        next(&mut s, lanes[0]),
        Vec::<u64>::new(),
        "and no more will be"
    );
    s.complete(lanes[0], ids[3], Ok(()));
    let report = s.poll_report().expect("quiescent");
    assert_eq!((report.ops_done, report.quiescent), (4, true));
    s.stop(JobId(1));
    assert_eq!(s.poll_report(), None, "told once");
    assert_eq!(s.next_lane(), None);
}

#[test]
fn a_job_finished_by_other_workers_is_over_here_too() {
    let (mut a, lanes) = scheduler(BatchSize::Fixed(4), &[100]);
    let (mut b, _) = scheduler(BatchSize::Fixed(4), &[]);
    let shared = job(1, 4, 10);
    b.start(Arc::clone(&shared));
    a.start(shared);
    assert_eq!(next(&mut a, lanes[0]).len(), 4);
    assert_eq!(b.poll_report(), None);
    b.start(job(2, 1, 1));
    let report = b.poll_report().expect("noticed at the next start");
    assert_eq!(
        (report.job, report.quiescent, report.ops_done),
        (JobId(1), true, 0)
    );
}

#[test]
fn a_post_that_fails_gives_its_credits_back() {
    let (mut s, lanes) = scheduler(BatchSize::Fixed(4), &[100]);
    let cause = Cause::Post { errno: 22 };
    s.start(job(1, 4, 10));
    assert_eq!(next(&mut s, lanes[0]).len(), 4);
    assert_eq!(
        s.post_failed(lanes[0], 0, cause.clone()),
        PostFailure::LaneKept
    );
    let report = s.poll_report().expect("failed");
    assert_eq!(
        report.error,
        Some(JobError {
            op: 0,
            cause: cause.clone()
        })
    );
    assert!(report.quiescent);
    assert_eq!(s.lane_credits(lanes[0]), 100);

    s.start(job(2, 4, 10));
    let ids = next(&mut s, lanes[0]);
    assert_eq!(s.post_failed(lanes[0], 3, cause), PostFailure::ResetLane);
    assert_eq!(s.lane_credits(lanes[0]), 97);
    let report = s.poll_report().expect("failed");
    assert_eq!(
        (report.error.map(|e| e.op), report.quiescent),
        (Some(3), false)
    );
    for id in &ids[..3] {
        s.complete(lanes[0], *id, Err(status(CompletionStatus::Flush, 0)));
    }
    assert!(s.poll_report().is_some_and(|r| r.quiescent));
}

#[test]
fn jobs_take_turns() {
    let (mut s, lanes) = scheduler(BatchSize::Fixed(8), &[4096, 4096]);
    for id in 0..5 {
        s.start(job(id, 80, 1));
    }
    let mut batch = Batch::new();
    let mut turns = Vec::new();
    while let Some(lane) = s.next_lane() {
        if s.next_batch(lane, &mut batch) {
            turns.push((batch.job().expect("a job").id.0, lane));
        }
    }
    assert_eq!(turns.len(), 50);
    for (i, (id, lane)) in turns.iter().enumerate() {
        assert_eq!(*id, i as u64 % 5, "turn {i}");
        assert_eq!(*lane, lanes[i % 2], "turn {i}");
    }
}

#[test]
fn peers_take_turns() {
    let (mut s, _) = scheduler(BatchSize::Fixed(8), &[4096]);
    let other = PeerKey(2);
    let second = s.add_lane(
        other,
        LaneLimits {
            send_wr: 4096,
            pair: 0,
            rebuilt: false,
        },
    );
    s.start(job(1, 80, 1));
    let theirs = Job::new(
        JobId(2),
        TransferId(2),
        0,
        other,
        Direction::Write,
        even(80, 1),
        1,
    );
    s.start(Arc::new(theirs));
    let mut batch = Batch::new();
    let mut turns = Vec::new();
    while let Some(lane) = s.next_lane() {
        if s.next_batch(lane, &mut batch) {
            turns.push(lane == second);
        }
    }
    assert_eq!(turns.len(), 20);
    assert!(turns.windows(2).all(|w| w[0] != w[1]), "{turns:?}");
}

#[test]
fn a_victim_of_others_is_not_given_their_cause() {
    let (mut s, _) = scheduler(BatchSize::Fixed(4), &[]);
    s.start(job(99, 1, 1));
    for guilty in 0..4 {
        let spare = s.add_lane(
            PEER,
            LaneLimits {
                send_wr: 16,
                pair: 0,
                rebuilt: false,
            },
        );
        let lane = s.add_lane(
            PEER,
            LaneLimits {
                send_wr: 16,
                pair: 0,
                rebuilt: false,
            },
        );
        assert_eq!(next(&mut s, spare).len(), 1, "the victim");
        s.start(job(guilty, 1, 1));
        let named = next(&mut s, lane);
        s.remove_lane(spare);
        assert_eq!(next(&mut s, lane).len(), 1, "the victim, behind the guilty");
        let cause = status(CompletionStatus::RemoteAccess, 1);
        s.complete(lane, named[0], Err(cause.clone()));
        let report = s.poll_report().expect("the guilty fails");
        assert_eq!(report.error, Some(JobError { op: 0, cause }));
        s.remove_lane(lane);
    }
    let report = s.poll_report().expect("the victim fails in the end");
    let cause = Cause::LaneFailed;
    assert_eq!(report.job, JobId(99));
    assert_eq!(report.error, Some(JobError { op: 0, cause }));
}

/// Between its event and its flushes a lane's work is lost to the event, whomever a completion names.
#[test]
fn what_an_event_took_down_has_its_cause() {
    let event = Cause::QueuePair {
        event: QpEvent::Fatal,
    };
    let port = Cause::PortDown { port: 1 };
    for (cause, named) in [(&event, None), (&event, Some(1)), (&port, Some(1))] {
        let (mut s, lanes) = scheduler(BatchSize::Fixed(4), &[100]);
        s.start(job_to(Direction::Write, 1, 4, 10));
        s.start(job_to(Direction::Write, 2, 4, 10));
        let posted = [next(&mut s, lanes[0]), next(&mut s, lanes[0])].concat();
        s.lane_failed(lanes[0], cause.clone());
        for (at, id) in posted.into_iter().enumerate() {
            let result = match named {
                Some(named) if named == at => cause.clone(),
                _ => status(CompletionStatus::Flush, 0),
            };
            s.complete(lanes[0], id, Err(result));
        }
        for job in [1, 2] {
            let report = s.poll_report().expect("it has failed");
            assert_eq!(report.job, JobId(job));
            assert_eq!(report.error.map(|e| e.cause), Some(cause.clone()));
            assert!(report.in_doubt && report.quiescent, "{cause}: {named:?}");
        }
        assert!(s.lane_drained(lanes[0]));
    }
}

fn on_rail(s: &mut Scheduler, pair: u16) -> LaneId {
    let limits = LaneLimits {
        send_wr: 100,
        pair,
        rebuilt: false,
    };
    s.add_lane(PEER, limits)
}

/// A lane on each of two rails.
fn two_rails() -> (Scheduler, LaneId, LaneId) {
    let (mut s, _) = scheduler(BatchSize::Fixed(4), &[]);
    let (a, b) = (on_rail(&mut s, 0), on_rail(&mut s, 1));
    (s, a, b)
}

#[test]
fn what_a_rail_cannot_move_goes_by_another() {
    let late = status(CompletionStatus::RetryExceeded, 0);
    let (mut s, a, b) = two_rails();
    assert!(s.lives_elsewhere(a) && s.lives_elsewhere(b));
    s.start(job(1, 4, 10));
    let ids = next(&mut s, a);
    // The third is named; the first two are done, the last is flushed.
    s.complete(a, ids[2], Err(late.clone()));
    s.complete(a, ids[3], Err(status(CompletionStatus::Flush, 0)));
    // Some devices name more than one.
    s.complete(a, ids[3], Err(late.clone()));
    assert_eq!(s.lane_failure(a), Some(&late));
    assert!(s.lane_drained(a) && !s.lives_elsewhere(b));
    let again = next(&mut s, b);
    assert_eq!(again.len(), 2);
    s.complete(b, again[1], Ok(()));
    let report = s.poll_report().expect("done");
    let (done, bytes) = (report.ops_done, report.bytes_done);
    assert_eq!(
        (done, bytes, report.error, report.quiescent),
        (4, 40, None, true)
    );
    assert_eq!(
        (report.doubts, report.in_doubt),
        (0, false),
        "reads are not"
    );
    // The last rail's failure is the job's.
    s.start(job(2, 4, 10));
    let ids = next(&mut s, b);
    s.complete(b, ids[0], Err(late.clone()));
    let report = s.poll_report().expect("failed");
    let error = JobError { op: 0, cause: late };
    assert_eq!(report.error, Some(error));
}

#[test]
fn a_request_that_the_peer_refuses_goes_nowhere_else() {
    let refused = status(CompletionStatus::RemoteAccess, 0);
    let (mut s, a, b) = two_rails();
    s.start(job_to(Direction::Write, 1, 4, 10));
    let ids = next(&mut s, a);
    s.complete(a, ids[0], Err(refused.clone()));
    let error = s.poll_report().and_then(|report| report.error);
    assert_eq!(
        error,
        Some(JobError {
            op: 0,
            cause: refused
        })
    );
    assert!(next(&mut s, b).is_empty());
}

#[test]
fn writes_that_moved_are_in_doubt_until_the_peer_has_taken_the_lane_down() {
    let late = status(CompletionStatus::RetryExceeded, 0);
    for settled_first in [false, true] {
        let (mut s, a, b) = two_rails();
        s.start(job_to(Direction::Write, 1, 4, 10));
        let ids = next(&mut s, a);
        s.complete(a, ids[0], Err(late.clone()));
        for id in &ids[1..] {
            s.complete(a, *id, Err(status(CompletionStatus::Flush, 0)));
        }
        let report = s.poll_report().expect("a doubt");
        assert_eq!((report.doubts, report.in_doubt), (1, false));
        assert!(!report.quiescent && report.error.is_none());
        let again = next(&mut s, b);
        assert_eq!(again.len(), 4);
        if settled_first {
            s.lane_settled(a);
        }
        s.complete(b, again[3], Ok(()));
        let report = s.poll_report().expect("confirmed");
        assert_eq!((report.ops_done, report.quiescent), (4, settled_first));
        if !settled_first {
            s.lane_settled(a);
            let report = s.poll_report().expect("settled");
            assert_eq!((report.doubts, report.quiescent), (-1, true));
        } else {
            assert_eq!(report.doubts, -1);
        }
        assert_eq!(s.poll_report(), None);
    }
}

#[test]
fn a_doubt_outlives_a_lane_that_nobody_has_settled() {
    let (mut s, a, b) = two_rails();
    s.start(job_to(Direction::Write, 1, 4, 10));
    next(&mut s, a);
    s.lane_failed(a, Cause::DeviceFatal);
    s.lane_flushed(a);
    let again = next(&mut s, b);
    s.complete(b, again[3], Ok(()));
    let report = s.poll_report().expect("confirmed");
    assert_eq!(
        (report.ops_done, report.doubts, report.quiescent),
        (4, 1, false)
    );
    s.remove_lane(a);
    let report = s.poll_report().expect("over here");
    assert!(report.in_doubt && report.quiescent);
}

#[test]
fn a_stopped_job_waits_for_its_doubts() {
    let (mut s, a, b) = two_rails();
    s.start(job_to(Direction::Write, 1, 4, 10));
    next(&mut s, a);
    s.stop(JobId(1));
    s.lane_failed(a, Cause::DeviceFatal);
    s.lane_flushed(a);
    let report = s.poll_report().expect("a doubt");
    assert_eq!((report.doubts, report.quiescent), (1, false));
    assert!(next(&mut s, b).is_empty());
    s.lane_settled(a);
    assert!(
        s.poll_report()
            .is_some_and(|r| r.quiescent && r.doubts == -1)
    );
}

/// However many rails fail under a request: none of that is its own doing.
#[test]
fn a_request_may_be_unlucky_on_every_rail_but_one() {
    let (mut s, _) = scheduler(BatchSize::Fixed(4), &[]);
    let lanes: Vec<LaneId> = (0..8).map(|pair| on_rail(&mut s, pair)).collect();
    s.start(job(1, 1, 10));
    let (last, others) = lanes.split_last().expect("eight");
    for (at, lane) in others.iter().enumerate() {
        let ids = next(&mut s, *lane);
        assert_eq!(ids.len(), 1, "rail {at}");
        if at % 2 == 1 {
            // It is flushed before anybody says why.
            s.lane_failed(*lane, Cause::LaneFailed);
        }
        let late = status(CompletionStatus::RetryExceeded, 0);
        s.complete(*lane, ids[0], Err(late));
    }
    let ids = next(&mut s, *last);
    s.complete(*last, ids[0], Ok(()));
    let report = s.poll_report().expect("done");
    assert_eq!((report.ops_done, report.error), (1, None));
}

/// The owner learns which rails have confirmed writes.
#[test]
fn reports_name_the_rails_that_wrote() {
    let (mut s, a, b) = two_rails();
    s.start(job_to(Direction::Write, 1, 8, 10));
    let (on_a, on_b) = (next(&mut s, a), next(&mut s, b));
    s.complete(b, on_b[3], Ok(()));
    let report = s.poll_report();
    assert_eq!(report, None, "there is more under way");
    // Two of four are done, and the rest goes by the other.
    let late = status(CompletionStatus::RetryExceeded, 0);
    s.complete(a, on_a[2], Err(late));
    s.complete(a, on_a[3], Err(status(CompletionStatus::Flush, 0)));
    s.lane_settled(a);
    let again = next(&mut s, b);
    s.complete(b, again[1], Ok(()));
    let report = s.poll_report().expect("done");
    assert_eq!((report.ops_done, report.rails), (8, RailSet::first(2)));
    // One whose writes all moved has not written. Reads count too: what they have put there has come that way.
    let (mut s, a, b) = two_rails();
    s.start(job_to(Direction::Write, 1, 4, 10));
    let ids = next(&mut s, a);
    s.complete(a, ids[0], Err(status(CompletionStatus::RetryExceeded, 0)));
    s.lane_flushed(a);
    s.lane_settled(a);
    let again = next(&mut s, b);
    s.complete(b, again[3], Ok(()));
    let report = s.poll_report().expect("done");
    assert_eq!((report.ops_done, report.rails), (4, RailSet::only(1)));
    s.start(job(2, 4, 10));
    let ids = next(&mut s, b);
    s.complete(b, ids[3], Ok(()));
    let report = s.poll_report().expect("done");
    assert_eq!((report.ops_done, report.rails), (4, RailSet::only(1)));
}
