//! An engine's memory where it is the host's, beside peers of this node whose memory is a GPU's: their GPUs read it,
//! and this process has a GPU write it.
//!
//! The rule is that of two GPUs: who has the destination launches. A peer's GPU reads files that this side shares
//! with it ([`HostSide::token`]). What comes out of a peer's GPU this side fetches by that same GPU, which it opens
//! for it, into its own memory, which it pins. What the launch wrote is seen by this process's CPUs when its end has
//! been: the kernel releases to the system before it says that it has ended.

use std::sync::{Arc, Mutex, PoisonError};

use kvxfer_verbs::{Access, Memory, MemoryRegion, SharedFiles};
use tracing::{debug, info};

use super::launcher::{Launcher, Reached};
use super::{GpuPeer, handles, opened};
use crate::config::{Config, PathKind};
use crate::engine::peer_session::Plans;
use crate::engine::runtime::Runtime;
use crate::error::{Error, chain};
use crate::mem::HostMemory;
use crate::mem::gpu::{Gpu, GpuFault, GpuRuntime, IpcHandle, PinnedMemory, RuntimeChoice};
use crate::wire::{Blob, GpuDesc};

/// This rank's memory, where it is the host's.
#[derive(Debug)]
pub(crate) struct HostSide {
    memories: Vec<Arc<dyn Memory>>,
    /// What peers map to read it, if it is offered to any and has files.
    shared: Option<SharedFiles>,
    gpus: Mutex<Gpus>,
}

/// What has been opened for peers, and stays for the next: a context and a pinning take a while.
#[derive(Debug, Default)]
struct Gpus {
    /// One for each GPU. They go first, when nothing runs on their streams.
    launchers: Vec<Arc<Launcher>>,
    /// The memory, once it is pinned, for all GPUs of one runtime.
    pinned: Vec<PinnedMemory>,
}

impl HostSide {
    pub(crate) fn new(
        memories: &[Arc<dyn Memory>],
        (runtime, config): (&Runtime, &Config),
        regions: &[MemoryRegion],
    ) -> Self {
        let readable = |region: &MemoryRegion| region.access().contains(Access::REMOTE_READ);
        let wanted = config.path.allows(PathKind::Ipc)
            && !runtime.is_rdma()
            && !regions.is_empty()
            && regions.iter().all(readable);
        let rail = runtime.rails().first().filter(|_| wanted);
        let shared = rail.map(|rail| rail.context.share(regions)).transpose();
        Self {
            memories: memories.to_vec(),
            shared: shared.unwrap_or_else(|error| {
                debug!(%error, "peers' GPUs will not read this memory");
                None
            }),
            gpus: Mutex::default(),
        }
    }

    /// By what peers of this node map the memory, to read it.
    pub(crate) fn token(&self) -> Option<Blob> {
        let shared = self.shared.as_ref()?;
        Some(Blob(shared.token().to_vec()))
    }

    /// Opens a peer's GPU and its memories, whose lengths its placement says, and pins this side's memory for it.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`] where there is no such runtime or GPU for this process, for what cannot be opened, and for
    /// memory that cannot be pinned; as [`GpuPeer::open`]; [`Error::ForeignHostMemory`].
    pub(crate) fn reach(
        &self,
        config: &Config,
        (theirs, lengths): (&GpuDesc, &[u64]),
        plans: &Plans,
    ) -> Result<GpuPeer, Error> {
        let handles = handles(theirs, lengths)?;
        let Some(first) = handles.first() else {
            let (handles, memories) = (0, lengths.len());
            return Err(Error::GpuHandles { handles, memories });
        };
        let gpu = gpu_of(config.gpu, first)?;
        let theirs = opened(&gpu, &handles)?;
        let theirs: Vec<Reached> = theirs.into_iter().map(Reached::Gpu).collect();
        let (launcher, own) = self.launcher(&gpu, config)?;
        let own: Vec<Reached> = own.into_iter().map(Reached::Host).collect();
        GpuPeer::new(launcher, (&theirs, &own), plans)
    }

    fn launcher(
        &self,
        gpu: &Gpu,
        config: &Config,
    ) -> Result<(Arc<Launcher>, Vec<PinnedMemory>), Error> {
        // Held meanwhile: of two sessions that come up at once the second finds what the first has made.
        let mut gpus = self.gpus.lock().unwrap_or_else(PoisonError::into_inner);
        if gpus.pinned.is_empty() {
            gpus.pinned = self.pin(gpu)?;
        }
        let of = |launcher: &&Arc<Launcher>| launcher.kernels.gpu() == gpu;
        let launcher = match gpus.launchers.iter().find(of) {
            Some(launcher) => Arc::clone(launcher),
            None => {
                let launcher = Arc::new(Launcher::new(gpu, config)?);
                gpus.launchers.push(Arc::clone(&launcher));
                launcher
            }
        };
        Ok((launcher, gpus.pinned.clone()))
    }

    fn pin(&self, gpu: &Gpu) -> Result<Vec<PinnedMemory>, Error> {
        let pin = |(index, memory): (usize, &Arc<dyn Memory>)| {
            let host = HostMemory::of(memory).ok_or(Error::ForeignHostMemory { index })?;
            Ok(PinnedMemory::register(gpu, &host)?)
        };
        let pinned = self.memories.iter().enumerate().map(pin);
        let pinned = pinned.collect::<Result<Vec<_>, Error>>();
        match &pinned {
            Ok(_) => info!(gpu = %gpu.info().pci, "memory pinned for GPUs of peers"),
            Err(error) => debug!(error = chain(error), "memory not pinned"),
        }
        pinned
    }
}

/// The GPU whose memory a handle names, by the runtime that can open it, if that may be taken.
fn gpu_of(allowed: RuntimeChoice, handle: &IpcHandle) -> Result<Gpu, Error> {
    let theirs = handle.runtime();
    match allowed {
        RuntimeChoice::Only(ours) if ours != theirs => {
            let fault = GpuFault::IpcRuntime { ours, theirs };
            Err(Error::Memory(fault.into()))
        }
        // A stand-in too: that is what the peer has.
        _ => {
            let runtime = GpuRuntime::open(RuntimeChoice::Only(theirs))?;
            Ok(runtime.gpu_of(handle)?.clone())
        }
    }
}
