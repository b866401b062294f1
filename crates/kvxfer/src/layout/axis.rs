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
