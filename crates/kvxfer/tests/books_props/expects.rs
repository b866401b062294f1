//! Who may write, and when memory is free.

use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;
use std::time::Duration;

use kvxfer::claims::Claims;
use kvxfer::event::{Cause, MemoryState, PeerName};
use kvxfer::expects::{
    ExpectOutput, ExpectSpec, Expects, MOST_IMMEDIATES, PushProgress, PushRefusal, Sender,
};
use kvxfer::ids::{Nonce, RequestId};
use kvxfer::plan::Cover;
use kvxfer::rails::RailSet;
use kvxfer::time::Time;
use kvxfer::transfer::PeerKey;
use proptest::prelude::*;

use crate::{group, name, request};

/// What is written of each block is looked at by the one test that asks for it.
fn sender(name: &PeerName) -> Sender<'_> {
    static COVER: LazyLock<Cover> = LazyLock::new(Cover::default);
    Sender {
        name,
        cover: &COVER,
    }
}

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
    /// Done, but for checksums.
    Written {
        request: u8,
        nonce: u64,
        peer: u64,
    },
    Checked {
        request: u8,
        nonce: u64,
        peer: u64,
        right: bool,
    },
    Closed {
        request: u8,
        nonce: u64,
        peer: u64,
    },
    /// Kernels of its own are let to write.
    Kernels {
        request: u8,
        nonce: u64,
        peer: u64,
    },
    Cancel(u8),
    Lost(u64),
    Reset(u64),
    /// Its process has ended.
    Ended(u64),
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
        4 => message().prop_map(|(request, nonce, peer)| ExpectOp::Written { request, nonce, peer }),
        6 => (message(), 0..4u8).prop_map(|((request, nonce, peer), wrong)| {
            ExpectOp::Checked { request, nonce, peer, right: wrong > 0 }
        }),
        4 => message().prop_map(|(request, nonce, peer)| ExpectOp::Closed { request, nonce, peer }),
        4 => message().prop_map(|(request, nonce, peer)| ExpectOp::Kernels { request, nonce, peer }),
        1 => (0..3u8).prop_map(ExpectOp::Cancel),
        1 => (0..4u64).prop_map(ExpectOp::Lost),
        1 => (0..4u64).prop_map(ExpectOp::Reset),
        1 => (0..4u64).prop_map(ExpectOp::Ended),
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
    /// Those of them whose kernels write, and of these whose queue pairs are down.
    kernels: HashSet<u64>,
    left: HashSet<u64>,
    /// Those whose checksums are being compared.
    written: HashSet<u64>,
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
        let left = self.tries.values().flat_map(|entry| {
            let left = entry.left.iter();
            left.filter(|peer| entry.may_write.contains(peer))
        });
        let mut left: Vec<PeerKey> = left.map(|peer| PeerKey(*peer)).collect();
        left.sort_unstable();
        left.dedup();
        assert_eq!(expects.kernels_left(), left);
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
            match entry.kernels.contains(&peer) && entry.may_write.contains(&peer) {
                true => entry.left.insert(peer),
                false => entry.may_write.remove(&peer),
            };
        }
        expects.peer_reset(PeerKey(peer));
    }

    fn ended(&mut self, expects: &mut Expects, peer: u64) {
        for entry in self.tries.values_mut() {
            if entry.left.remove(&peer) {
                entry.may_write.remove(&peer);
            }
        }
        expects.process_ended(PeerKey(peer));
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

/// Of two cache groups that share a pool.
fn claims() -> Claims {
    Claims::new(vec![Some(3), Some(3)])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn an_expectation_ends_once_and_memory_waits_for_writers(
        ops in prop::collection::vec(expect_op(), 1..150)
    ) {
        let mut expects = Expects::new(Duration::from_nanos(GRACE), claims());
        let mut world = ExpectWorld::default();
        let mut now = Time(0);
        for op in ops {
            match op {
                ExpectOp::Expect { request: r, nonce, senders, first, count, within } => {
                    let (request, nonce) = (request(r), Nonce(nonce));
                    let blocks: Vec<u32> = (first..first + count).collect();
                    let deadline = Time(now.0 + within);
                    let groups = [group(first % 2, &blocks)];
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
                                kernels: HashSet::new(),
                                left: HashSet::new(),
                                written: HashSet::new(),
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
                    if expects.announce(&request(r), Nonce(nonce), PeerKey(peer), sender(&name(peer))).is_ok() {
                        let entry = world.tries.get_mut(&(request(r), Nonce(nonce))).expect("known");
                        prop_assert_eq!(entry.life, Life::Standing);
                        entry.may_write.insert(peer);
                        let bound = entry.may_write.len() + entry.written.len() + entry.done.len();
                        prop_assert!(bound <= entry.senders as usize);
                    }
                }
                ExpectOp::Started { request: r, nonce, peer } => {
                    let started = expects.push_started(now, &request(r), Nonce(nonce), PeerKey(peer), sender(&name(peer)));
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
                    match expects.push_done(now, &request(r), Nonce(nonce), PeerKey(peer), |_| None) {
                        Ok(PushProgress::Repeated) => prop_assert!(!could),
                        Ok(_) => prop_assert!(could),
                        Err(NotASender | UnknownRequest | WrongNonce) => prop_assert!(!could),
                        Err(_) => {}
                    }
                }
                ExpectOp::Written { request: r, nonce, peer } => {
                    use PushRefusal::{NotASender, UnknownRequest, WrongNonce};
                    let could = world.stopped(r, nonce, peer, now, false);
                    let tells = expects.may_tell(&request(r), Nonce(nonce), PeerKey(peer));
                    match expects.push_written(now, &request(r), Nonce(nonce), PeerKey(peer)) {
                        Ok(true) => {
                            prop_assert!(could && tells);
                            let entry = world.tries.get_mut(&(request(r), Nonce(nonce))).expect("known");
                            prop_assert_eq!(entry.life, Life::Standing);
                            entry.written.insert(peer);
                        }
                        Ok(false) | Err(NotASender | UnknownRequest | WrongNonce) => prop_assert!(!could),
                        Err(_) => {}
                    }
                }
                ExpectOp::Checked { request: r, nonce, peer, right } => {
                    let key = (request(r), Nonce(nonce));
                    let entry = world.tries.get_mut(&key);
                    let standing = entry.filter(|e| e.life == Life::Standing && now < e.deadline);
                    let waits = standing.is_some_and(|entry| {
                        let waits = entry.written.remove(&peer);
                        if waits && right {
                            entry.done.insert(peer);
                        }
                        waits
                    });
                    let verdict = match right {
                        true => Ok(()),
                        false => Err(Cause::PeerDead),
                    };
                    let checked = expects.push_checked(now, &key.0, key.1, PeerKey(peer), verdict, |_| None);
                    prop_assert_eq!(checked.is_ok(), waits);
                    // It has failed, whoever else is to come.
                    prop_assert!(!waits || right || checked == Ok(PushProgress::Complete));
                }
                ExpectOp::Closed { request: r, nonce, peer } => {
                    let could = world.stopped(r, nonce, peer, now, false);
                    let closed = expects.push_closed(now, &request(r), Nonce(nonce), PeerKey(peer));
                    prop_assert!(!could || closed.is_ok());
                }
                ExpectOp::Kernels { request: r, nonce, peer } => {
                    let key = (request(r), Nonce(nonce));
                    let may = expects.let_kernels_write(now, &key.0, key.1, PeerKey(peer)).is_ok();
                    let entry = world.tries.get_mut(&key);
                    let entry = entry.filter(|e| e.life == Life::Standing && now < e.deadline);
                    let could = entry.is_some_and(|entry| {
                        let could = entry.may_write.contains(&peer);
                        if could {
                            entry.kernels.insert(peer);
                        }
                        could
                    });
                    prop_assert_eq!(may, could);
                }
                ExpectOp::Ended(peer) => world.ended(&mut expects, peer),
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
        // But for kernels, which sessions outlive: those of a process that has ended do not write.
        for peer in 0..4 {
            expects.peer_lost(now, PeerKey(peer), &Cause::PeerDead);
            world.drain(&mut expects, now);
            world.reset(&mut expects, peer);
            world.drain(&mut expects, now);
            world.ended(&mut expects, peer);
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
    let mut expects = Expects::new(Duration::from_nanos(GRACE), claims());
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

/// A push over several rails counts with the word for the last of them, whatever order the words come in.
#[test]
fn a_push_counts_when_every_rail_of_it_was_spoken_for() {
    let rails = RailSet::first(3);
    for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
        let (mut expects, r, n) = expecting(1);
        let one = name(1);
        expects
            .announce(&r, n, PeerKey(1), sender(&one))
            .expect("room");
        let mut whole = Vec::new();
        for rail in order {
            for _ in 0..2 {
                whole.push(expects.rail_done(&r, n, PeerKey(1), (rails, rail)));
            }
        }
        let waits = [Ok(false); 4];
        assert_eq!(whole[..4], waits, "{order:?}");
        assert_eq!(whole[4..], [Ok(true); 2], "{order:?}");
        assert!(outputs(&mut expects).is_empty());
        // It may still write, for all that is known: a peer that is lost now fails it.
        expects.peer_lost(Time(2), PeerKey(1), &Cause::PeerDead);
        assert!(!outputs(&mut expects).is_empty());
    }
}

#[test]
fn immediates_are_a_standing_senders_and_so_many() {
    let (mut expects, r, n) = expecting(2);
    let (one, two) = (name(1), name(2));
    let tell = |expects: &mut Expects, of: &RequestId, n, peer, count| {
        expects.immediates(of, n, PeerKey(peer), count)
    };
    assert_eq!(tell(&mut expects, &r, n, 1, 1), Ok(false), "not bound");
    for (peer, name) in [(1, &one), (2, &two)] {
        let bound = expects.announce(&r, n, PeerKey(peer), sender(name));
        bound.expect("room");
    }
    assert_eq!(tell(&mut expects, &r, Nonce(n.0 + 1), 1, 1), Ok(false));
    assert_eq!(tell(&mut expects, &request(9), n, 1, 1), Ok(false));
    // Each has its own.
    for peer in [1, 2] {
        assert_eq!(
            tell(&mut expects, &r, n, peer, MOST_IMMEDIATES - 1),
            Ok(true)
        );
        assert_eq!(tell(&mut expects, &r, n, peer, 1), Ok(true));
    }
    let most = MOST_IMMEDIATES;
    for more in [1, u64::MAX] {
        let count = most.saturating_add(more);
        let refused = Err(PushRefusal::Immediates { count, most });
        assert_eq!(tell(&mut expects, &r, n, 1, more), refused);
    }
    assert_eq!(tell(&mut expects, &r, n, 1, 0), Ok(true));
    expects.peer_lost(Time(2), PeerKey(2), &Cause::PeerDead);
    assert_eq!(tell(&mut expects, &r, n, 1, 0), Ok(false), "it has failed");
}

#[test]
fn a_sender_that_contradicts_itself_about_its_rails_is_refused() {
    let (mut expects, r, n) = expecting(2);
    let (one, two) = (name(1), name(2));
    expects
        .announce(&r, n, PeerKey(1), sender(&one))
        .expect("room");
    let both = RailSet::first(2);
    assert_eq!(
        expects.rail_done(&r, n, PeerKey(2), (both, 0)),
        Err(PushRefusal::NotASender)
    );
    assert_eq!(
        expects.rail_done(&r, n, PeerKey(1), (both, 2)),
        Err(PushRefusal::OtherRails {
            before: RailSet::EMPTY,
            rails: both
        })
    );
    assert_eq!(expects.rail_done(&r, n, PeerKey(1), (both, 0)), Ok(false));
    for other in [RailSet::only(1), RailSet::first(3)] {
        assert_eq!(
            expects.rail_done(&r, n, PeerKey(1), (other, 1)),
            Err(PushRefusal::OtherRails {
                before: both,
                rails: other
            })
        );
    }
    assert_eq!(expects.rail_done(&r, n, PeerKey(1), (both, 1)), Ok(true));
    // Another sender has rails of its own.
    expects
        .announce(&r, n, PeerKey(2), sender(&two))
        .expect("room");
    let alone = RailSet::only(3);
    assert_eq!(expects.rail_done(&r, n, PeerKey(2), (alone, 3)), Ok(true));
}

/// A sender whose checksums are compared writes no more, and does not count yet.
#[test]
fn a_sender_counts_when_its_checksums_are_right() {
    let (mut expects, r, n) = expecting(2);
    let (one, two) = (name(1), name(2));
    expects
        .announce(&r, n, PeerKey(1), sender(&one))
        .expect("room");
    expects
        .announce(&r, n, PeerKey(2), sender(&two))
        .expect("room");
    assert_eq!(expects.push_written(Time(1), &r, n, PeerKey(1)), Ok(true));
    assert_eq!(expects.push_written(Time(1), &r, n, PeerKey(1)), Ok(false));
    let checked = |expects: &mut Expects, peer, verdict| {
        expects.push_checked(Time(2), &r, n, PeerKey(peer), verdict, |_| None)
    };
    // One that may write has nothing to be compared.
    assert_eq!(
        checked(&mut expects, 2, Ok(())),
        Err(PushRefusal::NotASender)
    );
    assert_eq!(
        expects.push_done(Time(2), &r, n, PeerKey(2), |_| None),
        Ok(PushProgress::Waiting { left: 1 })
    );
    assert!(outputs(&mut expects).is_empty());
    // Its session may go: all that is compared is here.
    expects.peer_lost(Time(2), PeerKey(1), &Cause::PeerDead);
    assert!(outputs(&mut expects).is_empty());
    assert_eq!(checked(&mut expects, 1, Ok(())), Ok(PushProgress::Complete));
    let received = ExpectOutput::Received {
        request: r.clone(),
        nonce: n,
        tag: 5,
    };
    assert_eq!(outputs(&mut expects), [received]);
    assert_eq!(checked(&mut expects, 1, Ok(())), Err(PushRefusal::Late));
}

/// What was written wrong fails the request, and who could still write is stopped.
#[test]
fn wrong_checksums_fail_the_request() {
    let (mut expects, r, n) = expecting(2);
    let (one, two) = (name(1), name(2));
    expects
        .announce(&r, n, PeerKey(1), sender(&one))
        .expect("room");
    expects
        .announce(&r, n, PeerKey(2), sender(&two))
        .expect("room");
    assert_eq!(expects.push_written(Time(1), &r, n, PeerKey(1)), Ok(true));
    let verdict = Err(Cause::LeaseExpired);
    let checked = expects.push_checked(Time(2), &r, n, PeerKey(1), verdict, |_| None);
    assert_eq!(checked, Ok(PushProgress::Complete));
    let quarantined = MemoryState::Quarantined;
    assert_eq!(
        outputs(&mut expects),
        [
            failed(&r, n, Cause::LeaseExpired, quarantined),
            revoke(&r, n, 2)
        ]
    );
    expects
        .push_closed(Time(3), &r, n, PeerKey(2))
        .expect("bound");
    assert_eq!(outputs(&mut expects), [released(&r, n)]);
}

/// A sender that reconnects, or has started anew under its name, does not count for one that has
/// never come.
#[test]
fn a_sender_counts_once_over_all_its_sessions() {
    let (mut expects, r, n) = expecting(2);
    let first = name(1);
    expects
        .announce(&r, n, PeerKey(1), sender(&first))
        .expect("room");
    // Over a second session while the first still stands.
    assert_eq!(
        expects.push_started(Time(1), &r, n, PeerKey(2), sender(&first)),
        Err(PushRefusal::Late)
    );
    assert_eq!(
        expects.push_done(Time(2), &r, n, PeerKey(1), |_| None),
        Ok(PushProgress::Waiting { left: 1 })
    );
    expects.peer_lost(Time(3), PeerKey(1), &Cause::PeerDead);
    // And over one that comes after it.
    assert_eq!(
        expects.announce(&r, n, PeerKey(3), sender(&first)),
        Err(PushRefusal::Late)
    );
    assert_eq!(expects.poll_output(), None);
    expects
        .announce(&r, n, PeerKey(4), sender(&name(4)))
        .expect("room for the other sender");
    assert_eq!(
        expects.push_done(Time(4), &r, n, PeerKey(4), |_| None),
        Ok(PushProgress::Complete)
    );
}

#[test]
fn each_sender_counts_once() {
    let (mut expects, r, n) = expecting(2);
    expects
        .announce(&r, n, PeerKey(1), sender(&name(1)))
        .expect("room");
    expects
        .push_started(Time(1), &r, n, PeerKey(2), sender(&name(2)))
        .expect("room");
    assert_eq!(
        expects.push_started(Time(1), &r, n, PeerKey(3), sender(&name(3))),
        Err(PushRefusal::SendersFull { senders: 2 })
    );
    let mut done =
        |r: &RequestId, n, peer| expects.push_done(Time(2), r, n, PeerKey(peer), |_| None);
    assert_eq!(done(&r, n, 3), Err(PushRefusal::NotASender));
    assert_eq!(done(&r, Nonce(6), 1), Err(PushRefusal::WrongNonce));
    assert_eq!(done(&request(9), n, 1), Err(PushRefusal::UnknownRequest));
    assert_eq!(done(&r, n, 1), Ok(PushProgress::Waiting { left: 1 }));
    assert_eq!(done(&r, n, 1), Ok(PushProgress::Repeated));
    assert_eq!(outputs(&mut expects), []);
    assert_eq!(
        expects.push_done(Time(3), &r, n, PeerKey(2), |_| None),
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
        expects.push_done(Time(3), &r, n, PeerKey(2), |_| None),
        Err(PushRefusal::Late)
    );
}

#[test]
fn the_deadline_revokes_and_the_answer_releases() {
    let (mut expects, r, n) = expecting(2);
    expects
        .announce(&r, n, PeerKey(1), sender(&name(1)))
        .expect("room");
    expects
        .announce(&r, n, PeerKey(2), sender(&name(2)))
        .expect("room");
    expects
        .push_done(Time(2), &r, n, PeerKey(1), |_| None)
        .expect("a sender");
    // What is late by the clock is late, whether or not the timer was looked at.
    assert_eq!(
        expects.push_started(Time(100), &r, n, PeerKey(2), sender(&name(2))),
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
    expects
        .announce(&r, n, PeerKey(1), sender(&name(1)))
        .expect("room");
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
    expects
        .announce(&r, n, PeerKey(1), sender(&name(1)))
        .expect("room");
    expects
        .announce(&r, n, PeerKey(2), sender(&name(2)))
        .expect("room");
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
        expects.push_done(Time(2), &r, n, PeerKey(2), |_| None),
        Err(PushRefusal::Late)
    );
    assert_eq!(outputs(&mut expects), [released(&r, n)]);
}

#[test]
fn a_dead_peer_is_reset_and_not_asked() {
    let (mut expects, r, n) = expecting(1);
    expects
        .announce(&r, n, PeerKey(1), sender(&name(1)))
        .expect("room");
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

/// All senders have come, and their parts together are not the whole: the request has failed, once, and
/// its memory is free, for nobody is left who could write.
#[test]
fn the_wrong_senders_are_not_taken_for_the_right_ones() {
    let (mut expects, r, n) = expecting(2);
    expects
        .announce(&r, n, PeerKey(1), sender(&name(1)))
        .expect("room");
    expects
        .announce(&r, n, PeerKey(2), sender(&name(2)))
        .expect("room");
    let never = |_: &[&Cover]| -> Option<Cause> { panic!("asked before the last one") };
    expects
        .push_done(Time(2), &r, n, PeerKey(1), never)
        .expect("counted");
    let gap = |covers: &[&Cover]| {
        assert_eq!(covers.len(), 2);
        Some(Cause::Aborted)
    };
    let progress = expects.push_done(Time(3), &r, n, PeerKey(2), gap);
    assert_eq!(progress, Ok(PushProgress::Complete));
    let outputs = outputs(&mut expects);
    let [
        ExpectOutput::Failed {
            cause: Cause::Aborted,
            memory: MemoryState::Released,
            ..
        },
    ] = outputs.as_slice()
    else {
        panic!("{outputs:?}");
    };
}
