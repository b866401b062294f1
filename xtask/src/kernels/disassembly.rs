//! What the machine code for AMD must have and must not have.
//!
//! Nothing of this has run on AMD hardware here, so this is the evidence: the instructions that the
//! memory models of the architectures ask for are there, in their order.

use super::Source;
use super::listing::{Kernel, kernel, wanted};

/// How an architecture family spells things.
struct Family {
    acquire: &'static [&'static str],
    release: &'static [&'static str],
    load_16: &'static str,
    store_16: &'static str,
    store_8: &'static str,
    store_4: &'static str,
    /// On every load of system scope.
    system: &'static str,
    /// Whether waves can tell which XCC they run on.
    has_xcc: bool,
}

const GFX94: Family = Family {
    acquire: &[
        "s_waitcnt vmcnt(0) lgkmcnt(0)",
        "buffer_inv sc0 sc1",
        "s_waitcnt vmcnt(0)",
    ],
    release: &[
        "s_waitcnt vmcnt(0) lgkmcnt(0)",
        "buffer_wbl2 sc0 sc1",
        "s_waitcnt vmcnt(0)",
    ],
    load_16: "global_load_dwordx4 ",
    store_16: "global_store_dwordx4 ",
    store_8: "global_store_dwordx2 ",
    store_4: "global_store_dword ",
    system: " sc0 sc1",
    has_xcc: true,
};

const GFX90A: Family = Family {
    acquire: &[
        "s_waitcnt vmcnt(0) lgkmcnt(0)",
        "buffer_invl2",
        "buffer_wbinvl1_vol",
        "s_waitcnt vmcnt(0)",
    ],
    release: &[
        "s_waitcnt vmcnt(0) lgkmcnt(0)",
        "buffer_wbl2",
        "s_waitcnt vmcnt(0)",
    ],
    system: " glc",
    has_xcc: false,
    ..GFX94
};

const GFX11: Family = Family {
    acquire: &[
        "s_waitcnt vmcnt(0) lgkmcnt(0)",
        "s_waitcnt_vscnt null, 0x0",
        "buffer_gl1_inv",
        "buffer_gl0_inv",
        "s_waitcnt vmcnt(0)",
    ],
    release: &["s_waitcnt vmcnt(0) lgkmcnt(0)", "s_waitcnt_vscnt null, 0x0"],
    load_16: "global_load_b128 ",
    store_16: "global_store_b128 ",
    store_8: "global_store_b64 ",
    store_4: "global_store_b32 ",
    system: " glc",
    has_xcc: false,
};

fn family(arch: &str) -> Option<&'static Family> {
    match arch {
        "gfx942" | "gfx950" => Some(&GFX94),
        "gfx90a" => Some(&GFX90A),
        "gfx1100" => Some(&GFX11),
        _ => None,
    }
}

/// Everything that is wrong with this listing of llvm-objdump.
pub(super) fn problems(source: Source, arch: &str, listing: &str) -> Vec<String> {
    let Some(family) = family(arch) else {
        return vec![format!("nobody has said what {arch} must have")];
    };
    let kernels = kernels(listing);
    let mut problems = Vec::new();
    for kernel in &kernels {
        problems.extend(memory_problems(source, kernel));
    }
    for name in wanted(source) {
        let Some(kernel) = kernel(&kernels, name, &mut problems) else {
            continue;
        };
        let found = match *name {
            "kvx_acquire" => fence(family, kernel, family.acquire, "acquire"),
            "kvx_release" => fence(family, kernel, family.release, "release"),
            "kvx_verify" => verify(family, kernel),
            "kvx_gather" => gather(family, kernel),
            "kvx_push_blocks" => push(family, kernel),
            _ => post(family, kernel),
        };
        problems.extend(found.into_iter().map(|p| format!("{name}: {p}")));
    }
    problems
}

/// The functions of a listing.
fn kernels(listing: &str) -> Vec<Kernel<'_>> {
    let mut kernels: Vec<Kernel<'_>> = Vec::new();
    for line in listing.lines() {
        let label = line.split_once('<').and_then(|(_, l)| l.strip_suffix(">:"));
        if let Some(name) = label.filter(|_| !line.starts_with(char::is_whitespace)) {
            let code = Vec::new();
            kernels.push(Kernel { name, code });
        } else if line.starts_with(char::is_whitespace)
            && let Some(kernel) = kernels.last_mut()
        {
            let instruction = line.split("//").next().unwrap_or_default().trim();
            if !instruction.is_empty() {
                kernel.code.push(instruction);
            }
        }
    }
    kernels
}

/// Instructions on memory that no kernel may have: what is not known to be harmless is not.
fn memory_problems(source: Source, kernel: &Kernel<'_>) -> Vec<String> {
    const MEMORY: [&str; 8] = [
        "global_", "flat_", "buffer_", "scratch_", "ds_", "s_store", "s_atomic", "image_",
    ];
    const HARMLESS: [&str; 11] = [
        "global_load_",
        "global_store_",
        "ds_read",
        "ds_write",
        "ds_load_",
        "ds_store_",
        "buffer_inv",
        "buffer_wbl2",
        "buffer_wbinvl1_vol",
        "buffer_gl0_inv",
        "buffer_gl1_inv",
    ];
    // Posters take tickets from each other.
    const SWAPS: [&str; 2] = ["global_atomic_cmpswap_x2 ", "global_atomic_cmpswap_b64 "];
    let begins = |i: &str, with: &[&str]| with.iter().any(|prefix| i.starts_with(prefix));
    let found = kernel.code.iter();
    let found = found.filter(|i| begins(i, &MEMORY) && !begins(i, &HARMLESS));
    let found = found.filter(|i| source != Source::Post || !begins(i, &SWAPS));
    found.map(|i| format!("{}: has {i}", kernel.name)).collect()
}

/// A fence: itself first, then one record, and nothing else on memory.
fn fence(family: &Family, kernel: &Kernel<'_>, sequence: &[&str], what: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let store = kernel.first("global_store_");
    match (kernel.find(sequence), store) {
        (None, _) => problems.push(format!("no {what} fence: {}", sequence.join("; "))),
        (Some(at), Some(store)) if at < store => {}
        _ => problems.push(format!("no record after the {what} fence")),
    }
    if kernel.count("global_store_") != 1 || kernel.count(family.store_16) != 1 {
        problems.push("stores more than its one record".into());
    }
    if kernel.count("global_load_") != 0 {
        problems.push("loads something".into());
    }
    let asks = |i: &&str| i.starts_with("s_getreg_b32 ") && i.contains("HW_REG_XCC_ID");
    if family.has_xcc && !kernel.code.iter().any(asks) {
        problems.push("does not ask where it runs".into());
    }
    problems
}

/// Reads with system scope alone, and writes the sum alone.
fn verify(family: &Family, kernel: &Kernel<'_>) -> Vec<String> {
    let mut problems = Vec::new();
    if kernel.find(family.acquire).is_none() {
        problems.push("no acquire fence".into());
    }
    if kernel.count("global_store_") != 1 || kernel.count(family.store_8) != 1 {
        problems.push("stores more than its one sum".into());
    }
    let loads = kernel.code.iter().filter(|i| i.starts_with("global_load_"));
    let mut any = false;
    for load in loads {
        any = true;
        if !load.ends_with(family.system) {
            problems.push(format!("not of system scope: {load}"));
        }
    }
    if !any {
        problems.push("loads nothing".into());
    }
    problems
}

/// Vectors in flight together; acquire before and release after, with nothing but the sequence behind
/// it.
fn gather(family: &Family, kernel: &Kernel<'_>) -> Vec<String> {
    let mut problems = Vec::new();
    let first_load = kernel.first(family.load_16);
    match (kernel.find(family.acquire), first_load) {
        (Some(at), Some(load)) if at < load => {}
        _ => problems.push("no acquire fence before the first block".into()),
    }
    let mut windows = kernel.code.windows(family.release.len());
    // A fence that is last in the text: the one of the record.
    match windows.rposition(|w| w == family.release) {
        Some(at) => {
            let after = kernel.code.iter().skip(at);
            let mut stores = after.filter(|i| i.starts_with("global_store_"));
            let next = stores.next();
            let good = next.is_some_and(|i| {
                i.starts_with(family.store_8)
                    && i.contains("offset:24")
                    && (!family.has_xcc || i.ends_with(family.system))
            });
            if !good || stores.next().is_some() {
                problems.push("the sequence is not what follows the release fence".into());
            }
        }
        None => problems.push("no release fence".into()),
    }
    let together = kernel.longest_run(family.load_16, |i| {
        i.starts_with("global_store_") || i.starts_with("s_waitcnt") && i.contains("vmcnt")
    });
    if together < 4 {
        problems.push(format!("{together} loads of 16 bytes under way together"));
    }
    if kernel.count(family.store_16) < 4 {
        problems.push("too few stores of 16 bytes".into());
    }
    problems
}

/// Vectors in flight together, then a release, and then the word that it is done.
fn push(family: &Family, kernel: &Kernel<'_>) -> Vec<String> {
    let mut problems = Vec::new();
    let together = kernel.longest_run(family.load_16, |i| {
        i.starts_with("global_store_") || i.starts_with("s_waitcnt") && i.contains("vmcnt")
    });
    if together < 4 {
        problems.push(format!("{together} loads of 16 bytes under way together"));
    }
    let mut windows = kernel.code.windows(family.release.len());
    let fence = windows.rposition(|w| w == family.release);
    let behind = kernel.code.iter().skip(fence.unwrap_or(usize::MAX));
    // The result is one store.
    if behind.filter(|i| i.starts_with("global_store_")).count() != 1 {
        problems.push("no release between the copies and the word that they are done".into());
    }
    problems
}

/// What a post does to memory that others look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Store16,
    Store8,
    Store4,
    /// The last word of a descriptor.
    Phase,
    OtherStore,
    Swap,
    Release,
    Acquire,
}

/// The stores, swaps and fences, as they stand in the text. Loads are left out.
fn steps(family: &Family, kernel: &Kernel<'_>) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut rest = kernel.code.as_slice();
    while let Some((first, after)) = rest.split_first() {
        // On gfx1100 what a release is stands at the head of what an acquire is.
        let (step, len) = if rest.starts_with(family.acquire) {
            (Step::Acquire, family.acquire.len())
        } else if rest.starts_with(family.release) {
            (Step::Release, family.release.len())
        } else {
            let system = !family.has_xcc || first.ends_with(family.system);
            let step = match first {
                i if i.starts_with("global_atomic_") => Step::Swap,
                i if i.starts_with(family.store_16) => Step::Store16,
                i if i.starts_with(family.store_8) && i.contains("offset:56") && system => {
                    Step::Phase
                }
                i if i.starts_with(family.store_8) => Step::Store8,
                i if i.starts_with(family.store_4) => Step::Store4,
                i if i.starts_with("global_store_") => Step::OtherStore,
                _ => {
                    rest = after;
                    continue;
                }
            };
            (step, 1)
        };
        steps.push(step);
        rest = rest.get(len..).unwrap_or_default();
    }
    steps
}

/// Descriptor, release, phase; WQE, release, the word that it is ready; record, release, doorbell; and completions are given back
/// after an acquire.
fn post(family: &Family, kernel: &Kernel<'_>) -> Vec<String> {
    use Step::{Acquire, Phase, Release, Store4, Store8, Store16};
    let steps = steps(family, kernel);
    let all: [(&[Step], &str); 5] = [
        (
            &[Store16, Store16, Store16, Store8, Release, Phase],
            "no release between a descriptor and its phase",
        ),
        (
            &[Store16, Store16, Store16, Release],
            "no release after a WQE",
        ),
        (
            &[Store16, Release, Store8],
            "no word that a WQE is ready behind its release",
        ),
        (
            &[Store4, Release, Store8],
            "no release between a record and its doorbell",
        ),
        (
            &[Acquire, Store4],
            "no acquire before completions are given back",
        ),
    ];
    let has = |sequence: &[Step]| steps.windows(sequence.len()).any(|w| w == sequence);
    let missing = all.iter().filter(|(sequence, _)| !has(sequence));
    let mut problems: Vec<_> = missing.map(|(_, what)| (*what).to_owned()).collect();
    if steps.iter().filter(|step| **step == Phase).count() != 1 {
        problems.push("not one place that stores a phase".into());
    }
    if !kernel.code.iter().any(|i| i.starts_with("s_sleep")) {
        problems.push("waits without a pause".into());
    }
    problems
}

#[cfg(test)]
mod tests;
