//! Properties and byte-exact vectors of the queues' codecs.

use proptest::prelude::*;

use super::{
    CqDepth, Cqe, CqeStatus, Doorbell, DoorbellRecord, Gather, INLINE_ROOM, InlineData, MAX_DEPTH,
    Mlx5Fault, Operation, Qpn, RemoteSpan, Segment, SendFlags, SendWqe, SqDepth, Syndrome,
};

fn qpn(n: u32) -> Qpn {
    Qpn::new(n).expect("24 bits")
}

fn segment(addr: u64, len: u32, lkey: u32) -> Segment {
    Segment::new(addr, len, lkey).expect("a length")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

const REMOTE: RemoteSpan = RemoteSpan {
    addr: 0x0102_0304_0506_0708,
    rkey: 0x1122_3344,
};

/// The vectors are what `mlx5dv_set_ctrl_seg` and `mlx5dv_set_data_seg` of rdma-core 44 write;
/// `tests/abi` compares many more with these functions.
#[test]
fn wqes_are_these_bytes() {
    let signalled = SendFlags {
        signalled: true,
        ..SendFlags::default()
    };
    let wqe = |operation| SendWqe {
        index: 0xabcd,
        qpn: qpn(0x0012_3456),
        flags: signalled,
        operation,
    };
    let local = Gather::One(segment(0xf1f2_f3f4_f5f6_f7f8, 4096, 0xa1a2_a3a4));
    let remote = "01020304050607081122334400000000";
    let data = "00001000a1a2a3a4f1f2f3f4f5f6f7f8";
    let zero = "00000000000000000000000000000000";
    for (operation, wanted) in [
        (
            Operation::Nop,
            ["00abcd00123456010000000800000000", zero, zero, zero],
        ),
        (
            Operation::Write {
                remote: REMOTE,
                local,
            },
            ["00abcd08123456030000000800000000", remote, data, zero],
        ),
        (
            Operation::WriteImm {
                remote: REMOTE,
                local,
                imm: 0xdead_beef,
            },
            ["00abcd091234560300000008deadbeef", remote, data, zero],
        ),
        (
            Operation::Read {
                remote: REMOTE,
                local,
            },
            ["00abcd10123456030000000800000000", remote, data, zero],
        ),
        (
            Operation::Write {
                remote: REMOTE,
                local: Gather::Nothing,
            },
            ["00abcd08123456020000000800000000", remote, zero, zero],
        ),
        (
            Operation::Write {
                remote: REMOTE,
                local: Gather::Inline(InlineData::new(b"hello, world").expect("short")),
            },
            [
                "00abcd08123456030000000800000000",
                remote,
                "8000000c68656c6c6f2c20776f726c64",
                zero,
            ],
        ),
    ] {
        let wqe = wqe(operation);
        let bytes = wqe.encode().expect("valid");
        assert_eq!(hex(&bytes), wanted.concat(), "{operation:?}");
        assert_eq!(SendWqe::decode(&bytes), Ok(wqe));
    }
}

#[test]
fn completions_are_these_bytes() {
    let depth = CqDepth::new(64).expect("a power");
    let cqe = Cqe {
        qpn: qpn(0x0012_3456),
        opcode: 0x10,
        counter: 0xabcd,
        status: CqeStatus::Done { byte_count: 4096 },
    };
    let bytes = cqe.encode(64, depth);
    let mut wanted = [0; 64];
    wanted[44..48].copy_from_slice(&[0, 0, 0x10, 0]);
    wanted[56..60].copy_from_slice(&[0x10, 0x12, 0x34, 0x56]);
    wanted[60..64].copy_from_slice(&[0xab, 0xcd, 0, 1]);
    assert_eq!(hex(&bytes), hex(&wanted));
    let failed = Cqe {
        status: CqeStatus::Failed {
            syndrome: Syndrome::REMOTE_ACCESS,
            vendor: 0x88,
        },
        ..cqe
    };
    let bytes = failed.encode(0, depth);
    wanted[44..48].fill(0);
    wanted[54..56].copy_from_slice(&[0x88, 0x13]);
    wanted[63] = 0xd0;
    assert_eq!(hex(&bytes), hex(&wanted));
    assert_eq!(Syndrome(0x13).name(), Some("REMOTE_ACCESS_ERR"));
    assert_eq!(Syndrome(0x99).name(), None);
}

#[test]
fn doorbells_are_these_bytes() {
    let wqe = SendWqe {
        index: 0xffff,
        qpn: qpn(0x0012_3456),
        flags: SendFlags::default(),
        operation: Operation::Write {
            remote: REMOTE,
            local: Gather::Nothing,
        },
    };
    let last = Doorbell::of(&wqe).expect("valid");
    assert_eq!(last.encode(), wqe.encode().expect("valid")[..8]);
    assert_eq!((last.next(), last.qpn()), (0, wqe.qpn));
    let next = Doorbell::Next {
        index: 0xabcd,
        qpn: qpn(0x0012_3456),
    };
    assert_eq!(hex(&next.encode()), "00abcd0012345600");
    assert_eq!(
        DoorbellRecord::new(0x1_0000_abcd).encode(),
        [0, 0, 0xab, 0xcd]
    );
    assert_eq!(DoorbellRecord::SEND_OFFSET, 4);
    assert_eq!(DoorbellRecord::RECEIVE_OFFSET, 0);
}

#[test]
fn what_cannot_be_said_is_refused() {
    assert_eq!(Qpn::new(1 << 24), Err(Mlx5Fault::Qpn { qpn: 1 << 24 }));
    for len in [0, 1 << 31, u32::MAX] {
        assert_eq!(Segment::new(0, len, 0), Err(Mlx5Fault::Segment { len }));
    }
    assert!(InlineData::new(&[]).is_err());
    assert!(InlineData::new(&[0; INLINE_ROOM]).is_ok());
    assert!(InlineData::new(&[0; INLINE_ROOM + 1]).is_err());
    let read = SendWqe {
        index: 0,
        qpn: qpn(1),
        flags: SendFlags::default(),
        operation: Operation::Read {
            remote: REMOTE,
            local: Gather::Inline(InlineData::new(&[1]).expect("one")),
        },
    };
    assert_eq!(read.encode(), Err(Mlx5Fault::Inline { len: 1, room: 0 }));
    for depth in [0, 3, 63, 65, MAX_DEPTH + 1, MAX_DEPTH * 2] {
        assert!(SqDepth::new(depth).is_err(), "{depth}");
        assert!(CqDepth::new(depth).is_err(), "{depth}");
    }
    for depth in [1, 2, 64, MAX_DEPTH] {
        assert_eq!(SqDepth::new(depth).map(SqDepth::get), Ok(depth));
    }
}

/// Every single byte of a good WQE that is changed either changes what it says, or is an error.
#[test]
fn no_byte_of_a_wqe_is_passed_over() {
    let wqe = SendWqe {
        index: 7,
        qpn: qpn(8),
        flags: SendFlags::default(),
        operation: Operation::Write {
            remote: REMOTE,
            local: Gather::Two(segment(1, 2, 3), segment(4, 5, 6)),
        },
    };
    let good = wqe.encode().expect("valid");
    for at in 0..64 {
        for bit in 0..8 {
            let mut bytes = good;
            bytes[at] ^= 1 << bit;
            assert_ne!(SendWqe::decode(&bytes), Ok(wqe), "byte {at}");
        }
    }
}

#[test]
fn counters_are_made_whole() {
    let depth = SqDepth::new(MAX_DEPTH).expect("a power");
    for base in [0, 0xffff, 0x1_0000, 0xffff_fff0, u64::MAX - 0x9000] {
        for ahead in [0, 1, 255, u64::from(MAX_DEPTH) - 1] {
            let n = base + ahead;
            assert_eq!(depth.whole(n as u16, base, n + 1), Ok(n));
            assert!(depth.whole(n as u16, base, n).is_err(), "not posted");
        }
        let passed = base.wrapping_sub(1) as u16;
        assert!(depth.whole(passed, base, base + 100).is_err(), "has ended");
    }
    let small = SqDepth::new(4).expect("a power");
    assert!(small.whole(4, 0, 100).is_err(), "more than fit");
    assert_eq!(small.offset(u64::MAX), 3 * 64);
    assert_eq!(small.bytes(), 256);
}

#[test]
fn a_completion_of_the_lap_before_is_none() {
    let depth = CqDepth::new(4).expect("a power");
    let cqe = Cqe {
        qpn: qpn(1),
        opcode: 8,
        counter: 1,
        status: CqeStatus::Done { byte_count: 0 },
    };
    for n in 0..20 {
        assert_eq!(Cqe::decode(&Cqe::unwritten(), n, depth), Ok(None));
        let bytes = cqe.encode(n, depth);
        assert_eq!(Cqe::decode(&bytes, n, depth), Ok(Some(cqe)));
        assert_eq!(Cqe::decode(&bytes, n + 4, depth), Ok(None));
        assert_eq!(depth.offset(n), (n % 4) * 64);
    }
}

fn segments() -> impl Strategy<Value = Segment> {
    (any::<u64>(), 1..1_u32 << 31, any::<u32>())
        .prop_map(|(addr, len, lkey)| segment(addr, len, lkey))
}

fn gathers() -> impl Strategy<Value = Gather> {
    prop_oneof![
        Just(Gather::Nothing),
        segments().prop_map(Gather::One),
        (segments(), segments()).prop_map(|(a, b)| Gather::Two(a, b)),
        prop::collection::vec(any::<u8>(), 1..=INLINE_ROOM)
            .prop_map(|bytes| Gather::Inline(InlineData::new(&bytes).expect("fits"))),
    ]
}

fn wqes() -> impl Strategy<Value = SendWqe> {
    let remote = (any::<u64>(), any::<u32>()).prop_map(|(addr, rkey)| RemoteSpan { addr, rkey });
    let operation =
        (0..4, remote, gathers(), any::<u32>()).prop_map(|(which, remote, local, imm)| {
            match (which, local) {
                (0, _) => Operation::Nop,
                (1, _) => Operation::Write { remote, local },
                (3, Gather::Nothing | Gather::One(_) | Gather::Two(..)) => {
                    Operation::Read { remote, local }
                }
                _ => Operation::WriteImm { remote, local, imm },
            }
        });
    let flags =
        any::<[bool; 4]>().prop_map(|[signalled, solicited, fence, small_fence]| SendFlags {
            signalled,
            solicited,
            fence,
            small_fence,
        });
    (any::<u16>(), 0..1_u32 << 24, flags, operation).prop_map(|(index, n, flags, operation)| {
        SendWqe {
            index,
            qpn: qpn(n),
            flags,
            operation,
        }
    })
}

fn cqes() -> impl Strategy<Value = Cqe> {
    let status = prop_oneof![
        any::<u32>().prop_map(|byte_count| CqeStatus::Done { byte_count }),
        any::<[u8; 2]>().prop_map(|[syndrome, vendor]| CqeStatus::Failed {
            syndrome: Syndrome(syndrome),
            vendor,
        }),
    ];
    (0..1_u32 << 24, any::<u8>(), any::<u16>(), status).prop_map(|(n, opcode, counter, status)| {
        Cqe {
            qpn: qpn(n),
            opcode,
            counter,
            status,
        }
    })
}

fn blocks() -> impl Strategy<Value = [u8; 64]> {
    // Noise alone has hardly ever a known opcode.
    (
        any::<[[u8; 32]; 2]>(),
        wqes(),
        prop::collection::vec((0..64_usize, any::<u8>()), 0..4),
        any::<bool>(),
    )
        .prop_map(|(noise, wqe, changes, near)| {
            let mut block = [0; 64];
            if near {
                block = wqe.encode().expect("valid");
            } else {
                block[..32].copy_from_slice(&noise[0]);
                block[32..].copy_from_slice(&noise[1]);
            }
            for (at, value) in changes {
                block[at] = value;
            }
            block
        })
}

proptest! {
    #[test]
    fn wqes_come_back(wqe in wqes()) {
        let bytes = wqe.encode().expect("valid");
        prop_assert_eq!(SendWqe::decode(&bytes), Ok(wqe));
        prop_assert_eq!(Doorbell::decode(Doorbell::of(&wqe).expect("valid").encode()), Doorbell::of(&wqe));
    }

    #[test]
    fn what_is_taken_for_a_wqe_is_written_alike(block in blocks()) {
        if let Ok(wqe) = SendWqe::decode(&block) {
            let again = wqe.encode().expect("decoded");
            let mut len = 16 * usize::from(wqe.ds());
            if let Some((_, Gather::Inline(data))) = wqe.operation.sides() {
                len = 36 + data.bytes().len();
            }
            prop_assert_eq!(&again[..len], &block[..len]);
        }
    }

    #[test]
    fn completions_come_back(cqe in cqes(), n in any::<u64>(), log in 0..16_u32) {
        let depth = CqDepth::new(1 << log).expect("a power");
        prop_assert_eq!(Cqe::decode(&cqe.encode(n, depth), n, depth), Ok(Some(cqe)));
    }

    #[test]
    fn any_completion_is_one_or_none_or_an_error(block in blocks(), last in any::<u8>(), n in any::<u64>()) {
        let depth = CqDepth::new(64).expect("a power");
        let mut block = block;
        block[63] = last;
        match Cqe::decode(&block, n, depth) {
            Ok(None) => prop_assert!(last >> 4 == 15 || (last & 1 != 0) != depth.owner(n)),
            Ok(Some(cqe)) => {
                prop_assert!(matches!(last >> 4, 0 | 13));
                let again = cqe.encode(n, depth);
                prop_assert_eq!(&again[56..62], &block[56..62]);
            }
            Err(e) => prop_assert!(matches!(e, Mlx5Fault::Completion { .. }), "{}", e),
        }
    }

    #[test]
    fn doorbells_come_back(bytes in any::<[u8; 8]>(), plain in any::<bool>()) {
        let mut bytes = bytes;
        if plain {
            bytes[0] = 0;
            bytes[7] &= 63;
        }
        if let Ok(doorbell) = Doorbell::decode(bytes) {
            prop_assert_eq!(doorbell.encode(), bytes);
        } else {
            prop_assert!(bytes[0] != 0 || bytes[7] > 63 || bytes[7] == 0 && bytes[3] != 0);
        }
    }

    #[test]
    fn records_come_back(bytes in any::<[u8; 4]>(), next in any::<u64>()) {
        if let Ok(record) = DoorbellRecord::decode(bytes) {
            prop_assert_eq!(record.encode(), bytes);
        }
        let record = DoorbellRecord::new(next);
        prop_assert_eq!(DoorbellRecord::decode(record.encode()), Ok(record));
    }
}
