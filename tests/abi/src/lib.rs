//! Compares the C declarations of `crates/verbs` with the installed headers of rdma-core and with
//! rdma-sys, which bindgen made from them; and the versions of symbols with the installed library. The same for
//! the GPU runtimes' declarations in `crates/hipmem`, in `gpu`, and for the queues of mlx5 devices, in `mlx5`.
#![cfg(test)]
#![allow(
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    dead_code
)]

mod gpu;
mod mlx5;

#[path = "../../../crates/verbs/src/sys/enums.rs"]
mod enums;
#[path = "../../../crates/verbs/src/sys/types.rs"]
mod types;

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char};
use std::mem::{offset_of, size_of};

#[allow(clippy::all, reason = "it is generated")]
mod facts {
    use super::*;

    // ours(), rdma() and FUNCTIONS.
    include!(concat!(env!("OUT_DIR"), "/facts.rs"));
}

/// Structures that are handed over with their size and may be longer in newer headers.
const GROW: [&str; 2] = ["ibv_port_attr: size", "ibv_gid_entry: size"];

type Facts = BTreeMap<String, i64>;

fn size_of_field<T, F>(_: impl Fn(*const T) -> *const F) -> usize {
    size_of::<F>()
}

fn map(list: Vec<(&str, i64)>) -> Facts {
    let len = list.len();
    let facts: Facts = list.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
    assert_eq!(facts.len(), len, "two facts of one name");
    facts
}

#[repr(C)]
struct Fact {
    name: *const c_char,
    value: i64,
}

unsafe extern "C" {
    static kvxfer_abi_facts: [Fact; 0];
}

/// The C compiler's table.
fn headers() -> Facts {
    facts_of((&raw const kvxfer_abi_facts).cast())
}

/// A table of C, which ends with a name that is null.
fn facts_of(mut at: *const Fact) -> Facts {
    let mut facts = Facts::new();
    loop {
        // SAFETY: the table ends with a name that is null, and has not ended yet.
        let fact = unsafe { at.read() };
        if fact.name.is_null() {
            return facts;
        }
        // SAFETY: a string of the C program.
        let name = unsafe { CStr::from_ptr(fact.name) };
        facts.insert(name.to_string_lossy().into_owned(), fact.value);
        at = at.wrapping_add(1);
    }
}

/// Every difference, one line each.
fn differences(ours: &Facts, theirs: &Facts) -> Vec<String> {
    let mut all = Vec::new();
    for (name, value) in theirs {
        match ours.get(name) {
            Some(mine) if mine == value => {}
            Some(mine) if GROW.contains(&name.as_str()) && mine < value => {}
            Some(mine) => all.push(format!("{name}: ours {mine}, theirs {value}")),
            None => all.push(format!("{name}: not ours")),
        }
    }
    all
}

#[test]
fn every_declaration_is_as_in_the_headers() {
    let (ours, headers) = (map(facts::ours()), headers());
    let uncompared: Vec<_> = ours.keys().filter(|k| !headers.contains_key(*k)).collect();
    assert!(uncompared.is_empty(), "not compared: {uncompared:?}");
    let differences = differences(&ours, &headers);
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn every_declaration_is_as_in_rdma_sys() {
    let (ours, rdma) = (map(facts::ours()), map(facts::rdma()));
    // What it does not have, and what is no matter of layouts and values.
    let has_not = ["IBV_ACCESS_OPTIONAL_RANGE", "IBV_LINK_LAYER_", "IBV_QPF_"];
    let uncompared: Vec<_> = ours
        .keys()
        .filter(|k| !rdma.contains_key(*k))
        .filter(|k| !k.ends_with(": signed") && !k.ends_with(": prototype"))
        .filter(|k| !has_not.iter().any(|begin| k.starts_with(begin)))
        .collect();
    assert!(uncompared.is_empty(), "not compared: {uncompared:?}");
    let differences = differences(&ours, &rdma);
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// The sizes and places that are known of rdma-core 44 on x86-64: the comparison compares.
#[test]
#[cfg(target_arch = "x86_64")]
fn a_few_facts_are_the_known_ones() {
    let ours = map(facts::ours());
    for (name, value) in [
        ("ibv_wc: size", 48),
        ("ibv_send_wr: size", 128),
        ("ibv_qp_attr: size", 144),
        ("ibv_context: size", 328),
        ("ibv_qp: size", 160),
        ("ibv_qp.qp_num: offset", 52),
        ("ibv_mr.rkey: offset", 40),
        ("ibv_context_ops.post_send: offset", 200),
        ("IBV_WC_RECV", 128),
        ("IBV_NODE_UNKNOWN", -1),
    ] {
        assert_eq!(ours.get(name), Some(&value), "{name}");
    }
}

#[test]
fn a_difference_is_seen() {
    let ours = map(facts::ours());
    let mut theirs = ours.clone();
    assert!(differences(&ours, &theirs).is_empty());
    *theirs.get_mut("ibv_wc.status: offset").unwrap() += 4;
    *theirs.get_mut("ibv_port_attr: size").unwrap() += 4;
    *theirs.get_mut("ibv_gid_entry: size").unwrap() -= 4;
    theirs.insert("ibv_wc.more: offset".into(), 48);
    let differences = differences(&ours, &theirs);
    assert_eq!(
        differences,
        [
            "ibv_gid_entry: size: ours 32, theirs 28",
            "ibv_wc.more: offset: not ours",
            "ibv_wc.status: offset: ours 8, theirs 12"
        ]
    );
}

/// The version that a program links against is the one that we ask the loader for, and is not the
/// one of 2005.
#[test]
fn symbols_have_the_versions_that_a_linker_would_take() {
    // SAFETY: libibverbs may be loaded at any time.
    let library = unsafe { libc::dlopen(c"libibverbs.so.1".as_ptr(), libc::RTLD_NOW) };
    assert!(!library.is_null(), "no libibverbs.so.1");
    for (name, version) in facts::FUNCTIONS {
        let (symbol, at) = (
            CString::new(*name).unwrap(),
            CString::new(*version).unwrap(),
        );
        let find = |version: &CStr| {
            // SAFETY: the library stays loaded.
            unsafe { libc::dlvsym(library, symbol.as_ptr(), version.as_ptr()) }
        };
        // SAFETY: as above.
        let default = unsafe { libc::dlsym(library, symbol.as_ptr()) };
        let ours = find(&at);
        assert!(!ours.is_null(), "{name}@{version} is missing");
        assert_eq!(ours, default, "{name}@{version} is not the default");
        let old = find(c"IBVERBS_1.0");
        assert!(*version == "IBVERBS_1.0" || ours != old, "{name}");
    }
}
