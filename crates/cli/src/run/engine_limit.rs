//! The limit of blocks between GPUs: one large copy by the copy engine, which no transfer between the two is
//! faster than.

use std::time::{Duration, Instant};

use anyhow::Context;
use kvxfer_hipmem::gpu::{Copy, Gpu, GpuMemory, Place, Stream};

use crate::output::schema::Op;

/// A copy is waited for so long at most: it takes milliseconds.
const LONGEST: Duration = Duration::from_secs(30);

/// A copy of one transfer's bytes from GPU to GPU, put on a stream of the one that it goes to, as transfers are.
#[derive(Debug)]
pub(crate) struct EngineLimit {
    stream: Stream,
    from: GpuMemory,
    to: GpuMemory,
}

impl EngineLimit {
    /// # Errors
    ///
    /// Memory that cannot be had, GPUs that do not reach each other.
    pub(crate) fn new(own: &Gpu, other: &Gpu, op: Op, bytes: u64) -> anyhow::Result<Self> {
        let (from, to) = match op {
            Op::Read => (other, own),
            Op::Write => (own, other),
        };
        let memory = || -> Result<Self, kvxfer_hipmem::Error> {
            if from != to {
                to.enable_access(from)?;
            }
            Ok(Self {
                stream: Stream::new(to)?,
                from: GpuMemory::new(from, bytes)?,
                to: GpuMemory::new(to, bytes)?,
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
            dst: Place::Gpu(&self.to, 0),
            src: Place::Gpu(&self.from, 0),
            len: self.to.len(),
        };
        let begun = Instant::now();
        let done = self.stream.copy(&vec![copy; transfers])?;
        while !done.is_done()? {
            if begun.elapsed() > LONGEST {
                anyhow::bail!("a copy between GPUs has not ended after {LONGEST:?}");
            }
            std::thread::yield_now();
        }
        Ok(begun.elapsed())
    }
}
