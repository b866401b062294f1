//! Memory whose elements follow from what they mean (layer, tensor, token, head, …), so that it can be
//! said what must be where after blocks have moved between ranks that are cut differently.

use std::collections::BTreeMap;
use std::ops::Range;

use kvxfer::bench::{BenchShape, BenchSide};
use kvxfer::blocks::GroupBlocks;
use kvxfer::config::{Config, KvRole, PathKind};
use kvxfer::engine::Engine;
use kvxfer::layout::{
    Axis, AxisKind, CacheGroup, DType, GroupKind, KvFormat, LayerFormat, LayerWindow,
    ModelIdentity, PlacedTensor, TensorFormat, TensorRole, Topology,
};

use super::{Node, POISON, Recipe, recipe};

/// Layers of the model.
pub(crate) const LAYERS: u32 = 4;
/// KV heads: 3 ranks have two each, 6 one, and 12 share each by two.
pub(crate) const HEADS: u64 = 6;

/// How an engine is cut.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut {
    pub(crate) tp: u32,
    pub(crate) pp: u32,
    /// Tokens of a block.
    pub(crate) tokens: u32,
    /// Heads before tokens in a block.
    pub(crate) head_first: bool,
}

pub(crate) const fn cut(tp: u32, pp: u32, tokens: u32) -> Cut {
    Cut {
        tp,
        pp,
        tokens,
        head_first: false,
    }
}

/// Keys and values dealt out by heads, and a latent that every rank has whole.
pub(crate) fn format(cut: Cut) -> KvFormat {
    let token = Axis::new(AxisKind::Token, u64::from(cut.tokens));
    let tensor = |name: &str, role| {
        let mut axes = vec![
            token,
            Axis::new(AxisKind::Head, HEADS),
            Axis::new(AxisKind::Dim, 8),
        ];
        if cut.head_first {
            axes.swap(0, 1);
        }
        TensorFormat {
            name: name.into(),
            role,
            dtype: DType::Bf16,
            sharded: Some(u32::from(!cut.head_first)),
            axes,
            scaling: None,
        }
    };
    let layer = |layer| LayerFormat {
        layer,
        draft: false,
        tensors: vec![
            tensor("k", TensorRole::Key),
            tensor("v", TensorRole::Value),
            TensorFormat {
                name: "latent".into(),
                role: TensorRole::Latent,
                dtype: DType::Bf16,
                axes: vec![token, Axis::new(AxisKind::Latent, 12)],
                sharded: None,
                scaling: None,
            },
        ],
    };
    let group = CacheGroup {
        name: "full".into(),
        kind: GroupKind::Full,
        block_tokens: cut.tokens,
        layers: (0..LAYERS).map(layer).collect(),
    };
    KvFormat::new(ModelIdentity::new("meaning", None), vec![group]).expect("a format")
}

/// All ranks of an engine, in one process.
pub(crate) struct Cluster {
    pub(crate) cut: Cut,
    pub(crate) nodes: Vec<Node>,
    pub(crate) addresses: Vec<String>,
}

impl Cluster {
    /// Ranks by pipeline, then tensor position, each with so many blocks, listening.
    pub(crate) fn new(name: &str, role: KvRole, cut: Cut, blocks: u32) -> Self {
        Self::with(name, role, cut, blocks, |_| {})
    }

    pub(crate) fn with(
        name: &str,
        role: KvRole,
        cut: Cut,
        blocks: u32,
        change: impl Fn(&mut Config),
    ) -> Self {
        let change = |recipe: &mut Recipe| change(&mut recipe.config);
        Self::over(PathKind::Arena, name, role, cut, blocks, change)
    }

    /// Over this path, with memory of the kind that it wants.
    pub(crate) fn over(
        path: PathKind,
        name: &str,
        role: KvRole,
        cut: Cut,
        blocks: u32,
        change: impl Fn(&mut Recipe),
    ) -> Self {
        let format = format(cut);
        let mut nodes = Vec::new();
        let mut addresses = Vec::new();
        for pp in 0..cut.pp {
            for tp in 0..cut.tp {
                let mut topology = Topology::tensor_parallel(&format, tp, cut.tp);
                (topology.pp, topology.rank.pp) = (cut.pp, pp);
                topology.layers = LayerWindow::even(LAYERS, pp, cut.pp);
                let mut recipe = recipe(role, path, 64, 1);
                recipe.config.engine_id = Some(name.into());
                recipe.config.num_worker_threads = 1;
                recipe.config.qp_per_transfer = 2;
                change(&mut recipe);
                let shape = BenchShape {
                    format: format.clone(),
                    num_blocks: vec![blocks],
                    topology,
                    memory: recipe.memory,
                };
                let side = BenchSide::new(&shape).expect("memory");
                side.poison().expect("poisoned");
                let placement = side.placement().clone();
                let engine = Engine::new(recipe.config, format.clone(), placement);
                let engine = engine.expect("an engine");
                let address = engine.listen("127.0.0.1:0").expect("a free port");
                addresses.push(address.to_string());
                nodes.push(Node { engine, side });
            }
        }
        Self {
            cut,
            nodes,
            addresses,
        }
    }

    /// Fills these blocks of every rank with what they mean.
    pub(crate) fn fill(&self, seed: u64, blocks: &[GroupBlocks]) {
        for node in &self.nodes {
            each_element(node, |memory, at, element| {
                let Some(token) = element.token(blocks, self.cut.tokens) else {
                    return;
                };
                let value = element.value(seed, token);
                memory.write(at, &value.to_le_bytes()).expect("inside");
            });
        }
    }

    /// Checks that a rank has these tokens of its blocks, and that everything else is poison.
    #[track_caller]
    pub(crate) fn verify(
        &self,
        rank: usize,
        seed: u64,
        blocks: &[GroupBlocks],
        tokens: Range<u64>,
    ) {
        each_element(&self.nodes[rank], |memory, at, element| {
            let mut bytes = [0; 2];
            memory.read(at, &mut bytes).expect("inside");
            let wanted = match element.token(blocks, self.cut.tokens) {
                Some(token) if tokens.contains(&token) => element.value(seed, token),
                _ => POISON as u16,
            };
            assert_eq!(
                u16::from_le_bytes(bytes),
                wanted,
                "rank {rank}, {element:?} of {blocks:?}"
            );
        });
    }
}

/// One element of a rank's part.
#[derive(Debug)]
struct Element<'a> {
    layer: u32,
    tensor: &'a str,
    group: u32,
    block: u32,
    /// What each kind of axis counts, in the whole model.
    index: BTreeMap<AxisKind, u64>,
}

impl Element<'_> {
    /// Which token of the request it is of.
    fn token(&self, blocks: &[GroupBlocks], block_tokens: u32) -> Option<u64> {
        let group = blocks.iter().find(|g| g.group == self.group)?;
        let at = group.blocks.iter().position(|b| *b == self.block)? as u64;
        Some(at * u64::from(block_tokens) + self.index[&AxisKind::Token])
    }

    fn value(&self, seed: u64, token: u64) -> u16 {
        let mut hash = seed ^ 0x9e37_79b9_7f4a_7c15;
        let mut mix = |word: u64| {
            hash = (hash ^ word).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            hash ^= hash >> 29;
        };
        mix(u64::from(self.layer));
        self.tensor.bytes().for_each(|b| mix(u64::from(b)));
        mix(token);
        for (kind, at) in &self.index {
            if *kind != AxisKind::Token {
                mix(*at);
            }
        }
        hash as u16
    }
}

fn each_element(node: &Node, mut act: impl FnMut(&kvxfer::bench::BlockMemory, u64, &Element<'_>)) {
    let format = node.side.format();
    for placed in node.side.placement().desc().tensors() {
        let tensor = format
            .tensor(placed.group, placed.layer, placed.tensor)
            .expect("a tensor");
        let memory = &node.side.memory()[placed.memory as usize];
        for block in 0..placed.num_blocks {
            each_index(tensor, placed, |offset, index| {
                let element = Element {
                    layer: placed.layer,
                    tensor: &tensor.name,
                    group: placed.group,
                    block,
                    index,
                };
                let at = placed.offset + u64::from(block) * placed.block_stride + offset;
                act(memory, at, &element);
            });
        }
    }
}

fn each_index(
    tensor: &TensorFormat,
    placed: &PlacedTensor,
    mut act: impl FnMut(u64, BTreeMap<AxisKind, u64>),
) {
    let extents = placed.extents(tensor);
    let count: u64 = extents.iter().product();
    for n in 0..count {
        let (mut left, mut offset) = (n, 0);
        let mut digits = vec![0; extents.len()];
        for (digit, extent) in digits.iter_mut().zip(&extents).rev() {
            *digit = left % extent;
            left /= extent;
        }
        let mut index = BTreeMap::new();
        for (i, digit) in digits.iter().enumerate() {
            offset += digit * placed.strides[i];
            let first = match placed.shard_of(tensor) {
                Some(shard) if tensor.sharded == u32::try_from(i).ok() => shard.first,
                _ => 0,
            };
            let whole = index.entry(tensor.axes[i].kind).or_insert(0);
            *whole = *whole * extents[i] + digit + first;
        }
        act(offset, index);
    }
}
