//! Events: marks on streams that can be looked at, waited for and measured between.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libc::c_void;

use super::device::{Gpu, same};
use super::error::GpuFault;
use super::stream::Stream;
use crate::error::Error;

/// An event of a GPU: its own or an engine's. Clones are the same event.
#[derive(Clone)]
pub struct Event(Arc<Inner>);

struct Inner {
    gpu: Gpu,
    raw: u64,
    /// What keeps somebody else's event; `None`: it is ours.
    keep: Option<Arc<dyn Any + Send + Sync>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.keep.is_some() {
            return;
        }
        let destroyed = self.gpu.enter().and_then(|_current| {
            // SAFETY: it was made for this value, and whoever used it held it. An event that is still
            // on a stream goes when the stream has got past it.
            Ok(unsafe { self.gpu.api().event_destroy(self.raw) }?)
        });
        if let Err(error) = destroyed {
            tracing::warn!(%error, "an event is not destroyed");
        }
    }
}

impl Event {
    /// A new event. Until it is recorded it counts as reached.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`].
    pub fn new(gpu: &Gpu) -> Result<Self, Error> {
        Self::make(gpu, false)
    }

    /// A new event that times can be measured with.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`].
    pub fn with_timing(gpu: &Gpu) -> Result<Self, Error> {
        Self::make(gpu, true)
    }

    fn make(gpu: &Gpu, timing: bool) -> Result<Self, Error> {
        let _current = gpu.enter()?;
        let raw = gpu.api().event_create(timing)?;
        let (gpu, keep) = (gpu.clone(), None);
        Ok(Self(Arc::new(Inner { gpu, raw, keep })))
    }

    /// An engine's own event: a `hipEvent_t` or `CUevent`.
    ///
    /// # Safety
    ///
    /// It is an event of `gpu`'s device (and, for CUDA, of its primary context), and is not destroyed before
    /// `keep` is dropped.
    #[must_use]
    pub unsafe fn from_raw(gpu: &Gpu, raw: *mut c_void, keep: Arc<dyn Any + Send + Sync>) -> Self {
        let (gpu, keep) = (gpu.clone(), Some(keep));
        let raw = raw.expose_provenance() as u64;
        Self(Arc::new(Inner { gpu, raw, keep }))
    }

    /// An event that no runtime knows, so that every look at it fails: for tests.
    #[doc(hidden)]
    #[must_use]
    pub fn unknown(gpu: &Gpu) -> Self {
        let gpu = gpu.clone();
        let keep: Option<Arc<dyn Any + Send + Sync>> = Some(Arc::new(()));
        // The handle that no event has, which the runtimes refuse.
        Self(Arc::new(Inner { gpu, raw: 0, keep }))
    }

    /// The runtime's handle, for an engine that waits for it on a stream of its own.
    #[must_use]
    pub fn as_raw(&self) -> *mut c_void {
        std::ptr::with_exposed_provenance_mut(self.0.raw as usize)
    }

    /// Its device.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        &self.0.gpu
    }

    /// Whether nobody has a clone of it.
    pub(super) fn is_last(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }

    pub(super) fn raw(&self) -> u64 {
        self.0.raw
    }

    /// Marks the end of what is on a stream now.
    ///
    /// # Errors
    ///
    /// [`GpuFault::OtherStreamDevice`], [`Error::Gpu`].
    pub fn record(&self, stream: &Stream) -> Result<(), Error> {
        same("the event", self.gpu(), stream.gpu())?;
        let _current = self.gpu().enter()?;
        // SAFETY: both are held.
        Ok(unsafe { self.gpu().api().event_record(self.0.raw, stream.raw()) }?)
    }

    /// Whether the stream has got past it.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`], also for what went wrong on the stream before it.
    pub fn is_done(&self) -> Result<bool, Error> {
        let _current = self.gpu().enter()?;
        // SAFETY: the event is held.
        Ok(unsafe { self.gpu().api().event_done(self.0.raw) }?)
    }

    /// Waits until the stream has got past it.
    ///
    /// # Errors
    ///
    /// [`GpuFault::Deadline`]; as [`is_done`](Self::is_done).
    pub fn wait(&self, deadline: Instant) -> Result<(), Error> {
        poll("a GPU event", deadline, || self.is_done())
    }

    /// The time on the GPU between two events that have been reached.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`], also if one is not reached or was made without timing.
    pub fn since(&self, start: &Self) -> Result<Duration, Error> {
        same("the event", start.gpu(), self.gpu())?;
        let _current = self.gpu().enter()?;
        // SAFETY: both are held.
        let ms = unsafe { self.gpu().api().event_elapsed(start.0.raw, self.0.raw) }?;
        Ok(Duration::try_from_secs_f64(f64::from(ms) / 1e3).unwrap_or_default())
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "event {:#x} of {:?}", self.0.raw, self.0.gpu)
    }
}

/// Looks again and again: often at first, then with rests that grow to a millisecond.
pub(super) fn poll(
    what: &'static str,
    deadline: Instant,
    mut done: impl FnMut() -> Result<bool, Error>,
) -> Result<(), Error> {
    let start = Instant::now();
    let mut rest = Duration::from_micros(10);
    loop {
        if done()? {
            return Ok(());
        }
        let now = Instant::now();
        let waited = now.saturating_duration_since(start);
        let Some(left) = deadline
            .checked_duration_since(now)
            .filter(|left| !left.is_zero())
        else {
            return Err(GpuFault::Deadline { what, waited }.into());
        };
        if waited < Duration::from_micros(100) {
            std::thread::yield_now();
        } else {
            std::thread::sleep(rest.min(left));
            rest = (rest * 2).min(Duration::from_millis(1));
        }
    }
}
