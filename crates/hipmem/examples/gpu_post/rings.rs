//! A put that the host carries out, from the kernel's post to the end that the kernel sees; beside a flag to the host and
//! back, which is as short as that way can be.

use std::time::{Duration, Instant};

use kvxfer_hipmem::HostBuffer;
use kvxfer_hipmem::gpu::PinnedMemory;
use kvxfer_hipmem::kernels::queue::{EACH, Move, PUT, PostArgs, PostResult, Queue};
use kvxfer_hipmem::kernels::{KVX_TIME_ECHO, KVX_TIME_WAITS};
use kvxfer_hipmem::post::device::DeviceQueue;
use kvxfer_hipmem::post::{End, Status, Taken};

use super::report::Report;
use super::{Bench, Result, line};

const BYTES: u64 = 4096;

/// What was measured, after the first tenth.
fn times(bench: &Bench, results: &[PostResult]) -> Result<Vec<Duration>> {
    if let Some(bad) = results.iter().find(|r| (r.posted, r.ended) != (0, 0)) {
        return Err(format!("it ended with {bad:?}").into());
    }
    let warm = results.iter().skip(results.len() / 10);
    let each = warm.map(|r| Duration::from_nanos(bench.nanoseconds(r.ticket) as u64));
    Ok(each.collect())
}

/// The middle of them, in microseconds.
fn half(times: &[Duration]) -> f64 {
    let mut all = times.to_vec();
    all.sort_unstable();
    let half = all.get(all.len() / 2).copied().unwrap_or_default();
    half.as_secs_f64() * 1e6
}

/// What the host's copy takes by itself, in microseconds.
fn copy_alone(from: &PinnedMemory, to: &HostBuffer) -> Result<f64> {
    const TIMES: u32 = 10_000;
    let mut bytes = [0; BYTES as usize];
    let start = Instant::now();
    for _ in 0..TIMES {
        from.host().read(0, &mut bytes)?;
        to.memory().write(0, &bytes)?;
    }
    Ok(start.elapsed().as_secs_f64() * 1e6 / f64::from(TIMES))
}

pub(super) fn round_trips(report: &mut Report, bench: &Bench) -> Result<()> {
    println!("\nround trips of one thread of a kernel");
    let gpu = &bench.gpu;
    let count = bench.many(5000);
    let results = PinnedMemory::new(gpu, (count * size_of::<PostResult>()) as u64)?;
    let (queue, mut consumer) = DeviceQueue::new(gpu, 64, Duration::from_secs(5))?;
    let args = PostArgs {
        queue: queue.handle(),
        results: results.device_addr(),
        count: u32::try_from(count)?,
        posters: 1,
        op: PUT,
        until: EACH,
        ..PostArgs::default()
    };

    let flags = PinnedMemory::new(gpu, 128)?;
    flags.host().fill(0, 128, 0)?;
    let echo = PostArgs {
        queue: Queue {
            bell: flags.device_addr(),
            words: flags.device_addr() + 64,
            ..args.queue
        },
        ..args
    };
    let host = flags.host();
    let answer = || {
        host.store_u64(64, host.load_u64(0)?)?;
        Ok(())
    };
    let kernel = bench.kernel(KVX_TIME_ECHO)?;
    // SAFETY: flags, queue and results are held here, and there are as many results as it says.
    let all = unsafe { bench.time(&kernel, &echo, Some(&results), answer) }?;
    let all = times(bench, &all)?;
    let echo = half(&all);
    report.times("a flag to the host and back", all, None);

    let from = PinnedMemory::new(gpu, BYTES)?;
    from.host().fill(0, BYTES, 7)?;
    let to = HostBuffer::new(BYTES)?;
    let copy = copy_alone(&from, &to)?;
    line(report, "4 KiB copied by the host, alone", copy, "us", None);

    let moves = PinnedMemory::new(gpu, (count * size_of::<Move>()) as u64)?;
    let one = Move {
        local: from.device_addr(),
        remote: 0x7000_0000_0000,
        len: BYTES,
        lkey: 1,
        rkey: 2,
        ..Move::default()
    };
    moves.host().write(0, Move::bytes(&vec![one; count]))?;
    let args = PostArgs {
        moves: moves.device_addr(),
        ..args
    };
    let mut bytes = [0; BYTES as usize];
    let carry_out = || {
        let Some(taken) = consumer.take(queue.ring())? else {
            return Ok(());
        };
        let Taken::Post(post) = taken else {
            return Err(format!("{taken:?}").into());
        };
        let (End::Address { addr, .. }, BYTES) = (post.local, post.len) else {
            return Err(format!("{post:?}").into());
        };
        from.host().read(addr - from.device_addr(), &mut bytes)?;
        to.memory().write(0, &bytes)?;
        consumer.complete(queue.ring(), post.ticket, Status::Ok)??;
        Ok(())
    };
    let kernel = bench.kernel(KVX_TIME_WAITS)?;
    // SAFETY: moves, queue and results are held here, and there are as many as it says; what the moves name the kernel
    // does not touch.
    let all = unsafe { bench.time(&kernel, &args, Some(&results), carry_out) }?;
    // As long as two flags, and the copy.
    let wanted = (200.0 * echo + 100.0 * copy).ceil() / 100.0;
    let name = "a put of 4 KiB that the host carries out";
    report.times(name, times(bench, &all)?, Some(wanted));
    let mut found = [0; BYTES as usize];
    to.memory().read(0, &mut found)?;
    match found.iter().all(|byte| *byte == 7) {
        true => Ok(()),
        false => Err("the bytes are not there".into()),
    }
}
