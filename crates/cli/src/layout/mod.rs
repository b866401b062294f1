//! `kvxfer layout`: what a cache looks like, and what differs between two.

mod args;
mod diff;
mod figures;
mod show;
mod source;

use std::process::ExitCode;

pub(crate) use args::LayoutCommand;

use crate::output;
use crate::problem::{Exit, Problem};
use crate::say;
use args::Shape;
pub(crate) use source::Layout;

/// What rank 0 of `tp` keeps of a model, a built-in one or a config.json, with one block table: how
/// `bw` and `serve` move it.
///
/// # Errors
///
/// A [`Problem`] of usage.
pub(crate) fn of_model(model: &str, block_size: u32, tp: u32) -> Result<Layout, Problem> {
    let shape = Shape {
        tp: Some(tp),
        block_size: Some(block_size),
        one_table: true,
        ..Shape::default()
    };
    Layout::named(model, &shape)
}

/// Carries out what was asked for.
pub(crate) fn run(command: &LayoutCommand) -> anyhow::Result<ExitCode> {
    match command {
        LayoutCommand::Show(args) => {
            let layout = Layout::of(&args.source, &args.shape)?;
            let report = show::report(layout, args)
                .map_err(|error| Problem::from_chain(Exit::Usage, &error))?;
            let text = match args.json {
                true => output::line(&report)?,
                false => show::text(&args.source, &report),
            };
            say::result(&text)?;
            Ok(ExitCode::SUCCESS)
        }
        LayoutCommand::Diff(args) => {
            let side = |source| Layout::of(source, &Shape::default());
            let (producer, consumer) = (side(&args.producer)?, side(&args.consumer)?);
            let report = diff::report(&producer, &consumer)?;
            let text = match args.json {
                true => output::line(&report)?,
                false => diff::text(
                    (&args.producer, &producer),
                    (&args.consumer, &consumer),
                    &report,
                ),
            };
            say::result(&text)?;
            Ok(report.exit())
        }
    }
}
