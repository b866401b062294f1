use proptest::prelude::*;

use super::*;
use crate::gpu_queue::refused;
use crate::layout::{KvFormat, KvPlacement, Packing, Side, Topology};
use crate::mem::kernels::queue::LinkRefused;
use crate::mem::post::{Place, Status};
use crate::plan::{Compiled, Part, PlanLimits, Role};

const BYTES: u64 = 64;
const LAYERS: u32 = 3;
const BLOCKS: u32 = 40;

fn ops() -> Arc<BlockOps> {
    let format = KvFormat::opaque(BYTES, LAYERS).expect("a format");
    let topology = Topology::single(&format);
    let uniform = KvPlacement::uniform(&format, topology, &[BLOCKS], Packing::OneMemory, 64);
    let placement = uniform.and_then(|u| u.describe(&format)).expect("it fits");
    let side = Side {
        format: &format,
        placement: &placement,
    };
    let plans = Compiled::compile(&side, &side, Role::Push, Part::Common);
    let limits = PlanLimits {
        max_msg_bytes: 1 << 20,
        max_sge: 4,
    };
    let ops = BlockOps::new(&plans.expect("they are the same"), limits);
    Arc::new(ops.expect("limits"))
}

fn table(expected: &[u32]) -> PostTable {
    let blocks = expected.to_vec();
    PostTable::new(&ops(), &[GroupBlocks { group: 0, blocks }], false)
}

fn put(here: Place, there: Place, len: u64) -> Descriptor {
    Descriptor {
        ticket: 0,
        op: PostOp::Put,
        local: End::Place(here),
        remote: End::Place(there),
        len,
    }
}

fn place(layer: u16, block: u32) -> Place {
    Place {
        group: 0,
        tensor: ALL_TENSORS,
        layer,
        block,
    }
}

#[test]
fn a_get_names_what_is_offered_and_what_the_pull_has() {
    let list = |blocks: &[u32]| {
        let blocks = blocks.to_vec();
        vec![GroupBlocks { group: 0, blocks }]
    };
    // A ticket may say anything.
    let table = PostTable::of_gets(&ops(), &list(&[7, 9, u32::MAX]), &list(&[3]));
    let get = |here, there| Descriptor {
        op: PostOp::Get,
        ..put(place(2, here), place(2, there), BYTES)
    };
    let wanted = table.check(&get(3, 9)).expect("both are there");
    assert_eq!(wanted.pair, BlockPair { src: 9, dst: 3 });
    for (here, there, fault) in [
        (3, 8, PostFault::NotOffered { group: 0, block: 8 }),
        (
            3,
            u32::MAX,
            PostFault::NotOffered {
                group: 0,
                block: u32::MAX,
            },
        ),
        (9, 7, PostFault::Destination { group: 0, block: 9 }),
    ] {
        assert_eq!(table.check(&get(here, there)), Err(fault));
        assert_eq!(fault.status(), Status::BadRights);
    }
    for op in [PostOp::Put, PostOp::PutImm(1)] {
        let other = Descriptor { op, ..get(3, 9) };
        assert_eq!(table.check(&other), Err(PostFault::Operation));
    }
}

/// What a device has noted may be anything.
#[test]
fn a_put_that_a_device_has_refused_is_named_as_far_as_it_can_be() {
    let put = LinkRefused {
        status: Status::BadRights.number().into(),
        local: place(2, 39).to_word(),
        remote: place(2, 9).to_word(),
        len: BYTES,
        flags: 3,
        op: 1,
    };
    let not_expected = PostFault::NotExpected { group: 0, block: 9 };
    for (put, fault) in [
        (put, not_expected),
        // Told before anything else was looked at.
        (
            LinkRefused {
                op: 2,
                len: 0,
                ..put
            },
            PostFault::Operation,
        ),
        (LinkRefused { op: 1 << 40, ..put }, PostFault::Operation),
        (LinkRefused { flags: 2, ..put }, PostFault::Address),
        (LinkRefused { remote: 0, ..put }, PostFault::Places),
        // Nothing that can be seen is wrong with it.
        (LinkRefused { status: 5, ..put }, PostFault::Malformed),
        (
            LinkRefused {
                status: u64::MAX,
                ..put
            },
            PostFault::Malformed,
        ),
    ] {
        assert_eq!(refused(&ops(), &put), fault, "{put:?}");
    }
}

#[test]
fn immediates_go_with_puts_where_they_can_be_told() {
    let imm = Descriptor {
        op: PostOp::PutImm(5),
        ..put(place(2, 39), place(2, 9), BYTES)
    };
    assert_eq!(table(&[9]).check(&imm), Err(PostFault::Immediate));
    let blocks = vec![9];
    let telling = PostTable::new(&ops(), &[GroupBlocks { group: 0, blocks }], true);
    let wanted = telling.check(&imm).expect("it can be told");
    assert_eq!(wanted.immediate, Some(5));
    let mut batches = Batches::new(telling.block_ops(), Together::All);
    batches.add(3, wanted);
    batches.add(
        4,
        Wanted {
            immediate: None,
            ..wanted
        },
    );
    let batch = batches.into_all().next().expect("one");
    assert_eq!((batch.posts, batch.immediates), (vec![3, 4], vec![(3, 5)]));
}

#[test]
fn posts_are_checked_and_their_faults_told_apart() {
    let table = table(&[7, 9]);
    let good = put(place(2, 39), place(2, 9), BYTES);
    let (layer, _) = table.of.find(0, 2).expect("a layer");
    assert_eq!(
        table.check(&good),
        Ok(Wanted {
            layer,
            pair: BlockPair { src: 39, dst: 9 },
            immediate: None,
        })
    );
    let of_tensor = |tensor, place: Place| Place { tensor, ..place };
    let of_group = |group, place: Place| Place { group, ..place };
    let (here, there) = (place(1, 3), place(1, 7));
    let address = End::Address { addr: 0, key: 0 };
    let cases = [
        (
            Descriptor {
                op: PostOp::Get,
                ..good
            },
            Status::BadOp,
        ),
        (
            Descriptor {
                op: PostOp::PutImm(0),
                ..good
            },
            Status::BadOp,
        ),
        (
            Descriptor {
                local: address,
                ..good
            },
            Status::BadKey,
        ),
        (
            Descriptor {
                remote: address,
                ..good
            },
            Status::BadKey,
        ),
        (put(here, place(2, 7), BYTES), Status::BadRange),
        (put(of_tensor(0, here), there, BYTES), Status::BadRange),
        (put(here, of_tensor(0, there), BYTES), Status::BadRange),
        (put(here, of_group(1, there), BYTES), Status::BadRange),
        (
            put(of_group(1, here), of_group(1, there), BYTES),
            Status::BadKey,
        ),
        (put(place(3, 3), place(3, 7), BYTES), Status::BadKey),
        (put(here, there, BYTES - 1), Status::BadLength),
        (put(here, there, BYTES + 1), Status::BadLength),
        (put(here, there, 0), Status::BadLength),
        (put(place(1, BLOCKS), there, BYTES), Status::BadRange),
        (put(here, place(1, 8), BYTES), Status::BadRights),
        (put(here, place(1, u32::MAX), BYTES), Status::BadRights),
    ];
    for (post, status) in cases {
        let fault = table.check(&post).expect_err("it is wrong");
        assert_eq!(fault.status(), status, "{post:?}: {fault}");
    }
}

proptest! {
    /// Every post is in one batch, in the order of its blocks. Where a consumer plans a batch it is of one layer and has
    /// no block twice, and a block that comes again is in a later one; otherwise all are in one.
    #[test]
    fn batches_hold_every_post_once(
        posts in prop::collection::vec((0..3_u16, 0..40_u32, 0..12_u32), 0..200),
        together in prop_oneof![Just(Together::All), Just(Together::ByLayer)],
    ) {
        let table = table(&[]);
        let mut batches = Batches::new(table.block_ops(), together);
        for (post, (layer, src, dst)) in (0..).zip(&posts) {
            let pair = BlockPair { src: *src, dst: *dst };
            let (layer, _) = table.of.find(0, (*layer).into()).expect("a layer");
            let immediate = None;
            batches.add(post, Wanted { layer, pair, immediate });
        }
        let mut seen = vec![false; posts.len()];
        let mut last: std::collections::HashMap<(u16, u32), u64> = Default::default();
        let batches: Vec<Batch> = batches.into_all().collect();
        if together == Together::All {
            prop_assert!(batches.len() <= 1);
        }
        for batch in &batches {
            let mut dsts = HashSet::new();
            let blocks: Vec<_> = batch.posted.blocks().collect();
            prop_assert_eq!(blocks.len(), batch.posts.len());
            for ((group, found, pair), post) in blocks.iter().zip(&batch.posts) {
                let (layer, src, dst) = posts[*post as usize];
                prop_assert_eq!((*group, *found), (0, layer.into()));
                prop_assert_eq!((pair.src, pair.dst), (src, dst));
                prop_assert!(!std::mem::replace(&mut seen[*post as usize], true));
                if together == Together::ByLayer {
                    prop_assert_eq!(*found, blocks[0].1, "one layer");
                    prop_assert!(dsts.insert(pair.dst), "a plan would refuse it");
                    if let Some(before) = last.insert((layer, dst), *post) {
                        prop_assert!(before < *post);
                    }
                }
            }
        }
        prop_assert!(seen.iter().all(|seen| *seen));
    }

    /// Whatever a descriptor says, what is taken is a block of this rank and one that is expected.
    #[test]
    fn nothing_outside_is_taken(
        here in any::<u64>(), there in any::<u64>(), len in prop_oneof![Just(BYTES), any::<u64>()],
        near in any::<bool>(),
    ) {
        let table = table(&[7, 9]);
        let bend = |word: u64| match near {
            true => place((word % 5) as u16, (word >> 32) as u32 % 50).to_word(),
            false => word,
        };
        let post = put(Place::from_word(bend(here)), Place::from_word(bend(there)), len);
        if let Ok(wanted) = table.check(&post) {
            prop_assert!(wanted.pair.src < BLOCKS && [7, 9].contains(&wanted.pair.dst));
            prop_assert!((0..LAYERS).any(|l| table.of.find(0, l).is_some_and(|of| of.0 == wanted.layer)));
            prop_assert_eq!(len, BYTES);
        }
    }
}
