//! Numbers that proptest draws, and what is drawn from them.

use proptest::prelude::*;

/// Numbers drawn by proptest, read one after the other: a shorter or smaller tape makes a simpler
/// case, so failures shrink.
#[derive(Debug)]
pub(crate) struct Tape {
    pub(crate) numbers: Vec<u32>,
    pub(crate) at: usize,
}

impl Tape {
    /// A number below `n`; 0 when the tape has run out.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        let number = self.numbers.get(self.at).copied().unwrap_or(0);
        self.at += 1;
        u64::from(number) % n
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    pub(crate) fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == one_in - 1
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            // A zero leaves the order as it is.
            let j = i - self.below(i as u64 + 1) as usize;
            items.swap(i, j);
        }
    }
}

pub(crate) fn tape() -> impl Strategy<Value = Tape> {
    prop::collection::vec(any::<u32>(), 0..600).prop_map(|numbers| Tape { numbers, at: 0 })
}
