//! The CUDA driver API. All is done in devices' primary contexts, which are what PyTorch uses. They are
//! retained when first needed and never released: the engine's other libraries hold them as well.

use std::ffi::{CStr, OsStr};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr::{null_mut, with_exposed_provenance_mut};
use std::sync::{Mutex, PoisonError};

use kvxfer_verbs::PciAddress;
use libc::{c_char, c_int, c_uint, c_void};

use super::api::{
    CopySpan, Direction, DmaBufFault, Entered, Grain, Launch, NotLoaded, PointerFacts,
};
use super::code::{GpuCode, INVALID_VALUE, NOT_FOUND, NOT_SUPPORTED, PEER_ALREADY, Refused};
use super::device::{GpuInfo, Uuid};
use super::error::NoGpu;
use super::hip::{bounded, text};
use super::runtime::RuntimeKind;
use super::sys::cuda_types::*;
use super::sys::{Cuda, Library};

const NAMES: [&str; 1] = ["libcuda.so.1"];
/// Handles up to here are default streams, which take no batches.
const LAST_DEFAULT_STREAM: u64 = 2;
/// Bytes of the compiler's words that are kept.
const LOG: usize = 16 << 10;

pub(super) struct CudaApi {
    cuda: Cuda,
    library: Library,
    /// Primary contexts that are retained, by ordinal.
    contexts: Mutex<Vec<Option<u64>>>,
}

/// A call with its name. Where it stands, what the function asks for is kept: out-pointers are
/// locals, numbers are of the runtime, and the rest is what the enclosing function's caller keeps.
macro_rules! call {
    ($self:ident.$function:ident($($arg:expr),* $(,)?)) => {{
        // SAFETY: see the macro.
        let code = unsafe { ($self.cuda.$function)($($arg),*) };
        $self.checked(stringify!($function), code)
    }};
}

fn pointer(address: u64) -> *mut c_void {
    // This crate is for 64-bit machines.
    with_exposed_provenance_mut(address as usize)
}

fn address(pointer: *mut c_void) -> u64 {
    pointer.expose_provenance() as u64
}

impl CudaApi {
    pub(super) fn load() -> Result<Self, NoGpu> {
        Self::load_from(&NAMES.map(OsStr::new))
    }

    pub(super) fn load_from(names: &[&OsStr]) -> Result<Self, NoGpu> {
        let library = Library::first(names)?;
        let cuda = Cuda::find(&library)?;
        let api = Self {
            cuda,
            library,
            contexts: Mutex::new(Vec::new()),
        };
        call!(api.cuInit(0))
            .map_err(|refused| NoGpu::starting(RuntimeKind::Cuda, api.library.path(), refused))?;
        Ok(api)
    }

    fn code(&self, code: CUresult) -> GpuCode {
        let (mut name, mut words) = (std::ptr::null(), std::ptr::null());
        // SAFETY: it takes any number; a string of the library is written, or null.
        unsafe { (self.cuda.cuGetErrorName)(code, &raw mut name) };
        // SAFETY: as above.
        unsafe { (self.cuda.cuGetErrorString)(code, &raw mut words) };
        GpuCode {
            runtime: RuntimeKind::Cuda,
            number: code.0,
            name: text(name),
            words: text(words),
        }
    }

    fn checked(&self, call: &'static str, code: CUresult) -> Result<(), Refused> {
        if code == CUDA_SUCCESS {
            return Ok(());
        }
        let code = self.code(code);
        Err(Refused { call, code })
    }

    fn done(&self, call: &'static str, code: CUresult) -> Result<bool, Refused> {
        if code == CUDA_ERROR_NOT_READY {
            return Ok(false);
        }
        self.checked(call, code).map(|()| true)
    }

    fn refused(&self, call: &'static str, number: u32) -> Refused {
        let code = self.code(CUresult(number));
        Refused { call, code }
    }

    fn device(&self, ordinal: u32) -> Result<CUdevice, Refused> {
        let mut device = 0;
        call!(self.cuDeviceGet(&raw mut device, ordinal.cast_signed()))?;
        Ok(device)
    }

    fn attribute(&self, device: CUdevice, attribute: CUdevice_attribute) -> Option<u32> {
        let mut value = 0;
        // An older driver does not know the newer attributes.
        call!(self.cuDeviceGetAttribute(&raw mut value, attribute, device)).ok()?;
        u32::try_from(value).ok()
    }

    fn context(&self, ordinal: u32) -> Result<CUcontext, Refused> {
        let device = self.device(ordinal)?;
        let mut contexts = self.contexts.lock().unwrap_or_else(PoisonError::into_inner);
        let at = ordinal as usize;
        if let Some(Some(context)) = contexts.get(at) {
            return Ok(pointer(*context));
        }
        let mut context = null_mut();
        call!(self.cuDevicePrimaryCtxRetain(&raw mut context, device))?;
        if contexts.len() <= at {
            contexts.resize(at + 1, None);
        }
        if let Some(place) = contexts.get_mut(at) {
            *place = Some(address(context));
        }
        Ok(context)
    }

    pub(super) fn kind(&self) -> RuntimeKind {
        RuntimeKind::Cuda
    }

    pub(super) fn path(&self) -> &Path {
        self.library.path()
    }

    pub(super) fn device_count(&self) -> Result<u32, Refused> {
        let mut count = 0;
        call!(self.cuDeviceGetCount(&raw mut count))?;
        Ok(u32::try_from(count).unwrap_or(0))
    }

    pub(super) fn enter(&self, ordinal: u32) -> Result<Entered, Refused> {
        let context = self.context(ordinal)?;
        call!(self.cuCtxPushCurrent_v2(context))?;
        Ok(Entered::Pushed)
    }

    pub(super) fn leave(&self, entered: Entered) {
        if let Entered::Pushed = entered {
            let mut ours = null_mut();
            if let Err(refused) = call!(self.cuCtxPopCurrent_v2(&raw mut ours)) {
                tracing::warn!(%refused, "the caller's context is not current again");
            }
        }
    }

    pub(super) fn info(&self, ordinal: u32) -> Result<GpuInfo, Refused> {
        let device = self.device(ordinal)?;
        let mut name: [c_char; 256] = [0; 256];
        call!(self.cuDeviceGetName(name.as_mut_ptr(), 255, device))?;
        let mut id: [c_char; 64] = [0; 64];
        call!(self.cuDeviceGetPCIBusId(id.as_mut_ptr(), 63, device))?;
        let pci = bounded(&id);
        let pci = pci.parse::<PciAddress>().map_err(|_| Refused {
            call: "cuDeviceGetPCIBusId",
            code: GpuCode {
                runtime: RuntimeKind::Cuda,
                number: 0,
                name: String::new(),
                words: format!("{pci:?} is no PCI address"),
            },
        })?;
        let mut memory = 0;
        call!(self.cuDeviceTotalMem_v2(&raw mut memory, device))?;
        let mut uuid = CUuuid { bytes: [0; 16] };
        match self.cuda.cuDeviceGetUuid_v2 {
            // It tells the instances of a divided GPU apart.
            Some(function) => {
                // SAFETY: one UUID is written.
                let code = unsafe { function(&raw mut uuid, device) };
                self.checked("cuDeviceGetUuid_v2", code)?;
            }
            None => call!(self.cuDeviceGetUuid(&raw mut uuid, device))?,
        }
        let number = |attribute| self.attribute(device, attribute);
        let flag = |attribute| number(attribute).map(|value| value != 0);
        let major = number(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR).unwrap_or(0);
        let minor = number(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR).unwrap_or(0);
        Ok(GpuInfo {
            ordinal,
            pci,
            uuid: Uuid(uuid.bytes.map(|b| b.cast_unsigned())),
            name: bounded(&name),
            arch: format!("sm_{major}{minor}"),
            memory: memory as u64,
            compute_units: number(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).unwrap_or(0),
            xccs: None,
            integrated: flag(CU_DEVICE_ATTRIBUTE_INTEGRATED).unwrap_or(false),
            dma_buf: flag(CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED).unwrap_or(false)
                && self.cuda.cuMemGetHandleForAddressRange.is_some(),
            gpudirect_rdma: flag(CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED),
            writes_ordering: number(CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING),
            flush_options: number(CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS),
            host_register: flag(CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED).unwrap_or(false),
            host_register_read_only: flag(CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED),
            fine_grained: false,
            large_bar: None,
            mps: flag(CU_DEVICE_ATTRIBUTE_MPS_ENABLED).unwrap_or(false),
        })
    }

    pub(super) fn can_access_peer(&self, ordinal: u32, peer: u32) -> Result<bool, Refused> {
        let (device, peer) = (self.device(ordinal)?, self.device(peer)?);
        let mut can = 0;
        call!(self.cuDeviceCanAccessPeer(&raw mut can, device, peer))?;
        Ok(can != 0)
    }

    pub(super) fn enable_peer(&self, peer: u32) -> Result<(), Refused> {
        let context = self.context(peer)?;
        match call!(self.cuCtxEnablePeerAccess(context, 0)) {
            Err(refused) if refused.code.number == PEER_ALREADY => Ok(()),
            other => other,
        }
    }

    pub(super) fn mem_info(&self) -> Result<(u64, u64), Refused> {
        let (mut free, mut total) = (0, 0);
        call!(self.cuMemGetInfo_v2(&raw mut free, &raw mut total))?;
        Ok((free as u64, total as u64))
    }

    pub(super) fn alloc(&self, len: u64, grain: Grain) -> Result<u64, Refused> {
        if grain != Grain::Coarse {
            return Err(self.refused("allocation of fine-grained memory", NOT_SUPPORTED));
        }
        let mut out = 0;
        call!(self.cuMemAlloc_v2(&raw mut out, len as usize))?;
        Ok(out)
    }

    pub(super) unsafe fn free(&self, at: u64) -> Result<(), Refused> {
        call!(self.cuMemFree_v2(at))
    }

    pub(super) fn host_alloc(&self, len: u64) -> Result<(u64, u64), Refused> {
        let mut out = null_mut();
        let flags = CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP;
        call!(self.cuMemHostAlloc(&raw mut out, len as usize, flags))?;
        match self.device_address(out) {
            Ok(device) => Ok((address(out), device)),
            Err(refused) => {
                // SAFETY: it was made above, and nobody else has it.
                let _ = unsafe { self.host_free(address(out)) };
                Err(refused)
            }
        }
    }

    fn device_address(&self, host: *mut c_void) -> Result<u64, Refused> {
        let mut device = 0;
        call!(self.cuMemHostGetDevicePointer_v2(&raw mut device, host, 0))?;
        Ok(device)
    }

    pub(super) unsafe fn host_free(&self, at: u64) -> Result<(), Refused> {
        call!(self.cuMemFreeHost(pointer(at)))
    }

    pub(super) unsafe fn host_register(&self, at: u64, len: u64) -> Result<u64, Refused> {
        // SAFETY: as for this function.
        unsafe { self.register(at, len, 0) }
    }

    pub(super) unsafe fn host_register_read_only(&self, at: u64, len: u64) -> Result<u64, Refused> {
        // SAFETY: as for this function.
        unsafe { self.register(at, len, CU_MEMHOSTREGISTER_READ_ONLY) }
    }

    pub(super) unsafe fn host_register_registers(&self, at: u64, len: u64) -> Result<u64, Refused> {
        // SAFETY: as for this function.
        unsafe { self.register(at, len, CU_MEMHOSTREGISTER_IOMEMORY) }
    }

    /// # Safety
    ///
    /// As [`host_register`](Self::host_register).
    unsafe fn register(&self, at: u64, len: u64, more: c_uint) -> Result<u64, Refused> {
        let flags = CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP | more;
        call!(self.cuMemHostRegister_v2(pointer(at), len as usize, flags))?;
        self.device_address(pointer(at)).inspect_err(|_| {
            // SAFETY: it was registered above, and nobody has used it.
            let _ = unsafe { self.host_unregister(at) };
        })
    }

    pub(super) unsafe fn host_unregister(&self, at: u64) -> Result<(), Refused> {
        call!(self.cuMemHostUnregister(pointer(at)))
    }

    /// One attribute of a pointer; `None`: CUDA does not know the pointer.
    fn at(&self, attribute: CUpointer_attribute, at: u64) -> Result<Option<u32>, Refused> {
        // Some attributes are an int, IS_MANAGED and IS_LEGACY_CUDA_IPC_CAPABLE a bool.
        let mut value = 0_u64;
        let out = (&raw mut value).cast();
        match call!(self.cuPointerGetAttribute(out, attribute, at)) {
            Err(refused) if refused.code.number == INVALID_VALUE => Ok(None),
            Err(refused) => Err(refused),
            Ok(()) => Ok(Some((value.to_le() & u64::from(u32::MAX)) as u32)),
        }
    }

    pub(super) fn pointer(&self, at: u64) -> Result<Option<PointerFacts>, Refused> {
        let Some(kind) = self.at(CU_POINTER_ATTRIBUTE_MEMORY_TYPE, at)? else {
            return Ok(None);
        };
        let managed = self.at(CU_POINTER_ATTRIBUTE_IS_MANAGED, at)?;
        if kind != CU_MEMORYTYPE_DEVICE || managed.is_some_and(|managed| managed & 0xff != 0) {
            return Ok(None);
        }
        let ordinal = self.at(CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, at)?;
        let legacy = self.at(CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, at)?;
        let (mut base, mut size) = (0, 0);
        match call!(self.cuMemGetAddressRange_v2(&raw mut base, &raw mut size, at)) {
            Err(refused) if refused.code.number == NOT_FOUND => return Ok(None),
            other => other?,
        }
        Ok(Some(PointerFacts {
            ordinal: ordinal.unwrap_or(u32::MAX),
            base,
            size: size as u64,
            exportable: legacy.map(|legacy| legacy & 0xff != 0),
        }))
    }

    pub(super) unsafe fn copy(
        &self,
        dst: u64,
        src: u64,
        len: u64,
        way: Direction,
        stream: u64,
    ) -> Result<(), Refused> {
        let (size, stream) = (len as usize, pointer(stream));
        match way {
            Direction::HostToDevice => {
                let src = pointer(src).cast_const();
                call!(self.cuMemcpyHtoDAsync_v2(dst, src, size, stream))
            }
            Direction::DeviceToHost => {
                call!(self.cuMemcpyDtoHAsync_v2(pointer(dst), src, size, stream))
            }
            Direction::DeviceToDevice => {
                call!(self.cuMemcpyDtoDAsync_v2(dst, src, size, stream))
            }
        }
    }

    pub(super) fn has_batches(&self) -> bool {
        self.cuda.cuMemcpyBatchAsync.is_some()
    }

    /// Copies in one call. `None`: this driver, or the stream, takes them one by one.
    pub(super) unsafe fn copy_batch(
        &self,
        copies: &[CopySpan],
        stream: u64,
    ) -> Option<Result<(), Refused>> {
        let batch = self
            .cuda
            .cuMemcpyBatchAsync
            .filter(|_| copies.len() > 1 && stream > LAST_DEFAULT_STREAM)?;
        let mut dsts: Vec<CUdeviceptr> = copies.iter().map(|copy| copy.dst).collect();
        let mut srcs: Vec<CUdeviceptr> = copies.iter().map(|copy| copy.src).collect();
        let mut sizes: Vec<usize> = copies.iter().map(|copy| copy.len as usize).collect();
        let nowhere = CUmemLocation {
            type_: CU_MEM_LOCATION_TYPE_INVALID,
            id: 0,
        };
        let mut attributes = CUmemcpyAttributes {
            srcAccessOrder: CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
            srcLocHint: nowhere,
            dstLocHint: nowhere,
            flags: 0,
        };
        // The attributes are those of all copies from the first on.
        let (mut from, mut failed) = (0, 0);
        // SAFETY: the lists are as long as `copies`, the attributes are one, one number is written, and
        // the caller keeps the spans until the stream has got past this.
        let code = unsafe {
            batch(
                dsts.as_mut_ptr(),
                srcs.as_mut_ptr(),
                sizes.as_mut_ptr(),
                copies.len(),
                &raw mut attributes,
                &raw mut from,
                1,
                &raw mut failed,
                pointer(stream),
            )
        };
        Some(self.checked("cuMemcpyBatchAsync", code))
    }

    pub(super) unsafe fn fill(
        &self,
        dst: u64,
        byte: u8,
        len: u64,
        stream: u64,
    ) -> Result<(), Refused> {
        call!(self.cuMemsetD8Async(dst, byte, len as usize, pointer(stream)))
    }

    pub(super) fn stream_create(&self, urgent: bool) -> Result<u64, Refused> {
        let mut out = null_mut();
        let priority = -c_int::from(urgent);
        call!(self.cuStreamCreateWithPriority(&raw mut out, CU_STREAM_NON_BLOCKING, priority))?;
        Ok(address(out))
    }

    pub(super) unsafe fn stream_destroy(&self, stream: u64) -> Result<(), Refused> {
        call!(self.cuStreamDestroy_v2(pointer(stream)))
    }

    pub(super) unsafe fn stream_wait(&self, stream: u64) -> Result<(), Refused> {
        call!(self.cuStreamSynchronize(pointer(stream)))
    }

    pub(super) unsafe fn stream_done(&self, stream: u64) -> Result<bool, Refused> {
        // SAFETY: the caller's stream is there.
        let code = unsafe { (self.cuda.cuStreamQuery)(pointer(stream)) };
        self.done("cuStreamQuery", code)
    }

    pub(super) unsafe fn stream_wait_event(&self, stream: u64, event: u64) -> Result<(), Refused> {
        call!(self.cuStreamWaitEvent(pointer(stream), pointer(event), 0))
    }

    pub(super) fn event_create(&self, timing: bool) -> Result<u64, Refused> {
        let mut out = null_mut();
        let flags = match timing {
            true => CU_EVENT_DEFAULT,
            false => CU_EVENT_DISABLE_TIMING,
        };
        call!(self.cuEventCreate(&raw mut out, flags))?;
        Ok(address(out))
    }

    pub(super) unsafe fn event_destroy(&self, event: u64) -> Result<(), Refused> {
        call!(self.cuEventDestroy_v2(pointer(event)))
    }

    pub(super) unsafe fn event_record(&self, event: u64, stream: u64) -> Result<(), Refused> {
        call!(self.cuEventRecord(pointer(event), pointer(stream)))
    }

    pub(super) unsafe fn event_done(&self, event: u64) -> Result<bool, Refused> {
        // SAFETY: the caller's event is there.
        let code = unsafe { (self.cuda.cuEventQuery)(pointer(event)) };
        self.done("cuEventQuery", code)
    }

    pub(super) unsafe fn event_elapsed(&self, start: u64, stop: u64) -> Result<f32, Refused> {
        let mut ms = 0.0;
        call!(self.cuEventElapsedTime(&raw mut ms, pointer(start), pointer(stop)))?;
        Ok(ms)
    }

    pub(super) unsafe fn module_load(&self, image: &[u8]) -> Result<u64, NotLoaded> {
        // PTX is text that must end with a zero byte; for other code one more does no harm.
        let mut image = image.to_vec();
        image.push(0);
        let mut log = vec![0_u8; LOG];
        let mut names = [CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
        // A number is given in the place of a pointer.
        let mut values = [log.as_mut_ptr().cast(), pointer(LOG as u64)];
        let mut out = null_mut();
        let (image, options) = (image.as_ptr().cast(), names.len() as c_uint);
        let (names, values) = (names.as_mut_ptr(), values.as_mut_ptr());
        let loaded = call!(self.cuModuleLoadDataEx(&raw mut out, image, options, names, values));
        loaded.map_err(|refused| {
            let words = log.split(|b| *b == 0).next().unwrap_or_default();
            let log = String::from_utf8_lossy(words).trim().to_owned();
            NotLoaded { refused, log }
        })?;
        Ok(address(out))
    }

    pub(super) unsafe fn module_unload(&self, module: u64) -> Result<(), Refused> {
        call!(self.cuModuleUnload(pointer(module)))
    }

    pub(super) unsafe fn module_function(&self, module: u64, name: &CStr) -> Result<u64, Refused> {
        let mut out = null_mut();
        call!(self.cuModuleGetFunction(&raw mut out, pointer(module), name.as_ptr()))?;
        Ok(address(out))
    }

    pub(super) unsafe fn function_registers(&self, function: u64) -> Result<Option<u32>, Refused> {
        let Some(ask) = self.cuda.cuFuncGetAttribute else {
            return Ok(None);
        };
        let mut value = 0;
        let what = CU_FUNC_ATTRIBUTE_NUM_REGS;
        // SAFETY: it writes one number, and the caller has the function.
        let code = unsafe { ask(&raw mut value, what, pointer(function)) };
        self.checked("cuFuncGetAttribute", code)?;
        Ok(u32::try_from(value).ok())
    }

    pub(super) unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), Refused> {
        let mut size = launch.args.len();
        let mut extra = [
            pointer(CU_LAUNCH_PARAM_BUFFER_POINTER as u64),
            launch.args.as_ptr().cast_mut().cast(),
            pointer(CU_LAUNCH_PARAM_BUFFER_SIZE as u64),
            (&raw mut size).cast(),
            pointer(CU_LAUNCH_PARAM_END as u64),
        ];
        let (f, stream) = (pointer(launch.function), pointer(launch.stream));
        let (grid, block, extra) = (launch.grid, launch.block, extra.as_mut_ptr());
        call!(self.cuLaunchKernel(f, grid, 1, 1, block, 1, 1, 0, stream, null_mut(), extra))
    }

    pub(super) unsafe fn ipc_export(&self, at: u64) -> Result<[u8; 64], Refused> {
        let mut handle = CUipcMemHandle { reserved: [0; 64] };
        call!(self.cuIpcGetMemHandle(&raw mut handle, at))?;
        Ok(handle.reserved.map(|b| b.cast_unsigned()))
    }

    pub(super) fn ipc_open(&self, handle: &[u8; 64]) -> Result<u64, Refused> {
        let reserved = handle.map(|b| b.cast_signed());
        let handle = CUipcMemHandle { reserved };
        let mut out = 0;
        let flags = CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS;
        call!(self.cuIpcOpenMemHandle_v2(&raw mut out, handle, flags))?;
        Ok(out)
    }

    pub(super) unsafe fn ipc_close(&self, at: u64) -> Result<(), Refused> {
        call!(self.cuIpcCloseMemHandle(at))
    }

    pub(super) unsafe fn dma_buf(&self, at: u64, len: u64) -> Result<(OwnedFd, u64), DmaBufFault> {
        let Some(export) = self.cuda.cuMemGetHandleForAddressRange else {
            return Err(DmaBufFault::NoFunction);
        };
        // Whole pages of the host are exported; an allocation's end is one.
        let page = page_size();
        let start = at / page * page;
        let end = (at + len).div_ceil(page) * page;
        let mut fd: c_int = -1;
        let (out, kind) = ((&raw mut fd).cast(), CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD);
        // SAFETY: the caller's span is there; one descriptor is written.
        let code = unsafe { export(out, start, (end - start) as usize, kind, 0) };
        self.checked("cuMemGetHandleForAddressRange", code)
            .map_err(DmaBufFault::Refused)?;
        // SAFETY: it was made for us just now.
        Ok((unsafe { OwnedFd::from_raw_fd(fd) }, at - start))
    }

    pub(super) fn flush_writes(&self, to_all: bool) -> Result<(), Refused> {
        let Some(flush) = self.cuda.cuFlushGPUDirectRDMAWrites else {
            return Err(self.refused("cuFlushGPUDirectRDMAWrites", NOT_SUPPORTED));
        };
        let target = CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX;
        let scope = match to_all {
            true => CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_ALL_DEVICES,
            false => CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER,
        };
        // SAFETY: it takes two numbers, and the context is current.
        let code = unsafe { flush(target, scope) };
        self.checked("cuFlushGPUDirectRDMAWrites", code)
    }
}

fn page_size() -> u64 {
    // SAFETY: it takes a number and gives one.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size)
        .ok()
        .filter(|size| *size > 0)
        .unwrap_or(4096)
}
