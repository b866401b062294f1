//! Medians and percentiles of what was measured.

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
