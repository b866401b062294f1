//! Whatever the layouts, block lists, limits and ways to share the work: a plan moves exactly the
//! bytes asked for, each once, and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use kvxfer::blocks::{BlockPair, GroupPairs};
use kvxfer::ids::Rank;
use kvxfer::layout::{
    Axis, AxisKind, CacheGroup, Coordinate, DType, GroupKind, KvFormat, LayerFormat, LayerWindow,
    ModelIdentity, PlacedTensor, PlacementDesc, Shard, Side, TensorFormat, TensorRole, Topology,
};
use kvxfer::plan::{Compiled, LayerScope, OpSource, Plan, PlanLimits, Role};
use proptest::prelude::*;

/// Numbers drawn by proptest, read one after the other: a shorter or smaller tape makes a simpler
/// case, so failures shrink.
#[derive(Debug)]
struct Tape {
    numbers: Vec<u32>,
    at: usize,
}

impl Tape {
    /// A number below `n`; 0 when the tape has run out.
    fn below(&mut self, n: u64) -> u64 {
        let number = self.numbers.get(self.at).copied().unwrap_or(0);
        self.at += 1;
        u64::from(number) % n
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == one_in - 1
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            // A zero leaves the order as it is.
            let j = i - self.below(i as u64 + 1) as usize;
            items.swap(i, j);
        }
    }
}

fn tape() -> impl Strategy<Value = Tape> {
    prop::collection::vec(any::<u32>(), 0..600).prop_map(|numbers| Tape { numbers, at: 0 })
}

/// What a tensor holds, apart from how a side cuts it into axes.
#[derive(Clone)]
struct Logical {
    coordinates: Vec<(Coordinate, u64)>,
    dtype: DType,
    role: TensorRole,
    sharded: bool,
    /// The heads that both ranks keep.
    shard: Option<Shard>,
}

fn logical(tape: &mut Tape, slots: bool, tokens: u64) -> Logical {
    let heads = tape.pick(&[1, 2, 3, 4]);
    let dim = tape.pick(&[4, 8, 1, 6]);
    let (role, coordinates) = match (slots, tape.below(5)) {
        (true, 0..3) => (
            TensorRole::State,
            vec![
                (Coordinate::Head, heads),
                (Coordinate::Dim, dim),
                (Coordinate::State, 3),
            ],
        ),
        (true, _) => (
            TensorRole::Conv,
            vec![(Coordinate::Channel, dim), (Coordinate::Width, 4)],
        ),
        (false, 0 | 1) => (
            TensorRole::Key,
            vec![
                (Coordinate::Token, tokens),
                (Coordinate::Head, heads),
                (Coordinate::Dim, dim),
            ],
        ),
        (false, 2) => (
            TensorRole::KeyValue,
            vec![
                (Coordinate::Kv, 2),
                (Coordinate::Token, tokens),
                (Coordinate::Head, heads),
                (Coordinate::Dim, dim),
            ],
        ),
        (false, 3) => (
            TensorRole::Latent,
            vec![(Coordinate::Token, tokens), (Coordinate::Latent, dim)],
        ),
        (false, _) => (TensorRole::Scale, vec![(Coordinate::Head, heads)]),
    };
    let sharded = coordinates.iter().any(|c| c.0 == Coordinate::Head);
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
fn tensor_format(tape: &mut Tape, name: &str, logical: &Logical) -> TensorFormat {
    let mut axes = Vec::new();
    for &(coordinate, extent) in &logical.coordinates {
        let (whole, halves) = match coordinate {
            Coordinate::Kv => (AxisKind::Kv, None),
            Coordinate::Head => (AxisKind::Head, None),
            Coordinate::Token => (
                AxisKind::Token,
                Some((AxisKind::TokenOuter, AxisKind::TokenInner)),
            ),
            Coordinate::Dim => (
                AxisKind::Dim,
                Some((AxisKind::DimOuter, AxisKind::DimInner)),
            ),
            Coordinate::Latent => (AxisKind::Latent, None),
            Coordinate::State => (AxisKind::State, None),
            Coordinate::Channel => (AxisKind::Channel, None),
            Coordinate::Width => (AxisKind::Width, None),
            other => panic!("no tensor here has {other:?}"),
        };
        match halves {
            Some((outer, inner)) if tape.chance(3) => {
                // Powers of two, or all of it, so that the two sides' splits nest.
                let inner_extent = match extent {
                    8 => tape.pick(&[2, 4]),
                    4 => tape.pick(&[2, 4, 1]),
                    other => other,
                };
                axes.push(Axis::new(outer, extent / inner_extent));
                axes.push(Axis::new(inner, inner_extent));
            }
            _ => axes.push(Axis::new(whole, extent)),
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
struct Formats {
    producer: KvFormat,
    consumer: KvFormat,
    tensors: BTreeMap<(u32, u32, String), Logical>,
    window: LayerWindow,
}

fn formats(tape: &mut Tape) -> Formats {
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
fn strides(
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

fn placement(
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

/// Pairs in stretches and alone; no destination twice.
fn pairs(tape: &mut Tape, src_blocks: u32, dst_blocks: u32) -> Vec<BlockPair> {
    let mut free: BTreeSet<u32> = (0..dst_blocks).collect();
    let mut out = Vec::new();
    for _ in 0..tape.below(6) {
        let first = tape.below(u64::from(src_blocks)) as u32;
        let mut dst = tape.below(u64::from(dst_blocks)) as u32;
        let scatter = tape.chance(3);
        for src in first..=first + tape.below(6) as u32 {
            if src >= src_blocks || !free.remove(&dst) {
                break;
            }
            out.push(BlockPair { src, dst });
            dst = if scatter {
                tape.below(u64::from(dst_blocks)) as u32
            } else {
                dst + 1
            };
        }
    }
    tape.shuffle(&mut out);
    out
}

/// A byte: which memory, and where in it.
type At = (usize, u64);

/// One case: two sides and what to copy.
struct Case {
    formats: Formats,
    producer: PlacementDesc,
    consumer: PlacementDesc,
    pairs: Vec<GroupPairs>,
    role: Role,
    limits: PlanLimits,
}

impl Case {
    fn new(tape: &mut Tape) -> Self {
        let formats = formats(tape);
        let groups = formats.producer.groups().len();
        let blocks = |tape: &mut Tape| -> Vec<u32> {
            (0..groups).map(|_| 1 + tape.below(12) as u32).collect()
        };
        let (src_blocks, dst_blocks) = (blocks(tape), blocks(tape));
        let producer = placement(tape, &formats.producer, &formats, &src_blocks);
        let consumer = placement(tape, &formats.consumer, &formats, &dst_blocks);
        let mut requests: Vec<GroupPairs> = (0_u32..)
            .zip(src_blocks.iter().zip(&dst_blocks))
            .map(|(group, (src, dst))| GroupPairs {
                group,
                pairs: pairs(tape, *src, *dst),
            })
            .collect();
        tape.shuffle(&mut requests);
        let max_msg_bytes = match tape.below(3) {
            0 => u64::MAX,
            1 => 1 + tape.below(40),
            _ => 1 + tape.below(2000),
        };
        Self {
            formats,
            producer,
            consumer,
            pairs: requests,
            role: tape.pick(&[Role::Pull, Role::Push]),
            limits: PlanLimits {
                max_msg_bytes,
                max_sge: 1 + tape.below(5) as u32,
            },
        }
    }

    fn compile(&self) -> Compiled {
        let producer = Side {
            format: &self.formats.producer,
            placement: &self.producer,
        };
        let consumer = Side {
            format: &self.formats.consumer,
            placement: &self.consumer,
        };
        Compiled::compile(&producer, &consumer, self.role).expect("the sides match")
    }

    fn memory_len(&self, side: &PlacementDesc) -> Vec<usize> {
        side.memory_len().iter().map(|n| *n as usize).collect()
    }

    /// For every destination byte that must be written: which source byte, and whose block it is.
    /// Element by element, by what the indices mean.
    fn expected(&self) -> BTreeMap<At, (At, (u32, u32))> {
        let mut out = BTreeMap::new();
        for p in self.producer.tensors() {
            let pf = self.formats.producer.tensor(p.group, p.layer, p.tensor);
            let pf = pf.expect("in the format");
            let (c, cf) = self
                .consumer
                .tensors()
                .iter()
                .filter(|c| (c.group, c.layer) == (p.group, p.layer))
                .map(|c| {
                    let cf = self.formats.consumer.tensor(c.group, c.layer, c.tensor);
                    (c, cf.expect("in the format"))
                })
                .find(|(_, cf)| cf.name == pf.name)
                .expect("on both sides");
            let (from, to) = (elements(pf, p), elements(cf, c));
            assert_eq!(from.len(), to.len());
            let request = self.pairs.iter().find(|r| r.group == p.group);
            for pair in &request.expect("every group is asked for").pairs {
                for (meaning, src) in &from {
                    for byte in 0..pf.dtype.bytes() {
                        let src = p.offset + u64::from(pair.src) * p.block_stride + src + byte;
                        let dst =
                            c.offset + u64::from(pair.dst) * c.block_stride + to[meaning] + byte;
                        let previous = out.insert(
                            (c.memory as usize, dst),
                            ((p.memory as usize, src), (c.group, pair.dst)),
                        );
                        assert_eq!(previous, None, "two tensors on one byte");
                    }
                }
            }
        }
        out
    }
}

/// Where each element of a block is, by what its indices mean.
fn elements(format: &TensorFormat, placed: &PlacedTensor) -> BTreeMap<Vec<(Coordinate, u64)>, u64> {
    let mut out = BTreeMap::from([(Vec::new(), 0)]);
    // Outer halves before inner ones: AxisKind's order has it so.
    let mut axes: Vec<_> = format
        .axes
        .iter()
        .zip(placed.extents(format))
        .zip(&placed.strides)
        .map(|((axis, extent), stride)| (axis.kind, extent, *stride))
        .collect();
    axes.sort();
    for (kind, extent, stride) in axes {
        let mut next = BTreeMap::new();
        for (meaning, at) in &out {
            for i in 0..extent {
                let mut meaning: Vec<(Coordinate, u64)> = meaning.clone();
                match meaning.last_mut() {
                    Some((coordinate, outer)) if *coordinate == kind.coordinate() => {
                        *outer = *outer * extent + i;
                    }
                    _ => meaning.push((kind.coordinate(), i)),
                }
                next.insert(meaning, at + i * stride);
            }
        }
        out = next;
    }
    out
}

/// The range cut into batches, as workers would claim them, in any order.
fn batches(tape: &mut Tape, ops: u64) -> Vec<Range<u64>> {
    let mut out = Vec::new();
    let mut at = 0;
    while at < ops {
        let end = (at + 1 + tape.below(7)).min(ops);
        out.push(at..end);
        at = end;
    }
    tape.shuffle(&mut out);
    out
}

/// Bytes of memory with how often each was written.
struct Copied {
    /// For each destination byte written: the source byte it came from, and how often.
    bytes: BTreeMap<At, (At, u32)>,
    ops: u64,
}

impl Copied {
    fn new() -> Self {
        Self {
            bytes: BTreeMap::new(),
            ops: 0,
        }
    }

    /// Runs a plan, checking each operation against limits and memories.
    fn run(&mut self, case: &Case, plan: &Plan, tape: &mut Tape) {
        let (remote_len, local_len) = match case.role {
            Role::Pull => (
                case.memory_len(&case.producer),
                case.memory_len(&case.consumer),
            ),
            Role::Push => (
                case.memory_len(&case.consumer),
                case.memory_len(&case.producer),
            ),
        };
        let expected = case.expected();
        for batch in batches(tape, plan.ops()) {
            let wanted = batch.end - batch.start;
            let mut emitted = 0;
            plan.emit(batch.clone(), &mut |op| {
                let index = batch.start + emitted;
                emitted += 1;
                let len: u64 = op.local.iter().map(|p| u64::from(p.len)).sum();
                assert_eq!(len, op.len);
                assert!(op.len > 0 && op.len <= case.limits.max_msg_bytes);
                assert!(op.local.len() <= case.limits.max_sge as usize);
                let remote = op.remote_region as usize;
                assert!(op.remote_offset + op.len <= remote_len[remote] as u64);
                let mut remote_at = op.remote_offset;
                let mut blocks = BTreeSet::new();
                for piece in op.local {
                    let local = piece.region as usize;
                    assert!(piece.len > 0);
                    assert!(piece.offset + u64::from(piece.len) <= local_len[local] as u64);
                    for i in 0..u64::from(piece.len) {
                        let here = (local, piece.offset + i);
                        let there = (remote, remote_at + i);
                        let (src, dst) = match case.role {
                            Role::Pull => (there, here),
                            Role::Push => (here, there),
                        };
                        let (_, owner) = expected.get(&dst).expect("a byte nobody asked for");
                        blocks.insert(*owner);
                        self.bytes.entry(dst).or_insert((src, 0)).1 += 1;
                    }
                    remote_at += u64::from(piece.len);
                }
                let mut named = Vec::new();
                plan.blocks_of(index, &mut named);
                assert_eq!(named.len(), blocks.len());
                assert_eq!(named.into_iter().collect::<BTreeSet<_>>(), blocks);
            });
            assert_eq!(emitted, wanted);
            self.ops += emitted;
        }
    }

    /// Every byte once and from the right place.
    fn check(&self, case: &Case) {
        let expected = case.expected();
        assert_eq!(self.bytes.len(), expected.len());
        for (dst, (src, _)) in expected {
            assert_eq!(self.bytes.get(&dst), Some(&(src, 1)), "destination {dst:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 384, ..ProptestConfig::default() })]

    #[test]
    fn a_plan_moves_exactly_what_was_asked_for(mut tape in tape()) {
        let case = Case::new(&mut tape);
        let compiled = case.compile();
        let plan = compiled.plan(&case.pairs, LayerScope::All, case.limits).expect("planned");
        let mut copied = Copied::new();
        copied.run(&case, &plan, &mut tape);
        copied.check(&case);
        let report = plan.report();
        prop_assert_eq!(report.operations, plan.ops());
        prop_assert_eq!(copied.ops, plan.ops());
        prop_assert_eq!(report.bytes, copied.bytes.len() as u64);
        prop_assert_eq!(plan.bytes(), report.bytes);
        let blocks: usize = case.pairs.iter().map(|g| g.pairs.len()).sum();
        prop_assert_eq!(report.blocks, blocks as u64);
        prop_assert!(report.runs <= report.blocks);
        let per_block: u64 = case.pairs.iter().map(|g| {
            compiled.block_bytes(g.group).expect("a group") * g.pairs.len() as u64
        }).sum();
        prop_assert_eq!(report.bytes, per_block);
    }

    #[test]
    fn layers_one_by_one_come_to_the_same(mut tape in tape()) {
        let case = Case::new(&mut tape);
        let compiled = case.compile();
        let mut copied = Copied::new();
        for layer in case.formats.window.first..case.formats.window.end {
            let groups: Vec<GroupPairs> = case.pairs.clone();
            let plan = compiled.plan(&groups, LayerScope::Layer(layer), case.limits);
            match plan {
                Ok(plan) => copied.run(&case, &plan, &mut tape),
                // Only where no group with pairs has the layer.
                Err(error) => {
                    let has = |g: &GroupPairs| {
                        let group = case.formats.producer.group(g.group).expect("a group");
                        !g.pairs.is_empty() && group.layer(layer).is_some()
                    };
                    prop_assert!(!case.pairs.iter().any(has), "{}", error);
                }
            }
        }
        copied.check(&case);
    }

    #[test]
    fn any_range_can_be_asked_for(mut tape in tape(), start in 0_u64..200, len in 0_u64..u64::MAX) {
        let case = Case::new(&mut tape);
        let plan = case.compile().plan(&case.pairs, LayerScope::All, case.limits).expect("planned");
        let mut emitted = 0;
        plan.emit(start..start.saturating_add(len), &mut |_| emitted += 1);
        prop_assert_eq!(emitted, plan.ops().min(start.saturating_add(len)).saturating_sub(start));
        let mut blocks = Vec::new();
        plan.blocks_of(plan.ops(), &mut blocks);
        prop_assert!(blocks.is_empty());
    }

    #[test]
    fn absurd_placements_are_refused_and_do_no_harm(mut tape in tape()) {
        let case = Case::new(&mut tape);
        let mut json = serde_json::to_value(&case.consumer).expect("serialises");
        // One number anywhere becomes another.
        let mut numbers = Vec::new();
        collect(&mut json, &mut numbers);
        let at = tape.below(numbers.len() as u64) as usize;
        let value = tape.pick(&[0, 1, 2, 7, u64::from(u32::MAX), u64::MAX / 2, u64::MAX]);
        *numbers.swap_remove(at) = value.into();
        let Ok(consumer) = serde_json::from_value::<PlacementDesc>(json) else { return Ok(()) };
        let producer = Side { format: &case.formats.producer, placement: &case.producer };
        let consumer = Side { format: &case.formats.consumer, placement: &consumer };
        let Ok(compiled) = Compiled::compile(&producer, &consumer, case.role) else { return Ok(()) };
        let Ok(plan) = compiled.plan(&case.pairs, LayerScope::All, case.limits) else { return Ok(()) };
        // What was let through stays inside the memories it names.
        let remote = match case.role { Role::Pull => producer, Role::Push => consumer };
        plan.emit(0..plan.ops(), &mut |op| {
            let len = remote.placement.memory_len()[op.remote_region as usize];
            assert!(op.remote_offset + op.len <= len);
        });
    }

    #[test]
    fn absurd_formats_are_refused_and_do_no_harm(mut tape in tape()) {
        let formats = formats(&mut tape);
        let mut json = serde_json::to_value(&formats.producer).expect("serialises");
        prop_assert_eq!(
            &serde_json::from_value::<KvFormat>(json.clone()).expect("what was valid still is"),
            &formats.producer
        );
        let mut numbers = Vec::new();
        collect(&mut json, &mut numbers);
        let at = tape.below(numbers.len() as u64) as usize;
        let value = tape.pick(&[0, 1, 7, u64::from(u32::MAX), u64::MAX / 2, u64::MAX]);
        *numbers.swap_remove(at) = value.into();
        if let Ok(format) = serde_json::from_value::<KvFormat>(json) {
            // Whatever is let through can be used.
            let _ = format.bytes_per_token();
            let _ = format.fingerprint();
        }
    }
}

/// Every number of a JSON value.
fn collect<'a>(value: &'a mut serde_json::Value, out: &mut Vec<&'a mut serde_json::Value>) {
    match value {
        serde_json::Value::Number(_) => out.push(value),
        serde_json::Value::Array(list) => list.iter_mut().for_each(|v| collect(v, out)),
        serde_json::Value::Object(map) => map.values_mut().for_each(|v| collect(v, out)),
        _ => {}
    }
}

/// The generator is worth something only if its cases differ in what matters.
#[test]
fn the_cases_have_variety() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    let mut runner = TestRunner::deterministic();
    let mut seen: BTreeMap<&str, u32> = BTreeMap::new();
    for _ in 0..400 {
        let mut tape = tape().new_tree(&mut runner).expect("a tape").current();
        let case = Case::new(&mut tape);
        let plan = case
            .compile()
            .plan(&case.pairs, LayerScope::All, case.limits)
            .expect("planned");
        let report = plan.report();
        let (mut joined, mut spans, mut split) = (false, false, false);
        let mut blocks = Vec::new();
        let mut at = 0;
        plan.emit(0..plan.ops(), &mut |op| {
            joined |= op.local.len() > 1;
            split |= op.len == case.limits.max_msg_bytes;
            blocks.clear();
            plan.blocks_of(at, &mut blocks);
            spans |= blocks.len() > 1;
            at += 1;
        });
        let tensors = case.consumer.tensors().len() as u64;
        let features = [
            ("operations", plan.ops() > 0),
            ("operations with several pieces", joined),
            ("operations over several blocks", spans),
            ("operations cut by the limit", split),
            ("runs of several blocks", report.runs < report.blocks),
            (
                "blocks in many pieces",
                plan.ops() > 8 * report.blocks * tensors,
            ),
            ("several groups", case.pairs.len() > 1),
            (
                "a window of layers",
                case.formats.window.end < case.formats.producer.layers(),
            ),
            (
                "sides that cut axes differently",
                case.formats.producer != case.formats.consumer,
            ),
            (
                "part of the heads",
                case.producer.tensors().iter().any(|t| t.shard.is_some()),
            ),
        ];
        for (feature, here) in features {
            *seen.entry(feature).or_default() += u32::from(here);
        }
    }
    for (feature, cases) in seen {
        assert!(cases >= 20, "{feature}: {cases} of 400 cases");
    }
}
