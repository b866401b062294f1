//! Block ids as people type them: `0-15,32:7,40-47:100`, the producer's and where they go.

use std::fmt;
use std::str::FromStr;

/// The most pairs that are looked at.
const MOST: u64 = 1 << 20;

/// Runs of the producer's blocks, and where they go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Blocks(Vec<Run>);

/// Some of the producer's blocks, in token order, and the consumer's first one for them; `None`: the
/// one of the same number, in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: u32,
    count: u32,
    to: Option<u32>,
}

/// Both sides' blocks of a group, in token order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Lists {
    pub(super) src: Vec<u32>,
    pub(super) dst: Vec<u32>,
}

impl Lists {
    /// How many blocks the producer and the consumer must have.
    pub(super) fn needed(&self) -> (u32, u32) {
        let needed = |ids: &[u32]| ids.iter().max().map_or(1, |id| id.saturating_add(1));
        (needed(&self.src), needed(&self.dst))
    }
}

impl Blocks {
    /// The first block.
    pub(super) fn first() -> Self {
        Self(vec![Run {
            first: 0,
            count: 1,
            to: None,
        }])
    }

    /// The blocks of a group whose blocks hold so many tokens.
    pub(super) fn lists(&self, producer: u32, consumer: u32) -> Result<Lists, BadBlocks> {
        // Slots have no tokens and go one by one.
        let (p, c) = (u64::from(producer.max(1)), u64::from(consumer.max(1)));
        let mut out = Lists::default();
        let last = self.0.len().saturating_sub(1);
        for (i, run) in self.0.iter().enumerate() {
            let Run { first, count, to } = *run;
            let tokens = u64::from(count) * p;
            let end = first + (count - 1);
            let of = format!("{first}-{end} of {producer} tokens");
            if i < last && !tokens.is_multiple_of(c) {
                return Err(BadBlocks(format!(
                    "blocks {of} do not fill blocks of {consumer}, and only the last ones need not"
                )));
            }
            let begins = u64::from(first) * p;
            let to = match to {
                Some(to) => u64::from(to),
                None if begins.is_multiple_of(c) => begins / c,
                None => {
                    return Err(BadBlocks(format!(
                        "blocks {of} do not begin where a block of {consumer} does: say {first}-{end}:N for where they go"
                    )));
                }
            };
            let wanted = tokens.div_ceil(c);
            let fits = u32::try_from(to + wanted).is_ok() && out.dst.len() as u64 + wanted <= MOST;
            if !fits {
                return Err(BadBlocks(format!(
                    "blocks {of} make {wanted} blocks of {consumer} from {to} on: more than {MOST}, or ids above {}",
                    u32::MAX
                )));
            }
            out.src.extend(first..=end);
            // It fits, as has been seen.
            out.dst
                .extend((to..to + wanted).filter_map(|id| u32::try_from(id).ok()));
        }
        Ok(out)
    }
}

/// What is wrong with a list of blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BadBlocks(String);

impl fmt::Display for BadBlocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadBlocks {}

impl FromStr for Blocks {
    type Err = BadBlocks;

    fn from_str(text: &str) -> Result<Self, BadBlocks> {
        let (mut runs, mut blocks) = (Vec::new(), 0_u64);
        for item in text.split(',') {
            let bad = || {
                BadBlocks(format!(
                    "`{item}` names no blocks: say 7, 0-15, or 0-15:100 where they go elsewhere"
                ))
            };
            let id = |text: &str| -> Result<u32, BadBlocks> {
                // `parse` would take "+1". The largest number is no block: one more must fit.
                let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
                let id = digits.then(|| text.parse().ok()).flatten();
                id.filter(|id| *id < u32::MAX).ok_or_else(bad)
            };
            let (src, dst) = match item.split_once(':') {
                Some((src, dst)) => (src, Some(id(dst)?)),
                None => (item, None),
            };
            let (first, last) = match src.split_once('-') {
                Some((first, last)) => (id(first)?, id(last)?),
                None => (id(src)?, id(src)?),
            };
            let count = last.checked_sub(first).ok_or_else(bad)?;
            let end = |first: u32| first.checked_add(count).filter(|end| *end < u32::MAX);
            end(dst.unwrap_or(first)).ok_or_else(bad)?;
            blocks += u64::from(count) + 1;
            if blocks > MOST {
                return Err(BadBlocks(format!("more than {MOST} blocks")));
            }
            runs.push(Run {
                first,
                count: count + 1,
                to: dst,
            });
        }
        Ok(Self(runs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lists(text: &str, producer: u32, consumer: u32) -> Result<Lists, String> {
        let blocks: Blocks = text.parse().expect(text);
        blocks.lists(producer, consumer).map_err(|e| e.to_string())
    }

    fn pairs(text: &str) -> Vec<(u32, u32)> {
        let lists = lists(text, 16, 16).expect(text);
        assert_eq!(lists.src.len(), lists.dst.len());
        lists.src.into_iter().zip(lists.dst).collect()
    }

    #[test]
    fn blocks_runs_and_other_places() {
        assert_eq!(pairs("7"), [(7, 7)]);
        assert_eq!(pairs("0-2,9:1"), [(0, 0), (1, 1), (2, 2), (9, 1)]);
        assert_eq!(pairs("4-5:100"), [(4, 100), (5, 101)]);
        let lists = lists("4-5:100,9", 0, 0).expect("slots");
        assert_eq!(lists.needed(), (10, 102));
    }

    #[test]
    fn blocks_of_unequal_size() {
        let both = |text, p, c| lists(text, p, c).map(|l| (l.src, l.dst));
        let small = both("4-11", 16, 64).expect("whole blocks");
        assert_eq!(small, ((4..12).collect(), vec![1, 2]));
        let last = both("0-3:7,9-10:2", 16, 64).expect("the last one need not be filled");
        assert_eq!(last, (vec![0, 1, 2, 3, 9, 10], vec![7, 2]));
        let large = both("1:100", 64, 16).expect("one block");
        assert_eq!(large, (vec![1], vec![100, 101, 102, 103]));
        for (text, word) in [("0-2:7,9", "do not fill"), ("1", "say 1-1:N")] {
            let error = both(text, 16, 64).expect_err(text);
            assert!(error.contains(word), "{text}: {error}");
        }
        for text in ["0-1048575", "0-3:4294967290"] {
            let error = both(text, 64, 1).expect_err("too many, or ids that are too large");
            assert!(error.contains("more than"), "{text}: {error}");
        }
    }

    #[test]
    fn what_names_no_blocks() {
        for text in [
            "",
            "x",
            "-1",
            "+1",
            "3-1",
            "1-",
            "1:",
            ":1",
            "1,,2",
            "0-4294967295",
            "4294967295",
            "0-1:4294967294",
            "0-99999999",
        ] {
            assert!(text.parse::<Blocks>().is_err(), "{text}");
        }
    }
}
