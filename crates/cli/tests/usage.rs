//! The command's manners, on the built binary.

mod support;

use std::process::{Command, Output, Stdio};

use support::{command, spawn};

fn kvxfer(args: &[&str]) -> std::io::Result<Output> {
    Command::new(env!("CARGO_BIN_EXE_kvxfer"))
        .args(args)
        .stdin(Stdio::null())
        .output()
}

#[test]
fn bad_usage_is_exit_2_with_nothing_on_stdout() -> std::io::Result<()> {
    for args in [
        &["frobnicate"][..],
        &["bw", "--size", "12X"],
        &["bw", "--size", "64KB"],
        &["bw", "host:port"],
        &["bw", "--json", "--csv"],
        &["bw", "--duration", "1", "--iters", "1"],
        &["serve", "--listen", "nowhere:99999"],
        &["serve", "--max-memory", "0"],
        &["serve", "--exit-with-parent", "0"],
        &["ping", "-i", "10000000000000000000"],
        &["ping", "-W", "10000000000000000000"],
        &["ping", "--timeout", "10000000000000000000"],
        &["bw", "--timeout", "10000000000000000000"],
        &["bw", "--duration", "10000000000000000000"],
        &["serve", "--timeout", "10000000000000000000"],
    ] {
        let output = kvxfer(args)?;
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty(), "{args:?}");
        assert!(!output.stderr.is_empty(), "{args:?}");
    }
    Ok(())
}

#[test]
fn a_bad_value_is_named_with_its_fix() -> std::io::Result<()> {
    let text = kvxfer(&["bw", "-s", "64KB"])?.stderr;
    let text = String::from_utf8_lossy(&text);
    assert!(text.contains("64KB") && text.contains("KiB"), "{text}");
    let text = kvxfer(&["ping", "--timeout", "10000000000000000000"])?.stderr;
    let text = String::from_utf8_lossy(&text);
    assert!(
        text.contains("10000000000000000000") && text.contains("365 days"),
        "{text}"
    );
    Ok(())
}

#[test]
fn help_and_version_are_results() -> std::io::Result<()> {
    let help = kvxfer(&["bw", "--help"])?;
    assert_eq!(help.status.code(), Some(0));
    let text = String::from_utf8_lossy(&help.stdout);
    for option in [
        "--size",
        "--blocks",
        "--seed",
        "--model",
        "--tp",
        "--block-size",
        "--tokens",
        "--op",
        "--qp-per-transfer",
        "--post-batch-size",
        "--threads",
        "--duration",
        "--iters",
        "--device",
        "--path",
        "--kv-transfer-config",
        "--explain-config",
        "--min-gbps",
        "--timeout",
        "--secret-file",
        "--allow-unauthenticated",
        "--json",
        "--csv",
    ] {
        assert!(text.contains(option), "{option} is not in the help");
    }
    let version = kvxfer(&["--version"])?;
    assert_eq!(
        version.stdout,
        format!("kvxfer {}\n", env!("CARGO_PKG_VERSION")).into_bytes()
    );
    let serve = kvxfer(&["serve", "--help"])?;
    assert!(!String::from_utf8_lossy(&serve.stdout).contains("exit-with-parent"));
    Ok(())
}

/// Values of the heartbeat's timeout and interval, and of a transfer's time, as `--explain-config`
/// shows them, with where they came from.
fn times(args: &[&str], env: &[(&str, &str)]) -> [String; 3] {
    let given = ["--explain-config"];
    let mut command = command(&[args, &given].concat());
    let ended = spawn(command.envs(env.iter().copied())).end();
    assert_eq!(
        (ended.code, ended.stderr.as_str()),
        (Some(0), ""),
        "{args:?}"
    );
    [
        "heartbeat_timeout",
        "heartbeat_interval",
        "transfer_timeout",
    ]
    .map(|key| {
        let lines = ended.stdout.lines();
        let mut lines = lines.filter_map(|line| line.strip_prefix(key));
        let words = lines.next().unwrap_or_default().split_whitespace();
        words.collect::<Vec<_>>().join(" ")
    })
}

#[test]
fn a_heartbeat_that_is_set_holds_against_timeout() {
    let file = r#"{"kv_connector_extra_config": {"heartbeat_timeout": "30s"}}"#;
    for mode in ["serve", "bw"] {
        let args = [mode, "--timeout", "60"];
        let flag = ["5s flag --timeout", "1s flag --timeout"];
        let [timeout, interval, transfer] = times(&args, &[]);
        assert_eq!([timeout.as_str(), interval.as_str()], flag);
        assert_eq!(transfer, "60s flag --timeout");
        let [timeout, interval, _] = times(&[mode, "--timeout", "1500ms"], &[]);
        assert!(timeout.starts_with("500ms flag"), "{timeout}");
        assert!(interval.ends_with("flag --timeout"), "{interval}");

        let [timeout, interval, transfer] = times(&args, &[("KVXFER_HEARTBEAT_TIMEOUT", "30s")]);
        assert_eq!(timeout, "30s environment variable KVXFER_HEARTBEAT_TIMEOUT");
        assert_eq!(interval, "1s default");
        assert_eq!(transfer, "60s flag --timeout");
        let [timeout, interval, _] = times(&args, &[("KVXFER_HEARTBEAT_INTERVAL", "2s")]);
        assert_eq!(timeout, "5s default");
        assert!(interval.starts_with("2s environment"), "{interval}");
        let in_file = [&args[..], &["--kv-transfer-config", file]].concat();
        let [timeout, interval, _] = times(&in_file, &[]);
        assert!(timeout.starts_with("30s --kv-transfer-config"), "{timeout}");
        assert_eq!(interval, "1s default");
    }
}
