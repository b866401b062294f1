//! Real configs give real formats.

use serde_json::Value;

use super::*;

/// Real models' configs (the fields that matter), and the bytes that a token takes.
pub(super) const MODELS: [(&str, &str, u64); 18] = [
    (
        "deepseek-v2-lite",
        include_str!("configs/deepseek-v2-lite.json"),
        31_104,
    ),
    (
        "deepseek-v3",
        include_str!("configs/deepseek-v3.json"),
        70_272,
    ),
    (
        "gemma-2-2b",
        include_str!("configs/gemma-2-2b.json"),
        106_496,
    ),
    (
        "gemma-3-12b-it",
        include_str!("configs/gemma-3-12b-it.json"),
        393_216,
    ),
    (
        "glm-4-9b-0414",
        include_str!("configs/glm-4-9b-0414.json"),
        40_960,
    ),
    (
        "glm-4.5-air",
        include_str!("configs/glm-4.5-air.json"),
        188_416,
    ),
    (
        "gpt-oss-120b",
        include_str!("configs/gpt-oss-120b.json"),
        73_728,
    ),
    ("kimi-k2", include_str!("configs/kimi-k2.json"), 70_272),
    (
        "llama-3.1-70b",
        include_str!("configs/llama-3.1-70b.json"),
        327_680,
    ),
    (
        "llama-3.1-8b",
        include_str!("configs/llama-3.1-8b.json"),
        131_072,
    ),
    (
        "mistral-7b-v0.3",
        include_str!("configs/mistral-7b-v0.3.json"),
        131_072,
    ),
    (
        "mixtral-8x7b",
        include_str!("configs/mixtral-8x7b.json"),
        131_072,
    ),
    (
        "phi-3-mini-4k",
        include_str!("configs/phi-3-mini-4k.json"),
        393_216,
    ),
    ("phi-4", include_str!("configs/phi-4.json"), 204_800),
    (
        "qwen1.5-moe-a2.7b",
        include_str!("configs/qwen1.5-moe-a2.7b.json"),
        196_608,
    ),
    (
        "qwen2.5-7b",
        include_str!("configs/qwen2.5-7b.json"),
        57_344,
    ),
    (
        "qwen3-235b-a22b",
        include_str!("configs/qwen3-235b-a22b.json"),
        192_512,
    ),
    ("qwen3-8b", include_str!("configs/qwen3-8b.json"), 147_456),
];

pub(super) fn bf16() -> HfOptions {
    HfOptions {
        dtype: Some(DType::Bf16),
        ..HfOptions::default()
    }
}

pub(super) fn text(name: &str) -> &'static str {
    let found = MODELS.iter().find(|m| m.0 == name);
    found.expect("a known model").1
}

pub(super) fn config(name: &str) -> Value {
    serde_json::from_str(text(name)).expect("JSON")
}

fn format(name: &str) -> KvFormat {
    KvFormat::from_hf_config(text(name), &bf16()).expect("a format")
}

pub(super) fn refused(config: &Value) -> String {
    let error = KvFormat::from_hf_value(config, &HfOptions::default()).expect_err("refused");
    assert!(matches!(error, LayoutError::Config(_)), "{error:?}");
    error.to_string()
}

#[test]
fn bytes_per_token_are_exact() {
    for (name, _, bytes) in MODELS {
        assert_eq!(format(name).bytes_per_token(), bytes, "{name}");
    }
}

#[test]
fn every_known_type_has_a_real_config_here() {
    let mut known = Family::known();
    // The type of the text model alone, without a file of its own.
    known.retain(|t| *t != "gemma3_text");
    for model_type in known {
        let has = |m: &(&str, &str, u64)| config(m.0)["model_type"] == model_type;
        assert!(MODELS.iter().any(has), "{model_type}");
    }
}

#[test]
fn mtp_layers_count_only_when_asked_for() {
    for (name, layers, bytes) in [("deepseek-v3", 62, 71_424), ("glm-4.5-air", 47, 192_512)] {
        let options = HfOptions {
            mtp: true,
            ..bf16()
        };
        let format = KvFormat::from_hf_config(text(name), &options).expect("a format");
        assert_eq!(format.bytes_per_token(), bytes);
        assert_eq!(format.layers(), layers);
        let drafts = format
            .groups()
            .iter()
            .flat_map(|g| &g.layers)
            .filter(|l| l.draft);
        assert_eq!(drafts.map(|l| l.layer).collect::<Vec<_>>(), [layers - 1]);
    }
    for name in ["kimi-k2", "llama-3.1-8b"] {
        let options = HfOptions {
            mtp: true,
            ..bf16()
        };
        let error = KvFormat::from_hf_config(text(name), &options).expect_err("has none");
        assert!(
            error
                .to_string()
                .contains("num_nextn_predict_layers is 0 or not there"),
            "{error}"
        );
    }
}

/// Group, window and layers of a format.
fn shape(format: &KvFormat) -> Vec<(&str, Option<u32>, Vec<u32>)> {
    let groups = format.groups().iter();
    groups
        .map(|g| {
            let window = match g.kind {
                GroupKind::SlidingWindow { tokens } => Some(tokens),
                _ => None,
            };
            (
                g.name.as_str(),
                window,
                g.layers.iter().map(|l| l.layer).collect(),
            )
        })
        .collect()
}

#[test]
fn windows_are_where_the_model_has_them() {
    let every = |n: u32, layers: u32| -> (Vec<u32>, Vec<u32>) {
        (0..layers).partition(|i| (i + 1) % n == 0)
    };
    for (name, n, layers, window) in [
        ("gemma-2-2b", 2, 26, 4096),
        ("gemma-3-12b-it", 6, 48, 1024),
        ("gpt-oss-120b", 2, 36, 128),
    ] {
        let (full, sliding) = every(n, layers);
        let wanted = vec![("full", None, full), ("sliding", Some(window), sliding)];
        assert_eq!(shape(&format(name)), wanted, "{name}");
    }
    let all: Vec<u32> = (0..32).collect();
    assert_eq!(
        shape(&format("phi-3-mini-4k")),
        [("sliding", Some(2047), all.clone())]
    );
    assert_eq!(
        shape(&format("mistral-7b-v0.3")),
        [("full", None, all.clone())]
    );
    // Null is no window; a field that is not there is the class's.
    let mut mistral = config("mistral-7b-v0.3");
    mistral
        .as_object_mut()
        .expect("an object")
        .remove("sliding_window");
    let format = KvFormat::from_hf_value(&mistral, &bf16()).expect("a format");
    assert_eq!(shape(&format), [("sliding", Some(4096), all)]);
    // Qwen has windows from a layer on, and only if it says so.
    let mut qwen = config("qwen2.5-7b");
    qwen["use_sliding_window"] = true.into();
    qwen["max_window_layers"] = 20.into();
    let format = KvFormat::from_hf_value(&qwen, &bf16()).expect("a format");
    let wanted = vec![
        ("full", None, (0..20).collect()),
        ("sliding", Some(131_072), (20..28).collect()),
    ];
    assert_eq!(shape(&format), wanted);
    // One table for all layers.
    let options = HfOptions {
        one_table: true,
        ..bf16()
    };
    let format = KvFormat::from_hf_config(text("gemma-2-2b"), &options).expect("a format");
    assert_eq!(shape(&format), [("full", None, (0..26).collect())]);
    assert_eq!(format.bytes_per_token(), 106_496);
}

#[test]
fn nested_and_plain_files_of_one_model_are_equal() {
    let nested = config("gemma-3-12b-it");
    let mut plain = nested["text_config"].clone();
    plain["torch_dtype"] = "bfloat16".into();
    let format = |config| KvFormat::from_hf_value(config, &HfOptions::default()).expect("a format");
    assert_eq!(format(&nested), format(&plain));
    assert_eq!(format(&nested).model().facts["vocab_size"], "262208");
}

#[test]
fn the_two_dialects_of_rope_are_equal() {
    let old = config("llama-3.1-8b");
    let mut new = old.clone();
    let map = new.as_object_mut().expect("an object");
    let mut rope = map.remove("rope_scaling").expect("it is there");
    rope["rope_theta"] = map.remove("rope_theta").expect("it is there");
    map.insert("rope_parameters".into(), rope);
    let dtype = map.remove("torch_dtype").expect("it is there");
    map.insert("dtype".into(), dtype);
    let format = |config| KvFormat::from_hf_value(config, &HfOptions::default()).expect("a format");
    assert_eq!(format(&old), format(&new));
    assert_eq!(format(&old).model().facts["rope_theta"], "500000.0");
    // Llama 3 and 3.1 are told apart by nothing else.
    let mut other = old.clone();
    other["rope_scaling"] = Value::Null;
    assert_ne!(format(&old), format(&other));
}

#[test]
fn the_cache_dtype_comes_from_the_file_or_the_options() {
    let format = |config: &Value, dtype| {
        let options = HfOptions {
            dtype,
            ..HfOptions::default()
        };
        KvFormat::from_hf_value(config, &options)
    };
    let mut llama = config("llama-3.1-8b");
    assert_eq!(
        format(&llama, None).expect("a format").bytes_per_token(),
        131_072
    );
    let fp8 = format(&llama, Some(DType::F8E4m3)).expect("a format");
    assert_eq!(fp8.bytes_per_token(), 65_536);
    llama["torch_dtype"] = "float32".into();
    assert_eq!(
        format(&llama, None).expect("a format").bytes_per_token(),
        262_144
    );
    llama["torch_dtype"] = "bf17".into();
    assert!(refused(&llama).contains("torch_dtype is bf17; known are bf16, "));
    // The published file of gpt-oss names none.
    assert_eq!(
        refused(&config("gpt-oss-120b")),
        "torch_dtype is missing, and a gpt_oss needs it"
    );
}

#[test]
fn ids_and_revisions_are_only_what_the_options_say() {
    let mut llama = config("llama-3.1-8b");
    llama["_name_or_path"] = "/models/mine".into();
    let plain = KvFormat::from_hf_value(&llama, &bf16()).expect("a format");
    assert_eq!((&plain.model().id, &plain.model().revision), (&None, &None));
    assert!(!format!("{plain:?}").contains("/models"));
    let options = HfOptions {
        model_id: Some("meta-llama/Llama-3.1-8B".into()),
        revision: Some("main".into()),
        ..bf16()
    };
    let named = KvFormat::from_hf_value(&llama, &options).expect("a format");
    assert_eq!(named.model().id.as_deref(), Some("meta-llama/Llama-3.1-8B"));
    assert_eq!(named.model().revision.as_deref(), Some("main"));
}
