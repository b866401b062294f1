//! One side's memory in a bandwidth test.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use kvxfer_hipmem::{Error as MemoryError, HostArena, HostBuffer, HostMemory, PageInfo};
use kvxfer_verbs::Memory;

use super::pattern::{Pattern, Plane};
use crate::blocks::GroupPairs;
use crate::error::Error;
use crate::layout::{KvFormat, KvPlacement, Packing, PlacedTensor, PlacementDesc, Topology};

/// Tensors begin at multiples of this.
const ALIGN: u64 = 4096;
/// Bytes that no pattern is likely to hold.
const POISON: u8 = 0xa5;

/// What kind of memory both sides take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BenchMemory {
    /// Arenas, which a peer on this host can map.
    Arena,
    /// Anonymous memory, registered by address.
    Anonymous,
}

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
    memory: Vec<HostMemory>,
    /// The first memory as it was allocated, which can tell of its pages.
    first: Option<Backing>,
}

#[derive(Debug, Clone)]
enum Backing {
    Arena(HostArena),
    Buffer(HostBuffer),
}

impl Backing {
    fn memory(&self) -> &HostMemory {
        match self {
            Backing::Arena(arena) => arena.memory(),
            Backing::Buffer(buffer) => buffer.memory(),
        }
    }
}

fn allocate(bytes: &[u64], kind: BenchMemory) -> Result<(Vec<HostMemory>, Option<Backing>), Error> {
    let one = |&bytes: &u64| -> Result<Backing, MemoryError> {
        Ok(match kind {
            BenchMemory::Arena => Backing::Arena(HostArena::new(bytes)?),
            BenchMemory::Anonymous => Backing::Buffer(HostBuffer::new(bytes)?),
        })
    };
    let all = bytes.iter().map(one).collect::<Result<Vec<_>, _>>()?;
    let memory = all.iter().map(|backing| backing.memory().clone()).collect();
    Ok((memory, all.into_iter().next()))
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
        let (memory, first) = allocate(uniform.memory_bytes(), shape.memory)?;
        let tokens: Vec<Arc<dyn Memory>> = memory.iter().map(HostMemory::as_memory).collect();
        let placement = uniform.place(&format, tokens)?;
        Ok(Self {
            format,
            placement,
            memory,
            first,
        })
    }

    /// Allocates the counterpart of what a client has described.
    pub(crate) fn mirror(
        format: &KvFormat,
        desc: &PlacementDesc,
        kind: BenchMemory,
    ) -> Result<Self, Error> {
        let (memory, first) = allocate(desc.memory_len(), kind)?;
        let tokens = memory.iter().map(HostMemory::as_memory).collect();
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
            first,
        })
    }

    /// Which pages the first memory has, and why no better ones. Not for a hot path.
    #[must_use]
    pub fn pages(&self) -> Option<PageInfo> {
        Some(match self.first.as_ref()? {
            Backing::Arena(arena) => arena.pages(),
            Backing::Buffer(buffer) => buffer.pages(),
        })
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
    pub fn memory(&self) -> &[HostMemory] {
        &self.memory
    }

    /// Bytes of one block of a tensor; dense, so also the distance to the next.
    fn at(&self, tensor: &PlacedTensor, block: u32) -> Option<(&HostMemory, u64, u64)> {
        let memory = self.memory.get(usize::try_from(tensor.memory).ok()?)?;
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
            for block in 0..tensor.num_blocks {
                let Some((memory, offset, len)) = self.at(tensor, block) else {
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
            for pair in of_group.flat_map(|group| &group.pairs) {
                let Some((memory, offset, len)) = self.at(tensor, pair.dst) else {
                    continue;
                };
                let pattern = Pattern::new(seed, pair.src, plane(tensor));
                match memory.verify_words(offset, len, |word| pattern.word(word)) {
                    Ok(()) => bytes += len,
                    Err(MemoryError::Mismatch(first)) => {
                        return Err(Error::BenchWrong(WrongByte {
                            group: tensor.group,
                            layer: tensor.layer,
                            tensor: tensor.tensor,
                            block: pair.dst,
                            src: pair.src,
                            offset: first.offset.saturating_sub(offset),
                        }));
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(bytes)
    }
}

fn plane(tensor: &PlacedTensor) -> Plane {
    Plane {
        group: tensor.group,
        layer: tensor.layer,
        tensor: tensor.tensor,
    }
}
