use std::time::Duration;

use serde_json::Value;

use super::schema::{
    BwConfig, Candidate, Difference, Executor, Hca, Initiator, Measured, MemoryConfig, Op, Pages,
    QueueKind, Row,
};
use super::*;

fn report() -> BwReport {
    let candidates = vec![
        Candidate {
            path: "arena".into(),
            usable: true,
            why_not: None,
        },
        Candidate {
            path: "rdma".into(),
            usable: false,
            why_not: Some(
                "no device: /sys/class/infiniband is empty, \"modprobe\" may help".into(),
            ),
        },
    ];
    let arena = Measured {
        op: Op::Read,
        by: None,
        path: "arena".into(),
        path_reason: "same host, both sides in arenas".into(),
        candidates: candidates.clone(),
        block_bytes: 4096,
        blocks: 4096,
        bytes: 16 << 20,
        transfers: 1000,
        operations: 4096,
        rates: vec![9.0e9, 11.0e9, 10.0e9],
        limits: vec![12.0e9, 12.5e9, 12.5e9],
        latency_ns: (1..=1000).map(|i| i * 2_000).collect(),
        prepare_ns: vec![12_345, 12_000, 13_000],
        post_ns: vec![400_000],
        wire_ns: vec![900_100],
        verified_bytes: 16 << 20,
    };
    let tcp = Measured {
        op: Op::Write,
        by: Some((Executor::HostBuild, QueueKind::Proxy, Hca::None)),
        path: "tcp".into(),
        path_reason: "asked for".into(),
        rates: vec![2.0e9],
        limits: Vec::new(),
        transfers: 7,
        latency_ns: vec![8_000_000; 7],
        block_bytes: 1 << 20,
        blocks: 16,
        operations: 16,
        ..arena.clone()
    };
    let rows: Vec<Row> = [arena, tcp]
        .into_iter()
        .filter_map(Measured::into_row)
        .collect();
    assert_eq!(rows.len(), 2);
    let config = BwConfig {
        version: "0.1.0".into(),
        peer: None,
        device: "soft0".into(),
        rdma: None,
        rails: Vec::new(),
        skipped: Vec::new(),
        path: "auto".into(),
        op: "both".into(),
        initiator: Initiator::Host,
        sizes: Some(vec![4096, 1 << 20]),
        pattern: None,
        seed: 7,
        duration_s: Some(Duration::from_millis(1500)),
        iters: None,
        timeout_s: Some(Duration::from_secs(30)),
        qp_per_transfer: 4,
        num_worker_threads: 2,
        post_batch_size: -1,
        max_send_wr: 0,
        max_cqe_num: 0,
        max_msg_sge: 0,
        enable_notification: false,
        authenticated: false,
        differences: vec![Difference {
            key: "qp_per_transfer".into(),
            here: 4,
            there: 8,
            used: Some(4),
        }],
        memory: MemoryConfig {
            kind: "host",
            gpu: None,
            target_gpu: None,
        },
        fence: "on".into(),
        gpu_workgroups: 0,
        pages: Pages {
            size: 2 << 20,
            how: "transparent huge".into(),
            why_not: vec!["0 reserved huge pages are free and 8 needed (vm.nr_hugepages)".into()],
        },
        cpus: 2,
    };
    BwReport::new(config, rows)
}

fn printed(format: Format) -> String {
    text(&report(), format, None).unwrap_or_else(|e| panic!("{e}"))
}

/// Compares with a golden file; `KVXFER_BLESS=1 cargo test` writes it anew.
fn golden(name: &str, found: &str) {
    let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("KVXFER_BLESS").is_some() {
        std::fs::write(&path, found).unwrap_or_else(|e| panic!("{path}: {e}"));
    }
    let wanted = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    assert_eq!(found, wanted, "{path}");
}

#[test]
fn json_is_one_line_and_as_documented() {
    let text = printed(Format::Json);
    assert_eq!(text.matches('\n').count(), 1);
    assert!(text.starts_with("{\"schema\":\"kvxfer.bw/1\",\"config\":{"));
    golden("bw.json", &text);
}

#[test]
fn every_json_field_is_in_the_document() {
    let seen = is_documented(serde_json::to_value(report()).unwrap_or_default());
    assert!(seen > 40, "{seen} fields seen");
}

/// Looks for the name of every field in the document; returns how many there were.
pub(super) fn is_documented(value: Value) -> usize {
    let document = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/json.md");
    let document = std::fs::read_to_string(document).unwrap_or_default();
    let mut open = vec![value];
    let mut seen = 0;
    while let Some(value) = open.pop() {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    assert!(
                        document.contains(&format!("`{name}`")),
                        "docs/json.md lacks {name}"
                    );
                    seen += 1;
                    open.push(value);
                }
            }
            Value::Array(values) => open.extend(values),
            _ => {}
        }
    }
    seen
}

#[test]
fn nulls_follow_the_rules() {
    let value = serde_json::to_value(report()).unwrap_or_default();
    let row = |i: usize, name: &str| value["rows"][i][name].clone();
    assert_eq!(row(0, "gb_per_s"), 10.0);
    assert_eq!(row(0, "limit_gb_per_s"), 12.5);
    assert_eq!(row(0, "of_limit"), 0.8);
    assert_eq!(row(0, "p999_us"), 1998.0);
    assert_eq!(row(0, "transfers"), 1000);
    for name in ["limit_gb_per_s", "of_limit", "p999_us"] {
        assert!(row(1, name).is_null(), "{name}");
    }
    assert!(row(0, "candidates")[0]["why_not"].is_null());
    let by = ["initiator", "executor", "queue", "hca"];
    assert_eq!(
        by.map(|name| row(0, name)),
        ["host".into(), Value::Null, Value::Null, Value::Null]
    );
    assert_eq!(
        by.map(|name| row(1, name)),
        ["gpu", "host-build", "proxy", "none"]
    );
}

#[test]
fn nothing_timed_is_no_row() {
    let row = Measured {
        op: Op::Read,
        by: None,
        path: "arena".into(),
        path_reason: String::new(),
        candidates: Vec::new(),
        block_bytes: 1,
        blocks: 1,
        bytes: 1,
        transfers: 0,
        operations: 1,
        rates: vec![1.0],
        limits: Vec::new(),
        latency_ns: Vec::new(),
        prepare_ns: Vec::new(),
        post_ns: Vec::new(),
        wire_ns: Vec::new(),
        verified_bytes: 0,
    };
    assert_eq!(row.into_row(), None);
}

#[test]
fn the_table_shows_the_same() {
    golden("bw.txt", &printed(Format::Table));
}

#[test]
fn a_table_wider_than_the_terminal_comes_in_parts() {
    let wide = printed(Format::Table);
    for width in [200, 100, 60, 40] {
        let parts = text(&report(), Format::Table, Some(width)).unwrap_or_default();
        // The notes below it are as long as they are: the terminal folds them.
        let table: Vec<&str> = parts
            .lines()
            .take_while(|line| !line.starts_with("arena: "))
            .collect();
        for line in &table {
            assert!(line.chars().count() <= width, "{width}: {line:?}");
        }
        // Every part has the columns that name its rows, and all columns are in one.
        let headers: Vec<&&str> = table.iter().filter(|l| l.starts_with("op ")).collect();
        assert_eq!(headers.len() > 1, width < 165, "{width}: {parts}");
        for word in wide.lines().next().unwrap_or_default().split_whitespace() {
            assert!(headers.iter().any(|header| header.contains(word)), "{word}");
        }
        assert_eq!(
            table.iter().filter(|l| l.starts_with("read ")).count(),
            headers.len()
        );
    }
}

#[test]
fn csv_shows_the_same() {
    let text = printed(Format::Csv);
    golden("bw.csv", &text);
    let value = serde_json::to_value(report()).unwrap_or_default();
    let fields = value["rows"][0].as_object().map(serde_json::Map::len);
    let header = text.lines().next().unwrap_or_default();
    assert_eq!(Some(header.split(',').count()), fields);
    for name in header.split(',') {
        assert!(value["rows"][0].get(name).is_some(), "{name}");
    }
}

#[test]
fn the_header_has_every_rail_and_those_that_are_not_used() {
    let mut report = report();
    let link = |device: &str, qpn: u32| {
        serde_json::json!({
            "device": device, "port": 1, "link_layer": "Ethernet", "mtu": 4096, "gid_index": 1,
            "gid": "10.1.0.2", "gid_type": "RoCE v2", "gid_reason": "RoCE v2, as asked",
            "peer_gid": "10.1.0.1",
            "queue_pairs": [{"qpn": qpn, "psn": 2, "peer_qpn": 3, "peer_psn": 4}],
        })
    };
    let rails = serde_json::json!([link("mlx5_0", 17), link("mlx5_1", 18)]);
    report.config.rails = serde_json::from_value(rails).unwrap_or_default();
    assert_eq!(report.config.rails.len(), 2);
    let skipped = serde_json::json!([{"device": "mlx5_2", "reason": "device failed"}]);
    report.config.skipped = serde_json::from_value(skipped).unwrap_or_default();
    let table = text(&report, Format::Table, None).unwrap_or_else(|e| panic!("{e}"));
    for wanted in [
        "mlx5_0 port 1, Ethernet",
        "mlx5_1 port 1, Ethernet",
        "local QPN 0x000011",
        "local QPN 0x000012",
        "mlx5_2 is not used: device failed",
    ] {
        assert!(table.contains(wanted), "{wanted} in {table}");
    }
}
