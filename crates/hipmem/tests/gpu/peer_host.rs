//! Another process's host memory, mapped by the software device and read by a GPU. Here both are this process; the
//! mapping is another one.

use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer_hipmem::gather::{
    GatherEnd, GatherFault, GatherOptions, GatherSection, GpuKernels, Side, TensorPlaces,
};
use kvxfer_hipmem::gpu::{
    Copy, Gpu, GpuFault, GpuMemory, PeerHostMemory, PinnedMemory, Place, Stream,
};
use kvxfer_hipmem::kernels::{Pair, Piece};
use kvxfer_hipmem::post::device::DeviceQueue;
use kvxfer_hipmem::{ArenaOptions, HostArena, HostMemory};
use kvxfer_verbs::{
    Access, Context, MemoryRegion, PeerMapping, SharedFiles, SoftConfig, open_soft,
};

use crate::{Outcome, fault, gpu, on_host, pattern, soon};

/// Memory, and what a peer needs to map it.
struct Owner {
    context: Context,
    memory: HostMemory,
    shared: SharedFiles,
    _regions: Vec<MemoryRegion>,
}

/// Two halves of an arena, with a pattern.
fn owner(bytes: &[u8]) -> Result<Owner, Box<dyn std::error::Error>> {
    let arena = HostArena::new(bytes.len() as u64)?;
    arena.memory().write(0, bytes)?;
    owner_of(&arena)
}

fn owner_of(arena: &HostArena) -> Result<Owner, Box<dyn std::error::Error>> {
    let memory = arena.memory().clone();
    let len = memory.len();
    let context = open_soft(SoftConfig::default())?;
    let pd = context.alloc_pd()?;
    let half = len / 2;
    let parts = [memory.slice(0, half)?, memory.slice(half, len - half)?];
    let register = |part: &HostMemory| pd.register(part.as_memory(), Access::REMOTE_READ);
    let regions = parts.iter().map(register).collect::<Result<Vec<_>, _>>()?;
    let shared = context.share(&regions)?;
    Ok(Owner {
        context,
        memory,
        shared,
        _regions: regions,
    })
}

impl Owner {
    fn map(
        &self,
        reader: &Context,
        index: u32,
        len: u64,
    ) -> Result<PeerMapping, kvxfer_verbs::Error> {
        let token = self.shared.token();
        reader.map_shared(&self.context.address(), token, (index, len), soon())
    }
}

fn pin(gpu: &Gpu, mapping: PeerMapping) -> Result<PeerHostMemory, kvxfer_hipmem::Error> {
    let pinned = PeerHostMemory::pin(gpu, &[mapping])?;
    Ok(pinned.into_iter().next().expect("one"))
}

/// This process's own view of what it has mapped of another's.
fn view((base, len): (u64, u64)) -> HostMemory {
    let pointer = std::ptr::with_exposed_provenance_mut(base as usize);
    let pointer = NonNull::new(pointer).expect("not mapped at 0");
    // SAFETY: whoever asks has the mapping as long as this, and does not write it.
    unsafe { HostMemory::from_raw_parts(pointer, len as usize, Arc::new(())) }
}

#[test]
fn another_processes_memory_is_read_by_a_gpu() -> Outcome {
    let (block, blocks): (u64, u32) = (5000, 40);
    let half = block * u64::from(blocks);
    let bytes = pattern(2 * half as usize, 3);
    let (owner, reader) = (owner(&bytes)?, open_soft(SoftConfig::default())?);
    let gpu = gpu();
    let map = |index| owner.map(&reader, index, half);
    let [first, second] = &PeerHostMemory::pin(&gpu, &[map(0)?, map(1)?])?[..] else {
        return Err("not two".into());
    };
    // They lie in one file and share a page, which is pinned once.
    assert_ne!(half % 4096, 0);
    assert_eq!(second.device_addr(), first.device_addr() + half);
    assert_eq!(second.len(), half);
    let second = second.clone();
    // And is as long as one of them is there: nobody else can.
    let again = view(owner.map(&reader, 1, half)?.file());
    assert!(PinnedMemory::register(&gpu, &again).is_err());
    // Written after it was pinned, and read all the same.
    let at = half + 7 * block;
    owner.memory.fill(at, block, 0x3c)?;
    let mut wanted = bytes[half as usize..].to_vec();
    wanted[(7 * block) as usize..(8 * block) as usize].fill(0x3c);

    let kernels = GpuKernels::load(&gpu)?;
    let stream = Stream::new(&gpu)?;
    let to = GpuMemory::new(&gpu, half)?;
    let piece = Piece {
        src: 0,
        dst: 0,
        len: block,
    };
    for from in [0, 1] {
        to.fill(0, half, 0xee)?;
        let section = GatherSection {
            tensors: &[TensorPlaces {
                src: Place::PeerHost(&second, 0),
                dst: Place::Gpu(&to, 0),
            }],
            pieces: &[piece],
            strides: (block, block),
            blocks: (blocks, blocks),
        };
        // By the kernel alone, and by the copy engine.
        let options = GatherOptions {
            copy_engine_from: Some(from),
            ..GatherOptions::default()
        };
        let table = kernels.table(&[section], options)?;
        let pairs: Vec<Pair> = (0..blocks)
            .map(|b| Pair {
                src: b,
                dst: blocks - 1 - b,
            })
            .collect();
        let mut gather = table.gather(&stream, &[&pairs])?;
        assert!(matches!(gather.wait(soon())?, GatherEnd::Whole));
        let mut got = vec![0; half as usize];
        to.read(0, &mut got)?;
        let n = block as usize;
        for (i, block) in got.chunks(n).enumerate() {
            let src = (blocks as usize - 1 - i) * n;
            assert!(block == &wanted[src..src + n], "block {i}");
        }
    }
    let copied = stream.copy(&[Copy {
        dst: Place::Gpu(&to, 0),
        src: Place::PeerHost(&second, 0),
        len: half,
    }])?;
    copied.wait(soon())?;
    let mut got = vec![0; half as usize];
    to.read(0, &mut got)?;
    assert!(got == wanted);
    // What its owner has given back stays mapped.
    let Owner { memory, .. } = owner;
    drop(memory);
    to.fill(0, half, 0)?;
    let copied = stream.copy(&[Copy {
        dst: Place::Gpu(&to, 0),
        src: Place::PeerHost(&second, 0),
        len: half,
    }])?;
    copied.wait(soon())?;
    to.read(0, &mut got)?;
    assert!(got == wanted);
    assert!(PinnedMemory::register(&gpu, &again).is_err());
    Ok(())
}

#[test]
fn another_processes_memory_is_not_written() -> Outcome {
    let len: u64 = 8192;
    let (owner, reader) = (
        owner(&pattern(len as usize, 9))?,
        open_soft(SoftConfig::default())?,
    );
    let gpu = gpu();
    let peer = pin(&gpu, owner.map(&reader, 0, 4096)?)?;
    let own = GpuMemory::new(&gpu, 4096)?;
    let pinned = PinnedMemory::new(&gpu, 4096)?;
    let stream = Stream::new(&gpu)?;
    for src in [Place::Gpu(&own, 0), Place::Pinned(&pinned, 0)] {
        let copy = Copy {
            dst: Place::PeerHost(&peer, 0),
            src,
            len: 16,
        };
        let refused = fault(stream.copy(&[copy]));
        assert!(matches!(refused, GpuFault::ReadOnly { .. }), "{refused}");
    }
    let kernels = GpuKernels::load(&gpu)?;
    let section = |dst, src| GatherSection {
        tensors: Box::leak(Box::new([TensorPlaces { src, dst }])),
        pieces: &[Piece {
            src: 0,
            dst: 0,
            len: 64,
        }],
        strides: (64, 64),
        blocks: (4, 4),
    };
    let to = section(Place::PeerHost(&peer, 0), Place::Gpu(&own, 0));
    let refused = fault(kernels.table(&[to], GatherOptions::default()));
    assert!(matches!(refused, GpuFault::ReadOnly { .. }), "{refused}");
    // Beyond its end it is not read either.
    let beyond = section(Place::Gpu(&own, 0), Place::PeerHost(&peer, 4096 - 255));
    let refused = kernels.table(&[beyond], GatherOptions::default()).err();
    let side = |fault: &GatherFault| {
        matches!(
            fault,
            GatherFault::Outside {
                side: Side::Source,
                ..
            }
        )
    };
    match refused {
        Some(kvxfer_hipmem::Error::Gather(fault)) if side(&fault) => {}
        other => panic!("{other:?}"),
    }
    Ok(())
}

/// The last user of a file ends its pinning, and another may begin: no user in between sees the one or the other half
/// done.
#[test]
fn a_file_is_pinned_as_long_as_somebody_uses_it() -> Outcome {
    let len: u64 = 1 << 20;
    let (owner, reader) = (
        owner(&pattern(len as usize, 1))?,
        open_soft(SoftConfig::default())?,
    );
    let gpu = gpu();
    let rounds = if on_host() { 500 } else { 20 };
    std::thread::scope(|scope| {
        let users: Vec<_> = (0..4)
            .map(|at| {
                let (owner, reader, gpu) = (&owner, &reader, &gpu);
                scope.spawn(move || {
                    for _ in 0..rounds {
                        let mapping = owner.map(reader, at % 2, len / 2).expect("mapped");
                        drop(pin(gpu, mapping).expect("pinned"));
                    }
                })
            })
            .collect();
        for user in users {
            user.join().expect("no user is refused");
        }
    });
    Ok(())
}

/// Of a file only the pages are pinned that are asked for, and those that share one are pinned together.
#[test]
fn nothing_but_what_is_asked_for_is_pinned() -> Outcome {
    let len: u64 = 1 << 20;
    let (owner, reader) = (
        owner(&pattern(len as usize, 1))?,
        open_soft(SoftConfig::default())?,
    );
    let gpu = gpu();
    let first = owner.map(&reader, 0, 5000)?;
    let (base, _) = first.file();
    let pinned = PeerHostMemory::pin(&gpu, std::slice::from_ref(&first))?;
    assert!(PinnedMemory::register(&gpu, &view((base + 5000, 8))).is_err());
    // As little as a part of what is pinned is pinned with it.
    let part = pin(&gpu, owner.map(&reader, 0, 8)?)?;
    assert_eq!(part.device_addr(), pinned[0].device_addr());
    // And what another asks for, apart.
    let second = pin(&gpu, owner.map(&reader, 1, 5000)?)?;
    assert!(PinnedMemory::register(&gpu, &view((base + len / 2, 8))).is_err());
    // The page in between the two, and the one behind both, are nobody's.
    for page in [len / 4, len / 4 * 3] {
        if on_host() {
            drop(PinnedMemory::register(&gpu, &view((base + page, 4096)))?);
        }
    }
    drop((pinned, part, second));
    if on_host() {
        // Another test of this process may have a queue.
        let deadline = soon();
        while PinnedMemory::register(&gpu, &view((base, len))).is_err() {
            assert!(Instant::now() < deadline, "it stays pinned");
        }
    }
    Ok(())
}

/// While kernels may post nothing is unpinned, unless somebody wants more around it.
#[test]
fn what_is_let_go_of_beside_a_queue_is_used_again() -> Outcome {
    let len: u64 = 1 << 20;
    let (owner, reader) = (
        owner(&pattern(len as usize, 1))?,
        open_soft(SoftConfig::default())?,
    );
    let gpu = gpu();
    let (queue, _consumer) = DeviceQueue::new(&gpu, 4, Duration::from_secs(1))?;
    let mapping = owner.map(&reader, 0, 5000)?;
    let at = pin(&gpu, mapping.clone())?.device_addr();
    let taken = |base, len| PinnedMemory::register(&gpu, &view((base, len))).is_err();
    assert!(taken(mapping.file().0, 8), "it is pinned still");
    assert_eq!(pin(&gpu, mapping.clone())?.device_addr(), at);
    let more = pin(&gpu, owner.map(&reader, 0, len / 2)?)?;
    assert!(taken(mapping.file().0 + len / 4, 8));
    drop(queue);
    // What was put off of the part is not done to the whole.
    let (_queue, _consumer) = DeviceQueue::new(&gpu, 4, Duration::from_secs(1))?;
    assert!(taken(mapping.file().0, 8));
    drop(more);
    Ok(())
}

/// A file with holes would be filled by who pins it, at the cost of this process.
#[test]
fn holes_of_another_processes_file_are_not_filled() -> Outcome {
    let len: u64 = 1 << 20;
    let options = ArenaOptions {
        prefault: false,
        ..ArenaOptions::default()
    };
    let arena = HostArena::with_options(len, options)?;
    arena.memory().write(0, &pattern(8192, 1))?;
    let (owner, reader) = (owner_of(&arena)?, open_soft(SoftConfig::default())?);
    let gpu = gpu();
    let all = [
        owner.map(&reader, 0, len / 2)?,
        owner.map(&reader, 1, len / 2)?,
    ];
    let GpuFault::Holes { wanted, allocated } = fault(PeerHostMemory::pin(&gpu, &all)) else {
        return Err("another fault".into());
    };
    assert_eq!(wanted, len);
    assert!((8192..len).contains(&allocated), "{allocated}");
    drop(pin(&gpu, owner.map(&reader, 0, 8192)?)?);
    // An owner that has taken its pages is read.
    arena.memory().fill(0, len, 1)?;
    let all = [
        owner.map(&reader, 0, len / 2)?,
        owner.map(&reader, 1, len / 2)?,
    ];
    drop(PeerHostMemory::pin(&gpu, &all)?);
    Ok(())
}

/// Drivers pin whole pages, each once: parts of an arena that share some are pinned together.
#[test]
fn memories_that_share_a_page_are_pinned() -> Outcome {
    let arena = HostArena::new(1 << 20)?;
    let slice = |at, len| arena.memory().slice(at, len);
    let parts = [slice(0, 5000)?, slice(5000, 3000)?, slice(65_536, 100)?];
    let gpu = gpu();
    {
        let _first = PinnedMemory::register(&gpu, &parts[0])?;
        assert!(PinnedMemory::register(&gpu, &parts[1]).is_err());
    }
    let pinned = PinnedMemory::register_all(&gpu, &parts)?;
    let stream = Stream::new(&gpu)?;
    let device = GpuMemory::new(&gpu, 4096)?;
    for (part, byte) in pinned.iter().zip(1..) {
        assert!(PinnedMemory::register(&gpu, part.host()).is_err());
        device.fill(0, 4096, byte)?;
        let copy = Copy {
            dst: Place::Pinned(part, part.len() - 100),
            src: Place::Gpu(&device, 0),
            len: 100,
        };
        stream.copy(&[copy])?.wait(soon())?;
        let mut got = [0; 100];
        part.host().read(part.len() - 100, &mut got)?;
        assert_eq!(got, [byte; 100]);
    }
    // As long as any of them is there.
    let [_, second, _] = &pinned[..] else {
        return Err("not three".into());
    };
    let second = second.clone();
    drop(pinned);
    assert!(PinnedMemory::register(&gpu, &parts[0]).is_err());
    drop(PinnedMemory::register(&gpu, &parts[2])?);
    drop(second);
    drop(PinnedMemory::register(&gpu, &parts[0])?);
    Ok(())
}
