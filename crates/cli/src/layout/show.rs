//! `kvxfer layout show`.

use std::fmt::Write;

use serde::Serialize;

use kvxfer::layout::LayoutError;

use super::args::ShowArgs;
use super::figures::{Extent, Figures, Region, request_blocks, request_bytes_all_ranks};
use super::source::{Layout, SCHEMA};
use crate::size::Size;

/// The share of prefill above which a transfer costs more than splitting prefill from decode gives.
const WORTH_IT: f64 = 0.5;

/// What is shown. As JSON it is a layout file.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Report {
    schema: &'static str,
    layout: Layout,
    fingerprint: String,
    bytes_per_token: u64,
    bytes_per_block: u64,
    bytes_per_token_all_ranks: u64,
    request: Request,
    memory: Option<Memory>,
    transfer: Option<Transfer>,
    regions: Vec<Region>,
    #[serde(skip)]
    block_bytes: Vec<u64>,
}

/// A request of so many tokens.
#[derive(Debug, Clone, Serialize)]
struct Request {
    tokens: u64,
    /// By group, at the most.
    blocks: Vec<u64>,
    bytes: u64,
    bytes_all_ranks: u64,
}

/// What fits into a rank's memory.
#[derive(Debug, Clone, Serialize)]
struct Memory {
    bytes: u64,
    /// Blocks in every group.
    blocks: u64,
    /// Tokens that are kept in all layers; null where the groups' blocks are not of one size.
    tokens: Option<u64>,
}

#[derive(Debug, Clone, Serialize)]
struct Transfer {
    gbps: f64,
    ms: f64,
    prefill_ms: Option<f64>,
    /// Of prefill.
    share: Option<f64>,
}

/// # Errors
///
/// None for a layout that stands: they are those of placing its other ranks.
pub(super) fn report(layout: Layout, args: &ShowArgs) -> Result<Report, LayoutError> {
    let figures = Figures::of(&layout)?;
    let groups = layout.format.groups();
    let blocks: Vec<u64> = groups
        .iter()
        .map(|group| request_blocks(group, args.tokens))
        .collect();
    let bytes_per_block = figures.bytes_per_block();
    let request = Request {
        tokens: args.tokens,
        blocks,
        bytes: figures.request_bytes(&layout, args.tokens),
        bytes_all_ranks: request_bytes_all_ranks(&layout, args.tokens)?,
    };
    let memory = args.memory.map(|Size(bytes)| {
        let blocks = bytes.checked_div(bytes_per_block).unwrap_or(0);
        let mut sizes: Vec<u32> = groups.iter().map(|g| g.block_tokens).collect();
        sizes.dedup();
        let size = match sizes.as_slice() {
            [size] if *size > 0 => Some(u64::from(*size)),
            _ => None,
        };
        Memory {
            bytes,
            blocks,
            tokens: size.map(|size| blocks.saturating_mul(size)),
        }
    });
    let transfer = args.gbps.map(|gbps| {
        let ms = request.bytes as f64 * 8.0 / (gbps * 1e9) * 1e3;
        Transfer {
            gbps,
            ms,
            prefill_ms: args.prefill_ms,
            share: args.prefill_ms.map(|prefill| ms / prefill),
        }
    });
    Ok(Report {
        schema: SCHEMA,
        fingerprint: layout.format.fingerprint().to_string(),
        bytes_per_token: figures.bytes_per_token(&layout),
        bytes_per_block,
        bytes_per_token_all_ranks: layout.format.bytes_per_token(),
        request,
        memory,
        transfer,
        regions: figures.regions,
        block_bytes: figures.block_bytes,
        layout,
    })
}

/// The same for people. Writing to a string does not fail.
pub(super) fn text(source: &str, report: &Report) -> String {
    let mut out = String::new();
    let Layout { format, topology } = &report.layout;
    let model = format.model();
    let _ = writeln!(
        out,
        "{source}: {}, {} layers, fingerprint {}",
        model.model_type,
        format.layers(),
        report.fingerprint
    );
    let _ = writeln!(
        out,
        "rank tp {} of {}, pp {} of {}: layers {}",
        topology.rank.tp,
        topology.tp,
        topology.rank.pp,
        topology.pp,
        span(topology.layers.first, topology.layers.end)
    );
    for (at, group) in (0_u32..).zip(format.groups()) {
        let bytes = report.block_bytes.get(at as usize).copied().unwrap_or(0);
        let block = match group.block_tokens {
            0 => "a slot".to_owned(),
            tokens => format!("a block of {tokens} tokens"),
        };
        let _ = writeln!(
            out,
            "\ngroup {}: {}; {block} is {}",
            group.name,
            group.kind,
            exact(bytes)
        );
        for (layers, region) in alike(&report.regions, at) {
            draw(&mut out, &layers, region);
        }
    }
    let _ = writeln!(out);
    let all = report.bytes_per_token_all_ranks;
    let mut line = |name: &str, text: String| {
        let _ = writeln!(out, "{name:<10} {text}");
    };
    line(
        "a token",
        format!(
            "{} on this rank, {} in all",
            exact(report.bytes_per_token),
            exact(all)
        ),
    );
    let request = &report.request;
    let blocks: Vec<String> = request.blocks.iter().map(|n| grouped(*n)).collect();
    line(
        "a request",
        format!(
            "{} tokens: {} blocks, {} on this rank, {} on all",
            grouped(request.tokens),
            blocks.join(" + "),
            exact(request.bytes),
            exact(request.bytes_all_ranks)
        ),
    );
    if let Some(memory) = &report.memory {
        let tokens = match memory.tokens {
            Some(tokens) => format!(", {} tokens", grouped(tokens)),
            None => " in each group".to_owned(),
        };
        let blocks = grouped(memory.blocks);
        line(
            "memory",
            format!("{}: {blocks} blocks{tokens}", Size(memory.bytes)),
        );
    }
    if let Some(transfer) = &report.transfer {
        let of_prefill = match (transfer.prefill_ms, transfer.share) {
            (Some(prefill), Some(share)) => {
                let verdict = match share > WORTH_IT {
                    true => "more than half: prefill and decode are better off together",
                    false => "no more than half",
                };
                format!(
                    ", {:.0} % of {prefill} ms of prefill: {verdict}",
                    share * 100.0
                )
            }
            _ => String::new(),
        };
        let Transfer { gbps, ms, .. } = transfer;
        line(
            "transfer",
            format!("{ms:.2} ms at {gbps} Gb/s for each rank{of_prefill}"),
        );
    }
    out
}

/// The regions of a group, one of each shape with the layers that have it, in the order of layers.
fn alike(regions: &[Region], group: u32) -> Vec<(Vec<u32>, &Region)> {
    let mut shapes: Vec<(Vec<u32>, &Region)> = Vec::new();
    for region in regions.iter().filter(|r| r.group == group) {
        let same = |known: &Region| {
            let key = |r: &Region| (r.tensor.clone(), r.dtype, r.axes.clone(), r.shard);
            key(known) == key(region)
        };
        match shapes.iter_mut().find(|(_, known)| same(known)) {
            Some((layers, _)) => layers.push(region.layer),
            None => shapes.push((vec![region.layer], region)),
        }
    }
    shapes
}

/// One block of a tensor, from the outermost axis inwards.
fn draw(out: &mut String, layers: &[u32], region: &Region) {
    let _ = writeln!(
        out,
        "  {} of {}, {}",
        region.tensor,
        said(layers),
        exact(region.bytes_per_block)
    );
    for (depth, axis) in region.axes.iter().enumerate() {
        let Extent {
            kind,
            extent,
            of,
            bytes,
        } = axis;
        let share = match extent == of {
            true => String::new(),
            false => {
                let first = region.shard.map_or(0, |shard| shard.first);
                format!(" ({} of {of})", range(first, first.saturating_add(*extent)))
            }
        };
        let dtype = match depth + 1 == region.axes.len() {
            true => format!(" ({})", region.dtype),
            false => String::new(),
        };
        let indent = " ".repeat(4 + 3 * depth);
        let _ = writeln!(
            out,
            "{indent}└─ {extent} × {}{share}, each {}{dtype}",
            kind.name(),
            exact(*bytes)
        );
    }
}

/// `layers 0-3,7`.
fn said(layers: &[u32]) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for layer in layers {
        match runs.last_mut() {
            Some((_, end)) if *end == *layer => *end += 1,
            _ => runs.push((*layer, layer + 1)),
        }
    }
    let word = if layers.len() == 1 { "layer" } else { "layers" };
    let runs: Vec<String> = runs.iter().map(|(first, end)| span(*first, *end)).collect();
    format!("{word} {}", runs.join(","))
}

fn span(first: u32, end: u32) -> String {
    range(first.into(), end.into())
}

/// From the first to the last.
fn range(first: u64, end: u64) -> String {
    match end.saturating_sub(1) {
        last if last > first => format!("{first}-{last}"),
        _ => first.to_string(),
    }
}

/// `1,310,720 B (1.25 MiB)`.
pub(super) fn exact(bytes: u64) -> String {
    let text = format!("{} B", grouped(bytes));
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB")] {
        if bytes >> shift > 0 {
            return format!(
                "{text} ({:.2} {unit})",
                bytes as f64 / (1_u64 << shift) as f64
            );
        }
    }
    text
}

/// `1,310,720`.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_at_a_glance() {
        let cases = [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1_310_720, "1,310,720"),
        ];
        for (number, text) in cases {
            assert_eq!(grouped(number), text);
        }
        assert_eq!(exact(1_310_720), "1,310,720 B (1.25 MiB)");
        assert_eq!(exact(4096), "4,096 B");
    }

    #[test]
    fn layers_are_told_as_runs() {
        assert_eq!(said(&[3]), "layer 3");
        assert_eq!(said(&[0, 1, 2, 5, 7, 8]), "layers 0-2,5,7-8");
    }
}
