//! Blocks on GPUs: whether this side's reaches the peer's memory, and what the devices of both reach.

use super::Bringup;
use crate::engine::Inner;
use crate::engine::gpu::GpuPeer;
use crate::error::chain;
use crate::transport::{Blocks, BothBlocks, Unregistered};
use crate::wire::{GpuDesc, RemoteSpan, limits};

impl Bringup {
    /// Opens the peer's memory for this side's GPU, if blocks are to be fetched out of it; the error says why that
    /// cannot be.
    pub(super) fn reach_gpu(&mut self, engine: &Inner) -> Result<(), String> {
        let Some(known) = &self.known else {
            return Ok(());
        };
        let (Some(own), Some(theirs)) = (&engine.gpu, &known.describe.gpu) else {
            return Ok(());
        };
        let device = self.rails.first();
        let device = device.and_then(|at| engine.runtime.rail(*at).ok());
        let devices = device.zip(known.rails.first());
        if !devices.is_some_and(|(own, theirs)| own.context.shares_host(&theirs.device)) {
            return Err("the peer is on another host".to_owned());
        }
        let lengths = known.layout.1.memory_len();
        let open = |plans| GpuPeer::open(own, (theirs, lengths), plans);
        match known.pull.as_ref().map(open).transpose() {
            Ok(gpu) => {
                self.gpu = gpu;
                Ok(())
            }
            Err(error) => Err(chain(&error)),
        }
    }

    /// Why blocks cannot be staged: a side whose memory is a GPU's that its devices do not reach needs buffers.
    pub(super) fn unstaged(&self, engine: &Inner) -> Option<String> {
        let own = engine.gpu.as_ref().filter(|gpu| !gpu.is_registered());
        if let Some(Err(reason)) = own.map(|gpu| gpu.staging()) {
            return Some(format!("no pinned memory: {reason}"));
        }
        let known = self.known.as_ref()?;
        let theirs = known.describe.gpu.as_ref();
        let theirs = theirs.filter(|gpu| gpu.unregistered.is_some())?;
        let spans = known.describe.rails.iter().map(|rail| rail.staging);
        let bytes = |span: Option<RemoteSpan>| span.map_or(0, |span| span.len);
        // No fewer, or operations would be cut to nothing.
        let enough = theirs.staged >= limits::LEAST_STAGED;
        match enough && spans.map(bytes).all(|bytes| bytes >= theirs.staged) {
            true => None,
            false => Some("the peer has no pinned memory to stage blocks in".to_owned()),
        }
    }

    /// Where the blocks of the two sides are.
    pub(super) fn blocks(&self, engine: &Inner) -> BothBlocks {
        let own = engine.gpu.as_ref().map(|gpu| gpu.shown());
        let of = |gpu: Option<&GpuDesc>| match gpu.map(|gpu| &gpu.unregistered) {
            None => Blocks::Host,
            Some(None) => Blocks::Registered,
            Some(Some(_)) => Blocks::Unreached,
        };
        BothBlocks {
            here: of(own),
            there: of(self.their_gpu()),
        }
    }

    /// Why those that are a GPU's are not registered.
    pub(super) fn unregistered<'a>(&'a self, engine: &'a Inner) -> Unregistered<'a> {
        let own = engine.gpu.as_ref().map(|gpu| gpu.shown());
        let of = |gpu: Option<&'a GpuDesc>| gpu?.unregistered.as_deref();
        Unregistered {
            here: of(own),
            there: of(self.their_gpu()),
        }
    }

    fn their_gpu(&self) -> Option<&GpuDesc> {
        self.known.as_ref()?.describe.gpu.as_ref()
    }
}
