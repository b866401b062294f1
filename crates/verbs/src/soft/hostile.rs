//! Tests with a peer that proves itself and then lies: it knows the tokens, has sockets of its own,
//! and sends what it likes. Nothing may be written that it has no right to, nothing may hang, and an
//! honest peer goes on being served.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use super::frame::{Desc, HEADER, HELLO, Header, Hello, Kind, Piece, Role};
use super::keys::{KeyInfo, KeyTable};
use super::link::path_code;
use super::segment::{Mapping, new_memfd, seal};
use super::stream::{Stream, not_now};
use super::{SoftConfig, open_soft, vendor};
use crate::region::SegmentSpan;
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
        unsafe { super::requester_local::copy(bytes.as_mut_ptr() as u64, self.map.base(), N) };
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
};

impl Victim {
    fn new(path: SoftPath) -> (Self, QpEndpoint) {
        let ctx = open_soft(SoftConfig::default()).unwrap();
        let pd = ctx.alloc_pd().unwrap();
        let cq = ctx.create_cq(64).unwrap();
        let qp = pd.create_qp(QpCaps::default(), &cq, &cq).unwrap();
        let qp = qp.init(InitAttr { access: all() }).unwrap();
        let own = qp.endpoint();
        let attr = RtrAttr {
            remote: LIAR,
            link: Link::SoftAwait { path },
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

#[test]
fn an_honest_word_is_believed() {
    let (victim, liar) = Liar::meet(Role::ToResponder, SoftPath::Arena);
    let source = Mem::new(0x22);
    liar.send(&segment(9), Some(&source.fd));
    let from = [piece(9, 0, N as u32)];
    liar.send(&batch(0, &[write(&victim.region, N)], &from), None);
    let ack = liar.frame().unwrap();
    assert_eq!((ack.kind, ack.v), (Kind::Ack, 1));
    assert!(victim.memory.is(0x22));
}

/// Each lie, told to the half that serves it, ends the stream or gets a NAK; nothing is written.
#[test]
fn lies_told_to_a_responder_are_refused() {
    let source = Mem::new(0x22);
    let good = |v: &Victim| batch(0, &[write(&v.region, 64)], &[piece(9, 0, 64)]);
    let nak = |lie: &str, make: &dyn Fn(&Victim) -> Vec<u8>, seals: i32, want: (WcStatus, u32)| {
        let (victim, liar) = Liar::meet(Role::ToResponder, SoftPath::Arena);
        let fd = if seals == SIZE {
            source.fd.try_clone().unwrap()
        } else {
            file(seals)
        };
        liar.send(&segment(9), Some(&fd));
        liar.send(&make(&victim), None);
        let head = liar.frame().unwrap_or_else(|| panic!("{lie}: closed"));
        let told = (WcStatus::from_raw(head.flag.into()), head.m);
        assert_eq!((head.kind, told), (Kind::Nak, want), "{lie}");
        assert!(victim.memory.is(0x11), "{lie}");
    };
    nak(
        "out of the region",
        &|v| {
            let mut op = write(&v.region, 64);
            op.addr += N - 63;
            batch(0, &[op], &[piece(9, 0, 64)])
        },
        SIZE,
        (WcStatus::RemAccess, vendor::BOUNDS),
    );
    nak(
        "an absurd length",
        &|v| {
            let mut op = write(&v.region, u64::from(u32::MAX) * 2);
            op.pieces = 2;
            let whole = piece(9, 0, u32::MAX);
            batch(0, &[op], &[whole, whole])
        },
        SIZE,
        (WcStatus::RemInvReq, vendor::BOUNDS),
    );
    nak(
        "out of the segment",
        &|v| batch(0, &[write(&v.region, 64)], &[piece(9, N - 63, 64)]),
        SIZE,
        (WcStatus::RemOp, vendor::SEGMENT),
    );
    nak(
        "an offset that wraps",
        &|v| batch(0, &[write(&v.region, 64)], &[piece(9, u64::MAX - 8, 64)]),
        SIZE,
        (WcStatus::RemOp, vendor::SEGMENT),
    );
    nak(
        "a segment never passed",
        &|v| batch(0, &[write(&v.region, 64)], &[piece(8, 0, 64)]),
        SIZE,
        (WcStatus::RemOp, vendor::SEGMENT),
    );
    for seals in [0, libc::F_SEAL_GROW, libc::F_SEAL_SHRINK] {
        let want = (WcStatus::RemOp, vendor::SEGMENT);
        nak("a file that could shrink", &good, seals, want);
    }

    let closed = |lie: &str, make: &dyn Fn(&Victim, &Liar)| {
        let (victim, liar) = Liar::meet(Role::ToResponder, SoftPath::Arena);
        liar.send(&segment(9), Some(&source.fd));
        make(&victim, &liar);
        assert_eq!(liar.frame().map(|h| h.kind), None, "{lie}");
        assert!(victim.memory.is(0x11), "{lie}");
    };
    closed("a kind that is none", &|_, liar| liar.send(&[99; 64], None));
    closed("what only a responder says", &|_, liar| {
        liar.send(&Header::new(Kind::Ack).encode(), None);
    });
    closed("absurd counts", &|_, liar| {
        let head = Header {
            n: u16::MAX,
            m: u32::MAX,
            ..Header::new(Kind::Batch)
        };
        liar.send(&head.encode(), None);
    });
    closed("numbers that run over", &|v, liar| {
        let ops = [write(&v.region, 64)];
        liar.send(&batch(u64::MAX, &ops, &[piece(9, 0, 64)]), None);
    });
    closed("an operation that is none", &|v, liar| {
        let mut bytes = good(v);
        bytes[HEADER + 24] = 9;
        liar.send(&bytes, None);
    });
    closed("a READ, which is the initiator's work here", &|v, liar| {
        let mut op = write(&v.region, 64);
        op.op = Op::Read;
        liar.send(&batch(0, &[op], &[piece(9, 0, 64)]), None);
    });
    closed("more bytes than pieces", &|v, liar| {
        liar.send(&batch(0, &[write(&v.region, 65)], &[piece(9, 0, 64)]), None);
    });
    closed("more pieces than operations take", &|v, liar| {
        let from = [piece(9, 0, 64), piece(9, 0, 64)];
        liar.send(&batch(0, &[write(&v.region, 64)], &from), None);
    });
    closed("a segment without a file", &|_, liar| {
        liar.send(&segment(3), None);
    });
    closed("a file that nobody asked for", &|v, liar| {
        liar.send(&good(v)[..HEADER], Some(&source.fd));
        liar.send(&good(v)[HEADER..HEADER + 8], Some(&source.fd));
        liar.send(&[0; 8], Some(&source.fd));
        liar.send(&[0; 8], Some(&source.fd));
        liar.send(&[0; 8], Some(&source.fd));
    });
}

/// What was done is not done again, whatever comes twice.
#[test]
fn a_replayed_batch_is_refused() {
    let (victim, liar) = Liar::meet(Role::ToResponder, SoftPath::Arena);
    let source = Mem::new(0x22);
    liar.send(&segment(9), Some(&source.fd));
    let bytes = batch(0, &[write(&victim.region, 64)], &[piece(9, 0, 64)]);
    liar.send(&bytes, None);
    assert_eq!(liar.frame().map(|h| (h.kind, h.v)), Some((Kind::Ack, 1)));
    liar.send(&bytes, None);
    assert_eq!(liar.frame().map(|h| h.kind), None);
}

/// Each lie, told to the half that asks, is the error that it is, and no success.
#[test]
fn lies_told_to_a_requester_are_errors() {
    let case = |lie: &str, want: (WcStatus, u32), make: &dyn Fn(&Liar)| {
        let (victim, liar) = Liar::meet(Role::ToRequester, SoftPath::Arena);
        liar.hear_a_write(&victim);
        make(&liar);
        let c = victim.completion();
        assert_eq!((c.status, c.vendor_err), want, "{lie}");
        assert!(victim.memory.is(0x11), "{lie}");
    };
    let protocol = (WcStatus::RemOp, vendor::PROTOCOL);
    let tell = |head: Header| move |liar: &Liar| liar.send(&head.encode(), None);
    let ack = |v| Header {
        v,
        ..Header::new(Kind::Ack)
    };
    let nak = |flag| Header {
        flag,
        ..Header::new(Kind::Nak)
    };
    let mapped = |n| Header {
        n,
        m: 5,
        ..Header::new(Kind::Mapped)
    };
    case("done before it was asked", protocol, &tell(ack(2)));
    case("done, all there ever was", protocol, &tell(ack(u64::MAX)));
    case("failed, with success", protocol, &tell(nak(0)));
    let flush = u8::try_from(WcStatus::WrFlush.as_raw()).unwrap();
    case("failed, as one's own echo", protocol, &tell(nak(flush)));
    let ours = u8::try_from(WcStatus::LocProt.as_raw()).unwrap();
    case(
        "failed, by a fault of this side",
        protocol,
        &tell(nak(ours)),
    );
    let data = Header {
        m: 64,
        ..Header::new(Kind::Data)
    };
    case("data over a socket that has none", protocol, &tell(data));
    let request = Header::new(Kind::Batch);
    case("what only a requester says", protocol, &tell(request));
    case("a kind that is none", protocol, &|liar| {
        liar.send(&[77; HEADER], None);
    });
    case("a segment without a file", protocol, &tell(mapped(1)));
    let shrinks = (WcStatus::RemOp, vendor::SEGMENT);
    case("a file that could shrink", shrinks, &|liar| {
        liar.send(&mapped(1).encode(), Some(&file(libc::F_SEAL_GROW)));
    });
    case("a file with a frame that has none", protocol, &|liar| {
        let none = Header::new(Kind::Ack).encode();
        liar.send(&none, Some(&file(SIZE)));
        liar.send(&none, Some(&file(SIZE)));
    });
}

/// A key table that promises more than its segment has.
#[test]
fn a_key_that_is_larger_than_its_file_is_not_read() {
    let (victim, mut liar) = Liar::meet(Role::ToRequester, SoftPath::Arena);
    let source = Mem::new(0x22);
    let info = |offset, len| KeyInfo {
        rkey: 0,
        addr: 0x10_0000,
        len,
        access: all(),
        pd: 1,
        segment: SegmentSpan { id: 5, offset },
    };
    let honest = liar.keys.insert(info(0, N)).unwrap();
    let long = liar.keys.insert(info(0, N + 1)).unwrap();
    let head = Header {
        n: 1,
        m: 5,
        ..Header::new(Kind::Mapped)
    };
    liar.send(&head.encode(), Some(&source.fd));
    let at = |rkey| Remote {
        addr: 0x10_0000,
        rkey,
    };
    victim.post(SendOp::Read(at(honest)));
    assert_eq!(victim.completion().status, WcStatus::Success);
    victim.post(SendOp::Read(at(long)));
    let c = victim.completion();
    assert_eq!((c.status, c.vendor_err), (WcStatus::RemOp, vendor::SEGMENT));
}

/// Bytes that the victim has not read yet.
fn unread(stream: &Stream) -> i32 {
    let mut n = 0;
    // SAFETY: the call writes one int.
    let rc = unsafe { libc::ioctl(stream.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut n) };
    assert_eq!(rc, 0);
    n
}

/// A peer that sends frames faster than they are parsed would keep the poller for ever.
#[test]
fn a_flood_of_frames_does_not_keep_the_poller() {
    for busy in [true, false] {
        let (victim, liar) = Liar::meet(Role::ToRequester, SoftPath::Arena);
        liar.hear_a_write(&victim);
        let mut ack = Header::new(Kind::Ack);
        if !busy {
            ack.v = 1;
            liar.send(&ack.encode(), None);
            assert_eq!(victim.completion().status, WcStatus::Success);
        }
        // Frames that say nothing new, as many as the socket takes.
        let ack = ack.encode();
        let many = ack.repeat(256);
        let mut sent = 0;
        while let Ok(n) = liar.stream.send(&many, None) {
            sent += n;
        }
        assert!(sent > 64 << 10, "{sent}");
        // So that the poll looks at every socket.
        victim.cq.arm().unwrap();
        let mut out = Vec::new();
        let poll = victim.cq.poll(&mut out, 1).unwrap();
        assert!(out.is_empty());
        if busy {
            assert!(poll.more);
            assert!(unread(&liar.stream) > 0);
        } else {
            // Nothing was asked, so it is cut off.
            assert!(liar.stream.send(&ack, None).is_err());
            victim.post(SendOp::Send);
            let c = victim.completion();
            let want = (WcStatus::RetryExc, vendor::PEER_GONE);
            assert_eq!((c.status, c.vendor_err), want);
        }
    }
}

/// Over the arena path, memory without a file is read by `process_vm_readv`: only from the process
/// that wrote the opening.
#[test]
fn nothing_is_read_from_a_process_that_does_not_have_the_guid() {
    for honest in [true, false] {
        let (victim, own) = Victim::new(SoftPath::Arena);
        let liar = Liar::new(&victim.ctx);
        let mut hello = liar.hello(&victim.ctx, own, Role::ToResponder, SoftPath::Arena);
        let source = vec![0x22u8; N as usize];
        if !honest {
            // Something of this process, but not what it says it is.
            hello.probe_addr = source.as_ptr() as u64;
        }
        assert_eq!(liar.open(&hello), Some(Role::Welcome));
        let from = [piece(0, source.as_ptr() as u64, N as u32)];
        liar.send(&batch(0, &[write(&victim.region, N)], &from), None);
        let head = liar.frame().unwrap();
        if honest {
            assert_eq!((head.kind, head.v), (Kind::Ack, 1));
        } else {
            let errno = vendor::ERRNO + libc::EPERM.unsigned_abs();
            assert_eq!((head.kind, head.m), (Kind::Nak, errno));
            assert!(victim.memory.is(0x11));
        }
    }
}

/// Where the path is `process_vm`, that is found out at the opening.
#[test]
fn a_process_vm_opening_is_tried_at_once() {
    for role in [Role::ToResponder, Role::ToRequester, Role::Probe] {
        for (addr, errno) in [
            (None, None),
            (Some(0), Some(libc::EFAULT)),
            (Some(1), Some(0)),
        ] {
            let (victim, own) = Victim::new(SoftPath::ProcessVm);
            let liar = Liar::new(&victim.ctx);
            let mut hello = liar.hello(&victim.ctx, own, role, SoftPath::ProcessVm);
            hello.probe_addr = match addr {
                None => hello.probe_addr,
                Some(0) => 16,
                Some(_) => LIAR.token.as_ptr() as u64,
            };
            let fd = Some(liar.key_file.as_fd());
            assert_eq!(liar.stream.send(&hello.encode(), fd).unwrap(), HELLO);
            let answer = Hello::decode(&liar.read(HELLO).unwrap()).unwrap();
            match errno {
                None => assert_eq!(answer.role, Role::Welcome),
                Some(e) => {
                    assert_eq!(answer.role, Role::Barred);
                    assert_eq!(answer.errno, e.unsigned_abs(), "{role:?}");
                }
            }
        }
    }
}

/// Who has not heard of the context over a control connection gets nothing out of it.
#[test]
fn an_opening_without_the_guid_or_with_two_files_is_closed() {
    let (victim, own) = Victim::new(SoftPath::ProcessVm);
    for role in [Role::Probe, Role::ToResponder, Role::Welcome, Role::Barred] {
        let liar = Liar::new(&victim.ctx);
        let mut hello = liar.hello(&victim.ctx, own, role, SoftPath::ProcessVm);
        if !matches!(role, Role::Welcome | Role::Barred) {
            hello.target_guid[0] ^= 1;
        }
        assert_eq!(liar.open(&hello), None, "{role:?}");
    }
    let liar = Liar::new(&victim.ctx);
    let hello = liar.hello(&victim.ctx, own, Role::Probe, SoftPath::ProcessVm);
    let bytes = hello.encode();
    liar.send(&bytes[..50], Some(&liar.key_file));
    liar.send(&bytes[50..], Some(&liar.key_file));
    assert_eq!(liar.read(1), None);

    let address = victim.ctx.address();
    let hex: String = address.guid.iter().map(|b| format!("{b:02x}")).collect();
    let list = format!("{:?}", address.guid);
    assert!(!address.name.contains(&hex));
    let debug = format!("{address:?}");
    assert!(!debug.contains(&hex) && !debug.contains(&list), "{debug}");
}

/// Another user's process gets no answer, and what it passes is never taken in.
#[test]
fn a_connection_of_another_user_is_dropped_before_anything_is_received() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can act as another user");
        return;
    }
    let (victim, _) = Victim::new(SoftPath::Arena);
    let thread = std::thread::spawn(move || {
        // The bare call changes this thread alone.
        // SAFETY: takes integers only.
        let rc = unsafe { libc::syscall(libc::SYS_setresuid, -1, 65_534, -1) };
        assert_eq!(rc, 0);
        let liar = Liar::new(&victim.ctx);
        // Too little for an opening, so nothing else is a reason to close.
        liar.send(&[0; 8], Some(&liar.key_file));
        let before = Instant::now();
        let closed = liar.read(1).is_none();
        (closed, before.elapsed(), victim)
    });
    let (closed, took, _victim) = thread.join().unwrap();
    assert!(closed);
    // An unfinished opening would be closed too, after five seconds.
    assert!(took < Duration::from_secs(4), "{took:?}");
}
