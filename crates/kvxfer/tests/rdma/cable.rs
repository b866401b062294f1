//! The cable between the two hosts is cut while blocks move, swallows all, or loses and delays. The
//! control connection stays: it does not go over the cable.

use std::time::{Duration, Instant};

use kvxfer::config::Config;
use kvxfer::engine::{Outcome, Transfer};
use kvxfer::event::{Event, MemoryState};
use kvxfer::transfer::{Cause, CompletionStatus};

use crate::support::{LONG, RECYCLED, dealt, until};
use crate::{Pair, sh};

/// What a transfer is given that is to end before. Soft-RoCE whose own end is down may stop without a word,
/// though, and then the deadline is the end.
const ENOUGH: Duration = Duration::from_secs(12);
/// How much later than its deadline an outcome may come on the busiest machine.
const SLACK: Duration = Duration::from_secs(15);

/// 32 MiB in two layers, as often over again as makes it long enough to be struck.
const BLOCK: u64 = 64 << 10;
const BLOCKS: u32 = 256;
/// For pulls, each of which has blocks of its own.
const MANY: u32 = 2048;
const TIMES: u32 = 12;
/// Of a fault that was to be there in time.
const TRIES: u32 = 3;

/// Half a second of retries.
fn impatient(config: &mut Config) {
    config.rdma_timeout = 15;
    config.rdma_retry_cnt = 3;
}

/// Half a minute and more of retries.
fn patient(config: &mut Config) {
    config.rdma_timeout = 20;
    config.rdma_retry_cnt = 6;
}

/// The cable is as it should be again when this goes.
struct Cable;

impl Cable {
    fn cut() -> Self {
        let cable = Self;
        sh("ip link set ha down");
        cable
    }

    /// What goes from `ra` to `rb` meets with this.
    fn disturbed(how: &str) -> Self {
        let cable = Self;
        sh(&format!("tc qdisc add dev ha root netem {how}"));
        cable
    }

    fn mend(self) {
        drop(self);
        let state = |device| {
            let path = format!("/sys/class/infiniband/{device}/ports/1/state");
            std::fs::read_to_string(path).unwrap_or_default()
        };
        until("both ports", || {
            ["ra", "rb"].iter().all(|d| state(d).contains("ACTIVE"))
        });
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        // Of the two one may not be wanted.
        let script = "tc qdisc del dev ha root 2>/dev/null; sh \"$KVXFER_VM/two-hosts.sh\" mend";
        let status = std::process::Command::new("sh")
            .args(["-c", script])
            .status();
        if !status.is_ok_and(|status| status.success()) {
            eprintln!("the cable was not mended");
        }
    }
}

/// The port or the retries are named, not what follows from them.
fn names_the_link(cause: &Cause) -> bool {
    let retries = CompletionStatus::RetryExceeded;
    match cause {
        Cause::PortDown { port } => *port == 1,
        Cause::Completion { status, .. } => *status == retries,
        _ => false,
    }
}

/// How they end whose cable carries nothing any more. The first of them may have been done before.
#[track_caller]
fn failures(transfers: &[Transfer]) -> Vec<Cause> {
    let mut causes = Vec::new();
    for transfer in transfers {
        if let Outcome::Failed(failure) = transfer.wait(LONG).expect("an outcome") {
            causes.push(failure.first_cause);
        }
        assert!(transfer.wait_released(LONG), "memory comes back");
    }
    assert!(!causes.is_empty(), "struck too late");
    causes
}

impl Pair {
    /// Its memory is its owner's: what is done with it is not undone, also when the cable is back.
    fn nothing_lands(&self, cable: Cable) {
        let blocks = 0..self.blocks;
        self.consumer.fill_blocks(blocks.clone(), RECYCLED);
        cable.mend();
        std::thread::sleep(Duration::from_millis(500));
        self.consumer.assert_blocks(blocks, RECYCLED);
        self.consumer.side.poison().expect("poisoned");
    }

    /// The session is set up anew, if need be, and blocks arrive.
    fn works_again(&mut self) {
        let table = self.all();
        let mut tries = Vec::new();
        until("a pull", || {
            assert!(self.instance.wait_up(LONG), "set up anew");
            // The session may go between the two.
            let Ok(transfer) = self.pull(&table, LONG) else {
                return false;
            };
            let outcome = transfer.wait(LONG).expect("an outcome");
            assert!(transfer.wait_released(LONG), "memory comes back");
            tries.push(outcome);
            tries.last() == Some(&Outcome::Done)
        });
        println!("tries after the cable was mended: {tries:#?}");
        self.arrived(&table);
    }
}

/// A cable that is cut or carries nothing under pulls, which end for it. `hasty` is the deadline of one
/// more that begins only then.
fn pulls_end(change: fn(&mut Config), fault: fn() -> Cable, hasty: Option<Duration>) -> Vec<Cause> {
    in_time(|| pulls_end_once(change, fault, hasty))
}

/// What comes of a try whose fault was there before its deadline: an emulated kernel may take half a minute to set a
/// link down that is busy.
fn in_time<T>(mut once: impl FnMut() -> (T, bool)) -> T {
    for _ in 0..TRIES {
        let (what, in_time) = once();
        if in_time {
            return what;
        }
        println!("the fault came after the deadline: once more");
    }
    panic!("the fault came after the deadline, {TRIES} times");
}

/// And whether the fault was there before their deadline.
fn pulls_end_once(
    change: fn(&mut Config),
    fault: fn() -> Cable,
    hasty: Option<Duration>,
) -> (Vec<Cause>, bool) {
    let mut pair = Pair::new(BLOCK, MANY, change);
    let table = pair.all();
    let begun = Instant::now();
    let mut parts = dealt(&table, TIMES + 1);
    let last = parts.pop().expect("one more");
    let pull = |part: Vec<_>| pair.pull(&part, ENOUGH).expect("a transfer");
    let mut transfers: Vec<Transfer> = parts.into_iter().map(pull).collect();
    pair.bytes_have_come();
    let cable = fault();
    let struck = begun.elapsed();
    if let Some(hasty) = hasty {
        transfers.push(pair.pull(&last, hasty).expect("the session stands"));
    }
    let causes = failures(&transfers);
    let took = begun.elapsed();
    println!("struck after {struck:?}, over after {took:?}: {causes:?}");
    assert!(took < struck.max(ENOUGH) + SLACK, "{took:?}");
    pair.nothing_lands(cable);
    pair.works_again();
    pair.told_once();
    (causes, struck < ENOUGH)
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_pulls_whose_cable_is_cut() {
    let causes = pulls_end(impatient, Cable::cut, None);
    assert!(causes.iter().all(names_the_link), "{causes:?}");
}

/// Long before the retries are over.
#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test --long has some"]
fn on_rdma_a_pull_that_is_late_for_a_cut_cable() {
    let causes = pulls_end(patient, Cable::cut, Some(Duration::from_secs(1)));
    let down = Cause::PortDown { port: 1 };
    assert!(causes.iter().all(|cause| *cause == down), "{causes:?}");
}

/// The ports are up all the while.
#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test --long has some"]
fn on_rdma_pulls_over_a_cable_that_swallows_all() {
    let causes = pulls_end(impatient, || Cable::disturbed("loss 100%"), None);
    let down = |cause: &Cause| matches!(cause, Cause::PortDown { .. });
    let named = |cause| names_the_link(cause) && !down(cause);
    assert!(causes.iter().all(named), "{causes:?}");
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_a_push_whose_cable_is_cut() {
    let causes = in_time(push_ends_once);
    assert!(causes.iter().all(names_the_link), "{causes:?}");
}

fn push_ends_once() -> (Vec<Cause>, bool) {
    let mut pair = Pair::new(BLOCK, BLOCKS, impatient);
    let table = pair.all();
    let begun = Instant::now();
    let (request, transfer) = pair.push_times(TIMES, &table, ENOUGH).expect("a transfer");
    pair.bytes_have_come();
    let cable = Cable::cut();
    let struck = begun.elapsed();
    let causes = failures(&[transfer]);
    println!(
        "push: struck after {struck:?}, {causes:?} after {:?}",
        begun.elapsed()
    );
    let of = |event: &Event| event.request().is_some_and(|(r, _)| *r == request);
    let ended = pair.told[1].wait("end of the expectation", of);
    let Event::Failed {
        memory,
        first_cause,
        ..
    } = ended
    else {
        panic!("received over a cable that was cut: {ended:?}");
    };
    println!(
        "expectation: {first_cause}, {memory:?} after {:?}",
        begun.elapsed()
    );
    if memory == MemoryState::Quarantined {
        let released = |event: &Event| of(event) && matches!(event, Event::Released { .. });
        pair.told[1].wait("release", released);
    }
    let took = begun.elapsed();
    assert!(took < struck.max(ENOUGH) + SLACK, "{took:?}");
    pair.nothing_lands(cable);
    pair.works_again();
    pair.told_once();
    (causes, struck < ENOUGH)
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_a_cable_that_loses_and_delays() {
    // A packet each: soft-RoCE counts its tries from one message that has got through to the next, and has no
    // more than seven.
    let mut pair = Pair::new(4 << 10, 1024, |_| {});
    let cable = Cable::disturbed("loss 1% delay 2ms");
    pair.moves(&pair.all());
    cable.mend();
    pair.moves(&pair.all());
}
