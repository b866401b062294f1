//! What differs between two sides.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use super::difference::{At, Found, Note};
use super::digits::{Digit, common_split, split_off};
use super::laid::{Half, Overlap, Units};
use super::planes::{Plane, matching};
use super::{
    AxisKind, CacheGroup, Difference, KvFormat, LayerFormat, PlacedTensor, PlacementDesc, Scaling,
    Severity, TensorFormat,
};

/// One side of a transfer: its format and where it keeps its part.
#[derive(Debug, Clone, Copy)]
pub struct Side<'a> {
    /// The format.
    pub format: &'a KvFormat,
    /// The placement, already validated against the format or about to be.
    pub placement: &'a PlacementDesc,
}

/// Compares two sides field by field. Empty: their blocks can be exchanged as they are. Bases,
/// numbers of blocks, strides and the order of axes may differ. Where every difference is
/// [`Severity::Reshard`], the ranks can exchange what they both keep.
#[must_use]
pub fn compare(producer: &Side<'_>, consumer: &Side<'_>) -> Vec<Difference> {
    let mut found = Found::default();
    identity(producer.format, consumer.format, &mut found);
    formats(producer.format, consumer.format, &mut found);
    placements(producer, consumer, &mut found);
    found.finish()
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
    why: "blocks are cut into units that both sides' blocks are multiples of: more operations, and smaller ones",
    fix: "start both sides with the same block size",
};
const LAYERS: Note = Note {
    severity: Severity::Incompatible,
    why: "layers on one side only have nothing to be copied from or to",
    fix: "use the same model, and the same speculative decoding, on both sides",
};
const TENSORS: Note = Note {
    severity: Severity::Incompatible,
    why: "a tensor on one side only has nothing to be copied from or to",
    fix: "use the same attention backend on both sides",
};
const STACKED: Note = Note {
    severity: Severity::Reshard,
    why: "K and V are one tensor on one side and two on the other, and move one by one",
    fix: "use the same attention backend on both sides for larger pieces",
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
const COVERED: Note = Note {
    severity: Severity::Incompatible,
    why: "one number for so many tokens cannot be had from numbers for others",
    fix: "start both sides with the same block size",
};
const AXES: Note = Note {
    severity: Severity::Incompatible,
    why: "the two ways to split this axis have no common part",
    fix: "use the same attention backend on both sides",
};
const STRIDES: Note = Note {
    severity: Severity::Incompatible,
    why: "what both sides keep of it, or the tokens that blocks of both sizes are made of, do not lie at even distances",
    fix: "use the same attention backend on both sides, with the same block size",
};
const SHARD: Note = Note {
    severity: Severity::Reshard,
    why: "a rank of one side keeps what several ranks of the other keep: more operations, and smaller ones",
    fix: "for the largest pieces use the same tensor-parallel size on both sides, and pair equal ranks",
};
const WINDOW: Note = Note {
    severity: Severity::Reshard,
    why: "a rank of one side keeps layers of several ranks of the other",
    fix: "for the fewest peers use the same pipeline-parallel size on both sides, and pair equal ranks",
};

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
        let units = Units::of(pg.block_tokens, cg.block_tokens);
        if pg.block_tokens != cg.block_tokens {
            let field = format!("groups[{g}].block_tokens");
            found.push(field, pg.block_tokens, cg.block_tokens, BLOCK_TOKENS);
            if let (Some(last), Some(units)) = (found.list.last_mut(), units) {
                let (wanted, unit) = (pg.block_tokens, units.tokens);
                last.why = format!(
                    "blocks are cut into units of {unit} tokens: more operations, and smaller ones"
                );
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
                    tensors(at, (pg, cg), (layer, other), found);
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
    groups: (&CacheGroup, &CacheGroup),
    (p, c): (&LayerFormat, &LayerFormat),
    found: &mut Found,
) {
    let matching = matching(p, c);
    let note = match (matching.unmatched, matching.restacked) {
        (true, _) => Some(TENSORS),
        (false, true) => Some(STACKED),
        (false, false) => None,
    };
    if let Some(note) = note {
        let names = |layer: &LayerFormat| {
            let mut names: Vec<&str> = layer.tensors.iter().map(|t| t.name.as_str()).collect();
            names.sort_unstable();
            names.join(", ")
        };
        found.layer(at, "tensors", (names(p), names(c)), note);
    }
    for (pp, cp) in &matching.pairs {
        let at = At {
            tensor: pair_name(pp, cp),
            ..at
        };
        // The numbers themselves: of many, the text shows a few and a short hash.
        let (ps, cs) = (pp.scaling(), cp.scaling());
        if !same_scaling(ps.as_deref(), cs.as_deref(), &matching.pairs) {
            let values = (scaling_text(ps.as_deref()), scaling_text(cs.as_deref()));
            found.layer(at, "scaling", values, SCALING);
        }
        let mut differ = |field, p: String, c: String, note| {
            if p != c {
                found.layer(at, field, (p, c), note);
            }
        };
        let (pt, ct) = (pp.format, cp.format);
        differ("role", pp.role().to_string(), cp.role().to_string(), GROUPS);
        differ("dtype", pt.dtype.to_string(), ct.dtype.to_string(), DTYPE);
        let sharded = |t: &TensorFormat| match t.sharded_axis() {
            None => "replicated".to_owned(),
            Some(axis) => format!("by {}", axis.kind),
        };
        differ("sharded", sharded(pt), sharded(ct), SHARD);
        let mut extents_agree = true;
        for kind in kinds(pp, cp) {
            // Unequal blocks have been reported for the group.
            if kind == AxisKind::Token && groups.0.block_tokens != groups.1.block_tokens {
                continue;
            }
            let (p, c) = (pt.extent_of(kind), ct.extent_of(kind));
            extents_agree &= p == c;
            differ(extent_name(kind), p.to_string(), c.to_string(), EXTENT);
        }
        if groups.0.block_tokens != groups.1.block_tokens {
            let (p, c) = (covered(groups.0, pt), covered(groups.1, ct));
            extents_agree &= p == c;
            let text = |tokens| format!("one for {tokens} tokens");
            differ("tokens", text(p), text(c), COVERED);
        }
        if extents_agree && !splits_agree(pp, cp, groups) {
            let axes = |t: &TensorFormat| {
                let axes: Vec<String> = t.axes.iter().map(ToString::to_string).collect();
                format!("[{}]", axes.join(", "))
            };
            found.layer(at, "axes", (axes(pt), axes(ct)), AXES);
        }
    }
}

/// What messages call a pair: the name of the tensor that is not K and V in one.
fn pair_name<'a>(p: &Plane<'a>, c: &Plane<'a>) -> &'a str {
    match p.kv {
        None => &p.format.name,
        Some(_) => &c.format.name,
    }
}

/// How many tokens of a block one index of a tensor's tokens stands for: 1, but for scales.
fn covered(group: &CacheGroup, tensor: &TensorFormat) -> u64 {
    u64::from(group.block_tokens) / tensor.extent_of(AxisKind::Token).max(1)
}

/// Whether the numbers stand for the same values: constants bit by bit; scales that are stored by
/// which tensor they are.
fn same_scaling(
    p: Option<&Scaling>,
    c: Option<&Scaling>,
    pairs: &[(Plane<'_>, Plane<'_>)],
) -> bool {
    let (Some(Scaling::Tensor { name: p }), Some(Scaling::Tensor { name: c })) = (p, c) else {
        return p == c;
    };
    let same = |(pp, cp): &(Plane<'_>, Plane<'_>)| pp.format.name == *p && cp.format.name == *c;
    p == c || pairs.iter().any(same)
}

/// The same for people; long lists are told by their hash.
fn scaling_text(scaling: Option<&Scaling>) -> String {
    match scaling {
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

/// How many scales of a tensor a message shows.
const SHOWN_SCALES: usize = 4;

/// The kinds of axis that either has.
fn kinds(p: &Plane<'_>, c: &Plane<'_>) -> Vec<AxisKind> {
    let mut all: Vec<AxisKind> = p.kinds().chain(c.kinds()).collect();
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

/// Whether both sides can address the same parts of every axis, whatever the strides are.
fn splits_agree(p: &Plane<'_>, c: &Plane<'_>, groups: (&CacheGroup, &CacheGroup)) -> bool {
    let unit = match groups.0.block_tokens == groups.1.block_tokens {
        true => None,
        false => Units::of(groups.0.block_tokens, groups.1.block_tokens),
    };
    kinds(p, c).into_iter().all(|kind| {
        let digits = |group: &CacheGroup, plane: &Plane<'_>| -> Option<Vec<Digit>> {
            let of_kind = plane.format.axes.iter().filter(|a| a.kind == kind);
            let digits: Vec<Digit> = of_kind.map(|a| (a.extent, 0)).collect();
            match unit.filter(|_| kind == AxisKind::Token) {
                None => Some(digits),
                Some(unit) => {
                    let run = u64::from(unit.tokens) / covered(group, plane.format).max(1);
                    split_off(&digits, run).map(|(_, inner)| inner)
                }
            }
        };
        let both = digits(groups.0, p).zip(digits(groups.1, c));
        both.is_some_and(|(p, c)| common_split(&p, &c).is_some())
    })
}

/// A tensor of a layer, or K or V of it, that both formats have; and where the two ranks keep it.
pub(crate) struct Pair<'a> {
    /// Index of the group.
    pub(crate) group: u32,
    /// The layer.
    pub(crate) layer: u32,
    /// What blocks of the group are made of.
    pub(crate) units: Units,
    /// The producer's, and where it is if this rank keeps it.
    pub(crate) producer: (Plane<'a>, Option<&'a PlacedTensor>),
    /// The consumer's.
    pub(crate) consumer: (Plane<'a>, Option<&'a PlacedTensor>),
}

impl<'a> Pair<'a> {
    /// Both sides, if both keep it.
    pub(crate) fn both(&self) -> Option<(Half<'a>, Half<'a>)> {
        let half = |(plane, placed): (Plane<'a>, Option<&'a PlacedTensor>)| {
            placed.map(|placed| Half { plane, placed })
        };
        half(self.producer).zip(half(self.consumer))
    }
}

/// What two sides' formats both have, by group and layer.
pub(crate) fn pairs<'a>(p: &Side<'a>, c: &Side<'a>) -> Vec<Pair<'a>> {
    let placed = |desc: &'a PlacementDesc| -> BTreeMap<(u32, u32, u32), &'a PlacedTensor> {
        let key = |t: &'a PlacedTensor| ((t.group, t.layer, t.tensor), t);
        desc.tensors().iter().map(key).collect()
    };
    let (p_placed, c_placed) = (placed(p.placement), placed(c.placement));
    let mut out = Vec::new();
    for (g, (pg, cg)) in (0_u32..).zip(p.format.groups().iter().zip(c.format.groups())) {
        let Some(units) = Units::of(pg.block_tokens, cg.block_tokens) else {
            continue;
        };
        for layer in &pg.layers {
            let Some(other) = cg.layer(layer.layer) else {
                continue;
            };
            for (pp, cp) in matching(layer, other).pairs {
                let at = |plane: &Plane<'_>| (g, layer.layer, plane.tensor);
                out.push(Pair {
                    group: g,
                    layer: layer.layer,
                    units,
                    producer: (pp, p_placed.get(&at(&pp)).copied()),
                    consumer: (cp, c_placed.get(&at(&cp)).copied()),
                });
            }
        }
    }
    out
}

fn placements(p: &Side<'_>, c: &Side<'_>, found: &mut Found) {
    let (pt, ct) = (p.placement.topology(), c.placement.topology());
    if pt.layers != ct.layers {
        found.push("placement.layers", pt.layers, ct.layers, WINDOW);
    }
    let comparable = !found.is_incompatible();
    for pair in pairs(p, c) {
        let Some((producer, consumer)) = pair.both() else {
            continue;
        };
        let at = At {
            group: pair.group,
            layer: pair.layer,
            tensor: pair_name(&pair.producer.0, &pair.consumer.0),
        };
        let part = |half: &Half<'_>| match half.shard() {
            None => "whole".to_owned(),
            Some((_, shard)) => shard.to_string(),
        };
        let (a, b) = (part(&producer), part(&consumer));
        if a != b {
            found.layer(at, "shard", (a, b), SHARD);
        }
        // Of layouts that match as far as formats go, what strides allow.
        let Some(overlap) = Overlap::of(&producer, &consumer).filter(|_| comparable) else {
            continue;
        };
        let laid = overlap.lay(&producer, &consumer, pair.units);
        let split = |kind| {
            laid.as_ref()
                .and_then(|(p, c)| common_split(p.digits(kind), c.digits(kind)))
                .is_some()
        };
        if laid.is_none()
            || !kinds(&producer.plane, &consumer.plane)
                .into_iter()
                .all(split)
        {
            let values = (strides_text(&producer), strides_text(&consumer));
            found.layer(at, "strides", values, STRIDES);
        }
    }
}

/// The axes that a rank keeps, with the bytes of a step.
fn strides_text(half: &Half<'_>) -> String {
    let format = half.plane.format;
    let extents = half.placed.extents(format);
    let axes = format.axes.iter().zip(extents).zip(&half.placed.strides);
    let axes = axes.map(|((axis, extent), stride)| format!("{} {extent} × {stride} B", axis.kind));
    format!("[{}]", axes.collect::<Vec<_>>().join(", "))
}
