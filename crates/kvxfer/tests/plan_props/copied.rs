//! A plan carried out on bytes that remember where they came from.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::case::{At, Case};
use crate::tape::Tape;
use kvxfer::plan::{OpSource, Plan, Role};

/// The range cut into batches, as workers would claim them, in any order.
pub(crate) fn batches(tape: &mut Tape, ops: u64) -> Vec<Range<u64>> {
    let mut out = Vec::new();
    let mut at = 0;
    while at < ops {
        let end = (at + 1 + tape.below(7)).min(ops);
        out.push(at..end);
        at = end;
    }
    tape.shuffle(&mut out);
    out
}

/// Bytes of memory with how often each was written.
pub(crate) struct Copied {
    /// For each destination byte written: the source byte it came from, and how often.
    pub(crate) bytes: BTreeMap<At, (At, u32)>,
    pub(crate) ops: u64,
}

impl Copied {
    pub(crate) fn new() -> Self {
        Self {
            bytes: BTreeMap::new(),
            ops: 0,
        }
    }

    /// Runs a plan, checking each operation against limits and memories.
    pub(crate) fn run(&mut self, case: &Case, plan: &Plan, tape: &mut Tape) {
        let (remote_len, local_len) = match case.role {
            Role::Pull => (
                case.memory_len(&case.producer),
                case.memory_len(&case.consumer),
            ),
            Role::Push => (
                case.memory_len(&case.consumer),
                case.memory_len(&case.producer),
            ),
        };
        let expected = case.expected();
        for batch in batches(tape, plan.ops()) {
            let wanted = batch.end - batch.start;
            let mut emitted = 0;
            plan.emit(batch.clone(), &mut |op| {
                let index = batch.start + emitted;
                emitted += 1;
                let len: u64 = op.local.iter().map(|p| u64::from(p.len)).sum();
                assert_eq!(len, op.len);
                assert!(op.len > 0 && op.len <= case.limits.max_msg_bytes);
                assert!(op.local.len() <= case.limits.max_sge as usize);
                let remote = op.remote_region as usize;
                assert!(op.remote_offset + op.len <= remote_len[remote] as u64);
                let mut remote_at = op.remote_offset;
                let mut blocks = BTreeSet::new();
                for piece in op.local {
                    let local = piece.region as usize;
                    assert!(piece.len > 0);
                    assert!(piece.offset + u64::from(piece.len) <= local_len[local] as u64);
                    for i in 0..u64::from(piece.len) {
                        let here = (local, piece.offset + i);
                        let there = (remote, remote_at + i);
                        let (src, dst) = match case.role {
                            Role::Pull => (there, here),
                            Role::Push => (here, there),
                        };
                        let (_, owner) = expected.get(&dst).expect("a byte nobody asked for");
                        blocks.insert(*owner);
                        self.bytes.entry(dst).or_insert((src, 0)).1 += 1;
                    }
                    remote_at += u64::from(piece.len);
                }
                let mut named = Vec::new();
                plan.blocks_of(index, &mut named);
                assert_eq!(named.len(), blocks.len());
                assert_eq!(named.into_iter().collect::<BTreeSet<_>>(), blocks);
            });
            assert_eq!(emitted, wanted);
            self.ops += emitted;
        }
    }

    /// Every byte once and from the right place.
    pub(crate) fn check(&self, case: &Case) {
        let expected = case.expected();
        assert_eq!(self.bytes.len(), expected.len());
        for (dst, (src, _)) in expected {
            assert_eq!(self.bytes.get(&dst), Some(&(src, 1)), "destination {dst:?}");
        }
    }
}
