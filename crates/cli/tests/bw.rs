//! `kvxfer bw` and `kvxfer serve` as people start them: real processes on this machine.

mod support;

use nix::sys::signal::Signal;
use serde_json::Value;
use support::{
    Secrets, children_of, command, leaves_nothing, locking, run, runs, serve, spawn, start,
    wait_until,
};

/// A short run.
const SMALL: [&str; 6] = ["--size", "4K,64K", "--blocks", "16", "--iters", "12"];

fn bw(args: &[&str]) -> Vec<String> {
    let parts = [&["bw"], args, &SMALL].concat();
    parts.into_iter().map(str::to_owned).collect()
}

fn run_bw(args: &[&str]) -> support::Ended {
    let args = bw(args);
    run(&args.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Every field that docs/json.md promises, with the rules that hold between them.
fn check_rows(report: &Value, path: &str, rows: usize) {
    assert_eq!(report["schema"], "kvxfer.bw/1");
    let all = report["rows"].as_array().expect("rows");
    assert_eq!(all.len(), rows, "{report}");
    for row in all {
        let number = |name: &str| {
            row[name]
                .as_f64()
                .unwrap_or_else(|| panic!("{name}: {row}"))
        };
        assert_eq!(row["path"], path, "{row}");
        assert!(row["path_reason"].as_str().is_some_and(|r| !r.is_empty()));
        let candidates = row["candidates"].as_array().expect("candidates");
        assert_eq!(candidates.len(), 4, "{row}");
        for candidate in candidates {
            let why_not = &candidate["why_not"];
            assert_eq!(candidate["usable"] == true, why_not.is_null(), "{row}");
        }
        assert_eq!(number("blocks"), 16.0, "{row}");
        assert_eq!(number("bytes"), number("blocks") * number("block_bytes"));
        // Nothing merges.
        assert_eq!(number("operations"), number("blocks"), "{row}");
        // All slots' first passes.
        assert_eq!(number("verified_bytes"), number("bytes") * 4.0, "{row}");
        assert_eq!(number("transfers"), 12.0, "{row}");
        let positive = ["gb_per_s", "limit_gb_per_s", "blocks_per_s", "p50_us"];
        for positive in positive {
            assert!(number(positive) > 0.0, "{positive}: {row}");
        }
        // Of a few small blocks that a kernel's host build posts on a busy machine it may round to nothing.
        assert!(
            number("of_limit") > 0.0 || row["initiator"] == "gpu",
            "{row}"
        );
        assert!(number("p50_us") <= number("p99_us"), "{row}");
        assert!(row["p999_us"].is_null(), "{row}");
        for time in ["prepare_us", "post_us", "wire_us"] {
            assert!(number(time) > 0.0, "{time}: {row}");
        }
    }
}

fn over(path: &str) {
    let ended = run_bw(&["--json", "--path", path]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let report = ended.json();
    check_rows(&report, path, 4);
    assert!(report["config"]["peer"].is_null());
    assert_eq!(report["config"]["path"], path);
    let ops: Vec<&Value> = (0..4).map(|i| &report["rows"][i]["op"]).collect();
    assert_eq!(ops, ["read", "write", "read", "write"]);
}

#[test]
fn every_byte_arrives_over_arena() {
    over("arena");
}

#[test]
fn every_byte_arrives_over_process_vm() {
    over("process-vm");
}

#[test]
fn every_byte_arrives_over_tcp() {
    over("tcp");
}

/// Every round's bytes, in both directions.
#[test]
fn every_round_is_verified_where_that_is_wanted() {
    let ended = run_bw(&["--json", "--path", "arena", "--verify"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let report = ended.json();
    for row in report["rows"].as_array().expect("rows") {
        let number = |name: &str| row[name].as_u64().expect("a number");
        // Four at a time: the first pass, and three rounds.
        assert_eq!(number("transfers"), 12, "{row}");
        assert_eq!(
            number("verified_bytes"),
            number("bytes") * (4 + 12),
            "{row}"
        );
    }
}

/// Also of a model with windows: one block table for all layers, as an engine without pools has it.
#[test]
fn the_pattern_of_a_config_is_moved() {
    let configs = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../kvxfer/src/layout/hf/configs"
    );
    let config = format!("{configs}/gemma-2-2b.json");
    let pattern = ["bw", "--json", "--model", &config, "--tp", "2"];
    let ended = run(&[&pattern[..], &["--tokens", "40", "--iters", "5"]].concat());
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let report = ended.json();
    assert_eq!(report["config"]["pattern"]["model"], config.as_str());
    // 26 layers, K and V, three blocks of 16 tokens, 2 of 4 heads of 256 channels in bf16.
    let row = &report["rows"][0];
    assert_eq!(row["blocks"], 26 * 2 * 3);
    assert_eq!(row["block_bytes"], 16 * 2 * 256 * 2);
}

#[test]
fn an_engines_pattern_is_moved() {
    let args = [
        "bw",
        "--json",
        "--model",
        "deepseek-v3",
        "--tokens",
        "64",
        "--iters",
        "5",
        "--seed",
        "9",
    ];
    let ended = run(&args);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let report = ended.json();
    assert_eq!(report["config"]["pattern"]["tokens"], 64);
    assert_eq!(report["config"]["seed"], 9);
    let row = &report["rows"][0];
    // 61 layers, 4 blocks of 16 tokens, a latent of 576 in bf16.
    assert_eq!(row["blocks"], 4 * 61);
    assert_eq!(row["block_bytes"], 16 * 576 * 2);
    assert_eq!(row["verified_bytes"], 4 * 4 * 61 * 16 * 576 * 2);
}

/// A kernel posts the blocks; on this machine its host build.
fn by_a_kernel(args: &[&str], path: &str, (queue, hca): (&str, &str)) -> Value {
    let ended = run_bw(&[&["--json", "--initiator", "gpu"], args].concat());
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(
        ended.stderr.contains("warning: there is no GPU"),
        "{ended:?}"
    );
    let report = ended.json();
    let ops: &[&str] = match args.contains(&"write") {
        true => &["write"],
        false => &["read", "write"],
    };
    check_rows(&report, path, 2 * ops.len());
    let rows = report["rows"].as_array().expect("rows");
    for (row, op) in rows.iter().zip(ops.iter().cycle()) {
        let by = ["op", "initiator", "executor", "queue", "hca"].map(|name| &row[name]);
        assert_eq!(by, [op, "gpu", "host-build", queue, hca], "{row}");
    }
    report
}

#[test]
fn kernels_push_and_pull_over_arena() {
    by_a_kernel(
        &["--queue", "proxy", "--path", "arena"],
        "arena",
        ("proxy", "none"),
    );
}

#[test]
fn kernels_push_over_tcp() {
    by_a_kernel(
        &["--op", "write", "--path", "tcp"],
        "tcp",
        ("proxy", "none"),
    );
}

#[test]
fn kernels_write_work_requests_to_a_model_of_a_nic() {
    for queue in ["gpu-wqe", "direct"] {
        by_a_kernel(
            &["--queue", queue, "--path", "arena"],
            "arena",
            (queue, "model"),
        );
    }
    let table = run(&[
        "bw",
        "--size",
        "4K",
        "--blocks",
        "8",
        "-n",
        "1",
        "--initiator",
        "gpu",
        "--queue",
        "direct",
    ]);
    assert_eq!(table.code, Some(0), "{table:?}");
    assert!(
        table
            .stdout
            .contains("through the queue direct, to a model of an mlx5 NIC"),
        "{table:?}"
    );
}

/// A kernel copies the blocks into the target's memory itself: on this machine its host build, between processes.
#[test]
fn kernels_write_the_targets_blocks_themselves() {
    let args = [
        "bw",
        "--json",
        "--initiator",
        "gpu",
        "--queue",
        "links",
        "--mem",
        "gpu",
        "--size",
        "4K,64K",
        "--blocks",
        "16",
        "-n",
        "3",
    ];
    let ended = spawn(command(&args).env("KVXFER_GPU", "host")).end();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(
        ended.stderr.contains("warning: there is no GPU"),
        "{ended:?}"
    );
    let report = ended.json();
    let rows = report["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 2);
    for row in rows {
        let by = ["op", "initiator", "executor", "queue", "hca", "path"].map(|name| &row[name]);
        let wanted = ["write", "gpu", "host-build", "links", "none", "ipc"];
        assert_eq!(by, wanted, "{row}");
        assert!(row["verified_bytes"].as_u64() > Some(0), "{row}");
    }
}

#[test]
fn what_kernels_cannot_do_is_a_usage_error() {
    for (args, cause) in [
        (
            &["--initiator", "gpu", "--queue", "wqe"][..],
            "possible values: proxy, gpu-wqe, direct, links",
        ),
        (&["--queue", "proxy"], "say --initiator gpu"),
        (
            &["--initiator", "gpu", "--queue", "links"],
            "say --mem gpu with --queue links",
        ),
        (
            &[
                "--initiator",
                "gpu",
                "--queue",
                "links",
                "--mem",
                "gpu",
                "--op",
                "read",
            ],
            "pushes and does not pull",
        ),
    ] {
        let ended = run_bw(args);
        assert_eq!(ended.code, Some(2), "{ended:?}");
        assert!(ended.stderr.contains(cause), "{ended:?}");
        assert!(ended.stdout.is_empty(), "{ended:?}");
    }
    let help = run(&["bw", "--help"]);
    assert!(help.stdout.contains("--initiator") && help.stdout.contains("direct"));
}

#[test]
fn a_duration_a_table_and_csv() {
    let table = run(&[
        "bw", "--size", "4K", "--blocks", "8", "--op", "read", "-D", "50ms",
    ]);
    assert_eq!(table.code, Some(0), "{table:?}");
    assert!(
        table.stdout.contains("of limit") && table.stdout.contains("seed"),
        "{table:?}"
    );
    let csv = run_bw(&["--csv"]);
    assert_eq!(csv.code, Some(0), "{csv:?}");
    assert_eq!(csv.stdout.lines().count(), 5, "{csv:?}");
    assert!(csv.stdout.starts_with("op,path,"), "{csv:?}");
}

#[test]
fn a_server_serves_two_clients_at_once_and_ends_on_sigterm() {
    let (server, address) = serve(&["--qp-per-transfer", "3"]);
    let args: Vec<Vec<String>> = (0..2)
        .map(|_| bw(&[&address, "--json", "-q", "2"]))
        .collect();
    let clients: Vec<_> = args
        .iter()
        .map(|args| start(&args.iter().map(String::as_str).collect::<Vec<_>>()))
        .collect();
    for client in clients {
        let ended = client.end();
        assert_eq!(ended.code, Some(0), "{ended:?}");
        let report = ended.json();
        check_rows(&report, "arena", 4);
        assert_eq!(report["config"]["peer"], address);
        // The difference is settled by the side that connects, and named.
        let difference = &report["config"]["differences"][0];
        assert_eq!(difference["key"], "qp_per_transfer");
        assert_eq!(
            (&difference["here"], &difference["there"]),
            (&2.into(), &3.into())
        );
        assert_eq!(difference["used"], 2);
    }
    server.signal(Signal::SIGTERM);
    let ended = server.end();
    assert_eq!(ended.code, Some(0), "{ended:?}");
}

#[test]
fn a_server_with_a_model_refuses_another() {
    let (_server, address) = serve(&["--model", "llama-3.1-8b", "--block-size", "32"]);
    run_bw(&[&address]).failed(1, &[&address, "KV formats do not fit", "--model"]);
    let same = [
        "bw",
        &address,
        "--json",
        "--model",
        "llama-3.1-8b",
        "--block-size",
        "32",
        "--tokens",
        "64",
        "--iters",
        "4",
    ];
    let ended = run(&same);
    assert_eq!(ended.code, Some(0), "{ended:?}");
}

#[test]
fn the_target_ends_with_its_parent() {
    let client = start(&["bw", "--size", "4K", "--blocks", "64", "-D", "600"]);
    let mut target = None;
    wait_until("a target", || {
        target = children_of(client.pid()).first().copied();
        target.is_some()
    });
    let target = target.expect("a target");
    assert!(runs(target));
    client.signal(Signal::SIGKILL);
    assert_eq!(client.end().code, None);
    wait_until("the target's end", || !runs(target));
}

#[test]
fn nothing_is_left_of_a_run() {
    let args = bw(&["--json"]);
    leaves_nothing(start(&args.iter().map(String::as_str).collect::<Vec<_>>()));
}

#[test]
fn secrets_must_be_the_same() {
    let secrets = Secrets::new();
    let (one, two) = (secrets.path("one"), secrets.path("two"));
    let (_server, address) = serve(&["--secret-file", &one]);
    let ended = run_bw(&[&address, "--json", "--secret-file", &one]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(ended.json()["config"]["authenticated"], true);
    run_bw(&[&address, "--secret-file", &two]).failed(3, &[&address, "secret"]);
    run_bw(&[&address]).failed(3, &[&address, "--secret-file or KVXFER_SECRET_FILE here"]);
    let (_open, open) = serve(&[]);
    run_bw(&[&open, "--secret-file", &one]).failed(3, &[&open, "server has no secret"]);
    let missing = secrets.path("missing");
    run_bw(&["--secret-file", &missing]).failed(2, &[&missing]);
    // From the environment, and through to the target that is started.
    let args = bw(&["--json"]);
    let ended = spawn(
        command(&args.iter().map(String::as_str).collect::<Vec<_>>())
            .env("KVXFER_SECRET_FILE", &two),
    )
    .end();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(ended.json()["config"]["authenticated"], true);
}

#[test]
fn a_busy_port_is_told() {
    let (_server, address) = serve(&[]);
    let busy = run(&["serve", "--listen", &address]);
    busy.failed(
        2,
        &[&address, "evidence: ", "in use", "fix: ", "another port"],
    );
    assert!(busy.stdout.is_empty(), "{busy:?}");
}

#[test]
fn where_nobody_can_listen_is_told() {
    // An address of documentation (RFC 5737), and a name that never resolves (RFC 2606).
    for (address, said) in [
        ("192.0.2.1:0", "ip address"),
        ("no-such-host.invalid:0", "ip address"),
    ] {
        run(&["serve", "--allow-unauthenticated", "--listen", address]).failed(
            2,
            &[address.trim_end_matches(":0"), "evidence: ", "fix: ", said],
        );
    }
}

#[test]
fn a_path_that_the_server_does_not_take_is_told() {
    let server = spawn(command(&["serve", "--listen", "127.0.0.1:0"]).env("KVXFER_PATH", "tcp"));
    let address = server.address();
    run_bw(&[&address, "--path", "arena"]).failed(
        3,
        &[
            &address,
            "the arena path cannot be used",
            "the peer's configuration",
            "--path tcp",
        ],
    );
    run_bw(&[&address]).failed(
        3,
        &["no path leads", "the peer's configuration", "--path tcp"],
    );
    assert_eq!(run_bw(&[&address, "--path", "tcp"]).code, Some(0));
}

#[test]
fn listening_to_the_network_needs_a_secret_or_leave() {
    run(&["serve", "--listen", "0.0.0.0:0"]).failed(2, &["0.0.0.0", "--allow-unauthenticated"]);
    let server = start(&["serve", "--listen", "0.0.0.0:0", "--allow-unauthenticated"]);
    assert!(server.address().starts_with("0.0.0.0:"));
}

#[test]
fn blocks_of_a_gpu_go_to_the_hosts_memory_and_back() {
    let ways = [
        ("auto", "ipc", "the GPU reaches the host's memory"),
        (
            "staged,arena",
            "staged",
            "over arena; not by GPU links: the configuration does not allow it",
        ),
    ];
    for (allowed, path, why) in ways {
        for [own, target] in [["gpu", "host"], ["host", "gpu"]] {
            let args = bw(&["--mem", own, "--peer-mem", target, "--json"]);
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let mut command = command(&args);
            command
                .env("KVXFER_GPU", "host")
                .env("KVXFER_PATH", allowed);
            let ended = spawn(&mut command).end();
            let report = ended.json();
            let rows = report["rows"].as_array().expect("rows");
            assert_eq!(rows.len(), 4, "{report}");
            for row in rows {
                assert_eq!(row["path"], path, "{row}");
                let reason = row["path_reason"].as_str().expect("a reason");
                assert!(reason.contains(why), "{row}");
                let number = |name: &str| row[name].as_f64().unwrap_or_default();
                assert_eq!(number("verified_bytes"), number("bytes") * 4.0, "{row}");
                // One pinned copy, or what goes beneath, is measured beside it.
                assert!(number("limit_gb_per_s") > 0.0, "{row}");
            }
            let memory = &report["config"]["memory"];
            assert_eq!(memory["kind"], own);
            assert_eq!(memory["gpu"].is_null(), own == "host", "{memory}");
            assert_eq!(memory["target_gpu"].is_null(), target == "host", "{memory}");
        }
    }
}

#[test]
fn too_little_memory_is_told() {
    let (_server, address) = serve(&["--max-memory", "1M"]);
    run_bw(&[&address]).failed(3, &[&address, "--max-memory"]);
    // And there is nothing that holds so much.
    let ended = run(&["bw", "--size", "1G", "--blocks", "1000000"]);
    ended.failed(4, &["memory", "--blocks"]);
}

#[test]
fn a_device_or_path_that_is_not_there_is_told() {
    run_bw(&["--path", "rdma"]).failed(4, &["rdma", "--path auto"]);
    run_bw(&["--device", "mlx5_77"]).failed(4, &["mlx5_77", "soft"]);
}

#[test]
fn too_slow_is_exit_1_with_the_report() {
    let ended = run_bw(&["--json", "--min-gbps", "1000000"]);
    ended.failed(1, &["1000000 gigabits", "read of 4K"]);
    check_rows(&ended.json(), "arena", 4);
    assert_eq!(run_bw(&["--min-gbps", "0.000001"]).code, Some(0));
}

#[test]
fn settings_have_an_order_and_say_where_they_come_from() {
    let json = r#"{"kv_connector_extra_config": {"qp_per_transfer": "8", "post_batch_size": 16}}"#;
    let args = [
        "bw",
        "--explain-config",
        "--kv-transfer-config",
        json,
        "--threads",
        "1",
    ];
    let ended = spawn(
        command(&args)
            .env("KVXFER_QP_PER_TRANSFER", "7")
            .env("KVXFER_NUM_WORKER_THREADS", "9"),
    )
    .end();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let line = |key: &str| {
        let line = ended.stdout.lines().find(|line| line.starts_with(key));
        line.unwrap_or_else(|| panic!("{key}: {ended:?}"))
            .to_owned()
    };
    let has = |key: &str, parts: &[&str]| {
        let line = line(key);
        for part in parts {
            assert!(line.contains(part), "{part:?} is not in {line:?}");
        }
    };
    has(
        "qp_per_transfer",
        &["7", "KVXFER_QP_PER_TRANSFER", "overrides 8"],
    );
    has("num_worker_threads", &["1", "--threads", "overrides 9"]);
    has("post_batch_size", &["16", "--kv-transfer-config"]);
    has("max_send_wr", &["0", "default"]);

    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("kv.json");
    std::fs::write(&file, json).expect("written");
    let at = format!("@{}", file.display());
    let ended = run_bw(&["--json", "--kv-transfer-config", &at]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(ended.json()["config"]["qp_per_transfer"], 8);
    assert_eq!(ended.json()["config"]["post_batch_size"], 16);
}

#[test]
fn settings_that_cannot_be_are_usage_errors() {
    let config = |text: &'static str| ["--kv-transfer-config", text];
    run_bw(&config("{\"nonsense\": 1}")).failed(2, &["nonsense", "evidence: ", "fix: "]);
    run_bw(&config("{\"max_send\": 1}")).failed(2, &["fix: did you mean", "max_send_wr"]);
    run_bw(&config("garbage")).failed(2, &["line 1 column 1", "fix: ", "@FILE"]);
    run_bw(&config("@/nonexistent.json")).failed(2, &["/nonexistent.json", "fix: "]);
    for args in [
        ["--threads", "100000"],
        ["--threads", "0"],
        ["--qp-per-transfer", "100000"],
        ["--qp-per-transfer", "0"],
        ["--tx-depth", "9999999"],
        ["--timeout", "1ms"],
    ] {
        let ended = run_bw(&args);
        ended.failed(
            2,
            &[args[0], "cannot be", "evidence: ", "fix: say ", " from "],
        );
        assert!(ended.stdout.is_empty(), "{ended:?}");
    }
    run(&["bw", "--model", "gpt-2"]).failed(2, &["gpt-2", "llama-3.1-8b", "deepseek-v3"]);
    run(&["bw", "--model", "lama-3.1-8b"]).failed(2, &["fix: say llama-3.1-8b,"]);
    run(&["bw", "--model", "llama-3.1-8b", "--tp", "3"])
        .failed(2, &["8 heads", "3 ranks", "fix: ", "--tp"]);
    run(&["bw", "--size", "1", "--blocks", "4000000000"]).failed(2, &["fix: ", "--blocks"]);
    run(&["bw", "--secret-file", "/"]).failed(2, &["evidence: ", "fix: --secret-file"]);
}

#[test]
fn memory_that_cannot_be_is_told_at_once() {
    for args in [
        &["--size", "3G", "--blocks", "1000000"][..],
        &["--size", "1", "--blocks", "2000000000"],
        &["--model", "llama-3.1-8b", "--tokens", "4000000000"],
    ] {
        let ended = run(&[&["bw"], args].concat());
        ended.failed(
            4,
            &[
                "MiB of memory are needed",
                "evidence: ",
                "fix: ",
                "--blocks",
            ],
        );
    }
}

/// A file that takes nothing: what is written to it fails with `ENOSPC`.
fn full() -> std::process::Stdio {
    let file = std::fs::OpenOptions::new().write(true).open("/dev/full");
    file.expect("Linux has it").into()
}

#[test]
fn what_cannot_be_written_is_a_failed_check() {
    let all: [&[&str]; 6] = [
        &["ping", "-c", "1"],
        &["ping", "-c", "1", "--json"],
        &["bw", "--json", "--size", "4K", "--blocks", "4", "-n", "4"],
        &["bw", "--explain-config"],
        &["serve", "--listen", "127.0.0.1:0"],
        &["--help"],
    ];
    for args in all {
        let ended = support::spawn_to(&mut command(args), full()).end();
        ended.failed(1, &["standard output", "No space left", "fix: "]);
        // Nobody hears why: the code tells at least that it failed.
        let deaf = command(args).stdout(full()).stderr(full()).status();
        assert_eq!(deaf.expect("it runs").code(), Some(1), "{args:?}");
    }
    let deaf = command(&["bw", "--path", "shm"]).stderr(full()).status();
    assert_eq!(deaf.expect("it runs").code(), Some(2));
}

#[test]
fn a_reader_that_has_gone_is_no_failure() {
    for args in [
        &["bw", "--json", "--size", "4K", "--blocks", "4", "-n", "4"][..],
        &["bw", "--size", "4K", "--blocks", "4", "-n", "4"],
        &["bw", "--explain-config"],
        &["--version"],
    ] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let ended = support::spawn_to(&mut command(args), writer.into()).end();
        assert_eq!(
            (ended.code, ended.stderr.as_str()),
            (Some(0), ""),
            "{args:?}"
        );
    }
}

/// A process may lock 4 MiB of memory, and no more: the card refuses the 6 that are to be registered for a GPU, and
/// the blocks go through buffers that are smaller.
#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_memory_of_a_gpu_that_a_card_refuses_is_staged_and_the_reasons_are_told() {
    let names = std::env::var("KVXFER_TEST_RDMA").expect("KVXFER_TEST_RDMA names an RDMA device");
    let name = names.split([',', ':']).next().expect("one");
    let args = ["bw", "-d", name, "--mem", "gpu", "--op", "read", "--json"];
    let size = ["--size", "64K", "--blocks", "96", "--iters", "2"];
    let kvxfer = |memlock: &str, path: &str| {
        let plain = command(&[&args[..], &size, &["--path", path]].concat());
        let mut limited = locking(memlock, &plain);
        limited.env("KVXFER_GPU", "host");
        limited.env("KVXFER_STAGING_SLOTS", "4");
        limited.env("KVXFER_STAGING_SLOT_BYTES", "64K");
        spawn(&mut limited).end()
    };
    let rows = |report: &Value| {
        let rows = report["rows"].as_array().expect("rows").clone();
        assert_eq!(rows.len(), 1, "{report}");
        rows
    };
    let reasons = [
        "this side's memory is a GPU's, and not registered",
        "As a dma-buf: ",
        "By its address: Cannot allocate memory",
    ];
    let tight = "4194304";
    let report = kvxfer(tight, "auto").json();
    for row in rows(&report) {
        assert_eq!(row["path"], "staged", "{row}");
        let candidates = row["candidates"].as_array().expect("candidates");
        let rdma = candidates.iter().find(|c| c["path"] == "rdma");
        let why_not = rdma.and_then(|c| c["why_not"].as_str()).unwrap_or_default();
        let told = row["path_reason"].as_str().unwrap_or_default();
        for reason in reasons {
            assert!(why_not.contains(reason), "{reason}: {row}");
            assert!(told.contains(reason), "{reason}: {row}");
        }
        let number = |name: &str| row[name].as_u64().unwrap_or_default();
        assert!(number("verified_bytes") >= 6 << 20, "{row}");
    }
    // Where it may not be staged there is no way, for both reasons.
    let unstaged = "the configuration does not allow it";
    kvxfer(tight, "rdma").failed(4, &[&reasons[1..], &[unstaged]].concat());
    // And with as much as it wants the card takes it as it is.
    for row in rows(&kvxfer("unlimited", "auto").json()) {
        assert_eq!(row["path"], "rdma", "{row}");
    }
}
