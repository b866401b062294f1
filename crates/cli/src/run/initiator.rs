//! `--initiator gpu`: pushes whose blocks a kernel posts, and pulls whose blocks it asks for.

use std::time::{Duration, Instant};

use kvxfer::Transfer;
use kvxfer::blocks::GroupPairs;
use kvxfer::config::{Config, PathKind};
use kvxfer::engine::{GpuQueue, Outcome, Pull, Push};
use kvxfer::gpu_queue::{self, GpuQueueConfig, Kernels, Pace, QueueKind};
use kvxfer::layout::KvFormat;
use kvxfer::transfer::Cause;
use kvxfer_hipmem::gpu::{Gpu, GpuRuntime, RuntimeChoice, RuntimeKind, Stream};
use kvxfer_hipmem::kernels::queue::{
    ALL, ALL_TENSORS, GET, LOCAL_PLACE, Move, PUT, PostResult, REMOTE_PLACE,
};
use kvxfer_hipmem::post::device::{PostBy, PostKernels, Posting, Posts};
use kvxfer_hipmem::post::{Place, Status};

use super::mem::{Gpus, Mem};
use crate::args::{BwArgs, InitiatorChoice, OpChoice, QueueChoice};
use crate::output::schema::{self, Executor, Hca};
use crate::problem::{Exit, Problem};
use crate::say;

/// Workgroups of each compute unit that copy side by side: what `gpu_post` finds best for 16 KiB.
const LINK_WORKGROUPS: u32 = 4;
/// Waves that post side by side at most.
const MOST_POSTERS: usize = 64;

/// What names the blocks of pushes and pulls.
#[derive(Debug)]
pub(crate) struct Initiator {
    kernels: PostKernels,
    stream: Stream,
    queue: QueueChoice,
}

/// What is asked for and is not there, before anything is begun.
///
/// # Errors
///
/// A [`Problem`].
pub(crate) fn check(args: &BwArgs) -> Result<(), Problem> {
    let gpu = args.initiator == InitiatorChoice::Gpu;
    match args.queue {
        Some(_) if !gpu => {
            let cause = "--queue is what a kernel posts to";
            return Err(Problem::usage(cause).with_fix("say --initiator gpu with it"));
        }
        _ => {}
    }
    let on_gpu = matches!(args.mem, Some(Mem::Gpu(_)));
    if args.queue == Some(QueueChoice::Links) && !on_gpu {
        return Err(
            Problem::usage("over links a kernel writes from GPU memory to GPU memory")
                .with_fix("say --mem gpu with --queue links"),
        );
    }
    if args.queue == Some(QueueChoice::Links) && args.op == OpChoice::Read {
        return Err(
            Problem::usage("over links a kernel pushes and does not pull")
                .with_fix("say --op write with --queue links"),
        );
    }
    Ok(())
}

impl Initiator {
    /// On the GPU that has the blocks, or on the first there is; where there is none, on the stand-in, with a warning.
    ///
    /// # Errors
    ///
    /// A [`Problem`] for a GPU that was asked for and cannot be had.
    pub(crate) fn open(
        config: &Config,
        gpus: Option<&Gpus>,
        queue: QueueChoice,
    ) -> anyhow::Result<Self> {
        let gpu = match gpus.and_then(Gpus::own) {
            Some(gpu) => gpu.clone(),
            None => first(config)?,
        };
        let device = |error: kvxfer_hipmem::Error| Problem::from_chain(Exit::Device, &error);
        warn_of_stand_in(&gpu);
        Ok(Self {
            kernels: PostKernels::load(&gpu).map_err(device)?,
            stream: Stream::new(&gpu).map_err(device)?,
            queue,
        })
    }

    /// What ran the kernel, what it posts to, and what carries that out over a path.
    pub(crate) fn shown(&self, path: PathKind) -> (Executor, schema::QueueKind, Hca) {
        let executor = executor(self.stream.gpu());
        let (queue, hca) = match (self.queue, path) {
            (QueueChoice::Proxy, PathKind::Rdma) => (schema::QueueKind::Proxy, Hca::Nic),
            (QueueChoice::Proxy, _) => (schema::QueueKind::Proxy, Hca::None),
            (QueueChoice::GpuWqe, _) => (schema::QueueKind::GpuWqe, Hca::Model),
            (QueueChoice::Direct, _) => (schema::QueueKind::Direct, Hca::Model),
            (QueueChoice::Links, _) => (schema::QueueKind::Links, Hca::None),
        };
        (executor, queue, hca)
    }

    /// Has a kernel post all blocks, each by itself, and commits. The time from the launch to the outcome is measured;
    /// what the queue takes to be made is not.
    ///
    /// # Errors
    ///
    /// What the layers below say; a post that ended badly is told by the transfer.
    pub(crate) fn run(
        &self,
        work: Begun,
        format: &KvFormat,
        pairs: &[GroupPairs],
        timeout: Duration,
    ) -> Result<ByKernel, kvxfer::Error> {
        let mut config = GpuQueueConfig::new(self.stream.gpu());
        config.kind = match self.queue {
            QueueChoice::Proxy => QueueKind::Proxy,
            QueueChoice::GpuWqe => QueueKind::GpuWqe(gpu_queue::Hca::Model),
            QueueChoice::Direct => QueueKind::Direct(gpu_queue::Hca::Model),
            QueueChoice::Links => QueueKind::Links,
        };
        config.patience = timeout;
        config.pace = Pace::Armed;
        let queue = work.gpu_queue(&config)?;
        let op = work.op();
        let moves = moves(op, format, pairs, |group, layer| {
            queue.block_bytes(group, layer)
        });
        if self.queue == QueueChoice::Links {
            return self.over_links(work, queue, &moves, timeout);
        }
        let posters = (1..=MOST_POSTERS.min(moves.len()))
            .rev()
            .find(|n| moves.len().is_multiple_of(*n))
            .unwrap_or(1);
        let posts = Posts {
            moves: &moves,
            posters: u32::try_from(posters).unwrap_or(1),
            by: PostBy::Waves,
            op,
            until: ALL,
        };
        let prepared = self.kernels.prepare(&posts)?;
        let begun = Instant::now();
        let posting = self
            .kernels
            .launch(&self.stream, queue.device(), &prepared)?;
        queue.finish(Kernels::Behind(posting.event()), timeout)?;
        ended(work, (&posting, begun, None), timeout)
    }

    /// The same by kernels that copy the blocks themselves, with as many workgroups as a link wants.
    fn over_links(
        &self,
        work: Begun,
        queue: GpuQueue,
        moves: &[Move],
        timeout: Duration,
    ) -> Result<ByKernel, kvxfer::Error> {
        let units = self.stream.gpu().info().compute_units.max(1);
        let prepared = self.kernels.prepare_push(&self.stream, moves)?;
        let begun = Instant::now();
        let device = queue.device();
        let workgroups = units.saturating_mul(LINK_WORKGROUPS);
        let posting = (self.kernels).push(&self.stream, device, &prepared, workgroups)?;
        while !posting.is_done()? && begun.elapsed() < timeout {
            std::hint::spin_loop();
        }
        let there = begun.elapsed();
        queue.finish(Kernels::Behind(posting.event()), timeout)?;
        ended(work, (&posting, begun, Some(there)), timeout)
    }
}

/// Commits a transfer whose posts have all been made.
fn ended(
    work: Begun,
    (posting, begun, there): (&Posting, Instant, Option<Duration>),
    timeout: Duration,
) -> Result<ByKernel, kvxfer::Error> {
    let transfer = work.commit()?;
    let outcome = transfer.wait(timeout);
    let took = begun.elapsed();
    let wrong = |result: &PostResult| {
        let ok = Status::Ok.number();
        (result.posted, result.ended) != (ok, ok)
    };
    let results = posting.wait(Instant::now() + timeout)?;
    Ok(ByKernel {
        took,
        there: there.unwrap_or(took),
        report: transfer.report(),
        failed: match outcome {
            // A kernel that has lost its patience.
            Some(Outcome::Done) if results.iter().any(wrong) => Some(Cause::DeadlinePassed),
            Some(Outcome::Done) => None,
            Some(outcome) => outcome.failure().map(|failure| failure.first_cause.clone()),
            None => Some(Cause::DeadlinePassed),
        },
    })
}

/// What a kernel is to name the blocks of.
#[derive(Debug)]
pub(crate) enum Begun {
    Pull(Pull),
    Push(Push),
}

impl Begun {
    fn gpu_queue(&self, config: &GpuQueueConfig) -> Result<GpuQueue, kvxfer::Error> {
        match self {
            Self::Pull(pull) => pull.gpu_queue(config),
            Self::Push(push) => push.gpu_queue(config),
        }
    }

    /// What the kernel posts.
    fn op(&self) -> u32 {
        match self {
            Self::Pull(_) => GET,
            Self::Push(_) => PUT,
        }
    }

    fn commit(self) -> Result<Transfer, kvxfer::Error> {
        match self {
            Self::Pull(pull) => pull.commit(),
            Self::Push(push) => push.commit(),
        }
    }
}

/// A transfer by a kernel that has ended.
#[derive(Debug)]
pub(crate) struct ByKernel {
    /// From the launch of the kernel to the outcome.
    pub(crate) took: Duration,
    /// Until all of it was in the other side's memory: with links when the kernel has ended, otherwise the same.
    pub(crate) there: Duration,
    pub(crate) report: kvxfer::engine::TransferReport,
    pub(crate) failed: Option<Cause>,
}

/// What runs a kernel of this GPU.
pub(crate) fn executor(gpu: &Gpu) -> Executor {
    match gpu.runtime() {
        RuntimeKind::Host => Executor::HostBuild,
        _ => Executor::Gpu,
    }
}

/// Says so where it is none.
pub(crate) fn warn_of_stand_in(gpu: &Gpu) {
    if gpu.runtime() == RuntimeKind::Host {
        say::aside(
            "kvxfer: warning: there is no GPU: the posts are made by the host build of the kernel, \
             and figures say nothing of a GPU",
        );
    }
}

/// The first GPU there is, or the stand-in.
///
/// # Errors
///
/// A [`Problem`] for a GPU that was asked for and cannot be had.
pub(crate) fn first(config: &Config) -> Result<Gpu, Problem> {
    let found = match (GpuRuntime::open(config.gpu), config.gpu) {
        (Err(_), RuntimeChoice::Auto) => GpuRuntime::open(RuntimeChoice::Only(RuntimeKind::Host)),
        (found, _) => found,
    };
    let gpu = found.and_then(|runtime| {
        let number = match runtime.kind() {
            RuntimeKind::Host => 0,
            _ => config.gpu_device,
        };
        runtime.gpu(number).cloned()
    });
    gpu.map_err(|error| {
        Problem::from_chain(Exit::Device, &error)
            .with_fix("`kvxfer devices` shows the GPUs there are; without KVXFER_GPU the host build is run where there is none")
    })
}

/// A post for each block of each layer.
fn moves(
    op: u32,
    format: &KvFormat,
    pairs: &[GroupPairs],
    bytes: impl Fn(u32, u32) -> Option<u64>,
) -> Vec<Move> {
    let mut moves = Vec::new();
    for of in pairs {
        let layers = format
            .group(of.group)
            .map_or(&[][..], |group| &group.layers);
        for layer in layers.iter().map(|layer| layer.layer) {
            let named = (u8::try_from(of.group), u16::try_from(layer));
            let (Some(len), (Ok(group), Ok(number))) = (bytes(of.group, layer), named) else {
                continue;
            };
            let place = |block| {
                let place = Place {
                    group,
                    tensor: ALL_TENSORS,
                    layer: number,
                    block,
                };
                place.to_word()
            };
            moves.extend(of.pairs.iter().map(|pair| {
                let (here, there) = match op {
                    GET => (pair.dst, pair.src),
                    _ => (pair.src, pair.dst),
                };
                Move {
                    local: place(here),
                    remote: place(there),
                    len,
                    flags: LOCAL_PLACE | REMOTE_PLACE,
                    ..Move::default()
                }
            }));
        }
    }
    moves
}
