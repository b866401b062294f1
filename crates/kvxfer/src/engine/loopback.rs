//! A READ of this rank's own GPU memory through its own device. It comes back after what the device has written
//! there before, and so shows that this has come: the completion of a write says it of the host's memory alone. What
//! GPU needs it, [`visibility`](crate::mem::gpu::visibility) says.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tracing::error;

use kvxfer_verbs::{
    Access, Completion, CompletionQueue, Context, InitAttr, Link as QpLink, MemoryRegion,
    ProtectionDomain, QpCaps, QueuePair, RegionTable, Remote, RtrAttr, Rts, RtsAttr, SendChain,
    SendOp, Sge, WcStatus,
};

use super::rail::Rail;
use crate::error::Error;
use crate::mem::gpu::GpuMemory;
use crate::mem::{ArenaOptions, HostArena, HugePages};

/// Bytes that are read.
const WORD: u32 = 8;
/// What is registered for it of the memory: no more than has to be.
const SPAN: u64 = 4096;
/// How long a read may take beside its retries, of which a device may take four times as long as it was told.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two looks at the first one.
const LOOK: Duration = Duration::from_micros(50);
/// Reads under way at a time.
const DEPTH: u32 = 64;

/// A read that was begun; how it has ended.
#[derive(Debug)]
pub(crate) struct Reading(OnceLock<bool>, Instant);

impl Reading {
    /// `None`: not yet; `Some(false)`: it has failed.
    pub(crate) fn end(&self) -> Option<bool> {
        self.0.get().copied()
    }
}

/// Two queue pairs of one port, joined with each other.
#[derive(Debug)]
struct Joined {
    near: QueuePair<Rts>,
    _far: QueuePair<Rts>,
    /// Theirs alone: one that has failed is not used again.
    cq: CompletionQueue,
}

#[derive(Debug, Default)]
struct State {
    /// `None`: to be made anew, for the last ones have failed.
    joined: Option<Joined>,
    /// In the order in which they complete.
    under_way: VecDeque<Arc<Reading>>,
    #[cfg(test)]
    ended: u32,
    /// Nothing comes back for now.
    #[cfg(test)]
    held: bool,
    completions: Vec<Completion>,
}

/// One rail's.
#[derive(Debug)]
pub(crate) struct Loopback {
    // Declared first: the queue pairs go before what they read and write.
    state: Mutex<State>,
    context: Context,
    pd: ProtectionDomain,
    retries: RtsAttr,
    /// Where the word lands.
    landing: Arc<RegionTable>,
    /// What is read: peers are told no key of it.
    read: MemoryRegion,
}

impl Loopback {
    /// Of memory that the rail's device registers.
    ///
    /// # Errors
    ///
    /// [`Error::Verbs`], [`Error::Memory`]; [`Error::NoLoopback`] where the device does not read what is its own.
    pub(crate) fn new(rail: &Rail, memory: &GpuMemory, retries: RtsAttr) -> Result<Self, Error> {
        let first = memory.slice(0, memory.len().min(SPAN))?;
        let options = ArenaOptions {
            huge: HugePages::Never,
            prefault: true,
        };
        let landing = HostArena::with_options(SPAN, options)?.memory().as_memory();
        let landing = rail.pd.register(landing, Access::LOCAL_WRITE)?;
        let new = Self {
            read: rail.pd.register(first.as_memory(), Access::REMOTE_READ)?,
            landing: Arc::new(RegionTable::new(vec![landing])),
            context: rail.context.clone(),
            pd: rail.pd.clone(),
            retries,
            state: Mutex::default(),
        };
        new.try_once()?;
        Ok(new)
    }

    /// Reads once and waits for it: a device that takes such queue pairs and carries nothing over them is better known
    /// before anything depends on it.
    fn try_once(&self) -> Result<(), Error> {
        #[cfg(test)]
        if super::gpu::trial::DEAF.get() {
            let joined = self.join()?;
            joined.near.to_error();
            self.with_state(|state| state.joined = Some(joined));
        }
        let reading = self.begin()?;
        loop {
            self.look();
            match reading.as_ref().and_then(|reading| reading.end()) {
                Some(true) => return Ok(()),
                Some(false) => {
                    let device = self.context.device().name.clone();
                    return Err(Error::NoLoopback { device });
                }
                // Not for long: a read that does not end is given up.
                None => thread::sleep(LOOK),
            }
        }
    }

    fn with_state<R>(&self, act: impl FnOnce(&mut State) -> R) -> R {
        // Valid at every step.
        act(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn join(&self) -> Result<Joined, Error> {
        let gid = self.context.gid_towards(&self.context.address().gids)?;
        let caps = QpCaps {
            max_send_wr: DEPTH,
            max_recv_wr: 1,
            max_send_sge: 1,
            max_recv_sge: 1,
        };
        let cq = self.context.create_cq(2 * DEPTH)?;
        let make = |access| {
            let mut attr = InitAttr::new(access);
            attr.gid_index = gid.as_ref().map(|gid| gid.index);
            self.pd.create_qp(caps, &cq, &cq)?.init(attr)
        };
        let (near, far) = (make(Access::NONE)?, make(Access::REMOTE_READ)?);
        let towards = |remote| RtrAttr {
            remote,
            link: QpLink::Rdma,
            min_rnr_timer: 12,
        };
        let (to_far, to_near) = (towards(far.endpoint()), towards(near.endpoint()));
        Ok(Joined {
            near: near.rtr(to_far)?.rts(self.retries)?,
            _far: far.rtr(to_near)?.rts(self.retries)?,
            cq,
        })
    }

    /// Begins a read, behind all that the device has written so far. `None`: too many are under way.
    ///
    /// # Errors
    ///
    /// [`Error::Verbs`]: the device takes none.
    pub(crate) fn begin(&self) -> Result<Option<Arc<Reading>>, Error> {
        self.with_state(|state| {
            self.look_at(state);
            if state.under_way.len() >= DEPTH as usize {
                return Ok(None);
            }
            let joined = match &mut state.joined {
                Some(joined) => joined,
                none => none.insert(self.join()?),
            };
            let mut chain = SendChain::new();
            let remote = Remote {
                addr: self.read.addr(),
                rkey: self.read.rkey(),
            };
            let sge = Sge {
                region: 0,
                len: WORD,
                offset: 0,
            };
            chain.push(0, SendOp::Read(remote), true, &[sge]);
            if let Err(failed) = joined.near.post_send(&chain, &self.landing) {
                error!(device = self.context.device().name, cause = %failed.cause, "READ of its own memory");
                state.give_up();
                return Ok(Some(Arc::new(Reading(OnceLock::from(false), Instant::now()))));
            }
            let reading = Arc::new(Reading(OnceLock::new(), Instant::now()));
            state.under_way.push_back(Arc::clone(&reading));
            Ok(Some(reading))
        })
    }

    /// How many reads have come back.
    #[cfg(test)]
    pub(crate) fn ended(&self) -> u32 {
        self.with_state(|state| state.ended)
    }

    /// Whether nothing comes back from here on.
    #[cfg(test)]
    pub(crate) fn hold(&self, held: bool) {
        self.with_state(|state| state.held = held);
    }

    /// Reads that have not come back.
    #[cfg(test)]
    pub(crate) fn under_way(&self) -> usize {
        self.with_state(|state| state.under_way.len())
    }

    /// The next read fails.
    #[cfg(test)]
    pub(crate) fn break_once(&self) {
        self.with_state(|state| state.joined.iter().for_each(|of| of.near.to_error()));
    }

    /// Takes the ends that have come.
    pub(crate) fn look(&self) {
        self.with_state(|state| self.look_at(state));
    }

    fn look_at(&self, state: &mut State) {
        let (Some(oldest), Some(joined)) = (state.under_way.front(), &state.joined) else {
            return;
        };
        let begun = oldest.1;
        #[cfg(test)]
        if state.held {
            return;
        }
        let mut completions = std::mem::take(&mut state.completions);
        completions.clear();
        let device = &self.context.device().name;
        if let Err(error) = joined.cq.poll(&mut completions, DEPTH as usize) {
            error!(device, %error, "READs of its own memory");
            state.give_up();
        }
        for completion in &completions {
            let reading = match completion.status {
                WcStatus::Success => state.under_way.pop_front(),
                status => {
                    error!(device, ?status, "READ of its own memory");
                    state.give_up();
                    None
                }
            };
            if let Some(reading) = reading {
                let _ = reading.0.set(true);
                #[cfg(test)]
                {
                    state.ended += 1;
                }
            }
        }
        state.completions = completions;
        // A device that has failed may never say so of what was posted to it.
        let retries = self.retries.retry_time().unwrap_or_default();
        if !state.under_way.is_empty() && begun.elapsed() > 4 * retries + PATIENCE {
            error!(device, "READ of its own memory: no end");
            state.give_up();
        }
    }
}

impl State {
    /// All that is under way has failed, and the next read is of other queue pairs.
    fn give_up(&mut self) {
        for reading in self.under_way.drain(..) {
            let _ = reading.0.set(false);
        }
        // Nothing of them completes any more.
        self.joined = None;
    }
}
