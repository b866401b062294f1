//! An engine's blocks, and who may touch which.

use super::rng::Rng;

/// Cells of a block: two layers of two.
pub(crate) const BLOCK_CELLS: u32 = 4;
/// Cells of a block that one layer has.
pub(crate) const LAYER_CELLS: u32 = 2;
/// Layers of a block.
pub(crate) const LAYERS: u32 = BLOCK_CELLS / LAYER_CELLS;

/// Whom a block belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The engine: it may be given to anything, and its content changes at once.
    Free,
    /// An offer, by its nonce: others may read.
    Offer(u64),
    /// A running pull, by its transfer: this engine's lanes write.
    Pull(u64),
    /// A running push, by its transfer: peers read.
    Push(u64),
    /// An expectation, by its nonce: bound producers write.
    Expect(u64),
}

/// Blocks that one request takes at most, of one engine.
pub(crate) const MOST: usize = 6;

/// The blocks of one life of an engine.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) cells: Vec<u64>,
    pub(crate) owners: Vec<Owner>,
}

impl Memory {
    pub(crate) fn new(blocks: u32, fresh: &mut u64) -> Self {
        let mut memory = Self {
            cells: vec![0; (blocks * BLOCK_CELLS) as usize],
            owners: vec![Owner::Free; blocks as usize],
        };
        for block in 0..blocks {
            memory.scribble(block, fresh);
        }
        memory
    }

    /// New content, which nothing had before.
    fn scribble(&mut self, block: u32, fresh: &mut u64) {
        for cell in &mut self.cells[range(block)] {
            *fresh += 1;
            *cell = *fresh;
        }
    }

    /// Takes free blocks for an owner, if `leave` stay free.
    pub(crate) fn take(
        &mut self,
        rng: &mut Rng,
        n: usize,
        leave: usize,
        owner: Owner,
        fresh: &mut u64,
    ) -> Option<Vec<u32>> {
        let mut free: Vec<u32> = (0..self.owners.len() as u32)
            .filter(|b| self.owners[*b as usize] == Owner::Free)
            .collect();
        if free.len() < n + leave {
            return None;
        }
        let mut taken = Vec::with_capacity(n);
        for _ in 0..n {
            let block = free.swap_remove(rng.index(free.len()));
            self.owners[block as usize] = owner;
            // A new request's content, as an engine would compute it.
            self.scribble(block, fresh);
            taken.push(block);
        }
        Some(taken)
    }

    /// Gives blocks back: they are used for something else at once.
    pub(crate) fn free(&mut self, blocks: &[u32], fresh: &mut u64) {
        for block in blocks {
            self.owners[*block as usize] = Owner::Free;
            self.scribble(*block, fresh);
        }
    }

    pub(crate) fn read(&self, cell: u32, len: u32) -> [u64; BLOCK_CELLS as usize] {
        let mut out = [0; BLOCK_CELLS as usize];
        let cells = &self.cells[cell as usize..(cell + len) as usize];
        out[..cells.len()].copy_from_slice(cells);
        out
    }

    pub(crate) fn owner(&self, cell: u32) -> Owner {
        self.owners[(cell / BLOCK_CELLS) as usize]
    }
}

fn range(block: u32) -> std::ops::Range<usize> {
    let from = (block * BLOCK_CELLS) as usize;
    from..from + BLOCK_CELLS as usize
}
