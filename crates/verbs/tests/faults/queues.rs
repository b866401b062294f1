//! Limits of queues, and sends and receives that do not meet.

use std::time::Duration;

use crate::sge;
use crate::support::*;
use kvxfer_verbs::*;

#[test]
fn posting_holds_to_the_limits_and_says_how_far_it_came() {
    let config = {
        let mut c = SoftConfig::default();
        c.max_msg_sz = 1000;
        c
    };
    let caps = QpCaps {
        max_send_wr: 4,
        max_recv_wr: 2,
        max_send_sge: 2,
        max_recv_sge: 1,
    };
    let (a, _b) = pair_with(
        How::Arena,
        &Options {
            config,
            caps,
            ..Options::default()
        },
    );
    let mem = TestMemory::sealed(4096);
    let r = a.region(&mem, all());
    let t = table(&[&r]);
    let post = |sges: &[Sge]| {
        let mut chain = SendChain::new();
        chain.push(1, SendOp::Send, true, &[]);
        chain.push(2, SendOp::Send, true, sges);
        a.qp.post_send(&chain, &t).unwrap_err()
    };
    let e = post(&[sge(1, 0); 3]);
    assert_eq!(
        (e.posted, e.cause),
        (1, PostCause::TooManySges { sges: 3, max: 2 })
    );
    let e = post(&[sge(600, 0), sge(401, 0)]);
    assert_eq!(
        (e.posted, e.cause),
        (
            1,
            PostCause::TooLong {
                len: 1001,
                max: 1000
            }
        )
    );
    let e = post(&[Sge {
        region: 1,
        len: 1,
        offset: 0,
    }]);
    assert_eq!(
        (e.posted, e.cause),
        (
            1,
            PostCause::NoSuchRegion {
                region: 1,
                regions: 1
            }
        )
    );
    assert_eq!(a.qp.send_credits(), 1);
    let mut chain = SendChain::new();
    for i in 0..3 {
        chain.push(i, SendOp::Send, true, &[]);
    }
    let e = a.qp.post_send(&chain, &t).unwrap_err();
    assert_eq!((e.posted, e.cause), (1, PostCause::QueueFull));
    assert_eq!(a.qp.send_credits(), 0);
    assert_eq!(
        a.qp.post_recv(1, &[sge(1, 0); 2], &t).unwrap_err().posted,
        0
    );
    a.qp.post_recv(1, &[], &t).unwrap();
    a.qp.post_recv(2, &[], &t).unwrap();
    assert_eq!(
        a.qp.post_recv(3, &[], &t).unwrap_err().cause,
        PostCause::QueueFull
    );
    // Everything flushes, in order, and gives its slots back when polled.
    a.qp.to_error();
    let got = reap(&a.send_cq, 4);
    assert!(got.iter().all(|c| c.status == WcStatus::WrFlush), "{got:?}");
    let got = reap(&a.recv_cq, 2);
    assert_eq!(got.iter().map(|c| c.wr_id).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(a.qp.send_credits(), 4);
}

#[test]
fn completion_queue_credits_bound_what_is_posted() {
    let ctx = open_soft(SoftConfig::default()).unwrap();
    let pd = ctx.alloc_pd().unwrap();
    let cq = ctx.create_cq(3).unwrap();
    let qp = pd.create_qp(QpCaps::default(), &cq, &cq).unwrap();
    let qp = qp.init(InitAttr::new(Access::NONE)).unwrap();
    let t = table(&[]);
    for i in 0..3 {
        qp.post_recv(i, &[], &t).unwrap();
    }
    assert_eq!(
        qp.post_recv(3, &[], &t).unwrap_err().cause,
        PostCause::CqFull
    );
    drop(qp);
    // The credits of a destroyed queue pair return.
    let qp = pd.create_qp(QpCaps::default(), &cq, &cq).unwrap();
    let qp = qp.init(InitAttr::new(Access::NONE)).unwrap();
    qp.post_recv(0, &[], &t).unwrap();
}

#[test]
fn a_send_waits_for_its_receive_and_gives_up_when_told() {
    for how in every() {
        let (a, b) = pair(how);
        let mem = TestMemory::sealed(4096);
        let (ra, rb) = (a.region(&mem, all()), b.region(&mem, all()));
        let mut chain = SendChain::new();
        chain.push(1, SendOp::Send, true, &[sge(8, 0)]);
        a.qp.post_send(&chain, &table(&[&ra])).unwrap();
        let mut out = Vec::new();
        for _ in 0..20 {
            a.send_cq.poll(&mut out, 1).unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(out.is_empty(), "{how:?} {out:?}");
        b.qp.post_recv(5, &[sge(8, 100)], &table(&[&rb])).unwrap();
        assert_eq!(reap(&a.send_cq, 1)[0].status, WcStatus::Success, "{how:?}");
        assert_eq!(reap(&b.recv_cq, 1)[0].wr_id, 5);

        for rnr_retry in [0, 2] {
            let rts = RtsAttr {
                rnr_retry,
                ..RtsAttr::default()
            };
            let (a, b) = pair_with(
                how,
                &Options {
                    rts,
                    ..Options::default()
                },
            );
            let ra = a.region(&mem, all());
            a.qp.post_send(&chain, &table(&[&ra])).unwrap();
            assert_eq!(
                reap(&a.send_cq, 1)[0].status,
                WcStatus::RnrRetryExc,
                "{how:?}"
            );
            drop(b);
        }
    }
}

#[test]
fn a_short_receive_fails_both_sides() {
    for how in every() {
        let (a, b) = pair(how);
        let mem = TestMemory::sealed(4096);
        let (ra, rb) = (a.region(&mem, all()), b.region(&mem, all()));
        b.qp.post_recv(5, &[sge(7, 100)], &table(&[&rb])).unwrap();
        b.qp.post_recv(6, &[sge(7, 100)], &table(&[&rb])).unwrap();
        let mut chain = SendChain::new();
        chain.push(1, SendOp::Send, true, &[sge(8, 0)]);
        a.qp.post_send(&chain, &table(&[&ra])).unwrap();
        let c = reap(&a.send_cq, 1)[0];
        let short = (WcStatus::RemInvReq, vendor::RECV_TOO_SHORT);
        assert_failed(how, &c, short, &[WcStatus::RemOp]);
        let got = reap(&b.recv_cq, 2);
        let own = (WcStatus::LocLen, got[0].vendor_err);
        assert_failed(how, &got[0], own, &[WcStatus::LocQpOp]);
        assert_eq!(got[0].wr_id, 5, "{how:?}");
        assert_eq!(
            (got[1].wr_id, got[1].status),
            (6, WcStatus::WrFlush),
            "{how:?}"
        );
        assert_eq!(b.qp.state(), QpState::Err);
    }
}
