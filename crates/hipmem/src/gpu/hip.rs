//! HIP. Nothing here has run on an AMD GPU: that the calls are what HIP takes is checked against its
//! headers and its library, up to the point where it finds no device.

use std::ffi::{CStr, OsStr};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr::{null_mut, with_exposed_provenance_mut};
use std::sync::OnceLock;

use libc::{c_char, c_int, c_uint, c_void};

use super::api::{Direction, DmaBufFault, Entered, Grain, Launch, NotLoaded, PointerFacts};
use super::code::{GpuCode, INVALID_VALUE, NOT_SUPPORTED, PEER_ALREADY, Refused};
use super::device::{GpuInfo, Uuid};
use super::error::NoGpu;
use super::kfd;
use super::runtime::RuntimeKind;
use super::sys::hip_types::*;
use super::sys::{Hip, Hsa, Library};
use kvxfer_verbs::PciAddress;

/// Newest first; the last is a development package's.
const NAMES: [&str; 4] = [
    "libamdhip64.so.7",
    "libamdhip64.so.6",
    "libamdhip64.so.5",
    "libamdhip64.so",
];
const HSA: &str = "libhsa-runtime64.so.1";

pub(super) struct HipApi {
    hip: Hip,
    library: Library,
    /// What libhsa-runtime64 adds. libamdhip64 has it loaded already.
    hsa: Option<Hsa>,
    /// What `hipPointerGetAttributes` of this version calls memory of a device.
    device_memory: OnceLock<c_uint>,
}

/// A call with its name. Where it stands, what the function asks for is kept: out-pointers are
/// locals, numbers are of the runtime, and the rest is what the enclosing function's caller keeps.
macro_rules! call {
    ($self:ident.$function:ident($($arg:expr),* $(,)?)) => {{
        // SAFETY: see the macro.
        let code = unsafe { ($self.hip.$function)($($arg),*) };
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

fn index(ordinal: u32) -> c_int {
    ordinal.cast_signed()
}

impl HipApi {
    pub(super) fn load() -> Result<Self, NoGpu> {
        Self::load_from(&NAMES.map(OsStr::new), Some(OsStr::new(HSA)))
    }

    pub(super) fn load_from(names: &[&OsStr], hsa: Option<&OsStr>) -> Result<Self, NoGpu> {
        let library = Library::first(names)?;
        let hip = Hip::find(&library)?;
        let api = Self {
            hip,
            library,
            hsa: hsa.and_then(open_hsa),
            device_memory: OnceLock::new(),
        };
        call!(api.hipInit(0))
            .map_err(|refused| NoGpu::starting(RuntimeKind::Hip, api.library.path(), refused))?;
        Ok(api)
    }

    fn code(&self, code: hipError_t) -> GpuCode {
        // SAFETY: it takes any number, and gives a string of the library or null.
        let name = unsafe { (self.hip.hipGetErrorName)(code) };
        // SAFETY: as above.
        let words = unsafe { (self.hip.hipGetErrorString)(code) };
        GpuCode {
            runtime: RuntimeKind::Hip,
            number: code.0,
            name: text(name),
            words: text(words),
        }
    }

    fn checked(&self, call: &'static str, code: hipError_t) -> Result<(), Refused> {
        if code == hipSuccess {
            return Ok(());
        }
        // HIP keeps the last error for whoever asks next, which would be the engine.
        // SAFETY: it takes nothing.
        unsafe { (self.hip.hipGetLastError)() };
        Err(Refused {
            call,
            code: self.code(code),
        })
    }

    fn done(&self, call: &'static str, code: hipError_t) -> Result<bool, Refused> {
        if code == hipErrorNotReady {
            // SAFETY: it takes nothing.
            unsafe { (self.hip.hipGetLastError)() };
            return Ok(false);
        }
        self.checked(call, code).map(|()| true)
    }

    fn attribute(&self, ordinal: u32, attribute: hipDeviceAttribute_t) -> Option<u32> {
        let mut value = 0;
        call!(self.hipDeviceGetAttribute(&raw mut value, attribute, index(ordinal))).ok()?;
        u32::try_from(value).ok()
    }

    fn attributes_at(&self, at: u64) -> Result<hipPointerAttribute_t, Refused> {
        // Newer versions may know more fields: there is room for them.
        #[repr(C)]
        struct Room {
            known: hipPointerAttribute_t,
            more: [u64; 8],
        }
        let mut room = Room {
            known: hipPointerAttribute_t {
                memoryType: 0,
                device: 0,
                devicePointer: null_mut(),
                hostPointer: null_mut(),
                isManaged: 0,
                allocationFlags: 0,
            },
            more: [0; 8],
        };
        let out = (&raw mut room).cast();
        call!(self.hipPointerGetAttributes(out, pointer(at)))?;
        Ok(room.known)
    }

    /// The number changed between versions: memory that certainly is a device's tells it.
    fn device_memory(&self) -> Result<c_uint, Refused> {
        if let Some(number) = self.device_memory.get() {
            return Ok(*number);
        }
        let probe = self.alloc(4096, Grain::Coarse)?;
        let told = self.attributes_at(probe);
        // SAFETY: it was made above, and nobody else has it.
        let freed = unsafe { self.free(probe) };
        let number = told?.memoryType;
        freed?;
        Ok(*self.device_memory.get_or_init(|| number))
    }

    pub(super) fn kind(&self) -> RuntimeKind {
        RuntimeKind::Hip
    }

    pub(super) fn path(&self) -> &Path {
        self.library.path()
    }

    pub(super) fn device_count(&self) -> Result<u32, Refused> {
        let mut count = 0;
        call!(self.hipGetDeviceCount(&raw mut count))?;
        Ok(u32::try_from(count).unwrap_or(0))
    }

    pub(super) fn enter(&self, ordinal: u32) -> Result<Entered, Refused> {
        let mut before = 0;
        call!(self.hipGetDevice(&raw mut before))?;
        if before == index(ordinal) {
            return Ok(Entered::Same);
        }
        call!(self.hipSetDevice(index(ordinal)))?;
        Ok(Entered::Was(before))
    }

    pub(super) fn leave(&self, entered: Entered) {
        if let Entered::Was(before) = entered
            && let Err(refused) = call!(self.hipSetDevice(before))
        {
            tracing::warn!(%refused, before, "the caller's device is not current again");
        }
    }

    pub(super) fn info(&self, ordinal: u32) -> Result<GpuInfo, Refused> {
        let mut device = 0;
        call!(self.hipDeviceGet(&raw mut device, index(ordinal)))?;
        let mut name: [c_char; 256] = [0; 256];
        call!(self.hipDeviceGetName(name.as_mut_ptr(), 255, device))?;
        let mut id: [c_char; 64] = [0; 64];
        call!(self.hipDeviceGetPCIBusId(id.as_mut_ptr(), 63, index(ordinal)))?;
        let pci = bounded(&id);
        let pci = pci.parse::<PciAddress>().map_err(|_| Refused {
            call: "hipDeviceGetPCIBusId",
            code: GpuCode {
                runtime: RuntimeKind::Hip,
                number: 0,
                name: String::new(),
                words: format!("{pci:?} is no PCI address"),
            },
        })?;
        let mut memory = 0;
        call!(self.hipDeviceTotalMem(&raw mut memory, device))?;
        let mut uuid = hipUUID { bytes: [0; 16] };
        if let Some(function) = self.hip.hipDeviceGetUuid {
            // SAFETY: one UUID is written.
            let code = unsafe { function(&raw mut uuid, device) };
            self.checked("hipDeviceGetUuid", code)?;
        }
        let flag = |attribute| self.attribute(ordinal, attribute).map(|value| value != 0);
        let node = kfd::node(pci);
        Ok(GpuInfo {
            ordinal,
            pci,
            uuid: Uuid(uuid.bytes.map(|b| b.cast_unsigned())),
            name: bounded(&name),
            xccs: node.as_ref().and_then(|node| node.xccs),
            arch: node.map_or_else(|| "unknown".to_owned(), |node| node.arch),
            memory: memory as u64,
            compute_units: self
                .attribute(ordinal, hipDeviceAttributeMultiprocessorCount)
                .unwrap_or(0),
            integrated: flag(hipDeviceAttributeIntegrated).unwrap_or(false),
            dma_buf: self.hsa.is_some() || self.hip.hipMemGetHandleForAddressRange.is_some(),
            // HIP does not say: amdgpu's peer memory is the kernel's matter.
            gpudirect_rdma: None,
            writes_ordering: None,
            flush_options: None,
            host_register: true,
            host_register_read_only: None,
            fine_grained: flag(hipDeviceAttributeFineGrainSupport).unwrap_or(false),
            large_bar: flag(hipDeviceAttributeIsLargeBar),
            mps: false,
        })
    }

    pub(super) fn can_access_peer(&self, ordinal: u32, peer: u32) -> Result<bool, Refused> {
        let mut can = 0;
        call!(self.hipDeviceCanAccessPeer(&raw mut can, index(ordinal), index(peer)))?;
        Ok(can != 0)
    }

    pub(super) fn enable_peer(&self, peer: u32) -> Result<(), Refused> {
        match call!(self.hipDeviceEnablePeerAccess(index(peer), 0)) {
            Err(refused) if refused.code.number == PEER_ALREADY => Ok(()),
            other => other,
        }
    }

    pub(super) fn mem_info(&self) -> Result<(u64, u64), Refused> {
        let (mut free, mut total) = (0, 0);
        call!(self.hipMemGetInfo(&raw mut free, &raw mut total))?;
        Ok((free as u64, total as u64))
    }

    pub(super) fn alloc(&self, len: u64, grain: Grain) -> Result<u64, Refused> {
        let (mut out, len) = (null_mut(), len as usize);
        match grain {
            Grain::Coarse => call!(self.hipMalloc(&raw mut out, len))?,
            Grain::Fine => {
                let flags = hipDeviceMallocFinegrained;
                call!(self.hipExtMallocWithFlags(&raw mut out, len, flags))?;
            }
            Grain::Uncached => {
                let flags = hipDeviceMallocUncached;
                call!(self.hipExtMallocWithFlags(&raw mut out, len, flags))?;
            }
        }
        Ok(address(out))
    }

    pub(super) unsafe fn free(&self, at: u64) -> Result<(), Refused> {
        call!(self.hipFree(pointer(at)))
    }

    pub(super) fn host_alloc(&self, len: u64) -> Result<(u64, u64), Refused> {
        let mut out = null_mut();
        let flags = hipHostMallocPortable | hipHostMallocMapped | hipHostMallocCoherent;
        call!(self.hipHostMalloc(&raw mut out, len as usize, flags))?;
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
        let mut device = null_mut();
        call!(self.hipHostGetDevicePointer(&raw mut device, host, 0))?;
        Ok(address(device))
    }

    pub(super) unsafe fn host_free(&self, at: u64) -> Result<(), Refused> {
        call!(self.hipHostFree(pointer(at)))
    }

    pub(super) unsafe fn host_register(&self, at: u64, len: u64) -> Result<u64, Refused> {
        // SAFETY: as for this function.
        unsafe { self.register(at, len, 0) }
    }

    pub(super) unsafe fn host_register_registers(&self, at: u64, len: u64) -> Result<u64, Refused> {
        // SAFETY: as for this function.
        unsafe { self.register(at, len, hipHostRegisterIoMemory) }
    }

    /// # Safety
    ///
    /// As [`host_register`](Self::host_register).
    unsafe fn register(&self, at: u64, len: u64, more: c_uint) -> Result<u64, Refused> {
        let flags = hipHostRegisterPortable | hipHostRegisterMapped | more;
        call!(self.hipHostRegister(pointer(at), len as usize, flags))?;
        self.device_address(pointer(at)).inspect_err(|_| {
            // SAFETY: it was registered above, and nobody has used it.
            let _ = unsafe { self.host_unregister(at) };
        })
    }

    pub(super) unsafe fn host_register_read_only(&self, at: u64, len: u64) -> Result<u64, Refused> {
        // HIP has no flag for it that AMD's driver heeds: 8 is coarse-grained memory to it, which kernels would
        // read stale bytes of.
        // SAFETY: as for this function.
        unsafe { self.host_register(at, len) }
    }

    pub(super) unsafe fn host_unregister(&self, at: u64) -> Result<(), Refused> {
        call!(self.hipHostUnregister(pointer(at)))
    }

    pub(super) fn pointer(&self, at: u64) -> Result<Option<PointerFacts>, Refused> {
        let device_memory = self.device_memory()?;
        let attributes = self.attributes_at(at)?;
        if attributes.memoryType != device_memory || attributes.isManaged != 0 {
            return Ok(None);
        }
        let (mut base, mut size) = (null_mut(), 0);
        call!(self.hipMemGetAddressRange(&raw mut base, &raw mut size, pointer(at)))?;
        Ok(Some(PointerFacts {
            ordinal: u32::try_from(attributes.device).unwrap_or(u32::MAX),
            base: address(base),
            size: size as u64,
            exportable: None,
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
        let kind = match way {
            Direction::HostToDevice => hipMemcpyHostToDevice,
            Direction::DeviceToHost => hipMemcpyDeviceToHost,
            Direction::DeviceToDevice => hipMemcpyDeviceToDevice,
        };
        let (dst, src) = (pointer(dst), pointer(src).cast_const());
        call!(self.hipMemcpyAsync(dst, src, len as usize, kind, pointer(stream)))
    }

    pub(super) fn has_batches(&self) -> bool {
        false
    }

    pub(super) unsafe fn fill(
        &self,
        dst: u64,
        byte: u8,
        len: u64,
        stream: u64,
    ) -> Result<(), Refused> {
        let (dst, stream) = (pointer(dst), pointer(stream));
        call!(self.hipMemsetAsync(dst, c_int::from(byte), len as usize, stream))
    }

    pub(super) fn stream_create(&self, urgent: bool) -> Result<u64, Refused> {
        let mut out = null_mut();
        let priority = -c_int::from(urgent);
        call!(self.hipStreamCreateWithPriority(&raw mut out, hipStreamNonBlocking, priority))?;
        Ok(address(out))
    }

    pub(super) unsafe fn stream_destroy(&self, stream: u64) -> Result<(), Refused> {
        call!(self.hipStreamDestroy(pointer(stream)))
    }

    pub(super) unsafe fn stream_wait(&self, stream: u64) -> Result<(), Refused> {
        call!(self.hipStreamSynchronize(pointer(stream)))
    }

    pub(super) unsafe fn stream_done(&self, stream: u64) -> Result<bool, Refused> {
        // SAFETY: the caller's stream is there.
        let code = unsafe { (self.hip.hipStreamQuery)(pointer(stream)) };
        self.done("hipStreamQuery", code)
    }

    pub(super) unsafe fn stream_wait_event(&self, stream: u64, event: u64) -> Result<(), Refused> {
        call!(self.hipStreamWaitEvent(pointer(stream), pointer(event), 0))
    }

    pub(super) fn event_create(&self, timing: bool) -> Result<u64, Refused> {
        let mut out = null_mut();
        let flags = match timing {
            true => hipEventDefault,
            false => hipEventDisableTiming,
        };
        call!(self.hipEventCreateWithFlags(&raw mut out, flags))?;
        Ok(address(out))
    }

    pub(super) unsafe fn event_destroy(&self, event: u64) -> Result<(), Refused> {
        call!(self.hipEventDestroy(pointer(event)))
    }

    pub(super) unsafe fn event_record(&self, event: u64, stream: u64) -> Result<(), Refused> {
        call!(self.hipEventRecord(pointer(event), pointer(stream)))
    }

    pub(super) unsafe fn event_done(&self, event: u64) -> Result<bool, Refused> {
        // SAFETY: the caller's event is there.
        let code = unsafe { (self.hip.hipEventQuery)(pointer(event)) };
        self.done("hipEventQuery", code)
    }

    pub(super) unsafe fn event_elapsed(&self, start: u64, stop: u64) -> Result<f32, Refused> {
        let mut ms = 0.0;
        call!(self.hipEventElapsedTime(&raw mut ms, pointer(start), pointer(stop)))?;
        Ok(ms)
    }

    pub(super) unsafe fn module_load(&self, image: &[u8]) -> Result<u64, NotLoaded> {
        let mut out = null_mut();
        let loaded = call!(self.hipModuleLoadData(&raw mut out, image.as_ptr().cast()));
        // There is no compiler in the way that would say more.
        let log = String::new();
        loaded.map_err(|refused| NotLoaded { refused, log })?;
        Ok(address(out))
    }

    pub(super) unsafe fn module_unload(&self, module: u64) -> Result<(), Refused> {
        call!(self.hipModuleUnload(pointer(module)))
    }

    pub(super) unsafe fn module_function(&self, module: u64, name: &CStr) -> Result<u64, Refused> {
        let mut out = null_mut();
        call!(self.hipModuleGetFunction(&raw mut out, pointer(module), name.as_ptr()))?;
        Ok(address(out))
    }

    pub(super) unsafe fn function_registers(&self, function: u64) -> Result<Option<u32>, Refused> {
        let Some(ask) = self.hip.hipFuncGetAttribute else {
            return Ok(None);
        };
        let mut value = 0;
        let what = HIP_FUNC_ATTRIBUTE_NUM_REGS;
        // SAFETY: it writes one number, and the caller has the function.
        let code = unsafe { ask(&raw mut value, what, pointer(function)) };
        self.checked("hipFuncGetAttribute", code)?;
        Ok(u32::try_from(value).ok())
    }

    pub(super) unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), Refused> {
        let mut size = launch.args.len();
        let mut extra = [
            pointer(HIP_LAUNCH_PARAM_BUFFER_POINTER as u64),
            launch.args.as_ptr().cast_mut().cast(),
            pointer(HIP_LAUNCH_PARAM_BUFFER_SIZE as u64),
            (&raw mut size).cast(),
            pointer(HIP_LAUNCH_PARAM_END as u64),
        ];
        let (f, stream) = (pointer(launch.function), pointer(launch.stream));
        let (grid, block, extra) = (launch.grid, launch.block, extra.as_mut_ptr());
        call!(self.hipModuleLaunchKernel(f, grid, 1, 1, block, 1, 1, 0, stream, null_mut(), extra))
    }

    pub(super) unsafe fn ipc_export(&self, at: u64) -> Result<[u8; 64], Refused> {
        let mut handle = hipIpcMemHandle_t { reserved: [0; 64] };
        call!(self.hipIpcGetMemHandle(&raw mut handle, pointer(at)))?;
        Ok(handle.reserved.map(|b| b.cast_unsigned()))
    }

    pub(super) fn ipc_open(&self, handle: &[u8; 64]) -> Result<u64, Refused> {
        let reserved = handle.map(|b| b.cast_signed());
        let handle = hipIpcMemHandle_t { reserved };
        let mut out = null_mut();
        let lazy = hipIpcMemLazyEnablePeerAccess;
        match call!(self.hipIpcOpenMemHandle(&raw mut out, handle, lazy)) {
            // Before ROCm 5.7 the flag was 0.
            Err(refused) if refused.code.number == INVALID_VALUE => {
                call!(self.hipIpcOpenMemHandle(&raw mut out, handle, 0)).map_err(|_| refused)?;
            }
            other => other?,
        }
        Ok(address(out))
    }

    pub(super) unsafe fn ipc_close(&self, at: u64) -> Result<(), Refused> {
        call!(self.hipIpcCloseMemHandle(pointer(at)))
    }

    pub(super) unsafe fn dma_buf(&self, at: u64, len: u64) -> Result<(OwnedFd, u64), DmaBufFault> {
        if let Some(hsa) = &self.hsa {
            let (mut fd, mut offset) = (-1, 0);
            let export = hsa.hsa_amd_portable_export_dmabuf;
            // SAFETY: the caller's span is there; one descriptor and one number are written.
            let status = unsafe { export(pointer(at), len as usize, &raw mut fd, &raw mut offset) };
            if status.0 != 0 || fd < 0 {
                return Err(DmaBufFault::Refused(hsa_refused(hsa, status.0)));
            }
            // SAFETY: it was made for us just now.
            return Ok((unsafe { OwnedFd::from_raw_fd(fd) }, offset));
        }
        let Some(export) = self.hip.hipMemGetHandleForAddressRange else {
            return Err(DmaBufFault::NoFunction);
        };
        // HIP does not tell the place in the file, so all of the allocation is exported: its first
        // byte is the file's.
        let facts = match self.pointer(at).map_err(DmaBufFault::Refused)? {
            Some(facts) if facts.base <= at => facts,
            _ => return Err(DmaBufFault::NoFunction),
        };
        let mut fd: c_int = -1;
        let (out, base) = ((&raw mut fd).cast(), pointer(facts.base));
        let kind = hipMemRangeHandleTypeDmaBufFd;
        // SAFETY: the caller's allocation is there; one descriptor is written.
        let code = unsafe { export(out, base, facts.size as usize, kind, 0) };
        self.checked("hipMemGetHandleForAddressRange", code)
            .map_err(DmaBufFault::Refused)?;
        // SAFETY: it was made for us just now.
        Ok((unsafe { OwnedFd::from_raw_fd(fd) }, at - facts.base))
    }

    pub(super) fn flush_writes(&self, _: bool) -> Result<(), Refused> {
        Err(Refused {
            call: "flush of other devices' writes",
            code: self.code(hipError_t(NOT_SUPPORTED)),
        })
    }
}

fn open_hsa(name: &OsStr) -> Option<Hsa> {
    let library = Library::first(&[name]).ok()?;
    let hsa = match Hsa::find(&library) {
        Ok(hsa) => hsa,
        Err(why) => {
            tracing::debug!(%why, "no dma-buf export through libhsa-runtime64");
            return None;
        }
    };
    // SAFETY: it counts its users; HIP is one.
    let status = unsafe { (hsa.hsa_init)() };
    (status.0 == 0).then_some(hsa)
}

fn hsa_refused(hsa: &Hsa, status: u32) -> Refused {
    let mut words = std::ptr::null();
    let status = super::sys::hsa_status_t(status);
    // SAFETY: one pointer to a string of the library is written, or nothing.
    unsafe { (hsa.hsa_status_string)(status, &raw mut words) };
    Refused {
        call: "hsa_amd_portable_export_dmabuf",
        code: GpuCode {
            runtime: RuntimeKind::Hip,
            number: status.0,
            name: String::new(),
            words: text(words),
        },
    }
}

/// A string of a library.
pub(super) fn text(words: *const c_char) -> String {
    if words.is_null() {
        return String::new();
    }
    // SAFETY: the runtimes' words end with a zero byte, and stay.
    let words = unsafe { CStr::from_ptr(words) };
    words.to_string_lossy().into_owned()
}

/// A string in an array, up to its zero byte or the array's end.
pub(super) fn bounded(array: &[c_char]) -> String {
    let bytes: Vec<u8> = array
        .iter()
        .map(|b| b.cast_unsigned())
        .take_while(|b| *b != 0)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
