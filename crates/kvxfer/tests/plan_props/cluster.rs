//! Two engines of several ranks each that keep the same model cut otherwise, and what a request
//! moves between them, element by element.

use std::collections::{BTreeMap, BTreeSet};

use crate::case::elements;
use crate::formats::strides;
use crate::tape::Tape;
use kvxfer::ids::Rank;
use kvxfer::layout::{
    Axis, AxisKind, CacheGroup, DType, GroupKind, KvFormat, LayerFormat, LayerWindow,
    ModelIdentity, Parallel, PlacedTensor, PlacementDesc, Shard, Side, TensorFormat, TensorRole,
    Topology,
};

/// What one tensor of a layer holds, whoever keeps it.
#[derive(Clone)]
struct Content {
    /// The name of K; V is `v` and its number.
    number: usize,
    kind: Kind,
    heads: u64,
    dim: u64,
    dtype: DType,
    /// Runs of tokens and of elements that a side may keep together.
    token_run: u64,
    dim_run: u64,
    /// Whether the producer, and the consumer, deal the heads out.
    sharded: [bool; 2],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// K and V; in one tensor at the producer, and at the consumer.
    KeyValue {
        stacked: [bool; 2],
    },
    Latent,
    /// A number for each token and head.
    Scale,
    /// A number for each head and block.
    BlockScale,
    State,
}

/// A request's blocks in one group.
pub(crate) struct Lists {
    pub(crate) src: Vec<u32>,
    pub(crate) src_first: u64,
    pub(crate) dst: Vec<u32>,
    pub(crate) dst_first: u64,
    pub(crate) tokens: Option<std::ops::Range<u64>>,
    /// The tokens that must move, worked out here.
    pub(crate) moved: std::ops::Range<u64>,
}

/// One engine.
pub(crate) struct Engine {
    pub(crate) format: KvFormat,
    pub(crate) parallel: Parallel,
    pub(crate) ranks: Vec<PlacementDesc>,
}

impl Engine {
    pub(crate) fn side(&self, rank: usize) -> Side<'_> {
        Side {
            format: &self.format,
            placement: &self.ranks[rank],
        }
    }
}

pub(crate) struct Cluster {
    pub(crate) producer: Engine,
    pub(crate) consumer: Engine,
    /// By group.
    pub(crate) lists: Vec<Lists>,
    /// Whether both sides deal the same tensors out.
    pub(crate) alike: bool,
    /// Whether K and V are in one tensor on one side only, somewhere.
    pub(crate) restacked: bool,
}

const SIZES: [u32; 6] = [1, 2, 3, 4, 6, 8];

fn deals(heads: u64, tp: u32) -> bool {
    let tp = u64::from(tp);
    heads.is_multiple_of(tp) || tp.is_multiple_of(heads)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn content(
    tape: &mut Tape,
    number: usize,
    slots: bool,
    blocks: [u64; 2],
    tps: [u32; 2],
) -> Content {
    let unit = gcd(blocks[0], blocks[1]);
    let fits = |h: &u64| tps.iter().all(|tp| deals(*h, *tp));
    let heads: Vec<u64> = [1, 2, 3, 4, 6, 8, 12, 24]
        .into_iter()
        .filter(fits)
        .collect();
    // The smallest ones make the cheapest cases.
    let heads = tape.pick(&heads[..heads.len().min(4)]);
    let kind = match (slots, tape.below(6)) {
        (true, _) => Kind::State,
        (false, 0..3) => Kind::KeyValue {
            stacked: [tape.chance(2), tape.chance(2)],
        },
        (false, 3) => Kind::Latent,
        (false, 4) if blocks[0] == blocks[1] => Kind::BlockScale,
        (false, _) => Kind::Scale,
    };
    let dim = tape.pick(&[2, 4, 1]);
    let dividers: Vec<u64> = (1..=unit).filter(|d| unit.is_multiple_of(*d)).collect();
    let sharded = match tape.chance(6) {
        true => [tape.chance(2), tape.chance(2)],
        false => [true, true],
    };
    Content {
        number,
        kind,
        heads,
        dim,
        dtype: tape.pick(&[DType::Uint8, DType::Bf16]),
        token_run: if slots { 1 } else { tape.pick(&dividers) },
        dim_run: if dim == 4 { 2 } else { dim },
        sharded,
    }
}

/// One side's tensors of this content.
fn tensors(tape: &mut Tape, content: &Content, side: usize, tokens: u64) -> Vec<TensorFormat> {
    let Content {
        heads, dim, number, ..
    } = *content;
    let token = (AxisKind::Token, tokens, content.token_run);
    let head = (AxisKind::Head, heads, heads);
    let element = (AxisKind::Dim, dim, content.dim_run);
    let list = |name: &str, role, axes: &[(AxisKind, u64, u64)]| {
        (format!("{name}{number}"), role, axes.to_vec())
    };
    let all = match content.kind {
        Kind::KeyValue { stacked } if stacked[side] => vec![list(
            "kv",
            TensorRole::KeyValue,
            &[(AxisKind::Kv, 2, 2), token, head, element],
        )],
        Kind::KeyValue { .. } => vec![
            list("k", TensorRole::Key, &[token, head, element]),
            list("v", TensorRole::Value, &[token, head, element]),
        ],
        Kind::Latent => vec![list(
            "latent",
            TensorRole::Latent,
            &[token, (AxisKind::Latent, dim, content.dim_run)],
        )],
        Kind::Scale => vec![list("scale", TensorRole::Scale, &[token, head])],
        Kind::BlockScale => vec![list("scale", TensorRole::Scale, &[head])],
        Kind::State => vec![list(
            "state",
            TensorRole::State,
            &[head, element, (AxisKind::State, 3, 3)],
        )],
    };
    let mut out = Vec::new();
    for (name, role, wanted) in all {
        let mut axes = Vec::new();
        for (kind, extent, run) in wanted {
            if run < extent && extent.is_multiple_of(run) && tape.chance(2) {
                axes.push(Axis::new(kind, extent / run));
                axes.push(Axis::new(kind, run));
            } else {
                axes.push(Axis::new(kind, extent));
            }
        }
        if tape.chance(2) {
            let digits = axes.clone();
            tape.shuffle(&mut axes);
            // Of a kind that is there twice the first one is still the more significant.
            for kind in [AxisKind::Token, AxisKind::Dim, AxisKind::Latent] {
                let mut ordered = digits.iter().filter(|a| a.kind == kind);
                for axis in axes.iter_mut().filter(|a| a.kind == kind) {
                    *axis = *ordered.next().expect("as many");
                }
            }
        }
        let head = axes.iter().position(|a| a.kind == AxisKind::Head);
        out.push(TensorFormat {
            name,
            role,
            dtype: content.dtype,
            sharded: head.filter(|_| content.sharded[side]).map(|at| at as u32),
            axes,
            scaling: None,
        });
    }
    if tape.chance(2) {
        out.reverse();
    }
    out
}

impl Cluster {
    pub(crate) fn new(tape: &mut Tape) -> Self {
        let mut parallel = || Parallel {
            tp: tape.pick(&SIZES),
            pp: tape.pick(&[1, 2, 3]),
            dp: tape.pick(&[0, 0, 1, 5]),
        };
        let mut parallels = [parallel(), parallel()];
        let layers = tape.pick(&[2_u32, 3, 1, 4]);
        for parallel in &mut parallels {
            parallel.pp = parallel.pp.min(layers);
            // Both must be able to deal out some number of heads.
            if !(1..=24).any(|h| deals(h, parallel.tp)) {
                parallel.tp = 1;
            }
        }
        let tps = parallels.map(|p| p.tp);
        let groups = 1 + tape.below(2) as u32;
        let mut sides = [Vec::new(), Vec::new()];
        let mut lists = Vec::new();
        let (mut alike, mut restacked) = (true, false);
        for g in 0..groups {
            let kind = match tape.below(4) {
                0 | 1 => GroupKind::Full,
                2 => GroupKind::SlidingWindow { tokens: 64 },
                _ => GroupKind::StateSlots,
            };
            let slots = kind == GroupKind::StateSlots;
            let mut blocks = [(); 2].map(|()| tape.pick(&[4_u32, 1, 2, 6, 8, 12]));
            if slots {
                blocks = [0, 0];
            } else if tape.chance(3) {
                blocks[1] = blocks[0];
            }
            let mut here: Vec<u32> = (0..layers).filter(|_| !tape.chance(3)).collect();
            if g == 0 {
                here = (0..layers).collect();
            } else if here.is_empty() {
                here.push(layers - 1);
            }
            let mut contents: Vec<Content> = Vec::new();
            let mut group_layers = [Vec::new(), Vec::new()];
            for layer in here {
                if contents.is_empty() || tape.chance(4) {
                    let mut with_kv = false;
                    contents = (0..1 + tape.below(2) as usize)
                        .map(|n| content(tape, n, slots, blocks.map(u64::from), tps))
                        // Of two that hold K and V it is not known which belongs to which.
                        .filter(|c| {
                            let kv = matches!(c.kind, Kind::KeyValue { .. });
                            !(kv && std::mem::replace(&mut with_kv, true))
                        })
                        .collect();
                }
                for (side, group_layers) in group_layers.iter_mut().enumerate() {
                    let tokens = u64::from(blocks[side]);
                    let all = contents.iter();
                    group_layers.push(LayerFormat {
                        layer,
                        draft: false,
                        tensors: all.flat_map(|c| tensors(tape, c, side, tokens)).collect(),
                    });
                }
                for content in &contents {
                    let headless = content.kind == Kind::Latent;
                    alike &= headless || content.sharded[0] == content.sharded[1];
                    if let Kind::KeyValue { stacked } = content.kind {
                        restacked |= stacked[0] != stacked[1];
                    }
                }
            }
            for (side, (layers, block_tokens)) in
                sides.iter_mut().zip(group_layers.into_iter().zip(blocks))
            {
                side.push(CacheGroup {
                    name: format!("g{g}"),
                    kind,
                    block_tokens,
                    layers,
                });
            }
            lists.push(Lists::new(tape, blocks));
        }
        let [producer, consumer] = sides.map(|groups| {
            KvFormat::new(ModelIdentity::new("random", None), groups).expect("valid")
        });
        let [pp, cp] = parallels;
        let producer = engine(tape, producer, pp, lists.iter().map(|l| &l.src));
        let consumer = engine(tape, consumer, cp, lists.iter().map(|l| &l.dst));
        Self {
            producer,
            consumer,
            lists,
            alike,
            restacked,
        }
    }
}

impl Lists {
    fn new(tape: &mut Tape, blocks: [u32; 2]) -> Self {
        let ids = |tape: &mut Tape, count: u64| {
            let mut ids: Vec<u32> = (0..count as u32 + tape.below(3) as u32).collect();
            if !tape.chance(3) {
                tape.shuffle(&mut ids);
            }
            ids.truncate(count as usize);
            ids
        };
        if blocks[0] == 0 {
            let count = tape.below(3);
            let tokens = tape.chance(2).then_some(0..1);
            return Self {
                src: ids(tape, count),
                src_first: 0,
                dst: ids(tape, count),
                dst_first: 0,
                tokens,
                moved: 0..count,
            };
        }
        let [p, c] = blocks.map(u64::from);
        let unit = gcd(p, c);
        let first = if tape.chance(3) { tape.below(14) } else { 0 };
        let end = first + tape.below(26);
        let span = |block: u64| (first / block * block, end.div_ceil(block) * block);
        let ((src_first, src_end), (dst_first, dst_end)) = (span(p), span(c));
        let (start, stop) = (src_first.max(dst_first), src_end.min(dst_end));
        let (mut tokens, mut moved) = (None, start..stop.max(start));
        let (mut src_more, mut dst_more) = (0, 0);
        if end == first || start >= stop || tape.chance(2) {
            // Some of the tokens, and blocks behind them.
            let units = stop.saturating_sub(start) / unit;
            let from = start + unit * tape.below(units + 1);
            let to = from + tape.below(stop.saturating_sub(from) + 1);
            tokens = Some(from..to);
            moved = from..to.next_multiple_of(unit);
            (src_more, dst_more) = (tape.below(3), tape.below(3));
        }
        Self {
            src: ids(tape, (src_end - src_first) / p + src_more),
            src_first,
            dst: ids(tape, (dst_end - dst_first) / c + dst_more),
            dst_first,
            tokens,
            moved,
        }
    }
}

/// Every rank's part, with random strides.
fn engine<'a>(
    tape: &mut Tape,
    format: KvFormat,
    parallel: Parallel,
    lists: impl Iterator<Item = &'a Vec<u32>>,
) -> Engine {
    let num_blocks: Vec<u32> = lists
        .map(|ids| ids.iter().max().map_or(1, |id| id + 1))
        .collect();
    let mut ranks = Vec::new();
    for pp in 0..parallel.pp {
        for tp in 0..parallel.tp {
            let topology = Topology {
                rank: Rank {
                    dp: parallel.dp,
                    pp,
                    tp,
                },
                tp: parallel.tp,
                pp: parallel.pp,
                dp: parallel.dp + 1,
                layers: LayerWindow::even(format.layers(), pp, parallel.pp),
            };
            ranks.push(place(tape, &format, topology, &num_blocks));
        }
    }
    Engine {
        format,
        parallel,
        ranks,
    }
}

fn place(
    tape: &mut Tape,
    format: &KvFormat,
    topology: Topology,
    num_blocks: &[u32],
) -> PlacementDesc {
    let plain = tape.chance(3);
    let mut tensors = Vec::new();
    let mut end = 0;
    for (g, group) in (0_u32..).zip(format.groups()) {
        for layer in group
            .layers
            .iter()
            .filter(|l| topology.layers.contains(l.layer))
        {
            for (t, tensor) in (0_u32..).zip(&layer.tensors) {
                let shard = tensor.sharded_axis().map(|axis| {
                    let (tp, rank) = (u64::from(topology.tp), u64::from(topology.rank.tp));
                    // Dealt in order; where there are more ranks than heads, neighbours share.
                    let first = rank * axis.extent / tp;
                    let count = (axis.extent / tp).max(1);
                    Shard { first, count }
                });
                let mut placed = PlacedTensor {
                    group: g,
                    layer: layer.layer,
                    tensor: t,
                    memory: 0,
                    offset: end,
                    block_stride: 0,
                    num_blocks: num_blocks[g as usize],
                    strides: Vec::new(),
                    shard,
                };
                end += strides(tape, tensor, &mut placed, plain, tensor.dtype.bytes());
                tensors.push(placed);
            }
        }
    }
    PlacementDesc::new(format, topology, tensors, Vec::new(), vec![end]).expect("a valid placement")
}

/// What a byte is: group, layer, content and plane, meaning of its indices with the request's token,
/// byte of the element.
pub(crate) type Meaning = (u32, u32, String, Vec<(AxisKind, u64)>, u64);

/// Where each meaning of a request lies on a rank, and in which block.
pub(crate) fn meanings(
    engine: &Engine,
    rank: usize,
    lists: &[Lists],
    source: bool,
) -> BTreeMap<u64, (Meaning, (u32, u32))> {
    let mut out = BTreeMap::new();
    let desc = &engine.ranks[rank];
    for placed in desc.tensors() {
        let group = engine.format.group(placed.group).expect("a group");
        let format = engine
            .format
            .tensor(placed.group, placed.layer, placed.tensor);
        let format = format.expect("a tensor");
        let request = &lists[placed.group as usize];
        let (ids, first_token) = match source {
            true => (&request.src, request.src_first),
            false => (&request.dst, request.dst_first),
        };
        let own = placed.shard_of(format);
        for (index, block) in (0_u64..).zip(ids) {
            for (mut meaning, at) in elements(format, placed) {
                let mut token = first_token + index * u64::from(group.block_tokens.max(1));
                let mut name = format.name.clone();
                for (kind, i) in &mut meaning {
                    match kind {
                        AxisKind::Token => {
                            token += *i;
                            *i = token;
                        }
                        AxisKind::Kv => {
                            name = format!("{}{}", ["k", "v"][*i as usize], &format.name[2..])
                        }
                        AxisKind::Head => *i += own.map_or(0, |own| own.first),
                        _ => {}
                    }
                }
                meaning.retain(|(kind, _)| *kind != AxisKind::Kv);
                if !meaning.iter().any(|(kind, _)| *kind == AxisKind::Token) {
                    // One for a block or a slot.
                    meaning.push((AxisKind::Token, token));
                }
                if !request.moved.contains(&token) {
                    // A block of which nothing moves, or that only begins or ends with what does.
                    continue;
                }
                for byte in 0..format.dtype.bytes() {
                    let address =
                        placed.offset + u64::from(*block) * placed.block_stride + at + byte;
                    let meaning = (
                        placed.group,
                        placed.layer,
                        name.clone(),
                        meaning.clone(),
                        byte,
                    );
                    let previous = out.insert(address, (meaning, (placed.group, *block)));
                    assert_eq!(previous, None, "two elements on one byte");
                }
            }
        }
    }
    out
}

/// The blocks of each group that a request writes.
pub(crate) fn written(consumer: &BTreeMap<u64, (Meaning, (u32, u32))>) -> BTreeSet<(u32, u32)> {
    consumer.values().map(|(_, block)| *block).collect()
}
