//! Sums do not depend on where blocks lie, and see every changed bit.

use std::collections::{BTreeMap, BTreeSet};

use kvxfer::layout::{KvFormat, PlacementDesc, Side};
use kvxfer::plan::{Compiled, LayerScope, Part, PlanLimits, Role, SideName};
use kvxfer::sums::Summed;
use proptest::prelude::*;

use crate::case::Case;
use crate::cluster::{Cluster, Meaning, meanings};
use crate::reshard::pairs;
use crate::tape::{Tape, tape, tape_of};

type Memory = Vec<Vec<u8>>;

const LIMITS: PlanLimits = PlanLimits {
    max_msg_bytes: u64::MAX,
    max_sge: 4,
};

fn random(tape: &mut Tape, side: &PlacementDesc) -> Memory {
    let mut state = 1 + tape.below(u64::MAX - 1);
    let mut byte = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    let lens = side.memory_len().iter();
    lens.map(|len| (0..*len).map(|_| byte()).collect())
        .collect()
}

/// By (layer, tensor on this side) the sum of each unit.
fn sums(
    summed: &Summed,
    (group, scope): (u32, LayerScope),
    units: &[u32],
    memory: &Memory,
) -> Vec<((u32, u32), Vec<u64>)> {
    let tensors = summed.tensors(group, scope).iter();
    tensors
        .map(|tensor| {
            let memory = &memory[tensor.memory as usize];
            let read = |offset: u64, into: &mut [u8]| {
                let at = offset as usize;
                let from = memory.get(at..at + into.len()).ok_or(offset)?;
                into.copy_from_slice(from);
                Ok::<_, u64>(())
            };
            let sum = |unit: &u32| {
                let sum = tensor.sum(*unit, &mut Vec::new(), read);
                sum.expect("inside the memory")
            };
            (
                (tensor.layer, tensor.tensor),
                units.iter().map(sum).collect(),
            )
        })
        .collect()
}

/// Both sides' view of what two ranks exchange.
fn both(producer: &Side<'_>, consumer: &Side<'_>, part: Part) -> [Summed; 2] {
    [SideName::Producer, SideName::Consumer]
        .map(|side| Summed::compile(producer, consumer, side, part).expect("few pieces"))
}

fn side<'a>(format: &'a KvFormat, placement: &'a PlacementDesc) -> Side<'a> {
    Side { format, placement }
}

/// A bit of any byte.
fn flip(tape: &mut Tape, memory: &mut Memory) -> Option<(usize, u64)> {
    let which = tape.below(memory.len() as u64) as usize;
    let len = memory[which].len() as u64;
    if len == 0 {
        return None;
    }
    let at = tape.below(len);
    memory[which][at as usize] ^= 1 << tape.below(8);
    Some((which, at))
}

/// What a sum is of: the producer rank, group, layer, the consumer's tensor and its unit.
type Of = (usize, u32, u32, u32, u32);

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// Any order of axes, splits, strides and memories; layer by layer or all at once.
    #[test]
    fn what_was_copied_has_the_sums_of_its_source(mut tape in tape()) {
        let case = Case::new(&mut tape);
        let from = random(&mut tape, &case.producer);
        let mut to = random(&mut tape, &case.consumer);
        let expected = case.expected();
        for (dst, (src, _)) in &expected {
            to[dst.0][dst.1 as usize] = from[src.0][src.1 as usize];
        }
        let p = side(&case.formats.producer, &case.producer);
        let c = side(&case.formats.consumer, &case.consumer);
        let [there, here] = both(&p, &c, Part::Common);
        let plan = case.compile().plan(&case.pairs, LayerScope::All, LIMITS).expect("planned");
        let mut summed = 0;
        for (group, units) in plan.units() {
            let (src, dst): (Vec<u32>, Vec<u32>) = units.unzip();
            let window = case.formats.window;
            let of = |scope| (sums(&there, (group, scope), &src, &from), sums(&here, (group, scope), &dst, &to));
            let (left, right) = of(LayerScope::All);
            prop_assert!(!left.is_empty() && left.len() == right.len());
            let by_layer = (window.first..window.end).map(LayerScope::Layer).map(of);
            let by_layer: Vec<_> = by_layer.flat_map(|(left, _)| left).collect();
            prop_assert_eq!(&by_layer, &left);
            for (left, right) in left.iter().zip(&right) {
                prop_assert_eq!(left.0.0, right.0.0);
                prop_assert_eq!(&left.1, &right.1);
            }
            let bytes: u64 = here.tensors(group, LayerScope::All).iter().map(|t| t.bytes()).sum();
            summed += bytes * dst.len() as u64;
        }
        // Every byte is in a sum, once.
        prop_assert_eq!(summed, expected.len() as u64);
    }

    /// Engines that are cut otherwise, of unequal blocks, K and V in one tensor or in two: what two
    /// ranks exchange has the same sums on both, and a changed bit is in one of them alone.
    #[test]
    fn a_changed_bit_is_in_one_sum_alone(mut tape in tape_of(3000)) {
        let cluster = Cluster::new(&mut tape);
        let (producer, consumer) = (&cluster.producer, &cluster.consumer);
        let to = tape.below(consumer.ranks.len() as u64) as usize;
        let c = consumer.side(to);
        let needed = meanings(consumer, to, &cluster.lists, false);
        let mut arrived = random(&mut tape, &consumer.ranks[to]);
        let mut sources = Vec::new();
        // Which byte of which rank holds what, of all ranks: the last of those that keep the same.
        let mut keeps: BTreeMap<Meaning, Vec<(usize, u64)>> = BTreeMap::new();
        for from in 0..producer.ranks.len() {
            sources.push(random(&mut tape, &producer.ranks[from]));
            for (at, (meaning, _)) in meanings(producer, from, &cluster.lists, true) {
                keeps.entry(meaning).or_default().push((from, at));
            }
        }
        // Replicas keep the same bytes.
        for (meaning, places) in &keeps {
            let (rank, at) = places[0];
            let byte = sources[rank][0][at as usize];
            for (rank, at) in places {
                sources[*rank][0][*at as usize] = byte;
            }
            if let Some((dst, _)) = needed.iter().find(|(_, (of, _))| of == meaning) {
                arrived[0][*dst as usize] = byte;
            }
        }
        let mut exchanged = Vec::new();
        for (from, source) in sources.iter().enumerate() {
            let p = producer.side(from);
            let one = Compiled::compile(&p, &c, Role::Pull, Part::Share).expect("reshardable");
            let [there, here] = both(&p, &c, Part::Share);
            let plan = one.plan_units(&pairs(&one, &cluster), LayerScope::All, LIMITS).expect("planned");
            for (group, units) in plan.units() {
                let (src, dst): (Vec<u32>, Vec<u32>) = units.unzip();
                let wanted = sums(&there, (group, LayerScope::All), &src, source);
                exchanged.push((from, group, dst, here.clone(), wanted));
            }
        }
        let differing = |arrived: &Memory| {
            let mut out: BTreeSet<Of> = BTreeSet::new();
            for (from, group, dst, here, wanted) in &exchanged {
                let found = sums(here, (*group, LayerScope::All), dst, arrived);
                assert_eq!(found.len(), wanted.len());
                for ((key, found), (_, wanted)) in found.iter().zip(wanted) {
                    let units = dst.iter().zip(found.iter().zip(wanted));
                    let differ = units.filter(|(_, (found, wanted))| found != wanted);
                    out.extend(differ.map(|(unit, _)| (*from, *group, key.0, key.1, *unit)));
                }
            }
            out
        };
        prop_assert_eq!(differing(&arrived), BTreeSet::new());
        for _ in 0..8 {
            let kept = arrived.clone();
            // Most bytes of a memory are of no request.
            let at = match tape.chance(2) {
                true => flip(&mut tape, &mut arrived).map(|(_, at)| at),
                false => needed.keys().nth(tape.below(needed.len().max(1) as u64) as usize).map(|at| {
                    arrived[0][*at as usize] ^= 1;
                    *at
                }),
            };
            let Some(at) = at else { continue };
            let found = differing(&arrived);
            match needed.get(&at) {
                None => prop_assert_eq!(found, BTreeSet::new()),
                Some(((group, layer, ..), (_, block))) => {
                    prop_assert_eq!(found.len(), 1);
                    let (_, of_group, of_layer, tensor, unit) = found.into_iter().next().expect("one");
                    prop_assert_eq!((of_group, of_layer), (*group, *layer));
                    let sizes = [&producer.format, &consumer.format]
                        .map(|format| format.group(of_group).expect("a group").block_tokens);
                    prop_assert_eq!(unit / per_block(sizes), *block);
                    let placed = consumer.ranks[to].tensors().iter().find(|t| {
                        (t.group, t.layer, t.tensor) == (of_group, of_layer, tensor)
                    });
                    let placed = placed.expect("this rank's own");
                    prop_assert!(placed.offset <= at);
                }
            }
            arrived = kept;
        }
    }
}

/// Units of a consumer's block.
fn per_block([producer, consumer]: [u32; 2]) -> u32 {
    let (mut a, mut b) = (producer, consumer);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    match a {
        0 => 1,
        unit => consumer / unit,
    }
}

/// Zeros, and a block of them moved by one element: the order counts, and so does the length.
#[test]
fn order_and_length_count() {
    let format = KvFormat::opaque(8, 1).expect("a format");
    let topology = kvxfer::layout::Topology::single(&format);
    let uniform = kvxfer::layout::KvPlacement::uniform(
        &format,
        topology,
        &[3],
        kvxfer::layout::Packing::OneMemory,
        8,
    );
    let placement = uniform
        .and_then(|uniform| uniform.describe(&format))
        .expect("valid");
    let [here, _] = both(
        &side(&format, &placement),
        &side(&format, &placement),
        Part::Common,
    );
    let tensors = here.tensors(0, LayerScope::All);
    assert_eq!(tensors.len(), 1);
    assert_eq!(tensors[0].bytes(), 8);
    assert!(here.tensors(1, LayerScope::All).is_empty());
    assert!(here.tensors(0, LayerScope::Layer(1)).is_empty());
    let mut memory = vec![vec![0; placement.memory_len()[0] as usize]];
    memory[0][..8].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
    memory[0][8..16].copy_from_slice(&[2, 1, 3, 4, 5, 6, 7, 8]);
    let sums = sums(&here, (0, LayerScope::All), &[0, 1, 2], &memory);
    let (_, sums) = &sums[0];
    assert!(sums[0] != sums[1] && sums[1] != sums[2] && sums[0] != sums[2]);
    // What it is must never change: both sides work it out.
    assert_eq!(sums[0], xxh3_of([1, 2, 3, 4, 5, 6, 7, 8]));
}
/// XXH3 of 64 bits without a seed, of 8 bytes, by its specification.
fn xxh3_of(bytes: [u8; 8]) -> u64 {
    // The secret's bytes 8 to 24.
    let secret = |at: usize| {
        const SECRET: [u8; 16] = [
            0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90,
            0x97, 0xdb,
        ];
        let mut word = [0; 8];
        word.copy_from_slice(&SECRET[at..at + 8]);
        u64::from_le_bytes(word)
    };
    let half = |at: usize| {
        let mut word = [0; 4];
        word.copy_from_slice(&bytes[at..at + 4]);
        u64::from(u32::from_le_bytes(word))
    };
    let flip = secret(0) ^ secret(8);
    let keyed = (half(4) + (half(0) << 32)) ^ flip;
    // rrmxmx
    let mut x = keyed ^ keyed.rotate_left(49) ^ keyed.rotate_left(24);
    x = x.wrapping_mul(0x9fb2_1c65_1e98_df25);
    x ^= (x >> 35) + 8;
    x = x.wrapping_mul(0x9fb2_1c65_1e98_df25);
    x ^ (x >> 28)
}
