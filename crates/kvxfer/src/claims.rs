//! Which blocks of a rank are in something that is under way, so that no block is in two things that
//! do not go together. Pure: no I/O, no clock.
//!
//! What is *written* (the destination of a pull, an expectation) has its blocks for itself. What is
//! *read* (an offer, the source of a push) shares them with others that are read, and with nothing
//! that is written. A claim lasts until the memory is the owner's again: through quarantine too.
//!
//! Blocks are known by their pool, not by their cache group: block 7 of a pool is one piece of
//! memory, whichever group has it.
//!
//! # Parts of one request
//! A request's blocks may come from several ranks, each with its part of every block: heads, or layers.
//! Such a transfer has one claim for all its parts, until the last of them touches nothing.
//!
//! # Cost
//! One cell of 16 bytes a block, in pages that exist only where a block was claimed, and one visit of
//! it for claiming and for letting go. Nothing is looked for by request unless there is a conflict.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::blocks::GroupBlocks;
use crate::ids::RequestId;

/// Blocks of one page.
const PAGE: usize = 4096;

/// What blocks are claimed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Purpose {
    /// The destination of a pull.
    Pull,
    /// An expectation: other engines may write.
    Expect,
    /// An offer: other engines may read.
    Offer,
    /// The source of a push.
    Push,
}

impl Purpose {
    fn writes(self) -> bool {
        matches!(self, Purpose::Pull | Purpose::Expect)
    }
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Purpose::Pull => "a pull",
            Purpose::Expect => "an expectation",
            Purpose::Offer => "an offer",
            Purpose::Push => "a push",
        })
    }
}

/// A block is wanted by one thing while it is in another that does not go with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "block {block} of cache group {group} is wanted for {purpose} of request {request}, and is in \
     {held_for} of request {held_by} until its memory is released"
)]
pub struct BlockInUse {
    /// The cache group that it is wanted in; the one that has it may be another of its pool.
    pub group: u32,
    /// The block's id.
    pub block: u32,
    /// The request that wants it.
    pub request: RequestId,
    /// What for.
    pub purpose: Purpose,
    /// The request that has it.
    pub held_by: RequestId,
    /// What for.
    pub held_for: Purpose,
}

/// Who wants blocks, and what for.
#[derive(Debug, Clone, Copy)]
pub struct Claimant<'a> {
    /// The request.
    pub request: &'a RequestId,
    /// What for.
    pub purpose: Purpose,
}

/// Whose block it is, and how many have it.
#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    /// Whether it is read; otherwise one claim alone has it.
    read: bool,
    /// Claims that have it; 0: none, whatever the rest says.
    count: u32,
    /// The list that took it last, by [`Table::lists`].
    list: u64,
}

type Page = Box<[Cell; PAGE]>;

/// A pool's cells.
type Pages = Vec<Option<Page>>;

/// A claim that stands.
#[derive(Debug)]
struct Held {
    request: RequestId,
    purpose: Purpose,
    groups: Vec<GroupBlocks>,
}

/// Values by place; places are used again.
#[derive(Debug)]
struct Slots<T> {
    all: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self {
            all: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Slots<T> {
    fn put(&mut self, value: T) -> usize {
        if let Some(at) = self.free.pop() {
            self.all[at] = Some(value);
            return at;
        }
        self.all.push(Some(value));
        self.all.len() - 1
    }

    fn get_mut(&mut self, at: usize) -> Option<&mut T> {
        self.all.get_mut(at)?.as_mut()
    }

    fn take(&mut self, at: usize) -> Option<T> {
        let value = self.all.get_mut(at)?.take()?;
        self.free.push(at);
        Some(value)
    }

    fn iter(&self) -> impl Iterator<Item = (usize, &T)> {
        let all = self.all.iter().enumerate();
        all.filter_map(|(at, value)| Some((at, value.as_ref()?)))
    }
}

#[derive(Debug, Default)]
struct Table {
    /// The pool of each cache group; none where this rank keeps nothing of it.
    pools: Vec<Option<u32>>,
    pages: HashMap<u32, Pages>,
    /// Lists of blocks that were claimed until now.
    lists: u64,
    held: Slots<Held>,
}

/// The claims on a rank's blocks. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Claims {
    table: Arc<Mutex<Table>>,
}

/// Blocks that are in something. Dropping it lets them go.
#[derive(Debug)]
pub struct Claim {
    table: Arc<Mutex<Table>>,
    at: usize,
}

impl Drop for Claim {
    fn drop(&mut self) {
        lock(&self.table).let_go(self.at);
    }
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    // Nothing in here panics half-way but for want of memory.
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Claims {
    /// No claims. `pools` names each cache group's pool, `None` where this rank keeps nothing of the
    /// group: there is no memory to be claimed then.
    #[must_use]
    pub fn new(pools: Vec<Option<u32>>) -> Self {
        let table = Table {
            pools,
            ..Table::default()
        };
        Self {
            table: Arc::new(Mutex::new(table)),
        }
    }

    /// Claims blocks, all or none. Block ids are within the placement; a group is listed once. A block
    /// that its own group's list has twice counts once.
    ///
    /// # Errors
    ///
    /// The first block that is in something else, or in two of these groups which share a pool and
    /// write.
    pub fn claim(&self, who: Claimant<'_>, groups: Vec<GroupBlocks>) -> Result<Claim, BlockInUse> {
        let at = lock(&self.table).claim(who, groups)?;
        let table = Arc::clone(&self.table);
        Ok(Claim { table, at })
    }

    /// Claims that stand.
    #[must_use]
    pub fn len(&self) -> usize {
        lock(&self.table).held.iter().count()
    }

    /// Whether no claim stands.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A claim that is being made.
struct Making {
    at: usize,
    writes: bool,
}

impl Table {
    fn claim(&mut self, who: Claimant<'_>, groups: Vec<GroupBlocks>) -> Result<usize, BlockInUse> {
        let at = self.held.put(Held {
            request: who.request.clone(),
            purpose: who.purpose,
            groups: Vec::with_capacity(groups.len()),
        });
        let making = Making {
            at,
            writes: who.purpose.writes(),
        };
        for group in groups {
            let number = group.group;
            if let Err(block) = self.take(&making, group) {
                let refusal = self.refusal(at, who, number, block);
                self.let_go(at);
                return Err(refusal);
            }
        }
        Ok(at)
    }

    /// Takes one group's blocks, up to the first that cannot be had, which is the error.
    fn take(&mut self, making: &Making, group: GroupBlocks) -> Result<(), u32> {
        let Some(pool) = self.pool(group.group) else {
            return Ok(());
        };
        self.lists += 1;
        let list = self.lists;
        let mut pages = self.pages.remove(&pool).unwrap_or_default();
        let mut refused = None;
        let mut blocks = group.blocks;
        blocks.retain(|&block| {
            if refused.is_some() {
                return false;
            }
            let cell = cell(&mut pages, block);
            if cell.count > 0 {
                if cell.list == list {
                    return false;
                }
                // Also of another of its own groups, where that writes it.
                if making.writes || !cell.read {
                    refused = Some(block);
                    return false;
                }
            }
            cell.read = !making.writes;
            cell.count += 1;
            cell.list = list;
            true
        });
        self.pages.insert(pool, pages);
        if let Some(held) = self.held.get_mut(making.at) {
            let group = group.group;
            held.groups.push(GroupBlocks { group, blocks });
        }
        refused.map_or(Ok(()), Err)
    }

    /// Who has the block that a claim cannot have.
    fn refusal(&self, at: usize, who: Claimant<'_>, group: u32, block: u32) -> BlockInUse {
        let pool = self.pool(group);
        let has = |held: &&Held| {
            let mut lists = held.groups.iter().filter(|g| self.pool(g.group) == pool);
            lists.any(|g| g.blocks.contains(&block))
        };
        let others = self.held.iter().filter(|(other, _)| *other != at);
        let holder = others.map(|(_, held)| held).find(has);
        // None: another of its own groups.
        let holder = holder.map(|held| (held.request.clone(), held.purpose));
        let (held_by, held_for) = holder.unwrap_or((who.request.clone(), who.purpose));
        BlockInUse {
            group,
            block,
            request: who.request.clone(),
            purpose: who.purpose,
            held_by,
            held_for,
        }
    }

    fn let_go(&mut self, at: usize) {
        let Some(held) = self.held.take(at) else {
            return;
        };
        for group in &held.groups {
            let pages = self
                .pool(group.group)
                .and_then(|pool| self.pages.get_mut(&pool));
            if let Some(pages) = pages {
                for &block in &group.blocks {
                    cell(pages, block).count -= 1;
                }
            }
        }
    }

    fn pool(&self, group: u32) -> Option<u32> {
        let at = usize::try_from(group).ok()?;
        self.pools.get(at).copied().flatten()
    }
}

/// A block's cell, whose page comes into being.
#[inline]
fn cell(pages: &mut Pages, block: u32) -> &mut Cell {
    let (page, at) = (block as usize / PAGE, block as usize % PAGE);
    if pages.len() <= page {
        pages.resize_with(page + 1, || None);
    }
    &mut pages[page].get_or_insert_with(|| Box::new([Cell::default(); PAGE]))[at]
}
