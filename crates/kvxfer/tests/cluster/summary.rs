//! What happened in histories, counted.

use std::collections::BTreeMap;

/// Counts by name.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Summary {
    pub(crate) counts: BTreeMap<&'static str, u64>,
}

impl Summary {
    pub(crate) fn count(&mut self, name: &'static str) {
        self.add(name, 1);
    }

    pub(crate) fn add(&mut self, name: &'static str, n: u64) {
        *self.counts.entry(name).or_default() += n;
    }

    pub(crate) fn of(&self, name: &str) -> u64 {
        self.counts.get(name).copied().unwrap_or(0)
    }

    pub(crate) fn merge(&mut self, other: &Summary) {
        for (name, n) in &other.counts {
            self.add(name, *n);
        }
    }
}
