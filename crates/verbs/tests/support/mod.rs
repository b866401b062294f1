//! What the tests share: memory, and pairs of connected queue pairs.
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    reason = "every binary uses a part"
)]

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer_verbs::{
    Access, Completion, CompletionQueue, Context, FdSpan, InitAttr, Link, Memory, MemoryKind,
    MemoryRegion, ProtectionDomain, QpCaps, QueuePair, RdmaConfig, RegionTable, RtrAttr, Rts,
    RtsAttr, SoftConfig, SoftPath, WcStatus, open_rdma, open_soft,
};

pub fn all() -> Access {
    Access::LOCAL_WRITE | Access::REMOTE_READ | Access::REMOTE_WRITE
}

pub const WAIT: Duration = Duration::from_secs(20);

/// Memory of a memfd, or anonymous.
#[derive(Debug)]
pub struct TestMemory {
    addr: u64,
    len: u64,
    fd: Option<OwnedFd>,
}

// SAFETY: the mapping is made in `new`, is unmapped only in `drop`, and is touched only through
// raw pointers.
unsafe impl Memory for TestMemory {
    fn addr(&self) -> u64 {
        self.addr
    }
    fn len(&self) -> u64 {
        self.len
    }
    fn kind(&self) -> MemoryKind {
        MemoryKind::Host
    }
    fn fd(&self) -> Option<FdSpan<'_>> {
        self.fd.as_ref().map(|fd| FdSpan {
            fd: fd.as_fd(),
            offset: 0,
        })
    }
}

impl Drop for TestMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`.
        unsafe { libc::munmap(self.addr as *mut libc::c_void, self.len as usize) };
    }
}

impl TestMemory {
    pub fn memfd(len: usize, seals: i32) -> Arc<Self> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: a C string and flags.
        let raw = unsafe { libc::memfd_create(c"test".as_ptr(), flags) };
        assert!(raw >= 0);
        // SAFETY: a new descriptor.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(raw) });
        file.set_len(len as u64).unwrap();
        // SAFETY: takes an int.
        let rc = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) };
        assert_eq!(rc, 0);
        Self::map(len, Some(file.into()))
    }

    pub fn sealed(len: usize) -> Arc<Self> {
        Self::memfd(len, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW)
    }

    pub fn anonymous(len: usize) -> Arc<Self> {
        Self::map(len, None)
    }

    fn map(len: usize, fd: Option<OwnedFd>) -> Arc<Self> {
        let (flags, raw) = match &fd {
            Some(fd) => (libc::MAP_SHARED, fd.as_raw_fd()),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        };
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping.
        let p = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, raw, 0) };
        assert_ne!(p, libc::MAP_FAILED);
        Arc::new(Self {
            addr: p as u64,
            len: len as u64,
            fd,
        })
    }

    pub fn put(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.len as usize);
        let dst = (self.addr + offset as u64) as *mut u8;
        // SAFETY: inside the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), dst, bytes.len()) };
    }

    pub fn get(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= self.len as usize);
        let mut out = vec![0; len];
        let src = (self.addr + offset as u64) as *const u8;
        // SAFETY: inside the mapping.
        unsafe { std::ptr::copy_nonoverlapping(src, out.as_mut_ptr(), len) };
        out
    }
}

pub fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8) ^ seed)
        .collect()
}

/// How a pair is joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    Arena,
    ProcessVm,
    Tcp,
    /// Over a pair of RDMA devices, by its place in [`rdma_pairs`].
    Rdma(usize),
}

/// The RDMA devices that the tests are to run on instead of the software device: `KVXFER_TEST_RDMA` has
/// pairs of them, `rxe0,ra:rb`; one alone talks to itself.
pub fn rdma_pairs() -> Vec<(String, String)> {
    let text = std::env::var("KVXFER_TEST_RDMA").unwrap_or_default();
    text.split(',')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (a, b) = pair.split_once(':').unwrap_or((pair, pair));
            (a.to_owned(), b.to_owned())
        })
        .collect()
}

/// The ways of the software device.
pub const SOFT: [How; 3] = [How::Arena, How::ProcessVm, How::Tcp];

/// Every way to join a pair that the tests are to try.
pub fn every() -> Vec<How> {
    let rdma: Vec<How> = (0..rdma_pairs().len()).map(How::Rdma).collect();
    if rdma.is_empty() { SOFT.to_vec() } else { rdma }
}

pub struct Side {
    pub ctx: Context,
    pub pd: ProtectionDomain,
    pub send_cq: CompletionQueue,
    pub recv_cq: CompletionQueue,
    pub qp: QueuePair<Rts>,
}

impl Side {
    pub fn region(&self, mem: &Arc<TestMemory>, access: Access) -> MemoryRegion {
        self.pd
            .register(Arc::clone(mem) as Arc<dyn Memory>, access)
            .unwrap()
    }
}

#[derive(Clone)]
pub struct Options {
    pub config: SoftConfig,
    pub caps: QpCaps,
    pub access: Access,
    pub rts: RtsAttr,
    pub min_rnr_timer: u8,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            config: SoftConfig::default(),
            caps: QpCaps::default(),
            access: all(),
            rts: RtsAttr::default(),
            min_rnr_timer: 12,
        }
    }
}

pub fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (a, listener.accept().unwrap().0)
}

pub fn pair(how: How) -> (Side, Side) {
    pair_with(how, &Options::default())
}

pub fn pair_with(how: How, o: &Options) -> (Side, Side) {
    let (a, b) = open_pair(how, o);
    join(how, o, &a, &b)
}

/// The two devices of a pair.
pub fn open_pair(how: How, o: &Options) -> (Context, Context) {
    match how {
        How::Rdma(at) => {
            let (a, b) = &rdma_pairs()[at];
            let open = |name: &String| {
                open_rdma(&RdmaConfig::new(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
            };
            (open(a), open(b))
        }
        _ => {
            let open = || open_soft(o.config.clone()).unwrap();
            (open(), open())
        }
    }
}

/// The two ends of the way from one context to `b`.
pub fn links(how: How, b: &Context) -> (Link, Link) {
    let path = if how == How::ProcessVm {
        SoftPath::ProcessVm
    } else {
        SoftPath::Arena
    };
    match how {
        How::Tcp => {
            let (a1, b1) = tcp_pair();
            let (a2, b2) = tcp_pair();
            (
                Link::SoftTcp {
                    requester: a1,
                    responder: a2,
                },
                Link::SoftTcp {
                    requester: b2,
                    responder: b1,
                },
            )
        }
        How::Rdma(_) => (Link::Rdma, Link::Rdma),
        _ => (
            Link::SoftDial {
                peer: b.address(),
                path,
                deadline: Instant::now() + WAIT,
            },
            Link::SoftAwait { path },
        ),
    }
}

pub fn join(how: How, o: &Options, a: &Context, b: &Context) -> (Side, Side) {
    let make = |ctx: &Context| {
        let pd = ctx.alloc_pd().unwrap();
        let send_cq = ctx.create_cq(4096).unwrap();
        let recv_cq = ctx.create_cq(4096).unwrap();
        let qp = pd.create_qp(o.caps, &send_cq, &recv_cq).unwrap();
        let qp = qp.init(InitAttr::new(o.access)).unwrap();
        (pd, send_cq, recv_cq, qp)
    };
    let (pa, sa, ra, qa) = make(a);
    let (pb, sb, rb, qb) = make(b);
    let (ea, eb) = (qa.endpoint(), qb.endpoint());
    let (la, lb) = links(how, b);
    let up = |qp: QueuePair<kvxfer_verbs::Init>, remote, link| {
        let qp = qp
            .rtr(RtrAttr {
                remote,
                link,
                min_rnr_timer: o.min_rnr_timer,
            })
            .unwrap();
        qp.rts(o.rts).unwrap()
    };
    let qa = up(qa, eb, la);
    let qb = up(qb, ea, lb);
    (
        Side {
            ctx: a.clone(),
            pd: pa,
            send_cq: sa,
            recv_cq: ra,
            qp: qa,
        },
        Side {
            ctx: b.clone(),
            pd: pb,
            send_cq: sb,
            recv_cq: rb,
            qp: qb,
        },
    )
}

/// Holds a failed completion against what the software device says of it. RDMA devices have vendor codes
/// of their own, and some have another status for it.
pub fn assert_failed(how: How, c: &Completion, soft: (WcStatus, u32), rdma: &[WcStatus]) {
    match how {
        How::Rdma(_) => assert!(
            c.status == soft.0 || rdma.contains(&c.status),
            "{how:?} {c:?}, {soft:?}"
        ),
        _ => assert_eq!((c.status, c.vendor_err), soft, "{how:?}"),
    }
}

/// Polls until `n` completions have come.
pub fn reap(cq: &CompletionQueue, n: usize) -> Vec<Completion> {
    let mut out = Vec::new();
    let end = Instant::now() + WAIT;
    while out.len() < n {
        let before = out.len();
        let poll = cq.poll(&mut out, n - before).unwrap();
        assert!(
            Instant::now() < end,
            "{} of {n} completions after {WAIT:?}",
            out.len()
        );
        if !poll.more && out.len() == before && cq.arm().unwrap() {
            let mut fds = [nix::poll::PollFd::new(
                cq.as_fd(),
                nix::poll::PollFlags::POLLIN,
            )];
            nix::poll::poll(&mut fds, 5000u16).unwrap();
        }
    }
    out
}

pub fn table(regions: &[&MemoryRegion]) -> Arc<RegionTable> {
    Arc::new(regions.iter().map(|r| (*r).clone()).collect())
}
