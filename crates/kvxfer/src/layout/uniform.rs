//! The plain way to place a rank's part: dense tensors, one behind the other.

use std::sync::Arc;

use kvxfer_verbs::Memory;

use super::{
    KvFormat, KvPlacement, LayoutError, PlacedTensor, PlacementDesc, Shard, TensorFormat, Topology,
};

/// How tensors are put into memories.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// All in one memory, one behind the other.
    OneMemory,
    /// A memory for each.
    PerTensor,
}

/// A rank's part of the cache in dense tensors `[num_blocks, axes…]`, in the format's order of axes
/// and with the sharded axis divided by the tensor-parallel size; not yet in any memory.
#[derive(Debug, Clone)]
pub struct Uniform {
    topology: Topology,
    tensors: Vec<PlacedTensor>,
    memory_bytes: Vec<u64>,
}

impl KvPlacement {
    /// Works out a dense placement: `num_blocks` for each group, tensors beginning at multiples of
    /// `align` bytes. Where there are fewer heads than ranks, neighbouring ranks keep the same
    /// head.
    ///
    /// Allocate [`Uniform::memory_bytes`], then call [`Uniform::place`].
    ///
    /// # Errors
    ///
    /// A list of block counts of the wrong length, a zero among them, heads that cannot be dealt
    /// evenly, an alignment that is no power of two, sizes that overflow, a rank outside its size.
    pub fn uniform(
        format: &KvFormat,
        topology: Topology,
        num_blocks: &[u32],
        packing: Packing,
        align: u64,
    ) -> Result<Uniform, LayoutError> {
        if !align.is_power_of_two() {
            return Err(LayoutError::Alignment { align });
        }
        if num_blocks.len() != format.groups().len() {
            return Err(LayoutError::Length {
                path: "num_blocks".into(),
                count: num_blocks.len() as u64,
                expected: format.groups().len() as u64,
            });
        }
        let mut out = Uniform {
            topology,
            tensors: Vec::new(),
            memory_bytes: Vec::new(),
        };
        let mut end = 0_u64;
        for ((g, group), blocks) in (0_u32..).zip(format.groups()).zip(num_blocks) {
            for layer in &group.layers {
                if !topology.layers.contains(layer.layer) {
                    continue;
                }
                for (t, tensor) in (0_u32..).zip(&layer.tensors) {
                    let path = || format.tensor_label(g, layer.layer, t);
                    let overflow = || LayoutError::Overflow { path: path() };
                    let mut placed = PlacedTensor {
                        group: g,
                        layer: layer.layer,
                        tensor: t,
                        memory: 0,
                        offset: 0,
                        block_stride: 0,
                        num_blocks: *blocks,
                        strides: Vec::new(),
                        shard: Shard::of(tensor, &topology, path)?,
                    };
                    placed.block_stride = dense(tensor, &mut placed).ok_or_else(overflow)?;
                    let bytes = placed
                        .block_stride
                        .checked_mul(u64::from(*blocks))
                        .ok_or_else(overflow)?;
                    match packing {
                        Packing::PerTensor => {
                            placed.memory =
                                u32::try_from(out.memory_bytes.len()).map_err(|_| overflow())?;
                            out.memory_bytes.push(bytes);
                        }
                        Packing::OneMemory => {
                            placed.offset =
                                end.checked_next_multiple_of(align).ok_or_else(overflow)?;
                            end = placed.offset.checked_add(bytes).ok_or_else(overflow)?;
                        }
                    }
                    out.tensors.push(placed);
                }
            }
        }
        if packing == Packing::OneMemory {
            out.memory_bytes.push(end);
        }
        // What is wrong with the topology or a count comes out here, before memory is spent on it.
        PlacementDesc::new(
            format,
            out.topology,
            out.tensors.clone(),
            Vec::new(),
            out.memory_bytes.clone(),
        )?;
        Ok(out)
    }
}

impl Uniform {
    /// The bytes that each memory must have.
    #[must_use]
    pub fn memory_bytes(&self) -> &[u64] {
        &self.memory_bytes
    }

    /// The tensors as they will lie.
    #[must_use]
    pub fn tensors(&self) -> &[PlacedTensor] {
        &self.tensors
    }

    /// The placement in these memories, which may be longer than asked for.
    ///
    /// # Errors
    ///
    /// As [`KvPlacement::new`].
    pub fn place(
        self,
        format: &KvFormat,
        memory: Vec<Arc<dyn Memory>>,
    ) -> Result<KvPlacement, LayoutError> {
        KvPlacement::new(format, self.topology, self.tensors, memory)
    }

    /// The placement without memory, as a peer would be told of it.
    ///
    /// # Errors
    ///
    /// As [`PlacementDesc::validate`].
    pub fn describe(self, format: &KvFormat) -> Result<PlacementDesc, LayoutError> {
        PlacementDesc::new(
            format,
            self.topology,
            self.tensors,
            Vec::new(),
            self.memory_bytes,
        )
    }
}

/// Sets dense strides, the last axis innermost, and says how many bytes a block takes.
fn dense(tensor: &TensorFormat, placed: &mut PlacedTensor) -> Option<u64> {
    let mut bytes = tensor.dtype.bytes();
    let mut strides = Vec::with_capacity(tensor.axes.len());
    for extent in placed.extents(tensor).into_iter().rev() {
        strides.push(bytes);
        bytes = bytes.checked_mul(extent)?;
    }
    strides.reverse();
    placed.strides = strides;
    Some(bytes)
}
