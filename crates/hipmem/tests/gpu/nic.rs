//! Queues that somebody else has made, as a NIC's library does: laid out in memory of the host, registered with the
//! GPU's runtime where they lie, and posted to by kernels. What reads them is the model of an mlx5 device, and the doorbell
//! is ordinary memory: no NIC takes part.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer_hipmem::gpu::{GpuFault, GpuMemory, PinnedMemory, Stream};
use kvxfer_hipmem::kernels::queue::{ALL, EACH, GET, IDLE, Move, PUT, PUT_IMM, PostResult};
use kvxfer_hipmem::post::Status;
use kvxfer_hipmem::post::device::{
    NicFault, NicQueues, PostBy, PostFailed, PostKernels, PosterReport, Posts, WqeQueue,
};
use kvxfer_hipmem::{Error, HostArena, HostMemory};
use kvxfer_verbs::mlx5::model::{Carried, Hca, HcaSetup, KeyTable, Queues, Region, Sink};
use kvxfer_verbs::mlx5::{CqDepth, Cqe, Gather, Operation, Qpn, SqDepth, Syndrome};
use kvxfer_verbs::{FdSpan, Memory, MemoryKind};

use crate::{Outcome, fault, gpu, on_host, soon};

const QPN: u32 = 0x0012_3456;
const LKEY: u32 = 0x101;
const RKEY: u32 = 0x202;
/// Where moves begin on both sides; nothing is there, for nothing is moved.
const LOCAL: u64 = 0x10_0000;
const REMOTE: u64 = 0x7000_0000_0000;
const LONG: Duration = Duration::from_secs(20);

/// Memory in which queues lie as libmlx5 lays them out: slots and completions in pages of their own, the records of all
/// queues in one page, and the doorbells in another.
pub(crate) struct Library {
    arena: HostArena,
}

/// A queue, new, and where a device finds it.
pub(crate) struct Made {
    pub(crate) nic: NicQueues,
    pub(crate) device: Queues<HostMemory>,
}

impl Library {
    pub(crate) fn new() -> Result<Self, Error> {
        let arena = HostArena::new(1 << 20)?;
        Ok(Self { arena })
    }

    fn part(&self, at: u64, len: u64) -> Result<HostMemory, Error> {
        self.arena.memory().slice(at, len)
    }

    fn token(&self, at: u64, len: u64) -> Arc<dyn Memory> {
        self.part(at, len).expect("inside").as_memory()
    }

    /// Queue `n`, of the lowest depths that a page has room for. `owner` is what a completion's owner bit is left at.
    pub(crate) fn queue(
        &self,
        n: u64,
        (sq, cq): (u32, u32),
        owner: u8,
    ) -> Result<Made, Box<dyn std::error::Error>> {
        let (sq_depth, cq_depth) = (SqDepth::new(sq)?, CqDepth::new(cq)?);
        let own = 0x1_0000 * (n + 1);
        // Behind a receive queue.
        let slots = self.part(own + 0x400, sq_depth.bytes())?;
        slots.fill(0, slots.len(), 0xc3)?;
        let completions = self.part(own + 0x8000, cq_depth.bytes())?;
        completions.fill(0, completions.len(), 0x5a)?;
        let [.., last] = Cqe::unwritten();
        for i in 0..u64::from(cq) {
            completions.write(cq_depth.offset(i) + 63, &[last | owner])?;
        }
        let (record, cq_record) = (self.part(128 * n, 8)?, self.part(128 * n + 64, 8)?);
        // Receives were posted, and the completion queue was armed.
        record.write(0, &[0, 0, 0, 9, 0, 0, 0, 0])?;
        cq_record.write(0, &[0, 0, 0, 0, 0x10, 0, 0, 0])?;
        let bell = self.part(0x1800 + 0x100 * n, 8)?;
        bell.store_u64(0, 0)?;
        let device = Queues {
            sq: slots,
            sq_record: record,
            cq: completions,
            cq_record,
            bell,
        };
        let nic = NicQueues {
            qpn: Qpn::new(QPN)?,
            sq_depth,
            cq_depth,
            memory: Queues {
                sq: device.sq.as_memory(),
                sq_record: device.sq_record.as_memory(),
                cq: device.cq.as_memory(),
                cq_record: device.cq_record.as_memory(),
                bell: device.bell.as_memory(),
            },
        };
        Ok(Made { nic, device })
    }
}

fn moves(n: u32) -> Vec<Move> {
    let one = |i: u32| Move {
        local: LOCAL + 64 * u64::from(i),
        remote: REMOTE + 64 * u64::from(i),
        len: 64,
        lkey: LKEY,
        rkey: RKEY,
        imm: i,
        flags: 0,
    };
    (0..n).map(one).collect()
}

/// How often each move was carried out.
#[derive(Debug)]
struct Counted(Vec<u32>);

impl Sink for Counted {
    fn execute(&mut self, _: u64, operation: &Operation) -> Result<Carried, Syndrome> {
        let Some((remote, Gather::One(one))) = operation.sides() else {
            return Err(Syndrome::LOCAL_QP_OPERATION);
        };
        if remote.addr - REMOTE != one.addr() - LOCAL {
            return Err(Syndrome::REMOTE_ACCESS);
        }
        let seen = self.0.get_mut(((one.addr() - LOCAL) / 64) as usize);
        *seen.ok_or(Syndrome::LOCAL_LENGTH)? += 1;
        Ok(Carried::Done(one.len()))
    }
}

/// The model as the device of a queue.
struct Device {
    hca: Hca<HostMemory, Counted>,
    queues: Queues<HostMemory>,
}

impl Device {
    fn new(made: &Made, moves: u32) -> Result<Self, Box<dyn std::error::Error>> {
        let region = |addr| Region {
            addr,
            len: 64 * u64::from(moves),
            writable: true,
        };
        let setup = HcaSetup {
            qpn: made.nic.qpn,
            sq_depth: made.nic.sq_depth,
            cq_depth: made.nic.cq_depth,
            first: 0,
            keys: KeyTable {
                local: [(LKEY, region(LOCAL))].into(),
                remote: [(RKEY, region(REMOTE))].into(),
            },
        };
        let counted = Counted(vec![0; moves as usize]);
        let queues = made.device.clone();
        Ok(Self {
            hca: Hca::new(queues.clone(), setup, counted)?,
            queues,
        })
    }

    /// Posts all of them by a kernel, while the device looks.
    fn run(
        &mut self,
        kernels: &PostKernels,
        queue: &Arc<WqeQueue>,
        posts: &Posts<'_>,
    ) -> Result<Vec<PostResult>, Box<dyn std::error::Error>> {
        let stream = Stream::new(queue.gpu())?;
        let posting = kernels.post(&stream, queue, posts)?;
        let deadline = Instant::now() + Duration::from_secs(60);
        while !posting.is_done()? {
            assert!(Instant::now() < deadline, "the kernel does not end");
            self.hca.look(u64::MAX)?;
        }
        let results = posting.wait(soon())?;
        self.hca.look(u64::MAX)?;
        Ok(results)
    }

    /// Both records: what was posted, and completions that were given back.
    fn records(&self) -> Result<([u8; 8], [u8; 8]), Error> {
        let (mut record, mut cq_record) = ([0; 8], [0; 8]);
        self.queues.sq_record.read(0, &mut record)?;
        self.queues.cq_record.read(0, &mut cq_record)?;
        Ok((record, cq_record))
    }
}

#[test]
fn kernels_post_to_queues_that_somebody_else_has_made() -> Outcome {
    let gpu = gpu();
    let kernels = PostKernels::load(&gpu)?;
    let library = Library::new()?;
    for (n, by) in (0..).zip([PostBy::Threads, PostBy::Waves, PostBy::Blocks]) {
        for (depths, owner, posters, count, op, until) in [
            ((64, 128), 0, 70, 20, PUT, ALL),
            ((8, 8), 1, 12, 10, GET, EACH),
            ((16, 64), 1, 20, 10, PUT_IMM, IDLE),
            ((1, 1), 0, 5, 3, PUT, EACH),
        ] {
            let made = library.queue(n, depths, owner)?;
            let all = posters * count;
            let mut device = Device::new(&made, all)?;
            let queue = Arc::new(WqeQueue::of_nic(&gpu, &made.nic, LONG, None)?);
            let handle = queue.handle();
            assert_eq!(
                (handle.depth, handle.cq_depth, handle.qpn),
                (depths.0, depths.1, QPN)
            );
            assert!(queue.slots().is_none());
            let moves = moves(all);
            let posts = Posts {
                moves: &moves,
                posters,
                by,
                op,
                until,
            };
            let results = device.run(&kernels, &queue, &posts)?;
            let ok = Status::Ok.number();
            let well = results.iter().all(|r| (r.posted, r.ended) == (ok, ok));
            assert!(well, "{by:?}: {results:?}");
            let each_once = device.hca.sink().0.iter().all(|times| *times == 1);
            assert!(each_once, "{by:?}");
            // The words that are not the kernels' are as they were.
            let [.., high, low] = all.to_be_bytes();
            let (record, cq_record) = device.records()?;
            assert_eq!(record, [0, 0, 0, 9, 0, 0, high, low]);
            assert_eq!(cq_record, [0, 0, high, low, 0x10, 0, 0, 0]);
            let ends = queue.left(soon())?;
            let wanted = PosterReport {
                posted: all.into(),
                ended: all.into(),
                failed: None,
            };
            assert_eq!((ends, ends.all_well()), (wanted, true));
        }
    }
    Ok(())
}

#[test]
fn what_the_device_refuses_reaches_the_kernel() -> Outcome {
    let gpu = gpu();
    let kernels = PostKernels::load(&gpu)?;
    let library = Library::new()?;
    let bad = |change: fn(&mut Move)| {
        let mut moves = moves(4);
        change(&mut moves[2]);
        moves
    };
    for (moves, wanted) in [
        (bad(|m| m.lkey = 7), Status::BadKey),
        (bad(|m| m.rkey = 7), Status::BadRange),
        (bad(|m| m.remote += 64 * 4), Status::BadRange),
    ] {
        let made = library.queue(0, (8, 8), 0)?;
        let mut device = Device::new(&made, 4)?;
        let queue = Arc::new(WqeQueue::of_nic(&gpu, &made.nic, LONG, None)?);
        let posts = Posts {
            moves: &moves,
            posters: 1,
            by: PostBy::Waves,
            op: PUT,
            until: EACH,
        };
        let results = device.run(&kernels, &queue, &posts)?;
        let ended: Vec<_> = results.iter().map(|r| r.ended).collect();
        let ok = Status::Ok.number();
        let behind = Status::Broken.number();
        assert_eq!(ended, [ok, ok, wanted.number(), behind], "{results:?}");
        let ends = queue.left(soon())?;
        let (number, status) = (2, wanted);
        let failed = PostFailed { number, status };
        assert_eq!((ends.posted, ends.ended, ends.failed), (3, 3, Some(failed)));
        assert!(!ends.all_well());
    }
    // A device that never looks.
    let made = library.queue(0, (4, 4), 0)?;
    let short = Duration::from_millis(50);
    let queue = Arc::new(WqeQueue::of_nic(&gpu, &made.nic, short, None)?);
    let posts = Posts {
        moves: &moves(6),
        posters: 1,
        by: PostBy::Threads,
        op: PUT,
        until: IDLE,
    };
    let results = kernels.post(&Stream::new(&gpu)?, &queue, &posts)?;
    let results = results.wait(soon())?;
    let posted: Vec<_> = results.iter().map(|r| r.posted).collect();
    assert_eq!(posted, [0, 0, 0, 0, 1, 1], "full");
    let ends = queue.left(soon())?;
    assert_eq!((ends.posted, ends.ended, ends.all_well()), (4, 0, false));
    Ok(())
}

/// Memory of another kind than it is.
#[derive(Debug)]
struct Said(HostMemory, MemoryKind);

// SAFETY: it is memory that the handle keeps; where it says that it is a device's, nobody goes to it as a pointer.
unsafe impl Memory for Said {
    fn addr(&self) -> u64 {
        self.0.addr()
    }
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn kind(&self) -> MemoryKind {
        self.1
    }
    fn fd(&self) -> Option<FdSpan<'_>> {
        None
    }
}

/// What is wrong with a queue.
fn wrong(nic: &NicQueues) -> NicFault {
    match WqeQueue::of_nic(&gpu(), nic, LONG, None) {
        Err(Error::Nic(fault)) => fault,
        other => panic!("{other:?}"),
    }
}

type Change = fn(&mut NicQueues, &Library);

#[test]
fn queues_that_kernels_could_not_post_to_are_refused_by_their_part() -> Outcome {
    let library = Library::new()?;
    let cases: [(Change, &str, (u64, u64)); 6] = [
        (
            |n, l| n.memory.sq = l.token(0x1_0400, 64 * 15),
            "send queue",
            (64 * 15, 64 * 16),
        ),
        (
            |n, l| n.memory.sq = l.token(0x1_0420, 64 * 16),
            "send queue",
            (64 * 16, 64 * 16),
        ),
        (
            |n, l| n.memory.sq_record = l.token(0, 4),
            "send queue's doorbell record",
            (4, 8),
        ),
        (
            |n, l| n.memory.cq = l.token(0x1_8000, 64 * 31),
            "completion queue",
            (64 * 31, 64 * 32),
        ),
        (
            |n, l| n.memory.cq_record = l.token(68, 8),
            "completion queue's doorbell record",
            (8, 8),
        ),
        (
            |n, l| n.memory.bell = l.token(0x1804, 8),
            "doorbell",
            (8, 8),
        ),
    ];
    for (change, wanted, sizes) in cases {
        let mut made = library.queue(0, (16, 32), 0)?;
        change(&mut made.nic, &library);
        let found = wrong(&made.nic);
        let NicFault::Span {
            part,
            len,
            wanted: must,
            ..
        } = found
        else {
            panic!("{found}");
        };
        assert_eq!((part, (len, must)), (wanted, sizes));
    }
    // Memory that is not the host's, or is said not to be.
    let made = library.queue(0, (16, 32), 0)?;
    let device = GpuMemory::new(&gpu(), 4096)?.as_memory();
    let registers = Arc::new(Said(made.device.cq_record.clone(), MemoryKind::Registers));
    for (change, wanted) in [
        (
            (|n, m| n.memory.sq = m) as fn(&mut NicQueues, _),
            "send queue",
        ),
        (|n, m| n.memory.bell = m, "doorbell"),
    ] {
        let mut nic = made.nic.clone();
        change(&mut nic, Arc::clone(&device));
        let found = wrong(&nic);
        let NicFault::Kind { part, kind } = found else {
            panic!("{found}");
        };
        assert_eq!((part, kind), (wanted, device.kind()));
    }
    let mut nic = made.nic.clone();
    nic.memory.cq_record = registers;
    let found = wrong(&nic);
    assert!(
        matches!(
            found,
            NicFault::Kind {
                kind: MemoryKind::Registers,
                ..
            }
        ),
        "{found}"
    );
    // Fewer completions than slots.
    let nic = library.queue(0, (16, 8), 0)?.nic;
    let refused = WqeQueue::of_nic(&gpu(), &nic, LONG, None);
    assert!(
        matches!(refused, Err(Error::Depth { depth: 8 })),
        "{refused:?}"
    );
    Ok(())
}

#[test]
fn a_queue_that_is_not_new_is_refused() -> Outcome {
    let library = Library::new()?;
    type Used = fn(&Queues<HostMemory>) -> Result<(), Error>;
    let cases: [(Used, &str, u64); 4] = [
        (
            |q| q.sq_record.write(7, &[1]),
            "send queue's doorbell record",
            1,
        ),
        (
            |q| q.cq_record.write(2, &[1]),
            "completion queue's doorbell record",
            0x100,
        ),
        // A completion of the first lap, and one that failed in another.
        (|q| q.cq.write(64 * 31 + 63, &[0]), "completion queue", 0),
        (|q| q.cq.write(63, &[0xd1]), "completion queue", 0xd1),
    ];
    for (change, wanted, value) in cases {
        let made = library.queue(0, (16, 32), 0)?;
        change(&made.device)?;
        let found = wrong(&made.nic);
        let NicFault::Used { part, found, .. } = found else {
            panic!("{found}");
        };
        assert_eq!((part, found), (wanted, value));
    }
    Ok(())
}

#[test]
fn queues_share_the_pages_of_their_records_and_doorbells() -> Outcome {
    let gpu = gpu();
    let kernels = PostKernels::load(&gpu)?;
    let library = Library::new()?;
    let shared = library.part(0, 4096)?;
    let make = |n| -> Result<_, Box<dyn std::error::Error>> {
        let made = library.queue(n, (16, 32), 0)?;
        let queue = Arc::new(WqeQueue::of_nic(&gpu, &made.nic, LONG, None)?);
        Ok((Device::new(&made, 100)?, queue))
    };
    let moves = moves(100);
    let posts = Posts {
        moves: &moves,
        posters: 4,
        by: PostBy::Waves,
        op: PUT,
        until: ALL,
    };
    let mut queues = vec![make(0)?, make(1)?, make(2)?];
    // The second goes first, and the last one still finds the pages.
    for gone in [1, 0, 0] {
        for (device, queue) in &mut queues {
            let results = device.run(&kernels, queue, &posts)?;
            let ok = Status::Ok.number();
            assert!(
                results.iter().all(|r| (r.posted, r.ended) == (ok, ok)),
                "{results:?}"
            );
        }
        let again = fault(PinnedMemory::register(&gpu, &shared));
        assert!(
            again.to_string().contains("pinned this memory already"),
            "{again}"
        );
        queues.remove(gone);
    }
    drop(PinnedMemory::register(&gpu, &shared)?);
    Ok(())
}

#[test]
fn pages_that_somebody_else_has_pinned_are_told_apart() -> Outcome {
    let gpu = gpu();
    let library = Library::new()?;
    let made = library.queue(0, (16, 32), 0)?;
    for (held, wanted) in [
        (&made.device.cq, "completion queue"),
        (&made.device.sq, "send queue"),
        (&made.device.bell, "doorbell"),
    ] {
        let pinned = PinnedMemory::register(&gpu, held)?;
        let found = fault(WqeQueue::of_nic(&gpu, &made.nic, LONG, None));
        let GpuFault::ForeignAlready { part, addr, .. } = &found else {
            panic!("{found}");
        };
        assert_eq!((*part, *addr), (wanted, held.addr()));
        drop(pinned);
        // Nothing of it is left: all can be pinned.
        let of = &made.device;
        let all = [&of.sq, &of.sq_record, &of.cq, &of.cq_record, &of.bell].map(Clone::clone);
        drop(PinnedMemory::register_all(&gpu, &all)?);
        drop(WqeQueue::of_nic(&gpu, &made.nic, LONG, None)?);
    }
    Ok(())
}

/// What a driver says of ordinary memory that is mapped as registers is not written anywhere: it takes it, or refuses
/// it by a typed error that leaves nothing behind.
#[test]
fn ordinary_memory_as_registers_is_taken_or_refused_and_not_kept() -> Outcome {
    let gpu = gpu();
    let kernels = PostKernels::load(&gpu)?;
    let library = Library::new()?;
    let made = library.queue(0, (16, 32), 0)?;
    let mut device = Device::new(&made, 40)?;
    let mut nic = made.nic.clone();
    nic.memory.bell = Arc::new(Said(made.device.bell.clone(), MemoryKind::Registers));
    match WqeQueue::of_nic(&gpu, &nic, LONG, None) {
        Ok(queue) => {
            println!("\nregisters: {gpu:?} takes ordinary memory as such");
            let queue = Arc::new(queue);
            let moves = moves(40);
            let posts = Posts {
                moves: &moves,
                posters: 2,
                by: PostBy::Waves,
                op: PUT,
                until: ALL,
            };
            let results = device.run(&kernels, &queue, &posts)?;
            let ok = Status::Ok.number();
            assert!(
                results.iter().all(|r| (r.posted, r.ended) == (ok, ok)),
                "{results:?}"
            );
        }
        Err(Error::Gpu(refused)) => {
            println!("\nregisters: {refused}");
            assert!(!on_host(), "the stand-in takes all memory");
            let GpuFault::Foreign {
                part, addr, kind, ..
            } = *refused
            else {
                return Err(refused.to_string().into());
            };
            let wanted = ("doorbell", made.device.bell.addr(), MemoryKind::Registers);
            assert_eq!((part, addr, kind), wanted);
        }
        Err(other) => return Err(other.into()),
    }
    let of = &made.device;
    let all = [&of.sq, &of.sq_record, &of.cq, &of.cq_record, &of.bell].map(Clone::clone);
    drop(PinnedMemory::register_all(&gpu, &all)?);
    Ok(())
}
