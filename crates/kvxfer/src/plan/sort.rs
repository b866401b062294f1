//! Sorting a request's pairs.

/// Lists shorter than this are not worth the counting.
const SHORT: usize = 128;

/// Sorts pairs by remote block (their high half); equal ones stay in the order they came in, or
/// are sorted by local block. A radix sort a byte at a time: block ids are small numbers, so two
/// or three passes do what comparisons need ten levels for.
pub(super) fn by_remote(pairs: &mut [u64]) {
    if pairs.len() < SHORT {
        pairs.sort_unstable();
        return;
    }
    if pairs.is_sorted() {
        return;
    }
    let most = pairs.iter().copied().max().unwrap_or(0);
    let mut from = pairs.to_vec();
    let mut to = vec![0_u64; pairs.len()];
    let mut shift = 32;
    while shift < u64::BITS && most >> shift != 0 {
        let digit = |pair: u64| usize::from(((pair >> shift) & 0xff) as u8);
        let mut next = [0_usize; 256];
        for pair in &from {
            next[digit(*pair)] += 1;
        }
        let mut before = 0;
        for slot in &mut next {
            before += std::mem::replace(slot, before);
        }
        for pair in &from {
            let slot = &mut next[digit(*pair)];
            to[*slot] = *pair;
            *slot += 1;
        }
        std::mem::swap(&mut from, &mut to);
        shift += 8;
    }
    pairs.copy_from_slice(&from);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn sorts_like_a_sort(
            mut ids in prop::collection::vec(any::<u32>(), 0..600),
            bits in 0_u32..32,
        ) {
            for id in &mut ids {
                *id >>= bits;
            }
            let mut pairs: Vec<u64> = (0_u64..).zip(&ids).map(|(i, id)| u64::from(*id) << 32 | i).collect();
            let mut wanted = pairs.clone();
            wanted.sort_unstable();
            by_remote(&mut pairs);
            prop_assert_eq!(pairs, wanted);
        }
    }
}
