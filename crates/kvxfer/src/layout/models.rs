//! Models whose format is known by name: their config.json is built in.

use super::{DType, HfOptions, KvFormat, LayoutError};

/// The names that [`builtin`] knows.
pub const NAMES: [&str; 4] = [
    "llama-3.1-8b",
    "llama-3.1-70b",
    "qwen3-235b-a22b",
    "deepseek-v3",
];

const CONFIGS: [&str; NAMES.len()] = [
    include_str!("hf/configs/llama-3.1-8b.json"),
    include_str!("hf/configs/llama-3.1-70b.json"),
    include_str!("hf/configs/qwen3-235b-a22b.json"),
    include_str!("hf/configs/deepseek-v3.json"),
];

/// The config.json of a well-known model: what [`KvFormat::from_hf_config`] reads of it.
#[must_use]
pub fn config(name: &str) -> Option<&'static str> {
    let known = NAMES.iter().zip(CONFIGS).find(|(known, _)| **known == name);
    known.map(|(_, config)| config)
}

/// The format of a well-known model with blocks of `block_tokens` tokens: what
/// [`KvFormat::from_hf_config`] says of its config.json.
///
/// In bf16 a token takes 131,072 bytes in Llama 3.1 8B, 327,680 in Llama 3.1 70B, 192,512 in
/// Qwen3 235B A22B and 70,272 in DeepSeek V3.
///
/// # Errors
///
/// An unknown name, or a block of no tokens or too many.
pub fn builtin(name: &str, block_tokens: u32, dtype: DType) -> Result<KvFormat, LayoutError> {
    let config = config(name).ok_or_else(|| LayoutError::UnknownModel {
        name: name.to_owned(),
        known: NAMES.to_vec(),
    })?;
    let options = HfOptions {
        block_tokens,
        dtype: Some(dtype),
        ..HfOptions::default()
    };
    KvFormat::from_hf_config(config, &options)
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
