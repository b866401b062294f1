//! Properties of the books: tickets, leases, expectations, under random events.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use kvxfer::blocks::GroupBlocks;
use kvxfer::event::{Cause, MemoryState, PeerName, ReleaseReason};
use kvxfer::expects::{ExpectOutput, ExpectSpec, Expects, PushProgress, PushRefusal};
use kvxfer::ids::{EngineId, Generation, Nonce, Rank, RequestId};
use kvxfer::leases::{LeaseOutput, LeaseWord, Leases, OfferError, ReleaseAnswer};
use kvxfer::ticket::{LeaseRef, MAX_BLOCKS, Ticket, TicketError, TicketKind};
use kvxfer::time::Time;
use kvxfer::transfer::PeerKey;
use proptest::prelude::*;

fn name(peer: u64) -> PeerName {
    PeerName {
        engine: EngineId::from(format!("engine-{peer}").as_str()),
        rank: Rank::default(),
    }
}

fn request(n: u8) -> RequestId {
    RequestId::from(format!("r{n}"))
}

fn group(group: u32, blocks: &[u32]) -> GroupBlocks {
    GroupBlocks {
        group,
        blocks: blocks.to_vec(),
    }
}

// ---------------------------------------------------------------- leases

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

// ---------------------------------------------------------------- expectations

#[derive(Debug, Clone)]
enum ExpectOp {
    Expect {
        request: u8,
        nonce: u64,
        senders: u32,
        first: u32,
        count: u32,
        within: u64,
    },
    Announce {
        request: u8,
        nonce: u64,
        peer: u64,
    },
    Started {
        request: u8,
        nonce: u64,
        peer: u64,
    },
    Done {
        request: u8,
        nonce: u64,
        peer: u64,
    },
    Closed {
        request: u8,
        nonce: u64,
        peer: u64,
    },
    Cancel(u8),
    Lost(u64),
    Reset(u64),
    Advance(u64),
}

fn expect_op() -> impl Strategy<Value = ExpectOp> {
    let message = || (0..3u8, 0..4u64, 0..4u64);
    prop_oneof![
        5 => (0..3u8, 0..4u64, 0..4u32, 0..12u32, 0..5u32, 0..60u64).prop_map(
            |(request, nonce, senders, first, count, within)| {
                ExpectOp::Expect { request, nonce, senders, first, count, within }
            }),
        6 => message().prop_map(|(request, nonce, peer)| ExpectOp::Announce { request, nonce, peer }),
        4 => message().prop_map(|(request, nonce, peer)| ExpectOp::Started { request, nonce, peer }),
        6 => message().prop_map(|(request, nonce, peer)| ExpectOp::Done { request, nonce, peer }),
        4 => message().prop_map(|(request, nonce, peer)| ExpectOp::Closed { request, nonce, peer }),
        1 => (0..3u8).prop_map(ExpectOp::Cancel),
        1 => (0..4u64).prop_map(ExpectOp::Lost),
        1 => (0..4u64).prop_map(ExpectOp::Reset),
        3 => (0..25u64).prop_map(ExpectOp::Advance),
    ]
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Life {
    Standing,
    Quarantined,
    Over,
}

struct Try {
    life: Life,
    blocks: HashSet<u32>,
    senders: u32,
    deadline: Time,
    /// Peers that were told they may write and have neither closed nor been cut off.
    may_write: HashSet<u64>,
    done: HashSet<u64>,
}

#[derive(Default)]
struct ExpectWorld {
    tries: HashMap<(RequestId, Nonce), Try>,
    resetting: HashSet<u64>,
}

impl ExpectWorld {
    /// Carries out all outputs and checks each against what peers may still do.
    fn drain(&mut self, expects: &mut Expects, now: Time) {
        let mut to_be_told: HashSet<(RequestId, Nonce, u64)> = HashSet::new();
        while let Some(output) = expects.poll_output() {
            match output {
                ExpectOutput::Received {
                    request,
                    nonce,
                    tag,
                } => {
                    let entry = self.tries.get_mut(&(request, nonce)).expect("known");
                    assert_eq!(entry.life, Life::Standing, "one outcome");
                    assert_eq!(tag, nonce.0);
                    assert_eq!(
                        entry.done.len(),
                        entry.senders as usize,
                        "all senders are done"
                    );
                    assert!(
                        entry.may_write.is_empty(),
                        "received while somebody may write"
                    );
                    assert!(now < entry.deadline, "received after the deadline");
                    entry.life = Life::Over;
                }
                ExpectOutput::Failed {
                    request,
                    nonce,
                    memory,
                    groups,
                    cause,
                    ..
                } => {
                    let entry = self
                        .tries
                        .get_mut(&(request.clone(), nonce))
                        .expect("known");
                    assert_eq!(entry.life, Life::Standing, "one outcome");
                    assert!(cause != Cause::DeadlinePassed || now >= entry.deadline);
                    let blocks: usize = groups.iter().map(|g| g.blocks.len()).sum();
                    assert_eq!(blocks, entry.blocks.len());
                    entry.life = match memory {
                        MemoryState::Released => Life::Over,
                        MemoryState::Quarantined => Life::Quarantined,
                    };
                    assert_eq!(memory == MemoryState::Released, entry.may_write.is_empty());
                    for peer in entry
                        .may_write
                        .iter()
                        .filter(|p| !self.resetting.contains(p))
                    {
                        to_be_told.insert((request.clone(), nonce, *peer));
                    }
                }
                ExpectOutput::Revoke {
                    peer,
                    request,
                    nonce,
                } => {
                    let due = to_be_told.remove(&(request, nonce, peer.0));
                    assert!(due, "a revoke for each writer, once");
                }
                ExpectOutput::ForceReset { peer } => {
                    assert!(self.resetting.insert(peer.0), "one reset at a time");
                    to_be_told.retain(|(_, _, p)| *p != peer.0);
                }
                ExpectOutput::Released { request, nonce, .. } => {
                    let entry = self.tries.get_mut(&(request, nonce)).expect("known");
                    assert_eq!(
                        entry.life,
                        Life::Quarantined,
                        "released once, after a quarantine"
                    );
                    assert!(
                        entry.may_write.is_empty(),
                        "released while somebody may write"
                    );
                    entry.life = Life::Over;
                }
                other => panic!("unknown output {other:?}"),
            }
        }
        assert!(
            to_be_told.is_empty(),
            "writers that nobody stops: {to_be_told:?}"
        );
        for ((request, nonce), entry) in &self.tries {
            assert!(
                entry.life != Life::Quarantined || !entry.may_write.is_empty(),
                "{request} {nonce:?} is quarantined for nothing"
            );
        }
    }

    fn reset(&mut self, expects: &mut Expects, peer: u64) {
        self.resetting.remove(&peer);
        for entry in self
            .tries
            .values_mut()
            .filter(|t| t.life == Life::Quarantined)
        {
            entry.may_write.remove(&peer);
        }
        expects.peer_reset(PeerKey(peer));
    }

    /// A message that says that nothing of the peer is under way for the try. Whether it could
    /// have written until now.
    fn stopped(&mut self, request: u8, nonce: u64, peer: u64, now: Time, done: bool) -> bool {
        let Some(entry) = self.tries.get_mut(&(self::request(request), Nonce(nonce))) else {
            return false;
        };
        let could = entry.may_write.remove(&peer);
        if could && done && entry.life == Life::Standing && now < entry.deadline {
            entry.done.insert(peer);
        }
        could
    }
}

const GRACE: u64 = 20;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn an_expectation_ends_once_and_memory_waits_for_writers(
        ops in prop::collection::vec(expect_op(), 1..150)
    ) {
        let mut expects = Expects::new(Duration::from_nanos(GRACE));
        let mut world = ExpectWorld::default();
        let mut now = Time(0);
        for op in ops {
            match op {
                ExpectOp::Expect { request: r, nonce, senders, first, count, within } => {
                    let (request, nonce) = (request(r), Nonce(nonce));
                    let blocks: Vec<u32> = (first..first + count).collect();
                    let deadline = Time(now.0 + within);
                    let groups = [group(0, &blocks)];
                    let spec = ExpectSpec {
                        request: &request, nonce, groups: &groups, senders, deadline, tag: nonce.0,
                    };
                    match expects.expect(now, spec) {
                        Ok(true) => {
                            for (key, other) in &world.tries {
                                let apart = blocks.iter().all(|b| !other.blocks.contains(b));
                                prop_assert!(other.life == Life::Over || apart, "{:?} has them", key);
                            }
                            let entry = Try {
                                life: Life::Standing,
                                blocks: blocks.into_iter().collect(),
                                senders,
                                deadline,
                                may_write: HashSet::new(),
                                done: HashSet::new(),
                            };
                            let before = world.tries.insert((request, nonce), entry);
                            prop_assert!(before.is_none(), "a try comes twice");
                        }
                        Ok(false) => {
                            prop_assert_eq!(world.tries[&(request, nonce)].life, Life::Standing);
                        }
                        Err(_) => {}
                    }
                }
                ExpectOp::Announce { request: r, nonce, peer } => {
                    if expects.announce(&request(r), Nonce(nonce), PeerKey(peer), &name(peer)).is_ok() {
                        let entry = world.tries.get_mut(&(request(r), Nonce(nonce))).expect("known");
                        prop_assert_eq!(entry.life, Life::Standing);
                        entry.may_write.insert(peer);
                        let bound = entry.may_write.len() + entry.done.len();
                        prop_assert!(bound <= entry.senders as usize);
                    }
                }
                ExpectOp::Started { request: r, nonce, peer } => {
                    let started = expects.push_started(now, &request(r), Nonce(nonce), PeerKey(peer), &name(peer));
                    if started.is_ok() {
                        let entry = world.tries.get_mut(&(request(r), Nonce(nonce))).expect("known");
                        prop_assert_eq!(entry.life, Life::Standing);
                        prop_assert!(now < entry.deadline);
                        entry.may_write.insert(peer);
                    }
                }
                ExpectOp::Done { request: r, nonce, peer } => {
                    use PushRefusal::{NotASender, UnknownRequest, WrongNonce};
                    let could = world.stopped(r, nonce, peer, now, true);
                    match expects.push_done(now, &request(r), Nonce(nonce), PeerKey(peer)) {
                        Ok(PushProgress::Repeated) => prop_assert!(!could),
                        Ok(_) => prop_assert!(could),
                        Err(NotASender | UnknownRequest | WrongNonce) => prop_assert!(!could),
                        Err(_) => {}
                    }
                }
                ExpectOp::Closed { request: r, nonce, peer } => {
                    let could = world.stopped(r, nonce, peer, now, false);
                    let closed = expects.push_closed(now, &request(r), Nonce(nonce), PeerKey(peer));
                    prop_assert!(!could || closed.is_ok());
                }
                ExpectOp::Cancel(r) => {
                    expects.cancel(now, &request(r), Cause::Cancelled);
                }
                ExpectOp::Lost(peer) => expects.peer_lost(now, PeerKey(peer), &Cause::PeerDead),
                ExpectOp::Reset(peer) => world.reset(&mut expects, peer),
                ExpectOp::Advance(by) => {
                    now = Time(now.0 + by);
                    expects.on_time(now);
                    prop_assert!(expects.next_timeout().is_none_or(|t| t > now));
                }
            }
            world.drain(&mut expects, now);
        }
        // With silent peers everything ends by deadline, grace and resets alone.
        now = Time(now.0 + 1000);
        expects.on_time(now);
        world.drain(&mut expects, now);
        prop_assert_eq!(expects.standing(), 0);
        now = Time(now.0 + GRACE);
        expects.on_time(now);
        world.drain(&mut expects, now);
        for peer in world.resetting.clone() {
            world.reset(&mut expects, peer);
            world.drain(&mut expects, now);
        }
        prop_assert_eq!(expects.draining(), 0);
        prop_assert_eq!(expects.next_timeout(), None);
        prop_assert!(world.tries.values().all(|t| t.life == Life::Over));
        // All blocks are free again.
        let last = request(99);
        let all: Vec<u32> = (0..64).collect();
        let groups = [group(0, &all)];
        let spec = ExpectSpec {
            request: &last, nonce: Nonce(0), groups: &groups, senders: 1,
            deadline: Time(now.0 + 1), tag: 0,
        };
        prop_assert_eq!(expects.expect(now, spec), Ok(true));
    }
}

fn expecting(senders: u32) -> (Expects, RequestId, Nonce) {
    let mut expects = Expects::new(Duration::from_nanos(GRACE));
    let (r, n) = (request(1), Nonce(7));
    let spec = ExpectSpec {
        request: &r,
        nonce: n,
        groups: &[group(0, &[3, 1])],
        senders,
        deadline: Time(100),
        tag: 5,
    };
    assert_eq!(expects.expect(Time(0), spec), Ok(true));
    (expects, r, n)
}

fn outputs(expects: &mut Expects) -> Vec<ExpectOutput> {
    std::iter::from_fn(|| expects.poll_output()).collect()
}

fn failed(r: &RequestId, n: Nonce, cause: Cause, memory: MemoryState) -> ExpectOutput {
    let groups = vec![group(0, &[3, 1])];
    ExpectOutput::Failed {
        request: r.clone(),
        nonce: n,
        tag: 5,
        cause,
        groups,
        memory,
    }
}

fn revoke(r: &RequestId, n: Nonce, peer: u64) -> ExpectOutput {
    ExpectOutput::Revoke {
        peer: PeerKey(peer),
        request: r.clone(),
        nonce: n,
    }
}

fn released(r: &RequestId, n: Nonce) -> ExpectOutput {
    ExpectOutput::Released {
        request: r.clone(),
        nonce: n,
        groups: vec![group(0, &[3, 1])],
    }
}

/// A sender that reconnects, or has started anew under its name, does not count for one that has
/// never come.
#[test]
fn a_sender_counts_once_over_all_its_sessions() {
    let (mut expects, r, n) = expecting(2);
    let first = name(1);
    expects.announce(&r, n, PeerKey(1), &first).expect("room");
    // Over a second session while the first still stands.
    assert_eq!(
        expects.push_started(Time(1), &r, n, PeerKey(2), &first),
        Err(PushRefusal::Late)
    );
    assert_eq!(
        expects.push_done(Time(2), &r, n, PeerKey(1)),
        Ok(PushProgress::Waiting { left: 1 })
    );
    expects.peer_lost(Time(3), PeerKey(1), &Cause::PeerDead);
    // And over one that comes after it.
    assert_eq!(
        expects.announce(&r, n, PeerKey(3), &first),
        Err(PushRefusal::Late)
    );
    assert_eq!(expects.poll_output(), None);
    expects
        .announce(&r, n, PeerKey(4), &name(4))
        .expect("room for the other sender");
    assert_eq!(
        expects.push_done(Time(4), &r, n, PeerKey(4)),
        Ok(PushProgress::Complete)
    );
}

#[test]
fn each_sender_counts_once() {
    let (mut expects, r, n) = expecting(2);
    expects.announce(&r, n, PeerKey(1), &name(1)).expect("room");
    expects
        .push_started(Time(1), &r, n, PeerKey(2), &name(2))
        .expect("room");
    assert_eq!(
        expects.push_started(Time(1), &r, n, PeerKey(3), &name(3)),
        Err(PushRefusal::SendersFull { senders: 2 })
    );
    let mut done = |r: &RequestId, n, peer| expects.push_done(Time(2), r, n, PeerKey(peer));
    assert_eq!(done(&r, n, 3), Err(PushRefusal::NotASender));
    assert_eq!(done(&r, Nonce(6), 1), Err(PushRefusal::WrongNonce));
    assert_eq!(done(&request(9), n, 1), Err(PushRefusal::UnknownRequest));
    assert_eq!(done(&r, n, 1), Ok(PushProgress::Waiting { left: 1 }));
    assert_eq!(done(&r, n, 1), Ok(PushProgress::Repeated));
    assert_eq!(outputs(&mut expects), []);
    assert_eq!(
        expects.push_done(Time(3), &r, n, PeerKey(2)),
        Ok(PushProgress::Complete)
    );
    assert_eq!(
        outputs(&mut expects),
        [ExpectOutput::Received {
            request: r.clone(),
            nonce: n,
            tag: 5
        }]
    );
    assert_eq!(
        expects.push_done(Time(3), &r, n, PeerKey(2)),
        Err(PushRefusal::Late)
    );
}

#[test]
fn the_deadline_revokes_and_the_answer_releases() {
    let (mut expects, r, n) = expecting(2);
    expects.announce(&r, n, PeerKey(1), &name(1)).expect("room");
    expects.announce(&r, n, PeerKey(2), &name(2)).expect("room");
    expects
        .push_done(Time(2), &r, n, PeerKey(1))
        .expect("a sender");
    // What is late by the clock is late, whether or not the timer was looked at.
    assert_eq!(
        expects.push_started(Time(100), &r, n, PeerKey(2), &name(2)),
        Err(PushRefusal::Late)
    );
    assert_eq!(
        outputs(&mut expects),
        [
            failed(&r, n, Cause::DeadlinePassed, MemoryState::Quarantined),
            revoke(&r, n, 2)
        ]
    );
    expects
        .push_closed(Time(101), &r, n, PeerKey(2))
        .expect("a sender");
    assert_eq!(outputs(&mut expects), [released(&r, n)]);
    assert_eq!(expects.next_timeout(), None);
}

#[test]
fn a_silent_peer_is_cut_off() {
    let (mut expects, r, n) = expecting(1);
    expects.announce(&r, n, PeerKey(1), &name(1)).expect("room");
    expects.on_time(Time(100));
    outputs(&mut expects);
    assert_eq!(expects.next_timeout(), Some(Time(120)));
    expects.on_time(Time(120));
    assert_eq!(
        outputs(&mut expects),
        [ExpectOutput::ForceReset { peer: PeerKey(1) }]
    );
    expects.peer_reset(PeerKey(1));
    assert_eq!(outputs(&mut expects), [released(&r, n)]);
}

#[test]
fn nobody_bound_means_nothing_to_wait_for() {
    let (mut expects, r, n) = expecting(1);
    assert!(expects.cancel(Time(1), &r, Cause::Cancelled));
    assert_eq!(
        outputs(&mut expects),
        [failed(&r, n, Cause::Cancelled, MemoryState::Released)]
    );
    assert!(!expects.cancel(Time(1), &r, Cause::Cancelled));
}

#[test]
fn an_abort_fails_and_revokes_the_others() {
    let (mut expects, r, n) = expecting(2);
    expects.announce(&r, n, PeerKey(1), &name(1)).expect("room");
    expects.announce(&r, n, PeerKey(2), &name(2)).expect("room");
    expects
        .push_closed(Time(1), &r, n, PeerKey(1))
        .expect("a sender");
    assert_eq!(
        outputs(&mut expects),
        [
            failed(&r, n, Cause::Aborted, MemoryState::Quarantined),
            revoke(&r, n, 2)
        ]
    );
    // All its operations had completed: that closes it, but the outcome stands.
    assert_eq!(
        expects.push_done(Time(2), &r, n, PeerKey(2)),
        Err(PushRefusal::Late)
    );
    assert_eq!(outputs(&mut expects), [released(&r, n)]);
}

#[test]
fn a_dead_peer_is_reset_and_not_asked() {
    let (mut expects, r, n) = expecting(1);
    expects.announce(&r, n, PeerKey(1), &name(1)).expect("room");
    expects.peer_lost(Time(1), PeerKey(1), &Cause::PeerDead);
    assert_eq!(
        outputs(&mut expects),
        [
            failed(&r, n, Cause::PeerDead, MemoryState::Quarantined),
            ExpectOutput::ForceReset { peer: PeerKey(1) },
        ]
    );
    expects.peer_reset(PeerKey(1));
    assert_eq!(outputs(&mut expects), [released(&r, n)]);
}

// ---------------------------------------------------------------- tickets

fn ticket() -> impl Strategy<Value = Ticket> {
    let blocks = prop::collection::hash_set(any::<u32>(), 0..40)
        .prop_map(|set| set.into_iter().collect::<Vec<u32>>());
    // Runs too, up to the last id.
    let runs = (any::<u32>(), 0..200u32)
        .prop_map(|(first, n)| (first..=first.saturating_add(n)).collect::<Vec<u32>>());
    let groups = prop::collection::vec(prop_oneof![blocks, runs], 0..4).prop_map(|lists| {
        (0..)
            .zip(lists)
            .map(|(group, blocks)| GroupBlocks { group, blocks })
            .collect::<Vec<_>>()
    });
    let names = ("[a-z0-9 \u{e9}\"-]{1,40}", "\\PC{1,40}");
    let bytes = (any::<[u8; 16]>(), any::<[u8; 32]>());
    let rank = (any::<u32>(), any::<u32>(), any::<u32>());
    let numbers = (any::<u64>(), any::<u32>(), any::<u64>());
    (
        any::<bool>(),
        names,
        bytes,
        rank,
        numbers,
        groups,
        1..65_537u32,
        0..604_800_000u64,
    )
        .prop_map(
            |(
                offer,
                names,
                (generation, format),
                rank,
                (nonce, slot, word),
                groups,
                parties,
                ttl,
            )| {
                Ticket {
                    kind: if offer {
                        TicketKind::Offer
                    } else {
                        TicketKind::Expect
                    },
                    engine: EngineId::from(names.0.as_str()),
                    generation: Generation(generation),
                    rank: Rank {
                        dp: rank.0,
                        pp: rank.1,
                        tp: rank.2,
                    },
                    addr: Some("[fe80::1]:7301".into()),
                    request: RequestId::from(names.1),
                    nonce: Nonce(nonce),
                    groups,
                    lease: offer.then_some(LeaseRef { slot, word }),
                    format,
                    parties,
                    ttl: Duration::from_millis(ttl),
                }
            },
        )
}

type Changes = Vec<(prop::sample::Index, u8)>;

fn changes() -> impl Strategy<Value = Changes> {
    prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)
}

proptest! {
    #[test]
    fn tickets_come_back_as_they_were(ticket in ticket()) {
        let bytes = ticket.to_bytes().expect("in bounds");
        prop_assert_eq!(&Ticket::from_bytes(&bytes).expect("decodes"), &ticket);
        let json = ticket.to_json().expect("in bounds");
        prop_assert_eq!(&Ticket::from_json(&json).expect("decodes"), &ticket);
        // A router that keeps every number as a double does no harm.
        let value: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        let relayed = as_doubles(value).to_string();
        prop_assert_eq!(&Ticket::from_json(&relayed).expect("decodes"), &ticket);
    }

    #[test]
    fn hostile_bytes_are_refused_or_make_a_sound_ticket(
        ticket in ticket(), changes in changes(), cut in any::<prop::sample::Index>()
    ) {
        let mut bytes = ticket.to_bytes().expect("in bounds");
        let mut json = ticket.to_json().expect("in bounds").into_bytes();
        for (at, byte) in changes {
            let (in_bytes, in_json) = (at.index(bytes.len()), at.index(json.len()));
            bytes[in_bytes] = byte;
            json[in_json] = byte;
        }
        if let Ok(ticket) = Ticket::from_bytes(&bytes) {
            ticket.check().expect("what decodes is within bounds");
        }
        if let Ok(Ok(ticket)) = std::str::from_utf8(&json).map(Ticket::from_json) {
            ticket.check().expect("what decodes is within bounds");
        }
        let whole = ticket.to_bytes().expect("in bounds");
        prop_assert!(Ticket::from_bytes(&whole[..cut.index(whole.len())]).is_err());
    }

    #[test]
    fn noise_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(Ticket::from_bytes(&bytes).is_err());
    }
}

/// The value after a relay that holds every number as a double, as JavaScript does.
fn as_doubles(value: serde_json::Value) -> serde_json::Value {
    use serde_json::Value;
    match value {
        // Whole numbers are written without a point.
        Value::Number(n) => Value::Number((n.as_f64().expect("a number") as u64).into()),
        Value::Array(items) => items.into_iter().map(as_doubles).collect(),
        Value::Object(map) => map.into_iter().map(|(k, v)| (k, as_doubles(v))).collect(),
        other => other,
    }
}

/// A ticket as JSON with one field replaced.
fn json_with(field: &str, value: serde_json::Value) -> String {
    let ticket = Ticket {
        kind: TicketKind::Offer,
        engine: EngineId::from("prefill-0"),
        generation: Generation([0xab; 16]),
        rank: Rank::default(),
        addr: Some("10.0.0.3:7301".into()),
        request: RequestId::from("cmpl-1"),
        nonce: Nonce(u64::MAX - 1),
        groups: vec![group(0, &[7, 8, 9, 10, 3])],
        lease: Some(LeaseRef {
            slot: 4,
            word: 1 << 63,
        }),
        format: [0x11; 32],
        parties: 1,
        ttl: Duration::from_secs(480),
    };
    let mut json = serde_json::to_value(&ticket).expect("encodes");
    json.as_object_mut()
        .expect("an object")
        .insert(field.into(), value);
    json.to_string()
}

#[test]
fn a_ticket_in_json_is_readable() {
    use serde_json::json;
    let text = json_with("later_field", json!({"ignored": [1, 2]}));
    Ticket::from_json(&text).expect("unknown fields are skipped");
    let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(value["version"], 1);
    assert_eq!(value["kind"], "offer");
    assert_eq!(value["nonce"], "fffffffffffffffe");
    assert_eq!(
        value["lease"],
        json!({"slot": 4, "word": "8000000000000000"})
    );
    assert_eq!(
        value["groups"],
        json!([{"group": 0, "blocks": [[7, 4], 3]}])
    );
    assert_eq!(value["ttl_ms"], 480_000);
}

#[test]
fn faults_are_named() {
    use TicketError as E;
    use serde_json::json;
    let refused = |field: &str, value: serde_json::Value| {
        Ticket::from_json(&json_with(field, value)).expect_err(field)
    };
    let blocks =
        |blocks: serde_json::Value| refused("groups", json!([{ "group": 0, "blocks": blocks }]));
    assert!(matches!(
        refused("version", json!(2)),
        E::Version { got: 2 }
    ));
    assert!(matches!(
        refused("parties", json!(0)),
        E::Parties { parties: 0 }
    ));
    assert!(matches!(
        refused("engine", json!("")),
        E::Name {
            field: "engine",
            len: 0
        }
    ));
    let long = "x".repeat(513);
    assert!(matches!(
        refused("request", json!(long)),
        E::Name {
            field: "request",
            len: 513
        }
    ));
    assert!(matches!(
        refused("addr", json!("nowhere")),
        E::Address { .. }
    ));
    assert!(matches!(
        refused("addr", json!("host:0")),
        E::Address { .. }
    ));
    assert!(matches!(refused("ttl_ms", json!(u64::MAX)), E::Ttl { .. }));
    assert!(matches!(refused("kind", json!("expect")), E::Lease { .. }));
    assert!(matches!(
        refused("nonce", json!("1234567890abcdef0")),
        E::Json(_)
    ));
    assert!(matches!(refused("nonce", json!("+1")), E::Json(_)));
    assert!(matches!(refused("nonce", json!(5)), E::Json(_)));
    assert!(matches!(refused("format", json!("11")), E::Json(_)));
    assert!(matches!(
        refused("format", json!("é".repeat(32))),
        E::Json(_)
    ));
    assert!(matches!(blocks(json!([1, 1])), E::Blocks(_)));
    let twice = json!([{"group": 0, "blocks": []}, {"group": 0, "blocks": []}]);
    assert!(matches!(refused("groups", twice), E::Blocks(_)));
    // A few bytes that would be 16 GiB of block ids, a run past the last id, an id past it.
    assert!(matches!(blocks(json!([[0, u32::MAX]])), E::Json(_)));
    assert!(matches!(blocks(json!([[u32::MAX, 2]])), E::Json(_)));
    assert!(matches!(blocks(json!([1u64 << 32])), E::Json(_)));
    let half = MAX_BLOCKS / 2;
    let halves =
        json!([{"group": 0, "blocks": [[0, half]]}, {"group": 1, "blocks": [[0, half + 1]]}]);
    assert!(matches!(refused("groups", halves), E::Blocks(_)));
    let deep = format!("{{\"version\":1,\"x\":{}", "[".repeat(100_000));
    assert!(Ticket::from_json(&deep).is_err());
    // MessagePack: arrays of one, nested.
    assert!(Ticket::from_bytes(&vec![0x91; 100_000]).is_err());
}
