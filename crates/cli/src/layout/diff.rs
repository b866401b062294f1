//! `kvxfer layout diff`.

use std::fmt::Write;

use serde::Serialize;

use kvxfer::layout::{Difference, KvFormat, LayoutDiff, Severity, Side, Verdict, compare};
use kvxfer::plan::{Role, small_pieces};

use super::exchange::{Ranks, exchanges};
use super::show::exact;
use super::source::Layout;
use crate::problem::{Exit, Problem};

const SCHEMA: &str = "kvxfer.layout-diff/1";

/// What has come of a comparison.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Report {
    schema: &'static str,
    #[serde(flatten)]
    diff: LayoutDiff,
}

impl Report {
    pub(super) fn verdict(&self) -> Verdict {
        self.diff.verdict
    }
}

pub(super) fn report(producer: &Layout, consumer: &Layout) -> Result<Report, Problem> {
    let (p, c) = (&producer.topology, &consumer.topology);
    let sizes = [("tp", "tensor", p.tp, c.tp), ("pp", "pipeline", p.pp, c.pp)];
    let mut differences: Vec<Difference> = sizes
        .into_iter()
        .filter(|(_, _, p, c)| p != c)
        .map(|(field, what, p, c)| Difference {
            field: field.to_owned(),
            producer: p.to_string(),
            consumer: c.to_string(),
            why: "a rank of one side keeps what several ranks of the other keep, and takes it from each: more operations, and smaller ones".to_owned(),
            fix: format!("for the largest pieces start the decode instance with --{what}-parallel-size {p}"),
            severity: Severity::Reshard,
        })
        .collect();
    // Ranks pair up where there are as many on both sides. Otherwise the formats alone are compared.
    let given = (producer, consumer);
    let (producer, consumer) = match differences.is_empty() {
        true => (producer.clone(), consumer.clone()),
        false => (producer.whole(), consumer.whole()),
    };
    let placed = |layout: &Layout| {
        let usage = |error| Problem::from_chain(Exit::Usage, &error);
        layout.placed().map_err(usage)
    };
    let (p, c) = (placed(&producer)?, placed(&consumer)?);
    let producer_side = Side {
        format: &producer.format,
        placement: &p,
    };
    let consumer_side = Side {
        format: &consumer.format,
        placement: &c,
    };
    differences.extend(compare(&producer_side, &consumer_side));
    let mut diff = LayoutDiff::new(&producer.format, &consumer.format, differences);
    if diff.verdict != Verdict::Incompatible {
        // The layouts as they were given: their ranks are what takes from one another.
        diff.warnings.extend(smallest(given));
    }
    Ok(Report {
        schema: SCHEMA,
        diff,
    })
}

/// What is to be said of the smallest piece that lies alike on both sides, between any two ranks.
fn smallest((producer, consumer): (&Layout, &Layout)) -> Option<String> {
    let all = match exchanges((producer, consumer), Ranks::All, Role::Pull, (1, 1)) {
        Ok(all) => all,
        // Nobody asked for what ranks exchange, but it is to be known that it cannot be said.
        Err(problem) => return Some(problem.cause),
    };
    let pieces = all.iter().filter_map(|e| e.compiled.smallest_piece());
    small_pieces(pieces.min()?)
}

/// The same for people: both sides, then what differs. Writing to a string does not fail.
pub(super) fn text(
    (p_name, producer): (&str, &Layout),
    (c_name, consumer): (&str, &Layout),
    report: &Report,
) -> String {
    let mut out = String::new();
    side_by_side(&mut out, &facts(p_name, producer), &facts(c_name, consumer));
    let diff = &report.diff;
    let count = match diff.differences.len() {
        0 => String::new(),
        1 => ": 1 difference".to_owned(),
        n => format!(": {n} differences, the worst first"),
    };
    let _ = writeln!(out, "\n{}{count}", diff.verdict);
    for difference in &diff.differences {
        let Difference {
            field,
            producer,
            consumer,
            why,
            fix,
            severity,
        } = difference;
        let severity = match severity {
            Severity::Incompatible => "incompatible",
            _ => "reshardable",
        };
        let _ = writeln!(out, "\n{field}: {producer} | {consumer} ({severity})");
        let _ = writeln!(out, "  why: {why}\n  fix: {fix}");
    }
    for warning in &diff.warnings {
        let _ = writeln!(out, "\nwarning: {warning}");
    }
    out
}

/// What stands side by side of a layout: name and value.
fn facts(name: &str, layout: &Layout) -> Vec<(&'static str, String)> {
    let Layout { format, topology } = layout;
    let model = format.model();
    let unknown = || "-".to_owned();
    let tokens: Vec<String> = format
        .groups()
        .iter()
        .map(|g| g.block_tokens.to_string())
        .collect();
    let names: Vec<&str> = format.groups().iter().map(|g| g.name.as_str()).collect();
    vec![
        ("", name.to_owned()),
        ("model", model.model_type.clone()),
        ("id", model.id.clone().unwrap_or_else(unknown)),
        ("revision", model.revision.clone().unwrap_or_else(unknown)),
        ("layers", format.layers().to_string()),
        ("tp", topology.tp.to_string()),
        ("pp", topology.pp.to_string()),
        ("groups", names.join(", ")),
        ("block", tokens.join(", ")),
        ("tensors", tensors(format)),
        ("a token", exact(format.bytes_per_token())),
        ("format", short(&format.fingerprint().to_string())),
    ]
}

/// The tensors of any layer with their types, each once.
fn tensors(format: &KvFormat) -> String {
    let mut all: Vec<String> = Vec::new();
    let layers = format.groups().iter().flat_map(|g| &g.layers);
    for tensor in layers.flat_map(|l| &l.tensors) {
        let text = format!("{} {}", tensor.name, tensor.dtype);
        if !all.contains(&text) {
            all.push(text);
        }
    }
    all.join(", ")
}

/// The first digits of a fingerprint.
fn short(fingerprint: &str) -> String {
    fingerprint.chars().take(12).collect()
}

fn side_by_side(out: &mut String, producer: &[(&str, String)], consumer: &[(&str, String)]) {
    const SIDES: [&str; 2] = ["producer", "consumer"];
    let widest =
        |texts: &mut dyn Iterator<Item = &str>| texts.map(|t| t.chars().count()).max().unwrap_or(0);
    let left = widest(&mut producer.iter().map(|f| f.1.as_str()).chain([SIDES[0]]));
    let key = widest(&mut producer.iter().map(|f| f.0));
    let _ = writeln!(out, "  {:key$}  {:left$}  {}", "", SIDES[0], SIDES[1]);
    for ((name, p), (_, c)) in producer.iter().zip(consumer) {
        let mark = if p == c || name.is_empty() {
            ' '
        } else {
            '≠'
        };
        let _ = writeln!(out, "{mark} {name:key$}  {p:left$}  {c}");
    }
}
