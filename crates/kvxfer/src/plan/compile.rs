//! What is worked out once for a pair of ranks.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use super::error::{CompileError, SideName};
use super::geometry::{BlockPiece, Shape};
use crate::layout::{LayerWindow, LayoutMismatch, PlacedTensor, Side, TensorFormat, compare};

/// The most pieces that one block of every geometry may have together.
const TOTAL_PIECES: u64 = 1 << 22;

/// Which side does the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The consumer reads: the producer's memory is the remote one.
    Pull,
    /// The producer writes: the consumer's memory is the remote one.
    Push,
}

/// A pair of ranks whose layouts match, ready to plan requests. Cheap to clone.
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
}

#[derive(Debug)]
pub(super) struct Group {
    /// Its classes in `Inner::classes`; none where these ranks keep nothing of the group.
    pub(super) classes: Range<usize>,
    pub(super) producer_blocks: u32,
    pub(super) consumer_blocks: u32,
    /// The pool of its destination blocks.
    pub(super) pool: u32,
}

/// Tensors of one group that lie alike.
#[derive(Debug)]
pub(super) struct Class {
    pub(super) remote_stride: u64,
    pub(super) local_stride: u64,
    /// Bytes of one block of one tensor.
    pub(super) bytes: u64,
    pub(super) pieces: Vec<BlockPiece>,
    /// In `Inner::tensors`.
    pub(super) tensors: Range<usize>,
}

/// Where one tensor is on both sides.
#[derive(Debug, Clone, Copy)]
pub(super) struct TensorPair {
    pub(super) remote_base: u64,
    pub(super) local_base: u64,
    pub(super) remote_region: u32,
    pub(super) local_region: u32,
    pub(super) layer: u32,
}

impl Compiled {
    /// Matches two ranks' tensors.
    ///
    /// # Errors
    ///
    /// Every difference between the layouts at once; a placement that is not valid for its format;
    /// or orders of axes so different that blocks fall into too many pieces.
    pub fn compile(
        producer: &Side<'_>,
        consumer: &Side<'_>,
        role: Role,
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
        if !differences.is_empty() {
            return Err(LayoutMismatch { differences }.into());
        }
        let (remote, local) = match role {
            Role::Pull => (producer, consumer),
            Role::Push => (consumer, producer),
        };
        let local_tensors: BTreeMap<_, _> = placed(local).collect();
        let mut by_shape: Vec<HashMap<Shape, Vec<TensorPair>>> = Vec::new();
        by_shape.resize_with(remote.format.groups().len(), HashMap::new);
        let mut total_pieces = 0_u64;
        for (key, (format, at)) in placed(remote) {
            // The comparison found the same tensors with the same axes on both sides.
            let other = local_tensors.get(&key);
            let shape = other.and_then(|other| Shape::new((format, at), *other));
            let group = usize::try_from(at.group).ok();
            let shapes = group.and_then(|g| by_shape.get_mut(g));
            let (Some((_, other)), Some(shape), Some(shapes)) = (other, shape, shapes) else {
                return Err(CompileError::Unmatched {
                    tensor: remote.format.tensor_label(at.group, at.layer, at.tensor),
                });
            };
            if !shapes.contains_key(&shape) {
                let pieces = shape.pieces_len();
                total_pieces = total_pieces.saturating_add(pieces);
                if total_pieces > TOTAL_PIECES {
                    return Err(CompileError::TooFine {
                        tensor: remote.format.tensor_label(at.group, at.layer, at.tensor),
                        pieces: total_pieces,
                        max: TOTAL_PIECES,
                    });
                }
            }
            shapes.entry(shape).or_default().push(TensorPair {
                remote_base: at.offset,
                local_base: other.offset,
                remote_region: at.memory,
                local_region: other.memory,
                layer: at.layer,
            });
        }
        let mut inner = Inner {
            role,
            window: remote.placement.topology().layers,
            groups: Vec::with_capacity(by_shape.len()),
            classes: Vec::new(),
            tensors: Vec::new(),
        };
        for ((g, shapes), pool) in (0_u32..).zip(by_shape).zip(consumer.placement.pools()) {
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
                    remote_stride: shape.remote_stride,
                    local_stride: shape.local_stride,
                    bytes: shape.bytes(),
                    pieces: shape.pieces(),
                    tensors: first..inner.tensors.len(),
                });
            }
            inner.groups.push(Group {
                classes: first_class..inner.classes.len(),
                producer_blocks: producer.placement.num_blocks(g).unwrap_or(0),
                consumer_blocks: consumer.placement.num_blocks(g).unwrap_or(0),
                pool: *pool,
            });
        }
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Which side does the work.
    #[must_use]
    pub fn role(&self) -> Role {
        self.inner.role
    }

    /// The layers that both ranks keep.
    #[must_use]
    pub fn layers(&self) -> LayerWindow {
        self.inner.window
    }

    /// How many blocks a group has at the producer and at the consumer; zeros where these ranks
    /// keep nothing of it. `None` for a group that the format does not have.
    #[must_use]
    pub fn num_blocks(&self, group: u32) -> Option<(u32, u32)> {
        let group = self.inner.groups.get(usize::try_from(group).ok()?)?;
        Some((group.producer_blocks, group.consumer_blocks))
    }

    /// Bytes that one block of a group takes in all layers of these ranks.
    #[must_use]
    pub fn block_bytes(&self, group: u32) -> Option<u64> {
        let group = self.inner.groups.get(usize::try_from(group).ok()?)?;
        let classes = self.inner.classes.get(group.classes.clone())?;
        // Saturation needs more bytes than an address space has.
        Some(classes.iter().fold(0, |sum, c| {
            sum.saturating_add(c.bytes.saturating_mul(c.tensors.len() as u64))
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

type Key<'a> = (u32, u32, &'a str);

/// A side's tensors with their formats, by group, layer and name.
fn placed<'a>(
    side: &Side<'a>,
) -> impl Iterator<Item = (Key<'a>, (&'a TensorFormat, &'a PlacedTensor))> {
    let format = side.format;
    side.placement.tensors().iter().filter_map(move |t| {
        let tensor = format.tensor(t.group, t.layer, t.tensor)?;
        Some(((t.group, t.layer, tensor.name.as_str()), (tensor, t)))
    })
}
