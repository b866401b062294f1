//! How fast kernels post: blocks that they push over GPU links, beside one large copy of the copy engine; WQEs, to a model
//! of an mlx5 device that threads of this process are; and a put of 4 KiB that the host carries out, beside a flag to
//! the host and back. Prints a table, and JSON lines into the file that is named.
//!
//! `KVXFER_TEST_GPU=cuda gpu_post [FILE]`; with `host` it runs, small, on the stand-in.

#[path = "../gpu_table/report.rs"]
mod report;
mod rings;
mod wqes;

use std::error::Error;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer_hipmem::gpu::{
    Copy, Gpu, GpuMemory, GpuRuntime, Kernel, Module, PinnedMemory, Place as At, RuntimeChoice,
    RuntimeKind, Stream,
};
use kvxfer_hipmem::kernels::posts_for_target;
use kvxfer_hipmem::kernels::queue::{
    ALL_TENSORS, LOCAL_PLACE, Move, PostArgs, PostResult, REMOTE_PLACE,
};
use kvxfer_hipmem::post::Place;
use kvxfer_hipmem::post::device::{LinkLayer, LinkPiece, LinkQueue, LinkSide, PostKernels};

use report::{Case, Report};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// A GPU, its kernels, and how large things are.
struct Bench {
    gpu: Gpu,
    kernels: PostKernels,
    stream: Stream,
    module: Module,
    on_host: bool,
}

impl Bench {
    fn new(gpu: &Gpu) -> Result<Self> {
        let on_host = gpu.runtime() == RuntimeKind::Host;
        let image = posts_for_target(if on_host { "host" } else { &gpu.info().arch })?;
        // SAFETY: it is what the compiler made of kernels/.
        let module = unsafe { Module::load(gpu, image.bytes) }?;
        Ok(Self {
            gpu: gpu.clone(),
            kernels: PostKernels::load(gpu)?,
            stream: Stream::new(gpu)?,
            module,
            on_host,
        })
    }

    fn kernel(&self, name: &str) -> Result<Kernel> {
        Ok(self.module.kernel(name)?)
    }

    /// A number of things: fewer on the stand-in.
    fn many(&self, n: usize) -> usize {
        if self.on_host { n / 50 } else { n }
    }

    /// Nanoseconds of the clock that kernels look at; on the stand-in its own ticks.
    fn nanoseconds(&self, ticks: u64) -> f64 {
        let each = match self.gpu.runtime() {
            RuntimeKind::Hip => 10.0,
            RuntimeKind::Cuda | RuntimeKind::Host => 1.0,
        };
        ticks as f64 * each
    }

    /// Runs a timing kernel, while `serve` is called until it has ended; what it has left in `results`.
    ///
    /// # Safety
    ///
    /// All that the argument names is there until this returns, and as long as it says, and no call of the kernel waits
    /// for longer than the queue's patience.
    unsafe fn time(
        &self,
        kernel: &Kernel,
        args: &PostArgs,
        results: Option<&PinnedMemory>,
        mut serve: impl FnMut() -> Result<()>,
    ) -> Result<Vec<PostResult>> {
        // SAFETY: the caller's promise, and this waits until the kernel has ended.
        let running = unsafe { kernel.launch(&self.stream, 1, 32, args.bytes()) }?;
        let deadline = soon();
        while !running.is_done()? {
            // Asking the driver takes as long as many looks.
            let served = (0..4096).try_for_each(|_| serve());
            if Instant::now() > deadline || served.is_err() {
                // What it touches cannot be given back while it runs.
                eprintln!("a kernel does not end: {served:?}");
                std::process::exit(1);
            }
        }
        running.wait(soon())?;
        let Some(results) = results else {
            return Ok(Vec::new());
        };
        let mut bytes = vec![0; args.count as usize * size_of::<PostResult>()];
        results.host().read(0, &mut bytes)?;
        let all = bytes.as_chunks::<16>().0.iter();
        Ok(all.map(PostResult::from_bytes).collect())
    }
}

/// A line of its own, and whether it is what is wanted.
fn line(report: &mut Report, name: &str, value: f64, unit: &str, wanted: Option<(f64, bool)>) {
    let (words, json, short) = match wanted {
        None => (String::new(), "null".to_owned(), false),
        Some((wanted, good)) => {
            let mark = if good { "" } else { " SHORT" };
            let words = format!("  wanted {wanted:.2}{mark}");
            (words, format!("{wanted:.3}"), !good)
        }
    };
    report.short += usize::from(short);
    println!("{name:<66} {value:>9.2} {unit}{words}");
    let _ = writeln!(
        report.json,
        "{{\"case\":\"{name}\",\"value\":{value:.3},\"unit\":\"{unit}\",\"wanted\":{json}}}"
    );
}

/// A queue over links for `blocks` blocks of so many bytes, and a put of each, in no order.
fn scattered(
    gpu: &Gpu,
    (from, to): (&GpuMemory, &GpuMemory),
    bytes: u64,
    blocks: u32,
) -> Result<(Arc<LinkQueue>, Vec<Move>)> {
    let side = |memory| LinkSide {
        place: At::Gpu(memory, 0),
        stride: bytes,
    };
    let piece = LinkPiece {
        local: side(from),
        remote: side(to),
        len: bytes,
    };
    let layer = LinkLayer {
        group: 0,
        layer: 0,
        local_blocks: blocks,
        remote_blocks: blocks,
        tensors: vec![vec![piece]],
    };
    let queue = LinkQueue::new(gpu, &[layer])?;
    let place = |block: u32| {
        let of = Place {
            group: 0,
            tensor: ALL_TENSORS,
            layer: 0,
            block,
        };
        of.to_word()
    };
    // Odd, so that each comes once where their number is a power of two.
    let mixed = |i: u32, by: u32| i.wrapping_mul(by) % blocks;
    let moves = (0..blocks).map(|i| Move {
        local: place(mixed(i, 40_503)),
        remote: place(mixed(i, 30_011)),
        len: bytes,
        flags: LOCAL_PLACE | REMOTE_PLACE,
        ..Move::default()
    });
    Ok((Arc::new(queue), moves.collect()))
}

/// Blocks that kernels push, beside one copy of as many bytes.
fn links(report: &mut Report, bench: &Bench, gpus: &[Gpu]) -> Result<()> {
    let gpu = &bench.gpu;
    let total = if bench.on_host { MIB } else { 1024 * MIB };
    let near = GpuMemory::new(gpu, total)?;
    let (way, wanted, far) = match gpus.get(1) {
        Some(other) => {
            gpu.enable_access(other)?;
            let far = GpuMemory::new(other, total)?;
            ("pushed into another GPU by a kernel", Some(0.9), far)
        }
        None => {
            let far = GpuMemory::new(gpu, total)?;
            ("pushed inside one GPU's memory by a kernel", None, far)
        }
    };
    let stream = Stream::new(gpu)?;
    let (ours, theirs) = (&near, &far);
    let copy = move || {
        let start = Instant::now();
        let copy = Copy {
            dst: At::Gpu(theirs, 0),
            src: At::Gpu(ours, 0),
            len: total,
        };
        let pending = stream.copy(&[copy])?;
        spin(|| Ok(pending.is_done()?))?;
        Ok(start.elapsed())
    };
    let mut cases = vec![Case::new(
        "limit: one copy by the copy engine",
        total,
        None,
        copy,
    )];
    let units = gpu.info().compute_units.max(1);
    for (kib, workgroups, wanted) in [
        (16, 4 * units, wanted),
        (16, 2 * units, None),
        (16, units, None),
        (16, units / 2, None),
        (16, 32, None),
        (4, 4 * units, None),
        (64, 2 * units, None),
        (256, units, None),
    ] {
        let blocks = u32::try_from(total / (kib * KIB))?;
        let (queue, moves) = scattered(gpu, (&near, &far), kib * KIB, blocks)?;
        let push = bench.kernels.prepare_push(&bench.stream, &moves)?;
        let name = format!("scattered blocks of {kib} KiB, {workgroups} workgroups");
        let run = move || {
            let start = Instant::now();
            let posting = bench
                .kernels
                .push(&bench.stream, &queue, &push, workgroups)?;
            spin(|| Ok(posting.is_done()?))?;
            let took = start.elapsed();
            let results = posting.wait(soon())?;
            match results.iter().find(|r| (r.posted, r.ended) != (0, 0)) {
                Some(bad) => Err(format!("a put ended with {bad:?}").into()),
                None => Ok(took),
            }
        };
        cases.push(Case::new(name, total, wanted, run));
    }
    report.compare(way, cases);
    Ok(())
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

fn tried(report: &mut Report, name: &str, done: Result<()>) {
    if let Err(e) = done {
        report.short += 1;
        println!("{name}: FAILED: {e}");
        let _ = writeln!(report.json, "{{\"case\":\"{name}\",\"failed\":\"{e}\"}}");
    }
}

fn run(gpus: &[Gpu], report: &mut Report) -> Result<()> {
    let gpu = gpus.first().ok_or("no GPU")?;
    let bench = Bench::new(gpu)?;
    let done = links(report, &bench, gpus);
    tried(report, "puts over links", done);
    let done = wqes::rates(report, &bench);
    tried(report, "WQEs", done);
    let done = wqes::cost(report, &bench);
    tried(report, "the cost of a WQE", done);
    let done = rings::round_trips(report, &bench);
    tried(report, "round trips", done);
    Ok(())
}

fn main() -> Result<()> {
    let name = std::env::var("KVXFER_TEST_GPU").unwrap_or_else(|_| "auto".to_owned());
    let choice: RuntimeChoice = name.parse()?;
    let runtime = GpuRuntime::open(choice)?;
    let mut report = Report::default();
    let ran = run(runtime.gpus(), &mut report);
    if let Some(file) = std::env::args().nth(1) {
        std::fs::write(file, &report.json)?;
    }
    ran?;
    println!("\n{} below what is wanted, or failed", report.short);
    Ok(())
}
