//! The axes of a tensor's block.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What an axis counts.
///
/// A kind that is there more than once is *split*: its axes are the digits of one index, the first
/// in the list the most significant. So `[blocks, heads, dim/x, tokens, x]` is `Head`, `Dim` 16,
/// `Token`, `Dim` 8; and kernel blocks of 16 tokens inside a block of 64 are `Token` 4, `Token` 16.
/// Where the digits lie in memory is up to the strides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum AxisKind {
    /// Keys (0) and values (1) in one tensor; the extent is 2.
    Kv,
    /// KV heads, or a linear attention's.
    Head,
    /// Tokens of the block.
    Token,
    /// Elements of a head.
    Dim,
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

impl AxisKind {
    /// Every kind, in the order of their codes.
    pub const ALL: [Self; 9] = [
        Self::Kv,
        Self::Head,
        Self::Token,
        Self::Dim,
        Self::Latent,
        Self::State,
        Self::Channel,
        Self::Width,
        Self::Opaque,
    ];

    /// The name used in files and messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kv => "kv",
            Self::Head => "head",
            Self::Token => "token",
            Self::Dim => "dim",
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
            Self::Dim => 4,
            Self::Latent => 5,
            Self::State => 6,
            Self::Channel => 7,
            Self::Width => 8,
            Self::Opaque => 9,
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

/// One part of an index that both sides can address with one stride each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CommonPart {
    /// Steps.
    pub(crate) extent: u64,
    /// Bytes of a step on the first side.
    pub(crate) a: u64,
    /// Bytes of a step on the second side.
    pub(crate) b: u64,
}

/// The coarsest common split of one kind of axis that two sides split differently. Each side gives
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
