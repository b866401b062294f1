//! A listing of machine code or PTX, function by function.

use super::Source;

/// A kernel and its instructions, without addresses and comments.
#[derive(Debug)]
pub(super) struct Kernel<'a> {
    pub(super) name: &'a str,
    pub(super) code: Vec<&'a str>,
}

/// Every kernel that a module must have.
pub(super) fn wanted(source: Source) -> &'static [&'static str] {
    match source {
        Source::Kvx => &["kvx_acquire", "kvx_release", "kvx_verify", "kvx_gather"],
        Source::Post => &[
            "kvx_post_threads",
            "kvx_post_waves",
            "kvx_post_blocks",
            "kvx_produce",
            "kvx_push_blocks",
        ],
        Source::Planted => &[],
    }
}

impl Kernel<'_> {
    /// Where these instructions stand one right after the other, first to last.
    pub(super) fn find(&self, sequence: &[&str]) -> Option<usize> {
        self.code
            .windows(sequence.len())
            .position(|window| window == sequence)
    }

    /// How many instructions begin so.
    pub(super) fn count(&self, prefix: &str) -> usize {
        self.code.iter().filter(|i| i.starts_with(prefix)).count()
    }

    /// Where the first instruction is that begins so.
    pub(super) fn first(&self, prefix: &str) -> Option<usize> {
        self.code.iter().position(|i| i.starts_with(prefix))
    }

    /// The most instructions that begin so with none of those between that `ends` them.
    pub(super) fn longest_run(&self, prefix: &str, ends: impl Fn(&str) -> bool) -> usize {
        let (mut run, mut longest) = (0, 0);
        for instruction in &self.code {
            if instruction.starts_with(prefix) {
                run += 1;
                longest = longest.max(run);
            } else if ends(instruction) {
                run = 0;
            }
        }
        longest
    }
}

/// The kernel of this name, or a problem.
pub(super) fn kernel<'a, 'b>(
    kernels: &'b [Kernel<'a>],
    name: &str,
    problems: &mut Vec<String>,
) -> Option<&'b Kernel<'a>> {
    let found = kernels.iter().find(|kernel| kernel.name == name);
    if found.is_none() {
        problems.push(format!("no {name}"));
    }
    found
}
