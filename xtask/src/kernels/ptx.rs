//! What the PTX must have and must not have.

use super::Source;
use super::listing::{Kernel, kernel, wanted};

/// How posters take tickets from each other.
const SWAP: &str = "atom.acq_rel.gpu.global.cas.b64";

/// Everything that is wrong with this PTX.
pub(super) fn problems(source: Source, target: &str, text: &str) -> Vec<String> {
    let mut problems = Vec::new();
    if !text
        .lines()
        .any(|line| line.trim() == format!(".target {target}"))
    {
        problems.push(format!("not for {target}"));
    }
    let kernels = kernels(text);
    for kernel in &kernels {
        for instruction in &kernel.code {
            let bare = bare(instruction);
            let harmful = [
                "atom", "red.", "multimem", "cp.", "call", ".local", "st.local",
            ];
            // Posters take tickets from each other.
            let swap = source == Source::Post && bare.starts_with(SWAP);
            if !swap && harmful.iter().any(|prefix| bare.starts_with(prefix)) {
                problems.push(format!("{}: has {instruction}", kernel.name));
            }
        }
    }
    for name in wanted(source) {
        let Some(kernel) = kernel(&kernels, name, &mut problems) else {
            continue;
        };
        let found = match *name {
            "kvx_acquire" | "kvx_release" => fence(kernel),
            "kvx_verify" => verify(kernel),
            "kvx_gather" => gather(kernel),
            "kvx_push_blocks" => push(kernel),
            _ => post(kernel),
        };
        problems.extend(found.into_iter().map(|p| format!("{name}: {p}")));
    }
    problems
}

/// The entries of a module.
fn kernels(text: &str) -> Vec<Kernel<'_>> {
    let mut kernels: Vec<Kernel<'_>> = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        if let Some(entry) = line.strip_prefix(".visible .entry ") {
            let name = entry.split('(').next().unwrap_or_default();
            let code = Vec::new();
            kernels.push(Kernel { name, code });
            inside = true;
        } else if line.starts_with('}') {
            inside = false;
        } else if inside && let Some(kernel) = kernels.last_mut() {
            let instruction = line.split("//").next().unwrap_or_default().trim();
            if !instruction.is_empty() {
                kernel.code.push(instruction);
            }
        }
    }
    kernels
}

/// An instruction without its predicate.
fn bare(instruction: &str) -> &str {
    match instruction.strip_prefix('@') {
        Some(rest) => rest.split_once(char::is_whitespace).map_or(rest, |p| p.1),
        None => instruction,
    }
    .trim_start()
}

/// Stores to anything but shared memory.
fn global_stores(kernel: &Kernel<'_>) -> usize {
    let stores = kernel.code.iter().map(|i| bare(i));
    stores
        .filter(|i| i.starts_with("st.") && !i.starts_with("st.shared"))
        .count()
}

fn fence(kernel: &Kernel<'_>) -> Vec<String> {
    let mut problems = Vec::new();
    match (kernel.first("fence.sc.sys;"), kernel.first("st.")) {
        (Some(fence), Some(store)) if fence < store => {}
        _ => problems.push("no record after fence.sc.sys".into()),
    }
    if global_stores(kernel) != 1 {
        problems.push("stores more than its one record".into());
    }
    if kernel.count("ld.") != kernel.count("ld.param") {
        problems.push("loads something".into());
    }
    problems
}

fn verify(kernel: &Kernel<'_>) -> Vec<String> {
    let mut problems = Vec::new();
    let loads = kernel.first("ld.relaxed.sys.global.u64");
    match (kernel.first("fence.sc.sys;"), loads) {
        (Some(fence), Some(load)) if fence < load => {}
        _ => problems.push("no words of system scope after fence.sc.sys".into()),
    }
    for size in ["u32", "u8"] {
        if kernel.count(&format!("ld.relaxed.sys.global.{size}")) == 0 {
            problems.push(format!("no {size} of system scope"));
        }
    }
    if global_stores(kernel) != 1 {
        problems.push("stores more than its one sum".into());
    }
    problems
}

fn gather(kernel: &Kernel<'_>) -> Vec<String> {
    let mut problems = Vec::new();
    let first_load = kernel.first("ld.global.v4");
    match (kernel.first("ld.acquire.sys.global.u32"), first_load) {
        (Some(acquire), Some(load)) if acquire < load => {}
        _ => problems.push("no ld.acquire.sys before the first block".into()),
    }
    if kernel.count("ld.relaxed.sys.global.u32") == 0 {
        problems.push("does not look at the abort word again".into());
    }
    if kernel.count("st.release.sys.global.u64") != 1 {
        problems.push("not one st.release.sys".into());
    }
    let together = kernel.longest_run("ld.global.v4", |i| bare(i).starts_with("st."));
    if together < 4 {
        problems.push(format!("{together} loads of 16 bytes under way together"));
    }
    if kernel.count("st.global.v4") < 4 {
        problems.push("too few stores of 16 bytes".into());
    }
    problems
}

/// Vectors in flight together, then a fence, and then the word that it is done.
fn push(kernel: &Kernel<'_>) -> Vec<String> {
    let mut problems = Vec::new();
    let together = kernel.longest_run("ld.global.v4", |i| bare(i).starts_with("st."));
    if together < 4 {
        problems.push(format!("{together} loads of 16 bytes under way together"));
    }
    // Where in the text the way of one thread alone is put, is the compiler's choice.
    match (kernel.first("st.global.v4"), kernel.first("fence.sc.sys;")) {
        (Some(copy), Some(fence)) if copy < fence => {}
        _ => problems.push("no fence after the copies".into()),
    }
    if kernel.count("ld.relaxed.sys.global.u32") < 2 {
        problems.push("does not look at the abort word again".into());
    }
    problems
}

/// Descriptor, then its phase by a release; WQE, fence, the word that it is ready; what others have made ready, fence;
/// record, then the doorbell by a release; and completions are given back after a fence.
fn post(kernel: &Kernel<'_>) -> Vec<String> {
    const V4: &str = "st.global.v4.b32";
    const RELEASE: &str = "st.release.sys.global.u64";
    const RECORD: &str = "st.relaxed.sys.global.u32";
    const FENCE: &str = "fence.sc.sys;";
    const READY: &str = "st.relaxed.gpu.global.u64";
    const ACQUIRE: &str = "fence.acq_rel.gpu;";
    let known = [V4, RELEASE, RECORD, FENCE, READY];
    // Stores, swaps and fences; all else by its name.
    let steps = kernel.code.iter().map(|i| bare(i)).filter_map(|i| {
        let step = known.iter().find(|step| i.starts_with(*step));
        let other = ["st.", "atom.", "fence."];
        let other = other.iter().any(|prefix| i.starts_with(prefix));
        let other = other && !i.starts_with("st.shared");
        step.copied().or(other.then_some("other"))
    });
    let steps: Vec<_> = steps.collect();
    let all: [(&[&str], &str); 5] = [
        (
            &[V4, V4, V4, "other", RELEASE],
            "a descriptor's phase is not a release after the rest",
        ),
        (&[V4, V4, V4, FENCE], "no fence after a WQE"),
        (
            &[V4, FENCE, READY],
            "no word that a WQE is ready behind its fence",
        ),
        (&[RECORD, RELEASE], "no release doorbell after its record"),
        (
            &[FENCE, RECORD],
            "no fence before completions are given back",
        ),
    ];
    let has = |sequence: &[&str]| steps.windows(sequence.len()).any(|w| w == sequence);
    let missing = all.iter().filter(|(sequence, _)| !has(sequence));
    let mut problems: Vec<_> = missing.map(|(_, what)| (*what).to_owned()).collect();
    if kernel.count(READY) != 1 {
        problems.push("not one place that says what is ready".into());
    }
    // Where in the text the way is put of who rings for others, is the compiler's choice.
    if kernel.count(ACQUIRE) != 1 {
        problems.push("rings for others and has no acquire".into());
    }
    if kernel.count(SWAP) == 0 {
        problems.push("takes no ticket".into());
    }
    if kernel.count("nanosleep") == 0 {
        problems.push("waits without a pause".into());
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::super::Source;
    use super::problems;

    const GOOD: &str = include_str!("../../../kernels/prebuilt/sm_80.ptx");
    const POSTS: &str = include_str!("../../../kernels/prebuilt/post-sm_80.ptx");

    /// The text with one thing changed, in one kernel.
    fn mutated(good: &str, kernel: &str, from: &str, to: &str) -> String {
        let start = good
            .find(&format!(".entry {kernel}("))
            .expect("the kernel is there");
        let (before, rest) = good.split_at(start);
        let end = rest.find("\n}").expect("it ends");
        let (body, after) = rest.split_at(end);
        assert!(body.contains(from), "{kernel} has no {from}");
        format!("{before}{}{after}", body.replace(from, to))
    }

    #[test]
    fn what_is_built_in_is_good() {
        assert_eq!(problems(Source::Kvx, "sm_80", GOOD), [""; 0]);
        assert_eq!(problems(Source::Kvx, "sm_90", GOOD), ["not for sm_90"]);
        assert_eq!(problems(Source::Post, "sm_80", POSTS), [""; 0]);
    }

    #[test]
    fn every_rule_for_posts_can_fail() {
        let cases = [
            (
                "st.release.sys.global.u64",
                "st.relaxed.sys.global.u64",
                "not a release",
            ),
            (
                "st.release.sys.global.u64",
                "st.release.gpu.global.u64",
                "no release doorbell",
            ),
            (
                "fence.sc.sys;",
                "fence.acq_rel.gpu;",
                "no fence after a WQE",
            ),
            ("fence.sc.sys;", "", "no fence before completions"),
            (
                "st.relaxed.sys.global.u32",
                "st.global.u32",
                "no release doorbell",
            ),
            (
                "atom.acq_rel.gpu.global.cas.b64",
                "atom.global.add.u64",
                "has atom.global.add",
            ),
            (
                "st.relaxed.gpu.global.u64",
                "st.global.u64",
                "no word that a WQE is ready",
            ),
            (
                "st.relaxed.gpu.global.u64",
                "st.relaxed.gpu.global.u64 [%rd1], %rd2;\n\tst.relaxed.gpu.global.u64",
                "not one place",
            ),
            ("fence.acq_rel.gpu;", "", "has no acquire"),
            ("nanosleep.u32 100;", "", "without a pause"),
            ("ret;", "call.uni f, ();\n\tret;", "has call"),
        ];
        for kernel in ["kvx_post_threads", "kvx_post_waves", "kvx_post_blocks"] {
            for (from, to, wanted) in cases {
                let found = problems(Source::Post, "sm_80", &mutated(POSTS, kernel, from, to));
                assert!(
                    found
                        .iter()
                        .any(|p| p.contains(kernel) && p.contains(wanted)),
                    "{kernel}: {from} -> {to}: {found:?}"
                );
            }
        }
        for (from, to, wanted) in [
            ("fence.sc.sys;", "", "no fence after"),
            ("fence.sc.sys;", "fence.acq_rel.gpu;", "no fence after"),
            ("ld.global.v4", "ld.global.v2", "0 loads of 16"),
            (
                "ld.relaxed.sys.global.u32",
                "ld.global.u32",
                "abort word again",
            ),
        ] {
            let text = mutated(POSTS, "kvx_push_blocks", from, to);
            let found = problems(Source::Post, "sm_80", &text);
            let told = found.iter().any(|p| p.contains(wanted));
            assert!(told, "{from} -> {to}: {found:?}");
        }
        // What moves blocks may not swap, whatever posts may.
        let swap = "atom.acq_rel.gpu.global.cas.b64 %rd1, [%rd1], %rd1, %rd1;\n\tret;";
        let found = problems(
            Source::Kvx,
            "sm_80",
            &mutated(GOOD, "kvx_gather", "ret;", swap),
        );
        assert!(found.iter().any(|p| p.contains("has atom")), "{found:?}");
    }

    #[test]
    fn every_rule_can_fail() {
        let cases = [
            (
                "kvx_acquire",
                "fence.sc.sys;",
                "fence.acq_rel.gpu;",
                "no record after",
            ),
            ("kvx_release", "fence.sc.sys;", "", "no record after"),
            (
                "kvx_release",
                "fence.sc.sys;",
                "atom.global.or.b32 %r1, [%rd1], 0;",
                "has atom",
            ),
            (
                "kvx_acquire",
                "ret;",
                "st.global.b32 [%rd1], 0;\n\tret;",
                "more than its one record",
            ),
            (
                "kvx_acquire",
                "ret;",
                "ld.global.b32 %r1, [%rd1];\n\tret;",
                "loads something",
            ),
            (
                "kvx_verify",
                "fence.sc.sys;",
                "membar.gl;",
                "no words of system scope",
            ),
            (
                "kvx_verify",
                "ld.relaxed.sys.global.u64",
                "ld.global.b64",
                "no words of system scope",
            ),
            (
                "kvx_verify",
                "ld.relaxed.sys.global.u32",
                "ld.global.b32",
                "no u32 of system",
            ),
            (
                "kvx_verify",
                "ld.relaxed.sys.global.u8",
                "ld.global.b8",
                "no u8 of system",
            ),
            (
                "kvx_verify",
                "ret;",
                "@%p1 st.global.b64 [%rd1], %rd2;\n\tret;",
                "more than its one sum",
            ),
            (
                "kvx_verify",
                "ret;",
                "@%p1 red.global.add.u64 [%rd1], 1;\n\tret;",
                "has @%p1 red",
            ),
            (
                "kvx_gather",
                "ld.acquire.sys.global.u32",
                "ld.relaxed.sys.global.u32",
                "no ld.acq",
            ),
            (
                "kvx_gather",
                "ld.relaxed.sys.global.u32",
                "ld.global.u32",
                "abort word again",
            ),
            (
                "kvx_gather",
                "st.release.sys.global.u64",
                "st.global.u64",
                "not one st.release",
            ),
            (
                "kvx_gather",
                "ld.global.v4.b32",
                "st.global.b8 [%rd1], 0;\n\tld.global.v4.b32",
                "1 loads",
            ),
            (
                "kvx_gather",
                "ld.global.v4",
                "ld.global.v2",
                "0 loads of 16",
            ),
            (
                "kvx_gather",
                "st.global.v4",
                "st.global.v2",
                "too few stores",
            ),
            ("kvx_gather", "ret;", "call.uni f, ();\n\tret;", "has call"),
        ];
        for (kernel, from, to, wanted) in cases {
            let found = problems(Source::Kvx, "sm_80", &mutated(GOOD, kernel, from, to));
            assert!(
                found
                    .iter()
                    .any(|p| p.contains(kernel) && p.contains(wanted)),
                "{kernel}: {from} -> {to}: {found:?}"
            );
        }
        let gone = GOOD.replace(".entry kvx_verify(", ".entry kvx_else(");
        assert!(problems(Source::Kvx, "sm_80", &gone).contains(&"no kvx_verify".to_owned()));
    }
}
