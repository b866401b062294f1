//! Why a call was not taken.

use super::{Cause, TransferId};

/// Why the ledger did not take a call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// A transfer of that id is in the ledger already.
    #[error("transfer {} exists already", id.0)]
    Duplicate {
        /// The id.
        id: TransferId,
    },
    /// There are as many transfers as allowed, counting those whose memory is quarantined.
    #[error("{limit} transfers are in flight: wait for some to end")]
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// No transfer of that id is in the ledger: there was none, or it has ended.
    #[error("no transfer {}", id.0)]
    Unknown {
        /// The id.
        id: TransferId,
    },
    /// The transfer is a pull: it has one job, and nothing to commit or abort.
    #[error("transfer {} is not a push", id.0)]
    NotAPush {
        /// The id.
        id: TransferId,
    },
    /// The push has been committed.
    #[error("push {} is committed already", id.0)]
    Committed {
        /// The id.
        id: TransferId,
    },
    /// The transfer is ending or has ended; its outcome says why.
    #[error("transfer {} has ended: {cause}", id.0)]
    Ended {
        /// The id.
        id: TransferId,
        /// Why it ended.
        cause: Cause,
    },
}
