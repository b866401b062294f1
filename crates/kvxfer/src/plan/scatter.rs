//! Plans in the words of a kernel that copies scattered blocks: what stays the same for all requests of two ranks,
//! and what one request wants of it. There are no operations then.

use std::ops::Range;
use std::sync::Arc;

use super::Role;
use super::compile::{Class, Compiled, TensorPair};
use super::error::SideName;
use super::geometry::UnitPart;
use super::lazy::{Plan, Section, unpack};
use crate::layout::Steps;

/// Tensors that lie alike. Blocks begin at multiples of a *step* from where the first one does, on each side, and
/// are named by them: by their number, mostly.
#[derive(Debug)]
pub struct Scattered<'a> {
    /// Bytes from one step to the next at the remote side.
    pub remote_step: u64,
    /// The same at the local side.
    pub local_step: u64,
    /// How many steps there are at the remote side.
    pub remote_steps: u32,
    /// The same at the local side.
    pub local_steps: u32,
    pieces: &'a [UnitPart],
    tensors: &'a [TensorPair],
}

/// A tensor's first block on one side: the memory, and bytes from its beginning.
pub type At = (u32, u64);

impl<'a> Scattered<'a> {
    /// The stretches of a block that are contiguous on both sides: where they begin, remote and local, in bytes
    /// from where the block does; and their bytes.
    #[must_use]
    pub fn pieces(&self) -> impl ExactSizeIterator<Item = (u64, u64, u64)> + use<'a> {
        self.pieces.iter().map(|p| (p.remote, p.local, p.len))
    }

    /// The tensors, remote and local, in the order in which requests name them.
    #[must_use]
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (At, At)> + use<'a> {
        let tensors = self.tensors.iter();
        tensors.map(|t| {
            let remote = (t.remote_region, t.remote_base);
            (remote, (t.local_region, t.local_base))
        })
    }
}

/// What a request wants of tensors that lie alike.
#[derive(Debug)]
pub struct ScatteredPart {
    /// Their place in [`Compiled::scattered`].
    pub class: usize,
    /// Those that are meant.
    pub tensors: Range<usize>,
    /// The blocks, by their steps: remote and local.
    pub pairs: Vec<(u32, u32)>,
}

fn gcd(a: u64, b: u64) -> u64 {
    match b {
        0 => a,
        b => gcd(b, a % b),
    }
}

impl Steps {
    /// What all its units begin at a multiple of.
    fn grain(self) -> u64 {
        match self {
            Self::Even(step) => step.max(1),
            Self::Blocks { block, unit, .. } => gcd(block, unit).max(1),
        }
    }

    /// The step that a unit begins at.
    fn step(self, unit: u32) -> Option<u32> {
        u32::try_from(self.at(unit) / self.grain()).ok()
    }

    /// How many steps so many units reach over.
    fn reach(self, units: u32) -> Option<u32> {
        match units.checked_sub(1) {
            Some(last) => self.step(last)?.checked_add(1),
            None => Some(0),
        }
    }
}

impl Class {
    fn scattered<'a>(
        &'a self,
        tensors: &'a [TensorPair],
        (remote, local): (u32, u32),
    ) -> Option<Scattered<'a>> {
        Some(Scattered {
            remote_step: self.remote.grain(),
            local_step: self.local.grain(),
            remote_steps: self.remote.reach(remote)?,
            local_steps: self.local.reach(local)?,
            pieces: &self.pieces,
            tensors: tensors.get(self.tensors.clone())?,
        })
    }
}

impl Compiled {
    /// Everything that requests can want, for a kernel that copies blocks. `None` where blocks cannot be
    /// counted in 32 bits.
    #[must_use]
    pub fn scattered(&self) -> Option<Vec<Scattered<'_>>> {
        let inner = &*self.inner;
        let mut all = Vec::with_capacity(inner.classes.len());
        for group in &inner.groups {
            // No more than 2^32 of either: that was checked when they were compiled.
            let units = |side| {
                let (per_block, blocks) = group.side(side);
                per_block.saturating_mul(blocks)
            };
            let (producer, consumer) = (units(SideName::Producer), units(SideName::Consumer));
            let units = match inner.role {
                Role::Pull => (producer, consumer),
                Role::Push => (consumer, producer),
            };
            for class in inner.classes.get(group.classes.clone())? {
                all.push(class.scattered(&inner.tensors, units)?);
            }
        }
        Some(all)
    }
}

impl Compiled {
    /// Whether the two are clones of each other.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }
}

impl Plan {
    /// Whether it is one of this pair of ranks.
    #[must_use]
    pub fn is_of(&self, compiled: &Compiled) -> bool {
        Arc::ptr_eq(&self.inner, &compiled.inner)
    }

    /// What it wants. `None` where blocks cannot be counted in 32 bits.
    #[must_use]
    pub fn scattered(&self) -> Option<Vec<ScatteredPart>> {
        let part = |section: &Section| {
            let class = self.inner.classes.get(section.class)?;
            let (first, end) = (section.tensors.start, section.tensors.end);
            let from = class.tensors.start;
            let pairs = self.pairs.get(section.pairs.clone())?.iter();
            let steps = |pair: &u64| {
                let (remote, local) = unpack(*pair);
                Some((class.remote.step(remote)?, class.local.step(local)?))
            };
            Some(ScatteredPart {
                class: section.class,
                tensors: first.checked_sub(from)?..end.checked_sub(from)?,
                pairs: pairs.map(steps).collect::<Option<_>>()?,
            })
        };
        self.sections.iter().map(part).collect()
    }
}
