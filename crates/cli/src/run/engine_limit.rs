//! The limit of blocks that a GPU copies: one large copy by the copy engine, which no transfer between the two
//! memories is faster than.

use std::time::{Duration, Instant};

use anyhow::Context;
use kvxfer_hipmem::gpu::{Copy, Gpu, GpuMemory, PinnedMemory, Place, Stream};

use crate::output::schema::Op;

/// A copy is waited for so long at most: it takes milliseconds.
const LONGEST: Duration = Duration::from_secs(30);

/// Memory of a GPU, or what stands for the host's.
#[derive(Debug)]
enum End {
    Gpu(GpuMemory),
    Pinned(PinnedMemory),
}

impl End {
    fn place(&self) -> Place<'_> {
        match self {
            Self::Gpu(memory) => Place::Gpu(memory, 0),
            Self::Pinned(memory) => Place::Pinned(memory, 0),
        }
    }
}

/// Whose memories they are: one is a GPU's at least.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Ends<'a> {
    /// Of these two GPUs: this side's, and the target's.
    Gpus(&'a Gpu, &'a Gpu),
    /// This side's GPU, and the target's host memory.
    OwnGpu(&'a Gpu),
    /// This side's host memory, and the target's GPU.
    TargetGpu(&'a Gpu),
}

/// A copy of one transfer's bytes, put on a stream of the GPU that it goes to, as transfers are; or of the one GPU.
#[derive(Debug)]
pub(crate) struct EngineLimit {
    stream: Stream,
    bytes: u64,
    from: End,
    to: End,
}

impl EngineLimit {
    /// # Errors
    ///
    /// Memory that cannot be had, GPUs that do not reach each other.
    pub(crate) fn new(ends: Ends<'_>, op: Op, bytes: u64) -> anyhow::Result<Self> {
        let memory = || -> Result<Self, kvxfer_hipmem::Error> {
            let on = |gpu| GpuMemory::new(gpu, bytes).map(End::Gpu);
            // Each of its pages is there, for it is pinned.
            let beside = |gpu| PinnedMemory::new(gpu, bytes).map(End::Pinned);
            let (own, target) = match ends {
                Ends::Gpus(own, target) => (on(own)?, on(target)?),
                Ends::OwnGpu(gpu) => (on(gpu)?, beside(gpu)?),
                Ends::TargetGpu(gpu) => (beside(gpu)?, on(gpu)?),
            };
            let gpu = match (ends, op) {
                (Ends::Gpus(to, from), Op::Read) | (Ends::Gpus(from, to), Op::Write) => {
                    if from != to {
                        to.enable_access(from)?;
                    }
                    to
                }
                (Ends::OwnGpu(gpu) | Ends::TargetGpu(gpu), _) => gpu,
            };
            let (from, to) = match op {
                Op::Read => (target, own),
                Op::Write => (own, target),
            };
            let stream = Stream::new(gpu)?;
            Ok(Self {
                stream,
                bytes,
                from,
                to,
            })
        };
        memory().context("preparing one large copy, to measure the path's limit")
    }

    /// Copies as many bytes as `transfers` transfers, in as many copies. Returns the time.
    ///
    /// # Errors
    ///
    /// What the GPU refuses.
    pub(crate) fn run(&self, transfers: usize) -> anyhow::Result<Duration> {
        let copy = Copy {
            dst: self.to.place(),
            src: self.from.place(),
            len: self.bytes,
        };
        let begun = Instant::now();
        let done = self.stream.copy(&vec![copy; transfers])?;
        while !done.is_done()? {
            if begun.elapsed() > LONGEST {
                anyhow::bail!("a copy by a GPU has not ended after {LONGEST:?}");
            }
            std::thread::yield_now();
        }
        Ok(begun.elapsed())
    }
}
