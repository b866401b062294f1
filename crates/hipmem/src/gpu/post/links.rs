//! Queues over GPU links: kernels that put copy the block themselves.

use std::fmt;
use std::time::{Duration, Instant};

use super::notes::{LinkExpected, LinkPuts, Notes};
use super::posters::Posters;
use super::queue::{KernelQueue, sealed};
use super::regions::RegionTable;
use crate::error::{Error, Operation};
use crate::gpu::device::{same, same_runtime};
use crate::gpu::stream::Keep;
use crate::gpu::{Gpu, Place};
use crate::kernels::queue::{LINKS, Queue};
use crate::post::{Compiled, RegionLayer, RegionPiece, RegionSide};

/// Threads of a workgroup that copies a block: for 16 KiB four vectors each on NVIDIA, and few enough that several
/// workgroups of a multiprocessor wait for their fences side by side.
const THREADS: u32 = 256;

/// One side of a piece: where block 0 has it, and how far it is to the next block.
#[derive(Debug, Clone, Copy)]
pub struct LinkSide<'a> {
    /// Where block 0 has it.
    pub place: Place<'a>,
    /// Bytes from one block to the next.
    pub stride: u64,
}

/// A stretch of a block that is contiguous on both sides.
#[derive(Debug, Clone, Copy)]
pub struct LinkPiece<'a> {
    /// Where it is read.
    pub local: LinkSide<'a>,
    /// Where it is written: memory of another GPU, of another process, or of the host.
    pub remote: LinkSide<'a>,
    /// Bytes.
    pub len: u64,
}

/// A layer of a cache group, of whose blocks kernels can speak.
#[derive(Debug, Clone)]
pub struct LinkLayer<'a> {
    /// The group.
    pub group: u8,
    /// The layer.
    pub layer: u16,
    /// Blocks on this side.
    pub local_blocks: u32,
    /// Blocks at the peer.
    pub remote_blocks: u32,
    /// The pieces of a block, tensor by tensor.
    pub tensors: Vec<Vec<LinkPiece<'a>>>,
}

/// A queue over GPU links: `kvx_put` and its like copy a block, by the threads that call them, from this side's memory
/// to the peer's, which the GPU reaches. A put that says `KVX_OK` has ended; waits say so at once. It holds all memory
/// that its table names. A kernel must have ended before this goes.
///
/// Whose blocks these are, and when they may be written, is decided above: a kernel writes where it names a block, and a
/// queue that was made with [`among`](Self::among) refuses what is not expected.
pub struct LinkQueue {
    table: RegionTable,
    notes: Option<Notes>,
    /// Before `posters` (fields go in their order): what of it is a peer's is then given back by a thread.
    _memories: Vec<Keep>,
    posters: Posters,
}

impl LinkQueue {
    /// A queue for kernels of this GPU, which is given access to other GPUs whose memory the layers name.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`] for blocks that are not wholly inside their memory; [`Error::Regions`] for layers that make
    /// no table; [`GpuFault::NoPeerAccess`](crate::gpu::GpuFault::NoPeerAccess) and its like for memory that this GPU
    /// does not reach; [`Error::Gpu`].
    pub fn new(gpu: &Gpu, layers: &[LinkLayer<'_>]) -> Result<Self, Error> {
        Self::of(gpu, layers, None)
    }

    /// The same for whole blocks that the peer expects, of each layer of their group: all else is refused
    /// ([`Status::BadRights`](crate::post::Status::BadRights)), and so is one tensor of several
    /// ([`Status::BadRange`](crate::post::Status::BadRange)). What was put is known when the kernels have ended
    /// ([`puts`](Self::puts)).
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new); [`Error::OutOfBounds`] for an expected block that the peer does not have, and for layers
    /// of a group that say different numbers of blocks.
    pub fn among(
        gpu: &Gpu,
        layers: &[LinkLayer<'_>],
        expected: &[LinkExpected<'_>],
    ) -> Result<Self, Error> {
        Self::of(gpu, layers, Some(expected))
    }

    fn of(
        gpu: &Gpu,
        layers: &[LinkLayer<'_>],
        expected: Option<&[LinkExpected<'_>]>,
    ) -> Result<Self, Error> {
        // Nothing is ever waited for.
        let posters = Posters::new(gpu, Duration::ZERO)?;
        let mut memories = Vec::new();
        let mut rows = Vec::new();
        for layer in layers {
            let mut tensors = Vec::new();
            for tensor in &layer.tensors {
                let mut pieces = Vec::new();
                for piece in tensor {
                    let here = (Operation::CopySource, layer.local_blocks);
                    let there = (Operation::CopyDestination, layer.remote_blocks);
                    pieces.push(RegionPiece {
                        local: side(gpu, &piece.local, piece.len, here, &mut memories)?,
                        remote: side(gpu, &piece.remote, piece.len, there, &mut memories)?,
                        len: piece.len,
                    });
                }
                tensors.push(pieces);
            }
            rows.push(RegionLayer {
                group: layer.group,
                layer: layer.layer,
                local_blocks: layer.local_blocks,
                remote_blocks: layer.remote_blocks,
                tensors,
            });
        }
        let mut table = Compiled::new(&rows)?;
        let notes = expected.map(|of| Notes::new(gpu, (&rows, &mut table), of));
        let notes = notes.transpose()?;
        Ok(Self {
            table: RegionTable::of(gpu, &table)?,
            notes,
            posters,
            _memories: memories,
        })
    }

    /// What a kernel is given: [`KernelQueue::handle`].
    #[must_use]
    pub fn handle(&self) -> Queue {
        let (words, slots) = self.notes.as_ref().map_or((0, 0), Notes::addrs);
        Queue {
            slots,
            words,
            state: self.posters.state(),
            report: self.posters.report(),
            abort: self.posters.abort(),
            regions: self.table.addr(),
            kind: LINKS,
            depth: 1,
            ..Queue::default()
        }
    }

    pub(super) fn posters(&self) -> &Posters {
        &self.posters
    }

    /// The GPU whose kernels copy.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        self.posters.gpu()
    }

    /// What kernels have put, once none runs any more; nothing of a queue that does not keep account.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`], also where it cannot be read before the deadline.
    pub fn puts(&self, deadline: Instant) -> Result<LinkPuts, Error> {
        match &self.notes {
            Some(notes) => notes.puts(&self.posters, deadline),
            None => Ok(LinkPuts::default()),
        }
    }

    /// Sets the abort word: puts that begin later, and those in the middle, end with
    /// [`Status::Stopped`](crate::post::Status::Stopped), their block in part written. A warp looks once for each put and
    /// then for each 64 KiB, so it may write as many bytes and one chunk more; that nothing is written any more, the end
    /// of the kernel says.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`].
    pub fn stop(&self) -> Result<(), Error> {
        self.posters.stop()
    }
}

/// A side that is wholly inside its memory, which the GPU reaches.
fn side(
    gpu: &Gpu,
    of: &LinkSide<'_>,
    len: u64,
    (operation, blocks): (Operation, u32),
    memories: &mut Vec<Keep>,
) -> Result<RegionSide, Error> {
    let place = of.place;
    let last = of.stride.checked_mul(blocks.saturating_sub(1).into());
    let end = last.and_then(|last| last.checked_add(len));
    place.range(operation, end.unwrap_or(u64::MAX))?;
    same_runtime("the memory", place.gpu(), gpu)?;
    match place {
        // What another process has exported is mapped for one GPU.
        Place::Gpu(memory, _) if memory.is_opened() => {
            same("another process's memory", memory.gpu(), gpu)?;
        }
        Place::Gpu(memory, _) => gpu.enable_access(memory.gpu())?,
        // The runtime's pinned memory is every device's.
        Place::Pinned(..) | Place::PeerHost(..) => {}
    }
    memories.push(place.keep());
    Ok(RegionSide {
        addr: place.device_addr(),
        stride: of.stride,
        key: 0,
    })
}

impl sealed::Sealed for LinkQueue {
    const THREADS: Option<u32> = Some(THREADS);
}

impl KernelQueue for LinkQueue {
    fn handle(&self) -> Queue {
        self.handle()
    }

    fn gpu(&self) -> &Gpu {
        self.gpu()
    }
}

impl fmt::Debug for LinkQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a queue over links, {:?}", self.table)
    }
}
