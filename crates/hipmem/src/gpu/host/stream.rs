//! The stand-in's streams, each a thread that does one thing after the other, and its events.

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use super::lock;

type Job = Box<dyn FnOnce() + Send>;

pub(super) struct HostStream {
    jobs: Mutex<Sender<Job>>,
    state: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Default)]
struct State {
    put: u64,
    done: u64,
}

impl HostStream {
    /// Its thread ends when the value has gone and all that was put has been done.
    pub(super) fn start() -> Option<Self> {
        let (jobs, queue) = channel::<Job>();
        let state = Arc::new((Mutex::<State>::default(), Condvar::new()));
        let shared = Arc::clone(&state);
        let thread = std::thread::Builder::new().name("kvx-host-gpu".to_owned());
        let run = move || {
            for job in queue {
                job();
                let (state, changed) = &*shared;
                lock(state).done += 1;
                changed.notify_all();
            }
        };
        thread.spawn(run).ok()?;
        let jobs = Mutex::new(jobs);
        Some(Self { jobs, state })
    }

    pub(super) fn put(&self, job: impl FnOnce() + Send + 'static) {
        // Counting and sending are one, so that what is counted first is done first.
        let jobs = lock(&self.jobs);
        lock(&self.state.0).put += 1;
        // The thread takes jobs for as long as there is a sender.
        let _ = jobs.send(Box::new(job));
    }

    pub(super) fn is_done(&self) -> bool {
        let state = lock(&self.state.0);
        state.done == state.put
    }

    /// Waits until what has been put before is done.
    pub(super) fn wait(&self) {
        let (state, changed) = &*self.state;
        let mut now = lock(state);
        let all = now.put;
        while now.done < all {
            now = changed.wait(now).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

pub(super) struct HostEvent {
    pub(super) timing: bool,
    marks: Mutex<Marks>,
    changed: Condvar,
}

#[derive(Default)]
struct Marks {
    recorded: u64,
    reached: u64,
    at: Option<Instant>,
}

impl HostEvent {
    pub(super) fn new(timing: bool) -> Self {
        Self {
            timing,
            marks: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// The latest record, which whoever waits from now on waits for.
    pub(super) fn mark(&self) -> u64 {
        lock(&self.marks).recorded
    }

    pub(super) fn record(&self) -> u64 {
        let mut marks = lock(&self.marks);
        marks.recorded += 1;
        marks.recorded
    }

    pub(super) fn reach(&self, mark: u64) {
        let mut marks = lock(&self.marks);
        if mark > marks.reached {
            marks.reached = mark;
            marks.at = Some(Instant::now());
        }
        drop(marks);
        self.changed.notify_all();
    }

    pub(super) fn wait_for(&self, mark: u64) {
        let mut marks = lock(&self.marks);
        while marks.reached < mark {
            marks = self
                .changed
                .wait(marks)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn is_done(&self) -> bool {
        let marks = lock(&self.marks);
        marks.reached == marks.recorded
    }

    pub(super) fn reached_at(&self) -> Option<Instant> {
        let marks = lock(&self.marks);
        (marks.reached == marks.recorded)
            .then_some(marks.at)
            .flatten()
    }
}
