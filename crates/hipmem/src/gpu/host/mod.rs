//! The stand-in: one device that is the host itself. What is true of a GPU is true of it as far as it can be:
//! memory is found by address, streams are queues that run beside the caller, handles open another process's
//! memory and stop doing so when that has ended. It is for tests on machines without a GPU.

mod memory;
mod stream;

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use kvxfer_verbs::PciAddress;
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use nix::sys::memfd::{MFdFlags, memfd_create};

use self::memory::Memories;
use self::stream::{HostEvent, HostStream};
use super::api::{Direction, DmaBufFault, Entered, Grain, Launch, NotLoaded, PointerFacts};
use super::code::{self, GpuCode, Refused};
use super::device::{GpuInfo, Uuid};
use super::runtime::RuntimeKind;
use crate::raw;

/// A kernel of the stand-in: the arguments, workgroups, threads of each.
type HostKernel = unsafe extern "C" fn(*const libc::c_void, u32, u32);

pub(super) struct HostApi {
    memories: Memories,
    streams: Mutex<HashMap<u64, Arc<HostStream>>>,
    events: Mutex<HashMap<u64, Arc<HostEvent>>>,
    modules: Mutex<HashMap<u64, Loaded>>,
    next: AtomicU64,
    /// Held alone by calls that wait for the device.
    calls: RwLock<()>,
}

/// The file stays open while the library is loaded: the loader knows libraries by their paths, and the
/// path of a file that is closed would be another's.
struct Loaded {
    library: Library,
    _file: OwnedFd,
}

/// The stand-in's own answers, by the numbers that HIP and CUDA share.
fn refused(call: &'static str, number: u32) -> Refused {
    let words = match number {
        code::INVALID_VALUE => "invalid value",
        code::OUT_OF_MEMORY => "out of memory",
        code::INVALID_DEVICE => "invalid device",
        code::INVALID_IMAGE => "not a shared object",
        code::PEER_UNSUPPORTED => "no peers",
        code::INVALID_HANDLE => "invalid handle",
        code::NOT_FOUND => "not found",
        code::NOT_READY => "not ready",
        code::ALREADY_REGISTERED => "registered already",
        _ => "not supported",
    };
    Refused {
        call,
        code: GpuCode {
            runtime: RuntimeKind::Host,
            number,
            name: String::new(),
            words: words.to_owned(),
        },
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pointer(address: u64) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(address as usize)
}

impl HostApi {
    pub(super) fn new() -> Self {
        Self {
            memories: Memories::default(),
            streams: Mutex::default(),
            events: Mutex::default(),
            modules: Mutex::default(),
            next: AtomicU64::new(1),
            calls: RwLock::new(()),
        }
    }

    /// Makes a call as CUDA's driver makes it that takes memory from a device, or puts code there: behind all that is on
    /// any stream, and before every call that comes meanwhile.
    fn alone<T>(&self, call: impl FnOnce() -> T) -> T {
        let _alone = self.calls.write().unwrap_or_else(PoisonError::into_inner);
        let streams: Vec<_> = lock(&self.streams).values().map(Arc::clone).collect();
        streams.iter().for_each(|stream| stream.wait());
        call()
    }

    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// A stream; 0 is the default one, which is there once it is used.
    fn stream(&self, call: &'static str, stream: u64) -> Result<Arc<HostStream>, Refused> {
        let mut streams = lock(&self.streams);
        if stream == 0 && !streams.contains_key(&0) {
            streams.insert(0, Arc::new(HostStream::start().ok_or_else(|| none(call))?));
        }
        let found = streams.get(&stream).map(Arc::clone);
        found.ok_or_else(|| refused(call, code::INVALID_HANDLE))
    }

    fn event(&self, call: &'static str, event: u64) -> Result<Arc<HostEvent>, Refused> {
        let found = lock(&self.events).get(&event).map(Arc::clone);
        found.ok_or_else(|| refused(call, code::INVALID_HANDLE))
    }

    pub(super) fn kind(&self) -> RuntimeKind {
        RuntimeKind::Host
    }

    pub(super) fn path(&self) -> &Path {
        Path::new("the host stand-in")
    }

    pub(super) fn device_count(&self) -> Result<u32, Refused> {
        Ok(1)
    }

    pub(super) fn enter(&self, ordinal: u32) -> Result<Entered, Refused> {
        drop(self.calls.read().unwrap_or_else(PoisonError::into_inner));
        match ordinal {
            0 => Ok(Entered::Same),
            _ => Err(refused("enter", code::INVALID_DEVICE)),
        }
    }

    pub(super) fn leave(&self, _: Entered) {}

    pub(super) fn info(&self, ordinal: u32) -> Result<GpuInfo, Refused> {
        self.enter(ordinal)?;
        Ok(GpuInfo {
            ordinal,
            // The bridge to the bus, where no GPU is.
            pci: PciAddress {
                domain: 0,
                bus: 0,
                device: 0,
                function: 0,
            },
            uuid: machine(),
            name: "host stand-in".to_owned(),
            arch: "host".to_owned(),
            memory: memory::host_memory().1,
            compute_units: std::thread::available_parallelism()
                .map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX)),
            xccs: None,
            integrated: true,
            dma_buf: false,
            gpudirect_rdma: None,
            writes_ordering: None,
            flush_options: None,
            host_register: true,
            host_register_read_only: Some(true),
            fine_grained: false,
            large_bar: None,
            mps: false,
        })
    }

    pub(super) fn can_access_peer(&self, _: u32, _: u32) -> Result<bool, Refused> {
        Ok(false)
    }

    pub(super) fn enable_peer(&self, _: u32) -> Result<(), Refused> {
        Err(refused("enable_peer", code::PEER_UNSUPPORTED))
    }

    pub(super) fn mem_info(&self) -> Result<(u64, u64), Refused> {
        Ok(memory::host_memory())
    }

    pub(super) fn alloc(&self, len: u64, grain: Grain) -> Result<u64, Refused> {
        if grain != Grain::Coarse {
            return Err(refused(
                "allocation of fine-grained memory",
                code::NOT_SUPPORTED,
            ));
        }
        self.memories.alloc(len)
    }

    pub(super) unsafe fn free(&self, at: u64) -> Result<(), Refused> {
        self.alone(|| self.memories.free(at))
    }

    pub(super) fn host_alloc(&self, len: u64) -> Result<(u64, u64), Refused> {
        let at = self.memories.pin_new(len)?;
        Ok((at, at))
    }

    pub(super) unsafe fn host_free(&self, at: u64) -> Result<(), Refused> {
        self.alone(|| self.memories.unpin_new(at))
    }

    pub(super) unsafe fn host_register(&self, at: u64, len: u64) -> Result<u64, Refused> {
        self.memories.register(at, len)?;
        Ok(at)
    }

    pub(super) unsafe fn host_register_read_only(&self, at: u64, len: u64) -> Result<u64, Refused> {
        // SAFETY: as for this function.
        unsafe { self.host_register(at, len) }
    }

    pub(super) unsafe fn host_register_registers(&self, at: u64, len: u64) -> Result<u64, Refused> {
        // SAFETY: as for this function.
        unsafe { self.host_register(at, len) }
    }

    pub(super) unsafe fn host_unregister(&self, at: u64) -> Result<(), Refused> {
        self.alone(|| self.memories.unregister(at))
    }

    pub(super) fn pointer(&self, at: u64) -> Result<Option<PointerFacts>, Refused> {
        Ok(self.memories.find(at))
    }

    pub(super) unsafe fn copy(
        &self,
        dst: u64,
        src: u64,
        len: u64,
        _: Direction,
        stream: u64,
    ) -> Result<(), Refused> {
        let stream = self.stream("copy", stream)?;
        stream.put(move || {
            let (dst, src) = (pointer(dst), pointer(src).cast_const());
            // SAFETY: the caller keeps both spans until the stream has got past this.
            unsafe { raw::copy(dst, src, len as usize) }
        });
        Ok(())
    }

    pub(super) fn has_batches(&self) -> bool {
        true
    }

    pub(super) unsafe fn fill(
        &self,
        dst: u64,
        byte: u8,
        len: u64,
        stream: u64,
    ) -> Result<(), Refused> {
        let stream = self.stream("fill", stream)?;
        stream.put(move || {
            // SAFETY: the caller keeps the span until the stream has got past this.
            unsafe { raw::set(pointer(dst), byte, len as usize) }
        });
        Ok(())
    }

    pub(super) fn stream_create(&self, _: bool) -> Result<u64, Refused> {
        let stream = HostStream::start().ok_or_else(|| none("stream_create"))?;
        let number = self.number();
        lock(&self.streams).insert(number, Arc::new(stream));
        Ok(number)
    }

    pub(super) unsafe fn stream_destroy(&self, stream: u64) -> Result<(), Refused> {
        let gone = lock(&self.streams).remove(&stream);
        let gone = gone.ok_or_else(|| refused("stream_destroy", code::INVALID_HANDLE))?;
        drop(gone);
        Ok(())
    }

    pub(super) unsafe fn stream_wait(&self, stream: u64) -> Result<(), Refused> {
        self.stream("stream_wait", stream)?.wait();
        Ok(())
    }

    pub(super) unsafe fn stream_done(&self, stream: u64) -> Result<bool, Refused> {
        Ok(self.stream("stream_done", stream)?.is_done())
    }

    pub(super) unsafe fn stream_wait_event(&self, stream: u64, event: u64) -> Result<(), Refused> {
        let call = "stream_wait_event";
        let (stream, event) = (self.stream(call, stream)?, self.event(call, event)?);
        let mark = event.mark();
        stream.put(move || event.wait_for(mark));
        Ok(())
    }

    pub(super) fn event_create(&self, timing: bool) -> Result<u64, Refused> {
        let number = self.number();
        lock(&self.events).insert(number, Arc::new(HostEvent::new(timing)));
        Ok(number)
    }

    pub(super) unsafe fn event_destroy(&self, event: u64) -> Result<(), Refused> {
        let gone = lock(&self.events).remove(&event);
        let gone = gone.ok_or_else(|| refused("event_destroy", code::INVALID_HANDLE));
        gone.map(drop)
    }

    pub(super) unsafe fn event_record(&self, event: u64, stream: u64) -> Result<(), Refused> {
        let call = "event_record";
        let (stream, event) = (self.stream(call, stream)?, self.event(call, event)?);
        let mark = event.record();
        stream.put(move || event.reach(mark));
        Ok(())
    }

    pub(super) unsafe fn event_done(&self, event: u64) -> Result<bool, Refused> {
        Ok(self.event("event_done", event)?.is_done())
    }

    pub(super) unsafe fn event_elapsed(&self, start: u64, stop: u64) -> Result<f32, Refused> {
        let call = "event_elapsed";
        let (start, stop) = (self.event(call, start)?, self.event(call, stop)?);
        if !start.timing || !stop.timing {
            return Err(refused(call, code::INVALID_HANDLE));
        }
        match (start.reached_at(), stop.reached_at()) {
            (Some(from), Some(to)) => Ok(to.saturating_duration_since(from).as_secs_f32() * 1e3),
            _ => Err(refused(call, code::NOT_READY)),
        }
    }

    pub(super) unsafe fn module_load(&self, image: &[u8]) -> Result<u64, NotLoaded> {
        let failed = |log: String| NotLoaded {
            refused: refused("dlopen", code::INVALID_IMAGE),
            log,
        };
        let name = c"kvxfer-host-module";
        let file = memfd_create(name, MFdFlags::MFD_CLOEXEC)
            .map_err(|errno| failed(format!("memfd_create: {errno}")))?;
        let mut writer = fs::File::from(file);
        writer.write_all(image).map_err(|e| failed(e.to_string()))?;
        let file = OwnedFd::from(writer);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        // SAFETY: the caller knows the shared object's initialisers.
        let library = self.alone(|| unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) });
        let library = library.map_err(|e| failed(e.to_string()))?;
        let number = self.number();
        let loaded = Loaded {
            library,
            _file: file,
        };
        lock(&self.modules).insert(number, loaded);
        Ok(number)
    }

    pub(super) unsafe fn module_unload(&self, module: u64) -> Result<(), Refused> {
        let gone = lock(&self.modules).remove(&module);
        let gone = gone.ok_or_else(|| refused("module_unload", code::INVALID_HANDLE));
        gone.map(drop)
    }

    pub(super) unsafe fn module_function(&self, module: u64, name: &CStr) -> Result<u64, Refused> {
        let call = "dlsym";
        let modules = lock(&self.modules);
        let loaded = modules
            .get(&module)
            .ok_or_else(|| refused(call, code::INVALID_HANDLE))?;
        let name = CString::from(name).into_bytes_with_nul();
        // SAFETY: it is looked up, and called only as `HostKernel` says.
        let symbol = unsafe { loaded.library.get::<HostKernel>(&name) };
        let symbol = symbol.map_err(|_| refused(call, code::NOT_FOUND))?;
        Ok(symbol.as_raw_ptr().expose_provenance() as u64)
    }

    pub(super) unsafe fn function_registers(&self, _: u64) -> Result<Option<u32>, Refused> {
        Ok(None)
    }

    pub(super) unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), Refused> {
        let stream = self.stream("launch", launch.stream)?;
        let function = pointer(launch.function);
        // SAFETY: it is of `module_function`, which found a function of this type.
        let kernel = unsafe { std::mem::transmute::<*mut u8, HostKernel>(function) };
        let (grid, block) = (launch.grid, launch.block);
        // Arguments are aligned as a structure of C may ask for.
        let mut args = vec![0_u128; launch.args.len().div_ceil(16)];
        let room = args.as_mut_ptr().cast::<u8>();
        // SAFETY: `args` has room for as many bytes.
        unsafe { room.copy_from_nonoverlapping(launch.args.as_ptr(), launch.args.len()) };
        stream.put(move || {
            // SAFETY: the caller keeps what the kernel needs until the stream has got past this.
            unsafe { kernel(args.as_ptr().cast(), grid, block) }
        });
        Ok(())
    }

    pub(super) unsafe fn ipc_export(&self, at: u64) -> Result<[u8; 64], Refused> {
        self.memories.export(at)
    }

    pub(super) fn ipc_open(&self, handle: &[u8; 64]) -> Result<u64, Refused> {
        self.memories.open(handle)
    }

    pub(super) unsafe fn ipc_close(&self, at: u64) -> Result<(), Refused> {
        self.alone(|| self.memories.close(at))
    }

    pub(super) unsafe fn dma_buf(&self, _: u64, _: u64) -> Result<(OwnedFd, u64), DmaBufFault> {
        Err(DmaBufFault::NoFunction)
    }

    pub(super) fn flush_writes(&self, _: bool) -> Result<(), Refused> {
        Ok(())
    }
}

fn none(call: &'static str) -> Refused {
    refused(call, code::OUT_OF_MEMORY)
}

/// This start of this machine, which all its processes share.
fn machine() -> Uuid {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: Vec<u8> = text
        .chars()
        .filter_map(|c| c.to_digit(16))
        .map(|d| d as u8)
        .collect();
    let mut uuid = [0; 16];
    for (byte, pair) in uuid.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = pair.iter().fold(0, |byte, digit| byte << 4 | digit);
    }
    Uuid(uuid)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{RecvTimeoutError, channel};
    use std::time::Duration;

    use super::*;

    /// As CUDA does it.
    #[test]
    fn what_takes_memory_waits_for_the_device_and_other_calls_for_that() {
        let api = Arc::new(HostApi::new());
        let stream = api.stream_create(false).unwrap();
        let (end, ends) = channel::<()>();
        let kernel = api.stream("test", stream).unwrap();
        kernel.put(move || {
            let _ = ends.recv();
        });
        let (memory, pinned) = (
            api.alloc(4096, Grain::Coarse).unwrap(),
            api.host_alloc(4096).unwrap().0,
        );
        // Neither of these waits.
        assert!(api.enter(0).is_ok());
        let (told, made) = channel();
        let call = |which: &'static str, call: fn(&HostApi, u64), at: u64| {
            let (api, told) = (Arc::clone(&api), told.clone());
            std::thread::spawn(move || {
                call(&api, at);
                let _ = told.send(which);
            });
        };
        // SAFETY: it is of `alloc`, and nobody uses it.
        call("free", |api, at| unsafe { api.free(at) }.unwrap(), memory);
        while api.calls.try_read().is_ok() {
            std::thread::yield_now();
        }
        let soon = Duration::from_millis(50);
        call("enter", |api, _| assert!(api.enter(0).is_ok()), 0);
        assert_eq!(made.recv_timeout(soon), Err(RecvTimeoutError::Timeout));
        drop(end);
        let mut both = [made.recv().unwrap(), made.recv().unwrap()];
        both.sort_unstable();
        assert_eq!(both, ["enter", "free"]);
        // SAFETY: it is of `host_alloc`, and nobody uses it.
        unsafe { api.host_free(pinned) }.unwrap();
    }
}
