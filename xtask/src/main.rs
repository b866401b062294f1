//! What a developer and the build machine run: `cargo xtask test`.
#![forbid(unsafe_code)]

mod command;
mod documents;
mod packages;
mod tally;
mod test;

use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask test [--long]

  test    format, clippy, build, unit, property, simulation and process tests, doc tests, docs
  --long  hours of it: ignored tests too, many more cases for each property, long soaks, millions of
          simulated histories, and a minute of each fuzz target
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let long = match args.as_slice() {
        ["test"] => false,
        ["test", "--long"] => true,
        ["help" | "--help" | "-h"] => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match root().and_then(|root| test::run(&root, long)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("xtask: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// The workspace's folder: cargo tells where this crate is.
fn root() -> anyhow::Result<PathBuf> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let root = here.parent().map(PathBuf::from);
    root.ok_or_else(|| anyhow::anyhow!("{} has no parent", here.display()))
}
