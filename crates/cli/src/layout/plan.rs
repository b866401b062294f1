//! `kvxfer layout plan`.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use kvxfer::blocks::GroupPairs;
use kvxfer::layout::Side;
use kvxfer::plan::{Compiled, LayerScope, OpSource, Part, PlanError, PlanLimits, Role};

use super::args::{Direction, PlanArgs};
use super::blocks::Blocks;
use super::show::{exact, grouped};
use super::source::Layout;
use crate::problem::{Exit, Problem};

const SCHEMA: &str = "kvxfer.layout-plan/1";

/// Operations below this many bytes keep a network card from its line rate: what it does for each
/// one costs more than the bytes.
const SMALL: u64 = 4096;

/// What would move.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Report {
    schema: &'static str,
    op: String,
    /// Pairs, over all groups.
    blocks: u64,
    /// Stretches of pairs that are consecutive on both sides.
    runs: u64,
    operations: u64,
    bytes: u64,
    /// Local pieces of all operations.
    pieces: u64,
    /// By rising size.
    sizes: Vec<Sizes>,
    warnings: Vec<String>,
}

/// Operations of one size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Sizes {
    bytes: u64,
    operations: u64,
}

/// The blocks of `args` in every group, or those of a request.
pub(super) fn report(
    producer: &Layout,
    consumer: &Layout,
    args: &PlanArgs,
) -> Result<Report, Problem> {
    let blocks = args.blocks.clone().unwrap_or_else(|| Blocks::first(1));
    let (src, dst) = blocks.needed();
    let usage = |error| Problem::from_chain(Exit::Usage, &error);
    let p = producer.placed_with(src).map_err(usage)?;
    let c = consumer.placed_with(dst).map_err(usage)?;
    let side = |layout, placement| Side {
        format: layout,
        placement,
    };
    let role = match args.op {
        Direction::Read => Role::Pull,
        Direction::Write => Role::Push,
    };
    let (p, c) = (side(&producer.format, &p), side(&consumer.format, &c));
    let compiled = Compiled::compile(&p, &c, role, Part::Common)
        .map_err(|error| Problem::from_chain(Exit::Usage, &error))?;
    let groups = (0..producer.format.groups().len()).filter_map(|group| {
        let group = u32::try_from(group).ok()?;
        // A group that has no layer on this rank has no blocks either.
        compiled.num_blocks(group)?;
        let pairs = blocks.0.clone();
        Some(GroupPairs { group, pairs })
    });
    let groups: Vec<GroupPairs> = groups.collect();
    let limits = PlanLimits {
        max_msg_bytes: args.max_msg.0,
        max_sge: args.max_msg_sge,
    };
    let plan = compiled
        .plan(&groups, LayerScope::All, limits)
        .map_err(|error: PlanError| Problem::from_chain(Exit::Usage, &error))?;
    let (mut sizes, mut pieces) = (BTreeMap::new(), 0_u64);
    plan.emit(0..plan.ops(), &mut |op| {
        *sizes.entry(op.len).or_insert(0_u64) += 1;
        pieces += op.local.len() as u64;
    });
    let sizes: Vec<Sizes> = sizes
        .into_iter()
        .map(|(bytes, operations)| Sizes { bytes, operations })
        .collect();
    let small = sizes.first().filter(|smallest| smallest.bytes < SMALL);
    let warnings = small.map(|smallest| {
        format!(
            "{}-byte pieces: expect a fraction of line rate",
            smallest.bytes
        )
    });
    let comes_to = plan.report();
    Ok(Report {
        schema: SCHEMA,
        op: args.op.to_string(),
        blocks: comes_to.blocks,
        runs: comes_to.runs,
        operations: comes_to.operations,
        bytes: comes_to.bytes,
        pieces,
        sizes,
        warnings: warnings.into_iter().collect(),
    })
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
    for warning in &report.warnings {
        let _ = writeln!(out, "\nwarning: {warning}");
    }
    out
}
