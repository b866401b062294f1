//! What goes wrong, and how it is told.
#![allow(missing_docs, clippy::field_reassign_with_default, reason = "a test")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvxfer_verbs::*;
use support::*;

const S: u32 = 1 << 16;

fn sge(len: u32, offset: u64) -> Sge {
    Sge {
        region: 0,
        len,
        offset,
    }
}

/// One good WRITE, one bad operation, two more WRITEs: the bad one is named, the later ones flush.
fn violate(
    how: How,
    o: &Options,
    access: Access,
    op: impl Fn(&MemoryRegion) -> (SendOp, Sge),
) -> Completion {
    let (a, b) = pair_with(how, o);
    let (near, far) = (
        TestMemory::sealed(S as usize),
        TestMemory::sealed(S as usize),
    );
    let (rn, rf) = (a.region(&near, all()), b.region(&far, access));
    let good = b.region(&far, all());
    let write = SendOp::Write(Remote {
        addr: good.addr(),
        rkey: good.rkey(),
    });
    let (bad, bad_sge) = op(&rf);
    let mut chain = SendChain::new();
    chain.push(1, write, true, &[sge(8, 0)]);
    chain.push(2, bad, false, &[bad_sge]);
    chain.push(3, write, false, &[sge(8, 0)]);
    chain.push(4, write, true, &[sge(8, 0)]);
    a.qp.post_send(&chain, &table(&[&rn])).unwrap();
    let got = reap(&a.send_cq, 4);
    let ids: Vec<_> = got.iter().map(|c| c.wr_id).collect();
    assert_eq!(ids, [1, 2, 3, 4], "{how:?}");
    assert_eq!(got[0].status, WcStatus::Success, "{how:?} {got:?}");
    assert_eq!(got[2].status, WcStatus::WrFlush, "{how:?}");
    assert_eq!(got[3].status, WcStatus::WrFlush, "{how:?}");
    assert_eq!(a.qp.state(), QpState::Err);
    assert_eq!(
        (got[1].opcode(), got[1].byte_len(), got[1].imm()),
        (None, None, None)
    );
    // Posting goes on and flushes.
    chain.clear();
    chain.push(9, write, false, &[sge(8, 0)]);
    a.qp.post_send(&chain, &table(&[&rn])).unwrap();
    let late = reap(&a.send_cq, 1);
    assert_eq!((late[0].wr_id, late[0].status), (9, WcStatus::WrFlush));
    got[1]
}

#[test]
fn keys_bounds_and_rights_are_checked() {
    let at = |r: &MemoryRegion, offset: u64| Remote {
        addr: r.addr() + offset,
        rkey: r.rkey(),
    };
    for how in EVERY {
        let o = Options::default();
        type Make = fn(Remote) -> SendOp;
        for make in [SendOp::Read as Make, SendOp::Write as Make] {
            let c = violate(how, &o, all(), |r| {
                (make(at(r, u64::from(S) - 4095)), sge(4096, 0))
            });
            assert_eq!(
                (c.status, c.vendor_err),
                (WcStatus::RemAccess, vendor::BOUNDS),
                "{how:?}"
            );
            let c = violate(how, &o, all(), |r| {
                (
                    make(Remote {
                        addr: r.addr() - 1,
                        rkey: r.rkey(),
                    }),
                    sge(1, 0),
                )
            });
            assert_eq!(
                (c.status, c.vendor_err),
                (WcStatus::RemAccess, vendor::BOUNDS),
                "{how:?}"
            );
            let c = violate(how, &o, all(), |r| {
                (
                    make(Remote {
                        addr: u64::MAX - 3,
                        rkey: r.rkey(),
                    }),
                    sge(8, 0),
                )
            });
            assert_eq!(
                (c.status, c.vendor_err),
                (WcStatus::RemAccess, vendor::BOUNDS),
                "{how:?}"
            );
            let c = violate(how, &o, Access::LOCAL_WRITE, |r| {
                (make(at(r, 0)), sge(8, 0))
            });
            assert_eq!(
                (c.status, c.vendor_err),
                (WcStatus::RemAccess, vendor::RIGHTS),
                "{how:?}"
            );
            // Another generation of the same slot, and a slot that does not exist.
            for flip in [0x0001_0000, 0x0000_ffff] {
                let c = violate(how, &o, all(), |r| {
                    (
                        make(Remote {
                            addr: r.addr(),
                            rkey: r.rkey() ^ flip,
                        }),
                        sge(8, 0),
                    )
                });
                assert_eq!(
                    (c.status, c.vendor_err),
                    (WcStatus::RemAccess, vendor::BAD_KEY)
                );
            }
            // Out of its own region.
            let c = violate(how, &o, all(), |r| {
                (make(at(r, 0)), sge(8, u64::from(S) - 7))
            });
            assert_eq!(c.status, WcStatus::LocProt, "{how:?}");
        }
    }
}

#[test]
fn the_queue_pairs_own_rights_count() {
    for how in EVERY {
        let (a, b) = pair_with(
            how,
            &Options {
                access: Access::NONE,
                ..Options::default()
            },
        );
        let (near, far) = (TestMemory::sealed(4096), TestMemory::sealed(4096));
        let (rn, rf) = (a.region(&near, all()), b.region(&far, all()));
        let mut chain = SendChain::new();
        let remote = Remote {
            addr: rf.addr(),
            rkey: rf.rkey(),
        };
        chain.push(1, SendOp::Read(remote), true, &[sge(8, 0)]);
        a.qp.post_send(&chain, &table(&[&rn])).unwrap();
        let c = reap(&a.send_cq, 1)[0];
        assert_eq!(
            (c.status, c.vendor_err),
            (WcStatus::RemAccess, vendor::RIGHTS),
            "{how:?}"
        );
    }
}

#[test]
fn domains_are_apart_on_both_sides() {
    for how in EVERY {
        let (a, b) = pair(how);
        let mem = TestMemory::sealed(4096);
        let far = b
            .ctx
            .alloc_pd()
            .unwrap()
            .register(mem.clone(), all())
            .unwrap();
        let near = a.region(&mem, all());
        let other = a
            .ctx
            .alloc_pd()
            .unwrap()
            .register(mem.clone(), all())
            .unwrap();
        let own = b.region(&mem, all());
        let mut chain = SendChain::new();
        let remote = |r: &MemoryRegion| Remote {
            addr: r.addr(),
            rkey: r.rkey(),
        };
        chain.push(1, SendOp::Write(remote(&far)), true, &[sge(8, 0)]);
        a.qp.post_send(&chain, &table(&[&near])).unwrap();
        assert_eq!(
            reap(&a.send_cq, 1)[0].status,
            WcStatus::RemAccess,
            "{how:?}"
        );
        let (a, _b) = join(how, &Options::default(), &a.ctx, &b.ctx);
        chain.clear();
        chain.push(1, SendOp::Write(remote(&own)), true, &[sge(8, 0)]);
        a.qp.post_send(&chain, &table(&[&other])).unwrap();
        assert_eq!(reap(&a.send_cq, 1)[0].status, WcStatus::LocProt, "{how:?}");
    }
}

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
    let qp = qp
        .init(InitAttr {
            access: Access::NONE,
        })
        .unwrap();
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
    let qp = qp
        .init(InitAttr {
            access: Access::NONE,
        })
        .unwrap();
    qp.post_recv(0, &[], &t).unwrap();
}

#[test]
fn a_send_waits_for_its_receive_and_gives_up_when_told() {
    for how in EVERY {
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
    for how in EVERY {
        let (a, b) = pair(how);
        let mem = TestMemory::sealed(4096);
        let (ra, rb) = (a.region(&mem, all()), b.region(&mem, all()));
        b.qp.post_recv(5, &[sge(7, 100)], &table(&[&rb])).unwrap();
        b.qp.post_recv(6, &[sge(7, 100)], &table(&[&rb])).unwrap();
        let mut chain = SendChain::new();
        chain.push(1, SendOp::Send, true, &[sge(8, 0)]);
        a.qp.post_send(&chain, &table(&[&ra])).unwrap();
        let c = reap(&a.send_cq, 1)[0];
        assert_eq!(
            (c.status, c.vendor_err),
            (WcStatus::RemInvReq, vendor::RECV_TOO_SHORT)
        );
        let got = reap(&b.recv_cq, 2);
        assert_eq!(
            (got[0].wr_id, got[0].status),
            (5, WcStatus::LocLen),
            "{how:?}"
        );
        assert_eq!(
            (got[1].wr_id, got[1].status),
            (6, WcStatus::WrFlush),
            "{how:?}"
        );
        assert_eq!(b.qp.state(), QpState::Err);
    }
}

#[test]
fn a_peer_that_is_gone_is_named() {
    for how in EVERY {
        let (a, b) = pair(how);
        let mem = TestMemory::sealed(4096);
        let ra = a.region(&mem, all());
        let mut chain = SendChain::new();
        chain.push(1, SendOp::Send, false, &[sge(8, 0)]);
        chain.push(2, SendOp::Send, false, &[sge(8, 0)]);
        a.qp.post_send(&chain, &table(&[&ra])).unwrap();
        let mut out = Vec::new();
        a.send_cq.poll(&mut out, 1).unwrap();
        drop(b);
        let got = reap(&a.send_cq, 2);
        assert_eq!(
            (got[0].status, got[0].vendor_err),
            (WcStatus::RetryExc, vendor::PEER_GONE),
            "{how:?}"
        );
        assert_eq!(got[1].status, WcStatus::WrFlush, "{how:?}");
    }
}

#[test]
fn a_peer_that_never_comes_is_a_retry_error() {
    let mut config = SoftConfig::default();
    config.min_retry_time = Duration::from_millis(50);
    let ctx = open_soft(config).unwrap();
    let pd = ctx.alloc_pd().unwrap();
    let cq = ctx.create_cq(16).unwrap();
    let qp = pd.create_qp(QpCaps::default(), &cq, &cq).unwrap();
    let qp = qp
        .init(InitAttr {
            access: Access::NONE,
        })
        .unwrap();
    let remote = QpEndpoint {
        qpn: 1,
        psn: 0,
        token: [1; 16],
    };
    let link = Link::SoftAwait {
        path: SoftPath::Arena,
    };
    let qp = qp
        .rtr(RtrAttr {
            remote,
            link,
            min_rnr_timer: 12,
        })
        .unwrap();
    let rts = RtsAttr {
        timeout: 8,
        retry_cnt: 1,
        rnr_retry: 0,
    };
    let qp = qp.rts(rts).unwrap();
    let mut chain = SendChain::new();
    chain.push(1, SendOp::Send, true, &[]);
    qp.post_send(&chain, &table(&[])).unwrap();
    // Sleeps on the descriptor in between: the timer is behind it.
    let c = reap(&cq, 1)[0];
    assert_eq!(
        (c.status, c.vendor_err),
        (WcStatus::RetryExc, vendor::NO_PROGRESS)
    );
}

#[test]
fn a_deregistered_region_is_refused_and_never_written() {
    for how in EVERY {
        let (a, b) = pair(how);
        let src = TestMemory::sealed(1 << 20);
        src.put(0, &vec![0xaa; 1 << 20]);
        let ra = a.region(&src, all());
        let t = table(&[&ra]);
        let stop = AtomicBool::new(false);
        let far = TestMemory::sealed(1 << 20);
        let rf = b.region(&far, all());
        let remote = Remote {
            addr: rf.addr(),
            rkey: rf.rkey(),
        };
        std::thread::scope(|s| {
            let writer = s.spawn(|| {
                let mut chain = SendChain::new();
                let mut n = 0u64;
                loop {
                    chain.clear();
                    let op = if n.is_multiple_of(2) {
                        SendOp::Write(remote)
                    } else {
                        SendOp::Read(remote)
                    };
                    chain.push(n, op, true, &[sge(1 << 20, 0)]);
                    a.qp.post_send(&chain, &t).unwrap();
                    let c = reap(&a.send_cq, 1)[0];
                    if c.status != WcStatus::Success {
                        return (n, c);
                    }
                    n += 1;
                    if n == 8 {
                        stop.store(true, Ordering::Release);
                    }
                }
            });
            let end = Instant::now() + WAIT;
            while !stop.load(Ordering::Acquire) {
                assert!(Instant::now() < end && !writer.is_finished());
                std::thread::yield_now();
            }
            drop(rf);
            // From here on the memory is ours alone.
            far.put(0, &vec![0x55; 1 << 20]);
            let (n, c) = writer.join().unwrap();
            assert!(n >= 8);
            assert_eq!(c.status, WcStatus::RemAccess, "{how:?} {c:?}");
            assert!(far.get(0, 1 << 20) == vec![0x55; 1 << 20], "{how:?}");
        });
    }
}

#[test]
fn nothing_lands_after_to_error() {
    for how in EVERY {
        let (a, b) = pair(how);
        let (src, far) = (TestMemory::sealed(4 << 20), TestMemory::sealed(4 << 20));
        src.put(0, &vec![0xaa; 4 << 20]);
        let (ra, rf) = (a.region(&src, all()), b.region(&far, all()));
        let remote = Remote {
            addr: rf.addr(),
            rkey: rf.rkey(),
        };
        let mut chain = SendChain::new();
        for i in 0..200 {
            chain.push(i, SendOp::Write(remote), false, &[sge(4 << 20, 0)]);
        }
        a.qp.post_send(&chain, &table(&[&ra])).unwrap();
        let mut out = Vec::new();
        let end = Instant::now() + WAIT;
        while far.get(0, 1)[0] != 0xaa {
            a.send_cq.poll(&mut out, 1).unwrap();
            assert!(Instant::now() < end, "{how:?}");
        }
        b.qp.to_error();
        far.put(0, &vec![0x55; 4 << 20]);
        let got = reap(&a.send_cq, 1);
        assert_eq!(
            (got[0].status, got[0].vendor_err),
            (WcStatus::RetryExc, vendor::PEER_GONE)
        );
        assert!(far.get(0, 4 << 20) == vec![0x55; 4 << 20], "{how:?}");
    }
}

#[test]
fn memory_that_could_shrink_is_refused() {
    let ctx = open_soft(SoftConfig::default()).unwrap();
    let pd = ctx.alloc_pd().unwrap();
    for seals in [0, libc::F_SEAL_SHRINK, libc::F_SEAL_GROW] {
        let e = pd
            .register(TestMemory::memfd(4096, seals), all())
            .unwrap_err();
        assert!(
            matches!(e, Error::Unsealed { seals: s } if s == seals),
            "{e}"
        );
    }
    let e = pd
        .register(TestMemory::sealed(4096), Access::REMOTE_WRITE)
        .unwrap_err();
    assert!(matches!(e, Error::RegisterAccess));
}

#[test]
fn the_key_table_has_an_end() {
    let mut config = SoftConfig::default();
    config.max_mr = 2;
    let ctx = open_soft(config).unwrap();
    let pd = ctx.alloc_pd().unwrap();
    let mem = TestMemory::sealed(4096);
    let a = pd.register(mem.clone(), all()).unwrap();
    let b = pd.register(mem.clone(), all()).unwrap();
    assert_ne!(a.rkey(), b.rkey());
    assert!(matches!(
        pd.register(mem.clone(), all()),
        Err(Error::TooManyRegions { max: 2 })
    ));
    let old = a.rkey();
    drop(a);
    assert_ne!(pd.register(mem, all()).unwrap().rkey(), old);
}

fn init(ctx: &Context) -> (CompletionQueue, QueuePair<Init>) {
    let pd = ctx.alloc_pd().unwrap();
    let cq = ctx.create_cq(16).unwrap();
    let qp = pd.create_qp(QpCaps::default(), &cq, &cq).unwrap();
    (
        cq,
        qp.init(InitAttr {
            access: Access::NONE,
        })
        .unwrap(),
    )
}

#[test]
fn bring_up_names_what_is_wrong() {
    let (a, b) = (
        open_soft(SoftConfig::default()).unwrap(),
        open_soft(SoftConfig::default()).unwrap(),
    );
    let dial = |peer: DeviceAddr, path| Link::SoftDial {
        peer,
        path,
        deadline: Instant::now() + WAIT,
    };
    let fault = |remote: QpEndpoint, link| {
        let (_cq, qp) = init(&a);
        qp.rtr(RtrAttr {
            remote,
            link,
            min_rnr_timer: 12,
        })
        .unwrap_err()
    };
    let (_cq, peer) = init(&b);
    let good = peer.endpoint();

    let e = fault(
        QpEndpoint {
            token: [0; 16],
            ..good
        },
        dial(b.address(), SoftPath::Arena),
    );
    assert!(
        matches!(
            e,
            Error::Transition {
                fault: StateFault::EmptyEndpoint,
                ..
            }
        ),
        "{e}"
    );
    let e = fault(
        QpEndpoint {
            token: [9; 16],
            ..good
        },
        dial(b.address(), SoftPath::Arena),
    );
    assert!(
        matches!(
            e,
            Error::Path {
                fault: PathFault::Token,
                ..
            }
        ),
        "{e}"
    );
    let e = fault(
        QpEndpoint {
            qpn: good.qpn ^ 1,
            ..good
        },
        dial(b.address(), SoftPath::Arena),
    );
    assert!(
        matches!(
            e,
            Error::Transition {
                fault: StateFault::EndpointMismatch { .. },
                ..
            }
        ),
        "{e}"
    );
    let mut far = b.address();
    far.host = "another".to_owned();
    let e = fault(good, dial(far, SoftPath::Arena));
    assert!(
        matches!(
            e,
            Error::Path {
                fault: PathFault::OtherHost { .. },
                ..
            }
        ),
        "{e}"
    );
    let mut gone = b.address();
    gone.name.push('x');
    let e = fault(good, dial(gone, SoftPath::Arena));
    assert!(
        matches!(
            e,
            Error::Path {
                fault: PathFault::Connect(_),
                ..
            }
        ),
        "{e}"
    );

    // The dialler comes first, with another path than the one awaited.
    let (_cq2, other) = init(&a);
    let ea = other.endpoint();
    let attr = RtrAttr {
        remote: good,
        link: dial(b.address(), SoftPath::ProcessVm),
        min_rnr_timer: 12,
    };
    let _other = other.rtr(attr).unwrap();
    let link = Link::SoftAwait {
        path: SoftPath::Arena,
    };
    let e = peer
        .rtr(RtrAttr {
            remote: ea,
            link,
            min_rnr_timer: 12,
        })
        .unwrap_err();
    assert!(
        matches!(
            e,
            Error::Transition {
                fault: StateFault::PathMismatch { .. },
                ..
            }
        ),
        "{e}"
    );
}

#[test]
fn probes_say_whether_a_path_leads_there() {
    let (a, b) = (
        open_soft(SoftConfig::default()).unwrap(),
        open_soft(SoftConfig::default()).unwrap(),
    );
    for path in [SoftPath::Arena, SoftPath::ProcessVm] {
        a.probe(&b.address(), path).unwrap();
        a.probe(&a.address(), path).unwrap();
    }
    let gone = {
        let c = open_soft(SoftConfig::default()).unwrap();
        c.address()
    };
    assert!(a.probe(&gone, SoftPath::Arena).is_err());
    assert!(open_null().probe(&b.address(), SoftPath::Arena).is_err());
}

#[test]
fn handles_of_two_contexts_do_not_mix() {
    let (a, b) = (
        open_soft(SoftConfig::default()).unwrap(),
        open_soft(SoftConfig::default()).unwrap(),
    );
    let pd = a.alloc_pd().unwrap();
    let (ca, cb) = (a.create_cq(4).unwrap(), b.create_cq(4).unwrap());
    let e = pd.create_qp(QpCaps::default(), &ca, &cb).unwrap_err();
    assert!(matches!(e, Error::ForeignHandle { .. }), "{e}");
    let caps = QpCaps {
        max_send_wr: 0,
        ..QpCaps::default()
    };
    assert!(matches!(
        pd.create_qp(caps, &ca, &ca),
        Err(Error::Limit { .. })
    ));
}

#[test]
fn a_posted_chain_keeps_its_memory_registered() {
    let (a, b) = pair(How::Arena);
    let mem = TestMemory::sealed(4096);
    let ra = a.region(&mem, all());
    let t = table(&[&ra]);
    drop(ra);
    let rkey = t.regions()[0].rkey();
    let mut chain = SendChain::new();
    chain.push(1, SendOp::Send, true, &[sge(8, 0)]);
    a.qp.post_send(&chain, &t).unwrap();
    drop(t);
    let weak = Arc::downgrade(&mem);
    drop(mem);
    assert!(weak.upgrade().is_some(), "key {rkey:#x}");
    let far = TestMemory::sealed(4096);
    let rb = b.region(&far, all());
    b.qp.post_recv(1, &[sge(8, 0)], &table(&[&rb])).unwrap();
    assert_eq!(reap(&a.send_cq, 1)[0].status, WcStatus::Success);
    assert!(weak.upgrade().is_none());
}

/// Somebody else who finds the socket, or a peer gone mad, harms nobody.
#[test]
fn garbage_on_the_socket_is_refused_and_forgotten() {
    use std::io::{Read, Write};
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixStream};

    let (a, b) = pair(How::Arena);
    let name = SocketAddr::from_abstract_name(b.ctx.address().name).unwrap();
    for n in [1, 111, 112, 5000] {
        let mut s = UnixStream::connect_addr(&name).unwrap();
        s.set_read_timeout(Some(WAIT)).unwrap();
        s.write_all(&pattern(n, 0x41)).unwrap();
        if n >= 112 {
            // Closed, with or without what was not read.
            let closed = match s.read(&mut [0; 1]) {
                Ok(n) => n == 0,
                Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
            };
            assert!(closed);
        }
    }
    let (tcp, _far) = pair(How::Tcp);
    drop(tcp);
    let mem = TestMemory::sealed(4096);
    let (ra, rb) = (a.region(&mem, all()), b.region(&mem, all()));
    b.qp.post_recv(1, &[sge(8, 0)], &table(&[&rb])).unwrap();
    let mut chain = SendChain::new();
    chain.push(1, SendOp::Send, true, &[sge(8, 8)]);
    a.qp.post_send(&chain, &table(&[&ra])).unwrap();
    assert_eq!(reap(&a.send_cq, 1)[0].status, WcStatus::Success);
}

/// Streams that were meant for another queue pair do not join this one.
#[test]
fn a_tcp_stream_with_the_wrong_token_is_refused() {
    let o = Options::default();
    let ctx = open_soft(o.config.clone()).unwrap();
    let (cq, qp) = init(&ctx);
    let (_cq2, other) = init(&ctx);
    let (a1, b1) = tcp_pair();
    let (a2, b2) = tcp_pair();
    let (e, eo) = (qp.endpoint(), other.endpoint());
    let wrong = QpEndpoint {
        token: [7; 16],
        ..eo
    };
    let up = |qp: QueuePair<Init>, remote, requester, responder| {
        let link = Link::SoftTcp {
            requester,
            responder,
        };
        let qp = qp
            .rtr(RtrAttr {
                remote,
                link,
                min_rnr_timer: 12,
            })
            .unwrap();
        qp.rts(o.rts).unwrap()
    };
    let qp = up(qp, wrong, a1, a2);
    let _other = up(other, e, b2, b1);
    let mut chain = SendChain::new();
    chain.push(1, SendOp::Send, true, &[]);
    qp.post_send(&chain, &table(&[])).unwrap();
    let c = reap(&cq, 1)[0];
    assert_eq!(
        (c.status, c.vendor_err),
        (WcStatus::RetryExc, vendor::PEER_GONE)
    );
}

#[test]
fn secrets_stay_out_of_debug_output() {
    let (a, _b) = pair(How::Arena);
    let (_cq, qp) = init(&a.ctx);
    let token = format!("{:?}", qp.endpoint().token);
    for text in [
        format!("{:?}", qp.endpoint()),
        format!("{qp:?}"),
        format!("{:?}", a.ctx),
    ] {
        assert!(!text.contains(&token) && !text.contains("token"), "{text}");
    }
}
