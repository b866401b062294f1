//! Carries a fault plan out: on the work requests of a queue pair, and on the device as time passes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::device::AsyncEvent;
use crate::soft::faults::{Fault, FaultPlan, Refusals};
use crate::soft::requester::{Fail, Requester};
use crate::soft::vendor;
use crate::soft::{FIRST_CQ, PORT};
use crate::wr::{Op, WcStatus, WrEntry};

/// How far off a work request goes that strays, in bytes.
const STRAY: u64 = 64;

/// What is due on the device at some time.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Planned {
    /// It happens, and is told now or later.
    Happens(AsyncEvent),
    /// It has happened, and is told.
    Told(AsyncEvent),
}

/// A plan, and since when it counts.
#[derive(Debug)]
pub(crate) struct Injector {
    plan: FaultPlan,
    opened: Instant,
}

impl Injector {
    pub(crate) fn new(plan: FaultPlan) -> Self {
        Self {
            plan,
            opened: Instant::now(),
        }
    }

    /// How much later than what they are about events are told.
    pub(crate) fn lag(&self) -> Option<Duration> {
        self.plan.event_lag
    }

    /// What is refused to a queue pair.
    pub(crate) fn refusals(&self, ordinal: u32) -> Refusals {
        self.plan.refusals(ordinal.into())
    }

    /// What happens to the device as a whole, and when; soonest first.
    pub(crate) fn timeline(&self) -> VecDeque<(Instant, Planned)> {
        let at = |after| self.opened.checked_add(after);
        let down = self.plan.port_down;
        let all = [
            (
                down.and_then(|d| at(d.0)),
                AsyncEvent::PortDown { port: PORT },
            ),
            (
                down.and_then(|d| at(d.0.saturating_add(d.1))),
                AsyncEvent::PortUp { port: PORT },
            ),
            (
                self.plan.cq_error.and_then(at),
                AsyncEvent::CqError { cq: FIRST_CQ },
            ),
            (self.plan.device_fatal.and_then(at), AsyncEvent::DeviceFatal),
            (
                self.plan.event.and_then(|e| at(e.0)),
                AsyncEvent::Other {
                    code: self.plan.event.map_or(0, |e| e.1),
                },
            ),
        ];
        let all = all.into_iter();
        let mut list: Vec<_> = all
            .filter_map(|(t, e)| Some((t?, Planned::Happens(e))))
            .collect();
        list.sort_by_key(|l| l.0);
        list.into()
    }

    /// When the port is up again, if it is down.
    fn down_until(&self, now: Instant) -> Option<Instant> {
        let (at, time) = self.plan.port_down?;
        let from = self.opened.checked_add(at)?;
        let until = from.checked_add(time)?;
        (from <= now && now < until).then_some(until)
    }
}

/// What a plan has for the work requests of one queue pair.
#[derive(Debug)]
pub(crate) struct QpFaults {
    injector: Arc<Injector>,
    /// The queue pair's number in its context.
    ordinal: u64,
    /// By number of the work request, oldest first.
    pending: VecDeque<(u64, Fault)>,
    /// When the delay of the oldest one is over, once it has begun.
    delayed: Option<Instant>,
    /// When whatever holds the queue pair up is over, if time ends it.
    pub(crate) until: Option<Instant>,
}

impl QpFaults {
    pub(crate) fn new(injector: Arc<Injector>, ordinal: u64) -> Self {
        Self {
            injector,
            ordinal,
            pending: VecDeque::new(),
            delayed: None,
            until: None,
        }
    }

    /// Decides about a work request that is posted.
    pub(crate) fn consider(&mut self, number: u64, wr: &mut WrEntry) {
        let fate = self.injector.plan.fate(self.ordinal, number);
        if fate.key && matches!(wr.op, Op::Read | Op::Write | Op::WriteImm) {
            // Another generation of the key: it was valid once, or will be.
            wr.rkey ^= 0x8000_0000;
        }
        // Words that are polled or looked at by themselves stay right.
        if fate.stray && wr.len > STRAY && matches!(wr.op, Op::Read | Op::Write | Op::WriteImm) {
            wr.addr = wr.addr.wrapping_sub(STRAY);
        }
        let faults = [fate.delay, fate.end].into_iter().flatten();
        self.pending.extend(faults.map(|fault| (number, fault)));
    }

    /// The first work request that does not start like any other.
    pub(crate) fn fence(&self) -> u64 {
        self.pending.front().map_or(u64::MAX, |p| p.0)
    }
}

impl Requester {
    /// Whether the next work request may start; `false`: something must come or pass first. Called
    /// only where there is a plan.
    pub(crate) fn may_start(&mut self) -> Result<bool, Fail> {
        let (number, oldest) = (self.sent, self.sent == self.head);
        let Some(faults) = &mut self.faults else {
            return Ok(true);
        };
        faults.until = None;
        let now = Instant::now();
        if let Some(until) = faults.injector.down_until(now) {
            faults.until = Some(until);
            return Ok(false);
        }
        while let Some((_, fault)) = faults.pending.front().filter(|p| p.0 == number) {
            match *fault {
                Fault::Delay(by) => {
                    // A time beyond all clocks is for ever.
                    faults.delayed = faults.delayed.or_else(|| now.checked_add(by));
                    if faults.delayed.is_none_or(|t| now < t) {
                        faults.until = faults.delayed;
                        return Ok(false);
                    }
                    faults.delayed = None;
                    faults.pending.pop_front();
                    self.fence = faults.fence();
                }
                // The retry time runs on.
                Fault::Drop => return Ok(false),
                // The streams are closed with the queue pair, on both sides.
                Fault::Cut => return Err(Fail::gone()),
                // An error is the oldest work request's: those before it end first.
                Fault::Error(_) | Fault::QueuePair(_) if !oldest => return Ok(false),
                Fault::Error(status) => return Err(Fail::new(status, vendor::PLANNED)),
                Fault::QueuePair(how) => {
                    // Before its work is flushed, unless the plan lets it come late.
                    self.ctx.tell(how.event(self.qpn));
                    return Err(Fail::new(WcStatus::WrFlush, 0));
                }
            }
        }
        Ok(true)
    }
}
