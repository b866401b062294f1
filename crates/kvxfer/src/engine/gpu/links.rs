//! Queues over GPU links: a consumer's memory as the producer's kernels write it.

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

impl GpuSide {
    /// A queue by which kernels of a GPU write the blocks that a peer expects, and no others. The peer's memories are
    /// mapped for that GPU as long as the queue is.
    ///
    /// # Errors
    ///
    /// [`Error::QueueConfig`] where blocks do not lie evenly; [`Error::Memory`] for what cannot be opened or reached;
    /// [`Error::GpuHandles`], [`Error::GpuHandleLen`] for a description that does not agree with itself.
    pub(crate) fn link_queue(
        &self,
        gpu: &Gpu,
        (theirs, lengths): (&GpuDesc, &[u64]),
        of: &BlockOps,
        expected: &[GroupBlocks],
    ) -> Result<LinkQueue, Error> {
        let theirs = opened(gpu, &handles(theirs, lengths)?)?;
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
