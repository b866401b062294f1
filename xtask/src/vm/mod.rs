//! A virtual machine with RDMA: Debian's own kernel and soft-RoCE devices over this machine's
//! files. It needs no hardware, no KVM and no rights, but x86-64.

mod bzimage;
mod cpio;
mod guest;
mod image;
mod options;
pub(crate) mod suite;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;

use crate::packages;
use guest::{End, Ended, Task};
use image::Image;

/// As of `timeout` and `docker run`.
const TIMED_OUT: u8 = 124;
const NOT_RUN: u8 = 125;

/// `cargo xtask vm`: the command's exit code.
pub(crate) fn by_hand(root: &Path, args: &[&str]) -> Result<ExitCode, String> {
    let (options, command) = options::parse(args)?;
    let command: Vec<OsString> = command.iter().map(OsString::from).collect();
    Ok(by_itself(root, options, &command).unwrap_or_else(|e| {
        eprintln!("xtask: {e:#}");
        ExitCode::from(NOT_RUN)
    }))
}

fn by_itself(
    root: &Path,
    options: options::Options,
    command: &[OsString],
) -> anyhow::Result<ExitCode> {
    packages::rdma_guest().map_err(anyhow::Error::msg)?;
    let folder = std::env::current_dir().context("the current folder")?;
    let ended = run(
        root,
        &Task {
            options,
            folder: &folder,
            command,
            environment: &[],
        },
    )?;
    Ok(ExitCode::from(match ended.end {
        End::Exit(code) => code,
        End::TimedOut => TIMED_OUT,
        End::Died => NOT_RUN,
    }))
}

/// Runs a task in a guest and tells of an end that is not the command's own.
fn run(root: &Path, task: &Task) -> anyhow::Result<Ended> {
    let cache = cache(root)?;
    let image = Image::find_or_make(&cache)?;
    let ended = guest::run(root, &cache, &image, task)?;
    match ended.end {
        End::Exit(_) => {}
        End::TimedOut if ended.up.is_some() => {
            eprintln!("vm: the guest ran past {} s", task.options.seconds);
        }
        End::TimedOut => eprintln!(
            "vm: the guest was not up after {} s; its console:\n{}",
            task.options.seconds, ended.console
        ),
        End::Died => eprintln!("vm: the guest died; its console:\n{}", ended.console),
    }
    Ok(ended)
}

/// In cargo's build folder, so that it goes with `cargo clean`.
fn cache(root: &Path) -> anyhow::Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let target = target.unwrap_or_else(|| root.join("target"));
    Ok(std::path::absolute(target)?.join("vm"))
}
