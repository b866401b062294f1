//! Blocks that come through pinned memory, because one side's are a GPU's and the other's GPU does not reach them.
//!
//! Whoever has the destination moves them, a portion at a time and several side by side: the peer stages a portion
//! (where its memory is a GPU's), lanes read it, the buffer's stamp is read behind that, and the GPU here takes it
//! to where it belongs (where this side's is one).
//!
//! ```text
//!  Asked ──Staged──► Reading ──► Checking ──StageFree──► Unpacking ──► over
//!          (from a GPU)          (from a GPU)            (to a GPU)
//! ```
//!
//! A portion that has been asked for is answered for before it is over, and what lanes read or a GPU writes has
//! ended: so when all are over nothing moves here, nor on the peer's GPU.

use std::sync::Arc;

use tracing::debug;

use super::gathers::{For, Wanted};
use super::visible::Then;
use super::{Command, Worker};
use crate::engine::Inner;
use crate::engine::gpu::{Portion, Reads, StagedPeer, cause};
use crate::engine::peer_session::PeerSession;
use crate::error::Error;
use crate::mem::gather::{Gather, GatherEnd};
use crate::plan::{OpSource, Plan};
use crate::rails::RailSet;
use crate::transfer::{
    Cause, Direction, GpuOperation, Job, JobId, JobReport, PeerKey, Refusal, TransferId,
};
use crate::wire::{StageFree, Staged};

/// Portions of one job side by side.
const DEPTH: usize = 4;
/// Jobs of one peer and worker side by side: so that short ones need not wait for a long one.
const SIDE_BY_SIDE: usize = 4;
/// A buffer is read into another in reads of no fewer bytes.
const MIN_READ: u64 = 128 << 10;
/// Tells what is read for portions from the jobs of a ledger.
const OF_PORTION: u64 = 1 << 47;

/// Reads that the workers with lanes to the peer carry out.
#[derive(Debug)]
struct Reading {
    job: Arc<Job>,
    /// How many of the workers have not said that nothing of it is posted any more.
    left: u16,
    bytes: u64,
}

#[derive(Debug)]
enum State {
    Asked,
    Reading(Reading),
    Checking(Reading),
    Unpacking { gather: Gather, stopped: bool },
}

/// A portion that is on its way.
#[derive(Debug)]
struct UnderWay {
    number: u64,
    portion: Portion,
    /// This side's buffer.
    slot: Option<u32>,
    /// Where the stamp of the peer's lands; and what was told of that, once it was.
    landing: Option<u32>,
    staged: Option<Staged>,
    state: State,
}

/// A job, or blocks that a producer wants fetched.
#[derive(Debug)]
pub(super) struct Fetch {
    wanted: Wanted,
    engine: Arc<Inner>,
    plan: Arc<Plan>,
    /// The first operation that is in no portion yet.
    at: u64,
    under_way: Vec<UnderWay>,
    /// The pairs of rails that have confirmed some of it.
    rails: RailSet,
    /// Why no more portions are begun.
    ended: Option<Cause>,
    /// It waits for a buffer.
    blocked: bool,
    /// A GPU has lost a part of it: that it has ended is told to nobody.
    lost: bool,
}

impl Fetch {
    fn peer(&self) -> &Arc<PeerSession> {
        &self.wanted.peer
    }

    /// A session without it has none of this.
    fn staged(&self) -> Option<&StagedPeer> {
        self.peer().staged.as_ref()
    }

    fn is_over(&self) -> bool {
        self.under_way.is_empty() && (self.ended.is_some() || self.at >= self.plan.ops())
    }
}

#[derive(Debug, Default)]
pub(super) struct Fetches {
    all: Vec<Fetch>,
    /// Counts what is asked for and read.
    next: u64,
}

impl Fetches {
    /// Whether another of a peer may be begun.
    pub(super) fn room(&self, peer: PeerKey) -> bool {
        self.of(peer) < SIDE_BY_SIDE
    }

    pub(super) fn of(&self, peer: PeerKey) -> usize {
        self.all.iter().filter(|f| f.peer().key == peer).count()
    }

    /// The peers whose blocks this rank's GPU takes to where they belong.
    fn unpacking(&self) -> impl Iterator<Item = PeerKey> {
        let unpacks = |part: &UnderWay| matches!(part.state, State::Unpacking { .. });
        let all = self.all.iter();
        let all = all.filter(move |fetch| fetch.under_way.iter().any(unpacks));
        all.map(|fetch| fetch.peer().key)
    }

    /// Whether a GPU has to end something.
    pub(super) fn on_gpu(&self) -> bool {
        self.unpacking().next().is_some()
    }

    pub(super) fn blocked(&self) -> bool {
        self.all.iter().any(|fetch| fetch.blocked)
    }

    /// Whether this rank's GPU still writes what a peer had.
    pub(super) fn touch(&self, peer: PeerKey) -> bool {
        self.unpacking().any(|of| of == peer)
    }

    pub(super) fn find(&self, is_it: impl Fn(&Wanted) -> bool) -> Option<usize> {
        self.all.iter().position(|fetch| is_it(&fetch.wanted))
    }

    /// Tells what a GPU does to stop and gives it, with its peer, to who waits.
    pub(super) fn end(&mut self) -> Vec<(PeerKey, Gather)> {
        let all = std::mem::take(&mut self.all).into_iter();
        let mut gathers = Vec::new();
        for fetch in all {
            let peer = fetch.peer().key;
            for part in fetch.under_way {
                if let State::Unpacking { gather, .. } = part.state {
                    abort(&gather);
                    gathers.push((peer, gather));
                }
            }
        }
        gathers
    }
}

pub(super) fn abort(gather: &Gather) {
    if let Err(error) = gather.abort() {
        tracing::error!(%error, "a gather cannot be told to stop");
    }
}

/// Whether a report is of what is read for a portion.
pub(super) fn is_of_portion(job: JobId) -> bool {
    job.0 & OF_PORTION != 0
}

impl Worker {
    pub(super) fn begin_fetch(&mut self, wanted: Wanted) {
        let engine = wanted.peer.engine.upgrade();
        let plan = wanted.plan().map(Arc::clone);
        let (Some(engine), Some(plan)) = (engine, plan) else {
            return self.over(wanted, Err(Cause::ShuttingDown));
        };
        if let Some(job) = wanted.job() {
            job.note_posted(self.clock.now());
        }
        self.go_on(Fetch {
            wanted,
            engine,
            plan,
            at: 0,
            under_way: Vec::with_capacity(DEPTH),
            rails: RailSet::EMPTY,
            ended: None,
            blocked: false,
            lost: false,
        });
    }

    fn next_number(&mut self) -> u64 {
        let fetches = &mut self.gathers.fetches;
        fetches.next += 1;
        JobId::first_of(self.index).0 | OF_PORTION | fetches.next
    }

    /// Begins portions as far as there is room, or ends what is over; whether it has.
    fn go_on(&mut self, mut fetch: Fetch) -> bool {
        let from = fetch.at;
        fetch.blocked = false;
        while fetch.ended.is_none() && fetch.at < fetch.plan.ops() && fetch.under_way.len() < DEPTH
        {
            if let Err(cause) = fetch.peer().usable() {
                self.fail_fetch(&mut fetch, cause);
            } else if !self.begin_portion(&mut fetch) {
                break;
            }
        }
        let begun = fetch.at > from;
        if !fetch.is_over() {
            self.gathers.fetches.all.push(fetch);
            return begun;
        }
        if !fetch.lost {
            self.fetched(fetch);
        }
        true
    }

    /// All of it has come, or nothing of it moves any more. What rails have written to a GPU's memory for a producer is
    /// made visible before the producer hears that it is there; what is this rank's pull's, when that has all.
    fn fetched(&mut self, fetch: Fetch) {
        let Fetch {
            wanted,
            engine,
            rails,
            ended,
            ..
        } = fetch;
        match (wanted.by, ended) {
            (For::Producer(taking), None) => {
                let peer = Arc::clone(&wanted.peer);
                self.see(&engine, &wanted.peer, rails, Then::Taken(peer, taking));
            }
            (by, ended) => {
                let peer = wanted.peer;
                let end = ended.map_or(Ok(()), Err);
                self.over_by(Wanted { peer, by }, end, rails);
            }
        }
    }

    /// A GPU has lost what it wrote of a portion, whose buffer nobody gets any more. The others end as ever.
    fn lose_portion(&mut self, fetch: &mut Fetch, error: &Error) {
        fetch.lost = true;
        let cause = self.lose(&fetch.wanted, error);
        self.fail_fetch(fetch, cause);
    }

    /// False: nothing is free, or something is wrong.
    fn begin_portion(&mut self, fetch: &mut Fetch) -> bool {
        let peer = Arc::clone(fetch.peer());
        let Some(staged) = &peer.staged else {
            self.fail_fetch(fetch, Cause::NoPath);
            return false;
        };
        let own = fetch.engine.gpu.as_ref();
        let own = own.and_then(|gpu| gpu.staging().ok());
        let mut slot = None;
        if let Some(staging) = own {
            slot = staging.into.take(peer.key);
            if slot.is_none() {
                fetch.blocked = true;
                return false;
            }
        }
        let mut landing = None;
        if staged.from_gpu {
            landing = fetch.engine.scratch.take();
            if landing.is_none() || !staged.open() {
                if let Some(landing) = landing {
                    fetch.engine.scratch.give(landing);
                }
                if let (Some(staging), Some(slot)) = (own, slot) {
                    staging.into.give(peer.key, slot);
                }
                fetch.blocked = true;
                return false;
            }
        }
        let (portion, next) = Portion::cut(&fetch.plan, fetch.at, staged.piece);
        let number = self.next_number();
        let mut part = UnderWay {
            number,
            portion,
            slot,
            landing,
            staged: None,
            state: State::Asked,
        };
        if next == fetch.at {
            // Plans are cut to what fits.
            let missing = fetch.plan.ops() - next;
            self.give_back(fetch, &part, false);
            self.fail_fetch(fetch, Cause::LostWork { missing });
            return false;
        }
        fetch.at = next;
        match staged.from_gpu {
            true => peer.link.send(part.portion.wanted(number).into()),
            false => part.state = State::Reading(self.read(fetch, &part)),
        }
        fetch.under_way.push(part);
        true
    }

    /// Begins to read a portion.
    fn read(&mut self, fetch: &Fetch, part: &UnderWay) -> Reading {
        let staged = fetch.staged();
        let from = staged.zip(part.staged.as_ref());
        let from = from.map(|(staged, told)| (staged.region, told.offset));
        let own = fetch.engine.gpu.as_ref();
        let own = own.and_then(|gpu| gpu.staging().ok()).zip(part.slot);
        let into =
            own.map(|(staging, slot)| (fetch.engine.scratch_region + 1, staging.into.at(slot)));
        let lanes = fetch.peer().lanes.len().max(1) as u64;
        let chunk = (part.portion.packed() / lanes).max(MIN_READ);
        let chunk = chunk.min(fetch.peer().limits.max_msg_bytes);
        let chunk = u32::try_from(chunk).unwrap_or(u32::MAX).max(1);
        let reads = part.portion.reads(from, into, chunk);
        self.start_reads(fetch.peer(), reads)
    }

    fn start_reads(&mut self, peer: &Arc<PeerSession>, reads: Reads) -> Reading {
        let id = JobId(self.next_number());
        let left = u16::try_from(peer.workers.len()).unwrap_or(u16::MAX);
        let bytes = reads.bytes();
        let job = Arc::new(Job::new(
            id,
            // No ledger has one of this number.
            TransferId(u64::MAX),
            self.index,
            peer.key,
            Direction::Read,
            Arc::new(reads),
            left,
        ));
        self.broadcast(peer, || Command::Start(Arc::clone(&job)));
        Reading { job, left, bytes }
    }

    /// Gives back what a portion has. Whether it is the peer's to know: what it had staged is read no more.
    fn give_back(&mut self, fetch: &Fetch, part: &UnderWay, tell: bool) {
        let peer = fetch.peer();
        let own = fetch.engine.gpu.as_ref();
        if let (Some(slot), Some(Ok(staging))) = (part.slot, own.map(|gpu| gpu.staging())) {
            staging.into.give(peer.key, slot);
        }
        let Some(landing) = part.landing else { return };
        fetch.engine.scratch.give(landing);
        if tell {
            let number = part.number;
            peer.link.send(StageFree { number }.into());
        }
        // Behind the word: what another worker asks for then comes after it.
        if let Some(staged) = &peer.staged {
            staged.close();
        }
    }

    fn take_fetch(&mut self, is_it: impl Fn(&Fetch) -> bool) -> Option<Fetch> {
        let all = &mut self.gathers.fetches.all;
        let at = all.iter().position(is_it)?;
        Some(all.swap_remove(at))
    }

    /// A peer has staged a portion, or why not.
    pub(super) fn staged(&mut self, peer: &PeerSession, staged: Staged, failed: Option<Cause>) {
        let asked =
            |part: &UnderWay| part.number == staged.number && matches!(part.state, State::Asked);
        let found = self
            .take_fetch(|fetch| fetch.peer().key == peer.key && fetch.under_way.iter().any(asked));
        let Some(mut fetch) = found else {
            return debug!(
                number = staged.number,
                "staged, and nobody has asked for it"
            );
        };
        let Some(at) = fetch.under_way.iter().position(asked) else {
            return;
        };
        let mut part = fetch.under_way.swap_remove(at);
        let there = |offset, len| {
            let region = fetch.staged().map_or(u32::MAX, |staged| staged.region);
            peer.rails.iter().all(|rail| {
                let span = rail.remote.get(region as usize);
                span.is_some_and(|span| span.contains(offset, len))
            })
        };
        let stamp = crate::leases::SLOT_BYTES as u64;
        if let Some(cause) = failed {
            self.give_back(&fetch, &part, false);
            self.fail_fetch(&mut fetch, cause);
        } else if !there(staged.offset, part.portion.packed()) || !there(staged.stamp, stamp) {
            peer.link.cut_off(format!("staged at {}", staged.offset));
            let reason = Refusal::OutOfRange;
            self.give_back(&fetch, &part, false);
            self.fail_fetch(&mut fetch, Cause::Refused { reason });
        } else if fetch.ended.is_some() {
            self.give_back(&fetch, &part, true);
        } else {
            part.staged = Some(staged);
            part.state = State::Reading(self.read(&fetch, &part));
            fetch.under_way.push(part);
        }
        self.go_on(fetch);
    }

    /// No more is begun, and what runs is told to stop.
    fn fail_fetch(&mut self, fetch: &mut Fetch, cause: Cause) {
        if fetch.ended.is_some() {
            return;
        }
        fetch.ended = Some(cause);
        let peer = Arc::clone(fetch.peer());
        for part in &mut fetch.under_way {
            match &mut part.state {
                // It is answered soon.
                State::Asked => {}
                State::Reading(reading) | State::Checking(reading) => {
                    reading.job.stop();
                    let id = reading.job.id;
                    self.broadcast(&peer, || Command::Stop(id));
                }
                State::Unpacking { gather, stopped } => {
                    if !std::mem::replace(stopped, true) {
                        abort(gather);
                    }
                }
            }
        }
    }

    /// Stops the fetch at a place that was found.
    pub(super) fn stop_fetch(&mut self, at: usize) {
        let mut fetch = self.gathers.fetches.all.swap_remove(at);
        self.fail_fetch(&mut fetch, Cause::Cancelled);
        self.go_on(fetch);
    }

    /// A peer's queue pairs are taken down: it answers nothing any more.
    pub(super) fn stop_fetches(&mut self, key: PeerKey) {
        let of_peer = |fetch: &mut Fetch| fetch.peer().key == key;
        let all: Vec<Fetch> = (self.gathers.fetches.all.extract_if(.., of_peer)).collect();
        for mut fetch in all {
            let cause = fetch.peer().ends_for().unwrap_or(Cause::LaneReset);
            self.fail_fetch(&mut fetch, cause);
            let asked = |part: &mut UnderWay| matches!(part.state, State::Asked);
            let asked: Vec<UnderWay> = fetch.under_way.extract_if(.., asked).collect();
            for part in &asked {
                self.give_back(&fetch, part, false);
            }
            self.go_on(fetch);
        }
    }

    /// A worker has something to say of what is read for a portion.
    pub(super) fn portion_read(&mut self, report: &JobReport) {
        let is_it = |part: &UnderWay| match &part.state {
            State::Reading(reading) | State::Checking(reading) => reading.job.id == report.job,
            State::Asked | State::Unpacking { .. } => false,
        };
        let Some(mut fetch) = self.take_fetch(|fetch| fetch.under_way.iter().any(is_it)) else {
            return;
        };
        let Some(at) = fetch.under_way.iter().position(is_it) else {
            return;
        };
        fetch.rails |= report.rails;
        let mut part = fetch.under_way.swap_remove(at);
        let (State::Reading(reading) | State::Checking(reading)) = &mut part.state else {
            return;
        };
        reading.bytes = reading.bytes.saturating_sub(report.bytes_done);
        reading.left -= u16::from(report.quiescent && reading.left > 0);
        // A worker without a lane that works would not look whether there is any left.
        let whole = reading.bytes == 0 && reading.left > 0;
        let over = whole || reading.left == 0;
        let id = reading.job.id;
        let error = reading.job.error().map(|error| error.cause.clone());
        let missing = reading.bytes;
        let checked = matches!(part.state, State::Checking(_));
        if whole {
            let peer = Arc::clone(fetch.peer());
            self.broadcast(&peer, || Command::Stop(id));
        }
        if !over {
            fetch.under_way.push(part);
            if let Some(cause) = error {
                self.fail_fetch(&mut fetch, cause);
            }
            self.go_on(fetch);
            return;
        }
        let read = match error {
            Some(cause) => Err(cause),
            // Told to stop; why is known.
            None if fetch.ended.is_some() => Err(Cause::Cancelled),
            None if missing > 0 => Err(Cause::LostWork { missing }),
            None => Ok(()),
        };
        match read {
            Err(cause) => {
                self.give_back(&fetch, &part, true);
                self.fail_fetch(&mut fetch, cause);
            }
            Ok(()) if part.landing.is_some() && !checked => self.check_stamp(&mut fetch, part),
            Ok(()) => {
                if let Some(lost) = self.portion_here(&mut fetch, part) {
                    self.lose_portion(&mut fetch, &lost);
                }
            }
        }
        self.go_on(fetch);
    }

    /// Reads the stamp of a buffer that has been read: had it been given to another meanwhile, it says so.
    fn check_stamp(&mut self, fetch: &mut Fetch, mut part: UnderWay) {
        let landing = part.landing.map(|slot| (fetch.engine.scratch_region, slot));
        let told = part.staged.as_ref().zip(landing);
        if let (Some((staged, landing)), Some(of)) = (told, fetch.staged()) {
            let reads = Reads::of_stamp(of.region, staged, landing);
            part.state = State::Checking(self.start_reads(fetch.peer(), reads));
        }
        fetch.under_way.push(part);
    }

    /// A portion has been read as it was. The error is a GPU's that nobody knows the state of any more.
    fn portion_here(&mut self, fetch: &mut Fetch, mut part: UnderWay) -> Option<Error> {
        if let (Some(landing), Some(staged)) = (part.landing, &part.staged) {
            let shown = fetch.engine.scratch.shows(landing, staged.word);
            // Before this side's GPU has it: the peer's may go on.
            let slot = part.slot.take();
            self.give_back(fetch, &part, true);
            (part.slot, part.landing) = (slot, None);
            if !shown {
                self.give_back(fetch, &part, false);
                self.fail_fetch(fetch, Cause::PeerReset);
                return None;
            }
        }
        let (Some(gpu), Some(slot)) = (fetch.engine.gpu.clone(), part.slot) else {
            return None;
        };
        // What is begun after the queue pairs were told to go would write when the memory counts as free.
        let begun = fetch.peer().usable().map_err(Err).and_then(|()| {
            let staging = gpu.staging().map_err(|_| Ok(Error::OtherPlan))?;
            let unpacked = gpu.unpack(staging, slot, &part.portion.unpacked());
            unpacked.map_err(Ok)
        });
        match begun {
            Ok(gather) => {
                self.gathers.begun();
                let stopped = false;
                part.state = State::Unpacking { gather, stopped };
                fetch.under_way.push(part);
            }
            Err(Ok(error @ Error::Memory(crate::mem::Error::Gpu(_)))) => return Some(error),
            // Nothing was put on the GPU.
            Err(refused) => {
                let cause =
                    refused.map_or_else(|cause| cause, |error| cause(GpuOperation::Gather, &error));
                self.give_back(fetch, &part, false);
                self.fail_fetch(fetch, cause);
            }
        }
        None
    }

    /// Looks at what this side's GPU unpacks, and at what waits for a buffer.
    pub(super) fn look_at_fetches(&mut self) -> bool {
        let mut any = false;
        for _ in 0..self.gathers.fetches.all.len() {
            // In turn: what is put back goes to the end.
            let mut fetch = self.gathers.fetches.all.remove(0);
            let mut at = 0;
            while let Some(part) = fetch.under_way.get_mut(at) {
                let end = match &mut part.state {
                    State::Unpacking { gather, .. } => gather.poll(),
                    _ => None,
                };
                let Some(end) = end else {
                    at += 1;
                    continue;
                };
                any = true;
                let part = fetch.under_way.swap_remove(at);
                let ended = match end {
                    GatherEnd::Whole => None,
                    GatherEnd::Failed(error @ crate::mem::Error::Gpu(_)) => {
                        self.lose_portion(&mut fetch, &Error::Memory(error));
                        continue;
                    }
                    GatherEnd::Failed(error) => {
                        Some(cause(GpuOperation::Gather, &Error::Memory(error)))
                    }
                    _ => Some(Cause::Cancelled),
                };
                self.give_back(&fetch, &part, false);
                if let Some(cause) = ended {
                    self.fail_fetch(&mut fetch, cause);
                }
            }
            any |= self.go_on(fetch);
        }
        any
    }
}
