//! `kvxfer layout plan`.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use kvxfer::ids::Rank;
use kvxfer::layout::Topology;
use kvxfer::plan::{
    Compiled, LayerScope, OpSource, PlanError, PlanLimits, PlanReport, Role, UnitPairs,
    small_pieces,
};

use super::args::{Direction, PlanArgs};
use super::blocks::{Blocks, Lists};
use super::exchange::{Exchange, Ranks, exchanges};
use super::show::{exact, grouped};
use super::source::Layout;
use crate::problem::{Exit, Problem};

const SCHEMA: &str = "kvxfer.layout-plan/1";

/// What would move.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Report {
    schema: &'static str,
    op: String,
    /// Of the consumer, over all groups and ranks.
    blocks: u64,
    /// Stretches of pairs that are consecutive on both sides.
    runs: u64,
    operations: u64,
    bytes: u64,
    /// Local pieces of all operations.
    pieces: u64,
    /// By rising size.
    sizes: Vec<Sizes>,
    /// Which rank takes what from which; absent for a pair of ranks.
    exchanges: Option<Vec<Between>>,
    warnings: Vec<String>,
}

/// Operations of one size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Sizes {
    bytes: u64,
    operations: u64,
}

/// What one consumer rank takes from one producer rank.
#[derive(Debug, Clone, Serialize)]
struct Between {
    producer: Place,
    consumer: Place,
    operations: u64,
    bytes: u64,
    /// Bytes of the smallest operation; null where there is none.
    smallest: Option<u64>,
}

/// A rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Place {
    pp: u32,
    tp: u32,
}

impl From<&Topology> for Place {
    fn from(topology: &Topology) -> Self {
        let Rank { pp, tp, .. } = topology.rank;
        Self { pp, tp }
    }
}

/// The blocks of `args` in every group.
pub(super) fn report(
    producer: &Layout,
    consumer: &Layout,
    args: &PlanArgs,
) -> Result<Report, Problem> {
    let blocks = args.blocks.clone().unwrap_or_else(Blocks::first);
    let groups = producer
        .format
        .groups()
        .iter()
        .zip(consumer.format.groups());
    let lists: Vec<Lists> = groups
        .map(|(p, c)| blocks.lists(p.block_tokens, c.block_tokens))
        .collect::<Result<_, _>>()
        .map_err(|error| Problem::usage(format!("--blocks: {error}")))?;
    let needed = lists.iter().map(Lists::needed);
    let needed = needed.fold((1, 1), |most, of| (most.0.max(of.0), most.1.max(of.1)));
    let role = match args.op {
        Direction::Read => Role::Pull,
        Direction::Write => Role::Push,
    };
    let ranks = match args.all_ranks {
        true => Ranks::All,
        false => Ranks::Named,
    };
    let exchanges = exchanges((producer, consumer), ranks, role, needed)?;
    let limits = PlanLimits {
        max_msg_bytes: args.max_msg.0,
        max_sge: args.max_msg_sge,
    };
    let (mut sizes, mut pieces) = (BTreeMap::new(), 0);
    let mut total = PlanReport::default();
    let mut between = Vec::with_capacity(exchanges.len());
    for exchange in &exchanges {
        let Exchange {
            producer,
            consumer,
            compiled,
        } = exchange;
        let units = units(compiled, &lists)?;
        let plan = compiled
            .plan_units(&units, LayerScope::All, limits)
            .map_err(unplanned)?;
        let mut smallest = None;
        plan.emit(0..plan.ops(), &mut |op| {
            *sizes.entry(op.len).or_insert(0_u64) += 1;
            pieces += op.local.len() as u64;
            smallest = Some(smallest.map_or(op.len, |least: u64| least.min(op.len)));
        });
        let comes_to = plan.report();
        total.blocks += comes_to.blocks;
        total.runs += comes_to.runs;
        total.operations += comes_to.operations;
        total.bytes += comes_to.bytes;
        between.push(Between {
            producer: producer.into(),
            consumer: consumer.into(),
            operations: comes_to.operations,
            bytes: comes_to.bytes,
            smallest,
        });
    }
    let mut warnings = Vec::new();
    match sizes.first_key_value() {
        Some((smallest, _)) => warnings.extend(small_pieces(*smallest)),
        None => warnings.push(
            "nothing moves between these two ranks: --all-ranks shows which rank gives what to which"
                .to_owned(),
        ),
    }
    let sizes = sizes.into_iter();
    Ok(Report {
        schema: SCHEMA,
        op: args.op.to_string(),
        blocks: total.blocks,
        runs: total.runs,
        operations: total.operations,
        bytes: total.bytes,
        pieces,
        sizes: sizes
            .map(|(bytes, operations)| Sizes { bytes, operations })
            .collect(),
        exchanges: args.all_ranks.then_some(between),
        warnings,
    })
}

/// The units of the groups that a pair of ranks has something of.
fn units(compiled: &Compiled, lists: &[Lists]) -> Result<Vec<UnitPairs>, Problem> {
    let mut out = Vec::new();
    for (group, lists) in (0_u32..).zip(lists) {
        // A rank that has no layer of a group has no blocks of it either.
        if compiled.unit_bytes(group).unwrap_or(0) > 0 {
            let pairs = compiled.pairs(group, &lists.src, &lists.dst, None);
            out.push(pairs.map_err(unplanned)?);
        }
    }
    Ok(out)
}

fn unplanned(error: PlanError) -> Problem {
    Problem::from_chain(Exit::Usage, &error)
}

/// The same for people. Writing to a string does not fail.
pub(super) fn text(report: &Report) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{}: {} blocks in {} runs, {} in {} operations of {} local pieces",
        report.op,
        grouped(report.blocks),
        grouped(report.runs),
        exact(report.bytes),
        grouped(report.operations),
        grouped(report.pieces),
    );
    for Sizes { bytes, operations } in &report.sizes {
        let _ = writeln!(out, "  {} × {}", grouped(*operations), exact(*bytes));
    }
    if let Some(exchanges) = &report.exchanges {
        let _ = writeln!(out, "\nconsumer      takes from");
        let mut before = None;
        for between in exchanges {
            let Place { pp, tp } = between.consumer;
            let consumer = match before.replace(between.consumer) == Some(between.consumer) {
                true => String::new(),
                false => format!("pp {pp} tp {tp}"),
            };
            let _ = writeln!(
                out,
                "{consumer:12}  pp {} tp {}: {} in {} operations of {} or more",
                between.producer.pp,
                between.producer.tp,
                exact(between.bytes),
                grouped(between.operations),
                between.smallest.map_or_else(|| "-".to_owned(), exact),
            );
        }
    }
    for warning in &report.warnings {
        let _ = writeln!(out, "\nwarning: {warning}");
    }
    out
}
