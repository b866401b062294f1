//! What posters of a queue have among themselves, and how the host reaches it while they run.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::gpu::{Copy, Gpu, GpuMemory, PinnedMemory, Place, RuntimeKind, Stream};
use crate::kernels::queue::QueueState;

/// Where the abort word is, behind the state and on a line of its own.
const ABORT: u64 = 64;
/// Where the report of queues is whose completions the posters read.
const REPORT: u64 = 128;
/// Where the words are by which posters of WQEs ring for each other, one for each slot.
const WORDS: u64 = 192;
/// In pinned memory, where the report is read into, with the posters' count before it.
const REPORTED: u64 = 96;
/// The longest patience: what a kernel's launch promises is that it ends.
const MOST_PATIENCE: Duration = Duration::from_secs(3600);
/// In pinned memory, a word that the posters' count is read into, behind one of the value 1: what the abort word is
/// set from.
const COUNT: u64 = 64;

/// The posters' state, the abort word and the report, in the GPU's memory.
pub(super) struct Posters {
    own: GpuMemory,
    words: PinnedMemory,
    /// What runs must not be waited for.
    aborts: Stream,
    patience: u64,
}

impl Posters {
    /// For a queue whose first ticket is 0.
    pub(super) fn new(gpu: &Gpu, patience: Duration) -> Result<Self, Error> {
        Self::of_wqes(gpu, patience, 0)
    }

    /// The same for so many slots of WQEs, whose posters ring for each other.
    pub(super) fn of_wqes(gpu: &Gpu, patience: Duration, slots: u32) -> Result<Self, Error> {
        let words = PinnedMemory::new(gpu, 2 * COUNT)?;
        words.host().fill(0, 2 * COUNT, 0)?;
        words.host().write(0, &1_u32.to_ne_bytes())?;
        let own = GpuMemory::new(gpu, WORDS + 8 * u64::from(slots))?;
        own.fill(0, own.len(), 0)?;
        own.write(0, &QueueState::starting_at(0).bytes())?;
        Ok(Self {
            own,
            words,
            aborts: Stream::urgent(gpu)?,
            patience: ticks(gpu.runtime(), patience.min(MOST_PATIENCE)),
        })
    }

    pub(super) fn gpu(&self) -> &Gpu {
        self.own.gpu()
    }

    /// Where the state is.
    pub(super) fn state(&self) -> u64 {
        self.own.addr()
    }

    pub(super) fn abort(&self) -> u64 {
        self.own.addr() + ABORT
    }

    pub(super) fn report(&self) -> u64 {
        self.own.addr() + REPORT
    }

    /// The words by which posters of WQEs ring for each other.
    pub(super) fn words(&self) -> u64 {
        self.own.addr() + WORDS
    }

    /// Ticks that a call waits at most.
    pub(super) fn patience(&self) -> u64 {
        self.patience
    }

    /// How many numbers posters have taken.
    pub(super) fn posted(&self, deadline: Instant) -> Result<u64, Error> {
        self.read((&self.own, 0), (&self.words, COUNT), 8, deadline)?;
        let mut next = [0; 8];
        self.words.host().read(COUNT, &mut next)?;
        Ok(u64::from_ne_bytes(next))
    }

    /// Reads words of the GPU's memory.
    pub(super) fn read(
        &self,
        (from, src): (&GpuMemory, u64),
        (into, dst): (&PinnedMemory, u64),
        len: u64,
        deadline: Instant,
    ) -> Result<(), Error> {
        let copy = Copy {
            dst: Place::Pinned(into, dst),
            src: Place::Gpu(from, src),
            len,
        };
        // Not by a copy that waits: it would wait for other kernels too.
        self.aborts.copy(&[copy])?.wait(deadline)?;
        Ok(())
    }

    /// Takes a number and posts nothing, as a kernel does that is killed in between.
    pub(super) fn lose_a_ticket(&self) -> Result<(), Error> {
        let posted = self.posted(Instant::now() + Duration::from_secs(10))?;
        self.own.write(0, &(posted + 1).to_ne_bytes())
    }

    /// Sets the abort word.
    pub(super) fn stop(&self) -> Result<(), Error> {
        let copy = Copy {
            dst: Place::Gpu(&self.own, ABORT),
            src: Place::Pinned(&self.words, 0),
            len: 4,
        };
        // It holds its memory until it is done, and nobody need wait for that.
        drop(self.aborts.copy(&[copy])?);
        Ok(())
    }

    /// How many numbers posters of WQEs have taken, how far these have ended, and the first failure.
    pub(super) fn reported(&self, deadline: Instant) -> Result<[u64; 3], Error> {
        for (src, dst, len) in [(0, REPORTED - 8, 8), (REPORT, REPORTED, 16)] {
            self.read((&self.own, src), (&self.words, dst), len, deadline)?;
        }
        let mut all = [[0; 8]; 3];
        (self.words.host()).read(REPORTED - 8, all.as_flattened_mut())?;
        Ok(all.map(u64::from_ne_bytes))
    }
}

/// Ticks of the steady clock that kernels look at.
fn ticks(runtime: RuntimeKind, of: Duration) -> u64 {
    let a_second = match runtime {
        // PTX: %globaltimer counts nanoseconds.
        RuntimeKind::Cuda => 1_000_000_000,
        // s_memrealtime: 100 MHz.
        RuntimeKind::Hip => 100_000_000,
        RuntimeKind::Host => host_ticks_a_second(),
    };
    let ticks = of.as_nanos().saturating_mul(u128::from(a_second)) / 1_000_000_000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

/// How fast the counter of the host build runs, by a look of some milliseconds, once.
fn host_ticks_a_second() -> u64 {
    static RATE: OnceLock<u64> = OnceLock::new();
    *RATE.get_or_init(|| {
        let (began, from) = (Instant::now(), host_clock());
        std::thread::sleep(Duration::from_millis(5));
        let (to, took) = (host_clock(), began.elapsed().as_nanos().max(1));
        let rate = u128::from(to.wrapping_sub(from)).saturating_mul(1_000_000_000) / took;
        u64::try_from(rate).unwrap_or(u64::MAX).max(1)
    })
}

/// `kvx_clock` of `kernels/device.h`.
#[cfg(target_arch = "x86_64")]
fn host_clock() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux lets programs use it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// `kvx_clock` of `kernels/device.h`.
#[cfg(target_arch = "aarch64")]
fn host_clock() -> u64 {
    let ticks: u64;
    // SAFETY: it reads a counter that Linux lets programs read, and touches nothing else.
    unsafe { std::arch::asm!("mrs {}, cntvct_el0", out(reg) ticks, options(nomem, nostack)) };
    ticks
}

/// There is no host build for this processor: nothing is ever timed.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn host_clock() -> u64 {
    0
}
