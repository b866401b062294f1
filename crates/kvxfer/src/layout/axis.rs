//! The axes of a tensor's block.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What an axis counts.
///
/// The head size and the tokens of a block can each be one axis or split in two, outer and inner:
/// `index = outer * inner_extent + inner`. So `[blocks, heads, dim/x, tokens, x]` is `Head`,
/// `DimOuter`, `Token`, `DimInner`; and a kernel's block of 16 tokens inside a logical block of 64
/// is `TokenOuter` 4, `TokenInner` 16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum AxisKind {
    /// Keys (0) and values (1) in one tensor; the extent is 2.
    Kv,
    /// KV heads.
    Head,
    /// Tokens of the block.
    Token,
    /// Tokens, outer part of a split.
    TokenOuter,
    /// Tokens, inner part of a split.
    TokenInner,
    /// Elements of a head.
    Dim,
    /// Elements of a head, outer part of a vector split.
    DimOuter,
    /// Elements of a head, inner part of a vector split.
    DimInner,
    /// Elements of a compressed latent (MLA), including its rope part where they are one tensor.
    Latent,
    /// Elements of a recurrent state.
    State,
    /// Channels of a convolution.
    Channel,
    /// Taps of a convolution.
    Width,
    /// Bytes with no meaning to us.
    Opaque,
}

/// What an index along an axis is an index of; both parts of a split axis count the same thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Coordinate {
    /// Keys or values.
    Kv,
    /// KV heads.
    Head,
    /// Tokens of the block.
    Token,
    /// Elements of a head.
    Dim,
    /// Elements of a latent.
    Latent,
    /// Elements of a recurrent state.
    State,
    /// Channels of a convolution.
    Channel,
    /// Taps of a convolution.
    Width,
    /// Bytes.
    Opaque,
}

impl AxisKind {
    /// What the axis counts, splits aside.
    #[must_use]
    pub const fn coordinate(self) -> Coordinate {
        match self {
            Self::Kv => Coordinate::Kv,
            Self::Head => Coordinate::Head,
            Self::Token | Self::TokenOuter | Self::TokenInner => Coordinate::Token,
            Self::Dim | Self::DimOuter | Self::DimInner => Coordinate::Dim,
            Self::Latent => Coordinate::Latent,
            Self::State => Coordinate::State,
            Self::Channel => Coordinate::Channel,
            Self::Width => Coordinate::Width,
            Self::Opaque => Coordinate::Opaque,
        }
    }

    /// The other half of a split axis, if this is one half.
    #[must_use]
    pub const fn other_half(self) -> Option<Self> {
        match self {
            Self::TokenOuter => Some(Self::TokenInner),
            Self::TokenInner => Some(Self::TokenOuter),
            Self::DimOuter => Some(Self::DimInner),
            Self::DimInner => Some(Self::DimOuter),
            _ => None,
        }
    }

    /// Whether this is the inner half of a split.
    pub(crate) const fn is_inner(self) -> bool {
        matches!(self, Self::TokenInner | Self::DimInner)
    }

    /// The name used in files and messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kv => "kv",
            Self::Head => "head",
            Self::Token => "token",
            Self::TokenOuter => "token_outer",
            Self::TokenInner => "token_inner",
            Self::Dim => "dim",
            Self::DimOuter => "dim_outer",
            Self::DimInner => "dim_inner",
            Self::Latent => "latent",
            Self::State => "state",
            Self::Channel => "channel",
            Self::Width => "width",
            Self::Opaque => "opaque",
        }
    }

    /// The code in the canonical encoding. Never reused, never renumbered.
    pub(super) const fn code(self) -> u8 {
        match self {
            Self::Kv => 1,
            Self::Head => 2,
            Self::Token => 3,
            Self::TokenOuter => 4,
            Self::TokenInner => 5,
            Self::Dim => 6,
            Self::DimOuter => 7,
            Self::DimInner => 8,
            Self::Latent => 9,
            Self::State => 10,
            Self::Channel => 11,
            Self::Width => 12,
            Self::Opaque => 13,
        }
    }
}

impl fmt::Display for AxisKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One axis of a tensor's block, with its extent in the whole model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Axis {
    /// What it counts.
    pub kind: AxisKind,
    /// How many, over all tensor-parallel ranks.
    pub extent: u64,
}

impl Axis {
    /// An axis of this kind and extent.
    #[must_use]
    pub const fn new(kind: AxisKind, extent: u64) -> Self {
        Self { kind, extent }
    }
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.extent)
    }
}

/// One part of a coordinate that both sides can address with one stride each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CommonPart {
    /// Steps.
    pub(crate) extent: u64,
    /// Bytes of a step on the first side.
    pub(crate) a: u64,
    /// Bytes of a step on the second side.
    pub(crate) b: u64,
}

/// The coarsest common split of one coordinate that two sides split differently. Each side gives
/// its parts outermost first as (extent, stride). `None` where the extents do not nest, or where
/// their products differ.
pub(crate) fn common_split(a: &[(u64, u64)], b: &[(u64, u64)]) -> Option<Vec<CommonPart>> {
    let mut out = Vec::with_capacity(a.len().max(b.len()));
    let mut a_parts = a.iter().rev().copied();
    let mut b_parts = b.iter().rev().copied();
    let (mut left_a, mut left_b) = (a_parts.next(), b_parts.next());
    loop {
        // A part of one step adds nothing.
        if let Some((1, _)) = left_a {
            left_a = a_parts.next();
            continue;
        }
        if let Some((1, _)) = left_b {
            left_b = b_parts.next();
            continue;
        }
        let ((ea, sa), (eb, sb)) = match (left_a, left_b) {
            (None, None) => break,
            (Some(a), Some(b)) => (a, b),
            _ => return None,
        };
        let step = ea.min(eb);
        if step == 0 || ea % step != 0 || eb % step != 0 {
            return None;
        }
        out.push(CommonPart {
            extent: step,
            a: sa,
            b: sb,
        });
        left_a = Some((ea / step, sa.checked_mul(step)?));
        left_b = Some((eb / step, sb.checked_mul(step)?));
    }
    out.reverse();
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(extent: u64, a: u64, b: u64) -> CommonPart {
        CommonPart { extent, a, b }
    }

    #[test]
    fn a_split_refines_a_whole_axis() {
        // 128 elements of 2 bytes against 16 vectors of 8.
        assert_eq!(
            common_split(&[(128, 2)], &[(16, 256), (8, 2)]),
            Some(vec![part(16, 16, 256), part(8, 2, 2)])
        );
    }

    #[test]
    fn two_splits_meet_in_the_finer_one() {
        assert_eq!(
            common_split(&[(8, 100), (16, 2)], &[(16, 50), (8, 2)]),
            Some(vec![part(8, 100, 100), part(2, 16, 50), part(8, 2, 2)])
        );
    }

    #[test]
    fn extents_that_do_not_nest_are_refused() {
        assert_eq!(common_split(&[(4, 12), (6, 2)], &[(6, 8), (4, 2)]), None);
        assert_eq!(common_split(&[(8, 2)], &[(16, 2)]), None);
    }
}
