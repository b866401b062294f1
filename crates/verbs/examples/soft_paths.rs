//! Prints the throughput of READ and WRITE of 64 KiB blocks over every soft path, beside bare
//! `process_vm_readv`: `cargo run --release -p kvxfer-verbs --example soft_paths`.

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::Instant;

use kvxfer_verbs::{Memory, QpCaps, Remote, SendChain, SendOp, Sge, WcStatus};
use support::{Options, SOFT, TestMemory, all, pair_with, reap, table};

const SPAN: u64 = 128 << 20;
const BLOCK: u64 = 64 << 10;

fn main() {
    let caps = QpCaps {
        max_send_wr: 16_384,
        ..QpCaps::default()
    };
    let o = Options {
        caps,
        ..Options::default()
    };
    let blocks = SPAN / BLOCK;
    let place = |i: u64, odd: u64| (i * odd) % blocks * BLOCK;
    let (near, far) = (
        TestMemory::sealed(SPAN as usize),
        TestMemory::sealed(SPAN as usize),
    );
    for m in [&near, &far] {
        for at in (0..SPAN).step_by(4096) {
            m.put(at as usize, &[at as u8 | 1]);
        }
    }
    for how in SOFT {
        let (a, b) = pair_with(how, &o);
        let (rn, rf) = (a.region(&near, all()), b.region(&far, all()));
        let t = table(&[&rn]);
        for read in [true, false] {
            let mut best = f64::MAX;
            for _ in 0..5 {
                let mut chain = SendChain::new();
                for i in 0..blocks {
                    let addr = rf.addr() + place(i, 0x9e37_79b1);
                    let remote = Remote {
                        addr,
                        rkey: rf.rkey(),
                    };
                    let op = if read {
                        SendOp::Read(remote)
                    } else {
                        SendOp::Write(remote)
                    };
                    let offset = place(i, 0x85eb_ca77);
                    let sge = Sge {
                        region: 0,
                        len: BLOCK as u32,
                        offset,
                    };
                    chain.push(i, op, i + 1 == blocks, &[sge]);
                }
                let start = Instant::now();
                a.qp.post_send(&chain, &t).expect("post");
                assert_eq!(reap(&a.send_cq, 1)[0].status, WcStatus::Success);
                best = best.min(start.elapsed().as_secs_f64());
            }
            let what = if read { "READ" } else { "WRITE" };
            println!("{how:?} {what:5} {:6.2} GB/s", SPAN as f64 / best / 1e9);
        }
    }
    let pid = nix::unistd::getpid();
    let mut best = f64::MAX;
    for _ in 0..5 {
        let start = Instant::now();
        for first in (0..blocks).step_by(16) {
            let at = |base: u64, odd| {
                let list = (first..first + 16).map(move |i| base + place(i, odd));
                list.collect::<Vec<_>>()
            };
            let mut local: Vec<libc::iovec> = Vec::new();
            for addr in at(near.addr(), 0x85eb_ca77) {
                let iov_base = addr as *mut libc::c_void;
                local.push(libc::iovec {
                    iov_base,
                    iov_len: BLOCK as usize,
                });
            }
            let mut remote: Vec<libc::iovec> = Vec::new();
            for addr in at(far.addr(), 0x9e37_79b1) {
                let iov_base = addr as *mut libc::c_void;
                remote.push(libc::iovec {
                    iov_base,
                    iov_len: BLOCK as usize,
                });
            }
            // SAFETY: the spans are inside the two mappings above.
            let n = unsafe {
                libc::process_vm_readv(pid.as_raw(), local.as_ptr(), 16, remote.as_ptr(), 16, 0)
            };
            assert_eq!(n, 16 * BLOCK as isize);
        }
        best = best.min(start.elapsed().as_secs_f64());
    }
    println!(
        "bare process_vm_readv {:6.2} GB/s",
        SPAN as f64 / best / 1e9
    );
}
