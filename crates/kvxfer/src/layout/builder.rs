//! From an engine's tensors to a format and a placement.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvxfer_verbs::Memory;

use super::engine_tensor::{Dim, EngineTensor, Reading, Start};
use super::{
    KvFormat, KvPlacement, LayoutError, PlacedTensor, PlacementDesc, Shard, TensorFormat, Topology,
};

/// Memory that an engine's tensors lie in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Span {
    /// The address of the first byte.
    pub addr: u64,
    /// How many bytes.
    pub len: u64,
}

impl Span {
    /// The span of a memory.
    #[must_use]
    pub fn of(memory: &dyn Memory) -> Self {
        Self {
            addr: memory.addr(),
            len: memory.len(),
        }
    }
}

/// Builds a format and a placement from an engine's tensors, which are the truth: what is given as
/// the format only says what must be there (from a model's config, say), in whatever order of axes.
///
/// Each tensor of the rank's layers is described once, with what each of its dimensions counts. The
/// result's format has the axes as the engine has them.
///
/// ```
/// # use kvxfer::ids::Rank;
/// # use kvxfer::layout::{models, AxisKind, DType, Dim, EngineTensor, LayoutBuilder, Span, Start, Topology};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let predicted = models::builtin("llama-3.1-8b", 16, DType::Bf16)?;
/// let blocks = 100;
/// // One tensor a layer, [2, blocks, tokens, heads, dim], 2 bytes an element.
/// let layer_bytes = 2 * blocks * 16 * 8 * 128 * 2;
/// let memory = Span { addr: 0x7f00_0000_0000, len: 32 * layer_bytes };
/// let mut builder = LayoutBuilder::new(&predicted, Topology::single(&predicted), vec![memory]);
/// for layer in 0..32 {
///     let tensor = EngineTensor {
///         start: Start::Address(memory.addr + u64::from(layer) * layer_bytes),
///         shape: vec![2, blocks, 16, 8, 128],
///         strides: vec![blocks as i64 * 16_384, 16_384, 1024, 128, 1],
///         element_bytes: 2,
///     };
///     for (name, which) in [("k", 0), ("v", 1)] {
///         let dims = [
///             Dim::At(which),
///             Dim::Block,
///             Dim::Axis(AxisKind::Token),
///             Dim::Axis(AxisKind::Head),
///             Dim::Axis(AxisKind::Dim),
///         ];
///         builder.tensor(0, layer, name, &tensor, &dims)?;
///     }
/// }
/// let (format, placement) = builder.describe()?;
/// assert_eq!(format.bytes_per_token(), 131_072);
/// assert_eq!(placement.num_blocks(0), Some(100));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct LayoutBuilder<'a> {
    predicted: &'a KvFormat,
    topology: Topology,
    spans: Vec<Span>,
    pools: Vec<u32>,
    placed: Vec<PlacedTensor>,
    /// By group, layer and tensor: the format with the engine's axes.
    formats: BTreeMap<(u32, u32, u32), TensorFormat>,
}

impl<'a> LayoutBuilder<'a> {
    /// A builder for one rank, whose tensors lie in these spans.
    #[must_use]
    pub fn new(predicted: &'a KvFormat, topology: Topology, spans: Vec<Span>) -> Self {
        Self {
            predicted,
            topology,
            spans,
            pools: Vec::new(),
            placed: Vec::new(),
            formats: BTreeMap::new(),
        }
    }

    /// Names for each group the pool that its block ids are drawn from; see
    /// [`PlacementDesc::new`]. Without it each group has its own.
    pub fn pools(&mut self, pools: Vec<u32>) -> &mut Self {
        self.pools = pools;
        self
    }

    /// Adds a tensor: `name` of this layer of this group. If it is sharded, the rank has the part
    /// that an even deal gives it.
    ///
    /// # Errors
    ///
    /// A tensor that the format does not have; a shape, strides and dimensions of unequal number; an
    /// element size that is not the dtype's; no block dimension, or two; an axis that the tensor
    /// does not have, that is missing, or whose extent is not the format's (this rank's part of it);
    /// a negative stride; an index behind its dimension; an address in none of the spans; heads that
    /// cannot be dealt evenly; numbers that overflow. What only shows against the other tensors
    /// comes out in [`LayoutBuilder::describe`].
    pub fn tensor(
        &mut self,
        group: u32,
        layer: u32,
        name: &str,
        engine: &EngineTensor,
        dims: &[Dim],
    ) -> Result<&mut Self, LayoutError> {
        let (index, format) = self.find(group, layer, name)?;
        let path = || self.predicted.tensor_label(group, layer, index);
        let shard = Shard::of(format, &self.topology, path)?;
        self.add((group, layer, index), format, engine, dims, shard)
    }

    /// As [`LayoutBuilder::tensor`], for a rank whose part of the sharded axis is another than an
    /// even deal would give it.
    ///
    /// # Errors
    ///
    /// As [`LayoutBuilder::tensor`]; and a shard outside its axis, or of a tensor that is not
    /// sharded.
    pub fn tensor_with_shard(
        &mut self,
        group: u32,
        layer: u32,
        name: &str,
        engine: &EngineTensor,
        dims: &[Dim],
        shard: Shard,
    ) -> Result<&mut Self, LayoutError> {
        let (index, format) = self.find(group, layer, name)?;
        shard.check(format, || self.predicted.tensor_label(group, layer, index))?;
        self.add((group, layer, index), format, engine, dims, Some(shard))
    }

    fn find(
        &self,
        group: u32,
        layer: u32,
        name: &str,
    ) -> Result<(u32, &'a TensorFormat), LayoutError> {
        let layers = self.predicted.group(group).and_then(|g| g.layer(layer));
        let tensors = layers.map_or(&[][..], |l| l.tensors.as_slice());
        (0_u32..)
            .zip(tensors)
            .find(|(_, t)| t.name == name)
            .ok_or_else(|| LayoutError::UnknownName {
                group,
                layer,
                name: name.to_owned(),
            })
    }

    fn add(
        &mut self,
        at: (u32, u32, u32),
        format: &TensorFormat,
        engine: &EngineTensor,
        dims: &[Dim],
        shard: Option<Shard>,
    ) -> Result<&mut Self, LayoutError> {
        let (group, layer, index) = at;
        let path = self.predicted.tensor_label(group, layer, index);
        let reading = Reading::new(&path, format, engine, dims, shard)?;
        let (memory, start) = self.locate(&path, engine.start)?;
        let offset = start
            .checked_add(reading.offset)
            .ok_or(LayoutError::Overflow { path })?;
        let sharded = format.sharded_axis().map(|a| a.kind);
        let sharded = reading.axes.iter().position(|a| Some(a.0.kind) == sharded);
        let with_axes = TensorFormat {
            axes: reading.axes.iter().map(|a| a.0).collect(),
            sharded: sharded.and_then(|i| u32::try_from(i).ok()),
            ..format.clone()
        };
        self.formats.insert(at, with_axes);
        self.placed.push(PlacedTensor {
            group,
            layer,
            tensor: index,
            memory,
            offset,
            block_stride: reading.block_stride,
            num_blocks: reading.num_blocks,
            strides: reading.axes.iter().map(|a| a.1).collect(),
            shard,
        });
        Ok(self)
    }

    fn locate(&self, path: &str, start: Start) -> Result<(u32, u64), LayoutError> {
        let addr = match start {
            // An index with no memory behind it comes out when the placement is checked.
            Start::Offset { memory, offset } => return Ok((memory, offset)),
            Start::Address(addr) => addr,
        };
        let inside = |s: &Span| addr.checked_sub(s.addr).is_some_and(|at| at < s.len);
        let found = (0_u32..).zip(&self.spans).find(|(_, s)| inside(s));
        let (memory, span) = found.ok_or_else(|| LayoutError::NoSpan {
            path: path.to_owned(),
            addr,
        })?;
        Ok((memory, addr - span.addr))
    }

    /// The format with the engine's axes, and where the tensors lie.
    ///
    /// Layers of other ranks keep the axes that were predicted.
    ///
    /// # Errors
    ///
    /// As [`PlacementDesc::validate`]: tensors that are missing or there twice, that end behind
    /// their memory, that overlap themselves or each other, numbers of blocks that differ.
    pub fn describe(self) -> Result<(KvFormat, PlacementDesc), LayoutError> {
        let format = self.format()?;
        let lengths = self.spans.iter().map(|s| s.len).collect();
        let desc = PlacementDesc::new(&format, self.topology, self.placed, self.pools, lengths)?;
        Ok((format, desc))
    }

    /// The same with the memory, which must be what the spans said, in their order.
    ///
    /// # Errors
    ///
    /// As [`LayoutBuilder::describe`]; and memory that is not where its span was.
    pub fn place(
        self,
        memory: Vec<Arc<dyn Memory>>,
    ) -> Result<(KvFormat, KvPlacement), LayoutError> {
        let moved = (0_u32..)
            .zip(&memory)
            .find(|(i, m)| self.spans.get(*i as usize) != Some(&Span::of(m.as_ref())));
        if let Some((memory, _)) = moved {
            return Err(LayoutError::MemoryMoved { memory });
        }
        if memory.len() != self.spans.len() {
            return Err(LayoutError::Length {
                path: "memory".into(),
                count: memory.len() as u64,
                expected: self.spans.len() as u64,
            });
        }
        let format = self.format()?;
        let placement =
            KvPlacement::with_pools(&format, self.topology, self.placed, self.pools, memory)?;
        Ok((format, placement))
    }

    fn format(&self) -> Result<KvFormat, LayoutError> {
        let mut groups = self.predicted.groups().to_vec();
        for (g, group) in (0_u32..).zip(&mut groups) {
            for layer in &mut group.layers {
                for (t, tensor) in (0_u32..).zip(&mut layer.tensors) {
                    if let Some(with_axes) = self.formats.get(&(g, layer.layer, t)) {
                        tensor.clone_from(with_axes);
                    }
                }
            }
        }
        KvFormat::new(self.predicted.model().clone(), groups)
    }
}
