//! What is posted block by block moves the bytes that a plan of the same blocks moves.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::blocks::GroupPairs;
use crate::layout::{DType, KvFormat, KvPlacement, Packing, PlacementDesc, Side, Topology, models};
use crate::plan::{LayerScope, Part, Plan, Role};

const BLOCKS: u32 = 24;

fn placed(format: &KvFormat, topology: Topology) -> PlacementDesc {
    let blocks = vec![BLOCKS; format.groups().len()];
    KvPlacement::uniform(format, topology, &blocks, Packing::OneMemory, 64)
        .and_then(|u| u.describe(format))
        .expect("valid")
}

/// Equal ranks of an opaque format; a rank that has half of a model's heads and one that has all, which is the consumer.
fn plans(split: bool, role: Role) -> Compiled {
    if !split {
        let format = KvFormat::opaque(96, 3).expect("valid");
        let placement = placed(&format, Topology::single(&format));
        let side = Side {
            format: &format,
            placement: &placement,
        };
        return Compiled::compile(&side, &side, role, Part::Common).expect("the same");
    }
    let format = models::builtin("llama-3.1-8b", 2, DType::Bf16).expect("built in");
    let all = Topology::single(&format);
    let half = Topology::tensor_parallel(&format, 1, 2);
    let (p, c) = (placed(&format, half), placed(&format, all));
    let side = |placement| Side {
        format: &format,
        placement,
    };
    Compiled::compile(&side(&p), &side(&c), role, Part::Common).expect("they reshard")
}

/// Which byte comes from where, in stretches of 16 bytes.
fn copied(source: &dyn OpSource, step: u64, role: Role) -> BTreeMap<(u32, u64), (u32, u64)> {
    const GRAIN: u64 = 16;
    let mut bytes = BTreeMap::new();
    let mut total = 0;
    let mut at = 0;
    while at < source.ops() {
        let mut ops = 0;
        source.emit(at..at + step, &mut |op| {
            ops += 1;
            let mut to = op.remote_offset;
            for piece in op.local {
                for i in (0..u64::from(piece.len)).step_by(16) {
                    let (here, there) =
                        ((piece.region, piece.offset + i), (op.remote_region, to + i));
                    let before = match role {
                        Role::Push => bytes.insert(there, here),
                        Role::Pull => bytes.insert(here, there),
                    };
                    assert_eq!(before, None, "written twice");
                }
                to += u64::from(piece.len);
            }
            assert_eq!(to - op.remote_offset, op.len);
            total += op.len;
        });
        assert_eq!(ops, step.min(source.ops() - at));
        at += step;
    }
    assert_eq!((total, bytes.len() as u64 * GRAIN), (source.bytes(), total));
    bytes
}

fn planned(plans: &Compiled, layer: u32, pairs: &[BlockPair], limits: PlanLimits) -> Plan {
    let pairs = pairs.to_vec();
    let groups = [GroupPairs { group: 0, pairs }];
    let plan = plans.plan(&groups, LayerScope::Layer(layer), limits);
    plan.expect("valid")
}

proptest! {
    #[test]
    fn posted_blocks_move_what_a_plan_moves(
        split in any::<bool>(),
        role in prop_oneof![Just(Role::Push), Just(Role::Pull)],
        // The same block of a layer is not posted twice here: of a plan it could not be.
        posts in prop::collection::vec((0..3_u32, 0..BLOCKS, 0..BLOCKS), 1..60),
        follows in any::<bool>(),
        max_msg_bytes in prop_oneof![Just(64_u64), Just(256), Just(1 << 20)],
        step in 1..9_u64,
    ) {
        let plans = plans(split, role);
        let limits = PlanLimits { max_msg_bytes, max_sge: 4 };
        let of = Arc::new(BlockOps::new(&plans, limits).expect("limits"));
        let mut by_layer: BTreeMap<u32, Vec<BlockPair>> = BTreeMap::new();
        let mut posted = Posted::new(&of);
        let mut named = Vec::new();
        for (i, (layer, src, dst)) in (0..).zip(posts) {
            // Runs, or anything.
            let (layer, src, dst) = match follows {
                true => (layer / 2, i % BLOCKS, i % BLOCKS),
                false => (layer, src, dst),
            };
            let list = by_layer.entry(layer).or_default();
            if list.iter().any(|pair| pair.dst == dst) {
                continue;
            }
            let pair = BlockPair { src, dst };
            list.push(pair);
            let (at, found) = of.find(0, layer).expect("a layer");
            prop_assert_eq!(Some(found.bytes), plans.layer_bytes(0, layer));
            posted.add(at, pair);
            named.push((0, layer, pair));
        }
        prop_assert_eq!(posted.blocks().collect::<Vec<_>>(), named);
        let mut wanted = BTreeMap::new();
        for (layer, pairs) in &by_layer {
            wanted.extend(copied(&planned(&plans, *layer, pairs, limits), 7, role));
        }
        prop_assert_eq!(copied(&posted, step, role), wanted);
        // And it is known of each operation which blocks it writes.
        let mut blocks = Vec::new();
        for op in 0..=posted.ops() {
            posted.blocks_of(op, &mut blocks);
        }
        blocks.sort_unstable();
        blocks.dedup();
        let mut all: Vec<(u32, u32)> = by_layer.values().flatten().map(|p| (0, p.dst)).collect();
        all.sort_unstable();
        all.dedup();
        prop_assert_eq!(blocks, all);
        let mut lengths = Vec::new();
        posted.emit(0..posted.ops(), &mut |op| lengths.push(op.len));
        prop_assert!(lengths.iter().all(|len| *len <= max_msg_bytes));
    }
}

#[test]
fn blocks_that_follow_each_other_go_in_one_operation() {
    let plans = plans(false, Role::Push);
    let limits = PlanLimits {
        max_msg_bytes: 3 * 96,
        max_sge: 1,
    };
    let of = Arc::new(BlockOps::new(&plans, limits).expect("limits"));
    let mut posted = Posted::new(&of);
    let (at, _) = of.find(0, 1).expect("a layer");
    for i in 0..7 {
        posted.add(
            at,
            BlockPair {
                src: 3 + i,
                dst: 10 + i,
            },
        );
    }
    let mut lengths = Vec::new();
    posted.emit(0..posted.ops(), &mut |op| lengths.push(op.len));
    assert_eq!(lengths, [3 * 96, 3 * 96, 96]);
    assert_eq!(posted.runs(), 3);
}

#[test]
fn what_is_not_there_is_not_found() {
    let plans = plans(false, Role::Push);
    let limits = PlanLimits {
        max_msg_bytes: 1 << 20,
        max_sge: 1,
    };
    let of = BlockOps::new(&plans, limits).expect("limits");
    for (group, layer, is) in [
        (0, 0, true),
        (0, 2, true),
        (0, 3, false),
        (1, 0, false),
        (0, u32::MAX, false),
        (u32::MAX, 0, false),
    ] {
        assert_eq!(of.find(group, layer).is_some(), is, "{group} {layer}");
    }
    assert_eq!(of.num_blocks(0), (BLOCKS, BLOCKS));
    assert_eq!(of.num_blocks(1), (0, 0));
    let none = PlanLimits {
        max_msg_bytes: 0,
        max_sge: 1,
    };
    assert!(BlockOps::new(&plans, none).is_err());
}
