//! What differs between two sides.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{AxisKind, KvFormat, PlacedTensor, PlacementDesc, Scaling, TensorFormat, common_split};

/// One side of a transfer: its format and where it keeps its part.
#[derive(Debug, Clone, Copy)]
pub struct Side<'a> {
    /// The format.
    pub format: &'a KvFormat,
    /// The placement, already validated against the format or about to be.
    pub placement: &'a PlacementDesc,
}

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

/// Compares two sides field by field. Empty: their blocks can be exchanged as they are. Bases,
/// numbers of blocks, strides and the order of axes may differ.
#[must_use]
pub fn compare(producer: &Side<'_>, consumer: &Side<'_>) -> Vec<Difference> {
    let mut found = Found::default();
    identity(producer.format, consumer.format, &mut found);
    formats(producer.format, consumer.format, &mut found);
    placements(producer, consumer, &mut found);
    found.finish()
}

/// Why a field matters and what to do about it.
#[derive(Clone, Copy)]
struct Note {
    severity: Severity,
    why: &'static str,
    fix: &'static str,
}

const OTHER_MODEL: Note = Note {
    severity: Severity::Incompatible,
    why: "another model's cache means nothing here",
    fix: "serve the same model and revision on both sides",
};
const GROUPS: Note = Note {
    severity: Severity::Incompatible,
    why: "block tables are exchanged group by group",
    fix: "use the same engine version and the same cache configuration on both sides",
};
const BLOCK_TOKENS: Note = Note {
    severity: Severity::Reshard,
    why: "a block of one side is not a block of the other",
    fix: "start both sides with the same block size",
};
const LAYERS: Note = Note {
    severity: Severity::Incompatible,
    why: "layers on one side only have nothing to be copied from or to",
    fix: "use the same model, and the same speculative decoding, on both sides",
};
const TENSORS: Note = Note {
    severity: Severity::Reshard,
    why: "tensors are matched by name",
    fix: "use the same attention backend on both sides",
};
const DTYPE: Note = Note {
    severity: Severity::Incompatible,
    why: "a copy does not convert",
    fix: "start both sides with the same cache dtype",
};
const SCALING: Note = Note {
    severity: Severity::Incompatible,
    why: "the same numbers would stand for other values",
    fix: "use the same cache scales on both sides: the same checkpoint, and the same calibration",
};
const EXTENT: Note = Note {
    severity: Severity::Incompatible,
    why: "the tensors hold different things",
    fix: "use the same model on both sides",
};
const AXES: Note = Note {
    severity: Severity::Incompatible,
    why: "the two ways to split this axis have no common part",
    fix: "use the same attention backend on both sides",
};
const SHARD: Note = Note {
    severity: Severity::Reshard,
    why: "the two ranks keep different parts",
    fix: "use the same tensor-parallel size on both sides and pair equal ranks",
};
const WINDOW: Note = Note {
    severity: Severity::Reshard,
    why: "the two ranks keep different layers",
    fix: "use the same pipeline-parallel size on both sides and pair equal ranks",
};

/// Differences as they are found. The same one in many layers becomes one.
#[derive(Default)]
struct Found {
    list: Vec<Difference>,
    by_layer: BTreeMap<LayerKey, (Vec<u32>, Note)>,
}

/// Group, tensor (empty: the layer itself), field, producer's value, consumer's value.
type LayerKey = (u32, String, &'static str, String, String);

impl Found {
    fn push(
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

    fn layer(&mut self, at: At<'_>, field: &'static str, values: (String, String), note: Note) {
        let key = (at.group, at.tensor.to_owned(), field, values.0, values.1);
        let entry = self.by_layer.entry(key);
        entry.or_insert((Vec::new(), note)).0.push(at.layer);
    }

    fn finish(mut self) -> Vec<Difference> {
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
struct At<'a> {
    group: u32,
    layer: u32,
    tensor: &'a str,
}

/// `0-3,7` of rising numbers.
fn ranges(numbers: &[u32]) -> String {
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

fn identity(p: &KvFormat, c: &KvFormat, found: &mut Found) {
    let (p, c) = (p.model(), c.model());
    if p.model_type != c.model_type {
        found.push(
            "model.model_type",
            &p.model_type,
            &c.model_type,
            OTHER_MODEL,
        );
    }
    let optional = [
        ("model.id", &p.id, &c.id),
        ("model.revision", &p.revision, &c.revision),
    ];
    for (field, p, c) in optional {
        if let (Some(p), Some(c)) = (p, c)
            && p != c
        {
            found.push(field, p, c, OTHER_MODEL);
        }
    }
    for (key, p) in &p.facts {
        if let Some(c) = c.facts.get(key)
            && p != c
        {
            found.push(format!("model.{key}"), p, c, OTHER_MODEL);
        }
    }
}

fn formats(p: &KvFormat, c: &KvFormat, found: &mut Found) {
    if p.groups().len() != c.groups().len() {
        let names = |f: &KvFormat| {
            let names: Vec<&str> = f.groups().iter().map(|g| g.name.as_str()).collect();
            format!("{} ({})", names.len(), names.join(", "))
        };
        found.push("groups", names(p), names(c), GROUPS);
    }
    for (g, (pg, cg)) in (0_u32..).zip(p.groups().iter().zip(c.groups())) {
        if pg.name != cg.name {
            found.push(format!("groups[{g}].name"), &pg.name, &cg.name, GROUPS);
        }
        if pg.kind != cg.kind {
            found.push(format!("groups[{g}].kind"), pg.kind, cg.kind, GROUPS);
        }
        if pg.block_tokens != cg.block_tokens {
            let field = format!("groups[{g}].block_tokens");
            found.push(field, pg.block_tokens, cg.block_tokens, BLOCK_TOKENS);
            if let (Some(last), true) = (found.list.last_mut(), pg.block_tokens > 0) {
                let wanted = pg.block_tokens;
                last.fix = format!("start the decode instance with --block-size {wanted}");
            }
        }
        for layer in &pg.layers {
            let at = At {
                group: g,
                layer: layer.layer,
                tensor: "",
            };
            match cg.layer(layer.layer) {
                None => found.layer(at, "", ("present".into(), "missing".into()), LAYERS),
                Some(other) => {
                    if layer.draft != other.draft {
                        let values = (layer.draft.to_string(), other.draft.to_string());
                        found.layer(at, "draft", values, LAYERS);
                    }
                    tensors(
                        at,
                        pg.block_tokens == cg.block_tokens,
                        &layer.tensors,
                        &other.tensors,
                        found,
                    );
                }
            }
        }
        for layer in &cg.layers {
            if pg.layer(layer.layer).is_none() {
                let at = At {
                    group: g,
                    layer: layer.layer,
                    tensor: "",
                };
                found.layer(at, "", ("missing".into(), "present".into()), LAYERS);
            }
        }
    }
}

fn tensors(
    at: At<'_>,
    same_blocks: bool,
    p: &[TensorFormat],
    c: &[TensorFormat],
    found: &mut Found,
) {
    let names = |list: &[TensorFormat]| {
        let mut names: Vec<&str> = list.iter().map(|t| t.name.as_str()).collect();
        names.sort_unstable();
        names.join(", ")
    };
    let (p_names, c_names) = (names(p), names(c));
    if p_names != c_names {
        found.layer(at, "tensors", (p_names, c_names), TENSORS);
    }
    for pt in p {
        let Some(ct) = c.iter().find(|t| t.name == pt.name) else {
            continue;
        };
        let at = At {
            tensor: &pt.name,
            ..at
        };
        // The numbers themselves: of many, the text shows a few and a short hash.
        if scaling(pt) != scaling(ct) {
            let values = (scaling_text(pt), scaling_text(ct));
            found.layer(at, "scaling", values, SCALING);
        }
        let mut differ = |field, p: String, c: String, note| {
            if p != c {
                found.layer(at, field, (p, c), note);
            }
        };
        differ("role", pt.role.to_string(), ct.role.to_string(), GROUPS);
        differ("dtype", pt.dtype.to_string(), ct.dtype.to_string(), DTYPE);
        let sharded = |t: &TensorFormat| match t.sharded_axis() {
            None => "replicated".to_owned(),
            Some(axis) => format!("by {}", axis.kind),
        };
        differ("sharded", sharded(pt), sharded(ct), SHARD);
        let mut extents_agree = true;
        for kind in kinds(pt, ct) {
            // Unequal blocks have been reported for the group.
            if kind == AxisKind::Token && !same_blocks {
                continue;
            }
            let (p, c) = (pt.extent_of(kind), ct.extent_of(kind));
            extents_agree &= p == c;
            differ(extent_name(kind), p.to_string(), c.to_string(), EXTENT);
        }
        if extents_agree && !splits_agree(pt, ct) {
            let axes = |t: &TensorFormat| {
                let axes: Vec<String> = t.axes.iter().map(ToString::to_string).collect();
                format!("[{}]", axes.join(", "))
            };
            found.layer(at, "axes", (axes(pt), axes(ct)), AXES);
        }
    }
}

/// How a tensor is scaled. Constants of 1 are no scaling.
fn scaling(t: &TensorFormat) -> Option<&Scaling> {
    t.scaling.as_ref().filter(|scaling| match scaling {
        Scaling::Tensor { .. } => true,
        Scaling::Constant { bits, .. } => bits.iter().any(|b| *b != ONE),
    })
}

/// The same for people; long lists are told by their hash.
fn scaling_text(t: &TensorFormat) -> String {
    match scaling(t) {
        None => "none".to_owned(),
        Some(Scaling::Tensor { name }) => format!("tensor {name}"),
        Some(Scaling::Constant { axes, bits }) => {
            let along: Vec<&str> = axes.iter().map(|a| a.name()).collect();
            let scales: Vec<String> = bits
                .iter()
                .take(SHOWN_SCALES)
                .map(|b| f32::from_bits(*b).to_string())
                .collect();
            let mut text = scales.join(", ");
            if bits.len() > SHOWN_SCALES {
                let mut sum = Sha256::new();
                bits.iter().for_each(|b| sum.update(b.to_le_bytes()));
                let sum: [u8; 32] = sum.finalize().into();
                let short = u32::from_be_bytes([sum[0], sum[1], sum[2], sum[3]]);
                text = format!("{text}, … ({} scales, sha256 {short:08x}…)", bits.len());
            }
            match along.is_empty() {
                true => text,
                false => format!("by {}: {text}", along.join(", ")),
            }
        }
    }
}

/// 1.0 as an IEEE single.
const ONE: u32 = 0x3f80_0000;

/// How many scales of a tensor a message shows.
const SHOWN_SCALES: usize = 4;

/// The kinds of axis that either tensor has.
fn kinds(p: &TensorFormat, c: &TensorFormat) -> Vec<AxisKind> {
    let mut all: Vec<AxisKind> = p.axes.iter().chain(&c.axes).map(|a| a.kind).collect();
    all.sort_unstable();
    all.dedup();
    all
}

const fn extent_name(kind: AxisKind) -> &'static str {
    match kind {
        AxisKind::Head => "heads",
        AxisKind::Token => "tokens",
        AxisKind::Channel => "channels",
        AxisKind::Opaque => "bytes",
        other => other.name(),
    }
}

fn splits_agree(p: &TensorFormat, c: &TensorFormat) -> bool {
    kinds(p, c).into_iter().all(|kind| {
        let parts = |t: &TensorFormat| -> Vec<(u64, u64)> {
            let of_kind = t.axes.iter().filter(|a| a.kind == kind);
            of_kind.map(|a| (a.extent, 0)).collect()
        };
        // Unequal block sizes are reported as such.
        p.extent_of(kind) != c.extent_of(kind) || common_split(&parts(p), &parts(c)).is_some()
    })
}

fn placements(p: &Side<'_>, c: &Side<'_>, found: &mut Found) {
    let (pt, ct) = (p.placement.topology(), c.placement.topology());
    if pt.layers != ct.layers {
        found.push("placement.layers", pt.layers, ct.layers, WINDOW);
    }
    let mut consumer = BTreeMap::new();
    for t in c.placement.tensors() {
        if let Some(format) = c.format.tensor(t.group, t.layer, t.tensor) {
            consumer.insert((t.group, t.layer, format.name.as_str()), (t, format));
        }
    }
    for t in p.placement.tensors() {
        let Some(format) = p.format.tensor(t.group, t.layer, t.tensor) else {
            continue;
        };
        let key = (t.group, t.layer, format.name.as_str());
        let Some((other, other_format)) = consumer.get(&key) else {
            continue;
        };
        let part = |t: &PlacedTensor, format| match t.shard_of(format) {
            None => "whole".to_owned(),
            Some(shard) => shard.to_string(),
        };
        let (a, b) = (part(t, format), part(other, other_format));
        if a != b {
            let at = At {
                group: t.group,
                layer: t.layer,
                tensor: &format.name,
            };
            found.layer(at, "shard", (a, b), SHARD);
        }
    }
}
