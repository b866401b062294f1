//! The thread that works sums out, and the transfers that wait for it.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use tracing::{error, warn};

use super::answer::Answering;
use super::ask::{Asked, Asking, Comparing};
use super::subject::Subject;
use super::tell::Telling;
use crate::engine::books::pack_cause;
use crate::engine::worker::{Command, Live, WorkerHandle};
use crate::engine::{Inner, PeerSession, Runtime};
use crate::error::Error;
use crate::transfer::{Cause, Refusal, TransferId};
use crate::wire::{Blob, Sums, SumsWanted};

/// The most sums of one request.
pub(crate) const MOST_SUMS: u64 = 1 << 23;
/// How long the thread rests when every job waits for a connection that is behind.
const REST: Duration = Duration::from_millis(1);

/// What a turn has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    Over,
    More,
    /// The connection has to catch up first.
    Behind,
}

/// Work for the thread, done turn by turn with others' in between.
pub(super) trait Job: Send {
    fn turn(&mut self) -> Turn;

    /// It will not be done: tells whoever waits for it.
    fn abandon(&mut self, cause: Cause);
}

/// Who waits for sums.
pub(super) enum Waiting {
    /// A pull, for both sides'.
    Pull(Asked),
    /// A push whose sums are told.
    Push,
}

/// The thread's other end. The thread starts when sums are first wanted.
#[derive(Default)]
pub(crate) struct Verifier {
    jobs: OnceLock<Sender<Box<dyn Job>>>,
    starting: Mutex<()>,
    waiting: Mutex<HashMap<TransferId, Waiting>>,
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Verifier")
            .field("started", &self.jobs.get().is_some())
            .finish_non_exhaustive()
    }
}

impl Verifier {
    pub(super) fn waiting(&self) -> MutexGuard<'_, HashMap<TransferId, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the thread if it does not run.
    ///
    /// # Errors
    ///
    /// [`Error::Spawn`], [`Error::ShuttingDown`].
    pub(crate) fn start(&self, runtime: &Arc<Runtime>) -> Result<(), Error> {
        let starting = self.starting.lock();
        let _starting = starting.unwrap_or_else(PoisonError::into_inner);
        if self.jobs.get().is_some() {
            return Ok(());
        }
        let (sender, jobs) = unbounded();
        let (stopped, health) = (runtime.stopped.clone(), Arc::clone(&runtime.health));
        runtime.spawn_link("kvx-sums", move || {
            run(&jobs, &stopped, || health.break_down());
        })?;
        let _ = self.jobs.set(sender);
        Ok(())
    }

    /// Gives a job to the thread; back, if there is none.
    pub(super) fn give<J: Job + 'static>(&self, runtime: &Arc<Runtime>, job: J) -> Result<(), J> {
        if let Err(error) = self.start(runtime) {
            warn!(%error, "checksums");
            return Err(job);
        }
        if let Some(jobs) = self.jobs.get() {
            // The thread ends with the engine, and what waits then ends for that.
            let _ = jobs.send(Box::new(job));
        }
        Ok(())
    }

    /// All data of a transfer is there.
    pub(crate) fn begin(&self, id: TransferId, live: &Live, worker: &WorkerHandle) {
        let Some(of) = &live.verify else {
            return;
        };
        let begun = match live.push {
            true => {
                self.waiting().insert(id, Waiting::Push);
                let telling = Telling::new(Subject::new(id, live, of), worker);
                self.give(&live.engine.runtime, telling).map_err(drop)
            }
            false => {
                let asked = Asked::new(live.peer.key, worker);
                self.waiting().insert(id, Waiting::Pull(asked));
                let asking = Asking::new(Subject::new(id, live, of));
                self.give(&live.engine.runtime, asking).map_err(drop)
            }
        };
        if begun.is_err() {
            self.forget(id);
            let verdict = Err(Box::new(Cause::ShuttingDown.into()));
            worker.send(Command::Verified { id, verdict });
        }
    }

    /// Nobody waits for the sums of a transfer any more.
    pub(crate) fn forget(&self, id: TransferId) {
        self.waiting().remove(&id);
    }

    pub(super) fn is_wanted(&self, id: TransferId) -> bool {
        self.waiting().contains_key(&id)
    }

    /// A peer asks for sums of what is on offer.
    pub(crate) fn asked(&self, engine: &Arc<Inner>, peer: &Arc<PeerSession>, wanted: SumsWanted) {
        let id = wanted.id;
        let refused = match Answering::new(engine, peer, wanted) {
            Some(answering) => match self.give(&engine.runtime, answering) {
                Ok(()) => return,
                Err(mut job) => return job.abandon(Cause::ShuttingDown),
            },
            None => Cause::Refused {
                reason: Refusal::Busy,
            },
        };
        refuse(peer, id, &refused);
    }

    /// Sums that a peer was asked for. The error says why it cannot be trusted any more.
    pub(crate) fn answered(
        &self,
        engine: &Arc<Inner>,
        peer: &PeerSession,
        sums: Sums,
    ) -> Result<(), String> {
        let id = TransferId(sums.id);
        let mut waiting = self.waiting();
        let asked = match waiting.get_mut(&id) {
            Some(Waiting::Pull(asked)) if asked.is_of(peer.key) => asked,
            // Of a pull that has ended.
            _ => return Ok(()),
        };
        if let Some(cause) = &sums.refused {
            let cause = match cause.unpack::<Cause>("cause") {
                Ok(cause @ (Cause::LeaseExpired | Cause::Refused { .. })) => cause,
                // It has no other reason that this side could believe.
                _ => NOT_SUMMED,
            };
            asked.end(id, Err(Box::new(cause.into())));
            waiting.remove(&id);
            return Ok(());
        }
        let comparing = asked.add(id, sums)?;
        drop(waiting);
        self.compare(engine, comparing);
        Ok(())
    }

    pub(super) fn compare(&self, engine: &Arc<Inner>, comparing: Option<Comparing>) {
        let given = comparing.map(|comparing| self.give(&engine.runtime, comparing));
        if let Some(Err(mut job)) = given {
            job.abandon(Cause::ShuttingDown);
        }
    }
}

/// Some side's sums cannot be worked out.
pub(super) const NOT_SUMMED: Cause = Cause::Refused {
    reason: Refusal::Sums,
};

/// Tells a peer that there are no sums, or no more.
pub(super) fn refuse(peer: &PeerSession, id: u64, cause: &Cause) {
    let message = Sums {
        id,
        refused: Some(pack_cause(cause)),
        first: 0,
        sums: Blob::default(),
    };
    peer.link.send(message.into());
}

pub(super) fn stops(engine: &Inner) -> bool {
    engine.runtime.stopping.load(Ordering::Acquire)
}

/// The thread's body: a turn for each job, round and round, until the engine goes.
fn run(jobs: &Receiver<Box<dyn Job>>, stopped: &Receiver<()>, panicked: impl Fn()) {
    let mut open: VecDeque<Box<dyn Job>> = VecDeque::new();
    // How many in a row had to wait.
    let mut behind = 0;
    while !is_over(stopped) {
        if open.is_empty() {
            crossbeam_channel::select! {
                recv(stopped) -> _ => return,
                recv(jobs) -> job => match job {
                    Ok(job) => open.push_back(job),
                    Err(_) => return,
                },
            }
        }
        open.extend(jobs.try_iter());
        let Some(mut job) = open.pop_front() else {
            continue;
        };
        match catch_unwind(AssertUnwindSafe(|| job.turn())) {
            Ok(Turn::Over) => behind = 0,
            Ok(Turn::More) => {
                behind = 0;
                open.push_back(job);
            }
            Ok(Turn::Behind) => {
                behind += 1;
                open.push_back(job);
                if behind >= open.len() {
                    behind = 0;
                    std::thread::sleep(REST);
                }
            }
            Err(_) => {
                error!("the thread of checksums has panicked; the engine takes no new work");
                panicked();
                let abandon = || job.abandon(Cause::WorkerPanicked);
                if catch_unwind(AssertUnwindSafe(abandon)).is_err() {
                    error!("what waited for it ends by its deadline");
                }
            }
        }
    }
}

/// Whether the engine goes: nothing is ever sent there.
fn is_over(stopped: &Receiver<()>) -> bool {
    matches!(
        stopped.recv_timeout(Duration::ZERO),
        Err(RecvTimeoutError::Disconnected)
    )
}
