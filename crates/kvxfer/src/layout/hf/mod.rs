//! From a model's config.json to the format that its cache will have.
//!
//! A config predicts: it says how many layers, heads and elements a cache has, and in which layers a
//! window is kept. How an engine lays blocks out it cannot say; see
//! [`LayoutBuilder`](super::LayoutBuilder) for that.

mod error;
mod families;
mod fields;
mod identity;
#[cfg(test)]
mod refusal_tests;
#[cfg(test)]
mod tests;

use serde_json::Value;

pub use error::ConfigError;
use families::{Attention, Family, Otherwise, Windows};
use fields::{Fields, Given, shorten};

use super::{
    Axis, AxisKind, CacheGroup, DType, GroupKind, KvFormat, LayerFormat, LayoutError,
    ModelIdentity, TensorFormat, TensorRole,
};

/// The most that a config may say. Real ones stay far below, and no product of these overflows.
mod limits {
    /// Bytes of the file; some list thousands of modules that are not quantised.
    pub(super) const FILE: usize = 16 << 20;
    pub(super) const LAYERS: u64 = crate::layout::limits::LAYERS as u64;
    pub(super) const HEADS: u64 = 1 << 12;
    pub(super) const DIM: u64 = 1 << 13;
    pub(super) const BLOCK_TOKENS: u64 = 1 << 20;
    /// Numbers that are only compared.
    pub(super) const ANY: u64 = 1 << 40;
    /// Bytes of a rotation's scaling that are kept as they are.
    pub(super) const ROPE_TEXT: usize = 200;
}

/// What a config.json does not say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HfOptions {
    /// Tokens of a block.
    pub block_tokens: u32,
    /// The cache's type; `None`: the file's `torch_dtype` (or `dtype`).
    pub dtype: Option<DType>,
    /// Whether the model's own draft layers (multi-token prediction) have a cache too.
    pub mtp: bool,
    /// Whether all layers share one block table, as in an engine without separate pools for windows.
    /// Then every token is kept in every layer.
    pub one_table: bool,
    /// The model's id (`meta-llama/Llama-3.1-8B`), if it is to be compared; never a file name.
    pub model_id: Option<String>,
    /// The weights' revision, if it is to be compared.
    pub revision: Option<String>,
}

impl Default for HfOptions {
    fn default() -> Self {
        Self {
            block_tokens: 16,
            dtype: None,
            mtp: false,
            one_table: false,
            model_id: None,
            revision: None,
        }
    }
}

impl KvFormat {
    /// The format of a model by the text of its config.json. Known are llama, mistral, mixtral,
    /// qwen2, qwen2_moe, qwen3, qwen3_moe, gemma2, gemma3, gpt_oss, deepseek_v2, deepseek_v3,
    /// kimi_k2, glm4, glm4_moe and phi3.
    ///
    /// Tensors are named `k` and `v`, by heads, or `latent` (MLA, with its rope part). Layers that
    /// keep a window are in a group `sliding`, the others in a group `full`.
    ///
    /// # Errors
    ///
    /// [`LayoutError::Config`]: text that is no JSON, a model type that is not known, a field that is
    /// missing or of another type, a number that no model has; with the place inside the file. And
    /// blocks of no tokens, or of more than 2^20.
    pub fn from_hf_config(text: &str, options: &HfOptions) -> Result<Self, LayoutError> {
        if text.len() > limits::FILE {
            return Err(ConfigError::TooLong {
                bytes: text.len(),
                max: limits::FILE,
            }
            .into());
        }
        let config: Value = serde_json::from_str(text).map_err(|error| ConfigError::Json {
            line: error.line(),
            column: error.column(),
            reason: reason(&error),
        })?;
        Self::from_hf_value(&config, options)
    }

    /// As [`KvFormat::from_hf_config`], of a config that has been parsed already.
    ///
    /// # Errors
    ///
    /// As [`KvFormat::from_hf_config`].
    pub fn from_hf_value(config: &Value, options: &HfOptions) -> Result<Self, LayoutError> {
        let block_tokens = u64::from(options.block_tokens);
        if block_tokens > limits::BLOCK_TOKENS {
            return Err(LayoutError::TooMany {
                path: "block_tokens".into(),
                count: block_tokens,
                max: limits::BLOCK_TOKENS,
            });
        }
        let model = Model::read(config, options)?;
        let groups = model.groups(options);
        Self::new(model.identity, groups)
    }
}

/// The parser's words without its place, which is told apart.
fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = text.rfind(" at line ").unwrap_or(text.len());
    shorten(text.get(..place).unwrap_or(&text))
}

/// What a config comes down to.
struct Model {
    identity: ModelIdentity,
    dtype: DType,
    cache: Cache,
    /// By layer: the window's tokens, where it keeps only these.
    windows: Vec<Option<u32>>,
    draft_layers: u32,
}

/// What a layer keeps of a token.
#[derive(Clone, Copy)]
enum Cache {
    Heads { heads: u64, dim: u64 },
    Latent { dim: u64 },
}

impl Model {
    fn read(config: &Value, options: &HfOptions) -> Result<Self, ConfigError> {
        let file = Fields::new(config, "", "", "model")?;
        let (family, fields) = resolve(&file)?;
        let dtype = match options.dtype {
            Some(dtype) => dtype,
            None => dtype_of(&fields, &file)?,
        };
        let layers = fields.needed("num_hidden_layers", limits::LAYERS)?;
        let hidden = fields.needed("hidden_size", limits::ANY)?;
        let heads = or_class(&fields, "num_attention_heads", limits::HEADS, family.heads)?;
        let vocab = or_class(&fields, "vocab_size", limits::ANY, family.vocab_size)?;
        // Limits on the draft layers too keep the sum of all within the format's.
        let draft_layers = match options.mtp {
            true => draft_layers(family, &fields, limits::LAYERS - layers)?,
            false => 0,
        };
        let mut identity = ModelIdentity::new(fields.model_type(), options.model_id.as_deref())
            .with_fact("num_hidden_layers", layers)
            .with_fact("hidden_size", hidden)
            .with_fact("num_attention_heads", heads)
            .with_fact("vocab_size", vocab);
        identity.revision.clone_from(&options.revision);
        let cache = match family.attention {
            Attention::Heads => {
                let kv_heads = kv_heads(family, &fields, heads)?;
                let dim = head_dim(family, &fields, hidden, heads)?;
                identity = identity
                    .with_fact("num_key_value_heads", kv_heads)
                    .with_fact("head_dim", dim);
                Cache::Heads {
                    heads: kv_heads,
                    dim,
                }
            }
            Attention::Latent => {
                let latent = fields.needed("kv_lora_rank", limits::DIM)?;
                let rope = fields.needed("qk_rope_head_dim", limits::DIM)?;
                identity = identity
                    .with_fact("kv_lora_rank", latent)
                    .with_fact("qk_rope_head_dim", rope);
                Cache::Latent { dim: latent + rope }
            }
        };
        let layers = u32::try_from(layers).unwrap_or(u32::MAX);
        let windows = windows(family, &fields, layers)?;
        Ok(Self {
            identity: identity::add_facts(identity, &fields)?,
            dtype,
            cache,
            windows,
            draft_layers,
        })
    }

    fn groups(&self, options: &HfOptions) -> Vec<CacheGroup> {
        let tensors = self.cache.tensors(options.block_tokens, self.dtype);
        let layer = |layer, draft| LayerFormat {
            layer,
            draft,
            tensors: tensors.clone(),
        };
        let mut full = Vec::new();
        let mut sliding = Vec::new();
        let mut window = None;
        for (i, tokens) in (0_u32..).zip(&self.windows) {
            match tokens {
                Some(tokens) if !options.one_table => {
                    window = Some(*tokens);
                    sliding.push(layer(i, false));
                }
                _ => full.push(layer(i, false)),
            }
        }
        let first_draft = u32::try_from(self.windows.len()).unwrap_or(u32::MAX);
        full.extend(
            (first_draft..)
                .take(self.draft_layers as usize)
                .map(|i| layer(i, true)),
        );
        let group = |name: &str, kind, layers| CacheGroup {
            name: name.into(),
            kind,
            block_tokens: options.block_tokens,
            layers,
        };
        let mut groups = Vec::new();
        if !full.is_empty() {
            groups.push(group("full", GroupKind::Full, full));
        }
        if let Some(tokens) = window {
            groups.push(group(
                "sliding",
                GroupKind::SlidingWindow { tokens },
                sliding,
            ));
        }
        groups
    }
}

impl Cache {
    fn tensors(self, block_tokens: u32, dtype: DType) -> Vec<TensorFormat> {
        let token = Axis::new(AxisKind::Token, u64::from(block_tokens));
        match self {
            Self::Heads { heads, dim } => [("k", TensorRole::Key), ("v", TensorRole::Value)]
                .map(|(name, role)| TensorFormat {
                    name: name.into(),
                    role,
                    dtype,
                    axes: vec![
                        token,
                        Axis::new(AxisKind::Head, heads),
                        Axis::new(AxisKind::Dim, dim),
                    ],
                    sharded: Some(1),
                    scaling: None,
                })
                .into(),
            Self::Latent { dim } => vec![TensorFormat {
                name: "latent".into(),
                role: TensorRole::Latent,
                dtype,
                axes: vec![token, Axis::new(AxisKind::Latent, dim)],
                sharded: None,
                scaling: None,
            }],
        }
    }
}

/// The model's family, and the object that describes its text model.
fn resolve<'a>(file: &Fields<'a>) -> Result<(&'static Family, Fields<'a>), ConfigError> {
    let model_type = file.word("model_type")?;
    let model_type = model_type
        .value()
        .ok_or_else(|| file.missing("model_type"))?;
    let unknown = |path: String, value: &str, known| ConfigError::UnknownModelType {
        path,
        value: shorten(value),
        known,
    };
    let family = Family::of(model_type)
        .ok_or_else(|| unknown(file.path("model_type"), model_type, Family::known()))?;
    let fields = file.with_type(model_type);
    let Some(inner) = family.nested else {
        return Ok((family, fields));
    };
    let text = fields.raw("text_config").value();
    let text = text.ok_or_else(|| fields.missing("text_config"))?;
    let text = Fields::new(text, "text_config", "text_config.", inner)?;
    match text.word("model_type")? {
        Given::Value(word) if word != inner => {
            Err(unknown(text.path("model_type"), word, vec![inner]))
        }
        _ => Ok((family, text)),
    }
}

/// The cache's type, where no option names it: the text model's, or the file's.
fn dtype_of(fields: &Fields<'_>, file: &Fields<'_>) -> Result<DType, ConfigError> {
    for (fields, key) in [
        (fields, "torch_dtype"),
        (fields, "dtype"),
        (file, "torch_dtype"),
        (file, "dtype"),
    ] {
        if let Some(word) = fields.word(key)?.value() {
            return DType::from_name(word).ok_or_else(|| ConfigError::UnknownWord {
                path: fields.path(key),
                value: shorten(word),
                known: DType::ALL.map(DType::name).to_vec(),
            });
        }
    }
    Err(fields.missing("torch_dtype"))
}

/// A number, or what its class says where the file does not.
fn or_class(
    fields: &Fields<'_>,
    key: &str,
    max: u64,
    otherwise: Otherwise,
) -> Result<u64, ConfigError> {
    let default = match otherwise {
        Otherwise::Default(n) => Some(n),
        Otherwise::Missing | Otherwise::Derived => None,
    };
    let given = fields.number(key, 1, max)?.or_default(default);
    given.ok_or_else(|| fields.missing(key))
}

fn kv_heads(family: &Family, fields: &Fields<'_>, heads: u64) -> Result<u64, ConfigError> {
    const KEY: &str = "num_key_value_heads";
    let kv_heads = match (fields.number(KEY, 1, limits::HEADS)?, family.kv_heads) {
        (Given::Value(n), _) | (Given::Absent, Otherwise::Default(n)) => n,
        // As many as attention heads: the classes say so of null, and these of an absent field.
        (Given::Null, _) | (Given::Absent, Otherwise::Derived) => heads,
        (Given::Absent, Otherwise::Missing) => return Err(fields.missing(KEY)),
    };
    divides(fields, ("num_attention_heads", heads), (KEY, kv_heads))?;
    Ok(kv_heads)
}

fn head_dim(
    family: &Family,
    fields: &Fields<'_>,
    hidden: u64,
    heads: u64,
) -> Result<u64, ConfigError> {
    const KEY: &str = "head_dim";
    match (fields.number(KEY, 1, limits::DIM)?, family.head_dim) {
        (Given::Value(n), _) | (Given::Absent, Otherwise::Default(n)) => Ok(n),
        (_, Otherwise::Missing) => Err(fields.missing(KEY)),
        _ => {
            divides(
                fields,
                ("hidden_size", hidden),
                ("num_attention_heads", heads),
            )?;
            match hidden / heads {
                dim if dim <= limits::DIM => Ok(dim),
                dim => Err(ConfigError::Range {
                    path: format!("{} / num_attention_heads", fields.path("hidden_size")),
                    value: dim.to_string(),
                    min: 1,
                    max: limits::DIM,
                }),
            }
        }
    }
}

fn divides(
    fields: &Fields<'_>,
    (key, value): (&str, u64),
    (divisor_key, divisor): (&str, u64),
) -> Result<(), ConfigError> {
    if value.is_multiple_of(divisor) {
        return Ok(());
    }
    Err(ConfigError::NotMultiple {
        path: fields.path(key),
        value,
        divisor_path: fields.path(divisor_key),
        divisor,
    })
}

fn draft_layers(family: &Family, fields: &Fields<'_>, max: u64) -> Result<u32, ConfigError> {
    const KEY: &str = "num_nextn_predict_layers";
    let given = match family.mtp {
        true => fields.number(KEY, 0, max)?.value().unwrap_or(0),
        false => 0,
    };
    match u32::try_from(given) {
        Ok(0) | Err(_) => Err(ConfigError::NoMtp {
            path: fields.path(KEY),
            model_type: fields.model_type().to_owned(),
        }),
        Ok(layers) => Ok(layers),
    }
}

/// For each layer the window it keeps, or `None` for all tokens.
fn windows(
    family: &Family,
    fields: &Fields<'_>,
    layers: u32,
) -> Result<Vec<Option<u32>>, ConfigError> {
    const KEY: &str = "sliding_window";
    let given = || fields.number(KEY, 1, u64::from(u32::MAX));
    let needed = || -> Result<u32, ConfigError> {
        let window = given()?.or_default(family.window);
        let window = window.ok_or_else(|| fields.missing(KEY))?;
        Ok(u32::try_from(window).unwrap_or(u32::MAX))
    };
    if let Some(types) = fields.list("layer_types")?.value() {
        return listed(fields, types, layers, needed);
    }
    // Each layer's index is below `layers`, which is bounded: no list is longer than that.
    let every = |window: u32, keeps: &dyn Fn(u64) -> bool| {
        let layer = |i| keeps(u64::from(i)).then_some(window);
        (0..layers).map(layer).collect()
    };
    match family.windows {
        Windows::None => Ok(every(0, &|_| false)),
        Windows::All => match given()?.or_default(family.window) {
            None => Ok(every(0, &|_| false)),
            Some(_) => Ok(every(needed()?, &|_| true)),
        },
        Windows::FromLayer => {
            if !fields.flag("use_sliding_window")?.value().unwrap_or(false) {
                return Ok(every(0, &|_| false));
            }
            let first = fields.number("max_window_layers", 0, limits::ANY)?;
            let first = first
                .value()
                .ok_or_else(|| fields.missing("max_window_layers"))?;
            match given()?.or_default(family.window) {
                None => Ok(every(0, &|_| false)),
                Some(_) => Ok(every(needed()?, &|i| i >= first)),
            }
        }
        Windows::AllButEvery(n) => {
            let mut n = n;
            for key in ["sliding_window_pattern", "_sliding_window_pattern"] {
                if let Some(pattern) = fields.number(key, 1, limits::LAYERS)?.value() {
                    n = pattern;
                    break;
                }
            }
            Ok(every(needed()?, &|i| !(i + 1).is_multiple_of(n)))
        }
    }
}

/// The windows that `layer_types` lists.
fn listed(
    fields: &Fields<'_>,
    types: &[Value],
    layers: u32,
    window: impl Fn() -> Result<u32, ConfigError>,
) -> Result<Vec<Option<u32>>, ConfigError> {
    if types.len() != layers as usize {
        return Err(ConfigError::Length {
            path: fields.path("layer_types"),
            count: types.len(),
            layers,
        });
    }
    let read = |(i, value): (usize, &Value)| {
        let path = || format!("{}[{i}]", fields.path("layer_types"));
        match value.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") => window().map(Some),
            Some(other) => Err(ConfigError::UnknownWord {
                path: path(),
                value: shorten(other),
                known: vec!["full_attention", "sliding_attention"],
            }),
            None => Err(fields::wrong_type(path(), "a string", value)),
        }
    };
    types.iter().enumerate().map(read).collect()
}
