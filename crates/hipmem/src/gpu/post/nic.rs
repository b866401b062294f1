//! The queues of a NIC, which somebody else has made, for kernels to post to.

use std::sync::Arc;

use kvxfer_verbs::mlx5::model::Queues;
use kvxfer_verbs::mlx5::{CQE_BYTES, CqDepth, Cqe, Qpn, SqDepth, WQEBB};
use kvxfer_verbs::{Memory, MemoryKind};

use crate::error::Error;
use crate::gpu::Gpu;
use crate::gpu::foreign::ForeignMemory;
use crate::memory::read;

/// Bytes of a doorbell, and of a doorbell record.
const WORD: u64 = 8;

/// A queue pair's send queue and the completion queue of its sends, as a NIC has them: an mlx5 device's, or what passes
/// for one. Nothing has been posted to it, and nobody else posts there or reads completions as long as it is used.
#[derive(Debug, Clone)]
pub struct NicQueues {
    /// The queue pair's number.
    pub qpn: Qpn,
    /// Slots of the send queue.
    pub sq_depth: SqDepth,
    /// Completions: at least as many.
    pub cq_depth: CqDepth,
    /// Where they lie: memory of the host. The doorbell may be a NIC's registers
    /// ([`MemoryKind::Registers`](kvxfer_verbs::MemoryKind::Registers)).
    pub memory: Queues<Arc<dyn Memory>>,
}

/// Why kernels cannot post to a NIC's queues.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NicFault {
    /// A part that is too small, or not where such a part can be.
    #[error(
        "the {part} of a NIC's queue has {len} bytes at {addr:#x}, and must have {wanted}, at a multiple of {to}"
    )]
    Span {
        /// Which part.
        part: &'static str,
        /// Where it lies.
        addr: u64,
        /// Its bytes.
        len: u64,
        /// The bytes that it must have.
        wanted: u64,
        /// What its address is a multiple of.
        to: u64,
    },
    /// A part that is not memory of the host.
    #[error(
        "the {part} of a NIC's queue is {kind}: the queues and their records must be host memory, the doorbell that or a device's registers"
    )]
    Kind {
        /// Which part.
        part: &'static str,
        /// What it is.
        kind: MemoryKind,
    },
    /// A queue that is not new: kernels count from 0.
    #[error(
        "the {part} of a NIC's queue says {found:#x}, and of a new one {wanted:#x}: something was posted to it, or completed on it; make a new queue pair and a completion queue of its own"
    )]
    Used {
        /// Which part.
        part: &'static str,
        /// What is there.
        found: u64,
        /// What is there before anything was posted.
        wanted: u64,
    },
}

const SLOTS: &str = "send queue";
const RECORD: &str = "send queue's doorbell record";
const COMPLETIONS: &str = "completion queue";
const CQ_RECORD: &str = "completion queue's doorbell record";
const BELL: &str = "doorbell";

impl NicQueues {
    /// Looks whether kernels can post there, as far as the host can see.
    fn check(&self) -> Result<(), Error> {
        if self.cq_depth.get() < self.sq_depth.get() {
            let depth = self.cq_depth.get();
            return Err(Error::Depth { depth });
        }
        let of = &self.memory;
        for (part, memory, wanted, to) in [
            (SLOTS, &of.sq, self.sq_depth.bytes(), WQEBB as u64),
            (RECORD, &of.sq_record, WORD, WORD),
            (COMPLETIONS, &of.cq, self.cq_depth.bytes(), CQE_BYTES as u64),
            (CQ_RECORD, &of.cq_record, WORD, WORD),
            (BELL, &of.bell, WORD, WORD),
        ] {
            let (addr, len, kind) = (memory.addr(), memory.len(), memory.kind());
            let is_bell = part == BELL && kind == MemoryKind::Registers;
            if kind != MemoryKind::Host && !is_bell {
                return Err(NicFault::Kind { part, kind }.into());
            }
            if len < wanted || !addr.is_multiple_of(to) {
                return Err(NicFault::Span {
                    part,
                    addr,
                    len,
                    wanted,
                    to,
                }
                .into());
            }
        }
        self.check_new()
    }

    /// Whether it is a queue that nothing was posted to: its records are 0, and no completion is there, whoever owns its
    /// slot. The word of receives, in the first half of the queue pair's record, is not looked at.
    fn check_new(&self) -> Result<(), Error> {
        let word = |part, memory: &Arc<dyn Memory>, at| {
            let mut found = [0; 4];
            read(memory.as_ref(), at, &mut found)?;
            match u32::from_be_bytes(found) {
                0 => Ok(()),
                found => Err(Error::from(NicFault::Used {
                    part,
                    found: found.into(),
                    wanted: 0,
                })),
            }
        };
        word(RECORD, &self.memory.sq_record, 4)?;
        word(CQ_RECORD, &self.memory.cq_record, 0)?;
        let mut all = vec![[0; CQE_BYTES]; self.cq_depth.get() as usize];
        read(self.memory.cq.as_ref(), 0, all.as_flattened_mut())?;
        let [.., wanted] = Cqe::unwritten();
        // The owner is the last bit: a device, or its library, leaves either.
        let mut lasts = all.iter().map(|[.., last]| *last);
        match lasts.find(|last| last >> 4 != wanted >> 4) {
            None => Ok(()),
            Some(found) => Err(NicFault::Used {
                part: COMPLETIONS,
                found: found.into(),
                wanted: wanted.into(),
            }
            .into()),
        }
    }

    /// Maps it for a GPU's kernels.
    pub(super) fn map(&self, gpu: &Gpu) -> Result<Queues<ForeignMemory>, Error> {
        self.check()?;
        let of = &self.memory;
        let parts = [
            (SLOTS, &of.sq),
            (RECORD, &of.sq_record),
            (COMPLETIONS, &of.cq),
            (CQ_RECORD, &of.cq_record),
            (BELL, &of.bell),
        ];
        let parts = parts.map(|(part, memory)| (part, Arc::clone(memory)));
        let mapped: Vec<_> = ForeignMemory::map(gpu, &parts)?;
        let Ok([sq, sq_record, cq, cq_record, bell]) = <[_; 5]>::try_from(mapped) else {
            return Err(Error::Empty);
        };
        Ok(Queues {
            sq,
            sq_record,
            cq,
            cq_record,
            bell,
        })
    }
}
