//! The pinger's queue pair: one operation at a time, waited for by its id.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use kvxfer_hipmem::{ArenaOptions, HostArena, HostMemory, HugePages};
use kvxfer_verbs::{
    Access, CompletionQueue, Context, GidChoice, Init, InitAttr, ProtectionDomain, QpCaps,
    QueuePair, RegionTable, Remote, Rts, SendChain, SendOp, Sge, WcStatus,
};

use super::{SCRATCH, WORD};
use crate::error::Error;
use crate::wire::RemoteSpan;

/// Where on this side a WRITE's value lies and a READ's lands.
const WRITE_AT: u64 = 0;
const READ_AT: u64 = 64;
/// Receives of a server's queue pair; it posts each again when it is used.
pub(super) const RECEIVES: u32 = 16;

/// A small memory of its own, zeroed.
pub(super) fn scratch() -> Result<HostMemory, Error> {
    let options = ArenaOptions {
        huge: HugePages::Never,
        prefault: true,
    };
    Ok(HostArena::with_options(SCRATCH, options)?.memory().clone())
}

pub(super) fn queue_pair(
    pd: &ProtectionDomain,
    cq: &CompletionQueue,
    access: Access,
    gid: Option<&GidChoice>,
) -> Result<QueuePair<Init>, Error> {
    let caps = QpCaps {
        max_send_wr: 8,
        max_recv_wr: RECEIVES,
        max_send_sge: 1,
        max_recv_sge: 1,
    };
    let mut attr = InitAttr::new(access);
    attr.gid_index = gid.map(|gid| gid.index);
    Ok(pd.create_qp(caps, cq, cq)?.init(attr)?)
}

/// Memory and queues of a pinger, before they are joined to the peer's.
#[derive(Debug)]
pub(super) struct Parts {
    memory: HostMemory,
    table: Arc<RegionTable>,
    cq: CompletionQueue,
    pub(super) qp: QueuePair<Init>,
}

impl Parts {
    pub(super) fn new(context: &Context, gid: Option<&GidChoice>) -> Result<Self, Error> {
        let pd = context.alloc_pd()?;
        let memory = scratch()?;
        let region = pd.register(memory.as_memory(), Access::LOCAL_WRITE)?;
        let cq = context.create_cq(64)?;
        let qp = queue_pair(&pd, &cq, Access::NONE, gid)?;
        Ok(Self {
            memory,
            table: Arc::new(RegionTable::new(vec![region])),
            cq,
            qp,
        })
    }

    /// The lane, once `up` has brought the queue pair up.
    pub(super) fn joined(
        self,
        remote: RemoteSpan,
        up: impl FnOnce(QueuePair<Init>) -> Result<QueuePair<Rts>, Error>,
    ) -> Result<Lane, Error> {
        Ok(Lane {
            qp: up(self.qp)?,
            cq: self.cq,
            table: self.table,
            memory: self.memory,
            remote,
            next: 0,
            out: None,
            completions: Vec::new(),
        })
    }
}

/// An operation that is out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Out {
    id: u64,
    what: &'static str,
}

#[derive(Debug)]
pub(super) struct Lane {
    // Before the memory, which its work touches.
    qp: QueuePair<Rts>,
    cq: CompletionQueue,
    table: Arc<RegionTable>,
    memory: HostMemory,
    remote: RemoteSpan,
    next: u64,
    out: Option<Out>,
    completions: Vec<kvxfer_verbs::Completion>,
}

impl Lane {
    /// Writes `value` to the peer's scratch, and notifies it.
    pub(super) fn write(&mut self, value: u64) -> Result<(), Error> {
        self.memory.store_u64(WRITE_AT, value)?;
        let notice = u32::try_from(self.next & 0xffff_ffff).unwrap_or(0);
        let op = SendOp::WriteImm(self.at(), notice);
        self.post("WRITE", op, WRITE_AT)
    }

    /// Reads the peer's scratch.
    pub(super) fn read(&mut self) -> Result<(), Error> {
        let op = SendOp::Read(self.at());
        self.post("READ", op, READ_AT)
    }

    /// Aims at other memory of the peer.
    #[cfg(test)]
    pub(super) fn aim(&mut self, remote: RemoteSpan) {
        self.remote = remote;
    }

    /// What the last READ has brought.
    pub(super) fn value(&self) -> Result<u64, Error> {
        Ok(self.memory.load_u64(READ_AT)?)
    }

    fn at(&self) -> Remote {
        Remote {
            addr: self.remote.addr,
            rkey: self.remote.rkey,
        }
    }

    fn post(&mut self, what: &'static str, op: SendOp, offset: u64) -> Result<(), Error> {
        let sge = Sge {
            region: 0,
            len: WORD,
            offset,
        };
        let id = self.next;
        self.next += 1;
        let mut chain = SendChain::new();
        chain.push(id, op, true, &[sge]);
        self.qp.post_send(&chain, &self.table)?;
        self.out = Some(Out { id, what });
        Ok(())
    }

    /// Whether nothing is out any more. Looks once.
    pub(super) fn is_idle(&mut self) -> Result<bool, Error> {
        let Some(out) = self.out else {
            return Ok(true);
        };
        self.completions.clear();
        self.cq.poll(&mut self.completions, 16)?;
        for completion in &self.completions {
            if completion.status != WcStatus::Success {
                return Err(Error::PingFailed {
                    operation: out.what,
                    status: completion.status,
                    vendor: completion.vendor_err,
                });
            }
            if completion.wr_id == out.id {
                self.out = None;
            }
        }
        Ok(self.out.is_none())
    }

    /// Whether it is safe to sleep until [`fd`](Self::fd) is readable.
    pub(super) fn arm(&self) -> Result<bool, Error> {
        Ok(self.cq.arm()?)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.cq.as_fd()
    }
}
