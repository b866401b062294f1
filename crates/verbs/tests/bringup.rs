//! Queue pairs that are brought up while another thread polls their completion queue, as an engine's
//! worker does.

mod support;

use std::sync::atomic::{AtomicBool, Ordering};

use kvxfer_verbs::{CompletionQueue, Context, Init, InitAttr, QpCaps, QueuePair, RtrAttr, RtsAttr};
use support::{How, Options, all, every, links, open_pair};

const TIMES: usize = 400;

fn bring_up(how: How, a: &Context, b: &Context, cq: [&CompletionQueue; 2]) {
    let make = |ctx: &Context, cq: &CompletionQueue| {
        let pd = ctx.alloc_pd().unwrap();
        let qp = pd.create_qp(QpCaps::default(), cq, cq).unwrap();
        qp.init(InitAttr::new(all())).unwrap()
    };
    let (qa, qb) = (make(a, cq[0]), make(b, cq[1]));
    let (ea, eb) = (qa.endpoint(), qb.endpoint());
    let (la, lb) = links(how, b);
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
    for how in every() {
        come_up_while_polled(how);
    }
}

fn come_up_while_polled(how: How) {
    let (a, b) = open_pair(how, &Options::default());
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
        // Each takes the kernel some milliseconds on an RDMA device.
        let times = if matches!(how, How::Rdma(_)) {
            TIMES / 10
        } else {
            TIMES
        };
        for _ in 0..times {
            bring_up(how, &a, &b, [&ca, &cb]);
        }
    });
}
