//! One case: two sides, what to copy, and which byte must come from where.

use std::collections::{BTreeMap, BTreeSet};

use crate::formats::{Formats, formats, placement};
use crate::tape::Tape;
use kvxfer::blocks::{BlockPair, GroupPairs};
use kvxfer::layout::{AxisKind, PlacedTensor, PlacementDesc, Side, TensorFormat};
use kvxfer::plan::{Compiled, Part, PlanLimits, Role};

/// Pairs in stretches and alone; no destination twice.
pub(crate) fn pairs(tape: &mut Tape, src_blocks: u32, dst_blocks: u32) -> Vec<BlockPair> {
    let mut free: BTreeSet<u32> = (0..dst_blocks).collect();
    let mut out = Vec::new();
    for _ in 0..tape.below(6) {
        let first = tape.below(u64::from(src_blocks)) as u32;
        let mut dst = tape.below(u64::from(dst_blocks)) as u32;
        let scatter = tape.chance(3);
        for src in first..=first + tape.below(6) as u32 {
            if src >= src_blocks || !free.remove(&dst) {
                break;
            }
            out.push(BlockPair { src, dst });
            dst = if scatter {
                tape.below(u64::from(dst_blocks)) as u32
            } else {
                dst + 1
            };
        }
    }
    tape.shuffle(&mut out);
    out
}

/// A byte: which memory, and where in it.
pub(crate) type At = (usize, u64);

/// One case: two sides and what to copy.
pub(crate) struct Case {
    pub(crate) formats: Formats,
    pub(crate) producer: PlacementDesc,
    pub(crate) consumer: PlacementDesc,
    pub(crate) pairs: Vec<GroupPairs>,
    pub(crate) role: Role,
    pub(crate) limits: PlanLimits,
}

impl Case {
    pub(crate) fn new(tape: &mut Tape) -> Self {
        let formats = formats(tape);
        let groups = formats.producer.groups().len();
        let blocks = |tape: &mut Tape| -> Vec<u32> {
            (0..groups).map(|_| 1 + tape.below(12) as u32).collect()
        };
        let (src_blocks, dst_blocks) = (blocks(tape), blocks(tape));
        let producer = placement(tape, &formats.producer, &formats, &src_blocks);
        let consumer = placement(tape, &formats.consumer, &formats, &dst_blocks);
        let mut requests: Vec<GroupPairs> = (0_u32..)
            .zip(src_blocks.iter().zip(&dst_blocks))
            .map(|(group, (src, dst))| GroupPairs {
                group,
                pairs: pairs(tape, *src, *dst),
            })
            .collect();
        tape.shuffle(&mut requests);
        let max_msg_bytes = match tape.below(3) {
            0 => u64::MAX,
            1 => 1 + tape.below(40),
            _ => 1 + tape.below(2000),
        };
        Self {
            formats,
            producer,
            consumer,
            pairs: requests,
            role: tape.pick(&[Role::Pull, Role::Push]),
            limits: PlanLimits {
                max_msg_bytes,
                max_sge: 1 + tape.below(5) as u32,
            },
        }
    }

    pub(crate) fn compile(&self) -> Compiled {
        let producer = Side {
            format: &self.formats.producer,
            placement: &self.producer,
        };
        let consumer = Side {
            format: &self.formats.consumer,
            placement: &self.consumer,
        };
        Compiled::compile(&producer, &consumer, self.role, Part::Common).expect("the sides match")
    }

    pub(crate) fn memory_len(&self, side: &PlacementDesc) -> Vec<usize> {
        side.memory_len().iter().map(|n| *n as usize).collect()
    }

    /// For every destination byte that must be written: which source byte, and whose block it is.
    /// Element by element, by what the indices mean.
    pub(crate) fn expected(&self) -> BTreeMap<At, (At, (u32, u32))> {
        let mut out = BTreeMap::new();
        for p in self.producer.tensors() {
            let pf = self.formats.producer.tensor(p.group, p.layer, p.tensor);
            let pf = pf.expect("in the format");
            let (c, cf) = self
                .consumer
                .tensors()
                .iter()
                .filter(|c| (c.group, c.layer) == (p.group, p.layer))
                .map(|c| {
                    let cf = self.formats.consumer.tensor(c.group, c.layer, c.tensor);
                    (c, cf.expect("in the format"))
                })
                .find(|(_, cf)| cf.name == pf.name)
                .expect("on both sides");
            let (from, to) = (elements(pf, p), elements(cf, c));
            assert_eq!(from.len(), to.len());
            let request = self.pairs.iter().find(|r| r.group == p.group);
            for pair in &request.expect("every group is asked for").pairs {
                for (meaning, src) in &from {
                    for byte in 0..pf.dtype.bytes() {
                        let src = p.offset + u64::from(pair.src) * p.block_stride + src + byte;
                        let dst =
                            c.offset + u64::from(pair.dst) * c.block_stride + to[meaning] + byte;
                        let previous = out.insert(
                            (c.memory as usize, dst),
                            ((p.memory as usize, src), (c.group, pair.dst)),
                        );
                        assert_eq!(previous, None, "two tensors on one byte");
                    }
                }
            }
        }
        out
    }
}

/// Where each element of a block is, by what its indices mean.
pub(crate) fn elements(
    format: &TensorFormat,
    placed: &PlacedTensor,
) -> BTreeMap<Vec<(AxisKind, u64)>, u64> {
    let mut out = BTreeMap::from([(Vec::new(), 0)]);
    // Parts of one index together, in their order: the sort is stable.
    let mut axes: Vec<_> = format
        .axes
        .iter()
        .zip(placed.extents(format))
        .zip(&placed.strides)
        .map(|((axis, extent), stride)| (axis.kind, extent, *stride))
        .collect();
    axes.sort_by_key(|axis| axis.0);
    for (kind, extent, stride) in axes {
        let mut next = BTreeMap::new();
        for (meaning, at) in &out {
            for i in 0..extent {
                let mut meaning: Vec<(AxisKind, u64)> = meaning.clone();
                match meaning.last_mut() {
                    Some((last, outer)) if *last == kind => *outer = *outer * extent + i,
                    _ => meaning.push((kind, i)),
                }
                next.insert(meaning, at + i * stride);
            }
        }
        out = next;
    }
    out
}
