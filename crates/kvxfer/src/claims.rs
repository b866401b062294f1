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
//! A rank may get one request's blocks from several ranks of one engine, each its part of every
//! block: heads, or layers. Such pulls are of one *family*: the same request, from the same engine.
//! Members from different ranks share blocks, as long as none of them has failed; a second pull from
//! the same rank does not, for it would write the same bytes.
//!
//! # Cost
//! One cell of 16 bytes a block, in pages that exist only where a block was claimed, and one visit of
//! it for claiming and for letting go. Nothing is looked for by request unless there is a conflict or
//! a family of several.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::block_set::BlockSet;
use crate::blocks::GroupBlocks;
use crate::event::PeerName;
use crate::ids::{EngineId, RequestId};

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
    /// The rank that a pull reads from.
    pub from: Option<&'a PeerName>,
}

/// Whose block it is, and how many have it.
#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    /// [`READ`], or a family's place in the table plus one.
    held: u32,
    /// Claims that have it; 0: none, whatever the rest says.
    count: u32,
    /// The list that took it last, by [`Table::lists`].
    list: u64,
}

/// What is read shares its blocks, whoever reads.
const READ: u32 = 0;

type Page = Box<[Cell; PAGE]>;

/// A pool's cells.
type Pages = Vec<Option<Page>>;

/// The claims that may share the blocks they write.
#[derive(Debug, Default)]
struct Family {
    /// In `Table::held`.
    members: Vec<usize>,
    /// Its key in `Table::families_of`.
    key: Option<(RequestId, EngineId)>,
}

/// A claim that stands.
#[derive(Debug)]
struct Held {
    request: RequestId,
    purpose: Purpose,
    from: Option<PeerName>,
    /// Its cells' `held`.
    family: u32,
    groups: Vec<GroupBlocks>,
    /// Its transfer has failed, and what was posted may still land.
    failed: bool,
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

    fn get(&self, at: usize) -> Option<&T> {
        self.all.get(at)?.as_ref()
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
    families: Slots<Family>,
    families_of: HashMap<(RequestId, EngineId), usize>,
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

impl Claim {
    /// What it was for has failed, and what was posted may still touch the blocks: nobody joins it any
    /// more.
    pub fn failed(&self) {
        if let Some(held) = lock(&self.table).held.get_mut(self.at) {
            held.failed = true;
        }
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

/// The others of a family, as one that joins it finds them.
#[derive(Debug, Default)]
struct Kin {
    /// Whether one of them has failed.
    failed: bool,
    /// What those that read from the same rank have, by pool.
    same_rank: BlockSet,
}

/// A claim that is being made.
struct Making {
    at: usize,
    family: u32,
    /// Its first list.
    first: u64,
    kin: Option<Kin>,
}

impl Table {
    fn claim(&mut self, who: Claimant<'_>, groups: Vec<GroupBlocks>) -> Result<usize, BlockInUse> {
        let family = self.family(who);
        let at = self.held.put(Held {
            request: who.request.clone(),
            purpose: who.purpose,
            from: who.from.cloned(),
            family,
            groups: Vec::with_capacity(groups.len()),
            failed: false,
        });
        if let Some(family) = place(family).and_then(|at| self.families.get_mut(at)) {
            family.members.push(at);
        }
        let mut making = Making {
            at,
            family,
            first: self.lists + 1,
            kin: None,
        };
        for group in groups {
            let number = group.group;
            if let Err(block) = self.take(&mut making, group) {
                let refusal = self.refusal(at, who, number, block);
                self.let_go(at);
                return Err(refusal);
            }
        }
        Ok(at)
    }

    /// The family that a claim belongs to, as cells name it.
    fn family(&mut self, who: Claimant<'_>) -> u32 {
        if !who.purpose.writes() {
            return READ;
        }
        let key = who
            .from
            .map(|from| (who.request.clone(), from.engine.clone()));
        let known = key.as_ref().and_then(|key| self.families_of.get(key));
        let at = known.copied().unwrap_or_else(|| {
            let at = self.families.put(Family {
                members: Vec::new(),
                key: key.clone(),
            });
            if let Some(key) = key {
                self.families_of.insert(key, at);
            }
            at
        });
        // Each family has a claim that stands: there is no memory for so many.
        u32::try_from(at + 1).expect("fewer than 2^32 claims stand")
    }

    /// Takes one group's blocks, up to the first that cannot be had, which is the error.
    fn take(&mut self, making: &mut Making, group: GroupBlocks) -> Result<(), u32> {
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
                if !self.joins(making, cell, pool, block) {
                    refused = Some(block);
                    return false;
                }
            }
            cell.held = making.family;
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

    /// Whether a claim may have a block beside those that have it.
    fn joins(&self, making: &mut Making, cell: &Cell, pool: u32, block: u32) -> bool {
        if cell.held != making.family {
            return false;
        }
        if making.family == READ {
            return true;
        }
        if cell.list >= making.first {
            // Another of its own groups writes it.
            return false;
        }
        let (at, family) = (making.at, making.family);
        let kin = making.kin.get_or_insert_with(|| self.kin(at, family));
        !kin.failed && !kin.same_rank.contains(pool, block)
    }

    /// The family that a new claim finds.
    fn kin(&self, new: usize, family: u32) -> Kin {
        let mut kin = Kin::default();
        let rank = |at| self.held.get(at)?.from.as_ref().map(|from| from.rank);
        let family = place(family).and_then(|at| self.families.get(at));
        let others = family.into_iter().flat_map(|family| &family.members);
        for &other in others.filter(|other| **other != new) {
            let Some(held) = self.held.get(other) else {
                continue;
            };
            kin.failed |= held.failed;
            if rank(other) != rank(new) {
                continue;
            }
            for group in &held.groups {
                if let Some(pool) = self.pool(group.group) {
                    // No two of one rank have a block in common.
                    let _ = kin.same_rank.insert_all(pool, &group.blocks);
                }
            }
        }
        kin
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
        let Some(place) = place(held.family) else {
            return;
        };
        if let Some(family) = self.families.get_mut(place) {
            family.members.retain(|member| *member != at);
            if family.members.is_empty()
                && let Some(Family { key: Some(key), .. }) = self.families.take(place)
            {
                self.families_of.remove(&key);
            }
        }
    }

    fn pool(&self, group: u32) -> Option<u32> {
        let at = usize::try_from(group).ok()?;
        self.pools.get(at).copied().flatten()
    }
}

/// A family's place in the table.
fn place(family: u32) -> Option<usize> {
    family.checked_sub(1)?.try_into().ok()
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
