//! The command's manners, on the built binary.

use std::process::{Command, Output, Stdio};

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
