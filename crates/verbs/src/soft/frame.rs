//! The bytes between a requester half and the responder half that serves it: fixed sizes, little
//! endian, decoded field by field.

use std::fmt;

use crate::wr::Op;

pub(crate) const HEADER: usize = 16;
pub(crate) const DESC: usize = 32;
pub(crate) const PIECE: usize = 16;
/// Operations of one batch.
pub(crate) const MAX_OPS: usize = 256;
/// Source pieces of one batch.
pub(crate) const MAX_PIECES: usize = 1024;
/// The longest batch header with its descriptors.
pub(crate) const MAX_BATCH: usize = HEADER + MAX_OPS * DESC + MAX_PIECES * PIECE;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Requester: the descriptor that comes with it is source segment `m`.
    Segment = 1,
    /// Requester: `n` descriptors and `m` pieces follow; `v` is the first one's number.
    Batch = 2,
    /// Requester: asks for segment `m`.
    Map = 3,
    /// Responder: everything before number `v` is done.
    Ack = 4,
    /// Responder: number `v` failed with status `flag` and vendor error `m`.
    Nak = 5,
    /// Responder: `m` bytes of the oldest unfilled READs follow.
    Data = 6,
    /// Responder: segment `m`; with its descriptor if `n` is 1, refused if 0.
    Mapped = 7,
    /// Responder: this queue pair is in ERR or gone.
    Bye = 8,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) flag: u8,
    pub(crate) n: u16,
    pub(crate) m: u32,
    pub(crate) v: u64,
}

fn u16_at(b: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(b.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(b: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(b.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(b: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(b.get(at..at + 8)?.try_into().ok()?))
}

fn id_at(b: &[u8], at: usize) -> Option<[u8; 16]> {
    b.get(at..at + 16)?.try_into().ok()
}

impl Header {
    pub(crate) fn new(kind: Kind) -> Self {
        Self {
            kind,
            flag: 0,
            n: 0,
            m: 0,
            v: 0,
        }
    }

    pub(crate) fn encode(&self) -> [u8; HEADER] {
        let mut b = [0; HEADER];
        b[0] = self.kind as u8;
        b[1] = self.flag;
        b[2..4].copy_from_slice(&self.n.to_le_bytes());
        b[4..8].copy_from_slice(&self.m.to_le_bytes());
        b[8..].copy_from_slice(&self.v.to_le_bytes());
        b
    }

    /// `None` for a kind that does not exist or too few bytes.
    pub(crate) fn decode(b: &[u8]) -> Option<Self> {
        let kind = match *b.first()? {
            1 => Kind::Segment,
            2 => Kind::Batch,
            3 => Kind::Map,
            4 => Kind::Ack,
            5 => Kind::Nak,
            6 => Kind::Data,
            7 => Kind::Mapped,
            8 => Kind::Bye,
            _ => return None,
        };
        let flag = *b.get(1)?;
        Some(Self {
            kind,
            flag,
            n: u16_at(b, 2)?,
            m: u32_at(b, 4)?,
            v: u64_at(b, 8)?,
        })
    }
}

/// One operation of a batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Desc {
    pub(crate) addr: u64,
    pub(crate) len: u64,
    pub(crate) rkey: u32,
    pub(crate) imm: u32,
    pub(crate) op: Op,
    /// Source pieces, in the batch's list; 0 over TCP.
    pub(crate) pieces: u16,
}

impl Desc {
    pub(crate) fn encode(&self) -> [u8; DESC] {
        let mut b = [0; DESC];
        b[0..8].copy_from_slice(&self.addr.to_le_bytes());
        b[8..16].copy_from_slice(&self.len.to_le_bytes());
        b[16..20].copy_from_slice(&self.rkey.to_le_bytes());
        b[20..24].copy_from_slice(&self.imm.to_le_bytes());
        b[24] = self.op as u8;
        b[26..28].copy_from_slice(&self.pieces.to_le_bytes());
        b
    }

    pub(crate) fn decode(b: &[u8]) -> Option<Self> {
        Some(Self {
            addr: u64_at(b, 0)?,
            len: u64_at(b, 8)?,
            rkey: u32_at(b, 16)?,
            imm: u32_at(b, 20)?,
            op: Op::from_u8(*b.get(24)?)?,
            pieces: u16_at(b, 26)?,
        })
    }
}

/// A source span of a local WRITE or SEND: an offset in a segment, or, in segment 0, an address in
/// the requester's process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) segment: u32,
    pub(crate) len: u32,
    pub(crate) at: u64,
}

impl Piece {
    pub(crate) fn encode(&self) -> [u8; PIECE] {
        let mut b = [0; PIECE];
        b[0..4].copy_from_slice(&self.segment.to_le_bytes());
        b[4..8].copy_from_slice(&self.len.to_le_bytes());
        b[8..].copy_from_slice(&self.at.to_le_bytes());
        b
    }

    pub(crate) fn decode(b: &[u8]) -> Option<Self> {
        Some(Self {
            segment: u32_at(b, 0)?,
            len: u32_at(b, 4)?,
            at: u64_at(b, 8)?,
        })
    }
}

pub(crate) const HELLO: usize = 112;
const MAGIC: [u8; 8] = *b"KVXSOFT\x01";

/// What a stream's opening is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Role {
    /// The opener's requester talks to the other side's responder.
    ToResponder = 1,
    /// The other side's requester talks to the opener's responder.
    ToRequester = 2,
    /// Only asks for an answer.
    Probe = 3,
    /// The answer: yes.
    Welcome = 4,
    /// The answer: no queue pair has the token.
    Refused = 5,
    /// The answer: the opener's memory cannot be read from here (`errno` says why), so a path that
    /// needs it leads nowhere.
    Barred = 6,
    /// Asks for the file of the shared memory number `qpn` of `target`, which is the token of what is shared. The
    /// answer has it in place of the key table, and in `probe_addr` where in it the memory begins.
    File = 7,
}

/// The opening of a stream, and its answer.
#[derive(Clone, Copy)]
pub(crate) struct Hello {
    pub(crate) role: Role,
    /// 0 TCP, 1 arena, 2 process_vm.
    pub(crate) path: u32,
    /// The token of the queue pair that is meant.
    pub(crate) target: [u8; 16],
    /// The sender's queue pair.
    pub(crate) token: [u8; 16],
    pub(crate) guid: [u8; 16],
    pub(crate) target_guid: [u8; 16],
    pub(crate) qpn: u32,
    pub(crate) pd: u32,
    pub(crate) access: u32,
    /// Slots of the key table that comes with it.
    pub(crate) slots: u32,
    /// Where, in the sender's process, its guid lies: to try `process_vm_readv` on.
    pub(crate) probe_addr: u64,
    /// Of an answer: the process that the sender has named as its one reader, if that is not the
    /// receiver; or 0.
    pub(crate) reader: u32,
    /// Of `Barred`; 0 if what was read was not the guid.
    pub(crate) errno: u32,
}

impl fmt::Debug for Hello {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Tokens are not for logs.
        f.debug_struct("Hello")
            .field("role", &self.role)
            .field("qpn", &self.qpn)
            .finish_non_exhaustive()
    }
}

impl Hello {
    pub(crate) fn encode(&self) -> [u8; HELLO] {
        let mut b = [0; HELLO];
        b[0..8].copy_from_slice(&MAGIC);
        b[8..12].copy_from_slice(&(self.role as u32).to_le_bytes());
        b[12..16].copy_from_slice(&self.path.to_le_bytes());
        b[16..32].copy_from_slice(&self.target);
        b[32..48].copy_from_slice(&self.token);
        b[48..64].copy_from_slice(&self.guid);
        b[64..80].copy_from_slice(&self.target_guid);
        b[80..84].copy_from_slice(&self.qpn.to_le_bytes());
        b[84..88].copy_from_slice(&self.pd.to_le_bytes());
        b[88..92].copy_from_slice(&self.access.to_le_bytes());
        b[92..96].copy_from_slice(&self.slots.to_le_bytes());
        b[96..104].copy_from_slice(&self.probe_addr.to_le_bytes());
        b[104..108].copy_from_slice(&self.reader.to_le_bytes());
        b[108..112].copy_from_slice(&self.errno.to_le_bytes());
        b
    }

    pub(crate) fn decode(b: &[u8]) -> Option<Self> {
        if b.get(0..8)? != MAGIC {
            return None;
        }
        let role = match u32_at(b, 8)? {
            1 => Role::ToResponder,
            2 => Role::ToRequester,
            3 => Role::Probe,
            4 => Role::Welcome,
            5 => Role::Refused,
            6 => Role::Barred,
            7 => Role::File,
            _ => return None,
        };
        Some(Self {
            role,
            path: u32_at(b, 12)?,
            target: id_at(b, 16)?,
            token: id_at(b, 32)?,
            guid: id_at(b, 48)?,
            target_guid: id_at(b, 64)?,
            qpn: u32_at(b, 80)?,
            pd: u32_at(b, 84)?,
            access: u32_at(b, 88)?,
            slots: u32_at(b, 92)?,
            probe_addr: u64_at(b, 96)?,
            reader: u32_at(b, 104)?,
            errno: u32_at(b, 108)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_decode_or_not_and_encode_back(bytes in prop::collection::vec(any::<u8>(), 0..128)) {
            if let Some(h) = Header::decode(&bytes) {
                prop_assert_eq!(&h.encode()[..], &bytes[..HEADER]);
            }
            if let Some(p) = Piece::decode(&bytes) {
                prop_assert_eq!(&p.encode()[..], &bytes[..PIECE]);
            }
            if let Some(d) = Desc::decode(&bytes) {
                prop_assert_eq!(&d.encode()[..25], &bytes[..25]);
                prop_assert_eq!(&d.encode()[26..28], &bytes[26..28]);
            }
            prop_assert!(Hello::decode(&bytes).is_none());
        }

        #[test]
        fn an_opening_comes_back(
            role in 1u32..7,
            ids in any::<[[u8; 16]; 4]>(),
            words in any::<[u32; 7]>(),
            probe_addr in any::<u64>(),
            cut in 0..HELLO,
        ) {
            let [target, token, guid, target_guid] = ids;
            let [path, qpn, pd, access, slots, reader, errno] = words;
            let role = match role {
                1 => Role::ToResponder,
                2 => Role::ToRequester,
                3 => Role::Probe,
                4 => Role::Welcome,
                5 => Role::Refused,
                _ => Role::Barred,
            };
            let hello = Hello {
                role, path, target, token, guid, target_guid, qpn, pd, access, slots, probe_addr,
                reader, errno,
            };
            let bytes = hello.encode();
            let back = Hello::decode(&bytes).map(|h| h.encode());
            prop_assert_eq!(back, Some(bytes));
            prop_assert!(Hello::decode(&bytes[..cut]).is_none());
        }
    }
}
