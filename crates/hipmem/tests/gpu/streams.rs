//! Streams, events, and work that keeps its memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kvxfer_hipmem::Error;
use kvxfer_hipmem::gpu::{Copy, Event, GpuFault, GpuMemory, PinnedMemory, Place, Stream};

use crate::{Outcome, fault, gpu, on_host, pattern, soon};

const MIB: u64 = 1 << 20;

#[test]
fn a_stream_does_one_thing_after_the_other() -> Outcome {
    let gpu = gpu();
    let stream = Stream::new(&gpu)?;
    let (a, b) = (
        GpuMemory::new(&gpu, 16 * MIB)?,
        GpuMemory::new(&gpu, 16 * MIB)?,
    );
    let pinned = PinnedMemory::new(&gpu, 16 * MIB)?;
    for round in 0..20_u8 {
        pinned.host().fill(0, 16 * MIB, round)?;
        let at = |memory| Place::Gpu(memory, 0);
        let len = 16 * MIB;
        // In, across, and with a part of it filled before it comes back.
        stream.copy(&[
            Copy {
                dst: at(&a),
                src: Place::Pinned(&pinned, 0),
                len,
            },
            Copy {
                dst: at(&b),
                src: at(&a),
                len,
            },
        ])?;
        stream.fill(&b, MIB + 1, MIB, !round)?;
        stream.fill(&a, 0, len, 0xee)?;
        let back = Copy {
            dst: Place::Pinned(&pinned, 0),
            src: at(&b),
            len,
        };
        stream.copy(&[back])?.wait(soon())?;
        let mut bytes = vec![0; len as usize];
        pinned.host().read(0, &mut bytes)?;
        let mut expected = vec![round; len as usize];
        expected[MIB as usize + 1..2 * MIB as usize + 1].fill(!round);
        assert!(bytes == expected, "round {round}");
    }
    stream.wait(soon())?;
    assert!(stream.is_done()?);
    Ok(())
}

#[test]
fn one_stream_waits_for_anothers_event() -> Outcome {
    let gpu = gpu();
    let (first, second) = (Stream::new(&gpu)?, Stream::new(&gpu)?);
    let memory = GpuMemory::new(&gpu, 64 * MIB)?;
    for round in 0..20_u8 {
        // Much work, then the mark; what the other does behind the mark comes last.
        for i in 0..4 {
            first.fill(&memory, 0, 64 * MIB, i)?;
        }
        let event = Event::new(&gpu)?;
        event.record(&first)?;
        second.wait_event(&event)?;
        second
            .fill(&memory, 0, 64 * MIB, 100 + round)?
            .wait(soon())?;
        let mut ends = [0; 2];
        memory.read(0, &mut ends[..1])?;
        memory.read(64 * MIB - 1, &mut ends[1..])?;
        assert_eq!(ends, [100 + round; 2]);
        assert!(event.is_done()?);
    }
    Ok(())
}

#[test]
fn events_measure_the_gpus_time() -> Outcome {
    let gpu = gpu();
    let stream = Stream::new(&gpu)?;
    let memory = GpuMemory::new(&gpu, 64 * MIB)?;
    let (start, stop) = (Event::with_timing(&gpu)?, Event::with_timing(&gpu)?);
    let begun = Instant::now();
    start.record(&stream)?;
    for i in 0..10 {
        stream.fill(&memory, 0, 64 * MIB, i)?;
    }
    stop.record(&stream)?;
    stop.wait(soon())?;
    let (gpus, ours) = (stop.since(&start)?, begun.elapsed());
    assert!(
        gpus > Duration::ZERO && gpus <= ours + Duration::from_millis(5),
        "{gpus:?} {ours:?}"
    );
    // Those made without it have no times.
    let plain = Event::new(&gpu)?;
    plain.record(&stream)?;
    plain.wait(soon())?;
    assert!(fault(plain.since(&start)).code().is_some());
    Ok(())
}

#[test]
fn an_event_that_was_not_recorded_holds_nobody() -> Outcome {
    let gpu = gpu();
    let event = Event::new(&gpu)?;
    assert!(event.is_done()?);
    event.wait(Instant::now())?;
    let stream = Stream::new(&gpu)?;
    stream.wait_event(&event)?;
    stream.wait(soon()).map_err(Into::into)
}

#[test]
fn a_wait_ends_at_its_deadline() -> Outcome {
    let gpu = gpu();
    let stream = Stream::new(&gpu)?;
    // More than is written at once: by a GPU 200 GB, by the stand-in 10.
    let len = if on_host() { 48 * MIB } else { 1024 * MIB };
    let memory = GpuMemory::new(&gpu, len)?;
    let mut last = None;
    for i in 0..200 {
        last = Some(stream.fill(&memory, 0, len, i)?);
    }
    let pending = last.ok_or("no work")?;
    let found = fault(pending.wait(Instant::now()));
    assert!(matches!(found, GpuFault::Deadline { .. }), "{found}");
    let found = fault(stream.wait(Instant::now()));
    assert!(matches!(found, GpuFault::Deadline { .. }), "{found}");
    pending.wait(Instant::now() + Duration::from_secs(60))?;
    Ok(())
}

struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn work_keeps_its_memory_though_nobody_waits_for_it() -> Outcome {
    let gpu = gpu();
    let gone = Arc::new(AtomicUsize::new(0));
    let len = if on_host() { 32 * MIB } else { 1024 * MIB };
    let theirs = GpuMemory::new(&gpu, len)?;
    let stream = Stream::new(&gpu)?;
    for i in 0..10 {
        let keep = Arc::new((theirs.clone(), Counted(Arc::clone(&gone))));
        // SAFETY: `keep` holds the allocation.
        let memory = unsafe { GpuMemory::from_raw_parts(&gpu, theirs.addr(), theirs.len(), keep) }?;
        for j in 0..5 {
            drop(stream.fill(&memory, 0, len, i * 10 + j)?);
        }
        drop(memory);
    }
    // The last piece of work, at least, has not ended and still has its memory.
    assert!(gone.load(Ordering::SeqCst) < 10);
    stream.wait(Instant::now() + Duration::from_secs(60))?;
    // What has ended is let go with the next work, or with the stream.
    drop(stream);
    assert_eq!(gone.load(Ordering::SeqCst), 10);
    let mut byte = [0];
    theirs.read(1, &mut byte)?;
    assert_eq!(byte, [94]);
    Ok(())
}

#[test]
fn an_engines_stream_and_event_are_used_and_left_alone() -> Outcome {
    let gpu = gpu();
    let (stream, event) = (Stream::new(&gpu)?, Event::new(&gpu)?);
    let memory = GpuMemory::new(&gpu, MIB)?;
    {
        // SAFETY: it is a stream of this device, and the clone keeps it.
        let token = unsafe { Stream::from_raw(&gpu, stream.as_raw(), Arc::new(stream.clone())) };
        // SAFETY: it is an event of this device, and the clone keeps it.
        let mark = unsafe { Event::from_raw(&gpu, event.as_raw(), Arc::new(event.clone())) };
        token.fill(&memory, 0, MIB, 5)?;
        mark.record(&token)?;
        mark.wait(soon())?;
    }
    // Both work still.
    event.record(&stream)?;
    event.wait(soon())?;
    stream.fill(&memory, 1, 1, 6)?.wait(soon())?;
    let mut bytes = [0; 3];
    memory.read(0, &mut bytes)?;
    assert_eq!(bytes, [5, 6, 5]);
    // The default stream is null.
    // SAFETY: it is there for as long as the device is.
    let default = unsafe { Stream::from_raw(&gpu, std::ptr::null_mut(), Arc::new(())) };
    default.fill(&memory, 0, 2, 8)?.wait(soon())?;
    memory.read(0, &mut bytes)?;
    assert_eq!(bytes, [8, 8, 5]);
    Ok(())
}

#[test]
fn a_list_of_copies_is_checked_before_any_is_made() -> Outcome {
    let gpu = gpu();
    let stream = Stream::new(&gpu)?;
    let (memory, pinned) = (GpuMemory::new(&gpu, 100)?, PinnedMemory::new(&gpu, 100)?);
    memory.write(0, &pattern(100, 1))?;
    let good = Copy {
        dst: Place::Gpu(&memory, 0),
        src: Place::Gpu(&memory, 50),
        len: 50,
    };
    for bad in [
        Copy { len: 51, ..good },
        Copy {
            dst: Place::Pinned(&pinned, 51),
            ..good
        },
        Copy {
            dst: Place::Gpu(&memory, u64::MAX),
            ..good
        },
    ] {
        let made = stream.copy(&[good, bad]).map(drop);
        assert!(
            matches!(made, Err(Error::OutOfBounds { size: 100, .. })),
            "{made:?}"
        );
    }
    let host = Copy {
        dst: Place::Pinned(&pinned, 0),
        src: Place::Pinned(&pinned, 50),
        len: 50,
    };
    let made = stream.copy(&[good, host]).map(drop);
    assert!(
        matches!(made, Err(Error::HostCopy { len: 50, .. })),
        "{made:?}"
    );
    stream.wait(soon())?;
    let mut bytes = vec![0; 100];
    memory.read(0, &mut bytes)?;
    assert_eq!(bytes, pattern(100, 1));
    // Nothing is work too.
    stream.copy(&[])?.wait(soon())?;
    stream.copy(&[Copy { len: 0, ..good }])?.wait(soon())?;
    Ok(())
}
