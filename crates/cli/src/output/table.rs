//! Rows as a table for people, with the reasons below it.

use std::fmt::Write;

use comfy_table::{CellAlignment, Table, presets};

use kvxfer::SkippedRail;

use super::schema::{BwReport, Hca, Row};

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

/// Columns that name a row; every part of a table that is wider than the terminal begins with them.
const NAMING: usize = 3;
/// Spaces between columns.
const GAP: usize = 2;

/// The table, then which paths there were and why, and what the run can be repeated with. On a
/// terminal of `width` columns that is narrower than the table, the table comes in parts.
pub(super) fn text(report: &BwReport, width: Option<usize>) -> String {
    let rows: Vec<[String; HEADER.len()]> = report.rows.iter().map(cells).collect();
    let mut out = String::new();
    for columns in parts(&rows, width.unwrap_or(usize::MAX)) {
        if !out.is_empty() {
            out.push('\n');
        }
        let chosen = |row: &[String]| -> Vec<String> {
            columns
                .iter()
                .filter_map(|at| row.get(*at).cloned())
                .collect()
        };
        let mut table = Table::new();
        let header = HEADER.map(str::to_owned);
        table
            .load_preset(presets::NOTHING)
            .set_header(chosen(&header));
        for row in &rows {
            table.add_row(chosen(row));
        }
        for column in table.column_iter_mut().skip(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        for line in table.lines() {
            let line = line.strip_prefix(' ').unwrap_or(&line);
            // Writing to a string does not fail.
            let _ = writeln!(out, "{}", line.trim_end());
        }
    }
    notes(report, &mut out);
    out
}

/// Which columns stand in each part of the table. A part has one column beside the naming ones at
/// least, however narrow the terminal is.
fn parts(rows: &[[String; HEADER.len()]], width: usize) -> Vec<Vec<usize>> {
    let width_of = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        let widest = cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
        GAP + widest.max(HEADER.get(column).map_or(0, |name| name.len()))
    };
    let naming: usize = (0..NAMING).map(width_of).sum();
    let mut parts: Vec<Vec<usize>> = Vec::new();
    let mut left = 0;
    for column in NAMING..HEADER.len() {
        let needed = width_of(column);
        match parts.last_mut() {
            Some(part) if needed <= left => {
                part.push(column);
                left -= needed;
            }
            _ => {
                parts.push((0..NAMING).chain([column]).collect());
                // The first column has no gap before it.
                left = (width.saturating_add(GAP)).saturating_sub(naming + needed);
            }
        }
    }
    parts
}

fn cells(row: &Row) -> [String; HEADER.len()] {
    let dash = |value: Option<f64>, decimals| value.map_or("-".into(), |v| fixed(v, decimals));
    [
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
        if let (Some(executor), Some(queue), Some(hca)) = (row.executor, row.queue, row.hca) {
            let (executor, queue) = (executor.name(), queue.name());
            lines.push(match hca {
                Hca::Nic => {
                    format!("posted by a kernel ({executor}) through the queue {queue}, to a NIC")
                }
                Hca::Model => format!(
                    "posted by a kernel ({executor}) through the queue {queue}, to a model of an mlx5 NIC: \
                     figures say nothing of one"
                ),
                Hca::None => format!(
                    "posted by a kernel ({executor}) through the queue {queue}; no NIC takes part"
                ),
            });
        }
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
    let memory = &config.memory;
    if let Some(gpu) = &memory.gpu {
        lines.push(format!("blocks on {gpu}; fences {}", config.fence));
    }
    if let Some(gpu) = &memory.target_gpu {
        lines.push(format!("the target's on {gpu}"));
    }
    for rdma in &config.rails {
        lines.push(rdma.to_string());
        lines.extend(rdma.queue_pairs.iter().map(|pair| {
            format!(
                "local QPN {:#08x} PSN {:#08x}, remote QPN {:#08x} PSN {:#08x}",
                pair.qpn, pair.psn, pair.peer_qpn, pair.peer_psn
            )
        }));
    }
    for SkippedRail { device, reason, .. } in &config.skipped {
        lines.push(format!("{device} is not used: {reason}"));
    }
    for difference in &config.differences {
        let used = match difference.used {
            Some(used) => format!("{used} is used"),
            None => "each side keeps its own".to_owned(),
        };
        let (key, here, there) = (&difference.key, difference.here, difference.there);
        lines.push(format!("{key}: {here} here, {there} there; {used}"));
    }
    let pages = &config.pages;
    if memory.gpu.is_none() {
        lines.push(format!("{} pages of {} KiB", pages.how, pages.size >> 10));
    }
    let mut said: Vec<&str> = Vec::new();
    for line in &lines {
        if !said.contains(&line.as_str()) {
            let _ = writeln!(out, "{line}");
            said.push(line);
        }
    }
}
