//! `cargo xtask gpu-bundle`: a folder that tests and measures GPU memory on a machine without Rust or network.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use serde_json::Value;

use crate::command::cargo;

/// The most bytes of the folder.
const MOST: u64 = 60_000_000;

/// The newest symbols of glibc that a program may ask for.
const GLIBC: (u32, u32) = (2, 34);

/// A program of the folder.
struct Program {
    /// What makes it: `cargo test` would make a test of an example.
    cargo: &'static [&'static str],
    /// Its name for cargo.
    target: &'static str,
    /// And in the folder.
    file: &'static str,
}

const PROGRAMS: [Program; 9] = [
    Program {
        cargo: &["test", "--no-run", "-p", "kvxfer-hipmem", "--test", "gpu"],
        target: "gpu",
        file: "gpu-tests",
    },
    Program {
        cargo: &["build", "-p", "kvxfer-hipmem", "--example", "gpu_table"],
        target: "gpu_table",
        file: "gpu_table",
    },
    Program {
        cargo: &["build", "-p", "kvxfer-hipmem", "--example", "gpu_post"],
        target: "gpu_post",
        file: "gpu_post",
    },
    Program {
        cargo: &["test", "--no-run", "-p", "kvxfer", "--test", "ipc"],
        target: "ipc",
        file: "engine-tests",
    },
    Program {
        cargo: &["test", "--no-run", "-p", "kvxfer", "--test", "staged"],
        target: "staged",
        file: "staged-tests",
    },
    Program {
        cargo: &["test", "--no-run", "-p", "kvxfer", "--test", "gpu_queue"],
        target: "gpu_queue",
        file: "queue-tests",
    },
    Program {
        cargo: &["build", "-p", "kvxfer", "--example", "gpu_push"],
        target: "gpu_push",
        file: "gpu_push",
    },
    Program {
        cargo: &["build", "-p", "kvxfer", "--example", "post_rate"],
        target: "post_rate",
        file: "post_rate",
    },
    Program {
        cargo: &["build", "-p", "kvxfer-cli", "--bin", "kvxfer"],
        target: "kvxfer",
        file: "kvxfer",
    },
];

/// Builds the folder; `None` for arguments that the command does not have.
pub(crate) fn by_hand(root: &Path, args: &[&str]) -> Option<anyhow::Result<bool>> {
    let to = match args {
        [] => root.join("target/gpu-bundle"),
        [folder] if !folder.starts_with('-') => PathBuf::from(folder),
        _ => return None,
    };
    Some(bundle(root, &to).map(|()| true))
}

fn bundle(root: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to).with_context(|| format!("making {}", to.display()))?;
    for Program {
        cargo,
        target: name,
        file,
    } in PROGRAMS
    {
        let built = build(root, cargo)?;
        let from = built
            .iter()
            .find(|(built, _)| built == name)
            .with_context(|| format!("cargo has built no {name}"))?;
        let bytes = fs::read(&from.1)?;
        if let Some((major, minor)) = newest_glibc(&bytes).filter(|newest| *newest > GLIBC) {
            bail!(
                "{name} asks for glibc {major}.{minor}, and may for 2.34: build it on an older system"
            );
        }
        let path = to.join(file);
        // A program that runs cannot be written over.
        let _ = fs::remove_file(&path);
        fs::write(&path, bytes)?;
        executable(&path)?;
    }
    fs::write(to.join("run.sh"), include_str!("run.sh"))?;
    executable(&to.join("run.sh"))?;
    fs::write(to.join("README.md"), include_str!("README.md"))?;
    fs::write(to.join("COMMIT"), commit(root)?)?;
    let mut all = 0;
    for entry in fs::read_dir(to)? {
        let entry = entry?;
        let len = entry.metadata()?.len();
        println!("{len:>10} bytes  {}", entry.file_name().to_string_lossy());
        all += len;
    }
    if all > MOST {
        bail!("{} has {all} bytes, more than {MOST}", to.display());
    }
    println!("{}", to.display());
    Ok(())
}

/// The programs' names and files.
fn build(root: &Path, args: &[&str]) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let mut command = Command::new(cargo());
    command.current_dir(root).args(args);
    command.args(["--release", "--message-format", "json-render-diagnostics"]);
    command.env("CARGO_PROFILE_RELEASE_STRIP", "symbols");
    command.env("CARGO_PROFILE_RELEASE_DEBUG", "none");
    // A seventh smaller, and it all has to fit.
    command.env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1");
    command.stdin(Stdio::null()).stderr(Stdio::inherit());
    let ended = command.output().context("starting cargo")?;
    if !ended.status.success() {
        bail!("cargo {}: {}", args.join(" "), ended.status);
    }
    Ok(executables(&String::from_utf8_lossy(&ended.stdout)))
}

/// What cargo's messages say it has built.
fn executables(messages: &str) -> Vec<(String, PathBuf)> {
    let messages = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let each = messages.filter_map(|message| {
        let name = message.pointer("/target/name")?.as_str()?;
        let file = message.get("executable")?.as_str()?;
        Some((name.to_owned(), file.into()))
    });
    each.collect()
}

/// The newest version of glibc's symbols that a program names.
fn newest_glibc(program: &[u8]) -> Option<(u32, u32)> {
    const NAME: &[u8] = b"GLIBC_";
    let named = program.windows(NAME.len()).enumerate();
    let versions = named
        .filter(|(_, name)| *name == NAME)
        .filter_map(|(at, _)| {
            let rest = program.get(at + NAME.len()..)?;
            let end = rest
                .iter()
                .position(|b| !b.is_ascii_digit() && *b != b'.')?;
            let text = std::str::from_utf8(rest.get(..end)?).ok()?;
            let mut numbers = text.split('.').map(str::parse::<u32>);
            Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
        });
    versions.max()
}

fn executable(path: &Path) -> anyhow::Result<()> {
    Ok(fs::set_permissions(
        path,
        fs::Permissions::from_mode(0o755),
    )?)
}

/// The commit, with a word for what is not in it.
fn commit(root: &Path) -> anyhow::Result<String> {
    let ended = Command::new("git")
        .current_dir(root)
        .args([
            "describe",
            "--always",
            "--abbrev=12",
            "--dirty",
            "--exclude=*",
        ])
        .output()
        .context("starting git")?;
    match ended.status.success() {
        true => Ok(String::from_utf8_lossy(&ended.stdout).into_owned()),
        false => Ok("unknown\n".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_glibc_is_found() {
        let program = b"\0GLIBC_2.2.5\0x\0GLIBC_2.34\0GLIBC_2.9\0GLIBC_PRIVATE\0GLIBC_";
        assert_eq!(newest_glibc(program), Some((2, 34)));
        assert_eq!(newest_glibc(b"GLIBC"), None);
        assert!(newest_glibc(b"GLIBC_2.39\0") > Some(GLIBC));
    }

    #[test]
    fn executables_are_found_among_cargos_messages() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"hipmem"},"executable":null}
not json
{"reason":"compiler-artifact","target":{"name":"gpu"},"executable":"/t/gpu-1"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(
            executables(messages),
            [("gpu".to_owned(), PathBuf::from("/t/gpu-1"))]
        );
    }
}
