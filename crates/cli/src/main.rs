//! `kvxfer`: how fast KV-cache blocks move between two processes, over which path, and why not faster.
#![forbid(unsafe_code)]

mod args;
mod devices;
mod explain;
mod layout;
mod output;
mod problem;
mod progress;
mod random;
mod run;
mod say;
mod signals;
mod size;
mod stats;
mod target;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use args::{Cli, Command};
use problem::{Exit, Problem};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return help_or_usage(&error),
    };
    log_to_stderr(match &cli.command {
        // What goes wrong is told at the end, with what to do about it.
        Command::Bw(_) | Command::Ping(_) | Command::Layout { .. } | Command::Devices(_) => "error",
        Command::Serve(_) => "warn",
    });
    let done = match &cli.command {
        Command::Bw(args) => run::run_bw(args),
        Command::Ping(args) => run::run_ping(args),
        Command::Serve(args) => run::run_serve(args),
        Command::Layout { command } => layout::run(command),
        Command::Devices(args) => devices::run(args),
    };
    done.unwrap_or_else(|error| ended_by(&Problem::of(&error)))
}

fn ended_by(problem: &Problem) -> ExitCode {
    say::aside(problem);
    problem.exit.into()
}

/// What clap has to say: `--help` and `--version` are results, all else is bad usage.
fn help_or_usage(error: &clap::Error) -> ExitCode {
    match error.print() {
        Err(unwritten)
            if !error.use_stderr() && unwritten.kind() != std::io::ErrorKind::BrokenPipe =>
        {
            ended_by(&say::unwritten(&unwritten))
        }
        _ if error.use_stderr() => Exit::Usage.into(),
        _ => ExitCode::SUCCESS,
    }
}

/// What `KVXFER_LOG` asks for (`debug`, `kvxfer=trace`, …). Standard output is for results.
fn log_to_stderr(default: &str) {
    let filter = EnvFilter::try_from_env("KVXFER_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        // It would say so on standard error, and panic if that has failed too.
        .log_internal_errors(false)
        .init();
}
