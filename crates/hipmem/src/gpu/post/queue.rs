//! The memory of a proxy queue, and its abort word.

use std::fmt;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::gpu::{Copy, Gpu, GpuMemory, PinnedMemory, Place, RuntimeKind, Stream};
use crate::kernels::queue::{Queue, QueueState};
use crate::post::{Consumer, ProxyRing, RingAddresses};

/// Where the abort word is, behind the state and on a line of its own.
const ABORT: u64 = 64;
/// The longest patience: what a kernel's launch promises is that it ends.
const MOST_PATIENCE: Duration = Duration::from_secs(3600);
/// Bytes in the GPU's memory.
const OWN: u64 = 128;
/// A word of the value 1 behind the ring: what the abort word is set from.
const ONE: u64 = 64;
/// Behind that, a word that the posters' count is read into.
const COUNT: u64 = 64;

/// The memory of a proxy queue that kernels of a GPU post to. A kernel must have ended before this goes, and who drops
/// it last may wait for all other kernels of the GPU: the drivers give memory back behind them.
pub struct DeviceQueue {
    ring: ProxyRing,
    /// The ring, the word that the abort word is set from, and the one that the posters' count is read into.
    memory: PinnedMemory,
    /// The posters' state, and the abort word.
    own: GpuMemory,
    /// What runs must not be waited for.
    aborts: Stream,
    patience: u64,
}

impl DeviceQueue {
    /// A queue for kernels of this GPU, and the consumer of its ring. No call of a kernel waits for longer than
    /// `patience`, nor for longer than an hour. On AMD the calls for a thread go lane by lane, each with that patience:
    /// a wave of them may wait so long for each of its lanes.
    ///
    /// # Errors
    ///
    /// [`Error::Depth`] where the depth is no power of two; [`Error::Gpu`].
    pub fn new(gpu: &Gpu, depth: u32, patience: Duration) -> Result<(Self, Consumer), Error> {
        if !depth.is_power_of_two() {
            return Err(Error::Depth { depth });
        }
        let bytes = ProxyRing::bytes(depth);
        let memory = PinnedMemory::new(gpu, bytes + ONE + COUNT)?;
        memory.host().fill(bytes, ONE + COUNT, 0)?;
        memory.host().write(bytes, &1_u32.to_ne_bytes())?;
        let (ring, consumer) = ProxyRing::new(memory.host().slice(0, bytes)?, depth, 0)?;
        let own = GpuMemory::new(gpu, OWN)?;
        own.fill(0, OWN, 0)?;
        own.write(0, &QueueState::starting_at(0).bytes())?;
        let queue = Self {
            ring,
            memory,
            own,
            aborts: Stream::urgent(gpu)?,
            patience: ticks(gpu.runtime(), patience.min(MOST_PATIENCE)),
        };
        Ok((queue, consumer))
    }

    /// What a kernel is given, by value. It has addresses of this memory, and does not hold it: whoever launches a
    /// kernel with it keeps this value until that kernel has ended, and does not use the handle later.
    #[must_use]
    pub fn handle(&self) -> Queue {
        let at = RingAddresses {
            ring: self.memory.device_addr(),
            state: self.own.addr(),
            abort: self.own.addr() + ABORT,
        };
        self.ring.queue(at, self.patience)
    }

    /// The ring's words, for its consumer.
    #[must_use]
    pub fn ring(&self) -> &ProxyRing {
        &self.ring
    }

    /// The GPU whose kernels post.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        self.own.gpu()
    }

    /// How many tickets posters have taken, once no kernel runs any more. One that the ring's consumer does not find
    /// was taken by a kernel that did not get to write its post.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`], also where it cannot be read before the deadline.
    pub fn posted(&self, deadline: Instant) -> Result<u64, Error> {
        let at = ProxyRing::bytes(self.ring.depth()) + ONE;
        let copy = Copy {
            dst: Place::Pinned(&self.memory, at),
            src: Place::Gpu(&self.own, 0),
            len: 8,
        };
        // Not by a copy that waits: it would wait for other kernels too.
        self.aborts.copy(&[copy])?.wait(deadline)?;
        let mut next = [0; 8];
        self.memory.host().read(at, &mut next)?;
        Ok(u64::from_ne_bytes(next))
    }

    /// Takes a ticket and posts nothing, as a kernel does that is killed in between: for tests.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`].
    #[doc(hidden)]
    pub fn lose_a_ticket(&self) -> Result<(), Error> {
        let posted = self.posted(Instant::now() + Duration::from_secs(10))?;
        self.own.write(0, &(posted + 1).to_ne_bytes())
    }

    /// Sets the abort word: whoever waits is told [`Status::Stopped`](crate::post::Status::Stopped), and so is whoever
    /// would wait later.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`].
    pub fn stop(&self) -> Result<(), Error> {
        let copy = Copy {
            dst: Place::Gpu(&self.own, ABORT),
            src: Place::Pinned(&self.memory, ProxyRing::bytes(self.ring.depth())),
            len: 4,
        };
        // It holds its memory until it is done, and nobody need wait for that.
        drop(self.aborts.copy(&[copy])?);
        Ok(())
    }
}

impl fmt::Debug for DeviceQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let depth = self.ring.depth();
        write!(f, "a queue of {depth} slots for {:?}", self.own.gpu())
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
