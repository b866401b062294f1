//! WQEs, to a model of an mlx5 device.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use kvxfer_hipmem::HostMemory;
use kvxfer_hipmem::kernels::queue::{
    ALL, DIRECT, EACH, GET, GPU_WQE, IDLE, LOCAL_PLACE, Move, POSTED, PUT, PUT_IMM, Queue,
    QueueState,
};
use kvxfer_hipmem::post::Status;
use kvxfer_verbs::mlx5::model::{
    Carried, Hca, HcaSetup, KeyTable, Queues, Region, Sink, Violation,
};
use kvxfer_verbs::mlx5::{
    CqDepth, Cqe, CqeStatus, Gather, Operation, Qpn, RemoteSpan, Segment, SendFlags, SendWqe,
    SqDepth, Syndrome,
};

use crate::ring::moves;
use crate::{Around, LONG, Memory, Noise, SHORT, ends, run, shipped};

const QPN: u32 = 0x00ab_cdef;

/// How often each move was carried out, by its number.
#[derive(Debug, Default)]
pub(crate) struct Counted(pub(crate) Vec<u32>);

impl Sink for Counted {
    fn execute(&mut self, _: u64, operation: &Operation) -> Result<Carried, Syndrome> {
        let (remote, local) = operation.sides().ok_or(Syndrome::LOCAL_QP_OPERATION)?;
        let Gather::One(one) = local else {
            return Err(Syndrome::LOCAL_QP_OPERATION);
        };
        let i = (one.addr() - 0x10_0000) / 64;
        // Both sides of one move, and its immediate.
        if remote.addr != 0x7000_0000_0000 + 64 * i {
            return Err(Syndrome::REMOTE_ACCESS);
        }
        match operation {
            Operation::WriteImm { imm, .. } if u64::from(*imm) != i => {
                return Err(Syndrome::LOCAL_QP_OPERATION);
            }
            _ => {}
        }
        let i = usize::try_from(i).map_err(|_| Syndrome::LOCAL_LENGTH)?;
        *self.0.get_mut(i).ok_or(Syndrome::LOCAL_LENGTH)? += 1;
        Ok(Carried::Done(one.len()))
    }
}

pub(crate) struct Bench<S = Counted> {
    pub(crate) hca: Hca<HostMemory, S>,
    pub(crate) around: Around,
    pub(crate) queue: Queue,
    pub(crate) sq: HostMemory,
    /// By which posters ring for each other.
    pub(crate) words: HostMemory,
    cq: HostMemory,
    pub(crate) report: HostMemory,
    pub(crate) record: HostMemory,
    bell: HostMemory,
    /// Of `GPU_WQE`: the doorbell behind the word.
    uar: HostMemory,
    _memory: Memory,
}

impl Bench {
    pub(crate) fn new(kind: u32, depth: u32, cq_depth: u32, first: u64, patience: u64) -> Self {
        let region = |addr| Region {
            addr,
            len: 64 * 200_000,
            writable: true,
        };
        let keys = KeyTable {
            local: [(1, region(0x10_0000))].into(),
            remote: [(2, region(0x7000_0000_0000))].into(),
        };
        let sink = Counted(vec![0; 200_000]);
        Self::with((kind, depth, cq_depth), first, patience, keys, sink)
    }
}

impl<S: Sink> Bench<S> {
    /// A queue whose device has these keys, and does this.
    pub(crate) fn with(
        (kind, depth, cq_depth): (u32, u32, u32),
        first: u64,
        patience: u64,
        keys: KeyTable,
        sink: S,
    ) -> Self {
        let mut memory = Memory::new();
        let around = Around::new(&mut memory, first);
        let report = memory.take(16);
        report.store_u64(0, first).expect("inside");
        let sq = memory.take(64 * u64::from(depth));
        let cq = memory.take(64 * u64::from(cq_depth));
        let words = memory.take(8 * u64::from(depth));
        for i in 0..u64::from(cq_depth) {
            cq.write(64 * i, &Cqe::unwritten()).expect("inside");
        }
        let [record, cq_record, bell, uar] = [8; 4].map(|len| memory.take(len));
        let [_, _, c, d] = (first as u32).to_be_bytes();
        record.write(4, &[0, 0, c, d]).expect("inside");
        let [_, b, c, d] = (first as u32).to_be_bytes();
        cq_record.write(0, &[0, b, c, d]).expect("inside");
        let queue = Queue {
            slots: sq.addr(),
            words: words.addr(),
            state: around.state.addr(),
            report: report.addr(),
            abort: around.abort.addr(),
            patience,
            completions: cq.addr(),
            record: record.addr() + 4,
            cq_record: cq_record.addr(),
            bell: bell.addr(),
            kind,
            depth,
            cq_depth,
            qpn: QPN,
            ..Queue::default()
        };
        let setup = HcaSetup {
            qpn: Qpn::new(QPN).expect("24 bits"),
            sq_depth: SqDepth::new(depth).expect("a power"),
            cq_depth: CqDepth::new(cq_depth).expect("a power"),
            first,
            keys,
        };
        let queues = Queues {
            sq: sq.clone(),
            sq_record: record.clone(),
            cq: cq.clone(),
            cq_record,
            bell: if kind == GPU_WQE { &uar } else { &bell }.clone(),
        };
        Self {
            hca: Hca::new(queues, setup, sink).expect("large enough"),
            around,
            queue,
            sq,
            words,
            cq,
            report,
            record,
            bell,
            uar,
            _memory: memory,
        }
    }
}

/// The WQE of a put.
pub(crate) fn put(n: u64, of: &Move) -> [u8; 64] {
    let len = u32::try_from(of.len).expect("short");
    let wqe = SendWqe {
        index: n as u16,
        qpn: Qpn::new(QPN).expect("24 bits"),
        flags: SendFlags {
            signalled: true,
            ..SendFlags::default()
        },
        operation: Operation::Write {
            remote: RemoteSpan {
                addr: of.remote,
                rkey: of.rkey,
            },
            local: Gather::One(Segment::new(of.local, len, of.lkey).expect("a length")),
        },
    };
    wqe.encode().expect("valid")
}

/// Posters, and a device that looks when it comes to it.
fn traffic(kind: u32, depth: u32, first: u64, posters: u32, each: usize, op: u32, until: u32) {
    let bench = Bench::new(kind, depth, 2 * depth, first, LONG);
    let moves = moves(each * posters as usize);
    let over = AtomicBool::new(false);
    let (bell, uar) = (bench.bell, bench.uar);
    let hca = Mutex::new(bench.hca);
    let results = thread::scope(|scope| {
        let device = scope.spawn(|| {
            let _end = bench.around.end_with_me();
            let mut hca = hca.lock().expect("nobody panicked");
            let mut noise = Noise(first | 1);
            while !over.load(Ordering::Acquire) {
                let seen = hca
                    .look(u64::MAX)
                    .unwrap_or_else(|e: Violation| panic!("{e}"));
                // A delay now and then.
                if seen == 0 || noise.below(100) == 0 {
                    thread::yield_now();
                }
            }
            hca.look(u64::MAX).unwrap_or_else(|e| panic!("{e}"));
        });
        // The CPU that rings for the device.
        let relay = (kind == GPU_WQE).then(|| {
            scope.spawn(|| {
                let mut last = bell.load_u64(0).expect("inside");
                while !over.load(Ordering::Acquire) {
                    let word = bell.load_u64(0).expect("inside");
                    if word != last {
                        uar.store_u64(0, word).expect("inside");
                        last = word;
                    }
                    thread::yield_now();
                }
            })
        });
        let results = run(&shipped, bench.queue, &moves, posters, op, until);
        over.store(true, Ordering::Release);
        device.join().expect("no rule was broken");
        if let Some(relay) = relay {
            relay.join().expect("it copied");
        }
        results
    });
    for (posted, ended) in ends(&results) {
        assert_eq!((posted, ended), (Status::Ok, Status::Ok));
    }
    let hca = hca.into_inner().expect("nobody panicked");
    assert_eq!(hca.consumed(), first + moves.len() as u64);
    let (done, beyond) = hca.sink().0.split_at(moves.len());
    assert!(done.iter().all(|n| *n == 1), "each once");
    assert!(beyond.iter().all(|n| *n == 0));
}

#[test]
fn a_hundred_thousand_wqes_of_four_posters() {
    traffic(DIRECT, 64, 0, 4, 25_000, PUT, ALL);
}

#[test]
fn wqes_that_the_cpu_rings_for() {
    traffic(GPU_WQE, 64, 0, 3, 3000, PUT_IMM, ALL);
    traffic(GPU_WQE, 4, 0, 2, 300, GET, EACH);
}

#[test]
fn posters_that_wait_for_each_or_for_quiet() {
    traffic(DIRECT, 8, 3, 3, 500, GET, EACH);
    traffic(DIRECT, 1, 0, 2, 100, PUT_IMM, EACH);
    traffic(DIRECT, 16, 1, 2, 2000, PUT, IDLE);
}

#[test]
fn numbers_go_over_16_24_and_32_bits() {
    for first in [0xff00, 0xff_ff00, 0xffff_ff00] {
        traffic(DIRECT, 16, first, 2, 300, PUT, EACH);
    }
    traffic(DIRECT, 1 << 10, 0xf000, 2, 5000, PUT, ALL);
}

#[test]
fn wqes_are_the_bytes_that_verbs_encodes() {
    let remote = RemoteSpan {
        addr: 0x0102_0304_0506_0708,
        rkey: 0x1122_3344,
    };
    let of = |len: u32| Move {
        local: 0xf1f2_f3f4_f5f6_f7f8,
        remote: remote.addr,
        len: len.into(),
        lkey: 0xa1a2_a3a4,
        rkey: remote.rkey,
        imm: 0xdead_beef,
        flags: 0,
    };
    for (op, len) in [
        (PUT, 4096),
        (PUT, 0),
        (PUT, 0x7fff_ffff),
        (GET, 1),
        (PUT_IMM, 64),
        (PUT_IMM, 0),
    ] {
        let first = 0x1_0003;
        let bench = Bench::new(DIRECT, 4, 4, first, LONG);
        bench.sq.fill(0, 256, 0).expect("inside");
        let results = run(&shipped, bench.queue, &[of(len)], 1, op, POSTED);
        assert_eq!(ends(&results)[0].0, Status::Ok);
        let local = match len {
            0 => Gather::Nothing,
            _ => Gather::One(Segment::new(of(len).local, len, of(len).lkey).expect("a length")),
        };
        let imm = of(len).imm;
        let wqe = SendWqe {
            index: 3,
            qpn: Qpn::new(QPN).expect("24 bits"),
            flags: SendFlags {
                signalled: true,
                ..SendFlags::default()
            },
            operation: match op {
                PUT => Operation::Write { remote, local },
                GET => Operation::Read { remote, local },
                _ => Operation::WriteImm { remote, local, imm },
            },
        };
        let mut found = [0; 64];
        bench.sq.read(64 * 3, &mut found).expect("inside");
        // What lies behind the last unit is nobody's.
        let used = 16 * usize::from(wqe.ds());
        assert_eq!(
            found[..used],
            wqe.encode().expect("valid")[..used],
            "{op} {len}"
        );
        assert_eq!(SendWqe::decode(&found), Ok(wqe));
        let mut bell = [0; 8];
        bench.bell.read(0, &mut bell).expect("inside");
        assert_eq!(bell, found[..8]);
        let mut record = [0; 8];
        bench.record.read(0, &mut record).expect("inside");
        assert_eq!(record, [0, 0, 0, 0, 0, 0, 0, 4]);
    }
}

#[test]
fn what_the_device_cannot_do_is_refused_before_a_ticket_is_taken() {
    let bench = Bench::new(DIRECT, 4, 4, 0, SHORT);
    let mut all = moves(2);
    all[0].len = 1 << 31;
    all[1].flags = LOCAL_PLACE;
    let results = run(&shipped, bench.queue, &all, 1, PUT, POSTED);
    let posted: Vec<_> = ends(&results).iter().map(|(posted, _)| *posted).collect();
    assert_eq!(posted, [Status::BadLength, Status::BadOp]);
    assert_eq!(bench.around.state.load_u64(0).expect("inside"), 0);
    for (depth, cq_depth) in [(3, 4), (4, 3), (4, 2), (0, 4), (4, 0), (1 << 16, 1 << 16)] {
        let queue = Queue {
            depth,
            cq_depth,
            ..bench.queue
        };
        let results = run(&shipped, queue, &moves(1), 1, PUT, EACH);
        assert_eq!(ends(&results)[0].0, Status::BadQueue, "{depth} {cq_depth}");
    }
    let queue = Queue {
        words: 0,
        ..bench.queue
    };
    let results = run(&shipped, queue, &moves(1), 1, PUT, EACH);
    assert_eq!(ends(&results)[0].0, Status::BadQueue, "no words");
}

#[test]
fn bad_keys_and_ranges_reach_who_waits() {
    for (change, wanted) in [
        ((|m| m.lkey = 9) as fn(&mut Move), Status::BadKey),
        (|m| m.rkey = 9, Status::BadRange),
        (|m| m.remote = 1, Status::BadRange),
        (|m| m.local = 1, Status::BadKey),
    ] {
        let mut bench = Bench::new(DIRECT, 4, 8, 0, LONG);
        let mut all = moves(4);
        change(&mut all[1]);
        let queue = bench.queue;
        // They all fit, so that each is posted.
        let results = run(&shipped, queue, &all, 1, PUT, POSTED);
        assert!(
            ends(&results)
                .iter()
                .all(|(posted, _)| *posted == Status::Ok)
        );
        assert_eq!(bench.hca.look(u64::MAX), Ok(4));
        // A post that has to look finds out, and so does quiet.
        let results = run(&shipped, queue, &moves(1), 1, PUT, IDLE);
        assert_eq!(ends(&results), [(Status::Broken, wanted)]);
        assert_eq!(bench.hca.sink().0[..4], [1, 0, 0, 0]);
    }
    // Who waits for each: its own end, and those behind it flushed.
    let bench = Bench::new(DIRECT, 4, 8, 0, LONG);
    let mut all = moves(4);
    all[1].rkey = 9;
    let over = AtomicBool::new(false);
    let mut hca = bench.hca;
    let results = thread::scope(|scope| {
        let device = scope.spawn(|| {
            let _end = bench.around.end_with_me();
            while !over.load(Ordering::Acquire) {
                hca.look(u64::MAX).unwrap_or_else(|e| panic!("{e}"));
                thread::yield_now();
            }
        });
        let results = run(&shipped, bench.queue, &all, 1, PUT, ALL);
        over.store(true, Ordering::Release);
        device.join().expect("no rule was broken");
        results
    });
    let found = ends(&results);
    assert_eq!(found[0], (Status::Ok, Status::Ok));
    assert_eq!(found[1], (Status::Ok, Status::BadRange));
    for (posted, ended) in &found[2..] {
        // By how quick the device was.
        let one = (Status::Ok, Status::Flushed);
        let other = (Status::Broken, Status::Broken);
        assert!(
            [one, other].contains(&(*posted, *ended)),
            "{posted:?} {ended:?}"
        );
    }
}

#[test]
fn a_device_that_does_nothing_is_told_within_the_patience() {
    let mut bench = Bench::new(DIRECT, 2, 2, 0, SHORT);
    let results = run(&shipped, bench.queue, &moves(3), 1, PUT, POSTED);
    let posted: Vec<_> = ends(&results).iter().map(|(posted, _)| *posted).collect();
    assert_eq!(posted, [Status::Ok, Status::Ok, Status::Timeout]);
    let results = run(&shipped, bench.queue, &[], 1, PUT, IDLE);
    assert!(results.is_empty());
    // It may come back: nothing is lost, and there is room again.
    assert_eq!(bench.hca.look(u64::MAX), Ok(2));
    let results = run(&shipped, bench.queue, &moves(1), 1, PUT, EACH);
    assert_eq!(ends(&results), [(Status::Ok, Status::Timeout)]);
}

#[test]
fn a_kernel_killed_before_it_rang_ends_the_queue() {
    let bench = Bench::new(DIRECT, 8, 8, 0, SHORT);
    bench.around.lose_a_ticket();
    // Its turn never comes; who comes after it does not wait for that.
    for status in [Status::Timeout, Status::Broken] {
        let results = run(&shipped, bench.queue, &moves(1), 1, PUT, POSTED);
        assert_eq!(ends(&results), [(status, status)]);
    }
    // Nor has who comes late anything of it to ring for.
    let mut words = [0; 64];
    bench.words.read(0, &mut words).expect("inside");
    assert_eq!(words, [0; 64]);
    let mut bench = bench;
    assert_eq!(
        bench.hca.look(u64::MAX),
        Ok(0),
        "the device was told of nothing"
    );
}

#[test]
fn who_comes_late_does_not_ring_for_who_gave_up() {
    let mut bench = Bench::new(DIRECT, 8, 8, 0, SHORT);
    let all = moves(2);
    bench.around.lose_a_ticket();
    let results = run(&shipped, bench.queue, &all[..1], 1, PUT, POSTED);
    assert_eq!(ends(&results)[0].0, Status::Timeout);
    // The one before it goes on where it was: it has the first number, and it is its turn.
    let state = &bench.around.state;
    state.store_u64(0, 0).expect("inside");
    state.store_u64(16, 0).expect("inside");
    let results = run(&shipped, bench.queue, &all[1..], 1, PUT, POSTED);
    assert_eq!(ends(&results)[0].0, Status::Ok);
    assert_eq!(bench.hca.look(u64::MAX), Ok(1));
    assert_eq!(bench.hca.sink().0[..2], [0, 1]);
}

/// Who gives up its turn has failed first, and who was before it fails yet.
#[test]
fn what_fails_after_who_gave_up_behind_it_is_no_success() {
    let mut bench = Bench::new(DIRECT, 8, 8, 0, SHORT);
    let mut all = moves(3);
    all[0].rkey = 9;
    let before = run(&shipped, bench.queue, &all[..2], 1, PUT, POSTED);
    assert!(
        ends(&before)
            .iter()
            .all(|(posted, _)| *posted == Status::Ok)
    );
    bench.around.lose_a_ticket();
    let results = run(&shipped, bench.queue, &all[2..], 1, PUT, POSTED);
    assert_eq!(ends(&results)[0].0, Status::Timeout);
    assert_eq!(bench.hca.look(u64::MAX), Ok(2));
    run(&shipped, bench.queue, &all[2..], 1, PUT, IDLE);
    // The fault is the first one's: a wait for it, and for the one behind it, says so.
    let fault = bench.report.load_u64(8).expect("inside");
    let wanted = u64::from(Status::BadRange.number());
    assert_eq!((fault >> 8, fault & 0xff), (1, wanted));
}

#[test]
fn an_abort_ends_what_waits() {
    let bench = Bench::new(DIRECT, 2, 2, 0, LONG);
    bench.around.set_abort();
    for until in [EACH, IDLE] {
        let results = run(&shipped, bench.queue, &moves(1), 1, PUT, until);
        assert_eq!(ends(&results), [(Status::Ok, Status::Stopped)]);
    }
    let results = run(&shipped, bench.queue, &moves(1), 1, PUT, POSTED);
    assert_eq!(ends(&results)[0].0, Status::Stopped);
}

#[test]
fn completions_that_make_no_sense_end_the_queue() {
    let depth = CqDepth::new(8).expect("a power");
    let good = Cqe {
        qpn: Qpn::new(QPN).expect("24 bits"),
        opcode: 8,
        counter: 0,
        status: CqeStatus::Done { byte_count: 64 },
    };
    let of = |counter| Cqe { counter, ..good }.encode(0, depth);
    let mut other = of(0);
    // A receive's.
    other[63] = 2 << 4;
    // One WQE is under way, with the number 3: neither what is before it nor behind it has ended.
    for (block, wanted) in [
        (of(3), Status::Ok),
        (of(2), Status::Malformed),
        (of(5), Status::Malformed),
        (of(0x8003), Status::Malformed),
        (other, Status::Malformed),
    ] {
        let bench = Bench::new(DIRECT, 4, 8, 0, SHORT);
        let state = QueueState::starting_at(3).bytes();
        bench.around.state.write(0, &state).expect("inside");
        bench.around.state.store_u64(32, 0).expect("inside");
        bench.report.store_u64(0, 3).expect("inside");
        let results = run(&shipped, bench.queue, &moves(1), 1, PUT, POSTED);
        assert_eq!(ends(&results)[0].0, Status::Ok);
        bench.cq.write(0, &block).expect("inside");
        let results = run(&shipped, bench.queue, &moves(1), 1, PUT, IDLE);
        let (_, ended) = ends(&results)[0];
        // A good one leaves the second post under way, of which nobody tells.
        let told = if wanted == Status::Ok {
            Status::Timeout
        } else {
            wanted
        };
        assert_eq!(ended, told, "{block:x?}");
    }
}
