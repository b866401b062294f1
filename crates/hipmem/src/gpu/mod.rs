//! GPUs: HIP, CUDA, or a stand-in that is the host itself.
//!
//! A runtime's library is opened when it is first asked for ([`GpuRuntime::open`]), so a program starts
//! without one and says what is missing. Three rules hold everywhere:
//!
//! 1. **The caller's device stays current.** Every call makes its device current for its own time and
//!    puts back what was there. CUDA is used in primary contexts, as PyTorch does.
//! 2. **Devices are known by PCI address and UUID**, for another process may see others, in another order.
//! 3. **Work keeps its memory.** What is put on a [`Stream`] holds the memory that it uses until it has ended.
//!    Only a kernel's launch is `unsafe`, for what a kernel touches nobody here can know.
//!
//! Nothing of HIP has run on an AMD GPU yet.

mod api;
mod class;
mod code;
mod cuda;
mod device;
mod error;
mod event;
mod foreign;
pub mod gather;
mod hip;
mod host;
mod ipc;
mod kfd;
mod later;
mod memory;
mod module;
mod peer_memory;
mod pinned;
mod pool;
pub mod post;
mod runtime;
mod stream;
mod sys;
#[cfg(test)]
mod tests;

pub use api::Grain;
pub use class::{Consumer, HostStep, MemoryClass, Visibility, visibility};
pub use code::{GpuCode, Refused};
pub use device::{Gpu, GpuInfo, Uuid};
pub use error::{GpuFault, NoGpu, Tried};
pub use event::Event;
pub use ipc::{IpcFormFault, IpcHandle};
pub use kvxfer_verbs::DmaBuf;
pub(crate) use memory::Span as GpuSpan;
pub use memory::{Allocation, GpuMemory};
pub use module::{Kernel, Module};
pub use peer_memory::PeerHostMemory;
pub use pinned::PinnedMemory;
pub use runtime::{GpuRuntime, NoSuchRuntime, RuntimeChoice, RuntimeKind};
pub use stream::{Copy, Pending, Place, Stream};
