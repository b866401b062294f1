//! Lanes that are rebuilt when they fail alone.

use super::*;

fn one_lane() -> (Scheduler, LaneId) {
    let mut s = Scheduler::new(SchedulerConfig {
        batch: BatchSize::Fixed(4),
        ..SchedulerConfig::default()
    });
    let lane = add(&mut s);
    (s, lane)
}

fn add(s: &mut Scheduler) -> LaneId {
    let limits = LaneLimits {
        send_wr: 100,
        pair: 0,
        rebuilt: true,
    };
    s.add_lane(PEER, limits)
}

fn flush(s: &mut Scheduler, lane: LaneId, ids: &[u64]) {
    for id in ids {
        s.complete(lane, *id, Err(status(CompletionStatus::Flush, 0)));
    }
}

#[test]
fn work_waits_for_the_successor_of_the_only_lane() {
    for dir in [Direction::Read, Direction::Write] {
        let (mut s, lane) = one_lane();
        s.start(job_to(dir, 1, 4, 10));
        let ids = next(&mut s, lane);
        // Nobody has said why.
        flush(&mut s, lane, &ids);
        assert!(s.lane_drained(lane));
        assert_eq!(s.next_lane(), None, "there is none");
        let in_doubt = i32::from(dir == Direction::Write);
        let told = s.poll_report();
        assert_eq!(told.as_ref().map_or(0, |report| report.doubts), in_doubt);
        assert!(told.is_none_or(|r| !r.in_doubt && !r.quiescent && r.error.is_none()));
        // Work that begins meanwhile waits too.
        s.start(job(2, 1, 10));
        s.lane_settled(lane);
        s.remove_lane(lane);
        let successor = add(&mut s);
        assert_eq!(s.next_lane(), Some(successor));
        for _ in 0..2 {
            let ids = next(&mut s, successor);
            s.complete(successor, *ids.last().expect("work"), Ok(()));
        }
        let mut reports = std::iter::from_fn(|| s.poll_report()).collect::<Vec<_>>();
        reports.sort_by_key(|report| report.job);
        let [first, second] = &reports[..] else {
            panic!("{reports:?}");
        };
        assert_eq!(
            (first.ops_done, first.doubts, first.quiescent),
            (4, -in_doubt, true)
        );
        assert!(first.error.is_none() && !first.in_doubt);
        assert_eq!((second.ops_done, second.quiescent), (1, true));
    }
}

/// A request that is named fails its own job; a write of it may still be carried out, until the peer has taken its
/// half down. The others go on.
#[test]
fn a_named_request_fails_alone() {
    let named = [
        (CompletionStatus::RemoteAccess, 0),
        (CompletionStatus::LocalProtection, 1),
    ];
    for (named, in_doubt) in named {
        let (mut s, lane) = one_lane();
        s.start(job_to(Direction::Write, 1, 4, 10));
        s.start(job_to(Direction::Write, 2, 4, 10));
        let (first, second) = (next(&mut s, lane), next(&mut s, lane));
        s.complete(lane, first[0], Err(status(named, 0)));
        flush(&mut s, lane, &first[1..]);
        flush(&mut s, lane, &second);
        let report = s.poll_report().expect("it has failed");
        let cause = report.error.map(|error| error.cause);
        assert_eq!((report.job, cause), (JobId(1), Some(status(named, 0))));
        assert_eq!(
            (report.doubts, report.in_doubt, report.quiescent),
            (in_doubt, false, in_doubt == 0)
        );
        s.lane_settled(lane);
        let over = std::iter::from_fn(|| s.poll_report()).find(|r| r.job == JobId(1));
        assert_eq!(
            over.map(|r| (r.doubts, r.quiescent)),
            (in_doubt > 0).then_some((-in_doubt, true))
        );
        s.remove_lane(lane);
        let successor = add(&mut s);
        let again = next(&mut s, successor);
        assert_eq!(again.len(), 4, "the other's");
        s.complete(successor, again[3], Ok(()));
        let report = s.poll_report().expect("done");
        assert_eq!(
            (report.job, report.ops_done, report.error),
            (JobId(2), 4, None)
        );
    }
}

/// The next one would go the same way.
#[test]
fn what_fails_for_its_way_does_not_wait() {
    let late = status(CompletionStatus::RetryExceeded, 0);
    let (mut s, lane) = one_lane();
    s.start(job_to(Direction::Write, 1, 4, 10));
    let ids = next(&mut s, lane);
    assert!(!s.moves(lane, &late));
    s.complete(lane, ids[0], Err(late.clone()));
    flush(&mut s, lane, &ids[1..]);
    let report = s.poll_report().expect("it has failed");
    assert_eq!(report.error.map(|error| error.cause), Some(late));
    assert!(report.in_doubt && report.quiescent && report.doubts == 0);
}

/// The peer has taken its half down for a reason of its own: that is no request's fault.
#[test]
fn a_request_that_meets_a_reset_goes_again() {
    let (mut s, mut lane) = one_lane();
    s.start(job(1, 4, 10));
    for _ in 0..6 {
        let ids = next(&mut s, lane);
        assert_eq!(ids.len(), 4, "however often");
        assert!(s.moves(lane, &Cause::PeerReset));
        s.complete(lane, ids[0], Err(Cause::PeerReset));
        flush(&mut s, lane, &ids[1..]);
        s.lane_settled(lane);
        s.remove_lane(lane);
        lane = add(&mut s);
    }
    let ids = next(&mut s, lane);
    s.complete(lane, ids[3], Ok(()));
    let report = s.poll_report().expect("done");
    assert_eq!((report.ops_done, report.error), (4, None));
}
