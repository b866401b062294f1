//! Whatever the layouts, block lists, limits and ways to share the work: a plan moves exactly the
//! bytes asked for, each once, and nothing else.

mod case;
mod cluster;
mod copied;
mod formats;
mod reshard;
mod sums;
#[path = "../tape/mod.rs"]
mod tape;

use std::collections::BTreeMap;

use case::Case;
use copied::Copied;
use formats::formats;
use kvxfer::blocks::GroupPairs;
use kvxfer::layout::{KvFormat, PlacementDesc, Side};
use kvxfer::plan::{Compiled, LayerScope, OpSource, Part, Role};
use proptest::prelude::*;
use tape::tape;

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
            compiled.unit_bytes(g.group).expect("a group") * g.pairs.len() as u64
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
        let Ok(compiled) = Compiled::compile(&producer, &consumer, case.role, Part::Common) else { return Ok(()) };
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
