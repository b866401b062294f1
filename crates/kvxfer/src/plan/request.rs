//! From a request's block pairs to a plan.

use std::ops::ControlFlow;

use super::compile::{Class, Compiled, Group, Role};
use super::error::{PlanError, SideName};
use super::lazy::{OpSpan, Plan, PlanReport, Section, SpanPiece, pack, unpack};
use super::sort;
use super::units::UnitPairs;
use crate::blocks::{BlockPair, GroupPairs};
use crate::layout::Steps;

/// The most bytes of an operation, whatever a device says: 2 GiB − 64 KiB keeps lengths below the
/// sign bit and cuts at a 64 KiB boundary.
pub const MAX_CHUNK: u64 = (2 << 30) - (64 << 10);

/// The most local pieces of an operation, whatever a device says.
pub const MAX_PIECES: usize = 32;

/// Units in more pieces than this are not merged with their neighbours: one unit's operations
/// are worked out and repeated, so that a plan's cost stays with its blocks.
const MERGED_PIECES: usize = 8;

/// Which layers a plan is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerScope {
    /// All layers that the two ranks keep.
    All,
    /// One layer, by its model-wide index; in every group that has it.
    Layer(u32),
}

/// What a device can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PlanLimits {
    /// Bytes of a message; cut to [`MAX_CHUNK`].
    pub max_msg_bytes: u64,
    /// Local pieces of a message; cut to [`MAX_PIECES`].
    pub max_sge: u32,
}

impl Compiled {
    /// Plans the copying of these block pairs. Time and memory are in proportion to the pairs;
    /// empty lists are fine and make a plan of no operations.
    ///
    /// # Errors
    ///
    /// A block out of range, a destination listed twice (in a group, or in groups that share a
    /// pool), a group that is not there or listed twice, a group with pairs whose blocks are not of
    /// one size, a layer that these ranks do not keep or that none of the groups with pairs has,
    /// limits of zero, a request too large to count.
    pub fn plan(
        &self,
        groups: &[GroupPairs],
        scope: LayerScope,
        limits: PlanLimits,
    ) -> Result<Plan, PlanError> {
        for request in groups.iter().filter(|g| !g.pairs.is_empty()) {
            let units = self.group(request.group)?.units;
            let tokens = |per_block: u32| units.tokens.saturating_mul(per_block);
            if units.producer != units.consumer {
                return Err(PlanError::UnequalBlocks {
                    group: request.group,
                    producer_tokens: tokens(units.producer),
                    consumer_tokens: tokens(units.consumer),
                });
            }
        }
        let requests = groups.iter().map(|g| Request {
            group: g.group,
            pairs: &g.pairs,
            blocks: None,
        });
        self.plan_requests(&requests.collect::<Vec<_>>(), scope, limits)
    }

    /// Plans the copying of these units, as [`Compiled::plan`] does that of block pairs. Units that
    /// were listed for one pair of ranks serve for others of the same block sizes.
    ///
    /// # Errors
    ///
    /// As [`Compiled::plan`], and units that were listed for other block sizes.
    pub fn plan_units(
        &self,
        groups: &[UnitPairs],
        scope: LayerScope,
        limits: PlanLimits,
    ) -> Result<Plan, PlanError> {
        for request in groups {
            if self.group(request.group)?.units != request.units {
                let group = request.group;
                return Err(PlanError::OtherUnits { group });
            }
        }
        let requests = groups.iter().map(|g| Request {
            group: g.group,
            pairs: &g.pairs,
            blocks: Some(&g.blocks),
        });
        self.plan_requests(&requests.collect::<Vec<_>>(), scope, limits)
    }

    fn plan_requests(
        &self,
        groups: &[Request<'_>],
        scope: LayerScope,
        limits: PlanLimits,
    ) -> Result<Plan, PlanError> {
        if limits.max_msg_bytes == 0 || limits.max_sge == 0 {
            return Err(PlanError::Limits {
                max_msg_bytes: limits.max_msg_bytes,
                max_sge: limits.max_sge,
            });
        }
        let inner = &*self.inner;
        if let LayerScope::Layer(layer) = scope
            && !inner.window.contains(layer)
        {
            let window = inner.window;
            return Err(PlanError::LayerNotHere { layer, window });
        }
        let total: usize = groups.iter().map(|g| g.pairs.len()).sum();
        let too_large = || PlanError::TooLarge {
            pairs: total as u64,
            max_msg_bytes: limits.max_msg_bytes,
        };
        if u32::try_from(total).is_err() {
            return Err(too_large());
        }
        self.check(groups)?;

        let mut build = Builder::new(limits, total);
        let mut sections = Vec::new();
        let mut pairs = Vec::with_capacity(total);
        let mut report = PlanReport::default();
        let mut layer_found = false;
        for request in groups.iter().filter(|g| !g.pairs.is_empty()) {
            let first_pair = pairs.len();
            pairs.extend(request.pairs.iter().map(|p| match inner.role {
                Role::Pull => pack(p.src, p.dst),
                Role::Push => pack(p.dst, p.src),
            }));
            let own = &mut pairs[first_pair..];
            sort::by_remote(own);
            report.blocks += request.blocks.map_or(own.len(), <[u32]>::len) as u64;
            report.runs += runs(own);
            let group = &inner.groups[request.group as usize];
            if let LayerScope::Layer(layer) = scope {
                layer_found |= group.has(layer);
            }
            for (c, class) in inner.classes[group.classes.clone()].iter().enumerate() {
                let tensors = match scope {
                    LayerScope::All => class.tensors.clone(),
                    LayerScope::Layer(layer) => {
                        let all = &inner.tensors[class.tensors.clone()];
                        let first = all.partition_point(|t| t.layer < layer);
                        let end = all.partition_point(|t| t.layer <= layer);
                        class.tensors.start + first..class.tensors.start + end
                    }
                };
                if tensors.is_empty() {
                    continue;
                }
                let first_span = build.spans.len();
                let repeated = class.pieces.len() > MERGED_PIECES;
                if repeated {
                    build.one_unit(class);
                } else {
                    build.merged(class, own);
                }
                let spans = first_span..build.spans.len();
                let per_tensor = match repeated {
                    false => Some(spans.len() as u64),
                    true => (spans.len() as u64).checked_mul(own.len() as u64),
                };
                let tensors_len = tensors.len() as u64;
                let ops = per_tensor.and_then(|n| n.checked_mul(tensors_len));
                let bytes = class
                    .bytes
                    .checked_mul(own.len() as u64)
                    .and_then(|n| n.checked_mul(tensors_len))
                    .and_then(|n| n.checked_add(report.bytes));
                sections.push(Section {
                    first_op: report.operations,
                    per_tensor: per_tensor.ok_or_else(too_large)?,
                    group: request.group,
                    class: group.classes.start + c,
                    tensors,
                    spans,
                    pairs: first_pair..first_pair + own.len(),
                    repeated,
                });
                report.operations = ops
                    .and_then(|n| n.checked_add(report.operations))
                    .ok_or_else(too_large)?;
                report.bytes = bytes.ok_or_else(too_large)?;
            }
        }
        if let LayerScope::Layer(layer) = scope
            && total > 0
            && !layer_found
        {
            return Err(PlanError::LayerNotInGroups { layer });
        }
        Ok(Plan {
            inner: self.inner.clone(),
            sections,
            spans: build.spans,
            pieces: build.pieces,
            touched: build.touched,
            pairs,
            scope,
            report,
        })
    }

    /// Checks groups and block ids.
    fn check(&self, requests: &[Request<'_>]) -> Result<(), PlanError> {
        let mut ids = Vec::with_capacity(requests.len());
        for (i, request) in requests.iter().enumerate() {
            let group = self.group(request.group)?;
            if requests.iter().take(i).any(|r| r.group == request.group) {
                return Err(PlanError::GroupTwice {
                    group: request.group,
                });
            }
            ids.push((group.pool, request.in_range(group)?, request));
        }
        // By pool: a block of a shared pool can be the destination in one of its groups only.
        ids.sort_by_key(|(pool, ..)| *pool);
        for sharers in ids.chunk_by(|a, b| a.0 == b.0) {
            let twice = match sharers {
                // A list of units has been looked through already.
                [(.., one)] if one.blocks.is_some() => None,
                [(_, span, one)] => twice_within(*span, one.pairs.iter().map(|p| p.dst)),
                several => duplicate(several.iter().flat_map(|(.., r)| r.destinations())),
            };
            if let Some(block) = twice {
                let lists = |r: &Request<'_>| r.destinations().any(|b| b == block);
                let last = sharers.iter().rfind(|(.., r)| lists(r));
                let group = last.map_or(0, |(.., r)| r.group);
                return Err(PlanError::DuplicateDestination { group, block });
            }
        }
        Ok(())
    }

    pub(super) fn group(&self, group: u32) -> Result<&Group, PlanError> {
        let groups = &self.inner.groups;
        let found = usize::try_from(group).ok().and_then(|g| groups.get(g));
        found.ok_or_else(|| PlanError::UnknownGroup {
            group,
            groups: u32::try_from(groups.len()).unwrap_or(u32::MAX),
        })
    }
}

/// What is asked for of one group: pairs of units, and where a unit is not a block, the destination
/// blocks.
struct Request<'a> {
    group: u32,
    pairs: &'a [BlockPair],
    blocks: Option<&'a [u32]>,
}

impl Request<'_> {
    /// The destination blocks.
    fn destinations(&self) -> impl Iterator<Item = u32> + Clone {
        let listed = self.blocks.unwrap_or(&[]);
        let paired = match self.blocks {
            None => self.pairs,
            Some(_) => &[],
        };
        let listed = listed.iter().copied();
        listed.chain(paired.iter().map(|p| p.dst))
    }

    /// Refuses units that are not there; the destinations, as unit numbers, otherwise.
    fn in_range(&self, group: &Group) -> Result<Span, PlanError> {
        let mut src_max = 0;
        let mut dst = Span::default();
        for pair in self.pairs {
            src_max = src_max.max(pair.src);
            dst.take(pair.dst);
        }
        for (side, unit) in [
            (SideName::Producer, src_max),
            (SideName::Consumer, dst.high),
        ] {
            let (per_block, num_blocks) = group.side(side);
            // What a rank keeps nothing of has no range to be out of.
            if num_blocks > 0 && unit / per_block >= num_blocks && dst.count > 0 {
                return Err(PlanError::BlockOutOfRange {
                    side,
                    group: self.group,
                    block: unit / per_block,
                    num_blocks,
                });
            }
        }
        Ok(dst)
    }
}

/// How many ids there are, and the numbers that they span.
#[derive(Debug, Clone, Copy)]
struct Span {
    count: usize,
    low: u32,
    high: u32,
}

impl Default for Span {
    fn default() -> Self {
        Self {
            count: 0,
            low: u32::MAX,
            high: 0,
        }
    }
}

impl Span {
    #[inline]
    fn take(&mut self, id: u32) {
        self.count += 1;
        self.low = self.low.min(id);
        self.high = self.high.max(id);
    }
}

/// An id that is there twice.
pub(super) fn duplicate(ids: impl Iterator<Item = u32> + Clone) -> Option<u32> {
    let mut span = Span::default();
    ids.clone().for_each(|id| span.take(id));
    twice_within(span, ids)
}

/// The same, of ids whose span is known: a bitmap where they are dense enough for one to be cheap, a
/// sorted copy otherwise.
fn twice_within(span: Span, mut ids: impl Iterator<Item = u32>) -> Option<u32> {
    let Span { count, low, high } = span;
    if count < 2 {
        return None;
    }
    let words = (high.checked_sub(low)? / 64) as usize + 1;
    if words <= count.saturating_mul(4).saturating_add(64) {
        let mut seen = vec![0_u64; words];
        let twice = ids.try_for_each(|id| {
            let at = id - low;
            let word = &mut seen[(at / 64) as usize];
            let bit = 1_u64 << (at % 64);
            if *word & bit != 0 {
                return ControlFlow::Break(id);
            }
            *word |= bit;
            ControlFlow::Continue(())
        });
        return twice.break_value();
    }
    let mut sorted: Vec<u32> = ids.collect();
    sorted.sort_unstable();
    let twice = sorted.windows(2).find(|w| w[0] == w[1]);
    twice.map(|w| w[0])
}

/// Stretches of sorted pairs that are consecutive on both sides.
fn runs(pairs: &[u64]) -> u64 {
    // One block further on both sides is one more in both halves.
    let step = pack(1, 1);
    let breaks = pairs.windows(2).filter(|w| w[1].wrapping_sub(w[0]) != step);
    breaks.count() as u64 + u64::from(!pairs.is_empty())
}

/// Operations as they grow.
pub(super) struct Builder {
    pub(super) max_len: u32,
    max_pieces: u32,
    pub(super) spans: Vec<OpSpan>,
    pub(super) pieces: Vec<SpanPiece>,
    touched: Vec<(u32, u32)>,
}

impl Builder {
    pub(super) fn new(limits: PlanLimits, pairs: usize) -> Self {
        let max_len = limits.max_msg_bytes.min(MAX_CHUNK);
        Self {
            max_len: u32::try_from(max_len).expect("MAX_CHUNK is below 2^32"),
            max_pieces: limits.max_sge.min(MAX_PIECES as u32),
            spans: Vec::with_capacity(pairs),
            pieces: Vec::new(),
            touched: Vec::with_capacity(pairs),
        }
    }

    /// The operations of one unit, with offsets from where it begins.
    pub(super) fn one_unit(&mut self, class: &Class) {
        let mut open = Open::default();
        for piece in &class.pieces {
            self.add(&mut open, piece.remote, piece.local, piece.len, 0);
        }
        self.close(&open);
    }

    /// The operations of all pairs together, merged where the remote side goes on.
    fn merged(&mut self, class: &Class, pairs: &[u64]) {
        // A unit's last byte is inside its memory, so these fit.
        if let (Steps::Even(remote), Steps::Even(local)) = (class.remote, class.local) {
            let (remote, local) = (|id| u64::from(id) * remote, |id| u64::from(id) * local);
            self.merged_at(class, pairs, remote, local);
        } else {
            let (remote, local) = (class.remote, class.local);
            self.merged_at(class, pairs, |id| remote.at(id), |id| local.at(id));
        }
    }

    #[inline(always)]
    fn merged_at(
        &mut self,
        class: &Class,
        pairs: &[u64],
        remote_at: impl Fn(u32) -> u64,
        local_at: impl Fn(u32) -> u64,
    ) {
        let mut open = Open::default();
        for (i, pair) in (0_u32..).zip(pairs) {
            let (remote, local) = unpack(*pair);
            let (remote, local) = (remote_at(remote), local_at(local));
            for piece in &class.pieces {
                let (remote, local) = (remote + piece.remote, local + piece.local);
                self.add(&mut open, remote, local, piece.len, i);
            }
        }
        self.close(&open);
    }

    /// Adds a stretch that is contiguous on both sides, to the open operation where it can.
    // Inlined so that the open one stays in registers: this runs once for each block.
    #[inline(always)]
    fn add(&mut self, open: &mut Open, mut remote: u64, mut local: u64, mut len: u64, pair: u32) {
        loop {
            let room = self.max_len - open.span.len;
            let goes_on = local == open.local_end;
            let joins = open.span.len > 0
                && room > 0
                && remote == open.span.remote + u64::from(open.span.len)
                && (goes_on || open.span.count < self.max_pieces);
            let take = if joins {
                let take = capped(len, room);
                if open.span.count > 1 || !goes_on {
                    self.join_piece(open, goes_on, local, take);
                }
                open.span.len += take;
                open.last = pair;
                take
            } else {
                self.close(open);
                let take = capped(len, self.max_len);
                open.span = OpSpan {
                    remote,
                    local,
                    len: take,
                    count: 1,
                    pieces: 0,
                };
                (open.first, open.last) = (pair, pair);
                take
            };
            let taken = u64::from(take);
            open.local_end = local + taken;
            if taken == len {
                return;
            }
            remote += taken;
            local += taken;
            len -= taken;
        }
    }

    /// Adds to the pieces of an operation that has several, or is about to.
    #[inline(never)]
    fn join_piece(&mut self, open: &mut Open, goes_on: bool, local: u64, len: u32) {
        if goes_on {
            if let Some(last) = self.pieces.last_mut() {
                last.len += len;
            }
            return;
        }
        if open.span.count == 1 {
            open.span.pieces = self.pieces.len();
            self.pieces.push(SpanPiece {
                local: open.span.local,
                len: open.span.len,
            });
        }
        open.span.count += 1;
        self.pieces.push(SpanPiece { local, len });
    }

    #[inline]
    fn close(&mut self, open: &Open) {
        if open.span.len > 0 {
            self.spans.push(open.span);
            self.touched.push((open.first, open.last));
        }
    }
}

/// The operation that may still grow; there is none while its length is 0.
#[derive(Default)]
struct Open {
    span: OpSpan,
    /// Where its last piece ends on the local side.
    local_end: u64,
    /// The first and last pair it touches.
    first: u32,
    last: u32,
}

/// The smaller of the two.
fn capped(len: u64, room: u32) -> u32 {
    u32::try_from(len).map_or(room, |len| len.min(room))
}
