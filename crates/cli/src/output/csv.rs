//! Rows as comma-separated values (RFC 4180, but with plain line feeds).

use std::fmt::Write;

use super::schema::{Candidate, Executor, Hca, QueueKind, Row, round};

const HEADER: &str = "op,path,path_reason,candidates,block_bytes,blocks,bytes,transfers,operations,\
                      gb_per_s,limit_gb_per_s,of_limit,blocks_per_s,p50_us,p99_us,p999_us,\
                      prepare_us,post_us,wire_us,verified_bytes,initiator,executor,queue,hca\n";

/// A header and a line a row. What is null in JSON is empty here.
pub(super) fn text(rows: &[Row]) -> String {
    let mut out = String::from(HEADER);
    for row in rows {
        let number = |value: f64| round(value).to_string();
        let or_empty = |value: Option<f64>| value.map(number).unwrap_or_default();
        let fields = [
            row.op.name().to_owned(),
            quoted(&row.path),
            quoted(&row.path_reason),
            quoted(&candidates(&row.candidates)),
            row.block_bytes.to_string(),
            row.blocks.to_string(),
            row.bytes.to_string(),
            row.transfers.to_string(),
            row.operations.to_string(),
            number(row.gb_per_s),
            or_empty(row.limit_gb_per_s),
            or_empty(row.of_limit),
            number(row.blocks_per_s),
            number(row.p50_us),
            number(row.p99_us),
            or_empty(row.p999_us),
            number(row.prepare_us),
            number(row.post_us),
            number(row.wire_us),
            row.verified_bytes.to_string(),
            row.initiator.name().to_owned(),
            row.executor.map_or("", Executor::name).to_owned(),
            row.queue.map_or("", QueueKind::name).to_owned(),
            row.hca.map_or("", Hca::name).to_owned(),
        ];
        // Writing to a string does not fail.
        let _ = writeln!(out, "{}", fields.join(","));
    }
    out
}

fn candidates(candidates: &[Candidate]) -> String {
    let texts = candidates.iter().map(|c| match &c.why_not {
        Some(why) => format!("{}: {why}", c.path),
        None => format!("{}: usable", c.path),
    });
    texts.collect::<Vec<_>>().join("; ")
}

fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}
