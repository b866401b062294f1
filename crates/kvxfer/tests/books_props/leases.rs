//! What is on offer, and who reads it.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use kvxfer::event::ReleaseReason;
use kvxfer::ids::{Nonce, RequestId};
use kvxfer::leases::{LeaseOutput, LeaseWord, Leases, OfferError, ReleaseAnswer};
use kvxfer::ticket::LeaseRef;
use kvxfer::time::Time;
use proptest::prelude::*;

use crate::{group, name, request};

#[derive(Debug, Clone)]
enum LeaseOp {
    Offer {
        request: u8,
        nonce: u64,
        readers: u32,
        ttl: u64,
    },
    Release {
        request: u8,
        nonce: u64,
        peer: u64,
    },
    Retract(u8),
    Advance(u64),
    Drain(usize),
}

fn lease_op() -> impl Strategy<Value = LeaseOp> {
    prop_oneof![
        4 => (0..4u8, 0..6u64, 0..4u32, 0..50u64)
            .prop_map(|(request, nonce, readers, ttl)| LeaseOp::Offer { request, nonce, readers, ttl }),
        6 => (0..4u8, 0..6u64, 0..4u64)
            .prop_map(|(request, nonce, peer)| LeaseOp::Release { request, nonce, peer }),
        1 => (0..4u8).prop_map(LeaseOp::Retract),
        2 => (0..30u64).prop_map(LeaseOp::Advance),
        3 => (0..6usize).prop_map(LeaseOp::Drain),
    ]
}

/// What the engine and its readers see.
#[derive(Default)]
struct LeaseWorld {
    table: HashMap<u32, LeaseWord>,
    /// Offers whose blocks are held, by try.
    held: HashMap<(RequestId, Nonce), (LeaseRef, Time)>,
    released: HashSet<(RequestId, Nonce)>,
    words: HashSet<u64>,
}

impl LeaseWorld {
    fn drain(&mut self, leases: &mut Leases, most: usize, now: Time) {
        for _ in 0..most {
            match leases.poll_output() {
                None => return,
                Some(LeaseOutput::Flip { slot, word }) => {
                    assert_ne!(
                        self.table.insert(slot, word),
                        Some(word),
                        "a slot is flipped once"
                    );
                }
                Some(LeaseOutput::Released {
                    request,
                    nonce,
                    reason,
                    ..
                }) => {
                    let try_ = (request, nonce);
                    let (lease, expires) = self
                        .held
                        .remove(&try_)
                        .expect("only what is held comes back, once");
                    assert!(
                        !self.table[&lease.slot].is_live_for(lease.word),
                        "flipped before released"
                    );
                    assert!(
                        reason != ReleaseReason::Expired || expires <= now,
                        "expired before its time"
                    );
                    assert!(self.released.insert(try_));
                }
                Some(other) => panic!("unknown output {other:?}"),
            }
        }
    }
}

proptest! {
    #[test]
    fn a_lease_ends_once_and_flips_first(ops in prop::collection::vec(lease_op(), 1..120)) {
        let mut leases = Leases::new(3);
        let mut world = LeaseWorld::default();
        let mut now = Time(0);
        for op in ops {
            match op {
                LeaseOp::Offer { request: r, nonce, readers, ttl } => {
                    let (request, nonce) = (request(r), Nonce(nonce));
                    let groups = [group(0, &[u32::from(r)])];
                    let ttl_given = Duration::from_nanos(ttl);
                    match leases.offer(now, &request, nonce, &groups, readers, ttl_given) {
                        Ok(offered) if offered.fresh => {
                            prop_assert!(readers > 0 && ttl > 0);
                            let slot = offered.lease.slot;
                            let before = world.table.insert(slot, offered.flip);
                            prop_assert!(before.is_none_or(|w| w == LeaseWord::DEAD), "slot in use");
                            prop_assert!(offered.flip.is_live_for(offered.lease.word));
                            prop_assert!(world.words.insert(offered.lease.word), "a word comes twice");
                            let offer = (offered.lease, offered.expires);
                            prop_assert!(world.held.insert((request, nonce), offer).is_none());
                        }
                        Ok(offered) => {
                            let offer = (offered.lease, offered.expires);
                            prop_assert_eq!(world.held[&(request, nonce)], offer);
                        }
                        Err(OfferError::NoSlot { .. }) => prop_assert_eq!(world.held.len(), 3),
                        Err(OfferError::Ended { .. }) => {
                            let try_ = (request, nonce);
                            let known = world.held.contains_key(&try_) || world.released.contains(&try_);
                            prop_assert!(known);
                        }
                        Err(OfferError::OtherNonce { held, .. }) => {
                            prop_assert!(world.held.contains_key(&(request, held)));
                        }
                        Err(OfferError::Differs { .. }) => {
                            prop_assert!(world.held.contains_key(&(request, nonce)));
                        }
                        Err(OfferError::Readers { .. }) => prop_assert_eq!(readers, 0),
                        Err(OfferError::NoTime { .. }) => prop_assert_eq!(ttl, 0),
                        Err(other) => prop_assert!(false, "{}", other),
                    }
                }
                LeaseOp::Release { request: r, nonce, peer } => {
                    use ReleaseAnswer::{Ended, Repeated, Waiting};
                    let answer = leases.release(&request(r), Nonce(nonce), &name(peer));
                    if matches!(answer, Waiting { .. } | Ended | Repeated) {
                        prop_assert!(world.held.contains_key(&(request(r), Nonce(nonce))));
                    }
                }
                LeaseOp::Retract(r) => {
                    leases.retract(&request(r));
                }
                LeaseOp::Advance(by) => {
                    now = Time(now.0 + by);
                    leases.on_time(now);
                    prop_assert!(leases.next_timeout().is_none_or(|t| t > now));
                }
                LeaseOp::Drain(most) => world.drain(&mut leases, most, now),
            }
        }
        // Everything that was ever offered comes back by its own time to live.
        now = Time(now.0 + 1000);
        leases.on_time(now);
        prop_assert!(leases.is_empty());
        world.drain(&mut leases, usize::MAX, now);
        prop_assert!(world.held.is_empty());
        prop_assert!(world.table.values().all(|w| *w == LeaseWord::DEAD));
    }

    /// A reader that catches a slot half written never takes it for live.
    #[test]
    fn a_torn_slot_is_dead(a in any::<u64>(), b in any::<u64>()) {
        prop_assume!(a != b);
        let (a_live, b_live) = (LeaseWord::live(a), LeaseWord::live(b));
        for (from, to) in [(a_live, LeaseWord::DEAD), (LeaseWord::DEAD, b_live), (a_live, b_live)] {
            for torn in [
                LeaseWord { word: from.word, check: to.check },
                LeaseWord { word: to.word, check: from.check },
            ] {
                let seen = LeaseWord::decode(&torn.encode());
                prop_assert_eq!(seen, torn);
                prop_assert!(!seen.is_live_for(a) && !seen.is_live_for(b));
            }
        }
    }
}

#[test]
fn all_readers_release_before_the_blocks_do() {
    let mut leases = Leases::new(1);
    let (r, n) = (request(0), Nonce(9));
    let groups = [group(0, &[4, 5])];
    leases
        .offer(Time(0), &r, n, &groups, 2, Duration::from_secs(480))
        .expect("an offer");
    assert_eq!(
        leases.release(&r, n, &name(1)),
        ReleaseAnswer::Waiting { left: 1 }
    );
    assert_eq!(leases.release(&r, n, &name(1)), ReleaseAnswer::Repeated);
    assert_eq!(
        leases.release(&r, Nonce(8), &name(2)),
        ReleaseAnswer::Unknown
    );
    assert_eq!(leases.poll_output(), None);
    assert_eq!(leases.release(&r, n, &name(2)), ReleaseAnswer::Ended);
    assert_eq!(
        leases.poll_output(),
        Some(LeaseOutput::Flip {
            slot: 0,
            word: LeaseWord::DEAD
        })
    );
    let released = LeaseOutput::Released {
        request: r.clone(),
        nonce: n,
        reason: ReleaseReason::AllRead,
        groups: groups.to_vec(),
    };
    assert_eq!(leases.poll_output(), Some(released));
    assert_eq!(leases.release(&r, n, &name(2)), ReleaseAnswer::Late);
}
