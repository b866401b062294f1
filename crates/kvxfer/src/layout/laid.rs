//! One side's part of a tensor, cut down to what two ranks both keep and to the tokens that both
//! sides' blocks are made of.

use super::digits::{Digit, joined, select, split_off};
use super::planes::Plane;
use super::{AxisKind, PlacedTensor, Shard};

/// How many units a block of a group is on both sides. A *unit* is the tokens that blocks of both
/// sides are multiples of; a block, where they are of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Units {
    /// Tokens of a unit; 0 for state slots.
    pub(crate) tokens: u32,
    /// Units of a block at the producer.
    pub(crate) producer: u32,
    /// Units of a block at the consumer.
    pub(crate) consumer: u32,
}

impl Units {
    /// The units of blocks of these sizes. State slots (0) match state slots only.
    pub(crate) const fn of(producer: u32, consumer: u32) -> Option<Self> {
        if producer == consumer {
            return Some(Self {
                tokens: producer,
                producer: 1,
                consumer: 1,
            });
        }
        if producer == 0 || consumer == 0 {
            return None;
        }
        let (mut a, mut b) = (producer, consumer);
        while b != 0 {
            (a, b) = (b, a % b);
        }
        Some(Self {
            tokens: a,
            producer: producer / a,
            consumer: consumer / a,
        })
    }
}

/// Where the units of a tensor begin, in bytes from its first one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Steps {
    /// Each behind the one before it.
    Even(u64),
    /// As many in each block.
    Blocks {
        /// Bytes from a block to the next.
        block: u64,
        /// Bytes from a unit to the next of its block.
        unit: u64,
        /// Units of a block, more than one.
        per_block: u32,
    },
}

impl Steps {
    /// Where unit `id` begins.
    #[inline]
    pub(crate) fn at(self, id: u32) -> u64 {
        match self {
            Self::Even(step) => u64::from(id) * step,
            Self::Blocks {
                block,
                unit,
                per_block,
            } => u64::from(id / per_block) * block + u64::from(id % per_block) * unit,
        }
    }
}

/// One side's part of a tensor.
#[derive(Debug, Clone)]
pub(crate) struct Laid {
    /// Where unit 0 begins, in bytes from the memory's first byte.
    pub(crate) base: u64,
    /// Where the others do.
    pub(crate) steps: Steps,
    /// The axes of one unit: each kind once, with its digits.
    pub(crate) axes: Vec<(AxisKind, Vec<Digit>)>,
}

impl Laid {
    /// The digits of one kind; none where there is no such axis.
    pub(crate) fn digits(&self, kind: AxisKind) -> &[Digit] {
        let of_kind = self.axes.iter().find(|a| a.0 == kind);
        of_kind.map_or(&[], |a| &a.1)
    }
}

/// A plane of a tensor, and where a rank keeps it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Half<'a> {
    /// What it holds.
    pub(crate) plane: Plane<'a>,
    /// Where it is.
    pub(crate) placed: &'a PlacedTensor,
}

impl Half<'_> {
    /// The kind of axis that is dealt out, and this rank's part of it.
    pub(crate) fn shard(&self) -> Option<(AxisKind, Shard)> {
        let kind = self.plane.format.sharded_axis()?.kind;
        Some((kind, self.placed.shard_of(self.plane.format)?))
    }

    /// Cuts it: `ranges` in whole-model indices, each within this rank's part; blocks into
    /// `per_block` units. `None` where strides and digits do not allow it.
    fn lay(&self, ranges: &[(AxisKind, Shard)], per_block: u32) -> Option<Laid> {
        let format = self.plane.format;
        let mut kinds: Vec<AxisKind> = format.axes.iter().map(|a| a.kind).collect();
        kinds.sort_unstable();
        kinds.dedup();
        let own = self.shard();
        let extents = self.placed.extents(format);
        let mut out = Laid {
            base: self.placed.offset,
            steps: Steps::Even(self.placed.block_stride),
            axes: Vec::with_capacity(kinds.len()),
        };
        for kind in kinds {
            let axes = format.axes.iter().zip(&extents).zip(&self.placed.strides);
            let mut digits: Vec<Digit> = axes
                .filter(|((axis, _), _)| axis.kind == kind)
                .map(|((_, extent), stride)| (*extent, *stride))
                .collect();
            let range = match (kind, self.plane.kv) {
                (AxisKind::Kv, Some(first)) => Some(Shard { first, count: 1 }),
                _ => ranges.iter().find(|r| r.0 == kind).map(|r| r.1),
            };
            if let Some(range) = range {
                let from = own.filter(|own| own.0 == kind).map_or(0, |o| o.1.first);
                let (offset, rest) = select(&digits, range.first.checked_sub(from)?, range.count)?;
                out.base = out.base.checked_add(offset)?;
                digits = rest;
            }
            if kind == AxisKind::Token && per_block > 1 {
                let tokens = digits.iter().try_fold(1_u64, |n, d| n.checked_mul(d.0))?;
                if !tokens.is_multiple_of(u64::from(per_block)) {
                    return None;
                }
                let (outer, inner) = split_off(&digits, tokens / u64::from(per_block))?;
                let (_, unit) = joined(&outer)?;
                let block = self.placed.block_stride;
                out.steps = match unit.checked_mul(u64::from(per_block))? == block {
                    true => Steps::Even(unit),
                    false => Steps::Blocks {
                        block,
                        unit,
                        per_block,
                    },
                };
                digits = inner;
            }
            out.axes.push((kind, digits));
        }
        // What a block has one of cannot be dealt to its units.
        (format.has(AxisKind::Token) || per_block == 1).then_some(out)
    }
}

/// What two ranks both keep of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Overlap {
    /// Along which axes, and what; of the producer's sharded axis first.
    ranges: [Option<(AxisKind, Shard)>; 2],
}

impl Overlap {
    /// What two ranks both keep; `None`: nothing.
    pub(crate) fn of(producer: &Half<'_>, consumer: &Half<'_>) -> Option<Self> {
        let ranges = match (producer.shard(), consumer.shard()) {
            (Some((kind, p)), Some((other, c))) if kind == other => {
                [Some((kind, p.meet(c)?)), None]
            }
            (p, c) => [p, c],
        };
        Some(Self { ranges })
    }

    /// What both keep along one kind of axis; `None`: all of it.
    pub(crate) fn along(&self, kind: AxisKind) -> Option<Shard> {
        let mut ranges = self.ranges.iter().flatten();
        ranges.find(|r| r.0 == kind).map(|r| r.1)
    }

    /// Both sides' parts of it, in units; `None` where one side's strides and digits do not allow
    /// it, or where the two have no common split.
    pub(crate) fn lay(
        &self,
        producer: &Half<'_>,
        consumer: &Half<'_>,
        units: Units,
    ) -> Option<(Laid, Laid)> {
        let ranges: Vec<(AxisKind, Shard)> = self.ranges.iter().flatten().copied().collect();
        let p = producer.lay(&ranges, units.producer)?;
        let c = consumer.lay(&ranges, units.consumer)?;
        Some((p, c))
    }
}
