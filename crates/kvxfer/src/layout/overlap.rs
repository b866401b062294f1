//! Whether tensors share bytes.
//!
//! A tensor is a nest of strides, and whether two such sets meet is a hard question in general. Real
//! caches are tame: within a tensor each stride is at least as large as everything inside it, and
//! tensors that interleave do so with one block stride. So a tensor is cut into *strips* (its axes
//! outside the block axis unrolled), each a short pattern of runs repeated at the block stride;
//! strips whose spans meet are compared modulo that stride.

use super::{LayoutError, PlacedTensor, TensorFormat, limits};

/// The most pieces of one block that all tensors of a placement may have together.
pub(super) const TOTAL_PIECES: u64 = 1 << 22;

/// Strips over one place that are compared with each other; more are taken for an overlap.
const ACTIVE: usize = 256;

/// An extent and a stride in bytes.
type Level = (u64, u64);

/// A tensor's strides, sorted and checked to nest.
#[derive(Debug)]
pub(super) struct Nest {
    /// Contiguous bytes at the bottom of a block.
    run: u64,
    /// In-block axes above the run strides rising.
    axes: Vec<Level>,
    /// From the first byte of block 0 to behind the last of all blocks.
    span: u64,
}

impl Nest {
    pub(super) fn new(
        tensor: &TensorFormat,
        placed: &PlacedTensor,
        path: impl Fn() -> String,
    ) -> Result<Self, LayoutError> {
        let extents = placed.extents(tensor);
        let mut levels: Vec<(u64, u64, &'static str)> = tensor
            .axes
            .iter()
            .zip(extents)
            .zip(&placed.strides)
            .map(|((axis, extent), stride)| (*stride, extent, axis.kind.name()))
            .collect();
        levels.push((placed.block_stride, u64::from(placed.num_blocks), "block"));
        // A single step has no stride to speak of.
        levels.retain(|(_, extent, _)| *extent > 1);
        levels.sort_unstable();
        let overflow = || LayoutError::Overflow { path: path() };
        let mut span = tensor.dtype.bytes();
        let mut run = span;
        let mut axes = Vec::new();
        for (stride, extent, axis) in levels {
            if stride < span {
                return Err(LayoutError::Stride {
                    path: path(),
                    axis,
                    stride,
                    needed: span,
                });
            }
            span = stride
                .checked_mul(extent - 1)
                .and_then(|n| n.checked_add(span))
                .ok_or_else(overflow)?;
            if axis == "block" {
                continue;
            }
            if axes.is_empty() && stride == run {
                run = run.checked_mul(extent).ok_or_else(overflow)?;
            } else {
                axes.push((extent, stride));
            }
        }
        let nest = Self { run, axes, span };
        let pieces = nest.pieces();
        if pieces > limits::PIECES {
            return Err(LayoutError::TooFine {
                path: path(),
                pieces,
                max: limits::PIECES,
            });
        }
        Ok(nest)
    }

    /// Bytes from the first to behind the last, over all blocks.
    pub(super) const fn span(&self) -> u64 {
        self.span
    }

    /// Contiguous pieces of one block.
    pub(super) fn pieces(&self) -> u64 {
        self.axes.iter().fold(1, |n, a| n.saturating_mul(a.0))
    }
}

/// The offsets that these axes reach, rising.
fn offsets(axes: &[Level]) -> Vec<u64> {
    let mut out = vec![0_u64];
    // Outermost first, so that the offsets rise.
    for &(extent, stride) in axes.iter().rev() {
        out = out
            .into_iter()
            .flat_map(|base| (0..extent).map(move |i| base + i * stride))
            .collect();
    }
    out
}

/// Part of a tensor that repeats at its block stride.
struct Strip {
    memory: u32,
    start: u64,
    end: u64,
    tensor: usize,
}

/// A run of a strip's first block, within the period.
struct Run {
    phase: u64,
    phase_end: u64,
    /// Where it is in memory, and its length before it was cut at the period's end.
    start: u64,
    len: u64,
    tensor: usize,
}

/// Refuses tensors that overlap. `pools` is by group: tensors of two groups of one pool may share
/// bytes as long as block i meets only block i.
pub(super) fn check(
    tensors: &[PlacedTensor],
    nests: &[Nest],
    pools: &[u32],
    label: impl Fn(&PlacedTensor) -> String,
) -> Result<(), LayoutError> {
    let mut strips = Vec::with_capacity(tensors.len());
    for (t, (placed, nest)) in tensors.iter().zip(nests).enumerate() {
        let (inner, outer) = split(placed, nest);
        let inner_span = inner.iter().fold(nest.run, |n, (e, s)| n + (e - 1) * s);
        let blocks = u64::from(placed.num_blocks) - 1;
        for base in offsets(outer) {
            let start = placed.offset + base;
            strips.push(Strip {
                memory: placed.memory,
                start,
                end: start + blocks * repeat(placed) + inner_span,
                tensor: t,
            });
        }
    }
    strips.sort_unstable_by_key(|s| (s.memory, s.start));
    // Chains of strips whose spans meet.
    let mut rest = strips.as_slice();
    while let Some(first) = rest.first() {
        let mut end = first.end;
        let mut len = 1;
        while let Some(next) = rest.get(len)
            && next.memory == first.memory
            && next.start < end
        {
            end = end.max(next.end);
            len += 1;
        }
        let (chain, after) = rest.split_at(len);
        if chain.iter().any(|s| s.tensor != first.tensor) {
            check_chain(chain, tensors, nests, pools, &label)?;
        }
        rest = after;
    }
    Ok(())
}

/// How far a tensor's blocks are apart; a single block is nowhere else.
fn repeat(placed: &PlacedTensor) -> u64 {
    if placed.num_blocks > 1 {
        placed.block_stride
    } else {
        0
    }
}

/// The in-block axes within a block's stride, and those around it.
fn split<'a>(placed: &PlacedTensor, nest: &'a Nest) -> (&'a [Level], &'a [Level]) {
    let within = match repeat(placed) {
        0 => nest.axes.len(),
        stride => nest.axes.partition_point(|(_, s)| *s < stride),
    };
    nest.axes.split_at(within)
}

fn check_chain(
    chain: &[Strip],
    tensors: &[PlacedTensor],
    nests: &[Nest],
    pools: &[u32],
    label: &impl Fn(&PlacedTensor) -> String,
) -> Result<(), LayoutError> {
    let overlap = |a: usize, b: usize, offset: u64| {
        let (a, b) = (&tensors[a.min(b)], &tensors[a.max(b)]);
        if (a.offset, a.block_stride) == (b.offset, b.block_stride) {
            return LayoutError::Alias {
                first: label(a),
                second: label(b),
                memory: a.memory,
                offset: a.offset,
            };
        }
        LayoutError::Overlap {
            first: label(a),
            second: label(b),
            memory: a.memory,
            offset,
        }
    };
    let of = |s: &Strip| &tensors[s.tensor];
    // The period: the block stride of all that have more than one block.
    let mut repeating = chain.iter().filter(|s| repeat(of(s)) != 0);
    let period = match repeating.next() {
        None => u64::MAX,
        Some(first) => {
            let period = repeat(of(first));
            if let Some(other) = repeating.find(|s| repeat(of(s)) != period) {
                return Err(overlap(first.tensor, other.tensor, other.start));
            }
            period
        }
    };
    let mut runs = Vec::new();
    for strip in chain {
        let nest = &nests[strip.tensor];
        let (inner, _) = split(of(strip), nest);
        if nest.run > period {
            // Only a single block among repeating ones can be this long.
            let other = chain.iter().find(|s| s.tensor != strip.tensor);
            let other = other.map_or(strip.tensor, |s| s.tensor);
            return Err(overlap(strip.tensor, other, strip.start));
        }
        for offset in offsets(inner) {
            let start = strip.start + offset;
            let phase = start % period;
            let run = |phase: u64, phase_end: u64| Run {
                phase,
                phase_end,
                start,
                len: nest.run,
                tensor: strip.tensor,
            };
            let room = period - phase;
            if nest.run <= room {
                runs.push(run(phase, phase + nest.run));
            } else {
                runs.push(run(phase, period));
                runs.push(run(0, nest.run - room));
            }
        }
    }
    runs.sort_unstable_by_key(|r| r.phase);
    let mut active: Vec<&Run> = Vec::new();
    for run in &runs {
        active.retain(|a| a.phase_end > run.phase);
        for other in &active {
            if other.tensor == run.tensor {
                continue;
            }
            let (a, b) = (&tensors[other.tensor], &tensors[run.tensor]);
            let same_pool =
                a.group != b.group && pools.get(a.group as usize) == pools.get(b.group as usize);
            if active.len() > ACTIVE || rows_meet(other, a, run, b, period, same_pool) {
                return Err(overlap(
                    other.tensor,
                    run.tensor,
                    other.start.max(run.start),
                ));
            }
        }
        active.push(run);
    }
    Ok(())
}

/// Whether run `x` of some block of `a` meets run `y` of some block of `b`: of another block than
/// its own, where the two share a pool.
fn rows_meet(
    x: &Run,
    a: &PlacedTensor,
    y: &Run,
    b: &PlacedTensor,
    period: u64,
    same_pool: bool,
) -> bool {
    // Block i of a is at x + i*p, block j of b at y + j*p; with m = j - i they meet where
    // d - len(y) < m*p < d + len(x), d = x - y.
    let p = i128::from(period);
    let d = i128::from(x.start) - i128::from(y.start);
    let low = (d - i128::from(y.len)).div_euclid(p) + 1;
    let high = (d + i128::from(x.len) - 1).div_euclid(p);
    let low = low.max(1 - i128::from(a.num_blocks));
    let high = high.min(i128::from(b.num_blocks) - 1);
    (low..=high).any(|m| m != 0 || !same_pool)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{Axis, AxisKind, DType, TensorRole};

    fn tensor(tokens: u64, dim: u64) -> TensorFormat {
        TensorFormat {
            name: "k".into(),
            role: TensorRole::Key,
            dtype: DType::Uint8,
            axes: vec![
                Axis::new(AxisKind::Token, tokens),
                Axis::new(AxisKind::Dim, dim),
            ],
            sharded: None,
            scaling: None,
        }
    }

    fn placed(group: u32, offset: u64, block_stride: u64, blocks: u32, token: u64) -> PlacedTensor {
        PlacedTensor {
            group,
            layer: 0,
            tensor: 0,
            memory: 0,
            offset,
            block_stride,
            num_blocks: blocks,
            strides: vec![token, 1],
            shard: None,
        }
    }

    fn overlaps(a: &PlacedTensor, b: &PlacedTensor, pools: &[u32]) -> bool {
        let format = tensor(4, 8);
        let both = [a.clone(), b.clone()];
        let nests: Vec<Nest> = both
            .iter()
            .map(|p| Nest::new(&format, p, String::new).expect("strides nest"))
            .collect();
        check(&both, &nests, pools, |p| format!("at {}", p.offset)).is_err()
    }

    /// Every byte that a tensor of 4 tokens of 8 bytes takes, with its block.
    fn bytes(p: &PlacedTensor) -> Vec<(u64, u32)> {
        let mut out = Vec::new();
        for b in 0..p.num_blocks {
            for t in 0..4 {
                for d in 0..8 {
                    out.push((
                        p.offset + u64::from(b) * p.block_stride + t * p.strides[0] + d,
                        b,
                    ));
                }
            }
        }
        out
    }

    #[test]
    fn agrees_with_listing_every_byte() {
        let mut seen = [0; 2];
        for token in [8, 16, 24, 96, 128] {
            for stride in [32, 64, 96, 128] {
                for offset in 0..200 {
                    for blocks in [1, 3] {
                        for pools in [[0, 1], [0, 0]] {
                            let a = placed(0, 100, stride, blocks, token);
                            let b = placed(1, offset, stride, blocks, token);
                            if Nest::new(&tensor(4, 8), &a, String::new).is_err() {
                                continue;
                            }
                            let taken = bytes(&a);
                            let meets = bytes(&b).into_iter().any(|(at, block)| {
                                taken.iter().any(|(other_at, other)| {
                                    at == *other_at && (pools[0] != pools[1] || block != *other)
                                })
                            });
                            assert_eq!(
                                overlaps(&a, &b, &pools),
                                meets,
                                "{token} {stride} {offset} {blocks} {pools:?}"
                            );
                            seen[usize::from(meets)] += 1;
                        }
                    }
                }
            }
        }
        assert!(seen.iter().all(|n| *n > 100), "{seen:?}");
    }

    #[test]
    fn unequal_strides_that_interleave_are_refused() {
        let a = placed(0, 0, 64, 4, 8);
        let b = placed(1, 32, 96, 2, 8);
        assert!(overlaps(&a, &b, &[0, 1]));
        assert!(!overlaps(&a, &placed(1, 256, 96, 2, 8), &[0, 1]));
    }
}
