//! Models whose format is known by name.

use super::{
    Axis, AxisKind, CacheGroup, DType, GroupKind, KvFormat, LayerFormat, LayoutError,
    ModelIdentity, TensorFormat, TensorRole,
};

/// The names that [`builtin`] knows.
pub const NAMES: [&str; 4] = [
    "llama-3.1-8b",
    "llama-3.1-70b",
    "qwen3-235b-a22b",
    "deepseek-v3",
];

/// The format of a well-known model with blocks of `block_tokens` tokens.
///
/// In bf16 a token takes 131,072 bytes in Llama 3.1 8B, 327,680 in Llama 3.1 70B, 192,512 in
/// Qwen3 235B A22B and 70,272 in DeepSeek V3.
///
/// # Errors
///
/// An unknown name, or a block of no tokens.
pub fn builtin(name: &str, block_tokens: u32, dtype: DType) -> Result<KvFormat, LayoutError> {
    let unknown = || LayoutError::UnknownModel {
        name: name.to_owned(),
        known: NAMES.to_vec(),
    };
    let known = NAMES.into_iter().find(|n| *n == name).ok_or_else(unknown)?;
    let (model_type, facts, attention): (_, &[(&str, u64)], _) = match known {
        "llama-3.1-8b" => (
            "llama",
            &[
                ("num_hidden_layers", 32),
                ("hidden_size", 4096),
                ("num_attention_heads", 32),
                ("num_key_value_heads", 8),
                ("head_dim", 128),
                ("vocab_size", 128_256),
            ],
            Attention::Heads { heads: 8, dim: 128 },
        ),
        "llama-3.1-70b" => (
            "llama",
            &[
                ("num_hidden_layers", 80),
                ("hidden_size", 8192),
                ("num_attention_heads", 64),
                ("num_key_value_heads", 8),
                ("head_dim", 128),
                ("vocab_size", 128_256),
            ],
            Attention::Heads { heads: 8, dim: 128 },
        ),
        "qwen3-235b-a22b" => (
            "qwen3_moe",
            &[
                ("num_hidden_layers", 94),
                ("hidden_size", 4096),
                ("num_attention_heads", 64),
                ("num_key_value_heads", 4),
                ("head_dim", 128),
                ("vocab_size", 151_936),
            ],
            Attention::Heads { heads: 4, dim: 128 },
        ),
        "deepseek-v3" => (
            "deepseek_v3",
            &[
                ("num_hidden_layers", 61),
                ("hidden_size", 7168),
                ("num_attention_heads", 128),
                ("kv_lora_rank", 512),
                ("qk_rope_head_dim", 64),
                ("vocab_size", 129_280),
            ],
            Attention::Latent { dim: 512 + 64 },
        ),
        _ => return Err(unknown()),
    };
    let mut model = ModelIdentity::new(model_type, Some(known));
    let mut layers = 0;
    for (key, value) in facts {
        if *key == "num_hidden_layers" {
            layers = u32::try_from(*value).unwrap_or(u32::MAX);
        }
        model = model.with_fact(key, value);
    }
    KvFormat::new(
        model,
        vec![CacheGroup {
            name: "full".into(),
            kind: GroupKind::Full,
            block_tokens,
            layers: (0..layers)
                .map(|layer| LayerFormat {
                    layer,
                    draft: false,
                    tensors: attention.tensors(block_tokens, dtype),
                })
                .collect(),
        }],
    )
}

/// The two kinds of attention that the built-in models have.
#[derive(Clone, Copy)]
enum Attention {
    /// K and V apart, sharded by KV head.
    Heads { heads: u64, dim: u64 },
    /// One latent with its rope part, the same on every rank.
    Latent { dim: u64 },
}

impl Attention {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_per_token_are_exact() {
        let per_token = |name| {
            builtin(name, 16, DType::Bf16)
                .map(|f| f.bytes_per_token())
                .expect("built in")
        };
        assert_eq!(NAMES.map(per_token), [131_072, 327_680, 192_512, 70_272]);
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let message = builtin("gpt-2", 16, DType::Bf16)
            .expect_err("unknown")
            .to_string();
        for name in NAMES {
            assert!(message.contains(name), "{message}");
        }
    }
}
