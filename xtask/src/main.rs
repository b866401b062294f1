//! What a developer and the build machine run: `cargo xtask test`, and `cargo xtask vm` for one
//! command on a machine with RDMA, `cargo xtask kernels` for the device code, `cargo xtask gpu-bundle`
//! for what tests and measures it on a GPU.
#![forbid(unsafe_code)]

mod command;
mod documents;
mod gpu_bundle;
mod kernels;
mod packages;
mod tally;
mod test;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask test [--long]
       cargo xtask vm [--seconds N] [--cpus N] [--memory MIB] [--two-hosts] -- COMMAND ARGUMENTS...
       cargo xtask kernels [--check]
       cargo xtask gpu-bundle [FOLDER]

  test    format, clippy, build, unit, property, simulation and process tests, tests of RDMA in a
          virtual machine, doc tests, docs
  --long  hours of it: ignored tests too, many more cases for each property, long soaks, millions of
          simulated histories, a minute of each fuzz target, and a table of speeds beside perftest

  vm           runs COMMAND as root in this folder, in a virtual machine that sees this machine's
               files (what it changes is thrown away) and has the RDMA device rxe0 (10.7.0.1); ends
               as COMMAND does, with 124 when N seconds are over, or with 125 when the machine died
               or could not be started
  --seconds    300, with the seconds of starting
  --cpus       2
  --memory     3072
  --two-hosts  also the RDMA devices ra (10.1.0.1) and rb (10.1.0.2), at the ends ha and hb of a
               cable

  kernels  builds kernels/ for every GPU and for the host into kernels/prebuilt/, with clang-22
  --check  whether that is of these sources, what the compiler makes of them, and whether the
           instructions are there that must be; as in test

  gpu-bundle  builds FOLDER (target/gpu-bundle) with run.sh, which tests and measures GPU memory on a
              machine that has the driver of a GPU, and neither Rust nor network
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let root = match root() {
        Ok(root) => root,
        Err(e) => return failed(&e),
    };
    let good = match args.as_slice() {
        ["test"] => test::run(&root, false),
        ["test", "--long"] => test::run(&root, true),
        ["kernels", args @ ..] => match kernels::by_hand(&root, args) {
            Some(good) => good,
            None => {
                eprint!("{USAGE}");
                return ExitCode::from(2);
            }
        },
        ["gpu-bundle", args @ ..] => match gpu_bundle::by_hand(&root, args) {
            Some(good) => good,
            None => {
                eprint!("{USAGE}");
                return ExitCode::from(2);
            }
        },
        ["vm", args @ ..] => {
            return vm::by_hand(&root, args).unwrap_or_else(|why| {
                eprint!("xtask: {why}\n\n{USAGE}");
                ExitCode::from(2)
            });
        }
        ["help" | "--help" | "-h"] => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match good {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => failed(&e),
    }
}

fn failed(e: &anyhow::Error) -> ExitCode {
    eprintln!("xtask: {e:#}");
    ExitCode::FAILURE
}

/// The workspace's folder: cargo tells where this crate is.
fn root() -> anyhow::Result<PathBuf> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let root = here.parent().map(PathBuf::from);
    root.ok_or_else(|| anyhow::anyhow!("{} has no parent", here.display()))
}
