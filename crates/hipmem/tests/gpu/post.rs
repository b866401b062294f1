//! Posts by kernels: by threads, waves and workgroups, through the proxy ring and as WQEs to a model of
//! an mlx5 device. (`tests/post_host` has the host build alone, with real threads and planted faults.)
//!
//! The model is a thread of this process, and the queues are in pinned memory: no NIC takes part.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer_hipmem::HostMemory;
use kvxfer_hipmem::gpu::{
    Copy, Gpu, GpuMemory, Kernel, Module, PinnedMemory, Place, RuntimeKind, Stream,
};
use kvxfer_hipmem::kernels::queue::{
    ALL, DIRECT, EACH, GET, GPU_WQE, IDLE, Move, POSTED, PUT, PUT_IMM, PostArgs, PostResult, Queue,
    QueueState,
};
use kvxfer_hipmem::kernels::{
    KVX_POST_BLOCKS, KVX_POST_THREADS, KVX_POST_WAVES, Pair, posts_for_target,
};
use kvxfer_hipmem::post::device::{
    DeviceQueue, PostBy, PostKernels, Posts, Produce, ProducedTensor,
};
use kvxfer_hipmem::post::{
    Consumer, End, Place as BlockPlace, ProxyRing, RingAddresses, Status, Taken,
};
use kvxfer_verbs::mlx5::model::{Carried, Hca, HcaSetup, KeyTable, Queues, Region, Sink};
use kvxfer_verbs::mlx5::{CqDepth, Cqe, Gather, Operation, Qpn, SqDepth, Syndrome};

use crate::{Outcome, gpu, soon};

const QPN: u32 = 0x00ab_cdef;
/// Where moves begin on both sides; nothing is there, for nothing is moved.
const LOCAL: u64 = 0x10_0000;
const REMOTE: u64 = 0x7000_0000_0000;

/// A GPU with the kernels that post.
struct Bench {
    gpu: Gpu,
    warp: u32,
    kernels: [Kernel; 3],
    stream: Stream,
    /// The state, the report of WQEs, the abort word, and the words of WQEs.
    own: GpuMemory,
}

/// Ticks of the device's clock.
fn ticks(gpu: &Gpu, of: Duration) -> u64 {
    let a_second = match gpu.runtime() {
        RuntimeKind::Cuda => 1_000_000_000,
        RuntimeKind::Hip => 100_000_000,
        // The fastest counter of a processor.
        RuntimeKind::Host => 1 << 32,
    };
    a_second * u64::try_from(of.as_millis()).expect("short") / 1000
}

const REPORT: u64 = 64;
const ABORT: u64 = 128;
const WORDS: u64 = 192;
/// Bytes, for queues of up to 256 slots.
const OWN: u64 = WORDS + 8 * 256;

impl Bench {
    fn new() -> Result<Self, Box<dyn std::error::Error>> {
        let gpu = gpu();
        let arch = match gpu.runtime() {
            RuntimeKind::Host => "host".to_owned(),
            _ => gpu.info().arch.clone(),
        };
        let image = posts_for_target(&arch)?;
        // SAFETY: it is what the compiler made of kernels/.
        let module = unsafe { Module::load(&gpu, image.bytes) }?;
        let kernel = |name| module.kernel(name);
        Ok(Self {
            kernels: [
                kernel(KVX_POST_THREADS)?,
                kernel(KVX_POST_WAVES)?,
                kernel(KVX_POST_BLOCKS)?,
            ],
            warp: image.warp,
            stream: Stream::new(&gpu)?,
            own: GpuMemory::new(&gpu, OWN)?,
            gpu,
        })
    }

    /// A queue's state for its first ticket.
    fn start(&self, first: u64) -> Outcome {
        self.own.fill(0, OWN, 0)?;
        self.own.write(0, &QueueState::starting_at(first).bytes())?;
        self.own.write(REPORT, &first.to_ne_bytes())?;
        Ok(())
    }

    /// Posts `count` moves by each of `posters`, while `serve` is called until all have ended; for
    /// each of the three kernels its grid is chosen so that waves of a workgroup post side by side.
    fn run(
        &self,
        which: usize,
        queue: Queue,
        moves: &[Move],
        (posters, op, until): (u32, u32, u32),
        mut serve: impl FnMut(),
    ) -> Result<Vec<PostResult>, Box<dyn std::error::Error>> {
        let list = PinnedMemory::new(&self.gpu, size_of_val(moves) as u64)?;
        list.host().write(0, Move::bytes(moves))?;
        let len = moves.len() * size_of::<PostResult>();
        let results = PinnedMemory::new(&self.gpu, len as u64)?;
        results.host().fill(0, len as u64, 0xee)?;
        let args = PostArgs {
            queue,
            moves: list.device_addr(),
            results: results.device_addr(),
            count: u32::try_from(moves.len())? / posters,
            posters,
            op,
            until,
        };
        let (grid, block) = match which {
            0 => (posters.div_ceil(2 * self.warp), 2 * self.warp),
            1 => (posters.div_ceil(4), 4 * self.warp),
            _ => (posters, 2 * self.warp),
        };
        let kernel = &self.kernels[which];
        // SAFETY: all that it names is held until the stream has been waited for, and as long as the
        // arguments say; moves name nothing that is touched.
        let running = unsafe { kernel.launch(&self.stream, grid, block, args.bytes()) }?;
        let deadline = Instant::now() + Duration::from_secs(60);
        while !running.is_done()? {
            assert!(Instant::now() < deadline, "the kernel does not end");
            serve();
        }
        running.wait(soon())?;
        let mut bytes = vec![0; len];
        results.host().read(0, &mut bytes)?;
        let all = bytes.as_chunks::<16>().0.iter().map(|b| PostResult {
            ticket: u64::from_ne_bytes(b[..8].try_into().expect("eight")),
            posted: u32::from_ne_bytes(b[8..12].try_into().expect("four")),
            ended: u32::from_ne_bytes(b[12..].try_into().expect("four")),
        });
        Ok(all.collect())
    }

    fn ring(
        &self,
        depth: u32,
        first: u64,
        patience: Duration,
    ) -> Result<Ring, kvxfer_hipmem::Error> {
        let memory = PinnedMemory::new(&self.gpu, ProxyRing::bytes(depth))?;
        let (ring, consumer) = ProxyRing::new(memory.host().clone(), depth, first)?;
        let at = RingAddresses {
            ring: memory.device_addr(),
            state: self.own.addr(),
            abort: self.own.addr() + ABORT,
        };
        Ok(Ring {
            queue: ring.queue(at, ticks(&self.gpu, patience)),
            ring,
            consumer,
            _memory: memory,
        })
    }
}

struct Ring {
    ring: ProxyRing,
    consumer: Consumer,
    queue: Queue,
    _memory: PinnedMemory,
}

fn moves(n: u32) -> Vec<Move> {
    let one = |i: u32| Move {
        local: LOCAL + 64 * u64::from(i),
        remote: REMOTE + 64 * u64::from(i),
        len: 64,
        lkey: 1,
        rkey: 2,
        imm: i,
        flags: 0,
    };
    (0..n).map(one).collect()
}

fn number(local: u64) -> usize {
    ((local - LOCAL) / 64) as usize
}

/// All posts went well, and had a ticket each.
fn all_well(results: &[PostResult], first: u64) {
    let mut tickets: Vec<_> = results.iter().map(|r| r.ticket).collect();
    for result in results {
        let ok = Status::Ok.number();
        assert_eq!((result.posted, result.ended), (ok, ok), "{result:?}");
    }
    tickets.sort_unstable();
    assert!(
        tickets
            .iter()
            .copied()
            .eq(first..first + results.len() as u64)
    );
}

#[test]
fn kernels_post_through_the_ring() -> Outcome {
    let bench = Bench::new()?;
    for which in 0..3 {
        for (depth, first, posters, count, op, until) in [
            (64, 0, 70, 20, PUT, ALL),
            (8, 0xfffa, 12, 10, GET, EACH),
            (16, 0xffff_fffa, 20, 10, PUT_IMM, IDLE),
            (1, 0, 5, 3, PUT, EACH),
        ] {
            bench.start(first)?;
            let mut ring = bench.ring(depth, first, Duration::from_secs(20))?;
            let moves = moves(posters * count);
            let mut seen = vec![0_u32; moves.len()];
            let mut under_way = Vec::new();
            let serve = || {
                match ring.consumer.take(&ring.ring).expect("inside") {
                    Some(Taken::Post(post)) => {
                        let (End::Address { addr: local, .. }, End::Address { addr, .. }) =
                            (post.local, post.remote)
                        else {
                            panic!("{post:?}");
                        };
                        assert_eq!(local - LOCAL, addr - REMOTE);
                        seen[number(local)] += 1;
                        under_way.push(post.ticket);
                        if under_way.len() < depth as usize / 2 {
                            return;
                        }
                    }
                    Some(other) => panic!("{other:?}"),
                    None => {}
                }
                // The last one first.
                while let Some(ticket) = under_way.pop() {
                    let ended = ring.consumer.complete(&ring.ring, ticket, Status::Ok);
                    ended.expect("inside").expect("it is under way");
                }
            };
            let results = bench.run(which, ring.queue, &moves, (posters, op, until), serve)?;
            all_well(&results, first);
            assert!(seen.iter().all(|n| *n == 1), "{which}: each once");
        }
    }
    Ok(())
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
        let seen = self.0.get_mut(number(one.addr()));
        *seen.ok_or(Syndrome::LOCAL_LENGTH)? += 1;
        Ok(Carried::Done(one.len()))
    }
}

/// An mlx5 queue in pinned memory, and the model of its device.
struct Nic {
    hca: Hca<HostMemory, Counted>,
    queue: Queue,
    bell: HostMemory,
    uar: HostMemory,
    _memory: PinnedMemory,
}

impl Nic {
    fn new(
        bench: &Bench,
        (kind, depth, first): (u32, u32, u64),
        moves: usize,
        patience: Duration,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let cq_depth = 2 * depth;
        let slots = 64 * u64::from(depth);
        let memory = PinnedMemory::new(&bench.gpu, 3 * slots + 256)?;
        let host = memory.host();
        host.fill(0, memory.len(), 0)?;
        let words = 3 * slots;
        let part = |at, len| host.slice(at, len);
        let (sq, cq) = (part(0, slots)?, part(slots, 2 * slots)?);
        for i in 0..u64::from(cq_depth) {
            cq.write(64 * i, &Cqe::unwritten())?;
        }
        let (record, cq_record) = (part(words, 8)?, part(words + 64, 8)?);
        let (bell, uar) = (part(words + 128, 8)?, part(words + 192, 8)?);
        let [_, b, c, d] = (first as u32).to_be_bytes();
        record.write(4, &[0, 0, c, d])?;
        cq_record.write(0, &[0, b, c, d])?;
        let at = memory.device_addr();
        let queue = Queue {
            slots: at,
            words: bench.own.addr() + WORDS,
            state: bench.own.addr(),
            report: bench.own.addr() + REPORT,
            abort: bench.own.addr() + ABORT,
            patience: ticks(&bench.gpu, patience),
            completions: at + slots,
            record: at + words + 4,
            cq_record: at + words + 64,
            bell: at + words + 128,
            kind,
            depth,
            cq_depth,
            qpn: QPN,
            ..Queue::default()
        };
        let region = |addr| Region {
            addr,
            len: 64 * moves as u64,
            writable: true,
        };
        let setup = HcaSetup {
            qpn: Qpn::new(QPN)?,
            sq_depth: SqDepth::new(depth)?,
            cq_depth: CqDepth::new(cq_depth)?,
            first,
            keys: KeyTable {
                local: [(1, region(LOCAL))].into(),
                remote: [(2, region(REMOTE))].into(),
            },
        };
        let queues = Queues {
            sq,
            sq_record: record,
            cq,
            cq_record,
            bell: if kind == GPU_WQE { &uar } else { &bell }.clone(),
        };
        Ok(Self {
            hca: Hca::new(queues, setup, Counted(vec![0; moves]))?,
            queue,
            bell,
            uar,
            _memory: memory,
        })
    }

    /// What the CPU and the device do.
    fn look(&mut self) {
        if self.queue.kind == GPU_WQE {
            let word = self.bell.load_u64(0).expect("inside");
            self.uar.store_u64(0, word).expect("inside");
        }
        self.hca.look(u64::MAX).unwrap_or_else(|e| panic!("{e}"));
    }
}

#[test]
fn kernels_write_wqes() -> Outcome {
    let bench = Bench::new()?;
    for which in 0..3 {
        for (kind, depth, first, posters, count, op, until) in [
            (DIRECT, 64, 0, 70, 20, PUT, ALL),
            (DIRECT, 8, 0xfffa, 12, 10, GET, EACH),
            (GPU_WQE, 16, 0xffff_fffa, 20, 10, PUT_IMM, IDLE),
            (DIRECT, 1, 0xff_fffe, 5, 3, PUT, EACH),
        ] {
            bench.start(first)?;
            let moves = moves(posters * count);
            let long = Duration::from_secs(20);
            let mut nic = Nic::new(&bench, (kind, depth, first), moves.len(), long)?;
            let queue = nic.queue;
            let what = (posters, op, until);
            let results = bench.run(which, queue, &moves, what, || nic.look())?;
            nic.look();
            all_well(&results, first);
            assert_eq!(nic.hca.consumed(), first + moves.len() as u64);
            assert!(
                nic.hca.sink().0.iter().all(|n| *n == 1),
                "{which}: each once"
            );
        }
    }
    Ok(())
}

#[test]
fn kernels_that_nobody_serves_end_with_statuses() -> Outcome {
    let bench = Bench::new()?;
    let short = Duration::from_millis(50);
    for which in 0..3 {
        for wqes in [false, true] {
            bench.start(0)?;
            let ring = bench.ring(4, 0, short)?;
            let nic = Nic::new(&bench, (DIRECT, 4, 0), 6, short)?;
            let queue = if wqes { nic.queue } else { ring.queue };
            let what = (1, PUT, POSTED);
            let results = bench.run(which, queue, &moves(6), what, || {})?;
            let posted: Vec<_> = results.iter().map(|r| r.posted).collect();
            assert_eq!(posted, [0, 0, 0, 0, 1, 1], "{which} {wqes}: full");
            let results = bench.run(which, queue, &moves(1), (1, PUT, IDLE), || {})?;
            let timeout = Status::Timeout.number();
            assert_eq!(results[0].ended, timeout, "{which} {wqes}: not quiet");
            // Neither those behind one that was late are posted or waited for, whoever posts together.
            for (until, wanted) in [
                (EACH, vec![(0, 1), (1, 1), (1, 1)]),
                (ALL, [vec![(0, 1); 4], vec![(1, 1); 3]].concat()),
            ] {
                bench.start(0)?;
                let ring = bench.ring(4, 0, short)?;
                let nic = Nic::new(&bench, (DIRECT, 4, 0), 6, short)?;
                let queue = if wqes { nic.queue } else { ring.queue };
                let moves = moves(wanted.len() as u32);
                let results = bench.run(which, queue, &moves, (1, PUT, until), || {})?;
                let ends: Vec<_> = results.iter().map(|r| (r.posted, r.ended)).collect();
                assert_eq!(ends, wanted, "{which} {wqes} {until}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_producer_that_nobody_serves_ends() -> Outcome {
    let gpu = gpu();
    let kernels = PostKernels::load(&gpu)?;
    let stream = Stream::new(&gpu)?;
    let memory = GpuMemory::new(&gpu, 4096)?;
    let (queue, _consumer) = DeviceQueue::new(&gpu, 4, Duration::from_millis(50))?;
    let layer = |layer| Produce {
        group: 0,
        layer,
        len: 64,
        tensors: vec![ProducedTensor {
            place: Place::Gpu(&memory, 0),
            stride: 64,
            bytes: 64,
            salt: 0,
        }],
    };
    let layers: Vec<_> = (0..4).map(layer).collect();
    let pairs: Vec<_> = (0..40).map(|b| Pair { src: b, dst: b }).collect();
    let posting = kernels.produce(&stream, &Arc::new(queue), &layers, &pairs)?;
    let results = posting.wait(soon())?;
    let (ok, late) = (Status::Ok.number(), Status::Timeout.number());
    let posted = results.iter().filter(|r| r.posted == ok).count();
    assert_eq!(posted, 4, "as many as there is room for");
    assert!(results.iter().all(|r| r.ended == late), "{results:?}");
    Ok(())
}

#[test]
fn kernels_that_wait_end_with_the_abort_word() -> Outcome {
    let bench = Bench::new()?;
    let long = Duration::from_secs(20);
    for which in 0..3 {
        for wqes in [false, true] {
            bench.start(0)?;
            let ring = bench.ring(4, 0, long)?;
            let nic = Nic::new(&bench, (DIRECT, 4, 0), 6, long)?;
            let queue = if wqes { nic.queue } else { ring.queue };
            let one = PinnedMemory::new(&bench.gpu, 4)?;
            one.host().write(0, &1_u32.to_ne_bytes())?;
            let another = Stream::new(&bench.gpu)?;
            let started = Instant::now();
            let mut told = None;
            let serve = || {
                if told.is_none() && started.elapsed() > Duration::from_millis(20) {
                    // On a stream of its own: the kernel has the other.
                    let copy = Copy {
                        dst: Place::Gpu(&bench.own, ABORT),
                        src: Place::Pinned(&one, 0),
                        len: 4,
                    };
                    told = Some(another.copy(&[copy]).expect("it is put on the stream"));
                }
            };
            let results = bench.run(which, queue, &moves(2), (1, PUT, EACH), serve)?;
            let stopped = Status::Stopped.number();
            assert!(results.iter().all(|r| r.posted == 0 && r.ended == stopped));
            assert!(started.elapsed() < long);
            told.ok_or("nobody was told")?.wait(soon())?;
        }
    }
    Ok(())
}

/// `kvx_mix` of `kernels/device.h`.
fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

#[test]
fn a_producer_pushes_what_it_has_made() -> Outcome {
    const BYTES: u64 = 200;
    const STRIDE: u64 = 256;
    const BLOCKS: u32 = 40;
    let gpu = gpu();
    let kernels = PostKernels::load(&gpu)?;
    let stream = Stream::new(&gpu)?;
    let memory = GpuMemory::new(&gpu, 4 * STRIDE * u64::from(BLOCKS))?;
    memory.fill(0, memory.len(), 0)?;
    let (queue, mut consumer) = DeviceQueue::new(&gpu, 16, Duration::from_secs(20))?;
    let queue = Arc::new(queue);
    let tensor = |n: u64| ProducedTensor {
        place: Place::Gpu(&memory, n * STRIDE * u64::from(BLOCKS)),
        stride: STRIDE,
        bytes: BYTES,
        salt: 1000 * n,
    };
    let layer = |n: u16| Produce {
        group: 3,
        layer: 7 + n,
        len: 2 * BYTES,
        tensors: (0..2).map(|t| tensor(u64::from(2 * n) + t)).collect(),
    };
    let pairs: Vec<Pair> = (0..35)
        .map(|i| Pair {
            src: 39 - i,
            dst: 100 + i,
        })
        .collect();
    let made = |layer: u64, number: u32| -> Outcome {
        for t in 2 * layer..2 * layer + 2 {
            let mut block = vec![0; usize::try_from(BYTES)?];
            memory.read(
                (t * u64::from(BLOCKS) + u64::from(number)) * STRIDE,
                &mut block,
            )?;
            let key = mix(1000 * t + u64::from(number));
            for (word, i) in block.as_chunks::<8>().0.iter().zip(0_u64..) {
                let x = key.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                assert_eq!(u64::from_le_bytes(*word), x ^ x >> 32);
            }
        }
        Ok(())
    };
    let posting = kernels.produce(&stream, &queue, &[layer(0), layer(1)], &pairs)?;
    let mut seen = vec![0; 70];
    let deadline = Instant::now() + Duration::from_secs(60);
    while !posting.is_done()? {
        assert!(Instant::now() < deadline, "the kernel does not end");
        let Some(taken) = consumer.take(queue.ring())? else {
            continue;
        };
        let Taken::Post(post) = taken else {
            panic!("{taken:?}");
        };
        let (End::Place(here), End::Place(there)) = (post.local, post.remote) else {
            panic!("{post:?}");
        };
        assert_eq!((here.group, here.tensor), (3, 0xff));
        assert_eq!(
            BlockPlace {
                block: there.block,
                ..here
            },
            there
        );
        let pair = usize::try_from(39 - here.block)?;
        assert_eq!((there.block, post.len), (pairs[pair].dst, 2 * BYTES));
        let layer = u64::from(here.layer - 7);
        seen[usize::try_from(layer)? * 35 + pair] += 1;
        // It is there when it is posted. A GPU's memory is looked at when its kernel has ended.
        if gpu.runtime() == RuntimeKind::Host {
            made(layer, here.block)?;
        }
        let ended = consumer.complete(queue.ring(), post.ticket, Status::Ok)?;
        ended.expect("it is under way");
    }
    let results = posting.wait(soon())?;
    all_well(&results, 0);
    assert!(seen.iter().all(|n| *n == 1), "each once: {seen:?}");
    for pair in &pairs {
        made(0, pair.src)?;
        made(1, pair.src)?;
    }
    // The gaps between blocks, and blocks that nobody asked for.
    let mut gap = [1; 56];
    memory.read(39 * STRIDE + BYTES, &mut gap)?;
    assert_eq!(gap, [0; 56]);
    memory.read(4 * STRIDE, &mut gap)?;
    assert_eq!(gap, [0; 56]);

    // What is not inside, or not on words, is not launched.
    for (place, stride, bytes, src) in [
        (0, STRIDE, BYTES, 160),
        (4, STRIDE, BYTES, 1),
        (0, 257, 8, 1),
    ] {
        let tensors = vec![ProducedTensor {
            place: Place::Gpu(&memory, place),
            stride,
            bytes,
            salt: 0,
        }];
        let produce = Produce {
            tensors,
            ..layer(0)
        };
        let pair = [Pair { src, dst: 0 }];
        let refused = kernels.produce(&stream, &queue, &[produce], &pair);
        assert!(refused.is_err(), "{place} {stride} {src}");
    }
    Ok(())
}

#[test]
fn a_queue_that_is_stopped_ends_its_posters() -> Outcome {
    let gpu = gpu();
    let kernels = PostKernels::load(&gpu)?;
    let stream = Stream::new(&gpu)?;
    let (queue, _consumer) = DeviceQueue::new(&gpu, 4, Duration::from_secs(300))?;
    let queue = Arc::new(queue);
    let moves = moves(6);
    let posts = Posts {
        moves: &moves,
        posters: 1,
        by: PostBy::Waves,
        op: PUT,
        until: ALL,
    };
    let posting = kernels.post(&stream, &queue, &posts)?;
    // Four slots are taken at once, and nobody serves them.
    std::thread::sleep(Duration::from_millis(20));
    assert!(!posting.is_done()?);
    queue.stop()?;
    let results = posting.wait(soon())?;
    let stopped = Status::Stopped.number();
    let posted: Vec<_> = results.iter().map(|r| r.posted).collect();
    assert_eq!(posted, [0, 0, 0, 0, stopped, stopped]);
    assert!(results.iter().all(|r| r.ended == stopped), "{results:?}");
    Ok(())
}

#[test]
fn patience_is_in_the_clocks_ticks() -> Outcome {
    let gpu = gpu();
    let kernels = PostKernels::load(&gpu)?;
    let stream = Stream::new(&gpu)?;
    let patience = Duration::from_millis(200);
    let (queue, _consumer) = DeviceQueue::new(&gpu, 1, patience)?;
    let moves = moves(1);
    let posts = Posts {
        moves: &moves,
        posters: 1,
        by: PostBy::Threads,
        op: PUT,
        until: IDLE,
    };
    let begun = Instant::now();
    let results = kernels
        .post(&stream, &Arc::new(queue), &posts)?
        .wait(soon())?;
    let took = begun.elapsed();
    assert_eq!(results[0].ended, Status::Timeout.number());
    // A clock that is believed too fast makes a kernel give up early: a tenth is for measuring it.
    assert!(took > patience * 9 / 10, "{took:?}");
    Ok(())
}
