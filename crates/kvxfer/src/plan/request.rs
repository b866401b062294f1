//! From a request's block pairs to a plan.

use super::compile::{Class, Compiled, Group, Role};
use super::error::{PlanError, SideName};
use super::lazy::{Plan, PlanReport, Section, Unit, UnitPiece, pack, unpack};
use super::sort;
use crate::blocks::GroupPairs;

/// The most bytes of an operation, whatever a device says: 2 GiB − 64 KiB keeps lengths below the
/// sign bit and cuts at a 64 KiB boundary.
pub const MAX_CHUNK: u64 = (2 << 30) - (64 << 10);

/// The most local pieces of an operation, whatever a device says.
pub const MAX_PIECES: usize = 32;

/// Blocks in more pieces than this are not merged with their neighbours: one block's operations
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
    /// pool), a group that is not there or listed twice, a layer that these ranks do not keep or
    /// that none of the groups with pairs has, limits of zero, a request too large to count.
    pub fn plan(
        &self,
        groups: &[GroupPairs],
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
            report.blocks += own.len() as u64;
            report.runs += runs(own);
            let group = &inner.groups[request.group as usize];
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
                layer_found = true;
                let first_unit = build.units.len();
                let repeated = class.pieces.len() > MERGED_PIECES;
                if repeated {
                    build.one_block(class);
                } else {
                    build.merged(class, own);
                }
                let units = first_unit..build.units.len();
                let per_tensor = match repeated {
                    false => Some(units.len() as u64),
                    true => (units.len() as u64).checked_mul(own.len() as u64),
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
                    units,
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
            units: build.units,
            pieces: build.pieces,
            touched: build.touched,
            pairs,
            report,
        })
    }

    /// Checks groups and block ids.
    fn check(&self, requests: &[GroupPairs]) -> Result<(), PlanError> {
        let mut spans = Vec::with_capacity(requests.len());
        for (i, request) in requests.iter().enumerate() {
            let group = self.group(request.group)?;
            if requests.iter().take(i).any(|r| r.group == request.group) {
                return Err(PlanError::GroupTwice {
                    group: request.group,
                });
            }
            let span = Span::of(request);
            // A group that these ranks keep nothing of has no range to be out of.
            if !group.classes.is_empty() {
                span.in_range(request, group)?;
            }
            spans.push((group.pool, span, request));
        }
        // By pool: a block of a shared pool can be the destination in one of its groups only.
        spans.sort_by_key(|(pool, ..)| *pool);
        for sharers in spans.chunk_by(|a, b| a.0 == b.0) {
            if let Some(block) = first_duplicate(sharers) {
                let lists = |r: &GroupPairs| r.pairs.iter().any(|p| p.dst == block);
                let last = sharers.iter().rfind(|(.., r)| lists(r));
                let group = last.map_or(0, |(.., r)| r.group);
                return Err(PlanError::DuplicateDestination { group, block });
            }
        }
        Ok(())
    }

    fn group(&self, group: u32) -> Result<&Group, PlanError> {
        let groups = &self.inner.groups;
        let found = usize::try_from(group).ok().and_then(|g| groups.get(g));
        found.ok_or_else(|| PlanError::UnknownGroup {
            group,
            groups: u32::try_from(groups.len()).unwrap_or(u32::MAX),
        })
    }
}

/// The ids that a list of pairs spans.
struct Span {
    src_max: u32,
    dst_min: u32,
    dst_max: u32,
}

impl Span {
    fn of(request: &GroupPairs) -> Self {
        let mut span = Self {
            src_max: 0,
            dst_min: u32::MAX,
            dst_max: 0,
        };
        for pair in &request.pairs {
            span.src_max = span.src_max.max(pair.src);
            span.dst_min = span.dst_min.min(pair.dst);
            span.dst_max = span.dst_max.max(pair.dst);
        }
        span
    }

    fn in_range(&self, request: &GroupPairs, group: &Group) -> Result<(), PlanError> {
        let sides = [
            (SideName::Producer, self.src_max, group.producer_blocks),
            (SideName::Consumer, self.dst_max, group.consumer_blocks),
        ];
        for (side, block, num_blocks) in sides {
            if block >= num_blocks && !request.pairs.is_empty() {
                return Err(PlanError::BlockOutOfRange {
                    side,
                    group: request.group,
                    block,
                    num_blocks,
                });
            }
        }
        Ok(())
    }
}

/// A destination that is there twice: a bitmap where the ids are dense enough for one to be cheap,
/// a sorted copy otherwise.
fn first_duplicate(requests: &[(u32, Span, &GroupPairs)]) -> Option<u32> {
    let count: usize = requests.iter().map(|(.., r)| r.pairs.len()).sum();
    let low = requests.iter().map(|(_, span, _)| span.dst_min).min()?;
    let high = requests.iter().map(|(_, span, _)| span.dst_max).max()?;
    if count < 2 {
        return None;
    }
    let words = (high.checked_sub(low)? / 64) as usize + 1;
    if words <= count.saturating_mul(4).saturating_add(64) {
        let mut seen = vec![0_u64; words];
        for (.., request) in requests {
            for pair in &request.pairs {
                let at = pair.dst - low;
                let word = &mut seen[(at / 64) as usize];
                let bit = 1_u64 << (at % 64);
                if *word & bit != 0 {
                    return Some(pair.dst);
                }
                *word |= bit;
            }
        }
        return None;
    }
    let all = requests.iter().flat_map(|(.., r)| &r.pairs);
    let mut sorted: Vec<u32> = all.map(|p| p.dst).collect();
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

/// Units as they grow.
struct Builder {
    max_len: u32,
    max_pieces: u32,
    units: Vec<Unit>,
    pieces: Vec<UnitPiece>,
    touched: Vec<(u32, u32)>,
}

impl Builder {
    fn new(limits: PlanLimits, pairs: usize) -> Self {
        let max_len = limits.max_msg_bytes.min(MAX_CHUNK);
        Self {
            max_len: u32::try_from(max_len).expect("MAX_CHUNK is below 2^32"),
            max_pieces: limits.max_sge.min(MAX_PIECES as u32),
            units: Vec::with_capacity(pairs),
            pieces: Vec::new(),
            touched: Vec::with_capacity(pairs),
        }
    }

    /// The units of one block, with offsets from where it begins.
    fn one_block(&mut self, class: &Class) {
        let mut open = Open::default();
        for piece in &class.pieces {
            self.add(&mut open, piece.remote, piece.local, piece.len, 0);
        }
        self.close(&open);
    }

    /// The units of all pairs together, merged where the remote side goes on.
    fn merged(&mut self, class: &Class, pairs: &[u64]) {
        let mut open = Open::default();
        for (i, pair) in (0_u32..).zip(pairs) {
            let (remote, local) = unpack(*pair);
            // A block's last byte is inside its memory, so these fit.
            let remote = u64::from(remote) * class.remote_stride;
            let local = u64::from(local) * class.local_stride;
            for piece in &class.pieces {
                let (remote, local) = (remote + piece.remote, local + piece.local);
                self.add(&mut open, remote, local, piece.len, i);
            }
        }
        self.close(&open);
    }

    /// Adds a stretch that is contiguous on both sides, to the open unit where it can.
    // Inlined so that the open unit stays in registers: this runs once for each block.
    #[inline(always)]
    fn add(&mut self, open: &mut Open, mut remote: u64, mut local: u64, mut len: u64, pair: u32) {
        loop {
            let room = self.max_len - open.unit.len;
            let goes_on = local == open.local_end;
            let joins = open.unit.len > 0
                && room > 0
                && remote == open.unit.remote + u64::from(open.unit.len)
                && (goes_on || open.unit.count < self.max_pieces);
            let take = if joins {
                let take = capped(len, room);
                if open.unit.count > 1 || !goes_on {
                    self.join_piece(open, goes_on, local, take);
                }
                open.unit.len += take;
                open.last = pair;
                take
            } else {
                self.close(open);
                let take = capped(len, self.max_len);
                open.unit = Unit {
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

    /// Adds to the pieces of a unit that has several, or is about to.
    #[inline(never)]
    fn join_piece(&mut self, open: &mut Open, goes_on: bool, local: u64, len: u32) {
        if goes_on {
            if let Some(last) = self.pieces.last_mut() {
                last.len += len;
            }
            return;
        }
        if open.unit.count == 1 {
            open.unit.pieces = self.pieces.len();
            self.pieces.push(UnitPiece {
                local: open.unit.local,
                len: open.unit.len,
            });
        }
        open.unit.count += 1;
        self.pieces.push(UnitPiece { local, len });
    }

    #[inline]
    fn close(&mut self, open: &Open) {
        if open.unit.len > 0 {
            self.units.push(open.unit);
            self.touched.push((open.first, open.last));
        }
    }
}

/// The unit that may still grow; there is none while its length is 0.
#[derive(Default)]
struct Open {
    unit: Unit,
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
