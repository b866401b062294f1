//! The thread that works sums out, and the transfers that wait for it.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crossbeam_channel::{Receiver, Sender, select, unbounded};
use tracing::{error, warn};

use super::compare::{List, Stopped, Summing, compare, count};
use super::{Unverified, Verdict};
use crate::block_set::BlockSet;
use crate::blocks::GroupBlocks;
use crate::engine::books::pack_cause;
use crate::engine::worker::{Command, Live, WorkerHandle};
use crate::engine::{Inner, PeerSession, Runtime};
use crate::error::Error;
use crate::ids::{Nonce, RequestId};
use crate::plan::{Part, SideName};
use crate::sums::Summed;
use crate::transfer::{Cause, PeerKey, Refusal, TransferId};
use crate::wire::{
    Blob, ErrorCode, PushSums, Sums, SumsOf, SumsWanted, limits, pack_sums, unpack_sums,
};

/// The most sums of one request.
pub(crate) const MOST_SUMS: u64 = 1 << 24;
/// Sums in one message.
const CHUNK: usize = limits::SUMS / 8;

/// A pull that has all its data and waits for sums.
#[derive(Debug)]
struct Question {
    engine: Arc<Inner>,
    request: RequestId,
    summed: Arc<Summed>,
    /// The units here.
    lists: Vec<List>,
    count: u64,
    gone: AtomicBool,
}

#[derive(Debug)]
struct Asked {
    peer: PeerKey,
    worker: WorkerHandle,
    question: Arc<Question>,
    here: Option<Vec<u64>>,
    there: Vec<u64>,
}

/// What somebody waits for.
#[derive(Debug)]
enum Running {
    Pull(Asked),
    /// Set when nobody does any more.
    Push(Arc<AtomicBool>),
}

/// A push whose sums are to be told.
#[derive(Debug)]
struct Telling {
    engine: Arc<Inner>,
    peer: Arc<PeerSession>,
    request: RequestId,
    nonce: Nonce,
    part: Part,
    /// The units here, and the consumer's.
    lists: Vec<(List, List)>,
    gone: Arc<AtomicBool>,
}

/// What a sender has pushed, and its sums.
#[derive(Debug)]
struct Pushed {
    engine: Arc<Inner>,
    peer: Arc<PeerSession>,
    request: RequestId,
    nonce: Nonce,
    /// The blocks that are expected.
    groups: Vec<GroupBlocks>,
    lists: Vec<(SumsOf, Blob)>,
}

#[derive(Debug)]
enum Job {
    /// The sums of a pull's destinations.
    Here(TransferId, Arc<Question>),
    /// A peer's question.
    Answer(Arc<Inner>, Arc<PeerSession>, SumsWanted),
    Tell(TransferId, WorkerHandle, Box<Telling>),
    Check(Box<Pushed>),
}

/// The thread's other end. The thread starts with the first job.
#[derive(Debug, Default)]
pub(crate) struct Verifier {
    jobs: OnceLock<Sender<Job>>,
    starting: Mutex<()>,
    running: Mutex<HashMap<TransferId, Running>>,
}

impl Verifier {
    fn running(&self) -> MutexGuard<'_, HashMap<TransferId, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the thread if it does not run.
    ///
    /// # Errors
    ///
    /// [`Error::Spawn`].
    pub(crate) fn start(&self, runtime: &Arc<Runtime>) -> Result<(), Error> {
        let starting = self.starting.lock();
        let _starting = starting.unwrap_or_else(PoisonError::into_inner);
        if self.jobs.get().is_some() {
            return Ok(());
        }
        let (sender, jobs) = unbounded();
        let (stopped, health) = (runtime.stopped.clone(), Arc::clone(&runtime.health));
        runtime.spawn_link("kvx-sums", move || {
            while let Some(job) = next(&jobs, &stopped) {
                // What waits for a job that has panicked ends by its deadline.
                if catch_unwind(AssertUnwindSafe(|| run(job))).is_err() {
                    error!("the thread of checksums has panicked; the engine takes no new work");
                    health.break_down();
                }
            }
        })?;
        let _ = self.jobs.set(sender);
        Ok(())
    }

    fn give(&self, runtime: &Arc<Runtime>, job: Job) {
        if let Err(error) = self.start(runtime) {
            // Who waits for it ends by the deadline.
            warn!(%error, "checksums");
        }
        if let Some(jobs) = self.jobs.get() {
            let _ = jobs.send(job);
        }
    }

    /// All data of a transfer is there.
    pub(crate) fn begin(&self, id: TransferId, live: &Live, worker: &WorkerHandle) {
        let verdict = match live.push {
            true => self.tell(id, live, worker),
            false => self.ask(id, live, worker),
        };
        if let Err(cause) = verdict {
            let verdict = Err(Box::new(cause.into()));
            worker.send(Command::Verified { id, verdict });
        }
    }

    fn ask(&self, id: TransferId, live: &Live, worker: &WorkerHandle) -> Result<(), Cause> {
        let (engine, peer) = (&live.engine, &live.peer);
        let Some(of) = &live.verify else {
            return Err(REFUSED);
        };
        let summed = peer.summed(engine, SideName::Consumer, of.part);
        let summed = summed.map_err(|_| REFUSED)?;
        let lists = |side| -> Vec<List> {
            let plans = of.plans.iter();
            plans.flat_map(|plan| List::of_plan(plan, side)).collect()
        };
        let theirs = lists(SideName::Producer);
        let lists = lists(SideName::Consumer);
        let question = Arc::new(Question {
            engine: Arc::clone(engine),
            request: live.request.clone(),
            count: count(&lists, &summed),
            summed,
            lists,
            gone: AtomicBool::new(false),
        });
        let asked = Asked {
            peer: peer.key,
            worker: worker.clone(),
            question: Arc::clone(&question),
            here: None,
            there: Vec::new(),
        };
        self.running().insert(id, Running::Pull(asked));
        let wanted = SumsWanted {
            id: id.0,
            request: live.request.clone(),
            nonce: live.nonce,
            share: of.part == Part::Share,
            of: theirs
                .iter()
                .map(|list| list.to_wire(&list.units))
                .collect(),
        };
        peer.link.send(wanted.into());
        self.give(&engine.runtime, Job::Here(id, question));
        Ok(())
    }

    fn tell(&self, id: TransferId, live: &Live, worker: &WorkerHandle) -> Result<(), Cause> {
        let Some(of) = &live.verify else {
            return Err(REFUSED);
        };
        let both = of.plans.iter().flat_map(|plan| {
            let theirs = List::of_plan(plan, SideName::Consumer);
            List::of_plan(plan, SideName::Producer)
                .into_iter()
                .zip(theirs)
        });
        let gone = Arc::new(AtomicBool::new(false));
        let telling = Telling {
            engine: Arc::clone(&live.engine),
            peer: Arc::clone(&live.peer),
            request: live.request.clone(),
            nonce: live.nonce,
            part: of.part,
            lists: both.collect(),
            gone: Arc::clone(&gone),
        };
        self.running().insert(id, Running::Push(gone));
        let job = Job::Tell(id, worker.clone(), Box::new(telling));
        self.give(&live.engine.runtime, job);
        Ok(())
    }

    /// Nobody waits for the sums of a transfer any more.
    pub(crate) fn forget(&self, id: TransferId) {
        match self.running().remove(&id) {
            Some(Running::Pull(asked)) => asked.question.gone.store(true, Ordering::Relaxed),
            Some(Running::Push(gone)) => gone.store(true, Ordering::Relaxed),
            None => {}
        }
    }

    /// A peer asks for sums of what is on offer.
    pub(crate) fn answer(&self, engine: &Arc<Inner>, peer: &Arc<PeerSession>, wanted: SumsWanted) {
        let units = units(&wanted);
        if !peer.asks(units) {
            let reason = Refusal::Busy;
            return refuse(peer, wanted.id, &Cause::Refused { reason });
        }
        let job = Job::Answer(Arc::clone(engine), Arc::clone(peer), wanted);
        self.give(&engine.runtime, job);
    }

    /// Sums that a peer was asked for. The error says why it cannot be trusted any more.
    pub(crate) fn answered(&self, peer: &PeerSession, sums: &Sums) -> Result<(), String> {
        let id = TransferId(sums.id);
        let mut running = self.running();
        let asked = match running.get_mut(&id) {
            Some(Running::Pull(asked)) if asked.peer == peer.key => asked,
            // Of a pull that has ended.
            _ => return Ok(()),
        };
        if let Some(cause) = &sums.refused {
            let cause = cause.unpack::<Cause>("cause").unwrap_or(REFUSED);
            let verdict = Err(Box::new(cause.into()));
            asked.worker.send(Command::Verified { id, verdict });
            drop(running);
            self.forget(id);
            return Ok(());
        }
        let more = unpack_sums(&sums.sums);
        let (have, count) = (asked.there.len() as u64, asked.question.count);
        if sums.first != have || have + more.len() as u64 > count {
            return Err(format!(
                "{} checksums from number {}, where {have} of {count} have come",
                more.len(),
                sums.first
            ));
        }
        asked.there.extend(more);
        let done = asked.take_done();
        drop(running);
        self.finish(id, done);
        Ok(())
    }

    /// The sums here of a pull.
    fn here(&self, id: TransferId, sums: Vec<u64>) {
        let mut running = self.running();
        let Some(Running::Pull(asked)) = running.get_mut(&id) else {
            return;
        };
        asked.here = Some(sums);
        let done = asked.take_done();
        drop(running);
        self.finish(id, done);
    }

    fn finish(&self, id: TransferId, done: Option<Done>) {
        let Some(done) = done else { return };
        let Question {
            engine,
            request,
            summed,
            lists,
            ..
        } = &*done.question;
        let verdict = match compare(engine, request, (lists, summed), (&done.here, &done.there)) {
            None => Ok(done.here.len() as u64),
            Some(unverified) => Err(Box::new(unverified)),
        };
        done.worker.send(Command::Verified { id, verdict });
        self.forget(id);
    }
}

/// Both sides' sums of a pull.
struct Done {
    worker: WorkerHandle,
    question: Arc<Question>,
    here: Vec<u64>,
    there: Vec<u64>,
}

impl Asked {
    fn take_done(&mut self) -> Option<Done> {
        if (self.there.len() as u64) < self.question.count {
            return None;
        }
        Some(Done {
            here: self.here.take()?,
            worker: self.worker.clone(),
            question: Arc::clone(&self.question),
            there: std::mem::take(&mut self.there),
        })
    }
}

/// What neither side can help: this layout's sums cannot be worked out.
const REFUSED: Cause = Cause::Refused {
    reason: Refusal::Sums,
};

fn units(wanted: &SumsWanted) -> u64 {
    wanted.of.iter().map(|list| list.units.len() as u64).sum()
}

fn next(jobs: &Receiver<Job>, stopped: &Receiver<()>) -> Option<Job> {
    select! {
        recv(stopped) -> _ => None,
        recv(jobs) -> job => job.ok(),
    }
}

fn run(job: Job) {
    match job {
        Job::Here(id, question) => {
            let engine = &question.engine;
            let wanted = || !stops(engine) && !question.gone.load(Ordering::Relaxed);
            let sums = Summing::new(engine, &wanted).lists(&question.lists, &question.summed);
            match sums {
                Ok(sums) => engine.runtime.verifier.here(id, sums),
                Err(stopped) => give_up(engine, id, &stopped),
            }
        }
        Job::Answer(engine, peer, wanted) => {
            if let Err(cause) = answer(&engine, &peer, &wanted) {
                refuse(&peer, wanted.id, &cause);
            }
            peer.asked(units(&wanted));
        }
        Job::Tell(id, worker, telling) => {
            let verdict: Verdict = tell(&telling).map_err(|cause| Box::new(cause.into()));
            worker.send(Command::Verified { id, verdict });
        }
        Job::Check(pushed) => check(&pushed),
    }
}

fn stops(engine: &Inner) -> bool {
    engine.runtime.stopping.load(Ordering::Acquire)
}

/// What it means for a transfer that sums were not worked out.
fn cause(stopped: &Stopped) -> Cause {
    match stopped {
        Stopped::Unwanted => Cause::Cancelled,
        Stopped::Read(error) => {
            error!(%error, "checksums");
            REFUSED
        }
    }
}

fn give_up(engine: &Inner, id: TransferId, stopped: &Stopped) {
    let verifier = &engine.runtime.verifier;
    let worker = match verifier.running().get(&id) {
        Some(Running::Pull(asked)) => asked.worker.clone(),
        _ => return,
    };
    let verdict = Err(Box::new(Unverified::from(cause(stopped))));
    worker.send(Command::Verified { id, verdict });
    verifier.forget(id);
}

fn refuse(peer: &PeerSession, id: u64, cause: &Cause) {
    let refused = Some(pack_cause(cause));
    let (first, sums) = (0, Blob::default());
    let message = Sums {
        id,
        refused,
        first,
        sums,
    };
    peer.link.send(message.into());
}

/// Whether all units are of these blocks. Units beyond all tensors are of none.
fn all_in(lists: &[List], summed: &Summed, groups: &[GroupBlocks]) -> bool {
    let mut set = BlockSet::default();
    for group in groups {
        // Offers and expectations list no block twice.
        let _ = set.insert_all(group.group, &group.blocks);
    }
    lists.iter().all(|list| {
        let Some(tensor) = list.tensors(summed).first() else {
            return true;
        };
        let mut units = list.units.iter();
        units.all(|unit| set.contains(list.group, tensor.block_of(*unit)))
    })
}

/// The blocks of an offer that stands.
fn offered(engine: &Arc<Inner>, wanted: &SumsWanted) -> Option<Vec<GroupBlocks>> {
    engine.books.with(engine, |books, now| {
        books.leases.on_time(now);
        let held = books.leases.holds(&wanted.request, wanted.nonce);
        held.map(<[GroupBlocks]>::to_vec)
    })
}

fn answer(engine: &Arc<Inner>, peer: &Arc<PeerSession>, wanted: &SumsWanted) -> Result<(), Cause> {
    let groups = offered(engine, wanted).ok_or(Cause::LeaseExpired)?;
    let part = match wanted.share {
        true => Part::Share,
        false => Part::Common,
    };
    let summed = peer.summed(engine, SideName::Producer, part);
    let summed = summed.map_err(|_| REFUSED)?;
    let lists: Vec<List> = wanted.of.iter().cloned().map(List::from).collect();
    if !all_in(&lists, &summed, &groups) || count(&lists, &summed) > MOST_SUMS {
        let reason = Refusal::OutOfRange;
        return Err(Cause::Refused { reason });
    }
    let wished = || !stops(engine) && peer.lost().is_none();
    let mut summing = Summing::new(engine, &wished);
    let mut sums = Vec::new();
    let mut first = 0;
    let mut send = |sums: &[u64]| {
        let message = Sums {
            id: wanted.id,
            refused: None,
            first,
            sums: pack_sums(sums),
        };
        first += sums.len() as u64;
        peer.link.send(message.into());
    };
    for list in &lists {
        let tensors = list.tensors(&summed);
        for unit in &list.units {
            summing
                .unit(tensors, *unit, &mut sums)
                .map_err(|stopped| cause(&stopped))?;
            // The last ones wait for what follows.
            while sums.len() > CHUNK {
                let rest = sums.split_off(CHUNK);
                send(&sums);
                sums = rest;
            }
        }
    }
    // Until here nobody has changed the blocks, if they are still on offer.
    offered(engine, wanted).ok_or(Cause::LeaseExpired)?;
    send(&sums);
    Ok(())
}

fn tell(telling: &Telling) -> Result<u64, Cause> {
    let Telling { engine, peer, .. } = telling;
    let summed = peer.summed(engine, SideName::Producer, telling.part);
    let summed = summed.map_err(|_| REFUSED)?;
    let wanted = || !stops(engine) && !telling.gone.load(Ordering::Relaxed);
    let mut summing = Summing::new(engine, &wanted);
    let mut total = 0_u64;
    for (ours, theirs) in &telling.lists {
        let tensors = ours.tensors(&summed);
        total = total.saturating_add(ours.count(&summed));
        if total > MOST_SUMS || tensors.len() > CHUNK {
            return Err(REFUSED);
        }
        let units = (CHUNK / tensors.len().max(1)).max(1);
        for (ours, to) in ours.units.chunks(units).zip(theirs.units.chunks(units)) {
            let mut sums = Vec::with_capacity(ours.len() * tensors.len());
            for unit in ours {
                summing
                    .unit(tensors, *unit, &mut sums)
                    .map_err(|stopped| cause(&stopped))?;
            }
            let message = PushSums {
                request: telling.request.clone(),
                nonce: telling.nonce,
                of: theirs.to_wire(to),
                sums: pack_sums(&sums),
            };
            peer.link.send(message.into());
        }
    }
    Ok(total)
}

impl Inner {
    /// Compares what a sender has pushed with its sums, later.
    pub(in crate::engine) fn check_push(
        self: &Arc<Self>,
        peer: &Arc<PeerSession>,
        (request, nonce): (RequestId, Nonce),
        groups: Vec<GroupBlocks>,
        lists: Vec<(SumsOf, Blob)>,
    ) {
        let pushed = Pushed {
            engine: Arc::clone(self),
            peer: Arc::clone(peer),
            request,
            nonce,
            groups,
            lists,
        };
        let job = Job::Check(Box::new(pushed));
        self.runtime.verifier.give(&self.runtime, job);
    }
}

fn check(pushed: &Pushed) {
    let Pushed { engine, peer, .. } = pushed;
    let verdict = verdict(pushed);
    if let Err(cause) = &verdict {
        warn!(%cause, peer = %peer.name.engine, "push");
        if matches!(cause, Cause::CutOff { .. }) {
            peer.link
                .cut_off("checksums of what was not to be pushed".to_owned());
        }
    }
    engine.push_checked(peer.key, &pushed.request, pushed.nonce, verdict);
}

fn verdict(pushed: &Pushed) -> Result<(), Cause> {
    let Pushed { engine, peer, .. } = pushed;
    let part = peer.pull.as_ref().map_or(Part::Common, |p| p.alone_part());
    let summed = peer.summed(engine, SideName::Consumer, part);
    let summed = summed.map_err(|_| REFUSED)?;
    let mut lists = Vec::with_capacity(pushed.lists.len());
    let mut there = Vec::new();
    for (of, sums) in &pushed.lists {
        let list = List::from(of.clone());
        let sums = unpack_sums(sums);
        if list.count(&summed) != sums.len() as u64 {
            return Err(LIE);
        }
        lists.push(list);
        there.extend(sums);
    }
    if !all_in(&lists, &summed, &pushed.groups) {
        return Err(LIE);
    }
    let wanted = || !stops(engine);
    let here = Summing::new(engine, &wanted).lists(&lists, &summed);
    let here = here.map_err(|stopped| cause(&stopped))?;
    match compare(engine, &pushed.request, (&lists, &summed), (&here, &there)) {
        None => Ok(()),
        Some(unverified) => Err(unverified.cause),
    }
}

const LIE: Cause = Cause::CutOff {
    reason: ErrorCode::Lie,
};
