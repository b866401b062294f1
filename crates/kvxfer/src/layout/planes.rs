//! Which tensors of a layer hold the same on both sides, K and V in one tensor or apart.

use std::borrow::Cow;

use super::{AxisKind, LayerFormat, Scaling, TensorFormat, TensorRole};

/// A tensor, or K or V of one that holds both.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plane<'a> {
    /// Index of the tensor in its layer.
    pub(crate) tensor: u32,
    /// The tensor.
    pub(crate) format: &'a TensorFormat,
    /// Which index of its `Kv` axis is meant; `None`: all of the tensor.
    pub(crate) kv: Option<u64>,
}

impl<'a> Plane<'a> {
    /// All of a tensor.
    const fn whole((tensor, format): (u32, &'a TensorFormat)) -> Self {
        Self {
            tensor,
            format,
            kv: None,
        }
    }

    /// K (0) or V (1) of a tensor.
    const fn half((tensor, format): (u32, &'a TensorFormat), kv: u64) -> Self {
        Self {
            tensor,
            format,
            kv: Some(kv),
        }
    }

    /// What it holds.
    pub(super) const fn role(&self) -> TensorRole {
        match (self.format.role, self.kv) {
            (TensorRole::KeyValue, Some(0)) => TensorRole::Key,
            (TensorRole::KeyValue, Some(_)) => TensorRole::Value,
            (role, _) => role,
        }
    }

    /// The kinds of its axes.
    pub(crate) fn kinds(&self) -> impl Iterator<Item = AxisKind> + use<'a> {
        let halved = self.kv.is_some();
        let all = self.format.axes.iter().map(|a| a.kind);
        all.filter(move |kind| !halved || *kind != AxisKind::Kv)
    }

    /// How it is scaled; of constants that differ for K and V its own. Constants of 1 are no
    /// scaling.
    pub(super) fn scaling(&self) -> Option<Cow<'a, Scaling>> {
        let scaling = self.format.scaling.as_ref()?;
        let Scaling::Constant { axes, bits } = scaling else {
            return Some(Cow::Borrowed(scaling));
        };
        let own = match (self.kv, axes.iter().position(|a| *a == AxisKind::Kv)) {
            (Some(kv), Some(at)) => {
                // The axes behind it turn faster.
                let inner: usize = axes.iter().skip(at + 1).fold(1, |n, kind| {
                    let extent = self.format.extent_of(*kind);
                    n.saturating_mul(usize::try_from(extent).unwrap_or(usize::MAX))
                });
                let of = |i: usize| (i / inner.max(1) % 2) as u64;
                let bits = (0..).zip(bits).filter(|(i, _)| of(*i) == kv);
                let axes = axes.iter().copied().filter(|a| *a != AxisKind::Kv);
                Cow::Owned(Scaling::Constant {
                    axes: axes.collect(),
                    bits: bits.map(|(_, bits)| *bits).collect(),
                })
            }
            _ => Cow::Borrowed(scaling),
        };
        let is_one = |s: &Scaling| match s {
            Scaling::Constant { bits, .. } => bits.iter().all(|b| *b == ONE),
            Scaling::Tensor { .. } => false,
        };
        (!is_one(&own)).then_some(own)
    }
}

/// 1.0 as an IEEE single.
const ONE: u32 = 0x3f80_0000;

/// What two layers have in common.
#[derive(Debug, Default)]
pub(crate) struct Matching<'a> {
    /// Producer's and consumer's planes that hold the same.
    pub(crate) pairs: Vec<(Plane<'a>, Plane<'a>)>,
    /// Whether K and V are in one tensor on one side only.
    pub(crate) restacked: bool,
    /// Whether a tensor is on one side only.
    pub(crate) unmatched: bool,
}

type Indexed<'a> = (u32, &'a TensorFormat);

/// Matches two layers' tensors: by name; and what is left, where it is K and V in one tensor on one
/// side and apart on the other, with their scales likewise.
pub(crate) fn matching<'a>(p: &'a LayerFormat, c: &'a LayerFormat) -> Matching<'a> {
    let mut out = Matching::default();
    let mut left_p: Vec<Indexed<'a>> = Vec::new();
    let mut left_c: Vec<Indexed<'a>> = (0..).zip(&c.tensors).collect();
    for p in (0..).zip(&p.tensors) {
        match left_c.iter().position(|c| c.1.name == p.1.name) {
            Some(at) => {
                let c = left_c.remove(at);
                out.pairs.push((Plane::whole(p), Plane::whole(c)));
            }
            None => left_p.push(p),
        }
    }
    if left_p.is_empty() && left_c.is_empty() {
        return out;
    }
    if let Some(halves) = halves(&mut left_p, &mut left_c) {
        out.pairs.extend(halves);
        out.restacked = true;
    } else if let Some(halves) = halves(&mut left_c, &mut left_p) {
        out.pairs.extend(halves.into_iter().map(|(c, p)| (p, c)));
        out.restacked = true;
    }
    out.unmatched = !left_p.is_empty() || !left_c.is_empty();
    out
}

/// Takes K and V out of both lists, and their scales: one tensor of the first list and two of the
/// second one.
fn halves<'a>(
    one: &mut Vec<Indexed<'a>>,
    two: &mut Vec<Indexed<'a>>,
) -> Option<Vec<(Plane<'a>, Plane<'a>)>> {
    let only = |list: &[Indexed<'a>], role| {
        let mut of_role = list.iter().filter(|t| t.1.role == role);
        let first = of_role.next().copied()?;
        of_role.next().is_none().then_some(first)
    };
    let stacked = only(one, TensorRole::KeyValue).filter(|t| t.1.has(AxisKind::Kv))?;
    let (k, v) = (only(two, TensorRole::Key)?, only(two, TensorRole::Value)?);
    let mut all = vec![(stacked, k, v)];
    let named = |list: &[Indexed<'a>], of: Indexed<'a>| match &of.1.scaling {
        Some(Scaling::Tensor { name }) => list.iter().copied().find(|t| t.1.name == *name),
        _ => None,
    };
    if let (Some(scale), Some(k), Some(v)) = (named(one, stacked), named(two, k), named(two, v))
        && scale.1.has(AxisKind::Kv)
        && k.0 != v.0
    {
        all.push((scale, k, v));
    }
    let mut out = Vec::new();
    for (stacked, k, v) in all {
        one.retain(|t| t.0 != stacked.0);
        two.retain(|t| t.0 != k.0 && t.0 != v.0);
        out.push((Plane::half(stacked, 0), Plane::whole(k)));
        out.push((Plane::half(stacked, 1), Plane::whole(v)));
    }
    Some(out)
}
