//! The handle of one transfer: a future that can also be polled, waited on and cancelled.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use tracing::error;

use super::health::Health;
use crate::blocks::GroupBlocks;
use crate::error::Error;
use crate::event::MemoryState;
use crate::mem::gather::Fence;
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::transfer::{Cause, TransferId};

/// How a transfer ended. It comes once, by the transfer's deadline.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// Every byte is in place. For a pull, the producer's lease was found live after the last byte.
    Done,
    /// Something went wrong first.
    Failed(Failure),
}

/// Why a transfer failed, and what that means for its memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The first cause; its echoes (flushed work) are not reported.
    pub first_cause: Cause,
    /// Destination blocks whose content is not known to be whole, by group.
    pub invalid_blocks: Vec<GroupBlocks>,
    /// Whether the transfer's local memory may be used again now.
    pub memory: MemoryState,
}

impl Outcome {
    /// Whether the transfer is done.
    #[must_use]
    pub fn is_done(&self) -> bool {
        matches!(self, Outcome::Done)
    }

    /// The failure, if it is one.
    #[must_use]
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Outcome::Done => None,
            Outcome::Failed(failure) => Some(failure),
        }
    }
}

/// What a transfer consisted of and where its time went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TransferReport {
    /// Work requests: after merging and chunking.
    pub operations: u64,
    /// Runs of blocks that were contiguous on both sides and were merged.
    pub merged_runs: u64,
    /// Bytes of all operations; moved, if the transfer is done.
    pub bytes: u64,
    /// Checking and planning, in the caller's thread.
    pub prepare: Duration,
    /// From submission to the last work request posted (by the owner's clock).
    pub post: Duration,
    /// From submission to the outcome.
    pub wire: Duration,
    /// Whether the end of a push was told on the data plane.
    pub data_plane_notice: bool,
}

#[derive(Debug, Default)]
struct State {
    outcome: Option<Outcome>,
    report: TransferReport,
    released: bool,
    waker: Option<Waker>,
}

/// The part of a transfer that its worker and its handles share.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// The last fence that was put on the reader's stream.
    fence: Mutex<Option<Arc<Fence>>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is valid at every step, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn finish(&self, outcome: Outcome, report: TransferReport) {
        wake(self.set(outcome, report));
    }

    /// The same without waking who polls: whoever holds locks does that when they are let go.
    pub(crate) fn set(&self, outcome: Outcome, report: TransferReport) -> Option<Waker> {
        let mut state = self.lock();
        if state.outcome.is_some() {
            return None;
        }
        state.released = match &outcome {
            Outcome::Done => true,
            Outcome::Failed(failure) => failure.memory == MemoryState::Released,
        };
        state.outcome = Some(outcome);
        state.report = report;
        let waker = state.waker.take();
        drop(state);
        self.changed.notify_all();
        waker
    }

    /// Puts a fence on the reader's stream and keeps it. The parts of a transfer do so in turn, so that the one that
    /// is kept is behind the others.
    pub(crate) fn put_fence(
        &self,
        put: impl FnOnce() -> Result<Option<Fence>, Error>,
    ) -> Result<(), Error> {
        let mut fence = self.fence.lock().unwrap_or_else(PoisonError::into_inner);
        *fence = put()?.map(Arc::new);
        Ok(())
    }

    pub(crate) fn has_outcome(&self) -> bool {
        self.lock().outcome.is_some()
    }

    pub(crate) fn release(&self) {
        self.lock().released = true;
        self.changed.notify_all();
    }
}

/// Wakes who polls. A waker is foreign code on a worker's thread: its panic is not the transfers'
/// business.
pub(crate) fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker
        && catch_unwind(AssertUnwindSafe(|| waker.wake())).is_err()
    {
        error!("the waker of a transfer has panicked");
    }
}

/// A running transfer. Dropping the handle detaches it: the transfer goes on, and its end is
/// still told as an event.
#[must_use = "a dropped handle detaches the transfer; its outcome then comes only as an event"]
pub struct Transfer {
    pub(crate) id: TransferId,
    pub(crate) shared: Arc<Shared>,
    pub(crate) canceller: Arc<dyn Fn(TransferId) + Send + Sync>,
    pub(crate) health: Arc<Health>,
}

impl std::fmt::Debug for Transfer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transfer")
            .field("id", &self.id)
            .field("outcome", &self.outcome())
            .finish_non_exhaustive()
    }
}

impl Transfer {
    /// What a forked child is told, which never hears of the outcome.
    fn forked(&self) -> Option<Outcome> {
        let failure = || Failure {
            first_cause: Cause::Forked,
            invalid_blocks: Vec::new(),
            memory: MemoryState::Quarantined,
        };
        self.health.is_forked().then(|| Outcome::Failed(failure()))
    }

    /// The outcome, if it has come.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        self.forked().or_else(|| self.shared.lock().outcome.clone())
    }

    /// Waits for the outcome for at most `timeout`. The transfer itself ends by its own deadline,
    /// whatever is waited here.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> Option<Outcome> {
        self.forked().or_else(|| {
            self.wait_until(timeout, |state| state.outcome.is_some())
                .outcome
                .clone()
        })
    }

    /// Waits until the transfer's local memory may be used again, for at most `timeout`; says
    /// whether it may.
    #[must_use]
    pub fn wait_released(&self, timeout: Duration) -> bool {
        !self.health.is_forked() && self.wait_until(timeout, |state| state.released).released
    }

    /// Whether the transfer's local memory may be used again.
    #[must_use]
    pub fn is_released(&self) -> bool {
        !self.health.is_forked() && self.shared.lock().released
    }

    /// The fence behind which a GPU finds what a pull has brought, if it was given a
    /// [`stream`](super::PullOptions::stream) and is done: it stands on that stream, so what is put there next
    /// comes after it; others wait for its [event](Fence::event). [`Fence::wait`] finds out whether it has
    /// reached all of the GPU's caches.
    #[must_use]
    pub fn fence(&self) -> Option<Arc<Fence>> {
        let fence = self.shared.fence.lock();
        fence.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the transfer consisted of and where its time went; zeros before the outcome.
    #[must_use]
    pub fn report(&self) -> TransferReport {
        if self.health.is_forked() {
            return TransferReport::default();
        }
        self.shared.lock().report
    }

    /// Ends the transfer with [`Cause::Cancelled`] unless its outcome has come already. What is
    /// posted cannot be recalled, so the memory may be quarantined for a while.
    pub fn cancel(&self) {
        if !self.health.is_forked() {
            (self.canceller)(self.id);
        }
    }

    fn wait_until(
        &self,
        timeout: Duration,
        done: impl Fn(&State) -> bool,
    ) -> MutexGuard<'_, State> {
        // A timeout too large for the clock means: no limit but the transfer's own deadline.
        let until = Instant::now().checked_add(timeout);
        let mut state = self.shared.lock();
        while !done(&state) {
            let left = match until {
                Some(until) => until.saturating_duration_since(Instant::now()),
                None => Duration::from_secs(3600),
            };
            if left.is_zero() {
                break;
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        state
    }
}

impl Future for Transfer {
    type Output = Outcome;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        if let Some(outcome) = self.forked() {
            return Poll::Ready(outcome);
        }
        let mut state = self.shared.lock();
        if let Some(outcome) = &state.outcome {
            return Poll::Ready(outcome.clone());
        }
        match &mut state.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn transfer() -> (Transfer, Arc<Shared>) {
        let shared = Arc::new(Shared::default());
        let transfer = Transfer {
            id: TransferId(7),
            shared: Arc::clone(&shared),
            canceller: Arc::new(|_| {}),
            health: Arc::new(Health::new(1)),
        };
        (transfer, shared)
    }

    #[test]
    fn the_first_outcome_stays() {
        let (transfer, shared) = transfer();
        assert_eq!(transfer.outcome(), None);
        assert_eq!(transfer.wait(Duration::ZERO), None);
        shared.finish(Outcome::Done, TransferReport::default());
        let failure = Failure {
            first_cause: Cause::Cancelled,
            invalid_blocks: Vec::new(),
            memory: MemoryState::Quarantined,
        };
        shared.finish(Outcome::Failed(failure), TransferReport::default());
        assert_eq!(transfer.outcome(), Some(Outcome::Done));
        assert!(transfer.is_released());
    }

    #[test]
    fn quarantine_ends_with_release() {
        let (transfer, shared) = transfer();
        let failure = Failure {
            first_cause: Cause::Cancelled,
            invalid_blocks: Vec::new(),
            memory: MemoryState::Quarantined,
        };
        shared.finish(Outcome::Failed(failure), TransferReport::default());
        assert!(!transfer.wait_released(Duration::ZERO));
        let other = Arc::clone(&shared);
        let releaser = std::thread::spawn(move || other.release());
        assert!(transfer.wait_released(Duration::from_secs(60)));
        releaser.join().expect("the releaser does not panic");
    }

    #[test]
    fn a_waker_that_panics_hurts_nobody() {
        struct Faulty;
        impl std::task::Wake for Faulty {
            fn wake(self: Arc<Self>) {
                panic!("a waker's own panic, which the test wants");
            }
        }
        let (mut transfer, shared) = transfer();
        let waker = Waker::from(Arc::new(Faulty));
        assert!(
            Pin::new(&mut transfer)
                .poll(&mut Context::from_waker(&waker))
                .is_pending()
        );
        shared.finish(Outcome::Done, TransferReport::default());
        assert_eq!(transfer.outcome(), Some(Outcome::Done));
    }

    #[test]
    fn a_future_is_woken_by_the_outcome() {
        struct Flag(std::sync::atomic::AtomicBool);
        impl std::task::Wake for Flag {
            fn wake(self: Arc<Self>) {
                self.0.store(true, std::sync::atomic::Ordering::SeqCst);
            }
        }
        let (mut transfer, shared) = transfer();
        let flag = Arc::new(Flag(false.into()));
        let waker = Waker::from(Arc::clone(&flag));
        let mut cx = Context::from_waker(&waker);
        assert!(Pin::new(&mut transfer).poll(&mut cx).is_pending());
        shared.finish(Outcome::Done, TransferReport::default());
        assert!(flag.0.load(std::sync::atomic::Ordering::SeqCst));
        assert_eq!(
            Pin::new(&mut transfer).poll(&mut cx),
            Poll::Ready(Outcome::Done)
        );
    }
}

#[cfg(all(loom, test))]
mod loom_tests {
    use kvxfer_loom::{model, thread};

    use super::tests::transfer;
    use super::*;

    const LONG: Duration = Duration::MAX;

    fn failed(first_cause: Cause) -> Outcome {
        Outcome::Failed(Failure {
            first_cause,
            invalid_blocks: Vec::new(),
            memory: MemoryState::Quarantined,
        })
    }

    /// An executor of one task.
    #[derive(Default)]
    struct Task {
        woken: Mutex<bool>,
        changed: Condvar,
    }

    impl std::task::Wake for Task {
        fn wake(self: Arc<Self>) {
            *self.woken.lock().expect("not poisoned") = true;
            self.changed.notify_all();
        }
    }

    fn block_on(transfer: &mut Transfer) -> Outcome {
        let task = Arc::new(Task::default());
        let waker = Waker::from(Arc::clone(&task));
        loop {
            if let Poll::Ready(outcome) =
                Pin::new(&mut *transfer).poll(&mut Context::from_waker(&waker))
            {
                return outcome;
            }
            let mut woken = task.woken.lock().expect("not poisoned");
            while !std::mem::take(&mut *woken) {
                woken = task.changed.wait(woken).expect("not poisoned");
            }
        }
    }

    #[test]
    fn who_waits_gets_the_only_outcome() {
        model(|| {
            let (transfer, shared) = transfer();
            for cause in [Cause::Cancelled, Cause::PeerDead] {
                let shared = Arc::clone(&shared);
                thread::spawn(move || shared.finish(failed(cause), TransferReport::default()));
            }
            let first = transfer.wait(LONG);
            assert!(first.is_some());
            assert_eq!(transfer.wait(LONG), first);
            thread::yield_now();
            assert_eq!(transfer.outcome(), first);
        });
    }

    #[test]
    fn a_future_is_woken_by_its_outcome() {
        model(|| {
            let (mut transfer, shared) = transfer();
            thread::spawn(move || shared.finish(Outcome::Done, TransferReport::default()));
            assert_eq!(block_on(&mut transfer), Outcome::Done);
        });
    }

    #[test]
    fn who_waits_for_the_memory_hears_of_its_release() {
        model(|| {
            let (transfer, shared) = transfer();
            thread::spawn(move || {
                shared.finish(failed(Cause::Cancelled), TransferReport::default());
                shared.release();
            });
            assert!(transfer.wait_released(LONG));
            assert!(transfer.outcome().is_some());
        });
    }
}
