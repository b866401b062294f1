//! The mirror of `kernels/queue.h`: queues that kernels post to.

use super::args::{Plain, bytes_of};

/// [`Queue::kind`]: descriptors, which the host carries out.
pub const PROXY: u32 = 1;
/// [`Queue::kind`]: WQEs; [`Queue::bell`] is a word that the host copies to the doorbell.
pub const GPU_WQE: u32 = 2;
/// [`Queue::kind`]: WQEs; [`Queue::bell`] is the doorbell.
pub const DIRECT: u32 = 3;
/// [`Queue::kind`]: nothing is handed over; who puts copies the block, to where [`Queue::regions`] says.
pub const LINKS: u32 = 4;

/// A note of a block: it is being put, or a put was stopped in the middle.
pub const NOTE_BEGUN: u32 = 1;
/// It was put: and the number of the block here, added. What is less than [`NOTE_BEGUN`] was not.
pub const NOTE_PUT: u32 = 2;

/// [`Move::flags`]: the local address is a place.
pub const LOCAL_PLACE: u32 = 1;
/// [`Move::flags`]: the remote address is a place.
pub const REMOTE_PLACE: u32 = 2;

/// The tensor of a place that stands for all of its layer.
pub const ALL_TENSORS: u8 = 0xff;

/// [`PostArgs::op`]: bytes of this side into the peer's memory.
pub const PUT: u32 = 1;
/// [`PostArgs::op`]: bytes of the peer into this side's memory.
pub const GET: u32 = 2;
/// [`PostArgs::op`]: a put that completes a receive of the peer.
pub const PUT_IMM: u32 = 3;

/// [`PostArgs::until`]: nothing is waited for.
pub const POSTED: u32 = 0;
/// [`PostArgs::until`]: each post is waited for before the next one.
pub const EACH: u32 = 1;
/// [`PostArgs::until`]: each post is waited for when all have been posted.
pub const ALL: u32 = 2;
/// [`PostArgs::until`]: when all have been posted, nothing of the queue may be under way.
pub const IDLE: u32 = 3;

/// The most WQEs of a post: pieces of a block.
pub const MOST_PIECES: u32 = 256;

/// The number that a post's ticket has: of WQEs that of the last one. The high 8 bits say how many there are beside it.
#[must_use]
pub const fn ticket_number(ticket: u64) -> u64 {
    ticket & ((1 << 56) - 1)
}

/// What is moved between here and the peer.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Move {
    /// Address, or a place.
    pub local: u64,
    /// Address, or a place.
    pub remote: u64,
    /// Bytes.
    pub len: u64,
    /// This side's key.
    pub lkey: u32,
    /// The peer's key.
    pub rkey: u32,
    /// What the peer's receive is completed with, of [`PUT_IMM`].
    pub imm: u32,
    /// [`LOCAL_PLACE`], [`REMOTE_PLACE`].
    pub flags: u32,
}

/// A descriptor of the proxy ring, for its layout: it is read word by word
/// ([`Descriptor`](crate::post::Descriptor)).
#[cfg(test)]
#[repr(C)]
struct Desc {
    local: u64,
    remote: u64,
    len: u64,
    lkey: u32,
    rkey: u32,
    ticket: u64,
    reserved: u64,
    imm: u32,
    reserved2: u32,
    op: u8,
    flags: u8,
    reserved3: [u8; 5],
    phase: u8,
}

/// What posters have among themselves, in memory of the device that runs them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueState {
    /// The ticket that the next post gets.
    pub next: u64,
    /// Tickets below have ended well, so far as a poster has looked.
    pub seen: u64,
    /// Not 0: some operation has failed.
    pub broken: u64,
    /// Of WQEs: tickets below have been told to the device.
    pub rung: u64,
    /// Of WQEs: completions that have been read.
    pub taken: u64,
    /// Of WQEs: not 0 while somebody reads completions.
    pub polling: u64,
}

impl QueueState {
    /// The state of a queue whose first ticket is this one, and whose first completion has this number.
    #[must_use]
    pub fn starting_at(first: u64) -> Self {
        Self {
            next: first,
            seen: first,
            rung: first,
            taken: first,
            ..Self::default()
        }
    }

    /// Its bytes, as they lie in memory.
    #[must_use]
    pub fn bytes(&self) -> [u8; 48] {
        let fields = [
            self.next,
            self.seen,
            self.broken,
            self.rung,
            self.taken,
            self.polling,
        ];
        let mut bytes = [0; 48];
        for (to, field) in bytes.as_chunks_mut().0.iter_mut().zip(fields) {
            *to = field.to_ne_bytes();
        }
        bytes
    }
}

/// What is told of the end of operations.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueReport {
    /// Tickets below have ended, well or not; stored after `fault`.
    pub ended: u64,
    /// The first failure that was found: (ticket + 1) << 8 | status; 0: none.
    pub fault: u64,
}

/// The first put over links of a push that was refused.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinkRefused {
    /// What it was told; 0: none was.
    pub status: u64,
    /// [`Move::local`].
    pub local: u64,
    /// [`Move::remote`].
    pub remote: u64,
    /// [`Move::len`].
    pub len: u64,
    /// [`Move::flags`].
    pub flags: u64,
    /// [`PUT`], [`GET`] or [`PUT_IMM`].
    pub op: u64,
}

impl LinkRefused {
    /// What lies in memory.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 48]) -> Self {
        let mut words = bytes
            .as_chunks()
            .0
            .iter()
            .map(|word| u64::from_ne_bytes(*word));
        let mut next = || words.next().unwrap_or_default();
        Self {
            status: next(),
            local: next(),
            remote: next(),
            len: next(),
            flags: next(),
            op: next(),
        }
    }
}

/// A queue, as it is given to a kernel: a copy for whoever posts to it. Addresses are the device's.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Queue {
    /// Descriptors in pinned memory, or the device's WQEs; 64 bytes each. Of [`LINKS`], of a push: notes of the blocks
    /// that the peer expects ([`NOTE_PUT`]), `u32` for each of each layer.
    pub slots: u64,
    /// Of [`PROXY`]: `u64[depth]` in pinned memory, (ticket + 1) << 8 | status. Of WQEs: `u64[depth]` in the device's
    /// memory, by which posters ring for each other: at first 0. Of [`LINKS`], of a push: a `u32` for each of a group's
    /// blocks at the peer, 1 and its place among those that the peer expects, or 0.
    pub words: u64,
    /// A [`QueueState`].
    pub state: u64,
    /// A [`QueueReport`]: in pinned memory for [`PROXY`], otherwise beside the state. Of [`LINKS`], of a push: a
    /// [`LinkRefused`].
    pub report: u64,
    /// A 32-bit word in the device's memory: not 0 ends every wait.
    pub abort: u64,
    /// Ticks of the device's steady clock that a call waits at most.
    pub patience: u64,
    /// Of WQEs: the completion queue, 64 bytes each.
    pub completions: u64,
    /// Of WQEs: the send queue's word of the doorbell record.
    pub record: u64,
    /// Of WQEs: the completion queue's word.
    pub cq_record: u64,
    /// Of WQEs: eight bytes, the doorbell or a word in its place.
    pub bell: u64,
    /// A [`Regions`](super::regions::Regions) for places, but of [`PROXY`]; 0: WQEs by addresses alone.
    pub regions: u64,
    /// [`PROXY`], [`GPU_WQE`], [`DIRECT`] or [`LINKS`].
    pub kind: u32,
    /// Slots: a power of two.
    pub depth: u32,
    /// Of WQEs: entries of the completion queue, a power of two and at least `depth`.
    pub cq_depth: u32,
    /// Of WQEs: the queue pair's number.
    pub qpn: u32,
}

/// The argument of the kernels that post in numbers ([`KVX_POST_THREADS`](super::KVX_POST_THREADS)). Poster `p` makes
/// the posts from `p * count`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PostArgs {
    /// Where to.
    pub queue: Queue,
    /// `Move[posters * count]`.
    pub moves: u64,
    /// `PostResult[posters * count]`.
    pub results: u64,
    /// Posts of each poster.
    pub count: u32,
    /// Posters: threads, waves or workgroups, whatever posts as one.
    pub posters: u32,
    /// [`PUT`], [`GET`] or [`PUT_IMM`].
    pub op: u32,
    /// [`POSTED`], [`EACH`], [`ALL`] or [`IDLE`].
    pub until: u32,
}

impl PostArgs {
    /// Its bytes, as a kernel takes them.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        bytes_of(std::slice::from_ref(self))
    }
}

impl Move {
    /// The bytes of moves, as they lie in memory.
    #[must_use]
    pub fn bytes(of: &[Self]) -> &[u8] {
        bytes_of(of)
    }
}

/// What became of a post.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PostResult {
    /// Its ticket, as a wait takes it; [`ticket_number`] is where it was posted.
    pub ticket: u64,
    /// What the post said.
    pub posted: u32,
    /// What the wait said; as `posted` where none was wanted, and late where one before it was.
    pub ended: u32,
}

/// A tensor that [`KVX_PRODUCE`](super::KVX_PRODUCE) makes blocks of. Address, stride and bytes are multiples of 8.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Produced {
    /// Where block 0 begins.
    pub addr: u64,
    /// Bytes from one block to the next.
    pub stride: u64,
    /// Bytes of a block.
    pub bytes: u64,
    /// What its words are made of: `kernels/queue.h` says how.
    pub salt: u64,
}

/// A layer that it makes and pushes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProducedLayer {
    /// The place of block 0, on both sides.
    pub place: u64,
    /// Bytes of a put.
    pub len: u64,
    /// The first of its tensors.
    pub first: u32,
    /// The end of them.
    pub end: u32,
}

/// The argument of [`KVX_PRODUCE`](super::KVX_PRODUCE).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProduceArgs {
    /// Where to.
    pub queue: Queue,
    /// `Produced[]`.
    pub tensors: u64,
    /// `ProducedLayer[layers_len]`.
    pub layers: u64,
    /// `Pair[pairs_len]`.
    pub pairs: u64,
    /// `PostResult[layers_len * pairs_len]`, layer by layer.
    pub results: u64,
    /// Layers.
    pub layers_len: u32,
    /// Pairs of blocks.
    pub pairs_len: u32,
}

impl PostResult {
    /// What lies in memory.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 16]) -> Self {
        let [ticket, ends] = *bytes.as_chunks::<8>().0 else {
            return Self::default();
        };
        let [posted, ended] = *ends.as_chunks::<4>().0 else {
            return Self::default();
        };
        Self {
            ticket: u64::from_ne_bytes(ticket),
            posted: u32::from_ne_bytes(posted),
            ended: u32::from_ne_bytes(ended),
        }
    }
}

macro_rules! plain {
    ($($type:ident)*) => {
        $(
            // SAFETY: the sizes in `layout` and its test are those of the fields together.
            unsafe impl Plain for $type {}
        )*
    };
}

plain! { Move Queue PostArgs Produced ProducedLayer ProduceArgs }

/// Every size and offset, in the order of `kvx_layout` in `kernels/kvx.hip`.
#[cfg(test)]
pub(super) fn layout() -> Vec<usize> {
    use std::mem::{offset_of, size_of};
    macro_rules! of {
        ($($type:ident { $($field:ident),* })*) => {
            vec![$(size_of::<$type>(), $(offset_of!($type, $field)),*),*]
        };
    }
    of! {
        Move { local, remote, len, lkey, rkey, imm, flags }
        Desc {
            local, remote, len, lkey, rkey, ticket, reserved, imm, reserved2, op, flags,
            reserved3, phase
        }
        QueueState { next, seen, broken, rung, taken, polling }
        QueueReport { ended, fault }
        LinkRefused { status, local, remote, len, flags, op }
        Queue {
            slots, words, state, report, abort, patience, completions, record, cq_record, bell,
            regions, kind, depth, cq_depth, qpn
        }
        PostArgs { queue, moves, results, count, posters, op, until }
        PostResult { ticket, posted, ended }
        Produced { addr, stride, bytes, salt }
        ProducedLayer { place, len, first, end }
        ProduceArgs { queue, tensors, layers, pairs, results, layers_len, pairs_len }
    }
}

#[cfg(test)]
mod tests {
    use super::{QueueState, layout};

    #[test]
    fn sizes_and_offsets_are_those_of_the_header() {
        // The static_asserts of kernels/queue.h have the same numbers.
        let wanted = [
            40, 0, 8, 16, 24, 28, 32, 36, // Move
            64, 0, 8, 16, 24, 28, 32, 40, 48, 52, 56, 57, 58, 63, // Desc
            48, 0, 8, 16, 24, 32, 40, // QueueState
            16, 0, 8, // QueueReport
            48, 0, 8, 16, 24, 32, 40, // LinkRefused
            104, 0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 92, 96, 100, // Queue
            136, 0, 104, 112, 120, 124, 128, 132, // PostArgs
            16, 0, 8, 12, // PostResult
            32, 0, 8, 16, 24, // Produced
            24, 0, 8, 16, 20, // ProducedLayer
            144, 0, 104, 112, 120, 128, 136, 140, // ProduceArgs
        ];
        assert_eq!(layout(), wanted);
    }

    #[test]
    fn a_state_is_its_bytes() {
        let state = QueueState::starting_at(0x0102_0304_0506_0708);
        let bytes = state.bytes();
        for (at, value) in [(0, state.next), (8, state.seen), (16, 0), (24, state.rung)] {
            assert_eq!(bytes[at..at + 8], value.to_ne_bytes());
        }
        assert_eq!(size_of::<QueueState>(), bytes.len());
    }
}
