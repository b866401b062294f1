//! A producer kernel that fills blocks and pushes them layer by layer, with no call of its program's between the two;
//! the consumer compares every byte.
//!
//! ```sh
//! cargo run --release -p kvxfer --example gpu_push -- --gpu auto
//! ```
//!
//! The kernel is `kvx_produce` of `kernels/post.hip`: each workgroup makes a block of a layer and calls
//! `kvx_put_block` for it (`kernels/post.h`), then the next; at last it waits for its posts. On a machine with no GPU
//! it is the host build of the same source, in a thread; the first line says which.
//!
//! With `--queue gpu-wqe` or `direct` the kernel writes a NIC's work requests, of which a model of the NIC has each carried
//! out.
//!
//! Two engines meet in one process, which a real deployment has two of. With a GPU the blocks lie in its memory and
//! the consumer's GPU fetches them; without, they lie in the host's memory, and go over shared memory.

use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use kvxfer::Engine;
use kvxfer::bench::{BenchMemory, BenchShape, BenchSide};
use kvxfer::blocks::{BlockPair, GroupBlocks, GroupPairs};
use kvxfer::config::{Config, KvRole};
use kvxfer::engine::{Instance, Outcome};
use kvxfer::event::Event;
use kvxfer::gpu_queue::{GpuQueueConfig, Hca, Kernels, Pace, QueueKind};
use kvxfer::ids::RequestId;
use kvxfer::layout::{KvFormat, Topology};
use kvxfer::mem::gpu::{Gpu, GpuRuntime, RuntimeChoice, RuntimeKind, Stream};
use kvxfer::mem::kernels::Pair;
use kvxfer::mem::post::Status;
use kvxfer::mem::post::device::PostKernels;

const LIMIT: Duration = Duration::from_secs(60);
const SEED: u64 = 7;
const USAGE: &str = "usage: gpu_push [--gpu auto|hip|cuda|host] [--queue proxy|gpu-wqe|direct] [--blocks N] [--layers N] \
     [--block-bytes N]";

/// Whatever went wrong.
type Failed = Box<dyn Error + Send + Sync>;

struct Options {
    gpu: RuntimeChoice,
    queue: QueueKind,
    blocks: u32,
    layers: u32,
    block_bytes: u64,
}

fn options() -> Result<Options, Failed> {
    let mut options = Options {
        gpu: RuntimeChoice::Auto,
        queue: QueueKind::Proxy,
        blocks: 256,
        layers: 8,
        block_bytes: 16 << 10,
    };
    let mut args = std::env::args().skip(1);
    while let Some(flag) = args.next() {
        let value = args.next().ok_or_else(|| format!("{flag}: no value"))?;
        match flag.as_str() {
            "--gpu" => options.gpu = value.parse()?,
            "--queue" => options.queue = queue(&value)?,
            "--blocks" => options.blocks = value.parse()?,
            "--layers" => options.layers = value.parse()?,
            "--block-bytes" => options.block_bytes = value.parse()?,
            _ => return Err(format!("{flag} {value}: not understood").into()),
        }
    }
    Ok(options)
}

fn queue(name: &str) -> Result<QueueKind, Failed> {
    Ok(match name {
        "proxy" => QueueKind::Proxy,
        "gpu-wqe" => QueueKind::GpuWqe(Hca::Model),
        "direct" => QueueKind::Direct(Hca::Model),
        _ => return Err(format!("--queue {name}: not understood").into()),
    })
}

/// The GPU whose kernels push: a real one if there is one, unless the stand-in was asked for.
fn gpu(choice: RuntimeChoice) -> Result<Gpu, Failed> {
    let runtime = match (GpuRuntime::open(choice), choice) {
        (Ok(runtime), _) => runtime,
        (Err(error), RuntimeChoice::Auto) => {
            eprintln!("gpu_push: warning: {error}");
            GpuRuntime::open(RuntimeChoice::Only(RuntimeKind::Host))?
        }
        (Err(error), _) => return Err(error.into()),
    };
    Ok(runtime.gpu(0)?.clone())
}

/// One rank with its memory.
fn rank(role: KvRole, options: &Options, gpu: &Gpu) -> Result<(Engine, BenchSide), Failed> {
    let format = KvFormat::opaque(options.block_bytes, options.layers)?;
    let memory = match gpu.runtime() {
        RuntimeKind::Host => BenchMemory::Arena,
        kind => BenchMemory::Gpu {
            runtime: RuntimeChoice::Only(kind),
            ordinal: gpu.info().ordinal,
        },
    };
    let side = BenchSide::new(&BenchShape {
        num_blocks: vec![options.blocks],
        topology: Topology::single(&format),
        format,
        memory,
    })?;
    side.poison()?;
    let mut config = Config::default();
    config.kv_role = role;
    let engine = Engine::new(config, side.format().clone(), side.placement().clone())?;
    Ok((engine, side))
}

/// The kernel's part: `instance` is where the blocks go. How long it took.
fn push(
    instance: &Instance,
    side: &BenchSide,
    (gpu, kind): (&Gpu, QueueKind),
    request: &RequestId,
    pairs: &[BlockPair],
) -> Result<Duration, Failed> {
    let push = instance.begin_push(request)?;
    let mut config = GpuQueueConfig::new(gpu);
    config.kind = kind;
    config.pace = Pace::Armed;
    let queue = push.gpu_queue(&config)?;

    // An engine's own kernel is given `queue.handle()`; this one is built in.
    let kernels = PostKernels::load(gpu)?;
    let stream = Stream::new(gpu)?;
    let reached = side.reach(gpu)?;
    let layers = side.produce(&reached, &queue, SEED);
    let pairs: Vec<Pair> = pairs
        .iter()
        .map(|pair| Pair {
            src: pair.src,
            dst: pair.dst,
        })
        .collect();
    let begun = Instant::now();
    let kernel = kernels.produce(&stream, queue.device(), &layers, &pairs)?;

    // Nothing is done here while it runs. Behind it nothing more is posted.
    queue.finish(Kernels::Behind(kernel.event()), LIMIT)?;
    let took = begun.elapsed();
    for result in kernel.wait(Instant::now() + LIMIT)? {
        let ok = Status::Ok.number();
        if (result.posted, result.ended) != (ok, ok) {
            return Err(format!("a post ended badly: {result:?}").into());
        }
    }
    match push.commit()?.wait(LIMIT) {
        Some(Outcome::Done) => Ok(took),
        other => Err(format!("the push: {other:?}").into()),
    }
}

fn run(options: &Options) -> Result<(), Failed> {
    let gpu = gpu(options.gpu)?;
    match gpu.runtime() {
        RuntimeKind::Host => println!("executor: host-build (the kernel runs on the processor)"),
        kind => println!("executor: gpu ({}, {kind})", gpu.info().name),
    }
    if options.queue.hca().is_some() {
        println!("hca: model (a worker reads the work requests as a NIC would; there is none)");
    }
    let (producer, source) = rank(KvRole::Producer, options, &gpu)?;
    let (consumer, destination) = rank(KvRole::Consumer, options, &gpu)?;
    let address = consumer.listen("127.0.0.1:0")?;
    let instance = producer.connect(&address.to_string(), LIMIT)?;

    // Half of the consumer's blocks, in another order than the producer's.
    let request = RequestId::from("r1");
    let wanted = options.blocks.div_ceil(2);
    let pairs: Vec<BlockPair> = (0..wanted)
        .map(|b| BlockPair {
            src: options.blocks - 1 - b,
            dst: b,
        })
        .collect();
    let blocks = pairs.iter().map(|pair| pair.dst).collect();
    consumer.expect(&request, &[GroupBlocks { group: 0, blocks }], 1, LIMIT)?;
    let took = push(&instance, &source, (&gpu, options.queue), &request, &pairs)?;

    let mut events = Vec::new();
    let until = Instant::now() + LIMIT;
    let received = |event: &Event| matches!(event, Event::Received { .. });
    while !events.iter().any(received) {
        if Instant::now() > until {
            return Err("the consumer has not heard of the end".into());
        }
        consumer.wait_events(&mut events, Duration::from_millis(100));
    }
    let bytes = destination.verify(SEED, &[GroupPairs { group: 0, pairs }])?;
    println!(
        "{bytes} bytes of {} layers made, pushed and verified, over {}; the kernel took {took:.1?}",
        options.layers,
        instance.path()?.path,
    );
    Ok(())
}

fn main() -> ExitCode {
    let done = options()
        .map_err(|error| format!("{error}\n{USAGE}").into())
        .and_then(|options| run(&options));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gpu_push: {error}");
            ExitCode::FAILURE
        }
    }
}
