//! What the posts of a push may name, and how they are put together to plans.

use std::collections::HashSet;

use super::PostFault;
use crate::block_set::BlockSet;
use crate::blocks::{BlockPair, GroupBlocks};
use crate::mem::kernels::queue::ALL_TENSORS;
use crate::mem::post::{Descriptor, End, PostOp};
use crate::plan::Compiled;

/// The places that posts of a push may name: the blocks of the ranks' layers, and at the consumer those of its
/// ticket.
#[derive(Debug)]
pub(crate) struct PostTable {
    plans: Compiled,
    expected: BlockSet,
}

/// A block of a layer that a post wants written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) group: u8,
    pub(crate) layer: u16,
    pub(crate) pair: BlockPair,
}

impl PostTable {
    /// `expected` are the blocks of the push's ticket.
    pub(crate) fn new(plans: &Compiled, expected: &[GroupBlocks]) -> Self {
        let blocks = expected;
        let mut expected = BlockSet::default();
        for group in blocks {
            // The ticket was checked: no block is there twice.
            let _ = expected.insert_all(group.group, &group.blocks);
        }
        Self {
            plans: plans.clone(),
            expected,
        }
    }

    /// What a post wants.
    pub(crate) fn check(&self, post: &Descriptor) -> Result<Wanted, PostFault> {
        if post.op != PostOp::Put {
            return Err(PostFault::Operation);
        }
        let (End::Place(here), End::Place(there)) = (post.local, post.remote) else {
            return Err(PostFault::Address);
        };
        let (group, layer) = (here.group, here.layer);
        let alike = (group, layer) == (there.group, there.layer);
        if !alike || (here.tensor, there.tensor) != (ALL_TENSORS, ALL_TENSORS) {
            return Err(PostFault::Places);
        }
        let wanted = self.plans.layer_bytes(group.into(), layer.into());
        let wanted = wanted.ok_or(PostFault::Layer { group, layer })?;
        if post.len != wanted {
            let len = post.len;
            return Err(PostFault::Length {
                group,
                layer,
                len,
                wanted,
            });
        }
        let (blocks, _) = self.plans.num_blocks(group.into()).unwrap_or_default();
        if here.block >= blocks {
            let block = here.block;
            return Err(PostFault::Source {
                group,
                block,
                blocks,
            });
        }
        if !self.expected.contains(group.into(), there.block) {
            let block = there.block;
            return Err(PostFault::NotExpected { group, block });
        }
        let pair = BlockPair {
            src: here.block,
            dst: there.block,
        };
        Ok(Wanted { group, layer, pair })
    }
}

/// Posts of one layer of a group, which are planned together.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) group: u8,
    pub(crate) layer: u16,
    pub(crate) pairs: Vec<BlockPair>,
    /// The posts, in the order of the pairs.
    pub(crate) posts: Vec<u64>,
    dsts: HashSet<u32>,
}

/// Posts as they come, put together by group and layer. A plan writes a block once, so a block that is posted again
/// begins another.
#[derive(Debug, Default)]
pub(crate) struct Batches {
    open: Vec<Batch>,
    full: Vec<Batch>,
}

impl Batches {
    pub(crate) fn add(&mut self, post: u64, wanted: Wanted) {
        let Wanted { group, layer, pair } = wanted;
        let of = |batch: &Batch| (batch.group, batch.layer) == (group, layer);
        let at = self.open.iter().position(of);
        if let Some(at) = at {
            let again = self
                .open
                .get(at)
                .is_some_and(|batch| batch.dsts.contains(&pair.dst));
            if again {
                self.full.push(self.open.remove(at));
            } else if let Some(batch) = self.open.get_mut(at) {
                batch.add(post, pair);
                return;
            }
        }
        let mut batch = Batch {
            group,
            layer,
            pairs: Vec::new(),
            posts: Vec::new(),
            dsts: HashSet::new(),
        };
        batch.add(post, pair);
        self.open.push(batch);
    }

    /// All of them, those first that hold a block before others that hold it again.
    pub(crate) fn into_all(self) -> impl Iterator<Item = Batch> {
        self.full.into_iter().chain(self.open)
    }
}

impl Batch {
    fn add(&mut self, post: u64, pair: BlockPair) {
        self.dsts.insert(pair.dst);
        self.pairs.push(pair);
        self.posts.push(post);
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
