//! Plans whose operations are known, and requests that are refused.

use super::*;
use crate::blocks::{BlockPair, GroupPairs};
use crate::layout::{
    Axis, AxisKind, CacheGroup, DType, GroupKind, KvFormat, KvPlacement, LayerFormat, LayerWindow,
    ModelIdentity, Packing, PlacementDesc, Side, TensorFormat, TensorRole, Topology, models,
};

const NO_LIMITS: PlanLimits = PlanLimits {
    max_msg_bytes: u64::MAX,
    max_sge: 4,
};

fn uniform(format: &KvFormat, topology: Topology, blocks: u32) -> PlacementDesc {
    let blocks = vec![blocks; format.groups().len()];
    KvPlacement::uniform(format, topology, &blocks, Packing::OneMemory, 64)
        .and_then(|u| u.describe(format))
        .expect("valid")
}

fn compiled(format: &KvFormat, producer_blocks: u32, consumer_blocks: u32, role: Role) -> Compiled {
    let topology = Topology::single(format);
    let (p, c) = (
        uniform(format, topology, producer_blocks),
        uniform(format, topology, consumer_blocks),
    );
    let side = |placement| Side { format, placement };
    Compiled::compile(&side(&p), &side(&c), role, Part::Common).expect("the same format")
}

fn pairs(group: u32, pairs: &[(u32, u32)]) -> GroupPairs {
    let pairs = pairs.iter().map(|&(src, dst)| BlockPair { src, dst });
    GroupPairs {
        group,
        pairs: pairs.collect(),
    }
}

/// Every operation as (remote offset, [(local offset, length)]).
fn listed(plan: &Plan) -> Vec<(u64, Vec<(u64, u32)>)> {
    let mut out = Vec::new();
    plan.emit(0..plan.ops(), &mut |op| {
        let pieces = op.local.iter().map(|p| (p.offset, p.len)).collect();
        out.push((op.remote_offset, pieces));
    });
    out
}

#[test]
fn runs_become_one_operation_and_scattered_locals_become_pieces() {
    let format = KvFormat::opaque(100, 1).expect("valid");
    let compiled = compiled(&format, 50, 50, Role::Pull);
    let request = [pairs(0, &[(7, 1), (5, 10), (6, 11), (9, 3), (20, 0)])];
    let plan = compiled
        .plan(&request, LayerScope::All, NO_LIMITS)
        .expect("valid");
    assert_eq!(
        listed(&plan),
        [
            // Blocks 5, 6, 7: the third is elsewhere at the consumer.
            (500, vec![(1000, 200), (100, 100)]),
            (900, vec![(300, 100)]),
            (2000, vec![(0, 100)]),
        ]
    );
    assert_eq!(
        plan.report(),
        PlanReport {
            blocks: 5,
            runs: 4,
            operations: 3,
            bytes: 500
        }
    );
    // One piece an operation.
    let one_piece = PlanLimits {
        max_sge: 1,
        ..NO_LIMITS
    };
    let plan = compiled
        .plan(&request, LayerScope::All, one_piece)
        .expect("valid");
    assert_eq!(plan.ops(), 4);
}

#[test]
fn regions_over_two_gib_are_cut() {
    let block = 5_u64 << 30;
    let format = KvFormat::opaque(block, 1).expect("valid");
    let compiled = compiled(&format, 2, 2, Role::Push);
    let plan = compiled
        .plan(&[pairs(0, &[(0, 1)])], LayerScope::All, NO_LIMITS)
        .expect("valid");
    let lengths: Vec<u64> = listed(&plan)
        .iter()
        .map(|(_, pieces)| pieces.iter().map(|p| u64::from(p.1)).sum())
        .collect();
    assert_eq!(lengths, [MAX_CHUNK, MAX_CHUNK, block - 2 * MAX_CHUNK]);
}

#[test]
fn a_plan_is_no_larger_for_more_layers() {
    let sizes: Vec<(usize, u64)> = ["llama-3.1-8b", "llama-3.1-70b"]
        .into_iter()
        .map(|name| {
            let format = models::builtin(name, 16, DType::Bf16).expect("built in");
            let list: Vec<(u32, u32)> = (0..100).map(|i| (2 * i, 199 - 2 * i)).collect();
            let plan = compiled(&format, 200, 200, Role::Pull)
                .plan(&[pairs(0, &list)], LayerScope::All, NO_LIMITS)
                .expect("valid");
            (plan.held_entries(), plan.ops())
        })
        .collect();
    assert_eq!(sizes[0].1, 100 * 32 * 2);
    assert_eq!(sizes[1].1, 100 * 80 * 2);
    assert_eq!(sizes[0].0, sizes[1].0);
    assert!(sizes[0].0 < 400);
}

#[test]
fn nothing_asked_for_is_a_plan_of_nothing() {
    let format = KvFormat::opaque(100, 3).expect("valid");
    let compiled = compiled(&format, 5, 5, Role::Pull);
    for request in [vec![], vec![pairs(0, &[])]] {
        for scope in [LayerScope::All, LayerScope::Layer(1)] {
            let plan = compiled.plan(&request, scope, NO_LIMITS).expect("valid");
            assert_eq!(plan.report(), PlanReport::default());
            plan.emit(0..u64::MAX, &mut |op| panic!("{op:?}"));
        }
    }
}

#[test]
fn requests_that_cannot_be_are_refused() {
    let format = KvFormat::opaque(100, 2).expect("valid");
    let compiled = compiled(&format, 5, 7, Role::Pull);
    let refused = |request: &[GroupPairs], scope, limits| {
        compiled
            .plan(request, scope, limits)
            .expect_err("refused")
            .to_string()
    };
    let all = |request: &[GroupPairs]| refused(request, LayerScope::All, NO_LIMITS);
    assert_eq!(
        all(&[pairs(0, &[(0, 0), (5, 6)])]),
        "producer block 5 of group 0 is out of range; there are 5"
    );
    assert_eq!(
        all(&[pairs(0, &[(4, 7), (0, 0)])]),
        "consumer block 7 of group 0 is out of range; there are 7"
    );
    assert_eq!(
        all(&[pairs(0, &[(0, u32::MAX), (1, u32::MAX)])]),
        "consumer block 4294967295 of group 0 is out of range; there are 7"
    );
    assert_eq!(
        all(&[pairs(0, &[(0, 3), (1, 4), (2, 3)])]),
        "destination block 3 of group 0 is listed twice"
    );
    assert_eq!(all(&[pairs(1, &[])]), "group 1 of 1");
    assert_eq!(
        all(&[pairs(0, &[]), pairs(0, &[])]),
        "group 0 is listed twice"
    );
    assert_eq!(
        refused(&[], LayerScope::Layer(2), NO_LIMITS),
        "layer 2 is not among this rank's layers 0..2"
    );
    let zero = PlanLimits {
        max_sge: 0,
        ..NO_LIMITS
    };
    assert!(refused(&[], LayerScope::All, zero).contains("at least 1"));
    // The same source twice is fine: two requests may share a prefix.
    assert!(
        compiled
            .plan(&[pairs(0, &[(1, 0), (1, 1)])], LayerScope::All, NO_LIMITS)
            .is_ok()
    );
}

#[test]
fn duplicates_far_apart_are_found_too() {
    let format = KvFormat::opaque(1, 1).expect("valid");
    let compiled = compiled(&format, 10, u32::MAX, Role::Pull);
    let far = u32::MAX - 1;
    let error = compiled.plan(
        &[pairs(0, &[(0, far), (1, 0), (2, far)])],
        LayerScope::All,
        NO_LIMITS,
    );
    assert_eq!(
        error.expect_err("refused"),
        PlanError::DuplicateDestination {
            group: 0,
            block: far
        }
    );
}

fn two_groups() -> KvFormat {
    let group = |name: &str, layer| CacheGroup {
        name: name.into(),
        kind: GroupKind::Full,
        block_tokens: 1,
        layers: vec![LayerFormat {
            layer,
            draft: false,
            tensors: vec![TensorFormat {
                name: "bytes".into(),
                role: TensorRole::Opaque,
                dtype: DType::Uint8,
                axes: vec![Axis::new(AxisKind::Opaque, 8)],
                sharded: None,
                scaling: None,
            }],
        }],
    };
    let model = ModelIdentity::new("test", None);
    KvFormat::new(model, vec![group("a", 0), group("b", 1)]).expect("valid")
}

#[test]
fn a_layer_moves_in_the_groups_that_have_it() {
    let compiled = compiled(&two_groups(), 4, 4, Role::Push);
    let both = [pairs(0, &[(0, 1)]), pairs(1, &[(2, 3)])];
    let plan = compiled
        .plan(&both, LayerScope::Layer(1), NO_LIMITS)
        .expect("valid");
    assert_eq!(plan.ops(), 1);
    let mut blocks = Vec::new();
    plan.blocks_of(0, &mut blocks);
    assert_eq!(blocks, [(1, 3)]);
    assert_eq!(
        compiled
            .plan(&both[..1], LayerScope::Layer(1), NO_LIMITS)
            .expect_err("refused"),
        PlanError::LayerNotInGroups { layer: 1 }
    );
}

#[test]
fn a_block_of_a_shared_pool_has_one_group() {
    let format = two_groups();
    let topology = Topology::single(&format);
    let producer = uniform(&format, topology, 4);
    let consumer = PlacementDesc::new(
        &format,
        topology,
        producer.tensors().to_vec(),
        vec![0, 0],
        producer.memory_len().to_vec(),
    )
    .expect("valid");
    let side = |placement| Side {
        format: &format,
        placement,
    };
    let compiled = Compiled::compile(&side(&producer), &side(&consumer), Role::Pull, Part::Common)
        .expect("matches");
    let plan = |a, b| {
        let request = [pairs(0, &[(0, a)]), pairs(1, &[(0, b)])];
        compiled.plan(&request, LayerScope::All, NO_LIMITS)
    };
    assert!(plan(1, 2).is_ok());
    assert!(matches!(
        plan(2, 2),
        Err(PlanError::DuplicateDestination { block: 2, .. })
    ));
    // The same of lists.
    let listed = |a, b| {
        let of = |group, block: u32| compiled.pairs(group, &[0], &[block], None);
        let request = [of(0, a).expect("listed"), of(1, b).expect("listed")];
        compiled.plan_units(&request, LayerScope::All, NO_LIMITS)
    };
    assert!(listed(1, 2).is_ok());
    assert!(matches!(
        listed(2, 2),
        Err(PlanError::DuplicateDestination { block: 2, group: 1 })
    ));
}

fn llama(block: u32, dtype: DType) -> KvFormat {
    models::builtin("llama-3.1-8b", block, dtype).expect("built in")
}

fn between(p: &KvFormat, c: &KvFormat, topologies: (Topology, Topology)) -> Compiled {
    let (pp, cp) = (uniform(p, topologies.0, 100), uniform(c, topologies.1, 100));
    let producer = Side {
        format: p,
        placement: &pp,
    };
    let consumer = Side {
        format: c,
        placement: &cp,
    };
    Compiled::compile(&producer, &consumer, Role::Pull, Part::Share).expect("reshardable")
}

fn unequal(producer: u32, consumer: u32) -> Compiled {
    let (p, c) = (llama(producer, DType::Bf16), llama(consumer, DType::Bf16));
    let topologies = (Topology::single(&p), Topology::single(&c));
    between(&p, &c, topologies)
}

#[test]
fn what_no_copy_can_bridge_is_refused_with_the_field_named() {
    let (format, other) = (llama(16, DType::Bf16), llama(64, DType::F16));
    let (p, c) = (
        uniform(&format, Topology::single(&format), 4),
        uniform(&other, Topology::single(&other), 4),
    );
    let producer = Side {
        format: &format,
        placement: &p,
    };
    let consumer = Side {
        format: &other,
        placement: &c,
    };
    let compile = |consumer| Compiled::compile(&producer, consumer, Role::Pull, Part::Common);
    let error = compile(&consumer).expect_err("refused");
    let CompileError::Mismatch(mismatch) = error else {
        panic!("{error}");
    };
    let fields: Vec<&str> = mismatch
        .differences
        .iter()
        .map(|d| d.field.as_str())
        .collect();
    assert_eq!(
        fields,
        [
            "groups[0].layers[0-31].k.dtype",
            "groups[0].layers[0-31].v.dtype",
            "groups[0].block_tokens"
        ]
    );
    // A placement that is not for its format is neither a mismatch nor a panic.
    let wrong = Side {
        format: &other,
        placement: &p,
    };
    assert!(matches!(
        compile(&wrong),
        Err(CompileError::Placement {
            side: SideName::Consumer,
            ..
        })
    ));
}

/// (source unit, destination unit) of each pair.
fn listed_units(pairs: &UnitPairs) -> Vec<(u32, u32)> {
    pairs.pairs.iter().map(|p| (p.src, p.dst)).collect()
}

#[test]
fn unequal_blocks_go_in_units() {
    let compiled = unequal(16, 48);
    let unit = compiled.unit(0).expect("a group");
    assert_eq!(
        (
            unit.tokens,
            unit.producer_per_block,
            unit.consumer_per_block
        ),
        (16, 1, 3)
    );
    let pairs = compiled
        .pairs(0, &[7, 3, 9, 5], &[2, 0], None)
        .expect("listed");
    assert_eq!(listed_units(&pairs), [(7, 6), (3, 7), (9, 8), (5, 0)]);
    assert_eq!(pairs.blocks(), [2, 0]);
    // Tokens 20 to 40 are in the units of 16 to 48: the start must be given as such.
    let some = compiled.pairs(0, &[7, 3, 9, 5], &[2, 0], Some(16..40));
    let some = some.expect("listed");
    assert_eq!(listed_units(&some), [(3, 7), (9, 8)]);
    assert_eq!(some.blocks(), [2]);
    let plan = compiled.plan_units(&[pairs], LayerScope::Layer(3), NO_LIMITS);
    let plan = plan.expect("planned");
    assert_eq!(
        plan.report(),
        PlanReport {
            blocks: 2,
            runs: 4,
            operations: 8,
            bytes: 2 * 64 * 8 * 128 * 2,
        }
    );
    // 24 and 16: units of 8 on both sides.
    let compiled = unequal(24, 16);
    let pairs = compiled
        .pairs(0, &[1, 0], &[10, 11, 12], None)
        .expect("listed");
    assert_eq!(
        listed_units(&pairs),
        [(3, 20), (4, 21), (5, 22), (0, 23), (1, 24), (2, 25)]
    );
    let error = compiled.plan(&[self::pairs(0, &[(0, 0)])], LayerScope::All, NO_LIMITS);
    assert!(matches!(error, Err(PlanError::UnequalBlocks { .. })));
    let empty = compiled.plan(&[self::pairs(0, &[])], LayerScope::All, NO_LIMITS);
    assert_eq!(empty.expect("nothing to plan").ops(), 0);
    let others = unequal(16, 48).plan_units(&[pairs], LayerScope::All, NO_LIMITS);
    assert_eq!(
        others.expect_err("other units"),
        PlanError::OtherUnits { group: 0 }
    );
}

#[test]
fn lists_that_begin_at_unequal_tokens() {
    // A window that begins at token 90: block 5 of 16 tokens, block 1 of 64.
    let compiled = unequal(16, 64);
    let (src, dst) = ([50, 51, 52], [7]);
    let src = Listed {
        blocks: &src,
        first_token: 80,
    };
    let dst = Listed {
        blocks: &dst,
        first_token: 64,
    };
    let pairs = compiled.pairs(0, src, dst, None).expect("listed");
    assert_eq!(listed_units(&pairs), [(50, 29), (51, 30), (52, 31)]);
    let refused = |tokens| compiled.pairs(0, src, dst, tokens).expect_err("refused");
    assert_eq!(
        refused(Some(64..128)).to_string(),
        "group 0: tokens 64..128 are wanted, and the producer's 3 blocks hold 80..128"
    );
    assert_eq!(
        refused(Some(81..128)).to_string(),
        "group 0: token 81 is within a unit; begin at a multiple of 16"
    );
}

#[test]
fn lists_that_do_not_fit_are_refused() {
    let compiled = unequal(16, 64);
    let refused = |src: &[u32], dst: &[u32]| {
        let error = compiled.pairs(0, src, dst, None).expect_err("refused");
        error.to_string()
    };
    assert_eq!(
        refused(&[0, 1, 2, 3], &[0, 1]),
        "group 0: the producer's 4 blocks hold tokens 0..64, the consumer's 2 hold tokens 0..128; one list has blocks that the other has nothing for"
    );
    assert!(refused(&[0, 1, 2, 3, 4], &[0]).contains("hold tokens 0..80"));
    assert_eq!(
        refused(&[0, 1, 2, 3, 4], &[5, 5]),
        "destination block 5 of group 0 is listed twice"
    );
    assert_eq!(
        refused(&[0, 100], &[5]),
        "producer block 100 of group 0 is out of range; there are 100"
    );
    assert_eq!(
        refused(&[0], &[100]),
        "consumer block 100 of group 0 is out of range; there are 100"
    );
    assert!(matches!(
        compiled.pairs(1, &[], &[], None),
        Err(PlanError::UnknownGroup { .. })
    ));
    for (src, dst) in [(&[][..], &[1][..]), (&[1], &[])] {
        assert!(matches!(
            compiled.pairs(0, src, dst, None),
            Err(PlanError::Lengths { .. })
        ));
    }
    assert!(
        compiled
            .pairs(0, &[], &[], None)
            .expect("nothing")
            .is_empty()
    );
    let nothing = compiled.pairs(0, &[1], &[], Some(32..32));
    assert!(nothing.expect("no tokens").is_empty());
}

#[test]
fn more_units_than_numbers_are_refused() {
    let (p, c) = (llama(1024, DType::Bf16), llama(1023, DType::Bf16));
    let (pp, cp) = (
        uniform(&p, Topology::single(&p), 1 << 22),
        uniform(&c, Topology::single(&c), 4),
    );
    let side = |format, placement| Side { format, placement };
    let error = Compiled::compile(&side(&p, &pp), &side(&c, &cp), Role::Pull, Part::Common);
    assert!(matches!(
        error,
        Err(CompileError::TooManyUnits {
            side: SideName::Producer,
            per_block: 1024,
            ..
        })
    ));
}

#[test]
fn ranks_share_out_what_several_keep() {
    // 8 heads on 4 ranks, read by 8; a latent on 4 ranks, read by 8: both from the rank that is faced.
    for name in ["llama-3.1-8b", "deepseek-v3"] {
        let format = models::builtin(name, 16, DType::Bf16).expect("built in");
        for reader in 0..8 {
            let givers = (0..4).filter(|giver| {
                let topologies = (
                    Topology::tensor_parallel(&format, *giver, 4),
                    Topology::tensor_parallel(&format, reader, 8),
                );
                !between(&format, &format, topologies).is_empty()
            });
            assert_eq!(givers.collect::<Vec<_>>(), [reader / 2], "{name} {reader}");
        }
    }
}

/// Of what all have, each data-parallel reader takes it from another.
#[test]
fn data_parallel_readers_spread_over_the_replicas() {
    let format = models::builtin("deepseek-v3", 16, DType::Bf16).expect("built in");
    for reader in 0..8 {
        let mut consumer = Topology::single(&format);
        (consumer.rank.dp, consumer.dp) = (reader, 8);
        let givers = (0..8).filter(|giver| {
            let topologies = (Topology::tensor_parallel(&format, *giver, 8), consumer);
            !between(&format, &format, topologies).is_empty()
        });
        assert_eq!(givers.collect::<Vec<_>>(), [reader]);
    }
}

#[test]
fn what_is_missing_is_named() {
    let format = llama(16, DType::Bf16);
    let whole = Topology::single(&format);
    let covers: Vec<Compiled> = (0..4)
        .map(|tp| {
            between(
                &format,
                &format,
                (Topology::tensor_parallel(&format, tp, 4), whole),
            )
        })
        .collect();
    let placement = uniform(&format, whole, 100);
    let consumer = Side {
        format: &format,
        placement: &placement,
    };
    let missing = |of: &[usize]| {
        let covers: Vec<&Cover> = of.iter().map(|i| covers[*i].cover()).collect();
        Cover::missing(&consumer, &covers).map(|m| m.to_string())
    };
    assert_eq!(missing(&[3, 0, 2, 1]), None);
    assert_eq!(missing(&[0, 1, 1, 2, 3, 3]), None);
    let said = |of: &[usize]| missing(of).expect("something is missing");
    assert_eq!(said(&[0, 3]), "group 0 (full) layers 0-31 k head 2..6");
    assert_eq!(said(&[1, 2, 3]), "group 0 (full) layers 0-31 k head 0..2");
    assert_eq!(said(&[]), "group 0 (full) layers 0-31 k");
    // Another stage gives other layers.
    let stage = Topology {
        layers: LayerWindow { first: 0, end: 20 },
        ..whole
    };
    let half = between(&format, &format, (stage, whole));
    assert_eq!(half.layers(), stage.layers);
    let missing = Cover::missing(&consumer, &[half.cover()]);
    assert_eq!(
        missing.expect("the other stage").to_string(),
        "group 0 (full) layers 20-31 k head 0..8"
    );
}
