//! `kvxfer layout plan` on the built binary: what would move between which ranks.

mod layouts;

use layouts::{Files, json_of, kvxfer};
use serde_json::{Value, json};

#[test]
fn what_would_move() {
    let plan = |more: &[&str]| {
        let args = [
            &["plan", "llama-3.1-8b:tp=4", "llama-3.1-8b:tp=4", "--json"],
            more,
        ]
        .concat();
        json_of(&kvxfer(&args))
    };
    // A rank's block of a tensor: 16 tokens, 2 heads, 128 elements of 2 bytes. 64 tensors.
    let one = plan(&[]);
    let wanted = json!({
        "schema": "kvxfer.layout-plan/1", "op": "read", "blocks": 1, "runs": 1, "operations": 64,
        "bytes": 64 * 8192, "pieces": 64, "sizes": [{"bytes": 8192, "operations": 64}],
        "exchanges": null, "warnings": [],
    });
    assert_eq!(one, wanted);
    // A run is merged, what lies apart is not, and a message has its limit.
    let some = plan(&["--blocks", "0-3:8,9:2", "--op", "write"]);
    assert_eq!(some["op"], "write");
    assert_eq!(
        (some["blocks"].as_u64(), some["runs"].as_u64()),
        (Some(5), Some(2))
    );
    let sizes = json!([{"bytes": 8192, "operations": 64}, {"bytes": 32768, "operations": 64}]);
    assert_eq!(some["sizes"], sizes);
    let cut = plan(&["--blocks", "0-3", "--max-msg", "12K"]);
    assert_eq!(cut["bytes"], 64 * 32768);
    assert_eq!(cut["operations"], 64 * 3, "12K, 12K and 8K");

    // Another order of axes is no difference, but it has its price.
    let files = Files::new();
    let by_heads = files.by_heads("llama-3.1-8b");
    let report = json_of(&kvxfer(&["plan", "llama-3.1-8b", &by_heads, "--json"]));
    assert_eq!(
        report["sizes"],
        json!([{"bytes": 256, "operations": 64 * 128}])
    );
    let warning = report["warnings"][0].as_str().expect("a warning");
    assert!(warning.starts_with("256-byte pieces: expect"), "{warning}");
    let text = kvxfer(&["plan", "llama-3.1-8b", &by_heads]).stdout;
    let text = String::from_utf8(text).expect("text");
    assert!(
        text.contains("\n  8,192 × 256 B\n\nwarning: 256-byte pieces"),
        "{text}"
    );

    // What cannot be moved is told as by `diff`.
    let output = kvxfer(&["plan", "llama-3.1-8b:dtype=fp8", "llama-3.1-8b", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let report = json_of(&output);
    assert_eq!(report["schema"], "kvxfer.layout-diff/1");
    assert_eq!(report["verdict"], "incompatible");
    for (more, word) in [
        (["--blocks", "3-1"], "names no blocks"),
        (["--blocks", "1,1"], "twice"),
        (["--max-msg-sge", "0"], "max-msg-sge"),
        (["--op", "send"], "possible values"),
    ] {
        let output = kvxfer(&[&["plan", "llama-3.1-8b", "llama-3.1-8b"], &more[..]].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{more:?}: {stderr}");
        assert!(stderr.contains(word), "{more:?}: {stderr}");
    }
}

/// A plan, and its exchanges as (consumer, producer, operations, bytes).
fn planned(a: &str, b: &str, more: &[&str]) -> (Value, Vec<[u64; 6]>) {
    let output = kvxfer(&[&["plan", a, b, "--json"], more].concat());
    let report = json_of(&output);
    assert_eq!(output.status.code(), Some(0), "{report:#}");
    let of = |between: &Value| {
        let number = |value: &Value| value.as_u64().expect("a number");
        let rank = |side: &str| [&between[side]["pp"], &between[side]["tp"]].map(number);
        let ([cp, ct], [pp, pt]) = (rank("consumer"), rank("producer"));
        let [operations, bytes] = [&between["operations"], &between["bytes"]].map(number);
        [cp, ct, pp, pt, operations, bytes]
    };
    let exchanges = report["exchanges"].as_array();
    let exchanges = exchanges.map(|all| all.iter().map(of).collect());
    (report, exchanges.unwrap_or_default())
}

#[test]
fn what_would_move_between_ranks_that_keep_other_parts() {
    let (four, eight) = ("llama-3.1-8b:tp=4", "llama-3.1-8b:tp=8");
    // One head of two: a piece for each of 16 tokens, in 64 tensors.
    let (report, none) = planned(four, eight, &[]);
    let sizes = json!([{"bytes": 256, "operations": 1024}]);
    assert_eq!((&report["sizes"], none.len()), (&sizes, 0));
    let warning = report["warnings"][0].as_str().expect("a warning");
    assert!(warning.starts_with("256-byte pieces"), "{warning}");
    let (report, exchanges) = planned(four, eight, &["--all-ranks"]);
    let each = |tp: u64| [0, tp, 0, tp / 2, 1024, 1024 * 256];
    assert_eq!(exchanges, (0..8).map(each).collect::<Vec<_>>());
    assert_eq!(report["bytes"], 8 * 1024 * 256);
    // The other way each takes from two; of a latent each takes all from one.
    let (_, exchanges) = planned(eight, four, &["--all-ranks", "--op", "write"]);
    let from: Vec<(u64, u64)> = exchanges.iter().map(|e| (e[1], e[3])).collect();
    let pairs = (0..8).map(|tp| (tp / 2, tp));
    assert_eq!(from, pairs.collect::<Vec<_>>());
    let (_, exchanges) = planned("deepseek-v3:tp=8", "deepseek-v3:tp=2", &["--all-ranks"]);
    let each = |tp: u64| [0, tp, 0, 4 * tp, 61, 61 * 16 * 576 * 2];
    assert_eq!(exchanges, [each(0), each(1)]);
    // Stages: layers 0 to 15 and 16 to 31.
    let stages = "llama-3.1-8b:pp=2";
    let (_, exchanges) = planned(stages, "llama-3.1-8b", &["--all-ranks"]);
    let each = |pp: u64| [0, 0, pp, 0, 32, 32 * 32_768];
    assert_eq!(exchanges, [each(0), each(1)]);
    // Two ranks of which neither has anything of the other's.
    let (report, _) = planned(
        &format!("{stages},pp-rank=0"),
        &format!("{stages},pp-rank=1"),
        &[],
    );
    assert_eq!(report["operations"], 0);
    assert!(
        report["warnings"].to_string().contains("--all-ranks"),
        "{report}"
    );
    let text = kvxfer(&["plan", eight, four, "--all-ranks"]).stdout;
    let text = String::from_utf8(text).expect("text");
    let told = "\nconsumer      takes from\npp 0 tp 0     pp 0 tp 0: 262,144 B in 1,024 operations of 256 B or more\n              pp 0 tp 1: ";
    assert!(text.contains(told), "{text}");
}

#[test]
fn what_would_move_between_blocks_of_unequal_size() {
    let (small, large) = ("llama-3.1-8b", "llama-3.1-8b:block-size=64");
    let of_tokens = |tokens: u64| tokens * 8 * 128 * 2;
    let sizes = |plan: &Value| plan["sizes"].clone();
    let (one, _) = planned(small, large, &["--blocks", "4-7"]);
    assert_eq!(one["blocks"], 1);
    assert_eq!(
        sizes(&one),
        json!([{"bytes": of_tokens(64), "operations": 64}])
    );
    // 8 to 11 fill block 5; what begins in 3 does not fill block 1.
    let (apart, _) = planned(small, large, &["--blocks", "8-11:5,3:1"]);
    assert_eq!((&apart["blocks"], &apart["runs"]), (&json!(2), &json!(2)));
    assert_eq!(apart["bytes"], 64 * of_tokens(80));
    for (blocks, word) in [
        ("1", "say 1-1:N"),
        ("0-2:1,8", "do not fill"),
        ("0-3,0-3", "twice"),
    ] {
        let output = kvxfer(&["plan", small, large, "--blocks", blocks]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{blocks}: {stderr}");
        assert!(stderr.contains(word), "{blocks}: {stderr}");
    }
    // The other way one block fills four; units of 16 where neither divides the other.
    let (spread, _) = planned(large, small, &["--blocks", "0,2:100"]);
    assert_eq!(spread["blocks"], 8);
    assert_eq!(
        sizes(&spread),
        json!([{"bytes": of_tokens(64), "operations": 128}])
    );
    let third = "llama-3.1-8b:block-size=48";
    let (units, _) = planned(third, large, &["--blocks", "0-3"]);
    assert_eq!((&units["blocks"], &units["runs"]), (&json!(3), &json!(1)));
    assert_eq!(units["bytes"], 64 * of_tokens(192));
}
