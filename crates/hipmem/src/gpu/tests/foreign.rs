//! A NIC's queues, mapped by libraries that pass for runtimes: by which calls, once for all, and undone.

use std::fmt;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Weak};

use kvxfer_verbs::{FdSpan, Memory, MemoryKind};

use super::super::foreign::ForeignMemory;
use super::super::sys::{Cuda, Hip};
use super::super::{Gpu, GpuFault};
use super::fake::{CUDA, Fake, HIP};
use super::{cuda, fault, hip};
use crate::error::Error;
use crate::{HostArena, HostMemory};

/// Counts pages that are pinned, and those that are mapped as registers.
const CUDA_FOREIGN: &str = r#"
int pinned, registers, others, refuse_pin, refuse_registers, keep;
int cuMemHostRegister_v2(void *p, size_t n, unsigned flags) {
    if ((long)p % 4096 || n % 4096) return 1;
    if (flags == 3 && refuse_pin) return refuse_pin;
    if (flags == 7 && refuse_registers) return refuse_registers;
    if (flags == 3) pinned++; else if (flags == 7) registers++; else others++;
    return 0;
}
int cuMemHostGetDevicePointer_v2(u64 *d, void *p, unsigned flags) { *d = (u64)p + 0x100000000000ULL; return 0; }
int gone;
int cuMemHostUnregister(void *p) { gone += !keep; return keep ? 1 : 0; }
"#;

const HIP_FOREIGN: &str = r#"
int pinned, gone;
int hipHostRegister(void *p, size_t n, unsigned flags) {
    if (flags == 7) return is(1);
    pinned += flags == 3;
    return 0;
}
int hipHostGetDevicePointer(void **d, void *p, unsigned flags) { *d = p; return 0; }
int hipHostUnregister(void *p) { gone++; return 0; }
"#;

/// What GPUs see a page at, beside its address.
const AWAY: u64 = 0x1000_0000_0000;

/// A page of an arena that says that it is a device's registers.
#[derive(Debug)]
struct Registers(HostMemory);

// SAFETY: it is memory that the arena keeps.
unsafe impl Memory for Registers {
    fn addr(&self) -> u64 {
        self.0.addr()
    }
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn kind(&self) -> MemoryKind {
        MemoryKind::Registers
    }
    fn fd(&self) -> Option<FdSpan<'_>> {
        None
    }
}

type Parts = Vec<(&'static str, Arc<dyn Memory>)>;

/// Queue `n` of an arena: slots and completions of its own, records in one page for all, and doorbells in another.
fn queue(arena: &HostArena, n: u64) -> Result<Parts, Error> {
    let part = |at, len| arena.memory().slice(at, len);
    let own = 0x1_0000 * (n + 1);
    let bell = part(0x1800 + 8 * n, 8)?;
    Ok(vec![
        ("slots", part(own + 64, 8192)?.as_memory()),
        ("record", part(128 * n, 8)?.as_memory()),
        ("completions", part(own + 0x4000, 4096)?.as_memory()),
        ("its record", part(128 * n + 64, 8)?.as_memory()),
        ("doorbell", Arc::new(Registers(bell))),
    ])
}

fn addresses(of: &[ForeignMemory]) -> Vec<u64> {
    of.iter().map(ForeignMemory::device_addr).collect()
}

fn counts<const N: usize>(fake: &Fake, names: [&str; N]) -> [i32; N] {
    names.map(|name| fake.number(name))
}

#[test]
fn each_page_is_mapped_once_for_all_queues_and_undone_behind_the_last() -> Result<(), Error> {
    let fake = Fake::new(&format!("{CUDA}{CUDA_FOREIGN}"), Cuda::REQUIRED);
    let runtime = cuda(&fake)?;
    let gpu = runtime.gpu(0)?;
    let arena = HostArena::new(1 << 20)?;
    let at = |parts: &Parts| -> Vec<u64> { parts.iter().map(|(_, m)| m.addr() + AWAY).collect() };
    let all = ["pinned", "registers", "others", "gone"];

    let parts = queue(&arena, 0)?;
    let first = ForeignMemory::map(gpu, &parts)?;
    // The slots, which are in three pages, the completions, and one page of both records.
    assert_eq!(counts(&fake, all), [3, 1, 0, 0]);
    assert_eq!(addresses(&first), at(&parts));
    let parts = queue(&arena, 1)?;
    let second = ForeignMemory::map(gpu, &parts)?;
    assert_eq!(counts(&fake, all), [5, 1, 0, 0], "what it has alone");
    assert_eq!(addresses(&second), at(&parts));
    drop(first);
    assert_eq!(counts(&fake, all), [5, 1, 0, 2], "what the other has not");
    let third = ForeignMemory::map(gpu, &queue(&arena, 2)?)?;
    assert_eq!(counts(&fake, all), [7, 1, 0, 2]);
    drop((second, third));
    assert_eq!(counts(&fake, all), [7, 1, 0, 8]);
    // Anew, when all had been undone.
    drop(ForeignMemory::map(gpu, &queue(&arena, 0)?)?);
    assert_eq!(counts(&fake, all), [10, 2, 0, 12]);
    // The caller's context is current again.
    assert_eq!(fake.number("depth"), 0);
    Ok(())
}

/// What a refusal of one part says, with nothing left mapped.
fn refused(gpu: &Gpu, fake: &Fake, arena: &HostArena) -> Result<GpuFault, Error> {
    let made = fake.number("pinned") - fake.number("gone");
    let found = fault(ForeignMemory::map(gpu, &queue(arena, 0)?));
    assert_eq!(fake.number("pinned") - fake.number("gone"), made);
    Ok(found)
}

#[test]
fn registers_that_cuda_does_not_map_are_told_with_what_to_do() -> Result<(), Error> {
    let fake = Fake::new(&format!("{CUDA}{CUDA_FOREIGN}"), Cuda::REQUIRED);
    let runtime = cuda(&fake)?;
    let gpu = runtime.gpu(0)?;
    let arena = HostArena::new(1 << 20)?;
    let bell = arena.memory().addr() + 0x1800;
    for (code, words) in [
        (800, "NVreg_RegistryDwords=\"PeerMappingOverride=1;\""),
        (801, "older Linux kernels"),
        (1, "cuMemHostRegister_v2"),
    ] {
        fake.set("refuse_registers", code);
        let found = refused(gpu, &fake, &arena)?;
        assert!(found.to_string().contains(words), "{found}");
        let number = found.code().map(|code| code.number);
        assert_eq!(number, u32::try_from(code).ok());
        let GpuFault::Foreign {
            part, addr, kind, ..
        } = found
        else {
            panic!("{found}");
        };
        assert_eq!(
            (part, addr, kind),
            ("doorbell", bell, MemoryKind::Registers)
        );
    }
    // The same number says nothing of registers where memory was to be pinned.
    fake.set("refuse_pin", 800);
    let found = refused(gpu, &fake, &arena)?;
    assert!(!found.to_string().contains("PeerMapping"), "{found}");
    assert!(
        matches!(found, GpuFault::Foreign { part: "slots", .. }),
        "{found}"
    );
    // Whose pages somebody else has pinned is another matter.
    for (name, wanted) in [("refuse_pin", "slots"), ("refuse_registers", "doorbell")] {
        fake.set("refuse_pin", 0);
        fake.set("refuse_registers", 0);
        fake.set(name, 712);
        let found = refused(gpu, &fake, &arena)?;
        let GpuFault::ForeignAlready { part, .. } = &found else {
            panic!("{found}");
        };
        assert_eq!(*part, wanted);
        assert!(
            found.to_string().contains("mapped for a GPU already"),
            "{found}"
        );
    }
    Ok(())
}

#[test]
fn hip_says_of_registers_that_it_does_not_map_them() -> Result<(), Error> {
    let fake = Fake::new(&format!("{HIP}{HIP_FOREIGN}"), Hip::REQUIRED);
    let runtime = hip(&fake, None)?;
    let gpu = runtime.gpu(1)?;
    let arena = HostArena::new(1 << 20)?;
    let found = refused(gpu, &fake, &arena)?;
    assert!(
        found.to_string().contains("hipHostRegisterIoMemory"),
        "{found}"
    );
    assert_eq!(fake.number("pinned"), 3);
    // The caller's device is current again, and HIP keeps no error for the engine to find.
    assert_eq!((fake.number("current"), fake.number("last_error")), (0, 0));
    // A doorbell in ordinary memory is mapped as such.
    let mut parts = queue(&arena, 0)?;
    if let Some((_, bell)) = parts.last_mut() {
        *bell = arena.memory().slice(0x1800, 8)?.as_memory();
    }
    let mapped = ForeignMemory::map(gpu, &parts)?;
    assert_eq!(fake.number("pinned"), 7);
    drop(mapped);
    assert_eq!(fake.number("gone"), 7);
    Ok(())
}

/// Something else would come to lie there.
#[test]
fn what_a_driver_does_not_let_go_of_is_kept() -> Result<(), Error> {
    let fake = Fake::new(&format!("{CUDA}{CUDA_FOREIGN}"), Cuda::REQUIRED);
    let runtime = cuda(&fake)?;
    let gpu = runtime.gpu(0)?;
    for keep in [false, true] {
        fake.set("keep", keep.into());
        let arena = HostArena::new(1 << 20)?;
        let parts = queue(&arena, 0)?;
        let tokens: Vec<Weak<dyn Memory>> = parts.iter().map(|(_, m)| Arc::downgrade(m)).collect();
        let mapped = ForeignMemory::map(gpu, &parts)?;
        drop(parts);
        assert!(tokens.iter().all(|token| token.strong_count() > 0));
        drop(mapped);
        let kept = tokens.iter().filter(|token| token.strong_count() > 0);
        // Both records too, which are in one page.
        assert_eq!(kept.count(), if keep { 5 } else { 0 });
    }
    Ok(())
}

/// Memory that notes how many pages had been given back when it went.
struct Watched(HostMemory, Arc<Fake>, Arc<AtomicI32>);

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let gone = self.1.number("gone");
        self.2.store(gone, Ordering::SeqCst);
    }
}

// SAFETY: it is memory that the handle keeps.
unsafe impl Memory for Watched {
    fn addr(&self) -> u64 {
        self.0.addr()
    }
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn kind(&self) -> MemoryKind {
        MemoryKind::Host
    }
    fn fd(&self) -> Option<FdSpan<'_>> {
        None
    }
}

/// What it is a part of, such as a queue pair, may be destroyed with it, and its pages then be anything else's.
#[test]
fn memory_is_let_go_of_when_its_pages_have_been_given_back() -> Result<(), Error> {
    let source = format!("{CUDA}{CUDA_FOREIGN}");
    let fake = Arc::new(Fake::new(&source, Cuda::REQUIRED));
    let runtime = cuda(&fake)?;
    let gpu = runtime.gpu(0)?;
    let arena = HostArena::new(1 << 16)?;
    let gone = Arc::new(AtomicI32::new(-1));
    let part = arena.memory().slice(64, 100)?;
    let watched = Watched(part, Arc::clone(&fake), Arc::clone(&gone));
    let memory: Arc<dyn Memory> = Arc::new(watched);
    let mapped = ForeignMemory::map(gpu, &[("slots", memory)])?;
    assert_eq!(gone.load(Ordering::SeqCst), -1, "it is held");
    drop(mapped);
    assert_eq!(gone.load(Ordering::SeqCst), 1);
    Ok(())
}

#[test]
fn memory_that_no_page_of_this_process_is_behind_is_not_mapped() -> Result<(), Error> {
    let fake = Fake::new(&format!("{CUDA}{CUDA_FOREIGN}"), Cuda::REQUIRED);
    let runtime = cuda(&fake)?;
    let gpu = runtime.gpu(0)?;
    let theirs = super::at(gpu, 0x20_0000, 4096)?.as_memory();
    let found = ForeignMemory::map(gpu, &[("slots", theirs)]);
    assert!(matches!(found, Err(Error::NotHost { .. })), "{found:?}");
    assert_eq!(fake.number("pinned"), 0);
    Ok(())
}
