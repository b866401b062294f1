//! Rings whose poster is in Rust, one step at a time.

use std::cell::RefCell;
use std::collections::HashMap;
use std::convert::Infallible;
use std::time::Duration;

use proptest::prelude::*;

use super::{
    Blocks, Checks, Consumer, Descriptor, DescriptorFault, End, Pace, Place, PostOp, ProxyRing,
    Rest, RingAddresses, RingWords, Span, Status, Taken, WORDS, Word,
};
use crate::{Error, HostBuffer};

#[derive(Debug, Default)]
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

impl Words {
    fn get(&self, word: Word) -> u64 {
        self.0.borrow().get(&word).copied().unwrap_or(0)
    }

    fn set(&self, word: Word, value: u64) {
        self.0.borrow_mut().insert(word, value);
    }
}

fn address(addr: u64, key: u32) -> End {
    End::Address { addr, key }
}

fn put(ticket: u64) -> Descriptor {
    Descriptor {
        ticket,
        op: PostOp::Put,
        local: address(ticket << 12, 1),
        remote: address(ticket << 13, 2),
        len: 64,
    }
}

/// A ring, its consumer, and a poster that does as `kernels/post.h`.
struct Ring {
    words: Words,
    consumer: Consumer,
    depth: u32,
    next: u64,
}

impl Ring {
    fn new(depth: u32, first: u64) -> Self {
        let words = Words::default();
        for slot in 0..depth {
            let word = WORDS - 1;
            let unwritten = Consumer::unwritten(depth, first, slot);
            words.set(Word::Slot { slot, word }, unwritten);
        }
        words.set(Word::Ended, first);
        Self {
            words,
            consumer: Consumer::new(depth, first).expect("a power of two"),
            depth,
            next: first,
        }
    }

    fn slot(&self, ticket: u64) -> u32 {
        (ticket % u64::from(self.depth)) as u32
    }

    fn room(&self) -> bool {
        let fault = self.words.get(Word::Fault);
        fault == 0 && self.next - self.words.get(Word::Ended) < self.depth.into()
    }

    fn write(&mut self, words: [u64; 8]) {
        let slot = self.slot(self.next);
        for (value, word) in words.into_iter().zip(0..) {
            self.words.set(Word::Slot { slot, word }, value);
        }
        self.next += 1;
    }

    fn post(&mut self) -> u64 {
        let ticket = self.next;
        self.write(put(ticket).encode(self.depth));
        ticket
    }

    fn take(&mut self) -> Option<Taken> {
        let Ok(taken) = self.consumer.take(&self.words);
        taken
    }

    fn complete(&mut self, ticket: u64, status: Status) -> Result<(), super::NotUnderWay> {
        let Ok(done) = self.consumer.complete(&self.words, ticket, status);
        done
    }

    /// What `kvx_wait` would say.
    fn ended(&self, ticket: u64) -> Option<u32> {
        let slot = self.slot(ticket);
        let word = self.words.get(Word::Done { slot });
        match (word >> 8).cmp(&(ticket + 1)) {
            std::cmp::Ordering::Less => None,
            std::cmp::Ordering::Equal => Some((word & 0xff) as u32),
            std::cmp::Ordering::Greater => Some(0),
        }
    }
}

#[test]
fn posts_come_out_once_and_in_order() {
    for first in [0, 1, 0xfff9, 0xffff_fff9, 0xff_ffff_fff9, 1000 * 256] {
        let mut ring = Ring::new(8, first);
        assert_eq!(ring.take(), None);
        for _ in 0..300 {
            let (a, b) = (ring.post(), ring.post());
            for ticket in [a, b] {
                assert_eq!(ring.take(), Some(Taken::Post(put(ticket))));
            }
            assert_eq!(ring.take(), None);
            // The later one ends first.
            assert_eq!(ring.complete(b, Status::Ok), Ok(()));
            assert_eq!((ring.ended(a), ring.ended(b)), (None, Some(0)));
            assert_eq!(ring.words.get(Word::Ended), a);
            assert_eq!(ring.complete(a, Status::Ok), Ok(()));
            assert_eq!(ring.words.get(Word::Ended), b + 1);
            assert_eq!(ring.words.get(Word::Fault), 0);
        }
    }
}

#[test]
fn a_slot_that_was_read_is_poison_until_it_is_written_again() {
    let mut ring = Ring::new(2, 254 * 2);
    // Over the lap whose phase is 0.
    for _ in 0..8 {
        let ticket = ring.post();
        assert!(matches!(ring.take(), Some(Taken::Post(_))));
        let slot = ring.slot(ticket);
        for word in 0..WORDS {
            let left = ring.words.get(Word::Slot { slot, word });
            assert_eq!(left & 0xff_ffff, 0xa5_a5a5, "word {word}");
        }
        assert_eq!(ring.complete(ticket, Status::Ok), Ok(()));
        assert_eq!(ring.take(), None);
    }
}

#[test]
fn what_ends_twice_or_never_was_is_refused() {
    let mut ring = Ring::new(4, 10);
    assert!(ring.complete(10, Status::Ok).is_err());
    let a = ring.post();
    assert!(ring.complete(a, Status::Ok).is_err(), "not taken");
    let _ = ring.take();
    assert_eq!(ring.consumer.under_way(), 1);
    assert_eq!(ring.complete(a, Status::Ok), Ok(()));
    let again = ring.complete(a, Status::Peer).expect_err("it has ended");
    assert_eq!((again.ticket, again.ended, again.taken), (10, 11, 11));
    for ticket in [9, 12, 14, u64::MAX] {
        assert!(ring.complete(ticket, Status::Ok).is_err());
    }
    assert_eq!(ring.ended(a), Some(0), "nothing was told");
    assert!(!ring.consumer.failed());
}

#[test]
fn behind_a_failure_all_is_flushed_and_no_slot_is_used_again() {
    let mut ring = Ring::new(4, 0);
    let tickets = [ring.post(), ring.post(), ring.post()];
    let [a, b, c] = tickets;
    for ticket in [a, b] {
        assert_eq!(ring.take(), Some(Taken::Post(put(ticket))));
    }
    assert_eq!(ring.complete(b, Status::Peer), Ok(()));
    assert_eq!(ring.words.get(Word::Fault), (b + 1) << 8 | 12);
    // It had been posted before; it is not carried out.
    assert_eq!(ring.take(), Some(Taken::Flushed(c)));
    // It was under way and ends as it does.
    assert_eq!(ring.complete(a, Status::Ok), Ok(()));
    let ends = tickets.map(|ticket| ring.ended(ticket));
    assert_eq!(ends, [Some(0), Some(12), Some(11)]);
    assert_eq!(ring.words.get(Word::Ended), 3);
    assert!(!ring.room());
    // A poster that had looked before the failure.
    let late = ring.post();
    assert_eq!(ring.take(), Some(Taken::Flushed(late)));
    assert_eq!(ring.words.get(Word::Fault), (b + 1) << 8 | 12, "the first");
}

#[test]
fn a_closed_ring_flushes() {
    let mut ring = Ring::new(4, 7);
    let a = ring.post();
    let _ = ring.take();
    let Ok(()) = ring.consumer.close(&ring.words, Status::Closed);
    assert!(!ring.room());
    let b = ring.post();
    assert_eq!(ring.take(), Some(Taken::Flushed(b)));
    assert_eq!(ring.complete(a, Status::Ok), Ok(()));
    assert_eq!((ring.ended(a), ring.ended(b)), (Some(0), Some(11)));
    assert_eq!(ring.words.get(Word::Fault) & 0xff, 14);
}

#[test]
fn all_that_is_under_way_ends_at_once() {
    for status in [Status::Ok, Status::Late] {
        let mut ring = Ring::new(4, 3);
        let [a, b, c] = [ring.post(), ring.post(), ring.post()];
        for _ in 0..3 {
            let _ = ring.take();
        }
        assert_eq!(ring.complete(b, Status::Ok), Ok(()));
        let Ok(()) = ring.consumer.complete_all(&ring.words, status);
        let ends = [a, b, c].map(|ticket| ring.ended(ticket));
        let wanted = Some(status.number());
        assert_eq!(ends, [wanted, Some(0), wanted]);
        assert_eq!(
            (ring.consumer.under_way(), ring.words.get(Word::Ended)),
            (0, c + 1)
        );
        assert_eq!(ring.consumer.failed(), status != Status::Ok);
    }
}

#[test]
fn what_makes_no_sense_is_refused_and_told() {
    let change = |word: usize, value: u64| {
        let mut ring = Ring::new(4, 4);
        let mut words = put(4).encode(4);
        words[word] ^= value;
        ring.write(words);
        let Some(Taken::Refused(fault)) = ring.take() else {
            panic!("word {word} ^ {value:#x} is taken");
        };
        assert_eq!(ring.ended(4), Some(fault.status().number()));
        assert!(ring.consumer.failed());
        fault
    };
    let wrong = DescriptorFault::Ticket {
        wanted: 4,
        found: 5,
    };
    assert_eq!(change(4, 1), wrong);
    assert_eq!(change(7, 4), DescriptorFault::Op { ticket: 4, op: 5 });
    assert_eq!(change(7, 1), DescriptorFault::Op { ticket: 4, op: 0 });
    for (word, value) in [
        (5, 1),
        (5, 1 << 63),
        (6, 1 << 32),
        (7, 4 << 8),
        (7, 1 << 48),
    ] {
        let fault = change(word, value);
        assert!(matches!(fault, DescriptorFault::Reserved { .. }), "{fault}");
    }
    assert_eq!(wrong.status(), Status::Malformed);
}

#[test]
fn a_depth_that_is_no_power_of_two_is_refused() {
    let buffer = HostBuffer::new(ProxyRing::bytes(64)).expect("memory");
    for depth in [0, 3, 48, 65] {
        assert!(Consumer::new(depth, 0).is_none());
        let made = ProxyRing::new(buffer.memory().clone(), depth, 0);
        assert!(matches!(made, Err(Error::Depth { .. })));
    }
    let made = ProxyRing::new(buffer.memory().clone(), 128, 0);
    assert!(matches!(made, Err(Error::OutOfBounds { .. })));
}

#[test]
fn the_ring_in_memory_is_where_the_queue_says() {
    let buffer = HostBuffer::new(ProxyRing::bytes(64)).expect("memory");
    let memory = buffer.memory().clone();
    let (ring, consumer) = ProxyRing::new(memory.clone(), 64, 5).expect("a ring");
    let at = RingAddresses {
        ring: 1 << 20,
        state: 7,
        abort: 8,
    };
    let queue = ring.queue(at, 9);
    assert_eq!((queue.state, queue.abort, queue.patience), (7, 8, 9));
    assert_eq!((queue.depth, consumer.depth(), ring.depth()), (64, 64, 64));
    let words = [
        (queue.slots + 64 * 3 + 8, Word::Slot { slot: 3, word: 1 }),
        (queue.words + 8 * 63, Word::Done { slot: 63 }),
        (queue.report, Word::Ended),
        (queue.report + 8, Word::Fault),
    ];
    for (addr, word) in words {
        ring.store(word, addr).expect("inside");
        assert_eq!(memory.load_u64(addr - at.ring).expect("inside"), addr);
        assert_eq!(ring.load(word).expect("inside"), addr);
    }
}

#[test]
fn posts_stay_inside_of_what_they_may_name() {
    let span = |addr, writable| Span {
        addr,
        len: 4096,
        writable,
    };
    let blocks = Blocks {
        layers: 2,
        tensors: 1,
        blocks: 10,
        bytes: 512,
    };
    let checks = Checks {
        local: [(1, span(0x1000, false)), (2, span(0x4000, true))].into(),
        remote: [(1, span(0x8000, true)), (2, span(0x9000, false))].into(),
        local_blocks: vec![blocks],
        remote_blocks: vec![blocks, blocks],
        max_len: 4096,
    };
    let check = |op, local, remote, len| {
        let post = Descriptor {
            ticket: 0,
            op,
            local,
            remote,
            len,
        };
        checks.check(&post).err()
    };
    let place = |group, layer, tensor, block| {
        End::Place(Place {
            group,
            tensor,
            layer,
            block,
        })
    };
    let (here, there) = (address(0x1000, 1), address(0x8000, 1));
    let (put, get) = (PostOp::Put, PostOp::Get);
    for (op, local, remote, len, wanted) in [
        (put, here, there, 4096, None),
        (put, here, there, 4097, Some(Status::BadLength)),
        (put, address(0x1001, 1), there, 4096, Some(Status::BadRange)),
        (put, address(0xfff, 1), there, 1, Some(Status::BadRange)),
        (put, address(u64::MAX, 1), there, 2, Some(Status::BadRange)),
        (put, address(0x1000, 3), there, 1, Some(Status::BadKey)),
        (put, here, address(0x8fff, 1), 2, Some(Status::BadRange)),
        (put, here, address(0x9000, 2), 2, Some(Status::BadRights)),
        (get, here, address(0x9000, 2), 2, Some(Status::BadRights)),
        (get, address(0x4fff, 2), address(0x9000, 2), 1, None),
        (PostOp::PutImm(7), address(0, 0), address(0, 0), 0, None),
        (put, place(0, 1, 0, 9), place(1, 1, 0, 9), 512, None),
        (
            put,
            place(0, 1, 0, 9),
            place(1, 1, 0, 9),
            513,
            Some(Status::BadRange),
        ),
        (put, place(1, 1, 0, 9), there, 1, Some(Status::BadKey)),
        (put, here, place(2, 0, 0, 0), 1, Some(Status::BadKey)),
        (put, here, place(1, 2, 0, 0), 1, Some(Status::BadRange)),
        (put, here, place(1, 0, 1, 0), 1, Some(Status::BadRange)),
        (put, here, place(1, 0, 0, 10), 1, Some(Status::BadRange)),
    ] {
        assert_eq!(
            check(op, local, remote, len),
            wanted,
            "{op:?} {local:?} {remote:?}"
        );
    }
}

#[test]
fn places_are_the_words_of_the_header() {
    // A static_assert of kernels/queue.h has the same word.
    let place = Place {
        group: 0x11,
        layer: 0x2233,
        tensor: 0x44,
        block: 0x5566_7788,
    };
    assert_eq!(place.to_word(), 0x1144_2233_5566_7788);
    assert_eq!(Place::from_word(place.to_word()), place);
}

#[test]
fn a_parked_ring_sleeps_longer_and_longer() {
    assert_eq!(Pace::Armed.rest(1000), Rest::Spin);
    let longest = Duration::from_millis(1);
    let parked = Pace::Parked { longest };
    let sleeps = [0, 1, 2, 5, 6, 100, u32::MAX].map(|looks| parked.rest(looks));
    let micros = |n| Rest::Sleep(Duration::from_micros(n));
    let wanted = [20, 40, 80, 640, 1000, 1000, 1000].map(micros);
    assert_eq!(sleeps, wanted);
}

#[test]
fn statuses_are_the_numbers_of_the_header() {
    let header = include_str!("../../../../kernels/queue.h");
    let mut found = 0;
    for line in header.lines() {
        let mut words = line.split_whitespace();
        let (Some("#define"), Some(name), Some(value)) = (words.next(), words.next(), words.next())
        else {
            continue;
        };
        let about = line.contains("//") && line.starts_with("#define KVX_");
        let number = value.strip_suffix('u').and_then(|n| n.parse::<u32>().ok());
        let (true, Some(number), Some(name)) = (about, number, name.strip_prefix("KVX_")) else {
            continue;
        };
        let Some(status) = Status::from_number(number) else {
            continue;
        };
        let ours = format!("{status:?}").to_uppercase();
        if name.replace('_', "") == ours {
            assert_eq!(status.number(), number);
            found += 1;
        }
    }
    // All but Ok, which nothing is said of.
    assert_eq!(found, 15);
    assert_eq!(Status::from_number(16), None);
}

fn ends() -> impl Strategy<Value = End> {
    prop_oneof![
        (any::<u64>(), any::<u32>()).prop_map(|(addr, key)| End::Address { addr, key }),
        any::<u64>().prop_map(|word| End::Place(Place::from_word(word))),
    ]
}

proptest! {
    #[test]
    fn descriptors_come_back(
        ticket in 0..u64::MAX >> 9, local in ends(), remote in ends(), len in any::<u64>(),
        imm in any::<u32>(), which in 0..3_usize, log in 0..20_u32,
    ) {
        let op = [PostOp::Put, PostOp::Get, PostOp::PutImm(imm)][which];
        let post = Descriptor { ticket, op, local, remote, len };
        let words = post.encode(1 << log);
        prop_assert_eq!(Descriptor::decode(words, ticket), Ok(post));
        prop_assert_eq!(words[7] >> 56, ((ticket >> log) + 1) & 0xff);
    }

    #[test]
    fn any_words_are_a_descriptor_or_a_fault(words in any::<[u64; 8]>(), plain in any::<bool>()) {
        let mut words = words;
        if plain {
            words[5] = 0;
            words[6] &= u64::from(u32::MAX);
            words[7] &= 0xff00_0000_0000_0303;
        }
        let ticket = words[4];
        if let Ok(post) = Descriptor::decode(words, ticket) {
            let again = post.encode(1);
            prop_assert_eq!(again[..3].to_vec(), words[..3].to_vec());
            prop_assert_eq!(again[7] & 0xffff, words[7] & 0xffff);
        }
    }

    /// Posters with room post, posts end in any order and some badly; whatever is told stays told, and
    /// in the end everything has ended.
    #[test]
    fn every_post_ends_once(
        log in 0..4_u32, first in prop_oneof![Just(0_u64), Just(250), Just(0xfffd), Just(0xffff_fff0)],
        steps in prop::collection::vec((0..10_u32, any::<prop::sample::Index>()), 1..300),
        failing in prop::option::of(0..60_u64),
    ) {
        let mut ring = Ring::new(1 << log, first);
        let mut under_way = Vec::new();
        let mut told: HashMap<u64, u32> = HashMap::new();
        for (what, pick) in steps {
            match what {
                0..4 if ring.room() => {
                    ring.post();
                }
                4..7 => match ring.take() {
                    Some(Taken::Post(post)) => {
                        prop_assert_eq!(post, put(post.ticket));
                        under_way.push(post.ticket);
                    }
                    Some(Taken::Refused(fault)) => panic!("{fault}"),
                    _ => {}
                },
                _ if !under_way.is_empty() => {
                    let ticket = under_way.swap_remove(pick.index(under_way.len()));
                    let fails = failing == Some(ticket - first);
                    let status = if fails { Status::Peer } else { Status::Ok };
                    prop_assert_eq!(ring.complete(ticket, status), Ok(()));
                    told.insert(ticket, status.number());
                }
                _ => {}
            }
            for (ticket, status) in &told {
                prop_assert_eq!(ring.ended(*ticket), Some(*status), "post {}", ticket);
            }
        }
        while let Some(taken) = ring.take() {
            if let Taken::Post(post) = taken {
                under_way.push(post.ticket);
            }
        }
        for ticket in under_way {
            prop_assert_eq!(ring.complete(ticket, Status::Ok), Ok(()));
        }
        prop_assert_eq!(ring.words.get(Word::Ended), ring.next);
        for ticket in first..ring.next {
            prop_assert!(ring.ended(ticket).is_some(), "post {}", ticket);
        }
    }
}
