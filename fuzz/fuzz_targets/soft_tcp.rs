//! The bytes of soft TCP streams, from a peer that has the right to them: a queue pair's requesting
//! and responding half are each sent anything. Memory that the peer may not write stays as it was,
//! and every work request ends.
//!
//! Input: how the bytes are shared out (one byte), then the bytes.
#![no_main]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer::mem::{HostArena, HostMemory};
use kvxfer_verbs::{
    Access, InitAttr, Link, QpCaps, QpEndpoint, RegionTable, Remote, RtrAttr, RtsAttr, SendChain,
    SendOp, Sge, SoftConfig, open_soft,
};
use libfuzzer_sys::fuzz_target;

fn streams() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let to = listener.local_addr().expect("an address");
    let ours = TcpStream::connect(to).expect("a stream");
    let (theirs, _) = listener.accept().expect("a stream");
    (ours, theirs)
}

const LEN: u64 = 4096;

fuzz_target!(|data: &[u8]| {
    let Some((cut, bytes)) = data.split_first() else {
        return;
    };
    let context = open_soft(SoftConfig::default()).expect("a device");
    let pd = context.alloc_pd().expect("a domain");
    let cq = context.create_cq(64).expect("a queue");
    let readable = HostArena::new(LEN).expect("memory");
    let private = HostArena::new(LEN).expect("memory");
    let register = |memory: &HostMemory, access| {
        memory.fill(0, LEN, 0x11).expect("filled");
        pd.register(memory.as_memory(), access).expect("registered")
    };
    let table: Arc<RegionTable> = Arc::new(RegionTable::new(vec![
        register(readable.memory(), Access::REMOTE_READ),
        register(private.memory(), Access::LOCAL_WRITE),
    ]));
    let caps = QpCaps {
        max_send_wr: 8,
        max_recv_wr: 8,
        max_send_sge: 1,
        max_recv_sge: 1,
    };
    let access = Access::LOCAL_WRITE | Access::REMOTE_READ | Access::REMOTE_WRITE;
    let qp = pd.create_qp(caps, &cq, &cq).expect("a queue pair");
    let qp = qp.init(InitAttr::new(access)).expect("in INIT");
    let ((requester, mut asked), (responder, mut asks)) = (streams(), streams());
    let attr = RtrAttr {
        remote: QpEndpoint {
            qpn: 1,
            psn: 0,
            token: [1; 16],
            port: None,
        },
        link: Link::SoftTcp {
            requester,
            responder,
        },
        min_rnr_timer: 12,
    };
    let rts = RtsAttr {
        timeout: 8,
        retry_cnt: 1,
        rnr_retry: 1,
    };
    let qp = qp.rtr(attr).expect("in RTR").rts(rts).expect("in RTS");
    let sge = Sge {
        region: 1,
        len: 64,
        offset: 0,
    };
    qp.post_recv(9, &[sge], &table).expect("posted");
    let mut chain = SendChain::new();
    let there = Remote {
        addr: 4096,
        rkey: 7,
    };
    let source = Sge {
        region: 0,
        len: 64,
        offset: 0,
    };
    chain.push(1, SendOp::Write(there), true, &[source]);
    chain.push(2, SendOp::Send, true, &[source]);
    qp.post_send(&chain, &table).expect("posted");
    let (answers, requests) = bytes.split_at(usize::from(*cut) * bytes.len() / 255);
    // The device may have hung up in the middle, or wait until its answers are read.
    asks.set_write_timeout(Some(Duration::from_secs(10)))
        .expect("a socket");
    let _ = asks.write_all(requests);
    let _ = asks.shutdown(Shutdown::Write);
    asked.set_nonblocking(true).expect("a socket");
    let mut answers = answers;
    let mut out = Vec::new();
    let end = Instant::now() + Duration::from_secs(10);
    while out
        .iter()
        .filter(|c: &&kvxfer_verbs::Completion| c.wr_id < 9)
        .count()
        < 2
    {
        // In turns: the requesting half reads when it is polled.
        match asked.write(answers) {
            Ok(n) => answers = &answers[n..],
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(_) => answers = &[],
        }
        if answers.is_empty() {
            let _ = asked.shutdown(Shutdown::Write);
        }
        cq.poll(&mut out, 16).expect("polled");
        assert!(
            Instant::now() < end,
            "a work request without an end: {out:?}"
        );
    }
    asks.set_read_timeout(Some(Duration::from_secs(10)))
        .expect("a socket");
    // To its end, so that what was asked has been served; a reset is an end, too.
    let _ = asks.read_to_end(&mut Vec::new());
    drop(qp);
    // Nothing was registered for writing from afar: only the receive may have been filled.
    let byte = |memory: &HostMemory, at| {
        let mut one = [0];
        memory.read(at, &mut one).expect("inside");
        one[0]
    };
    for at in 0..LEN {
        assert_eq!(byte(readable.memory(), at), 0x11);
        assert!(at < 64 || byte(private.memory(), at) == 0x11);
    }
});
