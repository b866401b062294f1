//! Allocating, registering, copying, and what is refused.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvxfer_hipmem::gpu::{GpuFault, GpuMemory, Grain, MemoryClass, PinnedMemory};
use kvxfer_hipmem::{Error, HostArena};
use kvxfer_verbs::MemoryKind;

use crate::{Outcome, fault, gpu, on_host, pattern, runtime};

#[test]
fn a_device_says_what_it_is() -> Outcome {
    let runtime = runtime();
    for (i, gpu) in runtime.gpus().iter().enumerate() {
        let info = gpu.info();
        println!("{info:?}");
        assert_eq!(info.ordinal as usize, i);
        assert!(info.memory > 1 << 20 && info.compute_units > 0, "{info:?}");
        assert!(!info.name.is_empty() && !info.arch.is_empty(), "{info:?}");
        assert_eq!(runtime.gpu_at(info.pci)?.info().pci, info.pci);
        let (free, total) = gpu.free_memory()?;
        assert!(free > 0 && free <= total);
    }
    assert_eq!(runtime.gpu(0)?, &gpu());
    let asked = fault(runtime.gpu(1000));
    let GpuFault::NoSuchDevice { asked, seen } = asked else {
        panic!("{asked}");
    };
    assert_eq!((asked.as_str(), seen.len()), ("1000", runtime.gpus().len()));
    let nowhere = "ffff0000:7f:1f.7".parse()?;
    assert!(matches!(
        fault(runtime.gpu_at(nowhere)),
        GpuFault::NoSuchDevice { .. }
    ));
    Ok(())
}

#[test]
fn bytes_go_in_and_come_out_at_odd_places() -> Outcome {
    let memory = GpuMemory::new(&gpu(), 1_000_003)?;
    memory.fill(0, 1_000_003, 0xa5)?;
    let bytes = pattern(70_001, 1);
    memory.write(333, &bytes)?;
    memory.fill(500, 7, 0x11)?;
    let mut all = vec![0; 1_000_003];
    memory.read(0, &mut all)?;
    let mut expected = vec![0xa5; 1_000_003];
    expected[333..333 + 70_001].copy_from_slice(&bytes);
    expected[500..507].fill(0x11);
    assert!(all == expected);
    // From one memory to another, and within one.
    let other = GpuMemory::new(&gpu(), 100_000)?;
    other.copy_from(&memory, 333, 17, 70_001)?;
    other.copy_from(&other, 17, 80_001, 10_000)?;
    let mut part = vec![0; 10_000];
    other.read(80_001, &mut part)?;
    assert!(part == expected[333..10_333]);
    Ok(())
}

#[test]
fn what_is_outside_is_refused_and_nothing_is_nothing() -> Outcome {
    let gpu = gpu();
    let memory = GpuMemory::new(&gpu, 4096)?;
    let outside = |result: Result<(), Error>| {
        assert!(
            matches!(result, Err(Error::OutOfBounds { size: 4096, .. })),
            "{result:?}"
        );
    };
    outside(memory.read(4096, &mut [0]));
    outside(memory.write(4000, &[0; 97]));
    outside(memory.fill(u64::MAX, 2, 0));
    outside(memory.fill(0, u64::MAX, 0));
    outside(memory.copy_from(&memory, 4000, 0, 97));
    outside(memory.copy_from(&memory, 0, 4000, 97));
    outside(memory.slice(1, 4096).map(drop));
    memory.read(4096, &mut [])?;
    memory.write(4096, &[])?;
    memory.fill(4096, 0, 1)?;
    memory.copy_from(&memory, 4096, 0, 0)?;
    assert!(matches!(GpuMemory::new(&gpu, 0), Err(Error::Empty)));
    assert!(matches!(PinnedMemory::new(&gpu, 0), Err(Error::Empty)));
    Ok(())
}

#[test]
fn a_part_is_memory_of_its_own_and_keeps_the_whole() -> Outcome {
    let whole = GpuMemory::new(&gpu(), 1 << 16)?;
    whole.fill(0, 1 << 16, 0)?;
    let (base, allocation) = (whole.addr(), whole.allocation());
    let part = whole.slice(1000, 5000)?.slice(24, 100)?;
    drop(whole);
    assert_eq!((part.addr(), part.len()), (base + 1024, 100));
    assert_eq!(part.allocation(), allocation);
    part.fill(0, 100, 9)?;
    let mut bytes = [0; 100];
    part.read(0, &mut bytes)?;
    assert_eq!(bytes, [9; 100]);
    Ok(())
}

#[test]
fn too_much_is_told_with_what_there_is() {
    let gpu = gpu();
    let len = 1 << 60;
    let found = fault(GpuMemory::new(&gpu, len));
    let GpuFault::OutOfMemory {
        device,
        len: asked,
        free,
        total,
        code,
    } = &found
    else {
        panic!("{found}");
    };
    assert_eq!((*device, *asked, code.number), (gpu.info().pci, len, 2));
    assert!(*free > 0 && free <= total, "{found}");
    assert!(found.to_string().contains("out of memory"), "{found}");
}

#[test]
fn a_token_says_whose_memory_it_is() -> Outcome {
    let gpu = gpu();
    let memory = GpuMemory::new(&gpu, 8192)?.slice(64, 128)?;
    let token = memory.as_memory();
    let kind = MemoryKind::Device {
        gpu: gpu.info().pci,
    };
    assert_eq!(
        (token.addr(), token.len(), token.kind()),
        (memory.addr(), 128, kind)
    );
    assert!(token.fd().is_none());
    assert_eq!(memory.class_for(&gpu), MemoryClass::Local);
    let pinned = PinnedMemory::new(&gpu, 64)?;
    assert_eq!(pinned.host().as_memory().kind(), MemoryKind::Host);
    Ok(())
}

struct Flag(Arc<AtomicBool>);

impl Drop for Flag {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn an_engines_memory_is_found_by_its_address() -> Outcome {
    let gpu = gpu();
    // Larger than what runtimes cut from a block of theirs.
    let theirs = GpuMemory::new(&gpu, 8 << 20)?;
    theirs.fill(0, 8 << 20, 3)?;
    let (base, size) = (theirs.addr(), 8 << 20);
    let gone = Arc::new(AtomicBool::new(false));
    let keep = Arc::new((theirs.clone(), Flag(Arc::clone(&gone))));
    // SAFETY: `keep` holds the allocation.
    let memory = unsafe { GpuMemory::from_raw_parts(&gpu, base + 4097, 100_000, keep) }?;
    assert_eq!((memory.addr(), memory.len()), (base + 4097, 100_000));
    assert_eq!(memory.allocation().base, base);
    assert!(memory.allocation().size >= size);
    memory.write(1, &[7; 10])?;
    let mut bytes = [0; 12];
    theirs.read(4097, &mut bytes)?;
    assert_eq!(bytes, [3, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 3]);
    let part = memory.slice(5, 10)?;
    drop(memory);
    assert!(!gone.load(Ordering::SeqCst));
    drop(part);
    assert!(gone.load(Ordering::SeqCst));

    let register = |addr, len| {
        // SAFETY: what is found to be allocated here is `theirs`, which stays.
        let made = unsafe { GpuMemory::from_raw_parts(&gpu, addr, len, Arc::new(())) };
        fault(made)
    };
    let end = theirs.allocation().size;
    for (addr, len) in [
        (base, end + 1),
        (base + 1, end),
        (base + end - 1, 2),
        (base + 5, u64::MAX),
        (base, u64::MAX - base),
    ] {
        let found = register(addr, len);
        let same = matches!(found, GpuFault::CrossesAllocation { addr: a, len: l, base: b, .. }
            if (a, l, b) == (addr, len, base));
        assert!(same, "{found:?}");
        assert!(found.to_string().contains("expandable_segments"), "{found}");
    }
    // Nowhere, and the host's.
    let host = pattern(4096, 0);
    for addr in [0x10, host.as_ptr().expose_provenance() as u64] {
        let found = register(addr, 16);
        assert!(matches!(found, GpuFault::NotDeviceMemory { .. }), "{found}");
    }
    let pinned = PinnedMemory::new(&gpu, 4096)?;
    let found = register(pinned.device_addr(), 16);
    assert!(matches!(found, GpuFault::NotDeviceMemory { .. }), "{found}");
    Ok(())
}

#[test]
fn pinned_memory_is_the_hosts_and_the_gpus() -> Outcome {
    let gpu = gpu();
    let pinned = PinnedMemory::new(&gpu, 100_001)?;
    assert_eq!((pinned.len(), pinned.host().len()), (100_001, 100_001));
    let bytes = pattern(100_001, 5);
    pinned.host().write(0, &bytes)?;
    let mut back = vec![0; 100_001];
    pinned.host().read(0, &mut back)?;
    assert!(back == bytes);
    // The host's handle keeps the memory by itself.
    let host = pinned.host().clone();
    drop(pinned);
    host.read(0, &mut back)?;
    assert!(back == bytes);
    Ok(())
}

#[test]
fn host_memory_is_pinned_once_at_a_time() -> Outcome {
    let gpu = gpu();
    if !gpu.info().host_register {
        return Err("this device cannot pin host memory".into());
    }
    let arena = HostArena::new(1 << 20)?;
    for _ in 0..2 {
        let pinned = PinnedMemory::register(&gpu, arena.memory())?;
        assert_eq!(pinned.host().addr(), arena.memory().addr());
        let again = fault(PinnedMemory::register(&gpu, arena.memory()));
        assert!(
            again.to_string().contains("pinned this memory already"),
            "{again}"
        );
        // Without it, it may be pinned again.
    }
    Ok(())
}

#[test]
fn finer_memory_is_had_or_refused() {
    let gpu = gpu();
    let fine = GpuMemory::with_grain(&gpu, 4096, Grain::Fine);
    match gpu.info().fine_grained {
        true => assert_eq!(fine.unwrap().class_for(&gpu), MemoryClass::FineGrained),
        false => {
            let refused = fault(fine);
            assert_eq!(
                refused.code().map(|code| code.number),
                Some(801),
                "{refused}"
            );
        }
    }
}

#[test]
fn a_dma_buf_is_had_or_refused_with_a_way_out() -> Outcome {
    let gpu = gpu();
    let memory = GpuMemory::new(&gpu, 4 << 20)?.slice(4096 + 64, 1 << 20)?;
    if gpu.info().dma_buf {
        // As devices ask for it, through the token.
        let exported = memory.as_memory().dma_buf()?;
        assert_eq!(exported.len, 1 << 20);
        // The place is in the page that the file's page is mapped to.
        assert_eq!(exported.offset % 4096, memory.addr() % 4096);
        let size = nix::unistd::lseek(&exported.fd, 0, nix::unistd::Whence::SeekEnd)?;
        assert!(
            size as u64 >= exported.offset + exported.len,
            "{size} {exported:?}"
        );
        let link = std::fs::read_link(format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&exported.fd)
        ))?;
        assert!(link.to_string_lossy().contains("dmabuf"), "{link:?}");
    } else {
        let refused = fault(memory.dma_buf());
        assert!(matches!(refused, GpuFault::NoDmaBuf { .. }), "{refused}");
        let Err(told) = memory.as_memory().dma_buf() else {
            panic!("the token exports what its memory refuses");
        };
        // A device's refusal has the GPU's words in it.
        assert_eq!(told.to_string(), refused.to_string());
        assert!(
            !on_host() || refused.to_string().contains("the stand-in's memory"),
            "{refused}"
        );
    }
    Ok(())
}
