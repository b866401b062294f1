//! Scattered blocks between memories of GPUs and of the host, one launch for a transfer; and the fences and the
//! check that go with it.
//!
//! [`GpuKernels::load`] once for a GPU; [`GpuKernels::table`] once for a peer and a layout: it says which
//! tensors, which pieces of a block and how many blocks there are, is checked against the memories, and lies in
//! the GPU's memory from then on. [`GatherTable::gather`] for each transfer: it takes block pairs, which it
//! checks against the table, and puts one launch on a stream. Where blocks lie behind each other on both
//! sides, the copy engine takes them if that is faster. [`GpuKernels::pieces`] copies what no table names: a list
//! of stretches, such as those that are packed into pinned memory for a NIC, or unpacked from there.
//!
//! Nothing here is `unsafe` to call. What a kernel touches is named by offsets into memories, has been checked,
//! and is held until the launch has ended, whoever still waits for it. Two stretches with the same destination,
//! or a destination inside the source, give some bytes, as the crate's first page says of all memory here.
//!
//! # The abort word
//!
//! Every warp of a launch looks at it again and again, so it lies in the memory of the GPU that runs the
//! kernel, and is set by a copy on a stream of its own. In pinned host memory the same looks cross the bus:
//! on an H200 they held a gather at 67 to 120 GB/s of 394, at any number of workgroups.

mod error;
mod fence;
mod launch;
mod pieces;
mod request;
mod route;
mod scratch;
mod table;
mod verify;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use self::error::{GatherFault, Side};
pub use self::fence::Fence;
pub use self::launch::{Gather, GatherEnd, GatherPart};
pub use self::pieces::PieceList;
pub use self::table::{GatherOptions, GatherSection, GatherTable, TensorPlaces};
pub use self::verify::Verify;

use self::scratch::{Pool, Scratch};
use crate::error::Error;
use crate::gpu::pool::Touched;
use crate::gpu::{Gpu, Kernel, Module, PinnedMemory, Stream};
use crate::kernels::{KVX_ACQUIRE, KVX_GATHER, KVX_RELEASE, KVX_VERIFY, for_target};

/// A batch of copies begins one after the other; four batches side by side hide that. On an H200, of one large copy,
/// at 4 MiB: 0.95 over one stream, 0.974 over two, 0.987 over four.
const SIDES: usize = 3;

/// The kernels, loaded on a GPU. Clones are the same.
#[derive(Clone)]
pub struct GpuKernels(Arc<Inner>);

struct Inner {
    gpu: Gpu,
    warp: u32,
    gather: Kernel,
    acquire: Kernel,
    release: Kernel,
    verify: Kernel,
    /// Where aborts are put: what runs must not be waited for.
    aborts: Stream,
    /// What the copy engine's copies are shared out to, beside the transfer's own stream.
    sides: Vec<Stream>,
    /// A word that is 1, then one that is 0.
    words: PinnedMemory,
    sequence: AtomicU64,
    pool: Arc<Pool>,
}

impl GpuKernels {
    /// Loads the kernels that are built in. NVIDIA's driver compiles them, the first time in some tenths of a
    /// second.
    ///
    /// # Errors
    ///
    /// [`Error::Kernel`] if none are for this GPU; [`Error::Gpu`].
    pub fn load(gpu: &Gpu) -> Result<Self, Error> {
        let image = for_target(&gpu.info().arch)?;
        // SAFETY: the image was built for this target from the sources in kernels/, and has no initialisers.
        let module = unsafe { Module::load(gpu, image.bytes) }?;
        let words = PinnedMemory::pooled(gpu, 8, Touched::ByOwn)?;
        words.host().write(0, &[1, 0, 0, 0, 0, 0, 0, 0])?;
        Ok(Self(Arc::new(Inner {
            gpu: gpu.clone(),
            warp: image.warp,
            gather: module.kernel(KVX_GATHER)?,
            acquire: module.kernel(KVX_ACQUIRE)?,
            release: module.kernel(KVX_RELEASE)?,
            verify: module.kernel(KVX_VERIFY)?,
            aborts: Stream::urgent(gpu)?,
            sides: (0..SIDES)
                .map(|_| Stream::new(gpu))
                .collect::<Result<_, _>>()?,
            words,
            sequence: AtomicU64::new(1),
            pool: Arc::default(),
        })))
    }

    /// The GPU that runs them.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        &self.0.gpu
    }

    /// Allocates what so many launches of a few thousand pairs at a time need of memory, ahead of them. Without, each has
    /// its own allocated when there is none to be used again, in front of the first launches.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`].
    pub fn reserve(&self, launches: usize) -> Result<(), Error> {
        let all: Result<Vec<_>, Error> = (0..launches).map(|_| self.scratch(0)).collect();
        // All at a time, or they would be one; and back they go.
        all.map(drop)
    }

    /// What the slots of the next launch shall hold: never what a slot holds already.
    fn sequence(&self) -> u64 {
        self.0.sequence.fetch_add(1, Ordering::Relaxed)
    }

    fn scratch(&self, tables: u64) -> Result<Arc<Scratch>, Error> {
        Scratch::take(&self.0.pool, &self.0.gpu, tables).map(Arc::new)
    }
}

impl fmt::Debug for GpuKernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernels on {:?}", self.0.gpu)
    }
}
