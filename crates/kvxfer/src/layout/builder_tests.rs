//! Layouts that engines have, and what a builder says of those that cannot be.

use super::*;
use crate::ids::Rank;

const BLOCKS: u64 = 10;
const SPAN: Span = Span {
    addr: 0x7000_0000_0000,
    len: 1 << 30,
};

fn axis(kind: AxisKind) -> Dim {
    Dim::Axis(kind)
}

/// Dense, the last dimension innermost.
fn dense(start: u64, shape: &[u64], element_bytes: u64) -> EngineTensor {
    let mut step = 1_i64;
    let mut strides: Vec<i64> = shape
        .iter()
        .rev()
        .map(|extent| {
            let stride = step;
            step *= i64::try_from(*extent).expect("small");
            stride
        })
        .collect();
    strides.reverse();
    EngineTensor {
        start: Start::Address(SPAN.addr + start),
        shape: shape.to_vec(),
        strides,
        element_bytes,
    }
}

fn tensor(name: &str, role: TensorRole, dtype: DType, axes: &[(AxisKind, u64)]) -> TensorFormat {
    let head = axes.iter().position(|a| a.0 == AxisKind::Head);
    TensorFormat {
        name: name.into(),
        role,
        dtype,
        axes: axes.iter().map(|a| Axis::new(a.0, a.1)).collect(),
        sharded: head.map(|h| u32::try_from(h).expect("few axes")),
        scaling: None,
    }
}

/// One layer of these tensors.
fn one_layer(kind: GroupKind, block_tokens: u32, tensors: Vec<TensorFormat>) -> KvFormat {
    let layer = LayerFormat {
        layer: 0,
        draft: false,
        tensors,
    };
    let group = CacheGroup {
        name: "full".into(),
        kind,
        block_tokens,
        layers: vec![layer],
    };
    KvFormat::new(ModelIdentity::new("test", None), vec![group]).expect("valid")
}

/// One layer with k and v: 16 tokens, 8 heads, 128 elements.
fn kv() -> KvFormat {
    use AxisKind::{Dim, Head, Token};
    let axes = [(Token, 16), (Head, 8), (Dim, 128)];
    let k = tensor("k", TensorRole::Key, DType::Bf16, &axes);
    let v = tensor("v", TensorRole::Value, DType::Bf16, &axes);
    one_layer(GroupKind::Full, 16, vec![k, v])
}

fn builder(format: &KvFormat) -> LayoutBuilder<'_> {
    LayoutBuilder::new(format, Topology::single(format), vec![SPAN])
}

/// Offset, block stride and strides of every tensor.
fn lies(desc: &PlacementDesc) -> Vec<(u64, u64, Vec<u64>)> {
    let tensors = desc.tensors().iter();
    tensors
        .map(|t| (t.offset, t.block_stride, t.strides.clone()))
        .collect()
}

#[test]
fn k_and_v_stacked_or_beside_each_other() {
    let format = kv();
    let block = 16 * 8 * 128 * 2;
    let plain = [
        axis(AxisKind::Token),
        axis(AxisKind::Head),
        axis(AxisKind::Dim),
    ];
    for (shape, block_first) in [
        ([2, BLOCKS, 16, 8, 128], false),
        ([BLOCKS, 2, 16, 8, 128], true),
    ] {
        let engine = dense(0, &shape, 2);
        let mut builder = builder(&format);
        for (name, which) in [("k", 0), ("v", 1)] {
            let mut dims = vec![Dim::At(which), Dim::Block];
            if block_first {
                dims.reverse();
            }
            dims.extend(plain.clone());
            builder.tensor(0, 0, name, &engine, &dims).expect("taken");
        }
        let (built, desc) = builder.describe().expect("valid");
        assert_eq!(built, format);
        let strides = vec![2048, 256, 2];
        let (v, stride) = if block_first {
            (block, 2 * block)
        } else {
            (BLOCKS * block, block)
        };
        assert_eq!(
            lies(&desc),
            [(0, stride, strides.clone()), (v, stride, strides)]
        );
    }
}

#[test]
fn what_other_dimensions_count_is_not_fused_again() {
    use AxisKind::{Dim as D, Head, Token};
    // Blocks of 64 tokens in 4 kernel blocks of 16, each one dimension.
    let axes = [(Token, 64), (Head, 8), (D, 128)];
    let k = tensor("k", TensorRole::Key, DType::Bf16, &axes);
    let format = one_layer(GroupKind::Full, 64, vec![k]);
    let read = |shape: &[u64], dims: &[Dim]| {
        let mut builder = builder(&format);
        let engine = dense(0, shape, 2);
        builder.tensor(0, 0, "k", &engine, dims).expect("taken");
        let (built, desc) = builder.describe().expect("valid");
        let axes = &built.tensor(0, 0, 0).expect("there").axes;
        let axes: Vec<_> = axes.iter().map(|a| (a.kind, a.extent)).collect();
        (axes, lies(&desc))
    };
    let kernel = 16 * 8 * 128 * 2;
    let row = vec![(0, 4 * kernel, vec![kernel, 2048, 256, 2])];
    let digits = vec![(Token, 4), (Token, 16), (Head, 8), (D, 128)];
    let per_block = Dim::KernelBlock { per_block: 4 };
    let fused = Dim::Fused(vec![Token, Head, D]);
    let shape = [4 * BLOCKS, 16 * 8 * 128];
    assert_eq!(
        read(&shape, &[per_block, fused.clone()]),
        (digits.clone(), row.clone())
    );
    // The same as a dimension of its own.
    let shape = [BLOCKS, 4, 16 * 8 * 128];
    assert_eq!(
        read(&shape, &[Dim::Block, axis(Token), fused]),
        (digits, row)
    );
    // The vectors' digit inside, the other one fused outside.
    let shape = [BLOCKS, 64 * 8 * 16, 8];
    let fused = Dim::Fused(vec![Token, Head, D]);
    assert_eq!(
        read(&shape, &[Dim::Block, fused, axis(D)]),
        (
            vec![(Token, 64), (Head, 8), (D, 16), (D, 8)],
            vec![(0, 4 * kernel, vec![2048, 256, 16, 2])]
        )
    );
}

#[test]
fn vectors_and_kernel_blocks_are_digits() {
    use AxisKind::{Dim as D, Head, Token};
    // Blocks of 64 tokens; the kernel's have 16. K is [blocks, heads, dim/8, tokens, 8], V is
    // [blocks, heads, tokens/8, dim, 8].
    let axes = [(Token, 64), (Head, 8), (D, 128)];
    let k = tensor("k", TensorRole::Key, DType::Bf16, &axes);
    let v = tensor("v", TensorRole::Value, DType::Bf16, &axes);
    let format = one_layer(GroupKind::Full, 64, vec![k, v]);
    let kernel_blocks = Dim::KernelBlock { per_block: 4 };
    let bytes = 4 * BLOCKS * 16 * 8 * 128 * 2;
    let mut builder = builder(&format);
    builder
        .tensor(
            0,
            0,
            "k",
            &dense(0, &[4 * BLOCKS, 8, 16, 16, 8], 2),
            &[
                kernel_blocks.clone(),
                axis(Head),
                axis(D),
                axis(Token),
                axis(D),
            ],
        )
        .expect("taken")
        .tensor(
            0,
            0,
            "v",
            &dense(bytes, &[4 * BLOCKS, 8, 2, 128, 8], 2),
            &[kernel_blocks, axis(Head), axis(Token), axis(D), axis(Token)],
        )
        .expect("taken");
    let (built, desc) = builder.describe().expect("valid");
    let axes = |t: u32| {
        let tensor = built.tensor(0, 0, t).expect("there");
        let axes = tensor.axes.iter().map(|a| (a.kind, a.extent));
        (axes.collect::<Vec<_>>(), tensor.sharded)
    };
    assert_eq!(
        axes(0),
        (
            vec![(Token, 4), (Head, 8), (D, 16), (Token, 16), (D, 8)],
            Some(1)
        )
    );
    assert_eq!(
        axes(1),
        (
            vec![(Token, 4), (Head, 8), (Token, 2), (D, 128), (Token, 8)],
            Some(1)
        )
    );
    let kernel = 16 * 8 * 128 * 2;
    assert_eq!(
        lies(&desc),
        [
            (0, 4 * kernel, vec![kernel, 4096, 256, 16, 2]),
            (bytes, 4 * kernel, vec![kernel, 4096, 2048, 16, 2]),
        ]
    );
    assert_eq!(desc.num_blocks(0), Some(10));
    assert_eq!(built.bytes_per_token(), format.bytes_per_token());
}

#[test]
fn a_record_with_its_scales_inside() {
    use AxisKind::{Dim as D, Latent, Token};
    // 656 bytes a token: 512 fp8, 4 f32, 64 bf16.
    let mut latent = tensor(
        "latent",
        TensorRole::Latent,
        DType::F8E4m3,
        &[(Token, 64), (Latent, 512)],
    );
    latent.scaling = Some(Scaling::Tensor {
        name: "scale".into(),
    });
    let scale = tensor(
        "scale",
        TensorRole::Scale,
        DType::F32,
        &[(Token, 64), (Latent, 4)],
    );
    let rope = tensor(
        "rope",
        TensorRole::Rope,
        DType::Bf16,
        &[(Token, 64), (D, 64)],
    );
    let format = one_layer(GroupKind::Full, 64, vec![latent, scale, rope]);
    assert_eq!(format.bytes_per_token(), 656);
    let view = |start: u64, n: u64, bytes: u64| EngineTensor {
        strides: [64 * 656, 656, bytes]
            .map(|s| i64::try_from(s / bytes).expect("small"))
            .to_vec(),
        ..dense(start, &[BLOCKS, 64, n], bytes)
    };
    let mut builder = builder(&format);
    for (name, start, n, bytes, kind) in [
        ("latent", 0, 512, 1, Latent),
        ("scale", 512, 4, 4, Latent),
        ("rope", 528, 64, 2, D),
    ] {
        let dims = [Dim::Block, axis(Token), axis(kind)];
        builder
            .tensor(0, 0, name, &view(start, n, bytes), &dims)
            .expect("taken");
    }
    let (_, desc) = builder.describe().expect("valid");
    assert_eq!(
        lies(&desc),
        [
            (0, 64 * 656, vec![656, 1]),
            (512, 64 * 656, vec![656, 4]),
            (528, 64 * 656, vec![656, 2]),
        ]
    );
}

#[test]
fn slots_with_a_state_and_a_convolution_in_three_parts() {
    use AxisKind::{Channel, Dim as D, Head, State, Width};
    // The whole model: 8 heads; channels 512 of x, 128 of B, 128 of C. Rank 1 of 2 has half of each,
    // in one tensor [slots, width, x | B | C].
    let part = |name: &str, channels| {
        let mut t = tensor(
            name,
            TensorRole::Conv,
            DType::Bf16,
            &[(Channel, channels), (Width, 3)],
        );
        t.sharded = Some(0);
        t
    };
    let state = tensor(
        "state",
        TensorRole::State,
        DType::F32,
        &[(Head, 8), (D, 64), (State, 128)],
    );
    let tensors = vec![
        state,
        part("conv_x", 512),
        part("conv_b", 128),
        part("conv_c", 128),
    ];
    let format = one_layer(GroupKind::StateSlots, 0, tensors);
    let topology = Topology::tensor_parallel(&format, 1, 2);
    let mut builder = LayoutBuilder::new(&format, topology, vec![SPAN]);
    let conv_at = BLOCKS * 4 * 64 * 128 * 4;
    let dims = [Dim::Block, axis(Head), axis(D), axis(State)];
    builder
        .tensor(0, 0, "state", &dense(0, &[BLOCKS, 4, 64, 128], 4), &dims)
        .expect("taken");
    for (name, first, channels) in [("conv_x", 0, 256), ("conv_b", 256, 64), ("conv_c", 320, 64)] {
        let engine = EngineTensor {
            shape: vec![BLOCKS, 3, channels],
            ..dense(conv_at + 2 * first, &[BLOCKS, 3, 384], 2)
        };
        let dims = [Dim::Block, axis(Width), axis(Channel)];
        builder.tensor(0, 0, name, &engine, &dims).expect("taken");
    }
    let (built, desc) = builder.describe().expect("valid");
    let shards: Vec<_> = desc
        .tensors()
        .iter()
        .map(|t| t.shard.map(|s| (s.first, s.count)))
        .collect();
    assert_eq!(shards, [(4, 4), (256, 256), (64, 64), (64, 64)].map(Some));
    assert_eq!(lies(&desc)[2], (conv_at + 512, 3 * 384 * 2, vec![768, 2]));
    // The whole model's extents are in the format, the state's slots have no tokens.
    assert_eq!(
        built.groups()[0].block_bytes(),
        8 * 64 * 128 * 4 + 768 * 3 * 2
    );
    assert_eq!(built.bytes_per_token(), 0);
}

#[test]
fn ranks_that_share_a_head_need_no_dimension_for_it() {
    let format = kv();
    for (rank, head) in [(0, 0), (1, 0), (15, 7)] {
        let topology = Topology::tensor_parallel(&format, rank, 16);
        let mut builder = LayoutBuilder::new(&format, topology, vec![SPAN]);
        let dims = [Dim::Block, axis(AxisKind::Token), axis(AxisKind::Dim)];
        for (name, start) in [("k", 0), ("v", 1 << 20)] {
            let engine = dense(start, &[BLOCKS, 16, 128], 2);
            builder.tensor(0, 0, name, &engine, &dims).expect("taken");
        }
        let (built, desc) = builder.describe().expect("valid");
        assert_eq!(
            desc.tensors()[0].shard,
            Some(Shard {
                first: head,
                count: 1
            })
        );
        assert_eq!(built.bytes_per_token(), format.bytes_per_token());
    }
}

#[test]
fn a_pipeline_rank_describes_its_layers_only() {
    let format = models::builtin("deepseek-v3", 64, DType::Bf16).expect("built in");
    let layers = LayerWindow { first: 30, end: 61 };
    let topology = Topology {
        rank: Rank {
            dp: 1,
            pp: 1,
            tp: 0,
        },
        pp: 2,
        dp: 4,
        layers,
        ..Topology::single(&format)
    };
    // [layers of this rank, blocks, tokens, 576]
    let engine = dense(0, &[31, BLOCKS, 64, 576], 2);
    let build = |end: u32| {
        let mut builder = LayoutBuilder::new(&format, topology, vec![SPAN]);
        for layer in 30..end {
            let dims = [
                Dim::At(u64::from(layer - 30)),
                Dim::Block,
                axis(AxisKind::Token),
                axis(AxisKind::Latent),
            ];
            builder.tensor(0, layer, "latent", &engine, &dims)?;
        }
        builder.describe()
    };
    let (built, desc) = build(61).expect("valid");
    assert_eq!(built, format);
    assert_eq!(desc.tensors().len(), 31);
    let message = build(60).expect_err("refused").to_string();
    assert_eq!(message, "group 0 (full) layer 60 latent is not placed");
    let message = build(62).expect_err("refused").to_string();
    assert_eq!(message, "group 0 layer 61 has no tensor latent");
}

/// The message for a cache of k and v whose tensors have been changed.
fn refused(change: impl FnOnce(&mut EngineTensor, &mut EngineTensor, &mut Vec<Dim>)) -> String {
    let format = kv();
    let mut dims = vec![
        Dim::Block,
        axis(AxisKind::Token),
        axis(AxisKind::Head),
        axis(AxisKind::Dim),
    ];
    let mut k = dense(0, &[BLOCKS, 16, 8, 128], 2);
    let mut v = dense(1 << 20, &[BLOCKS, 16, 8, 128], 2);
    change(&mut k, &mut v, &mut dims);
    let build = || {
        let mut builder = builder(&format);
        builder.tensor(0, 0, "k", &k, &dims)?;
        builder.tensor(0, 0, "v", &v, &dims)?;
        builder.describe()
    };
    let error = build().expect_err("refused");
    error.to_string()
}

#[test]
fn what_cannot_be_is_refused_with_layer_tensor_and_axis() {
    type Change = fn(&mut EngineTensor, &mut EngineTensor, &mut Vec<Dim>);
    let cases: &[(Change, &str)] = &[
        (
            |k, _, _| k.element_bytes = 1,
            "layer 0 k: elements of 1 bytes, bf16 has 2",
        ),
        (
            |k, _, _| k.shape[2] = 4,
            "layer 0 k: 4 along head, this rank has 8",
        ),
        (
            |k, _, _| k.shape[1] = 32,
            "layer 0 k: 32 along token, this rank has 16",
        ),
        (
            |k, _, _| k.shape[3] = u64::MAX,
            "along dim, this rank has 128",
        ),
        (
            |_, v, _| v.strides[1] = -1024,
            "layer 0 v: the stride of token is -1024 elements",
        ),
        (
            |_, v, _| v.strides[0] = 0,
            "layer 0 v: the stride of block is 0 bytes, what lies within takes 2",
        ),
        (
            |_, v, _| v.strides[0] = 8192,
            "layer 0 v: the stride of block is 16384 bytes, what lies within takes 32768",
        ),
        (
            |_, v, _| v.strides[2] = 64,
            "layer 0 v: the stride of head is 128 bytes, what lies within takes 256",
        ),
        (
            |_, v, _| v.strides[0] = i64::MAX,
            "layer 0 v: the size in bytes overflows",
        ),
        (
            |_, v, _| v.strides.truncate(3),
            "layer 0 v: strides: 3 given, 4 expected",
        ),
        (
            |_, _, d| d.truncate(3),
            "layer 0 k: dims: 3 given, 4 expected",
        ),
        (
            |_, _, d| d[2] = axis(AxisKind::Latent),
            "layer 0 k: no dimension counts head",
        ),
        (
            |_, _, d| d[2] = Dim::At(3),
            "layer 0 k: no dimension counts head",
        ),
        (
            |_, _, d| d[2] = Dim::At(8),
            "layer 0 k: index 8 of a dimension of 8",
        ),
        (
            |_, _, d| d[0] = Dim::At(0),
            "layer 0 k: no dimension counts block",
        ),
        (
            |_, _, d| d[1] = Dim::Block,
            "layer 0 k: the block dimension is there twice",
        ),
        (
            |_, _, d| d[0] = Dim::KernelBlock { per_block: 4 },
            "layer 0 k: 10 kernel blocks, 4 to a block",
        ),
        (
            |_, _, d| d[0] = Dim::KernelBlock { per_block: 0 },
            "layer 0 k: 10 kernel blocks, 0 to a block",
        ),
        (
            |_, _, d| d[0] = Dim::KernelBlock { per_block: 2 },
            "layer 0 k: 32 along token, this rank has 16",
        ),
        (
            |_, _, d| d[3] = Dim::Fused(vec![AxisKind::Head, AxisKind::Dim]),
            "layer 0 k: head is dealt to ranks and cannot be split too",
        ),
        (
            |k, _, d| {
                k.shape[1] = 3;
                d[3] = Dim::Fused(vec![AxisKind::Token, AxisKind::Dim]);
            },
            "layer 0 k: 3 along token, this rank has 16",
        ),
        (
            |k, _, d| {
                k.shape[1] = 32;
                d[3] = Dim::Fused(vec![AxisKind::Token, AxisKind::Dim]);
            },
            "layer 0 k: 32 along token, this rank has 16",
        ),
        (
            |k, _, d| {
                k.shape[1] = 4;
                d[3] = Dim::Fused(vec![AxisKind::Token, AxisKind::Dim]);
            },
            "layer 0 k: 128 along token, this rank has 512",
        ),
        (
            |_, _, d| {
                d[1] = Dim::Fused(vec![AxisKind::Token]);
                d[3] = Dim::Fused(vec![AxisKind::Token, AxisKind::Dim]);
            },
            "layer 0 k: token is fused twice",
        ),
        (
            |k, v, _| v.start = k.start,
            "layer 0 k and group 0 (full) layer 0 v are the same memory",
        ),
        (
            |_, v, _| v.start = Start::Address(SPAN.addr + 8192),
            "layer 0 k and group 0 (full) layer 0 v overlap in memory 0",
        ),
        (
            |k, _, _| k.start = Start::Address(SPAN.addr - 1),
            "layer 0 k is at 0x6fffffffffff, which is in none of the memories",
        ),
        (
            |_, v, _| v.start = Start::Address(SPAN.addr + SPAN.len - 2),
            "layer 0 v ends at byte",
        ),
        (
            |_, v, _| {
                v.start = Start::Offset {
                    memory: 1,
                    offset: 0,
                }
            },
            "layer 0 v: memory 1 of 1",
        ),
        (
            |_, v, _| {
                v.start = Start::Offset {
                    memory: 0,
                    offset: u64::MAX,
                }
            },
            "layer 0 v: the size in bytes overflows",
        ),
        (
            |_, v, _| v.shape[0] = 9,
            "layer 0 v has 9 blocks, group 0 (full) layer 0 k has 10",
        ),
        (
            |k, v, _| (k.shape[0], v.shape[0]) = (0, 0),
            "layer 0 k: num_blocks is zero",
        ),
        (
            |k, _, _| k.shape[0] = 1 << 32,
            "layer 0 k: blocks: 4294967296 is more than the 4294967295 allowed",
        ),
    ];
    for (change, wanted) in cases {
        let message = refused(change);
        assert!(message.contains(wanted), "{message:?}, not {wanted:?}");
    }
}

#[test]
fn names_shards_and_memories_are_checked() {
    let format = kv();
    let dims = [
        Dim::Block,
        axis(AxisKind::Token),
        axis(AxisKind::Head),
        axis(AxisKind::Dim),
    ];
    let engine = dense(0, &[BLOCKS, 16, 3, 128], 2);
    let mut odd = builder(&format);
    let unknown = odd.tensor(0, 0, "q", &engine, &dims).expect_err("refused");
    assert_eq!(unknown.to_string(), "group 0 layer 0 has no tensor q");
    for (first, count) in [(6, 3), (0, 0), (u64::MAX, 3)] {
        let shard = Shard { first, count };
        let error = odd
            .tensor_with_shard(0, 0, "k", &engine, &dims, shard)
            .expect_err("refused");
        assert!(matches!(error, LayoutError::Shard { .. }), "{error}");
    }
    // Heads that are not dealt evenly.
    let shard = Shard { first: 5, count: 3 };
    odd.tensor_with_shard(0, 0, "k", &engine, &dims, shard)
        .expect("taken");
    let three = Topology::tensor_parallel(&format, 0, 3);
    let mut uneven = LayoutBuilder::new(&format, three, vec![SPAN]);
    let error = uneven
        .tensor(0, 0, "k", &engine, &dims)
        .expect_err("refused");
    assert!(matches!(error, LayoutError::UnevenShard { .. }), "{error}");
    // A sharded axis cannot be split.
    let split = dense(0, &[BLOCKS, 16, 2, 4, 128], 2);
    let dims = [
        Dim::Block,
        axis(AxisKind::Token),
        axis(AxisKind::Head),
        axis(AxisKind::Head),
        axis(AxisKind::Dim),
    ];
    let error = builder(&format)
        .tensor(0, 0, "k", &split, &dims)
        .map(|_| ())
        .expect_err("refused");
    assert!(matches!(error, LayoutError::SplitShard { .. }), "{error}");
}

#[test]
fn memory_has_to_be_where_its_span_was() {
    use kvxfer_hipmem::HostBuffer;

    let format = KvFormat::opaque(64, 1).expect("valid");
    let memory = || HostBuffer::new(8192).expect("memory").as_memory();
    let (here, there) = (memory(), memory());
    let span = Span::of(here.as_ref());
    let place = |memory| {
        let mut builder = LayoutBuilder::new(&format, Topology::single(&format), vec![span]);
        let engine = EngineTensor {
            start: Start::Address(span.addr + 128),
            shape: vec![BLOCKS, 64],
            strides: vec![64, 1],
            element_bytes: 1,
        };
        let dims = [Dim::Block, axis(AxisKind::Opaque)];
        builder.tensor(0, 0, "bytes", &engine, &dims)?;
        builder.place(memory)
    };
    let (_, placement) = place(vec![here.clone()]).expect("placed");
    assert_eq!(placement.desc().tensors()[0].offset, 128);
    let moved = place(vec![there]).expect_err("refused");
    assert_eq!(moved.to_string(), "memory 0 is not where its span was");
    assert!(place(vec![]).is_err());
}
