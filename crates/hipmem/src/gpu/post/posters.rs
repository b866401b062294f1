//! What posters of a queue have among themselves, and how the host reaches it while they run.

use std::mem::offset_of;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::gpu::later::PostedTo;
use crate::gpu::pool::Touched;
use crate::gpu::{Copy, Gpu, GpuMemory, PinnedMemory, Place, RuntimeKind, Stream};
use crate::kernels::queue::{LinkRefused, QueueReport, QueueState};
use crate::post::Status;

/// Where the abort word is, behind the state and on a line of its own.
const ABORT: u64 = 64;
/// Where the report of queues is whose completions the posters read, or the first put over links that was refused.
const REPORT: u64 = 128;
/// Where the words are by which posters of WQEs ring for each other, one for each slot.
const WORDS: u64 = 192;
const _: () = assert!(size_of::<LinkRefused>() as u64 <= WORDS - REPORT);
/// The longest patience: what a kernel's launch promises is that it ends.
const MOST_PATIENCE: Duration = Duration::from_secs(3600);
/// In pinned memory, where state and report, or a refusal, are read into, behind a word of the value 1: what the abort word
/// is set from.
const LEFT: u64 = 64;
/// The report's word that says how far WQEs have ended.
const ENDED: u64 = REPORT + offset_of!(QueueReport, ended) as u64;
/// The state's word that says that something has failed, and the report's that says what.
const BROKEN: u64 = offset_of!(QueueState, broken) as u64;
const FAULT: u64 = REPORT + offset_of!(QueueReport, fault) as u64;

/// What posters of a queue have left behind, once no kernel runs any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PosterReport {
    /// Numbers that they have taken: one for each descriptor, or each WQE; none over links.
    pub posted: u64,
    /// WQEs below have ended, well or not, as posters have read completions: those that no kernel has read are not
    /// counted. None of a ring, whose ends the host knows.
    pub ended: u64,
    /// Of WQEs the failure that stands, of the lowest number: one that a completion has told them of, or their own, of a
    /// post that was given up before its turn came ([`Status::Timeout`], [`Status::Stopped`]). A ring has none: who has
    /// taken a number there does not wait before it writes.
    pub failed: Option<PostFailed>,
}

impl PosterReport {
    /// Whether all WQEs that were posted have ended well: then no NIC touches what they named any more.
    #[must_use]
    pub fn all_well(&self) -> bool {
        self.failed.is_none() && self.ended == self.posted
    }
}

/// A post that has failed, as posters know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PostFailed {
    /// Its first number, or that of the WQE whose completion said so.
    pub number: u64,
    /// What it was told.
    pub status: Status,
}

impl PostFailed {
    /// `(number + 1) << 8 | status`, as `kvx_fail` of `kernels/post.h` stores it.
    fn from_word(word: u64) -> Option<Self> {
        let number = (word >> 8).checked_sub(1)?;
        // A number that there is not was not stored by the header.
        let status = Status::from_number((word & 0xff) as u32).unwrap_or(Status::Malformed);
        Some(Self { number, status })
    }

    fn to_word(self) -> u64 {
        (self.number + 1) << 8 | u64::from(self.status.number())
    }
}

/// The posters' state, the abort word and the report, in the GPU's memory.
pub(super) struct Posters {
    own: GpuMemory,
    words: PinnedMemory,
    /// What runs must not be waited for.
    aborts: Stream,
    patience: u64,
    posted_to: PostedTo,
}

impl Posters {
    /// For a queue whose first ticket is 0.
    pub(super) fn new(gpu: &Gpu, patience: Duration) -> Result<Self, Error> {
        Self::of_wqes(gpu, patience, 0)
    }

    /// The same for so many slots of WQEs, whose posters ring for each other.
    pub(super) fn of_wqes(gpu: &Gpu, patience: Duration, slots: u32) -> Result<Self, Error> {
        let posted_to = PostedTo::begin(gpu);
        let words = PinnedMemory::pooled(gpu, LEFT + WORDS, Touched::ByHandle)?;
        words.host().fill(0, words.len(), 0)?;
        words.host().write(0, &1_u32.to_ne_bytes())?;
        let own = GpuMemory::pooled(gpu, WORDS + 8 * u64::from(slots), Touched::ByHandle)?;
        own.fill(0, own.len(), 0)?;
        own.write(0, &QueueState::starting_at(0).bytes())?;
        Ok(Self {
            own,
            words,
            aborts: Stream::urgent(gpu)?,
            posted_to,
            patience: ticks(gpu.runtime(), patience.min(MOST_PATIENCE)),
        })
    }

    pub(super) fn gpu(&self) -> &Gpu {
        self.own.gpu()
    }

    /// No kernel of its is to be waited for any more.
    pub(super) fn forsake(&self) {
        self.posted_to.end();
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

    /// What posters have left.
    pub(super) fn left(&self, deadline: Instant) -> Result<PosterReport, Error> {
        let host = self.words.host();
        // One copy for both.
        self.read((&self.own, 0), (&self.words, LEFT), FAULT + 8, deadline)?;
        Ok(PosterReport {
            posted: host.load_u64(LEFT)?,
            ended: host.load_u64(LEFT + ENDED)?,
            failed: PostFailed::from_word(host.load_u64(LEFT + FAULT)?),
        })
    }

    /// The first put over links of a push that was refused.
    pub(super) fn refused(&self, deadline: Instant) -> Result<Option<LinkRefused>, Error> {
        let mut bytes = [0; size_of::<LinkRefused>()];
        let len = bytes.len() as u64;
        self.read((&self.own, REPORT), (&self.words, LEFT), len, deadline)?;
        self.words.host().read(LEFT, &mut bytes)?;
        let first = LinkRefused::from_bytes(&bytes);
        Ok((first.status != 0).then_some(first))
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
        let left = self.left(Instant::now() + Duration::from_secs(10))?;
        self.own.write(0, &(left.posted + 1).to_ne_bytes())
    }

    /// Leaves what a poster leaves whose post has failed.
    pub(super) fn fail_a_post(&self, failed: PostFailed) -> Result<(), Error> {
        self.own.write(FAULT, &failed.to_word().to_ne_bytes())?;
        self.own.write(BROKEN, &1_u64.to_ne_bytes())
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
