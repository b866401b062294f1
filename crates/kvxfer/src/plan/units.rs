//! From two lists of blocks to pairs of units.

use std::ops::Range;

use super::compile::{Compiled, Group};
use super::error::{PlanError, SideName, TokenRange};
use super::request::duplicate;
use crate::blocks::BlockPair;
use crate::layout::Units;

/// What blocks of a group are made of on both sides: the tokens that both sizes are multiples of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Unit {
    /// Tokens of a unit; 0 for state slots.
    pub tokens: u32,
    /// Units of a block at the producer; 1 where both sides' blocks are of one size.
    pub producer_per_block: u32,
    /// Units of a block at the consumer.
    pub consumer_per_block: u32,
}

impl From<Units> for Unit {
    fn from(units: Units) -> Self {
        Self {
            tokens: units.tokens,
            producer_per_block: units.producer,
            consumer_per_block: units.consumer,
        }
    }
}

/// A request's blocks of one group on one side, in token order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listed<'a> {
    /// Physical block ids.
    pub blocks: &'a [u32],
    /// The token that the first block begins with. Where both sides count from the same token, any
    /// number will do for that one. A sliding window's lists begin in the middle of a request, and
    /// where blocks are of unequal size not at the same token; then each says at which.
    pub first_token: u64,
}

impl<'a> From<&'a [u32]> for Listed<'a> {
    fn from(blocks: &'a [u32]) -> Self {
        Self {
            blocks,
            first_token: 0,
        }
    }
}

impl<'a> From<&'a Vec<u32>> for Listed<'a> {
    fn from(blocks: &'a Vec<u32>) -> Self {
        blocks.as_slice().into()
    }
}

impl<'a, const N: usize> From<&'a [u32; N]> for Listed<'a> {
    fn from(blocks: &'a [u32; N]) -> Self {
        blocks.as_slice().into()
    }
}

/// Which unit of the producer goes to which unit of the consumer, in one group. Made by
/// [`Compiled::pairs`] and [`Compiled::paired`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitPairs {
    pub(super) group: u32,
    pub(super) units: Units,
    /// Unit `block * per_block + index in the block` of both sides; no destination twice.
    pub(super) pairs: Vec<BlockPair>,
    /// The destination blocks that are written, in part or whole; none twice. In token order, if it is known.
    pub(super) blocks: Vec<u32>,
}

impl UnitPairs {
    /// Index of the cache group.
    #[must_use]
    pub const fn group(&self) -> u32 {
        self.group
    }

    /// How many units move.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// Whether none does.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// The destination blocks that are written, in part or whole; in token order, if that is known.
    #[must_use]
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }
}

impl Compiled {
    /// Pairs the units of two lists of blocks of one group. `tokens` says which tokens are to move,
    /// counted as the lists count theirs; it begins with a unit, and its end is rounded up to one.
    /// Without it all tokens move that both lists hold, and neither list may have a block beside
    /// them. State slots move whole, whatever `tokens` says.
    ///
    /// # Errors
    ///
    /// A group that is not there, a block out of range or a destination listed twice; lists that
    /// begin within a unit, or do not hold the tokens; without `tokens` one that has more blocks.
    pub fn pairs<'a, 'b>(
        &self,
        group: u32,
        src: impl Into<Listed<'a>>,
        dst: impl Into<Listed<'b>>,
        tokens: Option<Range<u64>>,
    ) -> Result<UnitPairs, PlanError> {
        let found = self.group(group)?;
        let units = found.units;
        let (src, dst) = (src.into(), dst.into());
        let request = Request { group, src, dst };
        // A slot is a block of one token that is always wanted.
        let (unit, tokens) = match units.tokens {
            0 => (1, None),
            unit => (unit, tokens),
        };
        let wanted = match tokens {
            Some(tokens) => request.checked(tokens, unit, units)?,
            None => request.common(unit, units)?,
        };
        let unit = u64::from(unit);
        let count = (wanted.end - wanted.start) / unit;
        let skipped = |first_token| (wanted.start - first_token) / unit;
        let src = Cut::new(src.blocks, skipped(src.first_token), count, units.producer);
        let dst = Cut::new(dst.blocks, skipped(dst.first_token), count, units.consumer);
        src.check(SideName::Producer, group, found)?;
        dst.check(SideName::Consumer, group, found)?;
        if let Some(block) = duplicate(dst.blocks.iter().copied()) {
            return Err(PlanError::DuplicateDestination { group, block });
        }
        let pairs = src.units().zip(dst.units());
        Ok(UnitPairs {
            group,
            units,
            pairs: pairs.map(|(src, dst)| BlockPair { src, dst }).collect(),
            blocks: dst.blocks.to_vec(),
        })
    }
}

impl Compiled {
    /// Units of one group that were paired elsewhere, such as by the other side: numbers as in
    /// [`Plan::units`](super::Plan::units). That they are there is checked when they are planned.
    ///
    /// # Errors
    ///
    /// A group that is not there, a destination listed twice.
    pub fn paired(&self, group: u32, pairs: Vec<BlockPair>) -> Result<UnitPairs, PlanError> {
        let units = self.group(group)?.units;
        let per_block = units.consumer.max(1);
        if let Some(unit) = duplicate(pairs.iter().map(|pair| pair.dst)) {
            let block = unit / per_block;
            return Err(PlanError::DuplicateDestination { group, block });
        }
        let mut blocks: Vec<u32> = pairs.iter().map(|pair| pair.dst / per_block).collect();
        if per_block > 1 {
            blocks.sort_unstable();
            blocks.dedup();
        }
        Ok(UnitPairs {
            group,
            units,
            pairs,
            blocks,
        })
    }
}

/// Both sides' lists.
struct Request<'a, 'b> {
    group: u32,
    src: Listed<'a>,
    dst: Listed<'b>,
}

impl Request<'_, '_> {
    /// The tokens that a list's blocks hold.
    fn held(listed: Listed<'_>, block_tokens: u64) -> TokenRange {
        let tokens = block_tokens.saturating_mul(listed.blocks.len() as u64);
        TokenRange {
            start: listed.first_token,
            end: listed.first_token.saturating_add(tokens),
        }
    }

    fn both(&self, unit: u32, units: Units) -> (TokenRange, TokenRange) {
        let tokens = |per_block: u32| u64::from(unit) * u64::from(per_block);
        (
            Self::held(self.src, tokens(units.producer)),
            Self::held(self.dst, tokens(units.consumer)),
        )
    }

    fn begins_with_a_unit(&self, token: u64, unit: u32) -> Result<(), PlanError> {
        match token.is_multiple_of(u64::from(unit)) {
            true => Ok(()),
            false => Err(PlanError::WithinUnit {
                group: self.group,
                token,
                unit,
            }),
        }
    }

    /// These tokens in whole units, which both lists must hold.
    fn checked(
        &self,
        tokens: Range<u64>,
        unit: u32,
        units: Units,
    ) -> Result<TokenRange, PlanError> {
        for first in [self.src.first_token, self.dst.first_token, tokens.start] {
            self.begins_with_a_unit(first, unit)?;
        }
        let end = tokens.end.max(tokens.start);
        let wanted = TokenRange {
            start: tokens.start,
            end: end.checked_next_multiple_of(u64::from(unit)).unwrap_or(end),
        };
        let (src, dst) = self.both(unit, units);
        for (side, listed, held) in [
            (SideName::Producer, self.src, src),
            (SideName::Consumer, self.dst, dst),
        ] {
            let holds = held.start <= wanted.start && wanted.end <= held.end;
            if wanted.start < wanted.end && !holds {
                return Err(PlanError::NotHeld {
                    side,
                    group: self.group,
                    blocks: listed.blocks.len(),
                    held,
                    wanted,
                });
            }
        }
        if wanted.start >= wanted.end {
            // No tokens, wherever that is.
            let start = src.start.max(dst.start);
            return Ok(TokenRange { start, end: start });
        }
        Ok(wanted)
    }

    /// The tokens that both lists hold.
    fn common(&self, unit: u32, units: Units) -> Result<TokenRange, PlanError> {
        for first in [self.src.first_token, self.dst.first_token] {
            self.begins_with_a_unit(first, unit)?;
        }
        let (src, dst) = self.both(unit, units);
        let start = src.start.max(dst.start);
        let end = src.end.min(dst.end).max(start);
        // A block beside the common tokens would be one that nobody copies.
        let tight = |held: TokenRange, per_block: u32| {
            let block = u64::from(unit) * u64::from(per_block);
            let idle = held.start == held.end;
            idle || (start - held.start < block && held.end.saturating_sub(end) < block)
        };
        let nothing = start == end && !(self.src.blocks.is_empty() && self.dst.blocks.is_empty());
        if nothing || !tight(src, units.producer) || !tight(dst, units.consumer) {
            return Err(PlanError::Lengths {
                group: self.group,
                producer_blocks: self.src.blocks.len(),
                consumer_blocks: self.dst.blocks.len(),
                producer: src,
                consumer: dst,
            });
        }
        Ok(TokenRange { start, end })
    }
}

/// The units of a list that are meant: the blocks that hold them, and which of theirs.
struct Cut<'a> {
    blocks: &'a [u32],
    per_block: u32,
    /// Units of the first block that are not meant.
    skipped: usize,
    count: usize,
}

impl<'a> Cut<'a> {
    /// The list holds what is meant.
    fn new(blocks: &'a [u32], skipped: u64, count: u64, per_block: u32) -> Self {
        let each = u64::from(per_block);
        let first = skipped / each;
        let end = (skipped + count).div_ceil(each);
        let range = match count {
            0 => 0..0,
            _ => index(first)..index(end),
        };
        Self {
            blocks: blocks.get(range).unwrap_or(&[]),
            per_block,
            skipped: index(skipped % each),
            count: index(count),
        }
    }

    /// Blocks that are not there, or whose units have no number.
    fn check(&self, side: SideName, group: u32, found: &Group) -> Result<(), PlanError> {
        let (_, blocks) = found.side(side);
        let num_blocks = match blocks {
            // Nothing is known of a group that the rank keeps nothing of, but that ids must fit.
            0 => u32::MAX / self.per_block,
            blocks => blocks,
        };
        let highest = self.blocks.iter().copied().max();
        match highest.filter(|block| *block >= num_blocks) {
            None => Ok(()),
            Some(block) => Err(PlanError::BlockOutOfRange {
                side,
                group,
                block,
                num_blocks,
            }),
        }
    }

    fn units(&self) -> impl Iterator<Item = u32> {
        let per_block = self.per_block;
        let of_block = move |block: &u32| {
            let first = *block * per_block;
            first..first + per_block
        };
        let all = self.blocks.iter().flat_map(of_block);
        all.skip(self.skipped).take(self.count)
    }
}

/// A number that is at most the length of a list in memory, or its units'.
fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}
