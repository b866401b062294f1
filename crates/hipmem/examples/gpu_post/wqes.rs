//! WQEs that kernels write, to a model of an mlx5 device: a thread of this process for each queue. No NIC takes part.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kvxfer_hipmem::gpu::{GpuMemory, PinnedMemory, Stream};
use kvxfer_hipmem::kernels::KVX_TIME_WQES;
use kvxfer_hipmem::kernels::queue::{
    ALL_TENSORS, DIRECT, IDLE, LOCAL_PLACE, Move, PUT, PostArgs, PostResult, Queue, REMOTE_PLACE,
};
use kvxfer_hipmem::post::device::{
    Bell, PostBy, Posts, RegionTable, WqeMemory, WqeQueue, WqeQueueConfig, WqeSlots,
};
use kvxfer_hipmem::post::{Place, RegionLayer, RegionPiece, RegionSide};
use kvxfer_verbs::mlx5::model::{Carried, Hca, HcaSetup, KeyTable, Queues, Region, Sink};
use kvxfer_verbs::mlx5::{CqDepth, Operation, Qpn, SqDepth, Syndrome};

use super::report::Report;
use super::{Bench, Result, line, soon};

const DEPTH: u32 = 1024;
const PIECES: u32 = 4;
const PIECE: u64 = 64;
const BLOCKS: u32 = 1024;
const LOCAL: u64 = 0x10_0000;
const REMOTE: u64 = 0x7000_0000_0000;

/// Says that all is done.
struct Done;

impl Sink for Done {
    fn execute(&mut self, _: u64, operation: &Operation) -> std::result::Result<Carried, Syndrome> {
        let bytes = operation.sides().map_or(0, |(_, local)| local.len());
        Ok(Carried::Done(u32::try_from(bytes).unwrap_or(u32::MAX)))
    }
}

/// Blocks of four pieces.
fn layer() -> RegionLayer {
    let stride = u64::from(PIECES) * PIECE;
    let side = |addr, key| RegionSide { addr, stride, key };
    let piece = |i: u64| RegionPiece {
        local: side(LOCAL + i * PIECE, 1),
        remote: side(REMOTE + i * PIECE, 2),
        len: PIECE,
    };
    RegionLayer {
        group: 0,
        layer: 0,
        local_blocks: BLOCKS,
        remote_blocks: BLOCKS,
        tensors: vec![(0..u64::from(PIECES)).map(piece).collect()],
    }
}

fn queue(bench: &Bench, slots: WqeSlots) -> Result<(Arc<WqeQueue>, Hca<WqeMemory, Done>)> {
    let config = WqeQueueConfig {
        bell: Bell::Kernel,
        slots,
        sq_depth: SqDepth::new(DEPTH)?,
        cq_depth: CqDepth::new(2 * DEPTH)?,
        qpn: Qpn::new(0x00ab_cdef)?,
        patience: Duration::from_secs(10),
    };
    let table = RegionTable::new(&bench.gpu, &[layer()])?;
    let (queue, queues): (_, Queues<WqeMemory>) = WqeQueue::new(&bench.gpu, &config, Some(table))?;
    let region = |addr| Region {
        addr,
        len: u64::from(BLOCKS * PIECES) * PIECE,
        writable: true,
    };
    let setup = HcaSetup {
        qpn: config.qpn,
        sq_depth: config.sq_depth,
        cq_depth: config.cq_depth,
        first: 0,
        keys: KeyTable {
            local: [(1, region(LOCAL))].into(),
            remote: [(2, region(REMOTE))].into(),
        },
    };
    Ok((Arc::new(queue), Hca::new(queues, setup, Done)?))
}

/// Seconds for `posts` posts by so many waves to each of some queues.
fn seconds(
    bench: &Bench,
    (queues, waves, posts): (usize, u32, usize),
    (by_places, slots): (bool, WqeSlots),
) -> Result<f64> {
    let word = |i: usize| {
        let block = (i % BLOCKS as usize) as u32;
        let of = Place {
            group: 0,
            tensor: ALL_TENSORS,
            layer: 0,
            block,
        };
        (of.to_word(), u64::from(block) * PIECE)
    };
    let moves: Vec<_> = (0..posts)
        .map(|i| match (word(i), by_places) {
            ((place, _), true) => Move {
                local: place,
                remote: place,
                len: u64::from(PIECES) * PIECE,
                flags: LOCAL_PLACE | REMOTE_PLACE,
                ..Move::default()
            },
            ((_, at), false) => Move {
                local: LOCAL + at,
                remote: REMOTE + at,
                len: PIECE,
                lkey: 1,
                rkey: 2,
                ..Move::default()
            },
        })
        .collect();
    let mut all = Vec::new();
    for _ in 0..queues {
        let prepared = bench.kernels.prepare(&Posts {
            moves: &moves,
            posters: waves,
            by: PostBy::Waves,
            op: PUT,
            until: IDLE,
        })?;
        all.push((queue(bench, slots)?, prepared, Stream::new(&bench.gpu)?));
    }
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut devices = Vec::new();
        let mut posting = Vec::new();
        for ((queue, mut hca), prepared, stream) in all {
            let over = &over;
            devices.push(scope.spawn(move || {
                while !over.load(Ordering::Acquire) {
                    hca.look(u64::MAX)?;
                    std::hint::spin_loop();
                }
                hca.look(u64::MAX)?;
                Ok::<_, kvxfer_verbs::mlx5::model::Violation>(hca.consumed())
            }));
            posting.push((queue, prepared, stream));
        }
        let start = Instant::now();
        let run = || -> Result<f64> {
            let mut running = Vec::new();
            for (queue, prepared, stream) in &posting {
                running.push(bench.kernels.launch(stream, queue, prepared)?);
            }
            for one in &running {
                super::spin(|| Ok(one.is_done()?))?;
            }
            let took = start.elapsed();
            for one in running {
                let results = one.wait(soon())?;
                if let Some(bad) = results.iter().find(|r| (r.posted, r.ended) != (0, 0)) {
                    return Err(format!("a post ended with {bad:?}").into());
                }
            }
            Ok(took.as_secs_f64())
        };
        let took = run();
        over.store(true, Ordering::Release);
        for device in devices {
            let consumed = device.join().map_err(|_| "the model panicked")??;
            let wanted = posts as u64 * if by_places { PIECES.into() } else { 1 };
            if took.is_ok() && consumed != wanted {
                return Err(format!("{consumed} of {wanted} WQEs were consumed").into());
            }
        }
        took
    })
}

/// WQEs a second.
pub(super) fn rates(report: &mut Report, bench: &Bench) -> Result<()> {
    println!("\nWQEs, to a model of an mlx5 device (no NIC)");
    let (pinned, own) = (WqeSlots::Pinned, WqeSlots::Gpu);
    for (queues, waves, by_places, slots, wanted) in [
        (1, 1, false, pinned, None),
        (1, 4, false, pinned, None),
        // The more there are, the more are ready while one rings; a GPU runs several hundred side by side.
        (1, 16, false, pinned, None),
        (1, 64, false, pinned, None),
        (1, 256, false, pinned, Some(1.0)),
        (1, 16, true, pinned, None),
        (4, 16, false, pinned, None),
        (4, 16, true, pinned, None),
        // The model copies them to read them.
        (1, 16, false, own, None),
    ] {
        let posts = bench.many(64_000) / waves as usize * waves as usize;
        let mut rates = Vec::new();
        for _ in 0..5 {
            let took = seconds(bench, (queues, waves, posts), (by_places, slots))?;
            let wqes = posts * queues * if by_places { PIECES as usize } else { 1 };
            rates.push(wqes as f64 / took / 1e6);
        }
        rates.sort_by(f64::total_cmp);
        let rate = rates.get(rates.len() / 2).copied().unwrap_or_default();
        let of = if by_places { "4" } else { "1" };
        let place = match slots {
            WqeSlots::Gpu => ", slots in the GPU's memory",
            _ => "",
        };
        let name =
            format!("{queues} queues, {waves} posting waves each, posts of {of} WQEs{place}");
        let wanted = wanted.map(|wanted| (wanted, rate >= wanted));
        line(report, &name, rate, "M WQEs/s", wanted);
    }
    Ok(())
}

/// What it takes to build one, in time and registers.
pub(super) fn cost(report: &mut Report, bench: &Bench) -> Result<()> {
    println!("\nthe cost of a WQE on the device");
    let kernel = bench.kernel(KVX_TIME_WQES)?;
    let bytes = 64 * u64::from(DEPTH);
    let (pinned, own) = (
        PinnedMemory::new(&bench.gpu, bytes)?,
        GpuMemory::new(&bench.gpu, bytes)?,
    );
    let results = PinnedMemory::new(&bench.gpu, 2 * size_of::<PostResult>() as u64)?;
    let moves = PinnedMemory::new(&bench.gpu, size_of::<Move>() as u64)?;
    let one = Move {
        local: LOCAL,
        remote: REMOTE,
        len: PIECE,
        lkey: 1,
        rkey: 2,
        ..Move::default()
    };
    moves.host().write(0, Move::bytes(&[one]))?;
    let count = bench.many(10_000) as u32;
    for (place, slots) in [
        ("pinned host memory", pinned.device_addr()),
        ("the GPU's memory", own.addr()),
    ] {
        let args = PostArgs {
            queue: Queue {
                slots,
                kind: DIRECT,
                depth: DEPTH,
                cq_depth: DEPTH,
                qpn: 1,
                ..Queue::default()
            },
            moves: moves.device_addr(),
            results: results.device_addr(),
            count,
            posters: 1,
            op: PUT,
            until: IDLE,
        };
        let (mut bare, mut fenced) = (Vec::new(), Vec::new());
        for _ in 0..5 {
            // SAFETY: slots, moves and results are held here, and as long as the argument says; nothing is waited for.
            unsafe { bench.time(&kernel, &args, None, || Ok(())) }?;
            let mut bytes = [0; 32];
            results.host().read(0, &mut bytes)?;
            let both: Vec<_> = bytes
                .as_chunks()
                .0
                .iter()
                .map(PostResult::from_bytes)
                .collect();
            let each = |r: &PostResult| bench.nanoseconds(r.ticket) / f64::from(count);
            bare.extend(both.first().map(each));
            fenced.extend(both.get(1).map(each));
        }
        for (name, mut all) in [("alone", bare), ("with its release", fenced)] {
            all.sort_by(f64::total_cmp);
            let half = all.get(all.len() / 2).copied().unwrap_or_default();
            line(
                report,
                &format!("a WQE in {place}, {name}"),
                half,
                "ns",
                None,
            );
        }
    }
    match kernel.registers()? {
        Some(registers) => {
            let name = "registers of a kernel that builds them";
            line(report, name, registers.into(), "registers", None);
        }
        None => println!("how many registers that takes, the runtime does not say"),
    }
    Ok(())
}
