//! Engines that cut the same model otherwise: what all producer ranks give a consumer rank is what a
//! copy element by element gives it.

use std::collections::{BTreeMap, BTreeSet};

use crate::cluster::{Cluster, meanings, written};
use crate::copied::batches;
use crate::tape::{Tape, tape_of};
use kvxfer::ids::Rank;
use kvxfer::layout::{Severity, compare, reshard};
use kvxfer::plan::{
    Compiled, Cover, LayerScope, OpSource, Part, Plan, PlanLimits, Role, UnitPairs,
};
use proptest::prelude::*;

/// For each destination byte the producer rank and byte that it came from, and how often it came.
type Arrived = BTreeMap<u64, Vec<(usize, u64)>>;

fn limits(tape: &mut Tape) -> PlanLimits {
    PlanLimits {
        max_msg_bytes: tape.pick(&[u64::MAX, 30, 7]),
        max_sge: 1 + tape.below(4) as u32,
    }
}

/// The bytes that a plan copies, by destination and source, told as a kernel is told them.
fn scattered(compiled: &Compiled, plan: &Plan, role: Role) -> Vec<(u64, u64)> {
    assert!(plan.is_of(compiled));
    let classes = compiled.scattered().expect("few blocks");
    let mut bytes = Vec::new();
    for part in plan.scattered().expect("few blocks") {
        let class = &classes[part.class];
        let tensors: Vec<_> = class.tensors().collect();
        for (remote_at, local_at) in &tensors[part.tensors] {
            assert_eq!((remote_at.0, local_at.0), (0, 0), "one memory a rank");
            for (remote, local) in &part.pairs {
                assert!(*remote < class.remote_steps && *local < class.local_steps);
                let remote = remote_at.1 + u64::from(*remote) * class.remote_step;
                let local = local_at.1 + u64::from(*local) * class.local_step;
                for (of_remote, of_local, len) in class.pieces() {
                    bytes.extend((0..len).map(|i| {
                        let (there, here) = (remote + of_remote + i, local + of_local + i);
                        match role {
                            Role::Pull => (here, there),
                            Role::Push => (there, here),
                        }
                    }));
                }
            }
        }
    }
    bytes.sort_unstable();
    bytes
}

/// Carries a plan out. Each operation must name the blocks that it writes, once each; and a kernel that copies
/// blocks must be told of the same bytes.
fn run(
    (compiled, plan): (&Compiled, &Plan),
    (from, role): (usize, Role),
    tape: &mut Tape,
    consumer: &BTreeMap<u64, (crate::cluster::Meaning, (u32, u32))>,
    arrived: &mut Arrived,
) {
    let mut copied = Vec::new();
    for batch in batches(tape, plan.ops()) {
        let mut index = batch.start;
        plan.emit(batch, &mut |op| {
            let mut remote = op.remote_offset;
            let mut blocks = BTreeSet::new();
            for piece in op.local {
                for i in 0..u64::from(piece.len) {
                    let (here, there) = (piece.offset + i, remote + i);
                    let (src, dst) = match role {
                        Role::Pull => (there, here),
                        Role::Push => (here, there),
                    };
                    let (_, block) = consumer.get(&dst).expect("a byte nobody asked for");
                    blocks.insert(*block);
                    arrived.entry(dst).or_default().push((from, src));
                    copied.push((dst, src));
                }
                remote += u64::from(piece.len);
            }
            let mut named = Vec::new();
            plan.blocks_of(index, &mut named);
            assert_eq!(named.len(), blocks.len());
            assert_eq!(named.into_iter().collect::<BTreeSet<_>>(), blocks);
            index += 1;
        });
    }
    copied.sort_unstable();
    assert_eq!(copied, scattered(compiled, plan, role));
}

pub(crate) fn pairs(compiled: &Compiled, cluster: &Cluster) -> Vec<UnitPairs> {
    let lists = (0_u32..).zip(&cluster.lists);
    lists
        .map(|(group, l)| {
            let listed = |blocks, first_token| kvxfer::plan::Listed {
                blocks,
                first_token,
            };
            let (src, dst) = (listed(&l.src, l.src_first), listed(&l.dst, l.dst_first));
            compiled
                .pairs(group, src, dst, l.tokens.clone())
                .expect("lists that hold it")
        })
        .collect()
}

/// What has come of all producer ranks' plans for one consumer rank is what was asked for.
fn check(cluster: &Cluster, to: usize, arrived: &Arrived, once: bool) {
    let consumer = meanings(&cluster.consumer, to, &cluster.lists, false);
    let producers: Vec<_> = (0..cluster.producer.ranks.len())
        .map(|from| meanings(&cluster.producer, from, &cluster.lists, true))
        .collect();
    assert_eq!(arrived.len(), consumer.len());
    for (dst, (wanted, _)) in &consumer {
        let came = arrived.get(dst).expect("every byte");
        assert!(!once || came.len() == 1, "{came:?}");
        for (from, src) in came {
            let (meaning, _) = producers[*from].get(src).expect("a byte of the request");
            assert_eq!(meaning, wanted, "from rank {from}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn all_shares_together_are_what_a_consumer_rank_keeps(mut tape in tape_of(3000)) {
        let cluster = Cluster::new(&mut tape);
        let (role, limits) = (tape.pick(&[Role::Pull, Role::Push]), limits(&mut tape));
        let part = if tape.chance(4) { Part::Common } else { Part::Share };
        let by_layer = tape.chance(3);
        let (producer, consumer) = (&cluster.producer, &cluster.consumer);
        let mut taken: BTreeMap<Rank, BTreeSet<Rank>> = BTreeMap::new();
        for to in 0..consumer.ranks.len() {
            let c = consumer.side(to);
            let needed = meanings(consumer, to, &cluster.lists, false);
            let mut arrived = Arrived::new();
            let mut compiled = Vec::new();
            for from in 0..producer.ranks.len() {
                let p = producer.side(from);
                let one = Compiled::compile(&p, &c, role, part).expect("reshardable");
                let pairs = pairs(&one, &cluster);
                let window = one.layers();
                let scopes: Vec<LayerScope> = match by_layer {
                    true => (window.first..window.end).map(LayerScope::Layer).collect(),
                    false => vec![LayerScope::All],
                };
                for scope in scopes {
                    match one.plan_units(&pairs, scope, limits) {
                        Ok(plan) => {
                            prop_assert!(!one.is_empty() || plan.ops() == 0);
                            run((&one, &plan), (from, role), &mut tape, &needed, &mut arrived);
                        }
                        // Only where no group that has this layer was asked for.
                        Err(error) => {
                            let LayerScope::Layer(layer) = scope else { panic!("{error}") };
                            let asked = pairs.iter().filter(|p| !p.is_empty());
                            let groups = asked.map(|p| producer.format.group(p.group()).expect("a group"));
                            let found = groups.into_iter().any(|g| g.layer(layer).is_some());
                            prop_assert!(!found, "{}", error);
                        }
                    }
                }
                if part == Part::Share && !one.is_empty() {
                    let rank = p.placement.topology().rank;
                    taken.entry(rank).or_default().insert(c.placement.topology().rank);
                }
                compiled.push(one);
            }
            check(&cluster, to, &arrived, part == Part::Share);

            // Whoever gives something is needed, and nobody else.
            let all: Vec<&Cover> = compiled.iter().map(Compiled::cover).collect();
            prop_assert_eq!(Cover::missing(&c, &all), None);
            if part == Part::Share {
                for (left_out, one) in compiled.iter().enumerate() {
                    let mut others = all.clone();
                    others.remove(left_out);
                    prop_assert_eq!(Cover::missing(&c, &others).is_some(), !one.is_empty());
                }
                let topology = c.placement.topology();
                let from = (&producer.format, producer.parallel);
                let sources = reshard::sources(from, (&consumer.format, topology));
                let givers = compiled.iter().zip(&producer.ranks);
                let givers = givers.filter(|(one, _)| !one.is_empty());
                let givers: Vec<Rank> = givers.map(|(_, desc)| desc.topology().rank).collect();
                prop_assert_eq!(sources.expect("even"), givers);
            }
        }
        if part == Part::Share {
            for desc in &producer.ranks {
                let topology = desc.topology();
                let to = (&consumer.format, consumer.parallel);
                let takers = reshard::takers((&producer.format, topology), to);
                let takers: BTreeSet<Rank> = takers.expect("even").into_iter().collect();
                prop_assert_eq!(takers, taken.remove(&topology.rank).unwrap_or_default());
            }
        }
    }

    /// Where blocks are of one size, two lists are pairs of blocks.
    #[test]
    fn lists_of_equal_blocks_are_pairs(ids in prop::collection::btree_set(0_u32..60, 0..40), mut tape in tape_of(200)) {
        let cluster = equal_blocks(&mut tape);
        let Some((cluster, group)) = cluster else { return Ok(()) };
        let one = Compiled::compile(&cluster.producer.side(0), &cluster.consumer.side(0), Role::Pull, Part::Common);
        let one = one.expect("reshardable");
        let unit = one.unit(group).expect("a group");
        prop_assert_eq!((unit.producer_per_block, unit.consumer_per_block), (1, 1));
        let (src_blocks, dst_blocks) = one.num_blocks(group).expect("a group");
        let src: Vec<u32> = ids.iter().copied().filter(|id| *id < src_blocks).collect();
        let mut dst: Vec<u32> = (0..dst_blocks).collect();
        tape.shuffle(&mut dst);
        let count = src.len().min(dst.len());
        let pairs = one.pairs(group, &src[..count], &dst[..count], None).expect("listed");
        prop_assert_eq!(pairs.len(), count);
        prop_assert_eq!(pairs.blocks(), &dst[..count]);
        let zipped = src.iter().zip(&dst).map(|(src, dst)| kvxfer::blocks::BlockPair { src: *src, dst: *dst });
        let zipped = kvxfer::blocks::GroupPairs { group, pairs: zipped.collect() };
        let limits = limits(&mut tape);
        let listed = one.plan_units(&[pairs], LayerScope::All, limits).expect("planned");
        let paired = one.plan(&[zipped], LayerScope::All, limits).expect("planned");
        prop_assert_eq!(listed.report(), paired.report());
        let ops = |plan: &Plan| {
            let mut out = Vec::new();
            plan.emit(0..plan.ops(), &mut |op| out.push(format!("{op:?}")));
            out
        };
        prop_assert_eq!(ops(&listed), ops(&paired));
    }
}

/// A cluster with a group of equal blocks that both first ranks keep.
fn equal_blocks(tape: &mut Tape) -> Option<(Cluster, u32)> {
    let cluster = Cluster::new(tape);
    let groups = (0_u32..).zip(
        cluster
            .producer
            .format
            .groups()
            .iter()
            .zip(cluster.consumer.format.groups()),
    );
    let equal = groups
        .filter(|(_, (p, c))| p.block_tokens == c.block_tokens)
        .map(|(g, _)| g)
        .find(|g| {
            let keeps = |engine: &crate::cluster::Engine| engine.ranks[0].num_blocks(*g).is_some();
            keeps(&cluster.producer) && keeps(&cluster.consumer)
        })?;
    Some((cluster, equal))
}

/// The generator is worth something only if its cases differ in what matters.
#[test]
fn the_clusters_have_variety() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    let mut runner = TestRunner::deterministic();
    let mut seen: BTreeMap<&str, u32> = BTreeMap::new();
    for _ in 0..300 {
        let mut tape = tape_of(3000)
            .new_tree(&mut runner)
            .expect("a tape")
            .current();
        let cluster = Cluster::new(&mut tape);
        let (producer, consumer) = (&cluster.producer, &cluster.consumer);
        let (pp, cp) = (producer.parallel, consumer.parallel);
        let (p, c) = (producer.side(0), consumer.side(0));
        let differences = compare(&p, &c);
        assert!(
            differences.iter().all(|d| d.severity == Severity::Reshard),
            "{differences:#?}"
        );
        let differs = |field: &str| differences.iter().any(|d| d.field.ends_with(field));
        let written = written(&meanings(consumer, 0, &cluster.lists, false));
        let sizes = producer
            .format
            .groups()
            .iter()
            .zip(consumer.format.groups());
        let uneven = sizes
            .filter(|(p, c)| {
                p.block_tokens > 0
                    && p.block_tokens.max(c.block_tokens) % p.block_tokens.min(c.block_tokens) > 0
            })
            .count();
        let replicated = producer
            .format
            .groups()
            .iter()
            .flat_map(|g| &g.layers)
            .flat_map(|l| &l.tensors);
        let replicated = replicated
            .filter_map(|t| t.sharded_axis())
            .any(|a| a.extent < u64::from(pp.tp));
        let features = [
            ("more tensor-parallel ranks at the consumer", pp.tp < cp.tp),
            ("more at the producer", pp.tp > cp.tp),
            (
                "neither divides the other",
                pp.tp.max(cp.tp) % pp.tp.min(cp.tp) > 0,
            ),
            ("fewer stages", pp.pp > cp.pp),
            ("more stages", pp.pp < cp.pp),
            ("heads that several producer ranks keep", replicated),
            ("unequal blocks", differs("block_tokens")),
            ("blocks that do not divide one another", uneven > 0),
            ("K and V in one tensor on one side", cluster.restacked),
            ("heads dealt out on one side only", !cluster.alike),
            ("blocks", !written.is_empty()),
            (
                "some of the tokens",
                cluster.lists.iter().any(|l| l.tokens.is_some()),
            ),
            (
                "lists that begin at unequal tokens",
                cluster.lists.iter().any(|l| l.src_first != l.dst_first),
            ),
        ];
        for (feature, here) in features {
            *seen.entry(feature).or_default() += u32::from(here);
        }
    }
    for (feature, cases) in seen {
        assert!(cases >= 15, "{feature}: {cases} of 300 cases");
    }
}
