//! Doorbells, and the records in memory beside them.

use super::fault::Mlx5Fault;
use super::layout::{MLX5_RCV_DBR, MLX5_SND_DBR};
use super::wqe::{Qpn, SendWqe};

/// What is written to a doorbell register, in eight bytes at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doorbell {
    /// The first eight bytes of the last WQE posted.
    LastWqe {
        /// Its opcode.
        opcode: u8,
        /// Low 16 bits of its number.
        index: u16,
        /// Its queue pair.
        qpn: Qpn,
        /// Its size in units of 16 bytes; not 0.
        ds: u8,
    },
    /// The number of the WQE that comes next.
    Next {
        /// Its low 16 bits.
        index: u16,
        /// The queue pair.
        qpn: Qpn,
    },
}

impl Doorbell {
    /// The doorbell for what ends with this WQE.
    ///
    /// # Errors
    ///
    /// As [`SendWqe::encode`].
    pub fn of(last: &SendWqe) -> Result<Self, Mlx5Fault> {
        let [_, _, _, opcode, ..] = last.encode()?;
        Ok(Self::LastWqe {
            opcode,
            index: last.index,
            qpn: last.qpn,
            ds: last.ds(),
        })
    }

    /// The queue pair.
    #[must_use]
    pub fn qpn(&self) -> Qpn {
        match self {
            Self::LastWqe { qpn, .. } | Self::Next { qpn, .. } => *qpn,
        }
    }

    /// Low 16 bits of the number of the WQE that comes next.
    #[must_use]
    pub fn next(&self) -> u16 {
        match self {
            Self::LastWqe { index, .. } => index.wrapping_add(1),
            Self::Next { index, .. } => *index,
        }
    }

    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; 8] {
        let (opcode, index, ds) = match self {
            Self::LastWqe {
                opcode, index, ds, ..
            } => (*opcode, *index, *ds),
            Self::Next { index, .. } => (0, *index, 0),
        };
        let first = u64::from(index) << 8 | u64::from(opcode);
        let second = u64::from(self.qpn().get()) << 8 | u64::from(ds);
        (first << 32 | second).to_be_bytes()
    }

    /// What these bytes say.
    ///
    /// # Errors
    ///
    /// [`Mlx5Fault::Doorbell`] for an opcode modifier, or a size or opcode without the other.
    pub fn decode(bytes: [u8; 8]) -> Result<Self, Mlx5Fault> {
        let value = u64::from_be_bytes(bytes);
        let [modifier, high, low, opcode, q2, q1, q0, ds] = bytes;
        let index = u16::from_be_bytes([high, low]);
        let qpn = Qpn::low_24(u32::from_be_bytes([0, q2, q1, q0]));
        match (modifier, opcode, ds) {
            (0, 0, 0) => Ok(Self::Next { index, qpn }),
            (0, _, 1..64) => Ok(Self::LastWqe {
                opcode,
                index,
                qpn,
                ds,
            }),
            _ => Err(Mlx5Fault::Doorbell { value }),
        }
    }
}

/// The word of a doorbell record: the device may read it at any time, so it is written before the
/// doorbell, and after what it tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DoorbellRecord(pub u16);

impl DoorbellRecord {
    /// Where in a queue pair's record the receive queue's word is.
    pub const RECEIVE_OFFSET: u64 = 4 * MLX5_RCV_DBR as u64;
    /// Where in a queue pair's record the send queue's word is.
    pub const SEND_OFFSET: u64 = 4 * MLX5_SND_DBR as u64;

    /// The word that says that all WQEs below `next` are there.
    #[must_use]
    pub fn new(next: u64) -> Self {
        // Low 16 bits.
        Self(next as u16)
    }

    /// Its bytes.
    #[must_use]
    pub fn encode(self) -> [u8; 4] {
        u32::from(self.0).to_be_bytes()
    }

    /// What these bytes say.
    ///
    /// # Errors
    ///
    /// [`Mlx5Fault::Byte`] where the high half is not 0.
    pub fn decode(bytes: [u8; 4]) -> Result<Self, Mlx5Fault> {
        match bytes {
            [0, 0, high, low] => Ok(Self(u16::from_be_bytes([high, low]))),
            [0, value, ..] => Err(Mlx5Fault::Byte { at: 1, value }),
            [value, ..] => Err(Mlx5Fault::Byte { at: 0, value }),
        }
    }
}
