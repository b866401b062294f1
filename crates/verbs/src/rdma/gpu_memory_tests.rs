//! How memory of a GPU is registered: what a library is told, and what is told where it refuses. The library
//! is made of functions here, the dma-buf is any file.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::mem::zeroed;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::path::Path;
use std::ptr;
use std::sync::Arc;

use libc::{EFAULT, EINVAL, EOPNOTSUPP, c_char, c_int, c_uint, c_void, size_t};

use super::RdmaConfig;
use super::context::open;
use crate::device::Context;
use crate::error::{DmaBufFault, Error};
use crate::memory::{DmaBuf, FdSpan, Memory, MemoryKind, NoDmaBuf};
use crate::region::Access;
use crate::sys::Verbs;
use crate::sys::enums::{
    IBV_ACCESS_RELAXED_ORDERING, IBV_LINK_LAYER_INFINIBAND, ibv_mtu, ibv_port_state,
    ibv_transport_type,
};
use crate::sys::fake;
use crate::sys::types::{
    ibv_context, ibv_device, ibv_device_attr, ibv_gid, ibv_mr, ibv_pd, ibv_port_attr,
};

const ADDR: u64 = 0x7f00_0012_3000;
const LEN: u64 = 0x5000;
const OFFSET: u64 = 0x20_0000;

/// A call that registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    DmaBuf {
        offset: u64,
        len: usize,
        iova: u64,
        access: u32,
    },
    Address {
        addr: u64,
        len: usize,
        access: u32,
    },
}

/// What the fake answers, and what it was asked.
#[derive(Default)]
struct Script {
    calls: Vec<Call>,
    fds: Vec<c_int>,
    /// Errno of each call, in order; 0, and after the last: success.
    answers: Vec<c_int>,
    deregistered: u32,
}

thread_local! {
    /// Each test has a thread of its own.
    static SCRIPT: RefCell<Script> = RefCell::default();
}

fn fail(errno: c_int) {
    // SAFETY: errno belongs to this thread.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    unsafe { place.write(errno) };
}

fn answer(call: Call) -> *mut ibv_mr {
    let errno = SCRIPT.with_borrow_mut(|script| {
        let errno = script.answers.get(script.calls.len()).copied().unwrap_or(0);
        script.calls.push(call);
        errno
    });
    if errno != 0 {
        fail(errno);
        return ptr::null_mut();
    }
    Box::into_raw(Box::new(ibv_mr {
        context: ptr::null_mut(),
        pd: ptr::null_mut(),
        addr: ptr::null_mut(),
        length: 0,
        handle: 0,
        lkey: 5,
        rkey: 7,
    }))
}

extern "C" fn reg_dmabuf_mr(
    _: *mut ibv_pd,
    offset: u64,
    len: size_t,
    iova: u64,
    fd: c_int,
    access: c_int,
) -> *mut ibv_mr {
    // SAFETY: a question about a number.
    let open = unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0;
    assert!(open, "the file is open");
    SCRIPT.with_borrow_mut(|script| script.fds.push(fd));
    let access = access.cast_unsigned();
    answer(Call::DmaBuf {
        offset,
        len,
        iova,
        access,
    })
}

extern "C" fn reg_mr(_: *mut ibv_pd, at: *mut c_void, len: size_t, access: c_int) -> *mut ibv_mr {
    let (addr, access) = (at as u64, access.cast_unsigned());
    answer(Call::Address { addr, len, access })
}

extern "C" fn reg_mr_iova2(
    _: *mut ibv_pd,
    at: *mut c_void,
    len: size_t,
    iova: u64,
    access: c_uint,
) -> *mut ibv_mr {
    assert_eq!(iova, at as u64);
    let addr = iova;
    answer(Call::Address { addr, len, access })
}

extern "C" fn dereg_mr(mr: *mut ibv_mr) -> c_int {
    // SAFETY: from `answer`, and freed once.
    drop(unsafe { Box::from_raw(mr) });
    SCRIPT.with_borrow_mut(|script| script.deregistered += 1);
    0
}

extern "C" fn alloc_pd(_: *mut ibv_context) -> *mut ibv_pd {
    Box::into_raw(Box::new(ibv_pd {
        context: ptr::null_mut(),
        handle: 0,
    }))
}

extern "C" fn dealloc_pd(pd: *mut ibv_pd) -> c_int {
    // SAFETY: from `alloc_pd`, and freed once.
    drop(unsafe { Box::from_raw(pd) });
    0
}

extern "C" fn device_list(len: *mut c_int) -> *mut *mut ibv_device {
    // SAFETY: numbers and pointers, for which all zero bytes are a value.
    let mut device: ibv_device = unsafe { zeroed() };
    device.transport_type = ibv_transport_type::IBV_TRANSPORT_IB;
    for (to, from) in device.name.iter_mut().zip(*b"fake0") {
        *to = c_char::from_ne_bytes([from]);
    }
    // SAFETY: the caller's number.
    unsafe { *len = 1 };
    Box::into_raw(Box::new(Box::into_raw(Box::new(device))))
}

extern "C" fn free_list(list: *mut *mut ibv_device) {
    // SAFETY: from `device_list`, and freed once.
    let device = unsafe { Box::from_raw(list) };
    // SAFETY: as above.
    drop(unsafe { Box::from_raw(*device) });
}

extern "C" fn name(device: *mut ibv_device) -> *const c_char {
    // SAFETY: the device above.
    unsafe { &raw const (*device).name }.cast()
}

extern "C" fn open_device(_: *mut ibv_device) -> *mut ibv_context {
    // SAFETY: pointers and numbers, for which all zero bytes are a value.
    let mut context: ibv_context = unsafe { zeroed() };
    context.async_fd = File::open("/dev/null").unwrap().into_raw_fd();
    Box::into_raw(Box::new(context))
}

extern "C" fn close_device(context: *mut ibv_context) -> c_int {
    // SAFETY: from `open_device`, and freed once.
    let context = unsafe { Box::from_raw(context) };
    // SAFETY: opened there, and closed once.
    drop(unsafe { OwnedFd::from_raw_fd(context.async_fd) });
    0
}

extern "C" fn query_device(_: *mut ibv_context, attr: *mut ibv_device_attr) -> c_int {
    // SAFETY: the caller's structure.
    let attr = unsafe { &mut *attr };
    (attr.phys_port_cnt, attr.max_sge) = (1, 3);
    0
}

extern "C" fn query_port(_: *mut ibv_context, _: u8, attr: *mut ibv_port_attr) -> c_int {
    // SAFETY: the caller's structure.
    let attr = unsafe { &mut *attr };
    attr.state = ibv_port_state::IBV_PORT_ACTIVE;
    (attr.max_mtu, attr.active_mtu) = (ibv_mtu::IBV_MTU_4096, ibv_mtu::IBV_MTU_4096);
    attr.link_layer = IBV_LINK_LAYER_INFINIBAND;
    (attr.gid_tbl_len, attr.lid, attr.max_msg_sz) = (1, 3, 1 << 30);
    0
}

extern "C" fn query_gid(_: *mut ibv_context, _: u8, _: c_int, gid: *mut ibv_gid) -> c_int {
    // SAFETY: the caller's structure.
    unsafe { (*gid).raw = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1] };
    0
}

extern "C" fn fork_init() -> c_int {
    0
}

fn device(relaxed: bool, change: impl FnOnce(&mut Verbs)) -> Context {
    let mut verbs = fake::whole();
    let functions = &mut verbs.functions;
    functions.ibv_get_device_list = device_list;
    functions.ibv_free_device_list = free_list;
    functions.ibv_get_device_name = name;
    functions.ibv_open_device = open_device;
    functions.ibv_close_device = close_device;
    functions.ibv_query_device = query_device;
    functions.ibv_query_port = query_port;
    functions.ibv_query_gid = query_gid;
    functions.ibv_fork_init = fork_init;
    functions.ibv_alloc_pd = alloc_pd;
    functions.ibv_dealloc_pd = dealloc_pd;
    functions.ibv_reg_mr = reg_mr;
    functions.ibv_reg_mr_iova2 = Some(reg_mr_iova2);
    functions.ibv_reg_dmabuf_mr = Some(reg_dmabuf_mr);
    functions.ibv_dereg_mr = dereg_mr;
    change(&mut verbs);
    let mut config = RdmaConfig::new("fake0");
    config.relaxed_ordering = relaxed;
    let folder = fake::Folder::new();
    open(Box::leak(Box::new(verbs)), &config, folder.path()).unwrap()
}

/// At its address there is nothing that a CPU could read.
#[derive(Debug)]
struct Vram {
    /// Where in a file it begins; `None`: its owner exports nothing.
    offset: Option<u64>,
    kind: MemoryKind,
}

// SAFETY: the contract lets nobody go to an address that is not the host's; of the GPU there is none.
unsafe impl Memory for Vram {
    fn addr(&self) -> u64 {
        ADDR
    }
    fn len(&self) -> u64 {
        LEN
    }
    fn kind(&self) -> MemoryKind {
        self.kind
    }
    fn fd(&self) -> Option<FdSpan<'_>> {
        None
    }
    fn dma_buf(&self) -> Result<DmaBuf, NoDmaBuf> {
        let refused = || NoDmaBuf::Refused(io::Error::from_raw_os_error(libc::ENODEV).into());
        let offset = self.offset.ok_or_else(refused)?;
        Ok(DmaBuf {
            fd: File::open("/dev/null").unwrap().into(),
            offset,
            len: LEN,
        })
    }
}

fn vram(offset: Option<u64>) -> Arc<Vram> {
    let gpu = "0000:1b:00.0".parse().unwrap();
    let kind = MemoryKind::Device { gpu };
    Arc::new(Vram { offset, kind })
}

fn answers(errnos: &[c_int]) {
    SCRIPT.with_borrow_mut(|script| {
        script.answers = errnos.to_vec();
        script.calls.clear();
    });
}

fn calls() -> Vec<Call> {
    SCRIPT.with_borrow(|script| script.calls.clone())
}

fn by_dma_buf(offset: u64, access: u32) -> Call {
    let (len, iova) = (LEN as usize, ADDR);
    Call::DmaBuf {
        offset,
        len,
        iova,
        access,
    }
}

fn by_address(access: u32) -> Call {
    let (addr, len) = (ADDR, LEN as usize);
    Call::Address { addr, len, access }
}

/// Doorbells are for those who ring them: a NIC's driver would take them for memory.
#[test]
fn a_devices_registers_are_refused_before_the_library_is_asked() {
    let pd = device(true, |_| {}).alloc_pd().unwrap();
    answers(&[]);
    let kind = MemoryKind::Registers;
    let offset = Some(OFFSET);
    let refused = pd.register(Arc::new(Vram { offset, kind }), Access::REMOTE_READ);
    assert!(
        matches!(&refused, Err(Error::RegisterKind { kind, .. }) if *kind == MemoryKind::Registers),
        "{refused:?}"
    );
    assert!(calls().is_empty(), "{:?}", calls());
}

const READABLE: u32 = Access::REMOTE_READ.bits();
const RELAXED: u32 = IBV_ACCESS_RELAXED_ORDERING;

#[test]
fn a_dma_buf_is_registered_at_the_gpus_addresses_and_nothing_else_is_tried() {
    let context = device(true, |_| {});
    let pd = context.alloc_pd().unwrap();
    let region = pd
        .register(vram(Some(OFFSET)), Access::REMOTE_READ)
        .unwrap();
    assert_eq!(calls(), [by_dma_buf(OFFSET, READABLE | RELAXED)]);
    // What peers are told is what the NIC was told.
    assert_eq!((region.addr(), region.len(), region.rkey()), (ADDR, LEN, 7));
    let fd = SCRIPT.with_borrow(|script| script.fds[0]);
    // SAFETY: a question about a number.
    let open = unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0;
    let is_it = std::fs::read_link(format!("/proc/self/fd/{fd}"));
    assert!(
        !open || is_it.is_ok_and(|path| path != Path::new("/dev/null")),
        "the file is closed: the region has the memory"
    );
    drop(region);
    assert_eq!(SCRIPT.with_borrow(|script| script.deregistered), 1);
}

#[test]
fn a_nic_that_refuses_relaxed_ordering_registers_without_and_is_not_asked_again() {
    let context = device(true, |_| {});
    let pd = context.alloc_pd().unwrap();
    answers(&[EINVAL]);
    let _first = pd
        .register(vram(Some(OFFSET)), Access::REMOTE_READ)
        .unwrap();
    let strict = by_dma_buf(OFFSET, READABLE);
    assert_eq!(calls(), [by_dma_buf(OFFSET, READABLE | RELAXED), strict]);
    answers(&[]);
    let _second = pd
        .register(vram(Some(OFFSET)), Access::REMOTE_READ)
        .unwrap();
    assert_eq!(calls(), [strict]);
}

#[test]
fn what_is_no_dma_buf_is_registered_by_its_address() {
    let without = |verbs: &mut Verbs| verbs.functions.ibv_reg_dmabuf_mr = None;
    let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE;
    // The library has no function; the owner no file; the file begins elsewhere in a page; the NIC's
    // driver refuses.
    for (context, memory, before) in [
        (device(false, without), vram(Some(OFFSET)), &[][..]),
        (device(false, |_| {}), vram(None), &[]),
        (device(false, |_| {}), vram(Some(OFFSET + 0x800)), &[]),
        (device(false, |_| {}), vram(Some(OFFSET)), &[EOPNOTSUPP]),
    ] {
        answers(before);
        let pd = context.alloc_pd().unwrap();
        let region = pd.register(memory, access).unwrap();
        let tried = before.iter().map(|_| by_dma_buf(OFFSET, access.bits()));
        let all: Vec<Call> = tried.chain([by_address(access.bits())]).collect();
        assert_eq!(calls(), all);
        assert_eq!((region.addr(), region.rkey()), (ADDR, 7));
    }
}

#[test]
fn memory_that_nothing_registers_is_refused_with_all_that_was_tried() {
    let without = |verbs: &mut Verbs| verbs.functions.ibv_reg_dmabuf_mr = None;
    let refused = |context: Context, memory: Arc<Vram>, errnos: &[c_int]| {
        answers(errnos);
        let pd = context.alloc_pd().unwrap();
        let refused = pd.register(memory, Access::LOCAL_WRITE).unwrap_err();
        let words = refused.to_string();
        let Error::RegisterDevice {
            dma_buf, address, ..
        } = refused
        else {
            panic!("{words}");
        };
        assert_eq!(address.raw_os_error(), Some(EFAULT));
        for part in [
            "fake0 does not register",
            "memory of GPU 0000:1b:00.0",
            "nvidia_peermem",
        ] {
            assert!(words.contains(part), "{words}");
        }
        (*dma_buf, words)
    };
    let (fault, words) = refused(device(false, without), vram(Some(OFFSET)), &[EFAULT]);
    assert!(
        matches!(&fault, DmaBufFault::NoFunction { library } if library.ends_with("libibverbs.so.1"))
    );
    assert!(words.contains("no ibv_reg_dmabuf_mr"), "{words}");

    let (fault, words) = refused(device(false, |_| {}), vram(None), &[EFAULT]);
    assert!(matches!(fault, DmaBufFault::NoDmaBuf(NoDmaBuf::Refused(_))));
    assert!(words.contains("No such device"), "{words}");

    let (fault, _) = refused(device(false, |_| {}), vram(Some(0x10)), &[EFAULT]);
    assert!(matches!(fault, DmaBufFault::Offset { offset: 0x10, .. }));

    // With relaxed ordering and without.
    let errnos = [EOPNOTSUPP, EOPNOTSUPP, EINVAL, EFAULT];
    let (fault, words) = refused(device(true, |_| {}), vram(Some(OFFSET)), &errnos);
    assert!(matches!(&fault, DmaBufFault::Refused(e) if e.raw_os_error() == Some(EOPNOTSUPP)));
    assert!(
        words.contains("ibv_reg_dmabuf_mr: Operation not supported"),
        "{words}"
    );
    let local = Access::LOCAL_WRITE.bits();
    assert_eq!(
        calls(),
        [
            by_dma_buf(OFFSET, local | RELAXED),
            by_dma_buf(OFFSET, local),
            by_address(local | RELAXED),
            by_address(local),
        ]
    );
}

#[test]
fn host_memory_is_no_dma_buf_to_anybody() {
    let context = device(false, |_| {});
    let pd = context.alloc_pd().unwrap();
    let (offset, kind) = (Some(OFFSET), MemoryKind::Host);
    let region = pd.register(Arc::new(Vram { offset, kind }), Access::NONE);
    assert_eq!(calls(), [by_address(0)]);
    drop(region);
}
