//! An engine's memory where it is the host's, beside peers of this node whose memory is a GPU's: their GPUs read it,
//! and this process has a GPU write it.
//!
//! The rule is that of two GPUs: who has the destination launches. A peer's GPU reads files that this side shares
//! with it ([`HostSide::token`]). What comes out of a peer's GPU this side fetches by that same GPU, which it opens
//! for it, into its own memory, which it pins. What the launch wrote is seen by this process's CPUs when its end has
//! been: the kernel releases to the system before it says that it has ended.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvxfer_verbs::{Access, Memory, MemoryRegion, SharedFiles};
use tracing::{debug, info};

use super::launcher::{Launcher, Reached};
use super::{GpuPeer, handles, opened};
use crate::config::{Config, PathKind};
use crate::engine::peer_session::Plans;
use crate::engine::runtime::Runtime;
use crate::error::{Error, chain};
use crate::mem::HostMemory;
use crate::mem::gpu::{
    Gpu, GpuFault, GpuRuntime, IpcHandle, PinnedMemory, RuntimeChoice, RuntimeKind,
};
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
    /// The memory, once it is pinned, for all GPUs of a runtime.
    pinned: HashMap<RuntimeKind, Vec<PinnedMemory>>,
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
    /// memory that cannot be pinned, which is tried again for the next session; as [`GpuPeer::open`];
    /// [`Error::ForeignHostMemory`], [`Error::StandInNotNamed`].
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
        // Held meanwhile: of two sessions that come up at once the second finds what the first has made.
        let mut gpus = self.gpus.lock().unwrap_or_else(PoisonError::into_inner);
        let own = match gpus.pinned.entry(gpu.runtime()) {
            Entry::Occupied(pinned) => pinned.into_mut(),
            Entry::Vacant(place) => place.insert(self.pin(&gpu)?),
        };
        let own: Vec<Reached> = own.iter().cloned().map(Reached::Host).collect();
        let of = |launcher: &&Arc<Launcher>| *launcher.kernels.gpu() == gpu;
        if let Some(launcher) = gpus.launchers.iter().find(of) {
            return GpuPeer::new(Arc::clone(launcher), (&theirs, &own), plans);
        }
        let launcher = Arc::new(Launcher::new(&gpu, config)?);
        let peer = GpuPeer::new(Arc::clone(&launcher), (&theirs, &own), plans)?;
        // A GPU that is of no use is not kept.
        gpus.launchers.push(launcher);
        Ok(peer)
    }

    /// Waits, for so long at most, until what peers had lent has gone back to drivers.
    pub(crate) fn settle(&self, within: Duration) {
        let gpus = self.gpus.lock().unwrap_or_else(PoisonError::into_inner);
        for launcher in &gpus.launchers {
            launcher.kernels.gpu().settle(within);
        }
    }

    fn pin(&self, gpu: &Gpu) -> Result<Vec<PinnedMemory>, Error> {
        let host = |(index, memory): (usize, &Arc<dyn Memory>)| {
            HostMemory::of(memory).ok_or(Error::ForeignHostMemory { index })
        };
        let hosts = self.memories.iter().enumerate().map(host);
        let hosts = hosts.collect::<Result<Vec<_>, Error>>()?;
        let pinned = PinnedMemory::register_all(gpu, &hosts).map_err(Error::from);
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
        // It opens what the handle names of another process's files: for tests, and not at a peer's word.
        RuntimeChoice::Auto if theirs == RuntimeKind::Host => Err(Error::StandInNotNamed),
        _ => {
            let runtime = GpuRuntime::open(RuntimeChoice::Only(theirs))?;
            Ok(runtime.gpu_of(handle)?.clone())
        }
    }
}
