//! What goes through a buffer of pinned memory at once: a part of a plan, packed, and the reads that carry it.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{GpuSide, Packed, Slots};
use crate::layout::PlacementDesc;
use crate::leases::SLOT_BYTES;
use crate::plan::{Op, OpList, OpSource, Piece, Plan};
use crate::wire::{GpuDesc, Stage, Staged, Stretch, limits};

/// What a session may have staged, or asked for, at a time.
pub(crate) const MOST_STAGED: u32 = 64;

/// A peer whose blocks, or this rank's for it, go through pinned memory.
#[derive(Debug)]
pub(crate) struct StagedPeer {
    /// The most bytes of a portion.
    pub(crate) piece: u64,
    /// Whether the peer has to stage what is read; and its staging memory, as plans number the peer's memories.
    pub(crate) from_gpu: bool,
    pub(crate) region: u32,
    /// What has been asked for and is not given back.
    open: AtomicU32,
}

impl StagedPeer {
    pub(crate) fn new(
        own: Option<&GpuSide>,
        theirs: Option<&GpuDesc>,
        placement: &PlacementDesc,
    ) -> Self {
        // What devices have registered needs no buffers.
        let own = own.and_then(|gpu| gpu.staging().ok());
        let theirs = theirs.filter(|gpu| gpu.unregistered.is_some());
        let pieces = [
            own.map(|staging| staging.piece_bytes()),
            theirs.map(|gpu| gpu.staged),
        ];
        let memories = placement.memory_len().len();
        Self {
            piece: pieces.into_iter().flatten().min().unwrap_or(u64::MAX),
            from_gpu: theirs.is_some(),
            region: u32::try_from(memories).unwrap_or(u32::MAX),
            open: AtomicU32::new(0),
        }
    }

    /// One more is asked for; false: not now.
    pub(crate) fn open(&self) -> bool {
        let more = |open| Some(open + 1).filter(|open| *open <= MOST_STAGED);
        let open = self
            .open
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        open.is_ok()
    }

    /// One less.
    pub(crate) fn close(&self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug, Clone)]
struct Part {
    memory: u32,
    offset: u64,
    len: u32,
    /// In the buffer.
    at: u64,
    /// In `Portion::local`.
    local: Range<usize>,
}

/// Operations of a plan that fit into a buffer.
#[derive(Debug)]
pub(crate) struct Portion {
    parts: Vec<Part>,
    local: Vec<Piece>,
    /// Bytes of the buffer that it takes.
    packed: u64,
}

impl Portion {
    /// The operations from `from` on that fit into `room` bytes; and the one after them. None fits where one alone
    /// is larger.
    pub(crate) fn cut(plan: &Plan, from: u64, room: u64) -> (Self, u64) {
        let mut list = OpList::default();
        list.begin(limits::STRETCHES, room);
        // What lies behind is not asked for: plans have many more.
        let most = from.saturating_add(limits::STRETCHES as u64);
        plan.list(from..plan.ops().min(most), &mut list);
        let mut portion = Self {
            parts: Vec::with_capacity(list.len()),
            local: Vec::with_capacity(list.len()),
            packed: 0,
        };
        let mut next = from;
        for op in list.iter() {
            let at = portion.packed.next_multiple_of(Stage::GRAIN);
            let Some(len) = u32::try_from(op.len).ok().filter(|_| at + op.len <= room) else {
                break;
            };
            let first = portion.local.len();
            portion.local.extend_from_slice(op.local);
            portion.parts.push(Part {
                memory: op.remote_region,
                offset: op.remote_offset,
                len,
                at,
                local: first..portion.local.len(),
            });
            portion.packed = at + op.len;
            next += 1;
        }
        (portion, next)
    }

    /// What the peer is to stage.
    pub(crate) fn wanted(&self, number: u64) -> Stage {
        let stretches = self.parts.iter().map(|part| Stretch {
            memory: part.memory,
            len: part.len,
            offset: part.offset,
        });
        let of = Stretch::pack(stretches);
        Stage { number, of }
    }

    /// Where what is in this side's buffer belongs.
    pub(crate) fn unpacked(&self) -> Vec<Packed> {
        let mut all = Vec::with_capacity(self.local.len());
        for part in &self.parts {
            let mut at = part.at;
            for piece in self.local.get(part.local.clone()).unwrap_or_default() {
                all.push(Packed {
                    at,
                    of: Stretch {
                        memory: piece.region,
                        len: piece.len,
                        offset: piece.offset,
                    },
                });
                at += u64::from(piece.len);
            }
        }
        all
    }

    /// Bytes of the buffer that it takes.
    pub(crate) fn packed(&self) -> u64 {
        self.packed
    }

    /// The reads that bring it: out of the peer's buffer, if it has been staged there (in that memory, from that
    /// byte on), or out of its memories; and into this side's buffer, or into its memories. Of a buffer into
    /// another they are no longer than `chunk`.
    pub(crate) fn reads(
        &self,
        staged: Option<(u32, u64)>,
        into: Option<(u32, u64)>,
        chunk: u32,
    ) -> Reads {
        let mut reads = Reads::default();
        if let (Some((from, offset)), Some((region, to))) = (staged, into) {
            let mut at = 0;
            while at < self.packed {
                let len = u32::try_from(self.packed - at)
                    .unwrap_or(u32::MAX)
                    .min(chunk);
                let offset = to + at;
                reads.add(
                    (from, at),
                    len,
                    &[Piece {
                        region,
                        len,
                        offset,
                    }],
                );
                at += u64::from(len);
            }
            reads.shift(offset);
            return reads;
        }
        for part in &self.parts {
            let remote = match staged {
                Some((region, offset)) => (region, offset + part.at),
                None => (part.memory, part.offset),
            };
            let local = self.local.get(part.local.clone()).unwrap_or_default();
            match into {
                None => reads.add(remote, part.len, local),
                Some((region, to)) => {
                    let (len, offset) = (part.len, to + part.at);
                    reads.add(
                        remote,
                        part.len,
                        &[Piece {
                            region,
                            len,
                            offset,
                        }],
                    );
                }
            }
        }
        reads
    }
}

/// Reads, as the scheduler takes operations.
#[derive(Debug, Default)]
pub(crate) struct Reads {
    ops: Vec<Read>,
    local: Vec<Piece>,
    bytes: u64,
}

#[derive(Debug)]
struct Read {
    remote: (u32, u64),
    len: u32,
    local: Range<usize>,
}

impl Reads {
    /// The stamp of a peer's buffer, into a landing slot.
    pub(crate) fn of_stamp(memory: u32, staged: &Staged, (region, slot): (u32, u32)) -> Self {
        let len = SLOT_BYTES as u32;
        let offset = u64::from(slot) * SLOT_BYTES as u64;
        let mut reads = Self::default();
        let local = Piece {
            region,
            len,
            offset,
        };
        reads.add((memory, staged.stamp), len, &[local]);
        reads
    }

    fn add(&mut self, remote: (u32, u64), len: u32, local: &[Piece]) {
        let first = self.local.len();
        self.local.extend_from_slice(local);
        self.bytes += u64::from(len);
        self.ops.push(Read {
            remote,
            len,
            local: first..self.local.len(),
        });
    }

    fn shift(&mut self, by: u64) {
        for op in &mut self.ops {
            op.remote.1 += by;
        }
    }
}

impl OpSource for Reads {
    fn ops(&self) -> u64 {
        self.ops.len() as u64
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn emit(&self, range: Range<u64>, sink: &mut dyn FnMut(&Op<'_>)) {
        let index = |at: u64| {
            usize::try_from(at)
                .unwrap_or(usize::MAX)
                .min(self.ops.len())
        };
        let ops = self.ops.get(index(range.start)..index(range.end));
        for op in ops.unwrap_or_default() {
            sink(&Op {
                remote_region: op.remote.0,
                remote_offset: op.remote.1,
                len: u64::from(op.len),
                local: self.local.get(op.local.clone()).unwrap_or_default(),
            });
        }
    }

    fn blocks_of(&self, _op: u64, _out: &mut Vec<(u32, u32)>) {}
}

/// What a peer asks for: where each stretch goes in a buffer; or what is wrong with it.
pub(crate) fn packed(stage: &Stage, lengths: &[u64], room: u64) -> Result<Vec<Packed>, String> {
    let mut end = 0_u64;
    let mut all = Vec::with_capacity(stage.of.len() / 16);
    for of in Stretch::unpack(&stage.of) {
        let len = u64::from(of.len);
        let memory = usize::try_from(of.memory).ok();
        let there = memory.and_then(|at| lengths.get(at));
        let inside = |there: &&u64| of.offset.checked_add(len).is_some_and(|end| end <= **there);
        if there.filter(inside).is_none() {
            let Stretch { memory, offset, .. } = of;
            return Err(format!(
                "{len} bytes from {offset} of memory {memory} staged"
            ));
        }
        // No more than a few thousand of 32 bits.
        let at = end.next_multiple_of(Stage::GRAIN);
        end = at + len;
        all.push(Packed { at, of });
    }
    match end <= room {
        true => Ok(all),
        false => Err(format!("{end} bytes staged at a time, of {room}")),
    }
}

/// Where a buffer, and its stamp, are told to be.
pub(crate) fn told(number: u64, slots: &Slots, slot: u32, word: u64) -> Staged {
    Staged {
        number,
        offset: slots.at(slot),
        stamp: Slots::stamp_at(slot),
        word,
        failed: None,
    }
}
