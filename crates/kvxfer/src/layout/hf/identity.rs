//! What a config.json says of which model it is.

use std::collections::BTreeMap;

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::fields::{Fields, Given, wrong_type};
use super::{ConfigError, limits};
use crate::layout::ModelIdentity;

/// Numbers that tell models apart without any bearing on their cache, where the file has them.
const ASIDE: [(&str, &str); 5] = [
    ("intermediate_size", "intermediate_size"),
    ("moe_intermediate_size", "moe_intermediate_size"),
    ("num_experts", "num_experts"),
    ("num_local_experts", "num_experts"),
    ("n_routed_experts", "num_experts"),
];

/// Adds what is known of a model besides the shape of its cache.
pub(super) fn add_facts(
    mut model: ModelIdentity,
    fields: &Fields<'_>,
) -> Result<ModelIdentity, ConfigError> {
    for (key, fact) in ASIDE {
        if let Some(n) = fields.number(key, 0, limits::ANY)?.value() {
            model = model.with_fact(fact, n);
        }
    }
    let (theta, scaling) = rope(fields)?;
    if let Some(theta) = theta {
        model = model.with_fact("rope_theta", theta);
    }
    if let Some(scaling) = scaling {
        model = model.with_fact("rope_scaling", scaling);
    }
    Ok(model)
}

/// The rotation's base and its scaling, by whichever of the two dialects the file has them in:
/// `rope_theta` beside `rope_scaling`, or both in `rope_parameters`. Nothing is said of a file that
/// gives them for each type of layer.
fn rope(fields: &Fields<'_>) -> Result<(Option<String>, Option<String>), ConfigError> {
    let (key, scaling) = match fields.raw("rope_parameters") {
        Given::Value(parameters) => ("rope_parameters", Some(parameters)),
        _ => ("rope_scaling", fields.raw("rope_scaling").value()),
    };
    let Some(scaling) = scaling else {
        return Ok((base(fields, None)?, Some("none".to_owned())));
    };
    let Some(map) = scaling.as_object() else {
        return Err(wrong_type(fields.path(key), "an object or null", scaling));
    };
    if map.values().any(Value::is_object) {
        return Ok((None, None));
    }
    let theta = base(fields, map.get("rope_theta").map(|theta| (key, theta)))?;
    let mut parts = BTreeMap::new();
    for (key, value) in map {
        let key = match key.as_str() {
            "rope_theta" => continue,
            "type" => "rope_type",
            other => other,
        };
        let text = match value {
            Value::Null => None,
            Value::Array(list) => {
                let items: Vec<String> = list.iter().filter_map(scalar).collect();
                Some(items.join(","))
            }
            other => scalar(other),
        };
        if let Some(text) = text {
            parts.insert(key, text);
        }
    }
    if parts.get("rope_type").is_some_and(|t| t == "default") {
        parts.clear();
    }
    if parts.is_empty() {
        return Ok((theta, Some("none".to_owned())));
    }
    let parts: Vec<String> = parts.iter().map(|(k, v)| format!("{k}={v}")).collect();
    let mut text = parts.join(" ");
    if text.len() > limits::ROPE_TEXT {
        // Long lists of factors: their sum tells them apart as well.
        text = format!("sha256 {}", hex(&Sha256::digest(text)));
    }
    Ok((theta, Some(text)))
}

/// The rotation's base, from inside the parameters or from beside them.
fn base(
    fields: &Fields<'_>,
    inside: Option<(&str, &Value)>,
) -> Result<Option<String>, ConfigError> {
    const KEY: &str = "rope_theta";
    let (path, theta) = match (inside, fields.raw(KEY).value()) {
        (Some((parameters, theta)), _) => (fields.path(&format!("{parameters}.{KEY}")), theta),
        (None, Some(theta)) => (fields.path(KEY), theta),
        (None, None) => return Ok(None),
    };
    match theta {
        Value::Number(_) => Ok(scalar(theta)),
        other => Err(wrong_type(path, "a number", other)),
    }
}

/// One text for one value: 500000 and 500000.0 are the same number. Short even for 1e300.
fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::Number(n) => n.as_f64().map(|n| format!("{n:?}")),
        Value::String(s) => Some(s.clone()),
        Value::Bool(b) => Some(b.to_string()),
        _ => None,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
