//! Lies told to the half that serves a peer.

use super::*;

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
