//! Memory laid out as a NIC's queues, which a model of an mlx5 device reads: what kernels are given, and whose it is
//! until they have ended. The kernels are the host build.

use std::sync::Weak;
use std::time::Instant;

use kvxfer_verbs::Memory;
use kvxfer_verbs::mlx5::model::{Carried, Hca, HcaSetup, KeyTable, Queues, Region, Sink};
use kvxfer_verbs::mlx5::{CqDepth, Cqe, Gather, Operation, Qpn, SqDepth, Syndrome};

use super::*;
use crate::mem::gpu::{Event, GpuRuntime, RuntimeChoice, RuntimeKind, Stream};
use crate::mem::kernels::queue::{ALL_TENSORS, EACH, IDLE, LOCAL_PLACE, Move, PUT, REMOTE_PLACE};
use crate::mem::post::device::{NicFault, PostBy, PostKernels, Posts};
use crate::mem::post::{Place, RegionPiece, RegionSide, Status};
use crate::mem::{HostArena, HostMemory};

const LKEY: u32 = 0x1234;
const RKEY: u32 = 0x5678;
const BLOCKS: u32 = 24;
const STRIDE: u64 = 256;
/// Of a block, in two pieces.
const BYTES: u64 = 100 + 33;
/// Where the peer says that its memory is: nothing of this process is there.
const FAR: u64 = 0x7000_0000_0000;
const LONG: Duration = Duration::from_secs(20);

fn gpu() -> Gpu {
    let runtime = GpuRuntime::open(RuntimeChoice::Only(RuntimeKind::Host)).expect("the stand-in");
    runtime.gpu(0).expect("its device").clone()
}

/// A queue pair's queues as libmlx5 lays them out.
struct Laid {
    nic: NicQueues,
    device: Queues<HostMemory>,
}

fn laid_out(depth: u32) -> Laid {
    let arena = HostArena::new(1 << 16).expect("memory");
    let part = |at, len| arena.memory().slice(at, len).expect("inside");
    let (sq_depth, cq_depth) = (SqDepth::new(depth), CqDepth::new(2 * depth));
    let (sq_depth, cq_depth) = (sq_depth.expect("a power"), cq_depth.expect("a power"));
    let device = Queues {
        sq: part(0x2000, sq_depth.bytes()),
        sq_record: part(0x40, 8),
        cq: part(0x4000, cq_depth.bytes()),
        cq_record: part(0x80, 8),
        bell: part(0x1800, 8),
    };
    for n in 0..2 * u64::from(depth) {
        let at = cq_depth.offset(n);
        device.cq.write(at, &Cqe::unwritten()).expect("inside");
    }
    let nic = NicQueues {
        qpn: Qpn::new(77).expect("24 bits"),
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
    Laid { nic, device }
}

impl Laid {
    /// What holds its parts, if anything does.
    fn held(self) -> impl Fn() -> usize {
        let Queues {
            sq,
            sq_record,
            cq,
            cq_record,
            bell,
        } = self.nic.memory;
        let all = [sq, sq_record, cq, cq_record, bell];
        let tokens: [Weak<dyn Memory>; 5] = all.map(|part| Arc::downgrade(&part));
        move || tokens.iter().filter(|t| t.strong_count() > 0).count()
    }
}

/// Carries WQEs out by copying bytes.
#[derive(Debug)]
struct Mover {
    local: HostMemory,
    remote: HostMemory,
}

impl Sink for Mover {
    fn execute(&mut self, _: u64, operation: &Operation) -> Result<Carried, Syndrome> {
        let Some((remote, Gather::One(one))) = operation.sides() else {
            return Err(Syndrome::LOCAL_QP_OPERATION);
        };
        let (from, to) = (one.addr() - self.local.addr(), remote.addr - FAR);
        let moved = self
            .remote
            .copy_from(&self.local, from, to, one.len().into());
        moved.map_err(|_| Syndrome::REMOTE_ACCESS)?;
        Ok(Carried::Done(one.len()))
    }
}

fn layers(local: u64) -> Vec<RegionLayer> {
    let piece = |at: u64, len| RegionPiece {
        local: RegionSide {
            addr: local + at,
            stride: STRIDE,
            key: LKEY,
        },
        remote: RegionSide {
            addr: FAR + at,
            stride: STRIDE,
            key: RKEY,
        },
        len,
    };
    vec![RegionLayer {
        group: 2,
        layer: 9,
        local_blocks: BLOCKS,
        remote_blocks: BLOCKS,
        tensors: vec![vec![piece(0, 100)], vec![piece(128, 33)]],
    }]
}

/// Block `src` here to block `dst` there.
fn put(src: u32, dst: u32) -> Move {
    let place = |block| Place {
        group: 2,
        layer: 9,
        tensor: ALL_TENSORS,
        block,
    };
    Move {
        local: place(src).to_word(),
        remote: place(dst).to_word(),
        len: BYTES,
        flags: LOCAL_PLACE | REMOTE_PLACE,
        ..Move::default()
    }
}

fn posts(moves: &[Move], until: u32) -> Posts<'_> {
    Posts {
        moves,
        posters: 1,
        by: PostBy::Blocks,
        op: PUT,
        until,
    }
}

type Outcome = Result<(), Box<dyn std::error::Error>>;

#[test]
fn kernels_push_blocks_by_keys_and_the_queue_is_let_go_when_they_have_ended() -> Outcome {
    let gpu = gpu();
    let kernels = PostKernels::load(&gpu)?;
    let stream = Stream::new(&gpu)?;
    let bytes = STRIDE * u64::from(BLOCKS);
    let (local, remote) = (HostArena::new(bytes)?, HostArena::new(bytes)?);
    let (local, remote) = (local.memory(), remote.memory());
    local.fill_words(0, bytes, |i| i * 0x1234_5679)?;
    let laid = laid_out(8);
    let queue = NicQueue::over(&laid.nic, &gpu, &layers(local.addr()), LONG)?;
    let region = |addr| Region {
        addr,
        len: bytes,
        writable: true,
    };
    let setup = HcaSetup {
        qpn: laid.nic.qpn,
        sq_depth: laid.nic.sq_depth,
        cq_depth: laid.nic.cq_depth,
        first: 0,
        keys: KeyTable {
            local: [(LKEY, region(local.addr()))].into(),
            remote: [(RKEY, region(FAR))].into(),
        },
    };
    let mover = Mover {
        local: local.clone(),
        remote: remote.clone(),
    };
    let mut hca = Hca::new(laid.device.clone(), setup, mover)?;
    let handle = queue.handle();
    assert_eq!((handle.depth, handle.cq_depth, handle.qpn), (8, 16, 77));
    // Many times over the depth.
    let moves: Vec<_> = (0..4 * BLOCKS)
        .map(|i| put(i * 7 % BLOCKS, i % BLOCKS))
        .collect();
    let posting = kernels.post(&stream, queue.device(), &posts(&moves, EACH))?;
    let event = Event::new(&gpu)?;
    event.record(&stream)?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while !posting.is_done()? {
        assert!(Instant::now() < deadline, "the kernel does not end");
        hca.look(u64::MAX)?;
    }
    let results = posting.wait(deadline)?;
    let ok = Status::Ok.number();
    assert!(
        results.iter().all(|r| (r.posted, r.ended) == (ok, ok)),
        "{results:?}"
    );
    drop((hca, posting));
    let held = laid.held();
    assert_eq!(held(), 5, "the queue has them");
    let ends = queue.finish(Kernels::Behind(&event), LONG)?;
    assert!(ends.all_well(), "{ends:?}");
    assert_eq!(ends.left.posted, 8 * u64::from(BLOCKS));
    assert_eq!(held(), 0, "all is let go of");
    for dst in 0..u64::from(BLOCKS) {
        let src = dst * 7 % u64::from(BLOCKS);
        for (at, len) in [(0, 100), (128, 33)] {
            let (mut wanted, mut found) = (vec![0; len], vec![1; len]);
            local.read(src * STRIDE + at, &mut wanted)?;
            remote.read(dst * STRIDE + at, &mut found)?;
            assert_eq!(found, wanted);
        }
        // And nothing else.
        let mut gap = [1; 28];
        remote.read(dst * STRIDE + 100, &mut gap)?;
        assert_eq!(gap, [0; 28]);
    }
    Ok(())
}

#[test]
fn what_kernels_may_touch_is_kept_unless_they_have_ended() -> Outcome {
    let gpu = gpu();
    let made = || -> Result<_, Error> {
        let laid = laid_out(8);
        let queue = NicQueue::over(&laid.nic, &gpu, &layers(0x1000), LONG)?;
        Ok((queue, laid.held()))
    };
    // Nobody has had the handle.
    let (queue, held) = made()?;
    drop(queue);
    assert_eq!(held(), 0);
    let (queue, held) = made()?;
    let _ = queue.handle();
    drop(queue);
    assert_eq!(held(), 5, "a kernel may post");
    let (queue, held) = made()?;
    let _ = queue.device();
    drop(queue);
    assert_eq!(held(), 5, "a kernel may post");
    let (queue, held) = made()?;
    let _ = queue.handle();
    let ends = queue.finish(Kernels::Ended, LONG)?;
    assert_eq!((ends.left.posted, ends.all_well(), held()), (0, true, 0));
    // A child that was forked leaves its parent's queues alone.
    for finishes in [false, true] {
        let (mut queue, held) = made()?;
        queue.pid += 1;
        if finishes {
            let forked = queue.finish(Kernels::Ended, LONG);
            assert!(matches!(forked, Err(Error::Forked { .. })), "{forked:?}");
        } else {
            drop(queue);
        }
        assert_eq!(held(), 5);
    }
    // Who keeps the device keeps the queue.
    let (queue, held) = made()?;
    let device = Arc::clone(queue.device());
    queue.finish(Kernels::Ended, LONG)?;
    assert_eq!(held(), 5);
    drop(device);
    assert_eq!(held(), 0);
    Ok(())
}

#[test]
fn kernels_that_are_late_are_stopped_and_counted() -> Outcome {
    let gpu = gpu();
    let kernels = PostKernels::load(&gpu)?;
    let stream = Stream::new(&gpu)?;
    let laid = laid_out(8);
    let long = Duration::from_secs(3000);
    let queue = NicQueue::over(&laid.nic, &gpu, &layers(0x1000), long)?;
    let moves = [put(0, 0), put(1, 1)];
    // Nobody carries them out.
    let posting = kernels.post(&stream, queue.device(), &posts(&moves, IDLE))?;
    let event = Event::new(&gpu)?;
    event.record(&stream)?;
    let held = laid.held();
    let within = Duration::from_millis(100);
    let ends = queue.finish(Kernels::Behind(&event), within)?;
    assert!(ends.late && !ends.all_well(), "{ends:?}");
    // A block is in two pieces.
    assert_eq!((ends.left.posted, ends.left.ended), (4, 0));
    let results = posting.wait(Instant::now() + LONG)?;
    let ended = results.last().map(|last| last.ended);
    assert_eq!(ended, Some(Status::Stopped.number()), "{results:?}");
    drop(posting);
    assert_eq!(held(), 0, "they have ended");
    Ok(())
}

#[test]
fn queues_that_cannot_be_are_refused_and_let_go() {
    let gpu = gpu();
    let good = layers(0x1000);
    let refused = |laid: Laid, layers: &[RegionLayer], patience| {
        let error = NicQueue::over(&laid.nic, &gpu, layers, patience).expect_err("it cannot be");
        assert_eq!(laid.held()(), 0);
        error
    };
    let e = refused(laid_out(8), &good, Duration::ZERO);
    assert!(matches!(e, Error::QueueConfig { .. }), "{e}");
    let e = refused(laid_out(1), &good, LONG);
    let wanted = Error::QueueDepth {
        depth: 1,
        stretches: 2,
    };
    assert_eq!(e.to_string(), wanted.to_string());
    let twice = [good.clone(), good.clone()].concat();
    let e = refused(laid_out(8), &twice, LONG);
    assert!(
        matches!(e, Error::Memory(crate::mem::Error::Regions(_))),
        "{e}"
    );
    let used = laid_out(8);
    used.device
        .sq_record
        .write(4, &[0, 0, 0, 5])
        .expect("inside");
    let e = refused(used, &good, LONG);
    let Error::Memory(crate::mem::Error::Nic(NicFault::Used { found, .. })) = e else {
        panic!("{e}");
    };
    assert_eq!(found, 5);
    // Kernels that name addresses alone need no layers.
    let queue = NicQueue::over(&laid_out(1).nic, &gpu, &[], LONG).expect("a queue");
    assert_eq!(queue.handle().regions, 0);
    let ends = queue.finish(Kernels::Ended, LONG).expect("it can be read");
    assert!(ends.all_well());
}
