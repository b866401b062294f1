//! Which model a cache belongs to.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Which model the cache belongs to. Two caches of equal shape from different models are not
/// interchangeable, so the identity takes part in every comparison.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct ModelIdentity {
    /// The architecture, as a Hugging Face config's `model_type` names it: `llama`, `qwen3_moe`.
    pub model_type: String,
    /// The model's id (`meta-llama/Llama-3.1-8B`), where the operator gave one; never a file name.
    #[serde(default)]
    pub id: Option<String>,
    /// The weights' revision, where the operator gave one.
    #[serde(default)]
    pub revision: Option<String>,
    /// Other numbers and words that tell models apart, by their name in config.json:
    /// `num_attention_heads` → `32`, `vocab_size` → `128256`. Compared where both sides have them.
    #[serde(default)]
    pub facts: BTreeMap<String, String>,
}

impl ModelIdentity {
    /// An identity with a type and perhaps an id.
    #[must_use]
    pub fn new(model_type: impl Into<String>, id: Option<&str>) -> Self {
        Self {
            model_type: model_type.into(),
            id: id.map(str::to_owned),
            ..Self::default()
        }
    }

    /// The same, knowing one more fact.
    #[must_use]
    pub fn with_fact(mut self, key: &str, value: impl ToString) -> Self {
        self.facts.insert(key.to_owned(), value.to_string());
        self
    }
}
