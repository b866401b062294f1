//! What a block is: groups, layers, tensors, axes.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::check::{at_most, check_group, check_identity, check_name};
use super::{Axis, AxisKind, DType, LayoutError, ModelIdentity, Scaling};

/// The most of everything that a format may have. Real caches stay far below; the limits keep a
/// hostile one from costing more than its bytes.
pub mod limits {
    /// Cache groups.
    pub const GROUPS: usize = 64;
    /// Layers of the whole model.
    pub const LAYERS: u32 = 4096;
    /// Tensors of all groups and layers together.
    pub const TENSORS: usize = 65_536;
    /// Tensors of one layer of a group.
    pub const LAYER_TENSORS: usize = 256;
    /// Axes of a tensor.
    pub const AXES: usize = 8;
    /// Bytes of a name.
    pub const NAME: usize = 256;
    /// Facts of a model's identity.
    pub const FACTS: usize = 128;
    /// Tensor-parallel ranks times pipeline stages.
    pub const RANKS: u64 = 4096;
    /// Constant scales of a tensor.
    pub const SCALES: usize = 4096;
    /// Bytes of one block of one tensor.
    pub const BLOCK_BYTES: u64 = 1 << 48;
    /// Contiguous pieces of one block of one tensor.
    pub const PIECES: u64 = 1 << 20;
}

/// How a cache group's blocks are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum GroupKind {
    /// Every token is kept.
    Full,
    /// Only the last `tokens` tokens are kept.
    SlidingWindow {
        /// Tokens of the window.
        tokens: u32,
    },
    /// One slot a request (recurrent and convolution state); a block is a slot.
    StateSlots,
}

/// What a tensor holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum TensorRole {
    /// Keys.
    Key,
    /// Values.
    Value,
    /// Keys and values in one tensor, along a `Kv` axis.
    KeyValue,
    /// A compressed latent (MLA), with its rope part if that is not apart.
    Latent,
    /// The rope part of a latent, where it is a tensor of its own.
    Rope,
    /// Scales of another tensor.
    Scale,
    /// An indexer's cache.
    Index,
    /// A recurrent state.
    State,
    /// A convolution's state.
    Conv,
    /// Bytes with no meaning to us.
    Opaque,
}

impl fmt::Display for GroupKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => f.write_str("every token"),
            Self::SlidingWindow { tokens } => write!(f, "a window of {tokens} tokens"),
            Self::StateSlots => f.write_str("one slot a request"),
        }
    }
}

impl fmt::Display for TensorRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Key => "keys",
            Self::Value => "values",
            Self::KeyValue => "keys and values",
            Self::Latent => "latent",
            Self::Rope => "rope",
            Self::Scale => "scales",
            Self::Index => "index",
            Self::State => "state",
            Self::Conv => "convolution",
            Self::Opaque => "opaque",
        })
    }
}

/// One tensor of a layer: what one of its blocks holds.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TensorFormat {
    /// Its name, unique in its layer (`k`, `v`, `latent`). The two sides' tensors are matched by it.
    pub name: String,
    /// What it holds.
    pub role: TensorRole,
    /// Its elements' type.
    pub dtype: DType,
    /// The axes of a block with whole-model extents. Their order is the order of a dense placement;
    /// a placement may have any strides. A kind that is there twice is one index in two digits; see
    /// [`AxisKind`].
    pub axes: Vec<Axis>,
    /// Index of the axis that tensor parallelism deals out, the only one of its kind; `None`: every
    /// rank has the whole tensor.
    #[serde(default)]
    pub sharded: Option<u32>,
    /// Its scales, for a quantised tensor; `None`: its numbers stand for themselves.
    #[serde(default)]
    pub scaling: Option<Scaling>,
}

/// One layer of a cache group.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LayerFormat {
    /// Model-wide index; draft layers follow the model's own.
    pub layer: u32,
    /// Whether it is a draft layer (multi-token prediction, a speculator's).
    #[serde(default)]
    pub draft: bool,
    /// Its tensors.
    pub tensors: Vec<TensorFormat>,
}

/// Layers that share a block table.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CacheGroup {
    /// Its name, unique in the format (`full`, `sliding`).
    pub name: String,
    /// How its blocks are used.
    pub kind: GroupKind,
    /// Tokens of a block; 0 for state slots.
    pub block_tokens: u32,
    /// Its layers, by rising index. A layer may be in several groups, with other tensors in each.
    pub layers: Vec<LayerFormat>,
}

/// What a model's KV cache is, independent of where any rank keeps it. Always valid: built by
/// [`KvFormat::new`], and decoding goes through it too.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "RawFormat")]
pub struct KvFormat {
    model: ModelIdentity,
    groups: Vec<CacheGroup>,
}

/// A format off the wire or from a file, not yet looked at.
#[derive(Deserialize)]
struct RawFormat {
    model: ModelIdentity,
    groups: Vec<CacheGroup>,
}

impl TryFrom<RawFormat> for KvFormat {
    type Error = LayoutError;

    fn try_from(raw: RawFormat) -> Result<Self, LayoutError> {
        Self::new(raw.model, raw.groups)
    }
}

impl KvFormat {
    /// A format of these groups.
    ///
    /// # Errors
    ///
    /// Every way in which the parts cannot be a cache: empty lists, zero extents, names or layers
    /// that are there twice, token axes that do not match their group's block, a sharded axis that
    /// is not there or is split, scales that do not fit what they scale, sizes that overflow, or
    /// more of something than [`limits`] allows.
    pub fn new(model: ModelIdentity, groups: Vec<CacheGroup>) -> Result<Self, LayoutError> {
        check_identity(&model)?;
        at_most("groups", groups.len() as u64, limits::GROUPS as u64)?;
        if groups.is_empty() {
            return Err(LayoutError::Empty {
                path: "groups".into(),
            });
        }
        let mut names = BTreeSet::new();
        let mut tensors = 0_usize;
        let mut model_bytes = 0_u64;
        for (g, group) in groups.iter().enumerate() {
            let path = format!("groups[{g}]");
            check_name(&format!("{path}.name"), &group.name)?;
            if !names.insert(group.name.as_str()) {
                return Err(LayoutError::Duplicate {
                    path: "groups".into(),
                    value: group.name.clone(),
                });
            }
            for layer in &group.layers {
                tensors = tensors.saturating_add(layer.tensors.len());
            }
            at_most("tensors", tensors as u64, limits::TENSORS as u64)?;
            let bytes = check_group(&path, group)?;
            model_bytes = model_bytes
                .checked_add(bytes)
                .ok_or(LayoutError::Overflow { path })?;
        }
        Ok(Self { model, groups })
    }

    /// A format with no model behind it: one group of blocks of `block_bytes` bytes, in each of
    /// `layers` layers, of one token.
    ///
    /// # Errors
    ///
    /// Zero bytes or layers, or too many.
    pub fn opaque(block_bytes: u64, layers: u32) -> Result<Self, LayoutError> {
        at_most("layers", u64::from(layers), u64::from(limits::LAYERS))?;
        let layer = |layer| LayerFormat {
            layer,
            draft: false,
            tensors: vec![TensorFormat {
                name: "bytes".into(),
                role: TensorRole::Opaque,
                dtype: DType::Uint8,
                axes: vec![Axis::new(AxisKind::Opaque, block_bytes)],
                sharded: None,
                scaling: None,
            }],
        };
        Self::new(
            ModelIdentity::new("opaque", None),
            vec![CacheGroup {
                name: "full".into(),
                kind: GroupKind::Full,
                block_tokens: 1,
                layers: (0..layers).map(layer).collect(),
            }],
        )
    }

    /// The model it belongs to.
    #[must_use]
    pub fn model(&self) -> &ModelIdentity {
        &self.model
    }

    /// Its cache groups.
    #[must_use]
    pub fn groups(&self) -> &[CacheGroup] {
        &self.groups
    }

    /// The group of this index.
    #[must_use]
    pub fn group(&self, group: u32) -> Option<&CacheGroup> {
        self.groups.get(usize::try_from(group).ok()?)
    }

    /// One past the highest layer of any group.
    #[must_use]
    pub fn layers(&self) -> u32 {
        let last = |g: &CacheGroup| g.layers.last().map_or(0, |l| l.layer + 1);
        self.groups.iter().map(last).max().unwrap_or(0)
    }

    /// The tensor of these indices.
    #[must_use]
    pub fn tensor(&self, group: u32, layer: u32, tensor: u32) -> Option<&TensorFormat> {
        self.group(group)?
            .layer(layer)?
            .tensors
            .get(usize::try_from(tensor).ok()?)
    }

    /// Bytes that a token takes in every layer of every group that keeps it, over all ranks,
    /// replication not counted. State slots do not count; what a block holds besides its tokens
    /// (scales) does, rounded up.
    #[must_use]
    pub fn bytes_per_token(&self) -> u64 {
        let per_token = |g: &CacheGroup| match g.block_tokens {
            0 => 0,
            tokens => g.block_bytes().div_ceil(u64::from(tokens)),
        };
        self.groups.iter().map(per_token).sum()
    }

    /// How messages name a tensor: `group 0 (full) layer 3 k`.
    pub(crate) fn tensor_label(&self, group: u32, layer: u32, tensor: u32) -> String {
        let group_name = self.group(group).map_or("?", |g| g.name.as_str());
        match self.tensor(group, layer, tensor) {
            Some(t) => format!("group {group} ({group_name}) layer {layer} {}", t.name),
            None => format!("group {group} ({group_name}) layer {layer} tensor {tensor}"),
        }
    }
}

impl CacheGroup {
    /// The layer of this model-wide index, if the group has it.
    #[must_use]
    pub fn layer(&self, layer: u32) -> Option<&LayerFormat> {
        let at = self.layers.binary_search_by_key(&layer, |l| l.layer).ok()?;
        self.layers.get(at)
    }

    /// Bytes of one block over all its layers and all ranks; saturates for a group that no valid
    /// format holds.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        self.layers
            .iter()
            .flat_map(|l| &l.tensors)
            .fold(0, |sum, t| {
                sum.saturating_add(t.block_bytes().unwrap_or(u64::MAX))
            })
    }
}

impl TensorFormat {
    /// Bytes of one whole-model block, unless that overflows.
    #[must_use]
    pub fn block_bytes(&self) -> Option<u64> {
        self.axes
            .iter()
            .try_fold(self.dtype.bytes(), |n, a| n.checked_mul(a.extent))
    }

    /// The sharded axis.
    #[must_use]
    pub fn sharded_axis(&self) -> Option<&Axis> {
        self.axes.get(usize::try_from(self.sharded?).ok()?)
    }

    /// The extent of one kind of axis, all parts of a split multiplied; 1 where it has none.
    #[must_use]
    pub fn extent_of(&self, kind: AxisKind) -> u64 {
        self.axes
            .iter()
            .filter(|a| a.kind == kind)
            .fold(1, |n, a| n.saturating_mul(a.extent))
    }

    /// Whether it has an axis of this kind.
    #[must_use]
    pub fn has(&self, kind: AxisKind) -> bool {
        self.axes.iter().any(|a| a.kind == kind)
    }
}
