//! One index in several digits, as axes split it: taking ranges of it, and what two splits have in
//! common.

/// A digit: how many steps, and the bytes of one. The most significant digit comes first.
pub(crate) type Digit = (u64, u64);

/// The part `first..first + count` of an index, as bytes from its beginning and the digits that are
/// left. `None` where that part is no regular array, or is not within the index.
pub(crate) fn select(digits: &[Digit], first: u64, count: u64) -> Option<(u64, Vec<Digit>)> {
    let Some((&(extent, stride), inner)) = digits.split_first() else {
        return (first == 0 && count == 1).then(|| (0, Vec::new()));
    };
    let below = inner.iter().try_fold(1_u64, |n, d| n.checked_mul(d.0))?;
    let end = first.checked_add(count)?;
    if count == 0 || below == 0 || end > extent.checked_mul(below)? {
        return None;
    }
    if first.is_multiple_of(below) && count.is_multiple_of(below) {
        let mut out = vec![(count / below, stride)];
        out.extend(inner);
        return Some((stride.checked_mul(first / below)?, out));
    }
    // Within one step of the first digit, or not at all.
    let step = first / below;
    if step != (end - 1) / below {
        return None;
    }
    let (offset, out) = select(inner, first % below, count)?;
    Some((stride.checked_mul(step)?.checked_add(offset)?, out))
}

/// Cuts an index into runs of `run`: the digits that count the runs, and those within one. `None`
/// where the digits do not come out even.
pub(crate) fn split_off(digits: &[Digit], run: u64) -> Option<(Vec<Digit>, Vec<Digit>)> {
    let mut outer = digits.to_vec();
    let mut inner = Vec::new();
    let mut left = run;
    while left > 1 {
        let (extent, stride) = outer.pop()?;
        if extent == 0 {
            return None;
        }
        if left.is_multiple_of(extent) {
            inner.push((extent, stride));
            left /= extent;
        } else if extent.is_multiple_of(left) {
            inner.push((left, stride));
            outer.push((extent / left, stride.checked_mul(left)?));
            left = 1;
        } else {
            return None;
        }
    }
    inner.reverse();
    Some((outer, inner))
}

/// Digits as one, where each goes on where the one behind it ends: how many steps, and the bytes of
/// one (0 where there is only one).
pub(crate) fn joined(digits: &[Digit]) -> Option<Digit> {
    let mut whole: Option<Digit> = None;
    for &(extent, stride) in digits.iter().rev().filter(|d| d.0 > 1) {
        whole = Some(match whole {
            None => (extent, stride),
            Some((steps, step)) if steps.checked_mul(step)? == stride => {
                (steps.checked_mul(extent)?, step)
            }
            Some(_) => return None,
        });
    }
    Some(whole.unwrap_or((1, 0)))
}

/// One part of an index that both sides can address with one stride each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CommonPart {
    /// Steps.
    pub(crate) extent: u64,
    /// Bytes of a step on the first side.
    pub(crate) a: u64,
    /// Bytes of a step on the second side.
    pub(crate) b: u64,
}

/// The coarsest common split of one kind of axis that two sides split differently. Each side gives
/// its parts outermost first as (extent, stride). `None` where the extents do not nest, or where
/// their products differ.
pub(crate) fn common_split(a: &[(u64, u64)], b: &[(u64, u64)]) -> Option<Vec<CommonPart>> {
    let mut out = Vec::with_capacity(a.len().max(b.len()));
    let mut a_parts = a.iter().rev().copied();
    let mut b_parts = b.iter().rev().copied();
    let (mut left_a, mut left_b) = (a_parts.next(), b_parts.next());
    loop {
        // A part of one step adds nothing.
        if let Some((1, _)) = left_a {
            left_a = a_parts.next();
            continue;
        }
        if let Some((1, _)) = left_b {
            left_b = b_parts.next();
            continue;
        }
        let ((ea, sa), (eb, sb)) = match (left_a, left_b) {
            (None, None) => break,
            (Some(a), Some(b)) => (a, b),
            _ => return None,
        };
        let step = ea.min(eb);
        if step == 0 || ea % step != 0 || eb % step != 0 {
            return None;
        }
        out.push(CommonPart {
            extent: step,
            a: sa,
            b: sb,
        });
        left_a = Some((ea / step, sa.checked_mul(step)?));
        left_b = Some((eb / step, sb.checked_mul(step)?));
    }
    out.reverse();
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(extent: u64, a: u64, b: u64) -> CommonPart {
        CommonPart { extent, a, b }
    }

    #[test]
    fn a_split_refines_a_whole_axis() {
        // 128 elements of 2 bytes against 16 vectors of 8.
        assert_eq!(
            common_split(&[(128, 2)], &[(16, 256), (8, 2)]),
            Some(vec![part(16, 16, 256), part(8, 2, 2)])
        );
    }

    #[test]
    fn two_splits_meet_in_the_finer_one() {
        assert_eq!(
            common_split(&[(8, 100), (16, 2)], &[(16, 50), (8, 2)]),
            Some(vec![part(8, 100, 100), part(2, 16, 50), part(8, 2, 2)])
        );
    }

    #[test]
    fn extents_that_do_not_nest_are_refused() {
        assert_eq!(common_split(&[(4, 12), (6, 2)], &[(6, 8), (4, 2)]), None);
        assert_eq!(common_split(&[(8, 2)], &[(16, 2)]), None);
    }

    #[test]
    fn parts_of_a_split_index() {
        // 4 × 16 tokens: kernel blocks 3 and 4, half of one, and what lies across two.
        let digits = [(4, 1000), (16, 10)];
        let part = |first, count| select(&digits, first, count);
        assert_eq!(part(32, 32), Some((2000, vec![(2, 1000), (16, 10)])));
        assert_eq!(part(24, 8), Some((1080, vec![(8, 10)])));
        assert_eq!(part(8, 16), None);
        assert_eq!(part(0, 65), None);
        assert_eq!(part(u64::MAX, 2), None);
        assert_eq!(select(&[], 0, 1), Some((0, vec![])));
        assert_eq!(select(&[], 1, 1), None);
    }

    #[test]
    fn an_index_in_runs() {
        let digits = [(4, 1000), (16, 10)];
        let runs = |run| split_off(&digits, run);
        assert_eq!(runs(16), Some((vec![(4, 1000)], vec![(16, 10)])));
        assert_eq!(
            runs(8),
            Some((vec![(4, 1000), (2, 80)], vec![(8, 10)])),
            "half a digit"
        );
        assert_eq!(runs(32), Some((vec![(2, 2000)], vec![(2, 1000), (16, 10)])));
        assert_eq!(runs(64), Some((vec![], digits.to_vec())));
        assert_eq!(runs(12), None);
        assert_eq!(runs(128), None);
        assert_eq!(joined(&[(4, 1000), (2, 80)]), None);
        assert_eq!(joined(&[(4, 160), (1, 7), (2, 80)]), Some((8, 80)));
        assert_eq!(joined(&[(1, 5)]), Some((1, 0)));
    }
}
