//! Keys, bounds, rights and domains: what may be touched, and until when.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::support::*;
use crate::{S, sge};
use kvxfer_verbs::*;

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
    for how in every() {
        let o = Options::default();
        type Make = fn(Remote) -> SendOp;
        for make in [SendOp::Read as Make, SendOp::Write as Make] {
            // Of a region with these rights, so many bytes of a place that is worked out from it.
            let refused = |access, vendor, len, place: &dyn Fn(&MemoryRegion) -> Remote| {
                let c = violate(how, &o, access, |r| (make(place(r)), sge(len, 0)));
                assert_failed(how, &c, (WcStatus::RemAccess, vendor), &[]);
            };
            type Addr = fn(u64) -> u64;
            let beyond: [(Addr, u32); 3] = [
                (|start| start + u64::from(S) - 4095, 4096),
                (|start| start - 1, 1),
                (|_| u64::MAX - 3, 8),
            ];
            for (addr, len) in beyond {
                refused(all(), vendor::BOUNDS, len, &|r| Remote {
                    addr: addr(r.addr()),
                    rkey: r.rkey(),
                });
            }
            let begin = |r: &MemoryRegion| Remote {
                addr: r.addr(),
                rkey: r.rkey(),
            };
            refused(Access::LOCAL_WRITE, vendor::RIGHTS, 8, &begin);
            // Another generation of the same slot, and a slot that does not exist.
            for flip in [0x0001_0000, 0x0000_ffff] {
                refused(all(), vendor::BAD_KEY, 8, &|r| Remote {
                    rkey: r.rkey() ^ flip,
                    ..begin(r)
                });
            }
            // Out of its own region.
            let c = violate(how, &o, all(), |r| {
                (make(begin(r)), sge(8, u64::from(S) - 7))
            });
            let own = (WcStatus::LocProt, c.vendor_err);
            assert_failed(how, &c, own, &[WcStatus::LocQpOp]);
        }
    }
}

#[test]
fn the_queue_pairs_own_rights_count() {
    for how in every() {
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
        let refused = (WcStatus::RemAccess, vendor::RIGHTS);
        assert_failed(how, &c, refused, &[WcStatus::RemInvReq]);
    }
}

#[test]
fn domains_are_apart_on_both_sides() {
    for how in every() {
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
        let c = reap(&a.send_cq, 1)[0];
        let own = (WcStatus::LocProt, c.vendor_err);
        assert_failed(how, &c, own, &[WcStatus::LocQpOp]);
    }
}

#[test]
fn a_deregistered_region_is_refused_and_never_written() {
    for how in every() {
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

/// Says that it is a GPU's. At its address there is nothing that a CPU could read.
#[derive(Debug)]
struct FakeGpuMemory;

// SAFETY: the contract lets nobody go to an address that is not the host's, and of `gpu` there is none.
unsafe impl Memory for FakeGpuMemory {
    fn addr(&self) -> u64 {
        0x1000
    }
    fn len(&self) -> u64 {
        1 << 20
    }
    fn kind(&self) -> MemoryKind {
        MemoryKind::Device {
            gpu: "0000:1b:00.0".parse().unwrap(),
        }
    }
    fn fd(&self) -> Option<FdSpan<'_>> {
        None
    }
}

/// The software device would take its address for a pointer, and die of it.
#[test]
fn memory_that_is_not_the_hosts_is_refused_before_the_software_device_has_it() {
    let mut devices = vec![open_null()];
    for how in SOFT {
        devices.push(open_pair(how, &Options::default()).0);
    }
    for ctx in devices {
        let pd = ctx.alloc_pd().unwrap();
        let refused = pd.register(Arc::new(FakeGpuMemory), all()).map(drop);
        let name = &ctx.device().name;
        let words = refused.as_ref().map_err(ToString::to_string);
        assert_eq!(
            words,
            Err(format!(
                "{name} cannot register 1048576 bytes of memory of GPU 0000:1b:00.0: it does not reach those"
            ))
        );
        assert!(matches!(
            refused,
            Err(Error::RegisterKind { len: 0x10_0000, .. })
        ));
    }
}
