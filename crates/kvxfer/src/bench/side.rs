//! One side's memory in a bandwidth test.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use kvxfer_hipmem::gpu::GpuMemory;
use kvxfer_hipmem::{Error as MemoryError, HostMemory, PageInfo};
use kvxfer_verbs::Memory;

use super::memory::{BenchMemory, BlockMemory};
use super::pattern::{Pattern, Plane};
use crate::blocks::{BlockPair, GroupPairs};
use crate::error::Error;
use crate::layout::{KvFormat, KvPlacement, Packing, PlacedTensor, PlacementDesc, Topology};

/// Tensors begin at multiples of this.
const ALIGN: u64 = 4096;
/// Bytes that are written to a GPU, or read from it, at a time.
const WINDOW: u64 = 16 << 20;
/// Bytes that no pattern is likely to hold.
const POISON: u8 = 0xa5;

/// What a bandwidth test moves.
#[derive(Debug, Clone)]
pub struct BenchShape {
    /// The format of both sides.
    pub format: KvFormat,
    /// Blocks of each cache group.
    pub num_blocks: Vec<u32>,
    /// The rank that both sides play.
    pub topology: Topology,
    /// Its kind of memory.
    pub memory: BenchMemory,
}

/// The first byte that is not as it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrongByte {
    /// The cache group.
    pub group: u32,
    /// The layer.
    pub layer: u32,
    /// The tensor of the layer.
    pub tensor: u32,
    /// The destination block.
    pub block: u32,
    /// The source block whose content it should have.
    pub src: u32,
    /// Offset in the block.
    pub offset: u64,
}

impl fmt::Display for WrongByte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let WrongByte {
            group,
            layer,
            tensor,
            block,
            src,
            offset,
        } = self;
        write!(
            f,
            "byte {offset} of block {block} (group {group}, layer {layer}, tensor {tensor}) is not \
             what source block {src} holds"
        )
    }
}

/// One side's memory, and where its blocks are.
#[derive(Debug, Clone)]
pub struct BenchSide {
    format: KvFormat,
    placement: KvPlacement,
    memory: Vec<BlockMemory>,
}

fn allocate(bytes: &[u64], kind: BenchMemory) -> Result<Vec<BlockMemory>, Error> {
    let one = |bytes: &u64| BlockMemory::new(kind, *bytes);
    Ok(bytes.iter().map(one).collect::<Result<_, _>>()?)
}

impl BenchSide {
    /// Allocates a client's side.
    ///
    /// # Errors
    ///
    /// A shape that makes no sense, or memory that cannot be had.
    pub fn new(shape: &BenchShape) -> Result<Self, Error> {
        let format = shape.format.clone();
        let uniform = KvPlacement::uniform(
            &format,
            shape.topology,
            &shape.num_blocks,
            Packing::OneMemory,
            ALIGN,
        )?;
        let memory = allocate(uniform.memory_bytes(), shape.memory)?;
        let tokens: Vec<Arc<dyn Memory>> = memory.iter().map(BlockMemory::as_memory).collect();
        let placement = uniform.place(&format, tokens)?;
        Ok(Self {
            format,
            placement,
            memory,
        })
    }

    /// Allocates the counterpart of what a client has described.
    pub(crate) fn mirror(
        format: &KvFormat,
        desc: &PlacementDesc,
        kind: BenchMemory,
    ) -> Result<Self, Error> {
        let memory = allocate(desc.memory_len(), kind)?;
        let tokens = memory.iter().map(BlockMemory::as_memory).collect();
        let placement = KvPlacement::with_pools(
            format,
            *desc.topology(),
            desc.tensors().to_vec(),
            desc.pools().to_vec(),
            tokens,
        )?;
        Ok(Self {
            format: format.clone(),
            placement,
            memory,
        })
    }

    /// Which pages the first memory has, and why no better ones. Not for a hot path.
    #[must_use]
    pub fn pages(&self) -> Option<PageInfo> {
        self.memory.first()?.pages()
    }

    /// The format.
    #[must_use]
    pub fn format(&self) -> &KvFormat {
        &self.format
    }

    /// The placement.
    #[must_use]
    pub fn placement(&self) -> &KvPlacement {
        &self.placement
    }

    /// The memories.
    #[must_use]
    pub fn memory(&self) -> &[BlockMemory] {
        &self.memory
    }

    /// A block of a tensor, if it lies in the host's memory: where it begins, and its bytes; they are dense, so
    /// that is also the distance to the next.
    fn on_host(&self, tensor: &PlacedTensor, block: u32) -> Option<(&HostMemory, u64, u64)> {
        let memory = self
            .memory
            .get(usize::try_from(tensor.memory).ok()?)?
            .host()?;
        let offset = u64::from(block)
            .checked_mul(tensor.block_stride)?
            .checked_add(tensor.offset)?;
        Some((memory, offset, tensor.block_stride))
    }

    /// Fills every block with its pattern.
    ///
    /// # Errors
    ///
    /// A placement that leaves its memory, which its validation excludes.
    pub fn fill(&self, seed: u64) -> Result<(), Error> {
        for tensor in self.placement.desc().tensors() {
            for Window {
                memory,
                offset,
                blocks,
            } in self.windows(tensor)
            {
                let stride = usize::try_from(tensor.block_stride).unwrap_or(usize::MAX);
                let mut bytes = vec![0; stride.saturating_mul(blocks.len())];
                for (block, bytes) in blocks.zip(bytes.chunks_mut(stride.max(1))) {
                    Pattern::new(seed, block, plane(tensor)).fill(bytes, 0);
                }
                memory.write(offset, &bytes)?;
            }
            for block in 0..tensor.num_blocks {
                let Some((memory, offset, len)) = self.on_host(tensor, block) else {
                    continue;
                };
                let pattern = Pattern::new(seed, block, plane(tensor));
                memory.fill_words(offset, len, |word| pattern.word(word))?;
            }
        }
        Ok(())
    }

    /// Fills all memory with bytes that no pattern holds.
    ///
    /// # Errors
    ///
    /// None that its bounds allow.
    pub fn poison(&self) -> Result<(), Error> {
        for memory in &self.memory {
            memory.fill(0, memory.len(), POISON)?;
        }
        Ok(())
    }

    /// Compares every byte of the destination blocks with the pattern of their source blocks.
    /// Returns how many bytes were compared.
    ///
    /// # Errors
    ///
    /// [`Error::BenchWrong`] names the first byte that differs.
    pub fn verify(&self, seed: u64, pairs: &[GroupPairs]) -> Result<u64, Error> {
        let mut bytes = 0;
        for tensor in self.placement.desc().tensors() {
            let of_group = pairs.iter().filter(|group| group.group == tensor.group);
            let of_group = of_group.flat_map(|group| &group.pairs);
            let wrong = |pair: &BlockPair, offset| {
                Error::BenchWrong(WrongByte {
                    group: tensor.group,
                    layer: tensor.layer,
                    tensor: tensor.tensor,
                    block: pair.dst,
                    src: pair.src,
                    offset,
                })
            };
            let mut on_gpu: Vec<&BlockPair> = Vec::new();
            for pair in of_group {
                let Some((memory, offset, len)) = self.on_host(tensor, pair.dst) else {
                    on_gpu.push(pair);
                    continue;
                };
                let pattern = Pattern::new(seed, pair.src, plane(tensor));
                match memory.verify_words(offset, len, |word| pattern.word(word)) {
                    Ok(()) => bytes += len,
                    Err(MemoryError::Mismatch(first)) => {
                        return Err(wrong(pair, first.offset.saturating_sub(offset)));
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            on_gpu.sort_unstable_by_key(|pair| pair.dst);
            for Window {
                memory,
                offset,
                blocks,
            } in self.windows(tensor)
            {
                let first = on_gpu.partition_point(|pair| pair.dst < blocks.start);
                let end = on_gpu.partition_point(|pair| pair.dst < blocks.end);
                let pairs = on_gpu.get(first..end).unwrap_or_default();
                if pairs.is_empty() {
                    continue;
                }
                let stride = usize::try_from(tensor.block_stride).unwrap_or(usize::MAX);
                let mut found = vec![0; stride.saturating_mul(blocks.len())];
                memory.read(offset, &mut found)?;
                for pair in pairs {
                    let at = (pair.dst - blocks.start) as usize * stride;
                    let block = found.get(at..at.saturating_add(stride)).unwrap_or_default();
                    let pattern = Pattern::new(seed, pair.src, plane(tensor));
                    if let Some(at) = pattern.first_difference(block, 0) {
                        return Err(wrong(pair, at as u64));
                    }
                    bytes += block.len() as u64;
                }
            }
        }
        Ok(bytes)
    }
}

/// Blocks of a tensor behind each other in a GPU's memory, as many as are written or read at a time: each call
/// takes as long as a good many bytes.
struct Window<'a> {
    memory: &'a GpuMemory,
    /// Where the first one begins.
    offset: u64,
    blocks: Range<u32>,
}

impl BenchSide {
    /// All blocks of a tensor, if they lie in a GPU's memory.
    fn windows(&self, tensor: &PlacedTensor) -> impl Iterator<Item = Window<'_>> {
        let memory = usize::try_from(tensor.memory).ok();
        let memory = memory.and_then(|at| self.memory.get(at)?.gpu());
        let (offset, stride, count) = (tensor.offset, tensor.block_stride, tensor.num_blocks);
        let each = u32::try_from((WINDOW / stride.max(1)).max(1)).unwrap_or(u32::MAX);
        let firsts = (0..count).step_by(each as usize);
        memory.into_iter().flat_map(move |memory| {
            firsts.clone().map(move |first| Window {
                memory,
                offset: offset.saturating_add(u64::from(first).saturating_mul(stride)),
                blocks: first..first.saturating_add(each).min(count),
            })
        })
    }
}

pub(super) fn plane(tensor: &PlacedTensor) -> Plane {
    Plane {
        group: tensor.group,
        layer: tensor.layer,
        tensor: tensor.tensor,
    }
}
