//! What posts of kernels cost the workers that carry them out: so many pushes at a time, each with a queue that kernels
//! post small blocks to, into another process.
//!
//! ```sh
//! cargo run --release -p kvxfer --example post_rate -- --gpu auto --queues 4
//! ```
//!
//! It says posts a second from the first kernel's launch to the last push's outcome, and the processor time that the
//! producer's workers took for a post. Armed workers spin while there is nothing to do, so that figure is the cost of a
//! post only where they have always something to do: with no more queues than processors to spare.

use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use kvxfer::Engine;
use kvxfer::bench::{BenchMemory, BenchShape, BenchSide};
use kvxfer::blocks::{BlockPair, GroupBlocks, GroupPairs};
use kvxfer::config::{Config, KvRole};
use kvxfer::engine::{Outcome, PushOptions};
use kvxfer::event::Event;
use kvxfer::gpu_queue::{GpuQueueConfig, Kernels, Pace};
use kvxfer::ids::RequestId;
use kvxfer::layout::{KvFormat, Topology};
use kvxfer::mem::gpu::{Gpu, GpuRuntime, RuntimeChoice, RuntimeKind, Stream};
use kvxfer::mem::kernels::queue::{ALL, ALL_TENSORS, LOCAL_PLACE, Move, PUT, REMOTE_PLACE};
use kvxfer::mem::post::device::{PostBy, PostKernels, Posts};
use kvxfer::mem::post::{Place, Status};

const LIMIT: Duration = Duration::from_secs(60);
const SEED: u64 = 7;
/// The name of a worker's thread.
const WORKER: &str = "kvx-worker";
const USAGE: &str = "usage: post_rate [--gpu auto|hip|cuda|host] [--memory host|gpu] [--queues N] [--blocks N] \
    [--layers N] [--block-bytes N] [--depth N] [--posters N] [--rounds N]";

/// Whatever went wrong.
type Failed = Box<dyn Error + Send + Sync>;

#[derive(Clone)]
struct Options {
    gpu: RuntimeChoice,
    in_gpu: bool,
    queues: u32,
    /// Of each push.
    blocks: u32,
    layers: u32,
    block_bytes: u64,
    depth: u32,
    posters: u32,
    rounds: u32,
    consumer: bool,
}

fn options() -> Result<Options, Failed> {
    let mut options = Options {
        gpu: RuntimeChoice::Auto,
        in_gpu: false,
        queues: 1,
        blocks: 16384,
        layers: 4,
        block_bytes: 64,
        depth: 1024,
        posters: 1,
        rounds: 5,
        consumer: false,
    };
    let mut args = std::env::args().skip(1);
    while let Some(flag) = args.next() {
        if flag == "--consumer" {
            options.consumer = true;
            continue;
        }
        let value = args.next().ok_or_else(|| format!("{flag}: no value"))?;
        match flag.as_str() {
            "--gpu" => options.gpu = value.parse()?,
            "--memory" => options.in_gpu = value == "gpu",
            "--queues" => options.queues = value.parse::<u32>()?.max(1),
            "--blocks" => options.blocks = value.parse()?,
            "--layers" => options.layers = value.parse()?,
            "--block-bytes" => options.block_bytes = value.parse()?,
            "--depth" => options.depth = value.parse()?,
            "--posters" => options.posters = value.parse()?,
            "--rounds" => options.rounds = value.parse()?,
            _ => return Err(format!("{flag} {value}: not understood").into()),
        }
    }
    Ok(options)
}

/// A real GPU if there is one, unless the stand-in was asked for.
fn gpu(choice: RuntimeChoice) -> Result<Gpu, Failed> {
    let runtime = match (GpuRuntime::open(choice), choice) {
        (Ok(runtime), _) => runtime,
        (Err(_), RuntimeChoice::Auto) => GpuRuntime::open(RuntimeChoice::Only(RuntimeKind::Host))?,
        (Err(error), _) => return Err(error.into()),
    };
    Ok(runtime.gpu(0)?.clone())
}

fn rank(role: KvRole, options: &Options, gpu: &Gpu) -> Result<(Engine, BenchSide), Failed> {
    let format = KvFormat::opaque(options.block_bytes, options.layers)?;
    let memory = match options.in_gpu {
        false => BenchMemory::Arena,
        true => BenchMemory::Gpu {
            runtime: RuntimeChoice::Only(gpu.runtime()),
            ordinal: gpu.info().ordinal,
        },
    };
    let side = BenchSide::new(&BenchShape {
        num_blocks: vec![options.blocks * options.queues],
        topology: Topology::single(&format),
        format,
        memory,
    })?;
    let mut config = Config::default();
    config.kv_role = role;
    config.num_worker_threads = options.queues;
    let engine = Engine::new(config, side.format().clone(), side.placement().clone())?;
    Ok((engine, side))
}

fn request(round: u32, queue: u32) -> RequestId {
    RequestId::from(format!("r{round}.{queue}").as_str())
}

/// The blocks of one push.
fn pairs(options: &Options, queue: u32) -> Vec<BlockPair> {
    let blocks = queue * options.blocks..(queue + 1) * options.blocks;
    let pair = |b| BlockPair { src: b, dst: b };
    // Neighbours are not posted one after the other.
    let (even, odd): (Vec<u32>, Vec<u32>) = blocks.partition(|b| b % 2 == 0);
    even.into_iter().chain(odd).map(pair).collect()
}

/// The consumer's process: it expects all blocks of a round when it is told so, and looks at them at last.
fn consume(options: &Options) -> Result<(), Failed> {
    let gpu = gpu(options.gpu)?;
    let (consumer, side) = rank(KvRole::Consumer, options, &gpu)?;
    side.poison()?;
    println!("{}", consumer.listen("127.0.0.1:0")?);
    let mut byte = [0];
    let (mut events, until) = (Vec::new(), Instant::now() + LIMIT);
    for round in 0..options.rounds {
        std::io::stdin().read_exact(&mut byte)?;
        // The blocks are the last round's until all of it has been received.
        let received = |event: &&Event| matches!(event, Event::Received { .. });
        while events.iter().filter(received).count() < (round * options.queues) as usize {
            if Instant::now() > until {
                return Err("not all has been received".into());
            }
            consumer.wait_events(&mut events, Duration::from_millis(100));
        }
        for queue in 0..options.queues {
            let blocks = pairs(options, queue).iter().map(|pair| pair.dst).collect();
            let groups = [GroupBlocks { group: 0, blocks }];
            consumer.expect(&request(round, queue), &groups, 1, LIMIT)?;
        }
        println!("expected");
    }
    std::io::stdin().read_exact(&mut byte)?;
    for queue in 0..options.queues {
        let pairs = pairs(options, queue);
        side.verify(SEED, &[GroupPairs { group: 0, pairs }])?;
    }
    println!("verified");
    Ok(())
}

/// The producer's own consumer.
struct Other {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Other {
    fn start() -> Result<Self, Failed> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(std::env::args().skip(1).chain(["--consumer".to_owned()]))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = child.stdout.take().ok_or("no output")?;
        let lines = BufReader::new(lines);
        Ok(Self { child, lines })
    }

    fn line(&mut self) -> Result<String, Failed> {
        let mut line = String::new();
        self.lines.read_line(&mut line)?;
        match line.trim() {
            "" => Err("the consumer has ended".into()),
            line => Ok(line.to_owned()),
        }
    }

    fn tell(&mut self) -> Result<String, Failed> {
        let stdin = self.child.stdin.as_mut().ok_or("no input")?;
        stdin.write_all(b"x")?;
        stdin.flush()?;
        self.line()
    }
}

/// Processor time that the workers of this process have had, as `/proc` says it.
fn workers_time() -> Result<Duration, Failed> {
    let mut ns = 0;
    for task in std::fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        // Other threads may end meanwhile.
        let read = |name| std::fs::read_to_string(task.join(name));
        let (Ok(name), Ok(stat)) = (read("comm"), read("schedstat")) else {
            continue;
        };
        if name.trim() == WORKER {
            ns += stat.split(' ').next().unwrap_or("0").parse::<u64>()?;
        }
    }
    Ok(Duration::from_nanos(ns))
}

/// What the kernel of one push posts.
fn moves(options: &Options, queue: u32) -> Result<Vec<Move>, Failed> {
    let pairs = pairs(options, queue);
    let mut moves = Vec::with_capacity(pairs.len() * options.layers as usize);
    for layer in 0..u16::try_from(options.layers)? {
        let place = |block| {
            let place = Place {
                group: 0,
                tensor: ALL_TENSORS,
                layer,
                block,
            };
            place.to_word()
        };
        moves.extend(pairs.iter().map(|pair| Move {
            local: place(pair.src),
            remote: place(pair.dst),
            len: options.block_bytes,
            flags: LOCAL_PLACE | REMOTE_PLACE,
            ..Move::default()
        }));
    }
    Ok(moves)
}

fn produce(options: &Options) -> Result<(), Failed> {
    let gpu = gpu(options.gpu)?;
    match gpu.runtime() {
        RuntimeKind::Host => println!("executor: host-build (the kernel runs on the processor)"),
        kind => println!("executor: gpu ({}, {kind})", gpu.info().name),
    }
    let (producer, side) = rank(KvRole::Producer, options, &gpu)?;
    side.fill(SEED)?;
    let mut other = Other::start()?;
    let address = other.line()?;
    let instance = producer.connect(&address, LIMIT)?;
    let kernels = PostKernels::load(&gpu)?;
    let mut streams = Vec::new();
    let mut prepared = Vec::new();
    for queue in 0..options.queues {
        streams.push(Stream::new(&gpu)?);
        prepared.push(kernels.prepare(&Posts {
            moves: &moves(options, queue)?,
            posters: options.posters,
            by: PostBy::Waves,
            op: PUT,
            until: ALL,
        })?);
    }
    let posts = u64::from(options.blocks) * u64::from(options.layers) * u64::from(options.queues);
    for round in 0..options.rounds {
        other.tell()?;
        let (mut pushes, mut queues) = (Vec::new(), Vec::new());
        for queue in 0..options.queues {
            let until = PushOptions {
                deadline: Some(LIMIT),
                ..PushOptions::default()
            };
            let push = instance.begin_push_with(&request(round, queue), until)?;
            let mut config = GpuQueueConfig::new(&gpu);
            config.depth = options.depth;
            config.patience = LIMIT;
            config.pace = Pace::Armed;
            queues.push(push.gpu_queue(&config)?);
            pushes.push(push);
        }
        // The tickets come meanwhile.
        std::thread::sleep(Duration::from_millis(50));
        let (begun, before) = (Instant::now(), workers_time()?);
        let mut postings = Vec::new();
        for ((queue, stream), prepared) in queues.iter().zip(&streams).zip(&prepared) {
            postings.push(kernels.launch(stream, queue.device(), prepared)?);
        }
        let mut sent = Vec::new();
        for ((queue, push), posting) in queues.into_iter().zip(pushes).zip(&postings) {
            queue.finish(Kernels::Behind(posting.event()), LIMIT)?;
            sent.push(push.commit()?);
        }
        for sent in &sent {
            match sent.wait(LIMIT) {
                Some(Outcome::Done) => {}
                other => return Err(format!("a push: {other:?}").into()),
            }
        }
        let (took, spent) = (begun.elapsed(), workers_time()? - before);
        for posting in &postings {
            let ok = Status::Ok.number();
            let results = posting.wait(Instant::now() + LIMIT)?;
            if results.iter().any(|r| (r.posted, r.ended) != (ok, ok)) {
                return Err("a post ended badly".into());
            }
        }
        println!(
            "{posts} posts of {} bytes in {} queues over {}: {:.3} M posts/s, {:.2} us of workers a post",
            options.block_bytes,
            options.queues,
            instance.path()?.path,
            posts as f64 / took.as_secs_f64() / 1e6,
            spent.as_secs_f64() * 1e6 / posts as f64,
        );
    }
    println!("{}", other.tell()?);
    other.child.wait()?;
    Ok(())
}

fn main() -> ExitCode {
    let done = options()
        .map_err(|error| format!("{error}\n{USAGE}").into())
        .and_then(|options| match options.consumer {
            true => consume(&options),
            false => produce(&options),
        });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("post_rate: {error}");
            ExitCode::FAILURE
        }
    }
}
