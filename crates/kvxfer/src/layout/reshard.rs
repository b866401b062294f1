//! Which ranks exchange blocks where the two sides are cut otherwise.
//!
//! Where several producer ranks keep the same (a latent, a scale, replicated heads), one of them
//! gives it to a consumer rank: the one that the consumer rank *faces* where the two rows of ranks are
//! laid side by side, or the one in its place among those that keep the part, counted on by the
//! consumer's data-parallel rank. So a consumer rank takes what all have from a rank that it takes
//! heads from anyhow, where there is one data-parallel rank, and where there are several they spread
//! over the replicas. Two ranks that know each other's placement find this out by themselves.

use std::collections::BTreeMap;

use super::check::at_most;
use super::laid::{Half, Overlap};
use super::planes::{Plane, matching};
use super::{KvFormat, LayerWindow, LayoutError, PlacedTensor, Shard, Topology, limits};
use crate::ids::Rank;

/// How the ranks of one data-parallel rank share out a model: heads dealt evenly to `tp` ranks, and
/// layers to `pp` stages, as [`LayerWindow::even`] does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Parallel {
    /// Tensor-parallel ranks.
    pub tp: u32,
    /// Pipeline stages.
    pub pp: u32,
    /// Which data-parallel rank it is.
    pub dp: u32,
}

impl Parallel {
    /// Every rank of the data-parallel rank, stage by stage.
    pub fn ranks(self, format: &KvFormat) -> impl Iterator<Item = Topology> {
        let layers = format.layers();
        (0..self.pp).flat_map(move |pp| {
            (0..self.tp).map(move |tp| Topology {
                rank: Rank {
                    dp: self.dp,
                    pp,
                    tp,
                },
                tp: self.tp,
                pp: self.pp,
                dp: self.dp.saturating_add(1),
                layers: LayerWindow::even(layers, pp, self.pp),
            })
        })
    }
}

/// The producer ranks that a consumer rank takes something from, stage by stage.
/// With the two sides' formats, which may deal out other tensors.
///
/// # Errors
///
/// Heads that cannot be dealt evenly to either side's ranks, or more producer ranks than
/// [`limits::RANKS`].
pub fn sources(
    (p_format, producers): (&KvFormat, Parallel),
    (c_format, consumer): (&KvFormat, &Topology),
) -> Result<Vec<Rank>, LayoutError> {
    let takes = Part::of(c_format, consumer)?;
    chosen(p_format, producers, |gives| gives.exchanges(&takes))
}

/// The consumer ranks that take something from a producer rank, stage by stage.
///
/// # Errors
///
/// As [`sources`], with the sides exchanged.
pub fn takers(
    (p_format, producer): (&KvFormat, &Topology),
    (c_format, consumers): (&KvFormat, Parallel),
) -> Result<Vec<Rank>, LayoutError> {
    let gives = Part::of(p_format, producer)?;
    chosen(c_format, consumers, |takes| gives.exchanges(takes))
}

/// The ranks that are meant.
fn chosen(
    format: &KvFormat,
    ranks: Parallel,
    is_meant: impl Fn(&Part<'_>) -> bool,
) -> Result<Vec<Rank>, LayoutError> {
    let count = u64::from(ranks.tp).saturating_mul(u64::from(ranks.pp));
    at_most("ranks", count, limits::RANKS)?;
    let mut out = Vec::new();
    for topology in ranks.ranks(format) {
        if is_meant(&Part::of(format, &topology)?) {
            out.push(topology.rank);
        }
    }
    Ok(out)
}

/// What falls to a rank where all is dealt evenly.
struct Part<'a> {
    format: &'a KvFormat,
    topology: Topology,
    /// By group, layer and tensor.
    tensors: BTreeMap<(u32, u32, u32), PlacedTensor>,
}

impl<'a> Part<'a> {
    fn of(format: &'a KvFormat, topology: &Topology) -> Result<Self, LayoutError> {
        let mut tensors = BTreeMap::new();
        for (group, g) in (0_u32..).zip(format.groups()) {
            for layer in &g.layers {
                for (t, tensor) in (0_u32..).zip(&layer.tensors) {
                    let path = || format.tensor_label(group, layer.layer, t);
                    let shard = Shard::of(tensor, topology, path)?;
                    if !topology.layers.contains(layer.layer) {
                        continue;
                    }
                    // Only its shard is looked at.
                    let placed = PlacedTensor {
                        group,
                        layer: layer.layer,
                        tensor: t,
                        memory: 0,
                        offset: 0,
                        block_stride: 0,
                        num_blocks: 1,
                        strides: Vec::new(),
                        shard,
                    };
                    tensors.insert((group, layer.layer, t), placed);
                }
            }
        }
        Ok(Self {
            format,
            topology: *topology,
            tensors,
        })
    }

    /// Whether this producer rank gives that consumer rank anything.
    fn exchanges(&self, consumer: &Self) -> bool {
        let groups = self.format.groups().iter().zip(consumer.format.groups());
        let both_keep = |layer: u32| {
            let keeps = |part: &Self| part.topology.layers.contains(layer);
            keeps(self) && keeps(consumer)
        };
        for (g, (pg, cg)) in (0_u32..).zip(groups) {
            for layer in pg.layers.iter().filter(|l| both_keep(l.layer)) {
                let Some(other) = cg.layer(layer.layer) else {
                    continue;
                };
                let gives = |(p, c): (Plane<'_>, Plane<'_>)| {
                    let p_placed = self.tensors.get(&(g, layer.layer, p.tensor))?;
                    let c_placed = consumer.tensors.get(&(g, layer.layer, c.tensor))?;
                    let p = Half {
                        plane: p,
                        placed: p_placed,
                    };
                    let c = Half {
                        plane: c,
                        placed: c_placed,
                    };
                    Overlap::of(&p, &c)?;
                    gives_to(&p, &self.topology, &consumer.topology).then_some(())
                };
                let mut pairs = matching(layer, other).pairs.into_iter();
                if pairs.any(|pair| gives(pair).is_some()) {
                    return true;
                }
            }
        }
        false
    }
}

/// Whether of the producer ranks that keep this part this one gives it to the consumer rank.
pub(crate) fn gives_to(producer: &Half<'_>, topology: &Topology, consumer: &Topology) -> bool {
    let replicas = replicas(producer, topology);
    let place = u64::from(facing(topology.tp, consumer)) + u64::from(consumer.rank.dp);
    u64::from(topology.rank.tp % replicas) == place % u64::from(replicas)
}

/// The one of `tp` producer ranks that a consumer rank faces.
fn facing(tp: u32, consumer: &Topology) -> u32 {
    let (rank, ranks) = (u64::from(consumer.rank.tp), u64::from(consumer.tp.max(1)));
    u32::try_from(rank * u64::from(tp) / ranks).unwrap_or(0)
}

/// How many neighbouring ranks keep the same part as this one: all, where it is not dealt out;
/// several, where the heads are dealt evenly and there are fewer of them. 1 where this rank's part
/// is not what an even deal gives it, for then nothing is known of the others.
fn replicas(producer: &Half<'_>, topology: &Topology) -> u32 {
    let Some((kind, shard)) = producer.shard() else {
        return topology.tp.max(1);
    };
    let extent = producer.plane.format.extent_of(kind);
    let kept = u64::from(topology.tp).saturating_mul(shard.count);
    if shard.count == 0 || extent == 0 || !kept.is_multiple_of(extent) {
        return 1;
    }
    let replicas = kept / extent;
    let dealt = replicas > 0
        && shard.first.is_multiple_of(shard.count)
        && shard.first / shard.count == u64::from(topology.rank.tp) / replicas;
    match u32::try_from(replicas) {
        Ok(replicas) if dealt => replicas,
        _ => 1,
    }
}
