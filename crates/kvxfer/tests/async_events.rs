//! What a device tells by no completion reaches the transfers that it touches, under its own name, and
//! nothing else. Each event is planted in the device of the side that moves the blocks.

mod support;

use std::time::{Duration, Instant};

use kvxfer::Error;
use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Failure, Instance, Outcome, PullOptions, PushOptions, Transfer};
use kvxfer::event::{Event, MemoryState};
use kvxfer::ids::RequestId;
use kvxfer::transfer::{Cause, Class, QpEvent};
use support::{LONG, Log, Node, RECYCLED, bounded, groups, pairs, recipe, until};

const BLOCK: u64 = 64 << 10;
const BLOCKS: u32 = 32;
const WORD: u64 = 0x1357_9bdf_0246_8ace;
const PATHS: [PathKind; 2] = [PathKind::Arena, PathKind::Tcp];
const OPS: [Op; 2] = [Op::Read, Op::Write];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    Read,
    Write,
}

/// Two engines. The near one's device has the plan; it connects, and moves the blocks.
struct Rig {
    op: Op,
    near: Node,
    far: Node,
    address: String,
    instance: Instance,
    log: Log,
    far_log: Log,
    next: u64,
    made: Instant,
}

fn rig(path: PathKind, op: Op, plan: &str) -> Rig {
    let (near, far) = match op {
        Op::Read => (KvRole::Consumer, KvRole::Producer),
        Op::Write => (KvRole::Producer, KvRole::Consumer),
    };
    let far = recipe(far, path, BLOCK, BLOCKS).node();
    let near = recipe(near, path, BLOCK, BLOCKS).with(|config| {
        config.faults = Some(plan.parse().expect("a plan"));
        config.lease_ttl = LONG;
    });
    let made = Instant::now();
    let near = near.node();
    let address = far
        .engine
        .listen("127.0.0.1:0")
        .expect("a port")
        .to_string();
    let instance = near.engine.connect(&address, LONG).expect("a session");
    let (log, far_log) = (Log::new(&near.engine), Log::new(&far.engine));
    let rig = Rig {
        op,
        near,
        far,
        address,
        instance,
        log,
        far_log,
        next: 0,
        made,
    };
    let (from, _) = rig.sides();
    from.fill_blocks(0..BLOCKS, WORD);
    rig
}

impl Rig {
    /// Where the blocks come from, and where they go.
    fn sides(&self) -> (&Node, &Node) {
        match self.op {
            Op::Read => (&self.far, &self.near),
            Op::Write => (&self.near, &self.far),
        }
    }

    /// Waits until a time on the clock of the plan.
    fn wait_until(&self, at: Duration) {
        std::thread::sleep(at.saturating_sub(self.made.elapsed()));
    }

    /// Moves all blocks, in reverse order so that each is an operation of its own.
    fn start(&mut self, deadline: Duration) -> Result<Transfer, Error> {
        self.next += 1;
        let request = RequestId::from(format!("r{}", self.next).as_str());
        let wanted = pairs((0..BLOCKS).map(|b| (b, BLOCKS - 1 - b)));
        let (tag, deadline) = (self.next, Some(deadline));
        match self.op {
            Op::Read => {
                let offer = self.far.engine.offer(&request, &groups(0..BLOCKS), 1, LONG);
                let options = PullOptions {
                    tag,
                    deadline,
                    ..PullOptions::default()
                };
                self.instance
                    .pull(&offer.expect("an offer"), &wanted, options)
            }
            Op::Write => {
                let engine = &self.far.engine;
                let expected = engine.expect(&request, &groups(0..BLOCKS), 1, LONG);
                expected.expect("nothing of an earlier push is left");
                let options = PushOptions {
                    tag,
                    deadline,
                    ..PushOptions::default()
                };
                let push = self.instance.begin_push_with(&request, options);
                let begun = push.and_then(|push| {
                    push.all_layers(&wanted, None)?;
                    push.commit()
                });
                if begun.is_err() {
                    self.far.engine.cancel_expect(&request);
                    self.expectation_ends(&request);
                }
                begun
            }
        }
    }

    /// Waits until an expectation is over and its memory is free.
    fn expectation_ends(&mut self, request: &RequestId) {
        let of = |event: &Event| event.request().is_some_and(|(r, _)| r == request);
        let ended = self.far_log.wait("end of the expectation", |event| {
            of(event) && matches!(event, Event::Received { .. } | Event::Failed { .. })
        });
        if let Event::Failed { memory, .. } = ended
            && memory == MemoryState::Quarantined
        {
            self.far_log.wait("release of the expectation", |event| {
                of(event) && matches!(event, Event::Released { .. })
            });
        }
    }

    /// Waits for the end; afterwards no memory of it is held, and nothing lands any more.
    fn end(&mut self, transfer: &Transfer) -> Result<(), Failure> {
        let outcome = transfer.wait(LONG).expect("an outcome");
        assert!(transfer.wait_released(LONG), "memory comes back");
        let request = RequestId::from(format!("r{}", self.next).as_str());
        let of = |event: &Event| event.request().is_some_and(|(r, _)| *r == request);
        let told = self.log.wait("end", |event| {
            of(event) && !matches!(event, Event::Released { .. })
        });
        if self.op == Op::Write {
            self.expectation_ends(&request);
        }
        match outcome {
            Outcome::Done => {
                self.sides().1.assert_blocks(0..BLOCKS, WORD);
                self.sides().1.fill_blocks(0..BLOCKS, RECYCLED);
                Ok(())
            }
            Outcome::Failed(failure) => {
                let Event::Failed { first_cause, .. } = told else {
                    panic!("told otherwise: {told:?}");
                };
                assert_eq!(first_cause, failure.first_cause);
                self.sides().1.fill_blocks(0..BLOCKS, RECYCLED);
                std::thread::sleep(Duration::from_millis(50));
                self.sides().1.assert_blocks(0..BLOCKS, RECYCLED);
                Err(failure)
            }
            other => panic!("{other:?}"),
        }
    }

    /// One transfer after another, also over sessions that are set up anew, until one ends well, or
    /// does not.
    fn until_one(&mut self, ends_well: bool) -> Result<(), Failure> {
        let end = Instant::now() + LONG;
        while Instant::now() < end {
            assert!(self.instance.wait_up(LONG), "set up anew");
            // The session may go between the two.
            let Ok(transfer) = self.start(LONG) else {
                continue;
            };
            let how = self.end(&transfer);
            if how.is_ok() == ends_well {
                return how;
            }
        }
        panic!("no transfer ended well: {ends_well}");
    }

    fn until_one_fails(&mut self) -> Cause {
        self.until_one(false).expect_err("asked for").first_cause
    }

    fn until_one_is_done(&mut self) {
        self.until_one(true).expect("asked for");
    }
}

/// The event names the cause, if it comes with the flushed work or soon after; the session is set up
/// anew, and later work is done.
#[test]
fn a_queue_pair_that_fails_names_its_event() {
    let kinds = [
        ("qp-fatal", QpEvent::Fatal),
        ("qp-request", QpEvent::RequestError),
        ("qp-access", QpEvent::AccessError),
    ];
    for (at, (kind, event)) in kinds.into_iter().enumerate() {
        for (path, op) in PATHS.into_iter().flat_map(|p| OPS.map(|op| (p, op))) {
            // Before the flushes, or after them.
            for lag in ["", ",event-lag=1ms"] {
                // Where queue pairs are rebuilt, a request has to be lost with four of them.
                let rate = if path == PathKind::Tcp { 0.02 } else { 0.1 };
                let plan = format!("seed={at},{kind}={rate}{lag}");
                let mut rig = rig(path, op, &plan);
                let cause = rig.until_one_fails();
                assert_eq!(cause, Cause::QueuePair { event }, "{path} {op:?} {plan}");
                assert_eq!(cause.class(), Class::Retry);
                rig.until_one_is_done();
                rig.log.assert_told_once();
                rig.far_log.assert_told_once();
            }
        }
    }
}

/// Without the event nobody is named; and when it comes at last it hits nothing.
#[test]
fn an_event_that_comes_too_late_is_nobodys() {
    for op in OPS {
        let mut rig = rig(PathKind::Arena, op, "qp-fatal=0.1,event-lag=2s");
        assert_eq!(rig.until_one_fails(), Cause::LaneFailed);
        rig.until_one_is_done();
        rig.wait_until(Duration::from_secs(3));
        rig.until_one_is_done();
        rig.log.assert_told_once();
    }
}

/// Retries outlive a port that is down for a while.
#[test]
fn a_port_that_comes_back_costs_time_only() {
    for (path, op) in PATHS.into_iter().flat_map(|p| OPS.map(|op| (p, op))) {
        let mut rig = rig(path, op, "port-down=300ms:1500ms");
        rig.wait_until(Duration::from_millis(400));
        let transfer = rig.start(LONG).expect("the session stands");
        rig.end(&transfer).expect("done");
        assert!(
            rig.made.elapsed() >= Duration::from_millis(1800),
            "the port was up"
        );
        assert_eq!(rig.log.count(|e| matches!(e, Event::PeerDown { .. })), 0);
    }
}

#[test]
fn what_is_late_while_the_port_is_down_is_so_for_the_port() {
    for (path, op) in PATHS.into_iter().flat_map(|p| OPS.map(|op| (p, op))) {
        let mut rig = rig(path, op, "port-down=300ms:3s");
        rig.wait_until(Duration::from_millis(400));
        let transfer = rig.start(Duration::from_millis(300)).expect("it stands");
        let failure = rig.end(&transfer).expect_err("the port is down");
        assert_eq!(
            failure.first_cause,
            Cause::PortDown { port: 1 },
            "{path} {op:?}"
        );
        assert_eq!(failure.first_cause.class(), Class::Retry);
        // Where what was posted is taken down by force, the session goes for the same reason.
        rig.until_one_is_done();
        let down = |event: &Event| match event {
            Event::PeerDown { cause, .. } => *cause != Cause::PortDown { port: 1 },
            _ => false,
        };
        assert_eq!(rig.log.count(down), 0);
        rig.log.assert_told_once();
        rig.far_log.assert_told_once();
    }
}

/// The device's own word then is that its retries are over; they were in vain for the port.
#[test]
fn retries_that_a_dead_port_uses_up_are_the_ports() {
    let sides = [(PathKind::Arena, Op::Read), (PathKind::Tcp, Op::Write)];
    let rigs = sides.map(|(path, op)| {
        std::thread::spawn(move || {
            let mut rig = rig(path, op, "port-down=300ms:12s");
            rig.wait_until(Duration::from_millis(400));
            let transfer = rig.start(LONG).expect("it stands");
            let failure = rig.end(&transfer).expect_err("the port is down");
            assert_eq!(
                failure.first_cause,
                Cause::PortDown { port: 1 },
                "{path} {op:?}"
            );
            assert!(
                rig.made.elapsed() < Duration::from_secs(12),
                "by its retries"
            );
            let port = Cause::PortDown { port: 1 };
            let down = |e: &Event| matches!(e, Event::PeerDown { cause, .. } if *cause == port);
            rig.log.wait("PeerDown", down);
            rig.until_one_is_done();
            rig.log.assert_told_once();
        })
    });
    for rig in rigs {
        rig.join().expect("no panic");
    }
}

#[test]
fn a_device_that_fails_ends_all_and_takes_no_more() {
    for (path, op) in PATHS.into_iter().flat_map(|p| OPS.map(|op| (p, op))) {
        let mut rig = rig(path, op, "device-fatal=2s,delay=1:1000s");
        let transfer = rig.start(LONG).expect("the session stands");
        let failure = rig.end(&transfer).expect_err("the device is gone");
        assert_eq!(failure.first_cause, Cause::DeviceFatal, "{path} {op:?}");
        assert_eq!(failure.first_cause.class(), Class::Fatal);
        let down = rig
            .log
            .wait("PeerDown", |e| matches!(e, Event::PeerDown { .. }));
        assert!(
            matches!(&down, Event::PeerDown { cause, .. } if *cause == Cause::DeviceFatal),
            "{down:?}"
        );
        rig.log.assert_told_once();
        let refused = |error: Error| assert!(matches!(error, Error::DeviceFailed), "{error}");
        let engine = &rig.near.engine;
        refused(engine.connect(&rig.address, LONG).expect_err("refused"));
        refused(rig.instance.path().expect_err("refused"));
        let (request, blocks) = (RequestId::from("later"), groups(0..1));
        refused(match op {
            Op::Read => engine
                .expect(&request, &blocks, 1, LONG)
                .expect_err("refused"),
            Op::Write => engine
                .offer(&request, &blocks, 1, LONG)
                .expect_err("refused"),
        });
        // The other side goes on with an engine that has a device.
        let Rig {
            near,
            far,
            address,
            instance,
            ..
        } = rig;
        let role = match op {
            Op::Read => KvRole::Consumer,
            Op::Write => KvRole::Producer,
        };
        bounded("the drop", move || drop((instance, near)));
        let again = recipe(role, path, BLOCK, BLOCKS).node();
        let instance = again.engine.connect(&address, LONG).expect("a session");
        until("up", || instance.is_up());
        drop(far);
    }
}

/// The lanes of one worker are lost with its completion queue, and those that come after work.
#[test]
fn a_completion_queue_that_fails_is_replaced() {
    let sides = PATHS.into_iter().flat_map(|p| OPS.map(|op| (p, op)));
    let rigs = sides.map(|(path, op)| {
        std::thread::spawn(move || {
            // The event finds work on both workers.
            let mut rig = rig(path, op, "cq-error=1500ms,delay=1:300ms");
            rig.wait_until(Duration::from_secs(1));
            let transfer = rig.start(LONG).expect("the session stands");
            let failure = rig.end(&transfer).expect_err("half of it is lost");
            assert_eq!(failure.first_cause, Cause::CompletionQueue, "{path} {op:?}");
            rig.until_one_is_done();
            assert_eq!(rig.instance.lanes().expect("up"), (4, 2), "two workers");
            let transfer = rig.start(LONG).expect("the session stands");
            rig.end(&transfer).expect("done");
            let down = |e: &Event| matches!(e, Event::PeerDown { .. });
            assert_eq!(rig.log.count(down), 1, "one session was lost");
            rig.log.assert_told_once();
            rig.far_log.assert_told_once();
        })
    });
    for rig in rigs.collect::<Vec<_>>() {
        rig.join().expect("no panic");
    }
}

/// An event that ends nothing: work goes on, and nobody stays awake for it.
#[test]
fn other_events_end_nothing() {
    let mut rig = rig(PathKind::Arena, Op::Read, "event=100ms:18");
    rig.wait_until(Duration::from_millis(300));
    rig.until_one_is_done();
    assert_eq!(rig.log.count(|e| matches!(e, Event::PeerDown { .. })), 0);
    let before = cpu_time();
    std::thread::sleep(Duration::from_secs(2));
    let used = cpu_time() - before;
    assert!(used < Duration::from_millis(100), "awake for {used:?}");
}

/// Of this process, which runs one test.
fn cpu_time() -> Duration {
    let clock = nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID;
    nix::time::clock_gettime(clock).expect("a clock").into()
}
