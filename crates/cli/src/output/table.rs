//! Rows as a table for people, with the reasons below it.

use std::fmt::Write;

use comfy_table::{CellAlignment, Table, presets};

use super::schema::{BwReport, Row};

const HEADER: [&str; 18] = [
    "op",
    "path",
    "block",
    "blocks",
    "bytes",
    "transfers",
    "operations",
    "GB/s",
    "limit",
    "of limit",
    "blocks/s",
    "p50 us",
    "p99 us",
    "p99.9 us",
    "prepare us",
    "post us",
    "wire us",
    "verified",
];

/// The table, then which paths there were and why, and what the run can be repeated with.
pub(super) fn text(report: &BwReport) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(HEADER);
    for row in &report.rows {
        table.add_row(cells(row));
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut out = String::new();
    for line in table.lines() {
        let line = line.strip_prefix(' ').unwrap_or(&line);
        // Writing to a string does not fail.
        let _ = writeln!(out, "{}", line.trim_end());
    }
    notes(report, &mut out);
    out
}

fn cells(row: &Row) -> Vec<String> {
    let dash = |value: Option<f64>, decimals| value.map_or("-".into(), |v| fixed(v, decimals));
    vec![
        row.op.name().to_owned(),
        row.path.clone(),
        crate::size::Size(row.block_bytes).to_string(),
        row.blocks.to_string(),
        row.bytes.to_string(),
        row.transfers.to_string(),
        row.operations.to_string(),
        fixed(row.gb_per_s, 2),
        dash(row.limit_gb_per_s, 2),
        row.of_limit
            .map_or("-".into(), |v| format!("{:.0} %", v * 100.0)),
        fixed(row.blocks_per_s, 0),
        fixed(row.p50_us, 1),
        fixed(row.p99_us, 1),
        dash(row.p999_us, 1),
        fixed(row.prepare_us, 1),
        fixed(row.post_us, 1),
        fixed(row.wire_us, 1),
        row.verified_bytes.to_string(),
    ]
}

fn fixed(value: f64, decimals: usize) -> String {
    format!("{value:.decimals$}")
}

/// What is the same for many rows is said once.
fn notes(report: &BwReport, out: &mut String) {
    let mut lines = Vec::new();
    for row in &report.rows {
        lines.push(format!("{}: {}", row.path, row.path_reason));
        for candidate in &row.candidates {
            if let Some(why) = &candidate.why_not {
                lines.push(format!("not {}: {why}", candidate.path));
            }
        }
    }
    let config = &report.config;
    lines.push(format!(
        "{}, {} queue pairs, {} worker threads, seed {}",
        config.device, config.qp_per_transfer, config.num_worker_threads, config.seed
    ));
    for difference in &config.differences {
        let used = match difference.used {
            Some(used) => format!("{used} is used"),
            None => "each side keeps its own".to_owned(),
        };
        let (key, here, there) = (&difference.key, difference.here, difference.there);
        lines.push(format!("{key}: {here} here, {there} there; {used}"));
    }
    let pages = &config.pages;
    lines.push(format!("{} pages of {} KiB", pages.how, pages.size >> 10));
    let mut said: Vec<&str> = Vec::new();
    for line in &lines {
        if !said.contains(&line.as_str()) {
            let _ = writeln!(out, "{line}");
            said.push(line);
        }
    }
}
