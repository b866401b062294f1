//! The model against a poster in Rust that does one thing wrong at a time.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;

use super::super::{
    CqDepth, Cqe, CqeStatus, Doorbell, DoorbellRecord, Gather, Mlx5Fault, Operation, OutsideQueue,
    Qpn, QueueMemory, QueueNotReached, RemoteSpan, Segment, SendFlags, SendWqe, SqDepth, Syndrome,
};
use super::{Carried, Copying, Hca, HcaSetup, KeyTable, Queues, Region, Sink, Violation};

#[derive(Debug, Clone)]
struct Words(Arc<[AtomicU64]>);

impl Words {
    fn new(bytes: u64) -> Self {
        Self((0..bytes / 8).map(|_| AtomicU64::new(0)).collect())
    }

    fn at(&self, offset: u64) -> Result<&AtomicU64, OutsideQueue> {
        let len = self.len();
        let word = self.0.get(offset as usize / 8);
        word.filter(|_| offset.is_multiple_of(8))
            .ok_or(OutsideQueue { offset, len })
    }
}

impl QueueMemory for Words {
    fn len(&self) -> u64 {
        8 * self.0.len() as u64
    }

    fn load(&self, offset: u64) -> Result<[u8; 8], OutsideQueue> {
        Ok(self.at(offset)?.load(Ordering::Acquire).to_ne_bytes())
    }

    fn store(&self, offset: u64, bytes: [u8; 8]) -> Result<(), OutsideQueue> {
        self.at(offset)?
            .store(u64::from_ne_bytes(bytes), Ordering::Release);
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Counted(Vec<u64>);

impl Sink for Counted {
    fn execute(&mut self, n: u64, operation: &Operation) -> Result<Carried, Syndrome> {
        self.0.push(n);
        if matches!(operation, Operation::Nop) {
            // For tests of what ends later.
            return Ok(Carried::UnderWay);
        }
        let len = operation.sides().map_or(0, |(_, local)| local.len());
        Ok(Carried::Done(u32::try_from(len).unwrap_or(u32::MAX)))
    }
}

/// A poster, and the device.
struct Bench {
    queues: Queues<Words>,
    hca: Hca<Words, Counted>,
    next: u64,
    taken: u64,
}

const DEPTH: u32 = 4;
const QPN: u32 = 0x0012_3456;

fn qpn(n: u32) -> Qpn {
    Qpn::new(n).expect("24 bits")
}

fn setup(first: u64) -> HcaSetup {
    let region = |addr, writable| Region {
        addr,
        len: 4096,
        writable,
    };
    HcaSetup {
        qpn: qpn(QPN),
        sq_depth: SqDepth::new(DEPTH).expect("a power"),
        cq_depth: CqDepth::new(DEPTH).expect("a power"),
        first,
        keys: KeyTable {
            local: [(1, region(0x1000, true)), (2, region(0x8000, false))].into(),
            remote: [(3, region(0x2000, true)), (4, region(0x9000, false))].into(),
        },
    }
}

impl Bench {
    fn new(first: u64) -> Self {
        let cq_depth = CqDepth::new(DEPTH).expect("a power");
        let sq_depth = SqDepth::new(DEPTH).expect("a power");
        let queues = || Queues {
            sq: Words::new(sq_depth.bytes()),
            sq_record: Words::new(8),
            cq: Words::new(cq_depth.bytes()),
            cq_record: Words::new(8),
            bell: Words::new(8),
        };
        let mine = queues();
        for i in 0..u64::from(DEPTH) {
            let last = Cqe::unwritten();
            let (words, _) = last.as_chunks::<8>();
            mine.cq.store(64 * i + 56, words[7]).expect("inside");
        }
        let theirs = Queues {
            sq: mine.sq.clone(),
            sq_record: mine.sq_record.clone(),
            cq: mine.cq.clone(),
            cq_record: mine.cq_record.clone(),
            bell: mine.bell.clone(),
        };
        let bench = Self {
            hca: Hca::new(theirs, setup(first), Counted::default()).expect("large enough"),
            queues: mine,
            next: first,
            taken: first,
        };
        bench.record(first);
        bench.give_back(first);
        bench
    }

    fn wqe(&self) -> SendWqe {
        SendWqe {
            index: self.next as u16,
            qpn: qpn(QPN),
            flags: SendFlags {
                signalled: true,
                ..SendFlags::default()
            },
            operation: Operation::Write {
                remote: RemoteSpan {
                    addr: 0x2000,
                    rkey: 3,
                },
                local: Gather::One(Segment::new(0x1000, 64, 1).expect("a length")),
            },
        }
    }

    fn write(&self, wqe: &SendWqe) {
        let block = wqe.encode().expect("valid");
        let (words, _) = block.as_chunks::<8>();
        let at = 64 * (self.next % u64::from(DEPTH));
        for (word, i) in words.iter().zip(0..) {
            self.queues.sq.store(at + 8 * i, *word).expect("inside");
        }
    }

    fn record(&self, next: u64) {
        let [a, b, c, d] = DoorbellRecord::new(next).encode();
        let word = [0, 0, 0, 0, a, b, c, d];
        self.queues.sq_record.store(0, word).expect("inside");
    }

    fn give_back(&self, taken: u64) {
        let [_, b, c, d] = (taken as u32).to_be_bytes();
        let word = [0, b, c, d, 0, 0, 0, 0];
        self.queues.cq_record.store(0, word).expect("inside");
    }

    /// Posts as it should be.
    fn post(&mut self, wqe: &SendWqe) -> Result<u64, Violation> {
        self.write(wqe);
        self.next += 1;
        self.record(self.next);
        self.hca.ring(Doorbell::of(wqe).expect("valid").encode())
    }

    /// The completion that comes next.
    fn poll(&mut self) -> Option<Cqe> {
        let depth = CqDepth::new(DEPTH).expect("a power");
        let mut block = [0; 64];
        let (words, _) = block.as_chunks_mut::<8>();
        for (word, i) in words.iter_mut().zip(0..) {
            let at = depth.offset(self.taken) + 8 * i;
            *word = self.queues.cq.load(at).expect("inside");
        }
        let cqe = Cqe::decode(&block, self.taken, depth).expect("one of ours")?;
        self.taken += 1;
        self.give_back(self.taken);
        Some(cqe)
    }
}

#[test]
fn posts_in_order_complete_in_order() {
    for first in [0, 0xfffa, 0xff_fffa, 0xffff_fffa] {
        let mut bench = Bench::new(first);
        for i in 0..20 {
            let wqe = bench.wqe();
            assert_eq!(bench.post(&wqe), Ok(1));
            let cqe = bench.poll().expect("it has ended");
            assert_eq!(cqe.counter, (first + i) as u16);
            assert_eq!(cqe.status, CqeStatus::Done { byte_count: 64 });
            assert_eq!(cqe.qpn.get(), QPN);
            assert_eq!(bench.poll(), None);
        }
        let all: Vec<_> = (first..first + 20).collect();
        assert_eq!(bench.hca.sink().0, all);
        assert_eq!(bench.hca.consumed(), first + 20);
    }
}

#[test]
fn a_look_takes_no_more_than_it_may() {
    let mut bench = Bench::new(0xfffe);
    for _ in 0..DEPTH {
        bench.write(&bench.wqe());
        bench.next += 1;
    }
    bench.record(bench.next);
    for (most, taken) in [(0, 0), (3, 3), (3, 1), (3, 0)] {
        assert_eq!(bench.hca.look(most), Ok(taken));
    }
    assert_eq!(bench.hca.consumed(), 0xfffe + u64::from(DEPTH));
}

/// A copy, and where it begins and ends.
type Done = (&'static str, Vec<(u64, u64)>);

/// Memory that loads do not reach: what was done to it, and what is in it.
#[derive(Debug, Clone)]
struct Copied {
    far: Words,
    mirror: Words,
    log: Arc<Mutex<Vec<Done>>>,
    is_lost: Arc<AtomicBool>,
    /// How often a copy is asked for before it is there, and how often it still is.
    looks: Arc<(AtomicU32, AtomicU32)>,
}

impl Copied {
    /// The memory of a queue, and of what is beside it: that loads reach.
    fn new(far: &Words, is_reached: bool) -> Self {
        let mirror = match is_reached {
            true => far.clone(),
            false => Words::new(far.len()),
        };
        Self {
            far: far.clone(),
            mirror,
            log: Arc::default(),
            is_lost: Arc::default(),
            looks: Arc::default(),
        }
    }

    fn copy(
        &self,
        step: &'static str,
        (to, from): (&Words, &Words),
        spans: &[Range<u64>],
    ) -> Poll<Result<(), QueueNotReached>> {
        if self.is_lost.load(Ordering::Acquire) {
            return Poll::Ready(Err(QueueNotReached { step }));
        }
        let (each, left) = &*self.looks;
        if left.load(Ordering::Acquire) > 0 {
            left.fetch_sub(1, Ordering::AcqRel);
            return Poll::Pending;
        }
        left.store(each.load(Ordering::Acquire), Ordering::Release);
        for offset in spans.iter().flat_map(|span| span.clone().step_by(8)) {
            let word = from.load(offset).expect("inside");
            to.store(offset, word).expect("inside");
        }
        let mut log = self.log.lock().expect("nobody panicked");
        log.push((
            step,
            spans.iter().map(|span| (span.start, span.end)).collect(),
        ));
        Poll::Ready(Ok(()))
    }
}

impl QueueMemory for Copied {
    fn len(&self) -> u64 {
        self.far.len()
    }

    fn load(&self, offset: u64) -> Result<[u8; 8], OutsideQueue> {
        self.mirror.load(offset)
    }

    fn store(&self, offset: u64, bytes: [u8; 8]) -> Result<(), OutsideQueue> {
        self.mirror.store(offset, bytes)
    }

    fn fetch(&self, spans: &[Range<u64>]) -> Poll<Result<(), QueueNotReached>> {
        self.copy("reading", (&self.mirror, &self.far), spans)
    }

    fn flush(&self, spans: &[Range<u64>]) -> Poll<Result<(), QueueNotReached>> {
        self.copy("writing", (&self.far, &self.mirror), spans)
    }
}

/// Looks at the queue when it carries something out.
#[derive(Debug)]
struct Looks(Copied, Vec<u64>);

impl Sink for Looks {
    fn execute(&mut self, n: u64, _: &Operation) -> Result<Carried, Syndrome> {
        // A slot may be used again as soon as this one's end is told: nothing is stored there later.
        let slot = n % u64::from(DEPTH) * 64;
        assert_eq!(self.0.far.load(slot), Ok([0xa5; 8]));
        self.1.push(n);
        Ok(Carried::Done(64))
    }
}

#[test]
fn a_queue_that_has_to_be_copied_is_copied_once_a_look() {
    // Two WQEs before the queue's end, and what is behind it.
    let mut bench = Bench::new(2);
    let sq = Copied::new(&bench.queues.sq, false);
    let near = |words| Copied::new(words, true);
    let queues = Queues {
        sq: sq.clone(),
        sq_record: near(&bench.queues.sq_record),
        cq: near(&bench.queues.cq),
        cq_record: near(&bench.queues.cq_record),
        bell: near(&bench.queues.bell),
    };
    let sink = Looks(sq.clone(), Vec::new());
    let mut hca = Hca::new(queues, setup(2), sink).expect("large enough");
    for _ in 0..3 {
        bench.write(&bench.wqe());
        bench.next += 1;
    }
    bench.record(bench.next);
    let done = |hca: &Hca<Copied, Looks>| {
        std::mem::take(&mut *hca.sink().0.log.lock().expect("unpoisoned"))
    };
    assert_eq!(hca.look(u64::MAX), Ok(3));
    let over_the_end = vec![(128, 256), (0, 64)];
    let wanted = ["reading", "writing"].map(|step| (step, over_the_end.clone()));
    assert_eq!(done(&hca), wanted);
    assert_eq!(hca.look(u64::MAX), Ok(0), "nothing was told of");
    assert_eq!(done(&hca), []);
    bench.write(&bench.wqe());
    bench.next += 1;
    bench.record(bench.next);
    assert_eq!(hca.look(u64::MAX), Ok(1));
    assert_eq!(
        done(&hca),
        ["reading", "writing"].map(|step| (step, vec![(64, 128)]))
    );
    assert_eq!(hca.sink().1, [2, 3, 4, 5]);
    // A copy that fails is no fault of who posts.
    sq.is_lost.store(true, Ordering::Release);
    bench.write(&bench.wqe());
    bench.next += 1;
    bench.record(bench.next);
    let lost = QueueNotReached { step: "reading" };
    assert_eq!(hca.look(u64::MAX), Err(Violation::NotReached(lost)));
    assert_eq!(hca.consumed(), 6);
}

/// Nobody waits for a copy, and nothing is carried out before both are there: the bytes, and what overwrites them.
#[test]
fn a_copy_that_takes_time_is_looked_at_again() {
    for each in [1, 2, 5] {
        let mut bench = Bench::new(2);
        let sq = Copied::new(&bench.queues.sq, false);
        sq.looks.0.store(each, Ordering::Release);
        sq.looks.1.store(each, Ordering::Release);
        let near = |words| Copied::new(words, true);
        let queues = Queues {
            sq: sq.clone(),
            sq_record: near(&bench.queues.sq_record),
            cq: near(&bench.queues.cq),
            cq_record: near(&bench.queues.cq_record),
            bell: near(&bench.queues.bell),
        };
        let sink = Looks(sq.clone(), Vec::new());
        let mut hca = Hca::new(queues, setup(2), sink).expect("large enough");
        let post = |bench: &mut Bench| {
            bench.write(&bench.wqe());
            bench.next += 1;
            bench.record(bench.next);
        };
        post(&mut bench);
        post(&mut bench);
        for (taken, more) in [(2, 2), (4, 0)] {
            for is_read in [false, true] {
                for _ in 0..each {
                    assert_eq!(hca.look(u64::MAX), Ok(0));
                    let copying = Copying { count: 2, is_read };
                    assert_eq!(hca.copying(), Some(copying));
                    assert_eq!(hca.consumed(), taken, "not before it is there");
                    assert_eq!(hca.ended(), taken);
                }
            }
            // What is posted meanwhile is for the next look.
            for _ in 0..more {
                post(&mut bench);
            }
            assert_eq!(hca.look(u64::MAX), Ok(2));
            assert_eq!((hca.copying(), hca.consumed()), (None, taken + 2));
            let done = std::mem::take(&mut *sq.log.lock().expect("unpoisoned"));
            let at = taken % u64::from(DEPTH) * 64;
            let wanted = ["reading", "writing"].map(|step| (step, vec![(at, at + 128)]));
            assert_eq!(done, wanted);
        }
        assert_eq!(hca.sink().1, [2, 3, 4, 5]);
        assert_eq!(hca.look(u64::MAX), Ok(0), "nothing more was told of");
        assert_eq!(hca.copying(), None);
    }
}

#[test]
fn a_device_that_is_told_of_nothing_looks_by_itself() {
    let mut bench = Bench::new(0);
    assert_eq!(bench.hca.look(u64::MAX), Ok(0));
    for _ in 0..3 {
        bench.write(&bench.wqe());
        bench.next += 1;
    }
    bench.record(3);
    assert_eq!(bench.hca.look(u64::MAX), Ok(3));
    let next = Doorbell::Next {
        index: 3,
        qpn: qpn(QPN),
    };
    bench.queues.bell.store(0, next.encode()).expect("inside");
    assert_eq!(bench.hca.look(u64::MAX), Ok(0));
    let other = Doorbell::Next {
        index: 3,
        qpn: qpn(7),
    };
    bench.queues.bell.store(0, other.encode()).expect("inside");
    assert_eq!(
        bench.hca.look(u64::MAX),
        Err(Violation::QueuePair {
            wanted: QPN,
            found: 7
        })
    );
}

#[test]
fn a_record_behind_its_doorbell_is_found() {
    let mut bench = Bench::new(0);
    let wqe = bench.wqe();
    bench.write(&wqe);
    let bell = Doorbell::of(&wqe).expect("valid").encode();
    assert_eq!(
        bench.hca.ring(bell),
        Err(Violation::RecordBehind {
            doorbell: 1,
            record: 0
        })
    );
}

#[test]
fn a_doorbell_out_of_a_slot_that_was_taken_is_found() {
    let mut bench = Bench::new(0);
    let wqe = bench.wqe();
    bench.write(&wqe);
    bench.record(1);
    // The device is quick.
    assert_eq!(bench.hca.see_record(), Ok(1));
    let slot = bench.queues.sq.load(0).expect("inside");
    let found = bench.hca.ring(slot);
    assert!(
        matches!(found, Err(Violation::Doorbell { .. })),
        "{found:?}"
    );
    // Nor is one of another WQE taken.
    let mut other = wqe;
    other.operation = Operation::Nop;
    let bell = Doorbell::of(&other).expect("valid").encode();
    let found = bench.hca.ring(bell);
    assert!(
        matches!(found, Err(Violation::NotTheLast { .. })),
        "{found:?}"
    );
    assert_eq!(
        bench.hca.ring(Doorbell::of(&wqe).expect("valid").encode()),
        Ok(0)
    );
}

#[test]
fn what_was_not_written_is_found() {
    let mut bench = Bench::new(0);
    bench.record(1);
    let found = bench.hca.see_record();
    // A slot of zeros is a NOP without a size.
    let size = Mlx5Fault::Size { opcode: 0, ds: 0 };
    assert_eq!(found, Err(Violation::Wqe { n: 0, fault: size }));
    // After a lap, it is poison.
    let mut bench = Bench::new(0);
    for _ in 0..DEPTH {
        let wqe = bench.wqe();
        bench.post(&wqe).expect("good");
    }
    bench.record(bench.next + 1);
    let found = bench.hca.see_record();
    assert!(
        matches!(found, Err(Violation::Wqe { n: 4, .. })),
        "{found:?}"
    );
}

#[test]
fn wrong_numbers_and_queue_pairs_are_found() {
    let mut bench = Bench::new(0);
    let mut wqe = bench.wqe();
    wqe.index = 1;
    bench.write(&wqe);
    bench.record(1);
    let found = bench.hca.see_record();
    assert_eq!(found, Err(Violation::Number { n: 0, found: 1 }));
    let mut bench = Bench::new(0);
    let mut wqe = bench.wqe();
    wqe.qpn = qpn(5);
    bench.write(&wqe);
    bench.record(1);
    assert_eq!(
        bench.hca.see_record(),
        Err(Violation::QueuePair {
            wanted: QPN,
            found: 5
        })
    );
}

#[test]
fn a_record_that_goes_back_or_too_far_is_found() {
    for (record, consumed) in [(0, 1), (6, 1), (0xffff, 1)] {
        let mut bench = Bench::new(0);
        let wqe = bench.wqe();
        bench.post(&wqe).expect("good");
        bench.record(record);
        assert_eq!(
            bench.hca.see_record(),
            Err(Violation::RecordSpan {
                record: record as u16,
                consumed,
                depth: DEPTH
            })
        );
    }
    let mut bench = Bench::new(0);
    bench
        .queues
        .sq_record
        .store(0, [0, 0, 0, 0, 1, 0, 0, 0])
        .expect("inside");
    let found = bench.hca.see_record();
    assert!(matches!(found, Err(Violation::Record { .. })), "{found:?}");
}

#[test]
fn completions_that_are_not_given_back_are_missed() {
    let mut bench = Bench::new(0);
    for _ in 0..DEPTH {
        let wqe = bench.wqe();
        bench.post(&wqe).expect("good");
    }
    let wqe = bench.wqe();
    assert_eq!(
        bench.post(&wqe),
        Err(Violation::NoRoom {
            n: 4,
            taken: 0,
            depth: DEPTH
        })
    );
    let mut bench = Bench::new(0);
    bench.give_back(3);
    for _ in 0..DEPTH {
        let wqe = bench.wqe();
        bench.post(&wqe).expect("good");
    }
    // Given back before they were there; the device looks when it needs room.
    bench.give_back(5);
    let wqe = bench.wqe();
    assert_eq!(
        bench.post(&wqe),
        Err(Violation::Taken {
            taken: 5,
            written: 4
        })
    );
}

#[test]
fn bad_keys_fail_and_the_rest_is_flushed() {
    let far = |addr, rkey| RemoteSpan { addr, rkey };
    let near = |addr, len, lkey| Gather::One(Segment::new(addr, len, lkey).expect("a length"));
    let put = |remote, local| Operation::Write { remote, local };
    let get = |remote, local| Operation::Read { remote, local };
    let (local, remote) = (Syndrome::LOCAL_PROTECTION, Syndrome::REMOTE_ACCESS);
    for (operation, syndrome) in [
        (put(far(0x2000, 3), near(0x1000, 64, 9)), local),
        (put(far(0x2000, 3), near(0xfff, 64, 1)), local),
        (put(far(0x2000, 3), near(0x1fff, 2, 1)), local),
        (put(far(0x2000, 3), near(u64::MAX, 2, 1)), local),
        (put(far(0x2000, 9), near(0x1000, 64, 1)), remote),
        (put(far(0x2fff, 3), near(0x1000, 2, 1)), remote),
        (put(far(0x1fff, 3), near(0x1000, 2, 1)), remote),
        (put(far(0x9000, 4), near(0x1000, 2, 1)), remote),
        (get(far(0x9000, 4), near(0x8000, 2, 2)), local),
    ] {
        let mut bench = Bench::new(0);
        let good = bench.wqe();
        assert_eq!(bench.post(&good), Ok(1));
        for operation in [operation, good.operation] {
            let mut wqe = bench.wqe();
            wqe.operation = operation;
            // A failure is told of unasked.
            wqe.flags.signalled = false;
            assert_eq!(bench.post(&wqe), Ok(1));
        }
        let ends: Vec<_> = std::iter::from_fn(|| bench.poll())
            .map(|c| c.status)
            .collect();
        let failed = |syndrome| CqeStatus::Failed {
            syndrome,
            vendor: 0,
        };
        let wanted = [
            CqeStatus::Done { byte_count: 64 },
            failed(syndrome),
            failed(Syndrome::FLUSHED),
        ];
        assert_eq!(ends, wanted, "{operation:?}");
        assert_eq!(bench.hca.sink().0, [0]);
    }
    // What may be read or written is.
    let mut bench = Bench::new(0);
    for operation in [
        get(far(0x9000, 4), near(0x1fff, 1, 1)),
        put(far(0x2fff, 3), near(0x8000, 1, 2)),
        put(far(0, 77), Gather::Nothing),
    ] {
        let mut wqe = bench.wqe();
        wqe.operation = operation;
        assert_eq!(bench.post(&wqe), Ok(1));
        let status = bench.poll().map(|c| c.status);
        assert!(matches!(status, Some(CqeStatus::Done { .. })), "{status:?}");
    }
}

#[test]
fn memory_that_is_too_small_is_refused() {
    let mut bench = Bench::new(0);
    bench.queues.cq = Words::new(64);
    let setup = HcaSetup {
        qpn: qpn(QPN),
        sq_depth: SqDepth::new(DEPTH).expect("a power"),
        cq_depth: CqDepth::new(DEPTH).expect("a power"),
        first: 0,
        keys: KeyTable::default(),
    };
    let made = Hca::new(bench.queues, setup, Counted::default());
    let outside = OutsideQueue {
        offset: 248,
        len: 64,
    };
    assert_eq!(made.err(), Some(Violation::Memory(outside)));
}

impl Bench {
    /// A WQE that is under way until it is said to have ended.
    fn post_long(&mut self, signalled: bool) -> Result<u64, Violation> {
        let mut wqe = self.wqe();
        wqe.operation = Operation::Nop;
        wqe.flags.signalled = signalled;
        self.post(&wqe)
    }

    /// What completions there are: number and syndrome, 0 for a good one.
    fn polled(&mut self) -> Vec<(u16, u8)> {
        let all = std::iter::from_fn(|| self.poll());
        all.map(|cqe| match cqe.status {
            CqeStatus::Done { .. } => (cqe.counter, 0),
            CqeStatus::Failed { syndrome, .. } => (cqe.counter, syndrome.0),
        })
        .collect()
    }
}

#[test]
fn ends_in_any_order_are_told_in_order() {
    let mut bench = Bench::new(0xfffe);
    for signalled in [true, false, true] {
        assert_eq!(bench.post_long(signalled), Ok(1));
    }
    let short = bench.wqe();
    assert_eq!(bench.post(&short), Ok(1));
    assert_eq!(bench.polled(), []);
    assert_eq!(bench.hca.ended(), 0xfffe);
    assert_eq!(bench.hca.complete(0xffff, Ok(0)), Ok(true));
    assert_eq!(bench.hca.complete(0xffff, Ok(0)), Ok(false), "once");
    for n in [0, 0xfffd, 0x1_0001, 0x1_0002, u64::MAX] {
        let known = bench.hca.complete(n, Err(Syndrome::FLUSHED));
        assert_eq!(known, Ok(false), "{n:#x} is not under way");
    }
    assert_eq!(bench.polled(), []);
    assert_eq!(bench.hca.complete(0xfffe, Ok(0)), Ok(true));
    assert_eq!(bench.polled(), [(0xfffe, 0)], "the second asked for none");
    assert_eq!(bench.hca.ended(), 0x1_0000);
    assert_eq!(bench.hca.complete(0x1_0000, Ok(0)), Ok(true));
    assert_eq!(bench.polled(), [(0, 0), (1, 0)]);
    assert_eq!(bench.hca.ended(), bench.hca.consumed());
}

#[test]
fn what_has_not_been_told_to_have_ended_has_its_slot() {
    let mut bench = Bench::new(0);
    for _ in 0..DEPTH {
        assert_eq!(bench.post_long(true), Ok(1));
    }
    let over = bench.post_long(true);
    let wanted = Violation::RecordSpan {
        record: 5,
        consumed: 4,
        depth: DEPTH,
    };
    assert_eq!(over, Err(wanted));
}

#[test]
fn a_late_failure_flushes_what_is_behind_it_however_that_ends() {
    let mut bench = Bench::new(0);
    for _ in 0..3 {
        assert_eq!(bench.post_long(false), Ok(1));
    }
    let why = Syndrome::TRANSPORT_RETRY;
    // The last one first: one before it may still fail.
    assert_eq!(bench.hca.complete(2, Ok(0)), Ok(true));
    assert_eq!(bench.hca.complete(1, Err(why)), Ok(true));
    let after = bench.wqe();
    assert_eq!(bench.post(&after), Ok(1));
    assert_eq!(bench.polled(), []);
    assert_eq!(bench.hca.complete(0, Ok(0)), Ok(true));
    let flushed = Syndrome::FLUSHED.0;
    assert_eq!(bench.polled(), [(1, why.0), (2, flushed), (3, flushed)]);
    assert_eq!(bench.hca.sink().0, [0, 1, 2], "nothing is begun behind it");
    // The first failure in the order of the WQEs is told, not in that of time.
    let mut bench = Bench::new(0);
    for _ in 0..2 {
        assert_eq!(bench.post_long(false), Ok(1));
    }
    let rnr = Syndrome::RNR_RETRY;
    assert_eq!(bench.hca.complete(1, Err(why)), Ok(true));
    assert_eq!(bench.hca.complete(0, Err(rnr)), Ok(true));
    assert_eq!(bench.polled(), [(0, rnr.0), (1, flushed)]);
}

#[test]
fn a_queue_that_fails_ends_what_is_under_way_and_what_comes() {
    let (why, flushed) = (Syndrome::TRANSPORT_RETRY, Syndrome::FLUSHED.0);
    let mut bench = Bench::new(0);
    for _ in 0..3 {
        assert_eq!(bench.post_long(false), Ok(1));
    }
    assert_eq!(bench.hca.complete(1, Ok(0)), Ok(true));
    assert_eq!(bench.hca.fail(why), Ok(()));
    assert_eq!(bench.polled(), [(0, why.0), (1, flushed), (2, flushed)]);
    assert_eq!(
        bench.hca.fail(Syndrome::RNR_RETRY),
        Ok(()),
        "the first one stays"
    );
    let next = bench.wqe();
    assert_eq!(bench.post(&next), Ok(1));
    assert_eq!(bench.polled(), [(3, flushed)]);
    // With nothing under way the next one is told why.
    let mut bench = Bench::new(0);
    assert_eq!(bench.hca.fail(why), Ok(()));
    assert_eq!(bench.polled(), []);
    for wanted in [why.0, flushed] {
        let next = bench.wqe();
        assert_eq!(bench.post(&next), Ok(1));
        let found: Vec<_> = bench.polled().iter().map(|(_, s)| *s).collect();
        assert_eq!(found, [wanted]);
    }
    assert!(bench.hca.sink().0.is_empty());
}
