//! The pinged side: what an engine keeps for one pinger, while its session stands.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tracing::{debug, warn};

use kvxfer_hipmem::HostMemory;
use kvxfer_verbs::{
    Access, CompletionQueue, GidChoice, Init, MemoryRegion, ProtectionDomain, QueuePair,
    RegionTable, Rts, WcStatus,
};

use super::lane::{RECEIVES, queue_pair, scratch};
use super::{MAX_PINGERS, PINGERS};
use crate::engine::{Inner, Runtime, spawn};
use crate::error::Error;
use crate::wire::{Blob, Describe, Refusal, RemoteSpan, Role};

/// One of the [`MAX_PINGERS`] places.
#[derive(Debug)]
struct Place(Arc<Runtime>);

impl Place {
    fn take(runtime: &Arc<Runtime>) -> Option<Self> {
        let taken = runtime.pingers.fetch_add(1, Ordering::AcqRel);
        // Given back by the drop if it is one too many.
        let place = Self(Arc::clone(runtime));
        (taken < MAX_PINGERS).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.pingers.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Scratch memory and a queue pair in a protection domain of their own: nothing of the engine's can
/// be reached through it. Everything ends with the seat.
#[derive(Debug)]
pub(crate) struct ProbeSeat {
    /// The rail that it is on.
    pub(crate) rail: usize,
    service: Option<Service>,
    pd: ProtectionDomain,
    cq: CompletionQueue,
    region: MemoryRegion,
    _memory: HostMemory,
    _place: Place,
}

impl ProbeSeat {
    /// Room for one pinger, if there is any.
    pub(crate) fn new(engine: &Inner) -> Result<Self, Refusal> {
        let place = Place::take(&engine.runtime).ok_or_else(|| Refusal::Full {
            what: PINGERS.into(),
            limit: MAX_PINGERS as u64,
        })?;
        Self::allocate(engine, place).map_err(|error| {
            warn!(%error, "pinger refused");
            // No limit of pingers: others that end their pings are no help.
            Refusal::RoleNotServed { role: Role::Probe }
        })
    }

    fn allocate(engine: &Inner, place: Place) -> Result<Self, Error> {
        let rail = engine.runtime.rails_that_work().first().copied();
        let rail = rail.unwrap_or_default();
        let context = &engine.runtime.rail(rail)?.context;
        let pd = context.alloc_pd()?;
        let memory = scratch()?;
        let access = Access::LOCAL_WRITE | Access::REMOTE_READ | Access::REMOTE_WRITE;
        let region = pd.register(memory.as_memory(), access)?;
        Ok(Self {
            rail,
            service: None,
            cq: context.create_cq(4 * RECEIVES)?,
            pd,
            region,
            _memory: memory,
            _place: place,
        })
    }

    /// What a pinger is told: who this is and where its scratch is; no format and no KV memory.
    pub(crate) fn describe(&self, engine: &Inner) -> Result<Describe, Error> {
        let mut describe = engine.describe(&[self.rail])?;
        for rail in &mut describe.rails {
            rail.memories = Vec::new();
            rail.leases = None;
            rail.scratch = Some(RemoteSpan {
                addr: self.region.addr(),
                len: self.region.len(),
                rkey: self.region.rkey(),
            });
        }
        Ok(Describe {
            format: Blob(Vec::new()),
            placement: Blob(Vec::new()),
            // Its blocks are not a pinger's to read.
            shared: None,
            // The path is chosen as it would be for the engine's own memory.
            ..describe
        })
    }

    /// The queue pair, with receives for notifications.
    pub(crate) fn queue_pair(&self, gid: Option<&GidChoice>) -> Result<QueuePair<Init>, Error> {
        let access = Access::REMOTE_READ | Access::REMOTE_WRITE;
        let qp = queue_pair(&self.pd, &self.cq, access, gid)?;
        let none = Arc::new(RegionTable::new(Vec::new()));
        for slot in 0..RECEIVES {
            qp.post_recv(slot.into(), &[], &none)?;
        }
        Ok(qp)
    }

    /// Takes notifications from now on, in a thread of its own.
    pub(crate) fn serve(&mut self, qp: QueuePair<Rts>) -> Result<(), Error> {
        let end = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| Error::Os {
                call: "eventfd",
                errno: errno as i32,
            })?;
        let answers = Arc::new(Answers {
            qp,
            cq: self.cq.clone(),
            over: AtomicBool::new(false),
            end,
        });
        let served = Arc::clone(&answers);
        let thread = spawn("kvx-ping", move || {
            if let Err(error) = served.run() {
                debug!(%error, "pings are not answered any more");
            }
        })?;
        self.service = Some(Service {
            answers,
            thread: Some(thread),
        });
        Ok(())
    }

    /// Whether it came to answer.
    pub(crate) fn serves(&self) -> bool {
        self.service.is_some()
    }
}

/// The thread that takes notifications. It never drops the seat itself, so it can be waited for:
/// once the seat is gone, nothing holds its queue pair any more.
#[derive(Debug)]
struct Service {
    answers: Arc<Answers>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Service {
    fn drop(&mut self) {
        self.answers.over.store(true, Ordering::Release);
        // Nothing lands any more from here on.
        self.answers.qp.to_error();
        // Never read: every sleep from now on ends at once. The first write does not fail.
        let _ = self.answers.end.write(1);
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            warn!("a thread for pings had panicked");
        }
    }
}

#[derive(Debug)]
struct Answers {
    qp: QueuePair<Rts>,
    cq: CompletionQueue,
    over: AtomicBool,
    /// Readable when it is over.
    end: EventFd,
}

impl Answers {
    /// Posts every receive again that a notification has used, until the seat goes or the queue
    /// pair fails.
    fn run(&self) -> Result<(), Error> {
        let none = Arc::new(RegionTable::new(Vec::new()));
        let mut completions = Vec::new();
        while !self.over.load(Ordering::Acquire) {
            completions.clear();
            let more = self.cq.poll(&mut completions, 64)?.more;
            for completion in &completions {
                if completion.status != WcStatus::Success {
                    return Ok(());
                }
                self.qp.post_recv(completion.wr_id, &[], &none)?;
            }
            if !more && completions.is_empty() && self.cq.arm()? {
                let fds = [self.cq.as_fd(), self.end.as_fd()];
                let mut fds = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
                // An interrupted or failed poll is a short sleep.
                let _ = poll(&mut fds, PollTimeout::NONE);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use kvxfer_verbs::{Link, RtrAttr, RtsAttr};

    use super::*;
    use crate::config::Config;
    use crate::engine::Engine;
    use crate::ping::side;

    #[test]
    fn the_thread_ends_with_its_seat() {
        let side = side();
        let (format, placement) = (side.format().clone(), side.placement().clone());
        let engine = Engine::new(Config::default(), format, placement).expect("an engine");
        let mut seat = ProbeSeat::new(engine.inner()).expect("a seat");

        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        let mut streams = Vec::new();
        for _ in 0..2 {
            let dialled = TcpStream::connect(address).expect("connected");
            streams.push((dialled, listener.accept().expect("accepted").0));
        }
        let (there, here): (Vec<_>, Vec<_>) = streams.into_iter().unzip();
        let [requester, responder] = <[TcpStream; 2]>::try_from(here).expect("two");
        let other = seat.queue_pair(None).expect("a queue pair");
        let attr = RtrAttr {
            remote: other.endpoint(),
            link: Link::SoftTcp {
                requester,
                responder,
            },
            min_rnr_timer: 12,
        };
        let rts = RtsAttr {
            timeout: 0,
            retry_cnt: 7,
            rnr_retry: 7,
        };
        let qp = seat.queue_pair(None).expect("a queue pair").rtr(attr);
        let qp = qp.and_then(|qp| qp.rts(rts)).expect("connected");
        seat.serve(qp).expect("a thread");
        let service = seat.service.as_ref().expect("a thread");
        assert!(service.thread.as_ref().is_some_and(|t| !t.is_finished()));
        let left = Arc::downgrade(&service.answers);
        drop(seat);
        assert!(
            left.upgrade().is_none(),
            "somebody still has the queue pair"
        );
        drop(there);
    }
}
