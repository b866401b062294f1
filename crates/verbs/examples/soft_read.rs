//! Prints what a 4 KiB READ costs over the arena path beside a bare memcpy of the same pairs, and
//! what the software around it costs: `cargo run --release -p kvxfer-verbs --example soft_read`.

#[path = "../tests/support/mod.rs"]
mod support;

use std::hint::black_box;
use std::time::Duration;

use kvxfer_verbs::{
    Access, InitAttr, Link, Memory, QpCaps, Remote, RtrAttr, RtsAttr, SendChain, SendOp, Sge,
    WcStatus, open_null,
};
use nix::time::{ClockId, clock_gettime};
use support::{How, Options, TestMemory, all, pair_with, table};

const ARENA: u64 = 256 << 20;
const BLOCK: u64 = 4096;

/// The CPU time of this thread, so that neighbours on the machine count less.
struct Clock(Duration);

impl Clock {
    fn now() -> Self {
        Self(
            clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
                .expect("clock")
                .into(),
        )
    }

    fn elapsed(&self) -> Duration {
        Self::now().0 - self.0
    }
}

fn main() {
    let caps = QpCaps {
        max_send_wr: 16_384,
        ..QpCaps::default()
    };
    let (a, b) = pair_with(
        How::Arena,
        &Options {
            caps,
            ..Options::default()
        },
    );
    let (src, dst) = (
        TestMemory::sealed(ARENA as usize),
        TestMemory::sealed(ARENA as usize),
    );
    for m in [&src, &dst] {
        // SAFETY: advice on the memory's own mapping.
        let _ = unsafe {
            libc::madvise(
                m.addr() as *mut libc::c_void,
                ARENA as usize,
                libc::MADV_HUGEPAGE,
            )
        };
    }
    for m in [&src, &dst] {
        for at in (0..ARENA).step_by(4096) {
            m.put(at as usize, &[at as u8 | 1]);
        }
    }
    let rs = b.region(&src, Access::REMOTE_READ);
    let rd = a.region(&dst, all());
    let t = table(&[&rd]);
    let blocks = ARENA / BLOCK;
    // A fixed shuffle: multiplication by an odd number is a permutation of a power of two.
    let pairs: Vec<(u64, u64)> = (0..blocks)
        .map(|i| {
            (
                (i * 0x9e37_79b1) % blocks * BLOCK,
                (i * 0x85eb_ca77) % blocks * BLOCK,
            )
        })
        .collect();
    let mut chain = SendChain::new();
    let mut out = Vec::new();
    let (mut read, mut copy) = (Vec::new(), Vec::new());
    for round in 0..9 {
        let start = Clock::now();
        for batch in pairs.chunks(256) {
            chain.clear();
            for (i, (from, to)) in batch.iter().enumerate() {
                let remote = Remote {
                    addr: rs.addr() + from,
                    rkey: rs.rkey(),
                };
                let sge = Sge {
                    region: 0,
                    len: BLOCK as u32,
                    offset: *to,
                };
                chain.push(i as u64, SendOp::Read(remote), i + 1 == batch.len(), &[sge]);
            }
            a.qp.post_send(&chain, &t).expect("post");
            out.clear();
            while out.is_empty() {
                a.send_cq.poll(&mut out, 16).expect("poll");
            }
            assert_eq!(out[0].status, WcStatus::Success);
        }
        let took = start.elapsed();
        let start = Clock::now();
        for (from, to) in &pairs {
            let (s, d) = (src.addr() + from, dst.addr() + to);
            // SAFETY: both spans are inside their mappings, which are different files.
            unsafe { std::ptr::copy_nonoverlapping(s as *const u8, d as *mut u8, BLOCK as usize) };
        }
        let bare = start.elapsed();
        // The first round maps and faults.
        if round > 0 {
            read.push(took.as_nanos() as f64 / blocks as f64);
            copy.push(bare.as_nanos() as f64 / blocks as f64);
        }
    }
    read.sort_by(f64::total_cmp);
    copy.sort_by(f64::total_cmp);
    let (r, c) = (read[read.len() / 2], copy[copy.len() / 2]);
    println!(
        "arena 4 KiB READ  {r:7.1} ns  memcpy {c:7.1} ns  ratio {:.3}",
        c / r
    );
    for len in [64u32, 8] {
        let n = 2_000_000u64;
        let start = Clock::now();
        for base in (0..n).step_by(256) {
            chain.clear();
            for i in 0..256 {
                let at = (base + i) % 512 * 64;
                let remote = Remote {
                    addr: rs.addr() + at,
                    rkey: rs.rkey(),
                };
                chain.push(
                    i,
                    SendOp::Read(remote),
                    i == 255,
                    &[Sge {
                        region: 0,
                        len,
                        offset: at,
                    }],
                );
            }
            a.qp.post_send(&chain, &t).expect("post");
            out.clear();
            while out.is_empty() {
                a.send_cq.poll(&mut out, 16).expect("poll");
            }
        }
        println!(
            "arena {len:3} B READ  {:7.1} ns",
            start.elapsed().as_nanos() as f64 / n as f64
        );
    }
    null(&mut chain);
}

/// Posting and polling on the null device.
fn null(chain: &mut SendChain) {
    let ctx = open_null();
    let pd = ctx.alloc_pd().expect("pd");
    let cq = ctx.create_cq(4096).expect("cq");
    let mem = TestMemory::anonymous(1 << 20);
    let region = pd.register(mem, all()).expect("register");
    let qp = pd.create_qp(QpCaps::default(), &cq, &cq).expect("qp");
    let qp = qp.init(InitAttr::new(Access::NONE)).expect("init");
    let remote = qp.endpoint();
    let link = Link::SoftAwait {
        path: kvxfer_verbs::SoftPath::Arena,
    };
    let qp = qp
        .rtr(RtrAttr {
            remote,
            link,
            min_rnr_timer: 12,
        })
        .expect("rtr");
    let qp = qp.rts(RtsAttr::default()).expect("rts");
    let t = table(&[&region]);
    let n = 20_000_000u64;
    let mut out = Vec::new();
    let start = Clock::now();
    for base in (0..n).step_by(256) {
        chain.clear();
        for i in 0..256 {
            let remote = Remote {
                addr: base + i,
                rkey: 1,
            };
            let sge = Sge {
                region: 0,
                len: 4096,
                offset: 0,
            };
            chain.push(i, SendOp::Read(remote), i == 255, &[sge]);
        }
        qp.post_send(black_box(chain), &t).expect("post");
        out.clear();
        cq.poll(&mut out, 16).expect("poll");
        assert_eq!(out.len(), 1);
    }
    let s = start.elapsed().as_secs_f64();
    println!(
        "null device       {:7.1} M operations/s",
        n as f64 / s / 1e6
    );
}
