//! The same over TCP, where READ bytes and payloads travel between the frames.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use super::*;

/// The liar's ends: what the victim asks comes out of `asks`, what the victim serves goes into `serves`.
struct Far {
    asks: TcpStream,
    serves: TcpStream,
    own: QpEndpoint,
}

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let far = listener.accept().unwrap().0;
    far.set_read_timeout(Some(WAIT)).unwrap();
    far.set_write_timeout(Some(WAIT)).unwrap();
    far.set_nodelay(true).unwrap();
    (near, far)
}

fn meet() -> (Victim, Far) {
    let (requester, asks) = pair();
    let (responder, serves) = pair();
    let link = Link::SoftTcp {
        requester,
        responder,
    };
    let (victim, own) = Victim::over(link);
    (victim, Far { asks, serves, own })
}

impl Far {
    fn hello(&self) -> [u8; HELLO] {
        let hello = Hello {
            role: Role::ToResponder,
            path: 0,
            target: self.own.token,
            token: LIAR.token,
            guid: [0; 16],
            target_guid: [0; 16],
            qpn: LIAR.qpn,
            pd: 1,
            access: 0,
            slots: 0,
            probe_addr: 0,
            reader: 0,
            errno: 0,
        };
        hello.encode()
    }

    /// The victim's next frame as it serves; `None` if it closed the stream, or says it will.
    fn frame(&mut self) -> Option<Header> {
        let mut head = [0; HEADER];
        if let Err(e) = self.serves.read_exact(&mut head) {
            // Closed with bytes unread, a stream is reset.
            use std::io::ErrorKind::{ConnectionReset, UnexpectedEof};
            assert!(matches!(e.kind(), UnexpectedEof | ConnectionReset), "{e}");
            return None;
        }
        Header::decode(&head).filter(|h| h.kind != Kind::Bye)
    }
}

#[test]
fn lies_told_to_a_responder_are_refused() {
    let tell = |make: &dyn Fn(&Victim, &Far) -> Vec<u8>| {
        let (victim, mut far) = meet();
        let bytes = make(&victim, &far);
        // It may be closed before all is sent.
        let _ = far.serves.write_all(&bytes);
        let frame = far.frame();
        assert!(victim.memory.is(0x11));
        frame
    };
    let op = |v: &Victim, len| Desc {
        pieces: 0,
        ..write(&v.region, len)
    };
    let after_hello = |far: &Far, rest: Vec<u8>| [far.hello().to_vec(), rest].concat();
    let closed = |lie: &str, make: &dyn Fn(&Victim, &Far) -> Vec<u8>| {
        assert_eq!(tell(make).map(|h| h.kind), None, "{lie}");
    };
    closed("no opening", &|v, _| {
        [batch(0, &[op(v, 64)], &[]), vec![0x22; 64]].concat()
    });
    closed("an opening for another queue pair", &|v, far| {
        let mut hello = far.hello();
        hello[16] ^= 1;
        let rest = [batch(0, &[op(v, 64)], &[]), vec![0x22; 64]].concat();
        [hello.to_vec(), rest].concat()
    });
    closed("an opening of another peer", &|v, far| {
        let mut hello = far.hello();
        hello[32] ^= 1;
        let rest = [batch(0, &[op(v, 64)], &[]), vec![0x22; 64]].concat();
        [hello.to_vec(), rest].concat()
    });
    closed("an opening twice", &|_, far| {
        after_hello(far, far.hello().to_vec())
    });
    closed("pieces, where there are none", &|v, far| {
        let op = write(&v.region, 64);
        after_hello(far, batch(0, &[op], &[piece(0, 4096, 64)]))
    });
    closed("a segment", &|_, far| after_hello(far, segment(1).to_vec()));
    closed("absurd counts", &|_, far| {
        let head = Header {
            n: u16::MAX,
            ..Header::new(Kind::Batch)
        };
        after_hello(far, head.encode().to_vec())
    });
    let nak = |lie: &str, want: u32, make: &dyn Fn(&Victim) -> Desc| {
        let head =
            tell(&|v, far| after_hello(far, [batch(0, &[make(v)], &[]), vec![0x22; 64]].concat()));
        let told = head.map(|h| (h.kind, h.m));
        assert_eq!(told, Some((Kind::Nak, want)), "{lie}");
    };
    for kind in [Op::Read, Op::Write, Op::WriteImm] {
        if kind != Op::WriteImm {
            nak("out of the region", vendor::BOUNDS, &|v| Desc {
                addr: v.region.addr() + N - 63,
                op: kind,
                ..op(v, 64)
            });
        }
        nak("an absurd length", vendor::BOUNDS, &|v| Desc {
            op: kind,
            ..op(v, u64::MAX)
        });
    }
}

#[test]
fn lies_told_to_a_requester_are_errors() {
    let data = |m| {
        Header {
            m,
            ..Header::new(Kind::Data)
        }
        .encode()
    };
    let ack = |v| {
        Header {
            v,
            ..Header::new(Kind::Ack)
        }
        .encode()
    };
    let case = |lie: &str, bytes: Vec<u8>, fine: bool| {
        let (victim, mut far) = meet();
        victim.post(SendOp::Read(Remote {
            addr: 0x1000,
            rkey: 1,
        }));
        // Its request leaves only in a poll.
        let mut out = Vec::new();
        victim.cq.poll(&mut out, 1).unwrap();
        let mut asked = [0; HELLO + HEADER];
        far.asks.read_exact(&mut asked).unwrap();
        assert_eq!(Header::decode(&asked[HELLO..]).map(|h| h.n), Some(1));
        let _ = far.asks.write_all(&bytes);
        let c = victim.completion();
        if fine {
            assert_eq!(c.status, WcStatus::Success, "{lie}");
        } else {
            let want = (WcStatus::RemOp, vendor::PROTOCOL);
            assert_eq!((c.status, c.vendor_err), want, "{lie}");
        }
    };
    let bytes = |n| vec![0x33u8; n];
    let good = [&data(64)[..], &bytes(64), &ack(1)].concat();
    case("none", good, true);
    case("done with no data", ack(1).to_vec(), false);
    let part = [&data(63)[..], &bytes(63), &ack(1)].concat();
    case("done with a part of the data", part, false);
    let more = [&data(65)[..], &bytes(65), &ack(1)].concat();
    case("more data than asked", more, false);
    let twice = [&data(64)[..], &bytes(64), &data(64), &bytes(64)].concat();
    case("data twice", twice, false);
    case("more done than asked", ack(2).to_vec(), false);
    let mapped = Header {
        n: 0,
        ..Header::new(Kind::Mapped)
    };
    case("a segment", mapped.encode().to_vec(), false);
}

/// Headers of data that never comes are frames too.
#[test]
fn a_flood_of_empty_data_does_not_keep_the_poller() {
    let (victim, mut far) = meet();
    victim.post(SendOp::Read(Remote {
        addr: 0x1000,
        rkey: 1,
    }));
    let mut out = Vec::new();
    victim.cq.poll(&mut out, 1).unwrap();
    let empty = Header::new(Kind::Data).encode().repeat(4096);
    far.asks.write_all(&empty).unwrap();
    let end = Instant::now() + WAIT;
    let mut polls = 0;
    // A poll that took them all would say that nothing is left.
    while victim.cq.poll(&mut out, 1).unwrap().more || polls == 0 {
        polls += 1;
        assert!(out.is_empty() && Instant::now() < end);
    }
    assert!(polls >= 2, "{polls}");
}
