//! Work requests and their completions.

/// A span of local memory: a part of one region of the chain's [`RegionTable`](crate::RegionTable).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sge {
    /// Index into the region table.
    pub region: u32,
    /// Bytes.
    pub len: u32,
    /// Bytes from the region's first byte.
    pub offset: u64,
}

/// A place in a peer's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Remote {
    /// The address in the peer's process.
    pub addr: u64,
    /// The region's remote key.
    pub rkey: u32,
}

/// What a send work request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SendOp {
    /// Reads the peer's memory into the local spans.
    Read(Remote),
    /// Writes the local spans into the peer's memory.
    Write(Remote),
    /// The same, and consumes one of the peer's receives, whose completion carries the value.
    WriteImm(Remote, u32),
    /// Fills one of the peer's receives.
    Send,
    /// The same, with a value in the completion.
    SendImm(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Op {
    Read = 0,
    Write = 1,
    WriteImm = 2,
    Send = 3,
    SendImm = 4,
}

impl Op {
    pub(crate) fn from_u8(v: u8) -> Option<Self> {
        Some(match v {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::WriteImm,
            3 => Self::Send,
            4 => Self::SendImm,
            _ => return None,
        })
    }

    pub(crate) fn imm(self) -> bool {
        matches!(self, Self::WriteImm | Self::SendImm)
    }

    /// Whether it takes one of the peer's receives.
    pub(crate) fn takes_recv(self) -> bool {
        matches!(self, Self::WriteImm | Self::Send | Self::SendImm)
    }

    pub(crate) fn opcode(self) -> WcOpcode {
        match self {
            Self::Read => WcOpcode::Read,
            Self::Write | Self::WriteImm => WcOpcode::Write,
            Self::Send | Self::SendImm => WcOpcode::Send,
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct WrEntry {
    pub(crate) wr_id: u64,
    pub(crate) addr: u64,
    pub(crate) len: u64,
    pub(crate) rkey: u32,
    pub(crate) imm: u32,
    pub(crate) nsge: u32,
    pub(crate) op: Op,
    pub(crate) signaled: bool,
    /// Set at posting when a local span is out of bounds, of another protection domain or without
    /// the access: it completes with `LocProt`.
    pub(crate) bad_local: bool,
}

/// One work request of a chain, as read back.
#[derive(Debug, Clone, Copy)]
pub struct Wr<'a> {
    /// The caller's id.
    pub wr_id: u64,
    /// What it does.
    pub op: SendOp,
    /// Whether success gives a completion.
    pub signaled: bool,
    /// The local spans.
    pub sges: &'a [Sge],
}

/// Work requests posted together. The memory is flat and reused: after [`clear`](Self::clear)
/// a chain of the same size needs no allocation.
#[derive(Debug, Default, Clone)]
pub struct SendChain {
    pub(crate) wrs: Vec<WrEntry>,
    pub(crate) sges: Vec<Sge>,
    /// How many are READs.
    pub(crate) reads: usize,
    pub(crate) max_nsge: u32,
    pub(crate) max_len: u64,
    /// One more than the largest region index used.
    pub(crate) regions: u64,
}

impl SendChain {
    /// An empty chain.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets the work requests and keeps the memory.
    pub fn clear(&mut self) {
        self.wrs.clear();
        self.sges.clear();
        self.reads = 0;
        self.max_nsge = 0;
        self.max_len = 0;
        self.regions = 0;
    }

    /// The number of work requests.
    #[must_use]
    pub fn len(&self) -> usize {
        self.wrs.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.wrs.is_empty()
    }

    /// Appends a work request. Limits are checked when the chain is posted.
    #[inline]
    pub fn push(&mut self, wr_id: u64, op: SendOp, signaled: bool, sges: &[Sge]) {
        let none = Remote { addr: 0, rkey: 0 };
        let (op, remote, imm) = match op {
            SendOp::Read(r) => (Op::Read, r, 0),
            SendOp::Write(r) => (Op::Write, r, 0),
            SendOp::WriteImm(r, imm) => (Op::WriteImm, r, imm),
            SendOp::Send => (Op::Send, none, 0),
            SendOp::SendImm(imm) => (Op::SendImm, none, imm),
        };
        let mut len = 0u64;
        for s in sges {
            len += u64::from(s.len);
            self.regions = self.regions.max(u64::from(s.region) + 1);
        }
        let nsge = u32::try_from(sges.len()).unwrap_or(u32::MAX);
        self.max_nsge = self.max_nsge.max(nsge);
        self.max_len = self.max_len.max(len);
        self.reads += usize::from(op == Op::Read);
        if let [sge] = sges {
            self.sges.push(*sge);
        } else {
            self.sges.extend_from_slice(sges);
        }
        self.wrs.push(WrEntry {
            wr_id,
            addr: remote.addr,
            len,
            rkey: remote.rkey,
            imm,
            nsge,
            op,
            signaled,
            bad_local: false,
        });
    }

    /// The work requests, first to last.
    pub fn wrs(&self) -> impl Iterator<Item = Wr<'_>> {
        let mut at = 0usize;
        self.wrs.iter().map(move |w| {
            let end = at + w.nsge as usize;
            let sges = self.sges.get(at..end).unwrap_or_default();
            at = end;
            let remote = Remote {
                addr: w.addr,
                rkey: w.rkey,
            };
            let op = match w.op {
                Op::Read => SendOp::Read(remote),
                Op::Write => SendOp::Write(remote),
                Op::WriteImm => SendOp::WriteImm(remote, w.imm),
                Op::Send => SendOp::Send,
                Op::SendImm => SendOp::SendImm(w.imm),
            };
            Wr {
                wr_id: w.wr_id,
                op,
                signaled: w.signaled,
                sges,
            }
        })
    }
}

/// How a work request ended; the numbers are those of `enum ibv_wc_status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WcStatus {
    /// Done.
    Success,
    /// A message longer than the receive it met, or than the device takes.
    LocLen,
    /// A fault of the local queue pair.
    LocQpOp,
    /// A local span outside its region, of another protection domain, or without the access.
    LocProt,
    /// Not done: the queue pair was already in the error state.
    WrFlush,
    /// The peer found the request malformed, or its receive too short.
    RemInvReq,
    /// The peer refused the access: key, bounds, rights.
    RemAccess,
    /// The peer could not carry the operation out.
    RemOp,
    /// The peer did not answer.
    RetryExc,
    /// The peer had no receive posted for too long.
    RnrRetryExc,
    /// Anything else, with the raw number.
    Other(u32),
}

impl WcStatus {
    /// The number in `enum ibv_wc_status`.
    #[must_use]
    pub fn as_raw(self) -> u32 {
        match self {
            Self::Success => 0,
            Self::LocLen => 1,
            Self::LocQpOp => 2,
            Self::LocProt => 4,
            Self::WrFlush => 5,
            Self::RemInvReq => 9,
            Self::RemAccess => 10,
            Self::RemOp => 11,
            Self::RetryExc => 12,
            Self::RnrRetryExc => 13,
            Self::Other(v) => v,
        }
    }

    /// From the number in `enum ibv_wc_status`.
    #[must_use]
    pub fn from_raw(v: u32) -> Self {
        match v {
            0 => Self::Success,
            1 => Self::LocLen,
            2 => Self::LocQpOp,
            4 => Self::LocProt,
            5 => Self::WrFlush,
            9 => Self::RemInvReq,
            10 => Self::RemAccess,
            11 => Self::RemOp,
            12 => Self::RetryExc,
            13 => Self::RnrRetryExc,
            other => Self::Other(other),
        }
    }
}

impl std::fmt::Display for WcStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match self {
            Self::Success => "success",
            Self::LocLen => "local length error",
            Self::LocQpOp => "local queue pair operation error",
            Self::LocProt => "local protection error",
            Self::WrFlush => "flushed",
            Self::RemInvReq => "remote invalid request",
            Self::RemAccess => "remote access error",
            Self::RemOp => "remote operation error",
            Self::RetryExc => "transport retries exceeded",
            Self::RnrRetryExc => "receiver not ready for too long",
            Self::Other(v) => return write!(f, "status {v}"),
        };
        f.write_str(name)
    }
}

/// What a completed work request was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WcOpcode {
    /// A READ.
    Read,
    /// A WRITE, with or without a value.
    Write,
    /// A SEND.
    Send,
    /// A receive, filled by a SEND.
    Recv,
    /// A receive, consumed by a WRITE with a value.
    RecvWriteImm,
}

/// The end of one work request. On an error only the four public fields mean anything, so the rest
/// is behind methods that answer `None` then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// The caller's id.
    pub wr_id: u64,
    /// How it ended.
    pub status: WcStatus,
    /// The queue pair.
    pub qp_num: u32,
    /// The device's own code for the error, 0 on success.
    pub vendor_err: u32,
    pub(crate) opcode: WcOpcode,
    pub(crate) byte_len: u32,
    pub(crate) imm: Option<u32>,
}

impl Completion {
    /// What it was; only on success.
    #[must_use]
    pub fn opcode(&self) -> Option<WcOpcode> {
        (self.status == WcStatus::Success).then_some(self.opcode)
    }

    /// Bytes moved; only on success, and for READs and receives alone.
    #[must_use]
    pub fn byte_len(&self) -> Option<u32> {
        let has = matches!(
            self.opcode,
            WcOpcode::Read | WcOpcode::Recv | WcOpcode::RecvWriteImm
        );
        (self.status == WcStatus::Success && has).then_some(self.byte_len)
    }

    /// The value that the peer sent along; only on success.
    #[must_use]
    pub fn imm(&self) -> Option<u32> {
        if self.status == WcStatus::Success {
            self.imm
        } else {
            None
        }
    }
}
