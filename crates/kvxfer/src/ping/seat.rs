//! The pinged side: what an engine keeps for one pinger, while its session stands.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, poll};
use tracing::{debug, warn};

use kvxfer_hipmem::HostMemory;
use kvxfer_verbs::{
    Access, CompletionQueue, Init, MemoryRegion, ProtectionDomain, QueuePair, RegionTable, Rts,
    WcStatus,
};

use super::lane::{RECEIVES, queue_pair, scratch};
use super::{MAX_PINGERS, SCRATCH};
use crate::engine::{Inner, Runtime, poll_timeout, spawn};
use crate::error::Error;
use crate::wire::{Blob, Describe, Refusal, RemoteSpan};

/// A thread that was not woken looks whether it is to end.
const LOOK: Duration = Duration::from_secs(1);

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
    answers: Option<Arc<Answers>>,
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
            what: "number of pingers".into(),
            limit: MAX_PINGERS as u64,
        })?;
        Self::allocate(engine, place).map_err(|error| {
            warn!(%error, "pinger refused");
            Refusal::Full {
                what: "scratch memory of pingers".into(),
                limit: SCRATCH,
            }
        })
    }

    fn allocate(engine: &Inner, place: Place) -> Result<Self, Error> {
        let context = engine.runtime.context();
        let pd = context.alloc_pd()?;
        let memory = scratch()?;
        let access = Access::LOCAL_WRITE | Access::REMOTE_READ | Access::REMOTE_WRITE;
        let region = pd.register(memory.as_memory(), access)?;
        Ok(Self {
            answers: None,
            cq: context.create_cq(4 * RECEIVES)?,
            pd,
            region,
            _memory: memory,
            _place: place,
        })
    }

    /// What a pinger is told: who this is and where its scratch is; no format and no KV memory.
    pub(crate) fn describe(&self, engine: &Inner) -> Result<Describe, Error> {
        Ok(Describe {
            format: Blob(Vec::new()),
            placement: Blob(Vec::new()),
            memories: Vec::new(),
            leases: None,
            scratch: Some(RemoteSpan {
                addr: self.region.addr(),
                len: self.region.len(),
                rkey: self.region.rkey(),
            }),
            // The path is chosen as it would be for the engine's own memory.
            ..engine.describe()?
        })
    }

    /// The queue pair, with receives for notifications.
    pub(crate) fn queue_pair(&self) -> Result<QueuePair<Init>, Error> {
        let access = Access::REMOTE_READ | Access::REMOTE_WRITE;
        let qp = queue_pair(&self.pd, &self.cq, access)?;
        let none = Arc::new(RegionTable::new(Vec::new()));
        for slot in 0..RECEIVES {
            qp.post_recv(slot.into(), &[], &none)?;
        }
        Ok(qp)
    }

    /// Takes notifications from now on, in a thread of its own.
    pub(crate) fn serve(&mut self, qp: QueuePair<Rts>) -> Result<(), Error> {
        let answers = Arc::new(Answers {
            qp,
            cq: self.cq.clone(),
            over: AtomicBool::new(false),
        });
        self.answers = Some(Arc::clone(&answers));
        spawn("kvx-ping", move || {
            if let Err(error) = answers.run() {
                debug!(%error, "pings are not answered any more");
            }
        })?;
        Ok(())
    }

    /// Whether it came to answer.
    pub(crate) fn serves(&self) -> bool {
        self.answers.is_some()
    }
}

impl Drop for ProbeSeat {
    fn drop(&mut self) {
        if let Some(answers) = &self.answers {
            answers.over.store(true, Ordering::Release);
            // Flushes the receives, which wakes the thread; and nothing lands any more from here on.
            answers.qp.to_error();
        }
    }
}

#[derive(Debug)]
struct Answers {
    qp: QueuePair<Rts>,
    cq: CompletionQueue,
    over: AtomicBool,
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
                let mut fds = [PollFd::new(self.cq.as_fd(), PollFlags::POLLIN)];
                // An interrupted or failed poll is a short sleep.
                let _ = poll(&mut fds, poll_timeout(Some(LOOK)));
            }
        }
        Ok(())
    }
}
