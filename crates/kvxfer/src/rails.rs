//! Sets of rails: of the pairs of devices that join two engines, by their numbers in the session.

use std::fmt;
use std::ops::{BitOr, BitOrAssign};

use serde::{Deserialize, Serialize};

/// A set of pairs of rails, of which a session has 16 at most. On the wire its bits: pair i is bit i.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RailSet(u16);

impl RailSet {
    /// None.
    pub const EMPTY: RailSet = RailSet(0);

    /// The pair of rails with this number alone. Empty for a number that no pair has.
    #[must_use]
    pub const fn only(rail: u16) -> RailSet {
        match 1_u16.checked_shl(rail as u32) {
            Some(bit) => RailSet(bit),
            None => RailSet::EMPTY,
        }
    }

    /// The first `count` pairs: all of a session that has so many.
    #[must_use]
    pub fn first(count: usize) -> RailSet {
        (0..u16::BITS as u16)
            .take(count)
            .fold(RailSet::EMPTY, |all, rail| all | RailSet::only(rail))
    }

    /// Adds one.
    pub fn insert(&mut self, rail: u16) {
        *self |= RailSet::only(rail);
    }

    /// Takes one away.
    pub fn remove(&mut self, rail: u16) {
        self.0 &= !RailSet::only(rail).0;
    }

    /// Whether it has this one.
    #[must_use]
    pub const fn contains(self, rail: u16) -> bool {
        self.0 & RailSet::only(rail).0 != 0
    }

    /// Whether all of these are in `other`.
    #[must_use]
    pub const fn is_within(self, other: RailSet) -> bool {
        self.0 & !other.0 == 0
    }

    /// Whether it has none.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Those it has, in order.
    pub fn iter(self) -> impl Iterator<Item = u16> {
        (0..u16::BITS as u16).filter(move |rail| self.contains(*rail))
    }
}

impl BitOr for RailSet {
    type Output = RailSet;

    fn bitor(self, other: RailSet) -> RailSet {
        RailSet(self.0 | other.0)
    }
}

impl BitOrAssign for RailSet {
    fn bitor_assign(&mut self, other: RailSet) {
        *self = *self | other;
    }
}

impl fmt::Display for RailSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl fmt::Debug for RailSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_has_what_was_put_in() {
        let mut set = RailSet::only(3);
        set.insert(0);
        set.insert(15);
        // No session has such a pair.
        set.insert(16);
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 3, 15]);
        assert!(set.contains(15) && !set.contains(1) && !set.contains(u16::MAX));
        let mut less = set;
        less.remove(3);
        less.remove(1);
        assert_eq!(less.iter().collect::<Vec<_>>(), [0, 15]);
        assert_eq!(set.to_string(), "{0, 3, 15}");
        assert_eq!(set | RailSet::only(1), RailSet(0b1000_0000_0000_1011));
    }

    #[test]
    fn a_part_is_within_the_whole() {
        assert!(RailSet::EMPTY.is_within(RailSet::EMPTY));
        assert!(RailSet::only(1).is_within(RailSet::first(2)));
        assert!(!RailSet::only(2).is_within(RailSet::first(2)));
        assert_eq!(RailSet::first(0), RailSet::EMPTY);
        assert_eq!(RailSet::first(99).iter().count(), 16);
    }
}
