//! A set of (cache group, block id) pairs, to notice a block that is listed twice.

use crate::blocks::GroupBlocks;

/// Ids of one page of the set: a page is 4 KiB of bits.
const PAGE_BITS: u32 = 1 << 15;
/// 64-bit words of a page.
const PAGE_WORDS: usize = PAGE_BITS as usize / 64;

type Page = Box<[u64; PAGE_WORDS]>;

/// Block ids by cache group, as bits in pages that exist only where an id was put.
///
/// A full id range costs 1 MiB of page table a group, an ordinary block pool a few pages.
#[derive(Debug, Default)]
pub(crate) struct BlockSet {
    groups: Vec<(u32, Vec<Option<Page>>)>,
}

/// The page of a block, the word in it, the bit in that.
fn place(block: u32) -> (usize, usize, u64) {
    let in_page = block % PAGE_BITS;
    (
        (block / PAGE_BITS) as usize,
        (in_page / 64) as usize,
        1 << (in_page % 64),
    )
}

impl BlockSet {
    fn pages(&mut self, group: u32) -> &mut Vec<Option<Page>> {
        let at = match self.groups.iter().position(|(g, _)| *g == group) {
            Some(at) => at,
            None => {
                self.groups.push((group, Vec::new()));
                self.groups.len() - 1
            }
        };
        &mut self.groups[at].1
    }

    /// Whether a block is there.
    pub(crate) fn contains(&self, group: u32, block: u32) -> bool {
        let (page, word, bit) = place(block);
        let pages = self
            .groups
            .iter()
            .find(|(g, _)| *g == group)
            .map(|(_, pages)| pages);
        let page = pages.and_then(|pages| pages.get(page)?.as_ref());
        page.is_some_and(|page| page[word] & bit != 0)
    }

    /// Adds all blocks of a group. On the first block that is there already, nothing stays added
    /// of this call, and the block comes back.
    pub(crate) fn insert_all(&mut self, group: u32, blocks: &[u32]) -> Result<(), u32> {
        let pages = self.pages(group);
        for (done, &block) in blocks.iter().enumerate() {
            let (page, word, bit) = place(block);
            if pages.len() <= page {
                pages.resize_with(page + 1, || None);
            }
            let page = pages[page].get_or_insert_with(|| Box::new([0; PAGE_WORDS]));
            if page[word] & bit != 0 {
                self.remove_all(group, &blocks[..done]);
                return Err(block);
            }
            page[word] |= bit;
        }
        Ok(())
    }

    /// Takes all blocks of a group out again.
    fn remove_all(&mut self, group: u32, blocks: &[u32]) {
        let pages = self.pages(group);
        for &block in blocks {
            let (page, word, bit) = place(block);
            if let Some(Some(page)) = pages.get_mut(page) {
                page[word] &= !bit;
            }
        }
    }
}

/// What is wrong with a list of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BlocksError {
    /// A cache group has two lists.
    #[error("cache group {group} is listed twice")]
    GroupTwice {
        /// The group's index.
        group: u32,
    },
    /// A block is listed twice in its group.
    #[error("block {block} of cache group {group} is listed twice")]
    BlockTwice {
        /// The group's index.
        group: u32,
        /// The block's id.
        block: u32,
    },
    /// More groups than a request may have.
    #[error("{groups} cache groups, at most {max} are allowed")]
    TooManyGroups {
        /// Groups listed.
        groups: usize,
        /// The bound.
        max: usize,
    },
    /// More blocks than a request may have.
    #[error("{blocks} blocks, at most {max} are allowed")]
    TooManyBlocks {
        /// Blocks listed, or as many as were counted before giving up.
        blocks: u64,
        /// The bound.
        max: u64,
    },
}

/// Most cache groups one request may list.
pub const MAX_GROUPS: usize = 64;
/// Most blocks one request may list, all groups together.
pub const MAX_BLOCKS: u64 = 1 << 20;

/// Checks that groups and blocks are within bounds and that none is listed twice. Blocks of
/// different groups may have the same id: each group has its own table.
///
/// # Errors
/// The first fault found.
pub fn check_groups(groups: &[GroupBlocks]) -> Result<(), BlocksError> {
    if groups.len() > MAX_GROUPS {
        return Err(BlocksError::TooManyGroups {
            groups: groups.len(),
            max: MAX_GROUPS,
        });
    }
    let blocks: u64 = groups.iter().map(|g| g.blocks.len() as u64).sum();
    if blocks > MAX_BLOCKS {
        return Err(BlocksError::TooManyBlocks {
            blocks,
            max: MAX_BLOCKS,
        });
    }
    let mut seen = BlockSet::default();
    for (at, group) in groups.iter().enumerate() {
        if groups[..at].iter().any(|g| g.group == group.group) {
            return Err(BlocksError::GroupTwice { group: group.group });
        }
        seen.insert_all(group.group, &group.blocks)
            .map_err(|block| BlocksError::BlockTwice {
                group: group.group,
                block,
            })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_insert_leaves_nothing() {
        let mut set = BlockSet::default();
        set.insert_all(0, &[5, u32::MAX]).unwrap();
        assert_eq!(set.insert_all(0, &[1, 2, 5, 3]), Err(5));
        set.insert_all(0, &[1, 2, 3]).unwrap();
        assert_eq!(set.insert_all(0, &[u32::MAX]), Err(u32::MAX));
        set.insert_all(1, &[5]).unwrap();
        set.remove_all(0, &[5]);
        set.insert_all(0, &[5]).unwrap();
    }

    #[test]
    fn doubles_are_named() {
        let g = |group, blocks: &[u32]| GroupBlocks {
            group,
            blocks: blocks.to_vec(),
        };
        assert_eq!(check_groups(&[g(0, &[1, 2]), g(1, &[1, 2])]), Ok(()));
        assert_eq!(
            check_groups(&[g(0, &[1]), g(3, &[7, 9, 7])]),
            Err(BlocksError::BlockTwice { group: 3, block: 7 })
        );
        assert_eq!(
            check_groups(&[g(2, &[1]), g(2, &[5])]),
            Err(BlocksError::GroupTwice { group: 2 })
        );
    }
}
