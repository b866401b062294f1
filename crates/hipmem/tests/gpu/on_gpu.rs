//! What only a GPU can show.

use std::ffi::{CStr, c_int, c_void};
use std::mem::transmute;
use std::ptr::null_mut;

use kvxfer_hipmem::gpu::{Copy, Event, GpuMemory, MemoryClass, Place, RuntimeKind, Stream};

use crate::{Outcome, pattern, runtime, soon};

/// A function of the runtime that is loaded.
fn symbol(name: &CStr) -> *mut c_void {
    let file = runtime().library().to_str().unwrap().to_owned() + "\0";
    let file = CStr::from_bytes_with_nul(file.as_bytes()).unwrap();
    // SAFETY: the library is loaded already.
    let library = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW) };
    // SAFETY: as above.
    let found = unsafe { libc::dlsym(library, name.as_ptr()) };
    assert!(!found.is_null(), "{name:?}");
    found
}

fn use_everything(gpu: &kvxfer_hipmem::gpu::Gpu) -> Outcome {
    let memory = GpuMemory::new(gpu, 1 << 20)?;
    memory.fill(0, 1 << 20, 1)?;
    let (stream, event) = (Stream::new(gpu)?, Event::new(gpu)?);
    drop(stream.fill(&memory, 0, 100, 2)?);
    event.record(&stream)?;
    event.wait(soon())?;
    memory.export()?;
    // Failures too.
    assert!(GpuMemory::new(gpu, 1 << 60).is_err());
    assert!(memory.read(1 << 20, &mut [0]).is_err());
    Ok(())
}

#[test]
#[ignore = "needs a GPU: runs from the folder that `cargo xtask gpu-bundle` makes, on a machine that has one"]
fn on_gpu_the_callers_device_stays_current() -> Outcome {
    type Create = unsafe extern "C" fn(*mut *mut c_void, u32, c_int) -> c_int;
    type Pointer = unsafe extern "C" fn(*mut *mut c_void) -> c_int;
    type Destroy = unsafe extern "C" fn(*mut c_void) -> c_int;
    type Number = unsafe extern "C" fn(*mut c_int) -> c_int;
    type Set = unsafe extern "C" fn(c_int) -> c_int;
    let runtime = runtime();
    match runtime.kind() {
        RuntimeKind::Cuda => {
            // SAFETY: it is a function of this type, by cuda.h.
            let current = unsafe { transmute::<*mut c_void, Pointer>(symbol(c"cuCtxGetCurrent")) };
            // SAFETY: as above.
            let create = unsafe { transmute::<*mut c_void, Create>(symbol(c"cuCtxCreate_v2")) };
            // SAFETY: as above.
            let destroy = unsafe { transmute::<*mut c_void, Destroy>(symbol(c"cuCtxDestroy_v2")) };
            let now = || {
                let mut context = null_mut();
                // SAFETY: one pointer is written.
                let code = unsafe { current(&raw mut context) };
                assert_eq!(code, 0);
                context
            };
            // A thread without a context has none afterwards.
            assert!(now().is_null());
            for gpu in runtime.gpus() {
                use_everything(gpu)?;
            }
            assert!(now().is_null());
            // And one with a context that is not the primary one keeps it.
            let mut foreign = null_mut();
            // SAFETY: one pointer is written.
            let code = unsafe { create(&raw mut foreign, 0, 0) };
            assert_eq!(code, 0);
            for gpu in runtime.gpus() {
                use_everything(gpu)?;
                assert_eq!(now(), foreign);
            }
            // SAFETY: it was made above.
            let code = unsafe { destroy(foreign) };
            assert_eq!(code, 0);
        }
        RuntimeKind::Hip => {
            // SAFETY: it is a function of this type, by hip_runtime_api.h.
            let current = unsafe { transmute::<*mut c_void, Number>(symbol(c"hipGetDevice")) };
            // SAFETY: as above.
            let set = unsafe { transmute::<*mut c_void, Set>(symbol(c"hipSetDevice")) };
            // SAFETY: as above.
            let last = unsafe {
                transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(symbol(
                    c"hipGetLastError",
                ))
            };
            for i in 0..runtime.gpus().len() as c_int {
                // SAFETY: it takes a number.
                let code = unsafe { set(i) };
                assert_eq!(code, 0);
                for gpu in runtime.gpus() {
                    use_everything(gpu)?;
                    let mut now = -1;
                    // SAFETY: one number is written.
                    let code = unsafe { current(&raw mut now) };
                    assert_eq!((code, now), (0, i));
                    // No error is left for the engine to find.
                    // SAFETY: it takes nothing.
                    let code = unsafe { last() };
                    assert_eq!(code, 0);
                }
            }
        }
        RuntimeKind::Host => return Err("no GPU: KVXFER_TEST_GPU names no GPU's runtime".into()),
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU: runs from the folder that `cargo xtask gpu-bundle` makes, on a machine that has one"]
fn on_gpu_two_devices_reach_each_other_or_say_why_not() -> Outcome {
    let runtime = runtime();
    if runtime.kind() == RuntimeKind::Host {
        return Err("no GPU: KVXFER_TEST_GPU names no GPU's runtime".into());
    }
    let (first, rest) = runtime.gpus().split_first().ok_or("no device")?;
    first.enable_access(first)?;
    println!("{} other devices", rest.len());
    for second in rest {
        assert_ne!(first.info().pci, second.info().pci);
        assert_ne!(first.info().uuid, second.info().uuid);
        let (near, far) = (
            GpuMemory::new(first, 1 << 20)?,
            GpuMemory::new(second, 1 << 20)?,
        );
        assert_eq!(far.class_for(first), MemoryClass::Peer);
        if !first.can_access(second)? {
            assert!(first.enable_access(second).is_err());
            continue;
        }
        // Again does no harm.
        first.enable_access(second)?;
        first.enable_access(second)?;
        let bytes = pattern(1 << 20, 9);
        far.write(0, &bytes)?;
        let stream = Stream::new(first)?;
        let copy = Copy {
            dst: Place::Gpu(&near, 0),
            src: Place::Gpu(&far, 0),
            len: 1 << 20,
        };
        stream.copy(&[copy])?.wait(soon())?;
        let mut back = vec![0; 1 << 20];
        near.read(0, &mut back)?;
        assert!(back == bytes);
        // A stream of one device does not take the other's event.
        let event = Event::new(second)?;
        assert!(event.record(&stream).is_err());
        // Memory of the second that is said to be of the first.
        // SAFETY: `far` holds it.
        let lie = unsafe {
            GpuMemory::from_raw_parts(first, far.addr(), 16, std::sync::Arc::new(far.clone()))
        };
        assert!(lie.err().ok_or("taken")?.to_string().contains("not of"));
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU: runs from the folder that `cargo xtask gpu-bundle` makes, on a machine that has one"]
fn on_gpu_other_devices_writes_are_flushed_where_the_runtime_can() -> Outcome {
    let runtime = runtime();
    for gpu in runtime.gpus() {
        match (runtime.kind(), gpu.info().flush_options) {
            (RuntimeKind::Cuda, Some(options)) if options & 1 != 0 => {
                gpu.flush_writes(false)?;
                gpu.flush_writes(true)?;
            }
            (RuntimeKind::Host, _) => {
                return Err("no GPU: KVXFER_TEST_GPU names no GPU's runtime".into());
            }
            _ => assert!(gpu.flush_writes(false).is_err()),
        }
    }
    Ok(())
}
