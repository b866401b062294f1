//! Debian packages that a step needs.

use crate::command::quiet;

/// Makes sure that `program` can be started, installing `package` with apt-get if it cannot and we
/// are root.
///
/// # Errors
///
/// Why the program is not there, for people to read.
pub(crate) fn need(program: &str, package: &str) -> Result<(), String> {
    if quiet(program, &["--version"]).is_some() {
        return Ok(());
    }
    if !is_root() {
        return Err(format!("{program} is missing: apt-get install {package}"));
    }
    println!("installing {package}, for {program} is missing");
    let install = ["install", "-y", "--no-install-recommends", package];
    let installed = quiet("apt-get", &install) == Some(true)
        || (quiet("apt-get", &["update"]) == Some(true)
            && quiet("apt-get", &install) == Some(true));
    if installed && quiet(program, &["--version"]).is_some() {
        Ok(())
    } else {
        Err(format!(
            "{program} is missing and apt-get install {package} failed"
        ))
    }
}

/// Makes sure that `cargo fuzz` is there, building it if it is not.
///
/// # Errors
///
/// Why it is not there, for people to read.
pub(crate) fn cargo_fuzz() -> Result<(), String> {
    let cargo = crate::command::cargo();
    let cargo = cargo.to_string_lossy();
    let there = || quiet(&cargo, &["fuzz", "--version"]) == Some(true);
    if there() {
        return Ok(());
    }
    println!("installing cargo-fuzz");
    let installed = quiet(&cargo, &["install", "--locked", "cargo-fuzz"]) == Some(true);
    if installed && there() {
        Ok(())
    } else {
        Err("cargo-fuzz is missing: cargo install --locked cargo-fuzz".into())
    }
}

/// Whether network namespaces can be made here.
///
/// # Errors
///
/// Why not, for people to read.
pub(crate) fn namespaces() -> Result<(), String> {
    let name = format!("kvx-probe-{}", std::process::id());
    let made = quiet("ip", &["netns", "add", &name]) == Some(true);
    // What was half made goes too.
    let gone = quiet("ip", &["netns", "del", &name]) == Some(true);
    if made && gone {
        Ok(())
    } else {
        Err("no network namespaces can be made: that needs root and CAP_SYS_ADMIN".into())
    }
}

fn is_root() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .and_then(|ids| ids.split_ascii_whitespace().nth(1))
        == Some("0")
}
