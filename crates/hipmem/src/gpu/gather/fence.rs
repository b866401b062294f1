//! The fences around what a network card or another GPU reads or writes behind a GPU's caches.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use super::super::device::same;
use super::super::stream::Keep;
use super::error::GatherFault;
use super::scratch::Scratch;
use super::{GpuKernels, Inner};
use crate::error::Error;
use crate::gpu::{Event, Kernel, Pending, RuntimeKind, Stream};
use crate::kernels::{FENCE_WORKGROUPS, FenceArgs, bytes_of};

/// Bytes of a slot.
const SLOT: u64 = 16;

/// A fence that is on a stream.
#[derive(Debug)]
pub struct Fence {
    kernels: GpuKernels,
    pending: Pending,
    scratch: Arc<Scratch>,
    sequence: u64,
    workgroups: u32,
}

impl GpuKernels {
    /// Puts the fence on a consumer's stream that comes after a completion and before the first kernel that
    /// reads what has come: once, for any number of blocks.
    ///
    /// # Errors
    ///
    /// [`GpuFault::OtherStreamDevice`](crate::gpu::GpuFault::OtherStreamDevice), [`Error::Gpu`].
    pub fn acquire(&self, stream: &Stream) -> Result<Fence, Error> {
        self.fence(stream, |kernels| &kernels.acquire)
    }

    /// Puts the fence on a producer's stream that comes after its last kernel and before anybody else reads
    /// what that wrote.
    ///
    /// # Errors
    ///
    /// As [`acquire`](Self::acquire).
    pub fn release(&self, stream: &Stream) -> Result<Fence, Error> {
        self.fence(stream, |kernels| &kernels.release)
    }

    fn fence(&self, stream: &Stream, kernel: impl Fn(&Inner) -> &Kernel) -> Result<Fence, Error> {
        same("the kernels", self.gpu(), stream.gpu())?;
        let scratch = self.scratch(0)?;
        let sequence = self.sequence();
        // A fence of NVIDIA's and the host's is the whole device's, whoever makes it.
        let workgroups = match self.gpu().runtime() {
            RuntimeKind::Hip => FENCE_WORKGROUPS,
            RuntimeKind::Cuda | RuntimeKind::Host => 1,
        };
        let args = FenceArgs {
            slots: scratch.slots().device_addr(),
            sequence,
        };
        let keep: Vec<Keep> = vec![Arc::clone(&scratch) as Keep, Arc::clone(&self.0) as Keep];
        let pending = stream.put(keep, |raw| {
            let args = bytes_of(std::slice::from_ref(&args));
            // SAFETY: `keep` has the kernel's module, and the slots, of which there are as many; it ends.
            unsafe { kernel(&self.0).put(raw, workgroups, self.0.warp, args) }
        })?;
        Ok(Fence {
            kernels: self.clone(),
            pending,
            scratch,
            sequence,
            workgroups,
        })
    }
}

impl Fence {
    /// The mark behind it, for other streams to wait for.
    #[must_use]
    pub fn event(&self) -> &Event {
        self.pending.event()
    }

    /// Waits until it has ended, and looks where it has run.
    ///
    /// # Errors
    ///
    /// [`GatherFault::FenceReach`] if that is not everywhere: put another one there.
    /// [`GpuFault::Deadline`](crate::gpu::GpuFault::Deadline), [`GatherFault::FenceIncomplete`], [`Error::Gpu`].
    pub fn wait(&self, deadline: Instant) -> Result<(), Error> {
        self.pending.wait(deadline)?;
        let slots = self.scratch.slots().host();
        let mut units = BTreeSet::new();
        let mut ended = 0;
        for i in 0..self.workgroups {
            let at = u64::from(i) * SLOT;
            if slots.load_u64(at)? == self.sequence {
                ended += 1;
                units.insert(slots.load_u64(at + 8)?);
            }
        }
        let workgroups = self.workgroups;
        if ended != workgroups {
            return Err(GatherFault::FenceIncomplete { ended, workgroups }.into());
        }
        let seen = u32::try_from(units.len()).unwrap_or(u32::MAX);
        match self.kernels.gpu().info().xccs {
            Some(xccs) if seen < xccs => Err(GatherFault::FenceReach {
                workgroups,
                seen,
                xccs,
            }
            .into()),
            _ => Ok(()),
        }
    }
}
