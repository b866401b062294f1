//! What a kernel asks for.

use super::status::Status;
use crate::kernels::queue::{GET, LOCAL_PLACE, PUT, PUT_IMM, REMOTE_PLACE};

/// Words of eight bytes that a descriptor has.
pub const WORDS: u32 = 8;

/// A block by its names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    /// The cache group.
    pub group: u8,
    /// The layer's tensor.
    pub tensor: u8,
    /// The layer.
    pub layer: u16,
    /// The block.
    pub block: u32,
}

impl Place {
    /// As a descriptor has it (`KVX_PLACE` of `kernels/queue.h`).
    #[must_use]
    pub fn to_word(self) -> u64 {
        u64::from(self.group) << 56
            | u64::from(self.tensor) << 48
            | u64::from(self.layer) << 32
            | u64::from(self.block)
    }

    /// What a word names.
    #[must_use]
    pub fn from_word(word: u64) -> Self {
        let [group, tensor, high, low, a, b, c, d] = word.to_be_bytes();
        Self {
            group,
            tensor,
            layer: u16::from_be_bytes([high, low]),
            block: u32::from_be_bytes([a, b, c, d]),
        }
    }
}

/// One side of what is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Bytes from an address, under a key.
    Address {
        /// The address.
        addr: u64,
        /// The key.
        key: u32,
    },
    /// Bytes from where a block begins.
    Place(Place),
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PostOp {
    /// Bytes of this side into the peer's memory.
    Put,
    /// Bytes of the peer into this side's memory.
    Get,
    /// A put that completes a receive of the peer with this.
    PutImm(u32),
}

/// What a kernel has posted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Which post of its queue.
    pub ticket: u64,
    /// What is done.
    pub op: PostOp,
    /// This side.
    pub local: End,
    /// The peer's.
    pub remote: End,
    /// Bytes.
    pub len: u64,
}

/// Why words are no descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DescriptorFault {
    /// The words of another post: a poster told of them before they were there.
    #[error("post {wanted} has the words of post {found}")]
    Ticket {
        /// Which it should be.
        wanted: u64,
        /// Which it says it is.
        found: u64,
    },
    /// An operation that there is not.
    #[error("post {ticket}: operation {op}")]
    Op {
        /// Which post.
        ticket: u64,
        /// The number.
        op: u8,
    },
    /// Flags that there are not, or reserved bytes that are not 0.
    #[error("post {ticket}: flags {flags:#04x}, reserved bytes {reserved:#x}")]
    Reserved {
        /// Which post.
        ticket: u64,
        /// The flags.
        flags: u8,
        /// The reserved bytes, one over the other.
        reserved: u64,
    },
}

impl DescriptorFault {
    /// What the kernel is told.
    #[must_use]
    pub fn status(&self) -> Status {
        match self {
            Self::Op { .. } => Status::BadOp,
            Self::Ticket { .. } | Self::Reserved { .. } => Status::Malformed,
        }
    }
}

/// The phase of a ticket: the lap of the ring, counted from 1, in eight bits.
pub(super) fn phase(ticket: u64, depth: u32) -> u8 {
    // A lap's low eight bits.
    ((ticket >> depth.trailing_zeros()) as u8).wrapping_add(1)
}

/// The phase in a descriptor's last word.
pub(super) fn phase_of(last: u64) -> u8 {
    let [.., phase] = last.to_le_bytes();
    phase
}

impl Descriptor {
    /// What eight words say, of which the last has the right phase.
    ///
    /// # Errors
    ///
    /// [`DescriptorFault`].
    pub fn decode(words: [u64; WORDS as usize], ticket: u64) -> Result<Self, DescriptorFault> {
        let [local, remote, len, keys, found, reserved, imm, last] = words;
        if found != ticket {
            return Err(DescriptorFault::Ticket {
                wanted: ticket,
                found,
            });
        }
        let [op, flags, r0, r1, r2, r3, r4, _phase] = last.to_le_bytes();
        let (imm, reserved2) = (imm as u32, imm >> 32);
        let reserved = reserved | reserved2 | u64::from(r0 | r1 | r2 | r3 | r4);
        if reserved != 0 || u32::from(flags) & !(LOCAL_PLACE | REMOTE_PLACE) != 0 {
            return Err(DescriptorFault::Reserved {
                ticket,
                flags,
                reserved,
            });
        }
        let op = match u32::from(op) {
            PUT => PostOp::Put,
            GET => PostOp::Get,
            PUT_IMM => PostOp::PutImm(imm),
            _ => return Err(DescriptorFault::Op { ticket, op }),
        };
        let end = |word, key, place: u32| {
            if u32::from(flags) & place != 0 {
                End::Place(Place::from_word(word))
            } else {
                End::Address { addr: word, key }
            }
        };
        Ok(Self {
            ticket,
            op,
            // The local key is the lower half.
            local: end(local, keys as u32, LOCAL_PLACE),
            remote: end(remote, (keys >> 32) as u32, REMOTE_PLACE),
            len,
        })
    }

    /// Its words in a ring of this depth, as a kernel writes them.
    #[must_use]
    pub fn encode(&self, depth: u32) -> [u64; WORDS as usize] {
        let (op, imm) = match self.op {
            PostOp::Put => (PUT, 0),
            PostOp::Get => (GET, 0),
            PostOp::PutImm(imm) => (PUT_IMM, imm),
        };
        let end = |end: &End, flag| match end {
            End::Address { addr, key } => (*addr, *key, 0),
            End::Place(place) => (place.to_word(), 0, flag),
        };
        let (local, lkey, here) = end(&self.local, LOCAL_PLACE);
        let (remote, rkey, there) = end(&self.remote, REMOTE_PLACE);
        let last = u64::from(phase(self.ticket, depth)) << 56;
        let last = last | u64::from(here | there) << 8 | u64::from(op);
        let keys = u64::from(rkey) << 32 | u64::from(lkey);
        [
            local,
            remote,
            self.len,
            keys,
            self.ticket,
            0,
            imm.into(),
            last,
        ]
    }
}
