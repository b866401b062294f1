//! Send work queue elements.

use super::bytes::{Block, get, get8, get32, put};
use super::fault::Mlx5Fault;
use super::layout::{
    MLX5_INLINE_SEG, MLX5_OPCODE_NOP, MLX5_OPCODE_RDMA_READ, MLX5_OPCODE_RDMA_WRITE,
    MLX5_OPCODE_RDMA_WRITE_IMM, MLX5_SEND_WQE_BB, MLX5_WQE_CTRL_CQ_UPDATE, MLX5_WQE_CTRL_FENCE,
    MLX5_WQE_CTRL_INITIATOR_SMALL_FENCE, MLX5_WQE_CTRL_SOLICITED, mlx5_wqe_ctrl_seg as ctrl,
    mlx5_wqe_data_seg as data, mlx5_wqe_inl_data_seg as inl, mlx5_wqe_raddr_seg as raddr,
};

/// Bytes of a unit in which a WQE says its size.
const UNIT: usize = 16;
/// Where the remote segment begins.
const RADDR: usize = ctrl::SIZE;
/// Where the first local segment begins.
const DATA: usize = RADDR + raddr::SIZE;
/// Where data in the WQE begins.
const PAYLOAD: usize = DATA + inl::SIZE;

/// The most bytes of data that a WQE of one basic block has room for.
pub const INLINE_ROOM: usize = MLX5_SEND_WQE_BB - PAYLOAD;

/// The number of a queue pair: 24 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Qpn(u32);

impl Qpn {
    /// A number.
    ///
    /// # Errors
    ///
    /// [`Mlx5Fault::Qpn`].
    pub fn new(qpn: u32) -> Result<Self, Mlx5Fault> {
        if qpn >> 24 != 0 {
            return Err(Mlx5Fault::Qpn { qpn });
        }
        Ok(Self(qpn))
    }

    /// The number in the high or low 24 bits of a big-endian word.
    pub(super) fn low_24(word: u32) -> Self {
        Self(word & 0x00ff_ffff)
    }

    /// The number.
    #[must_use]
    pub fn get(self) -> u32 {
        self.0
    }
}

/// Where the remote memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteSpan {
    /// Its address, as the peer has registered it.
    pub addr: u64,
    /// The peer's key.
    pub rkey: u32,
}

/// A stretch of local memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    addr: u64,
    len: u32,
    lkey: u32,
}

impl Segment {
    /// `len` bytes from `addr`, under this side's key.
    ///
    /// # Errors
    ///
    /// [`Mlx5Fault::Segment`] for no bytes, or 2^31 and more.
    pub fn new(addr: u64, len: u32, lkey: u32) -> Result<Self, Mlx5Fault> {
        if len == 0 || len >= MLX5_INLINE_SEG {
            return Err(Mlx5Fault::Segment { len });
        }
        Ok(Self { addr, len, lkey })
    }

    /// The address.
    #[must_use]
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Bytes; never 0.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// The key.
    #[must_use]
    pub fn lkey(&self) -> u32 {
        self.lkey
    }

    fn write(&self, block: &mut Block, base: usize) {
        put(block, base, data::BYTE_COUNT, self.len.into());
        put(block, base, data::LKEY, self.lkey.into());
        put(block, base, data::ADDR, self.addr);
    }

    fn read(block: &Block, base: usize) -> Result<Self, Mlx5Fault> {
        Self::new(
            get(block, base, data::ADDR),
            get32(block, base, data::BYTE_COUNT),
            get32(block, base, data::LKEY),
        )
    }
}

/// Bytes that are in the WQE itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InlineData {
    len: u8,
    bytes: [u8; INLINE_ROOM],
}

impl InlineData {
    /// These bytes.
    ///
    /// # Errors
    ///
    /// [`Mlx5Fault::Inline`] for none, or more than [`INLINE_ROOM`].
    pub fn new(from: &[u8]) -> Result<Self, Mlx5Fault> {
        let mut bytes = [0; INLINE_ROOM];
        match bytes.get_mut(..from.len()) {
            Some(to) if !from.is_empty() => to.copy_from_slice(from),
            _ => {
                return Err(Mlx5Fault::Inline {
                    len: u32::try_from(from.len()).unwrap_or(u32::MAX),
                    room: INLINE_ROOM as u32,
                });
            }
        }
        // It has fitted.
        let len = from.len() as u8;
        Ok(Self { len, bytes })
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len.into()).unwrap_or_default()
    }

    /// How many units the WQE has with them.
    fn ds(&self) -> u8 {
        ((PAYLOAD + usize::from(self.len)).div_ceil(UNIT)) as u8
    }
}

/// What a WRITE takes its bytes from, or a READ puts them into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gather {
    /// No bytes: a notice, or nothing at all.
    Nothing,
    /// One stretch.
    One(Segment),
    /// Two stretches, one after the other.
    Two(Segment, Segment),
    /// Bytes of the WQE; not for READs.
    Inline(InlineData),
}

impl Gather {
    /// Bytes in all.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::One(one) => one.len.into(),
            Self::Two(one, two) => u64::from(one.len) + u64::from(two.len),
            Self::Inline(data) => data.len.into(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn ds(&self) -> u8 {
        match self {
            Self::Nothing => 2,
            Self::One(_) => 3,
            Self::Two(..) => 4,
            Self::Inline(data) => data.ds(),
        }
    }

    fn write(&self, block: &mut Block) {
        match self {
            Self::Nothing => {}
            Self::One(one) => one.write(block, DATA),
            Self::Two(one, two) => {
                one.write(block, DATA);
                two.write(block, DATA + data::SIZE);
            }
            Self::Inline(bytes) => {
                let count = MLX5_INLINE_SEG | u32::from(bytes.len);
                put(block, DATA, inl::BYTE_COUNT, count.into());
                let to = block.iter_mut().skip(PAYLOAD);
                for (to, from) in to.zip(bytes.bytes()) {
                    *to = *from;
                }
            }
        }
    }

    /// What follows the remote segment in a WQE of `ds` units.
    fn read(block: &Block, opcode: u8, ds: u8) -> Result<Self, Mlx5Fault> {
        let size = Mlx5Fault::Size { opcode, ds };
        let count = get32(block, DATA, inl::BYTE_COUNT);
        let found = match ds {
            2 => Self::Nothing,
            3 | 4 if count & MLX5_INLINE_SEG != 0 => {
                let len = count & !MLX5_INLINE_SEG;
                let bytes = block.get(PAYLOAD..PAYLOAD.saturating_add(len as usize));
                let room = INLINE_ROOM as u32;
                let bytes = bytes.ok_or(Mlx5Fault::Inline { len, room })?;
                if opcode == MLX5_OPCODE_RDMA_READ {
                    return Err(Mlx5Fault::Inline { len, room: 0 });
                }
                Self::Inline(InlineData::new(bytes)?)
            }
            3 => Self::One(Segment::read(block, DATA)?),
            4 => Self::Two(
                Segment::read(block, DATA)?,
                Segment::read(block, DATA + data::SIZE)?,
            ),
            _ => return Err(size),
        };
        if found.ds() != ds {
            return Err(size);
        }
        Ok(found)
    }
}

/// What a WQE does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Nothing, but for its completion.
    Nop,
    /// Writes into remote memory.
    Write {
        /// Where to.
        remote: RemoteSpan,
        /// What.
        local: Gather,
    },
    /// Writes into remote memory, if there is anything to write, and completes a receive there.
    WriteImm {
        /// Where to.
        remote: RemoteSpan,
        /// What.
        local: Gather,
        /// What the receive's completion has.
        imm: u32,
    },
    /// Reads remote memory.
    Read {
        /// Where from.
        remote: RemoteSpan,
        /// Where to; not [`Gather::Inline`].
        local: Gather,
    },
}

impl Operation {
    fn opcode(&self) -> u8 {
        match self {
            Self::Nop => MLX5_OPCODE_NOP,
            Self::Write { .. } => MLX5_OPCODE_RDMA_WRITE,
            Self::WriteImm { .. } => MLX5_OPCODE_RDMA_WRITE_IMM,
            Self::Read { .. } => MLX5_OPCODE_RDMA_READ,
        }
    }

    /// The remote and the local side of what moves bytes.
    #[must_use]
    pub fn sides(&self) -> Option<(&RemoteSpan, &Gather)> {
        match self {
            Self::Nop => None,
            Self::Write { remote, local }
            | Self::WriteImm { remote, local, .. }
            | Self::Read { remote, local } => Some((remote, local)),
        }
    }
}

/// When a WQE is carried out and how its end is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SendFlags {
    /// Success makes a completion; failure always does.
    pub signalled: bool,
    /// The peer's receive wakes who sleeps on its completions.
    pub solicited: bool,
    /// Earlier READs end first.
    pub fence: bool,
    /// Earlier local work ends first.
    pub small_fence: bool,
}

impl SendFlags {
    const BITS: [u8; 4] = [
        MLX5_WQE_CTRL_CQ_UPDATE,
        MLX5_WQE_CTRL_SOLICITED,
        MLX5_WQE_CTRL_FENCE,
        MLX5_WQE_CTRL_INITIATOR_SMALL_FENCE,
    ];

    fn to_byte(self) -> u8 {
        let set = [self.signalled, self.solicited, self.fence, self.small_fence];
        let bits = Self::BITS.iter().zip(set);
        bits.fold(0, |all, (bit, set)| if set { all | bit } else { all })
    }

    fn from_byte(value: u8) -> Result<Self, Mlx5Fault> {
        let [signalled, solicited, fence, small_fence] = Self::BITS.map(|bit| value & bit != 0);
        let flags = Self {
            signalled,
            solicited,
            fence,
            small_fence,
        };
        if flags.to_byte() != value {
            let at = ctrl::FM_CE_SE.start as u8;
            return Err(Mlx5Fault::Byte { at, value });
        }
        Ok(flags)
    }
}

/// A send WQE of one basic block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SendWqe {
    /// Low 16 bits of the WQE's number.
    pub index: u16,
    /// The queue pair that it is posted to.
    pub qpn: Qpn,
    /// When it is carried out and how its end is told.
    pub flags: SendFlags,
    /// What it does.
    pub operation: Operation,
}

impl SendWqe {
    /// Its bytes. What lies behind its last unit is 0.
    ///
    /// # Errors
    ///
    /// [`Mlx5Fault::Inline`] for a READ into the WQE.
    pub fn encode(&self) -> Result<Block, Mlx5Fault> {
        let mut block = [0; MLX5_SEND_WQE_BB];
        let opcode = self.operation.opcode();
        let ds = match &self.operation {
            Operation::Nop => 1,
            Operation::Read {
                local: Gather::Inline(bytes),
                ..
            } => {
                let len = bytes.len.into();
                return Err(Mlx5Fault::Inline { len, room: 0 });
            }
            Operation::Write { local, .. }
            | Operation::WriteImm { local, .. }
            | Operation::Read { local, .. } => local.ds(),
        };
        let first = u64::from(self.index) << 8 | u64::from(opcode);
        put(&mut block, 0, ctrl::OPMOD_IDX_OPCODE, first);
        let second = u64::from(self.qpn.get()) << 8 | u64::from(ds);
        put(&mut block, 0, ctrl::QPN_DS, second);
        put(&mut block, 0, ctrl::FM_CE_SE, self.flags.to_byte().into());
        if let Operation::WriteImm { imm, .. } = &self.operation {
            put(&mut block, 0, ctrl::IMM, (*imm).into());
        }
        if let Some((remote, local)) = self.operation.sides() {
            put(&mut block, RADDR, raddr::RADDR, remote.addr);
            put(&mut block, RADDR, raddr::RKEY, remote.rkey.into());
            local.write(&mut block);
        }
        Ok(block)
    }

    /// What these bytes say. What lies behind the WQE's last unit is not looked at; all else must be as
    /// [`encode`](Self::encode) writes it.
    ///
    /// # Errors
    ///
    /// [`Mlx5Fault`], with what is wrong first.
    pub fn decode(block: &Block) -> Result<Self, Mlx5Fault> {
        let first = get32(block, 0, ctrl::OPMOD_IDX_OPCODE);
        let second = get32(block, 0, ctrl::QPN_DS);
        let [modifier, high, low, opcode] = first.to_be_bytes();
        let [.., ds] = second.to_be_bytes();
        let qpn = Qpn::low_24(second >> 8);
        let local = |ds| Gather::read(block, opcode, ds);
        let remote = RemoteSpan {
            addr: get(block, RADDR, raddr::RADDR),
            rkey: get32(block, RADDR, raddr::RKEY),
        };
        let imm = get32(block, 0, ctrl::IMM);
        let operation = match (opcode, modifier) {
            (MLX5_OPCODE_NOP, 0) if ds == 1 => Operation::Nop,
            (MLX5_OPCODE_NOP, 0) => return Err(Mlx5Fault::Size { opcode, ds }),
            (MLX5_OPCODE_RDMA_WRITE, 0) => {
                let local = local(ds)?;
                Operation::Write { remote, local }
            }
            (MLX5_OPCODE_RDMA_WRITE_IMM, 0) => {
                let local = local(ds)?;
                Operation::WriteImm { remote, local, imm }
            }
            (MLX5_OPCODE_RDMA_READ, 0) => {
                let local = local(ds)?;
                Operation::Read { remote, local }
            }
            _ => return Err(Mlx5Fault::Opcode { opcode, modifier }),
        };
        zero(block, 0, ctrl::SIGNATURE)?;
        zero(block, 0, ctrl::DCI_STREAM_CHANNEL_ID)?;
        if !matches!(operation, Operation::WriteImm { .. }) {
            zero(block, 0, ctrl::IMM)?;
        }
        if operation.sides().is_some() {
            zero(block, RADDR, raddr::RESERVED)?;
        }
        Ok(Self {
            index: u16::from_be_bytes([high, low]),
            qpn,
            flags: SendFlags::from_byte(get8(block, 0, ctrl::FM_CE_SE))?,
            operation,
        })
    }

    /// How many units of 16 bytes it has.
    #[must_use]
    pub fn ds(&self) -> u8 {
        self.operation.sides().map_or(1, |(_, local)| local.ds())
    }
}

/// That a field is 0.
fn zero(block: &Block, base: usize, at: std::ops::Range<usize>) -> Result<(), Mlx5Fault> {
    let places = base + at.start..base + at.end;
    for (at, value) in block
        .iter()
        .enumerate()
        .skip(places.start)
        .take(places.len())
    {
        if *value != 0 {
            // A place in 64 bytes.
            return Err(Mlx5Fault::Byte {
                at: at as u8,
                value: *value,
            });
        }
    }
    Ok(())
}
