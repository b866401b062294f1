//! How fast scattered blocks go between two GPUs, or between one and the host, beside one large copy of the copy
//! engine in the same run. Prints a table, and JSON lines into the file that is named.
//!
//! `KVXFER_TEST_GPU=cuda gpu_table [FILE]`; with `host` it runs, small, on the stand-in.

mod layout;
mod report;

use std::error::Error;
use std::time::{Duration, Instant};

use kvxfer_hipmem::gather::{GatherEnd, GatherOptions, GatherTable, GpuKernels};
use kvxfer_hipmem::gpu::{
    Copy, Event, Gpu, GpuMemory, GpuRuntime, Pending, PinnedMemory, RuntimeChoice, RuntimeKind,
    Stream,
};
use kvxfer_hipmem::kernels::Pair;

use layout::{Layout, Memory};
use report::{Case, Report};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// Looks without rest until something has ended.
fn spin(mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = soon();
    while !done()? {
        if Instant::now() > deadline {
            return Err("it did not end".into());
        }
        std::hint::spin_loop();
    }
    Ok(())
}

fn ended(pending: &Pending) -> Result<()> {
    spin(|| Ok(pending.is_done()?))
}

fn gather(table: &GatherTable, stream: &Stream, pairs: &[Pair]) -> Result<Duration> {
    let start = Instant::now();
    let mut gather = table.gather(stream, &[pairs])?;
    let mut end = None;
    spin(|| {
        end = gather.poll();
        Ok(end.is_some())
    })?;
    let took = start.elapsed();
    match end {
        Some(GatherEnd::Whole) => Ok(took),
        other => Err(format!("a gather ended with {other:?}").into()),
    }
}

fn limit<'a>(stream: &'a Stream, (src, dst): (&'a Memory, &'a Memory), len: u64) -> Case<'a> {
    Case::new("limit: one copy by the copy engine", len, None, move || {
        let start = Instant::now();
        let copy = Copy {
            dst: dst.at(0),
            src: src.at(0),
            len,
        };
        ended(&stream.copy(&[copy])?)?;
        Ok(start.elapsed())
    })
}

/// A gather of all blocks of a layout.
fn scattered<'a>(
    name: impl Into<String>,
    kernels: &GpuKernels,
    stream: &'a Stream,
    sides: (&Memory, &Memory),
    layout: Layout,
    options: GatherOptions,
    wanted: Option<f64>,
) -> Result<Case<'a>> {
    let table = layout.table(kernels, sides, options)?;
    let pairs = layout.scattered();
    let run = move || gather(&table, stream, &pairs);
    Ok(Case::new(name, layout.bytes(), wanted, run))
}

/// Runs of `run` bytes, each of blocks of 64 KiB behind each other on both sides.
fn merged<'a>(
    kernels: &GpuKernels,
    stream: &'a Stream,
    sides: (&Memory, &Memory),
    total: u64,
    (run, from): (u64, Option<u64>),
    wanted: Option<f64>,
) -> Result<Case<'a>> {
    let layout = Layout::of(total, 16, 64 * KIB);
    let options = GatherOptions {
        copy_engine_from: from,
        ..GatherOptions::default()
    };
    let table = layout.table(kernels, sides, options)?;
    let each = u32::try_from(run / layout.block)?;
    let runs = layout.blocks / each;
    let pairs: Vec<Pair> = (0..runs)
        .rev()
        .zip(0..)
        .flat_map(|(src, dst)| {
            (0..each).map(move |i| Pair {
                src: src * each + i,
                dst: dst * each + i,
            })
        })
        .collect();
    let how = match from {
        None => "",
        Some(0) => ", by the kernel",
        Some(_) => ", by the copy engine",
    };
    let name = format!("runs of {} MiB{how}", run / MIB);
    Ok(Case::new(name, layout.bytes(), wanted, move || {
        gather(&table, stream, &pairs)
    }))
}

/// All that goes one way.
fn one_way(
    report: &mut Report,
    way: &str,
    kernels: &GpuKernels,
    sides: (&Memory, &Memory),
    total: u64,
    wanted: Wanted,
) -> Result<()> {
    let gpu = kernels.gpu();
    let stream = Stream::new(gpu)?;
    let none = GatherOptions::default();
    let mut cases = vec![limit(&stream, sides, total)];
    for (kib, wanted) in [(4, wanted.small), (16, wanted.large), (64, wanted.large)] {
        let layout = Layout::of(total, 64, kib * KIB);
        let name = format!("scattered blocks of {kib} KiB");
        cases.push(scattered(
            name, kernels, &stream, sides, layout, none, wanted,
        )?);
    }
    let layout = Layout::of(total, 64, 16 * KIB);
    let few = GatherOptions {
        max_workgroups: Some(32),
        ..none
    };
    cases.push(scattered(
        "16 KiB, at most 32 workgroups",
        kernels,
        &stream,
        sides,
        layout,
        few,
        wanted.few,
    )?);
    if wanted.merged.is_some() {
        // 80 layers, K and V, blocks of 16 tokens of 8 heads of 128 numbers of 2 bytes.
        let llama = Layout {
            tensors: 160,
            block: 16 * 8 * 128 * 2,
            blocks: u32::try_from((total / 160 / (32 * KIB)).min(8192 / 16))?,
        };
        cases.push(scattered(
            "Llama-3.1-70B TP1, 8192 tokens",
            kernels,
            &stream,
            sides,
            llama,
            none,
            wanted.llama,
        )?);
        for mib in [4, 16, 64] {
            cases.push(merged(
                kernels,
                &stream,
                sides,
                total,
                (mib * MIB, None),
                wanted.merged,
            )?);
        }
    }
    report.compare(way, cases);

    // What the defaults were chosen by.
    let mut cases = vec![limit(&stream, sides, total)];
    for (workgroups, threads) in [
        (4, 1024),
        (8, 1024),
        (16, 512),
        (16, 1024),
        (24, 1024),
        (32, 512),
        (32, 1024),
        (64, 512),
        (132, 256),
        (132, 512),
        (132, 1024),
        (264, 1024),
    ] {
        let options = GatherOptions {
            workgroups: Some(workgroups),
            threads: Some(threads),
            ..none
        };
        let name = format!("16 KiB, {workgroups} x {threads}");
        cases.push(scattered(
            name, kernels, &stream, sides, layout, options, None,
        )?);
    }
    for mib in [1, 2, 4, 8, 16] {
        cases.push(merged(
            kernels,
            &stream,
            sides,
            total,
            (mib * MIB, Some(0)),
            None,
        )?);
        cases.push(merged(
            kernels,
            &stream,
            sides,
            total,
            (mib * MIB, Some(MIB)),
            None,
        )?);
    }
    report.compare(&format!("{way}: by workgroups and by runs"), cases);
    Ok(())
}

/// The parts of the limit that a way should have.
#[derive(Clone, Copy, Default)]
struct Wanted {
    small: Option<f64>,
    large: Option<f64>,
    few: Option<f64>,
    merged: Option<f64>,
    llama: Option<f64>,
}

/// Times of single things, of which each is made many times.
fn small_times(
    report: &mut Report,
    name: &str,
    kernels: &GpuKernels,
    sides: (&Memory, &Memory),
) -> Result<()> {
    let gpu = kernels.gpu();
    let stream = Stream::new(gpu)?;
    println!("\n{name}");
    let layout = Layout {
        tensors: 1,
        block: 16 * KIB,
        blocks: 1000,
    };
    let table = layout.table(kernels, sides, GatherOptions::default())?;
    let pairs = layout.scattered();
    let (mut ends, mut submits, mut inside) = (Vec::new(), Vec::new(), Vec::new());
    for pair in pairs.iter().cycle().take(2000) {
        let start = Instant::now();
        let mut one = table.gather(&stream, &[&[*pair]])?;
        let submitted = start.elapsed();
        spin(|| match one.poll() {
            Some(GatherEnd::Whole) => Ok(true),
            None => Ok(false),
            Some(other) => Err(format!("{other:?}").into()),
        })?;
        ends.push(start.elapsed());
        submits.push(submitted);
        inside.push(Duration::from_nanos(one.ticks()?));
    }
    report.times(
        "one block of 16 KiB, from the call to its end",
        ends.split_off(1000),
        Some(15.0),
    );
    report.times("  of which the call", submits.split_off(1000), None);
    if gpu.runtime() == RuntimeKind::Cuda {
        report.times("  of which inside the kernel", inside.split_off(1000), None);
    }
    for blocks in [100_usize, 1000, 100_000] {
        let layout = Layout {
            tensors: 1,
            block: 512,
            blocks: u32::try_from(blocks)?,
        };
        let table = layout.table(kernels, sides, GatherOptions::default())?;
        let pairs = layout.scattered();
        let (mut calls, mut ends) = (Vec::new(), Vec::new());
        for _ in 0..200 {
            let start = Instant::now();
            let mut one = table.gather(&stream, &[&pairs])?;
            calls.push(start.elapsed());
            spin(|| Ok(one.poll().is_some()))?;
            ends.push(start.elapsed());
        }
        report.times(
            &format!("{blocks} blocks of 512 bytes, the call"),
            calls,
            None,
        );
        report.times(
            &format!("{blocks} blocks of 512 bytes, to their end"),
            ends,
            None,
        );
    }
    Ok(())
}

fn fence_times(report: &mut Report, kernels: &GpuKernels, sides: (&Memory, &Memory)) -> Result<()> {
    let gpu = kernels.gpu();
    let stream = Stream::new(gpu)?;
    println!("\nfences");
    for blocks in [1, 100_000] {
        let layout = Layout {
            tensors: 1,
            block: 512,
            blocks,
        };
        let table = layout.table(kernels, sides, GatherOptions::default())?;
        let pairs = layout.scattered();
        let (mut walls, mut gpus) = (Vec::new(), Vec::new());
        for _ in 0..200 {
            gather(&table, &stream, &pairs)?;
            spin(|| Ok(stream.is_done()?))?;
            let start = Instant::now();
            let fence = kernels.acquire(&stream)?;
            spin(|| Ok(fence.event().is_done()?))?;
            walls.push(start.elapsed());
            fence.wait(soon())?;
            let (first, last) = (Event::with_timing(gpu)?, Event::with_timing(gpu)?);
            first.record(&stream)?;
            kernels.acquire(&stream)?;
            last.record(&stream)?;
            last.wait(soon())?;
            gpus.push(last.since(&first)?);
        }
        report.times(
            &format!("acquire after {blocks} blocks, from the call to its end"),
            walls,
            None,
        );
        report.times(
            &format!("acquire after {blocks} blocks, between two events"),
            gpus,
            Some(10.0),
        );
    }
    for (name, release) in [("acquire", false), ("release", true)] {
        let mut each = Vec::new();
        for _ in 0..20 {
            let (first, last) = (Event::with_timing(gpu)?, Event::with_timing(gpu)?);
            first.record(&stream)?;
            for _ in 0..100 {
                match release {
                    false => kernels.acquire(&stream)?,
                    true => kernels.release(&stream)?,
                };
            }
            last.record(&stream)?;
            last.wait(soon())?;
            each.push(last.since(&first)? / 100);
        }
        report.times(
            &format!("{name}, each of 100 behind each other"),
            each,
            Some(10.0),
        );
    }
    Ok(())
}

fn abort_times(report: &mut Report, kernels: &GpuKernels, sides: (&Memory, &Memory)) -> Result<()> {
    println!("\naborts");
    let stream = Stream::new(kernels.gpu())?;
    let layout = Layout {
        tensors: 1,
        block: 64 * KIB,
        blocks: 64,
    };
    let table = layout.table(kernels, sides, GatherOptions::default())?;
    let pairs: Vec<Pair> = layout
        .scattered()
        .into_iter()
        .cycle()
        .take(1 << 21)
        .collect();
    let mut ends = Vec::new();
    for _ in 0..10 {
        let mut long = table.gather(&stream, &[&pairs])?;
        std::thread::sleep(Duration::from_millis(5));
        if long.poll().is_some() {
            return Err("it ended before it was told".into());
        }
        let start = Instant::now();
        long.abort()?;
        spin(|| match long.poll() {
            Some(GatherEnd::Aborted { .. }) => Ok(true),
            None => Ok(false),
            Some(other) => Err(format!("{other:?}").into()),
        })?;
        ends.push(start.elapsed());
    }
    report.times("from the call to the launch's end", ends, None);
    Ok(())
}

fn tried(report: &mut Report, name: &str, done: Result<()>) {
    if let Err(e) = done {
        report.short += 1;
        println!("{name} FAILED: {e}");
    }
}

fn run(gpus: &[Gpu], report: &mut Report) -> Result<()> {
    let near = gpus.first().ok_or("no device")?;
    let host = near.runtime() == RuntimeKind::Host;
    let kernels = GpuKernels::load(near)?;
    let (total, pinned) = match host {
        true => (256 * MIB, 256 * MIB),
        false => (4096 * MIB, 1024 * MIB),
    };
    let memory = |gpu: &Gpu| Ok::<_, Box<dyn Error>>(Memory::Gpu(GpuMemory::new(gpu, total)?));
    let (ours, more) = (memory(near)?, memory(near)?);
    if let Some(far) = gpus.get(1) {
        near.enable_access(far)?;
        let theirs = memory(far)?;
        let wanted = Wanted {
            small: Some(0.91),
            large: Some(0.93),
            few: Some(0.85),
            merged: Some(0.98),
            llama: Some(0.93),
        };
        let read = one_way(
            report,
            "READ: pulled from another GPU",
            &kernels,
            (&theirs, &ours),
            total,
            wanted,
        );
        tried(report, "READ", read);
        let wanted = Wanted {
            large: Some(0.92),
            few: None,
            ..wanted
        };
        let write = one_way(
            report,
            "WRITE: pushed into another GPU",
            &kernels,
            (&ours, &theirs),
            total,
            wanted,
        );
        tried(report, "WRITE", write);
        let times = small_times(
            report,
            "single transfers, pulled from another GPU",
            &kernels,
            (&theirs, &ours),
        );
        tried(report, "single transfers", times);
        let times = small_times(
            report,
            "single transfers, pushed into another GPU",
            &kernels,
            (&ours, &theirs),
        );
        tried(report, "single transfers", times);
        let fences = fence_times(report, &kernels, (&theirs, &ours));
        tried(report, "fences", fences);
        let aborts = abort_times(report, &kernels, (&theirs, &ours));
        tried(report, "aborts", aborts);
    }
    let local = one_way(
        report,
        "local: inside one GPU's memory",
        &kernels,
        (&more, &ours),
        total,
        Wanted::default(),
    );
    tried(report, "local", local);
    let times = small_times(
        report,
        "single transfers inside one GPU's memory",
        &kernels,
        (&more, &ours),
    );
    tried(report, "single transfers", times);
    if gpus.len() < 2 {
        let fences = fence_times(report, &kernels, (&more, &ours));
        tried(report, "fences", fences);
        let aborts = abort_times(report, &kernels, (&more, &ours));
        tried(report, "aborts", aborts);
    }
    drop(more);
    let host = Memory::Pinned(PinnedMemory::new(near, pinned)?);
    let wanted = Wanted {
        large: Some(0.9),
        ..Wanted::default()
    };
    let down = one_way(
        report,
        "from pinned host memory",
        &kernels,
        (&host, &ours),
        pinned,
        wanted,
    );
    tried(report, "from pinned host memory", down);
    let up = one_way(
        report,
        "to pinned host memory",
        &kernels,
        (&ours, &host),
        pinned,
        wanted,
    );
    tried(report, "to pinned host memory", up);
    Ok(())
}

fn main() -> Result<()> {
    let name = std::env::var("KVXFER_TEST_GPU").unwrap_or_else(|_| "auto".to_owned());
    let choice: RuntimeChoice = name.parse()?;
    let runtime = GpuRuntime::open(choice)?;
    for gpu in runtime.gpus() {
        println!(
            "{gpu:?}, {} units, {} GiB",
            gpu.info().compute_units,
            gpu.info().memory >> 30
        );
    }
    let mut report = Report::default();
    let ran = run(runtime.gpus(), &mut report);
    if let Some(file) = std::env::args().nth(1) {
        std::fs::write(file, &report.json)?;
    }
    ran?;
    println!("\n{} below what is wanted, or failed", report.short);
    Ok(())
}
