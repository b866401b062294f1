//! `kvxfer`: how fast KV-cache blocks move between two processes, over which path, and why not faster.
#![forbid(unsafe_code)]

mod args;
mod explain;
mod output;
mod problem;
mod progress;
mod run;
mod signals;
mod size;
mod stats;
mod target;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use args::{Cli, Command};
use problem::Problem;

fn main() -> ExitCode {
    // clap itself ends with exit code 2 on bad usage, and with 0 after --help.
    let cli = Cli::parse();
    log_to_stderr();
    let done = match &cli.command {
        Command::Bw(args) => run::run_bw(args),
        Command::Serve(args) => run::run_serve(args),
    };
    done.unwrap_or_else(|error| {
        let problem = Problem::of(&error);
        eprintln!("{problem}");
        problem.exit.into()
    })
}

/// Warnings, or what `KVXFER_LOG` asks for (`debug`, `kvxfer=trace`, …). Standard output is for results.
fn log_to_stderr() {
    let filter = EnvFilter::try_from_env("KVXFER_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .init();
}
