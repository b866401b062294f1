//! Block ids as people type them: `0-15,32:7,40-47:100`.

use std::fmt;
use std::str::FromStr;

use kvxfer::blocks::BlockPair;

/// The most pairs that are looked at.
const MOST: u64 = 1 << 20;

/// Which block of the producer goes to which block of the consumer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Blocks(pub(super) Vec<BlockPair>);

impl Blocks {
    /// The first `count` blocks, each to its own number.
    pub(super) fn first(count: u32) -> Self {
        Self(
            (0..count)
                .map(|block| BlockPair {
                    src: block,
                    dst: block,
                })
                .collect(),
        )
    }

    /// How many blocks the producer and the consumer must have.
    pub(super) fn needed(&self) -> (u32, u32) {
        let one_more = |id: u32| id.saturating_add(1);
        self.0.iter().fold((1, 1), |(src, dst), pair| {
            (src.max(one_more(pair.src)), dst.max(one_more(pair.dst)))
        })
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
        let mut pairs = Vec::new();
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
            let dst = dst.unwrap_or(first);
            dst.checked_add(count)
                .filter(|end| *end < u32::MAX)
                .ok_or_else(bad)?;
            if pairs.len() as u64 + u64::from(count) >= MOST {
                return Err(BadBlocks(format!("more than {MOST} blocks")));
            }
            pairs.extend((0..=count).map(|n| BlockPair {
                src: first + n,
                dst: dst + n,
            }));
        }
        Ok(Self(pairs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(text: &str) -> Vec<(u32, u32)> {
        let blocks: Blocks = text.parse().expect(text);
        blocks.0.iter().map(|pair| (pair.src, pair.dst)).collect()
    }

    #[test]
    fn blocks_runs_and_other_places() {
        assert_eq!(pairs("7"), [(7, 7)]);
        assert_eq!(pairs("0-2,9:1"), [(0, 0), (1, 1), (2, 2), (9, 1)]);
        assert_eq!(pairs("4-5:100"), [(4, 100), (5, 101)]);
        let blocks: Blocks = "4-5:100,9".parse().expect("blocks");
        assert_eq!(blocks.needed(), (10, 102));
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
