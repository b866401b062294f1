//! The queue of completions that the soft and the null device share: bounded by credits taken when
//! work is posted, so that it never overflows.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::sys::eventfd::EfdFlags;

use crate::error::Error;
use crate::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use crate::sync::{EventFd, Mutex, lock};
use crate::wr::Completion;

/// What a poll says beyond the completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Poll {
    /// Work or completions remain: poll again rather than sleep.
    pub more: bool,
}

/// The free slots of one work queue.
#[derive(Debug)]
pub(crate) struct Slots {
    free: AtomicU32,
}

impl Slots {
    pub(crate) fn new(n: u32) -> Self {
        Self {
            free: AtomicU32::new(n),
        }
    }

    pub(crate) fn free(&self) -> u32 {
        self.free.load(Ordering::Acquire)
    }

    /// Takes up to `n` and says how many.
    pub(crate) fn take(&self, n: u32) -> u32 {
        let mut got = 0;
        let _ = self
            .free
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |free| {
                got = free.min(n);
                Some(free - got)
            });
        got
    }

    pub(crate) fn give(&self, n: u32) {
        self.free.fetch_add(n, Ordering::AcqRel);
    }
}

/// A completion and what polling it gives back.
#[derive(Debug)]
pub(crate) struct Cqe {
    pub(crate) completion: Completion,
    /// Work requests that end with it: itself and the unsignalled ones before it.
    pub(crate) slots: u32,
    /// The work queue it came from.
    pub(crate) queue: Arc<Slots>,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Cqe>,
    /// Nothing completes here any more.
    failed: bool,
}

#[derive(Debug)]
pub(crate) struct CqCore {
    depth: u32,
    credits: Slots,
    queue: Mutex<Queue>,
    /// Completions waiting, to look without the lock.
    queued: AtomicUsize,
    armed: AtomicBool,
    signalled: AtomicBool,
    event: EventFd,
}

impl CqCore {
    pub(crate) fn new(depth: u32) -> Result<Self, Error> {
        let event =
            EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(|e| {
                Error::Os {
                    op: "eventfd",
                    source: e.into(),
                }
            })?;
        Ok(Self {
            depth,
            credits: Slots::new(depth),
            queue: Mutex::new(Queue::default()),
            queued: AtomicUsize::new(0),
            armed: AtomicBool::new(false),
            signalled: AtomicBool::new(false),
            event,
        })
    }

    pub(crate) fn depth(&self) -> u32 {
        self.depth
    }

    pub(crate) fn credits(&self) -> &Slots {
        &self.credits
    }

    pub(crate) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queued.load(Ordering::Acquire) == 0
    }

    /// Moves completions in, in order, and wakes the poller. Into a queue that has failed none goes.
    pub(crate) fn push_all(&self, cqes: &mut Vec<Cqe>) {
        if cqes.is_empty() {
            return;
        }
        {
            let mut q = lock(&self.queue);
            if q.failed {
                self.lose(cqes.drain(..));
                return;
            }
            q.waiting.extend(cqes.drain(..));
            self.queued.store(q.waiting.len(), Ordering::Release);
        }
        self.wake();
    }

    /// Takes up to `max` completions out; their credits return.
    pub(crate) fn pop(&self, out: &mut Vec<Completion>, max: usize) {
        if self.is_empty() {
            return;
        }
        let mut q = lock(&self.queue);
        let n = q.waiting.len().min(max);
        let mut total = 0;
        for cqe in q.waiting.drain(..n) {
            cqe.queue.give(cqe.slots);
            total += cqe.slots;
            out.push(cqe.completion);
        }
        self.credits.give(total);
        self.queued.store(q.waiting.len(), Ordering::Release);
    }

    /// Drops the completions of a queue pair that is gone.
    pub(crate) fn purge(&self, qp_num: u32) {
        let mut q = lock(&self.queue);
        let mut total = 0;
        q.waiting.retain(|cqe| {
            let gone = cqe.completion.qp_num == qp_num;
            if gone {
                total += cqe.slots;
            }
            !gone
        });
        self.credits.give(total);
        self.queued.store(q.waiting.len(), Ordering::Release);
    }

    /// From here on nothing completes here, and what waits is lost. What was taken for posting comes
    /// back all the same, so that the queue pairs can be posted to as ever.
    pub(crate) fn fail(&self) {
        let mut q = lock(&self.queue);
        q.failed = true;
        self.lose(q.waiting.drain(..));
        self.queued.store(0, Ordering::Release);
    }

    pub(crate) fn has_failed(&self) -> bool {
        lock(&self.queue).failed
    }

    fn lose(&self, cqes: impl Iterator<Item = Cqe>) {
        for cqe in cqes {
            cqe.queue.give(cqe.slots);
            self.credits.give(cqe.slots);
        }
    }

    /// Makes the event readable if somebody sleeps or is about to.
    pub(crate) fn wake(&self) {
        if self.armed.load(Ordering::SeqCst) && self.armed.swap(false, Ordering::SeqCst) {
            // Fails only when the counter is full, and then it is readable already.
            let _ = self.event.write(1);
            // Afterwards: a poller that came in between would read nothing, and leave the event
            // readable with nobody to clear it.
            self.signalled.store(true, Ordering::SeqCst);
        }
    }

    /// First step of arming; afterwards the caller looks for work and [`disarm`](Self::disarm)s
    /// if there is any. Whoever adds work does so before it looks at the flag, under a lock that
    /// the caller takes after setting it, so one of the two sees the other.
    pub(crate) fn set_armed(&self) {
        // A swap: with what an earlier waker wrote it takes in what that waker did.
        let _ = self.armed.swap(true, Ordering::SeqCst);
    }

    /// Whether it was armed (or woken since); clears the event.
    pub(crate) fn disarm(&self) -> bool {
        let armed = self.armed.load(Ordering::SeqCst) && self.armed.swap(false, Ordering::SeqCst);
        let signalled =
            self.signalled.load(Ordering::SeqCst) && self.signalled.swap(false, Ordering::SeqCst);
        if signalled {
            let _ = self.event.read();
        }
        armed || signalled
    }

    /// Sleeps as a poller that polls the event's descriptor.
    #[cfg(all(loom, test))]
    pub(crate) fn wait(&self) {
        self.event.wait_readable();
    }

    #[cfg(all(loom, test))]
    pub(crate) fn is_readable(&self) -> bool {
        self.event.is_readable()
    }

    /// The completions waiting, under the lock (for arming).
    pub(crate) fn has_completions(&self) -> bool {
        !lock(&self.queue).waiting.is_empty()
    }
}

#[cfg(all(loom, test))]
pub(crate) mod loom_tests {
    use kvxfer_loom::{model, thread};

    use super::*;
    use crate::null::take_credits;
    use crate::wr::{WcOpcode, WcStatus};

    pub(crate) fn cqe(queue: &Arc<Slots>) -> Cqe {
        Cqe {
            completion: Completion {
                wr_id: 0,
                status: WcStatus::Success,
                qp_num: 1,
                vendor_err: 0,
                opcode: WcOpcode::Recv,
                byte_len: 0,
                imm: None,
            },
            slots: 1,
            queue: Arc::clone(queue),
        }
    }

    #[test]
    fn credits_are_never_exceeded_and_all_come_back() {
        model(|| {
            let core = Arc::new(CqCore::new(1).expect("a queue"));
            let slots = Arc::new(Slots::new(2));
            let posters: Vec<_> = (0..2)
                .map(|_| {
                    let (core, slots) = (Arc::clone(&core), Arc::clone(&slots));
                    thread::spawn(move || {
                        let (posted, _) = take_credits(1, &slots, core.credits());
                        if posted == 1 {
                            core.push_all(&mut vec![cqe(&slots)]);
                        }
                    })
                })
                .collect();
            let mut out = Vec::new();
            core.pop(&mut out, 4);
            assert!(out.len() <= 1);
            for poster in posters {
                poster.join().expect("posted");
            }
            let before = out.len();
            core.pop(&mut out, 4);
            assert!(out.len() - before <= 1);
            assert!(!out.is_empty(), "the first to come found a credit");
            assert_eq!((core.credits().free(), slots.free()), (1, 2));
        });
    }
    #[test]
    fn a_queue_that_fails_gives_nothing_and_keeps_nothing() {
        model(|| {
            let core = Arc::new(CqCore::new(2).expect("a queue"));
            let slots = Arc::new(Slots::new(2));
            let poster = {
                let (core, slots) = (Arc::clone(&core), Arc::clone(&slots));
                thread::spawn(move || {
                    for _ in 0..2 {
                        let (posted, _) = take_credits(1, &slots, core.credits());
                        assert_eq!(posted, 1);
                        core.push_all(&mut vec![cqe(&slots)]);
                    }
                })
            };
            core.fail();
            let mut out = Vec::new();
            core.pop(&mut out, 4);
            poster.join().expect("posted");
            core.pop(&mut out, 4);
            assert!(out.is_empty() && !core.has_completions());
            assert_eq!((core.credits().free(), slots.free()), (2, 2));
        });
    }
}
