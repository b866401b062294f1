//! What can go wrong with memory of the host and of GPUs.

use std::fmt;

use nix::errno::Errno;

use crate::gather::GatherFault;
use crate::gpu::post::NicFault;
use crate::gpu::{GpuFault, NoGpu};
use crate::kernels::KernelError;
use crate::post::RegionFault;

/// The operation that an [`Error`] speaks of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operation {
    /// [`HostMemory::read`](crate::HostMemory::read).
    Read,
    /// [`HostMemory::write`](crate::HostMemory::write).
    Write,
    /// [`HostMemory::fill`](crate::HostMemory::fill).
    Fill,
    /// The source of a copy.
    CopySource,
    /// The destination of a copy.
    CopyDestination,
    /// [`HostMemory::load_u64`](crate::HostMemory::load_u64).
    Load,
    /// [`HostMemory::store_u64`](crate::HostMemory::store_u64).
    Store,
    /// [`HostMemory::fill_words`](crate::HostMemory::fill_words).
    FillWords,
    /// [`HostMemory::verify_words`](crate::HostMemory::verify_words).
    VerifyWords,
    /// [`HostMemory::slice`](crate::HostMemory::slice).
    Slice,
    /// A bare call of [`crate::bare`].
    Bare,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Fill => "fill",
            Self::CopySource => "copy from",
            Self::CopyDestination => "copy to",
            Self::Load => "load",
            Self::Store => "store",
            Self::FillWords => "fill words",
            Self::VerifyWords => "verify words",
            Self::Slice => "slice",
            Self::Bare => "bare transfer",
        })
    }
}

/// The first 64-bit word that is not what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("byte {offset}: wanted {wanted:#018x}, found {found:#018x}")]
pub struct FirstMismatch {
    /// Where the word begins, in bytes from the start of the memory.
    pub offset: u64,
    /// The word that should be there; a last word of less than eight bytes has zeros above.
    pub wanted: u64,
    /// The word that is there.
    pub found: u64,
}

/// Why memory could not be had or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Memory of no bytes was asked for.
    #[error("memory of 0 bytes: at least 1 is needed")]
    Empty,
    /// More than the address space holds.
    #[error("memory of {len} bytes is more than this process can address")]
    TooLarge {
        /// The length asked for, in bytes.
        len: u64,
    },
    /// An access that is not wholly inside the memory.
    #[error("{operation} of {len} bytes at {offset}: the memory has {size}")]
    OutOfBounds {
        /// What was tried.
        operation: Operation,
        /// The first byte's offset.
        offset: u64,
        /// The number of bytes.
        len: u64,
        /// The length of the memory.
        size: u64,
    },
    /// Memory that this process's CPU does not read.
    #[error("reading {kind}: the CPU does not go there")]
    NotHost {
        /// Where it lives.
        kind: kvxfer_verbs::MemoryKind,
    },
    /// A word that does not begin at a multiple of its size.
    #[error("{operation} of a 64-bit word at {offset}: address {addr:#x} is no multiple of 8")]
    Misaligned {
        /// What was tried.
        operation: Operation,
        /// The word's offset.
        offset: u64,
        /// Its address.
        addr: u64,
    },
    /// A ring whose depth is no power of two.
    #[error("a ring of {depth} slots: their number must be a power of two")]
    Depth {
        /// The slots wanted.
        depth: u32,
    },
    /// `memfd_create` refused.
    #[error("memfd_create for an arena of {len} bytes: {source}")]
    CreateFile {
        /// The arena's length in bytes.
        len: u64,
        /// The kernel's answer.
        source: Errno,
    },
    /// `ftruncate` refused.
    #[error("giving an arena's memfd its {len} bytes: {source}")]
    SizeFile {
        /// The file's length in bytes.
        len: u64,
        /// The kernel's answer.
        source: Errno,
    },
    /// The seals could not be set.
    #[error("sealing an arena's memfd: {source}")]
    SealFile {
        /// The kernel's answer.
        source: Errno,
    },
    /// `mmap` refused.
    #[error("mapping {len} bytes of host memory: {source}")]
    Map {
        /// The length in bytes.
        len: u64,
        /// The kernel's answer.
        source: Errno,
    },
    /// The pages could not be had.
    #[error(
        "filling {len} bytes of host memory with pages: {source}; ask for less or free some memory"
    )]
    Populate {
        /// The length in bytes.
        len: u64,
        /// The kernel's answer.
        source: Errno,
    },
    /// The bytes are not those that were wanted.
    #[error("bytes differ: {0}")]
    Mismatch(#[source] FirstMismatch),
    /// `process_vm_readv` refused.
    #[error("process_vm_readv from process {pid} after {done} bytes: {source}")]
    ProcessVm {
        /// The process read from.
        pid: i32,
        /// Bytes that had been copied.
        done: u64,
        /// The kernel's answer.
        source: Errno,
    },
    /// `process_vm_readv` copied less than asked.
    #[error("process_vm_readv from process {pid}: {got} of {wanted} bytes, then unmapped memory")]
    ProcessVmShort {
        /// The process read from.
        pid: i32,
        /// Bytes asked for in the call.
        wanted: u64,
        /// Bytes copied by it.
        got: u64,
    },
    /// `readv` or `writev` on a stream refused.
    #[error("bare stream transfer after {done} bytes: {source}")]
    Stream {
        /// Bytes that had been moved.
        done: u64,
        /// The kernel's answer.
        source: Errno,
    },
    /// There is no GPU that could be used.
    #[error("no GPU: {0}")]
    NoGpu(#[source] NoGpu),
    /// A GPU, or its runtime, has refused something.
    #[error("{0}")]
    Gpu(#[source] Box<GpuFault>),
    /// Blocks cannot be gathered as was asked, or were not.
    #[error("{0}")]
    Gather(#[source] Box<GatherFault>),
    /// Kernels cannot be given a table of such blocks.
    #[error("{0}")]
    Regions(#[source] RegionFault),
    /// Kernels cannot post to a NIC's queues.
    #[error("{0}")]
    Nic(#[source] NicFault),
    /// There is no kernel to launch.
    #[error("{0}")]
    Kernel(#[source] KernelError),
    /// A copy between two places of the host was to be put on a GPU's stream.
    #[error(
        "a copy of {len} bytes from {src:#x} to {dst:#x} is the host's alone: no GPU's stream takes it"
    )]
    HostCopy {
        /// Bytes.
        len: u64,
        /// Where from.
        src: u64,
        /// Where to.
        dst: u64,
    },
    /// `getrandom` refused.
    #[error("getrandom: {source}")]
    Random {
        /// The kernel's answer.
        source: Errno,
    },
    /// The stream's other end closed it.
    #[error("bare stream ended after {done} bytes")]
    StreamEnded {
        /// Bytes that had been moved.
        done: u64,
    },
}

impl Error {
    /// The kernel's answer, where the failure was one.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::CreateFile { source, .. }
            | Self::SizeFile { source, .. }
            | Self::SealFile { source }
            | Self::Map { source, .. }
            | Self::Populate { source, .. }
            | Self::ProcessVm { source, .. }
            | Self::Random { source }
            | Self::Stream { source, .. } => Some(*source),
            _ => None,
        }
    }
}

impl From<NoGpu> for Error {
    fn from(why: NoGpu) -> Self {
        Self::NoGpu(why)
    }
}

impl From<GpuFault> for Error {
    fn from(fault: GpuFault) -> Self {
        Self::Gpu(Box::new(fault))
    }
}

impl From<GatherFault> for Error {
    fn from(fault: GatherFault) -> Self {
        Self::Gather(Box::new(fault))
    }
}

impl From<RegionFault> for Error {
    fn from(fault: RegionFault) -> Self {
        Self::Regions(fault)
    }
}

impl From<NicFault> for Error {
    fn from(fault: NicFault) -> Self {
        Self::Nic(fault)
    }
}

impl From<KernelError> for Error {
    fn from(why: KernelError) -> Self {
        Self::Kernel(why)
    }
}
