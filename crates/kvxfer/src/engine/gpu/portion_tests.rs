//! Plans cut into portions, and carried out on bytes: whichever sides have buffers, what is copied is what the plan
//! says, each byte once and inside.

use proptest::collection::btree_set;
use proptest::prelude::*;

use super::portion::{Portion, packed};
use crate::blocks::{BlockPair, GroupPairs};
use crate::layout::{KvFormat, KvPlacement, Packing, PlacementDesc, Side, Topology};
use crate::plan::{Compiled, LayerScope, OpSource, Part, Plan, PlanLimits, Role};

const BLOCKS: u32 = 24;
/// The peer's memories, as plans number them; then its buffers, of which there is one here, behind something else.
const BEHIND: u64 = 4096;

#[derive(Debug, Clone)]
struct Case {
    block: u64,
    layers: u32,
    packing: Packing,
    pairs: Vec<(u32, u32)>,
    sge: u32,
    message: u64,
    room: u64,
    chunk: u32,
}

fn case() -> impl Strategy<Value = Case> {
    let blocks = || btree_set(0..BLOCKS, 1..BLOCKS as usize);
    let pairs = (blocks(), blocks()).prop_flat_map(|(src, dst)| {
        let src: Vec<u32> = src.into_iter().collect();
        let dst: Vec<u32> = dst.into_iter().collect();
        (Just(src).prop_shuffle(), Just(dst).prop_shuffle())
            .prop_map(|(src, dst)| src.into_iter().zip(dst).collect::<Vec<_>>())
    });
    let packing = prop_oneof![Just(Packing::OneMemory), Just(Packing::PerTensor)];
    (
        1_u64..700,
        1_u32..4,
        packing,
        pairs,
        1_u32..5,
        1_u64..3000,
        1_u64..3000,
        1_u32..900,
    )
        .prop_map(
            |(block, layers, packing, pairs, sge, message, more, chunk)| Case {
                block,
                layers,
                packing,
                pairs,
                sge,
                message,
                // As a session has it: no operation is larger than a buffer.
                room: message + more,
                chunk,
            },
        )
}

fn placement(format: &KvFormat, packing: Packing) -> PlacementDesc {
    let blocks = vec![BLOCKS; format.groups().len()];
    KvPlacement::uniform(format, Topology::single(format), &blocks, packing, 64)
        .and_then(|uniform| uniform.describe(format))
        .expect("valid")
}

fn memories(of: &PlacementDesc, fill: impl Fn(u64, u64) -> u8) -> Vec<Vec<u8>> {
    let lengths = (0..).zip(of.memory_len());
    lengths
        .map(|(memory, len)| (0..*len).map(|at| fill(memory, at)).collect())
        .collect()
}

/// Bytes that are written, and how often each was.
struct Target {
    bytes: Vec<Vec<u8>>,
    times: Vec<Vec<u8>>,
}

impl Target {
    fn new(of: &PlacementDesc) -> Self {
        Self {
            bytes: memories(of, |_, _| 0),
            times: memories(of, |_, _| 0),
        }
    }

    fn put(&mut self, (memory, offset): (u32, u64), from: &[u8]) {
        let (memory, offset) = (memory as usize, offset as usize);
        self.bytes[memory][offset..][..from.len()].copy_from_slice(from);
        for times in &mut self.times[memory][offset..][..from.len()] {
            *times += 1;
        }
    }
}

fn slice(of: &[u8], at: u64, len: u64) -> &[u8] {
    &of[at as usize..][..len as usize]
}

/// The plan as it is.
fn straight(plan: &Plan, remote: &[Vec<u8>], mut target: Target) -> Target {
    plan.emit(0..plan.ops(), &mut |op| {
        let mut at = op.remote_offset;
        for piece in op.local {
            let from = slice(&remote[op.remote_region as usize], at, piece.len.into());
            target.put((piece.region, piece.offset), from);
            at += u64::from(piece.len);
        }
    });
    target
}

/// The plan in portions: staged by the peer or not, into a buffer or not.
fn in_portions(
    (plan, case): (&Plan, &Case),
    remote: &[Vec<u8>],
    mut target: Target,
    (staged, buffered): (bool, bool),
) -> Target {
    let lengths: Vec<u64> = remote.iter().map(|memory| memory.len() as u64).collect();
    let (behind, before) = (remote.len() as u32, target.bytes.len() as u32);
    let mut at = 0;
    while at < plan.ops() {
        let (portion, next) = Portion::cut(plan, at, case.room);
        assert!(next > at && next <= plan.ops(), "{at} to {next}");
        at = next;
        assert!(portion.packed() <= case.room);
        // The peer's buffer, as it packs it by what it is told.
        let mut theirs = vec![0; (BEHIND + case.room) as usize];
        for packed in packed(&portion.wanted(1), &lengths, case.room).expect("it fits") {
            let of = packed.of;
            let from = slice(&remote[of.memory as usize], of.offset, of.len.into());
            theirs[(BEHIND + packed.at) as usize..][..from.len()].copy_from_slice(from);
        }
        let mut own = vec![0; (BEHIND + case.room) as usize];
        let from = staged.then_some((behind, BEHIND));
        let into = buffered.then_some((before, BEHIND));
        let reads = portion.reads(from, into, case.chunk);
        let mut bytes = 0;
        reads.emit(0..reads.ops(), &mut |op| {
            let source = match op.remote_region {
                region if region == behind => &theirs,
                region => &remote[region as usize],
            };
            let whole: u64 = op.local.iter().map(|piece| u64::from(piece.len)).sum();
            assert_eq!(whole, op.len);
            assert!(op.len <= u64::from(case.chunk) || !staged || !buffered);
            bytes += op.len;
            let mut at = op.remote_offset;
            for piece in op.local {
                let from = slice(source, at, piece.len.into());
                match piece.region {
                    region if region == before => {
                        own[piece.offset as usize..][..from.len()].copy_from_slice(from);
                    }
                    region => target.put((region, piece.offset), from),
                }
                at += u64::from(piece.len);
            }
        });
        assert_eq!(bytes, reads.bytes());
        if buffered {
            for packed in portion.unpacked() {
                let of = packed.of;
                let from = slice(&own, BEHIND + packed.at, of.len.into()).to_vec();
                target.put((of.memory, of.offset), &from);
            }
        }
    }
    target
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_plan_in_portions_copies_each_byte_once(case in case()) {
        let format = KvFormat::opaque(case.block, case.layers).expect("valid");
        // The two sides need not lie alike.
        let theirs = placement(&format, case.packing);
        let own = placement(&format, Packing::OneMemory);
        let side = |placement| Side { format: &format, placement };
        let compiled = Compiled::compile(&side(&theirs), &side(&own), Role::Pull, Part::Common);
        let pairs = case.pairs.iter().map(|&(src, dst)| BlockPair { src, dst });
        let request = [GroupPairs { group: 0, pairs: pairs.collect() }];
        let limits = PlanLimits { max_msg_bytes: case.message, max_sge: case.sge };
        let plan = compiled.expect("the same format");
        let plan = plan.plan(&request, LayerScope::All, limits).expect("valid");
        let remote = memories(&theirs, |memory, at| ((at + 77_777 * memory).wrapping_mul(0x9e37_79b9) >> 11) as u8);
        let wanted = straight(&plan, &remote, Target::new(&own));
        prop_assert!(wanted.times.iter().flatten().all(|times| *times <= 1));
        let copied: u64 = wanted.times.iter().flatten().map(|times| u64::from(*times)).sum();
        prop_assert_eq!(copied, plan.bytes());
        for sides in [(false, false), (false, true), (true, false), (true, true)] {
            let got = in_portions((&plan, &case), &remote, Target::new(&own), sides);
            prop_assert!(got.bytes == wanted.bytes, "{:?}", sides);
            prop_assert!(got.times == wanted.times, "{:?}", sides);
        }
    }
}
