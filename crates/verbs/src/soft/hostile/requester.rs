//! Lies told to the half that asks a peer.

use super::*;

/// Each lie, told to the half that asks, is the error that it is, and no success.
#[test]
fn lies_told_to_a_requester_are_errors() {
    let case = |lie: &str, want: (WcStatus, u32), make: &dyn Fn(&Liar)| {
        let (victim, liar) = Liar::meet(Role::ToRequester, SoftPath::Arena);
        liar.hear_a_write(&victim);
        make(&liar);
        let c = victim.completion();
        assert_eq!((c.status, c.vendor_err), want, "{lie}");
        assert!(victim.memory.is(0x11), "{lie}");
    };
    let protocol = (WcStatus::RemOp, vendor::PROTOCOL);
    let tell = |head: Header| move |liar: &Liar| liar.send(&head.encode(), None);
    let ack = |v| Header {
        v,
        ..Header::new(Kind::Ack)
    };
    let nak = |flag| Header {
        flag,
        ..Header::new(Kind::Nak)
    };
    let mapped = |n| Header {
        n,
        m: 5,
        ..Header::new(Kind::Mapped)
    };
    case("done before it was asked", protocol, &tell(ack(2)));
    case("done, all there ever was", protocol, &tell(ack(u64::MAX)));
    case("failed, with success", protocol, &tell(nak(0)));
    let flush = u8::try_from(WcStatus::WrFlush.as_raw()).unwrap();
    case("failed, as one's own echo", protocol, &tell(nak(flush)));
    let ours = u8::try_from(WcStatus::LocProt.as_raw()).unwrap();
    case(
        "failed, by a fault of this side",
        protocol,
        &tell(nak(ours)),
    );
    let data = Header {
        m: 64,
        ..Header::new(Kind::Data)
    };
    case("data over a socket that has none", protocol, &tell(data));
    let request = Header::new(Kind::Batch);
    case("what only a requester says", protocol, &tell(request));
    case("a kind that is none", protocol, &|liar| {
        liar.send(&[77; HEADER], None);
    });
    case("a segment without a file", protocol, &tell(mapped(1)));
    let shrinks = (WcStatus::RemOp, vendor::SEGMENT);
    case("a file that could shrink", shrinks, &|liar| {
        liar.send(&mapped(1).encode(), Some(&file(libc::F_SEAL_GROW)));
    });
    case("a file with a frame that has none", protocol, &|liar| {
        let none = Header::new(Kind::Ack).encode();
        liar.send(&none, Some(&file(SIZE)));
        liar.send(&none, Some(&file(SIZE)));
    });
}

/// A key table that promises more than its segment has.
#[test]
fn a_key_that_is_larger_than_its_file_is_not_read() {
    let (victim, mut liar) = Liar::meet(Role::ToRequester, SoftPath::Arena);
    let source = Mem::new(0x22);
    let info = |offset, len| KeyInfo {
        rkey: 0,
        addr: 0x10_0000,
        len,
        access: all(),
        pd: 1,
        segment: SegmentSpan { id: 5, offset },
    };
    let honest = liar.keys.insert(info(0, N)).unwrap();
    let long = liar.keys.insert(info(0, N + 1)).unwrap();
    let head = Header {
        n: 1,
        m: 5,
        ..Header::new(Kind::Mapped)
    };
    liar.send(&head.encode(), Some(&source.fd));
    let at = |rkey| Remote {
        addr: 0x10_0000,
        rkey,
    };
    victim.post(SendOp::Read(at(honest)));
    assert_eq!(victim.completion().status, WcStatus::Success);
    victim.post(SendOp::Read(at(long)));
    let c = victim.completion();
    assert_eq!((c.status, c.vendor_err), (WcStatus::RemOp, vendor::SEGMENT));
}

/// Bytes that the victim has not read yet.
fn unread(stream: &Stream) -> i32 {
    let mut n = 0;
    // SAFETY: the call writes one int.
    let rc = unsafe { libc::ioctl(stream.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut n) };
    assert_eq!(rc, 0);
    n
}

/// A peer that sends frames faster than they are parsed would keep the poller for ever.
#[test]
fn a_flood_of_frames_does_not_keep_the_poller() {
    for busy in [true, false] {
        let (victim, liar) = Liar::meet(Role::ToRequester, SoftPath::Arena);
        liar.hear_a_write(&victim);
        let mut ack = Header::new(Kind::Ack);
        if !busy {
            ack.v = 1;
            liar.send(&ack.encode(), None);
            assert_eq!(victim.completion().status, WcStatus::Success);
        }
        // Frames that say nothing new, as many as the socket takes.
        let ack = ack.encode();
        let many = ack.repeat(256);
        let mut sent = 0;
        while let Ok(n) = liar.stream.send(&many, None) {
            sent += n;
        }
        assert!(sent > 64 << 10, "{sent}");
        // So that the poll looks at every socket.
        victim.cq.arm().unwrap();
        let mut out = Vec::new();
        let poll = victim.cq.poll(&mut out, 1).unwrap();
        assert!(out.is_empty());
        if busy {
            assert!(poll.more);
            assert!(unread(&liar.stream) > 0);
        } else {
            // Nothing was asked, so it is cut off.
            assert!(liar.stream.send(&ack, None).is_err());
            victim.post(SendOp::Send);
            let c = victim.completion();
            let want = (WcStatus::RetryExc, vendor::PEER_GONE);
            assert_eq!((c.status, c.vendor_err), want);
        }
    }
}
