//! What is on its way when a session is closed on purpose: the ends of pushes go on queue pairs, and the goodbye by the
//! control connection may be quicker. So who closes waits until they are confirmed, and who is told goodbye gives them a
//! moment before what it expects of that peer has failed.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tracing::warn;

use super::Inner;
use super::peer_session::PeerSession;

/// How long who closes waits for it.
pub(crate) const FAREWELL: Duration = Duration::from_secs(1);
/// How long the other side does: what it fails for the goodbye fails so much later.
const MOMENT: Duration = Duration::from_millis(250);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(1);

/// The ends of pushes to a peer that are on their way on queue pairs.
#[derive(Debug, Default)]
pub(crate) struct Untold {
    count: Mutex<usize>,
    none: Condvar,
}

impl Untold {
    fn count(&self) -> MutexGuard<'_, usize> {
        // Valid at every step.
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more.
    pub(crate) fn add(&self) {
        *self.count() += 1;
    }

    /// One has come there, or goes by the control connection.
    pub(crate) fn told(&self) {
        let mut count = self.count();
        *count = count.saturating_sub(1);
        if *count == 0 {
            self.none.notify_all();
        }
    }

    /// No more of them are told: the session is over.
    pub(crate) fn give_up(&self) {
        *self.count() = 0;
        self.none.notify_all();
    }

    /// Waits until there is none; false: it is too late.
    pub(crate) fn wait(&self, until: Instant) -> bool {
        let limit = until.saturating_duration_since(Instant::now());
        let waited = self
            .none
            .wait_timeout_while(self.count(), limit, |count| *count > 0);
        let (count, _) = waited.unwrap_or_else(PoisonError::into_inner);
        *count == 0
    }
}

impl PeerSession {
    /// The session is to be closed: waits until the peer has been told the ends of all pushes to it.
    pub(crate) fn take_leave(&self, until: Instant) {
        if !self.untold.wait(until) {
            warn!(peer = %self.name.engine, "closed before the peer was told the end of every push");
        }
    }

    /// The peer has said goodbye: waits for the ends of pushes that it has begun. A device confirms what it has received
    /// before anybody is told of it, and then the bytes have to be seen and may have to be compared.
    pub(crate) fn hear_out(&self, engine: &Arc<Inner>) {
        let until = Instant::now() + MOMENT;
        let pushes = || {
            engine
                .books
                .with(engine, |books, _| books.expects.is_written_by(self.key))
        };
        while self.notices && pushes() && Instant::now() < until {
            thread::sleep(LOOK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_closes_waits_for_those_under_way_and_no_longer() {
        let untold = Untold::default();
        let soon = || Instant::now() + Duration::from_millis(10);
        assert!(untold.wait(Instant::now()));
        untold.add();
        untold.add();
        untold.told();
        assert!(!untold.wait(soon()));
        thread::scope(|s| {
            s.spawn(|| untold.told());
            assert!(untold.wait(Instant::now() + Duration::from_secs(60)));
        });
        // Once more says nothing.
        untold.told();
        untold.add();
        untold.give_up();
        assert!(untold.wait(Instant::now()));
    }
}
