//! The memory of a queue of WQEs: its own, for a model of a device, or that of a NIC's queues.

use std::fmt;
use std::time::{Duration, Instant};

use kvxfer_verbs::mlx5::model::Queues;
use kvxfer_verbs::mlx5::{CqDepth, Cqe, DoorbellRecord, Qpn, SqDepth};

use super::nic::NicQueues;
use super::posters::{PostFailed, PosterReport, Posters};
use super::queue::{KernelQueue, sealed};
use super::regions::RegionTable;
use super::slots::{CopiedSlots, WqeMemory, WqeSlots};
use crate::error::Error;
use crate::gpu::device::same;
use crate::gpu::foreign::ForeignMemory;
use crate::gpu::pool::Touched;
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

/// The memory of a queue to which kernels of a GPU write WQEs, and the words around it. It is its own ([`new`](Self::new)),
/// and what is behind it a [model](kvxfer_verbs::mlx5::model); or somebody else's ([`of_nic`](Self::of_nic)): no NIC's has
/// been tried. A kernel must have ended before this goes; who drops a NIC's last may wait for all other kernels of the GPU.
pub struct WqeQueue {
    config: WqeQueueConfig,
    lies: Lies,
    regions: Option<RegionTable>,
    posters: Posters,
}

/// Where the queues lie.
enum Lies {
    Own(Own),
    Nic(Queues<ForeignMemory>),
}

struct Own {
    /// Slots, if they are here, then completions, then words.
    memory: PinnedMemory,
    completions: u64,
    words: u64,
    /// The slots, if they are in the GPU's memory.
    slots: Option<CopiedSlots>,
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
        let posters = Posters::of_wqes(gpu, config.patience, sq_depth.get())?;
        let own = match config.slots {
            WqeSlots::Pinned => None,
            WqeSlots::Gpu => Some(CopiedSlots::new(gpu, sq_depth.bytes())?),
        };
        let completions = match own {
            Some(_) => 0,
            None => sq_depth.bytes(),
        };
        let words = completions + cq_depth.bytes();
        let memory = PinnedMemory::pooled(gpu, words + 4 * LINE, Touched::ByHandle)?;
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
            regions,
            posters,
            lies: Lies::Own(Own {
                memory,
                completions,
                words,
                slots: own,
            }),
        };
        Ok((queue, queues))
    }

    /// A queue for kernels of this GPU in memory that somebody else has made: a NIC's own queues, of which it holds every
    /// part. Kernels write WQEs, records and the doorbell there, and read completions; nobody else does as long as this
    /// is there. Without a table they name addresses alone.
    ///
    /// Queues and records are pinned where they lie, the doorbell's page is mapped as it says that it is. Pages that
    /// several queues of this process have a part of are mapped once. When this goes, all is undone first, and the parts
    /// are let go of then; what the driver does not let go of is kept.
    ///
    /// # Errors
    ///
    /// [`Error::Depth`] where there are fewer completions than slots; [`Error::Nic`] for a part that kernels could not
    /// use, and for a queue that is not new; [`GpuFault::Foreign`](crate::gpu::GpuFault::Foreign) and
    /// [`ForeignAlready`](crate::gpu::GpuFault::ForeignAlready) for one that the GPU's runtime does not map; a table of
    /// another GPU; [`Error::Gpu`].
    pub fn of_nic(
        gpu: &Gpu,
        nic: &NicQueues,
        patience: Duration,
        regions: Option<RegionTable>,
    ) -> Result<Self, Error> {
        if let Some(regions) = &regions {
            same("the table", regions.gpu(), gpu)?;
        }
        let config = WqeQueueConfig {
            bell: Bell::Kernel,
            slots: WqeSlots::Pinned,
            sq_depth: nic.sq_depth,
            cq_depth: nic.cq_depth,
            qpn: nic.qpn,
            patience,
        };
        Ok(Self {
            config,
            lies: Lies::Nic(nic.map(gpu)?),
            regions,
            posters: Posters::of_wqes(gpu, patience, nic.sq_depth.get())?,
        })
    }

    /// What a kernel is given: [`KernelQueue::handle`].
    #[must_use]
    pub fn handle(&self) -> Queue {
        let at = match &self.lies {
            Lies::Own(own) => own.at(),
            Lies::Nic(nic) => At {
                slots: nic.sq.device_addr(),
                record: nic.sq_record.device_addr(),
                completions: nic.cq.device_addr(),
                cq_record: nic.cq_record.device_addr(),
                bell: nic.bell.device_addr(),
            },
        };
        Queue {
            slots: at.slots,
            words: self.posters.words(),
            state: self.posters.state(),
            report: self.posters.report(),
            abort: self.posters.abort(),
            patience: self.posters.patience(),
            completions: at.completions,
            record: at.record + DoorbellRecord::SEND_OFFSET,
            cq_record: at.cq_record,
            bell: at.bell,
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
        match (&self.lies, self.config.bell) {
            (Lies::Own(own), Bell::Cpu) => {
                let host = own.memory.host();
                let word = host.load_u64(own.words + 2 * LINE)?;
                host.store_u64(own.words + 3 * LINE, word)
            }
            _ => Ok(()),
        }
    }

    /// The slots, where they are in the GPU's own memory: who registers them with a NIC does it by their
    /// [dma-buf](GpuMemory::dma_buf), which says where in it they begin, and fails by name where the runtime has none.
    #[must_use]
    pub fn slots(&self) -> Option<&GpuMemory> {
        self.copied().map(CopiedSlots::own)
    }

    fn copied(&self) -> Option<&CopiedSlots> {
        match &self.lies {
            Lies::Own(own) => own.slots.as_ref(),
            Lies::Nic(_) => None,
        }
    }

    pub(super) fn posters(&self) -> &Posters {
        &self.posters
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
        self.copied()
            .map_or(Ok(()), |slots| slots.hold(until, late))
    }

    /// Whether such a copy is under way.
    #[doc(hidden)]
    #[must_use]
    pub fn is_copying(&self) -> bool {
        self.copied().is_some_and(CopiedSlots::is_copying)
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

/// Where kernels find what they write to.
struct At {
    slots: u64,
    record: u64,
    completions: u64,
    cq_record: u64,
    bell: u64,
}

impl Own {
    fn at(&self) -> At {
        let at = self.memory.device_addr();
        let word = |n: u64| at + self.words + n * LINE;
        let slots = self.slots.as_ref().map(CopiedSlots::own);
        At {
            slots: slots.map_or(at, GpuMemory::addr),
            record: word(0),
            completions: at + self.completions,
            cq_record: word(1),
            bell: word(2),
        }
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
