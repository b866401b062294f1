//! Queues over GPU links: what has to be there, and has to be allowed, before kernels write.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::queue::PutAll;
use super::{GpuQueue, NotPosted, Push, Pushes, Pushing, SharedQueue, Stage};
use crate::engine::gpu::outlive;
use crate::engine::moves::Moved;
use crate::engine::queues::PartOf;
use crate::engine::worker::{Command, KernelQueue, QueueOrder, Served};
use crate::error::Error;
use crate::gpu_queue::{GpuQueueConfig, NoLinks, after, posted, refused};
use crate::mem::post::device::{LinkPuts, PostQueue};
use crate::plan::BlockOps;
use crate::ticket::Ticket;
use crate::transfer::PeerKey;
use crate::wire::{LinksAnswer, LinksWanted};

/// How often it is looked at least whether a push has ended.
const NAP: Duration = Duration::from_millis(50);

impl Pushes {
    /// A consumer has said whether kernels may write.
    pub(crate) fn links_answered(&self, peer: PeerKey, answer: &LinksAnswer) {
        let Some(push) = self.of(peer, &answer.request) else {
            return;
        };
        let stage = push.stage();
        if !matches!(&*stage, Stage::Open(ticket) if ticket.nonce == answer.nonce) {
            return;
        }
        let mut links = push.links.lock().unwrap_or_else(PoisonError::into_inner);
        *links = Some(answer.refused.map_or(Ok(()), Err));
        // Under the stage: nobody is between his look and his sleep.
        push.heard.notify_all();
    }
}

impl Pushing {
    fn ended(&self) -> Error {
        Error::PushEnded {
            request: self.request.clone(),
            operation: "gpu_queue",
        }
    }

    /// Waits for what `found` finds in a push that goes on. `None`: it did not come in time.
    fn wait_for<T>(
        &self,
        until: Instant,
        found: impl Fn(&Stage) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let mut stage = self.stage();
        loop {
            match &*stage {
                Stage::Asked {
                    committed: true, ..
                }
                | Stage::Ended { .. } => return Err(self.ended()),
                Stage::Asked { .. } | Stage::Open(_) => {}
            }
            if let Some(found) = found(&stage) {
                return Ok(Some(found));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            // A push may end without a word here.
            let nap = left.min(NAP);
            let waited = self.heard.wait_timeout(stage, nap);
            (stage, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Makes what kernels have put part of the push. Not by the worker, whose other transfers would wait: what kernels are
    /// for the push, a job, keeps it and its claims until the worker hears of this.
    pub(super) fn take_puts(&self, puts: &LinkPuts) -> PutAll {
        let begun = Instant::now();
        let is_over = matches!(&*self.stage(), Stage::Ended { .. });
        let taken = match self.queues.block_ops().filter(|_| !is_over) {
            Some(ops) => self.part_of_push(ops, puts),
            None => Ok(None),
        };
        PutAll {
            count: puts.puts.len() as u64,
            has_begun: puts.begun > 0,
            taken,
            prepare: begun.elapsed(),
        }
    }

    fn part_of_push(
        &self,
        ops: &Arc<BlockOps>,
        puts: &LinkPuts,
    ) -> Result<Option<Moved>, NotPosted> {
        // Puts have no numbers.
        let fault = |fault| NotPosted::Fault { fault, at: 0 };
        if let Some(put) = &puts.refused {
            return Err(fault(refused(ops, put)));
        }
        if puts.puts.is_empty() {
            return Ok(None);
        }
        let posted = posted(ops, puts).map_err(fault)?;
        match self.take_posts(posted) {
            Ok(moved) => Ok(Some(moved)),
            Err(NotPosted::Fault { fault: of, .. }) => Err(fault(of)),
            Err(other) => Err(other),
        }
    }

    /// Gives a queue over links to the worker that owns the push: from its answer on the push is not over before its
    /// kernels are.
    fn attach_links(
        self: &Arc<Self>,
        number: u64,
        shared: &Arc<SharedQueue>,
        (until, patience): (Instant, Duration),
    ) -> Result<(), Error> {
        let (begun, is_begun) = channel();
        let served = Served::Links { kernels: None };
        let part_of = PartOf::Push(Arc::clone(self));
        let queue = KernelQueue::new(number, &part_of, (shared, served), None);
        let queue = Box::new(queue);
        self.queues
            .send(Command::Queue(QueueOrder::AddLinks { queue, begun }));
        let left = until.saturating_duration_since(Instant::now());
        match is_begun.recv_timeout(left) {
            Ok(true) => Ok(()),
            Ok(false) | Err(RecvTimeoutError::Disconnected) => Err(self.ended()),
            Err(RecvTimeoutError::Timeout) => Err(Error::Deadline {
                what: "the worker of the push",
                after: patience,
            }),
        }
    }
}

impl Push {
    /// A queue by which kernels write the consumer's blocks themselves.
    pub(super) fn links(&self, config: &GpuQueueConfig, number: u64) -> Result<GpuQueue, Error> {
        let (pushing, peer) = (&self.pushing, &self.pushing.peer);
        let refuse = |why| Error::NoLinks { why };
        let path = refuse(NoLinks::Path {
            path: peer.path.path,
        });
        let (true, Some(own), Some(theirs)) = (peer.is_ipc(), &self.engine.gpu, &peer.handles)
        else {
            return Err(path);
        };
        if outlive(&config.gpu) {
            return Err(refuse(NoLinks::Mps));
        }
        let patience = config.patience;
        let until = after(patience);
        let ticket = pushing.wait_for(until, |stage| match stage {
            Stage::Open(ticket) => Some(Arc::clone(ticket)),
            _ => None,
        })?;
        let ticket: Arc<Ticket> =
            ticket.ok_or_else(|| refuse(NoLinks::NoTicket { after: patience }))?;
        let ops = pushing.queues.block_ops().ok_or(Error::OtherPlan)?;
        let theirs = (theirs, peer.layout.1.memory_len());
        let device = own.link_queue(&config.gpu, theirs, ops, &ticket.groups)?;
        let shared = SharedQueue::new(PostQueue::Links(device), config.pace);
        pushing.queues.begun();
        // Whatever fails from here on: nobody has had its handle when it goes.
        let part_of = PartOf::Push(Arc::clone(pushing));
        let queue = GpuQueue::new(&self.engine, part_of, number, Arc::clone(&shared));
        pushing.attach_links(number, &shared, (until, patience))?;
        let said = || *pushing.links.lock().unwrap_or_else(PoisonError::into_inner);
        if said().is_none() {
            let (request, nonce) = (pushing.request.clone(), ticket.nonce);
            peer.link.send(LinksWanted { request, nonce }.into());
        }
        match pushing.wait_for(until, |_| said())? {
            Some(Ok(())) => Ok(queue),
            Some(Err(why)) => Err(refuse(NoLinks::Refused(why))),
            None => Err(refuse(NoLinks::NoAnswer { after: patience })),
        }
    }
}
