//! Queue pairs that are brought up while another thread polls their completion queue, as an engine's
//! worker does.

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use kvxfer_verbs::{
    CompletionQueue, Context, Init, InitAttr, Link, QpCaps, QueuePair, RtrAttr, RtsAttr,
    SoftConfig, SoftPath, open_soft,
};
use support::{EVERY, How, WAIT, all, tcp_pair};

const TIMES: usize = 400;

fn bring_up(how: How, a: &Context, b: &Context, cq: [&CompletionQueue; 2]) {
    let make = |ctx: &Context, cq: &CompletionQueue| {
        let pd = ctx.alloc_pd().unwrap();
        let qp = pd.create_qp(QpCaps::default(), cq, cq).unwrap();
        qp.init(InitAttr { access: all() }).unwrap()
    };
    let (qa, qb) = (make(a, cq[0]), make(b, cq[1]));
    let (ea, eb) = (qa.endpoint(), qb.endpoint());
    let (la, lb) = match how {
        How::Tcp => {
            let ((a1, b1), (a2, b2)) = (tcp_pair(), tcp_pair());
            let link = |requester, responder| Link::SoftTcp {
                requester,
                responder,
            };
            (link(a1, a2), link(b2, b1))
        }
        How::Arena | How::ProcessVm => {
            let path = if how == How::ProcessVm {
                SoftPath::ProcessVm
            } else {
                SoftPath::Arena
            };
            let dial = Link::SoftDial {
                peer: b.address(),
                path,
                deadline: Instant::now() + WAIT,
            };
            (dial, Link::SoftAwait { path })
        }
    };
    let up = |qp: QueuePair<Init>, remote, link| {
        let attr = RtrAttr {
            remote,
            link,
            min_rnr_timer: 12,
        };
        qp.rtr(attr).unwrap().rts(RtsAttr::default()).unwrap()
    };
    drop((up(qa, eb, la), up(qb, ea, lb)));
}

/// Ends the pollers, whatever becomes of the test.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn queue_pairs_come_up_while_their_queue_is_polled() {
    let a = open_soft(SoftConfig::default()).unwrap();
    let b = open_soft(SoftConfig::default()).unwrap();
    let (ca, cb) = (a.create_cq(64).unwrap(), b.create_cq(64).unwrap());
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for cq in [&ca, &cb] {
            scope.spawn(|| {
                let mut out = Vec::new();
                while !over.load(Ordering::Relaxed) {
                    // As after a sleep: every queue pair is looked at then.
                    cq.arm().unwrap();
                    cq.poll(&mut out, 16).unwrap();
                    out.clear();
                }
            });
        }
        let _over = Over(&over);
        for how in EVERY {
            for _ in 0..TIMES {
                bring_up(how, &a, &b, [&ca, &cb]);
            }
        }
    });
}
