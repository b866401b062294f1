//! No block is in two things that do not go together, and it is free as soon as the last is over.

use kvxfer::blocks::GroupBlocks;
use kvxfer::claims::{Claim, Claimant, Claims, Purpose};
use kvxfer::ids::RequestId;
use proptest::prelude::*;

use crate::{group, request};

/// Groups 0 and 1 share a pool, 2 has its own, and of 3 this rank keeps nothing.
const POOLS: [Option<u32>; 4] = [Some(7), Some(7), Some(1), None];

#[derive(Debug, Clone)]
enum Op {
    Claim {
        request: u8,
        purpose: Purpose,
        groups: Vec<GroupBlocks>,
    },
    Drop(usize),
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
    let claim = (0..3u8, purpose, lists).prop_map(|(request, purpose, lists)| Op::Claim {
        request,
        purpose,
        groups: (0..).zip(&lists).map(|(g, list)| group(g, list)).collect(),
    });
    prop_oneof![6 => claim, 4 => any::<usize>().prop_map(Op::Drop)]
}

/// A claim as the naive model knows it.
struct Known {
    _claim: Claim,
    request: RequestId,
    purpose: Purpose,
    groups: Vec<GroupBlocks>,
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
}

fn naive(known: &[Known], who: &Claimant<'_>, groups: &[GroupBlocks]) -> bool {
    let free = |g: &GroupBlocks, block: &u32| {
        let pool = POOLS[g.group as usize];
        let others = known
            .iter()
            .filter(|k| k.has(pool, *block))
            .all(|k| !writes(k.purpose) && !writes(who.purpose));
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
                Op::Claim { request: r, purpose, groups } => {
                    let request = request(r);
                    let who = Claimant { request: &request, purpose };
                    let allowed = naive(&known, &who, &groups);
                    match claims.claim(who, groups.clone()) {
                        Ok(claim) => {
                            prop_assert!(allowed, "{purpose} of {request} got what it may not have");
                            known.push(Known { _claim: claim, request, purpose, groups });
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
                _ => {}
            }
            prop_assert_eq!(claims.len(), known.len());
        }
        drop(known);
        prop_assert!(claims.is_empty());
        let all = [0, 2].map(|g| group(g, &[0, 1 << 20, 4090, 4095, 4096, 4101]));
        let last = request(99);
        let who = Claimant { request: &last, purpose: Purpose::Expect };
        prop_assert!(claims.claim(who, all.to_vec()).is_ok(), "all is free again");
    }
}

fn who(request: &RequestId, purpose: Purpose) -> Claimant<'_> {
    Claimant { request, purpose }
}

#[test]
fn the_refusal_names_both() {
    let claims = Claims::new(POOLS.to_vec());
    let (a, b) = (request(1), request(2));
    let held = claims
        .claim(who(&a, Purpose::Expect), vec![group(0, &[5, 6])])
        .expect("free");
    let refused = claims
        .claim(who(&b, Purpose::Offer), vec![group(1, &[4, 6])])
        .expect_err("the pool's block 6 is being written");
    assert_eq!(
        refused.to_string(),
        "block 6 of cache group 1 is wanted for an offer of request r2, and is in an expectation of \
         request r1 until its memory is released"
    );
    drop(held);
    claims
        .claim(who(&b, Purpose::Offer), vec![group(1, &[4, 6])])
        .expect("free again");
}
