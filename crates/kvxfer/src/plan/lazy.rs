//! A request's plan: what its blocks cost, and operations by index.

use std::ops::Range;
use std::sync::Arc;

use super::compile::{Class, Inner, Role, TensorPair};
use super::request::{LayerScope, MAX_PIECES};
use super::source::{Op, OpList, OpSource, Piece};

/// The operations of a request, worked out as they are asked for. It holds one entry for each
/// merged run of block pairs, not for each operation.
#[derive(Debug)]
pub struct Plan {
    pub(super) inner: Arc<Inner>,
    pub(super) sections: Vec<Section>,
    pub(super) spans: Vec<OpSpan>,
    pub(super) pieces: Vec<SpanPiece>,
    /// For each span the first and last pair it touches, as indices into its section's pairs.
    pub(super) touched: Vec<(u32, u32)>,
    /// Remote unit in the high half, local unit in the low one; sorted by remote unit within a
    /// group.
    pub(super) pairs: Vec<u64>,
    pub(super) scope: LayerScope,
    pub(super) report: PlanReport,
}

/// What a plan comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PlanReport {
    /// Destination blocks that are written, in part or whole, over all groups.
    pub blocks: u64,
    /// Stretches of blocks, or of units where blocks are of unequal size, that are consecutive on both
    /// sides.
    pub runs: u64,
    /// Operations.
    pub operations: u64,
    /// Bytes.
    pub bytes: u64,
}

/// One geometry's operations: every span for the first tensor, then for the next one, and so on.
#[derive(Debug)]
pub(super) struct Section {
    /// The plan's index of its first operation.
    pub(super) first_op: u64,
    /// Operations of one tensor.
    pub(super) per_tensor: u64,
    pub(super) group: u32,
    pub(super) class: usize,
    /// In `Inner::tensors`.
    pub(super) tensors: Range<usize>,
    /// In `Plan::spans`.
    pub(super) spans: Range<usize>,
    /// In `Plan::pairs`.
    pub(super) pairs: Range<usize>,
    /// Whether the spans are those of one unit, to be repeated for each pair.
    pub(super) repeated: bool,
}

/// One operation, but for the tensor (and the unit, where spans are repeated): offsets count from
/// the tensor's first unit (or from the unit).
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct OpSpan {
    pub(super) remote: u64,
    /// The first piece's local offset.
    pub(super) local: u64,
    pub(super) len: u32,
    /// How many pieces there are; where it is one, it is (`local`, `len`).
    pub(super) count: u32,
    /// Otherwise where they begin in `Plan::pieces`.
    pub(super) pieces: usize,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct SpanPiece {
    pub(super) local: u64,
    pub(super) len: u32,
}

impl Plan {
    /// What the plan comes to.
    #[must_use]
    pub const fn report(&self) -> PlanReport {
        self.report
    }

    /// Which layers it moves.
    #[must_use]
    pub const fn scope(&self) -> LayerScope {
        self.scope
    }

    /// The groups of which something moves, each once, with the producer's and the consumer's unit of
    /// each pair. A unit is number `block * units of a block + place in the block`.
    pub fn units(&self) -> impl Iterator<Item = (u32, impl ExactSizeIterator<Item = (u32, u32)>)> {
        let role = self.inner.role;
        // A group's sections are neighbours, and have the same pairs.
        let groups = self.sections.chunk_by(|a, b| a.group == b.group);
        groups.filter_map(move |sections| {
            let section = sections.first()?;
            let pairs = self.pairs.get(section.pairs.clone())?.iter();
            let sides = move |pair: &u64| match (role, unpack(*pair)) {
                (Role::Pull, (remote, local)) => (remote, local),
                (Role::Push, (remote, local)) => (local, remote),
            };
            Some((section.group, pairs.map(sides)))
        })
    }

    /// How many entries the plan holds: what it costs, beside what it comes to.
    #[cfg(test)]
    pub(super) fn held_entries(&self) -> usize {
        self.sections.len() + self.spans.len() + self.pieces.len() + self.pairs.len()
    }

    fn class(&self, section: &Section) -> &Class {
        &self.inner.classes[section.class]
    }

    /// The section that holds operation `op`, which must be one of the plan's.
    fn section_at(&self, op: u64) -> usize {
        self.sections.partition_point(|s| s.first_op <= op) - 1
    }
}

impl Section {
    pub(super) fn ops(&self) -> u64 {
        self.per_tensor * self.tensors.len() as u64
    }
}

/// What takes operations. Those of one local piece are most of them, and have a way of their own.
pub(super) trait Sink {
    fn op(&mut self, op: &Op<'_>);
    fn one(&mut self, remote_region: u32, remote_offset: u64, local: Piece);
}

impl Sink for OpList {
    #[inline]
    fn op(&mut self, op: &Op<'_>) {
        self.push(op);
    }

    #[inline]
    fn one(&mut self, remote_region: u32, remote_offset: u64, local: Piece) {
        self.push_one(remote_region, remote_offset, local);
    }
}

/// A function that takes them.
pub(super) struct Each<'a>(pub(super) &'a mut dyn FnMut(&Op<'_>));

impl Sink for Each<'_> {
    fn op(&mut self, op: &Op<'_>) {
        (self.0)(op);
    }

    fn one(&mut self, remote_region: u32, remote_offset: u64, local: Piece) {
        (self.0)(&Op {
            remote_region,
            remote_offset,
            len: u64::from(local.len),
            local: &[local],
        });
    }
}

/// Operations at one place, into the sink.
pub(super) struct Emitter<'a, S> {
    pieces: &'a [SpanPiece],
    scratch: [Piece; MAX_PIECES],
    pub(super) sink: &'a mut S,
}

impl<'a, S: Sink> Emitter<'a, S> {
    pub(super) fn new(pieces: &'a [SpanPiece], sink: &'a mut S) -> Self {
        Self {
            pieces,
            scratch: [Piece::default(); MAX_PIECES],
            sink,
        }
    }

    #[inline]
    pub(super) fn spans(
        &mut self,
        spans: &[OpSpan],
        tensor: &TensorPair,
        remote_base: u64,
        local_base: u64,
    ) {
        for span in spans {
            let (remote_region, remote_offset) = (tensor.remote_region, remote_base + span.remote);
            if span.count == 1 {
                let local = Piece {
                    region: tensor.local_region,
                    len: span.len,
                    offset: local_base + span.local,
                };
                self.sink.one(remote_region, remote_offset, local);
                continue;
            }
            let used = self.fill(span, tensor.local_region, local_base);
            self.sink.op(&Op {
                remote_region,
                remote_offset,
                len: u64::from(span.len),
                local: &self.scratch[..used],
            });
        }
    }

    fn fill(&mut self, span: &OpSpan, region: u32, local_base: u64) -> usize {
        let pieces = &self.pieces[span.pieces..span.pieces + span.count as usize];
        for (out, piece) in self.scratch.iter_mut().zip(pieces) {
            *out = Piece {
                region,
                len: piece.len,
                offset: local_base + piece.local,
            };
        }
        pieces.len()
    }
}

/// An index that is known to be below a length in memory.
pub(super) fn index(n: u64) -> usize {
    usize::try_from(n).expect("below the length of a slice")
}

impl OpSource for Plan {
    fn ops(&self) -> u64 {
        self.report.operations
    }

    fn bytes(&self) -> u64 {
        self.report.bytes
    }

    fn emit(&self, range: Range<u64>, sink: &mut dyn FnMut(&Op<'_>)) {
        self.each(range, &mut Each(sink));
    }

    // Its own, so that the list's push is inlined: this is most of what an operation costs.
    fn list(&self, range: Range<u64>, list: &mut OpList) {
        self.each(range, list);
    }

    fn blocks_of(&self, op: u64, out: &mut Vec<(u32, u32)>) {
        if op >= self.report.operations {
            return;
        }
        let section = &self.sections[self.section_at(op)];
        let at = (op - section.first_op) % section.per_tensor;
        let (first, last) = if section.repeated {
            let pair = index(at / section.spans.len() as u64);
            (pair, pair)
        } else {
            let (first, last) = self.touched[section.spans.start + index(at)];
            (first as usize, last as usize)
        };
        let pairs = &self.pairs[section.pairs.clone()];
        let per_block = self.inner.groups[section.group as usize].units.consumer;
        let begins = out.len();
        for pair in &pairs[first..=last] {
            let (remote, local) = unpack(*pair);
            let unit = match self.inner.role {
                Role::Pull => local,
                Role::Push => remote,
            };
            out.push((section.group, unit / per_block));
        }
        if per_block > 1 {
            // Units of a block may be apart, where the remote side is the producer's.
            let mut blocks = out.split_off(begins);
            blocks.sort_unstable();
            blocks.dedup();
            out.append(&mut blocks);
        }
    }
}

impl Plan {
    /// Hands the operations of a range to the sink.
    fn each(&self, range: Range<u64>, sink: &mut impl Sink) {
        let end = range.end.min(self.report.operations);
        let mut at = range.start;
        if at >= end {
            return;
        }
        let mut out = Emitter::new(&self.pieces, sink);
        for section in &self.sections[self.section_at(at)..] {
            if at >= end {
                break;
            }
            let from = at - section.first_op;
            let to = section.ops().min(end - section.first_op);
            at = section.first_op + to;
            self.emit_section(section, from, to, &mut out);
        }
    }

    /// Operations `from..to` of a section, which are not none.
    fn emit_section<S: Sink>(
        &self,
        section: &Section,
        from: u64,
        to: u64,
        out: &mut Emitter<'_, S>,
    ) {
        let spans = &self.spans[section.spans.clone()];
        let pairs = &self.pairs[section.pairs.clone()];
        let tensors = &self.inner.tensors[section.tensors.clone()];
        let class = self.class(section);
        // The only divisions are here, once for a call.
        let mut left = to - from;
        let first = index(from / section.per_tensor);
        let mut skip = from % section.per_tensor;
        for tensor in &tensors[first..] {
            let take = left.min(section.per_tensor - skip);
            if section.repeated {
                let each = spans.len() as u64;
                let mut span = index(skip % each);
                let mut take = take;
                for pair in &pairs[index(skip / each)..] {
                    if take == 0 {
                        break;
                    }
                    let end = index((span as u64).saturating_add(take).min(each));
                    let (remote, local) = unpack(*pair);
                    out.spans(
                        &spans[span..end],
                        tensor,
                        tensor.remote_base + class.remote.at(remote),
                        tensor.local_base + class.local.at(local),
                    );
                    take -= (end - span) as u64;
                    span = 0;
                }
            } else {
                let spans = &spans[index(skip)..index(skip + take)];
                out.spans(spans, tensor, tensor.remote_base, tensor.local_base);
            }
            left -= take;
            skip = 0;
            if left == 0 {
                break;
            }
        }
    }
}

/// A pair in one number that sorts by remote unit, then by local unit.
pub(super) fn pack(remote: u32, local: u32) -> u64 {
    u64::from(remote) << 32 | u64::from(local)
}

/// Remote unit, local unit.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the halves are what is wanted"
)]
pub(super) const fn unpack(pair: u64) -> (u32, u32) {
    ((pair >> 32) as u32, pair as u32)
}
