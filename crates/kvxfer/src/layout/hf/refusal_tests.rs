//! Files that no format can be made of give an error that says where.

use serde_json::{Value, json};

use super::tests::{MODELS, bf16, config, refused, text};
use super::*;

#[test]
fn what_is_missing_is_named_with_its_place() {
    let fields = [
        ("llama-3.1-8b", "num_hidden_layers"),
        ("llama-3.1-8b", "hidden_size"),
        ("llama-3.1-8b", "num_attention_heads"),
        ("llama-3.1-8b", "vocab_size"),
        ("llama-3.1-8b", "torch_dtype"),
        ("mixtral-8x7b", "num_key_value_heads"),
        ("qwen3-235b-a22b", "head_dim"),
        ("glm-4.5-air", "head_dim"),
        ("deepseek-v3", "kv_lora_rank"),
        ("deepseek-v3", "qk_rope_head_dim"),
    ];
    for (name, field) in fields {
        for null in [false, true] {
            let mut config = config(name);
            let model_type = config["model_type"].as_str().expect("a type").to_owned();
            if null {
                // Of KV heads, null says something.
                if field == "num_key_value_heads" {
                    continue;
                }
                config[field] = Value::Null;
            } else {
                config.as_object_mut().expect("an object").remove(field);
            }
            assert_eq!(
                refused(&config),
                format!("{field} is missing, and a {model_type} needs it")
            );
        }
    }
    let mut gemma = config("gemma-3-12b-it");
    let inner = gemma["text_config"].as_object_mut().expect("an object");
    inner.remove("num_hidden_layers");
    assert_eq!(
        refused(&gemma),
        "text_config.num_hidden_layers is missing, and a gemma3_text needs it"
    );
    gemma
        .as_object_mut()
        .expect("an object")
        .remove("text_config");
    assert_eq!(
        refused(&gemma),
        "text_config is missing, and a gemma3 needs it"
    );
    assert_eq!(
        refused(&json!({})),
        "model_type is missing, and a model needs it"
    );
}

#[test]
fn what_cannot_be_is_refused_with_its_place() {
    let cases: &[(&str, &str, Value, &str)] = &[
        (
            "llama-3.1-8b",
            "num_hidden_layers",
            json!(1_000_000_000_000_u64),
            "num_hidden_layers is 1000000000000, not in 1..=4096",
        ),
        (
            "llama-3.1-8b",
            "num_hidden_layers",
            json!(0),
            "num_hidden_layers is 0, not in 1..=4096",
        ),
        (
            "llama-3.1-8b",
            "num_hidden_layers",
            json!(-32),
            "num_hidden_layers is -32, not in 1..=4096",
        ),
        (
            "llama-3.1-8b",
            "num_hidden_layers",
            json!(32.0),
            "num_hidden_layers is 32.0, not a whole number",
        ),
        (
            "llama-3.1-8b",
            "num_hidden_layers",
            json!("32"),
            "num_hidden_layers is the string \"32\", not a whole number",
        ),
        (
            "llama-3.1-8b",
            "num_hidden_layers",
            json!([32]),
            "num_hidden_layers is a list, not a whole number",
        ),
        (
            "llama-3.1-8b",
            "hidden_size",
            json!(u64::MAX),
            "hidden_size is 18446744073709551615, not in",
        ),
        (
            "llama-3.1-8b",
            "hidden_size",
            json!(4097),
            "hidden_size is 4097, not a multiple of num_attention_heads, which is 32",
        ),
        (
            "llama-3.1-8b",
            "hidden_size",
            json!(1_u64 << 39),
            "hidden_size / num_attention_heads is 17179869184, not in 1..=8192",
        ),
        (
            "llama-3.1-8b",
            "num_key_value_heads",
            json!(5),
            "num_attention_heads is 32, not a multiple of num_key_value_heads, which is 5",
        ),
        (
            "llama-3.1-8b",
            "head_dim",
            json!(true),
            "head_dim is true, not a whole number",
        ),
        (
            "llama-3.1-8b",
            "torch_dtype",
            json!(16),
            "torch_dtype is 16, not a string",
        ),
        (
            "llama-3.1-8b",
            "rope_theta",
            json!("big"),
            "rope_theta is the string \"big\", not a number",
        ),
        (
            "llama-3.1-8b",
            "rope_scaling",
            json!([1]),
            "rope_scaling is a list, not an object or null",
        ),
        (
            "llama-3.1-8b",
            "model_type",
            json!(7),
            "model_type is 7, not a string",
        ),
        (
            "gemma-3-12b-it",
            "text_config",
            json!("x"),
            "text_config is the string \"x\", not an object",
        ),
        (
            "gemma-3-12b-it",
            "text_config",
            json!({"model_type": "llama"}),
            "text_config.model_type is llama; known are gemma3_text",
        ),
        (
            "gpt-oss-120b",
            "layer_types",
            json!(["full_attention"]),
            "layer_types has 1 entries for 36 layers",
        ),
        (
            "gpt-oss-120b",
            "sliding_window",
            json!(null),
            "sliding_window is missing",
        ),
        (
            "gpt-oss-120b",
            "sliding_window",
            json!(1_u64 << 33),
            "sliding_window is 8589934592, not in",
        ),
        (
            "qwen2.5-7b",
            "use_sliding_window",
            json!(1),
            "use_sliding_window is 1, not true or false",
        ),
        (
            "deepseek-v3",
            "kv_lora_rank",
            json!(1_u64 << 20),
            "kv_lora_rank is 1048576, not in 1..=8192",
        ),
    ];
    for (name, field, value, wanted) in cases {
        let mut config = config(name);
        config["torch_dtype"] = "bfloat16".into();
        config[*field] = value.clone();
        let message = refused(&config);
        assert!(message.starts_with(wanted), "{message:?}, not {wanted:?}");
    }
    let mut gpt = config("gpt-oss-120b");
    gpt["torch_dtype"] = "bfloat16".into();
    gpt["layer_types"][3] = "linear_attention".into();
    assert_eq!(
        refused(&gpt),
        "layer_types[3] is linear_attention; known are full_attention, sliding_attention"
    );
    gpt["layer_types"][3] = 9.into();
    assert_eq!(refused(&gpt), "layer_types[3] is 9, not a string");
}

#[test]
fn an_unknown_type_lists_the_known_ones() {
    let mut config = config("llama-3.1-8b");
    config["model_type"] = "gpt2".into();
    let message = refused(&config);
    assert!(
        message.starts_with("model_type is gpt2; known are "),
        "{message}"
    );
    for model_type in Family::known() {
        assert!(message.contains(model_type), "{message}");
    }
}

#[test]
fn text_that_is_no_config_is_refused() {
    let read = |text: &str| {
        let error = KvFormat::from_hf_config(text, &HfOptions::default()).expect_err("refused");
        error.to_string()
    };
    assert_eq!(
        read("{\n  \"model_type\": llama}"),
        "not JSON: expected value at line 2 column 17"
    );
    assert_eq!(read("[]"), "the file is a list, not an object");
    assert_eq!(
        read("\"llama\""),
        "the file is the string \"llama\", not an object"
    );
    assert!(read(&"[".repeat(100_000)).contains("recursion limit"));
    assert!(
        read("{\"model_type\": \"llama\", \"num_hidden_layers\": 1e999}")
            .contains("not JSON: number out of range")
    );
    let long = format!("{{\"x\": \"{}\"}}", "y".repeat(limits::FILE));
    assert!(read(&long).contains("are more than the 16777216"));
    // Nothing of a hostile file is repeated at length.
    let long = format!("{{\"model_type\": \"{}\"}}", "y".repeat(1 << 20));
    assert!(read(&long).len() < 512);
}

#[test]
fn absurd_options_are_refused() {
    for block_tokens in [0, u32::MAX] {
        let options = HfOptions {
            block_tokens,
            ..bf16()
        };
        let error = KvFormat::from_hf_config(text("llama-3.1-8b"), &options).expect_err("refused");
        assert!(error.to_string().contains("block_tokens"), "{error}");
    }
}

/// The limits on single numbers keep every product within the format's own: what is accepted field
/// by field is a format.
#[test]
fn the_largest_numbers_allowed_make_a_format() {
    let options = HfOptions {
        block_tokens: 1 << 20,
        dtype: Some(DType::F32),
        mtp: true,
        ..HfOptions::default()
    };
    let heads = json!({
        "model_type": "glm4_moe", "num_hidden_layers": 4095, "num_nextn_predict_layers": 1,
        "hidden_size": limits::ANY, "vocab_size": limits::ANY, "num_attention_heads": limits::HEADS,
        "num_key_value_heads": limits::HEADS, "head_dim": limits::DIM,
    });
    let latent = json!({
        "model_type": "deepseek_v3", "num_hidden_layers": 4095, "num_nextn_predict_layers": 1,
        "hidden_size": limits::ANY, "vocab_size": limits::ANY, "num_attention_heads": limits::HEADS,
        "kv_lora_rank": limits::DIM, "qk_rope_head_dim": limits::DIM,
    });
    for config in [heads, latent] {
        let format = KvFormat::from_hf_value(&config, &options).expect("a format");
        assert_eq!(format.layers(), 4096);
        assert!(format.bytes_per_token() > 0);
    }
}

/// Every field of every model's file becomes something else: there is a format, or an error of the
/// file that says where.
#[test]
fn no_field_can_do_harm() {
    let nasty = [
        Value::Null,
        json!(true),
        json!(0),
        json!(-1),
        json!(1),
        json!(7),
        json!(4096),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(0.5),
        json!(1e300),
        json!(""),
        json!("x".repeat(5000)),
        json!([]),
        json!([1, [2, {"a": 3}]]),
        json!({}),
        json!({"rope_theta": 1e300, "x": "y".repeat(5000)}),
    ];
    let mut refused = 0;
    for (name, _, _) in MODELS {
        let config = config(name);
        let mut places: Vec<String> = Vec::new();
        for (key, value) in config.as_object().expect("an object") {
            places.push(format!("/{key}"));
            if let Some(inner) = value.as_object() {
                places.extend(inner.keys().map(|k| format!("/{key}/{k}")));
            }
        }
        for place in places {
            for value in &nasty {
                let mut config = config.clone();
                *config.pointer_mut(&place).expect("it is there") = value.clone();
                let options = HfOptions {
                    mtp: value.is_null(),
                    ..bf16()
                };
                match KvFormat::from_hf_value(&config, &options) {
                    Ok(format) => assert!(format.bytes_per_token() > 0),
                    Err(LayoutError::Config(error)) => {
                        refused += 1;
                        assert!(error.to_string().len() < 1024, "{place}: {error}");
                    }
                    Err(other) => panic!("{name} {place} {value}: {other}"),
                }
            }
        }
    }
    assert!(refused > 1000, "{refused}");
}
