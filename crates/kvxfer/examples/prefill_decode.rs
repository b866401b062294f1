//! Disaggregated serving in small: a prefill process, a decode process, and a router that carries
//! tickets between them. Meant to be copied from.
//!
//! ```text
//!              requests, tickets (JSON lines: kv_transfer_params)
//!            ┌──────────────────── router ────────────────────┐
//!            ▼                    (parent)                     ▼
//!     prefill process ◄══════ control, KV blocks ══════► decode process
//!      offer / push                                       pull / expect
//! ```
//!
//! ```sh
//! cargo run --release -p kvxfer --example prefill_decode -- --mode both --path auto
//! ```
//!
//! In READ mode the decode process reads blocks that the prefill process offers; in WRITE mode the
//! prefill process pushes each layer when it is computed. Many requests are under way at once, with
//! every story that an engine meets: partial prefix hits, full hits, chunked prefill, layers that
//! come before their ticket, aborts, clients that go away. The decode process checks every byte.
//! The exit code is 0 only if all was as it should be.
//!
//! - `prefill_decode/cache.rs`: a KV format with two cache groups, its memory, its block pool
//! - `prefill_decode/prefill.rs`: what a prefill engine does with kvxfer
//! - `prefill_decode/decode.rs`: what a decode engine does with kvxfer
//! - `prefill_decode/desk.rs`: configuration, and how events reach an engine's loop
//! - `prefill_decode/router.rs`, `prefill_decode/message.rs`: the rest of the deployment

#[path = "prefill_decode/cache.rs"]
mod cache;
#[path = "prefill_decode/decode.rs"]
mod decode;
#[path = "prefill_decode/desk.rs"]
mod desk;
#[path = "prefill_decode/message.rs"]
mod message;
#[path = "prefill_decode/prefill.rs"]
mod prefill;
#[path = "prefill_decode/router.rs"]
mod router;

use std::error::Error;
use std::process::ExitCode;

use message::Mode;

/// Whatever went wrong.
type Failed = Box<dyn Error + Send + Sync>;

const USAGE: &str = "\
usage: prefill_decode [--mode read|write|both] [--path auto|arena|process-vm|tcp]
                      [--requests N] [--in-flight N]";

/// What was asked for.
#[derive(Debug)]
struct Options {
    modes: Vec<Mode>,
    path: String,
    requests: u32,
    in_flight: usize,
    /// Which engine this process is; the parent is none.
    engine: Option<String>,
}

fn options() -> Result<Options, Failed> {
    let mut options = Options {
        modes: vec![Mode::Read, Mode::Write],
        path: "auto".into(),
        requests: 64,
        in_flight: 32,
        engine: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(flag) = args.next() {
        let value = args.next().ok_or_else(|| format!("{flag}: no value"))?;
        match (flag.as_str(), value.as_str()) {
            ("--mode", "both") => {}
            ("--mode", "read") => options.modes = vec![Mode::Read],
            ("--mode", "write") => options.modes = vec![Mode::Write],
            ("--path", _) => options.path = value,
            ("--requests", _) => options.requests = value.parse()?,
            // What the decode process has blocks for.
            ("--in-flight", _) => options.in_flight = value.parse::<usize>()?.clamp(1, 32),
            ("--engine", _) => options.engine = Some(value),
            _ => return Err(format!("{flag} {value}: not understood").into()),
        }
    }
    Ok(options)
}

fn run(options: &Options) -> Result<(), Failed> {
    // Memory that has a file can be mapped by a peer on this host; process_vm_readv needs none.
    let shareable = options.path != "process-vm";
    match options.engine.as_deref() {
        None => {
            for mode in &options.modes {
                println!("{}", router::run(*mode, options)?);
            }
            Ok(())
        }
        Some(name @ "prefill") => {
            let config = desk::config(name, "kv_producer", &options.path)?;
            prefill::run(config, shareable)
        }
        Some(name @ "decode") => {
            let config = desk::config(name, "kv_consumer", &options.path)?;
            decode::run(config, shareable)
        }
        Some(other) => Err(format!("no engine is called {other}").into()),
    }
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("prefill_decode: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut causes = error.to_string();
            let mut at = error.source();
            while let Some(cause) = at {
                causes += &format!(": {cause}");
                at = cause.source();
            }
            let who = options.engine.as_deref().unwrap_or("router");
            eprintln!("prefill_decode ({who}): {causes}");
            ExitCode::FAILURE
        }
    }
}
