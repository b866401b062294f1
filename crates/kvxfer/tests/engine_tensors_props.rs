//! Whatever an engine's tensors: what is accepted does not overlap and lies where the engine has it,
//! and what a look at every byte refuses is refused.

mod tape;

use std::collections::{BTreeMap, BTreeSet};

use kvxfer::ids::Rank;
use kvxfer::layout::{
    Axis, AxisKind, CacheGroup, DType, Dim, EngineTensor, GroupKind, KvFormat, LayerFormat,
    LayerWindow, LayoutBuilder, ModelIdentity, PlacedTensor, PlacementDesc, Shard, Span, Start,
    TensorFormat, TensorRole, Topology,
};
use proptest::prelude::*;
use tape::{Tape, tape};

/// Two layers with k and v: 4 tokens, 2 heads, 4 elements of 2 bytes.
const TOKENS: u64 = 4;
const HEADS: u64 = 2;
const DIM: u64 = 4;

fn small() -> KvFormat {
    let tensor = |name: &str, role| TensorFormat {
        name: name.into(),
        role,
        dtype: DType::Bf16,
        axes: vec![
            Axis::new(AxisKind::Token, TOKENS),
            Axis::new(AxisKind::Head, HEADS),
            Axis::new(AxisKind::Dim, DIM),
        ],
        sharded: Some(1),
        scaling: None,
    };
    let layer = |layer| LayerFormat {
        layer,
        draft: false,
        tensors: vec![tensor("k", TensorRole::Key), tensor("v", TensorRole::Value)],
    };
    let group = CacheGroup {
        name: "full".into(),
        kind: GroupKind::Full,
        block_tokens: TOKENS as u32,
        layers: vec![layer(0), layer(1)],
    };
    KvFormat::new(ModelIdentity::new("test", None), vec![group]).expect("a valid format")
}

/// One element: layer, tensor, block, token, head, element of the head.
type Element = (u32, u32, u64, u64, u64, u64);

/// One dimension of an engine's tensor as the cases make it.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    /// K or V of a stacked tensor.
    Which,
    Block,
    /// Kernel blocks of half a block.
    KernelBlock,
    /// Tokens, all or those of a kernel block.
    Token(u64),
    Head,
    /// Elements divided by the vector's.
    DimOuter,
    DimInner,
    Dim,
    HeadDim,
}

impl Part {
    fn extent(self, blocks: u64, heads: u64) -> u64 {
        match self {
            Self::Which | Self::DimOuter | Self::DimInner => 2,
            Self::Block => blocks,
            Self::KernelBlock => 2 * blocks,
            Self::Token(n) => n,
            Self::Head => heads,
            Self::Dim => DIM,
            Self::HeadDim => heads * DIM,
        }
    }

    fn dim(self, tensor: u32) -> Dim {
        match self {
            Self::Which => Dim::At(u64::from(tensor)),
            Self::Block => Dim::Block,
            Self::KernelBlock => Dim::KernelBlock { per_block: 2 },
            Self::Token(_) => Dim::Axis(AxisKind::Token),
            Self::Head => Dim::Axis(AxisKind::Head),
            Self::DimOuter | Self::DimInner | Self::Dim => Dim::Axis(AxisKind::Dim),
            Self::HeadDim => Dim::Fused(vec![AxisKind::Head, AxisKind::Dim]),
        }
    }

    /// The index that an element has along it.
    fn index(self, (_, tensor, block, token, head, d): Element, kernel: u64) -> u64 {
        match self {
            Self::Which => u64::from(tensor),
            Self::Block => block,
            Self::KernelBlock => 2 * block + token / kernel,
            Self::Token(_) => token % kernel,
            Self::Head => head,
            Self::DimOuter => d / 2,
            Self::DimInner => d % 2,
            Self::Dim => d,
            Self::HeadDim => head * DIM + d,
        }
    }
}

/// An engine's cache, right or spoilt.
struct Cache {
    parts: Vec<Part>,
    blocks: u64,
    /// The heads that this rank has.
    heads: u64,
    /// By layer and tensor; a stacked cache has the same for k and v.
    tensors: BTreeMap<(u32, u32), EngineTensor>,
    span: Span,
}

fn cache(tape: &mut Tape) -> Cache {
    let stacked = tape.chance(2);
    let heads = tape.pick(&[HEADS, 1]);
    let mut parts = Vec::new();
    if tape.chance(3) {
        parts.extend([Part::KernelBlock, Part::Token(TOKENS / 2)]);
    } else {
        parts.extend([Part::Block, Part::Token(TOKENS)]);
    }
    match tape.below(3) {
        0 => parts.extend([Part::Head, Part::Dim]),
        1 => parts.extend([Part::Head, Part::DimOuter, Part::DimInner]),
        _ => parts.push(Part::HeadDim),
    }
    if stacked {
        parts.insert(0, Part::Which);
    }
    // Any order, but for the digits of a split, which the list itself gives.
    let digits = |parts: &[Part]| {
        let at = |p| parts.iter().position(|q| *q == p);
        at(Part::DimOuter) <= at(Part::DimInner)
    };
    let mut order = parts.clone();
    tape.shuffle(&mut order);
    if digits(&order) {
        parts = order;
    }
    let blocks = 1 + tape.below(3);
    let base = 4096 + 2 * tape.below(8);
    let mut end = base;
    let mut tensors = BTreeMap::new();
    for layer in 0..2 {
        for tensor in 0..2 {
            if stacked && tensor == 1 {
                tensors.insert((layer, 1), EngineTensor::clone(&tensors[&(layer, 0)]));
                continue;
            }
            let shape: Vec<u64> = parts.iter().map(|p| p.extent(blocks, heads)).collect();
            // Dense, with gaps now and then, in any order of memory.
            let mut memory: Vec<usize> = (0..parts.len()).rev().collect();
            if tape.chance(3) {
                tape.shuffle(&mut memory);
            }
            let mut strides = vec![0_i64; parts.len()];
            let mut step = 1;
            for i in memory {
                step += if tape.chance(6) { tape.below(3) } else { 0 };
                strides[i] = step as i64;
                step *= shape[i];
            }
            tensors.insert(
                (layer, tensor),
                EngineTensor {
                    start: Start::Address(end),
                    shape,
                    strides,
                    element_bytes: 2,
                },
            );
            end += 2 * step;
        }
    }
    Cache {
        parts,
        blocks,
        heads,
        tensors,
        span: Span {
            addr: base,
            len: end - base,
        },
    }
}

impl Cache {
    /// One thing about one tensor becomes another.
    fn spoil(&mut self, tape: &mut Tape) {
        let keys: Vec<(u32, u32)> = self.tensors.keys().copied().collect();
        let key = tape.pick(&keys);
        let other = self.tensors[&tape.pick(&keys)].clone();
        let tensor = self.tensors.get_mut(&key).expect("it is there");
        let i = tape.below(tensor.shape.len() as u64) as usize;
        match tape.below(7) {
            0 => tensor.element_bytes = tape.pick(&[1, 4, 0, u64::MAX]),
            1 => tensor.shape[i] = tape.pick(&[0, 1, 2, 3, 5, u64::MAX]),
            2 => tensor.strides[i] = tape.pick(&[0, 1, -1, 2, 3, 7, i64::MAX, i64::MIN]),
            3 => tensor.start = other.start,
            4 => {
                let Start::Address(at) = tensor.start else {
                    return;
                };
                tensor.start =
                    Start::Address(at.wrapping_add_signed(tape.pick(&[2, -2, 8, 400, -5000])));
            }
            5 => self.span.len -= 2 * tape.below(self.span.len / 2),
            _ => {
                tensor.strides[i] += 1;
            }
        }
    }

    fn elements(&self) -> impl Iterator<Item = Element> + '_ {
        let each = |n: u64| 0..n;
        self.tensors.keys().flat_map(move |&(layer, tensor)| {
            each(self.blocks).flat_map(move |b| {
                each(TOKENS).flat_map(move |t| {
                    each(self.heads)
                        .flat_map(move |h| each(DIM).map(move |d| (layer, tensor, b, t, h, d)))
                })
            })
        })
    }

    fn kernel(&self) -> u64 {
        let token = self.parts.iter().find_map(|p| match p {
            Part::Token(n) => Some(*n),
            _ => None,
        });
        token.expect("every cache has tokens")
    }

    /// Where an element is, by the engine's own arithmetic.
    fn address(&self, element: Element) -> Option<i128> {
        let tensor = &self.tensors[&(element.0, element.1)];
        let Start::Address(start) = tensor.start else {
            return None;
        };
        let mut at = i128::from(start);
        for (i, part) in self.parts.iter().enumerate() {
            let index = i128::from(part.index(element, self.kernel()));
            at += index * i128::from(tensor.strides[i]) * i128::from(tensor.element_bytes);
        }
        Some(at)
    }

    /// Whether it can be a cache, by looking at every byte.
    fn naive(&self) -> bool {
        let fits = |tensor: u32, engine: &EngineTensor| {
            let extents = self.parts.iter().zip(&engine.shape);
            let mut fits = extents.map(|(part, extent)| match part {
                // Of this one an index is taken, whatever else there is.
                Part::Which => u64::from(tensor) < *extent,
                _ => part.extent(self.blocks, self.heads) == *extent,
            });
            engine.element_bytes == 2 && fits.all(|fits| fits)
        };
        if !self.tensors.iter().all(|((_, t), engine)| fits(*t, engine)) {
            return false;
        }
        let mut taken = BTreeSet::new();
        let inside = i128::from(self.span.addr)..i128::from(self.span.addr + self.span.len);
        self.elements().all(|element| {
            let at = self.address(element).expect("an address");
            (at..at + 2).all(|byte| inside.contains(&byte) && taken.insert(byte))
        })
    }

    fn build(&self, format: &KvFormat) -> Option<(KvFormat, PlacementDesc)> {
        let topology = Topology {
            rank: Rank {
                dp: 0,
                pp: 0,
                tp: 0,
            },
            tp: (HEADS / self.heads) as u32,
            pp: 1,
            dp: 1,
            layers: LayerWindow { first: 0, end: 2 },
        };
        let mut builder = LayoutBuilder::new(format, topology, vec![self.span]);
        for ((layer, tensor), engine) in &self.tensors {
            let dims: Vec<Dim> = self.parts.iter().map(|p| p.dim(*tensor)).collect();
            let name = ["k", "v"][*tensor as usize];
            builder.tensor(0, *layer, name, engine, &dims).ok()?;
        }
        builder.describe().ok()
    }
}

/// Where an element is by a placement.
fn placed(format: &KvFormat, at: &PlacedTensor, element: Element) -> u64 {
    let (_, _, block, token, head, d) = element;
    let tensor = format
        .tensor(at.group, at.layer, at.tensor)
        .expect("in the format");
    let mut offset = at.offset + block * at.block_stride;
    // The digits of each index, the last one first.
    let mut rest = BTreeMap::from([
        (AxisKind::Token, token),
        (AxisKind::Head, head),
        (AxisKind::Dim, d),
    ]);
    for (axis, stride) in tensor.axes.iter().zip(&at.strides).rev() {
        let index = rest.get_mut(&axis.kind).expect("an axis of the cases");
        offset += *index % axis.extent * stride;
        *index /= axis.extent;
    }
    offset
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, ..ProptestConfig::default() })]

    #[test]
    fn an_engines_tensors_lie_where_the_engine_has_them(mut tape in tape()) {
        let predicted = small();
        let cache = cache(&mut tape);
        prop_assert!(cache.naive());
        let (format, desc) = cache.build(&predicted).expect("a right cache is taken");
        for element in cache.elements() {
            let at = desc.tensors().iter().find(|t| (t.layer, t.tensor) == (element.0, element.1));
            let at = placed(&format, at.expect("placed"), element);
            let wanted = cache.address(element).expect("an address") - i128::from(cache.span.addr);
            prop_assert_eq!(i128::from(at), wanted, "{:?}", element);
        }
        prop_assert_eq!(desc.num_blocks(0).map(u64::from), Some(cache.blocks));
        let shard = desc.tensors()[0].shard;
        prop_assert_eq!(shard, Some(Shard { first: 0, count: cache.heads }));
    }

    #[test]
    fn what_a_naive_look_refuses_is_refused(mut tape in tape()) {
        let predicted = small();
        let mut cache = cache(&mut tape);
        cache.spoil(&mut tape);
        if !cache.naive() {
            prop_assert!(cache.build(&predicted).is_none());
        }
    }

    #[test]
    fn accepted_placements_never_overlap(mut tape in tape()) {
        let format = small();
        let cache = cache(&mut tape);
        let (format, desc) = cache.build(&format).expect("a right cache is taken");
        // Strides and offsets anywhere near the right ones.
        let mut tensors = desc.tensors().to_vec();
        let i = tape.below(4) as usize;
        match tape.below(3) {
            0 => tensors[i].offset = tape.below(cache.span.len),
            1 => tensors[i].block_stride = tape.below(200),
            _ => {
                let axis = tape.below(tensors[i].strides.len() as u64) as usize;
                tensors[i].strides[axis] = tape.below(40);
            }
        }
        let memory = vec![cache.span.len];
        let topology = *desc.topology();
        if let Ok(desc) = PlacementDesc::new(&format, topology, tensors, Vec::new(), memory) {
            let mut taken = BTreeSet::new();
            for element in cache.elements() {
                let of = |t: &&PlacedTensor| (t.layer, t.tensor) == (element.0, element.1);
                let at = placed(&format, desc.tensors().iter().find(of).expect("placed"), element);
                for byte in at..at + 2 {
                    prop_assert!(byte < cache.span.len);
                    prop_assert!(taken.insert(byte), "{:?}", element);
                }
            }
        }
    }
}

/// The spoilt cases are worth something only if many of them are spoilt, and some are not.
#[test]
fn the_spoilt_cases_have_variety() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    let predicted = small();
    let mut runner = TestRunner::deterministic();
    let mut seen: BTreeMap<&str, u32> = BTreeMap::new();
    for _ in 0..400 {
        let mut tape = tape().new_tree(&mut runner).expect("a tape").current();
        let mut cache = cache(&mut tape);
        cache.spoil(&mut tape);
        let features = [
            ("refused by both", !cache.naive()),
            ("taken all the same", cache.build(&predicted).is_some()),
            ("kernel blocks", cache.parts.contains(&Part::KernelBlock)),
            ("vectors", cache.parts.contains(&Part::DimInner)),
            ("stacked", cache.parts.contains(&Part::Which)),
            ("fused", cache.parts.contains(&Part::HeadDim)),
            ("half the heads", cache.heads < HEADS),
        ];
        for (feature, here) in features {
            *seen.entry(feature).or_default() += u32::from(here);
        }
    }
    for (feature, cases) in seen {
        assert!(cases >= 20, "{feature}: {cases} of 400 cases");
    }
}
