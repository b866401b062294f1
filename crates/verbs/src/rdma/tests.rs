//! What the list says where the kernel, or a device, is not there, and of devices that misbehave.

use std::io;
use std::mem::zeroed;
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use libc::{EACCES, EIO, EMFILE, ENOSYS, c_char, c_int, ssize_t};

use super::{Gid, GidKind, LinkLayer, PortDetails, PortState, RdmaDevice, Transport, list, mbps};
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
    let text = e.to_string();
    assert!(
        text.starts_with("no RDMA: this machine has no RDMA device: load"),
        "{text}"
    );
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

extern "C" fn port_without_gids(
    context: *mut ibv_context,
    port: u8,
    attr: *mut ibv_port_attr,
) -> c_int {
    let code = query_port(context, port, attr);
    // SAFETY: the caller's structure.
    unsafe { (*attr).gid_tbl_len = 0 };
    code
}

extern "C" fn second_port_fails(
    context: *mut ibv_context,
    port: u8,
    attr: *mut ibv_port_attr,
) -> c_int {
    match port {
        1 => query_port(context, port, attr),
        _ => EIO,
    }
}

extern "C" fn query_gid_fails(_: *mut ibv_context, _: u8, _: c_int, _: *mut ibv_gid) -> c_int {
    EIO
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

/// The call that failed on the device, and its number.
fn failure<T: std::fmt::Debug>(result: Result<T, Error>) -> (&'static str, Option<i32>) {
    match result {
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

/// The two ports of the device.
fn ports(device: RdmaDevice) -> [Result<PortDetails, Error>; 2] {
    let ports = device.details.unwrap().ports;
    let numbers: Vec<_> = ports.iter().map(|port| port.number).collect();
    assert_eq!(numbers, [1, 2]);
    let details: Vec<_> = ports.into_iter().map(|port| port.details).collect();
    details.try_into().unwrap()
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
    std::fs::write(sys.join("class/infiniband/fake0/parent"), "eth7\n").unwrap();

    // A library that tells no types, and a driver that tells values nobody knows.
    let device = one(|_| {}, sys);
    assert_eq!(
        (device.name.as_str(), device.guid),
        ("fake0", 0x0123_4567_89ab_cdef)
    );
    assert_eq!(device.transport, Transport::Other(17));
    assert_eq!(device.driver.as_deref(), Some("rdma_rxe"));
    assert_eq!(device.place.pci(), None);
    let limits = &device.details.as_ref().unwrap().limits;
    assert_eq!(limits.firmware, "\u{fffd}".repeat(64));
    assert_eq!((limits.max_qp, limits.max_sge), (0, 3));
    let [first, second] = ports(device).map(Result::unwrap);
    assert_eq!(first.state, PortState::Other(41));
    assert_eq!((first.max_mtu, first.active_mtu), (Some(4096), None));
    assert_eq!(first.mbps, Some(100_000));
    assert_eq!(second.link_layer, LinkLayer::Other(9));
    // No flag is set; Ethernet needs none.
    assert_eq!((first.grh_required, second.grh_required), (true, false));
    assert!(second.gids.unwrap().is_empty());
    let kinds = |gids: &[Gid]| gids.iter().map(|g| (g.index, g.kind)).collect::<Vec<_>>();
    let alone = [(0, Some(GidKind::RoceV1)), (2, Some(GidKind::RoceV2))];
    let gids = first.gids.unwrap();
    assert_eq!(kinds(&gids), alone);
    assert_eq!(gids[1].netdev.as_deref(), Some("eth7"));
    assert_eq!(gids[1].address().to_string(), "10.7.0.1");

    // A library that tells them.
    let [first, _] = ports(one(
        |v| v.functions._ibv_query_gid_table = Some(gid_table),
        sys,
    ));
    let expected = [
        (0, Some(GidKind::RoceV1)),
        (1, Some(GidKind::Other(7))),
        (2, Some(GidKind::RoceV2)),
    ];
    assert_eq!(kinds(&first.unwrap().gids.unwrap()), expected);

    // Ports that have none; nobody is asked for no entries.
    let without = ports(one(
        |v| {
            v.functions.ibv_query_port = port_without_gids;
            v.functions._ibv_query_gid_table = Some(gid_table);
        },
        sys,
    ));
    for port in without.map(Result::unwrap) {
        assert!(port.gids.unwrap().is_empty());
    }

    // A table that cannot be had: each port is asked. One that fails is told, and nothing else lost.
    let [first, _] = ports(one(
        |v| v.functions._ibv_query_gid_table = Some(gid_table_fails),
        sys,
    ));
    assert_eq!(kinds(&first.unwrap().gids.unwrap()), alone);
    std::fs::remove_file(attrs.join("types/0")).unwrap();
    let [first, _] = ports(one(|_| {}, sys));
    let alone = [(0, None), (2, Some(GidKind::RoceV2))];
    assert_eq!(kinds(&first.unwrap().gids.unwrap()), alone);
    let [first, second] = ports(one(
        |v| {
            v.functions._ibv_query_gid_table = Some(gid_table_fails);
            v.functions.ibv_query_gid = query_gid_fails;
            v.functions.ibv_query_port = second_port_fails;
        },
        sys,
    ));
    let first = first.unwrap();
    assert_eq!(first.state, PortState::Other(41));
    assert_eq!(failure(first.gids), ("ibv_query_gid", Some(EIO)));
    assert_eq!(failure(second), ("ibv_query_port", Some(EIO)));

    // A device that fails is in the list, with its failure.
    let device = one(|v| v.functions.ibv_open_device = cannot_open, sys);
    let failed = failure(device.details);
    assert_eq!(failed, ("ibv_open_device", Some(EACCES)));
    let device = one(|v| v.functions.ibv_query_device = query_device_fails, sys);
    let failed = failure(device.details);
    assert_eq!(failed, ("ibv_query_device", Some(EIO)));

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
