//! A request's block pairs: which of them lie behind each other on both sides.

use std::borrow::Cow;

use crate::kernels::Pair;

/// Blocks that lie behind each other on both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) first: Pair,
    pub(super) blocks: u64,
}

/// Takes the runs of `at_least` pairs and more out of a list. What is left is in its order.
pub(super) fn runs(pairs: Cow<'_, [Pair]>, at_least: u64) -> (Vec<Run>, Cow<'_, [Pair]>) {
    let mut runs = Vec::new();
    let mut rest = Vec::new();
    // Where what has not been put into `rest` begins.
    let mut kept = 0;
    let mut start = 0;
    let follows = |a: &Pair, b: &Pair| {
        a.src.checked_add(1) == Some(b.src) && a.dst.checked_add(1) == Some(b.dst)
    };
    for (end, pair) in (1..).zip(&*pairs) {
        if pairs.get(end).is_some_and(|next| follows(pair, next)) {
            continue;
        }
        let blocks = (end - start) as u64;
        if let Some(first) = pairs.get(start).filter(|_| blocks >= at_least) {
            rest.extend_from_slice(pairs.get(kept..start).unwrap_or_default());
            let first = *first;
            runs.push(Run { first, blocks });
            kept = end;
        }
        start = end;
    }
    if runs.is_empty() {
        return (runs, pairs);
    }
    rest.extend_from_slice(pairs.get(kept..).unwrap_or_default());
    (runs, Cow::Owned(rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(of: &[(u32, u32)]) -> Vec<Pair> {
        of.iter().map(|&(src, dst)| Pair { src, dst }).collect()
    }

    #[test]
    fn long_runs_are_taken_out_and_short_ones_stay() {
        let pairs = list(&[
            (9, 1),
            (0, 5),
            (1, 6),
            (2, 7),
            (3, 9),
            (4, 10),
            (u32::MAX, 11),
            (0, 12),
        ]);
        let (found, rest) = runs(Cow::Borrowed(&pairs), 3);
        let first = Pair { src: 0, dst: 5 };
        assert_eq!(found, [Run { first, blocks: 3 }]);
        assert_eq!(
            *rest,
            list(&[(9, 1), (3, 9), (4, 10), (u32::MAX, 11), (0, 12)])
        );
        let (found, rest) = runs(Cow::Borrowed(&pairs), 4);
        assert!(found.is_empty() && matches!(rest, Cow::Borrowed(_)));
        assert_eq!(*rest, pairs);
        assert_eq!(
            runs(Cow::Borrowed(&[]), 1),
            (Vec::new(), Cow::Owned(Vec::new()))
        );
        let (found, rest) = runs(Cow::Borrowed(&pairs), 1);
        assert_eq!(found.iter().map(|run| run.blocks).sum::<u64>(), 8);
        assert!(rest.is_empty());
    }

    proptest! {
        #[test]
        fn every_pair_is_in_a_run_or_left(
            steps in prop::collection::vec((0..3_u32, 0..3_u32), 0..60), at_least in 1..6_u64,
        ) {
            let mut at = Pair { src: 0, dst: 0 };
            let pairs: Vec<Pair> = steps
                .iter()
                .map(|(src, dst)| {
                    at = Pair { src: at.src + src, dst: at.dst + dst };
                    at
                })
                .collect();
            let (found, rest) = runs(Cow::Borrowed(&pairs), at_least);
            let mut all = rest.to_vec();
            for run in &found {
                prop_assert!(run.blocks >= at_least);
                all.extend((0..run.blocks as u32).map(|i| Pair {
                    src: run.first.src + i,
                    dst: run.first.dst + i,
                }));
            }
            let key = |p: &Pair| (p.src, p.dst);
            all.sort_by_key(key);
            let mut wanted = pairs.clone();
            wanted.sort_by_key(key);
            prop_assert_eq!(all, wanted);
        }
    }
}
