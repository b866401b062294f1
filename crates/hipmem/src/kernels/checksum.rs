//! The checksum of `kvx_verify`, as the host works it out.
//!
//! A block is the list of its pieces, in the order of the section's table; where it lies does not
//! matter. Each piece is cut into little-endian 64-bit words, the last one filled up with zeros. Word
//! `j` of piece `p` (both from 0) counts as
//!
//! ```text
//! mix(word ^ (p * 2^40 + j + 1) * 0x9e3779b97f4a7c15)
//! ```
//!
//! where `mix` is the finaliser of splitmix64, and the block's sum is all of these added up. All of
//! it is modulo 2^64. So threads add in any order, a word that has changed its place is found, and so is
//! one that is missing, but for zeros at the end of a piece. It is no defence against somebody who
//! means harm.

/// The sum of piece `piece` of a block; a block's sum is the wrapping sum over its pieces.
#[must_use]
pub fn piece_sum(piece: u32, bytes: &[u8]) -> u64 {
    let place = (u64::from(piece) << 40) + 1;
    let words = (place..).zip(bytes.chunks(8));
    words.fold(0, |sum: u64, (place, chunk)| {
        let mut word = [0; 8];
        for (to, from) in word.iter_mut().zip(chunk) {
            *to = *from;
        }
        let word = u64::from_le_bytes(word);
        sum.wrapping_add(mix(word ^ place.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    })
}

/// The sum of a block that is made of these pieces.
#[must_use]
pub fn block_sum<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> u64 {
    let pieces = (0_u32..).zip(pieces);
    pieces.fold(0, |sum: u64, (p, bytes)| {
        sum.wrapping_add(piece_sum(p, bytes))
    })
}

fn mix(mut x: u64) -> u64 {
    x ^= x >> 30;
    x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^= x >> 27;
    x = x.wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::{block_sum, mix, piece_sum};

    #[test]
    fn mix_is_the_finaliser_of_splitmix64() {
        // The first outputs of splitmix64 from the seed 0.
        let golden = 0x9e37_79b9_7f4a_7c15_u64;
        assert_eq!(mix(golden), 0xe220_a839_7b1d_cdaf);
        assert_eq!(mix(golden.wrapping_mul(2)), 0x6e78_9e6a_a1b9_65f4);
    }

    #[test]
    fn every_word_counts_and_so_does_its_place() {
        let bytes: Vec<u8> = (0..100).collect();
        let sum = piece_sum(0, &bytes);
        for i in 0..bytes.len() {
            let mut other = bytes.clone();
            other[i] ^= 0x10;
            assert_ne!(piece_sum(0, &other), sum, "byte {i}");
        }
        let mut swapped = bytes.clone();
        swapped.rotate_left(8);
        assert_ne!(piece_sum(0, &swapped), sum);
        assert_ne!(piece_sum(1, &bytes), sum);
        assert_ne!(block_sum([&bytes[..8], &bytes[8..]]), sum);
        assert_eq!(block_sum([&bytes[..]]), sum);
        assert_eq!(block_sum([]), 0);
        // A sum of zero words is of its length still.
        assert_ne!(piece_sum(0, &[0; 8]), piece_sum(0, &[0; 16]));
    }
}
