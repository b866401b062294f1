//! How one block of a tensor lies on both sides.

use crate::layout::{AxisKind, PlacedTensor, TensorFormat, common_split};

/// Part of a block that is contiguous on both sides; offsets from where the block begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BlockPiece {
    pub(super) remote: u64,
    pub(super) local: u64,
    pub(super) len: u64,
}

/// The common form of a tensor pair's strides; pairs with equal shapes have equal pieces.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) remote_stride: u64,
    pub(super) local_stride: u64,
    /// Bytes contiguous on both sides.
    run: u64,
    /// What is left as (remote stride, local stride, extent), remote strides rising.
    loops: Vec<(u64, u64, u64)>,
}

impl Shape {
    /// The shape of a tensor that both sides have, in equal parts. `None` where their axes have no
    /// common split, which a comparison of the layouts has reported already.
    pub(super) fn new(
        remote: (&TensorFormat, &PlacedTensor),
        local: (&TensorFormat, &PlacedTensor),
    ) -> Option<Self> {
        let axes = remote.0.axes.iter().chain(&local.0.axes);
        let mut kinds: Vec<AxisKind> = axes.map(|a| a.kind).collect();
        kinds.sort_unstable();
        kinds.dedup();
        let mut loops = Vec::new();
        for kind in kinds {
            let common = common_split(&parts(remote, kind), &parts(local, kind))?;
            loops.extend(common.into_iter().map(|c| (c.a, c.b, c.extent)));
        }
        loops.sort_unstable();
        let mut run = remote.0.dtype.bytes();
        let mut folded = 0;
        for &(remote, local, extent) in &loops {
            if remote != run || local != run {
                break;
            }
            run = run.checked_mul(extent)?;
            folded += 1;
        }
        loops.drain(..folded);
        Some(Self {
            remote_stride: remote.1.block_stride,
            local_stride: local.1.block_stride,
            run,
            loops,
        })
    }

    /// How many pieces a block is in.
    pub(super) fn pieces_len(&self) -> u64 {
        self.loops.iter().fold(1, |n, l| n.saturating_mul(l.2))
    }

    /// Bytes of a block.
    pub(super) fn bytes(&self) -> u64 {
        self.pieces_len().saturating_mul(self.run)
    }

    /// The pieces, by rising remote offset: the loops nest, so the largest stride is outermost.
    pub(super) fn pieces(&self) -> Vec<BlockPiece> {
        let mut out = vec![BlockPiece {
            remote: 0,
            local: 0,
            len: self.run,
        }];
        for &(remote, local, extent) in self.loops.iter().rev() {
            out = out
                .into_iter()
                .flat_map(|p| {
                    (0..extent).map(move |i| BlockPiece {
                        remote: p.remote + i * remote,
                        local: p.local + i * local,
                        len: p.len,
                    })
                })
                .collect();
        }
        out
    }
}

/// A side's axes of one kind as (extent, stride), the most significant first.
fn parts((format, placed): (&TensorFormat, &PlacedTensor), of: AxisKind) -> Vec<(u64, u64)> {
    let axes = format.axes.iter().zip(placed.extents(format));
    axes.zip(&placed.strides)
        .filter(|((axis, _), _)| axis.kind == of)
        .map(|((_, extent), stride)| (extent, *stride))
        .collect()
}
