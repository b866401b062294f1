//! What is kept of all that was measured, and its medians and percentiles.

use crate::random::Random;

/// So many samples are kept at most: enough for a 99.9th percentile of them, and little memory
/// however long a test runs.
pub(crate) const KEPT: usize = 65_536;

/// Samples as they come. Of more than [`KEPT`] each is as likely to be kept as any other, so that
/// all of the test counts alike. (Every n-th would not do: transfers of a row take turns, and only
/// some turns would count.)
#[derive(Debug, Clone)]
pub(crate) struct Kept<T> {
    samples: Vec<T>,
    seen: u64,
    random: Random,
}

// Derived, it would ask it of T.
impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self {
            samples: Vec::new(),
            seen: 0,
            random: Random::default(),
        }
    }
}

impl<T> Kept<T> {
    pub(crate) fn add(&mut self, sample: T) {
        self.seen += 1;
        if self.samples.len() < KEPT {
            self.samples.push(sample);
            return;
        }
        // Vitter's algorithm R: the n-th is kept with the probability KEPT / n.
        let at = self.random.below(self.seen);
        let place = usize::try_from(at)
            .ok()
            .and_then(|at| self.samples.get_mut(at));
        if let Some(place) = place {
            *place = sample;
        }
    }

    /// How many there were, kept or not.
    pub(crate) fn seen(&self) -> u64 {
        self.seen
    }

    /// Those that are kept, in no order.
    pub(crate) fn samples(&self) -> &[T] {
        &self.samples
    }
}

/// A row has a 99.9th percentile only from this many samples on: below, it would be the maximum
/// under another name.
pub(crate) const SAMPLES_FOR_P999: usize = 1000;

/// The middle value; of two middle values their mean. `None` of nothing; values that are no numbers are left out.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut values: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    if values.len() % 2 == 1 {
        return Some(upper);
    }
    let lower = *values.get(values.len() / 2 - 1)?;
    Some(lower + (upper - lower) / 2.0)
}

/// The smallest sample that at least `per_mille` / 1000 of the samples do not exceed (nearest rank). The
/// samples must be sorted.
pub(crate) fn percentile(sorted: &[u64], per_mille: usize) -> Option<u64> {
    let rank = (sorted.len() * per_mille.min(1000)).div_ceil(1000).max(1);
    sorted.get(rank - 1).copied()
}

/// Percentiles of a set of latencies, in the samples' unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Percentiles {
    pub(crate) p50: u64,
    pub(crate) p99: u64,
    /// `None` under [`SAMPLES_FOR_P999`] samples.
    pub(crate) p999: Option<u64>,
}

impl Percentiles {
    /// `None` of no samples.
    pub(crate) fn of(samples: &[u64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable();
        let enough = sorted.len() >= SAMPLES_FOR_P999;
        Some(Self {
            p50: percentile(&sorted, 500)?,
            p99: percentile(&sorted, 990)?,
            p999: enough.then(|| percentile(&sorted, 999)).flatten(),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_kept_is_bounded_and_stands_for_all() {
        let mut kept = Kept::default();
        let few = KEPT as u64;
        for n in 1..=few {
            kept.add(n);
        }
        assert!(kept.samples().iter().copied().eq(1..=few));

        let all = 8 * few;
        for n in few + 1..=all {
            kept.add(n);
        }
        assert_eq!((kept.seen(), kept.samples().len()), (all, KEPT));
        let mut sorted = kept.samples().to_vec();
        sorted.sort_unstable();
        assert!(
            sorted.windows(2).all(|pair| pair[0] < pair[1]),
            "kept twice"
        );
        // Neither the first nor the last are favoured: standard errors are 0.2 % and 0.04 %.
        let share = |per_mille| percentile(&sorted, per_mille).unwrap_or(0) as f64 / all as f64;
        assert!((share(500) - 0.5).abs() < 0.01, "{}", share(500));
        assert!((share(990) - 0.99).abs() < 0.002, "{}", share(990));
        // Four that take turns have a quarter each.
        let turns = sorted.iter().filter(|n| *n % 4 == 0).count() as f64;
        assert!((turns / KEPT as f64 - 0.25).abs() < 0.01, "{turns}");
    }

    #[test]
    fn known_values() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[f64::NAN]), None);
        assert_eq!(median(&[3.0, 1.0, f64::INFINITY, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        let samples: Vec<u64> = (1..=1000).rev().collect();
        let p = Percentiles {
            p50: 500,
            p99: 990,
            p999: Some(999),
        };
        assert_eq!(Percentiles::of(&samples), Some(p));
        let p = Percentiles {
            p50: 500,
            p99: 990,
            p999: None,
        };
        assert_eq!(Percentiles::of(&samples[1..]), Some(p));
        let one = Percentiles {
            p50: 7,
            p99: 7,
            p999: None,
        };
        assert_eq!(Percentiles::of(&[7]), Some(one));
        assert_eq!(Percentiles::of(&[]), None);
    }

    proptest! {
        #[test]
        fn a_percentile_has_its_share_below(
            mut samples in prop::collection::vec(0_u64..50, 1..200),
            per_mille in 1_usize..=1000,
        ) {
            samples.sort_unstable();
            let value = percentile(&samples, per_mille).unwrap_or(u64::MAX);
            let not_above = samples.iter().filter(|s| **s <= value).count();
            let below = samples.iter().filter(|s| **s < value).count();
            prop_assert!(not_above * 1000 >= samples.len() * per_mille);
            prop_assert!(below * 1000 < samples.len() * per_mille);
        }

        #[test]
        fn half_lie_on_each_side_of_a_median(values in prop::collection::vec(-1e6..1e6, 1..99)) {
            let median = median(&values).unwrap_or(f64::NAN);
            let below = values.iter().filter(|v| **v < median).count();
            let above = values.iter().filter(|v| **v > median).count();
            prop_assert!(below * 2 <= values.len() && above * 2 <= values.len());
        }
    }
}
