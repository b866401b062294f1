//! What is said where the library, or a part of it, is not there; and the calls through tables.

use std::ffi::OsStr;
use std::mem::zeroed;
use std::ptr;

use libc::{EOPNOTSUPP, c_int};

use super::Verbs;
use super::enums::{ibv_port_state, ibv_wc_status};
use super::fake::{self, Folder};
use super::functions::Functions;
use super::inline;
use super::types::{
    ibv_context, ibv_cq, ibv_port_attr, ibv_qp, ibv_recv_wr, ibv_send_wr, ibv_wc, verbs_context,
};
use crate::error::NoRdma;

fn refused(name: impl AsRef<OsStr>) -> NoRdma {
    match Verbs::open(name) {
        Ok(verbs) => panic!("{} was loaded", verbs.path.display()),
        Err(e) => e,
    }
}

#[test]
fn a_library_that_is_not_there_is_told_with_its_name_and_the_loaders_words() {
    let folder = Folder::new();
    let text = folder.path().join("text.so");
    std::fs::write(&text, [b'x'; 4096]).unwrap();
    for (name, fault) in [
        (
            "libkvxfer-none.so.1".as_ref(),
            "cannot open shared object file",
        ),
        (text.as_os_str(), "invalid ELF header"),
    ] {
        let e = refused(name);
        let words = e.to_string();
        assert!(words.contains(fault), "{words}");
        assert_eq!(words.matches(name.to_str().unwrap()).count(), 1, "{words}");
        assert!(
            matches!(&e, NoRdma::Library { name: n, .. } if n.as_os_str() == name),
            "{e:?}"
        );
    }
}

#[test]
fn each_required_symbol_is_missed_by_name_and_with_the_librarys_path() {
    let folder = Folder::new();
    // The first, the last, and one between.
    let required = Functions::REQUIRED;
    for (symbol, version) in [required[0], required[9], required[required.len() - 1]] {
        let place = folder.path().join(symbol);
        std::fs::create_dir(&place).unwrap();
        let path = fake::build(&place, Some(symbol));
        let e = refused(&path);
        let words = e.to_string();
        assert!(words.contains(&format!("{symbol}@{version}")), "{words}");
        assert!(words.contains(path.to_str().unwrap()), "{words}");
        assert!(
            matches!(e, NoRdma::Symbol { symbol: s, library, .. } if s == symbol && library == path)
        );
    }
}

#[test]
fn the_old_abi_is_not_taken_and_what_is_optional_may_be_missing() {
    let verbs = fake::whole();
    let functions = &verbs.functions;
    // SAFETY: the fake's functions take nothing and say which they are.
    assert_eq!(unsafe { (functions.ibv_destroy_qp)(ptr::null_mut()) }, 11);
    assert!(functions._ibv_query_gid_table.is_none());
    assert!(functions.ibv_reg_dmabuf_mr.is_none());
    assert!(functions.ibv_reg_mr_iova2.is_none());
}

/// It is for the whole process, so whoever only looks leaves it alone.
#[test]
fn nobody_but_who_registers_memory_prepares_for_forks() {
    let verbs = fake::whole();
    // SAFETY: the fake's function takes nothing, and counts its calls.
    assert_eq!(unsafe { (verbs.functions.ibv_fork_init)() }, 0);
}

#[test]
fn a_library_of_version_1_0_alone_is_missing_a_symbol() {
    let folder = Folder::new();
    let body: String = Functions::REQUIRED
        .iter()
        .map(|(name, _)| format!("long {name}(void) {{ return 10; }}\n"))
        .collect();
    let map = "IBVERBS_1.0 { global: ibv_*; local: *; };\n";
    let path = fake::compile(folder.path(), &body, Some(map));
    let e = refused(&path);
    assert!(matches!(
        e,
        NoRdma::Symbol {
            symbol: "ibv_get_device_list",
            version: "IBVERBS_1.1",
            ..
        }
    ));
    // A library without versions, as an imitation may be, has one function of each name.
    let place = folder.path().join("plain");
    std::fs::create_dir(&place).unwrap();
    let path = fake::compile(&place, &body, None);
    assert_eq!(Verbs::open(&path).map(|verbs| verbs.path).ok(), Some(path));
}

extern "C" fn post_send(
    _: *mut ibv_qp,
    list: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the test's own.
    unsafe { *bad = list };
    21
}

extern "C" fn post_recv(
    _: *mut ibv_qp,
    list: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: the test's own.
    unsafe { *bad = list };
    22
}

extern "C" fn poll_cq(_: *mut ibv_cq, max: c_int, wc: *mut ibv_wc) -> c_int {
    // SAFETY: the test's own, one.
    unsafe { (*wc).status = ibv_wc_status(77) };
    max
}

extern "C" fn req_notify_cq(_: *mut ibv_cq, solicited_only: c_int) -> c_int {
    30 + solicited_only
}

extern "C" fn query_port(
    _: *mut ibv_context,
    port: u8,
    attr: *mut ibv_port_attr,
    size: usize,
) -> c_int {
    assert_eq!(size, size_of::<ibv_port_attr>());
    // SAFETY: the test's own.
    let attr = unsafe { &mut *attr };
    attr.lid = port.into();
    attr.flags = 1;
    0
}

extern "C" fn compat_query_port(_: *mut ibv_context, _: u8, attr: *mut ibv_port_attr) -> c_int {
    // SAFETY: the test's own.
    unsafe { (*attr).state = ibv_port_state(99) };
    0
}

#[test]
fn inline_functions_go_through_the_drivers_table() {
    // SAFETY: pointers and numbers, for which all zero bytes are a value.
    let mut context: ibv_context = unsafe { zeroed() };
    // SAFETY: as above.
    let mut qp: ibv_qp = unsafe { zeroed() };
    // SAFETY: as above.
    let mut cq: ibv_cq = unsafe { zeroed() };
    // SAFETY: as above.
    let mut send: ibv_send_wr = unsafe { zeroed() };
    // SAFETY: as above.
    let mut recv: ibv_recv_wr = unsafe { zeroed() };
    // SAFETY: as above.
    let mut wc: ibv_wc = unsafe { zeroed() };
    let (mut bad_send, mut bad_recv) = (ptr::null_mut(), ptr::null_mut());
    for there in [false, true] {
        if there {
            context.ops.post_send = Some(post_send);
            context.ops.post_recv = Some(post_recv);
            context.ops.poll_cq = Some(poll_cq);
            context.ops.req_notify_cq = Some(req_notify_cq);
        }
        let context = &raw mut context;
        (qp.context, cq.context) = (context, context);
        // SAFETY: the structures live, and the functions touch what they are given.
        let sent = unsafe { inline::post_send(&raw mut qp, &raw mut send, &raw mut bad_send) };
        // SAFETY: as above.
        let received = unsafe { inline::post_recv(&raw mut qp, &raw mut recv, &raw mut bad_recv) };
        // SAFETY: as above.
        let polled = unsafe { inline::poll_cq(&raw mut cq, 1, &raw mut wc) };
        // SAFETY: as above.
        let armed = unsafe { inline::req_notify_cq(&raw mut cq, 1) };
        let got = (sent, received, polled, armed);
        let none = (EOPNOTSUPP, EOPNOTSUPP, -EOPNOTSUPP, EOPNOTSUPP);
        assert_eq!(got, if there { (21, 22, 1, 31) } else { none });
    }
    assert_eq!(bad_send, &raw mut send);
    assert_eq!(bad_recv, &raw mut recv);
    assert_eq!(wc.status, ibv_wc_status(77));
}

/// What [`inline::query_port`] does with this context, whose library says it reaches `sz` bytes.
fn port_of(abi_compat: usize, sz: usize, there: bool) -> ibv_port_attr {
    let mut verbs = fake::whole();
    verbs.functions.ibv_query_port = compat_query_port;
    // SAFETY: pointers and numbers, for which all zero bytes are a value.
    let mut extended: verbs_context = unsafe { zeroed() };
    extended.sz = sz;
    extended.query_port = there.then_some(query_port as _);
    extended.context.abi_compat = ptr::without_provenance_mut(abi_compat);
    // The whole structure is reached from its last field.
    let context = (&raw mut extended)
        .wrapping_byte_add(std::mem::offset_of!(verbs_context, context))
        .cast::<ibv_context>();
    let mut attr = ibv_port_attr {
        qkey_viol_cntr: 5,
        ..ibv_port_attr::default()
    };
    // SAFETY: the structure lives.
    let code = unsafe { inline::query_port(&verbs.functions, context, 3, &mut attr) };
    assert_eq!((code, attr.qkey_viol_cntr), (0, 0));
    attr
}

#[test]
fn a_port_is_asked_of_the_driver_where_there_is_a_place_for_it() {
    let size = size_of::<verbs_context>();
    for (sz, there) in [(size, true), (size + 64, true)] {
        let attr = port_of(usize::MAX, sz, there);
        assert_eq!((attr.lid, attr.flags), (3, 1), "{sz} {there}");
    }
    for (abi_compat, sz, there) in [
        (usize::MAX, size, false),
        (usize::MAX, size - 8, true),
        (0, size, true),
    ] {
        let attr = port_of(abi_compat, sz, there);
        assert_eq!(attr.state, ibv_port_state(99), "{abi_compat} {sz} {there}");
        assert_eq!((attr.lid, attr.flags), (0, 0), "what is left out is zero");
    }
}
