//! Random cases from a list of numbers.

use proptest::prelude::*;

/// Numbers drawn by proptest, read one after the other: a shorter or smaller tape makes a simpler
/// case, so failures shrink.
#[derive(Debug)]
pub(crate) struct Tape {
    numbers: Vec<u32>,
    at: usize,
}

impl Tape {
    /// A number below `n`; 0 when the tape has run out.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        let number = self.numbers.get(self.at).copied().unwrap_or(0);
        self.at += 1;
        u64::from(number) % n
    }

    /// One of these.
    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// Whether this happens.
    pub(crate) fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == one_in - 1
    }

    /// These in any order.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            // A zero leaves the order as it is.
            let j = i - self.below(i as u64 + 1) as usize;
            items.swap(i, j);
        }
    }
}

/// Tapes.
pub(crate) fn tape() -> impl Strategy<Value = Tape> {
    tape_of(600)
}

/// Tapes of up to so many numbers.
pub(crate) fn tape_of(most: usize) -> impl Strategy<Value = Tape> {
    prop::collection::vec(any::<u32>(), 0..most).prop_map(|numbers| Tape { numbers, at: 0 })
}
