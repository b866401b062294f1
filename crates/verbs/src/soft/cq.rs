//! The soft completion queue: polling it is what moves the queue pairs' sending halves.

use std::any::Any;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::cq::{CqCore, Poll};
use crate::device::CqBackend;
use crate::error::Error;
use crate::soft::qp::SoftQp;
use crate::sync::{Mutex, lock};
use crate::wr::Completion;

#[derive(Debug)]
pub(crate) struct SoftCq {
    pub(crate) core: CqCore,
    budget: usize,
    /// Readable when the event, the timer or a requester's socket is.
    epoll: Epoll,
    timer: TimerFd,
    qps: Mutex<Polled>,
}

#[derive(Debug, Default)]
struct Polled {
    list: Vec<Arc<SoftQp>>,
    /// Whose turn it is.
    next: usize,
    timer_set: bool,
}

fn err(op: &'static str) -> impl Fn(nix::Error) -> Error {
    move |e| Error::Os {
        op,
        source: e.into(),
    }
}

impl SoftCq {
    pub(crate) fn new(depth: u32, budget: usize) -> Result<Self, Error> {
        let core = CqCore::new(depth)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(err("epoll_create1"))?;
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).map_err(err("timerfd_create"))?;
        let readable = EpollEvent::new(EpollFlags::EPOLLIN, 0);
        epoll
            .add(core.event(), readable)
            .map_err(err("epoll_ctl"))?;
        epoll
            .add(timer.as_fd(), readable)
            .map_err(err("epoll_ctl"))?;
        Ok(Self {
            core,
            budget,
            epoll,
            timer,
            qps: Mutex::default(),
        })
    }

    pub(crate) fn add(&self, qp: Arc<SoftQp>) {
        lock(&self.qps).list.push(qp);
    }

    pub(crate) fn remove(&self, qpn: u32) {
        let gone: Vec<_> = lock(&self.qps)
            .list
            .extract_if(.., |q| q.qpn == qpn)
            .collect();
        // Dropped with the lock released.
        drop(gone);
    }

    /// Lets a requester's socket make the queue readable.
    pub(crate) fn watch(&self, socket: BorrowedFd<'_>) -> Result<(), Error> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, 0);
        self.epoll.add(socket, event).map_err(err("epoll_ctl"))
    }

    /// Also when the socket takes bytes, or no longer.
    pub(crate) fn watch_write(&self, socket: BorrowedFd<'_>, write: bool) {
        let out = if write {
            EpollFlags::EPOLLOUT
        } else {
            EpollFlags::empty()
        };
        let mut event = EpollEvent::new(EpollFlags::EPOLLIN | out, 0);
        // Fails only for a socket that is not watched, which then needs no wake-up either.
        let _ = self.epoll.modify(socket, &mut event);
    }
}

impl CqBackend for SoftCq {
    fn depth(&self) -> u32 {
        self.core.depth()
    }

    fn poll(&self, out: &mut Vec<Completion>, max: usize) -> Result<Poll, Error> {
        // Declared before the guard, so dropped after it.
        let mut retired = Vec::new();
        let mut qps = lock(&self.qps);
        // After a sleep any socket may be the reason, also one of a queue pair with nothing to do.
        let sweep = self.core.disarm();
        if sweep && std::mem::take(&mut qps.timer_set) {
            self.timer.unset().map_err(err("timerfd_settime"))?;
        }
        let before = out.len();
        self.core.pop(out, max);
        let mut more = false;
        if out.len() - before < max {
            let mut budget = self.budget;
            let n = qps.list.len();
            let first = qps.next;
            for i in 0..n {
                let at = (first + i) % n;
                let Some(qp) = qps.list.get(at) else { continue };
                if sweep || qp.active() {
                    more |= qp.progress(&mut budget, sweep, &mut retired);
                    if budget == 0 {
                        qps.next = at + 1;
                        more = true;
                        break;
                    }
                }
            }
            let got = out.len() - before;
            self.core.pop(out, max - got);
        }
        Ok(Poll {
            more: more || !self.core.is_empty(),
        })
    }

    fn arm(&self) -> Result<bool, Error> {
        self.core.set_armed();
        let mut qps = lock(&self.qps);
        let mut deadline: Option<Instant> = None;
        let mut work = self.core.has_completions();
        for qp in &qps.list {
            let (runnable, limit) = qp.waiting();
            work |= runnable;
            deadline = match (deadline, limit) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
        if work {
            // Stays armed, so that the next poll sweeps.
            return Ok(false);
        }
        if let Some(at) = deadline {
            let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            self.timer
                .set(Expiration::OneShot(left.into()), TimerSetTimeFlags::empty())
                .map_err(err("timerfd_settime"))?;
            qps.timer_set = true;
        }
        Ok(true)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

#[cfg(all(loom, test))]
mod loom_tests {
    use kvxfer_loom::{model, thread};

    use super::*;
    use crate::cq::Slots;
    use crate::cq::loom_tests::cqe;

    /// A queue, and threads that push one completion each.
    fn pushed_by(threads: usize) -> (Arc<SoftCq>, Vec<thread::JoinHandle<()>>) {
        let cq = Arc::new(SoftCq::new(4, 1).expect("a queue"));
        let slots = Arc::new(Slots::new(4));
        let pushers = (0..threads).map(|_| {
            let (cq, slots) = (Arc::clone(&cq), Arc::clone(&slots));
            thread::spawn(move || cq.core.push_all(&mut vec![cqe(&slots)]))
        });
        let pushers = pushers.collect();
        (cq, pushers)
    }

    /// Sleeps only where the queue says so. A lost wake-up leaves nobody who could wake it, which
    /// loom finds.
    fn poll_for(cq: &SoftCq, count: usize) {
        let mut out = Vec::new();
        loop {
            let more = cq.poll(&mut out, 4).expect("a poll").more;
            if out.len() >= count {
                return;
            }
            if !more && cq.arm().expect("armed") {
                cq.core.wait();
            }
        }
    }

    #[test]
    fn an_armed_queue_misses_no_completion() {
        model(|| {
            let (cq, pushers) = pushed_by(2);
            poll_for(&cq, 2);
            drop(pushers);
        });
    }

    /// Otherwise every later sleep would end at once.
    #[test]
    fn no_wake_up_outlives_a_poll() {
        model(|| {
            let (cq, pushers) = pushed_by(1);
            poll_for(&cq, 1);
            for pusher in pushers {
                pusher.join().expect("pushed");
            }
            cq.poll(&mut Vec::new(), 4).expect("a poll");
            assert!(!cq.core.is_readable());
        });
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn planted_looking_before_arming() {
        model(|| {
            let (cq, pushers) = pushed_by(1);
            if !cq.core.has_completions() {
                cq.core.set_armed();
                cq.core.wait();
            }
            drop(pushers);
        });
    }
}
