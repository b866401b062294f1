//! Streams: queues of a GPU's work, and copies that are put there without waiting.

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use libc::c_void;

use super::api::Direction;
use super::device::{Gpu, same_runtime};
use super::event::{Event, poll};
use super::memory::GpuMemory;
use super::peer_memory::PeerHostMemory;
use super::pinned::PinnedMemory;
use crate::error::{Error, Operation};

/// How long a stream that is given up is waited for. What has not ended by then is never given back.
const LAST_WAIT: Duration = Duration::from_secs(5);
/// And how long by who drops an urgent one, who has no time: an abort's copy ends sooner. Then by a thread.
const SHORT_WAIT: Duration = Duration::from_micros(100);

/// Events that a stream keeps for later.
const SPARE: usize = 8;

pub(super) type Keep = Arc<dyn Any + Send + Sync>;

/// A stream of a GPU: its own or an engine's. Clones are the same stream.
#[derive(Clone)]
pub struct Stream(Arc<Inner>);

struct Inner {
    gpu: Gpu,
    raw: u64,
    /// What keeps somebody else's stream; `None`: it is ours.
    keep: Option<Keep>,
    urgent: bool,
    /// What is still on the stream, and nobody waits for any more.
    left: Mutex<VecDeque<(Event, Vec<Keep>)>>,
    /// Events that nobody else knows any more: making one and destroying it takes as long as a launch.
    spare: Mutex<Vec<Event>>,
}

/// A place that a copy goes from or to.
#[derive(Debug, Clone, Copy)]
pub enum Place<'a> {
    /// In a GPU's memory, from this offset.
    Gpu(&'a GpuMemory, u64),
    /// In pinned host memory, from this offset.
    Pinned(&'a PinnedMemory, u64),
    /// In another process's host memory, from this offset: it is only read.
    PeerHost(&'a PeerHostMemory, u64),
}

/// One contiguous copy.
#[derive(Debug, Clone, Copy)]
pub struct Copy<'a> {
    /// Where to.
    pub dst: Place<'a>,
    /// Where from.
    pub src: Place<'a>,
    /// Bytes.
    pub len: u64,
}

/// Work on a stream that keeps its memory until it has ended, whether or not this value is kept.
#[derive(Debug)]
pub struct Pending {
    stream: Stream,
    event: Event,
    keep: Vec<Keep>,
}

impl Place<'_> {
    pub(super) fn range(&self, operation: Operation, len: u64) -> Result<u64, Error> {
        match self {
            Self::Gpu(memory, offset) => memory.range(operation, *offset, len),
            Self::Pinned(memory, offset) => memory.range(operation, *offset, len),
            Self::PeerHost(memory, offset) => memory.range(operation, *offset, len),
        }
    }

    /// Bytes from here to the memory's end.
    pub(super) fn room(&self) -> u64 {
        match self {
            Self::Gpu(memory, offset) => memory.len().saturating_sub(*offset),
            Self::Pinned(memory, offset) => memory.len().saturating_sub(*offset),
            Self::PeerHost(memory, offset) => memory.len().saturating_sub(*offset),
        }
    }

    /// The address that GPUs know it by.
    pub(super) fn device_addr(&self) -> u64 {
        match self {
            Self::Gpu(memory, offset) => memory.addr().wrapping_add(*offset),
            Self::Pinned(memory, offset) => memory.device_addr().wrapping_add(*offset),
            Self::PeerHost(memory, offset) => memory.device_addr().wrapping_add(*offset),
        }
    }

    pub(super) fn gpu(&self) -> &Gpu {
        match self {
            Self::Gpu(memory, _) => memory.gpu(),
            Self::Pinned(memory, _) => memory.gpu(),
            Self::PeerHost(memory, _) => memory.gpu(),
        }
    }

    pub(super) fn keep(&self) -> Keep {
        match self {
            Self::Gpu(memory, _) => Arc::clone(&memory.span) as Keep,
            Self::Pinned(memory, _) => Arc::clone(&memory.pinned) as Keep,
            Self::PeerHost(memory, _) => Arc::clone(&memory.peer) as Keep,
        }
    }
}

/// Which way a copy goes; `None`: it is the host's alone.
pub(super) fn way(dst: Place<'_>, src: Place<'_>) -> Option<Direction> {
    match (dst, src) {
        (Place::Gpu(..), Place::Pinned(..) | Place::PeerHost(..)) => Some(Direction::HostToDevice),
        (Place::Pinned(..), Place::Gpu(..)) => Some(Direction::DeviceToHost),
        (Place::Gpu(..), Place::Gpu(..)) => Some(Direction::DeviceToDevice),
        (Place::Pinned(..) | Place::PeerHost(..), _) => None,
    }
}

impl Stream {
    /// A new stream, which waits for no other.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`].
    pub fn new(gpu: &Gpu) -> Result<Self, Error> {
        Self::make(gpu, false)
    }

    /// A new stream whose work does not stand behind other streams' in a hardware queue that they share.
    pub(super) fn urgent(gpu: &Gpu) -> Result<Self, Error> {
        Self::make(gpu, true)
    }

    fn make(gpu: &Gpu, urgent: bool) -> Result<Self, Error> {
        let _current = gpu.enter()?;
        let raw = gpu.api().stream_create(urgent)?;
        Ok(Self::of(gpu, raw, None, urgent))
    }

    /// An engine's own stream: a `hipStream_t` or `CUstream`; null is the default stream.
    ///
    /// # Safety
    ///
    /// It is a stream of `gpu`'s device (and, for CUDA, of its primary context), is not destroyed before `keep`
    /// is dropped, and is not being captured into a graph while kvxfer uses it.
    #[must_use]
    pub unsafe fn from_raw(gpu: &Gpu, raw: *mut c_void, keep: Keep) -> Self {
        Self::of(gpu, raw.expose_provenance() as u64, Some(keep), false)
    }

    fn of(gpu: &Gpu, raw: u64, keep: Option<Keep>, urgent: bool) -> Self {
        Self(Arc::new(Inner {
            gpu: gpu.clone(),
            raw,
            keep,
            urgent,
            left: Mutex::default(),
            spare: Mutex::default(),
        }))
    }

    /// Its device.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        &self.0.gpu
    }

    /// The runtime's handle.
    #[must_use]
    pub fn as_raw(&self) -> *mut c_void {
        std::ptr::with_exposed_provenance_mut(self.0.raw as usize)
    }

    pub(super) fn raw(&self) -> u64 {
        self.0.raw
    }

    /// Whether all that is on it has ended.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`], also for what went wrong on it.
    pub fn is_done(&self) -> Result<bool, Error> {
        self.0.is_done()
    }

    /// Waits until all that is on it has ended.
    ///
    /// # Errors
    ///
    /// [`GpuFault::Deadline`](super::GpuFault::Deadline); as [`is_done`](Self::is_done).
    pub fn wait(&self, deadline: Instant) -> Result<(), Error> {
        poll("a GPU stream", deadline, || self.is_done())
    }

    /// Lets what comes after on it wait for an event, which may be another device's.
    ///
    /// # Errors
    ///
    /// [`GpuFault::OtherRuntime`](super::GpuFault::OtherRuntime), [`Error::Gpu`].
    pub fn wait_event(&self, event: &Event) -> Result<(), Error> {
        same_runtime("the event", event.gpu(), self.gpu())?;
        let _current = self.gpu().enter()?;
        // SAFETY: both are held.
        Ok(unsafe { self.gpu().api().stream_wait_event(self.0.raw, event.raw()) }?)
    }

    /// Puts copies on it, in this order. They keep their memory until they have ended.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`], [`Error::HostCopy`], [`GpuFault::ReadOnly`](super::GpuFault::ReadOnly),
    /// [`GpuFault::OtherRuntime`](super::GpuFault::OtherRuntime);
    /// then none was put. [`Error::Gpu`].
    pub fn copy(&self, copies: &[Copy<'_>]) -> Result<Pending, Error> {
        let mut spans = Vec::with_capacity(copies.len());
        for copy in copies {
            same_runtime("what is copied from", copy.src.gpu(), self.gpu())?;
            same_runtime("what is copied to", copy.dst.gpu(), self.gpu())?;
            let src = copy.src.range(Operation::CopySource, copy.len)?;
            let dst = copy.dst.range(Operation::CopyDestination, copy.len)?;
            let Some(way) = way(copy.dst, copy.src) else {
                // The host's own work is not put on a GPU's queue.
                let len = copy.len;
                return Err(Error::HostCopy { len, src, dst });
            };
            spans.push((dst, src, copy.len, way));
        }
        let mut keep: Vec<Keep> = copies
            .iter()
            .flat_map(|c| [c.dst.keep(), c.src.keep()])
            .collect();
        // Copies of many pieces name few memories.
        keep.sort_by_key(|keep| Arc::as_ptr(keep).cast::<()>());
        keep.dedup_by_key(|keep| Arc::as_ptr(keep).cast::<()>());
        self.put(keep, |raw| {
            for (dst, src, len, way) in spans.iter().filter(|(.., len, _)| *len > 0) {
                let api = self.gpu().api();
                // SAFETY: both spans are of memory that `keep` holds until the stream has got past this.
                unsafe { api.copy(*dst, *src, *len, *way, raw) }?;
            }
            Ok(())
        })
    }

    /// Puts a fill on it.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`]; then nothing was put. [`Error::Gpu`].
    pub fn fill(
        &self,
        memory: &GpuMemory,
        offset: u64,
        len: u64,
        byte: u8,
    ) -> Result<Pending, Error> {
        same_runtime("what is filled", memory.gpu(), self.gpu())?;
        let dst = memory.range(Operation::Fill, offset, len)?;
        let keep = vec![Place::Gpu(memory, 0).keep()];
        self.put(keep, |raw| {
            if len == 0 {
                return Ok(());
            }
            // SAFETY: the span is of memory that `keep` holds until the stream has got past this.
            Ok(unsafe { self.gpu().api().fill(dst, byte, len, raw) }?)
        })
    }

    /// Puts work on it, and an event behind it. Where the event cannot be had, nobody knows when the work ends: what
    /// it uses is never given back.
    pub(super) fn put(
        &self,
        keep: Vec<Keep>,
        work: impl FnOnce(u64) -> Result<(), Error>,
    ) -> Result<Pending, Error> {
        let spare = self
            .0
            .spare
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let event = match spare {
            Some(event) => event,
            None => Event::new(self.gpu())?,
        };
        let _current = self.gpu().enter()?;
        let worked = work(self.0.raw);
        if let Err(error) = event.record(self) {
            std::mem::forget(keep);
            return Err(error);
        }
        let stream = self.clone();
        let pending = Pending {
            stream,
            event,
            keep,
        };
        // The GPU is at work meanwhile.
        self.0.forget_done();
        worked.map(|()| pending)
    }
}

impl Inner {
    fn is_done(&self) -> Result<bool, Error> {
        let _current = self.gpu.enter()?;
        // SAFETY: the stream is held.
        Ok(unsafe { self.gpu.api().stream_done(self.raw) }?)
    }

    /// Lets go what has ended. A stream does things in turn, so what stands behind something that has not
    /// ended can wait: looking at all of it each time would cost more than the work.
    fn forget_done(&self) {
        let mut done = Vec::new();
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        while left
            .front()
            .is_some_and(|(event, _)| event.is_done().unwrap_or(false))
        {
            done.extend(left.pop_front());
        }
        // Memory may go with it, which is not for the lock's time.
        drop(left);
        for (event, _) in &done {
            self.spare(event);
        }
    }

    /// Keeps an event for later, if the caller's is the last of it.
    fn spare(&self, event: &Event) {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < SPARE && event.is_last() {
            spare.push(event.clone());
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let left = std::mem::take(self.left.get_mut().unwrap_or_else(PoisonError::into_inner));
        let soon = || {
            poll("a GPU stream", Instant::now() + SHORT_WAIT, || {
                self.is_done()
            })
        };
        if self.urgent && soon().is_err() {
            let rest = Self {
                gpu: self.gpu.clone(),
                raw: self.raw,
                keep: None,
                urgent: false,
                left: Mutex::new(left),
                spare: Mutex::default(),
            };
            let named = thread::Builder::new().name("kvx-free".to_owned());
            // Where there is no thread, it goes here.
            let _ = named.spawn(move || drop(rest));
            return;
        }
        let idle = self.keep.is_some() && left.is_empty();
        let deadline = Instant::now() + LAST_WAIT;
        let ended = idle
            || match &self.keep {
                None => poll("a GPU stream", deadline, || self.is_done()),
                Some(_) => left.iter().try_for_each(|(event, _)| event.wait(deadline)),
            }
            .inspect_err(|error| tracing::warn!(%error, "a stream's memory is never given back"))
            .is_ok();
        if !ended {
            std::mem::forget(left);
            return;
        }
        if self.keep.is_some() {
            return;
        }
        let destroyed = self.gpu.enter().and_then(|_current| {
            // SAFETY: it was made for this value, whoever used it held it, and nothing is on it.
            Ok(unsafe { self.gpu.api().stream_destroy(self.raw) }?)
        });
        if let Err(error) = destroyed {
            tracing::warn!(%error, "a stream is not destroyed");
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stream {:#x} of {:?}", self.0.raw, self.0.gpu)
    }
}

impl Pending {
    /// Whether it has ended.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`], also for what went wrong with it.
    pub fn is_done(&self) -> Result<bool, Error> {
        self.event.is_done()
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    ///
    /// [`GpuFault::Deadline`](super::GpuFault::Deadline); as [`is_done`](Self::is_done).
    pub fn wait(&self, deadline: Instant) -> Result<(), Error> {
        self.event.wait(deadline)
    }

    /// The mark behind it, for other streams to wait for.
    #[must_use]
    pub fn event(&self) -> &Event {
        &self.event
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if self.event.is_done().unwrap_or(false) {
            self.stream.0.spare(&self.event);
            return;
        }
        let keep = std::mem::take(&mut self.keep);
        let left = &self.stream.0.left;
        let mut left = left.lock().unwrap_or_else(PoisonError::into_inner);
        left.push_back((self.event.clone(), keep));
    }
}
