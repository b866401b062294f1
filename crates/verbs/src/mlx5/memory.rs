//! The memory that queues lie in.

use std::ops::Range;
use std::task::Poll;

/// Memory of a queue: somebody else, a device or a program, reads and writes it at the same time. It
/// may be the host's or a GPU's; who implements this knows how it is reached.
///
/// Only words are read and written, each at once, so that what changes meanwhile is never more than an old
/// word or a new one. Memory that loads and stores do not reach by themselves, such as a GPU's own, is copied: what
/// [`fetch`](Self::fetch) brought is what loads find, and what was stored is there for others after
/// [`flush`](Self::flush).
pub trait QueueMemory {
    /// Bytes.
    fn len(&self) -> u64;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Loads eight bytes, as they lie in memory, with acquire order.
    ///
    /// # Errors
    ///
    /// [`OutsideQueue`] where they are not inside, or `offset` is no multiple of 8.
    fn load(&self, offset: u64) -> Result<[u8; 8], OutsideQueue>;

    /// Stores eight bytes with release order.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load).
    fn store(&self, offset: u64, bytes: [u8; 8]) -> Result<(), OutsideQueue>;

    /// Brings these bytes to where loads find them, all at once: they are no older than the call that began it. Nobody waits here:
    /// what is begun and not there is [`Poll::Pending`], and asked for again, with the same spans, before anything else
    /// is brought. Nobody is woken for it.
    ///
    /// Ready with [`QueueNotReached`] where it failed or takes too long; never where loads reach the memory by
    /// themselves.
    fn fetch(&self, _spans: &[Range<u64>]) -> Poll<Result<(), QueueNotReached>> {
        Poll::Ready(Ok(()))
    }

    /// Brings what was stored to these bytes to where others find it, as [`fetch`](Self::fetch): it is there when this
    /// is ready.
    fn flush(&self, _spans: &[Range<u64>]) -> Poll<Result<(), QueueNotReached>> {
        Poll::Ready(Ok(()))
    }
}

/// A queue's memory that is reached by copies, of which one failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{step} of a queue's memory failed or took too long: the log has the runtime's words")]
pub struct QueueNotReached {
    /// What was tried.
    pub step: &'static str,
}

/// An access that is not inside a queue's memory, or not aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("8 bytes at {offset} of a queue's {len}")]
pub struct OutsideQueue {
    /// Where.
    pub offset: u64,
    /// Bytes of the memory.
    pub len: u64,
}
