//! Every operation over every path, between two contexts.
#![allow(missing_docs, clippy::field_reassign_with_default, reason = "a test")]

mod support;

use kvxfer_verbs::{Remote, SendChain, SendOp, Sge, WcOpcode, WcStatus};
use support::*;

#[test]
fn read_fills_the_destination() {
    for how in every() {
        let (a, b) = pair(how);
        let (src, dst) = (TestMemory::sealed(1 << 20), TestMemory::sealed(1 << 20));
        src.put(0, &pattern(1 << 20, 7));
        let rs = b.region(&src, all());
        let rd = a.region(&dst, all());
        let mut chain = SendChain::new();
        for i in 0..64u64 {
            let remote = Remote {
                addr: rs.addr() + (i * 37 % 64) * 4096 + 3,
                rkey: rs.rkey(),
            };
            let sge = Sge {
                region: 0,
                len: 4093,
                offset: i * 4096 + 1,
            };
            chain.push(i, SendOp::Read(remote), i == 63, &[sge]);
        }
        a.qp.post_send(&chain, &table(&[&rd])).unwrap();
        let got = reap(&a.send_cq, 1);
        assert_eq!(got[0].status, WcStatus::Success, "{how:?} {got:?}");
        assert_eq!((got[0].wr_id, got[0].opcode()), (63, Some(WcOpcode::Read)));
        let all = pattern(1 << 20, 7);
        for i in 0..64usize {
            let from = (i * 37 % 64) * 4096 + 3;
            assert_eq!(
                dst.get(i * 4096 + 1, 4093),
                all[from..from + 4093],
                "{how:?} {i}"
            );
        }
    }
}

#[test]
fn write_fills_the_target() {
    for how in every() {
        let (a, b) = pair(how);
        let (src, dst) = (TestMemory::sealed(1 << 20), TestMemory::sealed(1 << 20));
        src.put(0, &pattern(1 << 20, 9));
        let rs = a.region(&src, all());
        let rd = b.region(&dst, all());
        let mut chain = SendChain::new();
        for i in 0..64u64 {
            let remote = Remote {
                addr: rd.addr() + (i * 37 % 64) * 4096 + 5,
                rkey: rd.rkey(),
            };
            let sge = Sge {
                region: 0,
                len: 4001,
                offset: i * 4096 + 2,
            };
            chain.push(i, SendOp::Write(remote), i == 63, &[sge]);
        }
        a.qp.post_send(&chain, &table(&[&rs])).unwrap();
        let got = reap(&a.send_cq, 1);
        assert_eq!(got[0].status, WcStatus::Success, "{how:?} {got:?}");
        let all = pattern(1 << 20, 9);
        for i in 0..64usize {
            let to = (i * 37 % 64) * 4096 + 5;
            assert_eq!(
                dst.get(to, 4001),
                all[i * 4096 + 2..i * 4096 + 2 + 4001],
                "{how:?} {i}"
            );
        }
    }
}

#[test]
fn send_fills_receives_in_order_with_their_values() {
    for how in every() {
        let (a, b) = pair(how);
        let (src, dst) = (TestMemory::sealed(1 << 16), TestMemory::sealed(1 << 16));
        src.put(0, &pattern(1 << 16, 3));
        let (rs, rd) = (a.region(&src, all()), b.region(&dst, all()));
        let (ts, td) = (table(&[&rs]), table(&[&rd]));
        for i in 0..4u64 {
            // Two spans a receive, the first one odd.
            let sges = [
                Sge {
                    region: 0,
                    len: 1001,
                    offset: i * 8192,
                },
                Sge {
                    region: 0,
                    len: 3000,
                    offset: i * 8192 + 2000,
                },
            ];
            b.qp.post_recv(100 + i, &sges, &td).unwrap();
        }
        let mut chain = SendChain::new();
        let sge = |len, offset| Sge {
            region: 0,
            len,
            offset,
        };
        chain.push(
            0,
            SendOp::Send,
            false,
            &[sge(700, 1), sge(900, 5000), sge(0, 0)],
        );
        chain.push(1, SendOp::SendImm(77), false, &[sge(4001, 9000)]);
        chain.push(2, SendOp::Send, false, &[]);
        let remote = Remote {
            addr: rd.addr() + 40_000,
            rkey: rd.rkey(),
        };
        chain.push(3, SendOp::WriteImm(remote, 78), true, &[sge(513, 20_000)]);
        a.qp.post_send(&chain, &ts).unwrap();
        let sent = reap(&a.send_cq, 1);
        assert_eq!(
            (sent[0].wr_id, sent[0].status),
            (3, WcStatus::Success),
            "{how:?}"
        );
        let got = reap(&b.recv_cq, 4);
        let brief: Vec<_> = got
            .iter()
            .map(|c| (c.wr_id, c.opcode(), c.byte_len(), c.imm()))
            .collect();
        let recv = Some(WcOpcode::Recv);
        assert_eq!(
            brief,
            [
                (100, recv, Some(1600), None),
                (101, recv, Some(4001), Some(77)),
                (102, recv, Some(0), None),
                (103, Some(WcOpcode::RecvWriteImm), Some(513), Some(78)),
            ],
            "{how:?}"
        );
        let all = pattern(1 << 16, 3);
        let message = [&all[1..701], &all[5000..5900]].concat();
        assert_eq!(dst.get(0, 1001), message[..1001], "{how:?}");
        assert_eq!(dst.get(2000, 599), message[1001..], "{how:?}");
        assert_eq!(dst.get(8192, 1001), all[9000..10_001], "{how:?}");
        assert_eq!(dst.get(10_192, 3000), all[10_001..13_001], "{how:?}");
        assert_eq!(dst.get(40_000, 513), all[20_000..20_513], "{how:?}");
    }
}

#[test]
fn large_messages_of_many_spans_cross_in_slices() {
    for how in every() {
        let (a, b) = pair(how);
        let len = a.ctx.device().max_msg_sz.min(24 << 20) as usize;
        let (near, far) = (TestMemory::sealed(len), TestMemory::sealed(len));
        near.put(0, &pattern(len, 1));
        let (rn, rf) = (a.region(&near, all()), b.region(&far, all()));
        let t = table(&[&rn]);
        let part = (len / 4) as u32;
        let remote = Remote {
            addr: rf.addr(),
            rkey: rf.rkey(),
        };
        // Quarters in another order there, and back.
        let order = [2u64, 0, 3, 1];
        let sges = order.map(|q| Sge {
            region: 0,
            len: part,
            offset: q * u64::from(part),
        });
        let mut chain = SendChain::new();
        chain.push(1, SendOp::Write(remote), true, &sges);
        a.qp.post_send(&chain, &t).unwrap();
        assert_eq!(reap(&a.send_cq, 1)[0].status, WcStatus::Success, "{how:?}");
        let all = pattern(len, 1);
        let there: Vec<u8> = order
            .iter()
            .flat_map(|q| &all[*q as usize * len / 4..(*q as usize + 1) * len / 4])
            .copied()
            .collect();
        assert!(far.get(0, len) == there, "{how:?} write");
        near.put(0, &vec![0; len]);
        chain.clear();
        chain.push(2, SendOp::Read(remote), true, &sges);
        a.qp.post_send(&chain, &t).unwrap();
        let got = reap(&a.send_cq, 1);
        assert_eq!(
            (got[0].status, got[0].byte_len()),
            (WcStatus::Success, Some(len as u32))
        );
        assert!(near.get(0, len) == all, "{how:?} read");
    }
}

#[test]
fn a_read_sees_the_writes_before_it() {
    for how in every() {
        let (a, b) = pair(how);
        let (near, far) = (TestMemory::sealed(1 << 16), TestMemory::sealed(1 << 16));
        near.put(0, &pattern(4096, 5));
        let (rn, rf) = (a.region(&near, all()), b.region(&far, all()));
        let remote = Remote {
            addr: rf.addr() + 64,
            rkey: rf.rkey(),
        };
        let sge = |offset| Sge {
            region: 0,
            len: 4096,
            offset,
        };
        let mut chain = SendChain::new();
        for i in 0..50 {
            chain.push(i * 2, SendOp::Write(remote), false, &[sge(0)]);
            chain.push(i * 2 + 1, SendOp::Read(remote), i == 49, &[sge(8192)]);
        }
        a.qp.post_send(&chain, &table(&[&rn])).unwrap();
        assert_eq!(reap(&a.send_cq, 1)[0].status, WcStatus::Success, "{how:?}");
        assert_eq!(near.get(8192, 4096), pattern(4096, 5), "{how:?}");
    }
}

#[test]
fn memory_without_a_file_works_on_the_arena_path() {
    let (a, b) = pair(How::Arena);
    let (near, far) = (
        TestMemory::anonymous(1 << 16),
        TestMemory::anonymous(1 << 16),
    );
    let file = TestMemory::sealed(1 << 16);
    far.put(0, &pattern(1 << 16, 8));
    file.put(0, &pattern(1 << 16, 6));
    let (rn, rf, rx) = (
        a.region(&near, all()),
        b.region(&far, all()),
        a.region(&file, all()),
    );
    let t = table(&[&rn, &rx]);
    let remote = |at| Remote {
        addr: rf.addr() + at,
        rkey: rf.rkey(),
    };
    let mut chain = SendChain::new();
    chain.push(
        1,
        SendOp::Read(remote(100)),
        false,
        &[Sge {
            region: 0,
            len: 5000,
            offset: 0,
        }],
    );
    // One message from both kinds of memory.
    let both = [
        Sge {
            region: 1,
            len: 300,
            offset: 7,
        },
        Sge {
            region: 0,
            len: 5000,
            offset: 0,
        },
    ];
    chain.push(2, SendOp::Write(remote(20_000)), true, &both);
    a.qp.post_send(&chain, &t).unwrap();
    assert_eq!(reap(&a.send_cq, 1)[0].status, WcStatus::Success);
    let all = pattern(1 << 16, 8);
    assert_eq!(near.get(0, 5000), all[100..5100]);
    assert_eq!(far.get(20_000, 300), pattern(1 << 16, 6)[7..307]);
    assert_eq!(far.get(20_300, 5000), all[100..5100]);
}

#[test]
fn both_sides_send_at_once() {
    for how in every() {
        let (a, b) = pair(how);
        let (ma, mb) = (TestMemory::sealed(8 << 20), TestMemory::sealed(8 << 20));
        ma.put(0, &pattern(2 << 20, 1));
        mb.put(0, &pattern(2 << 20, 2));
        let (ra, rb) = (a.region(&ma, all()), b.region(&mb, all()));
        std::thread::scope(|s| {
            for (me, own, other) in [(&a, &ra, &rb), (&b, &rb, &ra)] {
                s.spawn(move || {
                    let mut chain = SendChain::new();
                    let sge = |offset| Sge {
                        region: 0,
                        len: 2 << 20,
                        offset,
                    };
                    let at = |o| Remote {
                        addr: other.addr() + o,
                        rkey: other.rkey(),
                    };
                    chain.push(1, SendOp::Read(at(0)), false, &[sge(2 << 20)]);
                    chain.push(2, SendOp::Write(at(4 << 20)), true, &[sge(0)]);
                    me.qp.post_send(&chain, &table(&[own])).unwrap();
                    assert_eq!(reap(&me.send_cq, 1)[0].status, WcStatus::Success, "{how:?}");
                });
            }
        });
        assert!(ma.get(2 << 20, 2 << 20) == pattern(2 << 20, 2), "{how:?}");
        assert!(ma.get(4 << 20, 2 << 20) == pattern(2 << 20, 2), "{how:?}");
        assert!(mb.get(2 << 20, 2 << 20) == pattern(2 << 20, 1), "{how:?}");
        assert!(mb.get(4 << 20, 2 << 20) == pattern(2 << 20, 1), "{how:?}");
    }
}

#[test]
fn an_armed_queue_sleeps_until_something_comes() {
    use nix::poll::{PollFd, PollFlags, poll};
    for how in every() {
        let (a, b) = pair(how);
        let mem = TestMemory::sealed(4096);
        let (ra, rb) = (a.region(&mem, all()), b.region(&mem, all()));
        b.qp.post_recv(
            1,
            &[Sge {
                region: 0,
                len: 8,
                offset: 0,
            }],
            &table(&[&rb]),
        )
        .unwrap();
        let readable = |cq: &kvxfer_verbs::CompletionQueue, ms: u16| {
            poll(&mut [PollFd::new(cq.as_fd(), PollFlags::POLLIN)], ms).unwrap() == 1
        };
        let quiet = |cq: &kvxfer_verbs::CompletionQueue| {
            let mut out = Vec::new();
            // Bring-up itself may wake it once or twice.
            for _ in 0..100 {
                let more = cq.poll(&mut out, 16).unwrap().more;
                if !more && cq.arm().unwrap() && !readable(cq, 20) {
                    return out.is_empty();
                }
            }
            false
        };
        assert!(quiet(&a.send_cq) && quiet(&b.recv_cq), "{how:?}");
        let mut chain = SendChain::new();
        chain.push(
            1,
            SendOp::Send,
            true,
            &[Sge {
                region: 0,
                len: 8,
                offset: 64,
            }],
        );
        // Posted while armed: wakes the poller, which must do the sending.
        a.qp.post_send(&chain, &table(&[&ra])).unwrap();
        assert!(readable(&a.send_cq, 5000), "{how:?}");
        assert_eq!(reap(&a.send_cq, 1)[0].status, WcStatus::Success, "{how:?}");
        // The receive's completion came from another thread.
        assert!(readable(&b.recv_cq, 5000), "{how:?}");
        assert_eq!(reap(&b.recv_cq, 1)[0].wr_id, 1);
        assert!(quiet(&a.send_cq) && quiet(&b.recv_cq), "{how:?}");
    }
}

#[test]
fn the_null_device_completes_at_once_and_moves_nothing() {
    use kvxfer_verbs::*;
    let ctx = open_null();
    assert_eq!(ctx.device().kind, DeviceKind::Null);
    let pd = ctx.alloc_pd().unwrap();
    let cq = ctx.create_cq(4).unwrap();
    let caps = QpCaps {
        max_send_wr: 4,
        ..QpCaps::default()
    };
    let qp = pd.create_qp(caps, &cq, &cq).unwrap();
    let qp = qp.init(InitAttr::new(Access::NONE)).unwrap();
    let remote = qp.endpoint();
    let link = Link::SoftAwait {
        path: SoftPath::Arena,
    };
    let qp = qp
        .rtr(RtrAttr {
            remote,
            link,
            min_rnr_timer: 0,
        })
        .unwrap();
    let qp = qp.rts(RtsAttr::default()).unwrap();
    let t = std::sync::Arc::new(RegionTable::default());
    let mut chain = SendChain::new();
    for i in 0..5 {
        chain.push(i, SendOp::Send, i == 1 || i == 3, &[]);
    }
    let e = qp.post_send(&chain, &t).unwrap_err();
    assert_eq!((e.posted, e.cause), (4, PostCause::QueueFull));
    assert_eq!(
        reap(&cq, 2).iter().map(|c| c.wr_id).collect::<Vec<_>>(),
        [1, 3]
    );
    assert_eq!(qp.send_credits(), 4);
}
