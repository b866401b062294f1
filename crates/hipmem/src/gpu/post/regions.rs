//! Region tables in a GPU's memory.

use std::fmt;

use crate::error::Error;
use crate::gpu::pool::Touched;
use crate::gpu::{Gpu, GpuMemory};
use crate::post::{Compiled, RegionLayer};

/// A table that kernels of a GPU look places up in, checked and in its memory. What it says of keys and addresses is
/// for a device to check, which touches them; kernels only write them into work requests. Clones are the same.
#[derive(Clone)]
pub struct RegionTable {
    memory: GpuMemory,
}

impl RegionTable {
    /// The table of these layers, in any order. It is there for every kernel that is launched after this.
    ///
    /// # Errors
    ///
    /// [`Error::Regions`] for layers that make no table; [`Error::Gpu`].
    pub fn new(gpu: &Gpu, layers: &[RegionLayer]) -> Result<Self, Error> {
        Self::of(gpu, &Compiled::new(layers)?)
    }

    pub(super) fn of(gpu: &Gpu, table: &Compiled) -> Result<Self, Error> {
        let memory = GpuMemory::pooled(gpu, table.len(), Touched::ByHandle)?;
        memory.write(0, &table.bytes(memory.addr()))?;
        Ok(Self { memory })
    }

    /// Where it lies, for [`Queue::regions`](crate::kernels::queue::Queue::regions). Whoever launches a kernel with it
    /// keeps this value until that kernel has ended.
    #[must_use]
    pub fn addr(&self) -> u64 {
        self.memory.addr()
    }

    /// The GPU whose kernels look.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        self.memory.gpu()
    }
}

impl fmt::Debug for RegionTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.memory.len();
        write!(f, "a table of {bytes} bytes for {:?}", self.gpu())
    }
}
