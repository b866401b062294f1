//! Faults on purpose do what the plan says, on every path, and nothing else.
#![allow(missing_docs, clippy::field_reassign_with_default, reason = "a test")]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer_verbs::*;
use nix::poll::{PollFd, PollFlags, poll};
use support::*;

const N: usize = 4096;

fn options(plan: &str) -> Options {
    let mut o = Options::default();
    o.config.faults = Some(plan.parse().unwrap());
    o
}

/// The same, with a retry time of 50 ms.
fn impatient(plan: &str) -> Options {
    let mut o = options(plan);
    o.config.min_retry_time = Duration::from_millis(50);
    o.rts = RtsAttr {
        timeout: 8,
        retry_cnt: 1,
        rnr_retry: 7,
    };
    o
}

/// Two sides with `N` bytes each; only the first one's device has a plan.
struct Pair {
    a: Side,
    b: Side,
    near: Arc<TestMemory>,
    far: Arc<TestMemory>,
    table: Arc<RegionTable>,
    remote: Remote,
    region: MemoryRegion,
}

fn meet(how: How, o: &Options) -> Pair {
    let a = open_soft(o.config.clone()).unwrap();
    let b = open_soft(SoftConfig::default()).unwrap();
    meet_on(how, o, &a, &b)
}

fn meet_on(how: How, o: &Options, a: &Context, b: &Context) -> Pair {
    let (a, b) = join(how, o, a, b);
    let (near, far) = (TestMemory::sealed(N), TestMemory::sealed(N));
    near.put(0, &pattern(N, 1));
    far.put(0, &pattern(N, 2));
    let (rn, region) = (a.region(&near, all()), b.region(&far, all()));
    let remote = Remote {
        addr: region.addr(),
        rkey: region.rkey(),
    };
    let table = table(&[&rn]);
    Pair {
        a,
        b,
        near,
        far,
        table,
        remote,
        region,
    }
}

impl Pair {
    fn post(&self, ops: &[SendOp]) {
        let mut chain = SendChain::new();
        for (i, op) in ops.iter().enumerate() {
            let sge = Sge {
                region: 0,
                len: N as u32,
                offset: 0,
            };
            chain.push(i as u64, *op, true, &[sge]);
        }
        self.a.qp.post_send(&chain, &self.table).unwrap();
    }

    fn reap(&self, n: usize) -> Vec<Completion> {
        reap(&self.a.send_cq, n)
    }

    /// The first work request ends so, the next is flushed, and nothing has moved.
    fn fails(&self, how: How, status: WcStatus, vendor: u32) {
        let got = self.reap(2);
        assert_eq!(
            (got[0].status, got[0].vendor_err),
            (status, vendor),
            "{how:?}"
        );
        assert_eq!(got[1].status, WcStatus::WrFlush, "{how:?}");
        assert_eq!(self.a.qp.state(), QpState::Err);
        assert!(self.near.get(0, N) == pattern(N, 1), "{how:?}");
        assert!(self.far.get(0, N) == pattern(N, 2), "{how:?}");
    }
}

fn events(ctx: &Context) -> Vec<AsyncEvent> {
    std::iter::from_fn(|| ctx.async_event()).collect()
}

fn readable(ctx: &Context, wait: Duration) -> bool {
    let mut fds = [PollFd::new(ctx.async_fd().unwrap(), PollFlags::POLLIN)];
    poll(&mut fds, u16::try_from(wait.as_millis()).unwrap()).unwrap() == 1
}

#[test]
fn a_delayed_work_request_keeps_its_place() {
    for how in SOFT {
        let p = meet(how, &options("delay=1:20ms"));
        let before = Instant::now();
        let (read, write) = (SendOp::Read(p.remote), SendOp::Write(p.remote));
        p.post(&[write, read, write]);
        let got = p.reap(3);
        // Each waits for its own delay when its turn has come.
        assert!(before.elapsed() >= Duration::from_millis(60), "{how:?}");
        let ids: Vec<_> = got.iter().map(|c| (c.wr_id, c.status)).collect();
        let fine = WcStatus::Success;
        assert_eq!(ids, [(0, fine), (1, fine), (2, fine)], "{how:?}");
        assert!(p.far.get(0, N) == pattern(N, 1), "{how:?}");
    }
}

/// Posted on the first queue pair, then on the second; answers which was done first.
fn first_done(how: How, plan: &str) -> usize {
    let o = options(plan);
    let a = open_soft(o.config.clone()).unwrap();
    let b = open_soft(SoftConfig::default()).unwrap();
    let pairs = [0, 1].map(|_| meet_on(how, &o, &a, &b));
    for p in &pairs {
        p.post(&[SendOp::Read(p.remote)]);
    }
    let mut done = Vec::new();
    let end = Instant::now() + WAIT;
    while done.len() < 2 {
        assert!(Instant::now() < end, "{how:?} {done:?}");
        for (i, p) in pairs.iter().enumerate() {
            let mut out = Vec::new();
            p.a.send_cq.poll(&mut out, 1).unwrap();
            done.extend(out.iter().map(|_| i));
        }
    }
    done[0]
}

#[test]
fn queue_pairs_overtake_each_other() {
    for how in SOFT {
        let before = Instant::now();
        // With this seed the first queue pair's is held back, by nine tenths of the time.
        assert_eq!(first_done(how, "seed=14,reorder=0.5:300ms"), 1, "{how:?}");
        assert!(before.elapsed() >= Duration::from_millis(250), "{how:?}");
    }
}

#[test]
fn a_lost_work_request_runs_out_of_retries() {
    for how in SOFT {
        let p = meet(how, &impatient("drop=1"));
        let before = Instant::now();
        p.post(&[SendOp::Write(p.remote), SendOp::Read(p.remote)]);
        p.fails(how, WcStatus::RetryExc, vendor::NO_PROGRESS);
        assert!(before.elapsed() >= Duration::from_millis(50), "{how:?}");
    }
}

#[test]
fn a_corrupt_key_is_refused() {
    for how in SOFT {
        for op in [SendOp::Write as fn(Remote) -> SendOp, SendOp::Read] {
            let p = meet(how, &options("key=1"));
            p.post(&[op(p.remote), op(p.remote)]);
            p.fails(how, WcStatus::RemAccess, vendor::BAD_KEY);
        }
        // A message names no key.
        let p = meet(how, &options("key=1"));
        let sge = Sge {
            region: 0,
            len: N as u32,
            offset: 0,
        };
        p.b.qp.post_recv(1, &[sge], &table(&[&p.region])).unwrap();
        p.post(&[SendOp::Send]);
        assert_eq!(p.reap(1)[0].status, WcStatus::Success, "{how:?}");
    }
}

/// Wrong bytes, and nobody says so.
#[test]
fn a_stray_request_succeeds_elsewhere() {
    const OFF: usize = 64;
    for how in SOFT {
        let p = meet(how, &options("stray=1"));
        let sge = Sge {
            region: 0,
            len: (N - OFF) as u32,
            offset: OFF as u64,
        };
        let meant = Remote {
            addr: p.remote.addr + OFF as u64,
            ..p.remote
        };
        let mut chain = SendChain::new();
        chain.push(0, SendOp::Read(meant), true, &[sge]);
        p.a.qp.post_send(&chain, &p.table).unwrap();
        assert_eq!(p.reap(1)[0].status, WcStatus::Success, "{how:?}");
        let (near, far) = (p.near.get(0, N), pattern(N, 2));
        assert_eq!(near[..OFF], pattern(N, 1)[..OFF], "{how:?}");
        assert_eq!(near[OFF..], far[..N - OFF], "{how:?}");
        // A word stays right; what would leave its region is refused.
        chain.clear();
        let word = Sge { len: 64, ..sge };
        chain.push(1, SendOp::Write(meant), true, &[word]);
        p.a.qp.post_send(&chain, &p.table).unwrap();
        assert_eq!(p.reap(1)[0].status, WcStatus::Success, "{how:?}");
        assert_eq!(p.far.get(OFF, 64), near[OFF..2 * OFF], "{how:?}");
        assert_eq!(p.far.get(0, OFF), far[..OFF], "{how:?}");
        chain.clear();
        chain.push(2, SendOp::Read(p.remote), true, &[sge]);
        p.a.qp.post_send(&chain, &p.table).unwrap();
        assert_eq!(p.reap(1)[0].status, WcStatus::RemAccess, "{how:?}");
    }
}

#[test]
fn a_cut_link_ends_both_sides() {
    for how in SOFT {
        let p = meet(how, &options("cut=1"));
        p.post(&[SendOp::Write(p.remote), SendOp::Read(p.remote)]);
        p.fails(how, WcStatus::RetryExc, vendor::PEER_GONE);
        let mut chain = SendChain::new();
        chain.push(7, SendOp::Send, true, &[]);
        p.b.qp.post_send(&chain, &table(&[])).unwrap();
        let c = reap(&p.b.send_cq, 1)[0];
        let gone = (WcStatus::RetryExc, vendor::PEER_GONE);
        assert_eq!((c.status, c.vendor_err), gone, "{how:?}");
    }
}

#[test]
fn a_planned_error_says_that_it_is_planned() {
    for how in SOFT {
        let p = meet(how, &options("wr-error=1:rem-op"));
        p.post(&[SendOp::Read(p.remote), SendOp::Write(p.remote)]);
        p.fails(how, WcStatus::RemOp, vendor::PLANNED);
    }
}

/// What came before a fault is done, and the same seed has it in the same place.
#[test]
fn a_fault_comes_at_its_place_every_time() {
    let fails_at = |how, seed: u64| {
        let p = meet(
            how,
            &options(&format!("seed={seed},wr-error=0.05:rem-access")),
        );
        let ops: Vec<_> = (0..200)
            .map(|i| match i % 3 {
                0 => SendOp::Write(p.remote),
                _ => SendOp::Read(p.remote),
            })
            .collect();
        p.post(&ops);
        let got = p.reap(ops.len());
        assert!(got.iter().map(|c| c.wr_id).eq(0..200), "{how:?}");
        let bad = got
            .iter()
            .position(|c| c.status != WcStatus::Success)
            .unwrap();
        assert_eq!(got[bad].status, WcStatus::RemAccess, "{how:?}");
        assert_eq!(got[bad].vendor_err, vendor::PLANNED);
        assert!(got[bad + 1..].iter().all(|c| c.status == WcStatus::WrFlush));
        bad
    };
    let places = [1, 2, 3].map(|seed| SOFT.map(|how| fails_at(how, seed)));
    for place in &places {
        assert_eq!(place[0], place[1]);
        assert_eq!(place[0], place[2]);
    }
    assert!(
        places[0] != places[1] || places[1] != places[2],
        "{places:?}"
    );
}

#[test]
fn a_queue_pair_that_fails_by_itself_is_an_event() {
    for how in SOFT {
        let p = meet(how, &options("qp-fatal=1"));
        assert!(!readable(&p.a.ctx, Duration::ZERO));
        p.post(&[SendOp::Write(p.remote), SendOp::Read(p.remote)]);
        p.fails(how, WcStatus::WrFlush, 0);
        assert!(readable(&p.a.ctx, Duration::ZERO));
        let qp_num = p.a.qp.qp_num();
        assert_eq!(events(&p.a.ctx), [AsyncEvent::QpFatal { qp_num }]);
        assert!(!readable(&p.a.ctx, Duration::ZERO));
    }
}

/// Each kind of failure of a queue pair has its event, and the event goes with the queue pair.
#[test]
fn a_queue_pair_has_its_events_while_it_lives() {
    type Made = fn(u32) -> AsyncEvent;
    let kinds: [(&str, Made); 2] = [
        ("qp-request=1", |qp_num| AsyncEvent::QpRequestError {
            qp_num,
        }),
        ("qp-access=1", |qp_num| AsyncEvent::QpAccessError { qp_num }),
    ];
    for (plan, event) in kinds {
        let p = meet(How::Arena, &options(plan));
        p.post(&[SendOp::Write(p.remote), SendOp::Read(p.remote)]);
        p.fails(How::Arena, WcStatus::WrFlush, 0);
        assert_eq!(events(&p.a.ctx), [event(p.a.qp.qp_num())]);
        // Nobody has taken it when its queue pair is destroyed.
        let p = meet(How::Arena, &options(plan));
        p.post(&[SendOp::Write(p.remote), SendOp::Read(p.remote)]);
        p.fails(How::Arena, WcStatus::WrFlush, 0);
        assert!(readable(&p.a.ctx, Duration::ZERO));
        let Side { ctx, qp, .. } = p.a;
        drop(qp);
        assert!(!readable(&ctx, Duration::ZERO));
        assert_eq!(events(&ctx), []);
    }
}

/// Completions first, the event later; and not at all if the queue pair is gone by then.
#[test]
fn events_can_come_late() {
    let late = "qp-fatal=1,event-lag=100ms";
    for gone in [false, true] {
        let before = Instant::now();
        let p = meet(How::Arena, &options(late));
        p.post(&[SendOp::Write(p.remote), SendOp::Read(p.remote)]);
        p.fails(How::Arena, WcStatus::WrFlush, 0);
        let Side { ctx, qp, .. } = p.a;
        let qp_num = qp.qp_num();
        let keep = (!gone).then_some(qp);
        let wait = if gone {
            Duration::from_millis(300)
        } else {
            WAIT
        };
        assert_eq!(readable(&ctx, wait), !gone);
        assert!(before.elapsed() >= Duration::from_millis(100));
        let told = keep.iter().map(|_| AsyncEvent::QpFatal { qp_num });
        assert!(events(&ctx).into_iter().eq(told));
    }
}

#[test]
fn a_completion_queue_that_fails_takes_its_queue_pairs_along() {
    let p = meet(
        How::Arena,
        &options("cq-error=50ms,event=60ms:18,delay=1:1000s"),
    );
    assert_eq!(p.a.send_cq.number(), 1);
    let room = p.a.qp.send_credits();
    p.post(&[SendOp::Write(p.remote), SendOp::Read(p.remote)]);
    assert!(readable(&p.a.ctx, WAIT));
    let first = p.a.ctx.async_event();
    assert_eq!(first, Some(AsyncEvent::CqError { cq: 1 }));
    assert!(readable(&p.a.ctx, WAIT));
    let other = AsyncEvent::Other { code: 18 };
    assert_eq!(events(&p.a.ctx), [other]);
    // The device is through with the first one: what was posted is never told of.
    assert_eq!(p.a.qp.state(), QpState::Err);
    let mut got = Vec::new();
    p.a.send_cq.poll(&mut got, 16).unwrap();
    assert!(got.is_empty(), "{got:?}");
    // Nor is what is posted afterwards; it takes no room for ever either, however much it is.
    for _ in 0..2 * room {
        p.post(&[SendOp::Write(p.remote)]);
        assert!(!p.a.send_cq.poll(&mut got, 16).unwrap().more);
    }
    assert!(got.is_empty(), "{got:?}");
    assert_eq!(p.a.qp.send_credits(), room);
    assert_eq!(other.to_string(), "GID change");
    assert_eq!(AsyncEvent::Other { code: 77 }.to_string(), "event 77");
    // Nothing can be had of that queue again; another one works.
    let caps = QpCaps::default();
    let pd = p.a.ctx.alloc_pd().unwrap();
    let again = pd.create_qp(caps, &p.a.send_cq, &p.a.send_cq).unwrap();
    assert_eq!(again.state(), QpState::Err);
    let other = p.a.ctx.create_cq(16).unwrap();
    let well = pd.create_qp(caps, &other, &other).unwrap();
    assert_eq!(well.state(), QpState::Reset);
}

#[test]
fn a_port_that_is_down_holds_everything_up() {
    for how in SOFT {
        let before = Instant::now();
        let p = meet(how, &options("port-down=0s:150ms"));
        p.post(&[SendOp::Write(p.remote), SendOp::Read(p.remote)]);
        assert!(readable(&p.a.ctx, WAIT));
        assert_eq!(
            p.a.ctx.async_event(),
            Some(AsyncEvent::PortDown { port: 1 })
        );
        let got = p.reap(2);
        assert!(before.elapsed() >= Duration::from_millis(150), "{how:?}");
        assert!(got.iter().all(|c| c.status == WcStatus::Success), "{how:?}");
        assert!(readable(&p.a.ctx, WAIT));
        assert_eq!(events(&p.a.ctx), [AsyncEvent::PortUp { port: 1 }]);

        let p = meet(how, &impatient("port-down=0s:1000s"));
        p.post(&[SendOp::Write(p.remote), SendOp::Read(p.remote)]);
        p.fails(how, WcStatus::RetryExc, vendor::NO_PROGRESS);
    }
}

#[test]
fn a_device_that_fails_takes_its_queue_pairs_along() {
    for how in SOFT {
        let p = meet(how, &options("device-fatal=100ms,delay=1:1000s"));
        p.a.qp.post_recv(9, &[], &table(&[])).unwrap();
        p.post(&[SendOp::Write(p.remote), SendOp::Read(p.remote)]);
        p.fails(how, WcStatus::WrFlush, 0);
        let got = reap(&p.a.recv_cq, 1);
        assert_eq!((got[0].wr_id, got[0].status), (9, WcStatus::WrFlush));
        assert!(readable(&p.a.ctx, WAIT));
        assert_eq!(events(&p.a.ctx), [AsyncEvent::DeviceFatal]);
    }
}

#[test]
fn without_a_plan_nothing_ever_happens() {
    let p = meet(How::Arena, &Options::default());
    p.post(&[SendOp::Read(p.remote)]);
    assert_eq!(p.reap(1)[0].status, WcStatus::Success);
    assert_eq!(p.a.ctx.async_event(), None);
    assert!(!readable(&p.a.ctx, Duration::ZERO));
    assert!(open_null().async_fd().is_none() && open_null().async_event().is_none());
}

/// A queue pair that is not destroyed goes on as it was, and who asks is told.
#[test]
fn a_queue_pair_that_is_not_destroyed_says_so_and_goes_on() {
    let p = meet(How::Arena, &options("no-destroy=1"));
    let Side { ctx: _ctx, qp, .. } = p.a;
    let error = qp.destroy().expect_err("refused");
    assert!(
        matches!(
            &error,
            Error::Device {
                call: "destroy_qp",
                ..
            }
        ),
        "{error}"
    );
    // What the other side sends is served.
    let mut chain = SendChain::new();
    chain.push(7, SendOp::Send, true, &[]);
    p.b.qp.post_send(&chain, &table(&[])).expect("posted");
    assert_eq!(p.b.qp.state(), QpState::Rts);
    let p = meet(How::Arena, &options(""));
    p.a.qp.destroy().expect("destroyed");
    p.b.qp.post_send(&chain, &table(&[])).expect("posted");
    assert_eq!(reap(&p.b.send_cq, 1)[0].vendor_err, vendor::PEER_GONE);
}

#[test]
fn queue_pairs_that_are_not_made_or_joined() {
    let plan = |text: &str| {
        let mut config = SoftConfig::default();
        config.faults = Some(text.parse().expect("a plan"));
        open_soft(config).expect("a device")
    };
    let made = |ctx: &Context| {
        let (pd, cq) = (ctx.alloc_pd()?, ctx.create_cq(8)?);
        pd.create_qp(QpCaps::default(), &cq, &cq)
    };
    let error = made(&plan("no-qp=1")).expect_err("refused");
    assert!(
        matches!(
            &error,
            Error::Device {
                call: "create_qp",
                ..
            }
        ),
        "{error}"
    );
    // Some are, by the seed and their number.
    let ctx = plan("seed=3,no-qp=0.5");
    let which: Vec<bool> = (0..32).map(|_| made(&ctx).is_ok()).collect();
    assert!(which.contains(&true) && which.contains(&false), "{which:?}");
    let qp = made(&plan("no-join=1")).expect("made");
    let qp = qp.init(InitAttr::new(Access::NONE)).expect("ready");
    let remote = qp.endpoint();
    let attr = RtrAttr {
        remote,
        link: Link::SoftAwait {
            path: SoftPath::Arena,
        },
        min_rnr_timer: 12,
    };
    let error = qp.rtr(attr).expect_err("refused");
    assert!(
        matches!(
            &error,
            Error::Device {
                call: "modify_qp to RTR",
                ..
            }
        ),
        "{error}"
    );
}
