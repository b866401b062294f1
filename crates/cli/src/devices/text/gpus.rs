//! The GPUs of the report.

use std::fmt::Write;

use super::super::gpus::{Class, GpuRow, Nearness};
use super::Report;

pub(super) fn draw(out: &mut String, report: &Report) {
    if let Some(why) = &report.gpu.why {
        let _ = writeln!(out, "GPUs: none; {why}");
    }
    for gpu in &report.gpus {
        one(out, report, gpu);
    }
}

fn one(out: &mut String, report: &Report, gpu: &GpuRow) {
    let mut facts = vec![gpu.name.clone(), gpu.arch.clone()];
    // No GPU has so much that a number of 64 bits with a fraction could not hold it.
    facts.push(format!("{:.1} GiB", gpu.memory as f64 / f64::from(1 << 30)));
    facts.push(format!("{} compute units", gpu.compute_units));
    facts.extend(gpu.xccs.map(|xccs| format!("{xccs} XCCs")));
    facts.push(format!("PCI {}", gpu.pci));
    facts.extend(gpu.numa_node.map(|node| format!("NUMA node {node}")));
    facts.push(format!("UUID {}", gpu.uuid));
    if let (Some(runtime), Some(library)) = (&report.gpu.runtime, &report.gpu.library) {
        facts.push(format!("by {runtime} ({library})"));
    }
    let _ = writeln!(out, "GPU {}  {}", gpu.ordinal, facts.join(", "));
    let said = |has: Option<bool>| match has {
        Some(true) => "yes",
        Some(false) => "no",
        None => "not told",
    };
    let _ = writeln!(
        out,
        "  to NICs  dma-buf export: {}; GPUDirect RDMA: {}",
        said(Some(gpu.dma_buf)),
        said(gpu.gpudirect_rdma)
    );
    let classes: Vec<String> = gpu.classes.iter().map(needs).collect();
    let _ = writeln!(out, "  after a NIC's write  {}", classes.join("; "));
    if gpu.mps {
        let _ = writeln!(
            out,
            "  through CUDA's MPS server: kernels here write no peer's blocks themselves"
        );
    }
    for nic in &gpu.nics {
        let _ = writeln!(out, "  {}  {}", nic.device, how_near(nic));
    }
    for nic in &gpu.registers {
        let state = nic.why_not.as_ref().map(|why_not| format!("no: {why_not}"));
        let state = state.unwrap_or_else(|| "yes".to_owned());
        let _ = writeln!(out, "  registered with {}  {state}", nic.device);
    }
    for pair in report
        .gpu_pairs
        .iter()
        .filter(|pair| pair.from == gpu.ordinal)
    {
        let reach = match &pair.why_not {
            None => "P2P, IPC".to_owned(),
            Some(why_not) => format!("no P2P, no IPC: {why_not}"),
        };
        let _ = writeln!(out, "  to GPU {}  {reach}", pair.to);
    }
}

fn needs(class: &Class) -> String {
    let step = match class.step {
        "native" => None,
        "host-flush" => Some("flush by the host"),
        _ => Some("READ back through the NIC"),
    };
    let steps = [step, class.acquire.then_some("acquire fence")];
    let steps: Vec<&str> = steps.into_iter().flatten().collect();
    match steps.is_empty() {
        true => format!("{}: nothing", class.class),
        false => format!("{}: {}", class.class, steps.join(" and ")),
    }
}

/// The first step of a way is the root, which a whole socket may share.
fn how_near(nic: &Nearness) -> &'static str {
    match (nic.shared, nic.same_numa) {
        (2.., _) => "behind the same PCI bridge",
        (1, _) => "on the same PCI root",
        (0, Some(true)) => "on the same NUMA node",
        (0, Some(false)) => "on another NUMA node",
        (0, None) => "at an unknown distance",
    }
}
