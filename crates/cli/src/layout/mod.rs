//! `kvxfer layout`: what a cache looks like, and what differs between two.

mod args;
mod blocks;
mod diff;
mod exchange;
mod figures;
mod live;
mod plan;
mod show;
mod source;

use std::process::ExitCode;

pub(crate) use args::LayoutCommand;

use kvxfer::layout::Verdict;

use crate::output;
use crate::problem::{Exit, Problem};
use crate::say;
use args::{Ask, Shape};
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
            let layout = Layout::of(&args.source, &args.shape, &args.ask)?;
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
            let sides = Sides::of(&args.producer, &args.consumer, &args.ask)?;
            sides.tell(args.json, args.strict)
        }
        LayoutCommand::Plan(args) => {
            let sides = Sides::of(&args.producer, &args.consumer, &args.ask)?;
            if sides.report.verdict() == Verdict::Incompatible {
                return sides.tell(args.json, false);
            }
            let report = plan::report(&sides.producer, &sides.consumer, args)?;
            let text = match args.json {
                true => output::line(&report)?,
                false => plan::text(&report),
            };
            say::result(&text)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Two layouts under their names, compared.
struct Sides<'a> {
    names: [&'a str; 2],
    producer: Layout,
    consumer: Layout,
    report: diff::Report,
}

impl<'a> Sides<'a> {
    fn of(p_name: &'a str, c_name: &'a str, ask: &Ask) -> Result<Self, Problem> {
        let side = |source| Layout::of(source, &Shape::default(), ask);
        let (producer, consumer) = (side(p_name)?, side(c_name)?);
        let report = diff::report(&producer, &consumer)?;
        Ok(Self {
            names: [p_name, c_name],
            producer,
            consumer,
            report,
        })
    }

    /// Says what differs. Layouts between which nothing can be copied fail, and where it is `strict`
    /// all that are not the same.
    fn tell(&self, json: bool, strict: bool) -> anyhow::Result<ExitCode> {
        let [p_name, c_name] = self.names;
        let text = match json {
            true => output::line(&self.report)?,
            false => diff::text(
                (p_name, &self.producer),
                (c_name, &self.consumer),
                &self.report,
            ),
        };
        say::result(&text)?;
        Ok(match self.report.verdict() {
            Verdict::Identical => ExitCode::SUCCESS,
            Verdict::Reshardable if !strict => ExitCode::SUCCESS,
            _ => Exit::Check.into(),
        })
    }
}
