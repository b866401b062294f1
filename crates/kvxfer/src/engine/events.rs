//! The queue of events that an engine's owner polls, with a file descriptor for foreign loops.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::Error;
use crate::event::Event;

#[derive(Debug)]
pub(crate) struct EventQueue {
    sender: Sender<Event>,
    receiver: Receiver<Event>,
    ready: EventFd,
}

impl EventQueue {
    pub(crate) fn new() -> Result<Self, Error> {
        let ready =
            EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                .map_err(|errno| Error::Os {
                    call: "eventfd",
                    errno: errno as i32,
                })?;
        let (sender, receiver) = unbounded();
        Ok(Self {
            sender,
            receiver,
            ready,
        })
    }

    pub(crate) fn push(&self, event: Event) {
        // The queue holds its own receiver, so sending cannot fail.
        let _ = self.sender.send(event);
        // A full counter (EAGAIN) is readable already.
        let _ = self.ready.write(1);
    }

    pub(crate) fn drain(&self, out: &mut Vec<Event>) -> usize {
        // The counter first: an event pushed in between leaves it readable.
        let _: Result<u64, Errno> = self.ready.read();
        let before = out.len();
        out.extend(self.receiver.try_iter());
        out.len() - before
    }

    pub(crate) fn wait(&self, out: &mut Vec<Event>, timeout: Duration) -> usize {
        let n = self.drain(out);
        if n > 0 {
            return n;
        }
        match self.receiver.recv_timeout(timeout) {
            Ok(event) => {
                out.push(event);
                1 + self.drain(out)
            }
            Err(_) => 0,
        }
    }

    pub(crate) fn receiver(&self) -> &Receiver<Event> {
        &self.receiver
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
}
