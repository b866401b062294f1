//! What the list says where the kernel, or a device, is not there, and of devices that misbehave.

use std::io;
use std::mem::zeroed;
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use libc::{EACCES, EIO, EMFILE, ENOSYS, c_char, c_int, ssize_t};

use super::{Gid, GidKind, LinkLayer, PortState, RdmaDevice, Transport, list, mbps};
use crate::error::{Error, KernelFault, NoRdma};
use crate::sys::Verbs;
use crate::sys::enums::{IBV_LINK_LAYER_ETHERNET, ibv_gid_type, ibv_mtu, ibv_port_state};
use crate::sys::fake::{self, Folder};
use crate::sys::types::{
    ibv_context, ibv_device, ibv_device_attr, ibv_gid, ibv_gid_entry, ibv_port_attr,
};

fn fail(errno: c_int) {
    // SAFETY: errno belongs to this thread.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    unsafe { place.write(errno) };
}

fn leaked(change: impl FnOnce(&mut Verbs)) -> &'static Verbs {
    let mut verbs = fake::whole();
    change(&mut verbs);
    Box::leak(Box::new(verbs))
}

extern "C" fn no_list<const ERRNO: c_int>(_: *mut c_int) -> *mut *mut ibv_device {
    fail(ERRNO);
    ptr::null_mut()
}

extern "C" fn empty_list(len: *mut c_int) -> *mut *mut ibv_device {
    // SAFETY: the caller's number.
    unsafe { *len = 0 };
    Box::into_raw(Box::new(ptr::null_mut()))
}

extern "C" fn free_list(list: *mut *mut ibv_device) {
    // SAFETY: from `empty_list` or `one_device`, and freed once.
    drop(unsafe { Box::from_raw(list) });
}

fn interface(sys: &Path, version: &str) {
    let folder = sys.join("class/infiniband_verbs");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("abi_version"), version).unwrap();
}

#[test]
fn a_kernel_without_rdma_a_foreign_version_and_no_device_are_three_answers() {
    let without = leaked(|v| v.functions.ibv_get_device_list = no_list::<ENOSYS>);
    let empty = leaked(|v| {
        v.functions.ibv_get_device_list = empty_list;
        v.functions.ibv_free_device_list = free_list;
    });
    let folder = Folder::new();
    let sys = folder.path();

    for verbs in [without, empty] {
        let e = list(verbs, sys).unwrap_err();
        assert!(e.to_string().contains("modprobe ib_uverbs"), "{e}");
        let Error::NoRdma(NoRdma::Kernel {
            fault: KernelFault::NoInterface { path },
        }) = e
        else {
            panic!("{e}")
        };
        assert_eq!(path, sys.join("class/infiniband_verbs"));
    }

    interface(sys, "99\n");
    let e = list(without, sys).unwrap_err();
    assert!(e.to_string().contains("version 99"), "{e}");
    assert!(e.to_string().contains("libibverbs.so.1"), "{e}");
    assert!(matches!(
        e,
        Error::NoRdma(NoRdma::Kernel {
            fault: KernelFault::Version { .. }
        })
    ));

    let e = list(empty, sys).unwrap_err();
    assert_eq!(e.to_string(), "no RDMA: this machine has no RDMA device");
    for name in ["rxe1", "mlx5_0"] {
        std::fs::create_dir_all(sys.join("class/infiniband").join(name)).unwrap();
    }
    let e = list(empty, sys).unwrap_err();
    assert!(e.to_string().contains("mlx5_0, rxe1"), "{e}");
    assert!(matches!(e, Error::NoRdma(NoRdma::Device { kernel }) if kernel.len() == 2));
}

#[test]
fn another_failure_of_the_list_keeps_its_number() {
    let verbs = leaked(|v| v.functions.ibv_get_device_list = no_list::<EMFILE>);
    let e = list(verbs, Path::new("/nowhere")).unwrap_err();
    let Error::Os { op, source } = e else {
        panic!("{e}")
    };
    assert_eq!(op, "ibv_get_device_list");
    assert_eq!(source.raw_os_error(), Some(EMFILE));
}

// One device, "fake0", of static memory.
static DEVICE: AtomicPtr<ibv_device> = AtomicPtr::new(ptr::null_mut());
static CONTEXT: AtomicPtr<ibv_context> = AtomicPtr::new(ptr::null_mut());
static OPEN: AtomicU32 = AtomicU32::new(0);

extern "C" fn one_device(len: *mut c_int) -> *mut *mut ibv_device {
    if DEVICE.load(Ordering::Acquire).is_null() {
        // SAFETY: numbers, for which all zero bytes are a value.
        let mut device: ibv_device = unsafe { zeroed() };
        device.transport_type.0 = 17;
        for (to, from) in device.name.iter_mut().zip(*b"fake0") {
            *to = c_char::from_ne_bytes([from]);
        }
        DEVICE.store(Box::into_raw(Box::new(device)), Ordering::Release);
        // SAFETY: pointers and numbers, for which all zero bytes are a value.
        let context: ibv_context = unsafe { zeroed() };
        CONTEXT.store(Box::into_raw(Box::new(context)), Ordering::Release);
    }
    // SAFETY: the caller's number.
    unsafe { *len = 1 };
    Box::into_raw(Box::new(DEVICE.load(Ordering::Acquire)))
}

extern "C" fn name(device: *mut ibv_device) -> *const c_char {
    // SAFETY: the device above.
    unsafe { &raw const (*device).name }.cast()
}

extern "C" fn guid(_: *mut ibv_device) -> u64 {
    0x0123_4567_89ab_cdef_u64.to_be()
}

extern "C" fn open(_: *mut ibv_device) -> *mut ibv_context {
    OPEN.fetch_add(1, Ordering::AcqRel);
    CONTEXT.load(Ordering::Acquire)
}

extern "C" fn cannot_open(_: *mut ibv_device) -> *mut ibv_context {
    fail(EACCES);
    ptr::null_mut()
}

/// Names the device's file, which is not there.
extern "C" fn cannot_open_node(device: *mut ibv_device) -> *mut ibv_context {
    // SAFETY: the device above, of which one thread knows.
    let device = unsafe { &mut *device };
    for (to, from) in device.dev_name.iter_mut().zip(*b"kvxfer-none") {
        *to = c_char::from_ne_bytes([from]);
    }
    fail(EIO);
    ptr::null_mut()
}

extern "C" fn close(_: *mut ibv_context) -> c_int {
    OPEN.fetch_sub(1, Ordering::AcqRel);
    0
}

extern "C" fn query_device(_: *mut ibv_context, attr: *mut ibv_device_attr) -> c_int {
    // SAFETY: the caller's structure.
    let attr = unsafe { &mut *attr };
    // A version that fills its field, without a zero byte, and is no text.
    attr.fw_ver.fill(c_char::from_ne_bytes([0xff]));
    attr.max_qp = -5;
    attr.max_sge = 3;
    attr.phys_port_cnt = 2;
    0
}

extern "C" fn query_device_fails(_: *mut ibv_context, _: *mut ibv_device_attr) -> c_int {
    EIO
}

extern "C" fn query_port(_: *mut ibv_context, port: u8, attr: *mut ibv_port_attr) -> c_int {
    // SAFETY: the caller's structure.
    let attr = unsafe { &mut *attr };
    attr.state = ibv_port_state(40 + u32::from(port));
    attr.max_mtu = ibv_mtu::IBV_MTU_4096;
    attr.active_mtu = ibv_mtu(u32::MAX);
    attr.gid_tbl_len = if port == 1 { 3 } else { -1 };
    attr.link_layer = if port == 1 {
        IBV_LINK_LAYER_ETHERNET
    } else {
        9
    };
    (attr.active_width, attr.active_speed) = (2, 32);
    0
}

const V4: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 7, 0, 1];

extern "C" fn query_gid(_: *mut ibv_context, port: u8, index: c_int, gid: *mut ibv_gid) -> c_int {
    assert_eq!(port, 1);
    if index != 1 {
        // SAFETY: the caller's structure.
        unsafe { (*gid).raw = V4 };
    }
    0
}

extern "C" fn gid_table(
    _: *mut ibv_context,
    entries: *mut ibv_gid_entry,
    max: usize,
    _: u32,
    size: usize,
) -> ssize_t {
    assert_eq!((max, size), (3, size_of::<ibv_gid_entry>()));
    for (at, index, kind) in [(0, 2, 2), (1, 0, 1), (2, 1, 7)] {
        let entry = ibv_gid_entry {
            gid: ibv_gid { raw: V4 },
            gid_index: index,
            port_num: 1,
            gid_type: ibv_gid_type(kind),
            ndev_ifindex: 0,
        };
        // SAFETY: the caller's array of `max`.
        let place = unsafe { entries.add(at) };
        // SAFETY: as above.
        unsafe { place.write(entry) };
    }
    3
}

extern "C" fn gid_table_fails(
    _: *mut ibv_context,
    _: *mut ibv_gid_entry,
    _: usize,
    _: u32,
    _: usize,
) -> ssize_t {
    -(EIO as ssize_t)
}

fn one(change: impl FnOnce(&mut Verbs), sys: &Path) -> RdmaDevice {
    let verbs = leaked(|v| {
        v.functions.ibv_get_device_list = one_device;
        v.functions.ibv_free_device_list = free_list;
        v.functions.ibv_get_device_name = name;
        v.functions.ibv_get_device_guid = guid;
        v.functions.ibv_open_device = open;
        v.functions.ibv_close_device = close;
        v.functions.ibv_query_device = query_device;
        v.functions.ibv_query_port = query_port;
        v.functions.ibv_query_gid = query_gid;
        change(v);
    });
    list(verbs, sys).unwrap().pop().unwrap()
}

fn failure(device: RdmaDevice) -> (&'static str, Option<i32>) {
    match device.details {
        Err(Error::Device {
            device,
            call,
            source,
        }) => {
            assert_eq!(device, "fake0");
            (call, source.raw_os_error())
        }
        other => panic!("{other:?}"),
    }
}

// One test, for the fake device and its count are one.
#[test]
fn a_device_is_told_with_what_is_odd_about_it_and_is_closed() {
    let folder = Folder::new();
    let sys = folder.path();
    let attrs = sys.join("class/infiniband/fake0/ports/1/gid_attrs");
    for (what, text) in [("types", "RoCE v2\n"), ("ndevs", "eth7\n")] {
        std::fs::create_dir_all(attrs.join(what)).unwrap();
        std::fs::write(attrs.join(what).join("2"), text).unwrap();
    }
    std::fs::write(attrs.join("types/0"), "IB/RoCE v1\n").unwrap();

    // A library that tells no types, and a driver that tells values nobody knows.
    let device = one(|_| {}, sys);
    assert_eq!(
        (device.name.as_str(), device.guid),
        ("fake0", 0x0123_4567_89ab_cdef)
    );
    assert_eq!(device.transport, Transport::Other(17));
    let details = device.details.unwrap();
    assert_eq!(details.limits.firmware, "\u{fffd}".repeat(64));
    assert_eq!((details.limits.max_qp, details.limits.max_sge), (0, 3));
    let [first, second] = details.ports.as_slice() else {
        panic!("{details:?}")
    };
    assert_eq!((first.number, first.state), (1, PortState::Other(41)));
    assert_eq!((first.max_mtu, first.active_mtu), (Some(4096), None));
    assert_eq!(first.mbps, Some(100_000));
    assert_eq!(second.link_layer, LinkLayer::Other(9));
    assert!(second.gids.is_empty());
    let kinds = |gids: &[Gid]| gids.iter().map(|g| (g.index, g.kind)).collect::<Vec<_>>();
    let expected = [(0, GidKind::RoceV1), (2, GidKind::RoceV2)];
    assert_eq!(kinds(&first.gids), expected);
    assert_eq!(first.gids[1].netdev.as_deref(), Some("eth7"));
    assert_eq!(first.gids[1].address().to_string(), "10.7.0.1");

    // A library that tells them.
    let device = one(|v| v.functions._ibv_query_gid_table = Some(gid_table), sys);
    let expected = [
        (0, GidKind::RoceV1),
        (1, GidKind::Other(7)),
        (2, GidKind::RoceV2),
    ];
    assert_eq!(kinds(&device.details.unwrap().ports[0].gids), expected);

    // A device that fails is in the list, with its failure.
    let e = failure(one(|v| v.functions.ibv_open_device = cannot_open, sys));
    assert_eq!(e, ("ibv_open_device", Some(EACCES)));
    let e = failure(one(
        |v| v.functions.ibv_query_device = query_device_fails,
        sys,
    ));
    assert_eq!(e, ("ibv_query_device", Some(EIO)));
    let fails = |v: &mut Verbs| v.functions._ibv_query_gid_table = Some(gid_table_fails);
    assert_eq!(failure(one(fails, sys)), ("ibv_query_gid_table", Some(EIO)));

    let device = one(|v| v.functions.ibv_open_device = cannot_open_node, sys);
    let Err(Error::DeviceNode { path, source, .. }) = device.details else {
        panic!("{:?}", device.details)
    };
    assert_eq!(path, Path::new("/dev/infiniband/kvxfer-none"));
    assert_eq!(source.kind(), io::ErrorKind::NotFound);

    assert_eq!(OPEN.load(Ordering::Acquire), 0, "devices left open");
}

#[test]
fn speeds_that_nobody_knows_are_none() {
    assert_eq!(mbps(2, 64), Some(200_000));
    assert_eq!(mbps(1, 1), Some(2_500));
    assert_eq!(mbps(3, 1), None);
    assert_eq!(mbps(1, 0), None);
}

/// Whatever this machine has, the answer is one of those that there are.
#[test]
fn this_machine_gives_devices_or_says_what_is_missing() {
    match super::rdma_devices() {
        Ok(devices) => assert!(!devices.is_empty()),
        Err(Error::NoRdma(e)) => assert!(!e.to_string().is_empty()),
        Err(e) => panic!("{e}: {:?}", io::Error::last_os_error()),
    }
}
