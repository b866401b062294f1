//! What has to be done between "the device says that the bytes have come" and "a GPU reads them", where RDMA devices
//! write into a GPU's memory: at the end of a pull before its checksums and its lease are looked at, and before a
//! push counts of which a producer says that it is done. For some GPUs it is nothing, for some a call of the host's,
//! for others a READ of the memory through each device that has written there, which takes some microseconds: other
//! work goes on meanwhile.

use std::sync::Arc;
use std::time::Duration;

use tracing::{debug, error};

use super::completions::lies;
use super::{Check, Worker};
use crate::engine::Inner;
use crate::engine::gpu::{Taking, cause};
use crate::engine::loopback::{Loopback, Reading};
use crate::engine::peer_session::{ClosedPush, PeerSession};
use crate::engine::verify::Unverified;
use crate::error::chain;
use crate::mem::gpu::HostStep;
use crate::rails::RailSet;
use crate::transfer::{Cause, GpuOperation, JobId, LeaseAnswer, PeerKey, TransferId};
use crate::wire::PushDone;

/// The rests between two looks at a READ.
const REST: Duration = Duration::from_micros(10);

/// What comes then.
#[derive(Debug)]
pub(super) enum Then {
    /// The checksums of a pull.
    Verify(TransferId),
    /// Its lease, or that of one job of it.
    CheckLease(Check),
    /// Blocks that a producer has asked for.
    Taken(Arc<PeerSession>, Box<Taking>),
    /// The end of a push that was given up.
    Closed(Box<ClosedPush>),
    /// The end of a push, as its producer has told it.
    Done(Arc<PeerSession>, Box<PushDone>),
}

/// A READ through one device.
#[derive(Debug)]
enum Step {
    ToBegin(Arc<Loopback>),
    Begun(Arc<Loopback>, Arc<Reading>),
}

#[derive(Debug)]
struct Seeing {
    then: Then,
    steps: Vec<Step>,
}

/// What is read back.
#[derive(Debug, Default)]
pub(super) struct Visible(Vec<Seeing>);

impl Visible {
    /// How long the worker may rest before it has to look again; `None`: there is nothing to look at.
    pub(super) fn rest(&self) -> Option<Duration> {
        (!self.0.is_empty()).then_some(REST)
    }

    /// Whether a producer has said the same already.
    fn is_closing(&self, closed: &ClosedPush) -> bool {
        let of = |closed: &ClosedPush| (closed.peer.key, closed.nonce);
        self.0.iter().any(|seeing| match &seeing.then {
            Then::Closed(told) => of(told) == of(closed) && told.request == closed.request,
            _ => false,
        })
    }

    /// What a peer has told of the same push and rail.
    fn told(&self, peer: PeerKey, done: &PushDone) -> Option<&PushDone> {
        let of = |done: &PushDone| (done.nonce, done.rail);
        let mut all = self.0.iter().filter_map(|seeing| match &seeing.then {
            Then::Done(by, told) if by.key == peer => Some(&**told),
            _ => None,
        });
        all.find(|told| of(told) == of(done) && told.request == done.request)
    }
}

impl Step {
    /// Whether it is over; the error is in the log.
    fn go_on(&mut self) -> Result<bool, Cause> {
        let failed = Cause::Gpu {
            operation: GpuOperation::Visibility,
            code: 0,
        };
        match self {
            Self::ToBegin(loopback) => match loopback.begin() {
                Ok(Some(reading)) => {
                    *self = Self::Begun(Arc::clone(loopback), reading);
                    Ok(false)
                }
                Ok(None) => Ok(false),
                Err(error) => {
                    error!(error = chain(&error), "a GPU's memory is not read back");
                    Err(failed)
                }
            },
            Self::Begun(loopback, reading) => {
                loopback.look();
                match reading.end() {
                    None => Ok(false),
                    Some(true) => Ok(true),
                    Some(false) => Err(failed),
                }
            }
        }
    }
}

impl Worker {
    /// All bytes of a pull have come; its checksums are looked at when they can be read.
    pub(super) fn verify_pull(&mut self, id: TransferId) {
        self.pulled(id, Then::Verify(id));
    }

    /// Or its lease is.
    pub(super) fn check_lease(&mut self, id: TransferId) {
        match self.live.get(&id).is_some_and(|live| live.verify.is_some()) {
            // They can: there were checksums before.
            true => self.waiting_checks.push_back(Check { id, job: None }),
            false => self.pulled(id, Then::CheckLease(Check { id, job: None })),
        }
    }

    /// All bytes of one job of a pull have come.
    pub(super) fn check_job(&mut self, id: TransferId, job: JobId) {
        let job = Some(job);
        self.pulled(id, Then::CheckLease(Check { id, job }));
    }

    fn pulled(&mut self, id: TransferId, then: Then) {
        let Some(live) = self.live.get(&id) else {
            return;
        };
        let job = match &then {
            Then::CheckLease(check) => check.job,
            _ => None,
        };
        // What a push has written is the peer's to see, and what comes job by job was looked at by job.
        if live.push || live.into.is_some() && job.is_none() {
            return self.seen(then, Ok(()));
        }
        let (engine, peer) = (Arc::clone(&live.engine), Arc::clone(&live.peer));
        let rails = match job {
            Some(job) => self.transfers.rails_of(id, job),
            None => self.transfers.rails(id),
        };
        self.see(&engine, &peer, rails, then);
    }

    /// A producer has said that its push is done: it counts when its bytes can be read.
    pub(super) fn push_told(&mut self, peer: &Arc<PeerSession>, done: PushDone) {
        let Some(engine) = peer.engine.upgrade() else {
            return;
        };
        match self.visible.told(peer.key, &done) {
            None => {}
            // One word of it is enough, and a peer that repeats it is to keep nothing here.
            Some(told) if *told == done => {
                return debug!(request = %done.request, rail = done.rail, "push done, told again");
            }
            Some(_) => return lies(peer, format!("push of {} done in two ways", done.request)),
        }
        let of = (&done.request, done.nonce);
        // Also of one that has failed: its memory is free then.
        let bound = engine.books.with(&engine, |books, _| {
            books.expects.may_tell(of.0, of.1, peer.key)
        });
        // It speaks for one pair of rails. What was staged has been seen before it was taken; and who is not bound has
        // written nothing.
        let rails = match peer.has_whole_jobs() || !bound {
            true => RailSet::EMPTY,
            false => RailSet::only(done.rail),
        };
        let then = Then::Done(Arc::clone(peer), Box::new(done));
        self.see(&engine, peer, rails, then);
    }

    /// A producer has said that it writes nothing more of a push that it has given up: its blocks are free when what it
    /// has written has landed, which a device says of its own queue pairs before.
    pub(super) fn push_closed(&mut self, closed: ClosedPush) {
        let Some(engine) = closed.peer.engine.upgrade() else {
            return;
        };
        let peer = Arc::clone(&closed.peer);
        let bound = engine.books.with(&engine, |books, _| {
            (books.expects).may_tell(&closed.request, closed.nonce, peer.key)
        });
        if self.visible.is_closing(&closed) {
            return debug!(request = %closed.request, "push closed, told again");
        }
        let rails = match bound {
            true => peer.rails_that_work(),
            false => RailSet::EMPTY,
        };
        self.see(&engine, &peer, rails, Then::Closed(Box::new(closed)));
    }

    /// Does what is needed before it can be read what these pairs of rails have written.
    pub(super) fn see(
        &mut self,
        engine: &Arc<Inner>,
        peer: &PeerSession,
        rails: RailSet,
        then: Then,
    ) {
        if rails.is_empty() {
            return self.seen(then, Ok(()));
        }
        // What comes over GPU links, or is unpacked from buffers, is put there by the GPU itself.
        let gpu = engine.gpu.as_ref().filter(|_| !peer.is_ipc());
        let gpu = gpu.filter(|gpu| gpu.is_registered());
        match gpu.map(|gpu| (gpu, gpu.step())) {
            None | Some((_, HostStep::Native)) => self.seen(then, Ok(())),
            Some((gpu, HostStep::HostFlush)) => {
                let flushed = gpu.flush();
                let flushed = flushed.map_err(|error| cause(GpuOperation::Visibility, &error));
                self.seen(then, flushed);
            }
            Some((_, HostStep::LoopbackRead)) => {
                let rails = rails.iter();
                let rails = rails.filter_map(|pair| peer.rails.get(usize::from(pair)));
                let loopbacks = rails.filter_map(|rail| rail.loopback.clone());
                let steps = loopbacks.map(Step::ToBegin).collect();
                self.visible.0.push(Seeing { then, steps });
                self.look_at_visible();
            }
        }
    }

    /// Looks at what is read back; whether any of it is over.
    pub(super) fn look_at_visible(&mut self) -> bool {
        let (mut any, mut at) = (false, 0);
        while let Some(seeing) = self.visible.0.get_mut(at) {
            let mut failed = None;
            seeing.steps.retain_mut(|step| match step.go_on() {
                Ok(over) => !over,
                Err(cause) => {
                    failed = Some(cause);
                    true
                }
            });
            let gone = match &seeing.then {
                Then::Verify(id) | Then::CheckLease(Check { id, .. }) => {
                    !self.live.contains_key(id)
                }
                Then::Closed(closed) => closed.peer.lost().is_some(),
                Then::Taken(peer, _) | Then::Done(peer, _) => peer.lost().is_some(),
            };
            let end = match failed {
                Some(cause) => Err(cause),
                None if seeing.steps.is_empty() || gone => Ok(()),
                None => {
                    at += 1;
                    continue;
                }
            };
            any = true;
            let Seeing { then, .. } = self.visible.0.swap_remove(at);
            if !gone {
                self.seen(then, end);
            }
        }
        any
    }

    /// The bytes can be read, or why that is not known.
    fn seen(&mut self, then: Then, end: Result<(), Cause>) {
        let now = self.clock.now();
        match (then, end) {
            (Then::Verify(id), Ok(())) => self.verify(id),
            (Then::Verify(id), Err(cause)) => {
                self.verified(now, id, Err(Box::new(Unverified::from(cause))));
            }
            (Then::CheckLease(check), Ok(())) => self.waiting_checks.push_back(check),
            (Then::CheckLease(check), Err(cause)) => {
                self.lease_answer(check, LeaseAnswer::Gone { cause });
            }
            (Then::Taken(peer, taking), end) => {
                if let Some(engine) = peer.engine.upgrade() {
                    Inner::take_ended(&engine, &peer, &taking, end.err());
                }
            }
            (Then::Closed(closed), Ok(())) => closed.heed(),
            // Its queue pairs go, and its blocks are free when they have gone.
            (Then::Closed(closed), Err(cause)) => closed.peer.fail(cause),
            (Then::Done(peer, done), Ok(())) => self.heard(&peer, (*done).into()),
            // What has come is not to be believed, nor can it be asked for again.
            (Then::Done(peer, _), Err(cause)) => peer.fail(cause),
        }
    }
}
