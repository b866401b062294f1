//! Pulls whose blocks a consumer's kernels ask for, one by one ([`Peer::begin_pull`](super::Peer::begin_pull)).

use std::sync::{Arc, Mutex, PoisonError};

use super::Inner;
use super::handle::{Shared, Transfer, TransferReport};
use super::joint::Told;
use super::moves::Moved;
use super::peer::{PullOptions, count_sums, needs_no_other, transfer, verified};
use super::peer_session::PeerSession;
use super::push::{GpuQueue, NotPosted, attached};
use super::queues::{PartOf, Queues};
use super::verify::Verification;
use super::worker::{Command, Live};
use crate::blocks::{GroupBlocks, GroupPairs};
use crate::claims::{Claimant, Purpose};
use crate::error::Error;
use crate::gpu_queue::{GpuQueueConfig, PostTable};
use crate::ids::RequestId;
use crate::mem::gpu::Event;
use crate::plan::{LayerScope, Part, Posted, SideName};
use crate::sums::Summed;
use crate::ticket::Ticket;
use crate::transfer::{Cause, Kind, Refusal, Spec, TransferId};
use crate::wire::limits;

/// A pull as the engine and its handle share it.
#[derive(Debug)]
pub(crate) struct Pulling {
    queues: Arc<Queues>,
    request: RequestId,
    /// What the producer offers, and where it may go.
    offered: Vec<GroupBlocks>,
    into: Vec<GroupBlocks>,
    /// A GPU's work that comes first.
    after: Option<Event>,
    /// What is summed of it, if checksums are compared.
    summed: Option<Arc<Summed>>,
    asked: Mutex<Asked>,
}

/// What the producer is going to be asked checksums of.
#[derive(Debug, Default)]
struct Asked {
    blocks: u64,
    sums: u64,
}

impl Pulling {
    pub(crate) fn queues(&self) -> &Arc<Queues> {
        &self.queues
    }

    pub(crate) fn after(&self) -> Option<&Event> {
        self.after.as_ref()
    }

    /// Counts the checksums of what kernels have posted, and says what is to move. For the worker alone that owns the
    /// pull.
    pub(crate) fn take_posts(&self, posted: Posted) -> Result<Moved, NotPosted> {
        let refused = |reason| NotPosted::Cause(Cause::Refused { reason });
        self.count(&posted).map_err(|_| refused(Refusal::Sums))?;
        if !self.queues.peer().has_whole_jobs() {
            return Ok(Moved::Posted(Arc::new(posted)));
        }
        // One launch, or what goes through buffers: of one layer, as it was put together.
        let mut layer = 0;
        let mut pairs: Vec<GroupPairs> = Vec::new();
        for (group, of, pair) in posted.blocks() {
            layer = of;
            match pairs.iter_mut().find(|pairs| pairs.group == group) {
                Some(of) => of.pairs.push(pair),
                None => pairs.push(GroupPairs {
                    group,
                    pairs: vec![pair],
                }),
            }
        }
        let plans = self.queues.plans();
        let limits = self.queues.peer().limits(plans, &pairs);
        let plan = plans.plan(&pairs, LayerScope::Layer(layer), limits);
        // Every post was looked at: it is there on both sides.
        let plan = plan.map_err(|_| refused(Refusal::OutOfRange))?;
        Ok(Moved::Planned(Arc::new(plan)))
    }

    fn count(&self, posted: &Posted) -> Result<(), Error> {
        let Some(summed) = &self.summed else {
            return Ok(());
        };
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = posted.counts();
        let counts = counts.map(|(group, layer, count)| (group, LayerScope::Layer(layer), count));
        asked.sums += count_sums(&self.request, counts, summed, asked.sums)?;
        // All of them are asked for at once, when all have come.
        asked.blocks += posted.counts().map(|(.., count)| count).sum::<u64>();
        match limits::UNITS as u64 {
            most if asked.blocks > most => Err(Error::TooManySums {
                request: self.request.clone(),
                what: "blocks",
                count: asked.blocks,
                max: most,
            }),
            _ => Ok(()),
        }
    }
}

/// A pull whose blocks kernels ask for. Dropping it without [`commit`](Self::commit) gives it up.
#[derive(Debug)]
pub struct Pull {
    pulling: Arc<Pulling>,
    engine: Arc<Inner>,
    shared: Arc<Shared>,
    id: TransferId,
    owner: u16,
    over: bool,
}

impl Pull {
    pub(crate) fn begin(
        engine: &Arc<Inner>,
        peer: &Arc<PeerSession>,
        (ticket, into): (&Ticket, &[GroupBlocks]),
        options: PullOptions,
    ) -> Result<Self, Error> {
        let plans = peer.pull_plans()?;
        engine.check_blocks(&ticket.request, into)?;
        let wanted = |group| {
            into.iter()
                .any(|p| p.group == group && !p.blocks.is_empty())
        };
        needs_no_other(engine, plans, ticket, wanted)?;
        engine.check_reader(&options)?;
        let side = (SideName::Consumer, Part::Common);
        let summed = verified(engine, peer, side, options.verify)?;
        let who = Claimant {
            request: &ticket.request,
            purpose: Purpose::Pull,
        };
        let claim = engine.claims.claim(who, into.to_vec())?;
        let id = TransferId(engine.runtime.next_id());
        let owner = peer.owner(id);
        let shared = Arc::new(Shared::default());
        let verify = (summed.as_ref()).map(|(part, _)| Verification::new(*part, Vec::new()));
        let spec = Spec {
            id,
            peer: peer.key,
            kind: Kind::Gets {
                release: !options.hold,
            },
            verify: verify.is_some(),
            deadline: engine.deadline(options.deadline),
            workers: peer.worker_count(),
        };
        let live = Box::new(Live {
            engine: Arc::clone(engine),
            peer: Arc::clone(peer),
            told: Told::Owner(Arc::clone(&shared)),
            request: ticket.request.clone(),
            nonce: ticket.nonce,
            tag: options.tag,
            lease: ticket.lease,
            push: false,
            submitted: engine.now(),
            jobs: Vec::new(),
            report: TransferReport::default(),
            verify,
            claim: Some(claim),
            reader: options.stream,
            tells: false,
            into: Some(into.to_vec()),
        });
        peer.submit(owner, spec, live)?;
        let pulling = Arc::new(Pulling {
            queues: Queues::new((id, owner), peer, &plans.common),
            request: ticket.request.clone(),
            offered: ticket.groups.clone(),
            into: into.to_vec(),
            after: options.after,
            summed: summed.map(|(_, summed)| summed),
            asked: Mutex::default(),
        });
        Ok(Self {
            pulling,
            engine: Arc::clone(engine),
            shared,
            id,
            owner,
            over: false,
        })
    }

    /// A queue that kernels ask for blocks of this pull by. It has to be [finished](GpuQueue::finish) before the pull is
    /// [committed](Self::commit).
    ///
    /// # Errors
    ///
    /// As [`Push::gpu_queue`](super::Push::gpu_queue). Of a pull that has its outcome already, the queue tells kernels
    /// so.
    pub fn gpu_queue(&self, config: &GpuQueueConfig) -> Result<GpuQueue, Error> {
        let queues = &self.pulling.queues;
        let (number, shared, served) = queues.make(&self.engine, config)?;
        let Pulling { offered, into, .. } = &*self.pulling;
        let ops = queues.block_ops();
        let table = ops.map(|ops| PostTable::of_gets(ops, offered, into));
        let part_of = PartOf::Pull(Arc::clone(&self.pulling));
        attached(&part_of, number, (&shared, served), table);
        Ok(GpuQueue::new(&self.engine, part_of, number, shared))
    }

    /// Says that nothing more is asked for. The transfer is done when every block has come that was asked for; the
    /// producer is told then that this reader needs the offer no more, unless it is [held](PullOptions::hold).
    ///
    /// Every [queue](Self::gpu_queue) of it has to be [finished](GpuQueue::finish) before, as those of a push; otherwise
    /// the pull is given up.
    ///
    /// # Errors
    ///
    /// [`Error::QueueUnfinished`], [`Error::Forked`]. What else goes wrong is the transfer's outcome.
    pub fn commit(mut self) -> Result<Transfer, Error> {
        self.engine.runtime.health.check_process()?;
        match self.pulling.queues.unfinished() {
            0 => {}
            queues => {
                let request = self.pulling.request.clone();
                return Err(Error::QueueUnfinished { request, queues });
            }
        }
        self.over = true;
        self.pulling.queues.send(Command::Commit { id: self.id });
        Ok(self.transfer())
    }

    /// Gives the pull up. The transfer's outcome is a failure with [`Cause::Cancelled`]; the offer stays as it is.
    pub fn abort(mut self) -> Transfer {
        self.give_up();
        self.transfer()
    }

    fn transfer(&self) -> Transfer {
        let shared = Arc::clone(&self.shared);
        transfer(&self.engine, self.id, self.owner, shared)
    }

    fn give_up(&mut self) {
        self.over = true;
        if self.engine.runtime.health.is_forked() {
            // Nor may the child be the last to let go of what its parent uses.
            return std::mem::forget(Arc::clone(&self.engine));
        }
        self.pulling.queues.send(Command::Cancel { id: self.id });
    }
}

impl Drop for Pull {
    fn drop(&mut self) {
        if !self.over {
            self.give_up();
        }
    }
}
