//! Queues over GPU links: a consumer's memory as the producer's kernels write it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{GpuSide, handles, opened};
use crate::blocks::GroupBlocks;
use crate::error::Error;
use crate::mem::gpu::{Gpu, GpuMemory, Place};
use crate::mem::post::device::{LinkExpected, LinkLayer, LinkPiece, LinkQueue, LinkSide};
use crate::plan::{BlockOps, BlockPiece, PieceSide};
use crate::wire::GpuDesc;

/// Whether kernels of a GPU may outlive this process. The consumer, which waits for the process's end, cannot know that.
pub(crate) fn outlive(gpu: &Gpu) -> bool {
    #[cfg(test)]
    if super::trial::MPS.get() {
        return true;
    }
    gpu.info().mps
}

/// A peer's memories, for kernels of this process's GPUs to write: by its handles, which a session opens once for each GPU,
/// and not each queue for itself. Drivers let closing one wait for all kernels.
#[derive(Debug)]
pub(crate) struct LinkedMemory {
    theirs: GpuDesc,
    /// `None` when the session is over: what its peer frees then is not to be held open.
    opened: Mutex<Option<Opened>>,
}

/// For each GPU that has asked.
type Opened = Vec<(Gpu, Vec<GpuMemory>)>;

impl LinkedMemory {
    pub(crate) fn new(theirs: GpuDesc) -> Self {
        Self {
            theirs,
            opened: Mutex::new(Some(Vec::new())),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Opened>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the session has of it goes: queues have their own.
    pub(crate) fn close(&self) {
        self.lock().take();
    }

    fn open(&self, gpu: &Gpu, lengths: &[u64]) -> Result<Vec<GpuMemory>, Error> {
        if let Some((_, memories)) = (self.lock().iter().flatten()).find(|(of, _)| of == gpu) {
            return Ok(memories.clone());
        }
        let handles = handles(&self.theirs, lengths)?;
        let memories = opened(gpu, &handles)?;
        // Another engine's of this process is not opened, and freed by who drops it last.
        let is_own = |handle| GpuMemory::exported(handle).is_some();
        if let Some(all) = &mut *self.lock()
            && !handles.iter().any(is_own)
        {
            all.push((gpu.clone(), memories.clone()));
        }
        Ok(memories)
    }
}

impl GpuSide {
    /// A queue by which kernels of a GPU write the blocks that a peer expects, and no others. The peer's memories are
    /// mapped for that GPU as long as the queue is, and the session.
    ///
    /// # Errors
    ///
    /// [`Error::QueueConfig`] where blocks do not lie evenly; [`Error::Memory`] for what cannot be opened or reached;
    /// [`Error::GpuHandles`], [`Error::GpuHandleLen`] for a description that does not agree with itself.
    pub(crate) fn link_queue(
        &self,
        gpu: &Gpu,
        (theirs, lengths): (&LinkedMemory, &[u64]),
        of: &BlockOps,
        expected: &[GroupBlocks],
    ) -> Result<LinkQueue, Error> {
        let theirs = theirs.open(gpu, lengths)?;
        let uneven = || Error::QueueConfig {
            what: "kind: links name blocks at even distances",
        };
        let mut layers = Vec::new();
        for (at, layer) in of.layers() {
            let tensors = of.pieces(at).ok_or_else(uneven)?;
            let (Ok(group), Ok(number)) = (u8::try_from(layer.group), u16::try_from(layer.layer))
            else {
                // Not to be named by a post.
                continue;
            };
            if tensors.is_empty() {
                continue;
            }
            let (local_blocks, remote_blocks) = of.num_blocks(layer.group);
            let piece = |piece: &BlockPiece| {
                Ok(LinkPiece {
                    local: side(&self.memories, piece.local)?,
                    remote: side(&theirs, piece.remote)?,
                    len: piece.len,
                })
            };
            let tensor = |of: &Vec<_>| of.iter().map(piece).collect::<Result<Vec<_>, Error>>();
            layers.push(LinkLayer {
                group,
                layer: number,
                local_blocks,
                remote_blocks,
                tensors: tensors.iter().map(tensor).collect::<Result<_, Error>>()?,
            });
        }
        let expected: Vec<LinkExpected<'_>> = expected
            .iter()
            .filter_map(|of| {
                Some(LinkExpected {
                    group: u8::try_from(of.group).ok()?,
                    blocks: &of.blocks,
                })
            })
            .collect();
        Ok(LinkQueue::among(gpu, &layers, &expected)?)
    }
}

fn side(of: &[GpuMemory], at: PieceSide) -> Result<LinkSide<'_>, Error> {
    let memory = usize::try_from(at.region).ok().and_then(|at| of.get(at));
    Ok(LinkSide {
        place: Place::Gpu(memory.ok_or(Error::OtherPlan)?, at.offset),
        stride: at.stride,
    })
}
