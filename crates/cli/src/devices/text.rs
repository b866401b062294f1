//! The report for people who know ibv_devinfo and show_gids. Writing to a string does not fail.

use std::fmt::Write;

use super::moves::Move;
use super::report::{Chosen, Device, GidRow, Limits, Link, Port, Report, Soft};
use crate::size::Size;

/// When an engine takes the port that is chosen.
const TAKEN_WHEN: &str =
    "an engine stands on it where rdma_devices names it or path is rdma, otherwise on soft\n";

pub(super) fn text(report: &Report) -> String {
    let mut out = String::new();
    if let Some(why) = &report.rdma.why {
        let _ = writeln!(out, "no RDMA: {why}\n");
    }
    for device in &report.devices {
        draw(&mut out, device, &report.order);
        out.push('\n');
    }
    soft(&mut out, &report.soft);
    out.push('\n');
    gpus::draw(&mut out, report);
    out.push('\n');
    moves(&mut out, report);
    if !report.devices.is_empty() {
        out.push('\n');
        choice(&mut out, report);
    }
    // Names and versions are words of drivers.
    out.chars().map(plain).collect()
}

/// A terminal takes control characters for commands.
fn plain(c: char) -> char {
    match c {
        '\n' => c,
        c if c.is_control() => char::REPLACEMENT_CHARACTER,
        c => c,
    }
}

fn draw(out: &mut String, device: &Device, order: &[Chosen]) {
    let mut facts = vec![format!("transport {}", device.transport)];
    facts.extend(
        device
            .driver
            .as_ref()
            .map(|driver| format!("driver {driver}")),
    );
    facts.extend(device.pci.as_ref().map(|pci| format!("PCI {pci}")));
    facts.extend(device.numa_node.map(|node| format!("NUMA node {node}")));
    facts.push(format!("GUID {}", device.node_guid));
    if let Some(limits) = &device.limits {
        facts.push(format!("firmware {}", limits.firmware));
        facts.push(format!(
            "vendor {:#06x} part {}",
            limits.vendor_id, limits.part_id
        ));
    }
    let _ = writeln!(out, "{}  {}", device.name, facts.join(", "));
    if let Some(why_not) = &device.why_not {
        let _ = writeln!(out, "  cannot be used: {why_not}");
    }
    if let Some(limits) = &device.limits {
        let _ = writeln!(out, "  limits  {}", said(limits));
    }
    for port in &device.ports {
        let is_it = |c: &&Chosen| c.device == device.name && c.port == port.port;
        draw_port(out, device, port, order.iter().find(is_it));
    }
}

fn said(limits: &Limits) -> String {
    let Limits {
        max_qp,
        max_qp_wr,
        max_sge,
        max_cq,
        max_cqe,
        max_mr,
        max_mr_size,
        max_pd,
        max_rd_atomic,
        max_init_rd_atomic,
        ..
    } = limits;
    // 0 says that READs take as many as all else.
    let reads = match limits.max_sge_rd {
        0 => String::new(),
        reads => format!(" ({reads} a READ)"),
    };
    let size = match *max_mr_size {
        u64::MAX => "any size".to_owned(),
        bytes => format!("up to {}", Size(bytes)),
    };
    format!(
        "{max_qp} QPs of {max_qp_wr} WRs, {max_sge} SGEs a WR{reads}, {max_cq} CQs of {max_cqe} CQEs, \
         {max_mr} MRs of {size}, {max_pd} PDs, READs under way {max_init_rd_atomic} out and \
         {max_rd_atomic} in"
    )
}

fn draw_port(out: &mut String, device: &Device, port: &Port, chosen: Option<&Chosen>) {
    let link = port
        .link
        .as_ref()
        .map_or_else(|| "unknown".to_owned(), linked);
    let _ = writeln!(out, "  port {}  {link}", port.port);
    let index = chosen.and_then(|c| c.gid.as_ref()).map(|gid| gid.row.index);
    table(out, &port.gids, index);
    match &port.why_not {
        // It is the device's, and told there.
        Some(_) if device.why_not.is_some() => {}
        Some(why_not) => {
            let _ = writeln!(out, "    cannot be used: {why_not}");
        }
        None => {}
    }
}

fn linked(link: &Link) -> String {
    let unknown = || "?".to_owned();
    let mut facts = vec![link.state.clone(), link.link_layer.clone()];
    facts.push(link.mbps.map_or_else(
        || "unknown speed".to_owned(),
        |mbps| format!("{} Gb/s", f64::from(mbps) / 1e3),
    ));
    let mtu = |mtu: Option<u32>| mtu.map_or_else(unknown, |mtu| mtu.to_string());
    facts.push(format!(
        "MTU {} of {}",
        mtu(link.active_mtu),
        mtu(link.max_mtu)
    ));
    facts.push(format!("messages up to {}", Size(link.max_msg_sz.into())));
    if link.lid != 0 {
        facts.push(format!("LID {}", link.lid));
    }
    facts.join(", ")
}

/// The GIDs, as show_gids has them; a star marks the one that is taken.
fn table(out: &mut String, gids: &[GidRow], chosen: Option<u32>) {
    let kind = |gid: &GidRow| gid.kind.clone().unwrap_or_else(|| "unknown".to_owned());
    let widest = |width: fn(&GidRow) -> usize, least: usize| {
        gids.iter().map(width).max().unwrap_or(0).max(least)
    };
    let kinds = gids.iter().map(|gid| kind(gid).len()).max().unwrap_or(0);
    let addresses = widest(|gid| gid.address.len(), 0);
    let indices = widest(|gid| gid.index.to_string().len(), 1);
    for gid in gids {
        let mark = if chosen == Some(gid.index) { '*' } else { ' ' };
        let line = format!(
            "  {mark} GID {:indices$}  {:kinds$}  {:addresses$}  {}",
            gid.index,
            kind(gid),
            gid.address,
            gid.netdev.as_deref().unwrap_or_default()
        );
        let _ = writeln!(out, "{}", line.trim_end());
    }
}

fn soft(out: &mut String, soft: &Soft) {
    let _ = writeln!(
        out,
        "{}  the software device, in every process",
        soft.device
    );
    if let Some(limits) = &soft.limits {
        let _ = writeln!(
            out,
            "  limits  queues of {} WRs, {} SGEs a WR, CQs of {} CQEs, {} MRs, messages up to {}",
            limits.max_qp_wr,
            limits.max_sge,
            limits.max_cqe,
            limits.max_mr,
            Size(limits.max_msg_sz)
        );
    }
    for path in &soft.paths {
        let state = match &path.why_not {
            None => String::new(),
            Some(why_not) => format!("cannot be used: {why_not}; "),
        };
        let _ = writeln!(out, "  {:<10}  {state}{}", path.path, path.note);
    }
}

/// What can be moved where. What is not there yet is told once.
fn moves(out: &mut String, report: &Report) {
    for a_move in report
        .moves
        .iter()
        .filter(|a_move| a_move.between == ["host", "host"])
    {
        let state = match a_move.usable {
            true => a_move.reach,
            false => "no, see above",
        };
        let _ = writeln!(out, "host to host over {:<10}  {state}", a_move.path);
    }
    let of_gpus = |a_move: &&Move| a_move.between[0] == "gpu";
    for a_move in report.moves.iter().filter(of_gpus) {
        let state = match (&a_move.why_not, a_move.path) {
            (None, _) => a_move.reach,
            // It is long, and stands with the GPU.
            (Some(_), "rdma") if !report.gpus.is_empty() => "no, see above",
            (Some(why_not), _) => why_not,
        };
        let whom = match a_move.between[1] {
            "gpu" => "GPU to GPU over",
            _ => "GPU to host over",
        };
        let way = format!("{whom} {}", a_move.path);
        let _ = writeln!(out, "{way:<28}  {state}");
    }
}

fn choice(out: &mut String, report: &Report) {
    let asked = &report.config;
    let mut whom = String::new();
    if let Some(peer) = &asked.peer {
        let addresses: Vec<_> = asked
            .peer_addresses
            .iter()
            .map(ToString::to_string)
            .collect();
        let addresses = addresses.join(", ");
        match *peer == addresses {
            true => whom.push_str(&format!(" towards {peer}")),
            false => whom.push_str(&format!(" towards {peer} ({addresses})")),
        }
    }
    if let Some(near) = &asked.near {
        let what = match near.contains(':') {
            true => "PCI device",
            false => "NUMA node",
        };
        whom.push_str(&format!(" near {what} {near}"));
    }
    if report.order.is_empty() {
        let _ = writeln!(out, "chosen{whom}: no NIC can be used");
    }
    for (at, chosen) in report.order.iter().enumerate() {
        let turn = match at {
            0 => format!("chosen{whom}"),
            _ => "then".to_owned(),
        };
        let Chosen {
            device,
            port,
            reason,
            gid,
        } = chosen;
        let gid = gid.as_ref().map_or_else(String::new, |gid| {
            format!(
                "; GID {} {}: {}",
                gid.row.index, gid.row.address, gid.reason
            )
        });
        let _ = writeln!(out, "{turn}: {device} port {port}, {reason}{gid}");
    }
    if !report.order.is_empty() {
        out.push_str(TAKEN_WHEN);
    }
}

mod gpus;
#[cfg(test)]
mod tests;
