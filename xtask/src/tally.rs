//! Counting tests in the words of the test runners.

/// Tests that passed, failed and were not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// Sums up the result lines of `cargo test` and `cargo nextest run`.
pub(crate) fn count(lines: &[String]) -> Tally {
    let mut sum = Tally::default();
    for line in lines {
        let line = plain(line);
        // nextest shows, indented, what a failed test printed: its result is in the summary.
        let counts = if let Some(rest) = line.strip_prefix("test result: ") {
            rest.split_once(". ").map(|(_, counts)| counts)
        } else if line.trim().starts_with("Summary [") {
            line.split_once(" run: ").map(|(_, counts)| counts)
        } else {
            None
        };
        for part in counts.unwrap_or_default().split([';', ',']) {
            let mut words = part.split_ascii_whitespace();
            let Some(n) = words.next().and_then(|n| n.parse::<u64>().ok()) else {
                continue;
            };
            match words.next() {
                Some("passed") => sum.passed += n,
                Some("failed" | "timed" | "exec") => sum.failed += n,
                Some("ignored" | "skipped") => sum.skipped += n,
                _ => {}
            }
        }
    }
    sum
}

/// Without terminal colours.
fn plain(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        if c == '\u{1b}' {
            // "ESC [ … letter"
            for c in chars.by_ref() {
                if c.is_ascii_alphabetic() {
                    break;
                }
            }
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(lines: &[&str]) -> (u64, u64, u64) {
        let lines: Vec<_> = lines.iter().map(ToString::to_string).collect();
        let t = count(&lines);
        (t.passed, t.failed, t.skipped)
    }

    #[test]
    fn both_runners_are_understood() {
        let lines = [
            "running 3 tests",
            "    test result: FAILED. 0 passed; 7 failed; 0 ignored; 0 measured; 5 filtered out",
            "test result: ok. 14 passed; 0 failed; 2 ignored; 0 measured; 5 filtered out; finished in 0.09s",
            "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out",
        ];
        assert_eq!(tally(&lines), (15, 2, 2));
        let ok = "     Summary [   0.1s] 14 tests run: 14 passed (1 slow), 0 skipped";
        assert_eq!(tally(&[ok]), (14, 0, 0));
        let bad =
            "     Summary [   3.0s] 9/20 tests run: 5 passed, 3 failed, 1 timed out, 4 skipped";
        assert_eq!(tally(&[bad]), (5, 4, 4));
        let coloured = "\u{1b}[1m Summary [ 1s]\u{1b}[0m \u{1b}[1m2\u{1b}[0m tests run: \u{1b}[1m2\u{1b}[0m passed, 0 skipped";
        assert_eq!(tally(&[coloured]), (2, 0, 0));
    }

    #[test]
    fn other_lines_count_nothing() {
        assert_eq!(
            tally(&["", "test result:", "Summary [", "5 passed", "\u{1b}"]),
            (0, 0, 0)
        );
    }
}
