//! The memory of a queue of WQEs, for a model of its device.

use std::fmt;
use std::time::{Duration, Instant};

use kvxfer_verbs::mlx5::model::Queues;
use kvxfer_verbs::mlx5::{CqDepth, Cqe, Qpn, SqDepth};

use super::posters::{PostFailed, PosterReport, Posters};
use super::queue::{KernelQueue, sealed};
use super::regions::RegionTable;
use super::slots::{CopiedSlots, WqeMemory, WqeSlots};
use crate::error::Error;
use crate::gpu::device::same;
use crate::gpu::{Event, Gpu, GpuMemory, PinnedMemory};
use crate::kernels::queue::{DIRECT, GPU_WQE, Queue};

/// Bytes of a word that a queue and its device share, on a line of its own.
const LINE: u64 = 64;

/// Who rings the doorbell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bell {
    /// The CPU: kernels write what the doorbell would get to a word, and [`WqeQueue::relay`] copies it.
    Cpu,
    /// Kernels themselves.
    Kernel,
}

/// What a queue of WQEs is.
#[derive(Debug, Clone, Copy)]
pub struct WqeQueueConfig {
    /// Who rings the doorbell.
    pub bell: Bell,
    /// Where the slots are. Completions, records and the doorbell are in pinned memory always: they are words that a
    /// device stores one by one and in their order, the last of a completion last, and a copy has no order.
    pub slots: WqeSlots,
    /// Slots.
    pub sq_depth: SqDepth,
    /// Completions: at least as many.
    pub cq_depth: CqDepth,
    /// The queue pair's number.
    pub qpn: Qpn,
    /// How long a call of a kernel waits at most, and never longer than an hour.
    pub patience: Duration,
}

/// The memory of a queue to which kernels of a GPU write WQEs, and the words around it. No NIC has
/// it: what is behind it is a [model](kvxfer_verbs::mlx5::model). A kernel must have ended before this goes, and who
/// drops it last may wait for all other kernels of the GPU.
pub struct WqeQueue {
    config: WqeQueueConfig,
    /// Slots, if they are here, then completions, then words.
    memory: PinnedMemory,
    completions: u64,
    words: u64,
    /// The slots, if they are in the GPU's memory: whoever drops this last gives them back, and not their device.
    own: Option<CopiedSlots>,
    regions: Option<RegionTable>,
    posters: Posters,
}

impl WqeQueue {
    /// A queue for kernels of this GPU, whose first WQE and completion have the number 0, and where its device finds
    /// it. Without a table kernels name addresses alone.
    ///
    /// # Errors
    ///
    /// [`Error::Depth`] where there are fewer completions than slots; a table of another GPU; [`Error::Gpu`].
    pub fn new(
        gpu: &Gpu,
        config: &WqeQueueConfig,
        regions: Option<RegionTable>,
    ) -> Result<(Self, Queues<WqeMemory>), Error> {
        let (sq_depth, cq_depth) = (config.sq_depth, config.cq_depth);
        if cq_depth.get() < sq_depth.get() {
            return Err(Error::Depth {
                depth: cq_depth.get(),
            });
        }
        if let Some(regions) = &regions {
            same("the table", regions.gpu(), gpu)?;
        }
        let own = match config.slots {
            WqeSlots::Pinned => None,
            WqeSlots::Gpu => Some(CopiedSlots::new(gpu, sq_depth.bytes())?),
        };
        let completions = match own {
            Some(_) => 0,
            None => sq_depth.bytes(),
        };
        let words = completions + cq_depth.bytes();
        let memory = PinnedMemory::new(gpu, words + 4 * LINE)?;
        let host = memory.host();
        host.fill(0, memory.len(), 0)?;
        let cq = host.slice(completions, cq_depth.bytes())?;
        for n in 0..u64::from(cq_depth.get()) {
            cq.write(cq_depth.offset(n), &Cqe::unwritten())?;
        }
        let word = |n: u64| Ok::<_, Error>(WqeMemory::Host(host.slice(words + n * LINE, 8)?));
        let queues = Queues {
            sq: match &own {
                Some(own) => WqeMemory::Gpu(own.clone()),
                None => WqeMemory::Host(host.slice(0, sq_depth.bytes())?),
            },
            sq_record: word(0)?,
            cq: WqeMemory::Host(cq),
            cq_record: word(1)?,
            bell: match config.bell {
                Bell::Kernel => word(2)?,
                Bell::Cpu => word(3)?,
            },
        };
        let queue = Self {
            config: *config,
            completions,
            words,
            own,
            regions,
            posters: Posters::of_wqes(gpu, config.patience, sq_depth.get())?,
            memory,
        };
        Ok((queue, queues))
    }

    /// What a kernel is given: [`KernelQueue::handle`].
    #[must_use]
    pub fn handle(&self) -> Queue {
        let at = self.memory.device_addr();
        let word = |n: u64| at + self.words + n * LINE;
        Queue {
            slots: self.slots().map_or(at, GpuMemory::addr),
            words: self.posters.words(),
            state: self.posters.state(),
            report: self.posters.report(),
            abort: self.posters.abort(),
            patience: self.posters.patience(),
            completions: at + self.completions,
            // The send queue has the second half of a queue pair's record.
            record: word(0) + 4,
            cq_record: word(1),
            bell: word(2),
            regions: self.regions.as_ref().map_or(0, RegionTable::addr),
            kind: match self.config.bell {
                Bell::Cpu => GPU_WQE,
                Bell::Kernel => DIRECT,
            },
            depth: self.config.sq_depth.get(),
            cq_depth: self.config.cq_depth.get(),
            qpn: self.config.qpn.get(),
        }
    }

    /// Rings the doorbell for kernels that do not ([`Bell::Cpu`]): copies what they would have written to it.
    ///
    /// # Errors
    ///
    /// Where a word cannot be reached, which never is.
    pub fn relay(&self) -> Result<(), Error> {
        if self.config.bell == Bell::Cpu {
            let host = self.memory.host();
            let word = host.load_u64(self.words + 2 * LINE)?;
            host.store_u64(self.words + 3 * LINE, word)?;
        }
        Ok(())
    }

    /// The slots, where they are in the GPU's own memory: who registers them with a NIC does it by their
    /// [dma-buf](GpuMemory::dma_buf), which says where in it they begin, and fails by name where the runtime has none.
    #[must_use]
    pub fn slots(&self) -> Option<&GpuMemory> {
        self.own.as_ref().map(CopiedSlots::own)
    }

    /// The GPU whose kernels post.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        self.posters.gpu()
    }

    /// What posters have left, once no kernel runs any more. A WQE that the device was never told of is that of a kernel
    /// that did not get to ring; and one that it was told of may be of a post that was given up: its kernel was told
    /// [`Status::Timeout`](crate::post::Status::Timeout), and whoever rang had already found it ready.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`], also where it cannot be read before the deadline.
    pub fn left(&self, deadline: Instant) -> Result<PosterReport, Error> {
        self.posters.left(deadline)
    }

    /// Takes a number and posts nothing, as a kernel does that is killed in between: for tests.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`].
    #[doc(hidden)]
    pub fn lose_a_ticket(&self) -> Result<(), Error> {
        self.posters.lose_a_ticket()
    }

    /// Lets the copies by which the model reads slots in the GPU's memory wait for an event, and gives them so long: for
    /// tests.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`].
    #[doc(hidden)]
    pub fn hold_slots(&self, until: &Event, late: Duration) -> Result<(), Error> {
        self.own
            .as_ref()
            .map_or(Ok(()), |own| own.hold(until, late))
    }

    /// Whether such a copy is under way.
    #[doc(hidden)]
    #[must_use]
    pub fn is_copying(&self) -> bool {
        self.own.as_ref().is_some_and(CopiedSlots::is_copying)
    }

    /// Leaves what a poster leaves whose post has failed: for tests.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`].
    #[doc(hidden)]
    pub fn fail_a_post(&self, failed: PostFailed) -> Result<(), Error> {
        self.posters.fail_a_post(failed)
    }

    /// Sets the abort word: whoever waits is told [`Status::Stopped`](crate::post::Status::Stopped), and so is whoever
    /// would wait later.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`].
    pub fn stop(&self) -> Result<(), Error> {
        self.posters.stop()
    }
}

impl sealed::Sealed for WqeQueue {}

impl KernelQueue for WqeQueue {
    fn handle(&self) -> Queue {
        self.handle()
    }

    fn gpu(&self) -> &Gpu {
        self.gpu()
    }
}

impl fmt::Debug for WqeQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let depth = self.config.sq_depth.get();
        write!(f, "a queue of {depth} WQEs for {:?}", self.gpu())
    }
}
