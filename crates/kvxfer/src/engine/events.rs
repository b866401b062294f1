//! The queue of events that an engine's owner polls, with a file descriptor for foreign loops.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};
use nix::errno::Errno;
use nix::sys::eventfd::EfdFlags;

use crate::error::Error;
use crate::event::Event;
use crate::sync::EventFd;
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Events of peers that may wait to be polled. Every other event is of a request of the owner's, so that the owner
/// decides how many there can be: one outcome each, and of an expectation so many immediates from each of its senders.
const MAX_PEER_EVENTS: usize = if cfg!(all(loom, test)) { 1 } else { 1024 };

#[derive(Debug)]
pub(crate) struct EventQueue {
    sender: Sender<Event>,
    receiver: Receiver<Event>,
    ready: EventFd,
    /// Events of peers that wait.
    peers: AtomicUsize,
    /// Whether there are more that found no room.
    behind: AtomicBool,
}

fn is_of_peer(event: &Event) -> bool {
    event.request().is_none()
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
            peers: AtomicUsize::new(0),
            behind: AtomicBool::new(false),
        })
    }

    /// Pushes the events of peers that `next` gives, as far as there is room. The caller keeps what
    /// is left, and comes again when [`was_behind`](Self::was_behind) says so.
    pub(crate) fn push_peers(&self, mut next: impl FnMut() -> Option<Event>) {
        loop {
            if self.peers.load(Ordering::SeqCst) >= MAX_PEER_EVENTS {
                // Before looking again: the owner may just have made room and found nobody behind.
                // A swap, as the owner's: whichever comes second takes in what the other did.
                let _ = self.behind.swap(true, Ordering::SeqCst);
                if self.peers.load(Ordering::SeqCst) >= MAX_PEER_EVENTS {
                    return;
                }
            }
            let Some(event) = next() else { return };
            self.peers.fetch_add(1, Ordering::SeqCst);
            self.push(event);
        }
    }

    /// Whether events of peers found no room; asked once room was made.
    pub(crate) fn was_behind(&self) -> bool {
        self.behind.swap(false, Ordering::SeqCst)
    }

    pub(crate) fn push(&self, event: Event) {
        self.push_each([event]);
    }

    /// Pushes events that come together. The owner is woken once: that is most of what an event costs.
    pub(crate) fn push_each(&self, events: impl IntoIterator<Item = Event>) {
        let mut any = false;
        for event in events {
            any = true;
            // The queue holds its own receiver, so sending cannot fail.
            let _ = self.sender.send(event);
        }
        if any {
            // A full counter (EAGAIN) is readable already.
            let _ = self.ready.write(1);
        }
    }

    pub(crate) fn drain(&self, out: &mut Vec<Event>) -> usize {
        // The counter first: an event pushed in between leaves it readable.
        let _: Result<u64, Errno> = self.ready.read();
        let before = out.len();
        out.extend(self.receiver.try_iter());
        self.took(out.get(before..).unwrap_or_default());
        out.len() - before
    }

    pub(crate) fn wait(&self, out: &mut Vec<Event>, timeout: Duration) -> usize {
        let n = self.drain(out);
        if n > 0 {
            return n;
        }
        match self.receiver.recv_timeout(timeout) {
            Ok(event) => {
                self.took(std::slice::from_ref(&event));
                out.push(event);
                1 + self.drain(out)
            }
            Err(_) => 0,
        }
    }

    fn took(&self, events: &[Event]) {
        let peers = events.iter().filter(|event| is_of_peer(event)).count();
        if peers > 0 {
            self.peers.fetch_sub(peers, Ordering::SeqCst);
        }
    }

    /// For an owner that cares for requests alone: events of peers that it takes here go on counting
    /// as waiting.
    pub(crate) fn receiver(&self) -> &Receiver<Event> {
        &self.receiver
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{PeerName, ReleaseReason};
    use crate::ids::{EngineId, Generation, Nonce, Rank, RequestId};

    fn told(immediate: u32) -> Event {
        Event::Told {
            request: RequestId::from("r"),
            nonce: Nonce(1),
            peer: PeerName {
                engine: EngineId::from("e"),
                rank: Rank::default(),
            },
            immediate,
        }
    }

    #[test]
    fn events_that_come_together_are_all_there_once_it_is_readable() {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let queue = EventQueue::new().expect("an eventfd");
        let is_readable = || {
            let mut fds = [PollFd::new(queue.fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::ZERO).expect("polled") == 1
        };
        queue.push_each([]);
        assert!(!is_readable(), "nothing has come");
        queue.push_each((0..3).map(told));
        assert!(is_readable());
        let mut out = Vec::new();
        assert_eq!(queue.drain(&mut out), 3);
        assert_eq!(out, Vec::from_iter((0..3).map(told)));
        assert!(!is_readable(), "all are taken");
    }

    fn peer() -> Event {
        Event::PeerUp {
            peer: PeerName {
                engine: EngineId::from("e"),
                rank: Rank::default(),
            },
            generation: Generation([1; 16]),
        }
    }

    #[test]
    fn peers_fill_no_more_than_their_share() {
        let events = EventQueue::new().expect("a queue");
        let mut given = 0;
        events.push_peers(|| {
            given += 1;
            Some(peer())
        });
        assert_eq!(given, MAX_PEER_EVENTS);
        // What the owner asked for is told whatever peers do.
        events.push(Event::Released {
            request: RequestId::from("r"),
            nonce: Nonce(1),
            reason: ReleaseReason::AllRead,
        });
        let mut out = Vec::new();
        assert_eq!(events.drain(&mut out), MAX_PEER_EVENTS + 1);
        assert!(events.was_behind());
        assert!(!events.was_behind());
        let mut left = 3;
        events.push_peers(|| {
            left -= 1;
            (left >= 0).then(peer)
        });
        assert_eq!(events.wait(&mut out, Duration::ZERO), 3);
        assert!(!events.was_behind());
    }
}

#[cfg(all(loom, test))]
mod loom_tests {
    use std::collections::VecDeque;
    use std::sync::Arc;

    use kvxfer_loom::{Mutex, model, thread, weak_model};

    use super::*;
    use crate::event::{PeerName, ReleaseReason};
    use crate::ids::{EngineId, Generation, Nonce, Rank, RequestId};

    fn released() -> Event {
        Event::Released {
            request: RequestId::from("r"),
            nonce: Nonce(1),
            reason: ReleaseReason::AllRead,
        }
    }

    fn peer() -> Event {
        Event::PeerUp {
            peer: PeerName {
                engine: EngineId::from("e"),
                rank: Rank::default(),
            },
            generation: Generation([1; 16]),
        }
    }

    /// An owner that sleeps on the descriptor alone until it has two events.
    fn owner(events: &EventQueue, mut catch_up: impl FnMut()) {
        let mut out = Vec::new();
        loop {
            events.drain(&mut out);
            catch_up();
            if out.len() >= 2 {
                return;
            }
            events.ready.wait_readable();
        }
    }

    #[test]
    fn no_event_is_left_to_a_sleeper() {
        model(|| {
            let events = Arc::new(EventQueue::new().expect("a queue"));
            for _ in 0..2 {
                let events = Arc::clone(&events);
                thread::spawn(move || events.push(released()));
            }
            owner(&events, || {});
        });
    }

    /// Two events of peers where there is room for one (`Inner::tell`, `Inner::catch_up`): the one
    /// that waits for room comes, though nothing else happens.
    fn more_than_there_is_room_for() {
        let events = Arc::new(EventQueue::new().expect("a queue"));
        // The roster, whose lock is held while it tells.
        let roster = Arc::new(Mutex::new(VecDeque::from([peer(), peer()])));
        let tell = |events: &EventQueue, roster: &Mutex<VecDeque<Event>>| {
            let mut news = roster.lock().expect("not poisoned");
            events.push_peers(|| news.pop_front());
            assert!(events.receiver.len() <= MAX_PEER_EVENTS);
        };
        let others = (Arc::clone(&events), Arc::clone(&roster));
        thread::spawn(move || tell(&others.0, &others.1));
        owner(&events, || {
            if events.was_behind() {
                tell(&events, &roster);
            }
        });
    }

    #[test]
    fn peers_that_found_no_room_are_told() {
        model(more_than_there_is_room_for);
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn planted_room_without_order() {
        weak_model(more_than_there_is_room_for);
    }
}
