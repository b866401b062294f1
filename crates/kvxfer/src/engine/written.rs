//! What a push has written in token order: nothing orders two writes of one unit, so each is written
//! once. Pure.

use std::collections::HashMap;
use std::ops::Range;

/// Where units are: a group, and one of its layers or all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    pub(crate) group: u32,
    pub(crate) layer: Option<u32>,
}

/// The stretches of units that have been written, by place.
#[derive(Debug, Default)]
pub(crate) struct Written(HashMap<Place, Vec<Range<u64>>>);

impl Written {
    /// Whether any of these units has been written, in this layer or in one of these.
    pub(crate) fn has(&self, place: Place, units: &Range<u64>) -> bool {
        if units.is_empty() {
            return false;
        }
        let meets = |of: &Vec<Range<u64>>| {
            of.iter()
                .any(|written| written.start < units.end && units.start < written.end)
        };
        let all = Place {
            layer: None,
            ..place
        };
        match place.layer {
            Some(_) => [place, all]
                .iter()
                .any(|place| self.0.get(place).is_some_and(meets)),
            None => {
                let of_group = self.0.iter().filter(|(at, _)| at.group == place.group);
                of_group.into_iter().any(|(_, of)| meets(of))
            }
        }
    }

    pub(crate) fn take(&mut self, all: Vec<(Place, Range<u64>)>) {
        for (place, units) in all.into_iter().filter(|(_, units)| !units.is_empty()) {
            self.0.entry(place).or_default().push(units);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(group: u32, layer: Option<u32>) -> Place {
        Place { group, layer }
    }

    fn written(all: &[(Place, Range<u64>)]) -> Written {
        let mut written = Written::default();
        written.take(all.to_vec());
        written
    }

    #[test]
    fn units_are_of_their_group_and_layer() {
        let written = written(&[(at(0, Some(1)), 4..8), (at(0, Some(1)), 12..13)]);
        for units in [4..5, 0..5, 7..12, 12..13, 0..u64::MAX] {
            assert!(written.has(at(0, Some(1)), &units), "{units:?}");
            assert!(!written.has(at(0, Some(2)), &units), "{units:?}");
            assert!(!written.has(at(1, Some(1)), &units), "{units:?}");
        }
        for units in [0..4, 8..12, 13..u64::MAX, 5..5] {
            assert!(!written.has(at(0, Some(1)), &units), "{units:?}");
        }
    }

    #[test]
    fn all_layers_are_every_layer() {
        let all = written(&[(at(2, None), 0..3)]);
        let one = written(&[(at(2, Some(7)), 0..3)]);
        assert!(all.has(at(2, Some(7)), &(2..9)) && one.has(at(2, None), &(2..9)));
        assert!(!all.has(at(2, Some(7)), &(3..9)) && !one.has(at(2, None), &(3..9)));
        assert!(!all.has(at(1, None), &(0..9)) && !one.has(at(1, None), &(0..9)));
    }

    #[test]
    fn no_units_are_in_nobodys_way() {
        let written = written(&[(at(0, None), 5..5)]);
        assert!(!written.has(at(0, None), &(0..9)));
    }

    #[test]
    fn nothing_is_written_at_first() {
        assert!(!Written::default().has(at(0, None), &(0..u64::MAX)));
    }
}
