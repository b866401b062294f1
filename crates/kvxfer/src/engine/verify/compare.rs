//! Sums of lists of units, and where two sides' sums differ.

use kvxfer_hipmem as mem;

use super::Unverified;
use crate::engine::Inner;
use crate::ids::RequestId;
use crate::plan::{LayerScope, Plan, SideName};
use crate::sums::{Summed, SummedTensor};
use crate::transfer::{Cause, Corrupt};
use crate::wire::SumsOf;

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

/// Why sums were not worked out.
#[derive(Debug)]
pub(super) enum Stopped {
    /// Nobody waits for them any more.
    Unwanted,
    /// Memory could not be read.
    Read(mem::Error),
}

/// Works sums out of an engine's memory.
pub(super) struct Summing<'a> {
    pub(super) engine: &'a Inner,
    /// Whether they are still wanted.
    pub(super) wanted: &'a dyn Fn() -> bool,
    pub(super) buffer: Vec<u8>,
}

impl<'a> Summing<'a> {
    pub(super) const fn new(engine: &'a Inner, wanted: &'a dyn Fn() -> bool) -> Self {
        Self {
            engine,
            wanted,
            buffer: Vec::new(),
        }
    }

    /// Adds the sums of one unit.
    pub(super) fn unit(
        &mut self,
        tensors: &[SummedTensor],
        unit: u32,
        out: &mut Vec<u64>,
    ) -> Result<(), Stopped> {
        if !(self.wanted)() {
            return Err(Stopped::Unwanted);
        }
        for tensor in tensors {
            let memory = self.engine.placement.memory();
            let memory = memory.get(tensor.memory as usize);
            let sum = tensor.sum(unit, &mut self.buffer, |offset, into| match memory {
                Some(memory) => mem::read(&**memory, offset, into),
                // A placement's tensors are in its memories.
                None => Err(mem::Error::OutOfBounds {
                    operation: mem::Operation::Read,
                    offset,
                    len: into.len() as u64,
                    size: 0,
                }),
            });
            out.push(sum.map_err(Stopped::Read)?);
        }
        Ok(())
    }

    /// The sums of lists, in their order.
    pub(super) fn lists(&mut self, lists: &[List], summed: &Summed) -> Result<Vec<u64>, Stopped> {
        let mut out = Vec::new();
        for list in lists {
            let tensors = list.tensors(summed);
            for unit in &list.units {
                self.unit(tensors, *unit, &mut out)?;
            }
        }
        Ok(out)
    }
}

/// Compares the sums of a request's units on both sides, the consumer's lists being `lists`. `None`: they
/// are the same, and as many.
pub(super) fn compare(
    engine: &Inner,
    request: &RequestId,
    (lists, summed): (&[List], &Summed),
    (here, there): (&[u64], &[u64]),
) -> Option<Unverified> {
    if here == there {
        return None;
    }
    let mut sums = here.iter().zip(there);
    let mut first = None;
    let mut blocks = Vec::new();
    for list in lists {
        let tensors = list.tensors(summed);
        for unit in &list.units {
            for tensor in tensors {
                let Some((here, there)) = sums.next() else {
                    break;
                };
                if here == there {
                    continue;
                }
                let block = tensor.block_of(*unit);
                first.get_or_insert((list.group, tensor, block, *here, *there));
                blocks.push((list.group, block));
            }
        }
    }
    blocks.sort_unstable();
    blocks.dedup();
    let Some((group, tensor, block, here, there)) = first else {
        // Not as many: it can only be a defect of one of the two sides.
        return Some(Cause::LostWork { missing: 1 }.into());
    };
    let format = engine.format.tensor(group, tensor.layer, tensor.tensor);
    let corrupt = Corrupt {
        request: request.clone(),
        group,
        layer: tensor.layer,
        tensor: format.map_or_else(String::new, |tensor| tensor.name.to_string()),
        block,
        here,
        there,
        blocks: blocks.len() as u64,
    };
    let cause = Cause::Corrupt(Box::new(corrupt));
    Some(Unverified { cause, blocks })
}
