//! Patterns of 64-bit words: filled and checked at about the speed of a copy.

use crate::error::{Error, FirstMismatch, Operation};
use crate::memory::HostMemory;
use crate::raw;

/// Words that are made or checked at a time: they fit the first-level cache.
const CHUNK: usize = 512;

impl HostMemory {
    /// Fills a range with words: the one that begins `8 * i` bytes after `offset` gets `f(i)`,
    /// little-endian. Neither end needs to be aligned; a last word of fewer than eight bytes gets the low ones.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`]; then nothing was written.
    pub fn fill_words(&self, offset: u64, len: u64, f: impl Fn(u64) -> u64) -> Result<(), Error> {
        let range = self.range(Operation::FillWords, offset, len)?;
        let mut words = [0_u64; CHUNK];
        for (first, bytes) in chunks(range.len) {
            for (word, i) in words.iter_mut().zip(first..) {
                *word = f(i).to_le();
            }
            // SAFETY: `8 * first` < `range.len`, so the place is inside the range.
            let at = unsafe { range.ptr.add(first as usize * 8) };
            // SAFETY: `bytes` from there are inside the range, which the span keeps mapped and
            // writable; `words` has 8 * CHUNK ≥ `bytes` bytes.
            unsafe { raw::copy(at.as_ptr(), words.as_ptr().cast(), bytes) };
        }
        Ok(())
    }

    /// Checks that a range holds what [`fill_words`](Self::fill_words) with the same `f` puts there.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] with the first word that differs; [`Error::OutOfBounds`].
    pub fn verify_words(&self, offset: u64, len: u64, f: impl Fn(u64) -> u64) -> Result<(), Error> {
        let range = self.range(Operation::VerifyWords, offset, len)?;
        let mut words = [0_u64; CHUNK];
        for (first, bytes) in chunks(range.len) {
            // SAFETY: `8 * first` < `range.len`, so the place is inside the range.
            let at = unsafe { range.ptr.add(first as usize * 8) };
            // SAFETY: `bytes` from there are inside the range, which the span keeps mapped;
            // `words` has 8 * CHUNK ≥ `bytes` bytes and is ours.
            unsafe { raw::copy(words.as_mut_ptr().cast(), at.as_ptr(), bytes) };
            let (whole, rest) = (bytes / 8, bytes % 8);
            let mut differ = 0;
            for (word, i) in words.iter().take(whole).zip(first..) {
                differ |= u64::from_le(*word) ^ f(i);
            }
            // Without a branch a word this is fast; the word is looked for once it is known to exist.
            let tail = if rest == 0 {
                0
            } else {
                u64::MAX >> (64 - 8 * rest)
            };
            let masks = std::iter::repeat_n(u64::MAX, whole).chain((rest > 0).then_some(tail));
            if differ == 0 && rest == 0 {
                continue;
            }
            for ((word, i), mask) in words.iter().zip(first..).zip(masks) {
                let (wanted, found) = (f(i) & mask, u64::from_le(*word) & mask);
                if wanted != found {
                    return Err(Error::Mismatch(FirstMismatch {
                        offset: offset + 8 * i,
                        wanted,
                        found,
                    }));
                }
            }
        }
        Ok(())
    }
}

/// The chunks of a range: the index of the first word and the number of bytes.
fn chunks(len: usize) -> impl Iterator<Item = (u64, usize)> {
    (0..len)
        .step_by(CHUNK * 8)
        .map(move |at| ((at / 8) as u64, (len - at).min(CHUNK * 8)))
}
