//! What two sides that are cut otherwise are told: what moves, and what does not.

use super::*;
use crate::ids::Rank;

const TOKENS: u64 = 16;

fn tensor(name: &str, role: TensorRole, axes: &[(AxisKind, u64)]) -> TensorFormat {
    TensorFormat {
        name: name.into(),
        role,
        dtype: DType::F8E4m3,
        axes: axes.iter().map(|(k, e)| Axis::new(*k, *e)).collect(),
        sharded: axes
            .iter()
            .position(|a| a.0 == AxisKind::Head)
            .map(|at| at as u32),
        scaling: None,
    }
}

fn scaled(mut tensor: TensorFormat, scaling: Scaling) -> TensorFormat {
    tensor.scaling = Some(scaling);
    tensor
}

fn by(name: &str) -> Scaling {
    Scaling::Tensor { name: name.into() }
}

fn constants(axes: &[AxisKind], scales: &[f32]) -> Scaling {
    Scaling::Constant {
        axes: axes.to_vec(),
        bits: scales.iter().map(|s| s.to_bits()).collect(),
    }
}

const HEADS: (AxisKind, u64) = (AxisKind::Head, 2);
const DIM: (AxisKind, u64) = (AxisKind::Dim, 4);
const KV: (AxisKind, u64) = (AxisKind::Kv, 2);

fn token(tokens: u64) -> (AxisKind, u64) {
    (AxisKind::Token, tokens)
}

fn key(tokens: u64) -> TensorFormat {
    tensor("k", TensorRole::Key, &[token(tokens), HEADS, DIM])
}

fn value(tokens: u64) -> TensorFormat {
    tensor("v", TensorRole::Value, &[token(tokens), HEADS, DIM])
}

fn stacked(tokens: u64) -> TensorFormat {
    tensor("kv", TensorRole::KeyValue, &[KV, token(tokens), HEADS, DIM])
}

fn format(block_tokens: u64, tensors: Vec<TensorFormat>) -> KvFormat {
    let group = CacheGroup {
        name: "full".into(),
        kind: GroupKind::Full,
        block_tokens: block_tokens as u32,
        layers: vec![LayerFormat {
            layer: 0,
            draft: false,
            tensors,
        }],
    };
    KvFormat::new(ModelIdentity::new("test", None), vec![group]).expect("valid")
}

fn placed(format: &KvFormat, topology: Topology) -> PlacementDesc {
    KvPlacement::uniform(format, topology, &[8], Packing::OneMemory, 1)
        .and_then(|u| u.describe(format))
        .expect("valid")
}

/// Verdict, and the fields that differ.
fn told(p: &KvFormat, c: &KvFormat) -> (Verdict, Vec<String>) {
    let (pp, cp) = (
        placed(p, Topology::single(p)),
        placed(c, Topology::single(c)),
    );
    let side = |format, placement| Side { format, placement };
    let diff = diff(&side(p, &pp), &side(c, &cp));
    let fields = diff.differences.into_iter().map(|d| d.field);
    (diff.verdict, fields.collect())
}

#[test]
fn keys_and_values_in_one_tensor_or_two() {
    let apart = format(TOKENS, vec![value(TOKENS), key(TOKENS)]);
    let one = format(TOKENS, vec![stacked(TOKENS)]);
    let fields = vec!["groups[0].layers[0].tensors".to_owned()];
    for (p, c) in [(&apart, &one), (&one, &apart)] {
        assert_eq!(told(p, c), (Verdict::Reshardable, fields.clone()));
    }
    // Of two K it is not known which is meant.
    let mut other = key(TOKENS);
    other.name = "k2".into();
    let two = format(TOKENS, vec![key(TOKENS), other, value(TOKENS)]);
    assert_eq!(told(&two, &one).0, Verdict::Incompatible);
    // The halves are compared as any tensor is.
    let mut small = value(TOKENS);
    small.axes[2].extent = 8;
    let small = format(TOKENS, vec![key(TOKENS), small]);
    let (verdict, fields) = told(&one, &small);
    assert_eq!(verdict, Verdict::Incompatible);
    assert_eq!(fields[0], "groups[0].layers[0].v.dim");
}

#[test]
fn each_half_has_its_scale() {
    let apart = |k: f32, v: f32| {
        let (k, v) = (Scaling::constant(k), Scaling::constant(v));
        let tensors = vec![scaled(key(TOKENS), k), scaled(value(TOKENS), v)];
        format(TOKENS, tensors)
    };
    let one = |scaling| format(TOKENS, vec![scaled(stacked(TOKENS), scaling)]);
    let both = one(constants(&[AxisKind::Kv], &[0.5, 2.0]));
    assert_eq!(told(&apart(0.5, 2.0), &both).0, Verdict::Reshardable);
    assert_eq!(told(&both, &apart(0.5, 2.0)).0, Verdict::Reshardable);
    let crossed = told(&both, &apart(2.0, 0.5));
    let field = |t: &str| format!("groups[0].layers[0].{t}.scaling");
    assert_eq!(crossed.0, Verdict::Incompatible);
    assert_eq!(crossed.1[..2], [field("k"), field("v")]);
    // One for both; and one for each head, K and V turning fastest or slowest.
    let plain = one(Scaling::constant(0.5));
    assert_eq!(told(&plain, &apart(0.5, 0.5)).0, Verdict::Reshardable);
    assert_eq!(told(&plain, &apart(0.5, 2.0)).1[0], field("v"));
    let of_heads = |scales: &[f32]| constants(&[AxisKind::Head], scales);
    let by_heads = format(
        TOKENS,
        vec![
            scaled(key(TOKENS), of_heads(&[1.0, 2.0])),
            scaled(value(TOKENS), of_heads(&[3.0, 4.0])),
        ],
    );
    let slow = one(constants(
        &[AxisKind::Kv, AxisKind::Head],
        &[1.0, 2.0, 3.0, 4.0],
    ));
    let fast = one(constants(
        &[AxisKind::Head, AxisKind::Kv],
        &[1.0, 3.0, 2.0, 4.0],
    ));
    assert_eq!(told(&slow, &by_heads).0, Verdict::Reshardable);
    assert_eq!(told(&by_heads, &fast).0, Verdict::Reshardable);
}

#[test]
fn stored_scales_go_with_their_halves() {
    let scale = |name: &str, kv: &[(AxisKind, u64)]| {
        let axes = [kv, &[token(TOKENS), HEADS]].concat();
        tensor(name, TensorRole::Scale, &axes)
    };
    let apart = format(
        TOKENS,
        vec![
            scaled(key(TOKENS), by("k_scale")),
            scaled(value(TOKENS), by("v_scale")),
            scale("k_scale", &[]),
            scale("v_scale", &[]),
        ],
    );
    let one = |kv: &[(AxisKind, u64)]| {
        let tensors = vec![scale("scales", kv), scaled(stacked(TOKENS), by("scales"))];
        format(TOKENS, tensors)
    };
    let fields = vec!["groups[0].layers[0].tensors".to_owned()];
    assert_eq!(
        told(&apart, &one(&[KV])),
        (Verdict::Reshardable, fields.clone())
    );
    assert_eq!(told(&one(&[KV]), &apart), (Verdict::Reshardable, fields));
    // One scale for K and V together is not two.
    assert_eq!(told(&apart, &one(&[])).0, Verdict::Incompatible);
}

#[test]
fn scales_of_blocks_hold_blocks_together() {
    let with = |block: u64, scale_axes: &[(AxisKind, u64)]| {
        let tensors = vec![
            scaled(key(block), by("scale")),
            scaled(value(block), by("scale")),
            tensor("scale", TensorRole::Scale, scale_axes),
        ];
        format(block, tensors)
    };
    // One for 16 tokens on both sides moves; one for a block does not, and is named.
    let (small, large) = (with(16, &[HEADS]), with(64, &[token(4), HEADS]));
    assert_eq!(told(&small, &large).0, Verdict::Reshardable);
    assert_eq!(told(&large, &small).0, Verdict::Reshardable);
    let (verdict, fields) = told(&small, &with(64, &[HEADS]));
    assert_eq!(verdict, Verdict::Incompatible);
    assert_eq!(fields[0], "groups[0].layers[0].scale.tokens");
    assert_eq!(told(&small, &with(16, &[HEADS])).0, Verdict::Identical);
}

#[test]
fn units_must_lie_at_even_distances() {
    let keys = |digits: &[u64]| {
        let tokens: u64 = digits.iter().product();
        let mut axes: Vec<_> = digits.iter().map(|d| token(*d)).collect();
        axes.extend([HEADS, DIM]);
        format(tokens, vec![tensor("k", TensorRole::Key, &axes)])
    };
    let verdict = |p: &[u64], c: &[u64]| told(&keys(p), &keys(c)).0;
    // Kernel blocks of 16 in 64, against 16, and against 48 in threes of 16: units of 16.
    assert_eq!(verdict(&[4, 16], &[16]), Verdict::Reshardable);
    assert_eq!(verdict(&[4, 16], &[3, 16]), Verdict::Reshardable);
    // Units of 8 have no even distance there if kernel blocks are apart.
    assert_eq!(
        verdict(&[4, 16], &[8]),
        Verdict::Reshardable,
        "dense ones are not"
    );
    let (p, c) = (keys(&[4, 16]), keys(&[8]));
    let dense = placed(&p, Topology::single(&p));
    let mut tensors = dense.tensors().to_vec();
    tensors[0].strides[0] += 1000;
    tensors[0].block_stride += 4000;
    let memory = vec![dense.memory_len()[0] + 100_000];
    let topology = *dense.topology();
    let spread = PlacementDesc::new(&p, topology, tensors, Vec::new(), memory).expect("valid");
    let cp = placed(&c, Topology::single(&c));
    let side = |format, placement| Side { format, placement };
    let differences = compare(&side(&p, &spread), &side(&c, &cp));
    let strides = differences.first().expect("it is named");
    assert_eq!(strides.field, "groups[0].layers[0].k.strides");
    assert_eq!(strides.severity, Severity::Incompatible);
    assert_eq!(
        strides.producer,
        "[token 4 × 1128 B, token 16 × 8 B, head 2 × 4 B, dim 4 × 1 B]"
    );
    // Digits of which none ends with a unit.
    let (verdict, fields) = told(&keys(&[4, 12]), &keys(&[32]));
    assert_eq!(verdict, Verdict::Incompatible);
    assert_eq!(fields[0], "groups[0].layers[0].k.axes");
}

#[test]
fn ranks_that_cannot_be_are_refused() {
    let format = format(TOKENS, vec![key(TOKENS), value(TOKENS)]);
    let whole = Topology::single(&format);
    let of = |tp, pp| Parallel { tp, pp, dp: 0 };
    let single = vec![Rank::default()];
    assert_eq!(
        reshard::sources((&format, of(1, 1)), (&format, &whole)),
        Ok(single)
    );
    assert!(matches!(
        reshard::sources((&format, of(3, 1)), (&format, &whole)),
        Err(LayoutError::UnevenShard { .. })
    ));
    assert!(matches!(
        reshard::takers((&format, &whole), (&format, of(u32::MAX, 7))),
        Err(LayoutError::TooMany { .. })
    ));
}
