//! `kvxfer layout` on the built binary: what operators get wrong, and what they are told.

mod layouts;

use layouts::{Files, config, json_of, kvxfer};
use serde_json::{Value, json};

/// What is wrong; the two sides; the verdict; a field that must be told, with both values; a part of
/// its fix.
type Mistake<'a> = (&'a str, &'a str, &'a str, &'a str, [&'a str; 3], &'a str);

#[test]
fn mistakes_are_named_with_their_field_and_fix() {
    let files = Files::new();
    let llama = "llama-3.1-8b";
    let rope = files.config("rope", llama, &[("rope_theta", json!(10_000.0))]);
    let vocab = files.config("vocab", llama, &[("vocab_size", json!(128_264))]);
    let heads = files.config("heads", llama, &[("num_key_value_heads", json!(4))]);
    let dim = files.config("dim", llama, &[("head_dim", json!(64))]);
    let gemma = config("gemma-3-12b-it");
    let window = ("text_config.sliding_window", json!(512));
    let window = files.config("window", "gemma-3-12b-it", &[window]);
    let one_table = format!("{gemma}:one-table");
    let plain = files.layout("plain", llama, |_| {});
    let each = |change: fn(&mut Value)| {
        move |layers: &mut Value| {
            for layer in layers.as_array_mut().expect("layers") {
                change(layer);
            }
        }
    };
    let stacked = files.layout(
        "stacked",
        llama,
        each(|layer| {
            let mut kv = layer["tensors"][0].clone();
            kv["name"] = json!("kv");
            kv["role"] = json!("key_value");
            let kinds = kv["axes"].as_array_mut().expect("axes");
            kinds.insert(0, json!({"kind": "kv", "extent": 2}));
            kv["sharded"] = json!(kv["sharded"].as_u64().expect("by heads") + 1);
            layer["tensors"] = json!([kv]);
        }),
    );
    let swapped = files.layout(
        "swapped",
        llama,
        each(|layer| {
            layer["tensors"][0]["role"] = json!("value");
            layer["tensors"][1]["role"] = json!("key");
        }),
    );
    let missing = files.layout("missing", llama, |layers| {
        layers.as_array_mut().expect("layers").remove(7);
    });
    let draft = files.layout("draft", llama, |layers| layers[31]["draft"] = json!(true));
    let scaled = files.layout(
        "scaled",
        llama,
        each(|layer| {
            let two = json!({"constant": {"axes": [], "bits": [0x4000_0000]}});
            layer["tensors"][0]["scaling"] = two;
        }),
    );
    let whole = files.layout(
        "whole",
        llama,
        each(|layer| layer["tensors"][1]["sharded"] = Value::Null),
    );

    const NO: &str = "incompatible";
    const CUT: &str = "reshardable";
    let k = "groups[0].layers[0-31].k";
    let mistakes: [Mistake<'_>; 29] = [
        (
            "dtype",
            "llama-3.1-8b:dtype=fp8",
            llama,
            NO,
            [&format!("{k}.dtype"), "fp8_e4m3", "bf16"],
            "cache dtype",
        ),
        (
            "half",
            "llama-3.1-8b:dtype=f16",
            llama,
            NO,
            [&format!("{k}.dtype"), "f16", "bf16"],
            "cache dtype",
        ),
        (
            "exponent bits",
            "llama-3.1-8b:dtype=fp8_e4m3",
            "llama-3.1-8b:dtype=fp8_e5m2",
            NO,
            [&format!("{k}.dtype"), "fp8_e4m3", "fp8_e5m2"],
            "cache dtype",
        ),
        (
            "AMD's first fp8",
            "llama-3.1-8b:dtype=fp8_e4m3",
            "llama-3.1-8b:dtype=fp8_e4m3fnuz",
            NO,
            [&format!("{k}.dtype"), "fp8_e4m3", "fp8_e4m3fnuz"],
            "cache dtype",
        ),
        (
            "block size",
            "llama-3.1-8b:block-size=16",
            "llama-3.1-8b:block-size=64",
            CUT,
            ["groups[0].block_tokens", "16", "64"],
            "start the decode instance with --block-size 16",
        ),
        (
            "tp",
            "llama-3.1-8b:tp=4",
            "llama-3.1-8b:tp=8",
            CUT,
            ["tp", "4", "8"],
            "--tensor-parallel-size 4",
        ),
        (
            "tp, the other way",
            "llama-3.1-8b:tp=8",
            "llama-3.1-8b:tp=1",
            CUT,
            ["tp", "8", "1"],
            "--tensor-parallel-size 8",
        ),
        (
            "pp",
            "llama-3.1-8b:pp=2",
            llama,
            CUT,
            ["pp", "2", "1"],
            "--pipeline-parallel-size 2",
        ),
        (
            "tp and dtype",
            "llama-3.1-8b:tp=2,dtype=fp8",
            llama,
            NO,
            [&format!("{k}.dtype"), "fp8_e4m3", "bf16"],
            "cache dtype",
        ),
        (
            "tp ranks crossed",
            "llama-3.1-8b:tp=2",
            "llama-3.1-8b:tp=2,tp-rank=1",
            CUT,
            [&format!("{k}.shard"), "0..4", "4..8"],
            "pair equal ranks",
        ),
        (
            "pp ranks crossed",
            "llama-3.1-8b:pp=2",
            "llama-3.1-8b:pp=2,pp-rank=1",
            CUT,
            ["placement.layers", "0..16", "16..32"],
            "pair equal ranks",
        ),
        (
            "a larger model",
            "llama-3.1-70b",
            llama,
            NO,
            ["model.num_hidden_layers", "80", "32"],
            "the same model",
        ),
        (
            "another family",
            &config("qwen3-8b"),
            llama,
            NO,
            ["model.model_type", "qwen3", "llama"],
            "the same model",
        ),
        (
            "another attention",
            "deepseek-v3",
            llama,
            NO,
            ["model.model_type", "deepseek_v3", "llama"],
            "the same model",
        ),
        (
            "another id",
            "llama-3.1-8b:model-id=a/base",
            "llama-3.1-8b:model-id=a/instruct",
            NO,
            ["model.id", "a/base", "a/instruct"],
            "the same model",
        ),
        (
            "another revision",
            "llama-3.1-8b:revision=main",
            "llama-3.1-8b:revision=v2",
            NO,
            ["model.revision", "main", "v2"],
            "revision",
        ),
        (
            "MTP on one side",
            "deepseek-v3:mtp",
            "deepseek-v3",
            NO,
            ["groups[0].layers[61]", "present", "missing"],
            "speculative decoding",
        ),
        (
            "another rotation",
            &rope,
            llama,
            NO,
            ["model.rope_theta", "10000.0", "500000.0"],
            "the same model",
        ),
        (
            "added tokens",
            llama,
            &vocab,
            NO,
            ["model.vocab_size", "128256", "128264"],
            "the same model",
        ),
        (
            "KV heads",
            llama,
            &heads,
            NO,
            [&format!("{k}.heads"), "8", "4"],
            "the same model",
        ),
        (
            "head size",
            llama,
            &dim,
            NO,
            [&format!("{k}.dim"), "128", "64"],
            "the same model",
        ),
        (
            "window",
            &gemma,
            &window,
            NO,
            [
                "groups[1].kind",
                "a window of 1024 tokens",
                "a window of 512 tokens",
            ],
            "cache configuration",
        ),
        (
            "window pools on one side",
            &gemma,
            &one_table,
            NO,
            ["groups", "2 (full, sliding)", "1 (full)"],
            "cache configuration",
        ),
        (
            "K and V stacked on one side",
            &plain,
            &stacked,
            CUT,
            ["groups[0].layers[0-31].tensors", "k, v", "kv"],
            "attention backend",
        ),
        (
            "K and V swapped",
            &plain,
            &swapped,
            NO,
            [&format!("{k}.role"), "keys", "values"],
            "engine version",
        ),
        (
            "a layer missing",
            &plain,
            &missing,
            NO,
            ["groups[0].layers[7]", "present", "missing"],
            "the same model",
        ),
        (
            "sharded on one side",
            &plain,
            &whole,
            CUT,
            ["groups[0].layers[0-31].v.sharded", "by head", "replicated"],
            "tensor-parallel size",
        ),
        (
            "a draft layer",
            &plain,
            &draft,
            NO,
            ["groups[0].layers[31].draft", "false", "true"],
            "speculative decoding",
        ),
        (
            "scales on one side",
            &plain,
            &scaled,
            NO,
            [&format!("{k}.scaling"), "none", "2"],
            "calibration",
        ),
    ];
    for (what, a, b, verdict, [field, producer, consumer], fix) in mistakes {
        let output = kvxfer(&["diff", a, b, "--json"]);
        let report = json_of(&output);
        assert_eq!(report["schema"], "kvxfer.layout-diff/1", "{what}");
        assert_eq!(report["verdict"], verdict, "{what}: {report:#}");
        let code = i32::from(verdict == NO);
        assert_eq!(output.status.code(), Some(code), "{what}");
        let strict = kvxfer(&["diff", a, b, "--json", "--strict"]);
        assert_eq!(strict.status.code(), Some(1), "{what}");
        assert_eq!(strict.stdout, output.stdout, "{what}");
        let differences = report["differences"].as_array().expect("a list");
        let told = differences.iter().find(|d| d["field"] == field);
        let told = told.unwrap_or_else(|| panic!("{what}: no {field}: {report:#}"));
        assert_eq!(told["producer"], producer, "{what}");
        assert_eq!(told["consumer"], consumer, "{what}");
        let said = told["fix"].as_str().expect("text");
        assert!(said.contains(fix), "{what}: {said}");
        assert_ne!(told["why"], "", "{what}");
        // The worst first, and it is what the verdict rests on.
        let severities: Vec<bool> = differences
            .iter()
            .map(|d| d["severity"] == "reshard")
            .collect();
        assert!(severities.is_sorted(), "{what}: {report:#}");
        assert_eq!(severities[0], verdict == CUT, "{what}");
        // What can be copied can be planned, whatever it costs.
        let plan = kvxfer(&["plan", a, b, "--all-ranks", "--blocks", "0-3", "--json"]);
        assert_eq!(plan.status.code(), Some(code), "{what}");
        let schema = match verdict {
            NO => "kvxfer.layout-diff/1",
            _ => "kvxfer.layout-plan/1",
        };
        assert_eq!(json_of(&plan)["schema"], schema, "{what}");
    }
}

#[test]
fn what_is_no_mistake_is_identical() {
    let files = Files::new();
    let llama = config("llama-3.1-8b");
    // Another name, another place, another order of axes, the folder: none of them is compared.
    let copy = files.config("other-name", "llama-3.1-8b", &[]);
    std::fs::create_dir(files.path("model")).expect("a folder");
    files.config("model/config.json", "llama-3.1-8b", &[]);
    let folder = files.path("model");
    let folder = folder.to_str().expect("text");
    let by_heads = files.by_heads(&llama);
    for other in [&llama, &copy, folder, &by_heads, "llama-3.1-8b"] {
        let output = kvxfer(&["diff", &llama, other, "--json"]);
        let report = json_of(&output);
        assert_eq!(report["verdict"], "identical", "{other}: {report:#}");
        assert_eq!(output.status.code(), Some(0), "{other}");
        let strict = kvxfer(&["diff", &llama, other, "--strict"]);
        assert_eq!(strict.status.code(), Some(0), "{other}");
        let warning = report["warnings"][0].as_str().expect("a warning");
        assert!(warning.contains("nothing proves"), "{warning}");
    }
    let named = "llama-3.1-8b:model-id=meta-llama/Llama-3.1-8B,revision=0e9e39f";
    let report = json_of(&kvxfer(&["diff", named, named, "--json"]));
    assert_eq!(report["verdict"], "identical");
    assert_eq!(report["warnings"], json!([]));
}

#[test]
fn figures_of_a_rank() {
    let args = ["show", "llama-3.1-70b", "--tp", "4", "--memory", "40G"];
    let more = ["--gbps", "100", "--prefill-ms", "40", "--json"];
    let report = json_of(&kvxfer(&[&args[..], &more].concat()));
    assert_eq!(report["schema"], "kvxfer.layout/1");
    assert_eq!(report["bytes_per_token_all_ranks"], 327_680);
    assert_eq!(report["bytes_per_token"], 81_920);
    assert_eq!(report["bytes_per_block"], 1_310_720);
    assert_eq!(report["regions"].as_array().map(Vec::len), Some(160));
    let region = json!({
        "group": 0, "layer": 0, "tensor": "k", "dtype": "bf16", "bytes_per_block": 8192,
        "axes": [
            {"kind": "token", "extent": 16, "of": 16, "bytes": 512},
            {"kind": "head", "extent": 2, "of": 8, "bytes": 256},
            {"kind": "dim", "extent": 128, "of": 128, "bytes": 2},
        ],
        "shard": {"first": 0, "count": 2},
    });
    assert_eq!(report["regions"][0], region);
    let request = json!({
        "tokens": 4096, "blocks": [256], "bytes": 335_544_320, "bytes_all_ranks": 1_342_177_280,
    });
    assert_eq!(report["request"], request);
    assert_eq!(report["memory"]["blocks"], 32_768);
    assert_eq!(report["memory"]["tokens"], 524_288);
    let ms = report["transfer"]["ms"].as_f64().expect("a number");
    assert!((ms - 26.843_545_6).abs() < 1e-6, "{ms}");
    let share = report["transfer"]["share"].as_f64().expect("a number");
    assert!((share - ms / 40.0).abs() < 1e-9, "{share}");
}

#[test]
fn a_layout_for_people() {
    let args = [
        "show",
        "llama-3.1-70b",
        "--tp",
        "4",
        "--gbps",
        "100",
        "--prefill-ms",
        "40",
    ];
    let text = String::from_utf8(kvxfer(&args).stdout).expect("text");
    for part in [
        "rank tp 0 of 4, pp 0 of 1: layers 0-79\n",
        "group full: every token; a block of 16 tokens is 1,310,720 B (1.25 MiB)\n",
        "  k of layers 0-79, 8,192 B\n    └─ 16 × token, each 512 B\n       \
         └─ 2 × head (0-1 of 8), each 256 B\n          └─ 128 × dim, each 2 B (bf16)\n",
        "a token    81,920 B on this rank, 327,680 B in all\n",
        "a request  4,096 tokens: 256 blocks, 335,544,320 B (320.00 MiB) on this rank",
        "67 % of 40 ms of prefill: more than half",
    ] {
        assert!(text.contains(part), "{part:?} in {text}");
    }
    let diff = kvxfer(&[
        "diff",
        "llama-3.1-8b:tp=4",
        "llama-3.1-8b:tp=8,block-size=32",
    ]);
    let text = String::from_utf8(diff.stdout).expect("text");
    let wanted = [
        "            producer           consumer",
        "            llama-3.1-8b:tp=4  llama-3.1-8b:tp=8,block-size=32",
        "  model     llama              llama",
        "  id        -                  -",
        "  revision  -                  -",
        "  layers    32                 32",
        "≠ tp        4                  8",
        "  pp        1                  1",
        "  groups    full               full",
        "≠ block     16                 32",
        "  tensors   k bf16, v bf16     k bf16, v bf16",
        "  a token   131,072 B          131,072 B",
    ];
    let lines: Vec<&str> = text.lines().take(wanted.len()).collect();
    assert_eq!(lines, wanted);
    assert!(
        text.contains(
            "\nreshardable: 2 differences, the worst first\n\ntp: 4 | 8 (reshardable)\n  why: "
        ),
        "{text}"
    );
}

#[test]
fn bad_input_is_bad_usage_with_its_place() {
    let files = Files::new();
    let base = "llama-3.1-8b";
    let path = |name: &str| files.path(name).to_str().expect("text").to_owned();
    std::fs::write(files.path("broken"), "{\"model_type\": ").expect("written");
    std::fs::write(files.path("list"), "[1, 2]").expect("written");
    let cases = [
        (
            files.config(
                "layers",
                base,
                &[("num_hidden_layers", json!(1_000_000_000_000_u64))],
            ),
            "num_hidden_layers",
        ),
        (
            files.config("no-heads", base, &[("num_attention_heads", Value::Null)]),
            "num_attention_heads",
        ),
        (
            files.config("words", base, &[("hidden_size", json!("many"))]),
            "hidden_size",
        ),
        (
            files.config("type", base, &[("model_type", json!("gpt2"))]),
            "gpt2",
        ),
        (
            files.config("dtype", base, &[("torch_dtype", json!("float7"))]),
            "float7",
        ),
        (path("broken"), "no JSON"),
        (path("list"), "list"),
        (path("not-there"), "built-in model"),
        (
            files.write("schema", &json!({"schema": "kvxfer.bw/1"})),
            "no layout",
        ),
        (
            files.write("empty", &json!({"schema": "kvxfer.layout/1"})),
            "no layout file",
        ),
        (
            files.layout("twice", base, |l| l[1] = l[0].clone()),
            "layer",
        ),
        (
            files.layout("zero", base, |l| {
                l[0]["tensors"][0]["axes"][0]["extent"] = json!(0)
            }),
            "layout",
        ),
        (
            files.layout("huge", base, |l| {
                l[0]["tensors"][0]["axes"][2]["extent"] = json!(u64::MAX)
            }),
            "layout",
        ),
        ("llama-3.1-8b:tp=3".to_owned(), "divides 8"),
        ("llama-3.1-8b:pp=33".to_owned(), "layers"),
        ("llama-3.1-8b:tp=2,tp-rank=2".to_owned(), "tp"),
        ("llama-3.1-8b:block-size=1048577".to_owned(), "block"),
        (
            "llama-3.1-8b:colour=red".to_owned(),
            "`colour` is no option",
        ),
    ];
    for (source, word) in &cases {
        for args in [
            &["show", source][..],
            &["diff", source, base],
            &["diff", base, source],
        ] {
            let output = kvxfer(args);
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
            assert!(output.stdout.is_empty(), "{args:?}");
            assert!(stderr.contains(word), "{args:?}: {stderr}");
        }
    }
    for args in [
        &["show"][..],
        &["show", base, "--tp", "0"],
        &["show", base, "--dtype", "fp7"],
        &["show", base, "--prefill-ms", "10"],
        &["show", base, "--gbps", "10", "--prefill-ms", "0"],
        &["show", base, "--tokens", "0"],
        &["diff", base],
    ] {
        let output = kvxfer(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty(), "{args:?}");
    }
}
