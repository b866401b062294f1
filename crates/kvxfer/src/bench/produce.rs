//! The blocks of a side as a kernel makes them, layer by layer.

use kvxfer_hipmem::gpu::{Gpu, PinnedMemory, Place};
use kvxfer_hipmem::post::device::{Produce, ProducedTensor};

use super::memory::BlockMemory;
use super::pattern::Pattern;
use super::side::{BenchSide, plane};
use crate::engine::GpuQueue;
use crate::error::Error;

/// A side's memories as a GPU reaches them: its own, or the host's, pinned.
#[derive(Debug)]
pub struct ReachedMemory(Vec<Reached>);

#[derive(Debug)]
enum Reached {
    Own(kvxfer_hipmem::gpu::GpuMemory),
    Pinned(PinnedMemory),
}

impl BenchSide {
    /// Makes the side's memories reachable for a GPU's kernels.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`] for what cannot be pinned.
    pub fn reach(&self, gpu: &Gpu) -> Result<ReachedMemory, Error> {
        let reach = |memory: &BlockMemory| {
            Ok(match (memory.gpu(), memory.host()) {
                (Some(own), _) => Reached::Own(own.clone()),
                (None, Some(host)) => Reached::Pinned(PinnedMemory::register(gpu, host)?),
                // It is one or the other.
                (None, None) => return Err(Error::OtherPlan),
            })
        };
        let all = self.memory().iter().map(reach);
        Ok(ReachedMemory(all.collect::<Result<_, _>>()?))
    }

    /// What a producer kernel makes so that [`verify`](Self::verify) finds the seed's pattern at the other side: all
    /// tensors, layer by layer, with posts of as many bytes as the queue wants.
    #[must_use]
    pub fn produce<'a>(
        &self,
        reached: &'a ReachedMemory,
        queue: &GpuQueue,
        seed: u64,
    ) -> Vec<Produce<'a>> {
        let mut layers: Vec<Produce<'a>> = Vec::new();
        let mut tensors: Vec<_> = self.placement().desc().tensors().iter().collect();
        tensors.sort_by_key(|tensor| (tensor.layer, tensor.group, tensor.tensor));
        for tensor in tensors {
            let memory = usize::try_from(tensor.memory).ok();
            let memory = memory.and_then(|at| reached.0.get(at));
            let (Ok(group), Ok(layer), Some(memory), Some(len)) = (
                u8::try_from(tensor.group),
                u16::try_from(tensor.layer),
                memory,
                queue.block_bytes(tensor.group, tensor.layer),
            ) else {
                // Not to be named by a post, or nothing that the two ranks share.
                continue;
            };
            let made = ProducedTensor {
                place: match memory {
                    Reached::Own(memory) => Place::Gpu(memory, tensor.offset),
                    Reached::Pinned(memory) => Place::Pinned(memory, tensor.offset),
                },
                stride: tensor.block_stride,
                bytes: tensor.block_stride,
                salt: Pattern::salt(seed, plane(tensor)),
            };
            match layers.last_mut() {
                Some(last) if (last.group, last.layer) == (group, layer) => last.tensors.push(made),
                _ => layers.push(Produce {
                    group,
                    layer,
                    len,
                    tensors: vec![made],
                }),
            }
        }
        layers
    }
}
