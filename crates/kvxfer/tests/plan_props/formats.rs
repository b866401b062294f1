//! Two sides' formats that hold the same, and placements of them.

use std::collections::BTreeMap;

use crate::tape::Tape;
use kvxfer::ids::Rank;
use kvxfer::layout::{
    Axis, AxisKind, CacheGroup, DType, GroupKind, KvFormat, LayerFormat, LayerWindow,
    ModelIdentity, PlacedTensor, PlacementDesc, Shard, TensorFormat, TensorRole, Topology,
};

/// What a tensor holds, apart from how a side cuts it into axes.
#[derive(Clone)]
pub(crate) struct Logical {
    pub(crate) coordinates: Vec<(AxisKind, u64)>,
    pub(crate) dtype: DType,
    pub(crate) role: TensorRole,
    pub(crate) sharded: bool,
    /// The heads that both ranks keep.
    pub(crate) shard: Option<Shard>,
}

pub(crate) fn logical(tape: &mut Tape, slots: bool, tokens: u64) -> Logical {
    let heads = tape.pick(&[1, 2, 3, 4]);
    let dim = tape.pick(&[4, 8, 1, 6]);
    let (role, coordinates) = match (slots, tape.below(5)) {
        (true, 0..3) => (
            TensorRole::State,
            vec![
                (AxisKind::Head, heads),
                (AxisKind::Dim, dim),
                (AxisKind::State, 3),
            ],
        ),
        (true, _) => (
            TensorRole::Conv,
            vec![(AxisKind::Channel, dim), (AxisKind::Width, 4)],
        ),
        (false, 0 | 1) => (
            TensorRole::Key,
            vec![
                (AxisKind::Token, tokens),
                (AxisKind::Head, heads),
                (AxisKind::Dim, dim),
            ],
        ),
        (false, 2) => (
            TensorRole::KeyValue,
            vec![
                (AxisKind::Kv, 2),
                (AxisKind::Token, tokens),
                (AxisKind::Head, heads),
                (AxisKind::Dim, dim),
            ],
        ),
        (false, 3) => (
            TensorRole::Latent,
            vec![(AxisKind::Token, tokens), (AxisKind::Latent, dim)],
        ),
        (false, _) => (TensorRole::Scale, vec![(AxisKind::Head, heads)]),
    };
    let sharded = coordinates.iter().any(|c| c.0 == AxisKind::Head);
    let shard = (sharded && tape.chance(2)).then(|| {
        let first = tape.below(heads);
        let count = 1 + tape.below(heads - first);
        Shard { first, count }
    });
    Logical {
        coordinates,
        dtype: tape.pick(&[DType::Bf16, DType::Uint8, DType::F32]),
        role,
        sharded,
        shard,
    }
}

/// One side's way to cut a tensor into axes.
pub(crate) fn tensor_format(tape: &mut Tape, name: &str, logical: &Logical) -> TensorFormat {
    let mut axes = Vec::new();
    for &(kind, extent) in &logical.coordinates {
        let splits = matches!(kind, AxisKind::Token | AxisKind::Dim | AxisKind::Latent);
        if splits && tape.chance(3) {
            // Powers of two, or all of it, so that the two sides' splits nest.
            let inner = match extent {
                8 => tape.pick(&[2, 4]),
                4 => tape.pick(&[2, 4, 1]),
                other => other,
            };
            axes.push(Axis::new(kind, extent / inner));
            // Now and then in three parts.
            if inner == 4 && tape.chance(2) {
                axes.push(Axis::new(kind, 2));
                axes.push(Axis::new(kind, 2));
            } else {
                axes.push(Axis::new(kind, inner));
            }
        } else {
            axes.push(Axis::new(kind, extent));
        }
    }
    if tape.chance(2) {
        tape.shuffle(&mut axes);
    }
    let head = axes.iter().position(|a| a.kind == AxisKind::Head);
    TensorFormat {
        name: name.into(),
        role: logical.role,
        dtype: logical.dtype,
        sharded: logical.sharded.then(|| head.expect("it has heads") as u32),
        axes,
        scaling: None,
    }
}

/// Both sides' formats, and by (group, layer, tensor) what they both hold.
pub(crate) struct Formats {
    pub(crate) producer: KvFormat,
    pub(crate) consumer: KvFormat,
    pub(crate) tensors: BTreeMap<(u32, u32, String), Logical>,
    pub(crate) window: LayerWindow,
}

pub(crate) fn formats(tape: &mut Tape) -> Formats {
    let layers = 1 + tape.below(4) as u32;
    let groups = 1 + tape.below(3) as u32;
    let mut tensors = BTreeMap::new();
    let mut sides = [Vec::new(), Vec::new()];
    for g in 0..groups {
        let (kind, block_tokens) = match tape.below(4) {
            0 | 1 => (GroupKind::Full, tape.pick(&[1_u32, 4, 8])),
            2 => (GroupKind::SlidingWindow { tokens: 64 }, 4),
            _ => (GroupKind::StateSlots, 0),
        };
        let mut here: Vec<u32> = (0..layers).filter(|_| !tape.chance(3)).collect();
        // Layer 0 is in the first group, so that the format has a layer; and all layers exist.
        if g == 0 {
            here = (0..layers).collect();
        } else if here.is_empty() {
            here.push(layers - 1);
        }
        // Layers that look alike, and now and then one that does not.
        let mut alike: Vec<Logical> = Vec::new();
        let mut group_layers = [Vec::new(), Vec::new()];
        let mut cut: [Vec<TensorFormat>; 2] = [Vec::new(), Vec::new()];
        for layer in here {
            if alike.is_empty() || tape.chance(4) {
                let count = 1 + tape.below(2);
                let slots = kind == GroupKind::StateSlots;
                alike = (0..count)
                    .map(|_| logical(tape, slots, u64::from(block_tokens)))
                    .collect();
                for side in &mut cut {
                    *side = alike
                        .iter()
                        .enumerate()
                        .map(|(t, logical)| tensor_format(tape, &format!("t{t}"), logical))
                        .collect();
                }
                // The names match the tensors, not their order.
                if tape.chance(2) {
                    cut[1].reverse();
                }
            }
            for (t, logical) in alike.iter().enumerate() {
                tensors.insert((g, layer, format!("t{t}")), logical.clone());
            }
            for (side, cut) in group_layers.iter_mut().zip(&cut) {
                side.push(LayerFormat {
                    layer,
                    draft: false,
                    tensors: cut.clone(),
                });
            }
        }
        for (side, group_layers) in sides.iter_mut().zip(group_layers) {
            side.push(CacheGroup {
                name: format!("g{g}"),
                kind,
                block_tokens,
                layers: group_layers,
            });
        }
    }
    let first = tape.below(u64::from(layers)) as u32;
    let end = layers - tape.below(u64::from(layers - first)) as u32;
    let [producer, consumer] = sides
        .map(|groups| KvFormat::new(ModelIdentity::new("random", None), groups).expect("valid"));
    Formats {
        producer,
        consumer,
        tensors,
        window: LayerWindow { first, end },
    }
}

/// Random strides for a tensor: the axes and the block axis in any order, with gaps. Returns the
/// bytes it spans.
pub(crate) fn strides(
    tape: &mut Tape,
    format: &TensorFormat,
    placed: &mut PlacedTensor,
    plain: bool,
    step: u64,
) -> u64 {
    const BLOCK: usize = usize::MAX;
    let extents = placed.extents(format);
    let mut order: Vec<usize> = (0..extents.len()).rev().collect();
    order.push(BLOCK);
    if !plain {
        tape.shuffle(&mut order);
    }
    placed.strides = vec![0; extents.len()];
    let mut span = step;
    for level in order {
        let gap = if !plain && tape.chance(3) {
            1 + tape.below(9)
        } else {
            0
        };
        let stride = span + gap;
        let extent = if level == BLOCK {
            placed.block_stride = stride;
            u64::from(placed.num_blocks)
        } else {
            placed.strides[level] = stride;
            extents[level]
        };
        span += stride * (extent - 1);
    }
    span
}

pub(crate) fn placement(
    tape: &mut Tape,
    format: &KvFormat,
    formats: &Formats,
    num_blocks: &[u32],
) -> PlacementDesc {
    let memories = 1 + tape.below(3);
    let mut ends = vec![0_u64; memories as usize];
    let mut tensors = Vec::new();
    let style = tape.below(3);
    for (g, group) in (0_u32..).zip(format.groups()) {
        for layer in &group.layers {
            if !formats.window.contains(layer.layer) {
                continue;
            }
            // Two tensors of a layer in one another's gaps: [blocks, …, 2, element].
            let paired = layer.tensors.len() == 2
                && style == 2
                && layer.tensors[0].axes == layer.tensors[1].axes
                && layer.tensors[0].dtype == layer.tensors[1].dtype
                && {
                    let shard =
                        |t: &TensorFormat| formats.tensors[&(g, layer.layer, t.name.clone())].shard;
                    shard(&layer.tensors[0]) == shard(&layer.tensors[1])
                };
            let mut first: Option<PlacedTensor> = None;
            for (t, tensor) in (0_u32..).zip(&layer.tensors) {
                let element = tensor.dtype.bytes();
                if let (true, Some(first)) = (paired, &first) {
                    tensors.push(PlacedTensor {
                        tensor: t,
                        offset: first.offset + element,
                        ..first.clone()
                    });
                    continue;
                }
                let logical = &formats.tensors[&(g, layer.layer, tensor.name.clone())];
                let memory = tape.below(memories);
                let mut placed = PlacedTensor {
                    group: g,
                    layer: layer.layer,
                    tensor: t,
                    memory: memory as u32,
                    offset: 0,
                    block_stride: 0,
                    num_blocks: num_blocks[g as usize],
                    strides: Vec::new(),
                    shard: logical.shard,
                };
                let step = if paired { 2 * element } else { element };
                let span = strides(tape, tensor, &mut placed, style == 0, step);
                let end = &mut ends[memory as usize];
                placed.offset = *end + tape.below(17);
                *end = placed.offset + span;
                tensors.push(placed.clone());
                first = Some(placed);
            }
        }
    }
    let memory = ends.iter().map(|end| end + tape.below(9)).collect();
    tape.shuffle(&mut tensors);
    let topology = Topology {
        rank: Rank::default(),
        tp: 1,
        pp: 1,
        dp: 1,
        layers: formats.window,
    };
    PlacementDesc::new(format, topology, tensors, Vec::new(), memory).expect("a valid placement")
}
