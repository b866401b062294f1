//! Why a transfer did not succeed, and what an engine can do about it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::gpu_queue::PostFault;
use crate::ids::RequestId;
use crate::plan::MissingPart;
use crate::wire::ErrorCode;

/// What an engine can do after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Class {
    /// The same call may succeed: the data is still there as far as anyone knows.
    Retry,
    /// The data cannot be had from there any more: prefill again.
    Recompute,
    /// A mistake in a program or a configuration, or a device that refuses: trying again is no use.
    Fatal,
}

/// How a work request ended, in the words of the verbs (`IBV_WC_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum CompletionStatus {
    /// A local length error: a message longer than the port or the receive takes.
    LocalLength,
    /// A local queue pair operation error.
    LocalQpOperation,
    /// The local key, its bounds or its access do not allow the request.
    LocalProtection,
    /// The queue pair was in the error state: an echo of another failure.
    Flush,
    /// A memory window could not be bound.
    MemoryWindowBind,
    /// The responder answered with an unexpected opcode.
    BadResponse,
    /// The local side may not touch the buffer the responder's data is for.
    LocalAccess,
    /// The responder found the request invalid.
    RemoteInvalidRequest,
    /// The remote key, its bounds, its access or its generation do not allow the request.
    RemoteAccess,
    /// The responder could not complete the request.
    RemoteOperation,
    /// The peer did not acknowledge within all retries.
    RetryExceeded,
    /// The peer had no receive posted within all retries.
    RnrRetryExceeded,
    /// The peer cancelled the operation.
    RemoteAborted,
    /// The device failed.
    DeviceFatal,
    /// No response within the device's own limit.
    ResponseTimeout,
    /// A status that this version has no name for, as the device gave it.
    Other(u32),
}

/// Why a peer refused a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Refusal {
    /// It knows no such request.
    UnknownRequest,
    /// The request was of an earlier try, or already ended.
    Late,
    /// The ticket or the keys belong to an earlier life of the engine.
    OldGeneration,
    /// The blocks are outside what was agreed.
    OutOfRange,
    /// The two formats do not fit.
    FormatMismatch,
    /// This side may not ask for that.
    NotAuthorised,
    /// It has reached a limit; later it may accept.
    Busy,
    /// Checksums cannot be worked out: too many, or of blocks in too many pieces.
    Sums,
}

/// A block whose checksums are not the same on both sides: what has arrived is not what was sent, or it
/// was changed before it could be compared.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[error(
    "request {request} has arrived changed: group {group} layer {layer} {tensor}, block {block}: checksum {here:016x} here, {there:016x} at the producer{}", more(*.blocks)
)]
#[non_exhaustive]
pub struct Corrupt {
    /// The request.
    pub request: RequestId,
    /// Index of the cache group.
    pub group: u32,
    /// The layer, over the whole model.
    pub layer: u32,
    /// The tensor's name, at the consumer.
    pub tensor: String,
    /// The consumer's block.
    pub block: u32,
    /// The sum of what the consumer has; where blocks are of unequal size, of the part of the block that
    /// the first difference is in.
    pub here: u64,
    /// The sum of what the producer has.
    pub there: u64,
    /// How many of the consumer's blocks differ, this one included.
    pub blocks: u64,
}

fn more(blocks: u64) -> String {
    match blocks {
        0 | 1 => String::new(),
        blocks => format!("; {blocks} blocks differ"),
    }
}

/// The first cause of a failure. Echoes (flushes) are counted elsewhere and never stand here.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum Cause {
    /// A work request completed in error.
    #[error("work request failed: {status} (vendor error {vendor:#x})")]
    Completion {
        /// The device's status.
        status: CompletionStatus,
        /// The device's own code; 0 when it has none.
        vendor: u32,
    },
    /// The device did not take a work request.
    #[error("posting a work request: errno {errno}")]
    Post {
        /// The errno.
        errno: i32,
    },
    /// The local device or the memory it works on failed in an operation other than posting.
    #[error("{operation}: errno {errno}")]
    LocalDevice {
        /// What was tried.
        operation: LocalOperation,
        /// The errno.
        errno: i32,
    },
    /// A GPU of whoever has the destination refused something or failed; the log there has its words.
    #[error("{operation}: the GPU's code {code}")]
    Gpu {
        /// What was tried.
        operation: GpuOperation,
        /// The runtime's code; 0 where it has said nothing.
        code: u32,
    },
    /// A kernel has posted what cannot be done.
    #[error("post {post} of a kernel: {fault}")]
    KernelPost {
        /// Which post of its queue, from 0. Over links puts have no numbers, and it is 0.
        post: u64,
        /// What is wrong with it.
        fault: PostFault,
    },
    /// The queue pair went to the error state and no request was named for it.
    #[error("queue pair failed")]
    LaneFailed,
    /// The queue pair went to the error state, and the device has told so by an event.
    #[error("queue pair failed: {event}")]
    QueuePair {
        /// The event.
        event: QpEvent,
    },
    /// The completion queue of the queue pair failed.
    #[error("completion queue failed")]
    CompletionQueue,
    /// The port of this side's device is down, or was while the work was tried.
    #[error("port {port} of the device is down")]
    PortDown {
        /// The port's number on the device, from 1.
        port: u8,
    },
    /// The device of this side failed as a whole.
    #[error("device failed")]
    DeviceFatal,
    /// This side reset the queue pair, to drain it or because it was no longer wanted.
    #[error("queue pair reset by this side")]
    LaneReset,
    /// The peer has taken its half of the queue pair down, and the session goes on.
    #[error("queue pair taken down by the peer")]
    PeerReset,
    /// The peer's process ended.
    #[error("peer is dead")]
    PeerDead,
    /// The peer is there and does not answer.
    #[error("peer is stalled: silent for {silent_ms} ms")]
    PeerStalled {
        /// How long it has been silent, in milliseconds.
        silent_ms: u64,
    },
    /// The peer came back as a new generation.
    #[error("peer restarted")]
    PeerRestarted,
    /// The peer cannot be reached.
    #[error("peer is unreachable")]
    PeerUnreachable,
    /// This side has cut the peer off: what it sent cannot be true, or breaks the protocol.
    #[error("peer was cut off: {reason}")]
    CutOff {
        /// What was wrong; the log has the details.
        reason: ErrorCode,
    },
    /// The peer closed the connection in good order.
    #[error("peer closed the connection")]
    PeerClosed,
    /// The deadline passed first.
    #[error("deadline passed")]
    DeadlinePassed,
    /// The engine cancelled it.
    #[error("cancelled")]
    Cancelled,
    /// The producer's lease ran out before the data was complete.
    #[error("lease expired")]
    LeaseExpired,
    /// The producer took the blocks back.
    #[error("retracted by the producer")]
    Retracted,
    /// The producer aborted the push.
    #[error("push aborted by the producer")]
    Aborted,
    /// The consumer no longer wants the push.
    #[error("revoked by the consumer")]
    Revoked,
    /// As many producers as were expected have pushed, and together they do not keep all of the blocks.
    #[error("the ranks that have pushed do not keep {part}")]
    MissingPart {
        /// Something that is missing.
        part: Box<MissingPart>,
    },
    /// Blocks have other checksums than at the producer.
    #[error(transparent)]
    Corrupt(Box<Corrupt>),
    /// The peer refused.
    #[error("refused by the peer: {reason}")]
    Refused {
        /// Its reason.
        reason: Refusal,
    },
    /// No path to the peer can carry the transfer.
    #[error("no usable path to the peer")]
    NoPath,
    /// The engine is shutting down.
    #[error("engine is shutting down")]
    ShuttingDown,
    /// The workers said that all was over, and operations were missing: a defect of this library.
    #[error("{missing} operations were never confirmed")]
    LostWork {
        /// How many.
        missing: u64,
    },
    /// A thread of this engine panicked, a worker's mostly: a defect.
    #[error("a thread of this engine has panicked")]
    WorkerPanicked,
    /// The transfer belongs to another process, of which this one is a fork.
    #[error("the transfer belongs to the process that this one was forked from")]
    Forked,
}

/// What a device tells of a queue pair that failed with no request of its own to blame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum QpEvent {
    /// An error that it could not tell by a completion.
    Fatal,
    /// A request of the peer that was not valid.
    RequestError,
    /// A request of the peer that broke the rights of local memory.
    AccessError,
}

/// What was tried on the local device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum LocalOperation {
    /// Registering memory.
    Register,
    /// Creating or changing a queue pair.
    QueuePair,
    /// Polling a completion queue.
    Poll,
    /// Mapping the peer's memory.
    Map,
}

/// What was tried on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum GpuOperation {
    /// Waiting for work of the engine's.
    Wait,
    /// The fence around what is read or has been written.
    Fence,
    /// Copying blocks.
    Gather,
    /// Making what a network card has written visible to the GPU.
    Visibility,
}

impl fmt::Display for GpuOperation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Wait => "waiting for the engine's work on a GPU",
            Self::Fence => "a fence on a GPU",
            Self::Gather => "copying blocks between GPUs",
            Self::Visibility => "making what a network card wrote visible to a GPU",
        })
    }
}

impl Cause {
    /// What an engine can do about it.
    #[must_use]
    pub fn class(&self) -> Class {
        use CompletionStatus as S;
        match self {
            Self::Completion { status, .. } => match status {
                S::RetryExceeded | S::RnrRetryExceeded | S::ResponseTimeout | S::Flush => {
                    Class::Retry
                }
                // The keys or the memory behind them are gone at the peer.
                S::RemoteAccess | S::RemoteOperation | S::RemoteAborted => Class::Recompute,
                _ => Class::Fatal,
            },
            Self::LaneFailed
            | Self::QueuePair { .. }
            | Self::CompletionQueue
            | Self::PortDown { .. }
            | Self::LaneReset
            | Self::PeerReset
            | Self::PeerStalled { .. }
            | Self::PeerUnreachable
            | Self::PeerClosed
            | Self::Cancelled => Class::Retry,
            Self::PeerDead
            | Self::PeerRestarted
            | Self::CutOff { .. }
            | Self::DeadlinePassed
            | Self::LeaseExpired
            | Self::Retracted
            | Self::Aborted
            | Self::Revoked
            | Self::Corrupt(_) => Class::Recompute,
            Self::Refused { reason } => match reason {
                Refusal::Busy => Class::Retry,
                Refusal::UnknownRequest | Refusal::Late | Refusal::OldGeneration => {
                    Class::Recompute
                }
                Refusal::OutOfRange
                | Refusal::FormatMismatch
                | Refusal::NotAuthorised
                | Refusal::Sums => Class::Fatal,
            },
            Self::MissingPart { .. }
            | Self::Post { .. }
            | Self::LocalDevice { .. }
            | Self::Gpu { .. }
            | Self::KernelPost { .. }
            | Self::NoPath
            | Self::ShuttingDown
            | Self::LostWork { .. }
            | Self::DeviceFatal
            | Self::WorkerPanicked
            | Self::Forked => Class::Fatal,
        }
    }

    /// Whether this is often only what the end of the peer has done to its queue pairs, and the end
    /// itself is heard of a moment later.
    pub(crate) fn may_follow_the_peers_end(&self) -> bool {
        matches!(
            self,
            Self::LaneReset | Self::PeerReset | Self::LaneFailed | Self::Completion { .. }
        )
    }

    /// Whether the responder itself has said it, and so takes nothing more from the queue pair.
    /// Otherwise what was sent may still be carried out, although the device here has let go of it.
    #[must_use]
    pub fn stops_responder(&self) -> bool {
        use CompletionStatus as S;
        let Self::Completion { status, .. } = self else {
            return false;
        };
        matches!(
            status,
            S::RemoteInvalidRequest | S::RemoteAccess | S::RemoteOperation
        )
    }

    /// Whether it is about a queue pair or what that stands on, by the device's own word, and not about
    /// one request: all that was lost with the queue pair was lost to this.
    #[must_use]
    pub fn is_of_lane(&self) -> bool {
        matches!(
            self,
            Self::QueuePair { .. }
                | Self::CompletionQueue
                | Self::PortDown { .. }
                | Self::DeviceFatal
        )
    }

    /// Whether it has befallen the way that a queue pair goes, or the device or port that it begins or ends
    /// at: it says nothing against the request that it was told for, which may do well over another rail.
    #[must_use]
    pub fn is_of_path(&self) -> bool {
        use CompletionStatus as S;
        match self {
            Self::PortDown { .. } | Self::DeviceFatal | Self::CompletionQueue | Self::PeerReset => {
                true
            }
            Self::Completion { status, .. } => matches!(
                status,
                S::RetryExceeded | S::ResponseTimeout | S::DeviceFatal
            ),
            _ => false,
        }
    }

    /// Whether one queue pair has failed or was taken down, and neither the way that it goes nor a side of it: what was lost with
    /// it does well on another, or on its successor.
    #[must_use]
    pub fn is_of_one_lane(&self) -> bool {
        match self {
            Self::LaneFailed
            | Self::LaneReset
            | Self::QueuePair { .. }
            | Self::PeerReset
            | Self::Post { .. } => true,
            Self::Completion { .. } => !self.is_of_path(),
            _ => false,
        }
    }

    /// Whether it is about the peer as a whole, which the software device says of one request: the others of
    /// its queue pair were lost to the same.
    #[must_use]
    pub(super) fn is_of_peer(&self) -> bool {
        matches!(
            self,
            Self::PeerDead | Self::PeerRestarted | Self::PeerStalled { .. } | Self::PeerClosed
        )
    }

    /// Whether this only echoes another failure of the same queue pair.
    #[must_use]
    pub fn is_flush(&self) -> bool {
        matches!(
            self,
            Self::Completion {
                status: CompletionStatus::Flush,
                ..
            }
        )
    }
}

impl fmt::Display for CompletionStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = match self {
            Self::LocalLength => "local length error",
            Self::LocalQpOperation => "local queue pair operation error",
            Self::LocalProtection => "local protection error",
            Self::Flush => "flushed",
            Self::MemoryWindowBind => "memory window bind error",
            Self::BadResponse => "bad response",
            Self::LocalAccess => "local access error",
            Self::RemoteInvalidRequest => "remote invalid request",
            Self::RemoteAccess => "remote access error",
            Self::RemoteOperation => "remote operation error",
            Self::RetryExceeded => "transport retries exceeded",
            Self::RnrRetryExceeded => "receiver-not-ready retries exceeded",
            Self::RemoteAborted => "remote aborted",
            Self::DeviceFatal => "device fatal error",
            Self::ResponseTimeout => "response timeout",
            Self::Other(code) => return write!(f, "status {code}"),
        };
        f.write_str(words)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UnknownRequest => "unknown request",
            Self::Late => "too late",
            Self::OldGeneration => "of an earlier life of the engine",
            Self::OutOfRange => "outside the agreed blocks",
            Self::FormatMismatch => "formats do not fit",
            Self::NotAuthorised => "not authorised",
            Self::Busy => "busy",
            Self::Sums => "checksums cannot be worked out: too many, or of too many pieces",
        })
    }
}

impl fmt::Display for QpEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fatal => "fatal error",
            Self::RequestError => "invalid request of the peer",
            Self::AccessError => "a request of the peer without the right",
        })
    }
}

impl fmt::Display for LocalOperation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Register => "registering memory",
            Self::QueuePair => "changing a queue pair",
            Self::Poll => "polling a completion queue",
            Self::Map => "mapping the peer's memory",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_flush_is_an_echo() {
        assert!(
            Cause::Completion {
                status: CompletionStatus::Flush,
                vendor: 0
            }
            .is_flush()
        );
        assert!(
            !Cause::Completion {
                status: CompletionStatus::RemoteAccess,
                vendor: 0
            }
            .is_flush()
        );
        assert!(!Cause::LaneReset.is_flush());
    }

    #[test]
    fn classes() {
        let remote = Cause::Completion {
            status: CompletionStatus::RemoteAccess,
            vendor: 3,
        };
        assert_eq!(remote.class(), Class::Recompute);
        assert_eq!(
            remote.to_string(),
            "work request failed: remote access error (vendor error 0x3)"
        );
        assert_eq!(Cause::PeerUnreachable.class(), Class::Retry);
        let of_lane = [
            (Cause::PortDown { port: 1 }, Class::Retry),
            (Cause::CompletionQueue, Class::Retry),
            (Cause::DeviceFatal, Class::Fatal),
            (
                Cause::QueuePair {
                    event: QpEvent::AccessError,
                },
                Class::Retry,
            ),
        ];
        for (cause, class) in of_lane {
            assert_eq!(cause.class(), class, "{cause}");
            // The device here knows nothing of what the peer has carried out.
            assert!(cause.is_of_lane() && !cause.stops_responder() && !cause.is_flush());
        }
        assert!(!remote.is_of_lane() && !Cause::LaneFailed.is_of_lane());
        assert!(!remote.is_of_path() && !Cause::LaneFailed.is_of_path());
        let late = Cause::Completion {
            status: CompletionStatus::RetryExceeded,
            vendor: 0,
        };
        assert!(late.is_of_path() && Cause::DeviceFatal.is_of_path());
        assert_eq!(
            Cause::Refused {
                reason: Refusal::FormatMismatch
            }
            .class(),
            Class::Fatal
        );
    }

    #[test]
    fn a_cause_travels() {
        let cause = Cause::Completion {
            status: CompletionStatus::Other(99),
            vendor: 1,
        };
        let bytes = rmp_serde::to_vec(&cause).expect("a cause encodes");
        let back: Cause = rmp_serde::from_slice(&bytes).expect("and decodes");
        assert_eq!(back, cause);
    }
}
