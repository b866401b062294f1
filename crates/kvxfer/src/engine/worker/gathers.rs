//! What a worker has to do with GPUs: jobs that wait for a kernel's end, blocks that a GPU copies, and blocks that
//! consumers have been asked to fetch.
//!
//! A GPU tells nobody that it has ended something, so it is looked at: all the time while what was begun is young,
//! then every few dozen microseconds.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{debug, error};

use super::fetches::Fetches;
use super::stages::Stages;
use super::{RETRY, Worker};
use crate::engine::Inner;
use crate::engine::gpu::{Taking, cause};
use crate::engine::moves::{Moved, Moves};
use crate::engine::peer_session::PeerSession;
use crate::error::Error;
use crate::mem::gather::{Fence, Gather, GatherEnd};
use crate::mem::gpu::Event;
use crate::plan::{LayerScope, Plan};
use crate::rails::RailSet;
use crate::transfer::{Cause, Direction, GpuOperation, Job, JobError, JobId, JobReport, PeerKey};
use crate::wire::{Take, TakeOf, TakeStop};

/// Gathers of one worker that a GPU has at a time; others wait in order.
pub(crate) const MOST_RUNNING: usize = 8;
/// What is younger is looked at without a rest.
const YOUNG: Duration = Duration::from_micros(300);
/// And then the rests between two looks.
const REST: Duration = Duration::from_micros(30);
/// How long a worker that ends waits for what runs.
const LAST_WAIT: Duration = Duration::from_secs(2);

/// What a job waits for before its bytes may move.
#[derive(Debug)]
enum Until {
    /// The engine's work that comes first.
    Event(Event),
    /// The producer's fence behind it.
    Released(Fence),
}

#[derive(Debug)]
struct Held {
    job: Arc<Job>,
    until: Until,
}

/// Who wants blocks copied.
#[derive(Debug)]
pub(super) enum For {
    /// A pull of this worker's.
    Job(Arc<Job>),
    /// A producer, of its push.
    Producer(Box<Taking>),
}

#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) peer: Arc<PeerSession>,
    pub(super) by: For,
}

impl Wanted {
    pub(super) fn plan(&self) -> Option<&Arc<Plan>> {
        match &self.by {
            For::Job(job) => match &Moves::of(&*job.source)?.what {
                Moved::Planned(plan) => Some(plan),
                // The consumer plans what kernels have posted.
                Moved::Posted(_) => None,
            },
            For::Producer(taking) => Some(&taking.plan),
        }
    }

    pub(super) fn job(&self) -> Option<&Job> {
        match &self.by {
            For::Job(job) => Some(job),
            For::Producer(_) => None,
        }
    }

    fn is_job(&self, id: JobId) -> bool {
        matches!(&self.by, For::Job(job) if job.id == id)
    }

    fn is_taking(&self, peer: PeerKey, number: u64) -> bool {
        let of_peer = self.peer.key == peer;
        of_peer && matches!(&self.by, For::Producer(taking) if taking.number == number)
    }
}

#[derive(Debug)]
struct Running {
    wanted: Wanted,
    gather: Gather,
    stopped: bool,
}

impl Running {
    fn stop(&mut self) {
        if std::mem::replace(&mut self.stopped, true) {
            return;
        }
        if let Err(error) = self.gather.abort() {
            error!(%error, "a gather cannot be told to stop");
        }
    }
}

/// A job whose blocks the consumer has been asked to fetch.
#[derive(Debug)]
struct Asked {
    job: Arc<Job>,
    peer: Arc<PeerSession>,
}

#[derive(Debug, Default)]
pub(super) struct Gathers {
    held: Vec<Held>,
    waiting: VecDeque<Wanted>,
    running: Vec<Running>,
    /// Peers of launches of which nobody knows whether they have ended: a GPU has refused a part of one, or lost
    /// it. What they touch is never given back.
    lost: Vec<PeerKey>,
    asked: HashMap<JobId, Asked>,
    /// What comes through pinned memory, and what peers want there.
    pub(super) fetches: Fetches,
    pub(super) stages: Stages,
    /// When something was last begun.
    begun: Option<Instant>,
}

impl Gathers {
    /// How long the worker may rest before it has to look again; `None`: there is nothing to look at.
    pub(super) fn rest(&self) -> Option<Duration> {
        let staged = self.fetches.on_gpu() || self.stages.on_gpu();
        if self.held.is_empty() && self.running.is_empty() && !staged {
            let blocked = self.fetches.blocked() || self.stages.blocked();
            return blocked.then_some(RETRY);
        }
        let young = self.begun.is_some_and(|begun| begun.elapsed() < YOUNG);
        Some(if young { Duration::ZERO } else { REST })
    }

    /// A GPU has work since now.
    pub(super) fn begun(&mut self) {
        self.begun = Some(Instant::now());
    }

    /// Nobody knows whether a GPU goes on for a peer.
    pub(super) fn lost(&mut self, peer: PeerKey) {
        self.lost.push(peer);
    }

    /// The first of the peer that has fewest launches, of those that there is room for: one that wants much does
    /// not hold up the others.
    fn next_waiting(&mut self) -> Option<Wanted> {
        let running = |wanted: &Wanted| {
            let of_peer = |run: &&Running| run.wanted.peer.key == wanted.peer.key;
            let launched = self.running.iter().filter(of_peer).count();
            launched + self.fetches.of(wanted.peer.key)
        };
        let room = |wanted: &Wanted| match wanted.peer.is_ipc() {
            true => self.running.len() < MOST_RUNNING,
            false => self.fetches.room(wanted.peer.key),
        };
        let waiting = self.waiting.iter().enumerate();
        let waiting = waiting.filter(|(_, wanted)| room(wanted));
        let (at, _) = waiting.min_by_key(|(_, wanted)| running(wanted))?;
        self.waiting.remove(at)
    }

    /// Whether a peer's memory may be read here, or this rank's written for it.
    pub(super) fn touch(&self, peer: PeerKey) -> bool {
        let runs = self.running.iter().any(|run| run.wanted.peer.key == peer);
        let staged = self.fetches.touch(peer) || self.stages.touch(peer);
        runs || staged || self.lost.contains(&peer)
    }

    /// A peer's queue pairs are taken down: nothing more is copied from it. What has not been begun is found out
    /// when it is to be.
    pub(super) fn stop_peer(&mut self, peer: PeerKey) {
        let of_peer = |run: &&mut Running| run.wanted.peer.key == peer;
        self.running
            .iter_mut()
            .filter(of_peer)
            .for_each(Running::stop);
        self.stages.stop_peer(peer);
    }

    /// Nothing is known of a peer any more.
    pub(super) fn forget_peer(&mut self, peer: PeerKey) {
        self.asked.retain(|_, asked| asked.peer.key != peer);
        self.held.retain(|held| held.job.peer != peer);
        self.waiting.retain(|wanted| wanted.peer.key != peer);
        self.stages.forget_peer(peer);
    }

    /// Tells everything to stop and waits for the ends, for a while. The peers whose memory is being read all the
    /// same.
    pub(super) fn end(&mut self) -> Vec<PeerKey> {
        self.held.clear();
        self.waiting.clear();
        self.running.iter_mut().for_each(Running::stop);
        let deadline = Instant::now() + LAST_WAIT;
        let mut left = self.lost.clone();
        let running = std::mem::take(&mut self.running).into_iter();
        let running = running.map(|run| (run.wanted.peer.key, run.gather));
        let staged = self.fetches.end().into_iter().chain(self.stages.end());
        let all: Vec<(PeerKey, Gather)> = running.chain(staged).collect();
        for (peer, mut gather) in all {
            if let Err(error) = gather.wait(deadline) {
                error!(%error, "a gather goes on after its worker's end");
                left.push(peer);
            }
        }
        left
    }
}

/// All that there is to say of a job that is whole or not, if so by these pairs of rails.
fn report(job: &Job, error: Option<Cause>, whole: bool, rails: RailSet) -> JobReport {
    let (ops_done, bytes_done) = match whole {
        true => (job.ops(), job.bytes()),
        false => (0, 0),
    };
    JobReport {
        job: job.id,
        transfer: job.transfer,
        owner: job.owner,
        ops_done,
        bytes_done,
        error: error.map(|cause| JobError { op: 0, cause }),
        in_doubt: false,
        doubts: 0,
        rails: if whole { rails } else { RailSet::EMPTY },
        quiescent: true,
    }
}

impl Worker {
    /// Holds a job until the work that it comes after has ended; false: there is none.
    pub(super) fn hold(&mut self, job: &Arc<Job>) -> bool {
        let Some(event) = Moves::of(&*job.source).and_then(|moves| moves.after.clone()) else {
            return false;
        };
        self.hold_until(job, Until::Event(event));
        self.transfers.held(job.transfer, job.id);
        true
    }

    fn hold_until(&mut self, job: &Arc<Job>, until: Until) {
        self.gathers.begun = Some(Instant::now());
        let job = Arc::clone(job);
        self.gathers.held.push(Held { job, until });
    }

    /// Begins a job of a peer whose blocks go from GPU to GPU.
    pub(super) fn begin_gather(&mut self, peer: Arc<PeerSession>, job: Arc<Job>) {
        match job.dir {
            Direction::Read => {
                let by = For::Job(job);
                self.gathers.waiting.push_back(Wanted { peer, by });
            }
            Direction::Write if self.hold_for_release(&job) => {}
            Direction::Write => self.ask(peer, job),
        }
    }

    /// Puts the fence behind the producer's last kernel, before anybody else reads what that has written. True: the
    /// job waits for it, or has failed with it.
    pub(super) fn hold_for_release(&mut self, job: &Arc<Job>) -> bool {
        if Moves::of(&*job.source).is_some_and(|moves| moves.is_released) {
            return false;
        }
        let live = self.live.get(&job.transfer);
        let gpu = live.and_then(|live| live.engine.gpu.clone());
        match gpu.map_or(Ok(None), |gpu| gpu.release()) {
            Ok(None) => return false,
            Ok(Some(fence)) => self.hold_until(job, Until::Released(fence)),
            Err(error) => {
                let cause = cause(GpuOperation::Fence, &error);
                self.job_over(job, Some(cause), false);
            }
        }
        true
    }

    /// Asks the consumer to fetch a job's blocks.
    fn ask(&mut self, peer: Arc<PeerSession>, job: Arc<Job>) {
        if let Err(cause) = peer.usable() {
            return self.job_over(&job, Some(cause), false);
        }
        let (Some(moves), Some(live)) = (Moves::of(&*job.source), self.live.get(&job.transfer))
        else {
            return;
        };
        let (layer, of) = match &moves.what {
            Moved::Planned(plan) => {
                let layer = match plan.scope() {
                    LayerScope::All => None,
                    LayerScope::Layer(layer) => Some(layer),
                };
                let of = plan.units().map(|(group, of)| TakeOf::new(group, of));
                (layer, of.collect())
            }
            // Of one layer: that is how it was put together for such a peer.
            Moved::Posted(posted) => {
                let first = posted.blocks().next();
                let (group, layer) = first.map_or((0, 0), |(group, layer, _)| (group, layer));
                let pairs = posted.blocks().map(|(_, _, pair)| (pair.src, pair.dst));
                (Some(layer), vec![TakeOf::new(group, pairs)])
            }
        };
        let take = Take {
            number: job.id.0,
            request: live.request.clone(),
            nonce: live.nonce,
            layer,
            of,
            bytes: job.bytes(),
        };
        job.note_posted(self.clock.now());
        peer.link.send(take.into());
        self.gathers.asked.insert(job.id, Asked { job, peer });
    }

    pub(super) fn job_over(&mut self, job: &Job, error: Option<Cause>, whole: bool) {
        // There is no card whose writes could be on their way still.
        let report = report(job, error, whole, RailSet::only(0));
        self.report_all(job, &report);
    }

    /// The word of all that would have had a part in it.
    fn report_all(&mut self, job: &Job, report: &JobReport) {
        for _ in 0..job.workers.max(1) {
            self.job_report(report);
        }
    }

    /// A consumer has fetched a job's blocks, or why not.
    pub(super) fn taken(&mut self, peer: &PeerSession, job: JobId, failed: Option<Cause>) {
        let asked = &mut self.gathers.asked;
        if asked
            .get(&job)
            .is_none_or(|asked| asked.peer.key != peer.key)
        {
            return debug!(?job, "blocks were fetched that nobody has asked for");
        }
        if let Some(Asked { job, .. }) = asked.remove(&job) {
            let whole = failed.is_none();
            self.job_over(&job, failed, whole);
        }
    }

    /// Stops a job that is held, copied or asked for; false: it is not.
    pub(super) fn stop_gather(&mut self, id: JobId) -> bool {
        let gathers = &mut self.gathers;
        if let Some(run) = gathers.running.iter_mut().find(|run| run.wanted.is_job(id)) {
            run.stop();
            return true;
        }
        if let Some(at) = gathers.fetches.find(|wanted| wanted.is_job(id)) {
            self.stop_fetch(at);
            return true;
        }
        if let Some(asked) = gathers.asked.get(&id) {
            asked.peer.link.send(TakeStop { number: id.0 }.into());
            return true;
        }
        let held = gathers.held.iter().position(|held| held.job.id == id);
        let waiting = gathers.waiting.iter().position(|wanted| wanted.is_job(id));
        let job = match (held, waiting) {
            (Some(at), _) => Some(gathers.held.swap_remove(at).job),
            (None, Some(at)) => match gathers.waiting.remove(at).map(|wanted| wanted.by) {
                Some(For::Job(job)) => Some(job),
                _ => None,
            },
            (None, None) => None,
        };
        let Some(job) = job else {
            return false;
        };
        self.job_over(&job, None, false);
        true
    }

    /// A producer wants blocks of its push fetched.
    pub(super) fn take(&mut self, peer: Arc<PeerSession>, taking: Box<Taking>) {
        let by = For::Producer(taking);
        self.gathers.waiting.push_back(Wanted { peer, by });
    }

    /// And no more.
    pub(super) fn take_stop(&mut self, peer: &PeerSession, number: u64) {
        let gathers = &mut self.gathers;
        let is_it = |wanted: &Wanted| wanted.is_taking(peer.key, number);
        if let Some(run) = gathers.running.iter_mut().find(|run| is_it(&run.wanted)) {
            return run.stop();
        }
        if let Some(at) = gathers.fetches.find(is_it) {
            return self.stop_fetch(at);
        }
        if let Some(at) = gathers.waiting.iter().position(is_it)
            && let Some(wanted) = gathers.waiting.remove(at)
        {
            self.over(wanted, Err(Cause::Cancelled));
        }
    }

    /// Nothing more is copied.
    pub(super) fn over(&mut self, wanted: Wanted, end: Result<(), Cause>) {
        self.over_by(wanted, end, RailSet::only(0));
    }

    /// The same, of what these pairs of rails have carried.
    pub(super) fn over_by(&mut self, wanted: Wanted, end: Result<(), Cause>, rails: RailSet) {
        let Wanted { peer, by } = wanted;
        match by {
            For::Job(job) => {
                let whole = end.is_ok();
                let error = end.err().map(|cause| match cause {
                    // Told to stop: by its ledger, which has the cause, or with all that is its peer's.
                    Cause::Cancelled => peer.ends_for().unwrap_or(Cause::LaneReset),
                    cause => cause,
                });
                let report = report(&job, error.filter(|_| !job.is_stopped()), whole, rails);
                self.report_all(&job, &report);
            }
            For::Producer(taking) => {
                if let Some(engine) = peer.engine.upgrade() {
                    Inner::take_ended(&engine, &peer, &taking, end.err());
                }
            }
        }
    }

    /// Looks at everything that a GPU has to end; whether something has.
    pub(super) fn look_at_gpus(&mut self) -> bool {
        let mut any = self.look_at_held();
        while let Some(wanted) = self.gathers.next_waiting() {
            any = true;
            match wanted.peer.is_ipc() {
                true => self.launch(wanted),
                false => self.begin_fetch(wanted),
            }
        }
        any |= self.look_at_stages() | self.look_at_fetches();
        let mut at = 0;
        while let Some(run) = self.gathers.running.get_mut(at) {
            let Some(end) = run.gather.poll() else {
                at += 1;
                continue;
            };
            any = true;
            let run = self.gathers.running.swap_remove(at);
            let end = match end {
                GatherEnd::Whole => Ok(()),
                GatherEnd::Failed(error @ crate::mem::Error::Gpu(_)) => {
                    self.lose(&run.wanted, &Error::Memory(error));
                    continue;
                }
                GatherEnd::Failed(error) => Err(cause(GpuOperation::Gather, &Error::Memory(error))),
                // Nobody else tells it to stop.
                _ => Err(Cause::Cancelled),
            };
            self.over(run.wanted, end);
        }
        any
    }

    /// A GPU has refused a part of a launch, or lost one: whether anything of it moves is for nobody here to know.
    /// The session ends, and neither side is told that its memory is free.
    pub(super) fn lose(&mut self, wanted: &Wanted, error: &Error) -> Cause {
        let cause = cause(GpuOperation::Gather, error);
        self.gathers.lost.push(wanted.peer.key);
        wanted.peer.fail(cause.clone());
        if let For::Job(job) = &wanted.by {
            let mut report = report(job, Some(cause.clone()), false, RailSet::EMPTY);
            report.quiescent = false;
            self.job_report(&report);
        }
        cause
    }

    fn launch(&mut self, wanted: Wanted) {
        // What is begun after the peer's queue pairs were told to go would write when its memory counts as free;
        // what is begun before is seen by `touch`.
        if let Err(cause) = wanted.peer.usable() {
            return self.over(wanted, Err(cause));
        }
        let gather = match (&wanted.peer.gpu, wanted.plan()) {
            (Some(gpu), Some(plan)) => gpu.gather(plan),
            _ => Err(Error::OtherPlan),
        };
        match gather {
            Ok(gather) => {
                if let For::Job(job) = &wanted.by {
                    job.note_posted(self.clock.now());
                }
                self.gathers.begun = Some(Instant::now());
                self.gathers.running.push(Running {
                    wanted,
                    gather,
                    stopped: false,
                });
            }
            Err(error @ Error::Memory(crate::mem::Error::Gpu(_))) => {
                self.lose(&wanted, &error);
            }
            // Nothing was put on the GPU.
            Err(error) => {
                let cause = cause(GpuOperation::Gather, &error);
                self.over(wanted, Err(cause));
            }
        }
    }

    fn look_at_held(&mut self) -> bool {
        let mut any = false;
        let mut at = 0;
        while let Some(held) = self.gathers.held.get(at) {
            let (operation, done) = match &held.until {
                Until::Event(event) => (GpuOperation::Wait, event.is_done()),
                Until::Released(fence) => (GpuOperation::Fence, fence.event().is_done()),
            };
            if let Ok(false) = done {
                at += 1;
                continue;
            }
            any = true;
            let Held { job, until } = self.gathers.held.swap_remove(at);
            let ended = done.map(drop).and_then(|()| match &until {
                Until::Event(_) => Ok(()),
                // It has ended: where it has run is looked at.
                Until::Released(fence) => fence.wait(Instant::now()),
            });
            let peer = self
                .live
                .get(&job.transfer)
                .map(|live| Arc::clone(&live.peer));
            match (ended, until, peer) {
                (Err(error), ..) => {
                    let cause = cause(operation, &Error::Memory(error));
                    self.job_over(&job, Some(cause), false);
                }
                (Ok(()), Until::Event(_), _) => self.begin(job),
                (Ok(()), Until::Released(_), Some(peer)) if peer.has_whole_jobs() => {
                    self.ask(peer, job);
                }
                (Ok(()), Until::Released(_), Some(_)) => self.begin_on_lanes(&job),
                (Ok(()), Until::Released(_), None) => {}
            }
        }
        any
    }
}
