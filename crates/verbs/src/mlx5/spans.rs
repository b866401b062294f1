//! A real device's queues as memory, for who maps them for a GPU.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use super::mapped::{MappedCompletions, MappedQueues, MappedSends};
use super::model::Queues;
use crate::memory::{FdSpan, Memory, MemoryKind};
use crate::qp::Rts;

/// Bytes of a doorbell, and of a doorbell record.
const WORD: u64 = 8;

/// A part of a device's queues.
struct Span {
    at: u64,
    len: u64,
    kind: MemoryKind,
    /// What it is a part of.
    _queues: Arc<dyn Any + Send + Sync>,
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (at, len, kind) = (self.at, self.len, self.kind);
        write!(f, "{len} bytes of a NIC's queues at {at:#x}, {kind}")
    }
}

// SAFETY: the caller of `spans` promises that it is mapped and in place as long as `_queues` is there, and that no
// Rust reference to it is made; the answers are constant, and there is no file.
unsafe impl Memory for Span {
    fn addr(&self) -> u64 {
        self.at
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn kind(&self) -> MemoryKind {
        self.kind
    }

    fn fd(&self) -> Option<FdSpan<'_>> {
        None
    }
}

impl MappedQueues<Rts> {
    /// Its parts as memory, each of which holds all of it: the queue pair is destroyed when the last of them is gone.
    /// The queues and their records are the host's, the doorbell is a device's
    /// [registers](MemoryKind::Registers).
    ///
    /// The doorbell is eight bytes at the register's beginning. libmlx5 itself alternates between the register's two
    /// halves ([`MappedSends::bell_bytes`] each), because it writes whole WQEs there through the processor's
    /// write-combining buffers, where the next one could run into the last. Kernels write eight bytes in one store, whose
    /// effect does not depend on the half: GPUs that post to mlx5 devices (NVSHMEM's IBGDA, DOCA GPUNetIO) write all
    /// doorbells to the register's first bytes, and so do kernels here. `bell_bytes` is not looked at: where it is 0, the
    /// register takes nothing else, and other queue pairs of the context may ring there too.
    #[must_use]
    pub fn memory(self: &Arc<Self>) -> Queues<Arc<dyn Memory>> {
        let keep = Arc::clone(self);
        // SAFETY: libmlx5 keeps what it told of as long as queue pair and completion queue are there, which `self`
        // holds; no code of Rust goes there otherwise than by the tokens.
        unsafe { spans(self.sends(), self.completions(), keep) }
    }
}

/// Parts of a device's queues.
///
/// # Safety
///
/// As long as `keep` is not dropped, both queues and both records are mapped, readable and writable, and the doorbell
/// is mapped and may be written; none of it moves, and no Rust reference to it exists.
pub(super) unsafe fn spans(
    sends: &MappedSends,
    completions: &MappedCompletions,
    keep: Arc<dyn Any + Send + Sync>,
) -> Queues<Arc<dyn Memory>> {
    let span = |at, len, kind| -> Arc<dyn Memory> {
        Arc::new(Span {
            at,
            len,
            kind,
            _queues: Arc::clone(&keep),
        })
    };
    let host = |at, len| span(at, len, MemoryKind::Host);
    Queues {
        sq: host(sends.slots, sends.depth.bytes()),
        sq_record: host(sends.record, WORD),
        cq: host(completions.slots, completions.depth.bytes()),
        cq_record: host(completions.record, WORD),
        bell: span(sends.bell, WORD, MemoryKind::Registers),
    }
}
