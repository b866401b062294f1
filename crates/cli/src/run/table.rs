//! Which blocks a transfer takes on either side, drawn from a seed.

use crate::random::Random;

/// A block on each side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Pair {
    /// The server's block.
    pub(crate) remote: u32,
    /// Ours.
    pub(crate) local: u32,
}

/// Pairs for `slots` transfers of `blocks` blocks that may run at once: no block is in two of them.
///
/// Nothing merges, and nothing is gathered either: no transfer has two neighbours among the server's
/// blocks. For that there must be two slots at least.
pub(crate) fn scattered(seed: u64, slots: u32, blocks: u32) -> Vec<Vec<Pair>> {
    let slots = slots.max(2);
    let mut random = Random::new(seed);
    let mut local: Vec<u32> = (0..slots * blocks).collect();
    random.shuffle(&mut local);
    let mut local = local.into_iter();
    let mut tables = vec![Vec::with_capacity(blocks as usize); slots as usize];
    let mut order: Vec<usize> = (0..slots as usize).collect();
    let mut last = None;
    for group in 0..blocks {
        random.shuffle(&mut order);
        // Where two groups of blocks meet, a transfer must not get both sides of the border.
        if order.first().copied() == last {
            order.swap(0, 1);
        }
        last = order.last().copied();
        for ((remote, slot), local) in (group * slots..).zip(&order).zip(local.by_ref()) {
            if let Some(table) = tables.get_mut(*slot) {
                table.push(Pair { remote, local });
            }
        }
    }
    for table in &mut tables {
        random.shuffle(table);
    }
    tables
}

/// Pairs as two engines have them that hand out the blocks of a pool of `slots` × `blocks` (or
/// more) in the order in which others have given them back: at random. Now and then neighbours meet,
/// and merge.
pub(crate) fn engines(seed: u64, slots: u32, blocks: u32, pool: u32) -> Vec<Vec<Pair>> {
    let mut random = Random::new(seed);
    let mut draw = || {
        let mut ids: Vec<u32> = (0..pool.max(slots * blocks)).collect();
        random.shuffle(&mut ids);
        ids
    };
    let (remote, local) = (draw(), draw());
    let pairs: Vec<Pair> = remote
        .into_iter()
        .zip(local)
        .map(|(remote, local)| Pair { remote, local })
        .collect();
    let count = slots as usize;
    let tables = pairs.chunks(blocks.max(1) as usize).take(count);
    tables.map(<[Pair]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn scattered_blocks_never_meet(seed: u64, slots in 2_u32..6, blocks in 1_u32..200) {
            let tables = scattered(seed, slots, blocks);
            prop_assert_eq!(tables.len(), slots as usize);
            let mut remotes = HashSet::new();
            let mut locals = HashSet::new();
            for table in &tables {
                prop_assert_eq!(table.len(), blocks as usize);
                let own: HashSet<u32> = table.iter().map(|p| p.remote).collect();
                prop_assert!(own.iter().all(|block| !own.contains(&(block + 1))));
                for pair in table {
                    prop_assert!(pair.remote < slots * blocks && pair.local < slots * blocks);
                    prop_assert!(remotes.insert(pair.remote) && locals.insert(pair.local));
                }
            }
            prop_assert_eq!(scattered(seed, slots, blocks), tables);
        }

        #[test]
        fn engines_blocks_are_used_once(
            seed: u64, slots in 1_u32..4, blocks in 1_u32..50, more in 0_u32..20,
        ) {
            let pool = slots * blocks + more;
            let tables = engines(seed, slots, blocks, pool);
            let all: Vec<Pair> = tables.concat();
            prop_assert_eq!(all.len(), (slots * blocks) as usize);
            let remotes: HashSet<u32> = all.iter().map(|p| p.remote).collect();
            let locals: HashSet<u32> = all.iter().map(|p| p.local).collect();
            prop_assert_eq!((remotes.len(), locals.len()), (all.len(), all.len()));
            prop_assert!(all.iter().all(|p| p.remote < pool && p.local < pool));
        }
    }

    #[test]
    fn another_seed_gives_other_pairs() {
        assert_ne!(scattered(1, 4, 100), scattered(2, 4, 100));
        assert_ne!(engines(1, 2, 100, 200), engines(2, 2, 100, 200));
    }
}
