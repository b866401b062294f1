//! Differences as they are found and told.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// How bad a difference is; the worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Severity {
    /// No copy can bridge it.
    Incompatible,
    /// The same bytes, cut otherwise.
    Reshard,
}

/// One field in which two sides differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// Which field: `groups[0].block_tokens`, `groups[0].layers[0-79].k.dtype`.
    pub field: String,
    /// The producer's value.
    pub producer: String,
    /// The consumer's value.
    pub consumer: String,
    /// Why it matters.
    pub why: String,
    /// What the operator can do.
    pub fix: String,
    /// How bad it is.
    pub severity: Severity,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: producer {}, consumer {} ({}; {})",
            self.field, self.producer, self.consumer, self.why, self.fix
        )
    }
}

/// Every difference that keeps two sides from exchanging blocks, the worst first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayoutMismatch {
    /// The differences; never empty.
    pub differences: Vec<Difference>,
}

impl fmt::Display for LayoutMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("layouts differ: ")?;
        for (i, difference) in self.differences.iter().enumerate() {
            if i > 0 {
                f.write_str("; ")?;
            }
            difference.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for LayoutMismatch {}

/// Why a field matters and what to do about it.
#[derive(Clone, Copy)]
pub(super) struct Note {
    pub(super) severity: Severity,
    pub(super) why: &'static str,
    pub(super) fix: &'static str,
}

/// Differences as they are found. The same one in many layers becomes one.
#[derive(Default)]
pub(super) struct Found {
    pub(super) list: Vec<Difference>,
    by_layer: BTreeMap<LayerKey, (Vec<u32>, Note)>,
}

/// Group, tensor (empty: the layer itself), field, producer's value, consumer's value.
type LayerKey = (u32, String, &'static str, String, String);

impl Found {
    pub(super) fn push(
        &mut self,
        field: impl Into<String>,
        producer: impl fmt::Display,
        consumer: impl fmt::Display,
        note: Note,
    ) {
        self.list.push(Difference {
            field: field.into(),
            producer: producer.to_string(),
            consumer: consumer.to_string(),
            why: note.why.into(),
            fix: note.fix.into(),
            severity: note.severity,
        });
    }

    pub(super) fn layer(
        &mut self,
        at: At<'_>,
        field: &'static str,
        values: (String, String),
        note: Note,
    ) {
        let key = (at.group, at.tensor.to_owned(), field, values.0, values.1);
        let entry = self.by_layer.entry(key);
        entry.or_insert((Vec::new(), note)).0.push(at.layer);
    }

    /// Whether something was found that no copy can bridge.
    pub(super) fn is_incompatible(&self) -> bool {
        let of_layers = self.by_layer.values().map(|(_, note)| note.severity);
        let all = self.list.iter().map(|d| d.severity).chain(of_layers);
        all.min() == Some(Severity::Incompatible)
    }

    pub(super) fn finish(mut self) -> Vec<Difference> {
        for ((group, tensor, field, producer, consumer), (layers, note)) in
            std::mem::take(&mut self.by_layer)
        {
            let mut path = format!("groups[{group}].layers[{}]", ranges(&layers));
            for part in [tensor.as_str(), field] {
                if !part.is_empty() {
                    path.push('.');
                    path.push_str(part);
                }
            }
            self.push(path, producer, consumer, note);
        }
        self.list.sort_by_key(|d| d.severity);
        self.list
    }
}

/// Where a difference in a layer is.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    pub(super) group: u32,
    pub(super) layer: u32,
    pub(super) tensor: &'a str,
}

/// `0-3,7` of rising numbers.
pub(crate) fn ranges(numbers: &[u32]) -> String {
    let mut out = String::new();
    let mut rest = numbers;
    while let Some(&first) = rest.first() {
        let mut len = 1;
        while rest
            .get(len)
            .is_some_and(|n| Some(*n) == u32::try_from(len).ok().and_then(|l| first.checked_add(l)))
        {
            len += 1;
        }
        if !out.is_empty() {
            out.push(',');
        }
        out.push_str(&first.to_string());
        if let (true, Some(last)) = (len > 1, rest.get(len - 1)) {
            out.push('-');
            out.push_str(&last.to_string());
        }
        rest = rest.get(len..).unwrap_or(&[]);
    }
    out
}
