//! Peers that go, never come, or are reset; and strangers on the socket.

use std::time::{Duration, Instant};

use crate::init;
use crate::sge;
use crate::support::*;
use kvxfer_verbs::*;

/// Sends nothing to nobody, which ends with a retry error.
fn send_ends(qp: &QueuePair<Rts>, cq: &CompletionQueue, vendor: u32) {
    let mut chain = SendChain::new();
    chain.push(1, SendOp::Send, true, &[]);
    qp.post_send(&chain, &table(&[])).unwrap();
    let c = reap(cq, 1)[0];
    assert_eq!((c.status, c.vendor_err), (WcStatus::RetryExc, vendor));
}

#[test]
fn a_peer_that_is_gone_is_named() {
    for how in every() {
        let (a, b) = pair(how);
        let mem = TestMemory::sealed(4096);
        let ra = a.region(&mem, all());
        let mut chain = SendChain::new();
        chain.push(1, SendOp::Send, false, &[sge(8, 0)]);
        chain.push(2, SendOp::Send, false, &[sge(8, 0)]);
        a.qp.post_send(&chain, &table(&[&ra])).unwrap();
        let mut out = Vec::new();
        a.send_cq.poll(&mut out, 1).unwrap();
        drop(b);
        let got = reap(&a.send_cq, 2);
        let gone = (WcStatus::RetryExc, vendor::PEER_GONE);
        assert_failed(how, &got[0], gone, &[]);
        assert_eq!(got[1].status, WcStatus::WrFlush, "{how:?}");
    }
}

#[test]
fn a_peer_that_never_comes_is_a_retry_error() {
    let mut config = SoftConfig::default();
    config.min_retry_time = Duration::from_millis(50);
    let ctx = open_soft(config).unwrap();
    let pd = ctx.alloc_pd().unwrap();
    let cq = ctx.create_cq(16).unwrap();
    let qp = pd.create_qp(QpCaps::default(), &cq, &cq).unwrap();
    let qp = qp.init(InitAttr::new(Access::NONE)).unwrap();
    let remote = QpEndpoint {
        qpn: 1,
        psn: 0,
        token: [1; 16],
        port: None,
    };
    let link = Link::SoftAwait {
        path: SoftPath::Arena,
    };
    let qp = qp
        .rtr(RtrAttr {
            remote,
            link,
            min_rnr_timer: 12,
        })
        .unwrap();
    let rts = RtsAttr {
        timeout: 8,
        retry_cnt: 1,
        rnr_retry: 0,
    };
    let qp = qp.rts(rts).unwrap();
    // Sleeps on the descriptor in between: the timer is behind it.
    send_ends(&qp, &cq, vendor::NO_PROGRESS);
}

#[test]
fn nothing_lands_after_to_error() {
    for how in every() {
        let (a, b) = pair(how);
        let (src, far) = (TestMemory::sealed(4 << 20), TestMemory::sealed(4 << 20));
        src.put(0, &vec![0xaa; 4 << 20]);
        let (ra, rf) = (a.region(&src, all()), b.region(&far, all()));
        let remote = Remote {
            addr: rf.addr(),
            rkey: rf.rkey(),
        };
        let mut chain = SendChain::new();
        for i in 0..200 {
            chain.push(i, SendOp::Write(remote), false, &[sge(4 << 20, 0)]);
        }
        a.qp.post_send(&chain, &table(&[&ra])).unwrap();
        let mut out = Vec::new();
        let end = Instant::now() + WAIT;
        while far.get(0, 1)[0] != 0xaa {
            a.send_cq.poll(&mut out, 1).unwrap();
            assert!(Instant::now() < end, "{how:?}");
        }
        b.qp.to_error();
        far.put(0, &vec![0x55; 4 << 20]);
        let got = reap(&a.send_cq, 1);
        let gone = (WcStatus::RetryExc, vendor::PEER_GONE);
        assert_failed(how, &got[0], gone, &[]);
        assert!(far.get(0, 4 << 20) == vec![0x55; 4 << 20], "{how:?}");
    }
}

/// Somebody else who finds the socket, or a peer gone mad, harms nobody.
#[test]
fn garbage_on_the_socket_is_refused_and_forgotten() {
    use std::io::{Read, Write};
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixStream};

    let (a, b) = pair(How::Arena);
    let name = SocketAddr::from_abstract_name(b.ctx.address().name).unwrap();
    for n in [1, 111, 112, 5000] {
        let mut s = UnixStream::connect_addr(&name).unwrap();
        s.set_read_timeout(Some(WAIT)).unwrap();
        s.write_all(&pattern(n, 0x41)).unwrap();
        if n >= 112 {
            // Closed, with or without what was not read.
            let closed = match s.read(&mut [0; 1]) {
                Ok(n) => n == 0,
                Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
            };
            assert!(closed);
        }
    }
    let (tcp, _far) = pair(How::Tcp);
    drop(tcp);
    let mem = TestMemory::sealed(4096);
    let (ra, rb) = (a.region(&mem, all()), b.region(&mem, all()));
    b.qp.post_recv(1, &[sge(8, 0)], &table(&[&rb])).unwrap();
    let mut chain = SendChain::new();
    chain.push(1, SendOp::Send, true, &[sge(8, 8)]);
    a.qp.post_send(&chain, &table(&[&ra])).unwrap();
    assert_eq!(reap(&a.send_cq, 1)[0].status, WcStatus::Success);
}

/// Streams that were meant for another queue pair do not join this one.
#[test]
fn a_tcp_stream_with_the_wrong_token_is_refused() {
    let o = Options::default();
    let ctx = open_soft(o.config.clone()).unwrap();
    let (cq, qp) = init(&ctx);
    let (_cq2, other) = init(&ctx);
    let (a1, b1) = tcp_pair();
    let (a2, b2) = tcp_pair();
    let (e, eo) = (qp.endpoint(), other.endpoint());
    let wrong = QpEndpoint {
        token: [7; 16],
        port: None,
        ..eo
    };
    let up = |qp: QueuePair<Init>, remote, requester, responder| {
        let link = Link::SoftTcp {
            requester,
            responder,
        };
        let qp = qp
            .rtr(RtrAttr {
                remote,
                link,
                min_rnr_timer: 12,
            })
            .unwrap();
        qp.rts(o.rts).unwrap()
    };
    let qp = up(qp, wrong, a1, a2);
    let _other = up(other, e, b2, b1);
    send_ends(&qp, &cq, vendor::PEER_GONE);
}
