//! What a peer says of its format and placement, against a side that is as it should be. Plans that
//! are made stay inside the memories that the placement names.
//!
//! Input: the model (one byte), the length of the format (two bytes), the format, the placement.
#![no_main]

use kvxfer::blocks::{BlockPair, GroupPairs};
use kvxfer::layout::{
    DType, KvFormat, KvPlacement, Packing, PlacementDesc, Side, Topology, models,
};
use kvxfer::plan::{
    Compiled, Cover, LayerScope, OpSource, Part, Plan, PlanLimits, Role, UnitPairs,
};
use kvxfer::wire::Blob;
use libfuzzer_sys::fuzz_target;

/// The most operations of a plan that are looked at.
const LOOK: u64 = 2000;
const LIMITS: PlanLimits = PlanLimits {
    max_msg_bytes: 1 << 20,
    max_sge: 4,
};

fn own(model: u8) -> Option<(KvFormat, PlacementDesc)> {
    let format = match model % 3 {
        0 => KvFormat::opaque(4096, 2).ok()?,
        1 => models::builtin("llama-3.1-8b", 16, DType::Bf16).ok()?,
        _ => models::builtin("deepseek-v3", 16, DType::Bf16).ok()?,
    };
    let blocks = vec![8; format.groups().len()];
    let topology = Topology::single(&format);
    let uniform =
        KvPlacement::uniform(&format, topology, &blocks, Packing::PerTensor, 4096).ok()?;
    let placement = uniform.describe(&format).ok()?;
    Some((format, placement))
}

fuzz_target!(|data: &[u8]| {
    let Some((head, rest)) = data.split_first_chunk::<3>() else {
        return;
    };
    let len = usize::from(u16::from_le_bytes([head[1], head[2]]));
    let Some((format, placement)) = rest.split_at_checked(len) else {
        return;
    };
    let Ok(format) = Blob(format.to_vec()).unpack::<KvFormat>("format") else {
        return;
    };
    let Ok(placement) = Blob(placement.to_vec()).unpack::<PlacementDesc>("placement") else {
        return;
    };
    let Some((our_format, our_placement)) = own(head[0]) else {
        return;
    };
    let (ours, theirs) = (
        Side {
            format: &our_format,
            placement: &our_placement,
        },
        Side {
            format: &format,
            placement: &placement,
        },
    );
    for part in [Part::Common, Part::Share] {
        let Ok(compiled) = Compiled::compile(&theirs, &ours, Role::Pull, part) else {
            return;
        };
        let _ = Cover::missing(&ours, &[compiled.cover()]);
        let (groups, limits) = (0..our_format.groups().len() as u32, LIMITS);
        let pairs: Vec<GroupPairs> = groups
            .clone()
            .map(|group| GroupPairs {
                group,
                pairs: (0..8).map(|b| BlockPair { src: 7 - b, dst: b }).collect(),
            })
            .collect();
        if let Ok(plan) = compiled.plan(&pairs, LayerScope::All, limits) {
            look(&plan, &placement, &our_placement);
        }
        // Blocks in token order, as many as hold the same tokens on both sides.
        let of_group = |group| {
            let unit = compiled.unit(group)?;
            let units = 8 * unit.consumer_per_block.min(unit.producer_per_block);
            let list = |per_block: u32| (0..units / per_block).rev().collect::<Vec<u32>>();
            let (src, dst) = (list(unit.producer_per_block), list(unit.consumer_per_block));
            compiled.pairs(group, &src, &dst, None).ok()
        };
        let units: Vec<UnitPairs> = groups.filter_map(of_group).collect();
        if let Ok(plan) = compiled.plan_units(&units, LayerScope::All, limits) {
            look(&plan, &placement, &our_placement);
        }
    }
});

/// The operations of a plan lie inside both sides' memories.
fn look(plan: &Plan, theirs: &PlacementDesc, ours: &PlacementDesc) {
    plan.emit(0..plan.ops().min(LOOK), &mut |op| {
        let remote = theirs.memory_len()[op.remote_region as usize];
        assert!(
            op.remote_offset
                .checked_add(op.len)
                .is_some_and(|end| end <= remote)
        );
        assert_eq!(
            op.local.iter().map(|p| u64::from(p.len)).sum::<u64>(),
            op.len
        );
        for piece in op.local {
            let local = ours.memory_len()[piece.region as usize];
            assert!(piece.offset + u64::from(piece.len) <= local);
        }
    });
}
