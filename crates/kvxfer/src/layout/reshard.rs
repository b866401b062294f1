//! Which ranks exchange blocks where the two sides are cut otherwise.
//!
//! Where several producer ranks keep the same (a latent, a scale, replicated heads), one of them
//! gives it to a consumer rank: the one whose place among them is the consumer's tensor-parallel
//! rank, counted round. Two ranks that know each other's placement find this out by themselves; and
//! readers spread over the replicas.

use super::check::at_most;
use super::laid::{Half, Overlap};
use super::planes::Plane;
use super::{
    KvFormat, LayerWindow, LayoutError, PlacedTensor, Shard, TensorFormat, Topology, limits,
};
use crate::ids::Rank;

/// How the ranks of one data-parallel rank share out a model: heads dealt evenly to `tp` ranks, and
/// layers to `pp` stages, as [`LayerWindow::even`] does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Parallel {
    /// Tensor-parallel ranks.
    pub tp: u32,
    /// Pipeline stages.
    pub pp: u32,
}

impl Parallel {
    /// Every rank of data-parallel rank 0, stage by stage.
    pub fn ranks(self, format: &KvFormat) -> impl Iterator<Item = Topology> {
        let layers = format.layers();
        (0..self.pp).flat_map(move |pp| {
            (0..self.tp).map(move |tp| Topology {
                rank: Rank { dp: 0, pp, tp },
                tp: self.tp,
                pp: self.pp,
                dp: 1,
                layers: LayerWindow::even(layers, pp, self.pp),
            })
        })
    }
}

/// The producer ranks that a consumer rank takes something from, stage by stage; their `dp` is 0.
///
/// # Errors
///
/// Heads that cannot be dealt evenly to either side's ranks, or more producer ranks than
/// [`limits::RANKS`].
pub fn sources(
    format: &KvFormat,
    producers: Parallel,
    consumer: &Topology,
) -> Result<Vec<Rank>, LayoutError> {
    evenly(format, consumer)?;
    let gives = |producer: &Topology| exchange(format, producer, consumer);
    chosen(format, producers, gives)
}

/// The consumer ranks that take something from a producer rank, stage by stage; their `dp` is 0.
///
/// # Errors
///
/// As [`sources`], with the sides exchanged.
pub fn takers(
    format: &KvFormat,
    producer: &Topology,
    consumers: Parallel,
) -> Result<Vec<Rank>, LayoutError> {
    evenly(format, producer)?;
    let takes = |consumer: &Topology| exchange(format, producer, consumer);
    chosen(format, consumers, takes)
}

/// The ranks that are meant.
fn chosen(
    format: &KvFormat,
    ranks: Parallel,
    is_meant: impl Fn(&Topology) -> Result<bool, LayoutError>,
) -> Result<Vec<Rank>, LayoutError> {
    let count = u64::from(ranks.tp).saturating_mul(u64::from(ranks.pp));
    at_most("ranks", count, limits::RANKS)?;
    let mut out = Vec::new();
    for topology in ranks.ranks(format) {
        if out.is_empty() && topology.rank == Rank::default() {
            evenly(format, &topology)?;
        }
        if is_meant(&topology)? {
            out.push(topology.rank);
        }
    }
    Ok(out)
}

/// Refuses a rank to whose like not every tensor can be dealt.
fn evenly(format: &KvFormat, topology: &Topology) -> Result<(), LayoutError> {
    for (g, layer, t, tensor) in tensors(format) {
        Shard::of(tensor, topology, || format.tensor_label(g, layer, t))?;
    }
    Ok(())
}

/// Whether the producer rank gives the consumer rank anything, both dealt evenly.
fn exchange(
    format: &KvFormat,
    producer: &Topology,
    consumer: &Topology,
) -> Result<bool, LayoutError> {
    for (g, layer, t, tensor) in tensors(format) {
        if !producer.layers.contains(layer) || !consumer.layers.contains(layer) {
            continue;
        }
        let part = |topology| {
            let path = || format.tensor_label(g, layer, t);
            Shard::of(tensor, topology, path).map(|shard| PlacedTensor {
                group: g,
                layer,
                tensor: t,
                memory: 0,
                offset: 0,
                block_stride: 0,
                num_blocks: 1,
                strides: Vec::new(),
                shard,
            })
        };
        let (p, c) = (part(producer)?, part(consumer)?);
        let plane = Plane::whole((t, tensor));
        let (p, c) = (Half { plane, placed: &p }, Half { plane, placed: &c });
        if Overlap::of(&p, &c).is_some() && gives_to(&p, producer, consumer) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Every tensor with its group, layer and index.
fn tensors(format: &KvFormat) -> impl Iterator<Item = (u32, u32, u32, &TensorFormat)> {
    let groups = (0_u32..).zip(format.groups());
    groups.flat_map(|(g, group)| {
        group.layers.iter().flat_map(move |layer| {
            let indexed = (0_u32..).zip(&layer.tensors);
            indexed.map(move |(t, tensor)| (g, layer.layer, t, tensor))
        })
    })
}

/// Whether of the producer ranks that keep this part this one gives it to the consumer rank.
pub(crate) fn gives_to(producer: &Half<'_>, topology: &Topology, consumer: &Topology) -> bool {
    let replicas = replicas(producer, topology);
    topology.rank.tp % replicas == consumer.rank.tp % replicas
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
