//! One transfer with several ranks: a part with each, one outcome and one release for its owner.
//!
//! The parts are ordinary transfers, each with its own session, worker and ledger; only their ends are
//! told here instead of to the owner. A part is known by its number and ends once, so whatever is
//! heard twice counts once.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use super::Inner;
use super::handle::{Failure, Outcome, Shared, TransferReport, wake};
use super::peer_session::PeerSession;
use super::worker::{Command, Live, WorkerHandle};
use crate::blocks::GroupBlocks;
use crate::claims::{Claim, Claimant, Purpose};
use crate::error::Error;
use crate::event::{Event, MemoryState, ReleaseReason};
use crate::ids::{Nonce, RequestId};
use crate::transfer::{Cause, TransferId};
use crate::wire::Release;

/// How far one part is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Running,
    /// It has ended, and what it posted may still touch memory.
    Held,
    /// It has ended and touches nothing.
    Free,
}

/// What follows from news of a part, in this order.
#[derive(Debug, Default, PartialEq, Eq)]
struct Next {
    /// The transfer's outcome.
    outcome: Option<Outcome>,
    /// The other parts are of no use any more.
    cancel: bool,
    /// Quarantined memory is the owner's again.
    released: bool,
}

/// The parts of one transfer. Pure.
#[derive(Debug)]
struct Parts {
    parts: Vec<Part>,
    /// The destination blocks of all parts; none of a push.
    blocks: Vec<GroupBlocks>,
    report: TransferReport,
    /// Whether the outcome has been told, and memory is still to be released.
    told: bool,
    quarantined: bool,
    /// The destination blocks, until no part touches them.
    claim: Option<Claim>,
}

impl Parts {
    fn new(count: usize, blocks: Vec<GroupBlocks>) -> Self {
        Self {
            parts: vec![Part::Running; count],
            blocks,
            report: TransferReport::default(),
            told: false,
            quarantined: false,
            claim: None,
        }
    }

    /// There is nothing to do.
    fn nothing(&mut self) -> Next {
        self.told = true;
        Next {
            outcome: Some(Outcome::Done),
            ..Next::default()
        }
    }

    fn all(&self, state: Part) -> bool {
        self.parts.iter().all(|part| *part == state)
    }

    fn has_ended(&self, at: usize) -> bool {
        self.parts
            .get(at)
            .is_some_and(|part| *part != Part::Running)
    }

    /// A part has ended. The first failure is the transfer's, at once: the loss of one rank is not
    /// kept from the owner until the others have drained.
    fn ended(&mut self, at: usize, outcome: &Outcome, report: &TransferReport) -> Next {
        let mut next = Next::default();
        let Some(part) = self.parts.get_mut(at).filter(|p| **p == Part::Running) else {
            return next;
        };
        let held =
            outcome.failure().map(|failure| failure.memory) == Some(MemoryState::Quarantined);
        *part = if held { Part::Held } else { Part::Free };
        add(&mut self.report, report);
        let free = self.all(Part::Free);
        match outcome {
            _ if self.told => next.released = self.take_release(),
            Outcome::Done if free => next.outcome = Some(Outcome::Done),
            Outcome::Done => {}
            Outcome::Failed(failure) => {
                next.cancel = self.parts.contains(&Part::Running);
                self.quarantined = !free;
                next.outcome = Some(Outcome::Failed(Failure {
                    first_cause: failure.first_cause.clone(),
                    // Of a part that has not ended nothing is known, and one that was not begun lists
                    // none.
                    invalid_blocks: match next.cancel || failure.invalid_blocks.is_empty() {
                        true => self.blocks.clone(),
                        false => failure.invalid_blocks.clone(),
                    },
                    memory: match free {
                        true => MemoryState::Released,
                        false => MemoryState::Quarantined,
                    },
                }));
            }
        }
        self.told |= next.outcome.is_some();
        next
    }

    /// Nothing of a part that had ended touches memory any more.
    fn released(&mut self, at: usize) -> Next {
        if let Some(part) = self.parts.get_mut(at).filter(|p| **p == Part::Held) {
            *part = Part::Free;
        }
        Next {
            released: self.take_release(),
            ..Next::default()
        }
    }

    fn take_release(&mut self) -> bool {
        let released = self.told && self.quarantined && self.all(Part::Free);
        self.quarantined &= !released;
        released
    }
}

/// Adds what a part comes to.
fn add(sum: &mut TransferReport, part: &TransferReport) {
    sum.operations += part.operations;
    sum.merged_runs += part.merged_runs;
    sum.bytes += part.bytes;
    sum.prepare += part.prepare;
    sum.post = sum.post.max(part.post);
    sum.wire = sum.wire.max(part.wire);
    sum.data_plane_notice |= part.data_plane_notice;
}

/// A part's transfer, to cancel it.
#[derive(Debug)]
struct Member {
    id: TransferId,
    worker: WorkerHandle,
}

#[derive(Debug, Default)]
struct Members {
    all: Vec<Member>,
    cancelled: bool,
}

/// What a joint transfer is to its owner.
#[derive(Debug)]
pub(crate) struct Whole {
    pub(crate) request: RequestId,
    /// Of the first ticket; [`NO_TICKET`](super::books::NO_TICKET) of a push that was begun without.
    pub(crate) nonce: Nonce,
    pub(crate) tag: u64,
    pub(crate) push: bool,
    /// What is said to the producers when all is done; nothing when the pull holds.
    pub(crate) releases: Vec<(Arc<PeerSession>, Release)>,
}

/// A transfer of several parts. Its workers' ends of the parts share it with the owner's handle.
#[derive(Debug)]
pub(crate) struct Joint {
    engine: Arc<Inner>,
    whole: Whole,
    shared: Arc<Shared>,
    parts: Mutex<Parts>,
    /// A lock of its own: it is taken while `parts` is held, and by who cancels.
    members: Mutex<Members>,
}

impl Joint {
    /// Of `count` parts that are yet to be submitted, and with the destination blocks of a pull.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`].
    pub(crate) fn new(
        engine: &Arc<Inner>,
        whole: Whole,
        count: usize,
        blocks: Vec<GroupBlocks>,
    ) -> Result<Arc<Self>, Error> {
        let who = Claimant {
            request: &whole.request,
            purpose: Purpose::Pull,
        };
        let claim = match whole.push {
            true => None,
            false => Some(engine.claims.claim(who, blocks.clone())?),
        };
        let mut parts = Parts::new(count, blocks);
        parts.claim = claim;
        Ok(Arc::new(Self {
            engine: Arc::clone(engine),
            parts: Mutex::new(parts),
            whole,
            shared: Arc::default(),
            members: Mutex::default(),
        }))
    }

    /// It has no parts: it is done.
    pub(crate) fn is_nothing(&self) {
        self.news(Parts::nothing);
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        // Valid at every step, as the parts are, so a panic elsewhere does not spoil it.
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A part has been submitted. One that comes too late is cancelled with the others.
    pub(crate) fn submitted(&self, id: TransferId, worker: &WorkerHandle) {
        let mut members = self.members();
        if members.cancelled {
            worker.send(Command::Cancel { id });
        }
        members.all.push(Member {
            id,
            worker: worker.clone(),
        });
    }

    /// Ends what runs.
    pub(crate) fn cancel(&self) {
        let mut members = self.members();
        members.cancelled = true;
        for Member { id, worker } in &members.all {
            worker.send(Command::Cancel { id: *id });
        }
    }

    /// Whether parts that are not submitted yet need not be.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.members().cancelled
    }

    fn parts(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn has_ended(&self, at: usize) -> bool {
        self.parts().has_ended(at)
    }

    /// A part was not taken: it ends without having begun.
    pub(crate) fn not_begun(&self, at: usize, cause: Cause) {
        let failure = Failure {
            first_cause: cause,
            invalid_blocks: Vec::new(),
            memory: MemoryState::Released,
        };
        self.ended(at, &Outcome::Failed(failure), &TransferReport::default());
    }

    /// A part has ended.
    fn ended(&self, at: usize, outcome: &Outcome, report: &TransferReport) {
        self.news(|parts| parts.ended(at, outcome, report));
    }

    /// A part that had ended has let go of its memory.
    fn released(&self, at: usize) {
        self.news(|parts| parts.released(at));
    }

    /// Told under the lock: what follows from one part's news comes before what follows from the next.
    fn news(&self, act: impl FnOnce(&mut Parts) -> Next) {
        let mut parts = self.parts();
        let next = act(&mut parts);
        if parts.all(Part::Free) {
            // Before anybody hears: whoever does may use the blocks.
            parts.claim = None;
        }
        if next.cancel {
            self.cancel();
        }
        let waker = next
            .outcome
            .and_then(|outcome| self.tell(outcome, parts.report));
        if next.released {
            self.shared.release();
            self.engine.events.push(Event::Released {
                request: self.whole.request.clone(),
                nonce: self.whole.nonce,
                reason: ReleaseReason::Drained,
            });
        }
        drop(parts);
        // Foreign code.
        wake(waker);
    }

    fn tell(&self, outcome: Outcome, report: TransferReport) -> Option<Waker> {
        let whole = &self.whole;
        if outcome.is_done() {
            for (peer, release) in &whole.releases {
                peer.link.send(release.clone().into());
            }
        }
        let event = end(
            &outcome,
            whole.push,
            whole.request.clone(),
            whole.nonce,
            whole.tag,
        );
        // The handle first: whoever has the event finds the outcome and the report there.
        let waker = self.shared.set(outcome, report);
        self.engine.events.push(event);
        waker
    }
}

/// The event that tells an outcome.
fn end(outcome: &Outcome, push: bool, request: RequestId, nonce: Nonce, tag: u64) -> Event {
    match outcome {
        Outcome::Done if push => Event::Sent {
            request,
            nonce,
            tag,
        },
        Outcome::Done => Event::Received {
            request,
            nonce,
            tag,
        },
        Outcome::Failed(failure) => Event::Failed {
            request,
            nonce,
            tag,
            invalid_blocks: failure.invalid_blocks.clone(),
            first_cause: failure.first_cause.clone(),
            memory: failure.memory,
        },
    }
}

/// Who hears of a transfer's end.
#[derive(Debug)]
pub(crate) enum Told {
    /// Its owner.
    Owner(Arc<Shared>),
    /// The transfer that it is a part of.
    Part {
        /// That transfer.
        joint: Arc<Joint>,
        /// The part's number.
        at: usize,
    },
}

impl Told {
    /// What the transfer's handles share.
    pub(crate) fn shared(&self) -> &Shared {
        match self {
            Self::Owner(shared) => shared,
            Self::Part { joint, .. } => joint.shared(),
        }
    }
}

impl Live {
    /// No worker has taken it. Of a transfer of its own whoever submitted it is told by the error.
    pub(crate) fn not_taken(mut self, cause: Cause) {
        self.claim = None;
        if let Told::Part { joint, at } = &self.told {
            joint.not_begun(*at, cause);
        }
    }

    /// The engine goes, and something may touch the transfer's memory for ever: it is told so, and never that it is
    /// free.
    pub(crate) fn never_over(self) {
        if !self.has_outcome() {
            self.finish(Outcome::Failed(Failure {
                first_cause: Cause::ShuttingDown,
                invalid_blocks: Vec::new(),
                memory: MemoryState::Quarantined,
            }));
        }
        std::mem::forget(self);
    }

    /// Tells the outcome to whom it concerns.
    pub(crate) fn finish(&self, outcome: Outcome) {
        match &self.told {
            Told::Part { joint, at } => joint.ended(*at, &outcome, &self.report),
            Told::Owner(shared) => {
                let (request, nonce) = (self.request.clone(), self.nonce);
                let event = end(&outcome, self.push, request, nonce, self.tag);
                // The handle first: whoever has the event finds the outcome and the report there.
                shared.finish(outcome, self.report);
                self.engine.events.push(event);
            }
        }
    }

    /// Tells that the memory is free, after an outcome that had it quarantined.
    pub(crate) fn free(&self) {
        match &self.told {
            Told::Part { joint, at } => joint.released(*at),
            Told::Owner(shared) => {
                shared.release();
                self.engine.events.push(Event::Released {
                    request: self.request.clone(),
                    nonce: self.nonce,
                    reason: ReleaseReason::Drained,
                });
            }
        }
    }

    pub(crate) fn has_outcome(&self) -> bool {
        match &self.told {
            Told::Owner(shared) => shared.has_outcome(),
            Told::Part { joint, at } => joint.has_ended(*at),
        }
    }
}

impl Drop for Live {
    /// Whoever waits for the transfer hears of its end even if its worker never did: the engine has
    /// gone, or a command has come after the worker's end.
    fn drop(&mut self) {
        let failure = Failure {
            first_cause: Cause::ShuttingDown,
            invalid_blocks: Vec::new(),
            memory: MemoryState::Released,
        };
        let outcome = Outcome::Failed(failure);
        self.claim = None;
        match &self.told {
            Told::Owner(shared) => {
                shared.finish(outcome, self.report);
                shared.release();
            }
            Told::Part { joint, at } => {
                joint.ended(*at, &outcome, &self.report);
                joint.released(*at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BLOCKS: [u32; 2] = [3, 5];

    fn parts(count: usize) -> Parts {
        let blocks = GroupBlocks {
            group: 0,
            blocks: BLOCKS.to_vec(),
        };
        Parts::new(count, vec![blocks])
    }

    fn failed(cause: Cause, memory: MemoryState) -> Outcome {
        Outcome::Failed(Failure {
            first_cause: cause,
            invalid_blocks: vec![GroupBlocks {
                group: 0,
                blocks: vec![5],
            }],
            memory,
        })
    }

    fn invalid(next: &Next) -> Vec<u32> {
        let failure = next.outcome.as_ref().and_then(Outcome::failure);
        let groups = &failure.expect("a failure").invalid_blocks;
        groups.iter().flat_map(|g| g.blocks.clone()).collect()
    }

    #[test]
    fn one_part_that_is_done_twice_is_not_two() {
        let mut all = parts(2);
        let report = TransferReport {
            bytes: 7,
            ..TransferReport::default()
        };
        assert_eq!(all.ended(0, &Outcome::Done, &report), Next::default());
        assert_eq!(all.ended(0, &Outcome::Done, &report), Next::default());
        let next = all.ended(1, &Outcome::Done, &report);
        assert_eq!(next.outcome, Some(Outcome::Done));
        assert_eq!(all.report.bytes, 14);
    }

    #[test]
    fn the_first_failure_is_told_at_once_and_the_memory_with_the_last_part() {
        let mut all = parts(3);
        let none = TransferReport::default();
        all.ended(1, &Outcome::Done, &none);
        let next = all.ended(2, &failed(Cause::PeerDead, MemoryState::Released), &none);
        assert!(next.cancel && !next.released);
        assert_eq!(invalid(&next), BLOCKS, "part 0 has not ended");
        let failure = next.outcome.as_ref().and_then(Outcome::failure);
        assert_eq!(failure.map(|f| f.memory), Some(MemoryState::Quarantined));
        let cancelled = failed(Cause::Cancelled, MemoryState::Quarantined);
        assert_eq!(all.ended(0, &cancelled, &none), Next::default());
        assert!(all.released(0).released);
        assert_eq!(all.released(0), Next::default());
    }

    #[test]
    fn the_last_part_to_fail_alone_says_which_blocks() {
        let mut all = parts(2);
        let none = TransferReport::default();
        all.ended(0, &Outcome::Done, &none);
        let next = all.ended(
            1,
            &failed(Cause::LeaseExpired, MemoryState::Released),
            &none,
        );
        assert_eq!(invalid(&next), [5]);
        assert!(!next.cancel && !next.released);
        assert_eq!(all.released(1), Next::default(), "it was free already");
    }

    /// Nobody has read that part, whatever its own list says.
    #[test]
    fn a_part_that_was_not_begun_makes_all_blocks_invalid() {
        let mut all = parts(2);
        let none = TransferReport::default();
        all.ended(0, &Outcome::Done, &none);
        let failure = Failure {
            first_cause: Cause::PeerDead,
            invalid_blocks: Vec::new(),
            memory: MemoryState::Released,
        };
        let next = all.ended(1, &Outcome::Failed(failure), &none);
        assert_eq!(invalid(&next), BLOCKS);
    }

    #[test]
    fn no_parts_are_done() {
        assert_eq!(parts(0).nothing().outcome, Some(Outcome::Done));
    }

    proptest! {
        /// Whatever order news come in, and however often: one outcome, Done only if every part was;
        /// then at most one release, exactly when the memory was not free, and after every part is.
        #[test]
        fn one_outcome_and_one_release(
            kinds in prop::collection::vec(0..3_u8, 1..6),
            order in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 1..80),
        ) {
            let mut all = parts(kinds.len());
            let mut free = vec![false; kinds.len()];
            let mut ended = vec![false; kinds.len()];
            let mut outcome = None;
            let mut released = 0;
            for (index, release) in order {
                let at = index.index(kinds.len());
                let next = if release {
                    free[at] |= ended[at];
                    all.released(at)
                } else {
                    if !ended[at] {
                        free[at] = kinds[at] != 2;
                    }
                    ended[at] = true;
                    let memory = match kinds[at] {
                        2 => MemoryState::Quarantined,
                        _ => MemoryState::Released,
                    };
                    let how = match kinds[at] {
                        0 => Outcome::Done,
                        _ => failed(Cause::PeerDead, memory),
                    };
                    all.ended(at, &how, &TransferReport::default())
                };
                if let Some(now) = next.outcome {
                    prop_assert_eq!(&outcome, &None);
                    prop_assert!(!next.released);
                    let done = ended.iter().all(|e| *e) && kinds.iter().all(|k| *k == 0);
                    prop_assert_eq!(now.is_done(), done);
                    if let Some(failure) = now.failure() {
                        let all_free = free.iter().all(|f| *f);
                        prop_assert_eq!(failure.memory == MemoryState::Released, all_free);
                    }
                    outcome = Some(now);
                }
                if next.released {
                    released += 1;
                    prop_assert!(free.iter().all(|f| *f));
                    let failure = outcome.as_ref().and_then(Outcome::failure);
                    prop_assert_eq!(failure.map(|f| f.memory), Some(MemoryState::Quarantined));
                }
                let owed = outcome.as_ref().and_then(Outcome::failure).is_some_and(|f| {
                    f.memory == MemoryState::Quarantined
                });
                let due = owed && free.iter().all(|f| *f);
                prop_assert_eq!(released, u32::from(due));
                let over = kinds.iter().zip(&ended).any(|(k, e)| *e && *k != 0)
                    || ended.iter().all(|e| *e);
                prop_assert_eq!(outcome.is_some(), over);
            }
        }
    }
}
