//! What the posts of a push may name, and how they are put together.

use std::collections::HashSet;
use std::sync::Arc;

use super::{Block, PostFault};
use crate::block_set::BlockSet;
use crate::blocks::{BlockPair, GroupBlocks};
use crate::mem::kernels::queue::ALL_TENSORS;
use crate::mem::post::{Descriptor, End, PostOp};
use crate::plan::{BlockOps, LayerAt, Posted};

/// The places that posts of a push may name: the blocks of the ranks' layers, and at the consumer those of its
/// ticket.
#[derive(Debug)]
pub(crate) struct PostTable {
    of: Arc<BlockOps>,
    expected: BlockSet,
}

/// A block of a layer that a post wants written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) layer: LayerAt,
    pub(crate) pair: BlockPair,
}

impl PostTable {
    /// `expected` are the blocks of the push's ticket.
    pub(crate) fn new(of: &Arc<BlockOps>, expected: &[GroupBlocks]) -> Self {
        let blocks = expected;
        let mut expected = BlockSet::default();
        for group in blocks {
            // The ticket was checked: no block is there twice.
            let _ = expected.insert_all(group.group, &group.blocks);
        }
        Self {
            of: Arc::clone(of),
            expected,
        }
    }

    /// What a block of each layer takes.
    pub(crate) fn block_ops(&self) -> &Arc<BlockOps> {
        &self.of
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
        // As in the table of work requests, where a layer of which nothing moves is none.
        let found = self.of.find(group.into(), layer.into());
        let found = found.filter(|(_, of)| of.bytes > 0);
        let (at, of) = found.ok_or(PostFault::Layer { group, layer })?;
        if post.len != of.bytes {
            let (len, wanted) = (post.len, of.bytes);
            return Err(PostFault::Length {
                group,
                layer,
                len,
                wanted,
            });
        }
        let (blocks, _) = self.of.num_blocks(group.into());
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
        Ok(Wanted { layer: at, pair })
    }

    /// What a block that is there on both sides wants.
    pub(crate) fn check_block(&self, block: &Block) -> Result<Wanted, PostFault> {
        let (layer, pair) = (block.layer, block.pair);
        let group = self.of.group(layer);
        if !self.expected.contains(group, pair.dst) {
            return Err(PostFault::NotExpected {
                // Only such have windows.
                group: u8::try_from(group).unwrap_or(u8::MAX),
                block: pair.dst,
            });
        }
        Ok(Wanted { layer, pair })
    }
}

/// Posts that are carried out together.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) posted: Posted,
    /// The posts, in the order of the blocks.
    pub(crate) posts: Vec<u64>,
    /// The layer, if it is of one.
    layer: Option<LayerAt>,
}

/// How posts are put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Together {
    /// All of them.
    All,
    /// Those of one layer, for a consumer that plans them itself: a plan writes a block once, so a block that is
    /// posted again begins another batch.
    ByLayer,
}

/// What a look has found.
#[derive(Debug)]
pub(crate) struct Batches {
    of: Arc<BlockOps>,
    together: Together,
    open: Vec<Batch>,
    full: Vec<Batch>,
    /// What the open ones write, where that matters.
    written: HashSet<(LayerAt, u32)>,
}

impl Batches {
    pub(crate) fn new(of: &Arc<BlockOps>, together: Together) -> Self {
        Self {
            of: Arc::clone(of),
            together,
            open: Vec::new(),
            full: Vec::new(),
            written: HashSet::new(),
        }
    }

    pub(crate) fn add(&mut self, post: u64, wanted: Wanted) {
        let Wanted { layer, pair } = wanted;
        let layer_of_batch = match self.together {
            Together::All => None,
            Together::ByLayer => Some(layer),
        };
        let of = |batch: &Batch| batch.layer == layer_of_batch;
        let mut at = self.open.iter().position(of);
        if layer_of_batch.is_some() && !self.written.insert((layer, pair.dst)) {
            self.full.extend(at.take().map(|at| self.open.remove(at)));
            self.written.retain(|(of, _)| *of != layer);
            self.written.insert((layer, pair.dst));
        }
        let at = at.unwrap_or_else(|| {
            self.open.push(Batch {
                posted: Posted::new(&self.of),
                posts: Vec::new(),
                layer: layer_of_batch,
            });
            self.open.len() - 1
        });
        if let Some(batch) = self.open.get_mut(at) {
            batch.posted.add(layer, pair);
            batch.posts.push(post);
        }
    }

    /// All of them, those first that hold a block before others that hold it again.
    pub(crate) fn into_all(self) -> impl Iterator<Item = Batch> {
        self.full.into_iter().chain(self.open)
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
