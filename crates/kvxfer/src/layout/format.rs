//! What a block is: groups, layers, tensors, axes.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{Axis, AxisKind, Coordinate, DType, LayoutError, ModelIdentity};

/// The most of everything that a format may have. Real caches stay far below; the limits keep a
/// hostile one from costing more than its bytes.
pub mod limits {
    /// Cache groups.
    pub const GROUPS: usize = 64;
    /// Layers of the whole model.
    pub const LAYERS: u32 = 4096;
    /// Tensors of all groups and layers together.
    pub const TENSORS: usize = 65_536;
    /// Axes of a tensor.
    pub const AXES: usize = 8;
    /// Bytes of a name.
    pub const NAME: usize = 256;
    /// Facts of a model's identity.
    pub const FACTS: usize = 128;
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

/// Where the scales of a quantised tensor are.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Scaling {
    /// One scale for the whole tensor, not part of the cache; its bits as an IEEE single.
    PerTensor {
        /// The scale's bits.
        bits: u32,
    },
    /// Another tensor of the same layer, by name; its axes say what a scale covers.
    Tensor {
        /// That tensor's name.
        name: String,
    },
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
    /// a placement may have any strides.
    pub axes: Vec<Axis>,
    /// Index of the axis that tensor parallelism splits; `None`: every rank has the whole tensor.
    #[serde(default)]
    pub sharded: Option<u32>,
    /// Its scales, for a quantised tensor.
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
    /// that are there twice, token axes that do not match their group's block, half a split axis, a
    /// sharded axis that is not there, sizes that overflow, or more of something than
    /// [`limits`] allows.
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

    /// The product of the extents of one coordinate, both halves of a split; 1 where it has none.
    #[must_use]
    pub fn extent_of(&self, coordinate: Coordinate) -> u64 {
        self.axes
            .iter()
            .filter(|a| a.kind.coordinate() == coordinate)
            .fold(1, |n, a| n.saturating_mul(a.extent))
    }
}

fn at_most(path: &str, count: u64, max: u64) -> Result<(), LayoutError> {
    if count > max {
        return Err(LayoutError::TooMany {
            path: path.to_owned(),
            count,
            max,
        });
    }
    Ok(())
}

fn check_name(path: &str, name: &str) -> Result<(), LayoutError> {
    if name.is_empty() {
        return Err(LayoutError::Empty {
            path: path.to_owned(),
        });
    }
    at_most(path, name.len() as u64, limits::NAME as u64)
}

fn check_identity(model: &ModelIdentity) -> Result<(), LayoutError> {
    check_name("model.model_type", &model.model_type)?;
    if let Some(name) = &model.name {
        check_name("model.name", name)?;
    }
    if let Some(revision) = &model.revision {
        check_name("model.revision", revision)?;
    }
    let max = limits::FACTS as u64;
    at_most("model.facts", model.facts.len() as u64, max)?;
    for (key, value) in &model.facts {
        check_name("model.facts", key)?;
        let path = "model.facts (a value)";
        at_most(path, value.len() as u64, limits::NAME as u64)?;
    }
    Ok(())
}

/// Checks a group and says how many bytes one of its blocks takes in all layers.
fn check_group(path: &str, group: &CacheGroup) -> Result<u64, LayoutError> {
    let slots = group.kind == GroupKind::StateSlots;
    if slots != (group.block_tokens == 0) {
        return Err(LayoutError::BlockTokens {
            path: path.to_owned(),
            block_tokens: group.block_tokens,
        });
    }
    if let GroupKind::SlidingWindow { tokens: 0 } = group.kind {
        return Err(LayoutError::Zero {
            path: format!("{path}.kind.tokens"),
        });
    }
    if group.layers.is_empty() {
        return Err(LayoutError::Empty {
            path: format!("{path}.layers"),
        });
    }
    let mut total = 0_u64;
    let mut previous = None;
    for (l, layer) in group.layers.iter().enumerate() {
        let path = format!("{path}.layers[{l}]");
        let max = u64::from(limits::LAYERS - 1);
        at_most(&format!("{path}.layer"), u64::from(layer.layer), max)?;
        // Rising order makes the layers a set, and lets them be found by halving.
        if previous.is_some_and(|p| p >= layer.layer) {
            return Err(LayoutError::Duplicate {
                path,
                value: format!("layer {} (layers must rise)", layer.layer),
            });
        }
        previous = Some(layer.layer);
        if layer.tensors.is_empty() {
            return Err(LayoutError::Empty {
                path: format!("{path}.tensors"),
            });
        }
        let mut names = BTreeSet::new();
        for (t, tensor) in layer.tensors.iter().enumerate() {
            let path = format!("{path}.tensors[{t}]");
            if !names.insert(tensor.name.as_str()) {
                return Err(LayoutError::Duplicate {
                    path,
                    value: tensor.name.clone(),
                });
            }
            let bytes = check_tensor(&path, tensor, group.block_tokens)?;
            total = total
                .checked_add(bytes)
                .ok_or(LayoutError::Overflow { path })?;
        }
        for (t, tensor) in layer.tensors.iter().enumerate() {
            if let Some(Scaling::Tensor { name }) = &tensor.scaling
                && (name == &tensor.name || !names.contains(name.as_str()))
            {
                return Err(LayoutError::MissingScale {
                    path: format!("{path}.tensors[{t}]"),
                    scale: name.clone(),
                });
            }
        }
    }
    Ok(total)
}

/// Checks a tensor and says how many bytes one of its blocks takes.
fn check_tensor(path: &str, tensor: &TensorFormat, block_tokens: u32) -> Result<u64, LayoutError> {
    check_name(&format!("{path}.name"), &tensor.name)?;
    let axes_path = format!("{path}.axes");
    at_most(&axes_path, tensor.axes.len() as u64, limits::AXES as u64)?;
    if tensor.axes.is_empty() {
        return Err(LayoutError::Empty { path: axes_path });
    }
    let has = |kind| tensor.axes.iter().any(|a| a.kind == kind);
    for (i, axis) in tensor.axes.iter().enumerate() {
        if axis.extent == 0 {
            return Err(LayoutError::Zero {
                path: format!("{axes_path}[{i}].extent"),
            });
        }
        if tensor.axes.iter().take(i).any(|a| a.kind == axis.kind) {
            return Err(LayoutError::Duplicate {
                path: axes_path,
                value: axis.kind.to_string(),
            });
        }
        if let Some(other) = axis.kind.other_half() {
            let whole = match axis.kind.coordinate() {
                Coordinate::Token => AxisKind::Token,
                _ => AxisKind::Dim,
            };
            if !has(other) || has(whole) {
                return Err(LayoutError::HalfAxis {
                    path: path.to_owned(),
                    axis: axis.kind,
                });
            }
        }
        if axis.kind == AxisKind::Kv && axis.extent != 2 {
            return Err(LayoutError::KvExtent {
                path: path.to_owned(),
                extent: axis.extent,
            });
        }
    }
    // A tensor without tokens (a block's scales) is fine; one with other tokens than its group is
    // not. In a group of state slots this leaves no token axis at all.
    let tokens = tensor.extent_of(Coordinate::Token);
    let has_tokens = tensor
        .axes
        .iter()
        .any(|a| a.kind.coordinate() == Coordinate::Token);
    if has_tokens && tokens != u64::from(block_tokens) {
        return Err(LayoutError::TokenExtent {
            path: path.to_owned(),
            extent: tokens,
            block_tokens,
        });
    }
    if let Some(index) = tensor.sharded {
        let shardable = tensor.sharded_axis().is_some_and(|a| {
            matches!(a.kind, AxisKind::Head | AxisKind::State | AxisKind::Channel)
        });
        if !shardable {
            return Err(LayoutError::ShardedAxis {
                path: path.to_owned(),
                index,
            });
        }
    }
    let bytes = tensor.block_bytes().ok_or_else(|| LayoutError::Overflow {
        path: path.to_owned(),
    })?;
    at_most(path, bytes, limits::BLOCK_BYTES)?;
    Ok(bytes)
}
