//! How eagerly a ring is looked at.

use std::time::Duration;

/// How eagerly a ring is looked at: its owner's choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// Always: a core for the shortest way.
    Armed,
    /// Now and then: after each look that has found nothing, twice as long as before, up to this.
    Parked {
        /// The longest sleep.
        longest: Duration,
    },
}

/// What to do after a look that has found nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rest {
    /// Look again.
    Spin,
    /// Sleep first.
    Sleep(Duration),
}

impl Pace {
    /// The first sleep of a parked ring.
    pub const FIRST: Duration = Duration::from_micros(20);

    /// What to do after this many looks in a row that have found nothing.
    #[must_use]
    pub fn rest(self, looks: u32) -> Rest {
        match self {
            Self::Armed => Rest::Spin,
            Self::Parked { longest } => {
                let doubled = Self::FIRST.checked_mul(1 << looks.min(20));
                Rest::Sleep(doubled.unwrap_or(longest).min(longest))
            }
        }
    }
}
