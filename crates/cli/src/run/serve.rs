//! `kvxfer serve`.

use std::process::ExitCode;

use anyhow::Context;
use kvxfer::Engine;
use kvxfer::bench::BenchSide;

use super::case;
use super::mem::Mem;
use super::settings::Settings;
use crate::args::ServeArgs;
use crate::problem::{Exit, Problem};
use crate::say;
use crate::signals::{self, StopSignals};

/// `kvxfer serve`: the other side of `bw`, until SIGTERM or SIGINT.
///
/// # Errors
///
/// A [`Problem`], or what the layers below say.
pub(crate) fn run_serve(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    // First of all: threads started later inherit that the signals do not strike.
    let signals = StopSignals::take()
        .map_err(|errno| Problem::from_chain(Exit::Device, &errno))
        .context("taking the stop signals over")?;
    if let Some(parent) = args.exit_with_parent {
        let there = signals::end_with_parent(parent)
            .map_err(|errno| Problem::from_chain(Exit::Device, &errno))
            .context("asking to end with the parent")?;
        if !there {
            return Ok(ExitCode::SUCCESS);
        }
    }
    let mut flags = vec![("allow_bench", "kvxfer serve", "true".to_owned())];
    if let Some(listen) = &args.listen {
        flags.push(("listen", "--listen", listen.to_string()));
    }
    if let Some(size) = args.max_memory {
        flags.push(("max_memory", "--max-memory", size.0.to_string()));
    }
    if let Some(Mem::Gpu(Some(number))) = args.mem {
        flags.push(("gpu_device", "--mem", number.to_string()));
    }
    let place = match args.mem {
        None => None,
        Some(Mem::Host) => Some("host"),
        Some(Mem::Gpu(_)) => Some("gpu"),
    };
    if let Some(place) = place {
        flags.push(("bench_memory", "--mem", place.to_owned()));
    }
    // A parent has warned of its own settings, which these are.
    let warn = args.exit_with_parent.is_none();
    let settings = Settings::gather(&args.tuning, &args.trust, &flags, args.timeout, warn)?;
    if args.tuning.explain_config {
        settings.explain()?;
        return Ok(ExitCode::SUCCESS);
    }
    let config = settings.config;
    let host = config.listen_on().0.to_owned();
    let side = BenchSide::new(&case::served(&args.pattern)?)?;
    let port = config.listen_on().1;
    let address = if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    };
    let engine = Engine::new(config, side.format().clone(), side.placement().clone())?;
    if args.pattern.model.is_some() {
        kvxfer::bench::hold_to_format(&engine);
    }
    let address = engine.listen(&address).map_err(|error| match error {
        kvxfer::Error::Resolve { source, .. } => {
            Problem::usage(format!("{host} is no address of this machine"))
                .with_evidence(source.to_string())
                .with_fix("`ip address` shows those it has; 0.0.0.0 or [::] is all of them")
                .into()
        }
        error => anyhow::Error::new(error),
    })?;
    // Nobody need read it.
    say::result(&format!("listening {address}\n"))?;
    let signal = signals
        .wait(None)
        .map_err(|errno| Problem::from_chain(Exit::Device, &errno))
        .context("waiting for a stop signal")?;
    tracing::info!(?signal, "ending");
    drop(engine);
    Ok(ExitCode::SUCCESS)
}
