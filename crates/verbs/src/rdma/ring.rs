//! What is posted on a work queue and has not ended: pure.
//!
//! A device is given a number of ours with each work request, which counts on. An end of one is the end of
//! all before it, so that a completion says by its number how many slots are free again, whether
//! what was before it was signalled or not. A number that is not of the queue as it is now comes from a
//! queue pair that is gone, whose number the device has given out again.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::region::RegionTable;
use crate::wr::WcOpcode;

/// Marks the numbers of receives: an error completion does not say what it is of.
const RECEIVE: u64 = 1 << 63;

#[derive(Debug, Clone, Copy)]
struct Slot {
    wr_id: u64,
    opcode: WcOpcode,
}

/// A work request that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) wr_id: u64,
    pub(super) opcode: WcOpcode,
    /// How many ended with it: itself, and those before it of which nothing was told.
    pub(super) slots: u32,
}

/// The numbers of work requests that were taken in together.
#[derive(Debug, Clone, Copy)]
pub(super) struct Numbers {
    first: u64,
    mark: u64,
}

impl Numbers {
    /// Of the one at this place.
    #[inline]
    pub(super) fn at(self, at: usize) -> u64 {
        (self.first.wrapping_add(at as u64) & !RECEIVE) | self.mark
    }
}

/// The work requests of one queue.
#[derive(Debug)]
pub(super) struct Ring {
    slots: Box<[Slot]>,
    /// Added to the numbers that the device sees.
    mark: u64,
    /// The number of the oldest that has not ended.
    head: u64,
    /// The number of the next that is posted.
    tail: u64,
    /// Tables, each with the number after the last work request that uses it.
    tables: VecDeque<(u64, Arc<RegionTable>)>,
}

impl Ring {
    /// For a send queue of `depth` work requests; `start` is random.
    pub(super) fn sends(depth: u32, start: u64) -> Self {
        Self::new(depth, start, 0)
    }

    /// For a receive queue.
    pub(super) fn receives(depth: u32, start: u64) -> Self {
        Self::new(depth, start, RECEIVE)
    }

    fn new(depth: u32, start: u64, mark: u64) -> Self {
        let free = Slot {
            wr_id: 0,
            opcode: WcOpcode::Recv,
        };
        let start = start & !RECEIVE;
        Self {
            slots: vec![free; (depth as usize).next_power_of_two()].into(),
            mark,
            head: start,
            tail: start,
            tables: VecDeque::new(),
        }
    }

    /// Whether a number that the device tells is one of a receive.
    pub(super) fn is_receive(number: u64) -> bool {
        number & RECEIVE != 0
    }

    /// How many have not ended.
    pub(super) fn len(&self) -> u32 {
        u32::try_from(after(self.head, self.tail)).unwrap_or(u32::MAX)
    }

    fn place(&mut self, number: u64) -> Option<&mut Slot> {
        let mask = self.slots.len() - 1;
        // The mask is of 32 bits at most.
        self.slots.get_mut(number as usize & mask)
    }

    /// Takes some in; their numbers are what the device is given. No more than the depth may be there.
    #[inline]
    pub(super) fn push(&mut self, wrs: impl Iterator<Item = (u64, WcOpcode)>) -> Numbers {
        let (first, mark, mut number) = (self.tail, self.mark, self.tail);
        let slots = &mut *self.slots;
        let mask = slots.len() - 1;
        for (wr_id, opcode) in wrs {
            if let Some(slot) = slots.get_mut(number as usize & mask) {
                *slot = Slot { wr_id, opcode };
            }
            number = number.wrapping_add(1);
        }
        self.tail = number & !RECEIVE;
        Numbers { first, mark }
    }

    /// The last `n` were not posted after all.
    pub(super) fn unpush(&mut self, n: usize) {
        let n = (n as u64).min(u64::from(self.len()));
        self.tail = self.tail.wrapping_sub(n) & !RECEIVE;
    }

    /// Keeps the table until all that is there now has ended.
    pub(super) fn hold(&mut self, table: &Arc<RegionTable>) {
        match self.tables.back_mut() {
            Some((until, held)) if Arc::ptr_eq(held, table) => *until = self.tail,
            _ => self.tables.push_back((self.tail, Arc::clone(table))),
        }
    }

    /// The one of this number has ended; `None` if it is not there. Tables that nothing uses any more
    /// go to `retired`: dropping one may deregister memory, which is not for whoever holds a lock.
    #[inline]
    pub(super) fn end(
        &mut self,
        number: u64,
        retired: &mut Vec<Arc<RegionTable>>,
    ) -> Option<Ended> {
        let number = number & !RECEIVE;
        let before = after(self.head, number);
        if before >= after(self.head, self.tail) {
            return None;
        }
        let slot = *self.place(number)?;
        let old = self.head;
        self.head = next(number);
        while let Some((until, _)) = self.tables.front() {
            if after(old, *until) > after(old, self.head) {
                break;
            }
            retired.extend(self.tables.pop_front().map(|(_, table)| table));
        }
        Some(Ended {
            wr_id: slot.wr_id,
            opcode: slot.opcode,
            slots: u32::try_from(before + 1).unwrap_or(u32::MAX),
        })
    }

    /// All of them, and their tables, are gone with the queue pair; how many there were.
    pub(super) fn clear(&mut self, retired: &mut Vec<Arc<RegionTable>>) -> u32 {
        let left = self.len();
        self.head = self.tail;
        retired.extend(self.tables.drain(..).map(|(_, table)| table));
        left
    }
}

/// Numbers have 63 bits and go round.
fn next(number: u64) -> u64 {
    number.wrapping_add(1) & !RECEIVE
}

/// How far `to` is after `from`.
fn after(from: u64, to: u64) -> u64 {
    to.wrapping_sub(from) & !RECEIVE
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn table() -> Arc<RegionTable> {
        Arc::new(RegionTable::default())
    }

    fn post(ring: &mut Ring, wr_id: u64, opcode: WcOpcode) -> u64 {
        ring.push([(wr_id, opcode)].into_iter()).at(0)
    }

    #[test]
    fn numbers_of_many_are_those_of_one_after_the_other() {
        for start in [0, 5, u64::MAX, (1 << 63) - 3] {
            for mut ring in [Ring::sends(8, start), Ring::receives(8, start)] {
                let mut other = Ring::new(8, start, ring.mark);
                let ids = 20..26;
                let numbers = ring.push(ids.clone().map(|id| (id, WcOpcode::Read)));
                for (at, id) in ids.enumerate() {
                    assert_eq!(numbers.at(at), post(&mut other, id, WcOpcode::Read));
                }
                assert_eq!((ring.len(), ring.tail), (6, other.tail));
                let ended = ring.end(numbers.at(4), &mut Vec::new());
                assert_eq!(ended.map(|ended| (ended.wr_id, ended.slots)), Some((24, 5)));
            }
        }
    }

    #[test]
    fn an_end_is_the_end_of_all_before_it() {
        let mut ring = Ring::sends(4, u64::MAX);
        let numbers: Vec<u64> = (0..4)
            .map(|i| post(&mut ring, 10 + i, WcOpcode::Read))
            .collect();
        assert_eq!(ring.len(), 4);
        let mut retired = Vec::new();
        let ended = ring.end(numbers[2], &mut retired).unwrap();
        assert_eq!((ended.wr_id, ended.slots), (12, 3));
        assert_eq!(ring.end(numbers[2], &mut retired), None, "once");
        assert_eq!(ring.end(numbers[0], &mut retired), None, "it has ended");
        assert_eq!(ring.end(numbers[3], &mut retired).unwrap().slots, 1);
        assert_eq!(ring.len(), 0);
    }

    #[test]
    fn numbers_of_receives_are_told_apart() {
        let mut sends = Ring::sends(2, 7);
        let mut receives = Ring::receives(2, 7);
        let (a, b) = (
            post(&mut sends, 1, WcOpcode::Write),
            post(&mut receives, 2, WcOpcode::Recv),
        );
        assert_eq!((Ring::is_receive(a), Ring::is_receive(b)), (false, true));
        let ended = receives.end(b, &mut Vec::new()).unwrap();
        assert_eq!((ended.wr_id, ended.slots), (2, 1));
    }

    #[test]
    fn a_number_of_another_life_is_not_here() {
        let mut old = Ring::sends(8, 1 << 40);
        let stale = post(&mut old, 1, WcOpcode::Read);
        let mut new = Ring::sends(8, 5 << 50);
        post(&mut new, 2, WcOpcode::Read);
        assert_eq!(new.end(stale, &mut Vec::new()), None);
        assert_eq!(new.len(), 1);
    }

    #[test]
    fn tables_are_held_until_the_last_that_uses_them_has_ended() {
        let (one, two) = (table(), table());
        let mut ring = Ring::sends(8, 3);
        let first = post(&mut ring, 1, WcOpcode::Read);
        ring.hold(&one);
        let second = post(&mut ring, 2, WcOpcode::Read);
        ring.hold(&one);
        let third = post(&mut ring, 3, WcOpcode::Read);
        ring.hold(&two);
        let mut retired = Vec::new();
        ring.end(first, &mut retired);
        assert!(retired.is_empty());
        ring.end(second, &mut retired);
        assert_eq!(retired.len(), 1);
        assert!(Arc::ptr_eq(&retired[0], &one));
        let _ = third;
        assert_eq!(ring.clear(&mut retired), 1);
        assert!(Arc::ptr_eq(&retired[1], &two));
    }

    proptest! {
        /// Against a queue of what was posted: any order of posting, failing to post and ending.
        #[test]
        fn it_is_a_queue(
            start in any::<u64>(),
            depth in 1u32..40,
            steps in proptest::collection::vec((0u8..4, 0usize..50), 0..200),
        ) {
            let mut ring = Ring::sends(depth, start);
            let mut model: VecDeque<(u64, u64)> = VecDeque::new();
            let (mut id, mut retired) = (0u64, Vec::new());
            for (step, n) in steps {
                match step {
                    0 | 1 if model.len() < depth as usize => {
                        id += 1;
                        model.push_back((post(&mut ring, id, WcOpcode::Write), id));
                    }
                    2 if !model.is_empty() => {
                        let n = n % (model.len() + 1);
                        ring.unpush(n);
                        model.truncate(model.len() - n);
                    }
                    3 if !model.is_empty() => {
                        let at = n % model.len();
                        let (number, wr_id) = model[at];
                        let ended = ring.end(number, &mut retired);
                        let slots = at as u32 + 1;
                        let opcode = WcOpcode::Write;
                        prop_assert_eq!(ended, Some(Ended { wr_id, opcode, slots }));
                        model.drain(..=at);
                    }
                    _ => {}
                }
                prop_assert_eq!(ring.len() as usize, model.len());
            }
        }
    }
}
