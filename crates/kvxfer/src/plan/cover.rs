//! What of a consumer rank's cache is moved, and what is not.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::layout::{AxisKind, Overlap, Pair, Shard, Side, ranges};

/// What one producer rank gives of what a consumer rank keeps. Blocks are not in question: whichever
/// are asked for, this much of each moves.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Cover {
    /// By rising key; one for each tensor that the consumer rank keeps, two for K and V in one.
    entries: Vec<Entry>,
}

/// Group, layer, tensor, and which of K and V.
type Key = (u32, u32, u32, u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    key: Key,
    /// What is dealt out at the producer.
    along: Option<AxisKind>,
    /// All that the consumer keeps, along that axis.
    needed: Shard,
    /// What it is given of it; an empty part where it is given nothing.
    given: Shard,
}

const WHOLE: Shard = Shard { first: 0, count: 1 };
const NOTHING: Shard = Shard { first: 0, count: 0 };

impl Cover {
    /// Takes in a pair of tensors, if the consumer rank keeps its one; `overlap` is what moves of it.
    pub(super) fn add(&mut self, pair: &Pair<'_>, overlap: Option<&Overlap>) {
        let (plane, Some(placed)) = pair.consumer else {
            return;
        };
        let along = pair.producer.0.format.sharded_axis().map(|a| a.kind);
        let own = plane.format.sharded_axis().map(|a| a.kind);
        let needed = match along {
            None => WHOLE,
            Some(kind) => {
                let dealt = placed.shard_of(plane.format).filter(|_| own == along);
                dealt.unwrap_or(Shard {
                    first: 0,
                    count: plane.format.extent_of(kind),
                })
            }
        };
        let given = match (overlap, along) {
            (None, _) => NOTHING,
            (Some(overlap), Some(kind)) => overlap.along(kind).unwrap_or(needed),
            (Some(_), None) => WHOLE,
        };
        // The entries of a consumer are the same whoever the producer is.
        let halves = match (plane.kv, plane.format.has(AxisKind::Kv)) {
            (Some(kv), _) => kv..kv + 1,
            (None, true) => 0..2,
            (None, false) => 0..1,
        };
        self.entries.extend(halves.map(|kv| Entry {
            key: (pair.group, pair.layer, plane.tensor, kv),
            along,
            needed,
            given,
        }));
    }

    /// The same of some groups alone.
    #[must_use]
    pub fn of_groups(&self, kept: impl Fn(u32) -> bool) -> Self {
        let entries = self.entries.iter().filter(|entry| kept(entry.key.0));
        Self {
            entries: entries.copied().collect(),
        }
    }

    /// Brings the entries into order.
    pub(super) fn finish(&mut self) {
        self.entries.sort_unstable_by_key(|e| e.key);
    }

    /// What several producer ranks together do not give of all that the consumer rank keeps; `None`:
    /// they give all of it. `covers` are those of [`Compiled`](super::Compiled)s with this consumer,
    /// whose parts may overlap. It takes a few nanoseconds for each tensor and cover.
    #[must_use]
    pub fn missing(consumer: &Side<'_>, covers: &[&Self]) -> Option<MissingPart> {
        let Some((first, others)) = covers.split_first() else {
            let all = consumer.placement.tensors().iter();
            let first = all.min_by_key(|t| (t.group, t.layer, t.tensor))?;
            let key = (first.group, first.layer, first.tensor, 0);
            return Some(MissingPart::new(consumer, key, None, |other| {
                let placed = consumer.placement.tensors().iter();
                placed
                    .filter(|t| (t.group, t.tensor) == (other.0, other.2))
                    .map(|t| t.layer)
                    .collect()
            }));
        };
        let gap = |at: usize, entry: &Entry| entry.gap(at, others);
        let at = first.entries.iter().enumerate();
        let (_, entry, part) = at
            .map(|(at, entry)| (at, entry, gap(at, entry)))
            .find_map(|(at, entry, part)| Some((at, entry, part?)))?;
        let part_of = entry.along.map(|kind| (kind, part));
        Some(MissingPart::new(consumer, entry.key, part_of, |key| {
            // The same is missing of other layers too.
            let alike = first.entries.iter().enumerate().filter(|(at, other)| {
                (other.key.0, other.key.2, other.key.3) == (key.0, key.2, key.3)
                    && other.along == entry.along
                    && gap(*at, other) == Some(part)
            });
            alike.map(|(_, other)| other.key.1).collect()
        }))
    }
}

impl Entry {
    /// The first part that neither this one nor those at the same place in other covers give.
    fn gap(&self, at: usize, others: &[&Cover]) -> Option<Shard> {
        let end = self.needed.first.saturating_add(self.needed.count);
        let mut reached = self.needed.first;
        let reach = |reached: &mut u64, given: Shard| {
            let end = given.first.saturating_add(given.count);
            if given.first <= *reached && *reached < end {
                *reached = end;
            }
        };
        loop {
            let before = reached;
            reach(&mut reached, self.given);
            for other in others {
                if let Some(other) = other.like(at, self) {
                    reach(&mut reached, other.given);
                }
            }
            if reached >= end {
                return None;
            }
            if reached == before {
                break;
            }
        }
        let others = others.iter().filter_map(|o| o.like(at, self));
        let starts = others.chain([self]).filter(|e| e.given.count > 0);
        let next = starts.map(|e| e.given.first).filter(|f| *f > reached);
        let until = next.min().unwrap_or(end).min(end);
        Some(Shard {
            first: reached,
            count: until - reached,
        })
    }
}

impl Cover {
    /// The entry for the same part, which is at the same place where the covers are of one consumer.
    fn like(&self, at: usize, wanted: &Entry) -> Option<&Entry> {
        let entry = match self.entries.get(at) {
            Some(entry) if entry.key == wanted.key => entry,
            _ => {
                let by_key = self.entries.binary_search_by_key(&wanted.key, |e| e.key);
                self.entries.get(by_key.ok()?)?
            }
        };
        (entry.along == wanted.along).then_some(entry)
    }
}

/// Part of a consumer rank's cache that nobody gives.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MissingPart {
    /// Index of the cache group.
    pub group: u32,
    /// Its name.
    pub group_name: String,
    /// The layers, rising, of which the same is missing.
    pub layers: Vec<u32>,
    /// The tensor's name.
    pub tensor: String,
    /// Which part of it; `None`: all of it.
    pub part: Option<(AxisKind, Shard)>,
}

impl MissingPart {
    fn new(
        consumer: &Side<'_>,
        key: Key,
        part: Option<(AxisKind, Shard)>,
        layers: impl FnOnce(Key) -> Vec<u32>,
    ) -> Self {
        let (group, layer, tensor, _) = key;
        let name = |name: Option<&String>| name.cloned().unwrap_or_default();
        let mut layers = layers(key);
        layers.sort_unstable();
        layers.dedup();
        Self {
            group,
            group_name: name(consumer.format.group(group).map(|g| &g.name)),
            layers,
            tensor: name(
                consumer
                    .format
                    .tensor(group, layer, tensor)
                    .map(|t| &t.name),
            ),
            part,
        }
    }
}

impl fmt::Display for MissingPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = if self.layers.len() == 1 { "" } else { "s" };
        write!(
            f,
            "group {} ({}) layer{s} {} {}",
            self.group,
            self.group_name,
            ranges(&self.layers),
            self.tensor
        )?;
        match &self.part {
            None => Ok(()),
            Some((kind, part)) => write!(f, " {kind} {part}"),
        }
    }
}
