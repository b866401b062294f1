//! How posts end.

/// How a call of `kernels/post.h`, or what it has posted, ended. The numbers are those of
/// `kernels/queue.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u8)]
pub enum Status {
    /// Well.
    Ok = 0,
    /// No room, no turn or no end within the queue's patience.
    Timeout = 1,
    /// The abort word was set while there was something to wait for.
    Stopped = 2,
    /// An operation has failed before, so nothing was posted.
    Broken = 3,
    /// A queue that is none.
    BadQueue = 4,
    /// An operation or flags that there are not.
    BadOp = 5,
    /// More bytes than an operation can have.
    BadLength = 6,
    /// A key that names nothing.
    BadKey = 7,
    /// Bytes outside of what a key or place names.
    BadRange = 8,
    /// Not allowed there.
    BadRights = 9,
    /// A descriptor or completion that makes no sense.
    Malformed = 10,
    /// An operation before it has failed.
    Flushed = 11,
    /// The peer is lost or does not answer.
    Peer = 12,
    /// Its deadline has passed.
    Late = 13,
    /// The queue has been closed.
    Closed = 14,
    /// The device failed it for another reason.
    Device = 15,
}

impl Status {
    const ALL: [Self; 16] = [
        Self::Ok,
        Self::Timeout,
        Self::Stopped,
        Self::Broken,
        Self::BadQueue,
        Self::BadOp,
        Self::BadLength,
        Self::BadKey,
        Self::BadRange,
        Self::BadRights,
        Self::Malformed,
        Self::Flushed,
        Self::Peer,
        Self::Late,
        Self::Closed,
        Self::Device,
    ];

    /// The status that a kernel has given; `None` for a number that there is not.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        let at = usize::try_from(number).ok()?;
        Self::ALL.get(at).copied()
    }

    /// Its number.
    #[must_use]
    pub fn number(self) -> u32 {
        u32::from(self as u8)
    }
}
