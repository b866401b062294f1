//! Sums of lists of units, worked out in turns.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use kvxfer_hipmem as mem;

use crate::block_set::BlockSet;
use crate::blocks::GroupBlocks;
use crate::engine::Inner;
use crate::plan::{LayerScope, Plan, Posted, SideName};
use crate::sums::{Summed, SummedTensor};
use crate::wire::{SumsOf, limits};

/// Bytes that are read in a turn, about: some milliseconds.
const TURN: u64 = 64 << 20;
/// Sums in one message, and so of one turn.
pub(super) const CHUNK: usize = limits::SUMS / 8;

/// Units of one group on one side. Their sums are told unit by unit, and for each by tensor.
#[derive(Debug, Clone)]
pub(super) struct List {
    pub(super) group: u32,
    pub(super) scope: LayerScope,
    pub(super) units: Vec<u32>,
}

impl From<SumsOf> for List {
    fn from(of: SumsOf) -> Self {
        Self {
            group: of.group,
            scope: of.layer.map_or(LayerScope::All, LayerScope::Layer),
            units: of.units,
        }
    }
}

impl List {
    /// What a plan moves, in the units of one side.
    pub(super) fn of_plan(plan: &Plan, side: SideName) -> Vec<Self> {
        let units = |(producer, consumer)| match side {
            SideName::Producer => producer,
            SideName::Consumer => consumer,
        };
        let lists = plan.units().map(|(group, pairs)| Self {
            group,
            scope: plan.scope(),
            units: pairs.map(units).collect(),
        });
        lists.collect()
    }

    /// What kernels have posted, a list for each layer: each post by itself may be a few blocks.
    pub(super) fn of_posted(posted: &[&Posted], side: SideName) -> Vec<Self> {
        let mut lists: BTreeMap<(u32, u32), Vec<u32>> = BTreeMap::new();
        for (group, layer, pair) in posted.iter().flat_map(|posted| posted.blocks()) {
            lists.entry((group, layer)).or_default().push(match side {
                SideName::Producer => pair.src,
                SideName::Consumer => pair.dst,
            });
        }
        let list = |((group, layer), units)| Self {
            group,
            scope: LayerScope::Layer(layer),
            units,
        };
        lists.into_iter().map(list).collect()
    }

    pub(super) fn to_wire(&self, units: &[u32]) -> SumsOf {
        SumsOf {
            group: self.group,
            layer: match self.scope {
                LayerScope::All => None,
                LayerScope::Layer(layer) => Some(layer),
            },
            units: units.to_vec(),
        }
    }

    pub(super) fn tensors<'a>(&self, summed: &'a Summed) -> &'a [SummedTensor] {
        summed.tensors(self.group, self.scope)
    }

    /// How many sums there are.
    pub(super) fn count(&self, summed: &Summed) -> u64 {
        (self.units.len() as u64).saturating_mul(self.tensors(summed).len() as u64)
    }
}

pub(super) fn count(lists: &[List], summed: &Summed) -> u64 {
    let counts = lists.iter().map(|list| list.count(summed));
    counts.fold(0, u64::saturating_add)
}

/// Whether all units are of these blocks, and not asked for more than so many times, about.
pub(super) fn within(lists: &[List], summed: &Summed, groups: &[GroupBlocks], times: u64) -> bool {
    let (mut set, mut all) = (BlockSet::default(), 0_u64);
    for group in groups {
        // Offers and expectations list no block twice.
        let _ = set.insert_all(group.group, &group.blocks);
        let tensors = summed.tensors(group.group, LayerScope::All);
        let units = tensors.first().map_or(0, |t| u64::from(t.per_block()));
        let each = units.saturating_mul(tensors.len() as u64);
        all = all.saturating_add(each.saturating_mul(group.blocks.len() as u64));
    }
    let inside = lists.iter().all(|list| {
        let Some(tensor) = list.tensors(summed).first() else {
            return true;
        };
        let mut units = list.units.iter();
        units.all(|unit| set.contains(list.group, tensor.block_of(*unit)))
    });
    inside && count(lists, summed) <= all.saturating_mul(times)
}

/// Sums that are being worked out of an engine's memory.
pub(super) struct Summing {
    engine: Arc<Inner>,
    pub(super) summed: Arc<Summed>,
    pub(super) lists: Vec<List>,
    list: usize,
    unit: usize,
    buffer: Vec<u8>,
    /// Those that have been worked out and not been taken.
    pub(super) sums: Vec<u64>,
}

impl Summing {
    pub(super) const fn new(engine: Arc<Inner>, summed: Arc<Summed>, lists: Vec<List>) -> Self {
        Self {
            engine,
            summed,
            lists,
            list: 0,
            unit: 0,
            buffer: Vec::new(),
            sums: Vec::new(),
        }
    }

    /// Works out those of some more units of one list. `None`: there are no more.
    ///
    /// # Errors
    ///
    /// Memory that cannot be read.
    pub(super) fn turn(&mut self) -> Result<Option<(usize, Range<usize>)>, mem::Error> {
        let Some(list) = self.lists.get(self.list) else {
            return Ok(None);
        };
        let tensors = list.tensors(&self.summed);
        let each: u64 = tensors.iter().map(SummedTensor::bytes).sum();
        let by_bytes = usize::try_from(TURN / each.max(1)).unwrap_or(usize::MAX);
        let by_sums = CHUNK / tensors.len().max(1);
        let most = by_bytes.min(by_sums).max(1);
        let from = self.unit;
        let to = from.saturating_add(most).min(list.units.len());
        for unit in list.units.get(from..to).unwrap_or_default() {
            for tensor in tensors {
                let memory = self.engine.placement.memory();
                let memory = memory.get(tensor.memory as usize);
                let sum = tensor.sum(*unit, &mut self.buffer, |offset, into| match memory {
                    Some(memory) => mem::read(&**memory, offset, into),
                    // A placement's tensors are in its memories.
                    None => Err(mem::Error::OutOfBounds {
                        operation: mem::Operation::Read,
                        offset,
                        len: into.len() as u64,
                        size: 0,
                    }),
                })?;
                self.sums.push(sum);
            }
        }
        let done = (self.list, from..to);
        self.unit = to;
        if to >= list.units.len() {
            (self.list, self.unit) = (self.list + 1, 0);
        }
        Ok(Some(done))
    }
}
