//! The memory that queues lie in.

/// Memory of a queue: somebody else, a device or a program, reads and writes it at the same time. It
/// may be the host's or a GPU's; who implements this knows how it is reached.
///
/// Only words are read and written, each at once, so that what changes meanwhile is never more than an old
/// word or a new one.
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
