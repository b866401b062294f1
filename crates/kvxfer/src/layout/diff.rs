//! What has come of a comparison.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Difference, KvFormat, Severity, Side, compare};

/// Whether the blocks of one side are of use to the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Blocks can be exchanged as they are.
    Identical,
    /// The same bytes, cut otherwise.
    Reshardable,
    /// No copy can bridge what differs.
    Incompatible,
}

impl Verdict {
    /// What these differences come to.
    #[must_use]
    pub fn of(differences: &[Difference]) -> Self {
        match differences.iter().map(|d| d.severity).min() {
            None => Self::Identical,
            Some(Severity::Reshard) => Self::Reshardable,
            Some(Severity::Incompatible) => Self::Incompatible,
        }
    }

    /// The name used in JSON and messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Identical => "identical",
            Self::Reshardable => "reshardable",
            Self::Incompatible => "incompatible",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A verdict with its reasons.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LayoutDiff {
    /// What it comes to.
    pub verdict: Verdict,
    /// What differs, the worst first.
    pub differences: Vec<Difference>,
    /// What is no difference and still ought to be known.
    pub warnings: Vec<String>,
}

impl LayoutDiff {
    /// The verdict on differences between these two formats, however they were found.
    #[must_use]
    pub fn new(producer: &KvFormat, consumer: &KvFormat, mut differences: Vec<Difference>) -> Self {
        differences.sort_by_key(|d| d.severity);
        let verdict = Verdict::of(&differences);
        let unproven = match verdict {
            Verdict::Incompatible => None,
            _ => unproven(producer, consumer),
        };
        Self {
            verdict,
            differences,
            warnings: unproven.into_iter().collect(),
        }
    }
}

/// Compares two sides as [`compare`] does, and says what it comes to.
#[must_use]
pub fn diff(producer: &Side<'_>, consumer: &Side<'_>) -> LayoutDiff {
    let differences = compare(producer, consumer);
    LayoutDiff::new(producer.format, consumer.format, differences)
}

/// What is missing for a proof that both sides serve the same weights.
fn unproven(producer: &KvFormat, consumer: &KvFormat) -> Option<String> {
    let (p, c) = (producer.model(), consumer.model());
    let both = |p: &Option<String>, c: &Option<String>| p.is_some() && c.is_some();
    let missing = match (both(&p.id, &c.id), both(&p.revision, &c.revision)) {
        (true, true) => return None,
        (true, false) => "revision",
        (false, true) => "id",
        (false, false) => "id and revision",
    };
    Some(format!(
        "nothing proves that both sides serve the same weights: name the model's {missing} on both"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{HfOptions, KvPlacement, Packing, PlacementDesc, Topology, models};

    fn format(options: &HfOptions) -> KvFormat {
        let config = models::config("llama-3.1-8b").expect("built in");
        KvFormat::from_hf_config(config, options).expect("a format")
    }

    fn placed(format: &KvFormat, rank: u32, tp: u32) -> PlacementDesc {
        let topology = Topology::tensor_parallel(format, rank, tp);
        let placed = KvPlacement::uniform(format, topology, &[4], Packing::OneMemory, 64);
        placed.expect("it fits").describe(format).expect("valid")
    }

    fn named(id: &str, revision: Option<&str>) -> HfOptions {
        HfOptions {
            model_id: Some(id.to_owned()),
            revision: revision.map(str::to_owned),
            ..HfOptions::default()
        }
    }

    #[test]
    fn the_worst_difference_decides() {
        let plain = format(&HfOptions::default());
        let other = format(&HfOptions {
            dtype: Some(crate::layout::DType::F8E4m3),
            ..HfOptions::default()
        });
        let side = |format, placement| Side { format, placement };
        let (whole, half) = (placed(&plain, 0, 1), placed(&plain, 0, 2));
        let same = diff(&side(&plain, &whole), &side(&plain, &whole));
        assert_eq!(same.verdict, Verdict::Identical);
        let cut = diff(&side(&plain, &whole), &side(&plain, &half));
        assert_eq!(cut.verdict, Verdict::Reshardable);
        let other_half = placed(&other, 0, 2);
        let both = diff(&side(&plain, &whole), &side(&other, &other_half));
        assert_eq!(both.verdict, Verdict::Incompatible);
        let worst: Vec<Severity> = both.differences.iter().map(|d| d.severity).collect();
        assert!(
            worst.is_sorted() && worst.contains(&Severity::Reshard),
            "{both:#?}"
        );
        assert_eq!(both.warnings, Vec::<String>::new(), "nothing hangs on it");
    }

    #[test]
    fn identity_is_proven_by_id_and_revision_on_both_sides() {
        let warnings = |p: &HfOptions, c: &HfOptions| {
            let (p, c) = (format(p), format(c));
            LayoutDiff::new(&p, &c, Vec::new()).warnings
        };
        let (none, id) = (HfOptions::default(), named("a/b", None));
        let whole = named("a/b", Some("1"));
        assert!(warnings(&none, &whole)[0].contains("id and revision"));
        assert!(warnings(&id, &whole)[0].contains("the model's revision on"));
        assert_eq!(warnings(&whole, &whole), Vec::<String>::new());
    }
}
