//! Calls that take what peers have lent from a GPU, made when no kernel can be waiting for a launch.
//!
//! The driver lets such a call wait for all kernels, and launches for the call ([`spare`](super::spare)): a kernel that
//! posts, and waits for what a launch is to bring, would keep both from ending.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::device::Gpu;

/// How long calls are put off at most, though queues come and go without a gap: a peer that has begun anew may need the
/// memory that its last life has lent. Kernels that wait then may wait as long as they are patient.
const LONGEST: Duration = Duration::from_secs(10);

type Call = Box<dyn FnOnce() + Send>;

#[derive(Default)]
pub(super) struct Later {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Queues that kernels may post to.
    queues: usize,
    /// Calls that are being made while there are no queues.
    calling: usize,
    /// What is put off, and whether there is a thread for it.
    calls: Vec<Call>,
    has_thread: bool,
}

impl Later {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let state = self.changed.wait(state);
        state.unwrap_or_else(PoisonError::into_inner)
    }

    fn called(&self) {
        self.lock().calling -= 1;
        self.changed.notify_all();
    }
}

/// For as long as it is there, kernels may wait for what the host is to launch.
pub(super) struct PostedTo(Gpu);

impl PostedTo {
    /// Waits for calls that are being made.
    pub(super) fn begin(gpu: &Gpu) -> Self {
        let later = gpu.later();
        let mut state = later.lock();
        while state.calling > 0 {
            state = later.wait(state);
        }
        state.queues += 1;
        Self(gpu.clone())
    }
}

impl Drop for PostedTo {
    fn drop(&mut self) {
        self.0.later().lock().queues -= 1;
        self.0.later().changed.notify_all();
    }
}

impl Gpu {
    /// Makes a call that waits for all kernels: at once, or, as long as there are queues that kernels post to, later, by
    /// a thread of its own.
    pub(super) fn when_nobody_posts(&self, call: impl FnOnce() + Send + 'static) {
        let later = self.later();
        let mut state = later.lock();
        if state.queues == 0 {
            state.calling += 1;
            drop(state);
            call();
            return later.called();
        }
        state.calls.push(Box::new(call));
        if std::mem::replace(&mut state.has_thread, true) {
            return;
        }
        drop(state);
        let gpu = self.clone();
        let name = thread::Builder::new().name("kvx-free".to_owned());
        if let Err(error) = name.spawn(move || gpu.make_calls(LONGEST)) {
            tracing::warn!(%error, "no thread to give back what peers have lent: kernels may wait for it");
            self.make_calls(Duration::ZERO);
        }
    }

    /// Makes them when there are no queues, or so much later.
    fn make_calls(&self, latest: Duration) {
        let later = self.later();
        let nobody = |state: &mut State| state.queues > 0;
        let waited = (later.changed).wait_timeout_while(later.lock(), latest, nobody);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let calls = std::mem::take(&mut state.calls);
        state.has_thread = false;
        // Who makes a queue need not wait for what may wait for kernels of others.
        let quiet = state.queues == 0;
        state.calling += usize::from(quiet);
        drop(state);
        calls.into_iter().for_each(|call| call());
        if quiet {
            later.called();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{RecvTimeoutError, channel};
    use std::time::Instant;

    use super::*;
    use crate::error::Error;
    use crate::gpu::{GpuRuntime, RuntimeChoice, RuntimeKind};

    const SOON: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn calls_wait_for_queues_and_new_queues_for_calls() -> Result<(), Error> {
        let runtime = GpuRuntime::open(RuntimeChoice::Only(RuntimeKind::Host))?;
        // Another process's, as far as its queues are concerned: other tests have some of the shared one.
        let gpu = &runtime.gpu(0)?.alone();
        let (told, calls) = channel();
        let call = |name: &'static str| {
            let told = told.clone();
            gpu.when_nobody_posts(move || {
                let _ = told.send(name);
            });
        };
        call("at once");
        assert_eq!(calls.try_recv(), Ok("at once"));

        let (first, second) = (PostedTo::begin(gpu), PostedTo::begin(gpu));
        call("later");
        call("later too");
        drop(first);
        assert_eq!(calls.recv_timeout(SOON), Err(RecvTimeoutError::Timeout));
        drop(second);
        assert_eq!(calls.recv_timeout(LONG), Ok("later"));
        assert_eq!(calls.recv_timeout(LONG), Ok("later too"));

        let third = PostedTo::begin(gpu);
        let (begun, has_begun) = channel();
        let (go_on, goes_on) = channel::<()>();
        gpu.when_nobody_posts(move || {
            let _ = begun.send(());
            let _ = goes_on.recv();
        });
        drop(third);
        assert_eq!(has_begun.recv_timeout(LONG), Ok(()));
        let (made, is_made) = channel();
        let maker = gpu.clone();
        let maker = thread::spawn(move || {
            let queue = PostedTo::begin(&maker);
            let _ = made.send(());
            drop(queue);
        });
        assert_eq!(is_made.recv_timeout(SOON), Err(RecvTimeoutError::Timeout));
        drop(go_on);
        assert_eq!(is_made.recv_timeout(LONG), Ok(()));
        assert!(maker.join().is_ok());
        Ok(())
    }

    #[test]
    fn calls_are_not_put_off_for_ever() -> Result<(), Error> {
        let runtime = GpuRuntime::open(RuntimeChoice::Only(RuntimeKind::Host))?;
        let gpu = &runtime.gpu(0)?.alone();
        let queue = PostedTo::begin(gpu);
        let (told, calls) = channel();
        let put_off = Instant::now();
        gpu.when_nobody_posts(move || {
            let _ = told.send(());
        });
        assert_eq!(calls.recv_timeout(LONG), Ok(()));
        assert!(put_off.elapsed() >= LONGEST);
        // And nobody waits for them to be over.
        drop(PostedTo::begin(gpu));
        drop(queue);
        Ok(())
    }
}
