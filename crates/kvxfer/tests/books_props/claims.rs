//! No block is in two things that do not go together, and it is free as soon as the last is over.

use kvxfer::blocks::GroupBlocks;
use kvxfer::claims::{Claim, Claimant, Claims, Purpose};
use kvxfer::event::PeerName;
use kvxfer::ids::{EngineId, Rank, RequestId};
use proptest::prelude::*;

use crate::{group, request};

/// Groups 0 and 1 share a pool, 2 has its own, and of 3 this rank keeps nothing.
const POOLS: [Option<u32>; 4] = [Some(7), Some(7), Some(1), None];

#[derive(Debug, Clone)]
enum Op {
    Claim {
        request: u8,
        purpose: Purpose,
        engine: u8,
        rank: u32,
        groups: Vec<GroupBlocks>,
    },
    Drop(usize),
    Fail(usize),
}

fn blocks() -> impl Strategy<Value = Vec<u32>> {
    // Around the end of a page, and far away.
    prop_oneof![
        4 => prop::collection::vec(4090..4102u32, 0..5),
        1 => prop::collection::vec(prop_oneof![Just(0), Just(1 << 20)], 0..3),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let purpose = prop_oneof![
        3 => Just(Purpose::Pull),
        1 => Just(Purpose::Expect),
        1 => Just(Purpose::Offer),
        1 => Just(Purpose::Push),
    ];
    let lists = prop::collection::vec(blocks(), 4);
    let claim = (0..3u8, purpose, 0..2u8, 0..3u32, lists).prop_map(
        |(request, purpose, engine, rank, lists)| Op::Claim {
            request,
            purpose,
            engine,
            rank,
            groups: (0..).zip(&lists).map(|(g, list)| group(g, list)).collect(),
        },
    );
    prop_oneof![
        6 => claim,
        4 => any::<usize>().prop_map(Op::Drop),
        1 => any::<usize>().prop_map(Op::Fail),
    ]
}

/// A claim as the naive model knows it.
struct Known {
    claim: Claim,
    request: RequestId,
    purpose: Purpose,
    from: Option<PeerName>,
    groups: Vec<GroupBlocks>,
    failed: bool,
}

fn writes(purpose: Purpose) -> bool {
    matches!(purpose, Purpose::Pull | Purpose::Expect)
}

impl Known {
    fn has(&self, pool: Option<u32>, block: u32) -> bool {
        pool.is_some()
            && self
                .groups
                .iter()
                .any(|g| POOLS[g.group as usize] == pool && g.blocks.contains(&block))
    }

    /// Whether a new claim may have what this one has.
    fn shares(&self, family_failed: bool, who: &Claimant<'_>) -> bool {
        if !writes(self.purpose) && !writes(who.purpose) {
            return true;
        }
        let (Some(here), Some(there)) = (&self.from, who.from) else {
            return false;
        };
        self.request == *who.request
            && here.engine == there.engine
            && here.rank != there.rank
            && !family_failed
    }
}

fn naive(known: &[Known], who: &Claimant<'_>, groups: &[GroupBlocks]) -> bool {
    let of_family = |k: &&Known| {
        let engine = |name: Option<&PeerName>| name.map(|name| name.engine.clone());
        k.from.is_some() && k.request == *who.request && engine(k.from.as_ref()) == engine(who.from)
    };
    let failed = known.iter().filter(of_family).any(|k| k.failed);
    let free = |g: &GroupBlocks, block: &u32| {
        let pool = POOLS[g.group as usize];
        let others = known
            .iter()
            .filter(|k| k.has(pool, *block))
            .all(|k| k.shares(failed, who));
        let own = !writes(who.purpose)
            || pool.is_none()
            || groups.iter().all(|other| {
                other.group == g.group
                    || POOLS[other.group as usize] != pool
                    || !other.blocks.contains(block)
            });
        others && own
    };
    groups.iter().all(|g| g.blocks.iter().all(|b| free(g, b)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn claims_are_as_a_naive_list_would_have_them(ops in prop::collection::vec(op(), 1..60)) {
        let claims = Claims::new(POOLS.to_vec());
        let mut known: Vec<Known> = Vec::new();
        for op in ops {
            match op {
                Op::Claim { request: r, purpose, engine, rank, groups } => {
                    let request = request(r);
                    let from = PeerName {
                        engine: EngineId::from(format!("p{engine}").as_str()),
                        rank: Rank { dp: 0, pp: 0, tp: rank },
                    };
                    let from = (purpose == Purpose::Pull).then_some(from);
                    let who = Claimant { request: &request, purpose, from: from.as_ref() };
                    let allowed = naive(&known, &who, &groups);
                    match claims.claim(who, groups.clone()) {
                        Ok(claim) => {
                            prop_assert!(allowed, "{purpose} of {request} got what it may not have");
                            known.push(Known { claim, request, purpose, from, groups, failed: false });
                        }
                        Err(refused) => {
                            prop_assert!(!allowed, "{refused}");
                            prop_assert_eq!((&refused.request, refused.purpose), (&request, purpose));
                            let pool = POOLS[refused.group as usize];
                            let listed = groups.iter().any(|g| {
                                g.group == refused.group && g.blocks.contains(&refused.block)
                            });
                            prop_assert!(listed);
                            let holds = |k: &Known| {
                                k.has(pool, refused.block)
                                    && (&k.request, k.purpose) == (&refused.held_by, refused.held_for)
                            };
                            let own = (&refused.held_by, refused.held_for) == (&request, purpose);
                            prop_assert!(own || known.iter().any(holds), "{refused}");
                        }
                    }
                }
                Op::Drop(at) if !known.is_empty() => drop(known.swap_remove(at % known.len())),
                Op::Fail(at) if !known.is_empty() => {
                    let at = at % known.len();
                    let failed = &mut known[at];
                    failed.failed = true;
                    failed.claim.failed();
                }
                _ => {}
            }
            prop_assert_eq!(claims.len(), known.len());
        }
        drop(known);
        prop_assert!(claims.is_empty());
        let all = [0, 2].map(|g| group(g, &[0, 1 << 20, 4090, 4095, 4096, 4101]));
        let last = request(99);
        let who = Claimant { request: &last, purpose: Purpose::Expect, from: None };
        prop_assert!(claims.claim(who, all.to_vec()).is_ok(), "all is free again");
    }
}

fn who<'a>(request: &'a RequestId, purpose: Purpose, from: Option<&'a PeerName>) -> Claimant<'a> {
    Claimant {
        request,
        purpose,
        from,
    }
}

#[test]
fn the_refusal_names_both() {
    let claims = Claims::new(POOLS.to_vec());
    let (a, b) = (request(1), request(2));
    let held = claims
        .claim(who(&a, Purpose::Expect, None), vec![group(0, &[5, 6])])
        .expect("free");
    let refused = claims
        .claim(who(&b, Purpose::Offer, None), vec![group(1, &[4, 6])])
        .expect_err("the pool's block 6 is being written");
    assert_eq!(
        refused.to_string(),
        "block 6 of cache group 1 is wanted for an offer of request r2, and is in an expectation of \
         request r1 until its memory is released"
    );
    drop(held);
    claims
        .claim(who(&b, Purpose::Offer, None), vec![group(1, &[4, 6])])
        .expect("free again");
}

#[test]
fn the_ranks_of_an_engine_share_the_blocks_of_one_request() {
    let claims = Claims::new(POOLS.to_vec());
    let r = request(1);
    let rank = |engine: &str, tp| PeerName {
        engine: EngineId::from(engine),
        rank: Rank { dp: 0, pp: 0, tp },
    };
    let pull = |from: &PeerName, blocks: &[u32]| {
        claims.claim(who(&r, Purpose::Pull, Some(from)), vec![group(0, blocks)])
    };
    let first = pull(&rank("p", 0), &[1, 2, 3]).expect("free");
    let second = pull(&rank("p", 1), &[3, 2, 1]).expect("its part of the same blocks");
    pull(&rank("p", 1), &[3]).expect_err("the same part twice");
    let more = pull(&rank("p", 1), &[4]).expect("another block of the same rank's");
    pull(&rank("q", 2), &[1]).expect_err("another engine");
    drop(first);
    pull(&rank("q", 2), &[1]).expect_err("the second has it still");
    second.failed();
    pull(&rank("p", 2), &[1]).expect_err("what the second has posted may land later");
    drop((second, more));
    pull(&rank("q", 2), &[1]).expect("free");
}
