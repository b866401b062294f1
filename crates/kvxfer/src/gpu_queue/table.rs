//! What the posts of a push may name, and how they are put together.

use std::collections::HashSet;
use std::sync::Arc;

use super::{Block, PostFault};
use crate::block_set::BlockSet;
use crate::blocks::{BlockPair, GroupBlocks};
use crate::mem::kernels::queue::ALL_TENSORS;
use crate::mem::post::{Descriptor, End, Place, PostOp};
use crate::plan::{BlockOps, LayerAt, Posted};

/// The places that posts may name: the blocks of the ranks' layers that are in the push, or in the pull.
#[derive(Debug)]
pub(crate) struct PostTable {
    of: Arc<BlockOps>,
    names: Names,
}

#[derive(Debug)]
enum Names {
    /// Any of this rank's, into those that the consumer expects; and whether it can be told immediates.
    Puts { expected: BlockSet, tells: bool },
    /// Those that the producer offers, into those that are the pull's.
    Gets { offered: BlockSet, into: BlockSet },
}

/// A block of a layer that a post wants moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) layer: LayerAt,
    pub(crate) pair: BlockPair,
    /// What the consumer is told when it is there.
    pub(crate) immediate: Option<u32>,
}

impl PostTable {
    /// `expected` are the blocks of the push's ticket; `tells`: the consumer can be told immediates.
    pub(crate) fn new(of: &Arc<BlockOps>, expected: &[GroupBlocks], tells: bool) -> Self {
        let there = |group| of.num_blocks(group).1;
        Self {
            of: Arc::clone(of),
            names: Names::Puts {
                expected: set(expected, there),
                tells,
            },
        }
    }

    /// The same of a pull: `offered` are the blocks of its ticket, `into` are this rank's.
    pub(crate) fn of_gets(
        of: &Arc<BlockOps>,
        offered: &[GroupBlocks],
        into: &[GroupBlocks],
    ) -> Self {
        Self {
            of: Arc::clone(of),
            names: Names::Gets {
                offered: set(offered, |group| of.num_blocks(group).0),
                into: set(into, |group| of.num_blocks(group).1),
            },
        }
    }

    /// What a block of each layer takes.
    pub(crate) fn block_ops(&self) -> &Arc<BlockOps> {
        &self.of
    }

    /// What a post wants.
    pub(crate) fn check(&self, post: &Descriptor) -> Result<Wanted, PostFault> {
        let immediate = match (&self.names, post.op) {
            (Names::Puts { .. }, PostOp::Put) | (Names::Gets { .. }, PostOp::Get) => None,
            (Names::Puts { tells: true, .. }, PostOp::PutImm(immediate)) => Some(immediate),
            (Names::Puts { tells: false, .. }, PostOp::PutImm(_)) => {
                return Err(PostFault::Immediate);
            }
            _ => return Err(PostFault::Operation),
        };
        let (End::Place(here), End::Place(there)) = (post.local, post.remote) else {
            return Err(PostFault::Address);
        };
        let layer = layer_of(&self.of, (here, there), post.len)?;
        let pair = self.pair(here.group, here.block, there.block)?;
        Ok(Wanted {
            layer,
            pair,
            immediate,
        })
    }

    /// What a block that is there on both sides wants.
    pub(crate) fn check_block(&self, block: &Block) -> Result<Wanted, PostFault> {
        let Block { layer, pair, .. } = *block;
        // Only groups with such numbers have windows.
        let group = u8::try_from(self.of.group(layer)).unwrap_or(u8::MAX);
        let (here, there) = match self.names {
            Names::Puts { .. } => (pair.src, pair.dst),
            Names::Gets { .. } => (pair.dst, pair.src),
        };
        let pair = self.pair(group, here, there)?;
        Ok(Wanted {
            layer,
            pair,
            immediate: None,
        })
    }

    /// A block of this rank and one of the peer's.
    fn pair(&self, group: u8, here: u32, there: u32) -> Result<BlockPair, PostFault> {
        match &self.names {
            Names::Puts { expected, .. } => {
                let (src, dst) = (here, there);
                has_source(&self.of, group, src)?;
                match expected.contains(group.into(), dst) {
                    true => Ok(BlockPair { src, dst }),
                    false => Err(PostFault::NotExpected { group, block: dst }),
                }
            }
            Names::Gets { offered, into } => {
                let (src, dst) = (there, here);
                match () {
                    () if !into.contains(group.into(), dst) => {
                        Err(PostFault::Destination { group, block: dst })
                    }
                    () if !offered.contains(group.into(), src) => {
                        Err(PostFault::NotOffered { group, block: src })
                    }
                    () => Ok(BlockPair { src, dst }),
                }
            }
        }
    }
}

/// Whether the producer has a block.
pub(super) fn has_source(of: &BlockOps, group: u8, block: u32) -> Result<(), PostFault> {
    let (blocks, _) = of.num_blocks(group.into());
    match block < blocks {
        true => Ok(()),
        false => Err(PostFault::Source {
            group,
            block,
            blocks,
        }),
    }
}

/// The layer of which two places, and so many bytes, name a block.
pub(super) fn layer_of(
    of: &BlockOps,
    (here, there): (Place, Place),
    len: u64,
) -> Result<LayerAt, PostFault> {
    let (group, layer) = (here.group, here.layer);
    let alike = (group, layer) == (there.group, there.layer);
    if !alike || (here.tensor, there.tensor) != (ALL_TENSORS, ALL_TENSORS) {
        return Err(PostFault::Places);
    }
    // As in the table of work requests, where a layer of which nothing moves is none.
    let found = of.find(group.into(), layer.into());
    let found = found.filter(|(_, of)| of.bytes > 0);
    let (at, of) = found.ok_or(PostFault::Layer { group, layer })?;
    if len != of.bytes {
        let wanted = of.bytes;
        return Err(PostFault::Length {
            group,
            layer,
            len,
            wanted,
        });
    }
    Ok(at)
}

/// Those blocks of each group that a rank has: so many, whatever a ticket says.
fn set(groups: &[GroupBlocks], has: impl Fn(u32) -> u32) -> BlockSet {
    let mut set = BlockSet::default();
    for GroupBlocks { group, blocks } in groups {
        let known = has(*group);
        for block in blocks.iter().filter(|block| **block < known) {
            // It may be there twice.
            let _ = set.insert_all(*group, &[*block]);
        }
    }
    set
}

/// Posts that are carried out together.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) posted: Posted,
    /// The posts, in the order of the blocks.
    pub(crate) posts: Vec<u64>,
    /// Those of which the consumer is told something, and what.
    pub(crate) immediates: Vec<(u64, u32)>,
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
        let Wanted {
            layer,
            pair,
            immediate,
        } = wanted;
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
                immediates: Vec::new(),
                layer: layer_of_batch,
            });
            self.open.len() - 1
        });
        if let Some(batch) = self.open.get_mut(at) {
            batch.posted.add(layer, pair);
            batch.posts.push(post);
            batch.immediates.extend(immediate.map(|what| (post, what)));
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
