//! Asynchronous events of the software device: they come only from a fault plan.
//!
//! As in a kernel, the events of a queue pair that nobody has taken go with it.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::eventfd::EfdFlags;

use crate::device::AsyncEvent;
use crate::error::{Error, os};
use crate::sync::{EventFd, Mutex, lock};

/// Events that nobody has taken; more are lost.
const MAX_EVENTS: usize = 4096;

#[derive(Debug)]
pub(crate) struct Events {
    queue: Mutex<VecDeque<AsyncEvent>>,
    /// Readable while the queue has events.
    event: EventFd,
}

impl Events {
    pub(crate) fn new() -> Result<Self, Error> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        Ok(Self {
            queue: Mutex::default(),
            event: event.map_err(|e| os("eventfd")(e.into()))?,
        })
    }

    /// Tells an event if `holds` says, with no event forgotten meanwhile, that what it is about still
    /// is.
    pub(crate) fn push_if(&self, event: AsyncEvent, holds: impl FnOnce() -> bool) {
        let mut queue = lock(&self.queue);
        if !holds() {
            return;
        }
        if queue.len() >= MAX_EVENTS {
            tracing::warn!(?event, "nobody takes this device's events: lost");
            return;
        }
        queue.push_back(event);
        // Fails only when the counter is full, and then it is readable already.
        let _ = self.event.write(1);
    }

    pub(crate) fn take(&self) -> Option<AsyncEvent> {
        let mut queue = lock(&self.queue);
        let event = queue.pop_front()?;
        if queue.is_empty() {
            // It was readable.
            let _ = self.event.read();
        }
        Some(event)
    }

    /// Forgets the events of a queue pair that is destroyed.
    pub(crate) fn forget(&self, qp_num: u32) {
        let mut queue = lock(&self.queue);
        queue.retain(|event| qp_of(event) != Some(qp_num));
        if queue.is_empty() {
            // As above.
            let _ = self.event.read();
        }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// The queue pair that an event is about.
pub(crate) fn qp_of(event: &AsyncEvent) -> Option<u32> {
    match *event {
        AsyncEvent::QpFatal { qp_num }
        | AsyncEvent::QpRequestError { qp_num }
        | AsyncEvent::QpAccessError { qp_num } => Some(qp_num),
        _ => None,
    }
}
