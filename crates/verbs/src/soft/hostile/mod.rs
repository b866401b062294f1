//! Tests with a peer that proves itself and then lies: it knows the tokens, has sockets of its own,
//! and sends what it likes. Nothing may be written that it has no right to, and nothing may hang.

mod opening;
mod requester;
mod responder;
mod tcp;

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use crate::region::SegmentSpan;
use crate::soft::frame::{Desc, HEADER, HELLO, Header, Hello, Kind, Piece, Role};
use crate::soft::keys::{KeyInfo, KeyTable};
use crate::soft::link::path_code;
use crate::soft::segment::{Mapping, new_memfd, seal};
use crate::soft::stream::{Stream, not_now};
use crate::soft::{SoftConfig, open_soft, vendor};
use crate::wr::Op;
use crate::{
    Access, Completion, CompletionQueue, Context, FdSpan, InitAttr, Link, Memory, MemoryKind,
    MemoryRegion, ProtectionDomain, QpCaps, QpEndpoint, QueuePair, RegionTable, Remote, RtrAttr,
    Rts, RtsAttr, SendChain, SendOp, Sge, SoftPath, WcStatus,
};

const WAIT: Duration = Duration::from_secs(20);
const N: u64 = 1 << 16;
const SIZE: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;

/// The memory of one memfd.
#[derive(Debug)]
struct Mem {
    map: Mapping,
    fd: OwnedFd,
}

// SAFETY: the mapping lives as long as the value and is touched only through raw pointers.
unsafe impl Memory for Mem {
    fn addr(&self) -> u64 {
        self.map.base()
    }
    fn len(&self) -> u64 {
        self.map.len()
    }
    fn kind(&self) -> MemoryKind {
        MemoryKind::Host
    }
    fn fd(&self) -> Option<FdSpan<'_>> {
        Some(FdSpan {
            fd: self.fd.as_fd(),
            offset: 0,
        })
    }
}

impl Mem {
    fn new(fill: u8) -> Arc<Self> {
        let fd = file(SIZE);
        let map = Mapping::new(fd.as_fd(), N, true).unwrap();
        // SAFETY: a writable mapping of N bytes that nobody else uses yet.
        unsafe { std::ptr::write_bytes(map.base() as *mut u8, fill, N as usize) };
        Arc::new(Self { map, fd })
    }

    fn is(&self, fill: u8) -> bool {
        let mut bytes = vec![0u8; N as usize];
        // SAFETY: the mapping has N bytes, and the copy goes to memory of this test's own.
        unsafe {
            crate::soft::requester_local::copy(bytes.as_mut_ptr() as u64, self.map.base(), N)
        };
        bytes.iter().all(|b| *b == fill)
    }
}

fn file(seals: i32) -> OwnedFd {
    let fd = new_memfd(c"t", N).unwrap();
    seal(fd.as_fd(), seals).unwrap();
    fd
}

fn all() -> Access {
    Access::LOCAL_WRITE | Access::REMOTE_READ | Access::REMOTE_WRITE
}

/// A queue pair whose peer is a liar.
struct Victim {
    ctx: Context,
    cq: CompletionQueue,
    qp: QueuePair<Rts>,
    memory: Arc<Mem>,
    region: MemoryRegion,
    _pd: ProtectionDomain,
}

const LIAR: QpEndpoint = QpEndpoint {
    qpn: 77,
    psn: 0,
    token: [0x5a; 16],
    port: None,
};

impl Victim {
    fn new(path: SoftPath) -> (Self, QpEndpoint) {
        Self::over(Link::SoftAwait { path })
    }

    fn over(link: Link) -> (Self, QpEndpoint) {
        let ctx = open_soft(SoftConfig::default()).unwrap();
        let pd = ctx.alloc_pd().unwrap();
        let cq = ctx.create_cq(64).unwrap();
        let qp = pd.create_qp(QpCaps::default(), &cq, &cq).unwrap();
        let qp = qp.init(InitAttr::new(all())).unwrap();
        let own = qp.endpoint();
        let attr = RtrAttr {
            remote: LIAR,
            link,
            min_rnr_timer: 12,
        };
        let qp = qp.rtr(attr).unwrap().rts(RtsAttr::default()).unwrap();
        let memory = Mem::new(0x11);
        let region = pd.register(memory.clone(), all()).unwrap();
        let victim = Self {
            ctx,
            cq,
            qp,
            memory,
            region,
            _pd: pd,
        };
        (victim, own)
    }

    fn post(&self, op: SendOp) {
        let mut chain = SendChain::new();
        let sge = Sge {
            region: 0,
            len: 64,
            offset: 0,
        };
        chain.push(1, op, true, &[sge]);
        let table: RegionTable = [self.region.clone()].into_iter().collect();
        self.qp.post_send(&chain, &Arc::new(table)).unwrap();
    }

    fn completion(&self) -> Completion {
        let mut out = Vec::new();
        let end = Instant::now() + WAIT;
        while out.is_empty() {
            self.cq.poll(&mut out, 1).unwrap();
            assert!(Instant::now() < end, "no completion");
            std::thread::yield_now();
        }
        out[0]
    }
}

/// The peer: a socket, and what its opening says.
struct Liar {
    stream: Stream,
    /// What its openings point at.
    guid: Box<[u8; 16]>,
    keys: KeyTable,
    key_file: OwnedFd,
}

fn dial(ctx: &Context) -> Stream {
    let fd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    let name = ctx.address().name;
    let addr = UnixAddr::new_abstract(name.as_bytes()).unwrap();
    connect(fd.as_raw_fd(), &addr).unwrap();
    Stream::new(fd, true)
}

impl Liar {
    fn new(ctx: &Context) -> Self {
        let (keys, key_file) = KeyTable::new(16).unwrap();
        Self {
            stream: dial(ctx),
            guid: Box::new([0xa5; 16]),
            keys,
            key_file,
        }
    }

    fn hello(&self, ctx: &Context, target: QpEndpoint, role: Role, path: SoftPath) -> Hello {
        Hello {
            role,
            path: path_code(path),
            target: target.token,
            token: LIAR.token,
            guid: *self.guid,
            target_guid: ctx.address().guid,
            qpn: LIAR.qpn,
            pd: 1,
            access: all().bits(),
            slots: self.keys.slots(),
            probe_addr: self.guid.as_ptr() as u64,
            reader: 0,
            errno: 0,
        }
    }

    /// Sends an opening; answers the answer's role, or `None` for a stream that was closed.
    fn open(&self, hello: &Hello) -> Option<Role> {
        let fd = Some(self.key_file.as_fd());
        assert_eq!(self.stream.send(&hello.encode(), fd).unwrap(), HELLO);
        let answer = self.read(HELLO)?;
        Some(Hello::decode(&answer).unwrap().role)
    }

    /// A pair with the liar on the other side of one stream.
    fn meet(role: Role, path: SoftPath) -> (Victim, Self) {
        let (victim, own) = Victim::new(path);
        let liar = Self::new(&victim.ctx);
        let hello = liar.hello(&victim.ctx, own, role, path);
        assert_eq!(liar.open(&hello), Some(Role::Welcome));
        (victim, liar)
    }

    /// Reads `n` bytes; `None` if the stream ends first.
    fn read(&self, n: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; n];
        let mut got = 0;
        let mut fds = VecDeque::new();
        let end = Instant::now() + WAIT;
        while got < n {
            match self.stream.recv(&mut bytes[got..], &mut fds) {
                Ok(0) => return None,
                Ok(more) => got += more,
                Err(e) if not_now(&e) => std::thread::yield_now(),
                Err(_) => return None,
            }
            fds.clear();
            assert!(Instant::now() < end, "no answer");
        }
        Some(bytes)
    }

    /// The next frame that is no segment; `None` if the stream was closed, or says it will be.
    fn frame(&self) -> Option<Header> {
        loop {
            let head = Header::decode(&self.read(HEADER)?).unwrap();
            match head.kind {
                Kind::Mapped | Kind::Segment => {}
                Kind::Bye => return None,
                _ => return Some(head),
            }
        }
    }

    /// Lets the victim ask for something, so that there is something to lie about.
    fn hear_a_write(&self, victim: &Victim) {
        victim.post(SendOp::Write(Remote {
            addr: 0x1000,
            rkey: 1,
        }));
        let mut out = Vec::new();
        let end = Instant::now() + WAIT;
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
        while poll(&mut fds, 1u16) == Ok(0) {
            victim.cq.poll(&mut out, 1).unwrap();
            assert!(out.is_empty() && Instant::now() < end, "{out:?}");
        }
        assert_eq!(self.frame().map(|h| h.kind), Some(Kind::Batch));
    }

    fn send(&self, bytes: &[u8], fd: Option<&OwnedFd>) {
        // The other side may have closed already, and that is what is asked afterwards.
        let _ = self.stream.send(bytes, fd.map(|f| f.as_fd()));
    }
}

fn batch(v: u64, ops: &[Desc], pieces: &[Piece]) -> Vec<u8> {
    let head = Header {
        n: ops.len() as u16,
        m: pieces.len() as u32,
        v,
        ..Header::new(Kind::Batch)
    };
    let mut bytes = head.encode().to_vec();
    bytes.extend(ops.iter().flat_map(Desc::encode));
    bytes.extend(pieces.iter().flat_map(Piece::encode));
    bytes
}

fn write(region: &MemoryRegion, len: u64) -> Desc {
    Desc {
        addr: region.addr(),
        len,
        rkey: region.rkey(),
        imm: 0,
        op: Op::Write,
        pieces: 1,
    }
}

fn piece(segment: u32, at: u64, len: u32) -> Piece {
    Piece { segment, len, at }
}

fn segment(id: u32) -> [u8; HEADER] {
    Header {
        m: id,
        ..Header::new(Kind::Segment)
    }
    .encode()
}
