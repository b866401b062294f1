//! Sums do not depend on where blocks lie, and see every changed bit.

use std::collections::BTreeMap;
use std::ops::Range;

use kvxfer::layout::{AxisKind, KvFormat, PlacementDesc};
use kvxfer::sums::{Part, SumError, parts};
use proptest::prelude::*;

use crate::case::{At, Case, elements};
use crate::tape::{Tape, tape};

type Memory = Vec<Vec<u8>>;

/// By (group, layer, name) and block.
type Sums = BTreeMap<(u32, u32, String, u32), u64>;

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

fn sum(part: &Part, block: u32, memory: &Memory) -> u64 {
    let memory = &memory[part.memory as usize];
    let read = |offset: u64, into: &mut [u8]| {
        let at = offset as usize;
        let from = memory.get(at..at + into.len()).ok_or(offset)?;
        into.copy_from_slice(from);
        Ok::<_, u64>(())
    };
    part.sum(block, read).expect("inside the memory")
}

type Ranges<'a> = &'a [(AxisKind, Range<u64>)];

fn all(format: &KvFormat, side: &PlacementDesc, memory: &Memory, ranges: Ranges<'_>) -> Sums {
    let mut out = Sums::new();
    for part in parts(format, side, ranges).expect("here") {
        let tensor = format.tensor(part.group, part.layer, part.tensor);
        let name = tensor.expect("in the format").name.to_string();
        for block in 0..part.num_blocks {
            let key = (part.group, part.layer, name.clone(), block);
            assert_eq!(out.insert(key, sum(&part, block, memory)), None);
        }
    }
    out
}

fn changed(before: &Sums, after: &Sums) -> Vec<(u32, u32, String, u32)> {
    let keys = before.keys().filter(|key| before[*key] != after[*key]);
    keys.cloned().collect()
}

/// For each byte of an element: whose it is, and what its indices mean, in whole-model ones.
type Owners = BTreeMap<At, ((u32, u32, String, u32), Vec<(AxisKind, u64)>)>;

fn owners(format: &KvFormat, side: &PlacementDesc) -> Owners {
    let mut out = Owners::new();
    for placed in side.tensors() {
        let tensor = format.tensor(placed.group, placed.layer, placed.tensor);
        let tensor = tensor.expect("in the format");
        let shard = tensor
            .sharded_axis()
            .zip(placed.shard_of(tensor))
            .map(|(axis, shard)| (axis.kind, shard.first));
        for (mut meaning, at) in elements(tensor, placed) {
            for (kind, index) in &mut meaning {
                if let Some((of, first)) = shard
                    && of == *kind
                {
                    *index += first;
                }
            }
            for block in 0..placed.num_blocks {
                let key = (placed.group, placed.layer, tensor.name.to_string(), block);
                let base = placed.offset + u64::from(block) * placed.block_stride + at;
                for byte in base..base + tensor.dtype.bytes() {
                    let owner = (key.clone(), meaning.clone());
                    out.insert((placed.memory as usize, byte), owner);
                }
            }
        }
    }
    out
}

/// A bit of any byte.
fn flip(tape: &mut Tape, memory: &mut Memory) -> Option<At> {
    let which = tape.below(memory.len() as u64) as usize;
    let len = memory[which].len() as u64;
    if len == 0 {
        return None;
    }
    let at = tape.below(len);
    memory[which][at as usize] ^= 1 << tape.below(8);
    Some((which, at))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn what_was_copied_has_the_sums_of_its_source(mut tape in tape()) {
        let case = Case::new(&mut tape);
        let from = random(&mut tape, &case.producer);
        let mut to = random(&mut tape, &case.consumer);
        for (dst, (src, _)) in case.expected() {
            to[dst.0][dst.1 as usize] = from[src.0][src.1 as usize];
        }
        let sums = |format, side, memory| all(format, side, memory, &[]);
        let there = sums(&case.formats.producer, &case.producer, &from);
        let here = sums(&case.formats.consumer, &case.consumer, &to);
        for (group, layer, name, _) in there.keys().filter(|key| key.3 == 0) {
            let request = case.pairs.iter().find(|r| r.group == *group).expect("asked for");
            for pair in &request.pairs {
                let key = |block| (*group, *layer, name.clone(), block);
                prop_assert_eq!(there[&key(pair.src)], here[&key(pair.dst)], "{:?}", key(pair.dst));
            }
        }
    }

    #[test]
    fn a_changed_bit_changes_the_sum_of_its_block_alone(mut tape in tape()) {
        let case = Case::new(&mut tape);
        let (format, side) = (&case.formats.consumer, &case.consumer);
        let mut memory = random(&mut tape, side);
        let before = all(format, side, &memory, &[]);
        let owners = owners(format, side);
        for _ in 0..8 {
            let kept = memory.clone();
            let Some(at) = flip(&mut tape, &mut memory) else { continue };
            let after = all(format, side, &memory, &[]);
            let wanted: Vec<_> = owners.get(&at).map(|owner| owner.0.clone()).into_iter().collect();
            prop_assert_eq!(changed(&before, &after), wanted, "{:?}", at);
            memory = kept;
        }
    }

    #[test]
    fn a_part_is_what_its_indices_say(mut tape in tape()) {
        let case = Case::new(&mut tape);
        let (format, side) = (&case.formats.consumer, &case.consumer);
        // Heads that all tensors with heads have here.
        let owners = owners(format, side);
        let mut heads: BTreeMap<(u32, u32, String), Range<u64>> = BTreeMap::new();
        for ((group, layer, name, _), meaning) in owners.values() {
            for (_, head) in meaning.iter().filter(|m| m.0 == AxisKind::Head) {
                let of = heads.entry((*group, *layer, name.clone())).or_insert(*head..*head + 1);
                *of = of.start.min(*head)..of.end.max(*head + 1);
            }
        }
        let first = heads.values().map(|of| of.start).max().unwrap_or(0);
        let end = heads.values().map(|of| of.end).min().unwrap_or(1);
        prop_assume!(first < end);
        let start = first + tape.below(end - first);
        let wanted = start..start + 1 + tape.below(end - start);
        let ranges = [(AxisKind::Head, wanted.clone())];
        let mut memory = random(&mut tape, side);
        let before = all(format, side, &memory, &ranges);
        for _ in 0..8 {
            let kept = memory.clone();
            let Some(at) = flip(&mut tape, &mut memory) else { continue };
            let after = all(format, side, &memory, &ranges);
            let owner = owners.get(&at).filter(|(_, meaning)| {
                meaning.iter().all(|(kind, i)| *kind != AxisKind::Head || wanted.contains(i))
            });
            let owner: Vec<_> = owner.map(|owner| owner.0.clone()).into_iter().collect();
            prop_assert_eq!(changed(&before, &after), owner, "{:?} {:?}", at, wanted);
            memory = kept;
        }
        // Beyond what is here.
        if let Some(most) = heads.values().map(|of| of.end).max() {
            let beyond = parts(format, side, &[(AxisKind::Head, most..most + 1)]);
            prop_assert!(matches!(beyond, Err(SumError::NotHere { .. })), "{beyond:?}");
        }
    }
}

/// Zeros, and a block of them moved by one element: the order counts, and so does the length.
#[test]
fn order_and_length_count() {
    let format = KvFormat::opaque(8, 1).expect("a format");
    let topology = kvxfer::layout::Topology::single(&format);
    let side = kvxfer::layout::KvPlacement::uniform(
        &format,
        topology,
        &[3],
        kvxfer::layout::Packing::OneMemory,
        8,
    );
    let side = side
        .and_then(|uniform| uniform.describe(&format))
        .expect("valid");
    let part = &parts(&format, &side, &[]).expect("here")[0];
    assert_eq!(part.bytes(), 8);
    let mut memory = vec![vec![0; side.memory_len()[0] as usize]];
    memory[0][..8].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
    memory[0][8..16].copy_from_slice(&[2, 1, 3, 4, 5, 6, 7, 8]);
    let sums = [0, 1, 2].map(|block| sum(part, block, &memory));
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
