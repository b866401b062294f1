//! What a queue pair holds, and what travels between two.

use std::collections::VecDeque;
use std::sync::Arc;

use kvxfer::leases::LeaseWord;
use kvxfer::transfer::{CompletionStatus, Job, LaneId, PeerKey};
use kvxfer::wire::{Message, PathKind};

use super::memory::BLOCK_CELLS;

pub(crate) type Payload = [u64; BLOCK_CELLS as usize];

/// What a work request does.
#[derive(Debug, Clone)]
pub(crate) enum What {
    Read {
        job: Arc<Job>,
        op: u64,
        remote: u32,
        local: u32,
        len: u32,
    },
    Write {
        job: Arc<Job>,
        op: u64,
        remote: u32,
        local: u32,
        len: u32,
        /// The try of the request that the writer means.
        nonce: u64,
    },
    /// The read of a lease slot.
    Slot {
        slot: u32,
        landing: u32,
    },
    Send(Box<Message>),
}

#[derive(Debug, Clone)]
pub(crate) struct Wr {
    pub(crate) wr_id: u64,
    pub(crate) signaled: bool,
    pub(crate) what: What,
}

/// A request on its way.
#[derive(Debug)]
pub(crate) struct Packet {
    pub(crate) seq: u64,
    pub(crate) what: What,
    /// A WRITE's cells, where they travel with it; on the same host the receiver fetches them.
    pub(crate) payload: Option<Payload>,
}

/// An answer on its way.
#[derive(Debug)]
pub(crate) enum Answer {
    Done { seq: u64, payload: Payload },
    Slot { seq: u64, word: LeaseWord },
    Refused { seq: u64, status: CompletionStatus },
}

/// What the network loses of one queue pair's traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Loss {
    Nothing,
    /// Requests wait somewhere.
    Requests,
    /// Requests arrive, answers do not.
    Answers,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum QpState {
    Works,
    Error,
    Destroyed,
}

/// One end: the half that asks, and whether the half that serves does so.
#[derive(Debug)]
pub(crate) struct Qp {
    pub(crate) life: usize,
    pub(crate) worker: usize,
    pub(crate) key: PeerKey,
    pub(crate) lane: Option<LaneId>,
    pub(crate) remote: Option<usize>,
    pub(crate) path: PathKind,
    pub(crate) rail: usize,
    pub(crate) send_wr: u32,
    pub(crate) state: QpState,
    /// Whether the serving half takes requests; it stops after the first that it refuses.
    pub(crate) serving: bool,
    /// It is not joined yet: what is sent to it is tried again.
    pub(crate) waits: bool,
    /// Not yet confirmed, oldest first, and the number of the oldest.
    pub(crate) sq: VecDeque<Wr>,
    pub(crate) head: u64,
    pub(crate) sent: u64,
    /// Ended work requests that no completion has accounted for.
    pub(crate) silent: u32,
    /// Entries of the send queue in use: a completion gives them back when it is polled.
    pub(crate) used: u32,
    pub(crate) flow: VecDeque<Packet>,
    pub(crate) answers: VecDeque<Answer>,
    pub(crate) loss: Loss,
    /// How long it waits for an answer, all retries together; `None`: for ever.
    pub(crate) patience: Option<u64>,
    pub(crate) waits_since: u64,
}

/// A completion.
#[derive(Debug)]
pub(crate) struct Cqe {
    pub(crate) qp: usize,
    pub(crate) kind: CqeKind,
}

#[derive(Debug)]
pub(crate) enum CqeKind {
    Sent {
        wr_id: u64,
        slots: u32,
        result: Result<(), (CompletionStatus, u32)>,
        what: What,
    },
    Received(Box<Message>),
}

/// The vendor code of a peer that is gone, as the software device has it.
pub(crate) const PEER_GONE: u32 = 1;
pub(crate) const NO_PROGRESS: u32 = 2;
/// Requests on their way at a time.
pub(crate) const WINDOW: u64 = 6;

/// What the serving half may find wrong.
pub(crate) const REFUSALS: [CompletionStatus; 5] = [
    CompletionStatus::RemoteAccess,
    CompletionStatus::RemoteOperation,
    CompletionStatus::RemoteInvalidRequest,
    CompletionStatus::RnrRetryExceeded,
    CompletionStatus::RemoteAborted,
];
/// What the asking half may find wrong before it has sent the request.
pub(crate) const LOCAL: [CompletionStatus; 6] = [
    CompletionStatus::LocalLength,
    CompletionStatus::LocalQpOperation,
    CompletionStatus::LocalProtection,
    CompletionStatus::LocalAccess,
    CompletionStatus::MemoryWindowBind,
    CompletionStatus::Other(77),
];
/// What it may find wrong after it has: the other side may have carried the request out.
pub(crate) const LATE: [CompletionStatus; 3] = [
    CompletionStatus::BadResponse,
    CompletionStatus::ResponseTimeout,
    CompletionStatus::DeviceFatal,
];

pub(crate) fn status_name(status: CompletionStatus) -> &'static str {
    match status {
        CompletionStatus::LocalLength => "completion: local length",
        CompletionStatus::LocalQpOperation => "completion: local queue pair operation",
        CompletionStatus::LocalProtection => "completion: local protection",
        CompletionStatus::Flush => "completion: flush",
        CompletionStatus::MemoryWindowBind => "completion: memory window bind",
        CompletionStatus::BadResponse => "completion: bad response",
        CompletionStatus::LocalAccess => "completion: local access",
        CompletionStatus::RemoteInvalidRequest => "completion: remote invalid request",
        CompletionStatus::RemoteAccess => "completion: remote access",
        CompletionStatus::RemoteOperation => "completion: remote operation",
        CompletionStatus::RetryExceeded => "completion: retries exceeded",
        CompletionStatus::RnrRetryExceeded => "completion: receiver-not-ready retries exceeded",
        CompletionStatus::RemoteAborted => "completion: remote aborted",
        CompletionStatus::DeviceFatal => "completion: device fatal",
        CompletionStatus::ResponseTimeout => "completion: response timeout",
        _ => "completion: unnamed status",
    }
}

impl Qp {
    pub(crate) fn new(
        life: usize,
        worker: usize,
        key: PeerKey,
        path: PathKind,
        rail: usize,
    ) -> Self {
        Self {
            life,
            worker,
            key,
            lane: None,
            remote: None,
            path,
            rail,
            send_wr: 0,
            state: QpState::Works,
            serving: true,
            waits: false,
            sq: VecDeque::new(),
            head: 0,
            sent: 0,
            silent: 0,
            used: 0,
            flow: VecDeque::new(),
            answers: VecDeque::new(),
            loss: Loss::Nothing,
            patience: None,
            waits_since: 0,
        }
    }

    pub(crate) fn works(&self) -> bool {
        self.state == QpState::Works
    }

    pub(crate) fn gives_up_at(&self) -> Option<u64> {
        let waits = self.works() && self.sent > self.head;
        waits.then_some(self.waits_since.checked_add(self.patience?)?)
    }
}

impl What {
    pub(crate) fn job(&self) -> Option<(&Arc<Job>, u64)> {
        match self {
            Self::Read { job, op, .. } | Self::Write { job, op, .. } => Some((job, *op)),
            _ => None,
        }
    }
}
