//! What makes a format valid.

use std::collections::BTreeMap;

use super::scale::check_scaling;
use super::{
    AxisKind, CacheGroup, GroupKind, LayoutError, ModelIdentity, TensorFormat, TensorRole, limits,
};

pub(super) fn at_most(path: &str, count: u64, max: u64) -> Result<(), LayoutError> {
    if count > max {
        return Err(LayoutError::TooMany {
            path: path.to_owned(),
            count,
            max,
        });
    }
    Ok(())
}

pub(super) fn check_name(path: &str, name: &str) -> Result<(), LayoutError> {
    if name.is_empty() {
        return Err(LayoutError::Empty {
            path: path.to_owned(),
        });
    }
    at_most(path, name.len() as u64, limits::NAME as u64)
}

pub(super) fn check_identity(model: &ModelIdentity) -> Result<(), LayoutError> {
    check_name("model.model_type", &model.model_type)?;
    if let Some(id) = &model.id {
        check_name("model.id", id)?;
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
pub(super) fn check_group(path: &str, group: &CacheGroup) -> Result<u64, LayoutError> {
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
        let count = layer.tensors.len() as u64;
        at_most(
            &format!("{path}.tensors"),
            count,
            limits::LAYER_TENSORS as u64,
        )?;
        let mut named = BTreeMap::new();
        for (t, tensor) in layer.tensors.iter().enumerate() {
            let path = format!("{path}.tensors[{t}]");
            if named.insert(tensor.name.as_str(), tensor).is_some() {
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
            check_scaling(&format!("{path}.tensors[{t}]"), tensor, &named)?;
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
    for (i, axis) in tensor.axes.iter().enumerate() {
        if axis.extent == 0 {
            return Err(LayoutError::Zero {
                path: format!("{axes_path}[{i}].extent"),
            });
        }
    }
    let bytes = tensor.block_bytes().ok_or_else(|| LayoutError::Overflow {
        path: path.to_owned(),
    })?;
    at_most(path, bytes, limits::BLOCK_BYTES)?;
    if tensor.has(AxisKind::Kv) && tensor.extent_of(AxisKind::Kv) != 2 {
        return Err(LayoutError::KvExtent {
            path: path.to_owned(),
            extent: tensor.extent_of(AxisKind::Kv),
        });
    }
    // A tensor without tokens (a block's scales) is fine, and so is a scale for several tokens; else
    // its tokens are the group's. In a group of state slots this leaves no token axis at all.
    let tokens = tensor.extent_of(AxisKind::Token);
    let fits = match tensor.role {
        TensorRole::Scale => u64::from(block_tokens).is_multiple_of(tokens) && block_tokens > 0,
        _ => tokens == u64::from(block_tokens),
    };
    if tensor.has(AxisKind::Token) && !fits {
        return Err(LayoutError::TokenExtent {
            path: path.to_owned(),
            extent: tokens,
            block_tokens,
        });
    }
    if let Some(index) = tensor.sharded {
        let shardable = tensor.sharded_axis().is_some_and(|sharded| {
            matches!(
                sharded.kind,
                AxisKind::Head | AxisKind::State | AxisKind::Channel
            ) && tensor
                .axes
                .iter()
                .filter(|a| a.kind == sharded.kind)
                .count()
                == 1
        });
        if !shardable {
            return Err(LayoutError::ShardedAxis {
                path: path.to_owned(),
                index,
            });
        }
    }
    Ok(bytes)
}
