//! The queues of mlx5 devices: layouts against `mlx5dv.h`, encoded WQEs and CQEs against what its
//! functions write.

use std::ffi::c_void;

use kvxfer_verbs::mlx5::{
    CqDepth, Cqe, CqeStatus, DoorbellRecord, Gather, Operation, Qpn, RemoteSpan, Segment,
    SendFlags, SendWqe,
};

use super::{Fact, Facts, differences, facts_of, map};

#[path = "../../../crates/verbs/src/mlx5/dv.rs"]
#[allow(
    non_camel_case_types,
    dead_code,
    reason = "names of C, of which the comparison looks at the layout"
)]
mod dv;

mod facts {
    use super::super::size_of_field;
    use super::dv;

    // mlx5().
    include!(concat!(env!("OUT_DIR"), "/mlx5_facts.rs"));
}

unsafe extern "C" {
    static kvxfer_mlx5_facts: [Fact; 0];

    fn kvxfer_mlx5_ctrl(
        at: *mut c_void,
        pi: u16,
        opcode: u8,
        qpn: u32,
        fm_ce_se: u8,
        ds: u8,
        imm: u32,
    );
    fn kvxfer_mlx5_data(at: *mut c_void, length: u32, lkey: u32, address: u64);
    fn kvxfer_mlx5_raddr(at: *mut c_void, raddr: u64, rkey: u32);
    fn kvxfer_mlx5_cqe(
        at: *mut c_void,
        sop_qpn: u32,
        byte_cnt: u32,
        counter: u16,
        opcode: u8,
        owner: u8,
    );
}

fn headers() -> Facts {
    facts_of((&raw const kvxfer_mlx5_facts).cast())
}

#[test]
fn every_offset_and_constant_is_as_in_the_header() {
    let (ours, headers) = (map(facts::mlx5()), headers());
    assert_eq!(ours.len(), headers.len());
    let differences = differences(&ours, &headers);
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    // The comparison compares, and what it compares is there.
    for (name, value) in [
        ("mlx5_wqe_ctrl_seg: size", 16),
        ("mlx5_wqe_ctrl_seg.fm_ce_se: offset", 11),
        ("mlx5_cqe64.op_own: offset", 63),
        ("MLX5_OPCODE_RDMA_READ", 0x10),
        ("MLX5_CQE_INVALID", 15),
        ("mlx5dv_obj: size", 112),
        ("mlx5dv_qp_bf.size: offset", 8),
        ("mlx5dv_cq.cqe_size: offset", 20),
        ("mlx5dv_init_obj: prototype", 1),
    ] {
        assert_eq!(headers.get(name), Some(&value), "{name}");
    }
    let mut other = headers.clone();
    *other.get_mut("mlx5_cqe64.wqe_counter: offset").unwrap() += 1;
    assert_eq!(super::differences(&ours, &other).len(), 1);
}

/// Numbers that differ in every byte (xorshift).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[test]
fn wqes_are_what_the_headers_functions_write() {
    let header = headers();
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    for i in 0..10_000_u64 {
        let n = noise.next();
        let (index, imm) = (noise.next() as u16, noise.next() as u32);
        let qpn = n as u32 & 0x00ff_ffff;
        let (raddr, rkey) = (noise.next(), noise.next() as u32);
        let mut segment = || {
            let len = (noise.next() as u32 >> 1).max(1);
            (noise.next(), len, noise.next() as u32)
        };
        let (one, two) = (segment(), segment());
        let made = |(addr, len, lkey)| Segment::new(addr, len, lkey).unwrap();
        let (local, ds) = match i % 3 {
            0 => (Gather::Nothing, 2),
            1 => (Gather::One(made(one)), 3),
            _ => (Gather::Two(made(one), made(two)), 4),
        };
        let remote = RemoteSpan { addr: raddr, rkey };
        let (opcode, operation, imm) = match i / 3 % 4 {
            0 => (0x08, Operation::Write { remote, local }, 0),
            1 => (0x09, Operation::WriteImm { remote, local, imm }, imm),
            2 => (0x10, Operation::Read { remote, local }, 0),
            _ => (0x00, Operation::Nop, 0),
        };
        let ds = if opcode == 0 { 1 } else { ds };
        let flags = SendFlags {
            signalled: n >> 32 & 1 != 0,
            solicited: n >> 33 & 1 != 0,
            fence: n >> 34 & 1 != 0,
            small_fence: n >> 35 & 1 != 0,
        };
        let bits = [
            (flags.signalled, header["MLX5_WQE_CTRL_CQ_UPDATE"]),
            (flags.solicited, header["MLX5_WQE_CTRL_SOLICITED"]),
            (flags.fence, header["MLX5_WQE_CTRL_FENCE"]),
            (
                flags.small_fence,
                header["MLX5_WQE_CTRL_INITIATOR_SMALL_FENCE"],
            ),
        ];
        let fm_ce_se = bits
            .iter()
            .filter(|(set, _)| *set)
            .map(|(_, bit)| *bit as u8);
        let fm_ce_se = fm_ce_se.fold(0, |all, bit| all | bit);
        let mut wanted = [0_u8; 64];
        let base = wanted.as_mut_ptr();
        let at = |offset: usize| base.wrapping_add(offset).cast::<c_void>();
        let (ctrl, far, near, last) = (at(0), at(16), at(32), at(48));
        // SAFETY: 16 bytes of `wanted`, which nobody else looks at meanwhile. The header's callers
        // give the immediate in network order.
        unsafe { kvxfer_mlx5_ctrl(ctrl, index, opcode, qpn, fm_ce_se, ds, imm.to_be()) };
        if ds > 1 {
            // SAFETY: as above.
            unsafe { kvxfer_mlx5_raddr(far, raddr, rkey) };
        }
        if ds > 2 {
            // SAFETY: as above.
            unsafe { kvxfer_mlx5_data(near, one.1, one.2, one.0) };
        }
        if ds > 3 {
            // SAFETY: as above.
            unsafe { kvxfer_mlx5_data(last, two.1, two.2, two.0) };
        }
        let wqe = SendWqe {
            index,
            qpn: Qpn::new(qpn).unwrap(),
            flags,
            operation,
        };
        assert_eq!(wqe.encode().unwrap(), wanted, "{wqe:?}");
        assert_eq!(SendWqe::decode(&wanted), Ok(wqe));
    }
}

#[test]
fn completions_are_read_as_the_header_writes_them() {
    let depth = CqDepth::new(64).unwrap();
    let mut noise = Noise(7);
    for _ in 0..1000 {
        let (n, qpn) = (noise.next(), noise.next() as u32);
        let (bytes, counter) = (noise.next() as u32, noise.next() as u16);
        let mut block = [0_u8; 64];
        let owner = u8::from(depth.owner(n));
        // SAFETY: the 64 bytes of `block`.
        unsafe { kvxfer_mlx5_cqe(block.as_mut_ptr().cast(), qpn, bytes, counter, 0, owner) };
        let wanted = Cqe {
            qpn: Qpn::new(qpn & 0x00ff_ffff).unwrap(),
            opcode: (qpn >> 24) as u8,
            counter,
            status: CqeStatus::Done { byte_count: bytes },
        };
        assert_eq!(Cqe::decode(&block, n, depth), Ok(Some(wanted)));
        assert_eq!(wanted.encode(n, depth), block);
    }
    assert_eq!(DoorbellRecord::SEND_OFFSET, 4);
}

/// The library that is installed with the headers has the functions, by the versions that are asked for.
#[test]
fn the_installed_libmlx5_is_taken() {
    let mlx5 = kvxfer_verbs::mlx5::Mlx5::get().unwrap_or_else(|e| panic!("{e}"));
    let name = mlx5.path().file_name().expect("a file");
    assert!(name.to_string_lossy().starts_with("libmlx5"), "{name:?}");
}
