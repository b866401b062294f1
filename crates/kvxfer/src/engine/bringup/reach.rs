//! Blocks on GPUs: whether this side's reaches the peer's memory.

use super::Bringup;
use crate::engine::Inner;
use crate::engine::gpu::GpuPeer;
use crate::error::chain;
use crate::transport::OnGpu;

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

    /// Which of the two sides have their blocks on a GPU.
    pub(super) fn on_gpu(&self, engine: &Inner) -> OnGpu {
        let known = self.known.as_ref();
        OnGpu {
            here: engine.gpu.is_some(),
            there: known.is_some_and(|known| known.describe.gpu.is_some()),
        }
    }
}
