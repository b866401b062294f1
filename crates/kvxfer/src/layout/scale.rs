//! The scales of quantised tensors.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::check::at_most;
use super::{AxisKind, LayoutError, TensorFormat, TensorRole, limits};

/// What the numbers of a quantised tensor have to be multiplied by.
///
/// A scale that is the same for every block is not part of the cache: it came with the weights or
/// from a calibration, both sides have it already, and it is compared. A scale that was worked out
/// when a block was written is part of the cache: it is a tensor of the layer like any other, and
/// moves with the block. Scales that an engine keeps inside the record that they scale are a tensor
/// of their own all the same, in the same memory with the same strides.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Scaling {
    /// The same for every block, and outside the cache: one number for the tensor, or one for each
    /// index along some axes (each head, or K and V). Compared bit by bit.
    Constant {
        /// The kinds of axis that the numbers differ along, the last one fastest; none: one number.
        axes: Vec<AxisKind>,
        /// The numbers as IEEE singles, finite and above zero.
        bits: Vec<u32>,
    },
    /// Another tensor of the same layer, by name, with the role [`TensorRole::Scale`]. Its axes say
    /// what a number covers: no `Token` axis, a block; a `Head` axis, each head by itself; `Dim` 4
    /// for a `Dim` of 128, 32 elements each.
    Tensor {
        /// That tensor's name.
        name: String,
    },
}

impl Scaling {
    /// One constant for a whole tensor.
    #[must_use]
    pub fn constant(scale: f32) -> Self {
        Self::Constant {
            axes: Vec::new(),
            bits: vec![scale.to_bits()],
        }
    }
}

/// Checks a tensor's scaling against the tensor and its layer, whose tensors are given by name.
pub(super) fn check_scaling(
    path: &str,
    tensor: &TensorFormat,
    layer: &BTreeMap<&str, &TensorFormat>,
) -> Result<(), LayoutError> {
    match &tensor.scaling {
        None => Ok(()),
        Some(Scaling::Constant { axes, bits }) => check_constant(path, tensor, axes, bits),
        Some(Scaling::Tensor { name }) => {
            let scale = layer.get(name.as_str()).copied();
            let scale = scale.filter(|t| t.role == TensorRole::Scale && t.name != tensor.name);
            let Some(scale) = scale else {
                return Err(LayoutError::MissingScale {
                    path: path.to_owned(),
                    scale: name.clone(),
                });
            };
            check_stored(path, tensor, scale)
        }
    }
}

fn check_constant(
    path: &str,
    tensor: &TensorFormat,
    axes: &[AxisKind],
    bits: &[u32],
) -> Result<(), LayoutError> {
    let path = format!("{path}.scaling");
    at_most(&path, bits.len() as u64, limits::SCALES as u64)?;
    for (i, kind) in axes.iter().enumerate() {
        let repeated = axes.iter().take(i).any(|a| a == kind);
        // A number for each token of a block, the same in every block, is nobody's scale.
        if repeated || *kind == AxisKind::Token || !tensor.has(*kind) {
            return Err(LayoutError::ScaleAxis { path, axis: *kind });
        }
    }
    let expected = axes
        .iter()
        .fold(1, |n: u64, kind| n.saturating_mul(tensor.extent_of(*kind)));
    if bits.len() as u64 != expected {
        return Err(LayoutError::Length {
            path,
            count: bits.len() as u64,
            expected,
        });
    }
    for bits in bits {
        let scale = f32::from_bits(*bits);
        if !scale.is_finite() || scale <= 0.0 {
            return Err(LayoutError::ScaleValue { path, bits: *bits });
        }
    }
    Ok(())
}

fn check_stored(
    path: &str,
    tensor: &TensorFormat,
    scale: &TensorFormat,
) -> Result<(), LayoutError> {
    // So that no chain of scales comes back to where it began.
    if let Some(Scaling::Tensor { .. }) = scale.scaling {
        return Err(LayoutError::MissingScale {
            path: path.to_owned(),
            scale: scale.name.clone(),
        });
    }
    for axis in &scale.axes {
        let whole = tensor.extent_of(axis.kind);
        let part = scale.extent_of(axis.kind);
        if !tensor.has(axis.kind) || !whole.is_multiple_of(part) {
            return Err(LayoutError::ScaleAxis {
                path: format!("{path}.scaling"),
                axis: axis.kind,
            });
        }
    }
    // A rank that has some of the heads has those heads' scales.
    let dealt = |t: &TensorFormat| t.sharded_axis().map(|a| a.kind);
    let needed = dealt(tensor).filter(|kind| scale.has(*kind));
    if dealt(scale) != needed {
        return Err(LayoutError::ScaleShard {
            path: path.to_owned(),
            scale: scale.name.clone(),
        });
    }
    Ok(())
}
