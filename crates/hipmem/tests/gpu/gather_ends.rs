//! How transfers end: stopped, at a deadline, unwatched, beside others; and fences.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvxfer_hipmem::Error;
use kvxfer_hipmem::gather::{
    GatherEnd, GatherOptions, GatherSection, GatherTable, GpuKernels, Side, TensorPlaces,
};
use kvxfer_hipmem::gpu::{Event, Gpu, GpuFault, GpuMemory, Place, Stream};
use kvxfer_hipmem::kernels::{Pair, Piece};

use crate::gather::{MIB, Memory, memories, whole};
use crate::{Outcome, gpu, on_host, runtime, soon};

/// A transfer that takes seconds: the same blocks again and again.
fn long(
    kernels: &GpuKernels,
    src: &GpuMemory,
    dst: &GpuMemory,
) -> Result<(GatherTable, Vec<Pair>), Error> {
    let block = MIB;
    let blocks = (src.len() / block) as u32;
    let section = GatherSection {
        tensors: &[TensorPlaces {
            src: Place::Gpu(src, 0),
            dst: Place::Gpu(dst, 0),
        }],
        pieces: &[Piece {
            src: 0,
            dst: 0,
            len: block,
        }],
        strides: (block, block),
        blocks: (blocks, blocks),
    };
    let options = GatherOptions {
        copy_engine_from: Some(0),
        ..GatherOptions::default()
    };
    let pairs = (0..4 << 20).map(|i| Pair {
        src: i % blocks,
        dst: i % blocks,
    });
    Ok((kernels.table(&[section], options)?, pairs.collect()))
}

/// Waits until a byte has changed.
fn changed(memory: &GpuMemory, from: u8) -> Outcome {
    let deadline = soon();
    let mut byte = [from];
    while byte == [from] {
        if Instant::now() > deadline {
            return Err("nothing has come".into());
        }
        memory.read(0, &mut byte)?;
    }
    Ok(())
}

#[test]
fn a_transfer_is_stopped_while_it_runs() -> Outcome {
    let gpu = gpu();
    let (kernels, stream) = (GpuKernels::load(&gpu)?, Stream::new(&gpu)?);
    let near = GpuMemory::new(&gpu, 64 * MIB)?;
    for (name, src) in memories(64 * MIB)? {
        let Memory::Gpu(src) = src else { continue };
        let (table, pairs) = long(&kernels, &src, &near)?;
        for round in 0..4 {
            src.fill(0, 64 * MIB, 2)?;
            near.fill(0, 64 * MIB, 1)?;
            let mut gather = table.gather(&stream, &[&pairs])?;
            changed(&near, 1)?;
            assert!(gather.poll().is_none(), "round {round}");
            let told = Instant::now();
            gather.abort()?;
            let end = gather.wait(soon())?;
            let took = told.elapsed();
            let GatherEnd::Aborted { bytes } = end else {
                panic!("{end:?}");
            };
            println!("{name}: ended {took:?} after it was told, {bytes} bytes");
            assert!(bytes > 0 && bytes < gather.bytes());
            // Once more, and after its end, does no harm.
            gather.abort()?;
            drop(gather);
            // Nothing of it comes later.
            stream.wait(soon())?;
            near.fill(0, 64 * MIB, 1)?;
            let mut few = table.gather(&stream, &[&pairs[..2]])?;
            whole(few.wait(soon())?);
            let mut bytes = vec![0; 64 << 20];
            near.read(0, &mut bytes)?;
            assert!(bytes[..2 << 20].iter().all(|b| *b == 2));
            assert!(bytes[2 << 20..].iter().all(|b| *b == 1));
        }
        // One that was not told is whole though the one before it was.
        let mut some = table.gather(&stream, &[&pairs[..1000]])?;
        whole(some.wait(soon())?);
    }
    Ok(())
}

struct Gone(Arc<AtomicBool>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_transfer_holds_its_memory_though_nobody_waits_for_it() -> Outcome {
    let gpu = gpu();
    let (kernels, stream) = (GpuKernels::load(&gpu)?, Stream::new(&gpu)?);
    let (theirs, near) = (
        GpuMemory::new(&gpu, 64 * MIB)?,
        GpuMemory::new(&gpu, 64 * MIB)?,
    );
    let gone = Arc::new(AtomicBool::new(false));
    let keep = Arc::new((theirs.clone(), Gone(Arc::clone(&gone))));
    // SAFETY: `keep` holds the allocation.
    let src = unsafe { GpuMemory::from_raw_parts(&gpu, theirs.addr(), theirs.len(), keep) }?;
    src.fill(0, 64 * MIB, 2)?;
    near.fill(0, 64 * MIB, 1)?;
    let (table, pairs) = long(&kernels, &src, &near)?;
    let gather = table.gather(&stream, &[&pairs])?;
    drop((src, table));
    changed(&near, 1)?;
    gather.abort()?;
    let was_running = !stream.is_done()?;
    let held = !gone.load(Ordering::SeqCst);
    drop(gather);
    assert!(!was_running || held);
    stream.wait(soon())?;
    // Let go with the next work, or with the stream.
    drop(stream);
    let deadline = soon();
    while !gone.load(Ordering::SeqCst) {
        assert!(Instant::now() < deadline, "never let go");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// The copy engine's copies go over streams that live as long as the kernels: what they held goes with the transfer.
#[test]
fn copies_hold_no_memory_once_the_transfer_has_ended() -> Outcome {
    let gpu = gpu();
    let (kernels, stream) = (GpuKernels::load(&gpu)?, Stream::new(&gpu)?);
    let (theirs, near) = (
        GpuMemory::new(&gpu, 16 * MIB)?,
        GpuMemory::new(&gpu, 16 * MIB)?,
    );
    for round in 0..5 {
        let gone = Arc::new(AtomicBool::new(false));
        let keep = Arc::new((theirs.clone(), Gone(Arc::clone(&gone))));
        // SAFETY: `keep` holds the allocation.
        let src = unsafe { GpuMemory::from_raw_parts(&gpu, theirs.addr(), theirs.len(), keep) }?;
        src.fill(0, 16 * MIB, round)?;
        let section = GatherSection {
            tensors: &[TensorPlaces {
                src: Place::Gpu(&src, 0),
                dst: Place::Gpu(&near, 0),
            }],
            pieces: &[Piece {
                src: 0,
                dst: 0,
                len: MIB,
            }],
            strides: (MIB, MIB),
            blocks: (16, 16),
        };
        let options = GatherOptions {
            copy_engine_from: Some(MIB),
            ..GatherOptions::default()
        };
        let table = kernels.table(&[section], options)?;
        drop(src);
        let backwards = (0..16).map(|i| Pair {
            src: i,
            dst: 15 - i,
        });
        let mut gather = table.gather(&stream, &[&backwards.collect::<Vec<_>>()])?;
        assert_eq!(gather.engine_bytes(), 16 * MIB);
        whole(gather.wait(soon())?);
        let mut bytes = vec![0; 16 << 20];
        near.read(0, &mut bytes)?;
        assert!(bytes.iter().all(|b| *b == round));
        drop((gather, table));
        assert!(gone.load(Ordering::SeqCst), "round {round}");
    }
    Ok(())
}

#[test]
fn a_wait_for_a_transfer_ends_at_its_deadline() -> Outcome {
    let gpu = gpu();
    let (kernels, stream) = (GpuKernels::load(&gpu)?, Stream::new(&gpu)?);
    let (src, near) = (
        GpuMemory::new(&gpu, 64 * MIB)?,
        GpuMemory::new(&gpu, 64 * MIB)?,
    );
    let (table, pairs) = long(&kernels, &src, &near)?;
    let mut gather = table.gather(&stream, &[&pairs])?;
    let found = crate::fault(gather.wait(Instant::now()));
    assert!(matches!(found, GpuFault::Deadline { .. }), "{found}");
    gather.abort()?;
    let end = gather.wait(soon())?;
    assert!(matches!(end, GatherEnd::Aborted { .. }), "{end:?}");
    Ok(())
}

#[test]
fn fences_end_on_their_streams() -> Outcome {
    let gpu = gpu();
    let (kernels, stream) = (GpuKernels::load(&gpu)?, Stream::new(&gpu)?);
    let memory = GpuMemory::new(&gpu, 64 * MIB)?;
    for i in 0..100 {
        let before = stream.fill(&memory, 0, 64 * MIB, i)?;
        let (release, acquire) = (kernels.release(&stream)?, kernels.acquire(&stream)?);
        acquire.wait(soon())?;
        release.wait(soon())?;
        assert!(before.is_done()? && acquire.event().is_done()?);
    }
    Ok(())
}

fn another(gpu: &Gpu) -> Result<Option<Gpu>, Error> {
    let runtime = runtime();
    let other = runtime.gpus().iter().find(|other| *other != gpu);
    Ok(other.cloned())
}

#[test]
#[ignore = "needs a GPU: runs from the folder that `cargo xtask gpu-bundle` makes, on a machine that has one"]
fn on_gpu_each_device_takes_its_own_streams_alone() -> Outcome {
    assert!(!on_host(), "no GPU: KVXFER_TEST_GPU names no GPU's runtime");
    let gpu = gpu();
    let Some(other) = another(&gpu)? else {
        println!("one GPU: nothing to mix");
        return Ok(());
    };
    let kernels = GpuKernels::load(&gpu)?;
    let stream = Stream::new(&other)?;
    let table = kernels.table(&[], GatherOptions::default())?;
    for refused in [
        table.gather(&stream, &[]).map(drop),
        table.verify(&stream, Side::Source, &[]).map(drop),
        kernels.acquire(&stream).map(drop),
    ] {
        let found = crate::fault(refused);
        assert!(
            matches!(found, GpuFault::OtherStreamDevice { .. }),
            "{found}"
        );
    }
    // Both devices' kernels at once, each pulling from the other.
    let both = [gpu, other];
    let mut running = Vec::new();
    for (near, far) in [(&both[0], &both[1]), (&both[1], &both[0])] {
        let (kernels, stream) = (GpuKernels::load(near)?, Stream::new(near)?);
        let (src, dst) = (
            GpuMemory::new(far, 64 * MIB)?,
            GpuMemory::new(near, 64 * MIB)?,
        );
        src.fill(0, 64 * MIB, 7)?;
        let (table, pairs) = long(&kernels, &src, &dst)?;
        let event = Event::new(near)?;
        let gather = table.gather(&stream, &[&pairs[..100_000]])?;
        event.record(&stream)?;
        running.push((gather, dst, event));
    }
    for (gather, dst, event) in &mut running {
        whole(gather.wait(soon())?);
        event.wait(soon())?;
        let mut bytes = vec![0; 64 << 20];
        dst.read(0, &mut bytes)?;
        assert!(bytes.iter().all(|b| *b == 7));
    }
    Ok(())
}
