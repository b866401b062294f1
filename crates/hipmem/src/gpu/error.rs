//! What can go wrong with GPUs: why there is none, and what one refuses.

use std::path::PathBuf;
use std::time::Duration;

use super::code::{GpuCode, NOT_PERMITTED, NOT_SUPPORTED, Refused, fix};
use super::device::Uuid;
use super::ipc::IpcFormFault;
use super::runtime::RuntimeKind;
use kvxfer_verbs::{MemoryKind, PciAddress};

/// A library that was tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tried {
    /// The name that the loader was given.
    pub name: PathBuf,
    /// The loader's words.
    pub why: String,
}

/// Why there is no GPU at all. Each answer has another remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoGpu {
    /// No library of the runtime can be loaded.
    #[error(
        "no GPU runtime library can be loaded, tried {}: install the driver's user-space part (ROCm: hip-runtime-amd; CUDA: libcuda1), or in a container share it",
        list(tried)
    )]
    Library {
        /// The names, in order.
        tried: Vec<Tried>,
    },
    /// The library is there and too old, or is something else.
    #[error("{} has no {symbol}: it is too old, or another library of that name: look at LD_LIBRARY_PATH", library.display())]
    Symbol {
        /// The function.
        symbol: &'static str,
        /// The file of the library.
        library: PathBuf,
    },
    /// The runtime is there, and refuses to start.
    #[error("{} does not start: {refused}", library.display())]
    Init {
        /// The file of the library.
        library: PathBuf,
        /// What it refused.
        refused: Refused,
    },
    /// The runtime is there, and no device.
    #[error("{} finds no GPU ({}): {}", library.display(), words(refused.as_ref()), no_device(*runtime))]
    NoDevice {
        /// Whose runtime.
        runtime: RuntimeKind,
        /// The file of the library.
        library: PathBuf,
        /// The call and the answer that say so; `None`: it counts 0 devices.
        refused: Option<Refused>,
    },
    /// Neither runtime has a device for this process.
    #[error("HIP: {hip}; CUDA: {cuda}")]
    Neither {
        /// Why not HIP.
        hip: Box<NoGpu>,
        /// Why not CUDA.
        cuda: Box<NoGpu>,
    },
}

fn list(tried: &[Tried]) -> String {
    let each = |t: &Tried| {
        let name = t.name.display().to_string();
        // The loader names the file first, most of the time.
        match t.why.starts_with(&name) {
            true => t.why.clone(),
            false => format!("{name}: {}", t.why),
        }
    };
    tried.iter().map(each).collect::<Vec<_>>().join("; ")
}

fn words(refused: Option<&Refused>) -> String {
    match refused {
        Some(refused) => refused.to_string(),
        None => "it counts 0 devices".to_owned(),
    }
}

fn no_device(runtime: RuntimeKind) -> &'static str {
    match runtime {
        RuntimeKind::Hip => {
            "load amdgpu, see that /dev/kfd and /dev/dri may be opened (groups video and render; --device in a container), and look at HIP_VISIBLE_DEVICES and ROCR_VISIBLE_DEVICES"
        }
        RuntimeKind::Cuda => {
            "load nvidia, see that /dev/nvidia* may be opened (--gpus in a container), and look at CUDA_VISIBLE_DEVICES"
        }
        RuntimeKind::Host => "the stand-in always has one",
    }
}

/// What a GPU, or its runtime, has refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GpuFault {
    /// A call failed.
    #[error("{0}")]
    Call(#[source] Refused),
    /// There is no such device for this process.
    #[error("no GPU {asked}: this process has {}", seen.join(", "))]
    NoSuchDevice {
        /// What was asked for.
        asked: String,
        /// The PCI addresses of those that there are.
        seen: Vec<String>,
    },
    /// The device has no room.
    #[error(
        "{device}: no room for {len} bytes ({free} of {total} are free), {code}{}",
        fix(code)
    )]
    OutOfMemory {
        /// The device.
        device: PciAddress,
        /// Bytes asked for.
        len: u64,
        /// Bytes that it says are free.
        free: u64,
        /// Bytes that it has.
        total: u64,
        /// The runtime's answer.
        code: GpuCode,
    },
    /// The runtime knows of no device memory at an address.
    #[error("{addr:#x} is not memory of a GPU of this process{}", told(refused.as_ref()))]
    NotDeviceMemory {
        /// The address.
        addr: u64,
        /// What the runtime says, where it says anything.
        refused: Option<Refused>,
    },
    /// Memory is of another device than was said.
    #[error("memory at {addr:#x} is of GPU {is}, not of {said}")]
    OtherDevice {
        /// The address.
        addr: u64,
        /// The device it was said to be of.
        said: PciAddress,
        /// The one it is of.
        is: PciAddress,
    },
    /// A span is not wholly inside one allocation.
    #[error(
        "{len} bytes at {addr:#x} are not inside one allocation, the one there has {size} at {base:#x}: register each allocation by itself (PyTorch: PYTORCH_CUDA_ALLOC_CONF or PYTORCH_HIP_ALLOC_CONF without expandable_segments:True)"
    )]
    CrossesAllocation {
        /// First byte of the span.
        addr: u64,
        /// Bytes of the span.
        len: u64,
        /// First byte of the allocation.
        base: u64,
        /// Bytes of the allocation.
        size: u64,
    },
    /// One device cannot reach the other's memory.
    #[error("GPU {from} cannot reach memory of {to}{}: see rocm-smi --showtopo or nvidia-smi topo -p2p r; in a virtual machine ACS or the hypervisor may forbid it", told(refused.as_ref()))]
    NoPeerAccess {
        /// The device that would reach.
        from: PciAddress,
        /// The device whose memory it is.
        to: PciAddress,
        /// What the runtime says, where it says anything.
        refused: Option<Refused>,
    },
    /// Memory cannot be exported to another process by a legacy handle.
    #[error(
        "memory at {addr:#x} cannot be exported to another process{}: it comes from a memory pool or from virtual-memory calls; allocate the KV cache with PyTorch's expandable_segments:False and without the cudaMallocAsync backend (and without sleep mode), or use a path over the host",
        told(refused.as_ref())
    )]
    NotExportable {
        /// The address.
        addr: u64,
        /// What the runtime says, where it says anything.
        refused: Option<Refused>,
    },
    /// Another process's memory cannot be opened.
    #[error(
        "memory of GPU {exporter} ({uuid}) that another process exported cannot be opened on {opener}, {refused}: that process may have ended or freed it, or is on another machine, or in a container without --ipc=host (or --pid)"
    )]
    IpcOpen {
        /// The device the memory is of.
        exporter: PciAddress,
        /// Its UUID.
        uuid: Uuid,
        /// The device that was to map it.
        opener: PciAddress,
        /// The runtime's answer.
        refused: Refused,
    },
    /// What was opened is smaller than the handle says.
    #[error("the other process's allocation is mapped with {mapped} bytes, its handle says {said}")]
    IpcSize {
        /// Bytes mapped.
        mapped: u64,
        /// Bytes of the allocation, by the handle.
        said: u64,
    },
    /// A handle of this very process.
    #[error("the handle is of memory of this process: use the memory itself")]
    IpcOwn,
    /// A handle of another runtime.
    #[error("the handle is of {theirs} memory, this process uses {ours}")]
    IpcRuntime {
        /// This process's.
        ours: RuntimeKind,
        /// The exporter's.
        theirs: RuntimeKind,
    },
    /// Bytes that are no handle.
    #[error("not an IPC handle: {0}")]
    IpcForm(#[source] IpcFormFault),
    /// A device's memory cannot be exported as a dma-buf.
    #[error("{device}: memory at {addr:#x} cannot be exported as a dma-buf{}: {}", told(refused.as_ref()), dma_buf_fix(*runtime))]
    NoDmaBuf {
        /// The device.
        device: PciAddress,
        /// First byte of what was to be exported.
        addr: u64,
        /// Whose runtime.
        runtime: RuntimeKind,
        /// The runtime's answer; `None`: it has no function for it.
        refused: Option<Refused>,
    },
    /// Code cannot be loaded.
    #[error("code for {arch} cannot be loaded, {refused}{}", log_of(log))]
    Module {
        /// The device's architecture.
        arch: String,
        /// The runtime's answer.
        refused: Refused,
        /// What the compiler of PTX said; empty for others.
        log: String,
    },
    /// The code has no such kernel.
    #[error("the code has no kernel {name}, {refused}")]
    NoKernel {
        /// The name.
        name: String,
        /// The runtime's answer.
        refused: Refused,
    },
    /// A kernel was to be launched with no threads, or too many.
    #[error(
        "a launch of {grid} workgroups of {block} threads: both are at least 1, and there are at most 1024 threads"
    )]
    LaunchSize {
        /// Workgroups.
        grid: u32,
        /// Threads of each.
        block: u32,
    },
    /// Another process's memory was to be written.
    #[error("the {len} bytes at {addr:#x} are another process's, mapped to be read alone")]
    ReadOnly {
        /// The address of the first.
        addr: u64,
        /// How many there are.
        len: u64,
    },
    /// A file of another process has fewer pages than were to be pinned: pinning would take the others for it.
    #[error(
        "{wanted} bytes of another process's file were to be pinned, and only {allocated} of it are allocated: its owner is to take the pages first (an arena with prefault)"
    )]
    Holes {
        /// Bytes that were to be pinned, in whole pages.
        wanted: u64,
        /// Bytes of the whole file that are in pages.
        allocated: u64,
    },
    /// Memory of somebody else cannot be mapped for kernels.
    #[error("{device}: the {part} at {addr:#x} ({kind}) cannot be mapped for kernels, {refused}{}", foreign_fix(*kind, refused))]
    Foreign {
        /// The GPU.
        device: PciAddress,
        /// What it is of a NIC's queue.
        part: &'static str,
        /// Where it lies.
        addr: u64,
        /// Whether it is ordinary memory or registers.
        kind: MemoryKind,
        /// The runtime's answer.
        refused: Refused,
    },
    /// Pages that memory of somebody else lies in are mapped for a GPU already: by others than this crate, who may undo
    /// that at any time, or together with pages that this memory does not lie in.
    #[error(
        "{device}: the {part} at {addr:#x} lies in pages that are mapped for a GPU already, by somebody else or with others beside them, {refused}: have them undo it first, or make the queue on a context of the NIC that nobody else uses"
    )]
    ForeignAlready {
        /// The GPU.
        device: PciAddress,
        /// What it is of a NIC's queue.
        part: &'static str,
        /// Where it lies.
        addr: u64,
        /// The runtime's answer.
        refused: Refused,
    },
    /// Handles of two devices were mixed.
    #[error("{what} is of GPU {is}, the stream of {stream}")]
    OtherStreamDevice {
        /// What is of another device.
        what: &'static str,
        /// Its device.
        is: PciAddress,
        /// The stream's.
        stream: PciAddress,
    },
    /// Handles of two runtimes were mixed.
    #[error("{what} is of {is}, the other of {other}: nothing goes from one runtime to another")]
    OtherRuntime {
        /// What is of another runtime.
        what: &'static str,
        /// Its runtime.
        is: RuntimeKind,
        /// The other's.
        other: RuntimeKind,
    },
    /// Something did not end in time.
    #[error("{what} did not end within {waited:?}")]
    Deadline {
        /// What was waited for.
        what: &'static str,
        /// How long.
        waited: Duration,
    },
}

impl GpuFault {
    /// The runtime's answer, where there was one.
    #[must_use]
    pub fn code(&self) -> Option<&GpuCode> {
        match self {
            Self::Call(refused)
            | Self::IpcOpen { refused, .. }
            | Self::Module { refused, .. }
            | Self::NoKernel { refused, .. }
            | Self::Foreign { refused, .. }
            | Self::ForeignAlready { refused, .. } => Some(&refused.code),
            Self::OutOfMemory { code, .. } => Some(code),
            Self::NotDeviceMemory { refused, .. }
            | Self::NoPeerAccess { refused, .. }
            | Self::NotExportable { refused, .. }
            | Self::NoDmaBuf { refused, .. } => refused.as_ref().map(|refused| &refused.code),
            _ => None,
        }
    }
}

fn told(refused: Option<&Refused>) -> String {
    refused
        .map(|refused| format!(" ({refused})"))
        .unwrap_or_default()
}

fn log_of(log: &str) -> String {
    match log.is_empty() {
        true => String::new(),
        false => format!(": {log}"),
    }
}

/// What is documented of a refusal: by CUDA's manual, NVSHMEM's installation guide, HIP's header.
fn foreign_fix(kind: MemoryKind, refused: &Refused) -> &'static str {
    match (kind, refused.code.runtime, refused.code.number) {
        (MemoryKind::Registers, RuntimeKind::Cuda, NOT_PERMITTED) => {
            ": CUDA may map a device's registers for privileged processes alone: run as root (CAP_SYS_ADMIN), or load nvidia.ko with NVreg_RegistryDwords=\"PeerMappingOverride=1;\", as NVSHMEM's installation guide has it for IBGDA"
        }
        (MemoryKind::Registers, RuntimeKind::Cuda, NOT_SUPPORTED) => {
            ": of a device's registers CUDA says so on older Linux kernels"
        }
        (MemoryKind::Registers, RuntimeKind::Hip, _) => {
            ": HIP's header says of hipHostRegisterIoMemory that it is not supported"
        }
        _ => "",
    }
}

fn dma_buf_fix(runtime: RuntimeKind) -> &'static str {
    match runtime {
        RuntimeKind::Hip => {
            "that needs ROCm 5.7, a kernel with CONFIG_PCI_P2PDMA and CONFIG_DMABUF_MOVE_NOTIFY, and memory from hipMalloc"
        }
        RuntimeKind::Cuda => {
            "that needs CUDA 11.7, the open kernel module, and memory from cuMemAlloc"
        }
        RuntimeKind::Host => "the stand-in's memory is the host's",
    }
}
