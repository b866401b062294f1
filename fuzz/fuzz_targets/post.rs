//! The ring that kernels post to, with anything in its words: what is taken is whole or refused, ends
//! are told once, and no more is under way than the ring holds.
//!
//! Input: the depth's logarithm, then steps: a byte that says what is done, and its bytes.
#![no_main]

use std::cell::RefCell;
use std::collections::HashMap;
use std::convert::Infallible;

use kvxfer_hipmem::post::{Consumer, Descriptor, RingWords, Status, Taken, Word};
use libfuzzer_sys::fuzz_target;

#[derive(Default)]
struct Words(RefCell<HashMap<Word, u64>>);

impl RingWords for Words {
    type Error = Infallible;

    fn load(&self, word: Word) -> Result<u64, Infallible> {
        Ok(self.0.borrow().get(&word).copied().unwrap_or(0))
    }

    fn store(&self, word: Word, value: u64) -> Result<(), Infallible> {
        self.0.borrow_mut().insert(word, value);
        Ok(())
    }
}

/// The next bytes as a number; what is missing is 0.
fn number(data: &mut &[u8], len: usize) -> u64 {
    let (now, rest) = data.split_at(len.min(data.len()));
    *data = rest;
    now.iter().fold(0, |all, byte| all << 8 | u64::from(*byte))
}

fuzz_target!(|data: &[u8]| {
    let mut data = data;
    let depth = 1_u32 << (number(&mut data, 1) % 5);
    let first = number(&mut data, 5);
    let words = Words::default();
    let mut consumer = Consumer::new(depth, first).expect("a power of two");
    let mut taken = first;
    while !data.is_empty() {
        match number(&mut data, 1) % 4 {
            0 => {
                // Any word at all.
                let slot = number(&mut data, 1) as u32 % depth;
                let word = number(&mut data, 1) as u32 % 8;
                let value = number(&mut data, 8);
                let Ok(()) = words.store(Word::Slot { slot, word }, value);
            }
            1 => {
                // The next ticket's words, as far as they are understood.
                let found = [0; 8].map(|_: u64| number(&mut data, 3));
                let mut found = found;
                found[4] = taken;
                let phase = (taken >> depth.trailing_zeros()).wrapping_add(1) & 0xff;
                found[7] = phase << 56 | found[7] & 0xffff;
                let slot = (taken % u64::from(depth)) as u32;
                for (value, word) in found.into_iter().zip(0..) {
                    let Ok(()) = words.store(Word::Slot { slot, word }, value);
                }
            }
            2 => {
                let Ok(found) = consumer.take(&words);
                match found {
                    Some(Taken::Post(post)) => {
                        assert_eq!(post.ticket, taken);
                        let again = post.encode(depth);
                        assert_eq!(Descriptor::decode(again, taken), Ok(post));
                        taken += 1;
                    }
                    Some(_) => taken += 1,
                    None => {}
                }
            }
            _ => {
                let ahead = number(&mut data, 1) % 40;
                let status = Status::from_number(number(&mut data, 1) as u32 % 16);
                let ticket = consumer.ended().wrapping_add(ahead);
                let status = status.expect("one of sixteen");
                let before = consumer.under_way();
                let Ok(ended) = consumer.complete(&words, ticket, status);
                assert_eq!(consumer.under_way() + usize::from(ended.is_ok()), before);
                let Ok(again) = consumer.complete(&words, ticket, status);
                assert!(again.is_err(), "it has ended");
            }
        }
        assert!(consumer.under_way() <= depth as usize);
        assert!(consumer.ended() <= taken && taken - consumer.ended() <= u64::from(depth));
    }
});
