//! Formats and placements that are right, and every way in which they can be wrong.

use super::*;
use crate::ids::Rank;

fn llama() -> KvFormat {
    models::builtin("llama-3.1-8b", 16, DType::Bf16).expect("built in")
}

fn tensor(name: &str, axes: &[(AxisKind, u64)]) -> TensorFormat {
    TensorFormat {
        name: name.into(),
        role: TensorRole::Key,
        dtype: DType::Bf16,
        axes: axes.iter().map(|a| Axis::new(a.0, a.1)).collect(),
        sharded: None,
        scaling: None,
    }
}

fn group(name: &str, tensors: Vec<TensorFormat>) -> CacheGroup {
    CacheGroup {
        name: name.into(),
        kind: GroupKind::Full,
        block_tokens: 16,
        layers: vec![LayerFormat {
            layer: 0,
            draft: false,
            tensors,
        }],
    }
}

fn format(groups: Vec<CacheGroup>) -> Result<KvFormat, LayoutError> {
    KvFormat::new(ModelIdentity::new("test", None), groups)
}

fn refused(groups: Vec<CacheGroup>) -> String {
    format(groups).expect_err("refused").to_string()
}

/// Two layers of K and V, in blocks of 64 bytes.
fn small() -> KvFormat {
    let kv = || {
        vec![
            tensor("k", &[(AxisKind::Token, 16), (AxisKind::Head, 2)]),
            tensor("v", &[(AxisKind::Token, 16), (AxisKind::Head, 2)]),
        ]
    };
    let mut group = group("full", kv());
    group.layers.push(LayerFormat {
        layer: 1,
        draft: false,
        tensors: kv(),
    });
    for layer in &mut group.layers {
        for tensor in &mut layer.tensors {
            tensor.sharded = Some(1);
        }
    }
    format(vec![group]).expect("valid")
}

fn placed(format: &KvFormat) -> (Topology, Vec<PlacedTensor>, Vec<u64>) {
    let topology = Topology::single(format);
    let uniform = KvPlacement::uniform(format, topology, &[4], Packing::OneMemory, 64);
    let uniform = uniform.expect("valid");
    (
        topology,
        uniform.tensors().to_vec(),
        uniform.memory_bytes().to_vec(),
    )
}

/// The error of a small placement after `change`.
fn misplaced(change: impl FnOnce(&mut Topology, &mut Vec<PlacedTensor>)) -> LayoutError {
    let format = small();
    let (mut topology, mut tensors, memory) = placed(&format);
    change(&mut topology, &mut tensors);
    PlacementDesc::new(&format, topology, tensors, Vec::new(), memory).expect_err("refused")
}

#[test]
fn fingerprints_are_what_they_always_were() {
    // Worked out from the documented encoding by another program. A change here breaks every
    // engine that is already out there: add a version instead.
    let golden = [
        (
            "llama-3.1-8b",
            "adc6e12660851eef24b5fe86f80b819081dec7a78f1623ac715da46b6d1e15c8",
        ),
        (
            "deepseek-v3",
            "1dc6e7ac962aefbe2abdc8b075dcdae897296ad74e165c3e159f475f5bffbc19",
        ),
    ];
    for (name, fingerprint) in golden {
        let format = models::builtin(name, 16, DType::Bf16).expect("built in");
        assert_eq!(format.fingerprint().to_string(), fingerprint, "{name}");
    }
    let everything = format(vec![
        CacheGroup {
            kind: GroupKind::SlidingWindow { tokens: 1024 },
            ..group(
                "sliding",
                vec![
                    TensorFormat {
                        dtype: DType::F8E4m3,
                        sharded: Some(0),
                        scaling: Some(Scaling::Tensor { name: "s".into() }),
                        ..tensor(
                            "k",
                            &[
                                (AxisKind::Head, 8),
                                (AxisKind::Dim, 16),
                                (AxisKind::Token, 16),
                                (AxisKind::Dim, 8),
                            ],
                        )
                    },
                    TensorFormat {
                        role: TensorRole::Scale,
                        dtype: DType::F32,
                        sharded: Some(0),
                        scaling: Some(Scaling::Constant {
                            axes: vec![AxisKind::Head],
                            bits: (1..9).collect(),
                        }),
                        ..tensor("s", &[(AxisKind::Head, 8)])
                    },
                ],
            )
        },
        CacheGroup {
            kind: GroupKind::StateSlots,
            block_tokens: 0,
            layers: vec![LayerFormat {
                layer: 7,
                draft: true,
                tensors: vec![tensor("state", &[(AxisKind::State, 128)])],
            }],
            name: "state".into(),
        },
    ])
    .expect("valid");
    assert_eq!(
        everything.fingerprint().to_string(),
        "14800c36d24550a9090a48d2fd0e76660df96bfd39aa559f7cf98eafa65e5c75"
    );
}

#[test]
fn a_fingerprint_covers_every_field() {
    let base = small();
    let mut seen = std::collections::BTreeSet::from([base.fingerprint().to_string()]);
    let changes: [fn(&mut ModelIdentity, &mut CacheGroup); 13] = [
        |m, _| m.model_type = "other".into(),
        |m, _| m.id = Some("x".into()),
        |m, _| m.revision = Some("x".into()),
        |m, _| *m = m.clone().with_fact("vocab_size", 5),
        |_, g| g.name = "x".into(),
        |_, g| g.kind = GroupKind::SlidingWindow { tokens: 5 },
        |_, g| g.layers[1].layer = 2,
        |_, g| g.layers[1].draft = true,
        |_, g| g.layers[1].tensors[0].name = "x".into(),
        |_, g| g.layers[1].tensors[0].role = TensorRole::Latent,
        |_, g| g.layers[1].tensors[0].dtype = DType::F16,
        |_, g| g.layers[1].tensors[0].sharded = None,
        |_, g| g.layers[1].tensors[0].axes.swap(0, 1),
    ];
    for change in changes {
        let (mut model, mut group) = (base.model().clone(), base.groups()[0].clone());
        change(&mut model, &mut group);
        // Swapped axes move the sharded one too.
        for tensor in &mut group.layers[1].tensors {
            let heads = tensor.axes.iter().position(|a| a.kind == AxisKind::Head);
            tensor.sharded = tensor.sharded.and(heads.map(|h| h as u32));
        }
        let format = KvFormat::new(model, vec![group]).expect("valid");
        assert!(seen.insert(format.fingerprint().to_string()), "{format:?}");
    }
}

#[test]
fn formats_survive_the_wire() {
    let format = llama();
    let bytes = rmp_serde::to_vec_named(&format).expect("encodes");
    assert_eq!(
        rmp_serde::from_slice::<KvFormat>(&bytes).expect("decodes"),
        format
    );
    let bytes = rmp_serde::to_vec(&format).expect("encodes");
    assert_eq!(
        rmp_serde::from_slice::<KvFormat>(&bytes).expect("decodes"),
        format
    );
}

#[test]
fn decoding_checks_what_it_decodes() {
    let mut json = serde_json::to_value(small()).expect("serialises");
    json["groups"][0]["layers"][1]["layer"] = 0.into();
    let error = serde_json::from_value::<KvFormat>(json).expect_err("refused");
    assert!(error.to_string().contains("there twice"), "{error}");
}

#[test]
fn formats_that_cannot_be_are_refused() {
    use AxisKind::*;
    let one = |axes| vec![group("full", vec![tensor("k", axes)])];
    let cases = [
        (vec![], "groups is empty"),
        (one(&[]), "axes is empty"),
        (one(&[(Token, 8)]), "8 tokens in a block of 16"),
        (one(&[(Token, 16), (Dim, 0)]), "axes[1].extent is zero"),
        (
            one(&[(Token, 4), (Dim, 2), (Token, 2)]),
            "8 tokens in a block of 16",
        ),
        (one(&[(Kv, 3), (Token, 16)]), "extent 3, not 2"),
        (one(&[(Token, 16), (Dim, u64::MAX)]), "overflows"),
        (one(&[(Token, 16), (Dim, 1 << 50)]), "more than the"),
        (
            vec![group("full", vec![]), group("b", vec![])],
            "tensors is empty",
        ),
        (
            vec![
                group("full", vec![tensor("k", &[(Token, 16)])]),
                group("full", vec![tensor("k", &[(Token, 16)])]),
            ],
            "full is there twice",
        ),
        (
            vec![group(
                "full",
                vec![tensor("k", &[(Token, 16)]), tensor("k", &[(Token, 16)])],
            )],
            "k is there twice",
        ),
        (
            vec![CacheGroup {
                kind: GroupKind::StateSlots,
                ..group("s", vec![tensor("k", &[(State, 16)])])
            }],
            "block_tokens 16 does not fit",
        ),
        (
            vec![CacheGroup {
                block_tokens: 0,
                ..group("s", vec![tensor("k", &[(Dim, 16)])])
            }],
            "block_tokens 0 does not fit",
        ),
        (
            vec![CacheGroup {
                layers: vec![],
                ..group("s", vec![])
            }],
            "layers is empty",
        ),
        (
            vec![group(
                "full",
                vec![TensorFormat {
                    sharded: Some(0),
                    ..tensor("k", &[(Token, 16)])
                }],
            )],
            "axis 0 cannot be the sharded one",
        ),
        (
            vec![group(
                "full",
                vec![TensorFormat {
                    scaling: Some(Scaling::Tensor { name: "s".into() }),
                    ..tensor("k", &[(Token, 16)])
                }],
            )],
            "no scale tensor s",
        ),
        (
            vec![group(
                "full",
                (0..=limits::LAYER_TENSORS)
                    .map(|n| tensor(&n.to_string(), &[(Token, 16)]))
                    .collect(),
            )],
            "groups[0].layers[0].tensors: 257 is more than the 256 allowed",
        ),
    ];
    for (groups, wanted) in cases {
        let message = refused(groups);
        assert!(message.contains(wanted), "{message:?}, not {wanted:?}");
    }
    assert!(KvFormat::opaque(0, 1).is_err());
    assert!(KvFormat::opaque(4096, u32::MAX).is_err());
}

#[test]
fn a_uniform_placement_takes_what_a_rank_must_keep() {
    let format = llama();
    for tp in [1, 2, 8] {
        let topology = Topology::tensor_parallel(&format, tp - 1, tp);
        let uniform = KvPlacement::uniform(&format, topology, &[100], Packing::OneMemory, 4096)
            .expect("valid");
        let bytes = 131_072 * 16 * 100 / u64::from(tp);
        assert_eq!(uniform.memory_bytes(), [bytes]);
        let last = uniform.tensors().last().expect("tensors");
        let each = 8 / u64::from(tp);
        let shard = Shard {
            first: 8 - each,
            count: each,
        };
        assert_eq!(last.shard, Some(shard));
    }
    // 16 ranks of 8 heads: two ranks keep each head.
    let heads = |rank| {
        let topology = Topology::tensor_parallel(&format, rank, 16);
        let uniform = KvPlacement::uniform(&format, topology, &[1], Packing::PerTensor, 1);
        let uniform = uniform.expect("valid");
        assert_eq!(uniform.memory_bytes().len(), 64);
        uniform.tensors()[0].shard.expect("sharded").first
    };
    assert_eq!([0, 1, 2, 15].map(heads), [0, 0, 1, 7]);
    // A latent is the same on every rank.
    let format = models::builtin("deepseek-v3", 64, DType::Bf16).expect("built in");
    let topology = Topology::tensor_parallel(&format, 3, 8);
    let uniform = KvPlacement::uniform(&format, topology, &[10], Packing::OneMemory, 256);
    assert_eq!(uniform.expect("valid").memory_bytes(), [70_272 * 64 * 10]);
}

#[test]
fn uniform_refuses_what_it_cannot_place() {
    let format = llama();
    let uniform = |topology, blocks: &[u32], align| {
        KvPlacement::uniform(&format, topology, blocks, Packing::OneMemory, align)
            .expect_err("refused")
            .to_string()
    };
    let single = Topology::single(&format);
    let three = Topology::tensor_parallel(&format, 0, 3);
    assert!(uniform(three, &[1], 1).contains("8 along head cannot be split evenly over tp 3"));
    assert!(uniform(single, &[], 1).contains("num_blocks: 0 given, 1 expected"));
    assert!(uniform(single, &[0], 1).contains("num_blocks is zero"));
    assert!(uniform(single, &[1], 3).contains("alignment 3"));
    let outside = Topology::tensor_parallel(&format, 8, 8);
    assert!(uniform(outside, &[1], 1).contains("tp rank 8 of 8"));
}

#[test]
fn windows_deal_all_layers() {
    for (layers, pp) in [(80, 4), (61, 4), (3, 8)] {
        let windows: Vec<_> = (0..pp).map(|r| LayerWindow::even(layers, r, pp)).collect();
        assert_eq!(windows[0].first, 0);
        assert_eq!(windows.last().expect("windows").end, layers);
        for (a, b) in windows.iter().zip(&windows[1..]) {
            assert_eq!(a.end, b.first);
            assert!(a.end - a.first >= b.end - b.first);
        }
    }
}

#[test]
fn placements_that_cannot_be_are_refused() {
    type Change = fn(&mut Topology, &mut Vec<PlacedTensor>);
    let cases: &[(Change, &str)] = &[
        (|t, _| t.rank = Rank { tp: 1, ..t.rank }, "tp rank 1 of 1"),
        (|t, _| t.layers.end = 3, "layers 0..3 of a model with 2"),
        (|t, _| t.layers.end = 0, "layers 0..0"),
        (|t, _| t.layers.end = 1, "not among this rank's layers"),
        (|_, p| drop(p.pop()), "layer 1 v is not placed"),
        (|_, p| p.push(p[0].clone()), "layer 0 k is there twice"),
        (|_, p| p[0].tensor = 9, "layer 0 k is not placed"),
        (
            |_, p| {
                p.push(PlacedTensor {
                    tensor: 9,
                    ..p[0].clone()
                })
            },
            "tensor 9 is not in the format",
        ),
        (
            |_, p| p[1].num_blocks = 3,
            "v has 3 blocks, group 0 (full) layer 0 k has 4",
        ),
        (|_, p| p[1].memory = 1, "memory 1 of 1"),
        (
            |_, p| p[3].offset += 1,
            "ends at byte 1025 of memory 0, which has 1024",
        ),
        (|_, p| p[3].offset = u64::MAX, "overflows"),
        (
            |_, p| p[0].block_stride = 63,
            "the stride of block is 63 bytes, what lies within takes 64",
        ),
        (|_, p| p[0].block_stride = u64::MAX, "overflows"),
        (
            |_, p| p[0].strides[1] = 1,
            "the stride of head is 1 bytes, what lies within takes 2",
        ),
        (|_, p| p[0].strides[0] = 0, "stride of token is 0"),
        (
            |_, p| p[0].strides.truncate(1),
            "strides: 1 given, 2 expected",
        ),
        (
            |_, p| p[0].shard = Some(Shard { first: 1, count: 2 }),
            "shard 1+2 of 2",
        ),
        (
            |_, p| p[0].shard = Some(Shard { first: 0, count: 0 }),
            "shard 0+0 of 2",
        ),
        (
            |_, p| p[1].offset -= 1,
            "group 0 (full) layer 0 k and group 0 (full) layer 0 v overlap in memory 0",
        ),
    ];
    for (change, wanted) in cases {
        let message = misplaced(change).to_string();
        assert!(message.contains(wanted), "{message:?}, not {wanted:?}");
    }
}

#[test]
fn groups_of_one_pool_may_lie_on_the_same_bytes() {
    let tensors = || vec![tensor("k", &[(AxisKind::Token, 16)])];
    let format = format(vec![group("full", tensors()), group("sliding", tensors())]);
    let format = format.expect("valid");
    let topology = Topology::single(&format);
    let uniform = KvPlacement::uniform(&format, topology, &[4, 4], Packing::OneMemory, 1);
    let mut tensors = uniform.expect("valid").tensors().to_vec();
    tensors[1].offset = tensors[0].offset;
    let place = |tensors: &[PlacedTensor], pools| {
        PlacementDesc::new(&format, topology, tensors.to_vec(), pools, vec![256])
    };
    assert!(place(&tensors, vec![0, 0]).is_ok());
    assert!(matches!(
        place(&tensors, vec![0, 1]),
        Err(LayoutError::Alias { .. })
    ));
    // A block of one group on another block of the other.
    tensors[1].offset = 32;
    assert!(matches!(
        place(&tensors, vec![0, 0]),
        Err(LayoutError::Overlap { .. })
    ));
}

#[test]
fn differences_are_named_once_with_the_layers_they_are_in() {
    let (producer, consumer) = (llama(), {
        let mut groups = llama().groups().to_vec();
        groups[0].block_tokens = 32;
        for layer in &mut groups[0].layers {
            for tensor in &mut layer.tensors {
                tensor.axes[0].extent = 32;
                if layer.layer != 5 {
                    tensor.dtype = DType::F16;
                }
            }
        }
        KvFormat::new(llama().model().clone().with_fact("vocab_size", 7), groups).expect("valid")
    });
    let place = |format: &KvFormat, tp| {
        let topology = Topology::tensor_parallel(format, 0, tp);
        KvPlacement::uniform(format, topology, &[4], Packing::OneMemory, 64)
            .and_then(|u| u.describe(format))
            .expect("valid")
    };
    let (p, c) = (place(&producer, 4), place(&consumer, 8));
    let side = |format, placement| Side { format, placement };
    let found = compare(&side(&producer, &p), &side(&consumer, &c));
    let lines: Vec<String> = found
        .iter()
        .map(|d| format!("{} {} {}", d.field, d.producer, d.consumer))
        .collect();
    assert_eq!(
        lines,
        [
            "model.vocab_size 128256 7",
            "groups[0].layers[0-4,6-31].k.dtype bf16 f16",
            "groups[0].layers[0-4,6-31].v.dtype bf16 f16",
            "groups[0].block_tokens 16 32",
            "groups[0].layers[0-31].k.shard 0..2 0..1",
            "groups[0].layers[0-31].v.shard 0..2 0..1",
        ]
    );
    let shown = LayoutMismatch { differences: found }.to_string();
    assert!(
        shown.contains("start the decode instance with --block-size 16"),
        "{shown}"
    );
    assert!(compare(&side(&producer, &p), &side(&producer, &p)).is_empty());
}

#[test]
fn constant_scales_are_compared_by_value() {
    let scaled = |scaling: Option<Scaling>| {
        let k = TensorFormat {
            scaling,
            ..tensor("k", &[(AxisKind::Token, 16), (AxisKind::Head, 5)])
        };
        format(vec![group("full", vec![k])]).expect("valid")
    };
    let by_head = |last| {
        let half = 0.5_f32.to_bits();
        Some(Scaling::Constant {
            axes: vec![AxisKind::Head],
            bits: vec![half, half, half, half, last],
        })
    };
    let found = |p: &KvFormat, c: &KvFormat| -> Vec<String> {
        let place = |format: &KvFormat| {
            let topology = Topology::single(format);
            KvPlacement::uniform(format, topology, &[4], Packing::OneMemory, 64)
                .and_then(|u| u.describe(format))
                .expect("valid")
        };
        let (at_p, at_c) = (place(p), place(c));
        let side = |format, placement| Side { format, placement };
        let found = compare(&side(p, &at_p), &side(c, &at_c));
        found.into_iter().map(|d| d.field).collect()
    };
    // The SHA-256 of these two lists begins with the same 32 bits, as do the lists themselves.
    let (one, other) = (scaled(by_head(0x3f01_59e0)), scaled(by_head(0x3f02_405f)));
    assert_eq!(found(&one, &other), ["groups[0].layers[0].k.scaling"]);
    assert!(found(&one, &one).is_empty());
    // Ones, given in whichever way, are no scaling.
    let ones = Some(Scaling::Constant {
        axes: vec![AxisKind::Head],
        bits: vec![1.0_f32.to_bits(); 5],
    });
    let plain = scaled(None);
    assert!(found(&plain, &scaled(ones)).is_empty());
    assert!(found(&plain, &scaled(Some(Scaling::constant(1.0)))).is_empty());
}
