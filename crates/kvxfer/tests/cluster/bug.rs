//! What is checked, and the faults that are planted to see that the checks find them.

/// A promise that every history keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Invariant {
    /// Each transfer, offer and expectation ends once, and its memory is released once.
    EndsOnce,
    /// The outcome is there by the deadline.
    Deadline,
    /// Memory is not released while an operation may touch it, and nothing touches it later.
    Memory,
    /// What has arrived is what was sent.
    Bytes,
    /// The other side is told after the data, and once.
    Notice,
    /// The first cause is the one that is reported.
    FirstCause,
    /// No queue is overrun, and all credits are back at the end.
    Credits,
    /// A job that can be posted is posted, and not after others for ever.
    Starvation,
    /// Nothing of an earlier life is honoured.
    Generation,
    /// Without faults everything ends well; after them everything ends.
    Converges,
    /// A session keeps to its protocol.
    Session,
}

/// A broken promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Violation {
    pub(crate) invariant: Invariant,
    pub(crate) what: String,
}

/// The end of a step.
pub(crate) type Step = Result<(), Violation>;

macro_rules! ensure {
    ($cond:expr, $invariant:ident, $($why:tt)+) => {
        if !$cond {
            return Err(crate::cluster::bug::Violation {
                invariant: crate::cluster::bug::Invariant::$invariant,
                what: format!($($why)+),
            });
        }
    };
}
pub(super) use ensure;

/// A fault planted in the model, never in the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bug {
    None,
    /// A worker hands an outcome on twice.
    OutcomeTwice,
    /// A worker loses a late release.
    ReleaseLost,
    /// The books hand a release on twice.
    ReleasedTwice,
    /// A worker does not look at the clock.
    DeafWorker,
    /// The time keeper of the books sleeps for ever.
    DeafBooks,
    /// A drain is answered while the queue pairs still work.
    DrainTooSoon,
    /// A revoked push says that it is closed before it has drained.
    ClosedTooSoon,
    /// The consumer takes a reset for done when it has only been asked for.
    ResetTooSoon,
    /// What a scheduler says of writes that were lost on the way is not heard.
    DoubtIgnored,
    /// A lane is taken for settled when this side has taken its half down, and the peer has not.
    SettledTooSoon,
    /// The end of a push is told once, on any lane.
    OneRailTells,
    /// Another lane speaks for a failed rail before the peer has taken its half down.
    SpeaksTooSoon,
    /// A session counts as drained, and a successor of one of its queue pairs is there.
    SuccessorForgotten,
    /// An offer's blocks are given back before its slot is turned over.
    FlipTooLate,
    /// A lease check says yes without looking.
    CheckBlind,
    /// The network delivers another cell than was sent.
    WrongBytes,
    /// A committed push is told as done before its operations are.
    DoneTooSoon,
    /// A notice is sent twice.
    NoticeTwice,
    /// A flush is taken for an error of its own.
    FlushAsError,
    /// A lost peer's transfers are failed with the cause that came last.
    LastCause,
    /// The scheduler believes a send queue larger than it is.
    TooManyCredits,
    /// Every now and then a completion is dropped.
    CompletionLost,
    /// A worker posts to the first lane that has work, whoever's turn it is.
    FavouritePeer,
    /// Tickets of an earlier life are taken.
    OldTicket,
    /// A consumer announces tickets of a life that is not its own.
    ForgedTicket,
    /// Lost sessions are not set up again.
    NoRedial,
    /// A worker forgets a command now and then.
    CommandLost,
}
