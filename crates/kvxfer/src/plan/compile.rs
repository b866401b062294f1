//! What is worked out once for a pair of ranks.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::cover::Cover;
use super::error::{CompileError, SideName};
use super::geometry::{Shape, UnitPart};
use super::units::Unit;
use crate::layout::reshard::gives_to;
use crate::layout::{
    Half, LayerWindow, LayoutMismatch, Overlap, Pair, Severity, Side, Steps, Units, compare, pairs,
};

/// The most pieces that one unit of every geometry may have together.
const TOTAL_PIECES: u64 = 1 << 22;

/// Operations of fewer bytes than this keep a network card from its line rate: a queue pair takes some
/// ten million of them a second, and at 400 Gb/s that is 5000 bytes each.
pub const SMALL_PIECE: u64 = 4096;

/// What operators are told of pieces of so many bytes, if they are small.
#[must_use]
pub fn small_pieces(bytes: u64) -> Option<String> {
    (bytes < SMALL_PIECE).then(|| format!("{bytes}-byte pieces: expect a fraction of line rate"))
}

/// Which side does the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The consumer reads: the producer's memory is the remote one.
    Pull,
    /// The producer writes: the consumer's memory is the remote one.
    Push,
}

/// Which part of what two ranks both keep is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// All of it.
    Common,
    /// What this producer rank gives this consumer rank. Where several producer ranks keep the same,
    /// one of them gives it ([`reshard`](crate::layout::reshard) says which). So the shares of all
    /// producer ranks are all of what a consumer rank keeps, each byte once where they are dealt evenly.
    Share,
}

/// What of a pair of tensors moves between two ranks; `None`: nothing.
pub(crate) fn moved<'a>(
    pair: &Pair<'a>,
    producer: &Side<'_>,
    consumer: &Side<'_>,
    part: Part,
) -> Option<((Half<'a>, Half<'a>), Overlap)> {
    let both = pair.both()?;
    let overlap = Overlap::of(&both.0, &both.1)?;
    let (p, c) = (producer.placement.topology(), consumer.placement.topology());
    let gives = part == Part::Common || gives_to(&both.0, p, c);
    gives.then_some((both, overlap))
}

/// A pair of ranks that can exchange blocks, ready to plan requests. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Compiled {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) role: Role,
    pub(super) window: LayerWindow,
    pub(super) groups: Vec<Group>,
    pub(super) classes: Vec<Class>,
    /// By class, then layer.
    pub(super) tensors: Vec<TensorPair>,
    cover: Cover,
}

#[derive(Debug)]
pub(super) struct Group {
    /// Its classes in `Inner::classes`; none where nothing of the group moves between these ranks.
    pub(super) classes: Range<usize>,
    /// What its blocks are made of.
    pub(super) units: Units,
    /// 0 where this rank keeps nothing of the group.
    pub(super) producer_blocks: u32,
    pub(super) consumer_blocks: u32,
    /// The pool of its destination blocks.
    pub(super) pool: u32,
    /// Its layers, of all ranks.
    layers: Vec<u32>,
}

impl Group {
    /// Its layers, of all ranks, the lowest first.
    pub(super) fn layers(&self) -> &[u32] {
        &self.layers
    }

    /// Whether the group has this layer, on whatever rank.
    pub(super) fn has(&self, layer: u32) -> bool {
        self.layers.binary_search(&layer).is_ok()
    }

    /// Units of a block and number of blocks on one side.
    pub(super) const fn side(&self, side: SideName) -> (u32, u32) {
        match side {
            SideName::Producer => (self.units.producer, self.producer_blocks),
            SideName::Consumer => (self.units.consumer, self.consumer_blocks),
        }
    }
}

/// Tensors of one group that lie alike.
#[derive(Debug)]
pub(super) struct Class {
    /// Where units begin, from the first one.
    pub(super) remote: Steps,
    pub(super) local: Steps,
    /// Bytes of one unit of one tensor.
    pub(super) bytes: u64,
    /// What one unit is made of.
    pub(super) pieces: Vec<UnitPart>,
    /// In `Inner::tensors`.
    pub(super) tensors: Range<usize>,
}

/// Where one tensor's first unit is on both sides.
#[derive(Debug, Clone, Copy)]
pub(super) struct TensorPair {
    pub(super) remote_base: u64,
    pub(super) local_base: u64,
    pub(super) remote_region: u32,
    pub(super) local_region: u32,
    pub(super) layer: u32,
}

impl Compiled {
    /// Matches two ranks' tensors. Two that have nothing in common, such as different pipeline
    /// stages, make a plan that moves nothing: see [`Compiled::is_empty`].
    ///
    /// # Errors
    ///
    /// Every difference between the layouts at once, where one of them is such that no copy can
    /// bridge it; a placement that is not valid for its format; orders of axes so different that
    /// blocks fall into too many pieces; more units than can be counted.
    pub fn compile(
        producer: &Side<'_>,
        consumer: &Side<'_>,
        role: Role,
        part: Part,
    ) -> Result<Self, CompileError> {
        for (side, name) in [
            (producer, SideName::Producer),
            (consumer, SideName::Consumer),
        ] {
            side.placement
                .validate(side.format)
                .map_err(|source| CompileError::Placement { side: name, source })?;
        }
        let differences = compare(producer, consumer);
        if differences.iter().any(|d| d.severity != Severity::Reshard) {
            return Err(LayoutMismatch { differences }.into());
        }
        let mut shapes = Shapes::new(producer, role);
        let mut cover = Cover::default();
        for pair in pairs(producer, consumer) {
            let moved = moved(&pair, producer, consumer, part);
            cover.add(&pair, moved.as_ref().map(|(_, overlap)| overlap));
            if let Some((both, overlap)) = moved {
                shapes.add(&pair, both, &overlap)?;
            }
        }
        cover.finish();
        let inner = shapes.inner(producer, consumer, cover)?;
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Which side does the work.
    #[must_use]
    pub fn role(&self) -> Role {
        self.inner.role
    }

    /// Whether nothing moves between these ranks.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.inner.tensors.is_empty()
    }

    /// What of the consumer rank's cache this moves.
    #[must_use]
    pub fn cover(&self) -> &Cover {
        &self.inner.cover
    }

    /// The layers that both ranks keep; an empty window where there is none.
    #[must_use]
    pub fn layers(&self) -> LayerWindow {
        self.inner.window
    }

    /// How many blocks a group has at the producer and at the consumer; 0 for a rank that keeps
    /// nothing of it. `None` for a group that the format does not have.
    #[must_use]
    pub fn num_blocks(&self, group: u32) -> Option<(u32, u32)> {
        let group = self.inner.groups.get(usize::try_from(group).ok()?)?;
        Some((group.producer_blocks, group.consumer_blocks))
    }

    /// What a group's blocks are made of on both sides. `None` for a group that the format does not
    /// have.
    #[must_use]
    pub fn unit(&self, group: u32) -> Option<Unit> {
        let group = self.inner.groups.get(usize::try_from(group).ok()?)?;
        Some(Unit::from(group.units))
    }

    /// Bytes that one unit of a group (a block, where blocks are of one size) takes in all layers
    /// that move between these ranks.
    #[must_use]
    pub fn unit_bytes(&self, group: u32) -> Option<u64> {
        let group = self.inner.groups.get(usize::try_from(group).ok()?)?;
        let classes = self.inner.classes.get(group.classes.clone())?;
        // Saturation needs more bytes than an address space has.
        Some(classes.iter().fold(0, |sum, c| {
            sum.saturating_add(c.bytes.saturating_mul(c.tensors.len() as u64))
        }))
    }

    /// Bytes that one unit of a group takes in one layer, of what moves between these ranks. `None` for a group that
    /// the format does not have, and for a layer that is not in it or that the two ranks do not both keep.
    #[must_use]
    pub fn layer_bytes(&self, group: u32, layer: u32) -> Option<u64> {
        let group = self.inner.groups.get(usize::try_from(group).ok()?)?;
        if !group.has(layer) || !self.inner.window.contains(layer) {
            return None;
        }
        let classes = self.inner.classes.get(group.classes.clone())?;
        Some(classes.iter().fold(0_u64, |sum, class| {
            let tensors = self.inner.tensors.get(class.tensors.clone());
            let tensors = tensors.unwrap_or(&[]);
            let first = tensors.partition_point(|t| t.layer < layer);
            let end = tensors.partition_point(|t| t.layer <= layer);
            sum.saturating_add(class.bytes.saturating_mul((end - first) as u64))
        }))
    }

    /// The longest stretch that is contiguous on both sides, of the geometry where that is
    /// shortest: small ones mean a fraction of line rate.
    #[must_use]
    pub fn smallest_piece(&self) -> Option<u64> {
        let classes = self.inner.classes.iter();
        classes
            .filter_map(|c| c.pieces.first().map(|p| p.len))
            .min()
    }
}

/// Tensors by group and by how they lie.
struct Shapes<'a> {
    producer: Side<'a>,
    role: Role,
    by_group: Vec<HashMap<Shape, Vec<TensorPair>>>,
    pieces: u64,
}

impl<'a> Shapes<'a> {
    fn new(producer: &Side<'a>, role: Role) -> Self {
        let mut by_group = Vec::new();
        by_group.resize_with(producer.format.groups().len(), HashMap::new);
        Self {
            producer: *producer,
            role,
            by_group,
            pieces: 0,
        }
    }

    fn add(
        &mut self,
        pair: &Pair<'_>,
        (p, c): (Half<'_>, Half<'_>),
        overlap: &Overlap,
    ) -> Result<(), CompileError> {
        let format = self.producer.format;
        let tensor = || format.tensor_label(pair.group, pair.layer, p.plane.tensor);
        let laid = overlap.lay(&p, &c, pair.units);
        let group = usize::try_from(pair.group).ok();
        let shapes = group.and_then(|g| self.by_group.get_mut(g));
        // The comparison found that both sides can be cut alike.
        let (Some((p_laid, c_laid)), Some(shapes)) = (laid, shapes) else {
            return Err(CompileError::Unmatched { tensor: tensor() });
        };
        let (remote, local) = match self.role {
            Role::Pull => ((&p_laid, p.placed), (&c_laid, c.placed)),
            Role::Push => ((&c_laid, c.placed), (&p_laid, p.placed)),
        };
        let element = p.plane.format.dtype.bytes();
        let Some(shape) = Shape::new(element, remote.0, local.0) else {
            return Err(CompileError::Unmatched { tensor: tensor() });
        };
        if !shapes.contains_key(&shape) {
            self.pieces = self.pieces.saturating_add(shape.pieces_len());
            if self.pieces > TOTAL_PIECES {
                return Err(CompileError::TooFine {
                    tensor: tensor(),
                    pieces: self.pieces,
                    max: TOTAL_PIECES,
                });
            }
        }
        shapes.entry(shape).or_default().push(TensorPair {
            remote_base: remote.0.base,
            local_base: local.0.base,
            remote_region: remote.1.memory,
            local_region: local.1.memory,
            layer: pair.layer,
        });
        Ok(())
    }

    fn inner(
        self,
        producer: &Side<'_>,
        consumer: &Side<'_>,
        cover: Cover,
    ) -> Result<Inner, CompileError> {
        let (p, c) = (producer.placement.topology(), consumer.placement.topology());
        let first = p.layers.first.max(c.layers.first);
        let window = LayerWindow {
            first,
            end: p.layers.end.min(c.layers.end).max(first),
        };
        let mut inner = Inner {
            role: self.role,
            window,
            groups: Vec::with_capacity(self.by_group.len()),
            classes: Vec::new(),
            tensors: Vec::new(),
            cover,
        };
        let formats = producer
            .format
            .groups()
            .iter()
            .zip(consumer.format.groups());
        let groups = (0_u32..).zip(self.by_group).zip(formats);
        for (((g, shapes), (pg, cg)), pool) in groups.zip(consumer.placement.pools()) {
            let first_class = inner.classes.len();
            let mut shapes: Vec<_> = shapes.into_iter().collect();
            for (_, pairs) in &mut shapes {
                pairs.sort_by_key(|p| (p.layer, p.remote_region, p.remote_base));
            }
            // In the order of their first tensors, so that a plan is the same every time.
            shapes.sort_by_key(|(_, pairs)| {
                pairs
                    .first()
                    .map(|p| (p.layer, p.remote_region, p.remote_base))
            });
            for (shape, pairs) in shapes {
                let first = inner.tensors.len();
                inner.tensors.extend(pairs);
                inner.classes.push(Class {
                    remote: shape.remote,
                    local: shape.local,
                    bytes: shape.bytes(),
                    pieces: shape.pieces(),
                    tensors: first..inner.tensors.len(),
                });
            }
            // The kinds of groups are the same, so that both sizes are 0 or none is.
            let units = Units::of(pg.block_tokens, cg.block_tokens);
            let group = Group {
                classes: first_class..inner.classes.len(),
                units: units.unwrap_or(Units {
                    tokens: 0,
                    producer: 1,
                    consumer: 1,
                }),
                producer_blocks: producer.placement.num_blocks(g).unwrap_or(0),
                consumer_blocks: consumer.placement.num_blocks(g).unwrap_or(0),
                pool: *pool,
                layers: pg.layers.iter().map(|l| l.layer).collect(),
            };
            for side in [SideName::Producer, SideName::Consumer] {
                let (per_block, blocks) = group.side(side);
                if blocks.checked_mul(per_block).is_none() {
                    return Err(CompileError::TooManyUnits {
                        side,
                        group: g,
                        blocks,
                        per_block,
                    });
                }
            }
            inner.groups.push(group);
        }
        Ok(inner)
    }
}
