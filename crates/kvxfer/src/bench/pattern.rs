//! What the bandwidth test fills blocks with, and which block goes where. Both sides compute the
//! same from the seed, so that every byte can be verified without sending it twice.

use crate::blocks::BlockPair;

/// 2^64 divided by the golden ratio, odd: multiples of it are spread evenly and all different.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// A full mix of 64 bits (the finaliser of SplitMix64): one changed bit changes half of them.
const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Where in the model a block's bytes belong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Plane {
    /// Cache group.
    pub group: u32,
    /// Layer.
    pub layer: u32,
    /// Tensor of the layer.
    pub tensor: u32,
}

/// The content of one block in one plane: 64-bit little-endian words, each different for every
/// seed, block, plane and position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pattern {
    key: u64,
}

impl Pattern {
    /// The pattern of a block.
    #[must_use]
    pub const fn new(seed: u64, block: u32, plane: Plane) -> Pattern {
        let salt = Self::salt(seed, plane);
        Pattern {
            key: mix(salt.wrapping_add(block as u64)),
        }
    }

    /// What all patterns of a plane are made of, for a kernel that fills blocks (`kvx_produced` of
    /// `kernels/queue.h`).
    #[must_use]
    pub const fn salt(seed: u64, plane: Plane) -> u64 {
        let place = mix(seed ^ STEP).wrapping_add((plane.group as u64) << 32 | plane.layer as u64);
        mix(place).wrapping_add((plane.tensor as u64) << 32)
    }

    /// The word at an index.
    #[must_use]
    #[inline]
    pub const fn word(self, index: u64) -> u64 {
        // Cheap on purpose: an addition in a loop, a shift, a XOR. The key is well mixed already.
        let x = self.key.wrapping_add(index.wrapping_mul(STEP));
        x ^ (x >> 32)
    }

    /// Writes the bytes that stand from word `first` on; the last word may be cut short.
    pub fn fill(self, bytes: &mut [u8], first: u64) {
        let (words, rest) = bytes.as_chunks_mut::<8>();
        for (index, word) in (first..).zip(&mut *words) {
            *word = self.word(index).to_le_bytes();
        }
        let last = self
            .word(first.wrapping_add(words.len() as u64))
            .to_le_bytes();
        rest.copy_from_slice(&last[..rest.len()]);
    }

    /// Offset of the first of these bytes, which stand from word `first` on, that is not as it
    /// should be.
    #[must_use]
    pub fn first_difference(self, bytes: &[u8], first: u64) -> Option<usize> {
        let (words, rest) = bytes.as_chunks::<8>();
        // Chunks without a branch inside keep to memory speed; the search comes only on a fault.
        const CHUNK: usize = 64;
        let mut index = first;
        for (number, chunk) in words.chunks(CHUNK).enumerate() {
            let wrong = (index..).zip(chunk).fold(0, |wrong, (i, word)| {
                wrong | (u64::from_le_bytes(*word) ^ self.word(i))
            });
            if wrong != 0 {
                let at = number * CHUNK * 8;
                return self.search(&bytes[at..], index).map(|offset| at + offset);
            }
            index = index.wrapping_add(chunk.len() as u64);
        }
        self.search(rest, index)
            .map(|offset| words.len() * 8 + offset)
    }

    /// Byte by byte.
    fn search(self, bytes: &[u8], first: u64) -> Option<usize> {
        bytes
            .chunks(8)
            .zip(first..)
            .enumerate()
            .find_map(|(number, (chunk, index))| {
                let want = self.word(index).to_le_bytes();
                let byte = chunk
                    .iter()
                    .zip(want)
                    .position(|(got, want)| *got != want)?;
                Some(number * 8 + byte)
            })
    }
}

/// Pairs that copy each of `blocks` blocks (0 and up) to another's place, in random order, such
/// that nothing merges: no pair is the successor of another on both sides, `(s, d)` and
/// `(s + 1, d + 1)`, in whatever order they are sorted. One block has no other place; of two or
/// more, the same seed gives the same pairs everywhere.
#[must_use]
pub fn scattered_pairs(seed: u64, blocks: u32) -> Vec<BlockPair> {
    let mut random = Random(mix(seed));
    let mut place: Vec<u32> = (0..blocks).collect();
    random.shuffle(&mut place);
    part_neighbours(&mut place, &mut random);
    let mut pairs: Vec<BlockPair> = (0..blocks)
        .zip(place)
        .map(|(src, dst)| BlockPair { src, dst })
        .collect();
    random.shuffle(&mut pairs);
    pairs
}

/// How often the whole table is gone through before the fallback; once or twice is enough but for
/// a handful of blocks.
const PASSES: usize = 16;

/// Swaps places until no block is followed by its successor. About one is, in a random table.
fn part_neighbours(place: &mut [u32], random: &mut Random) {
    let joined = |place: &[u32], at: usize| place[at].checked_add(1) == Some(place[at + 1]);
    for _ in 0..PASSES {
        let mut clean = true;
        for at in 0..place.len().saturating_sub(1) {
            if joined(place, at) {
                clean = false;
                let other = random.below(place.len());
                place.swap(at + 1, other);
            }
        }
        if clean {
            return;
        }
    }
    // The other way round there are no successors at all.
    let blocks = u32::try_from(place.len()).expect("there are as many places as u32 block ids");
    for (place, block) in place.iter_mut().zip((0..blocks).rev()) {
        *place = block;
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        mix(self.0)
    }

    /// Less than `bound`, which is not 0 and fits 32 bits.
    fn below(&mut self, bound: usize) -> usize {
        ((self.next() >> 32).wrapping_mul(bound as u64) >> 32) as usize
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last + 1);
            items.swap(last, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn nothing_merges_and_every_block_is_used_once() {
        for blocks in (0..40).chain([1000, 4096]) {
            for seed in 0..20 {
                let pairs = scattered_pairs(seed, blocks);
                assert_eq!(pairs, scattered_pairs(seed, blocks));
                let srcs: HashSet<u32> = pairs.iter().map(|p| p.src).collect();
                let dsts: HashSet<u32> = pairs.iter().map(|p| p.dst).collect();
                assert_eq!((srcs.len(), dsts.len()), (blocks as usize, blocks as usize));
                assert!(srcs.iter().chain(&dsts).all(|b| *b < blocks));
                let all: HashSet<(u32, u32)> = pairs.iter().map(|p| (p.src, p.dst)).collect();
                assert!(
                    pairs.iter().all(|p| !all.contains(&(p.src + 1, p.dst + 1))),
                    "seed {seed}, {blocks} blocks: {pairs:?}"
                );
            }
        }
        assert_ne!(scattered_pairs(1, 1000), scattered_pairs(2, 1000));
    }

    #[test]
    fn every_byte_is_checked() {
        let pattern = Pattern::new(
            7,
            3,
            Plane {
                group: 1,
                layer: 2,
                tensor: 0,
            },
        );
        for len in [0, 1, 7, 8, 9, 511, 512, 513, 1023, 1029] {
            let mut bytes = vec![0; len];
            pattern.fill(&mut bytes, 5);
            assert_eq!(pattern.first_difference(&bytes, 5), None, "{len} bytes");
            for at in 0..len {
                bytes[at] ^= 0x10;
                assert_eq!(
                    pattern.first_difference(&bytes, 5),
                    Some(at),
                    "of {len} bytes"
                );
                bytes[at] ^= 0x10;
            }
        }
    }

    #[test]
    fn parts_fit_together() {
        let pattern = Pattern::new(0, 0, Plane::default());
        let (mut whole, mut parts) = (vec![0; 96], vec![0; 96]);
        pattern.fill(&mut whole, 0);
        pattern.fill(&mut parts[..40], 0);
        pattern.fill(&mut parts[40..], 5);
        assert_eq!(whole, parts);
    }

    #[test]
    fn no_word_occurs_in_two_places() {
        let mut seen = HashSet::new();
        for (seed, block, group, layer, tensor) in [
            (0, 0, 0, 0, 0),
            (1, 0, 0, 0, 0),
            (0, 1, 0, 0, 0),
            (0, 0, 1, 0, 0),
            (0, 0, 0, 1, 0),
            (0, 0, 0, 0, 1),
        ] {
            let pattern = Pattern::new(
                seed,
                block,
                Plane {
                    group,
                    layer,
                    tensor,
                },
            );
            for index in 0..10_000 {
                assert!(
                    seen.insert(pattern.word(index)),
                    "twice: {seed} {block} {group} {layer} {tensor}"
                );
            }
        }
    }
}
