//! Each step of mapping a device's queues, with a library that is made for it: no device has been mapped.

use std::cell::RefCell;
use std::mem::zeroed;
use std::process::Command;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use libc::{EOPNOTSUPP, c_char, c_int, c_void};

use super::dv::{MLX5DV_OBJ_CQ, MLX5DV_OBJ_QP, mlx5dv_cq, mlx5dv_obj, mlx5dv_qp};
use super::library::Mlx5;
use super::mapped::{MappedCompletions, MappedQueues, MappedSends, NoMlx5, map};
use super::spans::spans;
use super::{CqDepth, DoorbellRecord, Qpn, SqDepth};
use crate::memory::MemoryKind;
use crate::sys::fake::Folder;
use crate::sys::types::{ibv_context, ibv_cq, ibv_device, ibv_qp};
use crate::{Access, Error, QpCaps, open_null};

/// What the library says.
#[derive(Clone, Copy)]
struct Says {
    drives: bool,
    codes: (c_int, c_int),
    qp: mlx5dv_qp,
    cq: mlx5dv_cq,
}

thread_local! {
    static SAYS: RefCell<Option<Says>> = const { RefCell::new(None) };
}

fn says() -> Says {
    SAYS.with_borrow(|says| says.expect("a test has said it"))
}

extern "C" fn is_supported(_: *mut ibv_device) -> bool {
    says().drives
}

extern "C" fn init_obj(obj: *mut mlx5dv_obj, kind: u64) -> c_int {
    // SAFETY: the caller's, and whole.
    let obj = unsafe { *obj };
    let said = says();
    match kind {
        MLX5DV_OBJ_QP => {
            let out = obj.qp.out.cast::<mlx5dv_qp>();
            // SAFETY: as above.
            let asked = unsafe { (*out).comp_mask };
            let mask = said.qp.comp_mask & asked;
            // SAFETY: as above.
            unsafe { out.write(said.qp) };
            // SAFETY: as above. What is not asked for is not told.
            unsafe { (*out).comp_mask = mask };
            said.codes.0
        }
        MLX5DV_OBJ_CQ => {
            // SAFETY: as above.
            unsafe { obj.cq.out.cast::<mlx5dv_cq>().write(said.cq) };
            said.codes.1
        }
        _ => panic!("{kind} was not to be asked for"),
    }
}

fn at<T>(addr: usize) -> *mut T {
    ptr::with_exposed_provenance_mut(addr)
}

/// A queue pair as it should be.
fn good() -> Says {
    // SAFETY: numbers and pointers, all of which may be 0.
    let mut qp: mlx5dv_qp = unsafe { zeroed() };
    // SAFETY: as above.
    let mut cq: mlx5dv_cq = unsafe { zeroed() };
    qp.dbrec = at(0x5008);
    qp.sq.buf = at(0x1_0040);
    qp.sq.wqe_cnt = 256;
    qp.sq.stride = 64;
    qp.bf.reg = at(0x7_0800);
    qp.bf.size = 512;
    qp.comp_mask = 1;
    qp.uar_mmap_offset = 0x3000;
    cq.buf = at(0x2_0000);
    cq.dbrec = at(0x5010);
    cq.cqe_cnt = 512;
    cq.cqe_size = 64;
    cq.cqn = 77;
    Says {
        drives: true,
        codes: (0, 0),
        qp,
        cq,
    }
}

const QPN: u32 = 0x00ab_cdef;

/// Maps a queue pair of a device of this name, while the library says this.
fn mapped(
    said: Says,
    change: impl FnOnce(&mut ibv_qp),
) -> Result<(MappedSends, MappedCompletions), NoMlx5> {
    SAYS.set(Some(said));
    // SAFETY: structures of C that nobody looks further into; pointers and functions in them may be null.
    let mut device: Box<ibv_device> = Box::new(unsafe { zeroed() });
    for (to, from) in device.name.iter_mut().zip(b"mlx5_7") {
        *to = *from as c_char;
    }
    // SAFETY: as above.
    let mut context: Box<ibv_context> = Box::new(unsafe { zeroed() });
    context.device = &raw mut *device;
    // SAFETY: as above.
    let mut cq: Box<ibv_cq> = Box::new(unsafe { zeroed() });
    // SAFETY: as above.
    let mut qp: Box<ibv_qp> = Box::new(unsafe { zeroed() });
    qp.context = &raw mut *context;
    qp.send_cq = &raw mut *cq;
    qp.qp_num = QPN;
    change(&mut qp);
    let (qp, cq) = (NonNull::from(&mut *qp), NonNull::from(&mut *cq));
    let mlx5 = Mlx5::of(is_supported, init_obj);
    // SAFETY: both are there, as far as anybody looks.
    unsafe { map(&mlx5, qp, cq) }
}

#[test]
fn a_devices_queues_are_told_by_their_addresses() {
    let (sends, completions) = mapped(good(), |_| ()).expect("all is as it should be");
    let wanted = MappedSends {
        qpn: Qpn::new(QPN).expect("24 bits"),
        slots: 0x1_0040,
        depth: SqDepth::new(256).expect("a power"),
        record: 0x5008,
        bell: 0x7_0800,
        bell_bytes: 512,
        bell_offset: Some(0x3000),
    };
    assert_eq!(sends, wanted);
    let wanted = MappedCompletions {
        cqn: 77,
        slots: 0x2_0000,
        depth: CqDepth::new(512).expect("a power"),
        record: 0x5010,
    };
    assert_eq!(completions, wanted);
    let mut quiet = good();
    quiet.qp.comp_mask = 0;
    let (sends, _) = mapped(quiet, |_| ()).expect("the offset is not needed");
    assert_eq!(sends.bell_offset, None);
}

#[test]
fn each_step_fails_with_what_was_missing() {
    let other = Says {
        drives: false,
        ..good()
    };
    let e = mapped(other, |_| ()).expect_err("no mlx5 device");
    assert!(
        matches!(&e, NoMlx5::NotMlx5 { device } if device == "mlx5_7"),
        "{e}"
    );
    let e = mapped(good(), |qp| qp.send_cq = at(0x9000)).expect_err("another queue");
    assert!(matches!(e, NoMlx5::OtherQueue { qpn: QPN }), "{e}");
    let e = mapped(good(), |qp| qp.recv_cq = qp.send_cq).expect_err("receives come there too");
    assert!(matches!(e, NoMlx5::SharedQueue { qpn: QPN }), "{e}");
    let e = mapped(good(), |qp| qp.context = ptr::null_mut()).expect_err("no context");
    assert!(matches!(e, NoMlx5::NotRdma { .. }), "{e}");
    for (codes, what, errno) in [
        ((EOPNOTSUPP, 0), "queue pair", EOPNOTSUPP),
        ((-libc::EINVAL, 0), "queue pair", libc::EINVAL),
        ((0, libc::ENOMEM), "completion queue", libc::ENOMEM),
    ] {
        let e = mapped(Says { codes, ..good() }, |_| ()).expect_err("it has refused");
        let NoMlx5::Refused {
            device,
            what: found,
            source,
        } = &e
        else {
            panic!("{e}");
        };
        assert_eq!((device.as_str(), *found), ("mlx5_7", what));
        assert_eq!(source.raw_os_error(), Some(errno));
    }
}

type Change = fn(&mut Says);

#[test]
fn what_kernels_could_not_write_to_is_refused_by_its_name() {
    let cases: [(Change, &str, u64); 13] = [
        (|s| s.qp.sq.stride = 128, "send queue's stride", 128),
        (|s| s.qp.sq.stride = 0, "send queue's stride", 0),
        (|s| s.qp.sq.wqe_cnt = 0, "send queue's depth", 0),
        (|s| s.qp.sq.wqe_cnt = 100, "send queue's depth", 100),
        (|s| s.qp.sq.wqe_cnt = 1 << 16, "send queue's depth", 1 << 16),
        (|s| s.qp.sq.buf = ptr::null_mut(), "send queue", 0),
        (|s| s.qp.sq.buf = at(0x1_0020), "send queue", 0x1_0020),
        (|s| s.qp.dbrec = at(0x5004), "doorbell record", 0x5004),
        (|s| s.qp.bf.reg = ptr::null_mut(), "doorbell", 0),
        (|s| s.cq.cqe_size = 128, "completions' size", 128),
        (|s| s.cq.cqe_cnt = 500, "completion queue's depth", 500),
        (|s| s.cq.buf = at(8), "completion queue", 8),
        (
            |s| s.cq.dbrec = ptr::null_mut(),
            "completion queue's record",
            0,
        ),
    ];
    for (change, wanted, value) in cases {
        let mut said = good();
        change(&mut said);
        let e = mapped(said, |_| ()).expect_err(wanted);
        let NoMlx5::Shape { what, found, .. } = e else {
            panic!("{e}");
        };
        assert_eq!((what, found), (wanted, value));
    }
    let e = mapped(good(), |qp| qp.qp_num = 1 << 24).expect_err("25 bits");
    assert!(
        matches!(
            e,
            NoMlx5::Shape {
                what: "queue pair's number",
                ..
            }
        ),
        "{e}"
    );
}

#[test]
fn queues_of_the_software_device_are_refused_before_a_library_is_looked_for() {
    let context = open_null();
    let pd = context.alloc_pd().expect("a protection domain");
    let cq = context.create_cq(8).expect("a queue");
    let qp = pd
        .create_qp(QpCaps::default(), &cq, &cq)
        .expect("a queue pair");
    let e = MappedQueues::new(qp, &cq).expect_err("it has no queues");
    assert!(
        matches!(
            e,
            NoMlx5::NotRdma {
                what: "the queue pair"
            }
        ),
        "{e}"
    );
}

#[test]
fn a_devices_queues_are_memory_that_holds_them() {
    let (sends, completions) = mapped(good(), |_| ()).expect("all is as it should be");
    let queues = Arc::new(());
    // SAFETY: nobody goes to the addresses here.
    let parts = unsafe { spans(&sends, &completions, queues.clone()) };
    let host = MemoryKind::Host;
    for (part, at, len, kind) in [
        (&parts.sq, 0x1_0040, 256 * 64, host),
        (&parts.sq_record, 0x5008, 8, host),
        (&parts.cq, 0x2_0000, 512 * 64, host),
        (&parts.cq_record, 0x5010, 8, host),
        (&parts.bell, 0x7_0800, 8, MemoryKind::Registers),
    ] {
        assert_eq!((part.addr(), part.len(), part.kind()), (at, len, kind));
        assert!(part.fd().is_none() && part.dma_buf().is_err(), "{part:?}");
    }
    // The send queue's word is the record's second.
    assert_eq!(DoorbellRecord::SEND_OFFSET, 4);
    // Each holds all of it.
    let bell = Arc::clone(&parts.bell);
    drop(parts);
    assert_eq!(Arc::strong_count(&queues), 2);
    drop(bell);
    assert_eq!(Arc::strong_count(&queues), 1);
}

#[test]
fn a_devices_registers_are_registered_with_no_device() {
    let (sends, completions) = mapped(good(), |_| ()).expect("all is as it should be");
    // SAFETY: nobody goes to the addresses here.
    let parts = unsafe { spans(&sends, &completions, Arc::new(())) };
    let pd = open_null().alloc_pd().expect("a protection domain");
    let refused = pd.register(parts.bell, Access::NONE);
    let e = refused.expect_err("registers");
    assert!(
        matches!(
            e,
            Error::RegisterKind {
                kind: MemoryKind::Registers,
                len: 8,
                ..
            }
        ),
        "{e}"
    );
}

/// A library of that name, by a C compiler.
fn library(folder: &Folder, source: &str, map: &str) -> std::path::PathBuf {
    let (c, versions) = (folder.path().join("fake.c"), folder.path().join("fake.map"));
    let out = folder.path().join("libmlx5.so.1");
    std::fs::write(&c, source).expect("room");
    std::fs::write(&versions, map).expect("room");
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-o"]).arg(&out).arg(&c);
    cc.arg(format!("-Wl,--version-script={}", versions.display()));
    let output = cc.output().expect("cc starts");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cc: {words}");
    out
}

#[test]
fn no_library_no_symbol_and_a_whole_one_are_three_answers() {
    let e = Mlx5::open("libkvxfer-none.so.1").expect_err("there is none");
    let NoMlx5::Library { name, why } = &e else {
        panic!("{e}");
    };
    assert_eq!(name.to_str(), Some("libkvxfer-none.so.1"));
    assert!(why.contains("cannot open shared object file"), "{why}");
    assert!(e.to_string().contains("ibverbs-providers"), "{e}");

    const BOTH: &str = "int mlx5dv_is_supported(void *d) { return 0; }\n\
                        int mlx5dv_init_obj(void *o, unsigned long t) { return 95; }\n";
    let one = Folder::new();
    let path = library(
        &one,
        BOTH,
        "MLX5_1.2 { global: mlx5dv_init_obj; local: *; };\n",
    );
    let e = Mlx5::open(&path).expect_err("it has half of it");
    let NoMlx5::Symbol {
        symbol,
        version,
        library: file,
    } = &e
    else {
        panic!("{e}");
    };
    assert_eq!((*symbol, *version), ("mlx5dv_is_supported", "MLX5_1.8"));
    assert_eq!(file, &path);
    // The old interface has other structures.
    let old = Folder::new();
    let path = library(
        &old,
        BOTH,
        "MLX5_1.0 { global: mlx5dv_init_obj; local: *; };\n\
         MLX5_1.8 { global: mlx5dv_is_supported; } MLX5_1.0;\n",
    );
    let e = Mlx5::open(&path).expect_err("it is too old");
    assert!(
        matches!(
            &e,
            NoMlx5::Symbol {
                symbol: "mlx5dv_init_obj",
                version: "MLX5_1.2",
                ..
            }
        ),
        "{e}"
    );
    let whole = Folder::new();
    let path = library(
        &whole,
        BOTH,
        "MLX5_1.2 { global: mlx5dv_init_obj; local: *; };\n\
         MLX5_1.8 { global: mlx5dv_is_supported; } MLX5_1.2;\n",
    );
    let mlx5 = Mlx5::open(&path).expect("it is whole");
    assert_eq!(mlx5.path(), path);
    // SAFETY: the library's function looks at nothing.
    assert!(!unsafe { mlx5.drives(NonNull::<c_void>::dangling().cast()) });
}
