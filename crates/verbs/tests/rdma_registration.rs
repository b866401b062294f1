//! Registration on RDMA devices at its limits: regions beyond 2 GiB, and less locked memory allowed than is wanted.
//! For a machine with RDMA devices, which `KVXFER_TEST_RDMA` names.

mod support;

use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvxfer_verbs::{
    Access, Error, FdSpan, Memory, MemoryKind, Remote, SendChain, SendOp, Sge, WcStatus,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use support::{How, TestMemory, all, pair, pattern, reap, table};

/// 2^31 is no multiple of it: an offset that has lost its upper bits is at other bytes.
const PIECE: u64 = 12 << 20;
const PIECES: u64 = 214;

/// One stretch of 2.5 GiB with the same 12 MiB in it again and again: a device takes it as it takes any, and it costs
/// no more memory than that.
#[derive(Debug)]
struct Mirrors {
    addr: u64,
    piece: Arc<TestMemory>,
}

// SAFETY: the mappings are made in `new` and unmapped only in `drop`.
unsafe impl Memory for Mirrors {
    fn addr(&self) -> u64 {
        self.addr
    }
    fn len(&self) -> u64 {
        PIECE * PIECES
    }
    fn kind(&self) -> MemoryKind {
        MemoryKind::Host
    }
    fn fd(&self) -> Option<FdSpan<'_>> {
        None
    }
}

impl Mirrors {
    fn new() -> Arc<Self> {
        let piece = TestMemory::sealed(PIECE as usize);
        let raw = piece.fd().expect("a memfd").fd.as_raw_fd();
        let len = (PIECE * PIECES) as usize;
        let (nothing, reserved) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping.
        let room = unsafe { libc::mmap(std::ptr::null_mut(), len, nothing, reserved, -1, 0) };
        assert_ne!(room, libc::MAP_FAILED);
        let mirrors = Self {
            addr: room as u64,
            piece,
        };
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        for at in 0..PIECES {
            let to = (mirrors.addr + at * PIECE) as *mut libc::c_void;
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            // SAFETY: over a part of what was reserved just now, which nobody else knows of.
            let there = unsafe { libc::mmap(to, PIECE as usize, rights, flags, raw, 0) };
            assert_eq!(there, to);
        }
        Arc::new(mirrors)
    }
}

impl Drop for Mirrors {
    fn drop(&mut self) {
        let len = (PIECE * PIECES) as usize;
        // SAFETY: what `new` has mapped.
        unsafe { libc::munmap(self.addr as *mut libc::c_void, len) };
    }
}

/// On either side of a work request, to and from what is beyond 2^31 and across it, nothing wraps.
#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn regions_of_more_than_two_gigabytes() {
    const LEN: u32 = 5000;
    let (a, b) = pair(How::Rdma(0));
    let (large, small) = (Mirrors::new(), TestMemory::anonymous(0x4000));
    let near =
        a.pd.register(Arc::clone(&large) as Arc<dyn Memory>, all())
            .unwrap();
    let far =
        b.pd.register(Arc::clone(&large) as Arc<dyn Memory>, all())
            .unwrap();
    let (here, there) = (a.region(&small, all()), b.region(&small, all()));
    // The last bytes before, the first after, across, and the end.
    let edge = 1_u64 << 31;
    for (at, start) in [
        edge - u64::from(LEN),
        edge,
        edge - 100,
        large.len() - u64::from(LEN),
    ]
    .into_iter()
    .enumerate()
    {
        let seed = u8::try_from(at).unwrap();
        let within = (start % PIECE) as usize;
        let sent = pattern(LEN as usize, seed);
        small.put(0, &sent);
        let sge = |region, offset| Sge {
            region,
            len: LEN,
            offset,
        };
        let regions = table(&[&near, &here]);
        let mut chain = SendChain::new();
        let to_large = Remote {
            addr: far.addr() + start,
            rkey: far.rkey(),
        };
        chain.push(1, SendOp::Write(to_large), true, &[sge(1, 0)]);
        a.qp.post_send(&chain, &regions).unwrap();
        assert_eq!(reap(&a.send_cq, 1)[0].status, WcStatus::Success);
        let arrived = large.piece.get(within, sent.len());
        assert!(arrived == sent, "{start:#x}");
        // And out of the large one, as the local side, into the small one's other half.
        chain.clear();
        let to_small = Remote {
            addr: there.addr() + 0x2000,
            rkey: there.rkey(),
        };
        chain.push(2, SendOp::Write(to_small), true, &[sge(0, start)]);
        a.qp.post_send(&chain, &regions).unwrap();
        assert_eq!(reap(&a.send_cq, 1)[0].status, WcStatus::Success);
        assert!(small.get(0x2000, sent.len()) == sent, "{start:#x}");
        chain.clear();
        chain.push(3, SendOp::Read(to_large), true, &[sge(1, 0x1000)]);
        small.put(0x1000, &vec![0; sent.len()]);
        a.qp.post_send(&chain, &regions).unwrap();
        assert_eq!(reap(&a.send_cq, 1)[0].status, WcStatus::Success);
        assert!(small.get(0x1000, sent.len()) == sent, "{start:#x}");
    }
    // One byte beyond the end is refused by the peer, and not wrapped to the beginning.
    let mut chain = SendChain::new();
    let beyond = Remote {
        addr: far.addr() + large.len() - 7,
        rkey: far.rkey(),
    };
    let eight = Sge {
        region: 0,
        len: 8,
        offset: 0,
    };
    chain.push(4, SendOp::Write(beyond), true, &[eight]);
    a.qp.post_send(&chain, &table(&[&here])).unwrap();
    assert_eq!(reap(&a.send_cq, 1)[0].status, WcStatus::RemAccess);
}

/// The limit and how to raise it are told.
#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn too_little_locked_memory_is_named_with_the_limit() {
    let (side, _) = pair(How::Rdma(0));
    let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
    setrlimit(Resource::RLIMIT_MEMLOCK, 64 << 10, hard).unwrap();
    let refused = std::thread::scope(|scope| {
        let unprivileged = scope.spawn(|| {
            // Of this thread alone, which the wrapper in libc would not leave it at: the others stay root.
            // SAFETY: numbers.
            let dropped = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
            assert_eq!(dropped, 0);
            let memory = TestMemory::anonymous(1 << 20);
            side.pd.register(memory, Access::LOCAL_WRITE).map(|_| ())
        });
        unprivileged.join().unwrap()
    });
    setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard).unwrap();
    let refused = refused.expect_err("it may not lock so much");
    let words = refused.to_string();
    println!("{words}");
    let Error::Register { memlock, len, .. } = refused else {
        panic!("{words}");
    };
    assert_eq!((memlock, len), (Some(64 << 10), 1 << 20));
    assert!(
        words.contains("65536") && words.contains("ulimit -l"),
        "{words}"
    );
    // As root it goes.
    let memory = TestMemory::anonymous(1 << 20);
    side.pd.register(memory, Access::LOCAL_WRITE).unwrap();
}
