//! Models, for loom, of two handshakes of `SoftQp`, which itself needs sockets and mapped memory. The
//! completion queue and the mailbox are the real ones; the steps are those of the functions named.

use std::collections::VecDeque;
use std::sync::Arc;

use kvxfer_loom::{EventFd, model, thread};
use nix::sys::eventfd::EfdFlags;

use crate::cq::CqCore;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, lock};

/// A requester, and the queue whose poller carries its work out.
struct Sending {
    requests: Mutex<Vec<u64>>,
    active: AtomicBool,
    core: CqCore,
}

impl Sending {
    /// `SoftQp::post_send`.
    fn post(&self) {
        let mut requests = lock(&self.requests);
        requests.push(1);
        self.active.store(true, Ordering::Release);
        drop(requests);
        self.core.wake();
    }

    /// `SoftQp::waiting`.
    fn runnable(&self) -> bool {
        let requests = lock(&self.requests);
        self.active.load(Ordering::Acquire) && !requests.is_empty()
    }

    /// `SoftQp::active` before `SoftQp::waiting`, as it once was.
    fn runnable_if_active(&self) -> bool {
        self.active.load(Ordering::Acquire) && self.runnable()
    }
}

/// `SoftCq::arm`, and a sleep if it finds nothing: somebody else posts.
fn arm_and_sleep(runnable: fn(&Sending) -> bool) {
    let queue = Arc::new(Sending {
        requests: Mutex::default(),
        active: AtomicBool::new(false),
        core: CqCore::new(1).expect("a queue"),
    });
    let others = Arc::clone(&queue);
    let poster = thread::spawn(move || others.post());
    queue.core.set_armed();
    if !runnable(&queue) {
        queue.core.wait();
    }
    assert_eq!(lock(&queue.requests).len(), 1);
    poster.join().expect("posted");
}

#[test]
fn an_armed_queue_misses_no_post() {
    model(|| arm_and_sleep(Sending::runnable));
}

#[test]
#[should_panic(expected = "deadlock")]
fn planted_activity_looked_at_without_the_lock() {
    model(|| arm_and_sleep(Sending::runnable_if_active));
}

/// A responder that waits for a receive, and its thread's mailbox.
struct Receiving {
    receives: Mutex<VecDeque<u64>>,
    parked: AtomicBool,
    mailbox: EventFd,
}

impl Receiving {
    /// `SoftQp::post_recv`.
    fn post(&self) {
        lock(&self.receives).push_back(1);
        if self.parked.load(Ordering::SeqCst) {
            let _ = self.mailbox.write(1);
        }
    }

    /// `SoftQp::run_responder`.
    fn run(&self) -> Option<u64> {
        self.parked.store(true, Ordering::SeqCst);
        let receive = lock(&self.receives).pop_front();
        if receive.is_some() {
            self.parked.store(false, Ordering::SeqCst);
        }
        receive
    }

    /// The same with its first two steps swapped.
    fn run_and_park(&self) -> Option<u64> {
        let receive = lock(&self.receives).pop_front();
        self.parked.store(receive.is_none(), Ordering::SeqCst);
        receive
    }
}

fn wait_for_a_receive(run: fn(&Receiving) -> Option<u64>) {
    let half = Arc::new(Receiving {
        receives: Mutex::default(),
        parked: AtomicBool::new(false),
        mailbox: EventFd::from_flags(EfdFlags::empty()).expect("an event"),
    });
    let others = Arc::clone(&half);
    let poster = thread::spawn(move || others.post());
    while run(&half).is_none() {
        half.mailbox.wait_readable();
        let _ = half.mailbox.read();
    }
    poster.join().expect("posted");
}

#[test]
fn a_parked_responder_hears_of_a_receive() {
    model(|| wait_for_a_receive(Receiving::run));
}

#[test]
#[should_panic(expected = "deadlock")]
fn planted_parking_after_looking() {
    model(|| wait_for_a_receive(Receiving::run_and_park));
}
