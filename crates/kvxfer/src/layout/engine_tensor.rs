//! An engine's tensor, and what its dimensions count.

use super::{Axis, AxisKind, LayoutError, Shard, TensorFormat};

/// What one dimension of an engine's tensor counts.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Dim {
    /// Blocks (or slots, for state).
    Block,
    /// Kernel blocks, `per_block` neighbouring ones to a block: the block's tokens, outermost part.
    KernelBlock {
        /// Kernel blocks of a block.
        per_block: u32,
    },
    /// One axis of the block. A kind that is there twice is split, its first dimension the more
    /// significant one.
    Axis(AxisKind),
    /// Several axes in one dimension, the last one innermost, as in `[blocks, tokens, heads * dim]`.
    /// Of a kind that other dimensions count too, it counts what they leave. Two of them cannot
    /// share a kind.
    Fused(Vec<AxisKind>),
    /// This index of the dimension and no other: K of `[2, blocks, …]`, a layer of `[layers, …]`.
    At(u64),
}

/// Where an engine's tensor begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Start {
    /// At an address, in whichever memory that is.
    Address(u64),
    /// In a memory, so many bytes from its beginning.
    Offset {
        /// Index of the memory.
        memory: u32,
        /// Bytes from its first byte.
        offset: u64,
    },
}

/// A tensor as its engine has it: what `data_ptr`, `shape`, `stride` and `element_size` say in
/// PyTorch.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct EngineTensor {
    /// Where its element of index zero is.
    pub start: Start,
    /// The extent of each dimension.
    pub shape: Vec<u64>,
    /// Elements from one index of a dimension to the next.
    pub strides: Vec<i64>,
    /// Bytes of an element.
    pub element_bytes: u64,
}

/// An engine's tensor, read by what its dimensions count.
pub(super) struct Reading {
    /// The axes of a block with whole-model extents, and their strides in bytes.
    pub(super) axes: Vec<(Axis, u64)>,
    pub(super) num_blocks: u32,
    pub(super) block_stride: u64,
    /// Where the part that is meant begins, from where the tensor does.
    pub(super) offset: u64,
}

impl Reading {
    pub(super) fn new(
        path: &str,
        format: &TensorFormat,
        engine: &EngineTensor,
        dims: &[Dim],
        shard: Option<Shard>,
    ) -> Result<Self, LayoutError> {
        for (what, count) in [("strides", engine.strides.len()), ("dims", dims.len())] {
            if count != engine.shape.len() {
                return Err(LayoutError::Length {
                    path: format!("{path}: {what}"),
                    count: count as u64,
                    expected: engine.shape.len() as u64,
                });
            }
        }
        if engine.element_bytes != format.dtype.bytes() {
            return Err(LayoutError::ElementBytes {
                path: path.to_owned(),
                given: engine.element_bytes,
                dtype: format.dtype,
            });
        }
        let wanted = Wanted { format, shard };
        let overflow = || LayoutError::Overflow {
            path: path.to_owned(),
        };
        let mut blocks = None;
        let mut out = Self {
            axes: Vec::new(),
            num_blocks: 0,
            block_stride: 0,
            offset: 0,
        };
        // The most significant digit of the tokens, wherever its dimension stands.
        let mut kernel_blocks = None;
        for ((dim, &extent), &stride) in dims.iter().zip(&engine.shape).zip(&engine.strides) {
            let stride = step(path, dim, extent, stride)?
                .checked_mul(engine.element_bytes)
                .ok_or_else(overflow)?;
            match dim {
                Dim::Block => one_block_dim(path, &mut blocks, (extent, stride))?,
                Dim::KernelBlock { per_block } => {
                    let each = u64::from(*per_block);
                    if each == 0 || !extent.is_multiple_of(each) {
                        return Err(LayoutError::KernelBlocks {
                            path: path.to_owned(),
                            blocks: extent,
                            per_block: *per_block,
                        });
                    }
                    kernel_blocks = Some((Axis::new(AxisKind::Token, each), stride));
                    let whole = stride.checked_mul(each).ok_or_else(overflow)?;
                    one_block_dim(path, &mut blocks, (extent / each, whole))?;
                }
                Dim::Axis(kind) => out.axes.push((Axis::new(*kind, extent), stride)),
                Dim::Fused(kinds) => {
                    let mut stride = stride;
                    let mut parts = Vec::new();
                    for kind in kinds.iter().rev() {
                        let part = wanted.left(path, *kind, dims, &engine.shape)?;
                        parts.push((Axis::new(*kind, part), stride));
                        stride = stride.checked_mul(part).ok_or_else(overflow)?;
                    }
                    let product = parts
                        .iter()
                        .try_fold(1_u64, |n, (axis, _)| n.checked_mul(axis.extent));
                    if product != Some(extent) {
                        return Err(LayoutError::Extent {
                            path: path.to_owned(),
                            axis: kinds.first().map_or("block", |k| k.name()),
                            given: extent,
                            expected: product.unwrap_or(u64::MAX),
                        });
                    }
                    out.axes.extend(parts.into_iter().rev());
                }
                Dim::At(index) => {
                    if *index >= extent {
                        return Err(LayoutError::Index {
                            path: path.to_owned(),
                            index: *index,
                            extent,
                        });
                    }
                    let skipped = stride.checked_mul(*index).ok_or_else(overflow)?;
                    out.offset = out.offset.checked_add(skipped).ok_or_else(overflow)?;
                }
            }
        }
        let Some((num_blocks, block_stride)) = blocks else {
            return Err(LayoutError::MissingAxis {
                path: path.to_owned(),
                axis: "block",
            });
        };
        if let Some(part) = kernel_blocks {
            out.axes.insert(0, part);
        }
        out.num_blocks = u32::try_from(num_blocks).map_err(|_| LayoutError::TooMany {
            path: format!("{path}: blocks"),
            count: num_blocks,
            max: u64::from(u32::MAX),
        })?;
        out.block_stride = block_stride;
        out.complete(path, &wanted, engine.element_bytes)?;
        Ok(out)
    }

    /// Checks the axes against those wanted. An axis of one index may be there or not.
    fn complete(
        &mut self,
        path: &str,
        wanted: &Wanted<'_>,
        element: u64,
    ) -> Result<(), LayoutError> {
        self.axes
            .retain(|(a, _)| wanted.format.has(a.kind) || a.extent != 1);
        for kind in AxisKind::ALL {
            let here = self.axes.iter().filter(|(a, _)| a.kind == kind);
            let (count, given) = here.fold((0, 1_u64), |(count, n), (a, _)| {
                (count + 1, n.saturating_mul(a.extent))
            });
            if !wanted.format.has(kind) {
                if count > 0 {
                    return Err(LayoutError::UnknownAxis {
                        path: path.to_owned(),
                        axis: kind,
                    });
                }
                continue;
            }
            let expected = wanted.extent(kind);
            if count == 0 && expected == 1 {
                self.axes.push((Axis::new(kind, 1), element));
            } else if count == 0 {
                return Err(LayoutError::MissingAxis {
                    path: path.to_owned(),
                    axis: kind.name(),
                });
            } else if given != expected {
                return Err(LayoutError::Extent {
                    path: path.to_owned(),
                    axis: kind.name(),
                    given,
                    expected,
                });
            }
        }
        // The format says what the whole model has; the shard says which part is here.
        if let (Some(_), Some(whole)) = (wanted.shard, wanted.format.sharded_axis()) {
            // A part of one index says nothing where the axis is not split.
            let split = self.axes.iter().filter(|(a, _)| a.kind == whole.kind);
            if split.count() > 1 {
                return Err(LayoutError::SplitShard {
                    path: path.to_owned(),
                    axis: whole.kind,
                });
            }
            for (axis, _) in &mut self.axes {
                if axis.kind == whole.kind {
                    axis.extent = whole.extent;
                }
            }
        }
        Ok(())
    }
}

/// What the engine's tensor must have.
struct Wanted<'a> {
    format: &'a TensorFormat,
    shard: Option<Shard>,
}

impl Wanted<'_> {
    /// This rank's extent of a kind of axis.
    fn extent(&self, kind: AxisKind) -> u64 {
        let sharded = self.format.sharded_axis().is_some_and(|a| a.kind == kind);
        match self.shard {
            Some(shard) if sharded => shard.count,
            _ => self.format.extent_of(kind),
        }
    }

    /// What a [`Dim::Fused`] counts of a kind: this rank's extent, over what the dimensions that are
    /// not fused count of it.
    fn left(
        &self,
        path: &str,
        kind: AxisKind,
        dims: &[Dim],
        shape: &[u64],
    ) -> Result<u64, LayoutError> {
        let (mut given, mut fused) = (1_u64, 0);
        for (dim, &extent) in dims.iter().zip(shape) {
            match dim {
                Dim::Axis(k) if *k == kind => given = given.saturating_mul(extent),
                Dim::KernelBlock { per_block } if kind == AxisKind::Token => {
                    given = given.saturating_mul(u64::from(*per_block));
                }
                Dim::Fused(kinds) => fused += kinds.iter().filter(|k| **k == kind).count(),
                _ => {}
            }
        }
        let expected = self.extent(kind);
        let left = expected.checked_div(given).unwrap_or(0);
        if left == 0 || !expected.is_multiple_of(given) {
            return Err(LayoutError::Extent {
                path: path.to_owned(),
                axis: kind.name(),
                given,
                expected,
            });
        }
        if fused > 1 && left > 1 {
            return Err(LayoutError::FusedTwice {
                path: path.to_owned(),
                axis: kind,
            });
        }
        Ok(left)
    }
}

/// A stride that goes up. One that is never stepped along may be anything.
fn step(path: &str, dim: &Dim, extent: u64, stride: i64) -> Result<u64, LayoutError> {
    if extent <= 1 {
        return Ok(u64::try_from(stride).unwrap_or(0));
    }
    u64::try_from(stride).map_err(|_| LayoutError::NegativeStride {
        path: path.to_owned(),
        axis: match dim {
            Dim::Block | Dim::KernelBlock { .. } => "block",
            Dim::Axis(kind) => kind.name(),
            Dim::Fused(kinds) => kinds.first().map_or("block", |k| k.name()),
            Dim::At(_) => "an index",
        },
        stride,
    })
}

fn one_block_dim(
    path: &str,
    blocks: &mut Option<(u64, u64)>,
    dim: (u64, u64),
) -> Result<(), LayoutError> {
    if blocks.replace(dim).is_some() {
        return Err(LayoutError::Duplicate {
            path: path.to_owned(),
            value: "the block dimension".into(),
        });
    }
    Ok(())
}
