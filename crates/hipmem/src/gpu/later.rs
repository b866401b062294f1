//! Calls that take what peers have lent from a GPU, made when no kernel can be waiting for a launch.
//!
//! The driver lets such a call wait for all kernels, and launches for the call ([`pool`](super::pool)): a kernel that
//! posts, and waits for what a launch is to bring, would keep both from ending.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::device::Gpu;

/// How long a call is put off at most, though queues come and go without a gap: a peer that has begun anew may need the
/// memory that its last life has lent. Kernels that wait then may wait as long as they are patient.
pub(super) const LONGEST: Duration = Duration::from_secs(10);

/// How long who makes a queue waits for calls that are being made, which wait for kernels that nobody here knows of.
const MOST_AHEAD: Duration = Duration::from_secs(5);

type Call = Box<dyn FnOnce() + Send>;

/// What is put off, of all GPUs of a runtime: what is pinned for one is pinned for all.
pub(super) struct Later {
    state: Mutex<State>,
    changed: Condvar,
    longest: Duration,
}

#[derive(Default)]
struct State {
    /// Queues that kernels may post to.
    queues: usize,
    /// Who makes calls because there are no queues.
    calling: usize,
    /// What is put off, and until when at most.
    calls: Vec<(Instant, Call)>,
    has_thread: bool,
    /// The last queue has gone, and its place among `calling` is the thread's.
    is_called: bool,
}

impl State {
    /// Gives the thread its place, now: or the next queue would be there before the thread has looked.
    fn call_if_quiet(&mut self) {
        if self.queues == 0 && !self.calls.is_empty() && !self.is_called {
            self.is_called = true;
            self.calling += 1;
        }
    }
}

impl Later {
    pub(super) fn new(longest: Duration) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            longest,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all calls have been made.
    #[cfg(test)]
    pub(super) fn settle(&self) {
        let some = |state: &mut State| state.calling > 0 || !state.calls.is_empty();
        let waited = self.changed.wait_while(self.lock(), some);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Makes what is put off, there being no thread for it.
    fn make_all(&self) {
        let mut state = self.lock();
        let calls = std::mem::take(&mut state.calls);
        let _calling = std::mem::take(&mut state.is_called).then(|| Calling(self));
        state.has_thread = false;
        drop(state);
        calls.into_iter().for_each(|(_, call)| call());
    }

    /// Makes what is put off, when there are no queues or each in its time, until nothing is left.
    fn make_calls(&self) {
        let mut state = self.lock();
        loop {
            let Some(first) = state.calls.iter().map(|(until, _)| *until).min() else {
                state.has_thread = false;
                return;
            };
            let left = first.saturating_duration_since(Instant::now());
            if !state.is_called && !left.is_zero() {
                let waited = self.changed.wait_timeout(state, left);
                (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let quiet = std::mem::take(&mut state.is_called);
            let (calls, rest) = match quiet {
                true => (std::mem::take(&mut state.calls), Vec::new()),
                // The others may yet come to a time without queues.
                false => {
                    let now = Instant::now();
                    let all = std::mem::take(&mut state.calls).into_iter();
                    all.partition(|(until, _)| *until <= now)
                }
            };
            state.calls = rest;
            drop(state);
            let calling = quiet.then(|| Calling(self));
            for (_, call) in calls {
                // One that panics keeps no other from being made.
                let _ = catch_unwind(AssertUnwindSafe(call));
            }
            drop(calling);
            state = self.lock();
        }
    }
}

/// One of `calling`.
struct Calling<'a>(&'a Later);

impl Drop for Calling<'_> {
    fn drop(&mut self) {
        self.0.lock().calling -= 1;
        self.0.changed.notify_all();
    }
}

/// For as long as it is there, and not over, kernels may wait for what the host is to launch.
pub(super) struct PostedTo {
    later: Arc<Later>,
    is_over: AtomicBool,
}

impl PostedTo {
    /// Waits for calls that are being made, for some seconds at most.
    pub(super) fn begin(gpu: &Gpu) -> Self {
        let later = Arc::clone(gpu.later());
        let calling = |state: &mut State| state.calling > 0;
        let waited = (later.changed).wait_timeout_while(later.lock(), MOST_AHEAD, calling);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.queues += 1;
        drop(state);
        Self {
            later,
            is_over: AtomicBool::new(false),
        }
    }

    /// No kernel waits any more that is to be waited for.
    pub(super) fn end(&self) {
        if self.is_over.swap(true, Ordering::Relaxed) {
            return;
        }
        let mut state = self.later.lock();
        state.queues -= 1;
        state.call_if_quiet();
        drop(state);
        self.later.changed.notify_all();
    }
}

impl Drop for PostedTo {
    fn drop(&mut self) {
        self.end();
    }
}

impl Gpu {
    /// Waits, for so long at most, until what peers had lent has gone back, unless that is put off: for who ends, and a
    /// process whose driver may end beside it.
    pub fn settle(&self, within: Duration) {
        let later = self.later();
        let calling = |state: &mut State| state.calling > 0;
        let waited = (later.changed).wait_timeout_while(later.lock(), within, calling);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Makes a call that waits for all kernels, by a thread of its own: at once, or, as long as there are queues that
    /// kernels post to, later. Who comes here may be a worker, for which kernels of others wait.
    pub(super) fn when_nobody_posts(&self, call: impl FnOnce() + Send + 'static) {
        let later = self.later();
        let mut state = later.lock();
        let until = Instant::now() + later.longest;
        state.calls.push((until, Box::new(call)));
        state.call_if_quiet();
        later.changed.notify_all();
        if std::mem::replace(&mut state.has_thread, true) {
            return;
        }
        drop(state);
        let of_thread = Arc::clone(later);
        let named = thread::Builder::new().name("kvx-free".to_owned());
        if let Err(error) = named.spawn(move || of_thread.make_calls()) {
            tracing::warn!(%error, "no thread to give back what peers have lent: kernels may wait for it");
            later.make_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};

    use super::*;
    use crate::error::Error;
    use crate::gpu::{GpuRuntime, RuntimeChoice, RuntimeKind};

    const SOON: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(30);

    fn gpu(longest: Duration) -> Result<Gpu, Error> {
        let runtime = GpuRuntime::open(RuntimeChoice::Only(RuntimeKind::Host))?;
        // Other tests have queues of the shared one.
        Ok(runtime.gpu(0)?.apart(longest))
    }

    /// A call that says so when it is made.
    fn call(gpu: &Gpu) -> Receiver<()> {
        let (told, made) = channel();
        gpu.when_nobody_posts(move || {
            let _ = told.send(());
        });
        made
    }

    const WAITS: Result<(), RecvTimeoutError> = Err(RecvTimeoutError::Timeout);

    #[test]
    fn calls_wait_for_queues() -> Result<(), Error> {
        let gpu = &gpu(LONG * 100)?;
        assert_eq!(call(gpu).recv_timeout(LONG), Ok(()), "at once");
        let (first, second) = (PostedTo::begin(gpu), PostedTo::begin(gpu));
        let calls = [call(gpu), call(gpu)];
        drop(first);
        assert_eq!(calls[0].recv_timeout(SOON), WAITS);
        // It is over once, though it goes later.
        second.end();
        for call in &calls {
            assert_eq!(call.recv_timeout(LONG), Ok(()));
        }
        drop(second);
        assert_eq!(call(gpu).recv_timeout(LONG), Ok(()), "at once");
        Ok(())
    }

    #[test]
    fn new_queues_wait_for_calls() -> Result<(), Error> {
        let gpu = &gpu(LONG * 100)?;
        let queue = PostedTo::begin(gpu);
        let (begun, has_begun) = channel();
        let (go_on, goes_on) = channel::<()>();
        gpu.when_nobody_posts(move || {
            let _ = begun.send(());
            let _ = goes_on.recv();
        });
        drop(queue);
        let (made, is_made) = channel();
        let maker = gpu.clone();
        // At once, whether or not the thread has seen that there was none.
        let maker = thread::spawn(move || {
            let queue = PostedTo::begin(&maker);
            let _ = made.send(());
            drop(queue);
        });
        assert_eq!(has_begun.recv_timeout(LONG), Ok(()));
        assert_eq!(is_made.recv_timeout(SOON), WAITS);
        drop(go_on);
        assert_eq!(is_made.recv_timeout(LONG), Ok(()));
        assert!(maker.join().is_ok());
        Ok(())
    }

    #[test]
    fn who_ends_waits_for_calls_that_are_being_made_and_no_others() -> Result<(), Error> {
        let gpu = &gpu(LONG * 100)?;
        gpu.settle(LONG);
        let made = Arc::new(AtomicBool::new(false));
        let is_made = Arc::clone(&made);
        gpu.when_nobody_posts(move || {
            thread::sleep(SOON);
            is_made.store(true, Ordering::Relaxed);
        });
        gpu.settle(LONG);
        assert!(made.load(Ordering::Relaxed));
        let queue = PostedTo::begin(gpu);
        let put_off = call(gpu);
        gpu.settle(LONG * 100);
        assert!(put_off.try_recv().is_err());
        drop(queue);
        Ok(())
    }

    #[test]
    fn each_call_is_put_off_for_so_long_at_most() -> Result<(), Error> {
        let longest = 10 * SOON;
        let gpu = &gpu(longest)?;
        let queue = PostedTo::begin(gpu);
        let since = Instant::now();
        let first = call(gpu);
        thread::sleep(5 * SOON);
        let (later, second) = (Instant::now(), call(gpu));
        assert_eq!(first.recv_timeout(LONG), Ok(()));
        assert!(since.elapsed() >= longest);
        // And nobody waits for it to be over.
        drop(PostedTo::begin(gpu));
        assert_eq!(second.recv_timeout(LONG), Ok(()));
        assert!(later.elapsed() >= longest);
        drop(queue);
        Ok(())
    }

    #[test]
    fn a_call_that_panics_keeps_nobody_up() -> Result<(), Error> {
        let gpu = &gpu(LONG * 100)?;
        let queue = PostedTo::begin(gpu);
        gpu.when_nobody_posts(|| panic!("planted"));
        let behind = call(gpu);
        drop(queue);
        assert_eq!(behind.recv_timeout(LONG), Ok(()));
        gpu.when_nobody_posts(|| panic!("planted"));
        assert_eq!(call(gpu).recv_timeout(LONG), Ok(()));
        gpu.later().settle();
        Ok(())
    }
}
