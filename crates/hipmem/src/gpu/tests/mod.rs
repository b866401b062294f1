//! Libraries that pass for GPU runtimes: what is said where one is missing or refuses, and that calls are
//! made as they have to be.

mod fake;
mod foreign;

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer_verbs::{Access, SoftConfig, open_soft};

use self::fake::{CUDA, CUDA_PINS, Fake, HIP, HSA};
use super::api::Api;
use super::cuda::CudaApi;
use super::hip::HipApi;
use super::sys::{Cuda, Hip};
use super::{
    Gpu, GpuFault, GpuMemory, GpuRuntime, NoGpu, PeerHostMemory, PinnedMemory, RuntimeKind,
};
use crate::HostArena;
use crate::error::Error;

fn cuda(fake: &Fake) -> Result<GpuRuntime, Error> {
    GpuRuntime::with(Api::Cuda(CudaApi::load_from(&[fake.path().as_os_str()])?))
}

fn hip(fake: &Fake, hsa: Option<&Fake>) -> Result<GpuRuntime, Error> {
    let hsa = hsa.map(|hsa| hsa.path().as_os_str());
    GpuRuntime::with(Api::Hip(HipApi::load_from(
        &[fake.path().as_os_str()],
        hsa,
    )?))
}

fn no_gpu<T>(result: Result<T, impl Into<Error>>) -> NoGpu {
    match result.map(drop).map_err(Into::into) {
        Err(Error::NoGpu(why)) => why,
        Err(other) => panic!("{other}"),
        Ok(()) => panic!("it was opened"),
    }
}

fn fault<T>(result: Result<T, Error>) -> GpuFault {
    match result.map(drop) {
        Err(Error::Gpu(fault)) => *fault,
        Err(other) => panic!("{other}"),
        Ok(()) => panic!("nothing was refused"),
    }
}

/// The addresses of fakes' memory are nobody's: they are never gone to.
fn at(gpu: &Gpu, addr: u64, len: u64) -> Result<GpuMemory, Error> {
    // SAFETY: the fake says that it is there, and does nothing with it.
    unsafe { GpuMemory::from_raw_parts(gpu, addr, len, Arc::new(())) }
}

#[test]
fn a_library_that_is_not_there_is_told_with_all_that_was_tried() {
    let text = std::env::temp_dir().join(format!("kvxfer-gpu-text-{}.so", std::process::id()));
    std::fs::write(&text, [b'x'; 4096]).unwrap();
    let names = [OsStr::new("libkvxfer-none.so.1"), text.as_os_str()];
    let why = no_gpu(CudaApi::load_from(&names));
    std::fs::remove_file(&text).unwrap();
    let words = why.to_string();
    for part in ["cannot open shared object file", "invalid ELF header"] {
        assert!(words.contains(part), "{words}");
    }
    assert_eq!(words.matches("libkvxfer-none.so.1").count(), 1, "{words}");
    let NoGpu::Library { tried } = why else {
        panic!("{words}");
    };
    let tried: Vec<_> = tried.iter().map(|tried| tried.name.as_os_str()).collect();
    assert_eq!(tried, names);
}

#[test]
fn each_required_symbol_is_missed_by_name_and_with_the_librarys_path() {
    let missed = |fake: &Fake, symbol: &str, why: NoGpu| {
        let words = why.to_string();
        assert!(
            words.contains(symbol) && words.contains("LD_LIBRARY_PATH"),
            "{words}"
        );
        let same = matches!(&why, NoGpu::Symbol { symbol: s, library }
            if *s == symbol && library == fake.path());
        assert!(same, "{why:?}");
    };
    for symbol in [
        Cuda::REQUIRED[0],
        Cuda::REQUIRED[20],
        Cuda::REQUIRED[Cuda::REQUIRED.len() - 1],
    ] {
        let fake = Fake::without(CUDA, Cuda::REQUIRED, symbol);
        missed(&fake, symbol, no_gpu(cuda(&fake)));
    }
    for symbol in [
        Hip::REQUIRED[0],
        Hip::REQUIRED[20],
        Hip::REQUIRED[Hip::REQUIRED.len() - 1],
    ] {
        let fake = Fake::without(HIP, Hip::REQUIRED, symbol);
        missed(&fake, symbol, no_gpu(hip(&fake, None)));
    }
}

#[test]
fn a_runtime_that_does_not_start_is_not_one_without_devices() {
    let with = |source: &str| {
        let fake = Fake::but(CUDA, source, Cuda::REQUIRED);
        (no_gpu(cuda(&fake)), fake)
    };
    let (why, fake) = with("int cuInit(unsigned f) { return 803; }");
    let words = why.to_string();
    assert!(matches!(&why, NoGpu::Init { library, refused }
        if library == fake.path() && refused.call == "cuInit" && refused.code.number == 803));
    assert!(words.contains("of different versions"), "{words}");
    let (why, _) = with("int cuInit(unsigned f) { return 100; }");
    assert!(why.to_string().contains("CUDA_VISIBLE_DEVICES"), "{why}");
    assert!(
        matches!(why, NoGpu::NoDevice { runtime: RuntimeKind::Cuda, refused: Some(r), .. }
        if r.call == "cuInit" && r.code.number == 100)
    );
    let (why, _) = with("int cuDeviceGetCount(int *n) { *n = 0; return 0; }");
    assert!(why.to_string().contains("it counts 0 devices"), "{why}");
    assert!(matches!(why, NoGpu::NoDevice { refused: None, .. }));
}

#[test]
fn devices_are_told_as_the_runtime_tells_them() -> Result<(), Error> {
    let runtime = cuda(&Fake::new(CUDA, Cuda::REQUIRED))?;
    let [first, second] = runtime.gpus() else {
        panic!("{runtime:?}");
    };
    let info = second.info();
    assert_eq!(
        (info.ordinal, info.pci.to_string().as_str()),
        (1, "0000:11:00.0")
    );
    assert_eq!((info.arch.as_str(), info.name.as_str()), ("sm_90", "fake"));
    assert_eq!(
        (info.memory, info.writes_ordering, info.flush_options),
        (1 << 30, Some(100), Some(1))
    );
    assert_ne!(first.info().uuid, info.uuid);
    assert_eq!(runtime.gpu_at(info.pci)?, second);
    // Without the function there is no dma-buf, whatever the attribute says.
    assert!(!info.dma_buf);
    assert!(info.mps);
    // Nobody is taken to be under MPS by a driver that does not know of it.
    for of_mps in ["*v = 0; return 0;", "*v = 1; return 1;"] {
        let of_mps = format!("if (a == 133) {{ {of_mps} }} *v = 1; return 0;");
        let of_mps = format!("int cuDeviceGetAttribute(int *v, int a, int d) {{ {of_mps} }}");
        let runtime = cuda(&Fake::but(CUDA, &of_mps, Cuda::REQUIRED))?;
        assert!(!runtime.gpu(0)?.info().mps);
    }
    Ok(())
}

#[test]
fn cuda_leaves_the_callers_contexts_as_they_were_also_when_it_fails() -> Result<(), Error> {
    let fake = Fake::new(CUDA, Cuda::REQUIRED);
    let runtime = cuda(&fake)?;
    let (first, second) = (runtime.gpu(0)?, runtime.gpu(1)?);
    let memory = GpuMemory::new(second, 4096)?;
    memory.fill(0, 10, 1)?;
    let found = fault(GpuMemory::new(first, 1 << 40));
    assert!(
        matches!(found, GpuFault::OutOfMemory { free: 5, total: 6, len, .. } if len == 1 << 40)
    );
    assert!(found.to_string().contains("ask for less"), "{found}");
    assert!(memory.export().is_ok());
    drop(memory);
    assert_eq!(fake.number("depth"), 0);
    assert!(fake.number("pushes") >= 5);
    // A context of each device was retained once, and the last one pushed was the second's.
    assert_eq!(fake.number("retained"), 2);
    assert_eq!(fake.number("last"), 0x1001);
    Ok(())
}

#[test]
fn hip_leaves_the_callers_device_and_no_error_behind() -> Result<(), Error> {
    let fake = Fake::new(HIP, Hip::REQUIRED);
    let runtime = hip(&fake, None)?;
    fake.set("current", 1);
    let (first, second) = (runtime.gpu(0)?, runtime.gpu(1)?);
    for gpu in [first, second] {
        GpuMemory::new(gpu, 4096)?.fill(0, 10, 1)?;
        assert!(matches!(
            fault(GpuMemory::new(gpu, 1 << 40)),
            GpuFault::OutOfMemory { .. }
        ));
        assert_eq!(fake.number("current"), 1);
        assert_eq!(fake.number("last_error"), 0);
    }
    assert!(fake.number("sets") >= 4);
    Ok(())
}

#[test]
fn peers_that_reach_each_other_already_are_well() -> Result<(), Error> {
    let fake = Fake::new(CUDA, Cuda::REQUIRED);
    let runtime = cuda(&fake)?;
    let (first, second) = (runtime.gpu(0)?, runtime.gpu(1)?);
    first.enable_access(second)?;
    first.enable_access(second)?;
    assert_eq!(fake.number("peers"), 2);
    // From the second to the first there is no way.
    let found = fault(second.enable_access(first));
    let same = matches!(&found, GpuFault::NoPeerAccess { from, to, refused: None }
        if (*from, *to) == (second.info().pci, first.info().pci));
    assert!(same, "{found:?}");
    let never = "int cuCtxEnablePeerAccess(void *c, unsigned f) { return 217; }";
    let runtime = cuda(&Fake::but(CUDA, never, Cuda::REQUIRED))?;
    let found = fault(runtime.gpu(0)?.enable_access(runtime.gpu(1)?));
    assert_eq!(found.code().map(|code| code.number), Some(217), "{found}");
    Ok(())
}

#[test]
fn hips_memory_is_known_by_either_numbering() -> Result<(), Error> {
    for (device, host) in [(1, 0), (2, 1)] {
        let fake = Fake::new(HIP, Hip::REQUIRED);
        let runtime = hip(&fake, None)?;
        fake.set("device_type", device);
        fake.set("host_type", host);
        let gpu = runtime.gpu(0)?;
        let memory = at(gpu, 0x20_0010, 16)?;
        assert_eq!(memory.allocation().base, 0x20_0000);
        let found = fault(at(gpu, 0x90_0000, 16));
        assert!(
            matches!(found, GpuFault::NotDeviceMemory { refused: None, .. }),
            "{found}"
        );
        let found = fault(at(gpu, 0x20_fff0, 17));
        assert!(
            matches!(found, GpuFault::CrossesAllocation { .. }),
            "{found}"
        );
        // The second device's.
        let found = fault(at(gpu, 0x30_0000, 16));
        let is = runtime.gpu(1)?.info().pci;
        assert!(
            matches!(found, GpuFault::OtherDevice { is: i, .. } if i == is),
            "{found}"
        );
        // What was allocated to find out is freed.
        assert_eq!(fake.number("allocated"), 0);
    }
    Ok(())
}

#[test]
fn memory_that_cuda_does_not_export_is_told_with_the_way_out() -> Result<(), Error> {
    let fake = Fake::new(CUDA, Cuda::REQUIRED);
    let runtime = cuda(&fake)?;
    let gpu = runtime.gpu(0)?;
    // Allocated by virtual-memory calls, as its attribute says.
    let pooled = at(gpu, 0x50_0010, 16)?;
    let found = fault(pooled.export());
    assert!(
        matches!(found, GpuFault::NotExportable { refused: None, .. }),
        "{found}"
    );
    assert!(
        found.to_string().contains("expandable_segments:False"),
        "{found}"
    );
    // And by the answer, where there is no attribute.
    fake.set("refuse_export", 1);
    let found = fault(GpuMemory::new(gpu, 4096)?.export());
    assert!(
        matches!(&found, GpuFault::NotExportable { refused: Some(r), .. } if r.code.number == 1)
    );
    // The host's is nobody's.
    let found = fault(at(gpu, 0x90_0000, 16));
    assert!(
        matches!(found, GpuFault::NotDeviceMemory { refused: None, .. }),
        "{found}"
    );
    Ok(())
}

#[test]
fn a_handle_names_the_allocation_and_where_in_it() -> Result<(), Error> {
    let fake = Fake::new(CUDA, Cuda::REQUIRED);
    let runtime = cuda(&fake)?;
    let memory = at(runtime.gpu(0)?, 0x20_0010, 16)?;
    let handle = memory.slice(4, 8)?.export()?;
    assert_eq!(fake.number("exported"), 0x20_0000);
    let bytes = handle.to_bytes();
    let word = |at: usize| {
        bytes[at..at + 8]
            .iter()
            .rev()
            .fold(0, |n, b| n << 8 | u64::from(*b))
    };
    assert_eq!([word(69), word(77), word(85)], [0x1_0000, 0x14, 8]);
    Ok(())
}

#[test]
fn hip_opens_handles_with_the_flag_of_its_version() -> Result<(), Error> {
    for old in [0, 1] {
        let fake = Fake::new(HIP, Hip::REQUIRED);
        let runtime = hip(&fake, None)?;
        fake.set("old_flag", old);
        let gpu = runtime.gpu(0)?;
        let mut bytes = at(gpu, 0x20_0000, 16)?.export()?.to_bytes();
        // Another process's.
        *bytes.last_mut().unwrap() ^= 1;
        let memory = GpuMemory::open(gpu, &super::IpcHandle::from_bytes(&bytes)?)?;
        assert_eq!(memory.addr(), 0x20_0000);
        drop(memory);
        gpu.later().settle();
        assert_eq!(fake.number("open"), 0);
    }
    Ok(())
}

#[test]
fn a_dma_buf_of_cuda_is_whole_pages_and_a_place_in_them() -> Result<(), Error> {
    let source = format!("{CUDA}{}", fake::CUDA_DMA_BUF);
    let fake = Fake::new(&source, Cuda::REQUIRED);
    let runtime = cuda(&fake)?;
    let gpu = runtime.gpu(0)?;
    assert!(gpu.info().dma_buf);
    let exported = at(gpu, 0x20_1234, 0x2000)?.dma_buf()?;
    assert_eq!((exported.offset, exported.len), (0x234, 0x2000));
    assert_eq!(fake.number("from"), 0x20_1000);
    assert_eq!(fake.number("bytes"), 0x3000);
    fake.set("refuse", 801);
    let found = fault(at(gpu, 0x20_1234, 16)?.dma_buf());
    assert!(matches!(&found, GpuFault::NoDmaBuf { refused: Some(r), .. } if r.code.number == 801));
    Ok(())
}

#[test]
fn a_dma_buf_of_hip_comes_from_hsa_with_the_place_that_it_says() -> Result<(), Error> {
    let hsa = Fake::new(HSA, &[]);
    let runtime = hip(&Fake::new(HIP, Hip::REQUIRED), Some(&hsa))?;
    let gpu = runtime.gpu(0)?;
    assert!(gpu.info().dma_buf);
    let memory = at(gpu, 0x20_1234, 0x2000)?;
    let exported = memory.dma_buf()?;
    assert_eq!((exported.offset, exported.len), (0x77, 0x2000));
    assert_eq!(hsa.number("initialised"), 1);
    hsa.set("status", 0x1001);
    let found = fault(memory.dma_buf());
    assert!(found.to_string().contains("fake words"), "{found}");
    // ROCm 7 without it gives whole allocations, whose first byte is the file's.
    let source = format!("{HIP}{}", fake::HIP_DMA_BUF);
    let fake = Fake::new(&source, Hip::REQUIRED);
    let runtime = hip(&fake, None)?;
    let exported = at(runtime.gpu(0)?, 0x20_1234, 0x2000)?.dma_buf()?;
    assert_eq!((exported.offset, exported.len), (0x1234, 0x2000));
    assert_eq!(
        (fake.number("from"), fake.number("bytes")),
        (0x20_0000, 0x1_0000)
    );
    // And older ones give none.
    let runtime = hip(&Fake::new(HIP, Hip::REQUIRED), None)?;
    assert!(!runtime.gpu(0)?.info().dma_buf);
    let found = fault(at(runtime.gpu(0)?, 0x20_0000, 16)?.dma_buf());
    assert!(
        matches!(found, GpuFault::NoDmaBuf { refused: None, .. }),
        "{found}"
    );
    Ok(())
}

#[test]
fn ptx_that_is_refused_comes_with_the_compilers_words() -> Result<(), Error> {
    let fake = Fake::new(CUDA, Cuda::REQUIRED);
    let runtime = cuda(&fake)?;
    // SAFETY: the fake only counts its bytes.
    let found = fault(unsafe { super::Module::load(runtime.gpu(0)?, b"not ptx") });
    let GpuFault::Module { arch, refused, log } = &found else {
        panic!("{found}");
    };
    assert_eq!((arch.as_str(), refused.code.number), ("sm_90", 218));
    assert_eq!(log, "ptxas: line 1 of 7 bytes");
    assert!(
        found.to_string().ends_with(": ptxas: line 1 of 7 bytes"),
        "{found}"
    );
    Ok(())
}

/// What a driver holds on to may not be unmapped: something else would come to lie there.
#[test]
fn memory_that_a_driver_does_not_unpin_stays_mapped() -> Result<(), Box<dyn std::error::Error>> {
    let fake = Fake::new(&format!("{CUDA}{CUDA_PINS}"), Cuda::REQUIRED);
    let runtime = cuda(&fake)?;
    let gpu = runtime.gpu(0)?;
    let (owner, reader) = (
        open_soft(SoftConfig::default())?,
        open_soft(SoftConfig::default())?,
    );
    let mapped = |base: u64| {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("its own");
        maps.contains(&format!("{base:x}-"))
    };
    for keep in [false, true] {
        fake.set("keep", keep.into());
        fake.set("pins", 0);
        fake.set("pinned", 0);
        let arena = HostArena::new(1 << 20)?;
        let region = (owner.alloc_pd()?).register(arena.memory().as_memory(), Access::REMOTE_READ);
        let shared = owner.share(&[region?])?;
        let soon = Instant::now() + Duration::from_secs(60);
        let theirs = reader.map_shared(&owner.address(), shared.token(), (0, 5000), soon)?;
        let (base, _) = theirs.file();
        let own = HostArena::new(8192)?.memory().slice(0, 64)?;
        let places = [base, own.addr()];
        let pinned = (
            PeerHostMemory::pin(gpu, &[theirs])?,
            PinnedMemory::register(gpu, &own)?,
        );
        drop(own);
        // No more than the pages that were asked for.
        let page = crate::pages::ordinary_page_size();
        let pages = i32::try_from(5000_u64.next_multiple_of(page) + page)?;
        assert_eq!((fake.number("pins"), fake.number("pinned")), (2, pages));
        assert_eq!(places.map(mapped), [true; 2]);
        drop(pinned);
        gpu.later().settle();
        assert_eq!(fake.number("pins"), if keep { 2 } else { 0 });
        assert_eq!(places.map(mapped), [keep; 2]);
    }
    Ok(())
}

/// An address or an event of one is something else to the other: the stand-in would go there.
#[test]
fn what_is_of_two_runtimes_is_not_mixed() -> Result<(), Error> {
    let fake = Fake::new(CUDA, Cuda::REQUIRED);
    let theirs = cuda(&fake)?;
    let theirs = theirs.gpu(0)?;
    let far = at(theirs, 0x20_0000, 4096)?;
    let host = GpuRuntime::open(super::RuntimeChoice::Only(RuntimeKind::Host))?;
    let host = host.gpu(0)?;
    let (stream, near) = (super::Stream::new(host)?, GpuMemory::new(host, 4096)?);
    let refused = |result: Result<(), Error>| {
        let found = fault(result);
        assert!(
            matches!(
                found,
                GpuFault::OtherRuntime {
                    is: RuntimeKind::Cuda,
                    other: RuntimeKind::Host,
                    ..
                }
            ),
            "{found}"
        );
    };
    refused(stream.wait_event(&super::Event::new(theirs)?));
    refused(stream.fill(&far, 0, 1, 0).map(drop));
    refused(near.copy_from(&far, 0, 0, 1));
    let (a, b) = (super::Place::Gpu(&far, 0), super::Place::Gpu(&near, 0));
    for (dst, src) in [(a, b), (b, a)] {
        refused(stream.copy(&[super::Copy { dst, src, len: 1 }]).map(drop));
    }
    assert!(!theirs.can_access(host)?);
    assert!(matches!(
        fault(host.enable_access(theirs)),
        GpuFault::NoPeerAccess { refused: None, .. }
    ));
    Ok(())
}
