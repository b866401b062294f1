//! An engine's memory on a GPU: what peers of this node are given of it, and what it fetches from theirs; and memory
//! of the host beside a peer's GPU.
//!
//! Who has the destination moves the bytes, by a GPU, in pulls and in pushes: no process writes into
//! another's memory. So a producer of a push asks its consumer to take the blocks ([`Take`](crate::wire::Take)),
//! and a consumer that is stopped or dead writes nothing.

mod host;
mod launcher;
mod links;
mod portion;
#[cfg(test)]
mod portion_tests;
mod staging;
mod takes;
mod taking;

use std::sync::Arc;
use std::time::Duration;

use kvxfer_verbs::{Access, Memory, MemoryKind, PciAddress, PeerMapping};

pub(crate) use host::HostSide;
pub(crate) use links::{LinkedMemory, outlive};
pub(crate) use portion::{MOST_STAGED, Portion, Reads, StagedPeer, packed, told};
pub(crate) use staging::{Packed, Slots, Staging};
pub(crate) use takes::OpenTakes;
pub(crate) use taking::Taking;

use launcher::{Launcher, Reached};

use super::loopback::Loopback;
use super::peer::PullOptions;
use super::peer_session::Plans;
use super::rail::{RailBlocks, register_blocks};
use super::runtime::Runtime;
use crate::config::{Config, FencePolicy};
use crate::engine::Inner;
use crate::error::{Error, chain};
use crate::mem::gather::{Fence, Gather, GatherFault, GatherPart, GatherTable};
use crate::mem::gpu::{
    Gpu, GpuFault, GpuMemory, HostStep, IpcHandle, PeerHostMemory, Stream, visibility,
};
use crate::mem::kernels::Pair;
use crate::plan::{Compiled, Plan};
use crate::transfer::{Cause, GpuOperation};
use crate::wire::{Blob, GpuDesc, PathKind, clean};

/// Transfers of so few bytes need not wait for long ones, and hardly slow them down. Two long ones side by side are
/// slower than one after the other: on two H200s 0.78 of the link against 0.94.
const SHORT: u64 = 1 << 20;

/// This rank's memory, where it is a GPU's.
#[derive(Debug)]
pub(crate) struct GpuSide {
    launcher: Arc<Launcher>,
    /// In the order of the placement.
    memories: Vec<GpuMemory>,
    shown: GpuDesc,
    fence: FencePolicy,
    /// Buffers for peers that the GPU does not reach, nor RDMA devices; or why there are none.
    staging: Result<Staging, String>,
    /// What has to be done before what a NIC has written may be read.
    step: HostStep,
    #[cfg(test)]
    pub(crate) trial: trial::Trial,
}

/// What tests see of a GPU's side, and what they have it pass for.
#[cfg(test)]
pub(crate) mod trial {
    use std::cell::Cell;
    use std::sync::atomic::AtomicU32;

    use super::HostStep;

    thread_local! {
        /// What GPUs need of engines that this thread makes from here on.
        pub(crate) static STEP: Cell<Option<HostStep>> = const { Cell::new(None) };
        /// Their devices read nothing back.
        pub(crate) static DEAF: Cell<bool> = const { Cell::new(false) };
        /// Queues that this thread makes are for GPUs under MPS.
        pub(crate) static MPS: Cell<bool> = const { Cell::new(false) };
    }

    #[derive(Debug, Default)]
    pub(crate) struct Trial {
        /// Fences behind what a producer has written, and flushes.
        pub(crate) released: AtomicU32,
        pub(crate) flushed: AtomicU32,
    }
}

impl GpuSide {
    /// `None` where the memory is the host's. What can be known to be wrong with it is said now, not when a peer
    /// comes.
    ///
    /// # Errors
    ///
    /// [`Error::ForeignGpuMemory`], [`Error::MixedMemory`], [`Error::SeveralGpus`]; [`Error::Memory`] for what
    /// cannot be exported, and for a GPU that the kernels do not run on.
    pub(crate) fn of(memories: &[Arc<dyn Memory>], config: &Config) -> Result<Option<Self>, Error> {
        let on_host = |memory: &Arc<dyn Memory>| memory.kind() == MemoryKind::Host;
        let Some(first) = memories.iter().position(|memory| !on_host(memory)) else {
            return Ok(None);
        };
        if let Some(host) = memories.iter().position(on_host) {
            return Err(Error::MixedMemory { host, gpu: first });
        }
        let known = |(index, memory): (usize, &Arc<dyn Memory>)| {
            let kind = memory.kind();
            GpuMemory::of(memory).ok_or(Error::ForeignGpuMemory { index, kind })
        };
        let memories = memories.iter().enumerate().map(known);
        let memories = memories.collect::<Result<Vec<_>, _>>()?;
        let Some(gpu) = memories.first().map(|memory| memory.gpu().clone()) else {
            return Ok(None);
        };
        if let Some(other) = memories.iter().find(|memory| *memory.gpu() != gpu) {
            return Err(Error::SeveralGpus {
                first: gpu.info().pci,
                other: other.gpu().info().pci,
            });
        }
        let handle = |memory: &GpuMemory| Ok(Blob(memory.export()?.to_bytes().to_vec()));
        let handles = memories.iter().map(handle).collect::<Result<_, Error>>()?;
        let step = step_for(&memories, &gpu);
        Ok(Some(Self {
            launcher: Arc::new(Launcher::new(&gpu, config)?),
            memories,
            shown: GpuDesc {
                handles,
                staged: 0,
                unregistered: None,
            },
            staging: Err("its RDMA devices reach its memory".to_owned()),
            step,
            #[cfg(test)]
            trial: trial::Trial::default(),
            fence: config.fence,
        }))
    }

    /// Registers the memory with the devices of an engine, all of it with each; or else makes ready to stage it, and
    /// keeps the reason. What refuses is the driver of the GPU or the kernel, seldom one device of several, and a
    /// memory that some rails reach and others do not would be two kinds to every peer.
    ///
    /// # Errors
    ///
    /// [`Error::GpuOverRdma`].
    pub(crate) fn register(
        &mut self,
        runtime: &Runtime,
        config: &Config,
        own: (&[Arc<dyn Memory>], Access),
    ) -> Result<Vec<RailBlocks>, Error> {
        let rails = runtime.rails();
        let none = || rails.iter().map(|_| RailBlocks::default()).collect();
        let tried = match (runtime.is_rdma(), config.path.allows(PathKind::Rdma)) {
            (true, true) => self.register_all(runtime, own).map_err(|e| chain(&e)),
            (true, false) => Err("the configuration does not allow it".to_owned()),
            (false, _) => Err("the engine uses the software device".to_owned()),
        };
        let unregistered = match tried {
            Ok(blocks) => return Ok(blocks),
            Err(reason) => reason,
        };
        self.stage(&unregistered, config);
        if !runtime.is_rdma() {
            return Ok(none());
        }
        let gpu = self.pci();
        let device = rails.first().map(|rail| &rail.context.device().name);
        match self.staging() {
            Ok(_) => {
                tracing::warn!(%gpu, unregistered, "memory of a GPU not registered: blocks are staged");
                Ok(none())
            }
            Err(unstaged) => Err(Error::GpuOverRdma {
                device: device.cloned().unwrap_or_default(),
                gpu,
                unstaged: unstaged.to_owned(),
                unregistered,
            }),
        }
    }

    fn register_all(
        &self,
        runtime: &Runtime,
        own: (&[Arc<dyn Memory>], Access),
    ) -> Result<Vec<RailBlocks>, Error> {
        let (_, access) = own;
        let mut blocks = register_blocks(runtime.rails(), own)?;
        // What is never written needs none.
        let written = access.contains(Access::LOCAL_WRITE);
        let read_back = written && self.step == HostStep::LoopbackRead;
        if let Some(first) = self.memories.first().filter(|_| read_back) {
            for (blocks, rail) in blocks.iter_mut().zip(runtime.rails()) {
                let loopback = Loopback::new(rail, first, runtime.retries())?;
                blocks.loopback = Some(loopback);
            }
        }
        tracing::info!(gpu = %self.pci(), "memory registered with RDMA devices");
        Ok(blocks)
    }

    /// What has to be done before what RDMA devices have written to the memory may be read.
    pub(crate) fn step(&self) -> HostStep {
        self.step
    }

    /// Whether what RDMA devices write to the memory may come there after they have said so.
    pub(crate) fn is_written_late(&self) -> bool {
        self.is_registered() && self.step != HostStep::Native
    }

    /// Waits until what devices have written is there for its owner.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub(crate) fn flush(&self) -> Result<(), Error> {
        #[cfg(test)]
        self.trial
            .flushed
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        // Who reads on a stream is on the same GPU, and so is what sums are made with.
        Ok(self.launcher.kernels.gpu().flush_writes(false)?)
    }

    /// No device has registered the memory, for this reason: blocks are staged for what queue pairs go by, where
    /// that is allowed.
    fn stage(&mut self, unregistered: &str, config: &Config) {
        self.staging = match config.path.allows(PathKind::Staged) {
            true => Staging::new(&self.launcher.kernels, config).map_err(|error| chain(&error)),
            false => Err("the configuration does not allow it".to_owned()),
        };
        self.shown.staged = self.staging.as_ref().map_or(0, Staging::piece_bytes);
        self.shown.unregistered = Some(clean(unregistered));
    }

    /// Whether RDMA devices have registered the memory: queue pairs reach it as they reach the host's.
    pub(crate) fn is_registered(&self) -> bool {
        self.shown.unregistered.is_none()
    }

    /// The memories, as the GPU itself reaches them.
    fn reached(&self) -> Vec<Reached> {
        let memories = self.memories.iter().cloned();
        memories.map(Reached::Gpu).collect()
    }

    /// Where the GPU is.
    pub(crate) fn pci(&self) -> PciAddress {
        self.launcher.kernels.gpu().info().pci
    }

    /// Its buffers for what is staged; or why there are none.
    pub(crate) fn staging(&self) -> Result<&Staging, &str> {
        self.staging.as_ref().map_err(String::as_str)
    }

    /// Waits, for so long at most, until what peers had lent has gone back to the driver.
    pub(crate) fn settle(&self, within: Duration) {
        self.launcher.kernels.gpu().settle(within);
    }

    /// What peers are shown.
    pub(crate) fn shown(&self) -> &GpuDesc {
        &self.shown
    }

    /// The fence behind a producer's last kernel, before anybody else reads what that wrote; `None`: the
    /// configuration does without.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub(crate) fn release(&self) -> Result<Option<Fence>, Error> {
        match self.fence {
            FencePolicy::Off => Ok(None),
            FencePolicy::On | FencePolicy::Verify => {
                #[cfg(test)]
                self.trial
                    .released
                    .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                Ok(Some(self.launcher.kernels.release(&self.launcher.short)?))
            }
        }
    }

    /// The fence on a consumer's stream, before its first kernel that reads what has come.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub(crate) fn acquire(&self, stream: &Stream) -> Result<Option<Fence>, Error> {
        match self.fence {
            FencePolicy::Off => Ok(None),
            FencePolicy::On | FencePolicy::Verify => {
                Ok(Some(self.launcher.kernels.acquire(stream)?))
            }
        }
    }
}

/// What has to be done for all of these memories.
fn step_for(memories: &[GpuMemory], reader: &Gpu) -> HostStep {
    #[cfg(test)]
    if let Some(step) = trial::STEP.get() {
        return step;
    }
    let step = |memory: &GpuMemory| visibility(memory.class_for(reader), reader.consumer()).step;
    let steps: Vec<HostStep> = memories.iter().map(step).collect();
    let hardest = [HostStep::LoopbackRead, HostStep::HostFlush];
    let hardest = hardest.into_iter().find(|step| steps.contains(step));
    hardest.unwrap_or(HostStep::Native)
}

/// The handles of a peer's memories, whose lengths its placement says.
///
/// # Errors
///
/// [`Error::GpuHandles`], [`Error::GpuHandleLen`] for a description that does not agree with itself;
/// [`Error::Memory`] for what is no handle.
fn handles(theirs: &GpuDesc, lengths: &[u64]) -> Result<Vec<IpcHandle>, Error> {
    let (handles, memories) = (theirs.handles.len(), lengths.len());
    if handles != memories {
        return Err(Error::GpuHandles { handles, memories });
    }
    let read = |(bytes, len): (&Blob, &u64)| {
        let handle = IpcHandle::from_bytes(&bytes.0)?;
        match handle.len() == *len {
            true => Ok(handle),
            false => Err(Error::GpuHandleLen {
                handle: handle.len(),
                memory: *len,
            }),
        }
    };
    theirs.handles.iter().zip(lengths).map(read).collect()
}

/// Opens memories of a peer's GPU for one of this process's.
///
/// # Errors
///
/// [`Error::Memory`].
fn opened(gpu: &Gpu, handles: &[IpcHandle]) -> Result<Vec<GpuMemory>, Error> {
    let open = |handle: &IpcHandle| {
        Ok(match GpuMemory::exported(handle) {
            Some(memory) => memory,
            None => GpuMemory::open(gpu, handle)?,
        })
    };
    handles.iter().map(open).collect()
}

/// What this rank has a GPU fetch of a peer's memory.
#[derive(Debug)]
pub(crate) struct GpuPeer {
    launcher: Arc<Launcher>,
    /// For each of the two kinds of plans, which are one kind mostly.
    tables: Vec<(Compiled, GatherTable)>,
}

impl GpuPeer {
    /// Opens a peer's memories, whose lengths its placement says.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`] for what cannot be opened or reached, [`Error::GpuHandles`] for a description that does
    /// not agree with itself, [`Error::TooManySteps`].
    pub(crate) fn open(
        own: &GpuSide,
        (theirs, lengths): (&GpuDesc, &[u64]),
        plans: &Plans,
    ) -> Result<Self, Error> {
        let theirs = opened(own.launcher.kernels.gpu(), &handles(theirs, lengths)?)?;
        let theirs: Vec<Reached> = theirs.into_iter().map(Reached::Gpu).collect();
        Self::new(Arc::clone(&own.launcher), (&theirs, &own.reached()), plans)
    }

    /// Pins the memories of a peer on the host, which are mapped here, for this side's GPU to read.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`], [`Error::TooManySteps`].
    pub(crate) fn of_host(
        own: &GpuSide,
        theirs: &[PeerMapping],
        plans: &Plans,
    ) -> Result<Self, Error> {
        let theirs = PeerHostMemory::pin(own.launcher.kernels.gpu(), theirs)?;
        let theirs: Vec<Reached> = theirs.into_iter().map(Reached::PeerHost).collect();
        Self::new(Arc::clone(&own.launcher), (&theirs, &own.reached()), plans)
    }

    fn new(
        launcher: Arc<Launcher>,
        (theirs, own): (&[Reached], &[Reached]),
        plans: &Plans,
    ) -> Result<Self, Error> {
        let table = |plans: &Compiled| {
            let table = launcher.table((theirs, own), plans)?;
            Ok::<_, Error>((plans.clone(), table))
        };
        let mut tables = vec![table(&plans.common)?];
        if !plans.share.is_same(&plans.common) {
            tables.push(table(&plans.share)?);
        }
        Ok(Self { launcher, tables })
    }

    /// Puts what a plan copies on a stream.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`], [`Error::OtherPlan`].
    pub(crate) fn gather(&self, plan: &Plan) -> Result<Gather, Error> {
        let table = self.tables.iter().find(|(of, _)| plan.is_of(of));
        let Some((_, table)) = table else {
            return Err(Error::OtherPlan);
        };
        let stream = match plan.report().bytes {
            0..=SHORT => &self.launcher.short,
            _ => &self.launcher.long,
        };
        let wanted = plan.scattered().ok_or(Error::TooManySteps)?;
        let pairs: Vec<Vec<Pair>> = wanted
            .iter()
            .map(|part| {
                let pairs = part.pairs.iter();
                pairs.map(|&(src, dst)| Pair { src, dst }).collect()
            })
            .collect();
        let parts: Vec<GatherPart<'_>> = wanted
            .into_iter()
            .zip(&pairs)
            .map(|(part, pairs)| GatherPart {
                section: part.class,
                tensors: part.tensors,
                pairs,
            })
            .collect();
        Ok(table.gather_parts(stream, &parts)?)
    }
}

impl Inner {
    /// Whether there can be a fence for who reads what a pull brings.
    ///
    /// # Errors
    ///
    /// [`Error::StreamWithoutGpu`]; [`Error::Memory`] for the stream of another GPU.
    pub(crate) fn check_reader(&self, options: &PullOptions) -> Result<(), Error> {
        match (&self.gpu, &options.stream) {
            (_, None) => Ok(()),
            (None, Some(_)) => Err(Error::StreamWithoutGpu),
            (Some(gpu), Some(stream)) if gpu.launcher.kernels.gpu() == stream.gpu() => Ok(()),
            (Some(gpu), Some(stream)) => {
                let other = GpuFault::OtherStreamDevice {
                    what: "the engine's memory",
                    is: gpu.pci(),
                    stream: stream.gpu().info().pci,
                };
                Err(Error::Memory(other.into()))
            }
        }
    }
}

/// What a transfer is told of a GPU that has refused or lost something; the log has its words.
pub(crate) fn cause(operation: GpuOperation, error: &Error) -> Cause {
    tracing::error!(error = chain(error), "{operation}");
    let fault = match error {
        Error::Memory(crate::mem::Error::Gpu(fault)) => Some(fault),
        Error::Memory(crate::mem::Error::Gather(fault)) => match &**fault {
            GatherFault::NotBegun(fault) => Some(fault),
            _ => None,
        },
        _ => None,
    };
    let code = fault.and_then(|fault| fault.code());
    let code = code.map_or(0, |code| code.number);
    Cause::Gpu { operation, code }
}
