//! Memory that a process shares with others of its host, which map it to read it.
#![allow(missing_docs, reason = "a test")]

mod support;

use std::time::{Duration, Instant};

use kvxfer_verbs::{Access, Context, Error, Memory, PathFault, PeerMapping, SoftConfig, open_soft};
use support::{TestMemory, pattern};

fn soft() -> Context {
    open_soft(SoftConfig::default()).expect("opened")
}

/// Memory that is shared is mapped by who has its token, as long as it is shared; what has been mapped stays.
#[test]
fn shared_memory_is_mapped_by_its_token_alone() {
    const LEN: usize = 12_000;
    let (owner, reader) = (soft(), soft());
    let pd = owner.alloc_pd().expect("pd");
    let memories = [0, 1].map(|_| TestMemory::sealed(LEN));
    let regions = memories.clone().map(|memory| {
        memory.put(0, &pattern(LEN, (memory.addr() >> 12) as u8));
        pd.register(memory, Access::REMOTE_READ)
            .expect("registered")
    });
    let shared = owner.share(&regions).expect("files");
    let map = |token, of| reader.map_shared(&owner.address(), token, of, soon());
    let len = LEN as u64;
    let read = |mapping: &PeerMapping| {
        let mut bytes = vec![0_u8; LEN];
        let from = mapping.addr() as *const u8;
        // SAFETY: it is mapped for as many bytes, and nobody writes them now.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), LEN) };
        bytes
    };
    for (index, memory) in (0..).zip(&memories) {
        let mapping = map(shared.token(), (index, len)).expect("mapped");
        assert_ne!(mapping.addr(), memory.addr());
        assert!(mapping.allocated() >= len);
        assert!(read(&mapping) == pattern(LEN, (memory.addr() >> 12) as u8));
        memory.put(5, &[1, 2, 3]);
        assert_eq!(read(&mapping).get(5..8), Some(&[1, 2, 3][..]));
    }
    let fault = |token, of| match map(token, of) {
        Err(Error::Path { fault, .. }) => fault,
        other => panic!("{other:?}"),
    };
    let mut wrong = shared.token();
    wrong[3] ^= 1;
    for (token, index) in [(wrong, 0), ([0; 16], 0), (shared.token(), 2)] {
        let fault = fault(token, (index, len));
        assert!(matches!(fault, PathFault::NotShared), "{fault}");
    }
    for bad in [0, 1 << 40, u64::MAX] {
        let error = map(shared.token(), (0, bad)).expect_err("not so many");
        assert!(matches!(error, Error::FileTooSmall { .. }), "{error}");
    }
    let kept = map(shared.token(), (1, len)).expect("mapped");
    let before = read(&kept);
    let token = shared.token();
    drop((shared, regions, memories, pd, owner.clone()));
    let fault = fault(token, (0, len));
    assert!(matches!(fault, PathFault::NotShared), "{fault}");
    assert!(read(&kept) == before);
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// How many of the bytes of a file are in pages: the rest is nobody's yet.
#[test]
fn holes_of_a_shared_file_are_known() {
    const LEN: usize = 1 << 20;
    let (owner, reader) = (soft(), soft());
    let pd = owner.alloc_pd().expect("pd");
    let memory = TestMemory::sealed(LEN);
    memory.put(5000, &[1]);
    let region = pd.register(memory, Access::REMOTE_READ);
    let shared = owner.share(&[region.expect("registered")]).expect("a file");
    let of = (0, LEN as u64);
    let mapping = reader.map_shared(&owner.address(), shared.token(), of, soon());
    let allocated = mapping.expect("mapped").allocated();
    assert!(
        allocated > 0 && allocated < LEN as u64,
        "{allocated} of {LEN} bytes"
    );
}

/// Who is asked for a file and says nothing is waited for until the deadline.
#[test]
fn who_does_not_answer_for_its_file_is_late() {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener};
    let reader = soft();
    let name = format!("kvxfer/silent-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name.as_bytes()).expect("a name");
    let _silent = UnixListener::bind_addr(&address).expect("bound");
    let peer = kvxfer_verbs::DeviceAddr {
        name,
        ..reader.address()
    };
    let error = reader.map_shared(&peer, [7; 16], (0, 4096), Instant::now());
    let error = error.expect_err("nobody answers");
    assert!(matches!(error, Error::DialDeadline { .. }), "{error}");
}

#[test]
fn what_peers_cannot_map_or_may_not_read_is_not_shared() {
    let owner = soft();
    let pd = owner.alloc_pd().expect("pd");
    let readable = |memory: std::sync::Arc<TestMemory>, access| {
        pd.register(memory, access).expect("registered")
    };
    let good = readable(TestMemory::sealed(4096), Access::REMOTE_READ);
    for bad in [
        readable(TestMemory::anonymous(4096), Access::REMOTE_READ),
        readable(TestMemory::sealed(4096), Access::LOCAL_WRITE),
    ] {
        let error = owner.share(&[good.clone(), bad]).expect_err("refused");
        assert!(matches!(error, Error::NotShared { index: 1 }), "{error}");
    }
    let error = soft().share(&[good]).expect_err("another device's");
    assert!(matches!(error, Error::ForeignHandle { .. }), "{error}");
}
