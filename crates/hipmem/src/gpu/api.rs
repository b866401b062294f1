//! The three runtimes behind one set of calls. A handle, address or ordinal is a number here; what it means
//! is the runtime's business. All that is done to memory is `unsafe`: the modules above keep it alive.

use std::os::fd::OwnedFd;
use std::path::Path;

use super::code::Refused;
use super::cuda::CudaApi;
use super::device::GpuInfo;
use super::hip::HipApi;
use super::host::HostApi;
use super::runtime::RuntimeKind;

/// A runtime.
pub(super) enum Api {
    Hip(HipApi),
    Cuda(CudaApi),
    Host(HostApi),
}

/// What has to be undone for the caller's device to be current again.
#[derive(Clone, Copy)]
pub(super) enum Entered {
    /// A context was pushed.
    Pushed,
    /// Another device was current.
    Was(i32),
    /// Nothing was changed.
    Same,
}

/// What a runtime knows of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PointerFacts {
    /// The device whose memory it is.
    pub(super) ordinal: u32,
    /// The allocation.
    pub(super) base: u64,
    /// Its bytes.
    pub(super) size: u64,
    /// Whether a legacy handle can name it, where the runtime says so.
    pub(super) exportable: Option<bool>,
}

/// Where a copy goes from and to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    HostToDevice,
    DeviceToHost,
    DeviceToDevice,
}

/// One of several copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CopySpan {
    pub(super) dst: u64,
    pub(super) src: u64,
    pub(super) len: u64,
    pub(super) way: Direction,
}

/// How memory of a device behaves for others than itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Grain {
    /// The runtime's default: coherent at the end of a kernel.
    #[default]
    Coarse,
    /// Coherent while a kernel runs. HIP only.
    Fine,
    /// Never in a cache. HIP of ROCm 6 only.
    Uncached,
}

/// What a launch needs.
pub(super) struct Launch<'a> {
    pub(super) function: u64,
    pub(super) grid: u32,
    pub(super) block: u32,
    pub(super) stream: u64,
    pub(super) args: &'a [u8],
}

/// Code that was not loaded.
pub(super) struct NotLoaded {
    pub(super) refused: Refused,
    pub(super) log: String,
}

/// Why there is no dma-buf.
pub(super) enum DmaBufFault {
    NoFunction,
    Refused(Refused),
}

impl Api {
    /// Copies in any order.
    ///
    /// # Safety
    ///
    /// All spans are there until the stream has got past the copies.
    pub(super) unsafe fn copy_all(&self, copies: &[CopySpan], stream: u64) -> Result<(), Refused> {
        if let Self::Cuda(api) = self {
            // SAFETY: as for this function.
            if let Some(copied) = unsafe { api.copy_batch(copies, stream) } {
                return copied;
            }
        }
        for copy in copies {
            // SAFETY: the caller keeps both spans until the stream has got past this.
            unsafe { self.copy(copy.dst, copy.src, copy.len, copy.way, stream) }?;
        }
        Ok(())
    }
}

/// The functions that all three have, handed on to the one that is there.
macro_rules! forward {
    ($($(#[$about:meta])* $([$unsafe:ident])? fn $name:ident(&self $(, $arg:ident: $ty:ty)*) -> $ret:ty;)*) => {
        impl Api {
            $($(#[$about])*
            pub(super) $($unsafe)? fn $name(&self $(, $arg: $ty)*) -> $ret {
                match self {
                    Self::Hip(api) => forward!(@call $($unsafe)? api.$name($($arg),*)),
                    Self::Cuda(api) => forward!(@call $($unsafe)? api.$name($($arg),*)),
                    Self::Host(api) => forward!(@call $($unsafe)? api.$name($($arg),*)),
                }
            })*
        }
    };
    (@call unsafe $call:expr) => {
        // SAFETY: the caller keeps what the function asks for, which is the same for all three.
        unsafe { $call }
    };
    (@call $call:expr) => { $call };
}

forward! {
    fn kind(&self) -> RuntimeKind;
    /// The file of the library.
    fn path(&self) -> &Path;
    fn device_count(&self) -> Result<u32, Refused>;
    /// Makes a device current for this thread, until [`leave`](Self::leave).
    fn enter(&self, ordinal: u32) -> Result<Entered, Refused>;
    fn leave(&self, entered: Entered) -> ();
    fn info(&self, ordinal: u32) -> Result<GpuInfo, Refused>;
    fn can_access_peer(&self, ordinal: u32, peer: u32) -> Result<bool, Refused>;

    // From here on the device is the current one.
    fn enable_peer(&self, peer: u32) -> Result<(), Refused>;
    /// Free and total bytes.
    fn mem_info(&self) -> Result<(u64, u64), Refused>;
    fn alloc(&self, len: u64, grain: Grain) -> Result<u64, Refused>;
    /// # Safety
    /// `pointer` is of [`alloc`](Self::alloc), is freed once, and nothing uses the memory any more.
    [unsafe] fn free(&self, pointer: u64) -> Result<(), Refused>;
    /// Pinned memory: its address for the host and for the device.
    fn host_alloc(&self, len: u64) -> Result<(u64, u64), Refused>;
    /// # Safety
    /// `pointer` is the host's of [`host_alloc`](Self::host_alloc), is freed once, and nothing uses it.
    [unsafe] fn host_free(&self, pointer: u64) -> Result<(), Refused>;
    /// Pins host memory and gives its address for the device.
    /// # Safety
    /// The span is mapped until [`host_unregister`](Self::host_unregister).
    [unsafe] fn host_register(&self, pointer: u64, len: u64) -> Result<u64, Refused>;
    /// The same of memory that is mapped to be read, and that devices only read.
    /// # Safety
    /// As [`host_register`](Self::host_register).
    [unsafe] fn host_register_read_only(&self, pointer: u64, len: u64) -> Result<u64, Refused>;
    /// The same of a device's registers.
    /// # Safety
    /// As [`host_register`](Self::host_register).
    [unsafe] fn host_register_registers(&self, pointer: u64, len: u64) -> Result<u64, Refused>;
    /// # Safety
    /// `pointer` was registered, is unregistered once, and no device uses it any more.
    [unsafe] fn host_unregister(&self, pointer: u64) -> Result<(), Refused>;
    /// What is at an address; `None`: no device's memory, as far as the runtime knows.
    fn pointer(&self, pointer: u64) -> Result<Option<PointerFacts>, Refused>;
    /// # Safety
    /// Both spans are there until the stream has got past the copy.
    [unsafe] fn copy(&self, dst: u64, src: u64, len: u64, way: Direction, stream: u64) -> Result<(), Refused>;
    /// Whether [`copy_all`](Self::copy_all) is one call that hides what it costs to begin each copy.
    fn has_batches(&self) -> bool;
    /// # Safety
    /// The span is the device's until the stream has got past the fill.
    [unsafe] fn fill(&self, dst: u64, byte: u8, len: u64, stream: u64) -> Result<(), Refused>;
    /// An urgent one goes before others, by a hardware queue of its own where those are few (HIP).
    fn stream_create(&self, urgent: bool) -> Result<u64, Refused>;
    /// # Safety
    /// As `free`, of a stream.
    [unsafe] fn stream_destroy(&self, stream: u64) -> Result<(), Refused>;
    /// Waits until all that is on the stream has ended.
    /// # Safety
    /// The stream is there.
    [unsafe] fn stream_wait(&self, stream: u64) -> Result<(), Refused>;
    /// Whether all that is on the stream has ended.
    /// # Safety
    /// The stream is there.
    [unsafe] fn stream_done(&self, stream: u64) -> Result<bool, Refused>;
    /// What comes after on the stream waits for the event.
    /// # Safety
    /// Both are there.
    [unsafe] fn stream_wait_event(&self, stream: u64, event: u64) -> Result<(), Refused>;
    fn event_create(&self, timing: bool) -> Result<u64, Refused>;
    /// # Safety
    /// As `free`, of an event.
    [unsafe] fn event_destroy(&self, event: u64) -> Result<(), Refused>;
    /// # Safety
    /// Both are there.
    [unsafe] fn event_record(&self, event: u64, stream: u64) -> Result<(), Refused>;
    /// # Safety
    /// The event is there.
    [unsafe] fn event_done(&self, event: u64) -> Result<bool, Refused>;
    /// Milliseconds from the first to the second.
    /// # Safety
    /// Both are there.
    [unsafe] fn event_elapsed(&self, start: u64, stop: u64) -> Result<f32, Refused>;
    /// # Safety
    /// The bytes are of a compiler for this kind of device, or text: loaders do not check them whole. On the
    /// host they are a shared object whose initialisers may run.
    [unsafe] fn module_load(&self, image: &[u8]) -> Result<u64, NotLoaded>;
    /// # Safety
    /// As `free`, of a module; no kernel of it runs.
    [unsafe] fn module_unload(&self, module: u64) -> Result<(), Refused>;
    /// # Safety
    /// The module is there.
    [unsafe] fn module_function(&self, module: u64, name: &std::ffi::CStr) -> Result<u64, Refused>;
    /// Registers of a thread; `None` where the runtime cannot be asked.
    /// # Safety
    /// The function is of a module that is there.
    [unsafe] fn function_registers(&self, function: u64) -> Result<Option<u32>, Refused>;
    /// # Safety
    /// Function and stream are there until the kernel has ended, `args` is what the kernel takes, and it
    /// touches only memory that is there and is not anybody's reference.
    [unsafe] fn launch(&self, launch: &Launch<'_>) -> Result<(), Refused>;
    /// # Safety
    /// `pointer` is the first byte of an allocation that is there.
    [unsafe] fn ipc_export(&self, pointer: u64) -> Result<[u8; 64], Refused>;
    fn ipc_open(&self, handle: &[u8; 64]) -> Result<u64, Refused>;
    /// # Safety
    /// `pointer` is of [`ipc_open`](Self::ipc_open), is closed once, and nothing uses the memory any more.
    [unsafe] fn ipc_close(&self, pointer: u64) -> Result<(), Refused>;
    /// A span as a file, and where in the file it begins.
    /// # Safety
    /// The span is of an allocation that is there.
    [unsafe] fn dma_buf(&self, pointer: u64, len: u64) -> Result<(OwnedFd, u64), DmaBufFault>;
    /// What other devices have written is seen by this one, or by all, when this returns.
    fn flush_writes(&self, to_all: bool) -> Result<(), Refused>;
}
