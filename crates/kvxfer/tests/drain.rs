//! The memory of a transfer that several workers have posted for comes back when all of them have
//! drained, and not before. One worker is held up by a waker that does not return.

mod support;

use std::future::Future;
use std::pin::Pin;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{PullOptions, Transfer};
use kvxfer::event::MemoryState;
use kvxfer::ids::RequestId;
use support::{LONG, Log, groups, pairs, recipe, until};

const BLOCK: u64 = 32 << 10;
const PULLS: u32 = 32;
/// Of each pull.
const MOST: u32 = 64;
const BLOCKS: u32 = PULLS * MOST;
const GRACE: Duration = Duration::from_millis(100);

/// Says that it has been woken, and stays until it is let go of.
struct Holding {
    woken: Mutex<Sender<()>>,
    let_go: Mutex<Receiver<()>>,
}

impl Wake for Holding {
    fn wake(self: Arc<Self>) {
        let woken = self.woken.lock().expect("no panic").send(());
        woken.expect("the test waits");
        // The other end is dropped.
        let _ = self.let_go.lock().expect("no panic").recv();
    }
}

#[test]
fn memory_comes_back_after_the_last_worker() {
    for path in [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp] {
        // On a busy machine one worker may have done everything before the other one woke up.
        let tried = (0..5).any(|_| a_worker_stays_away(path));
        assert!(tried, "{path}: nothing was posted by both");
    }
}

/// Whether both workers had posted something of a transfer when one of them was held up.
fn a_worker_stays_away(path: PathKind) -> bool {
    let with = |role| {
        recipe(role, path, BLOCK, BLOCKS + 1)
            .with(|config| {
                config.drain_grace = GRACE;
                // Far more is asked for than is posted at once.
                config.max_send_wr = 16;
            })
            .node()
    };
    let (producer, consumer) = (with(KvRole::Producer), with(KvRole::Consumer));
    let address = producer.engine.listen("127.0.0.1:0").expect("a port");
    let instance = consumer
        .engine
        .connect(&address.to_string(), LONG)
        .expect("a session");
    assert_eq!(instance.lanes().expect("up"), (4, 2), "two workers");
    let mut log = Log::new(&consumer.engine);
    let offer = |request: &str| {
        producer
            .engine
            .offer(&RequestId::from(request), &groups(0..BLOCKS), 1, LONG)
            .expect("an offer")
    };
    let ticket = offer("long");
    let options = |tag| PullOptions {
        tag,
        hold: true,
        ..PullOptions::default()
    };
    let pull = |tag: u32| {
        let own = tag * MOST..(tag + 1) * MOST;
        // Block 0 is for another one.
        let wanted = pairs(own.map(|b| (b, BLOCKS - b)));
        let pull = instance.pull(&ticket, &wanted, options(tag.into()));
        pull.expect("a pull")
    };
    let long: Vec<Transfer> = (0..PULLS).map(pull).collect();
    // One worker finishes this, and then stays away with what it has posted of the others.
    let (woken, is_woken) = channel();
    let (let_go, stays) = channel();
    let waker = Waker::from(Arc::new(Holding {
        woken: Mutex::new(woken),
        let_go: Mutex::new(stays),
    }));
    let mut short = instance
        .pull(&ticket, &pairs([(0, 0)]), options(99))
        .expect("a pull");
    let polled = Pin::new(&mut short).poll(&mut Context::from_waker(&waker));
    assert!(matches!(polled, Poll::Pending), "it ended too soon");
    is_woken.recv_timeout(LONG).expect("it ends");
    for transfer in &long {
        transfer.cancel();
    }
    // Those that the other worker owns end all the same, and cannot say that all is over.
    let ended = || long.iter().filter(|t| t.outcome().is_some());
    until("outcomes", || ended().count() > 0);
    std::thread::sleep(10 * GRACE);
    let quarantined: Vec<&Transfer> = ended()
        .filter(|transfer| {
            let outcome = transfer.outcome().expect("just seen");
            outcome
                .failure()
                .is_some_and(|failure| failure.memory == MemoryState::Quarantined)
        })
        .collect();
    if quarantined.is_empty() {
        return false;
    }
    for transfer in &quarantined {
        assert!(
            !transfer.is_released(),
            "released while a worker has yet to drain"
        );
    }
    drop(let_go);
    for transfer in &long {
        assert!(transfer.wait(LONG).is_some());
        assert!(transfer.wait_released(LONG), "memory comes back");
    }
    log.assert_told_once();
    drop((short, instance));
    true
}
