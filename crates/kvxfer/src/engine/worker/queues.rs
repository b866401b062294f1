//! Queues that kernels post to: their posts become jobs of the push or the pull that the queue is of, and the ends of
//! those go back to the posters.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use tracing::debug;

use super::kernel_queue::{KernelQueue, PostedJob, Served, Stage, post_number, status_of};
use super::{Command, Worker};
use crate::engine::handle::Outcome;
use crate::engine::moves::Moves;
use crate::engine::push::{NotPosted, PostedAll};
use crate::engine::queues::PartOf;
use crate::gpu_queue::{Batch, Batches, PostFault, Together, Wrong};
use crate::mem::post::{DescriptorFault, Status, Taken};
use crate::plan::OpSource;
use crate::ticket::Ticket;
use crate::transfer::{Cause, JobId, JobReport, TransferId};
use crate::wire::{PushTold, limits};

/// Posts, or work requests, that are taken between two polls, so that completions and deadlines are seen in time.
const MOST_TAKEN: usize = 512;
/// Jobs of a queue that are under way at most: what is posted meanwhile waits in the ring, and goes as one job later.
const MOST_JOBS: usize = 16;
/// The same where the consumer's GPU fetches the blocks of each job by a launch: those go one after the other.
const MOST_FETCHED: usize = 4;
/// A job of so few bytes is not worth waking other workers for.
const SMALL: u64 = 256 << 10;
/// What a worker is told of queues.
#[derive(Debug)]
pub(crate) enum QueueOrder {
    /// A queue of one of its pushes.
    Add(Box<KernelQueue>),
    /// One over links: whether its push goes on, and is not over before its kernels are, is answered.
    AddLinks {
        queue: Box<KernelQueue>,
        begun: Sender<bool>,
    },
    /// Nobody posts to it any more, or nobody is to.
    Close {
        /// Its push.
        id: TransferId,
        /// Which of its queues.
        number: u64,
        /// What has been posted, if nobody posts any more.
        posted: Option<PostedAll>,
    },
    /// It is to be looked at otherwise from now on.
    Look,
}

/// What a look at a ring was good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    Found,
    Nothing,
    /// It was not looked, for enough is under way; or what there is has to be copied first.
    Later,
}

impl Worker {
    pub(super) fn queue_order(&mut self, order: QueueOrder) {
        match order {
            QueueOrder::Add(mut queue) => {
                // One that has its outcome stays while its memory is quarantined; nothing is posted of it.
                let is_open = self.live.get(&queue.id).is_some_and(|l| !l.has_outcome());
                if !is_open {
                    queue.end(Status::Closed);
                }
                self.queues.push(*queue);
            }
            QueueOrder::AddLinks { queue, begun } => {
                let added = self.add_links(*queue);
                // Who does not wait any more closes it.
                let _ = begun.send(added);
            }
            QueueOrder::Close { id, number, posted } => {
                let is_it = |queue: &KernelQueue| (queue.id, queue.number) == (id, number);
                let Some(at) = self.queues.iter().position(is_it) else {
                    return;
                };
                let mut queue = self.queues.swap_remove(at);
                queue.is_closing = true;
                queue.looks = 0;
                match posted {
                    Some(PostedAll::Left(left)) => queue.left = Some(left),
                    Some(PostedAll::Put(puts)) => self.take_puts(&mut queue, *puts),
                    None => {}
                }
                self.end_kernels(&mut queue);
                self.queues.push(queue);
            }
            QueueOrder::Look => {}
        }
    }

    /// The ticket of a push is here: posts that waited for it can be checked.
    pub(super) fn open_queues(&mut self, id: TransferId, ticket: &Ticket) {
        for queue in self.queues.iter_mut().filter(|queue| queue.id == id) {
            if let PartOf::Push(push) = &queue.part_of {
                queue.table = push.posts(ticket);
            }
        }
    }

    /// Takes what kernels have posted; whether there was something.
    pub(super) fn look_at_queues(&mut self) -> bool {
        if self.queues.is_empty() {
            return false;
        }
        // Nothing that is done here comes back to them before they are back in their place.
        let mut queues = std::mem::take(&mut self.queues);
        let mut any = false;
        for queue in &mut queues {
            let look = self.look_at_queue(queue, false);
            let drained =
                look == Look::Nothing && (queue.table.is_some() || queue.stage == Stage::Sealed);
            if queue.is_closing && drained {
                self.seal(queue);
            }
            any |= look == Look::Found;
        }
        queues.retain(|queue| !queue.is_over());
        let copied = |queue: &&KernelQueue| queue.is_committing && queue.served.copying().is_none();
        let committed = queues.iter().filter(copied).map(|queue| queue.id);
        let committed: Vec<_> = committed.collect();
        self.queues = queues;
        for id in committed {
            self.commit(id);
        }
        any
    }

    /// A transfer has all that is part of it: with what kernels have posted by now. While that is being copied, it has to
    /// wait.
    pub(super) fn commit(&mut self, id: TransferId) {
        if !self.seal_queues(id) {
            return;
        }
        if let Err(error) = self.transfers.commit(self.clock.now(), id) {
            debug!(?id, %error, "commit of a push that has ended");
        }
    }

    /// Takes what kernels have posted by now, and nothing more later. `false` where some of it is being copied.
    fn seal_queues(&mut self, id: TransferId) -> bool {
        let mut queues = std::mem::take(&mut self.queues);
        let mut is_all = true;
        for queue in queues.iter_mut().filter(|queue| queue.id == id) {
            // What was posted before has a slot each; a kernel that goes on is not waited for. What has just been copied
            // is one look more.
            let looks = queue.shared.device().handle().depth as usize;
            for _ in 0..=looks.div_ceil(MOST_TAKEN) {
                if self.look_at_queue(queue, true) != Look::Found {
                    break;
                }
            }
            queue.is_committing = queue.served.copying().is_some();
            match queue.is_committing {
                true => is_all = false,
                false => self.seal(queue),
            }
        }
        self.queues = queues;
        is_all
    }

    /// Everything that was posted has been taken. A post that was begun and is not there is a block that its engine
    /// believes to be sent; and one that was given up may be there, though its kernel was told that it is not.
    fn seal(&mut self, queue: &mut KernelQueue) {
        if std::mem::replace(&mut queue.stage, Stage::Sealed) == Stage::Sealed {
            return;
        }
        let taken = queue.served.taken();
        let in_part = match &queue.served {
            Served::Ring(_) => false,
            Served::Wqes(device) => device.has_begun(),
            Served::Links { .. } => queue.has_begun,
        };
        let left = queue.left.unwrap_or_default();
        let failed = left.failed;
        let failed = failed.map(|of| (of.number, PostFault::of_posters(of.status)));
        let unwritten = (taken < left.posted || in_part).then_some((taken, PostFault::Unwritten));
        // What comes first in the queue has led to the other.
        let both = failed.into_iter().chain(unwritten);
        if let Some((post, fault)) = both.min_by_key(|(post, _)| *post) {
            self.fail_post(queue.id, post, fault);
        }
        if let Served::Wqes(device) = &mut queue.served {
            device.close(Status::Closed);
        }
    }

    /// `all`: however many jobs are under way.
    fn look_at_queue(&mut self, queue: &mut KernelQueue, all: bool) -> Look {
        if queue.table.is_none() && queue.stage == Stage::Open {
            return Look::Nothing;
        }
        let together = queue.part_of.queues().together();
        let most_jobs = match together {
            Together::ByLayer => MOST_FETCHED,
            Together::All => MOST_JOBS,
        };
        if !all && queue.jobs.len() >= most_jobs {
            return Look::Later;
        }
        let mut batches = None;
        let copying = queue.served.copying();
        let any = match &queue.served {
            Served::Ring(_) => self.take_descriptors(queue, &mut batches),
            Served::Wqes(_) => self.take_wqes(queue, &mut batches),
            Served::Links { .. } => false,
        };
        for batch in batches.into_iter().flat_map(Batches::into_all) {
            self.begin_posts(queue, batch);
        }
        let now = queue.served.copying();
        if !any && now.is_none() {
            return Look::Nothing;
        }
        // What a look has begun to copy is soon there.
        if any || now != copying {
            queue.looks = 0;
            queue.found = Some(Instant::now());
        }
        match any {
            true => Look::Found,
            false => Look::Later,
        }
    }

    /// Takes what is in a ring; whether there was something.
    fn take_descriptors(&mut self, queue: &mut KernelQueue, batches: &mut Option<Batches>) -> bool {
        let mut any = false;
        for _ in 0..MOST_TAKEN {
            let (Served::Ring(consumer), Some(of)) =
                (&mut queue.served, queue.shared.device().proxy())
            else {
                break;
            };
            let taken = match consumer.take(of.ring()) {
                Ok(Some(taken)) => taken,
                Ok(None) => break,
                Err(error) => {
                    let was_open = queue.stage == Stage::Open;
                    queue.lose_ring(&error);
                    if was_open {
                        self.fail_post(queue.id, 0, PostFault::Malformed);
                    }
                    break;
                }
            };
            any = true;
            queue.shared.note_taken(1);
            match (taken, &queue.table) {
                (Taken::Post(post), Some(table)) if queue.stage == Stage::Open => {
                    match table.check(&post) {
                        Ok(wanted) => queue.add(batches, post.ticket, wanted),
                        Err(fault) => self.refuse(queue, post.ticket, fault),
                    }
                }
                (Taken::Post(post), _) => queue.complete(post.ticket, Status::Closed),
                (Taken::Refused(fault), _) => {
                    queue.shared.note_ended(1, fault.status());
                    if queue.stage == Stage::Sealed {
                        // Behind the commit: no part of the push.
                        continue;
                    }
                    let (post, fault) = match fault {
                        DescriptorFault::Op { ticket, .. } => (ticket, PostFault::Operation),
                        DescriptorFault::Ticket { wanted, .. } => (wanted, PostFault::Malformed),
                        DescriptorFault::Reserved { ticket, .. } => (ticket, PostFault::Malformed),
                        _ => (0, PostFault::Malformed),
                    };
                    self.fail_post(queue.id, post, fault);
                }
                (Taken::Flushed(_), _) => queue.shared.note_ended(1, Status::Flushed),
            }
        }
        any
    }

    /// Takes what a device is told of; whether there was something.
    fn take_wqes(&mut self, queue: &mut KernelQueue, batches: &mut Option<Batches>) -> bool {
        let (Served::Wqes(device), Some(of)) = (&mut queue.served, queue.shared.device().wqe())
        else {
            return false;
        };
        if let Err(error) = of.relay() {
            let was_open = queue.stage == Stage::Open;
            queue.lose_ring(&error);
            if was_open {
                self.fail_post(queue.id, 0, PostFault::Malformed);
            }
            return false;
        }
        let mut blocks = Vec::new();
        let (count, wrong) = device.look(MOST_TAKEN as u64, &mut blocks);
        queue.shared.note_taken(blocks.len() as u64);
        for block in blocks {
            match &queue.table {
                Some(table) if queue.stage == Stage::Open => match table.check_block(&block) {
                    Ok(wanted) => queue.add(batches, block.ticket, wanted),
                    Err(fault) => self.refuse(queue, block.ticket, fault),
                },
                _ => queue.complete(block.ticket, Status::Closed),
            }
        }
        for wrong in wrong.into_iter().chain(queue.broken.take()) {
            self.wrong(queue, wrong);
        }
        count > 0
    }

    /// A work request was wrong, or a rule was broken, of which posters hear by their abort word.
    fn wrong(&mut self, queue: &mut KernelQueue, Wrong { wqe, fault }: Wrong) {
        let was_open = queue.stage == Stage::Open;
        if matches!(fault, PostFault::Rule { .. }) {
            queue.shared.stop();
            queue.stage = Stage::Sealed;
        } else {
            queue.shared.note_taken(1);
            queue.shared.note_ended(1, fault.status());
        }
        if was_open {
            self.fail_post(queue.id, wqe, fault);
        }
    }

    /// A post cannot be carried out.
    fn refuse(&mut self, queue: &mut KernelQueue, post: u64, fault: PostFault) {
        queue.complete(post, fault.status());
        self.fail_post(queue.id, post_number(post), fault);
    }

    /// Makes a job of posts.
    fn begin_posts(&mut self, queue: &mut KernelQueue, batch: Batch) {
        let begun = Instant::now();
        let Batch {
            posted,
            posts,
            immediates,
            ..
        } = batch;
        if let Some((first, _)) = immediates.first()
            && !queue.part_of.queues().may_tell(immediates.len())
        {
            return self.refuse(queue, *first, PostFault::Immediates);
        }
        match queue.part_of.take(posted) {
            Ok(source) => {
                // Of a push that has failed the posts end with its outcome.
                if let Some(job) = self.add_posts(queue.id, source, begun.elapsed()) {
                    queue.jobs.push_back(PostedJob {
                        id: job,
                        posts,
                        immediates: immediates.into_iter().map(|(_, what)| what).collect(),
                    });
                    self.end_posts(queue, queue.id, job);
                }
            }
            Err(NotPosted::Cause(cause)) => self.command(Command::Fail {
                id: queue.id,
                cause,
            }),
            Err(NotPosted::Fault { fault, at }) => {
                self.refuse(queue, posts.get(at).copied().unwrap_or(0), fault);
            }
        }
    }

    pub(super) fn fail_post(&mut self, id: TransferId, post: u64, fault: PostFault) {
        let cause = Cause::KernelPost { post, fault };
        self.command(Command::Fail { id, cause });
    }

    /// Adds what kernels have posted to a push; `None`: it has ended.
    fn add_posts(&mut self, id: TransferId, source: Moves, prepare: Duration) -> Option<JobId> {
        let peer = self.live.get(&id).map(|live| Arc::clone(&live.peer))?;
        let alone = source.bytes() <= SMALL && self.working_lanes(peer.key).next().is_some();
        let workers = match alone {
            true => 1,
            false => peer.worker_count(),
        };
        let runs = source.what.runs();
        self.add_job_of(id, (source, workers), runs, prepare)
    }

    /// Adds operations to a push; `None`: it has ended.
    pub(super) fn add_job(
        &mut self,
        id: TransferId,
        source: Moves,
        runs: u64,
        prepare: Duration,
    ) -> Option<JobId> {
        let workers = self.live.get(&id)?.peer.worker_count();
        self.add_job_of(id, (source, workers), runs, prepare)
    }

    fn add_job_of(
        &mut self,
        id: TransferId,
        (source, workers): (Moves, u16),
        runs: u64,
        prepare: Duration,
    ) -> Option<JobId> {
        let (ops, bytes, what) = (source.ops(), source.bytes(), source.what.clone());
        let now = self.clock.now();
        let source = (Arc::new(source) as Arc<dyn OpSource>, workers.max(1));
        let job = match self.transfers.add_job_of(now, id, source) {
            Ok(job) => job,
            // The transfer may have ended meanwhile: its outcome has said so.
            Err(error) => {
                debug!(?id, %error, "operations of a push that has ended");
                return None;
            }
        };
        if let Some(live) = self.live.get_mut(&id) {
            live.report.operations += ops;
            live.report.bytes += bytes;
            live.report.merged_runs += runs;
            live.report.prepare += prepare;
            if let Some(verify) = &mut live.verify {
                verify.moved.push(what);
            }
        }
        Some(job)
    }

    /// Takes what there is to say of a job, and tells the posters whose posts are confirmed.
    pub(super) fn job_report(&mut self, report: &JobReport) {
        self.transfers.job_report(self.clock.now(), report);
        self.end_posts_of(report.transfer, report.job);
    }

    /// Tells the posters whose posts a job is, if it counts.
    pub(super) fn end_posts_of(&mut self, id: TransferId, job: JobId) {
        if self.queues.iter().all(|queue| queue.id != id) {
            return;
        }
        let mut queues = std::mem::take(&mut self.queues);
        for queue in queues.iter_mut().filter(|queue| queue.id == id) {
            self.end_posts(queue, id, job);
        }
        self.queues = queues;
    }

    /// Ends the posts of a job, if it counts.
    fn end_posts(&mut self, queue: &mut KernelQueue, id: TransferId, job: JobId) {
        let Ok(at) = queue.jobs.binary_search_by_key(&job, |job| job.id) else {
            return;
        };
        if !self.transfers.counts(id, job) {
            return;
        }
        if let Some(job) = queue.jobs.remove(at) {
            self.tell(id, job.immediates);
            queue.complete_each(&job.posts, Status::Ok);
        }
        if let Some(wrong) = queue.broken.take() {
            self.wrong(queue, wrong);
        }
        // A kernel may post for as long as it likes: what is over is not kept.
        if let Some(live) = self.live.get_mut(&id)
            && let Some(at) = live.jobs.iter().position(|known| known.id == job)
        {
            let job = live.jobs.swap_remove(at);
            let post = job.posted_at().since(live.submitted);
            live.report.post = live.report.post.max(post);
        }
    }

    /// Tells the consumer of blocks that it has.
    fn tell(&mut self, id: TransferId, immediates: Vec<u32>) {
        let Some(live) = self.live.get_mut(&id).filter(|_| !immediates.is_empty()) else {
            return;
        };
        live.tells = true;
        for some in immediates.chunks(limits::IMMEDIATES) {
            let told = PushTold {
                request: live.request.clone(),
                nonce: live.nonce,
                immediates: some.to_vec(),
            };
            live.peer.link.send(told.into());
        }
    }

    /// A push is done: the consumer is told of the last blocks before it is told that.
    pub(super) fn tell_the_last(&mut self, id: TransferId) {
        let queues = self.queues.iter_mut().filter(|queue| queue.id == id);
        let jobs = queues.flat_map(|queue| &mut queue.jobs);
        let last = jobs.flat_map(|job| std::mem::take(&mut job.immediates));
        let last = last.collect();
        self.tell(id, last);
    }

    /// A push has its outcome: so have all posts that it has not confirmed.
    pub(super) fn end_queues(&mut self, id: TransferId, outcome: &Outcome) {
        for queue in self.queues.iter_mut().filter(|queue| queue.id == id) {
            queue.end(match outcome {
                Outcome::Done => Status::Ok,
                Outcome::Failed(failure) => status_of(&failure.first_cause),
            });
        }
    }

    /// Nothing is kept of a push any more: nor is it looked for what is posted.
    pub(super) fn close_queues(&mut self, id: TransferId) {
        for queue in self.queues.iter_mut().filter(|queue| queue.id == id) {
            if queue.stage == Stage::Open {
                queue.end(Status::Closed);
            }
        }
    }

    /// How long the worker may rest before it has to look at its queues.
    pub(super) fn queues_rest(&mut self) -> Option<Duration> {
        self.queues.iter_mut().filter_map(KernelQueue::rest).min()
    }
}
